//! VXLAN encapsulation and decapsulation in place (RFC 7348):
//!
//! ```text
//! | outer Ethernet 14 | outer IPv4 20 or IPv6 40 | UDP 8 | VXLAN 8 | inner Ethernet 14 | inner packet |
//!  \_____________________ pushed by encapsulate ________________/
//! ```
//!
//! Against the outer link's MTU an inner packet loses [`OVERHEAD_V4`] or [`OVERHEAD_V6`] octets: everything between
//! the two IP packets, the inner Ethernet header counted and the outer one not (which comes to the same number as
//! the octets pushed). An inner 802.1Q tag takes 4 more.
//!
//! DSCP and ECN go to the outer header and ECN comes back by the normal mode of RFC 6040. The outer packet must not be
//! fragmented (DF), and its UDP source port tells flows apart.
//!
//! The outer UDP checksum is never left out over IPv6: RFC 6935 would allow it between tunnel endpoints that agree,
//! these do not ask. Where the inner frame's own checksum is still open, the outer one is computed from the headers
//! alone: once the inner one is finished, everything it covers sums to a known value (Linux calls this local checksum
//! offload). A super-frame is not encapsulated; [`super::Segments::run_into`] with VXLAN's header as prefix does that.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use dpumesh_core::{Checksum, Frame, MacAddr, Vni};

use super::checksum::Sum;
use super::ethernet::{self, ethertype};
use super::field::{be16, put16};
use super::headers::{Headers, L3};
use super::malformed::{Layer, Malformed, NoRoom};
use super::{ipv4, ipv6, protocol, udp, vxlan};

/// Octets that an inner packet loses over IPv4: inner Ethernet 14, VXLAN 8, UDP 8, IPv4 20.
pub const OVERHEAD_V4: u16 = 50;

/// Octets that an inner packet loses over IPv6: inner Ethernet 14, VXLAN 8, UDP 8, IPv6 40.
pub const OVERHEAD_V6: u16 = 70;

/// Outer headers that all frames to one remote endpoint share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tunnel {
    /// Outer source MAC.
    pub eth_src: MacAddr,
    /// Outer destination MAC: the next hop's.
    pub eth_dst: MacAddr,
    /// Outer addresses.
    pub endpoints: Endpoints,
    /// Outer TTL or hop limit.
    pub ttl: u8,
    /// UDP destination port, usually [`vxlan::PORT`].
    pub port: u16,
    /// Network.
    pub vni: Vni,
    /// What becomes of the outer UDP checksum.
    pub checksum: OuterChecksum,
}

/// Outer addresses of a tunnel, of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoints {
    /// Over IPv4.
    V4 {
        /// This endpoint.
        local: Ipv4Addr,
        /// The other endpoint.
        remote: Ipv4Addr,
    },
    /// Over IPv6.
    V6 {
        /// This endpoint.
        local: Ipv6Addr,
        /// The other endpoint.
        remote: Ipv6Addr,
    },
}

/// What becomes of the outer UDP checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OuterChecksum {
    /// Sent as 0, "none". Over IPv4 only; refused over IPv6 (RFC 8200 §8.1).
    Absent,
    /// Left open for the port ([`Checksum::Partial`]). If the inner checksum is open already, that one stays for the
    /// port and the outer is complete.
    Open,
    /// Computed here: by summing the frame, or the headers alone when the inner checksum is open.
    Complete,
}

/// Why a frame was not encapsulated; it is unchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotEncapsulated {
    /// The frame or the tunnel breaks a rule.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// Too little headroom in the frame.
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
}

impl Endpoints {
    /// Octets that an inner packet loses against the outer link's MTU.
    pub const fn overhead(self) -> u16 {
        match self {
            Self::V4 { .. } => OVERHEAD_V4,
            Self::V6 { .. } => OVERHEAD_V6,
        }
    }
}

/// Pushes outer Ethernet, IP, UDP and VXLAN headers in front of `frame`, whose own headers are `inner`.
///
/// # Errors
/// A super-frame; an outer packet beyond 65,535 octets; an open inner checksum that lies outside the frame; no UDP
/// checksum over IPv6; too little headroom. The frame is unchanged.
pub fn encapsulate(frame: &mut Frame, inner: &Headers, tunnel: &Tunnel) -> Result<(), NotEncapsulated> {
    let payload_len = check(frame, tunnel)?;
    let ip_len = usize::from(tunnel.endpoints.overhead()) - 30;
    let push = ethernet::HEADER_LEN + ip_len + udp::HEADER_LEN + vxlan::HEADER_LEN;
    let have = frame.headroom();
    let Some(outer) = frame.push_front(push) else {
        return Err(NoRoom { need: push, have }.into());
    };
    let l4 = ethernet::HEADER_LEN + ip_len;
    write_ip(outer, inner, tunnel, payload_len);
    let udp = udp::Repr {
        source: source_port(inner),
        destination: tunnel.port,
        payload_len: payload_len - udp::HEADER_LEN as u16,
    };
    outer[l4..l4 + udp::HEADER_LEN].copy_from_slice(&udp.emit());
    outer[l4 + udp::HEADER_LEN..].copy_from_slice(&vxlan::emit(tunnel.vni));
    sum_outer(frame, tunnel, l4, payload_len);
    Ok(())
}

/// What [`decapsulate`] took off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decapsulated {
    /// Network of the inner frame.
    pub vni: Vni,
    /// Outer source address.
    pub remote: IpAddr,
    /// Headers of the inner frame, as it lies in the frame now.
    pub inner: Headers,
}

/// Takes the outer headers off a VXLAN frame, whose own headers are `outer`, and brings a congestion mark of the
/// outer path to the inner packet (RFC 6040 §4.2). `None` when the frame must be dropped for it: the outer path
/// marked a packet whose sender does not know the mark.
///
/// The frame is [`Checksum::Unverified`] afterwards, whoever vouched for the outer packet: a right outer checksum says
/// that the inner frame arrived as it was encapsulated, not that it was sound then. Only an open checksum of the
/// inner frame (its sender is in this machine's memory) stays.
///
/// # Errors
/// A super-frame (it holds more than one inner frame), an open checksum of the outer headers, not a whole UDP datagram, VXLAN flags that mean something else, or an inner frame that [`Headers::parse`] refuses.
/// The frame is unchanged.
pub fn decapsulate(frame: &mut Frame, outer: &Headers) -> Result<Option<Decapsulated>, Malformed> {
    if let Some(gso) = frame.gso {
        let found = u32::from(gso.size);
        return Err(Malformed::invalid(
            Layer::Frame,
            "gso size",
            found,
            "one inner frame, no super-frame",
        ));
    }
    let (vni, start, end) = locate(frame.octets(), outer)?;
    let inner = Headers::parse(&frame.octets()[start..end])?;
    let Some(ecn) = received_ecn(&inner, outer.ecn) else {
        return Ok(None);
    };
    match frame.checksum {
        Checksum::Partial { start: sum, .. } if usize::from(sum) < start => {
            let expected = "a place in the inner frame";
            return Err(Malformed::invalid(
                Layer::Frame,
                "checksum start",
                u32::from(sum),
                expected,
            ));
        }
        Checksum::Partial { .. } => {}
        Checksum::Verified => frame.checksum = Checksum::Unverified,
        Checksum::Unverified => {}
    }
    frame.set_len(end);
    frame.pull_front(start);
    let mut inner = inner;
    if ecn != inner.ecn {
        set_ecn(frame.octets_mut(), &mut inner, ecn);
    }
    Ok(Some(Decapsulated {
        vni,
        remote: outer.source(),
        inner,
    }))
}

/// The UDP source port for a flow, 49,152 to 65,535 (RFC 7348 §5).
pub fn source_port(inner: &Headers) -> u16 {
    0xc000 | (inner.flow_hash() & 0x3fff) as u16
}

/// The ECN field of an inner packet after a tunnel whose outer field arrived as `outer`; `None`: drop it
/// (RFC 6040 §4.2, figure 4). Both are numbers of two bits: 0 Not-ECT, 1 ECT(1), 2 ECT(0), 3 CE.
pub const fn decapsulated_ecn(inner: u8, outer: u8) -> Option<u8> {
    match (inner & 3, outer & 3) {
        (0, 3) => None,
        (0, _) => Some(0),
        (3, _) | (_, 3) => Some(3),
        (2, 1) => Some(1),
        (inner, _) => Some(inner),
    }
}

/// Sets the ECN field of the IP packet in `octets` and in its headers; the header's checksum stays true. Of what is no IP,
/// nothing is changed.
pub fn set_ecn(octets: &mut [u8], headers: &mut Headers, ecn: u8) {
    let Some(packet) = octets.get_mut(usize::from(headers.l3_offset)..) else {
        return;
    };
    match headers.l3 {
        L3::Ipv4 => {
            let Ok(mut packet) = ipv4::Packet::new(packet) else {
                return;
            };
            packet.set_ecn(ecn);
        }
        L3::Ipv6 => {
            let Ok(mut packet) = ipv6::Packet::new(packet) else {
                return;
            };
            packet.set_ecn(ecn);
        }
        L3::Arp | L3::Other => return,
    }
    headers.ecn = ecn & 3;
}

/// Octets of the outer UDP datagram.
fn check(frame: &Frame, tunnel: &Tunnel) -> Result<u16, Malformed> {
    if let Some(gso) = frame.gso {
        let expected = "no super-frame: its segments are encapsulated";
        return Err(Malformed::invalid(
            Layer::Frame,
            "gso size",
            u32::from(gso.size),
            expected,
        ));
    }
    if let Checksum::Partial { start, offset } = frame.checksum {
        let need = usize::from(start) + usize::from(offset) + 2;
        Malformed::at_least(Layer::Frame, "checksum start and offset", need, frame.len())?;
    }
    if tunnel.checksum == OuterChecksum::Absent && matches!(tunnel.endpoints, Endpoints::V6 { .. }) {
        return Err(Malformed::invalid(
            Layer::Udp,
            "checksum",
            0,
            "a checksum over IPv6",
        ));
    }
    let len = frame.len() + vxlan::HEADER_LEN + udp::HEADER_LEN;
    let most = 65_535 - ipv4::HEADER_LEN;
    if len > most {
        return Err(Malformed::invalid(
            Layer::Udp,
            "length",
            len as u32,
            "65515 octets or less",
        ));
    }
    Ok(len as u16)
}

fn write_ip(outer: &mut [u8], inner: &Headers, tunnel: &Tunnel, payload_len: u16) {
    let link = |ethertype| {
        ethernet::Repr {
            destination: tunnel.eth_dst,
            source: tunnel.eth_src,
            ethertype,
        }
        .emit()
    };
    let (front, ip) = outer.split_at_mut(ethernet::HEADER_LEN);
    match tunnel.endpoints {
        Endpoints::V4 { local, remote } => {
            front.copy_from_slice(&link(ethertype::IPV4));
            let repr = ipv4::Repr {
                dscp: inner.dscp,
                ecn: inner.ecn,
                id: 0,
                dont_fragment: true,
                ttl: tunnel.ttl,
                protocol: protocol::UDP,
                source: local,
                destination: remote,
                payload_len,
            };
            ip[..ipv4::HEADER_LEN].copy_from_slice(&repr.emit());
        }
        Endpoints::V6 { local, remote } => {
            front.copy_from_slice(&link(ethertype::IPV6));
            let repr = ipv6::Repr {
                dscp: inner.dscp,
                ecn: inner.ecn,
                flow_label: inner.flow_hash() & 0xf_ffff,
                hop_limit: tunnel.ttl,
                next_header: protocol::UDP,
                source: local,
                destination: remote,
                payload_len,
            };
            ip[..ipv6::HEADER_LEN].copy_from_slice(&repr.emit());
        }
    }
}

/// Sets the outer UDP checksum, and the frame's state.
fn sum_outer(frame: &mut Frame, tunnel: &Tunnel, l4: usize, len: u16) {
    let (source, destination) = match tunnel.endpoints {
        Endpoints::V4 { local, remote } => (IpAddr::V4(local), IpAddr::V4(remote)),
        Endpoints::V6 { local, remote } => (IpAddr::V6(local), IpAddr::V6(remote)),
    };
    let pseudo = Sum::pseudo(source, destination, protocol::UDP, u32::from(len));
    let octets = frame.octets();
    let sum = match (tunnel.checksum, frame.checksum) {
        (OuterChecksum::Absent, _) => return,
        (_, Checksum::Partial { start, offset }) => {
            let (start, field) = (usize::from(start), usize::from(start) + usize::from(offset));
            // Once finished, the octets from `start` on sum to the complement of what the field holds now.
            let behind = Sum::word(!be16(octets, field));
            let behind = if (start - l4).is_multiple_of(2) {
                behind
            } else {
                behind.swapped()
            };
            pseudo.plus(Sum::of(&octets[l4..start])).plus(behind)
        }
        (OuterChecksum::Open, _) => {
            put16(frame.octets_mut(), l4 + udp::at::CHECKSUM, pseudo.fold());
            frame.checksum = Checksum::Partial {
                start: l4 as u16,
                offset: udp::at::CHECKSUM as u16,
            };
            return;
        }
        (OuterChecksum::Complete, _) => pseudo.plus(Sum::of(&octets[l4..])),
    };
    let sum = match sum.checksum() {
        0 => 0xffff,
        sum => sum,
    };
    put16(frame.octets_mut(), l4 + udp::at::CHECKSUM, sum);
}

/// The network, and where the inner frame begins and ends.
fn locate(octets: &[u8], outer: &Headers) -> Result<(Vni, usize, usize), Malformed> {
    let whole = outer.fragment == super::Fragment::None && outer.is_ip();
    if outer.protocol != protocol::UDP || !whole {
        let found = u32::from(outer.protocol);
        return Err(Malformed::invalid(
            Layer::Vxlan,
            "protocol",
            found,
            "17, a whole UDP datagram",
        ));
    }
    let datagram = udp::Packet::new(octets.get(outer.l4_range()).unwrap_or_default())?;
    let packet = vxlan::Packet::new(datagram.payload())?;
    let start = outer.payload_offset() + vxlan::HEADER_LEN;
    Ok((packet.vni(), start, start + packet.payload().len()))
}

fn received_ecn(inner: &Headers, outer: u8) -> Option<u8> {
    if inner.is_ip() {
        decapsulated_ecn(inner.ecn, outer)
    } else {
        Some(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wire::checksum::{self, Verdict};
    use crate::wire::samples::{self, Super};

    fn tunnel(v6: bool, checksum: OuterChecksum) -> Tunnel {
        let endpoints = if v6 {
            Endpoints::V6 {
                local: "fd00::1".parse().unwrap(),
                remote: "fd00::2".parse().unwrap(),
            }
        } else {
            Endpoints::V4 {
                local: Ipv4Addr::new(192, 0, 2, 1),
                remote: Ipv4Addr::new(192, 0, 2, 2),
            }
        };
        Tunnel {
            eth_src: MacAddr([6; 6]),
            eth_dst: MacAddr([8; 6]),
            endpoints,
            ttl: 64,
            port: vxlan::PORT,
            vni: Vni::try_from(0xabcdef).unwrap(),
            checksum,
        }
    }

    fn parse(frame: &Frame) -> Headers {
        Headers::parse(frame.octets()).expect("sound")
    }

    #[test]
    fn the_overheads_are_what_is_pushed() {
        for (v6, overhead) in [(false, 50), (true, 70)] {
            let mut frame = Frame::copy_of(&samples::tcp_v4());
            let (len, inner) = (frame.len(), parse(&frame));
            encapsulate(&mut frame, &inner, &tunnel(v6, OuterChecksum::Complete)).expect("room");
            assert_eq!(frame.len() - len, overhead);
            let outer = parse(&frame);
            assert_eq!(
                outer.l3_len as usize,
                inner.l3_len as usize + overhead,
                "what the inner packet loses"
            );
            assert_eq!(
                (outer.dst_port, outer.ttl, outer.eth_dst),
                (4789, 64, MacAddr([8; 6]))
            );
            assert!(outer.src_port >= 49_152);
        }
    }

    #[test]
    fn an_ipv4_outer_packet_is_not_fragmented_and_its_checksum_may_be_absent() {
        let mut frame = Frame::copy_of(&samples::tcp_v4());
        let inner = parse(&frame);
        encapsulate(&mut frame, &inner, &tunnel(false, OuterChecksum::Absent)).expect("room");
        assert_eq!(
            checksum::verify_octets(frame.octets(), &parse(&frame)),
            Verdict::Absent
        );
        assert!(ipv4::Packet::new(&frame.octets()[14..]).unwrap().dont_fragment());
        let refused = encapsulate(&mut frame, &inner, &tunnel(true, OuterChecksum::Absent)).unwrap_err();
        assert!(matches!(
            refused,
            NotEncapsulated::Malformed(Malformed {
                field: "checksum",
                ..
            })
        ));
    }

    #[test]
    fn both_checksums_are_right_in_every_way_of_making_them() {
        let ways = [OuterChecksum::Open, OuterChecksum::Complete];
        for (way, v6) in ways.into_iter().flat_map(|way| [(way, false), (way, true)]) {
            for open in [false, true] {
                let mut frame = Super {
                    payload: 101,
                    ..Super::default()
                }
                .build();
                frame.gso = None;
                if !open {
                    checksum::complete(&mut frame).expect("valid");
                }
                let inner = parse(&frame);
                encapsulate(&mut frame, &inner, &tunnel(v6, way)).expect("room");
                checksum::complete(&mut frame).expect("valid");
                let outer = parse(&frame);
                assert_eq!(
                    checksum::verify_octets(frame.octets(), &outer),
                    Verdict::Correct,
                    "{way:?} {open}"
                );
                frame.checksum = Checksum::Unverified;
                let packet = decapsulate(&mut frame, &outer).expect("valid").expect("no mark");
                assert_eq!(
                    checksum::verify(&frame, &packet.inner),
                    Verdict::Correct,
                    "{way:?} {open}"
                );
            }
        }
    }

    #[test]
    fn a_right_outer_checksum_says_nothing_of_the_inner() {
        let mut frame = Frame::copy_of(&samples::tcp_v4());
        *frame.octets_mut().last_mut().expect("payload") ^= 1;
        let inner = parse(&frame);
        encapsulate(&mut frame, &inner, &tunnel(false, OuterChecksum::Complete)).expect("room");
        let outer = parse(&frame);
        assert_eq!(checksum::verify(&frame, &outer), Verdict::Correct);
        frame.checksum = Checksum::Verified;
        let packet = decapsulate(&mut frame, &outer).expect("valid").expect("no mark");
        assert_eq!(checksum::verify(&frame, &packet.inner), Verdict::Wrong);
    }

    #[test]
    fn an_open_checksum_must_be_the_inner_one() {
        let mut frame = Super {
            payload: 40,
            ..Super::default()
        }
        .build();
        frame.gso = None;
        let inner = parse(&frame);
        encapsulate(&mut frame, &inner, &tunnel(false, OuterChecksum::Open)).expect("room");
        let outer = parse(&frame);
        let mut other = frame.clone();
        other.checksum = Checksum::Partial { start: 34, offset: 6 };
        assert_eq!(
            decapsulate(&mut other, &outer).unwrap_err().field,
            "checksum start"
        );
        other.gso = Super::default().build().gso;
        assert_eq!(decapsulate(&mut other, &outer).unwrap_err().field, "gso size");
        decapsulate(&mut frame, &outer).expect("valid").expect("no mark");
        assert_eq!(
            frame.checksum,
            Checksum::Partial {
                start: 34,
                offset: 16
            }
        );
    }

    #[test]
    fn the_table_of_rfc_6040() {
        let (not_ect, ect1, ect0, ce) = (0, 1, 2, 3);
        let rows = [
            (not_ect, [Some(not_ect), Some(not_ect), Some(not_ect), None]),
            (ect0, [Some(ect0), Some(ect0), Some(ect1), Some(ce)]),
            (ect1, [Some(ect1), Some(ect1), Some(ect1), Some(ce)]),
            (ce, [Some(ce), Some(ce), Some(ce), Some(ce)]),
        ];
        for (inner, row) in rows {
            for (outer, wanted) in [not_ect, ect0, ect1, ce].into_iter().zip(row) {
                assert_eq!(
                    decapsulated_ecn(inner, outer),
                    wanted,
                    "inner {inner}, outer {outer}"
                );
            }
        }
    }

    #[test]
    fn a_congestion_mark_reaches_the_inner_packet_or_drops_it() {
        let marked = |ecn: u8| {
            let mut frame = Frame::copy_of(&samples::tcp_v4());
            let mut inner = parse(&frame);
            set_ecn(frame.octets_mut(), &mut inner, ecn);
            encapsulate(&mut frame, &inner, &tunnel(false, OuterChecksum::Complete)).expect("room");
            let mut outer = parse(&frame);
            assert_eq!(outer.ecn, ecn, "normal mode copies");
            set_ecn(frame.octets_mut(), &mut outer, 3);
            decapsulate(&mut frame, &outer).expect("valid").map(|packet| {
                assert_eq!(parse(&frame), packet.inner);
                packet.inner.ecn
            })
        };
        assert_eq!(
            (marked(0), marked(1), marked(2), marked(3)),
            (None, Some(3), Some(3), Some(3))
        );
    }

    #[test]
    fn dscp_and_arp_are_carried() {
        let mut frame = Frame::copy_of(&samples::arp_request());
        let inner = parse(&frame);
        encapsulate(&mut frame, &inner, &tunnel(true, OuterChecksum::Complete)).expect("room");
        let outer = parse(&frame);
        let packet = decapsulate(&mut frame, &outer).expect("valid").expect("no mark");
        assert_eq!(
            (packet.inner, frame.octets()),
            (inner, &samples::arp_request()[..])
        );
        assert_eq!(packet.vni.get(), 0xabcdef);

        let mut octets = samples::tcp_v4();
        octets[15] = 46 << 2;
        samples::fill_ipv4_checksum(&mut octets, 14);
        let mut frame = Frame::copy_of(&octets);
        let inner = parse(&frame);
        encapsulate(&mut frame, &inner, &tunnel(true, OuterChecksum::Complete)).expect("room");
        assert_eq!(parse(&frame).dscp, 46);
    }

    #[test]
    fn what_cannot_be_encapsulated_is_unchanged() {
        let check = |mut frame: Frame, field: Option<&str>| {
            let before = frame.octets().to_vec();
            let inner = Headers::parse(&samples::tcp_v4()).expect("sound");
            let refused =
                encapsulate(&mut frame, &inner, &tunnel(false, OuterChecksum::Complete)).unwrap_err();
            match (refused, field) {
                (NotEncapsulated::Malformed(refused), Some(field)) => assert_eq!(refused.field, field),
                (NotEncapsulated::NoRoom(room), None) => assert_eq!(room, NoRoom { need: 50, have: 49 }),
                other => panic!("{other:?}"),
            }
            assert_eq!(frame.octets(), before);
        };
        check(Super::default().build(), Some("gso size"));
        let mut open = Frame::copy_of(&samples::tcp_v4());
        open.checksum = Checksum::Partial {
            start: 200,
            offset: 16,
        };
        check(open, Some("checksum start and offset"));
        check(Frame::copy_of(&vec![0; 65_500]), Some("length"));
        let mut tight = Frame::with_capacity(49, 100);
        assert!(tight.set_len(60));
        check(tight, None);
    }

    #[test]
    fn every_truncation_and_foreign_flags_are_refused() {
        let mut frame = Frame::copy_of(&samples::tcp_v4());
        let inner = parse(&frame);
        encapsulate(&mut frame, &inner, &tunnel(false, OuterChecksum::Complete)).expect("room");
        let outer = parse(&frame);
        for len in 0..frame.len() {
            let mut cut = Frame::copy_of(&frame.octets()[..len]);
            assert!(decapsulate(&mut cut, &outer).is_err(), "at {len}");
            assert_eq!(cut.len(), len);
        }
        frame.octets_mut()[42] = 0x0c;
        assert_eq!(decapsulate(&mut frame, &outer).unwrap_err().layer, Layer::Vxlan);
        let mut plain = Frame::copy_of(&samples::tcp_v4());
        let headers = parse(&plain);
        assert_eq!(decapsulate(&mut plain, &headers).unwrap_err().field, "protocol");
    }

    proptest! {
        #[test]
        fn decapsulation_gives_back_what_was_encapsulated(
            shape in samples::any_super(), v6: bool, vni in 0..1u32 << 24, open: bool,
        ) {
            let mut frame = shape.build();
            frame.gso = None;
            checksum::complete(&mut frame).expect("valid");
            let (before, inner) = (frame.octets().to_vec(), parse(&frame));
            let vni = Vni::try_from(vni).expect("24 bits");
            let way = if open { OuterChecksum::Open } else { OuterChecksum::Complete };
            encapsulate(&mut frame, &inner, &Tunnel { vni, ..tunnel(v6, way) }).expect("room");
            checksum::complete(&mut frame).expect("valid");
            let outer = parse(&frame);
            prop_assert_eq!(checksum::verify_octets(frame.octets(), &outer), Verdict::Correct);
            let packet = decapsulate(&mut frame, &outer).expect("valid").expect("no mark");
            prop_assert_eq!((packet.vni, packet.inner), (vni, inner));
            prop_assert_eq!(frame.octets(), &before[..]);
        }
    }
}
