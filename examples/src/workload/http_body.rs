//! The body of an HTTP/1.1 message (RFC 9112 §6): where it ends, and its octets.

use httparse::{Header, Status};

/// How the rest of a message is framed, and how much of it is still to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Body {
    /// So many octets more.
    Length(u64),
    /// Chunks; this is what comes next.
    Chunked(Next),
    /// Everything until the peer closes.
    UntilClose,
}

/// What a chunked body goes on with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// A line with the size of a chunk.
    Size,
    /// So many octets of the chunk.
    Data(u64),
    /// The line end after a chunk.
    End,
    /// A trailer line, or the empty one that ends the message.
    Trailer,
    /// Nothing.
    Nothing,
}

/// Longest line of a chunked body.
const LINE: usize = 8192;

impl Body {
    /// The framing that `headers` announce; `None`: they announce none.
    pub(super) fn announced(headers: &[Header<'_>]) -> Result<Option<Self>, &'static str> {
        let mut length = None;
        let mut chunked = false;
        for header in headers {
            if header.name.eq_ignore_ascii_case("transfer-encoding") {
                if !header.value.trim_ascii().eq_ignore_ascii_case(b"chunked") {
                    return Err("transfer-encoding: only chunked is understood");
                }
                chunked = true;
            } else if header.name.eq_ignore_ascii_case("content-length") {
                let value = std::str::from_utf8(header.value).map_err(|_| "content-length: not a number")?;
                let value: u64 = value.trim().parse().map_err(|_| "content-length: not a number")?;
                if length.is_some_and(|earlier| earlier != value) {
                    return Err("content-length: twice, and not the same");
                }
                length = Some(value);
            }
        }
        match (chunked, length) {
            (true, Some(_)) => Err("content-length beside transfer-encoding"),
            (true, None) => Ok(Some(Self::Chunked(Next::Size))),
            (false, length) => Ok(length.map(Self::Length)),
        }
    }

    /// Whether nothing more is to come.
    pub(super) fn is_complete(self) -> bool {
        matches!(self, Self::Length(0) | Self::Chunked(Next::Nothing))
    }

    /// Takes what it can of `input`, gives the octets of the body to `sink` and returns how many octets of `input`
    /// are used up. What is left over is to be offered again, with more behind it.
    pub(super) fn take(&mut self, input: &[u8], mut sink: impl FnMut(&[u8])) -> Result<usize, &'static str> {
        let mut used = 0;
        while !self.is_complete() {
            let rest = &input[used..];
            let step = self.step(rest, &mut sink)?;
            if step == 0 {
                break;
            }
            used += step;
        }
        Ok(used)
    }

    fn step(&mut self, rest: &[u8], sink: &mut impl FnMut(&[u8])) -> Result<usize, &'static str> {
        match self {
            Self::Length(left) | Self::Chunked(Next::Data(left)) => {
                let count = rest.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                sink(&rest[..count]);
                *left -= count as u64;
                if *self == Self::Chunked(Next::Data(0)) {
                    *self = Self::Chunked(Next::End);
                }
                Ok(count)
            }
            Self::UntilClose => {
                sink(rest);
                Ok(rest.len())
            }
            Self::Chunked(next) => next.line(rest),
        }
    }
}

impl Next {
    /// Takes one line; 0 if it is not complete yet.
    fn line(&mut self, rest: &[u8]) -> Result<usize, &'static str> {
        if *self == Self::Size {
            return match httparse::parse_chunk_size(rest).map_err(|_| "chunk size: not a number")? {
                Status::Complete((used, size)) => {
                    *self = if size == 0 {
                        Self::Trailer
                    } else {
                        Self::Data(size)
                    };
                    Ok(used)
                }
                Status::Partial => too_long(rest),
            };
        }
        let Some(end) = rest.windows(2).position(|pair| pair == b"\r\n") else {
            return too_long(rest);
        };
        *self = match (&*self, end) {
            (Self::End, 0) => Self::Size,
            (Self::End, _) => return Err("chunk: longer than its size"),
            (_, 0) => Self::Nothing,
            (_, _) => Self::Trailer,
        };
        Ok(end + 2)
    }
}

fn too_long(rest: &[u8]) -> Result<usize, &'static str> {
    if rest.len() > LINE {
        Err("chunk: line too long")
    } else {
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Decodes `text` offered in pieces of `piece` octets; returns the body and what follows it.
    fn decode(mut body: Body, text: &[u8], piece: usize) -> Result<(Vec<u8>, usize), &'static str> {
        let (mut octets, mut start) = (Vec::new(), 0);
        for end in (0..=text.len()).step_by(piece).chain([text.len()]) {
            start += body.take(&text[start..end], |part| octets.extend_from_slice(part))?;
        }
        if !body.is_complete() {
            return Err("incomplete");
        }
        Ok((octets, text.len() - start))
    }

    #[test]
    fn chunks_are_joined_however_they_are_cut() {
        let text = b"5\r\nhello\r\n6;ext=1\r\n world\r\n0\r\ntrailer: x\r\n\r\nNEXT";
        for piece in 1..text.len() {
            let (body, left) = decode(Body::Chunked(Next::Size), text, piece).expect("valid");
            assert_eq!(
                (body.as_slice(), left),
                (&b"hello world"[..], 4),
                "pieces of {piece}"
            );
        }
    }

    #[test]
    fn a_cut_body_is_not_complete() {
        let text = b"5\r\nhello\r\n0\r\n\r\n";
        for cut in 0..text.len() {
            assert!(
                decode(Body::Chunked(Next::Size), &text[..cut], 3).is_err(),
                "cut at {cut}"
            );
        }
    }

    #[test]
    fn malformed_framing_is_refused() {
        assert!(decode(Body::Chunked(Next::Size), b"xyz\r\n", 1).is_err());
        assert!(decode(Body::Chunked(Next::Size), b"2\r\nabc\r\n", 9).is_err());
        assert!(decode(Body::Chunked(Next::Trailer), &[b'a'; LINE + 2], LINE + 2).is_err());
        let header = |name, value| Header { name, value };
        for bad in [
            &[header("Content-Length", b"-1")][..],
            &[header("content-length", b"1"), header("content-length", b"2")],
            &[
                header("content-length", b"1"),
                header("transfer-encoding", b"chunked"),
            ],
            &[header("transfer-encoding", b"gzip")],
        ] {
            assert!(Body::announced(bad).is_err(), "{bad:?}");
        }
        assert_eq!(Body::announced(&[]), Ok(None));
        assert_eq!(
            Body::announced(&[header("content-length", b" 7")]),
            Ok(Some(Body::Length(7)))
        );
    }
}
