//! What the runnable examples are put together from. Nothing here knows the mesh; the examples bring that.
//!
//! | module | for |
//! |---|---|
//! | [`workload`] | the servers and clients that run in pods: plain programs that know nothing of any mesh |
//! | [`children`] | starting, watching and ending processes; cleaning up after a killed run |
//! | [`capture`] | frames seen on an interface, as evidence |
//! | [`measure`] | CPU time and memory of processes, pinning, percentiles, medians |
//! | [`report`] | progress, scenarios, the final tables and their JSON |

#![forbid(unsafe_code)]

pub mod capture;
pub mod children;
pub mod measure;
pub mod report;
pub mod workload;
