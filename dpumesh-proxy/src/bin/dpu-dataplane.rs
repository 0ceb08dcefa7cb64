//! `dpu-dataplane`: the forwarding engine of a DPU's SoC. See `dpu-dataplane --help`.

use std::process::ExitCode;

use clap::Parser;
use dpumesh_proxy::dataplane::{Args, run};

fn main() -> ExitCode {
    let args = Args::parse();
    let filter = match tracing_subscriber::EnvFilter::try_new(&args.log_level) {
        Ok(filter) => filter,
        Err(error) => {
            eprintln!("dpu-dataplane: --log-level {}: {error}", args.log_level);
            return ExitCode::from(2);
        }
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("dpu-dataplane: {error}");
            ExitCode::FAILURE
        }
    }
}
