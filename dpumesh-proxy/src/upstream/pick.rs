//! A request's endpoint: picked, counted as load, and told of what came of it.

use std::rc::Rc;
use std::sync::Arc;

use super::{EndpointLane, Lane};
use crate::balance::Ask;
use crate::balance::subset::Found;
use crate::config::model::Balance;
use crate::health::outlier::Outcome;
use crate::health::{Health, Report, What};
use crate::stats::Cluster as Stat;

/// An endpoint picked for one request; counts as load until dropped.
#[derive(Debug)]
pub struct Picked {
    /// The endpoint.
    pub endpoint: Rc<EndpointLane>,
    /// Its place among the cluster's; an original destination has none.
    index: Option<usize>,
}

impl Drop for Picked {
    fn drop(&mut self) {
        self.endpoint
            .active
            .set(self.endpoint.active.get().saturating_sub(1));
    }
}

impl Lane {
    /// Picks an endpoint. `None` when there is none that takes requests.
    pub fn pick(&self, ask: &Ask<'_>) -> Option<Picked> {
        let (endpoint, index) = if self.cluster.spread.balance == Balance::Provided {
            (self.original(ask.original), None)
        } else {
            let busy = |at: usize| self.endpoints.get(at).map_or(0, |e| e.active.get());
            let pick = self.held.borrow_mut().pick(&self.cluster.picker, ask, busy)?;
            if pick.panics {
                self.cluster.stats.inc(self.shard, Stat::LbHealthyPanic);
            }
            match pick.subset {
                Found::Selected => self.cluster.stats.inc(self.shard, Stat::LbSubsetsSelected),
                Found::Fallback => self.cluster.stats.inc(self.shard, Stat::LbSubsetsFallback),
                Found::Unasked | Found::SelectorFallback => {}
            }
            (Rc::clone(self.endpoints.get(pick.endpoint)?), Some(pick.endpoint))
        };
        endpoint.active.set(endpoint.active.get() + 1);
        Some(Picked { endpoint, index })
    }

    /// The priority of a picked endpoint.
    pub fn priority(&self, picked: &Picked) -> u32 {
        let endpoint = picked.index.and_then(|at| self.cluster.endpoints.get(at));
        let localities = &self.cluster.spread.localities;
        let locality = endpoint.and_then(|e| localities.get(e.locality as usize));
        locality.map_or(0, |l| l.priority)
    }

    /// Whether no priority but these has anything to serve by.
    pub fn has_tried_all(&self, tried: &[u32]) -> bool {
        let localities = &self.cluster.spread.localities;
        let endpoints = self.cluster.endpoints.iter();
        let serving = endpoints.filter(|e| e.health() != Health::Unhealthy);
        let mut priorities = serving.filter_map(|e| localities.get(e.locality as usize));
        priorities.all(|l| tried.contains(&l.priority))
    }

    /// Tells outlier detection what came of a request to an endpoint.
    pub fn note(&self, picked: &Picked, outcome: Outcome) {
        let Some((detection, _)) = &self.cluster.outlier else {
            return;
        };
        let Some(endpoint) = picked.index.and_then(|at| self.cluster.endpoints.get(at)) else {
            return;
        };
        detection.note(&endpoint.state.counts, outcome, |reason| {
            let report = Report {
                cluster: Arc::clone(&self.cluster),
                endpoint: endpoint.address,
                what: What::Consecutive(reason),
            };
            // The control thread is gone when this fails, and with it everybody who could judge.
            let _ = self.reports.send(report);
        });
    }
}
