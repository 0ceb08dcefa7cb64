//! The text that goes to a stream, parsed: a head for the caller, then the body's octets, then trailers.
//!
//! The text is what `http1` writes: one head, framed by `content-length` or as chunked without extensions.

use std::io;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::SendStream;
use http::{HeaderMap, HeaderName, HeaderValue};

use super::backlog::Backlog;
use super::incoming::is_of_hop;
use super::{Reset, broken};

/// Octets handed to the connection at once, at most.
const PIECE: usize = 16 * 1024;

/// What ends a head.
const END: &[u8] = b"\r\n\r\n";

/// The last chunk, without trailers.
const LAST: &[u8] = b"0\r\n\r\n";

/// Where the text stands.
#[derive(Debug)]
enum Stage {
    Head,
    Length(u64),
    ChunkSize(u64),
    ChunkSizeEnd(u64),
    ChunkData(u64),
    ChunkEnd(u8),
    Trailers,
    /// A tunnel: octets as they are.
    Raw,
    Over,
}

/// One direction of a stream, written.
#[derive(Debug)]
pub(super) struct Outgoing {
    stage: Stage,
    /// Of a head or of trailers, while they are incomplete.
    text: Vec<u8>,
    body: Option<SendStream<Bytes>>,
    /// What it has to wait for besides its own window.
    backlog: Option<Arc<Backlog>>,
}

/// A head in text, for the caller to make a message of.
#[derive(Debug)]
pub(super) struct Head {
    /// The first line, without its CRLF.
    pub(super) line: Bytes,
    /// The fields without those of the hop; `content-length` among them.
    pub(super) fields: HeaderMap,
    /// Whether a body follows, as far as the text says.
    pub(super) ends: bool,
}

impl Default for Outgoing {
    fn default() -> Self {
        Self {
            stage: Stage::Head,
            text: Vec::new(),
            body: None,
            backlog: None,
        }
    }
}

impl Outgoing {
    /// Waits for room in `backlog`, and counts there.
    pub(super) fn within(backlog: Arc<Backlog>) -> Self {
        Self {
            backlog: Some(backlog),
            ..Self::default()
        }
    }

    /// Whether no head has been written yet.
    pub(super) fn awaits_head(&self) -> bool {
        matches!(self.stage, Stage::Head)
    }

    /// Whether all has been written.
    pub(super) fn is_over(&self) -> bool {
        matches!(self.stage, Stage::Over)
    }

    /// The stream, once there is one.
    pub(super) fn stream(&mut self) -> Option<&mut SendStream<Bytes>> {
        self.body.as_mut()
    }

    /// Takes a head off `data`: how many octets, and the head if it is complete. The body's framing follows from it.
    ///
    /// # Errors
    /// A field that HTTP/2 cannot carry.
    pub(super) fn head(&mut self, data: &[u8]) -> io::Result<(usize, Option<Head>)> {
        let before = self.text.len();
        let (text, mut used) = if before == 0 {
            // All at once, as it nearly always is: what follows the head is not copied.
            let Some(end) = memchr::memmem::find(data, END) else {
                self.text.extend_from_slice(data);
                return Ok((data.len(), None));
            };
            let end = end + END.len();
            (Bytes::copy_from_slice(&data[..end]), end)
        } else {
            self.text.extend_from_slice(data);
            let from = before.saturating_sub(END.len() - 1);
            let Some(at) = memchr::memmem::find(&self.text[from..], END) else {
                return Ok((data.len(), None));
            };
            let end = from + at + END.len();
            let mut text = Bytes::from(std::mem::take(&mut self.text));
            text.truncate(end);
            (text, end - before)
        };
        let mut lines = text[..text.len() - END.len()].split(|b| *b == b'\n');
        let line = text.slice_ref(trim_end(lines.next().unwrap_or_default()));
        let mut fields = HeaderMap::with_capacity(16);
        let (mut length, mut chunked) = (None, false);
        for line in lines {
            let (name, value) = field(&text, trim_end(line))?;
            match name.as_str() {
                "content-length" => length = value.to_str().ok().and_then(|v| v.parse().ok()),
                "transfer-encoding" => chunked = true,
                _ => {}
            }
            if name == http::header::CONTENT_LENGTH || !is_of_hop(name.as_str()) {
                fields.append(name, value);
            }
        }
        self.stage = match length {
            _ if chunked && data[used..] == *LAST => {
                used += LAST.len();
                Stage::Over
            }
            _ if chunked => Stage::ChunkSize(0),
            Some(0) | None => Stage::Over,
            Some(length) => Stage::Length(length),
        };
        let ends = self.is_over();
        Ok((used, Some(Head { line, fields, ends })))
    }

    /// No body follows, whatever the head says.
    pub(super) fn end(&mut self) {
        self.stage = Stage::Over;
    }

    /// Another head follows.
    pub(super) fn again(&mut self) {
        self.stage = Stage::Head;
    }

    /// Octets follow as they are, until [`Self::finish`].
    pub(super) fn open(&mut self) {
        self.stage = Stage::Raw;
    }

    /// Whether octets go as they are.
    pub(super) fn is_open(&self) -> bool {
        matches!(self.stage, Stage::Raw)
    }

    /// Ends what goes as it is.
    ///
    /// # Errors
    /// The stream's.
    pub(super) fn finish(&mut self) -> io::Result<()> {
        self.stage = Stage::Over;
        match &mut self.body {
            Some(stream) => stream.send_data(Bytes::new(), true).map_err(broken),
            None => Err(malformed()),
        }
    }

    /// Takes the stream on which the body goes.
    pub(super) fn begin(&mut self, stream: SendStream<Bytes>) {
        self.body = Some(stream);
    }

    /// Takes octets of the body's text off `data`.
    ///
    /// # Errors
    /// The stream's, and text that is none.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let mut used = 0;
        while used < data.len() {
            match self.poll_step(cx, &data[used..]) {
                Poll::Ready(Ok(n)) => used += n,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending if used > 0 => break,
                Poll::Pending => return Poll::Pending,
            }
        }
        Poll::Ready(Ok(used))
    }

    fn poll_step(&mut self, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        match self.stage {
            Stage::Head | Stage::Over => Poll::Ready(Err(malformed())),
            Stage::Raw => self.poll_data(cx, data, u64::MAX, |_| false),
            Stage::Length(left) => {
                let n = ready!(self.poll_data(cx, data, left, |n| n == left))?;
                let left = left - n as u64;
                self.stage = if left == 0 {
                    Stage::Over
                } else {
                    Stage::Length(left)
                };
                Poll::Ready(Ok(n))
            }
            Stage::ChunkSize(size) => {
                self.stage = match data[0] {
                    b'\r' => Stage::ChunkSizeEnd(size),
                    digit => match (digit as char).to_digit(16) {
                        Some(digit) => Stage::ChunkSize(size << 4 | u64::from(digit)),
                        None => return Poll::Ready(Err(malformed())),
                    },
                };
                Poll::Ready(Ok(1))
            }
            Stage::ChunkSizeEnd(size) => {
                self.stage = if size == 0 {
                    Stage::Trailers
                } else {
                    Stage::ChunkData(size)
                };
                Poll::Ready(Ok(1))
            }
            Stage::ChunkData(left) => {
                let behind = usize::try_from(left).ok().and_then(|left| data.get(left..));
                let last = behind.is_some_and(|rest| rest.strip_prefix(b"\r\n") == Some(LAST));
                let n = ready!(self.poll_data(cx, data, left, |n| last && n == left))?;
                let left = left - n as u64;
                if left > 0 {
                    self.stage = Stage::ChunkData(left);
                    return Poll::Ready(Ok(n));
                }
                self.stage = if last { Stage::Over } else { Stage::ChunkEnd(2) };
                Poll::Ready(Ok(if last { data.len() } else { n }))
            }
            Stage::ChunkEnd(left) => {
                self.stage = if left > 1 {
                    Stage::ChunkEnd(left - 1)
                } else {
                    Stage::ChunkSize(0)
                };
                Poll::Ready(Ok(1))
            }
            Stage::Trailers => {
                self.text.push(data[0]);
                let text = self.text.as_slice();
                if text == b"\r\n" || text.ends_with(b"\r\n\r\n") {
                    self.trailers()?;
                }
                Poll::Ready(Ok(1))
            }
        }
    }

    /// Sends some of at most `left` octets of `data`; `ends` says whether the stream ends behind so many.
    fn poll_data(
        &mut self,
        cx: &mut Context<'_>,
        data: &[u8],
        left: u64,
        ends: impl Fn(u64) -> bool,
    ) -> Poll<io::Result<usize>> {
        let Some(stream) = &mut self.body else {
            return Poll::Ready(Err(malformed()));
        };
        if let Some(backlog) = &self.backlog {
            ready!(backlog.poll_room(cx));
        }
        let most = usize::try_from(left)
            .unwrap_or(usize::MAX)
            .min(data.len())
            .min(PIECE);
        stream.reserve_capacity(most);
        while stream.capacity() == 0 {
            match ready!(stream.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(broken(error))),
                None => return Poll::Ready(Err(gone(stream, cx))),
            }
        }
        let n = most.min(stream.capacity());
        let octets = match &self.backlog {
            Some(backlog) => backlog.hold(&data[..n]),
            None => Bytes::copy_from_slice(&data[..n]),
        };
        stream.send_data(octets, ends(n as u64)).map_err(broken)?;
        Poll::Ready(Ok(n))
    }

    fn trailers(&mut self) -> io::Result<()> {
        let text = Bytes::from(std::mem::take(&mut self.text));
        self.stage = Stage::Over;
        let Some(stream) = &mut self.body else {
            return Err(malformed());
        };
        let mut trailers = HeaderMap::new();
        for line in text
            .split(|b| *b == b'\n')
            .map(trim_end)
            .filter(|l| !l.is_empty())
        {
            let (name, value) = field(&text, line)?;
            if !is_of_hop(name.as_str()) {
                trailers.append(name, value);
            }
        }
        if trailers.is_empty() {
            stream.send_data(Bytes::new(), true).map_err(broken)
        } else {
            stream.send_trailers(trailers).map_err(broken)
        }
    }
}

/// Why a stream takes nothing more.
fn gone(stream: &mut SendStream<Bytes>, cx: &mut Context<'_>) -> io::Error {
    match stream.poll_reset(cx) {
        Poll::Ready(Ok(reason)) => io::Error::other(Reset { reason, ours: false }),
        _ => io::ErrorKind::BrokenPipe.into(),
    }
}

fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "text that is no message")
}

fn trim_end(line: &[u8]) -> &[u8] {
    line.strip_suffix(b"\r").unwrap_or(line)
}

/// A line of `text`, whose memory the value shares.
fn field(text: &Bytes, line: &[u8]) -> io::Result<(HeaderName, HeaderValue)> {
    let colon = memchr::memchr(b':', line).ok_or_else(malformed)?;
    let name = HeaderName::from_bytes(&line[..colon]).map_err(|_| malformed())?;
    let value = text.slice_ref(line[colon + 1..].trim_ascii());
    let value = HeaderValue::from_maybe_shared(value).map_err(|_| malformed())?;
    Ok((name, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &[u8] =
        b"POST /x HTTP/1.1\r\nhost: a\r\nte: trailers\r\ncontent-length: 3\r\nconnection: close\r\n\r\n";

    #[test]
    fn a_head_cut_anywhere_is_the_same() {
        for cut in 0..HEAD.len() {
            let mut outgoing = Outgoing::default();
            let (used, head) = outgoing.head(&HEAD[..cut]).unwrap();
            assert!(used == cut && head.is_none(), "{cut}");
            let rest = [&HEAD[cut..], b"abc"].concat();
            let (used, head) = outgoing.head(&rest).unwrap();
            let head = head.unwrap();
            assert_eq!(used, HEAD.len() - cut);
            assert_eq!(&head.line[..], b"POST /x HTTP/1.1");
            assert!(!head.ends && head.fields.len() == 3, "{head:?}");
            assert!(!head.fields.contains_key("connection"));
            assert!(matches!(outgoing.stage, Stage::Length(3)));
        }
    }

    #[test]
    fn what_ends_with_its_head_is_known_at_once() {
        for (head, ends) in [
            (b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n".as_slice(), true),
            (b"HTTP/1.1 200 OK\r\n\r\n", true),
            (
                b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
                true,
            ),
            (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", false),
            (
                b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\nt: 1\r\n\r\n",
                false,
            ),
            (b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n", false),
        ] {
            let (_, found) = Outgoing::default().head(head).unwrap();
            assert_eq!(found.unwrap().ends, ends, "{}", String::from_utf8_lossy(head));
        }
    }

    #[test]
    fn a_line_that_is_no_field_is_refused() {
        for line in ["no colon", "bad name: 1", ": 1", "x: a\0b"] {
            let head = format!("HTTP/1.1 200 OK\r\n{line}\r\n\r\n");
            assert!(Outgoing::default().head(head.as_bytes()).is_err(), "{line:?}");
        }
    }
}
