//! One health check: a connection of its own, a question, an answer.

use std::io;
use std::net::SocketAddr;

use bytes::{Buf, Bytes};
use dpumesh_hw::stream::kernel;
use h2::RecvStream;
use http::{HeaderMap, Request};
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, encode_varint, skip_field};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use super::check::{Check, Found, Http, Question};
use crate::http1::head::{ResponseHead, Scan};
use crate::proxy_protocol::Outbound;
use crate::tls::{ClientContext, Connection, Secrets, Stream};

/// Longest response head, and longest answer that is searched for blocks.
const LONGEST: usize = 64 * 1024;

/// Whom to ask.
#[derive(Debug)]
pub(super) struct Target<'a> {
    pub(super) address: SocketAddr,
    pub(super) tls: Option<&'a ClientContext>,
    pub(super) header: Option<&'a Outbound>,
    pub(super) secrets: &'a dyn Secrets,
    /// What it is called where the check names no host.
    pub(super) name: &'a str,
}

/// Asks once.
pub(super) async fn probe(check: &Check, target: &Target<'_>) -> Found {
    match timeout(check.timeout, ask(&check.question, target)).await {
        Ok(Ok(found)) => found,
        Ok(Err(error)) => {
            tracing::debug!(endpoint = %target.address, %error, "a health check broke");
            Found::Broken
        }
        Err(_) => Found::TimedOut,
    }
}

async fn ask(question: &Question, target: &Target<'_>) -> io::Result<Found> {
    let mut stream = connect(target).await?;
    match question {
        Question::Tcp { send, receive } => tcp(&mut stream, send, receive).await,
        Question::Http(http) if http.http2 => http2(stream, http, target).await,
        Question::Http(http) => http1(&mut stream, http, target).await,
        Question::Grpc { service, authority } => {
            grpc(stream, service, named(authority, target), target).await
        }
    }
}

fn named<'a>(host: &'a str, target: &Target<'a>) -> &'a str {
    if host.is_empty() { target.name } else { host }
}

async fn connect(target: &Target<'_>) -> io::Result<Stream> {
    let mut socket = kernel::connect(target.address, None).await?;
    if let Some(header) = target.header {
        let header = header.own(socket.local_addr()?, target.address);
        socket.write_all(&header).await?;
    }
    match target.tls {
        None => Ok(Stream::Plain(socket)),
        Some(tls) => {
            let nobody = Connection::default();
            let begun = tls.connect(target.secrets, &nobody, None, socket).await;
            begun.map(Stream::Tls).map_err(|e| e.into_io())
        }
    }
}

async fn tcp(stream: &mut Stream, send: &[u8], receive: &[Vec<u8>]) -> io::Result<Found> {
    stream.write_all(send).await?;
    let mut seen = Vec::new();
    while !holds(&seen, receive) {
        if seen.len() > LONGEST || stream.read_buf(&mut seen).await? == 0 {
            return Ok(Found::Broken);
        }
    }
    Ok(Found::Good { degraded: false })
}

/// Whether `seen` has all `blocks`, one behind the other, whatever is between them.
fn holds(mut seen: &[u8], blocks: &[Vec<u8>]) -> bool {
    blocks
        .iter()
        .all(|block| match memchr::memmem::find(seen, block) {
            Some(at) => {
                seen = &seen[at + block.len()..];
                true
            }
            None => false,
        })
}

async fn http1(stream: &mut Stream, http: &Http, target: &Target<'_>) -> io::Result<Found> {
    let request = format!(
        "{} {} HTTP/1.1\r\nhost: {}\r\nuser-agent: Envoy/HC\r\nconnection: close\r\n\r\n",
        http.method,
        http.path,
        named(&http.host, target)
    );
    stream.write_all(request.as_bytes()).await?;
    let (mut data, mut scan, mut head) = (Vec::new(), Scan::default(), ResponseHead::default());
    let malformed = |_| io::Error::from(io::ErrorKind::InvalidData);
    loop {
        while let Some(length) = scan.find(&data).map_err(malformed)? {
            head.parse(&mut data[..length]).map_err(malformed)?;
            if head.status >= 200 {
                let degraded = head.fields.get(&data[..length], b"x-envoy-degraded").is_some();
                return Ok(judge(http, head.status, degraded));
            }
            data.drain(..length);
        }
        if data.len() > LONGEST || stream.read_buf(&mut data).await? == 0 {
            return Ok(Found::Broken);
        }
    }
}

fn judge(http: &Http, status: u16, degraded: bool) -> Found {
    let among = |ranges: &[std::ops::Range<u16>]| ranges.iter().any(|r| r.contains(&status));
    if among(&http.expected) {
        Found::Good { degraded }
    } else if among(&http.retriable) {
        Found::Retriable
    } else {
        Found::Bad
    }
}

async fn http2(stream: Stream, http: &Http, target: &Target<'_>) -> io::Result<Found> {
    let uri = uri(&stream, named(&http.host, target), &http.path)?;
    let request = Request::builder()
        .method(http.method.as_str())
        .uri(uri)
        .header("user-agent", "Envoy/HC");
    let request = request.body(()).map_err(io::Error::other)?;
    let answered = |head: http::response::Parts, _: RecvStream| async move {
        let degraded = head.headers.contains_key("x-envoy-degraded");
        Ok(judge(http, head.status.as_u16(), degraded))
    };
    exchange(stream, request, Bytes::new(), answered).await
}

fn uri(stream: &Stream, authority: &str, path: &str) -> io::Result<http::Uri> {
    let scheme = if matches!(stream, Stream::Tls(_)) {
        "https"
    } else {
        "http"
    };
    let uri = http::Uri::builder().scheme(scheme).authority(authority);
    uri.path_and_query(path).build().map_err(io::Error::other)
}

/// One exchange on an HTTP/2 connection of its own.
async fn exchange<F: Future<Output = io::Result<Found>>>(
    stream: Stream,
    request: Request<()>,
    body: Bytes,
    answered: impl FnOnce(http::response::Parts, RecvStream) -> F,
) -> io::Result<Found> {
    let (mut sender, connection) = h2::client::handshake(stream).await.map_err(io::Error::other)?;
    let exchange = async {
        let (response, mut sending) = sender
            .send_request(request, body.is_empty())
            .map_err(io::Error::other)?;
        if !body.is_empty() {
            sending.send_data(body, true).map_err(io::Error::other)?;
        }
        let (head, body) = response.await.map_err(io::Error::other)?.into_parts();
        answered(head, body).await
    };
    let mut exchange = std::pin::pin!(exchange);
    tokio::select! {
        biased;
        found = &mut exchange => found,
        // What has come before the end is still to be read.
        _ = connection => exchange.await,
    }
}

async fn grpc(stream: Stream, service: &str, authority: &str, target: &Target<'_>) -> io::Result<Found> {
    tracing::trace!(endpoint = %target.address, service, "asking");
    let uri = uri(&stream, authority, "/grpc.health.v1.Health/Check")?;
    let request = Request::post(uri)
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("user-agent", "Envoy/HC");
    let request = request.body(()).map_err(io::Error::other)?;
    let answered = |head: http::response::Parts, mut body: RecvStream| async move {
        if head.status != 200 {
            return Ok(Found::Bad);
        }
        let mut message = Vec::new();
        while let Some(data) = body.data().await {
            let data = data.map_err(io::Error::other)?;
            let _ = body.flow_control().release_capacity(data.len());
            message.extend_from_slice(&data);
            if message.len() > LONGEST {
                return Ok(Found::Bad);
            }
        }
        let trailers = body.trailers().await.map_err(io::Error::other)?;
        let is_ok = |fields: &HeaderMap| fields.get("grpc-status").is_some_and(|s| s == "0");
        let ok = trailers.as_ref().is_some_and(is_ok) || is_ok(&head.headers);
        Ok(if ok && is_serving(&message) {
            Found::Good { degraded: false }
        } else {
            Found::Bad
        })
    };
    exchange(stream, request, asks_for(service), answered).await
}

/// A `HealthCheckRequest` in its frame.
fn asks_for(service: &str) -> Bytes {
    let mut message = Vec::new();
    if !service.is_empty() {
        message.push(0x0a);
        encode_varint(service.len() as u64, &mut message);
        message.extend_from_slice(service.as_bytes());
    }
    let mut frame = vec![0];
    frame.extend_from_slice(&(message.len() as u32).to_be_bytes());
    frame.extend_from_slice(&message);
    frame.into()
}

/// Whether a frame holds a `HealthCheckResponse` that says SERVING.
fn is_serving(frame: &[u8]) -> bool {
    let Some((front, mut message)) = frame.split_at_checked(5) else {
        return false;
    };
    let length = u32::from_be_bytes([front[1], front[2], front[3], front[4]]);
    if front[0] != 0 || length as usize != message.len() {
        return false;
    }
    let mut status = 0;
    while message.has_remaining() {
        let Ok((tag, wire)) = decode_key(&mut message) else {
            return false;
        };
        let read = match (tag, wire) {
            (1, WireType::Varint) => decode_varint(&mut message).map(|value| status = value),
            (tag, wire) => skip_field(wire, tag, &mut message, DecodeContext::default()),
        };
        if read.is_err() {
            return false;
        }
    }
    status == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_found_in_order() {
        let blocks = |all: &[&str]| all.iter().map(|b| b.as_bytes().to_vec()).collect::<Vec<_>>();
        assert!(holds(b"anything", &[]));
        assert!(holds(b"a PONG b OK", &blocks(&["PONG", "OK"])));
        assert!(!holds(b"OK PONG", &blocks(&["PONG", "OK"])));
        assert!(!holds(b"PON", &blocks(&["PONG"])));
    }

    #[test]
    fn only_serving_is_serving() {
        assert!(is_serving(&[0, 0, 0, 0, 2, 8, 1]));
        for frame in [
            &[0, 0, 0, 0, 2, 8, 2][..],
            &[0, 0, 0, 0, 0],
            &[1, 0, 0, 0, 2, 8, 1],
            &[0, 0, 0, 0, 3, 8, 1],
            &[0, 0, 0, 0, 1, 8],
            &[],
        ] {
            assert!(!is_serving(frame), "{frame:?}");
        }
        assert_eq!(asks_for("ab").as_ref(), [0, 0, 0, 0, 4, 0x0a, 2, b'a', b'b']);
        assert_eq!(asks_for("").as_ref(), [0; 5]);
    }
}
