//! [`Card`]: an SR-IOV card, and the transactions on it.
//!
//! Every call is one transaction under the journal's lock: read the record, look at the card, decide, write down what is about to
//! happen, do it, write down that it is done. A process that dies leaves a record from which the next one goes on; two
//! processes that use one card take turns.
//!
//! ```text
//! lease ── record, snapshot ─► attributes     attach ── record `going` ─► move or bind ─► record `place`
//! release ── bring home ─► reset ─► restore by difference ─► record
//! ```
//! Every transaction first compares the card's life with the recorded one: a card that vanished is `Lost`, one whose
//! functions have other network devices than before was reset meanwhile and begins a new epoch, without leases.

use std::borrow::Cow;
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};

use dpumesh_core::vf::{LeaseOwner, VfLease};
use dpumesh_core::{
    Backend, BackendInfo, Capabilities, ControllerId, Effect, Epoch, Error, ErrorKind, EventKinds,
    EventStream, Fence, FlowSteering, NpOffload, PciAddress, PfIndex, PortRef, Ports, Result, ShmTransport,
    VfAllocator, VfCapabilities, VfIndex,
};
use dpumesh_hw::journal::{Guard, Journal, JournalError};
use dpumesh_hw::netlink::Link;
use tokio::sync::Notify;

use crate::discover::{self, Pf, VirtualFunction};
use crate::events::Subscription;
use crate::isolation::Isolation;
use crate::kernel::linux::Linux;
use crate::kernel::{Kernel, KernelError, Spot};
use crate::ports::{Gate, SriovPorts};
use crate::record::{Life, Record};
use crate::steering::CardSteering;
use crate::vf::SriovVf;
use crate::{NAME, Options, abilities, isolation, ports};

/// An SR-IOV card as a [`Backend`].
#[derive(Debug)]
pub struct Card {
    inner: Arc<Inner>,
    vf: SriovVf,
    ports: SriovPorts,
    steering: CardSteering,
    parts: Parts,
}

/// Parts of a card that are not this crate's, or that stand on it.
#[derive(Clone, Debug, Default)]
pub struct Parts {
    /// Rules in its eswitch; `None`: by tc flower, in switchdev mode.
    pub steering: Option<Arc<dyn FlowSteering>>,
    /// Frames of its ports; `None`: by packet sockets, where the host sees them.
    pub ports: Option<Arc<dyn Ports>>,
    /// Shared-memory channels.
    pub transport: Option<Arc<dyn ShmTransport>>,
    /// What these parts are able to do; `vf`, `mode` and `events` of it are ignored, and what is of a part that is `None`.
    pub capabilities: Capabilities,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) options: Options,
    pub(crate) kernel: Arc<dyn Kernel>,
    pub(crate) pfs: Vec<PciAddress>,
    pub(crate) journal: Journal,
    /// Ports that are open in this process.
    pub(crate) gates: Mutex<Vec<Weak<Gate>>>,
    /// What everybody may read without touching the card.
    shown: RwLock<Shown>,
    /// One transaction of this process at a time: they wait here rather than in the kernel.
    turn: Mutex<()>,
    /// Rung when this process changed the card.
    pub(crate) changed: Arc<Notify>,
}

#[derive(Clone, Debug, Default)]
struct Shown {
    epoch: Epoch,
    device: String,
    vf: VfCapabilities,
    switchdev: bool,
    isolation: Isolation,
    /// Ports that can exist; 0: their frames cannot be had.
    ports: u32,
}

/// A formerly held lease, as [`Card::former`] lists it.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct FormerLease {
    /// The lease; it is worth nothing any more.
    pub lease: VfLease,
    /// What its owner had asked for.
    pub config: dpumesh_core::vf::VfConfig,
    /// Where its VF was used; `None`: nowhere.
    pub attachment: Option<dpumesh_core::vf::Attachment>,
}

impl Card {
    /// Opens the card of `options` on the running kernel. Blocks; some milliseconds, up to a second for a card that has no
    /// VF yet and must make one to find out what it is able to do.
    ///
    /// # Errors
    /// `NotFound` when there is no such card or it has no SR-IOV; `Conflict` when the journal is of another card, `Fault` when
    /// it is damaged, `Invalid` when an option makes no sense, `Denied`, `Io`.
    pub fn open(options: Options) -> Result<Arc<Self>> {
        let kernel = Linux::open(&options.sysfs, options.host_namespace.as_deref())
            .map_err(|failed| kernel_error(OPEN, failed))?;
        Self::open_on(options, Arc::new(kernel), Parts::default())
    }

    /// Opens the card on this kernel, with these parts.
    ///
    /// # Errors
    /// Those of [`Card::open`].
    pub fn open_on(options: Options, kernel: Arc<dyn Kernel>, parts: Parts) -> Result<Arc<Self>> {
        let pfs = discover::pfs(kernel.sysfs(), options.device);
        if pfs.is_empty() {
            let dir = kernel.sysfs().join(discover::directory(options.device));
            let message = format!(
                "no physical function with SR-IOV: {} and its sister functions have no `sriov_totalvfs`",
                dir.display()
            );
            return Err(error(ErrorKind::NotFound, OPEN, message)
                .object(options.device)
                .field("device"));
        }
        options.vlans.map_or(Ok(()), check_vlans)?;
        let journal = Journal::open(&options.journal).map_err(|failed| journal_error(OPEN, failed))?;
        let inner = Arc::new(Inner {
            options,
            kernel,
            pfs,
            journal,
            gates: Mutex::default(),
            shown: RwLock::default(),
            turn: Mutex::default(),
            changed: Arc::default(),
        });
        let opened = inner.begin(OPEN)?;
        if opened.record.dpu != inner.options.dpu {
            let message = format!(
                "the journal is of {}, not {}",
                opened.record.dpu, inner.options.dpu
            );
            return Err(error(ErrorKind::Conflict, OPEN, message).object(inner.options.journal.display()));
        }
        drop(opened);
        let vf = SriovVf::new(Arc::clone(&inner));
        let ports = SriovPorts::new(Arc::clone(&inner), vf.clone());
        let steering = CardSteering::new(Arc::clone(&inner));
        Ok(Arc::new(Self {
            inner,
            vf,
            ports,
            steering,
            parts,
        }))
    }

    /// What keeps its VFs from talking past the host.
    pub fn isolation(&self) -> Isolation {
        self.inner.shown().isolation
    }

    /// Leases of the card's last life that had any, for owners that want theirs again: a lease never outlives the card, but
    /// who had which VF where does.
    ///
    /// # Errors
    /// `Io`.
    pub fn former(&self) -> Result<Vec<FormerLease>> {
        let change = self.inner.begin("sriov.former")?;
        Ok(change.record.former.iter().map(crate::vf::former).collect())
    }

    /// Looks whether the card is there and in which life, as every call does: for a caller that must know at once.
    pub fn look(&self) {
        // What it finds is shown; what keeps it from looking is told to the next call.
        let _ = self.inner.begin("sriov.look");
    }

    pub(crate) fn steering_part(&self) -> &CardSteering {
        &self.steering
    }

    pub(crate) fn inner(&self) -> &Arc<Inner> {
        &self.inner
    }

    #[cfg(test)]
    pub(crate) fn vfs(&self) -> &SriovVf {
        &self.vf
    }
}

impl Backend for Card {
    fn info(&self) -> BackendInfo {
        let options = &self.inner.options;
        let mut info = BackendInfo::new(NAME, env!("CARGO_PKG_VERSION"), options.dpu.clone(), options.role);
        info.device = self.inner.shown().device;
        info
    }

    fn capabilities(&self) -> Capabilities {
        let shown = self.inner.shown();
        let mut all = self.parts.capabilities.clone();
        all.mode = if shown.switchdev { "switchdev" } else { "legacy" }.into();
        all.vf = shown.vf;
        all.events = EventKinds::LINK | EventKinds::VF;
        if self.parts.steering.is_none() {
            all.steering = self.steering.capabilities();
        }
        if self.parts.ports.is_none() {
            all.ports = ports::capabilities(shown.ports);
        }
        all
    }

    fn epoch(&self) -> Epoch {
        self.inner.shown().epoch
    }

    fn vf(&self) -> Option<&dyn VfAllocator> {
        Some(&self.vf)
    }

    fn steering(&self) -> Option<&dyn FlowSteering> {
        let own: &dyn FlowSteering = &self.steering;
        let foreign = self.parts.steering.as_deref();
        foreign.or_else(|| self.steering.is_offered().then_some(own))
    }

    fn offload(&self) -> Option<&dyn NpOffload> {
        None
    }

    fn transport(&self) -> Option<&dyn ShmTransport> {
        self.parts.transport.as_deref()
    }

    fn ports(&self) -> Option<&dyn Ports> {
        let own: &dyn Ports = &self.ports;
        let foreign = self.parts.ports.as_deref();
        foreign.or_else(|| (self.inner.shown().ports > 0).then_some(own))
    }

    fn events(&self) -> Box<dyn EventStream> {
        Box::new(Subscription::new(&self.inner))
    }
}

const OPEN: &str = "sriov.open";

impl Inner {
    fn shown(&self) -> Shown {
        self.shown.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The card's life, and whether it is in switchdev mode, as they were seen last.
    pub(crate) fn mode(&self) -> (Epoch, bool) {
        let shown = self.shown();
        (shown.epoch, shown.switchdev)
    }

    /// Begins a transaction, the card being there or not.
    pub(crate) fn begin(&self, operation: &'static str) -> Result<Change<'_>> {
        let turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let guard = self
            .journal
            .lock()
            .map_err(|failed| journal_error(operation, failed))?;
        let loaded = self
            .journal
            .load(&guard)
            .map_err(|failed| journal_error(operation, failed))?;
        let (generation, record) = loaded.unwrap_or_else(|| (0, Record::fresh(self.options.dpu.clone())));
        let mut change = Change {
            inner: self,
            operation,
            _turn: turn,
            guard,
            generation,
            record,
            links: Vec::new(),
        };
        change.compare_lives()?;
        Ok(change)
    }

    /// Begins a transaction on a card that is there.
    pub(crate) fn look(&self, operation: &'static str) -> Result<Change<'_>> {
        let change = self.begin(operation)?;
        if change.record.away {
            let message = "the card is gone: its physical function has no network device";
            return Err(error(ErrorKind::DeviceLost, operation, message).object(self.options.device));
        }
        Ok(change)
    }

    /// Begins a transaction on a card that is there and in the life of the fence.
    pub(crate) fn fenced(&self, operation: &'static str, fence: Fence) -> Result<Change<'_>> {
        let change = self.look(operation)?;
        if fence.0 != change.record.epoch {
            let message = format!(
                "the card is in life {}, the call is of {}",
                change.record.epoch.0, fence.0.0
            );
            return Err(error(ErrorKind::Stale, operation, message).field("fence"));
        }
        Ok(change)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.changed.notify_waiters();
    }
}

/// A transaction: the record, to be changed and committed, and the card as it was at the beginning.
#[derive(Debug)]
pub(crate) struct Change<'a> {
    pub(crate) inner: &'a Inner,
    pub(crate) operation: &'static str,
    _turn: std::sync::MutexGuard<'a, ()>,
    guard: Guard,
    generation: u64,
    pub(crate) record: Record,
    /// Network devices of the host.
    links: Vec<Link>,
}

impl Change<'_> {
    pub(crate) fn kernel(&self) -> &dyn Kernel {
        &*self.inner.kernel
    }

    /// Writes the record down; on return it is on disk.
    pub(crate) fn commit(&mut self) -> Result<()> {
        self.record.tidy();
        self.generation += 1;
        let stored = self
            .inner
            .journal
            .store(&self.guard, self.generation, &self.record);
        stored.map_err(|failed| journal_error(self.operation, failed))?;
        self.close_ports();
        self.inner.changed.notify_waiters();
        Ok(())
    }

    fn compare_lives(&mut self) -> Result<()> {
        self.refresh()?;
        let found = self.life()?;
        match found {
            None if self.record.away => {}
            None => {
                self.record.away = true;
                self.commit()?;
            }
            Some(life) if !self.record.away && life == self.record.life => {}
            Some(life) => {
                self.record.begin_life(life);
                self.record.abilities = abilities::probe(self)?;
                self.commit()?;
            }
        }
        self.show();
        Ok(())
    }

    /// The card's life as it is now; `None` when a function of it is missing.
    fn life(&self) -> Result<Option<Life>> {
        let links: Option<Vec<(PciAddress, u32)>> = self
            .inner
            .pfs
            .iter()
            .map(|pci| Some((*pci, discover::netdev_of(&self.links, *pci)?.index.0)))
            .collect();
        let Some(links) = links else { return Ok(None) };
        let boot = self.kernel().boot().map_err(|failed| self.failed(failed))?;
        Ok(Some(Life { boot, links }))
    }

    /// Begins a new life by the caller's own doing, as a change of the mode.
    pub(crate) fn renew_life(&mut self) -> Result<()> {
        self.refresh()?;
        let life = self.life()?.unwrap_or_default();
        self.record.begin_life(life);
        self.record.abilities = abilities::probe(self)?;
        self.commit()?;
        self.show();
        Ok(())
    }

    /// Tells callers what was seen. What the card has is kept of one that is away, or that goes while it is read: its
    /// functions may be missing before its network devices are.
    fn show(&self) {
        self.close_ports();
        let abilities = &self.record.abilities;
        let pfs: Vec<Pf> = self.pfs().collect();
        let whole = !self.record.away && pfs.len() == self.inner.pfs.len();
        let mut vf = VfCapabilities::default();
        vf.max_vfs = pfs.iter().map(|pf| pf.total_vfs).max().unwrap_or(0);
        vf.attributes = abilities.attributes;
        vf.max_mtu = abilities.max_mtu;
        vf.resets = abilities.resets;
        vf.attachments = abilities::attachments(self.kernel().sysfs());
        vf.resizable = true;
        let device = pfs.first().map_or_else(String::new, |pf| {
            let driver = pf.driver.as_deref().unwrap_or("no driver");
            format!("{:04x}:{:04x} at {} ({driver})", pf.id.0, pf.id.1, pf.pci)
        });
        let sees = self.kernel().has_frames()
            && self.inner.options.role.is_soc()
            && (abilities.isolation == Isolation::Switchdev || isolation::owns_vlans(self));
        let all: usize = pfs.iter().map(|pf| usize::from(pf.total_vfs) + 1).sum();
        let mut shown = self.inner.shown.write().unwrap_or_else(PoisonError::into_inner);
        *shown = Shown {
            epoch: self.record.epoch,
            device: if device.is_empty() {
                shown.device.clone()
            } else {
                device
            },
            vf: if whole { vf } else { shown.vf.clone() },
            switchdev: abilities.switchdev,
            isolation: abilities.isolation.clone(),
            ports: match (whole, sees) {
                (false, _) => shown.ports,
                (true, true) => all.try_into().unwrap_or(u32::MAX),
                (true, false) => 0,
            },
        };
    }

    /// Reads the host's network devices again, after something that changed them.
    pub(crate) fn refresh(&mut self) -> Result<()> {
        self.links = self
            .kernel()
            .links(&Spot::Host)
            .map_err(|failed| self.failed(failed))?;
        Ok(())
    }

    /// The host's network devices as they were last read.
    pub(crate) fn links(&self) -> &[Link] {
        &self.links
    }

    /// The physical functions that are there.
    pub(crate) fn pfs(&self) -> impl Iterator<Item = Pf> {
        let sysfs = self.kernel().sysfs();
        self.inner
            .pfs
            .iter()
            .filter_map(move |pci| discover::pf(sysfs, *pci))
    }

    pub(crate) fn pf(&self, index: PfIndex) -> Result<Pf> {
        let pci = self.inner.pfs.get(usize::from(index.0)).ok_or_else(|| {
            let message = format!("the card has {} physical functions", self.inner.pfs.len());
            error(ErrorKind::NotFound, self.operation, message).field("pf")
        })?;
        discover::pf(self.kernel().sysfs(), *pci).ok_or_else(|| {
            error(
                ErrorKind::DeviceLost,
                self.operation,
                "the physical function is gone",
            )
            .object(*pci)
        })
    }

    /// The network device of a physical function.
    pub(crate) fn pf_link(&self, index: PfIndex) -> Result<&Link> {
        let pci = self.inner.pfs.get(usize::from(index.0));
        let found = pci.and_then(|pci| discover::netdev_of(&self.links, *pci));
        found.ok_or_else(|| {
            let message = "the physical function has no network device";
            error(ErrorKind::DeviceLost, self.operation, message).field("pf")
        })
    }

    /// The VFs that the card has, with their ports.
    pub(crate) fn vfs(&self) -> Vec<(PortRef, VirtualFunction)> {
        let sysfs = self.kernel().sysfs();
        let pfs = self.inner.pfs.iter().enumerate();
        pfs.flat_map(|(pf, pci)| {
            let port = move |vf: u16| port(pf as u16, vf);
            discover::vfs(sysfs, *pci)
                .into_iter()
                .map(move |vf| (port(vf.index), vf))
        })
        .collect()
    }

    pub(crate) fn vf(&self, port: PortRef) -> Option<VirtualFunction> {
        let (pf, index) = indices(port)?;
        let pci = self.inner.pfs.get(usize::from(pf.0))?;
        discover::vf_of(self.kernel().sysfs(), *pci, index)
    }

    /// The port whose current lease this is.
    pub(crate) fn leased(&self, lease: &VfLease) -> Result<PortRef> {
        let current = self
            .record
            .held(lease.port)
            .is_some_and(|held| held.lease == *lease);
        current.then_some(lease.port).ok_or_else(|| {
            let message = format!("lease {} is not current", lease.id.0);
            error(ErrorKind::Stale, self.operation, message).object(lease.port)
        })
    }

    pub(crate) fn port_of_owner(&self, owner: &LeaseOwner) -> Option<PortRef> {
        let functions = self.record.functions.iter();
        functions
            .filter(|(_, function)| {
                function
                    .held
                    .as_ref()
                    .is_some_and(|held| held.lease.owner == *owner)
            })
            .map(|(port, _)| *port)
            .next()
    }

    pub(crate) fn failed(&self, failed: KernelError) -> Error {
        kernel_error(self.operation, failed)
    }

    pub(crate) fn refuse(&self, kind: ErrorKind, message: impl Into<Cow<'static, str>>) -> Error {
        error(kind, self.operation, message)
    }
}

/// A VF of the card's only host.
pub(crate) fn port(pf: u16, vf: u16) -> PortRef {
    PortRef::Vf {
        controller: ControllerId(0),
        pf: PfIndex(pf),
        vf: VfIndex(vf),
    }
}

/// Number of the PF and of the VF on it.
pub(crate) fn indices(port: PortRef) -> Option<(PfIndex, u16)> {
    match port {
        PortRef::Vf {
            controller: ControllerId(0),
            pf,
            vf,
        } => Some((pf, vf.0)),
        _ => None,
    }
}

fn check_vlans((first, last): (u16, u16)) -> Result<()> {
    if first >= 1 && first <= last && last <= 4094 {
        return Ok(());
    }
    let message = format!("{first} to {last} is no range of VLANs: 1 to 4094, first not above last");
    Err(error(ErrorKind::Invalid, OPEN, message).field("vlans"))
}

pub(crate) fn error(
    kind: ErrorKind,
    operation: &'static str,
    message: impl Into<Cow<'static, str>>,
) -> Error {
    Error::new(kind, operation, message).backend(NAME)
}

pub(crate) fn kernel_error(operation: &'static str, failed: KernelError) -> Error {
    let kind = match failed.errno {
        Some(libc::EPERM | libc::EACCES) => ErrorKind::Denied,
        Some(libc::EBUSY) => ErrorKind::Busy,
        Some(libc::EOPNOTSUPP) => ErrorKind::Unsupported,
        _ => ErrorKind::Io,
    };
    let mut made = error(kind, operation, failed.what.clone());
    made.vendor_code = failed.errno.map(i64::from);
    made.source(failed)
}

pub(crate) fn journal_error(operation: &'static str, source: JournalError) -> Error {
    let kind = match source {
        JournalError::Io { .. } => ErrorKind::Io,
        JournalError::Damaged { .. } => ErrorKind::Fault,
    };
    error(kind, operation, source.to_string())
        .effect(Effect::None)
        .source(source)
}
