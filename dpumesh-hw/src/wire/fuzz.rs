//! What the fuzz targets run, one function per parser: arbitrary octets in, and an assertion for everything that
//! must hold whatever they are. The targets in `fuzz/` call these and nothing else; their corpus runs as a unit test
//! here.
//!
//! # Panics
//! When a rule is broken: that is what a fuzzer looks for.

use std::net::{Ipv4Addr, Ipv6Addr};

use dpumesh_core::{Checksum, Frame, Gso, GsoKind, MacAddr, Mtu, Vni};

use super::checksum::{self, Verdict};
use super::coalesce::coalesce;
use super::encap::{self, Endpoints, OuterChecksum, Tunnel};
use super::headers::{Headers, L3};
use super::protocol;
use super::segment::Segments;
use super::{
    answer, arp as arp_view, ethernet as ethernet_view, icmpv4 as icmpv4_view, icmpv6 as icmpv6_view,
};
use super::{
    ipv4 as ipv4_view, ipv6 as ipv6_view, tcp as tcp_view, udp as udp_view, vlan, vxlan as vxlan_view,
};

/// A function that takes any octets.
pub type Target = fn(&[u8]);

/// The targets by the names of their files in `fuzz/fuzz_targets` and their folders in `fuzz/corpus`.
pub const TARGETS: [(&str, Target); 11] = [
    ("headers", headers),
    ("ethernet", ethernet),
    ("arp", arp),
    ("ipv4", ipv4),
    ("icmpv4", icmpv4),
    ("ipv6", ipv6),
    ("icmpv6", icmpv6),
    ("tcp", tcp),
    ("udp", udp),
    ("vxlan", vxlan),
    ("segment", segment),
];

/// The one-pass parse: what it accepts, the views accept alike, and everything that works on headers copes with.
pub fn headers(data: &[u8]) {
    let Ok(headers) = Headers::parse(data) else { return };
    assert!(headers.l3_end() + headers.padding as usize == data.len());
    assert!(headers.payload_offset() <= headers.l3_end());
    agree(data, &headers);
    headers.flow_hash();
    answers(data, &headers);
    tunnel_and_back(data, &headers);
}

/// Ethernet II, with an 802.1Q tag behind it.
pub fn ethernet(data: &[u8]) {
    let Ok(frame) = ethernet_view::Packet::new(data) else {
        return;
    };
    let repr = ethernet_view::Repr {
        destination: frame.destination(),
        source: frame.source(),
        ethertype: frame.ethertype(),
    };
    assert_eq!(repr.emit(), data[..ethernet_view::HEADER_LEN]);
    assert_eq!(frame.payload(), &data[ethernet_view::HEADER_LEN..]);
    let Ok(tagged) = vlan::Packet::new(frame.payload()) else {
        return;
    };
    let mut copy = frame.payload().to_vec();
    let mut written = vlan::Packet::new(&mut copy[..]).expect("as accepted before");
    written.set_tag(tagged.tag());
    assert_eq!(copy, frame.payload());
}

/// ARP.
pub fn arp(data: &[u8]) {
    let Ok(packet) = arp_view::Packet::new(data) else {
        return;
    };
    let repr = arp_view::Repr {
        operation: packet.operation(),
        sender_mac: packet.sender_mac(),
        sender_ip: packet.sender_ip(),
        target_mac: packet.target_mac(),
        target_ip: packet.target_ip(),
    };
    assert_eq!(repr.emit(), data[..arp_view::LEN]);
}

/// IPv4 with its options; its payload as ICMPv4 too.
pub fn ipv4(data: &[u8]) {
    let Ok(packet) = ipv4_view::Packet::new(data) else {
        return;
    };
    assert_eq!(packet.header_len() + packet.payload().len(), packet.total_len());
    assert!(
        packet.options().count() <= 20,
        "at most one option per two octets, and an error"
    );
    packet.fragment();
    icmpv4(packet.payload());
    let mut copy = data.to_vec();
    let mut packet = ipv4_view::Packet::new(&mut copy[..]).expect("as accepted before");
    packet.fill_checksum();
    packet.set_ttl(packet.ttl().wrapping_sub(1));
    packet.set_ecn(3);
    packet.set_source(Ipv4Addr::LOCALHOST);
    packet.set_destination(Ipv4Addr::BROADCAST);
    assert!(packet.verify_checksum());
}

/// ICMPv4.
pub fn icmpv4(data: &[u8]) {
    let Ok(packet) = icmpv4_view::Packet::new(data) else {
        return;
    };
    assert_eq!(packet.data().len() + icmpv4_view::HEADER_LEN, data.len());
    let message = packet.message();
    let header = message.emit();
    assert_eq!(header[..2], data[..2]);
    let again = icmpv4_view::Packet::new(header).expect("a whole header");
    assert_eq!(again.message(), message);
    let mut copy = data.to_vec();
    let mut packet = icmpv4_view::Packet::new(&mut copy[..]).expect("as accepted before");
    packet.fill_checksum();
    assert!(packet.verify_checksum());
}

/// IPv6 and its extension headers.
pub fn ipv6(data: &[u8]) {
    let Ok(packet) = ipv6_view::Packet::new(data) else {
        return;
    };
    let repr = ipv6_view::Repr {
        dscp: packet.dscp(),
        ecn: packet.ecn(),
        flow_label: packet.flow_label(),
        hop_limit: packet.hop_limit(),
        next_header: packet.next_header(),
        source: packet.source(),
        destination: packet.destination(),
        payload_len: packet.payload().len() as u16,
    };
    assert_eq!(repr.emit(), data[..ipv6_view::HEADER_LEN]);
    if let Ok(extensions) = packet.extensions() {
        assert!(extensions.len <= packet.payload().len());
    }
}

/// ICMPv6 with the options of neighbour discovery.
pub fn icmpv6(data: &[u8]) {
    let Ok(packet) = icmpv6_view::Packet::new(data) else {
        return;
    };
    packet.message();
    assert!(
        packet.options().all(|option| option.is_ok()),
        "the constructor refuses broken options"
    );
    let mut copy = data.to_vec();
    let mut packet = icmpv6_view::Packet::new(&mut copy[..]).expect("as accepted before");
    packet.fill_checksum(Ipv6Addr::LOCALHOST, Ipv6Addr::UNSPECIFIED);
    assert!(packet.verify_checksum(Ipv6Addr::LOCALHOST, Ipv6Addr::UNSPECIFIED));
}

/// UDP, whole and as a first fragment.
pub fn udp(data: &[u8]) {
    if let Ok(fragment) = udp_view::Packet::first_fragment(data) {
        assert!(fragment.payload().len() + udp_view::HEADER_LEN <= data.len());
    }
    let Ok(datagram) = udp_view::Packet::new(data) else {
        return;
    };
    let length = datagram.len_field();
    assert_eq!(datagram.payload().len() + udp_view::HEADER_LEN, length);
    assert!(length <= data.len());
    let repr = udp_view::Repr {
        source: datagram.source(),
        destination: datagram.destination(),
        payload_len: datagram.payload().len() as u16,
    };
    assert_eq!(repr.emit()[..6], data[..6]);
    let (source, destination) = (Ipv4Addr::LOCALHOST.into(), Ipv4Addr::BROADCAST.into());
    let mut copy = data.to_vec();
    udp_view::Packet::new(&mut copy[..])
        .expect("as accepted before")
        .fill_checksum(source, destination);
    let sum = checksum::Sum::pseudo(source, destination, protocol::UDP, length as u32);
    assert!(sum.plus(checksum::Sum::of(&copy[..length])).is_complete());
    assert_eq!(copy[length..], data[length..]);
}

/// TCP with its options.
pub fn tcp(data: &[u8]) {
    let Ok(segment) = tcp_view::Packet::new(data) else {
        return;
    };
    assert_eq!(segment.header_len() + segment.payload().len(), data.len());
    assert!(
        segment.options().count() <= 20,
        "at most one option per two octets, and an error"
    );
    segment.flags();
}

/// VXLAN, the inner frame included.
pub fn vxlan(data: &[u8]) {
    let Ok(packet) = vxlan_view::Packet::new(data) else {
        return;
    };
    assert_eq!(vxlan_view::emit(packet.vni())[4..7], data[4..7]);
    headers(packet.payload());
}

/// Segmentation and its way back: two octets of segment size, one of choices, then a frame.
pub fn segment(data: &[u8]) {
    let Some((&[high, low, choices], octets)) = data.split_first_chunk::<3>() else {
        return;
    };
    if octets.len() > dpumesh_core::MAX_FRAME {
        return;
    }
    let frame = super_frame(octets, u16::from_be_bytes([high, low]), choices);
    let Ok(mut segments) = Segments::of(&frame) else {
        return;
    };
    // A segment per octet is legal; ten thousand of them show nothing new.
    if segments.remaining() > 512 {
        return;
    }
    let mut cut = vec![];
    let mut out = Frame::with_capacity(dpumesh_core::HEADROOM, octets.len());
    while segments
        .next_into(&mut out)
        .expect("a segment is no longer than its super-frame")
    {
        out.checksum = if frame.gso.is_some() {
            Checksum::Unverified
        } else {
            out.checksum
        };
        cut.push(out.clone());
    }
    if frame.gso.is_some() {
        check_segments(&frame, &cut);
    }
    check_run(&frame, &cut);
    let kept = coalesce(&mut cut);
    assert!(kept >= 1);
}

fn super_frame(octets: &[u8], size: u16, choices: u8) -> Frame {
    let mut frame = Frame::copy_of(octets);
    let kind = match choices & 3 {
        0 => Some(GsoKind::TcpV4),
        1 => Some(GsoKind::TcpV6),
        2 => Some(GsoKind::Udp),
        _ => None,
    };
    frame.gso = kind.map(|kind| Gso {
        kind,
        size,
        header_len: 0,
        ecn: false,
    });
    frame.checksum = match choices >> 2 & 3 {
        0 => Checksum::Unverified,
        1 => Checksum::Verified,
        _ => {
            let start =
                Headers::parse(octets).map_or_else(|_| u16::from(choices), |headers| headers.l4_offset);
            Checksum::Partial {
                start,
                offset: if kind == Some(GsoKind::Udp) { 6 } else { 16 },
            }
        }
    };
    frame
}

/// The segments carry the payload, in order, each a sound frame with a right checksum.
fn check_segments(frame: &Frame, cut: &[Frame]) {
    let whole = Headers::parse(frame.octets()).expect("it was cut");
    let mut payload = &frame.octets()[whole.payload_offset()..whole.l3_end()];
    for segment in cut {
        let headers = Headers::parse(segment.octets()).expect("a segment is a sound frame");
        let verdict = checksum::verify_octets(segment.octets(), &headers);
        assert!(
            matches!(verdict, Verdict::Correct | Verdict::Absent),
            "{verdict:?}"
        );
        let own = &segment.octets()[headers.payload_offset()..headers.l3_end()];
        payload = payload
            .strip_prefix(own)
            .expect("the payload goes on where the last segment ended");
    }
    assert!(payload.is_empty());
}

/// A run holds the same octets as the single segments.
fn check_run(frame: &Frame, cut: &[Frame]) {
    let mut segments = Segments::of(frame).expect("it was cut before");
    let mut room = vec![0; 70_000];
    let run = segments
        .run_into(b"8 octets", 4, &mut room)
        .expect("room for one")
        .expect("one at least");
    let mut pieces = room[..run.octets].chunks(run.stride);
    for (piece, single) in pieces.by_ref().zip(cut) {
        assert_eq!(piece[8..], *single.octets());
    }
    assert!(pieces.next().is_none());
}

/// The views read what the one pass read.
fn agree(data: &[u8], headers: &Headers) {
    ethernet(data);
    let frame = ethernet_view::Packet::new(data).expect("parsed");
    assert_eq!(
        (frame.source(), frame.destination()),
        (headers.eth_src, headers.eth_dst)
    );
    if headers.vlan.is_some() {
        let tagged = vlan::Packet::new(frame.payload()).expect("parsed");
        assert_eq!(
            (Some(tagged.tag()), tagged.ethertype()),
            (headers.vlan, headers.ethertype)
        );
    }
    let packet = &data[usize::from(headers.l3_offset)..];
    match headers.l3 {
        L3::Arp => arp(packet),
        L3::Ipv4 => ipv4(packet),
        L3::Ipv6 => ipv6(packet),
        L3::Other => {}
    }
    let l4 = &data[headers.l4_range()];
    match headers.protocol {
        1 => icmpv4(l4),
        6 => tcp(l4),
        17 => udp(l4),
        58 => icmpv6(l4),
        _ => {}
    }
    checksum::verify_octets(data, headers);
}

/// Every answer that is given is a sound frame with a right checksum.
fn answers(data: &[u8], headers: &Headers) {
    let mac = MacAddr([2; 6]);
    let mut out = Frame::with_capacity(dpumesh_core::HEADROOM, 1500);
    let frame = Frame::copy_of(data);
    type Answer<'a> = &'a dyn Fn(&mut Frame) -> Result<(), answer::NoAnswer>;
    let all: [Answer<'_>; 5] = [
        &|out| answer::arp_reply(data, headers, mac, out),
        &|out| answer::neighbor_advertisement(data, headers, mac, out),
        &|out| answer::fragmentation_needed(data, headers, Ipv4Addr::LOCALHOST, Mtu::ETHERNET, out),
        &|out| answer::packet_too_big(data, headers, Ipv6Addr::LOCALHOST, Mtu::ETHERNET, out),
        &|out| answer::reset(&frame, headers, out),
    ];
    for answer in all {
        if answer(&mut out).is_ok() {
            let headers = Headers::parse(out.octets()).expect("an answer is a sound frame");
            let verdict = checksum::verify_octets(out.octets(), &headers);
            assert!(
                headers.l3 == L3::Arp || verdict == Verdict::Correct,
                "{verdict:?}"
            );
        }
    }
}

/// What is encapsulated comes back as it was.
fn tunnel_and_back(data: &[u8], headers: &Headers) {
    let tunnel = Tunnel {
        eth_src: headers.eth_src,
        eth_dst: headers.eth_dst,
        endpoints: Endpoints::V6 {
            local: Ipv6Addr::LOCALHOST,
            remote: Ipv6Addr::LOCALHOST,
        },
        ttl: 64,
        port: vxlan_view::PORT,
        vni: Vni::try_from(u32::from(headers.l4_offset)).expect("16 bits fit 24"),
        checksum: OuterChecksum::Complete,
    };
    let mut frame = Frame::copy_of(data);
    if encap::encapsulate(&mut frame, headers, &tunnel).is_err() {
        return;
    }
    let outer = Headers::parse(frame.octets()).expect("an encapsulated frame is sound");
    assert_eq!(checksum::verify_octets(frame.octets(), &outer), Verdict::Correct);
    let packet = encap::decapsulate(&mut frame, &outer)
        .expect("as encapsulated")
        .expect("its own mark");
    assert_eq!(
        (packet.vni, &packet.inner, frame.octets()),
        (tunnel.vni, headers, data)
    );
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;

    use super::*;
    use crate::wire::samples;

    #[test]
    fn the_corpus_breaks_no_rule() {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus");
        for (name, target) in TARGETS {
            let folder = corpus.join(name);
            let entries = std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
            let mut files = 0;
            for entry in entries {
                let path = entry.expect("a readable folder").path();
                target(&std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display())));
                files += 1;
            }
            assert!(files > 0, "{} is empty", folder.display());
        }
    }

    #[test]
    fn every_truncation_of_every_sample_through_every_target() {
        for (_, octets) in samples::all() {
            for start in [0, 14, 18, 34, 54] {
                let octets = octets.get(start..).unwrap_or_default();
                for len in 0..=octets.len() {
                    for (_, target) in TARGETS {
                        target(&octets[..len]);
                    }
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn every_sample_with_octets_changed_through_every_target(
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4), choices in 0..16u8,
        ) {
            for (_, mut octets) in samples::all() {
                for (place, value) in &changes {
                    let place = place.index(octets.len());
                    octets[place] = *value;
                }
                if octets.get(12..15) == Some(&[8, 0, 0x45]) {
                    samples::fill_ipv4_checksum(&mut octets, 14);
                }
                headers(&octets);
                vxlan(&[&[8, 0, 0, 0, 0, 0, 1, 0], &octets[..]].concat());
                segment(&[&[0, 9, choices], &octets[..]].concat());
            }
        }
    }
}
