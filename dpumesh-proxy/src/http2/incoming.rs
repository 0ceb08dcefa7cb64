//! What comes off a stream, as text: a head made by the caller, then the body as it is or chunked, then trailers.

use std::io;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use h2::RecvStream;
use http::HeaderMap;
use tokio::io::ReadBuf;

use super::broken;

/// How a body is told in text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Told {
    /// The head says its length, or that there is none.
    Plain,
    /// In chunks: trailers have a place.
    Chunked,
}

/// Octets of memory that the lines of chunks get by with.
const CHUNK_LINES: usize = 64;

/// One direction of a stream, read.
#[derive(Debug)]
pub(super) struct Incoming {
    /// Text in front of `data`.
    text: Vec<u8>,
    taken: usize,
    data: Bytes,
    body: Option<RecvStream>,
    told: Told,
}

impl Incoming {
    /// `head`, and then `body`, which is over already if there is none.
    pub(super) fn new(mut head: Vec<u8>, body: RecvStream, told: Told) -> Self {
        let ended = body.is_end_stream();
        if ended && told == Told::Chunked {
            head.extend_from_slice(b"0\r\n\r\n");
        }
        Self {
            text: head,
            taken: 0,
            data: Bytes::new(),
            body: (!ended).then_some(body),
            told,
        }
    }

    /// Whether all has been read.
    pub(super) fn is_over(&self) -> bool {
        self.body.is_none() && self.taken == self.text.len() && self.data.is_empty()
    }

    /// Reads what there is; ready without anything in `room` when all has been read.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, room: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = room.filled().len();
        loop {
            self.put(room);
            if room.remaining() == 0 {
                return Poll::Ready(Ok(()));
            }
            match self.poll_more(cx) {
                Poll::Ready(Ok(true)) => {}
                Poll::Ready(Err(error)) if room.filled().len() == before => return Poll::Ready(Err(error)),
                Poll::Pending if room.filled().len() == before => return Poll::Pending,
                _ => return Poll::Ready(Ok(())),
            }
        }
    }

    /// Moves what is at hand to `room`, and gives its window back.
    fn put(&mut self, room: &mut ReadBuf<'_>) {
        let text = &self.text[self.taken..];
        let n = text.len().min(room.remaining());
        room.put_slice(&text[..n]);
        self.taken += n;
        if self.taken == self.text.len() && self.text.capacity() > CHUNK_LINES {
            // The head's memory, which a stream that waits does without.
            (self.text, self.taken) = (Vec::new(), 0);
        }
        let n = self.data.len().min(room.remaining());
        if self.taken < self.text.len() || n == 0 {
            return;
        }
        room.put_slice(&self.data[..n]);
        self.data.advance(n);
        if let Some(body) = &mut self.body {
            // Fails only where the stream is gone, and its windows with it.
            let _ = body.flow_control().release_capacity(n);
        }
        if self.data.is_empty() && self.told == Told::Chunked {
            self.say(b"\r\n");
        }
    }

    fn say(&mut self, text: &[u8]) {
        if self.taken == self.text.len() {
            self.text.clear();
            self.taken = 0;
        }
        self.text.extend_from_slice(text);
    }

    /// Takes more off the stream; false at its end. Called when nothing is at hand.
    fn poll_more(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        if self.taken < self.text.len() {
            return Poll::Ready(Ok(true));
        }
        let Some(body) = &mut self.body else {
            return Poll::Ready(Ok(false));
        };
        match body.poll_data(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Some(Err(error))) => Poll::Ready(Err(broken(error))),
            Poll::Ready(Some(Ok(data))) => {
                // A chunk of no octets would be the last one.
                if !data.is_empty() && self.told == Told::Chunked {
                    self.say(format!("{:x}\r\n", data.len()).as_bytes());
                }
                self.data = data;
                Poll::Ready(Ok(true))
            }
            Poll::Ready(None) => match body.poll_trailers(cx) {
                Poll::Pending => Poll::Pending,
                Poll::Ready(Err(error)) => Poll::Ready(Err(broken(error))),
                Poll::Ready(Ok(trailers)) => {
                    self.body = None;
                    if self.told == Told::Plain {
                        return Poll::Ready(Ok(false));
                    }
                    self.say(b"0\r\n");
                    trailers
                        .iter()
                        .for_each(|fields| put_fields(fields, &mut self.text));
                    self.say(b"\r\n");
                    Poll::Ready(Ok(true))
                }
            },
        }
    }
}

/// Whether a field has a meaning for one HTTP/1.1 hop only, or for the framing: it never becomes one here.
pub(super) fn is_of_hop(name: &str) -> bool {
    matches!(
        name,
        "connection" | "keep-alive" | "proxy-connection" | "transfer-encoding" | "upgrade" | "content-length"
    )
}

/// Lines for `fields`, without what belongs to a hop. Names and values of a [`HeaderMap`] have no CR, LF or NUL.
pub(super) fn put_fields(fields: &HeaderMap, out: &mut Vec<u8>) {
    for (name, value) in fields {
        if !is_of_hop(name.as_str()) {
            put_field(name.as_str(), value.as_bytes(), out);
        }
    }
}

pub(super) fn put_field(name: &str, value: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

/// Whether a message is gRPC: its trailers matter more than its length.
pub(super) fn is_grpc(fields: &HeaderMap) -> bool {
    let kind = fields.get(http::header::CONTENT_TYPE).map(|v| v.as_bytes());
    kind.is_some_and(crate::http1::is_grpc)
}
