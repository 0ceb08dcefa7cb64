//! Turns by weight: the order in which entries of a list are taken, so that each has its share and none waits longer than it must.

/// Bound on the steps of one round, so that odd weights cost little memory.
pub const LONGEST: usize = 1000;

/// The order of a smooth weighted round robin over `entries` (what to take, and its weight, at least 1); weights are scaled down to at most
/// [`LONGEST`] steps in all.
pub fn schedule(entries: &[(u32, u64)]) -> Vec<u32> {
    if entries.is_empty() {
        return Vec::new();
    }
    let divisor = entries.iter().fold(0, |d, (_, w)| gcd(d, *w)).max(1);
    let sum: u64 = entries.iter().map(|(_, w)| w / divisor).sum();
    let bound = (LONGEST as u64).max(entries.len() as u64);
    let scale = |w: u64| {
        if sum <= bound {
            w / divisor
        } else {
            (w / divisor * bound / sum).max(1)
        }
    };
    let weights: Vec<(u32, u64)> = entries.iter().map(|(i, w)| (*i, scale(*w))).collect();
    if weights.iter().all(|(_, w)| *w == 1) {
        return weights.iter().map(|(index, _)| *index).collect();
    }
    smooth(&weights)
}

/// Earliest deadline first: entry `i` of weight `w` takes its k-th turn at time `(k + ½) / w`.
fn smooth(weights: &[(u32, u64)]) -> Vec<u32> {
    let mut turns: Vec<(f64, u32)> = Vec::new();
    for (index, weight) in weights {
        for turn in 0..*weight {
            turns.push(((turn as f64 + 0.5) / *weight as f64, *index));
        }
    }
    turns.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    turns.into_iter().map(|(_, index)| index).collect()
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(weights: &[u64]) -> Vec<u32> {
        let entries: Vec<_> = (0..).zip(weights.iter().copied()).collect();
        schedule(&entries)
    }

    #[test]
    fn a_schedule_follows_the_weights_and_mixes_them() {
        assert_eq!(of(&[1, 1, 1]), [0, 1, 2]);
        assert_eq!(of(&[5, 5]), [0, 1]);
        assert_eq!(of(&[2, 1]).len(), 3);
        let nine = of(&[90, 10]);
        assert_eq!(nine.iter().filter(|i| **i == 1).count(), 1);
        assert_eq!(nine.len(), 10);
        assert!(of(&[]).is_empty());
    }

    #[test]
    fn odd_weights_stay_within_bounds() {
        let long = of(&[999_983, 1, 500_009]);
        assert!(long.len() <= LONGEST + 3);
        assert!(long.contains(&1));
    }
}
