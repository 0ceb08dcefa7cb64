//! The client against our own server, over a real connection, and against servers that misbehave.

use std::collections::BTreeMap;
use std::net::TcpListener;

use tokio::runtime::Runtime;
use tokio::sync::mpsc::{Receiver, Sender};
use tokio_stream::wrappers::TcpListenerStream;

use super::*;
use crate::server::{Event, Outcome, Publisher};
use crate::snapshot::Snapshot;
use ResourceType::{Cluster, Endpoints, Listener, Secret};

/// Takes everything but what begins with `bad`; wants the endpoints of every cluster.
struct Recorder {
    has: BTreeMap<(ResourceType, String), Vec<u8>>,
    out: Sender<Seen>,
}

#[derive(Debug)]
enum Seen {
    Update(BTreeMap<(ResourceType, String), Vec<u8>>),
    Lost,
}

#[async_trait]
impl Apply for Recorder {
    async fn apply(&mut self, update: Update) -> Applied {
        let mut applied = Applied::default();
        for resource in update.resources {
            let value = resource.resource.unwrap_or_default().value;
            if value.starts_with(b"bad") {
                applied.rejected.push(Rejection {
                    reason: format!("{} {:?}: some.path: is bad", update.kind, resource.name),
                    name: resource.name,
                });
            } else {
                self.has.insert((update.kind, resource.name), value);
            }
        }
        for name in update.removed {
            self.has.remove(&(update.kind, name));
        }
        let clusters = self
            .has
            .keys()
            .filter(|(kind, _)| *kind == Cluster)
            .map(|(_, name)| name.clone());
        applied.wanted = vec![(Endpoints, clusters.collect())];
        let _ = self.out.send(Seen::Update(self.has.clone())).await;
        applied
    }

    fn lost(&mut self, _: &str) {
        let _ = self.out.try_send(Seen::Lost);
    }
}

struct World {
    publisher: Publisher,
    events: Receiver<Event>,
    seen: Receiver<Seen>,
    address: std::net::SocketAddr,
    /// A runtime of its own: dropping it closes its connections too.
    server: Option<Runtime>,
    client: tokio::task::JoinHandle<()>,
    counters: Arc<Counters>,
}

impl World {
    async fn new() -> Self {
        let (publisher, events) = Publisher::new();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = Some(serve(&publisher, listener));
        let (out, seen) = mpsc::channel(64);
        let counters = Arc::new(Counters::default());
        let client = Client {
            channel: channel(&address.to_string(), &Security::Plaintext).unwrap(),
            node: Node {
                id: "sidecar~10.0.0.1~p.n~n.svc.cluster.local".into(),
                ..Node::default()
            },
            credential: Credential::Connection,
            protocol: Protocol::Delta,
            wildcards: vec![Cluster, Listener],
            counters: Arc::clone(&counters),
        };
        let client = tokio::spawn(async move {
            let mut recorder = Recorder {
                has: BTreeMap::new(),
                out,
            };
            client.run(&mut recorder).await;
        });
        Self {
            publisher,
            events,
            seen,
            address,
            server,
            client,
            counters,
        }
    }

    fn publish(&self, resources: &[(ResourceType, &str, &str)]) {
        let mut snapshot = Snapshot::default();
        for (kind, name, body) in resources {
            snapshot.insert(*kind, *name, body.as_bytes().to_vec());
        }
        self.publisher.publish(Arc::new(snapshot));
    }

    /// Waits until the client has exactly this.
    async fn until(&mut self, expected: &[(ResourceType, &str, &str)]) {
        let expected: BTreeMap<_, _> = expected
            .iter()
            .map(|(k, n, b)| ((*k, (*n).to_owned()), b.as_bytes().to_vec()))
            .collect();
        let wait = async {
            while let Some(seen) = self.seen.recv().await {
                if matches!(&seen, Seen::Update(has) if *has == expected) {
                    return;
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(20), wait)
            .await
            .unwrap_or_else(|_| panic!("never {expected:?}"));
    }

    fn stop_server(&mut self) {
        if let Some(server) = self.server.take() {
            server.shutdown_background();
        }
    }

    /// Waits until the client has noticed that its stream ended.
    async fn lost(&mut self) {
        let wait = async { while !matches!(self.seen.recv().await, Some(Seen::Lost) | None) {} };
        tokio::time::timeout(Duration::from_secs(20), wait)
            .await
            .expect("the client notices");
    }

    async fn event(&mut self, wanted: impl Fn(&Event) -> bool) -> Event {
        let wait = async {
            loop {
                let event = self.events.recv().await.expect("the publisher lives");
                if wanted(&event) {
                    return event;
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(20), wait)
            .await
            .expect("the event comes")
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.client.abort();
        self.stop_server();
    }
}

fn serve(publisher: &Publisher, listener: TcpListener) -> Runtime {
    let service = publisher.service();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    listener.set_nonblocking(true).unwrap();
    runtime.spawn(async move {
        let listener = tokio::net::TcpListener::from_std(listener).unwrap();
        let incoming = TcpListenerStream::new(listener);
        let _ = tonic::transport::Server::builder()
            .add_service(service)
            .serve_with_incoming(incoming)
            .await;
    });
    runtime
}

#[tokio::test]
async fn what_is_published_is_what_a_client_has() {
    let mut world = World::new().await;
    world.publish(&[(Cluster, "a", "1"), (Endpoints, "a", "x"), (Listener, "l", "1")]);
    world
        .until(&[(Cluster, "a", "1"), (Endpoints, "a", "x"), (Listener, "l", "1")])
        .await;
    world.publish(&[(Cluster, "b", "1"), (Endpoints, "b", "y"), (Listener, "l", "2")]);
    world
        .until(&[(Cluster, "b", "1"), (Endpoints, "b", "y"), (Listener, "l", "2")])
        .await;
}

#[tokio::test]
async fn a_bad_resource_is_refused_by_name_and_path_and_the_last_good_one_stays() {
    let mut world = World::new().await;
    world.publish(&[(Listener, "l", "1"), (Listener, "m", "1")]);
    world.until(&[(Listener, "l", "1"), (Listener, "m", "1")]).await;
    world.publish(&[(Listener, "l", "bad"), (Listener, "m", "2")]);
    world.until(&[(Listener, "l", "1"), (Listener, "m", "2")]).await;
    let nack = world.event(|e| matches!(e.outcome, Outcome::Nack(_))).await;
    assert_eq!(
        nack.outcome,
        Outcome::Nack("listener \"l\": some.path: is bad".into())
    );
    assert_eq!(nack.names, ["l", "m"]);
    assert_eq!(nack.node, "sidecar~10.0.0.1~p.n~n.svc.cluster.local");
}

#[tokio::test]
async fn a_lost_server_loses_nothing_and_only_changes_travel_when_it_is_back() {
    let mut world = World::new().await;
    let resources = [(Cluster, "a", "1"), (Endpoints, "a", "x"), (Listener, "l", "1")];
    world.publish(&resources);
    world.until(&resources).await;
    world.stop_server();
    world.lost().await;
    let before = world.counters.resources.load(Ordering::Relaxed);
    world.publish(&[(Cluster, "a", "1"), (Endpoints, "a", "x"), (Listener, "l", "2")]);
    let listener = loop {
        match TcpListener::bind(world.address) {
            Ok(listener) => break listener,
            Err(_) => tokio::task::yield_now().await,
        }
    };
    world.server = Some(serve(&world.publisher, listener));
    world
        .until(&[(Cluster, "a", "1"), (Endpoints, "a", "x"), (Listener, "l", "2")])
        .await;
    assert_eq!(world.counters.resources.load(Ordering::Relaxed) - before, 1);
}

/// A server that answers each request for clusters with the next of these messages, as they are on the wire.
async fn scripted(messages: Vec<Vec<u8>>) -> (std::net::SocketAddr, Receiver<DeltaDiscoveryRequest>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (requests, received) = mpsc::channel(64);
    let script = scripted::Script {
        messages: Arc::new(std::sync::Mutex::new(messages.into())),
        requests,
    };
    let server = tonic::transport::Server::builder().add_service(script);
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    (address, received)
}

mod scripted {
    use std::collections::VecDeque;
    use std::convert::Infallible;
    use std::future::Future;
    use std::pin::Pin;
    use std::sync::Mutex;
    use std::task::{Context, Poll};

    use bytes::{Buf as _, BufMut as _};
    use tonic::body::Body;
    use tonic::codec::{Codec, DecodeBuf, EncodeBuf, Encoder};
    use tonic::server::{NamedService, StreamingService};
    use tonic::{Response, Streaming};
    use tower_service::Service;

    use super::*;

    type Answer<T> = Pin<Box<dyn Future<Output = T> + Send>>;

    #[derive(Clone)]
    pub(super) struct Script {
        pub(super) messages: Arc<Mutex<VecDeque<Vec<u8>>>>,
        pub(super) requests: Sender<DeltaDiscoveryRequest>,
    }

    impl NamedService for Script {
        const NAME: &'static str = crate::discovery::SERVICE;
    }

    impl Service<http::Request<Body>> for Script {
        type Response = http::Response<Body>;
        type Error = Infallible;
        type Future = Answer<Result<http::Response<Body>, Infallible>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, request: http::Request<Body>) -> Self::Future {
            let script = self.clone();
            Box::pin(async move { Ok(tonic::server::Grpc::new(Raw).streaming(script, request).await) })
        }
    }

    impl StreamingService<DeltaDiscoveryRequest> for Script {
        type Response = Vec<u8>;
        type ResponseStream = ReceiverStream<Result<Vec<u8>, Status>>;
        type Future = Answer<Result<Response<Self::ResponseStream>, Status>>;

        fn call(&mut self, request: Request<Streaming<DeltaDiscoveryRequest>>) -> Self::Future {
            let script = self.clone();
            let (sender, receiver) = mpsc::channel(8);
            tokio::spawn(async move {
                let mut requests = request.into_inner();
                while let Ok(Some(request)) = requests.message().await {
                    let next = (request.type_url == Cluster.url())
                        .then(|| script.messages.lock().unwrap().pop_front())
                        .flatten();
                    let _ = script.requests.send(request).await;
                    if let Some(message) = next {
                        let _ = sender.send(Ok(message)).await;
                    }
                }
            });
            Box::pin(async move { Ok(Response::new(ReceiverStream::new(receiver))) })
        }
    }

    /// Messages that are sent as the octets they are.
    struct Raw;

    impl Codec for Raw {
        type Encode = Vec<u8>;
        type Decode = DeltaDiscoveryRequest;
        type Encoder = Self;
        type Decoder = Self;

        fn encoder(&mut self) -> Self {
            Self
        }

        fn decoder(&mut self) -> Self {
            Self
        }
    }

    impl Encoder for Raw {
        type Item = Vec<u8>;
        type Error = Status;

        fn encode(&mut self, item: Vec<u8>, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
            buffer.put_slice(&item);
            Ok(())
        }
    }

    impl tonic::codec::Decoder for Raw {
        type Item = DeltaDiscoveryRequest;
        type Error = Status;

        fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<DeltaDiscoveryRequest>, Status> {
            let octets = buffer.copy_to_bytes(buffer.remaining());
            let request = <DeltaDiscoveryRequest as prost::Message>::decode(octets);
            request
                .map(Some)
                .map_err(|error| Status::internal(error.to_string()))
        }
    }
}

/// What was asked for first, NACKed and acknowledged of clusters, in order, until the `acks`th acknowledgement; and what was applied.
async fn played(
    messages: Vec<Vec<u8>>,
    acks: usize,
) -> (Vec<String>, BTreeMap<(ResourceType, String), Vec<u8>>) {
    let (address, mut requests) = scripted(messages).await;
    let (out, mut seen) = mpsc::channel(64);
    let client = Client {
        channel: channel(&address.to_string(), &Security::Plaintext).unwrap(),
        node: Node {
            id: "n".into(),
            ..Node::default()
        },
        credential: Credential::Connection,
        protocol: Protocol::Delta,
        wildcards: vec![Cluster],
        counters: Arc::default(),
    };
    let task = tokio::spawn(async move {
        let has = BTreeMap::new();
        client.run(&mut Recorder { has, out }).await;
    });
    let mut heard = Vec::new();
    let listen = async {
        while heard.iter().filter(|h| *h == "ack").count() < acks {
            let request = requests.recv().await.expect("the server lives");
            if request.type_url != Cluster.url() {
                continue;
            }
            heard.push(match (request.response_nonce.as_str(), request.error_detail) {
                ("", _) => {
                    let mut has: Vec<_> = request.initial_resource_versions.into_iter().collect();
                    has.sort();
                    format!("hello {has:?}")
                }
                (_, None) => "ack".to_owned(),
                (nonce, Some(error)) => format!("nack {nonce}: {}", error.message),
            });
        }
    };
    let listened = tokio::time::timeout(Duration::from_secs(20), listen).await;
    assert!(listened.is_ok(), "never {acks} acknowledgements: {heard:?}");
    task.abort();
    let mut last = BTreeMap::new();
    while let Some(seen) = seen.recv().await {
        if let Seen::Update(has) = seen {
            last = has;
        }
    }
    (heard, last)
}

fn encoded(nonce: &str, name: &str, value: &[u8]) -> Vec<u8> {
    let mut response = response(Cluster.url(), 0);
    response.nonce = nonce.into();
    response.resources[0].name = name.into();
    response.resources[0].resource.as_mut().unwrap().value = value.to_vec();
    prost::Message::encode_to_vec(&response)
}

#[tokio::test]
async fn a_response_that_is_no_message_ends_the_stream_and_changes_nothing() {
    let good = encoded("1", "a", b"good");
    for end in [1, good.len() / 2, good.len() - 1] {
        let cut = encoded("2", "b", b"lost")[..end.min(good.len() - 1)].to_vec();
        let (heard, has) = played(vec![good.clone(), cut, encoded("3", "c", b"good")], 2).await;
        assert_eq!(
            heard,
            ["hello []", "ack", "hello [(\"a\", \"1\")]", "ack"],
            "cut after {end}"
        );
        let names: Vec<&str> = has.keys().map(|(_, name)| name.as_str()).collect();
        assert_eq!(names, ["a", "c"]);
    }
}

#[tokio::test]
async fn a_wrong_resource_is_refused_by_name_on_the_wire_and_changes_nothing() {
    let messages = vec![
        encoded("1", "a", b"good"),
        encoded("2", "a", b"bad"),
        encoded("3", "b", b"good"),
    ];
    let (heard, has) = played(messages, 2).await;
    assert_eq!(
        heard,
        [
            "hello []",
            "ack",
            "nack 2: cluster \"a\": some.path: is bad",
            "ack"
        ]
    );
    assert_eq!(has[&(Cluster, "a".to_owned())], b"good");
}

#[tokio::test]
async fn an_oversized_response_is_refused_by_type_on_the_wire_and_changes_nothing() {
    let messages = vec![
        encoded("1", "a", b"good"),
        encoded("2", "a", &vec![0; MAX_RESPONSE + 1]),
        encoded("3", "b", b"good"),
    ];
    let (heard, has) = played(messages, 2).await;
    assert_eq!(
        heard,
        [
            "hello []",
            "ack",
            "nack 2: 134217729 octets of cluster resources are more than 134217728",
            "ack"
        ]
    );
    assert_eq!(has[&(Cluster, "a".to_owned())], b"good");
}

fn state() -> State {
    State::new(Node::default(), &[Cluster, Listener])
}

fn response(kind_url: &str, octets: usize) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        type_url: kind_url.into(),
        nonce: "n".into(),
        resources: vec![Resource {
            name: "x".into(),
            version: "1".into(),
            resource: Some(prost_types::Any {
                type_url: kind_url.into(),
                value: vec![0; octets],
            }),
        }],
        ..DeltaDiscoveryResponse::default()
    }
}

#[test]
fn responses_nobody_asked_for_and_oversized_ones_are_refused_whole() {
    let cases = [
        (
            "type.googleapis.com/what",
            1,
            "type \"type.googleapis.com/what\" is not known here",
        ),
        (Secret.url(), 1, "no secret resources were asked for"),
        (
            Cluster.url(),
            MAX_RESPONSE + 1,
            "134217729 octets of cluster resources are more than 134217728",
        ),
    ];
    for (url, octets, reason) in cases {
        let nack = state().receive(response(url, octets)).unwrap_err();
        assert_eq!((nack.response_nonce.as_str(), nack.type_url.as_str()), ("n", url));
        assert_eq!(nack.error_detail.unwrap().message, reason);
    }
}

#[test]
fn what_was_rejected_is_not_claimed_after_a_reconnect() {
    let mut state = state();
    let (_, receipt) = state.receive(response(Cluster.url(), 1)).unwrap();
    let rejected = vec![Rejection {
        name: "x".into(),
        reason: "cluster \"x\": bad".into(),
    }];
    let answers = state.applied(
        receipt,
        Applied {
            rejected,
            wanted: vec![],
        },
    );
    assert_eq!(
        answers[0].error_detail.as_ref().unwrap().message,
        "cluster \"x\": bad"
    );
    assert!(state.hello()[0].initial_resource_versions.is_empty());
    let (_, receipt) = state.receive(response(Cluster.url(), 1)).unwrap();
    let wanted = vec![(Endpoints, ["e".to_owned()].into())];
    let answers = state.applied(
        receipt,
        Applied {
            rejected: vec![],
            wanted,
        },
    );
    assert!(answers[0].error_detail.is_none());
    assert_eq!(answers[1].resource_names_subscribe, ["e"]);
    let hello = state.hello();
    assert_eq!(hello[0].initial_resource_versions["x"], "1");
    assert!(hello[0].node.is_some() && hello[1].node.is_none());
    assert_eq!(hello[2].resource_names_subscribe, ["e"]);
}

#[test]
fn waits_grow_and_stay_bounded() {
    for failures in [0, 1, 5, 40, u32::MAX] {
        assert!(full_jitter(failures) <= BACKOFF.1);
    }
    assert!(full_jitter(0) <= BACKOFF.0);
}
