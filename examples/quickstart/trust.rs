//! [`Authority`]: who the nodes' proxies are to each other, and the files that they take their secrets from (SDS from a file).

use std::path::{Path, PathBuf};
use std::{error, fs, result};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, SanType};
use serde_json::{Value, json};

type Result<T> = result::Result<T, Box<dyn error::Error + Send + Sync>>;

/// Whose certificate a node's proxy shows, by SPIFFE ID.
pub(crate) fn identity(node: usize) -> String {
    format!("spiffe://quickstart.test/ns/default/sa/node-{}", node + 1)
}

/// Signs the certificates of one run.
#[derive(Debug)]
pub(crate) struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

/// Where a node's proxy reads its secrets: `DiscoveryResponse`s with one `Secret` each.
#[derive(Clone, Debug)]
pub(crate) struct SecretFiles {
    pub(crate) certificate: PathBuf,
    pub(crate) roots: PathBuf,
}

impl SecretFiles {
    pub(crate) fn within(folder: &Path) -> Self {
        Self {
            certificate: folder.join("certificate.json"),
            roots: folder.join("roots.json"),
        }
    }
}

impl Authority {
    pub(crate) fn new() -> Result<Self> {
        let mut params = CertificateParams::default();
        params
            .distinguished_name
            .push(DnType::CommonName, "quickstart root");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        Ok(Self { issuer })
    }

    /// Writes a new key with a certificate for `identity`, and the roots.
    pub(crate) fn issue(&self, identity: &str, files: &SecretFiles) -> Result<()> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(identity.try_into()?)];
        let certificate = params.signed_by(&key, &self.issuer)?;
        replace(
            &files.roots,
            "ROOTCA",
            "validation_context",
            json!({ "trusted_ca": text(&self.issuer.pem()) }),
        )?;
        replace(
            &files.certificate,
            "default",
            "tls_certificate",
            json!({
                "certificate_chain": text(&certificate.pem()),
                "private_key": text(&key.serialize_pem()),
            }),
        )
    }
}

fn text(pem: &str) -> Value {
    json!({ "inline_string": pem })
}

/// As a whole, as those do who write such files: readable by nobody else, and never half written.
fn replace(file: &Path, name: &str, field: &str, content: Value) -> Result<()> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let secret = json!({ "resources": [{
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret",
        "name": name,
        field: content,
    }] });
    let fresh = file.with_extension("fresh");
    // Left by a run that was killed half way: it may not be there.
    let _ = fs::remove_file(&fresh);
    let mut options = fs::OpenOptions::new();
    let mut writer = options.write(true).create_new(true).mode(0o600).open(&fresh)?;
    std::io::Write::write_all(&mut writer, secret.to_string().as_bytes())?;
    Ok(fs::rename(&fresh, file)?)
}
