//! A connection before its filter chain is known: what its first octets say, and which chain that leads to.
//!
//! ```text
//! accept ─► inspect (peeks: TLS ClientHello, HTTP request line) ─► matcher tree │ chains by their match ─► filter chain
//! ```
//! Nothing is taken off the socket here: the chain reads everything itself.

pub mod hello;
pub mod inspect;
pub mod matcher;

pub use inspect::{Inspectors, PortRanges, Seen, Transport};
pub use matcher::{Facts, Matcher};
