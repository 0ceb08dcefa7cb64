//! A path to connect to. The path carries nothing but the handshake: it may vanish once two ends are connected.
//!
//! The socket is made with mode 0600. A path left behind by a process that died is taken over; one that somebody still
//! listens on is refused. [`Listener`] removes its path when it is dropped, unless another has taken its place.

use std::{
    fs,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::fs::{FileTypeExt, MetadataExt},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::{
        socket::{self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr, accept4},
        stat::{Mode, fchmod},
    },
};

use super::{
    Channel, Limits, Options, Refusal, ShmError,
    channel::{PeerCredentials, peer_credentials},
    handshake,
    socket::Socket,
};

const FLAGS: SockFlag = SockFlag::SOCK_CLOEXEC.union(SockFlag::SOCK_NONBLOCK);
/// Connections that may wait to be accepted.
const BACKLOG: i32 = 64;

/// Connects to a listener and offers it a channel. Blocks for at most `options.timeout`.
///
/// # Errors
/// [`ShmError::Os`] when nobody listens at `path` or its queue is full (`EAGAIN`), otherwise as [`Channel::offer`].
pub fn connect(path: impl AsRef<Path>, options: &Options) -> Result<Channel, ShmError> {
    Channel::offer(reach(path.as_ref())?, options)
}

/// A socket connected to a listener. Never blocks: `EAGAIN` when the listener's queue is full.
pub(super) fn reach(path: &Path) -> Result<OwnedFd, ShmError> {
    let socket = new_socket()?;
    let address = UnixAddr::new(path).map_err(ShmError::os("socket path"))?;
    socket::connect(socket.as_raw_fd(), &address).map_err(ShmError::os("connect"))?;
    Ok(socket)
}

/// Listens at a path.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    path: PathBuf,
    /// Device and inode of what we bound.
    identity: (u64, u64),
    limits: Limits,
}

impl Listener {
    /// Listens at `path`, accepting offers within `limits`.
    ///
    /// # Errors
    /// [`ShmError::Os`]: `EADDRINUSE` when somebody listens there, or the path is no socket.
    pub fn bind(path: impl AsRef<Path>, limits: Limits) -> Result<Self, ShmError> {
        let path = path.as_ref().to_owned();
        let address = UnixAddr::new(&path).map_err(ShmError::os("socket path"))?;
        let socket = new_socket()?;
        fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR).map_err(ShmError::os("fchmod"))?;
        match socket::bind(socket.as_raw_fd(), &address) {
            Err(Errno::EADDRINUSE) if is_abandoned(&path, &address)? => {
                fs::remove_file(&path).map_err(ShmError::os("remove the abandoned socket"))?;
                socket::bind(socket.as_raw_fd(), &address)
            }
            outcome => outcome,
        }
        .map_err(ShmError::os("bind"))?;
        let identity = identity(&path).map_err(ShmError::os("stat the socket"))?;
        let listener = Self {
            socket,
            path,
            identity,
            limits,
        };
        let backlog = Backlog::new(BACKLOG).map_err(ShmError::os("backlog"))?;
        socket::listen(&listener.socket, backlog).map_err(ShmError::os("listen"))?;
        Ok(listener)
    }

    /// Takes the next connection, if one waits. Never blocks; look at [`fd`](Self::fd) to sleep.
    ///
    /// # Errors
    /// [`ShmError::Os`].
    pub fn accept(&self) -> Result<Option<Incoming>, ShmError> {
        match accept4(self.socket.as_raw_fd(), FLAGS) {
            Ok(raw) => {
                // SAFETY: accept4 has just made the descriptor, for us alone.
                let socket = unsafe { OwnedFd::from_raw_fd(raw) };
                let peer = peer_credentials(&socket)?;
                Ok(Some(Incoming {
                    socket,
                    peer,
                    limits: self.limits,
                }))
            }
            Err(Errno::EAGAIN | Errno::EINTR | Errno::ECONNABORTED) => Ok(None),
            Err(error) => Err(ShmError::os("accept")(error)),
        }
    }

    /// Readable when a connection waits.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|found| found == self.identity)
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::debug!(path = %self.path.display(), %error, "the socket could not be removed");
        }
    }
}

/// A connection whose offer was not heard yet: look who it is before listening to it.
#[derive(Debug)]
pub struct Incoming {
    socket: OwnedFd,
    peer: PeerCredentials,
    limits: Limits,
}

impl Incoming {
    /// Who connects, by the kernel's word.
    pub fn peer(&self) -> PeerCredentials {
        self.peer
    }

    /// Its socket, to end what waits on it.
    pub(super) fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    /// Sends it away unheard.
    ///
    /// # Errors
    /// [`ShmError::Closed`] when it has left already, [`ShmError::Os`].
    pub fn refuse(self, reason: Refusal) -> Result<(), ShmError> {
        handshake::Message::refuse(reason).send(&Socket::adopt(self.socket)?, &[])
    }

    /// Hears and checks the offer. Blocks for at most `timeout`: a slow peer holds only the thread that does this.
    ///
    /// # Errors
    /// As [`Channel::answer`].
    pub fn finish(self, timeout: Duration) -> Result<Channel, ShmError> {
        Channel::answer(self.socket, &self.limits, timeout)
    }
}

fn new_socket() -> Result<OwnedFd, ShmError> {
    socket::socket(AddressFamily::Unix, SockType::SeqPacket, FLAGS, None).map_err(ShmError::os("socket"))
}

/// Whether what lies at a path is a socket that nobody listens on.
fn is_abandoned(path: &Path, address: &UnixAddr) -> Result<bool, ShmError> {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
    if !is_socket {
        return Ok(false);
    }
    let probe = new_socket()?;
    Ok(socket::connect(probe.as_raw_fd(), address) == Err(Errno::ECONNREFUSED))
}

fn identity(path: &Path) -> std::io::Result<(u64, u64)> {
    let found = fs::symlink_metadata(path)?;
    Ok((found.dev(), found.ino()))
}
