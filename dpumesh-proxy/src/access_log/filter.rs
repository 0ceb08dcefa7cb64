//! Which requests and connections are logged.

use super::{Headers, Record, join_flags};
use crate::route::fault::Percentage;
use crate::route::{HeaderMatch, RequestView};

/// Envoy's `AccessLogFilter`.
#[derive(Debug)]
pub enum Filter {
    /// By the status sent; 0 where there is none.
    Status(Compare),
    /// By the duration in milliseconds.
    Duration(Compare),
    /// Everything: no request here is a health check answered by a filter.
    NotHealthCheck,
    /// At random.
    Runtime(Percentage),
    /// By a request header.
    Header(HeaderMatch),
    /// With one of these response flags; with any where the list is empty.
    Flags(Vec<String>),
    /// With one of these gRPC codes, or with none of them.
    Grpc {
        /// The codes.
        statuses: Vec<u32>,
        /// None of them.
        exclude: bool,
    },
    /// All of these.
    And(Vec<Self>),
    /// One of these.
    Or(Vec<Self>),
}

/// A comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Compare {
    /// How.
    pub how: How,
    /// With what.
    pub value: u64,
}

/// How numbers are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// Equal.
    Equal,
    /// As large or larger.
    AtLeast,
    /// As small or smaller.
    AtMost,
    /// Not equal.
    NotEqual,
}

impl Compare {
    fn holds(self, number: u64) -> bool {
        match self.how {
            How::Equal => number == self.value,
            How::AtLeast => number >= self.value,
            How::AtMost => number <= self.value,
            How::NotEqual => number != self.value,
        }
    }
}

impl Filter {
    /// Whether a line is written.
    pub(super) fn passes(&self, record: &Record<'_>) -> bool {
        match self {
            Self::Status(compare) => compare.holds(u64::from(record.status)),
            Self::Duration(compare) => {
                compare.holds(u64::try_from(record.duration.as_millis()).unwrap_or(u64::MAX))
            }
            Self::NotHealthCheck => true,
            Self::Runtime(share) => share.takes(fastrand::u64(..)),
            Self::Header(rule) => rule.holds(&Logged(record.request)),
            Self::Flags(wanted) => {
                let mut flags = Vec::new();
                join_flags(record.flags, record.extra.besides, &mut flags);
                let mut set = flags.split(|b| *b == b',').filter(|f| *f != b"-");
                set.any(|flag| wanted.is_empty() || wanted.iter().any(|w| w.as_bytes() == flag))
            }
            Self::Grpc { statuses, exclude } => {
                statuses.contains(&record.extra.grpc.unwrap_or(2)) != *exclude
            }
            Self::And(all) => all.iter().all(|one| one.passes(record)),
            Self::Or(all) => all.iter().any(|one| one.passes(record)),
        }
    }
}

/// The request as header rules look at it.
struct Logged<'a>(Option<&'a dyn Headers>);

impl Logged<'_> {
    fn value(&self, name: &[u8]) -> &[u8] {
        self.0
            .and_then(|headers| headers.header(name))
            .unwrap_or_default()
    }
}

impl RequestView for Logged<'_> {
    fn host(&self) -> &[u8] {
        self.value(b":authority")
    }

    fn path(&self) -> &[u8] {
        self.value(b":path")
    }

    fn method(&self) -> &[u8] {
        self.value(b":method")
    }

    fn each_header<'a>(&'a self, name: &[u8], see: &mut dyn FnMut(&'a [u8])) {
        if let Some(value) = self.0.and_then(|headers| headers.header(name)) {
            see(value);
        }
    }
}
