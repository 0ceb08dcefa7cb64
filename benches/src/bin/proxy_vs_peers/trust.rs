//! Certificates for one run: a root, and a server's and a client's leaf on P-256, as PEM files and for our own client.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use rustls::ClientConfig;
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::Result;

/// The name in the server's certificate.
pub(crate) const HOST: &str = "app.test";

/// Chain and key in one file each, and both in one as HAProxy wants them.
pub(crate) struct Leaf {
    pub(crate) chain: PathBuf,
    pub(crate) key: PathBuf,
    pub(crate) both: PathBuf,
}

pub(crate) struct Trust {
    pub(crate) root: PathBuf,
    pub(crate) server: Leaf,
    pub(crate) client: Leaf,
}

impl Trust {
    pub(crate) fn new(folder: &Path) -> Result<Self> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        // Another name than the leaves have: a certificate whose issuer is its subject passes for self-signed.
        params
            .distinguished_name
            .push(DnType::CommonName, "root of one run");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = folder.join("root.pem");
        std::fs::write(&root, params.self_signed(&key)?.pem())?;
        let issuer = Issuer::new(params, key);
        let leaf = |name: &str| -> Result<Leaf> {
            let key = KeyPair::generate()?;
            let chain = CertificateParams::new([HOST.to_owned()])?
                .signed_by(&key, &issuer)?
                .pem();
            let key = key.serialize_pem();
            let write = |end: &str, text: &str| -> Result<PathBuf> {
                let path = folder.join(format!("{name}.{end}"));
                std::fs::write(&path, text)?;
                Ok(path)
            };
            Ok(Leaf {
                chain: write("crt", &chain)?,
                key: write("key", &key)?,
                both: write("pem", &format!("{chain}{key}"))?,
            })
        };
        Ok(Self {
            root,
            server: leaf("server")?,
            client: leaf("client")?,
        })
    }

    /// A client of ours with the client's certificate, HTTP/1.1, and no resumption: each handshake is a full one.
    pub(crate) fn client_config(&self) -> Result<Arc<ClientConfig>> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(&self.root)?)?;
        let chain =
            CertificateDer::pem_file_iter(&self.client.chain)?.collect::<std::result::Result<_, _>>()?;
        let key = PrivateKeyDer::from_pem_file(&self.client.key)?;
        let mut config = ClientConfig::builder()
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)?;
        config.resumption = rustls::client::Resumption::disabled();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }
}
