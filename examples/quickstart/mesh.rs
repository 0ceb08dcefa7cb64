//! What the proxies are told: one Envoy v3 bootstrap per node, made from the pods, and a file with the HTTP service's
//! routes over IPv4, which the proxy watches.
//!
//! | address | what the proxy does |
//! |---|---|
//! | `10.96.0.1:80`, `[fd00:96::1]:80` | HTTP by host: `local`, `remote`, `secure`, `split`, `slow`, `dead`, `nobody`, `flaky`, `retried` |
//! | `10.96.0.2:9000`, `[fd00:96::2]:9000` | TCP to the web pod of the other node |
//! | a pod's port 8080 | HTTP to that pod: the inbound side. In TLS only from the first node's identity, and not to `/admin` |
//! | any other | TCP to where the client meant |
//!
//! The same files start stock Envoy.

use std::net::IpAddr;
use std::path::Path;

use dpumesh_cni::rules::Pod;
use serde_json::{Value, json};

use super::trust::{SecretFiles, identity};

/// Port of the pods' HTTP servers.
pub(crate) const HTTP_PORT: u16 = 8080;
/// Port of the pods' TCP sinks and of the TCP service.
pub(crate) const TCP_PORT: u16 = 9000;
/// Port of the HTTP service.
pub(crate) const SERVICE_PORT: u16 = 80;
/// The proxy's listener.
pub(crate) const PROXY_PORT: u16 = 15001;
/// The proxy's admin server, on the SoC's loopback.
pub(crate) const ADMIN_PORT: u16 = 15000;

/// Address of the HTTP service, by family.
pub(crate) fn http_service(ipv6: bool) -> IpAddr {
    address(ipv6, "10.96.0.1", "fd00:96::1")
}

/// Address of the TCP service, by family.
pub(crate) fn tcp_service(ipv6: bool) -> IpAddr {
    address(ipv6, "10.96.0.2", "fd00:96::2")
}

fn address(ipv6: bool, v4: &str, v6: &str) -> IpAddr {
    let text = if ipv6 { v6 } else { v4 };
    text.parse().expect("a literal address")
}

/// The bootstrap of a node's proxy. `local` and `remote` are the web pods of this and of the other node; `routes` is the
/// file with [`routes`], `secrets` are the files with key, certificate and roots.
pub(crate) fn bootstrap(
    node: usize,
    local: &Pod,
    remote: &Pod,
    routes: &Path,
    secrets: &SecretFiles,
) -> Value {
    let watched = json!({ "rds": {
        "route_config_name": family("outbound", false),
        "config_source": { "path_config_source": { "path": routes } },
    } });
    let fixed = json!({ "route_config": {
        "name": family("outbound", true),
        "virtual_hosts": outbound_routes(true),
    } });
    let listeners = [listener(false, watched, secrets), listener(true, fixed, secrets)];
    let mut clusters = vec![original_destination("original")];
    for ipv6 in [false, true] {
        clusters.push(endpoints(
            &family("local", ipv6),
            &[endpoint(local, ipv6, HTTP_PORT)],
        ));
        clusters.push(endpoints(
            &family("remote", ipv6),
            &[endpoint(remote, ipv6, HTTP_PORT)],
        ));
        clusters.push(secured(
            endpoints(&family("secure", ipv6), &[endpoint(remote, ipv6, HTTP_PORT)]),
            &identity(1 - node),
            secrets,
        ));
        clusters.push(endpoints(
            &family("flaky", ipv6),
            &[endpoint(local, ipv6, 9), endpoint(local, ipv6, HTTP_PORT)],
        ));
        clusters.push(endpoints(&family("dead", ipv6), &[endpoint(local, ipv6, 9)]));
        clusters.push(endpoints(&family("nobody", ipv6), &[]));
        clusters.push(endpoints(
            &family("tcp", ipv6),
            &[endpoint(remote, ipv6, TCP_PORT)],
        ));
    }
    json!({
        "node": { "id": format!("node-{}", node + 1), "cluster": "quickstart" },
        "admin": { "address": socket_address("127.0.0.1", ADMIN_PORT) },
        "static_resources": { "listeners": listeners, "clusters": clusters },
    })
}

/// The watched file: a `DiscoveryResponse` with the routes of the HTTP service over IPv4.
pub(crate) fn routes() -> Value {
    json!({ "resources": [{
        "@type": "type.googleapis.com/envoy.config.route.v3.RouteConfiguration",
        "name": family("outbound", false),
        "validate_clusters": true,
        "virtual_hosts": outbound_routes(false),
    }] })
}

fn family(name: &str, ipv6: bool) -> String {
    format!("{name}-{}", if ipv6 { "v6" } else { "v4" })
}

fn socket_address(address: &str, port: u16) -> Value {
    json!({ "socket_address": { "address": address, "port_value": port } })
}

fn listener(ipv6: bool, outbound: Value, secrets: &SecretFiles) -> Value {
    let name = family("inbound", ipv6);
    let inbound = json!({ "route_config": { "name": name, "virtual_hosts": inbound_routes() } });
    let mut inspector = typed(
        "envoy.filters.listener.tls_inspector",
        "filters.listener.tls_inspector.v3.TlsInspector",
        json!({}),
    );
    // Only where somebody wants to know: on other ports it may be the server who speaks first.
    let ports = |start: u32, end: u32| json!({ "destination_port_range": { "start": start, "end": end } });
    let port = u32::from(HTTP_PORT);
    inspector["filter_disabled"] =
        json!({ "or_match": { "rules": [ports(0, port), ports(port + 1, 65_536)] } });
    let trusted = format!("{name}-mtls");
    json!({
        "name": family("intercept", ipv6),
        "address": socket_address(if ipv6 { "::" } else { "0.0.0.0" }, PROXY_PORT),
        "transparent": true,
        "listener_filters": [
            typed("envoy.filters.listener.original_dst", "filters.listener.original_dst.v3.OriginalDst", json!({})),
            typed(
                "envoy.filters.listener.original_src",
                "filters.listener.original_src.v3.OriginalSrc",
                json!({}),
            ),
            inspector,
        ],
        "filter_chains": [
            {
                "name": "outbound-http",
                "filter_chain_match": { "destination_port": SERVICE_PORT },
                "filters": [http(&family("outbound", ipv6), outbound)],
            },
            {
                "name": "inbound-http",
                "filter_chain_match": { "destination_port": HTTP_PORT },
                "filters": [http(&name, inbound.clone())],
            },
            {
                "name": "inbound-mtls",
                "filter_chain_match": { "destination_port": HTTP_PORT, "transport_protocol": "tls" },
                "transport_socket": tls("DownstreamTlsContext", json!({
                    "require_client_certificate": true,
                    "common_tls_context": tls_context(secrets, None),
                })),
                "filters": [with_filter(http(&trusted, inbound), access_rules())],
            },
            {
                "name": "outbound-tcp",
                "filter_chain_match": {
                    "destination_port": TCP_PORT,
                    "prefix_ranges": [{
                        "address_prefix": tcp_service(ipv6).to_string(),
                        "prefix_len": if ipv6 { 128 } else { 32 },
                    }],
                },
                "filters": [tcp(&family("outbound", ipv6), &family("tcp", ipv6))],
            },
        ],
        "default_filter_chain": { "name": "passthrough", "filters": [tcp(&family("passthrough", ipv6), "original")] },
    })
}

/// The inbound side of mutual TLS lets in who is the first node, to anywhere but `/admin`.
fn access_rules() -> Value {
    let anywhere_else = json!({ "not_rule": { "url_path": { "path": { "prefix": "/admin" } } } });
    let first = json!({ "authenticated": { "principal_name": { "exact": identity(0) } } });
    typed(
        "envoy.filters.http.rbac",
        "filters.http.rbac.v3.RBAC",
        json!({ "rules": { "action": "ALLOW", "policies": {
            "first-node": { "permissions": [anywhere_else], "principals": [first] },
        } } }),
    )
}

/// A connection manager with one more filter before the router.
fn with_filter(mut manager: Value, filter: Value) -> Value {
    let filters = manager.pointer_mut("/typed_config/http_filters");
    let filters = filters
        .and_then(Value::as_array_mut)
        .expect("a manager has filters");
    filters.insert(0, filter);
    manager
}

fn tls(context: &str, config: Value) -> Value {
    typed(
        "envoy.transport_sockets.tls",
        &format!("transport_sockets.tls.v3.{context}"),
        config,
    )
}

/// Key and certificate from a file, roots from another, and whom the peer must be, where that matters.
fn tls_context(secrets: &SecretFiles, peer: Option<&str>) -> Value {
    let from = |name: &str, file: &Path| json!({ "name": name, "sds_config": { "path_config_source": { "path": file } } });
    let names: Vec<Value> = peer
        .map(|peer| json!({ "san_type": "URI", "matcher": { "exact": peer } }))
        .into_iter()
        .collect();
    json!({
        "tls_certificate_sds_secret_configs": [from("default", &secrets.certificate)],
        "combined_validation_context": {
            "default_validation_context": { "match_typed_subject_alt_names": names },
            "validation_context_sds_secret_config": from("ROOTCA", &secrets.roots),
        },
    })
}

/// A cluster with mutual TLS to `peer`. A connection carries ten requests, so that new certificates are soon in use.
fn secured(mut cluster: Value, peer: &str, secrets: &SecretFiles) -> Value {
    cluster["transport_socket"] = tls(
        "UpstreamTlsContext",
        json!({ "common_tls_context": tls_context(secrets, Some(peer)) }),
    );
    let options = typed(
        "",
        "upstreams.http.v3.HttpProtocolOptions",
        json!({
            "common_http_protocol_options": { "max_requests_per_connection": 10 },
            "explicit_http_config": { "http_protocol_options": {} },
        }),
    );
    cluster["typed_extension_protocol_options"] = json!({
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options["typed_config"],
    });
    cluster
}

fn typed(name: &str, kind: &str, mut config: Value) -> Value {
    config["@type"] = format!("type.googleapis.com/envoy.extensions.{kind}").into();
    json!({ "name": name, "typed_config": config })
}

fn tcp(prefix: &str, cluster: &str) -> Value {
    let config = json!({ "stat_prefix": prefix, "cluster": cluster });
    typed(
        "envoy.filters.network.tcp_proxy",
        "filters.network.tcp_proxy.v3.TcpProxy",
        config,
    )
}

/// `routes` is the manager's `route_config` or `rds`.
fn http(name: &str, mut routes: Value) -> Value {
    let router = typed(
        "envoy.filters.http.router",
        "filters.http.router.v3.Router",
        json!({}),
    );
    routes["stat_prefix"] = name.into();
    routes["codec_type"] = "HTTP1".into();
    routes["http_filters"] = json!([router]);
    typed(
        "envoy.filters.network.http_connection_manager",
        "filters.network.http_connection_manager.v3.HttpConnectionManager",
        routes,
    )
}

fn inbound_routes() -> Value {
    let route = json!({ "match": { "prefix": "/" }, "route": { "cluster": "original", "timeout": "0s" } });
    json!([{ "name": "inbound", "domains": ["*"], "routes": [route] }])
}

fn outbound_routes(ipv6: bool) -> Value {
    let cluster = |name: &str| family(name, ipv6);
    let all = json!({ "prefix": "/" });
    let to = |name: &str| json!([{ "match": all.clone(), "route": { "cluster": cluster(name) } }]);
    let split = json!([
        {
            "match": {
                "prefix": "/",
                "headers": [{ "name": "x-version", "string_match": { "exact": "2" } }],
            },
            "route": { "cluster": cluster("remote") },
        },
        {
            "match": all.clone(),
            "route": { "weighted_clusters": { "clusters": [
                { "name": cluster("local"), "weight": 90 },
                { "name": cluster("remote"), "weight": 10 },
            ] } },
        },
    ]);
    let retried = json!([{ "match": all.clone(), "route": {
        "cluster": cluster("flaky"),
        "retry_policy": {
            "retry_on": "connect-failure,refused-stream",
            "num_retries": 2,
            "retry_host_predicate": [typed(
                "envoy.retry_host_predicates.previous_hosts",
                "retry.host.previous_hosts.v3.PreviousHostsPredicate",
                json!({}),
            )],
            "host_selection_retry_max_attempts": 5,
        },
    } }]);
    let slow = json!([{ "match": all.clone(), "route": { "cluster": cluster("local"), "timeout": "0.2s" } }]);
    json!([
        { "name": "local", "domains": ["local"], "routes": to("local") },
        { "name": "remote", "domains": ["remote"], "routes": to("remote") },
        { "name": "secure", "domains": ["secure"], "routes": to("secure") },
        { "name": "flaky", "domains": ["flaky"], "routes": to("flaky") },
        { "name": "retried", "domains": ["retried"], "routes": retried },
        { "name": "split", "domains": ["split"], "routes": split },
        { "name": "slow", "domains": ["slow"], "routes": slow },
        { "name": "dead", "domains": ["dead"], "routes": to("dead") },
        { "name": "nobody", "domains": ["nobody"], "routes": to("nobody") },
    ])
}

fn original_destination(name: &str) -> Value {
    json!({ "name": name, "type": "ORIGINAL_DST", "lb_policy": "CLUSTER_PROVIDED", "connect_timeout": "2s" })
}

fn endpoint(pod: &Pod, ipv6: bool, port: u16) -> Value {
    let address = pod
        .addresses
        .iter()
        .find(|address| address.is_ipv6() == ipv6)
        .expect("a pod has both families");
    json!({ "endpoint": { "address": socket_address(&address.to_string(), port) } })
}

fn endpoints(name: &str, endpoints: &[Value]) -> Value {
    json!({
        "name": name,
        "type": "STATIC",
        "connect_timeout": "2s",
        "load_assignment": { "cluster_name": name, "endpoints": [{ "lb_endpoints": endpoints }] },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use dpumesh_core::{MacAddr, PortRef};

    #[test]
    fn the_proxy_takes_its_bootstrap() {
        let pod = |name: &str, v4: &str, v6: &str| Pod {
            name: name.to_owned(),
            node: 0,
            port: PortRef::vf(0),
            mac: MacAddr([2, 0, 0, 0, 0, 1]),
            addresses: vec![v4.parse().expect("address"), v6.parse().expect("address")],
        };
        let folder = tempfile::tempdir().expect("a folder");
        let watched = folder.path().join("routes.json");
        std::fs::write(&watched, routes().to_string()).expect("written");
        let bootstrap = bootstrap(
            0,
            &pod("a", "10.244.1.1", "fd00:244:1::1"),
            &pod("b", "10.244.2.1", "fd00:244:2::1"),
            &watched,
            &SecretFiles::within(folder.path()),
        );
        let file = folder.path().join("proxy.json");
        std::fs::write(&file, bootstrap.to_string()).expect("written");
        dpumesh_proxy::program::validate(&file).expect("the proxy takes the file");
    }
}
