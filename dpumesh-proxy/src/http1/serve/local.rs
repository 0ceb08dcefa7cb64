//! What the proxy says by itself: refusals, direct responses, redirects, answers for endpoints; and the connection's end.

use std::borrow::Cow;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use tokio::io::AsyncWriteExt;
use tokio::time::timeout;

use super::{Outcome, Session};
use crate::http1::body::Flow;
use crate::http1::buffer::Buffer;
use crate::http1::head::{Framing, Refusal};
use crate::http1::{reply, rewrite};
use crate::route::{AddHeader, HeaderChanges};
use crate::stats::Http as Stat;
use crate::worker::Buffers;

/// After a refusal the client's remaining octets are read for at most this long, so that it sees the answer.
pub(crate) const LINGER: Duration = Duration::from_millis(500);

/// How long a client may take to read a response of the proxy's own, where no stream idle timeout is set.
const SLOWEST_READER: Duration = Duration::from_secs(300);

/// A response of the proxy's own.
pub(super) struct Reply<'a> {
    status: u16,
    flags: &'static str,
    header: Option<(&'static [u8], &'a [u8])>,
    body: &'a [u8],
    levels: &'a [&'a HeaderChanges],
    more: &'a [AddHeader],
    details: &'static str,
    upstream: Option<SocketAddr>,
    request_body: RequestBody,
    close: bool,
    grpc_status: Option<u32>,
    /// Told the gRPC way: status and message.
    grpc: Option<(u32, &'a [u8])>,
}

/// How much of the request's body has left the read buffer when the proxy answers by itself. What stands in the buffer
/// behind the body is the next request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RequestBody {
    /// Nothing.
    Untouched,
    /// A part: where the next request begins is not known.
    Begun,
    /// All of it.
    Taken,
}

impl RequestBody {
    /// What is left where `flow` has got; without one nothing has been taken.
    pub(super) fn behind(flow: Option<&Flow>) -> Self {
        match flow {
            None => Self::Untouched,
            Some(flow) if flow.read_all() => Self::Taken,
            Some(_) => Self::Begun,
        }
    }
}

impl<'a> Reply<'a> {
    pub(super) fn new(status: u16, flags: &'static str) -> Self {
        Self {
            status,
            flags,
            header: None,
            body: b"",
            levels: &[],
            more: &[],
            details: "",
            upstream: None,
            request_body: RequestBody::Untouched,
            close: false,
            grpc_status: None,
            grpc: None,
        }
    }

    pub(super) fn header(mut self, name: &'static [u8], value: &'a [u8]) -> Self {
        self.header = Some((name, value));
        self
    }

    pub(super) fn body(mut self, body: &'a (impl AsRef<[u8]> + ?Sized)) -> Self {
        self.body = body.as_ref();
        self
    }

    /// With the configured header changes, the most specific first.
    pub(super) fn changed_by(mut self, levels: &'a [&'a HeaderChanges]) -> Self {
        self.levels = levels;
        self
    }

    /// With these headers.
    pub(super) fn adding(mut self, headers: &'a [AddHeader]) -> Self {
        self.more = headers;
        self
    }

    /// Logged with these details.
    pub(super) fn because(mut self, details: &'static str) -> Self {
        self.details = details;
        self
    }

    /// On behalf of this endpoint.
    pub(super) fn for_endpoint(mut self, address: SocketAddr) -> Self {
        self.upstream = Some(address);
        self
    }

    /// Given when so much of the request's body has been taken.
    pub(super) fn after(mut self, body: RequestBody) -> Self {
        self.request_body = body;
        self
    }

    /// The connection ends with it.
    pub(super) fn and_close(mut self) -> Self {
        self.close = true;
        self
    }

    /// As gRPC wants it: 200, the failure in `grpc-status`, the body in `grpc-message`. (Envoy's mapping.)
    fn for_grpc(self, message: &'a [u8]) -> Self {
        let grpc = match self.status {
            400 => 13,
            401 => 16,
            403 => 7,
            404 => 12,
            429 | 502..=504 => 14,
            _ => 2,
        };
        Self {
            status: 200,
            grpc: Some((self.grpc_status.unwrap_or(grpc), message)),
            body: b"",
            ..self
        }
    }

    /// With this status where the request is gRPC, instead of the one that the HTTP status stands for.
    pub(super) fn grpc_status(mut self, status: u32) -> Self {
        self.grpc_status = Some(status);
        self
    }

    fn outcome(&self) -> Outcome {
        let mut outcome = Outcome::new(self.status, self.flags);
        outcome.upstream = self.upstream;
        outcome.details = Cow::Borrowed(self.details);
        outcome.grpc_status = self.grpc.map(|(status, _)| status);
        outcome
    }
}

impl Session {
    /// Answers a request with a response of the proxy's own.
    pub(super) async fn reply(&mut self, buffers: &mut Buffers, reply: Reply<'_>) -> Outcome {
        let message;
        let reply = if buffers.is_grpc() {
            message = percent_encoded(reply.body);
            reply.for_grpc(&message)
        } else {
            reply
        };
        let request = &buffers.request;
        let finished = match reply.request_body {
            RequestBody::Untouched => swallow(request.fields.framing, &mut buffers.request_in),
            RequestBody::Begun => false,
            RequestBody::Taken => true,
        };
        let close = reply.close || !finished || self.is_last_response(request.fields.persistent());
        let is_head = request.method.of_head(buffers.request_in.head()) == b"HEAD";
        let http11 = request.fields.http11;
        let mut outcome = reply.outcome();
        let out = &mut buffers.response_out;
        out.clear();
        self.local_head(&reply, close, http11, out);
        rewrite::change_local(reply.levels, reply.more, out);
        if !is_head {
            out.extend_from_slice(reply.body);
            outcome.sent = reply.body.len() as u64;
        }
        outcome.wire_sent = out.len() as u64;
        let written = self.write_out(buffers).await;
        outcome.keep = written && !close;
        outcome
    }

    /// Answers what could not be read as a request and closes.
    pub(super) async fn refuse(&mut self, buffers: &mut Buffers, refusal: Refusal) -> bool {
        let (stats, shard) = (&self.manager.stats, self.worker.shard);
        let status = match refusal {
            Refusal::Bad(_) => 400,
            Refusal::Version => 505,
            Refusal::TooLarge => {
                stats.inc(shard, Stat::RqTooLarge);
                431
            }
        };
        stats.inc(shard, Stat::CxProtocolError);
        tracing::debug!(client = %self.peer.remote, %refusal, "request refused");
        let details = match refusal {
            Refusal::TooLarge => "request_headers_too_large",
            Refusal::Version => "low_version",
            Refusal::Bad(_) => "http1.codec_error",
        };
        let reply = Reply::new(status, "DPE")
            .body(reply::reason(status))
            .because(details);
        self.answer_no_request(buffers, reply).await
    }

    /// Replies to something that is no request, logs it and closes.
    pub(super) async fn answer_no_request(&mut self, buffers: &mut Buffers, reply: Reply<'_>) -> bool {
        self.manager.stats.inc(self.worker.shard, Stat::RqTotal);
        let out = &mut buffers.response_out;
        out.clear();
        self.local_head(&reply, true, true, out);
        out.extend_from_slice(reply.body);
        let mut outcome = reply.outcome();
        outcome.sent = reply.body.len() as u64;
        self.write_out(buffers).await;
        self.count(&outcome);
        let record = self.record(&outcome, SystemTime::now(), Duration::ZERO);
        self.log(&record);
        self.linger(buffers).await;
        false
    }

    fn local_head(&self, reply: &Reply<'_>, close: bool, http11: bool, out: &mut Vec<u8>) {
        reply::status_line(reply.status, out);
        if let Some((name, value)) = reply.header {
            reply::header(name, value, out);
        }
        if reply.status != 204 && reply.status != 304 && !(reply.body.is_empty() && self.stream.is_http2()) {
            reply::header_number(b"content-length", reply.body.len() as u64, out);
        }
        if !reply.body.is_empty() {
            reply::header(b"content-type", b"text/plain", out);
        }
        if let Some((status, message)) = reply.grpc {
            reply::header(b"content-type", b"application/grpc", out);
            reply::header_number(b"grpc-status", u64::from(status), out);
            if !message.is_empty() {
                reply::header(b"grpc-message", message, out);
            }
        }
        reply::header(b"date", self.worker.date.borrow_mut().at(SystemTime::now()), out);
        reply::header(b"server", self.manager.server_name.as_bytes(), out);
        if close {
            reply::header(b"connection", b"close", out);
        } else if !http11 {
            reply::header(b"connection", b"keep-alive", out);
        }
        out.extend_from_slice(b"\r\n");
    }

    async fn write_out(&mut self, buffers: &mut Buffers) -> bool {
        let limit = self.manager.stream_idle_timeout.unwrap_or(SLOWEST_READER);
        let written = timeout(limit, self.stream.write_all(&buffers.response_out)).await;
        let length = buffers.response_out.len() as u64;
        self.manager.stats.add(self.worker.shard, Stat::CxTxBytes, length);
        matches!(written, Ok(Ok(())))
    }

    /// Ends the connection so that the last response arrives: no more from us, the client's rest is read and dropped.
    pub(super) async fn linger(&mut self, buffers: &mut Buffers) {
        // The end of a stream is not that of its connection: what is left unread is reset.
        if self.stream.is_http2() || self.stream.shutdown().await.is_err() {
            return;
        }
        let input = &mut buffers.request_in;
        let _ = timeout(LINGER, async {
            loop {
                input.clear();
                match poll_fn(|cx| input.poll_fill(cx, &mut self.stream)).await {
                    Ok(n) if n > 0 => {}
                    _ => return,
                }
            }
        })
        .await;
    }
}

/// A gRPC message: printable ASCII but `%` stands for itself.
fn percent_encoded(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    for byte in text {
        match byte {
            b'%' | 0..=0x1f | 0x7f..=0xff => out.extend_from_slice(format!("%{byte:02X}").as_bytes()),
            byte => out.push(*byte),
        }
    }
    out
}

/// Takes the request's body off the buffer if all of it is there; false when some is still to come.
fn swallow(framing: Framing, input: &mut Buffer) -> bool {
    match framing {
        Framing::None => true,
        Framing::Length(length) if length <= input.unread().len() as u64 => {
            input.consume(usize::try_from(length).unwrap_or_default());
            true
        }
        _ => false,
    }
}
