//! Decorators over any backend, to watch it or to break it.
//!
//! | wrapper | does |
//! |---|---|
//! | [`Trace`] | one span and one event per call, with its outcome |
//! | [`Fault`] | fails, delays or loses calls and resets the card, from a seed |
//! | [`Limit`] | tightens limits, enforces them and says so in the capabilities |
//! | [`Validate`] | holds the backend to the contract and turns a breach into a `Fault` error |
//!
//! Each takes and is an `Arc<dyn Backend>`, so they stack in any order. Each forwards every method in its own words
//! (`clippy::missing_trait_methods` is denied here), so a method that a trait gains cannot fall back to a default and lose
//! what the inner backend does. [`Around`] with a [`Layer`] is the way to write one more.
//!
//! ```
//! use std::sync::Arc;
//! use dpumesh_core::Backend;
//! use dpumesh_hw::memory::MemoryCard;
//! use dpumesh_hw::wrap::{Limit, Limits, Trace, Validate};
//!
//! let card = MemoryCard::default();
//! let few = Limits { rules: Some(8), ..Limits::default() };
//! let backend: Arc<dyn Backend> = Arc::new(Trace::new(Arc::new(Limit::new(Arc::new(Validate::new(card.both())), few))));
//! assert_eq!(backend.capabilities().steering.rules, 8);
//! ```
#![forbid(unsafe_code)]
#![deny(clippy::missing_trait_methods)]

mod around;
mod fault;
mod limit;
mod trace;
mod validate;

pub use around::{Around, Call, Layer};
pub use fault::{Fault, FaultRule, Faults, InvalidFault};
pub use limit::{Limit, Limits};
pub use trace::{Trace, Tracing};
pub use validate::Validate;

#[cfg(test)]
#[allow(
    clippy::missing_trait_methods,
    reason = "the subscriber that tests trace into is no wrapper"
)]
mod tests;
