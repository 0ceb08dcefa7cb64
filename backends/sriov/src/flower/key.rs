//! Flower keys: the contract's [`Pattern`] as `TCA_FLOWER_KEY_*` and back.
//!
//! flower looks at IP fields only under an EtherType of IP, and silently ignores the attributes else: a pattern that leaves the
//! EtherType open but looks at IP becomes one set of keys per [`Family`]. The EtherType is the one behind an 802.1Q tag, as
//! in the contract: flower's dissector looks through the tag.
//!
//! Not to be had: `pattern.mark` (flower does not look at the packet mark).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use dpumesh_core::steering::{
    CtStates, DscpMatch, EtherType, FragmentMatch, IpMatch, IpProtocol, Masked, Pattern, PortRange, TcpFlags,
    VlanMatch,
};
use dpumesh_core::{MacAddr, VlanId, Vni};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use netlink_packet_core::{DefaultNla, Nla, NlaBuffer, Parseable};
use netlink_packet_route::tc::TcFilterFlowerOption as Key;

/// IPv4 or IPv6: what flower's IP keys stand under.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Family {
    Ip4,
    Ip6,
}

impl Family {
    fn ethertype(self) -> EtherType {
        match self {
            Self::Ip4 => EtherType::IPV4,
            Self::Ip6 => EtherType::IPV6,
        }
    }

    fn of(ethertype: EtherType) -> Option<Self> {
        match ethertype {
            EtherType::IPV4 => Some(Self::Ip4),
            EtherType::IPV6 => Some(Self::Ip6),
            _ => None,
        }
    }
}

/// The family that a pattern itself names, by EtherType or address.
pub(super) fn family_of(pattern: &Pattern) -> Option<Family> {
    let address = pattern
        .ip_src
        .or(pattern.ip_dst)
        .map(|address| match address.is_ipv4() {
            true => Family::Ip4,
            false => Family::Ip6,
        });
    address.or_else(|| pattern.ethertype.and_then(Family::of))
}

/// True when a pattern looks at something that only IP packets have.
pub(super) fn needs_ip(pattern: &Pattern) -> bool {
    pattern.ip_src.is_some()
        || pattern.ip_dst.is_some()
        || pattern.ip_proto.is_some()
        || pattern.dscp.is_some()
        || pattern.fragment.is_some()
        || pattern.l4_src.is_some()
        || pattern.l4_dst.is_some()
        || pattern.tcp_flags.is_some()
}

const ETH_P_8021Q: u16 = 0x8100;
const INDEV_MAX: usize = 15;
/// `TCA_FLOWER_KEY_NUM_OF_VLANS`, kernel 5.19: newer than the types.
const NUM_OF_VLANS: u16 = 102;
const IS_FRAGMENT: u32 = 1;
const IS_FIRST: u32 = 2;
/// TTL 0 and 1 differ in the lowest bit.
const TTL_ENDS: u8 = 0xfe;
const TCP_FLAGS: u16 = 0xff;

/// A set of keys; a frame matches when it matches all of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Keys(Vec<Key>);

impl Keys {
    /// The keys of a pattern under a family, on a netdev. `None` when it can match no frame.
    pub(super) fn of(pattern: &Pattern, family: Option<Family>, link: Option<&str>) -> Option<Self> {
        let mut keys = Vec::with_capacity(16);
        keys.extend(link.map(|name| Key::InDev(name[..name.len().min(INDEV_MAX)].to_owned())));
        // flower tells filters apart by what is left of them under the mask.
        let mac = |masked: Option<Masked<MacAddr>>| {
            let mut masked = masked.filter(|m| !m.mask.is_zero())?;
            masked
                .value
                .0
                .iter_mut()
                .zip(masked.mask.0)
                .for_each(|(octet, mask)| *octet &= mask);
            Some(masked)
        };
        if let Some(m) = mac(pattern.eth_dst) {
            keys.extend([Key::EthDst(m.value.0), Key::EthDstMask(m.mask.0)]);
        }
        if let Some(m) = mac(pattern.eth_src) {
            keys.extend([Key::EthSrc(m.value.0), Key::EthSrcMask(m.mask.0)]);
        }
        let ethertype = match (pattern.ethertype, family) {
            (Some(named), Some(family)) if named != family.ethertype() => return None,
            (named, family) => named.or_else(|| family.map(Family::ethertype)),
        };
        put_ethertype(&mut keys, ethertype, pattern.vlan);
        keys.extend(pattern.vni.map(|vni| Key::EncKeyId(vni.get())));
        keys.extend(pattern.ip_proto.map(|proto| Key::IpProto(proto.0)));
        for (address, source) in [(pattern.ip_src, true), (pattern.ip_dst, false)] {
            put_address(&mut keys, address, source);
        }
        if let Some(dscp) = pattern.dscp {
            keys.extend([Key::IpTos(dscp.0 << 2), Key::IpTosMask(0xfc)]);
        }
        if let Some(fragment) = pattern.fragment {
            let (value, mask) = fragment_flags(fragment);
            keys.extend([Key::KeyFlags(value), Key::KeyFlagsMask(mask)]);
        }
        put_ports(&mut keys, pattern);
        if let Some(m) = pattern.tcp_flags {
            let bits = |flags: TcpFlags| u16::from(flags.bits());
            keys.extend([
                Key::TcpFlags(bits(m.value & m.mask)),
                Key::TcpFlagsMask(bits(m.mask)),
            ]);
        }
        if let Some(m) = pattern.ct_state {
            keys.extend([
                Key::CtState(ct_bits(m.value & m.mask)),
                Key::CtStateMask(ct_bits(m.mask)),
            ]);
        }
        Some(Self(keys))
    }

    /// The same keys for frames whose TTL or hop limit ends here.
    pub(super) fn with_ttl_ending(mut self) -> Self {
        self.0.extend([Key::IpTtl(0), Key::IpTtlMask(TTL_ENDS)]);
        self
    }

    /// Reads attributes back; those that are no keys (actions, flags) are passed over. `None` for a key that [`Keys::of`]
    /// does not write, or one malformed.
    pub(super) fn read<'a>(options: impl Iterator<Item = (u16, &'a [u8])>) -> Option<Self> {
        let mut keys = Vec::new();
        for (kind, value) in options {
            if NOT_KEYS.contains(&kind) {
                continue;
            }
            keys.push(parse(kind, value)?);
        }
        Some(Self(keys))
    }

    /// As attributes.
    pub(super) fn attributes(&self) -> impl Iterator<Item = (u16, Vec<u8>)> {
        self.0.iter().map(|key| {
            let mut value = vec![0; key.value_len()];
            key.emit_value(&mut value);
            (key.kind(), value)
        })
    }

    /// True when every key of `asked` is there: an older kernel silently forgets those that it does not know.
    pub(super) fn contains(&self, asked: &Self) -> bool {
        asked.0.iter().all(|key| self.0.contains(key))
    }

    /// Name of the netdev.
    pub(super) fn link(&self) -> Option<&str> {
        self.0.iter().find_map(|key| match key {
            Key::InDev(name) => Some(name.as_str()),
            _ => None,
        })
    }

    /// True for keys of [`Keys::with_ttl_ending`].
    pub(super) fn is_ttl_ending(&self) -> bool {
        self.0.iter().any(|key| matches!(key, Key::IpTtlMask(TTL_ENDS)))
    }

    /// The pattern, without its port. The EtherType of IP is left out unless it was `explicit`.
    pub(super) fn pattern(&self, explicit: bool) -> Option<Pattern> {
        let mut found = Found::default();
        for key in &self.0 {
            found.take(key)?;
        }
        found.finish(explicit)
    }
}

// CLASSID, ACT, FLAGS, IN_HW_COUNT
const NOT_KEYS: [u16; 4] = [1, 3, 22, 86];

fn parse(kind: u16, value: &[u8]) -> Option<Key> {
    let mut octets = ((value.len() + 4) as u16).to_ne_bytes().to_vec();
    octets.extend(kind.to_ne_bytes());
    octets.extend(value);
    Key::parse(&NlaBuffer::new_checked(&octets[..]).ok()?).ok()
}

fn put_ethertype(keys: &mut Vec<Key>, ethertype: Option<EtherType>, vlan: Option<VlanMatch>) {
    match vlan {
        Some(VlanMatch::Id(id)) => {
            keys.extend([Key::EthType(ETH_P_8021Q), Key::VlanId(id.get())]);
            keys.extend(ethertype.map(|ethertype| Key::VlanEthType(ethertype.0)));
        }
        other => {
            if other.is_some() {
                keys.push(Key::Other(DefaultNla::new(NUM_OF_VLANS, vec![0])));
            }
            keys.extend(ethertype.map(|ethertype| Key::EthType(ethertype.0)));
        }
    }
}

fn put_address(keys: &mut Vec<Key>, address: Option<IpMatch>, source: bool) {
    let Some(address) = address else { return };
    let (value, mask) = match address {
        IpMatch::Prefix(net) => (net.addr(), net.netmask()),
        IpMatch::Masked(masked) => (masked.value, masked.mask),
    };
    if mask.is_unspecified() {
        return; // not looked at; the EtherType tells the family
    }
    keys.extend(match (value, mask, source) {
        (IpAddr::V4(value), IpAddr::V4(mask), true) => {
            [Key::Ipv4Src(masked4(value, mask)), Key::Ipv4SrcMask(mask)]
        }
        (IpAddr::V4(value), IpAddr::V4(mask), false) => {
            [Key::Ipv4Dst(masked4(value, mask)), Key::Ipv4DstMask(mask)]
        }
        (IpAddr::V6(value), IpAddr::V6(mask), true) => {
            [Key::Ipv6Src(masked6(value, mask)), Key::Ipv6SrcMask(mask)]
        }
        (IpAddr::V6(value), IpAddr::V6(mask), false) => {
            [Key::Ipv6Dst(masked6(value, mask)), Key::Ipv6DstMask(mask)]
        }
        _ => return, // refused by `SteeringRule::check`
    });
}

fn masked4(value: Ipv4Addr, mask: Ipv4Addr) -> Ipv4Addr {
    (value.to_bits() & mask.to_bits()).into()
}

fn masked6(value: Ipv6Addr, mask: Ipv6Addr) -> Ipv6Addr {
    (value.to_bits() & mask.to_bits()).into()
}

fn put_ports(keys: &mut Vec<Key>, pattern: &Pattern) {
    for (range, source) in [(pattern.l4_src, true), (pattern.l4_dst, false)] {
        let Some(PortRange { first, last }) = range else {
            continue;
        };
        let Some(proto) = pattern.ip_proto else { continue };
        keys.extend(match (first == last, source, proto) {
            (false, true, _) => [Key::PortSrcMin(first), Key::PortSrcMax(last)],
            (false, false, _) => [Key::PortDstMin(first), Key::PortDstMax(last)],
            (true, true, IpProtocol::TCP) => [Key::TcpSrc(first), Key::TcpSrcMask(u16::MAX)],
            (true, false, IpProtocol::TCP) => [Key::TcpDst(first), Key::TcpDstMask(u16::MAX)],
            (true, true, IpProtocol::UDP) => [Key::UdpSrc(first), Key::UdpSrcMask(u16::MAX)],
            (true, false, IpProtocol::UDP) => [Key::UdpDst(first), Key::UdpDstMask(u16::MAX)],
            (true, true, _) => [Key::SctpSrc(first), Key::SctpSrcMask(u16::MAX)],
            (true, false, _) => [Key::SctpDst(first), Key::SctpDstMask(u16::MAX)],
        });
    }
}

fn fragment_flags(fragment: FragmentMatch) -> (u32, u32) {
    match fragment {
        FragmentMatch::Whole => (0, IS_FRAGMENT),
        FragmentMatch::Any => (IS_FRAGMENT, IS_FRAGMENT),
        FragmentMatch::First => (IS_FRAGMENT | IS_FIRST, IS_FRAGMENT | IS_FIRST),
        FragmentMatch::Later => (IS_FRAGMENT, IS_FRAGMENT | IS_FIRST),
    }
}

/// The contract's states and the bits that flower has for them.
const CT: [(CtStates, u16); 6] = [
    (CtStates::NEW, 1),
    (CtStates::ESTABLISHED, 1 << 1),
    (CtStates::RELATED, 1 << 2),
    (CtStates::TRACKED, 1 << 3),
    (CtStates::INVALID, 1 << 4),
    (CtStates::REPLY, 1 << 5),
];

fn ct_bits(states: CtStates) -> u16 {
    CT.iter()
        .filter(|(state, _)| states.contains(*state))
        .map(|(_, bit)| bit)
        .sum()
}

fn ct_states(bits: u16) -> CtStates {
    CT.iter()
        .filter(|(_, bit)| bits & bit != 0)
        .map(|(state, _)| *state)
        .collect()
}

/// Keys read so far.
#[derive(Default)]
struct Found {
    pattern: Pattern,
    ethertype: Option<u16>,
    inner_ethertype: Option<u16>,
    vlan: Option<u16>,
    mac: [Option<[u8; 6]>; 2],
    four: [(Option<Ipv4Addr>, Option<Ipv4Addr>); 2],
    six: [(Option<Ipv6Addr>, Option<Ipv6Addr>); 2],
    ports: [(Option<u16>, Option<u16>); 2],
    fragment: (u32, u32),
    tcp_flags: Option<u16>,
    ct: Option<u16>,
}

impl Found {
    /// Takes a key in. `None` for a key that no pattern has.
    fn take(&mut self, key: &Key) -> Option<()> {
        const SRC: usize = 0;
        const DST: usize = 1;
        let full = |mask: &u16| (*mask == u16::MAX).then_some(());
        match key {
            Key::InDev(_) | Key::IpTtl(_) | Key::IpTtlMask(_) => {}
            Key::EthSrc(mac) => self.mac[SRC] = Some(*mac),
            Key::EthDst(mac) => self.mac[DST] = Some(*mac),
            Key::EthSrcMask(mask) => self.pattern.eth_src = Some(masked_mac(self.mac[SRC]?, *mask)),
            Key::EthDstMask(mask) => self.pattern.eth_dst = Some(masked_mac(self.mac[DST]?, *mask)),
            Key::EthType(ethertype) => self.ethertype = Some(*ethertype),
            Key::VlanId(id) => self.vlan = Some(*id),
            Key::VlanEthType(ethertype) => self.inner_ethertype = Some(*ethertype),
            Key::Other(other) if other.kind() == NUM_OF_VLANS => {
                self.pattern.vlan = Some(VlanMatch::Untagged)
            }
            Key::EncKeyId(vni) => self.pattern.vni = Some(Vni::try_from(*vni).ok()?),
            Key::IpProto(proto) => self.pattern.ip_proto = Some(IpProtocol(*proto)),
            Key::Ipv4Src(address) => self.four[SRC].0 = Some(*address),
            Key::Ipv4Dst(address) => self.four[DST].0 = Some(*address),
            Key::Ipv4SrcMask(mask) => self.four[SRC].1 = Some(*mask),
            Key::Ipv4DstMask(mask) => self.four[DST].1 = Some(*mask),
            Key::Ipv6Src(address) => self.six[SRC].0 = Some(*address),
            Key::Ipv6Dst(address) => self.six[DST].0 = Some(*address),
            Key::Ipv6SrcMask(mask) => self.six[SRC].1 = Some(*mask),
            Key::Ipv6DstMask(mask) => self.six[DST].1 = Some(*mask),
            Key::IpTos(tos) => self.pattern.dscp = Some(DscpMatch(tos >> 2)),
            Key::IpTosMask(mask) => (*mask == 0xfc).then_some(())?,
            Key::KeyFlags(flags) => self.fragment.0 = *flags,
            Key::KeyFlagsMask(mask) => self.fragment.1 = *mask,
            Key::PortSrcMin(port) => self.ports[SRC].0 = Some(*port),
            Key::PortSrcMax(port) => self.ports[SRC].1 = Some(*port),
            Key::PortDstMin(port) => self.ports[DST].0 = Some(*port),
            Key::PortDstMax(port) => self.ports[DST].1 = Some(*port),
            Key::TcpSrc(port) | Key::UdpSrc(port) | Key::SctpSrc(port) => {
                self.ports[SRC] = (Some(*port), Some(*port))
            }
            Key::TcpDst(port) | Key::UdpDst(port) | Key::SctpDst(port) => {
                self.ports[DST] = (Some(*port), Some(*port))
            }
            Key::TcpSrcMask(mask)
            | Key::TcpDstMask(mask)
            | Key::UdpSrcMask(mask)
            | Key::UdpDstMask(mask)
            | Key::SctpSrcMask(mask)
            | Key::SctpDstMask(mask) => full(mask)?,
            Key::TcpFlags(flags) => self.tcp_flags = Some(*flags),
            Key::TcpFlagsMask(mask) => {
                let flags = |bits: u16| TcpFlags::from_bits_retain((bits & TCP_FLAGS) as u8);
                let (value, mask) = (flags(self.tcp_flags?), flags(*mask));
                self.pattern.tcp_flags = Some(Masked { value, mask });
            }
            Key::CtState(states) => self.ct = Some(*states),
            Key::CtStateMask(mask) => {
                let (value, mask) = (ct_states(self.ct?), ct_states(*mask));
                self.pattern.ct_state = Some(Masked { value, mask });
            }
            _ => return None,
        }
        Some(())
    }

    fn finish(mut self, explicit: bool) -> Option<Pattern> {
        let mut ethertype = self.ethertype;
        if let Some(id) = self.vlan {
            self.pattern.vlan = Some(VlanMatch::Id(VlanId::try_from(id).ok()?));
            ethertype = self.inner_ethertype;
        }
        let implied = ethertype
            .map(EtherType)
            .filter(|ethertype| explicit || Family::of(*ethertype).is_none());
        self.pattern.ethertype = implied;
        let address = |side: usize| -> Option<Option<IpMatch>> {
            Some(match (self.four[side], self.six[side]) {
                ((Some(value), mask), _) => Some(match4(value, mask.unwrap_or(Ipv4Addr::BROADCAST))?),
                (_, (Some(value), mask)) => {
                    Some(match6(value, mask.unwrap_or_else(|| Ipv6Addr::from_bits(!0)))?)
                }
                _ => None,
            })
        };
        self.pattern.ip_src = address(0)?;
        self.pattern.ip_dst = address(1)?;
        let range = |side: usize| match self.ports[side] {
            (Some(first), Some(last)) => Some(PortRange { first, last }),
            _ => None,
        };
        self.pattern.l4_src = range(0);
        self.pattern.l4_dst = range(1);
        self.pattern.fragment = match self.fragment {
            (_, 0) => None,
            flags => Some(
                [
                    FragmentMatch::Whole,
                    FragmentMatch::Any,
                    FragmentMatch::First,
                    FragmentMatch::Later,
                ]
                .into_iter()
                .find(|fragment| fragment_flags(*fragment) == flags)?,
            ),
        };
        Some(self.pattern)
    }
}

fn masked_mac(value: [u8; 6], mask: [u8; 6]) -> Masked<MacAddr> {
    Masked {
        value: MacAddr(value),
        mask: MacAddr(mask),
    }
}

/// A prefix where the mask is one.
fn match4(value: Ipv4Addr, mask: Ipv4Addr) -> Option<IpMatch> {
    let bits = mask.to_bits();
    Some(match bits.leading_ones() == bits.count_ones() {
        true => IpNet::from(Ipv4Net::new(value, bits.count_ones() as u8).ok()?).into(),
        false => IpMatch::Masked(Masked {
            value: value.into(),
            mask: mask.into(),
        }),
    })
}

fn match6(value: Ipv6Addr, mask: Ipv6Addr) -> Option<IpMatch> {
    let bits = mask.to_bits();
    Some(match bits.leading_ones() == bits.count_ones() {
        true => IpNet::from(Ipv6Net::new(value, bits.count_ones() as u8).ok()?).into(),
        false => IpMatch::Masked(Masked {
            value: value.into(),
            mask: mask.into(),
        }),
    })
}
