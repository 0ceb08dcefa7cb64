//! The steps of a rule, carried out on a frame in place.
//!
//! Checksums follow every rewrite by difference (RFC 1624): no payload octet is read. A frame whose L4 checksum is still open
//! ([`Checksum::Partial`]) holds the pseudo-header's sum in the field, so only addresses change it.

use std::net::IpAddr;

use dpumesh_core::steering::RewriteField;
use dpumesh_core::{Checksum, Frame, Gso, VlanId, Vni};

use super::rules::{Step, same_family};
use super::stats::DropReason;
use crate::flow::mapped;
use crate::wire::checksum::{Sum, update, update_partial};
use crate::wire::encap::{self, NotEncapsulated, Tunnel};
use crate::wire::{Fragment, Headers, L3, protocol};

/// What the steps did to a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Acted {
    /// What is known of its headers afterwards.
    headers: HeadersAfter,
    /// It is out of this tunnel now.
    pub(super) tunnel: Option<Vni>,
    /// It came out of a tunnel, whatever happened to it then.
    pub(super) decapsulated: bool,
    /// Octets of outer headers that it has of us now, unless as many as before.
    pub(super) outer: Option<usize>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum HeadersAfter {
    /// They are as they were before.
    #[default]
    AsBefore,
    /// They changed, and are known without being parsed.
    Known(Headers),
    /// They changed.
    Unknown,
}

impl Acted {
    /// The headers of the frame that the steps were carried out on, unless they are as before.
    pub(super) fn new_headers(&self, frame: &Frame) -> Result<Option<Headers>, DropReason> {
        match self.headers {
            HeadersAfter::AsBefore => Ok(None),
            HeadersAfter::Known(headers) => Ok(Some(headers)),
            HeadersAfter::Unknown => parse(frame).map(Some),
        }
    }
}

/// Carries out `steps` on a frame whose headers are `headers`.
#[inline]
pub(super) fn carry_out(steps: &[Step], frame: &mut Frame, headers: &Headers) -> Result<Acted, DropReason> {
    if steps.is_empty() {
        return Ok(Acted::default());
    }
    carry_out_each(steps, frame, headers)
}

fn carry_out_each(steps: &[Step], frame: &mut Frame, headers: &Headers) -> Result<Acted, DropReason> {
    let mut acted = Acted::default();
    let (mut headers, mut stale) = (*headers, false);
    for step in steps {
        if std::mem::take(&mut stale) {
            headers = parse(frame)?;
        }
        match step {
            Step::Mark(mark) => {
                frame.mark = *mark;
                continue; // it is in no header
            }
            Step::Rewrite(RewriteField::EthSrc(mac)) => {
                frame.octets_mut()[6..12].copy_from_slice(&mac.0);
                headers.eth_src = *mac;
            }
            Step::Rewrite(RewriteField::EthDst(mac)) => {
                frame.octets_mut()[..6].copy_from_slice(&mac.0);
                headers.eth_dst = *mac;
            }
            Step::Decapsulate => {
                let inside = encap::decapsulate(frame, &headers).map_err(|_| DropReason::NotATunnel)?;
                let inside = inside.ok_or(DropReason::Congestion)?;
                headers = inside.inner;
                (acted.outer, acted.tunnel) = (Some(0), Some(inside.vni));
                acted.decapsulated = true;
            }
            Step::Encapsulate(outer) => {
                let before = acted.outer.unwrap_or(0);
                let pushed = encapsulate(frame, &headers, outer)?;
                stale = true;
                (acted.outer, acted.tunnel) = (Some(before + pushed), None);
            }
            Step::Rewrite(field) => {
                rewrite(*field, frame, &headers)?;
                stale = true;
            }
            Step::DecrementTtl => {
                decrement_ttl(frame, &headers)?;
                stale = true;
            }
            Step::PushVlan(id) => {
                push_vlan(frame, *id)?;
                stale = true;
            }
            Step::PopVlan => {
                pop_vlan(frame, &headers);
                stale = true;
            }
        }
        acted.headers = if stale {
            HeadersAfter::Unknown
        } else {
            HeadersAfter::Known(headers)
        };
    }
    Ok(acted)
}

fn parse(frame: &Frame) -> Result<Headers, DropReason> {
    Headers::parse(frame.octets()).map_err(|_| DropReason::Malformed)
}

/// Pushes the outer headers. A super-frame is encapsulated as one: its port cuts it behind the headers
/// ([`dpumesh_core::Gso::header_len`] counts them).
/// Returns how many octets they are.
fn encapsulate(frame: &mut Frame, headers: &Headers, tunnel: &Tunnel) -> Result<usize, DropReason> {
    let (gso, length) = (frame.gso.take(), frame.len());
    encap::encapsulate(frame, headers, tunnel).map_err(|error| match error {
        NotEncapsulated::NoRoom(_) => DropReason::Headroom,
        NotEncapsulated::Malformed(_) => DropReason::Malformed,
    })?;
    let pushed = frame.len() - length; // less than the headroom
    frame.gso = gso.map(|gso| Gso {
        header_len: gso.header_len.saturating_add(pushed as u16),
        ..gso
    });
    Ok(pushed)
}

/// Writes source and destination MAC: how a frame is addressed to its next hop.
#[inline]
pub(super) fn set_macs(frame: &mut Frame, destination: [u8; 6], source: [u8; 6]) {
    let octets = frame.octets_mut();
    octets[..6].copy_from_slice(&destination);
    octets[6..12].copy_from_slice(&source);
}

fn rewrite(field: RewriteField, frame: &mut Frame, headers: &Headers) -> Result<(), DropReason> {
    match field {
        RewriteField::IpSrc(address) => rewrite_address(frame, headers, address, Side::Source)?,
        RewriteField::IpDst(address) => rewrite_address(frame, headers, address, Side::Destination)?,
        RewriteField::L4Src(port) => rewrite_port(frame, headers, port, 0)?,
        RewriteField::L4Dst(port) => rewrite_port(frame, headers, port, 2)?,
        RewriteField::Dscp(dscp) => rewrite_dscp(frame, headers, dscp)?,
        _ => return Err(DropReason::RewriteMismatch),
    }
    Ok(())
}

#[derive(Clone, Copy)]
enum Side {
    Source,
    Destination,
}

fn rewrite_address(frame: &mut Frame, headers: &Headers, new: IpAddr, side: Side) -> Result<(), DropReason> {
    let ipv6 = headers.l3 == L3::Ipv6;
    if !headers.is_ip() || !same_family(new, ipv6) {
        return Err(DropReason::RewriteMismatch);
    }
    let l3 = usize::from(headers.l3_offset);
    let (at, len) = match (ipv6, side) {
        (false, Side::Source) => (l3 + 12, 4),
        (false, Side::Destination) => (l3 + 16, 4),
        (true, Side::Source) => (l3 + 8, 16),
        (true, Side::Destination) => (l3 + 24, 16),
    };
    let address = mapped(new);
    let new = &address[16 - len..];
    let old = Sum::of(&frame.octets()[at..at + len]);
    frame.octets_mut()[at..at + len].copy_from_slice(new);
    let new = Sum::of(new);
    if !ipv6 {
        adjust(frame, l3 + 10, |field| update(field, old, new));
    }
    if let Some(place) = l4_checksum(frame, headers) {
        let open = matches!(frame.checksum, Checksum::Partial { .. });
        adjust(frame, place, |field| {
            if open {
                update_partial(field, old, new)
            } else {
                update(field, old, new)
            }
        });
    }
    Ok(())
}

fn rewrite_port(frame: &mut Frame, headers: &Headers, new: u16, at: usize) -> Result<(), DropReason> {
    let ports = matches!(headers.protocol, protocol::TCP | protocol::UDP) && !headers.fragment.is_later();
    if !headers.is_ip() || !ports {
        return Err(DropReason::RewriteMismatch);
    }
    let at = usize::from(headers.l4_offset) + at;
    let old = Sum::of(&frame.octets()[at..at + 2]);
    frame.octets_mut()[at..at + 2].copy_from_slice(&new.to_be_bytes());
    if let Some(place) = l4_checksum(frame, headers)
        && !matches!(frame.checksum, Checksum::Partial { .. })
    {
        adjust(frame, place, |field| update(field, old, Sum::word(new)));
    }
    Ok(())
}

fn rewrite_dscp(frame: &mut Frame, headers: &Headers, dscp: u8) -> Result<(), DropReason> {
    let l3 = usize::from(headers.l3_offset);
    let octets = frame.octets_mut();
    match headers.l3 {
        L3::Ipv4 => {
            let old = Sum::of(&octets[l3..l3 + 2]);
            octets[l3 + 1] = dscp << 2 | octets[l3 + 1] & 3;
            let new = Sum::of(&octets[l3..l3 + 2]);
            adjust(frame, l3 + 10, |field| update(field, old, new));
        }
        L3::Ipv6 => {
            let class = dscp << 2 | headers.ecn;
            octets[l3] = octets[l3] & 0xf0 | class >> 4;
            octets[l3 + 1] = octets[l3 + 1] & 0x0f | class << 4;
        }
        L3::Arp | L3::Other => return Err(DropReason::RewriteMismatch),
    }
    Ok(())
}

/// Where the L4 checksum is, for the protocols that cover addresses; `None` where there is none to keep true: later fragments, UDP
/// over IPv4 that has none (RFC 768).
fn l4_checksum(frame: &Frame, headers: &Headers) -> Option<usize> {
    if headers.fragment.is_later() {
        return None;
    }
    let l4 = usize::from(headers.l4_offset);
    match headers.protocol {
        protocol::TCP => Some(l4 + 16),
        protocol::UDP => {
            let absent = frame.octets()[l4 + 6..l4 + 8] == [0, 0] && headers.fragment == Fragment::None;
            let open = matches!(frame.checksum, Checksum::Partial { .. });
            (open || !absent).then_some(l4 + 6)
        }
        protocol::ICMPV6 if headers.l3 == L3::Ipv6 => Some(l4 + 2),
        _ => None,
    }
}

fn adjust(frame: &mut Frame, at: usize, change: impl FnOnce(u16) -> u16) {
    let octets = frame.octets_mut();
    let field = change(u16::from_be_bytes([octets[at], octets[at + 1]]));
    octets[at..at + 2].copy_from_slice(&field.to_be_bytes());
}

fn decrement_ttl(frame: &mut Frame, headers: &Headers) -> Result<(), DropReason> {
    if !headers.is_ip() {
        return Err(DropReason::RewriteMismatch);
    }
    if headers.ttl <= 1 {
        return Err(DropReason::Ttl);
    }
    let l3 = usize::from(headers.l3_offset);
    let octets = frame.octets_mut();
    if headers.l3 == L3::Ipv6 {
        octets[l3 + 7] -= 1;
        return Ok(());
    }
    let old = Sum::of(&octets[l3 + 8..l3 + 10]);
    octets[l3 + 8] -= 1;
    let new = Sum::of(&octets[l3 + 8..l3 + 10]);
    adjust(frame, l3 + 10, |field| update(field, old, new));
    Ok(())
}

const TAG_LEN: usize = 4;

fn push_vlan(frame: &mut Frame, id: VlanId) -> Result<(), DropReason> {
    let old: [u8; 12] = frame.octets()[..12]
        .try_into()
        .map_err(|_| DropReason::Malformed)?;
    frame.push_front(TAG_LEN).ok_or(DropReason::Headroom)?;
    let octets = frame.octets_mut();
    octets[..12].copy_from_slice(&old);
    octets[12..14].copy_from_slice(&0x8100_u16.to_be_bytes());
    octets[14..16].copy_from_slice(&id.get().to_be_bytes());
    if let Some(gso) = &mut frame.gso {
        gso.header_len += TAG_LEN as u16;
    }
    Ok(())
}

/// Takes the tag off; a frame without one is left alone.
fn pop_vlan(frame: &mut Frame, headers: &Headers) {
    if headers.vlan.is_none() {
        return;
    }
    frame.octets_mut().copy_within(0..12, TAG_LEN);
    frame.pull_front(TAG_LEN);
    if let Some(gso) = &mut frame.gso {
        gso.header_len -= TAG_LEN as u16;
    }
}
