//! PROXY headers, taken from clients and given to endpoints. Each case is checked at Envoy too.

use std::io::{BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use dpumesh_proxy::proxy_protocol::{Begin, Ends, read};

use crate::envoy::{Subject, at_both};
use crate::harness::{Client, Endpoint, Running, await_true, cluster, read_message};
use crate::mesh::Authority;

const FILTER: &str = "type.googleapis.com/envoy.extensions.filters.listener.proxy_protocol.v3.ProxyProtocol";
const FILE: &str = "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog";
const V4: &[u8] = b"\x21\x11\0\x0c\xc0\0\x02\x01\xc0\0\x02\x02\x03\xe8\0\x50";

/// The signature of version 2, and `rest`.
fn v2(rest: &[u8]) -> Vec<u8> {
    [b"\r\n\r\n\0\r\nQUIT\n", rest].concat()
}

/// A listener that takes headers (`filter`: the filter's fields), with `listener` beside it and these chains.
fn bootstrap(filter: &str, listener: &str, chains: &str, clusters: &str) -> String {
    format!(
        r#"
admin: {{address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}}}
static_resources:
  listeners:
  - name: web
    stat_prefix: web
    address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}
    {listener}
    listener_filters:
    - {{name: envoy.filters.listener.proxy_protocol, typed_config: {{"@type": {FILTER}, {filter}}}}}
    - {{name: envoy.filters.listener.http_inspector, typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.listener.http_inspector.v3.HttpInspector}}}}
    filter_chains: {chains}
  clusters: {clusters}
"#
    )
}

/// A chain with a connection manager that logs `%DOWNSTREAM_…%` addresses; `more` of its fields, `filters` each with a comma behind.
fn http(folder: &str, matched: &str, more: &str, filters: &str, route: &str) -> String {
    let log = "%DOWNSTREAM_REMOTE_ADDRESS% %DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT% %DOWNSTREAM_LOCAL_ADDRESS% \
               %DOWNSTREAM_DIRECT_LOCAL_ADDRESS_WITHOUT_PORT% %DOWNSTREAM_REMOTE_PORT%";
    format!(
        "{{{matched} filters: [{{name: hcm, typed_config: {{'@type': type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager, \
         stat_prefix: web, {more} access_log: [{{name: f, typed_config: {{'@type': {FILE}, path: '{folder}/log', log_format: {{text_format_source: {{inline_string: \"{log}\\n\"}}}}}}}}], \
         route_config: {{request_headers_to_add: [{{header: {{key: x-seen-from, value: '%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%'}}}}], virtual_hosts: [{{name: all, domains: ['*'], routes: [{{match: {{prefix: /}}, {route}}}]}}]}}, \
         http_filters: [{filters} {{name: r, typed_config: {{'@type': type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}}}]}}}}]}}"
    )
}

const TO_APP: &str = "route: {cluster: app}";

fn simple(endpoint: &Endpoint, folder: &str, filter: &str, more: &str) -> String {
    let chains = format!("[{}]", http(folder, "", more, "", TO_APP));
    let clusters = format!("[{}]", cluster("app", &[endpoint.address], ""));
    bootstrap(filter, "", &chains, &clusters)
}

fn logged(subject: &Subject, count: usize) -> Vec<String> {
    let path = subject.folder().join("log");
    let read = || std::fs::read_to_string(&path).unwrap_or_default();
    await_true(&format!("{count} lines at {}", subject.name()), || {
        read().lines().count() >= count
    });
    read().lines().map(str::to_owned).collect()
}

#[test]
fn a_header_says_whose_connection_it_is() {
    at_both(
        |endpoint, folder| simple(endpoint, folder, "", ""),
        |subject, _| {
            let six = "2001:db8::1";
            let mut local = v2(b"\x20\x11\0\x0c");
            local.extend([0xff; 12]);
            // Who is seen, and where it went; without a port where that is the socket's own.
            let named = (
                six.to_owned(),
                format!("[{six}]:1000 127.0.0.1 [::2]:80 127.0.0.1 1000"),
            );
            let four = (
                "192.0.2.1".to_owned(),
                "192.0.2.1:1000 127.0.0.1 192.0.2.2:80 127.0.0.1 1000".to_owned(),
            );
            type Case<'a> = (Vec<u8>, &'a str, Option<&'a (String, String)>);
            let cases: [Case<'_>; 9] = [
                (
                    b"PROXY TCP4 192.0.2.1 192.0.2.2 1000 80\r\n".to_vec(),
                    "v1",
                    Some(&four),
                ),
                (
                    format!("PROXY TCP6 {six} ::2 1000 80\r\n").into_bytes(),
                    "v1",
                    Some(&named),
                ),
                (
                    b"PROXY TCP6 2001:DB8:0:0::1 0::2 01000 80\r\n".to_vec(),
                    "v1",
                    Some(&named),
                ),
                (b"PROXY UNKNOWN\r\n".to_vec(), "v1", None),
                (b"PROXY UNKNOWN ::1 whatever\r\n".to_vec(), "v1", None),
                (v2(V4), "v2", Some(&four)),
                (
                    v2(b"\x21\x11\0\x10\xc0\0\x02\x01\xc0\0\x02\x02\x03\xe8\0\x50\xe0\0\x01x"),
                    "v2",
                    Some(&four),
                ),
                (v2(b"\x20\0\0\0"), "v2", None),
                (local, "v2", None),
            ];
            for (at, (header, version, wanted)) in cases.iter().enumerate() {
                let name = format!("proxy_proto.versions.{version}.found");
                let before = subject.stat(&name);
                let mut client = subject.client();
                client.send([header.as_slice(), b"GET /seen HTTP/1.1\r\nHost: test\r\n\r\n"].concat());
                let response = client.receive();
                let what = format!("{at} at {}", subject.name());
                assert_eq!(response.status(), 200, "{what}");
                let remote = wanted.map_or("127.0.0.1", |(remote, _)| remote);
                let seen = format!("x-seen-from: {remote}\n");
                assert!(response.text().contains(&seen), "{what}: {}", response.text());
                // The next request of the connection is the same client's.
                assert!(client.get("/again").text().contains(&seen), "{what}");
                let lines = logged(subject, 2 * at + 2);
                match wanted {
                    Some((_, line)) => assert_eq!(lines[2 * at..], [line.as_str(); 2], "{what}"),
                    None => assert!(
                        lines[2 * at].starts_with("127.0.0.1:") && lines[2 * at].contains(" 127.0.0.1:"),
                        "{what}"
                    ),
                }
                subject.await_stat(&name, before + 1);
            }
        },
    );
}

#[test]
fn a_header_that_comes_octet_by_octet_is_the_same() {
    at_both(
        |endpoint, folder| simple(endpoint, folder, "", ""),
        |subject, _| {
            for header in [b"PROXY TCP4 192.0.2.1 192.0.2.2 1000 80\r\n".to_vec(), v2(V4)] {
                let mut client = subject.client();
                for octet in header {
                    client.send([octet]);
                    std::thread::sleep(Duration::from_millis(1));
                }
                let response = client.get("/");
                assert!(response.text().contains("x-seen-from: 192.0.2.1\n"));
            }
        },
    );
}

#[test]
fn what_is_malformed_or_missing_ends_the_connection() {
    at_both(
        |endpoint, folder| simple(endpoint, folder, "", ""),
        |subject, endpoint| {
            let error = |version| format!("proxy_proto.versions.{version}.error");
            let missing = || "proxy_proto.not_found_disallowed".to_owned();
            let mut cases = vec![
                (
                    b"GET /longer-than-a-header HTTP/1.1\r\nHost: test\r\n\r\n".to_vec(),
                    missing(),
                ),
                (b"proxy TCP4 192.0.2.1 192.0.2.2 1000 80\r\n".to_vec(), missing()),
            ];
            for line in [
                "TCP4 192.0.2.1 192.0.2.2 1000",
                "TCP4 192.0.2.1 192.0.2.2 1000 80 81",
                "TCP4 192.0.2.1 192.0.2.2 1000 65536",
                "TCP4 192.0.2.1 ::1 1000 80",
                "TCP6 192.0.2.1 ::1 1000 80",
                "UDP4 192.0.2.1 192.0.2.2 1000 80",
                "TCP4 224.0.0.1 192.0.2.2 1000 80",
                "TCP4 192.0.2.1 0.0.0.0 1000 80",
                "TCP4 255.255.255.255 192.0.2.2 1000 80",
                "TCP6 ff02::1 ::1 1000 80",
                "TCP6 :: ::1 1000 80",
                &format!("UNKNOWN {}", "x".repeat(100)),
            ] {
                cases.push((format!("PROXY {line}\r\n").into_bytes(), error("v1")));
            }
            for rest in [
                &b"\x31\x11\0\x0c\xc0\0\x02\x01\xc0\0\x02\x02\x03\xe8\0\x50"[..],
                b"\x22\x11\0\x0c\xc0\0\x02\x01\xc0\0\x02\x02\x03\xe8\0\x50",
                b"\x21\0\0\0",
                b"\x21\x31\0\0",
                b"\x21\x11\0\x08\xc0\0\x02\x01\xc0\0\x02\x02",
                b"\x21\x21\0\x0c\xc0\0\x02\x01\xc0\0\x02\x02\x03\xe8\0\x50",
                b"\x21\x11\0\x0c\0\0\0\0\xc0\0\x02\x02\x03\xe8\0\x50",
                b"\x21\x11\0\x0d\xc0\0\x02\x01\xc0\0\x02\x02\x03\xe8\0\x50\xe0",
                b"\x21\x11\0\x0f\xc0\0\x02\x01\xc0\0\x02\x02\x03\xe8\0\x50\xe0\0\x01",
            ] {
                cases.push((v2(rest), error("v2")));
            }
            for (header, name) in cases {
                let before = subject.stat(&name);
                let mut client = subject.client();
                client.send(&header);
                assert!(client.is_closed(), "{header:?} at {}", subject.name());
                subject.await_stat(&name, before + 1);
            }
            assert_eq!(endpoint.requests(), 0);
        },
    );
}

#[test]
fn a_header_may_be_missing_where_the_listener_says_so() {
    at_both(
        |endpoint, folder| {
            let filter = "allow_requests_without_proxy_protocol: true, stat_prefix: edge";
            simple(endpoint, folder, filter, "")
        },
        |subject, _| {
            let mut plain = subject.client();
            assert!(plain.get("/").text().contains("x-seen-from: 127.0.0.1\n"));
            subject.await_stat("proxy_proto.edge.not_found_allowed", 1);
            let mut named = subject.client();
            named.send(v2(V4));
            assert!(named.get("/").text().contains("x-seen-from: 192.0.2.1\n"));
            subject.await_stat("proxy_proto.edge.versions.v2.found", 1);
            // What begins as a header has to be one.
            let mut broken = subject.client();
            broken.send("PROXY TCP4 192.0.2.1\r\n");
            assert!(broken.is_closed());
            subject.await_stat("proxy_proto.edge.versions.v1.error", 1);
        },
    );
}

#[test]
fn a_version_may_be_refused() {
    for (refused, good) in [
        ("V1", v2(V4)),
        ("V2", b"PROXY TCP4 192.0.2.1 192.0.2.2 1000 80\r\n".to_vec()),
    ] {
        at_both(
            |endpoint, folder| simple(endpoint, folder, &format!("disallowed_versions: [{refused}]"), ""),
            |subject, _| {
                let mut client = subject.client();
                client.send(&good);
                assert_eq!(client.get("/").status(), 200);
                let bad = if refused == "V1" {
                    b"PROXY TCP4 192.0.2.1 192.0.2.2 1000 80\r\n".to_vec()
                } else {
                    v2(V4)
                };
                let mut client = subject.client();
                client.send(bad);
                assert!(client.is_closed());
                let name = format!("proxy_proto.versions.{}.disallowed", refused.to_lowercase());
                subject.await_stat(&name, 1);
            },
        );
    }
}

#[test]
fn a_header_that_does_not_come_is_not_waited_for() {
    at_both(
        |endpoint, folder| {
            let chains = format!("[{}]", http(folder, "", "", "", TO_APP));
            let clusters = format!("[{}]", cluster("app", &[endpoint.address], ""));
            bootstrap("", "listener_filters_timeout: 0.3s", &chains, &clusters)
        },
        |subject, _| {
            let begun = Instant::now();
            let mut client = subject.client();
            client.send("PROXY TCP4 192.0");
            assert!(client.is_closed());
            assert!(begun.elapsed() >= subject.shortest(Duration::from_millis(300)));
            subject.await_stat("listener.web.downstream_pre_cx_timeout", 1);
        },
    );
}

#[test]
fn chains_are_chosen_by_the_addresses_of_the_header_and_by_what_comes_behind_it() {
    at_both(
        |_, folder| {
            let says =
                |text: &str| format!("direct_response: {{status: 200, body: {{inline_string: {text}}}}}");
            let chain = |name: &str, matched: &str| {
                http(
                    folder,
                    &format!("name: {name}, filter_chain_match: {{{matched}}},"),
                    "",
                    "",
                    &says(name),
                )
            };
            let chains = [
                chain("port", "destination_port: 81"),
                chain(
                    "source",
                    "source_prefix_ranges: [{address_prefix: 192.0.2.0, prefix_len: 24}], application_protocols: [http/1.1]",
                ),
                chain(
                    "direct",
                    "source_prefix_ranges: [{address_prefix: 127.0.0.0, prefix_len: 8}], application_protocols: [http/1.1]",
                ),
                chain(
                    "ten",
                    "source_prefix_ranges: [{address_prefix: 127.0.0.0, prefix_len: 8}], application_protocols: [http/1.0]",
                ),
            ];
            bootstrap("", "", &format!("[{}]", chains.join(", ")), "[]")
        },
        |subject, _| {
            for (header, version, wanted) in [
                ("TCP4 203.0.113.1 192.0.2.2 1 81", "1.1", "port"),
                ("TCP4 192.0.2.9 192.0.2.2 1 80", "1.1", "source"),
                ("UNKNOWN", "1.1", "direct"),
            ] {
                let mut client = subject.client();
                client.send(format!(
                    "PROXY {header}\r\nGET / HTTP/{version}\r\nHost: test\r\n\r\n"
                ));
                assert_eq!(client.receive().text(), wanted, "{}", subject.name());
            }
            let mut client = subject.client();
            client.send("PROXY TCP4 203.0.113.1 192.0.2.2 1 80\r\nGET / HTTP/1.1\r\nHost: test\r\n\r\n");
            assert!(client.is_closed());
            subject.await_stat("listener.web.no_filter_chain_match", 1);
        },
    );
}

#[test]
fn access_rules_tell_the_socket_from_the_header() {
    at_both(
        |endpoint, folder| {
            let policy = |path: &str, who: &str| {
                format!(
                    "{path}: {{permissions: [{{url_path: {{path: {{exact: /{path}}}}}}}], principals: [{who}]}}"
                )
            };
            let net =
                |field: &str, ip: &str| format!("{{{field}: {{address_prefix: {ip}, prefix_len: 32}}}}");
            let policies = [
                policy("direct-socket", &net("direct_remote_ip", "127.0.0.1")),
                policy("direct-header", &net("direct_remote_ip", "192.0.2.1")),
                policy("remote-socket", &net("remote_ip", "127.0.0.1")),
                policy("remote-header", &net("remote_ip", "192.0.2.1")),
                policy("source-socket", &net("source_ip", "127.0.0.1")),
                policy("source-header", &net("source_ip", "192.0.2.1")),
            ];
            let filter = format!(
                "{{name: rbac, typed_config: {{'@type': type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC, rules: {{policies: {{{}}}}}}}}},",
                policies.join(", ")
            );
            let chains = format!("[{}]", http(folder, "", "", &filter, TO_APP));
            bootstrap(
                "",
                "",
                &chains,
                &format!("[{}]", cluster("app", &[endpoint.address], "")),
            )
        },
        |subject, _| {
            let mut client = subject.client();
            client.send(v2(V4));
            let status = |client: &mut Client, path: &str| client.get(path).status();
            for (path, wanted) in [
                ("/direct-socket", 200),
                ("/direct-header", 403),
                ("/remote-socket", 403),
                ("/remote-header", 200),
                ("/source-socket", 403),
                ("/source-header", 200),
            ] {
                assert_eq!(status(&mut client, path), wanted, "{path} at {}", subject.name());
            }
        },
    );
}

/// An endpoint that expects a header on each connection and keeps what it was told.
struct Told {
    address: SocketAddr,
    headers: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Told {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let headers = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&headers);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let kept = Arc::clone(&kept);
                // A broken connection ends the thread; the test sees it from the other side.
                std::thread::spawn(move || serve(stream?, &kept));
            }
        });
        Self { address, headers }
    }

    fn headers(&self) -> Vec<Vec<u8>> {
        self.headers.lock().unwrap().clone()
    }
}

fn serve(mut stream: TcpStream, kept: &Mutex<Vec<Vec<u8>>>) -> std::io::Result<()> {
    let mut header = Vec::new();
    while !matches!(read(&header), Begin::Header(_)) {
        let mut octet = [0];
        stream.read_exact(&mut octet)?;
        header.push(octet[0]);
    }
    let number = {
        let mut kept = kept.lock().unwrap();
        kept.push(header);
        kept.len()
    };
    let mut reader = BufReader::new(stream.try_clone()?);
    while read_message(&mut reader, false, false)?.is_some() {
        write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n{number}")?;
    }
    Ok(())
}

const RAW: &str = "{name: envoy.transport_sockets.raw_buffer, typed_config: {'@type': type.googleapis.com/envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer}}";

/// A cluster whose connections begin with a header; `config` of it, `more` beside.
fn telling(endpoint: SocketAddr, config: &str, more: &str) -> String {
    telling_over(RAW, endpoint, config, more)
}

/// The same over this transport socket.
fn telling_over(socket: &str, endpoint: SocketAddr, config: &str, more: &str) -> String {
    let socket = format!(
        ", transport_socket: {{name: envoy.transport_sockets.upstream_proxy_protocol, typed_config: {{'@type': \
         type.googleapis.com/envoy.extensions.transport_sockets.proxy_protocol.v3.ProxyProtocolUpstreamTransport, \
         config: {{{config}}}, transport_socket: {socket}}}}}{more}"
    );
    format!("[{}]", cluster("app", &[endpoint], &socket))
}

#[test]
fn endpoints_are_told_of_clients_and_no_two_clients_share_a_connection() {
    for version in ["V1", "V2"] {
        let told = Told::start();
        at_both(
            |_, folder| {
                told.headers.lock().unwrap().clear();
                let chains = format!("[{}]", http(folder, "", "", "", TO_APP));
                let filter = "allow_requests_without_proxy_protocol: true";
                bootstrap(
                    filter,
                    "",
                    &chains,
                    &telling(told.address, &format!("version: {version}"), ""),
                )
            },
            |subject, _| {
                let ends = |source: &str, destination: &str| Ends {
                    source: source.parse().unwrap(),
                    destination: destination.parse().unwrap(),
                };
                let wire = |ends: Ends| {
                    if version == "V1" {
                        ends.line()
                    } else {
                        ends.binary(&[])
                    }
                };
                let mut first = subject.client();
                first.send("PROXY TCP4 192.0.2.1 192.0.2.2 1000 80\r\n");
                let mut second = subject.client();
                second.send("PROXY TCP6 2001:db8::1 2001:db8::2 1000 80\r\n");
                let mut third = subject.client();
                let own = third.reader.get_ref().local_addr().unwrap();
                // Which connection serves whom.
                let answers = [
                    first.get("/").text(),
                    second.get("/").text(),
                    third.get("/").text(),
                    first.get("/").text(),
                    second.get("/").text(),
                    third.get("/").text(),
                ];
                assert_eq!(answers, ["1", "2", "3", "1", "2", "3"], "{}", subject.name());
                // Another connection of the same client, as the header has it, may have the pooled one.
                let mut again = subject.client();
                again.send("PROXY TCP4 192.0.2.1 192.0.2.2 1000 80\r\n");
                assert_eq!(again.get("/").text(), "1");
                let wanted = [
                    wire(ends("192.0.2.1:1000", "192.0.2.2:80")),
                    wire(ends("[2001:db8::1]:1000", "[2001:db8::2]:80")),
                    wire(Ends {
                        source: own,
                        destination: subject.web(),
                    }),
                ];
                assert_eq!(told.headers(), wanted, "{}", subject.name());
            },
        );
    }
}

#[test]
fn tlvs_are_passed_on_and_added() {
    let told = Told::start();
    at_both(
        |_, folder| {
            told.headers.lock().unwrap().clear();
            let chains = format!("[{}]", http(folder, "", "", "", TO_APP));
            let filter = "pass_through_tlvs: {match_type: INCLUDE, tlv_type: [0xe0, 0xe1, 0xe5]}";
            let config = "version: V2, pass_through_tlvs: {match_type: INCLUDE, tlv_type: [0xe0, 0xe2, 0xe5]}, added_tlvs: [{type: 0xe5, value: YWRk}]";
            bootstrap(filter, "", &chains, &telling(told.address, config, ""))
        },
        |subject, _| {
            let mut client = subject.client();
            let tlvs = b"\xe2\0\x01b\xe0\0\x02cd\xe1\0\x01e\xe5\0\x01f\xe0\0\0";
            client.send(v2(&[
                b"\x21\x11\0\x20\xc0\0\x02\x01\xc0\0\x02\x02\x03\xe8\0\x50",
                &tlvs[..],
            ]
            .concat()));
            assert_eq!(client.get("/").text(), "1");
            let wanted =
                b"\x21\x11\0\x1a\xc0\0\x02\x01\xc0\0\x02\x02\x03\xe8\0\x50\xe5\0\x03add\xe0\0\x02cd\xe0\0\0";
            assert_eq!(told.headers(), [v2(wanted)], "{}", subject.name());
        },
    );
}

#[test]
fn a_server_that_speaks_first_is_told_at_once() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    at_both(
        |_, _| {
            let chain = "[{filters: [{name: t, typed_config: {'@type': type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy, stat_prefix: t, cluster: app}}]}]";
            let all = bootstrap("", "", chain, &telling(address, "version: V2", ""));
            // Nothing may wait for octets that do not come.
            all.lines()
                .filter(|l| !l.contains("inspector"))
                .collect::<Vec<_>>()
                .join("\n")
        },
        |subject, _| {
            let mut client = subject.client();
            client.send(v2(V4));
            let (mut server, _) = listener.accept().unwrap();
            server.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            let mut header = [0; 28];
            server.read_exact(&mut header).unwrap();
            assert_eq!(header.as_slice(), v2(V4));
            server.write_all(b"220 hello").unwrap();
            let mut hello = [0; 9];
            client.reader.read_exact(&mut hello).unwrap();
            assert_eq!(&hello, b"220 hello");
        },
    );
}

#[test]
fn health_checks_are_the_proxys_own_connections() {
    for version in ["V1", "V2"] {
        let told = Told::start();
        at_both(
            |_, folder| {
                told.headers.lock().unwrap().clear();
                let chains = format!("[{}]", http(folder, "", "", "", TO_APP));
                let more = ", health_checks: [{interval: 60s, timeout: 5s, unhealthy_threshold: 1, healthy_threshold: 1, http_health_check: {path: /health}}]";
                bootstrap(
                    "",
                    "",
                    &chains,
                    &telling(told.address, &format!("version: {version}"), more),
                )
            },
            |subject, _| {
                subject.await_stat("cluster.app.health_check.success", 1);
                let headers = told.headers();
                let Begin::Header(header) = read(&headers[0]) else {
                    panic!("{headers:?}");
                };
                if version == "V2" {
                    assert_eq!(headers[0], v2(b"\x20\0\0\0"), "{}", subject.name());
                } else {
                    assert_eq!(
                        header.ends.unwrap().destination,
                        told.address,
                        "{}",
                        subject.name()
                    );
                }
            },
        );
    }
}

#[test]
fn the_header_stands_before_tls() {
    let authority = Authority::new();
    let (chain, key) = authority.leaf_named("spiffe://td/ns/shop/sa/front", Some("front.example"));
    let tls = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3";
    let pem = |text: &str| format!("{{inline_string: {}}}", serde_json::Value::from(text));
    let (chain, key, root) = (pem(&chain), pem(&key), pem(&authority.root));
    let folder = tempfile::tempdir().unwrap();
    let server = format!(
        "transport_socket: {{name: tls, typed_config: {{'@type': {tls}.DownstreamTlsContext, common_tls_context: {{tls_certificates: [{{certificate_chain: {chain}, private_key: {key}}}]}}}}}},"
    );
    let says = "direct_response: {status: 200, body: {inline_string: told}}";
    let chains = format!(
        "[{}]",
        http(&folder.path().to_string_lossy(), &server, "", "", says)
    );
    let behind = Running::start_in(folder, &bootstrap("", "", &chains, "[]"), 1);
    at_both(
        |_, folder| {
            let client = format!(
                "{{name: tls, typed_config: {{'@type': {tls}.UpstreamTlsContext, sni: front.example, common_tls_context: {{validation_context: {{trusted_ca: {root}}}}}}}}}"
            );
            let clusters = telling_over(&client, behind.web(), "version: V2", "");
            bootstrap(
                "",
                "",
                &format!("[{}]", http(folder, "", "", "", TO_APP)),
                &clusters,
            )
        },
        |subject, _| {
            let before = behind.stat("proxy_proto.versions.v2.found");
            let mut client = subject.client();
            client.send(v2(V4));
            assert_eq!(client.get("/").text(), "told", "{}", subject.name());
            assert_eq!(behind.stat("proxy_proto.versions.v2.found"), before + 1);
            let log = behind.folder.path().join("log");
            let wanted = "192.0.2.1:1000 127.0.0.1 192.0.2.2:80 127.0.0.1 1000";
            await_true("a line", || {
                let text = std::fs::read_to_string(&log).unwrap_or_default();
                text.lines().filter(|l| *l == wanted).count() as u64 == before + 1
            });
        },
    );
}
