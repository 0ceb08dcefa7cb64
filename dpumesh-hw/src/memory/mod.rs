//! The reference backend: the contract in executable form, in memory.
//!
//! A [`MemoryCard`] has VFs, an eswitch that really carries frames, a network processor that keeps books, and lives that
//! end when a test says so. [`MemoryCard::both`] is one backend for all of it; [`MemoryCard::host`] and
//! [`MemoryCard::soc`] are the two halves of a card between two machines, for leases that need two parties.
//!
//! ```text
//!   Wire (outer end: pod or network)          PortIo (inner end: representor, on the SoC)
//!        │ send                                    ▲ receive        │ transmit
//!        ▼                                         │                ▼
//!   anti-spoofing, VLAN ─► rules, group by group ──┤ miss: Software  straight to the port's outer end
//!                              │                   └ miss: Drop
//!                              └► Drop · Forward: outer end of a port · Punt: outer end of stack0
//! ```
//!
//! It is the simplest reading of the contract, not a fast one: one lock, linear search, one frame at a time. Limits are
//! those of the given [`Capabilities`], cut to what it can really do ([`capabilities`]).
//!
//! ```
//! use dpumesh_core::steering::{Action, Cookie, Owner, Pattern, Priority, SteeringRule};
//! use dpumesh_core::{Backend, BackendExt, Frame, FlowSteeringExt, PortRef};
//! use dpumesh_hw::memory::{Fate, MemoryCard};
//!
//! # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
//! let card = MemoryCard::default();
//! let backend = card.both();
//! let to_proxy = SteeringRule::new(Cookie(1), Owner::Agent, Priority(0), Pattern::default(), vec![Action::Punt]);
//! backend.require_steering()?.add(backend.fence(), to_proxy).await?;
//! let uplink = card.wire(PortRef::Uplink(0)).expect("it has an uplink");
//! assert_eq!(uplink.send(Frame::copy_of(&[0; 60])), Fate::Punted);
//! # Ok::<(), dpumesh_core::Error>(())
//! # }).unwrap();
//! ```
#![forbid(unsafe_code)]

mod device;
mod eswitch;
pub(crate) mod headers;
mod offload;
mod ports;
mod steering;
mod transport;
mod vf;

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use dpumesh_core::backend::EventStream;
use dpumesh_core::steering::{Atomicity, Field};
use dpumesh_core::{
    ActionKinds, AttachmentKinds, Backend, BackendInfo, Capabilities, ConnectionKinds, Epoch, Error, Event,
    EventKinds, FlowSteering, MatchKinds, Mtu, NpOffload, PortRef, Ports, ResetLevels, Role, ShmTransport,
    VfAllocator, VfAttributes,
};
use dpumesh_core::{DpuId, vf::VfLocation};
use tokio::sync::watch;

use crate::events::HubStream;
use device::Card;
pub use eswitch::{DropReason, Fate};
pub use offload::{TableSpec, program};
pub use ports::{Arrival, Wire};

/// What a card in memory is made of.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct MemoryConfig {
    /// Its name.
    pub dpu: DpuId,
    /// Its limits; what [`capabilities`] lacks is taken off.
    pub capabilities: Capabilities,
    /// VFs at the start of each life, at most the limit.
    pub vfs: u16,
    /// Uplinks.
    pub uplinks: u16,
    /// Largest L3 packet of uplinks, and of VFs until they are configured.
    pub mtu: Mtu,
    /// Frames that wait at each end of a port before more are dropped.
    pub queue: usize,
    /// Network namespaces that exist, by path; see [`MemoryCard::add_netns`].
    pub namespaces: Vec<PathBuf>,
    /// Where channels come from; without one the backend has no transport.
    pub transport: Option<Arc<dyn ShmTransport>>,
}

impl Default for MemoryConfig {
    /// Four VFs, one uplink, every ability, no transport.
    fn default() -> Self {
        Self {
            dpu: DpuId("dpu0".to_owned()),
            capabilities: capabilities(),
            vfs: 4,
            uplinks: 1,
            mtu: Mtu::ETHERNET,
            queue: 1024,
            namespaces: Vec::new(),
            transport: None,
        }
    }
}

/// A card in memory, held by the test that rules over it.
#[derive(Clone, Debug)]
pub struct MemoryCard {
    card: Arc<Card>,
    transport: Option<Arc<dyn ShmTransport>>,
}

impl Default for MemoryCard {
    fn default() -> Self {
        Self::new(MemoryConfig::default())
    }
}

impl MemoryCard {
    /// A card in its first life.
    pub fn new(mut config: MemoryConfig) -> Self {
        let transport = config.transport.take();
        if transport.is_none() {
            config.capabilities.transport = Default::default();
        }
        Self {
            card: Card::new(config),
            transport,
        }
    }

    /// A card with these limits.
    pub fn with_capabilities(capabilities: Capabilities) -> Self {
        Self::new(MemoryConfig {
            capabilities,
            ..MemoryConfig::default()
        })
    }

    /// One backend that plays host and SoC.
    pub fn both(&self) -> Arc<MemoryBackend> {
        self.half(Role::Both)
    }

    /// The host's half: leases.
    pub fn host(&self) -> Arc<MemoryBackend> {
        self.half(Role::Host)
    }

    /// The SoC's half: admissions, rules, processor, ports.
    pub fn soc(&self) -> Arc<MemoryBackend> {
        self.half(Role::Soc)
    }

    /// The outer end of a port: what a pod, the network or the shared proxy sees. `None` when there is no such port.
    pub fn wire(&self, port: PortRef) -> Option<Wire> {
        Wire::of(&self.card, port)
    }

    /// The card goes: `Lost` is raised and calls fail with `DeviceLost`. Nothing happens while it is away already.
    pub fn lose(&self) {
        self.card.lose();
    }

    /// The card comes back empty, in a new life: `Back` is raised. Nothing happens unless it is away.
    pub fn restore(&self) {
        self.card.restore(None);
    }

    /// The card goes and comes back.
    pub fn reset(&self) {
        self.lose();
        self.restore();
    }

    /// The card goes and comes back in another mode.
    pub fn reset_with(&self, capabilities: Capabilities) {
        self.lose();
        self.card.restore(Some(capabilities));
    }

    /// Makes a network namespace in which these names are taken.
    pub fn add_netns(&self, path: impl Into<PathBuf>, names: &[&str]) {
        self.card.add_netns(path.into(), names);
    }

    /// Removes a network namespace: VFs in it fall back to the host, as the kernel does it.
    pub fn remove_netns(&self, path: impl Into<PathBuf>) {
        self.card.remove_netns(&path.into());
    }

    /// Moves a VF behind the backend's back. False when there is no such VF.
    pub fn strand(&self, port: PortRef, location: VfLocation) -> bool {
        self.card.strand(port, location)
    }

    /// Makes every move of a VF fail with `Io` from now on, or work again. False when there is no such VF.
    pub fn jam(&self, port: PortRef, jammed: bool) -> bool {
        self.card.jam(port, jammed)
    }

    /// Sets a port's carrier and raises `Link` when it changes.
    pub fn set_link(&self, port: PortRef, up: bool) {
        self.card.set_link(port, up);
    }

    /// Raises `Health`.
    pub fn set_health(&self, health: Option<Error>) {
        self.card.raise(&Event::Health(health));
    }

    /// Lets the software behind the tables stand still, or work again: rules that are not in hardware match nothing.
    pub fn stop_software(&self, stopped: bool) {
        self.card.trouble(|trouble| trouble.software_stopped = stopped);
    }

    /// Lets so many more changes of rules work and every later one fail with `Io`; `None` mends it.
    pub fn fail_rules(&self, after: Option<usize>) {
        self.card.trouble(|trouble| trouble.changes_left = after);
    }

    /// Gives at most so many VFs from now on, whatever is asked for; `None` mends it.
    pub fn limit_vfs(&self, most: Option<u16>) {
        self.card.trouble(|trouble| trouble.most_vfs = most);
    }

    /// Makes every change of a VF's attributes fail with `Io`, or work again. False when there is no such VF.
    pub fn freeze(&self, port: PortRef, frozen: bool) -> bool {
        self.card.freeze(port, frozen)
    }

    /// Lets an open port give so many more frames and then fail with `Io` until it is mended by `None`.
    pub fn fail_port(&self, port: PortRef, after: Option<usize>) {
        self.card.fail_port(port, after);
    }

    /// Makes every activation of a program fail with `Fault`, or work again.
    pub fn fail_activation(&self, fails: bool) {
        self.card.trouble(|trouble| trouble.activation_fails = fails);
    }

    /// Lets the network processor pass octets of an offloaded connection. False when it does not carry it.
    pub fn pass(&self, token: dpumesh_core::offload::ConnectionToken, up: u32, down: u32) -> bool {
        self.card.pass(token, up, down)
    }

    fn half(&self, role: Role) -> Arc<MemoryBackend> {
        let card = &self.card;
        let is_soc = role.is_soc();
        Arc::new(MemoryBackend {
            role,
            vf: vf::MemoryVf::new(Arc::clone(card), role),
            steering: is_soc.then(|| steering::MemorySteering::new(Arc::clone(card))),
            offload: is_soc.then(|| offload::MemoryOffload::new(Arc::clone(card))),
            ports: is_soc.then(|| ports::MemoryPorts::new(Arc::clone(card))),
            transport: self
                .transport
                .as_ref()
                .map(|inner| transport::MemoryTransport::new(Arc::clone(card), Arc::clone(inner))),
            card: Arc::clone(card),
            life: watch::Sender::new(()),
        })
    }
}

/// One side of a [`MemoryCard`], or both.
#[derive(Debug)]
pub struct MemoryBackend {
    card: Arc<Card>,
    role: Role,
    vf: vf::MemoryVf,
    steering: Option<steering::MemorySteering>,
    offload: Option<offload::MemoryOffload>,
    transport: Option<transport::MemoryTransport>,
    ports: Option<ports::MemoryPorts>,
    /// Dropped with the backend: its subscriptions end, even where the card lives on.
    life: watch::Sender<()>,
}

impl Backend for MemoryBackend {
    fn info(&self) -> BackendInfo {
        let version = env!("CARGO_PKG_VERSION");
        let mut info = BackendInfo::new(device::NAME, version, self.card.dpu().clone(), self.role);
        "a card in memory".clone_into(&mut info.device);
        info
    }

    fn capabilities(&self) -> Capabilities {
        self.card.capabilities()
    }

    fn epoch(&self) -> Epoch {
        self.card.epoch()
    }

    fn vf(&self) -> Option<&dyn VfAllocator> {
        Some(&self.vf)
    }

    fn steering(&self) -> Option<&dyn FlowSteering> {
        self.steering.as_ref().map(|part| part as _)
    }

    fn offload(&self) -> Option<&dyn NpOffload> {
        self.offload.as_ref().map(|part| part as _)
    }

    fn transport(&self) -> Option<&dyn ShmTransport> {
        self.transport.as_ref().map(|part| part as _)
    }

    fn ports(&self) -> Option<&dyn Ports> {
        self.ports.as_ref().map(|part| part as _)
    }

    fn events(&self) -> Box<dyn EventStream> {
        Box::new(MemoryEvents {
            card: Arc::downgrade(&self.card),
            stream: self.card.subscribe(),
            life: self.life.subscribe(),
        })
    }
}

/// Events of a card. Waiting for one also lets rules age, since the card has no clock of its own: so it needs a tokio
/// runtime with time.
#[derive(Debug)]
struct MemoryEvents {
    card: std::sync::Weak<Card>,
    stream: HubStream,
    life: watch::Receiver<()>,
}

#[async_trait]
impl EventStream for MemoryEvents {
    async fn next(&mut self) -> Option<Event> {
        loop {
            let ageing = device::age_forever(&self.card);
            tokio::select! {
                biased;
                event = self.stream.next() => return event,
                // Nothing is ever sent: it changes when the backend is dropped.
                _ = self.life.changed() => return None,
                () = ageing => {}
            }
        }
    }
}

/// Everything that the memory backend can do, with limits that tests can reach.
pub fn capabilities() -> Capabilities {
    let mut all = Capabilities::default();
    "memory".clone_into(&mut all.mode);
    set_vf(&mut all);
    set_steering(&mut all);
    all.offload.slots = 4;
    all.offload.max_image = 1 << 20;
    all.offload.tables = 8;
    all.offload.entries = 4096;
    all.offload.connections = 256;
    all.offload.connection_kinds = ConnectionKinds::SPLICE;
    all.transport.channels = 64;
    all.transport.max_message = 1 << 20;
    all.transport.max_ring = 1 << 24;
    all.transport.messages = true;
    all.transport.streams = true;
    all.ports.open = 64;
    all.ports.checksum_offload = true;
    all.ports.tso = true;
    all.ports.uso = true;
    all.events = EventKinds::all();
    all
}

fn set_vf(all: &mut Capabilities) {
    all.vf.max_vfs = 16;
    all.vf.attributes = VfAttributes::MAC
        | VfAttributes::VLAN
        | VfAttributes::TRUST
        | VfAttributes::SPOOF_CHECK
        | VfAttributes::LINK_STATE
        | VfAttributes::MTU;
    all.vf.max_mtu = Mtu::try_from(9000).ok();
    all.vf.attachments = AttachmentKinds::all();
    all.vf.resets = ResetLevels::CONFIG | ResetLevels::FUNCTION | ResetLevels::DEVICE;
    all.vf.resizable = true;
}

fn set_steering(all: &mut Capabilities) {
    let steering = &mut all.steering;
    steering.hardware_rules = 4096;
    steering.rules = 16_384;
    steering.groups = 8;
    steering.priorities = 1 << 16;
    steering.masks = 64;
    steering.counters = 2048;
    steering.actions = ActionKinds::DROP
        | ActionKinds::FORWARD
        | ActionKinds::PUNT
        | ActionKinds::JUMP
        | ActionKinds::REWRITE_ETH
        | ActionKinds::TTL
        | ActionKinds::VLAN
        | ActionKinds::MARK
        | ActionKinds::COUNT;
    steering.hardware_actions = steering.actions;
    let masked = MatchKinds::EXACT | MatchKinds::PREFIX | MatchKinds::MASK;
    let ranged = MatchKinds::EXACT | MatchKinds::RANGE;
    steering.fields = [
        (Field::Port, MatchKinds::EXACT),
        (Field::EthSrc, masked),
        (Field::EthDst, masked),
        (Field::Ethertype, MatchKinds::EXACT),
        (Field::Vlan, MatchKinds::EXACT),
        (Field::Ip4Src, masked),
        (Field::Ip4Dst, masked),
        (Field::Ip6Src, masked),
        (Field::Ip6Dst, masked),
        (Field::IpProto, MatchKinds::EXACT),
        (Field::Dscp, MatchKinds::EXACT),
        (Field::Fragment, MatchKinds::EXACT),
        (Field::L4Src, ranged),
        (Field::L4Dst, ranged),
        (Field::TcpFlags, masked),
        (Field::Mark, masked),
    ]
    .into();
    steering.hardware_fields = steering.fields.clone();
    steering.atomicity = [Atomicity::Continue, Atomicity::Rollback, Atomicity::Atomic].into();
    steering.batch_max = 4096;
    steering.per_operation_status = true;
    steering.idle_timeout = true;
    steering.software_fallback = true;
}

#[cfg(test)]
mod tests;
