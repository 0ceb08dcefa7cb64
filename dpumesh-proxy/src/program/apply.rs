//! A configuration takes effect: its sockets are opened, then it is swapped in, and the workers are told.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;

use dpumesh_hw::netns::Namespace;
use dpumesh_hw::stream::kernel::{self, SocketOptions};

use super::{Error, Running, Shared, lock};
use crate::config::ConfigError;
use crate::config::model::Config;
use crate::stats::{self, Shard};
use crate::tls::Secrets;
use crate::tls::context::{Secret, Shown};
use crate::worker::{Command, ListenerKey};

/// New sockets for each worker, and what they are bound to.
pub(super) struct Opened {
    sockets: Vec<Vec<(ListenerKey, TcpListener)>>,
    bound: BTreeMap<ListenerKey, (SocketAddr, SocketOptions)>,
}

/// Opens what `config` listens on and makes it the one in force.
pub(super) fn take(shared: &Shared, workers: &[Running], config: Config) -> Result<(), ConfigError> {
    let opened = open(shared, &config).map_err(|e| {
        let scope = shared
            .registry
            .scope("listener_manager", stats::ListenerManager::TABLE);
        scope.inc(Shard::CONTROL, stats::ListenerManager::CreateFailure);
        ConfigError::new("", e.to_string())
    })?;
    let generation = config.generation;
    commit(shared, workers, Some(Arc::new(config)), opened);
    tracing::info!(generation, "configuration updated");
    Ok(())
}

/// Opens the sockets `config` has and the proxy not yet.
pub(super) fn open(shared: &Shared, config: &Config) -> Result<Opened, Error> {
    let known = lock(&shared.bound).clone();
    let (netns, workers) = (
        shared.options.stack_netns.clone(),
        shared.options.concurrency.max(1),
    );
    let wanted: Vec<(ListenerKey, SocketOptions)> = config
        .listeners
        .iter()
        .filter(|l| !shared.closing.has_stopped(l.direction))
        .flat_map(|l| l.addresses.iter().map(|a| ((l.name.clone(), *a), l.socket)))
        .collect();
    let inherited = |key: &ListenerKey, options: SocketOptions| -> std::io::Result<Vec<TcpListener>> {
        let sockets = lock(&shared.inherited)
            .as_mut()
            .map(|inherited| inherited.listener(key, &format!("{options:?}")))
            .unwrap_or_default();
        sockets
            .iter()
            .try_for_each(|socket| socket.set_nonblocking(true))?;
        Ok(sockets)
    };
    let open_all = || -> Result<Opened, Error> {
        if let Some(path) = &netns {
            Namespace::open(path)?.enter_thread()?;
        }
        let mut opened = Opened {
            sockets: (0..workers).map(|_| Vec::new()).collect(),
            bound: BTreeMap::new(),
        };
        for (key, options) in wanted {
            if let Some(kept) = known.get(&key).filter(|(_, o)| *o == options) {
                opened.bound.insert(key, *kept);
                continue;
            }
            let refused = |source| Error::io(format!("listener {:?} at {}", key.0, key.1))(source);
            let mut address = key.1;
            let inherited = inherited(&key, options).map_err(refused)?;
            let taken = inherited.len();
            for (index, socket) in inherited.into_iter().enumerate() {
                address = socket.local_addr().map_err(refused)?;
                opened.sockets[index % workers].push((key.clone(), socket));
            }
            for (index, sockets) in opened.sockets.iter_mut().enumerate().skip(taken) {
                if index > 0 && !options.reuse_port {
                    break;
                }
                let socket = kernel::listen(address, options).map_err(refused)?;
                address = socket.local_addr().map_err(refused)?;
                sockets.push((key.clone(), socket));
            }
            opened.bound.insert(key, (address, options));
        }
        Ok(opened)
    };
    // Entering a namespace is for a thread that ends: the control thread's own stays as it is.
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("listen".to_owned());
        let thread = thread.spawn_scoped(scope, open_all);
        let thread = thread.map_err(Error::io("starting a thread to listen"))?;
        thread
            .join()
            .unwrap_or_else(|_| Err(Error::io("listening")(std::io::ErrorKind::Other.into())))
    })
}

/// Makes `config` (or the one already there) the one in force and tells the workers.
pub(super) fn commit(shared: &Shared, workers: &[Running], config: Option<Arc<Config>>, opened: Opened) {
    let before = shared.config.load_full();
    let pods = &config.as_ref().unwrap_or(&before).workloads;
    shared.registry.istio.keep(pods.values());
    // Whoever sees the new configuration finds its addresses.
    *lock(&shared.bound) = opened.bound;
    if let Some(config) = config {
        count_changes(shared, Some(&before), &config);
        want_secrets(shared, &config);
        shared.config.store(config);
    } else {
        count_changes(shared, None, &before);
        want_secrets(shared, &before);
    }
    for (worker, sockets) in workers.iter().zip(opened.sockets) {
        // A worker that is gone panicked; the others go on.
        let _ = worker.commands.send(Command::Apply(sockets));
    }
}

/// Tells the key store which names are in use.
fn want_secrets(shared: &Shared, config: &Config) {
    let (mut certificates, mut roots) = (BTreeSet::new(), BTreeSet::new());
    for listener in &config.listeners {
        for chain in listener.chains.iter().chain(&listener.default_chain) {
            certificates.extend(chain.certificate.clone());
            if let Some(tls) = &chain.tls {
                certificates.extend(tls.certificate.name());
                roots.extend(tls.roots.as_ref().and_then(Secret::name));
            }
        }
    }
    for cluster in &config.clusters {
        let contexts = cluster.endpoints.iter().filter_map(|e| e.tls.as_ref());
        for tls in contexts.chain(&cluster.tls) {
            roots.extend(tls.roots.name());
            if let Shown::Fixed(secret) = &tls.shown {
                certificates.extend(secret.name());
            }
        }
    }
    shared.secrets.want(&certificates, &roots);
}

fn count_changes(shared: &Shared, before: Option<&Config>, now: &Config) {
    use stats::{Cluster, ClusterManager, ListenerManager, Server};
    let listeners = shared.registry.scope("listener_manager", ListenerManager::TABLE);
    let clusters = shared.registry.scope("cluster_manager", ClusterManager::TABLE);
    let server = shared.registry.scope("server", Server::TABLE);
    let one = Shard::CONTROL;
    let old_listeners = by_name(before.map(|b| b.listeners.as_slice()), |listener| &listener.name);
    let old_clusters = by_name(before.map(|b| b.clusters.as_slice()), |cluster| &cluster.name);
    let mut kept = (0, 0);
    for listener in &now.listeners {
        let old = old_listeners.get(listener.name.as_str());
        kept.0 += usize::from(old.is_some());
        match old {
            None => {
                listeners.inc(one, ListenerManager::Added);
                listeners.add(
                    one,
                    ListenerManager::CreateSuccess,
                    shared.options.concurrency as u64,
                );
            }
            Some(old) if old.fingerprint != listener.fingerprint => {
                listeners.inc(one, ListenerManager::Modified)
            }
            Some(_) => {}
        }
    }
    for cluster in &now.clusters {
        let old = old_clusters.get(cluster.name.as_str());
        kept.1 += usize::from(old.is_some());
        if old.is_some_and(|old| Arc::ptr_eq(old, cluster)) {
            continue;
        }
        if old.is_none() {
            clusters.inc(one, ClusterManager::Added);
        }
        if old.is_none_or(|old| old.endpoints != cluster.endpoints) && !cluster.endpoints.is_empty() {
            cluster.stats.inc(one, Cluster::MembershipChange);
        }
        cluster.count_members();
    }
    listeners.add(
        one,
        ListenerManager::Removed,
        (old_listeners.len() - kept.0) as u64,
    );
    clusters.add(one, ClusterManager::Removed, (old_clusters.len() - kept.1) as u64);
    listeners.set(one, ListenerManager::Active, now.listeners.len() as u64);
    listeners.set(one, ListenerManager::WorkersStarted, 1);
    clusters.set(one, ClusterManager::Active, now.clusters.len() as u64);
    server.set(one, Server::Concurrency, shared.options.concurrency as u64);
    server.set(one, Server::Live, 1);
}

fn by_name<'a, T>(
    all: Option<&'a [Arc<T>]>,
    name: impl Fn(&'a T) -> &'a str,
) -> HashMap<&'a str, &'a Arc<T>> {
    let all = all.unwrap_or_default().iter();
    all.map(|one| (name(one), one)).collect()
}
