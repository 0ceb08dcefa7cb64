//! IPv6 (RFC 8200) and the walk along its extension headers:
//!
//! ```text
//!  0 version 4, DSCP 6, ECN 2, flow label 20
//!  4 payload length 16 | next header 8 | hop limit 8
//!  8 source 128
//! 24 destination 128
//! 40 extension headers, then the payload
//! ```

use std::net::Ipv6Addr;

use super::field::{array, be16, be32, put, put16, put32};
use super::fragment::Fragment;
use super::malformed::{Layer, Malformed};
use super::protocol;

/// A view of an IPv6 packet; octets behind its payload length (Ethernet padding) are not part of it.
#[derive(Clone, Copy, Debug)]
pub struct Packet<T: AsRef<[u8]>> {
    buffer: T,
}

/// Octets of the fixed header.
pub const HEADER_LEN: usize = 40;

/// Extension headers that are walked at most; a longer chain is refused. RFC 8200 §4.1 names six, one of them twice.
pub const MAX_EXTENSIONS: usize = 8;

pub(super) mod at {
    pub(in super::super) const VERSION_CLASS_LABEL: usize = 0;
    pub(in super::super) const PAYLOAD_LENGTH: usize = 4;
    pub(in super::super) const NEXT_HEADER: usize = 6;
    pub(in super::super) const HOP_LIMIT: usize = 7;
    pub(in super::super) const SOURCE: usize = 8;
    pub(in super::super) const DESTINATION: usize = 24;
}

impl<T: AsRef<[u8]>> Packet<T> {
    /// A view of `buffer`.
    ///
    /// # Errors
    /// A version other than 6; a payload length beyond the buffer; a payload length of 0 although something follows
    /// (jumbograms, RFC 2675, and Linux' "BIG TCP" fit no frame of this dataplane).
    pub fn new(buffer: T) -> Result<Self, Malformed> {
        let octets = buffer.as_ref();
        let have = octets.len();
        Malformed::at_least(Layer::Ipv6, "header", HEADER_LEN, have)?;
        let version = octets[at::VERSION_CLASS_LABEL] >> 4;
        if version != 6 {
            return Err(Malformed::invalid(
                Layer::Ipv6,
                "version",
                u32::from(version),
                "6",
            ));
        }
        let payload = usize::from(be16(octets, at::PAYLOAD_LENGTH));
        if payload == 0 && octets[at::NEXT_HEADER] != protocol::NO_NEXT {
            return Err(Malformed::invalid(
                Layer::Ipv6,
                "payload length",
                0,
                "a length: jumbograms are refused",
            ));
        }
        Malformed::at_least(Layer::Ipv6, "payload length", HEADER_LEN + payload, have)?;
        Ok(Self { buffer })
    }

    /// Octets of header and payload.
    pub fn total_len(&self) -> usize {
        HEADER_LEN + usize::from(be16(self.buffer.as_ref(), at::PAYLOAD_LENGTH))
    }

    /// Differentiated services code point (RFC 2474), 0 to 63.
    pub fn dscp(&self) -> u8 {
        (be16(self.buffer.as_ref(), at::VERSION_CLASS_LABEL) >> 6 & 0x3f) as u8
    }

    /// Explicit congestion notification (RFC 3168), 0 to 3.
    pub fn ecn(&self) -> u8 {
        (be16(self.buffer.as_ref(), at::VERSION_CLASS_LABEL) >> 4 & 3) as u8
    }

    /// Flow label (RFC 6437), 20 bits.
    pub fn flow_label(&self) -> u32 {
        be32(self.buffer.as_ref(), at::VERSION_CLASS_LABEL) & 0xf_ffff
    }

    /// What follows the fixed header, see [`super::protocol`].
    pub fn next_header(&self) -> u8 {
        self.buffer.as_ref()[at::NEXT_HEADER]
    }

    /// Hops left.
    pub fn hop_limit(&self) -> u8 {
        self.buffer.as_ref()[at::HOP_LIMIT]
    }

    /// Source address.
    pub fn source(&self) -> Ipv6Addr {
        Ipv6Addr::from(array::<16>(self.buffer.as_ref(), at::SOURCE))
    }

    /// Destination address.
    pub fn destination(&self) -> Ipv6Addr {
        Ipv6Addr::from(array::<16>(self.buffer.as_ref(), at::DESTINATION))
    }

    /// Extension headers and payload, without Ethernet padding.
    pub fn payload(&self) -> &[u8] {
        &self.buffer.as_ref()[HEADER_LEN..self.total_len()]
    }

    /// Walks the extension headers.
    ///
    /// # Errors
    /// See [`Extensions::walk`].
    pub fn extensions(&self) -> Result<Extensions, Malformed> {
        Extensions::walk(self.next_header(), self.payload())
    }
}

impl<T: AsRef<[u8]> + AsMut<[u8]>> Packet<T> {
    /// Sets the hops left.
    pub fn set_hop_limit(&mut self, hops: u8) {
        self.buffer.as_mut()[at::HOP_LIMIT] = hops;
    }

    /// Sets the ECN field, 0 to 3.
    pub fn set_ecn(&mut self, ecn: u8) {
        let field = &mut self.buffer.as_mut()[at::VERSION_CLASS_LABEL + 1];
        *field = *field & !0x30 | (ecn & 3) << 4;
    }

    /// Sets the source address; the payload's checksum is the caller's ([`super::checksum::update`]).
    pub fn set_source(&mut self, address: Ipv6Addr) {
        put(self.buffer.as_mut(), at::SOURCE, address.octets());
    }

    /// Sets the destination address; the payload's checksum is the caller's ([`super::checksum::update`]).
    pub fn set_destination(&mut self, address: Ipv6Addr) {
        put(self.buffer.as_mut(), at::DESTINATION, address.octets());
    }
}

/// Where a chain of extension headers ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extensions {
    /// The first next header that is no extension header, or, behind the header of a later fragment, whatever it
    /// says: the rest of the chain is in the first fragment.
    pub protocol: u8,
    /// Octets of all extension headers.
    pub len: usize,
    /// Which part of its packet this is.
    pub fragment: Fragment,
}

impl Extensions {
    /// Follows `next` through `octets`, at most [`MAX_EXTENSIONS`] headers far.
    ///
    /// # Errors
    /// A header beyond the octets; more headers than the bound; hop-by-hop options anywhere but first; a second
    /// fragment header; a routing header with segments left: what is steered and policed by its destination must
    /// not be routed by its source (for type 0 see RFC 5095).
    pub fn walk(mut next: u8, octets: &[u8]) -> Result<Self, Malformed> {
        let mut len = 0;
        let mut fragment = None;
        for position in 0..=MAX_EXTENSIONS {
            if !is_extension(next) {
                return Ok(Self {
                    protocol: next,
                    len,
                    fragment: fragment.unwrap_or_default(),
                });
            }
            if position == MAX_EXTENSIONS {
                break;
            }
            let header = one_header(next, position, &octets[len..])?;
            if next == protocol::FRAGMENT {
                if fragment.is_some() {
                    let expected = "one fragment header at most";
                    return Err(Malformed::invalid(Layer::Ipv6, "next header", 44, expected));
                }
                let part = fragment_of(header);
                part.check(Layer::Ipv6, octets.len() - len - header.len())?;
                fragment = Some(part);
            }
            len += header.len();
            next = header[0];
            if let Some(part @ Fragment::Later { .. }) = fragment {
                return Ok(Self {
                    protocol: next,
                    len,
                    fragment: part,
                });
            }
        }
        Err(Malformed::invalid(
            Layer::Ipv6,
            "next header",
            u32::from(next),
            "at most 8 extension headers",
        ))
    }
}

fn is_extension(next: u8) -> bool {
    use protocol::{
        AUTHENTICATION, DESTINATION_OPTIONS, FRAGMENT, HIP, HOP_BY_HOP, MOBILITY, ROUTING, SHIM6,
    };
    matches!(
        next,
        HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION_OPTIONS | MOBILITY | HIP | SHIM6
    )
}

/// The octets of the extension header at the front of `octets`.
fn one_header(kind: u8, position: usize, octets: &[u8]) -> Result<&[u8], Malformed> {
    Malformed::at_least(Layer::Ipv6, "extension header", 8, octets.len())?;
    if kind == protocol::HOP_BY_HOP && position > 0 {
        return Err(Malformed::invalid(
            Layer::Ipv6,
            "next header",
            0,
            "hop-by-hop options in front only",
        ));
    }
    if kind == protocol::ROUTING && octets[3] > 0 {
        let expected = "0: source routing is not forwarded";
        return Err(Malformed::invalid(
            Layer::Ipv6,
            "segments left",
            u32::from(octets[3]),
            expected,
        ));
    }
    let len = match kind {
        protocol::FRAGMENT => 8,
        protocol::AUTHENTICATION => (usize::from(octets[1]) + 2) * 4,
        _ => (usize::from(octets[1]) + 1) * 8,
    };
    Malformed::at_least(Layer::Ipv6, "extension header length", len, octets.len())?;
    Ok(&octets[..len])
}

/// `next header 8 | reserved 8 | offset 13, reserved 2, more 1 | identification 32` (RFC 8200 §4.5).
fn fragment_of(header: &[u8]) -> Fragment {
    let field = be16(header, 2);
    Fragment::from_fields(be32(header, 4), field & !7, field & 1 != 0)
}

/// A header to be emitted, without extension headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Repr {
    /// Differentiated services code point, 0 to 63.
    pub dscp: u8,
    /// Explicit congestion notification, 0 to 3.
    pub ecn: u8,
    /// Flow label, 20 bits.
    pub flow_label: u32,
    /// Hops left.
    pub hop_limit: u8,
    /// What follows.
    pub next_header: u8,
    /// Source address.
    pub source: Ipv6Addr,
    /// Destination address.
    pub destination: Ipv6Addr,
    /// Octets behind the header.
    pub payload_len: u16,
}

impl Repr {
    /// The header's octets.
    pub fn emit(&self) -> [u8; HEADER_LEN] {
        let mut header = [0; HEADER_LEN];
        let class = u32::from(self.dscp & 0x3f) << 2 | u32::from(self.ecn & 3);
        put32(
            &mut header,
            at::VERSION_CLASS_LABEL,
            6 << 28 | class << 20 | self.flow_label & 0xf_ffff,
        );
        put16(&mut header, at::PAYLOAD_LENGTH, self.payload_len);
        header[at::NEXT_HEADER] = self.next_header;
        header[at::HOP_LIMIT] = self.hop_limit;
        put(&mut header, at::SOURCE, self.source.octets());
        put(&mut header, at::DESTINATION, self.destination.octets());
        header
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPR: Repr = Repr {
        dscp: 46,
        ecn: 1,
        flow_label: 0xabcde,
        hop_limit: 64,
        next_header: 17,
        source: Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1),
        destination: Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2),
        payload_len: 8,
    };

    fn packet() -> Vec<u8> {
        [&REPR.emit()[..], &[0; 8]].concat()
    }

    #[test]
    fn fields_are_read_as_emitted() {
        let octets = packet();
        assert_eq!(octets[..8], [0x6b, 0x9a, 0xbc, 0xde, 0, 8, 17, 64]);
        let packet = Packet::new(&octets).expect("valid");
        let read = Repr {
            dscp: packet.dscp(),
            ecn: packet.ecn(),
            flow_label: packet.flow_label(),
            hop_limit: packet.hop_limit(),
            next_header: packet.next_header(),
            source: packet.source(),
            destination: packet.destination(),
            payload_len: packet.payload().len() as u16,
        };
        assert_eq!(read, REPR);
    }

    #[test]
    fn setters_touch_their_field_only() {
        let mut packet = Packet::new(packet()).expect("valid");
        packet.set_hop_limit(63);
        packet.set_ecn(3);
        packet.set_source(Ipv6Addr::LOCALHOST);
        packet.set_destination(Ipv6Addr::UNSPECIFIED);
        let wanted = Repr {
            hop_limit: 63,
            ecn: 3,
            source: Ipv6Addr::LOCALHOST,
            destination: Ipv6Addr::UNSPECIFIED,
            ..REPR
        };
        assert_eq!(packet.buffer[..HEADER_LEN], wanted.emit());
    }

    #[test]
    fn truncation_and_jumbograms_are_refused_by_name() {
        let mut octets = packet();
        for len in 0..octets.len() {
            assert!(
                Packet::new(&octets[..len]).unwrap_err().is_truncated(),
                "at {len}"
            );
        }
        octets[5] = 0;
        assert_eq!(Packet::new(&octets).unwrap_err().field, "payload length");
        octets[6] = protocol::NO_NEXT;
        assert!(Packet::new(&octets).is_ok());
        octets[0] = 0x4b;
        assert_eq!(Packet::new(&octets).unwrap_err().field, "version");
    }

    #[test]
    fn the_walk_passes_every_kind_of_extension_header() {
        let mut octets = vec![];
        octets.extend([60, 0, 0, 0, 0, 0, 0, 0]); // hop-by-hop, 8 octets
        octets.extend([43, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]); // destination options, 16
        octets.extend([51, 0, 2, 0, 0, 0, 0, 0]); // routing without segments left
        octets.extend([44, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]); // authentication, 12
        octets.extend([6, 0, 0, 1, 0, 0, 0, 9]); // first fragment
        let len = octets.len();
        octets.extend([0; 24]);
        let ends = Extensions::walk(0, &octets).expect("valid");
        assert_eq!(
            ends,
            Extensions {
                protocol: 6,
                len,
                fragment: Fragment::First { id: 9 }
            }
        );
        for cut in 0..len {
            assert!(Extensions::walk(0, &octets[..cut]).is_err(), "at {cut}");
        }
    }

    #[test]
    fn behind_a_later_fragment_nothing_is_walked() {
        let octets = [60, 0, 0x05, 0xc8, 0, 0, 0, 9, 0xff, 0xff];
        let ends = Extensions::walk(44, &octets).expect("valid");
        let fragment = Fragment::Later {
            id: 9,
            offset: 1480,
            more: false,
        };
        assert_eq!(
            ends,
            Extensions {
                protocol: 60,
                len: 8,
                fragment
            }
        );
    }

    #[test]
    fn long_twisted_and_source_routed_chains_are_refused() {
        let options = [60, 0, 0, 0, 0, 0, 0, 0];
        let mut chain = options.repeat(MAX_EXTENSIONS);
        chain[8 * (MAX_EXTENSIONS - 1)] = 59;
        assert_eq!(
            Extensions::walk(60, &chain).expect("just short enough").protocol,
            59
        );
        assert!(Extensions::walk(60, &options.repeat(MAX_EXTENSIONS + 1)).is_err());
        let hop_by_hop_second = [[0, 0, 0, 0, 0, 0, 0, 0], options].concat();
        assert_eq!(
            Extensions::walk(60, &hop_by_hop_second).unwrap_err().field,
            "next header"
        );
        let routed = [6, 2, 0, 1, 0, 0, 0, 0].repeat(3);
        assert_eq!(Extensions::walk(43, &routed).unwrap_err().field, "segments left");
        let twice = [44, 0, 0, 0, 0, 0, 0, 1].repeat(2);
        assert_eq!(Extensions::walk(44, &twice).unwrap_err().field, "next header");
    }
}
