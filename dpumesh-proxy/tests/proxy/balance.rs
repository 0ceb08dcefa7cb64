//! Which endpoint a request goes to: priorities, localities, panic, consistent hashing, subsets. Each case is checked at Envoy too.

use std::io::Write;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::envoy::{Subject, at_both};
use crate::harness::{Client, Endpoint, Message, await_true, bootstrap, lb_endpoint, replace};
use crate::outlier::Moody;

fn fleet() -> [Endpoint; 4] {
    ["a", "b", "c", "d"].map(Endpoint::start)
}

/// An entry of `lb_endpoints` with more to it.
fn entry(address: SocketAddr, more: &str) -> String {
    let plain = lb_endpoint(address);
    format!("{}{more}}}", plain.strip_suffix('}').unwrap())
}

/// A cluster of localities, each YAML in flow form without braces around it.
fn app(localities: &[String], more: &str, policy: &str) -> String {
    let localities: Vec<String> = localities.iter().map(|l| format!("{{{l}}}")).collect();
    format!(
        "{{name: app, type: STATIC, connect_timeout: 1s{more}, load_assignment: {{cluster_name: app{policy}, endpoints: [{}]}}}}",
        localities.join(", ")
    )
}

fn all_to_app(more: &str) -> String {
    format!("[{{match: {{prefix: /}}, route: {{cluster: app{more}}}}}]")
}

fn who(response: &Message) -> String {
    let header =
        |(name, value): (&String, &String)| name.eq_ignore_ascii_case("x-endpoint").then(|| value.clone());
    response.headers.iter().find_map(header).unwrap_or_default()
}

/// How many requests each of a, b, c, d served, and how many nobody.
fn counts(client: &mut Client, requests: usize) -> [usize; 5] {
    let mut counts = [0; 5];
    for _ in 0..requests {
        let served = who(&client.get("/"));
        let at = ["a", "b", "c", "d"].iter().position(|n| *n == served);
        counts[at.unwrap_or(4)] += 1;
    }
    counts
}

#[test]
fn load_goes_to_priorities_as_far_as_they_are_healthy() {
    let all = fleet();
    let (up, down, degraded) = ("", ", health_status: UNHEALTHY", ", health_status: DEGRADED");
    let draining = ", health_status: DRAINING";
    // Of each endpoint: priority and health; further configuration; what percent each of them serves, and nobody.
    for (endpoints, more, policy, percents) in [
        (vec![(0, up), (0, up), (1, up)], "", "", [50, 50, 0, 0, 0]),
        (vec![(0, up), (0, down), (1, up)], "", "", [70, 0, 30, 0, 0]),
        (
            vec![(0, up), (0, draining), (1, up)],
            "",
            ", policy: {overprovisioning_factor: 100}",
            [100, 0, 0, 0, 0],
        ),
        (
            vec![(0, up), (0, down), (1, up)],
            "",
            ", policy: {overprovisioning_factor: 100}",
            [50, 0, 50, 0, 0],
        ),
        (
            vec![(0, down), (0, down), (1, up), (2, up)],
            "",
            "",
            [0, 0, 100, 0, 0],
        ),
        (vec![(0, up), (0, degraded), (1, up)], "", "", [70, 0, 30, 0, 0]),
        (
            vec![(0, up), (0, degraded), (0, degraded)],
            "",
            "",
            [46, 27, 27, 0, 0],
        ),
        (vec![(0, degraded), (0, degraded)], "", "", [50, 50, 0, 0, 0]),
        // Panic: all of them, or none.
        (
            vec![(0, up), (0, down), (0, down), (0, down)],
            "",
            "",
            [25, 25, 25, 25, 0],
        ),
        (
            vec![(0, up), (0, down), (0, down), (0, down)],
            ", common_lb_config: {healthy_panic_threshold: {value: 20}}",
            "",
            [100, 0, 0, 0, 0],
        ),
        (
            vec![(0, down), (0, down)],
            ", common_lb_config: {healthy_panic_threshold: {}}",
            "",
            [0, 0, 0, 0, 100],
        ),
        (vec![(0, down), (1, down), (1, down)], "", "", [34, 33, 33, 0, 0]),
        (
            vec![(0, down), (0, down), (0, up), (1, up)],
            "",
            "",
            [0, 0, 46, 54, 0],
        ),
    ] {
        at_both(
            |_, _| {
                let localities: Vec<String> = endpoints
                    .iter()
                    .zip(&all)
                    .map(|((priority, health), e)| {
                        format!(
                            "priority: {priority}, locality: {{zone: z{priority}}}, lb_endpoints: [{}]",
                            entry(e.address, health)
                        )
                    })
                    .collect();
                bootstrap(
                    &all_to_app(""),
                    &format!("[{}]", app(&localities, more, policy)),
                    "",
                )
            },
            |subject, _| {
                let found = counts(&mut subject.client(), 1000);
                for (at, percent) in percents.iter().enumerate() {
                    // Five standard deviations of 1000 draws at one half are 79.
                    let (least, most) = match percent {
                        0 => (0, 0),
                        100 => (1000, 1000),
                        percent => (percent * 10 - 79, percent * 10 + 79),
                    };
                    assert!(
                        (least..=most).contains(&found[at]),
                        "{endpoints:?} {more} {policy}: {found:?}, not {percents:?}, at {}",
                        subject.name()
                    );
                }
            },
        );
    }
}

#[test]
fn a_panic_is_counted_and_nobody_at_all_is_told() {
    let all = fleet();
    let cluster = |more: &str| {
        let entries = [
            entry(all[0].address, ""),
            entry(all[1].address, ", health_status: UNHEALTHY"),
            entry(all[2].address, ", health_status: TIMEOUT"),
        ];
        format!(
            "[{}]",
            app(&[format!("lb_endpoints: [{}]", entries.join(", "))], more, "")
        )
    };
    at_both(
        |_, _| bootstrap(&all_to_app(""), &cluster(""), ""),
        |subject, _| {
            counts(&mut subject.client(), 30);
            assert_eq!(subject.await_stat("cluster.app.lb_healthy_panic", 30), 30);
            subject.await_value("cluster.app.membership_healthy", 1);
            subject.await_value("cluster.app.membership_total", 3);
            let clusters = subject.admin("/clusters");
            for (endpoint, flags) in [
                (0, "healthy"),
                (1, "/failed_eds_health"),
                (2, "/failed_eds_health"),
            ] {
                let line = format!("app::{}::health_flags::{flags}\n", all[endpoint].address);
                assert!(clusters.contains(&line), "{line} {clusters}");
            }
        },
    );
}

#[test]
fn a_retry_leaves_the_priorities_that_were_tried() {
    let (moody, good) = (Moody::start(503), Endpoint::start("a"));
    let retry = ", retry_policy: {retry_on: 5xx, num_retries: 1, retry_priority: {name: envoy.retry_priorities.previous_priorities, typed_config: \
        {\"@type\": type.googleapis.com/envoy.extensions.retry.priority.previous_priorities.v3.PreviousPrioritiesConfig, update_frequency: 1}}}";
    at_both(
        |_, _| {
            let localities = [
                format!("priority: 0, lb_endpoints: [{}]", entry(moody.address, "")),
                format!("priority: 1, lb_endpoints: [{}]", entry(good.address, "")),
            ];
            bootstrap(&all_to_app(retry), &format!("[{}]", app(&localities, "", "")), "")
        },
        |subject, _| {
            let before = moody.requests();
            assert_eq!(counts(&mut subject.client(), 10)[0], 10, "{}", subject.name());
            assert_eq!(moody.requests() - before, 10);
        },
    );
}

#[test]
fn localities_share_by_weight_if_they_are_asked_to() {
    let all = fleet();
    let weighted = ", common_lb_config: {locality_weighted_lb_config: {}}";
    let down = ", health_status: UNHEALTHY";
    for (more, second, expected) in [
        (weighted, "", [150, 150, 50, 50, 0]),
        ("", "", [100, 100, 100, 100, 0]),
        // 3 × 0.7 against 1.
        (weighted, down, [271, 0, 64, 65, 0]),
    ] {
        at_both(
            |_, _| {
                let localities = [
                    format!(
                        "locality: {{region: r, zone: one}}, load_balancing_weight: 3, lb_endpoints: [{}, {}]",
                        entry(all[0].address, ""),
                        entry(all[1].address, second)
                    ),
                    format!(
                        "locality: {{region: r, zone: two}}, load_balancing_weight: 1, lb_endpoints: [{}, {}]",
                        entry(all[2].address, ""),
                        entry(all[3].address, "")
                    ),
                ];
                bootstrap(&all_to_app(""), &format!("[{}]", app(&localities, more, "")), "")
            },
            |subject, _| {
                let found = counts(&mut subject.client(), 400);
                for (found_one, expected_one) in found.iter().zip(&expected) {
                    assert!(
                        found_one.abs_diff(*expected_one) <= 4,
                        "{found:?}, not {expected:?}, at {}",
                        subject.name()
                    );
                }
            },
        );
    }
}

#[test]
fn weights_of_endpoints_count_within_their_locality() {
    let all = fleet();
    at_both(
        |_, _| {
            let entries = [
                entry(all[0].address, ", load_balancing_weight: 1"),
                entry(all[1].address, ", load_balancing_weight: 4"),
                entry(all[2].address, ", load_balancing_weight: 5"),
            ];
            let localities = [format!("lb_endpoints: [{}]", entries.join(", "))];
            bootstrap(&all_to_app(""), &format!("[{}]", app(&localities, "", "")), "")
        },
        |subject, _| {
            let found = counts(&mut subject.client(), 300);
            for (found_one, expected) in found.iter().zip([30usize, 120, 150, 0, 0]) {
                assert!(
                    found_one.abs_diff(expected) <= 3,
                    "{found:?} at {}",
                    subject.name()
                );
            }
        },
    );
}

#[test]
fn a_new_endpoint_comes_to_its_share_in_time() {
    let all = fleet();
    let window = Duration::from_secs(3);
    let eds = |endpoints: &[Endpoint]| {
        let entries: Vec<String> = endpoints.iter().map(|e| lb_endpoint(e.address)).collect();
        format!(
            "resources:\n- {{\"@type\": type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment, cluster_name: app, \
             endpoints: [{{lb_endpoints: [{}]}}]}}\n",
            entries.join(", ")
        )
    };
    at_both(
        |_, folder| {
            std::fs::write(format!("{folder}/eds.yaml"), eds(&all[..1])).unwrap();
            let cluster = format!(
                "[{{name: app, type: EDS, connect_timeout: 1s, eds_cluster_config: {{eds_config: {{path_config_source: {{path: \"{folder}/eds.yaml\"}}}}}}, \
                 round_robin_lb_config: {{slow_start_config: {{slow_start_window: 3s, min_weight_percent: {{value: 1}}}}}}}}]"
            );
            bootstrap(&all_to_app(""), &cluster, "")
        },
        |subject, _| {
            let mut client = subject.client();
            let begun = Instant::now();
            await_true("the first one is not new any more", || begun.elapsed() > window);
            let begun = Instant::now();
            replace(&subject.folder().join("eds.yaml"), &eds(&all[..2]));
            subject.await_value("cluster.app.membership_total", 2);
            let found = counts(&mut client, 100);
            // It cannot be older than this.
            let part = (begun.elapsed().as_secs_f64() / window.as_secs_f64()).min(1.0);
            let most = 100.0 * part / (1.0 + part) + 10.0;
            assert!(found[1] as f64 <= most, "{found:?}, {most} at {}", subject.name());
            await_true("it has its share", || counts(&mut client, 100)[1] >= 45);
        },
    );
}

/// Runs `ask` at both and has them give the same list.
fn same_at_both(bootstrap: impl Fn() -> String, ask: impl Fn(&Subject) -> Vec<String>) {
    let ours: Mutex<Option<Vec<String>>> = Mutex::new(None);
    at_both(
        |_, _| bootstrap(),
        |subject, _| {
            let found = ask(subject);
            let mut ours = ours.lock().unwrap();
            match &*ours {
                None => *ours = Some(found),
                Some(ours) => assert_eq!(*ours, found, "at us, at {}", subject.name()),
            }
        },
    );
}

/// A cluster of all four with weights.
fn weighted(all: &[Endpoint; 4], weights: [u32; 4], more: &str) -> String {
    let entries: Vec<String> = all
        .iter()
        .zip(weights)
        .map(|(e, weight)| entry(e.address, &format!(", load_balancing_weight: {weight}")))
        .collect();
    format!(
        "[{}]",
        app(&[format!("lb_endpoints: [{}]", entries.join(", "))], more, "")
    )
}

#[test]
fn a_key_finds_the_same_endpoint_as_at_envoy() {
    let all = fleet();
    let policy = all_to_app(", hash_policy: [{header: {header_name: X-Key}}]");
    for (balance, weights) in [
        (", lb_policy: RING_HASH", [1, 1, 1, 1]),
        (
            ", lb_policy: RING_HASH, ring_hash_lb_config: {minimum_ring_size: 10, maximum_ring_size: 37}",
            [1, 1, 1, 1],
        ),
        (
            ", lb_policy: RING_HASH, ring_hash_lb_config: {minimum_ring_size: 64}",
            [1, 2, 3, 10],
        ),
        (", lb_policy: MAGLEV", [1, 1, 1, 1]),
        (
            ", lb_policy: MAGLEV, maglev_lb_config: {table_size: 103}",
            [1, 2, 3, 10],
        ),
    ] {
        same_at_both(
            || bootstrap(&policy, &weighted(&all, weights, balance), ""),
            |subject| {
                let mut client = subject.client();
                let keys = (0..100).map(|key| format!("x-key: key {key}\r\n"));
                let two = [
                    "x-key: b\r\nx-key: a\r\n",
                    "x-key: a\r\nx-key: b\r\n",
                    "X-KEY:\r\n",
                ];
                let ask = |headers: String| {
                    client.send(format!("GET / HTTP/1.1\r\nHost: test\r\n{headers}\r\n"));
                    format!("{headers}{}", who(&client.receive()))
                };
                let found: Vec<String> = keys.chain(two.map(str::to_owned)).map(ask).collect();
                // Where the ports fall is chance; that all keys fall on one endpoint is not.
                let last = |f: &String| f.chars().next_back();
                assert!(found.iter().any(|f| last(f) != last(&found[0])), "{balance}");
                found
            },
        );
    }
}

#[test]
fn hash_policies_are_mixed_and_end_where_they_are_told() {
    let all = fleet();
    let policies = [
        "{query_parameter: {name: q}}",
        "{query_parameter: {name: q}}, {header: {header_name: x-key}}",
        "{query_parameter: {name: q}, terminal: true}, {header: {header_name: x-key}}",
        "{cookie: {name: who}}, {header: {header_name: x-key}}",
        "{header: {header_name: x-key, regex_rewrite: {pattern: {regex: \"^([0-9]).*\"}, substitution: '\\1'}}}",
        "{connection_properties: {source_ip: true}}",
        "{connection_properties: {source_ip: true}}, {header: {header_name: :path}}",
    ];
    for policy in policies {
        let routes = all_to_app(&format!(", hash_policy: [{policy}]"));
        same_at_both(
            || bootstrap(&routes, &weighted(&all, [1; 4], ", lb_policy: RING_HASH"), ""),
            |subject| {
                let mut client = subject.client();
                let mut found = Vec::new();
                for n in 0..20 {
                    for (path, headers) in [
                        (format!("/?q={n}&x=1"), String::new()),
                        (format!("/?x=1&q={n}&q=0"), "x-key: same\r\n".to_owned()),
                        (
                            format!("/p?q=%2{n}"),
                            format!("x-key: {n} or so\r\ncookie: a=b; who={n}; c=d\r\n"),
                        ),
                        ("/?q=1".to_owned(), format!("cookie: who=\"{n}\"\r\nx-key: 1\r\n")),
                    ] {
                        client.send(format!("GET {path} HTTP/1.1\r\nHost: test\r\n{headers}\r\n"));
                        let response = client.receive();
                        // Without anything to hash it is chance.
                        let chance = (policy.contains("x-key, regex") || policy.contains("cookie"))
                            && headers.is_empty();
                        found.push(if chance { String::new() } else { who(&response) });
                    }
                }
                found
            },
        );
    }
}

#[test]
fn clients_without_the_cookie_are_given_one_that_keeps_them_where_they_are() {
    let all = fleet();
    for (cookie, attributes) in [
        (
            "{name: who, ttl: 60s, path: /p}",
            "; Max-Age=60; Path=/p; HttpOnly",
        ),
        ("{name: who, ttl: 0s}", "; HttpOnly"),
        (
            "{name: who, ttl: 5s, attributes: [{name: SameSite, value: Strict}, {name: Secure}]}",
            "; Max-Age=5; SameSite=Strict; Secure; HttpOnly",
        ),
    ] {
        let routes = all_to_app(&format!(", hash_policy: [{{cookie: {cookie}}}]"));
        at_both(
            |_, _| bootstrap(&routes, &weighted(&all, [1; 4], ", lb_policy: MAGLEV"), ""),
            |subject, _| {
                for _ in 0..8 {
                    let mut client = subject.client();
                    let first = client.get("/");
                    let given = first.header("set-cookie").unwrap_or_default().to_owned();
                    let value = given.strip_prefix("who=\"").and_then(|v| v.split_once('"'));
                    let (value, rest) = value.unwrap_or_else(|| panic!("{given} at {}", subject.name()));
                    assert_eq!(rest, attributes, "{}", subject.name());
                    assert_eq!(value.len(), 16);
                    // The same for this connection, cookie or not.
                    assert_eq!(who(&client.get("/")), who(&first));
                    let mut other = subject.client();
                    other.send(format!(
                        "GET / HTTP/1.1\r\nHost: test\r\ncookie: who={value}\r\n\r\n"
                    ));
                    let again = other.receive();
                    assert_eq!((who(&again), again.header("set-cookie")), (who(&first), None));
                }
            },
        );
    }
}

#[test]
fn tcp_connections_of_a_client_go_to_one_endpoint() {
    let all = fleet();
    let network = "type.googleapis.com/envoy.extensions.filters.network";
    same_at_both(
        || {
            let clusters = weighted(&all, [1; 4], ", lb_policy: RING_HASH");
            format!(
                r#"
admin: {{address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}}}
static_resources:
  listeners:
  - name: web
    address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.tcp_proxy
        typed_config: {{"@type": {network}.tcp_proxy.v3.TcpProxy, stat_prefix: t, cluster: app, hash_policy: [{{source_ip: {{}}}}]}}
  clusters: {clusters}
"#
            )
        },
        |subject| {
            let ask = |_| {
                let mut client = subject.client();
                client
                    .reader
                    .get_mut()
                    .write_all(b"GET /close-after HTTP/1.1\r\nHost: a\r\n\r\n")
                    .unwrap();
                who(&client.receive())
            };
            let found: Vec<String> = (0..12).map(ask).collect();
            assert!(found.iter().all(|f| *f == found[0] && !f.is_empty()), "{found:?}");
            found
        },
    );
}

#[test]
fn routes_choose_endpoints_by_their_metadata() {
    let all = fleet();
    let lb = |fields: &str| format!(", metadata: {{filter_metadata: {{envoy.lb: {{{fields}}}}}}}");
    let entries = [
        entry(all[0].address, &lb("stage: prod, version: 1")),
        entry(all[1].address, &lb("stage: prod, version: 2")),
        entry(all[2].address, &lb("stage: dev, version: 2")),
        entry(all[3].address, ""),
    ];
    let asks = |fields: &str| format!("metadata_match: {{filter_metadata: {{envoy.lb: {{{fields}}}}}}}");
    let routes = format!(
        "[{{match: {{prefix: /prod}}, route: {{cluster: app, {}}}}}, {{match: {{prefix: /two}}, route: {{cluster: app, {}}}}}, \
         {{match: {{prefix: /none}}, route: {{cluster: app, {}}}}}, {{match: {{prefix: /keys}}, route: {{cluster: app, {}}}}}, \
         {{match: {{prefix: /split}}, route: {{weighted_clusters: {{clusters: [{{name: app, weight: 1, {}}}, {{name: app, weight: 1, {}}}]}}, {}}}}}, \
         {{match: {{prefix: /}}, route: {{cluster: app}}}}]",
        asks("stage: prod"),
        asks("version: 2, stage: prod"),
        asks("stage: none"),
        asks("stage: prod, version: 9"),
        asks("version: 1"),
        asks("version: 2"),
        asks("stage: prod"),
    );
    for (fallback, unmatched, by_keys) in [
        ("fallback_policy: NO_FALLBACK", "", ""),
        ("fallback_policy: ANY_ENDPOINT", "abcd", "abcd"),
        (
            "fallback_policy: DEFAULT_SUBSET, default_subset: {stage: dev}",
            "c",
            "c",
        ),
        ("fallback_policy: NO_FALLBACK, KEYS", "", "ab"),
    ] {
        let (cluster_fallback, selector) = match fallback.strip_suffix(", KEYS") {
            Some(rest) => (
                rest,
                ", fallback_policy: KEYS_SUBSET, fallback_keys_subset: [stage]",
            ),
            None => (fallback, ""),
        };
        at_both(
            |_, _| {
                let more = format!(
                    ", lb_subset_config: {{{cluster_fallback}, subset_selectors: [{{keys: [stage]}}, {{keys: [version, stage]{selector}}}]}}"
                );
                let localities = [format!("lb_endpoints: [{}]", entries.join(", "))];
                bootstrap(&routes, &format!("[{}]", app(&localities, &more, "")), "")
            },
            |subject, _| {
                let mut client = subject.client();
                for (path, expected) in [
                    ("/prod", "ab"),
                    ("/two", "b"),
                    ("/none", unmatched),
                    ("/keys", by_keys),
                    ("/split", "ab"),
                    ("/", unmatched),
                ] {
                    let mut found: Vec<String> = (0..24).map(|_| who(&client.get(path))).collect();
                    found.sort();
                    found.dedup();
                    assert_eq!(
                        found.concat(),
                        expected,
                        "{path} with {fallback} at {}",
                        subject.name()
                    );
                }
                // /prod, /two, /split; and /keys where it finds the subset of fewer keys.
                let selected = if selector.is_empty() { 72 } else { 96 };
                subject.await_value("cluster.app.lb_subsets_selected", selected);
                let fallbacks = if unmatched.is_empty() { 0 } else { 72 };
                subject.await_value("cluster.app.lb_subsets_fallback", fallbacks);
                // Envoy counts them once per thread.
                if matches!(subject, Subject::Ours(_)) {
                    subject.await_value("cluster.app.lb_subsets_active", 5);
                }
            },
        );
    }
}
