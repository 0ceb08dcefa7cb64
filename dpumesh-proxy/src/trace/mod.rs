//! Distributed traces: who asked (W3C Trace Context, B3), what became of the request (a span), where spans go (OTLP over gRPC, Zipkin).
//!
//! ```text
//! traceparent, b3 ─► Context ─► a child of it ─► the same for the endpoint
//!                                  └─► Span ─► the worker's outbox ─► a collector, what came within a second at a time
//! ```
//! A request waits for nothing of this: spans that find no room are dropped and counted. [`otlp`] has the messages.

pub mod b3;
pub mod otlp;
pub(crate) mod outbox;
mod zipkin;

use std::sync::Arc;
use std::time::Duration;

use crate::config::model::ClusterRef;
use crate::stats::Scope;

/// The header that says which trace a request belongs to (W3C Trace Context, 3.2).
pub const PARENT: &[u8] = b"traceparent";

/// The header beside it that tracers keep notes in.
pub const STATE: &[u8] = b"tracestate";

/// Tracing of one connection manager.
#[derive(Debug)]
pub struct Tracing {
    /// Of 10,000 requests without a trace so many begin one that is recorded.
    pub sampled: u32,
    /// Of 10,000 requests at most so many are recorded, whatever the client says.
    pub overall: u32,
    /// Octets of the path that `http.url` shows.
    pub longest_path: usize,
    /// More attributes: name and where the value comes from.
    pub tags: Vec<(String, Tag)>,
    /// The endpoint is not told.
    pub hidden: bool,
    /// Which headers tell.
    pub headers: Headers,
    /// Requests of local pods: the span is a client's.
    pub outbound: bool,
    /// `http.PREFIX.tracing.*`
    pub stats: Arc<Scope>,
    /// Who takes the spans.
    pub exporter: Arc<Exporter>,
}

/// Which headers tell of a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Headers {
    /// `traceparent`, `tracestate`.
    W3c,
    /// `x-b3-*`, `b3`.
    B3 {
        /// Of a request that came in, client and server are one span.
        shared: bool,
        /// Traces that begin here have ids of 128 bits.
        wide: bool,
    },
}

/// How spans go to a collector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Way {
    /// OTLP over gRPC.
    Otlp,
    /// Zipkin's JSON, to this path.
    Zipkin(String),
}

/// Where a tag's value comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tag {
    /// The configuration.
    Literal(String),
    /// A header of the request (lower case), else the second.
    Header(Vec<u8>, String),
}

/// A collector.
#[derive(Debug)]
pub struct Exporter {
    /// How it takes them.
    pub way: Way,
    /// Its cluster.
    pub cluster: ClusterRef,
    /// The authority; the cluster's name where it is empty.
    pub authority: String,
    /// Lines of initial metadata.
    pub metadata: Vec<u8>,
    /// How long an export may take; `None` is for ever.
    pub timeout: Option<Duration>,
    /// `service.name`
    pub service: String,
    /// Node id and cluster.
    pub node: (String, String),
    /// Spans that may wait, per worker.
    pub most: usize,
    /// `tracing.opentelemetry.*`, `tracing.zipkin.*`
    pub stats: Arc<Scope>,
}

/// A place in a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Context {
    /// The trace.
    pub trace: [u8; 16],
    /// The span.
    pub span: [u8; 8],
    /// It is recorded.
    pub sampled: bool,
}

/// A request's place, and where it comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// This span.
    pub context: Context,
    /// The span that asked.
    pub parent: Option<[u8; 8]>,
}

impl Context {
    /// Reads a `traceparent`: version 00, or the front of a later one (W3C Trace Context, 3.2.2). `None` for anything else.
    pub fn parse(text: &[u8]) -> Option<Self> {
        let (front, rest) = text.split_at_checked(55)?;
        let version = octets::<1>(&front[..2])?[0];
        let dashes = front[2] == b'-' && front[35] == b'-' && front[52] == b'-';
        let ends = rest.is_empty() || (version > 0 && rest[0] == b'-');
        if version == 0xff || !dashes || !ends {
            return None;
        }
        let trace = octets::<16>(&front[3..35])?;
        let span = octets::<8>(&front[36..52])?;
        let [flags] = octets::<1>(&front[53..])?;
        (trace != [0; 16] && span != [0; 8]).then_some(Self {
            trace,
            span,
            sampled: flags & 1 == 1,
        })
    }

    /// The `traceparent` that says so.
    pub fn header(&self) -> [u8; 55] {
        let mut text = *b"00-00000000000000000000000000000000-0000000000000000-00";
        hex(&self.trace, &mut text[3..35]);
        hex(&self.span, &mut text[36..52]);
        text[54] = if self.sampled { b'1' } else { b'0' };
        text
    }

    fn new(sampled: bool) -> Self {
        let mut context = Self {
            trace: [0; 16],
            span: [0; 8],
            sampled,
        };
        // All zeros is no id.
        while context.trace == [0; 16] {
            context.trace = fastrand::u128(..).to_be_bytes();
        }
        context.next()
    }

    fn next(mut self) -> Self {
        self.span = fastrand::u64(1..).to_be_bytes();
        self
    }
}

impl Tracing {
    /// Whether the request with this id is traced, as far as this hop decides. Every hop that is configured alike decides alike: the id
    /// draws the lot, and says what a hop before has decided.
    pub fn is_traced(&self, id: &[u8]) -> bool {
        let digits = id.get(..8).and_then(|digits| std::str::from_utf8(digits).ok());
        let lot = digits.and_then(|digits| u32::from_str_radix(digits, 16).ok());
        let lot = lot.unwrap_or_else(|| fastrand::u32(..)) % 10_000;
        (decided(id) || lot < self.sampled) && lot < self.overall
    }
}

/// Where an id says what was decided about its request: the digit of a UUID's version.
const DECIDED: usize = 14;

/// Whether a hop before has decided that the request with this id is traced.
fn decided(id: &[u8]) -> bool {
    id.len() == 36 && matches!(id[DECIDED], b'9' | b'a' | b'b')
}

/// The id of a request with what is decided about it; `None` where it says so already, or cannot.
pub fn told(id: &[u8], traced: bool) -> Option<Vec<u8>> {
    let can = id.len() == 36 && id[DECIDED - 1] == b'-';
    if !can || decided(id) == traced {
        return None;
    }
    let mut id = id.to_vec();
    id[DECIDED] = if traced { b'9' } else { b'4' };
    Some(id)
}

impl Place {
    /// The place of a request that says this in B3's words.
    pub fn in_b3(said: b3::Said, traced: bool, (joins, wide): (bool, bool)) -> Self {
        let sampled = said.sampled.unwrap_or(traced);
        match said.place {
            Some((context, parent)) if joins => Self {
                context: Context { sampled, ..context },
                parent,
            },
            Some((context, _)) => Self {
                context: Context {
                    sampled,
                    ..context.next()
                },
                parent: Some(context.span),
            },
            None => {
                let mut context = Context::new(sampled);
                // The first span has the trace's own id.
                context.trace[8..].copy_from_slice(&context.span);
                if !wide {
                    context.trace[..8].fill(0);
                }
                Self {
                    context,
                    parent: None,
                }
            }
        }
    }

    /// The place of a request that came with this `traceparent`, if any. It is recorded if it is traced and whoever asked records it.
    pub fn behind(parent: Option<Context>, traced: bool) -> Self {
        match parent {
            Some(parent) => Self {
                context: Context {
                    sampled: traced && parent.sampled,
                    ..parent.next()
                },
                parent: Some(parent.span),
            },
            None => Self {
                context: Context::new(traced),
                parent: None,
            },
        }
    }
}

/// Lower-case hexadecimal digits, as the header has them.
fn octets<const N: usize>(text: &[u8]) -> Option<[u8; N]> {
    let digit = |b: u8| match b {
        b'0'..=b'9' => Some(b - b'0'),
        b'a'..=b'f' => Some(b - b'a' + 10),
        _ => None,
    };
    let mut out = [0; N];
    for (octet, pair) in out.iter_mut().zip(text.chunks_exact(2)) {
        *octet = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(out)
}

fn hex(octets: &[u8], text: &mut [u8]) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    for (octet, pair) in octets.iter().zip(text.chunks_exact_mut(2)) {
        pair[0] = DIGITS[usize::from(octet >> 4)];
        pair[1] = DIGITS[usize::from(octet & 15)];
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_no_traceparent_is_none() {
        const GOOD: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let parsed = |text: &str| Context::parse(text.as_bytes());
        assert!(parsed(GOOD).unwrap().sampled);
        assert!(!parsed(&GOOD.replace("-01", "-00")).unwrap().sampled);
        assert!(parsed(&GOOD.replacen("00", "cc", 1)).is_some(), "a later version");
        assert!(parsed(&format!("{}-more", GOOD.replacen("00", "01", 1))).is_some());
        for bad in [
            "",
            "00",
            &format!("{GOOD}-more"),
            &format!("{GOOD}0"),
            &GOOD.to_uppercase(),
            &GOOD.replacen("00", "ff", 1),
            &GOOD.replace("0af7651916cd43dd8448eb211c80319c", &"0".repeat(32)),
            &GOOD.replace("b7ad6b7169203331", &"0".repeat(16)),
            &GOOD.replace("-b7", "_b7"),
            &GOOD.replace("b7ad", "b7ag"),
        ] {
            assert_eq!(parsed(bad), None, "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn a_traceparent_is_read_as_it_was_written(trace in 1u128.., span in 1u64.., sampled: bool) {
            let context = Context { trace: trace.to_be_bytes(), span: span.to_be_bytes(), sampled };
            prop_assert_eq!(Context::parse(&context.header()), Some(context));
        }

        #[test]
        fn whatever_comes_is_no_panic(text in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = Context::parse(&text);
        }
    }
}
