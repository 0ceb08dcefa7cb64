//! Counters and gauges under Envoy's names, counted without a lock and without sharing a cache line between workers.
//!
//! A [`Scope`] is one named set (`cluster.NAME`, `http.PREFIX`, …) whose members are listed in a static table. It holds
//! one shard per worker plus one for the control thread; each shard has a single writer, a reader sums them. Scopes
//! live in the [`Registry`] by name, so that a counter survives the configuration that made it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use crate::histogram::{self, Histogram, Seen};

/// Which worker writes. Shard 0 is the control thread, worker `n` is shard `n + 1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard(pub usize);

impl Shard {
    /// The control thread's shard.
    pub const CONTROL: Self = Self(0);

    /// The shard of worker `n`.
    pub fn worker(n: usize) -> Self {
        Self(n + 1)
    }
}

/// What kind of number a member is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Only grows.
    Counter,
    /// Goes up and down; the sum over the shards is the value.
    Gauge,
    /// How often which value was seen; its number is that of all.
    Histogram,
}

macro_rules! members {
    ($(#[$doc:meta])* $name:ident { $($member:ident = $text:literal $kind:ident),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[allow(missing_docs, reason = "each member is documented by its Envoy name beside it")]
        #[repr(usize)]
        pub enum $name { $($member),+ }

        impl $name {
            /// Name and kind of each member, in order.
            pub const TABLE: &'static [(&'static str, Kind)] = &[$(($text, Kind::$kind)),+];
        }

        impl From<$name> for usize {
            fn from(member: $name) -> Self { member as Self }
        }
    };
}

members! {
    /// `http.PREFIX.*`: one HTTP connection manager.
    Http {
        CxTotal = "downstream_cx_total" Counter,
        CxActive = "downstream_cx_active" Gauge,
        CxDestroy = "downstream_cx_destroy" Counter,
        CxHttp1Total = "downstream_cx_http1_total" Counter,
        CxHttp1Active = "downstream_cx_http1_active" Gauge,
        CxHttp2Total = "downstream_cx_http2_total" Counter,
        CxHttp2Active = "downstream_cx_http2_active" Gauge,
        CxProtocolError = "downstream_cx_protocol_error" Counter,
        CxIdleTimeout = "downstream_cx_idle_timeout" Counter,
        CxDrainClose = "downstream_cx_drain_close" Counter,
        CxMaxRequests = "downstream_cx_max_requests_reached" Counter,
        CxOverloadKeepalive = "downstream_cx_overload_disable_keepalive" Counter,
        RqOverloadClose = "downstream_rq_overload_close" Counter,
        CxLength = "downstream_cx_length_ms" Histogram,
        CxRxBytes = "downstream_cx_rx_bytes_total" Counter,
        CxTxBytes = "downstream_cx_tx_bytes_total" Counter,
        CxUpgradesTotal = "downstream_cx_upgrades_total" Counter,
        CxUpgradesActive = "downstream_cx_upgrades_active" Gauge,
        RqTotal = "downstream_rq_total" Counter,
        RqActive = "downstream_rq_active" Gauge,
        RqCompleted = "downstream_rq_completed" Counter,
        Rq1xx = "downstream_rq_1xx" Counter,
        Rq2xx = "downstream_rq_2xx" Counter,
        Rq3xx = "downstream_rq_3xx" Counter,
        Rq4xx = "downstream_rq_4xx" Counter,
        Rq5xx = "downstream_rq_5xx" Counter,
        RqTimeout = "downstream_rq_timeout" Counter,
        RqHeaderTimeout = "downstream_rq_header_timeout" Counter,
        RqIdleTimeout = "downstream_rq_idle_timeout" Counter,
        RqMaxDuration = "downstream_rq_max_duration_reached" Counter,
        RqTooLarge = "downstream_rq_too_large" Counter,
        RqRxReset = "downstream_rq_rx_reset" Counter,
        RqTxReset = "downstream_rq_tx_reset" Counter,
        RqNonRelativePath = "downstream_rq_non_relative_path" Counter,
        RqUpgradeRefused = "downstream_rq_ws_on_non_ws_route" Counter,
        RqEarlyResponse = "downstream_rq_response_before_rq_complete" Counter,
        RqTime = "downstream_rq_time" Histogram,
        NoRoute = "no_route" Counter,
        NoCluster = "no_cluster" Counter,
        RqRedirect = "rq_redirect" Counter,
        RqDirectResponse = "rq_direct_response" Counter,
        RouterRqTotal = "rq_total" Counter,
    }
}

members! {
    /// `http2.*`: all connections of clients that speak HTTP/2.
    Http2 {
        GoawaySent = "goaway_sent" Counter,
        KeepaliveTimeout = "keepalive_timeout" Counter,
        RxMessagingError = "rx_messaging_error" Counter,
        StreamsActive = "streams_active" Gauge,
    }
}

members! {
    /// `cluster.NAME.http2.*`: connections to its endpoints that speak HTTP/2.
    ClusterHttp2 {
        KeepaliveTimeout = "keepalive_timeout" Counter,
    }
}

members! {
    /// `http.PREFIX.rbac.*`, `PREFIX.rbac.*`: the access rules of one connection manager or of TCP chains.
    Rbac {
        Allowed = "allowed" Counter,
        Denied = "denied" Counter,
        ShadowAllowed = "shadow_allowed" Counter,
        ShadowDenied = "shadow_denied" Counter,
    }
}

members! {
    /// `http.PREFIX.rbac.NAME.*`: shadow rules with a statistics prefix of their own.
    RbacShadow {
        Allowed = "shadow_allowed" Counter,
        Denied = "shadow_denied" Counter,
    }
}

members! {
    /// `overload.NAME.*`: how much of a resource is in use.
    OverloadResource {
        Pressure = "pressure" Gauge,
    }
}

members! {
    /// `overload.ACTION.*`: what is done for there is too much of one.
    OverloadAction {
        Active = "active" Gauge,
        ScalePercent = "scale_percent" Gauge,
    }
}

members! {
    /// `http.PREFIX.tracing.*`: which requests are traced, and why.
    Tracing {
        RandomSampling = "random_sampling" Counter,
        NotTraceable = "not_traceable" Counter,
    }
}

members! {
    /// `tracing.opentelemetry.*`: spans on their way.
    Tracer {
        SpansSent = "spans_sent" Counter,
        SpansDropped = "spans_dropped" Counter,
    }
}

members! {
    /// `http.PREFIX.ext_authz.*`: what another service decided.
    ExtAuthz {
        Ok = "ok" Counter,
        Denied = "denied" Counter,
        Error = "error" Counter,
        Timeout = "timeout" Counter,
        Disabled = "disabled" Counter,
        FailureModeAllowed = "failure_mode_allowed" Counter,
    }
}

members! {
    /// `http.PREFIX.jwt_authn.*`: the tokens of one connection manager's requests.
    Jwt {
        Allowed = "allowed" Counter,
        Denied = "denied" Counter,
        CorsPreflightBypassed = "cors_preflight_bypassed" Counter,
        JwksFetchSuccess = "jwks_fetch_success" Counter,
        JwksFetchFailed = "jwks_fetch_failed" Counter,
    }
}

members! {
    /// `PREFIX.http_local_rate_limit.*`: one rate limit of requests.
    LocalRate {
        Enabled = "enabled" Counter,
        Enforced = "enforced" Counter,
        RateLimited = "rate_limited" Counter,
        Ok = "ok" Counter,
    }
}

members! {
    /// `local_rate_limit.PREFIX.*`: one rate limit of connections.
    ConnectionRate {
        RateLimited = "rate_limited" Counter,
    }
}

members! {
    /// `http.PREFIX.fault.*`: faults injected by one connection manager.
    Fault {
        DelaysInjected = "delays_injected" Counter,
        AbortsInjected = "aborts_injected" Counter,
    }
}

members! {
    /// `http.PREFIX.cors.*`: cross-origin requests of one connection manager.
    Cors {
        OriginValid = "origin_valid" Counter,
        OriginInvalid = "origin_invalid" Counter,
    }
}

members! {
    /// `cluster.NAME.*`: one cluster.
    Cluster {
        CxTotal = "upstream_cx_total" Counter,
        CxHttp1Total = "upstream_cx_http1_total" Counter,
        CxHttp2Total = "upstream_cx_http2_total" Counter,
        CxActive = "upstream_cx_active" Gauge,
        CxDestroy = "upstream_cx_destroy" Counter,
        CxConnectFail = "upstream_cx_connect_fail" Counter,
        CxConnectTimeout = "upstream_cx_connect_timeout" Counter,
        CxIdleTimeout = "upstream_cx_idle_timeout" Counter,
        CxOverflow = "upstream_cx_overflow" Counter,
        CxNoneHealthy = "upstream_cx_none_healthy" Counter,
        CxProtocolError = "upstream_cx_protocol_error" Counter,
        CxMaxRequests = "upstream_cx_max_requests" Counter,
        CxRxBytes = "upstream_cx_rx_bytes_total" Counter,
        CxTxBytes = "upstream_cx_tx_bytes_total" Counter,
        CxConnect = "upstream_cx_connect_ms" Histogram,
        CxLength = "upstream_cx_length_ms" Histogram,
        RqTime = "upstream_rq_time" Histogram,
        RqTotal = "upstream_rq_total" Counter,
        RqActive = "upstream_rq_active" Gauge,
        RqCompleted = "upstream_rq_completed" Counter,
        Rq2xx = "upstream_rq_2xx" Counter,
        Rq3xx = "upstream_rq_3xx" Counter,
        Rq4xx = "upstream_rq_4xx" Counter,
        Rq5xx = "upstream_rq_5xx" Counter,
        RqTimeout = "upstream_rq_timeout" Counter,
        RqMaxDuration = "upstream_rq_max_duration_reached" Counter,
        RqRetry = "upstream_rq_retry" Counter,
        RqRetrySuccess = "upstream_rq_retry_success" Counter,
        RqRetryLimitExceeded = "upstream_rq_retry_limit_exceeded" Counter,
        RqRetryOverflow = "upstream_rq_retry_overflow" Counter,
        RqPerTryTimeout = "upstream_rq_per_try_timeout" Counter,
        RqRxReset = "upstream_rq_rx_reset" Counter,
        RqTxReset = "upstream_rq_tx_reset" Counter,
        RqCancelled = "upstream_rq_cancelled" Counter,
        RqPendingTotal = "upstream_rq_pending_total" Counter,
        RqPendingActive = "upstream_rq_pending_active" Gauge,
        RqPendingOverflow = "upstream_rq_pending_overflow" Counter,
        MembershipChange = "membership_change" Counter,
        MembershipTotal = "membership_total" Gauge,
        MembershipHealthy = "membership_healthy" Gauge,
        MembershipDegraded = "membership_degraded" Gauge,
        MembershipExcluded = "membership_excluded" Gauge,
        LbHealthyPanic = "lb_healthy_panic" Counter,
        LbSubsetsActive = "lb_subsets_active" Gauge,
        LbSubsetsSelected = "lb_subsets_selected" Counter,
        LbSubsetsFallback = "lb_subsets_fallback" Counter,
        UpdateAttempt = "update_attempt" Counter,
        UpdateSuccess = "update_success" Counter,
        UpdateRejected = "update_rejected" Counter,
        UpdateFailure = "update_failure" Counter,
        UpdateEmpty = "update_empty" Counter,
        UpdateNoRebuild = "update_no_rebuild" Counter,
    }
}

members! {
    /// `cluster.NAME.outlier_detection.*`.
    Outlier {
        Active = "ejections_active" Gauge,
        Total = "ejections_total" Counter,
        Overflow = "ejections_overflow" Counter,
        Consecutive5xx = "ejections_consecutive_5xx" Counter,
        SuccessRate = "ejections_success_rate" Counter,
        Detected5xx = "ejections_detected_consecutive_5xx" Counter,
        DetectedGateway = "ejections_detected_consecutive_gateway_failure" Counter,
        DetectedLocal = "ejections_detected_consecutive_local_origin_failure" Counter,
        DetectedSuccessRate = "ejections_detected_success_rate" Counter,
        DetectedLocalSuccessRate = "ejections_detected_local_origin_success_rate" Counter,
        DetectedFailurePercentage = "ejections_detected_failure_percentage" Counter,
        DetectedLocalFailurePercentage = "ejections_detected_local_origin_failure_percentage" Counter,
        EnforcedTotal = "ejections_enforced_total" Counter,
        Enforced5xx = "ejections_enforced_consecutive_5xx" Counter,
        EnforcedGateway = "ejections_enforced_consecutive_gateway_failure" Counter,
        EnforcedLocal = "ejections_enforced_consecutive_local_origin_failure" Counter,
        EnforcedSuccessRate = "ejections_enforced_success_rate" Counter,
        EnforcedLocalSuccessRate = "ejections_enforced_local_origin_success_rate" Counter,
        EnforcedFailurePercentage = "ejections_enforced_failure_percentage" Counter,
        EnforcedLocalFailurePercentage = "ejections_enforced_local_origin_failure_percentage" Counter,
    }
}

members! {
    /// `cluster.NAME.health_check.*`.
    HealthCheck {
        Attempt = "attempt" Counter,
        Success = "success" Counter,
        Failure = "failure" Counter,
        NetworkFailure = "network_failure" Counter,
        Healthy = "healthy" Gauge,
        Degraded = "degraded" Gauge,
    }
}

members! {
    /// `listener.ADDRESS.*`: one listener.
    Listener {
        CxTotal = "downstream_cx_total" Counter,
        CxActive = "downstream_cx_active" Gauge,
        CxDestroy = "downstream_cx_destroy" Counter,
        GlobalCxOverflow = "downstream_global_cx_overflow" Counter,
        NoFilterChainMatch = "no_filter_chain_match" Counter,
        PreCxTimeout = "downstream_pre_cx_timeout" Counter,
        CxLength = "downstream_cx_length_ms" Histogram,
    }
}

members! {
    /// `listener.PREFIX.ssl.*` and `cluster.NAME.ssl.*`: TLS of one listener or cluster.
    Ssl {
        Handshake = "handshake" Counter,
        ConnectionError = "connection_error" Counter,
        NoCertificate = "no_certificate" Counter,
        FailVerifyNoCert = "fail_verify_no_cert" Counter,
        FailVerifyError = "fail_verify_error" Counter,
        FailVerifySan = "fail_verify_san" Counter,
        ContextNotReady = "context_not_ready" Counter,
    }
}

members! {
    /// `proxy_proto.*`, `proxy_proto.PREFIX.*`: PROXY headers that listeners take off.
    ProxyProtocol {
        NotFoundAllowed = "not_found_allowed" Counter,
        NotFoundDisallowed = "not_found_disallowed" Counter,
    }
}

members! {
    /// `proxy_proto.versions.v1.*`, `proxy_proto.versions.v2.*`: the same by version.
    ProxyProtocolVersion {
        Found = "found" Counter,
        Disallowed = "disallowed" Counter,
        Error = "error" Counter,
    }
}

members! {
    /// `control_plane.*`: the aggregated stream.
    ControlPlane {
        Connected = "connected_state" Gauge,
    }
}

members! {
    /// `tcp.PREFIX.*`: one TCP proxy.
    Tcp {
        CxTotal = "downstream_cx_total" Counter,
        CxNoRoute = "downstream_cx_no_route" Counter,
        CxRxBytes = "downstream_cx_rx_bytes_total" Counter,
        CxTxBytes = "downstream_cx_tx_bytes_total" Counter,
        IdleTimeout = "idle_timeout" Counter,
    }
}

members! {
    /// `dpumesh.istio.*`: Istio's metrics themselves. Envoy has no such thing.
    Istio {
        SeriesOverflow = "series_overflow" Counter,
    }
}

members! {
    /// `ingress.PORT.*`: the connections that came in by one port of the dataplane. Envoy has no such thing.
    Ingress {
        CxTotal = "downstream_cx_total" Counter,
        CxActive = "downstream_cx_active" Gauge,
    }
}

members! {
    /// `listener_manager.*`.
    ListenerManager {
        Added = "listener_added" Counter,
        Modified = "listener_modified" Counter,
        Removed = "listener_removed" Counter,
        CreateFailure = "listener_create_failure" Counter,
        CreateSuccess = "listener_create_success" Counter,
        Active = "total_listeners_active" Gauge,
        WorkersStarted = "workers_started" Gauge,
    }
}

members! {
    /// `cluster_manager.*`.
    ClusterManager {
        Added = "cluster_added" Counter,
        Modified = "cluster_modified" Counter,
        Removed = "cluster_removed" Counter,
        Active = "active_clusters" Gauge,
    }
}

members! {
    /// `listener_manager.lds.*`, `cluster_manager.cds.*`, `http.PREFIX.rds.NAME.*`: one subscription.
    Subscription {
        Attempt = "update_attempt" Counter,
        Success = "update_success" Counter,
        Rejected = "update_rejected" Counter,
        ConfigReload = "config_reload" Counter,
    }
}

members! {
    /// `server.*`.
    Server {
        Live = "live" Gauge,
        State = "state" Gauge,
        Concurrency = "concurrency" Gauge,
        Uptime = "uptime" Gauge,
        MemoryPhysical = "memory_physical_size" Gauge,
        TotalConnections = "total_connections" Gauge,
    }
}

members! {
    /// `filesystem.*`: access log writing.
    Filesystem {
        WriteBuffered = "write_buffered" Counter,
        WriteCompleted = "write_completed" Counter,
        WriteFailed = "write_failed" Counter,
        Dropped = "write_dropped" Counter,
    }
}

/// One named set of counters and gauges.
#[derive(Debug)]
pub struct Scope {
    name: String,
    table: &'static [(&'static str, Kind)],
    stride: usize,
    cells: Box<[AtomicU64]>,
    /// Of the members that are histograms, in order.
    histograms: Box<[Option<Histogram>]>,
}

/// Counters of a cache line; shards start on a line of their own.
const PER_LINE: usize = 8;

impl Scope {
    fn new(name: String, table: &'static [(&'static str, Kind)], shards: usize) -> Self {
        let stride = table.len().next_multiple_of(PER_LINE) + PER_LINE;
        let cells = (0..stride * shards).map(|_| AtomicU64::new(0)).collect();
        let histogram = |kind| (kind == Kind::Histogram).then(|| Histogram::new(shards));
        Self {
            name,
            table,
            stride,
            cells,
            histograms: table.iter().map(|(_, kind)| histogram(*kind)).collect(),
        }
    }

    /// The scope's full name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Adds `by` to a member. One writer per shard: a plain load and store, no locked instruction.
    #[inline]
    pub fn add(&self, shard: Shard, member: impl Into<usize>, by: u64) {
        let cell = &self.cells[shard.0 * self.stride + member.into()];
        cell.store(cell.load(Relaxed).wrapping_add(by), Relaxed);
    }

    /// Adds one.
    #[inline]
    pub fn inc(&self, shard: Shard, member: impl Into<usize>) {
        self.add(shard, member, 1);
    }

    /// Takes one off a gauge.
    #[inline]
    pub fn dec(&self, shard: Shard, member: impl Into<usize>) {
        self.add(shard, member, u64::MAX);
    }

    /// Notes a value in a member that is a histogram. One writer per shard, as for [`Self::add`].
    pub fn record(&self, shard: Shard, member: impl Into<usize>, value: u64) {
        if let Some(Some(histogram)) = self.histograms.get(member.into()) {
            histogram.record(shard, value);
        }
    }

    /// The same for the time since `begun`, in milliseconds.
    pub fn record_since(&self, shard: Shard, member: impl Into<usize>, begun: tokio::time::Instant) {
        let ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.record(shard, member, ms);
    }

    /// Sets a gauge that only this shard writes.
    pub fn set(&self, shard: Shard, member: impl Into<usize>, value: u64) {
        self.cells[shard.0 * self.stride + member.into()].store(value, Relaxed);
    }

    /// The value over all shards.
    pub fn get(&self, member: impl Into<usize>) -> u64 {
        let member = member.into();
        if let Some(Some(histogram)) = self.histograms.get(member) {
            return histogram.seen().count();
        }
        self.cells
            .iter()
            .skip(member)
            .step_by(self.stride)
            .fold(0, |sum, c| sum.wrapping_add(c.load(Relaxed)))
    }
}

/// Every scope of the process, by name.
#[derive(Debug)]
pub struct Registry {
    shards: usize,
    scopes: Mutex<BTreeMap<String, Arc<Scope>>>,
    /// Istio's metrics, which have labels of their own.
    pub istio: crate::istio::Metrics,
}

impl Registry {
    /// A registry for `workers` workers and the control thread.
    pub fn new(workers: usize) -> Self {
        Self {
            shards: workers + 1,
            scopes: Mutex::default(),
            istio: crate::istio::Metrics::default(),
        }
    }

    /// The scope `name`, made on first use.
    pub fn scope(&self, name: &str, table: &'static [(&'static str, Kind)]) -> Arc<Scope> {
        let mut scopes = self.scopes.lock().unwrap_or_else(PoisonError::into_inner);
        let scope = scopes
            .entry(name.to_owned())
            .or_insert_with(|| Arc::new(Scope::new(name.to_owned(), table, self.shards)));
        Arc::clone(scope)
    }

    /// The value of `scope.member` by its full name, if there is such a member.
    pub fn value(&self, full_name: &str) -> Option<u64> {
        let (scope, member) = full_name.rsplit_once('.')?;
        let scopes = self.scopes.lock().unwrap_or_else(PoisonError::into_inner);
        let scope = scopes.get(scope)?;
        let index = scope.table.iter().position(|(name, _)| *name == member)?;
        Some(scope.get(index))
    }

    /// Every value: scope name, member, kind, number; sorted by scope.
    pub fn each(&self, mut see: impl FnMut(&str, &str, Kind, u64)) {
        let scopes: Vec<_> = self
            .scopes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .map(Arc::clone)
            .collect();
        for scope in scopes {
            for (index, (member, kind)) in scope.table.iter().enumerate() {
                if *kind != Kind::Histogram {
                    see(&scope.name, member, *kind, scope.get(index));
                }
            }
        }
    }

    /// Every histogram: scope name, member, what it has seen; sorted by scope.
    pub fn each_histogram(&self, mut see: impl FnMut(&str, &str, &Seen)) {
        let scopes: Vec<_> = self
            .scopes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .map(Arc::clone)
            .collect();
        for scope in scopes {
            for ((member, _), histogram) in scope.table.iter().zip(&scope.histograms) {
                if let Some(histogram) = histogram {
                    see(&scope.name, member, &histogram.seen());
                }
            }
        }
    }

    /// Sets every counter to zero (gauges stay): a racing increment may survive or be lost.
    pub fn reset_counters(&self) {
        self.istio.reset();
        let scopes: Vec<_> = self
            .scopes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .map(Arc::clone)
            .collect();
        for scope in scopes {
            for (index, (_, kind)) in scope.table.iter().enumerate() {
                if *kind == Kind::Counter {
                    (0..self.shards).for_each(|shard| scope.set(Shard(shard), index, 0));
                }
            }
        }
    }

    /// The Prometheus text form, with Envoy's metric names and labels.
    pub fn prometheus(&self, used_only: bool) -> String {
        let mut families: BTreeMap<(String, Kind), Vec<(String, u64)>> = BTreeMap::new();
        self.each(|scope, member, kind, value| {
            if used_only && value == 0 {
                return;
            }
            let (family, labels) = prometheus_name(scope, member);
            families.entry((family, kind)).or_default().push((labels, value));
        });
        let mut text = String::new();
        for ((family, kind), samples) in families {
            let kind = if kind == Kind::Counter { "counter" } else { "gauge" };
            let _ = writeln!(text, "# TYPE {family} {kind}");
            for (labels, value) in samples {
                let _ = writeln!(text, "{family}{{{labels}}} {value}");
            }
        }
        self.prometheus_histograms(used_only, &mut text);
        text
    }
}

impl Registry {
    fn prometheus_histograms(&self, used_only: bool, text: &mut String) {
        let mut families: BTreeMap<String, Vec<(String, Seen)>> = BTreeMap::new();
        self.each_histogram(|scope, member, seen| {
            if !used_only || seen.count() > 0 {
                let (family, labels) = prometheus_name(scope, member);
                families.entry(family).or_default().push((labels, seen.clone()));
            }
        });
        for (family, samples) in families {
            let _ = writeln!(text, "# TYPE {family} histogram");
            for (labels, seen) in samples {
                let comma = if labels.is_empty() { "" } else { "," };
                let buckets = seen.buckets();
                for (bound, count) in histogram::LABELS.iter().zip(buckets) {
                    let _ = writeln!(text, "{family}_bucket{{{labels}{comma}le=\"{bound}\"}} {count}");
                }
                let _ = writeln!(text, "{family}_sum{{{labels}}} {}", seen.sum());
                let _ = writeln!(text, "{family}_count{{{labels}}} {}", seen.count());
            }
        }
    }
}

impl PartialOrd for Kind {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Kind {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (*self as u8).cmp(&(*other as u8))
    }
}

/// Envoy's tag extraction for the scopes of this proxy.
fn prometheus_name(scope: &str, member: &str) -> (String, String) {
    let label = |key: &str, value: &str| {
        format!(
            "{key}=\"{}\"",
            value
                .replace('\\', "\\\\")
                .replace('"', "\\\"")
                .replace('\n', "\\n")
        )
    };
    let class = |base: &str, extra: String| {
        if let Some((stem, class)) = member.rsplit_once('_')
            && class.len() == 3
            && class.ends_with("xx")
        {
            let comma = if extra.is_empty() { "" } else { "," };
            let code = label("envoy_response_code_class", &class[..1]);
            return (format!("{base}_{stem}_xx"), format!("{code}{comma}{extra}"));
        }
        (format!("{base}_{member}"), extra)
    };
    for part in ["ssl", "outlier_detection", "health_check"] {
        let of_cluster = scope.strip_prefix("cluster.").and_then(|n| n.strip_suffix(part));
        if let Some(name) = of_cluster.and_then(|name| name.strip_suffix('.')) {
            return class(
                &format!("envoy_cluster_{part}"),
                label("envoy_cluster_name", name),
            );
        }
    }
    if let Some(rest) = scope
        .strip_prefix("proxy_proto")
        .filter(|r| r.is_empty() || r.starts_with('.'))
    {
        let (prefix, version) = rest.split_once(".versions.v").unwrap_or((rest, ""));
        let prefix = prefix.trim_start_matches('.');
        let labels = [
            ("envoy_proxy_protocol_prefix", prefix),
            ("envoy_proxy_protocol_version", version),
        ];
        let given = labels.iter().filter(|(_, value)| !value.is_empty());
        let labels: Vec<String> = given.map(|(key, value)| label(key, value)).collect();
        return class("envoy_proxy_proto", labels.join(","));
    }
    if let Some(address) = scope
        .strip_prefix("listener.")
        .and_then(|address| address.strip_suffix(".ssl"))
    {
        return class("envoy_listener_ssl", label("envoy_listener_address", address));
    }
    if let Some(name) = scope
        .strip_prefix("cluster.")
        .and_then(|name| name.strip_suffix(".http2"))
    {
        return class("envoy_cluster_http2", label("envoy_cluster_name", name));
    }
    if let Some(name) = scope.strip_prefix("cluster.") {
        return class("envoy_cluster", label("envoy_cluster_name", name));
    }
    if let Some(rest) = scope.strip_prefix("http.") {
        if let Some((prefix, route)) = rest.split_once(".rds.") {
            let labels = [
                label("envoy_rds_route_config", route),
                label("envoy_http_conn_manager_prefix", prefix),
            ]
            .join(",");
            return class("envoy_http_rds", labels);
        }
        for filter in ["rbac", "fault", "cors", "jwt_authn"] {
            if let Some(prefix) = rest.strip_suffix(filter).and_then(|p| p.strip_suffix('.')) {
                let labels = label("envoy_http_conn_manager_prefix", prefix);
                return class(&format!("envoy_http_{filter}"), labels);
            }
        }
        return class("envoy_http", label("envoy_http_conn_manager_prefix", rest));
    }
    if let Some(prefix) = scope.strip_suffix(".http_local_rate_limit") {
        let labels = label("envoy_local_http_ratelimit_prefix", prefix);
        return class("envoy_http_local_rate_limit", labels);
    }
    if let Some(prefix) = scope.strip_prefix("local_rate_limit.") {
        return class(
            "envoy_local_rate_limit",
            label("envoy_local_ratelimit_prefix", prefix),
        );
    }
    if let Some(name) = scope.strip_prefix("listener.") {
        return class("envoy_listener", label("envoy_listener_address", name));
    }
    if let Some(name) = scope.strip_prefix("tcp.") {
        return class("envoy_tcp", label("envoy_tcp_prefix", name));
    }
    class(
        &format!("envoy_{}", scope.replace(['.', '-'], "_")),
        String::new(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_are_summed_and_gauges_go_down() {
        let registry = Registry::new(2);
        let scope = registry.scope("cluster.a", Cluster::TABLE);
        scope.add(Shard::worker(0), Cluster::CxActive, 3);
        scope.inc(Shard::worker(1), Cluster::CxActive);
        scope.dec(Shard::worker(1), Cluster::CxActive);
        scope.dec(Shard::worker(1), Cluster::CxActive);
        assert_eq!(registry.value("cluster.a.upstream_cx_active"), Some(2));
        assert_eq!(registry.value("cluster.a.nope"), None);
    }

    #[test]
    fn prometheus_names_and_labels_are_envoys() {
        let name = |scope, member| prometheus_name(scope, member);
        assert_eq!(
            name("cluster.a", "upstream_cx_total"),
            (
                "envoy_cluster_upstream_cx_total".to_owned(),
                "envoy_cluster_name=\"a\"".to_owned()
            )
        );
        assert_eq!(
            name("http.in", "downstream_rq_2xx"),
            (
                "envoy_http_downstream_rq_xx".to_owned(),
                "envoy_response_code_class=\"2\",envoy_http_conn_manager_prefix=\"in\"".to_owned()
            )
        );
        for (scope, labels) in [
            ("proxy_proto", ""),
            ("proxy_proto.versions.v1", "envoy_proxy_protocol_version=\"1\""),
            (
                "proxy_proto.edge.versions.v2",
                "envoy_proxy_protocol_prefix=\"edge\",envoy_proxy_protocol_version=\"2\"",
            ),
        ] {
            let wanted = ("envoy_proxy_proto_found".to_owned(), labels.to_owned());
            assert_eq!(name(scope, "found"), wanted);
        }
        assert_eq!(name("cluster.a|b", "x").1, name("cluster.a|b.ssl", "handshake").1,);
        assert_eq!(
            name("listener.in.ssl", "handshake"),
            (
                "envoy_listener_ssl_handshake".to_owned(),
                "envoy_listener_address=\"in\"".to_owned()
            )
        );
        assert_eq!(
            name("server", "live"),
            ("envoy_server_live".to_owned(), String::new())
        );
        assert_eq!(
            name("listener_manager.lds", "update_rejected").0,
            "envoy_listener_manager_lds_update_rejected"
        );
    }
}
