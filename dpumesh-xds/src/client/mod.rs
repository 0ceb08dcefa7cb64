//! The xDS client: one ADS stream for one identity, delta or state-of-the-world ([`Protocol`]).
//!
//! ```text
//! connect ─► ask (with the versions still held) ─► response ─► check ─► apply ─► ACK | NACK by name ─► ask for what it refers to
//!    ▲                                                                                  │
//!    └────────── full jitter, at once and gently after an orderly end ◄─────────────────┘ stream ended
//! ```
//!
//! Streams that are given the same [`Channel`] share its connection; each carries its own bearer token in its call metadata (way B). A client
//! certificate belongs to the connection, so with certificates there is one channel for each account (way A), and never a
//! token beside it: a control plane reads the certificate first.
//!
//! A response is acknowledged when [`Apply::apply`] has said what it takes. What it rejects is named in the NACK with its field path, and the last
//! good version of that resource stays, over reconnects too. A response that is no protobuf message cannot be answered (its nonce is part of
//! it): the stream ends, nothing changes, and it is counted.

mod state;
mod whole;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::client::Grpc;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Request, Status};

use crate::discovery::{
    DELTA_CALL, DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse, Node,
    Resource, ResourceType, WHOLE_CALL,
};
use state::State;
use whole::Whole;

/// The largest response taken, in octets; a larger one is refused by its type, and nothing of it is used.
pub const MAX_RESPONSE: usize = 128 << 20;

/// The largest message read off the wire. Above [`MAX_RESPONSE`], so that what is too large can still be answered.
const MAX_MESSAGE: usize = 2 * MAX_RESPONSE;

/// Requests on their way to the transport.
const REQUESTS: usize = 32;

/// First bound of the random wait before a reconnect, and the last.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));

/// How a connection to a control plane is secured.
#[derive(Clone)]
pub enum Security {
    /// Not at all: for a laboratory.
    Plaintext,
    /// TLS.
    Tls {
        /// PEM of the roots that its certificate must come from.
        roots: String,
        /// The name its certificate must carry.
        name: String,
        /// PEM of a client certificate chain and its key: the identity of every stream on this connection.
        client: Option<(String, String)>,
    },
}

impl std::fmt::Debug for Security {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Plaintext => f.write_str("Plaintext"),
            Self::Tls { name, client, .. } => f
                .debug_struct("Tls")
                .field("name", name)
                .field("client", &client.is_some())
                .finish_non_exhaustive(),
        }
    }
}

/// A connection to `address` (`host:port`), made when it is first needed and again when it is lost. Clones share it.
///
/// # Errors
/// The address or the certificates are unusable.
pub fn channel(address: &str, security: &Security) -> Result<Channel, tonic::transport::Error> {
    let scheme = if matches!(security, Security::Plaintext) {
        "http"
    } else {
        "https"
    };
    let mut endpoint = Endpoint::from_shared(format!("{scheme}://{address}"))?
        .connect_timeout(Duration::from_secs(10))
        .tcp_nodelay(true)
        .http2_keep_alive_interval(Duration::from_secs(30))
        .keep_alive_timeout(Duration::from_secs(10))
        .keep_alive_while_idle(true)
        .http2_adaptive_window(true);
    if let Security::Tls { roots, name, client } = security {
        let mut tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(roots))
            .domain_name(name);
        if let Some((chain, key)) = client {
            tls = tls.identity(Identity::from_pem(chain, key));
        }
        endpoint = endpoint.tls_config(tls)?;
    }
    Ok(endpoint.connect_lazy())
}

/// What a stream shows for itself.
#[derive(Debug, Clone)]
pub enum Credential {
    /// Nothing, or the connection's certificate.
    Connection,
    /// The bearer token in this file, read anew for each stream: tokens rotate.
    TokenFile(PathBuf),
    /// The bearer token from here, asked for anew for each stream.
    Token(Arc<dyn TokenSource>),
}

/// Where a bearer token comes from.
#[async_trait]
pub trait TokenSource: std::fmt::Debug + Send + Sync {
    /// A token that is good now; `None`: none is needed.
    ///
    /// # Errors
    /// There is none; the text says why. Worth another attempt later.
    async fn token(&self) -> Result<Option<String>, String>;
}

/// A change of one type, as it came.
#[derive(Debug, Clone)]
pub struct Update {
    /// Of which type.
    pub kind: ResourceType,
    /// Added or changed.
    pub resources: Vec<Resource>,
    /// Gone.
    pub removed: Vec<String>,
}

/// A resource that was not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejection {
    /// Its name.
    pub name: String,
    /// Resource, field path and reason, for the NACK.
    pub reason: String,
}

/// What became of an update.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Applied {
    /// Not taken; everything else was.
    pub rejected: Vec<Rejection>,
    /// The names wanted of these types from now on.
    pub wanted: Vec<(ResourceType, BTreeSet<String>)>,
}

/// Who uses what a stream brings.
#[async_trait]
pub trait Apply: Send {
    /// Takes an update, or parts of it. The response is acknowledged after this returns, so it may wait until the update has had
    /// its effect; meanwhile the stream brings nothing else. Cancelled when the client is dropped.
    async fn apply(&mut self, update: Update) -> Applied;

    /// The stream was lost for this reason. What was applied stays.
    fn lost(&mut self, reason: &str);
}

/// Counts since the start, of one client or of many that share them.
#[derive(Debug, Default)]
pub struct Counters {
    /// Streams opened.
    pub streams: AtomicU64,
    /// Streams that ended otherwise than orderly.
    pub broken: AtomicU64,
    /// Responses.
    pub responses: AtomicU64,
    /// Resources in them.
    pub resources: AtomicU64,
    /// Responses acknowledged.
    pub acks: AtomicU64,
    /// Responses refused, as a whole or in part.
    pub nacks: AtomicU64,
}

/// How client and server speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Protocol {
    /// Changes (`DeltaAggregatedResources`).
    #[default]
    Delta,
    /// Everything of a type each time (`StreamAggregatedResources`).
    Whole,
}

/// A client, before it runs.
#[derive(Debug, Clone)]
pub struct Client {
    /// Shared by all that use its connection.
    pub channel: Channel,
    /// Who asks.
    pub node: Node,
    /// With what right.
    pub credential: Credential,
    /// In which words.
    pub protocol: Protocol,
    /// Types of which everything is wanted from the start, in the order in which they are asked for.
    pub wildcards: Vec<ResourceType>,
    /// Where to count.
    pub counters: Arc<Counters>,
}

impl Client {
    /// Keeps a stream open and hands `apply` what it brings, until the future is dropped.
    pub async fn run(self, apply: &mut dyn Apply) {
        let mut state = State::new(self.node.clone(), &self.wildcards);
        let (mut whole, mut failures) = (Whole::default(), 0);
        loop {
            whole.begin();
            let (end, progressed) = self.stream(&mut state, &mut whole, apply).await;
            if progressed {
                failures = 0;
            }
            apply.lost(&end.reason);
            if end.orderly {
                tracing::debug!(node = self.node.id, reason = end.reason, "xDS stream ended");
            } else {
                add(&self.counters.broken, 1);
                tracing::warn!(node = self.node.id, reason = end.reason, "xDS stream lost");
            }
            tokio::time::sleep(full_jitter(failures)).await;
            failures += 1;
        }
    }

    /// One stream from beginning to end; and whether it brought anything.
    async fn stream(&self, state: &mut State, whole: &mut Whole, apply: &mut dyn Apply) -> (End, bool) {
        let mut progressed = false;
        let end = match self.open(state, whole).await {
            Ok((mut responses, requests)) => loop {
                match responses.next(state, whole).await {
                    Ok(Some(response)) => {
                        progressed = true;
                        let answers = self.respond(state, apply, response).await;
                        if let Err(end) = requests.send(answers, whole).await {
                            break end;
                        }
                    }
                    Ok(None) => break End::orderly("closed by the server"),
                    Err(status) => break End::of(&status),
                }
            },
            Err(end) => end,
        };
        (end, progressed)
    }

    async fn open(&self, state: &mut State, whole: &mut Whole) -> Result<(Responses, Requests), End> {
        add(&self.counters.streams, 1);
        let hello = state.hello();
        match self.protocol {
            Protocol::Delta => {
                let (responses, requests) = self.call(hello, DELTA_CALL).await?;
                Ok((Responses::Delta(responses), Requests::Delta(requests)))
            }
            Protocol::Whole => {
                let hello = hello.into_iter().map(|request| whole.request(request)).collect();
                let (responses, requests) = self.call(hello, WHOLE_CALL).await?;
                Ok((Responses::Whole(responses), Requests::Whole(requests)))
            }
        }
    }

    /// Opens a stream that begins with these requests.
    async fn call<Q, A>(
        &self,
        hello: Vec<Q>,
        path: &'static str,
    ) -> Result<(tonic::Streaming<A>, mpsc::Sender<Q>), End>
    where
        Q: prost::Message + 'static,
        A: prost::Message + Default + 'static,
    {
        let (sender, receiver) = mpsc::channel(REQUESTS);
        // A server may answer the call only after it has read the first request: there is room for all of them.
        for request in hello {
            sender
                .try_send(request)
                .map_err(|_| End::broken("more first requests than room for them"))?;
        }
        let mut request = Request::new(ReceiverStream::new(receiver));
        if let Some(token) = self.token().await? {
            request.metadata_mut().insert("authorization", token);
        }
        let mut grpc = Grpc::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE);
        grpc.ready().await.map_err(|error| End::broken(causes(&error)))?;
        let codec = tonic_prost::ProstCodec::<Q, A>::default();
        let path = http::uri::PathAndQuery::from_static(path);
        let response = grpc
            .streaming(request, path, codec)
            .await
            .map_err(|status| End::of(&status))?;
        Ok((response.into_inner(), sender))
    }

    async fn token(&self) -> Result<Option<MetadataValue<Ascii>>, End> {
        let text = match &self.credential {
            Credential::Connection => return Ok(None),
            Credential::TokenFile(path) => tokio::fs::read_to_string(path)
                .await
                .map_err(|error| End::broken(format!("token {}: {error}", path.display())))?,
            Credential::Token(source) => {
                let token = source.token().await;
                match token.map_err(|error| End::broken(format!("token: {error}")))? {
                    Some(token) => token,
                    None => return Ok(None),
                }
            }
        };
        bearer(&text).map(Some).map_err(End::broken)
    }

    /// Applies a response; the requests that answer it.
    async fn respond(
        &self,
        state: &mut State,
        apply: &mut dyn Apply,
        response: DeltaDiscoveryResponse,
    ) -> Vec<DeltaDiscoveryRequest> {
        add(&self.counters.responses, 1);
        add(&self.counters.resources, response.resources.len());
        let (update, receipt) = match state.receive(response) {
            Ok(received) => received,
            Err(nack) => {
                add(&self.counters.nacks, 1);
                return vec![*nack];
            }
        };
        let applied = apply.apply(update).await;
        add(
            if applied.rejected.is_empty() {
                &self.counters.acks
            } else {
                &self.counters.nacks
            },
            1,
        );
        state.applied(receipt, applied)
    }
}

/// The value of an `authorization` header.
pub(crate) fn bearer(token: &str) -> Result<MetadataValue<Ascii>, &'static str> {
    let mut value: MetadataValue<Ascii> = format!("Bearer {}", token.trim())
        .parse()
        .map_err(|_| "the token has characters that no header may have")?;
    value.set_sensitive(true);
    Ok(value)
}

/// What a stream brings, in either protocol.
enum Responses {
    Delta(tonic::Streaming<DeltaDiscoveryResponse>),
    Whole(tonic::Streaming<DiscoveryResponse>),
}

impl Responses {
    /// The next response, as changes.
    async fn next(
        &mut self,
        state: &State,
        whole: &mut Whole,
    ) -> Result<Option<DeltaDiscoveryResponse>, Status> {
        match self {
            Self::Delta(responses) => responses.message().await,
            Self::Whole(responses) => {
                let response = responses.message().await?;
                Ok(response.map(|response| {
                    let kind = ResourceType::from_url(&response.type_url);
                    whole.response(response, state.versions(kind))
                }))
            }
        }
    }
}

/// Where requests go, in either protocol.
enum Requests {
    Delta(mpsc::Sender<DeltaDiscoveryRequest>),
    Whole(mpsc::Sender<DiscoveryRequest>),
}

impl Requests {
    async fn send(&self, answers: Vec<DeltaDiscoveryRequest>, whole: &mut Whole) -> Result<(), End> {
        for answer in answers {
            let sent = match self {
                Self::Delta(requests) => requests.send(answer).await.is_ok(),
                Self::Whole(requests) => requests.send(whole.request(answer)).await.is_ok(),
            };
            if !sent {
                return Err(End::broken("the transport takes no more requests"));
            }
        }
        Ok(())
    }
}

/// Why a stream ended.
#[derive(Debug)]
struct End {
    reason: String,
    orderly: bool,
}

impl End {
    fn orderly(reason: &str) -> Self {
        Self {
            reason: reason.to_owned(),
            orderly: true,
        }
    }

    fn broken(reason: impl Into<String>) -> Self {
        Self {
            reason: reason.into(),
            orderly: false,
        }
    }

    /// A server that closes its connections now and then (GOAWAY, then the end of the stream) does nothing wrong.
    fn of(status: &Status) -> Self {
        let text = causes(status);
        let leaving =
            status.code() == Code::Unavailable || text.contains("GOAWAY") || text.contains("NO_ERROR");
        Self {
            orderly: leaving && !text.contains("connect"),
            reason: format!("{:?}: {text}", status.code()),
        }
    }
}

fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let more = cause.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        source = cause.source();
    }
    text
}

/// A random wait of at most a bound that doubles with each failure: many clients that lost one server do not come back together.
pub(crate) fn full_jitter(failures: u32) -> Duration {
    let bound = BACKOFF.0.saturating_mul(1 << failures.min(16)).min(BACKOFF.1);
    bound.mul_f64(fastrand::f64())
}

fn add(counter: &AtomicU64, n: usize) {
    counter.fetch_add(n as u64, Ordering::Relaxed);
}

#[cfg(test)]
mod tests;
