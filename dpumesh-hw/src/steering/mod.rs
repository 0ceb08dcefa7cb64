//! The contract of [`FlowSteering`](dpumesh_core::FlowSteering) as a synchronous data structure.
//!
//! A backend whose device has no rule memory of its own to ask (the memory backend, the emulator's software engine) keeps
//! its rules in a [`RuleStore`]: it decides every batch, and hands back the primitive changes for an engine to mirror.
//!
//! ```text
//! Batch ─► judge ─► cookie ─► overlap ─► place ─► Plan { outcome, changes } ─► the engine mirrors the changes in order
//!         (caps)   (owner)   (Conflict) (full?)                └─ undo, when it cannot
//! ```
//!
//! [`judge`] compares one rule with the card's limits; [`overlap`] says whether some frame could match two patterns.
//! Time comes in as milliseconds of the caller's monotonic clock; nothing here blocks, sleeps or does I/O.
#![forbid(unsafe_code)]

mod conflict;
mod cube;
mod judge;
mod store;

pub use cube::overlap;
pub use judge::judge;
pub use store::{Plan, Removal, RuleStore, StalePlan, TableChange};
