//! When a request is sent once more, and after which pause.
//!
//! Envoy's `RetryPolicy`: a list of conditions, a number of attempts beyond the first, a time limit for each. What has
//! begun to go out to the client is never retried; that is for the caller to see to.

use std::time::Duration;

/// `RetryPolicy`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RetryPolicy {
    /// The conditions.
    pub on: RetryOn,
    /// Attempts beyond the first.
    pub retries: u32,
    /// From the sending of one attempt to the beginning of its response.
    pub per_try_timeout: Option<Duration>,
    /// Statuses for [`RetryOn::STATUS_CODES`].
    pub status_codes: Vec<u16>,
    /// The first pause is up to this; each next one up to twice as much.
    pub base_interval: Duration,
    /// No pause is longer.
    pub max_interval: Duration,
    /// How often another endpoint is looked for when one is picked that has failed already
    /// (`previous_hosts`); 0 takes what comes.
    pub reselections: u32,
    /// After so many attempts, and after as many more each time, the priorities of the endpoints tried are left for others
    /// (`previous_priorities`); 0 never.
    pub priorities_after: u32,
}

/// A set of conditions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RetryOn(u32);

/// Why an attempt gave no response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reset {
    /// No connection could be made.
    Connect,
    /// The connection broke, or what came was no HTTP; `begun` when something of the request had been sent.
    Broken {
        /// Something of the request had been sent.
        begun: bool,
    },
    /// The endpoint says that it has not looked at the request (HTTP/2).
    Refused,
    /// The attempt's own time limit.
    TryTimeout,
}

impl RetryOn {
    /// Any 5xx, and no response at all.
    pub const SERVER_ERROR: Self = Self(1);
    /// 502, 503, 504, and no response at all.
    pub const GATEWAY_ERROR: Self = Self(1 << 1);
    /// No response at all.
    pub const RESET: Self = Self(1 << 2);
    /// No response, and nothing of the request had been sent.
    pub const RESET_BEFORE_REQUEST: Self = Self(1 << 3);
    /// No connection could be made.
    pub const CONNECT_FAILURE: Self = Self(1 << 4);
    /// A response with `x-envoy-ratelimited`.
    pub const RATE_LIMITED: Self = Self(1 << 5);
    /// 409.
    pub const CLIENT_ERROR: Self = Self(1 << 6);
    /// One of the policy's statuses.
    pub const STATUS_CODES: Self = Self(1 << 7);
    /// gRPC status 1 in the response's head.
    pub const CANCELLED: Self = Self(1 << 8);
    /// gRPC status 4.
    pub const DEADLINE_EXCEEDED: Self = Self(1 << 9);
    /// gRPC status 8.
    pub const RESOURCE_EXHAUSTED: Self = Self(1 << 10);
    /// gRPC status 13.
    pub const INTERNAL: Self = Self(1 << 11);
    /// gRPC status 14.
    pub const UNAVAILABLE: Self = Self(1 << 12);

    /// The endpoint refused the stream.
    pub const REFUSED_STREAM: Self = Self(1 << 13);

    /// The conditions on a gRPC status.
    const GRPC: Self = Self(
        Self::CANCELLED.0
            | Self::DEADLINE_EXCEEDED.0
            | Self::RESOURCE_EXHAUSTED.0
            | Self::INTERNAL.0
            | Self::UNAVAILABLE.0,
    );

    /// Conditions under which a request may have been sent, body and all, before it is retried. The gRPC ones are not
    /// among them: for their sake only gRPC bodies are kept.
    const AFTER_SENDING: Self = Self(
        Self::SERVER_ERROR.0
            | Self::GATEWAY_ERROR.0
            | Self::RESET.0
            | Self::RATE_LIMITED.0
            | Self::CLIENT_ERROR.0
            | Self::STATUS_CODES.0,
    );

    /// The conditions of a comma-separated list. `http3-post-connect-failure` cannot happen here and adds
    /// none; nor does `retriable-headers` without headers.
    ///
    /// # Errors
    /// The word that is unknown.
    pub fn parse(list: &str) -> Result<Self, &str> {
        let mut on = Self::default();
        for word in list.split(',').map(str::trim).filter(|w| !w.is_empty()) {
            on.0 |= match word {
                "5xx" => Self::SERVER_ERROR.0,
                "gateway-error" => Self::GATEWAY_ERROR.0,
                "reset" => Self::RESET.0,
                "reset-before-request" => Self::RESET_BEFORE_REQUEST.0,
                "connect-failure" => Self::CONNECT_FAILURE.0,
                "envoy-ratelimited" => Self::RATE_LIMITED.0,
                "retriable-4xx" => Self::CLIENT_ERROR.0,
                "retriable-status-codes" => Self::STATUS_CODES.0,
                "cancelled" => Self::CANCELLED.0,
                "deadline-exceeded" => Self::DEADLINE_EXCEEDED.0,
                "resource-exhausted" => Self::RESOURCE_EXHAUSTED.0,
                "internal" => Self::INTERNAL.0,
                "unavailable" => Self::UNAVAILABLE.0,
                "refused-stream" => Self::REFUSED_STREAM.0,
                "http3-post-connect-failure" | "retriable-headers" => 0,
                other => return Err(other),
            };
        }
        Ok(on)
    }

    /// Whether any of `others` is in the set.
    pub fn has(self, others: Self) -> bool {
        self.0 & others.0 != 0
    }
}

impl RetryPolicy {
    /// Whether an attempt without a response is followed by another.
    pub fn after_reset(&self, reset: Reset) -> bool {
        let whatever = Self::any_of(&[RetryOn::SERVER_ERROR, RetryOn::GATEWAY_ERROR, RetryOn::RESET]);
        self.on.has(whatever)
            || match reset {
                Reset::Connect => self.on.has(Self::any_of(&[
                    RetryOn::CONNECT_FAILURE,
                    RetryOn::RESET_BEFORE_REQUEST,
                ])),
                Reset::Broken { begun } => !begun && self.on.has(RetryOn::RESET_BEFORE_REQUEST),
                Reset::Refused => self.on.has(RetryOn::REFUSED_STREAM),
                Reset::TryTimeout => false,
            }
    }

    fn any_of(list: &[RetryOn]) -> RetryOn {
        RetryOn(list.iter().fold(0, |bits, on| bits | on.0))
    }

    /// Whether a response with `status` is dropped for another attempt. `grpc` is its `grpc-status`.
    pub fn after_response(&self, status: u16, rate_limited: bool, grpc: Option<&[u8]>) -> bool {
        if rate_limited {
            return self.on.has(RetryOn::RATE_LIMITED);
        }
        let by_status = match status {
            502..=504 => self
                .on
                .has(Self::any_of(&[RetryOn::SERVER_ERROR, RetryOn::GATEWAY_ERROR])),
            500..=599 => self.on.has(RetryOn::SERVER_ERROR),
            409 => self.on.has(RetryOn::CLIENT_ERROR),
            _ => false,
        };
        let listed = self.on.has(RetryOn::STATUS_CODES) && self.status_codes.contains(&status);
        by_status
            || listed
            || grpc.is_some_and(|code| {
                self.on.has(match code {
                    b"1" => RetryOn::CANCELLED,
                    b"4" => RetryOn::DEADLINE_EXCEEDED,
                    b"8" => RetryOn::RESOURCE_EXHAUSTED,
                    b"13" => RetryOn::INTERNAL,
                    b"14" => RetryOn::UNAVAILABLE,
                    _ => RetryOn::default(),
                })
            })
    }

    /// Whether a request's body has to be kept while it is sent.
    pub fn keeps_body(&self) -> bool {
        let listed = !self.status_codes.is_empty() || !self.on.has(RetryOn::STATUS_CODES);
        let after_sending = RetryOn(self.on.0 & RetryOn::AFTER_SENDING.0);
        self.retries > 0 && (after_sending != RetryOn::STATUS_CODES || listed) && after_sending.0 != 0
    }

    /// Whether a gRPC request's body has to be kept besides.
    pub fn keeps_grpc_body(&self) -> bool {
        self.retries > 0
            && self
                .on
                .has(Self::any_of(&[RetryOn::GRPC, RetryOn::REFUSED_STREAM]))
    }

    /// The pause before retry number `retry` (the first is 1), given any random number.
    pub fn pause(&self, retry: u32, random: u64) -> Duration {
        let doubled = self.base_interval.saturating_mul(1 << (retry - 1).min(20));
        let most = u64::try_from(doubled.min(self.max_interval).as_micros()).unwrap_or(u64::MAX);
        Duration::from_micros(random % most.max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(on: &str) -> RetryPolicy {
        RetryPolicy {
            on: RetryOn::parse(on).unwrap(),
            retries: 2,
            per_try_timeout: None,
            status_codes: vec![404],
            base_interval: Duration::from_millis(25),
            max_interval: Duration::from_millis(250),
            reselections: 0,
            priorities_after: 0,
        }
    }

    #[test]
    fn conditions_follow_envoy() {
        for (on, statuses) in [
            ("5xx", vec![500, 502, 503, 504, 599]),
            ("gateway-error", vec![502, 503, 504]),
            ("retriable-4xx", vec![409]),
            ("retriable-status-codes", vec![404]),
            ("connect-failure,refused-stream", vec![]),
            ("reset", vec![]),
        ] {
            let policy = policy(on);
            let retried: Vec<u16> = (100..600)
                .filter(|s| policy.after_response(*s, false, None))
                .filter(|s| on != "5xx" || statuses.contains(s))
                .collect();
            assert_eq!(retried, statuses, "{on}");
        }
        for (on, connect, sent, unsent, timeout) in [
            ("5xx", true, true, true, true),
            ("gateway-error", true, true, true, true),
            ("reset", true, true, true, true),
            ("reset-before-request", true, false, true, false),
            ("connect-failure", true, false, false, false),
            ("retriable-4xx,unavailable", false, false, false, false),
        ] {
            let policy = policy(on);
            let found = [
                policy.after_reset(Reset::Connect),
                policy.after_reset(Reset::Broken { begun: true }),
                policy.after_reset(Reset::Broken { begun: false }),
                policy.after_reset(Reset::TryTimeout),
            ];
            assert_eq!(found, [connect, sent, unsent, timeout], "{on}");
        }
    }

    #[test]
    fn a_rate_limited_response_needs_its_own_condition() {
        assert!(!policy("5xx").after_response(503, true, None));
        assert!(policy("envoy-ratelimited").after_response(429, true, None));
    }

    #[test]
    fn grpc_statuses_count_in_the_head() {
        let policy = policy("unavailable,cancelled");
        assert!(policy.after_response(200, false, Some(b"14")));
        assert!(policy.after_response(200, false, Some(b"1")));
        assert!(!policy.after_response(200, false, Some(b"13")));
        assert!(!policy.after_response(503, false, None));
    }

    #[test]
    fn a_body_is_kept_only_where_it_could_be_needed() {
        assert!(policy("5xx").keeps_body());
        assert!(policy("retriable-status-codes").keeps_body());
        let istio = RetryPolicy {
            status_codes: vec![],
            ..policy("connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes")
        };
        assert!(!istio.keeps_body());
        assert!(!policy("connect-failure,reset-before-request").keeps_body());
        let none = RetryPolicy {
            retries: 0,
            ..policy("5xx")
        };
        assert!(!none.keeps_body());
    }

    #[test]
    fn pauses_grow_and_stay_within_bounds() {
        let policy = policy("5xx");
        assert_eq!(policy.pause(1, 24_999), Duration::from_micros(24_999));
        assert_eq!(policy.pause(1, 25_000), Duration::ZERO);
        assert_eq!(policy.pause(2, 49_999), Duration::from_micros(49_999));
        assert!(policy.pause(60, u64::MAX) < Duration::from_millis(250));
        assert_eq!(RetryOn::parse("5xx, nonsense"), Err("nonsense"));
    }
}
