//! Many pods' configurations as one shared proxy's. Pure: same pods after the same aggregate, same resources, to the byte.
//!
//! ```text
//! endpoints ─► clusters ─► routes ─► chains ─► programs     what is equal is one (by content), what differs gets a name of its own
//! outbound listener: source address of the connection  ─► the pod's outbound tree ─► chain | deny
//! inbound listener:  original destination address      ─► the pod's inbound tree  ─► chain | deny
//! ```
//!
//! A pod is known by its address, which the dataplane vouches for. No pod, no program or an address two pods claim: the
//! deny chain. Outbound chains are shared by pods of one identity whose chains are equal to the byte; clusters, routes and endpoints are
//! shared by all, since the certificate is chosen by the connection's chain ([`crate::translate`]); inbound chains belong to one pod.
//! What holds state of one proxy is never shared.
//!
//! Where the result may differ from the pod's own sidecar, it is closed instead of open, and reported: see [`matcher`] for
//! lists of application protocols, and [`Aggregate::notes`] for ports on which another pod's configuration asks to look into connections
//! (all pods' connections to such a port wait for their first octets, at most [`WIDENED_TIMEOUT`]; the choice of the chain does
//! not change by it).

mod emit;
pub mod matcher;
mod names;
mod program;
pub mod tree;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use crate::discovery::ResourceType;
use crate::ir::{Pod, PodView};
use crate::snapshot::Snapshot;
use crate::translate::Note;

/// Name of the listener for what leaves pods.
pub const OUTBOUND: &str = "outbound";

/// Name of the listener for what comes to pods.
pub const INBOUND: &str = "inbound";

/// The cluster without endpoints behind the deny chain.
pub const DENY_CLUSTER: &str = "dpumesh-deny";

/// The key of that cluster's metadata under which the proxy finds who the pods are, for their metrics: a field per pod. A proxy that
/// knows nothing of it carries it without a look, and no connection depends on that cluster.
pub const WORKLOADS: &str = "dpumesh.workloads";

/// The longest wait for first octets that only another pod asked to see.
pub const WIDENED_TIMEOUT: Duration = Duration::from_secs(1);

/// Mark of connections that leave pods, with [`Interception::Transparent`]: packets that bear it and are for a pod of the same node
/// must come to the inbound listener. The stack of `dpu-dataplane` does that with exactly this mark.
pub const HAIRPIN_MARK: u32 = 0xffff_fffd;

/// How connections reach the shared proxy with their original addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interception {
    /// Sockets that accept any destination (TPROXY, or a stack namespace); the local address is the original destination.
    Transparent,
    /// Redirected by the kernel's address translation.
    Redirect,
    /// Told in a PROXY protocol header.
    ProxyProtocol,
}

/// What the shared proxy listens on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// For what leaves pods.
    pub outbound: SocketAddr,
    /// For what comes to pods.
    pub inbound: SocketAddr,
    /// How it gets there.
    pub interception: Interception,
}

/// One pod without a program, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Closed {
    /// `pod.namespace`.
    pub pod: String,
    /// What is missing or contradicts itself.
    pub reason: String,
}

/// The shared proxy's configuration.
#[derive(Debug, Clone, Default)]
pub struct Aggregate {
    /// To be served.
    pub snapshot: Snapshot,
    /// Pods whose every connection is closed.
    pub closed: Vec<Closed>,
    /// What differs from N sidecars.
    pub notes: Vec<Note>,
    /// Which pods use what.
    pub users: Users,
    /// How much was shared.
    pub figures: Figures,
    names: program::Names,
}

/// Pods by what they use under its final name: clusters, endpoints, routes, and under [`ResourceType::Listener`] the chains of both
/// listeners.
pub type Users = BTreeMap<(ResourceType, String), BTreeSet<String>>;

/// Counts of one aggregation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Figures {
    /// Pods with a program.
    pub pods: usize,
    /// Different outbound trees.
    pub outbound_profiles: usize,
    /// Resources of all these pods together.
    pub resources_in: usize,
    /// Resources of the shared proxy.
    pub resources_out: usize,
}

/// Makes one configuration of many, the first one.
pub fn aggregate(views: &[PodView], options: &Options) -> Aggregate {
    Aggregate::default().next(views, options)
}

impl Aggregate {
    /// The configuration that follows this one: what is still there keeps its name.
    pub fn next(&self, views: &[PodView], options: &Options) -> Self {
        made(views, options, &self.names)
    }
}

fn made(views: &[PodView], options: &Options, before: &program::Names) -> Aggregate {
    let mut views: Vec<&PodView> = views.iter().collect();
    views.sort_by_key(|view| view.pod.key());
    let mut closed = Vec::new();
    let complete = governed(&views, &mut closed);
    let mut programs = Vec::new();
    let mut shared = program::Shared::new(&complete, before);
    for view in &complete {
        match shared.program(view) {
            Ok(program) => programs.push(program),
            Err(error) => closed.push(Closed {
                pod: view.pod.key(),
                reason: error.to_string(),
            }),
        }
    }
    let kept: BTreeSet<&str> = programs.iter().map(|p| p.pod.as_str()).collect();
    let mut notes = std::mem::take(&mut shared.notes);
    notes.extend(own_ports(&complete));
    let snapshot = emit::snapshot(&shared, &programs, &complete, options, &mut notes);
    notes.sort();
    notes.dedup();
    let figures = Figures {
        pods: kept.len(),
        outbound_profiles: program::group(&programs, |p| &p.outbound).len(),
        resources_in: complete.iter().map(|view| count(view)).sum(),
        resources_out: snapshot.len(),
    };
    Aggregate {
        snapshot,
        closed,
        notes,
        users: shared.users,
        figures,
        names: shared.names,
    }
}

fn count(view: &PodView) -> usize {
    view.listeners.len() + view.routes.len() + view.clusters.len() + view.endpoints.len()
}

/// Pods that have all they need and whose addresses and names are theirs alone.
fn governed<'a>(views: &[&'a PodView], closed: &mut Vec<Closed>) -> Vec<&'a PodView> {
    let mut owners: BTreeMap<IpAddr, usize> = BTreeMap::new();
    let mut keys: BTreeMap<String, usize> = BTreeMap::new();
    for view in views {
        *keys.entry(view.pod.key()).or_default() += 1;
        for address in view.pod.addresses.iter().collect::<BTreeSet<_>>() {
            *owners.entry(*address).or_default() += 1;
        }
    }
    let mut complete = Vec::new();
    for view in views {
        match complaint(&view.pod, &owners, &keys, &view.missing()) {
            Some(reason) => closed.push(Closed {
                pod: view.pod.key(),
                reason,
            }),
            None => complete.push(*view),
        }
    }
    complete
}

fn complaint(
    pod: &Pod,
    owners: &BTreeMap<IpAddr, usize>,
    keys: &BTreeMap<String, usize>,
    missing: &[String],
) -> Option<String> {
    if pod.addresses.is_empty() {
        return Some("has no address".to_owned());
    }
    if keys.get(&pod.key()).copied() != Some(1) {
        return Some("is there twice".to_owned());
    }
    if let Some(address) = pod.addresses.iter().find(|ip| owners.get(ip).copied() != Some(1)) {
        return Some(format!("another pod claims its address {address} too"));
    }
    if let Some(address) = pod
        .addresses
        .iter()
        .find(|ip| ip.is_unspecified() || ip.is_multicast() || ip.is_loopback())
    {
        return Some(format!("{address} cannot be a pod's address"));
    }
    if missing.is_empty() {
        return None;
    }
    Some(format!("waits for {}", missing.join(", ")))
}

fn own_ports(views: &[&PodView]) -> Vec<Note> {
    let mut notes = Vec::new();
    for view in views {
        for listener in view
            .listeners
            .values()
            .filter(|l| l.role == crate::ir::Role::OwnPort)
        {
            notes.push(Note {
                resource: format!("listener {:?} of {}", listener.name, view.pod.key()),
                path: "address".to_owned(),
                what: "a port of the sidecar itself is not opened".to_owned(),
            });
        }
    }
    notes
}

/// A name and content under which something was interned.
type Interned = BTreeMap<String, Arc<crate::ir::Content>>;

#[cfg(test)]
mod tests;
