//! The xDS server of a shared proxy: delta ADS from one versioned [`Snapshot`].
//!
//! ```text
//! publish(snapshot) ─► every stream: what it has against what it should have ─► one response a type at a time ─► ACK | NACK
//! ```
//!
//! Clusters and endpoints travel before listeners and routes; removals wait until everything added by the same snapshot has been acknowledged, so
//! no proxy is ever told to refer to what it no longer has. Per type one response is under way: a slow proxy gets the newest
//! state when it is ready for it, and nothing piles up. What was in a response that a proxy refuses is not sent again before the next snapshot.
//!
//! Secrets are refused by name, whoever asks: keys are made on the SoC and never pass here. Only delta ADS is served; a
//! proxy configured for state-of-the-world gets `Unimplemented`.

mod service;
mod session;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::{mpsc, watch};

pub use service::AdsService;

use crate::discovery::ResourceType;
use crate::snapshot::Snapshot;

/// Events that wait for a slow reader; later ones are counted and dropped.
const EVENTS: usize = 1024;

/// What became of a response, or of a request that is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// The node's id.
    pub node: String,
    /// What this is about.
    pub kind: ResourceType,
    /// Resources that were sent, or asked for.
    pub names: Vec<String>,
    /// The newest snapshot when the response was sent, as counted by [`Publisher::publish`].
    pub generation: u64,
    /// What happened.
    pub outcome: Outcome,
}

/// The outcome of an [`Event`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The proxy took the resources.
    Ack,
    /// The proxy has taken everything in the snapshot of this event's generation: it asked for all of it, and acknowledged it.
    InStep,
    /// The proxy refused the response; its words.
    Nack(String),
    /// The proxy asked for what is never served.
    Refused,
    /// The stream ended.
    Gone,
}

/// A snapshot and its generation.
type Current = (u64, Arc<Snapshot>);

/// Counts since the start.
#[derive(Debug, Default)]
pub struct Counters {
    /// Streams opened.
    pub streams: AtomicU64,
    /// Responses sent.
    pub responses: AtomicU64,
    /// Resources in them.
    pub resources: AtomicU64,
    /// Responses acknowledged.
    pub acks: AtomicU64,
    /// Responses refused.
    pub nacks: AtomicU64,
    /// Events nobody read in time.
    pub events_lost: AtomicU64,
}

impl Counters {
    pub(crate) fn add(counter: &AtomicU64, n: usize) {
        counter.fetch_add(n as u64, Ordering::Relaxed);
    }
}

/// The caller's end of a server: it publishes here. Streams are served by [`Self::service`].
#[derive(Debug)]
pub struct Publisher {
    current: watch::Sender<Option<Current>>,
    events: mpsc::Sender<Event>,
    counters: Arc<Counters>,
}

impl Publisher {
    /// A server without a snapshot: proxies that ask wait for the first one. Read the events, or they are dropped and counted.
    pub fn new() -> (Self, mpsc::Receiver<Event>) {
        let (events, receiver) = mpsc::channel(EVENTS);
        let publisher = Self {
            current: watch::Sender::new(None),
            events,
            counters: Arc::default(),
        };
        (publisher, receiver)
    }

    /// Makes `snapshot` what every proxy should have. Does not wait for any. Returns its generation: 1 for the first, then
    /// one more each time.
    pub fn publish(&self, snapshot: Arc<Snapshot>) -> u64 {
        let mut generation = 0;
        self.current.send_modify(|current| {
            generation = current.as_ref().map_or(0, |(generation, _)| *generation) + 1;
            *current = Some((generation, snapshot));
        });
        generation
    }

    /// Counts since the start.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// Services handed out and streams open, together.
    pub fn in_use(&self) -> usize {
        self.current.receiver_count()
    }

    /// The gRPC service, for `tonic::transport::Server::add_service`. Streams end when the publisher is dropped.
    pub fn service(&self) -> AdsService {
        AdsService::new(
            self.current.subscribe(),
            self.events.clone(),
            Arc::clone(&self.counters),
        )
    }
}

#[cfg(test)]
mod tests;
