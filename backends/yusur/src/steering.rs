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

mod counting;
mod lives;
mod settle;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use async_trait::async_trait;
use dpumesh_core::steering::{
    Atomicity, Batch, BatchOutcome, Change, Cookie, Counters, Encapsulation, InstalledRule, MissPolicy,
    Occupancy, Operation, Owner, PlacementRequest, SteeringRule, Undone, Verdict,
};
use dpumesh_core::{BackendExt, Effect, Error, ErrorKind, Fence, FlowSteering, PortRef, Result};

use crate::entry::number_of_port;
use crate::error::error;
use crate::rules::{Decision, Rules, Script, Soft};
use crate::sys::Failure;
use crate::table::{self, Tunnel};
use crate::tables::Setup;
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
}

/// Outcome of a batch that was undone: what failed says so, everything else was skipped.
fn rolled_back(mut results: Vec<Result<Change>>, operations: usize, undone: Undone) -> BatchOutcome {
    for result in results.iter_mut().filter(|result| result.is_ok()) {
        *result = Ok(Change::Skipped);
    }
    results.resize_with(operations, || Ok(Change::Skipped));
    BatchOutcome::new(results).undone(undone)
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
