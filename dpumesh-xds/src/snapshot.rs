//! What a proxy should have, as bytes with versions; and the difference between that and what it has.

use std::collections::BTreeMap;

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
