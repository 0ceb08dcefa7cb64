//! Rules as objects: identity, owners, order and batches of [`dpumesh_core::FlowSteering`]. What frames make of them is
//! in `traffic`, whether the claimed limits hold in `limits`.

use std::collections::BTreeSet;
use std::sync::Arc;

use dpumesh_core::steering::{
    Action, Atomicity, Batch, BatchOutcome, Change, Cookie, Group, InstalledRule, MissPolicy, Operation,
    Pattern, Placement, PlacementRequest, Priority, SteeringRule, Undone, Verdict,
};
use dpumesh_core::{
    ActionKinds, Backend, BackendExt, Effect, Epoch, ErrorKind, Fence, FlowSteering, FlowSteeringExt,
};

use super::Rig;
use super::check::{CaseResult, Halt, cancelled, ensure, ensure_eq, refused};
use super::sample::{MINE, NO_PORT, Sampler, THEIRS};

/// The SoC's half with its steering part at hand.
pub(super) struct Soc {
    pub(super) backend: Arc<dyn Backend>,
}

impl Soc {
    pub(super) fn of(rig: &dyn Rig) -> Self {
        Self { backend: rig.soc() }
    }

    pub(super) fn steering(&self) -> Result<&dyn FlowSteering, Halt> {
        Ok(self.backend.require_steering()?)
    }

    pub(super) fn fence(&self) -> Fence {
        self.backend.fence()
    }

    pub(super) async fn add(&self, rule: SteeringRule) -> Result<Change, Halt> {
        Ok(self.steering()?.add(self.fence(), rule).await?)
    }

    pub(super) async fn remove(&self, cookie: Cookie) -> Result<Change, Halt> {
        Ok(self.steering()?.remove(self.fence(), MINE, cookie).await?)
    }

    pub(super) async fn batch(
        &self,
        operations: Vec<Operation>,
        atomicity: Atomicity,
    ) -> Result<BatchOutcome, Halt> {
        let batch = Batch::new(operations).with(atomicity);
        let outcome = self.steering()?.apply(self.fence(), &batch).await?;
        ensure_eq!(
            outcome.results.len(),
            batch.operations.len(),
            "results for so many operations"
        );
        Ok(outcome)
    }

    pub(super) async fn mine(&self) -> Result<Vec<InstalledRule>, Halt> {
        Ok(self.steering()?.list(MINE).await?)
    }

    pub(super) async fn cookies(&self) -> Result<Vec<u128>, Halt> {
        Ok(self.mine().await?.iter().map(|each| each.rule.cookie.0).collect())
    }
}

pub(super) fn add(rule: SteeringRule) -> Operation {
    Operation::Add(rule)
}

fn remove(cookie: u128) -> Operation {
    Operation::Remove {
        owner: MINE,
        cookie: Cookie(cookie),
    }
}

fn is_added(change: &Change) -> bool {
    matches!(change, Change::Added(_))
}

/// Refuses the operation that a batch reports at an index, which has to be of this kind.
#[track_caller]
fn failed_at(outcome: &BatchOutcome, index: usize, kind: ErrorKind) -> CaseResult {
    let error = match &outcome.results[index] {
        Ok(change) => {
            return Err(Halt::failed(format!(
                "operation {index} ended as {change:?}, expected {kind:?}"
            )));
        }
        Err(error) => error,
    };
    if error.kind != kind {
        return Err(Halt::failed(format!(
            "operation {index} failed as {:?}, expected {kind:?}: {error}",
            error.kind
        )));
    }
    let said = error.object.as_ref().and_then(|object| object.index);
    if said.is_some_and(|said| said != index) {
        return Err(Halt::failed(format!(
            "the error of operation {index} names index {said:?}"
        )));
    }
    Ok(())
}

pub(super) async fn adding_an_equal_rule_again_is_present(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    let Change::Added(placement) = soc.add(sample.rule(1)).await? else {
        return Err(Halt::failed("adding a new rule is not `Added`"));
    };
    ensure_eq!(
        soc.add(sample.rule(1)).await?,
        Change::Present(placement),
        "adding it again"
    );
    ensure_eq!(soc.cookies().await?, vec![1], "cookies listed");
    Ok(())
}

pub(super) async fn a_different_rule_of_the_same_cookie_exists(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    soc.add(sample.rule(1)).await?;
    let mut other = sample.rule(2);
    other.cookie = Cookie(1);
    let answer = soc.steering()?.add(soc.fence(), other).await;
    refused(answer, "steering.apply", ErrorKind::Exists)?;
    let listed = soc.mine().await?;
    ensure_eq!(listed.len(), 1, "rules listed");
    ensure_eq!(listed[0].rule, sample.rule(1), "the rule that stays");
    Ok(())
}

pub(super) async fn a_cookie_is_unique_on_the_card(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    soc.add(sample.their_rule(1)).await?;
    let answer = soc.steering()?.add(soc.fence(), sample.rule(1)).await;
    refused(answer, "steering.apply", ErrorKind::Exists)?;
    ensure!(soc.mine().await?.is_empty(), "the refused rule is listed");
    ensure_eq!(
        soc.steering()?.list(THEIRS).await?.len(),
        1,
        "the other owner's rules"
    );
    Ok(())
}

pub(super) async fn an_overlap_of_equal_priority_conflicts(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    soc.add(sample.rule(1)).await?;
    let second = SteeringRule {
        cookie: Cookie(2),
        actions: sample.other_actions()?,
        ..sample.rule(1)
    };
    let answer = soc.steering()?.add(soc.fence(), second).await;
    refused(answer, "steering.apply", ErrorKind::Conflict)?;
    ensure_eq!(soc.cookies().await?, vec![1], "cookies listed");
    Ok(())
}

pub(super) async fn an_overlap_conflicts_whoever_owns_the_first(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    soc.add(sample.their_rule(1)).await?;
    let second = SteeringRule {
        cookie: Cookie(2),
        actions: sample.other_actions()?,
        ..sample.rule(1)
    };
    let answer = soc.steering()?.add(soc.fence(), second).await;
    refused(answer, "steering.apply", ErrorKind::Conflict)?;
    Ok(())
}

pub(super) async fn a_wider_pattern_overlaps_a_narrower_one(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    soc.add(sample.rule(1)).await?;
    let everything = SteeringRule {
        cookie: Cookie(2),
        pattern: Pattern::default(),
        actions: sample.other_actions()?,
        ..sample.rule(1)
    };
    if let Some(Verdict::No { field, reason }) = soc
        .steering()?
        .validate(std::slice::from_ref(&everything))
        .await?
        .pop()
    {
        return Err(Halt::not_supported(
            "steering.validate",
            format!("{field}: {reason}"),
        ));
    }
    let answer = soc.steering()?.add(soc.fence(), everything).await;
    refused(answer, "steering.apply", ErrorKind::Conflict)?;
    Ok(())
}

pub(super) async fn an_overlap_with_equal_actions_is_no_conflict(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    soc.add(sample.rule(1)).await?;
    let twin = SteeringRule {
        cookie: Cookie(2),
        ..sample.rule(1)
    };
    ensure!(is_added(&soc.add(twin).await?), "the second rule is not `Added`");
    ensure_eq!(soc.cookies().await?, vec![1, 2], "cookies listed");
    Ok(())
}

pub(super) async fn an_overlap_of_other_priority_is_no_conflict(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    soc.add(sample.rule(1)).await?;
    let below = SteeringRule {
        cookie: Cookie(2),
        priority: Priority(1),
        actions: sample.other_actions()?,
        ..sample.rule(1)
    };
    ensure!(is_added(&soc.add(below).await?), "the second rule is not `Added`");
    Ok(())
}

pub(super) async fn an_overlap_in_another_group_is_no_conflict(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    soc.add(sample.rule(1)).await?;
    let elsewhere = SteeringRule {
        cookie: Cookie(2),
        group: Group(1),
        actions: sample.other_actions()?,
        ..sample.rule(1)
    };
    ensure!(
        is_added(&soc.add(elsewhere).await?),
        "the second rule is not `Added`"
    );
    Ok(())
}

pub(super) async fn a_conflict_ends_with_the_rule_that_made_it(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    soc.add(sample.rule(1)).await?;
    soc.remove(Cookie(1)).await?;
    let other = SteeringRule {
        cookie: Cookie(2),
        actions: sample.other_actions()?,
        ..sample.rule(1)
    };
    ensure!(is_added(&soc.add(other).await?), "the second rule is not `Added`");
    Ok(())
}

pub(super) async fn removing_what_is_not_there_is_absent(rig: &dyn Rig) -> CaseResult {
    let soc = Soc::of(rig);
    ensure_eq!(soc.remove(Cookie(404)).await?, Change::Absent, "removal");
    Ok(())
}

pub(super) async fn removing_anothers_rule_is_not_found_and_it_stays(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    soc.add(sample.their_rule(1)).await?;
    let answer = soc.steering()?.remove(soc.fence(), MINE, Cookie(1)).await;
    refused(answer, "steering.apply", ErrorKind::NotFound)?;
    ensure_eq!(
        soc.steering()?.list(THEIRS).await?.len(),
        1,
        "the other owner's rules"
    );
    Ok(())
}

pub(super) async fn a_removed_rule_is_gone_and_its_cookie_free(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    soc.add(sample.rule(1)).await?;
    ensure_eq!(soc.remove(Cookie(1)).await?, Change::Removed(None), "removal");
    ensure!(soc.mine().await?.is_empty(), "a removed rule is listed");
    let mut other = sample.rule(2);
    other.cookie = Cookie(1);
    ensure!(is_added(&soc.add(other).await?), "the cookie is not free");
    Ok(())
}

pub(super) async fn list_shows_only_the_owners_rules_as_given(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    let Change::Added(placement) = soc.add(sample.rule(1)).await? else {
        return Err(Halt::failed("adding a new rule is not `Added`"));
    };
    soc.add(sample.their_rule(2)).await?;
    let expected = vec![InstalledRule::new(sample.rule(1), placement)];
    ensure_eq!(soc.mine().await?, expected, "my rules");
    let theirs = soc.steering()?.list(THEIRS).await?;
    ensure_eq!(theirs.len(), 1, "the other owner's rules");
    ensure_eq!(theirs[0].rule, sample.their_rule(2), "the other owner's rule");
    Ok(())
}

pub(super) async fn list_is_in_group_priority_cookie_order(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    let groups = sample.claims().groups.min(2);
    let priorities = sample.claims().priorities.min(2);
    let mut rules = Vec::new();
    for (i, cookie) in [5_u128, 1, 3, 8, 2, 9, 4, 7].into_iter().enumerate() {
        let i = i as u32;
        rules.push(SteeringRule {
            cookie: Cookie(cookie),
            group: Group(i % groups.max(1)),
            priority: Priority((i / 2) % priorities.max(1)),
            ..sample.rule(i)
        });
    }
    for rule in &rules {
        soc.add(rule.clone()).await?;
    }
    let mut expected: Vec<_> = rules.iter().map(|r| (r.group, r.priority, r.cookie)).collect();
    expected.sort();
    let listed = soc.mine().await?;
    let listed: Vec<_> = listed
        .iter()
        .map(|each| (each.rule.group, each.rule.priority, each.rule.cookie))
        .collect();
    ensure_eq!(listed, expected, "order");
    Ok(())
}

pub(super) async fn flush_removes_the_owners_rules_and_no_others(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    for i in 0..3 {
        soc.add(sample.rule(i)).await?;
    }
    soc.add(sample.their_rule(3)).await?;
    ensure_eq!(
        soc.steering()?.flush(soc.fence(), MINE).await?,
        3,
        "rules flushed"
    );
    ensure!(soc.mine().await?.is_empty(), "a flushed rule is listed");
    ensure_eq!(
        soc.steering()?.list(THEIRS).await?.len(),
        1,
        "the other owner's rules"
    );
    ensure_eq!(
        soc.steering()?.flush(soc.fence(), MINE).await?,
        0,
        "rules flushed again"
    );
    Ok(())
}

pub(super) async fn counters_answer_each_cookie_in_order(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    soc.add(sample.counting(1)).await?;
    soc.add(sample.rule(2)).await?;
    let asked = [Cookie(404), Cookie(1), Cookie(2), Cookie(1)];
    let answers = soc.steering()?.counters(MINE, &asked).await?;
    let counted: Vec<bool> = answers.iter().map(Option::is_some).collect();
    ensure_eq!(
        counted,
        vec![false, true, false, true],
        "cookies that have counters"
    );
    let Some(fresh) = answers[1] else {
        return Err(Halt::failed("no counters of a counting rule"));
    };
    ensure_eq!((fresh.packets, fresh.octets), (0, 0), "counts of a fresh rule");
    ensure_eq!(
        fresh.epoch,
        soc.backend.epoch(),
        "life of the card of the counters"
    );
    Ok(())
}

pub(super) async fn counters_of_another_owner_are_none(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    let mut rule = sample.counting(1);
    rule.owner = THEIRS;
    soc.add(rule).await?;
    let answers = soc.steering()?.counters(MINE, &[Cookie(1)]).await?;
    ensure_eq!(answers, vec![None], "counters");
    Ok(())
}

pub(super) async fn a_counting_rule_is_removed_with_its_final_counters(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    soc.add(sample.counting(1)).await?;
    let change = soc.remove(Cookie(1)).await?;
    ensure!(
        matches!(change, Change::Removed(Some(counters)) if counters.packets == 0),
        "removal of a counting rule ended as {change:?}"
    );
    Ok(())
}

pub(super) async fn operations_of_a_batch_take_effect_in_order(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    let moved = SteeringRule {
        cookie: Cookie(1),
        ..sample.rule(2)
    };
    let operations = vec![
        remove(1),
        add(sample.rule(1)),
        add(sample.rule(1)),
        remove(1),
        add(moved.clone()),
    ];
    let outcome = soc.batch(operations, Atomicity::Continue).await?;
    let changes = outcome.into_result()?;
    ensure_eq!(changes[0], Change::Absent, "removal before the addition");
    ensure!(is_added(&changes[1]), "the addition ended as {:?}", changes[1]);
    ensure!(
        matches!(changes[2], Change::Present(_)),
        "the second addition ended as {:?}",
        changes[2]
    );
    ensure_eq!(changes[3], Change::Removed(None), "removal after the addition");
    ensure!(
        is_added(&changes[4]),
        "the last addition ended as {:?}",
        changes[4]
    );
    let listed = soc.mine().await?;
    ensure_eq!(listed.len(), 1, "rules listed");
    ensure_eq!(listed[0].rule, moved, "the rule that is left");
    Ok(())
}

/// A batch whose operation 1 of 3 fails because cookie 1 has another rule by then.
fn failing(sample: &Sampler) -> Vec<Operation> {
    let clash = SteeringRule {
        cookie: Cookie(1),
        ..sample.rule(3)
    };
    vec![add(sample.rule(1)), add(clash), add(sample.rule(2))]
}

pub(super) async fn a_batch_continues_after_a_failure(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    let outcome = soc.batch(failing(&sample), Atomicity::Continue).await?;
    ensure!(
        matches!(outcome.results[0], Ok(Change::Added(_))),
        "operation 0 was not carried out"
    );
    failed_at(&outcome, 1, ErrorKind::Exists)?;
    ensure!(
        matches!(outcome.results[2], Ok(Change::Added(_))),
        "operation 2 was not carried out"
    );
    ensure_eq!(outcome.undone, Undone::No, "undone");
    ensure_eq!(soc.cookies().await?, vec![1, 2], "cookies listed");
    Ok(())
}

async fn all_or_nothing(rig: &dyn Rig, atomicity: Atomicity) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    soc.add(sample.rule(7)).await?;
    let before = soc.mine().await?;
    let mut operations = failing(&sample);
    operations.insert(0, remove(7));
    let outcome = soc.batch(operations, atomicity).await?;
    failed_at(&outcome, 2, ErrorKind::Exists)?;
    for index in [0, 1, 3] {
        ensure_eq!(outcome.results[index], Ok(Change::Skipped), "operation {index}");
    }
    ensure_eq!(outcome.undone, Undone::All, "undone");
    ensure_eq!(soc.mine().await?, before, "rules after the failure");
    let operations = vec![remove(7), add(sample.rule(1)), add(sample.rule(2))];
    let outcome = soc.batch(operations, atomicity).await?;
    ensure_eq!(outcome.undone, Undone::No, "undone without a failure");
    outcome.into_result()?;
    ensure_eq!(soc.cookies().await?, vec![1, 2], "cookies listed");
    Ok(())
}

pub(super) async fn a_rolled_back_batch_changes_nothing(rig: &dyn Rig) -> CaseResult {
    all_or_nothing(rig, Atomicity::Rollback).await
}

pub(super) async fn an_atomic_batch_is_all_or_none(rig: &dyn Rig) -> CaseResult {
    all_or_nothing(rig, Atomicity::Atomic).await
}

pub(super) async fn an_undeclared_atomicity_is_unsupported(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    let declared = &sample.claims().atomicity;
    ensure!(
        declared.contains(&Atomicity::Continue),
        "every backend must offer `Continue`"
    );
    for atomicity in [Atomicity::Rollback, Atomicity::Atomic] {
        if !declared.contains(&atomicity) {
            let batch = Batch::new(vec![add(sample.rule(1))]).with(atomicity);
            let answer = soc.steering()?.apply(soc.fence(), &batch).await;
            refused(answer, "steering.apply", ErrorKind::Unsupported)?;
        }
    }
    ensure!(soc.mine().await?.is_empty(), "a refused batch left a rule");
    Ok(())
}

pub(super) async fn an_empty_batch_succeeds(rig: &dyn Rig) -> CaseResult {
    let soc = Soc::of(rig);
    let outcome = soc.batch(Vec::new(), Atomicity::Continue).await?;
    ensure_eq!(outcome.undone, Undone::No, "undone");
    Ok(())
}

pub(super) async fn repeating_a_whole_batch_is_safe(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    soc.add(sample.rule(9)).await?;
    let operations = vec![add(sample.rule(1)), remove(9), add(sample.rule(2))];
    soc.batch(operations.clone(), Atomicity::Continue)
        .await?
        .into_result()?;
    let before = soc.mine().await?;
    let changes = soc.batch(operations, Atomicity::Continue).await?.into_result()?;
    ensure!(
        matches!(
            changes[..],
            [Change::Present(_), Change::Absent, Change::Present(_)]
        ),
        "the second time ended as {changes:?}"
    );
    ensure_eq!(soc.mine().await?, before, "rules after the second time");
    Ok(())
}

pub(super) async fn cancelling_a_batch_leaves_a_prefix(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    let operations: Vec<Operation> = (0..8).map(|i| add(sample.rule(i))).collect();
    let batch = Batch::new(operations.clone());
    cancelled(soc.steering()?.apply(soc.fence(), &batch)).await;
    let left = soc.cookies().await?;
    let prefix: Vec<u128> = (0..left.len() as u128).collect();
    ensure_eq!(left, prefix, "cookies of a cancelled batch");
    soc.batch(operations, Atomicity::Continue).await?.into_result()?;
    ensure_eq!(soc.cookies().await?.len(), 8, "rules after repeating it");
    Ok(())
}

pub(super) async fn concurrent_batches_all_take_effect(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    let batches: Vec<Batch> = (0..4)
        .map(|b| Batch::new((0..4).map(|i| add(sample.rule(b * 4 + i))).collect()))
        .collect();
    let (steering, fence) = (soc.steering()?, soc.fence());
    let (a, b, c, d) = tokio::join!(
        steering.apply(fence, &batches[0]),
        steering.apply(fence, &batches[1]),
        steering.apply(fence, &batches[2]),
        steering.apply(fence, &batches[3])
    );
    for outcome in [a, b, c, d] {
        outcome?.into_result()?;
    }
    ensure_eq!(
        soc.cookies().await?,
        (0..16).collect::<Vec<_>>(),
        "cookies listed"
    );
    Ok(())
}

pub(super) async fn calls_about_one_cookie_take_effect_in_order(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    let (steering, fence) = (soc.steering()?, soc.fence());
    let put = Batch::new(vec![add(sample.rule(1))]);
    let delete = Batch::new(vec![remove(1)]);
    let (first, second, third) = tokio::join!(
        biased;
        steering.apply(fence, &put),
        steering.apply(fence, &delete),
        steering.apply(fence, &put)
    );
    let changes = [first?, second?, third?].map(|outcome| outcome.results.into_iter().next());
    ensure!(
        matches!(
            changes,
            [
                Some(Ok(Change::Added(_))),
                Some(Ok(Change::Removed(None))),
                Some(Ok(Change::Added(_)))
            ]
        ),
        "add, remove, add of one cookie ended as {changes:?}"
    );
    Ok(())
}

pub(super) async fn a_stale_fence_steers_nothing(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    soc.add(sample.rule(1)).await?;
    let old = Fence(Epoch(soc.backend.epoch().0.wrapping_sub(1)));
    let steering = soc.steering()?;
    let batch = Batch::new(vec![remove(1), add(sample.rule(2))]);
    refused(
        steering.apply(old, &batch).await,
        "steering.apply",
        ErrorKind::Stale,
    )?;
    refused(
        steering.flush(old, MINE).await,
        "steering.flush",
        ErrorKind::Stale,
    )?;
    let answer = steering
        .set_miss_policy(old, sample.port(), MissPolicy::Software)
        .await;
    refused(answer, "steering.set_miss_policy", ErrorKind::Stale)?;
    ensure_eq!(soc.cookies().await?, vec![1], "cookies listed");
    Ok(())
}

pub(super) async fn validate_judges_each_rule_and_installs_none(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    let mut senseless = sample.rule(2);
    senseless.actions.clear();
    let rules = [sample.rule(1), senseless, sample.rule(3)];
    let verdicts = soc.steering()?.validate(&rules).await?;
    let possible: Vec<bool> = verdicts.iter().map(Verdict::is_possible).collect();
    ensure_eq!(possible, vec![true, false, true], "verdicts");
    ensure!(soc.mine().await?.is_empty(), "validate installed a rule");
    Ok(())
}

pub(super) async fn validate_does_not_look_at_what_is_installed(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    let clash = SteeringRule {
        cookie: Cookie(1),
        actions: sample.other_actions()?,
        ..sample.rule(2)
    };
    let steering = soc.steering()?;
    let before = steering.validate(std::slice::from_ref(&clash)).await?;
    soc.add(sample.rule(1)).await?;
    soc.add(SteeringRule {
        cookie: Cookie(2),
        ..sample.rule(2)
    })
    .await?;
    let after = steering.validate(std::slice::from_ref(&clash)).await?;
    ensure_eq!(after, before, "verdict about a rule that would conflict");
    Ok(())
}

pub(super) async fn a_senseless_rule_is_invalid_with_its_field(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    let end = sample.actions();
    let senseless = [
        SteeringRule {
            actions: Vec::new(),
            ..sample.rule(1)
        },
        SteeringRule {
            actions: [end.clone(), end].concat(),
            ..sample.rule(2)
        },
        SteeringRule {
            idle_timeout_ms: Some(0),
            ..sample.rule(3)
        },
        SteeringRule {
            actions: vec![Action::Jump(Group(0))],
            ..sample.rule(4)
        },
    ];
    for rule in senseless {
        let Err(expected) = rule.check() else { continue };
        let verdict = soc.steering()?.validate(std::slice::from_ref(&rule)).await?.pop();
        ensure!(
            matches!(&verdict, Some(Verdict::No { field, .. }) if *field == expected.field),
            "{}: verdict {verdict:?}",
            expected.field
        );
        let answer = soc.steering()?.add(soc.fence(), rule).await;
        let error = refused(answer, "steering.apply", ErrorKind::Invalid)?;
        let field = error.object.as_ref().map_or("", |object| &object.field);
        ensure_eq!(field, expected.field, "field that the error names");
    }
    ensure!(soc.mine().await?.is_empty(), "a senseless rule was installed");
    Ok(())
}

pub(super) async fn a_verdict_comes_true_on_an_empty_card(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    for request in [
        PlacementRequest::Any,
        PlacementRequest::Hardware,
        PlacementRequest::Software,
    ] {
        let rule = SteeringRule {
            placement: request,
            ..sample.rule(1)
        };
        let verdict = soc.steering()?.validate(std::slice::from_ref(&rule)).await?.pop();
        let answer = soc.steering()?.add(soc.fence(), rule).await;
        match (verdict, answer) {
            (Some(Verdict::Hardware), Ok(Change::Added(Placement::Hardware)))
            | (Some(Verdict::Partial(_)), Ok(Change::Added(Placement::Partial(_))))
            | (Some(Verdict::Software(_)), Ok(Change::Added(Placement::Software(_)))) => {}
            (Some(Verdict::No { .. }), Err(error)) if error.kind == ErrorKind::Unsupported => continue,
            (verdict, answer) => {
                return Err(Halt::failed(format!(
                    "judged {verdict:?}, but adding it gave {answer:?}"
                )));
            }
        }
        soc.remove(Cookie(1)).await?;
    }
    Ok(())
}

pub(super) async fn a_requested_placement_is_kept_or_refused(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    for (i, request) in [PlacementRequest::Hardware, PlacementRequest::Software]
        .into_iter()
        .enumerate()
    {
        let rule = SteeringRule {
            placement: request,
            ..sample.rule(i as u32)
        };
        match (request, soc.steering()?.add(soc.fence(), rule).await) {
            (PlacementRequest::Hardware, Ok(Change::Added(Placement::Hardware)))
            | (PlacementRequest::Software, Ok(Change::Added(Placement::Software(_)))) => {}
            (_, Err(error)) if error.kind == ErrorKind::Unsupported => {}
            (_, answer) => return Err(Halt::failed(format!("asked for {request:?}, got {answer:?}"))),
        }
    }
    Ok(())
}

pub(super) async fn a_miss_policy_needs_a_port(rig: &dyn Rig) -> CaseResult {
    let soc = Soc::of(rig);
    let answer = soc
        .steering()?
        .set_miss_policy(soc.fence(), NO_PORT, MissPolicy::Drop)
        .await;
    refused(answer, "steering.set_miss_policy", ErrorKind::NotFound)?;
    Ok(())
}

pub(super) async fn occupancy_of_rules_follows_the_table(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    let before = rules_used(&soc).await?;
    ensure_eq!(before, 0, "rules in use on a fresh card");
    soc.add(sample.rule(1)).await?;
    soc.add(sample.rule(2)).await?;
    ensure_eq!(rules_used(&soc).await?, 2, "rules in use");
    soc.steering()?.flush(soc.fence(), MINE).await?;
    ensure_eq!(rules_used(&soc).await?, 0, "rules in use after the flush");
    Ok(())
}

async fn rules_used(soc: &Soc) -> Result<u64, Halt> {
    let all = soc.steering()?.occupancy().await?;
    let mut names = BTreeSet::new();
    for each in &all {
        ensure!(
            names.insert(each.resource.as_str()),
            "occupancy lists {} twice",
            each.resource
        );
        ensure!(
            each.used <= each.limit,
            "{}: {} of {} in use",
            each.resource,
            each.used,
            each.limit
        );
    }
    all.iter()
        .find(|each| each.resource == "steering.rules")
        .map(|each| each.used)
        .ok_or_else(|| Halt::failed(format!("occupancy does not name steering.rules: {names:?}")))
}

pub(super) async fn a_failed_operation_says_it_had_no_effect(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    if !sample.claims().per_operation_status {
        return Err(Halt::not_supported(
            "steering.per_operation_status",
            "operations after a failure may be unknown",
        ));
    }
    let outcome = soc.batch(failing(&sample), Atomicity::Continue).await?;
    for (index, result) in outcome.results.iter().enumerate() {
        if let Err(error) = result {
            ensure_eq!(error.effect, Effect::None, "effect of failed operation {index}");
        }
    }
    Ok(())
}

pub(super) async fn counting_survives_a_repeated_addition(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    if !sample.claims().actions.contains(ActionKinds::COUNT) {
        return Err(Halt::not_supported("steering.actions", "COUNT is not offered"));
    }
    soc.add(sample.counting(1)).await?;
    // Without `Count` it is a different rule.
    let answer = soc.steering()?.add(soc.fence(), sample.rule(1)).await;
    refused(answer, "steering.apply", ErrorKind::Exists)?;
    let change = soc.add(sample.counting(1)).await?;
    ensure!(
        matches!(change, Change::Present(_)),
        "adding it again ended as {change:?}"
    );
    let counters = soc.steering()?.counters(MINE, &[Cookie(1)]).await?;
    ensure!(counters[0].is_some(), "the rule no longer counts");
    Ok(())
}
