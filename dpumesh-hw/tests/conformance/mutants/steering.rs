//! Bugs of rules.

use std::sync::atomic::Ordering;

use async_trait::async_trait;
use dpumesh_core::steering::{
    Action, Atomicity, Batch, BatchOutcome, Change, Cookie, Counters, InstalledRule, MissPolicy, Occupancy,
    Operation, Owner, Placement, PlacementRequest, Priority, SteeringRule, Undone, Verdict,
};
use dpumesh_core::{Effect, Error, ErrorKind, Fence, FlowSteering, FlowSteeringExt, PortRef, Result};

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
            Bug::SplitsAtomicBatches | Bug::RemovesBeforeItAdds => {
                return self.one_by_one(fence, &batch).await;
            }
            Bug::SaysHardwareAndDoesNothing => return self.nothing_in_hardware(fence, &batch).await,
            Bug::SaysHardwareAndUsesSoftware | Bug::ForgetsMarks => {
                for operation in &mut batch.operations {
                    if let Operation::Add(rule) = operation {
                        *rule = self.weaker(rule);
                    }
                }
            }
            Bug::SaysUndoneWhatWasDone => batch.atomicity = Atomicity::Continue,
            _ => {}
        }
        let mut outcome = self.inner_steering().apply(fence, &batch).await?;
        for (operation, result) in batch.operations.iter().zip(&mut outcome.results) {
            self.spoil(fence, operation, result).await?;
        }
        let failed = outcome.results.iter().any(Result::is_err);
        if self.has(Bug::SaysUndoneWhatWasDone) && failed {
            outcome = outcome.undone(Undone::All);
        }
        if self.has(Bug::ListsTheFormerLife) {
            self.remember(&batch);
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
            Bug::ListsAnotherPlace => {
                for installed in &mut rules {
                    installed.placement = Placement::Software("it is slow today".to_owned());
                }
            }
            Bug::SaysHardwareAndUsesSoftware => {
                for installed in &mut rules {
                    installed.placement = Placement::Hardware;
                }
            }
            Bug::SaysHardwareAndDoesNothing | Bug::ListsTheFormerLife => {
                let remembered = self.rules.lock().expect("no panic under the lock").clone();
                let missing = remembered
                    .into_iter()
                    .filter(|rule| rule.owner == owner)
                    .filter(|rule| rules.iter().all(|each| each.rule.cookie != rule.cookie))
                    .collect::<Vec<_>>();
                let missing = missing
                    .into_iter()
                    .map(|rule| InstalledRule::new(rule, Placement::Hardware));
                rules.extend(missing);
                rules.sort_by_key(|each| (each.rule.group, each.rule.priority, each.rule.cookie));
            }
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
            Bug::CountsNothingInHardware => {
                for counters in all.iter_mut().flatten() {
                    (counters.packets, counters.octets) = (0, 0);
                }
            }
            Bug::ServesOldCounters => {
                let call = self.calls.fetch_add(1, Ordering::Relaxed);
                let mut kept = self.counters.lock().expect("no panic under the lock");
                for (cookie, counters) in cookies.iter().zip(&mut all) {
                    let Some(counters) = counters else { continue };
                    if call.is_multiple_of(2) {
                        kept.insert(*cookie, *counters);
                    }
                    *counters = kept.get(cookie).copied().unwrap_or(*counters);
                }
            }
            Bug::CarriesCountersOver => {
                let mut kept = self.counters.lock().expect("no panic under the lock");
                for (cookie, counters) in cookies.iter().zip(&mut all) {
                    let Some(counters) = counters else { continue };
                    let former = kept.entry(*cookie).or_insert(*counters);
                    if former.epoch == counters.epoch {
                        *former = *counters;
                    } else {
                        counters.packets += former.packets;
                    }
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
        match self.inner_steering().flush(fence, owner).await {
            Err(_) if self.has(Bug::HidesAFailedFlush) => Ok(5),
            answer => answer,
        }
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

    /// Each operation alone, with time for frames in between.
    async fn one_by_one(&self, fence: Fence, batch: &Batch) -> Result<BatchOutcome> {
        let mut order: Vec<usize> = (0..batch.operations.len()).collect();
        if self.has(Bug::RemovesBeforeItAdds) {
            order.reverse();
        }
        let mut results: Vec<Result<Change>> = vec![Ok(Change::Skipped); order.len()];
        for index in order {
            let single = Batch::new(vec![batch.operations[index].clone()]);
            let done = self.inner_steering().apply(fence, &single).await?.results;
            results[index] = done.into_iter().next().expect("one operation, one result");
            tokio::task::yield_now().await;
        }
        Ok(BatchOutcome::new(results))
    }

    /// Installs nothing that has to be in hardware, and says it did.
    async fn nothing_in_hardware(&self, fence: Fence, batch: &Batch) -> Result<BatchOutcome> {
        let mut results = Vec::new();
        for operation in &batch.operations {
            match operation {
                Operation::Add(rule) if rule.placement == PlacementRequest::Hardware => {
                    self.rules
                        .lock()
                        .expect("no panic under the lock")
                        .push(rule.clone());
                    results.push(Ok(Change::Added(Placement::Hardware)));
                }
                operation => {
                    let single = Batch::new(vec![operation.clone()]);
                    results.extend(self.inner_steering().apply(fence, &single).await?.results);
                }
            }
        }
        Ok(BatchOutcome::new(results))
    }

    /// The rule as it is really installed.
    fn weaker(&self, rule: &SteeringRule) -> SteeringRule {
        let mut rule = rule.clone();
        match self.bug {
            Bug::ForgetsMarks => rule.actions.retain(|action| !matches!(action, Action::Mark(_))),
            _ => rule.placement = PlacementRequest::Software,
        }
        rule
    }

    fn remember(&self, batch: &Batch) {
        let mut rules = self.rules.lock().expect("no panic under the lock");
        for operation in &batch.operations {
            match operation {
                Operation::Add(rule) => rules.push(rule.clone()),
                Operation::Remove { cookie, .. } => rules.retain(|rule| rule.cookie != *cookie),
            }
        }
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
            (Bug::SaysHardwareAndUsesSoftware, _, None) if matches!(result, Ok(Change::Added(_))) => {
                *result = Ok(Change::Added(Placement::Hardware));
            }
            (Bug::SaysDoneWhatFailed, Operation::Add(_), Some(ErrorKind::Io)) => {
                *result = Ok(Change::Added(Placement::Hardware));
            }
            (Bug::MarksEveryFailureUnknown, _, Some(ErrorKind::Io)) => {
                *result = result.clone().map_err(|error| error.effect(Effect::Unknown));
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
