//! [`Limit`]: a backend with less room than it has, to meet full tables and short batches in tests and to keep a share of
//! a card free in production.
//!
//! A limit is claimed in the capabilities, reported in occupancy and enforced. Parts that have no limit are the inner
//! backend's own. [`Event::HighWater`](dpumesh_core::Event::HighWater) stays the inner backend's, by its own limits.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

use async_trait::async_trait;
use dpumesh_core::backend::EventStream;
use dpumesh_core::offload::{
    Connection, ConnectionState, ConnectionToken, NpOffload, OffloadStats, Program, ProgramInfo, Slot,
    TableEntry, TableId, TableInfo, TableWrite,
};
use dpumesh_core::steering::{
    Atomicity, Batch, BatchOutcome, Change, Cookie, Counters, InstalledRule, MissPolicy, Occupancy,
    Operation, Owner, SteeringRule, Undone, Verdict,
};
use dpumesh_core::{
    Backend, BackendExt, BackendInfo, Capabilities, Effect, Epoch, Error, ErrorKind, Fence, FlowSteering,
    PortRef, Ports, Result, Retry, ShmTransport, VfAllocator,
};
use tokio::sync::Mutex;

/// What to tighten; `None` leaves a limit as it is, and a limit above the backend's own changes nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Rules in all.
    pub rules: Option<u64>,
    /// Longest batch.
    pub batch_max: Option<u32>,
    /// Batch guarantees on offer; [`Atomicity::Continue`] always is.
    pub atomicity: Option<BTreeSet<Atomicity>>,
    /// Connections that the network processor carries.
    pub connections: Option<u64>,
}

/// A backend with tighter limits.
#[derive(Debug)]
pub struct Limit {
    inner: Arc<dyn Backend>,
    parts: Parts,
}

#[derive(Debug)]
struct Parts {
    inner: Arc<dyn Backend>,
    limits: Limits,
    /// Held over looking and acting, so that two callers cannot share the last place.
    turn: Mutex<()>,
}

impl Limit {
    /// Tightens a backend.
    pub fn new(inner: Arc<dyn Backend>, limits: Limits) -> Self {
        let parts = Parts {
            inner: Arc::clone(&inner),
            limits,
            turn: Mutex::new(()),
        };
        Self { inner, parts }
    }
}

impl Backend for Limit {
    fn info(&self) -> BackendInfo {
        self.inner.info()
    }

    fn capabilities(&self) -> Capabilities {
        self.parts.capabilities()
    }

    fn epoch(&self) -> Epoch {
        self.inner.epoch()
    }

    fn vf(&self) -> Option<&dyn VfAllocator> {
        self.inner.vf()
    }

    fn steering(&self) -> Option<&dyn FlowSteering> {
        self.inner.steering().map(|_| &self.parts as _)
    }

    fn offload(&self) -> Option<&dyn NpOffload> {
        self.inner.offload().map(|_| &self.parts as _)
    }

    fn transport(&self) -> Option<&dyn ShmTransport> {
        self.inner.transport()
    }

    fn ports(&self) -> Option<&dyn Ports> {
        self.inner.ports()
    }

    fn events(&self) -> Box<dyn EventStream> {
        self.inner.events()
    }
}

const APPLY: &str = "steering.apply";
const RULES: &str = "steering.rules";
const CONNECTIONS: &str = "offload.connections";

#[async_trait]
impl FlowSteering for Parts {
    async fn validate(&self, rules: &[SteeringRule]) -> Result<Vec<Verdict>> {
        self.inner.require_steering()?.validate(rules).await
    }

    async fn apply(&self, fence: Fence, batch: &Batch) -> Result<BatchOutcome> {
        let steering = self.inner.require_steering()?;
        let offered = self.capabilities().steering;
        check_batch(batch, offered.batch_max, &offered.atomicity)?;
        let Some(limit) = self.limits.rules else {
            return steering.apply(fence, batch).await;
        };
        let _turn = self.turn.lock().await;
        let used = self
            .rules_in_use(steering)
            .await
            .map_err(|error| during(APPLY, error))?;
        let additions = batch.operations.iter().filter(|o| matches!(o, Operation::Add(_)));
        if used + additions.count() as u64 <= limit {
            return steering.apply(fence, batch).await;
        }
        // The fence must be refused even where nothing of the batch gets through.
        steering.apply(fence, &Batch::new(Vec::new())).await?;
        let room = Room { used, limit };
        if batch.atomicity == Atomicity::Continue {
            one_by_one(steering, fence, batch, room).await
        } else {
            all_or_none(steering, fence, batch, room).await
        }
    }

    async fn list(&self, owner: Owner) -> Result<Vec<InstalledRule>> {
        self.inner.require_steering()?.list(owner).await
    }

    async fn counters(&self, owner: Owner, cookies: &[Cookie]) -> Result<Vec<Option<Counters>>> {
        self.inner.require_steering()?.counters(owner, cookies).await
    }

    async fn flush(&self, fence: Fence, owner: Owner) -> Result<u64> {
        self.inner.require_steering()?.flush(fence, owner).await
    }

    async fn set_miss_policy(&self, fence: Fence, port: PortRef, policy: MissPolicy) -> Result<()> {
        let steering = self.inner.require_steering()?;
        steering.set_miss_policy(fence, port, policy).await
    }

    async fn occupancy(&self) -> Result<Vec<Occupancy>> {
        let mut all = self.inner.require_steering()?.occupancy().await?;
        for resource in &mut all {
            let limit = match resource.resource.as_str() {
                RULES | "steering.hardware_rules" => self.limits.rules,
                CONNECTIONS => self.limits.connections,
                _ => None,
            };
            let limit = resource.limit.min(limit.unwrap_or(u64::MAX));
            // A card that held more before it was limited is full, not overfull.
            resource.limit = limit.max(resource.used);
        }
        Ok(all)
    }
}

#[async_trait]
impl NpOffload for Parts {
    async fn programs(&self) -> Result<Vec<ProgramInfo>> {
        self.inner.require_offload()?.programs().await
    }

    async fn load(&self, fence: Fence, slot: Slot, program: &Program) -> Result<ProgramInfo> {
        self.inner.require_offload()?.load(fence, slot, program).await
    }

    async fn activate(&self, fence: Fence, slot: Slot) -> Result<()> {
        self.inner.require_offload()?.activate(fence, slot).await
    }

    async fn unload(&self, fence: Fence, slot: Slot) -> Result<()> {
        self.inner.require_offload()?.unload(fence, slot).await
    }

    async fn tables(&self) -> Result<Vec<TableInfo>> {
        self.inner.require_offload()?.tables().await
    }

    async fn write(
        &self,
        fence: Fence,
        table: TableId,
        entries: &[TableWrite],
    ) -> Result<Vec<Result<(), Error>>> {
        self.inner.require_offload()?.write(fence, table, entries).await
    }

    async fn read(&self, table: TableId) -> Result<Vec<TableEntry>> {
        self.inner.require_offload()?.read(table).await
    }

    async fn offload_connection(&self, fence: Fence, connection: &Connection) -> Result<ConnectionToken> {
        const OFFLOAD: &str = "offload.offload_connection";
        let offload = self.inner.require_offload()?;
        let Some(limit) = self.limits.connections else {
            return offload.offload_connection(fence, connection).await;
        };
        let _turn = self.turn.lock().await;
        let stats = offload.stats().await.map_err(|error| during(OFFLOAD, error))?;
        let used = stats.connections;
        if used < limit {
            return offload.offload_connection(fence, connection).await;
        }
        if fence.0 != self.inner.epoch() {
            return Err(Error::new(
                ErrorKind::Stale,
                OFFLOAD,
                "the fence is of another epoch",
            ));
        }
        let room = Room { used, limit };
        Err(room.full(OFFLOAD, CONNECTIONS))
    }

    async fn resume(&self, fence: Fence, token: ConnectionToken) -> Result<ConnectionState> {
        self.inner.require_offload()?.resume(fence, token).await
    }

    async fn stats(&self) -> Result<OffloadStats> {
        self.inner.require_offload()?.stats().await
    }
}

impl Parts {
    fn capabilities(&self) -> Capabilities {
        let mut capabilities = self.inner.capabilities();
        let steering = &mut capabilities.steering;
        if let Some(rules) = self.limits.rules {
            steering.rules = steering.rules.min(rules);
            steering.hardware_rules = steering.hardware_rules.min(rules);
        }
        if let Some(batch_max) = self.limits.batch_max {
            steering.batch_max = steering.batch_max.min(batch_max);
        }
        if let Some(offered) = &self.limits.atomicity {
            steering
                .atomicity
                .retain(|atomicity| *atomicity == Atomicity::Continue || offered.contains(atomicity));
        }
        if let Some(connections) = self.limits.connections {
            capabilities.offload.connections = capabilities.offload.connections.min(connections);
        }
        capabilities
    }

    async fn rules_in_use(&self, steering: &dyn FlowSteering) -> Result<u64> {
        let occupancy = steering.occupancy().await?;
        let rules = occupancy.iter().find(|resource| resource.resource == RULES);
        rules.map(|resource| resource.used).ok_or_else(|| {
            let message =
                "the backend does not report the occupancy of steering.rules, so no limit can be kept";
            Error::new(ErrorKind::Fault, APPLY, message)
        })
    }
}

/// An error of a look at the card on the way, as the error of the call that looked.
fn during(operation: &'static str, mut error: Error) -> Error {
    error.operation = operation.into();
    error
}

/// Use of a limited resource.
#[derive(Clone, Copy, Debug)]
struct Room {
    used: u64,
    limit: u64,
}

impl Room {
    fn full(self, operation: &'static str, resource: &'static str) -> Error {
        let message = format!("{resource} is full: {} of {}", self.used, self.limit);
        Error::new(ErrorKind::CapacityExceeded, operation, message).object(resource)
    }

    fn is_full(self) -> bool {
        self.used >= self.limit
    }
}

fn check_batch(batch: &Batch, most: u32, offered: &BTreeSet<Atomicity>) -> Result<()> {
    let length = batch.operations.len();
    if length as u64 > most.into() {
        let message = format!("{length} operations are more than the {most} of one batch");
        return Err(Error::new(ErrorKind::CapacityExceeded, APPLY, message)
            .object("steering.batch_max")
            .retry(Retry::Never));
    }
    if batch.atomicity != Atomicity::Continue && !offered.contains(&batch.atomicity) {
        let message = format!("{:?} is not on offer", batch.atomicity);
        return Err(Error::new(ErrorKind::Unsupported, APPLY, message).field("atomicity"));
    }
    Ok(())
}

/// Carries a batch out operation by operation, refusing additions while there is no room.
async fn one_by_one(
    steering: &dyn FlowSteering,
    fence: Fence,
    batch: &Batch,
    mut room: Room,
) -> Result<BatchOutcome> {
    let mut results = Vec::with_capacity(batch.operations.len());
    let mut effect = Effect::None;
    for (index, operation) in batch.operations.iter().enumerate() {
        let partial = |error: Error| {
            if effect == Effect::None {
                error
            } else {
                error.effect(effect)
            }
        };
        if let Operation::Add(rule) = operation
            && room.is_full()
            && !cookies(steering, rule.owner)
                .await
                .map_err(partial)?
                .contains(&rule.cookie)
        {
            results.push(Err(room.full(APPLY, RULES).index(index)));
            continue;
        }
        let single = Batch::new(vec![operation.clone()]);
        let outcome = steering.apply(fence, &single).await.map_err(partial)?;
        let result = outcome.results.into_iter().next().unwrap_or_else(|| {
            let message = "the backend returned no result for the operation";
            Err(Error::new(ErrorKind::Fault, APPLY, message).effect(Effect::Unknown))
        });
        match &result {
            Ok(Change::Added(_)) => room.used += 1,
            Ok(Change::Removed(_)) => room.used = room.used.saturating_sub(1),
            _ => {}
        }
        if matches!(result, Ok(Change::Added(_) | Change::Removed(_))) {
            effect = Effect::Partial;
        }
        results.push(result.map_err(|error| error.index(index)));
    }
    Ok(BatchOutcome::new(results))
}

/// Looks ahead whether every addition of a batch finds room, then carries it out as a whole or refuses it as a whole.
async fn all_or_none(
    steering: &dyn FlowSteering,
    fence: Fence,
    batch: &Batch,
    mut room: Room,
) -> Result<BatchOutcome> {
    let mut there: HashSet<Cookie> = HashSet::new();
    let owners: BTreeSet<Owner> = batch.operations.iter().map(owner).collect();
    for owner in owners {
        there.extend(cookies(steering, owner).await?);
    }
    for (index, operation) in batch.operations.iter().enumerate() {
        match operation {
            Operation::Add(rule) if !there.contains(&rule.cookie) => {
                if room.is_full() {
                    return Ok(refused(batch.operations.len(), index, room));
                }
                there.insert(rule.cookie);
                room.used += 1;
            }
            Operation::Remove { cookie, .. } if there.remove(cookie) => {
                room.used = room.used.saturating_sub(1);
            }
            _ => {}
        }
    }
    steering.apply(fence, batch).await
}

fn refused(operations: usize, at: usize, room: Room) -> BatchOutcome {
    let result = |index| {
        if index == at {
            Err(room.full(APPLY, RULES).index(index))
        } else {
            Ok(Change::Skipped)
        }
    };
    BatchOutcome::new((0..operations).map(result).collect()).undone(Undone::All)
}

fn owner(operation: &Operation) -> Owner {
    match operation {
        Operation::Add(rule) => rule.owner,
        Operation::Remove { owner, .. } => *owner,
    }
}

async fn cookies(steering: &dyn FlowSteering, owner: Owner) -> Result<HashSet<Cookie>> {
    let rules = steering.list(owner).await.map_err(|error| during(APPLY, error))?;
    Ok(rules.into_iter().map(|installed| installed.rule.cookie).collect())
}
