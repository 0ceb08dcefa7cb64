//! Whether an endpoint takes requests: what its assignment says, what its answers say, what it says when it is asked.
//!
//! ```text
//! worker: outcome ─► counts of the endpoint's State ──limit reached──► Report ─┐
//! prober: probe ────────────────────────────────────────────────────► Report ─┴─► Keeper ─► flags of the State ─► new Picker
//! ```
//! An endpoint's [`State`] is one for the whole proxy. Workers add to its counts, in atomics; the control thread's [`keeper::Keeper`] alone
//! judges, sets flags, and has the cluster's picker made anew. The state lives as long as endpoint and cluster stay what they are.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use crate::config::model::Cluster;

pub mod check;
pub mod keeper;
pub mod outlier;
mod probe;
pub mod prober;

/// It failed its health checks.
pub const FAILED_CHECK: u32 = 1;
/// Outlier detection has ejected it.
pub const FAILED_OUTLIER: u32 = 1 << 1;
/// It says of itself that it is degraded.
pub const DEGRADED_CHECK: u32 = 1 << 2;
/// It has not been checked yet.
pub const PENDING_CHECK: u32 = 1 << 3;
/// Its last failed check was one without answer.
pub const TIMED_OUT_CHECK: u32 = 1 << 4;

/// How an endpoint stands, all in all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Health {
    /// It takes requests.
    Healthy,
    /// It takes what the healthy ones cannot.
    Degraded,
    /// It takes requests in panic only.
    Unhealthy,
}

/// What an endpoint's assignment says of it (`health_status`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Eds {
    /// `UNKNOWN` or `HEALTHY`.
    #[default]
    Healthy,
    /// `DEGRADED`.
    Degraded,
    /// `UNHEALTHY` or `TIMEOUT`.
    Unhealthy,
    /// `DRAINING`.
    Draining,
}

/// What is known of an endpoint's health over all workers.
#[derive(Debug)]
pub struct State {
    flags: AtomicU32,
    born: Instant,
    /// Milliseconds from its birth to when it last began to serve.
    serves_since: AtomicU64,
    /// What outlier detection counts.
    pub counts: outlier::Counts,
}

impl Default for State {
    fn default() -> Self {
        Self {
            flags: AtomicU32::new(0),
            born: Instant::now(),
            serves_since: AtomicU64::new(0),
            counts: outlier::Counts::default(),
        }
    }
}

impl State {
    /// Of an endpoint that is to be checked first.
    pub fn unchecked() -> Self {
        let state = Self::default();
        state.set(FAILED_CHECK | PENDING_CHECK);
        state
    }

    /// Whether any of `flags` is set.
    pub fn has(&self, flags: u32) -> bool {
        self.flags.load(Ordering::Relaxed) & flags != 0
    }

    /// Sets flags.
    pub fn set(&self, flags: u32) {
        self.flags.fetch_or(flags, Ordering::Relaxed);
    }

    /// Clears flags.
    pub fn clear(&self, flags: u32) {
        self.flags.fetch_and(!flags, Ordering::Relaxed);
        if flags & FAILED_CHECK != 0 {
            let since = u64::try_from(self.born.elapsed().as_millis()).unwrap_or(u64::MAX);
            self.serves_since.store(since, Ordering::Relaxed);
        }
    }

    /// How long it has been there, or has passed its health checks.
    pub fn age(&self, now: Instant) -> Duration {
        let since = Duration::from_millis(self.serves_since.load(Ordering::Relaxed));
        now.saturating_duration_since(self.born + since)
    }

    /// How an endpoint in this state stands whose assignment says `eds`.
    pub fn health(&self, eds: Eds) -> Health {
        if matches!(eds, Eds::Unhealthy | Eds::Draining) || self.has(FAILED_OUTLIER | FAILED_CHECK) {
            Health::Unhealthy
        } else if eds == Eds::Degraded || self.has(DEGRADED_CHECK) {
            Health::Degraded
        } else {
            Health::Healthy
        }
    }

    /// Envoy's `health_flags`.
    pub fn flags(&self, eds: Eds) -> String {
        let all = [
            (self.has(FAILED_CHECK), "/failed_active_hc"),
            (self.has(FAILED_OUTLIER), "/failed_outlier_check"),
            (
                matches!(eds, Eds::Unhealthy | Eds::Draining),
                "/failed_eds_health",
            ),
            (self.has(DEGRADED_CHECK), "/degraded_active_hc"),
            (eds == Eds::Degraded, "/degraded_eds_health"),
            (self.has(PENDING_CHECK), "/pending_active_hc"),
            (self.has(TIMED_OUT_CHECK), "/active_hc_timeout"),
            (eds == Eds::Draining, "/eds_status_draining"),
        ];
        let text: String = all
            .iter()
            .filter(|(set, _)| *set)
            .map(|(_, text)| *text)
            .collect();
        if text.is_empty() {
            "healthy".to_owned()
        } else {
            text
        }
    }
}

/// Something for the control thread to judge.
#[derive(Debug)]
pub struct Report {
    /// The cluster as whoever reports knows it.
    pub cluster: Arc<Cluster>,
    /// The endpoint.
    pub endpoint: SocketAddr,
    /// What happened.
    pub what: What,
}

/// What happened at an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// So many failures in a row that it may be ejected.
    Consecutive(outlier::Reason),
    /// A health check has changed something, or may end an ejection.
    Checked {
        /// The answer was right.
        good: bool,
    },
}

/// Where reports go to.
pub type Reporter = mpsc::UnboundedSender<Report>;
