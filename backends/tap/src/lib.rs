//! The dpumesh emulator: a DPU on ordinary Linux, without a DPU.
//!
//! ```text
//!      pod                host side (process, namespace)          SoC side (process, namespace)
//!  ┌─────────┐            TapBackend, Role::Host                  TapBackend, Role::Soc
//!  │ net1 ◄──┼─ attach ── VfAllocator ──► TapCard ◄── admit ───── Ports::open ──► PortIo ──► dataplane
//!  └────┬────┘                        (a directory: the silicon)        │
//!       └────────────────── TAP or veth: the VF's wire ─────────────────┘        uplink: VXLAN or a NIC
//! ```
//!
//! | module | story |
//! |---|---|
//! | [`device`] | frames of TAPs, packet sockets and the overlay's UDP socket |
//! | [`impair`] | a link that loses, delays, duplicates, reorders, corrupts |
//! | `card`, `yard` | the card's memory (kept by [`dpumesh_hw::journal`]), its devices in namespaces |
//! | `vf`, `ports`, `events`, `backend` | the contract's traits on top |
//! | `profile`, `options` | which card to be, and where |
//! | `sys` | the system calls without a safe wrapper: the only unsafe code |
//!
//! The emulator stands for a card's behaviour (leases, limits, resets, offloads), not for its speed nor for PCI.
#![deny(unsafe_code)]

mod backend;
mod card;
pub mod device;
mod events;
pub mod impair;
mod options;
mod ports;
mod profile;
mod sys;
mod vf;
mod yard;

pub use backend::TapBackend;
pub use card::TapCard;
pub use options::{Mode, TapOptions, VfKind};
pub use profile::{PROFILES, ParseProfileError, Profile};

/// Compiles the example.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

/// Name of this backend in its errors and in [`dpumesh_core::BackendInfo`].
pub const NAME: &str = "tap";
