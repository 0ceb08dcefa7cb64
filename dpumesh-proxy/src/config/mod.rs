//! Configuration: an Envoy v3 bootstrap and the xDS files it names, read, checked, compiled.
//!
//! ```text
//! text ─► schema (YAML/JSON → message) ─► support (every set field implemented?) ─► translate ─► model::Config
//! ```
//! [`files::Files`] holds the last good text of every file; a change is tried as a whole and takes effect as a whole, or
//! not at all.

mod at;
mod error;
pub mod files;
pub mod model;
pub mod schema;
pub mod support;
mod translate;
mod translate_route;

pub use error::ConfigError;
