//! [`ShmTransport`]: message and stream channels over shared memory, between two processes that do not trust each other.
//!
//! A channel is a pair of single-producer single-consumer rings in one sealed region, and a descriptor to sleep on for each
//! side. Setting one up is async; using it is synchronous, takes slices, returns counts and never blocks.
//!
//! # The peer
//! may be slow, dead or hostile. Nothing it writes can make this side read outside the region, loop without end or
//! panic: what it lies about becomes `PeerMisbehaved`, and the channel is closed for good. Its death is seen at the
//! socket that set the channel up, never guessed from silence.

use std::fmt;
use std::os::fd::BorrowedFd;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::error::Result;

/// Shared-memory channels of one card (or of one machine).
#[async_trait]
pub trait ShmTransport: Send + Sync + fmt::Debug {
    /// Offers channels under a name. Dropping the listener ends the offer; channels already made live on.
    ///
    /// Cancelling offers nothing.
    ///
    /// # Errors
    /// `Exists` (name in use by a living process), `Invalid` (name), `CapacityExceeded`, `Denied`, `Io`.
    async fn listen(&self, name: &ChannelName) -> Result<Box<dyn ShmListener>>;

    /// Connects to a listener. The connecting side makes the region and owns its size.
    ///
    /// Completes after the versioned hello went both ways. Cancelling leaves no memory behind.
    ///
    /// # Errors
    /// `NotFound` (nobody listens), `Unsupported` (no common version or mode), `Invalid` (sizes),
    /// `CapacityExceeded` (channels), `PeerMisbehaved`, `Timeout`, `Io`.
    async fn connect(&self, name: &ChannelName, config: &ChannelConfig) -> Result<Box<dyn ShmChannel>>;
}

/// An offer of channels.
#[async_trait]
pub trait ShmListener: Send + fmt::Debug {
    /// Waits for the next peer and checks its hello; a peer that fails it is refused and the wait goes on.
    ///
    /// Cancelling loses no peer that was not yet accepted.
    ///
    /// # Errors
    /// `Io`, when the offer itself has failed.
    async fn accept(&mut self) -> Result<Box<dyn ShmChannel>>;
}

/// One end of a channel. Owned by one thread at a time; sends and receives independently.
pub trait ShmChannel: Send + fmt::Debug {
    /// What was agreed.
    fn config(&self) -> ChannelConfig;

    /// Sends, in order, as much as fits, and returns how much.
    ///
    /// Message mode: whole messages; the count is of messages. Stream mode: octets of the concatenated slices; the
    /// count is of octets. One notification at most per call, and none while the peer is awake.
    ///
    /// # Errors
    /// `Invalid` (message longer than [`ChannelConfig::max_message`]; those before it were sent), `PeerMisbehaved`,
    /// `DeviceLost` (peer is gone).
    fn send(&mut self, slices: &[&[u8]]) -> Result<usize>;

    /// Writes one message (or a run of octets) of exactly `len` octets straight into the ring; false, and nothing
    /// sent, when there is no room.
    ///
    /// `fill` is called once with a writer over the reserved room; octets it leaves unwritten are unspecified. The
    /// writer copies: the memory is the peer's as well, so it is never lent out as a slice.
    ///
    /// # Errors
    /// As [`ShmChannel::send`].
    fn send_with(&mut self, len: usize, fill: &mut dyn FnMut(&mut dyn SharedWriter)) -> Result<bool>;

    /// Receives into `buffer`: one message, or as many octets as there are; `None` when nothing waits.
    ///
    /// # Errors
    /// `Invalid` (message longer than the buffer; it stays), `PeerMisbehaved`, `DeviceLost` (peer is gone and
    /// everything it sent was received).
    fn receive(&mut self, buffer: &mut [u8]) -> Result<Option<usize>>;

    /// Asks for a notification of the next message or room, then looks again: false when there is something to do
    /// already and the caller must not sleep.
    ///
    /// # Errors
    /// `PeerMisbehaved`, `Io`.
    fn arm(&mut self) -> Result<bool>;

    /// Descriptor that polls readable after [`ShmChannel::arm`] when there is something to do or the peer is gone.
    fn poll_fd(&self) -> BorrowedFd<'_>;

    /// Whether the peer lives, and what it has not taken yet.
    fn peer(&self) -> PeerState;
}

/// Writes into a reserved piece of shared memory, front to back.
pub trait SharedWriter {
    /// Copies octets in and returns how many fitted.
    fn write(&mut self, octets: &[u8]) -> usize;

    /// Octets still free.
    fn remaining(&self) -> usize;
}

/// Name of a listener: 1 to 64 of `a-z A-Z 0-9 . _ -`, not starting with a dot.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct ChannelName(String);

impl ChannelName {
    /// The name as text; safe as a file name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for ChannelName {
    type Error = crate::addr::InvalidValue;

    fn try_from(name: String) -> Result<Self, Self::Error> {
        let valid = (1..=64).contains(&name.len())
            && !name.starts_with('.')
            && name
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
        if valid {
            return Ok(Self(name));
        }
        Err(crate::addr::InvalidValue::new(
            "channel name",
            name,
            "1 to 64 of a-z A-Z 0-9 . _ -, not starting with a dot",
        ))
    }
}

impl From<ChannelName> for String {
    fn from(name: ChannelName) -> Self {
        name.0
    }
}

/// Shape of a channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChannelConfig {
    /// Messages or a stream.
    pub mode: ChannelMode,
    /// Octets of the ring of each direction; rounded up to a power of two.
    pub ring: u32,
    /// Longest message in octets; at most half the ring. Not looked at in stream mode.
    pub max_message: u32,
}

impl Default for ChannelConfig {
    /// Messages of up to 64 KiB in rings of 1 MiB.
    fn default() -> Self {
        Self {
            mode: ChannelMode::Messages,
            ring: 1 << 20,
            max_message: 1 << 16,
        }
    }
}

/// What a channel carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ChannelMode {
    /// Records with boundaries.
    Messages,
    /// Octets without.
    Stream,
}

/// State of a channel's peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerState {
    /// The peer's process holds the channel.
    pub alive: bool,
    /// Octets sent that the peer has not taken.
    pub in_flight: u64,
}
