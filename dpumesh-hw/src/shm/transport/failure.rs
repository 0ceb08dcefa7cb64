//! What a [`ShmError`] means to a caller of the contract.

use dpumesh_core::{Error, ErrorKind, Retry};
use nix::errno::Errno;

use super::super::{Refusal, ShmError};
use crate::ring::RingError;

/// The error of `operation`. What the operating system said keeps its number.
pub(super) fn failed(operation: &'static str, error: ShmError) -> Error {
    let kind = kind(&error);
    let mut failure = Error::new(kind, operation, error.to_string());
    if let Some(resource) = resource(&error) {
        failure = failure.object(resource);
    }
    if kind == ErrorKind::DeviceLost {
        // The peer does not come back to this channel, whatever the card does.
        failure = failure.retry(Retry::Never);
    }
    match &error {
        ShmError::Os { source, .. } => {
            let code = source.raw_os_error().map(i64::from);
            let failure = code.into_iter().fold(failure, Error::vendor_code);
            failure.source(error)
        }
        _ => failure.source(error),
    }
}

fn kind(error: &ShmError) -> ErrorKind {
    match error {
        ShmError::Ring(RingError::PeerMisbehaved { .. }) | ShmError::Reset { .. } => {
            ErrorKind::PeerMisbehaved
        }
        ShmError::Ring(_) | ShmError::OverLimit { .. } => ErrorKind::Invalid,
        ShmError::PeerGone { .. } => ErrorKind::DeviceLost,
        ShmError::WrongVersion { .. } | ShmError::NotOffered(_) => ErrorKind::Unsupported,
        ShmError::Refused(reason) => refused(*reason),
        ShmError::Timeout(_) => ErrorKind::Timeout,
        ShmError::Os { source, .. } => source
            .raw_os_error()
            .map_or(ErrorKind::Io, |code| errno(Errno::from_raw(code))),
        lie if lie.is_misbehaviour() => ErrorKind::PeerMisbehaved,
        _ => ErrorKind::Io,
    }
}

fn refused(reason: Refusal) -> ErrorKind {
    match reason {
        Refusal::Version | Refusal::Mode => ErrorKind::Unsupported,
        Refusal::Limits => ErrorKind::Invalid,
        Refusal::Full => ErrorKind::CapacityExceeded,
        // What we send is right: who refuses it does not keep to the protocol.
        Refusal::Region | Refusal::Descriptors | Refusal::Malformed => ErrorKind::PeerMisbehaved,
        Refusal::Other => ErrorKind::Io,
    }
}

fn errno(errno: Errno) -> ErrorKind {
    match errno {
        Errno::ENOENT | Errno::ECONNREFUSED => ErrorKind::NotFound,
        Errno::EADDRINUSE => ErrorKind::Exists,
        Errno::EACCES | Errno::EPERM => ErrorKind::Denied,
        Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM | Errno::ENOSPC => ErrorKind::CapacityExceeded,
        _ => ErrorKind::Io,
    }
}

/// What is used up.
fn resource(error: &ShmError) -> Option<&'static str> {
    match error {
        ShmError::Refused(Refusal::Full) => Some("transport.channels"),
        ShmError::Os { source, .. } => match Errno::from_raw(source.raw_os_error()?) {
            Errno::EMFILE | Errno::ENFILE => Some("descriptors"),
            Errno::ENOMEM | Errno::ENOSPC => Some("memory"),
            _ => None,
        },
        _ => None,
    }
}
