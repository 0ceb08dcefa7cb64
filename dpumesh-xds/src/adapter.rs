//! client ─► translate ─► aggregate ─► server, for a list of pods.
//!
//! Each pod has a stream, a [`PodView`] and an identity of its own. A change of any view makes one new aggregate once things have been quiet for
//! [`QUIET`], at the latest [`PATIENCE`] after the first change. A resource that is refused leaves its pod with the last good one
//! and no other pod with anything changed.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use prost_types::{Struct, Value, value};
use serde::Deserialize;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tonic::transport::Channel;

use crate::aggregate::{Aggregate, Options, aggregate};
use crate::client::{Applied, Apply, Client, Counters, Credential, Rejection, Update};
use crate::discovery::{Node, ResourceType};
use crate::ir::{Identity, Pod, PodView};
use crate::server::Publisher;
use crate::translate::{Item, translate};

/// How long views must stay as they are before they are made into one.
pub const QUIET: Duration = Duration::from_millis(20);

/// How long a steady flow of changes can hold that up.
pub const PATIENCE: Duration = Duration::from_millis(500);

/// A local pod, as the operator lists it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PodEntry {
    /// Its address.
    pub ip: IpAddr,
    /// Kubernetes name.
    pub name: String,
    /// Kubernetes namespace.
    pub namespace: String,
    /// Kubernetes service account.
    pub service_account: String,
    /// File with its token, audience `istio-ca`; none where the connection's certificate speaks for it.
    #[serde(default)]
    pub token: Option<PathBuf>,
}

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

/// Runs streams for `pods` over `channel` and publishes what becomes of them, until dropped.
pub async fn run(
    channel: Channel,
    mesh: &Mesh,
    pods: &[PodEntry],
    options: Options,
    publisher: &Publisher,
    counters: Arc<Counters>,
) {
    let views = Arc::new(Views::default());
    let mut streams = JoinSet::new();
    for entry in pods {
        let mut stream = PodStream::new(entry, mesh, Arc::clone(&views));
        let client = Client {
            channel: channel.clone(),
            node: node(entry, mesh),
            credential: entry
                .token
                .clone()
                .map_or(Credential::Connection, Credential::TokenFile),
            wildcards: vec![ResourceType::Cluster, ResourceType::Listener],
            counters: Arc::clone(&counters),
        };
        streams.spawn(async move { client.run(&mut stream).await });
    }
    loop {
        views.settled().await;
        let current = views.all();
        let made = tokio::task::spawn_blocking(move || aggregate(&current, &options)).await;
        match made {
            Ok(made) => publish(made, publisher),
            Err(error) => tracing::error!(%error, "aggregation failed; the last good configuration stays"),
        }
    }
}

fn publish(made: Aggregate, publisher: &Publisher) {
    for closed in &made.closed {
        tracing::warn!(pod = closed.pod, reason = closed.reason, "pod is closed");
    }
    for note in &made.notes {
        tracing::debug!(resource = note.resource, path = note.path, "{}", note.what);
    }
    let figures = made.figures;
    tracing::info!(
        pods = figures.pods,
        profiles = figures.outbound_profiles,
        resources_in = figures.resources_in,
        resources_out = figures.resources_out,
        octets = made.snapshot.octets(),
        "published"
    );
    publisher.publish(Arc::new(made.snapshot));
}

/// Who a pod's sidecar would say it is.
fn node(entry: &PodEntry, mesh: &Mesh) -> Node {
    let PodEntry {
        ip, name, namespace, ..
    } = entry;
    let metadata = [
        ("NAMESPACE", namespace.clone()),
        ("SERVICE_ACCOUNT", entry.service_account.clone()),
        ("CLUSTER_ID", mesh.cluster_id.clone()),
        ("INSTANCE_IPS", ip.to_string()),
        ("ISTIO_VERSION", mesh.istio_version.clone()),
    ];
    let text = |text: String| Value {
        kind: Some(value::Kind::StringValue(text)),
    };
    Node {
        id: format!("sidecar~{ip}~{name}.{namespace}~{namespace}.svc.cluster.local"),
        cluster: format!("{name}.{namespace}"),
        metadata: Some(Struct {
            fields: metadata
                .into_iter()
                .map(|(key, value)| (key.to_owned(), text(value)))
                .collect(),
        }),
        user_agent_name: "dpumesh".to_owned(),
    }
}

/// All pods' views, and the bell that rings when one changes.
#[derive(Debug, Default)]
struct Views {
    by_pod: Mutex<BTreeMap<String, PodView>>,
    changed: Notify,
}

impl Views {
    fn put(&self, view: &PodView) {
        let mut by_pod = self.by_pod.lock().unwrap_or_else(PoisonError::into_inner);
        by_pod.insert(view.pod.key(), view.clone());
        drop(by_pod);
        self.changed.notify_one();
    }

    fn all(&self) -> Vec<PodView> {
        let by_pod = self.by_pod.lock().unwrap_or_else(PoisonError::into_inner);
        by_pod.values().cloned().collect()
    }

    /// Waits for a change and then for quiet.
    async fn settled(&self) {
        self.changed.notified().await;
        let deadline = tokio::time::Instant::now() + PATIENCE;
        let quiet = async { while tokio::time::timeout(QUIET, self.changed.notified()).await.is_ok() {} };
        let _ = tokio::time::timeout_at(deadline, quiet).await;
    }
}

/// One pod's end of its stream.
#[derive(Debug)]
struct PodStream {
    view: PodView,
    views: Arc<Views>,
}

impl PodStream {
    fn new(entry: &PodEntry, mesh: &Mesh, views: Arc<Views>) -> Self {
        let pod = Pod {
            name: entry.name.clone(),
            addresses: vec![entry.ip],
            identity: Identity {
                trust_domain: mesh.trust_domain.clone(),
                namespace: entry.namespace.clone(),
                service_account: entry.service_account.clone(),
            },
        };
        Self {
            view: PodView::new(pod),
            views,
        }
    }

    fn take(&mut self, update: Update) -> Vec<Rejection> {
        let mut rejected = Vec::new();
        for resource in update.resources {
            let any = resource.resource.unwrap_or_default();
            let identity = &self.view.pod.identity;
            match translate(update.kind, &resource.name, &any.type_url, &any.value, identity) {
                Ok(translated) => {
                    for note in &translated.notes {
                        tracing::trace!(resource = note.resource, path = note.path, "{}", note.what);
                    }
                    self.keep(resource.name, translated.item);
                }
                Err(error) => {
                    let reason = error.to_string();
                    tracing::warn!(pod = self.view.pod.key(), reason, "resource refused");
                    rejected.push(Rejection {
                        name: resource.name,
                        reason,
                    });
                }
            }
        }
        for name in &update.removed {
            self.forget(update.kind, name);
        }
        rejected
    }

    fn keep(&mut self, name: String, item: Item) {
        match item {
            Item::Listener(item) => drop(self.view.listeners.insert(name, item)),
            Item::Route(item) => drop(self.view.routes.insert(name, item)),
            Item::Cluster(item) => drop(self.view.clusters.insert(name, item)),
            Item::Endpoints(item) => drop(self.view.endpoints.insert(name, item)),
        }
    }

    fn forget(&mut self, kind: ResourceType, name: &str) {
        match kind {
            ResourceType::Listener => drop(self.view.listeners.remove(name)),
            ResourceType::Route => drop(self.view.routes.remove(name)),
            ResourceType::Cluster => drop(self.view.clusters.remove(name)),
            ResourceType::Endpoints => drop(self.view.endpoints.remove(name)),
            ResourceType::Extension
            | ResourceType::NameTable
            | ResourceType::Secret
            | ResourceType::Binding
            | ResourceType::Peer => {}
        }
    }
}

#[async_trait]
impl Apply for PodStream {
    async fn apply(&mut self, update: Update) -> Applied {
        let rejected = self.take(update);
        let (routes, endpoints) = (self.view.wanted_routes(), self.view.wanted_endpoints());
        self.view.routes.retain(|name, _| routes.contains(name));
        self.view.endpoints.retain(|name, _| endpoints.contains(name));
        self.views.put(&self.view);
        Applied {
            rejected,
            wanted: vec![
                (ResourceType::Endpoints, endpoints),
                (ResourceType::Route, routes),
            ],
        }
    }

    fn lost(&mut self, reason: &str) {
        tracing::info!(
            pod = self.view.pod.key(),
            reason,
            "stream to istiod ended; the last configuration stays"
        );
    }
}
