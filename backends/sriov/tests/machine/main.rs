//! What needs a real SR-IOV card and a real kernel: the virtual machine of `tests/qemu`, with an Intel 82576 whose ports are joined by
//! a cable. Started inside it by `tests/qemu/run PROGRAM [lab | own | bench]`; elsewhere there is no such card, and
//! the program says so and succeeds. The conformance kit runs there too, by `dpumesh-conform`; what it skips, and why, is in
//! `expected.json`.

mod bench;
mod lab;
mod own;
mod wire;

use std::path::Path;
use std::process::ExitCode;
use std::sync::OnceLock;

use dpumesh_core::PciAddress;
use dpumesh_hw::netlink::{LinkChange, Netlink};
use dpumesh_sriov::Options;
use dpumesh_sriov::real::RealFixture;

use own::text;

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

/// The card, as it comes: options that open it, with the PF switched on and its VFs there.
pub(crate) fn fresh() -> Result<Options, String> {
    static CARD: OnceLock<RealFixture> = OnceLock::new();
    let fixture = match CARD.get() {
        Some(fixture) => fixture,
        None => {
            let device: PciAddress = PF.parse().map_err(|_| "no address")?;
            let mut options = Options::new(device, "dpu0", "/tmp/journals");
            options.vlans = Some((3000, 3100));
            let fixture = RealFixture::new("igb", options, 3).map_err(text)?;
            CARD.get_or_init(|| fixture)
        }
    };
    // The cable's other end must take what is sent, or its buffer fills up and the machine stands still.
    let mut netlink = Netlink::open().map_err(text)?;
    let wire = netlink.link(WIRE_NETDEV).map_err(text)?;
    netlink
        .change_link(wire.index, &LinkChange::new().up())
        .map_err(text)?;
    fixture.fresh().map_err(text)
}
