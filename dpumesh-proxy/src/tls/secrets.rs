//! Private keys, certificate chains and trust roots by name.
//!
//! A name is what the configuration says: `spiffe://td/ns/NS/sa/SA` for a workload's key and chain, `ROOTCA@td` for the roots of a trust
//! domain. Whoever holds the keys implements [`Secrets`]; the proxy asks at each handshake, so a renewed certificate serves the next connection
//! and one that comes late heals what was closed without it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use rustls::RootCertStore;
use rustls::crypto::aws_lc_rs::sign::any_supported_type;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::LocalIdentity;
use super::proven::Proven;
use super::san::Names;

/// Where keys, chains and roots come from.
pub trait Secrets: fmt::Debug + Send + Sync {
    /// The key and chain of this name, as of now. Does not block.
    fn certificate(&self, name: &str) -> Option<Arc<Certified>>;

    /// The roots of this name, as of now. Does not block.
    fn roots(&self, name: &str) -> Option<Arc<Roots>>;

    /// The names that the configuration in force uses: `certificates` and `roots`. Those that are not there yet should be fetched.
    fn want(&self, certificates: &BTreeSet<Arc<str>>, roots: &BTreeSet<Arc<str>>);

    /// What is there and what is waited for, for `/config_dump`. No keys.
    fn list(&self) -> Vec<Listed>;
}

/// A secret as it may be shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// Its name.
    pub name: String,
    /// Certificates, DER: the chain or the roots. Empty while it is waited for.
    pub certificates: Vec<Vec<u8>>,
    /// Whether it is roots.
    pub is_roots: bool,
    /// When a chain's leaf ends.
    pub not_after: Option<SystemTime>,
}

impl Listed {
    /// A key's certificate; `None` while it is waited for.
    pub fn certificate(name: &str, certified: Option<&Certified>) -> Self {
        Self {
            name: name.to_owned(),
            certificates: certified
                .map_or_else(Vec::new, |c| c.key.cert.iter().map(|d| d.to_vec()).collect()),
            is_roots: false,
            not_after: certified.map(|c| c.not_after),
        }
    }

    /// Roots; `None` while they are waited for.
    pub fn roots(name: &str, roots: Option<&Roots>) -> Self {
        Self {
            name: name.to_owned(),
            certificates: roots
                .map_or_else(Vec::new, |r| r.certificates.iter().map(|d| d.to_vec()).collect()),
            is_roots: true,
            not_after: None,
        }
    }
}

/// A key with its chain, ready to sign.
#[derive(Debug)]
pub struct Certified {
    /// What TLS shows and signs with.
    pub key: Arc<CertifiedKey>,
    /// Whom it speaks for.
    pub identity: Arc<LocalIdentity>,
    /// When its certificate ends.
    pub not_after: SystemTime,
}

/// Trust roots.
#[derive(Debug)]
pub struct Roots {
    /// For verification.
    pub store: Arc<RootCertStore>,
    /// Their certificates, DER.
    pub certificates: Vec<CertificateDer<'static>>,
    pub(super) proven: Arc<Proven>,
}

/// What is wrong with a secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unusable {
    /// No certificate in it.
    #[error("holds no certificate")]
    NoCertificate,
    /// A certificate does not parse.
    #[error("holds a certificate that does not parse")]
    BadCertificate,
    /// The private key is missing or of a kind that is not supported.
    #[error("holds no private key of a supported kind")]
    BadKey,
    /// Key and certificate do not belong together.
    #[error("its private key is not that of its certificate")]
    Mismatch,
}

impl Certified {
    /// From a chain (leaf first) and its key.
    ///
    /// # Errors
    /// One of them is unusable, or they do not belong together.
    pub fn new(chain: Vec<CertificateDer<'static>>, key: &PrivateKeyDer<'static>) -> Result<Self, Unusable> {
        let leaf = chain.first().ok_or(Unusable::NoCertificate)?;
        let names = Names::of(leaf).map_err(|_| Unusable::BadCertificate)?;
        let (_, parsed) = X509Certificate::from_der(leaf).map_err(|_| Unusable::BadCertificate)?;
        let seconds = u64::try_from(parsed.validity().not_after.timestamp()).unwrap_or_default();
        let key = any_supported_type(key).map_err(|_| Unusable::BadKey)?;
        let certified = CertifiedKey::new(chain, key);
        if certified.keys_match().is_err() {
            return Err(Unusable::Mismatch);
        }
        Ok(Self {
            key: Arc::new(certified),
            identity: Arc::new(LocalIdentity {
                uri_sans: names.uri,
                dns_sans: names.dns,
                email_sans: names.email,
                ip_sans: names.ip,
                subject: names.subject,
            }),
            not_after: SystemTime::UNIX_EPOCH + Duration::from_secs(seconds),
        })
    }

    /// From PEM.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn from_pem(chain: &[u8], key: &[u8]) -> Result<Self, Unusable> {
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| Unusable::BadKey)?;
        Self::new(certificates(chain)?, &key)
    }
}

impl Roots {
    /// From certificates.
    ///
    /// # Errors
    /// There is none, or one cannot be a root.
    pub fn new(certificates: Vec<CertificateDer<'static>>) -> Result<Self, Unusable> {
        let mut store = RootCertStore::empty();
        for certificate in &certificates {
            store
                .add(certificate.clone())
                .map_err(|_| Unusable::BadCertificate)?;
        }
        if certificates.is_empty() {
            return Err(Unusable::NoCertificate);
        }
        Ok(Self {
            store: Arc::new(store),
            certificates,
            proven: Arc::default(),
        })
    }

    /// From PEM.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn from_pem(pem: &[u8]) -> Result<Self, Unusable> {
        Self::new(certificates(pem)?)
    }
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, Unusable> {
    CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(|_| Unusable::BadCertificate)
}

/// Secrets held in memory: what the bootstrap brings, and what whoever embeds the proxy puts in.
#[derive(Debug, Default)]
pub struct Held {
    held: ArcSwap<Content>,
}

#[derive(Debug, Default, Clone)]
struct Content {
    certificates: BTreeMap<String, Arc<Certified>>,
    roots: BTreeMap<String, Arc<Roots>>,
}

impl Held {
    /// Puts a key with its chain in, or in the place of another.
    pub fn put(&self, name: &str, certified: Certified) {
        let certified = Arc::new(certified);
        self.change(|content| {
            drop(
                content
                    .certificates
                    .insert(name.to_owned(), Arc::clone(&certified)),
            )
        });
    }

    /// Puts roots in, or in the place of others.
    pub fn put_roots(&self, name: &str, roots: Roots) {
        let roots = Arc::new(roots);
        self.change(|content| drop(content.roots.insert(name.to_owned(), Arc::clone(&roots))));
    }

    /// Takes out what has this name.
    pub fn remove(&self, name: &str) {
        self.change(|content| {
            content.certificates.remove(name);
            content.roots.remove(name);
        });
    }

    fn change(&self, mut edit: impl FnMut(&mut Content)) {
        self.held.rcu(|held| {
            let mut content = Content::clone(held);
            edit(&mut content);
            content
        });
    }
}

impl Secrets for Held {
    fn certificate(&self, name: &str) -> Option<Arc<Certified>> {
        self.held.load().certificates.get(name).map(Arc::clone)
    }

    fn roots(&self, name: &str) -> Option<Arc<Roots>> {
        self.held.load().roots.get(name).map(Arc::clone)
    }

    fn want(&self, _: &BTreeSet<Arc<str>>, _: &BTreeSet<Arc<str>>) {}

    fn list(&self) -> Vec<Listed> {
        let held = self.held.load();
        let certificates = held.certificates.iter();
        let certificates = certificates.map(|(name, c)| Listed::certificate(name, Some(c)));
        let roots = held.roots.iter().map(|(name, r)| Listed::roots(name, Some(r)));
        certificates.chain(roots).collect()
    }
}
