//! How much of a cluster's load each priority takes: a pure function of how many endpoints of each are healthy.
//!
//! Envoy's rules: a priority is as available as its share of healthy endpoints, times the overprovisioning factor, up to 100 %. Load goes to
//! the first priorities as far as they are available; what is left goes to degraded endpoints in the same way. Where the cluster
//! as a whole is not available and a priority has too few healthy endpoints, that one panics: it serves by all it has. Where all panic, load
//! follows the number of endpoints.

/// What stands in one priority.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Standing {
    /// Endpoints, those that are draining too.
    pub all: u64,
    /// Endpoints that count: those that are not draining.
    pub hosts: u64,
    /// Healthy ones.
    pub healthy: u64,
    /// Degraded ones.
    pub degraded: u64,
    /// What availability is counted in: endpoints or their weights. All, healthy, degraded.
    pub measure: [u64; 3],
}

/// Percents of the load; they sum up to 100, or to 0 where there is no endpoint at all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Load {
    /// Of the healthy endpoints of each priority.
    pub healthy: Vec<u32>,
    /// Of the degraded ones.
    pub degraded: Vec<u32>,
    /// Priorities that serve by all they have.
    pub panics: Vec<bool>,
}

impl Load {
    /// The load of priorities that stand so. `overprovisioning` and `panic_below` are percents.
    pub fn of(standings: &[Standing], overprovisioning: u32, panic_below: u32) -> Self {
        let available = |part: usize| -> Vec<u32> {
            let one = |s: &Standing| match s.measure[0] {
                0 => 0,
                all => (u64::from(overprovisioning) * s.measure[part] / all).min(100) as u32,
            };
            standings.iter().map(one).collect()
        };
        let (healthy, degraded) = (available(1), available(2));
        let whole = healthy.iter().chain(&degraded).sum::<u32>().min(100);
        let mut load = Self {
            healthy: vec![0; standings.len()],
            degraded: vec![0; standings.len()],
            panics: vec![false; standings.len()],
        };
        if whole > 0 {
            load.share_out(&healthy, &degraded, whole);
        } else if panic_below == 0 {
            // Nothing will be found there; somebody has to be asked.
            if let Some(first) = load.healthy.first_mut() {
                *first = 100;
            }
            return load;
        }
        if whole < 100 {
            for (panics, standing) in load.panics.iter_mut().zip(standings) {
                *panics = standing.has_too_few(panic_below);
            }
            if load.panics.iter().all(|panics| *panics) {
                load.by_number(standings);
            }
        }
        load
    }

    fn share_out(&mut self, healthy: &[u32], degraded: &[u32], whole: u32) {
        let mut left = 100;
        for (shares, available) in [(&mut self.healthy, healthy), (&mut self.degraded, degraded)] {
            for (share, available) in shares.iter_mut().zip(available) {
                *share = left.min(available * 100 / whole);
                left -= *share;
            }
        }
        // What rounding leaves goes to the first that takes anything.
        let first = |available: &[u32]| available.iter().position(|a| *a > 0);
        if let Some(at) = first(healthy) {
            self.healthy[at] += left;
        } else if let Some(at) = first(degraded) {
            self.degraded[at] += left;
        }
    }

    fn by_number(&mut self, standings: &[Standing]) {
        let all: u64 = standings.iter().map(|s| s.all).sum();
        if all == 0 {
            return;
        }
        let mut left = 100;
        for (at, standing) in standings.iter().enumerate() {
            self.degraded[at] = 0;
            self.healthy[at] = (100 * standing.all / all) as u32;
            left -= self.healthy[at];
        }
        if let Some(at) = standings.iter().position(|s| s.all > 0) {
            self.healthy[at] += left;
        }
    }
}

impl Standing {
    fn has_too_few(&self, panic_below: u32) -> bool {
        let working = 100.0 * (self.healthy + self.degraded) as f64;
        let percent = if self.hosts == 0 {
            0.0
        } else {
            working / self.hosts as f64
        };
        percent < f64::from(panic_below)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn standing((hosts, healthy, degraded): (u64, u64, u64)) -> Standing {
        Standing {
            all: hosts,
            hosts,
            healthy,
            degraded,
            measure: [hosts, healthy, degraded],
        }
    }

    fn load(standings: &[(u64, u64, u64)], panic_below: u32) -> (Vec<u32>, Vec<u32>, Vec<bool>) {
        let standings: Vec<_> = standings.iter().map(|s| standing(*s)).collect();
        let load = Load::of(&standings, 140, panic_below);
        (load.healthy, load.degraded, load.panics)
    }

    #[test]
    fn envoys_table_of_priority_levels() {
        // The documentation's: healthy percent of P=0 and P=1, traffic of each.
        for ((p0, p1), (t0, t1)) in [
            ((100, 100), (100, 0)),
            ((72, 72), (100, 0)),
            ((71, 71), (99, 1)),
            ((50, 50), (70, 30)),
            ((25, 100), (35, 65)),
            ((25, 25), (50, 50)),
        ] {
            let found = load(&[(100, p0, 0), (100, p1, 0)], 0);
            assert_eq!(found.0, [t0, t1], "{p0} {p1}");
            assert_eq!(found.1, [0, 0]);
        }
    }

    #[test]
    fn degraded_endpoints_take_what_the_healthy_leave() {
        assert_eq!(load(&[(4, 1, 3)], 0), (vec![35], vec![65], vec![false]));
        assert_eq!(load(&[(4, 0, 4)], 50), (vec![0], vec![100], vec![false]));
        assert_eq!(load(&[(4, 4, 0), (4, 0, 4)], 50).0, [100, 0]);
    }

    #[test]
    fn too_few_healthy_endpoints_are_a_panic_only_where_nothing_makes_up_for_them() {
        assert_eq!(load(&[(4, 1, 0)], 50), (vec![100], vec![0], vec![true]));
        assert_eq!(load(&[(4, 2, 0)], 50).2, [false]);
        assert_eq!(load(&[(4, 1, 0), (4, 4, 0)], 50).2, [false, false]);
        assert_eq!(
            load(&[(6, 1, 0), (4, 1, 0)], 50),
            (vec![60, 40], vec![0, 0], vec![true, true])
        );
        assert_eq!(load(&[(6, 1, 0), (4, 2, 0)], 50).2, [true, false]);
    }

    #[test]
    fn nothing_at_all_is_no_load_and_nothing_healthy_is_nobodys() {
        assert_eq!(load(&[(0, 0, 0)], 50), (vec![0], vec![0], vec![true]));
        assert_eq!(load(&[(2, 0, 0)], 0), (vec![100], vec![0], vec![false]));
    }
}
