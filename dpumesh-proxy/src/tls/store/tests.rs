//! The store beside a small authority: wanted before it is there, there once it is signed, gone when nobody wants it.

use async_trait::async_trait;
use dpumesh_xds::keys::{Relay, RelayError};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, IsCa, Issuer, KeyPair, SanType,
};

use super::*;

#[derive(Debug)]
struct Signer {
    issuer: Issuer<'static, KeyPair>,
    root: String,
}

impl Signer {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = params.self_signed(&key).unwrap().pem();
        Self {
            issuer: Issuer::new(params, key),
            root,
        }
    }
}

#[async_trait]
impl Relay for Signer {
    async fn sign(&self, identity: &Identity, csr_pem: &str) -> Result<Vec<String>, RelayError> {
        let mut request = CertificateSigningRequestParams::from_pem(csr_pem).unwrap();
        request.params.subject_alt_names = vec![SanType::URI(identity.spiffe().as_str().try_into().unwrap())];
        request.params.extended_key_usages = vec![
            rcgen::ExtendedKeyUsagePurpose::ClientAuth,
            rcgen::ExtendedKeyUsagePurpose::ServerAuth,
        ];
        let leaf = request.signed_by(&self.issuer).unwrap();
        Ok(vec![leaf.pem(), self.root.clone()])
    }
}

fn set(names: &[&str]) -> BTreeSet<Arc<str>> {
    names.iter().map(|name| Arc::from(*name)).collect()
}

const FRONT: &str = "spiffe://td/ns/shop/sa/front";

#[tokio::test(flavor = "current_thread")]
async fn what_is_wanted_comes_and_what_is_not_goes() {
    let stored = Stored::default();
    stored.want(&set(&[FRONT, "no spiffe id"]), &set(&["ROOTCA@td", "default"]));
    assert!(stored.certificate(FRONT).is_none());
    assert!(stored.list().iter().all(|secret| secret.certificates.is_empty()));
    stored.open(KeyStore::new(Arc::new(Signer::new())));
    let there = async {
        while stored.certificate(FRONT).is_none() || stored.roots("ROOTCA@td").is_none() {
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(20), there)
        .await
        .expect("a certificate within 20 s");
    let certificate = stored.certificate(FRONT).unwrap();
    assert_eq!(certificate.identity.uri_sans, [FRONT]);
    assert!(
        Arc::ptr_eq(&certificate, &stored.certificate(FRONT).unwrap()),
        "made once"
    );
    assert!(stored.certificate("spiffe://td/ns/shop/sa/other").is_none());
    assert!(stored.certificate("no spiffe id").is_none() && stored.roots("default").is_none());
    stored.want(&set(&[]), &set(&["ROOTCA@td"]));
    assert!(stored.certificate(FRONT).is_none());
    assert!(stored.roots("ROOTCA@td").is_some());
    assert_eq!(stored.list().len(), 1);
}
