//! A stream to an endpoint as a connection with one exchange: what is written is the request, reading gives its response.

use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use h2::{Reason, RecvStream};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{Method, Request, Response, Uri, header};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::broken;
use super::incoming::{Incoming, Told, is_grpc, put_field, put_fields};
use super::outgoing::{Head, Outgoing};
use super::pool::{InUse, Shared};
use crate::http1::reply;

/// A stream to an endpoint.
pub struct Call {
    connection: SendRequest<Bytes>,
    outgoing: Outgoing,
    answer: Answer,
    is_head: bool,
    /// It asks for a tunnel.
    connect: bool,
    /// The client speaks HTTP/2 as well: it needs no `content-length: 0` to know an end.
    for_http2: bool,
    in_use: InUse,
}

enum Answer {
    /// The request's head has not been sent.
    Unasked,
    /// It could not be sent.
    Never,
    Awaited(ResponseFuture),
    Coming(Incoming),
}

impl fmt::Debug for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Call").field("to", &self.in_use).finish()
    }
}

impl Call {
    /// One more stream on a connection; nothing is sent yet.
    pub(super) fn new(connection: SendRequest<Bytes>, shared: Rc<Shared>, for_http2: bool) -> Self {
        Self {
            connection,
            outgoing: Outgoing::default(),
            answer: Answer::Unasked,
            is_head: false,
            connect: false,
            for_http2,
            in_use: InUse::new(shared),
        }
    }

    /// Our end of the connection.
    pub fn local_addr(&self) -> Option<SocketAddr> {
        self.in_use.shared().local
    }

    /// The SPIFFE id that the endpoint's certificate has.
    pub fn principal(&self) -> Option<std::sync::Arc<str>> {
        self.in_use.shared().principal.clone()
    }

    fn ask(&mut self, data: &[u8]) -> io::Result<usize> {
        let (used, head) = self.outgoing.head(data)?;
        let Some(head) = head else {
            return Ok(used);
        };
        self.connect = head.line.starts_with(b"CONNECT ");
        let ends = head.ends && !self.connect;
        let request = request(head, self.in_use.shared().tls)?;
        self.is_head = request.method() == Method::HEAD;
        let (answer, stream) = self.connection.send_request(request, ends).map_err(broken)?;
        self.outgoing.begin(stream);
        if self.connect {
            self.outgoing.open();
        }
        self.answer = Answer::Awaited(answer);
        Ok(used)
    }

    fn begin_answer(&self, response: Response<RecvStream>) -> Incoming {
        let (parts, body) = response.into_parts();
        let mut head = Vec::with_capacity(512);
        reply::status_line(parts.status.as_u16(), &mut head);
        put_fields(&parts.headers, &mut head);
        let length = parts.headers.get(header::CONTENT_LENGTH);
        let bodiless = self.is_head || matches!(parts.status.as_u16(), 204 | 304);
        if self.connect && parts.status.is_success() {
            head.extend_from_slice(b"\r\n");
            return Incoming::new(head, body, Told::Plain);
        }
        let ended = body.is_end_stream();
        let told = match length {
            Some(_) if bodiless || ended || !is_grpc(&parts.headers) => Told::Plain,
            None if bodiless || (ended && !self.for_http2) => Told::Plain,
            _ => Told::Chunked,
        };
        match (told, length) {
            (Told::Chunked, _) => put_field("transfer-encoding", b"chunked", &mut head),
            (Told::Plain, Some(length)) => put_field("content-length", length.as_bytes(), &mut head),
            (Told::Plain, None) if bodiless => {}
            (Told::Plain, None) => put_field("content-length", b"0", &mut head),
        }
        head.extend_from_slice(b"\r\n");
        Incoming::new(head, body, told)
    }

    fn is_over(&self) -> bool {
        self.outgoing.is_over() && matches!(&self.answer, Answer::Coming(incoming) if incoming.is_over())
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        if self.is_over() {
            return;
        }
        if let Some(stream) = self.outgoing.stream() {
            stream.send_reset(Reason::CANCEL);
        }
    }
}

impl AsyncRead for Call {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, room: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if let Answer::Awaited(answer) = &mut this.answer {
            let answer = ready!(Pin::new(answer).poll(cx)).map_err(broken)?;
            this.answer = Answer::Coming(this.begin_answer(answer));
        }
        match &mut this.answer {
            Answer::Coming(incoming) => incoming.poll(cx, room),
            Answer::Never => Poll::Ready(Ok(())),
            // Writing comes first, and wakes the task.
            Answer::Unasked | Answer::Awaited(_) => Poll::Pending,
        }
    }
}

impl AsyncWrite for Call {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if !this.outgoing.awaits_head() {
            return this.outgoing.poll(cx, data);
        }
        let asked = match ready!(this.connection.poll_ready(cx)) {
            Ok(()) => this.ask(data),
            Err(error) => Err(broken(error)),
        };
        if asked.is_err() {
            this.answer = Answer::Never;
        }
        Poll::Ready(asked)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.outgoing.is_open() {
            return Poll::Ready(this.outgoing.finish());
        }
        Poll::Ready(Ok(()))
    }
}

/// The request of a head in text: `host` becomes `:authority`, `:scheme` is what the request came by.
fn request(mut head: Head, tls: bool) -> io::Result<Request<()>> {
    let refused = |what: &'static str| io::Error::new(io::ErrorKind::InvalidInput, what);
    let mut words = head.line.split(|b| *b == b' ');
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let method = Method::from_bytes(method).map_err(|_| refused("a method HTTP/2 cannot carry"))?;
    if method == Method::CONNECT {
        // Without scheme and path (RFC 9113, 8.5).
        let host = Authority::try_from(path).map_err(|_| refused("an authority HTTP/2 cannot carry"))?;
        head.fields.remove(header::HOST);
        let mut request = Request::new(());
        *request.method_mut() = method;
        *request.uri_mut() = Uri::from(host);
        *request.version_mut() = http::Version::HTTP_2;
        *request.headers_mut() = head.fields;
        return Ok(request);
    }
    let path = PathAndQuery::try_from(path).map_err(|_| refused("a path HTTP/2 cannot carry"))?;
    let host = head.fields.remove(header::HOST);
    let host = host.as_ref().map_or(b"".as_slice(), |h| h.as_bytes());
    let host = Authority::try_from(host).map_err(|_| refused("an authority HTTP/2 cannot carry"))?;
    let forwarded = head.fields.get("x-forwarded-proto").map(|v| v.as_bytes());
    let scheme = match forwarded {
        Some(b"https") => Scheme::HTTPS,
        Some(b"http") => Scheme::HTTP,
        _ if tls => Scheme::HTTPS,
        _ => Scheme::HTTP,
    };
    let uri = Uri::builder().scheme(scheme).authority(host).path_and_query(path);
    let mut request = Request::new(());
    *request.method_mut() = method;
    *request.uri_mut() = uri.build().map_err(io::Error::other)?;
    *request.version_mut() = http::Version::HTTP_2;
    *request.headers_mut() = head.fields;
    Ok(request)
}
