//! A pattern as a product of sets, so that overlap is decided exactly.
//!
//! Implications between fields are written out first: an IPv4 address means EtherType 0x0800, an L4 port means an IP packet
//! that is no later fragment. After that the dimensions are independent, and two patterns overlap when each
//! dimension does:
//!
//! | dimension | set |
//! |---|---|
//! | port, MACs, EtherType, VLAN, VNI, addresses, protocol, DSCP, flags, mark, state | value under a mask |
//! | L4 ports | a range |
//! | fragmentation | a subset of whole, first, later |
//! | EtherType once more | "IP of either family" |

use std::net::IpAddr;

use dpumesh_core::steering::{EtherType, FragmentMatch, IpMatch, Masked, Pattern, PortRange, VlanMatch};
use dpumesh_core::{MacAddr, PortRef};

/// Whether some frame could match both patterns.
///
/// Exact for patterns that [`check`](dpumesh_core::steering::SteeringRule::check) accepts, under these readings:
/// [`Pattern::fragment`], [`Pattern::dscp`] and [`Pattern::ip_proto`] match IP packets only; a tag of VLAN 0 is neither
/// [`VlanMatch::Untagged`] nor any [`VlanMatch::Id`]; every combination of mark and connection state can occur. A
/// pattern that no frame can match overlaps nothing.
pub fn overlap(one: &Pattern, other: &Pattern) -> bool {
    Cube::of(one).meets(&Cube::of(other))
}

/// Words of value or mask; see [`Cube::of`] for their layout.
pub(super) type Words = [u64; 9];

/// The frames that a pattern matches.
#[derive(Clone, Debug)]
pub(super) struct Cube {
    /// Bits to compare, zero where `mask` is.
    pub(super) value: Words,
    /// Which bits are compared.
    pub(super) mask: Words,
    l4_src: PortRange,
    l4_dst: PortRange,
    fragments: Fragments,
    any_ip: bool,
    empty: bool,
}

/// The set of masks that a rule needs in a card that looks rules up by masked key: each different one costs a table.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct MaskSet(Words, bool, bool, Fragments);

const WHOLE: u8 = 1;
const FIRST: u8 = 2;
const LATER: u8 = 4;

/// Subset of [`WHOLE`], [`FIRST`], [`LATER`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Fragments(u8);

const ALL_PORTS: PortRange = PortRange {
    first: 0,
    last: u16::MAX,
};

impl Cube {
    /// Words: port; source MAC and EtherType; destination MAC and VLAN; VNI, protocol and mark; source and destination
    /// address, two words each; L4 ports, TCP flags, connection state and DSCP.
    pub(super) fn of(pattern: &Pattern) -> Self {
        let mut cube = Self {
            value: [0; 9],
            mask: [0; 9],
            l4_src: pattern.l4_src.unwrap_or(ALL_PORTS),
            l4_dst: pattern.l4_dst.unwrap_or(ALL_PORTS),
            fragments: fragments(pattern),
            any_ip: false,
            empty: false,
        };
        cube.set_link(pattern);
        cube.set_ethertype(pattern);
        cube.set_network(pattern);
        cube.set_transport(pattern);
        for (value, mask) in cube.value.iter_mut().zip(&cube.mask) {
            *value &= mask;
        }
        cube.empty |= cube.fragments.0 == 0;
        cube
    }

    /// Whether some frame is in both.
    pub(super) fn meets(&self, other: &Self) -> bool {
        !self.empty
            && !other.empty
            && (0..self.value.len())
                .all(|i| (self.value[i] ^ other.value[i]) & self.mask[i] & other.mask[i] == 0)
            && ranges_meet(self.l4_src, other.l4_src)
            && ranges_meet(self.l4_dst, other.l4_dst)
            && self.fragments.0 & other.fragments.0 != 0
            && !(self.any_ip && other.is_not_ip())
            && !(other.any_ip && self.is_not_ip())
    }

    /// The masks that a card needs for it.
    pub(super) fn mask_set(&self) -> MaskSet {
        let is_range = |range: PortRange| range != ALL_PORTS && range.first != range.last;
        MaskSet(
            self.mask,
            is_range(self.l4_src),
            is_range(self.l4_dst),
            self.fragments,
        )
    }

    fn set(&mut self, word: usize, shift: u32, value: u64, mask: u64) {
        self.value[word] |= value << shift;
        self.mask[word] |= mask << shift;
    }

    fn set_link(&mut self, pattern: &Pattern) {
        if let Some(port) = pattern.port {
            self.set(0, 0, port_word(port), u64::MAX);
        }
        if let Some(mac) = pattern.eth_src {
            self.set(1, 16, mac_word(mac.value), mac_word(mac.mask));
        }
        if let Some(mac) = pattern.eth_dst {
            self.set(2, 16, mac_word(mac.value), mac_word(mac.mask));
        }
        match pattern.vlan {
            Some(VlanMatch::Untagged) => self.set(2, 0, 0xffff, 0xffff),
            Some(VlanMatch::Id(id)) => self.set(2, 0, id.get().into(), 0xffff),
            None => {}
        }
        if let Some(vni) = pattern.vni {
            self.set(3, 40, vni.get().into(), 0xff_ffff);
        }
        if let Some(mark) = pattern.mark {
            self.set(3, 0, mark.value.into(), mark.mask.into());
        }
        if let Some(state) = pattern.ct_state {
            self.set(8, 8, state.value.bits().into(), state.mask.bits().into());
        }
    }

    fn set_ethertype(&mut self, pattern: &Pattern) {
        let family = pattern.ip_src.or(pattern.ip_dst).map(|address| {
            if address.is_ipv4() {
                EtherType::IPV4
            } else {
                EtherType::IPV6
            }
        });
        let needs_ip = pattern.ip_proto.is_some() || pattern.dscp.is_some() || pattern.fragment.is_some();
        match (pattern.ethertype, family) {
            (Some(given), Some(implied)) if given != implied => self.empty = true,
            (Some(ethertype), _) | (None, Some(ethertype)) => {
                self.set(1, 0, ethertype.0.into(), 0xffff);
                self.empty |= needs_ip && self.is_not_ip();
            }
            (None, None) => self.any_ip = needs_ip,
        }
    }

    fn set_network(&mut self, pattern: &Pattern) {
        for (word, address) in [(4, pattern.ip_src), (6, pattern.ip_dst)] {
            if let Some(address) = address {
                let Masked { value, mask } = address_bits(address);
                self.set(word, 0, (value >> 64) as u64, (mask >> 64) as u64);
                self.set(word + 1, 0, value as u64, mask as u64);
            }
        }
        if let Some(proto) = pattern.ip_proto {
            self.set(3, 32, proto.0.into(), 0xff);
        }
        if let Some(dscp) = pattern.dscp {
            self.set(8, 0, dscp.0.into(), 0x3f);
        }
    }

    fn set_transport(&mut self, pattern: &Pattern) {
        for (shift, range) in [(48, pattern.l4_src), (32, pattern.l4_dst)] {
            if let Some(range) = range.filter(|range| range.first == range.last) {
                self.set(8, shift, range.first.into(), 0xffff);
            }
        }
        if let Some(flags) = pattern.tcp_flags {
            self.set(8, 16, flags.value.bits().into(), flags.mask.bits().into());
        }
    }

    fn is_not_ip(&self) -> bool {
        let ethertype = self.value[1] as u16;
        self.mask[1] & 0xffff != 0 && ethertype != EtherType::IPV4.0 && ethertype != EtherType::IPV6.0
    }
}

fn fragments(pattern: &Pattern) -> Fragments {
    let named = match pattern.fragment {
        None => WHOLE | FIRST | LATER,
        Some(FragmentMatch::Whole) => WHOLE,
        Some(FragmentMatch::Any) => FIRST | LATER,
        Some(FragmentMatch::First) => FIRST,
        Some(FragmentMatch::Later) => LATER,
    };
    let has_l4 = pattern.l4_src.is_some() || pattern.l4_dst.is_some() || pattern.tcp_flags.is_some();
    Fragments(if has_l4 { named & !LATER } else { named })
}

fn ranges_meet(one: PortRange, other: PortRange) -> bool {
    one.first <= other.last && other.first <= one.last
}

fn port_word(port: PortRef) -> u64 {
    let word =
        |tag: u64, a: u16, b: u16, c: u16| tag << 48 | u64::from(a) << 32 | u64::from(b) << 16 | u64::from(c);
    match port {
        PortRef::Uplink(n) => word(0, n, 0, 0),
        PortRef::Pf { controller, pf } => word(1, controller.0, pf.0, 0),
        PortRef::Vf { controller, pf, vf } => word(2, controller.0, pf.0, vf.0),
        PortRef::Stack(n) => word(3, n, 0, 0),
    }
}

fn mac_word(mac: MacAddr) -> u64 {
    mac.0.iter().fold(0, |word, octet| word << 8 | u64::from(*octet))
}

/// Value and mask of an address, an IPv4 one in the low 32 bits.
pub(super) fn address_bits(address: IpMatch) -> Masked<u128> {
    let bits = |address: IpAddr| match address {
        IpAddr::V4(v4) => u128::from(u32::from(v4)),
        IpAddr::V6(v6) => u128::from(v6),
    };
    let (value, mask) = match address {
        IpMatch::Prefix(prefix) => (prefix.addr(), prefix.netmask()),
        IpMatch::Masked(masked) => (masked.value, masked.mask),
    };
    Masked {
        value: bits(value),
        mask: bits(mask),
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use dpumesh_core::Vni;
    use dpumesh_core::steering::{
        Action, Cookie, CtStates, DscpMatch, IpProtocol, Owner, Priority, SteeringRule, TcpFlags,
    };
    use proptest::option::weighted;
    use proptest::prelude::*;

    use super::*;
    use crate::memory::headers::{Headers, Ip, Piece};

    /// Patterns over a world so small that all its frames can be tried.
    fn patterns() -> impl Strategy<Value = Pattern> {
        let bits = |v: u8, m: u8| Masked {
            value: MacAddr([2, 0, 0, 0, 0, v]),
            mask: MacAddr([0xff, 0, 0, 0, 0, m]),
        };
        let link = (
            weighted(0.3, (0..2u16).prop_map(PortRef::vf)),
            weighted(0.3, (0..4u8, 0..4u8).prop_map(move |(v, m)| bits(v, m))),
            weighted(
                0.3,
                prop::sample::select(vec![EtherType::IPV4, EtherType::IPV6, EtherType::ARP]),
            ),
            weighted(0.3, prop::sample::select(vec![None, Some(5u16), Some(6)])),
            weighted(
                0.2,
                (0..4u32, 0..4u32).prop_map(|(value, mask)| Masked { value, mask }),
            ),
        );
        let network = (
            weighted(0.3, addresses()),
            weighted(0.3, addresses()),
            weighted(
                0.6,
                prop::sample::select(vec![IpProtocol::TCP, IpProtocol::UDP, IpProtocol::ICMP]),
            ),
            weighted(0.2, (0..2u8).prop_map(DscpMatch)),
            weighted(
                0.3,
                prop::sample::select(vec![
                    FragmentMatch::Whole,
                    FragmentMatch::Any,
                    FragmentMatch::First,
                    FragmentMatch::Later,
                ]),
            ),
        );
        let transport = (
            weighted(0.4, ranges()),
            weighted(0.3, ranges()),
            weighted(0.2, (0..4u8, 0..4u8)),
        );
        (link, network, transport).prop_map(|(link, network, transport)| {
            let flags = TcpFlags::from_bits_retain;
            let has_ports = network.2.is_some_and(IpProtocol::has_ports);
            Pattern {
                port: link.0,
                eth_src: link.1,
                ethertype: link.2,
                vlan: link.3.map(|id| match id {
                    None => VlanMatch::Untagged,
                    Some(id) => VlanMatch::Id(id.try_into().expect("in range")),
                }),
                mark: link.4,
                ip_src: network.0,
                ip_dst: network.1,
                ip_proto: network.2,
                dscp: network.3,
                fragment: network.4,
                l4_src: transport.0.filter(|_| has_ports),
                l4_dst: transport.1.filter(|_| has_ports),
                tcp_flags: transport
                    .2
                    .filter(|_| network.2 == Some(IpProtocol::TCP))
                    .map(|(v, m)| Masked {
                        value: flags(v),
                        mask: flags(m),
                    }),
                ..Pattern::default()
            }
        })
    }

    fn ranges() -> impl Strategy<Value = PortRange> {
        (0..4u16, 0..4u16).prop_map(|(a, b)| PortRange {
            first: a.min(b),
            last: a.max(b),
        })
    }

    fn addresses() -> impl Strategy<Value = IpMatch> {
        let prefix = |address: IpAddr, bits: u8| {
            IpMatch::Prefix(ipnet::IpNet::new(address, bits).expect("length in range").trunc())
        };
        prop_oneof![
            (0..4u8, 29..=32u8).prop_map(move |(host, bits)| prefix(v4(host), bits)),
            (0..4u8, 125..=128u8).prop_map(move |(host, bits)| prefix(v6(host), bits)),
            (0..4u8, 0..4u8).prop_map(|(value, mask)| IpMatch::Masked(Masked {
                value: v4(value),
                mask: Ipv4Addr::new(255, 0, 0, mask).into(),
            })),
        ]
    }

    fn v4(host: u8) -> IpAddr {
        Ipv4Addr::new(10, 0, 0, host).into()
    }

    fn v6(host: u8) -> IpAddr {
        Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, host.into()).into()
    }

    /// Values of a dimension: all of them where one of the patterns looks, one elsewhere.
    fn values<T: Clone>(looked_at: bool, all: &[T]) -> &[T] {
        if looked_at { all } else { &all[..1] }
    }

    /// Tries every frame of the small world.
    fn some_frame_matches_both(one: &Pattern, other: &Pattern) -> bool {
        let looks = |get: fn(&Pattern) -> bool| get(one) || get(other);
        let small = [0, 1, 2, 3];
        let ports = values(looks(|p| p.port.is_some()), &[0u16, 1]);
        let macs = values(looks(|p| p.eth_src.is_some()), &small);
        let vlans = values(looks(|p| p.vlan.is_some()), &[None, Some(0), Some(5), Some(6)]);
        let marks = values(looks(|p| p.mark.is_some()), &[0u32, 1, 2, 3]);
        let ips = ip_headers(&looks);
        ports.iter().any(|port| {
            macs.iter().any(|mac| {
                vlans.iter().any(|vlan| {
                    marks.iter().any(|mark| {
                        ips.iter().any(|(ethertype, ip)| {
                            let headers = Headers {
                                eth_dst: MacAddr::default(),
                                eth_src: MacAddr([2, 0, 0, 0, 0, *mac]),
                                vlan: *vlan,
                                ethertype: *ethertype,
                                l3: 14,
                                ip: *ip,
                            };
                            let port = PortRef::vf(*port);
                            headers.match_pattern(one, port, *mark)
                                && headers.match_pattern(other, port, *mark)
                        })
                    })
                })
            })
        })
    }

    fn ip_headers(looks: &dyn Fn(fn(&Pattern) -> bool) -> bool) -> Vec<(EtherType, Option<Ip>)> {
        let small = [0, 1, 2, 3];
        let mut all = vec![(EtherType::ARP, None)];
        for (ethertype, address) in [(EtherType::IPV4, v4 as fn(u8) -> IpAddr), (EtherType::IPV6, v6)] {
            for src in values(looks(|p| p.ip_src.is_some()), &small) {
                for dst in values(looks(|p| p.ip_dst.is_some()), &small) {
                    for dscp in values(looks(|p| p.dscp.is_some()), &[0, 1]) {
                        for proto in [IpProtocol::TCP, IpProtocol::UDP, IpProtocol::ICMP] {
                            for piece in [Piece::Whole, Piece::First, Piece::Later] {
                                let ip = Ip {
                                    src: address(*src),
                                    dst: address(*dst),
                                    proto,
                                    dscp: *dscp,
                                    piece,
                                    ports: None,
                                    tcp_flags: None,
                                };
                                all.extend(with_l4(ip, looks).into_iter().map(|ip| (ethertype, Some(ip))));
                            }
                        }
                    }
                }
            }
        }
        all
    }

    fn with_l4(ip: Ip, looks: &dyn Fn(fn(&Pattern) -> bool) -> bool) -> Vec<Ip> {
        if ip.piece == Piece::Later || !ip.proto.has_ports() {
            return vec![ip];
        }
        let mut all = Vec::new();
        for src in values(looks(|p| p.l4_src.is_some()), &[0u16, 1, 2, 3]) {
            for dst in values(looks(|p| p.l4_dst.is_some()), &[0u16, 1, 2, 3]) {
                for flags in values(looks(|p| p.tcp_flags.is_some()), &[0u8, 1, 2, 3]) {
                    all.push(Ip {
                        ports: Some((*src, *dst)),
                        tcp_flags: (ip.proto == IpProtocol::TCP)
                            .then_some(TcpFlags::from_bits_retain(*flags)),
                        ..ip
                    });
                }
            }
        }
        all
    }

    fn is_sane(pattern: &Pattern) -> bool {
        let actions = vec![Action::Drop];
        SteeringRule::new(Cookie(1), Owner::Agent, Priority(0), pattern.clone(), actions)
            .check()
            .is_ok()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn overlap_is_what_trying_every_frame_finds(one in patterns(), other in patterns()) {
            prop_assume!(is_sane(&one) && is_sane(&other));
            prop_assert_eq!(overlap(&one, &other), some_frame_matches_both(&one, &other));
            prop_assert_eq!(overlap(&one, &other), overlap(&other, &one));
        }
    }

    #[test]
    fn fields_that_frames_of_the_small_world_lack_count_as_well() {
        let vni = |vni: u32| Pattern {
            vni: Some(Vni::try_from(vni).expect("in range")),
            ..Pattern::default()
        };
        assert!(!overlap(&vni(1), &vni(2)));
        assert!(overlap(&vni(1), &Pattern::default()));
        let state = |value, mask| Pattern {
            ct_state: Some(Masked { value, mask }),
            ..Pattern::default()
        };
        let (new, known) = (CtStates::NEW, CtStates::ESTABLISHED);
        assert!(overlap(&state(new, new), &state(known, known)));
        assert!(!overlap(&state(new, new), &state(known, new | known)));
        let dst = |last| Pattern {
            eth_dst: Some(Masked {
                value: MacAddr([2, 0, 0, 0, 0, last]),
                mask: MacAddr::BROADCAST,
            }),
            ..Pattern::default()
        };
        assert!(!overlap(&dst(1), &dst(2)));
        assert!(overlap(&dst(1), &dst(1)));
    }
}
