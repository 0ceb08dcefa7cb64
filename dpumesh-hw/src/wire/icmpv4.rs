//! ICMP for IPv4 (RFC 792): `type 1 | code 1 | checksum 2 | rest of header 4 | data`.

use super::checksum::Sum;
use super::field::{be16, put16};
use super::malformed::{Layer, Malformed};

/// A view of a message.
#[derive(Clone, Copy, Debug)]
pub struct Packet<T: AsRef<[u8]>> {
    buffer: T,
}

/// Octets of the header.
pub const HEADER_LEN: usize = 8;

pub(super) mod at {
    pub(in super::super) const TYPE: usize = 0;
    pub(in super::super) const CODE: usize = 1;
    pub(in super::super) const CHECKSUM: usize = 2;
    pub(in super::super) const REST: usize = 4;
}

/// What a message says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// Type 8.
    EchoRequest {
        /// Identifier of the asking program.
        id: u16,
        /// Number of the request.
        sequence: u16,
    },
    /// Type 0.
    EchoReply {
        /// Identifier of the asking program.
        id: u16,
        /// Number of the request.
        sequence: u16,
    },
    /// Type 3, code 4: the packet is too big for a link and must not be fragmented (RFC 1191 §4).
    FragmentationNeeded {
        /// Largest packet that the link takes, in octets; 0 from routers older than RFC 1191.
        mtu: u16,
    },
    /// Type 3, other codes.
    Unreachable {
        /// Why (RFC 792, RFC 1812 §5.2.7.1).
        code: u8,
    },
    /// Type 11.
    TimeExceeded {
        /// 0: hops, 1: reassembly.
        code: u8,
    },
    /// Any other.
    Other {
        /// Type octet.
        kind: u8,
        /// Code octet.
        code: u8,
    },
}

impl<T: AsRef<[u8]>> Packet<T> {
    /// A view of `buffer`. The checksum is not looked at: see [`Packet::verify_checksum`].
    ///
    /// # Errors
    /// Fewer than 8 octets.
    pub fn new(buffer: T) -> Result<Self, Malformed> {
        Malformed::at_least(Layer::Icmpv4, "header", HEADER_LEN, buffer.as_ref().len())?;
        Ok(Self { buffer })
    }

    /// Type octet.
    pub fn kind(&self) -> u8 {
        self.buffer.as_ref()[at::TYPE]
    }

    /// Code octet.
    pub fn code(&self) -> u8 {
        self.buffer.as_ref()[at::CODE]
    }

    /// What the message says.
    pub fn message(&self) -> Message {
        let octets = self.buffer.as_ref();
        let (first, second) = (be16(octets, at::REST), be16(octets, at::REST + 2));
        match (self.kind(), self.code()) {
            (8, 0) => Message::EchoRequest {
                id: first,
                sequence: second,
            },
            (0, 0) => Message::EchoReply {
                id: first,
                sequence: second,
            },
            (3, 4) => Message::FragmentationNeeded { mtu: second },
            (3, code) => Message::Unreachable { code },
            (11, code) => Message::TimeExceeded { code },
            (kind, code) => Message::Other { kind, code },
        }
    }

    /// True for a message about another packet, which must not be answered by a message of that kind
    /// (RFC 1122 §3.2.2).
    pub fn is_error(&self) -> bool {
        matches!(self.kind(), 3 | 4 | 5 | 11 | 12)
    }

    /// True when the checksum is right.
    pub fn verify_checksum(&self) -> bool {
        Sum::of(self.buffer.as_ref()).is_complete()
    }

    /// Echoed data, or the beginning of the packet that an error is about.
    pub fn data(&self) -> &[u8] {
        &self.buffer.as_ref()[HEADER_LEN..]
    }
}

impl<T: AsRef<[u8]> + AsMut<[u8]>> Packet<T> {
    /// Rewrites the type and code octets; the checksum is the caller's.
    pub fn set_kind(&mut self, kind: u8, code: u8) {
        let octets = self.buffer.as_mut();
        octets[at::TYPE] = kind;
        octets[at::CODE] = code;
    }

    /// Computes the checksum anew.
    pub fn fill_checksum(&mut self) {
        let octets = self.buffer.as_mut();
        put16(octets, at::CHECKSUM, 0);
        let sum = Sum::of(octets).checksum();
        put16(octets, at::CHECKSUM, sum);
    }
}

impl Message {
    /// The header's octets, with a checksum of 0 for the caller to finish.
    pub fn emit(&self) -> [u8; HEADER_LEN] {
        let (kind, code, first, second) = match *self {
            Self::EchoRequest { id, sequence } => (8, 0, id, sequence),
            Self::EchoReply { id, sequence } => (0, 0, id, sequence),
            Self::FragmentationNeeded { mtu } => (3, 4, 0, mtu),
            Self::Unreachable { code } => (3, code, 0, 0),
            Self::TimeExceeded { code } => (11, code, 0, 0),
            Self::Other { kind, code } => (kind, code, 0, 0),
        };
        let mut header = [0; HEADER_LEN];
        header[at::TYPE] = kind;
        header[at::CODE] = code;
        put16(&mut header, at::REST, first);
        put16(&mut header, at::REST + 2, second);
        header
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_read_as_emitted() {
        let messages = [
            Message::EchoRequest { id: 1, sequence: 2 },
            Message::EchoReply { id: 3, sequence: 4 },
            Message::FragmentationNeeded { mtu: 1450 },
            Message::Unreachable { code: 13 },
            Message::TimeExceeded { code: 0 },
            Message::Other { kind: 13, code: 0 },
        ];
        for message in messages {
            let mut packet = Packet::new(message.emit()).expect("long enough");
            assert_eq!(packet.message(), message);
            packet.fill_checksum();
            assert!(packet.verify_checksum());
        }
    }

    #[test]
    fn a_published_echo_request_verifies() {
        let octets = [8, 0, 0xf7, 0xfc, 0, 1, 0, 2, 0, 0];
        let packet = Packet::new(octets).expect("long enough");
        assert!(packet.verify_checksum() && !packet.is_error());
        assert_eq!((packet.kind(), packet.code(), packet.data()), (8, 0, &[0, 0][..]));
    }

    #[test]
    fn errors_are_told_from_queries_and_short_messages_refused() {
        let mut packet = Packet::new([0; 8]).expect("long enough");
        for (kind, is_error) in [
            (0, false),
            (3, true),
            (5, true),
            (8, false),
            (11, true),
            (12, true),
            (13, false),
        ] {
            packet.set_kind(kind, 0);
            assert_eq!(packet.is_error(), is_error);
        }
        for len in 0..HEADER_LEN {
            assert!(Packet::new(&[0; 8][..len]).unwrap_err().is_truncated());
        }
    }
}
