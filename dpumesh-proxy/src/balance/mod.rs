//! Which endpoint a request goes to.
//!
//! ```text
//! hash or chance ─► priority, healthy or degraded ─► locality ─► endpoint
//! ```
//! A [`Picker`] is made of a cluster's endpoints for one state of their health and never changes. When health does, the control thread makes
//! another and puts it into the cluster's [`Current`]; a worker notices by one relaxed load per request and takes it up. So that no
//! worker counts for another, whose turn it is (the [`Turns`]) is each worker's own, as are the requests that it has at an endpoint.
//! `levels` are the priorities of a set of endpoints: [`load`] says what share each takes, [`mod@schedule`] orders turns by weight,
//! [`hash`] has rings and tables.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;

use self::levels::Levels;
use self::subset::{Criteria, Subsets};
use crate::config::model::{Balance, Endpoint};
use crate::health::Health;

pub mod hash;
mod levels;
pub mod load;
pub mod policy;
pub mod schedule;
pub mod subset;

/// How a cluster spreads its requests.
#[derive(Debug, Clone)]
pub struct Spread {
    /// How an endpoint is picked of those that come into question.
    pub balance: Balance,
    /// A priority with a smaller percent of working endpoints may serve by all it has (`healthy_panic_threshold`).
    pub panic_below: u32,
    /// A priority that has 100 % / this of its endpoints healthy is fully available; percent.
    pub overprovisioning: u32,
    /// Availability is counted in weights instead of endpoints.
    pub weighted_availability: bool,
    /// Localities take shares by their weights.
    pub by_locality: bool,
    /// Localities; endpoints say which is theirs.
    pub localities: Vec<Locality>,
    /// Sets of endpoints by their metadata.
    pub subsets: Option<Arc<subset::Config>>,
    /// New endpoints take their share little by little.
    pub slow_start: Option<SlowStart>,
}

/// `SlowStartConfig`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SlowStart {
    /// An endpoint is new for so long.
    pub window: Duration,
    /// 1 is a linear increase, more is a faster one at first.
    pub aggression: f64,
    /// Its share begins with this part of the weight.
    pub least: f64,
}

impl SlowStart {
    /// The part of its weight that an endpoint has, if it is new and healthy.
    fn part(&self, endpoint: &Endpoint, now: Instant) -> Option<f64> {
        let age = endpoint.state.age(now);
        if age >= self.window || endpoint.health() != Health::Healthy {
            return None;
        }
        let time = age.max(Duration::from_millis(1)).as_secs_f64() / self.window.as_secs_f64();
        Some(time.powf(1.0 / self.aggression).max(self.least))
    }
}

impl Spread {
    /// Whether any endpoint is new: then its share grows with time.
    pub fn is_warming(&self, endpoints: &[Endpoint], now: Instant) -> bool {
        let slow = self.slow_start.as_ref();
        slow.is_some_and(|slow| endpoints.iter().any(|e| slow.part(e, now).is_some()))
    }
}

/// A locality within a priority.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Locality {
    /// 0 is asked first.
    pub priority: u32,
    /// Its share among those of its priority.
    pub weight: u32,
    /// `region/zone/sub_zone`.
    pub name: [String; 3],
}

/// What one request asks for.
#[derive(Debug, Clone, Copy)]
pub struct Ask<'a> {
    /// The address the client meant.
    pub original: SocketAddr,
    /// What consistent hashing goes by; none is chance.
    pub hash: Option<u64>,
    /// How many endpoints have been turned down.
    pub attempt: u32,
    /// Which endpoints come into question.
    pub subset: Option<&'a Criteria>,
    /// Priorities that were tried in vain; they are asked again only where no other has anything to serve by.
    pub tried: &'a [u32],
}

impl Ask<'_> {
    /// Whatever comes; `original` is the address the client meant.
    pub fn any(original: SocketAddr) -> Self {
        Self {
            original,
            hash: None,
            attempt: 0,
            subset: None,
            tried: &[],
        }
    }
}

/// What was picked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pick {
    /// Which of the cluster's endpoints.
    pub endpoint: usize,
    /// It was picked out of all, healthy or not.
    pub panics: bool,
    /// How the request's subset was found.
    pub subset: subset::Found,
}

/// The picker in force.
#[derive(Debug)]
pub struct Current {
    picker: ArcSwap<Picker>,
    turn: AtomicU64,
}

impl Current {
    /// With its first picker.
    pub fn new(picker: Picker) -> Self {
        Self {
            picker: ArcSwap::from_pointee(picker),
            turn: AtomicU64::new(0),
        }
    }

    /// Puts another in force.
    pub fn set(&self, picker: Picker) {
        self.picker.store(Arc::new(picker));
        self.turn.fetch_add(1, Ordering::Release);
    }

    /// Counts the pickers.
    #[inline]
    pub fn turn(&self) -> u64 {
        self.turn.load(Ordering::Relaxed)
    }

    /// The picker and its number, or an earlier number.
    pub fn load(&self) -> (u64, Arc<Picker>) {
        let turn = self.turn.load(Ordering::Acquire);
        (turn, self.picker.load_full())
    }
}

/// Whose turn it is in each list of a picker. A worker's own.
#[derive(Debug, Default)]
pub struct Turns(Vec<usize>);

impl Turns {
    /// For `picker`, going on from where `before` was.
    pub fn new(picker: &Picker, before: Option<&Self>) -> Self {
        let first = before.and_then(|b| b.0.first().copied());
        let all = (0..picker.turns).map(|at| match (at, first) {
            (0, Some(first)) => first,
            _ => fastrand::usize(..),
        });
        Self(all.collect())
    }

    fn next(&mut self, at: usize) -> usize {
        let turn = self.0[at];
        self.0[at] = turn.wrapping_add(1);
        turn
    }
}

/// A worker's hold on a cluster's picker: the one in force, and whose turn it is.
#[derive(Debug)]
pub struct Held {
    turn: u64,
    picker: Arc<Picker>,
    turns: Turns,
}

impl Held {
    /// Of `current`, going on from where `before` was.
    pub fn new(current: &Current, before: Option<&Self>) -> Self {
        let (turn, picker) = current.load();
        let turns = Turns::new(&picker, before.map(|b| &b.turns));
        Self { turn, picker, turns }
    }

    /// Picks by what is in force.
    pub fn pick(&mut self, current: &Current, ask: &Ask<'_>, busy: impl Fn(usize) -> u32) -> Option<Pick> {
        if self.turn != current.turn() {
            *self = Self::new(current, Some(&*self));
        }
        self.picker.pick(ask, &mut self.turns, busy)
    }
}

/// How to pick, for one state of health.
#[derive(Debug)]
pub struct Picker {
    balance: Balance,
    all: Levels,
    subsets: Option<Subsets>,
    turns: usize,
}

impl Picker {
    /// A picker of `endpoints` as they stand at this moment.
    pub fn new(spread: &Spread, endpoints: &[Endpoint], now: Instant) -> Self {
        let weights = weights(spread, endpoints, now);
        let members = Members {
            spread,
            endpoints,
            weights: &weights,
        };
        let mut turns = 0;
        let everybody: Vec<u32> = (0..).take(endpoints.len()).collect();
        let all = Levels::new(&members, &everybody, &mut turns);
        let subsets = spread.subsets.as_ref();
        let subsets = subsets.map(|config| Subsets::new(config, &members, &mut turns));
        Self {
            balance: spread.balance,
            all,
            subsets,
            turns,
        }
    }

    /// Picks; `busy` tells how many requests are at an endpoint.
    pub fn pick(&self, ask: &Ask<'_>, turns: &mut Turns, busy: impl Fn(usize) -> u32) -> Option<Pick> {
        let (levels, found) = match &self.subsets {
            None => (&self.all, subset::Found::Unasked),
            Some(subsets) => subsets.find(ask.subset, &self.all)?,
        };
        let (endpoint, panics) = levels.pick(self.balance, ask, turns, busy)?;
        Some(Pick {
            endpoint: endpoint as usize,
            panics,
            subset: found,
        })
    }

    /// How many subsets have endpoints.
    pub fn subsets(&self) -> usize {
        self.subsets.as_ref().map_or(0, Subsets::len)
    }
}

/// What pickers are made of.
#[derive(Debug, Clone, Copy)]
struct Members<'a> {
    spread: &'a Spread,
    endpoints: &'a [Endpoint],
    /// What turns go by.
    weights: &'a [u64],
}

/// The endpoints' weights at this moment. While one of them is new they are in thousandths.
fn weights(spread: &Spread, endpoints: &[Endpoint], now: Instant) -> Vec<u64> {
    let whole = |e: &Endpoint| u64::from(e.weight.max(1));
    match &spread.slow_start {
        Some(slow) if spread.is_warming(endpoints, now) => {
            let part = |e: &Endpoint| slow.part(e, now).unwrap_or(1.0) * 1000.0 * whole(e) as f64;
            endpoints.iter().map(|e| (part(e) as u64).max(1)).collect()
        }
        _ => endpoints.iter().map(whole).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::health::{Eds, State};

    /// Endpoints by locality; the number is the weight, the mark the health.
    fn endpoints(localities: &[&[(u32, Eds)]]) -> Vec<Endpoint> {
        let mut all = Vec::new();
        for (locality, members) in (0..).zip(localities) {
            for (weight, eds) in *members {
                let port = 1000 + all.len() as u16;
                all.push(Endpoint {
                    address: SocketAddr::from(([127, 0, 0, 1], port)),
                    weight: *weight,
                    eds: *eds,
                    locality,
                    tls: None,
                    header: None,
                    hostname: String::new(),
                    metadata: Arc::default(),
                    check_port: None,
                    state: Arc::new(State::default()),
                    workload: None,
                });
            }
        }
        all
    }

    fn spread(balance: Balance, localities: &[(u32, u32)]) -> Spread {
        Spread {
            balance,
            panic_below: 50,
            overprovisioning: 140,
            weighted_availability: false,
            by_locality: true,
            localities: localities
                .iter()
                .map(|(priority, weight)| Locality {
                    priority: *priority,
                    weight: *weight,
                    name: Default::default(),
                })
                .collect(),
            subsets: None,
            slow_start: None,
        }
    }

    fn counts(spread: &Spread, endpoints: &[Endpoint], requests: usize) -> Vec<usize> {
        let picker = Picker::new(spread, endpoints, Instant::now());
        let mut turns = Turns::new(&picker, None);
        let mut counts = vec![0; endpoints.len()];
        let ask = Ask::any(SocketAddr::from(([0, 0, 0, 0], 0)));
        for _ in 0..requests {
            if let Some(pick) = picker.pick(&ask, &mut turns, |_| 0) {
                counts[pick.endpoint] += 1;
            }
        }
        counts
    }

    #[test]
    fn a_new_endpoint_takes_its_share_little_by_little() {
        let all = endpoints(&[&[(1, UP), (2, UP)]]);
        let mut spread = spread(Balance::RoundRobin, &[(0, 1)]);
        spread.slow_start = Some(SlowStart {
            window: Duration::from_secs(100),
            aggression: 1.0,
            least: 0.1,
        });
        let weights = |seconds| {
            let now = Instant::now() + Duration::from_secs(seconds);
            super::weights(&spread, &all, now)
        };
        let near = |found: Vec<u64>, expected: [u64; 2]| {
            let near = found.iter().zip(expected).all(|(f, e)| f.abs_diff(e) <= 20);
            assert!(near, "{found:?}, not {expected:?}");
        };
        near(weights(0), [100, 200]);
        near(weights(50), [500, 1000]);
        assert_eq!(weights(101), [1, 2]);
        assert!(spread.is_warming(&all, Instant::now()));
        all[0].state.set(crate::health::FAILED_OUTLIER);
        all[1].state.set(crate::health::FAILED_OUTLIER);
        assert!(!spread.is_warming(&all, Instant::now()));
    }

    const UP: Eds = Eds::Healthy;
    const DOWN: Eds = Eds::Unhealthy;

    #[test]
    fn weights_of_localities_and_endpoints_multiply() {
        let all = endpoints(&[&[(1, UP), (3, UP)], &[(1, UP)]]);
        let spread = spread(Balance::RoundRobin, &[(0, 3), (0, 1)]);
        assert_eq!(counts(&spread, &all, 1600), [300, 900, 400]);
    }

    #[test]
    fn a_locality_that_is_half_down_takes_less() {
        let all = endpoints(&[&[(1, UP), (1, DOWN)], &[(1, UP)]]);
        let spread = spread(Balance::RoundRobin, &[(0, 1), (0, 1)]);
        // 0.7 of the weight against 1: 7 of 17.
        assert_eq!(counts(&spread, &all, 1700), [700, 0, 1000]);
    }

    #[test]
    fn the_next_priority_takes_what_the_first_cannot() {
        let all = endpoints(&[&[(1, UP), (1, DOWN)], &[(1, UP)]]);
        let spread = spread(Balance::RoundRobin, &[(0, 1), (1, 1)]);
        let found = counts(&spread, &all, 10_000);
        // 70 % and 30 %; five standard deviations are 230.
        assert!(found[0].abs_diff(7000) < 230 && found[1] == 0, "{found:?}");
        let none = endpoints(&[&[(1, DOWN), (1, DOWN)], &[(1, UP)]]);
        assert_eq!(counts(&spread, &none, 100), [0, 0, 100]);
    }

    #[test]
    fn in_panic_all_serve_and_without_a_threshold_none() {
        let all = endpoints(&[&[(1, DOWN), (1, DOWN), (1, UP)]]);
        let mut spread = spread(Balance::RoundRobin, &[(0, 1)]);
        assert_eq!(counts(&spread, &all, 300), [100, 100, 100]);
        spread.panic_below = 0;
        assert_eq!(counts(&spread, &all, 300), [0, 0, 300]);
        let none = endpoints(&[&[(1, DOWN)]]);
        assert_eq!(counts(&spread, &none, 300), [0]);
        assert_eq!(counts(&spread, &endpoints(&[&[]]), 3), [0usize; 0]);
    }

    #[test]
    fn priorities_tried_in_vain_are_left_for_others() {
        let all = endpoints(&[&[(1, UP)], &[(1, UP)], &[(1, DOWN)]]);
        let mut spread = spread(Balance::RoundRobin, &[(0, 1), (1, 1), (2, 1)]);
        spread.panic_below = 0;
        let picker = Picker::new(&spread, &all, Instant::now());
        let mut turns = Turns::new(&picker, None);
        for (tried, expected) in [(&[][..], 0), (&[0], 1), (&[0, 1], 0), (&[0, 1, 2], 0), (&[1], 0)] {
            let ask = Ask {
                tried,
                ..Ask::any(SocketAddr::from(([0, 0, 0, 0], 0)))
            };
            let pick = picker.pick(&ask, &mut turns, |_| 0).unwrap();
            assert_eq!(pick.endpoint, expected, "{tried:?}");
        }
    }

    #[test]
    fn workers_take_up_what_is_put_in_force() {
        let all = endpoints(&[&[(1, UP), (1, UP)]]);
        let mut spread = spread(Balance::RoundRobin, &[(0, 1)]);
        spread.panic_below = 0;
        let current = Current::new(Picker::new(&spread, &all, Instant::now()));
        let (turn, _) = current.load();
        all[0].state.set(crate::health::FAILED_OUTLIER);
        current.set(Picker::new(&spread, &all, Instant::now()));
        assert_ne!(current.turn(), turn);
        let (_, picker) = current.load();
        let mut turns = Turns::new(&picker, None);
        let ask = Ask::any(SocketAddr::from(([0, 0, 0, 0], 0)));
        let picked = (0..9).filter_map(|_| picker.pick(&ask, &mut turns, |_| 0));
        assert!(picked.map(|p| p.endpoint).all(|e| e == 1));
    }
}
