//! An adapter between our own server, which plays istiod with what a real one sent, and our own client, which plays the proxy.

use std::net::SocketAddr;
use std::sync::Mutex;

use async_trait::async_trait;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UnixStream};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;

use super::relay::RelayService;
use super::token::Files;
use super::*;
use crate::aggregate::Interception;
use crate::client::{Applied, Apply, Protocol, Rejection, Security, Update, channel};
use crate::discovery::Node;
use crate::ir::Identity;
use crate::keys::{IstioRelay, KeyStore, Relay as _};
use crate::mesh::Binding;
use crate::{local, recorded, socket};

/// Everything in this file ends by then.
const BOUND: Duration = Duration::from_secs(30);

/// istiod, for one recorded pod.
async fn istiod(pod: usize) -> (SocketAddr, Publisher) {
    let (publisher, _) = Publisher::new();
    let mut snapshot = Snapshot::default();
    for (file, kind) in recorded::TYPES {
        for resource in recorded::resources(pod, file) {
            snapshot.insert(kind, resource.name, resource.resource.unwrap().value);
        }
    }
    publisher.publish(Arc::new(snapshot));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = Server::builder().add_service(publisher.service());
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    (address, publisher)
}

fn binding(index: usize) -> Binding {
    let pod = recorded::pod(index);
    Binding {
        name: pod.name,
        namespace: pod.identity.namespace,
        uid: "u".into(),
        service_account: pod.identity.service_account,
        trust_domain: pod.identity.trust_domain,
        ..Binding::default()
    }
}

struct World {
    pods: Arc<Pods>,
    shown: watch::Receiver<Shown>,
    /// Where the proxy connects.
    address: SocketAddr,
    folder: tempfile::TempDir,
    task: tokio::task::JoinHandle<()>,
}

impl World {
    async fn new(istiod: SocketAddr) -> Self {
        Self::again(istiod, tempfile::tempdir().unwrap()).await
    }

    /// An adapter with the state of the one before.
    async fn again(istiod: SocketAddr, folder: tempfile::TempDir) -> Self {
        let (publisher, events) = Publisher::new();
        let restored = disk::restore(folder.path());
        let pods = Arc::new(Pods::new(
            Vec::new(),
            restored.iter().map(|(p, _)| p.clone()).collect(),
        ));
        let (keeper, writer) = disk::open(folder.path()).unwrap();
        // The thread goes on by itself; a test looks until it finds what it waits for.
        drop(writer);
        let istiod = channel(&istiod.to_string(), &Security::Plaintext).unwrap();
        let relay = RelayService::new(
            Arc::clone(&pods),
            Arc::new(Files),
            istiod.clone(),
            "Kubernetes",
            Arc::default(),
        )
        .unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = Server::builder()
            .add_service(publisher.service())
            .add_service(relay);
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        let adapter = Adapter::new(Parts {
            istiod,
            mesh: Mesh {
                trust_domain: "cluster.local".into(),
                cluster_id: "Kubernetes".into(),
                istio_version: "1.29.2".into(),
            },
            pods: Arc::clone(&pods),
            tokens: Arc::new(Files),
            options: Options {
                outbound: "0.0.0.0:15001".parse().unwrap(),
                inbound: "0.0.0.0:15006".parse().unwrap(),
                interception: Interception::Transparent,
            },
            publisher,
            events,
            keeper: Some(keeper),
            restored,
            counters: Arc::default(),
        });
        let incoming = socket::bind(&folder.path().join("agent")).unwrap();
        tokio::spawn(local::serve(incoming, Arc::clone(&pods), adapter.board()));
        Self {
            shown: adapter.shown(),
            task: tokio::spawn(adapter.run()),
            pods,
            address,
            folder,
        }
    }

    async fn until(&self, what: &str, reached: impl Fn(&Shown) -> bool) -> Shown {
        let mut shown = self.shown.clone();
        let reached = tokio::time::timeout(BOUND, shown.wait_for(reached)).await;
        let Ok(reached) = reached else {
            panic!("never {what}: {:?}", self.shown.borrow());
        };
        reached.unwrap().clone()
    }

    async fn agent(&self) -> UnixStream {
        UnixStream::connect(self.folder.path().join("agent"))
            .await
            .unwrap()
    }

    /// A proxy that refuses resources of which this is true.
    fn proxy(&self, refuses: impl Fn(&str) -> bool + Send + 'static) -> Proxy {
        let has = Has::default();
        let mut taker = Taker {
            has: Arc::clone(&has),
            refuses: Box::new(refuses),
        };
        let client = Client {
            channel: channel(&self.address.to_string(), &Security::Plaintext).unwrap(),
            node: Node {
                id: "proxy".into(),
                ..Node::default()
            },
            credential: Credential::Connection,
            protocol: Protocol::Delta,
            wildcards: vec![ResourceType::Cluster, ResourceType::Listener],
            counters: Arc::default(),
        };
        let task = tokio::spawn(async move { client.run(&mut taker).await });
        Proxy { has, task }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What a proxy has, by type and name.
type Has = Arc<Mutex<BTreeMap<(ResourceType, String), Vec<u8>>>>;

struct Proxy {
    has: Has,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Takes resources as a proxy does, and asks for what they refer to.
struct Taker {
    has: Has,
    refuses: Box<dyn Fn(&str) -> bool + Send>,
}

#[async_trait]
impl Apply for Taker {
    async fn apply(&mut self, update: Update) -> Applied {
        let mut applied = Applied::default();
        let mut has = self.has.lock().unwrap();
        for resource in update.resources {
            if (self.refuses)(&resource.name) {
                applied.rejected.push(Rejection {
                    reason: format!("{} {:?}: is refused", update.kind, resource.name),
                    name: resource.name,
                });
            } else {
                has.insert((update.kind, resource.name), resource.resource.unwrap().value);
            }
        }
        for name in update.removed {
            has.remove(&(update.kind, name));
        }
        let (mut routes, mut endpoints) = (BTreeSet::new(), BTreeSet::new());
        for ((kind, _), value) in has.iter() {
            match kind {
                ResourceType::Cluster => endpoints.extend(named_in(*kind, value, "serviceName")),
                ResourceType::Listener => routes.extend(named_in(*kind, value, "routeConfigName")),
                _ => {}
            }
        }
        applied.wanted = vec![
            (ResourceType::Endpoints, endpoints),
            (ResourceType::Route, routes),
        ];
        applied
    }

    fn lost(&mut self, _: &str) {}
}

/// The texts in fields of this name, wherever in the message they stand.
fn named_in(kind: ResourceType, bytes: &[u8], field: &str) -> BTreeSet<String> {
    let descriptor = crate::schema::message(kind.message_name()).unwrap();
    let message = prost_reflect::DynamicMessage::decode(descriptor, bytes).unwrap();
    let text = serde_json::to_value(&message).unwrap();
    let mut found = BTreeSet::new();
    let mut left = vec![&text];
    while let Some(value) = left.pop() {
        if let Some(name) = value.get(field).and_then(|name| name.as_str()) {
            found.insert(name.to_owned());
        }
        match value {
            serde_json::Value::Object(fields) => left.extend(fields.values()),
            serde_json::Value::Array(values) => left.extend(values),
            _ => {}
        }
    }
    found
}

async fn govern(agent: &mut UnixStream, index: usize) {
    let pod = recorded::pod(index);
    let text = serde_json::json!({"govern": {"name": pod.name, "namespace": "shop", "uid": "u", "addresses": pod.addresses}});
    let body = serde_json::to_vec(&text).unwrap();
    let mut frame = u32::try_from(body.len()).unwrap().to_be_bytes().to_vec();
    frame.extend(body);
    agent.write_all(&frame).await.unwrap();
}

async fn answer(agent: &mut UnixStream) -> String {
    let read = async {
        let length = agent.read_u32().await.unwrap();
        let mut body = vec![0; length as usize];
        agent.read_exact(&mut body).await.unwrap();
        String::from_utf8(body).unwrap()
    };
    tokio::time::timeout(BOUND, read).await.unwrap()
}

const FRONT: &str = "front-1.shop";

fn governed(shown: &Shown, pod: &str) -> bool {
    let report = shown.pods.get(pod);
    report.is_some_and(|report| matches!(report.state, govern::State::Governed(_)))
}

#[tokio::test]
async fn a_pod_comes_is_governed_and_leaves() {
    let (address, _istiod) = istiod(0).await;
    let world = World::new(address).await;
    let proxy = world.proxy(|_| false);
    let mut agent = world.agent().await;
    govern(&mut agent, 0).await;
    world.pods.bind(vec![binding(0)], &[], true);
    assert!(
        answer(&mut agent)
            .await
            .starts_with(r#"{"governed":{"version":""#)
    );
    let has = |kind: ResourceType| {
        proxy
            .has
            .lock()
            .unwrap()
            .keys()
            .filter(|(k, _)| *k == kind)
            .count()
    };
    assert_eq!(has(ResourceType::Listener), 2);
    assert!(has(ResourceType::Route) > 0 && has(ResourceType::Endpoints) > 0);
    let clusters = has(ResourceType::Cluster);
    world.pods.bind(vec![], &["shop/front-1".into()], false);
    let empty = world
        .until("without the pod", |shown| shown.pods.is_empty())
        .await
        .generation;
    world
        .until("taken", |shown| shown.proxies.get("proxy") == Some(&empty))
        .await;
    assert!(clusters > 1);
    assert_eq!(has(ResourceType::Cluster), 1, "only the one that closes");
}

#[tokio::test]
async fn a_restarted_adapter_serves_while_istiod_is_away() {
    let (address, _istiod) = istiod(0).await;
    let mut world = World::new(address).await;
    let proxy = world.proxy(|_| false);
    world.pods.bind(vec![binding(0)], &[], true);
    // The agent leaves at once; the pod is on the node all the same.
    govern(&mut world.agent().await, 0).await;
    world.until("governed", |shown| governed(shown, FRONT)).await;
    let before = proxy.has.lock().unwrap().clone();
    drop(proxy);
    world.task.abort();
    let kept = || {
        disk::restore(world.folder.path())
            .first()
            .is_some_and(|(_, view)| view.missing().is_empty())
    };
    let until = Instant::now() + BOUND;
    while !kept() {
        assert!(Instant::now() < until, "never on disk");
        tokio::task::yield_now().await;
    }
    let folder = std::mem::replace(&mut world.folder, tempfile::tempdir().unwrap());
    // Nobody listens there.
    let again = World::again("127.0.0.1:9".parse().unwrap(), folder).await;
    let proxy = again.proxy(|_| false);
    again.until("governed", |shown| governed(shown, FRONT)).await;
    assert!(before == *proxy.has.lock().unwrap());
}

#[tokio::test]
async fn what_the_proxy_refuses_closes_the_pod_it_belongs_to() {
    let (address, _istiod) = istiod(0).await;
    let world = World::new(address).await;
    let _proxy = world.proxy(|name| name.ends_with("@front-1.shop"));
    world.pods.bind(vec![binding(0)], &[], true);
    let mut agent = world.agent().await;
    govern(&mut agent, 0).await;
    let heard = answer(&mut agent).await;
    assert!(heard.starts_with(r#"{"refused":{"reason":"cluster "#), "{heard}");
    let shown = world
        .until("quarantined", |shown| shown.pods[FRONT].quarantined.is_some())
        .await;
    let taken = shown.generation;
    world
        .until("published without it", |shown| {
            shown.proxies.get("proxy") >= Some(&taken)
        })
        .await;
}

/// A CA behind the address of an istiod, that notes with whose token it was asked.
mod ca {
    use std::convert::Infallible;
    use std::future::Future;
    use std::pin::Pin;
    use std::task::{Context, Poll};

    use tonic::body::Body;
    use tonic::server::{Grpc, NamedService, UnaryService};
    use tonic::{Request, Response, Status};
    use tower_service::Service;

    use super::*;
    use crate::keys::tests::Authority;
    use crate::keys::{CertificateRequest, CertificateResponse, SERVICE};

    #[derive(Clone)]
    pub(super) struct Ca(pub(super) Arc<Authority>);

    impl NamedService for Ca {
        const NAME: &'static str = SERVICE;
    }

    type Answer<T> = Pin<Box<dyn Future<Output = T> + Send>>;

    impl Service<http::Request<Body>> for Ca {
        type Response = http::Response<Body>;
        type Error = Infallible;
        type Future = Answer<Result<http::Response<Body>, Infallible>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, request: http::Request<Body>) -> Self::Future {
            let ca = self.clone();
            Box::pin(async move {
                let codec = tonic_prost::ProstCodec::<CertificateResponse, CertificateRequest>::default();
                Ok(Grpc::new(codec).unary(ca, request).await)
            })
        }
    }

    impl UnaryService<CertificateRequest> for Ca {
        type Response = CertificateResponse;
        type Future = Answer<Result<Response<CertificateResponse>, Status>>;

        /// The token is the account's name; it alone says who asks, as with istiod.
        fn call(&mut self, request: Request<CertificateRequest>) -> Self::Future {
            let token = request
                .metadata()
                .get("authorization")
                .map(|v| v.to_str().unwrap().to_owned());
            let authority = Arc::clone(&self.0);
            Box::pin(async move {
                let request = request.into_inner();
                assert!(request.metadata.is_none(), "names stay with the adapter");
                let token = token.ok_or_else(|| Status::unauthenticated("no token"))?;
                let account = token.strip_prefix("Bearer ").unwrap();
                let name = format!("spiffe://cluster.local/ns/shop/sa/{account}");
                let cert_chain = authority.issue(&name, &request.csr);
                Ok(Response::new(CertificateResponse { cert_chain }))
            })
        }
    }
}

#[tokio::test]
async fn certificates_are_for_local_pods_only_and_by_their_tokens() {
    let authority = Arc::new(crate::keys::tests::Authority::new());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let istiod = listener.local_addr().unwrap();
    let server = Server::builder().add_service(ca::Ca(authority));
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    let folder = tempfile::tempdir().unwrap();
    let token = folder.path().join("token");
    std::fs::write(&token, "front\n").unwrap();
    let pod = recorded::pod(0);
    let entry = PodEntry {
        ip: pod.addresses[0],
        name: pod.name,
        namespace: "shop".into(),
        service_account: "front".into(),
        token: Some(token),
        uid: String::new(),
        labels: BTreeMap::new(),
    };
    let pods = Arc::new(Pods::new(vec![entry.complete("cluster.local")], Vec::new()));
    let counters: Arc<relay::Counters> = Arc::default();
    let service = RelayService::new(
        pods,
        Arc::new(Files),
        channel(&istiod.to_string(), &Security::Plaintext).unwrap(),
        "Kubernetes",
        Arc::clone(&counters),
    )
    .unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = Server::builder().add_service(service);
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));

    let relay = IstioRelay::new(channel(&address.to_string(), &Security::Plaintext).unwrap());
    let roots = relay.roots("cluster.local").await.unwrap();
    assert!(roots[0].starts_with("-----BEGIN CERTIFICATE-----"));
    let elsewhere = Identity::parse("spiffe://cluster.local/ns/shop/sa/reviews").unwrap();
    let refused = relay.sign(&elsewhere, "csr").await.unwrap_err();
    assert_eq!(
        refused.to_string(),
        "PermissionDenied: no pod of this node is spiffe://cluster.local/ns/shop/sa/reviews"
    );
    assert!(relay.roots("other.domain").await.is_err());
    let store = KeyStore::new(Arc::new(relay));
    let front = Identity::parse("spiffe://cluster.local/ns/shop/sa/front").unwrap();
    let mut watch = store.want(&front);
    tokio::time::timeout(BOUND, watch.wait_for(Option::is_some))
        .await
        .unwrap()
        .unwrap();
    let count = |counter: &std::sync::atomic::AtomicU64| counter.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!(
        (count(&counters.signed), count(&counters.refused)),
        (2, 2),
        "of each two, one was for roots"
    );
}
