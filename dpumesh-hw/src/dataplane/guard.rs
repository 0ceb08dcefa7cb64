//! Anti-spoofing: a frame's source is its port's, or the frame is dropped. Only because of this may the proxy read a pod
//! from an address.

use super::port::{Port, PortPolicy, Ports};
use super::stats::DropReason;
use crate::wire::{Headers, L3, protocol};

/// Whether a frame may go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Guarded {
    /// To the rules.
    Pass,
    /// To be answered by `neighbour`, or dropped there.
    Neighbour,
    /// Nowhere.
    Drop(DropReason),
}

/// Checks a frame against the policy of the port that it came in on. A packet out of a tunnel is checked again, with its
/// inner headers and the uplink's policy.
#[inline]
pub(super) fn check(port: &Port, headers: &Headers, ports: &Ports) -> Guarded {
    match &port.policy {
        None => Guarded::Drop(DropReason::NotAdmitted),
        Some(PortPolicy::Vf { mac, .. }) => {
            if headers.eth_src != *mac {
                return Guarded::Drop(DropReason::SpoofedMac);
            }
            if is_neighbour(headers) {
                return Guarded::Neighbour;
            }
            if !headers.is_ip() {
                return Guarded::Pass; // no address to check; rules about other EtherTypes decide
            }
            if port.owns(&headers.src) {
                return Guarded::Pass;
            }
            let link_local =
                headers.l3 == L3::Ipv6 && (is_link_local(&headers.src) || headers.src == [0; 16]);
            Guarded::Drop(if link_local {
                DropReason::LinkLocal
            } else {
                DropReason::SpoofedIp
            })
        }
        Some(PortPolicy::Uplink { .. }) => {
            if is_neighbour(headers) {
                return Guarded::Neighbour;
            }
            if headers.is_ip() && ports.local(&headers.src).is_some() {
                return Guarded::Drop(DropReason::SpoofedUplink);
            }
            Guarded::Pass
        }
        Some(PortPolicy::Stack { .. }) => {
            if is_neighbour(headers) {
                return Guarded::Neighbour;
            }
            if !headers.is_ip() || (headers.l3 == L3::Ipv6 && is_link_local(&headers.src)) {
                return Guarded::Drop(DropReason::LinkLocal);
            }
            Guarded::Pass
        }
    }
}

/// ARP, or neighbour and router discovery and redirects (RFC 4861): types 133 to 137.
const fn is_neighbour(headers: &Headers) -> bool {
    match headers.l3 {
        L3::Arp => true,
        L3::Ipv6 => headers.protocol == protocol::ICMPV6 && matches!(headers.icmp_type, 133..=137),
        _ => false,
    }
}

/// fe80::/10 (RFC 4291 §2.5.6).
const fn is_link_local(address: &[u8; 16]) -> bool {
    address[0] == 0xfe && address[1] & 0xc0 == 0x80
}
