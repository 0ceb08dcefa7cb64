//! [`SocketTransport`]: [`ShmTransport`] between the processes of one machine. A name is a socket file in a folder that
//! only its owner may enter; memory and doorbells travel over the socket and have no names.
//!
//! # Limits
//! A transport holds at most `channels` channels that it connected and as many that it accepted. Sizes and modes are
//! refused on both sides: a peer that claims more than we do is told so in the handshake.
//!
//! # Blocking
//! Connecting to a local socket never blocks. The handshakes wait for the peer on threads of the runtime, and each is cut
//! short by closing its socket when nobody waits for it any more.

mod end;
mod failure;
mod offer;
#[cfg(test)]
mod tests;

use std::{
    fs::{DirBuilder, File, OpenOptions},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use dpumesh_core::{
    Error, ErrorKind, Result, ShmTransport, TransportCapabilities,
    transport::{ChannelConfig, ChannelMode, ChannelName, ShmChannel, ShmListener},
};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    sys::socket::{Shutdown, shutdown},
    unistd::geteuid,
};
use tokio::sync::Semaphore;

use self::{end::End, failure::failed, offer::Offer};
use super::{Channel, Limits, Listener, Options, ShmError, listener::reach};
use crate::ring::Mode;

const OPEN: &str = "transport.open";
const LISTEN: &str = "transport.listen";
const CONNECT: &str = "transport.connect";
/// How long a handshake may take, and the wait for a place in a listener's queue.
const PATIENCE: Duration = Duration::from_secs(2);
/// Between two tries for something that another holds for microseconds.
const PAUSE: Duration = Duration::from_millis(2);
/// Octets of the smallest and the largest ring.
const RINGS: std::ops::RangeInclusive<u32> = 16..=1 << 30;

/// Channels between processes that share a folder. Needs a Tokio runtime with I/O and time.
#[derive(Debug)]
pub struct SocketTransport {
    folder: Arc<Folder>,
    capabilities: TransportCapabilities,
    connected: Arc<Semaphore>,
    accepted: Arc<Semaphore>,
}

impl SocketTransport {
    /// Meets peers in `folder`, which is made with mode 0700 when it is missing, within the limits of `capabilities`.
    ///
    /// # Errors
    /// `Invalid`: limits that no channel could keep, with the field; `folder` is no directory. `Denied`: the folder
    /// belongs to or is open to somebody else. `Io`.
    pub fn new(folder: impl AsRef<Path>, capabilities: TransportCapabilities) -> Result<Self> {
        check_claims(&capabilities)?;
        let channels = capabilities.channels as usize;
        Ok(Self {
            folder: Arc::new(Folder::open(folder.as_ref())?),
            connected: Arc::new(Semaphore::new(channels.min(Semaphore::MAX_PERMITS))),
            accepted: Arc::new(Semaphore::new(channels.min(Semaphore::MAX_PERMITS))),
            capabilities,
        })
    }

    /// What a machine of usual size offers: 64 channels, messages of up to 1 MiB, rings of up to 16 MiB, both modes.
    pub fn usual_capabilities() -> TransportCapabilities {
        let mut usual = TransportCapabilities::default();
        usual.channels = 64;
        usual.max_message = 1 << 20;
        usual.max_ring = 1 << 24;
        (usual.messages, usual.streams) = (true, true);
        usual
    }

    /// What is offered, for the claims of a backend.
    pub fn capabilities(&self) -> &TransportCapabilities {
        &self.capabilities
    }

    fn limits(&self) -> Limits {
        Limits {
            max_ring_bytes: self.capabilities.max_ring,
            max_message: self.capabilities.max_message,
            messages: self.capabilities.messages,
            streams: self.capabilities.streams,
        }
    }

    /// What to offer the peer for `config`.
    fn options(&self, config: &ChannelConfig) -> Result<Options> {
        let claims = &self.capabilities;
        let invalid = |field, message| Err(Error::new(ErrorKind::Invalid, CONNECT, message).field(field));
        let offered = match config.mode {
            ChannelMode::Messages => claims.messages,
            ChannelMode::Stream => claims.streams,
        };
        if !offered {
            return Err(Error::new(ErrorKind::Unsupported, CONNECT, "is not on offer").field("mode"));
        }
        if config.ring < *RINGS.start() || config.ring > claims.max_ring {
            return invalid(
                "ring",
                format!("{} is not within 16 and {} octets", config.ring, claims.max_ring),
            );
        }
        let ring_bytes = config.ring.next_power_of_two();
        let mode = match config.mode {
            ChannelMode::Stream => Mode::Stream,
            ChannelMode::Messages => {
                let most = claims.max_message.min(ring_bytes / 2);
                if config.max_message == 0 || config.max_message > most {
                    let message = format!("{} is not within 1 and {most} octets", config.max_message);
                    return invalid("max_message", message);
                }
                Mode::Messages {
                    max_len: config.max_message,
                }
            }
        };
        Ok(Options {
            mode,
            ring_bytes,
            limits: self.limits(),
            timeout: PATIENCE,
        })
    }
}

#[async_trait]
impl ShmTransport for SocketTransport {
    async fn listen(&self, name: &ChannelName) -> Result<Box<dyn ShmListener>> {
        let held = self.folder.hold().await?;
        let listener = Listener::bind(self.folder.path(name), self.limits())
            .map_err(|error| failed(LISTEN, error).object(name.as_str()))?;
        drop(held);
        let offer = Offer::new(listener, Arc::clone(&self.folder), Arc::clone(&self.accepted))?;
        Ok(Box::new(offer))
    }

    async fn connect(&self, name: &ChannelName, config: &ChannelConfig) -> Result<Box<dyn ShmChannel>> {
        let options = self.options(config)?;
        let Ok(seat) = Arc::clone(&self.connected).try_acquire_owned() else {
            let message = format!("all of the {} channels are in use", self.capabilities.channels);
            return Err(
                Error::new(ErrorKind::CapacityExceeded, CONNECT, message).object("transport.channels")
            );
        };
        let socket = self.folder.reach(name).await?;
        let cut = CutShort::of(&socket).map_err(|error| failed(CONNECT, error))?;
        let shaken = tokio::task::spawn_blocking(move || Channel::offer(socket, &options)).await;
        cut.not_any_more();
        let channel = shaken
            .map_err(|error| Error::new(ErrorKind::Io, CONNECT, "the handshake was given up").source(error))?
            .map_err(|error| named(failed(CONNECT, error), name))?;
        Ok(Box::new(End::new(channel, seat)))
    }
}

/// The error with the listener's name, unless it names a resource.
fn named(error: Error, name: &ChannelName) -> Error {
    if error.object.is_some() {
        error
    } else {
        error.object(name.as_str())
    }
}

/// Limits that can be kept, or the field that cannot.
fn check_claims(claims: &TransportCapabilities) -> Result<()> {
    let (field, message) = if claims.channels == 0 {
        ("channels", "must be at least 1")
    } else if !(claims.messages || claims.streams) {
        ("messages", "neither messages nor streams are offered")
    } else if !claims.max_ring.is_power_of_two() || !RINGS.contains(&claims.max_ring) {
        ("max_ring", "must be a power of two from 16 to 2^30 octets")
    } else if claims.messages && !(1..=claims.max_ring / 2).contains(&claims.max_message) {
        ("max_message", "must be 1 to half of max_ring")
    } else {
        return Ok(());
    };
    Err(Error::new(ErrorKind::Invalid, OPEN, message).field(field))
}

/// The directory where peers meet, by its descriptor: however long its path is, and wherever it is moved, the sockets in it
/// can be reached.
#[derive(Debug)]
struct Folder {
    directory: File,
}

impl Folder {
    fn open(path: &Path) -> Result<Self> {
        let io = |error: std::io::Error| {
            let kind = match error.kind() {
                std::io::ErrorKind::PermissionDenied => ErrorKind::Denied,
                std::io::ErrorKind::NotADirectory | std::io::ErrorKind::AlreadyExists => ErrorKind::Invalid,
                _ => ErrorKind::Io,
            };
            Error::new(kind, OPEN, error.to_string()).object(path.display())
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(io)?;
        let flags = nix::libc::O_DIRECTORY | nix::libc::O_CLOEXEC | nix::libc::O_NOFOLLOW;
        let directory = OpenOptions::new()
            .read(true)
            .custom_flags(flags)
            .open(path)
            .map_err(io)?;
        let found = directory.metadata().map_err(io)?;
        if found.uid() != geteuid().as_raw() || found.mode() & 0o077 != 0 {
            let message = "the folder must be ours, and closed to all others (mode 0700)";
            return Err(Error::new(ErrorKind::Denied, OPEN, message).object(path.display()));
        }
        Ok(Self { directory })
    }

    fn own_path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.directory.as_raw_fd()))
    }

    fn path(&self, name: &ChannelName) -> PathBuf {
        self.own_path().join(name.as_str())
    }

    /// Keeps others from replacing a dead process's socket while we do.
    async fn hold(&self) -> Result<Flock<File>> {
        let until = Instant::now() + PATIENCE;
        let io = |error: std::io::Error| failed(LISTEN, ShmError::os("open the folder")(error));
        let mut folder = File::open(self.own_path()).map_err(io)?;
        loop {
            folder = match Flock::lock(folder, FlockArg::LockExclusiveNonblock) {
                Ok(held) => return Ok(held),
                Err((folder, Errno::EAGAIN | Errno::EINTR)) if Instant::now() < until => folder,
                Err((_, errno)) => return Err(failed(LISTEN, ShmError::os("lock the folder")(errno))),
            };
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// A socket connected to the listener of that name.
    async fn reach(&self, name: &ChannelName) -> Result<OwnedFd> {
        let path = self.path(name);
        let until = Instant::now() + PATIENCE;
        loop {
            match reach(&path) {
                Ok(socket) => return Ok(socket),
                Err(ShmError::Os { source, .. }) if source.raw_os_error() == Some(Errno::EAGAIN as i32) => {
                    if Instant::now() >= until {
                        let message = "the listener's queue is full";
                        return Err(Error::new(ErrorKind::Timeout, CONNECT, message).object(name.as_str()));
                    }
                }
                Err(error) => return Err(named(failed(CONNECT, error), name)),
            }
            tokio::time::sleep(PAUSE).await;
        }
    }
}

/// Ends a handshake on another thread when it is dropped, by shutting its socket down.
#[derive(Debug)]
struct CutShort(Option<OwnedFd>);

impl CutShort {
    fn of(socket: &OwnedFd) -> Result<Self, ShmError> {
        let socket = socket.try_clone().map_err(ShmError::os("dup"))?;
        Ok(Self(Some(socket)))
    }

    /// The handshake is over.
    fn not_any_more(mut self) {
        self.0 = None;
    }
}

impl Drop for CutShort {
    fn drop(&mut self) {
        if let Some(socket) = &self.0 {
            // The peer may have closed it already; then nothing waits.
            let _ = shutdown(std::os::fd::AsRawFd::as_raw_fd(socket), Shutdown::Both);
        }
    }
}
