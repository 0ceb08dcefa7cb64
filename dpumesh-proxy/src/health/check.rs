//! Active health checks: what an endpoint is asked, how often, and what its answers make of it.
//!
//! [`Session`] is the judge of one endpoint: no clock, no socket. An endpoint is unhealthy until its first check; that one decides alone, and
//! later ones by the thresholds. An answer that says "no" counts at once, silence and broken connections as often as
//! `unhealthy_threshold` says.

use std::ops::Range;
use std::time::Duration;

use super::{DEGRADED_CHECK, FAILED_CHECK, PENDING_CHECK, State, TIMED_OUT_CHECK};
use crate::stats::{HealthCheck as Stat, Scope, Shard};

/// `HealthCheck`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    /// Bound on one check, connecting included.
    pub timeout: Duration,
    /// Pauses between checks.
    pub pauses: Pauses,
    /// Silences in a row that make an endpoint unhealthy.
    pub unhealthy_threshold: u32,
    /// Good answers in a row that make it healthy.
    pub healthy_threshold: u32,
    /// Asked here instead of the endpoint's own port.
    pub port: Option<u16>,
    /// What is asked.
    pub question: Question,
}

/// Pauses between checks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pauses {
    /// Of a healthy endpoint.
    pub healthy: Duration,
    /// Of one that is healthy but has begun to fail, or the other way round.
    pub healthy_edge: Duration,
    /// Of an unhealthy one.
    pub unhealthy: Duration,
    /// Of one that has begun to fail.
    pub unhealthy_edge: Duration,
    /// While the cluster has had no connection yet.
    pub no_traffic: Duration,
    /// The same, of a healthy one.
    pub no_traffic_healthy: Duration,
    /// Up to so much is waited before the first check.
    pub first_jitter: Duration,
    /// Up to so much is added to each pause.
    pub jitter: Duration,
    /// And up to so many percent.
    pub jitter_percent: u32,
}

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Question {
    /// A request.
    Http(Http),
    /// A connection; octets to send, and blocks to find in what comes, in this order.
    Tcp {
        /// Sent first.
        send: Vec<u8>,
        /// Awaited.
        receive: Vec<Vec<u8>>,
    },
    /// `grpc.health.v1.Health/Check`.
    Grpc {
        /// The service asked for; empty is the server as a whole.
        service: String,
        /// `:authority`; empty is the endpoint's name or the cluster's.
        authority: String,
    },
}

/// `HttpHealthCheck`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Http {
    /// The method.
    pub method: String,
    /// The path.
    pub path: String,
    /// `host`; empty is the endpoint's name or the cluster's.
    pub host: String,
    /// Asked in HTTP/2.
    pub http2: bool,
    /// Statuses of a healthy endpoint.
    pub expected: Vec<Range<u16>>,
    /// Statuses that count as silence.
    pub retriable: Vec<Range<u16>>,
}

/// What a check found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// The right answer; `degraded` if it says so of itself.
    Good {
        /// `x-envoy-degraded` was there.
        degraded: bool,
    },
    /// A wrong answer.
    Bad,
    /// An answer that counts as none.
    Retriable,
    /// No connection, or it broke.
    Broken,
    /// Nothing in time.
    TimedOut,
}

/// What follows from a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    /// The answer was right.
    pub good: bool,
    /// The endpoint's flags have changed.
    pub changed: bool,
    /// They will if it goes on like this.
    pub on_edge: bool,
}

/// The checks of one endpoint so far.
#[derive(Debug, Default)]
pub struct Session {
    good: u32,
    bad: u32,
    checked: bool,
}

impl Session {
    /// Judges what a check found.
    pub fn judge(&mut self, check: &Check, state: &State, stats: &Scope, found: Found) -> Verdict {
        let count = |member: Stat| stats.inc(Shard::CONTROL, member);
        let mut verdict = match found {
            Found::Good { degraded } => {
                count(Stat::Success);
                self.good(check, state, degraded)
            }
            found => {
                count(Stat::Failure);
                if matches!(found, Found::Broken | Found::TimedOut) {
                    count(Stat::NetworkFailure);
                }
                self.bad(check, state, found)
            }
        };
        if state.has(PENDING_CHECK) {
            state.clear(PENDING_CHECK);
            verdict.changed = true;
        }
        self.checked = true;
        verdict
    }

    fn good(&mut self, check: &Check, state: &State, degraded: bool) -> Verdict {
        self.bad = 0;
        let (mut changed, mut on_edge) = (false, false);
        if state.has(FAILED_CHECK) {
            self.good += 1;
            changed = !self.checked || self.good == check.healthy_threshold;
            on_edge = !changed;
            if changed {
                state.clear(FAILED_CHECK | TIMED_OUT_CHECK);
            }
        }
        if degraded != state.has(DEGRADED_CHECK) {
            changed = true;
            if degraded {
                state.set(DEGRADED_CHECK);
            } else {
                state.clear(DEGRADED_CHECK);
            }
        }
        Verdict {
            good: true,
            changed,
            on_edge,
        }
    }

    fn bad(&mut self, check: &Check, state: &State, found: Found) -> Verdict {
        self.good = 0;
        let (mut changed, mut on_edge) = (false, false);
        if !state.has(FAILED_CHECK) {
            self.bad += 1;
            changed = found == Found::Bad || self.bad == check.unhealthy_threshold;
            on_edge = !changed;
            if changed {
                state.set(FAILED_CHECK);
            }
        }
        if state.has(FAILED_CHECK) && (found == Found::TimedOut) != state.has(TIMED_OUT_CHECK) {
            changed = true;
            if found == Found::TimedOut {
                state.set(TIMED_OUT_CHECK);
            } else {
                state.clear(TIMED_OUT_CHECK);
            }
        }
        Verdict {
            good: false,
            changed,
            on_edge,
        }
    }
}

impl Pauses {
    /// The pause behind a check. `traffic`: the cluster has had a connection.
    pub fn after(&self, verdict: Verdict, traffic: bool) -> Duration {
        let base = match (traffic, verdict.good, verdict.on_edge) {
            (true, true, false) => self.healthy,
            (true, true, true) => self.healthy_edge,
            (true, false, false) => self.unhealthy,
            (true, false, true) => self.unhealthy_edge,
            (false, true, false) => self.no_traffic_healthy,
            (false, ..) => self.no_traffic,
        };
        let share = base.saturating_mul(self.jitter_percent) / 100;
        base + upto(share) + upto(self.jitter)
    }
}

/// A random time up to `most`.
pub(crate) fn upto(most: Duration) -> Duration {
    let most = u64::try_from(most.as_micros()).unwrap_or(u64::MAX);
    if most == 0 {
        return Duration::ZERO;
    }
    Duration::from_micros(fastrand::u64(..most))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::Registry;

    fn check() -> Check {
        let second = Duration::from_secs(1);
        Check {
            timeout: second,
            pauses: Pauses {
                healthy: second,
                healthy_edge: second * 2,
                unhealthy: second * 3,
                unhealthy_edge: second * 4,
                no_traffic: second * 5,
                no_traffic_healthy: second * 6,
                first_jitter: Duration::ZERO,
                jitter: Duration::ZERO,
                jitter_percent: 0,
            },
            unhealthy_threshold: 2,
            healthy_threshold: 3,
            port: None,
            question: Question::Tcp {
                send: Vec::new(),
                receive: Vec::new(),
            },
        }
    }

    /// What each finding makes of an endpoint: `+` up, `-` down, with the pause in seconds.
    fn run(found: &[Found]) -> String {
        let registry = Registry::new(0);
        let stats = registry.scope("h", Stat::TABLE);
        let state = State::default();
        state.set(FAILED_CHECK | PENDING_CHECK);
        let (check, mut session) = (check(), Session::default());
        let step = |found: &Found| {
            let verdict = session.judge(&check, &state, &stats, *found);
            let mark = if state.has(FAILED_CHECK) { '-' } else { '+' };
            format!("{mark}{}", check.pauses.after(verdict, true).as_secs())
        };
        found.iter().map(step).collect()
    }

    const GOOD: Found = Found::Good { degraded: false };

    #[test]
    fn the_first_check_decides_and_then_the_thresholds() {
        assert_eq!(run(&[GOOD, GOOD]), "+1+1");
        assert_eq!(run(&[Found::Broken, GOOD, GOOD, GOOD]), "-3-2-2+1");
        assert_eq!(
            run(&[GOOD, Found::TimedOut, GOOD, Found::Broken, Found::Broken]),
            "+1+4+1+4-3"
        );
        assert_eq!(run(&[GOOD, Found::Bad]), "+1-3");
        assert_eq!(run(&[GOOD, Found::Retriable, Found::Retriable]), "+1+4-3");
        assert_eq!(
            run(&[Found::Bad, GOOD, GOOD, Found::Bad, GOOD, GOOD, GOOD]),
            "-3-2-2-3-2-2+1"
        );
    }

    #[test]
    fn without_traffic_pauses_are_their_own() {
        let verdict = |good, on_edge| Verdict {
            good,
            changed: false,
            on_edge,
        };
        let pauses = check().pauses;
        assert_eq!(pauses.after(verdict(true, false), false).as_secs(), 6);
        assert_eq!(pauses.after(verdict(true, true), false).as_secs(), 5);
        assert_eq!(pauses.after(verdict(false, false), false).as_secs(), 5);
    }

    #[test]
    fn flags_tell_a_timeout_and_degradation() {
        let registry = Registry::new(0);
        let stats = registry.scope("h", Stat::TABLE);
        let state = State::default();
        state.set(FAILED_CHECK | PENDING_CHECK);
        let flags = |state: &State| state.flags(crate::health::Eds::Healthy);
        let mut session = Session::default();
        assert_eq!(flags(&state), "/failed_active_hc/pending_active_hc");
        assert!(session.judge(&check(), &state, &stats, Found::TimedOut).changed);
        assert_eq!(flags(&state), "/failed_active_hc/active_hc_timeout");
        for _ in 0..3 {
            session.judge(&check(), &state, &stats, Found::Good { degraded: true });
        }
        assert_eq!(flags(&state), "/degraded_active_hc");
        assert!(session.judge(&check(), &state, &stats, GOOD).changed);
        assert_eq!(flags(&state), "healthy");
        assert_eq!(
            (stats.get(Stat::Success), stats.get(Stat::NetworkFailure)),
            (4, 1)
        );
    }
}
