//! [`Card`]: the simulated silicon. One lock, plain tables, no knowledge of C.
//!
//! Results are the header's codes. What a call does while the card is being reset, or with the generation of a former life,
//! is decided in one place ([`Card::alive`], [`Card::fenced`]).

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use dpumesh_yusur::table::{
    self, BatchResult, Counter, Entry, Event, Info, Key, Limits, Meter, SteeringTable, Step, Tunnel,
};

use crate::programs::Programs;
use crate::settings::Settings;

/// Result with one of the header's codes.
pub type Status<T = ()> = Result<T, i32>;

/// Events that a handle which does not wait may miss.
const LOG: usize = 4096;

/// One card, shared by its handles.
#[derive(Debug)]
pub struct Card {
    state: Mutex<State>,
    happened: Condvar,
    pci: String,
}

/// Everything that changes.
#[derive(Debug)]
pub struct State {
    /// What kind of card it is.
    pub settings: Settings,
    /// It is not being reset.
    pub alive: bool,
    /// Its present life.
    pub generation: u64,
    mode: u32,
    /// Steering.
    pub steering: Steering,
    /// Programs, their tables, connections.
    pub programs: Programs,
    events: VecDeque<Event>,
    /// Events that are not in the log any more.
    forgotten: u64,
    sabotage: HashMap<Target, (u64, i32)>,
    /// The processor goes after so many more entries.
    last_entries: Option<u64>,
}

/// What can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// Adding an entry.
    Add,
    /// Removing an entry.
    Delete,
    /// Making a table.
    Create,
    /// Reading a table.
    Read,
    /// Reading counters.
    Count,
    /// Setting a tunnel.
    Tunnel,
}

/// Steering memory.
#[derive(Debug, Default)]
pub struct Steering {
    pub(crate) tables: BTreeMap<u32, Content>,
    pub(crate) entries: u64,
    pub(crate) counters: HashMap<u32, Counter>,
    pub(crate) meters: HashMap<u32, Bucket>,
    pub(crate) tunnels: HashMap<u32, Tunnel>,
    pub(crate) misses: HashMap<u64, u32>,
    pub(crate) miss: u32,
}

/// A steering table.
#[derive(Debug)]
pub struct Content {
    pub(crate) table: SteeringTable,
    pub(crate) entries: HashMap<Key, Held>,
}

/// An entry.
#[derive(Clone, Debug)]
pub struct Held {
    pub(crate) entry: Entry,
    pub(crate) hit: Instant,
    pub(crate) told: bool,
}

/// A meter and what is in its bucket.
#[derive(Clone, Debug)]
pub struct Bucket {
    pub(crate) meter: Meter,
    pub(crate) octets: u64,
    pub(crate) filled: Instant,
}

impl Card {
    /// A card of this kind at this address.
    pub fn new(pci: &str, settings: Settings) -> Self {
        let mode = settings.mode;
        let programs = Programs::new(&settings.limits_in(mode));
        Self {
            state: Mutex::new(State {
                alive: true,
                generation: 1,
                mode,
                steering: Steering::default(),
                programs,
                events: VecDeque::new(),
                forgotten: 0,
                sabotage: HashMap::new(),
                last_entries: None,
                settings,
            }),
            happened: Condvar::new(),
            pci: pci.to_owned(),
        }
    }

    /// The state, in whichever life.
    pub fn state(&self) -> MutexGuard<'_, State> {
        // A panic while it was held would have left tables and numbers in disagreement at worst: it is a simulator.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state of a card that is there.
    ///
    /// # Errors
    /// `E_GONE`.
    pub fn alive(&self) -> Status<MutexGuard<'_, State>> {
        let state = self.state();
        if state.alive {
            Ok(state)
        } else {
            Err(table::E_GONE)
        }
    }

    /// The state of a card in this life.
    ///
    /// # Errors
    /// `E_GONE`, `E_STALE`.
    pub fn fenced(&self, generation: u64) -> Status<MutexGuard<'_, State>> {
        let state = self.alive()?;
        if state.generation == generation {
            Ok(state)
        } else {
            Err(table::E_STALE)
        }
    }

    /// Who it is.
    pub fn info(&self) -> Info {
        let state = self.state();
        Info {
            size: size_of::<Info>() as u32,
            mode: state.mode,
            generation: state.generation,
            alive: state.alive.into(),
            reserved: 0,
            firmware: table::name(&state.settings.firmware),
            model: table::name("NP simulator"),
            serial: table::name(&self.pci),
        }
    }

    /// The processor goes; its tables are lost.
    pub fn lose(&self) {
        let mut state = self.state();
        if state.alive {
            state.alive = false;
            let value = state.generation;
            state.raise(table::EVENT_LOST, value);
        }
        drop(state);
        self.happened.notify_all();
    }

    /// The processor comes back, empty, in a new life.
    pub fn restore(&self) {
        let pause = self.state().settings.reset_ms;
        std::thread::sleep(Duration::from_millis(pause));
        let mut state = self.state();
        if !state.alive {
            state.alive = true;
            state.last_entries = None;
            state.generation += 1;
            state.steering = Steering::default();
            state.programs = Programs::new(&state.limits());
            let value = state.generation;
            state.raise(table::EVENT_BACK, value);
        }
        drop(state);
        self.happened.notify_all();
    }

    /// Changes the mode.
    ///
    /// # Errors
    /// `E_INVALID`, `E_GONE`, `E_STALE`.
    pub fn set_mode(&self, generation: u64, mode: u32) -> Status {
        if mode > table::MODE_DPU {
            return Err(table::E_INVALID);
        }
        self.fenced(generation)?.mode = mode;
        self.lose();
        self.restore();
        Ok(())
    }

    /// Reports a condition.
    pub fn set_health(&self, code: u64) {
        self.state().raise(table::EVENT_HEALTH, code);
        self.happened.notify_all();
    }

    /// Makes so many of the next calls or entries of a kind fail with a code.
    pub fn sabotage(&self, target: Target, count: u64, code: i32) {
        self.state().sabotage.insert(target, (count, code));
    }

    /// The processor goes in the middle of a batch: after so many more entries.
    pub fn lose_after(&self, entries: u64) {
        self.state().last_entries = Some(entries);
    }

    /// Number of the next event.
    pub fn now(&self) -> u64 {
        let state = self.state();
        state.forgotten + state.events.len() as u64
    }

    /// Events from number `from` on, at most `room`; waits for the first for at most `timeout`.
    pub fn wait(&self, from: &mut u64, room: usize, timeout: Duration) -> Vec<Event> {
        let until = Instant::now() + timeout;
        let mut state = self.state();
        loop {
            let due = state.age();
            let skip = from.saturating_sub(state.forgotten) as usize;
            let events: Vec<Event> = state.events.iter().skip(skip).take(room).copied().collect();
            let left = until.saturating_duration_since(Instant::now());
            if !events.is_empty() || left.is_zero() {
                *from = state.forgotten.max(*from) + events.len() as u64;
                return events;
            }
            let left = due.map_or(left, |due| {
                left.min(due.saturating_duration_since(Instant::now()))
            });
            // At least a moment, so that a due time that rounds down does not spin.
            let left = left.max(Duration::from_millis(1));
            state = self
                .happened
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Adds and removes entries, going on after failures.
    ///
    /// # Errors
    /// `E_INVALID` (too many), `E_GONE`, `E_STALE`.
    pub fn write(&self, generation: u64, entries: &[Entry]) -> Status<BatchResult> {
        let (pause, longest) = {
            let state = self.fenced(generation)?;
            (state.settings.insert_us, state.limits().batch_max as usize)
        };
        if entries.len() > longest {
            return Err(table::E_INVALID);
        }
        let additions = entries.iter().filter(|entry| entry.op == table::OP_PUT).count() as u64;
        if pause > 0 {
            std::thread::sleep(Duration::from_micros(pause * additions));
        }
        let mut state = self.fenced(generation)?;
        let mut result = BatchResult::default();
        for entry in entries {
            match state.write(entry) {
                Ok(()) => result.done += 1,
                Err(code) => {
                    if result.failed == 0 {
                        result.first_error = code;
                    }
                    result.failed += 1;
                }
            }
        }
        drop(state);
        self.happened.notify_all(); // there may be something to age
        Ok(result)
    }
}

impl State {
    /// What it can do in its mode.
    pub fn limits(&self) -> Limits {
        self.settings.limits_in(self.mode)
    }

    /// Fails where a test wants it.
    ///
    /// # Errors
    /// The code that it named.
    pub fn fails(&mut self, target: Target) -> Status {
        match self.sabotage.get_mut(&target) {
            Some((left, code)) if *left > 0 => {
                *left -= 1;
                Err(*code)
            }
            _ => Ok(()),
        }
    }

    /// One more entry is written.
    fn wears(&mut self) -> Status {
        match &mut self.last_entries {
            Some(0) => {
                if self.alive {
                    self.alive = false;
                    let value = self.generation;
                    self.raise(table::EVENT_LOST, value);
                }
                Err(table::E_GONE)
            }
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn raise(&mut self, kind: u32, value: u64) {
        if self.events.len() == LOG {
            self.events.pop_front();
            self.forgotten += 1;
        }
        self.events.push_back(Event {
            kind,
            reserved: 0,
            value,
        });
    }

    /// Tells of entries that nothing hit for their time, and when the next is due.
    fn age(&mut self) -> Option<Instant> {
        let now = Instant::now();
        let mut next: Option<Instant> = None;
        let mut aged = Vec::new();
        let held = self
            .steering
            .tables
            .values_mut()
            .flat_map(|table| table.entries.values_mut());
        for held in held.filter(|held| held.entry.idle_ms > 0 && !held.told) {
            let due = held.hit + Duration::from_millis(held.entry.idle_ms.into());
            if due <= now {
                held.told = true;
                aged.push(held.entry.user);
            } else {
                next = Some(next.map_or(due, |next| next.min(due)));
            }
        }
        for user in aged {
            self.raise(table::EVENT_AGED, user);
        }
        next
    }

    /// Makes a steering table.
    ///
    /// # Errors
    /// `E_UNSUPPORTED`, `E_INVALID`, `E_EXISTS`, `E_FULL`.
    pub fn create(&mut self, table: SteeringTable) -> Status {
        self.fails(Target::Create)?;
        let limits = self.limits();
        if limits.entries == 0 || table.fields & !limits.fields != 0 {
            return Err(table::E_UNSUPPORTED);
        }
        if table.id >= limits.tables || table.group >= limits.groups || table.priority >= limits.priorities {
            return Err(table::E_INVALID);
        }
        let place = |table: &SteeringTable| (table.group, table.priority, table.fields);
        let tables = &mut self.steering.tables;
        if tables.contains_key(&table.id) || tables.values().any(|other| place(&other.table) == place(&table))
        {
            return Err(table::E_EXISTS);
        }
        let mut profiles: Vec<u64> = tables
            .values()
            .filter(|other| !other.entries.is_empty())
            .map(|other| other.table.fields)
            .collect();
        profiles.sort_unstable();
        profiles.dedup();
        if !profiles.contains(&table.fields) && profiles.len() >= limits.profiles as usize {
            return Err(table::E_FULL);
        }
        let entries = HashMap::new();
        tables.insert(table.id, Content { table, entries });
        Ok(())
    }

    /// Removes an empty steering table.
    ///
    /// # Errors
    /// `E_NOT_FOUND`, `E_BUSY`.
    pub fn destroy(&mut self, id: u32) -> Status {
        let content = self.steering.tables.get(&id).ok_or(table::E_NOT_FOUND)?;
        if !content.entries.is_empty() {
            return Err(table::E_BUSY);
        }
        self.steering.tables.remove(&id);
        Ok(())
    }

    fn write(&mut self, entry: &Entry) -> Status {
        self.wears()?;
        match entry.op {
            table::OP_DELETE => self.fails(Target::Delete)?,
            _ => self.fails(Target::Add)?,
        }
        let limits = self.limits();
        let steering = &mut self.steering;
        let content = steering.tables.get_mut(&entry.table).ok_or(table::E_NOT_FOUND)?;
        match entry.op {
            table::OP_DELETE => {
                if content.entries.remove(&entry.key).is_some() {
                    steering.entries -= 1;
                }
                Ok(())
            }
            table::OP_PUT => {
                check(entry, &limits)?;
                let needs = |step: &Step| match step.kind {
                    table::STEP_METER => steering.meters.contains_key(&(step.arg as u32)),
                    table::STEP_ENCAPSULATE => steering.tunnels.contains_key(&(step.arg as u32)),
                    _ => true,
                };
                if !steps(entry).iter().all(needs) {
                    return Err(table::E_NOT_FOUND);
                }
                if let Some(there) = content.entries.get(&entry.key) {
                    return if there.entry == *entry {
                        Ok(())
                    } else {
                        Err(table::E_EXISTS)
                    };
                }
                if steering.entries >= limits.entries {
                    return Err(table::E_FULL);
                }
                steering.entries += 1;
                let held = Held {
                    entry: *entry,
                    hit: Instant::now(),
                    told: false,
                };
                content.entries.insert(entry.key, held);
                Ok(())
            }
            _ => Err(table::E_INVALID),
        }
    }
}

/// The steps that an entry really has.
pub(crate) fn steps(entry: &Entry) -> &[Step] {
    &entry.step[..(entry.steps as usize).min(table::STEPS_MAX)]
}

fn check(entry: &Entry, limits: &Limits) -> Status {
    let steps = steps(entry);
    let is_final = |step: &Step| (table::STEP_DROP..=table::STEP_JUMP).contains(&step.kind);
    let Some((last, before)) = steps.split_last() else {
        return Err(table::E_INVALID);
    };
    if !is_final(last) || before.iter().any(is_final) || entry.steps as usize > table::STEPS_MAX {
        return Err(table::E_INVALID);
    }
    if steps
        .iter()
        .any(|step| step.kind > 63 || limits.steps & 1 << step.kind == 0)
    {
        return Err(table::E_UNSUPPORTED);
    }
    if entry.counter > limits.counters || (entry.idle_ms > 0 && limits.ageing == 0) {
        return Err(table::E_UNSUPPORTED);
    }
    Ok(())
}
