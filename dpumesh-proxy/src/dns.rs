//! The thread that looks up names of clusters, in the network namespace that requests go out from.
//!
//! A task per cluster: look up, report what is another than before, pause. The system's resolver is asked (`getaddrinfo`), so
//! `/etc/hosts` and `/etc/resolv.conf` count. A name that is not answered keeps the addresses it had.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use dpumesh_hw::netns::Namespace;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::{AbortHandle, LocalSet};
use tokio::time::{Instant, timeout_at};

use crate::config::dns::{Lookup, Resolved};
use crate::health::check::upto;
use crate::stats::{Cluster as Stat, Shard};

/// Names that are looked up at once.
const AT_ONCE: usize = 16;

/// How long a start waits for the first answers.
const FIRST: Duration = Duration::from_secs(5);

/// The running thread. It ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Resolver {
    lookups: mpsc::UnboundedSender<Vec<Arc<Lookup>>>,
}

/// Where changes are reported.
pub(crate) type Reports = mpsc::UnboundedSender<Resolved>;

/// What was found of a cluster's names, in their order.
type Found = Vec<Vec<IpAddr>>;

impl Resolver {
    /// Starts the thread and waits a moment for the first answers, so that clusters of the bootstrap begin with endpoints.
    pub(crate) fn start(
        netns: Option<PathBuf>,
        lookups: Vec<Arc<Lookup>>,
        reports: Reports,
    ) -> io::Result<(Self, Vec<Resolved>)> {
        let (sender, changes) = mpsc::unbounded_channel();
        let (first, firsts) = std::sync::mpsc::channel();
        std::thread::Builder::new()
            .name("dns".to_owned())
            .spawn(move || {
                if let Err(error) = run(netns, &lookups, &first, reports, changes) {
                    tracing::error!(%error, "names are not looked up");
                }
            })?;
        // A thread that could not begin said why.
        let found = firsts.recv().unwrap_or_default();
        Ok((Self { lookups: sender }, found))
    }

    /// Looks up the names of these clusters from now on, and no others.
    pub(crate) fn follow(&self, lookups: Vec<Arc<Lookup>>) {
        // The thread said why when it ended.
        let _ = self.lookups.send(lookups);
    }
}

fn run(
    netns: Option<PathBuf>,
    lookups: &[Arc<Lookup>],
    first: &std::sync::mpsc::Sender<Vec<Resolved>>,
    reports: Reports,
    mut changes: mpsc::UnboundedReceiver<Vec<Arc<Lookup>>>,
) -> io::Result<()> {
    if let Some(path) = netns {
        let namespace = Namespace::open(&path).map_err(io::Error::other)?;
        // Threads for blocking calls are made from here, and so are in it too.
        namespace.enter_thread().map_err(io::Error::other)?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(AT_ONCE)
        .build()?;
    let asking = Asking {
        turns: Arc::new(Semaphore::new(AT_ONCE)),
        reports,
    };
    LocalSet::new().block_on(&runtime, async {
        let mut tasks = HashMap::new();
        follow(&mut tasks, lookups, &asking);
        let until = Instant::now() + FIRST;
        let mut found = Vec::new();
        for task in tasks.values_mut() {
            if let Ok(Ok(resolved)) = timeout_at(until, &mut task.first).await {
                found.push(resolved);
            }
        }
        // Nobody waits where the start has been given up.
        let _ = first.send(found);
        while let Some(lookups) = changes.recv().await {
            follow(&mut tasks, &lookups, &asking);
        }
    });
    // A lookup that hangs holds up nobody.
    runtime.shutdown_background();
    Ok(())
}

#[derive(Clone)]
struct Asking {
    turns: Arc<Semaphore>,
    reports: Reports,
}

/// A cluster whose names are looked up.
struct Task {
    lookup: Arc<Lookup>,
    handle: AbortHandle,
    first: tokio::sync::oneshot::Receiver<Resolved>,
}

impl fmt::Debug for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Task").field(&self.lookup.cluster).finish()
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.handle.abort();
    }
}

fn follow(tasks: &mut HashMap<String, Task>, lookups: &[Arc<Lookup>], asking: &Asking) {
    let mut before = std::mem::take(tasks);
    for lookup in lookups {
        let kept = before
            .remove(&lookup.cluster)
            .filter(|task| task.lookup.is_same(lookup));
        let task = kept.unwrap_or_else(|| {
            let (done, first) = tokio::sync::oneshot::channel();
            let watched = watch(Arc::clone(lookup), asking.clone(), done);
            Task {
                lookup: Arc::clone(lookup),
                handle: tokio::task::spawn_local(watched).abort_handle(),
                first,
            }
        });
        tasks.insert(lookup.cluster.clone(), task);
    }
}

async fn watch(lookup: Arc<Lookup>, asking: Asking, first: tokio::sync::oneshot::Sender<Resolved>) {
    let mut known: Option<Found> = None;
    let mut first = Some(first);
    loop {
        let (found, failed) = look_up(&lookup, known.as_ref(), &asking).await;
        if known.as_ref() != Some(&found) {
            let resolved = lookup.resolved(&found);
            tracing::debug!(cluster = %lookup.cluster, ?found, "names were looked up");
            known = Some(found);
            let told = match first.take() {
                // The start waits no more where this fails.
                Some(first) => first
                    .send(resolved)
                    .or_else(|resolved| asking.reports.send(resolved)),
                None => asking.reports.send(resolved),
            };
            if told.is_err() {
                return;
            }
        } else {
            lookup.stats.inc(Shard::CONTROL, Stat::UpdateNoRebuild);
        }
        let pause = if failed {
            lookup.after_failure
        } else {
            lookup.refresh
        };
        tokio::time::sleep(pause + upto(lookup.jitter)).await;
    }
}

/// Looks all names of a cluster up; whether one was not answered.
async fn look_up(lookup: &Lookup, known: Option<&Found>, asking: &Asking) -> (Found, bool) {
    let count = |member| lookup.stats.inc(Shard::CONTROL, member);
    let (mut found, mut failed) = (Vec::new(), false);
    // All at once: one that is not answered holds up no other.
    let asked: Vec<_> = lookup
        .names
        .iter()
        .map(|name| tokio::task::spawn_local(ask(name.clone(), Arc::clone(&asking.turns))))
        .collect();
    for ((index, name), asked) in lookup.names.iter().enumerate().zip(asked) {
        count(Stat::UpdateAttempt);
        let answer = asked.await.unwrap_or_else(|gone| Err(io::Error::other(gone)));
        let addresses = match answer {
            Ok(addresses) => {
                let addresses = lookup.family.choose(addresses);
                count(Stat::UpdateSuccess);
                if addresses.is_empty() {
                    count(Stat::UpdateEmpty);
                }
                in_order(addresses, lookup.logical)
            }
            Err(error) => {
                tracing::debug!(cluster = %lookup.cluster, name, %error, "a name was not answered");
                count(Stat::UpdateFailure);
                failed = true;
                known
                    .and_then(|known| known.get(index))
                    .cloned()
                    .unwrap_or_default()
            }
        };
        found.push(addresses);
    }
    (found, failed)
}

/// Asks the system's resolver, in one's turn.
async fn ask(name: String, turns: Arc<Semaphore>) -> io::Result<Vec<IpAddr>> {
    // The semaphore is never closed.
    let _turn = turns.acquire().await;
    let addresses = tokio::net::lookup_host((name, 0)).await?;
    Ok(addresses.map(|address| address.ip()).collect())
}

/// Answers come in any order; where all count, that is no change.
fn in_order(mut addresses: Vec<IpAddr>, logical: bool) -> Vec<IpAddr> {
    if logical {
        addresses.truncate(1);
    } else {
        addresses.sort_unstable();
    }
    addresses
}
