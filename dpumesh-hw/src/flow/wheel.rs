//! [`IdleWheel`]: when to look whether a flow has gone idle.
//!
//! Four levels of 64 lists; a list of level L spans 64^L ticks. A slot waits in the list its deadline falls into, and
//! when the wheel comes to that list it *asks*: the caller reads the flow's `last_seen` and answers with a new deadline
//! or lets go. Packets therefore never touch the wheel, and no deadline is stored: a slot that has to move down a level
//! is simply asked once more. Lists are threaded through one array of 8 octets per slot; nothing is allocated after
//! creation, and a bitmap per level lets time jump over empty lists.
//!
//! Next: an expired flow leaves by [`FlowTable::remove_slot`](super::FlowTable::remove_slot), its last counts go to the
//! flow log.

#![forbid(unsafe_code)]

use super::table::Slot;

/// A moment, in ticks of a length the engine chooses (a millisecond lasts for 49 days).
///
/// It wraps: two ticks can be compared while they are less than 2³¹ ticks apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Tick(pub u32);

impl Tick {
    /// `ticks` later.
    #[inline]
    #[must_use]
    pub fn plus(self, ticks: u32) -> Self {
        Self(self.0.wrapping_add(ticks))
    }

    /// Ticks from `earlier` to `self`.
    #[inline]
    pub fn since(self, earlier: Self) -> u32 {
        self.0.wrapping_sub(earlier.0)
    }

    /// Whether `self` is at or after `deadline`.
    #[inline]
    pub fn reached(self, deadline: Self) -> bool {
        (self.since(deadline) as i32) >= 0
    }
}

/// The caller's answer about a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Idle {
    /// Not yet: ask again at this tick (at the next one, if it has passed).
    Until(Tick),
    /// The slot is done with; it leaves the wheel.
    Gone,
}

/// How far [`IdleWheel::advance`] came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Slots asked.
    pub asked: u32,
    /// Whether the wheel has caught up with `now`; if not, the budget ran out and the next call goes on.
    pub caught_up: bool,
}

/// Hierarchical timer wheel over slots. Layout in the module documentation.
///
/// ```
/// use dpumesh_hw::flow::{Idle, IdleWheel, Slot, Tick};
/// let mut wheel = IdleWheel::new(16, Tick(1000));
/// let slot = Slot::from_index(3);
/// wheel.arm(slot, Tick(1060));
/// let mut expired = Vec::new();
/// wheel.advance(Tick(1060), 64, |slot| {
///     expired.push(slot); // a real caller compares last_seen + timeout with now
///     Idle::Gone
/// });
/// assert_eq!(expired, [slot]);
/// ```
pub struct IdleWheel {
    links: Vec<Link>,
    heads: [u32; LISTS],
    /// One bit per list of a level that holds slots.
    filled: [u64; LEVELS],
    now: Tick,
    armed: u32,
}

const LEVELS: usize = 4;
const LEVEL_BITS: u32 = 6;
const LEVEL_LISTS: usize = 1 << LEVEL_BITS;
/// The lists of all levels, then per level the one that is being asked.
const DUE: usize = LEVELS * LEVEL_LISTS;
const LISTS: usize = DUE + LEVELS;
/// Deadlines further away are asked early, at the end of the last level.
const HORIZON: u32 = (1 << (LEVEL_BITS * LEVELS as u32)) - 1;
const NONE: u32 = u32::MAX;
/// In `prev`: the slot is the first of the list whose number is in the other bits.
const FIRST: u32 = 1 << 31;

#[derive(Clone, Copy)]
struct Link {
    next: u32,
    /// [`NONE`] while the slot is not armed.
    prev: u32,
}

impl IdleWheel {
    /// A wheel for slots 0..`slots` (at most 2³⁰, as the flow table), standing at `now`.
    pub fn new(slots: u32, now: Tick) -> Self {
        Self {
            links: vec![
                Link {
                    next: NONE,
                    prev: NONE
                };
                slots as usize
            ],
            heads: [NONE; LISTS],
            filled: [0; LEVELS],
            now,
            armed: 0,
        }
    }

    /// Slots in the wheel.
    pub fn armed(&self) -> usize {
        self.armed as usize
    }

    /// Memory reserved, in octets.
    pub fn memory_bytes(&self) -> usize {
        size_of::<Self>() + self.links.capacity() * size_of::<Link>()
    }

    /// Asks about `slot` at `deadline`, or at the next tick if that has passed. A slot that waits already moves.
    ///
    /// # Panics
    /// If the slot is beyond the number given at creation.
    pub fn arm(&mut self, slot: Slot, deadline: Tick) {
        self.disarm(slot);
        let list = self.list_for(deadline);
        self.push(list, slot.index());
        self.armed += 1;
    }

    /// Takes `slot` out; nothing happens if it is not in. Optional after a removal: the next question finds the slot
    /// vacant.
    ///
    /// # Panics
    /// If the slot is beyond the number given at creation.
    pub fn disarm(&mut self, slot: Slot) {
        if self.links[slot.index() as usize].prev != NONE {
            self.unlink(slot.index());
            self.armed -= 1;
        }
    }

    /// Moves on to `now` and asks about every slot whose deadline has come, plus those that change level; at most
    /// `budget` of them, so that a batch of packets never waits for a crowd. No slot is reported late once
    /// [`Progress::caught_up`] is true. `ask` decides by its own knowledge whether the flow is idle. If `now` lies
    /// before the wheel's time, nothing happens.
    pub fn advance(&mut self, now: Tick, budget: u32, mut ask: impl FnMut(Slot) -> Idle) -> Progress {
        let mut asked = 0;
        if !now.reached(self.now) {
            return Progress {
                asked,
                caught_up: true,
            };
        }
        loop {
            while let Some(index) = self.first_due() {
                if asked == budget {
                    return Progress {
                        asked,
                        caught_up: false,
                    };
                }
                asked += 1;
                self.unlink(index);
                match ask(Slot::from_index(index)) {
                    Idle::Until(deadline) => {
                        let list = self.list_for(deadline);
                        self.push(list, index);
                    }
                    Idle::Gone => self.armed -= 1,
                }
            }
            match self.next_stop() {
                Some(stop) if stop.since(self.now) <= now.since(self.now) => self.stop_at(stop),
                _ => {
                    self.now = now;
                    return Progress {
                        asked,
                        caught_up: true,
                    };
                }
            }
        }
    }

    fn first_due(&self) -> Option<u32> {
        self.heads[DUE..].iter().copied().find(|&head| head != NONE)
    }

    /// The next tick at which a filled list comes up.
    fn next_stop(&self) -> Option<Tick> {
        let stops = (0..LEVELS).filter_map(|level| {
            let shift = LEVEL_BITS * level as u32;
            let here = self.now.0 >> shift;
            // The list of the current position has been emptied: whatever is in it is a whole turn away.
            let ahead = self.filled[level].rotate_right((here + 1) % LEVEL_LISTS as u32);
            (ahead != 0).then(|| Tick((here + 1 + ahead.trailing_zeros()) << shift))
        });
        stops.min_by_key(|stop| stop.since(self.now))
    }

    /// Stands at `stop` and makes every list that begins there due.
    fn stop_at(&mut self, stop: Tick) {
        self.now = stop;
        for level in 0..LEVELS {
            let shift = LEVEL_BITS * level as u32;
            if stop.0 & ((1 << shift) - 1) != 0 {
                return;
            }
            let position = (stop.0 >> shift) as usize % LEVEL_LISTS;
            let list = level * LEVEL_LISTS + position;
            let head = std::mem::replace(&mut self.heads[list], NONE);
            self.filled[level] &= !(1 << position);
            self.heads[DUE + level] = head;
            if head != NONE {
                self.links[head as usize].prev = FIRST | (DUE + level) as u32;
            }
        }
    }

    fn list_for(&self, deadline: Tick) -> usize {
        let ahead = (deadline.since(self.now) as i32).max(1) as u32;
        let ahead = ahead.min(HORIZON);
        let level = ((31 - ahead.leading_zeros()) / LEVEL_BITS) as usize;
        let at = self.now.plus(ahead).0 >> (LEVEL_BITS * level as u32);
        level * LEVEL_LISTS + at as usize % LEVEL_LISTS
    }

    fn push(&mut self, list: usize, index: u32) {
        let head = std::mem::replace(&mut self.heads[list], index);
        self.links[index as usize] = Link {
            next: head,
            prev: FIRST | list as u32,
        };
        if head != NONE {
            self.links[head as usize].prev = index;
        }
        self.filled[list / LEVEL_LISTS] |= 1 << (list % LEVEL_LISTS);
    }

    fn unlink(&mut self, index: u32) {
        let Link { next, prev } = std::mem::replace(
            &mut self.links[index as usize],
            Link {
                next: NONE,
                prev: NONE,
            },
        );
        if next != NONE {
            self.links[next as usize].prev = prev;
        }
        if prev & FIRST == 0 {
            self.links[prev as usize].next = next;
            return;
        }
        let list = (prev & !FIRST) as usize;
        self.heads[list] = next;
        if next == NONE && list < DUE {
            self.filled[list / LEVEL_LISTS] &= !(1 << (list % LEVEL_LISTS));
        }
    }
}

impl std::fmt::Debug for IdleWheel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IdleWheel")
            .field("now", &self.now)
            .field("armed", &self.armed)
            .field("slots", &self.links.len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    const SLOTS: u32 = 40;

    #[derive(Clone, Debug)]
    enum Op {
        /// A flow begins or gets a packet: `touch` moves the deadline only in the model, as packets do.
        Arm(u32, u32),
        Touch(u32, u32),
        Disarm(u32),
        Advance(u32),
    }

    fn distance() -> impl Strategy<Value = u32> {
        prop_oneof![0u32..70, 0u32..5000, 0u32..300_000, 0u32..40_000_000]
    }

    fn op() -> impl Strategy<Value = Op> {
        let slot = 0u32..SLOTS;
        prop_oneof![
            4 => (slot.clone(), distance()).prop_map(|(s, d)| Op::Arm(s, d)),
            2 => (slot.clone(), distance()).prop_map(|(s, d)| Op::Touch(s, d)),
            1 => slot.prop_map(Op::Disarm),
            4 => distance().prop_map(Op::Advance),
        ]
    }

    proptest! {
        /// Against a sorted map: a slot goes in the first advance at or after its deadline, never before, whatever
        /// the budget and wherever the clock wraps.
        #[test]
        fn expires_like_a_sorted_map(start in any::<u32>(), budget in 1u32..20, ops in proptest::collection::vec(op(), 1..200)) {
            let mut now = Tick(start);
            let mut wheel = IdleWheel::new(SLOTS, now);
            let mut model: BTreeMap<u32, Tick> = BTreeMap::new();
            for op in ops {
                match op {
                    Op::Arm(slot, d) => {
                        wheel.arm(Slot::from_index(slot), now.plus(d));
                        model.insert(slot, now.plus(d));
                    }
                    Op::Touch(slot, d) => {
                        if let Some(deadline) = model.get_mut(&slot) && !now.plus(d).reached(*deadline) {
                            // Earlier deadlines need `arm`; packets only ever move them away.
                        } else if let Some(deadline) = model.get_mut(&slot) {
                            *deadline = now.plus(d);
                        }
                    }
                    Op::Disarm(slot) => {
                        wheel.disarm(Slot::from_index(slot));
                        model.remove(&slot);
                    }
                    Op::Advance(d) => {
                        now = now.plus(d);
                        let mut expired = Vec::new();
                        for round in 0.. {
                            prop_assert!(round < 100_000, "the wheel never caught up");
                            let progress = wheel.advance(now, budget, |slot| {
                                let deadline = model[&slot.index()];
                                if !now.reached(deadline) {
                                    return Idle::Until(deadline);
                                }
                                expired.push(slot.index());
                                Idle::Gone
                            });
                            prop_assert!(progress.asked <= budget);
                            if progress.caught_up {
                                break;
                            }
                        }
                        let mut due: Vec<_> = model.iter().filter(|(_, d)| now.reached(**d)).map(|(s, _)| *s).collect();
                        // A deadline of "now" is armed for the next tick.
                        expired.sort_unstable();
                        if d == 0 {
                            due.retain(|s| expired.contains(s));
                        }
                        prop_assert_eq!(&expired, &due);
                        model.retain(|s, _| !due.contains(s));
                    }
                }
                prop_assert_eq!(wheel.armed(), model.len());
            }
        }
    }

    #[test]
    fn eight_octets_per_slot() {
        assert_eq!(size_of::<Link>(), 8);
    }

    #[test]
    fn a_jump_over_years_costs_no_walk() {
        let mut wheel = IdleWheel::new(4, Tick(0));
        wheel.arm(Slot::from_index(1), Tick(5));
        let mut asked = Vec::new();
        let progress = wheel.advance(Tick(2_000_000_000), 10, |slot| {
            asked.push(slot.index());
            Idle::Gone
        });
        assert_eq!(asked, [1]);
        assert_eq!(
            progress,
            Progress {
                asked: 1,
                caught_up: true
            }
        );
    }

    #[test]
    fn the_budget_holds_and_the_rest_comes_later() {
        let mut wheel = IdleWheel::new(100, Tick(0));
        for n in 0..100 {
            wheel.arm(Slot::from_index(n), Tick(10));
        }
        let mut seen = 0;
        while !wheel
            .advance(Tick(10), 7, |_| {
                seen += 1;
                Idle::Gone
            })
            .caught_up
        {
            assert_eq!(seen % 7, 0);
        }
        assert_eq!((seen, wheel.armed()), (100, 0));
    }

    #[test]
    fn time_that_runs_backwards_is_ignored() {
        let mut wheel = IdleWheel::new(1, Tick(100));
        wheel.arm(Slot::from_index(0), Tick(101));
        let progress = wheel.advance(Tick(50), 10, |_| panic!("nothing is due"));
        assert_eq!(
            progress,
            Progress {
                asked: 0,
                caught_up: true
            }
        );
        assert_eq!(wheel.advance(Tick(101), 10, |_| Idle::Gone).asked, 1);
    }

    #[test]
    fn an_answer_in_the_past_is_asked_at_the_next_tick() {
        let mut wheel = IdleWheel::new(1, Tick(0));
        wheel.arm(Slot::from_index(0), Tick(1));
        assert_eq!(wheel.advance(Tick(1), 10, |_| Idle::Until(Tick(0))).asked, 1);
        assert_eq!(wheel.advance(Tick(1), 10, |_| Idle::Gone).asked, 0);
        assert_eq!(wheel.advance(Tick(2), 10, |_| Idle::Gone).asked, 1);
    }
}
