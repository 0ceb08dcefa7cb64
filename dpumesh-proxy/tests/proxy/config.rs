//! What the configuration may say, and how it is refused.

use std::path::Path;

use dpumesh_proxy::access_log::Sinks;
use dpumesh_proxy::config::ConfigError;
use dpumesh_proxy::config::files::Files;
use dpumesh_proxy::config::model::Config;
use dpumesh_proxy::stats::Registry;
use proptest::prelude::*;

const GOOD: &str = r#"
node: {id: a, cluster: b}
admin: {address: {socket_address: {address: 127.0.0.1, port_value: 1}}}
static_resources:
  listeners:
  - name: web
    address: {socket_address: {address: 127.0.0.1, port_value: 80}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: web
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes:
              - match: {prefix: /}
                route: {cluster: app, timeout: 1.5s}
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}
  clusters:
  - name: app
    type: STATIC
    load_assignment: {cluster_name: app, endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: "::1", port_value: 2}}}}]}]}
"#;

fn load(file: &str, text: &str) -> Result<Config, ConfigError> {
    let registry = Registry::new(1);
    let sinks = Sinks::new(&registry).unwrap();
    Files::parse(Path::new(file), text)?.load(&registry, &sinks)
}

/// The good bootstrap as JSON, with one value set.
fn with(pointer: &str, value: serde_json::Value) -> String {
    let mut json: serde_json::Value = serde_saphyr::from_str(GOOD).unwrap();
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    let parent = json.pointer_mut(parent).unwrap_or_else(|| panic!("{pointer}"));
    match parent {
        serde_json::Value::Array(items) => items.push(value),
        parent => parent[key] = value,
    }
    json.to_string()
}

#[test]
fn the_good_one_compiles_and_json_gives_the_same() {
    let yaml = load("a.yaml", GOOD).unwrap();
    let json: serde_json::Value = serde_saphyr::from_str(GOOD).unwrap();
    let json = load("a.json", &json.to_string()).unwrap();
    assert_eq!(yaml.dump.bootstrap(), json.dump.bootstrap());
    assert_eq!(yaml.listeners[0].fingerprint, json.listeners[0].fingerprint);
    assert_eq!(yaml.clusters[0].endpoints, json.clusters[0].endpoints);
    assert_eq!(yaml.clusters[0].endpoints[0].address.to_string(), "[::1]:2");
}

#[test]
fn what_is_not_implemented_is_refused_with_its_path() {
    use serde_json::json;
    let listener = "/static_resources/listeners/0";
    let manager = "/static_resources/listeners/0/filter_chains/0/filters/0/typed_config";
    let host = format!("{manager}/route_config/virtual_hosts/0");
    let route = format!("{host}/routes/0");
    let cluster = "/static_resources/clusters/0";
    let any = |kind: &str| json!({"@type": format!("type.googleapis.com/{kind}")});
    let cases = [
        ("/layered_runtime".to_owned(), json!({"layers": []})),
        ("/stats_config".to_owned(), json!({"use_all_default_tags": false})),
        (
            "/dynamic_resources".to_owned(),
            json!({"ads_config": {"api_type": "REST"}}),
        ),
        ("/stats_sinks".to_owned(), json!([{"name": "x"}])),
        (format!("{listener}/use_original_dst"), json!(true)),
        (format!("{listener}/bind_to_port"), json!(false)),
        (
            format!("{listener}/connection_balance_config"),
            json!({"exact_balance": {}}),
        ),
        (
            format!("{manager}/upgrade_configs"),
            json!([{"upgrade_type": "websocket", "filters": []}, {"upgrade_type": "h2c"}]),
        ),
        (
            format!("{manager}/http2_protocol_options"),
            json!({"allow_metadata": true}),
        ),
        (format!("{manager}/codec_type"), json!("HTTP3")),
        (format!("{manager}/use_remote_address"), json!(true)),
        (format!("{manager}/local_reply_config"), json!({"mappers": []})),
        (
            format!("{manager}/proxy_status_config"),
            json!({"remove_details": true}),
        ),
        (format!("{manager}/via"), json!("a")),
        (format!("{host}/hedge_policy"), json!({"initial_requests": 1})),
        (format!("{host}/cors"), json!({})),
        (format!("{host}/rate_limits"), json!([{"actions": []}])),
        (
            format!("{route}/typed_per_filter_config"),
            json!({"x": any("envoy.extensions.filters.http.router.v3.Router")}),
        ),
        (
            format!("{route}/route/internal_redirect_policy"),
            json!({"allow_cross_scheme_redirect": true}),
        ),
        (format!("{route}/route/auto_host_rewrite"), json!(true)),
        (
            format!("{route}/route/request_mirror_policies"),
            json!([{"cluster_header": "x-mirror"}]),
        ),
        (
            format!("{route}/route/hash_policy"),
            json!([{"filter_state": {"key": "x"}}]),
        ),
        (
            format!("{route}/match/runtime_fraction"),
            json!({"default_value": {"numerator": 1}}),
        ),
        (
            format!("{cluster}/health_checks"),
            json!([{"event_log_path": "/dev/null"}]),
        ),
        (
            format!("{cluster}/dns_resolvers"),
            json!([{"socket_address": {"address": "127.0.0.1", "port_value": 53}}]),
        ),
        (
            format!("{cluster}/lb_policy"),
            json!("LOAD_BALANCING_POLICY_CONFIG"),
        ),
        (
            format!("{cluster}/http2_protocol_options"),
            json!({"hpack_table_size": 4096}),
        ),
        (
            format!("{cluster}/upstream_bind_config"),
            json!({"source_address": {"address": "127.0.0.1", "port_value": 0}}),
        ),
        (
            format!("{cluster}/lb_subset_config"),
            json!({"panic_mode_any": true}),
        ),
        (
            format!("{cluster}/load_assignment/endpoints/0/proximity"),
            json!(1),
        ),
    ];
    for (pointer, value) in cases {
        let refused = load("a.json", &with(&pointer, value)).err();
        let error = refused.unwrap_or_else(|| panic!("{pointer} was taken"));
        let wanted = as_path(&pointer);
        assert!(error.path.starts_with(&wanted), "{pointer}: {error}");
        assert!(error.reason.contains("supported yet"), "{pointer}: {error}");
    }
}

/// `/a/0/b` as `a[0].b`.
fn as_path(pointer: &str) -> String {
    pointer
        .split('/')
        .skip(1)
        .fold(String::new(), |path, part| match part.parse::<usize>() {
            Ok(index) => format!("{path}[{index}]"),
            Err(_) if path.is_empty() => part.to_owned(),
            Err(_) => format!("{path}.{part}"),
        })
}

#[test]
fn tls_that_verifies_nobody_is_refused() {
    let upstream = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext";
    let downstream = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext";
    let refused = |pointer: &str, typed: serde_json::Value| {
        let socket = serde_json::json!({"name": "tls", "typed_config": typed});
        load("a.json", &with(pointer, socket)).unwrap_err().to_string()
    };
    let cluster = "/static_resources/clusters/0/transport_socket";
    let common = "static_resources.clusters[0].transport_socket.typed_config.common_tls_context";
    assert_eq!(
        refused(
            cluster,
            serde_json::json!({"@type": upstream, "sni": "a", "common_tls_context": {}})
        ),
        format!(
            "{common}.validation_context: trusted roots must be given: a server that is not verified is not connected to"
        )
    );
    let old = serde_json::json!({"@type": upstream, "common_tls_context": {"tls_params": {"tls_maximum_protocol_version": "TLSv1_1"},
        "validation_context_sds_secret_config": {"name": "ROOTCA@td", "sds_config": {"ads": {}}}}});
    assert_eq!(
        refused(cluster, old),
        format!(
            "{common}.tls_params.tls_maximum_protocol_version: TLSv1_1: versions before TLS 1.2 are not spoken"
        )
    );
    let chain = "/static_resources/listeners/0/filter_chains/0/transport_socket";
    let error = refused(
        chain,
        serde_json::json!({"@type": downstream, "common_tls_context": {}}),
    );
    assert!(
        error.ends_with("tls_certificates: a certificate must be given"),
        "{error}"
    );
    let hostless = serde_json::json!({"@type": downstream, "require_client_certificate": true, "common_tls_context": {
        "tls_certificate_sds_secret_configs": [{"name": "spiffe://td/ns/a/sa/b", "sds_config": {"ads": {}}}]}});
    let error = refused(chain, hostless);
    assert!(
        error.ends_with("trusted roots must be given where a client certificate is required"),
        "{error}"
    );
}

#[test]
fn other_http_filters_are_refused_by_name() {
    let manager = "static_resources.listeners[0].filter_chains[0].filters[0].typed_config";
    for kind in [
        "envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor",
        "envoy.extensions.filters.http.lua.v3.Lua",
    ] {
        let filter = serde_json::json!({"name": "x", "typed_config": {"@type": format!("type.googleapis.com/{kind}")}});
        let pointer = "/static_resources/listeners/0/filter_chains/0/filters/0/typed_config/http_filters/-";
        let error = load("a.json", &with(pointer, filter)).unwrap_err();
        assert_eq!(error.path, format!("{manager}.http_filters[1].typed_config"));
        assert_eq!(error.reason, format!("type {kind} is not supported yet"));
    }
}

#[test]
fn what_access_rules_cannot_decide_is_refused_by_name() {
    use serde_json::json;
    let any = json!([{"any": true}]);
    let policy = |permission, principal| json!({"policies": {"p": {"permissions": [permission], "principals": [principal]}}});
    let metadata =
        json!({"filter": "istio_authn", "path": [{"key": "payload"}], "value": {"present_match": true}});
    let everything = || json!({"any": true});
    for (rules, path, reason) in [
        (
            policy(everything(), json!({"metadata": metadata})),
            ".policies[p].principals[0].metadata.filter",
            "\"istio_authn\" is not supported yet, only \"envoy.filters.http.jwt_authn\"",
        ),
        (
            policy(
                everything(),
                json!({"filter_state": {"key": "k", "string_match": {"exact": "a"}}}),
            ),
            ".policies[p].principals[0].filter_state",
            "filter_state of envoy.config.rbac.v3.Principal is not supported yet",
        ),
        (
            policy(json!({"metadata": metadata}), everything()),
            ".policies[p].permissions[0].metadata.filter",
            "\"istio_authn\" is not supported yet, only \"envoy.filters.http.jwt_authn\"",
        ),
        (
            policy(
                json!({"url_path": {"path": {"safe_regex": {"regex": "a)("}}}}),
                everything(),
            ),
            ".policies[p].permissions[0].url_path.path.safe_regex.regex",
            "",
        ),
        (
            json!({"policies": {"p": {"permissions": any}}}),
            ".policies[p].principals",
            "at least one must be given",
        ),
    ] {
        let filter = json!({"name": "rbac", "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC", "rules": rules}});
        let router = json!({"name": "router", "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}});
        let manager = "/static_resources/listeners/0/filter_chains/0/filters/0/typed_config";
        let text = with(&format!("{manager}/http_filters"), json!([filter, router]));
        let error = load("a.json", &text).unwrap_err();
        let front = format!("{}.http_filters[0].typed_config.rules", as_path(manager));
        assert_eq!(error.path, format!("{front}{path}"));
        assert!(reason.is_empty() || error.reason == reason, "{}", error.reason);
    }
}

#[test]
fn values_that_make_no_sense_are_refused_with_their_path() {
    use serde_json::json;
    let manager = "/static_resources/listeners/0/filter_chains/0/filters/0/typed_config";
    let route = format!("{manager}/route_config/virtual_hosts/0/routes/0");
    let cluster = "/static_resources/clusters/0";
    for (pointer, value) in [
        (
            "/static_resources/listeners/0/address/socket_address/address".to_owned(),
            json!("example.com"),
        ),
        (
            "/static_resources/listeners/0/address/socket_address/port_value".to_owned(),
            json!(70000),
        ),
        (format!("{manager}/stat_prefix"), json!("")),
        (format!("{route}/route/cluster"), json!("nowhere")),
        (format!("{route}/route/timeout"), json!("-1s")),
        (format!("{route}/match"), json!({"safe_regex": {"regex": "("}})),
        (
            format!("{route}/request_headers_to_add"),
            json!([{"header": {"key": "x", "value": "%RESP(a)%"}}]),
        ),
        (
            format!("{route}/request_headers_to_add"),
            json!([{"header": {"key": "host", "value": "a"}}]),
        ),
        (
            format!("{route}/response_headers_to_remove"),
            json!(["content-length"]),
        ),
        (
            format!("{manager}/route_config/virtual_hosts/0/domains"),
            json!(["a", "A"]),
        ),
        (
            format!("{manager}/access_log"),
            json!([{"typed_config": {"@type": "type.googleapis.com/envoy.extensions.access_loggers.stream.v3.StdoutAccessLog", "log_format": {"text_format": "%NOPE%"}}}]),
        ),
        (format!("{cluster}/connect_timeout"), json!("0s")),
        (format!("{cluster}/name"), json!("")),
    ] {
        let refused = load("a.json", &with(&pointer, value)).err();
        let error = refused.unwrap_or_else(|| panic!("{pointer} was taken"));
        assert!(error.path.starts_with(&as_path(&pointer)), "{pointer}: {error}");
    }
}

#[test]
fn text_cut_at_every_length_is_refused_or_read_but_never_a_panic() {
    let json: serde_json::Value = serde_saphyr::from_str(GOOD).unwrap();
    let json = serde_json::to_string_pretty(&json).unwrap();
    for length in 0..json.len() {
        assert!(load("a.json", &json[..length]).is_err(), "{length}");
    }
    for length in (0..GOOD.len()).step_by(7) {
        let _ = load("a.yaml", &GOOD[..length]);
    }
}

#[test]
fn odd_texts_are_refused() {
    for text in [
        "[]",
        "1",
        "\"a\"",
        "a: *b",
        "a: &a [*a]",
        "{",
        "\u{0}",
        "- - - -",
        "node: []",
        "node: {id: {}}",
        "? : ?",
    ] {
        assert!(load("a.yaml", text).is_err(), "{text:?}");
    }
    let laughs = "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n\
                  d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e,*e,*e]\n\
                  g: &g [*f,*f,*f,*f,*f,*f,*f,*f,*f]\nh: [*g,*g,*g,*g,*g,*g,*g,*g,*g]\n";
    assert!(load("a.yaml", laughs).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn a_bootstrap_with_octets_changed_never_panics(at in 0..GOOD.len(), with in "\\PC{0,3}", cut in 0..4usize) {
        let mut end = (at + cut).min(GOOD.len());
        let mut start = at;
        while !GOOD.is_char_boundary(start) { start -= 1; }
        while !GOOD.is_char_boundary(end) { end += 1; }
        let text = format!("{}{with}{}", &GOOD[..start], &GOOD[end..]);
        let _ = load("a.yaml", &text);
    }
}
