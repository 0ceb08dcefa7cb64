//! The flow engine's tables: what the dataplane's `lookup` and `classify` stages read, and what they write back.
//!
//! Nothing here does I/O, reads a clock, takes a lock or allocates on the packet path. Every table is a plain
//! value with one writer: the worker thread that owns it. Time comes in as a [`Tick`].
//!
//! # The map
//!
//! ```text
//!  parse ──► FlowKey ──► FlowTable::lookup_batch ── hit ──► value: rule, last_seen, packets, bytes ──► act
//!              │                  │ miss
//!              │                  ▼
//!              └─► WideKey ─► Classifier::lookup (one per group) ── rule, cacheable? ──► act
//!                                 │ cacheable
//!                                 ▼
//!                          FlowTable::insert ─► IdleWheel::arm
//!
//!  between batches:  rules change  ─► Classifier (edited in place, or a new value swapped in)
//!                                  ─► FlowTable::bump_generation (every cached answer becomes a miss)
//!                    time passes   ─► IdleWheel::advance ─► FlowTable::remove_slot
//!                    someone asks  ─► RuleCounters::snapshot
//! ```
//!
//! | file | what it owns |
//! |---|---|
//! | `key` | [`FlowKey`] (40 octets), [`WideKey`] and [`WideMask`] (64 octets), their bit layout |
//! | `matching` | [`Match`]: mask and key built field by field; ranges and prefixes as masks |
//! | `hash` | the keyed hash of both tables |
//! | `table` | [`FlowTable`]: exact match, bounded, generations |
//! | `tuple` | one mask of the classifier: its rules and their tags |
//! | `classifier` | [`Classifier`]: tuple space search over at most N masks, with priorities |
//! | `wheel` | [`Tick`], [`IdleWheel`]: idle ageing by slot |
//! | `counters` | [`RuleCounters`]: packets and octets by rule |
//!
//! # Why a packet never sees half a rule set
//!
//! A stage borrows the tables for the length of a batch. Rule updates need `&mut Classifier`, so they happen between
//! two batches or not at all; a large change builds a second [`Classifier`] on another thread and moves it in. The
//! update ends with [`FlowTable::bump_generation`], so that no answer of the old set outlives it in the cache.
//!
//! # Why not a concurrent map
//!
//! Flows are pinned to workers. A shared map would pay for coherence on every packet to save memory that is bounded
//! anyway; per-worker tables with one writer need no atomics at all.

#![forbid(unsafe_code)]

mod classifier;
mod counters;
mod hash;
mod key;
mod matching;
mod table;
mod tuple;
mod wheel;

pub use classifier::{Classifier, ClassifierError, ClassifierLimits, Lookup, Rule};
pub use counters::{RuleCount, RuleCounters};
pub use hash::HashSeed;
pub use key::{FlowFields, FlowFlags, FlowKey, WideFields, WideKey, WideMask, Zone, mapped};
pub use matching::{Match, MatchError, PortMask, range_to_masks};
pub use table::{Evicted, FlowTable, Inserted, Slot, TableError, TableFull};
pub use wheel::{Idle, IdleWheel, Progress, Tick};

/// A rule's dense index: where its counters are, and what a cached flow points to.
///
/// Whoever keeps the rules hands indices out, small ones first; an index may be used again once its rule is gone and
/// [`FlowTable::bump_generation`] has run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RuleIndex(pub u32);
