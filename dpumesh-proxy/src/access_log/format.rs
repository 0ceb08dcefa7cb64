//! Envoy's format operators: compiled once, rendered per line.
//!
//! An operator that has nothing to say is `-` in text (empty where the format omits empty values) and `null` in JSON.

use std::io::Write as _;
use std::net::SocketAddr;
use std::time::SystemTime;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

use super::time::{self, TimeFormat};
use super::{About, Headers, Record, join_flags};
use crate::http1::uuid;
use crate::tls::leaf::Leaf;

/// A piece of a format.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Part {
    Text(Vec<u8>),
    StartTime,
    StartTimeAs(TimeFormat),
    EmitTime(Option<TimeFormat>),
    Request(HeaderPart),
    Response(HeaderPart),
    Trailer(HeaderPart),
    Path {
        query: bool,
        of: PathOf,
        max: usize,
    },
    QueryParameter {
        name: Vec<u8>,
        max: usize,
    },
    Query,
    Protocol,
    ResponseCode,
    ResponseFlags,
    LongFlags,
    BytesReceived,
    BytesSent,
    Duration,
    RequestDuration,
    RequestTxDuration,
    ResponseDuration,
    ResponseTxDuration,
    Between(Point, Point, Unit),
    HandshakeDuration,
    UpstreamHost {
        port: bool,
    },
    UpstreamPort,
    UpstreamHostName {
        port: bool,
    },
    UpstreamCluster,
    UpstreamProtocol,
    UpstreamPeer,
    Attempts,
    RouteName,
    ChainName,
    Details {
        spaces: bool,
    },
    Termination,
    TransportFailure,
    UpstreamLocal {
        port: bool,
    },
    UpstreamLocalPort,
    ServerName,
    ServerNameOrHost {
        host_first: bool,
    },
    ConnectionId,
    StreamId,
    UniqueId,
    About,
    /// What nothing here can ever have.
    Nothing,
    GrpcStatus(GrpcForm),
    Remote {
        port: bool,
    },
    RemotePort,
    DirectRemote {
        port: bool,
    },
    DirectRemotePort,
    Local {
        port: bool,
    },
    LocalPort,
    DirectLocal {
        port: bool,
    },
    DirectLocalPort,
    Peer(Certificate),
    Own(Certificate),
    /// From when, or until when, the client's certificate is valid.
    Validity {
        end: bool,
        format: Option<TimeFormat>,
    },
    TlsVersion,
    TlsCipher,
    TlsGroup,
    Ingress,
}

/// A point in a request's time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Point {
    Begin,
    RequestComplete,
    RequestSent,
    ResponseBegun,
    End,
}

impl Point {
    fn new(name: &str) -> Option<Self> {
        Some(match name {
            "DS_RX_BEG" => Self::Begin,
            "DS_RX_END" => Self::RequestComplete,
            "US_TX_END" => Self::RequestSent,
            "US_RX_BEG" => Self::ResponseBegun,
            "DS_TX_END" => Self::End,
            _ => return None,
        })
    }

    fn of(self, record: &Record<'_>) -> Option<std::time::Duration> {
        let times = &record.extra.times;
        record.request?;
        match self {
            Self::Begin => Some(std::time::Duration::ZERO),
            Self::RequestComplete => times.request_complete,
            Self::RequestSent => times.request_sent,
            Self::ResponseBegun => times.response_begun,
            Self::End => Some(record.duration),
        }
    }
}

/// What a duration is counted in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unit {
    Milliseconds,
    Microseconds,
    Nanoseconds,
}

/// `%REQ(NAME?OTHER):LENGTH%`
#[derive(Debug, PartialEq, Eq)]
pub(super) struct HeaderPart {
    name: Vec<u8>,
    or: Option<Vec<u8>>,
    max: usize,
}

/// Which path: as it came, as it went on, or the first of the two that there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PathOf {
    Original,
    Path,
    Either,
}

/// How a gRPC status is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum GrpcForm {
    Camel,
    Snake,
    Number,
}

/// What of a client connection's certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Certificate {
    Uri,
    Dns,
    Email,
    Ip,
    Subject,
    Fingerprint,
    Issuer,
    Serial,
    Pem,
}

/// What an operator wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Said {
    Text,
    Number,
    Nothing,
}

/// Takes a format apart.
///
/// # Errors
/// The operator that is unknown or malformed, in words.
pub(super) fn compile(format: &str) -> Result<Vec<Part>, String> {
    let mut parts = Vec::new();
    let mut text = Vec::new();
    let mut rest = format;
    while let Some(start) = rest.find('%') {
        text.extend_from_slice(&rest.as_bytes()[..start]);
        rest = &rest[start + 1..];
        if let Some(after) = rest.strip_prefix('%') {
            text.push(b'%');
            rest = after;
            continue;
        }
        let end = end_of_operator(rest).ok_or_else(|| format!("no closing % after {rest:?}"))?;
        if !text.is_empty() {
            parts.push(Part::Text(std::mem::take(&mut text)));
        }
        parts.push(operator(&rest[..end])?);
        rest = &rest[end + 1..];
    }
    text.extend_from_slice(rest.as_bytes());
    if !text.is_empty() {
        parts.push(Part::Text(text));
    }
    Ok(parts)
}

/// Where the `%` behind an operator is. What stands in parentheses may have some of its own.
fn end_of_operator(rest: &str) -> Option<usize> {
    let (open, end) = (rest.find('('), rest.find('%')?);
    match open {
        Some(open) if open < end => {
            let close = open + rest[open..].find(')')?;
            Some(close + rest[close..].find('%')?)
        }
        _ => Some(end),
    }
}

fn operator(text: &str) -> Result<Part, String> {
    if let Some(part) = plain(text) {
        return Ok(part);
    }
    let malformed = || format!("%{text}% is malformed");
    let Some((name, rest)) = text.split_once('(') else {
        return Err(format!("%{text}% is not supported yet"));
    };
    let (argument, tail) = rest.rsplit_once(')').ok_or_else(malformed)?;
    let max = match tail.strip_prefix(':') {
        Some(length) => length.parse().map_err(|_| malformed())?,
        None if tail.is_empty() => usize::MAX,
        None => return Err(malformed()),
    };
    let header = || HeaderPart::new(argument, max).ok_or_else(malformed);
    Ok(match name {
        "REQ" => Part::Request(header()?),
        "RESP" => Part::Response(header()?),
        "TRAILER" => Part::Trailer(header()?),
        "START_TIME" if tail.is_empty() => Part::StartTimeAs(TimeFormat::new(argument)?),
        "EMIT_TIME" if tail.is_empty() => Part::EmitTime(Some(TimeFormat::new(argument)?)),
        "DOWNSTREAM_PEER_CERT_V_START" | "DOWNSTREAM_PEER_CERT_V_END" if tail.is_empty() => Part::Validity {
            end: name.ends_with("END"),
            format: Some(TimeFormat::new(argument)?),
        },
        "COMMON_DURATION" if tail.is_empty() => between(argument)?,
        "ENVIRONMENT" if !argument.is_empty() => {
            let value = std::env::var(argument).unwrap_or_else(|_| "-".to_owned());
            Part::Text(cut(value.as_bytes(), max).to_vec())
        }
        "RESPONSE_CODE_DETAILS" if tail.is_empty() && argument == "ALLOW_WHITESPACES" => {
            Part::Details { spaces: true }
        }
        "REQUESTED_SERVER_NAME" if tail.is_empty() => match argument {
            "SNI_ONLY" => Part::ServerName,
            "SNI_FIRST" => Part::ServerNameOrHost { host_first: false },
            "HOST_FIRST" => Part::ServerNameOrHost { host_first: true },
            _ => return Err(format!("%{text}% is not supported yet")),
        },
        "PATH" => path(argument, max).ok_or_else(malformed)?,
        "QUERY_PARAM" if !argument.is_empty() => Part::QueryParameter {
            name: argument.as_bytes().to_vec(),
            max,
        },
        "GRPC_STATUS" if tail.is_empty() => Part::GrpcStatus(match argument {
            "CAMEL_STRING" => GrpcForm::Camel,
            "SNAKE_STRING" => GrpcForm::Snake,
            "NUMBER" => GrpcForm::Number,
            _ => return Err(malformed()),
        }),
        "QUERY_PARAM" | "START_TIME" | "EMIT_TIME" | "GRPC_STATUS" | "COMMON_DURATION" | "ENVIRONMENT" => {
            return Err(malformed());
        }
        _ => return Err(format!("%{text}% is not supported yet")),
    })
}

/// Operators without arguments.
fn plain(text: &str) -> Option<Part> {
    Some(match text {
        "START_TIME" => Part::StartTime,
        "EMIT_TIME" => Part::EmitTime(None),
        "PROTOCOL" => Part::Protocol,
        "RESPONSE_CODE" => Part::ResponseCode,
        "RESPONSE_FLAGS" => Part::ResponseFlags,
        "RESPONSE_FLAGS_LONG" => Part::LongFlags,
        // Only filters of Envoy's own set some.
        "CUSTOM_FLAGS" => Part::Text(Vec::new()),
        "BYTES_RECEIVED" => Part::BytesReceived,
        "BYTES_SENT" => Part::BytesSent,
        "DURATION" => Part::Duration,
        "REQUEST_DURATION" => Part::RequestDuration,
        "REQUEST_TX_DURATION" => Part::RequestTxDuration,
        "RESPONSE_DURATION" => Part::ResponseDuration,
        "RESPONSE_TX_DURATION" => Part::ResponseTxDuration,
        "DOWNSTREAM_HANDSHAKE_DURATION" => Part::HandshakeDuration,
        "PATH" => path("", usize::MAX)?,
        "QUERY_PARAMS" => Part::Query,
        // Virtual clusters are refused, and HTTP/3 is not spoken.
        "VIRTUAL_CLUSTER_NAME" | "ROUNDTRIP_DURATION" => Part::Nothing,
        "CONNECTION_ID" => Part::ConnectionId,
        "STREAM_ID" => Part::StreamId,
        "UNIQUE_ID" => Part::UniqueId,
        "ACCESS_LOG_TYPE" => Part::About,
        "HOSTNAME" => Part::Text(hostname()),
        "UPSTREAM_HOST" | "UPSTREAM_REMOTE_ADDRESS" => Part::UpstreamHost { port: true },
        "UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT" => Part::UpstreamHost { port: false },
        "UPSTREAM_REMOTE_PORT" => Part::UpstreamPort,
        "UPSTREAM_HOST_NAME" => Part::UpstreamHostName { port: true },
        "UPSTREAM_HOST_NAME_WITHOUT_PORT" => Part::UpstreamHostName { port: false },
        // No cluster here has another name for statistics alone that would show in a log.
        "UPSTREAM_CLUSTER" | "UPSTREAM_CLUSTER_RAW" => Part::UpstreamCluster,
        "UPSTREAM_PROTOCOL" => Part::UpstreamProtocol,
        "UPSTREAM_PEER_URI_SAN" => Part::UpstreamPeer,
        "UPSTREAM_REQUEST_ATTEMPT_COUNT" => Part::Attempts,
        "ROUTE_NAME" => Part::RouteName,
        "FILTER_CHAIN_NAME" => Part::ChainName,
        "RESPONSE_CODE_DETAILS" => Part::Details { spaces: false },
        "CONNECTION_TERMINATION_DETAILS" => Part::Termination,
        "UPSTREAM_TRANSPORT_FAILURE_REASON" => Part::TransportFailure,
        "UPSTREAM_LOCAL_ADDRESS" => Part::UpstreamLocal { port: true },
        "UPSTREAM_LOCAL_ADDRESS_WITHOUT_PORT" => Part::UpstreamLocal { port: false },
        "UPSTREAM_LOCAL_PORT" => Part::UpstreamLocalPort,
        "REQUESTED_SERVER_NAME" => Part::ServerName,
        "GRPC_STATUS" => Part::GrpcStatus(GrpcForm::Camel),
        "GRPC_STATUS_NUMBER" => Part::GrpcStatus(GrpcForm::Number),
        "DOWNSTREAM_REMOTE_ADDRESS" => Part::Remote { port: true },
        "DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT" => Part::Remote { port: false },
        "DOWNSTREAM_REMOTE_PORT" => Part::RemotePort,
        "DOWNSTREAM_DIRECT_REMOTE_ADDRESS" => Part::DirectRemote { port: true },
        "DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT" => Part::DirectRemote { port: false },
        "DOWNSTREAM_DIRECT_REMOTE_PORT" => Part::DirectRemotePort,
        "DOWNSTREAM_LOCAL_ADDRESS" => Part::Local { port: true },
        "DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT" => Part::Local { port: false },
        "DOWNSTREAM_LOCAL_PORT" => Part::LocalPort,
        "DOWNSTREAM_DIRECT_LOCAL_ADDRESS" => Part::DirectLocal { port: true },
        "DOWNSTREAM_DIRECT_LOCAL_ADDRESS_WITHOUT_PORT" => Part::DirectLocal { port: false },
        "DOWNSTREAM_DIRECT_LOCAL_PORT" => Part::DirectLocalPort,
        "DOWNSTREAM_PEER_URI_SAN" => Part::Peer(Certificate::Uri),
        "DOWNSTREAM_PEER_DNS_SAN" => Part::Peer(Certificate::Dns),
        "DOWNSTREAM_PEER_SUBJECT" => Part::Peer(Certificate::Subject),
        "DOWNSTREAM_PEER_FINGERPRINT_256" => Part::Peer(Certificate::Fingerprint),
        "DOWNSTREAM_PEER_EMAIL_SAN" => Part::Peer(Certificate::Email),
        "DOWNSTREAM_PEER_IP_SAN" => Part::Peer(Certificate::Ip),
        "DOWNSTREAM_PEER_ISSUER" => Part::Peer(Certificate::Issuer),
        "DOWNSTREAM_PEER_SERIAL" => Part::Peer(Certificate::Serial),
        "DOWNSTREAM_PEER_CERT" => Part::Peer(Certificate::Pem),
        "DOWNSTREAM_PEER_CERT_V_START" => Part::Validity {
            end: false,
            format: None,
        },
        "DOWNSTREAM_PEER_CERT_V_END" => Part::Validity {
            end: true,
            format: None,
        },
        "DOWNSTREAM_TLS_VERSION" => Part::TlsVersion,
        "DOWNSTREAM_TLS_CIPHER" => Part::TlsCipher,
        "DOWNSTREAM_TLS_GROUP" => Part::TlsGroup,
        "DOWNSTREAM_LOCAL_EMAIL_SAN" => Part::Own(Certificate::Email),
        "DOWNSTREAM_LOCAL_IP_SAN" => Part::Own(Certificate::Ip),
        "DOWNSTREAM_LOCAL_URI_SAN" => Part::Own(Certificate::Uri),
        "DOWNSTREAM_LOCAL_DNS_SAN" => Part::Own(Certificate::Dns),
        "DOWNSTREAM_LOCAL_SUBJECT" => Part::Own(Certificate::Subject),
        // Envoy's way to name what others put beside a connection; Envoy itself prints `-` for this key.
        "FILTER_STATE(dpumesh.ingress:PLAIN)" => Part::Ingress,
        _ => return None,
    })
}

/// `FROM:TO:UNIT` of points that are known here.
fn between(argument: &str) -> Result<Part, String> {
    let malformed = || format!("%COMMON_DURATION({argument})% is malformed");
    let mut words = argument.split(':');
    let mut point = || {
        let name = words.next().ok_or_else(malformed)?;
        Point::new(name).ok_or_else(|| format!("%COMMON_DURATION% from or to {name} is not supported yet"))
    };
    let (from, to) = (point()?, point()?);
    let unit = match words.next() {
        None | Some("ms") => Unit::Milliseconds,
        Some("us") => Unit::Microseconds,
        Some("ns") => Unit::Nanoseconds,
        Some(_) => return Err(malformed()),
    };
    match words.next() {
        None => Ok(Part::Between(from, to, unit)),
        Some(_) => Err(malformed()),
    }
}

/// This machine's, as it is when the configuration is read.
fn hostname() -> Vec<u8> {
    let name = std::fs::read("/proc/sys/kernel/hostname").unwrap_or_default();
    match name.trim_ascii() {
        b"" => b"-".to_vec(),
        name => name.to_vec(),
    }
}

fn path(argument: &str, max: usize) -> Option<Part> {
    let (query, of) = argument.split_once(':').unwrap_or((argument, ""));
    Some(Part::Path {
        query: match query {
            "" | "WQ" => true,
            "NQ" => false,
            _ => return None,
        },
        of: match of {
            "" | "ORIG_OR_PATH" => PathOf::Either,
            "ORIG" => PathOf::Original,
            "PATH" => PathOf::Path,
            _ => return None,
        },
        max,
    })
}

impl HeaderPart {
    fn new(names: &str, max: usize) -> Option<Self> {
        let lower = |name: &str| name.to_ascii_lowercase().into_bytes();
        let (name, or) = match names.split_once('?') {
            Some((name, or)) => (lower(name), Some(lower(or))),
            None => (lower(names), None),
        };
        (!name.is_empty()).then_some(Self { name, or, max })
    }

    pub(super) fn value<'a>(&self, headers: Option<&'a dyn Headers>) -> Option<&'a [u8]> {
        let headers = headers?;
        let or = || self.or.as_ref().and_then(|other| headers.header(other));
        let value = headers.header(&self.name).or_else(or)?;
        Some(cut(value, self.max))
    }
}

impl Part {
    /// Whether it says something of the request alone.
    pub(super) fn is_early(&self) -> bool {
        matches!(
            self,
            Self::Text(_)
                | Self::Request(_)
                | Self::Path { .. }
                | Self::QueryParameter { .. }
                | Self::Query
                | Self::StartTime
                | Self::StartTimeAs(_)
                | Self::EmitTime(_)
                | Self::ConnectionId
                | Self::StreamId
                | Self::UniqueId
                | Self::About
                | Self::Nothing
                | Self::Validity { .. }
                | Self::TlsVersion
                | Self::TlsCipher
                | Self::TlsGroup
                | Self::HandshakeDuration
                | Self::ServerNameOrHost { .. }
                | Self::ChainName
                | Self::Ingress
                | Self::Protocol
                | Self::ServerName
                | Self::Remote { .. }
                | Self::RemotePort
                | Self::DirectRemote { .. }
                | Self::DirectRemotePort
                | Self::Local { .. }
                | Self::LocalPort
                | Self::DirectLocal { .. }
                | Self::DirectLocalPort
                | Self::Peer(_)
                | Self::Own(_)
        )
    }

    /// Writes what it has to say; nothing is written where that is nothing.
    pub(super) fn put(&self, record: &Record<'_>, out: &mut Vec<u8>) -> Said {
        let extra = &record.extra;
        match self {
            Self::Text(literal) => text(Some(literal), out),
            Self::StartTime => {
                time::timestamp(record.start, out);
                Said::Text
            }
            Self::StartTimeAs(format) => {
                format.write(record.start, out);
                Said::Text
            }
            Self::EmitTime(format) => {
                written(SystemTime::now(), format.as_ref(), out);
                Said::Text
            }
            Self::Request(header) => text(header.value(record.request), out),
            Self::Response(header) => text(header.value(record.response), out),
            Self::Trailer(header) => {
                let trailers = extra.trailers.map(Trailers);
                text(header.value(trailers.as_ref().map(|t| t as &dyn Headers)), out)
            }
            Self::Path { query, of, max } => {
                let path = logged_path(record, *of);
                let path = path.map(|p| if *query { p } else { bare(p) });
                text(path.map(|p| cut(p, *max)), out)
            }
            Self::QueryParameter { name, max } => {
                text(query_parameter(record, name).map(|v| cut(v, *max)), out)
            }
            Self::Query => text(query(record), out),
            Self::Protocol => words(record.protocol, out),
            Self::ResponseCode => number(Some(u64::from(record.status)), out),
            Self::ResponseFlags => {
                join_flags(record.flags, extra.besides, out);
                Said::Text
            }
            Self::LongFlags => {
                long_flags(record, out);
                Said::Text
            }
            Self::BytesReceived => number(Some(record.received), out),
            Self::BytesSent => number(Some(record.sent), out),
            Self::Duration => number(Some(ms(record.duration)), out),
            Self::RequestDuration => number(extra.times.request_complete.map(ms), out),
            Self::RequestTxDuration => number(extra.times.request_sent.map(ms), out),
            Self::ResponseDuration => number(extra.times.response_begun.map(ms), out),
            Self::ResponseTxDuration => {
                let begun = extra.times.response_begun;
                number(begun.map(|begun| ms(record.duration.saturating_sub(begun))), out)
            }
            Self::Between(from, to, unit) => {
                let (from, to) = (from.of(record), to.of(record));
                let took = from.zip(to).and_then(|(from, to)| to.checked_sub(from));
                let count = took.map(|took| match unit {
                    Unit::Milliseconds => took.as_millis(),
                    Unit::Microseconds => took.as_micros(),
                    Unit::Nanoseconds => took.as_nanos(),
                });
                number(count.map(|count| u64::try_from(count).unwrap_or(u64::MAX)), out)
            }
            Self::HandshakeDuration => number(extra.connection.and_then(|c| c.agreed.took).map(ms), out),
            Self::UpstreamHost { port } => address(record.upstream, *port, out),
            Self::UpstreamPort => number(record.upstream.map(|a| u64::from(a.port())), out),
            Self::UpstreamHostName { port } => match host_name(record) {
                Some(name) if *port => words(Some(name), out),
                Some(name) => words(Some(without_port(name)), out),
                None => address(record.upstream, *port, out),
            },
            Self::UpstreamCluster => words(record.cluster, out),
            Self::UpstreamProtocol => words(extra.upstream_protocol, out),
            Self::UpstreamPeer => words(extra.upstream_peer, out),
            Self::Attempts => number(Some(u64::from(extra.attempts)), out),
            Self::RouteName => words(record.route, out),
            Self::ChainName => words(extra.chain, out),
            Self::Details { spaces: true } => words(extra.details, out),
            Self::Details { spaces: false } => {
                let begin = out.len();
                let said = words(extra.details, out);
                for octet in &mut out[begin..] {
                    if octet.is_ascii_whitespace() {
                        *octet = b'_';
                    }
                }
                said
            }
            Self::Termination => words(extra.termination, out),
            Self::TransportFailure => words(extra.transport_failure, out),
            Self::UpstreamLocal { port } => address(extra.upstream_local, *port, out),
            Self::UpstreamLocalPort => number(extra.upstream_local.map(|a| u64::from(a.port())), out),
            Self::ServerName => words(extra.server_name, out),
            Self::ServerNameOrHost { host_first } => {
                let host = record.request.and_then(|request| {
                    let original = request.header(b"x-envoy-original-host");
                    original.or_else(|| request.header(b":authority"))
                });
                let asked = extra
                    .server_name
                    .filter(|name| !name.is_empty())
                    .map(str::as_bytes);
                let (first, second) = if *host_first { (host, asked) } else { (asked, host) };
                text(first.or(second), out)
            }
            Self::ConnectionId => number(extra.connection_id, out),
            Self::StreamId => text(
                record.request.and_then(|request| request.header(b"x-request-id")),
                out,
            ),
            Self::UniqueId => text(Some(&uuid()), out),
            Self::About => {
                let about = match extra.about {
                    About::Nothing => "NotSet",
                    About::Request => "DownstreamEnd",
                    About::Connection => "TcpConnectionEnd",
                };
                words(Some(about), out)
            }
            Self::Nothing => Said::Nothing,
            Self::GrpcStatus(form) => grpc(extra.grpc.filter(|_| extra.is_grpc), *form, out),
            Self::Remote { port } => address(Some(remote(record)), *port, out),
            Self::RemotePort => number(Some(u64::from(remote(record).port())), out),
            Self::DirectRemote { port } => address(Some(record.direct_remote), *port, out),
            Self::DirectRemotePort => number(Some(u64::from(record.direct_remote.port())), out),
            Self::Local { port } => address(Some(record.local), *port, out),
            Self::LocalPort => number(Some(u64::from(record.local.port())), out),
            Self::DirectLocal { port } => address(Some(record.direct_local), *port, out),
            Self::DirectLocalPort => number(Some(u64::from(record.direct_local.port())), out),
            Self::Peer(what) => peer(record, *what, out),
            Self::Own(what) => own(record, *what, out),
            Self::Validity { end, format } => match leaf(record) {
                Some(leaf) => {
                    written(if *end { leaf.end } else { leaf.begin }, format.as_ref(), out);
                    Said::Text
                }
                None => Said::Nothing,
            },
            Self::TlsVersion => words(extra.connection.map(|c| c.agreed.version), out),
            Self::TlsCipher => words(extra.connection.map(|c| c.agreed.cipher), out),
            Self::TlsGroup => words(extra.connection.map(|c| c.agreed.group), out),
            Self::Ingress => number(record.ingress.map(|port| u64::from(port.get())), out),
        }
    }

    /// Writes text.
    pub(super) fn render(&self, record: &Record<'_>, omit_empty: bool, out: &mut Vec<u8>) {
        if self.put(record, out) == Said::Nothing && !omit_empty {
            out.push(b'-');
        }
    }
}

/// As in Envoy an address taken from a request has port 0.
fn remote(record: &Record<'_>) -> SocketAddr {
    let said = record.extra.request_remote.map(|ip| SocketAddr::new(ip, 0));
    said.unwrap_or(record.remote)
}

fn logged_path<'a>(record: &Record<'a>, of: PathOf) -> Option<&'a [u8]> {
    let request = record.request?;
    let original = || request.header(b"x-envoy-original-path");
    match of {
        PathOf::Original => original(),
        PathOf::Path => request.header(b":path"),
        PathOf::Either => original().or_else(|| request.header(b":path")),
    }
}

fn query_parameter<'a>(record: &Record<'a>, name: &[u8]) -> Option<&'a [u8]> {
    let path = record.request?.header(b":path")?;
    let query = &path[path.iter().position(|b| *b == b'?')? + 1..];
    query.split(|b| *b == b'&').find_map(|pair| {
        let equals = pair.iter().position(|b| *b == b'=').unwrap_or(pair.len());
        (pair[..equals] == *name).then(|| pair.get(equals + 1..).unwrap_or_default())
    })
}

/// Without the query.
fn bare(path: &[u8]) -> &[u8] {
    path.split(|b| *b == b'?').next().unwrap_or_default()
}

fn cut(value: &[u8], max: usize) -> &[u8] {
    &value[..value.len().min(max)]
}

fn ms(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn text(value: Option<&[u8]>, out: &mut Vec<u8>) -> Said {
    match value {
        Some(value) => {
            out.extend_from_slice(value);
            Said::Text
        }
        None => Said::Nothing,
    }
}

/// The same for what is never empty.
fn words(value: Option<&str>, out: &mut Vec<u8>) -> Said {
    text(value.filter(|v| !v.is_empty()).map(str::as_bytes), out)
}

fn number(value: Option<u64>, out: &mut Vec<u8>) -> Said {
    match value {
        Some(value) => {
            out.extend_from_slice(itoa::Buffer::new().format(value).as_bytes());
            Said::Number
        }
        None => Said::Nothing,
    }
}

fn address(address: Option<SocketAddr>, port: bool, out: &mut Vec<u8>) -> Said {
    let Some(address) = address else {
        return Said::Nothing;
    };
    let _ = if port {
        write!(out, "{address}")
    } else {
        write!(out, "{}", address.ip())
    };
    Said::Text
}

fn joined(all: &[String], out: &mut Vec<u8>) -> Said {
    words(Some(&all.join(",")), out)
}

/// The endpoint's own name, where it has one.
fn host_name<'a>(record: &Record<'a>) -> Option<&'a str> {
    let address = record.upstream?;
    let endpoint = record.extra.endpoints.iter().find(|e| e.address == address)?;
    Some(&*endpoint.hostname).filter(|name| !name.is_empty())
}

fn without_port(name: &str) -> &str {
    match name.rsplit_once(':') {
        Some((host, port)) if !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()) => host,
        _ => name,
    }
}

/// The query of the path as it went on, without its `?`.
fn query<'a>(record: &Record<'a>) -> Option<&'a [u8]> {
    let path = logged_path(record, PathOf::Path)?;
    Some(&path[path.iter().position(|b| *b == b'?')? + 1..])
}

fn written(time: SystemTime, format: Option<&TimeFormat>, out: &mut Vec<u8>) {
    match format {
        Some(format) => format.write(time, out),
        None => time::timestamp(time, out),
    }
}

fn leaf(record: &Record<'_>) -> Option<Leaf> {
    let peer = record.extra.connection.and_then(|c| c.peer.as_ref())?;
    Leaf::of(&peer.certificate)
}

/// A certificate as text, as a URI would have it.
fn pem(certificate: &[u8], out: &mut Vec<u8>) -> Said {
    let text = BASE64.encode(certificate);
    out.extend_from_slice(b"-----BEGIN%20CERTIFICATE-----%0A");
    for line in text.as_bytes().chunks(64) {
        for octet in line {
            match octet {
                b'+' => out.extend_from_slice(b"%2B"),
                b'/' => out.extend_from_slice(b"%2F"),
                b'=' => out.extend_from_slice(b"%3D"),
                octet => out.push(*octet),
            }
        }
        out.extend_from_slice(b"%0A");
    }
    out.extend_from_slice(b"-----END%20CERTIFICATE-----%0A");
    Said::Text
}

/// Envoy's response flags and what they stand for.
const FLAGS: [(&str, &str); 29] = [
    ("LH", "FailedLocalHealthCheck"),
    ("UH", "NoHealthyUpstream"),
    ("UT", "UpstreamRequestTimeout"),
    ("LR", "LocalReset"),
    ("UR", "UpstreamRemoteReset"),
    ("UF", "UpstreamConnectionFailure"),
    ("UC", "UpstreamConnectionTermination"),
    ("UO", "UpstreamOverflow"),
    ("NR", "NoRouteFound"),
    ("DI", "DelayInjected"),
    ("FI", "FaultInjected"),
    ("RL", "RateLimited"),
    ("UAEX", "UnauthorizedExternalService"),
    ("RLSE", "RateLimitServiceError"),
    ("DC", "DownstreamConnectionTermination"),
    ("URX", "UpstreamRetryLimitExceeded"),
    ("SI", "StreamIdleTimeout"),
    ("IH", "InvalidEnvoyRequestHeaders"),
    ("DPE", "DownstreamProtocolError"),
    ("UMSDR", "UpstreamMaxStreamDurationReached"),
    ("RFCF", "ResponseFromCacheFilter"),
    ("NFCF", "NoFilterConfigFound"),
    ("DT", "DurationTimeout"),
    ("UPE", "UpstreamProtocolError"),
    ("NC", "NoClusterFound"),
    ("OM", "OverloadManagerTerminated"),
    ("DF", "DnsResolutionFailed"),
    ("DO", "DropOverload"),
    ("DR", "DownstreamRemoteReset"),
];

fn long_flags(record: &Record<'_>, out: &mut Vec<u8>) {
    let mut flags = Vec::new();
    join_flags(record.flags, record.extra.besides, &mut flags);
    let each = flags.split(|b| *b == b',').map(|flag| {
        let known = FLAGS.iter().find(|(short, _)| short.as_bytes() == flag);
        known.map_or(flag, |(_, long)| long.as_bytes())
    });
    out.extend(each.collect::<Vec<_>>().join(&b','));
}

fn peer(record: &Record<'_>, what: Certificate, out: &mut Vec<u8>) -> Said {
    let Some(peer) = record.extra.connection.and_then(|c| c.peer.as_ref()) else {
        return Said::Nothing;
    };
    match what {
        Certificate::Uri => joined(&peer.uri_sans, out),
        Certificate::Dns => joined(&peer.dns_sans, out),
        Certificate::Email => joined(&peer.email_sans, out),
        Certificate::Ip => joined(&peer.ip_sans, out),
        Certificate::Subject => words(Some(&peer.subject), out),
        Certificate::Issuer => words(leaf(record).map(|leaf| leaf.issuer).as_deref(), out),
        Certificate::Serial => words(leaf(record).map(|leaf| leaf.serial).as_deref(), out),
        Certificate::Pem => pem(&peer.certificate, out),
        Certificate::Fingerprint => {
            for octet in peer.sha256 {
                let _ = write!(out, "{octet:02x}");
            }
            Said::Text
        }
    }
}

fn own(record: &Record<'_>, what: Certificate, out: &mut Vec<u8>) -> Said {
    let Some(own) = record.extra.connection.and_then(|c| c.local.as_ref()) else {
        return Said::Nothing;
    };
    match what {
        Certificate::Uri => joined(&own.uri_sans, out),
        Certificate::Dns => joined(&own.dns_sans, out),
        Certificate::Email => joined(&own.email_sans, out),
        Certificate::Ip => joined(&own.ip_sans, out),
        Certificate::Subject => words(Some(&own.subject), out),
        // Nobody can ask for these.
        Certificate::Fingerprint | Certificate::Issuer | Certificate::Serial | Certificate::Pem => {
            Said::Nothing
        }
    }
}

/// gRPC's codes by number, in both spellings.
const GRPC: [(&str, &str); 17] = [
    ("OK", "OK"),
    ("Canceled", "CANCELLED"),
    ("Unknown", "UNKNOWN"),
    ("InvalidArgument", "INVALID_ARGUMENT"),
    ("DeadlineExceeded", "DEADLINE_EXCEEDED"),
    ("NotFound", "NOT_FOUND"),
    ("AlreadyExists", "ALREADY_EXISTS"),
    ("PermissionDenied", "PERMISSION_DENIED"),
    ("ResourceExhausted", "RESOURCE_EXHAUSTED"),
    ("FailedPrecondition", "FAILED_PRECONDITION"),
    ("Aborted", "ABORTED"),
    ("OutOfRange", "OUT_OF_RANGE"),
    ("Unimplemented", "UNIMPLEMENTED"),
    ("Internal", "INTERNAL"),
    ("Unavailable", "UNAVAILABLE"),
    ("DataLoss", "DATA_LOSS"),
    ("Unauthenticated", "UNAUTHENTICATED"),
];

fn grpc(status: Option<u32>, form: GrpcForm, out: &mut Vec<u8>) -> Said {
    let names = status.and_then(|s| GRPC.get(usize::try_from(s).ok()?));
    match (form, names) {
        (GrpcForm::Camel, Some((camel, _))) => words(Some(camel), out),
        (GrpcForm::Snake, Some((_, snake))) => words(Some(snake), out),
        (GrpcForm::Number, _) => number(status.map(u64::from), out),
        // A code that has no name is its number, as text.
        (_, None) => match number(status.map(u64::from), out) {
            Said::Number => Said::Text,
            said => said,
        },
    }
}

/// Trailers, lines as they came.
struct Trailers<'a>(&'a [u8]);

impl Headers for Trailers<'_> {
    fn header(&self, name: &[u8]) -> Option<&[u8]> {
        self.0.split(|b| *b == b'\n').find_map(|line| {
            let colon = line.iter().position(|b| *b == b':')?;
            let (own, value) = line.split_at(colon);
            own.eq_ignore_ascii_case(name).then(|| value[1..].trim_ascii())
        })
    }
}
