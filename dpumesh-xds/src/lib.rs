//! xDS for a mesh on DPUs.

#![forbid(unsafe_code)]

pub mod aggregate;
pub mod discovery;
pub mod ir;
pub mod schema;
pub mod snapshot;
pub mod translate;

#[cfg(test)]
mod recorded;
