//! A timer that is moved far more often than it fires.
//!
//! A connection's deadline changes with every request; the runtime's timer is touched only when a deadline comes before
//! the armed moment, or when that moment passes.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep_until};

/// One connection's timer.
#[derive(Debug, Default)]
pub(crate) struct Alarm {
    sleep: Option<Pin<Box<Sleep>>>,
}

impl Alarm {
    /// Ready once `deadline` has passed. Without a deadline it is never ready.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>, deadline: Option<Instant>) -> Poll<()> {
        let Some(deadline) = deadline else {
            return Poll::Pending;
        };
        let sleep = self.sleep.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
        if deadline < sleep.deadline() {
            sleep.as_mut().reset(deadline);
        }
        loop {
            if sleep.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            if Instant::now() >= deadline {
                return Poll::Ready(());
            }
            sleep.as_mut().reset(deadline);
        }
    }
}

/// The stream idle timeout: fires when a whole period passed without progress, so between one and two periods after
/// the last octet. Looks at the clock only when its period ends.
#[derive(Debug)]
pub(crate) struct Watch {
    period: Option<Duration>,
    until: Option<Instant>,
    progress: u64,
}

impl Watch {
    /// Without a period it never fires.
    pub(crate) fn new(period: Option<Duration>) -> Self {
        Self {
            period,
            until: None,
            progress: 0,
        }
    }

    /// Ready once `progress` has been the same for a period.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>, alarm: &mut Alarm, progress: u64) -> Poll<()> {
        let Some(period) = self.period else {
            return Poll::Pending;
        };
        let until = *self.until.get_or_insert_with(|| Instant::now() + period);
        if alarm.poll(cx, Some(until)).is_pending() {
            return Poll::Pending;
        }
        if progress == self.progress {
            return Poll::Ready(());
        }
        self.progress = progress;
        let until = Instant::now() + period;
        self.until = Some(until);
        alarm.poll(cx, Some(until))
    }
}

/// The earlier of two deadlines.
pub(crate) fn earlier(a: Option<Instant>, b: Option<Instant>) -> Option<Instant> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}
