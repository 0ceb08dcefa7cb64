//! Histograms, and Envoy's buckets and quantiles of them.
//!
//! Values are kept as Envoy keeps them: by their two leading digits. So quantiles and bucket counts come out the same.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::stats::Shard;

/// Upper bounds, inclusive.
pub const BOUNDS: [f64; 19] = [
    0.5,
    1.0,
    5.0,
    10.0,
    25.0,
    50.0,
    100.0,
    250.0,
    500.0,
    1000.0,
    2500.0,
    5000.0,
    10_000.0,
    30_000.0,
    60_000.0,
    300_000.0,
    600_000.0,
    1_800_000.0,
    3_600_000.0,
];

/// The same as `le` has them, and what is beyond.
pub const LABELS: [&str; 20] = [
    "0.5", "1", "5", "10", "25", "50", "100", "250", "500", "1000", "2500", "5000", "10000", "30000",
    "60000", "300000", "600000", "1800000", "3600000", "+Inf",
];

/// What Envoy says of each histogram.
pub const QUANTILES: [f64; 10] = [0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.995, 0.999, 1.0];

/// 0 to 9, then ninety bins for each number of digits up to nine; longer values count as the longest.
const BINS: usize = 10 + 8 * 90;

/// The bucket of a value, `BOUNDS.len()` for what is beyond all.
#[inline]
pub fn bucket(value: u64) -> usize {
    let value = value as f64;
    BOUNDS.partition_point(|bound| *bound < value)
}

fn bin(value: u64) -> usize {
    let (mut lead, mut digits) = (value.min(999_999_999), 2);
    if lead < 10 {
        return usize::try_from(lead).unwrap_or_default();
    }
    while lead >= 100 {
        lead /= 10;
        digits += 1;
    }
    10 + (digits - 2) * 90 + usize::try_from(lead).unwrap_or_default() - 10
}

/// Where a bin begins and how wide it is.
fn span(bin: usize) -> (f64, f64) {
    if bin < 10 {
        let small = u32::try_from(bin).unwrap_or_default();
        return (f64::from(small), if bin == 0 { 0.0 } else { 0.1 });
    }
    let lead = u32::try_from((bin - 10) % 90 + 10).unwrap_or_default();
    let width = (0..(bin - 10) / 90).fold(1.0, |width, _| width * 10.0);
    (f64::from(lead) * width, width)
}

/// One histogram. A shard's memory is taken with its first value.
#[derive(Debug)]
pub struct Histogram {
    shards: Box<[OnceLock<Box<[AtomicU64]>>]>,
}

impl Histogram {
    /// With so many shards.
    pub fn new(shards: usize) -> Self {
        Self {
            shards: (0..shards).map(|_| OnceLock::new()).collect(),
        }
    }

    /// Notes a value. One writer per shard.
    pub fn record(&self, shard: Shard, value: u64) {
        let make = || (0..=BINS).map(|_| AtomicU64::new(0)).collect();
        let cells = self.shards[shard.0].get_or_init(make);
        // The sum is beside the bins of small values: a time in milliseconds touches one cache line.
        for (cell, by) in [(1 + bin(value), 1), (0, value)] {
            let cell = &cells[cell];
            cell.store(cell.load(Relaxed).wrapping_add(by), Relaxed);
        }
    }

    /// What it has seen so far.
    pub fn seen(&self) -> Seen {
        let used = self.shards.iter().filter_map(OnceLock::get);
        let (mut sum, mut bins) = (0, vec![0; BINS]);
        for shard in used {
            for (all, cell) in std::iter::once(&mut sum).chain(&mut bins).zip(shard) {
                *all += cell.load(Relaxed);
            }
        }
        Seen { bins, sum }
    }
}

/// What a histogram has seen.
#[derive(Debug, Clone)]
pub struct Seen {
    bins: Vec<u64>,
    sum: u64,
}

impl Seen {
    /// How many values.
    pub fn count(&self) -> u64 {
        self.bins.iter().sum()
    }

    /// Their sum.
    pub fn sum(&self) -> u64 {
        self.sum
    }

    /// How many of them are in each bucket or one before it, and how many there are. As in Envoy a value on a bound is not below it.
    pub fn buckets(&self) -> [u64; 20] {
        let mut counts = [self.count(); 20];
        for (count, bound) in counts.iter_mut().zip(BOUNDS) {
            let below = self
                .bins
                .iter()
                .enumerate()
                .filter(|(bin, _)| span(*bin).0 < bound);
            *count = below.map(|(_, n)| n).sum();
        }
        counts
    }

    /// The values of [`QUANTILES`]; none without values.
    pub fn quantiles(&self) -> Option<[f64; 10]> {
        let float = |n: u64| n as f64;
        let count = float(self.count());
        if count == 0.0 {
            return None;
        }
        let used: Vec<(usize, u64)> = (0..)
            .zip(self.bins.iter().copied())
            .filter(|(_, n)| *n > 0)
            .collect();
        Some(QUANTILES.map(|quantile| {
            let wanted = count * quantile;
            let mut before = 0.0;
            let mut value = 0.0;
            for (bin, n) in &used {
                let (begin, width) = span(*bin);
                let n = float(*n);
                value = begin + width * ((wanted - before) / n).clamp(0.0, 1.0);
                if before + n >= wanted {
                    break;
                }
                before += n;
            }
            value
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_belongs_to_its_bucket() {
        for (value, index) in [
            (0, 0),
            (1, 1),
            (2, 2),
            (5, 2),
            (6, 3),
            (3_600_000, 18),
            (3_600_001, 19),
            (u64::MAX, 19),
        ] {
            assert_eq!(bucket(value), index, "{value}");
        }
        for (bound, label) in BOUNDS.iter().zip(LABELS) {
            assert_eq!(bound.to_string(), label);
        }
    }

    #[test]
    fn a_value_is_in_its_bin() {
        for value in (0..2000).chain([12_345, 99_999, 100_000, 999_999_999]) {
            let (begin, width) = span(bin(value));
            let exact = f64::from(u32::try_from(value).unwrap());
            assert!(
                begin <= exact && (exact < begin + width || width == 0.0),
                "{value}"
            );
        }
        assert_eq!(bin(999_999_999), BINS - 1);
        assert_eq!(bin(u64::MAX), BINS - 1);
    }

    #[test]
    fn quantiles_lie_between_the_ends_of_their_bins() {
        let histogram = Histogram::new(2);
        assert_eq!(histogram.seen().quantiles(), None);
        histogram.record(Shard(0), 1);
        histogram.record(Shard(1), 40);
        let seen = histogram.seen();
        assert_eq!((seen.count(), seen.sum()), (2, 41));
        let [p0, _, p50, p75, .., p100] = seen.quantiles().unwrap();
        assert_eq!((p0, p50, p75, p100), (1.0, 1.1, 40.5, 41.0));
    }
}
