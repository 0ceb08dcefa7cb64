//! Frames that tests of this module share, built octet by octet and not by the code under test (but for checksums).

use dpumesh_core::{Checksum, Frame, Gso, GsoKind};
use proptest::prelude::*;

use super::checksum::Sum;

/// Every sample with its name.
pub(super) fn all() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("arp_request", arp_request()),
        ("tcp_v4", tcp_v4()),
        ("tcp_v4_vlan", tcp_v4_vlan()),
        ("tcp_v6", tcp_frame(true, 40)),
        ("udp_v6_options", udp_v6_options()),
        ("udp_v4_first_fragment", udp_v4_fragment(0, true)),
        ("udp_v4_last_fragment", udp_v4_fragment(64, false)),
        ("udp_v6_first_fragment", udp_v6_fragment(0, true)),
        ("udp_v6_last_fragment", udp_v6_fragment(64, false)),
        ("ping_v4", ping_v4()),
        ("neighbor_solicitation", neighbor_solicitation()),
        ("lldp", [&eth(0x88cc)[..], &[2, 7, 4, 2, 0, 0, 0, 0, 1]].concat()),
    ]
}

/// A request padded to Ethernet's 60 octets.
pub(super) fn arp_request() -> Vec<u8> {
    let mut frame = eth(0x0806);
    frame[..6].fill(0xff);
    frame.extend([
        0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 1, 10, 0, 0, 1, 0, 0, 0, 0, 0, 0, 10, 0, 0, 2,
    ]);
    frame.resize(60, 0);
    frame
}

pub(super) fn tcp_v4() -> Vec<u8> {
    tcp_frame(false, 40)
}

pub(super) fn tcp_v4_vlan() -> Vec<u8> {
    let mut frame = tcp_v4();
    frame.splice(12..12, [0x81, 0, 0xa0, 100]);
    frame
}

/// A segment 40000 → 80, ACK and PSH, with timestamps and `payload` octets; checksums right.
pub(super) fn tcp_frame(v6: bool, payload: usize) -> Vec<u8> {
    let mut tcp = vec![
        0x9c, 0x40, 0, 80, 0, 0, 0x10, 0, 0, 0, 0x20, 0, 0x80, 0x18, 1, 0xf5, 0, 0, 0, 0,
    ];
    tcp.extend([1, 1, 8, 10, 0, 0, 0, 7, 0, 0, 0, 9]);
    tcp.extend((0..payload).map(|i| (i * 31 + i / 256) as u8));
    if v6 {
        ipv6(6, &[], &tcp, 16)
    } else {
        ipv4(6, 0x4000, &tcp, Some(16))
    }
}

/// A datagram 1000 → 53 behind destination options.
pub(super) fn udp_v6_options() -> Vec<u8> {
    ipv6(60, &[17, 0, 1, 4, 0, 0, 0, 0], &udp(12), 6)
}

/// A part of a datagram 1000 → 53; 64 octets when another follows.
pub(super) fn udp_v4_fragment(offset: u16, more: bool) -> Vec<u8> {
    ipv4(17, (offset / 8) | if more { 0x2000 } else { 0 }, &udp(56), None)
}

/// The same behind an IPv6 fragment header.
pub(super) fn udp_v6_fragment(offset: u16, more: bool) -> Vec<u8> {
    let [high, low] = (offset | u16::from(more)).to_be_bytes();
    ipv6(44, &[17, 0, high, low, 0, 0, 0, 77], &udp(56), 6)
}

pub(super) fn ping_v4() -> Vec<u8> {
    let mut echo = vec![8, 0, 0, 0, 0, 1, 0, 2];
    echo.extend(b"are you there?");
    let sum = Sum::of(&echo).checksum();
    echo[2..4].copy_from_slice(&sum.to_be_bytes());
    ipv4(1, 0x4000, &echo, None)
}

/// fe80::1 asks for fe80::2.
pub(super) fn neighbor_solicitation() -> Vec<u8> {
    let mut message = vec![135, 0, 0, 0, 0, 0, 0, 0];
    message.extend([0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
    message.extend([1, 1, 2, 0, 0, 0, 0, 1]);
    let mut frame = ipv6(58, &[], &message, 2);
    frame[..6].copy_from_slice(&[0x33, 0x33, 0xff, 0, 0, 2]);
    frame[21] = 255;
    let source = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
    let group = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, 0, 0, 2];
    frame[22..38].copy_from_slice(&source);
    frame[38..54].copy_from_slice(&group);
    frame[56..58].fill(0);
    let pseudo = [&source[..], &group, &[0, 0, 0, 32, 0, 0, 0, 58], &frame[54..]].concat();
    frame[56..58].copy_from_slice(&Sum::of(&pseudo).checksum().to_be_bytes());
    frame
}

/// Puts the right checksum into the IPv4 header at `at`.
pub(super) fn fill_ipv4_checksum(frame: &mut [u8], at: usize) {
    let end = at + usize::from(frame[at] & 15) * 4;
    frame[at + 10..at + 12].fill(0);
    let sum = Sum::of(&frame[at..end]).checksum();
    frame[at + 10..at + 12].copy_from_slice(&sum.to_be_bytes());
}

/// Puts the right checksum into the TCP header of an untagged IPv4 frame without options and padding.
pub(super) fn fill_tcp_v4_checksum(frame: &mut [u8]) {
    frame[50..52].fill(0);
    let length = ((frame.len() - 34) as u16).to_be_bytes();
    let sum = Sum::of(&[&frame[26..34], &[0, 6], &length, &frame[34..]].concat()).checksum();
    frame[50..52].copy_from_slice(&sum.to_be_bytes());
}

fn eth(ethertype: u16) -> Vec<u8> {
    let mut header = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
    header.extend(ethertype.to_be_bytes());
    header
}

fn udp(payload: usize) -> Vec<u8> {
    let mut datagram = vec![3, 0xe8, 0, 53, 0, 8 + payload as u8, 0, 0];
    datagram.extend((0..payload).map(|i| i as u8));
    datagram
}

fn ipv4(protocol: u8, flags: u16, l4: &[u8], field: Option<usize>) -> Vec<u8> {
    let mut frame = eth(0x0800);
    frame.extend([0x45, 0]);
    frame.extend((20 + l4.len() as u16).to_be_bytes());
    frame.extend([0, 77]);
    frame.extend(flags.to_be_bytes());
    frame.extend([64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    frame.extend(l4);
    fill_ipv4_checksum(&mut frame, 14);
    if let Some(field) = field {
        let pseudo = [
            &[10, 0, 0, 1, 10, 0, 0, 2, 0, protocol][..],
            &(l4.len() as u16).to_be_bytes(),
            l4,
        ];
        let sum = Sum::of(&pseudo.concat()).checksum();
        frame[34 + field..36 + field].copy_from_slice(&sum.to_be_bytes());
    }
    frame
}

fn ipv6(next: u8, extension: &[u8], l4: &[u8], field: usize) -> Vec<u8> {
    let mut frame = eth(0x86dd);
    let addresses = [
        [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
        [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2],
    ]
    .concat();
    frame.extend([0x60, 0, 0, 0]);
    frame.extend(((extension.len() + l4.len()) as u16).to_be_bytes());
    frame.extend([next, 64]);
    frame.extend(&addresses);
    frame.extend(extension);
    let at = frame.len();
    frame.extend(l4);
    let protocol = extension.first().copied().unwrap_or(next);
    let pseudo = [
        &addresses[..],
        &(l4.len() as u32).to_be_bytes(),
        &[0, 0, 0, protocol],
        l4,
    ]
    .concat();
    let sum = Sum::of(&pseudo).checksum();
    frame[at + field..at + field + 2].copy_from_slice(&sum.to_be_bytes());
    frame
}

/// The shape of a super-frame 40000 → 80 with an open checksum.
#[derive(Clone, Debug)]
pub(super) struct Super {
    pub v6: bool,
    pub udp: bool,
    pub vlan: bool,
    pub payload: usize,
    pub size: u16,
    /// The eight lower control bits; ignored for UDP.
    pub flags: u8,
    pub timestamps: bool,
    pub sequence: u32,
    pub id: u16,
    pub padding: usize,
    pub seed: u8,
}

impl Default for Super {
    fn default() -> Self {
        Self {
            v6: false,
            udp: false,
            vlan: false,
            payload: 3000,
            size: 1448,
            flags: 0x10,
            timestamps: false,
            sequence: 0x1000,
            id: 77,
            padding: 0,
            seed: 0,
        }
    }
}

impl Super {
    pub(super) fn build(&self) -> Frame {
        let mut l4 = vec![0x9c, 0x40, 0, 80];
        if self.udp {
            l4.extend((8 + self.payload as u16).to_be_bytes());
            l4.extend([0, 0]);
        } else {
            l4.extend(self.sequence.to_be_bytes());
            l4.extend([
                0,
                0,
                0x20,
                0,
                if self.timestamps { 0x80 } else { 0x50 },
                self.flags,
                1,
                0xf5,
                0,
                0,
                0,
                0,
            ]);
            if self.timestamps {
                l4.extend([1, 1, 8, 10, 0, 0, 0, 7, 0, 0, 0, 9]);
            }
        }
        let header = l4.len();
        l4.extend((0..self.payload).map(|i| (i * 31 + i / 251) as u8 ^ self.seed));
        let (field, protocol) = if self.udp { (6, 17) } else { (16, 6) };
        let mut octets = if self.v6 {
            ipv6(protocol, &[], &l4, field)
        } else {
            ipv4(protocol, 0x4000, &l4, None)
        };
        if !self.v6 {
            octets[18..20].copy_from_slice(&self.id.to_be_bytes());
            fill_ipv4_checksum(&mut octets, 14);
        }
        let (addresses, start) = if self.v6 { (22..54, 54) } else { (26..34, 34) };
        let pseudo = [
            &octets[addresses],
            &(l4.len() as u32).to_be_bytes(),
            &[0, 0, 0, protocol],
        ]
        .concat();
        octets[start + field..start + field + 2].copy_from_slice(&Sum::of(&pseudo).fold().to_be_bytes());
        octets.extend(vec![0; self.padding]);
        let tag = if self.vlan { 4 } else { 0 };
        if self.vlan {
            octets.splice(12..12, [0x81, 0, 0, 100]);
        }
        let mut frame = Frame::new();
        assert!(frame.fill(&octets));
        frame.checksum = Checksum::Partial {
            start: (start + tag) as u16,
            offset: field as u16,
        };
        frame.gso = Some(Gso {
            kind: match (self.udp, self.v6) {
                (true, _) => GsoKind::Udp,
                (_, false) => GsoKind::TcpV4,
                (_, true) => GsoKind::TcpV6,
            },
            size: self.size,
            header_len: (start + tag + header) as u16,
            ecn: !self.udp && self.flags & 0x80 != 0,
        });
        frame
    }
}

/// Super-frames of every shape, with control bits that may be cut.
pub(super) fn any_super() -> impl Strategy<Value = Super> {
    let bits = (any::<[bool; 5]>(), 0..16u8, any::<u8>());
    (bits, 0..20_000usize, 1..1800u16, any::<u32>(), any::<u16>()).prop_map(
        |(([v6, udp, vlan, timestamps, cwr], bits, seed), payload, size, sequence, id)| Super {
            v6,
            udp,
            vlan,
            payload,
            size: if payload > 4000 { size.max(400) } else { size },
            // ACK, and as it falls: FIN, PSH, ECE, CWR
            flags: 0x10 | bits & 1 | (bits & 2) << 2 | (bits & 4) << 4 | if cwr { 0x80 } else { 0 },
            timestamps,
            sequence,
            id,
            padding: usize::from(bits >> 3) * 5,
            seed,
        },
    )
}
