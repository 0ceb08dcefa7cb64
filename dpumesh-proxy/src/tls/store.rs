//! The key store of this machine ([`dpumesh_xds::keys`]) as [`Secrets`]: keys are born here, the adapter relays their CSRs.
//!
//! Certificates are turned into what TLS works with when they are first asked for, and again when they were renewed.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use dpumesh_xds::ir::Identity;
use dpumesh_xds::keys::{self, KeyStore, Watch};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use super::secrets::{Certified, Listed, Roots, Secrets, Unusable};

/// Prefix of the names of roots; the trust domain follows.
const ROOTS: &str = "ROOTCA@";

/// A key store, perhaps still to be opened: names wanted before are remembered.
#[derive(Default)]
pub struct Stored {
    store: OnceLock<KeyStore>,
    names: Mutex<Names>,
}

#[derive(Default)]
struct Names {
    certificates: BTreeMap<Arc<str>, Option<Identity>>,
    roots: HashMap<Arc<str>, Option<Watch<keys::Roots>>>,
    made: HashMap<Identity, Made<keys::Certified, Certified>>,
    made_roots: HashMap<Arc<str>, Made<keys::Roots, Roots>>,
}

/// What was made of what; `None` where it could not be.
type Made<A, B> = (Arc<A>, Option<Arc<B>>);

impl fmt::Debug for Stored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stored").finish_non_exhaustive()
    }
}

impl Stored {
    /// Opens it. Once; a second store is dropped.
    pub fn open(&self, store: KeyStore) {
        if self.store.set(store).is_ok() {
            let mut names = self.names();
            let wanted = names.certificates.values().flatten();
            wanted.for_each(|identity| drop(self.store.get().map(|s| s.want(identity))));
            let roots: Vec<Arc<str>> = names.roots.keys().map(Arc::clone).collect();
            for name in roots {
                let watch = self.watch(&name);
                names.roots.insert(name, watch);
            }
        }
    }

    fn names(&self) -> MutexGuard<'_, Names> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn watch(&self, name: &str) -> Option<Watch<keys::Roots>> {
        Some(self.store.get()?.roots(name.strip_prefix(ROOTS)?))
    }
}

impl Secrets for Stored {
    fn certificate(&self, name: &str) -> Option<Arc<Certified>> {
        let mut names = self.names();
        let identity = names.certificates.get(name)?.clone()?;
        let from = self.store.get()?.certified(&identity)?;
        let entry = names.made.entry(identity);
        let made = entry.or_insert_with(|| (Arc::clone(&from), logged(name, certified(&from))));
        if !Arc::ptr_eq(&made.0, &from) {
            *made = (Arc::clone(&from), logged(name, certified(&from)));
        }
        made.1.clone()
    }

    fn roots(&self, name: &str) -> Option<Arc<Roots>> {
        let mut names = self.names();
        let from = names.roots.get(name)?.as_ref()?.borrow().clone()?;
        let entry = names.made_roots.entry(name.into());
        let made = entry.or_insert_with(|| (Arc::clone(&from), logged(name, roots(&from))));
        if !Arc::ptr_eq(&made.0, &from) {
            *made = (Arc::clone(&from), logged(name, roots(&from)));
        }
        made.1.clone()
    }

    fn want(&self, certificates: &BTreeSet<Arc<str>>, roots: &BTreeSet<Arc<str>>) {
        let mut names = self.names();
        let gone: Vec<Arc<str>> = names
            .certificates
            .keys()
            .filter(|name| !certificates.contains(*name))
            .map(Arc::clone)
            .collect();
        for name in gone {
            if let Some(identity) = names.certificates.remove(&name).flatten() {
                names.made.remove(&identity);
                if let Some(store) = self.store.get() {
                    store.forget(&identity);
                }
            }
        }
        for name in certificates {
            if names.certificates.contains_key(name) {
                continue;
            }
            let identity = Identity::parse(name);
            if let (Some(identity), Some(store)) = (&identity, self.store.get()) {
                drop(store.want(identity));
            }
            names.certificates.insert(Arc::clone(name), identity);
        }
        names.roots.retain(|name, _| roots.contains(name));
        names.made_roots.retain(|name, _| roots.contains(name));
        for name in roots {
            if !names.roots.contains_key(name) {
                let watch = self.watch(name);
                names.roots.insert(Arc::clone(name), watch);
            }
        }
    }

    fn list(&self) -> Vec<Listed> {
        let wanted: Vec<Arc<str>> = self.names().certificates.keys().map(Arc::clone).collect();
        let certificate = |name: &Arc<str>| Listed::certificate(name, self.certificate(name).as_deref());
        let mut list: Vec<Listed> = wanted.iter().map(certificate).collect();
        let roots: Vec<Arc<str>> = self.names().roots.keys().map(Arc::clone).collect();
        list.extend(
            roots
                .iter()
                .map(|name| Listed::roots(name, self.roots(name).as_deref())),
        );
        list
    }
}

fn logged<T>(name: &str, made: Result<T, Unusable>) -> Option<Arc<T>> {
    made.inspect_err(|error| tracing::warn!(secret = name, %error, "a secret cannot be used"))
        .ok()
        .map(Arc::new)
}

fn certified(from: &keys::Certified) -> Result<Certified, Unusable> {
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(from.key_der.clone()));
    Certified::new(der(&from.chain_der), &key)
}

fn roots(from: &keys::Roots) -> Result<Roots, Unusable> {
    Roots::new(der(&from.der))
}

fn der(certificates: &[Vec<u8>]) -> Vec<CertificateDer<'static>> {
    certificates.iter().cloned().map(CertificateDer::from).collect()
}

#[cfg(test)]
mod tests;
