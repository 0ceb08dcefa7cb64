//! The SoC's end: checks who calls and in which version, then hands the call to a [`Dataplane`].

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use dpumesh_core::Event;
use futures_core::Stream;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::body::Body;
use tonic::server::{Grpc, NamedService, ServerStreamingService, UnaryService};
use tonic::transport::server::{Server, TlsConnectInfo};
use tonic::transport::{Certificate, Identity, ServerTlsConfig};
use tonic::{Request, Response, Status};
use tower_service::Service;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::Dataplane;
use super::codec::{Json, to_status};
use super::door::{Caller, Door};
use super::message::*;
use super::trust::{Credentials, Party, TrustError};
use super::{MAX_MESSAGE, causes};

/// Events waiting for a slow agent.
const EVENT_QUEUE: usize = 64;

/// Longest TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// Calls under way on one connection; an agent has a handful.
const STREAMS: u32 = 256;
/// A peer that answers no ping is gone after twice this.
const PING: Duration = Duration::from_secs(10);

/// The channel could not be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The credentials are unusable.
    #[error("channel: {0}")]
    Credentials(#[from] TrustError),
    /// TLS or the listener failed.
    #[error("channel: {}", causes(.0))]
    Transport(#[from] tonic::transport::Error),
}

/// Serves a dataplane until `shutdown` is ready; calls under way are finished first, event streams end.
///
/// A TLS handshake may take five seconds. Of connections on which nobody has shown the agent's certificate and made a call,
/// 32 are kept; one more closes the oldest of them.
///
/// # Errors
/// The credentials are unusable, or the listener failed.
pub async fn serve(
    listener: TcpListener,
    credentials: &Credentials,
    dataplane: Arc<dyn Dataplane>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    credentials.check()?;
    let tls = ServerTlsConfig::new()
        .identity(Identity::from_pem(&credentials.certificate, &credentials.key))
        .client_ca_root(Certificate::from_pem(&credentials.authority))
        .timeout(HANDSHAKE);
    let (closing, closed) = watch::channel(());
    let service = DataplaneServer {
        agent: Party::Agent.name(&dataplane.info().dpu).into(),
        dataplane,
        closed,
    };
    // Calls under way end by themselves; event streams would not.
    let shutdown = async move {
        shutdown.await;
        drop(closing);
    };
    let mut door = Door::default();
    let incoming = TcpListenerStream::new(listener).map(move |tcp| tcp.map(|tcp| door.enter(tcp)));
    Server::builder()
        .tls_config(tls)?
        .max_concurrent_streams(STREAMS)
        .http2_keepalive_interval(Some(PING))
        .http2_keepalive_timeout(Some(PING))
        .add_service(service)
        .serve_with_incoming_shutdown(incoming, shutdown)
        .await?;
    Ok(())
}

/// The gRPC service.
#[derive(Clone, Debug)]
struct DataplaneServer {
    dataplane: Arc<dyn Dataplane>,
    /// The name that the caller's certificate must carry.
    agent: Arc<str>,
    /// Its sender goes when the server shuts down.
    closed: watch::Receiver<()>,
}

impl NamedService for DataplaneServer {
    const NAME: &'static str = SERVICE;
}

type Reply = Pin<Box<dyn Future<Output = Result<http::Response<Body>, Infallible>> + Send>>;

impl Service<http::Request<Body>> for DataplaneServer {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Reply;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Reply {
        if let Err(refusal) = check_peer(&request, &self.agent).and_then(|()| check_version(&request)) {
            tracing::warn!(
                call = request.uri().path(),
                reason = refusal.message(),
                "channel peer refused"
            );
            return Box::pin(async move { Ok(refusal.into_http()) });
        }
        let dataplane = Arc::clone(&self.dataplane);
        match request.uri().path() {
            call::HELLO => unary(request, dataplane, |dataplane, Empty {}| async move {
                Ok(Hello::new(
                    dataplane.info(),
                    dataplane.capabilities(),
                    dataplane.epoch(),
                ))
            }),
            call::ATTACH => unary(request, dataplane, |dataplane, message: Attach| async move {
                dataplane
                    .attach(message.fence, &message.attachment)
                    .await
                    .map(|()| Empty {})
            }),
            call::DETACH => unary(request, dataplane, |dataplane, message: Detach| async move {
                dataplane
                    .detach(message.fence, &message.lease)
                    .await
                    .map(|()| Empty {})
            }),
            call::VALIDATE => unary(request, dataplane, |dataplane, message: Validate| async move {
                dataplane.steering().validate(&message.rules).await
            }),
            call::APPLY => unary(request, dataplane, |dataplane, message: Apply| async move {
                dataplane.steering().apply(message.fence, &message.batch).await
            }),
            call::LIST => unary(request, dataplane, |dataplane, message: List| async move {
                dataplane.steering().list(message.owner).await
            }),
            call::COUNTERS => unary(
                request,
                dataplane,
                |dataplane, message: ReadCounters| async move {
                    dataplane
                        .steering()
                        .counters(message.owner, &message.cookies)
                        .await
                },
            ),
            call::FLUSH => unary(request, dataplane, |dataplane, message: Flush| async move {
                dataplane.steering().flush(message.fence, message.owner).await
            }),
            call::SET_MISS_POLICY => unary(
                request,
                dataplane,
                |dataplane, message: SetMissPolicy| async move {
                    let SetMissPolicy { fence, port, policy } = message;
                    dataplane
                        .steering()
                        .set_miss_policy(fence, port, policy)
                        .await
                        .map(|()| Empty {})
                },
            ),
            call::OCCUPANCY => unary(request, dataplane, |dataplane, Empty {}| async move {
                dataplane.steering().occupancy().await
            }),
            call::STATS => unary(request, dataplane, |dataplane, Empty {}| async move {
                dataplane.stats().await
            }),
            call::EVENTS => events(
                request,
                Subscribe {
                    dataplane,
                    closed: self.closed.clone(),
                },
            ),
            path => {
                let refusal = Status::unimplemented(format!("there is no call {path} in version {VERSION}"));
                Box::pin(async move { Ok(refusal.into_http()) })
            }
        }
    }
}

/// The caller's certificate must carry the agent's name for this card.
fn check_peer(request: &http::Request<Body>, agent: &str) -> Result<(), Status> {
    let info = request.extensions().get::<TlsConnectInfo<Caller>>();
    let certificates = info.and_then(TlsConnectInfo::peer_certs);
    let Some(certificate) = certificates.as_ref().and_then(|chain| chain.first()) else {
        return Err(Status::unauthenticated("the channel needs a client certificate"));
    };
    let names = names(certificate.as_ref());
    if names.iter().any(|name| name == agent) {
        if let Some(info) = info {
            info.get_ref().make_known();
        }
        return Ok(());
    }
    Err(Status::permission_denied(format!(
        "the certificate is for {}, not for {agent}",
        names.join(", ")
    )))
}

fn names(certificate: &[u8]) -> Vec<String> {
    let Ok((_, certificate)) = X509Certificate::from_der(certificate) else {
        return Vec::new();
    };
    let Ok(Some(alternative)) = certificate.subject_alternative_name() else {
        return Vec::new();
    };
    let names = alternative.value.general_names.iter();
    names
        .filter_map(|name| {
            if let GeneralName::DNSName(dns) = name {
                Some((*dns).to_owned())
            } else {
                None
            }
        })
        .collect()
}

fn check_version(request: &http::Request<Body>) -> Result<(), Status> {
    let spoken = request
        .headers()
        .get(VERSION_HEADER)
        .and_then(|value| value.to_str().ok());
    let supported = format!("versions {VERSION_MIN} to {VERSION} are spoken here");
    match spoken.map(str::parse::<u32>) {
        Some(Ok(version)) if (VERSION_MIN..=VERSION).contains(&version) => Ok(()),
        Some(Ok(version)) => Err(Status::failed_precondition(format!(
            "the peer speaks channel version {version}; {supported}"
        ))),
        _ => Err(Status::failed_precondition(format!(
            "the peer names no channel version; {supported}"
        ))),
    }
}

/// One request, one answer.
struct Unary<F> {
    dataplane: Arc<dyn Dataplane>,
    answer: F,
}

impl<F, Fut, Q, A> UnaryService<Q> for Unary<F>
where
    F: Fn(Arc<dyn Dataplane>, Q) -> Fut,
    Fut: Future<Output = dpumesh_core::Result<A>> + Send + 'static,
    A: Serialize + Send + 'static,
{
    type Response = A;
    type Future = Pin<Box<dyn Future<Output = Result<Response<A>, Status>> + Send>>;

    fn call(&mut self, request: Request<Q>) -> Self::Future {
        let answer = (self.answer)(Arc::clone(&self.dataplane), request.into_inner());
        Box::pin(async move { answer.await.map(Response::new).map_err(to_status) })
    }
}

fn unary<Q, A, F, Fut>(request: http::Request<Body>, dataplane: Arc<dyn Dataplane>, answer: F) -> Reply
where
    Q: DeserializeOwned + Send + Sync + 'static,
    A: Serialize + Send + Sync + 'static,
    F: Fn(Arc<dyn Dataplane>, Q) -> Fut + Send + 'static,
    Fut: Future<Output = dpumesh_core::Result<A>> + Send + 'static,
{
    Box::pin(async move {
        let mut grpc = Grpc::new(Json::<A, Q>::default()).max_decoding_message_size(MAX_MESSAGE);
        Ok(grpc.unary(Unary { dataplane, answer }, request).await)
    })
}

/// One request, a stream of events.
struct Subscribe {
    dataplane: Arc<dyn Dataplane>,
    closed: watch::Receiver<()>,
}

impl ServerStreamingService<Empty> for Subscribe {
    type Response = Event;
    type ResponseStream = Pin<Box<dyn Stream<Item = Result<Event, Status>> + Send>>;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Self::ResponseStream>, Status>> + Send>>;

    fn call(&mut self, _: Request<Empty>) -> Self::Future {
        let (mut events, mut closed) = (self.dataplane.events(), self.closed.clone());
        let (sender, receiver) = tokio::sync::mpsc::channel(EVENT_QUEUE);
        tokio::spawn(async move {
            loop {
                let event = tokio::select! {
                    event = events.next() => event,
                    () = sender.closed() => return, // the agent has gone
                    _ = closed.changed() => return, // we are going
                };
                let Some(event) = event else { return };
                if sender.send(Ok(event)).await.is_err() {
                    return;
                }
            }
        });
        let stream: Self::ResponseStream = Box::pin(ReceiverStream::new(receiver));
        Box::pin(async move { Ok(Response::new(stream)) })
    }
}

fn events(request: http::Request<Body>, subscribe: Subscribe) -> Reply {
    Box::pin(async move {
        let mut grpc = Grpc::new(Json::<Event, Empty>::default());
        Ok(grpc.server_streaming(subscribe, request).await)
    })
}
