//! HTTP/2 (RFC 9113), by translation: a stream of it is to the rest of the proxy a connection that carries one exchange of
//! strict HTTP/1.1, so that routes, rules, retries and logs have one path and one reading of a request.
//!
//! ```text
//! client ─frames─► [`serve`] ─► [`exchange`] ─HTTP/1.1 text─► http1::serve ─text─► [`call`] ─► [`pool`] ─frames─► endpoint
//! ```
//! Frames, HPACK and windows are the `h2` crate's. `incoming` makes text of what comes off a stream, `outgoing` parses the
//! text that goes to one. The text never crosses a wire: it is made of names and values that were checked one by one, and is read
//! by the same strict parser as any client's. Trailers travel as those of a chunked body.
//!
//! Nothing is read ahead: an octet's window is given back when it has left for the other side's buffer, so that a slow reader
//! at one end stops the writer at the other.
//!
//! Design turned down: a governed path over abstract heads and bodies. Its every test of framing would have had to be made for both
//! codecs, and the path of an HTTP/1.1 request would have paid for it.

mod backlog;
pub mod call;
pub mod cork;
pub mod exchange;
mod incoming;
pub mod keepalive;
mod outgoing;
pub mod pool;
pub mod serve;

use std::fmt;
use std::io;
use std::sync::LazyLock;

use h2::Reason;

use crate::tls::Protocols;

/// What a client says first (RFC 9113 §3.4).
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The application protocol's name in TLS.
pub const ALPN: &[u8] = b"h2";

/// What `auto_config` offers where the TLS context has no list.
pub(crate) fn either() -> &'static Protocols {
    static EITHER: LazyLock<Protocols> =
        LazyLock::new(|| Protocols([ALPN, b"http/1.1"].map(<[u8]>::to_vec).into()));
    &EITHER
}

/// Streams that a peer may have open at once, where the configuration does not say. (Envoy: 1024.)
pub const STREAMS: u32 = 100;

/// A stream's window, octets. (Envoy: 16 MiB.)
pub const STREAM_WINDOW: u32 = 256 * 1024;

/// A connection's window, octets: what one peer can make this end hold at most. (Envoy: 24 MiB.)
pub const CONNECTION_WINDOW: u32 = 1024 * 1024;

/// Octets of a stream that wait for the connection to take them.
pub const SEND_BUFFER: usize = 16 * 1024;

/// Streams reset by the peer before they were looked at, at most. More is a flood, and ends the connection.
pub const PENDING_RESETS: usize = 50;

/// Malformed streams answered with a reset, at most.
pub const LOCAL_RESETS: usize = 100;

/// The other end gave a stream up, or this one does: carried in an [`io::Error`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reset {
    /// Why.
    pub reason: Reason,
    /// This end found the other's frames malformed.
    pub ours: bool,
}

impl fmt::Display for Reset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the stream was reset: {}", self.reason)
    }
}

impl std::error::Error for Reset {}

/// The reset that an error of a connection carries.
pub fn reset_of(error: &io::Error) -> Option<Reset> {
    error.get_ref()?.downcast_ref::<Reset>().copied()
}

/// As an error of a connection. A reset by the other end stays one; what ends the connection as a whole is an end.
fn broken(error: h2::Error) -> io::Error {
    let ours = error.is_library();
    match error.reason() {
        Some(reason) if error.is_reset() => io::Error::other(Reset { reason, ours }),
        // The stream is beyond the last one that the other end will look at.
        Some(Reason::NO_ERROR) if error.is_go_away() && error.is_remote() => io::Error::other(Reset {
            reason: Reason::REFUSED_STREAM,
            ours,
        }),
        _ => match error.into_io() {
            Some(error) => error,
            None => io::ErrorKind::ConnectionAborted.into(),
        },
    }
}
