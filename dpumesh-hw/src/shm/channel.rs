//! A channel: two rings, two doorbells and the socket they came over. What a dataplane and a proxy hold to pass frames
//! or bytes to each other.
//!
//! The data path ([`send`](Channel::send), [`recv`](Channel::recv), [`write`](Channel::write), [`read`](Channel::read))
//! never blocks and makes no system call but a doorbell for a sleeping peer. Who wants to sleep calls
//! [`want_notify`](Channel::want_notify) and, when it says so, waits for [`fd`](Channel::fd) to become readable.
//!
//! # When the peer dies
//! Its socket closes. What it had published can still be taken; then [`ShmError::PeerGone`] says what it had not taken
//! of ours. It shows at the descriptor, in [`is_peer_alive`](Channel::is_peer_alive), and to a caller that only polls:
//! every 64th call that moves nothing looks at the socket.
//!
//! # Reset
//! [`reset`](Channel::reset) empties both rings and bumps the generation, with the peer's consent over the socket. Until
//! it answers nothing moves; the peer gets [`ShmError::Reset`] once. Resets that cross are one reset.
//!
//! # When the peer lies
//! The channel is poisoned: every later call says the same [`PeerMisbehaved`](crate::ring::RingError::PeerMisbehaved),
//! and there is no way back but a new channel.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        socket::{getsockopt, sockopt},
    },
};

use super::{
    Limits, Options, Region, ShmError,
    handshake::{self, Agreed, Kind, MESSAGE_BYTES, Message},
    socket::{self, Received, Socket, wait_readable},
};
use crate::ring::{InFlight, Mode, Reservation, RingError};

/// Calls that move nothing before a look at the socket.
const QUIET_CALLS: u32 = 64;
/// Most control messages handled in one call: a peer that floods them does not hold us.
const CONTROL_BATCH: usize = 4;

/// One end of a channel. `Send`, not shared: one thread drives it at a time.
#[derive(Debug)]
pub struct Channel {
    agreed: Agreed,
    poll: Epoll,
    state: State,
    peer: PeerCredentials,
    quiet: u32,
    stats: ChannelStats,
}

/// What the kernel says about the process that made the peer's socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerCredentials {
    /// Process, as numbered in our PID namespace; 0 when it is not visible there.
    pub pid: i32,
    /// Effective user.
    pub uid: u32,
    /// Effective group.
    pub gid: u32,
}

/// What a channel did, since it was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ChannelStats {
    /// Messages put in, or octets in stream mode.
    pub sent: u64,
    /// Messages taken, or octets in stream mode.
    pub received: u64,
    /// Doorbells rung: system calls of the data path.
    pub doorbells: u64,
    /// Generations entered after the first.
    pub resets: u64,
}

/// What to be woken for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Interest {
    /// Something to take.
    pub readable: bool,
    /// Room for a message of so many octets; in stream mode for so many octets.
    pub writable: Option<usize>,
}

impl Interest {
    /// Something to take.
    pub const READABLE: Self = Self {
        readable: true,
        writable: None,
    };
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Open,
    /// We asked for this generation and wait for consent.
    Resetting(u32),
    /// The peer reset us; to be said once.
    WasReset {
        generation: u32,
        lost: InFlight,
    },
    Gone,
    /// The peer lied, on its socket or in a ring.
    Poisoned(RingError),
}

impl Channel {
    /// Offers a channel over a connected `SOCK_SEQPACKET` socket. Blocks for at most `options.timeout`.
    ///
    /// # Errors
    /// Every [`ShmError`] that names a field, a limit or a descriptor; nothing is shared then.
    pub fn offer(socket: OwnedFd, options: &Options) -> Result<Self, ShmError> {
        Self::open(handshake::offer(Socket::adopt(socket)?, options)?)
    }

    /// Takes the offer of the peer on the other end of a connected `SOCK_SEQPACKET` socket. Blocks for at most
    /// `timeout`.
    ///
    /// # Errors
    /// As [`offer`](Self::offer); the peer is told why it was refused.
    pub fn answer(socket: OwnedFd, limits: &Limits, timeout: Duration) -> Result<Self, ShmError> {
        Self::open(handshake::answer(Socket::adopt(socket)?, limits, timeout)?)
    }

    /// Two ends in one process, set up by the same handshake.
    ///
    /// # Errors
    /// As [`offer`](Self::offer).
    pub fn pair(options: &Options) -> Result<(Self, Self), ShmError> {
        let (near, far) = socket::pair()?;
        std::thread::scope(|scope| {
            let answer = scope.spawn(|| Self::answer(far, &options.limits, options.timeout));
            let offered = Self::offer(near, options);
            let answered = answer
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            Ok((offered?, answered?))
        })
    }

    fn open(agreed: Agreed) -> Result<Self, ShmError> {
        let poll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(ShmError::os("epoll_create1"))?;
        let socket = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP, 0);
        poll.add(agreed.socket.as_fd(), socket)
            .map_err(ShmError::os("epoll_ctl"))?;
        let bell = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 1);
        poll.add(agreed.own_bell.as_fd(), bell)
            .map_err(ShmError::os("epoll_ctl"))?;
        let peer = peer_credentials(&agreed.socket)?;
        Ok(Self {
            agreed,
            poll,
            state: State::Open,
            peer,
            quiet: 0,
            stats: ChannelStats::default(),
        })
    }

    /// Sends messages, in order. Returns how many the ring took, 0 when it is full (or a reset is under way).
    ///
    /// # Errors
    /// Those of [`Producer::push`](crate::ring::Producer::push); [`ShmError::PeerGone`], [`ShmError::Reset`]. After an
    /// error nothing of this call was sent, except that a doorbell may fail after the messages were put in.
    pub fn send(&mut self, messages: &[&[u8]]) -> Result<usize, ShmError> {
        if !self.is_open()? {
            return Ok(0);
        }
        let count = self.agreed.tx.push(messages);
        let count = self.judge(count)?;
        self.sent(count)
    }

    /// Sends octets, one part after the other. Returns how many the ring took, 0 when it is full.
    ///
    /// # Errors
    /// As [`send`](Self::send).
    pub fn write(&mut self, parts: &[&[u8]]) -> Result<usize, ShmError> {
        if !self.is_open()? {
            return Ok(0);
        }
        let count = self.agreed.tx.write(parts);
        let count = self.judge(count)?;
        self.sent(count)
    }

    /// Sends one message of exactly `len` octets, in stream mode a run of as many, that `fill` writes into the ring
    /// itself. Returns `false`, with `fill` not called, when there is no room (or a reset is under way).
    ///
    /// # Errors
    /// As [`send`](Self::send); in stream mode [`RingError::MessageTooLong`] when `len` octets never fit.
    pub fn send_in_place(
        &mut self,
        len: usize,
        fill: impl FnOnce(&mut Reservation<'_, Region>),
    ) -> Result<bool, ShmError> {
        if !self.is_open()? {
            return Ok(false);
        }
        let mode = self.mode();
        let room = match mode {
            Mode::Messages { .. } => self.agreed.tx.reserve(len),
            Mode::Stream => self.agreed.tx.reserve_run(len),
        };
        let fits = room.map(|room| {
            room.map(|mut room| {
                fill(&mut room);
                room.commit();
            })
            .is_some()
        });
        let fits = self.judge(fits)?;
        let unit = if mode == Mode::Stream { len } else { 1 };
        if fits && unit == 0 {
            return Ok(true); // no octets: nothing to wake anybody for
        }
        self.sent(if fits { unit } else { 0 }).map(|_| fits)
    }

    /// Receives messages in order, one into each slot. Returns how many, 0 when there are none for now.
    ///
    /// # Errors
    /// Those of [`Consumer::pop`](crate::ring::Consumer::pop); [`ShmError::PeerGone`] once everything the peer left was
    /// taken, [`ShmError::Reset`].
    pub fn recv(&mut self, slots: &mut [Vec<u8>]) -> Result<usize, ShmError> {
        if !self.is_receiving()? {
            return Ok(0);
        }
        let count = self.agreed.rx.pop(slots);
        let count = self.judge(count)?;
        self.received(count, !slots.is_empty())
    }

    /// Receives messages in order, packed one after the other into `buffer`, each one's length into `lengths`. Returns
    /// how many, 0 when there are none for now.
    ///
    /// # Errors
    /// As [`recv`](Self::recv), and [`RingError::BufferTooSmall`].
    pub fn recv_packed(&mut self, buffer: &mut [u8], lengths: &mut [usize]) -> Result<usize, ShmError> {
        if !self.is_receiving()? {
            return Ok(0);
        }
        let count = self.agreed.rx.pop_packed(buffer, lengths);
        let count = self.judge(count)?;
        self.received(count, !lengths.is_empty())
    }

    /// Receives octets. Returns how many, 0 when there are none for now.
    ///
    /// # Errors
    /// As [`recv`](Self::recv).
    pub fn read(&mut self, to: &mut [u8]) -> Result<usize, ShmError> {
        if !self.is_receiving()? {
            return Ok(0);
        }
        let count = self.agreed.rx.read(to);
        let count = self.judge(count)?;
        self.received(count, !to.is_empty())
    }

    /// Asks to be woken. `true`: sleep until [`fd`](Self::fd) is readable, then try again. `false`: there is something
    /// to do already (something to take, room, a death or a reset to learn of), so try again without sleeping.
    /// Costs two or three system calls; a wake-up may turn out to be for nothing.
    ///
    /// # Errors
    /// [`RingError::PeerMisbehaved`], [`RingError::MessageTooLong`] when the room asked for can never be.
    pub fn want_notify(&mut self, interest: Interest) -> Result<bool, ShmError> {
        self.forget_edges()?;
        self.service()?;
        match self.state {
            State::Poisoned(lie) => return Err(lie.into()),
            State::Gone | State::WasReset { .. } => return Ok(false),
            State::Resetting(_) => return Ok(true),
            State::Open => {}
        }
        let mut asleep = true;
        if interest.readable {
            let empty = self.agreed.rx.want_data();
            asleep &= self.judge(empty)?;
        }
        if let Some(len) = interest.writable {
            let full = self.agreed.tx.want_space(len);
            asleep &= self.judge(full)?;
        }
        Ok(asleep)
    }

    /// The descriptor to wait on: readable after a doorbell, and for good once the peer is gone. It is an epoll
    /// descriptor: poll it, or put it into another epoll, level or edge triggered; reading it makes no sense.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.poll.0.as_fd()
    }

    /// Asks to be woken and sleeps until there may be something to do, or `timeout` is over. Returns whether there may
    /// be something to do.
    ///
    /// # Errors
    /// As [`want_notify`](Self::want_notify).
    pub fn wait(&mut self, interest: Interest, timeout: Duration) -> Result<bool, ShmError> {
        Ok(!self.want_notify(interest)? || wait_readable(self.fd(), timeout)?)
    }

    /// Whether the peer holds its end. One system call.
    ///
    /// # Errors
    /// [`RingError::PeerMisbehaved`] when it lied, and a lie is not the answer to whether it lives.
    pub fn is_peer_alive(&mut self) -> Result<bool, ShmError> {
        self.service()?;
        match self.state {
            State::Poisoned(lie) => Err(lie.into()),
            state => Ok(state != State::Gone),
        }
    }

    /// What we put in and the peer has not taken. What it was copying out when it died counts as not taken.
    ///
    /// # Errors
    /// [`RingError::PeerMisbehaved`].
    pub fn in_flight(&mut self) -> Result<InFlight, ShmError> {
        if let State::Poisoned(lie) = self.state {
            return Err(lie.into());
        }
        let waiting = self.agreed.tx.in_flight();
        self.judge(waiting)
    }

    /// Begins to empty both rings and to enter the next generation. Returns what of ours is lost by it. Does not wait:
    /// until the peer agrees, nothing is sent or received, and [`is_resetting`](Self::is_resetting) is true. What the
    /// peer had sent and we had not taken is lost as well; it learns that from [`ShmError::Reset`].
    ///
    /// # Errors
    /// [`ShmError::PeerGone`], [`RingError::PeerMisbehaved`], [`ShmError::Os`] when the peer does not read its socket;
    /// the channel goes on in the old generation then.
    pub fn reset(&mut self) -> Result<InFlight, ShmError> {
        if !self.is_open()? {
            return Ok(InFlight::default());
        }
        let lost = self.in_flight()?;
        let generation = self.agreed.generation.wrapping_add(1);
        match Message::reset(Kind::Reset, generation).send(&self.agreed.socket, &[]) {
            Ok(()) => self.state = State::Resetting(generation),
            Err(ShmError::Closed(_)) => return Err(ShmError::PeerGone { in_flight: lost }),
            Err(error) => return Err(error),
        }
        Ok(lost)
    }

    /// Whether a reset of ours still waits for the peer. One system call while it does.
    ///
    /// # Errors
    /// [`RingError::PeerMisbehaved`].
    pub fn is_resetting(&mut self) -> Result<bool, ShmError> {
        if matches!(self.state, State::Resetting(_)) {
            self.service()?;
        }
        Ok(matches!(self.state, State::Resetting(_)))
    }

    /// The generation in force.
    pub fn generation(&self) -> u32 {
        self.agreed.generation
    }

    /// What the channel carries.
    pub fn mode(&self) -> Mode {
        self.agreed.tx.mode()
    }

    /// Octets of data in each direction's ring.
    pub fn ring_bytes(&self) -> u32 {
        self.agreed.tx.capacity()
    }

    /// Who connected, by the kernel's word.
    pub fn peer(&self) -> PeerCredentials {
        self.peer
    }

    /// What the channel did so far.
    pub fn stats(&self) -> ChannelStats {
        self.stats
    }

    fn sent(&mut self, count: usize) -> Result<usize, ShmError> {
        if count == 0 {
            self.nothing_moved()?;
            if self.state == State::Gone {
                return Err(self.gone());
            }
            return Ok(0);
        }
        self.quiet = 0;
        self.stats.sent += count as u64;
        if self.agreed.tx.must_notify() {
            self.ring_peer()?;
        }
        Ok(count)
    }

    fn received(&mut self, count: usize, wanted: bool) -> Result<usize, ShmError> {
        if count == 0 {
            if wanted {
                self.nothing_moved()?;
            }
            return self.nothing_received();
        }
        self.quiet = 0;
        self.stats.received += count as u64;
        if self.agreed.rx.must_notify() {
            self.ring_peer()?;
        }
        Ok(count)
    }

    /// Nothing there: the end of a dead peer's data, or just nothing yet. The peer may have published between our look
    /// at the ring and its death, so the ring is looked at once more.
    fn nothing_received(&mut self) -> Result<usize, ShmError> {
        if self.state == State::Gone {
            let empty = self.agreed.rx.is_empty();
            if self.judge(empty)? {
                return Err(self.gone());
            }
        }
        Ok(0)
    }

    /// Whether something can be sent: all is well, and the reset that was asked for is over.
    fn is_open(&mut self) -> Result<bool, ShmError> {
        match self.state {
            State::Open => Ok(true),
            State::Gone => Err(self.gone()),
            _ => self.settle(),
        }
    }

    /// Whether something can be received; also after the peer is gone.
    fn is_receiving(&mut self) -> Result<bool, ShmError> {
        match self.state {
            State::Open | State::Gone => Ok(true),
            _ => self.settle(),
        }
    }

    /// The rare states: says what happened to the channel once, and whether it works now.
    fn settle(&mut self) -> Result<bool, ShmError> {
        if matches!(self.state, State::Resetting(_)) {
            self.service()?;
        }
        match self.state {
            State::Open => Ok(true),
            State::Resetting(_) => Ok(false),
            State::Gone => Err(self.gone()),
            State::Poisoned(lie) => Err(lie.into()),
            State::WasReset { generation, lost } => {
                self.state = State::Open;
                Err(ShmError::Reset { generation, lost })
            }
        }
    }

    fn gone(&mut self) -> ShmError {
        self.in_flight()
            .map_or_else(|lie| lie, |in_flight| ShmError::PeerGone { in_flight })
    }

    fn nothing_moved(&mut self) -> Result<(), ShmError> {
        self.quiet += 1;
        if self.quiet >= QUIET_CALLS {
            self.quiet = 0;
            self.service()?;
        }
        Ok(())
    }

    /// Keeps a lie of the ring as the state of the channel.
    fn judge<T>(&mut self, outcome: Result<T, RingError>) -> Result<T, ShmError> {
        outcome.map_err(|error| {
            if matches!(error, RingError::PeerMisbehaved { .. }) {
                self.state = State::Poisoned(error);
            }
            error.into()
        })
    }

    fn ring_peer(&mut self) -> Result<(), ShmError> {
        self.stats.doorbells += 1;
        match self.agreed.peer_bell.ring() {
            Err(ShmError::Ring(lie)) => self.judge(Err(lie)),
            outcome => outcome,
        }
    }

    /// Looks at the socket: resets, their answers, the peer's death. Data and doorbells do not come this way.
    fn service(&mut self) -> Result<(), ShmError> {
        for _ in 0..CONTROL_BATCH {
            // What is over, or has to be said before anything else is heard.
            if matches!(
                self.state,
                State::Gone | State::Poisoned(_) | State::WasReset { .. }
            ) {
                break;
            }
            let mut octets = [0; MESSAGE_BYTES];
            match self.agreed.socket.receive(&mut octets)? {
                Received::Nothing => break,
                Received::Closed => self.state = State::Gone,
                Received::Message(MESSAGE_BYTES, descriptors) if descriptors.is_empty() => {
                    self.control(octets)?;
                }
                Received::Message(len, _) => return self.lie("control message length", len as u64),
            }
        }
        Ok(())
    }

    fn control(&mut self, octets: [u8; MESSAGE_BYTES]) -> Result<(), ShmError> {
        let Ok((kind, message)) = Message::parse(octets) else {
            return self.lie("control message", 0);
        };
        let generation = message.generation();
        if generation != self.agreed.generation.wrapping_add(1) {
            return self.lie("reset generation", generation.into());
        }
        match (kind, self.state) {
            // Our own reset and the peer's crossed: each is the other's answer.
            (Kind::Reset | Kind::ResetDone, State::Resetting(_)) => {
                self.enter(generation);
                self.state = State::Open;
                Ok(())
            }
            (Kind::Reset, _) => self.follow(generation),
            _ => self.lie("control message kind", kind as u64),
        }
    }

    /// The peer wants a reset and has stopped; enter the new generation, then let it go on.
    fn follow(&mut self, generation: u32) -> Result<(), ShmError> {
        let lost = self.in_flight()?;
        self.enter(generation);
        self.state = State::WasReset { generation, lost };
        match Message::reset(Kind::ResetDone, generation).send(&self.agreed.socket, &[]) {
            // Its death is noticed after the reset was said.
            Err(ShmError::Closed(_)) => Ok(()),
            outcome => outcome,
        }
    }

    fn enter(&mut self, generation: u32) {
        self.agreed.tx.restart(generation);
        self.agreed.rx.restart(generation);
        self.agreed.generation = generation;
        self.stats.resets += 1;
    }

    fn lie(&mut self, field: &'static str, value: u64) -> Result<(), ShmError> {
        self.judge(Err(RingError::PeerMisbehaved { field, value }))
    }

    /// Takes note of doorbells rung so far, so that only later ones wake us.
    fn forget_edges(&mut self) -> Result<(), ShmError> {
        let mut events = [EpollEvent::empty(); 2];
        match self.poll.wait(&mut events, EpollTimeout::ZERO) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(error) => Err(ShmError::os("epoll_wait")(error)),
        }
    }
}

pub(crate) fn peer_credentials(socket: impl AsFd) -> Result<PeerCredentials, ShmError> {
    let known = getsockopt(&socket.as_fd(), sockopt::PeerCredentials).map_err(ShmError::os("SO_PEERCRED"))?;
    Ok(PeerCredentials {
        pid: known.pid(),
        uid: known.uid(),
        gid: known.gid(),
    })
}
