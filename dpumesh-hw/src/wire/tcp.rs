//! TCP (RFC 9293 §3.1):
//!
//! ```text
//!  0 source port 16 | destination port 16
//!  4 sequence number 32
//!  8 acknowledgment number 32
//! 12 data offset 4, reserved 3, AE CWR ECE URG ACK PSH RST SYN FIN | window 16
//! 16 checksum 16 | urgent pointer 16
//! 20 options, up to 40 octets, then the payload
//! ```

use std::net::IpAddr;

use bitflags::bitflags;

use super::checksum::Sum;
use super::field::{array, be16, be32, put16, put32};
use super::malformed::{Layer, Malformed};
use super::protocol;

/// A view of a segment.
#[derive(Clone, Copy, Debug)]
pub struct Packet<T: AsRef<[u8]>> {
    buffer: T,
}

/// Octets of a header without options.
pub const HEADER_LEN: usize = 20;

bitflags! {
    /// Control bits.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Flags: u16 {
        /// No more data from the sender.
        const FIN = 0x001;
        /// Synchronise sequence numbers.
        const SYN = 0x002;
        /// Reset the connection.
        const RST = 0x004;
        /// Hand the data to the reader now.
        const PSH = 0x008;
        /// The acknowledgment number counts.
        const ACK = 0x010;
        /// The urgent pointer counts.
        const URG = 0x020;
        /// ECN echo (RFC 3168).
        const ECE = 0x040;
        /// Congestion window reduced (RFC 3168).
        const CWR = 0x080;
        /// Accurate ECN (RFC 9768).
        const AE = 0x100;
    }
}

pub(super) mod at {
    pub(in super::super) const SOURCE: usize = 0;
    pub(in super::super) const DESTINATION: usize = 2;
    pub(in super::super) const SEQUENCE: usize = 4;
    pub(in super::super) const ACKNOWLEDGMENT: usize = 8;
    pub(in super::super) const OFFSET_FLAGS: usize = 12;
    pub(in super::super) const WINDOW: usize = 14;
    pub(in super::super) const CHECKSUM: usize = 16;
    pub(in super::super) const URGENT: usize = 18;
}

impl<T: AsRef<[u8]>> Packet<T> {
    /// A view of `buffer`. The checksum is not looked at: see [`super::checksum::verify`].
    ///
    /// # Errors
    /// Fewer octets than the data offset says, or a data offset below 5.
    pub fn new(buffer: T) -> Result<Self, Malformed> {
        let octets = buffer.as_ref();
        Malformed::at_least(Layer::Tcp, "header", HEADER_LEN, octets.len())?;
        let header = header_len(octets);
        if header < HEADER_LEN {
            return Err(Malformed::invalid(
                Layer::Tcp,
                "data offset",
                header as u32 / 4,
                "5 to 15",
            ));
        }
        Malformed::at_least(Layer::Tcp, "data offset", header, octets.len())?;
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

    /// Number of the first octet (of the SYN, if there is one).
    pub fn sequence(&self) -> u32 {
        be32(self.buffer.as_ref(), at::SEQUENCE)
    }

    /// Number of the octet that is expected next, when ACK is set.
    pub fn acknowledgment(&self) -> u32 {
        be32(self.buffer.as_ref(), at::ACKNOWLEDGMENT)
    }

    /// Octets of the header, options included.
    pub fn header_len(&self) -> usize {
        header_len(self.buffer.as_ref())
    }

    /// Control bits.
    pub fn flags(&self) -> Flags {
        Flags::from_bits_truncate(be16(self.buffer.as_ref(), at::OFFSET_FLAGS))
    }

    /// Receive window, not scaled.
    pub fn window(&self) -> u16 {
        be16(self.buffer.as_ref(), at::WINDOW)
    }

    /// The checksum field.
    pub fn checksum(&self) -> u16 {
        be16(self.buffer.as_ref(), at::CHECKSUM)
    }

    /// Where urgent data ends, counted from the sequence number.
    pub fn urgent(&self) -> u16 {
        be16(self.buffer.as_ref(), at::URGENT)
    }

    /// The options, padding left out.
    pub fn options(&self) -> Options<'_> {
        Options {
            octets: &self.buffer.as_ref()[HEADER_LEN..self.header_len()],
        }
    }

    /// The payload.
    pub fn payload(&self) -> &[u8] {
        &self.buffer.as_ref()[self.header_len()..]
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

    /// Computes the checksum anew, for these addresses.
    pub fn fill_checksum(&mut self, source: IpAddr, destination: IpAddr) {
        self.set_checksum(0);
        let octets = self.buffer.as_ref();
        let pseudo = Sum::pseudo(source, destination, protocol::TCP, octets.len() as u32);
        let sum = pseudo.plus(Sum::of(octets)).checksum();
        self.set_checksum(sum);
    }
}

fn header_len(octets: &[u8]) -> usize {
    usize::from(octets[at::OFFSET_FLAGS] >> 4) * 4
}

/// The options of a header, one by one; ends after the first malformed one.
#[derive(Clone, Debug)]
pub struct Options<'a> {
    octets: &'a [u8],
}

/// One option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TcpOption<'a> {
    /// Largest segment the sender takes, in octets (RFC 9293 §3.7.1).
    MaxSegmentSize(u16),
    /// Shift of the window field (RFC 7323 §2).
    WindowScale(u8),
    /// Selective acknowledgments are welcome (RFC 2018 §2).
    SackPermitted,
    /// Timestamps (RFC 7323 §3).
    Timestamps {
        /// The sender's clock.
        value: u32,
        /// The receiver's clock, echoed.
        echo: u32,
    },
    /// Any other, or one of those above with a length that is not theirs.
    Other {
        /// Kind octet.
        kind: u8,
        /// What follows kind and length.
        data: &'a [u8],
    },
}

impl<'a> Iterator for Options<'a> {
    type Item = Result<TcpOption<'a>, Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        let padding = self.octets.iter().take_while(|&&kind| kind == 1).count();
        let rest = &self.octets[padding..];
        self.octets = &[];
        let (&kind, behind) = rest.split_first().filter(|&(&kind, _)| kind != 0)?;
        let Some(&len) = behind.first() else {
            return Some(Err(
                Malformed::at_least(Layer::Tcp, "option length", 2, 1).unwrap_err()
            ));
        };
        if len < 2 {
            return Some(Err(Malformed::invalid(
                Layer::Tcp,
                "option length",
                u32::from(len),
                "2 or more",
            )));
        }
        let len = usize::from(len);
        if let Err(short) = Malformed::at_least(Layer::Tcp, "option length", len, rest.len()) {
            return Some(Err(short));
        }
        self.octets = &rest[len..];
        Some(Ok(decode(kind, &rest[2..len])))
    }
}

fn decode(kind: u8, data: &[u8]) -> TcpOption<'_> {
    match (kind, data.len()) {
        (2, 2) => TcpOption::MaxSegmentSize(u16::from_be_bytes(array(data, 0))),
        (3, 1) => TcpOption::WindowScale(data[0]),
        (4, 0) => TcpOption::SackPermitted,
        (8, 8) => TcpOption::Timestamps {
            value: be32(data, 0),
            echo: be32(data, 4),
        },
        _ => TcpOption::Other { kind, data },
    }
}

/// A header to be emitted, without options.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Repr {
    /// Source port.
    pub source: u16,
    /// Destination port.
    pub destination: u16,
    /// Number of the first octet.
    pub sequence: u32,
    /// Number of the octet that is expected next.
    pub acknowledgment: u32,
    /// Control bits.
    pub flags: Flags,
    /// Receive window, not scaled.
    pub window: u16,
}

impl Repr {
    /// The header's octets, with a checksum of 0 for the caller to finish.
    pub fn emit(&self) -> [u8; HEADER_LEN] {
        let mut header = [0; HEADER_LEN];
        put16(&mut header, at::SOURCE, self.source);
        put16(&mut header, at::DESTINATION, self.destination);
        put32(&mut header, at::SEQUENCE, self.sequence);
        put32(&mut header, at::ACKNOWLEDGMENT, self.acknowledgment);
        put16(&mut header, at::OFFSET_FLAGS, 5 << 12 | self.flags.bits());
        put16(&mut header, at::WINDOW, self.window);
        header
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPR: Repr = Repr {
        source: 40000,
        destination: 80,
        sequence: 0x1234_5678,
        acknowledgment: 0x9abc_def0,
        flags: Flags::ACK.union(Flags::PSH).union(Flags::AE),
        window: 501,
    };

    fn with_options(options: &[u8]) -> Vec<u8> {
        let mut octets = [&REPR.emit()[..], options, b"data"].concat();
        octets[12] = (((20 + options.len()) / 4) << 4) as u8 | octets[12] & 1;
        octets
    }

    #[test]
    fn fields_are_read_as_emitted() {
        let octets = with_options(&[]);
        let packet = Packet::new(&octets).expect("valid");
        let read = Repr {
            source: packet.source(),
            destination: packet.destination(),
            sequence: packet.sequence(),
            acknowledgment: packet.acknowledgment(),
            flags: packet.flags(),
            window: packet.window(),
        };
        assert_eq!(read, REPR);
        assert_eq!((packet.payload(), packet.urgent()), (&b"data"[..], 0));
    }

    #[test]
    fn the_options_of_a_usual_syn_are_decoded() {
        let options = [2, 4, 5, 0xb4, 4, 2, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2, 1, 3, 3, 7];
        let octets = with_options(&options);
        let packet = Packet::new(&octets).expect("valid");
        let options: Vec<_> = packet.options().map(Result::unwrap).collect();
        let wanted = [
            TcpOption::MaxSegmentSize(1460),
            TcpOption::SackPermitted,
            TcpOption::Timestamps { value: 1, echo: 2 },
            TcpOption::WindowScale(7),
        ];
        assert_eq!(options, wanted);
    }

    #[test]
    fn broken_options_end_the_list() {
        for broken in [[5, 0, 0, 0], [5, 1, 0, 0], [5, 9, 0, 0], [1, 1, 1, 5]] {
            let octets = with_options(&broken);
            let packet = Packet::new(&octets).expect("valid");
            let options: Vec<_> = packet.options().collect();
            assert_eq!(options.len(), 1);
            assert_eq!(options[0].unwrap_err().field, "option length");
        }
        let octets = with_options(&[3, 4, 0, 0]);
        let packet = Packet::new(&octets).expect("valid");
        let options: Vec<_> = packet.options().map(Result::unwrap).collect();
        assert_eq!(
            options,
            [TcpOption::Other {
                kind: 3,
                data: &[0, 0]
            }]
        );
    }

    #[test]
    fn short_headers_are_refused_by_name() {
        let octets = with_options(&[1; 12]);
        for len in 0..32 {
            assert!(
                Packet::new(&octets[..len]).unwrap_err().is_truncated(),
                "at {len}"
            );
        }
        let mut low = octets;
        low[12] = 0x40;
        assert_eq!(Packet::new(&low).unwrap_err().field, "data offset");
    }
}
