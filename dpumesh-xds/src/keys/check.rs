//! A request for a certificate, and whether what came back answers it.
//!
//! Taken is only a chain whose leaf has the key that was made here and one URI name, that of the identity (`spiffe://…`; RFC 5280,
//! SPIFFE X509-SVID), that is good now, and that leads to a root in the answer with every signature right. The roots are taken
//! from the same answer: whom to trust is what the CA says over the authenticated relay, as it is for Istio's own agent.

use std::time::{Duration, SystemTime};

use rcgen::{
    CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData as _, SanType,
};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, UnixTime};
use webpki::{EndEntityCert, KeyUsage};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use super::Certified;
use crate::ir::Identity;

/// The most certificates in an answer.
const MAX_CHAIN: usize = 16;

/// Why no certificate came of a request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CheckError {
    /// The key or the request could not be made.
    #[error("request: {0}")]
    Request(String),
    /// The answer holds no, too many or unreadable certificates.
    #[error("certificate {index} of the answer: {reason}")]
    Unreadable {
        /// Place in the answer.
        index: usize,
        /// What is wrong.
        reason: String,
    },
    /// The answer is no chain.
    #[error("the answer holds {0} certificates instead of 2 to {MAX_CHAIN}")]
    Count(usize),
    /// For another key.
    #[error("the certificate is for a key that was not asked for")]
    OtherKey,
    /// For somebody else.
    #[error("the certificate names {found:?} instead of {wanted}")]
    OtherIdentity {
        /// The names it has.
        found: Vec<String>,
        /// The name it should have.
        wanted: String,
    },
    /// Not now, or not linked to the answer's root.
    #[error("the chain does not hold: {0}")]
    Chain(String),
}

/// A new key and the request for its certificate.
#[derive(Debug)]
pub struct Request {
    /// PKCS#10, PEM.
    pub csr_pem: String,
    identity: Identity,
    key: KeyPair,
}

impl Request {
    /// Makes a P-256 key and a request for `identity`.
    ///
    /// # Errors
    /// [`CheckError::Request`]: no randomness, or a name that is no URI.
    pub fn new(identity: &Identity) -> Result<Self, CheckError> {
        let failed = |error: rcgen::Error| CheckError::Request(error.to_string());
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(failed)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(identity.spiffe().try_into().map_err(failed)?)];
        let request = params.serialize_request(&key).map_err(failed)?;
        Ok(Self {
            csr_pem: request.pem().map_err(failed)?,
            identity: identity.clone(),
            key,
        })
    }

    /// Checks the answer (PEM blocks, leaf first, root last) as of `now`.
    ///
    /// # Errors
    /// What is wrong with it; nothing of it may be used then.
    pub fn certified(self, chain_pem: &[String], now: SystemTime) -> Result<Certified, CheckError> {
        let mut chain = read(chain_pem)?;
        let leaf_der = chain[0].clone();
        let (_, leaf) = X509Certificate::from_der(&leaf_der).map_err(|error| CheckError::Unreadable {
            index: 0,
            reason: error.to_string(),
        })?;
        if leaf.public_key().raw != self.key.subject_public_key_info() {
            return Err(CheckError::OtherKey);
        }
        one_name(&leaf, &self.identity)?;
        let root = chain.split_off(chain.len() - 1);
        holds(&chain, &root[0], now)?;
        let time = |at: x509_parser::time::ASN1Time| {
            SystemTime::UNIX_EPOCH + Duration::from_secs(at.timestamp().try_into().unwrap_or(0))
        };
        let validity = leaf.validity();
        Ok(Certified {
            identity: self.identity,
            chain_der: bytes(chain),
            key_der: self.key.serialize_der(),
            roots_der: bytes(root),
            not_before: time(validity.not_before),
            not_after: time(validity.not_after),
        })
    }
}

fn bytes(certificates: Vec<CertificateDer<'static>>) -> Vec<Vec<u8>> {
    certificates.into_iter().map(|c| c.as_ref().to_vec()).collect()
}

/// The certificates of an answer that has only roots. DER.
pub(super) fn roots(roots_pem: &[String]) -> Result<Vec<Vec<u8>>, String> {
    let roots = certificates(roots_pem).map_err(|error| error.to_string())?;
    if !(1..=MAX_CHAIN).contains(&roots.len()) {
        return Err(format!("{} roots", roots.len()));
    }
    for root in &roots {
        webpki::anchor_from_trusted_cert(root).map_err(|error| error.to_string())?;
    }
    Ok(bytes(roots))
}

/// An element of the answer may hold one certificate or several.
fn certificates(chain_pem: &[String]) -> Result<Vec<CertificateDer<'static>>, CheckError> {
    let mut chain = Vec::new();
    for (index, pem) in chain_pem.iter().enumerate() {
        for certificate in CertificateDer::pem_slice_iter(pem.as_bytes()) {
            chain.push(certificate.map_err(|error| CheckError::Unreadable {
                index,
                reason: error.to_string(),
            })?);
        }
    }
    Ok(chain)
}

fn read(chain_pem: &[String]) -> Result<Vec<CertificateDer<'static>>, CheckError> {
    let chain = certificates(chain_pem)?;
    if (2..=MAX_CHAIN).contains(&chain.len()) {
        Ok(chain)
    } else {
        Err(CheckError::Count(chain.len()))
    }
}

fn one_name(leaf: &X509Certificate<'_>, identity: &Identity) -> Result<(), CheckError> {
    let names = leaf
        .subject_alternative_name()
        .ok()
        .flatten()
        .map(|extension| &extension.value.general_names);
    let shown = |name: &GeneralName<'_>| match name {
        GeneralName::URI(uri) => (*uri).to_owned(),
        other => format!("{other:?}"),
    };
    let found: Vec<String> = names.into_iter().flatten().map(shown).collect();
    let wanted = identity.spiffe();
    if found == [wanted.as_str()] {
        Ok(())
    } else {
        Err(CheckError::OtherIdentity { found, wanted })
    }
}

fn holds(
    chain: &[CertificateDer<'static>],
    root: &CertificateDer<'static>,
    now: SystemTime,
) -> Result<(), CheckError> {
    let failed = |error: webpki::Error| CheckError::Chain(error.to_string());
    let anchor = webpki::anchor_from_trusted_cert(root).map_err(failed)?;
    let leaf = EndEntityCert::try_from(&chain[0]).map_err(failed)?;
    let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    leaf.verify_for_usage(
        webpki::ALL_VERIFICATION_ALGS,
        &[anchor],
        &chain[1..],
        UnixTime::since_unix_epoch(now),
        KeyUsage::client_auth(),
        None,
        None,
    )
    .map(|_| ())
    .map_err(failed)
}
