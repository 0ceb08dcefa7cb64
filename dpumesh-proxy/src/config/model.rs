//! The compiled configuration: immutable, complete, everything looked up beforehand.
//!
//! A worker holds one [`Config`] behind one pointer. Routes name clusters by index into [`Config::clusters`]; a route to
//! a cluster that does not exist keeps its name and answers for it.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::{Duration, Instant};

use dpumesh_hw::stream::kernel::SocketOptions;
use ipnet::IpNet;

use super::dns::Lookup;
use super::dump::Dump;
use crate::access_log::AccessLog;
use crate::balance::subset::Fields;
use crate::balance::{Current, Picker, Spread};
use crate::health::check::Check;
use crate::health::outlier::Detection;
use crate::health::{self, Eds, Health, State};
use crate::http1::policy::HttpPolicy;
use crate::http2;
use crate::istio::{Pod, Pods, Workload};
use crate::listener::{Facts, Inspectors, Matcher, Transport};
use crate::proxy_protocol::{Inbound, Outbound};
use crate::route::RouteTable;
use crate::stats::{self, Scope, Shard};
use crate::tcp::tunnel::Tunneling;
use crate::tls::{ClientContext, ServerContext};
use crate::trace::Tracing;

/// One complete configuration.
#[derive(Debug)]
pub struct Config {
    /// Counts up with each configuration that took effect.
    pub generation: u64,
    /// Who this proxy is.
    pub node: Node,
    /// Where the admin server listens.
    pub admin: Option<SocketAddr>,
    /// Listeners in file order.
    pub listeners: Vec<Arc<Listener>>,
    /// Clusters; [`ClusterRef::index`] points here.
    pub clusters: Vec<Arc<Cluster>>,
    /// Who the local pods are, by address.
    pub workloads: Pods,
    /// The names that its clusters have looked up.
    pub lookups: Vec<Arc<Lookup>>,
    /// The files it was read from.
    pub reads: Subscriptions,
    /// The resources as they were read, for `/config_dump`.
    pub dump: Dump,
}

impl Config {
    /// A cluster's index by name.
    pub fn cluster_index(&self, name: &str) -> Option<usize> {
        self.clusters.iter().position(|c| c.name == name)
    }
}

/// Node id and cluster, as shown in `/server_info`.
#[derive(Debug, Clone, Default)]
pub struct Node {
    /// `node.id`.
    pub id: String,
    /// `node.cluster`.
    pub cluster: String,
}

/// Which files are read for what, for the statistics of their updates.
#[derive(Debug, Default)]
pub struct Subscriptions {
    /// File and index of a cluster that has its endpoints from it.
    pub endpoints: Vec<(String, usize)>,
    /// File and statistics scope of a subscription to its routes.
    pub routes: Vec<(String, String)>,
}

/// A reference to a cluster by name, resolved where possible.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterRef {
    /// The name in the configuration.
    pub name: Arc<str>,
    /// Its place in [`Config::clusters`], `None` when there is no such cluster.
    pub index: Option<usize>,
}

/// Clusters by weight.
#[derive(Debug, Clone)]
pub struct Weighted<T> {
    items: Vec<(u64, T)>,
    total: u64,
}

impl<T> Weighted<T> {
    /// Builds the split; entries of weight 0 are never picked. `None` if all weights are 0.
    pub fn new(items: impl IntoIterator<Item = (u32, T)>) -> Option<Self> {
        let mut total = 0;
        let items: Vec<_> = items
            .into_iter()
            .filter(|(weight, _)| *weight > 0)
            .map(|(weight, item)| {
                total += u64::from(weight);
                (total, item)
            })
            .collect();
        (total > 0).then_some(Self { items, total })
    }

    /// The entry that `random` (any 64-bit number) falls on.
    pub fn pick(&self, random: u64) -> &T {
        let point = random % self.total;
        let index = self.items.partition_point(|(upper, _)| *upper <= point);
        &self.items[index].1
    }

    /// All entries that can be picked.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.items.iter().map(|(_, item)| item)
    }
}

/// One listener: where it listens and what it does with a connection.
#[derive(Debug)]
pub struct Listener {
    /// The listener's name (made from the address where the configuration gives none).
    pub name: String,
    /// The addresses, the first being the main one.
    pub addresses: Vec<SocketAddr>,
    /// How its sockets are made. Without `reuse_port` the first worker accepts alone; with it each has one.
    pub socket: SocketOptions,
    /// `envoy.filters.listener.original_dst`: take the address the client meant as the local address.
    pub original_dst: bool,
    /// `envoy.filters.listener.original_src`: upstream connections leave with the client's address.
    pub original_src: Option<OriginalSrc>,
    /// `envoy.filters.listener.proxy_protocol`: connections begin with a PROXY header.
    pub proxy_protocol: Option<Inbound>,
    /// Which connections are looked into before their chain is chosen.
    pub inspectors: Inspectors,
    /// `filter_chain_matcher`: leads to the index of a chain, instead of the chains' own matches.
    pub matcher: Option<Matcher<usize>>,
    /// Chains.
    pub chains: Vec<Arc<FilterChain>>,
    /// The chain for connections that match none.
    pub default_chain: Option<Arc<FilterChain>>,
    /// Logs of the connections that match no chain.
    pub access_log: Vec<Arc<AccessLog>>,
    /// Of everything in the listener's own message: equal hash, same listener.
    pub fingerprint: u64,
    /// Of its message without the chains and what chooses among them: while it is the same, connections on unchanged chains go on.
    pub frame: u64,
    /// Which way its connections go, seen from local pods.
    pub direction: Option<Direction>,
    /// `listener.ADDRESS.*`
    pub stats: Arc<Scope>,
    /// Whether it came by LDS.
    pub dynamic: bool,
}

/// `traffic_direction`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// To local pods.
    Inbound,
    /// From local pods.
    Outbound,
}

/// Upstream connections bound to the client's address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OriginalSrc {
    /// `SO_MARK` of these connections; 0 sets none.
    pub mark: u32,
}

/// A filter chain, ended by one terminal filter.
#[derive(Debug)]
pub struct FilterChain {
    /// Its name.
    pub name: String,
    /// Which connections it takes.
    pub matcher: ChainMatch,
    /// Of the whole message: equal hash, same chain.
    pub fingerprint: u64,
    /// TLS that clients begin; `None` for plain TCP.
    pub tls: Option<Arc<ServerContext>>,
    /// Name of the certificate that upstream TLS shows for its connections.
    pub certificate: Option<Arc<str>>,
    /// `envoy.filters.network.local_ratelimit`: how many connections come at once.
    pub rates: Vec<crate::ratelimit::ConnectionRate>,
    /// `envoy.filters.network.rbac`: rules that a connection must pass at its first octet.
    pub rbac: Vec<crate::rbac::Filter>,
    /// What it does with them.
    pub terminal: Terminal,
}

/// `FilterChainMatch`, as far as it is implemented.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ChainMatch {
    /// Destination port; `None` is any.
    pub destination_port: Option<u16>,
    /// Destination prefixes; empty is any.
    pub destination: Vec<IpNet>,
    /// Server names (`*.example.com` for all below); empty is any.
    pub server_names: Vec<String>,
    /// What carries the connection; `None` is any.
    pub transport: Option<Transport>,
    /// Application protocols; empty is any.
    pub protocols: Vec<String>,
    /// Source prefixes; empty is any.
    pub source: Vec<IpNet>,
    /// Source ports; empty is any.
    pub source_ports: Vec<u16>,
}

/// The terminal filter of a chain.
#[derive(Debug, Clone)]
pub enum Terminal {
    /// `envoy.filters.network.tcp_proxy`.
    Tcp(Arc<TcpProxy>),
    /// `envoy.filters.network.http_connection_manager`.
    Http(Arc<HttpManager>),
}

/// A TCP proxy.
#[derive(Debug)]
pub struct TcpProxy {
    /// Where connections go.
    pub clusters: Weighted<ClusterRef>,
    /// Closed after this long without a byte either way; `None` never.
    pub idle_timeout: Option<Duration>,
    /// Endpoints tried before giving up.
    pub max_connect_attempts: u32,
    /// Consistent hashing goes by the client's address (`hash_policy`).
    pub hash_source_ip: bool,
    /// Connections go on in CONNECT requests.
    pub tunneling: Option<Tunneling>,
    /// Logs.
    pub access_log: Vec<Arc<AccessLog>>,
    /// `tcp.PREFIX.*`
    pub stats: Arc<Scope>,
}

/// An HTTP connection manager.
#[derive(Debug)]
pub struct HttpManager {
    /// Where requests go.
    pub routes: Arc<RouteTable>,
    /// What is told of its requests, and to whom.
    pub tracing: Option<Arc<Tracing>>,
    /// The `server` header.
    pub server_name: String,
    /// What happens to the `server` header.
    pub server_header: ServerHeader,
    /// A connection without a request is closed after this long.
    pub idle_timeout: Option<Duration>,
    /// Time for a request's head to arrive whole.
    pub headers_timeout: Option<Duration>,
    /// How long a request and its response may take in all, where the route does not say.
    pub max_stream_duration: Option<Duration>,
    /// A request without any byte either way is ended after this long.
    pub stream_idle_timeout: Option<Duration>,
    /// The largest request head, octets.
    pub max_head: usize,
    /// The most header lines.
    pub max_headers: usize,
    /// What clients speak.
    pub codec: Codec,
    /// Limits of their HTTP/2 connections.
    pub http2: Http2,
    /// Requests after which the connection is closed; 0 is no limit.
    pub max_requests: u64,
    /// Header names with underscores.
    pub underscores: Underscores,
    /// Makes a request id where there is none.
    pub generate_request_id: bool,
    /// Sends the request id back in the response.
    pub request_id_in_response: bool,
    /// HTTP/1.0 requests are served.
    pub accept_http_10: bool,
    /// The host of HTTP/1.0 requests that name none.
    pub default_host_http_10: Option<String>,
    /// What it does to requests besides routing them.
    pub policy: HttpPolicy,
    /// Logs.
    pub access_log: Vec<Arc<AccessLog>>,
    /// `http.PREFIX.*`
    pub stats: Arc<Scope>,
}

/// `server_header_transformation`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServerHeader {
    /// Ours replaces the endpoint's.
    Overwrite,
    /// Ours where the endpoint sent none.
    AppendIfAbsent,
    /// The endpoint's, or none.
    PassThrough,
}

/// `headers_with_underscores_action`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Underscores {
    /// Kept.
    Allow,
    /// The request is refused.
    Reject,
    /// The header is left out.
    Drop,
}

/// A cluster: a named set of endpoints and how to reach them.
#[derive(Debug)]
pub struct Cluster {
    /// Its name.
    pub name: String,
    /// Where its endpoints come from.
    pub kind: ClusterKind,
    /// Bound on making a connection.
    pub connect_timeout: Duration,
    /// An unused pooled connection is closed after this long.
    pub idle_timeout: Option<Duration>,
    /// Requests after which a pooled connection is closed; 0 is no limit.
    pub max_requests_per_connection: u64,
    /// How long an attempt at a request may take, its response included.
    pub max_stream_duration: Option<Duration>,
    /// Bounds of what is open at once.
    pub limits: Limits,
    /// Requests that are being retried, of all workers.
    pub retrying: Arc<AtomicU32>,
    /// All endpoints, in order, those that are not healthy too.
    pub endpoints: Vec<Endpoint>,
    /// How requests are spread over them.
    pub spread: Spread,
    /// Picks one, as their health stands.
    pub picker: Current,
    /// Outlier detection, and `cluster.NAME.outlier_detection.*`.
    pub outlier: Option<(Detection, Arc<Scope>)>,
    /// Active health checks, and `cluster.NAME.health_check.*`.
    pub check: Option<(Check, Arc<Scope>)>,
    /// TLS to addresses that are no endpoint of the list (original destinations).
    pub tls: Option<Arc<ClientContext>>,
    /// The PROXY header that they get.
    pub header: Option<Arc<Outbound>>,
    /// The request's header that says the address which the client meant (`use_http_header`); lower case.
    pub original_header: Option<Vec<u8>>,
    /// `cluster.NAME.*`
    pub stats: Arc<Scope>,
    /// What its endpoints speak.
    pub protocol: Protocol,
    /// Limits of HTTP/2 connections to them.
    pub http2: Http2,
    /// `cluster.NAME.http2.*`, where such connections are kept alive.
    pub http2_stats: Option<Arc<Scope>>,
    /// Whether it came by CDS.
    pub dynamic: bool,
    /// The service it stands for, as its metadata says.
    pub service: Option<Service>,
    /// Who local pods are, as its metadata says.
    pub workloads: Vec<(IpAddr, Arc<Pod>)>,
}

/// A service of the mesh.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Service {
    /// Its host name.
    pub host: String,
    /// Its own name.
    pub name: String,
    /// Kubernetes namespace.
    pub namespace: String,
}

/// What a cluster's endpoints speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2, whatever the TLS handshake agrees on.
    Http2,
    /// What the client speaks.
    Downstream,
    /// What the TLS handshake agrees on; HTTP/1.1 where it says nothing.
    Auto,
}

/// Limits of HTTP/2 connections, from one end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Http2 {
    /// Streams open at once.
    pub streams: u32,
    /// A stream's window, octets.
    pub stream_window: u32,
    /// A connection's window, octets.
    pub connection_window: u32,
    /// PINGs that find a dead connection.
    pub keepalive: Option<http2::keepalive::Settings>,
    /// Clients may ask for tunnels, with `:protocol` too (RFC 8441).
    pub connect: bool,
}

impl Default for Http2 {
    fn default() -> Self {
        Self {
            streams: http2::STREAMS,
            stream_window: http2::STREAM_WINDOW,
            connection_window: http2::CONNECTION_WINDOW,
            keepalive: None,
            connect: false,
        }
    }
}

/// `codec_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    /// What ALPN says, or the client's first octets.
    Auto,
    /// HTTP/1.
    Http1,
    /// HTTP/2.
    Http2,
}

/// Where a cluster's endpoints come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClusterKind {
    /// The configuration itself.
    Static,
    /// An EDS file.
    Eds,
    /// Names, each address of which is an endpoint.
    StrictDns,
    /// A name, whose first address is the endpoint.
    LogicalDns,
    /// The address the client meant.
    OriginalDst,
}

/// How an endpoint is picked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Balance {
    /// In turn, by weight.
    RoundRobin,
    /// At random, by weight.
    Random,
    /// The less loaded of two picked at random.
    LeastRequest,
    /// The next point of a ring behind the request's hash.
    RingHash {
        /// The least points.
        least: u64,
        /// The most.
        most: u64,
    },
    /// The place of a table that the request's hash leads to.
    Maglev {
        /// Places, a prime.
        size: u32,
    },
    /// The cluster's own way (original destination).
    Provided,
}

impl Balance {
    /// Whether a request's hash says where it goes.
    pub fn hashes(self) -> bool {
        matches!(self, Self::RingHash { .. } | Self::Maglev { .. })
    }
}

/// Circuit breakers of a cluster. They bound the sum over all workers, as closely as their unsynchronised gauges tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Connections open at once.
    pub max_connections: u32,
    /// Requests waiting for a connection.
    pub max_pending: u32,
    /// Requests in flight.
    pub max_requests: u32,
    /// Requests being retried.
    pub retries: RetryLimit,
}

/// How many requests of a cluster may be retried at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RetryLimit {
    /// So many (`max_retries`).
    Fixed(u32),
    /// A part of those at work, but some at least (`retry_budget`).
    Budget {
        /// Hundredths of a percent.
        share: u32,
        /// So many may always be.
        least: u32,
    },
}

impl RetryLimit {
    /// The most, given how many requests are at work.
    pub fn most(self, at_work: impl FnOnce() -> u64) -> u32 {
        match self {
            Self::Fixed(most) => most,
            Self::Budget { share, least } => {
                let part = at_work().saturating_mul(u64::from(share)) / 10_000;
                least.max(u32::try_from(part).unwrap_or(u32::MAX))
            }
        }
    }
}

/// One endpoint.
#[derive(Debug, Clone)]
pub struct Endpoint {
    /// Its address.
    pub address: SocketAddr,
    /// Its share, at least 1.
    pub weight: u32,
    /// What its assignment says of its health.
    pub eds: Eds,
    /// Its place in [`Spread::localities`].
    pub locality: u32,
    /// TLS to it; `None` for plain TCP.
    pub tls: Option<Arc<ClientContext>>,
    /// The PROXY header that its connections begin with.
    pub header: Option<Arc<Outbound>>,
    /// Its name, often empty.
    pub hostname: String,
    /// What subsets go by (`envoy.lb`): keys in order, values as JSON.
    pub metadata: Arc<Fields>,
    /// Where it is asked about its health, if that is another port.
    pub check_port: Option<u16>,
    /// What is found out about its health, by all workers.
    pub state: Arc<State>,
    /// Who serves there, as its metadata says.
    pub workload: Option<Arc<Workload>>,
}

impl Endpoint {
    /// How it stands.
    pub fn health(&self) -> Health {
        self.state.health(self.eds)
    }
}

impl PartialEq for Endpoint {
    fn eq(&self, other: &Self) -> bool {
        let own = |e: &Self| {
            let tls = e.tls.as_ref().map(|t| t.fingerprint);
            (
                e.address,
                e.weight,
                e.eds,
                e.locality,
                tls,
                e.header.clone(),
                Arc::clone(&e.metadata),
                e.workload.clone(),
            )
        };
        own(self) == own(other)
    }
}

impl Eq for Endpoint {}

impl Cluster {
    /// Whether its endpoints' health, or what they can take, changes by itself.
    pub fn has_health(&self) -> bool {
        self.outlier.is_some() || self.check.is_some() || self.spread.slow_start.is_some()
    }

    /// Puts a picker in force that goes by the endpoints' present health, and counts them. For the control thread.
    pub fn renew_picker(&self) {
        let picker = Picker::new(&self.spread, &self.endpoints, Instant::now());
        self.picker.set(picker);
        self.count_members();
    }

    /// Shows how many endpoints there are, and how they stand. For the control thread.
    pub fn count_members(&self) {
        let standing = |health| self.endpoints.iter().filter(|e| e.health() == health).count();
        let show = |member, count: usize| self.stats.set(Shard::CONTROL, member, count as u64);
        show(stats::Cluster::MembershipTotal, self.endpoints.len());
        show(stats::Cluster::MembershipHealthy, standing(Health::Healthy));
        show(stats::Cluster::MembershipDegraded, standing(Health::Degraded));
        let excluded = self.endpoints.iter().filter(|e| e.eds == Eds::Draining);
        show(stats::Cluster::MembershipExcluded, excluded.count());
        show(stats::Cluster::LbSubsetsActive, self.picker.load().1.subsets());
        if let Some((_, stats)) = &self.check {
            let with = |flag| self.endpoints.iter().filter(|e| e.state.has(flag)).count();
            let show = |member, count: usize| stats.set(Shard::CONTROL, member, count as u64);
            show(
                stats::HealthCheck::Healthy,
                self.endpoints.len() - with(health::FAILED_CHECK),
            );
            show(stats::HealthCheck::Degraded, with(health::DEGRADED_CHECK));
        }
    }
}

impl Listener {
    /// The chain that takes a connection: by the matcher tree where there is one, else by the chains' own matches, in Envoy's
    /// order: destination port, destination prefix, server name, transport, application protocol, source prefix, source port; the most
    /// specific match at each step decides for good (there is no way back from a step).
    pub fn chain(&self, facts: &Facts<'_>) -> Option<&Arc<FilterChain>> {
        if let Some(matcher) = &self.matcher {
            let found = matcher.find(facts).and_then(|index| self.chains.get(*index));
            return found.or(self.default_chain.as_ref());
        }
        let (source, destination, seen) = (facts.source, facts.destination, facts.seen);
        let mut left: Vec<&Arc<FilterChain>> = self.chains.iter().collect();
        let port = destination.port();
        narrow(&mut left, |m| {
            rank(m.destination_port.is_none(), m.destination_port == Some(port), 1)
        });
        narrow(&mut left, |m| longest(&m.destination, destination.ip()));
        narrow(&mut left, |m| best_name(&m.server_names, &seen.server_name));
        narrow(&mut left, |m| {
            rank(m.transport.is_none(), m.transport == Some(seen.transport), 1)
        });
        narrow(&mut left, |m| {
            let offered = |p: &String| seen.offers(p);
            rank(m.protocols.is_empty(), m.protocols.iter().any(offered), 1)
        });
        narrow(&mut left, |m| longest(&m.source, source.ip()));
        narrow(&mut left, |m| {
            rank(
                m.source_ports.is_empty(),
                m.source_ports.contains(&source.port()),
                1,
            )
        });
        left.first().copied().or(self.default_chain.as_ref())
    }

    /// The chain here that is the same as `chain` of this listener before it was changed.
    pub fn same_chain(&self, before: &Self, chain: &FilterChain) -> Option<&Arc<FilterChain>> {
        if self.frame != before.frame {
            return None;
        }
        let mut chains = self.chains.iter().chain(&self.default_chain);
        chains.find(|c| c.fingerprint == chain.fingerprint && c.name == chain.name)
    }
}

/// Keeps the chains of the highest rank; `None` does not match.
fn narrow(left: &mut Vec<&Arc<FilterChain>>, rank: impl Fn(&ChainMatch) -> Option<u16>) {
    let best = left.iter().filter_map(|c| rank(&c.matcher)).max();
    left.retain(|c| best.is_some() && rank(&c.matcher) == best);
}

fn rank(any: bool, hit: bool, specific: u16) -> Option<u16> {
    if any { Some(0) } else { hit.then_some(specific) }
}

/// 0 for "any", more for a longer wildcard, most for the name itself.
fn best_name(names: &[String], asked: &str) -> Option<u16> {
    if names.is_empty() {
        return Some(0);
    }
    let below = |name: &str| {
        let suffix = name.strip_prefix('*')?;
        (suffix.len() < asked.len() && asked.ends_with(suffix))
            .then(|| u16::try_from(suffix.len()).unwrap_or(u16::MAX - 1))
    };
    let rank = |name: &String| {
        if name == asked {
            Some(u16::MAX)
        } else {
            below(name)
        }
    };
    names.iter().filter_map(rank).max()
}

/// 0 for "any", 1 + prefix length for the longest prefix that holds `ip`.
fn longest(prefixes: &[IpNet], ip: IpAddr) -> Option<u16> {
    if prefixes.is_empty() {
        return Some(0);
    }
    prefixes
        .iter()
        .filter(|p| p.contains(&ip))
        .map(|p| 1 + u16::from(p.prefix_len()))
        .max()
}

/// Resolves a cluster name.
pub(super) fn cluster_ref(name: &str, clusters: &HashMap<String, usize>) -> ClusterRef {
    ClusterRef {
        name: Arc::from(name),
        index: clusters.get(name).copied(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_retry_budget_grows_with_the_work() {
        let budget = RetryLimit::Budget {
            share: 2_550,
            least: 3,
        };
        assert_eq!([0, 12, 16, 100].map(|work| budget.most(|| work)), [3, 3, 4, 25]);
        assert_eq!(RetryLimit::Fixed(1).most(|| 100), 1);
    }

    #[test]
    fn a_weighted_pick_counts_exactly() {
        let split = Weighted::new([(90, 'a'), (0, 'x'), (10, 'b')]).unwrap();
        let b = (0..1000u64).filter(|r| *split.pick(*r) == 'b').count();
        assert_eq!(b, 100);
        assert!(Weighted::new([(0, 'a')]).is_none());
    }
}
