//! [`Made`]: what a compilation made of each resource, for the next one to take over where nothing that went into it is another.
//!
//! A mesh changes a few endpoints at a time, and has thousands of resources. What is the same goes on as the same object.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;

use super::model::{Cluster, Listener};
use super::resource::Item;
use crate::route::RouteTable;

/// What one compilation made.
#[derive(Debug, Default)]
pub(super) struct Made {
    /// Clusters by name.
    pub(super) clusters: Kept<String, Cluster>,
    /// Names of the clusters in their order.
    pub(super) order: Vec<String>,
    /// Listeners by name. They point to clusters by index: of the same [`Self::order`] only.
    pub(super) listeners: Kept<String, Listener>,
    /// Route configurations from RDS by file and name; likewise.
    pub(super) tables: Kept<(String, String), RouteTable>,
}

/// Things with the resources that each was made of.
#[derive(Debug)]
pub(super) struct Kept<K, T>(HashMap<K, (Vec<Arc<Item>>, Arc<T>)>);

impl<K, T> Default for Kept<K, T> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<K: Hash + Eq, T> Kept<K, T> {
    /// What was made of these very resources.
    pub(super) fn of(&self, key: &K, parts: &[Arc<Item>]) -> Option<Arc<T>> {
        let (old, made) = self.0.get(key)?;
        let same = old.len() == parts.len() && old.iter().zip(parts).all(|(a, b)| Arc::ptr_eq(a, b));
        same.then(|| Arc::clone(made))
    }

    /// What was made under this key, and of what.
    pub(super) fn last(&self, key: &K) -> Option<(&[Arc<Item>], &Arc<T>)> {
        self.0.get(key).map(|(parts, made)| (parts.as_slice(), made))
    }

    pub(super) fn keep(&mut self, key: K, parts: Vec<Arc<Item>>, made: &Arc<T>) {
        self.0.insert(key, (parts, Arc::clone(made)));
    }
}
