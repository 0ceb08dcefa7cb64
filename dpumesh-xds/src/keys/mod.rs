//! Keys of workloads, made where they are used: on the SoC, in the shared proxy's memory.
//!
//! ```text
//! want(identity) ─► new P-256 key ─► CSR ─► Relay ─► chain ─► check ─► Certified ─► whoever watches; Envoy by [`sds`]
//!                        ▲                                       │
//!                        └── at half of the lifetime, or after a ◄┘ (refused or unreachable: the last good one stays)
//!                            random wait that doubles
//! ```
//!
//! A private key is in this store and in what watches it, nowhere else: not on disk, not on the host. What comes back for a request
//! is used only if it is a chain for exactly the key that was made and exactly the identity that was asked for ([`check`]). A
//! renewal makes a new key. A certificate that ended is still shown, as the last good one: peers refuse it, so connections
//! fail closed until the next one comes.
//!
//! Identities are asked for by [`KeyStore::want`] and stay until [`KeyStore::forget`]. Roots are those of the newest chain in their trust
//! domain.

pub mod check;
mod relay;
pub mod sds;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::AbortHandle;

pub(crate) use relay::{
    CREATE_CERTIFICATE, CertificateRequest, CertificateResponse, IMPERSONATED, ROOTS, SERVICE, create,
};
pub use relay::{IstioRelay, Relay, RelayError, TokenRelay};

use crate::client::full_jitter;
use crate::ir::Identity;

/// A key and its certificate.
#[derive(Clone)]
pub struct Certified {
    /// Whose.
    pub identity: Identity,
    /// Leaf first, then what links it to a root; the root itself is left out. DER.
    pub chain_der: Vec<Vec<u8>>,
    /// The private key, PKCS#8 DER.
    pub key_der: Vec<u8>,
    /// Roots of the trust domain. DER.
    pub roots_der: Vec<Vec<u8>>,
    /// From when it is good.
    pub not_before: SystemTime,
    /// Until when it is good.
    pub not_after: SystemTime,
}

impl fmt::Debug for Certified {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certified")
            .field("identity", &self.identity.spiffe())
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

/// The roots of one trust domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Roots {
    /// DER.
    pub der: Vec<Vec<u8>>,
}

/// What one may watch: `None` until there is the first.
pub type Watch<T> = watch::Receiver<Option<Arc<T>>>;

/// How one identity stands, for the admin page.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct KeyStatus {
    /// `spiffe://…`.
    pub identity: String,
    /// Certificates got since the start.
    pub issued: u64,
    /// Attempts that failed since the start.
    pub failed: u64,
    /// Why the last attempt failed, when it did.
    pub error: Option<String>,
    /// Seconds until the certificate ends; `None` without one.
    pub ends_in: Option<u64>,
}

/// All identities of a proxy. Clones share them.
#[derive(Debug, Clone)]
pub struct KeyStore(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    relay: Arc<dyn Relay>,
    runtime: Handle,
    tables: Mutex<Tables>,
}

#[derive(Debug, Default)]
struct Tables {
    keys: BTreeMap<Identity, Entry>,
    roots: BTreeMap<String, watch::Sender<Option<Arc<Roots>>>>,
}

#[derive(Debug)]
struct Entry {
    current: watch::Sender<Option<Arc<Certified>>>,
    issued: u64,
    failed: u64,
    error: Option<String>,
    task: AbortHandle,
}

impl KeyStore {
    /// An empty store whose work is done on the runtime that this is called on.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn new(relay: Arc<dyn Relay>) -> Self {
        Self(Arc::new(Shared {
            relay,
            runtime: Handle::current(),
            tables: Mutex::default(),
        }))
    }

    /// The key of an identity, made and kept fresh from now on. Any thread may call this; it does not wait.
    pub fn want(&self, identity: &Identity) -> Watch<Certified> {
        let mut tables = self.0.tables();
        if let Some(entry) = tables.keys.get(identity) {
            return entry.current.subscribe();
        }
        let (current, watch) = watch::channel(None);
        // Weak, so that a store nobody has any more ends its work.
        let task = self
            .0
            .runtime
            .spawn(keep(Arc::downgrade(&self.0), identity.clone()));
        tables.keys.insert(
            identity.clone(),
            Entry {
                current,
                issued: 0,
                failed: 0,
                error: None,
                task: task.abort_handle(),
            },
        );
        watch
    }

    /// The key of an identity as it is now, if it is wanted and there is one.
    pub fn certified(&self, identity: &Identity) -> Option<Arc<Certified>> {
        self.0.tables().keys.get(identity)?.current.borrow().clone()
    }

    /// The roots of a trust domain. They are asked of the relay where no identity of it has a certificate yet.
    pub fn roots(&self, trust_domain: &str) -> Watch<Roots> {
        let mut tables = self.0.tables();
        if let Some(known) = tables.roots.get(trust_domain) {
            return known.subscribe();
        }
        let (roots, watch) = watch::channel(None);
        tables.roots.insert(trust_domain.to_owned(), roots);
        self.0
            .runtime
            .spawn(first_roots(Arc::downgrade(&self.0), trust_domain.to_owned()));
        watch
    }

    /// Drops an identity's key; who watches it sees the channel end.
    pub fn forget(&self, identity: &Identity) {
        if let Some(entry) = self.0.tables().keys.remove(identity) {
            entry.task.abort();
        }
    }

    /// How all identities stand.
    pub fn status(&self) -> Vec<KeyStatus> {
        let now = SystemTime::now();
        let one = |(identity, entry): (&Identity, &Entry)| KeyStatus {
            identity: identity.spiffe(),
            issued: entry.issued,
            failed: entry.failed,
            error: entry.error.clone(),
            ends_in: entry
                .current
                .borrow()
                .as_ref()
                .map(|c| c.not_after.duration_since(now).unwrap_or_default().as_secs()),
        };
        self.0.tables().keys.iter().map(one).collect()
    }
}

impl Shared {
    fn tables(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes one key and gets its certificate.
    async fn attempt(&self, identity: &Identity) -> Result<Certified, String> {
        let request = check::Request::new(identity).map_err(|error| error.to_string())?;
        let chain = self
            .relay
            .sign(identity, &request.csr_pem)
            .await
            .map_err(|error| error.to_string())?;
        request
            .certified(&chain, SystemTime::now())
            .map_err(|error| error.to_string())
    }

    /// Shows a new certificate to whoever watches.
    fn issued(&self, certified: Certified) {
        self.trust(&certified.identity.trust_domain, certified.roots_der.clone());
        let mut tables = self.tables();
        if let Some(entry) = tables.keys.get_mut(&certified.identity) {
            entry.issued += 1;
            entry.error = None;
            entry.current.send_replace(Some(Arc::new(certified)));
        }
    }

    fn trust(&self, trust_domain: &str, der: Vec<Vec<u8>>) {
        let roots = Arc::new(Roots { der });
        let mut tables = self.tables();
        let shown = tables.roots.entry(trust_domain.to_owned()).or_default();
        shown.send_if_modified(|current| {
            let changed = current.as_ref() != Some(&roots);
            *current = Some(roots);
            changed
        });
    }

    /// Whether the roots of a trust domain are known.
    fn trusts(&self, trust_domain: &str) -> bool {
        let tables = self.tables();
        tables
            .roots
            .get(trust_domain)
            .is_some_and(|roots| roots.borrow().is_some())
    }

    fn failed(&self, identity: &Identity, error: String) {
        if let Some(entry) = self.tables().keys.get_mut(identity) {
            entry.failed += 1;
            entry.error = Some(error);
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        for entry in self.tables().keys.values() {
            entry.task.abort();
        }
    }
}

/// Keeps one identity's certificate fresh for as long as its store is there.
async fn keep(store: std::sync::Weak<Shared>, identity: Identity) {
    let mut failures = 0;
    loop {
        let Some(shared) = store.upgrade() else { return };
        let wait = match shared.attempt(&identity).await {
            Ok(certified) => {
                failures = 0;
                let wait = renew_in(
                    certified.not_before,
                    certified.not_after,
                    SystemTime::now(),
                    fastrand::f64(),
                );
                tracing::info!(
                    identity = identity.spiffe(),
                    seconds = wait.as_secs(),
                    "certificate got; renewed later"
                );
                shared.issued(certified);
                wait
            }
            Err(error) => {
                let wait = full_jitter(failures);
                failures += 1;
                tracing::warn!(
                    identity = identity.spiffe(),
                    error,
                    "no certificate; the last good one stays"
                );
                shared.failed(&identity, error);
                wait
            }
        };
        drop(shared);
        tokio::time::sleep(wait).await;
    }
}

/// Asks for the roots of a trust domain until they are known, one way or the other.
async fn first_roots(store: std::sync::Weak<Shared>, trust_domain: String) {
    let mut failures = 0;
    loop {
        let Some(shared) = store.upgrade() else { return };
        if shared.trusts(&trust_domain) {
            return;
        }
        let answer = shared.relay.roots(&trust_domain).await;
        match answer
            .map_err(|error| error.to_string())
            .and_then(|pem| check::roots(&pem))
        {
            Ok(_) if shared.trusts(&trust_domain) => return,
            Ok(der) => return shared.trust(&trust_domain, der),
            Err(error) => tracing::debug!(trust_domain, error, "no roots yet"),
        }
        drop(shared);
        tokio::time::sleep(full_jitter(failures)).await;
        failures += 1;
    }
}

/// The shortest time between two certificates of one identity.
const SHORTEST: Duration = Duration::from_millis(500);

/// How long a certificate is left alone: half of its lifetime, a tenth of it more or less. `random` is in 0..1.
fn renew_in(not_before: SystemTime, not_after: SystemTime, now: SystemTime, random: f64) -> Duration {
    let lifetime = not_after.duration_since(not_before).unwrap_or_default();
    let due = not_before + lifetime.mul_f64(0.45 + 0.1 * random);
    due.duration_since(now).unwrap_or_default().max(SHORTEST)
}

#[cfg(test)]
pub(crate) mod tests;
