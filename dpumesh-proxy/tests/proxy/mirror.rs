//! Copies of requests go to other clusters, and nothing that becomes of them is seen by the client.

use std::net::{SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use std::io::BufReader;
use std::io::Write;
use std::sync::mpsc::{Receiver, channel};

use crate::envoy::at_both;
use crate::harness::{Endpoint, Message, bootstrap_with, cluster, read_message};

/// An endpoint that answers 200 and tells of all requests.
fn witness() -> (SocketAddr, Receiver<Message>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (tell, told) = channel();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let tell = tell.clone();
            std::thread::spawn(move || {
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                while let Ok(Some(message)) = read_message(&mut reader, false, false) {
                    let answer = "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nnever";
                    if tell.send(message).is_err() || stream.write_all(answer.as_bytes()).is_err() {
                        return;
                    }
                }
            });
        }
    });
    (address, told)
}

const SOON: Duration = Duration::from_secs(20);

#[test]
fn requests_are_copied_with_their_bodies() {
    let (address, told) = witness();
    let routes = "[{match: {prefix: /}, route: {cluster: app, prefix_rewrite: /length, request_mirror_policies: [{cluster: mirror}]}, \
                    request_headers_to_add: [{header: {key: x-added, value: v}}]}]";
    at_both(
        |endpoint, _| {
            let clusters = format!(
                "[{}, {}]",
                cluster("app", &[endpoint.address], ""),
                cluster("mirror", &[address], "")
            );
            bootstrap_with(routes, &clusters, "", "", "")
        },
        |subject, endpoint| {
            let name = subject.name();
            let mut client = subject.client();
            let long = "x".repeat(100_000);
            for (front, body, whole) in [
                ("GET / HTTP/1.1\r\nHost: far.example:80\r\n\r\n", "", ""),
                (
                    "POST / HTTP/1.1\r\nHost: far.example:80\r\nContent-Length: 5\r\n\r\n",
                    "hello",
                    "hello",
                ),
                (
                    "POST / HTTP/1.1\r\nHost: far.example:80\r\nTransfer-Encoding: chunked\r\n\r\n",
                    "3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n",
                    "abcde",
                ),
                (
                    "POST / HTTP/1.1\r\nHost: far.example:80\r\nContent-Length: 100000\r\n\r\n",
                    &long,
                    &long,
                ),
            ] {
                client.send(format!("{front}{body}"));
                let response = client.receive();
                assert_eq!(
                    (response.status(), response.text()),
                    (200, whole.len().to_string()),
                    "{name}"
                );
                let copy = told.recv_timeout(SOON).unwrap();
                let method = front.split(' ').next().unwrap_or_default();
                assert_eq!(copy.first, format!("{method} /length HTTP/1.1"), "{name}");
                assert_eq!(copy.header("host"), Some("far.example-shadow:80"), "{name}");
                assert_eq!(copy.header("x-added"), Some("v"), "{name}");
                assert!(copy.text() == whole, "{name}: {} octets", copy.body.len());
            }
            assert_eq!(endpoint.requests(), 4, "{name}");
            assert_eq!(
                subject.await_stat("cluster.mirror.upstream_rq_total", 4),
                4,
                "{name}"
            );
            assert_eq!(
                subject.await_stat("cluster.mirror.upstream_rq_2xx", 4),
                4,
                "{name}"
            );
        },
    );
}

#[test]
fn shares_and_hosts_of_copies_are_as_configured() {
    let (address, told) = witness();
    let routes = "[{match: {prefix: /never}, route: {cluster: app, request_mirror_policies: [{cluster: mirror, runtime_fraction: {default_value: {numerator: 0}}}]}}, \
                   {match: {prefix: /half}, route: {cluster: app, request_mirror_policies: [{cluster: mirror, runtime_fraction: {default_value: {numerator: 500000, denominator: MILLION}}}]}}, \
                   {match: {prefix: /}, route: {cluster: app, request_mirror_policies: [{cluster: mirror, disable_shadow_host_suffix_append: true}, {cluster: mirror}]}}]";
    at_both(
        |endpoint, _| {
            let clusters = format!(
                "[{}, {}]",
                cluster("app", &[endpoint.address], ""),
                cluster("mirror", &[address], "")
            );
            bootstrap_with(routes, &clusters, "", "", "")
        },
        |subject, _| {
            let name = subject.name();
            let mut client = subject.client();
            for _ in 0..20 {
                assert_eq!(client.get("/never").status(), 200, "{name}");
            }
            assert_eq!(client.get("/all").status(), 200, "{name}");
            let mut hosts: Vec<_> = (0..2)
                .map(|_| told.recv_timeout(SOON).unwrap())
                .map(|copy| copy.header("host").unwrap_or_default().to_owned())
                .collect();
            hosts.sort();
            assert_eq!(hosts, ["test", "test-shadow"], "{name}");
            for _ in 0..200 {
                assert_eq!(client.get("/half").status(), 200, "{name}");
            }
            let total = subject.await_stat("cluster.mirror.upstream_rq_2xx", 60);
            while told.recv_timeout(Duration::from_millis(300)).is_ok() {}
            // Five standard deviations of 200 draws at one half are 35.
            let copied = subject.await_stat("cluster.mirror.upstream_rq_total", total) - 2;
            assert!((65..=135).contains(&copied), "{copied} at {name}");
        },
    );
}

#[test]
fn a_mirror_that_fails_or_hangs_is_not_noticed() {
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap();
    let closed = nobody.local_addr().unwrap();
    drop(nobody);
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let hanging = silent.local_addr().unwrap();
    let broken = Endpoint::start("broken");
    let mirrors = "request_mirror_policies: [{cluster: closed}, {cluster: hanging}, {cluster: broken}, {cluster: nobody}]";
    let routes = format!("[{{match: {{prefix: /}}, route: {{cluster: app, timeout: 5s, {mirrors}}}}}]");
    at_both(
        |endpoint, _| {
            let clusters = format!(
                "[{}, {}, {}, {}, {}]",
                cluster("app", &[endpoint.address], ""),
                cluster("closed", &[closed], ""),
                cluster("hanging", &[hanging], ""),
                cluster("broken", &[broken.address], ""),
                cluster("nobody", &[], "")
            );
            bootstrap_with(&routes, &clusters, "", "", "")
        },
        |subject, endpoint| {
            let name = subject.name();
            let mut client = subject.client();
            let begun = Instant::now();
            for path in ["/hang-up-not", "/echo", "/length"] {
                assert_eq!(client.get(path).status(), 200, "{name}");
            }
            // Much more than a mirror may hold.
            let long = "y".repeat(4 << 20);
            client.send(format!(
                "POST /length HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n{long}",
                long.len()
            ));
            assert_eq!(client.receive().text(), long.len().to_string(), "{name}");
            assert!(
                begun.elapsed() < Duration::from_secs(5),
                "{name} waited for a mirror"
            );
            assert_eq!(endpoint.requests(), 4, "{name}");
        },
    );
}
