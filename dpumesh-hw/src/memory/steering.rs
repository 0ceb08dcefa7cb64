//! [`FlowSteering`]: a [`RuleStore`](crate::steering::RuleStore) behind the card's lock. The eswitch reads it directly, so
//! a plan's changes act as soon as the lock is free, and every batch is atomic.

use std::sync::Arc;

use async_trait::async_trait;
use dpumesh_core::steering::{
    Atomicity, Batch, BatchOutcome, Cookie, Counters, InstalledRule, MissPolicy, Occupancy, Operation, Owner,
    SteeringRule, Verdict,
};
use dpumesh_core::{Effect, ErrorKind, Fence, FlowSteering, PortRef, Result};

use super::device::{Card, State, error};

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
        let outcome = match state.trouble.changes_left {
            None => state.rules.apply(batch, self.0.now_ms())?.outcome,
            Some(left) => state.apply_some(batch, left, self.0.now_ms())?,
        };
        self.0.look_at_marks(&mut state);
        drop(state);
        self.0.timers_changed();
        Ok(outcome)
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
        let removed = match state.trouble.changes_left {
            None => Ok(state.rules.flush(owner, self.0.now_ms()).len()),
            Some(left) => state.flush_some(owner, left, self.0.now_ms()),
        };
        self.0.look_at_marks(&mut state);
        removed.map(|count| count as u64)
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

/// What is left of the table's work while [`super::MemoryCard::fail_rules`] is in force.
impl State {
    fn apply_some(&mut self, batch: &Batch, left: usize, now_ms: u64) -> Result<BatchOutcome> {
        let fails =
            |index| error(ErrorKind::Io, "steering.apply", "the table takes no more changes").index(index);
        let count = batch.operations.len();
        if count > left && batch.atomicity != Atomicity::Continue {
            return Err(fails(left));
        }
        let worked = Batch {
            operations: batch.operations.iter().take(left).cloned().collect(),
            ..*batch
        };
        let mut outcome = self.rules.apply(&worked, now_ms)?.outcome;
        self.trouble.changes_left = Some(left.saturating_sub(count));
        // A device without a status for each operation only says how many it did.
        let tells_each = self.capabilities.steering.per_operation_status;
        outcome.results.extend((left..count).map(|index| {
            let effect = if tells_each || index == left {
                Effect::None
            } else {
                Effect::Unknown
            };
            Err(fails(index).effect(effect))
        }));
        Ok(outcome)
    }

    fn flush_some(&mut self, owner: Owner, left: usize, now_ms: u64) -> Result<usize> {
        let rules = self.rules.list(owner);
        self.trouble.changes_left = Some(left.saturating_sub(rules.len()));
        if rules.len() <= left {
            return Ok(self.rules.flush(owner, now_ms).len());
        }
        for installed in rules.iter().take(left) {
            let cookie = installed.rule.cookie;
            let removal = Batch::new(vec![Operation::Remove { owner, cookie }]);
            self.rules.apply(&removal, now_ms)?.outcome.into_result()?;
        }
        let message = format!("{left} of {} rules were removed", rules.len());
        let effect = if left > 0 { Effect::Partial } else { Effect::None };
        Err(error(ErrorKind::Io, "steering.flush", message).effect(effect))
    }
}
