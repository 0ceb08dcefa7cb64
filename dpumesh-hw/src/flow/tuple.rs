//! [`Tuple`]: all rules of one mask, a hash table from masked key to the rules with that key.
//!
//! ```text
//!  groups, 16 octets each, dense            lanes, aside          entries, dense
//!  ┌───────────┬─────────────────┐          ┌─────────┐           ┌────────────────────────────┐
//!  │ 7 tags u16│ passed mark u16 │ ───────► │ 7 × u32 │ ────────► │ masked key, rules by rank  │
//!  └───────────┴─────────────────┘          └─────────┘           └────────────────────────────┘
//! ```
//!
//! Most questions to a tuple are answered with "no", and a no must cost next to nothing, since a packet may ask 64 of
//! them. So the part of a tuple that a no reads is one cache line, and does three things:
//!
//! * The hash is a sum of three *terms*: one over the source address, one over the destination address, one over the
//!   rest of the key. Tuples share prefix lengths, hence terms: the classifier computes each distinct one once per
//!   packet, and a tuple just adds.
//! * One group of seven tags and its mark is compared at once, as one 128-bit vector. An entry that found its home group full sits in
//!   the next one with room and leaves a mark in the groups it passed; without mark and tag the search is over.

#![forbid(unsafe_code)]

use super::RuleIndex;
use super::hash::HashSeed;
use super::key::{WideKey, WideMask};
use std::collections::BTreeMap;

/// Parts of a key that are hashed by themselves: source address, destination address, the rest.
pub(super) const PARTS: usize = 3;
/// The terms of a packet, by part and number; number 0 is always 0, for a mask that leaves nothing of the part.
pub(super) type TermValues = [[u64; 256]; PARTS];

const LANES: usize = 7;
/// Entries per group at which the groups are doubled, as a fraction: 7 / 2.
const LOAD: (usize, usize) = (7, 2);
/// A lane without entry.
const NONE: u32 = u32::MAX;
/// A rule as an entry knows it; ordered best first: priority, then rule index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ranked {
    pub(super) priority: u32,
    pub(super) rule: RuleIndex,
    /// Whether it may overlap a rule of equal priority; not part of its identity.
    pub(super) tie: bool,
}

/// The rules that share mask and masked key.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) key: WideKey,
    pub(super) best: Ranked,
    /// Ordered, all worse than `best`.
    rest: Vec<Ranked>,
}

impl Entry {
    pub(super) fn ranked(&self) -> impl Iterator<Item = &Ranked> {
        std::iter::once(&self.best).chain(&self.rest)
    }
}

/// The hash of one part of a key under a mask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Term {
    part: u8,
    mask: [u64; 4],
}

impl Term {
    /// The terms of a mask; `None` for a part it does not look at.
    fn of_mask(mask: &WideMask) -> [Option<Self>; PARTS] {
        let w = mask.words();
        let parts = [[w[0], w[1], 0, 0], [w[2], w[3], 0, 0], [w[4], w[5], w[6], w[7]]];
        std::array::from_fn(|part| {
            (parts[part] != [0; 4]).then_some(Self {
                part: part as u8,
                mask: parts[part],
            })
        })
    }

    pub(super) fn part(&self) -> usize {
        usize::from(self.part).min(PARTS - 1)
    }

    #[inline]
    pub(super) fn value(&self, seed: &HashSeed, key: &WideKey) -> u64 {
        let (w, m) = (key.words(), &self.mask);
        match self.part {
            0 => seed.pair(0, w[0] & m[0], w[1] & m[1]),
            1 => seed.pair(1, w[2] & m[0], w[3] & m[1]),
            _ => seed
                .pair(2, w[4] & m[0], w[5] & m[1])
                .wrapping_add(seed.pair(3, w[6] & m[2], w[7] & m[3])),
        }
    }
}

/// The part that a "no" reads; the rest is behind `store`.
#[derive(Clone, Debug)]
pub(super) struct Tuple {
    groups: Vec<Group>,
    /// The numbers of its terms by part; 0 for none.
    numbers: [u8; PARTS],
    /// Whether its mask looks beyond the flow key.
    pub(super) beyond: bool,
    /// The priority of its best rule.
    pub(super) best: u32,
    /// The first `need` of the classifier's terms must have been computed.
    pub(super) need: usize,
    /// Lookups it has won since the last ordering, older ones halved.
    pub(super) hits: u64,
    store: Box<Store>,
}

#[derive(Clone, Debug)]
struct Store {
    mask: WideMask,
    seed: HashSeed,
    terms: [Option<Term>; PARTS],
    lanes: Vec<Lanes>,
    entries: Vec<Entry>,
    priorities: BTreeMap<u32, u32>,
}

/// Beside a group: the entries of its tags, and how many entries passed by on their way from home.
#[derive(Clone, Copy, Debug)]
struct Lanes {
    index: [u32; LANES],
    passed: u32,
}

impl Lanes {
    const EMPTY: Self = Self {
        index: [NONE; LANES],
        passed: 0,
    };
}

impl Tuple {
    pub(super) fn new(mask: WideMask, seed: HashSeed) -> Self {
        let store = Store {
            mask,
            seed,
            terms: Term::of_mask(&mask),
            lanes: vec![Lanes::EMPTY],
            entries: Vec::new(),
            priorities: BTreeMap::new(),
        };
        Self {
            groups: vec![Group::EMPTY],
            numbers: [0; PARTS],
            beyond: mask.beyond_flow_key(),
            best: u32::MAX,
            need: 0,
            hits: 0,
            store: Box::new(store),
        }
    }

    pub(super) fn mask(&self) -> &WideMask {
        &self.store.mask
    }

    pub(super) fn is_empty(&self) -> bool {
        self.store.entries.is_empty()
    }

    pub(super) fn has_priority(&self, priority: u32) -> bool {
        self.store.priorities.contains_key(&priority)
    }

    /// What its hash is the sum of.
    pub(super) fn terms(&self) -> [Option<Term>; PARTS] {
        self.store.terms
    }

    /// Tells the tuple the numbers of its terms, and how many terms must be computed for it.
    pub(super) fn assign(&mut self, numbers: [u8; PARTS], need: usize) {
        self.numbers = numbers;
        self.need = need;
    }

    /// The hash of a packet whose terms up to `need` are in `values`.
    #[inline(always)]
    pub(super) fn hash(&self, values: &TermValues) -> u64 {
        let value = |part: usize| values[part][usize::from(self.numbers[part])];
        value(0).wrapping_add(value(1)).wrapping_add(value(2))
    }

    /// Whether certainly no rule is here for this hash. Rarely a "no" is not recognised.
    #[inline(always)]
    pub(super) fn is_no(&self, hash: u64) -> bool {
        self.groups[home_of(hash, &self.groups)].is_no(tag_of(hash))
    }

    /// The rules for a key with this hash.
    pub(super) fn find(&self, hash: u64, key: &WideKey) -> Option<&Entry> {
        let place = self.search(hash, key)?;
        Some(&self.store.entries[place.index])
    }

    /// Entries that some packet matches together with (`mask`, `key`). One lookup if this mask lies within the other
    /// one, else a scan over the entries.
    pub(super) fn overlapping(&self, mask: WideMask, key: WideKey) -> impl Iterator<Item = &Entry> {
        let entries = &self.store.entries[..];
        let (one, many) = if self.store.mask.within(&mask) {
            (self.find(self.store.hash(&key), &key), &[][..])
        } else {
            (None, entries)
        };
        let common = self.store.mask.both(&mask);
        one.into_iter()
            .chain(many.iter().filter(move |entry| entry.key.agrees(&key, &common)))
    }

    /// Adds a rule; false if the very same one (key, priority, index) is there.
    pub(super) fn insert(&mut self, key: &WideKey, ranked: Ranked) -> bool {
        let key = key.masked(&self.store.mask);
        match self.search(self.store.hash(&key), &key) {
            Some(place) => {
                let entry = &mut self.store.entries[place.index];
                if entry
                    .ranked()
                    .any(|r| (r.priority, r.rule) == (ranked.priority, ranked.rule))
                {
                    return false;
                }
                entry.rest.push(ranked);
                entry.rest.push(entry.best);
                entry.rest.sort_unstable();
                entry.best = entry.rest.remove(0);
            }
            None => {
                self.store.entries.push(Entry {
                    key,
                    best: ranked,
                    rest: Vec::new(),
                });
                if self.store.entries.len() * LOAD.1 > self.groups.len() * LOAD.0 {
                    self.grow();
                } else {
                    self.link(self.store.entries.len() - 1);
                }
            }
        }
        *self.store.priorities.entry(ranked.priority).or_insert(0) += 1;
        self.best = self.best.min(ranked.priority);
        true
    }

    /// Removes a rule and returns it as it was entered.
    pub(super) fn remove(&mut self, key: &WideKey, priority: u32, rule: RuleIndex) -> Option<Ranked> {
        let place = self.search(self.store.hash(key), key)?;
        let entry = &mut self.store.entries[place.index];
        let position = entry
            .ranked()
            .position(|r| (r.priority, r.rule) == (priority, rule))?;
        let removed = if position > 0 {
            entry.rest.remove(position - 1)
        } else if entry.rest.is_empty() {
            let best = entry.best;
            self.unlink(place);
            best
        } else {
            let next = entry.rest.remove(0);
            std::mem::replace(&mut entry.best, next)
        };
        self.forget_priority(priority);
        Some(removed)
    }

    fn forget_priority(&mut self, priority: u32) {
        let priorities = &mut self.store.priorities;
        if let Some(count) = priorities.get_mut(&priority) {
            *count -= 1;
            if *count == 0 {
                priorities.remove(&priority);
            }
        }
        self.best = priorities.keys().next().copied().unwrap_or(u32::MAX);
    }

    /// Where the entry for `key` is, masked or not.
    fn search(&self, hash: u64, key: &WideKey) -> Option<Place> {
        let (mut at, tag) = (home_of(hash, &self.groups), tag_of(hash));
        // Every group may carry a mark: one turn is enough.
        for _ in 0..self.groups.len() {
            let group = &self.groups[at];
            for (lane, &index) in self.store.lanes[at].index.iter().enumerate() {
                let tagged = group.0[lane] == tag && index != NONE;
                if tagged && key.agrees(&self.store.entries[index as usize].key, &self.store.mask) {
                    return Some(Place {
                        group: at,
                        lane,
                        index: index as usize,
                    });
                }
            }
            if !group.is_passed() {
                return None;
            }
            at = self.next(at);
        }
        None
    }

    fn grow(&mut self) {
        let groups = self.groups.len() * 2;
        self.groups = vec![Group::EMPTY; groups];
        self.store.lanes = vec![Lanes::EMPTY; groups];
        for index in 0..self.store.entries.len() {
            self.link(index);
        }
    }

    /// Enters entry `index` into the first group with room; the load bound leaves some.
    fn link(&mut self, index: usize) {
        let hash = self.store.hash(&self.store.entries[index].key);
        let mut at = home_of(hash, &self.groups);
        loop {
            let lanes = &mut self.store.lanes[at];
            if let Some(lane) = lanes.index.iter().position(|i| *i == NONE) {
                lanes.index[lane] = index as u32;
                self.groups[at].0[lane] = tag_of(hash);
                return;
            }
            lanes.passed += 1;
            self.groups[at].mark_passed(true);
            at = self.next(at);
        }
    }

    /// Takes an entry out; the last entry takes over its index.
    fn unlink(&mut self, place: Place) {
        let hash = self.store.hash(&self.store.entries[place.index].key);
        let mut at = home_of(hash, &self.groups);
        while at != place.group {
            let lanes = &mut self.store.lanes[at];
            lanes.passed -= 1;
            self.groups[at].mark_passed(lanes.passed > 0);
            at = self.next(at);
        }
        self.groups[at].0[place.lane] = 0;
        self.store.lanes[at].index[place.lane] = NONE;
        let last = self.store.entries.len() - 1;
        if place.index != last {
            let key = self.store.entries[last].key;
            if let Some(moved) = self.search(self.store.hash(&key), &key) {
                self.store.lanes[moved.group].index[moved.lane] = place.index as u32;
            }
        }
        self.store.entries.swap_remove(place.index);
    }

    fn next(&self, group: usize) -> usize {
        if group + 1 == self.groups.len() {
            0
        } else {
            group + 1
        }
    }
}

impl Store {
    /// The same sum that a lookup makes of shared terms.
    fn hash(&self, key: &WideKey) -> u64 {
        let terms = self.terms.iter().flatten();
        terms.fold(0u64, |sum, term| sum.wrapping_add(term.value(&self.seed, key)))
    }
}

#[derive(Clone, Copy)]
struct Place {
    group: usize,
    lane: usize,
    index: usize,
}

/// Seven tags, 0 for an empty lane (or a rare tag: the lanes beside know); the eighth word is [`Group::PASSED`] if an entry passed by, else 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(align(16))]
struct Group([u16; LANES + 1]);

/// The part of a hash that a group keeps: not the bits that chose the group.
#[inline(always)]
fn tag_of(hash: u64) -> u16 {
    (hash >> 48) as u16
}

/// The home group of a hash. The number of groups is a power of two.
#[inline(always)]
fn home_of(hash: u64, groups: &[Group]) -> usize {
    hash as usize & groups.len().wrapping_sub(1)
}

impl Group {
    const EMPTY: Self = Self([0; LANES + 1]);
    const PASSED: u16 = u16::MAX;

    /// Whether no lane has the tag and nothing passed; a tag of 0 may find an empty lane. One fixed-length comparison, which becomes one of vectors.
    #[inline(always)]
    fn is_no(&self, tag: u16) -> bool {
        let mut wanted = [tag; LANES + 1];
        wanted[LANES] = Self::PASSED;
        !self
            .0
            .iter()
            .zip(wanted)
            .fold(false, |any, (have, want)| any | (*have == want))
    }

    fn is_passed(&self) -> bool {
        self.0[LANES] == Self::PASSED
    }

    fn mark_passed(&mut self, passed: bool) {
        self.0[LANES] = if passed { Self::PASSED } else { 0 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Cubes are irregular enough to crowd some groups; consecutive numbers would fill them evenly.
    fn key(n: u64) -> WideKey {
        WideKey::from_words([0, 0, 0, n * n * n, 0, 0, 0, 0])
    }

    fn ranked(n: u64) -> Ranked {
        Ranked {
            priority: 1,
            rule: RuleIndex(n as u32),
            tie: false,
        }
    }

    fn find(tuple: &Tuple, key: &WideKey) -> Option<RuleIndex> {
        tuple
            .find(tuple.store.hash(key), key)
            .map(|entry| entry.best.rule)
    }

    #[test]
    fn what_a_no_reads_is_one_cache_line() {
        assert!(size_of::<Tuple>() <= 64, "{}", size_of::<Tuple>());
    }

    #[test]
    fn grows_shrinks_and_leaves_no_mark_behind() {
        let mut tuple = Tuple::new(WideMask::from_words([0, 0, 0, !0, 0, 0, 0, 0]), HashSeed::new(3));
        for n in 0..5000 {
            assert!(tuple.insert(&key(n), ranked(n)));
            assert!(!tuple.insert(&key(n), ranked(n)), "the same rule twice");
        }
        assert!(
            tuple.groups.iter().any(Group::is_passed),
            "no group ever overflowed"
        );
        for n in 0..5000 {
            assert_eq!(find(&tuple, &key(n)), Some(RuleIndex(n as u32)));
        }
        for n in (0..5000).rev() {
            assert!(tuple.remove(&key(n), 1, RuleIndex(n as u32)).is_some());
            assert_eq!(find(&tuple, &key(n)), None);
            assert!(tuple.remove(&key(n), 1, RuleIndex(n as u32)).is_none());
        }
        assert!(tuple.is_empty());
        assert!(tuple.groups.iter().all(|group| *group == Group::EMPTY));
        assert_eq!(tuple.best, u32::MAX);
    }

    #[test]
    fn every_word_tells_entries_apart() {
        let mut tuple = Tuple::new(WideMask::ALL, HashSeed::new(3));
        let words: Vec<_> = (0..8)
            .map(|word| std::array::from_fn(|i| u64::from(i == word)))
            .collect();
        for (n, words) in (0..).zip(&words) {
            assert!(tuple.insert(&WideKey::from_words(*words), ranked(n)));
        }
        let hashes: std::collections::HashSet<_> = words
            .iter()
            .map(|words| tuple.store.hash(&WideKey::from_words(*words)))
            .collect();
        assert_eq!(hashes.len(), 8);
        for (n, words) in (0..).zip(&words) {
            assert_eq!(find(&tuple, &WideKey::from_words(*words)), Some(RuleIndex(n)));
        }
    }

    proptest! {
        #[test]
        fn a_group_says_no_exactly_when_nothing_fits(tags in any::<[u16; LANES]>(), tag in 1u16.., at in 0..2 * LANES, passed: bool) {
            let mut group = Group::EMPTY;
            group.mark_passed(passed);
            group.0[..LANES].copy_from_slice(&tags);
            if at < LANES {
                group.0[at] = tag;
            }
            prop_assert_eq!(group.is_passed(), passed);
            prop_assert_eq!(group.is_no(tag), !passed && !group.0[..LANES].contains(&tag));
        }
    }
}
