//! The dpumesh contract: what a DPU (or a NIC, or an emulator) must be able to do for a service mesh, as traits and data.
//!
//! Nothing here does I/O and nothing is unsafe. A hardware vendor implements [`Backend`] and the parts that the card
//! has; programs are written against the traits and are handed a backend as a value.
//!
//! | part | says | module |
//! |---|---|---|
//! | [`Backend`] | who, what it can do, which life of the card | [`backend`], [`capability`], [`event`] |
//! | [`VfAllocator`] | which pod has which virtual function | [`vf`], [`pci`] |
//! | [`FlowSteering`] | what the eswitch does with a frame | [`steering`] |
//! | [`NpOffload`] | what the network processor carries | [`offload`] |
//! | [`ShmTransport`] | channels over shared memory | [`transport`] |
//! | [`Ports`], [`PortIo`] | frames of representors and uplinks | [`port`], [`frame`] |
//!
//! Control traits are object-safe, async and batch-shaped; data-path calls are synchronous, take slices, return counts
//! and never block. Every failure is an [`Error`] that says what took effect and whether to try again. The
//! conformance kit of `dpumesh-hw` has a case for each sentence of these docs.
//!
//! ```
//! use dpumesh_core::steering::{Action, Cookie, IpProtocol, Owner, Pattern, Priority, SteeringRule};
//! use dpumesh_core::PortRef;
//!
//! // All TCP that a pod sends goes to the shared proxy, and is counted.
//! let pattern = Pattern { port: Some(PortRef::vf(3)), ip_proto: Some(IpProtocol::TCP), ..Pattern::default() };
//! let rule = SteeringRule::new(Cookie(1), Owner::Agent, Priority(10), pattern, vec![Action::Count, Action::Punt]);
//! assert!(rule.check().is_ok());
//! ```
#![forbid(unsafe_code)]

pub mod addr;
pub mod backend;
pub mod capability;
pub mod error;
pub mod event;
pub mod ext;
pub mod frame;
pub mod offload;
pub mod pci;
pub mod port;
pub mod steering;
pub mod transport;
pub mod vf;

pub use addr::{InvalidValue, MacAddr, Mtu, VlanId, Vni};
pub use backend::{Backend, BackendInfo, DpuId, Epoch, EventStream, Fence, Role};
pub use capability::{
    ActionKinds, AttachmentKinds, Capabilities, ConnectionKinds, CounterUnit, EventKinds, MatchKinds,
    Missing, OffloadCapabilities, PortCapabilities, ResetLevels, SteeringCapabilities, TransportCapabilities,
    VfAttributes, VfCapabilities,
};
pub use error::{Details, Effect, Error, ErrorKind, Object, Result, Retry};
pub use event::Event;
pub use ext::{BackendExt, FlowSteeringExt};
pub use frame::{Checksum, Frame, Gso, GsoKind, HEADROOM, MAX_FRAME};
pub use offload::NpOffload;
pub use pci::PciAddress;
pub use port::{
    ControllerId, ParsePortError, PfIndex, PortInfo, PortIo, PortIoLimits, PortRef, Ports, VfIndex,
};
pub use steering::FlowSteering;
pub use transport::ShmTransport;
pub use vf::VfAllocator;
