//! The conformance kit as a program: what a vendor runs against a backend before anybody else does.
//!
//! ```text
//! dpumesh-conform --backend … ─► program ─► fixtures: cards of that backend ─► dpumesh_hw::conformance: the cases
//!                                   │                                               │ one Entry each
//!                                   ├─◄─────────────────────────────────────────────┘
//!                                   ├─► table, JSON, exit code
//!                                   └─► watch: the end of a run that does not come to its own
//! ```
//!
//! The cases are those of [`dpumesh_hw::conformance`]; here are the cards to run them on ([`fixtures`]) and the
//! command line ([`program`]). `README.md` is the guide "Write a backend in an afternoon".

#![forbid(unsafe_code)]

pub mod fixtures;
pub mod program;
mod watch;
