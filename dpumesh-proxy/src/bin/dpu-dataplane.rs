//! `dpu-dataplane`: the forwarding engine of a DPU's SoC. See `dpu-dataplane --help`.

use std::process::ExitCode;

use clap::Parser;
use dpumesh_proxy::dataplane::{Args, run};

fn main() -> ExitCode {
    let args = Args::parse();
    dpumesh_proxy::entry::enter("dpu-dataplane", &args.log_level, || run(&args))
}
