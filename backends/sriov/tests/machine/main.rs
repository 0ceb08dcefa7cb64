//! What needs a real SR-IOV card and a real kernel: the virtual machine of `tests/qemu`, with an Intel 82576 whose ports are joined by
//! a cable. Started inside it by `tests/qemu/run PROGRAM [lab | kit | own | bench]`; elsewhere there is no such card, and
//! the program says so and succeeds.

mod bench;
mod kit;
mod lab;
mod own;
mod wire;

use std::path::Path;
use std::process::ExitCode;

/// The card, and the wire's other end.
pub(crate) const PF: &str = "0000:01:00.0";
pub(crate) const PF_NETDEV: &str = "eth0";
pub(crate) const WIRE_NETDEV: &str = "eth1";

fn main() -> ExitCode {
    let id = std::fs::read_to_string(Path::new("/sys/bus/pci/devices").join(PF).join("device"));
    let is_machine = id.is_ok_and(|id| id.trim() == "0x10c9") && Path::new("/test/command").exists();
    if !is_machine {
        println!("machine: skipped: this is not the virtual machine of tests/qemu");
        return ExitCode::SUCCESS;
    }
    let part = std::env::args().nth(1).unwrap_or_default();
    let done = match part.as_str() {
        "lab" => lab::run(),
        "own" => own::run(),
        "bench" => bench::run(),
        "kit" => kit::run(&std::env::args().nth(2).unwrap_or_default()),
        _ => Err(format!("no part `{part}`")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            println!("machine: {part}: FAILED: {reason}");
            ExitCode::FAILURE
        }
    }
}
