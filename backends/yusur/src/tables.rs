//! [`Tables`]: what is in the card's steering tables, as far as one writer knows, and what is still free.
//!
//! The card has one table for each group, priority and set of fields (*profile*) in use; entries come from one pool.
//! Counters and tunnels are numbered, and the numbers are given out here. What is given back in a batch, profiles too, is given out
//! again only after it ([`Tables::settle`]): its last counts are not read yet, its entries may not be gone yet.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use dpumesh_core::steering::{Encapsulation, MeterId, Occupancy, SteeringRule};

use crate::entry::{Compiled, Do};
use crate::table::{self, Entry, Key, Limits, Meter, SteeringTable, Step};

pub(crate) const HARDWARE_RULES: &str = "steering.hardware_rules";
pub(crate) const MASKS: &str = "steering.masks";
pub(crate) const COUNTERS: &str = "steering.counters";

/// The card's steering memory.
#[derive(Debug)]
pub(crate) struct Tables {
    limits: Limits,
    tables: BTreeMap<Place, Content>,
    profiles: HashMap<u64, u64>,
    entries: u64,
    ids: Vec<u32>,
    counters: Vec<u32>,
    tunnels: HashMap<Encapsulation, (u32, u64)>,
    tunnel_ids: Vec<u32>,
    meters: HashMap<MeterId, Meter>,
    freed: Freed,
    /// Tables that the card did not make.
    missing: BTreeSet<u32>,
}

/// Group, priority and fields.
type Place = (u32, u32, u64);

#[derive(Debug)]
struct Content {
    id: u32,
    keys: HashMap<Key, u64>,
    /// It was empty when the batch began.
    idle: bool,
}

#[derive(Debug, Default)]
struct Freed {
    counters: Vec<u32>,
    tunnels: Vec<Encapsulation>,
}

/// A rule's share of it.
#[derive(Clone, Debug)]
pub(crate) struct Held {
    place: Place,
    pub(crate) table: u32,
    pub(crate) user: u64,
    pub(crate) keys: Vec<Key>,
    pub(crate) counter: Option<u32>,
    steps: Vec<Step>,
    tunnels: Vec<Encapsulation>,
    idle_ms: u32,
}

/// What the card has to be told before entries.
#[derive(Clone, Debug)]
pub(crate) enum Setup {
    Destroy(u32),
    Create(SteeringTable),
    Tunnel(u32, Encapsulation),
    Clear(u32),
}

/// Why there is no room.
#[derive(Clone, Debug)]
pub(crate) struct Shortage {
    /// The resource, or the field that stands in the way.
    pub(crate) name: String,
    pub(crate) reason: String,
    /// It is about room, which can be freed.
    pub(crate) is_room: bool,
}

fn full<T>(name: &str, used: u64, limit: u64) -> Result<T, Shortage> {
    Err(Shortage {
        name: name.to_owned(),
        reason: format!("{name} is full: {used} of {limit}"),
        is_room: true,
    })
}

impl Tables {
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            limits,
            tables: BTreeMap::new(),
            profiles: HashMap::new(),
            entries: 0,
            ids: (0..limits.tables).rev().collect(),
            counters: (1..=limits.counters).rev().collect(),
            tunnels: HashMap::new(),
            tunnel_ids: (0..limits.tunnels).rev().collect(),
            meters: HashMap::new(),
            freed: Freed::default(),
            missing: BTreeSet::new(),
        }
    }

    pub(crate) fn limits(&self) -> &Limits {
        &self.limits
    }

    pub(crate) fn meters(&self) -> &HashMap<MeterId, Meter> {
        &self.meters
    }

    pub(crate) fn set_meter(&mut self, id: MeterId, meter: Meter) {
        self.meters.insert(id, meter);
    }

    /// Room for a rule, and what the card has to be told first.
    ///
    /// # Errors
    /// What there is too little of; nothing is taken then.
    pub(crate) fn reserve(
        &mut self,
        rule: &SteeringRule,
        compiled: &Compiled,
        user: u64,
        setups: &mut Vec<Setup>,
    ) -> Result<Held, Shortage> {
        let place = (rule.group.0, rule.priority.0, compiled.fields);
        self.check(place, compiled)?;
        let table = match self.tables.get(&place) {
            Some(content) => content.id,
            None => self.create(place, setups)?,
        };
        let counter = if compiled.counts {
            self.counters.pop()
        } else {
            None
        };
        setups.extend(counter.map(Setup::Clear));
        let mut held = Held {
            place,
            table,
            user,
            keys: compiled.keys.clone(),
            counter,
            steps: Vec::with_capacity(compiled.steps.len()),
            tunnels: Vec::new(),
            idle_ms: rule.idle_timeout_ms.unwrap_or(0),
        };
        for step in &compiled.steps {
            let step = match step {
                Do::Step(step) => *step,
                Do::Meter(meter) => Step {
                    kind: table::STEP_METER,
                    arg: meter.0.into(),
                    ..Step::default()
                },
                Do::Encapsulate(outer) => {
                    held.tunnels.push(outer.clone());
                    Step {
                        kind: table::STEP_ENCAPSULATE,
                        arg: self.tunnel(outer, setups).into(),
                        ..Step::default()
                    }
                }
            };
            held.steps.push(step);
        }
        self.enter(&held);
        Ok(held)
    }

    fn check(&self, place: Place, compiled: &Compiled) -> Result<(), Shortage> {
        let need = compiled.keys.len() as u64;
        if self.entries + need > self.limits.entries {
            return full(HARDWARE_RULES, self.entries, self.limits.entries);
        }
        if compiled.counts && self.counters.is_empty() {
            let limit = u64::from(self.limits.counters);
            return full(COUNTERS, limit, limit);
        }
        let profiles = self.profiles.len() as u64;
        if !self.profiles.contains_key(&place.2) && profiles >= self.limits.profiles.into() {
            return full(MASKS, profiles, self.limits.profiles.into());
        }
        if let Some(content) = self.tables.get(&place)
            && compiled.keys.iter().any(|key| content.keys.contains_key(key))
        {
            return Err(Shortage {
                name: "pattern".to_owned(),
                reason: "another rule of this group and priority has this key in hardware".to_owned(),
                is_room: false,
            });
        }
        let mut new_tunnels = 0;
        for step in &compiled.steps {
            match step {
                Do::Meter(meter) if !self.meters.contains_key(meter) => {
                    return Err(Shortage {
                        name: "actions".to_owned(),
                        reason: format!("meter {} was never set", meter.0),
                        is_room: false,
                    });
                }
                Do::Encapsulate(outer) if !self.tunnels.contains_key(outer) => new_tunnels += 1,
                _ => {}
            }
        }
        if new_tunnels > self.tunnel_ids.len() {
            let limit = u64::from(self.limits.tunnels);
            return full("steering.tunnels", limit - self.tunnel_ids.len() as u64, limit);
        }
        Ok(())
    }

    /// A new table, in the place of one that was empty before the batch if need be.
    fn create(&mut self, place: Place, setups: &mut Vec<Setup>) -> Result<u32, Shortage> {
        if self.ids.is_empty() {
            let idle = self
                .tables
                .iter()
                .find(|(_, content)| content.idle && content.keys.is_empty());
            let Some((idle, id)) = idle.map(|(place, content)| (*place, content.id)) else {
                let limit = u64::from(self.limits.tables);
                return full("steering.tables", limit, limit);
            };
            self.tables.remove(&idle);
            self.ids.push(id);
            setups.push(Setup::Destroy(id));
        }
        let Some(id) = self.ids.pop() else {
            let limit = u64::from(self.limits.tables);
            return full("steering.tables", limit, limit);
        };
        setups.push(Setup::Create(SteeringTable {
            size: size_of::<SteeringTable>() as u32,
            id,
            group: place.0,
            priority: place.1,
            fields: place.2,
        }));
        let content = Content {
            id,
            keys: HashMap::new(),
            idle: false,
        };
        self.tables.insert(place, content);
        Ok(id)
    }

    fn tunnel(&mut self, outer: &Encapsulation, setups: &mut Vec<Setup>) -> u32 {
        if let Some((id, _)) = self.tunnels.get(outer) {
            return *id;
        }
        let id = self.tunnel_ids.pop().unwrap_or_default(); // `check` has seen that there is one
        self.tunnels.insert(outer.clone(), (id, 0));
        setups.push(Setup::Tunnel(id, outer.clone()));
        id
    }

    fn enter(&mut self, held: &Held) {
        self.entries += held.keys.len() as u64;
        *self.profiles.entry(held.place.2).or_default() += 1;
        if let Some(content) = self.tables.get_mut(&held.place) {
            content.idle = false;
            content.keys.extend(held.keys.iter().map(|key| (*key, held.user)));
        }
        for outer in &held.tunnels {
            if let Some((_, uses)) = self.tunnels.get_mut(outer) {
                *uses += 1;
            }
        }
    }

    /// Gives a rule's share back; profiles, counters and tunnels are free after the batch.
    pub(crate) fn release(&mut self, held: &Held) {
        self.entries -= held.keys.len() as u64;
        if let Some(uses) = self.profiles.get_mut(&held.place.2) {
            *uses -= 1; // the card makes tables before it removes entries: free after the batch
        }
        if let Some(content) = self.tables.get_mut(&held.place) {
            for key in &held.keys {
                content.keys.remove(key);
            }
        }
        for outer in &held.tunnels {
            if let Some((_, uses)) = self.tunnels.get_mut(outer) {
                *uses -= 1;
                if *uses == 0 {
                    self.freed.tunnels.push(outer.clone());
                }
            }
        }
        self.freed.counters.extend(held.counter);
    }

    /// Takes back what [`Tables::release`] gave in the same batch.
    pub(crate) fn restore(&mut self, held: &Held) {
        self.freed.counters.retain(|id| Some(*id) != held.counter);
        self.enter(held);
    }

    /// The batch is over: what was given back is free.
    pub(crate) fn settle(&mut self) {
        let freed = std::mem::take(&mut self.freed);
        self.counters.extend(freed.counters);
        for outer in freed.tunnels {
            if self.tunnels.get(&outer).is_some_and(|(_, uses)| *uses == 0)
                && let Some((id, _)) = self.tunnels.remove(&outer)
            {
                self.tunnel_ids.push(id);
            }
        }
        self.profiles.retain(|_, uses| *uses > 0);
        let (missing, ids) = (&mut self.missing, &mut self.ids);
        self.tables.retain(|_, content| {
            let is_gone = content.keys.is_empty() && missing.remove(&content.id);
            if is_gone {
                ids.push(content.id);
            }
            !is_gone
        });
        for content in self.tables.values_mut() {
            content.idle = content.keys.is_empty();
        }
    }

    /// The card did not make this table: nothing can be put into it, and its place is free after the batch.
    pub(crate) fn was_not_made(&mut self, id: u32) {
        self.missing.insert(id);
    }

    /// The card has this table.
    pub(crate) fn is_made(&self, id: u32) -> bool {
        !self.missing.contains(&id)
    }

    /// Every key that the card should have, and the rule that has it.
    pub(crate) fn keys(&self) -> impl Iterator<Item = ((u32, Key), u64)> {
        self.tables.values().flat_map(|content| {
            let keys = content.keys.iter();
            keys.map(|(key, user)| ((content.id, *key), *user))
        })
    }

    /// Numbers of the tables.
    pub(crate) fn tables(&self) -> impl Iterator<Item = u32> {
        self.tables.values().map(|content| content.id)
    }

    /// What the card has to be told again before a rule's entries.
    pub(crate) fn setups_again(&self, held: &Held) -> Vec<Setup> {
        let known = |outer: &Encapsulation| {
            self.tunnels
                .get(outer)
                .map(|(id, _)| Setup::Tunnel(*id, outer.clone()))
        };
        held.tunnels.iter().filter_map(known).collect()
    }

    /// Use of `steering.hardware_rules`, `steering.masks` and `steering.counters`.
    pub(crate) fn occupancy(&self) -> Vec<Occupancy> {
        let of = |resource: &str, used: u64, limit: u64| Occupancy {
            resource: resource.to_owned(),
            used,
            limit,
        };
        let counters = u64::from(self.limits.counters);
        vec![
            of(HARDWARE_RULES, self.entries, self.limits.entries),
            of(MASKS, self.profiles.len() as u64, self.limits.profiles.into()),
            of(COUNTERS, counters - self.counters.len() as u64, counters),
        ]
    }
}

impl Held {
    /// The operations that put it on the card.
    pub(crate) fn puts(&self) -> impl Iterator<Item = Entry> {
        self.entries(table::OP_PUT)
    }

    /// The operations that take it off.
    pub(crate) fn deletes(&self) -> impl Iterator<Item = Entry> {
        self.entries(table::OP_DELETE)
    }

    /// What takes an entry off, whosever it is.
    pub(crate) fn delete(table: u32, key: Key) -> Entry {
        Entry {
            op: table::OP_DELETE,
            table,
            key,
            ..Entry::default()
        }
    }

    fn entries(&self, op: u32) -> impl Iterator<Item = Entry> {
        let mut entry = Entry {
            op,
            table: self.table,
            user: self.user,
            counter: self.counter.unwrap_or(0),
            idle_ms: self.idle_ms,
            steps: self.steps.len() as u32,
            ..Entry::default()
        };
        entry.step[..self.steps.len()].copy_from_slice(&self.steps);
        self.keys.iter().map(move |key| {
            let mut one = entry;
            one.key = *key;
            one
        })
    }
}
