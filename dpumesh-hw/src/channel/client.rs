//! The host's end: a dataplane behind the channel, usable as if it were here.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use async_trait::async_trait;
use dpumesh_core::steering::{
    Batch, BatchOutcome, Cookie, Counters, InstalledRule, MissPolicy, Occupancy, Owner, SteeringRule, Verdict,
};
use dpumesh_core::vf::VfLease;
use dpumesh_core::{
    BackendInfo, Capabilities, DpuId, Epoch, Error, ErrorKind, Event, EventStream, Fence, FlowSteering,
    PortRef, Result,
};
use http::uri::PathAndQuery;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tonic::client::Grpc;
use tonic::metadata::MetadataValue;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Request, Status, Streaming};

use super::codec::{Json, from_status};
use super::message::*;
use super::trust::{Credentials, Party, TrustError};
use super::{Dataplane, MAX_MESSAGE, causes};
use crate::dataplane::EngineStats;
use crate::events::{EventHub, HubStream};

/// Longest wait for one answer.
const DEADLINE: Duration = Duration::from_secs(10);
/// How often the other side is pinged, asked something or not, and how long its answer may take: a SoC that lost power says
/// no goodbye.
const PING: Duration = Duration::from_secs(5);

/// A dataplane at the other end of a channel; clones share what it said of itself last.
///
/// The connection comes back by itself. Whether the dataplane is still in the same life tells its epoch: after a call
/// that was `Stale`, [`Dataplane::epoch`] is the new one.
#[derive(Clone, Debug)]
pub struct DataplaneClient {
    channel: Channel,
    hello: Arc<RwLock<Hello>>,
    /// Where it was connected: subscriptions run there.
    runtime: Handle,
}

/// No channel to the dataplane.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The credentials are unusable.
    #[error("credentials for {dpu}: {error}")]
    Credentials {
        /// Which card.
        dpu: DpuId,
        /// What is wrong with them.
        error: TrustError,
    },
    /// The address is no address.
    #[error("dataplane address `{address}`: {error}")]
    Address {
        /// What was given.
        address: String,
        /// What is wrong with it.
        error: tonic::transport::Error,
    },
    /// Nobody answers, or the other side is not who it should be.
    #[error("dataplane of {dpu} at {address}: {}", causes(error))]
    Connect {
        /// Which card.
        dpu: DpuId,
        /// Where.
        address: String,
        /// Why not.
        error: tonic::transport::Error,
    },
    /// The other side refused.
    #[error("dataplane of {dpu} at {address} refused: {error}")]
    Refused {
        /// Which card.
        dpu: DpuId,
        /// Where.
        address: String,
        /// Its words.
        error: Error,
    },
}

impl DataplaneClient {
    /// Connects to the dataplane of a card at `address` (`host:port`) and introduces itself.
    ///
    /// # Errors
    /// Nobody listens there, the certificate is not that card's dataplane's, or it refuses this agent or its version.
    pub async fn connect(
        address: &str,
        dpu: &DpuId,
        credentials: &Credentials,
    ) -> std::result::Result<Self, ConnectError> {
        credentials.check().map_err(|error| ConnectError::Credentials {
            dpu: dpu.clone(),
            error,
        })?;
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(&credentials.authority))
            .identity(Identity::from_pem(&credentials.certificate, &credentials.key))
            .domain_name(Party::Dataplane.name(dpu));
        let endpoint = Endpoint::from_shared(format!("https://{address}"))
            .and_then(|endpoint| endpoint.tls_config(tls))
            .map_err(|error| ConnectError::Address {
                address: address.to_owned(),
                error,
            })?
            .connect_timeout(DEADLINE)
            .timeout(DEADLINE)
            .http2_keep_alive_interval(PING)
            .keep_alive_timeout(PING)
            .keep_alive_while_idle(true);
        let channel = endpoint.connect().await.map_err(|error| ConnectError::Connect {
            dpu: dpu.clone(),
            address: address.to_owned(),
            error,
        })?;
        let hello = call(&channel, "channel.hello", call::HELLO, Empty {})
            .await
            .map_err(|error| ConnectError::Refused {
                dpu: dpu.clone(),
                address: address.to_owned(),
                error,
            })?;
        Ok(Self {
            channel,
            hello: Arc::new(RwLock::new(hello)),
            runtime: Handle::current(),
        })
    }

    /// How the dataplane introduced itself last.
    pub fn hello(&self) -> Hello {
        self.hello.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Asks again who is there: after a restart of the dataplane its epoch has grown.
    ///
    /// # Errors
    /// `DeviceLost` while nobody is there; `Denied`, `Unsupported` when it refuses this agent or its version.
    pub async fn refresh(&self) -> Result<Epoch> {
        let hello: Hello = call(&self.channel, "channel.hello", call::HELLO, Empty {}).await?;
        let epoch = hello.epoch;
        *self.hello.write().unwrap_or_else(PoisonError::into_inner) = hello;
        Ok(epoch)
    }

    /// Subscribes to the card's events.
    ///
    /// # Errors
    /// As [`DataplaneClient::refresh`].
    pub async fn subscribe(&self) -> Result<RemoteEvents> {
        const OPERATION: &str = "channel.events";
        let mut grpc = ready(&self.channel, OPERATION).await?;
        let path = PathAndQuery::from_static(call::EVENTS);
        let stream = grpc
            .server_streaming(request(Empty {}), path, Json::<Empty, Event>::default())
            .await;
        let stream = stream
            .map_err(|status| from_status(OPERATION, &status))?
            .into_inner();
        Ok(RemoteEvents { stream: Some(stream) })
    }

    async fn ask<Q, A>(&self, operation: &'static str, path: &'static str, message: Q) -> Result<A>
    where
        Q: Serialize + Send + Sync + 'static,
        A: DeserializeOwned + Send + Sync + 'static,
    {
        let answer = call(&self.channel, operation, path, message).await;
        if let Err(error) = &answer
            && error.kind == ErrorKind::Stale
        {
            let _ = self.refresh().await; // the caller is told `Stale` either way
        }
        answer
    }
}

fn request<Q>(message: Q) -> Request<Q> {
    let mut request = Request::new(message);
    request
        .metadata_mut()
        .insert(VERSION_HEADER, MetadataValue::from(VERSION));
    request
}

async fn ready(channel: &Channel, operation: &'static str) -> Result<Grpc<Channel>> {
    let mut grpc = Grpc::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE);
    grpc.ready().await.map_err(|error| {
        Error::new(
            ErrorKind::DeviceLost,
            operation,
            format!("no channel to the dataplane: {}", causes(&error)),
        )
    })?;
    Ok(grpc)
}

async fn call<Q, A>(channel: &Channel, operation: &'static str, path: &'static str, message: Q) -> Result<A>
where
    Q: Serialize + Send + Sync + 'static,
    A: DeserializeOwned + Send + Sync + 'static,
{
    let mut grpc = ready(channel, operation).await?;
    let path = PathAndQuery::from_static(path);
    let answer: std::result::Result<_, Status> =
        grpc.unary(request(message), path, Json::<Q, A>::default()).await;
    answer
        .map(tonic::Response::into_inner)
        .map_err(|status| from_status(operation, &status))
}

#[async_trait]
impl Dataplane for DataplaneClient {
    fn info(&self) -> BackendInfo {
        self.hello().info
    }

    fn capabilities(&self) -> Capabilities {
        self.hello().capabilities
    }

    fn epoch(&self) -> Epoch {
        self.hello().epoch
    }

    fn steering(&self) -> &dyn FlowSteering {
        self
    }

    async fn attach(&self, fence: Fence, attachment: &Attachment) -> Result<()> {
        let message = Attach {
            fence,
            attachment: attachment.clone(),
        };
        self.ask("channel.attach", call::ATTACH, message)
            .await
            .map(|Empty {}| ())
    }

    async fn detach(&self, fence: Fence, lease: &VfLease) -> Result<()> {
        let message = Detach {
            fence,
            lease: lease.clone(),
        };
        self.ask("channel.detach", call::DETACH, message)
            .await
            .map(|Empty {}| ())
    }

    async fn stats(&self) -> Result<EngineStats> {
        self.ask("channel.stats", call::STATS, Empty {}).await
    }

    /// Subscribes at once, without waiting for it: what happens before the request has crossed the channel is not told.
    /// [`DataplaneClient::subscribe`] waits, and says why when it fails; here a subscription that failed is logged
    /// and is a stream that has ended, as one whose connection was lost. Events queue here as in an
    /// [`EventHub`](crate::events::EventHub): in order, the oldest lost first and told as [`Event::Overflowed`].
    fn events(&self) -> Box<dyn EventStream> {
        let hub = EventHub::default();
        let events = hub.subscribe();
        let task = self.runtime.spawn(forward(self.clone(), hub));
        Box::new(Subscription { events, task })
    }
}

#[async_trait]
impl FlowSteering for DataplaneClient {
    async fn validate(&self, rules: &[SteeringRule]) -> Result<Vec<Verdict>> {
        self.ask(
            "steering.validate",
            call::VALIDATE,
            Validate {
                rules: rules.to_vec(),
            },
        )
        .await
    }

    async fn apply(&self, fence: Fence, batch: &Batch) -> Result<BatchOutcome> {
        self.ask(
            "steering.apply",
            call::APPLY,
            Apply {
                fence,
                batch: batch.clone(),
            },
        )
        .await
    }

    async fn list(&self, owner: Owner) -> Result<Vec<InstalledRule>> {
        self.ask("steering.list", call::LIST, List { owner }).await
    }

    async fn counters(&self, owner: Owner, cookies: &[Cookie]) -> Result<Vec<Option<Counters>>> {
        let message = ReadCounters {
            owner,
            cookies: cookies.to_vec(),
        };
        self.ask("steering.counters", call::COUNTERS, message).await
    }

    async fn flush(&self, fence: Fence, owner: Owner) -> Result<u64> {
        self.ask("steering.flush", call::FLUSH, Flush { fence, owner })
            .await
    }

    async fn set_miss_policy(&self, fence: Fence, port: PortRef, policy: MissPolicy) -> Result<()> {
        let message = SetMissPolicy { fence, port, policy };
        self.ask("steering.set_miss_policy", call::SET_MISS_POLICY, message)
            .await
            .map(|Empty {}| ())
    }

    async fn occupancy(&self) -> Result<Vec<Occupancy>> {
        self.ask("steering.occupancy", call::OCCUPANCY, Empty {}).await
    }
}

/// Events from the other side; ends when the connection does, at the latest ten seconds after the other side fell silent.
#[derive(Debug)]
pub struct RemoteEvents {
    stream: Option<Streaming<Event>>,
}

#[async_trait]
impl EventStream for RemoteEvents {
    async fn next(&mut self) -> Option<Event> {
        let event = self.stream.as_mut()?.message().await;
        match event {
            Ok(Some(event)) => Some(event),
            Ok(None) | Err(_) => {
                self.stream = None;
                None
            }
        }
    }
}

/// Hands on what the other side tells; the hub's stream ends with it.
async fn forward(client: DataplaneClient, hub: EventHub) {
    match client.subscribe().await {
        Ok(mut events) => {
            while let Some(event) = events.next().await {
                hub.raise(&event);
            }
        }
        Err(error) => tracing::warn!(%error, "no events: the subscription failed"),
    }
}

/// A subscription that is kept read out by a task of its own.
#[derive(Debug)]
struct Subscription {
    events: HubStream,
    task: JoinHandle<()>,
}

#[async_trait]
impl EventStream for Subscription {
    async fn next(&mut self) -> Option<Event> {
        self.events.next().await
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.task.abort();
    }
}
