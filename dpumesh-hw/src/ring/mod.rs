//! A ring with one producer and one consumer over memory that both map, and that the other may fill with lies.
//!
//! [`Producer`] puts messages or octets in, [`Consumer`] takes them out; neither blocks, allocates or makes a system
//! call. The ring knows nothing of sockets and processes: [`shm`](crate::shm) maps the memory, tells the two ends
//! apart, and carries the doorbell that [`Producer::must_notify`] and [`Consumer::must_notify`] call for.
//!
//! # How it works
//! `tail` and `head` are free-running 32-bit indices, `tail - head` octets are waiting, an index modulo the capacity is
//! a place. Each has one writer; [`layout`] draws them. An end keeps a copy of the other's index and looks at the real
//! one only when the copy promises nothing, and publishes its own once for a batch.
//!
//! *Data is visible before its index.* The producer copies in, then stores `tail` with release; the consumer loads it
//! with acquire, then copies out. *Room is free before it is reused.* The consumer copies out, then stores `head` with
//! release; the producer loads it with acquire, then copies in. *No sleeper is forgotten.* Before it sleeps, an end
//! sets its want flag, fences, and looks at the peer's index again; the peer publishes, fences, and looks at the flag.
//! The two sequentially consistent fences are ordered one way or the other: either the sleeper sees the index and does
//! not sleep, or the peer sees the flag and rings.
//!
//! # The peer is not trusted
//! Geometry is agreed outside and kept privately; the header is compared once. Each word the peer can write is read
//! once and range-checked before use, payload is copied and never borrowed, and every loop ends with the caller's
//! slices or the ring's own capacity. A lie is [`RingError::PeerMisbehaved`] and the end stays poisoned: a peer that
//! lied once has garbled what its indices meant. What a peer *can* do is garble the payload, withhold messages, and
//! ask for a doorbell after each batch.
//!
//! # Generations
//! The index cells carry a generation above the index. Ends that agree to restart enter the next one each in its own
//! time: a peer still in the one before has, for us, given and taken nothing yet.
//!
//! # How it is checked
//! Against a queue in `model.rs`, by loom in `interleavings.rs` (`RUSTFLAGS="--cfg loom" cargo test -p dpumesh-hw --lib
//! ring --release`), and between processes, with dying and lying peers, in [`shm`](crate::shm).

mod consumer;
mod end;
#[cfg(all(test, loom))]
mod interleavings;
pub mod layout;
pub mod memory;
#[cfg(all(test, not(loom)))]
mod model;
mod producer;
pub(crate) mod sync;

pub use consumer::{Consumer, Record};
pub use layout::{Geometry, Mode};
pub use memory::Memory;
pub use producer::{Producer, Reservation};

/// What was put in and not taken yet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct InFlight {
    /// Whole messages; 0 in stream mode.
    pub messages: u64,
    /// Octets of payload.
    pub bytes: u64,
}

/// Why a ring refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RingError {
    /// The peer wrote something that an honest one never writes. The end is poisoned: every later call says the same.
    #[error("peer misbehaved: {field} is {value:#x}")]
    PeerMisbehaved {
        /// The word that lies.
        field: &'static str,
        /// What was read.
        value: u64,
    },
    /// The message can never fit; nothing was put in.
    #[error("message of {len} octets is longer than the ring's bound of {max}")]
    MessageTooLong {
        /// Octets asked for.
        len: usize,
        /// Most octets the ring takes in one.
        max: u32,
    },
    /// The caller's buffer is too small for the next message, which stays in the ring.
    #[error("the next message has {need} octets, the buffer {have}")]
    BufferTooSmall {
        /// Octets of the message.
        need: usize,
        /// Octets of the buffer.
        have: usize,
    },
    /// The range does not lie inside the message.
    #[error("{len} octets at {offset} reach past a message of {limit}")]
    OutOfRange {
        /// First octet.
        offset: usize,
        /// Octets.
        len: usize,
        /// Octets of the message.
        limit: u32,
    },
    /// The ring carries the other mode.
    #[error("{operation} does not work on a ring of mode {mode}")]
    WrongMode {
        /// What was tried.
        operation: &'static str,
        /// What the ring carries.
        mode: &'static str,
    },
    /// No ring can have this shape.
    #[error("ring geometry: {field} {reason}")]
    Geometry {
        /// The field that does not fit.
        field: &'static str,
        /// What it must be.
        reason: &'static str,
    },
}
