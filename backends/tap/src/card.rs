//! [`TapCard`]: the emulated card itself, that is what host and SoC both see of it.
//!
//! Host and SoC are two processes. What silicon is to a real card, a directory is to this one: the number of VFs, who leases
//! and who admitted which, where each is, and the card's life ([`Epoch`]). Every change is a transaction under a lock;
//! what is about to happen is written down before a device is touched, so that after a crash at any point the record
//! and the devices together tell what to undo:
//!
//! ```text
//! lease ── record, snapshot ─► device      attach ── record `going` ─► move ─► record `place`
//! grow  ── record ─► make device           shrink ── delete device ─► record
//! ```
//!
//! The card's life is also in shared memory, so that its loss ends open ports in every process at once. Other changes of
//! other processes are noticed at the next look; [`super::events`] looks by itself.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use dpumesh_core::vf::{LeaseId, VfLease, VfLocation};
use dpumesh_core::{DpuId, Epoch, Error, ErrorKind, Fence, MacAddr, Mtu, PortRef, Result};
use dpumesh_hw::journal::{Guard, Journal, JournalError};
use dpumesh_hw::netns::Namespace;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use crate::sys::SharedNumber;
use crate::yard::Yard;
use crate::{NAME, TapOptions, VfKind};

/// File of the number that all processes of a card have mapped.
const NUMBER: &str = "life";

/// An emulated card, opened from one side. Clones share it.
#[derive(Clone, Debug)]
pub struct TapCard(Arc<Card>);

#[derive(Debug)]
pub(crate) struct Card {
    pub(crate) options: TapOptions,
    journal: Journal,
    /// The namespaces that this side owns, held open.
    host: Option<Namespace>,
    pub(crate) soc: Option<Namespace>,
    fabric: Option<Namespace>,
    /// The card's present life, as [`Silicon::life`] tells it, for all processes at once.
    life: Arc<SharedNumber>,
    gates: Mutex<BTreeMap<PortRef, Weak<Gate>>>,
    /// Rung when this process changed the card.
    pub(crate) changed: Arc<Notify>,
    pub(crate) steps: Steps,
}

/// What the directory holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Silicon {
    pub(crate) dpu: DpuId,
    pub(crate) kind: VfKind,
    pub(crate) epoch: Epoch,
    /// Between the card's loss and its return.
    pub(crate) away: bool,
    /// The host's namespace and that of the veth VFs' other ends, as their owners last said.
    host_namespace: Option<PathBuf>,
    fabric_namespace: Option<PathBuf>,
    next_lease: u64,
    next_serial: u64,
    pub(crate) functions: BTreeMap<u16, Function>,
}

/// What the card remembers of a VF.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Function {
    /// Tells a VF from a former one with the same index.
    pub(crate) serial: u64,
    /// What the VF ought to have.
    pub(crate) attributes: Attributes,
    /// Where it is, and where it was about to go.
    pub(crate) place: Place,
    pub(crate) going: Option<Place>,
    /// The lease that the host made.
    pub(crate) held: Option<Held>,
    /// The lease that the SoC took.
    pub(crate) admitted: Option<VfLease>,
}

/// Attributes of a VF.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Attributes {
    pub(crate) admin_mac: Option<MacAddr>,
    pub(crate) mac: MacAddr,
    pub(crate) mtu: Mtu,
}

/// Where a VF is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Place {
    /// In the host's namespace, under its own name.
    Host,
    /// In another, under another name.
    Netns { path: PathBuf, ifname: String },
}

/// A lease with what must be restored at its end.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Held {
    pub(crate) lease: VfLease,
    pub(crate) snapshot: Attributes,
    /// The attributes that came with the request are on the device.
    pub(crate) configured: bool,
}

/// Closes an open port from outside.
#[derive(Debug)]
pub(crate) struct Gate {
    closed: AtomicBool,
    /// The life in which it was opened, and the present one.
    life: (u64, Arc<SharedNumber>),
    /// The lease by which a VF's port was opened.
    lease: Option<LeaseId>,
}

impl TapCard {
    /// Opens the card of `options`, making it when its directory is empty. Blocks for some milliseconds.
    ///
    /// # Errors
    /// `Conflict` when the directory holds another card, `Fault` when its state is damaged, `Invalid` when an option makes
    /// no sense, `NotFound` when a namespace cannot be opened, `Io`.
    pub fn open(options: TapOptions) -> Result<Self> {
        Card::open(options).map(|card| Self(Arc::new(card)))
    }

    /// The card vanishes, as by surprise removal: every VF's device is gone, every call fails with `DeviceLost`.
    ///
    /// For tests. Blocks for about a millisecond per VF.
    ///
    /// # Errors
    /// `DeviceLost` when it is away already, `Io`.
    pub fn lose(&self) -> Result<()> {
        self.0.lose()
    }

    /// The card returns in a new life: its VFs are on the host, without leases, with their own attributes.
    ///
    /// For tests. Repeating it after a failure goes on where it stopped. Blocks for about a millisecond per VF.
    ///
    /// # Errors
    /// `Invalid` when it is not away, `Io`.
    pub fn bring_back(&self) -> Result<()> {
        self.0.bring_back()
    }

    /// [`TapCard::lose`], then [`TapCard::bring_back`].
    ///
    /// # Errors
    /// Those of both.
    pub fn reset(&self) -> Result<()> {
        self.lose().and_then(|()| self.bring_back())
    }

    /// Takes the card apart: deletes every VF's device, wherever it is, and the directory. Leases are not looked at.
    ///
    /// # Errors
    /// `Io`; what could not be deleted stays recorded.
    pub fn remove(self) -> Result<()> {
        const OPERATION: &str = "tap.remove";
        let mut change = self.0.change(OPERATION)?;
        for index in change.state.functions.keys().copied().collect::<Vec<_>>() {
            change.delete(OPERATION, index)?;
            change.state.functions.remove(&index);
        }
        change.commit()?;
        self.0
            .journal
            .clone()
            .remove(&[NUMBER])
            .map_err(|error| journal_error(OPERATION, error))
    }

    pub(crate) fn inner(&self) -> &Arc<Card> {
        &self.0
    }
}

impl Card {
    fn open(mut options: TapOptions) -> Result<Self> {
        const OPERATION: &str = "tap.open";
        options.vf_mtu()?;
        let journal = Journal::open(&options.card).map_err(|error| journal_error(OPERATION, error))?;
        // Host and SoC may name the directory differently; it is one card.
        options.card = std::fs::canonicalize(&options.card).map_err(|failed| {
            error(ErrorKind::Io, OPERATION, failed.to_string())
                .object(options.card.display())
                .source(failed)
        })?;
        let host = options
            .role
            .is_host()
            .then(|| namespace(OPERATION, options.host_namespace.as_ref()))
            .transpose()?;
        let soc = options
            .role
            .is_soc()
            .then(|| namespace(OPERATION, options.soc_namespace.as_ref()))
            .transpose()?;
        let fabric = options
            .fabric_namespace
            .as_ref()
            .map(|path| namespace(OPERATION, Some(path)))
            .transpose()?;
        let life = Arc::new(shared_number(&journal).map_err(|error| journal_error(OPERATION, error))?);
        let card = Self {
            options,
            journal,
            host,
            soc,
            fabric,
            life,
            gates: Mutex::default(),
            changed: Arc::default(),
            steps: Steps::default(),
        };
        card.introduce()?;
        Ok(card)
    }

    /// Makes the card or checks that it is the one expected, and notes where this side's namespaces are.
    fn introduce(&self) -> Result<()> {
        const OPERATION: &str = "tap.open";
        let mut change = self.begin(OPERATION, self.journal.lock())?;
        let (dpu, kind) = (&self.options.dpu, self.options.vf_kind);
        if change.state.dpu != *dpu || change.state.kind != kind {
            let found = (&change.state.dpu, change.state.kind);
            let message = format!(
                "the directory holds {} with {:?} VFs, not {dpu} with {kind:?}",
                found.0, found.1
            );
            return Err(error(ErrorKind::Conflict, OPERATION, message).object(self.options.card.display()));
        }
        if let Some(host) = &self.host {
            change.state.host_namespace =
                Some(self.options.host_namespace.clone().unwrap_or_else(|| host.path()));
        }
        let fabric = self.options.fabric_namespace.clone();
        let soc = || {
            self.options
                .soc_namespace
                .clone()
                .or_else(|| self.soc.as_ref().map(Namespace::path))
        };
        if let Some(fabric) = fabric.or_else(soc) {
            change.state.fabric_namespace = Some(fabric);
        }
        change.commit()
    }

    /// The card's life; while it is away, the last one.
    pub(crate) fn epoch(&self) -> Epoch {
        Epoch(self.life.load() >> 1)
    }

    /// Begins a look at the card; nobody changes it meanwhile.
    pub(crate) fn look(&self, operation: &'static str) -> Result<Change<'_>> {
        let look = self.begin(operation, self.journal.lock_shared())?;
        look.state.present(operation)?;
        Ok(look)
    }

    /// Begins a change of the card; nobody else looks meanwhile.
    fn change(&self, operation: &'static str) -> Result<Change<'_>> {
        self.begin(operation, self.journal.lock())
    }

    /// Begins a change that is refused when the card is away or in another life than the fence's.
    pub(crate) fn fenced(&self, operation: &'static str, fence: Fence) -> Result<Change<'_>> {
        let change = self.change(operation)?;
        change.state.present(operation)?;
        if fence.0 != change.state.epoch {
            let message = format!(
                "the card is in life {}, the call is of {}",
                change.state.epoch.0, fence.0.0
            );
            return Err(error(ErrorKind::Stale, operation, message).field("fence"));
        }
        Ok(change)
    }

    /// What is recorded now, the card being away or not.
    pub(crate) fn recorded(&self) -> Result<Silicon> {
        self.begin("tap.read", self.journal.lock_shared())
            .map(|look| look.state)
    }

    fn begin(
        &self,
        operation: &'static str,
        guard: std::result::Result<Guard, JournalError>,
    ) -> Result<Change<'_>> {
        let guard = guard.map_err(|error| journal_error(operation, error))?;
        let loaded = self
            .journal
            .load(&guard)
            .map_err(|error| journal_error(operation, error))?;
        let (generation, state) = loaded.unwrap_or_else(|| (0, Silicon::fresh(&self.options)));
        self.notice(&state);
        Ok(Change {
            card: self,
            operation,
            guard,
            generation,
            state,
        })
    }

    /// Takes note of what another process may have changed: closes ports that must not be open any more.
    fn notice(&self, state: &Silicon) {
        if self.life.load() != state.life() {
            self.life.store(state.life());
        }
        let mut gates = self.gates.lock().unwrap_or_else(PoisonError::into_inner);
        gates.retain(|port, gate| {
            let Some(gate) = gate.upgrade() else { return false };
            let admitted = state
                .function(*port)
                .and_then(|function| function.admitted.as_ref());
            let current = !port.is_vf() || admitted.map(|lease| lease.id) == gate.lease;
            if !current {
                gate.closed.store(true, Ordering::Release);
                return false;
            }
            true
        });
    }

    pub(crate) fn claim(&self, operation: &'static str, port: PortRef) -> Result<Guard> {
        let claimed = self.journal.try_claim(&format!("{port}.port"));
        let claimed = claimed.map_err(|error| journal_error(operation, error))?;
        claimed.ok_or_else(|| error(ErrorKind::Busy, operation, "the port is open already").object(port))
    }

    pub(crate) fn register(&self, port: PortRef, state: &Silicon) -> Arc<Gate> {
        let lease = state
            .function(port)
            .and_then(|function| function.admitted.as_ref())
            .map(|lease| lease.id);
        let life = (state.life(), Arc::clone(&self.life));
        let gate = Arc::new(Gate {
            closed: AtomicBool::new(false),
            life,
            lease,
        });
        let mut gates = self.gates.lock().unwrap_or_else(PoisonError::into_inner);
        gates.insert(port, Arc::downgrade(&gate));
        gate
    }

    fn lose(&self) -> Result<()> {
        const OPERATION: &str = "tap.lose";
        let mut change = self.change(OPERATION)?;
        change.state.present(OPERATION)?;
        change.state.away = true;
        change.commit()?;
        for index in change.state.functions.keys().copied().collect::<Vec<_>>() {
            change.delete(OPERATION, index)?;
        }
        Ok(())
    }

    fn bring_back(&self) -> Result<()> {
        const OPERATION: &str = "tap.bring_back";
        let mut change = self.change(OPERATION)?;
        if !change.state.away {
            return Err(error(ErrorKind::Invalid, OPERATION, "the card is not away"));
        }
        for index in change.state.functions.keys().copied().collect::<Vec<_>>() {
            change.delete(OPERATION, index)?;
            let attributes = self.factory_attributes(index);
            if let Some(function) = change.state.functions.get_mut(&index) {
                *function = Function::at_home(function.serial, attributes);
                let function = function.clone();
                change.yard()?.make(index, &function)?;
            }
        }
        change.state.epoch.0 += 1;
        change.state.away = false;
        change.commit()
    }

    /// Tells this card from others on the machine, also from those of the same name.
    pub(crate) fn number(&self) -> u32 {
        let mut sum = crc32fast::Hasher::new();
        sum.update(self.options.card.as_os_str().as_encoded_bytes());
        sum.update(self.options.dpu.0.as_bytes());
        sum.finalize()
    }

    /// What a VF has before anybody sets anything.
    pub(crate) fn factory_attributes(&self, index: u16) -> Attributes {
        let [a, b, c, _] = self.number().to_be_bytes();
        let [high, low] = index.to_be_bytes();
        let largest = self.options.vf_mtu().unwrap_or_default();
        Attributes {
            admin_mac: None,
            mac: MacAddr([2, a, b, c, high, low]),
            mtu: largest.min(Mtu::ETHERNET),
        }
    }
}

impl Drop for Card {
    fn drop(&mut self) {
        self.changed.notify_waiters();
    }
}

impl Gate {
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire) || self.life.0 != self.life.1.load()
    }
}

impl Silicon {
    fn fresh(options: &TapOptions) -> Self {
        Self {
            dpu: options.dpu.clone(),
            kind: options.vf_kind,
            epoch: Epoch(1),
            away: false,
            host_namespace: None,
            fabric_namespace: None,
            next_lease: 1,
            next_serial: 1,
            functions: BTreeMap::new(),
        }
    }

    /// Changes with the epoch, and when the card goes away.
    fn life(&self) -> u64 {
        self.epoch.0 << 1 | u64::from(self.away)
    }

    pub(crate) fn present(&self, operation: &'static str) -> Result<()> {
        if self.away {
            return Err(error(ErrorKind::DeviceLost, operation, "the card is away"));
        }
        Ok(())
    }

    pub(crate) fn function(&self, port: PortRef) -> Option<&Function> {
        index_of(port).and_then(|index| self.functions.get(&index))
    }

    pub(crate) fn take_lease_number(&mut self) -> LeaseId {
        self.next_lease += 1;
        LeaseId(self.next_lease - 1)
    }

    pub(crate) fn take_serial(&mut self) -> u64 {
        self.next_serial += 1;
        self.next_serial - 1
    }
}

impl Function {
    pub(crate) fn at_home(serial: u64, attributes: Attributes) -> Self {
        Self {
            serial,
            attributes,
            place: Place::Host,
            going: None,
            held: None,
            admitted: None,
        }
    }
}

impl Place {
    pub(crate) fn location(&self) -> VfLocation {
        match self {
            Self::Host => VfLocation::Host,
            Self::Netns { path, .. } => VfLocation::Netns { path: path.clone() },
        }
    }
}

/// The index of a VF of this card: all are of physical function 0 on controller 0.
pub(crate) fn index_of(port: PortRef) -> Option<u16> {
    match port {
        PortRef::Vf { vf, .. } if port == PortRef::vf(vf.0) => Some(vf.0),
        _ => None,
    }
}

/// A look at the card or a change of it, until dropped. Nothing is written before [`Change::commit`].
#[derive(Debug)]
pub(crate) struct Change<'a> {
    pub(crate) card: &'a Card,
    operation: &'static str,
    guard: Guard,
    generation: u64,
    pub(crate) state: Silicon,
}

impl<'a> Change<'a> {
    /// Writes the state down; on return it is on disk.
    pub(crate) fn commit(&mut self) -> Result<()> {
        self.card.steps.pass();
        let generation = self.generation + 1;
        let stored = self.card.journal.store(&self.guard, generation, &self.state);
        stored.map_err(|error| journal_error(self.operation, error))?;
        self.generation = generation;
        self.card.notice(&self.state);
        self.card.changed.notify_waiters();
        self.card.steps.pass();
        Ok(())
    }

    /// The devices of the card.
    pub(crate) fn yard(&self) -> Result<Yard<'a>> {
        let operation = self.operation;
        let recorded = |held: &Option<Namespace>, path: &Option<PathBuf>| match held {
            Some(held) => Ok(Some(
                held.try_clone()
                    .map_err(|error| namespace_error(operation, error))?,
            )),
            None => path
                .as_ref()
                .map(|path| namespace(operation, Some(path)))
                .transpose(),
        };
        let host = recorded(&self.card.host, &self.state.host_namespace)?.ok_or_else(|| {
            error(
                ErrorKind::NotFound,
                operation,
                "the host's side has never been opened",
            )
            .field("host_namespace")
        })?;
        let fabric = match self.state.kind {
            VfKind::Tap => None,
            VfKind::Veth => {
                let own = if self.card.fabric.is_some() {
                    &self.card.fabric
                } else {
                    &self.card.soc
                };
                recorded(own, &self.state.fabric_namespace)?
            }
        };
        Ok(Yard::new(self.card, operation, self.state.kind, host, fabric))
    }

    /// Deletes a VF's device, if there is one.
    pub(crate) fn delete(&self, operation: &'static str, index: u16) -> Result<()> {
        let Some(function) = self.state.functions.get(&index) else {
            return Ok(());
        };
        let mut yard = self.yard()?;
        match yard.find(index, function)? {
            Some(found) => yard.delete(&found).map_err(|mut error| {
                error.operation = operation.into();
                error
            }),
            None => yard.sweep_home(index),
        }
    }
}

/// Where tests let the process die.
#[derive(Clone, Default)]
pub(crate) struct Steps {
    #[cfg(test)]
    left: Arc<Mutex<Option<u32>>>,
}

impl Steps {
    /// A moment at which a crash would leave something half done.
    #[cfg(not(test))]
    pub(crate) fn pass(&self) {}

    /// A moment at which a crash would leave something half done: the test's process dies here.
    #[cfg(test)]
    pub(crate) fn pass(&self) {
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(steps) = left.as_mut() {
            if *steps == 0 {
                drop(left);
                std::panic::resume_unwind(Box::new(Died));
            }
            *steps -= 1;
        }
    }

    /// Dies after so many more steps; `None`: never.
    #[cfg(test)]
    pub(crate) fn die_after(&self, steps: Option<u32>) {
        *self.left.lock().unwrap_or_else(PoisonError::into_inner) = steps;
    }
}

/// What a test's process dies of.
#[cfg(test)]
pub(crate) struct Died;

impl fmt::Debug for Steps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Steps")
    }
}

fn namespace(operation: &'static str, path: Option<&PathBuf>) -> Result<Namespace> {
    let opened = match path {
        Some(path) => Namespace::open(path),
        None => Namespace::current(),
    };
    opened.map_err(|error| namespace_error(operation, error))
}

pub(crate) fn namespace_error(operation: &'static str, source: dpumesh_hw::netns::NamespaceError) -> Error {
    error(ErrorKind::NotFound, operation, source.to_string()).source(source)
}

/// A number that every process of the card sees at once. It is only a copy of what the value says.
fn shared_number(journal: &Journal) -> std::result::Result<SharedNumber, JournalError> {
    let path = journal.dir().join(NUMBER);
    let opened = std::fs::File::options()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(&path);
    opened
        .and_then(|file| SharedNumber::map(&file))
        .map_err(|source| JournalError::Io { path, source })
}

fn journal_error(operation: &'static str, source: JournalError) -> Error {
    let kind = match source {
        JournalError::Io { .. } => ErrorKind::Io,
        JournalError::Damaged { .. } => ErrorKind::Fault,
    };
    error(kind, operation, source.to_string()).source(source)
}

pub(crate) fn error(
    kind: ErrorKind,
    operation: &'static str,
    message: impl Into<std::borrow::Cow<'static, str>>,
) -> Error {
    Error::new(kind, operation, message).backend(NAME)
}
