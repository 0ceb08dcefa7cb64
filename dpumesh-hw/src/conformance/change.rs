//! Rules that change under traffic and across the card's lives: replaced without a gap, replayed after a reset, and what a
//! table that fails half-way leaves behind.

use dpumesh_core::steering::{Action, Atomicity, Batch, Change, Cookie, Operation, Priority, SteeringRule};
use dpumesh_core::{ActionKinds, Effect, ErrorKind, FlowSteering, FlowSteeringExt};

use super::Rig;
use super::check::{CaseResult, Halt, ensure, ensure_eq};
use super::disturb::{Disturbance, disturb};
use super::probe::{ARRIVAL, Wire, frame, needs_actions, pattern, tag_of};
use super::sample::{MINE, Sampler, THEIRS};
use super::steering::{Soc, add};
use super::traffic::{MARK, counted, wire};

/// Frames sent while rules change.
const FRAMES: usize = 120;
/// Changes that they meet.
const ROUNDS: u16 = 12;

/// A rule that forwards the `tag`-th frame, under the cookie of a round.
fn forwarding(rig: &dyn Rig, wire: &Wire<'_>, tag: u16, round: u16) -> Result<SteeringRule, Halt> {
    Ok(SteeringRule::new(
        Cookie(u128::from(tag) << 32 | u128::from(round)),
        MINE,
        Priority(0),
        pattern(rig, tag)?,
        vec![Action::Forward(wire.to)],
    ))
}

/// Sends frames of tag 1 while `change` runs, and expects each of them at the other end.
async fn loses_none(wire: &Wire<'_>, change: impl Future<Output = CaseResult>) -> CaseResult {
    let send = async {
        for _ in 0..FRAMES {
            wire.send(&frame(1)).await?;
            tokio::task::yield_now().await;
        }
        Ok(())
    };
    tokio::try_join!(change, send)?;
    wire.send(&frame(MARK)).await?;
    let mut arrived = 0;
    loop {
        match wire.next_at(wire.to).await?.as_deref().map(tag_of) {
            Some(1) => arrived += 1,
            Some(MARK) => break,
            found => {
                return Err(Halt::failed(format!(
                    "within {ARRIVAL:?} came {found:?} after {arrived} of {FRAMES} frames"
                )));
            }
        }
    }
    ensure_eq!(arrived, FRAMES, "frames that arrived while rules changed");
    Ok(())
}

pub(super) async fn no_frame_meets_the_middle_of_an_atomic_batch(rig: &dyn Rig) -> CaseResult {
    let wire = wire(rig).await?;
    let soc = Soc::of(rig);
    soc.add(forwarding(rig, &wire, 1, 0)?).await?;
    let swap = async {
        for round in 1..=ROUNDS {
            // The removal stands first: only atomicity keeps frames from meeting the gap.
            let operations = vec![
                Operation::Remove {
                    owner: MINE,
                    cookie: forwarding(rig, &wire, 1, round - 1)?.cookie,
                },
                add(forwarding(rig, &wire, 1, round)?),
            ];
            soc.batch(operations, Atomicity::Atomic).await?.into_result()?;
            tokio::task::yield_now().await;
        }
        Ok(())
    };
    loses_none(&wire, swap).await
}

pub(super) async fn replacing_rules_leaves_no_gap(rig: &dyn Rig) -> CaseResult {
    let wire = wire(rig).await?;
    let soc = Soc::of(rig);
    let kept: Vec<SteeringRule> = soc.mine().await?.into_iter().map(|each| each.rule).collect();
    let set = |round| -> Result<Vec<SteeringRule>, Halt> {
        let mut rules = kept.clone();
        rules.push(forwarding(rig, &wire, 1, round)?);
        Ok(rules)
    };
    replace(&soc, set(0)?).await?;
    let swap = async {
        for round in 1..=ROUNDS {
            replace(&soc, set(round)?).await?;
            tokio::task::yield_now().await;
        }
        Ok(())
    };
    loses_none(&wire, swap).await?;
    let left: Vec<SteeringRule> = soc.mine().await?.into_iter().map(|each| each.rule).collect();
    let mut expected = set(ROUNDS)?;
    expected.sort_by_key(|rule| (rule.group, rule.priority, rule.cookie));
    ensure_eq!(left, expected, "rules after the last replacement");
    Ok(())
}

/// Makes my rules equal to these, and says what changed.
async fn replace(soc: &Soc, rules: Vec<SteeringRule>) -> Result<Vec<Change>, Halt> {
    let steering: &dyn FlowSteering = soc.steering()?;
    let outcome = steering
        .replace(soc.fence(), MINE, rules, Atomicity::Continue)
        .await?;
    Ok(outcome.into_result()?)
}

async fn new_life(rig: &dyn Rig) -> CaseResult {
    let reset = rig
        .reset()
        .ok_or_else(|| Halt::not_supported("rig.reset", "the fixture cannot reset the card"))?;
    reset.lose().await?;
    reset.bring_back().await?;
    Ok(())
}

pub(super) async fn replayed_rules_act_in_the_new_life(rig: &dyn Rig) -> CaseResult {
    let before = wire(rig).await?;
    let mut rules: Vec<SteeringRule> = Soc::of(rig)
        .mine()
        .await?
        .into_iter()
        .map(|each| each.rule)
        .collect();
    for tag in 1..=3 {
        rules.push(forwarding(rig, &before, tag, 0)?);
    }
    replace(&Soc::of(rig), rules.clone()).await?;
    new_life(rig).await?;
    let wire = Wire::new(rig).await?;
    ensure_eq!(
        (wire.from, wire.to),
        (before.from, before.to),
        "ports of the new life"
    );
    let soc = Soc::of(rig);
    replace(&soc, rules.clone()).await?;
    for tag in [2, 3, 1] {
        wire.send(&frame(tag)).await?;
        wire.arrives(&frame(tag), "its rule was replayed").await?;
    }
    let listed: Vec<SteeringRule> = soc.mine().await?.into_iter().map(|each| each.rule).collect();
    ensure_eq!(listed.len(), rules.len(), "rules listed after the replay");
    ensure_eq!(
        replace(&soc, rules).await?,
        Vec::new(),
        "changes of a second replay"
    );
    Ok(())
}

pub(super) async fn counting_begins_anew_with_the_cards_life(rig: &dyn Rig) -> CaseResult {
    needs_actions(rig, ActionKinds::COUNT | ActionKinds::FORWARD)?;
    let before = wire(rig).await?;
    let counting = |wire: &Wire<'_>| -> Result<SteeringRule, Halt> {
        let mut rule = forwarding(rig, wire, 1, 0)?;
        rule.actions.insert(0, Action::Count);
        Ok(rule)
    };
    let rule = counting(&before)?;
    Soc::of(rig).add(rule.clone()).await?;
    for _ in 0..2 {
        before.send(&frame(1)).await?;
        before.arrives(&frame(1), "a rule forwards it").await?;
    }
    ensure_eq!(
        counted(rig, rule.cookie).await?.packets,
        2,
        "frames of the former life"
    );
    new_life(rig).await?;
    let wire = Wire::new(rig).await?;
    Soc::of(rig).add(counting(&wire)?).await?;
    let fresh = counted(rig, rule.cookie).await?;
    ensure_eq!(
        (fresh.packets, fresh.octets, fresh.epoch),
        (0, 0, rig.soc().epoch()),
        "frames, octets and epoch of a replayed rule"
    );
    wire.send(&frame(1)).await?;
    wire.arrives(&frame(1), "its rule was replayed").await?;
    let one = counted(rig, rule.cookie).await?;
    ensure_eq!(
        (one.packets, one.epoch),
        (1, rig.soc().epoch()),
        "frames of the new life, and its epoch"
    );
    Ok(())
}

pub(super) async fn what_a_failing_table_did_is_told_or_unknown_and_listed(rig: &dyn Rig) -> CaseResult {
    const RULES: u32 = 6;
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    let operations: Vec<Operation> = (0..RULES).map(|i| add(sample.rule(i))).collect();
    disturb(rig, Disturbance::RulesFail { after: Some(3) }).await?;
    let outcome = soc.batch(operations.clone(), Atomicity::Continue).await?;
    disturb(rig, Disturbance::RulesFail { after: None }).await?;
    let listed = soc.cookies().await?;
    let mut failed = false;
    for (index, result) in outcome.results.iter().enumerate() {
        let there = listed.contains(&(index as u128));
        match result {
            Ok(Change::Added(_)) => ensure!(there, "operation {index} is told done, list does not show it"),
            Ok(other) => return Err(Halt::failed(format!("operation {index} ended as {other:?}"))),
            Err(error) if error.effect == Effect::None => {
                ensure!(
                    !there,
                    "operation {index} is told without effect, but list shows it"
                );
                failed = true;
            }
            Err(error) => {
                ensure_eq!(
                    error.effect,
                    Effect::Unknown,
                    "effect of failed operation {index}"
                );
                ensure!(
                    failed && !sample.claims().per_operation_status,
                    "operation {index} is unknown, though the card tells the status of each or none before it failed"
                );
            }
        }
    }
    ensure!(
        failed,
        "no operation failed on a table that takes 3 of {RULES} changes"
    );
    // The table is read again before the next batch: what was unknown is known, and repeating it is safe.
    soc.batch(operations, Atomicity::Continue).await?.into_result()?;
    ensure_eq!(
        soc.mine().await?.len(),
        RULES as usize,
        "rules after repeating the batch"
    );
    Ok(())
}

pub(super) async fn a_failing_table_leaves_all_or_none_of_a_batch_that_promised_it(
    rig: &dyn Rig,
) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    soc.add(sample.rule(9)).await?;
    let before = soc.mine().await?;
    let stronger = [Atomicity::Rollback, Atomicity::Atomic];
    let offered = stronger
        .into_iter()
        .filter(|atomicity| sample.claims().atomicity.contains(atomicity));
    for atomicity in offered {
        let operations = (0..5).map(|i| add(sample.rule(i))).collect();
        let batch = Batch::new(operations).with(atomicity);
        disturb(rig, Disturbance::RulesFail { after: Some(2) }).await?;
        let answer = soc.steering()?.apply(soc.fence(), &batch).await;
        disturb(rig, Disturbance::RulesFail { after: None }).await?;
        let undone = match &answer {
            Err(error) => error.effect == Effect::None,
            Ok(outcome) => outcome.undone == dpumesh_core::steering::Undone::All,
        };
        let after = soc.mine().await?;
        ensure!(
            !undone || after == before,
            "{atomicity:?} is told undone, but list shows {} rules instead of {}",
            after.len(),
            before.len()
        );
        ensure!(
            undone || !matches!(&answer, Ok(outcome) if outcome.results.iter().all(Result::is_ok)),
            "{atomicity:?} succeeded on a table that takes 2 of 5 changes"
        );
        soc.steering()?.flush(soc.fence(), MINE).await?;
        soc.add(sample.rule(9)).await?;
    }
    Ok(())
}

pub(super) async fn a_flush_that_fails_says_so_and_is_finished_by_the_next(rig: &dyn Rig) -> CaseResult {
    const RULES: u32 = 5;
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    for i in 0..RULES {
        soc.add(sample.rule(i)).await?;
    }
    soc.add(sample.their_rule(9)).await?;
    disturb(rig, Disturbance::RulesFail { after: Some(2) }).await?;
    let answer = soc.steering()?.flush(soc.fence(), MINE).await;
    disturb(rig, Disturbance::RulesFail { after: None }).await?;
    let left = soc.mine().await?.len();
    match answer {
        Ok(count) => {
            return Err(Halt::failed(format!(
                "{count} rules are told flushed on a table that failed, {left} are left"
            )));
        }
        Err(error) => {
            ensure_eq!(error.kind, ErrorKind::Io, "kind of the failure");
            let removed = RULES as usize - left;
            let effect = if removed > 0 {
                Effect::Partial
            } else {
                Effect::None
            };
            ensure_eq!(
                error.effect,
                effect,
                "effect of a flush that removed {removed} rules"
            );
        }
    }
    ensure!(left > 0, "the flush failed, but nothing is left");
    let flushed = soc.steering()?.flush(soc.fence(), MINE).await?;
    ensure_eq!(flushed, left as u64, "rules that the next flush removed");
    ensure!(soc.mine().await?.is_empty(), "a flushed rule is listed");
    ensure_eq!(
        soc.steering()?.list(THEIRS).await?.len(),
        1,
        "the other owner's rules"
    );
    Ok(())
}
