//! The PROXY protocol, versions 1 and 2: a header before a connection's own octets that says whose connection it is.
//!
//! ```text
//! client ─► balancer ─ header, octets ─► inbound (takes the header off) ─► chain ─► … ─► outbound (puts one on) ─► endpoint
//! ```
//! Version 1 is a line, `PROXY TCP4 SOURCE DESTINATION SPORT DPORT\r\n`, of at most 107 octets. Version 2 is 12 octets of signature, version
//! and command, family and transport, a length, addresses, and values by type (TLVs). The codec is this module's own: of the crates there
//! are, those that are kept up read a header that is whole and there, and neither tells "not a header" from "not yet" at each octet nor
//! bounds it, which is all there is to it besides two addresses.
//!
//! A header says what its sender claims. Who a local pod is never comes from it.

use std::fmt;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

pub mod fuzz;
pub mod inbound;
pub mod outbound;

pub use inbound::Inbound;
pub use outbound::Outbound;

/// How a header of version 2 begins.
const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";

/// How one of version 1 does.
const WORD: &[u8; 6] = b"PROXY ";

/// The longest header of version 1, octets, its line end included.
const LONGEST_LINE: usize = 107;

/// The longest header of version 2 that is read, octets. The format has room for 65,551.
pub const LONGEST: usize = 16 * 1024;

/// Signature, version and command, family and transport, length.
const FIXED: usize = 16;

/// The version of a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// A line of text.
    V1,
    /// Binary.
    V2,
}

/// The two ends of the connection that a header speaks of, both of one family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ends {
    /// Who connected.
    pub source: SocketAddr,
    /// To where.
    pub destination: SocketAddr,
}

/// A header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header<'a> {
    /// Its version.
    pub version: Version,
    /// Whose connection it is; `None` for the sender's own (LOCAL, UNKNOWN).
    pub ends: Option<Ends>,
    /// Its TLVs as they came, well formed.
    pub tlvs: &'a [u8],
    /// Its length, octets.
    pub length: usize,
}

/// What a connection begins with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Begin<'a> {
    /// What may become a header.
    Incomplete,
    /// What is none.
    Other,
    /// A header.
    Header(Header<'a>),
    /// What begins as a header of this version and is none.
    Malformed(Version, Fault),
}

/// What is wrong with a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// No line end within 107 octets, or more than [`LONGEST`].
    TooLong,
    /// A word of the line, or its number of words.
    Line,
    /// An address, or a port.
    Address,
    /// Neither version 2 nor a command, family or transport of TCP connections.
    Unsupported,
    /// Lengths that contradict each other.
    Length,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TooLong => "too long",
            Self::Line => "a word of the line is wrong",
            Self::Address => "an address is no unicast address of its family",
            Self::Unsupported => "version, command, family or transport is not supported",
            Self::Length => "the length does not fit what is in it",
        })
    }
}

/// Reads what a connection begins with. The octets are looked at, and the answer is the same however they are cut.
pub fn read(wire: &[u8]) -> Begin<'_> {
    let begins = |with: &[u8]| wire.iter().zip(with).all(|(a, b)| a == b);
    if begins(SIGNATURE) {
        if wire.len() < FIXED {
            return Begin::Incomplete;
        }
        return version_2(wire).unwrap_or_else(|fault| Begin::Malformed(Version::V2, fault));
    }
    if begins(WORD) {
        return version_1(wire).unwrap_or_else(|fault| Begin::Malformed(Version::V1, fault));
    }
    Begin::Other
}

fn version_1(wire: &[u8]) -> Result<Begin<'_>, Fault> {
    let line = &wire[..wire.len().min(LONGEST_LINE)];
    let Some(end) = memchr::memmem::find(line, b"\r\n") else {
        return if line.len() == LONGEST_LINE {
            Err(Fault::TooLong)
        } else {
            Ok(Begin::Incomplete)
        };
    };
    let ends = match line.get(WORD.len()..end) {
        None => return Err(Fault::Line),
        // What else the line says is of no use to anybody.
        Some(rest) if rest == b"UNKNOWN" || rest.starts_with(b"UNKNOWN ") => None,
        Some(rest) => Some(named(std::str::from_utf8(rest).map_err(|_| Fault::Line)?)?),
    };
    Ok(Begin::Header(Header {
        version: Version::V1,
        ends,
        tlvs: &[],
        length: end + 2,
    }))
}

/// `TCP4 192.0.2.1 192.0.2.2 1000 80`
fn named(line: &str) -> Result<Ends, Fault> {
    let words: Vec<&str> = line.split(' ').collect();
    let [family, source, destination, from, to] = words[..] else {
        return Err(Fault::Line);
    };
    let ip = |text: &str| -> Result<IpAddr, Fault> {
        match family {
            "TCP4" => text.parse().map(IpAddr::V4).map_err(|_| Fault::Address),
            "TCP6" => text.parse().map(IpAddr::V6).map_err(|_| Fault::Address),
            _ => Err(Fault::Line),
        }
    };
    let port = |text: &str| -> Result<u16, Fault> {
        if text.is_empty() || text.len() > 5 || !text.bytes().all(|b| b.is_ascii_digit()) {
            return Err(Fault::Address);
        }
        text.parse().map_err(|_| Fault::Address)
    };
    unicast(Ends {
        source: SocketAddr::new(ip(source)?, port(from)?),
        destination: SocketAddr::new(ip(destination)?, port(to)?),
    })
}

fn version_2(wire: &[u8]) -> Result<Begin<'_>, Fault> {
    let (command, family) = (wire[12], wire[13]);
    let length = usize::from(u16::from_be_bytes([wire[14], wire[15]]));
    let local = match command {
        0x20 => true,
        0x21 => false,
        _ => return Err(Fault::Unsupported),
    };
    // Family in the upper half, transport in the lower: TCP over IPv4, over IPv6.
    let addresses = match family {
        _ if local => 0,
        0x11 => 12,
        0x21 => 36,
        _ => return Err(Fault::Unsupported),
    };
    if length < addresses {
        return Err(Fault::Length);
    }
    if FIXED + length > LONGEST {
        return Err(Fault::TooLong);
    }
    let Some(rest) = wire.get(FIXED..FIXED + length) else {
        return Ok(Begin::Incomplete);
    };
    let (addresses, tlvs) = rest.split_at(addresses);
    let ends = match addresses.len() {
        12 => Some(unicast(ends::<4>(addresses))?),
        36 => Some(unicast(ends::<16>(addresses))?),
        _ => None,
    };
    // What a sender says of its own connection is skipped unread.
    let tlvs = if local { &[] } else { tlvs };
    let mut left = tlvs;
    while !left.is_empty() {
        (_, left) = next(left).ok_or(Fault::Length)?;
    }
    Ok(Begin::Header(Header {
        version: Version::V2,
        ends,
        tlvs,
        length: FIXED + length,
    }))
}

/// Addresses of `N` octets, then ports.
fn ends<const N: usize>(wire: &[u8]) -> Ends {
    let ip = |octets: &[u8]| -> IpAddr {
        match (<[u8; 4]>::try_from(octets), <[u8; 16]>::try_from(octets)) {
            (Ok(v4), _) => Ipv4Addr::from(v4).into(),
            (_, Ok(v6)) => Ipv6Addr::from(v6).into(),
            _ => unreachable!("an address has 4 or 16 octets"),
        }
    };
    let port = |at: usize| u16::from_be_bytes([wire[at], wire[at + 1]]);
    Ends {
        source: SocketAddr::new(ip(&wire[..N]), port(2 * N)),
        destination: SocketAddr::new(ip(&wire[N..2 * N]), port(2 * N + 2)),
    }
}

/// Only these can be the ends of a TCP connection.
fn unicast(ends: Ends) -> Result<Ends, Fault> {
    let good = |ip: IpAddr| {
        let broadcast = matches!(ip, IpAddr::V4(ip) if ip.is_broadcast());
        !ip.is_unspecified() && !ip.is_multicast() && !broadcast
    };
    if good(ends.source.ip()) && good(ends.destination.ip()) {
        Ok(ends)
    } else {
        Err(Fault::Address)
    }
}

/// A TLV as it stands there, its type first, and what follows it.
fn next(tlvs: &[u8]) -> Option<(&[u8], &[u8])> {
    let length = usize::from(u16::from_be_bytes([*tlvs.get(1)?, *tlvs.get(2)?]));
    tlvs.split_at_checked(3 + length)
}

/// The TLVs whose type `wanted` names.
fn chosen(mut tlvs: &[u8], wanted: impl Fn(u8) -> bool) -> Vec<u8> {
    let mut kept = Vec::new();
    while let Some((tlv, rest)) = next(tlvs) {
        if wanted(tlv[0]) {
            kept.extend_from_slice(tlv);
        }
        tlvs = rest;
    }
    kept
}

impl Ends {
    /// Both in one family: where they are not, both as IPv6 writes them.
    fn alike(self) -> Self {
        if self.source.is_ipv4() == self.destination.is_ipv4() {
            return self;
        }
        let mapped = |address: SocketAddr| match address.ip() {
            IpAddr::V4(ip) => SocketAddr::new(ip.to_ipv6_mapped().into(), address.port()),
            IpAddr::V6(_) => address,
        };
        Self {
            source: mapped(self.source),
            destination: mapped(self.destination),
        }
    }

    /// As a header of version 1.
    pub fn line(self) -> Vec<u8> {
        let Self { source, destination } = self.alike();
        let family = if source.is_ipv4() { "TCP4" } else { "TCP6" };
        let mut line = Vec::with_capacity(LONGEST_LINE);
        // Writing to memory does not fail.
        let _ = write!(
            line,
            "PROXY {family} {} {} {} {}\r\n",
            source.ip(),
            destination.ip(),
            source.port(),
            destination.port()
        );
        line
    }

    /// As a header of version 2 with `tlvs`. Those that do not fit into it are left out as a whole.
    pub fn binary(self, tlvs: &[u8]) -> Vec<u8> {
        let Self { source, destination } = self.alike();
        let mut body = Vec::with_capacity(36 + tlvs.len());
        for address in [source, destination] {
            match address.ip() {
                IpAddr::V4(ip) => body.extend_from_slice(&ip.octets()),
                IpAddr::V6(ip) => body.extend_from_slice(&ip.octets()),
            }
        }
        for address in [source, destination] {
            body.extend_from_slice(&address.port().to_be_bytes());
        }
        let family = if source.is_ipv4() { 0x11 } else { 0x21 };
        let length = match u16::try_from(body.len() + tlvs.len()) {
            Ok(length) => {
                body.extend_from_slice(tlvs);
                length
            }
            // Addresses alone take 36 octets at most.
            Err(_) => body.len() as u16,
        };
        let mut header = SIGNATURE.to_vec();
        header.extend_from_slice(&[0x21, family]);
        header.extend_from_slice(&length.to_be_bytes());
        header.extend_from_slice(&body);
        header
    }
}

/// The header of version 2 that says "this connection is my own".
pub(crate) fn local() -> Vec<u8> {
    [SIGNATURE.as_slice(), &[0x20, 0, 0, 0]].concat()
}

/// Which TLVs are kept.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Passed {
    /// None.
    #[default]
    None,
    /// All.
    All,
    /// Those of these types.
    Types(Vec<u8>),
}

impl Passed {
    pub(crate) fn has(&self, kind: u8) -> bool {
        match self {
            Self::None => false,
            Self::All => true,
            Self::Types(types) => types.contains(&kind),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const V4: &[u8] = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xc0\0\x02\x01\xc0\0\x02\x02\x03\xe8\0\x50";

    fn four() -> Ends {
        Ends {
            source: "192.0.2.1:1000".parse().unwrap(),
            destination: "192.0.2.2:80".parse().unwrap(),
        }
    }

    fn ends_of(wire: &[u8]) -> Option<Ends> {
        match read(wire) {
            Begin::Header(header) => header.ends,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn both_versions_name_both_ends() {
        assert_eq!(
            ends_of(b"PROXY TCP4 192.0.2.1 192.0.2.2 1000 80\r\nGET"),
            Some(four())
        );
        assert_eq!(ends_of(V4), Some(four()));
        let six = Ends {
            source: "[2001:db8::1]:1".parse().unwrap(),
            destination: "[::1]:65535".parse().unwrap(),
        };
        assert_eq!(ends_of(&six.line()), Some(six));
        assert_eq!(ends_of(&six.binary(b"\xe0\0\x01x")), Some(six));
        assert_eq!(four().binary(&[]), V4);
    }

    #[test]
    fn a_senders_own_connection_has_no_ends() {
        for wire in [
            &b"PROXY UNKNOWN\r\n"[..],
            b"PROXY UNKNOWN ff::1 whatever\r\n",
            b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0",
            b"\r\n\r\n\0\r\nQUIT\n\x20\x11\0\x01\xff",
        ] {
            let Begin::Header(header) = read(wire) else {
                panic!("{wire:?}");
            };
            assert_eq!(
                (header.ends, header.length, header.tlvs),
                (None, wire.len(), &[][..])
            );
        }
        assert!(matches!(read(&local()), Begin::Header(header) if header.length == 16));
    }

    #[test]
    fn what_is_malformed_is_refused() {
        for (line, fault) in [
            ("PROXY TCP4 192.0.2.1 192.0.2.2 1000\r\n", Fault::Line),
            ("PROXY TCP4 192.0.2.1 192.0.2.2 1000 80 9\r\n", Fault::Line),
            ("PROXY  TCP4 192.0.2.1 192.0.2.2 1000 80\r\n", Fault::Line),
            ("PROXY TCP5 192.0.2.1 192.0.2.2 1000 80\r\n", Fault::Line),
            ("PROXY \r\n", Fault::Line),
            ("PROXY UNKNOWNS\r\n", Fault::Line),
            ("PROXY TCP6 192.0.2.1 ::1 1000 80\r\n", Fault::Address),
            ("PROXY TCP4 192.0.2.01 192.0.2.2 1000 80\r\n", Fault::Address),
            ("PROXY TCP4 192.0.2.1 192.0.2.2 +1000 80\r\n", Fault::Address),
            ("PROXY TCP4 192.0.2.1 192.0.2.2 65536 80\r\n", Fault::Address),
            ("PROXY TCP4 0.0.0.0 192.0.2.2 1 80\r\n", Fault::Address),
            ("PROXY TCP4 192.0.2.1 255.255.255.255 1 80\r\n", Fault::Address),
            ("PROXY TCP6 ff02::1 ::1 1 80\r\n", Fault::Address),
        ] {
            assert_eq!(
                read(line.as_bytes()),
                Begin::Malformed(Version::V1, fault),
                "{line}"
            );
        }
        let long = format!("PROXY UNKNOWN {}\r\n", "x".repeat(92));
        assert_eq!(long.len(), 108);
        assert_eq!(
            read(long.as_bytes()),
            Begin::Malformed(Version::V1, Fault::TooLong)
        );
        for (at, octet, fault) in [
            (12, 0x11, Fault::Unsupported),
            (12, 0x22, Fault::Unsupported),
            (13, 0x00, Fault::Unsupported),
            (13, 0x12, Fault::Unsupported),
            (13, 0x31, Fault::Unsupported),
            (13, 0x21, Fault::Length),
            (15, 0x0b, Fault::Length),
            (14, 0x40, Fault::TooLong),
            (16, 0xe0, Fault::Address),
        ] {
            let mut wire = V4.to_vec();
            wire[at] = octet;
            assert_eq!(read(&wire), Begin::Malformed(Version::V2, fault), "{at}: {octet}");
        }
        for tlv in [&b"\xe0"[..], b"\xe0\0", b"\xe0\0\x02x"] {
            let wire = four().binary(tlv);
            assert_eq!(
                read(&wire),
                Begin::Malformed(Version::V2, Fault::Length),
                "{tlv:?}"
            );
        }
    }

    #[test]
    fn something_else_is_known_by_its_first_octet_that_differs() {
        assert_eq!(read(b""), Begin::Incomplete);
        assert_eq!(read(b"PRO"), Begin::Incomplete);
        for other in [
            &b"GET"[..],
            b"PROXy",
            b"PRI * HTTP/2.0",
            b"\r\n\r\nx",
            b"\x16\x03",
        ] {
            assert_eq!(read(other), Begin::Other, "{other:?}");
        }
    }

    #[test]
    fn tlvs_are_chosen_by_type() {
        let tlvs = b"\xe0\0\x01a\xe1\0\0\xe0\0\x02bc";
        assert_eq!(chosen(tlvs, |t| t == 0xe0), b"\xe0\0\x01a\xe0\0\x02bc");
        assert_eq!(chosen(tlvs, |_| false), b"");
        assert_eq!(four().binary(&[0; 65_524]), V4);
    }

    proptest! {
        /// What is written is read, and before it is whole it is incomplete.
        #[test]
        fn written_headers_are_read(
            source: IpAddr, destination: IpAddr, ports: (u16, u16), values: Vec<(u8, Vec<u8>)>
        ) {
            let ends = Ends {
                source: SocketAddr::new(source, ports.0),
                destination: SocketAddr::new(destination, ports.1),
            };
            let alike = ends.alike();
            prop_assume!(unicast(alike).is_ok());
            let mut tlvs = Vec::new();
            for (kind, value) in values {
                tlvs.push(kind);
                tlvs.extend_from_slice(&u16::try_from(value.len()).unwrap().to_be_bytes());
                tlvs.extend(value);
            }
            for (wire, version, tlvs) in
                [(ends.line(), Version::V1, &[][..]), (ends.binary(&tlvs), Version::V2, &tlvs)]
            {
                let length = wire.len();
                let wanted = Header { version, ends: Some(alike), tlvs, length };
                prop_assert_eq!(read(&wire), Begin::Header(wanted.clone()));
                let more = [&*wire, b"more"].concat();
                prop_assert_eq!(read(&more), Begin::Header(wanted));
                for cut in 0..length {
                    prop_assert_eq!(read(&wire[..cut]), Begin::Incomplete);
                }
            }
        }
    }
}
