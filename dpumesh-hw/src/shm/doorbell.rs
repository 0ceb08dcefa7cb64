//! The doorbell: an eventfd that one side writes and the other watches. It is rung only for a peer that asked
//! ([`Producer::must_notify`](crate::ring::Producer::must_notify)), so under load it is silent.
//!
//! The watching side never reads it: edge-triggered, each ring is an edge, and a read could be made to block by a peer
//! that shares the open file and clears `O_NONBLOCK`. The ringing side checks that flag before it writes. A peer that
//! fills the counter *and* clears the flag in the instant between check and write can still hold the writer: who gives
//! a process a channel trusts it that far, or runs that channel on a thread of its own.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl, readlink},
    sys::eventfd::{EfdFlags, EventFd},
    unistd::write,
};

use super::ShmError;
use crate::ring::RingError;

/// What errors call its descriptor.
const KIND: &str = "non-blocking eventfd";

/// One direction's doorbell.
#[derive(Debug)]
pub struct Doorbell {
    fd: OwnedFd,
}

impl Doorbell {
    /// Makes a silent one.
    ///
    /// # Errors
    /// [`ShmError::Os`].
    pub fn new() -> Result<Self, ShmError> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let event = EventFd::from_value_and_flags(0, flags).map_err(ShmError::os("eventfd"))?;
        Ok(Self { fd: event.into() })
    }

    /// Takes a received descriptor for a doorbell.
    ///
    /// # Errors
    /// [`ShmError::WrongKind`] when it is none, or would block.
    pub fn adopt(fd: OwnedFd) -> Result<Self, ShmError> {
        let wrong = |reason| {
            Err(ShmError::WrongKind {
                expected: KIND,
                reason,
            })
        };
        let link = readlink(format!("/proc/self/fd/{}", fd.as_raw_fd()).as_str())
            .map_err(ShmError::os("readlink"))?;
        if link != "anon_inode:[eventfd]" {
            return wrong("it is another kind of file");
        }
        let bell = Self { fd };
        if !bell.never_blocks()? {
            return wrong("it blocks");
        }
        Ok(bell)
    }

    /// Wakes the peer. A counter that is full has woken it already.
    ///
    /// # Errors
    /// [`RingError::PeerMisbehaved`] when the peer has made it blocking, [`ShmError::Os`].
    pub fn ring(&self) -> Result<(), ShmError> {
        if !self.never_blocks()? {
            return Err(RingError::PeerMisbehaved {
                field: "doorbell flags",
                value: 0,
            }
            .into());
        }
        match write(&self.fd, &1u64.to_ne_bytes()) {
            Ok(_) | Err(Errno::EAGAIN) => Ok(()),
            Err(error) => Err(ShmError::os("ring the doorbell")(error)),
        }
    }

    fn never_blocks(&self) -> Result<bool, ShmError> {
        let flags = fcntl(&self.fd, FcntlArg::F_GETFL).map_err(ShmError::os("F_GETFL"))?;
        Ok(OFlag::from_bits_retain(flags).contains(OFlag::O_NONBLOCK))
    }
}

impl AsFd for Doorbell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::eventfd::EventFd;

    use super::*;

    #[test]
    fn a_descriptor_that_is_no_doorbell_is_refused() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(matches!(
            Doorbell::adopt(file.into()),
            Err(ShmError::WrongKind { .. })
        ));
        let blocking = EventFd::from_value_and_flags(0, EfdFlags::empty()).unwrap();
        assert!(matches!(
            Doorbell::adopt(blocking.into()),
            Err(ShmError::WrongKind {
                reason: "it blocks",
                ..
            })
        ));
    }

    #[test]
    fn a_full_counter_is_a_rung_bell_and_a_blocking_one_a_lie() {
        let bell = Doorbell::new().unwrap();
        write(&bell.fd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        bell.ring().unwrap();
        fcntl(&bell.fd, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
        assert!(bell.ring().unwrap_err().is_misbehaviour());
    }
}
