//! ICMPv6 (RFC 4443) with neighbour discovery (RFC 4861): `type 1 | code 1 | checksum 2 | body`, the bodies of
//! neighbour discovery ending in options `type 1 | length 1 (in 8 octets) | data`.

use std::net::{IpAddr, Ipv6Addr};

use dpumesh_core::MacAddr;

use super::checksum::Sum;
use super::field::{array, be16, be32, put, put16, put32};
use super::malformed::{Layer, Malformed};
use super::protocol;

/// A view of a message.
#[derive(Clone, Copy, Debug)]
pub struct Packet<T: AsRef<[u8]>> {
    buffer: T,
}

/// Octets of the shortest message.
pub const HEADER_LEN: usize = 8;

pub(super) mod at {
    pub(in super::super) const TYPE: usize = 0;
    pub(in super::super) const CODE: usize = 1;
    pub(in super::super) const CHECKSUM: usize = 2;
    pub(in super::super) const BODY: usize = 4;
    pub(in super::super) const TARGET: usize = 8;
}

/// What a message says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// Type 1.
    Unreachable {
        /// Why (RFC 4443 §3.1).
        code: u8,
    },
    /// Type 2.
    PacketTooBig {
        /// Largest packet that the link takes, in octets.
        mtu: u32,
    },
    /// Type 3.
    TimeExceeded {
        /// 0: hops, 1: reassembly.
        code: u8,
    },
    /// Type 4.
    ParameterProblem {
        /// What kind of problem (RFC 4443 §3.4).
        code: u8,
        /// Octet of the packet where it was found.
        pointer: u32,
    },
    /// Type 128.
    EchoRequest {
        /// Identifier of the asking program.
        id: u16,
        /// Number of the request.
        sequence: u16,
    },
    /// Type 129.
    EchoReply {
        /// Identifier of the asking program.
        id: u16,
        /// Number of the request.
        sequence: u16,
    },
    /// Type 133.
    RouterSolicitation,
    /// Type 134.
    RouterAdvertisement {
        /// Hop limit for hosts to use; 0: unspecified.
        hop_limit: u8,
        /// Addresses come from DHCPv6.
        managed: bool,
        /// Other configuration comes from DHCPv6.
        other: bool,
        /// Seconds for which the sender is a default router; 0: it is none.
        lifetime: u16,
        /// Milliseconds for which a neighbour stays reachable; 0: unspecified.
        reachable: u32,
        /// Milliseconds between solicitations; 0: unspecified.
        retransmit: u32,
    },
    /// Type 135.
    NeighborSolicitation {
        /// Address asked for.
        target: Ipv6Addr,
    },
    /// Type 136.
    NeighborAdvertisement {
        /// The sender is a router.
        router: bool,
        /// The message answers a solicitation.
        solicited: bool,
        /// The message overrides what is known.
        overriding: bool,
        /// Address that the sender has.
        target: Ipv6Addr,
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
    /// A view of `buffer`. The checksum is not looked at: see [`Packet::verify_checksum`]; the hop limit of 255 that
    /// neighbour discovery asks for is the IPv6 header's ([`super::answer`] looks at it).
    ///
    /// # Errors
    /// Fewer octets than the message's type needs; neighbour discovery with a code, with a multicast target or with
    /// options that are cut off or have length 0 (RFC 4861 §6.1, §7.1).
    pub fn new(buffer: T) -> Result<Self, Malformed> {
        let octets = buffer.as_ref();
        Malformed::at_least(Layer::Icmpv6, "header", HEADER_LEN, octets.len())?;
        if let Some(body) = discovery_len(octets[at::TYPE]) {
            Malformed::at_least(Layer::Icmpv6, "body", body, octets.len())?;
            check_discovery(octets, body)?;
        }
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
        let code = self.code();
        match self.kind() {
            1 => Message::Unreachable { code },
            2 => Message::PacketTooBig {
                mtu: be32(octets, at::BODY),
            },
            3 => Message::TimeExceeded { code },
            4 => Message::ParameterProblem {
                code,
                pointer: be32(octets, at::BODY),
            },
            128 if code == 0 => Message::EchoRequest {
                id: be16(octets, 4),
                sequence: be16(octets, 6),
            },
            129 if code == 0 => Message::EchoReply {
                id: be16(octets, 4),
                sequence: be16(octets, 6),
            },
            133 => Message::RouterSolicitation,
            134 => Message::RouterAdvertisement {
                hop_limit: octets[4],
                managed: octets[5] & 0x80 != 0,
                other: octets[5] & 0x40 != 0,
                lifetime: be16(octets, 6),
                reachable: be32(octets, 8),
                retransmit: be32(octets, 12),
            },
            135 => Message::NeighborSolicitation {
                target: target(octets),
            },
            136 => Message::NeighborAdvertisement {
                router: octets[4] & 0x80 != 0,
                solicited: octets[4] & 0x40 != 0,
                overriding: octets[4] & 0x20 != 0,
                target: target(octets),
            },
            kind => Message::Other { kind, code },
        }
    }

    /// The options of a neighbour discovery message; none of any other.
    pub fn options(&self) -> Options<'_> {
        let octets = self.buffer.as_ref();
        let at = discovery_len(self.kind()).unwrap_or(octets.len());
        Options {
            octets: &octets[at..],
        }
    }

    /// True for a message about another packet, which must not be answered by a message of that kind
    /// (RFC 4443 §2.4).
    pub fn is_error(&self) -> bool {
        self.kind() < 128
    }

    /// True when the checksum is right for these addresses.
    pub fn verify_checksum(&self, source: Ipv6Addr, destination: Ipv6Addr) -> bool {
        sum(self.buffer.as_ref(), source, destination).is_complete()
    }

    /// Echoed data, or the beginning of the packet that an error is about.
    pub fn data(&self) -> &[u8] {
        &self.buffer.as_ref()[HEADER_LEN..]
    }
}

impl<T: AsRef<[u8]> + AsMut<[u8]>> Packet<T> {
    /// Computes the checksum anew, for these addresses.
    pub fn fill_checksum(&mut self, source: Ipv6Addr, destination: Ipv6Addr) {
        let octets = self.buffer.as_mut();
        put16(octets, at::CHECKSUM, 0);
        let sum = sum(octets, source, destination).checksum();
        put16(octets, at::CHECKSUM, sum);
    }
}

fn sum(octets: &[u8], source: Ipv6Addr, destination: Ipv6Addr) -> Sum {
    let (source, destination) = (IpAddr::V6(source), IpAddr::V6(destination));
    Sum::pseudo(source, destination, protocol::ICMPV6, octets.len() as u32).plus(Sum::of(octets))
}

fn target(octets: &[u8]) -> Ipv6Addr {
    Ipv6Addr::from(array::<16>(octets, at::TARGET))
}

/// Octets in front of the options of a neighbour discovery message (RFC 4861 §4).
const fn discovery_len(kind: u8) -> Option<usize> {
    match kind {
        133 => Some(8),
        134 => Some(16),
        135 | 136 => Some(24),
        _ => None,
    }
}

fn check_discovery(octets: &[u8], body: usize) -> Result<(), Malformed> {
    let code = u32::from(octets[at::CODE]);
    if code != 0 {
        return Err(Malformed::invalid(
            Layer::Icmpv6,
            "code",
            code,
            "0 in neighbour discovery",
        ));
    }
    if body == 24 && target(octets).is_multicast() {
        let found = u32::from(octets[at::TARGET]);
        return Err(Malformed::invalid(
            Layer::Icmpv6,
            "target",
            found,
            "a unicast address",
        ));
    }
    Options {
        octets: &octets[body..],
    }
    .try_for_each(|option| option.map(drop))
}

/// The options of a neighbour discovery message, one by one; ends after the first malformed one. (The constructor of
/// [`Packet`] refuses a message that holds such.)
#[derive(Clone, Debug)]
pub struct Options<'a> {
    octets: &'a [u8],
}

/// One option of neighbour discovery (RFC 4861 §4.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NdOption<'a> {
    /// Type 1: the sender's MAC.
    SourceLinkLayer(MacAddr),
    /// Type 2: the target's MAC.
    TargetLinkLayer(MacAddr),
    /// Type 3: a prefix of the link.
    Prefix {
        /// Leading bits of `prefix` that count.
        len: u8,
        /// Hosts may treat the prefix as on the link.
        on_link: bool,
        /// Hosts may make addresses of it.
        autonomous: bool,
        /// Seconds for which it is on the link.
        valid: u32,
        /// Seconds for which addresses made of it are preferred.
        preferred: u32,
        /// The prefix.
        prefix: Ipv6Addr,
    },
    /// Type 5: the link's MTU in octets.
    Mtu(u32),
    /// Any other, or one of those above with a length that is not theirs.
    Other {
        /// Type octet.
        kind: u8,
        /// What follows type and length.
        data: &'a [u8],
    },
}

impl<'a> Iterator for Options<'a> {
    type Item = Result<NdOption<'a>, Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        let rest = std::mem::take(&mut self.octets);
        let &kind = rest.first()?;
        let len = usize::from(rest.get(1).copied().unwrap_or(1)) * 8;
        if len == 0 {
            return Some(Err(Malformed::invalid(
                Layer::Icmpv6,
                "option length",
                0,
                "1 or more",
            )));
        }
        if let Err(short) = Malformed::at_least(Layer::Icmpv6, "option length", len, rest.len()) {
            return Some(Err(short));
        }
        self.octets = &rest[len..];
        Some(Ok(decode(kind, &rest[2..len])))
    }
}

fn decode(kind: u8, data: &[u8]) -> NdOption<'_> {
    match (kind, data.len()) {
        (1, 6) => NdOption::SourceLinkLayer(MacAddr(array(data, 0))),
        (2, 6) => NdOption::TargetLinkLayer(MacAddr(array(data, 0))),
        (3, 30) => NdOption::Prefix {
            len: data[0],
            on_link: data[1] & 0x80 != 0,
            autonomous: data[1] & 0x40 != 0,
            valid: be32(data, 2),
            preferred: be32(data, 6),
            prefix: Ipv6Addr::from(array::<16>(data, 14)),
        },
        (5, 6) => NdOption::Mtu(be32(data, 2)),
        _ => NdOption::Other { kind, data },
    }
}

/// The octets of an 8-octet message (an error's or an echo's header), with a checksum of 0 for the caller to finish.
pub fn emit(kind: u8, code: u8, body: [u8; 4]) -> [u8; HEADER_LEN] {
    let mut header = [0; HEADER_LEN];
    header[at::TYPE] = kind;
    header[at::CODE] = code;
    put(&mut header, at::BODY, body);
    header
}

/// Octets of a solicitation or an advertisement with one link-layer address.
pub const NEIGHBOR_LEN: usize = 32;

/// A neighbour solicitation or advertisement to be emitted, with the sender's MAC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NeighborRepr {
    /// Who has `target`?
    Solicitation {
        /// Address asked for.
        target: Ipv6Addr,
        /// MAC of the one who asks.
        source_mac: MacAddr,
    },
    /// `target` is at `target_mac`; overriding what is known.
    Advertisement {
        /// The sender is a router.
        router: bool,
        /// The message answers a solicitation.
        solicited: bool,
        /// Address that the sender has.
        target: Ipv6Addr,
        /// MAC of that address.
        target_mac: MacAddr,
    },
}

impl NeighborRepr {
    /// The message's octets, with a checksum of 0 for the caller to finish.
    pub fn emit(&self) -> [u8; NEIGHBOR_LEN] {
        let (kind, flags, target, option, mac) = match *self {
            Self::Solicitation { target, source_mac } => (135, 0, target, 1, source_mac),
            Self::Advertisement {
                router,
                solicited,
                target,
                target_mac,
            } => {
                let flags = u32::from(router) << 31 | u32::from(solicited) << 30 | 1 << 29;
                (136, flags, target, 2, target_mac)
            }
        };
        let mut message = [0; NEIGHBOR_LEN];
        message[at::TYPE] = kind;
        put32(&mut message, at::BODY, flags);
        put(&mut message, at::TARGET, target.octets());
        put(&mut message, 24, [option, 1]);
        put(&mut message, 26, mac.0);
        message
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TARGET: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
    const MAC: MacAddr = MacAddr([2, 0, 0, 0, 0, 7]);

    #[test]
    fn neighbour_discovery_is_read_as_emitted() {
        let solicitation = NeighborRepr::Solicitation {
            target: TARGET,
            source_mac: MAC,
        }
        .emit();
        let packet = Packet::new(solicitation).expect("valid");
        assert_eq!(packet.message(), Message::NeighborSolicitation { target: TARGET });
        let options: Vec<_> = packet.options().map(Result::unwrap).collect();
        assert_eq!(options, [NdOption::SourceLinkLayer(MAC)]);

        let repr = NeighborRepr::Advertisement {
            router: false,
            solicited: true,
            target: TARGET,
            target_mac: MAC,
        };
        let octets = repr.emit();
        let packet = Packet::new(octets).expect("valid");
        let message = Message::NeighborAdvertisement {
            router: false,
            solicited: true,
            overriding: true,
            target: TARGET,
        };
        assert_eq!(packet.message(), message);
        let options: Vec<_> = packet.options().map(Result::unwrap).collect();
        assert_eq!(options, [NdOption::TargetLinkLayer(MAC)]);
    }

    #[test]
    fn a_router_advertisement_is_decoded_with_its_options() {
        let mut octets = vec![134, 0, 0, 0, 64, 0xc0, 7, 8, 0, 0, 0, 1, 0, 0, 0, 2];
        octets.extend([5, 1, 0, 0, 0, 0, 5, 0xdc]);
        octets.extend([3, 4, 64, 0xc0, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0, 0]);
        octets.extend(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0).octets());
        octets.extend([25, 1, 1, 2, 3, 4, 5, 6]);
        let packet = Packet::new(&octets).expect("valid");
        let message = Message::RouterAdvertisement {
            hop_limit: 64,
            managed: true,
            other: true,
            lifetime: 0x708,
            reachable: 1,
            retransmit: 2,
        };
        assert_eq!(packet.message(), message);
        let options: Vec<_> = packet.options().map(Result::unwrap).collect();
        assert_eq!(options[0], NdOption::Mtu(1500));
        let NdOption::Prefix {
            len: 64,
            on_link: true,
            autonomous: true,
            valid: 3,
            preferred: 4,
            prefix,
        } = options[1]
        else {
            panic!("{:?}", options[1])
        };
        assert_eq!(prefix.segments()[1], 0xdb8);
        assert_eq!(
            options[2],
            NdOption::Other {
                kind: 25,
                data: &[1, 2, 3, 4, 5, 6]
            }
        );
        for len in 0..octets.len() {
            // Between two options the message is complete as well.
            let whole = matches!(len, 16 | 24 | 56);
            assert_eq!(Packet::new(&octets[..len]).is_ok(), whole, "at {len}");
        }
    }

    #[test]
    fn errors_and_echoes_are_decoded() {
        let read = |kind, code, body| {
            Packet::new(emit(kind, code, body))
                .expect("long enough")
                .message()
        };
        assert_eq!(read(2, 0, [0, 0, 5, 0]), Message::PacketTooBig { mtu: 1280 });
        assert_eq!(read(1, 4, [0; 4]), Message::Unreachable { code: 4 });
        assert_eq!(read(3, 0, [0; 4]), Message::TimeExceeded { code: 0 });
        assert_eq!(
            read(4, 1, [0, 0, 0, 6]),
            Message::ParameterProblem { code: 1, pointer: 6 }
        );
        assert_eq!(
            read(128, 0, [0, 1, 0, 2]),
            Message::EchoRequest { id: 1, sequence: 2 }
        );
        assert_eq!(
            read(129, 0, [0, 1, 0, 2]),
            Message::EchoReply { id: 1, sequence: 2 }
        );
        assert_eq!(read(133, 0, [0; 4]), Message::RouterSolicitation);
        assert_eq!(read(200, 9, [0; 4]), Message::Other { kind: 200, code: 9 });
        assert!(Packet::new(emit(2, 0, [0; 4])).expect("long enough").is_error());
        assert!(!Packet::new(emit(128, 0, [0; 4])).expect("long enough").is_error());
    }

    #[test]
    fn the_checksum_covers_the_addresses() {
        let mut packet = Packet::new(emit(128, 0, [0, 1, 0, 2])).expect("long enough");
        packet.fill_checksum(TARGET, Ipv6Addr::LOCALHOST);
        assert!(packet.verify_checksum(TARGET, Ipv6Addr::LOCALHOST));
        assert!(!packet.verify_checksum(TARGET, TARGET));
    }

    #[test]
    fn broken_discovery_is_refused_by_name() {
        let valid = NeighborRepr::Solicitation {
            target: TARGET,
            source_mac: MAC,
        }
        .emit();
        let broken = |place: usize, value: u8| {
            let mut octets = valid;
            octets[place] = value;
            Packet::new(octets).unwrap_err().field
        };
        assert_eq!(broken(1, 1), "code");
        assert_eq!(broken(8, 0xff), "target");
        assert_eq!(broken(25, 0), "option length");
        assert_eq!(broken(25, 2), "option length");
        for len in 0..NEIGHBOR_LEN {
            assert_eq!(Packet::new(&valid[..len]).is_ok(), len == 24, "at {len}");
        }
    }
}
