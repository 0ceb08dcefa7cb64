//! `tls_inspector` and `http_inspector`: a look at a connection's first octets.
//!
//! The octets stay in the socket. A look ends when it is known what the connection is, when it ends, or when the listener's timeout
//! passes; then the chain is chosen by what is known, or the connection is closed.

use std::io;
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use nix::sys::socket::{MsgFlags, recv};
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::hello::{self, Parsed};

/// The longest request line looked at, octets.
const LONGEST_LINE: usize = 8 * 1024;

/// What a client that speaks HTTP/2 says first (RFC 9113 §3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Which connections are looked into, and for how long.
#[derive(Debug, Clone, Default)]
pub struct Inspectors {
    /// `tls_inspector`: the destination ports it looks at.
    pub tls: Option<PortRanges>,
    /// `http_inspector`: the same.
    pub http: Option<PortRanges>,
    /// `listener_filters_timeout`; `None` waits for ever.
    pub timeout: Option<Duration>,
    /// Goes on after the timeout with what is known, instead of closing.
    pub goes_on: bool,
}

/// Destination ports that an inspector leaves alone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PortRanges {
    /// `start..end` of each; `None` for ports without bound.
    pub disabled: Vec<std::ops::Range<u32>>,
}

impl PortRanges {
    fn looks_at(&self, port: u16) -> bool {
        !self.disabled.iter().any(|range| range.contains(&u32::from(port)))
    }
}

/// What carries the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Transport {
    /// `raw_buffer`.
    #[default]
    Raw,
    /// `tls`.
    Tls,
}

/// What the first octets say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    /// What carries the connection.
    pub transport: Transport,
    /// SNI; empty without one.
    pub server_name: String,
    /// Application protocols, each in `'…'`, with commas between; empty without any.
    pub protocols: String,
}

impl Seen {
    /// Whether the client offers this application protocol.
    pub fn offers(&self, protocol: &str) -> bool {
        let mut each = self.protocols.split(',');
        each.any(|p| p.strip_prefix('\'').and_then(|p| p.strip_suffix('\'')) == Some(protocol))
    }

    fn tls(hello: hello::Hello) -> Self {
        let mut protocols = String::new();
        for protocol in &hello.protocols {
            if !protocols.is_empty() {
                protocols.push(',');
            }
            protocols.extend(["'", protocol, "'"]);
        }
        Self {
            transport: Transport::Tls,
            server_name: hello.server_name.unwrap_or_default(),
            protocols,
        }
    }

    fn http(protocol: &str) -> Self {
        Self {
            protocols: format!("'{protocol}'"),
            ..Self::default()
        }
    }
}

/// Why there is no chain to choose.
#[derive(Debug)]
pub enum Blind {
    /// The client broke the connection off.
    Lost(io::Error),
    /// It said too little in time.
    TimedOut,
}

impl Inspectors {
    /// Whether connections to `port` are looked into at all.
    pub fn look_at(&self, port: u16) -> bool {
        [&self.tls, &self.http]
            .into_iter()
            .flatten()
            .any(|ranges| ranges.looks_at(port))
    }

    /// When a connection that comes now has been looked into for long enough.
    pub fn until(&self) -> Option<Instant> {
        self.timeout.map(|most| Instant::now() + most)
    }

    /// Looks into a connection to `port`, until then.
    ///
    /// # Errors
    /// As [`Blind`] says.
    pub async fn look(&self, socket: &TcpStream, port: u16, until: Option<Instant>) -> Result<Seen, Blind> {
        let on = |ranges: &Option<PortRanges>| ranges.as_ref().is_some_and(|r| r.looks_at(port));
        let (tls, http) = (on(&self.tls), on(&self.http));
        let longest = hello::LONGEST.max(LONGEST_LINE);
        let look = async {
            let seen = peek(socket, longest, |wire| judge(wire, tls, http)).await?;
            Ok(seen.unwrap_or_default())
        };
        let Some(until) = until else {
            return look.await.map_err(Blind::Lost);
        };
        match tokio::time::timeout_at(until, look).await {
            Ok(seen) => seen.map_err(Blind::Lost),
            Err(_) if self.goes_on => Ok(Seen::default()),
            Err(_) => Err(Blind::TimedOut),
        }
    }
}

/// Looks at what has come until `judge` knows what it is: `None` where it ends before that, or is `longest` octets long.
///
/// # Errors
/// The socket's.
pub(crate) async fn peek<T>(
    socket: &TcpStream,
    longest: usize,
    mut judge: impl FnMut(&[u8]) -> Option<T>,
) -> io::Result<Option<T>> {
    let mut wire = vec![0; 1024];
    let mut had = 0;
    loop {
        let ready = socket.ready(Interest::READABLE).await?;
        // Ready again only when there is more than the last time.
        let more = socket.try_io(Interest::READABLE, || {
            let length = recv(
                socket.as_raw_fd(),
                &mut wire,
                MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT,
            )?;
            if length > had || length == 0 {
                return Ok(length);
            }
            Err(io::ErrorKind::WouldBlock.into())
        });
        let length = match more {
            Ok(length) => length,
            // Peeking shows what is left, never the end behind it.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && !ready.is_read_closed() => continue,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            Err(error) => return Err(error),
        };
        let ended = length == 0;
        had = had.max(length);
        if let Some(seen) = judge(&wire[..had]) {
            return Ok(Some(seen));
        }
        if ended || had >= longest {
            return Ok(None);
        }
        if had == wire.len() {
            wire.resize(wire.len() * 4, 0);
        }
    }
}

/// What the octets are; `None` while more are needed.
fn judge(wire: &[u8], tls: bool, http: bool) -> Option<Seen> {
    if wire.is_empty() {
        return None;
    }
    if tls {
        match hello::parse(wire) {
            Parsed::Hello(hello) => return Some(Seen::tls(hello)),
            Parsed::Incomplete => return None,
            Parsed::NotTls => {}
        }
    }
    if !http {
        return Some(Seen::default());
    }
    request_line(wire).map(|protocol| protocol.map(Seen::http).unwrap_or_default())
}

/// The protocol of an HTTP client's first line: `None` while it is incomplete, then one, or that it is none.
fn request_line(wire: &[u8]) -> Option<Option<&'static str>> {
    let known = wire.len().min(PREFACE.len());
    if wire[..known] == PREFACE[..known] {
        return (known == PREFACE.len()).then_some(Some("h2c"));
    }
    let method = wire.iter().take_while(|b| crate::http1::is_token(**b)).count();
    if method == 0 || (method < wire.len() && wire[method] != b' ') || method > 64 {
        return Some(None);
    }
    let Some(end) = memchr::memchr(b'\n', wire) else {
        let odd = wire.iter().any(|b| *b < 0x20 && *b != b'\r');
        return (odd || wire.len() >= LONGEST_LINE).then_some(None);
    };
    let line = wire[..end].strip_suffix(b"\r").unwrap_or(&wire[..end]);
    if line.ends_with(b" HTTP/1.1") {
        return Some(Some("http/1.1"));
    }
    Some(line.ends_with(b" HTTP/1.0").then_some("http/1.0"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt as _;

    #[test]
    fn request_lines() {
        let line = |text: &str| request_line(text.as_bytes());
        assert_eq!(line("GET / HTTP/1.1\r\n"), Some(Some("http/1.1")));
        assert_eq!(line("GET / HTTP/1.0\r\nx"), Some(Some("http/1.0")));
        assert_eq!(line("GET / HTTP/1."), None);
        assert_eq!(line("PRI * HTTP/2.0\r\n\r\n"), None);
        assert_eq!(line("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), Some(Some("h2c")));
        for other in [
            "\x00\x01",
            " GET",
            "220 smtp\r\n",
            "GET /\r\n",
            "{\"a\":1}",
            "a\x01b",
        ] {
            assert_eq!(line(other), Some(None), "{other:?}");
        }
        assert_eq!(line(&"G".repeat(65)), Some(None));
    }

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (client, listener.accept().await.unwrap().0)
    }

    fn both() -> Inspectors {
        Inspectors {
            tls: Some(PortRanges::default()),
            http: Some(PortRanges::default()),
            timeout: Some(Duration::from_secs(10)),
            goes_on: false,
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_hello_octet_by_octet_is_seen_and_left_in_the_socket() {
        let (mut client, server) = pair().await;
        client.set_nodelay(true).unwrap();
        let wire = hello::tests::wire("a.b", &["h2", "http/1.1"]);
        let writer = wire.clone();
        let write = async move {
            for octet in writer {
                client.write_all(&[octet]).await.unwrap();
                tokio::task::yield_now().await;
            }
            client
        };
        let inspectors = both();
        let (_client, seen) = tokio::join!(write, inspectors.look(&server, 80, inspectors.until()));
        let seen = seen.unwrap();
        assert_eq!(seen.transport, Transport::Tls);
        assert_eq!((&*seen.server_name, &*seen.protocols), ("a.b", "'h2','http/1.1'"));
        let mut left = vec![0; wire.len() + 1];
        assert_eq!(server.peek(&mut left).await.unwrap(), wire.len());
    }

    #[tokio::test(flavor = "current_thread")]
    async fn an_end_or_a_timeout_ends_the_look() {
        let (mut client, server) = pair().await;
        client.write_all(b"GET").await.unwrap();
        client.shutdown().await.unwrap();
        assert_eq!(both().look(&server, 80, None).await.unwrap(), Seen::default());

        let (_client, server) = pair().await;
        let mut short = both();
        short.timeout = Some(Duration::from_millis(20));
        assert!(matches!(
            short.look(&server, 80, short.until()).await,
            Err(Blind::TimedOut)
        ));
        short.goes_on = true;
        assert_eq!(
            short.look(&server, 80, short.until()).await.unwrap(),
            Seen::default()
        );
    }

    #[test]
    fn disabled_ports_are_left_alone() {
        let mut inspectors = both();
        inspectors.http = None;
        inspectors.tls = Some(PortRanges {
            disabled: vec![0..80, 81..65536],
        });
        assert!(inspectors.look_at(80));
        assert!(!inspectors.look_at(79) && !inspectors.look_at(65535));
    }
}
