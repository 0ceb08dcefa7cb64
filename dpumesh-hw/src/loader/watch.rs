//! [`Watch`]: which functions of a library somebody is in, and which of these calls hang.
//!
//! ```text
//! caller ── seat: number, function ──► function ──► seat: free        two stores for a port's frames
//!              ▲
//!   watch's thread, a few times per deadline: the same word for a whole deadline is a call that hangs
//! ```
//!
//! Frames and the quick calls (`epoch`, `capabilities`, events) enter a library on their caller's thread: a hop to another one
//! would cost a hundred times what they do. Nobody can take such a caller out of a function that never returns. What can be done
//! is that the rest learns of it: the caller writes into a [`Seat`] which function it is in, under a number that is never
//! given twice, and another thread looks. No clock is read on the way of a call; a hang is noticed one look after its
//! deadline at the latest.
//!
//! A port has a seat of its own, which one thread at a time writes. The other calls share [`SEATS`] of them; when all are
//! taken a call goes unwatched, which takes that many threads inside at once: some of these are watched.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Calls other than those of ports that are watched at a time.
const SEATS: usize = 16;

/// Every function that is entered on its caller's thread: a seat holds an index. The first is none.
const OPERATIONS: [&str; 45] = [
    "",
    "a call",
    "backend.capabilities",
    "backend.epoch",
    "backend.events",
    "backend.cancel",
    "offload.activate",
    "offload.load",
    "offload.offload_connection",
    "offload.programs",
    "offload.read",
    "offload.resume",
    "offload.stats",
    "offload.tables",
    "offload.unload",
    "offload.write",
    "ports.close",
    "ports.list",
    "ports.open",
    "ports.receive",
    "ports.refused",
    "ports.transmit",
    "rig.bring_back",
    "rig.inject",
    "rig.jam",
    "rig.lose",
    "rig.netns",
    "rig.observe",
    "rig.strand",
    "steering.apply",
    "steering.counters",
    "steering.flush",
    "steering.list",
    "steering.occupancy",
    "steering.set_miss_policy",
    "steering.validate",
    "vf.admit",
    "vf.attach",
    "vf.configure",
    "vf.detach",
    "vf.lease",
    "vf.list",
    "vf.plan_vf_count",
    "vf.release",
    "vf.set_vf_count",
];

/// A function of the library, by its name in the contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Operation(u8);

impl Operation {
    pub(super) const CAPABILITIES: Self = Self::named("backend.capabilities");
    pub(super) const EPOCH: Self = Self::named("backend.epoch");
    pub(super) const EVENTS: Self = Self::named("backend.events");
    pub(super) const CANCEL: Self = Self::named("backend.cancel");
    pub(super) const CLOSE_PORT: Self = Self::named("ports.close");
    pub(super) const RECEIVE: Self = Self::named("ports.receive");
    pub(super) const REFUSED: Self = Self::named("ports.refused");
    pub(super) const TRANSMIT: Self = Self::named("ports.transmit");

    /// The operation of this name; one that is not listed is `a call`.
    pub(super) const fn named(name: &str) -> Self {
        let mut index = 2;
        while index < OPERATIONS.len() {
            if same(OPERATIONS[index], name) {
                return Self(index as u8);
            }
            index += 1;
        }
        Self(1)
    }

    /// Its name.
    pub(super) fn name(self) -> &'static str {
        OPERATIONS.get(usize::from(self.0)).copied().unwrap_or("a call")
    }
}

const fn same(one: &str, other: &str) -> bool {
    let (one, other) = (one.as_bytes(), other.as_bytes());
    if one.len() != other.len() {
        return false;
    }
    let mut index = 0;
    while index < one.len() {
        if one[index] != other[index] {
            return false;
        }
        index += 1;
    }
    true
}

/// Where a caller says what it is in: a number of the call and, in the lowest octet, its [`Operation`], zero for none. In
/// a cache line of its own.
#[derive(Debug, Default)]
#[repr(align(64))]
pub(super) struct Seat(AtomicU64);

const WHICH: u64 = 0xff;
const NEXT: u64 = WHICH + 1;

impl Seat {
    /// Enters a function; the one thread that uses this seat does so.
    pub(super) fn enter(&self, operation: Operation) -> Inside<'_> {
        let before = self.0.load(Ordering::Relaxed);
        self.0.store(taken(before, operation), Ordering::Relaxed);
        Inside(Some(self))
    }

    /// Enters a function if nobody is in one from here.
    fn try_enter(&self, operation: Operation) -> Option<Inside<'_>> {
        let before = self.0.load(Ordering::Relaxed);
        let free = before & WHICH == 0;
        let now = taken(before, operation);
        let mine = free
            && self
                .0
                .compare_exchange(before, now, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok();
        mine.then(|| Inside(Some(self))) // not `then_some`: what is not taken must not be left
    }
}

/// A new call's word: never the one of an earlier call.
fn taken(before: u64, operation: Operation) -> u64 {
    (before & !WHICH).wrapping_add(NEXT) | u64::from(operation.0)
}

/// Somebody is in a function until this is dropped. `None`: unwatched.
#[derive(Debug)]
#[must_use]
pub(super) struct Inside<'a>(Option<&'a Seat>);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        if let Some(Seat(word)) = self.0 {
            // Nobody else writes to a seat that is taken.
            word.store(word.load(Ordering::Relaxed) & !WHICH, Ordering::Relaxed);
        }
    }
}

/// The seats of one card.
#[derive(Debug, Default)]
pub(super) struct Watch {
    shared: [Seat; SEATS],
    looks: Mutex<Looks>,
}

/// What was seen, by the thread that looks.
#[derive(Debug, Default)]
struct Looks {
    shared: [Look; SEATS],
    ports: Vec<(Arc<Seat>, Look)>,
}

/// The word of a seat, and since when it has been that.
#[derive(Clone, Copy, Debug, Default)]
struct Look {
    word: u64,
    since: Option<Instant>,
}

impl Watch {
    /// A seat for one port.
    pub(super) fn seat(&self) -> Arc<Seat> {
        let seat = Arc::new(Seat::default());
        self.looks().ports.push((Arc::clone(&seat), Look::default()));
        seat
    }

    /// Enters a function of which several threads may be in at a time.
    pub(super) fn enter(&self, operation: Operation) -> Inside<'_> {
        let first = usual_seat();
        let mut seats = (0..SEATS).map(|i| &self.shared[(first + i) % SEATS]);
        seats
            .find_map(|seat| seat.try_enter(operation))
            .unwrap_or(Inside(None))
    }

    /// Looks at every seat: the call that is longest seen in one, if it is for so long.
    pub(super) fn look(&self, now: Instant, patience: Duration) -> Option<(Operation, Instant)> {
        let mut looks = self.looks();
        let Looks { shared, ports } = &mut *looks;
        ports.retain(|(seat, _)| Arc::strong_count(seat) > 1);
        let shared = self.shared.iter().zip(shared);
        let ports = ports.iter_mut().map(|(seat, look)| (&**seat, look));
        let inside = shared.chain(ports).filter_map(|(seat, look)| look.at(seat, now));
        inside
            .filter(|(_, since)| now.saturating_duration_since(*since) >= patience)
            .min_by_key(|(_, since)| *since)
    }

    fn looks(&self) -> std::sync::MutexGuard<'_, Looks> {
        self.looks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Look {
    /// Who is in a seat, and since when that has been seen.
    fn at(&mut self, seat: &Seat, now: Instant) -> Option<(Operation, Instant)> {
        let word = seat.0.load(Ordering::Relaxed);
        if self.word != word {
            *self = Self {
                word,
                since: Some(now),
            };
        }
        let operation = Operation((word & WHICH) as u8);
        (operation.0 != 0).then_some((operation, self.since.unwrap_or(now)))
    }
}

/// Threads begin their search at different seats, and find their own free as a rule.
fn usual_seat() -> usize {
    static THREADS: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static MINE: Cell<usize> = const { Cell::new(usize::MAX) };
    }
    MINE.with(|mine| {
        if mine.get() == usize::MAX {
            mine.set(THREADS.fetch_add(1, Ordering::Relaxed) % SEATS);
        }
        mine.get()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(4);

    fn after(begun: Instant, seconds: u64) -> Instant {
        begun + Duration::from_secs(seconds)
    }

    #[test]
    fn every_operation_is_told_by_its_name() {
        for (index, name) in OPERATIONS.iter().enumerate().skip(1) {
            assert_eq!(Operation::named(name).0 as usize, index);
            assert_eq!(Operation::named(name).name(), *name);
        }
        assert_eq!(Operation::named("moon.land").name(), "a call");
    }

    #[test]
    fn one_call_for_the_whole_patience_hangs_and_no_shorter_one() {
        let (watch, begun) = (Watch::default(), Instant::now());
        let inside = watch.enter(Operation::EPOCH);
        assert_eq!(watch.look(begun, PATIENCE), None, "seen for the first time");
        assert_eq!(watch.look(after(begun, 3), PATIENCE), None);
        let hangs = Some((Operation::EPOCH, begun));
        assert_eq!(watch.look(after(begun, 4), PATIENCE), hangs);
        drop(inside);
        assert_eq!(watch.look(after(begun, 5), PATIENCE), None, "it came back");
    }

    #[test]
    fn many_calls_one_after_the_other_are_not_one() {
        let (watch, begun) = (Watch::default(), Instant::now());
        let port = watch.seat();
        for second in 0..20 {
            let inside = port.enter(Operation::RECEIVE);
            assert_eq!(watch.look(after(begun, second), PATIENCE), None);
            drop(inside);
        }
    }

    #[test]
    fn beside_calls_that_return_the_one_that_hangs_is_found() {
        let (watch, begun) = (Watch::default(), Instant::now());
        let port = watch.seat();
        let _stuck = port.enter(Operation::TRANSMIT);
        for second in 0..4 {
            drop(watch.enter(Operation::EPOCH));
            assert_eq!(watch.look(after(begun, second), PATIENCE), None);
        }
        let found = watch.look(after(begun, 9), PATIENCE);
        assert_eq!(found, Some((Operation::TRANSMIT, begun)));
    }

    #[test]
    fn a_port_that_is_gone_is_not_looked_at() {
        let (watch, begun) = (Watch::default(), Instant::now());
        let port = watch.seat();
        std::mem::forget(port.enter(Operation::RECEIVE));
        watch.look(begun, PATIENCE);
        drop(port);
        assert_eq!(watch.look(after(begun, 9), PATIENCE), None);
        assert!(watch.looks().ports.is_empty());
    }

    #[test]
    fn with_all_seats_taken_a_call_goes_unwatched() {
        let watch = Watch::default();
        let taken: Vec<_> = (0..SEATS).map(|_| watch.enter(Operation::EVENTS)).collect();
        assert!(taken.iter().all(|inside| inside.0.is_some()));
        assert!(watch.enter(Operation::EPOCH).0.is_none());
        drop(taken);
        assert!(watch.enter(Operation::EPOCH).0.is_some());
    }
}
