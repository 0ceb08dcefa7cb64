//! `istio-dpu-agent`: the node agent. See `istio-dpu-agent --help`.

use std::process::ExitCode;

use dpumesh_cni::agent::{Args, Error, run};

fn main() -> ExitCode {
    let args = match Args::read(std::env::args_os()) {
        Ok(args) => args,
        Err(Error::Arguments(error)) => error.exit(),
        Err(error) => return failed(&error),
    };
    let filter = match tracing_subscriber::EnvFilter::try_new(&args.log_level) {
        Ok(filter) => filter,
        Err(error) => {
            eprintln!("istio-dpu-agent: --log-level {}: {error}", args.log_level);
            return ExitCode::from(2);
        }
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error),
    }
}

fn failed(error: &Error) -> ExitCode {
    eprintln!("istio-dpu-agent: {error}");
    ExitCode::FAILURE
}
