//! Chains that were found to lead to their roots: a workload comes again and again with the same certificate.
//!
//! Remembered is only what stays true: that a chain, as it was shown, leads to these roots while all of it is valid. That the peer has
//! the key is proved in every handshake, and the rules on names are asked in every one.

use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256;
use rustls::pki_types::{CertificateDer, UnixTime};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::PeerIdentity;
use super::san::Names;

/// Most chains that are remembered; about a KiB each.
const MOST: usize = 1024;

/// What a chain is for: the extended key usage is part of its verification (RFC 5280, 4.2.1.12).
#[derive(Debug, Clone, Copy)]
pub(super) enum Usage {
    Client,
    Server,
}

/// The chains that were proven by one set of roots.
#[derive(Debug, Default)]
pub(super) struct Proven {
    chains: Mutex<HashMap<[u8; 32], Chain>>,
}

#[derive(Debug)]
struct Chain {
    /// Seconds since 1970 in which every certificate of it is valid.
    valid: RangeInclusive<u64>,
    peer: Arc<PeerIdentity>,
}

impl Proven {
    /// Does without `verify` for a chain that it has proven before.
    ///
    /// # Errors
    /// What `verify` says; that is not remembered.
    pub(super) fn check<E>(
        &self,
        usage: Usage,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        verify: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        let key = digest(usage, leaf, intermediates);
        let holds = |chain: &Chain| chain.valid.contains(&now.as_secs());
        if let Some(key) = key
            && self.chains().get(&key).is_some_and(holds)
        {
            return Ok(());
        }
        verify()?;
        if let (Some(key), Some(chain)) = (key, Chain::of(leaf, intermediates)) {
            let mut chains = self.chains();
            if chains.len() >= MOST {
                chains.retain(|_, chain| holds(chain));
            }
            if chains.len() >= MOST {
                chains.clear();
            }
            chains.insert(key, chain);
        }
        Ok(())
    }

    /// Whom a chain names that was verified.
    pub(super) fn peer(&self, usage: Usage, chain: &[CertificateDer<'_>]) -> Option<Arc<PeerIdentity>> {
        let (leaf, intermediates) = chain.split_first()?;
        let key = digest(usage, leaf, intermediates);
        let known = key.and_then(|key| Some(Arc::clone(&self.chains().get(&key)?.peer)));
        known.or_else(|| peer(leaf))
    }

    fn chains(&self) -> MutexGuard<'_, HashMap<[u8; 32], Chain>> {
        self.chains.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Chain {
    /// `None` where a certificate cannot be read: one that was shown without need may be anything.
    fn of(leaf: &CertificateDer<'_>, intermediates: &[CertificateDer<'_>]) -> Option<Self> {
        let (mut from, mut until) = (0, u64::MAX);
        for certificate in std::iter::once(leaf).chain(intermediates) {
            let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
            let validity = parsed.validity();
            from = from.max(u64::try_from(validity.not_before.timestamp()).unwrap_or(0));
            until = until.min(u64::try_from(validity.not_after.timestamp()).unwrap_or(0));
        }
        Some(Self {
            valid: from..=until,
            peer: peer(leaf)?,
        })
    }
}

/// What a certificate says of its owner.
fn peer(leaf: &CertificateDer<'_>) -> Option<Arc<PeerIdentity>> {
    // It was verified: a certificate that cannot be read did not come this far.
    let names = Names::of(leaf).ok()?;
    Some(Arc::new(PeerIdentity {
        uri_sans: names.uri,
        dns_sans: names.dns,
        email_sans: names.email,
        ip_sans: names.ip,
        subject: names.subject,
        sha256: sha256(leaf),
        certificate: leaf.to_vec(),
    }))
}

/// `None` without a hash function: nothing is remembered then.
fn digest(usage: Usage, leaf: &CertificateDer<'_>, intermediates: &[CertificateDer<'_>]) -> Option<[u8; 32]> {
    let mut hash = TLS13_AES_128_GCM_SHA256.tls13()?.common.hash_provider.start();
    hash.update(&[usage as u8]);
    for certificate in std::iter::once(leaf).chain(intermediates) {
        hash.update(&certificate.len().to_be_bytes());
        hash.update(certificate);
    }
    hash.finish().as_ref().try_into().ok()
}

fn sha256(data: &[u8]) -> [u8; 32] {
    let suite = TLS13_AES_128_GCM_SHA256.tls13();
    let hash = suite.map(|suite| suite.common.hash_provider.hash(data));
    let hash = hash.and_then(|hash| hash.as_ref().try_into().ok());
    hash.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::time::Duration;

    use rcgen::{CertificateParams, KeyPair};

    use super::*;

    fn certificate(name: &str, years: (i32, i32)) -> CertificateDer<'static> {
        let mut params = CertificateParams::new([name.to_owned()]).unwrap();
        params.not_before = rcgen::date_time_ymd(years.0, 1, 1);
        params.not_after = rcgen::date_time_ymd(years.1, 1, 1);
        let own = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        own.der().clone()
    }

    fn in_year(year: u64) -> UnixTime {
        UnixTime::since_unix_epoch(Duration::from_secs((year - 1970) * 31_557_600))
    }

    /// Whether a check was spared.
    fn spared(
        proven: &Proven,
        usage: Usage,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        year: u64,
    ) -> bool {
        let asked = Cell::new(false);
        let good = proven.check(usage, leaf, intermediates, in_year(year), || {
            asked.set(true);
            Ok::<_, ()>(())
        });
        assert_eq!(good, Ok(()));
        !asked.get()
    }

    #[test]
    fn the_same_chain_for_the_same_use_is_proven_once() {
        use Usage::{Client, Server};
        let (leaf, other) = (certificate("a", (2020, 2040)), certificate("b", (2020, 2040)));
        let proven = Proven::default();
        let chain = [other.clone()];
        assert!(!spared(&proven, Client, &leaf, &chain, 2026));
        assert!(spared(&proven, Client, &leaf, &chain, 2026));
        assert!(!spared(&proven, Server, &leaf, &chain, 2026), "for another use");
        assert!(!spared(&proven, Client, &leaf, &[], 2026), "another chain");
        assert!(!spared(&proven, Client, &other, &chain, 2026), "another leaf");
        let whole = CertificateDer::from([leaf.as_ref(), other.as_ref()].concat());
        assert!(
            !spared(&proven, Client, &whole, &[], 2026),
            "the same octets in one"
        );
        let peer = proven.peer(Client, &[leaf.clone(), other.clone()]).unwrap();
        assert_eq!(peer.dns_sans, ["a"]);
        let again = proven.peer(Client, &[leaf, other]).unwrap();
        assert!(Arc::ptr_eq(&peer, &again));
    }

    #[test]
    fn a_chain_is_asked_of_again_outside_the_time_of_any_certificate_of_it() {
        let (leaf, other) = (certificate("a", (2020, 2040)), certificate("b", (2024, 2030)));
        let proven = Proven::default();
        let chain = [other];
        for (year, known) in [(2026, false), (2029, true), (2023, false), (2031, false)] {
            assert_eq!(
                spared(&proven, Usage::Client, &leaf, &chain, year),
                known,
                "{year}"
            );
        }
    }

    #[test]
    fn a_refusal_is_not_remembered() {
        let leaf = certificate("a", (2020, 2040));
        let proven = Proven::default();
        let refused = proven.check(Usage::Client, &leaf, &[], in_year(2026), || Err("no"));
        assert_eq!(refused, Err("no"));
        assert!(!spared(&proven, Usage::Client, &leaf, &[], 2026));
    }

    #[test]
    fn what_is_remembered_has_an_end() {
        let leaf = certificate("a", (2020, 2040));
        let proven = Proven::default();
        for number in 0..MOST as u64 {
            let mut key = [0; 32];
            key[..8].copy_from_slice(&number.to_be_bytes());
            let chain = Chain::of(&leaf, &[]).unwrap();
            proven.chains().insert(key, chain);
        }
        assert_eq!(proven.chains().len(), MOST);
        assert!(!spared(&proven, Usage::Client, &leaf, &[], 2026));
        assert_eq!(proven.chains().len(), 1);
        assert!(spared(&proven, Usage::Client, &leaf, &[], 2026));
    }
}
