//! What must hold of any octets that come as HTTP/1 messages. Run by the fuzzer's target `http1`, and here over its corpus.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use tokio::io::{AsyncRead, ReadBuf};

use super::body::{Flow, Out};
use super::buffer::Buffer;
use super::head::{FieldKind, Fields, Framing, RequestHead, ResponseHead, Scan};
use super::path::normalized;
use super::policy::{EscapedSlashes, PathPolicy};

/// Reads `octets` as a request and as a response: no panic, no ambiguity left, nothing that depends on how they are cut.
///
/// # Panics
/// One of these does not hold.
pub fn message(octets: &[u8]) {
    let whole = Scan::default().find(octets);
    for cut in [octets.len() / 2, octets.len().saturating_sub(1)] {
        let mut scan = Scan::default();
        match scan.find(&octets[..cut]) {
            Ok(None) => assert_eq!(scan.find(octets), whole),
            early => assert_eq!(early, whole),
        }
    }
    let Ok(Some(length)) = whole else {
        return;
    };
    let (head, rest) = octets.split_at(length);
    let mut own = head.to_vec();
    let mut request = RequestHead::default();
    if request.parse(&mut own).is_ok() {
        check_request(&request, &own);
        body(request.fields.framing, rest);
    }
    let mut own = head.to_vec();
    let mut response = ResponseHead::default();
    if response.parse(&mut own).is_ok() {
        assert!((100..=999).contains(&response.status));
        check_fields(&response.fields, &own);
        body(response.fields.framing, rest);
    }
}

/// Written anew from what was understood of it, a request is understood in the same way.
fn check_request(request: &RequestHead, head: &[u8]) {
    check_fields(&request.fields, head);
    let [method, path, authority] =
        [request.method, request.path, request.authority].map(|s| s.of_head(head));
    assert!(path.iter().all(u8::is_ascii_graphic) && !path.contains(&b'#'));
    let mut again = method.to_vec();
    again.push(b' ');
    if request.absolute && !request.connect {
        again.extend_from_slice(b"http://");
    }
    if request.absolute {
        again.extend_from_slice(authority);
    }
    again.extend_from_slice(path);
    let version: &[u8] = if request.fields.http11 { b"1" } else { b"0" };
    again.extend([b" HTTP/1.", version, b"\r\n"].concat());
    for field in &request.fields.fields {
        again.extend([field.name.of_head(head), b":", field.value.of_head(head), b"\r\n"].concat());
    }
    again.extend_from_slice(b"\r\n");
    let mut second = RequestHead::default();
    second.parse(&mut again).expect("a request that was good before");
    let understood = |r: &RequestHead, head: &[u8]| {
        let parts = [r.method, r.path, r.authority].map(|s| s.of_head(head).to_vec());
        let flags = (
            r.upgrade,
            r.connect,
            r.expects_continue,
            r.fields.close,
            r.fields.keep_alive,
        );
        (parts, flags, r.fields.framing, r.fields.fields.len())
    };
    assert_eq!(understood(request, head), understood(&second, &again));
    let strict = PathPolicy {
        normalize: true,
        merge_slashes: true,
        escaped_slashes: EscapedSlashes::Unescape,
    };
    if let Ok(Some(one)) = normalized(path, strict) {
        // There is one form, and it is kept.
        assert!(one.starts_with(b"/") && one.iter().all(|b| b.is_ascii_graphic()));
        assert_eq!(
            normalized(&one, strict),
            Ok(None),
            "{}",
            String::from_utf8_lossy(&one)
        );
    }
}

fn check_fields(fields: &Fields, head: &[u8]) {
    let (mut lengths, mut codings) = (0, 0);
    for field in &fields.fields {
        let (name, value) = (field.name.of_head(head), field.value.of_head(head));
        assert!(
            !name.is_empty()
                && name
                    .iter()
                    .all(|b| super::is_token(*b) && !b.is_ascii_uppercase())
        );
        assert!(!value.iter().any(|b| matches!(b, b'\r' | b'\n' | 0)));
        lengths += usize::from(name == b"content-length");
        codings += usize::from(name == b"transfer-encoding");
        assert!(name != b"connection" || field.kind == FieldKind::Connection || field.kind == FieldKind::Hop);
    }
    assert!(lengths + codings <= 1, "two ways to say how long a body is");
    assert_eq!(codings == 1, fields.framing == Framing::Chunked);
}

/// However a body comes in pieces, the same goes out; and what goes out chunked is the same body.
fn body(framing: Framing, wire: &[u8]) {
    let all = pass(wire, framing, Out::Plain, usize::MAX);
    assert_eq!(pass(wire, framing, Out::Plain, 1), all);
    let Some((plain, rest)) = all else {
        return;
    };
    assert!(wire.ends_with(&rest));
    let (chunked, _) = pass(wire, framing, Out::Chunked, 3).expect("a body that was good before");
    if framing != Framing::None && framing != Framing::Length(0) {
        let again = pass(&chunked, Framing::Chunked, Out::Plain, usize::MAX);
        assert_eq!(again, Some((plain, Vec::new())));
    }
}

/// What came out, and what is left unread; `None` for a body that is malformed or ends early.
fn pass(wire: &[u8], framing: Framing, out: Out, piece: usize) -> Option<(Vec<u8>, Vec<u8>)> {
    let (mut from, mut to) = (Pieces(wire, piece), Vec::new());
    let (mut buffer, mut pending) = (Buffer::default(), Vec::new());
    let mut flow = Flow::new(framing, out);
    let mut cx = Context::from_waker(Waker::noop());
    loop {
        match flow.poll(&mut cx, &mut from, &mut to, &mut buffer, &mut pending) {
            Poll::Ready(result) => {
                result.ok()?;
                return Some((to, [buffer.unread(), from.0].concat()));
            }
            // It gave others a turn.
            Poll::Pending => {}
        }
    }
}

/// A source that gives so many octets at a time.
struct Pieces<'a>(&'a [u8], usize);

impl AsyncRead for Pieces<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        room: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let n = self.1.min(self.0.len()).min(room.remaining());
        room.put_slice(&self.0[..n]);
        self.0 = &self.0[n..];
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_corpus_holds() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/corpus/http1");
        let files: Vec<_> = std::fs::read_dir(folder).unwrap().map(Result::unwrap).collect();
        assert!(files.len() >= 16, "{} files", files.len());
        for file in files {
            let octets = std::fs::read(file.path()).unwrap();
            super::message(&octets);
            (0..octets.len()).for_each(|length| super::message(&octets[..length]));
        }
    }
}
