//! Mesh TLS between two proxies: who is let in, who is believed, what happens while a key is missing.
//!
//! ```text
//! client ─► out (shows the certificate its chain names) ─mTLS─► in (STRICT or PERMISSIVE) ─► endpoint
//! ```

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use dpumesh_proxy::tls::secrets::Held;
use dpumesh_proxy::tls::{Certified, Roots};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, SanType};

use crate::harness::{Client, Endpoint, Running, pattern};

/// A small authority of a trust domain.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pub(crate) root: String,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        // Not the leaves' name: an issuer that is the subject passes for self-signed (BoringSSL).
        params.distinguished_name.push(DnType::CommonName, "root");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // A certificate whose issuer is its subject is self-signed to some.
        params.distinguished_name.push(DnType::CommonName, "root");
        let root = params.self_signed(&key).unwrap().pem();
        let issuer = Issuer::new(params, key);
        Self { issuer, root }
    }

    /// PEM of a certificate for a SPIFFE id, and of its key.
    pub(crate) fn leaf(&self, id: &str) -> (String, String) {
        self.leaf_named(id, None)
    }

    /// The same, with a host name besides.
    pub(crate) fn leaf_named(&self, id: &str, host: Option<&str>) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(id.try_into().unwrap())];
        let host = host.map(|host| SanType::DnsName(host.try_into().unwrap()));
        params.subject_alt_names.extend(host);
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        (certificate.pem(), key.serialize_pem())
    }

    /// PEM of a certificate made of `params`, and of its key.
    pub(crate) fn signed(&self, params: CertificateParams) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        (
            params.signed_by(&key, &self.issuer).unwrap().pem(),
            key.serialize_pem(),
        )
    }

    pub(crate) fn certified(&self, id: &str) -> Certified {
        let (chain, key) = self.leaf(id);
        Certified::from_pem(chain.as_bytes(), key.as_bytes()).unwrap()
    }

    /// A store with the roots and these identities.
    pub(crate) fn store(&self, ids: &[&str]) -> Arc<Held> {
        let held = Held::default();
        held.put_roots("ROOTCA@td", Roots::from_pem(self.root.as_bytes()).unwrap());
        for id in ids {
            held.put(id, self.certified(id));
        }
        Arc::new(held)
    }
}

pub(crate) const FRONT: &str = "spiffe://td/ns/shop/sa/front";
pub(crate) const REVIEWS: &str = "spiffe://td/ns/shop/sa/reviews";
const STRANGER: &str = "spiffe://other/ns/shop/sa/front";

const SDS: &str = "{api_config_source: {api_type: GRPC, transport_api_version: V3, grpc_services: [{envoy_grpc: {cluster_name: sds-grpc}}]}, resource_api_version: V3}";

fn validation(rule: &str) -> String {
    format!(
        "combined_validation_context: {{default_validation_context: {{match_typed_subject_alt_names: [{{san_type: URI, matcher: {rule}}}]}}, \
         validation_context_sds_secret_config: {{name: ROOTCA@td, sds_config: {SDS}}}}}"
    )
}

fn downstream() -> String {
    format!(
        "{{name: envoy.transport_sockets.tls, typed_config: {{'@type': type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext, \
         require_client_certificate: true, common_tls_context: {{tls_certificate_sds_secret_configs: [{{name: '{REVIEWS}', sds_config: {SDS}}}], \
         alpn_protocols: [h2, http/1.1], tls_params: {{tls_minimum_protocol_version: TLSv1_2, cipher_suites: [ECDHE-ECDSA-AES256-GCM-SHA384, AES256-GCM-SHA384]}}, {}}}}}}}",
        validation("{prefix: 'spiffe://td/'}")
    )
}

fn upstream(expected: &str) -> String {
    let mapper = "{'@type': type.googleapis.com/envoy.extensions.transport_sockets.tls.cert_mappers.filter_state_override.v3.Config, default_value: nobody}";
    let selector = format!(
        "{{'@type': type.googleapis.com/envoy.extensions.transport_sockets.tls.cert_selectors.on_demand_secret.v3.Config, \
         config_source: {SDS}, certificate_mapper: {{name: m, typed_config: {mapper}}}}}"
    );
    format!(
        "{{name: envoy.transport_sockets.tls, typed_config: {{'@type': type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext, \
         sni: outbound_.80_._.reviews.shop.svc.cluster.local, common_tls_context: {{custom_tls_certificate_selector: {{name: s, typed_config: {selector}}}, \
         alpn_protocols: [istio], {}}}}}}}",
        validation(&format!("{{exact: '{expected}'}}"))
    )
}

pub(crate) fn http(cluster: &str) -> String {
    format!(
        "{{name: hcm, typed_config: {{'@type': type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager, \
         stat_prefix: web, route_config: {{virtual_hosts: [{{name: all, domains: ['*'], routes: [{{match: {{prefix: /}}, route: {{cluster: {cluster}}}}}]}}]}}, \
         http_filters: [{{name: r, typed_config: {{'@type': type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}}}]}}}}"
    )
}

pub(crate) fn tcp(cluster: &str) -> String {
    format!(
        "{{name: tcp, typed_config: {{'@type': type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy, stat_prefix: t, cluster: {cluster}}}}}"
    )
}

fn endpoints(name: &str, address: SocketAddr, metadata: &str) -> String {
    format!(
        "load_assignment: {{cluster_name: {name}, endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: \
         {{address: '{}', port_value: {}}}}}}}{metadata}}}]}}]}}",
        address.ip(),
        address.port()
    )
}

fn action(chain: &str) -> String {
    format!(
        "{{action: {{name: {chain}, typed_config: {{'@type': type.googleapis.com/google.protobuf.StringValue, value: {chain}}}}}}}"
    )
}

/// The inbound proxy: TLS to one chain, the rest to another.
pub(crate) fn inbound(endpoint: SocketAddr, filter: &str, plain: &str) -> String {
    let input = "{name: i, typed_config: {'@type': type.googleapis.com/envoy.extensions.matching.common_inputs.network.v3.TransportProtocolInput}}";
    format!(
        r#"
admin: {{address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}}}
static_resources:
  listeners:
  - name: web
    stat_prefix: in
    address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}
    listener_filters_timeout: 0s
    listener_filters:
    - {{name: envoy.filters.listener.tls_inspector, typed_config: {{'@type': type.googleapis.com/envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector}}}}
    filter_chain_matcher: {{matcher_tree: {{input: {input}, exact_match_map: {{map: {{tls: {tls}}}}}}}, on_no_match: {other}}}
    filter_chains:
    - {{name: deny, filters: [{deny}]}}
    - {{name: plain, filters: [{filter}]}}
    - {{name: mesh, transport_socket: {socket}, filters: [{filter}]}}
  clusters:
  - {{name: nowhere, type: STATIC, connect_timeout: 1s}}
  - {{name: app, type: STATIC, connect_timeout: 1s, {app}}}
"#,
        tls = action("mesh"),
        other = action(plain),
        deny = tcp("nowhere"),
        socket = downstream(),
        app = endpoints("app", endpoint, ""),
    )
}

/// The outbound proxy: one listener for each identity, named `web` and `web2`.
pub(crate) fn outbound(peer: SocketAddr, expected: &str, filter: &str, identities: &[&str]) -> String {
    let mut listeners = String::new();
    for (index, identity) in identities.iter().enumerate() {
        let name = if index == 0 { "web" } else { "web2" };
        let state = format!(
            "{{name: s, typed_config: {{'@type': type.googleapis.com/envoy.extensions.filters.network.set_filter_state.v3.Config, on_new_connection: \
             [{{object_key: envoy.tls.certificate_mappers.on_demand_secret, factory_key: envoy.hashable_string, \
             format_string: {{text_format_source: {{inline_string: '{identity}'}}}}, shared_with_upstream: ONCE}}]}}}}"
        );
        listeners.push_str(&format!(
            "  - {{name: {name}, address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}, \
             filter_chains: [{{filters: [{state}, {filter}]}}]}}\n"
        ));
    }
    let metadata = ", metadata: {filter_metadata: {envoy.transport_socket_match: {tlsMode: istio}}}";
    format!(
        r#"
admin: {{address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}}}
static_resources:
  listeners:
{listeners}
  clusters:
  - name: mesh
    type: STATIC
    connect_timeout: 5s
    transport_socket_matches:
    - {{name: tlsMode-istio, match: {{tlsMode: istio}}, transport_socket: {socket}}}
    - {{name: tlsMode-disabled, match: {{}}, transport_socket: {{name: envoy.transport_sockets.raw_buffer, typed_config: {{'@type': type.googleapis.com/envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer}}}}}}
    {assignment}
"#,
        socket = upstream(expected),
        assignment = endpoints("mesh", peer, metadata),
    )
}

struct Pair {
    inbound: Running,
    outbound: Running,
    keys: Arc<Held>,
}

impl Pair {
    fn start(
        authority: &Authority,
        endpoint: SocketAddr,
        filter: fn(&str) -> String,
        expected: &str,
    ) -> Self {
        let inbound = inbound(endpoint, &filter("app"), "deny");
        let inbound = Running::start_with_secrets(&inbound, authority.store(&[REVIEWS]));
        let keys = authority.store(&[FRONT, STRANGER]);
        let text = outbound(inbound.web(), expected, &filter("mesh"), &[FRONT, STRANGER]);
        let outbound = Running::start_with_secrets(&text, Arc::clone(&keys) as _);
        Self {
            inbound,
            outbound,
            keys,
        }
    }
}

#[test]
fn requests_travel_under_mutual_tls_and_connections_are_kept() {
    let endpoint = Endpoint::start("app");
    let pair = Pair::start(&Authority::new(), endpoint.address, http, REVIEWS);
    let mut client = pair.outbound.client();
    for _ in 0..3 {
        assert_eq!(client.get("/").status(), 200);
    }
    let body = pattern(300_000);
    client.send(format!(
        "POST /echo HTTP/1.1\r\nHost: test\r\nContent-Length: {}\r\n\r\n",
        body.len()
    ));
    client.send(&body);
    assert!(client.receive().body == body);
    pair.inbound.await_stat("listener.in.ssl.handshake", 1);
    assert_eq!(pair.inbound.stat("listener.in.ssl.handshake"), 1);
    assert_eq!(pair.outbound.stat("cluster.mesh.ssl.handshake"), 1);
    assert_eq!(endpoint.requests(), 4);
}

#[test]
fn an_idle_connection_of_the_mesh_is_closed_when_the_proxy_drains() {
    let endpoint = Endpoint::start("app");
    let pair = Pair::start(&Authority::new(), endpoint.address, http, REVIEWS);
    assert_eq!(pair.outbound.client().get("/").status(), 200);
    let begun = std::time::Instant::now();
    pair.inbound.proxy.drain();
    pair.inbound.proxy.wait();
    // A quarter of the drain time for what is idle, all of it for what is not.
    assert!(
        begun.elapsed() < Duration::from_millis(3500),
        "{:?}",
        begun.elapsed()
    );
}

#[test]
fn a_server_with_another_name_gets_no_request() {
    let endpoint = Endpoint::start("app");
    let pair = Pair::start(
        &Authority::new(),
        endpoint.address,
        http,
        "spiffe://td/ns/shop/sa/ratings",
    );
    assert_eq!(pair.outbound.client().get("/").status(), 503);
    assert_eq!(pair.outbound.stat("cluster.mesh.ssl.fail_verify_san"), 1);
    assert_eq!(endpoint.requests(), 0);
}

#[test]
fn a_server_of_another_authority_gets_no_request() {
    let endpoint = Endpoint::start("app");
    let (ours, theirs) = (Authority::new(), Authority::new());
    let inbound = inbound(endpoint.address, &http("app"), "deny");
    let inbound = Running::start_with_secrets(&inbound, theirs.store(&[REVIEWS]));
    let text = outbound(inbound.web(), REVIEWS, &http("mesh"), &[FRONT]);
    let outbound = Running::start_with_secrets(&text, ours.store(&[FRONT]));
    assert_eq!(outbound.client().get("/").status(), 503);
    assert_eq!(outbound.stat("cluster.mesh.ssl.fail_verify_error"), 1);
    assert_eq!(endpoint.requests(), 0);
}

#[test]
fn a_client_of_another_trust_domain_is_refused_and_no_connection_is_shared() {
    let endpoint = Endpoint::start("app");
    let pair = Pair::start(&Authority::new(), endpoint.address, http, REVIEWS);
    assert_eq!(pair.outbound.client().get("/").status(), 200);
    let stranger = pair.outbound.proxy.listener_address("web2").unwrap();
    // With TLS 1.3 a client hears of its refusal only when it reads.
    assert_eq!(Client::connect(stranger).get("/").status(), 503);
    pair.inbound.await_stat("listener.in.ssl.fail_verify_san", 1);
    assert_eq!(endpoint.requests(), 1);
    assert_eq!(pair.outbound.client().get("/").status(), 200);
    assert_eq!(pair.inbound.stat("listener.in.ssl.handshake"), 1);
}

#[test]
fn plain_text_meets_a_reset_under_strict_and_an_answer_under_permissive() {
    let endpoint = Endpoint::start("app");
    let authority = Authority::new();
    for (plain, answered) in [("deny", false), ("plain", true)] {
        let text = inbound(endpoint.address, &http("app"), plain);
        let strict = Running::start_with_secrets(&text, authority.store(&[REVIEWS]));
        let mut client = strict.client();
        client.send("GET / HTTP/1.1\r\nHost: test\r\n\r\n");
        if answered {
            assert_eq!(client.receive().status(), 200);
        } else {
            let error = client.try_receive().expect_err("a reset");
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        }
        let text = outbound(strict.web(), REVIEWS, &http("mesh"), &[FRONT]);
        let outbound = Running::start_with_secrets(&text, authority.store(&[FRONT]));
        assert_eq!(outbound.client().get("/").status(), 200, "{plain}");
    }
}

#[test]
fn a_client_without_certificate_is_refused() {
    let endpoint = Endpoint::start("app");
    let authority = Authority::new();
    let text = inbound(endpoint.address, &http("app"), "deny");
    let strict = Running::start_with_secrets(&text, authority.store(&[REVIEWS]));
    let mut roots = rustls::RootCertStore::empty();
    roots.add_parsable_certificates(Roots::from_pem(authority.root.as_bytes()).unwrap().certificates);
    let verifier = Arc::new(Anyone);
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    let name = rustls::pki_types::ServerName::try_from("reviews").unwrap();
    let mut session = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
    let mut socket = TcpStream::connect(strict.web()).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut stream = rustls::Stream::new(&mut session, &mut socket);
    let asked = stream.write_all(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n");
    let answered = asked.and_then(|()| stream.read(&mut [0; 1]));
    assert!(answered.is_err(), "{answered:?}");
    strict.await_stat("listener.in.ssl.fail_verify_no_cert", 1);
    assert_eq!(endpoint.requests(), 0);
}

/// Believes any server: the test is about the client.
#[derive(Debug)]
struct Anyone;

impl rustls::client::danger::ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &[rustls::pki_types::CertificateDer<'_>],
        _: &rustls::pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &rustls::pki_types::CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        self.verify_tls12_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        vec![
            rustls::SignatureScheme::ECDSA_NISTP256_SHA256,
            rustls::SignatureScheme::ECDSA_NISTP384_SHA384,
        ]
    }
}

#[test]
fn a_missing_key_closes_and_heals_when_it_comes() {
    let endpoint = Endpoint::start("app");
    let authority = Authority::new();
    let pair = Pair::start(&authority, endpoint.address, http, REVIEWS);
    pair.keys.remove(FRONT);
    assert_eq!(pair.outbound.client().get("/").status(), 503);
    assert_eq!(pair.outbound.stat("cluster.mesh.ssl.context_not_ready"), 1);
    assert_eq!(endpoint.requests(), 0);
    let shown = pair.outbound.admin("GET", "/config_dump").text();
    assert!(!shown.contains("PRIVATE KEY") && shown.contains("SecretsConfigDump"));
    pair.keys.put(FRONT, authority.certified(FRONT));
    assert_eq!(pair.outbound.client().get("/").status(), 200);
    let dump: serde_json::Value = serde_json::from_str(
        &pair
            .outbound
            .admin("GET", "/config_dump?resource=dynamic_active_secrets")
            .text(),
    )
    .unwrap();
    let names: Vec<&str> = dump["configs"]
        .as_array()
        .unwrap()
        .iter()
        .map(|s| s["name"].as_str().unwrap())
        .collect();
    assert!(
        names.contains(&FRONT) && names.contains(&"ROOTCA@td"),
        "{names:?}"
    );
    assert_eq!(
        dump["configs"][0]["secret"]["tls_certificate"]["private_key"]["inline_bytes"],
        "W3JlZGFjdGVkXQ=="
    );
    // A renewed certificate serves the next connection.
    pair.keys.put(FRONT, authority.certified(FRONT));
    assert_eq!(pair.outbound.client().get("/").status(), 200);
}

#[test]
fn octets_and_ends_pass_through_tls_both_ways() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let pair = Pair::start(&Authority::new(), listener.local_addr().unwrap(), tcp, REVIEWS);
    let mut client = TcpStream::connect(pair.outbound.web()).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    let sent = pattern(3 << 20);
    let expected = sent.clone();
    let answer = std::thread::spawn(move || {
        let mut heard = Vec::new();
        server.read_to_end(&mut heard).unwrap();
        assert!(heard == expected);
        server.write_all(&heard).unwrap();
    });
    client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    client.write_all(&sent).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut heard = Vec::new();
    client.read_to_end(&mut heard).unwrap();
    assert!(heard == sent);
    answer.join().unwrap();
}

#[test]
fn a_reset_passes_through_tls() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let pair = Pair::start(&Authority::new(), listener.local_addr().unwrap(), tcp, REVIEWS);
    let mut client = TcpStream::connect(pair.outbound.web()).unwrap();
    client.write_all(b"x").unwrap();
    let (mut server, _) = listener.accept().unwrap();
    server.read_exact(&mut [0]).unwrap();
    socket2::SockRef::from(&server)
        .set_linger(Some(Duration::ZERO))
        .unwrap();
    drop(server);
    client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let error = client.read(&mut [0]).expect_err("a reset, not an end");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}
