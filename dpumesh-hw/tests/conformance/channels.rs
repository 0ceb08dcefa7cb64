//! [`Channels`]: the transport's contract in one process, with queues for rings. It lets the kit's channel cases run against
//! something whose every step can be read; nothing here is shared memory.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use dpumesh_core::transport::{
    ChannelConfig, ChannelMode, ChannelName, PeerState, SharedWriter, ShmChannel, ShmListener,
};
use dpumesh_core::{Error, ErrorKind, Result, ShmTransport, TransportCapabilities};
use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// Octets of a ring that a message takes beside its own.
const HEADER: usize = 8;

/// Channels within this process.
#[derive(Debug)]
pub(crate) struct Channels {
    limits: TransportCapabilities,
    hub: Arc<Mutex<Hub>>,
}

#[derive(Debug, Default)]
struct Hub {
    listeners: HashMap<ChannelName, UnboundedSender<End>>,
    channels: u32,
}

impl Channels {
    /// With these limits.
    pub(crate) fn new(limits: TransportCapabilities) -> Self {
        Self {
            limits,
            hub: Arc::default(),
        }
    }

    fn check(&self, config: &ChannelConfig) -> Result<()> {
        let refuse = |kind, field: &'static str, message: &'static str| {
            Err(Error::new(kind, CONNECT, message).field(field))
        };
        let offered = match config.mode {
            ChannelMode::Messages => self.limits.messages,
            ChannelMode::Stream => self.limits.streams,
        };
        if !offered {
            return refuse(ErrorKind::Unsupported, "mode", "is not on offer");
        }
        if config.ring == 0 || config.ring > self.limits.max_ring {
            return refuse(ErrorKind::Invalid, "ring", "is not within the limits");
        }
        let longest = config.max_message;
        if config.mode == ChannelMode::Messages
            && (longest == 0 || longest > self.limits.max_message || longest > config.ring / 2)
        {
            return refuse(ErrorKind::Invalid, "max_message", "is not within the limits");
        }
        Ok(())
    }
}

const LISTEN: &str = "transport.listen";
const CONNECT: &str = "transport.connect";

#[async_trait]
impl ShmTransport for Channels {
    async fn listen(&self, name: &ChannelName) -> Result<Box<dyn ShmListener>> {
        let (offers, waiting) = unbounded_channel();
        let mut hub = locked(&self.hub);
        if hub.listeners.contains_key(name) {
            return Err(
                Error::new(ErrorKind::Exists, LISTEN, "somebody listens already").object(name.as_str())
            );
        }
        hub.listeners.insert(name.clone(), offers);
        Ok(Box::new(Listener {
            name: name.clone(),
            hub: Arc::clone(&self.hub),
            waiting,
        }))
    }

    async fn connect(&self, name: &ChannelName, config: &ChannelConfig) -> Result<Box<dyn ShmChannel>> {
        self.check(config)?;
        let mut hub = locked(&self.hub);
        let Some(offers) = hub.listeners.get(name).cloned() else {
            return Err(Error::new(ErrorKind::NotFound, CONNECT, "nobody listens").object(name.as_str()));
        };
        if hub.channels >= self.limits.channels {
            let message = format!("transport.channels is full: {0} of {0}", self.limits.channels);
            return Err(
                Error::new(ErrorKind::CapacityExceeded, CONNECT, message).object("transport.channels")
            );
        }
        let config = ChannelConfig {
            ring: config.ring.next_power_of_two(),
            ..*config
        };
        let (near, far) = pair(config, &self.hub)
            .map_err(|errno| Error::new(ErrorKind::Io, CONNECT, "no eventfd").vendor_code(errno as i64))?;
        hub.channels += 1;
        drop(hub);
        match offers.send(far) {
            Ok(()) => Ok(Box::new(near)),
            Err(_) => Err(Error::new(
                ErrorKind::NotFound,
                CONNECT,
                "nobody listens any more",
            )),
        }
    }
}

#[derive(Debug)]
struct Listener {
    name: ChannelName,
    hub: Arc<Mutex<Hub>>,
    waiting: UnboundedReceiver<End>,
}

#[async_trait]
impl ShmListener for Listener {
    async fn accept(&mut self) -> Result<Box<dyn ShmChannel>> {
        match self.waiting.recv().await {
            Some(end) => Ok(Box::new(end)),
            None => Err(Error::new(
                ErrorKind::Io,
                "transport.accept",
                "the offer has ended",
            )),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        locked(&self.hub).listeners.remove(&self.name);
    }
}

/// One end of a channel.
#[derive(Debug)]
struct End {
    config: ChannelConfig,
    side: usize,
    bell: Arc<EventFd>,
    shared: Arc<Mutex<Shared>>,
}

/// What both ends see; index 0 belongs to the connecting side.
#[derive(Debug)]
struct Shared {
    ways: [Way; 2],
    alive: [bool; 2],
    armed: [bool; 2],
    /// The last send found too little room.
    starved: [bool; 2],
    bells: [Arc<EventFd>; 2],
    channels: Arc<Mutex<Hub>>,
}

/// What one side has sent.
#[derive(Debug, Default)]
struct Way {
    messages: VecDeque<Vec<u8>>,
    octets: VecDeque<u8>,
    used: usize,
}

impl Drop for Shared {
    fn drop(&mut self) {
        locked(&self.channels).channels -= 1;
    }
}

fn pair(config: ChannelConfig, hub: &Arc<Mutex<Hub>>) -> nix::Result<(End, End)> {
    let bell = || EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC);
    let bells = [Arc::new(bell()?), Arc::new(bell()?)];
    let shared = Arc::new(Mutex::new(Shared {
        ways: Default::default(),
        alive: [true; 2],
        armed: [false; 2],
        starved: [false; 2],
        bells: bells.clone(),
        channels: Arc::clone(hub),
    }));
    let end = |side: usize| End {
        config,
        side,
        bell: Arc::clone(&bells[side]),
        shared: Arc::clone(&shared),
    };
    Ok((end(0), end(1)))
}

impl Shared {
    /// Wakes a side that sleeps.
    fn wake(&mut self, side: usize) {
        if std::mem::take(&mut self.armed[side]) {
            // A full counter is rung already.
            let _ = self.bells[side].write(1);
        }
    }
}

impl End {
    fn gone(operation: &'static str) -> Error {
        Error::new(ErrorKind::DeviceLost, operation, "the peer is gone")
    }

    fn room(&self, shared: &Shared) -> usize {
        self.config.ring as usize - shared.ways[self.side].used
    }

    fn send_message(&self, shared: &mut Shared, message: &[u8]) -> Result<bool> {
        if message.len() > self.config.max_message as usize {
            return Err(Error::new(
                ErrorKind::Invalid,
                "transport.send",
                "is longer than was agreed",
            ));
        }
        if message.len() + HEADER > self.room(shared) {
            shared.starved[self.side] = true;
            return Ok(false);
        }
        let way = &mut shared.ways[self.side];
        way.used += message.len() + HEADER;
        way.messages.push_back(message.to_vec());
        Ok(true)
    }
}

impl ShmChannel for End {
    fn config(&self) -> ChannelConfig {
        self.config
    }

    fn send(&mut self, slices: &[&[u8]]) -> Result<usize> {
        let mut shared = locked(&self.shared);
        if !shared.alive[1 - self.side] {
            return Err(Self::gone("transport.send"));
        }
        let mut sent = 0;
        let mut end = Ok(());
        for slice in slices {
            if self.config.mode == ChannelMode::Stream {
                let fits = slice.len().min(self.room(&shared));
                shared.starved[self.side] |= fits < slice.len();
                let way = &mut shared.ways[self.side];
                way.octets.extend(&slice[..fits]);
                way.used += fits;
                sent += fits;
                if fits < slice.len() {
                    break;
                }
                continue;
            }
            match self.send_message(&mut shared, slice) {
                Ok(true) => sent += 1,
                Ok(false) => break,
                Err(error) => {
                    end = Err(error);
                    break;
                }
            }
        }
        if sent > 0 {
            shared.wake(1 - self.side);
        }
        end.map(|()| sent)
    }

    fn send_with(&mut self, len: usize, fill: &mut dyn FnMut(&mut dyn SharedWriter)) -> Result<bool> {
        if self.config.mode == ChannelMode::Messages && len > self.config.max_message as usize {
            return Err(Error::new(
                ErrorKind::Invalid,
                "transport.send_with",
                "is longer than was agreed",
            ));
        }
        if len + HEADER > self.room(&locked(&self.shared)) {
            locked(&self.shared).starved[self.side] = true;
            return Ok(false);
        }
        let mut writer = Writer {
            octets: vec![0; len],
            written: 0,
        };
        fill(&mut writer);
        self.send(&[&writer.octets]).map(|_| true)
    }

    fn receive(&mut self, buffer: &mut [u8]) -> Result<Option<usize>> {
        let mut shared = locked(&self.shared);
        let peer = 1 - self.side;
        let way = &mut shared.ways[peer];
        let taken = if self.config.mode == ChannelMode::Stream {
            let count = buffer.len().min(way.octets.len());
            for (to, octet) in buffer.iter_mut().zip(way.octets.drain(..count)) {
                *to = octet;
            }
            way.used -= count;
            (count > 0).then_some(count)
        } else {
            match way.messages.front().map(Vec::len) {
                Some(length) if length > buffer.len() => {
                    return Err(Error::new(
                        ErrorKind::Invalid,
                        "transport.receive",
                        "is longer than the buffer",
                    ));
                }
                Some(_) => way.messages.pop_front().map(|message| {
                    buffer[..message.len()].copy_from_slice(&message);
                    way.used -= message.len() + HEADER;
                    message.len()
                }),
                None => None,
            }
        };
        if taken.is_none() && !shared.alive[peer] {
            return Err(Self::gone("transport.receive"));
        }
        if taken.is_some() && shared.starved[peer] {
            shared.wake(peer);
        }
        Ok(taken)
    }

    fn arm(&mut self) -> Result<bool> {
        let mut shared = locked(&self.shared);
        // Empty is as good as rung.
        let _ = self.bell.read();
        let peer = 1 - self.side;
        let room =
            shared.starved[self.side] && self.room(&shared) > self.config.max_message as usize + HEADER;
        if shared.ways[peer].used > 0 || room || !shared.alive[peer] {
            shared.starved[self.side] &= !room;
            return Ok(false);
        }
        shared.armed[self.side] = true;
        Ok(true)
    }

    fn poll_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    fn peer(&self) -> PeerState {
        let shared = locked(&self.shared);
        let way = &shared.ways[self.side];
        let waiting: usize = way.messages.iter().map(Vec::len).sum();
        PeerState {
            alive: shared.alive[1 - self.side],
            in_flight: (waiting + way.octets.len()) as u64,
        }
    }
}

impl Drop for End {
    fn drop(&mut self) {
        let mut shared = locked(&self.shared);
        shared.alive[self.side] = false;
        let peer = 1 - self.side;
        shared.armed[peer] = true;
        shared.wake(peer);
    }
}

struct Writer {
    octets: Vec<u8>,
    written: usize,
}

impl SharedWriter for Writer {
    fn write(&mut self, octets: &[u8]) -> usize {
        let count = octets.len().min(self.remaining());
        self.octets[self.written..self.written + count].copy_from_slice(&octets[..count]);
        self.written += count;
        count
    }

    fn remaining(&self) -> usize {
        self.octets.len() - self.written
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
