//! [`RuleCounters`]: packets and octets by rule, plain integers of the one worker that counts.
//!
//! Octets are counted as the frame was received, Ethernet header included, FCS excluded; how many packets a
//! super-frame stands for is the caller's to say. Several workers' counters are added up by whoever reads the snapshots.

#![forbid(unsafe_code)]

use super::RuleIndex;
use super::wheel::Tick;

/// What one rule has counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RuleCount {
    /// Frames.
    pub packets: u64,
    /// Octets, with the Ethernet header, without FCS.
    pub octets: u64,
    /// When counting began: a reader that sees another value than last time must not subtract.
    pub since: Tick,
    /// When it counted last; `None` before the first time.
    pub last_hit: Option<Tick>,
}

/// Counters of rules 0..n, sized outside the packet path.
///
/// ```
/// use dpumesh_hw::flow::{RuleCounters, RuleIndex, Tick};
/// let mut counters = RuleCounters::default();
/// counters.open(RuleIndex(2), Tick(10));
/// counters.add(RuleIndex(2), 1, 64, Tick(11));
/// assert_eq!(counters.get(RuleIndex(2)).map(|c| (c.packets, c.octets)), Some((1, 64)));
/// assert_eq!(counters.close(RuleIndex(2)).map(|c| c.octets), Some(64));
/// assert_eq!(counters.get(RuleIndex(2)), None);
/// ```
#[derive(Clone, Debug, Default)]
pub struct RuleCounters {
    counts: Vec<Option<RuleCount>>,
    uncounted: u64,
}

impl RuleCounters {
    /// Starts `rule` at zero, making room if needed (may allocate: not for the packet path). An open counter starts
    /// anew.
    pub fn open(&mut self, rule: RuleIndex, now: Tick) {
        let index = rule.0 as usize;
        if index >= self.counts.len() {
            self.counts.resize(index + 1, None);
        }
        self.counts[index] = Some(RuleCount {
            since: now,
            ..RuleCount::default()
        });
    }

    /// Ends `rule` and returns its last value; `None` if it was not open.
    pub fn close(&mut self, rule: RuleIndex) -> Option<RuleCount> {
        self.counts.get_mut(rule.0 as usize)?.take()
    }

    /// Counts, at `now`. Sums saturate. A rule that is not open is not counted, which [`uncounted`](Self::uncounted) tells.
    #[inline]
    pub fn add(&mut self, rule: RuleIndex, packets: u64, octets: u64, now: Tick) {
        match self.counts.get_mut(rule.0 as usize) {
            Some(Some(count)) => {
                count.packets = count.packets.saturating_add(packets);
                count.octets = count.octets.saturating_add(octets);
                count.last_hit = Some(now);
            }
            _ => self.uncounted = self.uncounted.saturating_add(packets),
        }
    }

    /// What `rule` has counted; `None` if it is not open.
    pub fn get(&self, rule: RuleIndex) -> Option<RuleCount> {
        *self.counts.get(rule.0 as usize)?
    }

    /// Packets counted for rules that were not open.
    pub fn uncounted(&self) -> u64 {
        self.uncounted
    }

    /// Copies every open counter out, ordered by rule, into a buffer that is cleared first and can be used again.
    pub fn snapshot(&self, into: &mut Vec<(RuleIndex, RuleCount)>) {
        into.clear();
        into.extend(
            (0..)
                .zip(&self.counts)
                .filter_map(|(n, count)| Some((RuleIndex(n), (*count)?))),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_by_rule_and_lists_the_open_ones() {
        let mut counters = RuleCounters::default();
        counters.open(RuleIndex(3), Tick(1));
        counters.open(RuleIndex(0), Tick(2));
        counters.add(RuleIndex(3), 2, 3000, Tick(7));
        counters.add(RuleIndex(3), 1, 64, Tick(7));
        counters.add(RuleIndex(1), 5, 100, Tick(7));
        counters.add(RuleIndex(99), 1, 100, Tick(7));
        let mut list = vec![(RuleIndex(7), RuleCount::default())];
        counters.snapshot(&mut list);
        let expected = [
            (
                RuleIndex(0),
                RuleCount {
                    packets: 0,
                    octets: 0,
                    since: Tick(2),
                    last_hit: None,
                },
            ),
            (
                RuleIndex(3),
                RuleCount {
                    packets: 3,
                    octets: 3064,
                    since: Tick(1),
                    last_hit: Some(Tick(7)),
                },
            ),
        ];
        assert_eq!(list, expected);
        assert_eq!(counters.uncounted(), 6);
    }

    #[test]
    fn a_reused_index_starts_at_zero_with_a_new_beginning() {
        let mut counters = RuleCounters::default();
        counters.open(RuleIndex(0), Tick(1));
        counters.add(RuleIndex(0), u64::MAX, 1, Tick(7));
        counters.add(RuleIndex(0), 1, 1, Tick(7));
        let last = counters.close(RuleIndex(0)).unwrap();
        assert_eq!((last.packets, last.octets), (u64::MAX, 2));
        assert_eq!(counters.close(RuleIndex(0)), None);
        counters.open(RuleIndex(0), Tick(9));
        assert_eq!(
            counters.get(RuleIndex(0)),
            Some(RuleCount {
                since: Tick(9),
                ..RuleCount::default()
            })
        );
    }
}
