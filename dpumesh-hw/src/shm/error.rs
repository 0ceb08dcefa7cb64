//! What can go wrong with shared memory, one name for each cause.

use std::io;

use crate::ring::{InFlight, RingError};

/// Why shared memory or a channel over it refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ShmError {
    /// The ring refused; [`RingError::PeerMisbehaved`] poisons the channel for ever.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// The peer's socket is closed: it exited, died, or dropped the channel.
    #[error("the peer is gone; {} messages ({} octets) it had not taken", in_flight.messages, in_flight.bytes)]
    PeerGone {
        /// What we had put in and it had not taken.
        in_flight: InFlight,
    },
    /// The peer restarted the channel; said once, later calls work on the new generation.
    #[error("the peer reset the channel to generation {generation}; {} messages lost", lost.messages)]
    Reset {
        /// The generation in force now.
        generation: u32,
        /// What we had put in and it had not taken.
        lost: InFlight,
    },
    /// The two ends share no version.
    #[error("no common version: ours {}..={}, the peer's {}..={}", ours.0, ours.1, theirs.0, theirs.1)]
    WrongVersion {
        /// Lowest and highest version we speak.
        ours: (u16, u16),
        /// Lowest and highest version the peer speaks.
        theirs: (u16, u16),
    },
    /// A message of the handshake has the wrong length.
    #[error("{what} has {got} octets, expected {expected}")]
    Truncated {
        /// The message.
        what: &'static str,
        /// Octets received.
        got: usize,
        /// Octets it must have.
        expected: usize,
    },
    /// A field of a message has a value it cannot have.
    #[error("{what}: {field} is {value:#x}")]
    Malformed {
        /// The message.
        what: &'static str,
        /// The field.
        field: &'static str,
        /// What was read.
        value: u64,
    },
    /// A message came with too few or too many descriptors.
    #[error("{what} came with {got} descriptors, expected {expected}")]
    WrongDescriptors {
        /// The message.
        what: &'static str,
        /// Descriptors received.
        got: usize,
        /// Descriptors it must carry.
        expected: usize,
    },
    /// The descriptor is not what it was announced to be.
    #[error("descriptor is no {expected}: {reason}")]
    WrongKind {
        /// What it should be.
        expected: &'static str,
        /// How it shows.
        reason: &'static str,
    },
    /// The region could still change its size under us.
    #[error("region is not sealed: missing {missing}")]
    NotSealed {
        /// The seals it lacks.
        missing: String,
    },
    /// The region's size differs from what was announced.
    #[error("region has {actual} octets, announced were {announced}")]
    WrongSize {
        /// Octets the descriptor has.
        actual: u64,
        /// Octets the peer announced, or the layout needs.
        announced: u64,
    },
    /// What was asked for exceeds a limit of one side.
    #[error("{field} {value} exceeds the {whose} limit of {limit}")]
    OverLimit {
        /// What was asked for.
        field: &'static str,
        /// How much.
        value: u64,
        /// Whose limit: "own" or "peer's".
        whose: &'static str,
        /// The limit.
        limit: u64,
    },
    /// This end does not offer the mode.
    #[error("mode {0} is not on offer")]
    NotOffered(&'static str),
    /// The peer refused us and said why.
    #[error("the peer refused: {0}")]
    Refused(Refusal),
    /// The peer closed the socket in the middle of the handshake; what it owed us.
    #[error("the peer closed the socket: no {0}")]
    Closed(&'static str),
    /// The peer did not answer in time.
    #[error("no {0} in time")]
    Timeout(&'static str),
    /// The operating system refused.
    #[error("{operation}: {source}")]
    Os {
        /// What was tried.
        operation: &'static str,
        /// Its answer.
        source: io::Error,
    },
}

impl ShmError {
    /// Whether the peer broke the rules, as opposed to being gone, slow, or of another version.
    pub fn is_misbehaviour(&self) -> bool {
        matches!(
            self,
            Self::Ring(RingError::PeerMisbehaved { .. })
                | Self::Truncated { .. }
                | Self::Malformed { .. }
                | Self::WrongDescriptors { .. }
                | Self::WrongKind { .. }
                | Self::NotSealed { .. }
                | Self::WrongSize { .. }
        )
    }

    /// Names the operation an error number came from.
    pub(crate) fn os<E: Into<io::Error>>(operation: &'static str) -> impl Fn(E) -> Self {
        move |source| Self::Os {
            operation,
            source: source.into(),
        }
    }
}

/// Why a peer refused a connection, as it travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[repr(u32)]
pub enum Refusal {
    /// No common version.
    #[error("no common version")]
    Version = 1,
    /// The offer exceeds its limits.
    #[error("the offer exceeds its limits")]
    Limits = 2,
    /// The region is not sealed, of the wrong size or of the wrong kind.
    #[error("the region is not acceptable")]
    Region = 3,
    /// Descriptors are missing, too many or of the wrong kind.
    #[error("the descriptors are not acceptable")]
    Descriptors = 4,
    /// A message could not be understood.
    #[error("a message could not be understood")]
    Malformed = 5,
    /// Anything else.
    #[error("a reason of its own")]
    Other = 6,
    /// It holds as many channels as it may.
    #[error("all its channels are in use")]
    Full = 7,
    /// It does not offer the mode.
    #[error("the mode is not on offer")]
    Mode = 8,
}

impl Refusal {
    /// The refusal a code stands for; codes of later versions are [`Refusal::Other`].
    pub(crate) fn from_code(code: u32) -> Self {
        match code {
            1 => Self::Version,
            2 => Self::Limits,
            3 => Self::Region,
            4 => Self::Descriptors,
            5 => Self::Malformed,
            7 => Self::Full,
            8 => Self::Mode,
            _ => Self::Other,
        }
    }
}

impl From<&ShmError> for Refusal {
    fn from(error: &ShmError) -> Self {
        match error {
            ShmError::WrongVersion { .. } => Self::Version,
            ShmError::OverLimit { .. } => Self::Limits,
            ShmError::NotOffered(_) => Self::Mode,
            ShmError::NotSealed { .. } | ShmError::WrongSize { .. } => Self::Region,
            ShmError::WrongKind { expected, .. } if *expected == super::region::KIND => Self::Region,
            ShmError::WrongDescriptors { .. } | ShmError::WrongKind { .. } => Self::Descriptors,
            ShmError::Truncated { .. } | ShmError::Malformed { .. } | ShmError::Ring(_) => Self::Malformed,
            _ => Self::Other,
        }
    }
}
