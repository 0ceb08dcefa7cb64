//! How a program of this crate begins and ends: the log on stderr, the reason and the exit status.

use std::fmt::Display;
use std::process::ExitCode;

use tracing_subscriber::EnvFilter;

use crate::levels;

/// Runs `program` with a log of `level` (a level, or a filter such as `dpumesh_proxy=debug`) on stderr. The exit status is
/// 0, 1 where it fails (the reason goes to stderr), 2 for a level that is none.
pub fn enter<E: Display>(name: &str, level: &str, program: impl FnOnce() -> Result<(), E>) -> ExitCode {
    let filter = match EnvFilter::try_new(level) {
        Ok(filter) => filter,
        Err(error) => {
            eprintln!("{name}: --log-level {level}: {error}");
            return ExitCode::from(2);
        }
    };
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_filter_reloading();
    let handle = log.reload_handle();
    levels::begin(level, Box::new(move |filter| handle.reload(filter).is_ok()));
    log.init();
    match program() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{name}: {error}");
            ExitCode::FAILURE
        }
    }
}
