//! Checks of [`FlowSteering`].

use async_trait::async_trait;
use dpumesh_core::steering::{
    Atomicity, Batch, BatchOutcome, Change, Cookie, Counters, InstalledRule, MissPolicy, Occupancy,
    Operation, Owner, Placement, PlacementRequest, SteeringRule, Undone, Verdict,
};
use dpumesh_core::{BackendExt, Effect, Error, Fence, FlowSteering, PortRef, Result, SteeringCapabilities};

use super::{Checked, Look};

#[async_trait]
impl FlowSteering for Checked {
    async fn validate(&self, rules: &[SteeringRule]) -> Result<Vec<Verdict>> {
        let look = self.reading("steering.validate");
        let limits = self.inner.capabilities().steering;
        let verdicts = look.general(self.inner.require_steering()?.validate(rules).await)?;
        look.count("verdicts", rules.len(), verdicts.len())?;
        for (index, (rule, verdict)) in rules.iter().zip(&verdicts).enumerate() {
            if let Some(breach) = verdict_breach(rule, verdict, &limits) {
                return Err(look.breach(breach).object("rules").index(index));
            }
        }
        Ok(verdicts)
    }

    async fn apply(&self, fence: Fence, batch: &Batch) -> Result<BatchOutcome> {
        let look = self.fenced("steering.apply", fence);
        let limits = self.inner.capabilities().steering;
        let mut outcome = look.general(self.inner.require_steering()?.apply(fence, batch).await)?;
        check_whole(&look, batch, &limits)?;
        look.count("results", batch.operations.len(), outcome.results.len())?;
        check_undone(&look, batch, &outcome)?;
        let operations = batch.operations.iter().enumerate();
        for ((index, operation), result) in operations.zip(&mut outcome.results) {
            check_result(&look, batch.atomicity, index, operation, result);
        }
        Ok(outcome)
    }

    async fn list(&self, owner: Owner) -> Result<Vec<InstalledRule>> {
        let look = self.reading("steering.list");
        let rules = look.general(self.inner.require_steering()?.list(owner).await)?;
        for installed in &rules {
            look.hold(installed.rule.owner == owner, || {
                format!("rule {} belongs to another owner", installed.rule.cookie)
            })?;
        }
        let keys = rules
            .iter()
            .map(|i| (i.rule.group, i.rule.priority, i.rule.cookie));
        look.ascending(keys)?;
        Ok(rules)
    }

    async fn counters(&self, owner: Owner, cookies: &[Cookie]) -> Result<Vec<Option<Counters>>> {
        let look = self.reading("steering.counters");
        let counters = look.general(self.inner.require_steering()?.counters(owner, cookies).await)?;
        look.count("counters", cookies.len(), counters.len())?;
        let now = self.inner.epoch();
        for counters in counters.iter().flatten() {
            look.hold(
                counters.epoch <= now,
                || "a counter began in a life that has not come",
            )?;
        }
        Ok(counters)
    }

    async fn flush(&self, fence: Fence, owner: Owner) -> Result<u64> {
        let look = self.fenced("steering.flush", fence);
        look.general(self.inner.require_steering()?.flush(fence, owner).await)
    }

    async fn set_miss_policy(&self, fence: Fence, port: PortRef, policy: MissPolicy) -> Result<()> {
        let look = self.fenced("steering.set_miss_policy", fence);
        let steering = self.inner.require_steering()?;
        look.general(steering.set_miss_policy(fence, port, policy).await)
    }

    async fn occupancy(&self) -> Result<Vec<Occupancy>> {
        let look = self.reading("steering.occupancy");
        let occupancy = look.general(self.inner.require_steering()?.occupancy().await)?;
        for resource in &occupancy {
            look.hold(resource.used <= resource.limit, || {
                format!(
                    "{} of {} in use at {}",
                    resource.used, resource.limit, resource.resource
                )
            })?;
        }
        Ok(occupancy)
    }
}

fn verdict_breach(
    rule: &SteeringRule,
    verdict: &Verdict,
    limits: &SteeringCapabilities,
) -> Option<&'static str> {
    if let Verdict::No { field, reason } = verdict {
        return (field.is_empty() || reason.is_empty()).then_some("a refusal must name field and reason");
    }
    if rule.check().is_err() {
        return Some("a rule without sense was judged possible");
    }
    if rule.group.0 >= limits.groups || rule.priority.0 >= limits.priorities {
        return Some("a rule beyond groups or priorities was judged possible");
    }
    match (verdict, rule.placement) {
        (Verdict::Hardware | Verdict::Partial(_), PlacementRequest::Software) => {
            Some("a rule for software was judged to be hardware's")
        }
        (Verdict::Software(_) | Verdict::Partial(_), PlacementRequest::Hardware) => {
            Some("a rule for hardware was judged to be software's")
        }
        (Verdict::Hardware, _) if limits.hardware_rules == 0 => {
            Some("a rule was judged to be hardware's, which holds none")
        }
        (Verdict::Software(_), _) if !limits.software_fallback => {
            Some("a rule was judged to be software's, which is not on offer")
        }
        _ => None,
    }
}

fn check_whole(look: &Look<'_>, batch: &Batch, limits: &SteeringCapabilities) -> Result<()> {
    let length = batch.operations.len();
    look.hold(length as u64 <= limits.batch_max.into(), || {
        format!(
            "{length} operations were taken where {} are most",
            limits.batch_max
        )
    })?;
    let offered = batch.atomicity == Atomicity::Continue || limits.atomicity.contains(&batch.atomicity);
    look.hold(offered, || {
        format!("a {:?} batch was taken, which is not on offer", batch.atomicity)
    })
}

fn check_undone(look: &Look<'_>, batch: &Batch, outcome: &BatchOutcome) -> Result<()> {
    let failed = outcome.results.iter().any(Result::is_err);
    let must_undo = failed && batch.atomicity != Atomicity::Continue;
    look.hold(must_undo == (outcome.undone != Undone::No), || {
        format!(
            "undone is {:?} after a {:?} batch that {}",
            outcome.undone,
            batch.atomicity,
            if failed { "failed" } else { "did not fail" }
        )
    })?;
    let changed = |result: &Result<Change>| matches!(result, Ok(Change::Added(_) | Change::Removed(_)));
    let kept = outcome.undone == Undone::All && outcome.results.iter().any(changed);
    look.hold(
        !kept,
        || "a change is reported as done in a batch that was undone",
    )
}

/// Replaces a result that breaks the contract.
fn check_result(
    look: &Look<'_>,
    atomicity: Atomicity,
    index: usize,
    operation: &Operation,
    result: &mut Result<Change>,
) {
    let checked = match std::mem::replace(result, Ok(Change::Skipped)) {
        Err(error) => Err(look.check_error(error)),
        Ok(change) => match change_breach(atomicity, operation, &change) {
            None => Ok(change),
            Some(breach) => Err(fault(look, &change, breach)),
        },
    };
    *result = checked.map_err(|error| error.index(index));
}

fn fault(look: &Look<'_>, change: &Change, breach: &'static str) -> Error {
    look.breach(breach).effect(match change {
        Change::Added(_) | Change::Removed(_) => Effect::Applied,
        _ => Effect::Unknown,
    })
}

fn change_breach(atomicity: Atomicity, operation: &Operation, change: &Change) -> Option<&'static str> {
    match (operation, change) {
        (_, Change::Skipped) => (atomicity == Atomicity::Continue)
            .then_some("an operation of a batch that carries on was skipped"),
        (Operation::Add(rule), Change::Added(place) | Change::Present(place)) => {
            if rule.check().is_err() {
                return Some("a rule without sense was installed");
            }
            match (place, rule.placement) {
                (Placement::Hardware | Placement::Partial(_), PlacementRequest::Software) => {
                    Some("a rule for software was put into hardware")
                }
                (Placement::Software(_) | Placement::Partial(_), PlacementRequest::Hardware) => {
                    Some("a rule for hardware was put into software")
                }
                _ => None,
            }
        }
        (Operation::Remove { .. }, Change::Removed(_) | Change::Absent) => None,
        _ => Some("the result is not one of this operation"),
    }
}
