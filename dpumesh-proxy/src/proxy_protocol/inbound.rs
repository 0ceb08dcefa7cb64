//! `envoy.filters.listener.proxy_protocol`: takes the header off a connection before anything else looks at it.
//!
//! A header counts as a whole or not at all: until it is there, its octets stay in the socket.

use std::io;
use std::sync::Arc;

use tokio::io::Interest;
use tokio::net::TcpStream;

use super::{Begin, Ends, LONGEST, Passed, Version, chosen, read};
use crate::listener::inspect::peek;
use crate::stats::{ProxyProtocol as Stat, ProxyProtocolVersion as VersionStat, Scope, Shard};

/// How headers of a listener's connections are taken.
#[derive(Debug, Clone)]
pub struct Inbound {
    /// A connection without a header is served as its own (`allow_requests_without_proxy_protocol`).
    pub optional: bool,
    /// Versions that are refused (`disallowed_versions`).
    pub refused: Vec<Version>,
    /// Which TLVs are kept for endpoints that are told of the connection (`pass_through_tlvs`).
    pub kept: Passed,
    /// `proxy_proto.*`
    pub stats: Arc<Scope>,
    /// `proxy_proto.versions.v1.*`, `proxy_proto.versions.v2.*`
    pub versions: [Arc<Scope>; 2],
}

/// What a header said.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Said {
    /// Whose connection it is; `None` where it is the sender's own.
    pub ends: Option<Ends>,
    /// The TLVs that are kept; `None` for none.
    pub tlvs: Option<Arc<[u8]>>,
}

/// What is known once enough has come.
#[derive(Debug)]
enum Seen {
    Header(Version, usize, Said),
    Other,
    Malformed(Version),
}

impl Inbound {
    /// Takes the header off `socket`. `None`: the connection is refused.
    ///
    /// # Errors
    /// The socket's, and that the client ended before its header did.
    pub async fn take(&self, socket: &TcpStream, shard: Shard) -> io::Result<Option<Said>> {
        let seen = peek(socket, LONGEST, |wire| self.judge(wire)).await?;
        let Some(seen) = seen else {
            return Err(io::ErrorKind::UnexpectedEof.into());
        };
        let (version, length, said) = match seen {
            Seen::Other if self.optional => {
                self.stats.inc(shard, Stat::NotFoundAllowed);
                return Ok(Some(Said::default()));
            }
            Seen::Other => {
                self.stats.inc(shard, Stat::NotFoundDisallowed);
                return Ok(None);
            }
            Seen::Header(version, _, _) | Seen::Malformed(version) if self.refused.contains(&version) => {
                self.of(version).inc(shard, VersionStat::Disallowed);
                return Ok(None);
            }
            Seen::Malformed(version) => {
                self.of(version).inc(shard, VersionStat::Error);
                return Ok(None);
            }
            Seen::Header(version, length, said) => (version, length, said),
        };
        skip(socket, length).await?;
        self.of(version).inc(shard, VersionStat::Found);
        Ok(Some(said))
    }

    fn of(&self, version: Version) -> &Scope {
        &self.versions[usize::from(version == Version::V2)]
    }

    fn judge(&self, wire: &[u8]) -> Option<Seen> {
        Some(match read(wire) {
            Begin::Incomplete => return None,
            Begin::Other => Seen::Other,
            Begin::Malformed(version, fault) => {
                tracing::debug!(?version, %fault, "no PROXY header");
                Seen::Malformed(version)
            }
            Begin::Header(header) => {
                let kept = chosen(header.tlvs, |kind| self.kept.has(kind));
                let said = Said {
                    ends: header.ends,
                    tlvs: (!kept.is_empty()).then(|| kept.into()),
                };
                Seen::Header(header.version, header.length, said)
            }
        })
    }
}

/// Reads `length` octets that are there.
async fn skip(socket: &TcpStream, length: usize) -> io::Result<()> {
    let mut room = vec![0; length];
    let mut left = &mut room[..];
    while !left.is_empty() {
        socket.ready(Interest::READABLE).await?;
        match socket.try_read(left) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => left = &mut left[n..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
