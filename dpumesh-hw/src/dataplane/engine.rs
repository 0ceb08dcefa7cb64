//! The worker: the only place of the dataplane that reads a clock, waits, and touches ports.
//!
//! One turn carries out waiting commands, then takes up to [`BATCH`] frames from each port that has some and runs them to
//! completion, then flushes what was queued for transmission. Without work it sleeps until a port, a command or
//! a timer wakes it.

use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::classify::RuleTables;
use super::handle::{EngineHandle, Mailbox, pair};
use super::key::Tunnels;
use super::offload::{FlowOffload, FlowOffloadLimits};
use super::port::{ANSWERS_PER_TICK, PortIndex, Ports};
use super::stages::Batch;
use super::stats::{DropReason, Tally};
use super::tx::{FramePool, Transmit};
use crate::flow::{ClassifierLimits, HashSeed, TableError, Tick};

/// Frames per port and turn.
pub(super) const BATCH: usize = 32;
/// Length of a tick.
pub(super) const TICK: Duration = Duration::from_millis(100);
/// Longest sleep: ageing goes on in an idle dataplane as well.
const NAP: Duration = Duration::from_secs(1);
/// Wake-up data of the command descriptor; ports use their index.
const WAKE: u64 = u64::MAX;

/// Sizes of an engine.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Flows remembered, 1 to 2^30. Each takes about 80 octets, allocated at the start.
    pub flows: u32,
    /// How long a flow is remembered without a packet.
    pub flow_idle: Duration,
    /// Different masks per group: the worst case of a classification. More than the card holds, so that rules which it has
    /// no mask for can run in software.
    pub masks: usize,
    /// Matches per group; a rule with port ranges is several.
    pub matches: usize,
    /// Flows that the network processor holds.
    pub offload: FlowOffloadLimits,
    /// Secret seed of the hash tables: random, so that nobody can make flows collide.
    pub seed: u128,
}

impl EngineConfig {
    /// 65,536 flows remembered for a minute, 128 masks and 65,536 matches per group, no NP.
    pub fn new(seed: u128) -> Self {
        Self {
            flows: 1 << 16,
            flow_idle: Duration::from_secs(60),
            masks: 128,
            matches: 1 << 16,
            offload: FlowOffloadLimits::default(),
            seed,
        }
    }
}

/// The dataplane of one card, owned by one thread.
#[derive(Debug)]
pub struct Engine {
    pub(super) mailbox: Mailbox,
    pub(super) epoll: Epoll,
    pub(super) started: Instant,
    pub(super) resorted: Tick,
    /// The last tick in which there was a turn.
    pub(super) ticked: Tick,
    pub(super) ports: Ports,
    /// Open ports without a descriptor to wait for.
    pub(super) polled: Vec<PortIndex>,
    /// Ports whose queue is to be written at the end of the turn.
    pub(super) queued: Vec<PortIndex>,
    pub(super) tunnels: Tunnels,
    pub(super) tables: RuleTables,
    pub(super) offload: FlowOffload,
    pub(super) tally: Tally,
    pub(super) pool: FramePool,
    pub(super) batch: Batch,
}

impl Engine {
    /// An engine without ports and rules, and the handle by which it gets them.
    ///
    /// # Errors
    /// `EINVAL`: [`EngineConfig::flows`] is out of its range; `ENOMEM`: so many do not fit the memory; else the kernel
    /// refused a descriptor.
    pub fn new(config: &EngineConfig) -> nix::Result<(Self, EngineHandle)> {
        let (handle, mailbox) = pair()?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(&mailbox.wake, EpollEvent::new(EpollFlags::EPOLLIN, WAKE))?;
        let limits = ClassifierLimits {
            masks: config.masks,
            rules: config.matches,
        };
        let idle =
            (config.flow_idle.as_millis() / TICK.as_millis()).clamp(1, u128::from(u32::MAX / 4)) as u32;
        let seed = HashSeed::new(config.seed);
        let tables = RuleTables::new(config.flows, idle, limits, seed, Tick(0)).map_err(|error| {
            tracing::error!(%error, "no engine");
            match error {
                TableError::Limit { .. } => Errno::EINVAL,
                TableError::Memory { .. } => Errno::ENOMEM,
            }
        })?;
        let engine = Self {
            mailbox,
            epoll,
            started: Instant::now(),
            resorted: Tick(0),
            ticked: Tick(0),
            ports: Ports::default(),
            polled: Vec::new(),
            queued: Vec::new(),
            tunnels: Tunnels::default(),
            tables,
            offload: FlowOffload::new(config.offload),
            tally: Tally::default(),
            pool: FramePool::default(),
            batch: Batch::new(),
        };
        Ok((engine, handle))
    }

    /// Works until [`EngineHandle::stop`]. Blocks the calling thread; while a port is open that has no descriptor to wait
    /// for, it never sleeps.
    ///
    /// # Errors
    /// Waiting failed; ports are closed then.
    pub fn run(mut self) -> nix::Result<()> {
        let mut events = [EpollEvent::empty(); 64];
        let nap = EpollTimeout::try_from(NAP).unwrap_or(EpollTimeout::ZERO); // a second fits
        loop {
            let nap = if self.polled.is_empty() {
                nap
            } else {
                EpollTimeout::ZERO
            };
            let ready = match self.epoll.wait(&mut events, nap) {
                Ok(ready) => ready,
                Err(Errno::EINTR) => 0,
                Err(error) => return Err(error),
            };
            let now = self.now();
            if events[..ready].iter().any(|event| event.data() == WAKE) {
                let _ = self.mailbox.wake.read(); // before the commands are read: one sent later wakes again
                if !self.commands(now) {
                    return Ok(());
                }
            }
            for event in events[..ready].iter().filter(|event| event.data() != WAKE) {
                self.serve(PortIndex(event.data() as u16), now);
            }
            for at in 0..self.polled.len() {
                // A port that fails while it is read leaves the list.
                if let Some(port) = self.polled.get(at) {
                    self.serve(*port, now);
                }
            }
            self.flush();
            self.housekeeping(now);
        }
    }

    /// Carries out waiting commands and one batch of every port, without waiting; returns how many frames came in.
    /// For callers that have a loop of their own (to which [`EngineHandle::stop`] means nothing), and for tests and
    /// benches.
    pub fn turn(&mut self) -> usize {
        let now = self.now();
        self.commands(now);
        let frames = self.ports.indices().map(|port| self.serve(port, now)).sum();
        self.flush();
        self.housekeeping(now);
        frames
    }

    fn now(&self) -> Tick {
        Tick((self.started.elapsed().as_millis() / TICK.as_millis()) as u32) // wraps after 13 years
    }

    /// One batch of a port; returns how many frames came in.
    fn serve(&mut self, port: PortIndex, now: Tick) -> usize {
        if self.pool.is_used_up() {
            self.flush();
        }
        self.take(port, now)
    }

    /// tx: everything queued in this turn.
    fn flush(&mut self) {
        while let Some(index) = self.queued.pop() {
            let port = self.ports.get_mut(index);
            let mut transmit = Transmit {
                pool: &mut self.pool,
                tally: &mut self.tally,
            };
            if let Err(error) = transmit.flush(port) {
                tracing::warn!(port = %port.port, %error, "port closed: it cannot be written any more");
                self.close(index);
            }
        }
    }

    pub(super) fn close(&mut self, index: PortIndex) {
        let port = self.ports.get_mut(index);
        let Some(io) = port.io.take() else { return };
        if let Some(fd) = io.poll_fd() {
            let _ = self.epoll.delete(fd); // fails only for a descriptor that the kernel has closed already
        } else {
            self.polled.retain(|polled| *polled != index);
        }
        self.tally.drops[DropReason::EgressClosed as usize] += port.queue.len() as u64;
        self.pool.give_all(&mut port.queue);
    }

    fn housekeeping(&mut self, now: Tick) {
        if now != self.ticked {
            self.ticked = now;
            for index in self.ports.indices() {
                self.ports.get_mut(index).answers_left = ANSWERS_PER_TICK;
            }
        }
        let offload = &mut self.offload;
        self.tables.age(now, || offload.gone());
        if now.since(self.resorted) >= 100 {
            self.resorted = now;
            self.tables.resort();
        }
    }
}
