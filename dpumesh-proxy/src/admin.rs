//! The admin server: Envoy's paths, on the control thread.
//!
//! Speaks HTTP/1.1 by the proxy's own parser. What changes something is POST only. There is no authentication, as in
//! Envoy: bind it to an address only operators reach.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::SystemTime;

use base64::Engine as _;
use regex::Regex;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::access_log::timestamp;
use crate::closing::Which;
use crate::config::dump::Shown;
use crate::config::model::{Balance, ClusterKind, Config, Endpoint};
use crate::health::{self, Eds};
use crate::histogram::QUANTILES;
use crate::http1::head::{Framing, RequestHead, Scan};
use crate::http1::reply;
use crate::levels;
use crate::program::{Refused, Shared, State};
use crate::stats::{self, Kind, Shard};
use crate::tls::secrets::{Listed, Secrets as _};

const LARGEST_HEAD: usize = 16 * 1024;

/// Every path: name, method, what it does.
const PATHS: &[(&str, &str, &str)] = &[
    ("/clusters", "GET", "upstream cluster status (?format=json)"),
    (
        "/config_dump",
        "GET",
        "the configuration in force, and updates refused since (?include_eds, ?resource=FIELD, ?name_regex=RE)",
    ),
    (
        "/drain_listeners",
        "POST",
        "close all listeners' sockets (?inboundonly; ?graceful: have their connections end first, for the drain time; &skip_exit: no more than that)",
    ),
    (
        "/healthcheck/fail",
        "POST",
        "out of service: /ready fails, connections end with their next response",
    ),
    ("/healthcheck/ok", "POST", "back in service"),
    ("/help", "GET", "print this list"),
    (
        "/ingress",
        "GET",
        "connections by the port of the dataplane that they came in by (?format=json)",
    ),
    ("/listeners", "GET", "listener addresses (?format=json)"),
    (
        "/logging",
        "POST",
        "show levels of the log; change all (?level=LEVEL) or some (?NAME=LEVEL, ?paths=NAME:LEVEL,…)",
    ),
    ("/quitquitquit", "POST", "drain and exit"),
    ("/ready", "GET", "LIVE with 200, otherwise the state with 503"),
    ("/reopen_logs", "POST", "open access log files anew"),
    ("/reset_counters", "POST", "set all counters to zero"),
    ("/server_info", "GET", "version, state, command line, node"),
    (
        "/stats",
        "GET",
        "counters, gauges, histograms (?usedonly, ?filter=RE, ?type=Counters|Gauges|Histograms, ?format=json|prometheus)",
    ),
    (
        "/stats/prometheus",
        "GET",
        "the same for Prometheus, and Istio's metrics of all pods (?usedonly), or of one (?pod=NAME.NAMESPACE)",
    ),
];

/// Serves until the listener's thread ends.
pub(crate) async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    let listener = match tokio::net::TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(%error, "the admin server was lost");
            return;
        }
    };
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                tokio::task::spawn_local(connection(stream, Arc::clone(&shared)));
            }
            Err(error) => {
                tracing::warn!(%error, "admin: accept failed");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    }
}

async fn connection(mut stream: TcpStream, shared: Arc<Shared>) {
    let mut data = Vec::new();
    let mut head = RequestHead::default();
    loop {
        let mut scan = Scan::default();
        let length = loop {
            match scan.find(&data) {
                Ok(Some(length)) => break length,
                Ok(None) if data.len() <= LARGEST_HEAD => {}
                _ => return,
            }
            match stream.read_buf(&mut data).await {
                Ok(n) if n > 0 => {}
                _ => return,
            }
        };
        let parsed = head.parse(&mut data[..length]);
        let text = &data[..length];
        let (answer, keep) = match parsed {
            Err(refusal) => (Answer::text(400, format!("{refusal}\n")), false),
            Ok(()) => {
                let keep = head.fields.persistent() && head.fields.framing == Framing::None;
                let target = String::from_utf8_lossy(head.path.of_head(text)).into_owned();
                let method = head.method.of_head(text).to_vec();
                (answer(&shared, &method, &target), keep)
            }
        };
        let is_head = parsed.is_ok() && head.method.of_head(text) == b"HEAD";
        data.drain(..length);
        if stream.write_all(&answer.bytes(keep, is_head)).await.is_err() || !keep {
            let _ = stream.shutdown().await;
            return;
        }
    }
}

struct Answer {
    status: u16,
    kind: &'static str,
    body: String,
}

impl Answer {
    fn text(status: u16, body: impl Into<String>) -> Self {
        Self {
            status,
            kind: "text/plain; charset=UTF-8",
            body: body.into(),
        }
    }

    fn json(value: &Value) -> Self {
        let body = serde_json::to_string_pretty(value).unwrap_or_default();
        Self {
            status: 200,
            kind: "application/json",
            body,
        }
    }

    fn bytes(&self, keep: bool, is_head: bool) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.body.len() + 256);
        reply::status_line(self.status, &mut out);
        reply::header(b"content-type", self.kind.as_bytes(), &mut out);
        reply::header(b"cache-control", b"no-cache, max-age=0", &mut out);
        reply::header(b"x-content-type-options", b"nosniff", &mut out);
        reply::header(
            b"date",
            httpdate::fmt_http_date(SystemTime::now()).as_bytes(),
            &mut out,
        );
        reply::header(b"server", b"envoy", &mut out);
        reply::header_number(b"content-length", self.body.len() as u64, &mut out);
        if !keep {
            reply::header(b"connection", b"close", &mut out);
        }
        out.extend_from_slice(b"\r\n");
        if !is_head {
            out.extend_from_slice(self.body.as_bytes());
        }
        out
    }
}

fn answer(shared: &Arc<Shared>, method: &[u8], target: &str) -> Answer {
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let query = Query(query);
    let path = if path == "/" { "/help" } else { path };
    let Some((_, wanted, _)) = PATHS.iter().find(|(p, ..)| *p == path) else {
        return Answer::text(404, format!("invalid path. {}", help()));
    };
    if *wanted == "POST" && method != b"POST" {
        return Answer::text(405, "Method Not Allowed");
    }
    let config = shared.config.load_full();
    match path {
        "/ready" => {
            let state = shared.state();
            Answer::text(if state == State::Live { 200 } else { 503 }, format!("{state}\n"))
        }
        "/stats" => self::stats(shared, &query),
        "/stats/prometheus" => Answer::text(200, prometheus(shared, &query)),
        "/config_dump" => config_dump(&config, &shared.refused(), &shared.secrets.list(), &query),
        "/clusters" => clusters(&config, &query),
        "/ingress" => ingress(shared, &query),
        "/listeners" => listeners(shared, &query),
        "/server_info" => Answer::json(&server_info(shared, &config)),
        "/quitquitquit" => {
            shared.quit();
            Answer::text(200, "OK\n")
        }
        "/drain_listeners" => drain_listeners(shared, &query),
        "/healthcheck/fail" | "/healthcheck/ok" => {
            shared.closing.fail_health(path == "/healthcheck/fail");
            Answer::text(200, "OK\n")
        }
        "/logging" => logging(&query),
        "/reset_counters" => {
            shared.registry.reset_counters();
            Answer::text(200, "OK\n")
        }
        "/reopen_logs" => match shared.sinks.reopen() {
            Ok(()) => Answer::text(200, "OK\n"),
            Err(error) => Answer::text(500, format!("{error}\n")),
        },
        _ => Answer::text(200, help()),
    }
}

fn drain_listeners(shared: &Arc<Shared>, query: &Query<'_>) -> Answer {
    let given = |key: &str| query.get(key).is_some();
    let which = if given("inboundonly") {
        Which::Inbound
    } else {
        Which::All
    };
    if !given("graceful") {
        shared.stop_listening(which);
    } else if shared.closing.drain(which) && !given("skip_exit") {
        let shared = Arc::clone(shared);
        tokio::task::spawn_local(async move {
            tokio::time::sleep(shared.options.drain_time).await;
            shared.stop_listening(which);
        });
    }
    Answer::text(200, "OK\n")
}

fn logging(query: &Query<'_>) -> Answer {
    const USAGE: &str = "usage: /logging?<name>=<level> (change single level)\n\
        usage: /logging?paths=name1:level1,name2:level2,... (change multiple levels)\n\
        usage: /logging?level=<level> (change all levels)\n\
        usage: /logging (show current levels)\n";
    let given: Vec<(String, String)> = query.all();
    let mut changes = Vec::new();
    for (name, value) in &given {
        match name.as_str() {
            "level" => changes.push((None, value.as_str())),
            "paths" => {
                let pairs = value
                    .split(',')
                    .map(|pair| pair.split_once(':').unwrap_or((pair, "")));
                changes.extend(pairs.map(|(name, level)| (Some(name), level)));
            }
            name => changes.push((Some(name), value.as_str())),
        }
    }
    if !changes.is_empty()
        && let Err(reason) = levels::set(&changes)
    {
        return Answer::text(400, format!("error: {reason}\n{USAGE}"));
    }
    let mut text = "active loggers:\n".to_owned();
    for (name, level) in levels::list().unwrap_or_default() {
        let _ = writeln!(text, "  {name}: {level}");
    }
    text.push('\n');
    Answer::text(200, text)
}

fn help() -> String {
    let mut text = "admin commands are:\n".to_owned();
    for (path, method, what) in PATHS {
        let method = if *method == "POST" { " (POST)" } else { "" };
        let _ = writeln!(text, "  {path}{method}: {what}");
    }
    text
}

struct Query<'a>(&'a str);

impl Query<'_> {
    fn get(&self, key: &str) -> Option<String> {
        self.0.split('&').find_map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            (name == key).then(|| decode(value))
        })
    }

    /// All of it, in order.
    fn all(&self) -> Vec<(String, String)> {
        let pairs = self.0.split('&').filter(|pair| !pair.is_empty());
        let pairs = pairs.map(|pair| pair.split_once('=').unwrap_or((pair, "")));
        pairs.map(|(name, value)| (decode(name), decode(value))).collect()
    }

    fn has(&self, key: &str) -> bool {
        self.get(key).is_some_and(|v| v != "false" && v != "0")
    }

    fn regex(&self, key: &str) -> Result<Option<Regex>, Answer> {
        let pattern = self.get(key).filter(|p| !p.is_empty());
        let compiled = pattern.map(|p| Regex::new(&p)).transpose();
        compiled.map_err(|e| Answer::text(400, format!("invalid {key}: {e}\n")))
    }
}

/// Undoes percent encoding; what is not valid stays as it is.
fn decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let pair = text.get(at + 1..at + 3).filter(|_| bytes[at] == b'%');
        match pair.and_then(|p| u8::from_str_radix(p, 16).ok()) {
            Some(byte) => {
                out.push(byte);
                at += 3;
            }
            None => {
                out.push(if bytes[at] == b'+' { b' ' } else { bytes[at] });
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn refresh(shared: &Shared) {
    use stats::Server;
    let server = shared.registry.scope("server", Server::TABLE);
    server.set(Shard::CONTROL, Server::Uptime, shared.started.elapsed().as_secs());
    server.set(Shard::CONTROL, Server::State, shared.state() as u64);
    server.set(Shard::CONTROL, Server::MemoryPhysical, resident());
    let mut connections = 0u64;
    shared.registry.each(|scope, member, _, value| {
        if scope.starts_with("listener.") && member == "downstream_cx_active" {
            connections += value;
        }
    });
    server.set(Shard::CONTROL, Server::TotalConnections, connections);
}

/// Resident memory, octets; 0 where the system does not tell.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
    let kib = line
        .and_then(|l| l.split_whitespace().next())
        .and_then(|n| n.parse::<u64>().ok());
    kib.unwrap_or_default() * 1024
}

fn prometheus(shared: &Shared, query: &Query<'_>) -> String {
    refresh(shared);
    // One pod's, as its own sidecar would serve them.
    if let Some(pod) = query.get("pod") {
        return shared.registry.istio.prometheus(Some(&pod));
    }
    shared.registry.prometheus(query.has("usedonly")) + &shared.registry.istio.prometheus(None)
}

fn stats(shared: &Shared, query: &Query<'_>) -> Answer {
    if query.get("format").as_deref() == Some("prometheus") {
        return Answer::text(200, prometheus(shared, query));
    }
    let filter = match query.regex("filter") {
        Ok(filter) => filter,
        Err(answer) => return answer,
    };
    refresh(shared);
    let (used, kind) = (query.has("usedonly"), query.get("type"));
    let mut all: Vec<(String, u64)> = Vec::new();
    let mut histograms: Vec<(String, Option<[f64; 10]>)> = Vec::new();
    shared.registry.each_histogram(|scope, member, seen| {
        let name = format!("{scope}.{member}");
        let kind_fits = matches!(kind.as_deref(), None | Some("Histograms" | "All"));
        if kind_fits && (!used || seen.count() > 0) && filter.as_ref().is_none_or(|f| f.is_match(&name)) {
            histograms.push((name, seen.quantiles()));
        }
    });
    histograms.sort_by(|a, b| a.0.cmp(&b.0));
    shared.registry.each(|scope, member, member_kind, value| {
        let name = format!("{scope}.{member}");
        let kind_fits = match kind.as_deref() {
            Some("Counters") => member_kind == Kind::Counter,
            Some("Gauges") => member_kind == Kind::Gauge,
            Some("Histograms" | "TextReadouts") => false,
            _ => true,
        };
        if kind_fits && (!used || value != 0) && filter.as_ref().is_none_or(|f| f.is_match(&name)) {
            all.push((name, value));
        }
    });
    all.sort();
    if query.get("format").as_deref() == Some("json") {
        let all: Vec<Value> = all
            .into_iter()
            .map(|(name, value)| json!({"name": name, "value": value}))
            .chain((!histograms.is_empty()).then(|| histograms_json(&histograms)))
            .collect();
        return Answer::json(&json!({"stats": all}));
    }
    let mut text = String::new();
    for (name, value) in all {
        let _ = writeln!(text, "{name}: {value}");
    }
    for (name, quantiles) in histograms {
        let _ = writeln!(text, "{name}: {}", summary(quantiles));
    }
    Answer::text(200, text)
}

/// As Envoy has it: the value of the last interval, which is not kept here, and the one of all time.
fn summary(quantiles: Option<[f64; 10]>) -> String {
    let Some(values) = quantiles else {
        return "No recorded values".to_owned();
    };
    let each = QUANTILES.iter().zip(values);
    let each: Vec<String> = each
        .map(|(quantile, value)| format!("P{}(nan,{})", percent(*quantile), rounded(value)))
        .collect();
    each.join(" ")
}

fn percent(quantile: f64) -> f64 {
    (quantile * 1000.0).round() / 10.0
}

/// Without the last digits, which are of the arithmetic.
fn rounded(value: f64) -> f64 {
    format!("{value:.12e}").parse().unwrap_or(value)
}

fn histograms_json(histograms: &[(String, Option<[f64; 10]>)]) -> Value {
    let computed = histograms.iter().map(|(name, quantiles)| {
        let values: Vec<Value> = match quantiles {
            Some(values) => values
                .iter()
                .map(|v| json!({"interval": null, "cumulative": rounded(*v)}))
                .collect(),
            None => QUANTILES
                .iter()
                .map(|_| json!({"interval": null, "cumulative": null}))
                .collect(),
        };
        json!({"name": name, "values": values})
    });
    json!({"histograms": {
        "supported_quantiles": QUANTILES.map(percent),
        "computed_quantiles": computed.collect::<Vec<Value>>(),
    }})
}

fn clusters(config: &Config, query: &Query<'_>) -> Answer {
    let filter = match query.regex("filter") {
        Ok(filter) => filter,
        Err(answer) => return answer,
    };
    let wanted = config
        .clusters
        .iter()
        .filter(|c| filter.as_ref().is_none_or(|f| f.is_match(&c.name)));
    if query.get("format").as_deref() == Some("json") {
        let statuses: Vec<Value> = wanted.map(|c| cluster_json(c)).collect();
        return Answer::json(&json!({"cluster_statuses": statuses}));
    }
    let mut text = String::new();
    for cluster in wanted {
        let name = &cluster.name;
        let limits = cluster.limits;
        let _ = writeln!(text, "{name}::observability_name::{name}");
        let _ = writeln!(
            text,
            "{name}::default_priority::max_connections::{}",
            limits.max_connections
        );
        let _ = writeln!(
            text,
            "{name}::default_priority::max_pending_requests::{}",
            limits.max_pending
        );
        let _ = writeln!(
            text,
            "{name}::default_priority::max_requests::{}",
            limits.max_requests
        );
        let retries = limits.retries.most(|| 0);
        let _ = writeln!(text, "{name}::default_priority::max_retries::{retries}");
        let _ = writeln!(text, "{name}::added_via_api::{}", cluster.dynamic);
        for endpoint in &cluster.endpoints {
            let front = format!("{name}::{}", endpoint.address);
            let health = endpoint.state.flags(endpoint.eds);
            let locality = &cluster.spread.localities[endpoint.locality as usize];
            let [region, zone, sub_zone] = &locality.name;
            let _ = writeln!(text, "{front}::hostname::{}", endpoint.hostname);
            let _ = writeln!(text, "{front}::health_flags::{health}");
            let _ = writeln!(text, "{front}::weight::{}", endpoint.weight);
            let _ = writeln!(text, "{front}::region::{region}");
            let _ = writeln!(text, "{front}::zone::{zone}");
            let _ = writeln!(text, "{front}::sub_zone::{sub_zone}");
            let _ = writeln!(text, "{front}::priority::{}", locality.priority);
        }
    }
    Answer::text(200, text)
}

fn cluster_json(cluster: &crate::config::model::Cluster) -> Value {
    let hosts: Vec<Value> = cluster
        .endpoints
        .iter()
        .map(|e| {
            let locality = &cluster.spread.localities[e.locality as usize];
            let [region, zone, sub_zone] = &locality.name;
            json!({"address": address_json(e.address), "weight": e.weight, "health_status": health_json(e),
                "priority": locality.priority, "hostname": e.hostname,
                "locality": {"region": region, "zone": zone, "sub_zone": sub_zone}})
        })
        .collect();
    let kind = match cluster.kind {
        ClusterKind::Static => "STATIC",
        ClusterKind::Eds => "EDS",
        ClusterKind::StrictDns => "STRICT_DNS",
        ClusterKind::LogicalDns => "LOGICAL_DNS",
        ClusterKind::OriginalDst => "ORIGINAL_DST",
    };
    let balance = match cluster.spread.balance {
        Balance::RoundRobin => "ROUND_ROBIN",
        Balance::Random => "RANDOM",
        Balance::LeastRequest => "LEAST_REQUEST",
        Balance::RingHash { .. } => "RING_HASH",
        Balance::Maglev { .. } => "MAGLEV",
        Balance::Provided => "CLUSTER_PROVIDED",
    };
    json!({"name": cluster.name, "added_via_api": cluster.dynamic, "type": kind, "lb_policy": balance,
        "host_statuses": hosts, "observability_name": cluster.name})
}

/// Envoy's `HostHealthStatus`.
fn health_json(endpoint: &Endpoint) -> Value {
    let eds = match endpoint.eds {
        Eds::Healthy => "HEALTHY",
        Eds::Degraded => "DEGRADED",
        Eds::Unhealthy => "UNHEALTHY",
        Eds::Draining => "DRAINING",
    };
    let mut status = json!({"eds_health_status": eds});
    for (flag, name) in [
        (health::FAILED_CHECK, "failed_active_health_check"),
        (health::FAILED_OUTLIER, "failed_outlier_check"),
        (health::DEGRADED_CHECK, "failed_active_degraded_check"),
        (health::PENDING_CHECK, "pending_active_hc"),
        (health::TIMED_OUT_CHECK, "active_hc_timeout"),
    ] {
        if endpoint.state.has(flag) {
            status[name] = json!(true);
        }
    }
    status
}

fn address_json(address: std::net::SocketAddr) -> Value {
    json!({"socket_address": {"address": address.ip().to_string(), "port_value": address.port()}})
}

fn listeners(shared: &Shared, query: &Query<'_>) -> Answer {
    let bound = shared.bound();
    if query.get("format").as_deref() == Some("json") {
        let statuses: Vec<Value> = bound
            .into_iter()
            .map(|(name, _, at)| json!({"name": name, "local_address": address_json(at)}))
            .collect();
        return Answer::json(&json!({"listener_statuses": statuses}));
    }
    let mut text = String::new();
    for (name, _, at) in bound {
        let _ = writeln!(text, "{name}::{at}");
    }
    Answer::text(200, text)
}

fn ingress(shared: &Shared, query: &Query<'_>) -> Answer {
    let mut ports: BTreeMap<u32, (u64, u64)> = BTreeMap::new();
    shared.registry.each(|scope, member, _, value| {
        if let Some(port) = scope.strip_prefix("ingress.").and_then(|p| p.parse().ok()) {
            let (active, total) = ports.entry(port).or_default();
            let place = if member == "downstream_cx_active" {
                active
            } else {
                total
            };
            *place = value;
        }
    });
    if query.get("format").as_deref() == Some("json") {
        let ports = ports.into_iter().map(|(port, (active, total))| {
            json!({"port": port, "downstream_cx_active": active, "downstream_cx_total": total})
        });
        return Answer::json(&json!({"ingress_ports": ports.collect::<Vec<Value>>()}));
    }
    let mut text = String::new();
    for (port, (active, total)) in ports {
        let _ = writeln!(text, "ingress={port}::downstream_cx_active::{active}");
        let _ = writeln!(text, "ingress={port}::downstream_cx_total::{total}");
    }
    Answer::text(200, text)
}

fn server_info(shared: &Shared, config: &Config) -> Value {
    let uptime = format!("{}s", shared.started.elapsed().as_secs());
    let options = &shared.options;
    json!({
        "version": concat!("dpu-proxy/", env!("CARGO_PKG_VERSION")),
        "state": shared.state().to_string(),
        "uptime_current_epoch": uptime,
        "uptime_all_epochs": uptime,
        "hot_restart_version": "disabled",
        "command_line_options": {
            "concurrency": options.concurrency,
            "config_path": options.config_path.display().to_string(),
            "drain_time": format!("{}s", options.drain_time.as_secs_f32()),
            "mode": "Serve",
            "disable_hot_restart": true,
            "stack_netns": options.stack_netns.as_ref().map(|p| p.display().to_string()),
        },
        "node": {"id": config.node.id, "cluster": config.node.cluster, "user_agent_name": "dpu-proxy"},
    })
}

/// Secrets in Envoy's shape: certificates as PEM, keys never.
fn secrets_dump(secrets: &[Listed], named: &dyn Fn(&str) -> bool) -> Value {
    let octets = |text: &str| json!({"inline_bytes": base64::engine::general_purpose::STANDARD.encode(text)});
    let (mut active, mut waiting) = (Vec::new(), Vec::new());
    for secret in secrets.iter().filter(|s| named(&s.name)) {
        let pem: String = secret.certificates.iter().map(|der| pem(der)).collect();
        let mut content = json!({"@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret", "name": secret.name});
        if secret.is_roots {
            content["validation_context"] = json!({"trusted_ca": octets(&pem)});
        } else {
            content["tls_certificate"] =
                json!({"certificate_chain": octets(&pem), "private_key": octets("[redacted]")});
        }
        let list = if pem.is_empty() { &mut waiting } else { &mut active };
        list.push(json!({"name": secret.name, "secret": content}));
    }
    json!({"@type": "type.googleapis.com/envoy.admin.v3.SecretsConfigDump",
        "dynamic_active_secrets": active, "dynamic_warming_secrets": waiting})
}

fn pem(der: &[u8]) -> String {
    let body = base64::engine::general_purpose::STANDARD.encode(der);
    let mut text = "-----BEGIN CERTIFICATE-----\n".to_owned();
    for line in body.as_bytes().chunks(64) {
        text.extend(line.iter().map(|octet| char::from(*octet)));
        text.push('\n');
    }
    text.push_str("-----END CERTIFICATE-----\n");
    text
}

fn moment(at: SystemTime) -> String {
    let mut text = Vec::new();
    timestamp(at, &mut text);
    String::from_utf8_lossy(&text).into_owned()
}

fn config_dump(config: &Config, refused: &[Refused], secrets: &[Listed], query: &Query<'_>) -> Answer {
    let filter = match query.regex("name_regex") {
        Ok(filter) => filter,
        Err(answer) => return answer,
    };
    let dump = &config.dump;
    let named = |value: &Value| {
        let name = value
            .get("name")
            .or_else(|| value.get("cluster_name"))
            .and_then(Value::as_str)
            .unwrap_or_default();
        filter.as_ref().is_none_or(|f| f.is_match(name))
    };
    let typed = |kind: &str, mut value: Value| {
        if let Some(map) = value.as_object_mut() {
            map.insert(
                "@type".to_owned(),
                Value::from(format!("type.googleapis.com/{kind}")),
            );
        }
        value
    };
    let fixed = |field: &str, kind: &str, all: Vec<Shown>| -> Vec<Value> {
        all.into_iter()
            .filter(|s| named(&s.value))
            .map(|s| json!({field: typed(kind, s.value), "last_updated": moment(s.updated)}))
            .collect()
    };
    let moving = |field: &str, kind: &str, all: Vec<Shown>| -> Vec<Value> {
        let wanted = all.into_iter().filter(|s| named(&s.value));
        wanted
            .map(|s| {
                json!({"version_info": s.version, field: typed(kind, s.value),
                    "last_updated": moment(s.updated)})
            })
            .collect()
    };
    const CLUSTER: &str = "envoy.config.cluster.v3.Cluster";
    const LISTENER: &str = "envoy.config.listener.v3.Listener";
    const ROUTE: &str = "envoy.config.route.v3.RouteConfiguration";
    const ENDPOINT: &str = "envoy.config.endpoint.v3.ClusterLoadAssignment";
    let dynamic_listeners: Vec<Value> = dump
        .dynamic_listeners()
        .into_iter()
        .filter(|s| named(&s.value))
        .map(|s| {
            json!({"name": s.value["name"], "active_state": {"version_info": s.version,
                "listener": typed(LISTENER, s.value), "last_updated": moment(s.updated)}})
        })
        .collect();
    let kind = |name: &str| format!("type.googleapis.com/envoy.admin.v3.{name}");
    let mut configs = vec![
        json!({"@type": kind("BootstrapConfigDump"), "bootstrap": dump.bootstrap()}),
        json!({"@type": kind("ClustersConfigDump"),
            "static_clusters": fixed("cluster", CLUSTER, dump.static_clusters()),
            "dynamic_active_clusters": moving("cluster", CLUSTER, dump.dynamic_clusters())}),
        json!({"@type": kind("ListenersConfigDump"),
            "static_listeners": fixed("listener", LISTENER, dump.static_listeners()),
            "dynamic_listeners": dynamic_listeners}),
        json!({"@type": kind("RoutesConfigDump"),
            "static_route_configs": fixed("route_config", ROUTE, dump.static_routes()),
            "dynamic_route_configs": moving("route_config", ROUTE, dump.dynamic_routes())}),
    ];
    if query
        .0
        .split('&')
        .any(|q| q.split('=').next() == Some("include_eds"))
    {
        configs.push(json!({"@type": kind("EndpointsConfigDump"),
            "static_endpoint_configs": fixed("endpoint_config", ENDPOINT, dump.static_endpoints()),
            "dynamic_endpoint_configs": moving("endpoint_config", ENDPOINT, dump.endpoints())}));
    }
    configs.push(secrets_dump(secrets, &|name| {
        filter.as_ref().is_none_or(|f| f.is_match(name))
    }));
    // Envoy has these inside the resources; a file that cannot be read has none.
    configs.extend(refused.iter().map(|refused| {
        json!({"@type": kind("UpdateFailureState"), "last_update_attempt": moment(refused.at),
            "details": refused.error.to_string()})
    }));
    if let Some(resource) = query.get("resource") {
        let found = configs
            .iter()
            .find_map(|c| c.get(&resource))
            .and_then(Value::as_array)
            .cloned();
        return match found {
            Some(found) => Answer::json(&json!({"configs": found})),
            None => Answer::text(404, format!("{resource} not found in config dump\n")),
        };
    }
    Answer::json(&json!({"configs": configs}))
}
