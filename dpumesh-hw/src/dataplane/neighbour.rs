//! ARP and ND answered for pods: the dataplane is the router behind every address but the asker's own.
//!
//! A pod's question is answered with the router's MAC, so every packet of it comes to the dataplane. A question from
//! the uplink is answered only for local pods, with our MAC there. Everything else of ARP and ND (gratuitous
//! announcements, advertisements, router solicitations, redirects) ends here: nobody's cache is fed by a pod.

use std::net::IpAddr;

use dpumesh_core::{Frame, MacAddr};

use super::port::{PortPolicy, Ports};
use crate::flow::mapped;
use crate::wire::icmpv6::Message;
use crate::wire::{ArpPacket, Headers, Icmpv6Packet, L3, answer, arp};

/// Writes the answer into `reply`; false when the frame gets none.
pub(super) fn answer(
    policy: Option<&PortPolicy>,
    frame: &Frame,
    headers: &Headers,
    ports: &Ports,
    reply: &mut Frame,
) -> bool {
    let Some((asker, target)) = question(frame.octets(), headers) else {
        return false;
    };
    let Some(mac) = answering_mac(policy, asker, target, ports) else {
        return false;
    };
    match headers.l3 {
        L3::Arp => answer::arp_reply(frame.octets(), headers, mac, reply).is_ok(),
        _ => answer::neighbor_advertisement(frame.octets(), headers, mac, reply).is_ok(),
    }
}

/// Who asks for whose MAC; `None` when the frame is no question, or an address probe that must stay unanswered
/// (RFC 5227, RFC 4862 §5.4).
fn question(octets: &[u8], headers: &Headers) -> Option<(IpAddr, IpAddr)> {
    let (asker, target) = match headers.l3 {
        L3::Arp => {
            let packet = ArpPacket::new(octets.get(usize::from(headers.l3_offset)..)?).ok()?;
            if packet.operation() != arp::Operation::Request {
                return None;
            }
            (IpAddr::V4(packet.sender_ip()), IpAddr::V4(packet.target_ip()))
        }
        _ => {
            let packet = Icmpv6Packet::new(octets.get(headers.l4_range())?).ok()?;
            let Message::NeighborSolicitation { target } = packet.message() else {
                return None;
            };
            (headers.source(), IpAddr::V6(target))
        }
    };
    (!asker.is_unspecified() && asker != target).then_some((asker, target))
}

fn answering_mac(
    policy: Option<&PortPolicy>,
    asker: IpAddr,
    target: IpAddr,
    ports: &Ports,
) -> Option<MacAddr> {
    match policy? {
        PortPolicy::Vf {
            addresses, gateway, ..
        } => {
            let link_local = matches!(asker, IpAddr::V6(v6) if v6.is_unicast_link_local());
            let own = addresses.contains(&asker) || link_local;
            (own && !addresses.contains(&target)).then_some(*gateway)
        }
        PortPolicy::Uplink { mac, .. } => ports.local(&mapped(target)).map(|_| *mac),
        PortPolicy::Stack { gateway, .. } => Some(*gateway),
    }
}
