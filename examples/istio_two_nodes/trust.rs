//! [`Authority`]: who may talk to whom between controller, adapters and proxies. What a cluster's own PKI would do.

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, SanType,
};

use super::Result;

/// Issues certificates for both directions of mutual TLS.
#[derive(Debug)]
pub(crate) struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

/// Files of one party.
#[derive(Clone, Debug)]
pub(crate) struct Credentials {
    /// The authority's certificate.
    pub(crate) ca: PathBuf,
    /// The party's certificate.
    pub(crate) cert: PathBuf,
    /// Its key.
    pub(crate) key: PathBuf,
}

impl Authority {
    pub(crate) fn new() -> Result<Self> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        Ok(Self { issuer })
    }

    /// Writes credentials for `name`, and for `address` where it has one, into `folder`.
    pub(crate) fn issue(&self, folder: &Path, name: &str, address: Option<IpAddr>) -> Result<Credentials> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(vec![name.to_owned()])?;
        params.subject_alt_names.extend(address.map(SanType::IpAddress));
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let certificate = params.signed_by(&key, &self.issuer)?;
        fs::create_dir_all(folder)?;
        let credentials = Credentials {
            ca: folder.join("ca.pem"),
            cert: folder.join("certificate.pem"),
            key: folder.join("key.pem"),
        };
        fs::write(&credentials.ca, self.issuer.pem())?;
        fs::write(&credentials.cert, certificate.pem())?;
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&credentials.key)?;
        std::io::Write::write_all(&mut file, key.serialize_pem().as_bytes())?;
        Ok(credentials)
    }
}
