//! The compiled configuration: immutable, complete, everything looked up beforehand.
//!
//! A worker holds one [`Config`] behind one pointer. Routes name clusters by index into [`Config::clusters`]; a route to
//! a cluster that does not exist keeps its name and answers for it.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use dpumesh_hw::stream::kernel::SocketOptions;
use ipnet::IpNet;

use super::dump::Dump;
use crate::access_log::AccessLog;
use crate::http1::policy::HttpPolicy;
use crate::http2;
use crate::listener::{Facts, Inspectors, Matcher, Transport};
use crate::route::RouteTable;
use crate::stats::Scope;
use crate::tls::{ClientContext, ServerContext};

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
    /// `listener.ADDRESS.*`
    pub stats: Arc<Scope>,
    /// Whether it came by LDS.
    pub dynamic: bool,
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
    /// How an endpoint is picked.
    pub balance: Balance,
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
    /// All endpoints, in order, those that are not healthy too.
    pub endpoints: Vec<Endpoint>,
    /// TLS to addresses that are no endpoint of the list (original destinations).
    pub tls: Option<Arc<ClientContext>>,
    /// The order in which round robin takes the healthy ones (indices into `endpoints`, repeated by weight).
    pub schedule: Vec<u32>,
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
}

impl Default for Http2 {
    fn default() -> Self {
        Self {
            streams: http2::STREAMS,
            stream_window: http2::STREAM_WINDOW,
            connection_window: http2::CONNECTION_WINDOW,
            keepalive: None,
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
    /// The cluster's own way (original destination).
    Provided,
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
}

/// One endpoint.
#[derive(Debug, Clone)]
pub struct Endpoint {
    /// Its address.
    pub address: SocketAddr,
    /// Its share, at least 1.
    pub weight: u32,
    /// Whether it takes requests.
    pub healthy: bool,
    /// TLS to it; `None` for plain TCP.
    pub tls: Option<Arc<ClientContext>>,
}

impl PartialEq for Endpoint {
    fn eq(&self, other: &Self) -> bool {
        let own = |e: &Self| {
            (
                e.address,
                e.weight,
                e.healthy,
                e.tls.as_ref().map(|t| t.fingerprint),
            )
        };
        own(self) == own(other)
    }
}

impl Eq for Endpoint {}

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

/// The order of a smooth weighted round robin over the healthy endpoints; weights are scaled down to at most
/// [`LONGEST_SCHEDULE`] steps in all.
pub fn schedule(endpoints: &[Endpoint]) -> Vec<u32> {
    let healthy: Vec<(u32, u64)> = (0u32..)
        .zip(endpoints)
        .filter(|(_, e)| e.healthy)
        .map(|(index, e)| (index, u64::from(e.weight.max(1))))
        .collect();
    if healthy.is_empty() {
        return Vec::new();
    }
    let divisor = healthy.iter().fold(0, |d, (_, w)| gcd(d, *w));
    let sum: u64 = healthy.iter().map(|(_, w)| w / divisor).sum();
    let bound = (LONGEST_SCHEDULE as u64).max(healthy.len() as u64);
    let scale = |w: u64| {
        if sum <= bound {
            w / divisor
        } else {
            (w / divisor * bound / sum).max(1)
        }
    };
    let weights: Vec<(u32, u64)> = healthy.iter().map(|(i, w)| (*i, scale(*w))).collect();
    let steps: u64 = weights.iter().map(|(_, w)| w).sum();
    if weights.iter().all(|(_, w)| *w == 1) {
        return weights.iter().map(|(index, _)| *index).collect();
    }
    smooth(&weights, steps)
}

/// Bound on the steps of one round, so that odd weights cost little memory.
pub const LONGEST_SCHEDULE: usize = 1000;

/// Earliest deadline first: entry `i` of weight `w` takes its k-th turn at time `(k + ½) / w`.
fn smooth(weights: &[(u32, u64)], steps: u64) -> Vec<u32> {
    let mut turns: Vec<(f64, u32)> = Vec::with_capacity(usize::try_from(steps).unwrap_or_default());
    for (index, weight) in weights {
        for turn in 0..*weight {
            turns.push(((turn as f64 + 0.5) / *weight as f64, *index));
        }
    }
    turns.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    turns.into_iter().map(|(_, index)| index).collect()
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
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

    fn endpoints(weights: &[u32]) -> Vec<Endpoint> {
        let address = "127.0.0.1:1".parse().unwrap();
        weights
            .iter()
            .map(|w| Endpoint {
                address,
                weight: *w,
                healthy: *w > 0,
                tls: None,
            })
            .collect()
    }

    #[test]
    fn a_schedule_follows_the_weights_and_mixes_them() {
        assert_eq!(schedule(&endpoints(&[1, 1, 1])), [0, 1, 2]);
        assert_eq!(schedule(&endpoints(&[5, 5])), [0, 1]);
        assert_eq!(schedule(&endpoints(&[2, 1])).len(), 3);
        assert_eq!(schedule(&endpoints(&[1, 0, 1])), [0, 2]);
        let nine = schedule(&endpoints(&[90, 10]));
        assert_eq!(nine.iter().filter(|i| **i == 1).count(), 1);
        assert_eq!(nine.len(), 10);
        assert!(schedule(&endpoints(&[])).is_empty());
    }

    #[test]
    fn odd_weights_stay_within_bounds() {
        let long = schedule(&endpoints(&[999_983, 1, 500_009]));
        assert!(long.len() <= LONGEST_SCHEDULE + 3);
        assert!(long.contains(&1));
    }

    #[test]
    fn a_weighted_pick_counts_exactly() {
        let split = Weighted::new([(90, 'a'), (0, 'x'), (10, 'b')]).unwrap();
        let b = (0..1000u64).filter(|r| *split.pick(*r) == 'b').count();
        assert_eq!(b, 100);
        assert!(Weighted::new([(0, 'a')]).is_none());
    }
}
