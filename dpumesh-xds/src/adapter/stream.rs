//! One pod's end of its stream to istiod: updates into its [`PodView`].

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use prost_types::{Struct, Value, value};
use tokio::sync::Notify;

use super::Mesh;
use super::disk::Keeper;
use super::pods::LocalPod;
use crate::client::{Applied, Apply, Rejection, Update};
use crate::discovery::{Node, Resource, ResourceType};
use crate::ir::PodView;
use crate::translate::{Item, translate};

/// How long views must stay as they are before they are made into one.
pub const QUIET: Duration = Duration::from_millis(20);

/// How long a steady flow of changes can hold that up.
pub const PATIENCE: Duration = Duration::from_millis(500);

/// Who a pod's sidecar would say it is. With its labels the control plane makes the inbound half from them, even in the moments in
/// which its own cache has not seen the pod yet.
pub(super) fn node(pod: &LocalPod, mesh: &Mesh) -> Node {
    let LocalPod { name, namespace, .. } = pod;
    let addresses: Vec<String> = pod.addresses.iter().map(ToString::to_string).collect();
    let first = addresses.first().cloned().unwrap_or_default();
    let text = |text: &str| Value {
        kind: Some(value::Kind::StringValue(text.to_owned())),
    };
    let mut metadata: BTreeMap<String, Value> = [
        ("NAMESPACE", namespace.as_str()),
        ("SERVICE_ACCOUNT", &pod.service_account),
        ("CLUSTER_ID", &mesh.cluster_id),
        ("INSTANCE_IPS", &addresses.join(",")),
        ("ISTIO_VERSION", &mesh.istio_version),
    ]
    .into_iter()
    .map(|(key, value)| (key.to_owned(), text(value)))
    .collect();
    if !pod.labels.is_empty() {
        let fields = pod
            .labels
            .iter()
            .map(|(key, value)| (key.clone(), text(value)))
            .collect();
        let labels = Value {
            kind: Some(value::Kind::StructValue(Struct { fields })),
        };
        metadata.insert("LABELS".to_owned(), labels);
    }
    Node {
        id: format!("sidecar~{first}~{name}.{namespace}~{namespace}.svc.cluster.local"),
        cluster: format!("{name}.{namespace}"),
        metadata: Some(Struct { fields: metadata }),
        user_agent_name: "dpumesh".to_owned(),
    }
}

/// The views that changed since they were last looked at.
#[derive(Debug, Default)]
pub(super) struct Views {
    changed: Mutex<BTreeMap<String, (LocalPod, PodView)>>,
    bell: Notify,
}

impl Views {
    pub(super) fn put(&self, pod: &LocalPod, view: &PodView) {
        let mut changed = self.changed.lock().unwrap_or_else(PoisonError::into_inner);
        changed.insert(pod.key(), (pod.clone(), view.clone()));
        drop(changed);
        self.bell.notify_one();
    }

    pub(super) fn take(&self) -> Vec<(LocalPod, PodView)> {
        let mut changed = self.changed.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *changed).into_values().collect()
    }

    pub(super) fn forget(&self, key: &str) {
        let mut changed = self.changed.lock().unwrap_or_else(PoisonError::into_inner);
        changed.remove(key);
    }

    /// Waits for a change and then for quiet.
    pub(super) async fn settled(&self) {
        self.bell.notified().await;
        let deadline = tokio::time::Instant::now() + PATIENCE;
        let quiet = async { while tokio::time::timeout(QUIET, self.bell.notified()).await.is_ok() {} };
        let _ = tokio::time::timeout_at(deadline, quiet).await;
    }
}

/// One pod's stream.
#[derive(Debug)]
pub(super) struct PodStream {
    pod: LocalPod,
    view: PodView,
    views: Arc<Views>,
    keeper: Option<Keeper>,
    /// Types of which the first answer is everything there is: what is not in it is gone, whatever a restart brought back.
    whole: BTreeSet<ResourceType>,
}

impl PodStream {
    /// Goes on from `view`, if there is one from before a restart.
    pub(super) fn new(
        pod: LocalPod,
        view: Option<PodView>,
        views: Arc<Views>,
        keeper: Option<Keeper>,
    ) -> Self {
        Self {
            view: view.unwrap_or_else(|| PodView::new(pod.pod())),
            pod,
            views,
            keeper,
            whole: [ResourceType::Cluster, ResourceType::Listener].into(),
        }
    }

    fn take(&mut self, update: Update) -> Vec<Rejection> {
        let Update {
            kind,
            resources,
            removed,
        } = update;
        let whole = self.whole.remove(&kind);
        if whole {
            let named: BTreeSet<&str> = resources.iter().map(|r| r.name.as_str()).collect();
            match kind {
                ResourceType::Cluster => self.view.clusters.retain(|name, _| named.contains(name.as_str())),
                _ => self
                    .view
                    .listeners
                    .retain(|name, _| named.contains(name.as_str())),
            }
        }
        let mut rejected = Vec::new();
        let mut taken = Vec::new();
        for resource in resources {
            match load(&mut self.view, kind, &resource) {
                Ok(()) => taken.push(resource),
                Err(reason) => {
                    tracing::warn!(pod = self.pod.key(), reason, "resource refused");
                    rejected.push(Rejection {
                        name: resource.name,
                        reason,
                    });
                }
            }
        }
        for name in &removed {
            forget(&mut self.view, kind, name);
        }
        if let Some(keeper) = &self.keeper {
            // Of a whole answer what was refused stays on disk as it was; what is gone comes back after a restart at most until
            // the next whole answer.
            keeper.update(
                &self.pod.key(),
                Update {
                    kind,
                    resources: taken,
                    removed,
                },
                whole && rejected.is_empty(),
            );
        }
        rejected
    }
}

/// Takes one resource into a view.
pub(super) fn load(view: &mut PodView, kind: ResourceType, resource: &Resource) -> Result<(), String> {
    let empty = prost_types::Any::default();
    let any = resource.resource.as_ref().unwrap_or(&empty);
    let translated = translate(
        kind,
        &resource.name,
        &any.type_url,
        &any.value,
        &view.pod.identity,
    )
    .map_err(|error| error.to_string())?;
    for note in &translated.notes {
        tracing::trace!(resource = note.resource, path = note.path, "{}", note.what);
    }
    let name = resource.name.clone();
    match translated.item {
        Item::Listener(item) => drop(view.listeners.insert(name, item)),
        Item::Route(item) => drop(view.routes.insert(name, item)),
        Item::Cluster(item) => drop(view.clusters.insert(name, item)),
        Item::Endpoints(item) => drop(view.endpoints.insert(name, item)),
    }
    Ok(())
}

fn forget(view: &mut PodView, kind: ResourceType, name: &str) {
    match kind {
        ResourceType::Listener => drop(view.listeners.remove(name)),
        ResourceType::Route => drop(view.routes.remove(name)),
        ResourceType::Cluster => drop(view.clusters.remove(name)),
        ResourceType::Endpoints => drop(view.endpoints.remove(name)),
        ResourceType::Extension
        | ResourceType::NameTable
        | ResourceType::Secret
        | ResourceType::Binding
        | ResourceType::Peer => {}
    }
}

/// Drops routes and endpoints that nothing refers to; what is wanted of both.
pub(super) fn tidy(view: &mut PodView) -> (BTreeSet<String>, BTreeSet<String>) {
    let (routes, endpoints) = (view.wanted_routes(), view.wanted_endpoints());
    view.routes.retain(|name, _| routes.contains(name));
    view.endpoints.retain(|name, _| endpoints.contains(name));
    (routes, endpoints)
}

#[async_trait]
impl Apply for PodStream {
    async fn apply(&mut self, update: Update) -> Applied {
        let rejected = self.take(update);
        let (routes, endpoints) = tidy(&mut self.view);
        self.views.put(&self.pod, &self.view);
        Applied {
            rejected,
            wanted: vec![
                (ResourceType::Endpoints, endpoints),
                (ResourceType::Route, routes),
            ],
        }
    }

    fn lost(&mut self, reason: &str) {
        tracing::debug!(
            pod = self.pod.key(),
            reason,
            "stream to istiod ended; the last configuration stays"
        );
    }
}
