//! IPv4 (RFC 791):
//!
//! ```text
//!  0 version 4, IHL 4 | DSCP 6, ECN 2 | total length 16
//!  4 identification 16 | 0, DF, MF, fragment offset 13 (in 8 octets)
//!  8 TTL 8 | protocol 8 | header checksum 16
//! 12 source 32
//! 16 destination 32
//! 20 options, up to 40 octets, then the payload
//! ```

use std::net::Ipv4Addr;

use super::checksum::{self, Sum};
use super::field::{array, be16, put, put16};
use super::fragment::Fragment;
use super::malformed::{Layer, Malformed};

/// A view of an IPv4 packet; octets behind its total length (Ethernet padding) are not part of it.
#[derive(Clone, Copy, Debug)]
pub struct Packet<T: AsRef<[u8]>> {
    buffer: T,
}

/// Octets of a header without options.
pub const HEADER_LEN: usize = 20;

pub(super) mod at {
    pub(in super::super) const VERSION_IHL: usize = 0;
    pub(in super::super) const DSCP_ECN: usize = 1;
    pub(in super::super) const TOTAL_LENGTH: usize = 2;
    pub(in super::super) const IDENTIFICATION: usize = 4;
    pub(in super::super) const FLAGS_OFFSET: usize = 6;
    pub(in super::super) const TTL: usize = 8;
    pub(in super::super) const PROTOCOL: usize = 9;
    pub(in super::super) const CHECKSUM: usize = 10;
    pub(in super::super) const SOURCE: usize = 12;
    pub(in super::super) const DESTINATION: usize = 16;
}

const DONT_FRAGMENT: u16 = 0x4000;
const MORE_FRAGMENTS: u16 = 0x2000;
const OFFSET: u16 = 0x1fff;

impl<T: AsRef<[u8]>> Packet<T> {
    /// A view of `buffer`. The header checksum is not looked at: see [`Packet::verify_checksum`].
    ///
    /// # Errors
    /// A version other than 4; header or total length beyond the buffer, or smaller than they can be. A total length
    /// of 0 (Linux' "BIG TCP") is refused: no such packet fits this dataplane's frames.
    pub fn new(buffer: T) -> Result<Self, Malformed> {
        let octets = buffer.as_ref();
        let have = octets.len();
        Malformed::at_least(Layer::Ipv4, "header", HEADER_LEN, have)?;
        let version = octets[at::VERSION_IHL] >> 4;
        if version != 4 {
            return Err(Malformed::invalid(
                Layer::Ipv4,
                "version",
                u32::from(version),
                "4",
            ));
        }
        let header = header_len(octets);
        if header < HEADER_LEN {
            return Err(Malformed::invalid(
                Layer::Ipv4,
                "IHL",
                header as u32 / 4,
                "5 to 15",
            ));
        }
        let total = usize::from(be16(octets, at::TOTAL_LENGTH));
        if total < header {
            let expected = "the header's length or more";
            return Err(Malformed::invalid(
                Layer::Ipv4,
                "total length",
                total as u32,
                expected,
            ));
        }
        Malformed::at_least(Layer::Ipv4, "total length", total, have)?;
        Ok(Self { buffer })
    }

    /// Octets of the header, options included.
    pub fn header_len(&self) -> usize {
        header_len(self.buffer.as_ref())
    }

    /// Octets of header and payload.
    pub fn total_len(&self) -> usize {
        usize::from(be16(self.buffer.as_ref(), at::TOTAL_LENGTH))
    }

    /// Differentiated services code point (RFC 2474), 0 to 63.
    pub fn dscp(&self) -> u8 {
        self.buffer.as_ref()[at::DSCP_ECN] >> 2
    }

    /// Explicit congestion notification (RFC 3168), 0 to 3.
    pub fn ecn(&self) -> u8 {
        self.buffer.as_ref()[at::DSCP_ECN] & 3
    }

    /// Identification; without meaning in a packet that is not and may not be fragmented (RFC 6864).
    pub fn id(&self) -> u16 {
        be16(self.buffer.as_ref(), at::IDENTIFICATION)
    }

    /// Routers must not fragment the packet.
    pub fn dont_fragment(&self) -> bool {
        be16(self.buffer.as_ref(), at::FLAGS_OFFSET) & DONT_FRAGMENT != 0
    }

    /// Which part of its packet this is.
    pub fn fragment(&self) -> Fragment {
        let field = be16(self.buffer.as_ref(), at::FLAGS_OFFSET);
        Fragment::from_fields(
            u32::from(self.id()),
            (field & OFFSET) << 3,
            field & MORE_FRAGMENTS != 0,
        )
    }

    /// Hops left.
    pub fn ttl(&self) -> u8 {
        self.buffer.as_ref()[at::TTL]
    }

    /// Protocol of the payload, see [`super::protocol`].
    pub fn protocol(&self) -> u8 {
        self.buffer.as_ref()[at::PROTOCOL]
    }

    /// Source address.
    pub fn source(&self) -> Ipv4Addr {
        Ipv4Addr::from(array::<4>(self.buffer.as_ref(), at::SOURCE))
    }

    /// Destination address.
    pub fn destination(&self) -> Ipv4Addr {
        Ipv4Addr::from(array::<4>(self.buffer.as_ref(), at::DESTINATION))
    }

    /// True when the header's checksum is right.
    pub fn verify_checksum(&self) -> bool {
        Sum::of(&self.buffer.as_ref()[..self.header_len()]).is_complete()
    }

    /// The options, padding left out.
    pub fn options(&self) -> Options<'_> {
        Options {
            octets: &self.buffer.as_ref()[HEADER_LEN..self.header_len()],
        }
    }

    /// The payload, without Ethernet padding.
    pub fn payload(&self) -> &[u8] {
        &self.buffer.as_ref()[self.header_len()..self.total_len()]
    }
}

impl<T: AsRef<[u8]> + AsMut<[u8]>> Packet<T> {
    /// Sets the hops left and keeps the checksum true.
    pub fn set_ttl(&mut self, ttl: u8) {
        let protocol = self.protocol();
        self.rewrite(at::TTL, [ttl, protocol]);
    }

    /// Sets the ECN field (0 to 3) and keeps the checksum true.
    pub fn set_ecn(&mut self, ecn: u8) {
        let [first, second] = array(self.buffer.as_ref(), at::VERSION_IHL);
        self.rewrite(at::VERSION_IHL, [first, second & !3 | ecn & 3]);
    }

    /// Sets the source address and keeps the header's checksum true; that of the payload is the caller's
    /// ([`checksum::update`]).
    pub fn set_source(&mut self, address: Ipv4Addr) {
        self.rewrite(at::SOURCE, address.octets());
    }

    /// Sets the destination address and keeps the header's checksum true; that of the payload is the caller's
    /// ([`checksum::update`]).
    pub fn set_destination(&mut self, address: Ipv4Addr) {
        self.rewrite(at::DESTINATION, address.octets());
    }

    /// Computes the header's checksum anew.
    pub fn fill_checksum(&mut self) {
        let header = self.header_len();
        let octets = self.buffer.as_mut();
        put16(octets, at::CHECKSUM, 0);
        let sum = Sum::of(&octets[..header]).checksum();
        put16(octets, at::CHECKSUM, sum);
    }

    fn rewrite<const N: usize>(&mut self, at: usize, new: [u8; N]) {
        let octets = self.buffer.as_mut();
        let old = Sum::of(&octets[at..at + N]);
        let sum = checksum::update(be16(octets, at::CHECKSUM), old, Sum::of(&new));
        put(octets, at, new);
        put16(octets, at::CHECKSUM, sum);
    }
}

fn header_len(octets: &[u8]) -> usize {
    usize::from(octets[at::VERSION_IHL] & 0x0f) * 4
}

/// The options of a header, one by one; ends after the first malformed one.
#[derive(Clone, Debug)]
pub struct Options<'a> {
    octets: &'a [u8],
}

/// One option: its type octet and its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IpOption<'a> {
    /// Type octet: copied flag, class and number.
    pub kind: u8,
    /// What follows type and length.
    pub data: &'a [u8],
}

impl IpOption<'_> {
    /// Loose or strict source routing: the packet goes elsewhere than its destination says (RFC 7126 §4.3, §4.4).
    pub const fn is_source_route(&self) -> bool {
        matches!(self.kind, 131 | 137)
    }
}

impl<'a> Iterator for Options<'a> {
    type Item = Result<IpOption<'a>, Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        let padding = self.octets.iter().take_while(|&&kind| kind == 1).count();
        let rest = &self.octets[padding..];
        self.octets = &[];
        let (&kind, behind) = rest.split_first().filter(|&(&kind, _)| kind != 0)?;
        let Some(&len) = behind.first() else {
            return Some(Err(
                Malformed::at_least(Layer::Ipv4, "option length", 2, 1).unwrap_err()
            ));
        };
        if len < 2 {
            return Some(Err(Malformed::invalid(
                Layer::Ipv4,
                "option length",
                u32::from(len),
                "2 or more",
            )));
        }
        let len = usize::from(len);
        if let Err(short) = Malformed::at_least(Layer::Ipv4, "option length", len, rest.len()) {
            return Some(Err(short));
        }
        self.octets = &rest[len..];
        Some(Ok(IpOption {
            kind,
            data: &rest[2..len],
        }))
    }
}

/// A header to be emitted: no options, not fragmented.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Repr {
    /// Differentiated services code point, 0 to 63.
    pub dscp: u8,
    /// Explicit congestion notification, 0 to 3.
    pub ecn: u8,
    /// Identification.
    pub id: u16,
    /// Routers must not fragment the packet.
    pub dont_fragment: bool,
    /// Hops left.
    pub ttl: u8,
    /// Protocol of the payload.
    pub protocol: u8,
    /// Source address.
    pub source: Ipv4Addr,
    /// Destination address.
    pub destination: Ipv4Addr,
    /// Octets behind the header, at most 65,515.
    pub payload_len: u16,
}

impl Repr {
    /// The header's octets, checksum included.
    pub fn emit(&self) -> [u8; HEADER_LEN] {
        let mut header = [0; HEADER_LEN];
        header[at::VERSION_IHL] = 0x45;
        header[at::DSCP_ECN] = self.dscp << 2 | self.ecn & 3;
        put16(
            &mut header,
            at::TOTAL_LENGTH,
            self.payload_len.saturating_add(HEADER_LEN as u16),
        );
        put16(&mut header, at::IDENTIFICATION, self.id);
        put16(
            &mut header,
            at::FLAGS_OFFSET,
            if self.dont_fragment { DONT_FRAGMENT } else { 0 },
        );
        header[at::TTL] = self.ttl;
        header[at::PROTOCOL] = self.protocol;
        put(&mut header, at::SOURCE, self.source.octets());
        put(&mut header, at::DESTINATION, self.destination.octets());
        let sum = Sum::of(&header).checksum();
        put16(&mut header, at::CHECKSUM, sum);
        header
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wire::checksum::tests::naive;

    /// A header whose checksum, 0xb861, is widely published.
    const HEADER: [u8; HEADER_LEN] = [
        0x45, 0, 0, 0x73, 0, 0, 0x40, 0, 0x40, 0x11, 0xb8, 0x61, 0xc0, 0xa8, 0, 1, 0xc0, 0xa8, 0, 0xc7,
    ];

    fn packet() -> Vec<u8> {
        let mut packet = HEADER.to_vec();
        packet.resize(0x73, 0xee);
        packet
    }

    #[test]
    fn the_published_header_is_read_verified_and_emitted() {
        let octets = packet();
        let packet = Packet::new(&octets).expect("valid");
        assert!(packet.verify_checksum());
        assert_eq!((packet.header_len(), packet.payload().len()), (20, 0x5f));
        let repr = Repr {
            dscp: packet.dscp(),
            ecn: packet.ecn(),
            id: packet.id(),
            dont_fragment: packet.dont_fragment(),
            ttl: packet.ttl(),
            protocol: packet.protocol(),
            source: packet.source(),
            destination: packet.destination(),
            payload_len: packet.payload().len() as u16,
        };
        assert_eq!(repr.emit(), HEADER);
    }

    #[test]
    fn padding_is_no_payload_and_truncation_is_named() {
        let mut octets = packet();
        for len in 0..octets.len() {
            assert!(
                Packet::new(&octets[..len]).unwrap_err().is_truncated(),
                "at {len}"
            );
        }
        octets.extend([0; 7]);
        assert_eq!(Packet::new(&octets).expect("valid").payload().len(), 0x5f);
    }

    #[test]
    fn impossible_lengths_are_refused_by_name() {
        let broken = |place: usize, value: u8| {
            let mut octets = packet();
            octets[place] = value;
            Packet::new(octets).unwrap_err().field
        };
        assert_eq!(broken(0, 0x55), "version");
        assert_eq!(broken(0, 0x44), "IHL");
        assert_eq!(broken(3, 19), "total length");
        assert_eq!(broken(3, 0), "total length");
        assert_eq!(broken(2, 1), "total length");
    }

    #[test]
    fn options_are_listed_until_the_first_broken_one() {
        let mut octets = packet();
        octets[0] = 0x48; // 12 octets of options
        octets[20..32].copy_from_slice(&[1, 7, 4, 0xaa, 0xbb, 1, 131, 3, 4, 0, 9, 9]);
        let packet = Packet::new(&octets).expect("valid");
        let options: Vec<_> = packet.options().map(Result::unwrap).collect();
        assert_eq!(options.len(), 2);
        assert_eq!(
            options[0],
            IpOption {
                kind: 7,
                data: &[0xaa, 0xbb]
            }
        );
        assert!(options[1].is_source_route());
        for len in [0, 1, 12] {
            octets[22] = len;
            let packet = Packet::new(&octets).expect("valid");
            let last = packet.options().last().expect("one");
            assert_eq!(last.unwrap_err().field, "option length");
        }
    }

    #[test]
    fn fragments_are_told_apart() {
        let mut octets = packet();
        octets[4..8].copy_from_slice(&[0x12, 0x34, 0x20, 0]);
        assert_eq!(
            Packet::new(&octets).expect("valid").fragment(),
            Fragment::First { id: 0x1234 }
        );
        octets[6..8].copy_from_slice(&[0, 0xb9]);
        let later = Fragment::Later {
            id: 0x1234,
            offset: 1480,
            more: false,
        };
        assert_eq!(Packet::new(&octets).expect("valid").fragment(), later);
    }

    proptest! {
        #[test]
        fn every_setter_keeps_the_checksum_true(
            ttl: u8, ecn in 0..4u8, source: u32, destination: u32, id: u16, dscp in 0..64u8,
        ) {
            let repr = Repr {
                dscp, ecn: 0, id, dont_fragment: true, ttl: 64, protocol: 6, payload_len: 0,
                source: Ipv4Addr::UNSPECIFIED, destination: Ipv4Addr::BROADCAST,
            };
            let mut packet = Packet::new(repr.emit()).expect("emitted");
            packet.set_ttl(ttl);
            packet.set_ecn(ecn);
            packet.set_source(source.into());
            packet.set_destination(destination.into());
            prop_assert!(packet.verify_checksum());
            prop_assert_eq!(naive(&packet.buffer), 0xffff);
            prop_assert_eq!((packet.ttl(), packet.ecn(), packet.dscp()), (ttl, ecn, dscp));
            prop_assert_eq!(packet.source(), Ipv4Addr::from(source));
            let kept = be16(&packet.buffer, at::CHECKSUM);
            packet.fill_checksum();
            prop_assert_eq!(be16(&packet.buffer, at::CHECKSUM), kept);
        }
    }
}
