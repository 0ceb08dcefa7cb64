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
