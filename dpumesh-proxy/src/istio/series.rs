//! The numbers: per pod a table of series by their labels, in it each worker's own cells.
//!
//! A worker looks a series up under a lock when it meets its labels for the first time, and counts without one from then on.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::peer::{Workload, told};
use crate::histogram::{BOUNDS, LABELS, bucket};
use crate::stats::Shard;

/// Series one pod may have.
pub const MOST_SERIES: usize = 500;

/// Cells of a histogram: its buckets, that of what is larger than all bounds, the sum.
const HISTOGRAM: usize = BOUNDS.len() + 2;

/// HTTP: the count, then three histograms. TCP: four counters.
const HTTP_CELLS: usize = 1 + 3 * HISTOGRAM;
const TCP_CELLS: usize = 4;

const HISTOGRAMS: [&str; 3] = [
    "istio_request_duration_milliseconds",
    "istio_request_bytes",
    "istio_response_bytes",
];
const TCP_COUNTERS: [&str; TCP_CELLS] = [
    "istio_tcp_connections_opened_total",
    "istio_tcp_connections_closed_total",
    "istio_tcp_sent_bytes_total",
    "istio_tcp_received_bytes_total",
];

/// One worker's numbers for one set of labels.
#[derive(Debug)]
pub struct Series(Box<[AtomicU64]>);

impl Series {
    fn new(cells: usize) -> Self {
        Self((0..cells).map(|_| AtomicU64::new(0)).collect())
    }

    /// One writer: a plain load and store.
    fn add(&self, at: usize, by: u64) {
        if let Some(cell) = self.0.get(at) {
            cell.store(cell.load(Relaxed).wrapping_add(by), Relaxed);
        }
    }

    /// Counts a request; octets with heads.
    pub fn request(&self, duration: Duration, received: u64, sent: u64) {
        self.add(0, 1);
        let ms = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        for (index, value) in [ms, received, sent].into_iter().enumerate() {
            let base = 1 + index * HISTOGRAM;
            self.add(base + bucket(value), 1);
            self.add(base + HISTOGRAM - 1, value);
        }
    }

    /// Counts a connection as opened.
    pub fn opened(&self) {
        self.add(0, 1);
    }

    /// Counts a connection as closed.
    pub fn closed(&self) {
        self.add(1, 1);
    }

    /// Counts octets of a connection to the client and from it.
    pub fn moved(&self, sent: u64, received: u64) {
        self.add(2, sent);
        self.add(3, received);
    }
}

/// By labels (in the text form of Prometheus, without braces): each worker's cells.
type Table = BTreeMap<String, Vec<(Shard, Arc<Series>)>>;

/// A local pod and its series.
#[derive(Debug)]
pub struct Pod {
    /// `NAME.NAMESPACE`.
    pub name: String,
    /// What it is.
    pub workload: Workload,
    /// What peers are told of it: the values of `x-envoy-peer-metadata-id` and `x-envoy-peer-metadata`.
    pub told: (String, String),
    /// Never given twice.
    pub(super) id: u64,
    addresses: String,
    table: Mutex<Table>,
}

impl Pod {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The cells of `shard` for these labels; `None` where the pod has all the series it may have.
    pub(super) fn series(&self, shard: Shard, labels: &str, tcp: bool, limit: usize) -> Option<Arc<Series>> {
        let mut table = self.table();
        if !table.contains_key(labels) && table.len() >= limit {
            return None;
        }
        let workers = table.entry(labels.to_owned()).or_default();
        if let Some((_, found)) = workers.iter().find(|(s, _)| *s == shard) {
            return Some(Arc::clone(found));
        }
        let fresh = Arc::new(Series::new(if tcp { TCP_CELLS } else { HTTP_CELLS }));
        workers.push((shard, Arc::clone(&fresh)));
        Some(fresh)
    }

    fn sums(&self) -> Vec<(String, Vec<u64>)> {
        let table = self.table();
        let sum = |workers: &[(Shard, Arc<Series>)]| -> Vec<u64> {
            let cells = workers.first().map_or(0, |(_, s)| s.0.len());
            let of = |at: usize| workers.iter().map(|(_, s)| s.0[at].load(Relaxed)).sum();
            (0..cells).map(of).collect()
        };
        table
            .iter()
            .map(|(labels, workers)| (labels.clone(), sum(workers)))
            .collect()
    }
}

impl PartialEq for Pod {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id
    }
}

impl Eq for Pod {}

/// All pods' series.
#[derive(Debug, Default)]
pub struct Metrics {
    pods: Mutex<BTreeMap<String, Arc<Pod>>>,
    ids: AtomicU64,
}

impl Metrics {
    fn pods(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Pod>>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pod `name` at `addresses`: the one in force if it is the same workload, else a new one without series.
    pub fn pod(&self, name: &str, addresses: &str, workload: Workload) -> Arc<Pod> {
        let pods = self.pods();
        let same = |pod: &&Arc<Pod>| pod.workload == workload && pod.addresses == addresses;
        if let Some(same) = pods.get(name).filter(same) {
            return Arc::clone(same);
        }
        Arc::new(Pod {
            told: told(name, addresses.split(',').next().unwrap_or_default(), &workload),
            name: name.to_owned(),
            workload,
            id: self.ids.fetch_add(1, Relaxed),
            addresses: addresses.to_owned(),
            table: Mutex::default(),
        })
    }

    /// These are the pods in force; all others' series are dropped.
    pub fn keep<'a>(&self, pods: impl Iterator<Item = &'a Arc<Pod>>) {
        *self.pods() = pods.map(|pod| (pod.name.clone(), Arc::clone(pod))).collect();
    }

    /// The Prometheus text of all pods, each series with the labels `pod` and `namespace`; or of `only` one, without them.
    pub fn prometheus(&self, only: Option<&str>) -> String {
        let pods: Vec<Arc<Pod>> = self
            .pods()
            .values()
            .filter(|pod| only.is_none_or(|name| name == pod.name))
            .map(Arc::clone)
            .collect();
        let mut http = Vec::new();
        let mut tcp = Vec::new();
        for pod in pods {
            let own = match only {
                Some(_) => String::new(),
                None => {
                    let (name, namespace) = pod.name.rsplit_once('.').unwrap_or((&pod.name, ""));
                    format!(",pod=\"{}\",namespace=\"{}\"", escaped(name), escaped(namespace))
                }
            };
            for (labels, cells) in pod.sums() {
                let list = if cells.len() == TCP_CELLS {
                    &mut tcp
                } else {
                    &mut http
                };
                list.push((format!("{labels}{own}"), cells));
            }
        }
        let mut text = String::new();
        counter(&mut text, "istio_requests_total", &http, 0);
        for (index, family) in HISTOGRAMS.iter().enumerate() {
            histogram(&mut text, family, &http, 1 + index * HISTOGRAM);
        }
        for (index, family) in TCP_COUNTERS.iter().enumerate() {
            counter(&mut text, family, &tcp, index);
        }
        text
    }

    /// Sets every counter to zero; histograms stay, as in Envoy.
    pub fn reset(&self) {
        let pods: Vec<Arc<Pod>> = self.pods().values().map(Arc::clone).collect();
        for pod in pods {
            for (_, series) in pod.table().values().flatten() {
                let counters = if series.0.len() == TCP_CELLS { TCP_CELLS } else { 1 };
                let counters = series.0.iter().take(counters);
                counters.for_each(|cell| cell.store(0, Relaxed));
            }
        }
    }
}

fn counter(text: &mut String, family: &str, all: &[(String, Vec<u64>)], at: usize) {
    if !all.is_empty() {
        let _ = writeln!(text, "# TYPE {family} counter");
    }
    for (labels, cells) in all {
        let _ = writeln!(text, "{family}{{{labels}}} {}", cells[at]);
    }
}

fn histogram(text: &mut String, family: &str, all: &[(String, Vec<u64>)], base: usize) {
    if !all.is_empty() {
        let _ = writeln!(text, "# TYPE {family} histogram");
    }
    for (labels, cells) in all {
        let mut count = 0;
        for (bound, cell) in LABELS.iter().zip(&cells[base..]) {
            count += cell;
            let _ = writeln!(text, "{family}_bucket{{{labels},le=\"{bound}\"}} {count}");
        }
        let _ = writeln!(text, "{family}_sum{{{labels}}} {}", cells[base + HISTOGRAM - 1]);
        let _ = writeln!(text, "{family}_count{{{labels}}} {count}");
    }
}

/// A label's value as Prometheus wants it.
pub(super) fn escaped(value: &str) -> std::borrow::Cow<'_, str> {
    if value.contains(['\\', '"', '\n']) {
        value
            .replace('\\', "\\\\")
            .replace('"', "\\\"")
            .replace('\n', "\\n")
            .into()
    } else {
        value.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line<'a>(text: &'a str, front: &str) -> Option<&'a str> {
        text.lines().find_map(|l| l.strip_prefix(front))
    }

    #[test]
    fn workers_are_summed_and_pods_leave_with_their_series() {
        let metrics = Metrics::default();
        let workload = Workload {
            name: "w".into(),
            ..Workload::default()
        };
        let (one, two) = (
            metrics.pod("a-1.n", "10.0.0.1", workload.clone()),
            metrics.pod("a-2.n", "10.0.0.2", workload.clone()),
        );
        metrics.keep([&one, &two].into_iter());
        let again = metrics.pod("a-1.n", "10.0.0.1", workload.clone());
        assert!(Arc::ptr_eq(&one, &again), "the same workload is the same pod");
        let labels = "reporter=\"source\"";
        let first = one.series(Shard::worker(0), labels, false, MOST_SERIES).unwrap();
        let second = one.series(Shard::worker(1), labels, false, MOST_SERIES).unwrap();
        let ours = one.series(Shard::worker(0), labels, false, MOST_SERIES).unwrap();
        assert!(Arc::ptr_eq(&first, &ours));
        first.request(Duration::from_millis(7), 100, 2);
        second.request(Duration::from_millis(0), 5_000_000, 0);
        let tcp = two
            .series(Shard::worker(0), "t=\"1\"", true, MOST_SERIES)
            .unwrap();
        tcp.opened();
        tcp.moved(3, 4);
        let text = metrics.prometheus(None);
        let own = "{reporter=\"source\",pod=\"a-1\",namespace=\"n\"";
        assert_eq!(line(&text, &format!("istio_requests_total{own}}} ")), Some("2"));
        let bucket = |family: &str, le: &str| {
            line(&text, &format!("{family}_bucket{own},le=\"{le}\"}} ")).map(str::to_owned)
        };
        let duration = "istio_request_duration_milliseconds";
        for (le, count) in [("0.5", "1"), ("5", "1"), ("10", "2"), ("+Inf", "2")] {
            assert_eq!(bucket(duration, le).as_deref(), Some(count), "{le}");
        }
        for (le, count) in [("50", "0"), ("100", "1"), ("3600000", "1"), ("+Inf", "2")] {
            assert_eq!(bucket("istio_request_bytes", le).as_deref(), Some(count), "{le}");
        }
        assert_eq!(
            line(&text, &format!("istio_request_bytes_sum{own}}} ")),
            Some("5000100")
        );
        let alone = metrics.prometheus(Some("a-2.n"));
        assert_eq!(
            line(&alone, "istio_tcp_received_bytes_total{t=\"1\"} "),
            Some("4")
        );
        assert!(!alone.contains("istio_requests_total"));
        metrics.keep([&two].into_iter());
        assert!(!metrics.prometheus(None).contains("a-1"));
        let back = metrics.pod("a-1.n", "10.0.0.1", workload);
        assert!(!Arc::ptr_eq(&one, &back), "a pod that left begins anew");
    }

    #[test]
    fn a_pod_has_so_many_series_and_no_more() {
        let metrics = Metrics::default();
        let pod = metrics.pod("a.n", "10.0.0.1", Workload::default());
        for number in 0..MOST_SERIES {
            let labels = number.to_string();
            assert!(
                pod.series(Shard::worker(0), &labels, false, MOST_SERIES)
                    .is_some()
            );
        }
        assert!(pod.series(Shard::worker(0), "more", false, MOST_SERIES).is_none());
        assert!(pod.series(Shard::worker(1), "7", false, MOST_SERIES).is_some());
    }
}
