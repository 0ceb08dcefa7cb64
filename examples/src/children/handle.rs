//! A process that cannot be mistaken for another: a process descriptor (pidfd_open(2)) stays with its process, also
//! when the number is used again.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use rustix::process::{Pid, PidfdFlags, pidfd_open, pidfd_send_signal};

/// A process descriptor.
#[derive(Debug)]
pub(super) struct Handle(OwnedFd);

impl Handle {
    /// The process that has the number `pid` now.
    pub(super) fn open(pid: u32) -> io::Result<Self> {
        let pid = i32::try_from(pid)
            .ok()
            .and_then(Pid::from_raw)
            .ok_or_else(|| io::Error::other(format!("{pid} is no process id")))?;
        Ok(Self(pidfd_open(pid, PidfdFlags::empty())?))
    }

    /// Waits for its end, at most so long. A zombie has ended.
    pub(super) fn ends_within(&self, timeout: Duration) -> io::Result<bool> {
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            // Rounded up: a wait must not end before its time.
            let millis = left.as_nanos().div_ceil(1_000_000);
            let patience = u16::try_from(millis).unwrap_or(u16::MAX);
            let mut ready = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
            match poll(&mut ready, PollTimeout::from(patience)) {
                Ok(0) if left > Duration::from_millis(u64::from(patience)) => {}
                Ok(count) => return Ok(count > 0),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Sends a signal; nothing happens if the process has ended.
    pub(super) fn signal(&self, signal: Signal) -> io::Result<()> {
        let signal = match signal {
            Signal::SIGKILL => rustix::process::Signal::KILL,
            other => rustix::process::Signal::from_named_raw(other as i32)
                .ok_or_else(|| io::Error::other(format!("{other} cannot be sent")))?,
        };
        match pidfd_send_signal(&self.0, signal) {
            Err(rustix::io::Errno::SRCH) => Ok(()),
            other => Ok(other?),
        }
    }
}
