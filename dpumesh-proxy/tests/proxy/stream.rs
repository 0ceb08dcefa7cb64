//! Configuration by the aggregated stream, from a server of ours in this process.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use dpumesh_proxy::config::schema::value_to_message;
use dpumesh_xds::discovery::ResourceType;
use dpumesh_xds::server::{Event, Outcome, Publisher};
use dpumesh_xds::snapshot::Snapshot;
use prost::Message as _;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use crate::harness::{Client, Endpoint, Running, await_true};
use crate::mesh::Authority;

const ADAPTER: &str = "spiffe://td/adapter";

/// A server on loopback, with a runtime of its own.
struct Server {
    runtime: tokio::runtime::Runtime,
    publisher: Publisher,
    events: mpsc::Receiver<Event>,
    address: SocketAddr,
    serving: tokio::task::JoinHandle<()>,
}

impl Server {
    fn start(authority: Option<&Authority>) -> Self {
        Self::start_at(authority, "127.0.0.1:0".parse().unwrap())
    }

    fn start_at(authority: Option<&Authority>, at: SocketAddr) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let (publisher, events) = Publisher::new();
        let socket = runtime.block_on(tokio::net::TcpListener::bind(at)).unwrap();
        let address = socket.local_addr().unwrap();
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(socket);
        let mut builder = tonic::transport::Server::builder();
        if let Some(authority) = authority {
            let (chain, key) = authority.leaf_named(ADAPTER, Some("adapter.test"));
            let tls = tonic::transport::ServerTlsConfig::new()
                .identity(tonic::transport::Identity::from_pem(chain, key))
                .client_ca_root(tonic::transport::Certificate::from_pem(&authority.root));
            builder = builder.tls_config(tls).unwrap();
        }
        let served = builder.add_service(publisher.service());
        let serving = runtime.spawn(async move { served.serve_with_incoming(incoming).await.unwrap() });
        Self {
            runtime,
            publisher,
            events,
            address,
            serving,
        }
    }

    fn publish(&self, resources: &[(ResourceType, &str, Value)]) {
        let mut snapshot = Snapshot::default();
        for (kind, name, value) in resources {
            let message = value_to_message(kind.message_name(), value, "").unwrap();
            snapshot.insert(*kind, *name, message.encode_to_vec());
        }
        self.publisher.publish(Arc::new(snapshot));
    }

    /// The next refusal of resources of a type.
    fn nack(&mut self, wanted: ResourceType) -> String {
        let events = &mut self.events;
        let next = async {
            loop {
                let event = events.recv().await.expect("an event");
                if let (Outcome::Nack(reason), true) = (event.outcome, event.kind == wanted) {
                    return reason;
                }
            }
        };
        self.runtime.block_on(async {
            tokio::time::timeout(Duration::from_secs(20), next)
                .await
                .expect("a refusal within 20 s")
        })
    }
}

fn bootstrap(address: SocketAddr, socket: &str) -> String {
    bootstrap_by("DELTA_GRPC", address, socket)
}

pub(crate) fn bootstrap_by(protocol: &str, address: SocketAddr, socket: &str) -> String {
    format!(
        r#"
node: {{id: proxy~node-1, cluster: dpu}}
admin: {{address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}}}
dynamic_resources:
  ads_config: {{api_type: {protocol}, transport_api_version: V3, grpc_services: [{{envoy_grpc: {{cluster_name: adapter}}}}]}}
  cds_config: {{ads: {{}}, resource_api_version: V3}}
  lds_config: {{ads: {{}}, resource_api_version: V3}}
static_resources:
  clusters:
  - name: adapter
    type: STATIC
    {socket}
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        '@type': type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {{http2_protocol_options: {{}}}}
    load_assignment:
      cluster_name: adapter
      endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: {}, port_value: {}}}}}}}}}]}}]
"#,
        address.ip(),
        address.port()
    )
}

pub(crate) fn cluster() -> (ResourceType, &'static str, Value) {
    let eds =
        json!({"eds_config": {"ads": {}, "resource_api_version": "V3"}, "service_name": "app-endpoints"});
    let value = json!({"name": "app", "type": "EDS", "connect_timeout": "5s", "eds_cluster_config": eds});
    (ResourceType::Cluster, "app", value)
}

pub(crate) fn endpoints(address: SocketAddr) -> (ResourceType, &'static str, Value) {
    let address =
        json!({"socket_address": {"address": address.ip().to_string(), "port_value": address.port()}});
    let value = json!({"cluster_name": "app-endpoints", "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}]});
    (ResourceType::Endpoints, "app-endpoints", value)
}

pub(crate) fn routes(name: &'static str, prefix: &str) -> (ResourceType, &'static str, Value) {
    let route = json!({"match": {"prefix": prefix}, "route": {"cluster": "app"}});
    let value =
        json!({"name": name, "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]});
    (ResourceType::Route, name, value)
}

fn typed(kind: &str, mut value: Value) -> Value {
    value["@type"] = json!(format!("type.googleapis.com/envoy.extensions.{kind}"));
    json!({"name": "x", "typed_config": value})
}

fn http(routes: &str) -> Value {
    let rds =
        json!({"route_config_name": routes, "config_source": {"ads": {}, "resource_api_version": "V3"}});
    let router = typed("filters.http.router.v3.Router", json!({}));
    let manager = json!({"stat_prefix": "web", "rds": rds, "http_filters": [router]});
    typed(
        "filters.network.http_connection_manager.v3.HttpConnectionManager",
        manager,
    )
}

pub(crate) fn listener(chains: Value) -> (ResourceType, &'static str, Value) {
    let address = json!({"socket_address": {"address": "127.0.0.1", "port_value": 0}});
    let value = json!({"name": "web", "address": address, "filter_chains": chains});
    (ResourceType::Listener, "web", value)
}

pub(crate) fn one_chain(routes: &str) -> Value {
    json!([{"name": "one", "filters": [http(routes)]}])
}

fn await_listener(running: &Running) {
    await_true("the listener", || running.proxy.listener_address("web").is_some());
}

#[test]
fn everything_comes_by_the_stream_and_what_is_refused_changes_nothing() {
    let endpoint = Endpoint::start("app");
    let mut server = Server::start(None);
    let running = Running::start(&bootstrap(server.address, ""));
    assert_eq!(
        running.admin("GET", "/ready").status(),
        503,
        "nothing has come yet"
    );
    let good = [
        cluster(),
        endpoints(endpoint.address),
        listener(one_chain("r")),
        routes("r", "/"),
    ];
    server.publish(&good);
    await_listener(&running);
    let mut client = running.client();
    assert_eq!(client.get("/").status(), 200);
    assert_eq!(running.admin("GET", "/ready").status(), 200);
    assert_eq!(running.stat("control_plane.connected_state"), 1);

    // One resource at fault: named with field and reason; the other change of the same response is taken.
    let bad = listener(json!([{"name": "one", "filters": [{"name": "x"}]}]));
    server.publish(&[cluster(), endpoints(endpoint.address), bad, routes("r", "/only")]);
    assert_eq!(
        server.nack(ResourceType::Listener),
        "listener \"web\": filter_chains[0].filters[0].typed_config: must be given"
    );
    await_true("the route to change", || {
        running.client().get("/").status() == 404
    });
    assert_eq!(client.get("/only/this").status(), 200, "the connection went on");
    assert!(running.stat("listener_manager.lds.update_rejected") > 0);

    server.publish(&good);
    await_true("the good one again", || running.client().get("/").status() == 200);
}

#[test]
fn a_listener_waits_for_its_routes_and_unchanged_chains_keep_their_connections() {
    let endpoint = Endpoint::start("app");
    let server = Server::start(None);
    let running = Running::start(&bootstrap(server.address, ""));
    let by_port = |port: u16, routes: &str| json!({"name": format!("port-{port}"), "filter_chain_match": {"source_ports": [port]}, "filters": [http(routes)]});
    let rest = |routes: &str| json!({"name": "rest", "filters": [http(routes)]});
    server.publish(&[
        cluster(),
        endpoints(endpoint.address),
        listener(json!([by_port(1, "r"), rest("r")])),
        routes("r", "/"),
    ]);
    await_listener(&running);
    let mut kept = running.client();
    assert_eq!(kept.get("/").status(), 200);

    // Another chain changes, to routes that are not there: the listener stays as it was.
    let modified = || running.stat("listener_manager.listener_modified");
    server.publish(&[
        cluster(),
        endpoints(endpoint.address),
        listener(json!([by_port(1, "late"), rest("r")])),
        routes("r", "/"),
    ]);
    await_true("the listener to be accepted", || {
        running.stat("listener_manager.lds.update_success") >= 2
    });
    assert_eq!(modified(), 0);
    assert_eq!(kept.get("/").status(), 200);
    server.publish(&[
        cluster(),
        endpoints(endpoint.address),
        listener(json!([by_port(1, "late"), rest("r")])),
        routes("r", "/"),
        routes("late", "/"),
    ]);
    await_true("the change to take effect", || modified() == 1);
    let answer = kept.get("/");
    assert_eq!((answer.status(), answer.header("connection")), (200, None));

    // Its own chain changes: the next response is the last.
    server.publish(&[
        cluster(),
        endpoints(endpoint.address),
        listener(json!([by_port(1, "late"), rest("late")])),
        routes("late", "/"),
    ]);
    await_true("the change to take effect", || modified() == 2);
    let answer = kept.get("/");
    assert_eq!(
        (answer.status(), answer.header("connection")),
        (200, Some("close"))
    );
    assert!(kept.is_closed());
}

#[test]
fn the_stream_is_mutually_authenticated_and_its_loss_changes_nothing() {
    let endpoint = Endpoint::start("app");
    let authority = Authority::new();
    let server = Server::start(Some(&authority));
    let (chain, key) = authority.leaf("spiffe://td/proxy");
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        json!({"filename": path})
    };
    let context = json!({
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        "sni": "adapter.test",
        "common_tls_context": {
            "tls_certificates": [{"certificate_chain": file("chain", &chain), "private_key": file("key", &key)}],
            "validation_context": {"trusted_ca": file("ca", &authority.root)},
        },
    });
    let socket = json!({"name": "tls", "typed_config": context});
    let running = Running::start(&bootstrap(server.address, &format!("transport_socket: {socket}")));
    let all = [
        cluster(),
        endpoints(endpoint.address),
        listener(one_chain("r")),
        routes("r", "/"),
    ];
    server.publish(&all);
    await_listener(&running);
    assert_eq!(running.client().get("/").status(), 200);

    let address = server.address;
    server.serving.abort();
    drop(server);
    await_true("the loss to be noticed", || {
        running.stat("control_plane.connected_state") == 0
    });
    let mut client: Client = running.client();
    assert_eq!(client.get("/").status(), 200);

    let again = Server::start_at(Some(&authority), address);
    again.publish(&[
        cluster(),
        endpoints(endpoint.address),
        listener(one_chain("r")),
        routes("r", "/new"),
    ]);
    await_true("the new routes", || running.client().get("/").status() == 404);
    assert_eq!(client.get("/new").status(), 200);
}
