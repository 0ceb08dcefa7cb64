//! Heads on their way through: which lines pass, which are this hop's own, what the configuration changes.
//!
//! Follows Envoy's defaults: names go out in lower case, hop-by-hop lines and `x-envoy-*` control lines stay behind,
//! `x-forwarded-proto`, `x-request-id` and `x-envoy-expected-rq-timeout-ms` are added towards the endpoint,
//! `x-envoy-upstream-service-time`, `date` and `server` towards the client.

use std::time::Duration;

use tokio::time::Instant;

use super::body::Out;
use super::client_cert;
use super::head::{FieldKind, Framing, RequestHead};
use super::reply;
use crate::config::model::{HttpManager, ServerHeader, Underscores};
use crate::istio::{Reporting, Role};
use crate::route::upgrade::Tunnel;
use crate::route::{AddHeader, AddHow, Forward, HeaderChanges, PathRewrite, Route};
use crate::tls::Connection;
use crate::worker::Buffers;

/// What says that a head is about an upgrade.
const UPGRADE_LINE: &[u8] = b"connection: Upgrade\r\n";

/// What one request's forwarding changes.
#[derive(Debug)]
pub(super) struct Rewrite<'a> {
    /// The host of an HTTP/1.0 request that names none.
    pub(super) default_host: Option<&'a [u8]>,
    /// The host after `host_rewrite_literal`.
    pub(super) host: Option<&'a [u8]>,
    /// The path after `prefix_rewrite`.
    pub(super) path: Option<Vec<u8>>,
    /// The route's name.
    pub(super) route_name: Option<&'a str>,
    /// The request id, if this proxy made it.
    pub(super) request_id: [u8; 36],
    /// Whether it did.
    pub(super) made_id: bool,
    /// The `x-envoy-upstream-service-time` sent.
    pub(super) service_ms: Option<Digits>,
    /// The tunnel that the request asks for, if it may.
    pub(super) tunnel: Option<Tunnel>,
    /// The endpoint has opened it.
    pub(super) tunnel_open: bool,
    /// Which attempt this is, from 1.
    pub(super) attempt: u32,
    /// Whether the endpoint is told, and the client.
    pub(super) tell_attempt: (bool, bool),
    /// The local pod, where Istio's metrics are made.
    pub(super) reporting: Option<&'a Reporting>,
    /// Whether the endpoint is a peer of the mesh.
    pub(super) to_mesh: bool,
    asked_timeout: Option<Duration>,
    sent_at: Instant,
}

/// A short decimal number.
#[derive(Debug, Clone, Copy)]
pub(super) struct Digits {
    text: [u8; 20],
    length: usize,
}

impl std::ops::Deref for Digits {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.text[..self.length]
    }
}

impl Digits {
    fn of(number: u64) -> Self {
        let mut buffer = itoa::Buffer::new();
        let digits = buffer.format(number).as_bytes();
        let mut text = [0; 20];
        text[..digits.len()].copy_from_slice(digits);
        Self {
            text,
            length: digits.len(),
        }
    }
}

/// The path of the request; `/` where an absolute target has none.
pub(super) fn path(buffers: &Buffers) -> &[u8] {
    let request = &buffers.request;
    if let Some(normalized) = &request.normalized {
        return normalized;
    }
    let path = request.path.of_head(buffers.request_in.head());
    if path.is_empty() && request.absolute && request.method.of_head(buffers.request_in.head()) != b"CONNECT"
    {
        b"/"
    } else {
        path
    }
}

impl<'a> Rewrite<'a> {
    pub(super) fn new(manager: &'a HttpManager, request: &RequestHead, head: &[u8]) -> Self {
        let default_host = if request.has_host || request.fields.http11 || request.absolute {
            None
        } else {
            manager.default_host_http_10.as_ref().map(String::as_bytes)
        };
        let (mut has_id, mut asked_timeout) = (false, None);
        for field in &request.fields.fields {
            match field.kind {
                FieldKind::RequestId => has_id |= !field.value.is_empty(),
                FieldKind::TimeoutMs => {
                    let text = std::str::from_utf8(field.value.of_head(head)).ok();
                    asked_timeout = text.and_then(|t| t.parse().ok()).map(Duration::from_millis);
                }
                _ => {}
            }
        }
        let made_id = manager.generate_request_id && !has_id;
        Self {
            default_host,
            host: None,
            path: None,
            route_name: None,
            request_id: if made_id { uuid() } else { [0; 36] },
            made_id,
            service_ms: None,
            tunnel: None,
            tunnel_open: false,
            attempt: 1,
            tell_attempt: (false, false),
            reporting: None,
            to_mesh: false,
            asked_timeout,
            sent_at: Instant::now(),
        }
    }

    /// Notes what the route rewrites.
    pub(super) fn plan(&mut self, forward: &'a Forward, route: &Route, buffers: &Buffers) {
        self.host = forward.host_rewrite.as_deref();
        let Some(rewrite) = &forward.path_rewrite else {
            return;
        };
        if buffers.request.connect {
            return;
        }
        let path = path(buffers);
        let bare = path.iter().position(|b| *b == b'?').unwrap_or(path.len());
        let (bare, query) = path.split_at(bare);
        self.path = Some(match rewrite {
            PathRewrite::Prefix(prefix) => {
                let cut = route.matcher.path.matched_len(bare).min(bare.len());
                [prefix.as_slice(), &bare[cut..], query].concat()
            }
            PathRewrite::Regex(regex, with) => {
                [regex.replace_all(bare, with.as_slice()).as_ref(), query].concat()
            }
        });
    }

    /// The request's time limit: what the request asks for, else the route's.
    pub(super) fn timeout(&self, forward: &Forward, buffers: &Buffers) -> Option<Duration> {
        let grpc = || {
            let most = forward.grpc_timeout.filter(|_| buffers.is_grpc())?;
            let asked = buffers
                .request
                .fields
                .get(buffers.request_in.head(), b"grpc-timeout");
            let asked = asked.and_then(grpc_timeout)?;
            Some(most.map_or(asked, |most| asked.min(most)))
        };
        let limit = self.asked_timeout.or_else(grpc).or(forward.timeout);
        limit.filter(|t| !t.is_zero())
    }

    /// How long the request and its response may take in all.
    pub(super) fn stream_limit(
        &self,
        manager: &HttpManager,
        forward: &Forward,
        buffers: &Buffers,
    ) -> Option<Duration> {
        let limits = &forward.stream_duration;
        if let Some(most) = limits.grpc {
            let head = buffers.request_in.head();
            let asked = buffers.request.fields.get(head, b"grpc-timeout");
            if let Some(asked) = asked.and_then(grpc_timeout) {
                return Some(most.map_or(asked, |most| asked.min(most)));
            }
        }
        limits.most.unwrap_or(manager.max_stream_duration)
    }

    /// Takes the time of the response's beginning.
    pub(super) fn note_service_time(&mut self) {
        let ms = u64::try_from(self.sent_at.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.service_ms = Some(Digits::of(ms));
    }
}

/// `grpc-timeout`: at most eight digits and a unit.
fn grpc_timeout(text: &[u8]) -> Option<Duration> {
    let (unit, digits) = text.split_last()?;
    if digits.is_empty() || digits.len() > 8 || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let number = digits.iter().fold(0u64, |n, d| n * 10 + u64::from(d - b'0'));
    Some(match unit {
        b'H' => Duration::from_secs(number * 3600),
        b'M' => Duration::from_secs(number * 60),
        b'S' => Duration::from_secs(number),
        b'm' => Duration::from_millis(number),
        b'u' => Duration::from_micros(number),
        b'n' => Duration::from_nanos(number),
        _ => return None,
    })
}

/// A random UUID (version 4) in text.
pub(crate) fn uuid() -> [u8; 36] {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    let random = (fastrand::u128(..) & !(0xf << 76) & !(0x3 << 62)) | (0x4 << 76) | (0x2 << 62);
    let bytes = random.to_be_bytes();
    let mut text = [b'-'; 36];
    let mut at = 0;
    for (index, byte) in bytes.iter().enumerate() {
        if matches!(index, 4 | 6 | 8 | 10) {
            at += 1;
        }
        text[at] = HEX[usize::from(byte >> 4)];
        text[at + 1] = HEX[usize::from(byte & 15)];
        at += 2;
    }
    text
}

/// The configured header changes of all levels, the most specific first, made one list. Empty in most requests, and
/// then free of charge.
#[derive(Debug, Default)]
pub(super) struct Changes<'a> {
    request: Side<'a>,
    response: Side<'a>,
}

/// One direction's changes.
#[derive(Debug, Default)]
struct Side<'a> {
    /// In the order in which they are made.
    steps: Vec<Step<'a>>,
}

#[derive(Debug, Clone, Copy)]
enum Step<'a> {
    Remove(&'a [u8]),
    Add(&'a AddHeader),
}

impl<'a> Changes<'a> {
    /// Adds headers to the response, after all that the levels change.
    pub(super) fn add_to_response(&mut self, headers: &'a [AddHeader]) {
        self.response.steps.extend(headers.iter().map(Step::Add));
    }

    pub(super) fn of(levels: &[Option<&'a HeaderChanges>]) -> Self {
        let mut changes = Self::default();
        for level in levels.iter().flatten().filter(|l| !l.is_empty()) {
            changes.request.level(&level.request_remove, &level.request_add);
            changes
                .response
                .level(&level.response_remove, &level.response_add);
        }
        changes
    }
}

impl<'a> Side<'a> {
    fn level(&mut self, remove: &'a [Vec<u8>], add: &'a [AddHeader]) {
        self.steps.extend(remove.iter().map(|name| Step::Remove(name)));
        self.steps.extend(add.iter().map(Step::Add));
    }

    /// Works the steps out for a message; `exists` tells what it has.
    fn settle(&self, exists: impl Fn(&[u8]) -> bool) -> Settled<'a> {
        let mut settled = Settled::default();
        for step in &self.steps {
            match step {
                Step::Remove(name) => settled.drop(name),
                Step::Add(header) => {
                    let name = header.name.as_slice();
                    let there = settled.added.iter().any(|h| h.name == name)
                        || (!settled.dropped.contains(&name) && exists(name));
                    match (header.how, there) {
                        (AddHow::IfAbsent, true) | (AddHow::OverwriteIfExists, false) => continue,
                        (AddHow::Overwrite | AddHow::OverwriteIfExists, true) => settled.drop(name),
                        _ => {}
                    }
                    settled.added.push(header);
                }
            }
        }
        settled
    }
}

#[derive(Debug, Default)]
struct Settled<'a> {
    dropped: Vec<&'a [u8]>,
    added: Vec<&'a AddHeader>,
}

impl<'a> Settled<'a> {
    fn drop(&mut self, name: &'a [u8]) {
        self.dropped.push(name);
        self.added.retain(|h| h.name != name);
    }

    fn drops(&self, name: &[u8]) -> bool {
        !self.dropped.is_empty() && self.dropped.contains(&name)
    }

    fn write(&self, out: &mut Vec<u8>) {
        for header in &self.added {
            reply::header(&header.name, &header.value, out);
        }
    }
}

/// Writes the request head for the endpoint into `request_out`.
pub(super) fn request_head(
    buffers: &mut Buffers,
    manager: &HttpManager,
    connection: &Connection,
    rewrite: &mut Rewrite<'_>,
    changes: &Changes<'_>,
    time_limit: Option<Duration>,
) {
    rewrite.sent_at = Instant::now();
    let mut out = std::mem::take(&mut buffers.request_out);
    let head = buffers.request_in.head();
    let request = &buffers.request;
    let changes = changes
        .request
        .settle(|name| request.fields.get(head, name).is_some());
    out.extend_from_slice(request.method.of_head(head));
    out.push(b' ');
    let asked_host = rewrite
        .default_host
        .unwrap_or_else(|| request.authority.of_head(head));
    if request.connect {
        out.extend_from_slice(rewrite.host.unwrap_or(asked_host));
    } else {
        out.extend_from_slice(rewrite.path.as_deref().unwrap_or_else(|| path(buffers)));
    }
    out.extend_from_slice(b" HTTP/1.1\r\n");
    reply::header(b"host", rewrite.host.unwrap_or(asked_host), &mut out);
    let mut forwarded_proto = false;
    for field in &request.fields.fields {
        let (name, value) = (field.name.of_head(head), field.value.of_head(head));
        let passes = match field.kind {
            FieldKind::Other
            | FieldKind::Server
            | FieldKind::Date
            | FieldKind::ServiceTime
            | FieldKind::ForwardedFor => true,
            FieldKind::ContentLength => !request.connect,
            FieldKind::Upgrade => rewrite.tunnel == Some(Tunnel::Upgrade),
            FieldKind::AttemptCount => !rewrite.tell_attempt.0,
            FieldKind::PeerMetadata => rewrite.reporting.is_none(),
            FieldKind::RequestId => !rewrite.made_id,
            FieldKind::ForwardedProto => {
                let known = value.eq_ignore_ascii_case(b"http") || value.eq_ignore_ascii_case(b"https");
                let first = !forwarded_proto;
                forwarded_proto |= known;
                known && first
            }
            FieldKind::Te => value.eq_ignore_ascii_case(b"trailers"),
            _ => false,
        };
        let underscored = manager.underscores == Underscores::Drop && name.contains(&b'_');
        if passes && !underscored && !changes.drops(name) {
            reply::header(name, value, &mut out);
        }
    }
    if !forwarded_proto && !changes.drops(b"x-forwarded-proto") {
        let scheme: &[u8] = if connection.tls { b"https" } else { b"http" };
        reply::header(b"x-forwarded-proto", scheme, &mut out);
    }
    if !changes.drops(b"x-forwarded-client-cert") {
        client_cert::write(manager.policy.client_cert, connection, request, head, &mut out);
    }
    if rewrite.tell_attempt.0 && !changes.drops(b"x-envoy-attempt-count") {
        reply::header_number(b"x-envoy-attempt-count", u64::from(rewrite.attempt), &mut out);
    }
    if rewrite.made_id && !changes.drops(b"x-request-id") {
        reply::header(b"x-request-id", &rewrite.request_id, &mut out);
    }
    if let Some(reporting) = rewrite
        .reporting
        .filter(|r| rewrite.to_mesh && r.role == Role::Source)
    {
        peer_metadata(reporting, &mut out);
    }
    if !manager.policy.suppress_envoy_headers {
        envoy_headers(buffers, rewrite, &changes, time_limit, asked_host, &mut out);
    }
    if request.fields.framing == Framing::Chunked {
        out.extend_from_slice(b"transfer-encoding: chunked\r\n");
    }
    if rewrite.tunnel == Some(Tunnel::Upgrade) {
        out.extend_from_slice(UPGRADE_LINE);
    }
    changes.write(&mut out);
    out.extend_from_slice(b"\r\n");
    buffers.request_out = out;
}

/// Tells the other end who this one is.
fn peer_metadata(reporting: &Reporting, out: &mut Vec<u8>) {
    let (id, workload) = &reporting.pod.told;
    reply::header(b"x-envoy-peer-metadata", workload.as_bytes(), out);
    reply::header(b"x-envoy-peer-metadata-id", id.as_bytes(), out);
}

fn envoy_headers(
    buffers: &Buffers,
    rewrite: &Rewrite<'_>,
    changes: &Settled<'_>,
    time_limit: Option<Duration>,
    asked_host: &[u8],
    out: &mut Vec<u8>,
) {
    if let Some(limit) = time_limit.filter(|_| !changes.drops(b"x-envoy-expected-rq-timeout-ms")) {
        let ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        reply::header_number(b"x-envoy-expected-rq-timeout-ms", ms, out);
    }
    if rewrite.host.is_some() {
        reply::header(b"x-envoy-original-host", asked_host, out);
    }
    if rewrite.path.is_some() {
        reply::header(b"x-envoy-original-path", path(buffers), out);
    }
}

/// Writes the response head for the client into `response_out`.
pub(super) fn response_head(
    buffers: &mut Buffers,
    manager: &HttpManager,
    rewrite: &Rewrite<'_>,
    changes: &Changes<'_>,
    out_framing: Out,
    close: bool,
    date: &[u8],
) {
    let mut out = std::mem::take(&mut buffers.response_out);
    let head = buffers.response_in.head();
    let response = &buffers.response;
    let status = response.status;
    let changes = changes
        .response
        .settle(|name| response.fields.get(head, name).is_some());
    reply::status_line(status, &mut out);
    let (mut has_date, mut has_server) = (false, false);
    for field in &response.fields.fields {
        let (name, value) = (field.name.of_head(head), field.value.of_head(head));
        let passes = match field.kind {
            FieldKind::Other
            | FieldKind::EnvoyInternal
            | FieldKind::ClientCert
            | FieldKind::ForwardedFor
            | FieldKind::TimeoutMs => true,
            FieldKind::AttemptCount => !rewrite.tell_attempt.1,
            FieldKind::PeerMetadata => rewrite.reporting.is_none(),
            FieldKind::RequestId => !manager.request_id_in_response,
            FieldKind::ContentLength => status != 204 && !rewrite.tunnel_open,
            FieldKind::Upgrade => rewrite.tunnel_open && status == 101,
            FieldKind::Date => {
                has_date = true;
                true
            }
            FieldKind::Server => {
                has_server = true;
                manager.server_header != ServerHeader::Overwrite
            }
            FieldKind::ServiceTime => manager.policy.suppress_envoy_headers,
            _ => false,
        };
        if passes && !changes.drops(name) {
            reply::header(name, value, &mut out);
        }
    }
    let service_ms = rewrite
        .service_ms
        .filter(|_| !manager.policy.suppress_envoy_headers);
    if let Some(ms) = service_ms.filter(|_| !changes.drops(b"x-envoy-upstream-service-time")) {
        reply::header(b"x-envoy-upstream-service-time", &ms, &mut out);
    }
    if rewrite.tell_attempt.1 && !changes.drops(b"x-envoy-attempt-count") {
        reply::header_number(b"x-envoy-attempt-count", u64::from(rewrite.attempt), &mut out);
    }
    if let Some(reporting) = rewrite.reporting.filter(|r| r.role == Role::Destination)
        && buffers
            .request
            .fields
            .fields
            .iter()
            .any(|f| f.kind == FieldKind::PeerMetadata)
    {
        peer_metadata(reporting, &mut out);
    }
    changes.write(&mut out);
    if manager.request_id_in_response {
        let passed = buffers
            .request
            .fields
            .get(buffers.request_in.head(), b"x-request-id");
        let id = if rewrite.made_id {
            Some(rewrite.request_id.as_slice())
        } else {
            passed
        };
        if let Some(id) = id {
            reply::header(b"x-request-id", id, &mut out);
        }
    }
    if !has_date {
        reply::header(b"date", date, &mut out);
    }
    let own_server = match manager.server_header {
        ServerHeader::Overwrite => true,
        ServerHeader::AppendIfAbsent => !has_server,
        ServerHeader::PassThrough => false,
    };
    if own_server {
        reply::header(b"server", manager.server_name.as_bytes(), &mut out);
    }
    let had_chunks = response.fields.framing == Framing::Chunked && status != 204 && status != 304;
    if out_framing == Out::Chunked || (had_chunks && buffers.request.fields.http11) {
        out.extend_from_slice(b"transfer-encoding: chunked\r\n");
    }
    if rewrite.tunnel_open {
        if status == 101 {
            out.extend_from_slice(UPGRADE_LINE);
        }
    } else if close {
        out.extend_from_slice(b"connection: close\r\n");
    } else if !buffers.request.fields.http11 {
        out.extend_from_slice(b"connection: keep-alive\r\n");
    }
    out.extend_from_slice(b"\r\n");
    buffers.response_out = out;
}

/// Applies a route's response changes, and then `more`, to a head of the proxy's own (which ends `out`).
pub(super) fn change_local(levels: &[&HeaderChanges], more: &[AddHeader], out: &mut Vec<u8>) {
    let mut side = Side::default();
    for level in levels {
        side.level(&level.response_remove, &level.response_add);
    }
    side.steps.extend(more.iter().map(Step::Add));
    if side.steps.is_empty() {
        return;
    }
    let text = std::mem::take(out);
    let lines: Vec<&[u8]> = text.split(|b| *b == b'\n').filter(|l| l.len() > 1).collect();
    let name = |line: &[u8]| {
        line.iter()
            .position(|b| *b == b':')
            .map(|colon| line[..colon].to_vec())
    };
    let names: Vec<Option<Vec<u8>>> = lines.iter().map(|l| name(l)).collect();
    let settled = side.settle(|wanted| names.iter().flatten().any(|n| n == wanted));
    for (index, (line, name)) in lines.iter().zip(&names).enumerate() {
        if index == 0 || !name.as_ref().is_some_and(|n| settled.drops(n)) {
            out.extend_from_slice(line);
            out.push(b'\n');
        }
    }
    settled.write(out);
    out.extend_from_slice(b"\r\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_id_is_a_version_4_uuid() {
        let id = uuid();
        let text = std::str::from_utf8(&id).unwrap();
        let parts: Vec<usize> = text.split('-').map(str::len).collect();
        assert_eq!(parts, [8, 4, 4, 4, 12]);
        assert_eq!(id[14], b'4');
        assert!(b"89ab".contains(&id[19]));
        assert_ne!(id, uuid());
    }

    #[test]
    fn a_grpc_timeout_has_digits_and_a_unit() {
        for (text, limit) in [
            ("1S", Some(Duration::from_secs(1))),
            ("20m", Some(Duration::from_millis(20))),
            ("99999999H", Some(Duration::from_secs(99_999_999 * 3600))),
            ("7u", Some(Duration::from_micros(7))),
            ("123456789S", None),
            ("S", None),
            ("5", None),
            ("-5S", None),
            ("", None),
        ] {
            assert_eq!(grpc_timeout(text.as_bytes()), limit, "{text}");
        }
    }

    fn add(name: &str, value: &str, how: AddHow) -> AddHeader {
        AddHeader {
            name: name.into(),
            value: value.into(),
            template: None,
            how,
        }
    }

    #[test]
    fn changes_are_made_level_by_level() {
        let inner = HeaderChanges {
            response_add: vec![
                add("x-a", "inner", AddHow::Append),
                add("x-b", "1", AddHow::IfAbsent),
            ],
            response_remove: vec![b"x-gone".to_vec()],
            ..HeaderChanges::default()
        };
        let outer = HeaderChanges {
            response_add: vec![
                add("x-a", "outer", AddHow::Overwrite),
                add("x-c", "1", AddHow::OverwriteIfExists),
            ],
            ..HeaderChanges::default()
        };
        let mut out = b"HTTP/1.1 200 OK\r\nx-gone: 1\r\nx-b: 0\r\n\r\n".to_vec();
        change_local(&[&inner, &outer], &[], &mut out);
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "HTTP/1.1 200 OK\r\nx-b: 0\r\nx-a: outer\r\n\r\n"
        );
    }
}
