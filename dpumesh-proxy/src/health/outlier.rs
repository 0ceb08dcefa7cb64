//! Outlier detection: endpoints whose answers are failures get no requests for a while.
//!
//! Failures in a row are counted by the workers ([`Detection::note`]); the `Detector` judges them and, once per interval, the share of
//! requests that succeeded. It decides as Envoy's does: `max_ejection_percent` of all endpoints (over all priorities) at most, each
//! ejection longer than the one before up to `max_ejection_time`, an ejected endpoint back at the first interval behind that.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use super::{FAILED_OUTLIER, State};
use crate::config::model::Endpoint;
use crate::stats::{Outlier as Stat, Scope, Shard};

/// `OutlierDetection`. Percents are chances that a detected endpoint is ejected.
#[derive(Debug, Clone, PartialEq)]
pub struct Detection {
    /// Between two looks at the share of successes, and at who may come back.
    pub interval: Duration,
    /// The first ejection's length; the n-th is n times as long.
    pub base: Duration,
    /// No ejection is longer.
    pub longest: Duration,
    /// Up to so much is added to an ejection.
    pub jitter: Duration,
    /// Percent of the endpoints that may be ejected at once.
    pub most: u32,
    /// One endpoint may be ejected, whatever the percent.
    pub one_at_least: bool,
    /// 5xx in a row.
    pub server_errors: InRow,
    /// 502, 503, 504 in a row.
    pub gateway_failures: InRow,
    /// Failures of the way to the endpoint in a row.
    pub local_failures: InRow,
    /// Failures of the way are counted by themselves, not as 503 and 504.
    pub split: bool,
    /// A good health check ends an ejection.
    pub check_returns: bool,
    /// Endpoints that succeed less often than others.
    pub success_rate: SuccessRate,
    /// Endpoints that fail too often.
    pub failure_percentage: FailurePercentage,
}

/// A limit of failures in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InRow {
    /// The last one that is too many.
    pub limit: u32,
    /// Percent.
    pub enforcing: u32,
}

/// Detection by the distance from the mean rate of success.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SuccessRate {
    /// Endpoints with enough requests that it takes.
    pub hosts: u32,
    /// Requests in an interval that are enough.
    pub volume: u32,
    /// Thousandths of a standard deviation.
    pub factor: u32,
    /// Percent, of what endpoints answer and of the way to them.
    pub enforcing: [u32; 2],
}

/// Detection by the percentage of failures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FailurePercentage {
    /// Endpoints with enough requests that it takes.
    pub hosts: u32,
    /// Requests in an interval that are enough.
    pub volume: u32,
    /// From this percentage on.
    pub threshold: u32,
    /// Percent, of what endpoints answer and of the way to them.
    pub enforcing: [u32; 2],
}

/// Why an endpoint is an outlier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// 5xx in a row.
    ServerErrors,
    /// 502, 503, 504 in a row.
    GatewayFailures,
    /// Failures of the way in a row.
    LocalFailures,
    /// Rate of success; 0 of answers, 1 of the way.
    SuccessRate(usize),
    /// Percentage of failures; 0 of answers, 1 of the way.
    FailurePercentage(usize),
}

/// What came of a request, or of an attempt to connect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// A response.
    Status(u16),
    /// A connection, by which a response may come.
    Connected,
    /// A connection, of whose content nothing is known.
    Served,
    /// No connection, or it broke.
    Failed,
    /// Nothing in time.
    TimedOut,
}

/// What the workers have counted at an endpoint.
#[derive(Debug, Default)]
pub struct Counts {
    server_errors: AtomicU32,
    gateway_failures: AtomicU32,
    local_failures: AtomicU32,
    /// Of answers, and of the way: this interval's requests and successes.
    rates: [Rate; 2],
}

#[derive(Debug, Default)]
struct Rate {
    total: AtomicU64,
    good: AtomicU64,
}

impl Rate {
    fn add(&self, good: bool) {
        self.total.fetch_add(1, Ordering::Relaxed);
        if good {
            self.good.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn take(&self) -> (u64, u64) {
        let total = self.total.swap(0, Ordering::Relaxed);
        (total, self.good.swap(0, Ordering::Relaxed).min(total))
    }
}

/// One more in a row; true where that is the one too many.
fn one_more(count: &AtomicU32, limit: InRow) -> bool {
    count.fetch_add(1, Ordering::Relaxed).wrapping_add(1) == limit.limit
}

/// The row is broken. Mostly there was none.
fn none(count: &AtomicU32) {
    if count.load(Ordering::Relaxed) != 0 {
        count.store(0, Ordering::Relaxed);
    }
}

impl Detection {
    /// Counts an outcome; `tell` hears of each limit that it reaches.
    pub fn note(&self, counts: &Counts, outcome: Outcome, mut tell: impl FnMut(Reason)) {
        if !self.split {
            return match outcome {
                Outcome::Status(status) => self.status(counts, status, tell),
                Outcome::Served => self.status(counts, 200, tell),
                Outcome::Failed => self.status(counts, 503, tell),
                Outcome::TimedOut => self.status(counts, 504, tell),
                Outcome::Connected => {}
            };
        }
        let of_way = &counts.rates[1];
        match outcome {
            Outcome::Status(status) => self.status(counts, status, tell),
            Outcome::Connected | Outcome::Served => {
                of_way.add(true);
                none(&counts.local_failures);
            }
            Outcome::Failed | Outcome::TimedOut => {
                of_way.add(false);
                if one_more(&counts.local_failures, self.local_failures) {
                    tell(Reason::LocalFailures);
                }
            }
        }
    }

    fn status(&self, counts: &Counts, status: u16, mut tell: impl FnMut(Reason)) {
        let good = !(500..=599).contains(&status);
        counts.rates[0].add(good);
        if good {
            none(&counts.server_errors);
            none(&counts.gateway_failures);
            return;
        }
        if matches!(status, 502..=504) {
            if one_more(&counts.gateway_failures, self.gateway_failures) {
                tell(Reason::GatewayFailures);
            }
        } else {
            none(&counts.gateway_failures);
        }
        if one_more(&counts.server_errors, self.server_errors) {
            tell(Reason::ServerErrors);
        }
    }

    fn enforcing(&self, reason: Reason) -> u32 {
        match reason {
            Reason::ServerErrors => self.server_errors.enforcing,
            Reason::GatewayFailures => self.gateway_failures.enforcing,
            Reason::LocalFailures => self.local_failures.enforcing,
            Reason::SuccessRate(of) => self.success_rate.enforcing[of],
            Reason::FailurePercentage(of) => self.failure_percentage.enforcing[of],
        }
    }
}

/// Judges the endpoints of one cluster.
#[derive(Debug)]
pub(super) struct Detector {
    monitors: HashMap<SocketAddr, (Arc<State>, Monitor)>,
    due: Instant,
}

/// What is remembered of an endpoint.
#[derive(Debug, Default)]
struct Monitor {
    /// How many base times the next ejection but one more takes.
    back_off: u32,
    ejected: Option<Instant>,
    returned: Option<Instant>,
    jitter: Duration,
}

/// A cluster at the moment.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scene<'a> {
    pub(super) detection: &'a Detection,
    pub(super) endpoints: &'a [Endpoint],
    pub(super) stats: &'a Scope,
    pub(super) now: Instant,
}

impl Scene<'_> {
    fn count(&self, member: Stat) {
        self.stats.inc(Shard::CONTROL, member);
    }

    fn ejected(&self) -> usize {
        let ejected = self.endpoints.iter().filter(|e| e.state.has(FAILED_OUTLIER));
        ejected.count()
    }

    /// Shows how many are ejected.
    pub(super) fn show(&self) {
        let ejected = self.ejected() as u64;
        self.stats.set(Shard::CONTROL, Stat::Active, ejected);
    }
}

impl Detector {
    pub(super) fn new(scene: &Scene<'_>) -> Self {
        Self {
            monitors: HashMap::new(),
            due: scene.now + scene.detection.interval,
        }
    }

    /// When [`Self::interval`] is to be called.
    pub(super) fn due(&self) -> Instant {
        self.due
    }

    /// Forgets endpoints that are gone, or begin anew.
    pub(super) fn follow(&mut self, scene: &Scene<'_>) {
        let there: HashMap<_, _> = scene.endpoints.iter().map(|e| (e.address, &e.state)).collect();
        self.monitors
            .retain(|address, (state, _)| there.get(address).is_some_and(|s| Arc::ptr_eq(s, state)));
        scene.show();
    }

    fn monitor(&mut self, endpoint: &Endpoint) -> &mut Monitor {
        let fresh = || (Arc::clone(&endpoint.state), Monitor::default());
        &mut self.monitors.entry(endpoint.address).or_insert_with(fresh).1
    }

    /// Judges a row of failures. True where the endpoint was ejected.
    pub(super) fn row(&mut self, scene: &Scene<'_>, address: SocketAddr, reason: Reason) -> bool {
        let Some(endpoint) = scene.endpoints.iter().find(|e| e.address == address) else {
            return false;
        };
        if endpoint.state.has(FAILED_OUTLIER) {
            return false;
        }
        scene.count(detected(reason));
        let ejected = self.eject(scene, endpoint, reason);
        let counts = &endpoint.state.counts;
        match reason {
            Reason::ServerErrors => {
                scene.count(Stat::Consecutive5xx);
                none(&counts.server_errors);
            }
            Reason::GatewayFailures => none(&counts.gateway_failures),
            _ => none(&counts.local_failures),
        }
        scene.show();
        ejected
    }

    /// Looks at who may come back and at the shares of successes. True where anything has changed.
    pub(super) fn interval(&mut self, scene: &Scene<'_>) -> bool {
        self.due = scene.now + scene.detection.interval;
        let mut changed = false;
        for endpoint in scene.endpoints {
            changed |= self.may_return(scene, endpoint);
        }
        for of in 0..2 {
            changed |= self.rates(scene, of);
        }
        for endpoint in scene.endpoints.iter().filter(|e| !e.state.has(FAILED_OUTLIER)) {
            if let Some((_, monitor)) = self.monitors.get_mut(&endpoint.address)
                && let Some(returned) = monitor.returned
                && scene.now - returned >= scene.detection.interval
            {
                monitor.back_off = monitor.back_off.saturating_sub(1);
            }
        }
        scene.show();
        changed
    }

    fn may_return(&mut self, scene: &Scene<'_>, endpoint: &Endpoint) -> bool {
        if !endpoint.state.has(FAILED_OUTLIER) {
            return false;
        }
        let monitor = self.monitor(endpoint);
        let detection = scene.detection;
        let length = detection
            .base
            .saturating_mul(monitor.back_off)
            .min(detection.longest)
            + monitor.jitter;
        let over = monitor.ejected.is_none_or(|since| scene.now - since >= length);
        if over {
            self.give_back(scene, endpoint);
        }
        over
    }

    /// A health check was good.
    pub(super) fn checked(&mut self, scene: &Scene<'_>, address: SocketAddr) {
        let mut endpoints = scene.endpoints.iter();
        let endpoint = endpoints.find(|e| e.address == address && e.state.has(FAILED_OUTLIER));
        if let Some(endpoint) = endpoint.filter(|_| scene.detection.check_returns) {
            self.give_back(scene, endpoint);
        }
    }

    /// Ends an ejection.
    fn give_back(&mut self, scene: &Scene<'_>, endpoint: &Endpoint) {
        clear(&endpoint.state);
        let monitor = self.monitor(endpoint);
        monitor.returned = Some(scene.now);
        scene.show();
    }

    fn eject(&mut self, scene: &Scene<'_>, endpoint: &Endpoint, reason: Reason) -> bool {
        let detection = scene.detection;
        let already = scene.ejected();
        let percent = 100.0 * (already + 1) as f64 / scene.endpoints.len() as f64;
        let may = percent <= f64::from(detection.most) || (detection.one_at_least && already == 0);
        if !may {
            scene.count(Stat::Overflow);
            return false;
        }
        if matches!(reason, Reason::ServerErrors | Reason::SuccessRate(0)) {
            scene.count(Stat::Total);
        }
        if fastrand::u32(..100) >= detection.enforcing(reason) {
            return false;
        }
        scene.count(Stat::EnforcedTotal);
        scene.count(enforced(reason));
        endpoint.state.set(FAILED_OUTLIER);
        let monitor = self.monitor(endpoint);
        monitor.ejected = Some(scene.now);
        let jitter = u64::try_from(detection.jitter.as_millis()).unwrap_or(u64::MAX - 1);
        monitor.jitter = Duration::from_millis(fastrand::u64(..=jitter));
        if detection.base.saturating_mul(monitor.back_off) < detection.longest + detection.base {
            monitor.back_off += 1;
        }
        tracing::info!(endpoint = %endpoint.address, ?reason, "ejected");
        true
    }

    /// Judges by this interval's requests; `of` answers or the way.
    fn rates(&mut self, scene: &Scene<'_>, of: usize) -> bool {
        let (success, failure) = (scene.detection.success_rate, scene.detection.failure_percentage);
        let mut rated: Vec<(&Endpoint, u64, f64)> = Vec::new();
        for endpoint in scene.endpoints {
            let (total, good) = endpoint.state.counts.rates[of].take();
            if total > 0 && !endpoint.state.has(FAILED_OUTLIER) {
                rated.push((endpoint, total, good as f64 * 100.0 / total as f64));
            }
        }
        let mut outliers: Vec<(&Endpoint, Reason)> = Vec::new();
        let enough = |volume: u32| {
            rated
                .iter()
                .filter(move |(_, total, _)| *total >= u64::from(volume))
        };
        let among = enough(success.volume).count();
        if among > 0 && among >= success.hosts as usize {
            let rates: Vec<f64> = enough(success.volume).map(|(.., rate)| *rate).collect();
            let lowest = lowest_rate(&rates, f64::from(success.factor) / 1000.0);
            let below = enough(success.volume).filter(|(.., rate)| *rate < lowest);
            outliers.extend(below.map(|(e, ..)| (*e, Reason::SuccessRate(of))));
        }
        let among = enough(failure.volume).count();
        if among > 0 && among >= failure.hosts as usize {
            let above =
                enough(failure.volume).filter(|(.., rate)| 100.0 - rate >= f64::from(failure.threshold));
            outliers.extend(above.map(|(e, ..)| (*e, Reason::FailurePercentage(of))));
        }
        let mut changed = false;
        for (endpoint, reason) in outliers {
            scene.count(detected(reason));
            if matches!(reason, Reason::SuccessRate(_)) {
                scene.count(Stat::SuccessRate);
            }
            if !endpoint.state.has(FAILED_OUTLIER) {
                changed |= self.eject(scene, endpoint, reason);
            }
        }
        changed
    }
}

/// Takes the ejection off an endpoint, and its rows of failures.
pub(super) fn clear(state: &State) {
    state.clear(FAILED_OUTLIER);
    none(&state.counts.server_errors);
    none(&state.counts.gateway_failures);
    none(&state.counts.local_failures);
}

/// The mean less so many standard deviations.
fn lowest_rate(rates: &[f64], deviations: f64) -> f64 {
    let count = rates.len() as f64;
    let mean = rates.iter().sum::<f64>() / count;
    let variance = rates.iter().map(|rate| (rate - mean).powi(2)).sum::<f64>() / count;
    mean - deviations * variance.sqrt()
}

fn detected(reason: Reason) -> Stat {
    match reason {
        Reason::ServerErrors => Stat::Detected5xx,
        Reason::GatewayFailures => Stat::DetectedGateway,
        Reason::LocalFailures => Stat::DetectedLocal,
        Reason::SuccessRate(0) => Stat::DetectedSuccessRate,
        Reason::SuccessRate(_) => Stat::DetectedLocalSuccessRate,
        Reason::FailurePercentage(0) => Stat::DetectedFailurePercentage,
        Reason::FailurePercentage(_) => Stat::DetectedLocalFailurePercentage,
    }
}

fn enforced(reason: Reason) -> Stat {
    match reason {
        Reason::ServerErrors => Stat::Enforced5xx,
        Reason::GatewayFailures => Stat::EnforcedGateway,
        Reason::LocalFailures => Stat::EnforcedLocal,
        Reason::SuccessRate(0) => Stat::EnforcedSuccessRate,
        Reason::SuccessRate(_) => Stat::EnforcedLocalSuccessRate,
        Reason::FailurePercentage(0) => Stat::EnforcedFailurePercentage,
        Reason::FailurePercentage(_) => Stat::EnforcedLocalFailurePercentage,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::health::Eds;
    use crate::stats::Registry;

    fn detection() -> Detection {
        Detection {
            interval: Duration::from_secs(10),
            base: Duration::from_secs(30),
            longest: Duration::from_secs(50),
            jitter: Duration::ZERO,
            most: 50,
            one_at_least: false,
            server_errors: InRow {
                limit: 3,
                enforcing: 100,
            },
            gateway_failures: InRow {
                limit: 2,
                enforcing: 0,
            },
            local_failures: InRow {
                limit: 2,
                enforcing: 100,
            },
            split: false,
            check_returns: true,
            success_rate: SuccessRate {
                hosts: 3,
                volume: 10,
                factor: 1000,
                enforcing: [100, 100],
            },
            failure_percentage: FailurePercentage {
                hosts: 1,
                volume: 10,
                threshold: 85,
                enforcing: [0, 0],
            },
        }
    }

    fn endpoints(count: u16) -> Vec<Endpoint> {
        let one = |port| Endpoint {
            address: ([127, 0, 0, 1], port).into(),
            weight: 1,
            eds: Eds::Healthy,
            locality: 0,
            tls: None,
            header: None,
            hostname: String::new(),
            metadata: Arc::default(),
            check_port: None,
            state: Arc::new(State::default()),
            workload: None,
        };
        (1..=count).map(one).collect()
    }

    struct Cluster {
        detection: Detection,
        endpoints: Vec<Endpoint>,
        stats: Arc<Scope>,
        registry: Registry,
        detector: Detector,
        now: Instant,
    }

    impl Cluster {
        fn new(detection: Detection, count: u16) -> Self {
            let registry = Registry::new(0);
            let stats = registry.scope("cluster.c.outlier_detection", Stat::TABLE);
            let (endpoints, now) = (endpoints(count), Instant::now());
            let detector = Detector::new(&Scene {
                detection: &detection,
                endpoints: &endpoints,
                stats: &stats,
                now,
            });
            Self {
                detection,
                endpoints,
                stats,
                registry,
                detector,
                now,
            }
        }

        fn note(&mut self, endpoint: usize, outcome: Outcome) {
            let mut reasons = Vec::new();
            let counts = &self.endpoints[endpoint].state.counts;
            self.detection
                .note(counts, outcome, |reason| reasons.push(reason));
            let address = self.endpoints[endpoint].address;
            for reason in reasons {
                self.judge(|detector, scene| detector.row(scene, address, reason));
            }
        }

        fn judge(&mut self, judge: impl FnOnce(&mut Detector, &Scene<'_>) -> bool) -> bool {
            let scene = Scene {
                detection: &self.detection,
                endpoints: &self.endpoints,
                stats: &self.stats,
                now: self.now,
            };
            judge(&mut self.detector, &scene)
        }

        fn after(&mut self, seconds: u64) -> bool {
            self.now += Duration::from_secs(seconds);
            self.judge(Detector::interval)
        }

        fn ejected(&self) -> Vec<bool> {
            self.endpoints
                .iter()
                .map(|e| e.state.has(FAILED_OUTLIER))
                .collect()
        }

        fn stat(&self, name: &str) -> u64 {
            self.registry
                .value(&format!("cluster.c.outlier_detection.{name}"))
                .unwrap()
        }
    }

    #[test]
    fn a_row_of_errors_ejects_and_one_success_breaks_it() {
        let mut cluster = Cluster::new(detection(), 2);
        for status in [500, 500, 200, 503, 500] {
            cluster.note(0, Outcome::Status(status));
        }
        assert_eq!(cluster.ejected(), [false, false]);
        cluster.note(0, Outcome::Failed);
        assert_eq!(cluster.ejected(), [true, false]);
        // Nobody else: half of the endpoints are out.
        (0..3).for_each(|_| cluster.note(1, Outcome::Status(500)));
        assert_eq!(cluster.ejected(), [true, false]);
        for (name, value) in [
            ("ejections_active", 1),
            ("ejections_overflow", 1),
            ("ejections_total", 1),
            ("ejections_enforced_total", 1),
            ("ejections_consecutive_5xx", 2),
            ("ejections_detected_consecutive_5xx", 2),
            ("ejections_enforced_consecutive_5xx", 1),
        ] {
            assert_eq!(cluster.stat(name), value, "{name}");
        }
    }

    #[test]
    fn each_ejection_is_longer_up_to_the_longest_and_good_times_shorten_the_next() {
        let mut cluster = Cluster::new(detection(), 2);
        for length in [30, 50, 50] {
            (0..3).for_each(|_| cluster.note(0, Outcome::Status(500)));
            assert_eq!(cluster.ejected(), [true, false]);
            assert!(!cluster.after(length - 1));
            assert!(cluster.after(1), "{length}");
            assert_eq!(cluster.ejected(), [false, false]);
            assert_eq!(cluster.stat("ejections_active"), 0);
        }
        // Three intervals without ejection take three off.
        (0..3).for_each(|_| assert!(!cluster.after(10)));
        (0..3).for_each(|_| cluster.note(0, Outcome::Status(500)));
        assert!(cluster.after(30));
    }

    #[test]
    fn what_is_not_enforced_is_only_detected() {
        let mut cluster = Cluster::new(detection(), 2);
        (0..2).for_each(|_| cluster.note(0, Outcome::Status(503)));
        assert_eq!(cluster.ejected(), [false, false]);
        assert_eq!(cluster.stat("ejections_detected_consecutive_gateway_failure"), 1);
        assert_eq!(cluster.stat("ejections_enforced_total"), 0);
        // 500 is no gateway failure and breaks their row.
        cluster.note(1, Outcome::Status(503));
        cluster.note(1, Outcome::Status(500));
        cluster.note(1, Outcome::Status(200));
        cluster.note(1, Outcome::Status(503));
        assert_eq!(cluster.stat("ejections_detected_consecutive_gateway_failure"), 1);
    }

    #[test]
    fn failures_of_the_way_are_counted_by_themselves_if_asked() {
        let split = Detection {
            split: true,
            ..detection()
        };
        let mut cluster = Cluster::new(split, 2);
        cluster.note(0, Outcome::Failed);
        cluster.note(0, Outcome::Connected);
        cluster.note(0, Outcome::Status(500));
        cluster.note(0, Outcome::TimedOut);
        assert_eq!(cluster.ejected(), [false, false]);
        cluster.note(0, Outcome::Failed);
        assert_eq!(cluster.ejected(), [true, false]);
        assert_eq!(
            cluster.stat("ejections_enforced_consecutive_local_origin_failure"),
            1
        );
    }

    #[test]
    fn rates_far_from_the_mean_and_many_failures_are_found_at_the_interval() {
        let mut cluster = Cluster::new(detection(), 4);
        for request in 0..20 {
            for endpoint in 0..4 {
                let bad = endpoint == 2 && request % 2 == 0;
                cluster.note(endpoint, Outcome::Status(if bad { 500 } else { 200 }));
            }
        }
        assert!(cluster.after(10));
        assert_eq!(cluster.ejected(), [false, false, true, false]);
        assert_eq!(cluster.stat("ejections_enforced_success_rate"), 1);
        assert_eq!(cluster.stat("ejections_detected_failure_percentage"), 0);
        assert!(!cluster.after(10));

        let failures = Detection {
            failure_percentage: FailurePercentage {
                enforcing: [100, 0],
                ..detection().failure_percentage
            },
            server_errors: InRow {
                limit: 100,
                enforcing: 100,
            },
            ..detection()
        };
        let mut cluster = Cluster::new(failures, 2);
        (0..10).for_each(|_| cluster.note(1, Outcome::Status(500)));
        assert!(cluster.after(10));
        assert_eq!(cluster.ejected(), [false, true]);
        assert_eq!(cluster.stat("ejections_enforced_failure_percentage"), 1);
    }
}
