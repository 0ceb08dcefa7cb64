//! [`FlowSteering`]: a [`RuleStore`](crate::steering::RuleStore) behind the card's lock. The eswitch reads it directly, so
//! a plan's changes act as soon as the lock is free, and every batch is atomic.

use std::sync::Arc;

use async_trait::async_trait;
use dpumesh_core::steering::{
    Batch, BatchOutcome, Cookie, Counters, InstalledRule, MissPolicy, Occupancy, Owner, SteeringRule, Verdict,
};
use dpumesh_core::{ErrorKind, Fence, FlowSteering, PortRef, Result};

use super::device::{Card, error};

/// Rules of a card in memory.
#[derive(Debug)]
pub(super) struct MemorySteering(Arc<Card>);

impl MemorySteering {
    pub(super) fn new(card: Arc<Card>) -> Self {
        Self(card)
    }
}

#[async_trait]
impl FlowSteering for MemorySteering {
    async fn validate(&self, rules: &[SteeringRule]) -> Result<Vec<Verdict>> {
        let state = self.0.present("steering.validate")?;
        Ok(rules.iter().map(|rule| state.rules.judge(rule)).collect())
    }

    async fn apply(&self, fence: Fence, batch: &Batch) -> Result<BatchOutcome> {
        let mut state = self.0.fenced(fence, "steering.apply")?;
        self.0.age(&mut state);
        let plan = state.rules.apply(batch, self.0.now_ms())?;
        self.0.look_at_marks(&mut state);
        drop(state);
        self.0.timers_changed();
        Ok(plan.outcome)
    }

    async fn list(&self, owner: Owner) -> Result<Vec<InstalledRule>> {
        let mut state = self.0.present("steering.list")?;
        self.0.age(&mut state);
        Ok(state.rules.list(owner))
    }

    async fn counters(&self, owner: Owner, cookies: &[Cookie]) -> Result<Vec<Option<Counters>>> {
        let state = self.0.present("steering.counters")?;
        Ok(state.rules.counters(owner, cookies, self.0.now_ms()))
    }

    async fn flush(&self, fence: Fence, owner: Owner) -> Result<u64> {
        let mut state = self.0.fenced(fence, "steering.flush")?;
        let removed = state.rules.flush(owner, self.0.now_ms());
        self.0.look_at_marks(&mut state);
        Ok(removed.len() as u64)
    }

    async fn set_miss_policy(&self, fence: Fence, port: PortRef, policy: MissPolicy) -> Result<()> {
        const SET: &str = "steering.set_miss_policy";
        let mut state = self.0.fenced(fence, SET)?;
        if !state.ports.contains_key(&port) {
            return Err(error(ErrorKind::NotFound, SET, "there is no such port").object(port));
        }
        state.rules.set_miss_policy(port, policy);
        Ok(())
    }

    async fn occupancy(&self) -> Result<Vec<Occupancy>> {
        let mut state = self.0.present("steering.occupancy")?;
        self.0.age(&mut state);
        let mut all = state.rules.occupancy();
        all.extend(state.occupancy());
        Ok(all)
    }
}
