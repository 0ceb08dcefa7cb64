//! Generic SR-IOV NICs behind the dpumesh traits, and the floor of every real card: sysfs, rtnetlink, devlink, tc flower.
//!
//! ```text
//!   Options ─► Card ── vf: leases, attributes, the way into a pod and back     VfAllocator
//!               │  ├── ports: frames of VFs and uplinks, by packet sockets       Ports
//!               │  ├── steering: rules on representors, by flower                FlowSteering
//!               │  └── isolation: what keeps VFs from talking past the host    refuses what can be bypassed
//!               │
//!            record (dpumesh_hw::journal: written down before the card is touched)
//!               │
//!            Kernel ── Linux: sysfs, netlink, devlink     fake: a card that is not there
//! ```
//!
//! | module | story |
//! |---|---|
//! | [`card`](Card), `record` | transactions on a card, and what is written down of it |
//! | [`discover`] | its functions in sysfs, by PCI address |
//! | `abilities` | what its driver is able to do, found by trying |
//! | `vf` | leases, attributes, attaching, releasing, reclaiming |
//! | [`isolation`] | frames from VF to VF |
//! | [`eswitch`] | its mode, representors |
//! | `steering` | its rules, by [`flower`] on its representors |
//! | `ports` | frames of VFs and uplinks |
//! | [`flower`] | steering rules as filters of `tc flower` |
//! | [`kernel`] | the seam to Linux |
//! | `events` | a card that goes and comes, VFs and carriers |
//!
//! Needs Linux 5.14 (network devices tell the PCI function that they belong to).
#![forbid(unsafe_code)]

mod abilities;
mod card;
pub mod discover;
pub mod eswitch;
mod events;
#[cfg(feature = "fake")]
pub mod fake;
pub mod flower;
pub mod isolation;
pub mod kernel;
mod options;
mod ports;
#[cfg(feature = "conformance")]
pub mod real;
mod record;
mod steering;
mod vf;

pub use card::{Card, FormerLease, Parts};
pub use eswitch::Representor;
pub use isolation::{Isolation, TrunkPort};
pub use options::{Options, Protect};
pub use ports::Sieve;

/// Compiles the example.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

/// Name of this backend in its errors and in [`dpumesh_core::BackendInfo`].
pub const NAME: &str = "sriov";
