//! The bootstrap of a node's proxy, which stock Envoy and dpu-proxy read alike, and where stock Envoy is.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::trust::Credentials;

/// Port of its admin server, on the loopback of the namespace it is in.
pub(crate) const ADMIN_PORT: u16 = 15000;

/// The program: `$ENVOY_BIN`, what CI has installed, or the one on the path.
pub(crate) fn program() -> Option<PathBuf> {
    if let Some(named) = std::env::var_os("ENVOY_BIN") {
        return Some(named.into());
    }
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))?;
    let installed = installed(&cache.join("dpumesh/envoy/lib"));
    installed.or_else(|| {
        let path = std::env::var_os("PATH")?;
        std::env::split_paths(&path)
            .map(|folder| folder.join("envoy"))
            .find(|file| file.is_file())
    })
}

/// Within a virtual environment, the wheel keeps it below a folder that is named for Python's version.
fn installed(libraries: &Path) -> Option<PathBuf> {
    let pythons = std::fs::read_dir(libraries).ok()?;
    pythons
        .filter_map(Result::ok)
        .map(|python| python.path().join("site-packages/envoy/_bin/envoy"))
        .find(|file| file.is_file())
}

/// Where the node's Envoy finds its configuration and its keys.
#[derive(Debug)]
pub(crate) struct Sources<'a> {
    /// Its node id.
    pub(crate) node: &'a str,
    /// The way to the adapter.
    pub(crate) adapter: Way<'a>,
    /// The name in the adapter's certificate.
    pub(crate) adapter_name: &'a str,
    /// Those of this SoC.
    pub(crate) credentials: &'a Credentials,
    /// Unix socket of the key store; `None` for a proxy that has its own.
    pub(crate) keys: Option<&'a Path>,
}

/// How a cluster is reached.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Way<'a> {
    /// By a Unix socket.
    Socket(&'a Path),
    /// By the network.
    Address(SocketAddr),
}

/// The bootstrap of the node's shared proxy.
pub(crate) fn shared(sources: &Sources<'_>) -> Value {
    let file = |path: &Path| json!({"filename": path});
    let tls = json!({"name": "envoy.transport_sockets.tls", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        "sni": sources.adapter_name,
        "common_tls_context": {
            "alpn_protocols": ["h2"],
            "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
            "tls_certificates": [{"certificate_chain": file(&sources.credentials.cert), "private_key": file(&sources.credentials.key)}],
            "validation_context": {
                "trusted_ca": file(&sources.credentials.ca),
                "match_typed_subject_alt_names": [{"san_type": "DNS", "matcher": {"exact": sources.adapter_name}}]}}}});
    let mut adapter = http2("adapter", sources.adapter);
    adapter["transport_socket"] = tls;
    let keys = sources.keys.map(|socket| http2("sds-grpc", Way::Socket(socket)));
    let clusters: Vec<Value> = std::iter::once(adapter).chain(keys).collect();
    json!({
        "node": {"id": sources.node, "cluster": "dpumesh"},
        "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": ADMIN_PORT}}},
        "dynamic_resources": {
            "ads_config": {
                "api_type": "DELTA_GRPC", "transport_api_version": "V3", "set_node_on_first_message_only": true,
                "grpc_services": [{"envoy_grpc": {"cluster_name": "adapter"}}]},
            "cds_config": {"ads": {}, "resource_api_version": "V3"},
            "lds_config": {"ads": {}, "resource_api_version": "V3"}},
        "static_resources": {"clusters": clusters},
    })
}

/// A cluster that speaks HTTP/2.
pub(crate) fn http2(name: &str, way: Way<'_>) -> Value {
    let address = match way {
        Way::Socket(path) => json!({"pipe": {"path": path}}),
        Way::Address(at) => {
            json!({"socket_address": {"address": at.ip().to_string(), "port_value": at.port()}})
        }
    };
    json!({
        "name": name, "type": "STATIC", "connect_timeout": "2s",
        "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
            "explicit_http_config": {"http2_protocol_options": {}}}},
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}]},
    })
}
