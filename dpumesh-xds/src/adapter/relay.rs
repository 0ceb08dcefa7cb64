//! The proxy's CSRs on their way to istiod's CA.
//!
//! Istio's own `IstioCertificateService`, on the listener that the proxy's connection comes to. Which identity is wanted stands in the
//! request's metadata (`ImpersonatedIdentity`). It must be that of a pod which has a stream here; with that pod's token the CSR goes on, so
//! that istiod sees what it would see from a sidecar. What comes back is passed on as it is. The pods' private keys are never here.
//!
//! One addition of our own: `ROOTCA@TRUST-DOMAIN` in the place of an identity is answered with the roots alone. A proxy needs them to take its
//! first configuration, before any connection tells it of an identity.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::SystemTime;

use prost_types::value::Kind;
use tonic::body::Body;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::server::{Grpc, NamedService, UnaryService};
use tonic::transport::Channel;
use tonic::{Request, Response, Status};
use tower_service::Service;

use super::pods::{LocalPod, Pods};
use super::token::Tokens;
use crate::client::bearer;
use crate::ir::Identity;
use crate::keys::check::{self, CheckError};
use crate::keys::{
    CREATE_CERTIFICATE, CertificateRequest, CertificateResponse, IMPERSONATED, ROOTS, SERVICE, create,
};

/// The largest request, in octets: a CSR has less than one kilobyte.
const MAX_REQUEST: usize = 64 << 10;

/// The longest life asked for, in seconds; the CA decides.
const LONGEST: i64 = 24 * 3600;

/// Counts since the start.
#[derive(Debug, Default)]
pub struct Counters {
    /// Requests that the CA signed.
    pub signed: AtomicU64,
    /// Requests for identities that no local pod has, or that are no requests.
    pub refused: AtomicU64,
    /// Requests that the CA did not sign, or that did not reach it.
    pub failed: AtomicU64,
}

/// The gRPC service.
#[derive(Debug, Clone)]
pub struct RelayService {
    pods: Arc<Pods>,
    tokens: Arc<dyn Tokens>,
    istiod: Channel,
    cluster: MetadataValue<Ascii>,
    counters: Arc<Counters>,
}

impl RelayService {
    /// Passes requests for identities of `pods` on over `istiod`. `cluster`: this cluster's name in istiod.
    ///
    /// # Errors
    /// `cluster` has characters that no header may have.
    pub fn new(
        pods: Arc<Pods>,
        tokens: Arc<dyn Tokens>,
        istiod: Channel,
        cluster: &str,
        counters: Arc<Counters>,
    ) -> Result<Self, String> {
        Ok(Self {
            pods,
            tokens,
            istiod,
            cluster: cluster
                .parse()
                .map_err(|_| format!("cluster {cluster:?} has characters that no header may have"))?,
            counters,
        })
    }

    async fn relay(&self, request: CertificateRequest) -> Result<CertificateResponse, Status> {
        let counters = &self.counters;
        let refused = |status: Status| {
            counters.refused.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(%status, "certificate request refused");
            status
        };
        let name = named(&request).map_err(refused)?;
        let (whose, answer) = if let Some(trust_domain) = name.strip_prefix(ROOTS) {
            let local = self.pods.local();
            let Some(pod) = local.values().find(|pod| pod.trust_domain == trust_domain) else {
                let text = format!("no pod of this node is of {trust_domain:?}");
                return Err(refused(Status::permission_denied(text)));
            };
            (name.to_owned(), self.roots(pod).await)
        } else {
            let identity = Identity::parse(name).ok_or_else(|| {
                refused(Status::invalid_argument(format!(
                    "metadata.{IMPERSONATED}: {name:?} is no workload's name"
                )))
            })?;
            let Some(pod) = self.pods.of_identity(&identity) else {
                let text = format!("no pod of this node is {}", identity.spiffe());
                return Err(refused(Status::permission_denied(text)));
            };
            (identity.spiffe(), self.pass_on(request, &pod).await)
        };
        match &answer {
            Ok(_) => counters.signed.fetch_add(1, Ordering::Relaxed),
            Err(status) => {
                tracing::warn!(whose, %status, "istiod's CA did not sign");
                counters.failed.fetch_add(1, Ordering::Relaxed)
            }
        };
        answer
    }

    /// The roots of a pod's trust domain: those of a certificate for that pod, made for the purpose and dropped with its key.
    async fn roots(&self, pod: &LocalPod) -> Result<CertificateResponse, Status> {
        let invalid = |error: CheckError| Status::unavailable(error.to_string());
        let own = check::Request::new(&pod.identity()).map_err(invalid)?;
        let request = CertificateRequest::naming("", &own.csr_pem);
        let response = self.pass_on(request, pod).await?;
        let certified = own
            .certified(&response.cert_chain, SystemTime::now())
            .map_err(invalid)?;
        let pem = |der: &Vec<u8>| pem::encode(&pem::Pem::new("CERTIFICATE", der.clone()));
        Ok(CertificateResponse {
            cert_chain: certified.roots_der.iter().map(pem).collect(),
        })
    }

    async fn pass_on(
        &self,
        request: CertificateRequest,
        pod: &LocalPod,
    ) -> Result<CertificateResponse, Status> {
        // The token says who asks: the metadata stays here.
        let mut request = Request::new(CertificateRequest {
            csr: request.csr,
            validity_duration: request.validity_duration.clamp(0, LONGEST),
            metadata: None,
        });
        if let Some(token) = self.tokens.token(pod).await.map_err(Status::unavailable)? {
            let token = bearer(&token).map_err(Status::internal)?;
            request.metadata_mut().insert("authorization", token);
        }
        request.metadata_mut().insert("clusterid", self.cluster.clone());
        create(self.istiod.clone(), request).await
    }
}

/// Whose certificate a request wants.
fn named(request: &CertificateRequest) -> Result<&str, Status> {
    let metadata = request.metadata.as_ref();
    let named = metadata.and_then(|metadata| metadata.fields.get(IMPERSONATED));
    match named.and_then(|value| value.kind.as_ref()) {
        Some(Kind::StringValue(name)) => Ok(name),
        _ => Err(Status::invalid_argument(format!(
            "metadata.{IMPERSONATED} must name whose certificate is wanted"
        ))),
    }
}

impl NamedService for RelayService {
    const NAME: &'static str = SERVICE;
}

type Answer<T> = Pin<Box<dyn Future<Output = T> + Send>>;

impl Service<http::Request<Body>> for RelayService {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Answer<Result<http::Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let service = self.clone();
        Box::pin(async move {
            if request.uri().path() != CREATE_CERTIFICATE {
                return Ok(Status::unimplemented("only CreateCertificate is served here").into_http());
            }
            let codec = tonic_prost::ProstCodec::<CertificateResponse, CertificateRequest>::default();
            let mut grpc = Grpc::new(codec).max_decoding_message_size(MAX_REQUEST);
            Ok(grpc.unary(Create(service), request).await)
        })
    }
}

/// The one method.
struct Create(RelayService);

impl UnaryService<CertificateRequest> for Create {
    type Response = CertificateResponse;
    type Future = Answer<Result<Response<CertificateResponse>, Status>>;

    fn call(&mut self, request: Request<CertificateRequest>) -> Self::Future {
        let service = self.0.clone();
        Box::pin(async move { service.relay(request.into_inner()).await.map(Response::new) })
    }
}
