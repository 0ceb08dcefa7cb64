//! `dpu-proxy`: the shared service proxy. See `dpu-proxy --help`.

use std::process::ExitCode;

use clap::Parser;
use dpumesh_proxy::program::{Args, run};

fn main() -> ExitCode {
    let args = Args::parse();
    dpumesh_proxy::entry::enter("dpu-proxy", &args.log_level, || run(&args))
}
