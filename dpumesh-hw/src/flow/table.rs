//! [`FlowTable`]: exact match from [`FlowKey`] to a small value, the first table every packet meets.
//!
//! Two arrays, both fixed at creation:
//!
//! ```text
//!  buckets, 64 octets each, one cache line         records, one cache line for a value of up to 24 octets
//!  ┌───────────┬───────────┬──────────────┐        ┌─────────────────────────────┬───────────┐
//!  │ 8 tags u16│ 8 gens u16│ 8 slots u32  │ ─────► │ FlowKey, 40 octets          │ value     │
//!  └───────────┴───────────┴──────────────┘        └─────────────────────────────┴───────────┘
//! ```
//!
//! A key's hash names its home bucket and its tag. An entry sits in its home bucket or, if that was full, in the next
//! bucket with room; so a search walks on only past full buckets, and a removal from a full bucket pulls an overflowed
//! entry back. Records never move: a [`Slot`] is good until its flow is removed. At the limit the buckets are half
//! full; about one in twenty is then full.
//!
//! # Generations
//!
//! Every entry carries the table's generation at the time it was written. [`FlowTable::bump_generation`] makes all of
//! them *stale* at once: lookups miss them, [`insert`](FlowTable::insert) reuses their place and hands them out,
//! ageing and [`reclaim_one`](FlowTable::reclaim_one) remove them. 16 bits would come round after 65,535 bumps; before
//! that happens each bump marks a small share of the buckets' stale entries as dead for good, so the share is bounded
//! and there is no pause.
//!
//! # Speed
//!
//! [`FlowTable::lookup_batch`] runs stage by stage over 32 keys, and each stage asks for the lines that the next one
//! reads: hash all and fetch the buckets, compare all tags and fetch the records, compare all keys. Plain loads in place
//! of the prefetches keep as many misses in flight, but hold up the work behind them: 43 ns per lookup in a million
//! flows where prefetches take 31.

#![forbid(unsafe_code)]

use super::hash::{HashSeed, spread, tag};
use super::key::FlowKey;
use prefetch_index::prefetch_index;

/// Keys that [`FlowTable::lookup_batch`] works on at a time.
const BATCH: usize = 32;
/// What is left over goes through in these.
const SMALL_BATCH: usize = 8;
const LANES: usize = 8;
/// Entries per bucket when the table is at its limit.
const LOAD: usize = 4;
/// Every bucket is swept once in this many generations, half of what 16 bits can tell apart.
const SWEEP_ROUND: usize = 1 << 15;
/// The generation no table ever has.
const DEAD: u16 = 0;

/// Where a flow's record is: stable from insert to removal, dense from 0, reused afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(std::num::NonZeroU32);

impl Slot {
    /// The slot with this index.
    ///
    /// # Panics
    /// If `index` is `u32::MAX`, which no table reaches.
    #[inline]
    pub fn from_index(index: u32) -> Self {
        Self(
            std::num::NonZeroU32::MIN
                .checked_add(index)
                .expect("index below u32::MAX"),
        )
    }

    /// Index from 0 to [`FlowTable::limit`] − 1.
    #[inline]
    pub fn index(self) -> u32 {
        self.0.get() - 1
    }
}

/// What [`FlowTable::insert`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inserted<V> {
    /// Where the flow is now.
    pub slot: Slot,
    /// The entry that had to go: the same key's previous value, or a stale flow whose place was taken (its slot may
    /// or may not be the new one's).
    pub evicted: Option<Evicted<V>>,
}

/// A flow that left the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Evicted<V> {
    /// Where it was.
    pub slot: Slot,
    /// Its key.
    pub key: FlowKey,
    /// Its last value.
    pub value: V,
    /// Whether it was of an earlier generation.
    pub stale: bool,
}

/// The table holds as many live flows as it may. The packet is none the worse: it is classified without a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("flow table full: {used} of {limit} flows in use")]
pub struct TableFull {
    /// Live flows.
    pub used: u32,
    /// The limit given at creation.
    pub limit: u32,
}

/// A table that cannot be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    /// The limit is 0 or beyond what slots can number.
    #[error("flow table limit {asked} is not in 1..={max}")]
    Limit {
        /// What was asked for.
        asked: u32,
        /// The largest limit.
        max: u32,
    },
    /// The memory cannot be had.
    #[error("flow table of {limit} flows needs {octets} octets, which the allocator refused")]
    Memory {
        /// What was asked for.
        limit: u32,
        /// What it takes.
        octets: usize,
    },
}

/// Bounded exact-match table; one writer, no allocation after creation. Layout in the module documentation.
///
/// ```
/// use dpumesh_hw::flow::{FlowFields, FlowKey, FlowTable, HashSeed};
/// let mut table = FlowTable::new(1024, HashSeed::new(0x5eed))?;
/// let key = FlowKey::new(&FlowFields { dst_port: 80, proto: 6, ..FlowFields::default() });
/// let slot = table.insert(key, 7u32)?.slot;
/// let mut found = [None; 1];
/// table.lookup_batch(&[key], &mut found);
/// assert_eq!(found, [Some(slot)]);
/// table.bump_generation();
/// assert_eq!(table.get(&key), None);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct FlowTable<V> {
    buckets: Vec<Bucket>,
    records: Vec<Record<V>>,
    /// Vacated record indices, last vacated first out (its line is warm).
    vacant: Vec<u32>,
    limit: u32,
    generation: u16,
    stale: u32,
    /// Next bucket whose stale entries are marked dead.
    sweep_at: usize,
    /// Next bucket in which a stale entry is looked for.
    reclaim_at: usize,
    seed: HashSeed,
}

impl<V: Copy> FlowTable<V> {
    /// Largest limit.
    pub const MAX_LIMIT: u32 = 1 << 30;

    /// A table for at most `limit` flows, all memory reserved now. `seed` must be secret, see [`HashSeed`].
    ///
    /// # Errors
    /// [`TableError`] if the limit is out of range or the memory cannot be had.
    pub fn new(limit: u32, seed: HashSeed) -> Result<Self, TableError> {
        if !(1..=Self::MAX_LIMIT).contains(&limit) {
            return Err(TableError::Limit {
                asked: limit,
                max: Self::MAX_LIMIT,
            });
        }
        let (flows, bucket_count) = (limit as usize, (limit as usize).div_ceil(LOAD).max(2));
        let octets = flows * (size_of::<Record<V>>() + size_of::<u32>()) + bucket_count * size_of::<Bucket>();
        let refused = |_| TableError::Memory { limit, octets };
        let (mut buckets, mut records, mut vacant) = (Vec::new(), Vec::new(), Vec::new());
        buckets.try_reserve_exact(bucket_count).map_err(refused)?;
        records.try_reserve_exact(flows).map_err(refused)?;
        vacant.try_reserve_exact(flows).map_err(refused)?;
        buckets.resize(bucket_count, Bucket::EMPTY);
        Ok(Self {
            buckets,
            records,
            vacant,
            limit,
            generation: 1,
            stale: 0,
            sweep_at: 0,
            reclaim_at: 0,
            seed,
        })
    }

    /// Live flows.
    pub fn len(&self) -> usize {
        self.occupied() - self.stale as usize
    }

    /// Whether no flow is live.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Flows of earlier generations that still take up a record each.
    pub fn stale(&self) -> usize {
        self.stale as usize
    }

    /// The limit given at creation.
    pub fn limit(&self) -> u32 {
        self.limit
    }

    /// All memory the table has reserved, in octets.
    pub fn memory_bytes(&self) -> usize {
        size_of::<Self>()
            + self.buckets.capacity() * size_of::<Bucket>()
            + self.records.capacity() * size_of::<Record<V>>()
            + self.vacant.capacity() * size_of::<u32>()
    }

    /// Looks `keys` up, one answer per key in `found`; stale flows are misses. Pass 32 keys or a multiple for the best
    /// rate.
    ///
    /// # Panics
    /// If `found` is shorter than `keys`.
    pub fn lookup_batch(&self, keys: &[FlowKey], found: &mut [Option<Slot>]) {
        let found = &mut found[..keys.len()];
        if self.records.is_empty() {
            found.fill(None);
            return;
        }
        let (batches, rest) = keys.as_chunks::<BATCH>();
        let (found_batches, found_rest) = found.as_chunks_mut::<BATCH>();
        for (keys, found) in batches.iter().zip(found_batches) {
            self.lookup_staged(keys, found);
        }
        let (batches, rest) = rest.as_chunks::<SMALL_BATCH>();
        let (found_batches, found_rest) = found_rest.as_chunks_mut::<SMALL_BATCH>();
        for (keys, found) in batches.iter().zip(found_batches) {
            self.lookup_staged(keys, found);
        }
        for (key, found) in rest.iter().zip(found_rest) {
            *found = self.lookup(key);
        }
    }

    /// One key; [`lookup_batch`](Self::lookup_batch) hides cache misses better.
    pub fn lookup(&self, key: &FlowKey) -> Option<Slot> {
        let place = self.find(self.seed.hash5(key.words()), key)?;
        let bucket = &self.buckets[place.bucket];
        (bucket.gens[place.lane] == self.generation).then(|| Slot::from_index(bucket.slots[place.lane]))
    }

    /// The value of a live flow.
    pub fn get(&self, key: &FlowKey) -> Option<&V> {
        let slot = self.lookup(key)?;
        Some(&self.records[slot.index() as usize].value)
    }

    /// The value of a live flow, to change.
    pub fn get_mut(&mut self, key: &FlowKey) -> Option<&mut V> {
        let slot = self.lookup(key)?;
        Some(&mut self.records[slot.index() as usize].value)
    }

    /// Key and value in `slot`, stale or live; `None` if it is vacant.
    #[inline]
    pub fn at(&self, slot: Slot) -> Option<(&FlowKey, &V)> {
        let record = self.records.get(slot.index() as usize)?;
        (!record.key.same(&FlowKey::VACANT)).then_some((&record.key, &record.value))
    }

    /// The value in `slot`, to change, stale or live; `None` if it is vacant.
    #[inline]
    pub fn value_mut(&mut self, slot: Slot) -> Option<&mut V> {
        let record = self.records.get_mut(slot.index() as usize)?;
        (!record.key.same(&FlowKey::VACANT)).then_some(&mut record.value)
    }

    /// Whether `slot` holds a flow of an earlier generation.
    pub fn is_stale(&self, slot: Slot) -> bool {
        self.place_of(slot)
            .is_some_and(|p| self.buckets[p.bucket].gens[p.lane] != self.generation)
    }

    /// Occupied slots from index `from` upwards, stale ones included: a scan that can stop and go on later.
    pub fn occupied_from(&self, from: u32) -> impl Iterator<Item = Slot> {
        let from = (from as usize).min(self.records.len());
        let numbered = self.records[from..].iter().zip(from as u32..);
        numbered
            .filter(|(record, _)| record.key != FlowKey::VACANT)
            .map(|(_, index)| Slot::from_index(index))
    }

    /// Live flows in no useful order.
    pub fn iter(&self) -> impl Iterator<Item = (Slot, &FlowKey, &V)> {
        self.buckets.iter().flat_map(move |bucket| {
            lanes_of(bucket.live(self.generation)).map(move |lane| {
                let record = &self.records[bucket.slots[lane] as usize];
                (Slot::from_index(bucket.slots[lane]), &record.key, &record.value)
            })
        })
    }

    /// Adds a flow or replaces the one with the same key.
    ///
    /// Takes the place of a stale flow where it meets one, and looks for one when the table is at its limit: then the
    /// search costs about (buckets ÷ stale flows) lines. At most one flow is evicted, and it is handed back.
    ///
    /// # Errors
    /// [`TableFull`] if every record holds a live flow; nothing has changed then.
    pub fn insert(&mut self, key: FlowKey, value: V) -> Result<Inserted<V>, TableFull> {
        let hash = self.seed.hash5(key.words());
        if let Some(place) = self.find(hash, &key) {
            return Ok(self.overwrite(place, tag(hash), key, value));
        }
        if let Some(place) = self.stale_on_path(hash) {
            return Ok(self.overwrite(place, tag(hash), key, value));
        }
        let mut evicted = None;
        if self.occupied() == self.limit as usize {
            evicted = self.reclaim_one();
            if evicted.is_none() {
                return Err(TableFull {
                    used: self.limit,
                    limit: self.limit,
                });
            }
        }
        let slot = self.store(key, value);
        self.link(hash, slot);
        Ok(Inserted { slot, evicted })
    }

    /// Removes a live flow and returns its value. A stale flow stays for whoever reclaims it.
    pub fn remove(&mut self, key: &FlowKey) -> Option<V> {
        let place = self.find(self.seed.hash5(key.words()), key)?;
        if self.buckets[place.bucket].gens[place.lane] != self.generation {
            return None;
        }
        Some(self.vacate(place).value)
    }

    /// Removes what `slot` holds, stale or live.
    pub fn remove_slot(&mut self, slot: Slot) -> Option<Evicted<V>> {
        let place = self.place_of(slot)?;
        Some(self.vacate(place))
    }

    /// Removes one stale flow, if there is any; for idle moments.
    pub fn reclaim_one(&mut self) -> Option<Evicted<V>> {
        if self.stale == 0 {
            return None;
        }
        for _ in 0..self.buckets.len() {
            let bucket = &self.buckets[self.reclaim_at];
            if let Some(lane) = lanes_of(bucket.stale(self.generation)).next() {
                return Some(self.vacate(Place {
                    bucket: self.reclaim_at,
                    lane,
                }));
            }
            self.reclaim_at = self.next(self.reclaim_at);
        }
        None
    }

    /// Makes every flow stale. Constant time: beside the counter it touches 1/32768 of the buckets (8 lines at a
    /// million flows).
    pub fn bump_generation(&mut self) {
        let old = self.generation;
        self.generation = if old == u16::MAX { 1 } else { old + 1 };
        self.stale = self.occupied() as u32;
        for _ in 0..self.buckets.len().div_ceil(SWEEP_ROUND) {
            let bucket = &mut self.buckets[self.sweep_at];
            // Entries written under `old` are stale now as well: nothing in the bucket is live.
            bucket.gens = [DEAD; LANES];
            self.sweep_at = self.next(self.sweep_at);
        }
    }

    fn occupied(&self) -> usize {
        self.records.len() - self.vacant.len()
    }

    /// Stage by stage; see the module documentation. `records` must not be empty.
    #[inline]
    fn lookup_staged<const N: usize>(&self, keys: &[FlowKey; N], found: &mut [Option<Slot>; N]) {
        let (buckets, records) = (&self.buckets[..], &self.records[..]);
        let hashes: [u64; N] = std::array::from_fn(|i| {
            let hash = self.seed.hash5(keys[i].words());
            prefetch_index(buckets, spread(hash, buckets.len()));
            hash
        });
        let mut candidates = [0u32; N];
        let mut hits = [0u8; N];
        for i in 0..N {
            let bucket = &buckets[spread(hashes[i], buckets.len())];
            let lanes = bucket.live_with(tag(hashes[i]), self.generation);
            let first = bucket.slots[lanes.trailing_zeros() as usize & (LANES - 1)];
            // Without a hit record 0 is read, whose line is warm; its key proves nothing.
            candidates[i] = first & u32::from(lanes != 0).wrapping_neg();
            hits[i] = lanes as u8;
            prefetch_index(records, candidates[i] as usize);
        }
        for i in 0..N {
            let same = records[candidates[i] as usize].key.same(&keys[i]);
            found[i] = if same & (hits[i] != 0) {
                Some(Slot::from_index(candidates[i]))
            } else {
                self.lookup_elsewhere(&keys[i], hashes[i], hits[i])
            };
        }
    }

    /// The answer for a key that is not in the first of the `hits` lanes of its home bucket.
    #[inline]
    fn lookup_elsewhere(&self, key: &FlowKey, hash: u64, hits: u8) -> Option<Slot> {
        let home = &self.buckets[spread(hash, self.buckets.len())];
        if hits.count_ones() < 2 && !home.is_full() {
            None
        } else {
            self.lookup(key)
        }
    }

    /// Where `key` is, stale or live. A stale twin never hides a live entry: there is at most one entry per key.
    fn find(&self, hash: u64, key: &FlowKey) -> Option<Place> {
        let tag = tag(hash);
        let mut at = spread(hash, self.buckets.len());
        loop {
            let bucket = &self.buckets[at];
            for lane in lanes_of(equal_lanes(&bucket.tags, tag)) {
                if self.records[bucket.slots[lane] as usize].key.same(key) {
                    return Some(Place { bucket: at, lane });
                }
            }
            if !bucket.is_full() {
                return None;
            }
            at = self.next(at);
        }
    }

    /// A stale entry in a bucket where an entry with this hash may sit.
    fn stale_on_path(&self, hash: u64) -> Option<Place> {
        if self.stale == 0 {
            return None;
        }
        let mut at = spread(hash, self.buckets.len());
        loop {
            let bucket = &self.buckets[at];
            if let Some(lane) = lanes_of(bucket.stale(self.generation)).next() {
                return Some(Place { bucket: at, lane });
            }
            if !bucket.is_full() {
                return None;
            }
            at = self.next(at);
        }
    }

    fn place_of(&self, slot: Slot) -> Option<Place> {
        let (key, _) = self.at(slot)?;
        let hash = self.seed.hash5(key.words());
        self.find(hash, key)
    }

    /// Puts a flow where another one is; the record is reused.
    fn overwrite(&mut self, place: Place, tag: u16, key: FlowKey, value: V) -> Inserted<V> {
        let bucket = &mut self.buckets[place.bucket];
        let slot = Slot::from_index(bucket.slots[place.lane]);
        let stale = bucket.gens[place.lane] != self.generation;
        bucket.tags[place.lane] = tag;
        bucket.gens[place.lane] = self.generation;
        self.stale -= u32::from(stale);
        let old = std::mem::replace(&mut self.records[slot.index() as usize], Record { key, value });
        Inserted {
            slot,
            evicted: Some(Evicted {
                slot,
                key: old.key,
                value: old.value,
                stale,
            }),
        }
    }

    /// Writes a record into a vacant slot; the caller has made sure that there is one.
    fn store(&mut self, key: FlowKey, value: V) -> Slot {
        let record = Record { key, value };
        let index = self.vacant.pop().unwrap_or_else(|| {
            self.records.push(record);
            self.records.len() as u32 - 1
        });
        self.records[index as usize] = record;
        Slot::from_index(index)
    }

    /// Enters a record into the first bucket with room. Half the lanes are empty at the limit, so there is one.
    fn link(&mut self, hash: u64, slot: Slot) {
        let mut at = spread(hash, self.buckets.len());
        while self.buckets[at].is_full() {
            at = self.next(at);
        }
        let bucket = &mut self.buckets[at];
        if let Some(lane) = lanes_of(equal_lanes(&bucket.tags, 0)).next() {
            bucket.tags[lane] = tag(hash);
            bucket.gens[lane] = self.generation;
            bucket.slots[lane] = slot.index();
        }
    }

    fn vacate(&mut self, place: Place) -> Evicted<V> {
        let bucket = &self.buckets[place.bucket];
        let (index, stale) = (
            bucket.slots[place.lane],
            bucket.gens[place.lane] != self.generation,
        );
        let was_full = bucket.is_full();
        self.clear_lane(place);
        if was_full {
            self.fill_hole(place);
        }
        self.stale -= u32::from(stale);
        self.vacant.push(index);
        let record = &mut self.records[index as usize];
        let key = std::mem::replace(&mut record.key, FlowKey::VACANT);
        Evicted {
            slot: Slot::from_index(index),
            key,
            value: record.value,
            stale,
        }
    }

    /// Keeps "nothing sits behind a bucket with room": pulls an overflowed entry into the hole, then mends the hole
    /// that this one leaves, until a bucket that was not full ends the run.
    fn fill_hole(&mut self, mut hole: Place) {
        let mut at = hole.bucket;
        loop {
            at = self.next(at);
            let was_full = self.buckets[at].is_full();
            if let Some(lane) = self.lane_overflowing(at, hole.bucket) {
                let from = Place { bucket: at, lane };
                self.move_entry(from, hole);
                hole = from;
            }
            if !was_full {
                return;
            }
        }
    }

    /// A lane of bucket `at` whose entry passed over bucket `over` on its way from home.
    fn lane_overflowing(&self, at: usize, over: usize) -> Option<usize> {
        let bucket = &self.buckets[at];
        lanes_of(bucket.occupied()).find(|&lane| {
            let key = &self.records[bucket.slots[lane] as usize].key;
            let home = spread(self.seed.hash5(key.words()), self.buckets.len());
            self.distance(home, at) >= self.distance(over, at)
        })
    }

    /// A stale entry is marked dead on the way: it may move behind the sweep of [`bump_generation`].
    ///
    /// [`bump_generation`]: Self::bump_generation
    fn move_entry(&mut self, from: Place, to: Place) {
        let source = &self.buckets[from.bucket];
        let (tag, written, slot) = (
            source.tags[from.lane],
            source.gens[from.lane],
            source.slots[from.lane],
        );
        let target = &mut self.buckets[to.bucket];
        target.tags[to.lane] = tag;
        target.gens[to.lane] = if written == self.generation { written } else { DEAD };
        target.slots[to.lane] = slot;
        self.clear_lane(from);
    }

    fn clear_lane(&mut self, place: Place) {
        let bucket = &mut self.buckets[place.bucket];
        bucket.tags[place.lane] = 0;
        bucket.gens[place.lane] = DEAD;
        bucket.slots[place.lane] = 0;
    }

    #[inline]
    fn next(&self, bucket: usize) -> usize {
        if bucket + 1 == self.buckets.len() {
            0
        } else {
            bucket + 1
        }
    }

    /// Buckets walked from `from` to `to`.
    fn distance(&self, from: usize, to: usize) -> usize {
        if to >= from {
            to - from
        } else {
            to + self.buckets.len() - from
        }
    }
}

impl<V> std::fmt::Debug for FlowTable<V> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FlowTable")
            .field("occupied", &(self.records.len() - self.vacant.len()))
            .field("stale", &self.stale)
            .field("limit", &self.limit)
            .field("generation", &self.generation)
            .finish_non_exhaustive()
    }
}

/// An empty lane has tag 0; its slot is 0, so that reading the record it names is harmless.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Bucket {
    tags: [u16; LANES],
    gens: [u16; LANES],
    slots: [u32; LANES],
}

impl Bucket {
    const EMPTY: Self = Self {
        tags: [0; LANES],
        gens: [DEAD; LANES],
        slots: [0; LANES],
    };

    #[inline(always)]
    fn occupied(&self) -> u32 {
        !equal_lanes(&self.tags, 0) & 0xff
    }

    #[inline(always)]
    fn is_full(&self) -> bool {
        equal_lanes(&self.tags, 0) == 0
    }

    /// Lanes with this tag and generation, both compared before the bits are gathered.
    #[inline(always)]
    fn live_with(&self, tag: u16, generation: u16) -> u32 {
        let bits: [u16; LANES] = std::array::from_fn(|i| {
            let equal = (self.tags[i] ^ tag) | (self.gens[i] ^ generation);
            if equal == 0 { 1 << i } else { 0 }
        });
        u32::from(bits.iter().fold(0, |all, bit| all | bit))
    }

    #[inline]
    fn live(&self, generation: u16) -> u32 {
        self.occupied() & equal_lanes(&self.gens, generation)
    }

    #[inline]
    fn stale(&self, generation: u16) -> u32 {
        self.occupied() & !equal_lanes(&self.gens, generation)
    }
}

/// Aligned to a cache line, so that key and value arrive together.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Record<V> {
    key: FlowKey,
    value: V,
}

#[derive(Clone, Copy)]
struct Place {
    bucket: usize,
    lane: usize,
}

/// One bit per lane that equals `x`. Kept in 16 bits per lane until the end, so that it becomes one vector comparison.
#[inline(always)]
fn equal_lanes(lanes: &[u16; LANES], x: u16) -> u32 {
    let bits: [u16; LANES] = std::array::from_fn(|i| if lanes[i] == x { 1 << i } else { 0 });
    u32::from(bits.iter().fold(0, |all, bit| all | bit))
}

/// The lanes whose bits are set, lowest first.
#[inline]
fn lanes_of(mut bits: u32) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let lane = bits.trailing_zeros() as usize;
        (bits != 0).then(|| {
            bits &= bits - 1;
            lane
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::key::FlowFields;
    use proptest::prelude::*;
    use std::collections::HashMap;

    type Value = u64;

    fn key(n: u32) -> FlowKey {
        FlowKey::new(&FlowFields {
            src_port: n as u16,
            dst_port: (n >> 16) as u16,
            proto: 6,
            ..FlowFields::default()
        })
    }

    fn table(limit: u32) -> FlowTable<Value> {
        FlowTable::new(limit, HashSeed::new(42)).unwrap()
    }

    /// Every entry findable, every counter true, nothing behind a bucket with room.
    fn check_shape(t: &FlowTable<Value>) {
        let occupied: u32 = t.buckets.iter().map(|b| b.occupied().count_ones()).sum();
        let live: u32 = t.buckets.iter().map(|b| b.live(t.generation).count_ones()).sum();
        assert_eq!(occupied as usize, t.occupied());
        assert_eq!(live as usize, t.len());
        assert_eq!(t.occupied_from(0).count(), t.occupied());
        for slot in t.occupied_from(0) {
            let place = t
                .place_of(slot)
                .expect("an occupied slot is reachable from its home bucket");
            assert_eq!(t.buckets[place.bucket].slots[place.lane], slot.index());
        }
    }

    #[derive(Clone, Debug)]
    enum Op {
        Insert(u32, Value),
        Remove(u32),
        RemoveSlot(u32),
        Change(u32, Value),
        Bump,
        Reclaim,
    }

    fn op() -> impl Strategy<Value = Op> {
        let n = 0u32..60;
        prop_oneof![
            8 => (n.clone(), any::<Value>()).prop_map(|(k, v)| Op::Insert(k, v)),
            4 => n.clone().prop_map(Op::Remove),
            2 => n.clone().prop_map(Op::RemoveSlot),
            2 => (n, any::<Value>()).prop_map(|(k, v)| Op::Change(k, v)),
            1 => Just(Op::Bump),
            1 => Just(Op::Reclaim),
        ]
    }

    proptest! {
        /// The limit is far below the number of keys and the buckets are few: overflow, wrap-around and full are daily.
        #[test]
        fn behaves_like_a_bounded_hash_map(seed in any::<u128>(), limit in 1u32..40, ops in proptest::collection::vec(op(), 1..300)) {
            let mut t: FlowTable<Value> = FlowTable::new(limit, HashSeed::new(seed)).unwrap();
            let mut live: HashMap<FlowKey, Value> = HashMap::new();
            let mut stale: HashMap<FlowKey, Value> = HashMap::new();
            for op in ops {
                match op {
                    Op::Insert(n, v) => match t.insert(key(n), v) {
                        Ok(Inserted { slot, evicted }) => {
                            prop_assert_eq!(t.at(slot), Some((&key(n), &v)));
                            let before = live.insert(key(n), v);
                            match evicted {
                                Some(e) if e.stale => prop_assert_eq!(stale.remove(&e.key), Some(e.value)),
                                Some(e) => { prop_assert_eq!(e.key, key(n)); prop_assert_eq!(before, Some(e.value)); }
                                None => prop_assert_eq!(before, None),
                            }
                        }
                        Err(full) => {
                            prop_assert_eq!(full, TableFull { used: limit, limit });
                            prop_assert_eq!(live.len(), limit as usize);
                            prop_assert!(!live.contains_key(&key(n)));
                        }
                    },
                    Op::Remove(n) => prop_assert_eq!(t.remove(&key(n)), live.remove(&key(n))),
                    Op::RemoveSlot(index) => {
                        let slot = Slot::from_index(index);
                        let was_stale = t.is_stale(slot);
                        if let Some(e) = t.remove_slot(slot) {
                            prop_assert_eq!(e.stale, was_stale);
                            let model = if e.stale { &mut stale } else { &mut live };
                            prop_assert_eq!(model.remove(&e.key), Some(e.value));
                        }
                    }
                    Op::Change(n, v) => {
                        prop_assert_eq!(t.get_mut(&key(n)).map(|old| std::mem::replace(old, v)), live.get_mut(&key(n)).map(|old| std::mem::replace(old, v)));
                    }
                    Op::Bump => { t.bump_generation(); stale.extend(live.drain()); }
                    Op::Reclaim => match t.reclaim_one() {
                        Some(e) => { prop_assert!(e.stale); prop_assert_eq!(stale.remove(&e.key), Some(e.value)); }
                        None => prop_assert!(stale.is_empty()),
                    },
                }
                check_shape(&t);
                prop_assert_eq!((t.len(), t.stale()), (live.len(), stale.len()));
            }
            let keys: Vec<_> = (0..70).map(key).collect();
            let mut found = vec![None; keys.len()];
            t.lookup_batch(&keys, &mut found);
            for (key, slot) in keys.iter().zip(found) {
                prop_assert_eq!(slot, t.lookup(key));
                prop_assert_eq!(slot.and_then(|s| t.at(s)), live.get_key_value(key));
            }
            let listed: HashMap<_, _> = t.iter().map(|(_, k, v)| (*k, *v)).collect();
            prop_assert_eq!(listed, live);
        }
    }

    #[test]
    fn a_bucket_and_a_record_are_one_cache_line() {
        assert_eq!((size_of::<Bucket>(), align_of::<Bucket>()), (64, 64));
        assert_eq!(
            (size_of::<Record<[u64; 3]>>(), align_of::<Record<[u64; 3]>>()),
            (64, 64)
        );
        assert_eq!(size_of::<Option<Slot>>(), 4);
    }

    #[test]
    fn fills_to_the_limit_and_says_so() {
        let mut t = table(1000);
        for n in 0..1000 {
            t.insert(key(n), n.into()).unwrap();
        }
        let full = t.insert(key(1000), 0).unwrap_err();
        assert_eq!(full.to_string(), "flow table full: 1000 of 1000 flows in use");
        assert_eq!(
            t.insert(key(7), 70).unwrap().evicted.map(|e| e.value),
            Some(7),
            "replacing needs no room"
        );
        assert_eq!(t.remove(&key(7)), Some(70));
        t.insert(key(1000), 1).unwrap();
        check_shape(&t);
        assert!(
            t.memory_bytes() / t.len() <= 96,
            "{} octets per flow",
            t.memory_bytes() / t.len()
        );
    }

    #[test]
    fn a_full_table_of_stale_flows_takes_new_ones() {
        let mut t = table(1000);
        for n in 0..1000 {
            t.insert(key(n), 0).unwrap();
        }
        t.bump_generation();
        assert_eq!((t.len(), t.stale()), (0, 1000));
        for n in 1000..2000 {
            assert!(t.insert(key(n), 1).unwrap().evicted.is_some_and(|e| e.stale));
        }
        assert_eq!((t.len(), t.stale()), (1000, 0));
        assert!(t.insert(key(3000), 1).is_err());
        check_shape(&t);
    }

    /// 16 bits come round; an entry written long ago must not come alive again.
    #[test]
    fn generations_wrap_without_reviving_a_flow() {
        let mut t = table(200);
        for n in 0..200 {
            t.insert(key(n), 0).unwrap();
        }
        for round in 0..200_000u32 {
            t.bump_generation();
            assert_eq!(t.len(), 0);
            if round % 1009 == 0 {
                // Churn, so that entries move between buckets while the sweep goes round.
                t.insert(key(1000 + round), 1).unwrap();
                t.remove(&key(1000 + round)).unwrap();
                assert!(
                    (0..200).all(|n| t.get(&key(n)).is_none()),
                    "a flow came back in round {round}"
                );
            }
        }
        check_shape(&t);
    }

    #[test]
    fn impossible_limits_are_refused() {
        let refused = |limit| FlowTable::<Value>::new(limit, HashSeed::new(0)).unwrap_err();
        assert_eq!(
            refused(0).to_string(),
            "flow table limit 0 is not in 1..=1073741824"
        );
        assert!(matches!(
            refused(u32::MAX),
            TableError::Limit { asked: u32::MAX, .. }
        ));
    }

    #[test]
    fn a_stale_flow_in_the_first_record_is_a_miss_in_a_batch() {
        let mut t = table(8);
        t.insert(key(0), 0).unwrap();
        t.bump_generation();
        let mut found = [None];
        t.lookup_batch(&[key(0)], &mut found);
        assert_eq!(found, [None]);
    }

    #[test]
    fn batches_of_any_length_and_an_empty_table() {
        let mut t = table(500);
        let keys: Vec<_> = (0..100).map(key).collect();
        let mut found = vec![Some(Slot::from_index(3)); 100];
        t.lookup_batch(&keys, &mut found);
        assert!(found.iter().all(Option::is_none));
        for key in &keys {
            t.insert(*key, 1).unwrap();
        }
        for n in [0, 1, 31, 32, 33, 100] {
            let mut found = vec![None; n];
            t.lookup_batch(&keys[..n], &mut found);
            assert!(found.iter().all(Option::is_some));
        }
    }
}
