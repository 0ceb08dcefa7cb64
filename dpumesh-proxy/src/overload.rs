//! What is done when there is too much of something (`overload_manager`): requests are answered 503, connections wait or are closed.
//!
//! The control thread looks at the resources now and then ([`Manager`]) and says what follows; workers look at [`Overload`] with each request
//! and connection: a few plain loads.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crate::stats::{OverloadAction as ActionStat, OverloadResource as ResourceStat, Scope, Shard};

/// A share of all, in millionths.
const ALL: u64 = 1_000_000;

/// What workers are to do.
#[derive(Debug)]
pub struct Overload {
    /// So many millionths of the requests are refused; so many connections end with their next response.
    requests: AtomicU64,
    keepalive: AtomicU64,
    /// Connections wait in their listeners' queues.
    connections: AtomicBool,
    /// Connections of clients that may be open at once, and that are.
    most: u64,
    open: AtomicU64,
}

impl Default for Overload {
    fn default() -> Self {
        Self::bounded(None)
    }
}

fn takes(share: &AtomicU64) -> bool {
    match share.load(Relaxed) {
        0 => false,
        share => fastrand::u64(..ALL) < share,
    }
}

impl Overload {
    /// Nothing is too much, but for more than so many connections at once.
    pub fn bounded(most: Option<u64>) -> Self {
        Self {
            requests: AtomicU64::new(0),
            keepalive: AtomicU64::new(0),
            connections: AtomicBool::new(false),
            most: most.unwrap_or(u64::MAX),
            open: AtomicU64::new(0),
        }
    }

    /// Whether this request is one too many.
    #[inline]
    pub fn refuses_request(&self) -> bool {
        takes(&self.requests)
    }

    /// Whether this response is to be its connection's last.
    #[inline]
    pub fn ends_connection(&self) -> bool {
        takes(&self.keepalive)
    }

    /// Whether no connection is to be accepted now.
    #[inline]
    pub fn stops_accepting(&self) -> bool {
        self.connections.load(Relaxed)
    }

    /// Counts a connection as long as the answer lives; `None` for one too many.
    pub fn open(self: &Arc<Self>) -> Option<Open> {
        if self.most == u64::MAX {
            return Some(Open(None));
        }
        let open = Open(Some(Arc::clone(self)));
        // Given back by the drop where it is one too many.
        (self.open.fetch_add(1, Relaxed) < self.most).then_some(open)
    }
}

/// A connection that counts.
#[derive(Debug)]
pub struct Open(Option<Arc<Overload>>);

impl Drop for Open {
    fn drop(&mut self) {
        if let Some(overload) = &self.0 {
            overload.open.fetch_sub(1, Relaxed);
        }
    }
}

/// What is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resource {
    /// Memory of this process, against so many octets.
    Heap(u64),
    /// Connections of clients, against so many.
    Connections(u64),
}

/// What follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Requests are answered 503.
    StopAcceptingRequests,
    /// Connections end with their next response.
    DisableKeepalive,
    /// Connections wait to be accepted.
    StopAcceptingConnections,
    /// Nothing: the allocator gives memory back by itself.
    ShrinkHeap,
}

/// How much of a resource makes how much of an action, both as parts of 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Trigger {
    /// Place of the resource in [`Manager::resources`].
    pub resource: usize,
    /// Below this nothing follows,
    pub from: f64,
    /// from this on all of it.
    pub to: f64,
}

impl Trigger {
    fn scale(&self, pressure: f64) -> f64 {
        if pressure >= self.to {
            1.0
        } else if pressure <= self.from {
            0.0
        } else {
            (pressure - self.from) / (self.to - self.from)
        }
    }
}

/// The control thread's part.
#[derive(Debug)]
pub struct Manager {
    /// How often resources are looked at.
    pub interval: Duration,
    /// What is looked at, and `overload.NAME.*`.
    pub resources: Vec<(Resource, Arc<Scope>)>,
    /// What follows of what, and `overload.ACTION.*`.
    pub actions: Vec<(Action, Vec<Trigger>, Arc<Scope>)>,
    /// What workers see of it.
    pub overload: Arc<Overload>,
    /// When it looked last.
    pub looked: Option<Instant>,
}

impl Manager {
    /// Looks at the resources, if it is time.
    pub fn tick(&mut self, now: Instant) {
        if self
            .looked
            .is_some_and(|looked| now.duration_since(looked) < self.interval)
        {
            return;
        }
        self.looked = Some(now);
        let pressures: Vec<f64> = self.resources.iter().map(|(r, _)| self.pressure(*r)).collect();
        for ((_, stats), pressure) in self.resources.iter().zip(&pressures) {
            stats.set(Shard::CONTROL, ResourceStat::Pressure, (pressure * 100.0) as u64);
        }
        for (action, triggers, stats) in &self.actions {
            let scales = triggers.iter().map(|t| t.scale(pressures[t.resource]));
            let scale = scales.fold(0.0, f64::max);
            stats.set(Shard::CONTROL, ActionStat::Active, u64::from(scale >= 1.0));
            stats.set(Shard::CONTROL, ActionStat::ScalePercent, (scale * 100.0) as u64);
            self.act(*action, scale);
        }
    }

    fn act(&self, action: Action, scale: f64) {
        let share = (scale * ALL as f64) as u64;
        match action {
            Action::StopAcceptingRequests => self.overload.requests.store(share, Relaxed),
            Action::DisableKeepalive => self.overload.keepalive.store(share, Relaxed),
            Action::StopAcceptingConnections => self.overload.connections.store(scale >= 1.0, Relaxed),
            Action::ShrinkHeap => {}
        }
    }

    fn pressure(&self, resource: Resource) -> f64 {
        match resource {
            Resource::Heap(most) => resident() as f64 / most.max(1) as f64,
            Resource::Connections(most) => self.overload.open.load(Relaxed) as f64 / most.max(1) as f64,
        }
    }
}

/// Octets of memory that this process has (`VmRSS` of proc(5)); 0 where nobody says so.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.unwrap_or_default() * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trigger_scales() {
        let scaled = Trigger {
            resource: 0,
            from: 0.5,
            to: 0.9,
        };
        for (pressure, scale) in [(0.0, 0.0), (0.5, 0.0), (0.7, 0.5), (0.9, 1.0), (7.0, 1.0)] {
            assert!((scaled.scale(pressure) - scale).abs() < 1e-9, "{pressure}");
        }
        let threshold = Trigger {
            resource: 0,
            from: 0.9,
            to: 0.9,
        };
        assert_eq!([0.89, 0.9].map(|p| threshold.scale(p)), [0.0, 1.0]);
    }

    #[test]
    fn connections_are_counted_as_long_as_they_live() {
        let overload = Arc::new(Overload::bounded(Some(2)));
        let (one, two) = (overload.open(), overload.open());
        assert!(one.is_some() && two.is_some() && overload.open().is_none());
        drop(one);
        let three = overload.open();
        assert!(three.is_some() && overload.open().is_none());
    }

    #[test]
    fn a_process_has_memory() {
        assert!(resident() > 100_000);
    }
}
