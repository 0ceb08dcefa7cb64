//! The one pass over a frame: every field that lookup, classification and rewriting need, with the places of the
//! headers, in a small value of its own.
//!
//! ```text
//! | Ethernet | 802.1Q? | IPv4, IPv6 or ARP | extensions | TCP, UDP or ICMP | payload | padding |
//! 0                    l3_offset                        l4_offset  + l4_header_len   l3_end
//! ```
//!
//! A parsed frame is sound from here on: all lengths agree with each other and with the frame, the IPv4 header's
//! checksum is right (RFC 1812 §5.2.2), a first fragment holds its L4 header whole (RFC 1858, RFC 7112), nobody
//! routes by source (RFC 7126, RFC 5095). L4 checksums are not looked at: that is [`super::checksum::verify`], for
//! those who need it. What is no IP and no ARP, a second VLAN tag included, is [`L3::Other`] and opaque.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Range;

use dpumesh_core::MacAddr;

use super::checksum::Sum;
use super::ethernet::{self, ethertype};
use super::field::array;
use super::fragment::Fragment;
use super::malformed::{Layer, Malformed};
use super::{arp, icmpv4, icmpv6, ipv4, ipv6, protocol, tcp, udp, vlan};

/// The decoded headers of one frame. Offsets count from the destination MAC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Headers {
    /// Destination MAC.
    pub eth_dst: MacAddr,
    /// Source MAC.
    pub eth_src: MacAddr,
    /// Ethertype behind at most one 802.1Q tag.
    pub ethertype: u16,
    /// The tag, if there is one.
    pub vlan: Option<vlan::Tag>,
    /// What the ethertype says and the contents confirm.
    pub l3: L3,
    /// First octet behind Ethernet header and tag.
    pub l3_offset: u16,
    /// Source address, IPv4 as `::ffff:a.b.c.d`; in ARP the sender's; else zero.
    pub src: [u8; 16],
    /// Destination address, IPv4 as `::ffff:a.b.c.d`; in ARP the target's; else zero.
    pub dst: [u8; 16],
    /// Differentiated services code point, 0 to 63.
    pub dscp: u8,
    /// Explicit congestion notification, 0 to 3.
    pub ecn: u8,
    /// TTL or hop limit.
    pub ttl: u8,
    /// IPv4 protocol, or the first next header that is no extension header.
    pub protocol: u8,
    /// Octets of the L3 packet, header included, as its own length field says (of [`L3::Other`]: all there are).
    pub l3_len: u32,
    /// Octets behind the L3 packet.
    pub padding: u32,
    /// Routers must not fragment the packet: DF in IPv4, always in IPv6; elsewhere false.
    pub dont_fragment: bool,
    /// Which part of its packet this is.
    pub fragment: Fragment,
    /// First octet behind IP header, options and extension headers; without IP, the end of the L3 packet.
    pub l4_offset: u16,
    /// Octets of the L4 header, TCP options included; 0 where none was read.
    pub l4_header_len: u8,
    /// ICMP type; 0 where none was read.
    pub icmp_type: u8,
    /// ICMP code; 0 where none was read.
    pub icmp_code: u8,
    /// Source port of TCP or UDP; 0 where none was read.
    pub src_port: u16,
    /// Destination port of TCP or UDP; 0 where none was read.
    pub dst_port: u16,
    /// TCP control bits; empty where none were read.
    pub tcp_flags: tcp::Flags,
}

/// What a frame carries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum L3 {
    /// ARP for IPv4.
    Arp,
    /// IPv4.
    Ipv4,
    /// IPv6.
    Ipv6,
    /// Something this dataplane does not read.
    #[default]
    Other,
}

impl Headers {
    /// Reads the headers of a frame.
    ///
    /// # Errors
    /// The first rule that the octets break: those of the views in this module's siblings, and those listed on top
    /// of this file.
    #[inline]
    pub fn parse(octets: &[u8]) -> Result<Self, Malformed> {
        let frame = ethernet::Packet::new(octets)?;
        let mut headers = Self::of_ethernet(&frame);
        if headers.ethertype == ethertype::VLAN {
            let tagged = vlan::Packet::new(frame.payload())?;
            headers.ethertype = tagged.ethertype();
            headers.vlan = Some(tagged.tag());
            headers.l3_offset += vlan::HEADER_LEN as u16;
        }
        let l3 = &octets[usize::from(headers.l3_offset)..];
        match headers.ethertype {
            ethertype::IPV4 => headers.read_ipv4(l3)?,
            ethertype::IPV6 => headers.read_ipv6(l3)?,
            ethertype::ARP => headers.read_arp(l3)?,
            _ => headers.end_l3(l3.len(), l3.len(), l3.len()),
        }
        Ok(headers)
    }

    /// First octet behind the L3 packet.
    pub fn l3_end(&self) -> usize {
        usize::from(self.l3_offset) + self.l3_len as usize
    }

    /// Where the L4 header and its payload are.
    pub fn l4_range(&self) -> Range<usize> {
        usize::from(self.l4_offset)..self.l3_end()
    }

    /// First octet of the L4 payload.
    pub fn payload_offset(&self) -> usize {
        usize::from(self.l4_offset) + usize::from(self.l4_header_len)
    }

    /// Octets of L4 payload.
    pub fn payload_len(&self) -> usize {
        self.l3_end().saturating_sub(self.payload_offset())
    }

    /// Source address; of what is no IP and no ARP, `::`.
    pub fn source(&self) -> IpAddr {
        Ipv6Addr::from(self.src).to_canonical()
    }

    /// Destination address; of what is no IP and no ARP, `::`.
    pub fn destination(&self) -> IpAddr {
        Ipv6Addr::from(self.dst).to_canonical()
    }

    /// True for IPv4 and IPv6.
    pub fn is_ip(&self) -> bool {
        matches!(self.l3, L3::Ipv4 | L3::Ipv6)
    }

    /// A number that spreads flows over paths and is the same for all packets of a flow, fragments included (whose
    /// ports do not count, since later ones have none). Anyone can make flows collide: it is not for tables.
    pub fn flow_hash(&self) -> u32 {
        let ports = match self.fragment {
            Fragment::None => u64::from(self.src_port) << 16 | u64::from(self.dst_port),
            _ => 0,
        };
        let half = |address: &[u8; 16], at| u64::from_be_bytes(array(address, at));
        let mut hash = u64::from(self.ethertype) << 40 | u64::from(self.protocol) << 32 | ports;
        for address in [&self.src, &self.dst] {
            let (high, low) = (
                half(address, 0) ^ 0x9e37_79b9_7f4a_7c15,
                half(address, 8) ^ 0xd6e8_feb8_6659_fd93,
            );
            let product = u128::from(hash ^ high) * u128::from(low);
            hash = product as u64 ^ (product >> 64) as u64;
        }
        (hash >> 32) as u32
    }

    /// The pseudo-header's sum for an upper-layer packet of `len` octets.
    pub(super) fn pseudo_sum(&self, len: u32) -> Sum {
        let skip = if self.l3 == L3::Ipv4 { 12 } else { 0 };
        Sum::of(&self.src[skip..])
            .plus(Sum::of(&self.dst[skip..]))
            .plus(Sum::word(u16::from(self.protocol)))
            .plus(Sum::long(len))
    }

    fn of_ethernet(frame: &ethernet::Packet<&[u8]>) -> Self {
        Self {
            eth_dst: frame.destination(),
            eth_src: frame.source(),
            ethertype: frame.ethertype(),
            vlan: None,
            l3: L3::Other,
            l3_offset: ethernet::HEADER_LEN as u16,
            src: [0; 16],
            dst: [0; 16],
            dscp: 0,
            ecn: 0,
            ttl: 0,
            protocol: 0,
            l3_len: 0,
            padding: 0,
            dont_fragment: false,
            fragment: Fragment::None,
            l4_offset: 0,
            l4_header_len: 0,
            icmp_type: 0,
            icmp_code: 0,
            src_port: 0,
            dst_port: 0,
            tcp_flags: tcp::Flags::empty(),
        }
    }

    fn read_arp(&mut self, l3: &[u8]) -> Result<(), Malformed> {
        let packet = arp::Packet::new(l3)?;
        self.l3 = L3::Arp;
        self.src = mapped(packet.sender_ip());
        self.dst = mapped(packet.target_ip());
        self.end_l3(arp::LEN, arp::LEN, l3.len());
        Ok(())
    }

    #[inline]
    fn read_ipv4(&mut self, l3: &[u8]) -> Result<(), Malformed> {
        let packet = ipv4::Packet::new(l3)?;
        if !packet.verify_checksum() {
            let found = u32::from(u16::from_be_bytes(array(l3, ipv4::at::CHECKSUM)));
            return Err(Malformed::invalid(
                Layer::Ipv4,
                "header checksum",
                found,
                "the header's sum",
            ));
        }
        if packet.header_len() > ipv4::HEADER_LEN {
            refuse_source_routes(&packet)?;
        }
        self.l3 = L3::Ipv4;
        self.src = mapped(packet.source());
        self.dst = mapped(packet.destination());
        self.dscp = packet.dscp();
        self.ecn = packet.ecn();
        self.ttl = packet.ttl();
        self.protocol = packet.protocol();
        self.dont_fragment = packet.dont_fragment();
        self.fragment = packet.fragment();
        self.fragment.check(Layer::Ipv4, packet.payload().len())?;
        self.end_l3(packet.header_len(), packet.total_len(), l3.len());
        self.read_l4(packet.payload())
    }

    #[inline]
    fn read_ipv6(&mut self, l3: &[u8]) -> Result<(), Malformed> {
        let packet = ipv6::Packet::new(l3)?;
        let extensions = packet.extensions()?;
        self.l3 = L3::Ipv6;
        self.src = unmapped("source", packet.source())?;
        self.dst = unmapped("destination", packet.destination())?;
        self.dscp = packet.dscp();
        self.ecn = packet.ecn();
        self.ttl = packet.hop_limit();
        self.protocol = extensions.protocol;
        self.dont_fragment = true;
        self.fragment = extensions.fragment;
        self.end_l3(ipv6::HEADER_LEN + extensions.len, packet.total_len(), l3.len());
        self.read_l4(&packet.payload()[extensions.len..])
    }

    #[inline]
    fn end_l3(&mut self, header: usize, total: usize, have: usize) {
        self.l4_offset = self
            .l3_offset
            .saturating_add(u16::try_from(header).unwrap_or(u16::MAX));
        self.l3_len = total as u32;
        self.padding = (have - total) as u32;
    }

    #[inline]
    fn read_l4(&mut self, l4: &[u8]) -> Result<(), Malformed> {
        if let Fragment::Later { offset, .. } = self.fragment {
            return refuse_overlap(self.protocol, offset);
        }
        match (self.protocol, self.l3) {
            (protocol::TCP, _) => {
                let segment = tcp::Packet::new(l4)?;
                self.src_port = segment.source();
                self.dst_port = segment.destination();
                self.tcp_flags = segment.flags();
                self.l4_header_len = segment.header_len() as u8;
            }
            (protocol::UDP, _) => {
                let datagram = match self.fragment {
                    Fragment::None => udp::Packet::new(l4)?,
                    _ => udp::Packet::first_fragment(l4)?,
                };
                self.src_port = datagram.source();
                self.dst_port = datagram.destination();
                self.l4_header_len = udp::HEADER_LEN as u8;
            }
            (protocol::ICMPV4, L3::Ipv4) => {
                let message = icmpv4::Packet::new(l4)?;
                self.icmp_type = message.kind();
                self.icmp_code = message.code();
                self.l4_header_len = icmpv4::HEADER_LEN as u8;
            }
            (protocol::ICMPV6, L3::Ipv6) => {
                let message = icmpv6::Packet::new(l4)?;
                self.icmp_type = message.kind();
                self.icmp_code = message.code();
                self.l4_header_len = icmpv6::HEADER_LEN as u8;
            }
            _ => {}
        }
        Ok(())
    }
}

const fn mapped(address: Ipv4Addr) -> [u8; 16] {
    address.to_ipv6_mapped().octets()
}

/// An IPv6 address that would be taken for an IPv4 flow's must not be on a wire (RFC 4291 §2.5.5.2 gives it to APIs).
fn unmapped(field: &'static str, address: Ipv6Addr) -> Result<[u8; 16], Malformed> {
    match address.to_ipv4_mapped() {
        None => Ok(address.octets()),
        Some(v4) => Err(Malformed::invalid(
            Layer::Ipv6,
            field,
            v4.to_bits(),
            "an address that is not v4-mapped",
        )),
    }
}

/// A fragment that begins within the TCP header rewrites the ports or flags that were looked at (RFC 3128).
fn refuse_overlap(protocol: u8, offset: u16) -> Result<(), Malformed> {
    if protocol == protocol::TCP && usize::from(offset) < tcp::HEADER_LEN {
        let expected = "20 or more in TCP: no second fragment within the header";
        return Err(Malformed::invalid(
            Layer::Tcp,
            "fragment offset",
            u32::from(offset),
            expected,
        ));
    }
    Ok(())
}

#[cold]
fn refuse_source_routes(packet: &ipv4::Packet<&[u8]>) -> Result<(), Malformed> {
    for option in packet.options() {
        let option = option?;
        if option.is_source_route() {
            let expected = "no source route: it is not forwarded";
            return Err(Malformed::invalid(
                Layer::Ipv4,
                "option",
                u32::from(option.kind),
                expected,
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::samples;

    fn parse(octets: &[u8]) -> Headers {
        Headers::parse(octets).expect("valid")
    }

    #[test]
    fn a_tcp_segment_behind_a_vlan_tag() {
        let octets = samples::tcp_v4_vlan();
        let headers = parse(&octets);
        assert_eq!(headers.vlan.and_then(vlan::Tag::id).map(|id| id.get()), Some(100));
        assert_eq!(headers.vlan.map(vlan::Tag::pcp), Some(5));
        assert_eq!(
            (headers.l3, headers.l3_offset, headers.l4_offset),
            (L3::Ipv4, 18, 38)
        );
        assert_eq!(headers.source().to_string(), "10.0.0.1");
        assert_eq!(headers.destination().to_string(), "10.0.0.2");
        assert_eq!((headers.src_port, headers.dst_port), (40_000, 80));
        assert_eq!(headers.tcp_flags, tcp::Flags::ACK | tcp::Flags::PSH);
        assert_eq!((headers.l4_header_len, headers.payload_offset()), (32, 70));
        assert_eq!((headers.payload_len(), headers.padding), (octets.len() - 70, 0));
        assert_eq!(
            (headers.ttl, headers.dscp, headers.ecn, headers.dont_fragment),
            (64, 0, 0, true)
        );
    }

    #[test]
    fn every_sample_is_read_as_what_it_is() {
        let udp = parse(&samples::udp_v6_options());
        assert_eq!(
            (udp.l3, udp.protocol, udp.l4_offset, udp.dst_port),
            (L3::Ipv6, 17, 14 + 40 + 8, 53)
        );
        let arp = parse(&samples::arp_request());
        assert_eq!((arp.l3, arp.padding), (L3::Arp, 18));
        assert_eq!((arp.source().to_string(), arp.l3_end()), ("10.0.0.1".into(), 42));
        let ping = parse(&samples::ping_v4());
        assert_eq!((ping.protocol, ping.icmp_type, ping.icmp_code), (1, 8, 0));
        let solicitation = parse(&samples::neighbor_solicitation());
        assert_eq!(
            (solicitation.protocol, solicitation.icmp_type, solicitation.ttl),
            (58, 135, 255)
        );
    }

    #[test]
    fn padding_is_reported_and_no_payload() {
        let mut octets = samples::tcp_v4_vlan();
        let payload = parse(&octets).payload_len();
        octets.extend([0xff; 9]);
        let headers = parse(&octets);
        assert_eq!((headers.padding, headers.payload_len()), (9, payload));
    }

    #[test]
    fn every_truncation_is_refused_by_the_layer_it_hits() {
        for (name, octets) in samples::all() {
            let whole = parse(&octets);
            for len in 0..octets.len() {
                let outcome = Headers::parse(&octets[..len]);
                if len >= whole.l3_end() && whole.l3 != L3::Other {
                    let cut = Headers {
                        padding: (len - whole.l3_end()) as u32,
                        ..whole
                    };
                    assert_eq!(outcome, Ok(cut), "{name} at {len}");
                    continue;
                }
                if whole.l3 == L3::Other && len >= usize::from(whole.l3_offset) {
                    assert!(outcome.is_ok(), "{name} at {len}");
                    continue;
                }
                let refused = outcome.unwrap_err();
                let layer = match (len, whole.vlan, whole.l3) {
                    (..14, ..) => Layer::Ethernet,
                    (..18, Some(_), _) => Layer::Vlan,
                    (.., L3::Arp) => Layer::Arp,
                    (.., L3::Ipv4) => Layer::Ipv4,
                    _ => Layer::Ipv6,
                };
                assert_eq!(
                    (refused.layer, refused.is_truncated()),
                    (layer, true),
                    "{name} at {len}: {refused}"
                );
            }
        }
    }

    /// Truncated within L4 by a length field that agrees with the frame.
    #[test]
    fn an_l4_header_that_does_not_fit_its_packet_is_refused() {
        let octets = samples::tcp_v4();
        for len in 34..34 + 32 {
            let mut cut = octets[..len].to_vec();
            cut[16..18].copy_from_slice(&((len - 14) as u16).to_be_bytes());
            samples::fill_ipv4_checksum(&mut cut, 14);
            let refused = Headers::parse(&cut).unwrap_err();
            assert_eq!(
                (refused.layer, refused.is_truncated()),
                (Layer::Tcp, true),
                "at {len}"
            );
        }
    }

    #[test]
    fn a_second_tag_is_opaque() {
        let mut octets = samples::tcp_v4_vlan();
        octets.splice(12..12, [0x81, 0, 0, 7]);
        let headers = parse(&octets);
        assert_eq!(
            (headers.l3, headers.ethertype, headers.l3_offset),
            (L3::Other, ethertype::VLAN, 18)
        );
        octets[12..14].copy_from_slice(&[0x88, 0xa8]);
        let headers = parse(&octets);
        assert_eq!(
            (headers.l3, headers.ethertype, headers.vlan),
            (L3::Other, ethertype::QINQ, None)
        );
        assert_eq!((headers.padding, headers.l3_end()), (0, octets.len()));
    }

    #[test]
    fn fragments_have_ports_in_the_first_only() {
        let mut octets = samples::udp_v4_fragment(0, true);
        let first = parse(&octets);
        assert_eq!((first.fragment, first.dst_port), (Fragment::First { id: 77 }, 53));
        assert!(!first.dont_fragment);
        octets = samples::udp_v4_fragment(64, false);
        let later = parse(&octets);
        let fragment = Fragment::Later {
            id: 77,
            offset: 64,
            more: false,
        };
        assert_eq!(
            (later.fragment, later.dst_port, later.l4_header_len),
            (fragment, 0, 0)
        );
        assert_eq!(first.flow_hash(), later.flow_hash());
        let v6 = parse(&samples::udp_v6_fragment(0, true));
        assert_eq!((v6.fragment, v6.dst_port), (Fragment::First { id: 77 }, 53));
        assert_eq!(parse(&samples::udp_v6_fragment(64, true)).protocol, 17);
    }

    #[test]
    fn tiny_and_overlapping_fragments_are_refused() {
        let tcp = |offset: u16, more: bool, payload: usize| {
            let mut octets = samples::tcp_v4()[..34 + payload].to_vec();
            octets[16..18].copy_from_slice(&(20 + payload as u16).to_be_bytes());
            octets[20..22].copy_from_slice(&((offset / 8) | if more { 0x2000 } else { 0 }).to_be_bytes());
            samples::fill_ipv4_checksum(&mut octets, 14);
            Headers::parse(&octets)
        };
        assert_eq!(tcp(0, true, 16).unwrap_err().layer, Layer::Tcp);
        assert_eq!(tcp(8, false, 16).unwrap_err().field, "fragment offset");
        assert_eq!(tcp(32, true, 15).unwrap_err().field, "fragment length");
        assert!(tcp(32, false, 15).is_ok());
    }

    #[test]
    fn what_must_not_be_forwarded_is_refused_by_name() {
        let refused = |octets: &[u8]| {
            let refused = Headers::parse(octets).unwrap_err();
            (refused.layer, refused.field)
        };
        let mut octets = samples::tcp_v4();
        octets[24] ^= 1;
        assert_eq!(refused(&octets), (Layer::Ipv4, "header checksum"));

        let mut routed = samples::tcp_v4();
        routed[14] = 0x46;
        routed.splice(34..34, [131, 3, 4, 0]);
        let len = (routed.len() - 14) as u16;
        routed[16..18].copy_from_slice(&len.to_be_bytes());
        samples::fill_ipv4_checksum(&mut routed, 14);
        assert_eq!(refused(&routed), (Layer::Ipv4, "option"));

        let mut aliased = samples::udp_v6_options();
        aliased[22..38].copy_from_slice(&Ipv4Addr::LOCALHOST.to_ipv6_mapped().octets());
        assert_eq!(refused(&aliased), (Layer::Ipv6, "source"));

        let mut big = samples::tcp_v4();
        big[16..18].fill(0);
        samples::fill_ipv4_checksum(&mut big, 14);
        assert_eq!(refused(&big), (Layer::Ipv4, "total length"));
    }

    #[test]
    fn a_super_frame_up_to_the_largest_packet_is_read() {
        let octets = samples::tcp_frame(false, 65_535 - 52);
        let headers = parse(&octets);
        assert_eq!((headers.l3_len, headers.payload_len()), (65_535, 65_535 - 52));
        let octets = samples::tcp_frame(true, 65_535 - 32);
        assert_eq!(parse(&octets).l3_len, 65_575);
    }

    #[test]
    fn flows_spread_and_the_value_stays_small() {
        let headers = parse(&samples::tcp_v4());
        let hashes: std::collections::HashSet<u32> = (0..1000)
            .map(|port| {
                Headers {
                    src_port: port,
                    ..headers
                }
                .flow_hash()
                    & 0x3fff
            })
            .collect();
        assert!(
            hashes.len() > 900,
            "{} of 1000 source ports are different",
            hashes.len()
        );
        assert!(size_of::<Headers>() <= 104, "{} octets", size_of::<Headers>());
    }
}
