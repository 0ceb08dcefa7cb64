//! SDS for an Envoy beside the key store: state of the world and delta.
//!
//! `spiffe://TD/ns/NS/sa/SA` is that identity's chain and key (wanted of the store from then on); `ROOTCA@TD` the roots of that trust
//! domain. A name is answered once there is something to answer with: until then Envoy holds the connections that need it. Of any other
//! name a delta client is told that it is not there; the other protocol has no words for that.
//!
//! A service that is [of one workload](SdsService::of_workload) knows also the names that istiod gives an ordinary sidecar: `default` and
//! `ROOTCA`.
//!
//! Whoever reaches this service gets private keys. [`crate::socket::bind`] makes a Unix socket that only its own user can open.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use prost::Message as _;
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, WatchStream};
use tokio_stream::{Stream, StreamExt as _, StreamMap};
use tonic::body::Body;
use tonic::server::{Grpc, NamedService, StreamingService};
use tonic::{Request, Response, Status, Streaming};
use tower_service::Service;

use super::{Certified, KeyStore, Roots};
use crate::discovery::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse, Resource,
    ResourceType,
};
use crate::ir::{Hash, Identity};

/// Path of the state-of-the-world call.
const STREAM: &str = "/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets";

/// Path of the delta call.
const DELTA: &str = "/envoy.service.secret.v3.SecretDiscoveryService/DeltaSecrets";

/// Names one stream may ask for.
const MAX_NAMES: usize = 16_384;

/// Responses on their way to one client.
const RESPONSES: usize = 8;

/// The gRPC service, for `tonic::transport::Server::add_service`.
#[derive(Debug, Clone)]
pub struct SdsService {
    source: Source,
}

/// Where secrets come from.
#[derive(Debug, Clone)]
struct Source {
    store: KeyStore,
    /// Whose `default` and `ROOTCA` are.
    own: Option<Identity>,
}

impl SdsService {
    /// Serves what `store` has and makes it have what is asked for.
    pub fn new(store: KeyStore) -> Self {
        Self {
            source: Source { store, own: None },
        }
    }

    /// As [`Self::new`], for the sidecar of one workload: its chain and key are `default` as well, its trust domain's roots `ROOTCA`.
    pub fn of_workload(store: KeyStore, own: Identity) -> Self {
        Self {
            source: Source {
                store,
                own: Some(own),
            },
        }
    }
}

impl NamedService for SdsService {
    const NAME: &'static str = "envoy.service.secret.v3.SecretDiscoveryService";
}

type Answer<T> = Pin<Box<dyn Future<Output = T> + Send>>;

impl Service<http::Request<Body>> for SdsService {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Answer<Result<http::Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let source = self.source.clone();
        Box::pin(async move {
            Ok(match request.uri().path() {
                STREAM => {
                    let codec = tonic_prost::ProstCodec::<DiscoveryResponse, DiscoveryRequest>::default();
                    Grpc::new(codec).streaming(World(source), request).await
                }
                DELTA => {
                    let codec =
                        tonic_prost::ProstCodec::<DeltaDiscoveryResponse, DeltaDiscoveryRequest>::default();
                    Grpc::new(codec).streaming(Delta(source), request).await
                }
                _ => Status::unimplemented("only streams are served here").into_http(),
            })
        })
    }
}

/// What a request of either protocol means.
#[derive(Debug, Default)]
struct Asked {
    nonce: String,
    refused: Option<String>,
    come: Vec<String>,
    gone: Vec<String>,
}

/// One of the two protocols.
trait Protocol: Send + 'static {
    type Request: Send + 'static;
    type Response: Send + 'static;

    /// What `request` changes in what is subscribed to.
    fn asked(request: Self::Request, subscribed: &BTreeSet<String>) -> Asked;

    /// A response with these secrets, and with names that are not there; `None` if the protocol has no words for it.
    fn response(nonce: String, secrets: &[(String, Vec<u8>)], absent: Vec<String>) -> Option<Self::Response>;
}

/// State of the world: each request has all names.
#[derive(Debug)]
struct World(Source);

impl Protocol for World {
    type Request = DiscoveryRequest;
    type Response = DiscoveryResponse;

    fn asked(request: DiscoveryRequest, subscribed: &BTreeSet<String>) -> Asked {
        let names: BTreeSet<String> = request.resource_names.into_iter().collect();
        Asked {
            nonce: request.response_nonce,
            refused: request.error_detail.map(|e| e.message),
            come: names.difference(subscribed).cloned().collect(),
            gone: subscribed.difference(&names).cloned().collect(),
        }
    }

    fn response(nonce: String, secrets: &[(String, Vec<u8>)], _: Vec<String>) -> Option<DiscoveryResponse> {
        (!secrets.is_empty()).then(|| DiscoveryResponse {
            version_info: nonce.clone(),
            resources: secrets.iter().map(|(_, bytes)| any(bytes.clone())).collect(),
            type_url: ResourceType::Secret.url().to_owned(),
            nonce,
        })
    }
}

/// Delta: each request has what changes.
#[derive(Debug)]
struct Delta(Source);

impl Protocol for Delta {
    type Request = DeltaDiscoveryRequest;
    type Response = DeltaDiscoveryResponse;

    fn asked(request: DeltaDiscoveryRequest, _: &BTreeSet<String>) -> Asked {
        Asked {
            nonce: request.response_nonce,
            refused: request.error_detail.map(|e| e.message),
            come: request.resource_names_subscribe,
            gone: request.resource_names_unsubscribe,
        }
    }

    fn response(
        nonce: String,
        secrets: &[(String, Vec<u8>)],
        absent: Vec<String>,
    ) -> Option<DeltaDiscoveryResponse> {
        let resource = |(name, bytes): &(String, Vec<u8>)| Resource {
            version: Hash::of(bytes).version(),
            resource: Some(any(bytes.clone())),
            name: name.clone(),
        };
        Some(DeltaDiscoveryResponse {
            system_version_info: nonce.clone(),
            resources: secrets.iter().map(resource).collect(),
            type_url: ResourceType::Secret.url().to_owned(),
            nonce,
            removed_resources: absent,
        })
    }
}

fn any(value: Vec<u8>) -> prost_types::Any {
    prost_types::Any {
        type_url: ResourceType::Secret.url().to_owned(),
        value,
    }
}

type Responses<P> = ReceiverStream<Result<<P as Protocol>::Response, Status>>;

fn start<P: Protocol>(source: &Source, requests: Streaming<P::Request>) -> Response<Responses<P>> {
    let (sender, receiver) = mpsc::channel(RESPONSES);
    tokio::spawn(run::<P>(source.clone(), requests, sender));
    Response::new(ReceiverStream::new(receiver))
}

impl StreamingService<DiscoveryRequest> for World {
    type Response = DiscoveryResponse;
    type ResponseStream = Responses<Self>;
    type Future = Answer<Result<Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: Request<Streaming<DiscoveryRequest>>) -> Self::Future {
        let response = start::<Self>(&self.0, request.into_inner());
        Box::pin(async move { Ok(response) })
    }
}

impl StreamingService<DeltaDiscoveryRequest> for Delta {
    type Response = DeltaDiscoveryResponse;
    type ResponseStream = Responses<Self>;
    type Future = Answer<Result<Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: Request<Streaming<DeltaDiscoveryRequest>>) -> Self::Future {
        let response = start::<Self>(&self.0, request.into_inner());
        Box::pin(async move { Ok(response) })
    }
}

/// Encoded secrets of one name, as they come.
type Secrets = Pin<Box<dyn Stream<Item = Vec<u8>> + Send>>;

async fn run<P: Protocol>(
    source: Source,
    mut requests: Streaming<P::Request>,
    responses: mpsc::Sender<Result<P::Response, Status>>,
) {
    let mut subscribed: BTreeSet<String> = BTreeSet::new();
    let mut secrets: StreamMap<String, Secrets> = StreamMap::new();
    let mut count = 0u64;
    loop {
        let (changed, absent) = tokio::select! {
            request = requests.message() => {
                let Ok(Some(request)) = request else { return };
                let asked = P::asked(request, &subscribed);
                if let Some(reason) = asked.refused {
                    tracing::warn!(nonce = asked.nonce, reason, "secret refused by the proxy");
                }
                for name in &asked.gone {
                    subscribed.remove(name);
                    secrets.remove(name);
                }
                let mut absent = Vec::new();
                for name in asked.come {
                    subscribed.insert(name.clone());
                    match of(&source, &name) {
                        Some(stream) => drop(secrets.insert(name, stream)),
                        None => absent.push(name),
                    }
                }
                if subscribed.len() > MAX_NAMES {
                    let status = Status::resource_exhausted(format!("more than {MAX_NAMES} secrets"));
                    let _ = responses.send(Err(status)).await;
                    return;
                }
                if absent.is_empty() {
                    continue;
                }
                tracing::warn!(names = absent.join(", "), "no such secrets");
                (Vec::new(), absent)
            }
            Some(changed) = secrets.next(), if !secrets.is_empty() => (vec![changed], Vec::new()),
        };
        count += 1;
        if let Some(response) = P::response(count.to_string(), &changed, absent)
            && responses.send(Ok(response)).await.is_err()
        {
            return;
        }
    }
}

/// The secrets of a name; `None` if it is no name of any.
fn of(source: &Source, name: &str) -> Option<Secrets> {
    let Source { store, own } = source;
    let own = own.as_ref();
    let identity = Identity::parse(name).or_else(|| own.filter(|_| name == "default").cloned());
    let shown = name.to_owned();
    if let Some(identity) = identity {
        let encode = move |certified: Arc<Certified>| Secret::certificate(&shown, &certified);
        let all = WatchStream::new(store.want(&identity));
        return Some(Box::pin(all.filter_map(move |one| one.map(&encode))));
    }
    let named = name.strip_prefix("ROOTCA@").filter(|rest| !rest.is_empty());
    let ours = own.filter(|_| name == "ROOTCA");
    let trust_domain = named.or_else(|| ours.map(|own| own.trust_domain.as_str()))?;
    let encode = move |roots: Arc<Roots>| Secret::roots(&shown, &roots);
    let all = WatchStream::new(store.roots(trust_domain));
    Some(Box::pin(all.filter_map(move |one| one.map(&encode))))
}

/// `envoy.extensions.transport_sockets.tls.v3.Secret`, with what is served of it.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Secret {
    #[prost(string, tag = "1")]
    pub(super) name: String,
    #[prost(message, optional, tag = "2")]
    pub(super) tls_certificate: Option<TlsCertificate>,
    #[prost(message, optional, tag = "4")]
    pub(super) validation_context: Option<ValidationContext>,
}

/// `TlsCertificate`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct TlsCertificate {
    #[prost(message, optional, tag = "1")]
    pub(super) certificate_chain: Option<DataSource>,
    #[prost(message, optional, tag = "2")]
    pub(super) private_key: Option<DataSource>,
}

/// `CertificateValidationContext`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct ValidationContext {
    #[prost(message, optional, tag = "1")]
    pub(super) trusted_ca: Option<DataSource>,
}

/// `envoy.config.core.v3.DataSource`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct DataSource {
    #[prost(bytes = "vec", tag = "2")]
    pub(super) inline_bytes: Vec<u8>,
}

impl Secret {
    fn certificate(name: &str, certified: &Certified) -> Vec<u8> {
        let key = DataSource {
            inline_bytes: pem::encode(&pem::Pem::new("PRIVATE KEY", certified.key_der.clone())).into_bytes(),
        };
        let secret = Self {
            name: name.to_owned(),
            tls_certificate: Some(TlsCertificate {
                certificate_chain: Some(certificates(&certified.chain_der)),
                private_key: Some(key),
            }),
            validation_context: None,
        };
        secret.encode_to_vec()
    }

    fn roots(name: &str, roots: &Roots) -> Vec<u8> {
        let secret = Self {
            name: name.to_owned(),
            tls_certificate: None,
            validation_context: Some(ValidationContext {
                trusted_ca: Some(certificates(&roots.der)),
            }),
        };
        secret.encode_to_vec()
    }
}

fn certificates(der: &[Vec<u8>]) -> DataSource {
    let blocks: Vec<pem::Pem> = der
        .iter()
        .map(|der| pem::Pem::new("CERTIFICATE", der.clone()))
        .collect();
    DataSource {
        inline_bytes: pem::encode_many(&blocks).into_bytes(),
    }
}
