//! One proxy's stream as a state machine: requests and snapshots in, responses and events out. No I/O, no clock.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::{Event, Outcome};
use crate::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource, ResourceType};
use crate::snapshot::{Published, REMOVAL, Snapshot};

/// Names one stream may subscribe to, of all types together.
const MAX_NAMES: usize = 1 << 20;

/// The stream cannot go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum SessionError {
    /// The first request said not who asks.
    #[error("the first request must name a node")]
    NoNode,
    /// Too much.
    #[error("more than {MAX_NAMES} names subscribed")]
    TooManyNames,
}

/// One stream.
#[derive(Debug, Default)]
pub(super) struct Session {
    node: String,
    types: BTreeMap<ResourceType, Subscription>,
    snapshot: Option<Arc<Snapshot>>,
    generation: u64,
    /// The newest generation that was reported as taken.
    in_step: u64,
    nonce: u64,
    pub(super) events: Vec<Event>,
}

/// What one stream wants and has of one type.
#[derive(Debug, Default)]
struct Subscription {
    wildcard: bool,
    names: BTreeSet<String>,
    /// Name to version; an empty version: the client knows it is not there.
    has: BTreeMap<String, String>,
    /// Names whose state the client asked to be told, whatever it has.
    asked: BTreeSet<String>,
    /// The first request is answered even when there is nothing to say.
    greet: bool,
    under_way: Option<UnderWay>,
    /// Names in a response that was refused, until the next snapshot. The client may have taken some of them.
    refused: BTreeSet<String>,
}

#[derive(Debug)]
struct UnderWay {
    nonce: String,
    names: Vec<String>,
    generation: u64,
}

impl Session {
    /// A request of the client.
    pub(super) fn request(&mut self, request: DeltaDiscoveryRequest) -> Result<(), SessionError> {
        if self.node.is_empty() {
            self.node = request
                .node
                .as_ref()
                .map(|node| node.id.clone())
                .unwrap_or_default();
            if self.node.is_empty() {
                return Err(SessionError::NoNode);
            }
        }
        let Some(kind) = ResourceType::from_url(&request.type_url) else {
            tracing::debug!(node = self.node, url = request.type_url, "unknown type asked for");
            return Ok(());
        };
        let first = !self.types.contains_key(&kind);
        self.answer(kind, &request);
        let subscription = self.types.entry(kind).or_default();
        subscription.subscribe(kind, request, first);
        if kind == ResourceType::Secret {
            let names: Vec<String> = subscription.asked.iter().cloned().collect();
            if !names.is_empty() {
                self.event(kind, names, self.generation, Outcome::Refused);
            }
        }
        let total: usize = self.types.values().map(|s| s.names.len()).sum();
        if total > MAX_NAMES {
            Err(SessionError::TooManyNames)
        } else {
            Ok(())
        }
    }

    /// Takes an ACK or NACK, if the request is one.
    fn answer(&mut self, kind: ResourceType, request: &DeltaDiscoveryRequest) {
        let Some(subscription) = self.types.get_mut(&kind) else {
            return;
        };
        let about = subscription
            .under_way
            .take_if(|under_way| under_way.nonce == request.response_nonce);
        let Some(UnderWay {
            names, generation, ..
        }) = about
        else {
            return;
        };
        if request.error_detail.is_some() {
            subscription.refused.extend(names.iter().cloned());
        }
        let outcome = match &request.error_detail {
            None => Outcome::Ack,
            Some(error) => Outcome::Nack(error.message.clone()),
        };
        self.event(kind, names, generation, outcome);
    }

    fn event(&mut self, kind: ResourceType, names: Vec<String>, generation: u64, outcome: Outcome) {
        self.events.push(Event {
            node: self.node.clone(),
            kind,
            names,
            generation,
            outcome,
        });
    }

    /// The newest state.
    pub(super) fn publish(&mut self, generation: u64, snapshot: Arc<Snapshot>) {
        self.generation = generation;
        for (kind, subscription) in &mut self.types {
            // Those that are still there are sent again, whatever became of them; those that are not are removed as if the client had them.
            let again = std::mem::take(&mut subscription.refused);
            let there = again
                .into_iter()
                .filter(|name| snapshot.get(*kind, name).is_some());
            subscription.asked.extend(there);
        }
        self.snapshot = Some(snapshot);
    }

    /// A client that gets a new or changed cluster warms it, and for that wants its endpoints, even if it was told them for another
    /// cluster: where it has subscribed to the name already it does not ask (Envoy 1.40 waits for fifteen seconds then).
    fn ask_again_for_endpoints(&mut self, snapshot: &Snapshot, clusters: &[Resource]) {
        let Some(endpoints) = self.types.get_mut(&ResourceType::Endpoints) else {
            return;
        };
        for cluster in clusters {
            let published = snapshot.get(ResourceType::Cluster, &cluster.name);
            let service = published.and_then(|published| published.endpoints.as_ref());
            let name = service.unwrap_or(&cluster.name);
            if endpoints.names.contains(name) {
                endpoints.asked.insert(name.clone());
            }
        }
    }

    /// Everything that can be sent now, in order.
    pub(super) fn responses(&mut self) -> Vec<DeltaDiscoveryResponse> {
        let Some(snapshot) = self.snapshot.clone() else {
            return Vec::new();
        };
        let mut responses = Vec::new();
        for kind in ResourceType::ALL {
            responses.extend(self.additions(kind, &snapshot));
        }
        // Nothing goes while something that may no longer refer to it is still to be taken.
        for kind in REMOVAL {
            if self.keeps(kind) {
                continue;
            }
            responses.extend(self.removals(kind, &snapshot));
        }
        if responses.is_empty() && self.in_step < self.generation && self.has_all(&snapshot) {
            self.in_step = self.generation;
            self.event(
                ResourceType::Listener,
                Vec::new(),
                self.generation,
                Outcome::InStep,
            );
        }
        responses
    }

    /// Whether the client asked for everything there is, and acknowledged it. Routes are asked for only once their listener was taken, so
    /// an acknowledged listener alone does not say that connections find their way.
    fn has_all(&self, snapshot: &Snapshot) -> bool {
        if self
            .types
            .values()
            .any(|s| s.under_way.is_some() || !s.refused.is_empty())
        {
            return false;
        }
        for kind in ResourceType::ALL {
            let subscription = self.types.get(&kind);
            let has = |(name, published): &(&String, &Published)| {
                subscription.is_some_and(|s| s.has.get(*name) == Some(&published.version))
            };
            if let Some((name, _)) = snapshot.of(kind).find(|resource| !has(resource)) {
                tracing::debug!(node = self.node, generation = self.generation, %kind, name, "the proxy has not asked for it yet");
                return false;
            }
        }
        true
    }

    /// Whether what is gone of a type may not go yet.
    fn keeps(&self, kind: ResourceType) -> bool {
        if kind.stands_alone() {
            return self.types.get(&kind).is_some_and(|s| s.under_way.is_some());
        }
        let mut others = self.types.iter().filter(|(kind, _)| !kind.stands_alone());
        others.any(|(_, s)| s.under_way.is_some() || !s.refused.is_empty())
    }

    fn additions(&mut self, kind: ResourceType, snapshot: &Snapshot) -> Option<DeltaDiscoveryResponse> {
        let subscription = self.types.get_mut(&kind)?;
        if subscription.under_way.is_some() {
            return None;
        }
        let asked = std::mem::take(&mut subscription.asked);
        let mut resources = Vec::new();
        if kind != ResourceType::Secret {
            for (name, published) in snapshot.of(kind) {
                if !subscription.wants(name) {
                    continue;
                }
                let current = subscription.has.get(name) == Some(&published.version);
                if current && !asked.contains(name) {
                    continue;
                }
                subscription.has.insert(name.clone(), published.version.clone());
                resources.push(Resource {
                    name: name.clone(),
                    version: published.version.clone(),
                    resource: Some(published.resource.clone()),
                });
            }
        }
        // What is asked for by name and is not there is said not to be there.
        let absent = |name: &String| kind == ResourceType::Secret || snapshot.get(kind, name).is_none();
        let removed: Vec<String> = asked.into_iter().filter(absent).collect();
        for name in &removed {
            subscription.has.insert(name.clone(), String::new());
        }
        let greet = std::mem::take(&mut subscription.greet);
        if resources.is_empty() && removed.is_empty() && !greet {
            return None;
        }
        if kind == ResourceType::Cluster {
            self.ask_again_for_endpoints(snapshot, &resources);
        }
        Some(self.response(kind, resources, removed))
    }

    fn removals(&mut self, kind: ResourceType, snapshot: &Snapshot) -> Option<DeltaDiscoveryResponse> {
        let subscription = self.types.get_mut(&kind)?;
        let gone = |(name, version): (&String, &String)| {
            (!version.is_empty() && snapshot.get(kind, name).is_none()).then(|| name.clone())
        };
        let removed: Vec<String> = subscription.has.iter().filter_map(gone).collect();
        if removed.is_empty() {
            return None;
        }
        for name in &removed {
            if subscription.names.contains(name) {
                subscription.has.insert(name.clone(), String::new());
            } else {
                subscription.has.remove(name);
            }
        }
        Some(self.response(kind, Vec::new(), removed))
    }

    fn response(
        &mut self,
        kind: ResourceType,
        resources: Vec<Resource>,
        removed: Vec<String>,
    ) -> DeltaDiscoveryResponse {
        self.nonce += 1;
        let nonce = self.nonce.to_string();
        let names = resources
            .iter()
            .map(|r| r.name.clone())
            .chain(removed.iter().cloned())
            .collect();
        if let Some(subscription) = self.types.get_mut(&kind) {
            subscription.under_way = Some(UnderWay {
                nonce: nonce.clone(),
                names,
                generation: self.generation,
            });
        }
        DeltaDiscoveryResponse {
            system_version_info: nonce.clone(),
            resources,
            type_url: kind.url().to_owned(),
            nonce,
            removed_resources: removed,
        }
    }

    /// The stream ended.
    pub(super) fn close(&mut self) {
        if !self.node.is_empty() {
            self.event(ResourceType::Listener, Vec::new(), self.generation, Outcome::Gone);
        }
    }
}

impl Subscription {
    fn wants(&self, name: &str) -> bool {
        self.wildcard || self.names.contains(name)
    }

    fn subscribe(&mut self, kind: ResourceType, request: DeltaDiscoveryRequest, first: bool) {
        if first {
            self.has = request.initial_resource_versions.into_iter().collect();
            self.wildcard = kind.is_wildcard() && request.resource_names_subscribe.is_empty();
            self.greet = self.wildcard;
        }
        for name in request.resource_names_unsubscribe {
            if name == "*" {
                self.wildcard = false;
            }
            self.names.remove(&name);
            if !self.wildcard {
                self.has.remove(&name);
            }
            self.asked.remove(&name);
        }
        for name in request.resource_names_subscribe {
            if name == "*" {
                self.greet |= !self.wildcard;
                self.wildcard = true;
                continue;
            }
            let known = first && self.has.contains_key(&name);
            self.names.insert(name.clone());
            if !known {
                self.asked.insert(name);
            }
        }
    }
}
