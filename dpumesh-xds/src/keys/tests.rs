//! The store against a small CA, honest and otherwise.

use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use prost::Message as _;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, SanType,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::client::Grpc;

use super::check::{CheckError, Request};
use super::*;
use crate::discovery::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse, ResourceType,
};

fn identity(account: &str) -> Identity {
    Identity::parse(&format!("spiffe://cluster.local/ns/shop/sa/{account}")).unwrap()
}

/// A CA that can be told to misbehave.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pub(crate) root_pem: String,
    lifetime: Duration,
    /// Signs this instead of what was asked for.
    instead: Option<String>,
    calls: AtomicUsize,
    /// As many calls fail, from the first on.
    failing: usize,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Authority")
    }
}

impl Authority {
    pub(crate) fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root_pem = params.self_signed(&key).unwrap().pem();
        Self {
            issuer: Issuer::new(params, key),
            root_pem,
            lifetime: Duration::from_secs(3600),
            instead: None,
            calls: AtomicUsize::new(0),
            failing: 0,
        }
    }

    /// As istiod does it: the name comes from the credential, not from the request.
    pub(crate) fn issue(&self, spiffe: &str, csr_pem: &str) -> Vec<String> {
        let mut request = CertificateSigningRequestParams::from_pem(csr_pem).unwrap();
        let name = self.instead.as_deref().unwrap_or(spiffe);
        request.params.subject_alt_names = vec![SanType::URI(name.try_into().unwrap())];
        request.params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ClientAuth,
            ExtendedKeyUsagePurpose::ServerAuth,
        ];
        let now = SystemTime::now();
        request.params.not_before = now.into();
        request.params.not_after = (now + self.lifetime).into();
        vec![
            request.signed_by(&self.issuer).unwrap().pem(),
            self.root_pem.clone(),
        ]
    }
}

#[async_trait]
impl Relay for Authority {
    async fn sign(&self, identity: &Identity, csr_pem: &str) -> Result<Vec<String>, RelayError> {
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        if call < self.failing {
            return Err(RelayError("istiod is away".into()));
        }
        Ok(self.issue(&identity.spiffe(), csr_pem))
    }
}

async fn next<T>(watch: &mut Watch<T>) -> Arc<T> {
    let wait = async {
        loop {
            if let Some(value) = watch.borrow_and_update().clone() {
                return value;
            }
            watch.changed().await.unwrap();
        }
    };
    tokio::time::timeout(Duration::from_secs(20), wait).await.unwrap()
}

#[tokio::test]
async fn an_identity_gets_its_key_and_everybody_the_same() {
    let store = KeyStore::new(Arc::new(Authority::new()));
    let mut watch = store.want(&identity("front"));
    let certified = next(&mut watch).await;
    assert_eq!(certified.identity, identity("front"));
    assert_eq!((certified.chain_der.len(), certified.roots_der.len()), (1, 1));
    let again = next(&mut store.want(&identity("front"))).await;
    assert!(Arc::ptr_eq(&certified, &again));
    assert_eq!(
        next(&mut store.roots("cluster.local")).await.der,
        certified.roots_der
    );
    let status = store.status();
    assert_eq!((status[0].issued, status[0].failed), (1, 0));
    assert!(!format!("{certified:?}").contains("key_der"));
    store.forget(&identity("front"));
    assert!(watch.changed().await.is_err());
}

#[tokio::test]
async fn a_certificate_is_renewed_with_a_new_key_before_it_ends() {
    let mut authority = Authority::new();
    authority.lifetime = Duration::from_secs(3);
    let store = KeyStore::new(Arc::new(authority));
    let mut watch = store.want(&identity("front"));
    let first = next(&mut watch).await;
    watch.changed().await.unwrap();
    let second = next(&mut watch).await;
    assert_ne!(first.key_der, second.key_der);
    assert!(SystemTime::now() < first.not_after);
}

#[tokio::test]
async fn a_ca_that_is_away_is_asked_again() {
    let mut authority = Authority::new();
    authority.failing = 2;
    let store = KeyStore::new(Arc::new(authority));
    next(&mut store.want(&identity("front"))).await;
    let status = store.status();
    assert_eq!((status[0].issued, status[0].failed), (1, 2));
    assert_eq!(status[0].error, None);
}

#[tokio::test]
async fn the_last_good_one_stays_when_the_next_is_for_somebody_else() {
    let authority = Authority::new();
    let store = KeyStore::new(Arc::new(authority));
    let mut watch = store.want(&identity("front"));
    let good = next(&mut watch).await;
    store
        .0
        .failed(&identity("front"), "the certificate names another".into());
    assert!(Arc::ptr_eq(&good, &store.certified(&identity("front")).unwrap()));
    assert_eq!(
        store.status()[0].error.as_deref(),
        Some("the certificate names another")
    );
}

#[test]
fn only_the_key_and_the_identity_asked_for_are_taken() {
    let mut authority = Authority::new();
    let front = identity("front");
    let answer =
        |authority: &Authority, request: &Request| authority.issue(&front.spiffe(), &request.csr_pem);
    let now = SystemTime::now();

    let request = Request::new(&front).unwrap();
    let good = answer(&authority, &request);
    assert!(request.certified(&good, now).is_ok());

    let request = Request::new(&front).unwrap();
    assert_eq!(
        request.certified(&good, now).unwrap_err(),
        CheckError::OtherKey,
        "an answer to an earlier request"
    );

    let request = Request::new(&front).unwrap();
    let only_leaf = vec![answer(&authority, &request).remove(0)];
    assert_eq!(
        request.certified(&only_leaf, now).unwrap_err(),
        CheckError::Count(1)
    );

    let request = Request::new(&front).unwrap();
    let mut other_root = answer(&authority, &request);
    other_root[1] = Authority::new().root_pem;
    assert!(matches!(
        request.certified(&other_root, now),
        Err(CheckError::Chain(_))
    ));

    let request = Request::new(&front).unwrap();
    let late = answer(&authority, &request);
    let later = now + Duration::from_secs(7200);
    assert!(matches!(
        request.certified(&late, later),
        Err(CheckError::Chain(_))
    ));

    authority.instead = Some(identity("reviews").spiffe());
    let request = Request::new(&front).unwrap();
    let somebody_else = answer(&authority, &request);
    assert_eq!(
        request.certified(&somebody_else, now).unwrap_err().to_string(),
        "the certificate names [\"spiffe://cluster.local/ns/shop/sa/reviews\"] instead of \
         spiffe://cluster.local/ns/shop/sa/front"
    );
}

#[test]
fn every_truncation_of_an_answer_is_an_error() {
    let authority = Authority::new();
    let front = identity("front");
    let whole = {
        let request = Request::new(&front).unwrap();
        authority.issue(&front.spiffe(), &request.csr_pem)[0].clone()
    };
    for end in 0..whole.len() {
        let request = Request::new(&front).unwrap();
        let cut = [whole[..end].to_owned(), authority.root_pem.clone()];
        assert!(request.certified(&cut, SystemTime::now()).is_err(), "{end}");
    }
}

#[test]
fn a_renewal_is_due_at_half_of_the_lifetime() {
    let start = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
    let end = start + Duration::from_secs(1000);
    let seconds = |now, random| renew_in(start, end, now, random).as_secs();
    assert_eq!((seconds(start, 0.0), seconds(start, 1.0)), (450, 550));
    assert_eq!(seconds(start + Duration::from_secs(400), 0.5), 100);
    assert_eq!(renew_in(start, end, end, 0.5), SHORTEST);
    assert_eq!(renew_in(end, start, start, 0.5).as_secs(), 1000);
}

/// An SDS server on a Unix socket and a channel to it.
async fn sds(service: sds::SdsService, folder: &std::path::Path) -> tonic::transport::Channel {
    let path = folder.join("sds");
    let incoming = crate::socket::bind(&path).unwrap();
    tokio::spawn(
        tonic::transport::Server::builder()
            .add_service(service)
            .serve_with_incoming(incoming),
    );
    tonic::transport::Endpoint::from_shared(format!("unix:{}", path.display()))
        .unwrap()
        .connect()
        .await
        .unwrap()
}

const NAMES: [&str; 2] = ["spiffe://cluster.local/ns/shop/sa/front", "ROOTCA@cluster.local"];

#[tokio::test]
async fn envoy_gets_keys_and_roots_state_of_the_world() {
    let store = KeyStore::new(Arc::new(Authority::new()));
    gets_keys_and_roots(sds::SdsService::new(store), NAMES).await;
}

#[tokio::test]
async fn an_ordinary_sidecar_gets_them_by_the_names_istiod_gives_it() {
    let store = KeyStore::new(Arc::new(Authority::new()));
    let service = sds::SdsService::of_workload(store.clone(), identity("front"));
    gets_keys_and_roots(service, ["default", "ROOTCA"]).await;
    assert_eq!(store.status()[0].identity, NAMES[0]);
}

async fn gets_keys_and_roots(service: sds::SdsService, names: [&str; 2]) {
    let folder = tempfile::tempdir().unwrap();
    let channel = sds(service, folder.path()).await;
    let (requests, receiver) = mpsc::channel(4);
    let ask = DiscoveryRequest {
        resource_names: names.map(String::from).to_vec(),
        type_url: ResourceType::Secret.url().into(),
        ..DiscoveryRequest::default()
    };
    requests.send(ask.clone()).await.unwrap();
    let mut grpc = Grpc::new(channel);
    grpc.ready().await.unwrap();
    let codec = tonic_prost::ProstCodec::<DiscoveryRequest, DiscoveryResponse>::default();
    let path =
        http::uri::PathAndQuery::from_static("/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets");
    let mut responses = grpc
        .streaming(tonic::Request::new(ReceiverStream::new(receiver)), path, codec)
        .await
        .unwrap()
        .into_inner();
    let mut seen = Vec::new();
    while seen.len() < 2 {
        let response = responses.message().await.unwrap().unwrap();
        for resource in &response.resources {
            seen.push(sds::Secret::decode(&*resource.value).unwrap());
        }
        let ack = DiscoveryRequest {
            response_nonce: response.nonce,
            version_info: response.version_info,
            ..ask.clone()
        };
        requests.send(ack).await.unwrap();
    }
    seen.sort_by(|a, b| b.name.cmp(&a.name));
    assert_eq!(seen.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(), names);
    let certificate = seen[0].tls_certificate.clone().unwrap();
    let text = |source: Option<sds::DataSource>| String::from_utf8(source.unwrap().inline_bytes).unwrap();
    assert!(text(certificate.private_key).starts_with("-----BEGIN PRIVATE KEY-----"));
    assert!(text(certificate.certificate_chain).starts_with("-----BEGIN CERTIFICATE-----"));
    let roots = seen[1].validation_context.clone().unwrap();
    assert!(text(roots.trusted_ca).starts_with("-----BEGIN CERTIFICATE-----"));
}

#[tokio::test]
async fn a_delta_client_is_told_what_is_not_there() {
    let folder = tempfile::tempdir().unwrap();
    let store = KeyStore::new(Arc::new(Authority::new()));
    let channel = sds(sds::SdsService::new(store), folder.path()).await;
    let (requests, receiver) = mpsc::channel(4);
    let ask = |names: &[&str]| DeltaDiscoveryRequest {
        resource_names_subscribe: names.iter().map(|n| (*n).to_owned()).collect(),
        type_url: ResourceType::Secret.url().into(),
        ..DeltaDiscoveryRequest::default()
    };
    requests
        .send(ask(&["dpumesh-no-identity", "ROOTCA@", "default", "ROOTCA"]))
        .await
        .unwrap();
    let mut grpc = Grpc::new(channel);
    grpc.ready().await.unwrap();
    let codec = tonic_prost::ProstCodec::<DeltaDiscoveryRequest, DeltaDiscoveryResponse>::default();
    let path =
        http::uri::PathAndQuery::from_static("/envoy.service.secret.v3.SecretDiscoveryService/DeltaSecrets");
    let mut responses = grpc
        .streaming(tonic::Request::new(ReceiverStream::new(receiver)), path, codec)
        .await
        .unwrap()
        .into_inner();
    let absent = responses.message().await.unwrap().unwrap();
    assert_eq!(
        absent.removed_resources,
        ["dpumesh-no-identity", "ROOTCA@", "default", "ROOTCA"]
    );
    requests.send(ask(&NAMES[..1])).await.unwrap();
    let there = responses.message().await.unwrap().unwrap();
    assert_eq!(there.resources[0].name, NAMES[0]);
}

#[test]
fn field_numbers_of_secrets_are_those_of_the_published_files() {
    let cases: &[(&str, &[(&str, u32)])] = &[
        (
            "Secret",
            &[("name", 1), ("tls_certificate", 2), ("validation_context", 4)],
        ),
        ("TlsCertificate", &[("certificate_chain", 1), ("private_key", 2)]),
        ("CertificateValidationContext", &[("trusted_ca", 1)]),
    ];
    for (message, fields) in cases {
        let name = format!("envoy.extensions.transport_sockets.tls.v3.{message}");
        let message = crate::schema::message(&name).unwrap();
        for (field, number) in *fields {
            assert_eq!(
                message.get_field_by_name(field).unwrap().number(),
                *number,
                "{name}.{field}"
            );
        }
    }
    let source = crate::schema::message("envoy.config.core.v3.DataSource").unwrap();
    assert_eq!(source.get_field_by_name("inline_bytes").unwrap().number(), 2);
}
