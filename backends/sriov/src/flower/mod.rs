//! Steering by tc flower: [`FlowSteering`](dpumesh_core::FlowSteering) on any NIC, in its hardware where the driver takes a
//! filter, in the kernel's software where it does not.
//!
//! ```text
//! SteeringRule ─► RuleStore (judge, conflict, place) ─► parts ─► key, step ─► filter ─► Kernel (rtnetlink)
//!                                                                                       └─ echo: in_hw? ─► Placement
//! list, counters ◄─ rule_of ◄─ dump of the block
//! ```
//!
//! All netdevs of a card (representors of VFs, uplinks) share one tc *block*; a group is a *chain* of it, a port is flower's key
//! `indev`, a cookie is the first action's `TCA_ACT_COOKIE`. [`Steering::open`] finds the rules that an earlier process left and takes
//! them up again; filters that it would not have written are somebody else's and never touched. What the kernel and the
//! driver can do is found out by trying: each key and action is installed in a chain that no frame reaches, looked at, and
//! removed (`probe.rs`).
//!
//! # Where it differs
//! * A first fragment matches no port in software: the kernel's dissector reads ports of whole packets only.
//! * Octets are those of the IP packet ([`CounterUnit::L3`](dpumesh_core::CounterUnit::L3)).
//! * Tunnels are the kernel's: see the table in `translate.rs`.
//! * No ageing, no marks, no queues.
#![forbid(unsafe_code)]

mod block;
mod filter;
mod kernel;
mod key;
mod octets;
mod owners;
mod parts;
mod probe;
mod steering;
mod step;
mod table;
mod translate;

#[cfg(feature = "fake")]
pub(crate) mod fake;
#[cfg(test)]
mod tests;

pub use kernel::{Answer, Kernel, Message, Refusal, Request, Socket};
pub use steering::{Life, Meter, Options, Steering};
