//! What a proxy says of its work: histograms, access logs, the admin paths. Each case is checked at Envoy too.

use std::path::PathBuf;

use serde_json::{Value, json};

use crate::envoy::{Subject, at_both};
use crate::harness::{Endpoint, Running, await_true, bootstrap, bootstrap_with, cluster, simple};

const FILE: &str = "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog";

fn app(endpoint: &Endpoint) -> String {
    format!("[{}]", cluster("app", &[endpoint.address], ""))
}

/// An access log in `folder`, with more fields of the message around it, and the format.
fn log(folder: &str, name: &str, more: &str, format: &str) -> String {
    format!(
        "{{name: file, {more} typed_config: {{\"@type\": {FILE}, path: \"{folder}/{name}\", log_format: {format}}}}}"
    )
}

fn lines(subject: &Subject, name: &str, count: usize) -> Vec<String> {
    let path: PathBuf = subject.folder().join(name);
    let read = || std::fs::read_to_string(&path).unwrap_or_default();
    await_true(&format!("{count} lines at {}", subject.name()), || {
        read().lines().count() >= count
    });
    read().lines().map(str::to_owned).collect()
}

#[test]
fn histograms_have_envoys_names_and_forms() {
    at_both(
        |endpoint, _| simple(endpoint.address, ""),
        |subject, _| {
            let mut client = subject.client();
            for _ in 0..3 {
                assert_eq!(client.get("/").status(), 200);
            }
            drop(client);
            let labels = "envoy_http_conn_manager_prefix=\"web\"";
            for (name, family, labels, count) in [
                (
                    "http.web.downstream_rq_time",
                    "envoy_http_downstream_rq_time",
                    labels,
                    3,
                ),
                (
                    "http.web.downstream_cx_length_ms",
                    "envoy_http_downstream_cx_length_ms",
                    labels,
                    1,
                ),
                (
                    "cluster.app.upstream_rq_time",
                    "envoy_cluster_upstream_rq_time",
                    "envoy_cluster_name=\"app\"",
                    3,
                ),
                (
                    "cluster.app.upstream_cx_connect_ms",
                    "envoy_cluster_upstream_cx_connect_ms",
                    "envoy_cluster_name=\"app\"",
                    1,
                ),
            ] {
                let line = format!("{family}_count{{{labels}}} {count}\n");
                // Envoy merges its histograms every five seconds.
                await_true(&format!("{line} at {}", subject.name()), || {
                    subject
                        .ask_admin("GET", "/stats/prometheus")
                        .text()
                        .contains(&line)
                });
                let text = subject.ask_admin("GET", "/stats/prometheus").text();
                assert!(text.contains(&format!("# TYPE {family} histogram\n")), "{family}");
                let bucket = |le: &str| format!("{family}_bucket{{{labels},le=\"{le}\"}} ");
                let bounds: Vec<&str> = text
                    .lines()
                    .filter_map(|l| l.strip_prefix(&format!("{family}_bucket{{{labels},le=\"")))
                    .filter_map(|l| l.split('"').next())
                    .collect();
                assert_eq!(
                    bounds,
                    [
                        "0.5", "1", "5", "10", "25", "50", "100", "250", "500", "1000", "2500", "5000",
                        "10000", "30000", "60000", "300000", "600000", "1800000", "3600000", "+Inf"
                    ]
                );
                assert!(text.contains(&format!("{}{count}\n", bucket("+Inf"))), "{name}");
                assert!(text.contains(&format!("{family}_sum{{{labels}}} ")), "{name}");
                let summary = subject
                    .ask_admin("GET", &format!("/stats?filter=^{name}$"))
                    .text();
                let values = summary
                    .strip_prefix(&format!("{name}: "))
                    .unwrap_or_else(|| panic!("{summary}"));
                let quantiles: Vec<&str> = values.split(' ').filter_map(|v| v.split('(').next()).collect();
                assert_eq!(
                    quantiles,
                    [
                        "P0", "P25", "P50", "P75", "P90", "P95", "P99", "P99.5", "P99.9", "P100"
                    ],
                    "{}",
                    subject.name()
                );
                for value in values.trim().split(' ') {
                    let (_, cumulative) = value.trim_end_matches(')').split_once(',').unwrap();
                    assert!(cumulative.parse::<f64>().is_ok_and(f64::is_finite), "{values}");
                }
            }
            let unused = "listener.nobody.downstream_cx_length_ms";
            assert!(!subject.ask_admin("GET", "/stats").text().contains(unused));
            let usual = subject
                .ask_admin("GET", "/stats?filter=upstream_cx_length_ms")
                .text();
            assert!(
                usual.contains("cluster.app.upstream_cx_length_ms: No recorded values\n"),
                "{usual}"
            );
        },
    );
}

#[test]
fn text_lines_have_what_envoys_operators_say() {
    let format = "%REQ(x-a?x-b):3%|%PATH(NQ)%|%PATH(WQ:PATH):6%|%QUERY_PARAM(b)%|%QUERY_PARAM(none)%|\
                  %GRPC_STATUS%|%GRPC_STATUS_NUMBER%|%DOWNSTREAM_PEER_URI_SAN%|%UPSTREAM_PROTOCOL%|%UPSTREAM_REQUEST_ATTEMPT_COUNT%|\
                  %UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%|%UPSTREAM_LOCAL_ADDRESS_WITHOUT_PORT%|%DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT%|\
                  %TRAILER(x)%|%RESPONSE_CODE_DETAILS%|%RESPONSE_FLAGS%|%START_TIME(%Y)%%%";
    let routes = "[{match: {prefix: /direct}, direct_response: {status: 202}}, \
                  {match: {prefix: /again/}, route: {cluster: app, prefix_rewrite: /, retry_policy: {retry_on: 5xx, num_retries: 1}}}, \
                  {match: {prefix: /}, route: {cluster: app}}]";
    at_both(
        |endpoint, folder| {
            let format = format!("{{text_format_source: {{inline_string: \"{format}\\n\"}}}}");
            let log = format!("access_log: [{}]", log(folder, "log", "", &format));
            bootstrap_with(routes, &app(endpoint), &log, "", "")
        },
        |subject, _| {
            let mut client = subject.client();
            let requests = [
                ("/x?a=1&b=22", "x-a: abcdef\r\n"),
                ("/direct?b=", "x-b: b\r\n"),
                ("/again/status?503", ""),
                ("/grpc", "content-type: application/grpc\r\n"),
            ];
            for (path, headers) in requests {
                client.send(format!("GET {path} HTTP/1.1\r\nHost: test\r\n{headers}\r\n"));
                client.receive();
            }
            let wanted = [
                "abc|/x|/x?a=1|22|-|-|-|-|HTTP/1.1|1|127.0.0.1|127.0.0.1|127.0.0.1|-|via_upstream|-|YEAR%",
                "b|/direct|/direc||-|-|-|-|-|0|-|-|127.0.0.1|-|direct_response|-|YEAR%",
                "-|/again/status|/statu|-|-|-|-|-|HTTP/1.1|2|127.0.0.1|127.0.0.1|127.0.0.1|-|via_upstream|URX|YEAR%",
                "-|/grpc|/grpc|-|-|Unknown|2|-|HTTP/1.1|1|127.0.0.1|127.0.0.1|127.0.0.1|-|via_upstream|-|YEAR%",
            ];
            let now = std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .unwrap();
            let year = 1970 + now.as_secs() * 400 / (146_097 * 86_400);
            for (line, wanted) in lines(subject, "log", wanted.len()).iter().zip(wanted) {
                let wanted = wanted.replace("YEAR", &year.to_string());
                assert_eq!(*line, wanted, "{}", subject.name());
            }
        },
    );
}

#[test]
fn json_lines_have_numbers_where_there_are_some() {
    let format = "{b: {code: \"%RESPONSE_CODE%\", text: \"code %RESPONSE_CODE%\", none: \"%REQ(none)%\", mixed: \"a%REQ(none)%\"}, \
                  a: [\"%REQ(:METHOD)%\", x, 1, true], n: 1.5, quote: \"%REQ(x-q)%\", flags: \"%RESPONSE_FLAGS%\", empty: \"\", \
                  sent: \"%BYTES_SENT%\", grpc: \"%GRPC_STATUS_NUMBER%\"}";
    let times = "{d: \"%DURATION%\", rq: \"%REQUEST_DURATION%\", rqtx: \"%REQUEST_TX_DURATION%\", rs: \"%RESPONSE_DURATION%\", \
                 rstx: \"%RESPONSE_TX_DURATION%\", path: \"%REQ(:PATH)%\"}";
    at_both(
        |endpoint, folder| {
            let logs = [
                log(folder, "json", "", &format!("{{json_format: {format}}}")),
                log(
                    folder,
                    "omit",
                    "",
                    &format!("{{json_format: {format}, omit_empty_values: true}}"),
                ),
                log(folder, "times", "", &format!("{{json_format: {times}}}")),
            ];
            let routes = "[{match: {prefix: /direct}, direct_response: {status: 202}}, {match: {prefix: /}, route: {cluster: app}}]";
            let logs = format!("access_log: [{}]", logs.join(", "));
            bootstrap_with(routes, &app(endpoint), &logs, "", "")
        },
        |subject, _| {
            let mut client = subject.client();
            client.send("GET /direct HTTP/1.1\r\nHost: test\r\nx-q: a\"b\\\r\n\r\n");
            assert_eq!(client.receive().status(), 202);
            client.send("POST /echo HTTP/1.1\r\nHost: test\r\nContent-Length: 2\r\n\r\nhi");
            assert_eq!(client.receive().status(), 200);
            assert_eq!(
                lines(subject, "json", 2)[0],
                "{\"a\":[\"GET\",\"x\",1,true],\"b\":{\"code\":202,\"mixed\":\"a-\",\"none\":null,\"text\":\"code 202\"},\"empty\":\"\",\
                 \"flags\":\"-\",\"grpc\":null,\"n\":\"1.5\",\"quote\":\"a\\\"b\\\\\",\"sent\":0}",
                "{}",
                subject.name()
            );
            assert_eq!(
                lines(subject, "omit", 2)[0],
                "{\"a\":[\"GET\",\"x\",1,true],\"b\":{\"code\":202,\"mixed\":\"a\",\"text\":\"code 202\"},\"empty\":\"\",\
                 \"flags\":\"-\",\"n\":\"1.5\",\"quote\":\"a\\\"b\\\\\",\"sent\":0}",
                "{}",
                subject.name()
            );
            let times: Vec<Value> = lines(subject, "times", 2)
                .iter()
                .map(|l| serde_json::from_str(l).unwrap())
                .collect();
            let direct = &times[0];
            assert!(direct["rq"].is_u64(), "{direct} at {}", subject.name());
            for absent in ["rqtx", "rs", "rstx"] {
                assert_eq!(direct[absent], Value::Null, "{direct} at {}", subject.name());
            }
            let number = |name: &str| {
                times[1][name]
                    .as_u64()
                    .unwrap_or_else(|| panic!("{}: {}", subject.name(), times[1]))
            };
            let order = ["rq", "rqtx", "rs", "d"].map(number);
            assert!(order.is_sorted(), "{}", times[1]);
            assert!(number("rstx") <= number("d"), "{}", times[1]);
        },
    );
}

/// Filters, and what they let through of `/ok`, `/status?404`, `/status?503`, `/none` and `/header`, in order.
const FILTERS: &[(&str, &[usize])] = &[
    (
        "status_code_filter: {comparison: {op: GE, value: {default_value: 404, runtime_key: k}}}",
        &[1, 2, 3],
    ),
    (
        "status_code_filter: {comparison: {op: EQ, value: {default_value: 404, runtime_key: k}}}",
        &[1, 3],
    ),
    (
        "status_code_filter: {comparison: {op: LE, value: {default_value: 404, runtime_key: k}}}",
        &[0, 1, 3, 4],
    ),
    (
        "status_code_filter: {comparison: {op: NE, value: {default_value: 200, runtime_key: k}}}",
        &[1, 2, 3],
    ),
    (
        "duration_filter: {comparison: {op: GE, value: {default_value: 60000, runtime_key: k}}}",
        &[],
    ),
    (
        "duration_filter: {comparison: {op: LE, value: {default_value: 60000, runtime_key: k}}}",
        &[0, 1, 2, 3, 4],
    ),
    ("not_health_check_filter: {}", &[0, 1, 2, 3, 4]),
    (
        "runtime_filter: {runtime_key: k, percent_sampled: {numerator: 100}}",
        &[0, 1, 2, 3, 4],
    ),
    (
        "runtime_filter: {runtime_key: k, percent_sampled: {numerator: 0}}",
        &[],
    ),
    (
        "header_filter: {header: {name: x-log, string_match: {exact: 'yes'}}}",
        &[4],
    ),
    (
        "header_filter: {header: {name: x-log, present_match: true, invert_match: true}}",
        &[0, 1, 2, 3],
    ),
    ("response_flag_filter: {flags: [NR]}", &[3]),
    ("response_flag_filter: {}", &[3]),
    (
        "and_filter: {filters: [{status_code_filter: {comparison: {op: GE, value: {default_value: 400, runtime_key: k}}}}, \
         {response_flag_filter: {flags: [NR, UF]}}]}",
        &[3],
    ),
    (
        "or_filter: {filters: [{status_code_filter: {comparison: {op: GE, value: {default_value: 500, runtime_key: k}}}}, \
         {header_filter: {header: {name: x-log, present_match: true}}}]}",
        &[2, 4],
    ),
    ("grpc_status_filter: {statuses: [UNAVAILABLE]}", &[2]),
    (
        "grpc_status_filter: {statuses: [UNIMPLEMENTED], exclude: true}",
        &[0, 2, 4],
    ),
];

#[test]
fn filters_say_what_is_logged() {
    let asked = ["/ok", "/status?404", "/status?503", "/none", "/header"];
    at_both(
        |endpoint, folder| {
            let format = "{text_format_source: {inline_string: \"%REQ(:PATH)%\\n\"}}";
            let mut logs: Vec<String> = FILTERS
                .iter()
                .enumerate()
                .map(|(index, (filter, _))| {
                    log(
                        folder,
                        &format!("log{index}"),
                        &format!("filter: {{{filter}}},"),
                        format,
                    )
                })
                .collect();
            logs.push(log(folder, "all", "", format));
            let routes = ["/ok", "/status", "/header"]
                .map(|path| format!("{{match: {{path: {path}}}, route: {{cluster: app}}}}"))
                .join(", ");
            let routes = format!("[{routes}]");
            bootstrap(
                &routes,
                &app(endpoint),
                &format!("access_log: [{}]", logs.join(", ")),
            )
        },
        |subject, _| {
            let mut client = subject.client();
            for path in asked {
                let more = if path == "/header" { "x-log: yes\r\n" } else { "" };
                client.send(format!("GET {path} HTTP/1.1\r\nHost: test\r\n{more}\r\n"));
                client.receive();
            }
            assert_eq!(lines(subject, "all", asked.len()), asked);
            for (index, (filter, wanted)) in FILTERS.iter().enumerate() {
                let wanted: Vec<&str> = wanted.iter().map(|at| asked[*at]).collect();
                let logged = lines(subject, &format!("log{index}"), wanted.len());
                assert_eq!(logged, wanted, "{filter} at {}", subject.name());
            }
        },
    );
}

#[test]
fn a_proxy_out_of_service_says_so_and_serves_on() {
    at_both(
        |endpoint, _| simple(endpoint.address, ""),
        |subject, _| {
            let ready = |subject: &Subject| {
                let answer = subject.ask_admin("GET", "/ready");
                (answer.status(), answer.text())
            };
            let mut client = subject.client();
            assert_eq!(client.get("/").header("connection"), None);
            assert_eq!(subject.ask_admin("GET", "/healthcheck/fail").status(), 405);
            let failed = subject.ask_admin("POST", "/healthcheck/fail");
            assert_eq!((failed.status(), failed.text()), (200, "OK\n".to_owned()));
            assert_eq!(ready(subject), (503, "DRAINING\n".to_owned()));
            assert_eq!(client.get("/").header("connection"), Some("close"));
            assert!(client.is_closed());
            assert_eq!(subject.ask_admin("POST", "/healthcheck/ok").text(), "OK\n");
            assert_eq!(ready(subject), (200, "LIVE\n".to_owned()));
            assert_eq!(subject.client().get("/").header("connection"), None);
        },
    );
}

#[test]
fn listeners_stop_and_connections_go_on() {
    at_both(
        |endpoint, _| simple(endpoint.address, ""),
        |subject, _| {
            let mut client = subject.client();
            assert_eq!(client.get("/").status(), 200);
            // It is no inbound listener.
            assert_eq!(
                subject.ask_admin("POST", "/drain_listeners?inboundonly").text(),
                "OK\n"
            );
            assert_eq!(subject.client().get("/").status(), 200);
            assert_eq!(subject.ask_admin("POST", "/drain_listeners").text(), "OK\n");
            await_true("nobody listens", || {
                std::net::TcpStream::connect(subject.web()).is_err()
            });
            assert_eq!(client.get("/").status(), 200, "{}", subject.name());
        },
    );
}

#[test]
fn a_graceful_drain_ends_connections_first() {
    let endpoint = Endpoint::start("app");
    let text = simple(endpoint.address, "")
        .replace("- name: web\n", "- name: web\n    traffic_direction: INBOUND\n");
    let running = Running::start_with(
        tempfile::tempdir().unwrap(),
        &text,
        1,
        std::time::Duration::from_secs(2),
    );
    let mut client = running.client();
    assert_eq!(client.get("/").header("connection"), None);
    assert_eq!(
        running
            .admin("POST", "/drain_listeners?graceful&inboundonly")
            .text(),
        "OK\n"
    );
    assert_eq!(client.get("/").header("connection"), Some("close"));
    assert_eq!(
        running.client().get("/").status(),
        200,
        "it listens for the drain time"
    );
    let web = running.web();
    await_true("nobody listens", || std::net::TcpStream::connect(web).is_err());
    assert_eq!(running.admin("GET", "/ready").text(), "LIVE\n");
}

#[test]
fn bad_levels_are_refused_with_the_usage() {
    at_both(
        |endpoint, _| simple(endpoint.address, ""),
        |subject, _| {
            let shown = subject.ask_admin("POST", "/logging");
            assert_eq!(shown.status(), 200);
            assert!(shown.text().starts_with("active loggers:\n"), "{}", shown.text());
            assert_eq!(subject.ask_admin("GET", "/logging").status(), 405);
            for query in ["?level=loud", "?nobody=info", "?paths=nobody:info"] {
                let refused = subject.ask_admin("POST", &format!("/logging{query}"));
                assert_eq!(refused.status(), 400, "{query} at {}", subject.name());
                let usage = "usage: /logging?<name>=<level> (change single level)\n";
                assert!(refused.text().contains(usage), "{}", refused.text());
            }
        },
    );
}

/// The dumps of `kind`, without what depends on the time.
fn dumped(subject: &Subject, kind: &str) -> Value {
    let text = subject.ask_admin("GET", "/config_dump?include_eds").text();
    let all: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
    let wanted = format!("type.googleapis.com/envoy.admin.v3.{kind}");
    let configs = all["configs"].as_array().unwrap();
    let found = configs.iter().find(|c| c["@type"] == json!(wanted));
    let mut found = found
        .unwrap_or_else(|| panic!("no {kind} at {}", subject.name()))
        .clone();
    strip(&mut found);
    found
}

fn strip(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            if let Some(updated) = fields.remove("last_updated") {
                let text = updated.as_str().unwrap_or_default();
                assert!(text.starts_with("20") && text.ends_with('Z'), "{text}");
            }
            fields.values_mut().for_each(strip);
            fields.retain(|_, v| v.as_array().is_none_or(|list| !list.is_empty()));
        }
        Value::Array(items) => items.iter_mut().for_each(strip),
        _ => {}
    }
}

#[test]
fn the_dump_is_what_envoys_tools_read() {
    at_both(
        |endpoint, _| simple(endpoint.address, ""),
        |subject, endpoint| {
            let port = endpoint.address.port();
            let lb = json!({"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": port}}}});
            let assignment = json!({"cluster_name": "app", "endpoints": [{"lb_endpoints": [lb]}]});
            let cluster = "type.googleapis.com/envoy.config.cluster.v3.Cluster";
            assert_eq!(
                dumped(subject, "ClustersConfigDump")["static_clusters"],
                json!([{"cluster": {"@type": cluster, "name": "app", "type": "STATIC", "connect_timeout": "1s", "load_assignment": assignment}}]),
                "{}",
                subject.name()
            );
            let listeners = dumped(subject, "ListenersConfigDump");
            let listener = &listeners["static_listeners"][0]["listener"];
            assert_eq!(listener["name"], json!("web"));
            let manager = &listener["filter_chains"][0]["filters"][0]["typed_config"];
            assert_eq!(manager["stat_prefix"], json!("web"), "{listeners}");
            let routes = dumped(subject, "RoutesConfigDump");
            let table = &routes["static_route_configs"][0]["route_config"];
            assert_eq!(table["virtual_hosts"][0]["domains"], json!(["*"]), "{routes}");
            assert_eq!(
                table["@type"],
                json!("type.googleapis.com/envoy.config.route.v3.RouteConfiguration")
            );
            let endpoints = dumped(subject, "EndpointsConfigDump");
            let assignment = &endpoints["static_endpoint_configs"][0]["endpoint_config"];
            assert_eq!(assignment["cluster_name"], json!("app"), "{endpoints}");
            let host =
                &assignment["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]["socket_address"];
            assert_eq!(host["port_value"], json!(port), "{endpoints}");
            let text = subject.ask_admin("GET", "/config_dump").text();
            assert!(!text.contains("EndpointsConfigDump"), "only if asked for");
        },
    );
}
