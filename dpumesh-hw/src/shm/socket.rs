//! Messages of at most a given size, with descriptors, over `AF_UNIX`/`SOCK_SEQPACKET`: boundaries are kept, so a
//! message is whole or refused. No call blocks without a deadline.

use std::{
    io::IoSlice,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{
        AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, getsockopt, sendmsg, socketpair, sockopt,
    },
};

use super::ShmError;

/// Most descriptors the kernel passes in one message (`SCM_MAX_FD`). There is always room for all of them: the kernel
/// would install those that fit before saying that the rest did not.
const MOST_DESCRIPTORS: usize = 253;

/// A connected, non-blocking seqpacket socket.
#[derive(Debug)]
pub(crate) struct Socket {
    fd: OwnedFd,
}

/// What arrived.
#[derive(Debug)]
pub(crate) enum Received {
    /// A message of so many octets, and its descriptors. The length is the message's own, also where it was cut.
    Message(usize, Vec<OwnedFd>),
    /// Nothing for now.
    Nothing,
    /// The peer closed its end.
    Closed,
}

impl Socket {
    /// Takes a connected socket.
    pub(crate) fn adopt(fd: OwnedFd) -> Result<Self, ShmError> {
        let wrong = |reason| ShmError::WrongKind {
            expected: "connected unix seqpacket socket",
            reason,
        };
        match getsockopt(&fd, sockopt::SockType) {
            Ok(SockType::SeqPacket) => {}
            Ok(_) => return Err(wrong("it is a socket of another type")),
            Err(_) => return Err(wrong("it is no socket")),
        }
        let flags = nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_GETFL).map_err(ShmError::os("F_GETFL"))?;
        let flags = nix::fcntl::OFlag::from_bits_retain(flags) | nix::fcntl::OFlag::O_NONBLOCK;
        nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_SETFL(flags)).map_err(ShmError::os("F_SETFL"))?;
        Ok(Self { fd })
    }

    /// Sends one message whole. A peer that does not take its messages is [`ShmError::Os`] with `EAGAIN`, one that is
    /// gone [`ShmError::Closed`].
    pub(crate) fn send(&self, message: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<(), ShmError> {
        let raw: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &[][..] } else { &rights[..] };
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        match sendmsg::<()>(
            self.fd.as_raw_fd(),
            &[IoSlice::new(message)],
            control,
            flags,
            None,
        ) {
            Ok(_) => Ok(()),
            Err(Errno::EPIPE | Errno::ECONNRESET) => Err(ShmError::Closed("reader")),
            Err(error) => Err(ShmError::os("sendmsg")(error)),
        }
    }

    /// Waits until `deadline` for a message named `what` of exactly `buffer.len()` octets.
    pub(crate) fn expect(
        &self,
        what: &'static str,
        buffer: &mut [u8],
        deadline: Instant,
    ) -> Result<Vec<OwnedFd>, ShmError> {
        loop {
            match self.receive(buffer)? {
                Received::Message(len, descriptors) if len == buffer.len() => return Ok(descriptors),
                Received::Message(got, _) => {
                    return Err(ShmError::Truncated {
                        what,
                        got,
                        expected: buffer.len(),
                    });
                }
                Received::Closed => return Err(ShmError::Closed(what)),
                Received::Nothing if Instant::now() >= deadline => return Err(ShmError::Timeout(what)),
                Received::Nothing => {
                    wait_readable(&self.fd, deadline.saturating_duration_since(Instant::now()))?;
                }
            }
        }
    }

    /// Takes the next message if there is one. Descriptors are closed on exec, and owned before anything is checked.
    pub(crate) fn receive(&self, buffer: &mut [u8]) -> Result<Received, ShmError> {
        let mut part = libc::iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: buffer.len(),
        };
        let mut control = ControlBuffer::new();
        // SAFETY: all-zero is a valid `msghdr`: null pointers with zero lengths.
        let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
        header.msg_iov = &raw mut part;
        header.msg_iovlen = 1;
        header.msg_control = control.words.as_mut_ptr().cast();
        header.msg_controllen = control.len() as _;
        let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC | libc::MSG_TRUNC;
        // SAFETY: the header points at `part`, which points at `buffer`, and at `control`, each with its true length;
        // all three live until after the call, and nothing else refers to them.
        let got = unsafe { libc::recvmsg(self.fd.as_raw_fd(), &raw mut header, flags) };
        match Errno::result(got) {
            // A seqpacket socket tells an empty message and the end apart only by what follows; we send none.
            Ok(0) => Ok(Received::Closed),
            // SAFETY: the kernel has just filled the header and its control buffer.
            Ok(len) => Ok(Received::Message(len as usize, unsafe { rights(&header) })),
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(Received::Nothing),
            // Said once, when the peer closed with something of ours unread; what it sent before that is still there.
            Err(Errno::ECONNRESET) => self.receive(buffer),
            Err(error) => Err(ShmError::os("recvmsg")(error)),
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Two connected sockets, for two ends that were not started apart.
///
/// # Errors
/// [`ShmError::Os`].
pub fn pair() -> Result<(OwnedFd, OwnedFd), ShmError> {
    socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
    )
    .map_err(ShmError::os("socketpair"))
}

/// Waits until `fd` is readable or `timeout` is over; says which. May return early with `false` on a signal.
pub(crate) fn wait_readable(fd: impl AsFd, timeout: Duration) -> Result<bool, ShmError> {
    let millis = timeout.as_micros().div_ceil(1000).min(i32::MAX as u128) as i32;
    let timeout = PollTimeout::try_from(millis).unwrap_or(PollTimeout::ZERO);
    match poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], timeout) {
        Ok(ready) => Ok(ready > 0),
        Err(Errno::EINTR) => Ok(false),
        Err(error) => Err(ShmError::os("poll")(error)),
    }
}

/// Room for the control part of a message, aligned as `cmsghdr` is.
struct ControlBuffer {
    words: [u64; 160],
}

impl ControlBuffer {
    fn new() -> Self {
        Self { words: [0; 160] }
    }

    fn len(&self) -> usize {
        // SAFETY: computes a number.
        let need = unsafe { libc::CMSG_SPACE((MOST_DESCRIPTORS * size_of::<RawFd>()) as u32) } as usize;
        assert!(
            need <= size_of_val(&self.words),
            "the buffer holds SCM_MAX_FD descriptors"
        );
        size_of_val(&self.words)
    }
}

/// Owns every descriptor in the control part.
///
/// # Safety
/// `header` was just filled by a successful `recvmsg`, its control buffer is alive, and nobody else owns the descriptors.
unsafe fn rights(header: &libc::msghdr) -> Vec<OwnedFd> {
    let mut descriptors = Vec::new();
    // SAFETY: the caller vouches for the header; the kernel wrote whole control messages.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(header) };
    // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR return null or a header inside the buffer.
    while let Some(control) = unsafe { next.as_ref() } {
        if control.cmsg_level == libc::SOL_SOCKET && control.cmsg_type == libc::SCM_RIGHTS {
            #[allow(clippy::unnecessary_cast, reason = "musl's length has 32 bits")]
            // SAFETY: computes a number.
            let payload = control.cmsg_len as usize - unsafe { libc::CMSG_LEN(0) } as usize;
            // SAFETY: `control` lies inside the buffer.
            let data: *const RawFd = unsafe { libc::CMSG_DATA(control) }.cast();
            for index in 0..payload / size_of::<RawFd>() {
                // SAFETY: the kernel wrote `payload` octets of descriptors it has just installed for us alone.
                descriptors.push(unsafe { OwnedFd::from_raw_fd(data.add(index).read_unaligned()) });
            }
        }
        // SAFETY: `control` lies inside the header's buffer.
        next = unsafe { libc::CMSG_NXTHDR(header, control) };
    }
    descriptors
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sockets() -> (Socket, Socket) {
        let (near, far) = pair().unwrap();
        (Socket::adopt(near).unwrap(), Socket::adopt(far).unwrap())
    }

    #[test]
    fn messages_keep_their_boundaries_and_a_cut_one_tells_its_length() {
        let (near, far) = sockets();
        near.send(b"four", &[]).unwrap();
        near.send(b"longer than eight", &[]).unwrap();
        let mut buffer = [0; 8];
        assert!(matches!(
            far.receive(&mut buffer).unwrap(),
            Received::Message(4, _)
        ));
        assert!(matches!(
            far.receive(&mut buffer).unwrap(),
            Received::Message(17, _)
        ));
        assert!(matches!(far.receive(&mut buffer).unwrap(), Received::Nothing));
        drop(near);
        assert!(matches!(far.receive(&mut buffer).unwrap(), Received::Closed));
    }

    #[test]
    fn as_many_descriptors_as_the_kernel_passes_are_all_owned() {
        let (near, far) = sockets();
        let sent = vec![near.as_fd(); MOST_DESCRIPTORS];
        near.send(b"x", &sent).unwrap();
        let Received::Message(1, descriptors) = far.receive(&mut [0; 8]).unwrap() else {
            panic!("no message")
        };
        assert_eq!(descriptors.len(), MOST_DESCRIPTORS);
    }

    #[test]
    fn a_socket_of_another_type_is_refused() {
        let (stream, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(matches!(
            Socket::adopt(stream.into()),
            Err(ShmError::WrongKind { .. })
        ));
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(matches!(
            Socket::adopt(file.into()),
            Err(ShmError::WrongKind { .. })
        ));
    }

    #[test]
    fn nothing_in_time_is_a_timeout() {
        let (near, _far) = sockets();
        let outcome = near.expect("hello", &mut [0; 8], Instant::now() + Duration::from_millis(5));
        assert!(matches!(outcome, Err(ShmError::Timeout("hello"))));
    }
}
