//! gRPC's message encoding as JSON of serde types, and the contract's [`Error`] in a gRPC status.

use std::marker::PhantomData;

use bytes::{Buf, BufMut};
use dpumesh_core::{Error, ErrorKind};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::{Code, Status};

use super::with_causes;

/// Encodes `T`, decodes `U`.
#[derive(Debug)]
pub(super) struct Json<T, U>(PhantomData<fn() -> (T, U)>);

impl<T, U> Default for Json<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

/// One direction of [`Json`].
#[derive(Debug)]
pub(super) struct Half<T>(PhantomData<fn() -> T>);

impl<T: Serialize + Send + 'static, U: DeserializeOwned + Send + 'static> Codec for Json<T, U> {
    type Encode = T;
    type Decode = U;
    type Encoder = Half<T>;
    type Decoder = Half<U>;

    fn encoder(&mut self) -> Half<T> {
        Half(PhantomData)
    }

    fn decoder(&mut self) -> Half<U> {
        Half(PhantomData)
    }
}

impl<T: Serialize> Encoder for Half<T> {
    type Item = T;
    type Error = Status;

    fn encode(&mut self, item: T, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        serde_json::to_writer(buffer.writer(), &item)
            .map_err(|error| Status::internal(format!("message cannot be encoded: {error}")))
    }
}

impl<U: DeserializeOwned> Decoder for Half<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        let octets = buffer.copy_to_bytes(buffer.remaining());
        serde_json::from_slice(&octets)
            .map(Some)
            .map_err(|error| Status::invalid_argument(short(format!("message is not understood: {error}"))))
    }
}

/// Octets of a status message: it travels in a header, and may quote what the peer sent.
const MAX_STATUS: usize = 1024;

fn short(mut message: String) -> String {
    if message.len() > MAX_STATUS {
        let end = (0..=MAX_STATUS)
            .rev()
            .find(|at| message.is_char_boundary(*at))
            .unwrap_or(0);
        message.truncate(end);
        message.push('…');
    }
    message
}

/// A status that carries the whole error.
pub(super) fn to_status(error: Error) -> Status {
    let code = match error.kind {
        ErrorKind::Unsupported => Code::Unimplemented,
        ErrorKind::Invalid => Code::InvalidArgument,
        ErrorKind::NotFound => Code::NotFound,
        ErrorKind::Exists => Code::AlreadyExists,
        ErrorKind::Conflict | ErrorKind::Stale => Code::FailedPrecondition,
        ErrorKind::CapacityExceeded => Code::ResourceExhausted,
        ErrorKind::Timeout => Code::DeadlineExceeded,
        ErrorKind::Busy | ErrorKind::DeviceLost => Code::Unavailable,
        ErrorKind::Denied => Code::PermissionDenied,
        _ => Code::Internal,
    };
    let details = serde_json::to_vec(&error).unwrap_or_default(); // plain data: cannot fail
    Status::with_details(code, short(error.message.to_string()), details.into())
}

/// The error of a status: the one it carries, or one that says what became of the call.
pub(super) fn from_status(operation: &'static str, status: &Status) -> Error {
    if let Ok(error) = serde_json::from_slice::<Error>(status.details()) {
        return error;
    }
    let kind = match status.code() {
        Code::Cancelled if timed_out(status) => ErrorKind::Timeout,
        _ if refused_in_handshake(status) => ErrorKind::Denied,
        Code::Unavailable | Code::Cancelled | Code::Aborted => ErrorKind::DeviceLost,
        Code::DeadlineExceeded => ErrorKind::Timeout,
        Code::PermissionDenied | Code::Unauthenticated => ErrorKind::Denied,
        Code::FailedPrecondition | Code::Unimplemented => ErrorKind::Unsupported,
        Code::InvalidArgument | Code::OutOfRange => ErrorKind::Invalid,
        _ => ErrorKind::Io,
    };
    let effect = match kind {
        ErrorKind::DeviceLost | ErrorKind::Timeout | ErrorKind::Io => dpumesh_core::Effect::Unknown,
        _ => dpumesh_core::Effect::None,
    };
    // Below the status there is, for instance, why a handshake was refused.
    let message = with_causes(format!("channel: {}", status.message()), status);
    Error::new(kind, operation, message).effect(effect)
}

/// The client's own deadline comes as a cancellation.
fn timed_out(status: &Status) -> bool {
    below(status).any(|error| error.is::<tonic::TimeoutExpired>())
}

/// In TLS 1.3 the dataplane looks at our certificate when we take the handshake for finished: its alert ends the first
/// call, which was never looked at.
fn refused_in_handshake(status: &Status) -> bool {
    below(status).any(|error| {
        let io = error.downcast_ref::<std::io::Error>();
        io.is_some_and(|io| io.kind() == std::io::ErrorKind::InvalidData)
    })
}

fn below(status: &Status) -> impl Iterator<Item = &(dyn std::error::Error + 'static)> {
    std::iter::successors(std::error::Error::source(status), |error| error.source())
}

#[cfg(test)]
mod tests {
    use dpumesh_core::{Effect, Retry};

    use super::*;

    #[test]
    fn an_error_comes_out_as_it_went_in() {
        let error = Error::new(ErrorKind::CapacityExceeded, "steering.apply", "full")
            .backend("soft")
            .object("steering.rules")
            .index(7)
            .field("pattern")
            .effect(Effect::Partial)
            .retry(Retry::AfterReset)
            .vendor_code(-5);
        assert_eq!(from_status("steering.apply", &to_status(error.clone())), error);
    }

    #[test]
    fn what_became_of_a_call_without_an_answer_is_unknown() {
        let late = Status::from_error(Box::new(tonic::TimeoutExpired(())));
        let late = from_status("steering.list", &late);
        assert_eq!((late.kind, late.effect), (ErrorKind::Timeout, Effect::Unknown));
        let gone = from_status("steering.list", &Status::unavailable("no route"));
        assert_eq!((gone.kind, gone.effect), (ErrorKind::DeviceLost, Effect::Unknown));
        let refused = from_status("steering.list", &Status::permission_denied("no"));
        assert_eq!((refused.kind, refused.effect), (ErrorKind::Denied, Effect::None));
    }

    #[test]
    fn a_peers_words_are_quoted_up_to_a_length() {
        let long = Error::new(ErrorKind::Invalid, "x", "ä".repeat(MAX_STATUS));
        let message = to_status(long).message().to_owned();
        assert!(
            message.len() <= MAX_STATUS + 3 && message.ends_with('…'),
            "{} octets",
            message.len()
        );
    }
}
