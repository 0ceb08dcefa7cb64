//! xDS for a mesh on DPUs.

#![forbid(unsafe_code)]

pub mod schema;
