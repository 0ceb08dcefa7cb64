//! [`SoftSteering`]: the steering trait over an [`Engine`](super::Engine).
//!
//! The rules live twice: in a [`RuleStore`], which decides every batch by the contract and the card's limits, and in the
//! engine, which mirrors what was decided between two batches of frames. A rule that the engine refuses (its classifier
//! has no mask left) is taken back from the store, so both always agree; also when the caller stopped waiting in
//! between: the next call takes in what became of its batch.
//!
//! Every batch is atomic for frames, except one with [`Atomicity::Continue`] of which the engine refused a rule: the rest
//! of that is carried out in pieces.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use dpumesh_core::steering::{
    Atomicity, Batch, BatchOutcome, Change, Cookie, Counters, Field, InstalledRule, MissPolicy, Occupancy,
    Operation, Owner, SteeringRule, Undone, Verdict,
};
use dpumesh_core::{
    ActionKinds, CounterUnit, Effect, Epoch, Error, ErrorKind, Fence, FlowSteering, MatchKinds, PortRef,
    Result, SteeringCapabilities,
};
use tokio::sync::{Mutex, MutexGuard, oneshot};

use super::handle::{EngineGone, EngineHandle, Readings, RuleChange, RuleReading, RulesChanged};
use super::rules::{Refused, refusal};
use crate::events::EventHub;
use crate::steering::{Plan, Removal, RuleStore, TableChange};

/// Steering rules of a software dataplane, with the limits of the card that it stands for.
#[derive(Debug)]
pub struct SoftSteering {
    backend: &'static str,
    engine: EngineHandle,
    epoch: Epoch,
    events: Arc<EventHub>,
    started: Instant,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    store: RuleStore,
    /// What the engine's counters showed last, by slot.
    seen: HashMap<u32, (u64, u64)>,
    /// The plan that the engine has not answered yet.
    unsettled: Option<(Plan, oneshot::Receiver<RulesChanged>)>,
}

/// What became of a plan: its outcome, or the operation that the engine refused; the store is as before then.
type Settled = std::result::Result<BatchOutcome, (usize, Refused)>;

/// What the software dataplane can do without an NP in front of it: `rules` rules, none of them in hardware.
///
/// An emulated card overrides the hardware limits with its profile's.
pub fn software_capabilities(rules: u64) -> SteeringCapabilities {
    use MatchKinds as M;
    let any = M::EXACT | M::PREFIX | M::MASK;
    let fields = [
        (Field::Port, M::EXACT),
        (Field::EthSrc, any),
        (Field::EthDst, any),
        (Field::Ethertype, M::EXACT),
        (Field::Vlan, M::EXACT),
        (Field::Vni, M::EXACT),
        (Field::Ip4Src, any),
        (Field::Ip4Dst, any),
        (Field::Ip6Src, any),
        (Field::Ip6Dst, any),
        (Field::IpProto, M::EXACT),
        (Field::Dscp, M::EXACT),
        (Field::Fragment, M::EXACT),
        (Field::L4Src, M::EXACT | M::RANGE),
        (Field::L4Dst, M::EXACT | M::RANGE),
        (Field::TcpFlags, any),
        (Field::Mark, any),
    ];
    let mut capabilities = SteeringCapabilities::default();
    capabilities.rules = rules;
    capabilities.groups = 1 << 10;
    capabilities.priorities = 1 << 16;
    capabilities.counters = rules;
    capabilities.counter_unit = CounterUnit::L2;
    capabilities.fields = fields.into();
    capabilities.actions = ActionKinds::DROP
        | ActionKinds::FORWARD
        | ActionKinds::PUNT
        | ActionKinds::JUMP
        | ActionKinds::VXLAN
        | ActionKinds::REWRITE_ETH
        | ActionKinds::REWRITE_IP
        | ActionKinds::REWRITE_DSCP
        | ActionKinds::TTL
        | ActionKinds::VLAN
        | ActionKinds::MARK
        | ActionKinds::COUNT;
    capabilities.atomicity = [Atomicity::Continue, Atomicity::Rollback, Atomicity::Atomic].into();
    capabilities.batch_max = 1 << 16;
    capabilities.per_operation_status = true;
    capabilities.idle_timeout = true;
    capabilities.software_fallback = true;
    capabilities
}

impl SoftSteering {
    /// Steering over an engine, with a card's limits, in one life of that card. Its events go to `events`.
    pub fn new(
        backend: &'static str,
        engine: EngineHandle,
        limits: SteeringCapabilities,
        epoch: Epoch,
        events: impl Into<Arc<EventHub>>,
    ) -> Self {
        let store = RuleStore::new(backend, limits, epoch);
        let state = State {
            store,
            seen: HashMap::new(),
            unsettled: None,
        };
        Self {
            backend,
            engine,
            epoch,
            events: events.into(),
            started: Instant::now(),
            state: Mutex::new(state),
        }
    }

    /// Removes rules that were not hit for their idle timeout, and raises [`Aged`](dpumesh_core::Event::Aged). Call it about once a second: a
    /// rule leaves with the first call after its timeout.
    ///
    /// # Errors
    /// `DeviceLost`: the engine has stopped.
    pub async fn maintain(&self) -> Result<()> {
        const OPERATION: &str = "steering.maintain";
        let mut state = self.state().await;
        let ageing = state
            .store
            .rules()
            .filter(|(_, rule, _)| rule.idle_timeout_ms.is_some());
        let ageing: Vec<u32> = ageing.map(|(slot, ..)| slot).collect();
        if ageing.is_empty() {
            return Ok(());
        }
        self.synchronise(&mut state, ageing, OPERATION).await?;
        let removals = state.store.age(self.now_ms());
        let removals = self.uninstall(&mut state, removals, OPERATION).await?;
        for event in Removal::aged(&removals) {
            self.events.raise(&event);
        }
        Ok(())
    }

    /// The state, with every plan settled.
    async fn state(&self) -> MutexGuard<'_, State> {
        let mut state = self.state.lock().await;
        let _ = self.settle(&mut state).await; // whoever it was for has stopped waiting
        state
    }

    fn now_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    fn fence(&self, fence: Fence, operation: &'static str) -> Result<()> {
        if fence.0 == self.epoch {
            return Ok(());
        }
        let message = format!(
            "epoch {} is not the card's present one, {}",
            fence.0.0, self.epoch.0
        );
        Err(Error::new(ErrorKind::Stale, operation, message).backend(self.backend))
    }

    fn gone(&self, operation: &'static str) -> impl FnOnce(EngineGone) -> Error {
        let backend = self.backend;
        move |gone| {
            Error::new(ErrorKind::DeviceLost, operation, "the dataplane has stopped")
                .backend(backend)
                .source(gone)
        }
    }

    /// Carries the engine's counters over to the store.
    async fn synchronise(&self, state: &mut State, slots: Vec<u32>, operation: &'static str) -> Result<()> {
        let readings = self
            .engine
            .read_counters(slots)
            .await
            .map_err(self.gone(operation))?;
        self.record(state, &readings);
        Ok(())
    }

    fn record(&self, state: &mut State, readings: &Readings) {
        let now = self.now_ms();
        for (slot, reading) in readings {
            let seen = state.seen.entry(*slot).or_default();
            let (packets, octets) = (reading.packets - seen.0, reading.octets - seen.1);
            *seen = (reading.packets, reading.octets);
            if packets > 0 {
                state.store.record(
                    *slot,
                    packets,
                    octets,
                    now.saturating_sub(reading.idle_ms.unwrap_or(0)),
                );
            }
        }
    }

    /// Uninstalls what left the store, and returns it with final counters. The engine never refuses that.
    async fn uninstall(
        &self,
        state: &mut State,
        mut removals: Vec<Removal>,
        operation: &'static str,
    ) -> Result<Vec<Removal>> {
        if removals.is_empty() {
            return Ok(removals);
        }
        let changes = removals
            .iter()
            .map(|removal| RuleChange::Uninstall { slot: removal.slot })
            .collect();
        let answer = self.engine.change_rules(changes).map_err(self.gone(operation))?;
        let slots = removals.iter().map(|removal| removal.slot);
        let seen: Vec<(u64, u64)> = slots
            .map(|slot| state.seen.remove(&slot).unwrap_or_default())
            .collect();
        let readings = answer
            .await
            .map_err(|_| self.gone(operation)(EngineGone))?
            .unwrap_or_default();
        for ((removal, seen), (_, last)) in removals.iter_mut().zip(seen).zip(readings) {
            if let Some(counters) = &mut removal.counters {
                run_on(counters, seen, last);
            }
        }
        Ok(removals)
    }

    /// One attempt at a batch.
    async fn attempt(&self, state: &mut State, batch: &Batch) -> Result<Settled> {
        let plan = state.store.apply(batch, self.now_ms())?;
        if plan.changes.is_empty() {
            return Ok(Ok(plan.outcome));
        }
        match self
            .engine
            .change_rules(plan.changes.iter().map(mirror).collect())
        {
            Ok(answer) => state.unsettled = Some((plan, answer)),
            Err(gone) => {
                let _ = state.store.undo(plan); // the lock is held: nothing came between
                return Err(self.gone(APPLY)(gone));
            }
        }
        let settled = self.settle(state).await.unwrap_or(Err(EngineGone)); // it is there: see above
        settled.map_err(self.gone(APPLY))
    }

    /// Waits for the engine's answer to the last plan, if it is still out, and brings the store in line with it.
    /// Cancelling leaves it for the next call.
    async fn settle(&self, state: &mut State) -> Option<std::result::Result<Settled, EngineGone>> {
        let answer = (&mut state.unsettled.as_mut()?.1).await;
        let (plan, _) = state.unsettled.take()?;
        let settled = match answer {
            Ok(Ok(readings)) => Ok(Ok(finish(state, plan, &readings))),
            Ok(Err((change, refused))) => {
                let operation = operation_of(&plan, change);
                let _ = state.store.undo(plan); // it was the store's last change: nothing gets past an unsettled plan
                Ok(Err((operation, refused)))
            }
            Err(_) => {
                let _ = state.store.undo(plan); // as above
                Err(EngineGone)
            }
        };
        for event in state.store.high_water() {
            self.events.raise(&event);
        }
        Some(settled)
    }

    /// Carries out operations of which the engine refuses some, in pieces that shrink to a refused one and grow again:
    /// no operation is tried more than a few times.
    async fn piecemeal(
        &self,
        state: &mut State,
        operations: &[Operation],
        first: usize,
    ) -> Result<BatchOutcome> {
        let (mut results, mut piece) = (Vec::with_capacity(operations.len()), first.max(1));
        while results.len() < operations.len() {
            let done = results.len();
            let rest = &operations[done..];
            let batch = Batch::new(rest[..piece.min(rest.len())].to_vec());
            match self
                .attempt(state, &batch)
                .await
                .map_err(|error| error.effect(Effect::Partial))?
            {
                Ok(outcome) => {
                    let placed = outcome.results.into_iter().zip(done..);
                    results.extend(placed.map(|(result, at)| result.map_err(|error| error.index(at))));
                    piece *= 2;
                }
                Err((_, refused)) if batch.operations.len() == 1 => {
                    results.push(Err(self.refused(done, refused)))
                }
                Err((at, _)) => piece = at.max(1),
            }
        }
        Ok(BatchOutcome::new(results))
    }

    fn refused(&self, operation: usize, refused: Refused) -> Error {
        let kind = if refused.full {
            ErrorKind::CapacityExceeded
        } else {
            ErrorKind::Unsupported
        };
        let error = Error::new(kind, APPLY, refused.reason).backend(self.backend);
        error.object("operations").index(operation).field(refused.field)
    }
}

const APPLY: &str = "steering.apply";

/// The outcome of a plan that the engine carried out, with the counters that ran on until it did.
fn finish(state: &mut State, mut plan: Plan, readings: &Readings) -> BatchOutcome {
    let removed = plan.changes.iter().filter_map(|change| match change {
        TableChange::Uninstalled { slot, operation } => Some((slot, *operation)),
        TableChange::Installed { .. } => None,
    });
    for ((slot, operation), (_, last)) in removed.zip(readings) {
        let seen = state.seen.remove(slot).unwrap_or_default();
        if let Some(Ok(Change::Removed(Some(counters)))) = plan.outcome.results.get_mut(operation) {
            run_on(counters, seen, *last);
        }
    }
    plan.outcome
}

/// Brings counters from what the engine showed when they were read to what it shows now.
fn run_on(counters: &mut Counters, seen: (u64, u64), last: RuleReading) {
    counters.packets += last.packets - seen.0;
    counters.octets += last.octets - seen.1;
    counters.idle_ms = last.idle_ms;
}

/// The operation that made a change.
fn operation_of(plan: &Plan, change: usize) -> usize {
    let changed = |result: &Result<Change>| matches!(result, Ok(Change::Added(_) | Change::Removed(_)));
    let mut operations = plan
        .outcome
        .results
        .iter()
        .enumerate()
        .filter(|(_, result)| changed(result));
    operations.nth(change).map_or(0, |(operation, _)| operation) // each change has one
}

fn mirror(change: &TableChange) -> RuleChange {
    match change {
        TableChange::Installed { slot, rule, .. } => RuleChange::Install {
            slot: *slot,
            rule: Arc::clone(rule),
        },
        TableChange::Uninstalled { slot, .. } => RuleChange::Uninstall { slot: *slot },
    }
}

#[async_trait]
impl FlowSteering for SoftSteering {
    async fn validate(&self, rules: &[SteeringRule]) -> Result<Vec<Verdict>> {
        let state = self.state().await;
        let judge = |rule| match state.store.judge(rule) {
            verdict @ Verdict::No { .. } => verdict,
            verdict => match refusal(rule) {
                Some(Refused { field, reason, .. }) => Verdict::No { field, reason },
                None => verdict,
            },
        };
        Ok(rules.iter().map(judge).collect())
    }

    async fn apply(&self, fence: Fence, batch: &Batch) -> Result<BatchOutcome> {
        self.fence(fence, APPLY)?;
        let mut state = self.state().await;
        match self.attempt(&mut state, batch).await? {
            Ok(outcome) => Ok(outcome),
            Err((at, _)) if batch.atomicity == Atomicity::Continue => {
                self.piecemeal(&mut state, &batch.operations, at).await
            }
            Err((at, refused)) => Ok(all_undone(batch.operations.len(), at, self.refused(at, refused))),
        }
    }

    async fn list(&self, owner: Owner) -> Result<Vec<InstalledRule>> {
        Ok(self.state().await.store.list(owner))
    }

    async fn counters(&self, owner: Owner, cookies: &[Cookie]) -> Result<Vec<Option<Counters>>> {
        let mut state = self.state().await;
        let slots = cookies
            .iter()
            .filter_map(|cookie| state.store.slot(owner, *cookie))
            .collect();
        self.synchronise(&mut state, slots, "steering.counters").await?;
        Ok(state.store.counters(owner, cookies, self.now_ms()))
    }

    async fn flush(&self, fence: Fence, owner: Owner) -> Result<u64> {
        self.fence(fence, "steering.flush")?;
        let mut state = self.state().await;
        let removals = state.store.flush(owner, self.now_ms());
        Ok(self
            .uninstall(&mut state, removals, "steering.flush")
            .await?
            .len() as u64)
    }

    async fn set_miss_policy(&self, fence: Fence, port: PortRef, policy: MissPolicy) -> Result<()> {
        self.fence(fence, "steering.set_miss_policy")?;
        if policy == MissPolicy::Software {
            let message = "the dataplane is the software: what no rule matches is dropped";
            return Err(
                Error::new(ErrorKind::Unsupported, "steering.set_miss_policy", message)
                    .backend(self.backend)
                    .object(port)
                    .field("policy"),
            );
        }
        let stats = self
            .engine
            .stats()
            .await
            .map_err(self.gone("steering.set_miss_policy"))?;
        if !stats.ports.contains_key(&port) {
            let message = "the dataplane has no such port: attach it first";
            return Err(
                Error::new(ErrorKind::NotFound, "steering.set_miss_policy", message)
                    .backend(self.backend)
                    .object(port),
            );
        }
        self.state().await.store.set_miss_policy(port, policy);
        Ok(())
    }

    async fn occupancy(&self) -> Result<Vec<Occupancy>> {
        Ok(self.state().await.store.occupancy())
    }
}

fn all_undone(operations: usize, failed: usize, error: Error) -> BatchOutcome {
    let mut results: Vec<Result<Change>> = (0..operations).map(|_| Ok(Change::Skipped)).collect();
    results[failed] = Err(error);
    BatchOutcome::new(results).undone(Undone::All)
}
