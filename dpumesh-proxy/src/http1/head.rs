//! A message head, parsed in place: spans into the read buffer, names lower-cased where they stand.
//!
//! httparse splits the lines; what RFC 9112 lets a lenient reader repair is refused here: bare LF, a line folded over
//! two, space around the colon, two lengths, a length beside a transfer coding, any transfer coding but one `chunked`,
//! a transfer coding in HTTP/1.0, two hosts, and a request target that is not plain ASCII.

use std::fmt;
use std::mem::MaybeUninit;

/// A range of the head.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Span {
    start: u32,
    end: u32,
}

impl Span {
    fn of(whole: &[u8], part: &[u8]) -> Self {
        let start = (part.as_ptr() as usize).wrapping_sub(whole.as_ptr() as usize);
        debug_assert!(part.is_empty() || start + part.len() <= whole.len());
        if part.is_empty() {
            Self::default()
        } else {
            Self {
                start: start as u32,
                end: (start + part.len()) as u32,
            }
        }
    }

    /// The octets in the head this span was made from.
    #[inline]
    pub fn of_head(self, head: &[u8]) -> &[u8] {
        &head[self.start as usize..self.end as usize]
    }

    /// Length, octets.
    #[inline]
    pub fn len(self) -> usize {
        (self.end - self.start) as usize
    }

    /// Whether it spans nothing.
    #[inline]
    pub fn is_empty(self) -> bool {
        self.start == self.end
    }

    fn cut(self, front: usize) -> Self {
        Self {
            start: self.start + front as u32,
            end: self.end,
        }
    }

    fn shorten(self, len: usize) -> Self {
        Self {
            start: self.start,
            end: self.start + len as u32,
        }
    }
}

/// A header line.
#[derive(Debug, Clone, Copy)]
pub struct Field {
    /// The name, lower case.
    pub name: Span,
    /// The value without surrounding blanks.
    pub value: Span,
    /// What it is to the proxy.
    pub kind: FieldKind,
}

/// Headers the proxy knows by sight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FieldKind {
    /// Passed on.
    Other,
    /// `host`
    Host,
    /// `content-length`
    ContentLength,
    /// Belongs to this hop: `connection` and what it names, `keep-alive`, `proxy-connection`, `transfer-encoding`,
    /// `upgrade`, `trailer`… Never passed on.
    Hop,
    /// `connection`
    Connection,
    /// `expect: 100-continue`
    ExpectContinue,
    /// `upgrade`
    Upgrade,
    /// `transfer-encoding`
    TransferEncoding,
    /// `te`
    Te,
    /// `x-forwarded-proto`
    ForwardedProto,
    /// `x-request-id`
    RequestId,
    /// `x-envoy-*` that only Envoys among themselves set, or that this hop sets anew. Left out of requests.
    EnvoyInternal,
    /// `x-forwarded-client-cert`
    ClientCert,
    /// `x-forwarded-for`
    ForwardedFor,
    /// `x-envoy-peer-metadata` and `x-envoy-peer-metadata-id`
    PeerMetadata,
    /// `x-envoy-attempt-count`
    AttemptCount,
    /// `x-envoy-upstream-rq-timeout-ms`
    TimeoutMs,
    /// `x-envoy-upstream-service-time`
    ServiceTime,
    /// `server`
    Server,
    /// `date`
    Date,
}

/// How long the body is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Framing {
    /// No body.
    #[default]
    None,
    /// So many octets.
    Length(u64),
    /// Chunked.
    Chunked,
    /// Until the connection closes (responses only).
    Close,
}

/// Why a head was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Not HTTP/1.x, or ambiguous.
    Bad(&'static str),
    /// Too large, or too many headers.
    TooLarge,
    /// HTTP/2 preface or an unknown version.
    Version,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bad(reason) => f.write_str(reason),
            Self::TooLarge => f.write_str("request header fields too large"),
            Self::Version => f.write_str("HTTP version not supported"),
        }
    }
}

/// Most header lines a head may have, whatever the configuration says.
pub const MOST_FIELDS: usize = 256;

/// Looks for the end of a head in a stream that comes in parts.
#[derive(Debug, Default)]
pub struct Scan {
    seen: usize,
    line: usize,
}

impl Scan {
    /// The length of the head at the front of `data`, if it is complete. `data` is what was given before plus more.
    ///
    /// # Errors
    /// A bare LF; empty lines before the first line are refused as well.
    pub fn find(&mut self, data: &[u8]) -> Result<Option<usize>, Refusal> {
        for at in memchr::memchr_iter(b'\n', &data[self.seen..]) {
            let at = self.seen + at;
            if at == 0 || data[at - 1] != b'\r' {
                return Err(Refusal::Bad("a line that ends with a bare LF"));
            }
            if at - self.line == 1 {
                if self.line == 0 {
                    return Err(Refusal::Bad("an empty line before the message"));
                }
                *self = Self::default();
                return Ok(Some(at + 1));
            }
            self.line = at + 1;
        }
        self.seen = data.len();
        Ok(None)
    }
}

/// What both kinds of head have.
#[derive(Debug, Default)]
pub struct Fields {
    /// Lines in order.
    pub fields: Vec<Field>,
    /// The body.
    pub framing: Framing,
    /// HTTP/1.1 (else 1.0).
    pub http11: bool,
    /// `connection: close` was there.
    pub close: bool,
    /// `connection: keep-alive` was there.
    pub keep_alive: bool,
    names_hops: bool,
}

impl Fields {
    /// The first value of a header, by its lower-case name.
    pub fn get<'a>(&self, head: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
        self.fields
            .iter()
            .find(|f| f.name.of_head(head) == name)
            .map(|f| f.value.of_head(head))
    }

    /// Whether the connection may serve another message afterwards, as far as this head says.
    pub fn persistent(&self) -> bool {
        !self.close && (self.http11 || self.keep_alive)
    }

    /// Takes all lines of a name (lower case) out: nothing sees them any more.
    pub fn remove(&mut self, head: &[u8], name: &[u8]) {
        self.fields.retain(|f| f.name.of_head(head) != name);
    }

    /// Adds a line whose name (lower case) and value now stand in the head, from `at` on, one behind the other.
    pub(crate) fn add(&mut self, at: usize, name: &[u8], value: usize) {
        let (start, middle) = (at as u32, (at + name.len()) as u32);
        let end = middle + value as u32;
        self.fields.push(Field {
            name: Span { start, end: middle },
            value: Span { start: middle, end },
            kind: kind(name),
        });
    }

    fn clear(&mut self) {
        self.fields.clear();
        self.framing = Framing::None;
        (self.http11, self.close, self.keep_alive, self.names_hops) = (false, false, false, false);
    }
}

/// A request head.
#[derive(Debug, Default)]
pub struct RequestHead {
    /// Header lines and framing.
    pub fields: Fields,
    /// The method.
    pub method: Span,
    /// The path with its query: `/…`, `*`, or empty for CONNECT.
    pub path: Span,
    /// The authority: from an absolute target or CONNECT, else from `host`.
    pub authority: Span,
    /// Whether the target was absolute.
    pub absolute: bool,
    /// `expect: 100-continue`.
    pub expects_continue: bool,
    /// `connection: upgrade` with an `upgrade` header other than `h2c`.
    pub upgrade: bool,
    /// Whether it is CONNECT.
    pub connect: bool,
    /// Whether `host` was there.
    pub has_host: bool,
    /// The path with its query in its one form, where [`super::path`] had to change it.
    pub normalized: Option<Vec<u8>>,
}

/// A response head.
#[derive(Debug, Default)]
pub struct ResponseHead {
    /// Header lines and framing (as if the request had been a GET).
    pub fields: Fields,
    /// The status.
    pub status: u16,
}

impl RequestHead {
    /// Parses `head`, which ends with the empty line.
    ///
    /// # Errors
    /// Everything named at the top of this file.
    pub fn parse(&mut self, head: &mut [u8]) -> Result<(), Refusal> {
        self.fields.clear();
        self.normalized = None;
        (self.method, self.path, self.authority) = Default::default();
        (self.absolute, self.expects_continue, self.upgrade, self.has_host) = (false, false, false, false);
        self.connect = false;
        let mut slots = [const { MaybeUninit::uninit() }; MOST_FIELDS];
        let mut request = httparse::Request::new(&mut []);
        let status = request
            .parse_with_uninit_headers(head, &mut slots)
            .map_err(refusal)?;
        let (Some(method), Some(target), Some(version)) = (request.method, request.path, request.version)
        else {
            return Err(Refusal::Bad("no request line"));
        };
        if status != httparse::Status::Complete(head.len()) {
            return Err(Refusal::Bad("the head ends early"));
        }
        self.fields.http11 = version == 1;
        self.method = Span::of(head, method.as_bytes());
        let target_span = Span::of(head, target.as_bytes());
        add_fields(&mut self.fields.fields, head, request.headers)?;
        self.target(head, target_span)?;
        lower_names(&self.fields.fields, head);
        self.classify(head)
    }

    fn target(&mut self, head: &[u8], span: Span) -> Result<(), Refusal> {
        let target = span.of_head(head);
        if !target.iter().all(u8::is_ascii_graphic) {
            return Err(Refusal::Bad("a request target that is not visible ASCII"));
        }
        if target.contains(&b'#') {
            return Err(Refusal::Bad("a request target with a fragment"));
        }
        let method = self.method.of_head(head);
        if method == b"CONNECT" {
            (self.authority, self.absolute, self.connect) = (span, true, true);
            return if is_authority(target) {
                Ok(())
            } else {
                Err(Refusal::Bad("CONNECT without an authority"))
            };
        }
        if target[0] == b'/' {
            self.path = span;
            return Ok(());
        }
        if target == b"*" && method == b"OPTIONS" {
            self.path = span;
            return Ok(());
        }
        let lower = target
            .get(..8)
            .map(<[u8]>::to_ascii_lowercase)
            .unwrap_or_default();
        let front = match () {
            () if lower.starts_with(b"http://") => 7,
            () if lower == b"https://" => 8,
            () => return Err(Refusal::Bad("a request target that is neither a path nor a URI")),
        };
        let rest = &target[front..];
        let end = rest
            .iter()
            .position(|b| *b == b'/' || *b == b'?')
            .unwrap_or(rest.len());
        if !is_authority(&rest[..end]) || rest.get(end) == Some(&b'?') {
            return Err(Refusal::Bad("a request target with a malformed authority"));
        }
        self.absolute = true;
        self.authority = span.cut(front).shorten(end);
        self.path = span.cut(front + end);
        Ok(())
    }

    fn classify(&mut self, head: &[u8]) -> Result<(), Refusal> {
        let mut length = Length::default();
        let mut connection_upgrade = false;
        let mut upgrade_header = false;
        for field in &mut self.fields.fields {
            let (name, value) = (field.name.of_head(head), field.value.of_head(head));
            field.kind = kind(name);
            match field.kind {
                FieldKind::Host => {
                    if self.has_host {
                        return Err(Refusal::Bad("two host headers"));
                    }
                    self.has_host = true;
                    if !value.is_empty() && !is_authority(value) {
                        return Err(Refusal::Bad("a malformed host"));
                    }
                    if !self.absolute {
                        self.authority = field.value;
                    }
                }
                FieldKind::ContentLength => length.content_length(value)?,
                FieldKind::TransferEncoding => length.transfer_encoding(value)?,
                FieldKind::Connection => {
                    let said = connection(value);
                    self.fields.close |= said.close;
                    self.fields.keep_alive |= said.keep_alive;
                    self.fields.names_hops |= said.others;
                    connection_upgrade |= said.upgrade;
                }
                FieldKind::Upgrade => upgrade_header |= !value.eq_ignore_ascii_case(b"h2c"),
                FieldKind::ExpectContinue => {
                    if value.eq_ignore_ascii_case(b"100-continue") {
                        self.expects_continue = true;
                    } else {
                        field.kind = FieldKind::Other;
                    }
                }
                _ => {}
            }
        }
        self.upgrade = connection_upgrade && upgrade_header;
        self.fields.framing = length.framing(self.fields.http11, Framing::None)?;
        mark_hops(&mut self.fields, head);
        Ok(())
    }
}

impl ResponseHead {
    /// Parses `head`, which ends with the empty line.
    ///
    /// # Errors
    /// As for requests.
    pub fn parse(&mut self, head: &mut [u8]) -> Result<(), Refusal> {
        self.fields.clear();
        let mut slots = [const { MaybeUninit::uninit() }; MOST_FIELDS];
        let mut response = httparse::Response::new(&mut []);
        let config = httparse::ParserConfig::default();
        let status = config
            .parse_response_with_uninit_headers(&mut response, head, &mut slots)
            .map_err(refusal)?;
        let (Some(code), Some(version)) = (response.code, response.version) else {
            return Err(Refusal::Bad("no status line"));
        };
        if status != httparse::Status::Complete(head.len()) {
            return Err(Refusal::Bad("the head ends early"));
        }
        if !(100..=999).contains(&code) {
            return Err(Refusal::Bad("a status below 100"));
        }
        self.fields.http11 = version == 1;
        self.status = code;
        add_fields(&mut self.fields.fields, head, response.headers)?;
        lower_names(&self.fields.fields, head);
        let mut length = Length::default();
        for field in &mut self.fields.fields {
            let (name, value) = (field.name.of_head(head), field.value.of_head(head));
            field.kind = kind(name);
            match field.kind {
                FieldKind::ContentLength => length.content_length(value)?,
                FieldKind::TransferEncoding => length.transfer_encoding(value)?,
                FieldKind::Connection => {
                    let said = connection(value);
                    self.fields.close |= said.close;
                    self.fields.keep_alive |= said.keep_alive;
                    self.fields.names_hops |= said.others;
                }
                FieldKind::Te | FieldKind::Host | FieldKind::ExpectContinue | FieldKind::ForwardedProto => {
                    field.kind = FieldKind::Other;
                }
                _ => {}
            }
        }
        self.fields.framing = length.framing(self.fields.http11, Framing::Close)?;
        mark_hops(&mut self.fields, head);
        Ok(())
    }
}

fn refusal(error: httparse::Error) -> Refusal {
    match error {
        httparse::Error::TooManyHeaders => Refusal::TooLarge,
        httparse::Error::Version => Refusal::Version,
        httparse::Error::HeaderName => Refusal::Bad("a malformed header name"),
        httparse::Error::HeaderValue => Refusal::Bad("a malformed header value"),
        httparse::Error::NewLine => Refusal::Bad("a malformed line end"),
        _ => Refusal::Bad("a malformed first line"),
    }
}

fn add_fields(fields: &mut Vec<Field>, head: &[u8], headers: &[httparse::Header<'_>]) -> Result<(), Refusal> {
    for header in headers {
        let value = trim(header.value);
        if value.iter().any(|b| (*b < 0x20 && *b != b'\t') || *b == 0x7f) {
            return Err(Refusal::Bad("a control character in a header value"));
        }
        let name = Span::of(head, header.name.as_bytes());
        fields.push(Field {
            name,
            value: Span::of(head, value),
            kind: FieldKind::Other,
        });
    }
    Ok(())
}

fn lower_names(fields: &[Field], head: &mut [u8]) {
    for field in fields {
        head[field.name.start as usize..field.name.end as usize].make_ascii_lowercase();
    }
}

fn trim(mut value: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', rest @ ..] = value {
        value = rest;
    }
    while let [rest @ .., b' ' | b'\t'] = value {
        value = rest;
    }
    value
}

#[inline]
fn kind(name: &[u8]) -> FieldKind {
    match name.len() {
        2 if name == b"te" => FieldKind::Te,
        4 if name == b"host" => FieldKind::Host,
        4 if name == b"date" => FieldKind::Date,
        6 if name == b"expect" => FieldKind::ExpectContinue,
        6 if name == b"server" => FieldKind::Server,
        7 if name == b"upgrade" => FieldKind::Upgrade,
        7 if name == b"trailer" => FieldKind::Hop,
        10 if name == b"connection" => FieldKind::Connection,
        10 if name == b"keep-alive" => FieldKind::Hop,
        12 if name == b"x-request-id" => FieldKind::RequestId,
        14 if name == b"content-length" => FieldKind::ContentLength,
        14 if name == b"http2-settings" => FieldKind::Hop,
        16 if name == b"proxy-connection" => FieldKind::Hop,
        17 if name == b"transfer-encoding" => FieldKind::TransferEncoding,
        17 if name == b"x-forwarded-proto" => FieldKind::ForwardedProto,
        15 if name == b"x-forwarded-for" => FieldKind::ForwardedFor,
        23 if name == b"x-forwarded-client-cert" => FieldKind::ClientCert,
        _ if name.starts_with(b"x-envoy-") => envoy_kind(&name[8..]),
        _ => FieldKind::Other,
    }
}

fn envoy_kind(rest: &[u8]) -> FieldKind {
    match rest {
        b"upstream-rq-timeout-ms" => FieldKind::TimeoutMs,
        b"upstream-service-time" => FieldKind::ServiceTime,
        b"attempt-count" => FieldKind::AttemptCount,
        b"peer-metadata" | b"peer-metadata-id" => FieldKind::PeerMetadata,
        b"internal"
        | b"expected-rq-timeout-ms"
        | b"retry-on"
        | b"retry-grpc-on"
        | b"max-retries"
        | b"is-timeout-retry"
        | b"upstream-rq-per-try-timeout-ms"
        | b"upstream-alt-stat-name"
        | b"hedge-on-per-try-timeout"
        | b"retriable-status-codes"
        | b"retriable-header-names"
        | b"upstream-rq-timeout-alt-response"
        | b"decorator-operation"
        | b"downstream-service-cluster"
        | b"downstream-service-node" => FieldKind::EnvoyInternal,
        _ => FieldKind::Other,
    }
}

#[derive(Default)]
struct Said {
    close: bool,
    keep_alive: bool,
    upgrade: bool,
    others: bool,
}

fn connection(value: &[u8]) -> Said {
    let mut said = Said::default();
    for option in value.split(|b| *b == b',').map(trim) {
        match option {
            o if o.eq_ignore_ascii_case(b"close") => said.close = true,
            o if o.eq_ignore_ascii_case(b"keep-alive") => said.keep_alive = true,
            o if o.eq_ignore_ascii_case(b"upgrade") => said.upgrade = true,
            o => said.others |= !o.is_empty(),
        }
    }
    said
}

/// Headers that `connection` names belong to this hop, except those a message cannot do without.
fn mark_hops(fields: &mut Fields, head: &[u8]) {
    if !fields.names_hops {
        return;
    }
    for index in 0..fields.fields.len() {
        if fields.fields[index].kind != FieldKind::Connection {
            continue;
        }
        let value = fields.fields[index].value;
        for option in value.of_head(head).split(|b| *b == b',').map(trim) {
            for field in &mut fields.fields {
                let named = field.name.of_head(head).eq_ignore_ascii_case(option);
                if named && field.kind == FieldKind::Other {
                    field.kind = FieldKind::Hop;
                }
            }
        }
    }
}

/// Gathers what the head says of the body's length.
#[derive(Default)]
struct Length {
    content_length: Option<u64>,
    chunked: bool,
}

impl Length {
    fn content_length(&mut self, value: &[u8]) -> Result<(), Refusal> {
        if value.is_empty() || value.len() > 19 || !value.iter().all(u8::is_ascii_digit) {
            return Err(Refusal::Bad("a malformed content-length"));
        }
        let length = value.iter().fold(0u64, |n, d| n * 10 + u64::from(d - b'0'));
        if self.content_length.replace(length).is_some() {
            return Err(Refusal::Bad("two content-length headers"));
        }
        Ok(())
    }

    fn transfer_encoding(&mut self, value: &[u8]) -> Result<(), Refusal> {
        if self.chunked || !value.eq_ignore_ascii_case(b"chunked") {
            return Err(Refusal::Bad("a transfer-encoding other than one chunked"));
        }
        self.chunked = true;
        Ok(())
    }

    fn framing(&self, http11: bool, unsaid: Framing) -> Result<Framing, Refusal> {
        match (self.chunked, self.content_length) {
            (true, Some(_)) => Err(Refusal::Bad("content-length beside transfer-encoding")),
            (true, None) if !http11 => Err(Refusal::Bad("transfer-encoding in HTTP/1.0")),
            (true, None) => Ok(Framing::Chunked),
            (false, Some(0)) => Ok(if unsaid == Framing::None {
                Framing::None
            } else {
                Framing::Length(0)
            }),
            (false, Some(length)) => Ok(Framing::Length(length)),
            (false, None) => Ok(unsaid),
        }
    }
}

/// `host [ ":" port ]` of RFC 3986, without user information.
fn is_authority(text: &[u8]) -> bool {
    let (host, port) = match text.iter().rposition(|b| *b == b':') {
        Some(colon) if !text[colon..].contains(&b']') => (&text[..colon], &text[colon + 1..]),
        _ => (text, b"".as_slice()),
    };
    let name = |b: &u8| b.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=%".contains(b);
    let literal = |b: &u8| b.is_ascii_hexdigit() || *b == b':' || *b == b'.';
    let host_ok = match host {
        [b'[', inner @ .., b']'] => !inner.is_empty() && inner.iter().all(literal),
        host => !host.is_empty() && host.iter().all(name),
    };
    host_ok && port.len() <= 5 && port.iter().all(u8::is_ascii_digit)
}

#[cfg(test)]
mod tests {
    use super::*;

    const REQUEST: &[u8] =
        b"POST /a?b HTTP/1.1\r\nHost: h:80\r\nContent-Length: 5\r\nConnection: close, X-Hop\r\n\
        X-Hop: 1\r\nTE: trailers\r\nX-Envoy-Max-Retries: 1\r\n\r\n";
    const RESPONSE: &[u8] =
        b"HTTP/1.1 200 Fine\r\nContent-Type: a\r\nTransfer-Encoding: chunked\r\nServer: x\r\n\r\n";

    #[test]
    fn a_request_head_is_found_only_when_it_is_whole() {
        for length in 0..REQUEST.len() {
            assert_eq!(Scan::default().find(&REQUEST[..length]), Ok(None), "{length}");
            assert!(
                RequestHead::default()
                    .parse(&mut REQUEST[..length].to_vec())
                    .is_err(),
                "{length}"
            );
        }
        assert_eq!(Scan::default().find(REQUEST), Ok(Some(REQUEST.len())));
        let mut scan = Scan::default();
        let found =
            (0..=REQUEST.len()).find(|length| scan.find(&REQUEST[..*length]) == Ok(Some(REQUEST.len())));
        assert_eq!(found, Some(REQUEST.len()));
    }

    #[test]
    fn a_response_head_cut_at_any_length_is_refused() {
        for length in 0..RESPONSE.len() {
            assert!(
                ResponseHead::default()
                    .parse(&mut RESPONSE[..length].to_vec())
                    .is_err(),
                "{length}"
            );
        }
    }

    #[test]
    fn a_request_is_classified() {
        let (mut head, mut request) = (REQUEST.to_vec(), RequestHead::default());
        request.parse(&mut head).unwrap();
        let kinds: Vec<FieldKind> = request.fields.fields.iter().map(|f| f.kind).collect();
        use FieldKind::{Connection, ContentLength, EnvoyInternal, Hop, Host, Te};
        assert_eq!(kinds, [Host, ContentLength, Connection, Hop, Te, EnvoyInternal]);
        assert_eq!(request.fields.framing, Framing::Length(5));
        assert!(!request.fields.persistent());
        assert_eq!(request.authority.of_head(&head), b"h:80");
        assert_eq!(request.path.of_head(&head), b"/a?b");
        assert_eq!(request.fields.get(&head, b"x-hop"), Some(b"1".as_slice()));
    }

    #[test]
    fn a_response_is_classified() {
        let (mut head, mut response) = (RESPONSE.to_vec(), ResponseHead::default());
        response.parse(&mut head).unwrap();
        assert_eq!(
            (response.status, response.fields.framing),
            (200, Framing::Chunked)
        );
        assert!(response.fields.persistent());
        let mut old = b"HTTP/1.0 200 OK\r\n\r\n".to_vec();
        response.parse(&mut old).unwrap();
        assert_eq!(response.fields.framing, Framing::Close);
        assert!(!response.fields.persistent());
    }

    #[test]
    fn connection_cannot_name_what_frames_the_message() {
        let mut head =
            b"POST / HTTP/1.1\r\nHost: a\r\nConnection: content-length, host\r\nContent-Length: 5\r\n\r\n"
                .to_vec();
        let mut request = RequestHead::default();
        request.parse(&mut head).unwrap();
        assert_eq!(request.fields.framing, Framing::Length(5));
        assert!(
            request
                .fields
                .fields
                .iter()
                .any(|f| f.kind == FieldKind::ContentLength)
        );
    }

    proptest::proptest! {
        #[test]
        fn random_octets_never_panic(octets in proptest::collection::vec(proptest::num::u8::ANY, 0..300)) {
            let _ = Scan::default().find(&octets);
            let _ = RequestHead::default().parse(&mut octets.clone());
            let _ = ResponseHead::default().parse(&mut octets.clone());
        }

        #[test]
        fn a_good_head_with_octets_changed_never_panics(at in 0..REQUEST.len(), octet: u8) {
            let mut head = REQUEST.to_vec();
            head[at] = octet;
            let _ = RequestHead::default().parse(&mut head);
        }
    }
}
