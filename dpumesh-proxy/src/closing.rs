//! What operators say about ending: `/healthcheck/fail`, `/drain_listeners`. Workers look at it with each response.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering::Relaxed};

use crate::config::model::Direction;

/// Nothing, what is inbound, everything.
const NONE: u8 = 0;
const INBOUND: u8 = 1;
const ALL: u8 = 2;

/// Whether connections are to end, and listeners to stop.
#[derive(Debug, Default)]
pub struct Closing {
    health_failed: AtomicBool,
    draining: AtomicU8,
    stopped: AtomicU8,
}

/// Which listeners.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// Those of direction INBOUND.
    Inbound,
    /// All of them.
    All,
}

impl Which {
    fn number(self) -> u8 {
        match self {
            Self::Inbound => INBOUND,
            Self::All => ALL,
        }
    }
}

impl Closing {
    /// Takes the proxy out of service for whoever asks, or back in.
    pub fn fail_health(&self, failed: bool) {
        self.health_failed.store(failed, Relaxed);
    }

    /// Whether it is out of service.
    pub fn health_failed(&self) -> bool {
        self.health_failed.load(Relaxed)
    }

    /// Has the connections of these listeners end with their next response. False where that has begun already.
    pub fn drain(&self, which: Which) -> bool {
        self.draining.fetch_max(which.number(), Relaxed) < which.number()
    }

    /// These listeners take no more connections.
    pub fn stop(&self, which: Which) {
        self.stopped.fetch_max(which.number(), Relaxed);
    }

    /// Whether a connection of a listener of this direction ends with its next response.
    #[inline]
    pub fn closes(&self, direction: Option<Direction>) -> bool {
        self.health_failed() || concerns(self.draining.load(Relaxed), direction)
    }

    /// Whether a listener of this direction takes no more connections.
    pub fn has_stopped(&self, direction: Option<Direction>) -> bool {
        concerns(self.stopped.load(Relaxed), direction)
    }
}

fn concerns(which: u8, direction: Option<Direction>) -> bool {
    match which {
        NONE => false,
        INBOUND => direction == Some(Direction::Inbound),
        _ => true,
    }
}
