//! What a backend needs to raise [`Event`]s: [`EventHub`] for its subscribers and [`HighWater`] for its resources.
//!
//! Each subscription has a queue of its own, bounded: who is too slow loses the oldest events and learns how many by one
//! [`Event::Overflowed`] in front of the rest. Raising never blocks and never waits for a subscriber.
#![forbid(unsafe_code)]

use std::collections::{HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use async_trait::async_trait;
use dpumesh_core::steering::Occupancy;
use dpumesh_core::{Event, EventStream};
use tokio::sync::Notify;

/// Hands each event to every subscription. Dropping the hub ends the streams once they are read out.
#[derive(Debug)]
pub struct EventHub {
    queues: Mutex<Vec<Weak<Queue>>>,
    depth: usize,
}

#[derive(Debug)]
struct Queue {
    state: Mutex<Waiting>,
    arrived: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    events: VecDeque<Event>,
    lost: u64,
    ended: bool,
}

/// A subscription to an [`EventHub`].
#[derive(Debug)]
pub struct HubStream(Arc<Queue>);

impl EventHub {
    /// Events that a subscription holds unless told otherwise.
    pub const DEPTH: usize = 1024;

    /// A hub whose subscriptions hold at most `depth` unread events each, at least one.
    pub fn new(depth: usize) -> Self {
        Self {
            queues: Mutex::default(),
            depth: depth.max(1),
        }
    }

    /// A subscription to what is raised from now on.
    pub fn subscribe(&self) -> HubStream {
        let queue = Arc::new(Queue {
            state: Mutex::default(),
            arrived: Notify::new(),
        });
        locked(&self.queues).push(Arc::downgrade(&queue));
        HubStream(queue)
    }

    /// Queues an event for every subscription.
    pub fn raise(&self, event: &Event) {
        locked(&self.queues).retain(|queue| {
            let Some(queue) = queue.upgrade() else {
                return false;
            };
            queue.push(event.clone(), self.depth);
            true
        });
    }
}

impl Default for EventHub {
    fn default() -> Self {
        Self::new(Self::DEPTH)
    }
}

impl Drop for EventHub {
    fn drop(&mut self) {
        for queue in locked(&self.queues).drain(..).filter_map(|queue| queue.upgrade()) {
            locked(&queue.state).ended = true;
            queue.arrived.notify_one();
        }
    }
}

impl Queue {
    fn push(&self, event: Event, depth: usize) {
        let mut state = locked(&self.state);
        if let Event::Overflowed(lost) = event {
            // Somebody in front lost events: what waits here is older than the gap, and one gap is told, not two.
            state.lost += lost + state.events.len() as u64;
            state.events.clear();
            drop(state);
            return self.arrived.notify_one();
        }
        if state.events.len() == depth {
            state.events.pop_front();
            state.lost += 1;
        }
        state.events.push_back(event);
        drop(state);
        self.arrived.notify_one();
    }

    /// The next event; `Some(None)` at the end, `None` when one must wait.
    fn pop(&self) -> Option<Option<Event>> {
        let mut state = locked(&self.state);
        let lost = std::mem::take(&mut state.lost);
        if lost > 0 {
            return Some(Some(Event::Overflowed(lost)));
        }
        match state.events.pop_front() {
            Some(event) => Some(Some(event)),
            None => state.ended.then_some(None),
        }
    }
}

#[async_trait]
impl EventStream for HubStream {
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.0.pop() {
                return event;
            }
            // A permit stored by an earlier `raise` makes this return at once: nothing raised in between is missed.
            self.0.arrived.notified().await;
        }
    }
}

/// Turns occupancy into [`Event::HighWater`], once per crossing of nine tenths of a resource.
#[derive(Clone, Debug, Default)]
pub struct HighWater {
    above: HashSet<String>,
}

impl HighWater {
    /// From how many in use on a resource of `limit` is above its mark: nine tenths, rounded up, at least one.
    pub const fn mark(limit: u64) -> u64 {
        let mark = limit - limit / 10;
        if mark == 0 { 1 } else { mark }
    }

    /// Events for the resources that passed their mark since the last look. A limit of zero is no resource.
    pub fn look(&mut self, occupancy: &[Occupancy]) -> Vec<Event> {
        let mut crossed = Vec::new();
        for Occupancy {
            resource,
            used,
            limit,
        } in occupancy
        {
            if *limit == 0 || *used < Self::mark(*limit) {
                self.above.remove(resource);
            } else if self.above.insert(resource.clone()) {
                crossed.push(Event::HighWater {
                    resource: resource.clone(),
                    used: *used,
                    limit: *limit,
                });
            }
        }
        crossed
    }

    /// Forgets which resources are above their mark, as after a reset.
    pub fn clear(&mut self) {
        self.above.clear();
    }
}

/// A panic elsewhere leaves queues whole, since each change to them is one step.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use dpumesh_core::Epoch;

    use super::*;

    fn lost(epoch: u64) -> Event {
        Event::Lost { epoch: Epoch(epoch) }
    }

    #[tokio::test]
    async fn events_arrive_in_order_and_end_with_the_hub() {
        let hub = EventHub::default();
        hub.raise(&lost(0));
        let mut stream = hub.subscribe();
        hub.raise(&lost(1));
        hub.raise(&lost(2));
        drop(hub);
        assert_eq!(stream.next().await, Some(lost(1)));
        assert_eq!(stream.next().await, Some(lost(2)));
        assert_eq!(stream.next().await, None);
        assert_eq!(stream.next().await, None);
    }

    #[tokio::test]
    async fn a_slow_subscriber_loses_the_oldest_and_is_told() {
        let hub = EventHub::new(2);
        let mut stream = hub.subscribe();
        let _unread = hub.subscribe();
        for epoch in 1..=5 {
            hub.raise(&lost(epoch));
        }
        assert_eq!(stream.next().await, Some(Event::Overflowed(3)));
        assert_eq!(stream.next().await, Some(lost(4)));
        assert_eq!(stream.next().await, Some(lost(5)));
    }

    #[tokio::test]
    async fn a_loss_that_is_handed_on_is_told_once() {
        let hub = EventHub::new(2);
        let mut stream = hub.subscribe();
        for event in [lost(1), lost(2), lost(3), Event::Overflowed(4), lost(8)] {
            hub.raise(&event);
        }
        assert_eq!(stream.next().await, Some(Event::Overflowed(7)));
        assert_eq!(stream.next().await, Some(lost(8)));
    }

    #[tokio::test]
    async fn a_cancelled_wait_loses_nothing() {
        let hub = EventHub::default();
        let mut stream = hub.subscribe();
        for epoch in 1..100 {
            tokio::select! {
                biased;
                _ = stream.next() => panic!("nothing was raised"),
                () = tokio::task::yield_now() => {}
            }
            hub.raise(&lost(epoch));
            assert_eq!(stream.next().await, Some(lost(epoch)));
        }
    }

    #[test]
    fn a_mark_is_raised_once_per_crossing() {
        let mut marks = HighWater::default();
        let mut raised = |used| {
            let occupancy = Occupancy {
                resource: "vf".to_owned(),
                used,
                limit: 10,
            };
            marks.look(&[occupancy]).len()
        };
        assert_eq!([8, 9, 10, 9, 8, 9].map(&mut raised), [0, 1, 0, 0, 0, 1]);
        assert_eq!(HighWater::mark(1), 1);
    }
}
