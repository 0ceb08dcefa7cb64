//! The filters that only Istio's build of Envoy has, and what becomes of each.
//!
//! | filter | type | here |
//! |---|---|---|
//! | `istio.stats` | `stats.PluginConfig` | taken out: it would label every pod of the node as one workload. The proxy makes these metrics for each pod, from what the aggregate tells it ([`crate::aggregate::WORKLOADS`]) |
//! | `istio.alpn` | `istio.envoy.config.filter.http.alpn.v2alpha1.FilterConfig` | done by Envoy's own `set_filter_state` with the protocols [`ALPN_OVERRIDE`]: the peer's sidecar picks its chain for mesh HTTP by them |
//! | `istio.metadata_exchange` (TCP, clusters) | `envoy.tcp.metadataexchange.config.MetadataExchange` | taken out, and its protocol `istio-peer-exchange` is offered nowhere, so that peers settle on `istio` |
//! | `istio.metadata_exchange` (HTTP) | `io.istio.http.peer_metadata.Config` | taken out: the proxy tells mesh peers by itself who a pod is, and reads what they tell; a stock Envoy does not, and its pods are unknown in peers' metrics |
//!
//! A filter that is in neither this table nor the schema refuses its resource. Stated limit of the `istio.alpn` replacement: it also overrides
//! the protocols of TLS that is originated towards servers outside the mesh; the offer ends in `http/1.1`, so such a
//! server answers, but never in HTTP/2.

/// What becomes of a filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// Taken out.
    Strip,
    /// Replaced by Envoy's own means.
    AlpnFilterState,
}

/// One kind of filter.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    /// Full name of its configuration.
    pub type_name: &'static str,
    /// What becomes of it.
    pub fate: Fate,
    /// For the report.
    pub reason: &'static str,
}

/// All of them.
pub const TABLE: &[Row] = &[
    Row {
        type_name: "stats.PluginConfig",
        fate: Fate::Strip,
        reason: "Istio's metrics are made by the proxy, per pod",
    },
    Row {
        type_name: "istio.envoy.config.filter.http.alpn.v2alpha1.FilterConfig",
        fate: Fate::AlpnFilterState,
        reason: "done by set_filter_state",
    },
    Row {
        type_name: "envoy.tcp.metadataexchange.config.MetadataExchange",
        fate: Fate::Strip,
        reason: "peer metadata is not exchanged over TCP",
    },
    Row {
        type_name: "io.istio.http.peer_metadata.Config",
        fate: Fate::Strip,
        reason: "peer metadata is not exchanged over HTTP",
    },
];

/// The protocols offered to a mesh peer for an HTTP request.
pub const ALPN_OVERRIDE: &str = "istio-http/1.1,istio,http/1.1";

/// The application protocol that belongs to the stripped exchange of metadata.
pub const PEER_EXCHANGE: &str = "istio-peer-exchange";

/// The row of a type.
pub fn row(type_name: &str) -> Option<&'static Row> {
    TABLE.iter().find(|row| row.type_name == type_name)
}

/// The `HttpFilter` that stands for `istio.alpn`, as JSON.
pub(super) fn alpn_filter() -> serde_json::Value {
    serde_json::json!({
        "name": "envoy.filters.http.set_filter_state",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.set_filter_state.v3.Config",
            "on_request_headers": [{
                "object_key": "envoy.network.application_protocols",
                "format_string": {"text_format_source": {"inline_string": ALPN_OVERRIDE}},
                "shared_with_upstream": "ONCE",
            }],
        },
    })
}
