//! The control thread's part of health: it judges, sets flags, and puts new pickers in force.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::outlier::{Detector, Scene};
use super::prober::{Prober, Surroundings};
use super::{Report, What};
use crate::config::model::{Cluster, Config};

/// In so many steps a new endpoint comes to its share.
const WARMING_STEPS: u32 = 100;

/// No step is shorter.
const SHORTEST_STEP: Duration = Duration::from_millis(50);

/// Keeps the health of all clusters' endpoints.
#[derive(Debug)]
pub struct Keeper {
    kept: HashMap<String, Kept>,
    generation: u64,
    surroundings: Surroundings,
    prober: Option<Prober>,
}

/// A cluster that is looked after.
#[derive(Debug)]
struct Kept {
    cluster: Arc<Cluster>,
    detector: Option<Detector>,
    /// While endpoints are new: when their shares are worked out again.
    warming: Option<Instant>,
}

impl Keeper {
    /// With nothing to keep yet; checks go out from there.
    pub fn new(surroundings: Surroundings) -> Self {
        Self {
            kept: HashMap::new(),
            generation: 0,
            surroundings,
            prober: None,
        }
    }

    /// Takes up a configuration, if it is another.
    pub fn follow(&mut self, config: &Config, now: Instant) {
        if self.generation == config.generation {
            return;
        }
        self.generation = config.generation;
        let governed = config.clusters.iter().filter(|c| c.has_health());
        let governed: HashMap<&str, &Arc<Cluster>> = governed.map(|c| (c.name.as_str(), c)).collect();
        self.kept.retain(|name, _| governed.contains_key(name.as_str()));
        for (name, cluster) in governed {
            match self.kept.get_mut(name) {
                Some(kept) if Arc::ptr_eq(&kept.cluster, cluster) => {}
                Some(kept) => kept.renew(cluster, now),
                None => {
                    self.kept.insert(name.to_owned(), Kept::new(cluster, now));
                }
            }
        }
        self.probe(config);
    }

    /// Tells the prober whom to check; it is started for the first cluster that asks for checks.
    fn probe(&mut self, config: &Config) {
        let checked = config.clusters.iter().filter(|c| c.check.is_some());
        let checked: Vec<_> = checked.map(Arc::clone).collect();
        if self.prober.is_none() && !checked.is_empty() {
            match Prober::start(self.surroundings.clone()) {
                Ok(prober) => self.prober = Some(prober),
                Err(error) => tracing::error!(%error, "no health checks"),
            }
        }
        if let Some(prober) = &self.prober {
            prober.follow(checked);
        }
    }

    /// Judges what was reported.
    pub fn take(&mut self, report: &Report, now: Instant) {
        let Some(kept) = self.kept.get_mut(&report.cluster.name) else {
            return;
        };
        let Kept {
            cluster, detector, ..
        } = kept;
        let changed = match report.what {
            What::Consecutive(reason) => match (detector, scene(cluster, now)) {
                (Some(detector), Some(scene)) => detector.row(&scene, report.endpoint, reason),
                _ => false,
            },
            What::Checked { good } => {
                if let (true, Some(detector), Some(scene)) = (good, detector, scene(cluster, now)) {
                    detector.checked(&scene, report.endpoint);
                }
                true
            }
        };
        if changed {
            cluster.renew_picker();
            kept.warm(now);
        }
    }

    /// When [`Self::tick`] is to be called.
    pub fn due(&self) -> Option<Instant> {
        let due = |kept: &Kept| [kept.detector.as_ref().map(Detector::due), kept.warming];
        self.kept.values().flat_map(due).flatten().min()
    }

    /// Does what is due.
    pub fn tick(&mut self, now: Instant) {
        for kept in self.kept.values_mut() {
            let Kept {
                cluster, detector, ..
            } = kept;
            let judged = match (detector, scene(cluster, now)) {
                (Some(detector), Some(scene)) if detector.due() <= now => detector.interval(&scene),
                _ => false,
            };
            let warmer = kept.warming.is_some_and(|due| due <= now);
            if judged || warmer {
                kept.cluster.renew_picker();
                kept.warm(now);
            }
        }
    }
}

fn scene(cluster: &Cluster, now: Instant) -> Option<Scene<'_>> {
    let (detection, stats) = cluster.outlier.as_ref()?;
    Some(Scene {
        detection,
        endpoints: &cluster.endpoints,
        stats,
        now,
    })
}

impl Kept {
    fn new(cluster: &Arc<Cluster>, now: Instant) -> Self {
        let mut kept = Self {
            cluster: Arc::clone(cluster),
            detector: None,
            warming: None,
        };
        kept.renew(cluster, now);
        kept
    }

    fn renew(&mut self, cluster: &Arc<Cluster>, now: Instant) {
        self.cluster = Arc::clone(cluster);
        if let Some(scene) = scene(cluster, now) {
            let detector = self.detector.get_or_insert_with(|| Detector::new(&scene));
            detector.follow(&scene);
        }
        self.warm(now);
    }

    /// Says when the shares of new endpoints are worked out again, if there are any.
    fn warm(&mut self, now: Instant) {
        let Cluster {
            spread, endpoints, ..
        } = &*self.cluster;
        let step = spread
            .slow_start
            .map(|slow| (slow.window / WARMING_STEPS).max(SHORTEST_STEP));
        let warming = spread.is_warming(endpoints, now.into_std());
        self.warming = step.filter(|_| warming).map(|step| now + step);
    }
}
