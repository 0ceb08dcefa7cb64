//! What `lookup` and `classify` compare: keys made from parsed headers and the way the frame came in.
//!
//! A zone has two parts: the ingress port in its low bits and, for a packet that came out of a tunnel, a number for its
//! VNI in the high bits. So a rule can look at the port, the VNI, or both.

use std::collections::HashMap;

use dpumesh_core::steering::Group;
use dpumesh_core::{VlanId, Vni};

use super::port::PortIndex;
use crate::flow::{FlowFields, FlowFlags, FlowKey, WideFields, WideKey, Zone};
use crate::wire::{Fragment, Headers, L3, protocol};

/// Bits of a zone that number the ingress port.
pub(super) const PORT_BITS: u32 = 10;
/// Those bits, set.
pub(super) const PORT_MASK: u16 = (1 << PORT_BITS) - 1;
/// The number of every VNI that no rule speaks of; 0 is "no tunnel", what lies between numbers one VNI each.
const OTHER: u16 = NUMBERS as u16 - 1;
const NUMBERS: usize = 1 << (16 - PORT_BITS);

/// Numbers of the VNIs that rules speak of.
#[derive(Debug)]
pub(super) struct Tunnels {
    numbers: HashMap<Vni, Number>,
    /// By number, the group in which such packets were classified first since rules changed. A flow key does not name
    /// the group, so answers are remembered for that group only.
    homes: [Option<Group>; NUMBERS],
}

#[derive(Debug)]
struct Number {
    number: u16,
    /// Installed rules that speak of the VNI.
    rules: u32,
}

impl Default for Tunnels {
    fn default() -> Self {
        Self {
            numbers: HashMap::new(),
            homes: [None; NUMBERS],
        }
    }
}

impl Tunnels {
    /// The zone bits of a VNI that a rule speaks of, numbered now if need be; `None` when the numbers are used up. The
    /// number stays until the next [`Tunnels::sweep`] that finds no rule holding it.
    pub(super) fn intern(&mut self, vni: Vni) -> Option<u16> {
        let free = || (1..OTHER).find(|number| self.numbers.values().all(|known| known.number != *number));
        let number = match self.numbers.get(&vni) {
            Some(known) => known.number,
            None => free()?,
        };
        self.numbers.entry(vni).or_insert(Number { number, rules: 0 });
        Some(number << PORT_BITS)
    }

    /// A rule that speaks of the VNI was installed.
    pub(super) fn hold(&mut self, vni: Vni) {
        if let Some(known) = self.numbers.get_mut(&vni) {
            known.rules += 1;
        }
    }

    /// A rule that speaks of the VNI was removed.
    pub(super) fn release(&mut self, vni: Vni) {
        if let Some(known) = self.numbers.get_mut(&vni) {
            known.rules -= 1;
        }
    }

    /// Takes numbers back that no rule holds, and forgets the homes. Only when no flow is remembered.
    pub(super) fn sweep(&mut self) {
        self.numbers.retain(|_, known| known.rules > 0);
        self.homes = [None; NUMBERS];
    }

    /// The zone bits of a packet that came out of a tunnel: VNIs that no rule speaks of share a number.
    pub(super) fn of(&self, vni: Vni) -> u16 {
        self.numbers.get(&vni).map_or(OTHER, |known| known.number) << PORT_BITS
    }

    /// Whether answers of this group may be remembered for packets with these zone bits.
    pub(super) fn is_home(&mut self, bits: u16, group: Group) -> bool {
        *self.homes[usize::from(bits >> PORT_BITS)].get_or_insert(group) == group
    }
}

/// The zone of a frame from `port`, with the bits of its tunnel or 0.
#[inline]
pub(super) const fn zone(port: PortIndex, tunnel: u16) -> Zone {
    Zone(port.0 | tunnel)
}

/// The exact-match key of a packet.
#[inline]
pub(super) fn flow_key(headers: &Headers, zone: Zone) -> FlowKey {
    let mut flags = FlowFlags::empty();
    flags.set(FlowFlags::IPV6, headers.l3 == L3::Ipv6);
    match headers.fragment {
        Fragment::None => {}
        Fragment::First { .. } => flags |= FlowFlags::FIRST_FRAGMENT,
        Fragment::Later { .. } => flags |= FlowFlags::LATER_FRAGMENT,
    }
    let (src_port, dst_port) = match headers.protocol {
        protocol::ICMPV4 | protocol::ICMPV6 => (headers.icmp_type.into(), headers.icmp_code.into()),
        _ => (headers.src_port, headers.dst_port),
    };
    let (src, dst) = if headers.is_ip() {
        (headers.src, headers.dst)
    } else {
        ([0; 16], [0; 16])
    };
    FlowKey::new(&FlowFields {
        src,
        dst,
        src_port,
        dst_port,
        zone,
        proto: headers.protocol,
        flags,
    })
}

/// The key for masked rules.
#[inline]
pub(super) fn wide_key(headers: &Headers, flow: FlowKey, mark: u32) -> WideKey {
    WideKey::new(&WideFields {
        flow,
        eth_src: headers.eth_src.0,
        eth_dst: headers.eth_dst.0,
        ethertype: headers.ethertype,
        vlan: headers.vlan.and_then(|tag| tag.id()).map(VlanId::get),
        mark,
        tcp_flags: headers.tcp_flags.bits() as u8, // the low octet: CWR to FIN
        dscp: headers.dscp,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vni(n: u32) -> Vni {
        Vni::try_from(n).expect("24 bits")
    }

    #[test]
    fn tunnels_are_numbered_once_run_out_and_come_back() {
        let mut tunnels = Tunnels::default();
        let first = tunnels.intern(vni(1)).expect("room");
        tunnels.hold(vni(1));
        assert_eq!(tunnels.of(vni(1)), first);
        assert_eq!(
            tunnels.of(vni(2)),
            tunnels.of(vni(3)),
            "unknown VNIs share a number"
        );
        assert_ne!(first, tunnels.of(vni(2)));
        assert_eq!(first & PORT_MASK, 0);
        for n in 10..71 {
            tunnels.intern(vni(n)).expect("room");
        }
        assert_eq!(tunnels.intern(vni(100)), None);
        tunnels.sweep();
        assert_eq!(tunnels.intern(vni(1)), Some(first), "a rule holds it");
        assert!(tunnels.intern(vni(100)).is_some_and(|bits| bits != first));
    }

    #[test]
    fn one_group_is_home_to_a_tunnel_until_rules_change() {
        let mut tunnels = Tunnels::default();
        let bits = tunnels.of(vni(7));
        assert!(tunnels.is_home(bits, Group(1)));
        assert!(!tunnels.is_home(bits, Group(2)));
        tunnels.sweep();
        assert!(tunnels.is_home(bits, Group(2)));
    }
}
