//! The error of every backend trait.
//!
//! An [`Error`] answers what a caller has to decide: what kind of failure, whose operation and which object and field,
//! **what took effect all the same** ([`Effect`]), and whether trying again can help ([`Retry`]). One struct serves all
//! trait families, because a caller composes them (a lease, then its rules) and undoes them together.

use std::borrow::Cow;
use std::error::Error as StdError;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Result of a backend operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Failure of a backend operation: one pointer to its [`Details`], whose fields are read through it.
///
/// Equality ignores [`Details::source`], so that tests can compare values.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Error(Box<Details>);

/// What an [`Error`] tells.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Details {
    /// What kind of failure.
    pub kind: ErrorKind,
    /// The trait method, as `steering.apply`.
    pub operation: Cow<'static, str>,
    /// Name of the backend that reports it; empty when a wrapper or the caller's side does.
    pub backend: Cow<'static, str>,
    /// Which of the given objects, and which field of it.
    pub object: Option<Object>,
    /// What changed on the device all the same.
    pub effect: Effect,
    /// Whether and when to try again.
    pub retry: Retry,
    /// The vendor's own number (an errno, an SDK status).
    pub vendor_code: Option<i64>,
    /// One sentence for people: what was wrong and what to do.
    pub message: Cow<'static, str>,
    /// What the backend's own layers said. Does not travel.
    #[serde(skip)]
    pub source: Option<Arc<dyn StdError + Send + Sync>>,
}

/// Kinds of failure. What each says about blame stands beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The backend cannot do this at all; [`crate::Capabilities`] or `validate` said so. The caller's choice.
    Unsupported,
    /// The request makes no sense on any backend. The caller's mistake.
    Invalid,
    /// No such object.
    NotFound,
    /// The object is there already, and differs.
    Exists,
    /// Two objects contradict each other: overlapping rules of equal priority, a duplicate MAC.
    Conflict,
    /// The lease or epoch given is not current any more. Read the state again.
    Stale,
    /// A finite resource is used up; [`Object::name`] says which.
    CapacityExceeded,
    /// In use by somebody; may work later.
    Busy,
    /// The deadline passed.
    Timeout,
    /// The device is gone: reset, reboot or surprise removal. Wait for `Back`.
    DeviceLost,
    /// Not allowed: another owner's object, a port without a lease, missing privilege.
    Denied,
    /// The operating system or a link failed.
    Io,
    /// The device, its firmware or the backend misbehaved. The backend's fault.
    Fault,
    /// A foreign backend broke the binary interface.
    Abi,
    /// A peer on shared memory or on a channel broke the protocol.
    PeerMisbehaved,
}

/// What a failed operation changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Effect {
    /// Nothing.
    None,
    /// Everything that was asked for; only the answer failed.
    Applied,
    /// Some of it; `list` or the per-operation outcomes tell which.
    Partial,
    /// Nobody can tell: read the state before acting.
    Unknown,
}

/// When trying again can help.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Retry {
    /// It will fail again.
    Never,
    /// At once or after a short pause.
    Now,
    /// After the device came back with a new epoch.
    AfterReset,
    /// After something was freed or released.
    AfterFree,
}

/// The part of a request that an error is about.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Object {
    /// Index in the batch or slice that was given.
    pub index: Option<usize>,
    /// Path of the field, as `pattern.ip_dst`; empty when it is the object as a whole.
    pub field: Cow<'static, str>,
    /// Name of the object or resource: a port, a cookie, `steering.rules`.
    pub name: String,
}

impl Error {
    /// A failure without effect, with the retry advice usual for its kind.
    pub fn new(
        kind: ErrorKind,
        operation: impl Into<Cow<'static, str>>,
        message: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self(Box::new(Details {
            kind,
            operation: operation.into(),
            backend: Cow::Borrowed(""),
            object: None,
            effect: Effect::None,
            retry: kind.usual_retry(),
            vendor_code: None,
            message: message.into(),
            source: None,
        }))
    }

    /// Names the backend.
    pub fn backend(mut self, name: impl Into<Cow<'static, str>>) -> Self {
        self.0.backend = name.into();
        self
    }

    /// Names the object.
    pub fn object(mut self, name: impl fmt::Display) -> Self {
        self.0.object.get_or_insert_default().name = name.to_string();
        self
    }

    /// Names the field.
    pub fn field(mut self, path: impl Into<Cow<'static, str>>) -> Self {
        self.0.object.get_or_insert_default().field = path.into();
        self
    }

    /// Says which element of a batch.
    pub fn index(mut self, index: usize) -> Self {
        self.0.object.get_or_insert_default().index = Some(index);
        self
    }

    /// Says what took effect.
    pub fn effect(mut self, effect: Effect) -> Self {
        self.0.effect = effect;
        self
    }

    /// Replaces the retry advice.
    pub fn retry(mut self, retry: Retry) -> Self {
        self.0.retry = retry;
        self
    }

    /// Adds the vendor's number.
    pub fn vendor_code(mut self, code: i64) -> Self {
        self.0.vendor_code = Some(code);
        self
    }

    /// Adds the cause.
    pub fn source(mut self, source: impl StdError + Send + Sync + 'static) -> Self {
        self.0.source = Some(Arc::new(source));
        self
    }
}

impl ErrorKind {
    /// What usually helps against this kind.
    pub const fn usual_retry(self) -> Retry {
        match self {
            Self::Busy | Self::Timeout | Self::Io => Retry::Now,
            Self::DeviceLost => Retry::AfterReset,
            Self::CapacityExceeded => Retry::AfterFree,
            _ => Retry::Never,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.operation)?;
        if let Some(object) = &self.object {
            write!(f, "{object}: ")?;
        }
        f.write_str(&self.message)?;
        if !self.backend.is_empty() {
            write!(f, " (backend {}", self.backend)?;
            if let Some(code) = self.vendor_code {
                write!(f, ", code {code}")?;
            }
            f.write_str(")")?;
        }
        match self.effect {
            Effect::None => Ok(()),
            Effect::Applied => f.write_str(" [took effect]"),
            Effect::Partial => f.write_str(" [took effect in part]"),
            Effect::Unknown => f.write_str(" [effect unknown]"),
        }
    }
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        if let Some(index) = self.index {
            write!(f, "[{index}]")?;
        }
        if !self.field.is_empty() {
            let dot = if self.name.is_empty() && self.index.is_none() {
                ""
            } else {
                "."
            };
            write!(f, "{dot}{}", self.field)?;
        }
        Ok(())
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source
            .as_ref()
            .map(|source| &**source as &(dyn StdError + 'static))
    }
}

impl Deref for Error {
    type Target = Details;

    fn deref(&self) -> &Details {
        &self.0
    }
}

impl DerefMut for Error {
    fn deref_mut(&mut self) -> &mut Details {
        &mut self.0
    }
}

impl PartialEq for Details {
    fn eq(&self, other: &Self) -> bool {
        self.kind == other.kind
            && self.operation == other.operation
            && self.backend == other.backend
            && self.object == other.object
            && self.effect == other.effect
            && self.retry == other.retry
            && self.vendor_code == other.vendor_code
            && self.message == other.message
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_says_what_where_and_what_to_expect() {
        let error = Error::new(
            ErrorKind::CapacityExceeded,
            "steering.apply",
            "table is full: 8 of 8 rules",
        )
        .backend("memory")
        .object("rules")
        .index(3)
        .field("group")
        .effect(Effect::Partial);
        assert_eq!(
            error.to_string(),
            "steering.apply: rules[3].group: table is full: 8 of 8 rules (backend memory) [took effect in part]"
        );
        assert_eq!(error.retry, Retry::AfterFree);
    }
}
