//! One pod's configuration in our own words: what the aggregation decides on is typed, what it only carries is a
//! [`Body`].
//!
//! Typed are addresses, filter-chain criteria, protocol detection, references between resources, EDS names and whether
//! something holds state of its one proxy. A body is the rest of a resource (filters, routes, load balancing), already checked and
//! normalised by [`crate::translate`], in a canonical encoding: equal meaning, equal bytes, equal [`struct@Hash`].

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;

/// BLAKE3 of a canonical encoding.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Hash(pub [u8; 32]);

impl Hash {
    /// Of some bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// The first eight hex digits, for names.
    pub fn short(&self) -> String {
        self.0[..4].iter().map(|b| format!("{b:02x}")).collect()
    }

    /// Sixteen hex digits, for versions.
    pub fn version(&self) -> String {
        self.0[..8].iter().map(|b| format!("{b:02x}")).collect()
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.short())
    }
}

/// A carried message: its type and canonical bytes. Cloning shares them.
#[derive(Clone, PartialEq, Eq)]
pub struct Body {
    /// Full protobuf name.
    pub type_name: &'static str,
    /// Canonical encoding.
    pub bytes: Arc<[u8]>,
    /// Of `bytes`.
    pub hash: Hash,
}

impl Body {
    /// A body of bytes that are in canonical form already.
    pub fn new(type_name: &'static str, bytes: Vec<u8>) -> Self {
        Self {
            type_name,
            hash: Hash::of(&bytes),
            bytes: bytes.into(),
        }
    }
}

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}({} octets, {:?})",
            self.type_name,
            self.bytes.len(),
            self.hash
        )
    }
}

/// What a body refers to by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct References {
    /// Clusters.
    pub clusters: BTreeSet<String>,
    /// Route configurations asked for by RDS.
    pub routes: BTreeSet<String>,
    /// Extension configurations asked for by ECDS.
    pub extensions: BTreeSet<String>,
}

impl References {
    /// Adds all of `other`.
    pub fn extend(&mut self, other: &Self) {
        self.clusters.extend(other.clusters.iter().cloned());
        self.routes.extend(other.routes.iter().cloned());
        self.extensions.extend(other.extensions.iter().cloned());
    }
}

/// A body with its references.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Content {
    /// The message.
    pub body: Body,
    /// What it refers to.
    pub references: Arc<References>,
}

/// What a listener is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// Everything that comes to the pod (`virtualInbound`).
    Inbound,
    /// Everything that leaves the pod and that no other outbound listener takes (`virtualOutbound`).
    CatchAll,
    /// What leaves the pod towards the listener's addresses.
    Outbound,
    /// A port that the sidecar itself would open in the pod. There is no sidecar: not carried over.
    OwnPort,
}

/// A set of ports.
#[derive(Clone, PartialEq, Eq)]
pub struct PortSet(Box<[u64; 1024]>);

impl PortSet {
    /// No port.
    pub fn none() -> Self {
        Self(Box::new([0; 1024]))
    }

    /// Every port.
    pub fn all() -> Self {
        Self(Box::new([u64::MAX; 1024]))
    }

    /// Just one.
    pub fn one(port: u16) -> Self {
        let mut set = Self::none();
        set.insert(port);
        set
    }

    /// Adds a port.
    pub fn insert(&mut self, port: u16) {
        self.0[usize::from(port) / 64] |= 1 << (port % 64);
    }

    /// Adds `start..end`, as far as these are ports.
    pub fn insert_range(&mut self, start: u32, end: u32) {
        for port in start..end.min(65_536) {
            if let Ok(port) = u16::try_from(port) {
                self.insert(port);
            }
        }
    }

    /// Whether `port` is in it.
    pub fn contains(&self, port: u16) -> bool {
        self.0[usize::from(port) / 64] & (1 << (port % 64)) != 0
    }

    /// Whether it is empty.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }

    /// What is in one of the two.
    #[must_use]
    pub fn union(mut self, other: &Self) -> Self {
        for (a, b) in self.0.iter_mut().zip(other.0.iter()) {
            *a |= b;
        }
        self
    }

    /// What is in both.
    #[must_use]
    pub fn intersection(mut self, other: &Self) -> Self {
        for (a, b) in self.0.iter_mut().zip(other.0.iter()) {
            *a &= b;
        }
        self
    }

    /// What is not in it.
    #[must_use]
    pub fn complement(mut self) -> Self {
        for word in self.0.iter_mut() {
            *word = !*word;
        }
        self
    }

    /// The set as half-open ranges, ascending.
    pub fn ranges(&self) -> Vec<(u32, u32)> {
        let mut ranges: Vec<(u32, u32)> = Vec::new();
        for (word, first) in self.0.iter().zip((0u32..).step_by(64)) {
            let mut bits = *word;
            while bits != 0 {
                let skip = bits.trailing_zeros();
                let run = (bits >> skip).trailing_ones();
                let (start, end) = (first + skip, first + skip + run);
                match ranges.last_mut() {
                    Some(last) if last.1 == start => last.1 = end,
                    _ => ranges.push((start, end)),
                }
                bits = if skip + run == 64 {
                    0
                } else {
                    bits >> (skip + run) << (skip + run)
                };
            }
        }
        ranges
    }
}

impl fmt::Debug for PortSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.ranges()).finish()
    }
}

/// On which destination ports the first octets of a connection are looked at before a chain is chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Detection {
    /// For a TLS ClientHello (server name, ALPN).
    pub tls: PortSet,
    /// For HTTP.
    pub http: PortSet,
    /// How long to wait for them; `None`: for ever.
    pub timeout: Option<Duration>,
    /// What happens then: the choice is made without them, or the connection is closed.
    pub continue_on_timeout: bool,
}

/// What a connection must look like for a chain. All empty: any connection.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ChainMatch {
    /// Original destination port.
    pub destination_port: Option<u16>,
    /// Original destination address, the longest prefix wins.
    pub prefixes: Vec<IpNet>,
    /// Server name of the ClientHello, lower case: `a.b`, or `*.b` for every name below `b`.
    pub server_names: Vec<String>,
    /// `tls` or `raw_buffer`.
    pub transport: Option<String>,
    /// Application protocols; the client's first known one decides.
    pub alpn: Vec<String>,
}

/// What happens to the connections of one kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FilterChain {
    /// As the control plane calls it; unnamed ones get their place in the list.
    pub name: String,
    /// Which connections.
    pub matches: ChainMatch,
    /// The `FilterChain` without name and match.
    pub content: Content,
    /// Holds state of one proxy (rate limits and the like): never shared between pods.
    pub stateful: bool,
}

/// A listener.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listener {
    /// As the control plane calls it.
    pub name: String,
    /// What it is for.
    pub role: Role,
    /// The destinations it takes; an unspecified address takes its whole family.
    pub addresses: Vec<SocketAddr>,
    /// In the control plane's order.
    pub chains: Vec<FilterChain>,
    /// For what no chain takes. Without one such connections are closed.
    pub default_chain: Option<FilterChain>,
    /// Which ports are looked into.
    pub detection: Detection,
}

impl Listener {
    /// All chains, the default one last.
    pub fn all_chains(&self) -> impl Iterator<Item = &FilterChain> {
        self.chains.iter().chain(&self.default_chain)
    }

    /// What all chains refer to.
    pub fn references(&self) -> References {
        let mut all = References::default();
        for chain in self.all_chains() {
            all.extend(&chain.content.references);
        }
        all
    }
}

/// A route configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteConfig {
    /// As the control plane calls it.
    pub name: String,
    /// The `RouteConfiguration` without its name.
    pub content: Content,
}

/// A cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cluster {
    /// As the control plane calls it.
    pub name: String,
    /// The `Cluster` without its name and without the name its endpoints go by.
    pub content: Content,
    /// Name of the endpoints to ask for, of a cluster discovered by EDS.
    pub endpoints: Option<String>,
    /// Holds state of one proxy (limits of its own, outlier detection): never shared between pods.
    pub stateful: bool,
}

/// Endpoints of a cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assignment {
    /// What clusters ask for.
    pub name: String,
    /// The `ClusterLoadAssignment` without its name.
    pub content: Content,
}

/// A workload identity.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Identity {
    /// The root of the name, `cluster.local` by default.
    pub trust_domain: String,
    /// Kubernetes namespace.
    pub namespace: String,
    /// Kubernetes service account.
    pub service_account: String,
}

impl Identity {
    /// `spiffe://td/ns/x/sa/y`: also the name of its certificate for the proxy's key store.
    pub fn spiffe(&self) -> String {
        let Self {
            trust_domain,
            namespace,
            service_account,
        } = self;
        format!("spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}")
    }

    /// The identity of such a name; `None` for anything else.
    pub fn parse(spiffe: &str) -> Option<Self> {
        let parts: Vec<&str> = spiffe.strip_prefix("spiffe://")?.split('/').collect();
        let [trust_domain, "ns", namespace, "sa", service_account] = parts[..] else {
            return None;
        };
        if [trust_domain, namespace, service_account]
            .iter()
            .any(|part| part.is_empty())
        {
            return None;
        }
        Some(Self {
            trust_domain: trust_domain.to_owned(),
            namespace: namespace.to_owned(),
            service_account: service_account.to_owned(),
        })
    }

    /// The name of the roots it trusts.
    pub fn roots(&self) -> String {
        format!("ROOTCA@{}", self.trust_domain)
    }
}

/// A local pod.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Pod {
    /// Kubernetes name.
    pub name: String,
    /// Its addresses; they are what its connections are known by.
    pub addresses: Vec<IpAddr>,
    /// Who it is.
    pub identity: Identity,
}

impl Pod {
    /// `pod.namespace`.
    pub fn key(&self) -> String {
        format!("{}.{}", self.name, self.identity.namespace)
    }
}

/// What the metrics of a pod call it, beside its name. Empty is unknown.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Workload {
    /// The Deployment or the like that made it.
    pub name: String,
    /// Istio's canonical service.
    pub canonical_name: String,
    /// Its revision.
    pub canonical_revision: String,
    /// The cluster (of machines) it runs in.
    pub cluster: String,
    /// Label `app`.
    pub app: String,
    /// Label `version`.
    pub version: String,
}

/// Everything the control plane said for one pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodView {
    /// Which pod.
    pub pod: Pod,
    /// What its metrics call it.
    pub workload: Workload,
    /// By name.
    pub listeners: BTreeMap<String, Arc<Listener>>,
    /// By name.
    pub routes: BTreeMap<String, Arc<RouteConfig>>,
    /// By name.
    pub clusters: BTreeMap<String, Arc<Cluster>>,
    /// By name.
    pub endpoints: BTreeMap<String, Arc<Assignment>>,
}

impl PodView {
    /// A pod of which nothing is known yet.
    pub fn new(pod: Pod) -> Self {
        Self {
            pod,
            workload: Workload::default(),
            listeners: BTreeMap::new(),
            routes: BTreeMap::new(),
            clusters: BTreeMap::new(),
            endpoints: BTreeMap::new(),
        }
    }

    /// Route configurations that listeners ask for.
    pub fn wanted_routes(&self) -> BTreeSet<String> {
        let mut wanted = BTreeSet::new();
        for listener in self.listeners.values().filter(|l| l.role != Role::OwnPort) {
            wanted.extend(listener.references().routes);
        }
        wanted
    }

    /// Endpoints that clusters ask for.
    pub fn wanted_endpoints(&self) -> BTreeSet<String> {
        self.clusters
            .values()
            .filter_map(|c| c.endpoints.clone())
            .collect()
    }

    /// What is still missing before the pod has a whole program; empty when it is complete.
    pub fn missing(&self) -> Vec<String> {
        let mut missing = Vec::new();
        for (role, word) in [
            (Role::Inbound, "inbound listener"),
            (Role::CatchAll, "outbound listener"),
        ] {
            if !self.listeners.values().any(|l| l.role == role) {
                missing.push(word.to_owned());
            }
        }
        let absent = |wanted: BTreeSet<String>, have: &dyn Fn(&String) -> bool, word: &str| -> Vec<String> {
            wanted
                .into_iter()
                .filter(|name| !have(name))
                .map(|name| format!("{word} {name}"))
                .collect()
        };
        missing.extend(absent(
            self.wanted_routes(),
            &|n| self.routes.contains_key(n),
            "route",
        ));
        missing.extend(absent(
            self.wanted_endpoints(),
            &|n| self.endpoints.contains_key(n),
            "endpoints",
        ));
        missing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_its_name() {
        let name = "spiffe://cluster.local/ns/shop/sa/front";
        assert_eq!(Identity::parse(name).unwrap().spiffe(), name);
        for bad in [
            "",
            "spiffe://",
            "https://cluster.local/ns/shop/sa/front",
            "spiffe://cluster.local/ns/shop/sa/",
            "spiffe://cluster.local/ns//sa/front",
            "spiffe://cluster.local/ns/shop/sa/front/more",
            "ROOTCA@cluster.local",
        ] {
            assert_eq!(Identity::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_port_set_is_what_its_ranges_say() {
        let mut set = PortSet::none();
        set.insert_range(15_006, 15_007);
        set.insert_range(65_530, 99_999);
        assert_eq!(set.ranges(), [(15_006, 15_007), (65_530, 65_536)]);
        let rest = set.clone().complement();
        assert_eq!(rest.ranges(), [(0, 15_006), (15_007, 65_530)]);
        assert_eq!(set.union(&rest), PortSet::all());
        assert!(PortSet::one(0).contains(0) && !PortSet::one(0).contains(64));
    }
}
