//! [`Backend`]: one card behind the traits.
//!
//! ```text
//! Backend ── info, capabilities, epoch, events        always
//!    ├── vf        VfAllocator     leases of virtual functions
//!    ├── steering  FlowSteering    rules in the eswitch
//!    ├── offload   NpOffload       programs, tables and connections of the network processor
//!    ├── transport ShmTransport    channels over shared memory
//!    └── ports     Ports           frames of representors and uplinks
//! ```
//!
//! Each part is optional: what a card cannot do is visible in the type, not a late error. A backend is a value that
//! the caller passes on; there is no global one and no feature picks it.
//!
//! # Epochs
//! A card can vanish and return (reboot, reset, surprise removal). The backend counts its lives in an [`Epoch`]. When the card
//! goes, it raises [`Event::Lost`], and every call fails fast with `DeviceLost`; when the card is usable again the epoch
//! has grown and [`Event::Back`] is raised. Calls that change state carry a [`Fence`]: a fence of an older epoch
//! gets `Stale` and has no effect, so nobody programs a card from memories of its former life. Nothing installed
//! before survives unless `list` shows it; the owner replays.

use std::fmt;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::capability::Capabilities;
use crate::event::Event;
use crate::offload::NpOffload;
use crate::port::Ports;
use crate::steering::FlowSteering;
use crate::transport::ShmTransport;
use crate::vf::VfAllocator;

/// One card, seen from one side of the PCIe link.
///
/// Methods here are cheap, do not block and do not touch the card.
pub trait Backend: Send + Sync + fmt::Debug {
    /// Who this is. Constant.
    fn info(&self) -> BackendInfo;

    /// What the card can do in its present mode. Changes only together with the epoch.
    fn capabilities(&self) -> Capabilities;

    /// The card's present life; while it is away, the last one.
    fn epoch(&self) -> Epoch;

    /// Leases of virtual functions.
    fn vf(&self) -> Option<&dyn VfAllocator>;

    /// Steering rules.
    fn steering(&self) -> Option<&dyn FlowSteering>;

    /// The network processor.
    fn offload(&self) -> Option<&dyn NpOffload>;

    /// Shared-memory channels.
    fn transport(&self) -> Option<&dyn ShmTransport>;

    /// Frames of the card's ports. Role [`Role::Soc`] only.
    fn ports(&self) -> Option<&dyn Ports>;

    /// A new subscription to the backend's events, from now on.
    fn events(&self) -> Box<dyn EventStream>;
}

/// A subscription to events of one backend.
#[async_trait]
pub trait EventStream: Send + fmt::Debug {
    /// Waits for the next event; `None` once the backend was dropped.
    ///
    /// Events of one backend arrive in the order they happened. The queue is bounded: a subscriber too slow loses the
    /// oldest and is told by [`Event::Overflowed`]. Cancelling loses nothing.
    async fn next(&mut self) -> Option<Event>;
}

/// Who a backend is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct BackendInfo {
    /// Name of the backend: `memory`, `tap`, `sriov`, `yusur`.
    pub name: String,
    /// Version of the backend's code.
    pub version: String,
    /// Which card of the node.
    pub dpu: DpuId,
    /// Which side of the card.
    pub role: Role,
    /// Firmware or device text, for people.
    pub device: String,
    /// Version of the conformance kit that this backend was last proved with; empty until then.
    pub conformance: String,
}

impl BackendInfo {
    /// A backend not yet proved by the conformance kit.
    pub fn new(name: impl Into<String>, version: impl Into<String>, dpu: DpuId, role: Role) -> Self {
        Self {
            name: name.into(),
            version: version.into(),
            dpu,
            role,
            device: String::new(),
            conformance: String::new(),
        }
    }
}

/// A card of a node: stable across reboots, chosen by the operator (`dpu0`) or taken from the serial number. It names the
/// card, never one of its PCI functions.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct DpuId(pub String);

impl fmt::Display for DpuId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Which machine a backend runs on. Host and SoC are two machines joined by PCIe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Role {
    /// The host: it creates VFs, leases them and moves them into pods.
    Host,
    /// The card's SoC: it owns eswitch, representors and network processor.
    Soc,
    /// One backend that plays both (the memory backend, a card without SoC).
    Both,
}

impl Role {
    /// True where VFs are moved.
    pub const fn is_host(self) -> bool {
        matches!(self, Self::Host | Self::Both)
    }

    /// True where eswitch and representors are owned.
    pub const fn is_soc(self) -> bool {
        matches!(self, Self::Soc | Self::Both)
    }
}

/// Which life of the card; grows with each reset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Epoch(pub u64);

/// Token of a state-changing call: refused with `Stale` unless its epoch is the card's present one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Fence(pub Epoch);
