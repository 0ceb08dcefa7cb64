//! client ─► translate ─► aggregate ─► server, for the pods of a node.
//!
//! ```text
//! controller ─Binding─► pods ◄─govern─ agent          a pod of both gets a stream, one of neither loses it
//!                        │
//! istiod ─ADS─► stream ─► view ─► governor ─► aggregate ─► Publisher ─ADS─► shared proxy
//!                 └─► disk          ▲  └─► board ─governed─► agent                │
//!                                   └───────────── in step, refused ◄────────────┘
//! ```
//!
//! | module | what it owns |
//! |---|---|
//! | [`pods`] | which pods get a stream |
//! | [`controller`] | the controller's word: bindings, peers and their file |
//! | [`token`] | with what right the adapter speaks for a pod |
//! | [`stream`] | one pod's stream and what came of it |
//! | [`govern`] | whose configuration the proxy gets, quarantine, who is governed |
//! | [`disk`] | the last good configuration across restarts |
//! | [`relay`] | the proxy's CSRs on their way to istiod's CA |
//!
//! A change of any view makes one new aggregate once things have been quiet for [`stream::QUIET`], at the latest [`stream::PATIENCE`] after the
//! first change. A resource that is refused leaves its pod with the last good one and no other pod with anything changed.
//! Everything but the aggregation is done on one thread; that is done on another.

pub mod controller;
pub mod disk;
pub mod govern;
pub mod pods;
pub mod relay;
#[cfg(feature = "kube")]
pub mod status;
pub mod stream;
pub mod token;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tonic::transport::Channel;

use crate::aggregate::{Aggregate, Figures, Options};
use crate::client::{Client, Counters, Credential, Protocol};
use crate::discovery::ResourceType;
use crate::ir::PodView;
use crate::server::{Event, Outcome, Publisher};
use crate::snapshot::Snapshot;
use disk::Keeper;
use govern::{Governor, Report};
use pods::{LocalPod, Pods};
use stream::{PodStream, Views, node};
use token::{OfPod, Tokens};

pub use pods::PodEntry;

/// What is the same for every pod.
#[derive(Debug, Clone)]
pub struct Mesh {
    /// Trust domain of the mesh.
    pub trust_domain: String,
    /// The cluster's name in istiod.
    pub cluster_id: String,
    /// The Istio version whose configuration is asked for.
    pub istio_version: String,
}

/// How long the first aggregate may wait for pods that are there from the start: a proxy that knows them from before a restart would
/// else lose those whose configuration comes last.
pub const FIRST: Duration = Duration::from_secs(5);

/// What an adapter is made of.
#[derive(Debug)]
pub struct Parts {
    /// The connection to istiod that all streams share.
    pub istiod: Channel,
    /// What is the same for every pod.
    pub mesh: Mesh,
    /// Which pods there are.
    pub pods: Arc<Pods>,
    /// With what right it speaks for them.
    pub tokens: Arc<dyn Tokens>,
    /// What the shared proxy listens on.
    pub options: Options,
    /// Where it gets its configuration.
    pub publisher: Publisher,
    /// What it says to that.
    pub events: mpsc::Receiver<Event>,
    /// Where the last good configuration is kept.
    pub keeper: Option<Keeper>,
    /// What was kept ([`disk::restore`]).
    pub restored: Vec<(LocalPod, PodView)>,
    /// Where the streams count.
    pub counters: Arc<Counters>,
}

/// What the adapter shows of itself.
#[derive(Debug, Clone, Default)]
pub struct Shown {
    /// How all pods stand.
    pub pods: BTreeMap<String, Report>,
    /// What each connected proxy has taken.
    pub proxies: BTreeMap<String, u64>,
    /// The newest generation.
    pub generation: u64,
    /// Its figures.
    pub figures: Figures,
    /// Its resources' octets.
    pub octets: usize,
}

/// An adapter, before it runs.
#[derive(Debug)]
pub struct Adapter {
    parts: Parts,
    views: Arc<Views>,
    governor: Governor,
    streams: BTreeMap<String, Stream>,
    restored: BTreeMap<String, (LocalPod, PodView)>,
    published: Option<(u64, Arc<Snapshot>)>,
    /// The last aggregate, whose names the next one keeps.
    last: Arc<Aggregate>,
    /// Until when the first aggregate waits for these.
    first: Option<(Instant, BTreeSet<String>)>,
    board: watch::Sender<BTreeMap<String, Report>>,
    shown: watch::Sender<Shown>,
}

/// A pod's stream; dropping it ends it.
#[derive(Debug)]
struct Stream {
    pod: LocalPod,
    task: AbortHandle,
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Adapter {
    /// Of these parts.
    pub fn new(mut parts: Parts) -> Self {
        let restored = std::mem::take(&mut parts.restored);
        Self {
            parts,
            views: Arc::default(),
            governor: Governor::default(),
            streams: BTreeMap::new(),
            restored: restored
                .into_iter()
                .map(|(pod, view)| (pod.key(), (pod, view)))
                .collect(),
            published: None,
            last: Arc::default(),
            first: None,
            board: watch::Sender::default(),
            shown: watch::Sender::default(),
        }
    }

    /// How all pods stand, for [`crate::local`].
    pub fn board(&self) -> watch::Receiver<BTreeMap<String, Report>> {
        self.board.subscribe()
    }

    /// What it shows of itself, for a status page.
    pub fn shown(&self) -> watch::Receiver<Shown> {
        self.shown.subscribe()
    }

    /// Runs until dropped.
    pub async fn run(mut self) {
        self.reconcile();
        self.first = Some((Instant::now() + FIRST, self.streams.keys().cloned().collect()));
        // What was kept is there at once; without anything to publish a proxy keeps what it has.
        if !self.views_changed().is_empty() {
            self.publish().await;
        }
        loop {
            let pods = Arc::clone(&self.parts.pods);
            let views = Arc::clone(&self.views);
            let patience = self.first.as_ref().map(|(until, _)| *until);
            let again = tokio::select! {
                () = tokio::time::sleep_until(patience.unwrap_or_else(Instant::now)), if patience.is_some() => true,
                () = pods.changed.notified() => self.reconcile(),
                () = views.settled() => true,
                Some(event) = self.parts.events.recv() => self.event(&event),
            };
            let changed = self.views_changed();
            if again || !changed.is_empty() {
                while self.publish().await {}
            }
        }
    }

    /// Starts and ends streams; whether anything ended.
    fn reconcile(&mut self) -> bool {
        let local = self.parts.pods.local();
        let gone: Vec<String> = self
            .streams
            .iter()
            .filter(|(key, stream)| !local.get(*key).is_some_and(|pod| pod.is(&stream.pod)))
            .map(|(key, _)| key.clone())
            .collect();
        for key in &gone {
            tracing::info!(pod = key, "pod left");
            self.streams.remove(key);
            self.views.forget(key);
            self.governor.remove(key);
        }
        let fresh: Vec<&LocalPod> = local
            .values()
            .filter(|pod| !self.streams.contains_key(&pod.key()))
            .collect();
        if (!fresh.is_empty() || !gone.is_empty())
            && let Some(keeper) = &self.parts.keeper
        {
            keeper.pods(local.values().cloned().collect());
        }
        for pod in fresh {
            let stream = self.start(pod);
            self.streams.insert(pod.key(), stream);
        }
        !gone.is_empty()
    }

    fn start(&mut self, pod: &LocalPod) -> Stream {
        let kept = self.restored.remove(&pod.key()).filter(|(kept, _)| kept.is(pod));
        let kept = kept.map(|(_, view)| view);
        tracing::info!(pod = pod.key(), restored = kept.is_some(), "pod came");
        if let Some(view) = &kept {
            self.views.put(pod, view);
        }
        let parts = &self.parts;
        let mut stream = PodStream::new(pod.clone(), kept, Arc::clone(&self.views), parts.keeper.clone());
        let credential = Credential::Token(Arc::new(OfPod {
            tokens: Arc::clone(&parts.tokens),
            pod: pod.clone(),
        }));
        let client = Client {
            channel: parts.istiod.clone(),
            node: node(pod, &parts.mesh),
            credential,
            protocol: Protocol::Delta,
            wildcards: vec![ResourceType::Cluster, ResourceType::Listener],
            counters: Arc::clone(&parts.counters),
        };
        let task = tokio::spawn(async move { client.run(&mut stream).await });
        Stream {
            pod: pod.clone(),
            task: task.abort_handle(),
        }
    }

    /// Takes changed views to the governor; which pods' they are.
    fn views_changed(&mut self) -> Vec<String> {
        let mut changed = Vec::new();
        for (pod, mut view) in self.views.take() {
            // A last word of a stream that ended is nobody's.
            if self
                .streams
                .get(&pod.key())
                .is_some_and(|stream| stream.pod == pod)
            {
                view.workload = pod.workload(&self.parts.mesh.cluster_id);
                self.governor.put(&pod, view);
                changed.push(pod.key());
            }
        }
        changed
    }

    /// Whether what is published is another thing now.
    fn event(&mut self, event: &Event) -> bool {
        told(event);
        let again = self.governor.event(event);
        self.show();
        again
    }

    /// Whether the first aggregate is to wait for more.
    fn waits(&mut self) -> bool {
        let Some((until, pods)) = &mut self.first else {
            return false;
        };
        pods.retain(|pod| self.streams.contains_key(pod) && !self.governor.complete(pod));
        let waits = !pods.is_empty() && Instant::now() < *until;
        if !waits {
            self.first = None;
        }
        waits
    }

    /// Tells the proxies what is to be told now; whether it is another thing already.
    async fn publish(&mut self) -> bool {
        if self.waits() {
            return false;
        }
        let views = self.governor.views();
        let options = self.parts.options;
        let last = Arc::clone(&self.last);
        let made = match tokio::task::spawn_blocking(move || last.next(&views, &options)).await {
            Ok(made) => Arc::new(made),
            Err(error) => {
                tracing::error!(%error, "aggregation failed; the last good configuration stays");
                return false;
            }
        };
        said(&made);
        let (figures, octets) = (made.figures, made.snapshot.octets());
        let same = self
            .published
            .as_ref()
            .is_some_and(|(_, old)| **old == made.snapshot);
        if !same {
            let snapshot = Arc::new(made.snapshot.clone());
            let generation = self.parts.publisher.publish(Arc::clone(&snapshot));
            self.published = Some((generation, snapshot));
        }
        let generation = self.published.as_ref().map_or(0, |(generation, _)| *generation);
        let again = self.governor.published(generation, &made);
        self.last = made;
        tracing::info!(
            generation,
            changed = !same,
            pods = figures.pods,
            profiles = figures.outbound_profiles,
            resources_in = figures.resources_in,
            resources_out = figures.resources_out,
            octets,
            "published"
        );
        self.shown.send_modify(|shown| {
            shown.generation = generation;
            shown.figures = figures;
            shown.octets = octets;
        });
        self.show();
        again
    }

    fn show(&self) {
        let report = self.governor.report();
        self.shown.send_modify(|shown| {
            shown.pods.clone_from(&report);
            shown.proxies.clone_from(self.governor.proxies());
        });
        self.board.send_if_modified(|board| {
            let changed = *board != report;
            *board = report;
            changed
        });
    }
}

fn said(made: &Aggregate) {
    for closed in &made.closed {
        tracing::info!(pod = closed.pod, reason = closed.reason, "pod is closed");
    }
    for note in &made.notes {
        tracing::debug!(resource = note.resource, path = note.path, "{}", note.what);
    }
}

fn told(event: &Event) {
    let Event {
        node,
        kind,
        names,
        generation,
        outcome,
    } = event;
    match outcome {
        Outcome::Ack => tracing::debug!(node, %kind, count = names.len(), generation, "acknowledged"),
        Outcome::InStep => tracing::info!(node, generation, "the proxy has everything"),
        Outcome::Nack(reason) => {
            tracing::warn!(node, %kind, count = names.len(), generation, reason, "refused by the proxy")
        }
        Outcome::Refused => tracing::warn!(node, %kind, names = names.join(", "), "never served"),
        Outcome::Gone => tracing::info!(node, "proxy is gone"),
    }
}

#[cfg(test)]
mod tests;
