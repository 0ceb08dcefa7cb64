//! How a case says what it found: [`CaseResult`], and the few checks that every case is made of.
//!
//! A case returns `Ok(())` when the sentence held. A [`Halt`] is either a failure, with the place in the kit that noticed
//! it, or the discovery that this card or fixture cannot show the sentence at all.

use std::fmt::Debug;
use std::future::Future;
use std::panic::Location;
use std::task::Poll;

use dpumesh_core::{Effect, Error, ErrorKind};

/// What a case found.
pub type CaseResult = Result<(), Halt>;

/// Why a case ended early.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Halt {
    /// The backend broke the sentence.
    Failed(String),
    /// The sentence cannot be shown here.
    NotSupported {
        /// Which ability is missing, as in a capability path.
        capability: String,
        /// Why, in one sentence.
        reason: String,
    },
}

impl Halt {
    /// A failure, with the place that noticed it.
    #[track_caller]
    pub fn failed(message: impl AsRef<str>) -> Self {
        let place = Location::caller();
        let file = place.file().rsplit('/').next().unwrap_or_default();
        Self::Failed(format!("{} ({file}:{})", message.as_ref(), place.line()))
    }

    /// The sentence cannot be shown here.
    pub fn not_supported(capability: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::NotSupported {
            capability: capability.into(),
            reason: reason.into(),
        }
    }
}

impl From<Error> for Halt {
    #[track_caller]
    fn from(error: Error) -> Self {
        Self::failed(format!("unexpected {:?}: {error}", error.kind))
    }
}

/// Ends the case as failed unless the condition holds.
macro_rules! ensure {
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            return Err($crate::conformance::check::Halt::failed(format!($($message)+)));
        }
    };
}

/// Ends the case as failed unless both values are equal.
macro_rules! ensure_eq {
    ($found:expr, $expected:expr, $($message:tt)+) => {{
        let (found, expected) = (&$found, &$expected);
        if found != expected {
            let what = format!($($message)+);
            return Err($crate::conformance::check::Halt::failed(format!(
                "{what}: found {found:?}, expected {expected:?}"
            )));
        }
    }};
}

pub(super) use {ensure, ensure_eq};

/// The error that a call had to give: this kind, naming this operation, without effect, with a message.
#[track_caller]
pub(super) fn refused<T: Debug>(
    result: Result<T, Error>,
    operation: &str,
    kind: ErrorKind,
) -> Result<Error, Halt> {
    refused_as(result, operation, &[kind])
}

/// Like [`refused`], where the contract leaves several kinds open.
#[track_caller]
pub(super) fn refused_as<T: Debug>(
    result: Result<T, Error>,
    operation: &str,
    kinds: &[ErrorKind],
) -> Result<Error, Halt> {
    let error = match result {
        Ok(value) => {
            return Err(Halt::failed(format!(
                "{operation} succeeded with {value:?}, expected {kinds:?}"
            )));
        }
        Err(error) => error,
    };
    let complaint = if !kinds.contains(&error.kind) {
        format!("is {:?}, expected {kinds:?}", error.kind)
    } else if error.operation != operation {
        "does not name the operation".to_owned()
    } else if error.effect != Effect::None {
        format!("claims effect {:?} for a refused call", error.effect)
    } else if error.message.is_empty() {
        "has no message".to_owned()
    } else {
        return Ok(error);
    };
    Err(Halt::failed(format!(
        "{operation}: the error {complaint}: {error}"
    )))
}

/// Polls a future once and drops it: what a caller does who gives up at once.
pub(super) async fn cancelled<F: Future>(future: F) {
    let mut future = Box::pin(future);
    std::future::poll_fn(|context| {
        let _ = future.as_mut().poll(context);
        Poll::Ready(())
    })
    .await;
}
