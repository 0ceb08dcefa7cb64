//! What Istio's YAML asks of a proxy: access rules, faults, retries, matches, rewriting. Each case is checked at Envoy too.

use std::io::Write;
use std::net::TcpListener;
use std::time::{Duration, Instant};

use crate::envoy::at_both;
use crate::harness::{Endpoint, Message, await_true, bootstrap_with, cluster};

const RBAC: &str = "type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC";
const FAULT: &str = "type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault";
const CORS: &str = "type.googleapis.com/envoy.extensions.filters.http.cors.v3";

fn app(endpoint: &Endpoint) -> String {
    format!("[{}]", cluster("app", &[endpoint.address], ""))
}

fn all_to_app(more: &str) -> String {
    format!("[{{match: {{prefix: /}}, route: {{cluster: app{more}}}}}]")
}

fn rbac(rules: &str) -> String {
    format!(
        "- {{name: envoy.filters.http.rbac, typed_config: {{\"@type\": {RBAC}, rules: {rules}}}}}\n          "
    )
}

fn request(client: &mut crate::harness::Client, method: &str, path: &str, headers: &str) -> Message {
    let host = if headers.to_ascii_lowercase().contains("host:") {
        ""
    } else {
        "host: test\r\n"
    };
    client.send(format!(
        "{method} {path} HTTP/1.1\r\n{host}{headers}content-length: 0\r\n\r\n"
    ));
    client.receive()
}

#[test]
fn access_rules_decide_by_path_method_header_and_address() {
    let deny = rbac(
        "{action: DENY, policies: {\"ns[shop]-policy[no admin]-rule[0]\": {permissions: [{and_rules: {rules: [\
         {or_rules: {rules: [{header: {name: \":method\", string_match: {exact: POST}}}, {header: {name: \":method\", string_match: {exact: DELETE}}}]}}, \
         {or_rules: {rules: [{url_path: {path: {prefix: /api/admin}}}]}}]}}], principals: [{and_ids: {ids: [{any: true}]}}]}, \
         other: {permissions: [{url_path: {path: {exact: /from}}}], principals: [{remote_ip: {address_prefix: 192.0.2.0, prefix_len: 24}}]}}}",
    );
    let allow = rbac(
        "{policies: {paths: {permissions: [{or_rules: {rules: [{url_path: {path: {prefix: /api/}}}, {url_path: {path: {suffix: /end}}}, \
         {url_path: {path: {safe_regex: {regex: \"/re/[0-9]+\"}}}}, {url_path: {path: {exact: /from}}}]}}], principals: [{direct_remote_ip: {address_prefix: 127.0.0.0, prefix_len: 8}}]}, \
         hosts: {permissions: [{and_rules: {rules: [{header: {name: \":authority\", string_match: {suffix: .example, ignore_case: true}}}, {not_rule: {url_path: {path: {exact: /never}}}}]}}], \
         principals: [{header: {name: x-who, string_match: {prefix: me}}}]}, \
         mtls: {permissions: [{url_path: {path: {exact: /mtls}}}], principals: [{authenticated: {principal_name: {safe_regex: {regex: \".*\"}}}}]}, \
         ports: {permissions: [{and_rules: {rules: [{url_path: {path: {exact: /port}}}, {destination_port: 9}]}}], principals: [{any: true}]}}}",
    );
    at_both(
        |endpoint, _| {
            bootstrap_with(
                &all_to_app(""),
                &app(endpoint),
                "normalize_path: true",
                &format!("{deny}{allow}"),
                "",
            )
        },
        |subject, endpoint| {
            let mut client = subject.client();
            let mut denied = 0;
            for (method, path, headers, status) in [
                ("GET", "/api/x", "", 200),
                ("GET", "/api/x?q=/api/admin", "", 200),
                ("GET", "/api/admin", "", 200),
                ("POST", "/api/admin", "", 403),
                ("DELETE", "/api/admin/all?x=1", "", 403),
                ("POST", "/x/../api/admin", "", 403),
                ("POST", "/api/%61dmin", "", 403),
                ("POST", "/api//admin", "", 200),
                ("GET", "/apix", "", 403),
                ("GET", "/", "", 403),
                ("GET", "/front/end", "", 200),
                ("GET", "/front/end?x", "", 200),
                ("GET", "/front/end/", "", 403),
                ("GET", "/re/12", "", 200),
                ("GET", "/re/12x", "", 403),
                ("GET", "/h", "host: a.EXAMPLE\r\nx-who: me too\r\n", 200),
                ("GET", "/h", "host: a.example\r\nx-who: you\r\n", 403),
                ("GET", "/h", "host: a.example\r\n", 403),
                ("GET", "/never", "host: a.example\r\nx-who: me\r\n", 403),
                ("GET", "/mtls", "", 403),
                ("GET", "/port", "", 403),
                ("GET", "/from", "", 200),
                ("GET", "/from", "x-forwarded-for: 192.0.2.7\r\n", 403),
                (
                    "GET",
                    "/from",
                    "x-forwarded-for: 192.0.2.7, 198.51.100.1\r\n",
                    200,
                ),
            ] {
                let response = request(&mut client, method, path, headers);
                assert_eq!(
                    response.status(),
                    status,
                    "{method} {path} {headers:?} at {}",
                    subject.name()
                );
                if status == 403 {
                    denied += 1;
                    assert_eq!(response.text(), "RBAC: access denied");
                    assert_eq!(response.header("content-type"), Some("text/plain"));
                }
            }
            assert_eq!(endpoint.requests(), 10);
            assert_eq!(subject.await_stat("http.web.rbac.denied", denied), denied);
        },
    );
}

#[test]
fn rules_without_policies_refuse_all_and_shadow_rules_only_count() {
    let shadow = format!(
        "- {{name: envoy.filters.http.rbac, typed_config: {{\"@type\": {RBAC}, shadow_rules_stat_prefix: istio_dry_run_deny_, \
         shadow_rules: {{action: DENY, policies: {{p: {{permissions: [{{url_path: {{path: {{exact: /dry}}}}}}], principals: [{{any: true}}]}}}}}}}}}}\n          "
    );
    at_both(
        |endpoint, _| bootstrap_with(&all_to_app(""), &app(endpoint), "", &shadow, ""),
        |subject, _| {
            let mut client = subject.client();
            assert_eq!(client.get("/dry").status(), 200);
            assert_eq!(client.get("/").status(), 200);
            for member in ["denied", "allowed"] {
                let name = format!("http.web.rbac.istio_dry_run_deny_.shadow_{member}");
                assert_eq!(subject.await_stat(&name, 1), 1, "{name}");
            }
        },
    );
    at_both(
        |endpoint, _| bootstrap_with(&all_to_app(""), &app(endpoint), "", &rbac("{}"), ""),
        |subject, endpoint| {
            assert_eq!(subject.client().get("/").status(), 403);
            assert_eq!(endpoint.requests(), 0);
        },
    );
}

#[test]
fn rules_that_log_let_everything_pass_and_count_it() {
    let audit = rbac(
        "{action: LOG, policies: {p: {permissions: [{url_path: {path: {exact: /seen}}}], principals: [{any: true}]}}}",
    );
    let shadow = format!(
        "- {{name: envoy.filters.http.rbac, typed_config: {{\"@type\": {RBAC}, shadow_rules_stat_prefix: dry_, \
         shadow_rules: {{action: LOG, policies: {{p: {{permissions: [{{any: true}}], principals: [{{any: true}}]}}}}}}}}}}\n          "
    );
    at_both(
        |endpoint, _| {
            bootstrap_with(
                &all_to_app(""),
                &app(endpoint),
                "",
                &format!("{audit}{shadow}"),
                "",
            )
        },
        |subject, endpoint| {
            let mut client = subject.client();
            for path in ["/seen", "/unseen"] {
                assert_eq!(client.get(path).status(), 200);
            }
            assert_eq!(endpoint.requests(), 2);
            for (name, wanted) in [
                ("http.web.rbac.allowed", 2),
                ("http.web.rbac.denied", 0),
                ("http.web.rbac.dry_.shadow_allowed", 2),
                ("http.web.rbac.dry_.shadow_denied", 0),
            ] {
                assert_eq!(
                    subject.await_stat(name, wanted),
                    wanted,
                    "{name} at {}",
                    subject.name()
                );
            }
        },
    );
}

#[test]
fn connections_pass_the_rules_of_their_chain() {
    let network = "type.googleapis.com/envoy.extensions.filters.network";
    let rules = |rules: &str| {
        format!(
            "- {{name: envoy.filters.network.rbac, typed_config: {{\"@type\": {network}.rbac.v3.RBAC, stat_prefix: tcp., rules: {rules}}}}}"
        )
    };
    let from_here = "direct_remote_ip: {address_prefix: 127.0.0.0, prefix_len: 8}";
    let port_9 = "{permissions: [{destination_port: 9}], principals: [{any: true}]}";
    for (rules, passes) in [
        (
            rules(&format!(
                "{{action: DENY, policies: {{p: {{permissions: [{{any: true}}], principals: [{{{from_here}}}]}}}}}}"
            )),
            false,
        ),
        (
            rules(&format!("{{action: DENY, policies: {{p: {port_9}}}}}")),
            true,
        ),
        (
            rules(&format!(
                "{{policies: {{p: {{permissions: [{{not_rule: {{destination_port_range: {{start: 1, end: 10}}}}}}], principals: [{{{from_here}}}]}}}}}}"
            )),
            true,
        ),
        (rules(&format!("{{policies: {{p: {port_9}}}}}")), false),
        (
            rules("{policies: {p: {permissions: [{any: true}], principals: [{authenticated: {}}]}}}"),
            false,
        ),
        (rules("{}"), false),
    ] {
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
      {rules}
      - name: envoy.filters.network.tcp_proxy
        typed_config: {{"@type": {network}.tcp_proxy.v3.TcpProxy, stat_prefix: t, cluster: app}}
  clusters: {clusters}
"#
                )
            },
            |subject, endpoint| {
                let mut client = subject.client();
                // A refused connection may be gone before it is written to.
                let _ = client
                    .reader
                    .get_mut()
                    .write_all(b"GET /until-close HTTP/1.1\r\nHost: a\r\n\r\n");
                let got = client.try_receive().ok().flatten().map(|m| m.status());
                assert_eq!(got, passes.then_some(200), "{rules} at {}", subject.name());
                assert_eq!(endpoint.requests(), usize::from(passes));
                let member = if passes { "allowed" } else { "denied" };
                assert_eq!(
                    subject.await_stat(&format!("tcp.rbac.{member}"), 1),
                    1,
                    "{}",
                    subject.name()
                );
            },
        );
    }
}

#[test]
fn paths_reach_the_endpoint_in_one_form() {
    let extra = "normalize_path: true\n          merge_slashes: true\n          path_with_escaped_slashes_action: UNESCAPE_AND_FORWARD";
    for (extra, paths) in [
        (
            "normalize_path: true",
            vec![
                "/",
                "/a/./b",
                "/a/../b",
                "/a/b/..",
                "/../x",
                "/%61%2d%7E",
                "/%2f%5C",
                "/a\\b",
                "/a//b",
                "/a/%2e%2E/b",
                "/a/.%2e/b?c/../d",
                "/%zz",
                "/a%",
                "/[]{}|^`\"<>",
                "/!$&'()*+,;=:@",
                "/...",
                "/a/..b/.c",
                "/%c3%A9",
                "/a/b//../c",
                "/.",
                "/%2e",
                "/a;x=../b",
                "/%25%32%65",
            ],
        ),
        (
            extra,
            vec![
                "/a//b",
                "//a///b?x//y",
                "/a%2fb%2F%2fc",
                "/a%5cb",
                "/%2e%2e%2fx",
                "/a/%2f../b",
            ],
        ),
    ] {
        let seen = std::sync::Mutex::new(Vec::new());
        at_both(
            |endpoint, _| bootstrap_with(&all_to_app(""), &app(endpoint), extra, "", ""),
            |subject, _| {
                for (index, path) in paths.iter().enumerate() {
                    let response = subject.client().get(path);
                    let line = response.text().lines().next().unwrap_or_default().to_owned();
                    let line = format!("{} {line}", response.status());
                    let mut seen = seen.lock().unwrap();
                    if seen.len() < paths.len() {
                        seen.push(line);
                    } else {
                        assert_eq!(seen[index], line, "{path} at us, at {}", subject.name());
                    }
                }
            },
        );
    }
}

#[test]
fn a_response_by_which_to_retry_is_retried_and_counted() {
    let retry = ", retry_policy: {retry_on: \"gateway-error,retriable-status-codes\", num_retries: 3, retriable_status_codes: [404]}";
    let host = "include_request_attempt_count: true\n              include_attempt_count_in_response: true";
    at_both(
        |endpoint, _| bootstrap_with(&all_to_app(retry), &app(endpoint), "", "", host),
        |subject, endpoint| {
            let mut client = subject.client();
            // The endpoint's third request is the one it answers.
            let response = client.get("/until?3");
            assert_eq!(
                (response.status(), response.text().as_str()),
                (200, "3 "),
                "{}",
                subject.name()
            );
            assert_eq!(response.header("x-envoy-attempt-count"), Some("3"));
            assert_eq!(endpoint.requests(), 3);
            // A body goes out again whole, in either framing.
            client.send("POST /until?5 HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello");
            assert_eq!(client.receive().text(), "2 hello", "{}", subject.name());
            client
                .send("POST /until?7 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n");
            client.send("2\r\nde\r\n0\r\n\r\n");
            assert_eq!(client.receive().text(), "2 abcde", "{}", subject.name());
            let big = "x".repeat(300_000);
            client.send(format!(
                "POST /until?9 HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n{big}",
                big.len()
            ));
            let response = client.receive();
            assert_eq!((response.status(), response.body.len()), (200, big.len() + 2));
            assert_eq!(endpoint.requests(), 9);
            // Attempts come to an end, and the last answer is the client's.
            for (path, status, attempts) in [
                ("/status?503", 503, 4),
                ("/status?404", 404, 4),
                ("/status?500", 500, 1),
            ] {
                let before = endpoint.requests();
                let response = client.get(path);
                assert_eq!(
                    (response.status(), response.text().as_str()),
                    (status, "asked for")
                );
                assert_eq!(
                    endpoint.requests() - before,
                    attempts,
                    "{path} at {}",
                    subject.name()
                );
            }
            assert_eq!(subject.await_stat("cluster.app.upstream_rq_retry", 11), 11);
            assert_eq!(
                subject.await_stat("cluster.app.upstream_rq_retry_limit_exceeded", 2),
                2
            );
            assert_eq!(subject.await_stat("cluster.app.upstream_rq_retry_success", 4), 4);
        },
    );
}

#[test]
fn a_body_too_long_to_keep_is_sent_once() {
    let retry = ", retry_policy: {retry_on: 5xx, num_retries: 3}";
    at_both(
        |endpoint, _| bootstrap_with(&all_to_app(retry), &app(endpoint), "", "", ""),
        |subject, endpoint| {
            let mut client = subject.client();
            let long = "x".repeat(1_100_000);
            client.send(format!(
                "POST /status?503 HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n{long}",
                long.len()
            ));
            assert_eq!(client.receive().status(), 503);
            assert_eq!(endpoint.requests(), 1, "{}", subject.name());
        },
    );
}

#[test]
fn an_endpoint_that_breaks_off_or_says_nothing_is_retried_where_asked() {
    let retry =
        |on: &str| format!(", retry_policy: {{retry_on: \"{on}\", num_retries: 2, per_try_timeout: 0.2s}}");
    at_both(
        |endpoint, _| bootstrap_with(&all_to_app(&retry("5xx")), &app(endpoint), "", "", ""),
        |subject, endpoint| {
            let mut client = subject.client();
            client.send("POST /close-until?3 HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello");
            let response = client.receive();
            assert_eq!(
                (response.status(), response.text().as_str()),
                (200, "hello"),
                "{}",
                subject.name()
            );
            assert_eq!(endpoint.requests(), 3);
            assert_eq!(client.get("/silent-until?5").status(), 200, "{}", subject.name());
            assert_eq!(endpoint.requests(), 5);
            let begun = Instant::now();
            let response = client.get("/silent-until?99");
            assert_eq!(
                (response.status(), response.text().as_str()),
                (504, "upstream request timeout")
            );
            let took = begun.elapsed();
            assert!(
                took >= subject.shortest(Duration::from_millis(600)),
                "{took:?} at {}",
                subject.name()
            );
            assert_eq!(endpoint.requests(), 8, "{}", subject.name());
        },
    );
    // Istio's default conditions: a request that may have been served is not repeated.
    at_both(
        |endpoint, _| {
            let on = "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes";
            bootstrap_with(&all_to_app(&retry(on)), &app(endpoint), "", "", "")
        },
        |subject, endpoint| {
            let mut client = subject.client();
            client.send("POST /close-until?99 HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello");
            assert_eq!(client.receive().status(), 503);
            assert_eq!(endpoint.requests(), 1, "{}", subject.name());
            assert_eq!(subject.client().get("/silent-until?99").status(), 504);
            assert_eq!(endpoint.requests(), 2, "{}", subject.name());
        },
    );
}

#[test]
fn retries_at_once_are_bounded_by_number_or_budget() {
    for (limit, retried) in [
        ("", true),
        (", circuit_breakers: {thresholds: [{max_retries: 0}]}", false),
        (
            ", circuit_breakers: {thresholds: [{max_retries: 0, retry_budget: {budget_percent: {value: 100}, min_retry_concurrency: 0}}]}",
            true,
        ),
        (
            ", circuit_breakers: {thresholds: [{retry_budget: {budget_percent: {value: 20}, min_retry_concurrency: 0}}]}",
            false,
        ),
    ] {
        at_both(
            |endpoint, folder| {
                let extra = format!(
                    "access_log: [{{name: file, typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog, path: \"{folder}/log\", \
                     log_format: {{text_format_source: {{inline_string: \"%RESPONSE_FLAGS%\\n\"}}}}}}}}]"
                );
                let clusters = format!("[{}]", cluster("app", &[endpoint.address], limit));
                let retry = ", retry_policy: {retry_on: 5xx, num_retries: 2}";
                bootstrap_with(&all_to_app(retry), &clusters, &extra, "", "")
            },
            |subject, endpoint| {
                let mut client = subject.client();
                assert_eq!(client.get("/status?503").status(), 503);
                assert_eq!(client.get("/hang-up").status(), 503);
                let attempts = if retried { 6 } else { 2 };
                assert_eq!(endpoint.requests(), attempts, "{limit} at {}", subject.name());
                let overflows = if retried { 0 } else { 2 };
                subject.await_value("cluster.app.upstream_rq_retry_overflow", overflows);
                subject.await_value("cluster.app.upstream_rq_retry", if retried { 4 } else { 0 });
                let log = subject.folder().join("log");
                let lines = || std::fs::read_to_string(&log).unwrap_or_default();
                await_true("both lines are written", || lines().lines().count() >= 2);
                let expected = if retried { "URX\nURX,UC\n" } else { "UO\nUO,UC\n" };
                assert_eq!(lines(), expected, "{limit} at {}", subject.name());
            },
        );
    }
}

#[test]
fn a_retry_looks_for_another_endpoint() {
    let closed = TcpListener::bind("127.0.0.1:0").unwrap();
    let nobody = closed.local_addr().unwrap();
    drop(closed);
    let retry = ", retry_policy: {retry_on: connect-failure, num_retries: 1, host_selection_retry_max_attempts: 20, \
        retry_host_predicate: [{name: envoy.retry_host_predicates.previous_hosts, typed_config: \
        {\"@type\": type.googleapis.com/envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate}}]}";
    at_both(
        |endpoint, _| {
            let clusters = format!(
                "[{}]",
                cluster("app", &[nobody, endpoint.address], ", lb_policy: RANDOM")
            );
            bootstrap_with(&all_to_app(retry), &clusters, "", "", "")
        },
        |subject, endpoint| {
            let mut client = subject.client();
            for _ in 0..40 {
                client.send("POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi");
                let response = client.receive();
                assert_eq!(
                    (response.status(), response.text().as_str()),
                    (200, "hi"),
                    "{}",
                    subject.name()
                );
            }
            assert_eq!(endpoint.requests(), 40);
            assert!(subject.await_stat("cluster.app.upstream_rq_retry", 1) <= 40);
        },
    );
}

#[test]
fn the_time_limit_of_a_request_holds_over_all_attempts() {
    let retry = ", timeout: 0.5s, retry_policy: {retry_on: 5xx, num_retries: 9, per_try_timeout: 0.2s}";
    at_both(
        |endpoint, _| bootstrap_with(&all_to_app(retry), &app(endpoint), "", "", ""),
        |subject, endpoint| {
            let begun = Instant::now();
            let response = subject.client().get("/silent-until?99");
            assert_eq!(
                (response.status(), response.text().as_str()),
                (504, "upstream request timeout")
            );
            let took = begun.elapsed();
            assert!(
                took >= subject.shortest(Duration::from_millis(500)) && took < Duration::from_millis(1500),
                "{took:?} at {}",
                subject.name()
            );
            assert!((2..=3).contains(&endpoint.requests()), "{}", subject.name());
        },
    );
}

#[test]
fn faults_abort_and_delay_their_share() {
    let filter =
        format!("- {{name: envoy.filters.http.fault, typed_config: {{\"@type\": {FAULT}}}}}\n          ");
    let route = |path: &str, fault: &str| {
        format!(
            "{{match: {{prefix: {path}}}, route: {{cluster: app}}, typed_per_filter_config: {{envoy.filters.http.fault: {{\"@type\": {FAULT}, {fault}}}}}}}"
        )
    };
    let routes = format!(
        "[{}, {}, {}, {}, {{match: {{prefix: /}}, route: {{cluster: app}}}}]",
        route(
            "/abort",
            "abort: {http_status: 418, percentage: {numerator: 1000000, denominator: MILLION}}, headers: [{name: x-not, present_match: true, invert_match: true}]"
        ),
        route(
            "/delay",
            "delay: {fixed_delay: 0.2s, percentage: {numerator: 100}}"
        ),
        route(
            "/half",
            "abort: {http_status: 503, percentage: {numerator: 5000, denominator: TEN_THOUSAND}}"
        ),
        route("/grpc", "abort: {grpc_status: 14, percentage: {numerator: 100}}"),
    );
    at_both(
        |endpoint, _| bootstrap_with(&routes, &app(endpoint), "", &filter, ""),
        |subject, endpoint| {
            let mut client = subject.client();
            let response = client.get("/abort");
            assert_eq!(
                (response.status(), response.text().as_str()),
                (418, "fault filter abort")
            );
            assert_eq!(endpoint.requests(), 0);
            assert_eq!(
                request(&mut client, "GET", "/abort", "x-not: 1\r\n").status(),
                200
            );
            let response = client.get("/grpc");
            assert_eq!(
                (response.status(), response.text().as_str()),
                (200, "fault filter abort"),
                "{}",
                subject.name()
            );
            let begun = Instant::now();
            assert_eq!(client.get("/delay").status(), 200);
            let took = begun.elapsed();
            assert!(
                took >= subject.shortest(Duration::from_millis(200)),
                "{took:?} at {}",
                subject.name()
            );
            assert_eq!(client.get("/free").status(), 200);
            let aborted = (0..400).filter(|_| client.get("/half").status() == 503).count();
            // Five standard deviations of 400 draws at one half are 50.
            assert!(
                (150..=250).contains(&aborted),
                "{aborted} of 400 at {}",
                subject.name()
            );
            let counted = subject.await_stat("http.web.fault.aborts_injected", aborted as u64 + 2);
            assert_eq!(counted, aborted as u64 + 2);
            assert_eq!(subject.await_stat("http.web.fault.delays_injected", 1), 1);
        },
    );
}

#[test]
fn weights_split_requests() {
    let other = Endpoint::start("other");
    at_both(
        |endpoint, _| {
            let routes = "[{match: {prefix: /}, route: {weighted_clusters: {clusters: [{name: app, weight: 90}, {name: other, weight: 10}]}}}]";
            let clusters = format!(
                "[{}, {}]",
                cluster("app", &[endpoint.address], ""),
                cluster("other", &[other.address], "")
            );
            bootstrap_with(routes, &clusters, "", "", "")
        },
        |subject, endpoint| {
            let mut client = subject.client();
            (0..1000).for_each(|_| assert_eq!(client.get("/").status(), 200));
            // Five standard deviations of 1000 draws at 90 % are 47.
            assert!(
                (853..=947).contains(&endpoint.requests()),
                "{}",
                endpoint.requests()
            );
        },
    );
}

#[test]
fn routes_match_by_header_query_and_expression() {
    let routes = r#"[
        {match: {prefix: /, headers: [{name: x-a, string_match: {exact: "yes"}}]}, direct_response: {status: 201}},
        {match: {prefix: /, headers: [{name: x-b, string_match: {prefix: p}}, {name: x-c, string_match: {safe_regex: {regex: "r[0-9]+"}}}]}, direct_response: {status: 202}},
        {match: {prefix: /, headers: [{name: x-d, present_match: true}, {name: x-e, string_match: {exact: "no"}, invert_match: true, treat_missing_header_as_empty: true}, {name: x-f, present_match: true, invert_match: true}]}, direct_response: {status: 203}},
        {match: {safe_regex: {regex: "/re\\d+/.*"}, query_parameters: [{name: q, string_match: {exact: "1"}}, {name: r, string_match: {safe_regex: {regex: a+}}}]}, direct_response: {status: 205}},
        {match: {path: /exact, case_sensitive: false, headers: [{name: ":scheme", string_match: {exact: http}}, {name: ":method", string_match: {exact: GET}}]}, direct_response: {status: 206}},
        {match: {path_separated_prefix: /seg, headers: [{name: ":authority", string_match: {prefix: rev}}]}, direct_response: {status: 207}},
        {match: {prefix: /}, direct_response: {status: 299}}]"#;
    at_both(
        |endpoint, _| bootstrap_with(routes, &app(endpoint), "", "", ""),
        |subject, _| {
            let mut client = subject.client();
            for (path, headers, status) in [
                ("/", "x-a: yes\r\n", 201),
                ("/", "x-a: no\r\nx-a: yes\r\n", 201),
                ("/", "x-d: 1\r\nx-e: yes\r\nx-e: no\r\n", 299),
                ("/", "x-b: pq\r\nx-c: r1\r\n", 202),
                ("/", "x-b: pq\r\nx-c: r1x\r\n", 299),
                ("/", "x-d:\r\n", 203),
                ("/", "x-d: 1\r\nx-e: no\r\n", 299),
                ("/", "x-d: 1\r\nx-e: yes\r\n", 203),
                ("/", "x-d: 1\r\nx-f: 1\r\n", 299),
                ("/re7/x?q=1&r=aa", "", 205),
                ("/re7/x?q=1&r=b", "", 299),
                ("/re/x?q=1&r=a", "", 299),
                ("/EXACT?x", "", 206),
                ("/exact/", "", 299),
                ("/seg/x", "host: reviews\r\n", 207),
                ("/segx", "host: reviews\r\n", 299),
                ("/seg", "host: other\r\n", 299),
            ] {
                let response = request(&mut client, "GET", path, headers);
                assert_eq!(
                    response.status(),
                    status,
                    "{path} {headers:?} at {}",
                    subject.name()
                );
            }
        },
    );
}

#[test]
fn paths_hosts_and_headers_are_rewritten() {
    let routes = r#"[
        {match: {prefix: /rr}, route: {cluster: app, regex_rewrite: {pattern: {regex: "/rr/([^/]+)/(.*)"}, substitution: '/new/\2/\1$1'}}},
        {match: {prefix: /pre}, route: {cluster: app, prefix_rewrite: /other, host_rewrite_literal: other.example},
         request_headers_to_add: [{header: {key: x-set, value: v}, append_action: OVERWRITE_IF_EXISTS_OR_ADD}, {header: {key: x-add, value: a}},
          {header: {key: x-made, value: "a%REQ(X-SET)%b%REQ(x-none)%c%PROTOCOL%d%%"}}, {header: {key: x-none, value: "%REQ(x-none)%"}}], request_headers_to_remove: [x-rm],
         response_headers_to_add: [{header: {key: x-radd, value: "w%REQ(:METHOD)%"}}], response_headers_to_remove: [x-endpoint]}]"#;
    at_both(
        |endpoint, _| bootstrap_with(routes, &app(endpoint), "", "", ""),
        |subject, _| {
            let mut client = subject.client();
            let seen = client.get("/rr/a/b/c?q=/rr/x/y").text();
            assert!(
                seen.starts_with("GET /new/b/c/a$1?q=/rr/x/y "),
                "{seen} at {}",
                subject.name()
            );
            assert!(
                seen.contains("x-envoy-original-path: /rr/a/b/c?q=/rr/x/y"),
                "{seen}"
            );
            let response = request(
                &mut client,
                "GET",
                "/prefix?x",
                "x-set: old\r\nx-add: b\r\nx-rm: 1\r\n",
            );
            let seen = response.text();
            assert!(seen.starts_with("GET /otherfix?x "), "{seen}");
            for wanted in [
                "host: other.example",
                "x-set: v",
                "x-add: a",
                "x-made: aoldbcHTTP/1.1d%",
            ] {
                assert!(seen.contains(wanted), "{wanted} in {seen}");
            }
            assert!(!seen.contains("x-rm") && !seen.contains("x-none"), "{seen}");
            assert_eq!(response.header("x-radd"), Some("wGET"));
            assert_eq!(response.header("x-endpoint"), None);
        },
    );
}

#[test]
fn cross_origin_requests_are_answered() {
    let filter =
        format!("- {{name: envoy.filters.http.cors, typed_config: {{\"@type\": {CORS}.Cors}}}}\n          ");
    let routes = format!(
        "[{{match: {{prefix: /cors}}, route: {{cluster: app}}, typed_per_filter_config: {{envoy.filters.http.cors: {{\"@type\": {CORS}.CorsPolicy, \
         allow_origin_string_match: [{{exact: \"https://a.example\"}}, {{prefix: \"https://b.\"}}], allow_methods: \"GET,POST\", allow_headers: x-h, expose_headers: x-e, \
         max_age: \"86400\", allow_credentials: true, filter_enabled: {{default_value: {{numerator: 100}}}}, forward_not_matching_preflights: false}}}}}}, \
         {{match: {{prefix: /}}, route: {{cluster: app}}}}]"
    );
    at_both(
        |endpoint, _| bootstrap_with(&routes, &app(endpoint), "", &filter, ""),
        |subject, endpoint| {
            let mut client = subject.client();
            let all = |m: &Message| -> Vec<String> {
                let cors = m.headers.iter().filter(|(n, _)| n.starts_with("access-control"));
                cors.map(|(n, v)| format!("{}={v}", &n["access-control-".len()..]))
                    .collect()
            };
            let preflight = "access-control-request-method: POST\r\n";
            let a = "origin: https://a.example\r\n";
            let response = request(&mut client, "OPTIONS", "/cors", &format!("{a}{preflight}"));
            assert_eq!(response.status(), 200);
            assert_eq!(
                all(&response),
                [
                    "allow-credentials=true",
                    "allow-headers=x-h",
                    "allow-methods=GET,POST",
                    "allow-origin=https://a.example",
                    "expose-headers=x-e",
                    "max-age=86400"
                ],
                "{}",
                subject.name()
            );
            assert_eq!(endpoint.requests(), 0);
            let response = request(
                &mut client,
                "OPTIONS",
                "/cors",
                &format!("origin: https://evil\r\n{preflight}"),
            );
            assert_eq!(response.status(), 200);
            assert_eq!(
                all(&response),
                [
                    "allow-credentials=true",
                    "allow-headers=x-h",
                    "allow-methods=GET,POST",
                    "max-age=86400"
                ],
                "{}",
                subject.name()
            );
            assert_eq!(endpoint.requests(), 0);
            let response = request(&mut client, "GET", "/cors", "origin: https://b.x\r\n");
            assert_eq!(
                all(&response),
                [
                    "allow-credentials=true",
                    "allow-origin=https://b.x",
                    "expose-headers=x-e"
                ]
            );
            assert!(all(&request(&mut client, "GET", "/cors", "origin: https://evil\r\n")).is_empty());
            assert!(all(&request(&mut client, "GET", "/", a)).is_empty());
            assert_eq!(endpoint.requests(), 3);
            assert_eq!(subject.await_stat("http.web.cors.origin_valid", 2), 2);
            assert_eq!(subject.await_stat("http.web.cors.origin_invalid", 2), 2);
        },
    );
}

#[test]
fn the_access_log_says_why_as_envoy_does() {
    let filters = format!(
        "{}- {{name: envoy.filters.http.fault, typed_config: {{\"@type\": {FAULT}}}}}\n          ",
        rbac(
            "{action: DENY, policies: {\"ns[a]-policy[b c]-rule[0]\": {permissions: [{url_path: {path: {exact: /denied}}}], principals: [{any: true}]}}}"
        )
    );
    let routes = format!(
        "[{{match: {{prefix: /fault}}, route: {{cluster: app}}, typed_per_filter_config: {{envoy.filters.http.fault: {{\"@type\": {FAULT}, \
         abort: {{http_status: 418, percentage: {{numerator: 100}}}}, delay: {{fixed_delay: 0.01s, percentage: {{numerator: 100}}}}}}}}}}, \
         {{match: {{prefix: /direct}}, direct_response: {{status: 202}}}}, {{match: {{prefix: /redirect}}, redirect: {{path_redirect: /x}}}}, \
         {{match: {{prefix: /nobody}}, route: {{cluster: nobody}}}}, {{match: {{prefix: /refused}}, route: {{cluster: refused}}}}, \
         {{match: {{prefix: /again/}}, route: {{cluster: app, prefix_rewrite: /, retry_policy: {{retry_on: 5xx, num_retries: 1}}}}}}, \
         {{match: {{prefix: /slow}}, route: {{cluster: app, prefix_rewrite: /silent-until, timeout: 0.1s}}}}, \
         {{match: {{prefix: /try}}, route: {{cluster: app, prefix_rewrite: /silent-until, timeout: 1s, retry_policy: {{retry_on: connect-failure, per_try_timeout: 0.1s}}}}}}, \
         {{match: {{prefix: /broken}}, route: {{cluster: app, prefix_rewrite: /hang-up}}}}, {{match: {{prefix: /app}}, route: {{cluster: app, prefix_rewrite: /}}}}]"
    );
    let closed = TcpListener::bind("127.0.0.1:0").unwrap();
    let refused = closed.local_addr().unwrap();
    drop(closed);
    at_both(
        |endpoint, folder| {
            let clusters = format!(
                "[{}, {}, {}]",
                cluster("app", &[endpoint.address], ""),
                cluster("nobody", &[], ""),
                cluster("refused", &[refused], "")
            );
            let extra = format!(
                "access_log: [{{name: file, typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog, path: \"{folder}/log\", \
                 log_format: {{text_format_source: {{inline_string: \"%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %CONNECTION_TERMINATION_DETAILS% %REQUESTED_SERVER_NAME% %UPSTREAM_CLUSTER_RAW% %DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%\\n\"}}}}}}}}]"
            );
            // Found again by the check below.
            *LOG.lock().unwrap() = format!("{folder}/log");
            bootstrap_with(&routes, &clusters, &extra, &filters, "")
        },
        |subject, _| {
            let mut client = subject.client();
            let wanted = [
                ("/app", "200 - via_upstream - - app 127.0.0.1"),
                (
                    "/denied",
                    "403 - rbac_access_denied_matched_policy[ns[a]-policy[b_c]-rule[0]] - - - 127.0.0.1",
                ),
                ("/fault", "418 DI,FI fault_filter_abort - - app 127.0.0.1"),
                ("/direct", "202 - direct_response - - - 127.0.0.1"),
                ("/redirect", "301 - direct_response - - - 127.0.0.1"),
                ("/none", "404 NR route_not_found - - - 127.0.0.1"),
                ("/nobody", "503 UH no_healthy_upstream - - nobody 127.0.0.1"),
                (
                    "/refused",
                    "503 UF upstream_reset_before_response_started{remote_connection_failure - - refused 127.0.0.1",
                ),
                ("/again/status?503", "503 URX via_upstream - - app 127.0.0.1"),
                ("/slow?99", "504 UT response_timeout - - app 127.0.0.1"),
                ("/try?99", "504 UT upstream_per_try_timeout - - app 127.0.0.1"),
                (
                    "/broken",
                    "503 UC upstream_reset_before_response_started{connection_termination} - - app 127.0.0.1",
                ),
            ];
            for (path, _) in wanted {
                client.get(path);
            }
            let log = LOG.lock().unwrap().clone();
            let lines = || std::fs::read_to_string(&log).unwrap_or_default();
            await_true("all lines are written", || {
                lines().lines().count() >= wanted.len()
            });
            for (line, (path, wanted)) in lines().lines().zip(wanted) {
                // Envoy goes on to name the system's error, which we have as a reason of its own.
                let line = match line.split_once("remote_connection_failure") {
                    Some((front, back)) => {
                        let back = back.split_once('}').map_or("", |(_, b)| b);
                        format!("{front}remote_connection_failure{back}")
                    }
                    None => line.to_owned(),
                };
                assert_eq!(line, format!("{path} {wanted}"), "{}", subject.name());
            }
        },
    );
}

static LOG: std::sync::Mutex<String> = std::sync::Mutex::new(String::new());
