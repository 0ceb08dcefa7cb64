//! The card behind all parts: its lives, its lock, its events.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use dpumesh_core::capability::{EventKinds, MatchKinds};
use dpumesh_core::steering::{Field, Occupancy};
use dpumesh_core::{
    Capabilities, ControllerId, DpuId, Epoch, Error, ErrorKind, Event, Fence, PfIndex, PortRef, Result,
};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::MemoryConfig;
use super::offload::Processor;
use super::ports::Port;
use super::vf::Function;
use crate::events::{EventHub, HighWater, HubStream};
use crate::steering::{Removal, RuleStore};

/// Name of the backend in infos and errors.
pub(super) const NAME: &str = "memory";

/// The only physical function.
pub(super) const PF: PfIndex = PfIndex(0);

/// Where punted frames go.
pub(super) const STACK: PortRef = PortRef::Stack(0);

/// One card. Everything that changes is behind one lock, held for moments and never across an await.
#[derive(Debug)]
pub(super) struct Card {
    config: MemoryConfig,
    state: Mutex<State>,
    hub: EventHub,
    /// Notified when a rule that ages was installed.
    timers: Arc<Notify>,
    born: Instant,
}

/// What changes.
#[derive(Debug)]
pub(super) struct State {
    pub(super) alive: bool,
    pub(super) epoch: Epoch,
    pub(super) capabilities: Capabilities,
    pub(super) rules: RuleStore,
    pub(super) functions: Vec<Function>,
    pub(super) ports: BTreeMap<PortRef, Port>,
    pub(super) processor: Processor,
    /// Names taken in each network namespace. Namespaces are the machine's, so they outlive the card's lives.
    pub(super) namespaces: BTreeMap<PathBuf, BTreeSet<String>>,
    /// Numbers given so far, never twice on a card: leases, tokens, openings, interfaces.
    pub(super) last_number: u64,
    pub(super) trouble: Trouble,
    marks: HighWater,
}

/// What the card was told to do badly; over with its life.
#[derive(Debug, Default)]
pub(super) struct Trouble {
    /// Rules that are not in hardware match nothing.
    pub(super) software_stopped: bool,
    /// Changes of rules that still work.
    pub(super) changes_left: Option<usize>,
    /// VFs that it gives at most.
    pub(super) most_vfs: Option<u16>,
    /// Programs do not start.
    pub(super) activation_fails: bool,
}

impl Card {
    pub(super) fn new(mut config: MemoryConfig) -> Arc<Self> {
        config.capabilities = within_reach(config.capabilities);
        let names = config
            .namespaces
            .iter()
            .map(|path| (path.clone(), BTreeSet::new()));
        let state = State::new(&config, names.collect(), Epoch(1));
        Arc::new(Self {
            config,
            state: Mutex::new(state),
            hub: EventHub::default(),
            timers: Arc::default(),
            born: Instant::now(),
        })
    }

    pub(super) fn dpu(&self) -> &DpuId {
        &self.config.dpu
    }

    pub(super) fn config(&self) -> &MemoryConfig {
        &self.config
    }

    pub(super) fn capabilities(&self) -> Capabilities {
        self.state().capabilities.clone()
    }

    pub(super) fn epoch(&self) -> Epoch {
        self.state().epoch
    }

    pub(super) fn subscribe(&self) -> HubStream {
        self.hub.subscribe()
    }

    /// Milliseconds since the card was made.
    pub(super) fn now_ms(&self) -> u64 {
        self.born.elapsed().as_millis() as u64 // half a billion years
    }

    /// The state, whether the card is there or not.
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        // Each change of the state is decided before it is begun: a panic elsewhere leaves it whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state of a card that is there.
    pub(super) fn present(&self, operation: &'static str) -> Result<MutexGuard<'_, State>> {
        let state = self.state();
        if state.alive {
            return Ok(state);
        }
        Err(error(ErrorKind::DeviceLost, operation, "the card is away"))
    }

    /// The state of a card that is in the life which the fence names.
    pub(super) fn fenced(&self, fence: Fence, operation: &'static str) -> Result<MutexGuard<'_, State>> {
        let state = self.present(operation)?;
        if fence.0 == state.epoch {
            return Ok(state);
        }
        let message = format!(
            "the fence is of epoch {}, the card is in epoch {}: read the state again",
            fence.0.0, state.epoch.0
        );
        Err(error(ErrorKind::Stale, operation, message).object("fence"))
    }

    /// Raises an event of a kind that the card has.
    pub(super) fn raise(&self, event: &Event) {
        let kinds = self.state().capabilities.events;
        self.raise_of(kinds, event);
    }

    /// As [`Card::raise`], for those who hold the lock.
    pub(super) fn raise_of(&self, kinds: EventKinds, event: &Event) {
        let needed = match event {
            Event::Link { .. } => EventKinds::LINK,
            Event::Health(_) => EventKinds::HEALTH,
            Event::HighWater { .. } => EventKinds::HIGH_WATER,
            Event::Aged { .. } => EventKinds::AGED,
            Event::VfAdded(_) | Event::VfRemoved(_) => EventKinds::VF,
            _ => EventKinds::empty(),
        };
        if kinds.contains(needed) {
            self.hub.raise(event);
        }
    }

    /// Raises `HighWater` for what passed its mark.
    pub(super) fn look_at_marks(&self, state: &mut State) {
        let mut events = state.rules.high_water();
        let occupancy = state.occupancy();
        events.extend(state.marks.look(&occupancy));
        for event in events {
            self.raise_of(state.capabilities.events, &event);
        }
    }

    /// Wakes those who let rules age.
    pub(super) fn timers_changed(&self) {
        self.timers.notify_waiters();
    }

    /// Removes rules that idled too long.
    pub(super) fn age(&self, state: &mut State) {
        let removals = state.rules.age(self.now_ms());
        for event in Removal::aged(&removals) {
            self.raise_of(state.capabilities.events, &event);
        }
    }

    fn age_and_next_due(&self) -> Option<Instant> {
        let mut state = self.state();
        self.age(&mut state);
        let due_ms = state.rules.next_deadline_ms()?;
        Some(self.born + Duration::from_millis(due_ms))
    }

    pub(super) fn lose(&self) {
        let mut state = self.state();
        if !state.alive {
            return;
        }
        state.alive = false;
        for port in state.ports.values_mut() {
            port.clear();
        }
        let epoch = state.epoch;
        self.hub.raise(&Event::Lost { epoch });
    }

    pub(super) fn restore(&self, capabilities: Option<Capabilities>) {
        let mut state = self.state();
        if state.alive {
            return;
        }
        let capabilities = capabilities.map_or_else(|| state.capabilities.clone(), within_reach);
        let config = MemoryConfig {
            capabilities,
            ..self.config.clone()
        };
        let epoch = Epoch(state.epoch.0 + 1);
        let mut namespaces = std::mem::take(&mut state.namespaces);
        for function in &state.functions {
            function.leave(&mut namespaces);
        }
        let last_number = state.last_number;
        *state = State::new(&config, namespaces, epoch);
        state.last_number = last_number;
        self.hub.raise(&Event::Back { epoch });
    }

    pub(super) fn trouble(&self, make: impl FnOnce(&mut Trouble)) {
        make(&mut self.state().trouble);
    }

    pub(super) fn set_link(&self, port: PortRef, up: bool) {
        let mut state = self.state();
        let Some(end) = state.ports.get_mut(&port) else {
            return;
        };
        if end.link_up != up {
            end.link_up = up;
            self.raise_of(state.capabilities.events, &Event::Link { port, up });
        }
    }
}

impl State {
    fn new(config: &MemoryConfig, namespaces: BTreeMap<PathBuf, BTreeSet<String>>, epoch: Epoch) -> Self {
        let capabilities = config.capabilities.clone();
        let vfs = config.vfs.min(capabilities.vf.max_vfs);
        let pf = PortRef::Pf {
            controller: ControllerId(0),
            pf: PF,
        };
        let uplinks = (0..config.uplinks).map(PortRef::Uplink);
        let ports = uplinks.chain([pf, STACK]).chain((0..vfs).map(PortRef::vf));
        Self {
            alive: true,
            epoch,
            rules: RuleStore::new(NAME, capabilities.steering.clone(), epoch),
            functions: (0..vfs).map(|vf| Function::new(vf, config.mtu)).collect(),
            ports: ports.map(|port| (port, Port::default())).collect(),
            processor: Processor::new(&capabilities.offload),
            capabilities,
            namespaces,
            last_number: 0,
            trouble: Trouble::default(),
            marks: HighWater::default(),
        }
    }

    /// The next number.
    pub(super) fn number(&mut self) -> u64 {
        self.last_number += 1;
        self.last_number
    }

    /// Use of what is not the rules'.
    pub(super) fn occupancy(&self) -> Vec<Occupancy> {
        let leased = self.functions.iter().filter(|function| function.is_leased());
        let mut all = self.processor.occupancy(&self.capabilities.offload);
        all.push(Occupancy {
            resource: "vf".to_owned(),
            used: leased.count() as u64,
            limit: self.functions.len() as u64,
        });
        all
    }
}

/// Lets rules age whenever they are due; never returns. It keeps no hold of the card while it waits.
pub(super) async fn age_forever(card: &Weak<Card>) {
    loop {
        let Some(present) = card.upgrade() else {
            return std::future::pending().await;
        };
        let timers = Arc::clone(&present.timers);
        let changed = timers.notified();
        let due = present.age_and_next_due();
        drop(present);
        match due {
            None => changed.await,
            Some(due) => {
                tokio::select! {
                    () = changed => {}
                    () = tokio::time::sleep_until(due) => {}
                }
            }
        }
    }
}

/// An error of this backend.
pub(super) fn error(
    kind: ErrorKind,
    operation: &'static str,
    message: impl Into<std::borrow::Cow<'static, str>>,
) -> Error {
    Error::new(kind, operation, message).backend(NAME)
}

/// Cuts limits to what this backend can do.
fn within_reach(mut wanted: Capabilities) -> Capabilities {
    let all = super::capabilities();
    wanted.vf.attributes &= all.vf.attributes;
    wanted.vf.attachments &= all.vf.attachments;
    let steering = &mut wanted.steering;
    steering.actions &= all.steering.actions;
    steering.hardware_actions &= steering.actions;
    steering.fields = common_kinds(&steering.fields, &all.steering.fields);
    steering.hardware_fields = common_kinds(&steering.hardware_fields, &steering.fields);
    steering.hardware_rules = steering.hardware_rules.min(steering.rules);
    steering.counter_age_ms = 0;
    steering.counter_unit = all.steering.counter_unit;
    wanted.offload.connection_kinds &= all.offload.connection_kinds;
    wanted
}

fn common_kinds(
    wanted: &BTreeMap<Field, MatchKinds>,
    have: &BTreeMap<Field, MatchKinds>,
) -> BTreeMap<Field, MatchKinds> {
    wanted
        .iter()
        .filter_map(|(field, kinds)| Some((*field, *kinds & *have.get(field)?)))
        .filter(|(_, kinds)| !kinds.is_empty())
        .collect()
}
