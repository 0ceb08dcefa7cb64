//! A dpumesh backend for MyCard.
//!
//! ```text
//! card ── MyCard: who it is, what it can do, which life it is in
//!  ├── vf        leases of virtual functions     switched on in step 2
//!  └── steering  rules of the eswitch            switched on in step 3
//! ```
//!
//! The guide is `dpumesh-conform/README.md`: "Write a backend in an afternoon". What it calls step 2 and step 3 is
//! marked in the source: `grep -n "step 2" src/*.rs`.

#![forbid(unsafe_code)]

mod card;
// step 2: mod vf;
// step 3: mod steering;

pub use card::{MyCard, NAME};
