//! One end of a channel, as the contract has it.

use std::{
    cell::RefCell,
    os::fd::{AsRawFd, BorrowedFd, RawFd},
};

use dpumesh_core::{
    Effect, Error, ErrorKind, Result,
    transport::{ChannelConfig, ChannelMode, PeerState, SharedWriter, ShmChannel},
};
use tokio::sync::OwnedSemaphorePermit;

use super::{
    super::{Channel, Interest, Region, ShmError},
    failed,
};
use crate::ring::{Mode, Reservation, RingError};

/// A [`Channel`] and its place among those of its transport.
#[derive(Debug)]
pub(super) struct End {
    /// Exclusive calls go around the cell; only [`ShmChannel::peer`] looks through a shared reference.
    channel: RefCell<Channel>,
    descriptor: RawFd,
    config: ChannelConfig,
    /// Octets that found no room, until they do: what [`ShmChannel::arm`] waits for.
    starved: Option<usize>,
    /// The peer emptied the rings, which the contract does not know: nothing can be relied on after that.
    ended: bool,
    _seat: OwnedSemaphorePermit,
}

impl End {
    pub(super) fn new(channel: Channel, seat: OwnedSemaphorePermit) -> Self {
        let (mode, max_message) = match channel.mode() {
            Mode::Messages { max_len } => (ChannelMode::Messages, max_len),
            Mode::Stream => (ChannelMode::Stream, 0),
        };
        let config = ChannelConfig {
            mode,
            ring: channel.ring_bytes(),
            max_message,
        };
        Self {
            descriptor: channel.fd().as_raw_fd(),
            channel: RefCell::new(channel),
            config,
            starved: None,
            ended: false,
            _seat: seat,
        }
    }

    fn open(&mut self, operation: &'static str) -> Result<&mut Channel> {
        if self.ended {
            let message = "the peer reset the channel, which ended it";
            return Err(Error::new(ErrorKind::PeerMisbehaved, operation, message));
        }
        Ok(self.channel.get_mut())
    }

    fn judge<T>(&mut self, operation: &'static str, outcome: Result<T, ShmError>) -> Result<T> {
        outcome.map_err(|error| {
            self.ended |= matches!(error, ShmError::Reset { .. });
            failed(operation, error)
        })
    }

    fn send_messages(&mut self, messages: &[&[u8]]) -> Result<usize> {
        const OPERATION: &str = "transport.send";
        let outcome = self.open(OPERATION)?.send(messages);
        let count = match outcome {
            Err(ShmError::Ring(RingError::MessageTooLong { .. })) => 0,
            outcome => self.judge(OPERATION, outcome)?,
        };
        self.starved = None;
        let longest = self.config.max_message as usize;
        match messages.get(count) {
            Some(message) if message.len() > longest => {
                let effect = if count > 0 { Effect::Partial } else { Effect::None };
                let text = format!("{} octets, agreed were at most {longest}", message.len());
                Err(Error::new(ErrorKind::Invalid, OPERATION, text)
                    .index(count)
                    .effect(effect))
            }
            Some(message) => {
                self.starved = Some(message.len());
                Ok(count)
            }
            None => Ok(count),
        }
    }

    fn send_octets(&mut self, parts: &[&[u8]]) -> Result<usize> {
        const OPERATION: &str = "transport.send";
        let outcome = self.open(OPERATION)?.write(parts);
        let count = self.judge(OPERATION, outcome)?;
        let wanted = parts.iter().map(|part| part.len()).fold(0, usize::saturating_add);
        self.starved = (count < wanted).then_some(1);
        Ok(count)
    }
}

impl ShmChannel for End {
    fn config(&self) -> ChannelConfig {
        self.config
    }

    fn send(&mut self, slices: &[&[u8]]) -> Result<usize> {
        match self.config.mode {
            ChannelMode::Messages => self.send_messages(slices),
            ChannelMode::Stream => self.send_octets(slices),
        }
    }

    fn send_with(&mut self, len: usize, fill: &mut dyn FnMut(&mut dyn SharedWriter)) -> Result<bool> {
        const OPERATION: &str = "transport.send_with";
        let outcome = self.open(OPERATION)?.send_in_place(len, |room| {
            fill(&mut Writer { room, written: 0 });
        });
        let fits = self.judge(OPERATION, outcome)?;
        self.starved = (!fits).then_some(len);
        Ok(fits)
    }

    fn receive(&mut self, buffer: &mut [u8]) -> Result<Option<usize>> {
        const OPERATION: &str = "transport.receive";
        let mode = self.config.mode;
        let channel = self.open(OPERATION)?;
        let mut length = [0];
        let outcome = match mode {
            ChannelMode::Messages => channel.recv_packed(buffer, &mut length),
            ChannelMode::Stream => channel.read(buffer).inspect(|count| length = [*count]),
        };
        let count = self.judge(OPERATION, outcome)?;
        Ok((count > 0).then_some(length[0]))
    }

    fn arm(&mut self) -> Result<bool> {
        const OPERATION: &str = "transport.arm";
        let writable = self.starved;
        let wanted = Interest {
            readable: true,
            writable,
        };
        let outcome = self.open(OPERATION)?.want_notify(wanted);
        let asleep = self.judge(OPERATION, outcome)?;
        if !asleep && writable.is_some() {
            // Room is told once: who has nothing to send any more shall sleep the next time.
            let room = Interest {
                readable: false,
                writable,
            };
            let outcome = self.open(OPERATION)?.want_notify(room);
            if !self.judge(OPERATION, outcome)? {
                self.starved = None;
            }
        }
        Ok(asleep)
    }

    fn poll_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: it is the descriptor of `self.channel`, which keeps it open for as long as `self` is borrowed and is
        // never replaced.
        unsafe { BorrowedFd::borrow_raw(self.descriptor) }
    }

    /// A peer that misbehaved counts as gone, with nothing in flight.
    fn peer(&self) -> PeerState {
        let mut channel = self.channel.borrow_mut();
        let alive = !self.ended && channel.is_peer_alive().unwrap_or(false);
        let in_flight = channel.in_flight().map_or(0, |waiting| waiting.bytes);
        PeerState { alive, in_flight }
    }
}

/// Front to back into reserved room.
struct Writer<'a, 'r> {
    room: &'a mut Reservation<'r, Region>,
    written: usize,
}

impl SharedWriter for Writer<'_, '_> {
    fn write(&mut self, octets: &[u8]) -> usize {
        let count = octets.len().min(self.remaining());
        match self.room.write_at(self.written, &octets[..count]) {
            Ok(()) => {
                self.written += count;
                count
            }
            Err(_) => 0, // cannot be: `count` octets are left
        }
    }

    fn remaining(&self) -> usize {
        self.room.len() - self.written
    }
}
