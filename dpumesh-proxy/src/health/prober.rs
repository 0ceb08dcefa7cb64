//! The thread that checks endpoints, in the network namespace that requests go out from.
//!
//! A task per endpoint: check, judge, pause. It writes flags and counters, and reports what changed; the control thread has pickers made.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use dpumesh_hw::netns::Namespace;
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, LocalSet};

use super::check::{Check, Session, upto};
use super::probe::{Target, probe};
use super::{FAILED_OUTLIER, Report, Reporter, State, What};
use crate::config::model::{Cluster, Endpoint};
use crate::stats::{Cluster as ClusterStat, HealthCheck as Stat, Shard};
use crate::tls::Secrets;

/// Where it works, and for whom.
#[derive(Debug, Clone)]
pub struct Surroundings {
    /// Network namespace of the connections.
    pub netns: Option<PathBuf>,
    /// Keys, chains and roots.
    pub secrets: Arc<dyn Secrets>,
    /// Where changes are reported.
    pub reports: Reporter,
}

/// The running thread. It ends when this is dropped.
#[derive(Debug)]
pub(super) struct Prober {
    clusters: mpsc::UnboundedSender<Vec<Arc<Cluster>>>,
}

impl Prober {
    pub(super) fn start(surroundings: Surroundings) -> io::Result<Self> {
        let (clusters, changes) = mpsc::unbounded_channel();
        std::thread::Builder::new()
            .name("health".to_owned())
            .spawn(move || {
                if let Err(error) = run(surroundings, changes) {
                    tracing::error!(%error, "no health checks");
                }
            })?;
        Ok(Self { clusters })
    }

    /// Checks the endpoints of these clusters from now on, and no others.
    pub(super) fn follow(&self, clusters: Vec<Arc<Cluster>>) {
        // The thread said why when it ended.
        let _ = self.clusters.send(clusters);
    }
}

fn run(
    surroundings: Surroundings,
    mut changes: mpsc::UnboundedReceiver<Vec<Arc<Cluster>>>,
) -> io::Result<()> {
    if let Some(path) = &surroundings.netns {
        let namespace = Namespace::open(path).map_err(io::Error::other)?;
        namespace.enter_thread().map_err(io::Error::other)?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    LocalSet::new().block_on(&runtime, async move {
        let mut tasks = HashMap::new();
        while let Some(clusters) = changes.recv().await {
            follow(&mut tasks, &clusters, &surroundings);
        }
    });
    Ok(())
}

/// An endpoint that is checked: its state, and how its task is ended.
struct Task {
    state: Arc<State>,
    cluster: Arc<Cluster>,
    handle: AbortHandle,
}

fn check(cluster: &Cluster) -> Option<&Check> {
    cluster.check.as_ref().map(|(check, _)| check)
}

impl Task {
    fn check(&self) -> Option<&Check> {
        check(&self.cluster)
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.handle.abort();
    }
}

fn follow(
    tasks: &mut HashMap<(String, SocketAddr), Task>,
    clusters: &[Arc<Cluster>],
    surroundings: &Surroundings,
) {
    let mut before = std::mem::take(tasks);
    for cluster in clusters {
        for endpoint in &cluster.endpoints {
            let key = (cluster.name.clone(), endpoint.address);
            let kept = before
                .remove(&key)
                .filter(|task| Arc::ptr_eq(&task.state, &endpoint.state) && task.check() == check(cluster));
            let task = kept.unwrap_or_else(|| {
                let (cluster, endpoint) = (Arc::clone(cluster), endpoint.clone());
                let state = Arc::clone(&endpoint.state);
                let watched = watch(Arc::clone(&cluster), endpoint, surroundings.clone());
                Task {
                    state,
                    cluster,
                    handle: tokio::task::spawn_local(watched).abort_handle(),
                }
            });
            tasks.insert(key, task);
        }
    }
}

async fn watch(cluster: Arc<Cluster>, endpoint: Endpoint, surroundings: Surroundings) {
    let Some((check, stats)) = &cluster.check else {
        return;
    };
    let mut address = endpoint.address;
    if let Some(port) = endpoint.check_port.or(check.port) {
        address.set_port(port);
    }
    let target = Target {
        address,
        tls: endpoint.tls.as_deref(),
        header: endpoint.header.as_deref(),
        secrets: &*surroundings.secrets,
        name: &cluster.name,
    };
    let mut session = Session::default();
    tokio::time::sleep(upto(check.pauses.first_jitter)).await;
    loop {
        stats.inc(Shard::CONTROL, Stat::Attempt);
        let found = probe(check, &target).await;
        let verdict = session.judge(check, &endpoint.state, stats, found);
        if verdict.changed || (verdict.good && endpoint.state.has(FAILED_OUTLIER)) {
            tracing::info!(cluster = %cluster.name, endpoint = %endpoint.address, ?found, "health check");
            let report = Report {
                cluster: Arc::clone(&cluster),
                endpoint: endpoint.address,
                what: What::Checked { good: verdict.good },
            };
            if surroundings.reports.send(report).is_err() {
                return;
            }
        }
        let traffic = cluster.stats.get(ClusterStat::CxTotal) > 0;
        tokio::time::sleep(check.pauses.after(verdict, traffic)).await;
    }
}
