//! [`FlowSteering`]: rules in the processor's tables, and in the floor's software what does not fit there.
//!
//! A batch goes through four steps on the worker's thread:
//!
//! ```text
//! ask software ─► decide (Rules, no I/O) ─► software: all of it ─► card: tables, tunnels, counters, then entries
//!  (validate)                                                        └─ not all done? read the tables and see
//! ```
//!
//! The library tells of a batch only how many entries were done, how many failed, and the first error. When some failed,
//! the tables are read back, so each operation gets its own answer all the same: a rule that the card did not take acts
//! in software, or is refused where it may not.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use async_trait::async_trait;
use dpumesh_core::steering::{
    Action, Atomicity, Batch, BatchOutcome, Change, Cookie, Counters, Encapsulation, InstalledRule,
    MissPolicy, Occupancy, Operation, Owner, PlacementRequest, SteeringRule, Undone, Verdict,
};
use dpumesh_core::{
    BackendExt, Capabilities, CounterUnit, Effect, Epoch, Error, ErrorKind, Event, Fence, FlowSteering,
    PortRef, Result,
};

use crate::entry::number_of_port;
use crate::error::{NAME, error};
use crate::rules::{Decision, Done, Rules, Script, Soft};
use crate::sys::Failure;
use crate::table::{self, Key, Tunnel};
use crate::tables::{Held, Setup};
use crate::worker::{Asker, Shared, Worker};

const APPLY: &str = "steering.apply";

/// Longest batch that is taken.
pub(crate) const BATCH_MAX: u32 = 1024;

/// The steering part.
#[derive(Debug)]
pub(crate) struct Steering {
    pub(crate) asker: Asker,
    pub(crate) shared: Arc<Shared>,
}

#[async_trait]
impl FlowSteering for Steering {
    async fn validate(&self, rules: &[SteeringRule]) -> Result<Vec<Verdict>> {
        let life = self.shared.present("steering.validate")?;
        let soft = software_says(&self.shared, rules.iter()).await?;
        let verdicts = rules.iter().zip(&soft);
        Ok(verdicts
            .map(|(rule, soft)| Rules::judge(rule, &life.limits, &life.capabilities.steering, soft))
            .collect())
    }

    async fn apply(&self, fence: Fence, batch: &Batch) -> Result<BatchOutcome> {
        self.shared.fenced(fence, APPLY)?;
        let batch = batch.clone();
        self.asker
            .ask(APPLY, move |worker| {
                Box::pin(async move {
                    worker.shared.fenced(fence, APPLY)?;
                    let outcome = worker.apply(&batch).await;
                    worker.look_at_marks();
                    outcome
                })
            })
            .await
    }

    async fn list(&self, owner: Owner) -> Result<Vec<InstalledRule>> {
        const LIST: &str = "steering.list";
        self.shared.present(LIST)?;
        self.asker
            .ask(LIST, move |worker| {
                Box::pin(async move {
                    worker.shared.present(LIST)?;
                    worker.look_again(LIST).await?;
                    Ok(worker.rules.list(owner))
                })
            })
            .await
    }

    async fn counters(&self, owner: Owner, cookies: &[Cookie]) -> Result<Vec<Option<Counters>>> {
        const COUNTERS: &str = "steering.counters";
        self.shared.present(COUNTERS)?;
        let cookies = cookies.to_vec();
        self.asker
            .ask(COUNTERS, move |worker| {
                Box::pin(async move {
                    worker.shared.present(COUNTERS)?;
                    worker.counters(owner, &cookies).await
                })
            })
            .await
    }

    async fn flush(&self, fence: Fence, owner: Owner) -> Result<u64> {
        const FLUSH: &str = "steering.flush";
        self.shared.fenced(fence, FLUSH)?;
        self.asker
            .ask(FLUSH, move |worker| {
                Box::pin(async move {
                    worker.shared.fenced(fence, FLUSH)?;
                    worker.flush(owner).await
                })
            })
            .await
    }

    async fn set_miss_policy(&self, fence: Fence, port: PortRef, policy: MissPolicy) -> Result<()> {
        const SET: &str = "steering.set_miss_policy";
        self.shared.fenced(fence, SET)?;
        self.asker
            .ask(SET, move |worker| {
                Box::pin(async move {
                    worker.shared.fenced(fence, SET)?;
                    worker.set_miss_policy(port, policy).await
                })
            })
            .await
    }

    async fn occupancy(&self) -> Result<Vec<Occupancy>> {
        const OCCUPANCY: &str = "steering.occupancy";
        self.shared.present(OCCUPANCY)?;
        self.asker
            .ask(OCCUPANCY, move |worker| {
                Box::pin(async move {
                    worker.shared.present(OCCUPANCY)?;
                    worker.occupancy().await
                })
            })
            .await
    }
}

/// Software's word on rules, as it would get them; `None` for each without software.
async fn software_says<'a>(
    shared: &Shared,
    rules: impl ExactSizeIterator<Item = &'a SteeringRule>,
) -> Result<Vec<Soft>> {
    let steering = shared.floor.as_ref().and_then(|floor| floor.steering());
    let Some(steering) = steering else {
        return Ok(vec![None; rules.len()]);
    };
    let copies: Vec<SteeringRule> = rules
        .map(|rule| SteeringRule {
            placement: PlacementRequest::Software,
            ..rule.clone()
        })
        .collect();
    let verdicts = steering.validate(&copies).await?;
    Ok(verdicts.into_iter().map(Some).collect())
}

/// What the card made of a script.
#[derive(Debug, Default)]
struct Told {
    /// Operations that software refused.
    soft_failed: BTreeMap<usize, Error>,
    /// What software had counted for rules that it gave up.
    soft_final: HashMap<usize, Counters>,
    /// The first failure of the card, if any: then the tables have to be looked at.
    hard_failed: Option<Failure>,
}

impl Worker {
    /// Carries out a batch; the card is there and the fence is good.
    pub(crate) async fn apply(&mut self, batch: &Batch) -> Result<BatchOutcome> {
        self.look_again(APPLY).await?;
        let outcome = self.carry_out(batch).await;
        self.rules.tables.settle();
        outcome
    }

    async fn carry_out(&mut self, batch: &Batch) -> Result<BatchOutcome> {
        if batch.operations.len() > BATCH_MAX as usize {
            self.rules.decide(batch, &[])?; // refuses it
        }
        let soft = self.software_on(batch).await?;
        let mut decision = self.rules.decide(batch, &soft)?;
        if decision.failed {
            let setups = Script {
                setups: std::mem::take(&mut decision.script.setups),
                ..Script::default()
            };
            let _ = self.tell(setups).await; // tables that stay in the books; nothing acts in them
            return Ok(rolled_back(decision.results, batch.operations.len(), Undone::All));
        }
        let script = std::mem::take(&mut decision.script);
        let told = self.tell(script).await;
        if let Some(lost) = told
            .hard_failed
            .as_ref()
            .filter(|failure| crate::error::is_lost(failure))
        {
            let lost = lost.clone();
            return Err(self.failed(APPLY, lost).effect(Effect::Unknown));
        }
        self.settle_results(batch, &mut decision, &told).await?;
        if batch.atomicity != Atomicity::Continue && decision.results.iter().any(Result::is_err) {
            return Ok(self.undo(decision, batch.operations.len()).await);
        }
        self.finish(batch, &mut decision, &told)?;
        Ok(BatchOutcome::new(decision.results))
    }

    /// Software's word on the additions of a batch, one answer per operation.
    async fn software_on(&self, batch: &Batch) -> Result<Vec<Soft>> {
        let rules: Vec<&SteeringRule> = batch
            .operations
            .iter()
            .filter_map(|operation| match operation {
                Operation::Add(rule) => Some(rule),
                Operation::Remove { .. } => None,
            })
            .collect();
        let mut answers = software_says(&self.shared, rules.into_iter()).await?.into_iter();
        let answer = |operation: &Operation| match operation {
            Operation::Add(_) => answers.next().flatten(),
            Operation::Remove { .. } => None,
        };
        Ok(batch.operations.iter().map(answer).collect())
    }

    /// Tells software and card; goes on after failures.
    async fn tell(&mut self, script: Script) -> Told {
        let mut told = Told::default();
        self.tell_software(script.soft, &mut told).await;
        for setup in &script.setups {
            if let Err(failure) = self.set_up(setup) {
                told.hard_failed.get_or_insert(failure);
                if let Setup::Create(table) = setup {
                    self.rules.tables.was_not_made(table.id);
                }
            }
        }
        // An entry may need the table or tunnel that could not be set up, and with a number used again find a former one.
        let is_set_up = told.hard_failed.is_none();
        let mut writes = Vec::with_capacity(script.writes.len());
        for (index, entry) in script.writes {
            if entry.op == table::OP_DELETE {
                if self.rules.tables.is_made(entry.table) {
                    writes.push(entry);
                }
            } else if !told.soft_failed.contains_key(&index) && is_set_up {
                writes.push(entry);
            }
        }
        for chunk in writes.chunks(self.rules.tables.limits().batch_max.max(1) as usize) {
            match self.device.entries_write(self.generation, chunk) {
                Ok(result) if result.failed == 0 && result.done == chunk.len() as u64 => {}
                Ok(result) => {
                    let status = result.first_error;
                    told.hard_failed.get_or_insert_with(|| Failure {
                        function: "entries_write",
                        status,
                        text: self.device.text(status),
                    });
                }
                Err(failure) => {
                    told.hard_failed.get_or_insert(failure);
                }
            }
        }
        told
    }

    async fn tell_software(&mut self, operations: Vec<(usize, Operation)>, told: &mut Told) {
        let Some(floor) = self.soft().cloned() else { return };
        let Some(steering) = floor.steering() else { return };
        let longest = floor.capabilities().steering.batch_max.max(1) as usize;
        let (indices, operations): (Vec<usize>, Vec<Operation>) = operations.into_iter().unzip();
        for (indices, operations) in indices.chunks(longest).zip(operations.chunks(longest)) {
            match steering
                .apply(floor.fence(), &Batch::new(operations.to_vec()))
                .await
            {
                Ok(outcome) => {
                    for (index, result) in indices.iter().zip(outcome.results) {
                        match result {
                            Ok(Change::Removed(Some(counters))) => {
                                told.soft_final.insert(*index, counters);
                            }
                            Ok(_) => {}
                            Err(failed) => {
                                told.soft_failed.entry(*index).or_insert(failed);
                            }
                        }
                    }
                }
                Err(failed) => {
                    for index in indices {
                        told.soft_failed.entry(*index).or_insert_with(|| failed.clone());
                    }
                }
            }
        }
    }

    fn set_up(&self, setup: &Setup) -> std::result::Result<(), Failure> {
        let (device, generation) = (&self.device, self.generation);
        match setup {
            Setup::Destroy(id) => device.table_destroy(generation, *id),
            Setup::Create(table) => device.table_create(generation, table),
            Setup::Tunnel(id, outer) => device.tunnel_set(generation, *id, &tunnel(outer)),
            Setup::Clear(id) => device.counters_clear(generation, &[*id]),
        }
    }

    /// Gives each operation its answer after software or card did not do everything.
    async fn settle_results(&mut self, batch: &Batch, decision: &mut Decision, told: &Told) -> Result<()> {
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
    fn read_back(&self, log: &[(usize, Done)]) -> std::result::Result<HashMap<(u32, Key), u64>, Failure> {
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

    /// Undoes a batch of which something failed on the card.
    async fn undo(&mut self, decision: Decision, operations: usize) -> BatchOutcome {
        let script = self.rules.take_back(decision.log);
        let told = self.tell(script).await;
        self.unsure |= told.hard_failed.is_some();
        let failed = match (told.hard_failed, told.soft_failed.into_values().next()) {
            (Some(failure), _) => Some(self.failed(APPLY, failure).effect(Effect::Partial)),
            (None, failed) => failed,
        };
        let undone = failed.map_or(Undone::All, |failed| Undone::Failed(Box::new(failed)));
        rolled_back(decision.results, operations, undone)
    }

    /// Final counters of what was removed, and what demoted rules take along.
    fn finish(&mut self, batch: &Batch, decision: &mut Decision, told: &Told) -> Result<()> {
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
    fn carry(&mut self, log: &[(usize, Done)]) {
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

    fn soft_unit(&self) -> CounterUnit {
        let floor = self
            .soft()
            .map(|floor| floor.capabilities().steering.counter_unit);
        floor.unwrap_or_default()
    }

    async fn counters(&mut self, owner: Owner, cookies: &[Cookie]) -> Result<Vec<Option<Counters>>> {
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

    async fn soft_counters(&self, owner: Owner, cookies: &[Cookie]) -> Result<Vec<(u64, u64)>> {
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

    async fn flush(&mut self, owner: Owner) -> Result<u64> {
        let cookies: Vec<Cookie> = self
            .rules
            .list(owner)
            .iter()
            .map(|listed| listed.rule.cookie)
            .collect();
        let mut removed = 0;
        for chunk in cookies.chunks(BATCH_MAX as usize) {
            let remove = |cookie: &Cookie| Operation::Remove {
                owner,
                cookie: *cookie,
            };
            let batch = Batch::new(chunk.iter().map(remove).collect());
            let partial = |failed: Error, removed: u64| {
                let effect = if removed > 0 {
                    Effect::Partial
                } else {
                    failed.effect
                };
                let mut failed = failed.effect(effect);
                failed.operation = "steering.flush".into();
                failed
            };
            let outcome = self
                .apply(&batch)
                .await
                .map_err(|failed| partial(failed, removed))?;
            for result in outcome.results {
                match result {
                    Ok(_) => removed += 1,
                    Err(failed) => return Err(partial(failed, removed)),
                }
            }
        }
        self.look_at_marks();
        Ok(removed)
    }

    async fn set_miss_policy(&mut self, port: PortRef, policy: MissPolicy) -> Result<()> {
        const SET: &str = "steering.set_miss_policy";
        if let Some(floor) = self.soft().cloned()
            && let Some(steering) = floor.steering()
        {
            // The card hands every miss to software, which knows the port's policy.
            return steering.set_miss_policy(floor.fence(), port, policy).await;
        }
        if let Some(floor) = &self.shared.floor
            && let Some(ports) = floor.ports()
            && !ports.list().await?.iter().any(|info| info.port == port)
        {
            return Err(error(ErrorKind::NotFound, SET, "there is no such port").object(port));
        }
        let miss = match policy {
            MissPolicy::Drop => table::MISS_DROP,
            MissPolicy::Software => table::MISS_SOC,
        };
        let set = self.device.miss_set(self.generation, number_of_port(port), miss);
        set.map_err(|failure| self.failed(SET, failure).object(port))
    }

    async fn occupancy(&mut self) -> Result<Vec<Occupancy>> {
        let mut all = self.rules.occupancy();
        let limits = self.shared.life().limits;
        if limits.slots > 0 {
            let count = self.device.connection_count();
            let (connections, _) = count.map_err(|failure| self.failed("steering.occupancy", failure))?;
            all.push(Occupancy {
                resource: "offload.connections".to_owned(),
                used: connections,
                limit: limits.connections,
            });
        }
        if let Some(steering) = self.shared.floor.as_ref().and_then(|floor| floor.steering()) {
            let floor = steering.occupancy().await?;
            all.extend(floor.into_iter().filter(|resource| {
                !resource.resource.starts_with("steering.") && !resource.resource.starts_with("offload.")
            }));
        }
        Ok(all)
    }

    /// The card says that nothing hit a rule for its idle time.
    pub(crate) async fn aged(&mut self, user: u64) {
        let Some((owner, cookie)) = self.rules.named(user) else {
            return; // removed meanwhile
        };
        let batch = Batch::new(vec![Operation::Remove { owner, cookie }]);
        let Ok(outcome) = self.apply(&batch).await else {
            return; // the card is away: its rules begin a new life
        };
        if let Some(Ok(Change::Removed(counters))) = outcome.results.into_iter().next() {
            let rules = vec![(cookie, counters)];
            self.shared.raise(&Event::Aged { owner, rules });
        }
    }

    /// Software removed rules that nothing hit.
    pub(crate) fn aged_in_software(&mut self, owner: Owner, aged: Vec<(Cookie, Option<Counters>)>) {
        let epoch = self.shared.life().epoch;
        let unit = self.soft_unit();
        let mut gone = Vec::new();
        for (cookie, counters) in aged {
            let Some(rule) = self
                .rules
                .rule_of(owner, cookie)
                .filter(|rule| rule.hard.is_none())
            else {
                continue;
            };
            let (carried, base) = (rule.carried, rule.base);
            let counters = counters.map(|counters| {
                let soft = in_l2((counters.packets, counters.octets), unit);
                total(&[carried, since(soft, base)], epoch)
            });
            let remove = Batch::new(vec![Operation::Remove { owner, cookie }]);
            // In the books only: software has done it.
            if self.rules.decide(&remove, &[]).is_ok() {
                gone.push((cookie, counters));
            }
        }
        self.rules.tables.settle();
        if !gone.is_empty() {
            self.shared.raise(&Event::Aged { owner, rules: gone });
        }
    }

    /// Puts the rules of the former life into the present one and says how many there are.
    pub(crate) async fn replay(
        &mut self,
        former: &Rules,
        capabilities: &Capabilities,
        same_floor: bool,
    ) -> Result<usize> {
        let mut rules: Vec<Arc<SteeringRule>> = former.all().map(|rule| Arc::clone(&rule.rule)).collect();
        // Winners first: a rule then finds those that keep it out of hardware, instead of being demoted by them.
        rules.sort_unstable_by_key(|rule| (rule.group, rule.priority, rule.cookie));
        let longest = capabilities.steering.batch_max.max(1) as usize;
        let mut refused: Vec<Operation> = Vec::new();
        let mut count = 0;
        for chunk in rules.chunks(longest) {
            if same_floor {
                self.forget_timed(chunk).await?;
            }
            let add = |rule: &Arc<SteeringRule>| Operation::Add((**rule).clone());
            let outcome = self.apply(&Batch::new(chunk.iter().map(add).collect())).await?;
            for (rule, result) in chunk.iter().zip(outcome.results) {
                match result {
                    Ok(_) => count += 1,
                    Err(_) if self.rules.rule_of(rule.owner, rule.cookie).is_some() => count += 1,
                    Err(failed) => {
                        tracing::warn!(cookie = %rule.cookie, %failed, "a rule did not come back");
                        refused.push(Operation::Remove {
                            owner: rule.owner,
                            cookie: rule.cookie,
                        });
                    }
                }
            }
        }
        if same_floor {
            let _ = self
                .tell(Script {
                    soft: refused.into_iter().map(|operation| (0, operation)).collect(),
                    ..Script::default()
                })
                .await;
            self.rebase().await?;
        }
        Ok(count)
    }

    /// Software's copies of rules that age differ by where the rule is: they are made anew.
    async fn forget_timed(&mut self, rules: &[Arc<SteeringRule>]) -> Result<()> {
        let timed = rules.iter().filter(|rule| rule.idle_timeout_ms.is_some());
        let soft: Vec<(usize, Operation)> = timed
            .map(|rule| {
                let (owner, cookie) = (rule.owner, rule.cookie);
                (0, Operation::Remove { owner, cookie })
            })
            .collect();
        let told = self
            .tell(Script {
                soft,
                ..Script::default()
            })
            .await;
        match told
            .soft_failed
            .into_values()
            .find(|failed| failed.kind == ErrorKind::DeviceLost)
        {
            Some(lost) => Err(lost),
            None => Ok(()),
        }
    }

    /// What software has counted so far belongs to the former life.
    async fn rebase(&mut self) -> Result<()> {
        let mut by_owner: BTreeMap<Owner, Vec<Cookie>> = BTreeMap::new();
        for rule in self.rules.all().filter(|rule| rule.soft && counts(&rule.rule)) {
            by_owner
                .entry(rule.rule.owner)
                .or_default()
                .push(rule.rule.cookie);
        }
        let mut bases: HashMap<Cookie, (u64, u64)> = HashMap::new();
        for (owner, cookies) in by_owner {
            let counted = self.soft_counters(owner, &cookies).await?;
            bases.extend(cookies.into_iter().zip(counted));
        }
        for rule in self.rules.all_mut() {
            rule.base = bases.get(&rule.rule.cookie).copied().unwrap_or_default();
        }
        Ok(())
    }
}

/// Additions of the same rule behind one whose answer changed: theirs is the same.
fn repeat(batch: &Batch, results: &mut [Result<Change>], index: usize) {
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

/// Outcome of a batch that was undone: what failed says so, everything else was skipped.
fn rolled_back(mut results: Vec<Result<Change>>, operations: usize, undone: Undone) -> BatchOutcome {
    for result in results.iter_mut().filter(|result| result.is_ok()) {
        *result = Ok(Change::Skipped);
    }
    results.resize_with(operations, || Ok(Change::Skipped));
    BatchOutcome::new(results).undone(undone)
}

fn counts(rule: &SteeringRule) -> bool {
    rule.actions.contains(&Action::Count)
}

fn total(parts: &[(u64, u64)], epoch: Epoch) -> Counters {
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

fn since(counted: (u64, u64), base: (u64, u64)) -> (u64, u64) {
    (counted.0.saturating_sub(base.0), counted.1.saturating_sub(base.1))
}

/// Octets with the Ethernet header, which the processor's counters have. A tag, which L3 counters do not tell, is left out.
fn in_l2(counted: (u64, u64), unit: CounterUnit) -> (u64, u64) {
    match unit {
        CounterUnit::L2 => counted,
        CounterUnit::L3 => (counted.0, counted.1 + 14 * counted.0),
    }
}

fn tunnel(outer: &Encapsulation) -> Tunnel {
    let octets = |address: std::net::IpAddr| match address {
        std::net::IpAddr::V4(v4) => {
            let mut octets = [0; 16];
            octets[..4].copy_from_slice(&v4.octets());
            octets
        }
        std::net::IpAddr::V6(v6) => v6.octets(),
    };
    Tunnel {
        vni: outer.vni.get(),
        ip_version: if outer.local.is_ipv4() { 4 } else { 6 },
        local: octets(outer.local),
        remote: octets(outer.remote),
        eth_src: outer.eth_src.0,
        eth_dst: outer.eth_dst.0,
        reserved: 0,
    }
}
