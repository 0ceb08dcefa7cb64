//! HBONE: TCP in CONNECT requests over HTTP/2 and mutual TLS. Either end is this proxy or Envoy, in all four pairs.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};

use std::time::Duration;

use crate::envoy::{Subject, at_both};
use crate::harness::cluster;
use crate::mesh::Authority;

const TLS: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3";
const HTTP2: &str = "typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {\"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: {http2_protocol_options: {}}}}";

/// A server that speaks first, and then says what it hears.
fn app() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || {
                let mut data = vec![0; 64 * 1024];
                if stream.write_all(b"hello\n").is_err() {
                    return;
                }
                while let Ok(n) = stream.read(&mut data) {
                    if n == 0 {
                        // Heard the end, and has something left to say.
                        let _ = stream.write_all(b"bye\n");
                        return;
                    }
                    if stream.write_all(&data[..n]).is_err() {
                        return;
                    }
                }
            });
        }
    });
    address
}

/// Certificates in files, as both proxies read them.
struct Identity {
    folder: tempfile::TempDir,
}

impl Identity {
    fn new(authority: &Authority, name: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (chain, key) = authority.leaf(name);
        for (file, text) in [("chain", &chain), ("key", &key), ("root", &authority.root)] {
            std::fs::write(folder.path().join(file), text).unwrap();
        }
        Self { folder }
    }

    fn socket(&self, context: &str, more: &str) -> String {
        let file = |name: &str| self.folder.path().join(name).display().to_string();
        format!(
            "transport_socket: {{name: tls, typed_config: {{\"@type\": {TLS}.{context}, {more} common_tls_context: {{alpn_protocols: [h2], \
             tls_certificates: [{{certificate_chain: {{filename: {}}}, private_key: {{filename: {}}}}}], validation_context: {{trusted_ca: {{filename: {}}}}}}}}}}}",
            file("chain"),
            file("key"),
            file("root")
        )
    }
}

fn bootstrap(listener: &str, clusters: &str) -> String {
    format!(
        "node: {{id: test, cluster: test}}\nadmin: {{address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}}}\nstatic_resources:\n  \
         listeners:\n  - name: web\n    address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}\n    filter_chains:\n    - {listener}\n  clusters: [{clusters}]\n"
    )
}

/// Takes tunnels, and connects to where they say.
fn terminates(identity: &Identity) -> String {
    let manager = "{\"@type\": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager, stat_prefix: hbone, codec_type: HTTP2, \
         http2_protocol_options: {allow_connect: true}, upgrade_configs: [{upgrade_type: CONNECT}], \
         route_config: {virtual_hosts: [{name: all, domains: [\"*\"], routes: [{match: {connect_matcher: {}}, route: {cluster: meant, upgrade_configs: [{upgrade_type: CONNECT, connect_config: {}}]}}]}]}, \
         http_filters: [{name: envoy.filters.http.router, typed_config: {\"@type\": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}]}";
    let socket = identity.socket("DownstreamTlsContext", "require_client_certificate: true,");
    let chain = format!(
        "{{filters: [{{name: envoy.filters.network.http_connection_manager, typed_config: {manager}}}], {socket}}}"
    );
    let meant = "{name: meant, type: ORIGINAL_DST, lb_policy: CLUSTER_PROVIDED, connect_timeout: 1s, original_dst_lb_config: {use_http_header: true, http_header_name: \":authority\"}}";
    bootstrap(&chain, meant)
}

/// Sends what it accepts to `to`, in tunnels to the terminator.
fn originates(identity: Option<&Identity>, to: SocketAddr, terminator: SocketAddr) -> String {
    let proxy = format!(
        "{{\"@type\": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy, stat_prefix: tunnel, cluster: hbone, \
         tunneling_config: {{hostname: \"{to}\", headers_to_add: [{{header: {{key: x-from, value: \"%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%\"}}}}]}}}}"
    );
    let chain = format!("{{filters: [{{name: envoy.filters.network.tcp_proxy, typed_config: {proxy}}}]}}");
    let socket = identity.map(|i| i.socket("UpstreamTlsContext", "sni: hbone,"));
    let more = format!(
        ", {HTTP2}{}",
        socket.map(|s| format!(", {s}")).unwrap_or_default()
    );
    bootstrap(&chain, &cluster("hbone", &[terminator], &more))
}

fn connect(subject: &Subject) -> TcpStream {
    let stream = TcpStream::connect(subject.web()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream
}

fn read(stream: &mut TcpStream, length: usize) -> Vec<u8> {
    let mut data = vec![0; length];
    stream.read_exact(&mut data).unwrap();
    data
}

#[test]
fn tcp_goes_through_tunnels() {
    let app = app();
    let authority = Authority::new();
    let (here, there) = (
        Identity::new(&authority, "spiffe://td/ns/a/sa/client"),
        Identity::new(&authority, "spiffe://td/ns/a/sa/server"),
    );
    at_both(
        |_, _: &str| terminates(&there),
        |terminator, _| {
            at_both(
                |_, _| originates(Some(&here), app, terminator.web()),
                |originator, _| {
                    let case = format!("{} to {}", originator.name(), terminator.name());
                    // Several at once, with more octets than a window has.
                    let long: Vec<u8> = (0..300_000u32).map(|i| (i % 251) as u8).collect();
                    std::thread::scope(|scope| {
                        for _ in 0..4 {
                            scope.spawn(|| {
                                let mut stream = connect(originator);
                                assert_eq!(read(&mut stream, 6), b"hello\n", "{case}");
                                let mut writer = stream.try_clone().unwrap();
                                let sent = long.clone();
                                let writing = std::thread::spawn(move || writer.write_all(&sent).unwrap());
                                assert!(read(&mut stream, long.len()) == long, "{case}");
                                writing.join().unwrap();
                            });
                        }
                    });
                    if originator.name() == "ours" && terminator.name() == "ours" {
                        // One end is not both.
                        let mut stream = connect(originator);
                        assert_eq!(read(&mut stream, 6), b"hello\n");
                        stream.shutdown(Shutdown::Write).unwrap();
                        let mut rest = String::new();
                        stream.read_to_string(&mut rest).unwrap();
                        assert_eq!(rest, "bye\n");
                    }
                    let opened = originator.stat("cluster.hbone.upstream_cx_total");
                    assert_eq!(opened, 1, "{case}: tunnels share a connection");
                },
            );
        },
    );
}

#[test]
fn who_has_no_certificate_has_no_tunnel_and_nobody_to_tunnel_to_is_an_end() {
    let app = app();
    let authority = Authority::new();
    let (here, there) = (
        Identity::new(&authority, "spiffe://td/ns/a/sa/client"),
        Identity::new(&authority, "spiffe://td/ns/a/sa/server"),
    );
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    at_both(
        |_, _: &str| terminates(&there),
        |terminator, _| {
            for (identity, to) in [(None, app), (Some(&here), nobody)] {
                at_both(
                    |_, _| originates(identity, to, terminator.web()),
                    |originator, _| {
                        let mut stream = connect(originator);
                        let mut all = Vec::new();
                        // Ended or reset, and nothing said.
                        let _ = stream.read_to_end(&mut all);
                        assert!(all.is_empty(), "{} to {}", originator.name(), terminator.name());
                    },
                );
            }
        },
    );
}
