//! Envoy's default buckets of histograms.

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

/// The bucket of a value, `BOUNDS.len()` for what is beyond all.
#[inline]
pub fn bucket(value: u64) -> usize {
    #[expect(clippy::cast_precision_loss, reason = "bounds are far below 2^52")]
    let value = value as f64;
    BOUNDS.partition_point(|bound| *bound < value)
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
}
