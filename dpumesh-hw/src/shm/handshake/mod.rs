//! How two processes come to share two rings, over a connected seqpacket socket:
//!
//! ```text
//! offering end                              answering end
//! Hello{versions, limits}   ─────────────►
//!                           ◄─────────────  Hello{versions, limits}
//! Offer{version, mode, sizes, cookie}
//!   + region, bell, bell    ─────────────►  checks the descriptors, maps, compares the headers
//!                           ◄─────────────  Ready{cookie}         or Refuse{reason} from either end
//! later, either end:  Reset{generation}  and its answer  ResetDone{generation}
//! ```
//! The version is the highest both speak. Each message is [`MESSAGE_BYTES`] long, little-endian, unused octets zero: an
//! unknown one is seen as such and never half-read. The offering end pays for the memory; the answering end bounds it.
//!
//! # Layout of the region
//! Ring from the offering to the answering end at 0, ring back at the next multiple of 128 octets. The first bell wakes
//! the offering end, the second the answering one.

mod message;
#[cfg(test)]
mod tests;

use std::{
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use message::Plan;
pub(crate) use message::{Kind, Message};

use super::{Region, ShmError, doorbell::Doorbell, sealed_memory, socket::Socket};
use crate::ring::{Consumer, Geometry, Mode, Producer};

/// Length of every message, in octets.
pub const MESSAGE_BYTES: usize = 64;
/// Lowest and highest version this code speaks.
pub const VERSIONS: (u16, u16) = (1, 1);

const FIRST_GENERATION: u32 = 1;
const REGIONS: u32 = 1;
const RINGS: u32 = 2;
/// Region, bell of the offering end, bell of the answering end.
const DESCRIPTORS: usize = 3;

/// What the offering end wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// What the channel carries, both ways.
    pub mode: Mode,
    /// Octets of data in each direction's ring, a power of two.
    pub ring_bytes: u32,
    /// What this end accepts.
    pub limits: Limits,
    /// How long the whole set-up may take.
    pub timeout: Duration,
}

impl Default for Options {
    /// Messages up to 64 KiB, 1 MiB each way, two seconds to connect.
    fn default() -> Self {
        Self {
            mode: Mode::Messages { max_len: 1 << 16 },
            ring_bytes: 1 << 20,
            limits: Limits::default(),
            timeout: Duration::from_secs(2),
        }
    }
}

/// The most an end accepts, told to the peer in its hello.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Octets of data in one ring.
    pub max_ring_bytes: u32,
    /// Octets of one message.
    pub max_message: u32,
    /// Message mode. Not told in the hello: an offer is refused for it.
    pub messages: bool,
    /// Stream mode, likewise.
    pub streams: bool,
}

impl Default for Limits {
    /// 64 MiB a ring, 16 MiB a message, both modes.
    fn default() -> Self {
        Self {
            max_ring_bytes: 64 << 20,
            max_message: 16 << 20,
            messages: true,
            streams: true,
        }
    }
}

impl Limits {
    fn admit(&self, whose: &'static str, mode: Mode, ring_bytes: u32) -> Result<(), ShmError> {
        let (offered, longest) = match mode {
            Mode::Messages { max_len } => (self.messages, max_len),
            Mode::Stream => (self.streams, 0),
        };
        if !offered {
            return Err(ShmError::NotOffered(mode.name()));
        }
        let over = |field, value: u32, limit: u32| ShmError::OverLimit {
            field,
            value: value.into(),
            whose,
            limit: limit.into(),
        };
        if ring_bytes > self.max_ring_bytes {
            return Err(over("ring size", ring_bytes, self.max_ring_bytes));
        }
        if longest > self.max_message {
            return Err(over("message length", longest, self.max_message));
        }
        Ok(())
    }
}

/// Everything one end of a channel holds once both agree.
#[derive(Debug)]
pub(crate) struct Agreed {
    pub(crate) socket: Socket,
    pub(crate) tx: Producer<Region>,
    pub(crate) rx: Consumer<Region>,
    /// Wakes us.
    pub(crate) own_bell: Doorbell,
    /// Wakes the peer.
    pub(crate) peer_bell: Doorbell,
    pub(crate) generation: u32,
}

/// Offers a channel over `socket`.
pub(crate) fn offer(socket: Socket, options: &Options) -> Result<Agreed, ShmError> {
    let deadline = Instant::now() + options.timeout;
    options.limits.admit("own", options.mode, options.ring_bytes)?;
    let outcome = make_offer(&socket, options, deadline);
    refuse_on_error(&socket, outcome).map(|ready| ready.agree(socket))
}

/// Answers an offer that comes over `socket`.
pub(crate) fn answer(socket: Socket, limits: &Limits, timeout: Duration) -> Result<Agreed, ShmError> {
    let outcome = take_offer(&socket, limits, Instant::now() + timeout);
    let ready = refuse_on_error(&socket, outcome)?;
    Ok(ready.agree(socket))
}

fn make_offer(socket: &Socket, options: &Options, deadline: Instant) -> Result<Ends, ShmError> {
    match Message::hello(&options.limits).send(socket, &[]) {
        // Sent away at the door: the reason is there to be read.
        Ok(()) | Err(ShmError::Closed(_)) => {}
        Err(error) => return Err(error),
    }
    let (version, theirs) = greet(socket, deadline)?;
    theirs.admit("peer's", options.mode, options.ring_bytes)?;

    let plan = Plan::draw(options.mode, options.ring_bytes);
    let memory = sealed_memory("dpumesh-channel", plan.region_bytes())?;
    let region = Region::map(&memory, plan.region_bytes())?;
    for geometry in plan.rings() {
        geometry.format(&region)?;
    }
    let (own_bell, peer_bell) = (Doorbell::new()?, Doorbell::new()?);
    let descriptors = [memory.as_fd(), own_bell.as_fd(), peer_bell.as_fd()];
    Message::offer(version, &plan).send(socket, &descriptors)?;

    let (ready, _) = Message::expect(socket, "ready", deadline)?;
    ready.require_kind(Kind::Ready)?;
    ready.require("cookie", 16, plan.cookie)?;
    let [there, back] = plan.rings();
    Ends::attach(region, there, back, own_bell, peer_bell)
}

fn take_offer(socket: &Socket, limits: &Limits, deadline: Instant) -> Result<Ends, ShmError> {
    Message::hello(limits).send(socket, &[])?;
    let (version, _) = greet(socket, deadline)?;
    let (offer, descriptors) = Message::expect(socket, "offer", deadline)?;
    offer.require_kind(Kind::Offer)?;
    offer.require("version", 16, u64::from(version))?;
    let plan = offer.plan()?;
    limits.admit("own", plan.mode, plan.ring_bytes)?;
    let got = descriptors.len();
    let Ok([memory, peer_bell, own_bell]) = <[OwnedFd; DESCRIPTORS]>::try_from(descriptors) else {
        return Err(ShmError::WrongDescriptors {
            what: "offer",
            got,
            expected: DESCRIPTORS,
        });
    };
    let region = Region::map(memory, plan.region_bytes())?;
    let (own_bell, peer_bell) = (Doorbell::adopt(own_bell)?, Doorbell::adopt(peer_bell)?);
    let [there, back] = plan.rings();
    let ends = Ends::attach(region, back, there, own_bell, peer_bell)?;
    Message::ready(plan.cookie).send(socket, &[])?;
    Ok(ends)
}

/// Takes the peer's hello; the common version and the peer's limits.
fn greet(socket: &Socket, deadline: Instant) -> Result<(u16, Limits), ShmError> {
    let (hello, _) = Message::expect(socket, "hello", deadline)?;
    hello.require_kind(Kind::Hello)?;
    let theirs = (hello.u16_at(16), hello.u16_at(18));
    let version = VERSIONS.1.min(theirs.1);
    if theirs.0 > theirs.1 || version < VERSIONS.0.max(theirs.0) {
        return Err(ShmError::WrongVersion {
            ours: VERSIONS,
            theirs,
        });
    }
    for (field, at, need) in [("regions", 20, REGIONS), ("rings", 24, RINGS)] {
        let limit = hello.u32_at(at);
        if limit < need {
            return Err(ShmError::OverLimit {
                field,
                value: need.into(),
                whose: "peer's",
                limit: limit.into(),
            });
        }
    }
    Ok((
        version,
        Limits {
            max_ring_bytes: hello.u32_at(28),
            max_message: hello.u32_at(32),
            ..Limits::default()
        },
    ))
}

/// Tells the peer why, as well as a closing socket allows; the error is what the caller gets.
fn refuse_on_error<T>(socket: &Socket, outcome: Result<T, ShmError>) -> Result<T, ShmError> {
    if let Err(error) = &outcome
        && !matches!(error, ShmError::Refused(_) | ShmError::Closed(_))
    {
        let told = Message::refuse(error.into()).send(socket, &[]);
        if let Err(failure) = told {
            tracing::debug!(%error, %failure, "the peer could not be told why it was refused");
        }
    }
    outcome
}

/// Rings and bells, before they get their socket.
struct Ends {
    tx: Producer<Region>,
    rx: Consumer<Region>,
    own_bell: Doorbell,
    peer_bell: Doorbell,
}

impl Ends {
    fn attach(
        region: Region,
        tx: Geometry,
        rx: Geometry,
        own_bell: Doorbell,
        peer_bell: Doorbell,
    ) -> Result<Self, ShmError> {
        let region = Arc::new(region);
        let tx = Producer::attach(Arc::clone(&region), tx)?;
        let rx = Consumer::attach(region, rx)?;
        Ok(Self {
            tx,
            rx,
            own_bell,
            peer_bell,
        })
    }

    fn agree(self, socket: Socket) -> Agreed {
        let Self {
            tx,
            rx,
            own_bell,
            peer_bell,
        } = self;
        Agreed {
            socket,
            tx,
            rx,
            own_bell,
            peer_bell,
            generation: FIRST_GENERATION,
        }
    }
}
