//! The way to the CA: Istio's own certificate service, with the identity named in the request's metadata.
//!
//! Towards the adapter the connection is that of the proxy (mutual TLS), which is no workload's: so the identity is said, as Istio's node
//! proxy says it, and the adapter vouches for it with the token of a local pod.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use prost_types::{Struct, Value, value};
use tonic::client::Grpc;
use tonic::transport::Channel;

use crate::client::bearer;
use crate::ir::Identity;

/// Name of the gRPC service.
pub(crate) const SERVICE: &str = "istio.v1.auth.IstioCertificateService";

/// Path of its call.
pub(crate) const CREATE_CERTIFICATE: &str = "/istio.v1.auth.IstioCertificateService/CreateCertificate";

/// The key of the metadata that names whose certificate is wanted.
pub(crate) const IMPERSONATED: &str = "ImpersonatedIdentity";

/// What stands before a trust domain in the name of its roots. As the name whose certificate is wanted it is our own addition, answered
/// by the adapter: the roots alone, for no CSR.
pub(crate) const ROOTS: &str = "ROOTCA@";

/// How long one request may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// `istio.v1.auth.IstioCertificateRequest`.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct CertificateRequest {
    /// PEM.
    #[prost(string, tag = "1")]
    pub(crate) csr: String,
    /// Seconds; 0 leaves it to the CA.
    #[prost(int64, tag = "3")]
    pub(crate) validity_duration: i64,
    /// Names the identity for whom the caller asks.
    #[prost(message, optional, tag = "4")]
    pub(crate) metadata: Option<Struct>,
}

impl CertificateRequest {
    /// A request on behalf of `whom`: a workload's name, or [`ROOTS`] and a trust domain.
    pub(crate) fn naming(whom: &str, csr: &str) -> Self {
        let name = Value {
            kind: Some(value::Kind::StringValue(whom.to_owned())),
        };
        Self {
            csr: csr.to_owned(),
            validity_duration: 0,
            metadata: Some(Struct {
                fields: BTreeMap::from([(IMPERSONATED.to_owned(), name)]),
            }),
        }
    }
}

/// `istio.v1.auth.IstioCertificateResponse`.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct CertificateResponse {
    /// PEM, leaf first, root last.
    #[prost(string, repeated, tag = "1")]
    pub(crate) cert_chain: Vec<String>,
}

/// A CA did not sign.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct RelayError(pub String);

/// Who gets CSRs signed.
#[async_trait]
pub trait Relay: fmt::Debug + Send + Sync {
    /// Gets a certificate for `identity` and the key of the request: PEM, leaf first, root last. The caller checks what comes back.
    /// Cancelling leaves nothing behind here; the CA may have signed.
    ///
    /// # Errors
    /// The CA or the way to it refuses, or cannot be reached; all are worth another attempt later.
    async fn sign(&self, identity: &Identity, csr_pem: &str) -> Result<Vec<String>, RelayError>;

    /// The roots of a trust domain, PEM, before any of its identities has a certificate. A proxy may need them before it knows of any
    /// connection, and so of any identity. Cancelling leaves nothing behind.
    ///
    /// # Errors
    /// As [`Self::sign`]; also where this cannot be told: they come with the first certificate then.
    async fn roots(&self, trust_domain: &str) -> Result<Vec<String>, RelayError> {
        Err(RelayError(format!(
            "roots of {trust_domain} come with its first certificate"
        )))
    }
}

/// A [`Relay`] over the adapter's (or any) `IstioCertificateService`.
#[derive(Debug, Clone)]
pub struct IstioRelay {
    channel: Channel,
}

impl IstioRelay {
    /// Over this connection ([`crate::client::channel`]); it may be the one that xDS uses.
    pub fn new(channel: Channel) -> Self {
        Self { channel }
    }
}

#[async_trait]
impl Relay for IstioRelay {
    async fn sign(&self, identity: &Identity, csr_pem: &str) -> Result<Vec<String>, RelayError> {
        let request = tonic::Request::new(CertificateRequest::naming(&identity.spiffe(), csr_pem));
        create(self.channel.clone(), request)
            .await
            .map(|response| response.cert_chain)
            .map_err(|status| RelayError(format!("{:?}: {}", status.code(), status.message())))
    }

    async fn roots(&self, trust_domain: &str) -> Result<Vec<String>, RelayError> {
        let request = CertificateRequest::naming(&format!("{ROOTS}{trust_domain}"), "");
        create(self.channel.clone(), tonic::Request::new(request))
            .await
            .map(|response| response.cert_chain)
            .map_err(|status| RelayError(format!("{:?}: {}", status.code(), status.message())))
    }
}

/// A [`Relay`] to istiod's CA for one workload, which shows its own token: what the agent of an ordinary sidecar does.
#[derive(Debug, Clone)]
pub struct TokenRelay {
    channel: Channel,
    token: PathBuf,
}

impl TokenRelay {
    /// Over this connection to istiod. The file is read anew for each request: tokens rotate.
    pub fn new(channel: Channel, token: PathBuf) -> Self {
        Self { channel, token }
    }
}

#[async_trait]
impl Relay for TokenRelay {
    async fn sign(&self, _: &Identity, csr_pem: &str) -> Result<Vec<String>, RelayError> {
        let token = tokio::fs::read_to_string(&self.token).await;
        let token = token.map_err(|error| RelayError(format!("{}: {error}", self.token.display())))?;
        // Whose certificate it is follows from the token.
        let mut request = tonic::Request::new(CertificateRequest {
            csr: csr_pem.to_owned(),
            ..CertificateRequest::default()
        });
        let bearer = bearer(&token).map_err(|reason| RelayError(reason.to_owned()))?;
        request.metadata_mut().insert("authorization", bearer);
        create(self.channel.clone(), request)
            .await
            .map(|response| response.cert_chain)
            .map_err(|status| RelayError(format!("{:?}: {}", status.code(), status.message())))
    }
}

/// One call of the service.
pub(crate) async fn create(
    channel: Channel,
    mut request: tonic::Request<CertificateRequest>,
) -> Result<CertificateResponse, tonic::Status> {
    request.set_timeout(PATIENCE);
    let mut grpc = Grpc::new(channel);
    let call = async {
        grpc.ready()
            .await
            .map_err(|error| tonic::Status::unavailable(error.to_string()))?;
        let codec = tonic_prost::ProstCodec::<CertificateRequest, CertificateResponse>::default();
        let path = http::uri::PathAndQuery::from_static(CREATE_CERTIFICATE);
        grpc.unary(request, path, codec).await
    };
    let answered = tokio::time::timeout(PATIENCE, call).await;
    let response = answered.map_err(|_| tonic::Status::deadline_exceeded("no answer in time"))??;
    Ok(response.into_inner())
}
