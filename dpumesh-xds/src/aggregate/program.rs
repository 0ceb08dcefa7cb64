//! Bottom-up: one name for equal resources, then each pod's trees over the chains that come of it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use super::names::{Census, Settled, Variant};
use super::tree::{self, Tree, TreeError};
use super::{Interned, Users};
use crate::discovery::ResourceType;
use crate::ir::{Content, FilterChain, Hash, Identity, Listener, Pod, PodView};
use crate::translate::{Note, Renames, renamed};

/// What a pod's connections meet.
#[derive(Debug)]
pub(super) struct Program {
    /// `pod.namespace`.
    pub(super) pod: String,
    pub(super) outbound: Tree,
    pub(super) inbound: Tree,
}

/// A cluster under its final names.
#[derive(Debug)]
pub(super) struct SharedCluster {
    pub(super) content: Arc<Content>,
    pub(super) endpoints: Option<String>,
}

/// A chain under its final name.
#[derive(Debug)]
pub(super) struct SharedChain {
    pub(super) content: Content,
    /// Whose certificate its connections show; set for chains that lead out.
    pub(super) identity: Option<Identity>,
}

/// Everything that is interned.
#[derive(Debug, Default)]
pub(super) struct Shared {
    pub(super) endpoints: Interned,
    pub(super) clusters: BTreeMap<String, SharedCluster>,
    pub(super) routes: Interned,
    pub(super) outbound: BTreeMap<String, SharedChain>,
    pub(super) inbound: BTreeMap<String, SharedChain>,
    pub(super) notes: Vec<Note>,
    pub(super) users: Users,
    pub(super) names: Names,
    /// Per pod: what its own names became.
    renames: HashMap<String, Renames>,
    /// Content and renames met before.
    cache: HashMap<(Hash, Vec<(String, String)>), Content>,
}

/// Who has which name, for the next time.
#[derive(Debug, Clone, Default)]
pub(super) struct Names {
    endpoints: Settled,
    clusters: Settled,
    routes: Settled,
}

impl Shared {
    /// Interns endpoints, clusters and routes of these pods; what had a name in `before` keeps it.
    pub(super) fn new(views: &[&PodView], before: &Names) -> Self {
        let mut shared = Self::default();
        let endpoints = shared.intern_endpoints(views, &before.endpoints);
        let clusters = shared.intern_clusters(views, &endpoints, &before.clusters);
        shared.intern_routes(views, &clusters, &before.routes);
        shared
    }

    fn intern_endpoints(&mut self, views: &[&PodView], before: &Settled) -> PodNames {
        let mut census = Census::default();
        let variant = |content: &Content| Variant {
            hash: content.body.hash,
            owner: None,
        };
        for view in views {
            for assignment in view.endpoints.values() {
                census.add(&assignment.name, variant(&assignment.content));
            }
        }
        let settled = census.settle(before);
        let mut names = PodNames::new();
        for view in views {
            for assignment in view.endpoints.values() {
                let new = settled.name(&assignment.name, &variant(&assignment.content));
                names.insert((view.pod.key(), assignment.name.clone()), new.clone());
                self.uses(ResourceType::Endpoints, &new, &view.pod.key());
                self.endpoints
                    .entry(new)
                    .or_insert_with(|| Arc::new(assignment.content.clone()));
            }
        }
        self.names.endpoints = settled;
        names
    }

    fn intern_clusters(&mut self, views: &[&PodView], endpoints: &PodNames, before: &Settled) -> PodNames {
        let mut census = Census::default();
        let mut found = Vec::new();
        for view in views {
            let pod = view.pod.key();
            let inbound = inbound_clusters(view);
            for cluster in view.clusters.values() {
                let service = cluster
                    .endpoints
                    .as_ref()
                    .map(|old| endpoints[&(pod.clone(), old.clone())].clone());
                let mut key = cluster.content.body.hash.0.to_vec();
                key.extend_from_slice(service.as_deref().unwrap_or_default().as_bytes());
                let variant = Variant {
                    hash: Hash::of(&key),
                    // Inbound chains have their routes in them: a kept connection of a chain that was changed still asks for the cluster
                    // by this name.
                    owner: (cluster.stateful || inbound.contains(&cluster.name)).then(|| pod.clone()),
                };
                census.add(&cluster.name, variant.clone());
                found.push((pod.clone(), cluster, service, variant));
            }
        }
        let settled = census.settle(before);
        let mut names = PodNames::new();
        for (pod, cluster, endpoints, variant) in found {
            let new = settled.name(&cluster.name, &variant);
            self.uses(ResourceType::Cluster, &new, &pod);
            names.insert((pod, cluster.name.clone()), new.clone());
            self.clusters.entry(new).or_insert_with(|| SharedCluster {
                content: Arc::new(cluster.content.clone()),
                endpoints,
            });
        }
        self.names.clusters = settled;
        names
    }

    fn intern_routes(&mut self, views: &[&PodView], clusters: &PodNames, before: &Settled) {
        let mut census = Census::default();
        let mut found = Vec::new();
        for view in views {
            let pod = view.pod.key();
            let mut renames = self.cluster_renames(view, clusters);
            for route in view.routes.values() {
                let content = self.rename(&route.content, &renames);
                let variant = Variant {
                    hash: content.body.hash,
                    owner: None,
                };
                census.add(&route.name, variant.clone());
                found.push((pod.clone(), route.name.clone(), content, variant));
            }
            renames.routes = BTreeMap::new();
            self.renames.insert(pod, renames);
        }
        let settled = census.settle(before);
        for (pod, name, content, variant) in found {
            let new = settled.name(&name, &variant);
            self.uses(ResourceType::Route, &new, &pod);
            if let Some(renames) = self.renames.get_mut(&pod) {
                renames.routes.insert(name, new.clone());
            }
            self.routes.entry(new).or_insert_with(|| Arc::new(content));
        }
        self.names.routes = settled;
    }

    /// New names of a pod's clusters, and of those it speaks of but does not have: another pod may have one of that name.
    fn cluster_renames(&mut self, view: &PodView, clusters: &PodNames) -> Renames {
        let pod = view.pod.key();
        let mut renames = Renames::default();
        for name in view.clusters.keys() {
            renames
                .clusters
                .insert(name.clone(), clusters[&(pod.clone(), name.clone())].clone());
        }
        let mut spoken: BTreeSet<String> = BTreeSet::new();
        for route in view.routes.values() {
            spoken.extend(route.content.references.clusters.iter().cloned());
        }
        for listener in view.listeners.values() {
            spoken.extend(listener.references().clusters);
        }
        for absent in spoken
            .into_iter()
            .filter(|name| !view.clusters.contains_key(name))
        {
            self.notes.push(Note {
                resource: format!("cluster {absent:?} of {pod}"),
                path: String::new(),
                what: "is referred to and not there".to_owned(),
            });
            let new = format!("{absent}@absent");
            renames.clusters.insert(absent, new);
        }
        renames
    }

    fn rename(&mut self, content: &Content, renames: &Renames) -> Content {
        let new = |names: &BTreeSet<String>, table: &BTreeMap<String, String>| -> Vec<(String, String)> {
            let changed =
                |name: &String| Some((name.clone(), table.get(name).filter(|new| *new != name)?.clone()));
            names.iter().filter_map(changed).collect()
        };
        let mut changes = new(&content.references.clusters, &renames.clusters);
        changes.extend(new(&content.references.routes, &renames.routes));
        if changes.is_empty() {
            return content.clone();
        }
        let key = (content.body.hash, changes);
        self.cache
            .entry(key)
            .or_insert_with(|| renamed(content, renames))
            .clone()
    }

    /// One pod's trees; its chains are interned on the way.
    pub(super) fn program(&mut self, view: &PodView) -> Result<Program, TreeError> {
        let pod = view.pod.key();
        let listeners: Vec<&Listener> = view.listeners.values().map(|listener| &**listener).collect();
        let mut outbound = BTreeMap::new();
        let mut inbound = BTreeMap::new();
        for listener in &listeners {
            match listener.role {
                crate::ir::Role::Inbound => self.chains(listener, &view.pod, true, &mut inbound),
                crate::ir::Role::CatchAll | crate::ir::Role::Outbound => {
                    self.chains(listener, &view.pod, false, &mut outbound);
                }
                crate::ir::Role::OwnPort => {}
            }
        }
        let program = Program {
            outbound: tree::outbound(&listeners, &|l, index| leaf(&outbound, l, index))?,
            inbound: tree::inbound(&listeners, &|l, index| leaf(&inbound, l, index))?,
            pod,
        };
        self.outbound.extend(outbound.into_values());
        self.inbound.extend(inbound.into_values());
        Ok(program)
    }

    fn uses(&mut self, kind: ResourceType, name: &str, pod: &str) {
        let users = self.users.entry((kind, name.to_owned())).or_default();
        users.insert(pod.to_owned());
    }

    fn chains(&mut self, listener: &Listener, pod: &Pod, inbound: bool, into: &mut Placed) {
        let renames = self.renames.get(&pod.key()).cloned().unwrap_or_default();
        for (index, chain) in indexed(listener) {
            let content = self.rename(&chain.content, &renames);
            let identity = (!inbound).then(|| pod.identity.clone());
            let name = chain_name(listener, chain, pod, &content, identity.as_ref());
            self.uses(ResourceType::Listener, &name, &pod.key());
            into.insert(
                (listener.name.clone(), index),
                (name, SharedChain { content, identity }),
            );
        }
    }
}

/// Clusters that only a pod's inbound listeners lead to.
fn inbound_clusters(view: &PodView) -> BTreeSet<String> {
    let of = |inbound: bool| {
        let listeners = view.listeners.values();
        listeners
            .filter(move |listener| (listener.role == crate::ir::Role::Inbound) == inbound)
            .flat_map(|listener| listener.references().clusters)
    };
    let outbound: BTreeSet<String> = of(false).collect();
    of(true).filter(|name| !outbound.contains(name)).collect()
}

/// Final names by pod and own name.
type PodNames = HashMap<(String, String), String>;

/// Chains by listener and place (`None`: the default chain), with their final names.
type Placed = BTreeMap<(String, Option<usize>), (String, SharedChain)>;

fn indexed(listener: &Listener) -> impl Iterator<Item = (Option<usize>, &FilterChain)> {
    let numbered = listener
        .chains
        .iter()
        .enumerate()
        .map(|(index, chain)| (Some(index), chain));
    numbered.chain(listener.default_chain.iter().map(|chain| (None, chain)))
}

fn leaf(chains: &Placed, listener: &Listener, index: Option<usize>) -> Tree {
    chains
        .get(&(listener.name.clone(), index))
        .map_or(Tree::Deny, |(name, _)| Tree::Chain(name.clone()))
}

/// A chain's name says where it comes from, and by its hash what it is: a changed chain is another chain, and connections of the
/// unchanged ones stay.
fn chain_name(
    listener: &Listener,
    chain: &FilterChain,
    pod: &Pod,
    content: &Content,
    identity: Option<&Identity>,
) -> String {
    let mut key = content.body.hash.0.to_vec();
    if let Some(identity) = identity {
        key.extend_from_slice(identity.spiffe().as_bytes());
    }
    let hash = Hash::of(&key).version();
    match identity {
        Some(_) if !chain.stateful => format!("{}/{}@{hash}", listener.name, chain.name),
        _ => format!("{}/{}/{}@{hash}", pod.key(), listener.name, chain.name),
    }
}

/// Programs with equal trees, together.
pub(super) fn group<'a>(
    programs: &'a [Program],
    of: impl Fn(&'a Program) -> &'a Tree,
) -> Vec<(Vec<&'a Program>, &'a Tree)> {
    let mut groups: Vec<(Vec<&Program>, &Tree)> = Vec::new();
    for program in programs {
        let tree = of(program);
        match groups.iter_mut().find(|(_, known)| *known == tree) {
            Some((members, _)) => members.push(program),
            None => groups.push((vec![program], tree)),
        }
    }
    groups
}
