//! Requests through the proxy: bodies, keep-alive, routes, failures.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::harness::{
    Client, Endpoint, Running, await_true, bootstrap, cluster, pattern, read_message, simple,
};

#[test]
fn keep_alive_serves_many_requests_on_one_connection_each_way() {
    let endpoint = Endpoint::start("only");
    let running = Running::start(&simple(endpoint.address, ""));
    let mut client = running.client();
    for _ in 0..50 {
        assert_eq!(client.get("/").status(), 200);
    }
    assert_eq!(endpoint.requests(), 50);
    assert_eq!(endpoint.connections.load(Ordering::SeqCst), 1);
    assert_eq!(running.stat("http.web.downstream_cx_total"), 1);
    assert_eq!(running.stat("cluster.app.upstream_rq_total"), 50);
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    let endpoint = Endpoint::start("only");
    let running = Running::start(&simple(endpoint.address, ""));
    let mut client = running.client();
    let all: String = (0..20)
        .map(|n| format!("GET /n{n} HTTP/1.1\r\nHost: a\r\n\r\n"))
        .collect();
    client.send(all);
    for n in 0..20 {
        assert!(client.receive().text().starts_with(&format!("GET /n{n} ")));
    }
}

#[test]
fn a_request_that_comes_octet_by_octet_is_served() {
    let endpoint = Endpoint::start("only");
    let running = Running::start(&simple(endpoint.address, ""));
    let mut client = running.client();
    for octet in b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nt: 1\r\n\r\n" {
        client.send([*octet]);
    }
    assert_eq!(client.receive().text(), "abcde");
}

#[test]
fn heads_follow_envoys_defaults() {
    let endpoint = Endpoint::start("only");
    let running = Running::start(&simple(endpoint.address, ""));
    let mut client = running.client();
    client.send(
        "GET /a?b HTTP/1.1\r\nHost: h\r\nX-Some: Value\r\nTE: trailers\r\nKeep-Alive: 5\r\nX-Envoy-Internal: true\r\nX-Forwarded-Client-Cert: By=me\r\n\
         X-Envoy-Upstream-RQ-Timeout-MS: 700\r\n\r\n",
    );
    let response = client.receive();
    let seen = response.text();
    for wanted in [
        "x-some: Value",
        "te: trailers",
        "x-forwarded-proto: http",
        "x-envoy-expected-rq-timeout-ms: 700",
    ] {
        assert!(seen.contains(wanted), "{wanted} in {seen}");
    }
    assert!(seen.contains("x-request-id: "), "{seen}");
    for unwanted in [
        "keep-alive",
        "x-envoy-internal",
        "x-envoy-upstream-rq-timeout-ms",
        "client-cert",
    ] {
        assert!(!seen.contains(unwanted), "{unwanted} in {seen}");
    }
    assert_eq!(response.header("server"), Some("envoy"));
    assert!(response.header("date").is_some());
    assert!(response.header("x-envoy-upstream-service-time").is_some());
    assert_eq!(response.header("x-endpoint"), Some("only"));
}

#[test]
fn chunked_bodies_pass_both_ways_without_extensions_and_trailers() {
    let endpoint = Endpoint::start("only");
    let running = Running::start(&simple(endpoint.address, ""));
    let mut client = running.client();
    let response = client.get("/chunked");
    assert_eq!(response.text(), "one two three");
    assert_eq!(response.header("transfer-encoding"), Some("chunked"));
    client.send("POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6;x=\"y\"\r\n world\r\n0\r\nt: 1\r\n\r\n");
    assert_eq!(client.receive().text(), "hello world");
}

#[test]
fn fifty_megabytes_pass_whole_in_both_directions_and_both_framings() {
    let endpoint = Endpoint::start("only");
    let running = Running::start(&simple(endpoint.address, ""));
    let body = pattern(50 << 20);
    let mut client = running.client();
    assert!(client.get("/big").body == body);
    let mut writer = client.reader.get_ref().try_clone().unwrap();
    let sent = body.clone();
    let sender = std::thread::spawn(move || {
        write!(
            writer,
            "POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n",
            sent.len()
        )
        .unwrap();
        writer.write_all(&sent).unwrap();
        write!(
            writer,
            "POST /length HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        .unwrap();
        for chunk in sent.chunks(100_003) {
            write!(writer, "{:x}\r\n", chunk.len()).unwrap();
            writer.write_all(chunk).unwrap();
            writer.write_all(b"\r\n").unwrap();
        }
        writer.write_all(b"0\r\n\r\n").unwrap();
    });
    assert!(client.receive().body == body);
    assert_eq!(client.receive().text(), body.len().to_string());
    sender.join().unwrap();
}

#[test]
fn expect_continue_is_answered_by_the_proxy() {
    let endpoint = Endpoint::start("only");
    let running = Running::start(&simple(endpoint.address, ""));
    let mut client = running.client();
    client.send("POST /echo HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n");
    let interim = read_message(&mut client.reader, true, false).unwrap().unwrap();
    assert_eq!(interim.status(), 100);
    client.send("abc");
    assert_eq!(client.receive().text(), "abc");
}

#[test]
fn upgrade_connect_and_http_1_0_are_refused_cleanly() {
    let endpoint = Endpoint::start("only");
    let running = Running::start(&simple(endpoint.address, ""));
    for (request, status) in [
        (
            "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
            403,
        ),
        ("CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n", 404),
        ("GET / HTTP/1.0\r\nHost: a\r\n\r\n", 426),
    ] {
        let mut client = running.client();
        client.send(request);
        assert_eq!(client.receive().status(), status, "{request}");
        assert!(client.is_closed());
    }
    assert_eq!(endpoint.requests(), 0);
}

#[test]
fn http_1_0_is_served_where_it_is_accepted() {
    let endpoint = Endpoint::start("only");
    let extra = "http_protocol_options: {accept_http_10: true, default_host_for_http_10: fallback}";
    let running = Running::start(&simple(endpoint.address, extra));
    let mut client = running.client();
    client.send("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n");
    let response = client.receive();
    assert!(response.text().contains("host: fallback"), "{}", response.text());
    assert_eq!(response.header("connection"), Some("keep-alive"));
    client.send("GET /chunked HTTP/1.0\r\nHost: a\r\n\r\n");
    let response = client.receive();
    assert_eq!(response.header("transfer-encoding"), None);
    assert_eq!(response.text(), "one two three");
    assert!(client.is_closed());
}

#[test]
fn responses_without_bodies_and_interim_ones_keep_the_connection_in_step() {
    let endpoint = Endpoint::start("only");
    let running = Running::start(&simple(endpoint.address, ""));
    let mut client = running.client();
    client.send("HEAD / HTTP/1.1\r\nHost: a\r\n\r\n");
    let head = read_message(&mut client.reader, true, false).unwrap().unwrap();
    assert!(head.header("content-length").is_some());
    client.send("GET /no-content HTTP/1.1\r\nHost: a\r\n\r\n");
    assert_eq!(
        read_message(&mut client.reader, true, false)
            .unwrap()
            .unwrap()
            .status(),
        204
    );
    assert_eq!(client.get("/interim").text(), "final");
    let until_close = client.get("/until-close");
    assert_eq!(until_close.text(), "all that comes");
    assert_eq!(until_close.header("transfer-encoding"), Some("chunked"));
    assert_eq!(client.get("/echo").status(), 200);
}

#[test]
fn a_slow_endpoint_times_out_with_504() {
    let endpoint = Endpoint::start("only");
    let routes = "[{match: {prefix: /}, route: {cluster: app, timeout: 0.2s}}]";
    let running = Running::start(&bootstrap(
        routes,
        &format!("[{}]", cluster("app", &[endpoint.address], "")),
        "",
    ));
    let mut client = running.client();
    let begun = Instant::now();
    let response = client.get("/hang");
    assert_eq!(
        (response.status(), response.text().as_str()),
        (504, "upstream request timeout")
    );
    assert!(begun.elapsed() >= Duration::from_millis(200));
    assert_eq!(client.get("/").status(), 200);
    assert_eq!(running.stat("cluster.app.upstream_rq_timeout"), 1);
}

#[test]
fn dead_missing_and_disconnecting_endpoints_answer_503() {
    let endpoint = Endpoint::start("only");
    let unused = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let routes = "[{match: {prefix: /dead}, route: {cluster: dead}}, {match: {prefix: /none}, route: {cluster: none}}, \
                  {match: {prefix: /}, route: {cluster: app}}]";
    let clusters = format!(
        "[{}, {}, {}]",
        cluster("dead", &[unused], ""),
        cluster("none", &[], ""),
        cluster("app", &[endpoint.address], "")
    );
    let running = Running::start(&bootstrap(routes, &clusters, ""));
    let mut client = running.client();
    let disconnected = "upstream connect error or disconnect/reset before headers. reset reason: ";
    for (path, body) in [
        ("/dead", format!("{disconnected}remote connection failure")),
        ("/none", "no healthy upstream".to_owned()),
        ("/hang-up", format!("{disconnected}connection termination")),
    ] {
        let response = client.get(path);
        assert_eq!((response.status(), response.text()), (503, body), "{path}");
    }
    assert_eq!(client.get("/").status(), 200);
    assert_eq!(running.stat("cluster.dead.upstream_cx_connect_fail"), 1);
}

#[test]
fn a_truncated_response_is_not_passed_off_as_whole() {
    let endpoint = Endpoint::start("only");
    let running = Running::start(&simple(endpoint.address, ""));
    let mut client = running.client();
    client.send("GET /truncate HTTP/1.1\r\nHost: a\r\n\r\n");
    assert!(client.try_receive().is_err());
}

#[test]
fn a_pooled_connection_that_died_is_replaced_without_the_client_noticing() {
    let endpoint = Endpoint::start("only");
    let running = Running::start(&simple(endpoint.address, ""));
    let mut client = running.client();
    let mut refused = 0;
    for _ in 0..100 {
        assert_eq!(client.get("/close-after").text(), "last");
        client.send("POST /close-after HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nab");
        let response = client.receive();
        match response.status() {
            200 => assert_eq!(response.text(), "last"),
            // The endpoint may close between the look at the connection and the request; a POST it may have seen is not
            // sent again. The client is told so, and its connection goes on.
            503 => {
                assert_eq!(response.header("connection"), None);
                refused += 1;
            }
            other => panic!("status {other}"),
        }
    }
    assert_eq!(running.stat("http.web.downstream_cx_total"), 1);
    await_true("every 503 is counted", || {
        running.stat("http.web.downstream_rq_5xx") == refused
    });
}

#[test]
fn a_client_that_goes_away_ends_the_request_upstream() {
    let endpoint = Endpoint::start("only");
    let running = Running::start(&simple(endpoint.address, ""));
    let mut client = running.client();
    client.send("GET /hang HTTP/1.1\r\nHost: a\r\n\r\n");
    running.await_stat("cluster.app.upstream_rq_active", 1);
    drop(client);
    running.await_stat("http.web.downstream_rq_rx_reset", 1);
    await_true("the connection is closed", || {
        running.stat("cluster.app.upstream_cx_active") == 0
    });
}

#[test]
fn weighted_clusters_split_ninety_to_ten() {
    let (a, b) = (Endpoint::start("a"), Endpoint::start("b"));
    let routes = "[{match: {prefix: /}, route: {weighted_clusters: {clusters: [{name: a, weight: 90}, \
                  {name: b, weight: 10, response_headers_to_add: [{header: {key: x-canary, value: \"yes\"}}]}]}}}]";
    let clusters = format!(
        "[{}, {}]",
        cluster("a", &[a.address], ""),
        cluster("b", &[b.address], "")
    );
    let running = Running::start(&bootstrap(routes, &clusters, ""));
    let mut client = running.client();
    for _ in 0..2000 {
        let response = client.get("/");
        let canary = response.header("x-canary").is_some();
        assert_eq!(
            response.header("x-endpoint"),
            Some(if canary { "b" } else { "a" })
        );
    }
    // 200 expected; six standard deviations are 80.
    assert!((120..=280).contains(&b.requests()), "{}", b.requests());
}

#[test]
fn routes_match_in_order_by_header_path_regex_query_and_method() {
    let (a, b) = (Endpoint::start("a"), Endpoint::start("b"));
    let routes = r#"
              - {match: {prefix: /, headers: [{name: x-version, string_match: {exact: canary}}]}, route: {cluster: b}}
              - {match: {path: /exact}, route: {cluster: b}}
              - {match: {safe_regex: {regex: "/item/[0-9]+"}}, route: {cluster: b}}
              - {match: {prefix: /q, query_parameters: [{name: v, string_match: {prefix: "2"}}]}, route: {cluster: b}}
              - {match: {prefix: /, headers: [{name: ":method", string_match: {exact: PUT}}]}, route: {cluster: b}}
              - {match: {path_separated_prefix: /api}, route: {cluster: b, prefix_rewrite: /v2, host_rewrite_literal: inner}}
              - {match: {prefix: /moved}, redirect: {https_redirect: true, prefix_rewrite: /new, response_code: FOUND}}
              - {match: {prefix: /tea}, direct_response: {status: 418, body: {inline_string: short and stout}}}
              - {match: {prefix: /by-header}, route: {cluster_header: x-to}}
              - {match: {prefix: /}, route: {cluster: a}, request_headers_to_add: [{header: {key: X-Added, value: "1"}}], request_headers_to_remove: [x-gone]}"#;
    let clusters = format!(
        "[{}, {}]",
        cluster("a", &[a.address], ""),
        cluster("b", &[b.address], "")
    );
    let running = Running::start(&bootstrap(routes, &clusters, ""));
    let mut client = running.client();
    let mut ask = |method: &str, path: &str, header: &str| {
        client.send(format!("{method} {path} HTTP/1.1\r\nHost: outer\r\n{header}\r\n"));
        client.receive()
    };
    for (method, path, header, wanted) in [
        ("GET", "/", "", "a"),
        ("GET", "/", "X-Version: canary\r\n", "b"),
        ("GET", "/", "X-Version: canary2\r\n", "a"),
        ("GET", "/exact?x", "", "b"),
        ("GET", "/exact/", "", "a"),
        ("GET", "/item/12", "", "b"),
        ("GET", "/item/12/x", "", "a"),
        ("GET", "/q?v=21", "", "b"),
        ("GET", "/q?v=1", "", "a"),
        ("PUT", "/", "", "b"),
        ("GET", "/apix", "", "a"),
        ("GET", "/by-header", "X-To: b\r\n", "b"),
    ] {
        let response = ask(method, path, header);
        assert_eq!(
            response.header("x-endpoint"),
            Some(wanted),
            "{method} {path} {header}"
        );
    }
    let rewritten = ask("GET", "/api/users?id=1", "").text();
    assert!(rewritten.starts_with("GET /v2/users?id=1 "), "{rewritten}");
    assert!(rewritten.contains("host: inner\n"), "{rewritten}");
    assert!(
        rewritten.contains("x-envoy-original-path: /api/users?id=1\n"),
        "{rewritten}"
    );
    let moved = ask("GET", "/moved/x?y", "");
    assert_eq!(
        (moved.status(), moved.header("location")),
        (302, Some("https://outer/new/x?y"))
    );
    let tea = ask("GET", "/tea", "");
    assert_eq!((tea.status(), tea.text().as_str()), (418, "short and stout"));
    assert_eq!(ask("GET", "/by-header", "X-To: nowhere\r\n").status(), 503);
    let changed = ask("GET", "/", "X-Gone: 1\r\n").text();
    assert!(
        changed.contains("x-added: 1") && !changed.contains("x-gone"),
        "{changed}"
    );
}

#[test]
fn round_robin_takes_every_endpoint_in_turn() {
    let all = [Endpoint::start("a"), Endpoint::start("b"), Endpoint::start("c")];
    let addresses: Vec<_> = all.iter().map(|e| e.address).collect();
    let routes = "[{match: {prefix: /}, route: {cluster: app}}]";
    let running = Running::start(&bootstrap(
        routes,
        &format!("[{}]", cluster("app", &addresses, "")),
        "",
    ));
    let mut client = running.client();
    for _ in 0..30 {
        assert_eq!(client.get("/").status(), 200);
    }
    assert!(all.iter().all(|e| e.requests() == 10));
}

#[test]
fn a_full_cluster_makes_requests_wait_and_then_overflow() {
    let endpoint = Endpoint::start("only");
    let more = ", circuit_breakers: {thresholds: [{max_connections: 1, max_pending_requests: 0}]}";
    let routes = "[{match: {prefix: /}, route: {cluster: app}}]";
    let running = Running::start(&bootstrap(
        routes,
        &format!("[{}]", cluster("app", &[endpoint.address], more)),
        "",
    ));
    let mut first = running.client();
    first.send("GET /hang HTTP/1.1\r\nHost: a\r\n\r\n");
    running.await_stat("cluster.app.upstream_cx_active", 1);
    let response = running.client().get("/");
    assert_eq!(response.status(), 503);
    assert_eq!(response.header("x-envoy-overloaded"), Some("true"));
    assert_eq!(running.stat("cluster.app.upstream_rq_pending_overflow"), 1);
}

#[test]
fn access_log_lines_follow_envoys_default_format() {
    let endpoint = Endpoint::start("only");
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("access.log");
    let extra = format!(
        "access_log: [{{name: f, typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog, path: \"{}\"}}}}]",
        log.display()
    );
    let running = Running::start_in(folder, &simple(endpoint.address, &extra), 1);
    let mut client = running.client();
    client.send("POST /length?x=1 HTTP/1.1\r\nHost: h\r\nUser-Agent: me\r\nX-Request-Id: id-1\r\nContent-Length: 4\r\n\r\nabcd");
    assert_eq!(client.receive().text(), "4");
    let Running { proxy, folder } = running;
    proxy.drain();
    drop(client);
    proxy.wait();
    let text = std::fs::read_to_string(folder.path().join("access.log")).unwrap();
    let (time, rest) = text.split_once("] ").unwrap();
    assert!(time.starts_with("[20") && time.ends_with('Z'), "{text}");
    let fields: Vec<&str> = rest.trim_end().split(' ').collect();
    assert_eq!(
        fields[..7],
        ["\"POST", "/length?x=1", "HTTP/1.1\"", "200", "-", "4", "1"],
        "{text}"
    );
    let upstream = format!("\"{}\"", endpoint.address);
    assert_eq!(
        fields[9..],
        ["\"-\"", "\"me\"", "\"id-1\"", "\"h\"", upstream.as_str()],
        "{text}"
    );
}

#[test]
fn admin_answers_on_envoys_paths() {
    let endpoint = Endpoint::start("only");
    let running = Running::start(&simple(endpoint.address, ""));
    assert_eq!(running.client().get("/").status(), 200);
    let ready = running.admin("GET", "/ready");
    assert_eq!((ready.status(), ready.text().as_str()), (200, "LIVE\n"));
    // Counted once the client has its answer.
    running.await_stat("cluster.app.upstream_rq_2xx", 1);
    let stats = running
        .admin("GET", "/stats?filter=cluster.app.upstream_rq_2xx")
        .text();
    assert_eq!(stats, "cluster.app.upstream_rq_2xx: 1\n");
    let metrics = running.admin("GET", "/stats/prometheus?usedonly").text();
    assert!(
        metrics.contains("envoy_cluster_upstream_cx_total{envoy_cluster_name=\"app\"} 1"),
        "{metrics}"
    );
    let listeners = running.admin("GET", "/listeners").text();
    assert_eq!(listeners, format!("web::{}\n", running.web()));
    assert!(
        running
            .admin("GET", "/clusters")
            .text()
            .contains(&format!("app::{}::health_flags::healthy", endpoint.address))
    );
    let info: serde_json::Value = serde_json::from_str(&running.admin("GET", "/server_info").text()).unwrap();
    assert_eq!(
        (info["state"].as_str(), info["node"]["id"].as_str()),
        (Some("LIVE"), Some("test"))
    );
    let dump: serde_json::Value = serde_json::from_str(&running.admin("GET", "/config_dump").text()).unwrap();
    assert_eq!(dump["configs"].as_array().unwrap().len(), 5);
    assert_eq!(dump["configs"][1]["static_clusters"][0]["cluster"]["name"], "app");
    assert_eq!(running.admin("GET", "/help").status(), 200);
    assert_eq!(running.admin("GET", "/quitquitquit").status(), 405);
    assert_eq!(running.admin("GET", "/nowhere").status(), 404);
    assert_eq!(running.admin("POST", "/quitquitquit").status(), 200);
    running.proxy.wait();
}

#[test]
fn a_drain_finishes_requests_in_flight_and_closes() {
    let endpoint = Endpoint::start("only");
    let folder = tempfile::tempdir().unwrap();
    let running = Running::start_with(folder, &simple(endpoint.address, ""), 1, Duration::from_secs(60));
    let address = running.web();
    let mut idle = running.client();
    assert_eq!(idle.get("/").status(), 200);
    let mut busy = running.client();
    busy.send("POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nab");
    // The gauge of active requests may still hold the first one.
    running.await_stat("cluster.app.upstream_rq_total", 2);
    running.proxy.drain();
    await_true("the listener is closed", || {
        std::net::TcpStream::connect(address).is_err()
    });
    let response = idle.get("/");
    assert_eq!(
        (response.status(), response.header("connection")),
        (200, Some("close"))
    );
    busy.send("cd");
    let response = busy.receive();
    assert_eq!(
        (response.text().as_str(), response.header("connection")),
        ("abcd", Some("close"))
    );
    assert!(idle.is_closed() && busy.is_closed());
    let begun = Instant::now();
    running.proxy.wait();
    assert!(begun.elapsed() < Duration::from_secs(10));
}

#[test]
fn a_drain_serves_the_connections_that_nobody_has_accepted_yet() {
    let endpoint = Endpoint::start("only");
    for _ in 0..10 {
        let running = Running::start(&simple(endpoint.address, ""));
        let mut clients: Vec<Client> = (0..20).map(|_| running.client()).collect();
        for client in &mut clients {
            client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
        }
        running.proxy.drain();
        for client in &mut clients {
            assert_eq!(client.receive().status(), 200);
        }
    }
}

#[test]
fn a_drain_ends_at_its_deadline_whatever_is_open() {
    let endpoint = Endpoint::start("only");
    let running = Running::start(&simple(endpoint.address, ""));
    let mut stuck = running.client();
    stuck.send("GET /hang HTTP/1.1\r\nHost: a\r\n\r\n");
    running.await_stat("cluster.app.upstream_rq_active", 1);
    let begun = Instant::now();
    running.proxy.drain();
    running.proxy.wait();
    assert!(
        (2..=5).contains(&begun.elapsed().as_secs()),
        "{:?}",
        begun.elapsed()
    );
    let mut rest = Vec::new();
    // Closed or reset: either way nothing more comes.
    let _ = stuck.reader.read_to_end(&mut rest);
    assert!(rest.is_empty());
}

#[test]
fn two_workers_share_a_listener() {
    let endpoint = Endpoint::start("only");
    let running = Running::start_in(tempfile::tempdir().unwrap(), &simple(endpoint.address, ""), 2);
    for _ in 0..40 {
        assert_eq!(Client::connect(running.web()).get("/").status(), 200);
    }
    assert_eq!(running.stat("http.web.downstream_cx_total"), 40);
}
