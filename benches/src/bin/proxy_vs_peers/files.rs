//! The configuration files: one bootstrap that dpu-proxy and Envoy read alike, and the same shape for HAProxy and nginx.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::Path;

use crate::subject::{Layer, Security, Shape};
use crate::trust::{HOST, Leaf, Trust};

const TYPES: &str = "type.googleapis.com/envoy.extensions";

pub(crate) fn bootstrap(
    shape: Shape,
    addresses: &[SocketAddr],
    endpoint: SocketAddr,
    trust: &Trust,
) -> String {
    let mut text = String::from("node: {id: bench, cluster: bench}\nstatic_resources:\n  listeners:\n");
    for (pod, address) in addresses.iter().enumerate() {
        let _ = write!(
            text,
            "  - name: pod-{pod}\n    address: {{socket_address: {{address: 127.0.0.1, port_value: {}}}}}\n    filter_chains:\n    - {}filters:\n{}",
            address.port(),
            downstream(shape, trust),
            match shape.layer {
                Layer::Tcp => tcp_proxy(pod),
                Layer::Http1 | Layer::Http2 => http(pod),
            }
        );
    }
    text.push_str("  clusters:\n");
    for pod in 0..addresses.len() {
        let _ = write!(
            text,
            "  - name: app-{pod}\n    type: STATIC\n{}    load_assignment:\n      cluster_name: app-{pod}\n      \
             endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {}}}}}}}}}]}}]\n",
            upstream(shape, trust),
            endpoint.port()
        );
    }
    text
}

fn tcp_proxy(pod: usize) -> String {
    format!(
        "      - name: envoy.filters.network.tcp_proxy\n        typed_config: {{\"@type\": {TYPES}.filters.network.tcp_proxy.v3.TcpProxy, \
         stat_prefix: pod-{pod}, cluster: app-{pod}}}\n"
    )
}

/// Routes by path, and rules of which the last allows: as a pod with an AuthorizationPolicy has them.
fn http(pod: usize) -> String {
    format!(
        r#"      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": {TYPES}.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: pod-{pod}
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes:
              - match: {{prefix: /of-pod-{pod}}}
                route: {{cluster: app-{pod}}}
              - match: {{prefix: /admin}}
                direct_response: {{status: 404}}
              - match: {{prefix: /}}
                route: {{cluster: app-{pod}}}
          http_filters:
          - name: envoy.filters.http.rbac
            typed_config:
              "@type": {TYPES}.filters.http.rbac.v3.RBAC
              rules:
                policies:
                  posts: {{permissions: [{{header: {{name: ":method", string_match: {{exact: POST}}}}}}], principals: [{{any: true}}]}}
                  reads: {{permissions: [{{and_rules: {{rules: [{{header: {{name: ":method", string_match: {{exact: GET}}}}}}, {{url_path: {{path: {{prefix: /}}}}}}]}}}}], principals: [{{direct_remote_ip: {{address_prefix: 127.0.0.0, prefix_len: 8}}}}]}}
          - name: envoy.filters.http.router
            typed_config: {{"@type": {TYPES}.filters.http.router.v3.Router}}
"#
    )
}

fn certificate(leaf: &Leaf) -> String {
    format!(
        "tls_certificates: [{{certificate_chain: {{filename: {:?}}}, private_key: {{filename: {:?}}}}}]",
        leaf.chain, leaf.key
    )
}

fn downstream(shape: Shape, trust: &Trust) -> String {
    let alpn = match shape.layer {
        Layer::Tcp => "",
        Layer::Http1 => "alpn_protocols: [http/1.1], ",
        Layer::Http2 => "alpn_protocols: [h2], ",
    };
    let (required, roots) = match shape.front {
        Security::Plain => return String::new(),
        Security::Tls => ("", String::new()),
        Security::Mutual => (
            "require_client_certificate: true, ",
            format!(
                ", validation_context: {{trusted_ca: {{filename: {:?}}}}}",
                trust.root
            ),
        ),
    };
    format!(
        "transport_socket: {{name: tls, typed_config: {{\"@type\": {TYPES}.transport_sockets.tls.v3.DownstreamTlsContext, {required}\
         common_tls_context: {{{alpn}{}{roots}}}}}}}\n      ",
        certificate(&trust.server)
    )
}

fn upstream(shape: Shape, trust: &Trust) -> String {
    let shown = match shape.back {
        Security::Plain => return String::new(),
        Security::Tls => String::new(),
        Security::Mutual => certificate(&trust.client) + ", ",
    };
    format!(
        "    transport_socket: {{name: tls, typed_config: {{\"@type\": {TYPES}.transport_sockets.tls.v3.UpstreamTlsContext, sni: {HOST}, \
         common_tls_context: {{{shown}validation_context: {{trusted_ca: {{filename: {:?}}}}}}}}}}}\n",
        trust.root
    )
}

pub(crate) fn haproxy(shape: Shape, addresses: &[SocketAddr], endpoint: SocketAddr, trust: &Trust) -> String {
    let (mode, rules) = match shape.layer {
        Layer::Tcp => ("tcp", ""),
        Layer::Http1 | Layer::Http2 => (
            "http",
            "  http-request return status 404 if { path_beg /admin }\n  http-request deny unless { method POST } or { method GET } { path_beg / } { src 127.0.0.0/8 }\n",
        ),
    };
    let certificate = format!(" ssl crt {}", trust.server.both.display());
    let mut bind = match shape.front {
        Security::Plain => String::new(),
        Security::Tls => certificate,
        Security::Mutual => format!("{certificate} ca-file {} verify required", trust.root.display()),
    };
    if shape.layer == Layer::Http2 {
        bind.push_str(if shape.front == Security::Plain {
            " proto h2"
        } else {
            " alpn h2"
        });
    }
    let verified = format!(
        " ssl ca-file {} verify required sni str({HOST})",
        trust.root.display()
    );
    let server = match shape.back {
        Security::Plain => String::new(),
        Security::Tls => verified,
        Security::Mutual => format!("{verified} crt {}", trust.client.both.display()),
    };
    let reuse = if mode == "http" {
        "  http-reuse always\n"
    } else {
        ""
    };
    let mut text = format!(
        "global\n  nbthread 1\ndefaults\n  mode {mode}\n  timeout client 60s\n  timeout server 60s\n  timeout connect 5s\n{reuse}"
    );
    for (pod, address) in addresses.iter().enumerate() {
        let _ = write!(
            text,
            "frontend pod-{pod}\n  bind {address}{bind}\n{rules}  default_backend app-{pod}\n\
             backend app-{pod}\n  server s {endpoint}{server}\n"
        );
    }
    text
}

const NGINX: &str =
    "daemon off; master_process off; worker_rlimit_nofile 65536;\nevents { worker_connections 16384; }\n";

fn nginx_http(folder: &Path, address: SocketAddr) -> String {
    format!(
        "pid {0}/nginx-{1}.pid; error_log {0}/nginx-{1}.log;\n{NGINX}http {{ access_log off; keepalive_requests 1000000000; \
         keepalive_timeout 3600; default_type text/plain;\n",
        folder.display(),
        address.port()
    )
}

fn nginx_tls(leaf: &Leaf) -> String {
    format!(
        "ssl_certificate {}; ssl_certificate_key {};",
        leaf.chain.display(),
        leaf.key.display()
    )
}

pub(crate) fn nginx_proxy(
    shape: Shape,
    address: SocketAddr,
    endpoint: SocketAddr,
    folder: &Path,
    trust: &Trust,
) -> String {
    let (listen, tls) = match shape.front {
        Security::Plain => ("", String::new()),
        Security::Tls | Security::Mutual => (" ssl", nginx_tls(&trust.server)),
    };
    let http2 = if shape.layer == Layer::Http2 { " http2" } else { "" };
    format!(
        "{}upstream app {{ server {endpoint}; keepalive 64; keepalive_requests 1000000000; }}\nserver {{ listen {address}{listen}{http2}; {tls}\n\
         location /admin {{ return 404; }}\nlocation / {{ allow 127.0.0.0/8; deny all; limit_except GET POST {{ deny all; }} \
         proxy_http_version 1.1; proxy_set_header Connection \"\"; proxy_pass http://app; }} }} }}\n",
        nginx_http(folder, address)
    )
}

/// The endpoint reads its file and writes it, as a program does that makes its answers, instead of leaving it to sendfile.
pub(crate) fn endpoint(security: Security, address: SocketAddr, folder: &Path, trust: &Trust) -> String {
    let (listen, tls) = match security {
        Security::Plain => ("", String::new()),
        Security::Tls => (" ssl", nginx_tls(&trust.server)),
        Security::Mutual => (
            " ssl",
            format!(
                "{} ssl_client_certificate {}; ssl_verify_client on;",
                nginx_tls(&trust.server),
                trust.root.display()
            ),
        ),
    };
    format!(
        "{}sendfile off; output_buffers 2 256k;\nserver {{ listen {address}{listen} backlog=1024; {tls}\nlocation / {{ return 200 \"{}\"; }}\n\
         location = /bulk {{ alias {}/bulk; }} }} }}\n",
        nginx_http(folder, address),
        "x".repeat(1024),
        folder.display()
    )
}
