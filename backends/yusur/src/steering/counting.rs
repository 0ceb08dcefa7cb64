//! Counts of rules: the sum of what software, hardware and the places that a rule left have counted in this life.

use std::collections::BTreeSet;

use dpumesh_core::steering::{Action, Batch, Change, Cookie, Counters, Owner, SteeringRule};
use dpumesh_core::{CounterUnit, Effect, Epoch, Result};

use super::settle::repeat;
use super::{APPLY, Told};
use crate::error::NAME;
use crate::rules::{Decision, Done};
use crate::worker::Worker;

impl Worker {
    /// Final counters of what was removed, and what demoted rules take along.
    pub(super) fn finish(&mut self, batch: &Batch, decision: &mut Decision, told: &Told) -> Result<()> {
        let epoch = self.shared.life().epoch;
        self.carry(&decision.log);
        self.tell_places(batch, decision);
        let mut finals: Vec<(usize, u32)> = Vec::new();
        for (index, done) in &decision.log {
            let Done::Removed { rule, .. } = done else {
                continue;
            };
            let soft = told.soft_final.get(index).copied().unwrap_or_default();
            let unit = self.soft_unit();
            let soft = since(in_l2((soft.packets, soft.octets), unit), rule.base);
            if let Some(Ok(Change::Removed(Some(counters)))) = decision.results.get_mut(*index) {
                *counters = total(&[rule.carried, soft], epoch);
                finals.extend(
                    rule.hard
                        .as_ref()
                        .and_then(|held| held.counter)
                        .map(|id| (*index, id)),
                );
            }
        }
        let ids: Vec<u32> = finals.iter().map(|(_, id)| *id).collect();
        if ids.is_empty() {
            return Ok(());
        }
        match self.device.counters_read(&ids) {
            Ok(read) => {
                for ((index, _), counted) in finals.into_iter().zip(read) {
                    if let Some(Ok(Change::Removed(Some(counters)))) = decision.results.get_mut(index) {
                        counters.packets += counted.packets;
                        counters.octets += counted.octets;
                    }
                }
                Ok(())
            }
            Err(failure) => {
                let is_lost = crate::error::is_lost(&failure);
                let failed = self.failed(APPLY, failure);
                if is_lost {
                    return Err(failed.effect(Effect::Unknown));
                }
                for (index, _) in finals {
                    decision.results[index] = Err(failed.clone().effect(Effect::Applied).index(index));
                }
                Ok(())
            }
        }
    }

    /// A rule that a later operation of its batch took out of hardware is said to be where it is.
    fn tell_places(&self, batch: &Batch, decision: &mut Decision) {
        let demoted = decision.log.iter().filter_map(|(_, done)| match done {
            Done::Demoted { slot, .. } => Some(*slot),
            _ => None,
        });
        let demoted: BTreeSet<u32> = demoted.collect();
        if demoted.is_empty() {
            return;
        }
        for (index, done) in &decision.log {
            if let Some(slot) = self.rules.standing(done).filter(|slot| demoted.contains(slot))
                && let (Some(Ok(Change::Added(said))), Some(placement)) =
                    (decision.results.get_mut(*index), self.rules.placement(slot))
            {
                *said = placement;
                repeat(batch, &mut decision.results, *index);
            }
        }
    }

    /// Rules that left hardware take their counts along. Counts that cannot be read any more are lost.
    pub(super) fn carry(&mut self, log: &[(usize, Done)]) {
        for (_, done) in log {
            let Done::Demoted { slot, held } = done else {
                continue;
            };
            let Some(id) = held.counter else { continue };
            match self.device.counters_read(&[id]) {
                Ok(counted) => {
                    if let (Some(rule), Some(counted)) = (self.rules.by_slot_mut(*slot), counted.first()) {
                        rule.carried.0 += counted.packets;
                        rule.carried.1 += counted.octets;
                    }
                }
                Err(failure) => {
                    let failed = self.failed(APPLY, failure);
                    tracing::warn!(backend = NAME, %failed, "what a rule had counted in hardware is lost");
                }
            }
        }
    }

    pub(super) fn soft_unit(&self) -> CounterUnit {
        let floor = self
            .soft()
            .map(|floor| floor.capabilities().steering.counter_unit);
        floor.unwrap_or_default()
    }

    pub(super) async fn counters(
        &mut self,
        owner: Owner,
        cookies: &[Cookie],
    ) -> Result<Vec<Option<Counters>>> {
        const COUNTERS: &str = "steering.counters";
        let epoch = self.shared.life().epoch;
        let soft = self.soft_counters(owner, cookies).await?;
        let mut answers = Vec::with_capacity(cookies.len());
        let mut ids: Vec<(usize, u32)> = Vec::new();
        for (i, cookie) in cookies.iter().enumerate() {
            let rule = self.rules.rule_of(owner, *cookie);
            answers.push(rule.filter(|rule| counts(&rule.rule)).map(|rule| {
                ids.extend(rule.hard.as_ref().and_then(|held| held.counter).map(|id| (i, id)));
                total(&[rule.carried, since(soft[i], rule.base)], epoch)
            }));
        }
        let numbers: Vec<u32> = ids.iter().map(|(_, id)| *id).collect();
        if numbers.is_empty() {
            return Ok(answers);
        }
        let read = self.device.counters_read(&numbers);
        let read = read.map_err(|failure| self.failed(COUNTERS, failure))?;
        for ((i, _), counted) in ids.into_iter().zip(read) {
            if let Some(counters) = &mut answers[i] {
                counters.packets += counted.packets;
                counters.octets += counted.octets;
            }
        }
        Ok(answers)
    }

    pub(super) async fn soft_counters(&self, owner: Owner, cookies: &[Cookie]) -> Result<Vec<(u64, u64)>> {
        let steering = self.soft().and_then(|floor| floor.steering());
        let Some(steering) = steering else {
            return Ok(vec![(0, 0); cookies.len()]);
        };
        let unit = self.soft_unit();
        let counted = steering.counters(owner, cookies).await?;
        let pair = |counters: Option<Counters>| {
            counters.map_or((0, 0), |counters| {
                in_l2((counters.packets, counters.octets), unit)
            })
        };
        Ok(counted.into_iter().map(pair).collect())
    }
}

pub(super) fn counts(rule: &SteeringRule) -> bool {
    rule.actions.contains(&Action::Count)
}

pub(super) fn total(parts: &[(u64, u64)], epoch: Epoch) -> Counters {
    let mut counters = Counters {
        epoch,
        ..Counters::default()
    };
    for (packets, octets) in parts {
        counters.packets += packets;
        counters.octets += octets;
    }
    counters
}

pub(super) fn since(counted: (u64, u64), base: (u64, u64)) -> (u64, u64) {
    (counted.0.saturating_sub(base.0), counted.1.saturating_sub(base.1))
}

/// Octets with the Ethernet header, which the processor's counters have. A tag, which L3 counters do not tell, is left out.
pub(super) fn in_l2(counted: (u64, u64), unit: CounterUnit) -> (u64, u64) {
    match unit {
        CounterUnit::L2 => counted,
        CounterUnit::L3 => (counted.0, counted.1 + 14 * counted.0),
    }
}
