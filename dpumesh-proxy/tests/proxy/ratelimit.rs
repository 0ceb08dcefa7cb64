//! Local rate limits of requests and of connections. Each case is checked at Envoy too.

use crate::envoy::at_both;
use crate::harness::{Endpoint, bootstrap_with, cluster};

const RATE: &str = "type.googleapis.com/envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit";

const ALL: &str = "{default_value: {numerator: 100}}";

fn rate(prefix: &str, more: &str) -> String {
    format!("{{\"@type\": {RATE}, stat_prefix: {prefix}{more}}}")
}

fn filter(config: &str) -> String {
    format!("- {{name: envoy.filters.http.local_ratelimit, typed_config: {config}}}\n          ")
}

fn app(endpoint: &Endpoint) -> String {
    format!("[{}]", cluster("app", &[endpoint.address], ""))
}

fn bucket(tokens: u32) -> String {
    format!("token_bucket: {{max_tokens: {tokens}, tokens_per_fill: 1, fill_interval: 3600s}}")
}

#[test]
fn requests_beyond_the_bucket_are_answered_for() {
    let on = format!(", filter_enabled: {ALL}, filter_enforced: {ALL}");
    let per_route =
        |config: &str| format!("typed_per_filter_config: {{envoy.filters.http.local_ratelimit: {config}}}");
    let routes = format!(
        "[{{match: {{prefix: /own}}, route: {{cluster: app}}, {}}}, {{match: {{prefix: /dry}}, route: {{cluster: app}}, {}}}, \
          {{match: {{prefix: /off}}, route: {{cluster: app}}, {}}}, {{match: {{prefix: /}}, route: {{cluster: app}}, \
          response_headers_to_add: [{{header: {{key: x-route, value: r}}}}]}}]",
        per_route(&rate(
            "own",
            &format!("{on}, {}, status: {{code: ServiceUnavailable}}", bucket(1))
        )),
        per_route(&rate("dry", &format!(", filter_enabled: {ALL}, {}", bucket(1)))),
        per_route(&rate("none", &format!(", {}", bucket(1)))),
    );
    let more = format!(
        "{on}, {}, response_headers_to_add: [{{header: {{key: x-limited, value: \"yes\"}}, append_action: OVERWRITE_IF_EXISTS_OR_ADD}}]",
        bucket(3)
    );
    let filter = filter(&rate("all", &more));
    at_both(
        |endpoint, _| bootstrap_with(&routes, &app(endpoint), "", &filter, ""),
        |subject, endpoint| {
            let name = subject.name();
            let mut client = subject.client();
            for _ in 0..3 {
                let response = client.get("/");
                assert_eq!(
                    (response.status(), response.header("x-limited")),
                    (200, None),
                    "{name}"
                );
            }
            for _ in 0..2 {
                let response = client.get("/");
                assert_eq!(
                    (response.status(), response.text().as_str()),
                    (429, "local_rate_limited"),
                    "{name}"
                );
                assert_eq!(response.header("x-limited"), Some("yes"), "{name}");
                assert_eq!(response.header("x-route"), Some("r"), "{name}");
                assert_eq!(response.header("x-envoy-ratelimited"), None, "{name}");
            }
            let statuses = |client: &mut crate::harness::Client, path: &str| -> Vec<u16> {
                (0..3).map(|_| client.get(path).status()).collect()
            };
            assert_eq!(statuses(&mut client, "/own"), [200, 503, 503], "{name}");
            assert_eq!(statuses(&mut client, "/dry"), [200; 3], "{name}");
            assert_eq!(statuses(&mut client, "/off"), [200; 3], "{name}");
            assert_eq!(endpoint.requests(), 3 + 1 + 3 + 3, "{name}");
            for (stat, wanted) in [
                ("all.http_local_rate_limit.enabled", 5),
                ("all.http_local_rate_limit.ok", 3),
                ("all.http_local_rate_limit.rate_limited", 2),
                ("all.http_local_rate_limit.enforced", 2),
                ("own.http_local_rate_limit.enforced", 2),
                ("dry.http_local_rate_limit.rate_limited", 2),
                ("dry.http_local_rate_limit.enforced", 0),
                ("none.http_local_rate_limit.enabled", 0),
            ] {
                assert_eq!(subject.await_stat(stat, wanted), wanted, "{stat} at {name}");
            }
            // A gRPC request is told in its own way.
            client.send(
                "POST / HTTP/1.1\r\nHost: a\r\nContent-Type: application/grpc\r\nContent-Length: 0\r\n\r\n",
            );
            let response = client.receive();
            assert_eq!(
                (response.status(), response.header("grpc-status")),
                (200, Some("14")),
                "{name}"
            );
            assert_eq!(
                response.header("grpc-message"),
                Some("local_rate_limited"),
                "{name}"
            );
        },
    );
}

#[test]
fn a_bucket_fills_again() {
    let config = rate(
        "all",
        &format!(
            ", filter_enabled: {ALL}, filter_enforced: {ALL}, token_bucket: {{max_tokens: 1, tokens_per_fill: 1, fill_interval: 1s}}"
        ),
    );
    let filter = filter(&config);
    at_both(
        |endpoint, _| {
            let routes = "[{match: {prefix: /}, route: {cluster: app}}]";
            bootstrap_with(routes, &app(endpoint), "", &filter, "")
        },
        |subject, _| {
            let mut client = subject.client();
            assert_eq!(client.get("/").status(), 200);
            crate::harness::await_true("a token comes", || client.get("/").status() == 200);
        },
    );
}

#[test]
fn connections_beyond_the_bucket_are_closed() {
    let network = "type.googleapis.com/envoy.extensions.filters.network";
    at_both(
        |endpoint, _| {
            let clusters = app(endpoint);
            format!(
                r#"
admin: {{address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}}}
static_resources:
  listeners:
  - name: web
    address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}
    filter_chains:
    - filters:
      - name: none
        typed_config: {{"@type": {network}.local_ratelimit.v3.LocalRateLimit, stat_prefix: none, token_bucket: {{max_tokens: 1, fill_interval: 3600s}}, runtime_enabled: {{default_value: false, runtime_key: k}}}}
      - name: rate
        typed_config: {{"@type": {network}.local_ratelimit.v3.LocalRateLimit, stat_prefix: in, token_bucket: {{max_tokens: 2, fill_interval: 3600s}}}}
      - name: envoy.filters.network.tcp_proxy
        typed_config: {{"@type": {network}.tcp_proxy.v3.TcpProxy, stat_prefix: t, cluster: app}}
  clusters: {clusters}
"#
            )
        },
        |subject, endpoint| {
            for passes in [true, true, false, false] {
                let mut client = subject.client();
                if passes {
                    assert_eq!(client.get("/until-close").status(), 200, "{}", subject.name());
                } else {
                    assert!(client.is_closed(), "{}", subject.name());
                }
            }
            assert_eq!(endpoint.requests(), 2, "{}", subject.name());
            assert_eq!(subject.await_stat("local_rate_limit.in.rate_limited", 2), 2);
        },
    );
}
