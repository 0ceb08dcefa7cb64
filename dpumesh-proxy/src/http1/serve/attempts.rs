//! How often a request has been tried, and whether it is tried once more.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use super::failure::Broken;
use crate::balance::Ask;
use crate::http1::body::Flow;
use crate::http1::head::Framing;
use crate::route::retry::{Reset, RetryPolicy};
use crate::stats::Cluster as Stat;
use crate::upstream::{Lane, Picked};
use crate::worker::Buffers;

/// Octets of a request's body that are kept for another attempt; a longer one is sent once. (Envoy's default.)
const LARGEST_KEPT: usize = 1 << 20;

/// The attempts of one request.
pub(super) struct Attempts<'a> {
    policy: Option<&'a RetryPolicy>,
    /// The one that goes on, from 1.
    pub(super) number: u32,
    /// A retry was due, but there are no more.
    pub(super) exhausted: bool,
    /// A retry was due, but there were too many in the cluster.
    pub(super) overflowed: bool,
    retrying: Option<Retrying>,
    /// Endpoints that were tried since priorities were left, and those priorities.
    since: Vec<u32>,
    tried: Vec<u32>,
    failed: Vec<SocketAddr>,
}

impl<'a> Attempts<'a> {
    pub(super) fn new(policy: Option<&'a RetryPolicy>) -> Self {
        Self {
            policy,
            number: 1,
            exhausted: false,
            overflowed: false,
            retrying: None,
            since: Vec::new(),
            tried: Vec::new(),
            failed: Vec::new(),
        }
    }

    /// Picks an endpoint, one that has not failed yet if the policy says to look for one.
    pub(super) fn pick(&mut self, lane: &Lane, ask: &Ask<'_>) -> Option<Picked> {
        let ask = &Ask {
            tried: &self.tried,
            ..*ask
        };
        let mut picked = lane.pick(ask)?;
        let reselections = self.policy.map_or(0, |p| p.reselections);
        for attempt in 1..=reselections {
            if !self.failed.contains(&picked.endpoint.address) {
                break;
            }
            picked = lane.pick(&Ask { attempt, ..*ask })?;
        }
        let after = self.policy.map_or(0, |p| p.priorities_after);
        if after > 0 {
            self.since.push(lane.priority(&picked));
            if self.since.len() >= after as usize {
                self.tried.append(&mut self.since);
                if lane.has_tried_all(&self.tried) {
                    self.tried.clear();
                }
            }
        }
        Some(picked)
    }

    /// Has `flow` keep its body if it might be sent again.
    pub(super) fn prepare(&self, buffers: &Buffers, flow: &mut Flow) {
        let keeps = |p: &RetryPolicy| {
            p.keeps_body() || (p.keeps_grpc_body() && !flow.read_all() && buffers.is_grpc())
        };
        if self.policy.is_some_and(keeps) {
            flow.keep(LARGEST_KEPT);
        }
    }

    /// When the attempt that begins now is over.
    pub(super) fn deadline(&self, whole: Option<Instant>) -> Option<Instant> {
        let limit = self.try_limit()?;
        let end = Instant::now() + limit;
        // A limit as long as the request's own has no effect.
        whole.is_none_or(|whole| end < whole).then_some(end)
    }

    /// The time limit of one attempt.
    pub(super) fn try_limit(&self) -> Option<Duration> {
        self.policy.and_then(|p| p.per_try_timeout)
    }

    /// Whether the policy would retry after this, attempts left or not.
    pub(super) fn concerns(&self, broken: &Broken) -> bool {
        let reset = broken.reset();
        self.policy
            .is_some_and(|p| p.retries > 0 && reset.is_some_and(|reset| p.after_reset(reset)))
    }

    /// Whether the response whose head has been read is to be dropped for another attempt.
    pub(super) fn concern_response(&self, buffers: &Buffers, flow: &Flow) -> bool {
        let Some(policy) = self.policy else {
            return false;
        };
        let (head, response) = (buffers.response_in.head(), &buffers.response);
        let limited = || response.fields.get(head, b"x-envoy-ratelimited").is_some();
        let grpc = || response.fields.get(head, b"grpc-status");
        policy.retries > 0
            && flow.read_all()
            && flow.is_replayable()
            && policy.after_response(response.status, limited(), grpc())
    }

    /// Takes another attempt if there is one: the pause before it.
    pub(super) fn again(&mut self, lane: &Lane, endpoint: SocketAddr) -> Option<Duration> {
        let policy = self.policy?;
        // What the attempt before took of the cluster's limit is given back first.
        self.retrying = None;
        if self.number > policy.retries {
            self.exhausted = true;
            return None;
        }
        self.retrying = Retrying::begin(lane);
        self.overflowed = self.retrying.is_none();
        if self.overflowed {
            return None;
        }
        if policy.reselections > 0 {
            self.failed.push(endpoint);
        }
        let pause = policy.pause(self.number, fastrand::u64(..));
        self.number += 1;
        Some(pause)
    }
}

/// Counts a request as being retried, as long as it is not known whether it is the last time.
struct Retrying(Arc<AtomicU32>);

impl Retrying {
    /// `None` where the cluster has as many already as it may have.
    fn begin(lane: &Lane) -> Option<Self> {
        let cluster = &lane.cluster;
        let at_work = || cluster.stats.get(Stat::RqActive) + cluster.stats.get(Stat::RqPendingActive);
        let most = cluster.limits.retries.most(at_work);
        let others = cluster.retrying.fetch_add(1, Ordering::Relaxed);
        // Given back by the drop where it is one too many.
        Some(Self(Arc::clone(&cluster.retrying))).filter(|_| others < most)
    }
}

impl Drop for Retrying {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Whether a request can be sent from its beginning: nothing of it has been taken, or all that was is at hand.
pub(super) fn can_be_sent_again(flow: Option<&Flow>) -> bool {
    flow.is_none_or(|flow| flow.untouched() || flow.is_replayable())
}

/// Whether the response's body is at hand too, so that its connection may serve again.
pub(super) fn takes_rest_of_response(buffers: &mut Buffers) -> bool {
    let is_head = buffers.request.method.of_head(buffers.request_in.head()) == b"HEAD";
    let input = &mut buffers.response_in;
    let length = match buffers.response.fields.framing {
        _ if is_head || matches!(buffers.response.status, 204 | 304) => 0,
        Framing::None => 0,
        Framing::Length(length) => length,
        Framing::Chunked | Framing::Close => return false,
    };
    let whole = input.unread().len() as u64 == length;
    input.clear();
    whole && buffers.response.fields.persistent()
}

impl Broken {
    /// What it is to a retry policy.
    fn reset(&self) -> Option<Reset> {
        use super::failure::Failure;
        use crate::upstream::NoConnection;
        Some(match self {
            Self::NotConnected(NoConnection::Overflow) => return None,
            Self::NotConnected(_) => Reset::Connect,
            Self::Failed(Failure::Upstream { begun, .. } | Failure::Protocol { begun }) => {
                Reset::Broken { begun: *begun }
            }
            Self::Failed(Failure::Reset { refused: true, .. }) => Reset::Refused,
            Self::Failed(Failure::Reset { begun, .. }) => Reset::Broken { begun: *begun },
            Self::Failed(Failure::TryTimeout) => Reset::TryTimeout,
            Self::Failed(Failure::AttemptDuration) => Reset::Broken { begun: true },
            Self::Failed(_) => return None,
        })
    }
}
