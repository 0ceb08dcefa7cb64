//! The messages as octets: fixed length, little-endian, checked field by field. Read by the
//! [handshake](super) and, for resets, by an open [`Channel`](crate::shm::Channel).

use std::{
    hash::{BuildHasher, RandomState},
    os::fd::{BorrowedFd, OwnedFd},
    time::Instant,
};

use super::{
    super::{Refusal, ShmError, region::page, socket::Socket},
    FIRST_GENERATION, Limits, MESSAGE_BYTES, REGIONS, RINGS, VERSIONS,
};
use crate::ring::{Geometry, Mode};

const MAGIC: u64 = u64::from_le_bytes(*b"dpumshm\0");

/// What an offer says about the region.
pub(super) struct Plan {
    pub(super) mode: Mode,
    pub(super) ring_bytes: u32,
    pub(super) cookie: u64,
}

impl Plan {
    /// A plan with a cookie nobody can guess, so that a region of another connection does not pass for this one's.
    pub(super) fn draw(mode: Mode, ring_bytes: u32) -> Self {
        Self {
            mode,
            ring_bytes,
            cookie: RandomState::new().hash_one(MAGIC),
        }
    }

    /// From the offering to the answering end, and back.
    pub(super) fn rings(&self) -> [Geometry; 2] {
        let ring = |base| Geometry {
            base,
            capacity: self.ring_bytes,
            mode: self.mode,
            cookie: self.cookie,
            generation: FIRST_GENERATION,
        };
        [ring(0), ring(self.stride())]
    }

    pub(super) fn region_bytes(&self) -> usize {
        (2 * self.stride()).next_multiple_of(page())
    }

    fn stride(&self) -> usize {
        Geometry::footprint(self.ring_bytes).next_multiple_of(128)
    }
}

/// What a message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Kind {
    Hello = 1,
    Offer = 2,
    Ready = 3,
    Refuse = 4,
    Reset = 5,
    ResetDone = 6,
}

impl Kind {
    const ALL: [Self; 6] = [
        Self::Hello,
        Self::Offer,
        Self::Ready,
        Self::Refuse,
        Self::Reset,
        Self::ResetDone,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Hello => "hello",
            Self::Offer => "offer",
            Self::Ready => "ready",
            Self::Refuse => "refuse",
            Self::Reset => "reset",
            Self::ResetDone => "reset done",
        }
    }
}

/// One message: magic at 0, kind at 8, fields from 16 on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Message {
    pub(super) octets: [u8; MESSAGE_BYTES],
}

impl Message {
    fn new(kind: Kind) -> Self {
        let mut message = Self {
            octets: [0; MESSAGE_BYTES],
        };
        message.put(0, &MAGIC.to_le_bytes());
        message.put(8, &(kind as u32).to_le_bytes());
        message
    }

    pub(super) fn hello(limits: &Limits) -> Self {
        let mut message = Self::new(Kind::Hello);
        message.put(16, &VERSIONS.0.to_le_bytes());
        message.put(18, &VERSIONS.1.to_le_bytes());
        message.put(20, &REGIONS.to_le_bytes());
        message.put(24, &RINGS.to_le_bytes());
        message.put(28, &limits.max_ring_bytes.to_le_bytes());
        message.put(32, &limits.max_message.to_le_bytes());
        message
    }

    pub(super) fn offer(version: u16, plan: &Plan) -> Self {
        let (mode, max_len) = match plan.mode {
            Mode::Messages { max_len } => (1u32, max_len),
            Mode::Stream => (2, 0),
        };
        let mut message = Self::new(Kind::Offer);
        message.put(16, &u64::from(version).to_le_bytes());
        message.put(24, &plan.cookie.to_le_bytes());
        message.put(32, &mode.to_le_bytes());
        message.put(36, &max_len.to_le_bytes());
        message.put(40, &plan.ring_bytes.to_le_bytes());
        message.put(48, &(plan.region_bytes() as u64).to_le_bytes());
        message
    }

    pub(super) fn ready(cookie: u64) -> Self {
        let mut message = Self::new(Kind::Ready);
        message.put(16, &cookie.to_le_bytes());
        message
    }

    pub(crate) fn refuse(reason: Refusal) -> Self {
        let mut message = Self::new(Kind::Refuse);
        message.put(16, &(reason as u32).to_le_bytes());
        message
    }

    /// [`Kind::Reset`] or its answer.
    pub(crate) fn reset(kind: Kind, generation: u32) -> Self {
        let mut message = Self::new(kind);
        message.put(16, &generation.to_le_bytes());
        message
    }

    /// What an offer announces: sizes that fit each other, or an error.
    pub(super) fn plan(&self) -> Result<Plan, ShmError> {
        let mode = match (self.u32_at(32), self.u32_at(36)) {
            (1, max_len) => Mode::Messages { max_len },
            (2, _) => Mode::Stream,
            (other, _) => return Err(self.malformed("mode", other.into())),
        };
        let plan = Plan {
            mode,
            ring_bytes: self.u32_at(40),
            cookie: self.u64_at(24),
        };
        let announced = self.u64_at(48);
        let actual = plan.region_bytes() as u64;
        if announced != actual {
            return Err(ShmError::WrongSize { actual, announced });
        }
        Ok(plan)
    }

    /// The generation of a reset.
    pub(crate) fn generation(&self) -> u32 {
        self.u32_at(16)
    }

    pub(crate) fn send(&self, socket: &Socket, descriptors: &[BorrowedFd<'_>]) -> Result<(), ShmError> {
        socket.send(&self.octets, descriptors)
    }

    /// Waits for a message; a refusal is an error of its own, and so are descriptors nobody announced.
    pub(super) fn expect(
        socket: &Socket,
        what: &'static str,
        deadline: Instant,
    ) -> Result<(Self, Vec<OwnedFd>), ShmError> {
        let mut octets = [0; MESSAGE_BYTES];
        let descriptors = socket.expect(what, &mut octets, deadline)?;
        let message = Self { octets };
        let kind = message.kind()?;
        if kind == Kind::Refuse {
            return Err(ShmError::Refused(Refusal::from_code(message.u32_at(16))));
        }
        if kind != Kind::Offer && !descriptors.is_empty() {
            let got = descriptors.len();
            return Err(ShmError::WrongDescriptors {
                what: kind.name(),
                got,
                expected: 0,
            });
        }
        Ok((message, descriptors))
    }

    /// Reads a message of an open channel.
    pub(crate) fn parse(octets: [u8; MESSAGE_BYTES]) -> Result<(Kind, Self), ShmError> {
        let message = Self { octets };
        Ok((message.kind()?, message))
    }

    fn kind(&self) -> Result<Kind, ShmError> {
        let malformed = |field, value| ShmError::Malformed {
            what: "message",
            field,
            value,
        };
        if self.u64_at(0) != MAGIC {
            return Err(malformed("magic", self.u64_at(0)));
        }
        let code = self.u32_at(8);
        Kind::ALL
            .into_iter()
            .find(|kind| *kind as u32 == code)
            .ok_or_else(|| malformed("kind", code.into()))
    }

    pub(super) fn require_kind(&self, kind: Kind) -> Result<(), ShmError> {
        if self.kind()? == kind {
            return Ok(());
        }
        Err(ShmError::Malformed {
            what: kind.name(),
            field: "kind",
            value: self.u32_at(8).into(),
        })
    }

    pub(super) fn require(&self, field: &'static str, at: usize, expected: u64) -> Result<(), ShmError> {
        let value = self.u64_at(at);
        if value == expected {
            Ok(())
        } else {
            Err(self.malformed(field, value))
        }
    }

    pub(super) fn malformed(&self, field: &'static str, value: u64) -> ShmError {
        let what = self.kind().map_or("message", Kind::name);
        ShmError::Malformed { what, field, value }
    }

    pub(super) fn put(&mut self, at: usize, field: &[u8]) {
        self.octets[at..at + field.len()].copy_from_slice(field);
    }

    fn field<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut field = [0; N];
        field.copy_from_slice(&self.octets[at..at + N]);
        field
    }

    pub(super) fn u16_at(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.field(at))
    }

    pub(super) fn u32_at(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.field(at))
    }

    fn u64_at(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.field(at))
    }
}
