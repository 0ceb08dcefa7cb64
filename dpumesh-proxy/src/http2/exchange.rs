//! A client's stream as a connection with one exchange: reading gives its request as text, what is written is its response.
//!
//! CONNECT, and with `:protocol` (RFC 8441) what HTTP/1.1 calls an upgrade, make a tunnel of it: once the response has said so, octets
//! go both ways as they are, and an end of the stream is an end of the connection.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::ext::Protocol;
use h2::server::SendResponse;
use h2::{Reason, RecvStream};
use http::{HeaderMap, Method, Request, Response, StatusCode, header};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::backlog::Backlog;
use super::incoming::{Incoming, Told, is_grpc, put_field};
use super::outgoing::Outgoing;
use super::{Reset, broken};

/// A client's stream.
pub struct Exchange {
    incoming: Incoming,
    outgoing: Outgoing,
    response: SendResponse<Bytes>,
    is_head: bool,
    tunnel: Option<Tunnel>,
}

/// What a stream may become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tunnel {
    /// Asked for with CONNECT, opened by 2xx.
    Connect,
    /// Asked for with CONNECT and `:protocol`, in text an upgrade of HTTP/1.1, opened by 101.
    Upgrade,
}

impl fmt::Debug for Exchange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stream = self.response.stream_id();
        f.debug_struct("Exchange").field("stream", &stream).finish()
    }
}

impl Exchange {
    /// A stream whose request head has come. What it answers waits for room in `backlog`, its connection's.
    ///
    /// # Errors
    /// The head can be read in two ways, and is to be answered with a reset: two authorities, several content lengths, fields of
    /// one hop. Malformed names, values, and pseudo-header fields have been refused by `h2`, which also holds bodies to their length.
    pub(super) fn new(
        request: Request<RecvStream>,
        response: SendResponse<Bytes>,
        backlog: Arc<Backlog>,
    ) -> Result<Self, (SendResponse<Bytes>, &'static str)> {
        let (parts, body) = request.into_parts();
        let mut head = Vec::with_capacity(512);
        let told = match write_head(&parts, body.is_end_stream(), &mut head) {
            Ok(told) => told,
            Err(reason) => return Err((response, reason)),
        };
        Ok(Self {
            incoming: Incoming::new(head, body, told),
            outgoing: Outgoing::within(backlog),
            response,
            is_head: parts.method == Method::HEAD,
            tunnel: (parts.method == Method::CONNECT).then(|| {
                if parts.extensions.get::<Protocol>().is_some() {
                    Tunnel::Upgrade
                } else {
                    Tunnel::Connect
                }
            }),
        })
    }

    /// Ready when the client has given the stream up, or its connection is gone.
    pub fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        let reset = match self.outgoing.stream() {
            Some(stream) => ready!(stream.poll_reset(cx)),
            None => ready!(self.response.poll_reset(cx)),
        };
        Poll::Ready(match reset {
            Ok(reason) => io::Error::other(Reset { reason, ours: false }),
            Err(error) => broken(error),
        })
    }

    /// Gives a response up that is not complete: the client must not take what it has for the whole.
    fn give_up(&mut self) {
        if self.outgoing.is_over() {
            return;
        }
        match self.outgoing.stream() {
            Some(stream) => stream.send_reset(Reason::INTERNAL_ERROR),
            None => self.response.send_reset(Reason::INTERNAL_ERROR),
        }
        self.outgoing.end();
    }

    fn respond(&mut self, data: &[u8]) -> io::Result<usize> {
        let (used, head) = self.outgoing.head(data)?;
        let Some(head) = head else {
            return Ok(used);
        };
        let status = head.line.get(9..12).and_then(|s| StatusCode::from_bytes(s).ok());
        let status = status.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
        let mut response = Response::new(());
        *response.status_mut() = status;
        *response.headers_mut() = head.fields;
        let opens = match self.tunnel {
            None => false,
            Some(Tunnel::Connect) => status.is_success(),
            Some(Tunnel::Upgrade) => status == StatusCode::SWITCHING_PROTOCOLS,
        };
        if opens {
            *response.status_mut() = if status.is_success() {
                status
            } else {
                StatusCode::OK
            };
            let stream = self.response.send_response(response, false).map_err(broken)?;
            self.outgoing.begin(stream);
            self.outgoing.open();
            return Ok(used);
        }
        if status.is_informational() {
            self.outgoing.again();
            self.response.send_informational(response).map_err(broken)?;
            return Ok(used);
        }
        let bodiless = self.is_head || matches!(status.as_u16(), 204 | 304);
        let ends = head.ends || bodiless;
        let stream = self.response.send_response(response, ends).map_err(broken)?;
        self.outgoing.begin(stream);
        if ends {
            self.outgoing.end();
        }
        Ok(used)
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        self.give_up();
    }
}

impl AsyncRead for Exchange {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, room: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.incoming.is_over() {
            let before = room.filled().len();
            let read = ready!(this.incoming.poll(cx, room));
            // Nothing more: the end came behind the last octet.
            if read.is_err() || room.filled().len() > before || !this.incoming.is_over() {
                return Poll::Ready(read);
            }
        }
        // The end is the end of the exchange, not of the request; before that there is only a reset to hear of.
        if this.outgoing.is_over() || this.outgoing.is_open() {
            return Poll::Ready(Ok(()));
        }
        this.poll_gone(cx).map(Err)
    }
}

impl AsyncWrite for Exchange {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.outgoing.awaits_head() {
            return Poll::Ready(this.respond(data));
        }
        this.outgoing.poll(cx, data)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.outgoing.is_open() {
            return Poll::Ready(this.outgoing.finish());
        }
        this.give_up();
        Poll::Ready(Ok(()))
    }
}

/// Writes a request's head; how its body is told.
fn write_head(parts: &http::request::Parts, ended: bool, out: &mut Vec<u8>) -> Result<Told, &'static str> {
    let fields = &parts.headers;
    let authority = authority(parts)?;
    let length = length(fields)?;
    let told = match length {
        _ if ended || parts.method == Method::CONNECT => Told::Plain,
        Some(_) if !is_grpc(fields) => Told::Plain,
        _ => Told::Chunked,
    };
    if let Some(te) = fields.get(header::TE)
        && te != "trailers"
    {
        return Err("te other than trailers");
    }
    let protocol = parts.extensions.get::<Protocol>().map(Protocol::as_str);
    if protocol.is_some_and(|p| p.is_empty() || !p.bytes().all(crate::http1::is_token)) {
        return Err("a :protocol that is no token");
    }
    let method = if protocol.is_some() {
        "GET"
    } else {
        parts.method.as_str()
    };
    out.extend_from_slice(method.as_bytes());
    out.push(b' ');
    if parts.method == Method::CONNECT && protocol.is_none() {
        out.extend_from_slice(authority);
    } else {
        let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
        out.extend_from_slice(path.as_bytes());
    }
    out.extend_from_slice(b" HTTP/1.1\r\n");
    put_field("host", authority, out);
    if let Some(protocol) = protocol {
        put_field("connection", b"upgrade", out);
        put_field("upgrade", protocol.as_bytes(), out);
    }
    put_cookies(fields, out);
    for (name, value) in fields {
        if name != header::HOST && name != header::COOKIE && name != header::CONTENT_LENGTH {
            put_field(name.as_str(), value.as_bytes(), out);
        }
    }
    match told {
        Told::Chunked => put_field("transfer-encoding", b"chunked", out),
        Told::Plain => {
            if let Some(length) = length {
                put_field("content-length", length, out);
            }
        }
    }
    out.extend_from_slice(b"\r\n");
    Ok(told)
}

/// `:authority`, or `host` without one; both must say the same.
fn authority(parts: &http::request::Parts) -> Result<&[u8], &'static str> {
    let mut hosts = parts.headers.get_all(header::HOST).iter();
    let host = hosts.next().map(http::HeaderValue::as_bytes);
    if hosts.next().is_some() {
        return Err("two host fields");
    }
    let authority = parts.uri.authority().map(|a| a.as_str().as_bytes());
    match (authority, host) {
        (Some(a), Some(h)) if !a.eq_ignore_ascii_case(h) => Err("host beside another :authority"),
        (Some(a), _) => Ok(a),
        (None, host) => Ok(host.unwrap_or_default()),
    }
}

fn length(fields: &HeaderMap) -> Result<Option<&[u8]>, &'static str> {
    let mut lengths = fields.get_all(header::CONTENT_LENGTH).iter();
    let length = lengths.next().map(http::HeaderValue::as_bytes);
    if lengths.next().is_some() {
        return Err("two content-length fields");
    }
    if fields.contains_key(header::TRANSFER_ENCODING) || fields.contains_key(header::CONNECTION) {
        return Err("a field of one hop");
    }
    Ok(length)
}

/// Cookies may come one by one and go on as one field (RFC 9113 §8.2.3).
fn put_cookies(fields: &HeaderMap, out: &mut Vec<u8>) {
    let mut cookies = fields.get_all(header::COOKIE).iter();
    let Some(first) = cookies.next() else {
        return;
    };
    out.extend_from_slice(b"cookie: ");
    out.extend_from_slice(first.as_bytes());
    for cookie in cookies {
        out.extend_from_slice(b"; ");
        out.extend_from_slice(cookie.as_bytes());
    }
    out.extend_from_slice(b"\r\n");
}
