//! UDP (RFC 768): `source port 2 | destination port 2 | length 2 | checksum 2 | payload`.

use std::net::IpAddr;

use super::checksum::Sum;
use super::field::{be16, put16};
use super::malformed::{Layer, Malformed};
use super::protocol;

/// A view of a datagram; octets behind its length are not part of it.
#[derive(Clone, Copy, Debug)]
pub struct Packet<T: AsRef<[u8]>> {
    buffer: T,
}

/// Octets of the header.
pub const HEADER_LEN: usize = 8;

pub(super) mod at {
    pub(in super::super) const SOURCE: usize = 0;
    pub(in super::super) const DESTINATION: usize = 2;
    pub(in super::super) const LENGTH: usize = 4;
    pub(in super::super) const CHECKSUM: usize = 6;
}

impl<T: AsRef<[u8]>> Packet<T> {
    /// A view of `buffer`. The checksum is not looked at: see [`super::checksum::verify`].
    ///
    /// # Errors
    /// Fewer than 8 octets, or a length below 8 or beyond the buffer.
    pub fn new(buffer: T) -> Result<Self, Malformed> {
        let packet = Self::first_fragment(buffer)?;
        let have = packet.buffer.as_ref().len();
        Malformed::at_least(Layer::Udp, "length", packet.len_field(), have)?;
        Ok(packet)
    }

    /// A view of a datagram's beginning, whose length may reach beyond the buffer.
    ///
    /// # Errors
    /// Fewer than 8 octets, or a length below 8.
    pub fn first_fragment(buffer: T) -> Result<Self, Malformed> {
        let octets = buffer.as_ref();
        Malformed::at_least(Layer::Udp, "header", HEADER_LEN, octets.len())?;
        let length = be16(octets, at::LENGTH);
        if usize::from(length) < HEADER_LEN {
            return Err(Malformed::invalid(
                Layer::Udp,
                "length",
                u32::from(length),
                "8 or more",
            ));
        }
        Ok(Self { buffer })
    }

    /// Source port.
    pub fn source(&self) -> u16 {
        be16(self.buffer.as_ref(), at::SOURCE)
    }

    /// Destination port.
    pub fn destination(&self) -> u16 {
        be16(self.buffer.as_ref(), at::DESTINATION)
    }

    /// The length field: octets of header and payload.
    pub fn len_field(&self) -> usize {
        usize::from(be16(self.buffer.as_ref(), at::LENGTH))
    }

    /// The checksum field; 0 means that there is none.
    pub fn checksum(&self) -> u16 {
        be16(self.buffer.as_ref(), at::CHECKSUM)
    }

    /// The payload, as far as the buffer holds it.
    pub fn payload(&self) -> &[u8] {
        let octets = self.buffer.as_ref();
        &octets[HEADER_LEN..self.len_field().min(octets.len())]
    }
}

impl<T: AsRef<[u8]> + AsMut<[u8]>> Packet<T> {
    /// Rewrites the source port; the checksum is the caller's ([`super::checksum::update`]).
    pub fn set_source(&mut self, port: u16) {
        put16(self.buffer.as_mut(), at::SOURCE, port);
    }

    /// Rewrites the destination port; the checksum is the caller's ([`super::checksum::update`]).
    pub fn set_destination(&mut self, port: u16) {
        put16(self.buffer.as_mut(), at::DESTINATION, port);
    }

    /// Rewrites the checksum field.
    pub fn set_checksum(&mut self, checksum: u16) {
        put16(self.buffer.as_mut(), at::CHECKSUM, checksum);
    }

    /// Computes the checksum anew, for these addresses. A sum of 0 is sent as 0xffff.
    pub fn fill_checksum(&mut self, source: IpAddr, destination: IpAddr) {
        self.set_checksum(0);
        let len = self.len_field().min(self.buffer.as_ref().len());
        let pseudo = Sum::pseudo(source, destination, protocol::UDP, len as u32);
        let sum = pseudo.plus(Sum::of(&self.buffer.as_ref()[..len])).checksum();
        self.set_checksum(if sum == 0 { 0xffff } else { sum });
    }
}

/// A header to be emitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Repr {
    /// Source port.
    pub source: u16,
    /// Destination port.
    pub destination: u16,
    /// Octets behind the header, at most 65,527.
    pub payload_len: u16,
}

impl Repr {
    /// The header's octets, with a checksum of 0 for the caller to finish.
    pub fn emit(&self) -> [u8; HEADER_LEN] {
        let mut header = [0; HEADER_LEN];
        put16(&mut header, at::SOURCE, self.source);
        put16(&mut header, at::DESTINATION, self.destination);
        put16(
            &mut header,
            at::LENGTH,
            self.payload_len.saturating_add(HEADER_LEN as u16),
        );
        header
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn fields_are_read_as_emitted() {
        let repr = Repr {
            source: 53,
            destination: 4789,
            payload_len: 3,
        };
        let octets = [&repr.emit()[..], b"abc", b"trailer"].concat();
        let packet = Packet::new(&octets).expect("valid");
        assert_eq!(
            (packet.source(), packet.destination(), packet.len_field()),
            (53, 4789, 11)
        );
        assert_eq!((packet.payload(), packet.checksum()), (&b"abc"[..], 0));
    }

    #[test]
    fn a_sum_of_zero_is_sent_as_ffff() {
        let any = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        // The rest sums to protocol 17 and twice the length, 10.
        let repr = Repr {
            source: 0xffff - 37,
            destination: 0,
            payload_len: 2,
        };
        let mut packet = Packet::new([&repr.emit()[..], &[0, 0]].concat()).expect("valid");
        packet.fill_checksum(any, any);
        assert_eq!(packet.checksum(), 0xffff);
        packet.set_destination(0xffff - 1);
        packet.fill_checksum(any, any);
        assert_eq!(packet.checksum(), 1);
    }

    #[test]
    fn short_and_overlong_datagrams_are_refused_by_name() {
        let octets = [
            &Repr {
                source: 1,
                destination: 2,
                payload_len: 4,
            }
            .emit()[..],
            &[0; 4],
        ]
        .concat();
        for len in 0..octets.len() {
            assert!(
                Packet::new(&octets[..len]).unwrap_err().is_truncated(),
                "at {len}"
            );
        }
        let mut short = octets;
        short[5] = 7;
        assert_eq!(Packet::new(&short).unwrap_err().field, "length");
        assert_eq!(Packet::first_fragment(&short).unwrap_err().field, "length");
        short[5] = 200;
        assert_eq!(
            Packet::first_fragment(&short)
                .expect("a beginning")
                .payload()
                .len(),
            4
        );
    }
}
