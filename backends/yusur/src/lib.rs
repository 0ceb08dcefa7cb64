//! Yusur DPUs behind the dpumesh traits: the SR-IOV floor, and the network processor (NP) behind the vendor's library.
//!
//! ```text
//!                  ┌─ VFs, ports, channels ─► floor (SR-IOV: dpumesh-sriov)
//! YusurBackend ────┼─ rules ─► NP's exact-match tables, and all of them in the floor's software
//!                  └─ programs, tables, connections, meters, mode ─► NP
//! ```
//!
//! The vendor's interface is not published. What this crate binds to is **our assumption**: one table of C functions,
//! `include/yusur_np.h`, which a vendor engineer maps to the true symbols. [`table`] has its types, [`sys`] calls it and is
//! the only place with `unsafe`.
//!
//! | module | what |
//! |---|---|
//! | [`find`] | where card and library are, and what was looked at |
//! | `entry` | a rule as exact-match entries, or what stands in the way |
//! | `tables` | what is in the card's tables and what is free |
//! | `rules` | where each rule acts; the order between hardware and software |
//! | `steering`, `offload`, `floor` | the traits |
//! | `worker` | the one thread that talks to the card, and its lives |
//! | `watch` | calls of the library that do not return |
//!
//! ```no_run
//! use dpumesh_core::{Backend, BackendExt};
//! use dpumesh_yusur::{Options, YusurBackend};
//!
//! # fn floor() -> Option<std::sync::Arc<dyn Backend>> { None }
//! # fn main() -> dpumesh_core::Result<()> {
//! let card = YusurBackend::open(Options::new("dpu0", floor()))?;
//! println!("{}: {} rules in hardware", card.info().device, card.capabilities().steering.hardware_rules);
//! # Ok(())
//! # }
//! ```
#![deny(unsafe_code)]

mod backend;
mod capability;
mod entry;
mod error;
pub mod find;
mod floor;
mod offload;
mod options;
mod rules;
mod steering;
pub mod sys;
pub mod table;
mod tables;
mod watch;
mod worker;

pub use backend::{MeterRate, YusurBackend};
pub use entry::{EXPANSION, number_of_port, port_of_number};
pub use find::LIBRARY_PATHS;
pub use options::{Firmware, Mode, Options};
