//! Active health checks: what is asked, what counts as an answer, what follows. Each case is checked at Envoy too.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};

use crate::envoy::{Subject, at_both};
use crate::harness::{Client, Endpoint, await_true, bootstrap, cluster};
use crate::outlier::{Moody, nobody};

const OFTEN: &str = "interval: 0.05s, no_traffic_interval: 0.05s, timeout: 5s, reuse_connection: false";

fn app(endpoints: &[SocketAddr], check: &str, more: &str) -> String {
    let more = format!(
        ", common_lb_config: {{healthy_panic_threshold: {{}}}}, health_checks: [{{{OFTEN}, {check}}}]{more}"
    );
    let routes = "[{match: {prefix: /}, route: {cluster: app}}]";
    bootstrap(routes, &format!("[{}]", cluster("app", endpoints, &more)), "")
}

fn healthy(subject: &Subject, count: u64) {
    subject.await_value("cluster.app.membership_healthy", count);
    subject.await_value("cluster.app.health_check.healthy", count);
}

fn flags(subject: &Subject, endpoint: SocketAddr) -> String {
    let clusters = subject.admin("/clusters");
    let front = format!("app::{endpoint}::health_flags::");
    let line = clusters.lines().find_map(|l| l.strip_prefix(&front));
    line.unwrap_or_default().to_owned()
}

fn statuses(client: &mut Client, requests: usize) -> Vec<u16> {
    (0..requests).map(|_| client.get("/").status()).collect()
}

#[test]
fn an_endpoint_that_says_no_gets_no_requests_until_it_says_yes() {
    let (good, moody) = (Endpoint::start("good"), Moody::start(503));
    at_both(
        |_, _| {
            moody.become_(503);
            app(
                &[good.address, moody.address],
                "unhealthy_threshold: 3, healthy_threshold: 2, http_health_check: {path: /health, host: asked.example}",
                "",
            )
        },
        |subject, _| {
            let mut client = subject.client();
            healthy(subject, 1);
            await_true("both were checked", || {
                flags(subject, moody.address) == "/failed_active_hc"
            });
            assert_eq!(flags(subject, good.address), "healthy");
            await_true("only the good one is asked", || {
                statuses(&mut client, 8) == [200; 8]
            });
            assert!(
                moody
                    .last()
                    .starts_with("GET /health HTTP/1.1 asked.example Envoy/HC"),
                "{}",
                moody.last()
            );
            moody.become_(200);
            healthy(subject, 2);
            assert_eq!(flags(subject, moody.address), "healthy");
            // One answer that says no is enough.
            moody.become_(500);
            healthy(subject, 1);
            // Silence has to come as often as the threshold says.
            moody.become_(0);
            subject.await_stat("cluster.app.health_check.network_failure", 2);
            for member in ["success", "failure", "attempt"] {
                subject.await_stat(&format!("cluster.app.health_check.{member}"), 3);
            }
        },
    );
}

#[test]
fn statuses_and_names_are_as_configured() {
    let moody = Moody::start(404);
    at_both(
        |_, _| {
            moody.become_(404);
            app(
                &[moody.address],
                "unhealthy_threshold: 2, healthy_threshold: 1, http_health_check: {path: \"/x?y\", method: HEAD, expected_statuses: [{start: 200, end: 201}, {start: 404, end: 405}], retriable_statuses: [{start: 429, end: 430}]}",
                "",
            )
        },
        |subject, _| {
            healthy(subject, 1);
            assert!(
                moody.last().starts_with("HEAD /x?y HTTP/1.1 app Envoy/HC"),
                "{}",
                moody.last()
            );
            moody.become_(429);
            healthy(subject, 0);
            assert_eq!(subject.client().get("/").status(), 503);
            moody.become_(200);
            healthy(subject, 1);
        },
    );
}

/// Answers `PONG` to `PING`, and nothing to anything else.
fn ping_pong() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || {
                let mut data = [0; 4];
                while stream.read_exact(&mut data).is_ok() {
                    let answer: &[u8] = if &data == b"PING" { b"a PONG b" } else { b"" };
                    if stream.write_all(answer).is_err() {
                        return;
                    }
                }
            });
        }
    });
    address
}

#[test]
fn a_connection_is_enough_or_has_to_bring_what_is_awaited() {
    let (good, refused, pong) = (Endpoint::start("good"), nobody(), ping_pong());
    at_both(
        |_, _| {
            app(
                &[good.address, refused],
                "unhealthy_threshold: 1, healthy_threshold: 1, tcp_health_check: {}",
                "",
            )
        },
        |subject, _| {
            healthy(subject, 1);
            await_true("checked", || flags(subject, refused) == "/failed_active_hc");
            subject.await_stat("cluster.app.health_check.network_failure", 1);
        },
    );
    // PING; PONG in two blocks.
    for (send, expected) in [("50494e47", 1), ("50454e47", 0)] {
        at_both(
            |_, _| {
                let check = format!(
                    "timeout: 0.3s, unhealthy_threshold: 1, healthy_threshold: 1, tcp_health_check: {{send: {{text: \"{send}\"}}, receive: [{{text: \"504f\"}}, {{text: \"4e47\"}}]}}"
                );
                app(&[pong], &check, "").replace("timeout: 5s, ", "")
            },
            |subject, _| {
                healthy(subject, expected);
                if expected == 0 {
                    await_true("it timed out", || {
                        flags(subject, pong) == "/failed_active_hc/active_hc_timeout"
                    });
                }
            },
        );
    }
}

/// A gRPC health server: what it says of the service `shop`, or -1 for a gRPC error.
fn grpc_health(says: Arc<AtomicI32>, asked: Arc<AtomicUsize>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async move {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (says, asked) = (Arc::clone(&says), Arc::clone(&asked));
                tokio::spawn(async move {
                    let Ok(mut connection) = h2::server::handshake(stream).await else {
                        return;
                    };
                    while let Some(Ok((request, mut respond))) = connection.accept().await {
                        let (says, asked) = (Arc::clone(&says), Arc::clone(&asked));
                        tokio::spawn(async move {
                            let (head, mut body) = request.into_parts();
                            let mut message = Vec::new();
                            while let Some(Ok(data)) = body.data().await {
                                message.extend_from_slice(&data);
                            }
                            let right = head.uri.path() == "/grpc.health.v1.Health/Check"
                                && message == b"\0\0\0\0\x06\x0a\x04shop"
                                && head.headers["content-type"] == "application/grpc";
                            asked.fetch_add(usize::from(right), Ordering::SeqCst);
                            let status = says.load(Ordering::SeqCst);
                            let response =
                                http::Response::builder().header("content-type", "application/grpc");
                            if status < 0 {
                                let response = response.header("grpc-status", "14").body(()).unwrap();
                                let _ = respond.send_response(response, true);
                                return;
                            }
                            let Ok(mut stream) = respond.send_response(response.body(()).unwrap(), false)
                            else {
                                return;
                            };
                            let answer = vec![0, 0, 0, 0, 2, 8, status as u8];
                            let _ = stream.send_data(answer.into(), false);
                            let mut trailers = http::HeaderMap::new();
                            trailers.insert("grpc-status", "0".parse().unwrap());
                            let _ = stream.send_trailers(trailers);
                        });
                    }
                });
            }
        });
    });
    address
}

#[test]
fn a_grpc_service_says_whether_it_serves() {
    let (says, asked) = (Arc::new(AtomicI32::new(1)), Arc::new(AtomicUsize::new(0)));
    let endpoint = grpc_health(Arc::clone(&says), Arc::clone(&asked));
    let http2 = ", typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {\"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: {http2_protocol_options: {}}}}";
    at_both(
        |_, _| {
            says.store(1, Ordering::SeqCst);
            asked.store(0, Ordering::SeqCst);
            app(
                &[endpoint],
                "unhealthy_threshold: 2, healthy_threshold: 1, grpc_health_check: {service_name: shop}",
                http2,
            )
        },
        |subject, _| {
            healthy(subject, 1);
            assert!(asked.load(Ordering::SeqCst) > 0, "{}", subject.name());
            for (status, healthy_now) in [(2, 0), (1, 1), (-1, 0), (1, 1), (0, 0)] {
                says.store(status, Ordering::SeqCst);
                healthy(subject, healthy_now);
            }
        },
    );
}

#[test]
fn a_good_check_ends_an_ejection() {
    let (good, moody) = (Endpoint::start("good"), Moody::start(200));
    at_both(
        |_, _| {
            moody.become_(200);
            app(
                &[good.address, moody.address],
                "unhealthy_threshold: 1, healthy_threshold: 1, tcp_health_check: {}",
                ", outlier_detection: {consecutive_5xx: 2, interval: 600s, max_ejection_percent: 50}",
            )
        },
        |subject, _| {
            healthy(subject, 2);
            moody.become_(500);
            let mut client = subject.client();
            statuses(&mut client, 8);
            subject.await_stat("cluster.app.outlier_detection.ejections_enforced_total", 1);
            moody.become_(200);
            subject.await_value("cluster.app.outlier_detection.ejections_active", 0);
            healthy(subject, 2);
        },
    );
}
