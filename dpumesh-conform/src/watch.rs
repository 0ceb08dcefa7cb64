//! The last line of defence against a backend that hangs: a thread that ends the process.
//!
//! Each case has a deadline of its own ([`dpumesh_hw::conformance::run`]), also when it blocks its thread. What that
//! cannot stop (a fixture that blocks while it is dropped, a stopped disk under the report) ends here.

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

/// Runs `last_words` and ends the process with `code` unless it is dropped within `limit`.
#[derive(Debug)]
pub(crate) struct Watch {
    _alive: Sender<()>,
}

impl Watch {
    /// Starts watching.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub(crate) fn start(
        limit: Duration,
        code: i32,
        last_words: impl FnOnce() + Send + 'static,
    ) -> std::io::Result<Self> {
        let (alive, ended) = channel();
        thread::Builder::new().name("watch".into()).spawn(move || {
            if ended.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                last_words();
                std::process::exit(code);
            }
        })?;
        Ok(Self { _alive: alive })
    }
}
