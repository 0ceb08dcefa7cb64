//! The listening side: takes connections, hears their offers on threads of the runtime, a few at a time, so that a slow or
//! silent peer delays nobody else.

use std::{
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
    sync::Arc,
};

use async_trait::async_trait;
use dpumesh_core::{
    Error, ErrorKind, Result,
    transport::{ShmChannel, ShmListener},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
};

use super::{
    super::{Incoming, Refusal},
    CutShort, End, Folder, LISTEN, Listener, PATIENCE, ShmError, failed,
};

const ACCEPT: &str = "transport.accept";
/// Handshakes at a time; further peers wait in the kernel's queue.
const AT_ONCE: usize = 8;

/// Channels offered under a name.
#[derive(Debug)]
pub(super) struct Offer {
    /// Connections whose offer is being heard. What is finished here waits for the next `accept`.
    hearing: JoinSet<Option<End>>,
    /// To end those, on drop.
    cuts: Vec<(tokio::task::Id, CutShort)>,
    listener: AsyncFd<Door>,
    seats: Arc<Semaphore>,
    /// Where the listener's socket lies: it is removed by the path through this descriptor.
    _folder: Arc<Folder>,
}

#[derive(Debug)]
struct Door(Listener);

impl AsRawFd for Door {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

impl AsFd for Door {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.fd()
    }
}

impl Offer {
    pub(super) fn new(listener: Listener, folder: Arc<Folder>, seats: Arc<Semaphore>) -> Result<Self> {
        // SAFETY: the listener owns its socket: the number stays the same and open until the listener is dropped, which
        // `AsyncFd` does after it has stopped watching.
        let watched = unsafe { AsyncFd::register_with_interest(Door(listener), Interest::READABLE) };
        let listener = watched.map_err(|error| failed(LISTEN, ShmError::os("watch the socket")(error)))?;
        Ok(Self {
            hearing: JoinSet::new(),
            cuts: Vec::new(),
            listener,
            seats,
            _folder: folder,
        })
    }

    /// Takes the next connection, and begins to hear it.
    fn take(&mut self, incoming: Incoming) {
        let Ok(seat) = Arc::clone(&self.seats).try_acquire_owned() else {
            if let Err(error) = incoming.refuse(Refusal::Full) {
                tracing::debug!(%error, "a peer could not be told that all channels are in use");
            }
            return;
        };
        match CutShort::of(incoming.socket()) {
            Ok(cut) => {
                let task = self.hearing.spawn_blocking(move || hear(incoming, seat));
                self.cuts.push((task.id(), cut));
            }
            Err(error) => tracing::warn!(%error, "a peer is sent away"),
        }
    }

    fn heard(&mut self, id: tokio::task::Id) {
        if let Some(index) = self.cuts.iter().position(|(task, _)| *task == id) {
            self.cuts.swap_remove(index).1.not_any_more();
        }
    }
}

#[async_trait]
impl ShmListener for Offer {
    async fn accept(&mut self) -> Result<Box<dyn ShmChannel>> {
        loop {
            // Both can be given up at any time: what they had is still in the set and in the queue.
            tokio::select! {
                Some(done) = self.hearing.join_next_with_id() => match done {
                    Ok((id, end)) => {
                        self.heard(id);
                        if let Some(end) = end {
                            return Ok(Box::new(end));
                        }
                    }
                    Err(error) => {
                        self.heard(error.id());
                        tracing::warn!(%error, "a handshake ended without an answer");
                    }
                },
                ready = self.listener.readable(), if self.hearing.len() < AT_ONCE => {
                    let mut ready = ready.map_err(|error| {
                        Error::new(ErrorKind::Io, ACCEPT, "the runtime watches no more").source(error)
                    })?;
                    let incoming = ready.get_inner().0.accept().map_err(|error| failed(ACCEPT, error))?;
                    match incoming {
                        Some(incoming) => {
                            drop(ready);
                            self.take(incoming);
                        }
                        None => ready.clear_ready(),
                    }
                }
            }
        }
    }
}

fn hear(incoming: Incoming, seat: OwnedSemaphorePermit) -> Option<End> {
    let peer = incoming.peer();
    match incoming.finish(PATIENCE) {
        Ok(channel) => Some(End::new(channel, seat)),
        Err(error) => {
            tracing::warn!(pid = peer.pid, uid = peer.uid, %error, "a peer failed the handshake");
            None
        }
    }
}
