//! The dpumesh contract: types, traits and errors. No I/O, no unsafe.
#![forbid(unsafe_code)]

pub mod addr;
pub mod frame;

pub use addr::{InvalidValue, MacAddr, Mtu, VlanId, Vni};
pub use frame::{Checksum, Frame, Gso, GsoKind, HEADROOM, MAX_FRAME};
