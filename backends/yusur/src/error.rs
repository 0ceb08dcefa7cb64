//! What the library's codes mean to a caller of the traits.

use dpumesh_core::{Effect, Error, ErrorKind};

use crate::sys::Failure;
use crate::table;

/// Name of the backend in infos and errors.
pub(crate) const NAME: &str = "yusur";

/// An error of this backend.
pub(crate) fn error(
    kind: ErrorKind,
    operation: &'static str,
    message: impl Into<std::borrow::Cow<'static, str>>,
) -> Error {
    Error::new(kind, operation, message).backend(NAME)
}

/// A failed call as the error of an operation. Whether something took effect is for the caller to say, except where the
/// way to the card failed: then nobody knows.
pub(crate) fn of(operation: &'static str, failure: Failure) -> Error {
    let kind = kind(failure.status);
    let effect = match kind {
        ErrorKind::Timeout | ErrorKind::Io => Effect::Unknown,
        _ => Effect::None,
    };
    error(kind, operation, failure.text.clone())
        .vendor_code(failure.status.into())
        .effect(effect)
        .source(failure)
}

/// The kind of failure that a code stands for.
pub(crate) fn kind(status: i32) -> ErrorKind {
    match status {
        table::E_INVALID | table::E_DIGEST => ErrorKind::Invalid,
        table::E_NOT_FOUND => ErrorKind::NotFound,
        table::E_EXISTS => ErrorKind::Exists,
        table::E_FULL | table::E_COLLISION => ErrorKind::CapacityExceeded,
        table::E_BUSY => ErrorKind::Busy,
        table::E_TIMEOUT => ErrorKind::Timeout,
        // Its caller's fence was good, so the reset is news.
        table::E_GONE | table::E_STALE => ErrorKind::DeviceLost,
        table::E_UNSUPPORTED => ErrorKind::Unsupported,
        table::E_IO => ErrorKind::Io,
        _ => ErrorKind::Fault,
    }
}

/// True when the NP is in another life than the caller thought.
pub(crate) fn is_lost(failure: &Failure) -> bool {
    matches!(failure.status, table::E_GONE | table::E_STALE)
}
