//! Configuration: an Envoy v3 bootstrap and the xDS files it names, read, checked, compiled.
//!
//! ```text
//! text ─► value (YAML/JSON) ─► schema (→ message) ─► support (every set field implemented?) ─► translate ─► model::Config
//! ```
//! [`files::Files`] holds the last good text of every file; a change is tried as a whole and takes effect as a whole, or
//! not at all.

mod access_log;
pub mod ads;
mod balancing;
pub mod dns;
pub mod dump;
mod ext_authz;
pub mod files;
pub mod fuzz;
mod health;
mod http_filters;
mod istio;
mod jwt;
mod made;
pub mod model;
mod overload;
mod proxy_protocol;
mod ratelimit;
mod rbac;
mod re2;
mod resource;
mod route_policy;
pub(crate) mod secret_files;
pub mod support;
mod text;
mod tracing;
mod translate;
mod translate_matcher;
mod translate_route;
mod translate_tls;

pub use dpumesh_xds::schema::{self, ConfigError};
