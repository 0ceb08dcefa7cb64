//! A newer process takes over from an older one: its listening sockets, so that no connection is refused or reset on the way.
//!
//! ```text
//! newer ── connects, says hello ─► older
//!       ◄── a line of JSON and a descriptor, for each socket ── (SCM_RIGHTS, unix(7))
//!       ── "ready", once it accepts ─► older: drains and ends
//! ```
//! Both accept from the same queues for a moment; connections stay where they were accepted. Until the newer one is ready nothing
//! changes at the older one, and if it never is, nothing does. The UNIX socket is the user's own (mode 0600, and peers' credentials are
//! looked at): who can connect gets every listening socket.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, BufRead, BufReader, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use serde::{Deserialize, Serialize};

use crate::worker::ListenerKey;

/// What a newer process says first. The number counts versions of what follows.
const HELLO: &str = "dpumesh-proxy hand-over 1\n";

/// What it says last.
const READY: &str = "ready\n";

/// How long either waits for the other's next word, but for the last one.
const PATIENCE: Duration = Duration::from_secs(10);

/// Longest description of a socket, octets.
const LONGEST: usize = 64 * 1024;

/// A listening socket on its way.
#[derive(Debug)]
pub(crate) struct Passed {
    /// Whose it is; the admin server's where it is none.
    pub(crate) listener: Option<String>,
    /// The configured address.
    pub(crate) address: SocketAddr,
    /// How it was opened.
    pub(crate) options: String,
    pub(crate) socket: TcpListener,
}

#[derive(Debug, Serialize, Deserialize)]
struct Description {
    listener: Option<String>,
    address: SocketAddr,
    options: String,
}

/// What an older process gave.
#[derive(Debug)]
pub(crate) struct Inherited {
    older: UnixStream,
    /// Sockets by listener, and how they were opened.
    listeners: BTreeMap<ListenerKey, (String, Vec<TcpListener>)>,
    admin: Option<(SocketAddr, TcpListener)>,
}

impl Inherited {
    /// Takes the sockets of the process that serves at `path`; `None` where there is none.
    ///
    /// # Errors
    /// It is there and does not hand over.
    pub(crate) fn take(path: &Path) -> io::Result<Option<Self>> {
        let mut older = match UnixStream::connect(path) {
            Ok(older) => older,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                ) =>
            {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        older.set_read_timeout(Some(PATIENCE))?;
        older.write_all(HELLO.as_bytes())?;
        let mut inherited = Self {
            older: older.try_clone()?,
            listeners: BTreeMap::new(),
            admin: None,
        };
        while let Some(Passed {
            listener,
            address,
            options,
            socket,
        }) = receive(&mut older)?
        {
            match listener {
                Some(name) => {
                    let known = inherited.listeners.entry((name, address)).or_default();
                    known.0 = options;
                    known.1.push(socket);
                }
                None => inherited.admin = Some((address, socket)),
            }
        }
        Ok(Some(inherited))
    }

    /// The sockets of a listener that were opened in the same way.
    pub(crate) fn listener(&mut self, key: &ListenerKey, options: &str) -> Vec<TcpListener> {
        match self.listeners.remove(key) {
            Some((how, sockets)) if how == options => sockets,
            _ => Vec::new(),
        }
    }

    /// The admin server's socket, if it is the one at this address.
    pub(crate) fn admin(&mut self, address: SocketAddr) -> Option<TcpListener> {
        let (known, socket) = self.admin.take()?;
        (known == address).then_some(socket)
    }

    /// Lets the older process go.
    pub(crate) fn ready(mut self) {
        if let Err(error) = self.older.write_all(READY.as_bytes()) {
            tracing::warn!(%error, "the older process is gone already");
        }
    }
}

/// Who gives the sockets of this process, when it is asked.
pub(crate) trait Give: Send + 'static {
    /// Copies of all of them.
    fn sockets(&self) -> Vec<Passed>;

    /// They are served elsewhere from now on.
    fn handed_over(&self);
}

/// Serves newer processes at `path`, in a thread of its own, until one has taken over.
///
/// # Errors
/// The socket cannot be made.
pub(crate) fn serve(path: &Path, giver: impl Give) -> io::Result<()> {
    // An older process may still have the name: it is taken, not shared.
    let fresh = PathBuf::from(format!("{}.{}", path.display(), std::process::id()));
    let _ = std::fs::remove_file(&fresh);
    let listener = UnixListener::bind(&fresh)?;
    std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o600))?;
    std::fs::rename(&fresh, path)?;
    let thread = std::thread::Builder::new().name("hand-over".to_owned());
    thread.spawn(move || {
        for newer in listener.incoming() {
            match newer.and_then(|newer| hand_over(newer, &giver)) {
                Ok(()) => {
                    tracing::info!("a newer process has taken over");
                    giver.handed_over();
                    return;
                }
                Err(error) => tracing::warn!(%error, "nothing was handed over"),
            }
        }
    })?;
    Ok(())
}

fn hand_over(mut newer: UnixStream, giver: &impl Give) -> io::Result<()> {
    let peer = rustix::net::sockopt::socket_peercred(&newer)?;
    if peer.uid != rustix::process::geteuid() && !peer.uid.is_root() {
        return Err(refused(format!("user {} asks", peer.uid.as_raw())));
    }
    newer.set_read_timeout(Some(PATIENCE))?;
    newer.set_write_timeout(Some(PATIENCE))?;
    let mut said = BufReader::new(newer.try_clone()?);
    expect(&mut said, HELLO)?;
    for passed in giver.sockets() {
        send(&newer, &passed)?;
    }
    newer.write_all(&0u32.to_be_bytes())?;
    // It may wait for its own control plane: as long as it is there, nothing is lost by waiting.
    newer.set_read_timeout(None)?;
    expect(&mut said, READY)
}

fn expect(said: &mut impl BufRead, wanted: &str) -> io::Result<()> {
    let mut line = String::new();
    said.take(HELLO.len() as u64 + 1).read_line(&mut line)?;
    if line == wanted {
        Ok(())
    } else {
        Err(refused(format!("{line:?} where {wanted:?} was expected")))
    }
}

fn refused(reason: impl fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason.to_string())
}

/// Sends a socket: its description's length, with the descriptor, and its description.
fn send(stream: &UnixStream, passed: &Passed) -> io::Result<()> {
    let description = Description {
        listener: passed.listener.clone(),
        address: passed.address,
        options: passed.options.clone(),
    };
    let text = serde_json::to_vec(&description)?;
    let front = (text.len() as u32).to_be_bytes();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = [passed.socket.as_fd()];
    if !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(refused("there is no room for a descriptor"));
    }
    let sent = rustix::net::sendmsg(stream, &[IoSlice::new(&front)], &mut control, SendFlags::NOSIGNAL)?;
    let mut stream = stream;
    stream.write_all(&front[sent..])?;
    stream.write_all(&text)
}

/// Receives a socket; `None` behind the last one.
fn receive(stream: &mut UnixStream) -> io::Result<Option<Passed>> {
    let mut front = [0; 4];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::net::recvmsg(
        &*stream,
        &mut [IoSliceMut::new(&mut front)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    if received.bytes == 0 {
        return Err(refused("the older process hung up: is it of another version?"));
    }
    let mut descriptor: Option<OwnedFd> = None;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            descriptor = descriptors.last().or(descriptor);
        }
    }
    stream.read_exact(&mut front[received.bytes..])?;
    let length = u32::from_be_bytes(front) as usize;
    if length == 0 {
        return Ok(None);
    }
    if length > LONGEST {
        return Err(refused("a description that is too long"));
    }
    let mut text = vec![0; length];
    stream.read_exact(&mut text)?;
    let Description {
        listener,
        address,
        options,
    } = serde_json::from_slice(&text)?;
    let socket = descriptor.ok_or_else(|| refused("a socket without a descriptor"))?;
    let is_listening = rustix::net::sockopt::socket_acceptconn(&socket)?;
    if !is_listening {
        return Err(refused("a socket that does not listen"));
    }
    Ok(Some(Passed {
        listener,
        address,
        options,
        socket: socket.into(),
    }))
}
