//! The outer headers of an overlay frame: taken off before a UDP socket sends the rest, put back around what it received.
//!
//! ```text
//! | Ethernet 14 (+4 with a tag) | IPv4 20.. or IPv6 40 | UDP 8 | VXLAN 8 | inner frame |
//!  \__ stripped here; the kernel writes its own ________/\____ the datagram _________/
//! ```

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use dpumesh_core::{Checksum, Frame, HEADROOM, MacAddr};
use dpumesh_hw::wire::ethernet::{self, ethertype};
use dpumesh_hw::wire::{UdpPacket, ipv4, ipv6, protocol, udp, vxlan};

/// What the outer headers of a frame say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Outer {
    pub(crate) from: SocketAddr,
    pub(crate) remote: SocketAddr,
    /// DSCP and ECN: the IPv4 type of service or IPv6 traffic class.
    pub(crate) class: u8,
    /// Octets in front of the UDP payload.
    pub(crate) len: usize,
}

impl Outer {
    /// Reads the outer headers of a UDP frame for VXLAN's port; `None` for any other frame, fragments included.
    ///
    /// The length fields count only as far as they must: those of a super-frame cannot be true.
    pub(crate) fn parse(octets: &[u8]) -> Option<Self> {
        let mut l3 = ethernet::HEADER_LEN;
        let mut kind = be16(octets, 12)?;
        if kind == ethertype::VLAN {
            (kind, l3) = (be16(octets, 16)?, l3 + 4);
        }
        let (local, remote, class, l4) = match kind {
            ethertype::IPV4 => ipv4_part(octets.get(l3..)?, l3)?,
            ethertype::IPV6 => ipv6_part(octets.get(l3..)?, l3)?,
            _ => return None,
        };
        let (source, port) = (be16(octets, l4)?, be16(octets, l4 + 2)?);
        let len = l4 + udp::HEADER_LEN;
        (port == vxlan::PORT && octets.len() >= len).then_some(Self {
            from: SocketAddr::new(local, source),
            remote: SocketAddr::new(remote, port),
            class,
            len,
        })
    }

    /// Takes the headers off a frame that [`Outer::parse`] read them from, and VXLAN's as well, which is returned: what is
    /// left is the inner frame. An open outer checksum is closed, because the kernel computes its own. `None`: no
    /// whole VXLAN header.
    pub(crate) fn strip(&self, frame: &mut Frame) -> Option<[u8; vxlan::HEADER_LEN]> {
        let prefix = *frame.octets().get(self.len..)?.first_chunk()?;
        let len = self.len + prefix.len();
        if let Checksum::Partial { start, .. } = frame.checksum
            && usize::from(start) < len
        {
            frame.checksum = Checksum::Unverified;
        }
        if let Some(gso) = &mut frame.gso {
            gso.header_len = gso.header_len.saturating_sub(len as u16);
        }
        frame.pull_front(len).then_some(prefix)
    }
}

type Part = (IpAddr, IpAddr, u8, usize);

fn ipv4_part(packet: &[u8], l3: usize) -> Option<Part> {
    let header: &[u8; ipv4::HEADER_LEN] = packet.first_chunk()?;
    let len = usize::from(header[0] & 0xf) * 4;
    let whole = be16(header, 6)? & 0x3fff == 0;
    let sound = header[0] >> 4 == 4 && len >= ipv4::HEADER_LEN && header[9] == protocol::UDP && whole;
    let address =
        |at: usize| Ipv4Addr::new(header[at], header[at + 1], header[at + 2], header[at + 3]).into();
    sound.then(|| (address(12), address(16), header[1], l3 + len))
}

fn ipv6_part(packet: &[u8], l3: usize) -> Option<Part> {
    let header: &[u8; ipv6::HEADER_LEN] = packet.first_chunk()?;
    let sound = header[0] >> 4 == 6 && header[6] == protocol::UDP;
    let address = |at: usize| {
        let octets: [u8; 16] = std::array::from_fn(|index| header[at + index]);
        Ipv6Addr::from(octets).into()
    };
    sound.then(|| {
        (
            address(8),
            address(24),
            header[0] << 4 | header[1] >> 4,
            l3 + ipv6::HEADER_LEN,
        )
    })
}

/// Fills `frame` with a datagram behind outer headers that say where it came from. False when it does not fit.
pub(crate) fn rebuild(
    frame: &mut Frame,
    from: SocketAddr,
    to: SocketAddr,
    class: u8,
    datagram: &[u8],
) -> bool {
    let (dscp, ecn) = (class >> 2, class & 3);
    let Ok(payload_len) = u16::try_from(datagram.len() + udp::HEADER_LEN) else {
        return false;
    };
    let udp = udp::Repr {
        source: from.port(),
        destination: to.port(),
        payload_len: datagram.len() as u16,
    }
    .emit();
    let (ethertype, v4, v6);
    let ip: &[u8] = match (from.ip(), to.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            ethertype = ethertype::IPV4;
            let protocol = protocol::UDP;
            v4 = ipv4::Repr {
                dscp,
                ecn,
                id: 0,
                dont_fragment: true,
                ttl: 64,
                protocol,
                source,
                destination,
                payload_len,
            }
            .emit();
            &v4
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            ethertype = ethertype::IPV6;
            let next_header = protocol::UDP;
            v6 = ipv6::Repr {
                dscp,
                ecn,
                flow_label: 0,
                hop_limit: 64,
                next_header,
                source,
                destination,
                payload_len,
            }
            .emit();
            &v6
        }
        _ => return false,
    };
    let ethernet = ethernet::Repr {
        destination: mac_of(to.ip()),
        source: mac_of(from.ip()),
        ethertype,
    }
    .emit();
    frame.reset(HEADROOM);
    if !frame.set_len(ethernet.len() + ip.len() + udp.len() + datagram.len()) {
        return false;
    }
    let mut rest = frame.octets_mut();
    for part in [&ethernet[..], ip, &udp, datagram] {
        let (room, behind) = rest.split_at_mut(part.len());
        room.copy_from_slice(part);
        rest = behind;
    }
    // Over IPv6 a UDP checksum is not optional (RFC 8200 §8.1).
    if from.is_ipv6() {
        let l4 = ethernet.len() + ip.len();
        if let Ok(mut packet) = UdpPacket::new(&mut frame.octets_mut()[l4..]) {
            packet.fill_checksum(from.ip(), to.ip());
        }
    }
    true
}

/// The MAC address that stands for a tunnel endpoint in rebuilt headers: locally administered, made from its address.
pub(crate) fn mac_of(address: IpAddr) -> MacAddr {
    let (family, [a, b, c, d]) = match address {
        IpAddr::V4(address) => (4, address.octets()),
        IpAddr::V6(address) => {
            let folded = address.segments().chunks(2).fold(0, |sum: u32, pair| {
                sum.rotate_left(7) ^ (u32::from(pair[0]) << 16 | u32::from(pair[1]))
            });
            (6, folded.to_be_bytes())
        }
    };
    MacAddr([2, family, a, b, c, d])
}

fn be16(octets: &[u8], at: usize) -> Option<u16> {
    octets
        .get(at..)?
        .first_chunk()
        .map(|field| u16::from_be_bytes(*field))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoints(v6: bool) -> (SocketAddr, SocketAddr) {
        let parse = |text: &str| text.parse().expect("an address");
        if v6 {
            (parse("[fd00::1]:49152"), parse("[fd00::2]:4789"))
        } else {
            (parse("192.0.2.1:49152"), parse("192.0.2.2:4789"))
        }
    }

    #[test]
    fn what_is_rebuilt_is_read_and_stripped() {
        for v6 in [false, true] {
            let (from, to) = endpoints(v6);
            let mut frame = Frame::new();
            assert!(rebuild(&mut frame, from, to, 0xb9, b"8 octets, inner"));
            let outer = Outer::parse(frame.octets()).expect("VXLAN");
            assert_eq!(
                (outer.from, outer.remote.ip(), outer.class),
                (from, to.ip(), 0xb9)
            );
            frame.checksum = Checksum::Partial {
                start: outer.len as u16 - 8,
                offset: 6,
            };
            assert_eq!(outer.strip(&mut frame).as_ref(), Some(b"8 octets"));
            assert_eq!(
                (frame.octets(), frame.checksum),
                (&b", inner"[..], Checksum::Unverified)
            );
        }
    }

    #[test]
    fn a_vlan_tag_is_passed_over_and_an_open_inner_checksum_moves() {
        let (from, to) = endpoints(false);
        let mut frame = Frame::new();
        assert!(rebuild(&mut frame, from, to, 0, &[7; 100]));
        let mut tagged = frame.octets()[..12].to_vec();
        tagged.extend([0x81, 0, 0, 5]);
        tagged.extend(&frame.octets()[12..]);
        let mut frame = Frame::copy_of(&tagged);
        let outer = Outer::parse(frame.octets()).expect("VXLAN");
        assert_eq!(outer.len, 46);
        frame.checksum = Checksum::Partial {
            start: 80,
            offset: 16,
        };
        assert_eq!(outer.strip(&mut frame), Some([7; 8]));
        assert_eq!(frame.octets(), [7; 92]);
        assert_eq!(
            frame.checksum,
            Checksum::Partial {
                start: 26,
                offset: 16
            }
        );
    }

    #[test]
    fn other_frames_and_every_truncation_are_refused() {
        for v6 in [false, true] {
            let (from, to) = endpoints(v6);
            let mut frame = Frame::new();
            assert!(rebuild(&mut frame, from, to, 0, &[]));
            for len in 0..frame.len() {
                assert_eq!(Outer::parse(&frame.octets()[..len]), None, "{len}");
            }
            let protocol = if v6 { 14 + 6 } else { 14 + 9 };
            for (at, value) in [(12, 0), (14, 0), (protocol, 6), (frame.len() - 6, 1)] {
                let mut other = frame.octets().to_vec();
                other[at] = value;
                assert_eq!(Outer::parse(&other), None, "octet {at}");
            }
        }
    }
}
