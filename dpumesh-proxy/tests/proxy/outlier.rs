//! Outlier detection: who is ejected, for what, how long, and what is counted. Each case is checked at Envoy too.

use std::io::{BufReader, Write};
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use crate::envoy::{Subject, at_both};
use crate::harness::{
    Client, Endpoint, Running, await_true, bootstrap, cluster, lb_endpoint, read_message, replace,
};

/// An endpoint that answers as it is told: a status, or 0 for hanging up.
pub(crate) struct Moody {
    pub(crate) address: SocketAddr,
    mood: Arc<AtomicU16>,
    requests: Arc<AtomicUsize>,
    last: Arc<Mutex<String>>,
}

impl Moody {
    pub(crate) fn start(mood: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (mood, requests) = (Arc::new(AtomicU16::new(mood)), Arc::new(AtomicUsize::new(0)));
        let last = Arc::new(Mutex::new(String::new()));
        let (told, seen, kept) = (Arc::clone(&mood), Arc::clone(&requests), Arc::clone(&last));
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (told, seen, kept) = (Arc::clone(&told), Arc::clone(&seen), Arc::clone(&kept));
                std::thread::spawn(move || {
                    let mut writer = stream.try_clone().unwrap();
                    let mut reader = BufReader::new(stream);
                    while let Ok(Some(request)) = read_message(&mut reader, false, false) {
                        seen.fetch_add(1, Ordering::SeqCst);
                        let header = |name| request.header(name).unwrap_or_default();
                        let line = [&request.first, header("host"), header("user-agent")].join(" ");
                        *kept.lock().unwrap() = line;
                        let status = told.load(Ordering::SeqCst);
                        let answer = format!("HTTP/1.1 {status} Some\r\nContent-Length: 0\r\n\r\n");
                        if status == 0 || writer.write_all(answer.as_bytes()).is_err() {
                            return;
                        }
                    }
                });
            }
        });
        Self {
            address,
            mood,
            requests,
            last,
        }
    }

    /// Request line, host and user agent of the last request.
    pub(crate) fn last(&self) -> String {
        self.last.lock().unwrap().clone()
    }

    pub(crate) fn become_(&self, mood: u16) {
        self.mood.store(mood, Ordering::SeqCst);
    }

    pub(crate) fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }
}

/// An address at which nobody listens.
pub(crate) fn nobody() -> SocketAddr {
    let closed = TcpListener::bind("127.0.0.1:0").unwrap();
    closed.local_addr().unwrap()
}

fn app(endpoints: &[SocketAddr], detection: &str) -> String {
    let more = format!(", outlier_detection: {{enforcing_success_rate: 0, {detection}}}");
    let routes = "[{match: {prefix: /}, route: {cluster: app}}]";
    bootstrap(routes, &format!("[{}]", cluster("app", endpoints, &more)), "")
}

fn stat(subject: &Subject, member: &str, value: u64) {
    subject.await_value(&format!("cluster.app.outlier_detection.{member}"), value);
}

/// The statuses of so many requests.
fn statuses(client: &mut Client, requests: usize) -> Vec<u16> {
    (0..requests).map(|_| client.get("/").status()).collect()
}

#[test]
fn server_errors_in_a_row_eject_their_endpoint() {
    let good = [Endpoint::start("a"), Endpoint::start("b")];
    for mood in [500, 0] {
        let moody = Moody::start(mood);
        at_both(
            |_, _| {
                moody.become_(mood);
                app(
                    &[good[0].address, good[1].address, moody.address],
                    "consecutive_5xx: 3, interval: 0.1s, base_ejection_time: 600s, max_ejection_percent: 40",
                )
            },
            |subject, _| {
                let mut client = subject.client();
                let failed = |client: &mut Client| statuses(client, 9).iter().filter(|s| **s >= 500).count();
                assert_eq!(failed(&mut client), 3, "{mood} at {}", subject.name());
                stat(subject, "ejections_active", 1);
                subject.await_value("cluster.app.membership_healthy", 2);
                // Taken up by the worker.
                await_true("nobody asks it", || {
                    let before = moody.requests();
                    statuses(&mut client, 6) == [200; 6] && moody.requests() == before
                });
                for (member, value) in [
                    ("ejections_consecutive_5xx", 1),
                    ("ejections_detected_consecutive_5xx", 1),
                    ("ejections_enforced_consecutive_5xx", 1),
                    ("ejections_enforced_total", 1),
                    ("ejections_total", 1),
                    ("ejections_overflow", 0),
                ] {
                    stat(subject, member, value);
                }
                let clusters = subject.admin("/clusters");
                let flags = format!("app::{}::health_flags::/failed_outlier_check", moody.address);
                assert!(clusters.contains(&flags), "{clusters}");
            },
        );
    }
}

#[test]
fn an_ejected_endpoint_comes_back_and_a_good_answer_breaks_a_row() {
    let good = Endpoint::start("good");
    let moody = Moody::start(200);
    at_both(
        |_, _| {
            moody.become_(200);
            app(
                &[good.address, moody.address],
                "consecutive_5xx: 3, interval: 0.05s, base_ejection_time: 0.2s, max_ejection_percent: 50",
            )
        },
        |subject, _| {
            let mut client = subject.client();
            for _ in 0..4 {
                moody.become_(500);
                statuses(&mut client, 4);
                moody.become_(200);
                statuses(&mut client, 2);
            }
            stat(subject, "ejections_detected_consecutive_5xx", 0);
            moody.become_(503);
            statuses(&mut client, 6);
            subject.await_stat("cluster.app.outlier_detection.ejections_enforced_total", 1);
            moody.become_(200);
            stat(subject, "ejections_active", 0);
            subject.await_value("cluster.app.membership_healthy", 2);
            let before = moody.requests();
            await_true("it serves again", || {
                statuses(&mut client, 4);
                moody.requests() > before
            });
        },
    );
}

#[test]
fn no_more_are_ejected_than_may_be_and_what_is_not_enforced_is_counted() {
    let moody = [Moody::start(502), Moody::start(502), Moody::start(502)];
    at_both(
        |_, _| {
            app(
                &[moody[0].address, moody[1].address, moody[2].address],
                "consecutive_5xx: 3, consecutive_gateway_failure: 2, enforcing_consecutive_gateway_failure: 0, interval: 600s, max_ejection_percent: 34",
            )
        },
        |subject, _| {
            let mut client = subject.client();
            statuses(&mut client, 9);
            stat(subject, "ejections_enforced_consecutive_5xx", 1);
            statuses(&mut client, 9);
            stat(subject, "ejections_active", 1);
            subject.await_stat("cluster.app.outlier_detection.ejections_overflow", 2);
            subject.await_stat(
                "cluster.app.outlier_detection.ejections_detected_consecutive_gateway_failure",
                3,
            );
            stat(subject, "ejections_enforced_consecutive_gateway_failure", 0);
        },
    );
}

#[test]
fn what_cannot_be_reached_is_ejected_for_that() {
    let good = Endpoint::start("good");
    let refused = nobody();
    for (detection, member) in [
        (
            "split_external_local_origin_errors: true, consecutive_local_origin_failure: 2, consecutive_5xx: 1",
            "ejections_enforced_consecutive_local_origin_failure",
        ),
        (
            "consecutive_gateway_failure: 2, enforcing_consecutive_gateway_failure: 100",
            "ejections_enforced_consecutive_gateway_failure",
        ),
    ] {
        at_both(
            |_, _| {
                app(
                    &[good.address, refused],
                    &format!(
                        "{detection}, interval: 0.1s, base_ejection_time: 600s, max_ejection_percent: 50"
                    ),
                )
            },
            |subject, _| {
                let mut client = subject.client();
                let found = statuses(&mut client, 4);
                assert_eq!(
                    found.iter().filter(|s| **s == 503).count(),
                    2,
                    "{found:?} at {}",
                    subject.name()
                );
                stat(subject, member, 1);
                stat(subject, "ejections_enforced_total", 1);
                await_true("only the other is asked", || statuses(&mut client, 4) == [200; 4]);
            },
        );
    }
}

#[test]
fn an_answer_that_does_not_come_in_time_is_a_gateway_failure() {
    at_both(
        |endpoint, _| {
            let more = ", outlier_detection: {consecutive_gateway_failure: 2, enforcing_consecutive_gateway_failure: 0, interval: 600s}";
            let routes = "[{match: {prefix: /}, route: {cluster: app, prefix_rewrite: /silent-until, timeout: 0.05s}}]";
            bootstrap(
                routes,
                &format!("[{}]", cluster("app", &[endpoint.address], more)),
                "",
            )
        },
        |subject, _| {
            let mut client = subject.client();
            for _ in 0..2 {
                assert_eq!(client.get("/?9").status(), 504, "{}", subject.name());
            }
            stat(subject, "ejections_detected_consecutive_gateway_failure", 1);
        },
    );
}

#[test]
fn tcp_connections_that_fail_count_too() {
    let network = "type.googleapis.com/envoy.extensions.filters.network";
    let good = Endpoint::start("good");
    let refused = nobody();
    at_both(
        |_, _| {
            let more = ", outlier_detection: {consecutive_5xx: 2, max_ejection_percent: 50, interval: 600s}";
            let clusters = cluster("app", &[good.address, refused], more);
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
        typed_config: {{"@type": {network}.tcp_proxy.v3.TcpProxy, stat_prefix: t, cluster: app}}
  clusters: [{clusters}]
"#
            )
        },
        |subject, _| {
            let served = || {
                let mut client = subject.client();
                let asked = client
                    .reader
                    .get_mut()
                    .write_all(b"GET /close-after HTTP/1.1\r\nHost: a\r\n\r\n");
                asked.is_ok()
                    && client
                        .try_receive()
                        .is_ok_and(|m| m.is_some_and(|m| m.status() == 200))
            };
            assert_eq!((0..4).filter(|_| served()).count(), 2, "{}", subject.name());
            stat(subject, "ejections_enforced_consecutive_5xx", 1);
            await_true("only the other is asked", || (0..4).all(|_| served()));
        },
    );
}

#[test]
fn an_assignment_that_changes_leaves_the_ejected_where_they_are() {
    let (good, other, moody) = (
        Endpoint::start("good"),
        Endpoint::start("other"),
        Moody::start(500),
    );
    let eds = |endpoints: &[SocketAddr]| {
        let entries: Vec<String> = endpoints.iter().map(|e| lb_endpoint(*e)).collect();
        format!(
            "resources:\n- {{\"@type\": type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment, cluster_name: app, \
             endpoints: [{{lb_endpoints: [{}]}}]}}\n",
            entries.join(", ")
        )
    };
    at_both(
        |_, folder| {
            std::fs::write(format!("{folder}/eds.yaml"), eds(&[good.address, moody.address])).unwrap();
            let cluster = format!(
                "[{{name: app, type: EDS, connect_timeout: 1s, eds_cluster_config: {{eds_config: {{path_config_source: {{path: \"{folder}/eds.yaml\"}}}}}}, \
                 outlier_detection: {{consecutive_5xx: 2, interval: 600s, max_ejection_percent: 50}}}}]"
            );
            bootstrap("[{match: {prefix: /}, route: {cluster: app}}]", &cluster, "")
        },
        |subject, _| {
            let file = subject.folder().join("eds.yaml");
            let mut client = subject.client();
            statuses(&mut client, 4);
            stat(subject, "ejections_active", 1);
            replace(&file, &eds(&[good.address, moody.address, other.address]));
            subject.await_value("cluster.app.membership_total", 3);
            subject.await_value("cluster.app.membership_healthy", 2);
            stat(subject, "ejections_active", 1);
            let before = other.requests();
            await_true("the new one is asked", || {
                statuses(&mut client, 4);
                other.requests() > before
            });
            let before = moody.requests();
            assert_eq!(statuses(&mut client, 8), [200; 8], "{}", subject.name());
            assert_eq!(moody.requests(), before);
            replace(&file, &eds(&[good.address, other.address]));
            subject.await_value("cluster.app.membership_total", 2);
            stat(subject, "ejections_active", 0);
        },
    );
}

#[test]
fn a_row_goes_over_all_workers() {
    let (good, moody) = (Endpoint::start("good"), Moody::start(500));
    let text = app(
        &[good.address, moody.address],
        "consecutive_5xx: 12, interval: 0.1s, base_ejection_time: 600s, max_ejection_percent: 50",
    );
    let running = Running::start_in(tempfile::tempdir().unwrap(), &text, 4);
    // New connections, so that all workers have a part in it.
    while moody.requests() < 12 {
        running.client().get("/");
    }
    running.await_stat("cluster.app.outlier_detection.ejections_active", 1);
    await_true("no worker asks it", || {
        let before = moody.requests();
        (0..16).for_each(|_| drop(running.client().get("/")));
        moody.requests() == before
    });
}
