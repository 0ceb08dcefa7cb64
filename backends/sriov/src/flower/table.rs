//! [`Table`]: the rules of one block, and the kernel that carries them out. Synchronous; [`super::Steering`] runs it on a thread
//! of its own.
//!
//! The [`RuleStore`] decides a batch; its changes become netlink messages that are sent together. When the kernel refuses
//! one, the store takes that rule back: it never shows what is not there.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::io;
use std::sync::Arc;

use dpumesh_core::steering::{
    Action, Atomicity, Batch, BatchOutcome, Change, Cookie, Counters, InstalledRule, MissPolicy, Occupancy,
    Operation, Owner, Pattern, Placement, PlacementRequest, SteeringRule, Undone, Verdict,
};
use dpumesh_core::{Effect, Epoch, Error, ErrorKind, PortRef, Result, SteeringCapabilities};
use dpumesh_hw::steering::{Plan, RuleStore, TableChange, judge};

use super::block;
use super::filter::{self, COPIES, Filter, NUMBERS, Place, Shown, Skip};
use super::kernel::{Answer, Kernel, Refusal, Request};
use super::key::Keys;
use super::owners::Owners;
use super::parts::{self, Part, Seat, parts};
use super::step::{Observed, Step};
use super::translate::{Misfit, Names};

const APPLY: &str = "steering.apply";
/// Cookie of the filters for frames that no rule matches.
const MISS: u128 = u128::from_be_bytes(*b"dpumesh-miss\0\0\0\0");
/// tc priorities behind all rules': frames of a port whose misses go to software, and all others.
const PASS: u16 = u16::MAX - 1;
const CLOSED: u16 = u16::MAX;
/// From so many cookies on the whole block is read at once.
const DUMP_FROM: usize = 64;

/// Rules of one block.
#[derive(Debug)]
pub(super) struct Table {
    kernel: Box<dyn Kernel>,
    backend: String,
    block: u32,
    pub(super) names: Names,
    store: RuleStore,
    epoch: Epoch,
    owners: Owners,
    /// Filters of each rule, by the store's slot.
    seated: HashMap<u32, Seated>,
    /// Copies in use, by key.
    copies: HashMap<CopyKey, u8>,
    numbers: HashSet<u32>,
    next_number: u32,
    /// Chains that end closed.
    closed: HashSet<u32>,
    open_ports: BTreeSet<PortRef>,
}

type CopyKey = (u32, u32, Vec<(u16, Vec<u8>)>);

#[derive(Clone, Debug)]
struct Seated {
    rule: Arc<SteeringRule>,
    places: Vec<Place>,
    copy: (CopyKey, u8),
    number: u32,
    placement: Placement,
}

/// What one change of the plan asks of the kernel.
enum Job {
    Add {
        slot: u32,
        operation: usize,
        filters: Vec<Filter>,
        seated: Box<Seated>,
    },
    Remove {
        slot: u32,
        operation: usize,
        seated: Option<Box<Seated>>,
    },
    /// It cannot even be asked.
    Refuse {
        slot: u32,
        operation: usize,
        error: Box<Error>,
    },
}

impl Table {
    /// Takes the block over: rules that are there stay, as far as these limits hold them.
    pub(super) fn open(
        kernel: Box<dyn Kernel>,
        backend: String,
        block: u32,
        names: Names,
        limits: SteeringCapabilities,
        epoch: Epoch,
    ) -> Result<Self> {
        let mut table = Self {
            kernel,
            store: RuleStore::new(backend.clone(), limits, epoch),
            backend,
            block,
            names,
            epoch,
            owners: Owners::default(),
            seated: HashMap::new(),
            copies: HashMap::new(),
            numbers: HashSet::new(),
            next_number: 0,
            closed: HashSet::new(),
            open_ports: BTreeSet::new(),
        };
        table.adopt()?;
        table.close_chain("steering.open", 0)?;
        Ok(table)
    }

    /// Begins a new life of the card: other netdevs, other limits.
    pub(super) fn renew(&mut self, names: Names, limits: SteeringCapabilities, epoch: Epoch) -> Result<()> {
        self.names = names;
        self.store.reset(limits, epoch);
        self.epoch = epoch;
        self.owners = Owners::default();
        self.seated.clear();
        self.copies.clear();
        self.numbers.clear();
        self.closed.clear();
        self.open_ports.clear();
        self.adopt()?;
        self.close_chain("steering.open", 0)
    }

    /// The kernel's side, for what is not about rules.
    pub(super) fn kernel(&mut self) -> &mut dyn Kernel {
        &mut *self.kernel
    }

    pub(super) fn validate(&self, rules: &[SteeringRule]) -> Vec<Verdict> {
        rules.iter().map(|rule| self.verdict(rule)).collect()
    }

    fn verdict(&self, rule: &SteeringRule) -> Verdict {
        match self.misfit(rule) {
            Some((field, reason)) => Verdict::No { field, reason },
            None => self.store.judge(rule),
        }
    }

    /// What keeps a rule that the limits allow from being put into words of tc.
    fn misfit(&self, rule: &SteeringRule) -> Option<Misfit> {
        match judge(rule, self.store.limits()) {
            Verdict::No { .. } => None,
            _ => parts(rule, &self.names).err(),
        }
    }

    pub(super) fn apply(&mut self, batch: &Batch) -> Result<BatchOutcome> {
        let misfits: Vec<Option<Misfit>> = batch
            .operations
            .iter()
            .map(|operation| match operation {
                Operation::Add(rule) => self.misfit(rule),
                Operation::Remove { .. } => None,
            })
            .collect();
        match (misfits.iter().position(Option::is_some), batch.atomicity) {
            (None, _) => self.carry_out(batch),
            (Some(_), Atomicity::Continue) => self.apply_fitting(batch, misfits),
            (Some(at), _) => self.roll_back_at(batch, at, &misfits),
        }
    }

    /// Carries out what fits, and puts the refusals between.
    fn apply_fitting(&mut self, batch: &Batch, misfits: Vec<Option<Misfit>>) -> Result<BatchOutcome> {
        let fitting = batch
            .operations
            .iter()
            .zip(&misfits)
            .filter(|(_, misfit)| misfit.is_none());
        let operations: Vec<Operation> = fitting.map(|(operation, _)| operation.clone()).collect();
        let mut results = self.carry_out(&Batch::new(operations))?.results.into_iter();
        let all = misfits
            .into_iter()
            .enumerate()
            .map(|(index, misfit)| match misfit {
                Some(misfit) => Err(self.refused(index, misfit)),
                None => results
                    .next()
                    .unwrap_or(Ok(Change::Skipped)) // one result per operation
                    .map_err(|error| error.index(index)),
            });
        Ok(BatchOutcome::new(all.collect()))
    }

    /// The operation `at` cannot be: nothing is done, unless one before it fails first.
    fn roll_back_at(&mut self, batch: &Batch, at: usize, misfits: &[Option<Misfit>]) -> Result<BatchOutcome> {
        let before = Batch::new(batch.operations[..at].to_vec()).with(batch.atomicity);
        let plan = self.store.apply(&before, 0)?;
        let failed = plan.outcome.results.iter().position(Result::is_err);
        let mut results = match failed {
            Some(_) => plan.outcome.results,
            None => {
                let skipped = plan.outcome.results.iter().map(|_| Ok(Change::Skipped)).collect();
                let _ = self.store.undo(plan); // it is the last change
                skipped
            }
        };
        if failed.is_none()
            && let Some(Some(misfit)) = misfits.get(at)
        {
            results.push(Err(self.refused(at, misfit.clone())));
        }
        results.resize(batch.operations.len(), Ok(Change::Skipped));
        Ok(BatchOutcome::new(results).undone(Undone::All))
    }

    fn refused(&self, index: usize, (field, reason): Misfit) -> Error {
        self.error(ErrorKind::Unsupported, APPLY, reason)
            .field(field)
            .index(index)
    }

    fn carry_out(&mut self, batch: &Batch) -> Result<BatchOutcome> {
        let plan = self.store.apply(batch, 0)?;
        let jobs = self.jobs(batch, &plan);
        let requests: Vec<Request> = jobs.iter().flat_map(|job| job.requests(self.block)).collect();
        let answers = match self.exchange(APPLY, &requests) {
            Ok(answers) => answers,
            Err(error) => {
                // Nobody can tell what took effect: what is there is read again.
                let _ = self.store.undo(plan);
                let _ = self.renew(self.names.clone(), self.store.limits().clone(), self.epoch);
                return Err(error.effect(Effect::Unknown));
            }
        };
        let mut answers = answers.into_iter();
        let mut done = Vec::with_capacity(jobs.len());
        for job in jobs {
            let of_job: Vec<Answer> = answers.by_ref().take(job.requests(self.block).len()).collect();
            done.push((job, of_job));
        }
        match batch.atomicity {
            Atomicity::Continue => Ok(self.settle(plan, batch, done)),
            _ => Ok(self.settle_or_undo(plan, batch, done)),
        }
    }

    /// The plan's changes in words of tc, seats taken and given back in order.
    fn jobs(&mut self, batch: &Batch, plan: &Plan) -> Vec<Job> {
        let mut jobs = Vec::with_capacity(plan.changes.len());
        let mut next = 0;
        for change in &plan.changes {
            match change {
                TableChange::Installed {
                    slot,
                    rule,
                    placement,
                } => {
                    let is_this = |operation: &Operation| matches!(operation, Operation::Add(r) if r.cookie == rule.cookie);
                    let ahead = batch.operations.iter().enumerate().skip(next);
                    let found =
                        ahead
                            .zip(plan.outcome.results.iter().skip(next))
                            .find(|((_, operation), result)| {
                                is_this(operation) && matches!(result, Ok(Change::Added(_)))
                            });
                    let operation = found.map_or(next, |((index, _), _)| index);
                    next = operation + 1;
                    jobs.push(self.seat(*slot, operation, rule, placement));
                }
                TableChange::Uninstalled { slot, operation } => {
                    next = operation + 1;
                    let seated = self.seated.remove(slot);
                    if let Some(seated) = &seated {
                        self.vacate(seated);
                    }
                    jobs.push(Job::Remove {
                        slot: *slot,
                        operation: *operation,
                        seated: seated.map(Box::new),
                    });
                }
            }
        }
        jobs
    }

    fn seat(&mut self, slot: u32, operation: usize, rule: &Arc<SteeringRule>, placement: &Placement) -> Job {
        match self.take_seat(rule, placement) {
            Ok((filters, seated)) => {
                self.seated.insert(slot, seated.clone());
                Job::Add {
                    slot,
                    operation,
                    filters,
                    seated: Box::new(seated),
                }
            }
            Err(error) => Job::Refuse {
                slot,
                operation,
                error: Box::new(error.index(operation)),
            },
        }
    }

    fn take_seat(
        &mut self,
        rule: &Arc<SteeringRule>,
        placement: &Placement,
    ) -> Result<(Vec<Filter>, Seated)> {
        let parts = parts(rule, &self.names).map_err(|misfit| self.refused(0, misfit))?;
        self.close_chain(APPLY, rule.group.0)?;
        if let Some(Action::Jump(group)) = rule.actions.last() {
            self.close_chain(APPLY, group.0)?;
        }
        let owner = self.owner_number(rule.owner)?;
        let key = copy_key(rule, &parts);
        let used = self.copies.get(&key).copied().unwrap_or(0);
        let Some(copy) = (1..=COPIES).find(|copy| used & (1 << copy) == 0) else {
            let message =
                format!("{COPIES} rules have this pattern at this priority: tc tells no more apart");
            return Err(self
                .error(ErrorKind::CapacityExceeded, APPLY, message)
                .object("steering.rules"));
        };
        let Some(number) = self.free_number() else {
            let message = format!("{NUMBERS} rules are there: tc tells no more apart");
            return Err(self
                .error(ErrorKind::CapacityExceeded, APPLY, message)
                .object("steering.rules"));
        };
        let skip = match (placement, rule.placement) {
            (_, PlacementRequest::Hardware) => Skip::Software,
            (Placement::Software(_), _) => Skip::Hardware,
            _ => Skip::Nothing,
        };
        let seat = Seat {
            owner,
            number,
            skip,
            copy,
        };
        let filters: Vec<Filter> = parts
            .into_iter()
            .map(|part| parts::filter(rule, part, seat))
            .collect();
        self.copies.insert(key.clone(), used | (1 << copy));
        self.numbers.insert(number);
        let seated = Seated {
            rule: Arc::clone(rule),
            places: filters.iter().map(|filter| filter.place).collect(),
            copy: (key, copy),
            number,
            placement: placement.clone(),
        };
        Ok((filters, seated))
    }

    fn free_number(&mut self) -> Option<u32> {
        let from = self.next_number;
        // Never 0: a handle that is all zero lets the kernel choose.
        let all = (0..NUMBERS).map(|i| (from + i) % NUMBERS);
        let free = all
            .filter(|number| *number != 0)
            .find(|number| !self.numbers.contains(number))?;
        self.next_number = (free + 1) % NUMBERS;
        Some(free)
    }

    fn vacate(&mut self, seated: &Seated) {
        let (key, copy) = &seated.copy;
        if let Some(used) = self.copies.get_mut(key) {
            *used &= !(1 << copy);
            if *used == 0 {
                self.copies.remove(key);
            }
        }
        self.numbers.remove(&seated.number);
    }

    /// Enters what the kernel made of each change; what it refused is taken out of the store again.
    fn settle(&mut self, mut plan: Plan, batch: &Batch, done: Vec<(Job, Vec<Answer>)>) -> BatchOutcome {
        let mut failed: HashMap<u32, Error> = HashMap::new();
        let mut outcome = std::mem::replace(&mut plan.outcome, BatchOutcome::new(Vec::new()));
        for (job, answers) in done {
            let (slot, operation) = job.names();
            match self.judge_job(&job, &answers) {
                Ok(change) => {
                    let was_refused = failed.remove(&slot).is_some();
                    outcome.results[operation] = Ok(match (change, &outcome.results[operation]) {
                        (Change::Removed(_), _) if was_refused => Change::Absent,
                        (Change::Removed(found), Ok(Change::Removed(counts))) => {
                            Change::Removed(counts.and(found))
                        }
                        (change, _) => change,
                    });
                }
                Err(error) => {
                    self.take_back(&job, &answers);
                    outcome.results[operation] = Err(error.clone());
                    failed.insert(slot, error);
                }
            }
        }
        // What is refused is not there: neither for the store, nor for a repetition in this batch.
        for (slot, error) in failed {
            let Some(rule) = self.store.rule(slot).cloned() else {
                continue;
            };
            let remove = Operation::Remove {
                owner: rule.owner,
                cookie: rule.cookie,
            };
            let _ = self.store.apply(&Batch::new(vec![remove]), 0);
            for (operation, result) in batch.operations.iter().zip(&mut outcome.results) {
                let repeats = matches!(operation, Operation::Add(r) if r.cookie == rule.cookie);
                if repeats && matches!(result, Ok(Change::Present(_))) {
                    *result = Err(error.clone());
                }
            }
        }
        self.tell_placements(batch, &mut outcome);
        outcome
    }

    /// All or nothing: after a refusal the kernel is brought back to where it was.
    fn settle_or_undo(&mut self, plan: Plan, batch: &Batch, done: Vec<(Job, Vec<Answer>)>) -> BatchOutcome {
        let first = done
            .iter()
            .position(|(job, answers)| self.judge_job(job, answers).is_err());
        let Some(first) = first else {
            return self.settle(plan, batch, done);
        };
        let (_, at) = done[first].0.names();
        let error = self.judge_job(&done[first].0, &done[first].1).err();
        let mut undone = Undone::All;
        for (job, answers) in done.iter().rev() {
            match job {
                Job::Remove {
                    slot,
                    seated: Some(seated),
                    ..
                } => {
                    if let Err(error) = self.put_back(*slot, seated, answers) {
                        undone = Undone::Failed(Box::new(error));
                    }
                }
                _ => self.take_back(job, answers),
            }
        }
        if self.store.undo(plan).is_err() {
            let message = "the rules changed while they were undone";
            undone = Undone::Failed(Box::new(self.error(ErrorKind::Fault, APPLY, message)));
        }
        let mut results: Vec<Result<Change>> = batch.operations.iter().map(|_| Ok(Change::Skipped)).collect();
        if let Some(error) = error {
            results[at] = Err(error);
        }
        BatchOutcome::new(results).undone(undone)
    }

    /// What became of one change.
    fn judge_job(&self, job: &Job, answers: &[Answer]) -> Result<Change> {
        match job {
            Job::Refuse { error, .. } => Err((**error).clone()),
            Job::Add {
                operation, seated, ..
            } => {
                if let Some(refusal) = answers.iter().find_map(|answer| answer.as_ref().err()) {
                    return Err(self.refusal(refusal, &seated.rule).index(*operation));
                }
                Ok(Change::Added(self.placement(seated, &self.shown(answers))))
            }
            Job::Remove { .. } => {
                let shown = self.shown(answers);
                Ok(Change::Removed((!shown.is_empty()).then(|| self.count(&shown))))
            }
        }
    }

    /// Removes what was added of a rule, and gives its seat back.
    fn take_back(&mut self, job: &Job, answers: &[Answer]) {
        let Job::Add {
            slot,
            filters,
            seated,
            ..
        } = job
        else {
            return;
        };
        let added = filters.iter().zip(answers).filter(|(_, answer)| answer.is_ok());
        let requests: Vec<Request> = added.map(|(filter, _)| filter.place.remove(self.block)).collect();
        let _ = self.exchange(APPLY, &requests); // `list` reads what is there
        // The seat may be another rule's already, later in the same batch.
        if self
            .seated
            .get(slot)
            .is_some_and(|there| there.number == seated.number)
        {
            self.seated.remove(slot);
            self.vacate(seated);
        }
    }

    /// Installs a removed rule again, with fresh counters.
    fn put_back(&mut self, slot: u32, seated: &Seated, answers: &[Answer]) -> Result<()> {
        let filters: Vec<Request> = self
            .shown(answers)
            .into_iter()
            .map(|shown| shown.filter.add(self.block))
            .collect();
        for answer in self.exchange(APPLY, &filters)? {
            answer.map_err(|refusal| self.refusal(&refusal, &seated.rule))?;
        }
        let (key, copy) = &seated.copy;
        *self.copies.entry(key.clone()).or_default() |= 1 << copy;
        self.numbers.insert(seated.number);
        self.seated.insert(slot, seated.clone());
        Ok(())
    }

    /// Puts the places that the kernel chose into the answers.
    fn tell_placements(&mut self, batch: &Batch, outcome: &mut BatchOutcome) {
        for (operation, result) in batch.operations.iter().zip(&mut outcome.results) {
            let (Operation::Add(rule), Ok(change)) = (operation, result) else {
                continue;
            };
            let slot = self.store.slot(rule.owner, rule.cookie);
            let Some(seated) = slot.and_then(|slot| self.seated.get_mut(&slot)) else {
                continue;
            };
            match change {
                Change::Added(placement) => seated.placement = placement.clone(),
                Change::Present(placement) => *placement = seated.placement.clone(),
                _ => {}
            }
        }
    }

    fn placement(&self, seated: &Seated, shown: &[Shown]) -> Placement {
        let in_hardware = shown.iter().filter(|shown| shown.in_hardware).count();
        match &seated.placement {
            Placement::Hardware if in_hardware == 0 => {
                Placement::Software("the driver did not take it".into())
            }
            Placement::Hardware if in_hardware < seated.places.len() => Placement::Partial(format!(
                "the driver took {in_hardware} of {} filters",
                seated.places.len()
            )),
            placement => placement.clone(),
        }
    }

    fn shown(&self, answers: &[Answer]) -> Vec<Shown> {
        let messages = answers.iter().flatten().flatten();
        messages
            .filter_map(|message| Filter::read(&message.body, self.block))
            .collect()
    }

    fn count(&self, shown: &[Shown]) -> Counters {
        let sum = shown.iter().fold(Observed::default(), |sum, shown| Observed {
            packets: sum.packets + shown.observed.packets,
            octets: sum.octets + shown.observed.octets,
            idle_ms: match (sum.idle_ms, shown.observed.idle_ms) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            },
        });
        Counters {
            packets: sum.packets,
            octets: sum.octets,
            epoch: self.epoch,
            idle_ms: sum.idle_ms,
        }
    }

    pub(super) fn list(&mut self, owner: Owner) -> Result<Vec<InstalledRule>> {
        const LIST: &str = "steering.list";
        let shown: HashMap<Place, Shown> = self
            .dump(LIST)?
            .into_iter()
            .map(|shown| (shown.filter.place, shown))
            .collect();
        self.forget_missing(&shown);
        let mut rules: Vec<&Seated> = self
            .seated
            .values()
            .filter(|seated| seated.rule.owner == owner)
            .collect();
        rules.sort_by_key(|seated| (seated.rule.group, seated.rule.priority, seated.rule.cookie));
        let installed = rules.into_iter().map(|seated| {
            let there: Vec<Shown> = seated
                .places
                .iter()
                .filter_map(|place| shown.get(place).cloned())
                .collect();
            InstalledRule::new((*seated.rule).clone(), self.placement(seated, &there))
        });
        Ok(installed.collect())
    }

    /// Somebody removed filters of ours: what is left of those rules goes too.
    fn forget_missing(&mut self, shown: &HashMap<Place, Shown>) {
        let gone = self.seated.iter().filter(|(_, seated)| {
            !seated.places.iter().all(|place| {
                shown
                    .get(place)
                    .is_some_and(|shown| shown.filter.cookie == seated.rule.cookie.0)
            })
        });
        let gone: Vec<u32> = gone.map(|(slot, _)| *slot).collect();
        for slot in gone {
            let Some(seated) = self.seated.remove(&slot) else {
                continue;
            };
            tracing::warn!(cookie = %seated.rule.cookie, "a steering rule vanished from the kernel");
            let rest = seated.places.iter().filter(|place| shown.contains_key(place));
            let requests: Vec<Request> = rest.map(|place| place.remove(self.block)).collect();
            let _ = self.exchange("steering.list", &requests);
            self.vacate(&seated);
            let remove = Operation::Remove {
                owner: seated.rule.owner,
                cookie: seated.rule.cookie,
            };
            let _ = self.store.apply(&Batch::new(vec![remove]), 0);
        }
    }

    pub(super) fn counters(&mut self, owner: Owner, cookies: &[Cookie]) -> Result<Vec<Option<Counters>>> {
        const COUNTERS: &str = "steering.counters";
        let places: Vec<Vec<Place>> = cookies
            .iter()
            .map(|cookie| {
                let seated = self
                    .store
                    .slot(owner, *cookie)
                    .and_then(|slot| self.seated.get(&slot));
                let counting = seated.filter(|seated| seated.rule.actions.contains(&Action::Count));
                counting.map(|seated| seated.places.clone()).unwrap_or_default()
            })
            .collect();
        let shown: HashMap<Place, Shown> = match cookies.len() >= DUMP_FROM {
            true => self.dump(COUNTERS)?,
            false => {
                let requests: Vec<Request> = places
                    .iter()
                    .flatten()
                    .map(|place| place.get(self.block))
                    .collect();
                let answers = self.exchange(COUNTERS, &requests)?;
                self.shown(&answers)
            }
        }
        .into_iter()
        .map(|shown| (shown.filter.place, shown))
        .collect();
        let of = |places: Vec<Place>| {
            let there: Vec<Shown> = places
                .iter()
                .filter_map(|place| shown.get(place).cloned())
                .collect();
            (!there.is_empty()).then(|| self.count(&there))
        };
        Ok(places.into_iter().map(of).collect())
    }

    pub(super) fn flush(&mut self, owner: Owner) -> Result<u64> {
        const FLUSH: &str = "steering.flush";
        let removals = self.store.flush(owner, 0);
        let mut requests = Vec::new();
        for removal in &removals {
            if let Some(seated) = self.seated.remove(&removal.slot) {
                self.vacate(&seated);
                requests.extend(seated.places.iter().map(|place| place.remove(self.block)));
            }
        }
        match self.exchange(FLUSH, &requests) {
            Ok(answers) => {
                // One that is gone already is what was wanted.
                let kept = answers
                    .iter()
                    .filter_map(|answer| answer.as_ref().err())
                    .find(|refusal| refusal.errno != libc::ENOENT);
                match kept {
                    None => Ok(removals.len() as u64),
                    Some(refusal) => {
                        let error = self
                            .error(ErrorKind::Io, FLUSH, refusal.to_string())
                            .effect(Effect::Partial);
                        self.renew(self.names.clone(), self.store.limits().clone(), self.epoch)?;
                        Err(error)
                    }
                }
            }
            Err(error) => Err(error.effect(Effect::Partial)),
        }
    }

    pub(super) fn set_miss_policy(&mut self, port: PortRef, policy: MissPolicy) -> Result<()> {
        const SET: &str = "steering.set_miss_policy";
        let Some(link) = self.names.link(port) else {
            return Err(self
                .error(ErrorKind::NotFound, SET, "there is no such port")
                .object(port));
        };
        let Some(name) = self.names.name(port) else {
            return Err(self
                .error(ErrorKind::NotFound, SET, "the port's netdev is gone")
                .object(port));
        };
        let filter = miss(0, PASS, link, Some(name), Step::Pass);
        let (request, ignored) = match policy {
            MissPolicy::Software => (filter.add(self.block), libc::EEXIST),
            MissPolicy::Drop => (filter.place.remove(self.block), libc::ENOENT),
        };
        if let Some(Err(refusal)) = self.exchange(SET, &[request])?.into_iter().next()
            && refusal.errno != ignored
        {
            return Err(self.error(ErrorKind::Io, SET, refusal.to_string()).object(port));
        }
        match policy {
            MissPolicy::Software => self.open_ports.insert(port),
            MissPolicy::Drop => self.open_ports.remove(&port),
        };
        Ok(())
    }

    pub(super) fn occupancy(&self) -> Vec<Occupancy> {
        self.store.occupancy()
    }

    /// Takes up what an earlier process left in the block, and closes every port.
    fn adopt(&mut self) -> Result<()> {
        const OPEN: &str = "steering.open";
        let shown = self.dump(OPEN)?;
        let mut by_cookie: HashMap<u128, Vec<&Filter>> = HashMap::new();
        let mut open = Vec::new();
        for filter in shown.iter().map(|shown| &shown.filter) {
            if let Some((number, owner)) = Owners::read(filter) {
                self.owners.enter(number, owner);
            } else if filter.cookie == MISS && filter.place.prio == CLOSED {
                self.closed.insert(filter.place.chain);
            } else if filter.cookie == MISS && filter.place.prio == PASS {
                open.push(filter.place.remove(self.block));
            } else {
                by_cookie.entry(filter.cookie).or_default().push(filter);
            }
        }
        let _ = self.exchange(OPEN, &open)?;
        for (cookie, filters) in by_cookie {
            if self.adopt_rule(&filters).is_none() {
                tracing::warn!(
                    cookie = format_args!("{cookie:032x}"),
                    "filters of somebody else stand in the card's block"
                );
            }
        }
        Ok(())
    }

    fn adopt_rule(&mut self, filters: &[&Filter]) -> Option<()> {
        let rule = parts::rule_of(filters, |number| self.owners.owner(number), &self.names)?;
        let parts = parts(&rule, &self.names).ok()?;
        let main = filters.iter().find(|filter| !filter.keys.is_ttl_ending())?;
        let (_, copy) = filter::priority_of(main.place.prio)?;
        let plan = self
            .store
            .apply(&Batch::new(vec![Operation::Add(rule)]), 0)
            .ok()?;
        let (rule, slot, placement) = match plan.changes.into_iter().next()? {
            TableChange::Installed {
                slot,
                rule,
                placement,
            } => (rule, slot, placement),
            TableChange::Uninstalled { .. } => return None,
        };
        let key = copy_key(&rule, &parts);
        let number = filter::Handle::unpack(main.place.handle).number;
        *self.copies.entry(key.clone()).or_default() |= 1 << copy;
        self.numbers.insert(number);
        let places = filters.iter().map(|filter| filter.place).collect();
        self.seated.insert(
            slot,
            Seated {
                rule,
                places,
                copy: (key, copy),
                number,
                placement,
            },
        );
        Some(())
    }

    /// Sees to it that what no rule of a chain matches is dropped.
    fn close_chain(&mut self, operation: &'static str, chain: u32) -> Result<()> {
        if self.closed.contains(&chain) {
            return Ok(());
        }
        let filter = miss(chain, CLOSED, 1, None, Step::Drop);
        self.must(operation, filter.add(self.block))?;
        self.closed.insert(chain);
        Ok(())
    }

    fn owner_number(&mut self, owner: Owner) -> Result<u8> {
        if let Some(number) = self.owners.number(owner) {
            return Ok(number);
        }
        let Some((number, filter)) = self.owners.next(owner) else {
            let message = format!("{} owners have rules: tc tells no more apart", filter::OWNERS);
            return Err(self
                .error(ErrorKind::CapacityExceeded, APPLY, message)
                .object("steering.owners"));
        };
        self.must(APPLY, filter.add(self.block))?;
        self.owners.enter(number, owner);
        Ok(number)
    }

    fn must(&mut self, operation: &'static str, request: Request) -> Result<()> {
        match self.exchange(operation, &[request])?.pop() {
            Some(Err(refusal)) if refusal.errno != libc::EEXIST => Err(self
                .error(ErrorKind::Io, operation, refusal.to_string())
                .vendor_code(refusal.errno.into())),
            _ => Ok(()),
        }
    }

    fn dump(&mut self, operation: &'static str) -> Result<Vec<Shown>> {
        let answers = self.exchange(operation, &[filter::dump(self.block)])?;
        if let Some(refusal) = answers.iter().find_map(|answer| answer.as_ref().err()) {
            return Err(self
                .error(ErrorKind::Io, operation, refusal.to_string())
                .vendor_code(refusal.errno.into()));
        }
        Ok(self.shown(&answers))
    }

    fn exchange(&mut self, operation: &'static str, requests: &[Request]) -> Result<Vec<Answer>> {
        if requests.is_empty() {
            return Ok(Vec::new());
        }
        self.kernel.exchange(requests).map_err(|error: io::Error| {
            self.error(ErrorKind::Io, operation, format!("netlink: {error}"))
                .source(error)
        })
    }

    /// The kernel's no in the contract's words.
    fn refusal(&self, refusal: &Refusal, rule: &SteeringRule) -> Error {
        let kind = match refusal.errno {
            libc::EOPNOTSUPP | libc::EINVAL => ErrorKind::Unsupported,
            libc::ENOSPC | libc::ENOMEM | libc::ENOBUFS => ErrorKind::CapacityExceeded,
            libc::EEXIST => ErrorKind::Conflict,
            libc::ENODEV => ErrorKind::DeviceLost,
            libc::EPERM | libc::EACCES => ErrorKind::Denied,
            _ => ErrorKind::Io,
        };
        let error = self
            .error(kind, APPLY, format!("the kernel refused: {refusal}"))
            .vendor_code(refusal.errno.into());
        match (kind, rule.placement) {
            (ErrorKind::CapacityExceeded, _) => error.object("steering.hardware_rules"),
            (ErrorKind::Unsupported, PlacementRequest::Hardware) => {
                error.object(rule.cookie).field("placement")
            }
            _ => error.object(rule.cookie),
        }
    }

    fn error(
        &self,
        kind: ErrorKind,
        operation: &'static str,
        message: impl Into<std::borrow::Cow<'static, str>>,
    ) -> Error {
        Error::new(kind, operation, message).backend(self.backend.clone())
    }

    /// Takes the block off a netdev that stops being a port.
    pub(super) fn unbind(&mut self, link: u32) -> io::Result<()> {
        block::unbind(&mut *self.kernel, link, self.block)
    }
}

impl Job {
    fn names(&self) -> (u32, usize) {
        match self {
            Self::Add { slot, operation, .. }
            | Self::Remove { slot, operation, .. }
            | Self::Refuse { slot, operation, .. } => (*slot, *operation),
        }
    }

    fn requests(&self, block: u32) -> Vec<Request> {
        match self {
            Self::Add { filters, .. } => filters.iter().map(|filter| filter.add(block)).collect(),
            Self::Remove {
                seated: Some(seated), ..
            } => seated.places.iter().map(|place| place.remove(block)).collect(),
            Self::Remove { .. } | Self::Refuse { .. } => Vec::new(),
        }
    }
}

fn copy_key(rule: &SteeringRule, parts: &[Part]) -> CopyKey {
    let keys = parts
        .first()
        .map(|part| part.keys.attributes().collect())
        .unwrap_or_default();
    (rule.group.0, rule.priority.0, keys)
}

/// A filter for what no rule matches.
fn miss(chain: u32, prio: u16, handle: u32, link: Option<&str>, step: Step) -> Filter {
    Filter {
        place: Place { chain, prio, handle },
        skip: Skip::Nothing,
        keys: Keys::of(&Pattern::default(), None, link).unwrap_or_default(), // nothing to contradict
        steps: vec![step],
        cookie: MISS,
    }
}
