//! [`Rules`]: where each rule acts, and what has to be told to card and software for a batch. Nothing here does I/O.
//!
//! # The order between hardware and software
//! A frame meets the card's tables first, and software only when they miss. So that the outcome is that of one list of
//! rules (the kernel calls it the golden rule of offload):
//!
//! 1. **Software has every rule** that it can carry out. A frame that the card misses is handled as if there were no card.
//! 2. A rule is in hardware only while no rule of the same group that wins over it is in software alone and matches some of
//!    the same frames. A new rule of that kind *demotes* those below it to software, and `list` says so.
//! 3. A rule that must be in hardware is never demoted: the new one is refused with `Conflict` instead.
//!
//! A demoted rule stays in software. Room and order that appear later are for later rules.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use dpumesh_core::steering::{
    Atomicity, Batch, Change, Cookie, Group, InstalledRule, Occupancy, Operation, Owner, Placement,
    PlacementRequest, Priority, SteeringRule, Verdict,
};
use dpumesh_core::{Epoch, Error, ErrorKind, Result, Retry, SteeringCapabilities};
use dpumesh_hw::steering::{Plan, RuleStore, TableChange, overlap};

use crate::entry::compile;
use crate::error::NAME;
use crate::table::{Entry, Key, Limits};
use crate::tables::{Held, Setup, Shortage, Tables};

const APPLY: &str = "steering.apply";

/// Every rule of the card in one of its lives.
#[derive(Debug)]
pub(crate) struct Rules {
    store: RuleStore,
    pub(crate) tables: Tables,
    by_slot: HashMap<u32, Rule>,
    by_user: HashMap<u64, u32>,
    hard: Index,
    soft_only: Index,
    last_user: u64,
}

/// Slots by group and priority.
type Index = BTreeMap<(Group, Priority), HashMap<u32, Arc<SteeringRule>>>;

/// A rule and where it is.
#[derive(Clone, Debug)]
pub(crate) struct Rule {
    pub(crate) rule: Arc<SteeringRule>,
    pub(crate) hard: Option<Held>,
    /// Software has it as well, or alone.
    pub(crate) soft: bool,
    /// Counted by a place that it left: added to what the present ones say.
    pub(crate) carried: (u64, u64),
    /// What software had counted when this life began.
    pub(crate) base: (u64, u64),
}

/// What happened, newest last, so that it can be taken back.
#[derive(Debug)]
pub(crate) enum Done {
    Placed { slot: u32, plan: Plan },
    Removed { slot: u32, rule: Box<Rule>, plan: Plan },
    Demoted { slot: u32, held: Box<Held> },
}

/// What has to be told, in order. Each line names the operation of the batch that it belongs to.
#[derive(Debug, Default)]
pub(crate) struct Script {
    pub(crate) soft: Vec<(usize, Operation)>,
    pub(crate) setups: Vec<Setup>,
    pub(crate) writes: Vec<(usize, Entry)>,
}

/// A batch decided.
#[derive(Debug, Default)]
pub(crate) struct Decision {
    pub(crate) results: Vec<Result<Change>>,
    pub(crate) log: Vec<(usize, Done)>,
    pub(crate) script: Script,
    /// An operation failed and the batch wants to be undone.
    pub(crate) failed: bool,
}

/// What software says of a rule: `None` without software.
pub(crate) type Soft = Option<Verdict>;

impl Rules {
    /// None, for a card with these limits. `whole` are the limits of card and software together.
    pub(crate) fn new(limits: Limits, whole: &SteeringCapabilities, epoch: Epoch) -> Self {
        Self {
            store: RuleStore::new(NAME, unbounded(whole), epoch),
            tables: Tables::new(limits),
            by_slot: HashMap::new(),
            by_user: HashMap::new(),
            hard: Index::new(),
            soft_only: Index::new(),
            last_user: 0,
        }
    }

    pub(crate) fn rule_of(&self, owner: Owner, cookie: Cookie) -> Option<&Rule> {
        self.by_slot.get(&self.store.slot(owner, cookie)?)
    }

    /// Owner and cookie of the rule that the card knows by a number.
    pub(crate) fn named(&self, user: u64) -> Option<(Owner, Cookie)> {
        let rule = &self.by_slot.get(self.by_user.get(&user)?)?.rule;
        Some((rule.owner, rule.cookie))
    }

    pub(crate) fn list(&self, owner: Owner) -> Vec<InstalledRule> {
        self.store.list(owner)
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &Rule> {
        self.by_slot.values()
    }

    pub(crate) fn all_mut(&mut self) -> impl Iterator<Item = &mut Rule> {
        self.by_slot.values_mut()
    }

    pub(crate) fn occupancy(&self) -> Vec<Occupancy> {
        let mut all = self.store.occupancy();
        all.truncate(1); // the store knows how many rules there are; the rest is the tables'
        all.extend(self.tables.occupancy());
        all
    }

    /// Decides a batch. `soft` is software's word on each addition, in order of the operations.
    ///
    /// With an atomicity other than `Continue`, a failing operation ends it: [`Decision::failed`] is set, and everything
    /// decided is taken back already.
    ///
    /// # Errors
    /// As a whole: too long, atomicity.
    pub(crate) fn decide(&mut self, batch: &Batch, soft: &[Soft]) -> Result<Decision> {
        let most = self.store.limits().batch_max as usize;
        if batch.operations.len() > most {
            let length = batch.operations.len();
            let message = format!("{length} operations are more than the {most} of one batch");
            return Err(Error::new(ErrorKind::CapacityExceeded, APPLY, message)
                .backend(NAME)
                .object("steering.batch_max")
                .retry(Retry::Never));
        }
        // An empty batch: the store looks at the atomicity.
        let _ = self
            .store
            .apply(&Batch::new(Vec::new()).with(batch.atomicity), 0)?;
        let mut decision = Decision::default();
        for (index, operation) in batch.operations.iter().enumerate() {
            let result = match operation {
                Operation::Add(rule) => {
                    let soft = soft.get(index).cloned().flatten();
                    self.add(index, operation, rule, soft, &mut decision)
                }
                Operation::Remove { .. } => self.remove(index, operation, &mut decision),
            };
            let failed = result.is_err();
            decision
                .results
                .push(result.map_err(|error| error.index(index).backend(NAME)));
            if failed && batch.atomicity != Atomicity::Continue {
                decision.failed = true;
                self.take_back(std::mem::take(&mut decision.log));
                // Tables that were made for it stay, empty: the books have them.
                let setups = std::mem::take(&mut decision.script.setups);
                decision.script = Script {
                    setups,
                    ..Script::default()
                };
                break;
            }
        }
        Ok(decision)
    }

    /// What card and software together would do with a rule, and whether it may be in hardware.
    pub(crate) fn judge(
        rule: &SteeringRule,
        limits: &Limits,
        whole: &SteeringCapabilities,
        soft: &Soft,
    ) -> Verdict {
        let no = |field: String, reason: String| Verdict::No { field, reason };
        if let Err(error) = rule.check() {
            return no(error.field, error.reason.to_owned());
        }
        if rule.idle_timeout_ms.is_some() && !whole.idle_timeout {
            return no("idle_timeout_ms".to_owned(), "rules do not age here".to_owned());
        }
        let hard = match rule.placement {
            PlacementRequest::Software => {
                Err(("placement".to_owned(), "the rule asks for software".to_owned()))
            }
            _ => compile(rule, limits).map_err(|obstacle| (obstacle.field, obstacle.reason)),
        };
        match (hard, rule.placement, soft) {
            (Ok(_), ..) => Verdict::Hardware,
            (Err((field, reason)), PlacementRequest::Hardware, _) => no(field, reason),
            (Err((_, reason)), _, Some(soft)) if soft.is_possible() => Verdict::Software(reason),
            (Err(_), _, Some(Verdict::No { field, reason })) => no(field.clone(), reason.clone()),
            (Err((field, reason)), ..) => no(field, reason),
        }
    }

    fn add(
        &mut self,
        index: usize,
        operation: &Operation,
        rule: &SteeringRule,
        soft: Soft,
        decision: &mut Decision,
    ) -> Result<Change> {
        let limits = *self.tables.limits();
        let verdict = Self::judge(rule, &limits, self.store.limits(), &soft);
        if let (Verdict::No { field, reason }, Ok(())) = (&verdict, rule.check()) {
            return Err(Error::new(ErrorKind::Unsupported, APPLY, reason.clone()).field(field.clone()));
        }
        let mut plan = self.store.apply(&Batch::new(vec![operation.clone()]), 0)?;
        let change = plan.outcome.results.pop().unwrap_or(Ok(Change::Absent));
        let Some(TableChange::Installed { slot, rule, .. }) = plan.changes.first().cloned() else {
            let _ = self.store.undo(plan); // it changed nothing, and must not stand behind those that did
            return change;
        };
        let soft = soft.is_some_and(|verdict| verdict.is_possible());
        match self.place(index, slot, &rule, verdict, soft, decision) {
            Ok(placement) => {
                self.store.settle(slot, placement.clone());
                decision.log.push((index, Done::Placed { slot, plan }));
                Ok(Change::Added(placement))
            }
            Err(error) => {
                let _ = self.store.undo(plan); // the store's last change: nothing came between
                Err(error)
            }
        }
    }

    fn place(
        &mut self,
        index: usize,
        slot: u32,
        rule: &Arc<SteeringRule>,
        verdict: Verdict,
        soft: bool,
        decision: &mut Decision,
    ) -> Result<Placement> {
        let reason = match verdict {
            Verdict::Hardware => match self.reserve(rule, decision) {
                Ok(held) => {
                    self.install(index, slot, rule, Some(held), soft, decision);
                    return Ok(Placement::Hardware);
                }
                Err(shortage) if rule.placement == PlacementRequest::Hardware || !soft => {
                    return Err(refusal(&shortage));
                }
                Err(shortage) => shortage.reason,
            },
            Verdict::Software(reason) | Verdict::Partial(reason) => reason,
            Verdict::No { field, reason } => {
                return Err(Error::new(ErrorKind::Unsupported, APPLY, reason).field(field));
            }
        };
        self.demote_below(index, rule, decision)?;
        self.install(index, slot, rule, None, true, decision);
        Ok(Placement::Software(reason))
    }

    fn reserve(&mut self, rule: &SteeringRule, decision: &mut Decision) -> Result<Held, Shortage> {
        let compiled = compile(rule, self.tables.limits()).map_err(|obstacle| Shortage {
            name: obstacle.field,
            reason: obstacle.reason,
            is_room: false,
        })?;
        let above = self
            .soft_only
            .range((rule.group, Priority(0))..(rule.group, rule.priority))
            .flat_map(|(_, rules)| rules.values())
            .find(|above| overlap(&above.pattern, &rule.pattern));
        if let Some(above) = above {
            return Err(Shortage {
                name: "priority".to_owned(),
                reason: format!("rule {} wins over it and acts in software", above.cookie),
                is_room: false,
            });
        }
        self.last_user += 1;
        self.tables
            .reserve(rule, &compiled, self.last_user, &mut decision.script.setups)
    }

    /// Takes the rules out of hardware that would win over `rule` there though it wins over them.
    fn demote_below(&mut self, index: usize, rule: &SteeringRule, decision: &mut Decision) -> Result<()> {
        let below =
            (rule.group, Priority(rule.priority.0.saturating_add(1)))..=(rule.group, Priority(u32::MAX));
        let hidden: Vec<(u32, Arc<SteeringRule>)> = self
            .hard
            .range(below)
            .flat_map(|(_, rules)| rules)
            .filter(|(_, below)| below.priority > rule.priority && overlap(&below.pattern, &rule.pattern))
            .map(|(slot, below)| (*slot, Arc::clone(below)))
            .collect();
        let fixed = hidden.iter().find(|(slot, below)| {
            below.placement == PlacementRequest::Hardware
                || self.by_slot.get(slot).is_none_or(|rule| !rule.soft)
        });
        if let Some((_, fixed)) = fixed {
            let message = format!(
                "it would act in software and win over rule {}, which acts in hardware only and would be first",
                fixed.cookie
            );
            return Err(Error::new(ErrorKind::Conflict, APPLY, message)
                .object(fixed.cookie)
                .field("priority"));
        }
        for (slot, _) in hidden {
            let reason = format!("rule {} wins over it and acts in software", rule.cookie);
            self.demote(index, slot, reason, decision);
        }
        Ok(())
    }

    /// Takes a rule out of hardware; software has it.
    pub(crate) fn demote(&mut self, index: usize, slot: u32, reason: String, decision: &mut Decision) {
        let Some(found) = self.by_slot.get_mut(&slot) else {
            return;
        };
        let Some(held) = found.hard.take() else { return };
        let rule = Arc::clone(&found.rule);
        self.by_user.remove(&held.user);
        self.tables.release(&held);
        leave(&mut self.hard, &rule, slot);
        enter(&mut self.soft_only, &rule, slot);
        self.store.settle(slot, Placement::Software(reason));
        let script = &mut decision.script;
        if rule.idle_timeout_ms.is_some() {
            // Until now the card let it age.
            script.soft.push((index, removal(&rule)));
            script.soft.push((index, Operation::Add(mirror(&rule, false))));
        }
        script.writes.extend(held.deletes().map(|entry| (index, entry)));
        let held = Box::new(held);
        decision.log.push((index, Done::Demoted { slot, held }));
    }

    fn install(
        &mut self,
        index: usize,
        slot: u32,
        rule: &Arc<SteeringRule>,
        hard: Option<Held>,
        soft: bool,
        decision: &mut Decision,
    ) {
        if soft {
            let operation = Operation::Add(mirror(rule, hard.is_some()));
            decision.script.soft.push((index, operation));
        }
        if let Some(held) = &hard {
            decision
                .script
                .writes
                .extend(held.puts().map(|entry| (index, entry)));
        }
        self.enter(
            slot,
            Rule {
                rule: Arc::clone(rule),
                hard,
                soft,
                carried: (0, 0),
                base: (0, 0),
            },
        );
    }

    fn enter(&mut self, slot: u32, rule: Rule) {
        match &rule.hard {
            Some(held) => {
                self.by_user.insert(held.user, slot);
                enter(&mut self.hard, &rule.rule, slot);
            }
            None => enter(&mut self.soft_only, &rule.rule, slot),
        }
        self.by_slot.insert(slot, rule);
    }

    fn leave(&mut self, slot: u32) -> Option<Rule> {
        let rule = self.by_slot.remove(&slot)?;
        match &rule.hard {
            Some(held) => {
                self.by_user.remove(&held.user);
                leave(&mut self.hard, &rule.rule, slot);
            }
            None => leave(&mut self.soft_only, &rule.rule, slot),
        }
        Some(rule)
    }

    fn remove(&mut self, index: usize, operation: &Operation, decision: &mut Decision) -> Result<Change> {
        let mut plan = self.store.apply(&Batch::new(vec![operation.clone()]), 0)?;
        let change = plan.outcome.results.pop().unwrap_or(Ok(Change::Absent));
        let Some(TableChange::Uninstalled { slot, .. }) = plan.changes.first().cloned() else {
            let _ = self.store.undo(plan); // as in `add`
            return change;
        };
        let Some(rule) = self.leave(slot) else {
            return change;
        };
        if rule.soft {
            decision.script.soft.push((index, removal(&rule.rule)));
        }
        if let Some(held) = &rule.hard {
            self.tables.release(held);
            decision
                .script
                .writes
                .extend(held.deletes().map(|entry| (index, entry)));
        }
        let rule = Box::new(rule);
        decision.log.push((index, Done::Removed { slot, rule, plan }));
        change
    }

    /// Takes back what was decided, the last first. The script that undoes it on the card is returned.
    pub(crate) fn take_back(&mut self, log: Vec<(usize, Done)>) -> Script {
        let mut script = Script::default();
        for (index, done) in log.into_iter().rev() {
            match done {
                Done::Placed { slot, plan } => {
                    if let Some(rule) = self.leave(slot) {
                        if let Some(held) = &rule.hard {
                            self.tables.release(held);
                            script.writes.extend(held.deletes().map(|entry| (index, entry)));
                        }
                        if rule.soft {
                            script.soft.push((index, removal(&rule.rule)));
                        }
                    }
                    let _ = self.store.undo(plan); // plans are taken back in reverse, so each is the last
                }
                Done::Removed { slot, rule, plan } => {
                    if let Some(held) = &rule.hard {
                        self.tables.restore(held);
                        script.writes.extend(held.puts().map(|entry| (index, entry)));
                    }
                    if rule.soft {
                        let operation = Operation::Add(mirror(&rule.rule, rule.hard.is_some()));
                        script.soft.push((index, operation));
                    }
                    self.enter(slot, *rule);
                    let _ = self.store.undo(plan); // as above
                }
                Done::Demoted { slot, held } => {
                    self.tables.restore(&held);
                    script.writes.extend(held.puts().map(|entry| (index, entry)));
                    if let Some(mut rule) = self.leave(slot) {
                        if rule.rule.idle_timeout_ms.is_some() {
                            script.soft.push((index, removal(&rule.rule)));
                            script
                                .soft
                                .push((index, Operation::Add(mirror(&rule.rule, true))));
                        }
                        rule.hard = Some(*held);
                        self.enter(slot, rule);
                        self.store.settle(slot, Placement::Hardware);
                    }
                }
            }
        }
        self.tables.settle();
        script
    }

    /// The card did not take a rule that was meant for it: software has it alone, if it may. Says which rules this
    /// takes out of hardware as well.
    ///
    /// # Errors
    /// The rule has to be in hardware, or its place cannot be changed: it is gone.
    pub(crate) fn refused_by_card(
        &mut self,
        index: usize,
        slot: u32,
        reason: &str,
        decision: &mut Decision,
    ) -> Result<Placement> {
        let Some(found) = self.by_slot.get(&slot) else {
            return Ok(Placement::Hardware);
        };
        let rule = Arc::clone(&found.rule);
        let may_move = found.soft && rule.placement == PlacementRequest::Any;
        let moved = if may_move {
            self.demote_below(index, &rule, decision)
        } else {
            let message = reason.to_owned();
            Err(Error::new(ErrorKind::CapacityExceeded, APPLY, message).object(crate::tables::HARDWARE_RULES))
        };
        match moved {
            Ok(()) => {
                self.demote(index, slot, reason.to_owned(), decision);
                Ok(Placement::Software(reason.to_owned()))
            }
            Err(error) => {
                let remove = Operation::Remove {
                    owner: rule.owner,
                    cookie: rule.cookie,
                };
                self.remove(index, &remove, decision)?;
                Err(error.index(index).backend(NAME))
            }
        }
    }

    /// Removes a rule because software could not take it.
    pub(crate) fn drop_rule(&mut self, index: usize, slot: u32, decision: &mut Decision) {
        let Some(found) = self.by_slot.get(&slot) else {
            return;
        };
        let remove = Operation::Remove {
            owner: found.rule.owner,
            cookie: found.rule.cookie,
        };
        let _ = self.remove(index, &remove, decision); // its own owner's, and it is there
    }

    /// The slot of the rule that an operation installed, while it is there: slots are used again in one batch.
    pub(crate) fn standing(&self, done: &Done) -> Option<u32> {
        let Done::Placed { slot, plan } = done else {
            return None;
        };
        let here = &self.by_slot.get(slot)?.rule;
        let installed = |change: &TableChange| matches!(change, TableChange::Installed { rule, .. } if Arc::ptr_eq(rule, here));
        plan.changes.iter().any(installed).then_some(*slot)
    }

    /// Rules that should be in hardware and of which the card lacks a part.
    pub(crate) fn lacking(&self, there: &HashMap<(u32, Key), u64>) -> Vec<(u32, Held)> {
        let is_there = |held: &Held| {
            let mut keys = held.keys.iter();
            keys.all(|key| there.get(&(held.table, *key)) == Some(&held.user))
        };
        let held = self
            .by_slot
            .iter()
            .filter_map(|(slot, rule)| Some((*slot, rule.hard.as_ref()?)));
        held.filter(|(_, held)| !is_there(held))
            .map(|(slot, held)| (slot, held.clone()))
            .collect()
    }

    /// Where the rule in a slot acts.
    pub(crate) fn placement(&self, slot: u32) -> Option<Placement> {
        let mut rules = self.store.rules();
        rules
            .find(|(at, ..)| *at == slot)
            .map(|(.., placement)| placement.clone())
    }

    pub(crate) fn by_slot(&self, slot: u32) -> Option<&Rule> {
        self.by_slot.get(&slot)
    }

    pub(crate) fn by_slot_mut(&mut self, slot: u32) -> Option<&mut Rule> {
        self.by_slot.get_mut(&slot)
    }
}

/// The rule as software gets it: it acts there, and ages there only while hardware does not have it.
fn mirror(rule: &SteeringRule, in_hardware: bool) -> SteeringRule {
    SteeringRule {
        placement: PlacementRequest::Software,
        idle_timeout_ms: rule.idle_timeout_ms.filter(|_| !in_hardware),
        ..rule.clone()
    }
}

fn removal(rule: &SteeringRule) -> Operation {
    Operation::Remove {
        owner: rule.owner,
        cookie: rule.cookie,
    }
}

fn refusal(shortage: &Shortage) -> Error {
    let reason = shortage.reason.clone();
    if shortage.is_room {
        return Error::new(ErrorKind::CapacityExceeded, APPLY, reason).object(&shortage.name);
    }
    Error::new(ErrorKind::Conflict, APPLY, reason).field(shortage.name.clone())
}

fn enter(index: &mut Index, rule: &Arc<SteeringRule>, slot: u32) {
    let at = index.entry((rule.group, rule.priority)).or_default();
    at.insert(slot, Arc::clone(rule));
}

fn leave(index: &mut Index, rule: &SteeringRule, slot: u32) {
    if let Some(at) = index.get_mut(&(rule.group, rule.priority)) {
        at.remove(&slot);
        if at.is_empty() {
            index.remove(&(rule.group, rule.priority));
        }
    }
}

/// The limits without those of hardware, which [`Tables`] keeps.
fn unbounded(whole: &SteeringCapabilities) -> SteeringCapabilities {
    let mut limits = whole.clone();
    limits.hardware_rules = u64::MAX;
    limits.masks = u32::MAX;
    limits.counters = if whole.counters > 0 { u64::MAX } else { 0 };
    limits.hardware_fields = whole
        .fields
        .keys()
        .map(|field| (*field, dpumesh_core::MatchKinds::all()))
        .collect();
    limits.fields = limits.hardware_fields.clone();
    limits.hardware_actions = whole.actions;
    limits.software_fallback = true;
    limits
}
