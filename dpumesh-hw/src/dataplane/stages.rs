//! One batch of a port, stage by stage: rx, parse, guard, neighbour, lookup, classify, act, offload. What leaves is in the
//! queues of its ports then; `tx` writes them at the end of the turn.

use dpumesh_core::steering::Group;
use dpumesh_core::{Frame, MacAddr, Mtu};

use super::act::{self, set_macs};
use super::classify::{Classified, Load};
use super::engine::{BATCH, Engine};
use super::guard::{self, Guarded};
use super::key::{flow_key, wide_key, zone};
use super::neighbour;
use super::offload::Offer;
use super::port::{PortIndex, PortPolicy};
use super::rules::Verdict;
use super::stats::DropReason;
use super::tx;
use crate::flow::{FlowKey, RuleIndex, Slot, Tick};
use crate::wire::{Fragments, Headers, L3, Malformed, answer, checksum};

/// Groups that a packet may be classified in anew, after a step changed it.
const MAX_PASSES: usize = 4;

/// The frames of one port in one turn, and what the stages found out about them.
#[derive(Debug, Default)]
pub(super) struct Batch {
    frames: Vec<Frame>,
    parsed: Vec<Result<Headers, Malformed>>,
    /// Indices of the frames that went on to the rules, and of each its key and its flow.
    live: Vec<usize>,
    keys: Vec<FlowKey>,
    found: Vec<Option<Slot>>,
}

impl Batch {
    pub(super) fn new() -> Self {
        Self {
            frames: (0..BATCH).map(|_| Frame::new()).collect(),
            parsed: Vec::with_capacity(BATCH),
            live: Vec::with_capacity(BATCH),
            keys: Vec::with_capacity(BATCH),
            found: vec![None; BATCH],
        }
    }
}

/// Where a frame stands before it is classified.
#[derive(Clone, Copy, Debug)]
struct Standing {
    group: Group,
    key: FlowKey,
    /// Zone bits of the tunnel that it came out of; 0 without one.
    tunnel: u16,
    /// The key says everything that the answer depends on, the group included: it may be remembered.
    remember: bool,
    /// Where the answer is remembered.
    found: Option<Slot>,
}

/// What is needed to tell a sender that its packet is too big for the way.
#[derive(Clone, Copy, Debug)]
struct WayBack {
    /// Source and destination MAC as the frame came in with them.
    macs: (MacAddr, MacAddr),
    /// Octets of outer headers in front, which are ours and not the sender's.
    outer: usize,
    /// The frame came out of a tunnel: its sender is not on the ingress port's link.
    tunnelled: bool,
}

impl Engine {
    /// rx: one batch of a port, run to completion. Returns how many frames came in.
    pub(super) fn take(&mut self, port: PortIndex, now: Tick) -> usize {
        let mut batch = std::mem::take(&mut self.batch);
        let received = self.receive(port, &mut batch.frames);
        if received > 0 {
            self.admit(port, &mut batch, received);
            self.look_up(port, &mut batch);
            self.decide(port, &mut batch, now);
        }
        self.batch = batch;
        received
    }

    fn receive(&mut self, index: PortIndex, frames: &mut [Frame]) -> usize {
        let port = self.ports.get_mut(index);
        let Some(io) = port.io.as_mut() else { return 0 };
        match io.receive(frames) {
            Ok(received) => {
                let received = received.min(frames.len());
                let octets: usize = frames[..received].iter().map(Frame::len).sum();
                port.stats.rx_frames += received as u64;
                port.stats.rx_octets += octets as u64;
                received
            }
            Err(error) => {
                tracing::warn!(port = %port.port, %error, "port closed: it cannot be read any more");
                self.close(index);
                0
            }
        }
    }

    /// parse, guard, neighbour: leaves the frames that go on to the rules in `live`.
    fn admit(&mut self, port: PortIndex, batch: &mut Batch, received: usize) {
        batch.parsed.clear();
        batch.live.clear();
        let frames = &batch.frames[..received];
        batch
            .parsed
            .extend(frames.iter().map(|frame| Headers::parse(frame.octets())));
        for (index, parsed) in batch.parsed.iter().enumerate() {
            let Ok(headers) = parsed else {
                self.drop(port, DropReason::Malformed);
                continue;
            };
            match guard::check(self.ports.get(port), headers, &self.ports) {
                Guarded::Pass => batch.live.push(index),
                Guarded::Drop(reason) => self.drop(port, reason),
                Guarded::Neighbour => self.answer_neighbour(port, &batch.frames[index], headers),
            }
        }
    }

    fn answer_neighbour(&mut self, port: PortIndex, frame: &Frame, headers: &Headers) {
        let policy = self.ports.get(port).policy.as_ref();
        let mut reply = self.pool.take();
        let answered = neighbour::answer(policy, frame, headers, &self.ports, &mut reply);
        if answered && self.may_answer(port) {
            self.tally.totals.neighbours_answered += 1;
            self.enqueue(port, port, &mut reply);
        } else {
            self.drop(port, DropReason::LinkLocal);
        }
        self.pool.give(reply);
    }

    /// lookup: the flow table, for all frames at once.
    fn look_up(&mut self, port: PortIndex, batch: &mut Batch) {
        batch.keys.clear();
        for headers in batch
            .live
            .iter()
            .filter_map(|index| batch.parsed[*index].as_ref().ok())
        {
            batch.keys.push(flow_key(headers, zone(port, 0)));
        }
        self.tables
            .lookup(&batch.keys, &mut batch.found[..batch.keys.len()]);
    }

    /// classify, act, offload: each frame to its end.
    fn decide(&mut self, port: PortIndex, batch: &mut Batch, now: Tick) {
        let found = batch.keys.iter().zip(&batch.found);
        for (index, (key, found)) in batch.live.iter().zip(found) {
            let Ok(headers) = &batch.parsed[*index] else {
                continue;
            };
            let standing = Standing {
                group: Group::default(),
                key: *key,
                tunnel: 0,
                remember: true,
                found: *found,
            };
            if let Err(reason) = self.send_on_its_way(port, &mut batch.frames[*index], headers, standing, now)
            {
                self.drop(port, reason);
            }
        }
    }

    /// Follows one frame through groups until it is queued.
    ///
    /// # Errors
    /// It is dropped; what remains of it may be overwritten.
    fn send_on_its_way(
        &mut self,
        ingress: PortIndex,
        frame: &mut Frame,
        headers: &Headers,
        mut standing: Standing,
        now: Tick,
    ) -> Result<(), DropReason> {
        let (mut headers, mut changed) = (headers, None);
        let mut back = WayBack {
            macs: (headers.eth_src, headers.eth_dst),
            outer: 0,
            tunnelled: false,
        };
        for _ in 0..MAX_PASSES {
            let load = Load {
                packets: packets_of(frame),
                octets: frame.len() as u64,
                now,
            };
            let rule = self.rule_for(&standing, headers, frame.mark, load)?;
            let rule = self.tables.rule(rule);
            let verdict = rule.verdict;
            let acted = act::carry_out(&rule.steps, frame, headers)?;
            back.outer = acted.outer.unwrap_or(back.outer);
            back.tunnelled |= acted.decapsulated;
            let next = match verdict {
                Verdict::Drop => return Err(DropReason::Rule),
                Verdict::Forward(egress) => return self.forward(ingress, egress, frame, back),
                Verdict::Punt => return self.punt(ingress, frame),
                Verdict::Jump(next) => next,
            };
            if let Some(now) = acted.new_headers(frame)? {
                headers = changed.insert(now);
            }
            standing = self.stand_anew(ingress, headers, acted, standing.tunnel, next)?;
        }
        Err(DropReason::TooManyGroups)
    }

    /// The rule for a frame: from the flow table, or classified now.
    fn rule_for(
        &mut self,
        at: &Standing,
        headers: &Headers,
        mark: u32,
        load: Load,
    ) -> Result<RuleIndex, DropReason> {
        let known = at
            .found
            .and_then(|slot| Some((slot, self.tables.hit(slot, load)?)));
        let (rule, slot) = match known {
            Some((slot, (rule, offloaded))) => {
                self.tally.totals.flow_hits += 1;
                self.tally.totals.offload_hits += u64::from(offloaded);
                (rule, Some(slot))
            }
            None => {
                self.tally.totals.flow_misses += 1;
                let wide = wide_key(headers, at.key, mark);
                match self.tables.classify(at.group, &wide, at.key, load, at.remember) {
                    Classified::Rule(rule, slot) => (rule, slot),
                    Classified::Miss => return Err(DropReason::NoRule),
                    Classified::TooLong => return Err(DropReason::TooManyGroups),
                }
            }
        };
        if let Some(slot) = slot
            && self.offload.is_there()
        {
            self.consider_offload(rule, slot);
        }
        Ok(rule)
    }

    /// Where a frame stands that is to be classified again. What came out of a tunnel is guarded again: its inner
    /// source may be no local pod's either.
    fn stand_anew(
        &mut self,
        ingress: PortIndex,
        headers: &Headers,
        acted: act::Acted,
        tunnel: u16,
        group: Group,
    ) -> Result<Standing, DropReason> {
        let Some(vni) = acted.tunnel else {
            let tunnel = if acted.outer.is_some() { 0 } else { tunnel };
            let key = flow_key(headers, zone(ingress, tunnel));
            return Ok(Standing {
                group,
                key,
                tunnel,
                remember: false,
                found: None,
            });
        };
        match guard::check(self.ports.get(ingress), headers, &self.ports) {
            Guarded::Pass => {}
            Guarded::Neighbour => return Err(DropReason::LinkLocal),
            Guarded::Drop(reason) => return Err(reason),
        }
        let tunnel = self.tunnels.of(vni);
        let key = flow_key(headers, zone(ingress, tunnel));
        let remember = self.tunnels.is_home(tunnel, group);
        let found = if remember {
            self.tables.lookup_one(&key)
        } else {
            None
        };
        Ok(Standing {
            group,
            key,
            tunnel,
            remember,
            found,
        })
    }

    /// offload: a flow that is only forwarded may be the network processor's from now on.
    fn consider_offload(&mut self, rule: RuleIndex, slot: Slot) {
        if !matches!(self.tables.rule(rule).verdict, Verdict::Forward(_)) {
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
    fn punt(&mut self, ingress: PortIndex, frame: &mut Frame) -> Result<(), DropReason> {
        let identity = match &self.ports.get(ingress).policy {
            Some(PortPolicy::Vf { ingress, .. } | PortPolicy::Uplink { ingress, .. }) => *ingress,
            _ => return Err(DropReason::NotAdmitted),
        };
        let Some((stack, mac)) = self.ports.open_stack() else {
            self.reset(ingress, frame);
            return Err(DropReason::EgressClosed);
        };
        set_macs(frame, mac.0, identity.to_mac());
        self.tally.totals.punted += 1;
        self.enqueue(ingress, stack, frame);
        Ok(())
    }

    /// No stack is there to punt to: closed, and the sender is told rather than left hanging.
    fn reset(&mut self, ingress: PortIndex, frame: &Frame) {
        let mut reply = self.pool.take();
        let headers = Headers::parse(frame.octets());
        let made = headers.is_ok_and(|headers| answer::reset(frame, &headers, &mut reply).is_ok());
        if made && self.may_answer(ingress) {
            self.tally.totals.resets_sent += 1;
            self.enqueue(ingress, ingress, &mut reply);
        }
        self.pool.give(reply);
    }

    /// Whether one more frame of our own may go out by a port in this tick.
    fn may_answer(&mut self, port: PortIndex) -> bool {
        let left = &mut self.ports.get_mut(port).answers_left;
        if *left == 0 {
            self.tally.totals.answers_withheld += 1;
            return false;
        }
        *left -= 1;
        true
    }

    /// The frame leaves by a port, unless it is too long for it: then its sender is told, if it can be.
    fn forward(
        &mut self,
        ingress: PortIndex,
        egress: PortIndex,
        frame: &mut Frame,
        back: WayBack,
    ) -> Result<(), DropReason> {
        let port = self.ports.get(egress);
        if port.io.is_none() {
            return Err(DropReason::EgressClosed);
        }
        let mtu = port.limits.mtu;
        if tx::fits(frame, mtu) {
            self.enqueue(ingress, egress, frame);
            return Ok(());
        }
        if back.outer == 0 && self.fragment(ingress, egress, frame, mtu) {
            return Ok(());
        }
        if back.tunnelled {
            return Err(DropReason::Mtu);
        }
        let mut reply = self.pool.take();
        if tx::too_big(frame, back.outer, mtu, &mut reply) && self.may_answer(ingress) {
            set_macs(&mut reply, back.macs.0.0, back.macs.1.0);
            self.tally.totals.too_big_sent += 1;
            self.enqueue(ingress, ingress, &mut reply);
        }
        self.pool.give(reply);
        Err(DropReason::Mtu)
    }

    /// Sends a packet in fragments, if it is one that may be sent so.
    fn fragment(&mut self, ingress: PortIndex, egress: PortIndex, frame: &mut Frame, mtu: Mtu) -> bool {
        let headers = Headers::parse(frame.octets());
        let may_be = headers.is_ok_and(|headers| headers.l3 == L3::Ipv4 && !headers.dont_fragment);
        if !may_be || checksum::complete(frame).is_err() {
            return false;
        }
        let Some(mut fragments) = Fragments::of(frame, mtu) else {
            return false;
        };
        let (mut fragment, mut sent) = (self.pool.take(), 0_u64);
        while fragments.next_into(&mut fragment) {
            self.enqueue(ingress, egress, &mut fragment);
            sent += 1;
        }
        self.pool.give(fragment);
        self.tally.totals.fragmented += sent.saturating_sub(1);
        true
    }

    /// Puts a frame into the queue of an open port, and an empty one in its place.
    fn enqueue(&mut self, ingress: PortIndex, egress: PortIndex, frame: &mut Frame) {
        let from_network = matches!(self.ports.get(ingress).policy, Some(PortPolicy::Uplink { .. }));
        let port = self.ports.get_mut(egress);
        if port.queue.is_empty() {
            self.queued.push(egress);
        }
        port.coalesce |= from_network;
        port.queue.push(std::mem::replace(frame, self.pool.take()));
    }

    fn drop(&mut self, ingress: PortIndex, reason: DropReason) {
        self.ports.get_mut(ingress).stats.dropped += 1;
        self.tally.drop(reason);
    }
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
