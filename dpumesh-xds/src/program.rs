//! How a program of this crate begins and ends: the log on stderr, one thread, the reason and the exit status.

use std::fmt::Display;
use std::future::Future;
use std::path::Path;
use std::process::ExitCode;

use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// Runs `program` on this thread with a log of `level` (a level, or a filter such as `dpumesh_xds=debug`) on stderr. The exit status is
/// 0, 1 where it fails (the reason goes to stderr), 2 for a level that is none.
pub fn enter<E: Display>(name: &str, level: &str, program: impl Future<Output = Result<(), E>>) -> ExitCode {
    let filter = match EnvFilter::try_new(level) {
        Ok(filter) => filter,
        Err(error) => {
            eprintln!("{name}: --log-level {level}: {error}");
            return ExitCode::from(2);
        }
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("{name}: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(program) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{name}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Waits for SIGTERM or SIGINT.
pub async fn ended() {
    let (Ok(mut terminate), Ok(mut interrupt)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        // Without handlers a signal ends the process by itself.
        return std::future::pending().await;
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

/// A file's text.
///
/// # Errors
/// Its path and why it cannot be read.
pub fn read(path: &Path) -> Result<String, String> {
    std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))
}
