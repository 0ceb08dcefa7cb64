//! The worker: the only place of the dataplane that reads a clock, waits, and touches ports.
//!
//! One turn carries out waiting commands, then takes up to [`BATCH`] frames from each port that has some and runs them to
//! completion, then flushes what was queued for transmission. Without work it sleeps until a port, a command or
//! a timer wakes it.

use std::time::{Duration, Instant};

use dpumesh_core::steering::{Group, SteeringRule};
use dpumesh_core::{Frame, MacAddr, PortRef, Vni};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::act::{self, set_macs};
use super::classify::{Classified, Path, RuleTables};
use super::guard::{self, Guarded};
use super::handle::{Command, EngineHandle, Mailbox, Readings, RuleChange, RuleReading, RulesChanged, pair};
use super::key::{Tunnels, flow_key, wide_key, zone};
use super::neighbour;
use super::offload::{FlowOffload, FlowOffloadLimits, Offer};
use super::port::{PortIndex, PortPolicy, Ports};
use super::rules::{CompiledRule, Numbering, Refused, Verdict, compile};
use super::stats::{DropReason, EngineStats, Tally};
use super::tx::{FramePool, Transmit};
use crate::flow::{ClassifierLimits, FlowKey, HashSeed, RuleCount, RuleIndex, Slot, Tick};
use crate::wire::{Headers, answer};

/// Frames per port and turn.
pub(super) const BATCH: usize = 32;
/// Groups that a packet may be classified in anew, after a step changed it.
const MAX_PASSES: usize = 4;
/// Length of a tick.
const TICK: Duration = Duration::from_millis(100);
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
    /// Different masks per group: the worst case of a classification.
    pub masks: usize,
    /// Matches per group; a rule with port ranges is several.
    pub matches: usize,
    /// Flows that the network processor holds.
    pub offload: FlowOffloadLimits,
    /// Secret seed of the hash tables: random, so that nobody can make flows collide.
    pub seed: u128,
}

impl EngineConfig {
    /// 65,536 flows remembered for a minute, 64 masks and 65,536 matches per group, no NP.
    pub fn new(seed: u128) -> Self {
        Self {
            flows: 1 << 16,
            flow_idle: Duration::from_secs(60),
            masks: 64,
            matches: 1 << 16,
            offload: FlowOffloadLimits::default(),
            seed,
        }
    }
}

/// The dataplane of one card, owned by one thread.
#[derive(Debug)]
pub struct Engine {
    mailbox: Mailbox,
    epoll: Epoll,
    started: Instant,
    resorted: Tick,
    ports: Ports,
    /// Open ports without a descriptor to wait for.
    polled: Vec<PortIndex>,
    /// Ports whose queue is to be written at the end of the turn.
    queued: Vec<PortIndex>,
    tunnels: Tunnels,
    tables: RuleTables,
    offload: FlowOffload,
    tally: Tally,
    pool: FramePool,
    batch: Batch,
}

/// The frames of one port in one turn, and what the stages found out about them.
#[derive(Debug)]
struct Batch {
    frames: Vec<Frame>,
    /// Frames that went on to the rules: index, headers, key.
    live: Vec<(usize, Headers)>,
    keys: Vec<FlowKey>,
    found: Vec<Option<Slot>>,
}

/// Where a frame stands before it is classified.
#[derive(Clone, Copy, Debug)]
struct Standing {
    group: Group,
    headers: Headers,
    key: FlowKey,
    /// Zone bits of the tunnel that it came out of; 0 without one.
    tunnel: u16,
    /// The key says everything that the answer depends on, the group included: it may be remembered.
    remember: bool,
    /// Where the answer is remembered.
    found: Option<Slot>,
}

impl Engine {
    /// An engine without ports and rules, and the handle by which it gets them.
    ///
    /// # Errors
    /// The kernel refused a descriptor.
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
        let engine = Self {
            mailbox,
            epoll,
            started: Instant::now(),
            resorted: Tick(0),
            ports: Ports::default(),
            polled: Vec::new(),
            queued: Vec::new(),
            tunnels: Tunnels::default(),
            tables: RuleTables::new(config.flows, idle, limits, seed, Tick(0)),
            offload: FlowOffload::new(config.offload),
            tally: Tally::default(),
            pool: FramePool::default(),
            batch: Batch {
                frames: (0..BATCH).map(|_| Frame::new()).collect(),
                live: Vec::with_capacity(BATCH),
                keys: Vec::with_capacity(BATCH),
                found: vec![None; BATCH],
            },
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
                self.take(PortIndex(event.data() as u16), now);
            }
            for at in 0..self.polled.len() {
                // A port that fails while it is read leaves the list.
                if let Some(port) = self.polled.get(at) {
                    self.take(*port, now);
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
        let frames = self.ports.indices().map(|port| self.take(port, now)).sum();
        self.flush();
        self.housekeeping(now);
        frames
    }

    fn now(&self) -> Tick {
        Tick((self.started.elapsed().as_millis() / TICK.as_millis()) as u32) // wraps after 13 years
    }

    /// rx: one batch of a port, run to completion. Returns how many frames came in.
    fn take(&mut self, port: PortIndex, now: Tick) -> usize {
        let slot = self.ports.get_mut(port);
        let Some(io) = slot.io.as_mut() else { return 0 };
        let received = match io.receive(&mut self.batch.frames) {
            Ok(received) => received.min(BATCH),
            Err(error) => {
                tracing::warn!(port = %slot.port, %error, "port closed: it cannot be read any more");
                self.close(port);
                return 0;
            }
        };
        if received == 0 {
            return 0;
        }
        let octets: usize = self.batch.frames[..received].iter().map(Frame::len).sum();
        slot.stats.rx_frames += received as u64;
        slot.stats.rx_octets += octets as u64;
        self.admit(port, received);
        self.look_up(port);
        self.decide(port, now);
        received
    }

    /// parse, guard, neighbour: leaves the frames that go on to the rules in `live`.
    fn admit(&mut self, port: PortIndex, received: usize) {
        self.batch.live.clear();
        for index in 0..received {
            let frame = &mut self.batch.frames[index];
            let Ok(headers) = Headers::parse(frame.octets()) else {
                self.drop(port, DropReason::Malformed);
                continue;
            };
            match guard::check(self.ports.get(port), &headers, &self.ports) {
                Guarded::Pass => self.batch.live.push((index, headers)),
                Guarded::Drop(reason) => self.drop(port, reason),
                Guarded::Neighbour => self.answer_neighbour(port, index, &headers),
            }
        }
    }

    fn answer_neighbour(&mut self, port: PortIndex, index: usize, headers: &Headers) {
        let frame = &self.batch.frames[index];
        let policy = self.ports.get(port).policy.as_ref();
        let mut reply = self.pool.take();
        if neighbour::answer(policy, frame, headers, &self.ports, &mut reply) {
            self.tally.totals.neighbours_answered += 1;
            self.enqueue(port, port, reply);
        } else {
            self.pool.give(reply);
            self.drop(port, DropReason::LinkLocal);
        }
    }

    /// lookup: the flow table, for all frames at once.
    fn look_up(&mut self, port: PortIndex) {
        let batch = &mut self.batch;
        batch.keys.clear();
        batch.keys.extend(
            batch
                .live
                .iter()
                .map(|(_, headers)| flow_key(headers, zone(port, 0))),
        );
        self.tables
            .lookup(&batch.keys, &mut batch.found[..batch.keys.len()]);
    }

    /// classify, act, offload: each frame to its end.
    fn decide(&mut self, port: PortIndex, now: Tick) {
        for at in 0..self.batch.live.len() {
            let (index, headers) = self.batch.live[at];
            let (key, found) = (self.batch.keys[at], self.batch.found[at]);
            let spare = self.pool.take();
            let frame = std::mem::replace(&mut self.batch.frames[index], spare);
            let standing = Standing {
                group: Group::default(),
                headers,
                key,
                tunnel: 0,
                remember: true,
                found,
            };
            self.send_on_its_way(port, frame, standing, now);
        }
    }

    /// Follows one frame through groups until it is queued or dropped.
    fn send_on_its_way(&mut self, ingress: PortIndex, mut frame: Frame, mut standing: Standing, now: Tick) {
        for _ in 0..MAX_PASSES {
            let path = match self.path(&standing, frame.mark, now) {
                Ok((path, slot)) => {
                    self.consider_offload(&path, slot);
                    path
                }
                Err(reason) => return self.discard(ingress, frame, reason),
            };
            let length = frame.len();
            self.tables.count(&path, packets_of(&frame), length as u64, now);
            let rule = self.tables.rule(path.last());
            let verdict = rule.verdict;
            let acted = match act::carry_out(&rule.steps, &mut frame, &standing.headers) {
                Ok(acted) => acted,
                Err(reason) => return self.discard(ingress, frame, reason),
            };
            let next = match verdict {
                Verdict::Drop => return self.discard(ingress, frame, DropReason::Rule),
                Verdict::Forward(egress) => {
                    let outer = if acted.encapsulated {
                        frame.len() - length
                    } else {
                        0
                    };
                    let sender = (standing.headers.eth_src, standing.headers.eth_dst);
                    return self.forward(ingress, egress, frame, outer, sender);
                }
                Verdict::Punt => return self.punt(ingress, frame),
                Verdict::Jump(next) => next,
            };
            standing = match self.stand_anew(ingress, &frame, acted, &standing, next) {
                Ok(standing) => standing,
                Err(reason) => return self.discard(ingress, frame, reason),
            };
        }
        self.discard(ingress, frame, DropReason::TooManyGroups);
    }

    /// The rules for a frame: from the flow table, or classified now.
    fn path(&mut self, at: &Standing, mark: u32, now: Tick) -> Result<(Path, Option<Slot>), DropReason> {
        if let Some(slot) = at.found
            && let Some((path, offloaded)) = self.tables.hit(slot, now)
        {
            self.tally.totals.flow_hits += 1;
            self.tally.totals.offload_hits += u64::from(offloaded);
            return Ok((path, Some(slot)));
        }
        self.tally.totals.flow_misses += 1;
        match self.tables.classify(
            at.group,
            &wide_key(&at.headers, at.key, mark),
            at.key,
            now,
            at.remember,
        ) {
            Classified::Path(path, slot) => Ok((path, slot)),
            Classified::Miss => Err(DropReason::NoRule),
            Classified::TooLong => Err(DropReason::TooManyGroups),
        }
    }

    /// Where a frame stands that is to be classified again. What came out of a tunnel is guarded again: its inner
    /// source may be no local pod's either.
    fn stand_anew(
        &mut self,
        ingress: PortIndex,
        frame: &Frame,
        mut acted: act::Acted,
        before: &Standing,
        group: Group,
    ) -> Result<Standing, DropReason> {
        let headers = *acted.headers(frame)?;
        let Some(vni) = acted.tunnel else {
            let tunnel = if acted.encapsulated { 0 } else { before.tunnel };
            let key = flow_key(&headers, zone(ingress, tunnel));
            return Ok(Standing {
                group,
                headers,
                key,
                tunnel,
                remember: false,
                found: None,
            });
        };
        match guard::check(self.ports.get(ingress), &headers, &self.ports) {
            Guarded::Pass => {}
            Guarded::Neighbour => return Err(DropReason::LinkLocal),
            Guarded::Drop(reason) => return Err(reason),
        }
        let tunnel = self.tunnels.of(vni);
        let key = flow_key(&headers, zone(ingress, tunnel));
        let remember = self.tunnels.is_home(tunnel, group);
        let found = if remember {
            self.tables.lookup_one(&key)
        } else {
            None
        };
        Ok(Standing {
            group,
            headers,
            key,
            tunnel,
            remember,
            found,
        })
    }

    /// offload: a flow that is only forwarded may be the network processor's from now on.
    fn consider_offload(&mut self, path: &Path, slot: Option<Slot>) {
        let Some(slot) = slot else { return };
        if !matches!(self.tables.rule(path.last()).verdict, Verdict::Forward(_)) {
            return;
        }
        let Some((packets, false)) = self.tables.packets(slot) else {
            return;
        };
        match self.offload.offer(packets) {
            Offer::TooYoung => {}
            Offer::Taken => self.tables.mark_offloaded(slot),
            Offer::Refused => self.tally.totals.offloads_refused += 1,
        }
    }

    /// The frame goes to the proxy, with the identity of the port it came in on.
    fn punt(&mut self, ingress: PortIndex, mut frame: Frame) {
        let identity = match &self.ports.get(ingress).policy {
            Some(PortPolicy::Vf { ingress, .. } | PortPolicy::Uplink { ingress, .. }) => *ingress,
            _ => return self.discard(ingress, frame, DropReason::NotAdmitted),
        };
        let Some((stack, mac)) = self.ports.open_stack() else {
            return self.reset(ingress, frame);
        };
        set_macs(&mut frame, mac.0, identity.to_mac());
        self.tally.totals.punted += 1;
        self.enqueue(ingress, stack, frame);
    }

    /// No stack is there to punt to: closed, and the sender is told rather than left hanging.
    fn reset(&mut self, ingress: PortIndex, frame: Frame) {
        let mut reply = self.pool.take();
        let headers = Headers::parse(frame.octets());
        if headers.is_ok_and(|headers| answer::reset(&frame, &headers, &mut reply).is_ok()) {
            self.tally.totals.resets_sent += 1;
            self.enqueue(ingress, ingress, reply);
        } else {
            self.pool.give(reply);
        }
        self.discard(ingress, frame, DropReason::EgressClosed);
    }

    /// The frame leaves by a port, unless it is too long for it: then its sender is told. `sender` are source and
    /// destination MAC as they were before any rule rewrote them: the way back.
    fn forward(
        &mut self,
        ingress: PortIndex,
        egress: PortIndex,
        frame: Frame,
        outer: usize,
        sender: (MacAddr, MacAddr),
    ) {
        let limits = self.ports.get(egress).limits;
        if super::tx::fits(&frame, limits.mtu) {
            return self.enqueue(ingress, egress, frame);
        }
        let mut reply = self.pool.take();
        if super::tx::too_big(&frame, outer, limits.mtu, &mut reply) {
            set_macs(&mut reply, sender.0.0, sender.1.0);
            self.tally.totals.too_big_sent += 1;
            self.enqueue(ingress, ingress, reply);
        } else {
            self.pool.give(reply);
        }
        self.discard(ingress, frame, DropReason::Mtu);
    }

    fn enqueue(&mut self, ingress: PortIndex, egress: PortIndex, frame: Frame) {
        let from_network = matches!(self.ports.get(ingress).policy, Some(PortPolicy::Uplink { .. }));
        let port = self.ports.get_mut(egress);
        if port.io.is_none() {
            return self.discard(ingress, frame, DropReason::EgressClosed);
        }
        if port.queue.is_empty() {
            self.queued.push(egress);
        }
        port.coalesce |= from_network;
        port.queue.push(frame);
    }

    fn discard(&mut self, ingress: PortIndex, frame: Frame, reason: DropReason) {
        self.pool.give(frame);
        self.drop(ingress, reason);
    }

    fn drop(&mut self, ingress: PortIndex, reason: DropReason) {
        self.ports.get_mut(ingress).stats.dropped += 1;
        self.tally.drop(reason);
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

    fn close(&mut self, index: PortIndex) {
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
        let offload = &mut self.offload;
        self.tables.age(now, || offload.gone());
        if now.since(self.resorted) >= 100 {
            self.resorted = now;
            self.tables.resort();
        }
    }

    /// Carries out waiting commands; false when one of them was to stop.
    fn commands(&mut self, now: Tick) -> bool {
        while let Ok(command) = self.mailbox.commands.try_recv() {
            match command {
                Command::Stop => return false,
                // A caller that no longer waits for its answer is no error.
                Command::OpenPort { io, done } => {
                    let _ = done.send(self.open(io));
                }
                Command::ClosePort { port, done } => {
                    if let Some(index) = self.ports.index(port) {
                        self.close(index);
                    }
                    let _ = done.send(());
                }
                Command::SetPolicy { port, policy, done } => {
                    let _ = done.send(self.set_policy(port, policy));
                }
                Command::Rules { changes, done } => {
                    let _ = done.send(self.change_rules(changes, now));
                }
                Command::Counters { slots, done } => {
                    let _ = done.send(self.read(&slots, now));
                }
                Command::Stats { done } => {
                    let _ = done.send(self.stats());
                }
            }
        }
        true
    }

    fn open(&mut self, io: Box<dyn dpumesh_core::PortIo>) -> bool {
        let Some(index) = self.ports.intern(io.port()) else {
            return false;
        };
        self.close(index);
        match io.poll_fd() {
            None => self.polled.push(index),
            Some(fd) => {
                let event = EpollEvent::new(EpollFlags::EPOLLIN, u64::from(index.0));
                if let Err(error) = self.epoll.add(fd, event) {
                    tracing::warn!(port = %io.port(), %error, "port not opened: its descriptor cannot be polled");
                    return false;
                }
            }
        }
        let port = self.ports.get_mut(index);
        port.limits = io.limits();
        port.io = Some(io);
        true
    }

    fn set_policy(&mut self, port: PortRef, policy: Option<PortPolicy>) -> bool {
        self.ports
            .intern(port)
            .is_some_and(|index| self.ports.set_policy(index, policy))
    }

    /// All or none.
    fn change_rules(&mut self, changes: Vec<RuleChange>, now: Tick) -> RulesChanged {
        let mut readings = Readings::new();
        let mut done: Vec<Undo> = Vec::with_capacity(changes.len());
        let mut refused = None;
        for (at, change) in changes.into_iter().enumerate() {
            match change {
                RuleChange::Install { slot, rule } => match self.install(RuleIndex(slot), &rule, now) {
                    Ok(()) => done.push(Undo::Uninstall(RuleIndex(slot))),
                    Err(refusal) => {
                        refused = Some((at, refusal));
                        break;
                    }
                },
                RuleChange::Uninstall { slot } => {
                    let removed = self.uninstall(RuleIndex(slot));
                    let count = removed.as_ref().map(|(_, count)| *count).unwrap_or_default();
                    readings.push((slot, reading(count, now)));
                    done.extend(removed.map(|(rule, count)| Undo::Reinstall(RuleIndex(slot), rule, count)));
                }
            }
        }
        if refused.is_some() {
            self.undo(done);
        }
        self.tables.forget_flows();
        self.offload.clear();
        self.tunnels.sweep();
        refused.map_or(Ok(readings), Err)
    }

    fn undo(&mut self, done: Vec<Undo>) {
        for step in done.into_iter().rev() {
            match step {
                Undo::Uninstall(slot) => drop(self.uninstall(slot)),
                Undo::Reinstall(slot, rule, count) => {
                    let held = rule.vni;
                    match self.tables.reinstall(slot, rule, count) {
                        Ok(()) => held.into_iter().for_each(|vni| self.tunnels.hold(vni)),
                        Err(refused) => {
                            tracing::error!(slot = slot.0, %refused, "a rule that was installed is refused")
                        }
                    }
                }
            }
        }
    }

    fn install(&mut self, slot: RuleIndex, rule: &SteeringRule, now: Tick) -> Result<(), Refused> {
        let mut numbers = Numbers {
            ports: &mut self.ports,
            tunnels: &mut self.tunnels,
        };
        let compiled = compile(rule, slot, &mut numbers)?;
        self.tables.install(slot, compiled, now)?;
        rule.pattern
            .vni
            .into_iter()
            .for_each(|vni| self.tunnels.hold(vni));
        Ok(())
    }

    fn uninstall(&mut self, slot: RuleIndex) -> Option<(CompiledRule, RuleCount)> {
        let removed = self.tables.uninstall(slot);
        removed
            .iter()
            .filter_map(|(rule, _)| rule.vni)
            .for_each(|vni| self.tunnels.release(vni));
        removed
    }

    fn read(&self, slots: &[u32], now: Tick) -> Readings {
        let counted = slots
            .iter()
            .filter_map(|slot| Some((*slot, self.tables.counter(RuleIndex(*slot))?)));
        counted.map(|(slot, count)| (slot, reading(count, now))).collect()
    }

    fn stats(&self) -> EngineStats {
        let mut stats = self.tally.snapshot();
        stats.ports = self
            .ports
            .iter()
            .map(|(_, port)| (port.port, port.stats))
            .collect();
        stats.flows = self.tables.flows() as u64;
        stats.flows_offloaded = u64::from(self.offload.used());
        stats
    }
}

/// How one change of the rules is taken back.
enum Undo {
    Uninstall(RuleIndex),
    /// With the count that it had.
    Reinstall(RuleIndex, CompiledRule, RuleCount),
}

/// Frames that a frame stands for.
fn packets_of(frame: &Frame) -> u64 {
    match frame.gso {
        None => 1,
        Some(gso) => {
            let payload = frame.len().saturating_sub(usize::from(gso.header_len));
            (payload.div_ceil(usize::from(gso.size.max(1)))).max(1) as u64
        }
    }
}

fn reading(count: RuleCount, now: Tick) -> RuleReading {
    let idle_ms = count
        .last_hit
        .map(|last| u64::from(now.since(last)) * TICK.as_millis() as u64);
    RuleReading {
        packets: count.packets,
        octets: count.octets,
        idle_ms,
    }
}

/// Numbers that rules need, from the engine's tables.
struct Numbers<'a> {
    ports: &'a mut Ports,
    tunnels: &'a mut Tunnels,
}

impl Numbering for Numbers<'_> {
    fn port(&mut self, port: PortRef) -> Option<PortIndex> {
        self.ports.intern(port)
    }

    fn tunnel(&mut self, vni: Vni) -> Option<u16> {
        self.tunnels.intern(vni)
    }
}
