//! Local rate limits: token buckets that all workers share without a lock, and the filters that ask them.
//!
//! A [`Bucket`] is one number: the moment at which it was, or would have been, empty. Tokens come in evenly, one every
//! `fill_interval / tokens_per_fill`; what is there is the time since that moment, up to `max_tokens`. Taking one moves
//! the moment by one token's time. Time is an argument.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crate::route::AddHeader;
use crate::route::fault::Percentage;
use crate::stats::{LocalRate as Stat, Scope, Shard};

/// The body of a limited request's answer, and its details.
pub const LIMITED: &str = "local_rate_limited";

/// A token bucket.
#[derive(Debug)]
pub struct Bucket {
    /// From when moments count.
    origin: Instant,
    /// When it was empty: nanoseconds since `origin`.
    empty: AtomicI64,
    /// Nanoseconds in which one token comes.
    token: i64,
    /// Nanoseconds in which an empty bucket fills.
    whole: i64,
}

impl Bucket {
    /// A full bucket of `most` tokens, which gets `per_fill` tokens every `interval`. `None` where it would take more than
    /// seventy years to fill.
    pub fn new(most: u32, per_fill: u32, interval: Duration, now: Instant) -> Option<Self> {
        let token = (interval.as_nanos() / u128::from(per_fill.max(1))).max(1);
        let whole = token.checked_mul(u128::from(most))?;
        let whole = i64::try_from(whole).ok().filter(|w| *w < i64::MAX / 4)?;
        Some(Self {
            origin: now,
            empty: AtomicI64::new(-whole),
            token: i64::try_from(token).ok()?,
            whole,
        })
    }

    /// Takes a token if there is one.
    pub fn take(&self, now: Instant) -> bool {
        let now = now.saturating_duration_since(self.origin).as_nanos();
        let now = i64::try_from(now).unwrap_or(i64::MAX / 2).min(i64::MAX / 2);
        let taken = self.empty.fetch_update(Relaxed, Relaxed, |empty| {
            let empty = empty.max(now - self.whole);
            (now - empty >= self.token).then_some(empty + self.token)
        });
        taken.is_ok()
    }
}

/// `envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit`.
#[derive(Debug)]
pub struct LocalRate {
    /// Without one nothing is limited.
    pub bucket: Option<Bucket>,
    /// Of how many requests a token is taken.
    pub enabled: Percentage,
    /// How many of those that get none are refused.
    pub enforced: Percentage,
    /// The status of the refusal.
    pub status: u16,
    /// Headers of the refusal.
    pub response: Vec<AddHeader>,
    /// `PREFIX.http_local_rate_limit.*`
    pub stats: Arc<Scope>,
}

impl LocalRate {
    /// Whether a request passes; counts.
    pub fn admits(&self, now: Instant, random: impl Fn() -> u64, shard: Shard) -> bool {
        if !self.enabled.takes(random()) {
            return true;
        }
        self.stats.inc(shard, Stat::Enabled);
        if self.bucket.as_ref().is_none_or(|bucket| bucket.take(now)) {
            self.stats.inc(shard, Stat::Ok);
            return true;
        }
        self.stats.inc(shard, Stat::RateLimited);
        if !self.enforced.takes(random()) {
            return true;
        }
        self.stats.inc(shard, Stat::Enforced);
        false
    }
}

/// `envoy.extensions.filters.network.local_ratelimit.v3.LocalRateLimit`: new connections of a filter chain.
#[derive(Debug)]
pub struct ConnectionRate {
    /// A token for each connection.
    pub bucket: Bucket,
    /// `local_rate_limit.PREFIX.*`
    pub stats: Arc<Scope>,
}

impl ConnectionRate {
    /// Whether a connection passes; counts.
    pub fn admits(&self, now: Instant, shard: Shard) -> bool {
        let passes = self.bucket.take(now);
        if !passes {
            self.stats.inc(shard, crate::stats::ConnectionRate::RateLimited);
        }
        passes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_bucket_gives_what_it_has_and_fills_evenly() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let bucket = Bucket::new(3, 2, Duration::from_secs(1), start).unwrap();
        let taken = |ms: u64| (0..10).filter(|_| bucket.take(at(ms))).count();
        assert_eq!(taken(0), 3);
        assert_eq!(taken(499), 0);
        assert_eq!(taken(500), 1);
        assert_eq!(taken(999), 0);
        assert_eq!(taken(1_750), 2);
        // Half a token was left over.
        assert_eq!(taken(2_000), 1);
        assert_eq!(taken(100_000), 3);
        // A clock that is read late takes nothing twice.
        assert_eq!(taken(99_000), 0);
        assert!(Bucket::new(u32::MAX, 1, Duration::from_secs(3600), start).is_none());
    }

    #[test]
    fn workers_take_no_token_twice() {
        let start = Instant::now();
        let bucket = Bucket::new(1_000, 1, Duration::from_secs(3600), start).unwrap();
        let bucket = &bucket;
        let taken: usize = std::thread::scope(|scope| {
            let take = || (0..1_000).filter(|_| bucket.take(start)).count();
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(take)).collect();
            threads.into_iter().map(|t| t.join().unwrap()).sum()
        });
        assert_eq!(taken, 1_000);
    }

    proptest! {
        #[test]
        fn a_bucket_is_as_a_naive_one(
            most in 1u32..20,
            per_fill in 1u32..5,
            steps in proptest::collection::vec((0u64..400, 1usize..8), 1..40),
        ) {
            let start = Instant::now();
            let bucket = Bucket::new(most, per_fill, Duration::from_millis(60), start).unwrap();
            // In nanoseconds; 60 ms divide by every rate here.
            let (token, full) = (60_000_000 / u64::from(per_fill), u64::from(most));
            let (mut now, mut level) = (0u64, full * token);
            for (pause, asked) in steps {
                now += pause;
                level = (level + pause * 1_000_000).min(full * token);
                for _ in 0..asked {
                    let there = level >= token;
                    if there {
                        level -= token;
                    }
                    prop_assert_eq!(bucket.take(start + Duration::from_millis(now)), there);
                }
            }
        }
    }
}
