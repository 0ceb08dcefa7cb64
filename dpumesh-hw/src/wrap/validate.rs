//! [`Validate`]: holds a backend to the contract, call by call.
//!
//! It lets every call through and looks at the answer, knowing what was asked: a backend that takes a stale fence, a rule
//! without sense or a batch too long, that answers with too few results, with another's lease or out of order, gets its
//! answer replaced by a `Fault` error that says which sentence was broken. A backend in order notices nothing, not even
//! another wording of its errors; that is why nothing is refused here before the backend was asked.

mod offload;
mod ports;
mod steering;
mod transport;
mod vf;

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use dpumesh_core::backend::EventStream;
use dpumesh_core::{
    Backend, BackendInfo, Capabilities, Effect, Epoch, Error, ErrorKind, Fence, FlowSteering, NpOffload,
    Ports, Result, ShmTransport, VfAllocator,
};

/// A backend whose answers are checked.
#[derive(Debug)]
pub struct Validate {
    parts: Checked,
}

/// All parts in one.
#[derive(Debug)]
struct Checked {
    inner: Arc<dyn Backend>,
}

impl Validate {
    /// Checks a backend.
    pub fn new(inner: Arc<dyn Backend>) -> Self {
        Self {
            parts: Checked { inner },
        }
    }
}

impl Backend for Validate {
    fn info(&self) -> BackendInfo {
        self.parts.inner.info()
    }

    fn capabilities(&self) -> Capabilities {
        self.parts.inner.capabilities()
    }

    fn epoch(&self) -> Epoch {
        self.parts.inner.epoch()
    }

    fn vf(&self) -> Option<&dyn VfAllocator> {
        self.parts.inner.vf().map(|_| &self.parts as _)
    }

    fn steering(&self) -> Option<&dyn FlowSteering> {
        self.parts.inner.steering().map(|_| &self.parts as _)
    }

    fn offload(&self) -> Option<&dyn NpOffload> {
        self.parts.inner.offload().map(|_| &self.parts as _)
    }

    fn transport(&self) -> Option<&dyn ShmTransport> {
        self.parts.inner.transport().map(|_| &self.parts as _)
    }

    fn ports(&self) -> Option<&dyn Ports> {
        self.parts.inner.ports().map(|_| &self.parts as _)
    }

    fn events(&self) -> Box<dyn EventStream> {
        self.parts.inner.events()
    }
}

impl Checked {
    /// A look at one call that changes state.
    fn fenced(&self, operation: &'static str, fence: Fence) -> Look<'_> {
        Look {
            backend: &*self.inner,
            operation,
            fence: Some((fence, self.inner.epoch())),
        }
    }

    /// A look at one call that reads.
    fn reading(&self, operation: &'static str) -> Look<'_> {
        Look {
            backend: &*self.inner,
            operation,
            fence: None,
        }
    }
}

/// What one call's answer is held against.
struct Look<'a> {
    backend: &'a dyn Backend,
    operation: &'static str,
    /// The fence given, and the epoch before the call.
    fence: Option<(Fence, Epoch)>,
}

impl Look<'_> {
    /// Checks what holds for every call: the fence, and errors that say what they must.
    fn general<T>(&self, answer: Result<T>) -> Result<T> {
        match answer {
            Ok(value) => {
                self.check_fence()?;
                Ok(value)
            }
            Err(error) => Err(self.check_error(error)),
        }
    }

    fn check_fence(&self) -> Result<()> {
        let Some((fence, before)) = self.fence else {
            return Ok(());
        };
        // The epoch may have changed during the call: the fence must fit one of its ends.
        let after = self.backend.epoch();
        self.hold(fence.0 == before || fence.0 == after, || {
            format!("a fence of epoch {} was taken in epoch {}", fence.0.0, before.0)
        })
    }

    fn check_error(&self, error: Error) -> Error {
        let breach = match error.kind {
            ErrorKind::Stale | ErrorKind::Unsupported if error.effect != Effect::None => {
                "a refusal must have no effect"
            }
            ErrorKind::CapacityExceeded if error.object.as_ref().is_none_or(|o| o.name.is_empty()) => {
                "an error about a full resource must name it"
            }
            _ => return error,
        };
        let effect = error.effect;
        let message = format!("{breach}: {error}");
        self.breach(message).effect(effect).source(error)
    }

    /// A `Fault` unless the condition holds.
    fn hold<M: Into<Cow<'static, str>>>(&self, condition: bool, message: impl FnOnce() -> M) -> Result<()> {
        if condition {
            return Ok(());
        }
        Err(self.breach(message()))
    }

    fn breach(&self, message: impl Into<Cow<'static, str>>) -> Error {
        let effect = if self.fence.is_some() {
            Effect::Unknown
        } else {
            Effect::None
        };
        Error::new(ErrorKind::Fault, self.operation, message)
            .backend(self.backend.info().name)
            .effect(effect)
    }

    /// One answer per question.
    fn count(&self, what: &str, asked: usize, answered: usize) -> Result<()> {
        self.hold(asked == answered, || {
            format!("{answered} {what} for {asked} asked about")
        })
    }

    /// Elements stand in strictly ascending order.
    fn ascending<K: PartialOrd + fmt::Debug>(&self, mut keys: impl Iterator<Item = K>) -> Result<()> {
        let Some(mut last) = keys.next() else {
            return Ok(());
        };
        for key in keys {
            self.hold(last < key, || format!("{key:?} stands behind {last:?}"))?;
            last = key;
        }
        Ok(())
    }
}
