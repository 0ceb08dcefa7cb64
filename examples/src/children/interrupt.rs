//! Ctrl-C, SIGTERM and a closed terminal as a flag that the run looks at and waits for.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};

/// Whether the user wants the run to end.
///
/// The first SIGINT, SIGTERM or SIGHUP raises the flag. The second one ends the process at once: what is left then,
/// the next run cleans up. The signals are caught, not blocked: a blocked one would stay so in every child, which
/// then could not be asked to end.
#[derive(Clone, Debug)]
pub struct Interrupt(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    raised: Mutex<bool>,
    changed: Condvar,
}

impl Interrupt {
    /// Begins to take the signals. Call it after [`ensure_privilege`](dpumesh_hw::netns::ensure_privilege), which
    /// wants a single thread. Children are not affected.
    ///
    /// # Errors
    /// If no thread can be started or the signals cannot be caught.
    pub fn catch() -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()?;
        let entered = runtime.enter();
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut hangup = signal(SignalKind::hangup())?;
        drop(entered);
        let shared = Arc::new(Shared::default());
        let raised = Arc::clone(&shared);
        let watch = async move {
            loop {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                    _ = hangup.recv() => {}
                }
                raised.raise();
            }
        };
        thread::Builder::new()
            .name("signals".into())
            .spawn(move || runtime.block_on(watch))?;
        Ok(Self(shared))
    }

    /// Whether a signal has come.
    pub fn is_raised(&self) -> bool {
        *self.0.lock()
    }

    /// Waits for a signal, at most so long; whether one has come.
    pub fn wait(&self, timeout: Duration) -> bool {
        let outcome = self
            .0
            .changed
            .wait_timeout_while(self.0.lock(), timeout, |raised| !*raised);
        *outcome.unwrap_or_else(PoisonError::into_inner).0
    }

    /// An error to leave a run with if a signal has come.
    ///
    /// # Errors
    /// If a signal has come.
    pub fn check(&self) -> io::Result<()> {
        if self.is_raised() {
            Err(io::Error::new(io::ErrorKind::Interrupted, "interrupted"))
        } else {
            Ok(())
        }
    }
}

impl Shared {
    fn raise(&self) {
        let mut flag = self.lock();
        if *flag {
            std::process::exit(130);
        }
        *flag = true;
        drop(flag);
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, bool> {
        self.raised.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
