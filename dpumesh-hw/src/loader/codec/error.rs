//! Errors: kind, effect, retry advice, object, vendor code and bounded texts.

use dpumesh_core::{Effect, Error, ErrorKind, Retry};

use crate::loader::abi::*;
use crate::loader::arena::{Broken, Sized32, terminate, terminated};
use crate::loader::codec::codes;

codes! { put_kind, get_kind, ErrorKind, u32,
    ErrorKind::Unsupported => ErrorKind::Unsupported, DM_UNSUPPORTED;
    ErrorKind::Invalid => ErrorKind::Invalid, DM_INVALID;
    ErrorKind::NotFound => ErrorKind::NotFound, DM_NOT_FOUND;
    ErrorKind::Exists => ErrorKind::Exists, DM_EXISTS;
    ErrorKind::Conflict => ErrorKind::Conflict, DM_CONFLICT;
    ErrorKind::Stale => ErrorKind::Stale, DM_STALE;
    ErrorKind::CapacityExceeded => ErrorKind::CapacityExceeded, DM_CAPACITY_EXCEEDED;
    ErrorKind::Busy => ErrorKind::Busy, DM_BUSY;
    ErrorKind::Timeout => ErrorKind::Timeout, DM_TIMEOUT;
    ErrorKind::DeviceLost => ErrorKind::DeviceLost, DM_DEVICE_LOST;
    ErrorKind::Denied => ErrorKind::Denied, DM_DENIED;
    ErrorKind::Io => ErrorKind::Io, DM_IO;
    ErrorKind::Fault => ErrorKind::Fault, DM_FAULT;
    ErrorKind::Abi => ErrorKind::Abi, DM_ABI;
    ErrorKind::PeerMisbehaved => ErrorKind::PeerMisbehaved, DM_PEER_MISBEHAVED;
}

codes! { put_effect, get_effect, Effect, u32,
    Effect::None => Effect::None, DM_EFFECT_NONE;
    Effect::Applied => Effect::Applied, DM_EFFECT_APPLIED;
    Effect::Partial => Effect::Partial, DM_EFFECT_PARTIAL;
    Effect::Unknown => Effect::Unknown, DM_EFFECT_UNKNOWN;
}

codes! { put_retry, get_retry, Retry, u32,
    Retry::Never => Retry::Never, DM_RETRY_NEVER;
    Retry::Now => Retry::Now, DM_RETRY_NOW;
    Retry::AfterReset => Retry::AfterReset, DM_RETRY_AFTER_RESET;
    Retry::AfterFree => Retry::AfterFree, DM_RETRY_AFTER_FREE;
}

/// An error as the interface has it. Its operation and backend are known to the reader; its sources travel as text.
pub(crate) fn put_error(error: &Error) -> dm_error {
    let mut raw = dm_error::empty();
    raw.kind = match put_kind(error.kind) {
        super::UNKNOWN_CODE => DM_FAULT,
        kind => kind,
    };
    raw.effect = put_effect(error.effect);
    raw.retry = put_retry(error.retry);
    if let Some(code) = error.vendor_code {
        raw.has |= DM_HAS_VENDOR_CODE;
        raw.vendor_code = code;
    }
    if let Some(object) = &error.object {
        raw.has |= DM_HAS_OBJECT;
        if let Some(index) = object.index {
            raw.has |= DM_HAS_INDEX;
            raw.index = index as u64;
        }
        terminate(&mut raw.object, &object.name);
        terminate(&mut raw.field, &object.field);
    }
    terminate(&mut raw.message, &error.message);
    if let Some(source) = &error.source {
        terminate(&mut raw.cause, &chain(&**source));
    }
    raw
}

/// A source and what caused it, in one line.
fn chain(source: &(dyn std::error::Error + Send + Sync)) -> String {
    let mut text = source.to_string();
    let mut next = source.source();
    while let Some(deeper) = next {
        text.push_str(": ");
        text.push_str(&deeper.to_string());
        next = deeper.source();
    }
    text
}

/// What a library's own layers said.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Cause(String);

/// An error that the other side wrote.
pub(crate) fn get_error(raw: &dm_error, operation: &'static str, backend: &str) -> Result<Error, Broken> {
    let kind = get_kind(raw.kind, "error.kind")?;
    let message = terminated(&raw.message, "error.message")?;
    let mut error = Error::new(kind, operation, message)
        .backend(backend.to_owned())
        .effect(get_effect(raw.effect, "error.effect")?);
    if raw.retry != DM_RETRY_USUAL {
        error = error.retry(get_retry(raw.retry, "error.retry")?);
    }
    let (object, field) = (
        terminated(&raw.object, "error.object")?,
        terminated(&raw.field, "error.field")?,
    );
    if raw.has & DM_HAS_OBJECT != 0 || !object.is_empty() || !field.is_empty() {
        error = error.object(object).field(field);
    }
    if raw.has & DM_HAS_INDEX != 0 {
        error = error.index(raw.index as usize);
    }
    if raw.has & DM_HAS_VENDOR_CODE != 0 {
        error = error.vendor_code(raw.vendor_code);
    }
    let cause = terminated(&raw.cause, "error.cause")?;
    if !cause.is_empty() {
        error = error.source(Cause(cause));
    }
    Ok(error)
}
