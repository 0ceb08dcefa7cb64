//! Where a ring's parts lie in memory, and the words its two ends must agree on before they touch it.
//!
//! ```text
//! base + 0      magic  u64 | cookie u64 | version u32, mode u32 | capacity u64 | longest message u64
//!               written once by the end that formats the ring, compared once by each end that attaches
//!      + 128    tail:  generation u32 << 32 | index u32         written by the producer only
//!      + 256    head:  generation u32 << 32 | index u32         written by the consumer only
//!      + 384    want data:  0 or 1     set by the consumer before it sleeps, taken by the producer
//!      + 512    want space: 0 or 1     set by the producer before it sleeps, taken by the consumer
//!      + 640    data, `capacity` octets, a power of two
//! ```
//! Every part has 128 octets of its own, since processors fetch cache lines in pairs. Words have the machine's byte
//! order: both ends are on one machine. An end keeps its own copy of the geometry and never reads the header again.

use super::{
    RingError,
    memory::Memory,
    sync::{Ordering, fence},
};

/// Octets of the control part before the data.
pub const CONTROL_BYTES: usize = 5 * LINE;
/// Octets kept apart for one writer.
pub(crate) const LINE: usize = 128;
pub(crate) const TAIL: usize = LINE;
pub(crate) const HEAD: usize = 2 * LINE;
pub(crate) const WANT_DATA: usize = 3 * LINE;
pub(crate) const WANT_SPACE: usize = 4 * LINE;
/// Octets in front of each message: its length.
pub(crate) const RECORD_HEADER: u32 = 8;

const MAGIC: u64 = u64::from_le_bytes(*b"dpuring1");
const VERSION: u32 = 1;
const SMALLEST: u32 = 16;
const LARGEST: u32 = 1 << 30;

/// Where indices start: shortly before they wrap around, so that the wrap happens in every test and on every first day,
/// not after four gigabytes.
pub(crate) const START: u32 = 0u32.wrapping_sub(1 << 16);

/// What a ring carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Records with their boundaries kept, each at most `max_len` octets long; a record may be empty.
    Messages {
        /// Longest message, in octets.
        max_len: u32,
    },
    /// Octets without boundaries.
    Stream,
}

impl Mode {
    /// The mode's name, as errors print it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Messages { .. } => "messages",
            Self::Stream => "stream",
        }
    }
}

/// One ring's place and shape; both ends hold the same one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Offset of the ring in its memory, a multiple of 128 octets.
    pub base: usize,
    /// Octets of data, a power of two from 16 to 2³⁰.
    pub capacity: u32,
    /// What the ring carries.
    pub mode: Mode,
    /// A number drawn for this connection; tells a ring of another connection apart.
    pub cookie: u64,
    /// The generation both ends begin with.
    pub generation: u32,
}

impl Geometry {
    /// Octets that a ring with `capacity` octets of data takes.
    pub fn footprint(capacity: u32) -> usize {
        CONTROL_BYTES + capacity as usize
    }

    /// Writes the header and empty indices. Call it before the memory is shared.
    ///
    /// # Errors
    /// [`RingError::Geometry`] names the field that does not fit.
    pub fn format(&self, memory: &impl Memory) -> Result<(), RingError> {
        self.validate(memory.len())?;
        for (at, word) in self.header() {
            memory.store(self.base + at, word, Ordering::Relaxed);
        }
        for at in [TAIL, HEAD] {
            memory.store(self.base + at, pack(self.generation, START), Ordering::Relaxed);
        }
        for at in [WANT_DATA, WANT_SPACE] {
            memory.store(self.base + at, 0, Ordering::Relaxed);
        }
        fence(Ordering::Release);
        Ok(())
    }

    /// Compares the header in memory, word by word, with what was agreed.
    ///
    /// # Errors
    /// [`RingError::Geometry`] for a shape that cannot be, [`RingError::PeerMisbehaved`] for a word that differs.
    pub fn check(&self, memory: &impl Memory) -> Result<(), RingError> {
        const FIELDS: [&str; 5] = [
            "magic",
            "cookie",
            "version and mode",
            "capacity",
            "longest message",
        ];
        self.validate(memory.len())?;
        for ((at, expected), field) in self.header().into_iter().zip(FIELDS) {
            let value = memory.load(self.base + at, Ordering::Relaxed);
            if value != expected {
                return Err(RingError::PeerMisbehaved { field, value });
            }
        }
        fence(Ordering::Acquire);
        Ok(())
    }

    /// Longest message the ring takes; 0 in stream mode.
    pub(crate) fn max_len(&self) -> u32 {
        match self.mode {
            Mode::Messages { max_len } => max_len,
            Mode::Stream => 0,
        }
    }

    fn header(&self) -> [(usize, u64); 5] {
        let mode = match self.mode {
            Mode::Messages { .. } => 1,
            Mode::Stream => 2,
        };
        [
            (0, MAGIC),
            (8, self.cookie),
            (16, u64::from(VERSION) << 32 | mode),
            (24, u64::from(self.capacity)),
            (32, u64::from(self.max_len())),
        ]
    }

    fn validate(&self, memory: usize) -> Result<(), RingError> {
        let refuse = |field, reason| Err(RingError::Geometry { field, reason });
        if !self.capacity.is_power_of_two() || !(SMALLEST..=LARGEST).contains(&self.capacity) {
            return refuse("capacity", "must be a power of two from 16 to 2^30 octets");
        }
        if self.max_len() > self.capacity - RECORD_HEADER {
            return refuse(
                "max_len",
                "a message and its 8-octet length must fit into the capacity",
            );
        }
        if !self.base.is_multiple_of(LINE) {
            return refuse("base", "must be a multiple of 128 octets");
        }
        match self.base.checked_add(Self::footprint(self.capacity)) {
            Some(end) if end <= memory => Ok(()),
            _ => refuse("base", "the ring must lie inside the memory"),
        }
    }
}

/// A generation and an index in one cell, so that neither is ever seen without the other.
pub(crate) fn pack(generation: u32, index: u32) -> u64 {
    u64::from(generation) << 32 | u64::from(index)
}

/// The parts of [`pack`].
pub(crate) fn unpack(cell: u64) -> (u32, u32) {
    ((cell >> 32) as u32, cell as u32)
}

/// Octets a message of `len` octets takes: its length word, itself, and padding to a multiple of 8.
pub(crate) fn record_bytes(len: u32) -> u32 {
    RECORD_HEADER + len.next_multiple_of(8)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::{super::memory::heap::Heap, *};

    fn geometry() -> Geometry {
        Geometry {
            base: 0,
            capacity: 64,
            mode: Mode::Messages { max_len: 56 },
            cookie: 7,
            generation: 1,
        }
    }

    #[test]
    fn a_formatted_ring_checks_and_each_changed_header_word_is_named() {
        let memory = Heap::new(CONTROL_BYTES, CONTROL_BYTES + 64);
        geometry().format(&memory).unwrap();
        geometry().check(&memory).unwrap();
        for (at, field) in [
            (0, "magic"),
            (8, "cookie"),
            (16, "version and mode"),
            (24, "capacity"),
            (32, "longest message"),
        ] {
            geometry().format(&memory).unwrap();
            memory.store(at, 99, Ordering::Relaxed);
            assert_eq!(
                geometry().check(&memory),
                Err(RingError::PeerMisbehaved { field, value: 99 })
            );
        }
    }

    #[test]
    fn a_shape_that_cannot_be_is_refused_by_field() {
        let refused = |geometry: Geometry| match geometry.validate(CONTROL_BYTES + 64) {
            Err(RingError::Geometry { field, .. }) => field,
            other => panic!("{other:?}"),
        };
        assert_eq!(
            refused(Geometry {
                capacity: 48,
                ..geometry()
            }),
            "capacity"
        );
        assert_eq!(
            refused(Geometry {
                capacity: 8,
                ..geometry()
            }),
            "capacity"
        );
        assert_eq!(
            refused(Geometry {
                capacity: 0,
                ..geometry()
            }),
            "capacity"
        );
        assert_eq!(
            refused(Geometry {
                capacity: 1 << 31,
                ..geometry()
            }),
            "capacity"
        );
        assert_eq!(
            refused(Geometry {
                mode: Mode::Messages { max_len: 57 },
                ..geometry()
            }),
            "max_len"
        );
        assert_eq!(
            refused(Geometry {
                mode: Mode::Messages { max_len: u32::MAX },
                ..geometry()
            }),
            "max_len"
        );
        assert_eq!(
            refused(Geometry {
                base: 64,
                ..geometry()
            }),
            "base"
        );
        assert_eq!(
            refused(Geometry {
                base: 128,
                ..geometry()
            }),
            "base"
        );
        assert_eq!(
            refused(Geometry {
                base: usize::MAX - 127,
                ..geometry()
            }),
            "base"
        );
    }
}
