//! A network processor in software, as the shared library that `dpumesh-yusur` loads.
//!
//! It is a card of the kind that the backend was written for: whole keys only, few priorities, few counters, no connection
//! tracking, slow insertions, batches that tell no more than how many were done and the first error, and resets. Frames
//! that a test hands in really go through its tables. There is a card at every PCI address; the first `open` makes it,
//! of the kind that its profile says ([`settings`]), and it lives until the process ends.
//!
//! The library's symbols are in `abi`, the only file with `unsafe`. A test steers a card by the library's `diagnose`
//! ([`control`]), so nothing here reaches around the interface that a real card has.
//!
//! This crate is also an ordinary one: it makes programs ([`program`]), finds its own library ([`library_path`]) and, with
//! the feature `conformance`, brings the kit's fixtures: on a floor in memory, where frames can be injected (`fixture`), and on the
//! floor of a true card (`on_floor`).
#![deny(unsafe_code)]

mod abi;
pub mod card;
pub mod control;
#[cfg(feature = "conformance")]
pub mod fixture;
pub mod library;
#[cfg(feature = "conformance")]
pub mod on_floor;
pub mod pipeline;
pub mod programs;
pub mod settings;

pub use library::library_path;
pub use programs::{TableSpec, program};
