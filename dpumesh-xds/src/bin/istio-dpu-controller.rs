//! `istio-dpu-controller`: see `istio-dpu-controller --help`.

use std::process::ExitCode;

use clap::Parser;
use dpumesh_xds::controller::{Args, run};

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let args = Args::parse();
    let filter = match tracing_subscriber::EnvFilter::try_new(&args.log_level) {
        Ok(filter) => filter,
        Err(error) => {
            eprintln!("istio-dpu-controller: --log-level {}: {error}", args.log_level);
            return ExitCode::from(2);
        }
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    match run(&args).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("istio-dpu-controller: {error}");
            ExitCode::FAILURE
        }
    }
}
