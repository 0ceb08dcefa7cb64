//! The dataplane: what happens to a frame between two ports of the card.
//!
//! ```text
//! rx ─► parse ─► guard ─► neighbour ─► lookup ─► classify ─► act ─► offload ─► tx
//!                 │           │           hit └──────────────► │
//!                 │           └─ ARP/ND answered               ├─ Jump, Decapsulate + Jump: classified again
//!                 └─ spoofed: dropped and counted              └─ Punt: to the stack port, with the ingress port's id
//! ```
//!
//! Each stage is a file and a function over borrowed tables; it returns and never calls back. One thread owns an
//! [`Engine`] with all its tables; others reach it by an [`EngineHandle`], whose commands are carried out between two
//! batches. So no packet sees half of a rule change, and no table needs a lock.
//!
//! | file | job |
//! |---|---|
//! | `engine` | the worker loop: the only place that reads a clock and waits |
//! | `commands` | what other threads asked for, carried out between two batches |
//! | `stages` | one batch led through the stages |
//! | `handle` | commands from other threads |
//! | `port` | ports, what may come in by them, their transmit queues |
//! | `guard` | anti-spoofing: a frame's source is its port's, or it is dropped |
//! | `neighbour` | ARP and ND answered for pods |
//! | `key` | what lookup and classify compare, made from parsed headers |
//! | `rules` | steering rules compiled to matches and steps |
//! | `classify` | groups of masked rules, followed through jumps |
//! | `act` | the steps carried out on a frame |
//! | `offload` | flows offered to the network processor |
//! | `tx` | checksums finished, super-frames cut or joined, MTU kept, queues flushed |
//! | `stats` | what was counted, why frames were dropped |
//! | `steering` | [`SoftSteering`]: the steering trait over an engine, with the limits of an emulated card |
//!
//! # Invariants
//! * No allocation after `rx` but to grow a queue for the first time; no clock outside `engine`.
//! * A frame's identity is the port it came in on.
//! * What no rule matches is dropped and counted, as is every frame that is not transmitted: each with a [`DropReason`].

#![forbid(unsafe_code)]

mod act;
mod classify;
mod commands;
mod engine;
#[doc(hidden)]
pub mod fuzz;
mod guard;
mod handle;
mod key;
mod neighbour;
mod offload;
mod port;
mod rules;
mod stages;
mod stats;
mod steering;
mod tx;

#[cfg(test)]
mod tests;

pub use engine::{Engine, EngineConfig};
pub use handle::{EngineGone, EngineHandle};
pub use offload::FlowOffloadLimits;
pub use port::PortPolicy;
pub use rules::Refused;
pub use stats::{DropReason, EngineStats, PortStats};
pub use steering::{SoftSteering, software_capabilities};
