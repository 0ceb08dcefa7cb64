//! Messages into the compiled model: the only place that knows both.
//!
//! Everything arrives checked by [`super::support`], so a field read here is a field that has its effect. What remains to
//! be refused is values: an enum's other choices, addresses that do not parse, regular expressions that do not compile.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use prost::Message as _;
use prost_reflect::Value;

use dpumesh_hw::stream::kernel::SocketOptions;

use super::ConfigError;
use super::files::Service;
use super::http_filters;
use super::istio;
use super::made::Made;
use super::model::{
    ChainMatch, Cluster, ClusterKind, ClusterRef, Codec, Direction, Endpoint, FilterChain, Http2,
    HttpManager, Limits, Listener, Node, OriginalSrc, Protocol, RetryLimit, ServerHeader, TcpProxy, Terminal,
    Underscores, Weighted, cluster_ref,
};
use super::resource::Item;
use super::schema::At;
use super::translate_tls::StaticSecrets;
use super::{balancing, health, proxy_protocol, translate_matcher, translate_route};
use crate::access_log::{Sinks, Template};
use crate::balance::{Current, Picker};
use crate::http2::keepalive;
use crate::listener::{Inspectors, Matcher, Transport};
use crate::proxy_protocol::{Inbound, Outbound};
use crate::route::RouteTable;
use crate::stats::{self, Registry};
use crate::tcp::tunnel::Tunneling;
use crate::tls::ClientContext;

pub(super) type Result<T> = std::result::Result<T, ConfigError>;

const HOUR: std::time::Duration = std::time::Duration::from_secs(3600);
const FIVE_MINUTES: std::time::Duration = std::time::Duration::from_secs(300);

/// What the translation of one configuration looks things up in.
pub(super) struct Context<'a> {
    pub(super) registry: &'a Registry,
    pub(super) node: &'a Node,
    pub(super) sinks: &'a Sinks,
    /// Cluster name → index.
    pub(super) clusters: HashMap<String, usize>,
    /// The files whose resources are here already.
    pub(super) entered: HashSet<(Service, String)>,
    /// Route configurations that came by RDS, by file and name.
    pub(super) rds: HashMap<(String, String), Arc<Item>>,
    /// Endpoint assignments that came by EDS, by file and service name.
    pub(super) eds: HashMap<(String, String), Arc<Item>>,
    /// Secrets of the bootstrap.
    pub(super) secrets: StaticSecrets,
    /// What the last compilation made, and what this one has made.
    pub(super) before: &'a Made,
    pub(super) made: RefCell<Made>,
}

/// What stands for the aggregated stream among the files that resources come from.
pub(super) const ADS: &str = "ADS";

/// The file an xDS `ConfigSource` names, or [`ADS`].
pub(super) fn source_file(source: &At) -> Result<WatchedFile> {
    if source.has("ads") {
        return Ok(WatchedFile {
            path: ADS.to_owned(),
            watched_directory: None,
        });
    }
    if let Some(file) = source.message("path_config_source") {
        let folder = file.message("watched_directory").map(|d| d.text("path"));
        return Ok(WatchedFile {
            path: file.required_text("path")?,
            watched_directory: folder,
        });
    }
    let path = source.text("path");
    if path.is_empty() {
        return Err(source.refuse(
            "",
            "path_config_source or ads must be given; other management servers are not supported yet",
        ));
    }
    Ok(WatchedFile {
        path,
        watched_directory: None,
    })
}

/// A file resources are read from.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct WatchedFile {
    pub(super) path: String,
    pub(super) watched_directory: Option<String>,
}

pub(super) fn socket_address(address: &At) -> Result<SocketAddr> {
    let Some(socket) = address.message("socket_address") else {
        return Err(address.refuse("", "socket_address must be given"));
    };
    if socket.choice("protocol") != "TCP" {
        return Err(socket.refuse("protocol", "only TCP is supported yet"));
    }
    let ip: IpAddr = socket.text("address").parse().map_err(|_| {
        socket.refuse(
            "address",
            "must be an IPv4 or IPv6 address; names are not supported yet",
        )
    })?;
    let port = socket.number_or("port_value", 0);
    let port = u16::try_from(port).map_err(|_| socket.refuse("port_value", "must be at most 65535"))?;
    Ok(SocketAddr::new(ip, port))
}

/// A hash of a message's wire form; equal messages, equal hash.
pub(super) fn fingerprint(message: &At) -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    message.message.encode_to_vec().hash(&mut hasher);
    hasher.finish()
}

impl Context<'_> {
    /// A listener, with all that it needs of others.
    pub(super) fn listener(&self, item: &Arc<Item>, dynamic: bool) -> Result<Arc<Listener>> {
        let mut parts = vec![Arc::clone(item)];
        for one in item.routes()? {
            parts.extend(self.rds.get(&(one.file.path.clone(), one.name.clone())).cloned());
        }
        let name = item.at.text("name");
        let before = self.as_before(|before| before.listeners.of(&name, &parts));
        let listener = match before {
            Some(listener) => listener,
            None => self.new_listener(&item.at, dynamic)?,
        };
        self.made.borrow_mut().listeners.keep(name, parts, &listener);
        Ok(listener)
    }

    /// A cluster, with its endpoints.
    pub(super) fn cluster(&self, item: &Arc<Item>, dynamic: bool) -> Result<Arc<Cluster>> {
        let mut parts = vec![Arc::clone(item)];
        if super::dns::is_dns(&item.at) {
            let key = (super::dns::DNS.to_owned(), item.at.text("name"));
            parts.extend(self.eds.get(&key).cloned());
        }
        if let Some(one) = item.endpoints()? {
            parts.extend(self.eds.get(&(one.file.path, one.name)).cloned());
        }
        let name = item.at.text("name");
        let cluster = match self.before.clusters.of(&name, &parts) {
            Some(cluster) => cluster,
            None => self.new_cluster(&item.at, dynamic)?,
        };
        self.made.borrow_mut().clusters.keep(name, parts, &cluster);
        Ok(cluster)
    }

    fn new_listener(&self, at: &At, dynamic: bool) -> Result<Arc<Listener>> {
        let Some(address) = at.message("address") else {
            return Err(at.refuse("address", "must be given"));
        };
        let mut addresses = vec![socket_address(&address)?];
        for more in at.messages("additional_addresses") {
            let Some(address) = more.message("address") else {
                return Err(more.refuse("address", "must be given"));
            };
            addresses.push(socket_address(&address)?);
        }
        let name = Some(at.text("name"))
            .filter(|n| !n.is_empty())
            .unwrap_or_else(|| addresses[0].to_string());
        let (original_dst, original_src, proxy_protocol, inspectors) = listener_filters(at, self.registry)?;
        let chain_messages = at.messages("filter_chains");
        let default_chain = at.message("default_filter_chain");
        if chain_messages.is_empty() && default_chain.is_none() {
            return Err(at.refuse("filter_chains", "at least one filter chain must be given"));
        }
        let stat_prefix = Some(at.text("stat_prefix")).filter(|p| !p.is_empty());
        let stat_prefix = stat_prefix.unwrap_or_else(|| addresses[0].to_string().replace(':', "_"));
        let scope = format!("listener.{stat_prefix}");
        let direction = match at.choice("traffic_direction").as_str() {
            "INBOUND" => Some(Direction::Inbound),
            "OUTBOUND" => Some(Direction::Outbound),
            _ => None,
        };
        let chains = chain_messages
            .iter()
            .map(|c| self.filter_chain(c, (&scope, direction), dynamic).map(Arc::new))
            .collect::<Result<Vec<_>>>()?;
        let matcher = match at.message("filter_chain_matcher") {
            Some(tree) => Some(chain_tree(at, &tree, &chain_messages)?),
            None => {
                distinct_matches(at, &chains)?;
                None
            }
        };
        let reuse_port = at
            .flag("enable_reuse_port")
            .or_else(|| at.flag("reuse_port"))
            .unwrap_or(true);
        Ok(Arc::new(Listener {
            socket: SocketOptions {
                transparent: at.flag("transparent").unwrap_or(false),
                freebind: at.flag("freebind").unwrap_or(false),
                dual_stack: false,
                reuse_port,
                backlog: at.number_or("tcp_backlog_size", 1024).min(i32::MAX as u32),
            },
            default_chain: default_chain
                .map(|c| self.filter_chain(&c, (&scope, direction), dynamic).map(Arc::new))
                .transpose()?,
            access_log: self.access_logs(at)?,
            direction,
            fingerprint: fingerprint(at),
            frame: frame(at),
            stats: self.registry.scope(&scope, stats::Listener::TABLE),
            proxy_protocol,
            inspectors,
            matcher,
            name,
            addresses,
            original_dst,
            original_src,
            chains,
            dynamic,
        }))
    }

    /// `scope` is the listener's statistics prefix, beside its direction; a `dynamic` chain may name clusters that are still to come.
    fn filter_chain(
        &self,
        at: &At,
        (scope, direction): (&str, Option<Direction>),
        dynamic: bool,
    ) -> Result<FilterChain> {
        let filters = at.messages("filters");
        let Some((last, before)) = filters.split_last() else {
            return Err(at.refuse("filters", "a terminal filter must be given"));
        };
        let (mut certificate, mut rbac, mut rates) = (None, Vec::new(), Vec::new());
        for filter in before {
            let Some(config) = filter.any("typed_config")? else {
                return Err(filter.refuse("typed_config", "must be given"));
            };
            match config.type_name().as_str() {
                SET_FILTER_STATE => certificate = Some(certificate_name(&config)?),
                RBAC => rbac.push(super::rbac::network(&config, self.registry)?),
                LOCAL_RATE => rates.extend(super::ratelimit::network(&config, self.registry)?),
                TCP_PROXY | HTTP_MANAGER => {
                    return Err(filter.refuse(
                        "typed_config",
                        "is a terminal filter, which must be the last of its chain",
                    ));
                }
                other => {
                    return Err(config.refuse("", format!("{other} is not a network filter this proxy has")));
                }
            }
        }
        let Some(config) = last.any("typed_config")? else {
            return Err(last.refuse("typed_config", "must be given"));
        };
        let terminal = match config.type_name().as_str() {
            TCP_PROXY => Terminal::Tcp(self.tcp_proxy(&config, dynamic)?),
            HTTP_MANAGER => Terminal::Http(self.http_manager(&config, direction)?),
            other => return Err(config.refuse("", format!("{other} is not a network filter this proxy has"))),
        };
        let matcher = at
            .message("filter_chain_match")
            .map(|m| chain_match(&m))
            .transpose()?
            .unwrap_or_default();
        Ok(FilterChain {
            name: at.text("name"),
            matcher,
            fingerprint: fingerprint(at),
            tls: self.server_context(at, scope, speaks_http2(&terminal))?,
            certificate,
            rates,
            rbac,
            terminal,
        })
    }

    fn tcp_proxy(&self, at: &At, dynamic: bool) -> Result<Arc<TcpProxy>> {
        let prefix = at.required_text("stat_prefix")?;
        let clusters = match at.message("weighted_clusters") {
            Some(weighted) => {
                let entries = weighted.messages("clusters");
                let split = entries
                    .iter()
                    .map(|c| Ok((c.number_or("weight", 0), self.known_cluster(c, "name", dynamic)?)))
                    .collect::<Result<Vec<_>>>()?;
                Weighted::new(split)
                    .ok_or_else(|| weighted.refuse("clusters", "the weights must not sum up to 0"))?
            }
            None => Weighted::new([(1, self.known_cluster(at, "cluster", dynamic)?)])
                .expect("one entry of weight 1"),
        };
        let idle = at.duration("idle_timeout")?.unwrap_or(HOUR);
        Ok(Arc::new(TcpProxy {
            clusters,
            idle_timeout: (!idle.is_zero()).then_some(idle),
            max_connect_attempts: at.number_or("max_connect_attempts", 1).max(1),
            hash_source_ip: balancing::hashes_source_ip(at)?,
            tunneling: at
                .message("tunneling_config")
                .map(|t| tunneling(&t))
                .transpose()?,
            access_log: self.access_logs(at)?,
            stats: self.registry.scope(&format!("tcp.{prefix}"), stats::Tcp::TABLE),
        }))
    }

    fn http_manager(&self, at: &At, direction: Option<Direction>) -> Result<Arc<HttpManager>> {
        let prefix = at.required_text("stat_prefix")?;
        let codec = match at.choice("codec_type").as_str() {
            "AUTO" => Codec::Auto,
            "HTTP1" => Codec::Http1,
            "HTTP2" => Codec::Http2,
            other => return Err(at.refuse("codec_type", format!("{other} is not supported yet"))),
        };
        let policy = http_filters::policy(at, &prefix, self.registry, &self.clusters)?;
        let common = at.message("common_http_protocol_options");
        let common = common.unwrap_or_else(|| At::new(empty("envoy.config.core.v3.HttpProtocolOptions"), ""));
        let http1 = at.message("http_protocol_options");
        let http1 = http1.unwrap_or_else(|| At::new(empty("envoy.config.core.v3.Http1ProtocolOptions"), ""));
        let underscores = match common.choice("headers_with_underscores_action").as_str() {
            "REJECT_REQUEST" => Underscores::Reject,
            "DROP_HEADER" => Underscores::Drop,
            _ => Underscores::Allow,
        };
        let server_header = match at.choice("server_header_transformation").as_str() {
            "APPEND_IF_ABSENT" => ServerHeader::AppendIfAbsent,
            "PASS_THROUGH" => ServerHeader::PassThrough,
            _ => ServerHeader::Overwrite,
        };
        let server_name = Some(at.text("server_name"))
            .filter(|n| !n.is_empty())
            .unwrap_or_else(|| "envoy".to_owned());
        if !crate::route::is_value(server_name.as_bytes()) {
            return Err(at.refuse("server_name", "is not a valid header value"));
        }
        let max_kib = at.number_or("max_request_headers_kb", 60);
        if max_kib > 8192 {
            return Err(at.refuse("max_request_headers_kb", "must be at most 8192"));
        }
        Ok(Arc::new(HttpManager {
            tracing: super::tracing::tracing(
                at,
                &prefix,
                direction,
                self.node,
                (self.registry, &self.clusters),
            )?,
            routes: self.routes(at, &prefix)?,
            server_name,
            server_header,
            idle_timeout: Some(common.duration("idle_timeout")?.unwrap_or(HOUR)).filter(|d| !d.is_zero()),
            max_stream_duration: common.duration("max_stream_duration")?.filter(|d| !d.is_zero()),
            headers_timeout: at.duration("request_headers_timeout")?.filter(|d| !d.is_zero()),
            stream_idle_timeout: Some(at.duration("stream_idle_timeout")?.unwrap_or(FIVE_MINUTES))
                .filter(|d| !d.is_zero()),
            max_head: max_kib as usize * 1024,
            max_headers: common.number_or("max_headers_count", 100) as usize,
            codec,
            http2: http2_limits(at.message("http2_protocol_options").as_ref())?,
            max_requests: u64::from(common.number_or("max_requests_per_connection", 0)),
            underscores,
            generate_request_id: at.flag("generate_request_id").unwrap_or(true),
            request_id_in_response: at.flag("always_set_request_id_in_response").unwrap_or(false),
            accept_http_10: http1.flag("accept_http_10").unwrap_or(false),
            default_host_http_10: Some(http1.text("default_host_for_http_10")).filter(|h| !h.is_empty()),
            policy,
            access_log: self.access_logs(at)?,
            stats: self.registry.scope(&format!("http.{prefix}"), stats::Http::TABLE),
        }))
    }

    fn routes(&self, at: &At, prefix: &str) -> Result<Arc<RouteTable>> {
        if let Some(inline) = at.message("route_config") {
            return Ok(Arc::new(translate_route::table(
                &inline,
                &self.clusters,
                self.registry,
                true,
            )?));
        }
        let Some(rds) = at.message("rds") else {
            return Err(at.refuse("route_config", "route_config or rds must be given"));
        };
        let Some(source) = rds.message("config_source") else {
            return Err(rds.refuse("config_source", "must be given"));
        };
        let file = source_file(&source)?;
        let name = rds.text("route_config_name");
        self.registry
            .scope(&format!("http.{prefix}.rds.{name}"), stats::Subscription::TABLE);
        let Some(resource) = self.rds.get(&(file.path.clone(), name.clone())) else {
            return Err(rds.refuse(
                "route_config_name",
                format!("{} has no route configuration {name:?}", file.path),
            ));
        };
        let (key, parts) = ((file.path, name), [Arc::clone(resource)]);
        let already = self.made.borrow().tables.of(&key, &parts);
        let table = match already.or_else(|| self.as_before(|before| before.tables.of(&key, &parts))) {
            Some(table) => table,
            None => Arc::new(
                translate_route::table(&resource.at, &self.clusters, self.registry, false).map_err(|e| {
                    let e = e.in_resource(format!("route configuration {:?}", key.1));
                    if key.0 == ADS { e } else { e.in_file(&key.0) }
                })?,
            ),
        };
        self.made.borrow_mut().tables.keep(key, parts.to_vec(), &table);
        Ok(table)
    }

    /// What the last compilation made that points to clusters, if they are the same ones in the same order.
    fn as_before<T>(&self, find: impl Fn(&Made) -> Option<T>) -> Option<T> {
        let same = self.before.order == self.made.borrow().order;
        if same { find(self.before) } else { None }
    }

    fn known_cluster(&self, at: &At, field: &str, dynamic: bool) -> Result<ClusterRef> {
        let name = at.required_text(field)?;
        let cluster = cluster_ref(&name, &self.clusters);
        if cluster.index.is_none() && !dynamic {
            return Err(at.refuse(field, format!("unknown cluster {name:?}")));
        }
        Ok(cluster)
    }

    fn new_cluster(&self, at: &At, dynamic: bool) -> Result<Arc<Cluster>> {
        let name = at.required_text("name")?;
        let (kind, assignment) = self.cluster_kind(at, &name)?;
        let mut spread = balancing::spread(at, &kind, assignment.as_ref())?;
        let check = health::check(at)?;
        let stat_name = Some(at.text("alt_stat_name"))
            .filter(|n| !n.is_empty())
            .unwrap_or_else(|| name.clone());
        let scope = format!("cluster.{stat_name}");
        let sockets = Sockets::read(self, at, &scope)?;
        let endpoints = match &assignment {
            Some(assignment) => balancing::endpoints(
                assignment,
                &sockets,
                &mut spread,
                &self.states(&name, at, check.is_some()),
            )
            .map_err(|e| match kind {
                ClusterKind::Eds => e.in_resource(format!(
                    "endpoint assignment {:?}",
                    assignment.text("cluster_name")
                )),
                _ => e,
            })?,
            None => Vec::new(),
        };
        if kind == ClusterKind::OriginalDst && !endpoints.is_empty() {
            return Err(at.refuse("load_assignment", "must not be given for an ORIGINAL_DST cluster"));
        }
        let by_pod = |e: &Endpoint| e.tls.as_ref().is_some_and(|tls| tls.by_pod());
        if check.is_some() && endpoints.iter().any(by_pod) {
            return Err(at.refuse(
                "health_checks",
                "checks have no pod whose certificate they could show; they are not supported yet with an on_demand_secret selector",
            ));
        }
        let (options, protocol, http2) = cluster_http_options(at)?;
        let common = options.or_else(|| at.message("common_http_protocol_options"));
        let idle = common
            .as_ref()
            .map(|c| c.duration("idle_timeout"))
            .transpose()?
            .flatten()
            .unwrap_or(HOUR);
        let max_stream_duration = common.as_ref().map(|c| c.duration("max_stream_duration"));
        let max_requests = common
            .as_ref()
            .and_then(|c| c.number("max_requests_per_connection"));
        let max_requests = max_requests
            .or_else(|| at.number("max_requests_per_connection"))
            .unwrap_or(0);
        if let Some(common) = &common {
            for field in ["max_headers_count", "headers_with_underscores_action"] {
                if common.has(field) {
                    return Err(common.refuse(field, "is not supported for clusters yet"));
                }
            }
        }
        let connect_timeout = at
            .duration("connect_timeout")?
            .unwrap_or(std::time::Duration::from_secs(5));
        if connect_timeout.is_zero() {
            return Err(at.refuse("connect_timeout", "must be greater than 0s"));
        }
        Ok(Arc::new(Cluster {
            stats: self.registry.scope(&scope, stats::Cluster::TABLE),
            tls: sockets.of(&[]).tls,
            header: sockets.of(&[]).header,
            original_header: original_header(at)?,
            service: istio::service(at),
            workloads: istio::workloads(at, &self.registry.istio)?,
            name,
            kind,
            connect_timeout,
            idle_timeout: (!idle.is_zero()).then_some(idle),
            max_requests_per_connection: max_requests,
            max_stream_duration: max_stream_duration
                .transpose()?
                .flatten()
                .filter(|d| !d.is_zero()),
            limits: limits(at)?,
            retrying: Arc::default(),
            protocol,
            http2_stats: http2.keepalive.map(|_| {
                self.registry
                    .scope(&format!("{scope}.http2"), stats::ClusterHttp2::TABLE)
            }),
            http2,
            picker: Current::new(Picker::new(&spread, &endpoints, std::time::Instant::now())),
            spread,
            outlier: match at.message("outlier_detection") {
                Some(detection) => {
                    let stats = format!("{scope}.outlier_detection");
                    let stats = self.registry.scope(&stats, stats::Outlier::TABLE);
                    Some((health::detection(&detection)?, stats))
                }
                None => None,
            },
            check: check.map(|check| {
                let stats = format!("{scope}.health_check");
                (check, self.registry.scope(&stats, stats::HealthCheck::TABLE))
            }),
            endpoints,
            dynamic,
        }))
    }

    /// What is known of the health of the endpoints, while the cluster itself is what it was.
    fn states(&self, name: &String, at: &At, checked: bool) -> balancing::States {
        let known = match self.before.clusters.last(name) {
            Some(([item, ..], before)) if item.at.message == at.message => {
                let known = before.endpoints.iter();
                known.map(|e| (e.address, Arc::clone(&e.state))).collect()
            }
            _ => HashMap::new(),
        };
        balancing::States { known, checked }
    }

    fn cluster_kind(&self, at: &At, name: &str) -> Result<(ClusterKind, Option<At>)> {
        match at.choice("type").as_str() {
            "STATIC" => Ok((ClusterKind::Static, at.message("load_assignment"))),
            "ORIGINAL_DST" => Ok((ClusterKind::OriginalDst, at.message("load_assignment"))),
            "EDS" => {
                let Some(eds) = at.message("eds_cluster_config") else {
                    return Err(at.refuse("eds_cluster_config", "must be given for an EDS cluster"));
                };
                let Some(source) = eds.message("eds_config") else {
                    return Err(eds.refuse("eds_config", "must be given"));
                };
                let service = Some(eds.text("service_name")).filter(|s| !s.is_empty());
                let key = (
                    source_file(&source)?.path,
                    service.unwrap_or_else(|| name.to_owned()),
                );
                let found = self.eds.get(&key);
                Ok((ClusterKind::Eds, found.map(|item| item.at.clone())))
            }
            kind @ ("STRICT_DNS" | "LOGICAL_DNS") => {
                let found = self.eds.get(&(super::dns::DNS.to_owned(), name.to_owned()));
                let kind = if kind == "STRICT_DNS" {
                    ClusterKind::StrictDns
                } else {
                    ClusterKind::LogicalDns
                };
                Ok((kind, found.map(|item| item.at.clone())))
            }
            other => Err(at.refuse("type", format!("{other} is not supported yet"))),
        }
    }
}

/// `TunnelingConfig`.
fn tunneling(at: &At) -> Result<Tunneling> {
    if at.flag("use_post") == Some(true) {
        return Err(at.refuse("use_post", "true is not supported yet"));
    }
    let host = Template::new(&at.required_text("hostname")?).map_err(|e| at.refuse("hostname", e))?;
    let headers = at.messages("headers_to_add");
    Ok(Tunneling {
        host,
        headers: headers
            .iter()
            .map(translate_route::add_header)
            .collect::<Result<_>>()?,
    })
}

/// The header that says the original destination, where one does.
fn original_header(at: &At) -> Result<Option<Vec<u8>>> {
    let Some(config) = at.message("original_dst_lb_config") else {
        return Ok(None);
    };
    if config.flag("use_http_header") != Some(true) {
        return Ok(None);
    }
    let name = config.text("http_header_name").to_ascii_lowercase();
    if name.is_empty() {
        return Ok(Some(b"x-envoy-original-dst-host".to_vec()));
    }
    let bare = name.strip_prefix(':').unwrap_or(&name);
    if bare.is_empty() || !bare.bytes().all(crate::http1::is_token) {
        return Err(config.refuse("http_header_name", "is not the name of a header"));
    }
    Ok(Some(name.into_bytes()))
}

/// An unset message of a type the schema has.
fn empty(full_name: &str) -> prost_reflect::DynamicMessage {
    prost_reflect::DynamicMessage::new(
        super::schema::message(full_name).expect("a type of the checked-in set"),
    )
}

const TCP_PROXY: &str = "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy";
const HTTP_MANAGER: &str =
    "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
const LOCAL_RATE: &str = "envoy.extensions.filters.network.local_ratelimit.v3.LocalRateLimit";
const RBAC: &str = "envoy.extensions.filters.network.rbac.v3.RBAC";
const SET_FILTER_STATE: &str = "envoy.extensions.filters.network.set_filter_state.v3.Config";

/// The one key of filter state that a network filter may set: whose certificate upstream TLS shows.
const CERTIFICATE_KEY: &str = "envoy.tls.certificate_mappers.on_demand_secret";

/// What `set_filter_state` says for [`CERTIFICATE_KEY`].
fn certificate_name(at: &At) -> Result<Arc<str>> {
    let values = at.messages("on_new_connection");
    let [value] = values.as_slice() else {
        return Err(at.refuse("on_new_connection", "exactly one value is supported yet"));
    };
    if value.text("object_key") != CERTIFICATE_KEY {
        return Err(value.refuse("object_key", format!("only {CERTIFICATE_KEY} is supported yet")));
    }
    plain_format(value).map(Into::into)
}

/// A `format_string` without operators: what it writes.
pub(super) fn plain_format(value: &At) -> Result<String> {
    let Some(format) = value.message("format_string") else {
        return Err(value.refuse("format_string", "must be given"));
    };
    let text = match format.message("text_format_source") {
        Some(source) => String::from_utf8(translate_route::data_source(&source)?)
            .map_err(|_| source.refuse("", "must be UTF-8"))?,
        None => format.text("text_format"),
    };
    let plain = text.replace("%%", "");
    if plain.contains('%') || plain.is_empty() && text.is_empty() {
        return Err(format.refuse(
            "text_format_source",
            "only text without operators is supported yet",
        ));
    }
    Ok(text.replace("%%", "%"))
}

const ORIGINAL_DST: &str = "envoy.extensions.filters.listener.original_dst.v3.OriginalDst";

/// `original_dst`, `original_src`, `proxy_protocol`, and the inspectors.
type ListenerFilters = (bool, Option<OriginalSrc>, Option<Inbound>, Inspectors);

/// Whether a chain may agree on HTTP/2 in TLS.
fn speaks_http2(terminal: &Terminal) -> bool {
    match terminal {
        Terminal::Http(manager) => manager.codec != Codec::Http1,
        Terminal::Tcp(_) => true,
    }
}

/// Of a listener without its chains and what chooses among them.
fn frame(at: &At) -> u64 {
    let mut message = at.message.clone();
    for field in ["filter_chains", "default_filter_chain", "filter_chain_matcher"] {
        message.clear_field_by_name(field);
    }
    fingerprint(&At::new(message, ""))
}

fn distinct_matches(at: &At, chains: &[Arc<FilterChain>]) -> Result<()> {
    for (index, chain) in chains.iter().enumerate() {
        if chains[..index].iter().any(|c| c.matcher == chain.matcher) {
            let path = format!("{}[{index}].filter_chain_match", at.path_of("filter_chains"));
            return Err(ConfigError::new(
                path,
                "the same match as an earlier filter chain",
            ));
        }
    }
    Ok(())
}

fn chain_tree(at: &At, tree: &At, chains: &[At]) -> Result<Matcher<usize>> {
    let mut names = HashMap::new();
    for (index, chain) in chains.iter().enumerate() {
        if chain.has("filter_chain_match") {
            return Err(chain.refuse("filter_chain_match", "does not go with filter_chain_matcher"));
        }
        if names.insert(chain.required_text("name")?, index).is_some() {
            return Err(chain.refuse("name", "appears twice"));
        }
    }
    if at.messages("filter_chains").is_empty() {
        return Err(at.refuse("filter_chains", "must be given"));
    }
    translate_matcher::matcher(tree, &names)
}

fn listener_filters(at: &At, registry: &Registry) -> Result<ListenerFilters> {
    let (mut original_dst, mut original_src, mut proxy_header) = (false, None, None);
    let mut inspectors = Inspectors {
        timeout: Some(
            at.duration("listener_filters_timeout")?
                .unwrap_or(std::time::Duration::from_secs(15)),
        )
        .filter(|t| !t.is_zero()),
        goes_on: at.flag("continue_on_listener_filters_timeout").unwrap_or(false),
        ..Inspectors::default()
    };
    for filter in at.messages("listener_filters") {
        let config = filter.any("typed_config")?;
        let kind = config.as_ref().map(At::type_name);
        let name = filter.text("name");
        let inspects = |inspector: &str| name == format!("envoy.filters.listener.{inspector}");
        if kind.as_deref() == Some("envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector")
            || (kind.is_none() && inspects("tls_inspector"))
        {
            inspectors.tls = Some(translate_matcher::disabled(&filter)?);
            continue;
        }
        if kind.as_deref() == Some("envoy.extensions.filters.listener.http_inspector.v3.HttpInspector")
            || (kind.is_none() && inspects("http_inspector"))
        {
            inspectors.http = Some(translate_matcher::disabled(&filter)?);
            continue;
        }
        if kind.as_deref() == Some(proxy_protocol::LISTENER_FILTER)
            || (kind.is_none() && inspects("proxy_protocol"))
        {
            if filter.has("filter_disabled") {
                return Err(filter.refuse("filter_disabled", "goes with inspectors only"));
            }
            // Each filter sees what the ones before it left.
            if proxy_header.is_some()
                || original_src.is_some()
                || inspectors.tls.is_some()
                || inspectors.http.is_some()
            {
                return Err(filter.refuse(
                    "",
                    "proxy_protocol must stand once, before original_src and inspectors",
                ));
            }
            proxy_header = Some(proxy_protocol::inbound(config.as_ref(), registry)?);
            continue;
        }
        if filter.has("filter_disabled") {
            return Err(filter.refuse("filter_disabled", "goes with inspectors only"));
        }
        let is_original_dst =
            kind.as_deref() == Some(ORIGINAL_DST) || (kind.is_none() && inspects("original_dst"));
        if is_original_dst && proxy_header.is_some() {
            return Err(filter.refuse("", "original_dst must stand before proxy_protocol"));
        }
        match (kind.as_deref(), name.as_str()) {
            (Some(ORIGINAL_DST), _) | (None, "envoy.filters.listener.original_dst") => original_dst = true,
            (Some("envoy.extensions.filters.listener.original_src.v3.OriginalSrc"), _) => {
                original_src = config.map(|c| OriginalSrc {
                    mark: c.number_or("mark", 0),
                });
            }
            (None, "envoy.filters.listener.original_src") => original_src = Some(OriginalSrc { mark: 0 }),
            (_, name) => {
                return Err(filter.refuse("", format!("listener filter {name} is not supported yet")));
            }
        }
    }
    Ok((original_dst, original_src, proxy_header, inspectors))
}

fn chain_match(at: &At) -> Result<ChainMatch> {
    let destination_port = match at.number("destination_port") {
        None => None,
        Some(port) => match u16::try_from(port) {
            Ok(port) if port > 0 => Some(port),
            _ => return Err(at.refuse("destination_port", "must be between 1 and 65535")),
        },
    };
    let prefixes = |field: &str| at.messages(field).iter().map(cidr).collect::<Result<Vec<_>>>();
    let ports = at
        .numbers("source_ports")
        .into_iter()
        .map(u16::try_from)
        .collect::<std::result::Result<_, _>>();
    Ok(ChainMatch {
        destination_port,
        destination: prefixes("prefix_ranges")?,
        server_names: at
            .texts("server_names")
            .iter()
            .map(|n| n.to_ascii_lowercase())
            .collect(),
        transport: match at.text("transport_protocol").as_str() {
            "" => None,
            "raw_buffer" => Some(Transport::Raw),
            "tls" => Some(Transport::Tls),
            other => {
                return Err(at.refuse(
                    "transport_protocol",
                    format!("{other:?} is no transport known here"),
                ));
            }
        },
        protocols: at.texts("application_protocols"),
        source: prefixes("source_prefix_ranges")?,
        source_ports: ports.map_err(|_| at.refuse("source_ports", "must be at most 65535"))?,
    })
}

pub(super) fn cidr(at: &At) -> Result<ipnet::IpNet> {
    let ip: IpAddr = at
        .text("address_prefix")
        .parse()
        .map_err(|_| at.refuse("address_prefix", "must be an IP address"))?;
    let length = u8::try_from(at.number_or("prefix_len", 0)).unwrap_or(u8::MAX);
    let net = ipnet::IpNet::new(ip, length).map_err(|e| at.refuse("prefix_len", e.to_string()))?;
    Ok(net.trunc())
}

/// Limits of HTTP/2 connections.
fn http2_limits(at: Option<&At>) -> Result<Http2> {
    let mut limits = Http2::default();
    let Some(at) = at else {
        return Ok(limits);
    };
    let window = |field: &str, otherwise: u32| -> Result<u32> {
        let size = at.number_or(field, otherwise);
        if (65_535..=0x7fff_ffff).contains(&size) {
            Ok(size)
        } else {
            Err(at.refuse(field, "must be between 65535 and 2147483647"))
        }
    };
    limits.streams = at.number_or("max_concurrent_streams", limits.streams);
    if !(1..=0x7fff_ffff).contains(&limits.streams) {
        return Err(at.refuse("max_concurrent_streams", "must be between 1 and 2147483647"));
    }
    limits.stream_window = window("initial_stream_window_size", limits.stream_window)?;
    limits.connection_window = window("initial_connection_window_size", limits.connection_window)?;
    limits.connect = at.flag("allow_connect").unwrap_or(false);
    limits.keepalive = match at.message("connection_keepalive") {
        Some(keepalive) => keepalive_settings(&keepalive)?,
        None => None,
    };
    Ok(limits)
}

/// PINGs of HTTP/2 connections; none without an interval.
fn keepalive_settings(at: &At) -> Result<Option<keepalive::Settings>> {
    let least = std::time::Duration::from_millis(1);
    let timeout = at
        .duration("timeout")?
        .ok_or_else(|| at.refuse("timeout", "must be given"))?;
    let interval = at.duration("interval")?;
    for (field, given) in [("timeout", Some(timeout)), ("interval", interval)] {
        if given.is_some_and(|given| given < least) {
            return Err(at.refuse(field, "must be at least 0.001s"));
        }
    }
    let jitter = at.message("interval_jitter");
    let jitter = jitter.and_then(|percent| percent.message.get_field_by_name("value")?.as_f64());
    let jitter = jitter.unwrap_or(15.0);
    if !(0.0..=100.0).contains(&jitter) {
        return Err(at.refuse("interval_jitter.value", "must be between 0 and 100"));
    }
    Ok(interval.map(|interval| keepalive::Settings {
        interval,
        timeout,
        jitter: (jitter * 10.0) as u32,
    }))
}

/// The common options, what the endpoints speak, and the limits of HTTP/2.
fn cluster_http_options(at: &At) -> Result<(Option<At>, Protocol, Http2)> {
    let (mut common, mut protocol, mut http2) = (None, Protocol::Http1, None);
    if let Some(own) = at.message("http2_protocol_options") {
        (protocol, http2) = (Protocol::Http2, Some(own));
    }
    for (key, options) in at.any_map("typed_extension_protocol_options")? {
        if key != "envoy.extensions.upstreams.http.v3.HttpProtocolOptions" {
            return Err(options.refuse("", format!("{key} is not supported yet")));
        }
        if let Some(explicit) = options.message("explicit_http_config") {
            http2 = explicit.message("http2_protocol_options");
            protocol = if http2.is_some() {
                Protocol::Http2
            } else {
                Protocol::Http1
            };
            if http2.is_none() && !explicit.has("http_protocol_options") {
                return Err(explicit.refuse(
                    "",
                    "http_protocol_options or http2_protocol_options must be given",
                ));
            }
        } else if let Some(downstream) = options.message("use_downstream_protocol_config") {
            protocol = Protocol::Downstream;
            http2 = downstream.message("http2_protocol_options");
        } else if let Some(auto) = options.message("auto_config") {
            protocol = Protocol::Auto;
            http2 = auto.message("http2_protocol_options");
        } else {
            return Err(options.refuse(
                "",
                "explicit_http_config, use_downstream_protocol_config or auto_config must be given",
            ));
        }
        common = options.message("common_http_protocol_options");
    }
    if let Some(own) = http2
        .as_ref()
        .filter(|own| own.flag("allow_connect") == Some(true))
    {
        return Err(own.refuse("allow_connect", "true is not supported for clusters yet"));
    }
    Ok((common, protocol, http2_limits(http2.as_ref())?))
}

fn limits(at: &At) -> Result<Limits> {
    let mut limits = Limits {
        max_connections: 1024,
        max_pending: 1024,
        max_requests: 1024,
        retries: RetryLimit::Fixed(3),
    };
    for threshold in at
        .message("circuit_breakers")
        .iter()
        .flat_map(|b| b.messages("thresholds"))
    {
        if threshold.choice("priority") != "DEFAULT" {
            return Err(threshold.refuse("priority", "only DEFAULT is supported yet"));
        }
        limits.max_connections = threshold.number_or("max_connections", limits.max_connections);
        limits.max_pending = threshold.number_or("max_pending_requests", limits.max_pending);
        limits.max_requests = threshold.number_or("max_requests", limits.max_requests);
        limits.retries = RetryLimit::Fixed(threshold.number_or("max_retries", 3));
        if let Some(budget) = threshold.message("retry_budget") {
            let share = match budget.message("budget_percent") {
                Some(percent) => (balancing::percent(&percent)? * 100.0).round() as u32,
                None => 2_000,
            };
            limits.retries = RetryLimit::Budget {
                share,
                least: budget.number_or("min_retry_concurrency", 3),
            };
        }
    }
    Ok(limits)
}

/// Fields of a `google.protobuf.Struct`.
pub(super) type Fields = Vec<(String, Value)>;

/// What an endpoint's connections begin with.
#[derive(Debug, Clone, Default)]
pub(super) struct Way {
    /// TLS; `None` for plain TCP.
    pub(super) tls: Option<Arc<ClientContext>>,
    /// A PROXY header before it.
    pub(super) header: Option<Arc<Outbound>>,
}

/// `transport_socket_matches` and `transport_socket`.
pub(super) struct Sockets {
    matches: Vec<(Fields, Way)>,
    otherwise: Way,
}

impl Sockets {
    fn read(context: &Context<'_>, at: &At, scope: &str) -> Result<Self> {
        let mut matches = Vec::new();
        for entry in at.messages("transport_socket_matches") {
            let Some(socket) = entry.message("transport_socket") else {
                return Err(entry.refuse("transport_socket", "must be given"));
            };
            let wanted = entry.message("match").map(|m| fields(&m)).unwrap_or_default();
            matches.push((wanted, context.way(&socket, scope)?));
        }
        let otherwise = match at.message("transport_socket") {
            Some(socket) => context.way(&socket, scope)?,
            None => Way::default(),
        };
        Ok(Self { matches, otherwise })
    }

    /// That of an `LbEndpoint`.
    pub(super) fn of_endpoint(&self, entry: &At) -> Way {
        self.of(&metadata(entry, "envoy.transport_socket_match"))
    }

    /// That of the first match whose every field `metadata` has.
    fn of(&self, metadata: &[(String, Value)]) -> Way {
        let fits = |wanted: &[(String, Value)]| wanted.iter().all(|field| metadata.contains(field));
        match self.matches.iter().find(|(wanted, _)| fits(wanted)) {
            Some((_, found)) => found.clone(),
            None => self.otherwise.clone(),
        }
    }
}

/// The fields of a `google.protobuf.Struct`.
pub(super) fn fields(at: &At) -> Vec<(String, Value)> {
    let value = at.message.get_field_by_name("fields");
    let Some(Value::Map(map)) = value.as_deref() else {
        return Vec::new();
    };
    let field =
        |(key, value): (&prost_reflect::MapKey, &Value)| Some((key.as_str()?.to_owned(), value.clone()));
    map.iter().filter_map(field).collect()
}

/// What the metadata of an endpoint or cluster says under `key`.
pub(super) fn metadata(entry: &At, key: &str) -> Fields {
    let Some(metadata) = entry.message("metadata") else {
        return Vec::new();
    };
    let value = metadata.message.get_field_by_name("filter_metadata");
    let Some(Value::Map(map)) = value.as_deref() else {
        return Vec::new();
    };
    match map.iter().find(|(k, _)| k.as_str() == Some(key)) {
        Some((_, Value::Message(message))) => fields(&At::new(message.clone(), "")),
        _ => Vec::new(),
    }
}
