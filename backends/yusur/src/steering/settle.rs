//! What each operation of a batch is told after software or card did not do everything, and making card and books agree again
//! when an answer left open what the card did.

use std::collections::{BTreeSet, HashMap};

use dpumesh_core::steering::{Batch, Change, Operation};
use dpumesh_core::{Effect, Result};

use super::{APPLY, Told};
use crate::error::NAME;
use crate::rules::{Decision, Done, Script};
use crate::sys::Failure;
use crate::table::{self, Key};
use crate::tables::Held;
use crate::worker::Worker;

impl Worker {
    /// Gives each operation its answer after software or card did not do everything.
    pub(super) async fn settle_results(
        &mut self,
        batch: &Batch,
        decision: &mut Decision,
        told: &Told,
    ) -> Result<()> {
        if told.soft_failed.is_empty() && told.hard_failed.is_none() {
            return Ok(());
        }
        let mut repairs = Decision::default();
        let mut kept = BTreeSet::new();
        for (index, failed) in &told.soft_failed {
            let mut placed = decision.log.iter().filter(|(at, _)| at == index);
            if let Some(slot) = placed.find_map(|(_, done)| self.rules.standing(done)) {
                self.rules.drop_rule(*index, slot, &mut repairs);
            }
            decision.results[*index] = Err(failed.clone().index(*index));
            repeat(batch, &mut decision.results, *index);
        }
        if let Some(failure) = &told.hard_failed {
            let there = match self.read_back(&decision.log) {
                Ok(there) => there,
                Err(failure) => {
                    self.unsure = true;
                    return Err(self.failed(APPLY, failure).effect(Effect::Unknown));
                }
            };
            let reason = format!("the card refused it: {}", failure.text);
            for (index, done) in &decision.log {
                let (Done::Placed { .. }, Some(slot)) = (done, self.rules.standing(done)) else {
                    continue;
                };
                let held = self.rules.by_slot(slot).and_then(|rule| rule.hard.as_ref());
                let is_there =
                    |key: &Key| held.is_some_and(|held| there.get(&(held.table, *key)) == Some(&held.user));
                if held.is_none_or(|held| held.keys.iter().all(is_there)) {
                    continue;
                }
                let result = self.rules.refused_by_card(*index, slot, &reason, &mut repairs);
                decision.results[*index] = result
                    .map(Change::Added)
                    .map_err(|refused| refused.vendor_code(failure.status.into()));
                repeat(batch, &mut decision.results, *index);
            }
            for (index, done) in &decision.log {
                let held = match done {
                    Done::Removed { rule, .. } => rule.hard.as_ref(),
                    Done::Demoted { held, .. } => Some(&**held),
                    Done::Placed { .. } => None,
                };
                let Some(held) = held else { continue };
                let is_there = |key: &Key| there.get(&(held.table, *key)) == Some(&held.user);
                if held.keys.iter().any(is_there) {
                    kept.insert(*index);
                    let writes = &mut repairs.script.writes;
                    writes.extend(held.deletes().map(|entry| (*index, entry)));
                }
            }
        }
        let again = self.tell(std::mem::take(&mut repairs.script)).await;
        if let Some(failure) = again.hard_failed {
            // The card keeps what it was told twice to give up: nobody may believe that it is gone.
            self.unsure = true;
            let failed = self.failed(APPLY, failure).effect(Effect::Partial);
            for index in kept {
                decision.results[index] = Err(failed.clone().index(index));
            }
        }
        decision.log.append(&mut repairs.log);
        Ok(())
    }

    /// Makes the card agree with the books again after answers that left open what it did.
    ///
    /// What it has too much is removed, what it lacks is put there again; a rule that it refuses then acts in software, or is
    /// gone if it may not.
    pub(crate) async fn look_again(&mut self, operation: &'static str) -> Result<()> {
        if !self.unsure {
            return Ok(());
        }
        let there = self.read_all(operation)?;
        let mut script = self.surplus(&there);
        for (_, held) in self.rules.lacking(&there) {
            script.setups.extend(self.rules.tables.setups_again(&held));
            script.writes.extend(held.puts().map(|entry| (0, entry)));
        }
        let told = self.tell(script).await;
        let Some(failure) = told.hard_failed else {
            self.unsure = false;
            return Ok(());
        };
        let reason = format!("the card refused it: {}", failure.text);
        let there = self.read_all(operation)?;
        let mut repairs = Decision {
            script: self.surplus(&there),
            ..Decision::default()
        };
        for (slot, _) in self.rules.lacking(&there) {
            let refused = self.rules.refused_by_card(0, slot, &reason, &mut repairs);
            if let Err(failed) = refused {
                tracing::warn!(backend = NAME, %failed, "a rule is not on the card any more");
            }
        }
        let again = self.tell(std::mem::take(&mut repairs.script)).await;
        self.carry(&repairs.log);
        self.rules.tables.settle();
        match again.hard_failed {
            Some(failure) => Err(self.failed(operation, failure)),
            None => {
                self.unsure = false;
                Ok(())
            }
        }
    }

    /// Entries of the card that no rule has.
    fn surplus(&self, there: &HashMap<(u32, Key), u64>) -> Script {
        let known: HashMap<(u32, Key), u64> = self.rules.tables.keys().collect();
        let unknown = there.iter().filter(|(key, user)| known.get(key) != Some(user));
        Script {
            writes: unknown
                .map(|((table, key), _)| (0, Held::delete(*table, *key)))
                .collect(),
            ..Script::default()
        }
    }

    fn read_all(&mut self, operation: &'static str) -> Result<HashMap<(u32, Key), u64>> {
        let tables = self.rules.tables.tables().collect();
        let there = self.read(tables);
        there.map_err(|failure| self.failed(operation, failure))
    }

    /// What the tables that a batch touched hold: who has which key.
    pub(super) fn read_back(
        &self,
        log: &[(usize, Done)],
    ) -> std::result::Result<HashMap<(u32, Key), u64>, Failure> {
        let mut tables = BTreeSet::new();
        for (_, done) in log {
            let held = match done {
                Done::Placed { slot, .. } => self.rules.by_slot(*slot).and_then(|rule| rule.hard.as_ref()),
                Done::Removed { rule, .. } => rule.hard.as_ref(),
                Done::Demoted { held, .. } => Some(&**held),
            };
            tables.extend(held.map(|held| held.table));
        }
        self.read(tables)
    }

    fn read(&self, tables: BTreeSet<u32>) -> std::result::Result<HashMap<(u32, Key), u64>, Failure> {
        let mut there = HashMap::new();
        for id in tables {
            match self.device.entries_read(id) {
                Ok(entries) => there.extend(entries.into_iter().map(|entry| ((id, entry.key), entry.user))),
                // The table itself could not be made: nothing is in it.
                Err(failure) if failure.status == table::E_NOT_FOUND => {}
                Err(failure) => return Err(failure),
            }
        }
        Ok(there)
    }
}

/// Additions of the same rule behind one whose answer changed: theirs is the same.
pub(super) fn repeat(batch: &Batch, results: &mut [Result<Change>], index: usize) {
    let named = |operation: &Operation| match operation {
        Operation::Add(rule) => rule.cookie,
        Operation::Remove { cookie, .. } => *cookie,
    };
    let Some(cookie) = batch.operations.get(index).map(named) else {
        return;
    };
    let answer = results[index].clone();
    for (at, result) in results.iter_mut().enumerate().skip(index + 1) {
        if batch.operations.get(at).map(named) != Some(cookie) {
            continue;
        }
        if !matches!(result, Ok(Change::Present(_))) {
            return;
        }
        *result = match &answer {
            Ok(Change::Added(placement)) => Ok(Change::Present(placement.clone())),
            Ok(other) => Ok(other.clone()),
            Err(failed) => Err(failed.clone().index(at)),
        };
    }
}
