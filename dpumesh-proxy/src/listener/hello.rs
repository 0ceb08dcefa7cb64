//! The ClientHello (RFC 8446 §4.1.2), as far as a filter chain is chosen by it: server name and application protocols.
//!
//! It may be spread over several records. Nothing is verified beyond what is needed to find these two; TLS itself refuses what is
//! wrong with the rest.

/// The longest ClientHello looked at, octets on the wire.
pub const LONGEST: usize = 16 * 1024 + 64;

/// What the first octets of a connection are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Parsed {
    /// A whole ClientHello.
    Hello(Hello),
    /// The beginning of one, perhaps.
    Incomplete,
    /// No TLS.
    NotTls,
}

/// What a ClientHello says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hello {
    /// SNI, in lower case.
    pub server_name: Option<String>,
    /// ALPN, in the client's order. Protocols that are no UTF-8 are left out.
    pub protocols: Vec<String>,
}

/// Reads the first octets of a connection.
pub fn parse(wire: &[u8]) -> Parsed {
    let mut message = Vec::new();
    let mut rest = wire;
    let mut wanted = 4;
    loop {
        let [kind, major, tail @ ..] = rest else {
            return if rest.first().is_none_or(|kind| *kind == 22) {
                Parsed::Incomplete
            } else {
                Parsed::NotTls
            };
        };
        if *kind != 22 || *major != 3 {
            return Parsed::NotTls;
        }
        let [_, high, low, tail @ ..] = tail else {
            return Parsed::Incomplete;
        };
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        if length == 0 || length > 16 * 1024 {
            return Parsed::NotTls;
        }
        message.extend_from_slice(&tail[..length.min(tail.len())]);
        if message.first().is_some_and(|kind| *kind != 1) {
            return Parsed::NotTls;
        }
        if let [_, a, b, c, ..] = message.as_slice() {
            wanted = 4 + usize::from(*a) * 65536 + usize::from(*b) * 256 + usize::from(*c);
            if wanted > LONGEST {
                return Parsed::NotTls;
            }
        }
        if message.len() >= wanted && wanted > 4 {
            return client_hello(&message[4..wanted]).map_or(Parsed::NotTls, Parsed::Hello);
        }
        if tail.len() < length {
            return Parsed::Incomplete;
        }
        rest = &tail[length..];
    }
}

/// Reads along a message; `None` where it is too short.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(n)?;
        self.0 = rest;
        Some(taken)
    }

    fn number(&mut self, octets: usize) -> Option<usize> {
        Some(
            self.take(octets)?
                .iter()
                .fold(0, |n, octet| n << 8 | usize::from(*octet)),
        )
    }

    /// A vector with its length before it.
    fn vector(&mut self, octets: usize) -> Option<Self> {
        let length = self.number(octets)?;
        self.take(length).map(Reader)
    }
}

fn client_hello(body: &[u8]) -> Option<Hello> {
    let mut reader = Reader(body);
    reader.take(2 + 32)?;
    reader.vector(1)?;
    reader.vector(2)?;
    reader.vector(1)?;
    let mut hello = Hello::default();
    if reader.0.is_empty() {
        return Some(hello);
    }
    let mut extensions = reader.vector(2)?;
    while !extensions.0.is_empty() {
        let kind = extensions.number(2)?;
        let mut content = extensions.vector(2)?;
        match kind {
            0 => hello.server_name = server_name(content.vector(2)?)?,
            16 => hello.protocols = protocols(content.vector(2)?)?,
            _ => {}
        }
    }
    Some(hello)
}

fn server_name(mut names: Reader<'_>) -> Option<Option<String>> {
    while !names.0.is_empty() {
        let kind = names.number(1)?;
        let name = names.vector(2)?;
        if kind == 0 {
            let name = std::str::from_utf8(name.0).ok();
            return Some(name.filter(|n| !n.is_empty()).map(str::to_ascii_lowercase));
        }
    }
    Some(None)
}

fn protocols(mut list: Reader<'_>) -> Option<Vec<String>> {
    let mut protocols = Vec::new();
    while !list.0.is_empty() {
        if let Ok(protocol) = std::str::from_utf8(list.vector(1)?.0) {
            protocols.push(protocol.to_owned());
        }
    }
    Some(protocols)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::sync::Arc;

    /// What rustls sends first.
    pub(crate) fn wire(name: &str, protocols: &[&str]) -> Vec<u8> {
        let roots = rustls::RootCertStore::empty();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = protocols.iter().map(|p| p.as_bytes().to_vec()).collect();
        let name = rustls::pki_types::ServerName::try_from(name.to_owned()).unwrap();
        let mut client = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
        let mut wire = Vec::new();
        client.write_tls(&mut wire).unwrap();
        wire
    }

    const NAME: &str = "outbound_.8080_._.reviews.shop.svc.cluster.local";

    fn hello() -> Hello {
        Hello {
            server_name: Some(NAME.to_owned()),
            protocols: vec!["istio-http/1.1".into(), "istio".into()],
        }
    }

    #[test]
    fn a_hello_is_read_at_its_whole_length_only() {
        let wire = wire(NAME, &["istio-http/1.1", "istio"]);
        for length in 0..wire.len() {
            assert_eq!(parse(&wire[..length]), Parsed::Incomplete, "{length}");
        }
        assert_eq!(parse(&wire), Parsed::Hello(hello()));
        assert_eq!(
            parse(&[wire.as_slice(), b"more"].concat()),
            Parsed::Hello(hello())
        );
    }

    #[test]
    fn a_hello_in_small_records_is_the_same() {
        let whole = wire(NAME, &["istio-http/1.1", "istio"]);
        let mut cut = Vec::new();
        for piece in whole[5..].chunks(7) {
            cut.extend_from_slice(&[22, 3, 1, 0, u8::try_from(piece.len()).unwrap()]);
            cut.extend_from_slice(piece);
        }
        for length in 0..cut.len() {
            assert_eq!(parse(&cut[..length]), Parsed::Incomplete, "{length}");
        }
        assert_eq!(parse(&cut), Parsed::Hello(hello()));
    }

    #[test]
    fn other_first_octets_are_no_tls() {
        for wire in [
            b"GET / HTTP/1.1\r\n".as_slice(),
            b"\x16\x02\x00",
            b"\x16\x03\x01\x00\x00",
            b"\x16\x03\x01\x00\x01\x02",
            b"\x16\x03\x01\x00\x04\x01\xff\xff\xff",
            b"\x17\x03\x03\x00\x01\x00",
        ] {
            assert_eq!(parse(wire), Parsed::NotTls, "{wire:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn changed_hellos_never_panic(at in 0..300usize, octet: u8, cut in 0..600usize) {
            let mut wire = wire(NAME, &["h2"]);
            let at = at % wire.len();
            wire[at] = octet;
            let _ = parse(&wire[..cut.min(wire.len())]);
        }
    }
}
