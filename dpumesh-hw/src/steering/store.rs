//! [`RuleStore`]: the rules of one card in one of its lives.
//!
//! A rule that is installed gets a *slot*, a small number that an engine can index arrays with; slots of removed rules are
//! used again. [`RuleStore::apply`] decides a batch completely and returns a [`Plan`]: the outcome for the caller and the
//! changes for the engine, in order. An engine that cannot mirror them gives the plan to [`RuleStore::undo`].
//!
//! A rule goes to hardware while rules, masks and counters of hardware last, then to software if the rule and the card
//! allow it. It stays where it went: room that appears later is for later rules, so that a placement once reported holds.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::sync::Arc;

use dpumesh_core::steering::{
    Action, Atomicity, Batch, BatchOutcome, Change, Cookie, Counters, Group, InstalledRule, MissPolicy,
    Occupancy, Operation, Owner, Placement, PlacementRequest, Priority, SteeringRule, Undone, Verdict,
};
use dpumesh_core::{Epoch, Error, ErrorKind, Event, PortRef, Result, SteeringCapabilities};

use super::conflict::ConflictIndex;
use super::cube::{Cube, MaskSet};
use super::judge::judge;
use crate::events::HighWater;

/// Rules, their order, their counters and the limits that they live under.
///
/// Times are milliseconds of one monotonic clock of the caller.
#[derive(Debug)]
pub struct RuleStore {
    backend: Cow<'static, str>,
    limits: SteeringCapabilities,
    epoch: Epoch,
    slots: Vec<Option<Entry>>,
    free: Vec<u32>,
    cookies: HashMap<Cookie, u32>,
    order: BTreeMap<(Owner, Group, Priority, Cookie), u32>,
    conflicts: ConflictIndex,
    hardware: Hardware,
    deadlines: BTreeSet<(u64, u32)>,
    misses: HashMap<PortRef, MissPolicy>,
    marks: HighWater,
    version: u64,
}

/// What a batch does: the answer for its caller and the changes for an engine.
#[derive(Debug)]
#[must_use = "an engine has to mirror the changes"]
pub struct Plan {
    /// One result per operation. Counters of removed rules are in it; see [`Plan::add_final`].
    pub outcome: BatchOutcome,
    /// What changes, in order. Empty when the batch was rolled back.
    pub changes: Vec<TableChange>,
    inverses: Vec<Inverse>,
    version: u64,
}

/// One primitive change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TableChange {
    /// A rule was installed in a slot that was free.
    Installed {
        /// Where.
        slot: u32,
        /// The rule.
        rule: Arc<SteeringRule>,
        /// Hardware or software.
        placement: Placement,
    },
    /// The slot is free again.
    Uninstalled {
        /// Which.
        slot: u32,
        /// The operation of the batch that did it.
        operation: usize,
    },
}

/// A rule that left outside of a batch: flushed or aged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Removal {
    /// The slot, free now.
    pub slot: u32,
    /// Whose rule.
    pub owner: Owner,
    /// Which.
    pub cookie: Cookie,
    /// What it had counted, if it counts.
    pub counters: Option<Counters>,
}

/// The plan is not the last change of the store any more and cannot be undone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("rules were changed after this plan was made")]
pub struct StalePlan;

#[derive(Debug)]
enum Inverse {
    Uninstall(u32),
    Reinstall(u32, Box<Entry>),
}

#[derive(Debug)]
struct Entry {
    rule: Arc<SteeringRule>,
    placement: Placement,
    masks: MaskSet,
    counts: bool,
    packets: u64,
    octets: u64,
    active_ms: u64,
    hit: bool,
    deadline: Option<u64>,
}

/// Use of what hardware has.
#[derive(Debug, Default)]
struct Hardware {
    rules: u64,
    counters: u64,
    masks: HashMap<MaskSet, u64>,
}

impl RuleStore {
    /// An empty store of a backend with this name, for a card with these limits in this life.
    pub fn new(backend: impl Into<Cow<'static, str>>, limits: SteeringCapabilities, epoch: Epoch) -> Self {
        Self {
            backend: backend.into(),
            limits,
            epoch,
            slots: Vec::new(),
            free: Vec::new(),
            cookies: HashMap::new(),
            order: BTreeMap::new(),
            conflicts: ConflictIndex::default(),
            hardware: Hardware::default(),
            deadlines: BTreeSet::new(),
            misses: HashMap::new(),
            marks: HighWater::default(),
            version: 0,
        }
    }

    /// The limits it keeps.
    pub fn limits(&self) -> &SteeringCapabilities {
        &self.limits
    }

    /// What the card would do with the rule, whatever is installed.
    pub fn judge(&self, rule: &SteeringRule) -> Verdict {
        judge(rule, &self.limits)
    }

    /// Carries out a batch and says what an engine has to mirror.
    ///
    /// Atomic batches are decided like those with rollback; that no frame meets an intermediate state is up to the
    /// engine, which gets the changes in one plan.
    ///
    /// # Errors
    /// As a whole, without effect: `CapacityExceeded` (longer than `batch_max`), `Unsupported` (atomicity).
    pub fn apply(&mut self, batch: &Batch, now_ms: u64) -> Result<Plan> {
        self.check_batch(batch)?;
        let mut plan = Plan {
            outcome: BatchOutcome::new(Vec::with_capacity(batch.operations.len())),
            changes: Vec::new(),
            inverses: Vec::new(),
            version: 0,
        };
        for (index, operation) in batch.operations.iter().enumerate() {
            let result = self
                .carry_out(index, operation, now_ms, &mut plan)
                .map_err(|error| error.index(index).backend(self.backend.clone()));
            let failed = result.is_err();
            plan.outcome.results.push(result);
            if failed && batch.atomicity != Atomicity::Continue {
                self.roll_back(&mut plan, batch.operations.len());
                break;
            }
        }
        self.version += 1;
        plan.version = self.version;
        Ok(plan)
    }

    /// Takes a plan back that an engine could not mirror: rules, slots, counters and places are as before it.
    ///
    /// What was counted meanwhile for rules that the plan installed is lost. The plan before it is then the last change
    /// again, so that several can be taken back, the last one first.
    ///
    /// # Errors
    /// [`StalePlan`], and no change, unless it is the last change of the store.
    pub fn undo(&mut self, plan: Plan) -> Result<(), StalePlan> {
        if plan.version != self.version {
            return Err(StalePlan);
        }
        self.version -= 1; // a plan is consumed here, so no two live ones have this number
        self.invert(plan.inverses);
        Ok(())
    }

    /// Says where the engine really put the rule in a slot, or moved it to. A free slot is ignored.
    ///
    /// For engines that know more about their tables than the limits tell.
    pub fn settle(&mut self, slot: u32, placement: Placement) {
        let Some(Some(entry)) = self.slots.get_mut(slot as usize) else {
            return;
        };
        if entry.placement == Placement::Hardware {
            self.hardware.leave(entry);
        }
        entry.placement = placement;
        if entry.placement == Placement::Hardware {
            self.hardware.enter(entry);
        }
    }

    /// Rules of an owner in (group, priority, cookie) order.
    pub fn list(&self, owner: Owner) -> Vec<InstalledRule> {
        self.of_owner(owner)
            .filter_map(|(_, slot)| self.entry(slot))
            .map(|entry| InstalledRule::new((*entry.rule).clone(), entry.placement.clone()))
            .collect()
    }

    /// Every rule with its slot and place, in no order.
    pub fn rules(&self) -> impl Iterator<Item = (u32, &Arc<SteeringRule>, &Placement)> {
        self.slots.iter().zip(0..).filter_map(|(entry, slot)| {
            let entry = entry.as_ref()?;
            Some((slot, &entry.rule, &entry.placement))
        })
    }

    /// The rule in a slot.
    pub fn rule(&self, slot: u32) -> Option<&Arc<SteeringRule>> {
        self.entry(slot).map(|entry| &entry.rule)
    }

    /// The slot of an owner's rule.
    pub fn slot(&self, owner: Owner, cookie: Cookie) -> Option<u32> {
        let slot = *self.cookies.get(&cookie)?;
        (self.entry(slot)?.rule.owner == owner).then_some(slot)
    }

    /// How many rules there are.
    pub fn len(&self) -> usize {
        self.cookies.len()
    }

    /// True without any rule.
    pub fn is_empty(&self) -> bool {
        self.cookies.is_empty()
    }

    /// Counters by cookie; `None` for one that the owner does not have or that does not count.
    pub fn counters(&self, owner: Owner, cookies: &[Cookie], now_ms: u64) -> Vec<Option<Counters>> {
        cookies
            .iter()
            .map(|cookie| {
                let entry = self.entry(self.slot(owner, *cookie)?)?;
                entry.counters(self.epoch, now_ms)
            })
            .collect()
    }

    /// Enters hits of the rule in a slot; also what keeps it from ageing. A free slot is ignored.
    pub fn record(&mut self, slot: u32, packets: u64, octets: u64, now_ms: u64) {
        if let Some(Some(entry)) = self.slots.get_mut(slot as usize) {
            entry.packets = entry.packets.saturating_add(packets);
            entry.octets = entry.octets.saturating_add(octets);
            entry.active_ms = entry.active_ms.max(now_ms);
            entry.hit = true;
        }
    }

    /// Removes the rules that were not hit for their idle timeout.
    pub fn age(&mut self, now_ms: u64) -> Vec<Removal> {
        let mut removals = Vec::new();
        while let Some((deadline, slot)) = self.deadlines.first().copied().filter(|(at, _)| *at <= now_ms) {
            let Some(Some(entry)) = self.slots.get_mut(slot as usize) else {
                self.deadlines.remove(&(deadline, slot));
                continue;
            };
            let due = entry.due();
            match due {
                Some(due) if due > now_ms => {
                    self.deadlines.remove(&(deadline, slot));
                    entry.deadline = Some(due);
                    self.deadlines.insert((due, slot));
                }
                _ => removals.extend(self.remove(slot, now_ms)),
            }
        }
        removals
    }

    /// When [`RuleStore::age`] has something to look at; `None` while no rule ages. May be too early, never too late.
    pub fn next_deadline_ms(&self) -> Option<u64> {
        self.deadlines.first().map(|(at, _)| *at)
    }

    /// Removes every rule of an owner.
    pub fn flush(&mut self, owner: Owner, now_ms: u64) -> Vec<Removal> {
        let slots: Vec<u32> = self.of_owner(owner).map(|(_, slot)| slot).collect();
        slots
            .into_iter()
            .filter_map(|slot| self.remove(slot, now_ms))
            .collect()
    }

    /// Sets what happens to frames of a port that no rule matches.
    pub fn set_miss_policy(&mut self, port: PortRef, policy: MissPolicy) {
        self.misses.insert(port, policy);
    }

    /// What happens to frames of a port that no rule matches: dropped until told otherwise.
    pub fn miss_policy(&self, port: PortRef) -> MissPolicy {
        self.misses.get(&port).copied().unwrap_or_default()
    }

    /// Use of `steering.rules` and, in hardware, `steering.hardware_rules`, `steering.masks` and `steering.counters`.
    pub fn occupancy(&self) -> Vec<Occupancy> {
        let of = |resource: &str, used: u64, limit: u64| Occupancy {
            resource: resource.to_owned(),
            used,
            limit,
        };
        vec![
            of(RULES, self.cookies.len() as u64, self.limits.rules),
            of(HARDWARE_RULES, self.hardware.rules, self.limits.hardware_rules),
            of(MASKS, self.hardware.masks.len() as u64, self.limits.masks.into()),
            of(COUNTERS, self.hardware.counters, self.limits.counters),
        ]
    }

    /// [`Event::HighWater`] for every resource that passed its mark since the last call. Call it after the changes of a
    /// plan are mirrored.
    pub fn high_water(&mut self) -> Vec<Event> {
        let occupancy = self.occupancy();
        self.marks.look(&occupancy)
    }

    /// Forgets everything: the card began a new life, perhaps with other limits.
    pub fn reset(&mut self, limits: SteeringCapabilities, epoch: Epoch) {
        let version = self.version + 1;
        *self = Self::new(std::mem::take(&mut self.backend), limits, epoch);
        self.version = version;
    }
}

impl Plan {
    /// Adds what the engine counted last to the counters of the rule that change `change` removed, so that they are
    /// final. Nothing happens when that change is no removal or the rule did not count.
    pub fn add_final(&mut self, change: usize, packets: u64, octets: u64) {
        let Some(TableChange::Uninstalled { operation, .. }) = self.changes.get(change) else {
            return;
        };
        if let Some(Ok(Change::Removed(Some(counters)))) = self.outcome.results.get_mut(*operation) {
            counters.packets = counters.packets.saturating_add(packets);
            counters.octets = counters.octets.saturating_add(octets);
        }
    }
}

impl Removal {
    /// The [`Event::Aged`] of these removals: one per owner, in order.
    pub fn aged(removals: &[Self]) -> Vec<Event> {
        let mut by_owner: BTreeMap<Owner, Vec<(Cookie, Option<Counters>)>> = BTreeMap::new();
        for removal in removals {
            by_owner
                .entry(removal.owner)
                .or_default()
                .push((removal.cookie, removal.counters));
        }
        by_owner
            .into_iter()
            .map(|(owner, rules)| Event::Aged { owner, rules })
            .collect()
    }
}

const RULES: &str = "steering.rules";
const HARDWARE_RULES: &str = "steering.hardware_rules";
const MASKS: &str = "steering.masks";
const COUNTERS: &str = "steering.counters";
const APPLY: &str = "steering.apply";

impl RuleStore {
    fn check_batch(&self, batch: &Batch) -> Result<()> {
        let (length, most) = (batch.operations.len() as u64, u64::from(self.limits.batch_max));
        if length > most {
            let message = format!("{length} operations are more than the {most} of one batch");
            return Err(Error::new(ErrorKind::CapacityExceeded, APPLY, message)
                .object("steering.batch_max")
                .retry(dpumesh_core::Retry::Never)
                .backend(self.backend.clone()));
        }
        if batch.atomicity != Atomicity::Continue && !self.limits.atomicity.contains(&batch.atomicity) {
            let message = format!("{:?} is not on offer", batch.atomicity);
            return Err(Error::new(ErrorKind::Unsupported, APPLY, message)
                .field("atomicity")
                .backend(self.backend.clone()));
        }
        Ok(())
    }

    fn carry_out(
        &mut self,
        index: usize,
        operation: &Operation,
        now_ms: u64,
        plan: &mut Plan,
    ) -> Result<Change> {
        match operation {
            Operation::Add(rule) => self.add(rule, now_ms, plan),
            Operation::Remove { owner, cookie } => self.take(index, *owner, *cookie, now_ms, plan),
        }
    }

    fn add(&mut self, rule: &SteeringRule, now_ms: u64, plan: &mut Plan) -> Result<Change> {
        if let Err(error) = rule.check() {
            return Err(Error::new(ErrorKind::Invalid, APPLY, error.reason).field(error.field));
        }
        let verdict = self.judge(rule);
        if let Verdict::No { field, reason } = verdict {
            return Err(Error::new(ErrorKind::Unsupported, APPLY, reason).field(field));
        }
        if let Some(there) = self.cookies.get(&rule.cookie).and_then(|slot| self.entry(*slot)) {
            if *there.rule == *rule {
                return Ok(Change::Present(there.placement.clone()));
            }
            let message = "another rule has this cookie: remove it first or choose another cookie";
            return Err(Error::new(ErrorKind::Exists, APPLY, message).object(rule.cookie));
        }
        let cube = Cube::of(&rule.pattern);
        self.check_conflict(rule, &cube)?;
        let placement = self.place(rule, &cube, verdict)?;
        let entry = Entry::new(Arc::new(rule.clone()), placement.clone(), &cube, now_ms);
        let shared = Arc::clone(&entry.rule);
        let slot = self.next_slot();
        self.install(slot, entry, cube);
        plan.inverses.push(Inverse::Uninstall(slot));
        plan.changes.push(TableChange::Installed {
            slot,
            rule: shared,
            placement: placement.clone(),
        });
        Ok(Change::Added(placement))
    }

    fn take(
        &mut self,
        index: usize,
        owner: Owner,
        cookie: Cookie,
        now_ms: u64,
        plan: &mut Plan,
    ) -> Result<Change> {
        let Some(slot) = self.cookies.get(&cookie).copied() else {
            return Ok(Change::Absent);
        };
        if self.slot(owner, cookie).is_none() {
            let message = "this owner has no such rule";
            return Err(Error::new(ErrorKind::NotFound, APPLY, message).object(cookie));
        }
        let Some(entry) = self.uninstall(slot) else {
            return Ok(Change::Absent);
        };
        let counters = entry.counters(self.epoch, now_ms);
        plan.inverses.push(Inverse::Reinstall(slot, Box::new(entry)));
        plan.changes.push(TableChange::Uninstalled {
            slot,
            operation: index,
        });
        Ok(Change::Removed(counters))
    }

    fn check_conflict(&mut self, rule: &SteeringRule, cube: &Cube) -> Result<()> {
        let found = self
            .conflicts
            .find(rule.group, rule.priority, cube, &rule.actions);
        let Some(other) = found.and_then(|slot| self.rule(slot)) else {
            return Ok(());
        };
        let message = format!(
            "rule {} of the same priority matches some of the same frames with other actions",
            other.cookie
        );
        Err(Error::new(ErrorKind::Conflict, APPLY, message)
            .object(other.cookie)
            .field("pattern"))
    }

    fn place(&self, rule: &SteeringRule, cube: &Cube, verdict: Verdict) -> Result<Placement> {
        let used = self.cookies.len() as u64;
        if used >= self.limits.rules {
            return Err(full(&Full(RULES, used, self.limits.rules)));
        }
        let shortage = match verdict {
            Verdict::Hardware => match self.hardware_shortage(rule, cube) {
                None => return Ok(Placement::Hardware),
                Some(shortage) => shortage,
            },
            Verdict::Partial(reason) => return Ok(Placement::Partial(reason)),
            Verdict::Software(reason) => return Ok(Placement::Software(reason)),
            Verdict::No { field, reason } => {
                return Err(Error::new(ErrorKind::Unsupported, APPLY, reason).field(field));
            }
        };
        if rule.placement == PlacementRequest::Any && self.limits.software_fallback {
            return Ok(Placement::Software(shortage.to_string()));
        }
        Err(full(&shortage))
    }

    fn hardware_shortage(&self, rule: &SteeringRule, cube: &Cube) -> Option<Full> {
        let limits = &self.limits;
        if self.hardware.rules >= limits.hardware_rules {
            return Some(Full(HARDWARE_RULES, self.hardware.rules, limits.hardware_rules));
        }
        if counts(rule) && self.hardware.counters >= limits.counters {
            return Some(Full(COUNTERS, self.hardware.counters, limits.counters));
        }
        let masks = self.hardware.masks.len() as u64;
        if masks >= limits.masks.into() && !self.hardware.masks.contains_key(&cube.mask_set()) {
            return Some(Full(MASKS, masks, limits.masks.into()));
        }
        None
    }

    fn roll_back(&mut self, plan: &mut Plan, operations: usize) {
        self.invert(std::mem::take(&mut plan.inverses));
        plan.changes.clear();
        for result in plan.outcome.results.iter_mut().filter(|result| result.is_ok()) {
            *result = Ok(Change::Skipped);
        }
        plan.outcome
            .results
            .resize_with(operations, || Ok(Change::Skipped));
        plan.outcome.undone = Undone::All;
    }

    fn invert(&mut self, inverses: Vec<Inverse>) {
        for inverse in inverses.into_iter().rev() {
            match inverse {
                Inverse::Uninstall(slot) => {
                    self.uninstall(slot);
                }
                Inverse::Reinstall(slot, entry) => {
                    // Inverses run backwards, so the slot freed last is on top again.
                    let top = self.free.pop();
                    debug_assert_eq!(top, Some(slot));
                    let cube = Cube::of(&entry.rule.pattern);
                    self.install(slot, *entry, cube);
                }
            }
        }
    }

    fn next_slot(&mut self) -> u32 {
        self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            (self.slots.len() - 1) as u32 // `rules` of the limits would have to pass u32 first; memory ends before
        })
    }

    fn install(&mut self, slot: u32, mut entry: Entry, cube: Cube) {
        let rule = Arc::clone(&entry.rule);
        self.cookies.insert(rule.cookie, slot);
        self.order
            .insert((rule.owner, rule.group, rule.priority, rule.cookie), slot);
        if entry.placement == Placement::Hardware {
            self.hardware.enter(&entry);
        }
        entry.deadline = entry.due();
        if let Some(deadline) = entry.deadline {
            self.deadlines.insert((deadline, slot));
        }
        self.conflicts
            .insert(slot, rule.group, rule.priority, cube, &rule.actions);
        self.slots[slot as usize] = Some(entry);
    }

    fn uninstall(&mut self, slot: u32) -> Option<Entry> {
        let entry = self.slots.get_mut(slot as usize)?.take()?;
        let rule = &entry.rule;
        self.cookies.remove(&rule.cookie);
        self.order
            .remove(&(rule.owner, rule.group, rule.priority, rule.cookie));
        if entry.placement == Placement::Hardware {
            self.hardware.leave(&entry);
        }
        if let Some(deadline) = entry.deadline {
            self.deadlines.remove(&(deadline, slot));
        }
        self.conflicts.remove(slot);
        self.free.push(slot);
        Some(entry)
    }

    fn remove(&mut self, slot: u32, now_ms: u64) -> Option<Removal> {
        let entry = self.uninstall(slot)?;
        self.version += 1;
        Some(Removal {
            slot,
            owner: entry.rule.owner,
            cookie: entry.rule.cookie,
            counters: entry.counters(self.epoch, now_ms),
        })
    }

    fn entry(&self, slot: u32) -> Option<&Entry> {
        self.slots.get(slot as usize)?.as_ref()
    }

    fn of_owner(&self, owner: Owner) -> impl Iterator<Item = (Cookie, u32)> {
        let first = (owner, Group(0), Priority(0), Cookie(0));
        let last = (owner, Group(u32::MAX), Priority(u32::MAX), Cookie(u128::MAX));
        self.order
            .range(first..=last)
            .map(|((.., cookie), slot)| (*cookie, *slot))
    }
}

impl Hardware {
    fn enter(&mut self, entry: &Entry) {
        self.rules += 1;
        self.counters += u64::from(entry.counts);
        *self.masks.entry(entry.masks.clone()).or_default() += 1;
    }

    fn leave(&mut self, entry: &Entry) {
        self.rules -= 1;
        self.counters -= u64::from(entry.counts);
        self.release_masks(&entry.masks);
    }

    fn release_masks(&mut self, masks: &MaskSet) {
        if let Some(uses) = self.masks.get_mut(masks) {
            *uses -= 1;
            if *uses == 0 {
                self.masks.remove(masks);
            }
        }
    }
}

impl Entry {
    fn new(rule: Arc<SteeringRule>, placement: Placement, cube: &Cube, now_ms: u64) -> Self {
        Self {
            counts: counts(&rule),
            masks: cube.mask_set(),
            rule,
            placement,
            packets: 0,
            octets: 0,
            active_ms: now_ms,
            hit: false,
            deadline: None,
        }
    }

    fn due(&self) -> Option<u64> {
        let timeout = self.rule.idle_timeout_ms?;
        Some(self.active_ms.saturating_add(timeout.into()))
    }

    fn counters(&self, epoch: Epoch, now_ms: u64) -> Option<Counters> {
        self.counts.then(|| Counters {
            packets: self.packets,
            octets: self.octets,
            epoch,
            idle_ms: self.hit.then(|| now_ms.saturating_sub(self.active_ms)),
        })
    }
}

fn counts(rule: &SteeringRule) -> bool {
    rule.actions.contains(&Action::Count)
}

/// A used-up resource: name, use, limit.
struct Full(&'static str, u64, u64);

impl fmt::Display for Full {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is full: {} of {}", self.0, self.1, self.2)
    }
}

fn full(resource: &Full) -> Error {
    Error::new(ErrorKind::CapacityExceeded, APPLY, resource.to_string()).object(resource.0)
}

#[cfg(test)]
mod tests;
