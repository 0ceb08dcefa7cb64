//! What a proxy should have, as bytes with versions; and the difference between that and what it has.

use std::collections::BTreeMap;

use prost::Message as _;
use prost_types::Any;

use crate::discovery::ResourceType;
use crate::ir::Hash;

/// A resource to be served.
#[derive(Debug, Clone, PartialEq)]
pub struct Published {
    /// A hash of the bytes: equal version, equal resource.
    pub version: String,
    /// The message.
    pub resource: Any,
    /// Of a cluster: the name its endpoints go by, if it is another.
    pub endpoints: Option<String>,
}

/// What is read of an `envoy.config.cluster.v3.Cluster`.
#[derive(Clone, PartialEq, prost::Message)]
struct Cluster {
    #[prost(message, optional, tag = "3")]
    eds_cluster_config: Option<EdsClusterConfig>,
}

/// `EdsClusterConfig`.
#[derive(Clone, PartialEq, prost::Message)]
struct EdsClusterConfig {
    #[prost(string, tag = "2")]
    service_name: String,
}

fn endpoints(bytes: &[u8]) -> Option<String> {
    let eds = Cluster::decode(bytes).ok()?.eds_cluster_config?;
    Some(eds.service_name).filter(|name| !name.is_empty())
}

/// All resources that one proxy should have. Cloning one in an `Arc` is how it travels.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Snapshot {
    resources: BTreeMap<ResourceType, BTreeMap<String, Published>>,
}

impl Snapshot {
    /// Adds or replaces a resource by its encoded message.
    pub fn insert(&mut self, kind: ResourceType, name: impl Into<String>, bytes: Vec<u8>) {
        let published = Published {
            version: Hash::of(&bytes).version(),
            endpoints: (kind == ResourceType::Cluster)
                .then(|| endpoints(&bytes))
                .flatten(),
            resource: Any {
                type_url: kind.url().to_owned(),
                value: bytes,
            },
        };
        self.resources
            .entry(kind)
            .or_default()
            .insert(name.into(), published);
    }

    /// A resource by its name.
    pub fn get(&self, kind: ResourceType, name: &str) -> Option<&Published> {
        self.resources.get(&kind)?.get(name)
    }

    /// Everything of a type, by name.
    pub fn of(&self, kind: ResourceType) -> impl Iterator<Item = (&String, &Published)> {
        self.resources.get(&kind).into_iter().flatten()
    }

    /// How many resources there are.
    pub fn len(&self) -> usize {
        self.resources.values().map(BTreeMap::len).sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Octets of all messages together.
    pub fn octets(&self) -> usize {
        self.resources
            .values()
            .flat_map(BTreeMap::values)
            .map(|p| p.resource.value.len())
            .sum()
    }
}

/// One step of a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step<'a> {
    /// Add or replace.
    Put(ResourceType, &'a str),
    /// Remove, once everything before has been taken.
    Remove(ResourceType, &'a str),
}

/// The order in which types lose resources: what refers goes before what is referred to.
pub const REMOVAL: [ResourceType; 7] = [
    ResourceType::Listener,
    ResourceType::Route,
    ResourceType::Extension,
    ResourceType::Cluster,
    ResourceType::Endpoints,
    ResourceType::Binding,
    ResourceType::Peer,
];

/// What turns `old` into `new`, add before remove: clusters and endpoints first, then listeners and routes, then removals the other
/// way round. At no point does a resource refer to one that is not there, if that holds in both.
pub fn diff<'a>(old: &'a Snapshot, new: &'a Snapshot) -> Vec<Step<'a>> {
    let mut steps = Vec::new();
    for kind in ResourceType::ALL {
        for (name, published) in new.of(kind) {
            if old
                .get(kind, name)
                .is_none_or(|had| had.version != published.version)
            {
                steps.push(Step::Put(kind, name));
            }
        }
    }
    for kind in REMOVAL {
        let gone = old.of(kind).filter(|(name, _)| new.get(kind, name).is_none());
        steps.extend(gone.map(|(name, _)| Step::Remove(kind, name)));
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::*;
    use ResourceType::{Cluster, Listener};

    fn snapshot(resources: &[(ResourceType, &str, &str)]) -> Snapshot {
        let mut snapshot = Snapshot::default();
        for (kind, name, body) in resources {
            snapshot.insert(*kind, *name, body.as_bytes().to_vec());
        }
        snapshot
    }

    #[test]
    fn a_cluster_says_under_which_name_its_endpoints_go() {
        let descriptor = |name| crate::schema::message(name).unwrap();
        let cluster = descriptor("envoy.config.cluster.v3.Cluster");
        assert_eq!(
            cluster.get_field_by_name("eds_cluster_config").unwrap().number(),
            3
        );
        let eds = descriptor("envoy.config.cluster.v3.Cluster.EdsClusterConfig");
        assert_eq!(eds.get_field_by_name("service_name").unwrap().number(), 2);
        let bytes = super::Cluster {
            eds_cluster_config: Some(EdsClusterConfig {
                service_name: "s".into(),
            }),
        }
        .encode_to_vec();
        let mut snapshot = Snapshot::default();
        snapshot.insert(Cluster, "c", bytes);
        assert_eq!(
            snapshot.get(Cluster, "c").unwrap().endpoints.as_deref(),
            Some("s")
        );
        snapshot.insert(Cluster, "c", b"\xff".to_vec());
        assert_eq!(snapshot.get(Cluster, "c").unwrap().endpoints, None);
    }

    #[test]
    fn additions_come_before_what_refers_to_them_and_removals_after() {
        let old = snapshot(&[
            (Listener, "l", "to a"),
            (Cluster, "a", "1"),
            (Listener, "gone", "to a"),
        ]);
        let new = snapshot(&[(Listener, "l", "to b"), (Cluster, "b", "1")]);
        assert_eq!(
            diff(&old, &new),
            [
                Step::Put(Cluster, "b"),
                Step::Put(Listener, "l"),
                Step::Remove(Listener, "gone"),
                Step::Remove(Cluster, "a"),
            ]
        );
        assert_eq!(diff(&new, &new), []);
    }
}
