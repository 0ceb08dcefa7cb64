//! Events of the emulated card, read off its record.
//!
//! Host and SoC are two processes, and neither tells the other. A subscription therefore compares what is recorded
//! with what it saw last: at once when this process changed the card, else every [`LOOK`]. What changed and changed back between
//! two looks is not seen, except for the card's lives, which are numbered: each one's `Lost` and `Back` are told.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Weak};
use std::time::Duration;

use async_trait::async_trait;
use dpumesh_core::{Epoch, Event, EventStream, PortRef};
use tokio::sync::Notify;
use tokio::time::timeout;

use crate::card::{Card, Silicon};

/// How often another process's changes are looked for.
const LOOK: Duration = Duration::from_millis(50);

/// Most events that wait in a subscription.
const QUEUE: usize = 4096;

/// A subscription to one card.
#[derive(Debug)]
pub(crate) struct TapEvents {
    card: Weak<Card>,
    changed: Arc<Notify>,
    seen: Option<Seen>,
    queue: VecDeque<Event>,
    lost: u64,
}

/// What a subscription knows.
#[derive(Clone, Debug, PartialEq)]
struct Seen {
    epoch: Epoch,
    away: bool,
    /// Serial numbers of the VFs.
    functions: BTreeMap<u16, u64>,
}

impl TapEvents {
    /// What happens from now on.
    pub(crate) fn new(card: &Arc<Card>) -> Self {
        let seen = card.recorded().ok().map(|state| Seen::of(&state));
        Self {
            card: Arc::downgrade(card),
            changed: Arc::clone(&card.changed),
            seen,
            queue: VecDeque::new(),
            lost: 0,
        }
    }

    fn compare(&mut self, now: Seen) {
        let before = self.seen.replace(now.clone()).unwrap_or_else(|| now.clone());
        for event in difference(before, &now) {
            if self.queue.len() == QUEUE {
                self.queue.pop_front();
                self.lost += 1;
            }
            self.queue.push_back(event);
        }
    }
}

impl Seen {
    fn of(state: &Silicon) -> Self {
        let functions = state
            .functions
            .iter()
            .map(|(index, function)| (*index, function.serial))
            .collect();
        Self {
            epoch: state.epoch,
            away: state.away,
            functions,
        }
    }
}

fn difference(before: Seen, now: &Seen) -> Vec<Event> {
    let mut events = Vec::new();
    let (mut epoch, mut told) = (before.epoch, before.away);
    while epoch < now.epoch {
        if !told {
            events.push(Event::Lost { epoch });
        }
        epoch.0 += 1;
        events.push(Event::Back { epoch });
        told = false;
    }
    if now.away && !told {
        events.push(Event::Lost { epoch });
    }
    let gone = before
        .functions
        .iter()
        .filter(|(index, serial)| now.functions.get(index) != Some(serial));
    events.extend(gone.map(|(index, _)| Event::VfRemoved(PortRef::vf(*index))));
    let new = now
        .functions
        .iter()
        .filter(|(index, serial)| before.functions.get(index) != Some(serial));
    events.extend(new.map(|(index, _)| Event::VfAdded(PortRef::vf(*index))));
    events
}

#[async_trait]
impl EventStream for TapEvents {
    async fn next(&mut self) -> Option<Event> {
        loop {
            let lost = std::mem::take(&mut self.lost);
            if lost > 0 {
                return Some(Event::Overflowed(lost));
            }
            if let Some(event) = self.queue.pop_front() {
                return Some(event);
            }
            // Listening begins before the look, so that nothing falls between.
            let changed = Arc::clone(&self.changed);
            let mut changed = std::pin::pin!(changed.notified());
            changed.as_mut().enable();
            let card = self.card.upgrade()?;
            let looked =
                tokio::task::spawn_blocking(move || card.recorded().map(|state| Seen::of(&state))).await;
            if let Ok(Ok(now)) = looked {
                self.compare(now);
            }
            if self.queue.is_empty() {
                let _ = timeout(LOOK, changed).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(epoch: u64, away: bool, functions: &[(u16, u64)]) -> Seen {
        Seen {
            epoch: Epoch(epoch),
            away,
            functions: functions.iter().copied().collect(),
        }
    }

    #[test]
    fn each_life_is_told_once() {
        let (lost, back) = (
            |n| Event::Lost { epoch: Epoch(n) },
            |n| Event::Back { epoch: Epoch(n) },
        );
        let cases = [
            ((1, false), (1, false), vec![]),
            ((1, false), (1, true), vec![lost(1)]),
            ((1, true), (1, true), vec![]),
            ((1, true), (2, false), vec![back(2)]),
            (
                (1, false),
                (3, true),
                vec![lost(1), back(2), lost(2), back(3), lost(3)],
            ),
        ];
        for (before, now, events) in cases {
            assert_eq!(
                difference(seen(before.0, before.1, &[]), &seen(now.0, now.1, &[])),
                events
            );
        }
    }

    #[test]
    fn a_vf_that_was_replaced_goes_and_comes() {
        let (before, now) = (
            seen(1, false, &[(0, 1), (1, 2)]),
            seen(1, false, &[(1, 3), (2, 4)]),
        );
        let expected = [
            Event::VfRemoved(PortRef::vf(0)),
            Event::VfRemoved(PortRef::vf(1)),
            Event::VfAdded(PortRef::vf(1)),
            Event::VfAdded(PortRef::vf(2)),
        ];
        assert_eq!(difference(before, &now), expected);
    }
}
