//! What the rules do with a frame: the plainest reading of the steering contract, one frame at a time.
//!
//! In from an outer end: link, lease, length, spoofing, VLAN of the VF; then groups from 0 upwards, in each the matching
//! rule of the lowest priority number by linear search; then out by [`deliver`], or to the miss policy.

use std::sync::Arc;

use dpumesh_core::steering::{Action, EtherType, Group, MissPolicy, Placement, RewriteField, SteeringRule};
use dpumesh_core::vf::VfVlan;
use dpumesh_core::{Frame, Mtu, PortRef, VlanId};

use super::MemoryConfig;
use super::device::{STACK, State};
use super::headers::Headers;
use super::ports::Arrival;

/// What became of a frame that was sent into the card.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// A rule sent it out of this port.
    Forwarded(PortRef),
    /// A rule sent it to the shared proxy.
    Punted,
    /// No rule matched: it waits for the SoC at the port by which it came in.
    Missed,
    /// It is gone.
    Dropped(DropReason),
}

/// Why a frame was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DropReason {
    /// A rule said so.
    Rule,
    /// No rule matched.
    Miss,
    /// The card is away, or the port does not exist.
    NoPort,
    /// The port has no carrier.
    LinkDown,
    /// Host and SoC do not both hold the VF's lease.
    NoLease,
    /// The source MAC is not the VF's.
    Spoofed,
    /// Longer than the port's MTU allows.
    TooLong,
    /// No Ethernet frame, or not what the action needs.
    Malformed,
    /// Tags of the frame and VLAN of the VF contradict each other.
    Vlan,
    /// Its TTL was used up.
    Ttl,
    /// The queue is full.
    QueueFull,
    /// Nobody opened the port.
    NoReader,
}

/// Takes a frame in by a port's outer end.
pub(super) fn switch(
    state: &mut State,
    config: &MemoryConfig,
    ingress: PortRef,
    mut frame: Frame,
    now_ms: u64,
) -> Fate {
    if let Err(reason) = enter(state, config.mtu, ingress, &mut frame) {
        return Fate::Dropped(reason);
    }
    frame.mark = 0;
    let mut group = Group(0);
    loop {
        let Some(headers) = Headers::parse(frame.octets()) else {
            return Fate::Dropped(DropReason::Malformed);
        };
        let Some((slot, rule)) = find(state, group, &headers, ingress, frame.mark) else {
            return miss(state, config, group, ingress, frame);
        };
        state
            .rules
            .record(slot, packets(&frame), wire_octets(&frame), now_ms);
        match act(&rule, &mut frame) {
            Err(reason) => return Fate::Dropped(reason),
            Ok(Action::Jump(next)) => group = *next,
            Ok(Action::Forward(port)) => {
                return forward(state, config, ingress, *port, frame, Fate::Forwarded(*port));
            }
            Ok(Action::Punt) => return forward(state, config, ingress, STACK, frame, Fate::Punted),
            Ok(_) => return Fate::Dropped(DropReason::Rule),
        }
    }
}

/// Puts a frame at a port's outer end.
pub(super) fn deliver(
    state: &mut State,
    config: &MemoryConfig,
    ingress: PortRef,
    port: PortRef,
    mut frame: Frame,
) -> Option<DropReason> {
    if let Err(reason) = leave(state, config.mtu, port, &mut frame) {
        return Some(reason);
    }
    if is_full(state, config, port) {
        return Some(DropReason::QueueFull);
    }
    frame.mark = 0;
    let Some(end) = state.ports.get_mut(&port) else {
        return Some(DropReason::NoPort);
    };
    end.outer.push_back(Arrival { ingress, frame });
    None
}

/// Whether a port's outer end takes no more.
pub(super) fn is_full(state: &State, config: &MemoryConfig, port: PortRef) -> bool {
    state
        .ports
        .get(&port)
        .is_some_and(|end| end.outer.len() >= config.queue)
}

fn forward(
    state: &mut State,
    config: &MemoryConfig,
    ingress: PortRef,
    port: PortRef,
    frame: Frame,
    done: Fate,
) -> Fate {
    deliver(state, config, ingress, port, frame).map_or(done, Fate::Dropped)
}

/// What a port does with a frame before any rule sees it.
pub(super) fn enter(state: &State, mtu: Mtu, port: PortRef, frame: &mut Frame) -> Result<(), DropReason> {
    pass(state, mtu, port, frame)?;
    let headers = Headers::parse(frame.octets()).ok_or(DropReason::Malformed)?;
    let Some(function) = state.function(port) else {
        return Ok(());
    };
    if function.attributes.spoof_check && headers.eth_src != function.attributes.mac {
        return Err(DropReason::Spoofed);
    }
    match function.attributes.vlan {
        VfVlan { id: Some(_), .. } if headers.vlan.is_some() => Err(DropReason::Vlan),
        VfVlan {
            id: Some(id), qos, ..
        } => push_vlan(frame, id, qos),
        _ => Ok(()),
    }
}

fn leave(state: &State, mtu: Mtu, port: PortRef, frame: &mut Frame) -> Result<(), DropReason> {
    if let Some(id) = state.function(port).and_then(|vf| vf.attributes.vlan.id) {
        let tag = Headers::parse(frame.octets()).and_then(|headers| headers.vlan);
        if tag != Some(id.get()) {
            return Err(DropReason::Vlan);
        }
        pop_vlan(frame)?;
    }
    pass(state, mtu, port, frame)
}

/// What both directions ask of a port.
fn pass(state: &State, mtu: Mtu, port: PortRef, frame: &Frame) -> Result<(), DropReason> {
    let end = state
        .ports
        .get(&port)
        .filter(|_| state.alive)
        .ok_or(DropReason::NoPort)?;
    let function = state.function(port);
    if !end.link_up || function.is_some_and(|vf| !vf.link_up()) {
        return Err(DropReason::LinkDown);
    }
    if function.is_some_and(|vf| !vf.is_held_by_both()) {
        return Err(DropReason::NoLease);
    }
    if frame.gso.is_none() && frame.len() > state.mtu(port, mtu).frame_len() {
        return Err(DropReason::TooLong);
    }
    Ok(())
}

fn find(
    state: &State,
    group: Group,
    headers: &Headers,
    ingress: PortRef,
    mark: u32,
) -> Option<(u32, Arc<SteeringRule>)> {
    state
        .rules
        .rules()
        .filter(|(_, _, placement)| !state.trouble.software_stopped || **placement == Placement::Hardware)
        .filter(|(_, rule, _)| rule.group == group)
        .filter(|(_, rule, _)| headers.match_pattern(&rule.pattern, ingress, mark))
        .min_by_key(|(_, rule, _)| (rule.priority, rule.cookie))
        .map(|(slot, rule, _)| (slot, Arc::clone(rule)))
}

/// The policy is about frames that no rule of group 0 matches; one that was sent to a later group and lost there
/// is dropped.
fn miss(state: &mut State, config: &MemoryConfig, group: Group, ingress: PortRef, frame: Frame) -> Fate {
    if group != Group(0) || state.rules.miss_policy(ingress) == MissPolicy::Drop {
        return Fate::Dropped(DropReason::Miss);
    }
    let Some(end) = state.ports.get_mut(&ingress).filter(|end| end.open.is_some()) else {
        return Fate::Dropped(DropReason::NoReader);
    };
    if end.inner.len() >= config.queue {
        return Fate::Dropped(DropReason::QueueFull);
    }
    end.inner.push_back(frame);
    Fate::Missed
}

/// Carries out the steps of a rule and returns its final one.
fn act<'rule>(rule: &'rule SteeringRule, frame: &mut Frame) -> Result<&'rule Action, DropReason> {
    for action in &rule.actions {
        match action {
            _ if action.is_final() => return Ok(action),
            Action::Rewrite(RewriteField::EthDst(mac)) => frame.octets_mut()[..6].copy_from_slice(&mac.0),
            Action::Rewrite(RewriteField::EthSrc(mac)) => frame.octets_mut()[6..12].copy_from_slice(&mac.0),
            Action::DecrementTtl => decrement_ttl(frame)?,
            Action::PushVlan(id) => push_vlan(frame, *id, 0)?,
            Action::PopVlan => pop_vlan(frame)?,
            Action::Mark(mark) => frame.mark = *mark,
            // `Count` is done by `record`; whatever else was refused when the rule was added.
            _ => {}
        }
    }
    Err(DropReason::Rule)
}

fn decrement_ttl(frame: &mut Frame) -> Result<(), DropReason> {
    let headers = Headers::parse(frame.octets()).ok_or(DropReason::Malformed)?;
    if headers.ip.is_none() {
        return Err(DropReason::Malformed);
    }
    let is_v4 = headers.ethertype == EtherType::IPV4;
    let packet = &mut frame.octets_mut()[headers.l3..];
    let ttl = &mut packet[if is_v4 { 8 } else { 7 }];
    if *ttl <= 1 {
        return Err(DropReason::Ttl);
    }
    *ttl -= 1;
    if is_v4 {
        // The TTL is the high octet of its word: one less there is 0x0100 more in the complement sum (RFC 1624).
        let sum = u32::from(u16::from_be_bytes([packet[10], packet[11]])) + 0x0100;
        let folded = (sum & 0xffff) + (sum >> 16);
        packet[10..12].copy_from_slice(&(folded as u16).to_be_bytes());
    }
    Ok(())
}

/// A tag in front of one that is there (QinQ) is not something that patterns can see through: refused.
fn push_vlan(frame: &mut Frame, id: VlanId, qos: u8) -> Result<(), DropReason> {
    let headers = Headers::parse(frame.octets()).ok_or(DropReason::Malformed)?;
    if headers.vlan.is_some() {
        return Err(DropReason::Vlan);
    }
    let front = frame.push_front(4).ok_or(DropReason::TooLong)?;
    front.fill(0);
    let octets = frame.octets_mut();
    octets.copy_within(4..16, 0);
    let tag = u16::from(qos) << 13 | id.get();
    octets[12..14].copy_from_slice(&0x8100u16.to_be_bytes());
    octets[14..16].copy_from_slice(&tag.to_be_bytes());
    shift_header_len(frame, 4);
    Ok(())
}

fn pop_vlan(frame: &mut Frame) -> Result<(), DropReason> {
    let headers = Headers::parse(frame.octets()).ok_or(DropReason::Malformed)?;
    if headers.vlan.is_none() {
        return Err(DropReason::Vlan);
    }
    frame.octets_mut().copy_within(0..12, 4);
    if !frame.pull_front(4) {
        return Err(DropReason::Malformed);
    }
    shift_header_len(frame, -4);
    Ok(())
}

fn shift_header_len(frame: &mut Frame, by: i16) {
    if let Some(gso) = &mut frame.gso {
        gso.header_len = gso.header_len.saturating_add_signed(by);
    }
}

/// Frames that this one stands for.
fn packets(frame: &Frame) -> u64 {
    let Some(gso) = frame.gso else { return 1 };
    let payload = frame.len().saturating_sub(gso.header_len.into());
    payload.div_ceil(usize::from(gso.size).max(1)).max(1) as u64
}

/// Octets of the frames that this one stands for.
fn wire_octets(frame: &Frame) -> u64 {
    let header = frame.gso.map_or(0, |gso| u64::from(gso.header_len));
    frame.len() as u64 + (packets(frame) - 1) * header
}
