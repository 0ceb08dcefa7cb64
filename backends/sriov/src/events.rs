//! Events of a card: read off the card itself, never a one-shot discovery.
//!
//! A subscription compares what is there with what it saw last: at once when this process changed the card, else every
//! [`LOOK`]. What changed and changed back between two looks is not seen, except for what is numbered: the card's lives,
//! each one's `Lost` and `Back`, and the makings of its VFs by whoever uses its journal.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Weak};
use std::time::Duration;

use async_trait::async_trait;
use dpumesh_core::{ControllerId, Epoch, Event, EventStream, PciAddress, PfIndex, PortRef};
use tokio::sync::Notify;
use tokio::time::timeout;

use crate::card::{Inner, indices};
use crate::discover;

/// How often the card is looked at.
const LOOK: Duration = Duration::from_millis(100);

/// Looks at a card that changes all the time before one of them is believed.
const SETTLING: usize = 10;

/// Most events that wait in a subscription.
const QUEUE: usize = 4096;

/// A subscription to one card.
#[derive(Debug)]
pub(crate) struct Subscription {
    card: Weak<Inner>,
    changed: Arc<Notify>,
    seen: Option<Seen>,
    queue: VecDeque<Event>,
    lost: u64,
}

/// What a subscription knows.
#[derive(Clone, Debug, Default, PartialEq)]
struct Seen {
    epoch: Epoch,
    away: bool,
    /// VFs, with the number of their making.
    vfs: BTreeMap<PortRef, (PciAddress, u64)>,
    carriers: BTreeMap<PortRef, bool>,
}

impl Subscription {
    /// What happens from now on.
    pub(crate) fn new(card: &Arc<Inner>) -> Self {
        Self {
            card: Arc::downgrade(card),
            changed: Arc::clone(&card.changed),
            seen: Seen::of(card),
            queue: VecDeque::new(),
            lost: 0,
        }
    }

    fn compare(&mut self, now: Seen) {
        let before = self.seen.replace(now.clone()).unwrap_or_else(|| now.clone());
        for event in difference(&before, &now) {
            if self.queue.len() == QUEUE {
                self.queue.pop_front();
                self.lost += 1;
            }
            self.queue.push_back(event);
        }
    }
}

impl Seen {
    /// What is there, when it is what was there before or two looks agree on it: a card that goes while it is looked at shows a part of
    /// itself for a moment.
    fn settled(card: &Inner, before: Option<&Self>) -> Option<Self> {
        let mut last = Self::of(card)?;
        for _ in 0..SETTLING {
            if before == Some(&last) {
                break;
            }
            let again = Self::of(card)?;
            if again == last {
                break;
            }
            last = again;
        }
        Some(last)
    }

    fn of(card: &Inner) -> Option<Self> {
        let change = card.begin("sriov.events").ok()?;
        let mut seen = Self {
            epoch: change.record.epoch,
            away: change.record.away,
            ..Self::default()
        };
        if seen.away {
            return Some(seen);
        }
        for (port, function) in change.vfs() {
            let making = indices(port).and_then(|(pf, _)| change.record.makings.get(&pf));
            let making = making.copied().unwrap_or_default();
            seen.vfs.insert(port, (function.pci, making));
            if let Some(link) = discover::netdev_of(change.links(), function.pci) {
                seen.carriers.insert(port, link.carrier);
            }
        }
        for (index, pci) in (0..).zip(&card.pfs) {
            let port = PortRef::Pf {
                controller: ControllerId(0),
                pf: PfIndex(index),
            };
            if let Some(link) = discover::netdev_of(change.links(), *pci) {
                seen.carriers.insert(port, link.carrier);
            }
        }
        Some(seen)
    }
}

fn difference(before: &Seen, now: &Seen) -> Vec<Event> {
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
    if now.away {
        if !told {
            events.push(Event::Lost { epoch });
        }
        // Its VFs are gone with it: that is told by `Lost`.
        return events;
    }
    let gone = before
        .vfs
        .iter()
        .filter(|(port, vf)| now.vfs.get(port) != Some(vf));
    events.extend(gone.map(|(port, _)| Event::VfRemoved(*port)));
    let new = now
        .vfs
        .iter()
        .filter(|(port, vf)| before.vfs.get(port) != Some(vf));
    events.extend(new.map(|(port, _)| Event::VfAdded(*port)));
    let carriers = now.carriers.iter();
    events.extend(carriers.filter_map(|(port, up)| {
        let changed = before.carriers.get(port).is_some_and(|before| before != up);
        changed.then_some(Event::Link { port: *port, up: *up })
    }));
    events
}

#[async_trait]
impl EventStream for Subscription {
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
            let (card, before) = (self.card.upgrade()?, self.seen.clone());
            let looked = tokio::task::spawn_blocking(move || Seen::settled(&card, before.as_ref())).await;
            if let Ok(Some(now)) = looked {
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
    use crate::card::port;

    fn seen(epoch: u64, away: bool, vfs: &[(u16, &str)], carrier: bool) -> Seen {
        Seen {
            epoch: Epoch(epoch),
            away,
            vfs: vfs
                .iter()
                .map(|(index, pci)| (port(0, *index), (pci.parse().expect("an address"), epoch)))
                .collect(),
            carriers: [(port(0, 0), carrier)].into(),
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
            ((1, true), (2, false), vec![back(2)]),
            (
                (1, false),
                (3, true),
                vec![lost(1), back(2), lost(2), back(3), lost(3)],
            ),
        ];
        for (before, now, events) in cases {
            let (before, now) = (seen(before.0, before.1, &[], true), seen(now.0, now.1, &[], true));
            assert_eq!(difference(&before, &now), events);
        }
    }

    #[test]
    fn a_vf_that_was_made_anew_is_another() {
        let before = seen(1, false, &[(0, "0000:01:10.0")], true);
        let mut now = before.clone();
        now.vfs.values_mut().for_each(|(_, making)| *making += 1);
        let expected = [Event::VfRemoved(port(0, 0)), Event::VfAdded(port(0, 0))];
        assert_eq!(difference(&before, &now), expected);
        assert_eq!(difference(&now, &now), []);
    }

    #[test]
    fn vfs_and_carriers_are_told() {
        let before = seen(1, false, &[(0, "0000:01:10.0"), (1, "0000:01:10.2")], true);
        let now = seen(1, false, &[(0, "0000:01:10.0"), (2, "0000:01:10.4")], false);
        let expected = [
            Event::VfRemoved(port(0, 1)),
            Event::VfAdded(port(0, 2)),
            Event::Link {
                port: port(0, 0),
                up: false,
            },
        ];
        assert_eq!(difference(&before, &now), expected);
    }
}
