//! Why a stream could not be had.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};

/// A stream operation that failed: which, between whom, and why.
#[derive(Debug)]
pub struct StreamError {
    kind: StreamErrorKind,
    operation: &'static str,
    object: String,
    source: Option<io::Error>,
}

/// What went wrong, as far as a caller may want to act on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum StreamErrorKind {
    /// The thread has not called `enter_worker`: a socket made now would be outside the stack, so none is made.
    NotEntered,
    /// Somebody listens on the port and does not share it.
    PortInUse,
    /// Every source port for this source and endpoint is taken: bound the connections per (pod, endpoint).
    SourcePortsExhausted,
    /// Source and destination are of different address families.
    FamilyMismatch,
    /// The connection needs the reserved node-local source of its family, and none is configured.
    NoLocalSource,
    /// The endpoint refused (RST).
    Refused,
    /// There is no way to the endpoint.
    Unreachable,
    /// The endpoint did not answer in TCP's time.
    TimedOut,
    /// The connection ended while it was set up.
    Reset,
    /// Descriptors or memory have run out.
    Exhausted,
    /// The process may not make transparent sockets here (CAP_NET_ADMIN).
    NotPermitted,
    /// Something else; see the source.
    Other,
}

impl StreamError {
    pub(super) fn new(kind: StreamErrorKind, operation: &'static str, object: impl fmt::Display) -> Self {
        Self {
            kind,
            operation,
            object: object.to_string(),
            source: None,
        }
    }

    pub(super) fn system(operation: &'static str, object: impl fmt::Display, error: io::Error) -> Self {
        let kind = classify(operation, &error);
        Self {
            kind,
            operation,
            object: object.to_string(),
            source: Some(error),
        }
    }

    pub(super) fn connecting(source: Option<IpAddr>, destination: SocketAddr, error: io::Error) -> Self {
        Self::system(CONNECT, Ends { source, destination }, error)
    }

    pub(super) fn cannot_connect(
        kind: StreamErrorKind,
        source: Option<IpAddr>,
        destination: SocketAddr,
    ) -> Self {
        Self::new(kind, CONNECT, Ends { source, destination })
    }

    /// What went wrong.
    pub fn kind(&self) -> StreamErrorKind {
        self.kind
    }

    /// For an error of `poll_accept`: the listener is as good as before.
    pub fn is_transient(&self) -> bool {
        use StreamErrorKind::{Exhausted, Reset, TimedOut, Unreachable};
        // accept(2): network errors of the new connection are reported by it, and concern nobody else.
        matches!(self.kind, Exhausted | Reset | TimedOut | Unreachable)
    }
}

pub(super) const CONNECT: &str = "connect";

struct Ends {
    source: Option<IpAddr>,
    destination: SocketAddr,
}

impl fmt::Display for Ends {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.source {
            Some(source) => write!(f, "{source} to {}", self.destination),
            None => write!(f, "to {}", self.destination),
        }
    }
}

fn classify(operation: &str, error: &io::Error) -> StreamErrorKind {
    match error.raw_os_error() {
        // For a transparent socket every address can be bound, so only the port can be lacking.
        Some(libc::EADDRNOTAVAIL) if operation == CONNECT => StreamErrorKind::SourcePortsExhausted,
        Some(libc::EADDRINUSE) => StreamErrorKind::PortInUse,
        Some(libc::ECONNREFUSED) => StreamErrorKind::Refused,
        Some(libc::ENETUNREACH | libc::EHOSTUNREACH | libc::ENETDOWN) => StreamErrorKind::Unreachable,
        Some(libc::ETIMEDOUT) => StreamErrorKind::TimedOut,
        Some(libc::ECONNRESET | libc::ECONNABORTED | libc::EPIPE) => StreamErrorKind::Reset,
        Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM) => StreamErrorKind::Exhausted,
        Some(libc::EPERM | libc::EACCES) => StreamErrorKind::NotPermitted,
        _ => StreamErrorKind::Other,
    }
}

impl fmt::Display for StreamErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotEntered => "this thread has not entered the stack (enter_worker comes first)",
            Self::PortInUse => "the port is taken by a listener that does not share it",
            Self::SourcePortsExhausted => "no source port is left for this source and endpoint",
            Self::FamilyMismatch => "source and destination are of different address families",
            Self::NoLocalSource => "needs a node-local source address of this family, and none is configured",
            Self::Refused => "refused by the endpoint",
            Self::Unreachable => "no way to the endpoint",
            Self::TimedOut => "no answer in time",
            Self::Reset => "the connection ended while it was set up",
            Self::Exhausted => "descriptors or memory have run out",
            Self::NotPermitted => "transparent sockets need CAP_NET_ADMIN in the stack namespace",
            Self::Other => "failed",
        })
    }
}

impl fmt::Display for StreamError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: {}", self.operation, self.object, self.kind)?;
        self.source
            .as_ref()
            .map_or(Ok(()), |error| write!(f, " ({error})"))
    }
}

impl std::error::Error for StreamError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|error| error as _)
    }
}
