//! Limits on streams and connections as a whole: `max_stream_duration` of connection managers, routes and clusters, keep-alive PINGs.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use crate::envoy::{Subject, at_both};
use crate::harness::{Endpoint, bootstrap, cluster};

const OPTIONS: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";

fn limited(endpoint: &Endpoint, manager: &str, route: &str, of_cluster: &str) -> String {
    let routes = format!("[{{match: {{prefix: /}}, route: {{cluster: app{route}}}}}]");
    let more = match of_cluster {
        "" => String::new(),
        limit => format!(
            ", typed_extension_protocol_options: {{{OPTIONS}: {{\"@type\": type.googleapis.com/{OPTIONS}, \
             common_http_protocol_options: {{max_stream_duration: {limit}}}, explicit_http_config: {{http_protocol_options: {{}}}}}}}}"
        ),
    };
    let extra = match manager {
        "" => String::new(),
        limit => format!("common_http_protocol_options: {{max_stream_duration: {limit}}}"),
    };
    bootstrap(
        &routes,
        &format!("[{}]", cluster("app", &[endpoint.address], &more)),
        &extra,
    )
}

/// Asks for what is never answered: status and body.
fn ask(subject: &Subject, more: &str) -> (u16, String, Option<String>) {
    let mut client = subject.client();
    client.send(format!("GET /hang HTTP/1.1\r\nHost: a\r\n{more}\r\n"));
    let response = client.receive();
    let grpc = response.header("grpc-status").map(str::to_owned);
    (response.status(), response.text(), grpc)
}

const GRPC: &str = "content-type: application/grpc\r\nte: trailers\r\n";

#[test]
fn a_connection_managers_limit_ends_the_exchange() {
    at_both(
        |endpoint, _| limited(endpoint, "0.2s", ", timeout: 0s", ""),
        |subject, _| {
            let late = (504, "downstream duration timeout".to_owned(), None);
            assert_eq!(ask(subject, ""), late, "{}", subject.name());
            let (status, _, grpc) = ask(subject, GRPC);
            assert_eq!((status, grpc.as_deref()), (200, Some("4")), "{}", subject.name());
            // A client that does not come to an end is late itself.
            let mut client = subject.client();
            client.send("POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nabc");
            let response = client.receive();
            assert_eq!(
                (response.status(), response.text().as_str()),
                (408, "downstream duration timeout"),
                "{}",
                subject.name()
            );
            assert_eq!(
                subject.await_stat("http.web.downstream_rq_max_duration_reached", 3),
                3
            );
            assert_eq!(subject.client().get("/").status(), 200);
        },
    );
}

#[test]
fn a_routes_limit_replaces_the_connection_managers() {
    let late = || (504, "downstream duration timeout".to_owned(), None);
    // With it the route's own time limit has no effect.
    let route = ", timeout: 0.1s, max_stream_duration: {max_stream_duration: 0.3s}";
    at_both(
        |endpoint, _| limited(endpoint, "100s", route, ""),
        |subject, _| assert_eq!(ask(subject, ""), late(), "{}", subject.name()),
    );
    let none = ", timeout: 0s, max_stream_duration: {max_stream_duration: 0s}";
    at_both(
        |endpoint, _| limited(endpoint, "0.1s", none, ""),
        |subject, _| {
            let mut client = subject.client();
            let slow = "GET /silent-until?99 HTTP/1.1\r\nHost: a\r\n\r\n";
            client.send(slow);
            // The endpoint says nothing for a second, and closes.
            assert_eq!(client.receive().status(), 503, "{}", subject.name());
        },
    );
}

#[test]
fn grpc_timeout_is_the_limit_where_the_route_says_so() {
    let route =
        ", timeout: 0s, max_stream_duration: {max_stream_duration: 100s, grpc_timeout_header_max: 0.4s}";
    at_both(
        |endpoint, _| limited(endpoint, "", route, ""),
        |subject, _| {
            for asked in ["200m", "10S"] {
                let (status, _, grpc) = ask(subject, &format!("{GRPC}grpc-timeout: {asked}\r\n"));
                assert_eq!(
                    (status, grpc.as_deref()),
                    (200, Some("4")),
                    "{asked} at {}",
                    subject.name()
                );
            }
            assert_eq!(
                subject.await_stat("http.web.downstream_rq_max_duration_reached", 2),
                2
            );
        },
    );
}

#[test]
fn a_clusters_limit_ends_the_attempt() {
    at_both(
        |endpoint, _| limited(endpoint, "", ", timeout: 0s", "0.2s"),
        |subject, _| {
            let late = (504, "upstream max stream duration reached".to_owned(), None);
            assert_eq!(ask(subject, ""), late, "{}", subject.name());
            assert_eq!(
                subject.await_stat("cluster.app.upstream_rq_max_duration_reached", 1),
                1
            );
        },
    );
}

const KEEPALIVE: &str = "connection_keepalive: {interval: 0.1s, timeout: 0.3s, interval_jitter: {value: 0}}";

#[test]
fn a_client_that_answers_no_ping_is_given_up() {
    at_both(
        |endpoint, _| {
            let routes = "[{match: {prefix: /}, route: {cluster: app}}]";
            let extra = format!("http2_protocol_options: {{{KEEPALIVE}}}");
            bootstrap(
                routes,
                &format!("[{}]", cluster("app", &[endpoint.address], "")),
                &extra,
            )
        },
        |subject, _| {
            let mut client = TcpStream::connect(subject.web()).unwrap();
            client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            client
                .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
                .unwrap();
            let mut said = Vec::new();
            // An end or a reset, but an end.
            let ended = client.read_to_end(&mut said);
            assert!(
                !ended.is_err_and(|e| e.kind() == std::io::ErrorKind::WouldBlock),
                "{}",
                subject.name()
            );
            let ping = [0, 0, 8, 6, 0, 0, 0, 0, 0];
            assert!(
                said.windows(9).any(|frame| frame == ping),
                "{}: {said:?}",
                subject.name()
            );
            assert_eq!(subject.await_stat("http2.keepalive_timeout", 1), 1);
        },
    );
}

/// Accepts and says what an HTTP/2 server says first, then nothing.
fn mute() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut kept = Vec::new();
        for mut stream in listener.incoming().flatten() {
            // The other side sees it if it fails.
            let _ = stream.write_all(b"\0\0\0\x04\0\0\0\0\0\0\0\0\x04\x01\0\0\0\0");
            kept.push(stream);
        }
    });
    address
}

#[test]
fn an_endpoint_that_answers_no_ping_is_given_up() {
    let mute = mute();
    at_both(
        |_, _| {
            let routes = "[{match: {prefix: /}, route: {cluster: app, timeout: 15s}}]";
            let more = format!(
                ", typed_extension_protocol_options: {{{OPTIONS}: {{\"@type\": type.googleapis.com/{OPTIONS}, \
                 explicit_http_config: {{http2_protocol_options: {{{KEEPALIVE}}}}}}}}}"
            );
            bootstrap(routes, &format!("[{}]", cluster("app", &[mute], &more)), "")
        },
        |subject, _| {
            let response = subject.client().get("/");
            assert_eq!(response.status(), 503, "{}", subject.name());
            let reason = "reset reason: connection termination";
            assert!(
                response.text().contains(reason),
                "{} at {}",
                response.text(),
                subject.name()
            );
            assert_eq!(subject.await_stat("cluster.app.http2.keepalive_timeout", 1), 1);
        },
    );
}
