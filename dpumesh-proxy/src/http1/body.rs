//! Moves one body from one connection to the other: decode, re-frame, write.
//!
//! A body of known length goes straight from the read buffer to the other side. A chunked one is decoded (strictly:
//! sizes in plain hex, well-formed extensions only, which are dropped, as are trailers) and framed anew, so that what
//! leaves can be read in one way only. [`Flow::poll`] never reads more before what it has is written.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite};

use super::buffer::Buffer;
use super::copy::Writer;
use super::head::Framing;

/// A body up to this size rides with the head in one write, octets.
const RIDES_ALONG: usize = 16 * 1024;

/// Longest chunk-size line and longest trailer section, octets.
const LONGEST_LINE: usize = 4096;

/// Longest trailer section that is passed on, octets.
const LONGEST_TRAILERS: usize = 64 * 1024;

/// Where a body stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Done,
    Length(u64),
    Close,
    ChunkSize,
    ChunkData(u64),
    ChunkEnd,
    Trailer { used: usize },
}

/// How a body is framed on the way out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Out {
    /// As many octets as the head said, or until the connection closes.
    Plain,
    /// Chunked.
    Chunked,
}

/// Why a body did not arrive.
#[derive(Debug)]
pub enum FlowError {
    /// Reading failed or the stream ended early (`None`).
    Read(Option<io::Error>),
    /// Writing failed.
    Write(io::Error),
    /// The body's framing is malformed.
    Framing(&'static str),
}

/// One direction of a message: what is to be written first, then the body.
#[derive(Debug)]
pub struct Flow {
    stage: Stage,
    out: Out,
    written: usize,
    /// Body octets taken from the source, without framing.
    pub body: u64,
    /// Octets read from the source since the head.
    pub wire_in: u64,
    /// Octets written to the other side.
    pub wire_out: u64,
    last_chunk_sent: bool,
    /// Trailers on their way, where they are passed on.
    trailers: Option<Vec<u8>>,
    /// What was taken from the source, for [`Self::replay`].
    kept: Option<Kept>,
    /// Who gets a copy of it.
    copies: Vec<Writer>,
}

/// A body's beginning.
#[derive(Debug)]
struct Kept {
    octets: Vec<u8>,
    most: usize,
}

/// The body as far as it stands in `unread`, and whether that is all of it.
///
/// # Errors
/// Malformed framing.
pub fn peek(framing: Framing, unread: &[u8]) -> Result<(Vec<u8>, bool), FlowError> {
    let mut flow = Flow::new(framing, Out::Plain);
    let mut body = Vec::new();
    flow.decode(&mut Buffer::from(unread), &mut body, true)?;
    Ok((body, flow.read_all()))
}

impl Flow {
    /// A flow of a body framed as `framing` on the way in, `out` on the way out.
    pub fn new(framing: Framing, out: Out) -> Self {
        let stage = match framing {
            Framing::None | Framing::Length(0) => Stage::Done,
            Framing::Length(length) => Stage::Length(length),
            Framing::Chunked => Stage::ChunkSize,
            Framing::Close => Stage::Close,
        };
        Self {
            stage,
            out,
            written: 0,
            body: 0,
            wire_in: 0,
            wire_out: 0,
            last_chunk_sent: stage == Stage::Done,
            trailers: None,
            kept: None,
            copies: Vec::new(),
        }
    }

    /// Passes the trailers of a chunked body on (between two ends that speak HTTP/2; else they are dropped).
    pub fn pass_trailers(&mut self) {
        self.trailers = Some(Vec::new());
    }

    /// The trailers that were passed on, lines as they came.
    pub fn take_trailers(&mut self) -> Option<Vec<u8>> {
        self.trailers.take().filter(|t| !t.is_empty())
    }

    fn longest_trailers(&self) -> usize {
        if self.trailers.is_some() {
            LONGEST_TRAILERS
        } else {
            LONGEST_LINE
        }
    }

    /// Ends a chunked body.
    fn put_last(&self, pending: &mut Vec<u8>) {
        if self.out == Out::Chunked {
            pending.extend_from_slice(b"0\r\n");
            pending.extend_from_slice(self.trailers.as_deref().unwrap_or_default());
            pending.extend_from_slice(b"\r\n");
        }
    }

    /// Keeps the body as it is taken from the source, up to `most` octets; of a longer one nothing is kept.
    pub fn keep(&mut self, most: usize) {
        if self.stage != Stage::Done {
            let octets = Vec::new();
            self.kept = Some(Kept { octets, most });
        }
    }

    /// Copies the body to these as it is taken from the source. Call before anything is.
    pub(super) fn copy_to(&mut self, copies: Vec<Writer>) {
        self.copies = copies;
    }

    /// Tells the copies that the body has ended, if it has.
    fn end_copies(&mut self) {
        if self.stage == Stage::Done {
            self.copies.drain(..).for_each(Writer::end);
        }
    }

    /// Whether the message can be sent from its beginning once more.
    pub fn is_replayable(&self) -> bool {
        self.body == 0 || self.kept.is_some()
    }

    /// Begins to send anew: `pending` has the head and gets what was kept. Call only if [`Self::is_replayable`].
    pub fn replay(&mut self, pending: &mut Vec<u8>) {
        (self.written, self.wire_out) = (0, 0);
        if let Some(kept) = self.kept.as_ref().filter(|k| !k.octets.is_empty()) {
            self.put(&kept.octets, pending);
        }
        self.last_chunk_sent = self.out == Out::Plain;
    }

    fn note(&mut self, data: &[u8]) {
        self.copies.iter_mut().for_each(|copy| copy.put(data));
        if let Some(kept) = &mut self.kept {
            if kept.octets.len() + data.len() > kept.most {
                self.kept = None;
            } else {
                kept.octets.extend_from_slice(data);
            }
        }
    }

    /// Whether the source gave all of the body.
    #[inline]
    pub fn read_all(&self) -> bool {
        self.stage == Stage::Done
    }

    /// Whether nothing of the message has been written yet.
    pub fn untouched(&self) -> bool {
        self.wire_out == 0
    }

    /// Puts what the read buffer already holds behind the head in `pending`, if it is short.
    ///
    /// # Errors
    /// Malformed framing.
    pub fn prefill(&mut self, source: &mut Buffer, pending: &mut Vec<u8>) -> Result<(), FlowError> {
        if self.stage == Stage::Done || source.unread().len() > RIDES_ALONG {
            return Ok(());
        }
        self.decode(source, pending, true)?;
        self.end_copies();
        Ok(())
    }

    /// Writes `pending`, then the body; reads more from `from` as needed. Ready when all is written.
    ///
    /// # Errors
    /// Either connection's, an early end, malformed framing.
    pub fn poll<R, W>(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut R,
        to: &mut W,
        source: &mut Buffer,
        pending: &mut Vec<u8>,
    ) -> Poll<Result<(), FlowError>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        loop {
            ready!(self.poll_pending(cx, to, pending))?;
            if self.stage == Stage::Done {
                self.end_copies();
                return Poll::Ready(Ok(()));
            }
            if !source.is_empty() {
                if self.is_direct() {
                    ready!(self.poll_direct(cx, to, source))?;
                } else {
                    let before = source.unread().len();
                    self.decode(source, pending, false)?;
                    if source.unread().len() != before || !pending.is_empty() {
                        continue;
                    }
                    ready!(self.poll_source(cx, from, source))?;
                }
                continue;
            }
            ready!(self.poll_source(cx, from, source))?;
        }
    }

    fn is_direct(&self) -> bool {
        matches!(self.stage, Stage::Length(_) | Stage::Close) && self.out == Out::Plain
    }

    fn poll_source<R>(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut R,
        source: &mut Buffer,
    ) -> Poll<Result<(), FlowError>>
    where
        R: AsyncRead + Unpin,
    {
        source.grow_for(self.body);
        match ready!(source.poll_fill(cx, from)) {
            Ok(0) if self.stage == Stage::Close => {
                self.stage = Stage::Done;
                Poll::Ready(Ok(()))
            }
            Ok(0) => Poll::Ready(Err(FlowError::Read(None))),
            Ok(n) => {
                self.wire_in += n as u64;
                Poll::Ready(Ok(()))
            }
            Err(error) => Poll::Ready(Err(FlowError::Read(Some(error)))),
        }
    }

    fn poll_pending<W>(
        &mut self,
        cx: &mut Context<'_>,
        to: &mut W,
        pending: &mut Vec<u8>,
    ) -> Poll<Result<(), FlowError>>
    where
        W: AsyncWrite + Unpin,
    {
        if self.stage == Stage::Done && !self.last_chunk_sent {
            self.last_chunk_sent = true;
            self.put_last(pending);
        }
        while self.written < pending.len() {
            let n = ready!(Pin::new(&mut *to).poll_write(cx, &pending[self.written..]))
                .map_err(FlowError::Write)?;
            self.written += n;
            self.wire_out += n as u64;
        }
        pending.clear();
        self.written = 0;
        Poll::Ready(Ok(()))
    }

    fn poll_direct<W>(
        &mut self,
        cx: &mut Context<'_>,
        to: &mut W,
        source: &mut Buffer,
    ) -> Poll<Result<(), FlowError>>
    where
        W: AsyncWrite + Unpin,
    {
        let unread = source.unread();
        let most = match self.stage {
            Stage::Length(left) => usize::try_from(left).unwrap_or(usize::MAX).min(unread.len()),
            _ => unread.len(),
        };
        let n = ready!(Pin::new(to).poll_write(cx, &unread[..most])).map_err(FlowError::Write)?;
        if n == 0 {
            return Poll::Ready(Err(FlowError::Write(io::ErrorKind::WriteZero.into())));
        }
        self.note(&source.unread()[..n]);
        source.consume(n);
        self.wire_out += n as u64;
        self.took(n as u64);
        Poll::Ready(Ok(()))
    }

    /// Notes `n` body octets.
    fn took(&mut self, n: u64) {
        self.body += n;
        match &mut self.stage {
            Stage::Length(left) | Stage::ChunkData(left) => {
                *left -= n;
                if *left == 0 {
                    let chunk = matches!(self.stage, Stage::ChunkData(_));
                    self.stage = if chunk { Stage::ChunkEnd } else { Stage::Done };
                }
            }
            _ => {}
        }
    }

    /// Decodes what is unread into `pending`. In the first call (`head`) the last chunk joins as well.
    fn decode(&mut self, source: &mut Buffer, pending: &mut Vec<u8>, head: bool) -> Result<(), FlowError> {
        loop {
            match self.stage {
                Stage::Done => {
                    if head && !self.last_chunk_sent {
                        self.last_chunk_sent = true;
                        self.put_last(pending);
                    }
                    return Ok(());
                }
                Stage::Length(left) | Stage::ChunkData(left) => {
                    let n = usize::try_from(left)
                        .unwrap_or(usize::MAX)
                        .min(source.unread().len());
                    if n == 0 {
                        return Ok(());
                    }
                    self.put(&source.unread()[..n], pending);
                    self.note(&source.unread()[..n]);
                    source.consume(n);
                    self.took(n as u64);
                }
                Stage::Close => {
                    let n = source.unread().len();
                    if n > 0 {
                        self.put(source.unread(), pending);
                        source.consume(n);
                        self.took(n as u64);
                    }
                    return Ok(());
                }
                Stage::ChunkSize => match line(source.unread(), LONGEST_LINE)? {
                    None => return Ok(()),
                    Some(text) => {
                        let (size, length) = (chunk_size(text)?, text.len() + 2);
                        source.consume(length);
                        self.stage = if size == 0 {
                            Stage::Trailer { used: 0 }
                        } else {
                            Stage::ChunkData(size)
                        };
                    }
                },
                Stage::ChunkEnd => match source.unread() {
                    [b'\r', b'\n', ..] => {
                        source.consume(2);
                        self.stage = Stage::ChunkSize;
                    }
                    [] | [b'\r'] => return Ok(()),
                    _ => return Err(FlowError::Framing("a chunk longer than its size")),
                },
                Stage::Trailer { used } => match line(source.unread(), self.longest_trailers())? {
                    None => return Ok(()),
                    Some([]) => {
                        source.consume(2);
                        self.stage = Stage::Done;
                    }
                    Some(text) => {
                        check_trailer(text)?;
                        let length = text.len() + 2;
                        if used + length > self.longest_trailers() {
                            return Err(FlowError::Framing("a trailer section too long"));
                        }
                        if let Some(trailers) = &mut self.trailers {
                            trailers.extend_from_slice(&source.unread()[..length]);
                        }
                        source.consume(length);
                        self.stage = Stage::Trailer { used: used + length };
                    }
                },
            }
        }
    }

    fn put(&self, data: &[u8], pending: &mut Vec<u8>) {
        if self.out == Out::Plain {
            pending.extend_from_slice(data);
            return;
        }
        let mut size = [0u8; 16];
        let mut at = size.len();
        let mut left = data.len();
        while left > 0 {
            at -= 1;
            size[at] = b"0123456789abcdef"[left & 15];
            left >>= 4;
        }
        pending.extend_from_slice(&size[at..]);
        pending.extend_from_slice(b"\r\n");
        pending.extend_from_slice(data);
        pending.extend_from_slice(b"\r\n");
    }
}

/// The first line without its CRLF, `None` while it is incomplete.
fn line(data: &[u8], most: usize) -> Result<Option<&[u8]>, FlowError> {
    match memchr::memchr(b'\n', data) {
        Some(at) if at > 0 && data[at - 1] == b'\r' => {
            let text = &data[..at - 1];
            if text.contains(&b'\r') {
                Err(FlowError::Framing("a bare CR"))
            } else {
                Ok(Some(text))
            }
        }
        Some(_) => Err(FlowError::Framing("a line that ends with a bare LF")),
        None if data.len() > most => Err(FlowError::Framing("a line too long")),
        None => Ok(None),
    }
}

/// `chunk-size [ chunk-ext ]` of RFC 9112 §7.1; extensions are checked and dropped.
fn chunk_size(line: &[u8]) -> Result<u64, FlowError> {
    let digits = line.iter().take_while(|b| b.is_ascii_hexdigit()).count();
    if digits == 0 || digits > 15 {
        return Err(FlowError::Framing("a malformed chunk size"));
    }
    let value = |b: u8| u64::from((b as char).to_digit(16).unwrap_or_default());
    let size = line[..digits].iter().fold(0, |n, b| n << 4 | value(*b));
    if is_extension(&line[digits..]) {
        Ok(size)
    } else {
        Err(FlowError::Framing("a malformed chunk extension"))
    }
}

/// `*( ";" name [ "=" ( token / quoted-string ) ] )` without the optional blanks.
fn is_extension(mut rest: &[u8]) -> bool {
    let token = |text: &[u8]| text.iter().take_while(|b| super::is_token(**b)).count();
    while let [b';', tail @ ..] = rest {
        let name = token(tail);
        if name == 0 {
            return false;
        }
        rest = &tail[name..];
        let [b'=', value @ ..] = rest else { continue };
        rest = match value {
            [b'"', quoted @ ..] => {
                let mut at = 0;
                loop {
                    match quoted.get(at) {
                        Some(b'"') => break,
                        Some(b'\\') if quoted.get(at + 1).is_some_and(|b| *b >= 0x20 && *b != 0x7f) => {
                            at += 2
                        }
                        Some(b'\\') | None => return false,
                        Some(b) if *b >= 0x20 && *b != 0x7f || *b == b'\t' => at += 1,
                        Some(_) => return false,
                    }
                }
                &quoted[at + 1..]
            }
            value => match token(value) {
                0 => return false,
                n => &value[n..],
            },
        };
    }
    rest.is_empty()
}

fn check_trailer(line: &[u8]) -> Result<(), FlowError> {
    let colon = line.iter().position(|b| *b == b':').unwrap_or_default();
    let name_ok = colon > 0 && line[..colon].iter().all(|b| super::is_token(*b));
    let value_ok = line[colon..]
        .iter()
        .all(|b| *b == b'\t' || (*b >= 0x20 && *b != 0x7f));
    if name_ok && value_ok {
        Ok(())
    } else {
        Err(FlowError::Framing("a malformed trailer"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;

    /// A source that gives so many octets at a time.
    struct Pieces<'a>(&'a [u8], usize);

    impl AsyncRead for Pieces<'_> {
        fn poll_read(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            room: &mut tokio::io::ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            let n = self.1.min(self.0.len()).min(room.remaining());
            room.put_slice(&self.0[..n]);
            self.0 = &self.0[n..];
            Poll::Ready(Ok(()))
        }
    }

    /// A sink that breaks after so many octets.
    struct Breaks(usize);

    impl AsyncWrite for Breaks {
        fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
            let n = self.0.min(data.len());
            self.0 -= n;
            Poll::Ready(if n == 0 {
                Err(io::ErrorKind::BrokenPipe.into())
            } else {
                Ok(n)
            })
        }
        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[test]
    fn a_message_broken_off_anywhere_can_be_sent_again_whole() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        for (wire, framing, out) in [
            (b"0123456789NEXT".as_slice(), Framing::Length(10), Out::Plain),
            (
                b"4\r\n0123\r\n6\r\n456789\r\n0\r\n\r\nNEXT",
                Framing::Chunked,
                Out::Chunked,
            ),
            (b"0\r\n\r\nNEXT", Framing::Chunked, Out::Chunked),
        ] {
            for (piece, after) in (1..wire.len()).flat_map(|p| (0..60).map(move |a| (p, a))) {
                let mut from = Pieces(wire, piece);
                let (mut buffer, mut pending) = (Buffer::default(), b"HEAD".to_vec());
                let mut flow = Flow::new(framing, out);
                flow.keep(100);
                let mut to = Breaks(after);
                let first = runtime.block_on(poll_fn(|cx| {
                    flow.poll(cx, &mut from, &mut to, &mut buffer, &mut pending)
                }));
                assert!(flow.is_replayable());
                pending = b"HEAD".to_vec();
                flow.replay(&mut pending);
                let mut to = Vec::new();
                let second = runtime.block_on(poll_fn(|cx| {
                    flow.poll(cx, &mut from, &mut to, &mut buffer, &mut pending)
                }));
                second.unwrap();
                let body = to.strip_prefix(b"HEAD").unwrap();
                let body = if out == Out::Chunked {
                    pass(body, Framing::Chunked, Out::Plain, 3).unwrap().0
                } else {
                    body.to_vec()
                };
                let whole: &[u8] = if wire[0] == b'0' && out == Out::Chunked {
                    b""
                } else {
                    b"0123456789"
                };
                assert_eq!(
                    body, whole,
                    "{framing:?} in {piece}, broken after {after}, first {first:?}"
                );
                assert_eq!([buffer.unread(), from.0].concat(), b"NEXT");
            }
        }
    }

    #[test]
    fn a_body_beyond_the_bound_is_not_kept() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let (mut from, mut to) = (Pieces(b"0123456789", 4), Vec::new());
        let (mut buffer, mut pending) = (Buffer::default(), Vec::new());
        let mut flow = Flow::new(Framing::Length(10), Out::Plain);
        flow.keep(9);
        let sent = runtime.block_on(poll_fn(|cx| {
            flow.poll(cx, &mut from, &mut to, &mut buffer, &mut pending)
        }));
        sent.unwrap();
        assert!(!flow.is_replayable());
    }

    /// Moves `wire` through a flow in pieces of `piece` octets; what came out, and what is left unread.
    fn pass(wire: &[u8], framing: Framing, out: Out, piece: usize) -> Result<(Vec<u8>, Vec<u8>), FlowError> {
        let (mut from, mut to) = (Pieces(wire, piece), Vec::new());
        let (mut buffer, mut pending) = (Buffer::default(), Vec::new());
        let mut flow = Flow::new(framing, out);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(poll_fn(|cx| {
            flow.poll(cx, &mut from, &mut to, &mut buffer, &mut pending)
        }))?;
        Ok((to, [buffer.unread(), from.0].concat()))
    }

    #[test]
    fn every_cut_of_a_chunked_body_gives_the_same() {
        let wire = b"3;a=\"b\"\r\nabc\r\n00a\r\n0123456789\r\n0\r\nt: 1\r\n\r\nNEXT";
        for piece in 1..=wire.len() {
            let (plain, rest) = pass(wire, Framing::Chunked, Out::Plain, piece).unwrap();
            assert_eq!(
                (plain.as_slice(), rest.as_slice()),
                (b"abc0123456789".as_slice(), b"NEXT".as_slice()),
                "{piece}"
            );
            let (chunked, _) = pass(wire, Framing::Chunked, Out::Chunked, piece).unwrap();
            let (again, _) = pass(&chunked, Framing::Chunked, Out::Plain, 7).unwrap();
            assert_eq!(again, b"abc0123456789", "{piece}");
        }
    }

    #[test]
    fn a_chunked_body_that_ends_early_is_an_error_at_every_length() {
        let wire = b"3\r\nabc\r\n0\r\n\r\n";
        for length in 0..wire.len() {
            let cut = pass(&wire[..length], Framing::Chunked, Out::Plain, 5);
            assert!(matches!(cut, Err(FlowError::Read(None))), "{length}");
        }
    }

    #[test]
    fn a_length_takes_its_octets_and_no_more() {
        let (plain, rest) = pass(b"abcNEXT", Framing::Length(3), Out::Plain, 100).unwrap();
        assert_eq!(
            (plain.as_slice(), rest.as_slice()),
            (b"abc".as_slice(), b"NEXT".as_slice())
        );
        assert!(matches!(
            pass(b"ab", Framing::Length(3), Out::Plain, 1),
            Err(FlowError::Read(None))
        ));
        let (chunked, _) = pass(b"abc", Framing::Close, Out::Chunked, 100).unwrap();
        assert_eq!(chunked, b"3\r\nabc\r\n0\r\n\r\n");
    }

    #[test]
    fn endless_lines_are_refused() {
        let long = [b"3;".as_slice(), &[b'a'; 20_000]].concat();
        assert!(matches!(
            pass(&long, Framing::Chunked, Out::Plain, 1000),
            Err(FlowError::Framing(_))
        ));
        let trailers = [b"0\r\n".as_slice(), &b"t: 1\r\n".repeat(2000)].concat();
        assert!(matches!(
            pass(&trailers, Framing::Chunked, Out::Plain, 1000),
            Err(FlowError::Framing(_))
        ));
    }

    proptest::proptest! {
        #[test]
        fn random_chunks_never_panic(wire in "[0-9a-f;=\"\\r\\n x]{0,60}", piece in 1..20usize) {
            let _ = pass(wire.as_bytes(), Framing::Chunked, Out::Chunked, piece);
        }

        #[test]
        fn bodies_survive_reframing(body in proptest::collection::vec(proptest::num::u8::ANY, 0..5000), piece in 1..999usize) {
            let (chunked, _) = pass(&body, Framing::Close, Out::Chunked, piece).unwrap();
            let (plain, rest) = pass(&chunked, Framing::Chunked, Out::Plain, piece).unwrap();
            proptest::prop_assert!(plain == body && rest.is_empty());
        }
    }
}
