//! What patterns look at, read from a frame: a plain parser that allocates nothing and takes any octets.
//!
//! A header that is cut short or contradicts itself counts as absent, and so does everything behind it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use dpumesh_core::steering::{
    EtherType, FragmentMatch, IpMatch, IpProtocol, Pattern, PortRange, TcpFlags, VlanMatch,
};
use dpumesh_core::{MacAddr, PortRef};

/// Headers of one frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Headers {
    pub(crate) eth_dst: MacAddr,
    pub(crate) eth_src: MacAddr,
    /// Identifier of the 802.1Q tag, 0 for a priority tag; `None` without a tag.
    pub(crate) vlan: Option<u16>,
    /// Behind the tag.
    pub(crate) ethertype: EtherType,
    /// Where L3 begins.
    pub(crate) l3: usize,
    pub(crate) ip: Option<Ip>,
}

/// An IP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ip {
    pub(crate) src: IpAddr,
    pub(crate) dst: IpAddr,
    pub(crate) proto: IpProtocol,
    pub(crate) dscp: u8,
    pub(crate) piece: Piece,
    /// TCP, UDP and SCTP outside of later fragments.
    pub(crate) ports: Option<(u16, u16)>,
    pub(crate) tcp_flags: Option<TcpFlags>,
}

/// Which piece of a packet a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    Whole,
    First,
    Later,
}

impl Headers {
    /// Reads them; `None` for what is no Ethernet frame.
    pub(crate) fn parse(octets: &[u8]) -> Option<Self> {
        let mut l3 = 14;
        let mut ethertype = be16(octets, 12)?;
        let mut vlan = None;
        if ethertype == 0x8100 {
            vlan = Some(be16(octets, 14)? & 0x0fff);
            ethertype = be16(octets, 16)?;
            l3 = 18;
        }
        let ethertype = EtherType(ethertype);
        let packet = octets.get(l3..)?;
        Some(Self {
            eth_dst: MacAddr(array(octets, 0)?),
            eth_src: MacAddr(array(octets, 6)?),
            vlan,
            ethertype,
            l3,
            ip: match ethertype {
                EtherType::IPV4 => ipv4(packet),
                EtherType::IPV6 => ipv6(packet),
                _ => None,
            },
        })
    }

    /// Whether a frame with these headers, from this port and with this mark, matches.
    pub(crate) fn match_pattern(&self, pattern: &Pattern, port: PortRef, mark: u32) -> bool {
        self.match_link(pattern, port, mark)
            && match &self.ip {
                Some(ip) => ip.match_pattern(pattern),
                None => !looks_at_ip(pattern),
            }
    }

    fn match_link(&self, pattern: &Pattern, port: PortRef, mark: u32) -> bool {
        let mac = |masked: Option<dpumesh_core::steering::Masked<MacAddr>>, mac: MacAddr| {
            masked.is_none_or(|m| (0..6).all(|i| (mac.0[i] ^ m.value.0[i]) & m.mask.0[i] == 0))
        };
        pattern.port.is_none_or(|wanted| wanted == port)
            && mac(pattern.eth_src, self.eth_src)
            && mac(pattern.eth_dst, self.eth_dst)
            && pattern.ethertype.is_none_or(|wanted| wanted == self.ethertype)
            && match pattern.vlan {
                None => true,
                Some(VlanMatch::Untagged) => self.vlan.is_none(),
                Some(VlanMatch::Id(id)) => self.vlan == Some(id.get()),
            }
            && pattern.mark.is_none_or(|m| (mark ^ m.value) & m.mask == 0)
            && pattern.vni.is_none()
            && pattern.ct_state.is_none()
    }
}

impl Ip {
    fn match_pattern(&self, pattern: &Pattern) -> bool {
        let port = |range: Option<PortRange>, pick: fn((u16, u16)) -> u16| {
            range.is_none_or(|r| {
                self.ports
                    .is_some_and(|ports| (r.first..=r.last).contains(&pick(ports)))
            })
        };
        pattern.ip_src.is_none_or(|m| address(m, self.src))
            && pattern.ip_dst.is_none_or(|m| address(m, self.dst))
            && pattern.ip_proto.is_none_or(|proto| proto == self.proto)
            && pattern.dscp.is_none_or(|dscp| dscp.0 == self.dscp)
            && pattern.fragment.is_none_or(|f| self.piece.matches(f))
            && port(pattern.l4_src, |(src, _)| src)
            && port(pattern.l4_dst, |(_, dst)| dst)
            && pattern.tcp_flags.is_none_or(|m| {
                self.tcp_flags
                    .is_some_and(|flags| (flags ^ m.value) & m.mask == TcpFlags::empty())
            })
    }
}

impl Piece {
    fn matches(self, wanted: FragmentMatch) -> bool {
        match wanted {
            FragmentMatch::Whole => self == Self::Whole,
            FragmentMatch::Any => self != Self::Whole,
            FragmentMatch::First => self == Self::First,
            FragmentMatch::Later => self == Self::Later,
        }
    }

    const fn of(offset: u16, more: bool) -> Self {
        match (offset, more) {
            (0, false) => Self::Whole,
            (0, true) => Self::First,
            _ => Self::Later,
        }
    }
}

fn looks_at_ip(pattern: &Pattern) -> bool {
    pattern.ip_src.is_some()
        || pattern.ip_dst.is_some()
        || pattern.ip_proto.is_some()
        || pattern.dscp.is_some()
        || pattern.fragment.is_some()
        || pattern.l4_src.is_some()
        || pattern.l4_dst.is_some()
        || pattern.tcp_flags.is_some()
}

fn address(wanted: IpMatch, address: IpAddr) -> bool {
    match wanted {
        IpMatch::Prefix(prefix) => prefix.contains(&address),
        IpMatch::Masked(m) => match (address, m.value, m.mask) {
            (IpAddr::V4(a), IpAddr::V4(v), IpAddr::V4(m)) => (a.to_bits() ^ v.to_bits()) & m.to_bits() == 0,
            (IpAddr::V6(a), IpAddr::V6(v), IpAddr::V6(m)) => (a.to_bits() ^ v.to_bits()) & m.to_bits() == 0,
            _ => false,
        },
    }
}

fn ipv4(packet: &[u8]) -> Option<Ip> {
    let first = *packet.first()?;
    let header = usize::from(first & 0x0f) * 4;
    let total = usize::from(be16(packet, 2)?);
    if first >> 4 != 4 || header < 20 || total < header || total > packet.len() {
        return None;
    }
    let fragment = be16(packet, 6)?;
    let ip = Ip {
        src: Ipv4Addr::from(array::<4>(packet, 12)?).into(),
        dst: Ipv4Addr::from(array::<4>(packet, 16)?).into(),
        proto: IpProtocol(*packet.get(9)?),
        dscp: packet.get(1)? >> 2,
        piece: Piece::of(fragment & 0x1fff, fragment & 0x2000 != 0),
        ports: None,
        tcp_flags: None,
    };
    Some(ip.with_l4(packet.get(header..total)?))
}

fn ipv6(packet: &[u8]) -> Option<Ip> {
    let first = be16(packet, 0)?;
    let end = 40 + usize::from(be16(packet, 4)?);
    if first >> 12 != 6 || end > packet.len() {
        return None;
    }
    let (proto, piece, at) = last_header(packet.get(..end)?)?;
    let ip = Ip {
        src: Ipv6Addr::from(array::<16>(packet, 8)?).into(),
        dst: Ipv6Addr::from(array::<16>(packet, 24)?).into(),
        proto,
        dscp: (first >> 6) as u8 & 0x3f,
        piece,
        ports: None,
        tcp_flags: None,
    };
    Some(ip.with_l4(packet.get(at..end)?))
}

/// Walks the extension headers (RFC 8200 §4); each is at least eight octets, so the packet bounds the walk.
fn last_header(packet: &[u8]) -> Option<(IpProtocol, Piece, usize)> {
    let mut next = *packet.get(6)?;
    let mut at = 40;
    let mut piece = Piece::Whole;
    loop {
        match next {
            0 | 43 | 60 => {
                next = *packet.get(at)?;
                at += (usize::from(*packet.get(at + 1)?) + 1) * 8;
            }
            44 => {
                let fragment = be16(packet, at + 2)?;
                piece = Piece::of(fragment >> 3, fragment & 1 != 0);
                next = *packet.get(at)?;
                at += 8;
                if piece == Piece::Later {
                    return Some((IpProtocol(next), piece, at));
                }
            }
            _ => return Some((IpProtocol(next), piece, at)),
        }
    }
}

impl Ip {
    fn with_l4(mut self, segment: &[u8]) -> Self {
        if self.piece != Piece::Later && self.proto.has_ports() {
            self.ports = be16(segment, 0).zip(be16(segment, 2));
            if self.proto == IpProtocol::TCP {
                self.tcp_flags = segment.get(13).map(|bits| TcpFlags::from_bits_retain(*bits));
            }
        }
        self
    }
}

fn be16(octets: &[u8], at: usize) -> Option<u16> {
    array(octets, at).map(u16::from_be_bytes)
}

fn array<const N: usize>(octets: &[u8], at: usize) -> Option<[u8; N]> {
    octets.get(at..)?.first_chunk().copied()
}
