//! Keys that a service has (`remote_jwks`): fetched when a token needs them, kept for a while, shared by all workers.

use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use tokio::sync::{Mutex, MutexGuard};

use super::keys::Keys;
use super::token::{Fault, Token};
use crate::config::model::ClusterRef;

/// How long nobody is asked again after a failure.
const PAUSE: Duration = Duration::from_secs(1);

/// `RemoteJwks`.
#[derive(Debug)]
pub struct Remote {
    /// The request, in text.
    pub request: Vec<u8>,
    /// Who has them.
    pub cluster: ClusterRef,
    /// How long an answer may take; `None` is for ever.
    pub timeout: Option<Duration>,
    /// How long keys are good.
    pub kept: Duration,
    fetched: ArcSwapOption<Fetched>,
    fetching: Mutex<()>,
}

/// What came of the last attempt.
#[derive(Debug)]
struct Fetched {
    keys: Option<Keys>,
    until: Instant,
}

impl Remote {
    /// Keys that have not been fetched.
    pub fn new(request: Vec<u8>, cluster: ClusterRef, timeout: Option<Duration>, kept: Duration) -> Self {
        Self {
            request,
            cluster,
            timeout,
            kept,
            fetched: ArcSwapOption::empty(),
            fetching: Mutex::new(()),
        }
    }

    /// Whether the service is to be asked.
    pub fn is_due(&self) -> bool {
        let fetched = self.fetched.load();
        fetched.as_ref().is_none_or(|f| Instant::now() >= f.until)
    }

    /// Waits for one's turn to ask; `None` when another one has asked meanwhile.
    pub async fn turn(&self) -> Option<MutexGuard<'_, ()>> {
        let turn = self.fetching.lock().await;
        self.is_due().then_some(turn)
    }

    /// Takes what the service answered with 200, or that it did not.
    ///
    /// # Errors
    /// Why there are no keys now.
    pub fn keep(&self, answer: Option<&[u8]>) -> Result<(), String> {
        let keys = answer.ok_or_else(|| "no answer".to_owned()).and_then(Keys::parse);
        let (keys, kept, result) = match keys {
            Ok(keys) => (Some(keys), self.kept, Ok(())),
            Err(error) => (None, PAUSE, Err(error)),
        };
        let until = Instant::now() + kept;
        self.fetched.store(Some(Arc::new(Fetched { keys, until })));
        result
    }

    /// Verifies by the keys that are here.
    pub(super) fn verify(&self, token: &Token) -> Result<(), Fault> {
        let fetched = self.fetched.load();
        let keys = fetched.as_ref().and_then(|f| f.keys.as_ref());
        keys.ok_or(Fault::Fetch)?.verify(token)
    }
}
