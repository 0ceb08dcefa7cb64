//! How many requests a cluster works at.

use super::Lane;
use crate::stats::Cluster as Stat;

/// Counts a request as active in its cluster.
#[derive(Debug)]
pub(crate) struct Active<'a>(&'a Lane);

impl<'a> Active<'a> {
    pub(crate) fn new(lane: &'a Lane) -> Self {
        lane.cluster.stats.inc(lane.shard, Stat::RqActive);
        Self(lane)
    }
}

impl Drop for Active<'_> {
    fn drop(&mut self) {
        self.0.cluster.stats.dec(self.0.shard, Stat::RqActive);
    }
}

impl Lane {
    /// Whether the cluster takes no further request.
    pub(crate) fn is_full(&self) -> bool {
        self.cluster.stats.get(Stat::RqActive) >= u64::from(self.cluster.limits.max_requests)
    }
}
