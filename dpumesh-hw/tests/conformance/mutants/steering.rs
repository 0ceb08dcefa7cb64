//! Bugs of rules.

use std::sync::atomic::Ordering;

use async_trait::async_trait;
use dpumesh_core::steering::{
    Atomicity, Batch, BatchOutcome, Change, Cookie, Counters, InstalledRule, MissPolicy, Occupancy,
    Operation, Owner, Placement, Priority, SteeringRule, Undone, Verdict,
};
use dpumesh_core::{Error, ErrorKind, Fence, FlowSteering, FlowSteeringExt, PortRef, Result};

use super::mutant::{Bug, Part};

/// With two levels, 0 becomes 1 and 1 becomes 0.
fn inverted(rule: &SteeringRule) -> SteeringRule {
    SteeringRule {
        priority: Priority(rule.priority.0 ^ 1),
        ..rule.clone()
    }
}

#[async_trait]
impl FlowSteering for Part {
    async fn validate(&self, rules: &[SteeringRule]) -> Result<Vec<Verdict>> {
        if self.has(Bug::PromisesHardware) {
            return Ok(vec![Verdict::Hardware; rules.len()]);
        }
        if self.has(Bug::InstallsWhatItValidates) {
            for rule in rules {
                let _ = self
                    .inner_steering()
                    .add(Fence(self.inner.epoch()), rule.clone())
                    .await;
            }
        }
        self.inner_steering().validate(rules).await
    }

    async fn apply(&self, fence: Fence, batch: &Batch) -> Result<BatchOutcome> {
        let (fence, mut batch) = (self.fence(fence), batch.clone());
        match self.bug {
            Bug::ReordersABatch => batch.operations.reverse(),
            Bug::InvertsPriorities => {
                for operation in &mut batch.operations {
                    if let Operation::Add(rule) = operation {
                        *rule = inverted(rule);
                    }
                }
            }
            Bug::RollsBackInWordsOnly | Bug::TakesAnyAtomicity => batch.atomicity = Atomicity::Continue,
            Bug::StopsAtTheFirstFailure => return self.stop_at_failure(fence, &batch).await,
            _ => {}
        }
        let mut outcome = self.inner_steering().apply(fence, &batch).await?;
        for (operation, result) in batch.operations.iter().zip(&mut outcome.results) {
            self.spoil(fence, operation, result).await?;
        }
        if self.has(Bug::RollsBackInWordsOnly) && outcome.results.iter().any(Result::is_err) {
            for result in outcome.results.iter_mut().filter(|result| result.is_ok()) {
                *result = Ok(Change::Skipped);
            }
            outcome = outcome.undone(Undone::All);
        }
        Ok(outcome)
    }

    async fn list(&self, owner: Owner) -> Result<Vec<InstalledRule>> {
        let mut rules = self.inner_steering().list(owner).await?;
        match self.bug {
            Bug::ListsEverybodysRules => {
                rules = self.inner_steering().list(Owner::Agent).await?;
                rules.extend(self.inner_steering().list(Owner::User(7)).await?);
            }
            Bug::ListsInReverse => rules.reverse(),
            Bug::InvertsPriorities => {
                for installed in &mut rules {
                    installed.rule = inverted(&installed.rule);
                }
            }
            _ => {}
        }
        Ok(rules)
    }

    async fn counters(&self, owner: Owner, cookies: &[Cookie]) -> Result<Vec<Option<Counters>>> {
        let mut all = self.inner_steering().counters(owner, cookies).await?;
        match self.bug {
            Bug::SkipsCountersItLacks => all.retain(Option::is_some),
            Bug::CountsBackwards => {
                let call = self.calls.fetch_add(1, Ordering::Relaxed);
                for counters in all.iter_mut().flatten() {
                    counters.packets = 100_u64.saturating_sub(call);
                }
            }
            Bug::CountsFcsToo => {
                for counters in all.iter_mut().flatten() {
                    counters.octets += 4 * counters.packets;
                }
            }
            _ => {}
        }
        Ok(all)
    }

    async fn flush(&self, fence: Fence, owner: Owner) -> Result<u64> {
        let fence = self.fence(fence);
        if self.has(Bug::FlushesEverybodysRules) {
            self.inner_steering().flush(fence, Owner::User(7)).await?;
        }
        self.inner_steering().flush(fence, owner).await
    }

    async fn set_miss_policy(&self, fence: Fence, port: PortRef, policy: MissPolicy) -> Result<()> {
        let policy = match self.bug {
            Bug::LeavesMissesOpen => MissPolicy::Software,
            _ => policy,
        };
        self.inner_steering()
            .set_miss_policy(self.fence(fence), port, policy)
            .await
    }

    async fn occupancy(&self) -> Result<Vec<Occupancy>> {
        self.inner_steering().occupancy().await
    }
}

impl Part {
    async fn stop_at_failure(&self, fence: Fence, batch: &Batch) -> Result<BatchOutcome> {
        let mut results = Vec::new();
        let mut failed = false;
        for operation in &batch.operations {
            if failed {
                results.push(Ok(Change::Skipped));
                continue;
            }
            let single = Batch::new(vec![operation.clone()]);
            results.extend(self.inner_steering().apply(fence, &single).await?.results);
            failed = results.iter().any(Result::is_err);
        }
        Ok(BatchOutcome::new(results))
    }

    /// What a bug makes of one operation's result.
    async fn spoil(&self, fence: Fence, operation: &Operation, result: &mut Result<Change>) -> Result<()> {
        let failed = result.as_ref().err().map(|error| error.kind);
        match (self.bug, operation, failed) {
            (Bug::CallsAnEqualRuleExisting, _, None) if matches!(result, Ok(Change::Present(_))) => {
                *result = Err(Error::new(ErrorKind::Exists, "steering.apply", "it is there"));
            }
            (Bug::ReplacesAnExistingCookie, Operation::Add(rule), Some(ErrorKind::Exists)) => {
                self.inner_steering()
                    .remove(fence, rule.owner, rule.cookie)
                    .await?;
                *result = self.inner_steering().add(fence, rule.clone()).await;
            }
            (Bug::LosesFinalCounters, _, None) if matches!(result, Ok(Change::Removed(_))) => {
                *result = Ok(Change::Removed(None));
            }
            (Bug::RemovesForAnybody, Operation::Remove { cookie, .. }, Some(ErrorKind::NotFound)) => {
                *result = self.inner_steering().remove(fence, Owner::User(7), *cookie).await;
            }
            (Bug::NamesNoField, _, Some(ErrorKind::Invalid)) => {
                *result = Err(Error::new(ErrorKind::Invalid, "steering.apply", "no"));
            }
            (Bug::ForgetsThatItIsFull, Operation::Add(_), Some(ErrorKind::CapacityExceeded)) => {
                *result = Ok(Change::Added(Placement::Hardware));
            }
            _ => {}
        }
        Ok(())
    }
}
