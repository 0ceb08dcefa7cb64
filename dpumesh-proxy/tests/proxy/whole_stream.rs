//! Configuration by the state-of-the-world stream, from a server in this process. Each case is checked at Envoy too.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use dpumesh_proxy::config::schema::value_to_message;
use dpumesh_xds::discovery::{DiscoveryRequest, DiscoveryResponse, ResourceType, WHOLE_CALL};
use prost::Message as _;
use serde_json::{Value, json};

use crate::envoy::{Subject, at_both};
use crate::harness::{Client, await_true};
use crate::stream::{bootstrap_by, cluster, endpoints, listener, one_chain, routes};

type Resource = (ResourceType, &'static str, Value);

/// What the server has, and what it was asked.
#[derive(Default)]
struct Shared {
    version: u64,
    resources: Vec<(ResourceType, String, prost_types::Any)>,
    asked: Vec<DiscoveryRequest>,
}

struct Server {
    address: SocketAddr,
    shared: Arc<Mutex<Shared>>,
}

impl Server {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let shared: Arc<Mutex<Shared>> = Arc::default();
        let of_all = Arc::clone(&shared);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let shared = Arc::clone(&of_all);
                std::thread::spawn(move || {
                    let runtime = tokio::runtime::Builder::new_current_thread()
                        .enable_all()
                        .build()
                        .unwrap();
                    runtime.block_on(serve(stream, &shared));
                });
            }
        });
        Self { address, shared }
    }

    fn publish(&self, resources: &[Resource]) {
        let mut shared = self.shared.lock().unwrap();
        shared.version += 1;
        let encoded = |(kind, name, value): &Resource| {
            let message = value_to_message(kind.message_name(), value, "").unwrap();
            let any = prost_types::Any {
                type_url: kind.url().to_owned(),
                value: message.encode_to_vec(),
            };
            (*kind, (*name).to_owned(), any)
        };
        shared.resources = resources.iter().map(encoded).collect();
    }

    /// The last refusal of a type, with the version that the client says it has.
    fn refusal(&self, kind: ResourceType) -> Option<(String, String)> {
        let shared = self.shared.lock().unwrap();
        let mut asked = shared.asked.iter().rev().filter(|r| r.type_url == kind.url());
        asked.find_map(|r| Some((r.error_detail.as_ref()?.message.clone(), r.version_info.clone())))
    }
}

/// What a stream knows of a type.
#[derive(Default)]
struct Subscription {
    names: BTreeSet<String>,
    sent: u64,
    nonce: String,
}

async fn serve(stream: std::net::TcpStream, shared: &Mutex<Shared>) {
    stream.set_nonblocking(true).unwrap();
    let stream = tokio::net::TcpStream::from_std(stream).unwrap();
    let Ok(mut connection) = h2::server::handshake(stream).await else {
        return;
    };
    let Some(Ok((request, mut respond))) = connection.accept().await else {
        return;
    };
    assert_eq!(request.uri().path(), WHOLE_CALL);
    let head = http::Response::builder().header("content-type", "application/grpc");
    let mut out = respond.send_response(head.body(()).unwrap(), false).unwrap();
    let mut body = request.into_body();
    let (mut data, mut types) = (Vec::new(), BTreeMap::<String, Subscription>::new());
    let mut look = tokio::time::interval(Duration::from_millis(20));
    loop {
        tokio::select! {
            part = body.data() => {
                let Some(Ok(part)) = part else { return };
                body.flow_control().release_capacity(part.len()).unwrap();
                data.extend_from_slice(&part);
                while let Some(request) = next(&mut data) {
                    let subscription = types.entry(request.type_url.clone()).or_default();
                    let names: BTreeSet<String> = request.resource_names.iter().cloned().collect();
                    if request.response_nonce != subscription.nonce {
                        continue; // of an older response
                    }
                    if subscription.names != names {
                        (subscription.names, subscription.sent) = (names, 0);
                    }
                    shared.lock().unwrap().asked.push(request);
                }
            }
            _ = look.tick() => {}
            _ = std::future::poll_fn(|cx| connection.poll_closed(cx)) => return,
        }
        let shared = shared.lock().unwrap();
        // What is referred to before what refers to it.
        for kind in ResourceType::ALL {
            let Some(subscription) = types.get_mut(kind.url()) else {
                continue;
            };
            if subscription.sent == shared.version {
                continue;
            }
            (subscription.sent, subscription.nonce) = (
                shared.version,
                format!("{kind}-{}-{}", shared.version, subscription.names.len()),
            );
            let wanted = |name: &String| subscription.names.is_empty() || subscription.names.contains(name);
            let resources = shared
                .resources
                .iter()
                .filter(|(of, name, _)| *of == kind && wanted(name));
            let response = DiscoveryResponse {
                version_info: shared.version.to_string(),
                resources: resources.map(|(_, _, any)| any.clone()).collect(),
                type_url: kind.url().to_owned(),
                nonce: subscription.nonce.clone(),
            };
            let message = response.encode_to_vec();
            let frame = [b"\0".as_slice(), &(message.len() as u32).to_be_bytes(), &message].concat();
            if out.send_data(Bytes::from(frame), false).is_err() {
                return;
            }
        }
    }
}

/// Takes a request off the front, once all of it is there.
fn next(data: &mut Vec<u8>) -> Option<DiscoveryRequest> {
    let (front, rest) = data.split_at_checked(5)?;
    let length = u32::from_be_bytes(front[1..].try_into().unwrap()) as usize;
    let message = DiscoveryRequest::decode(rest.get(..length)?).unwrap();
    data.drain(..5 + length);
    Some(message)
}

fn client(subject: &Subject) -> Client {
    if let Subject::Ours(running) = subject {
        await_true("the listener", || running.proxy.listener_address("web").is_some());
    }
    subject.client()
}

#[test]
fn everything_comes_each_time_and_what_is_refused_changes_nothing() {
    let server = Server::start();
    at_both(
        |endpoint, _| {
            server.publish(&[
                cluster(),
                endpoints(endpoint.address),
                listener(one_chain("r")),
                routes("r", "/"),
            ]);
            bootstrap_by("GRPC", server.address, "")
        },
        |subject, endpoint| {
            let mut kept = client(subject);
            assert_eq!(kept.get("/").status(), 200);

            // One resource at fault is refused by name; what came with other responses is taken.
            let version = server.shared.lock().unwrap().version.to_string();
            let bad = listener(json!([{"name": "one", "filters": [{"name": "x"}]}]));
            server.publish(&[cluster(), endpoints(endpoint.address), bad, routes("r", "/only")]);
            await_true("the route to change", || {
                subject.client().get("/").status() == 404
            });
            assert_eq!(kept.get("/only").status(), 200);
            await_true("a refusal", || server.refusal(ResourceType::Listener).is_some());
            let (reason, has) = server.refusal(ResourceType::Listener).unwrap();
            assert!(reason.contains("web"), "{}: {reason}", subject.name());
            assert_eq!(has, version, "{}", subject.name());
            if subject.name() == "ours" {
                assert_eq!(
                    reason,
                    "listener \"web\": filter_chains[0].filters[0].typed_config: must be given"
                );
            }

            // Good again, and with another endpoint; the connection goes on.
            let second = crate::harness::Endpoint::start("second");
            let before = endpoint.requests();
            server.publish(&[
                cluster(),
                endpoints(second.address),
                listener(one_chain("r")),
                routes("r", "/"),
            ]);
            await_true("the other endpoint", || {
                subject.client().get("/").header("x-endpoint") == Some("second")
            });
            assert_eq!(kept.get("/").header("x-endpoint"), Some("second"));
            assert!(endpoint.requests() >= before);

            // What is not there any more is gone.
            server.publish(&[cluster(), endpoints(second.address), routes("r", "/")]);
            let web = subject.web_if_there();
            await_true("the listener to go", || {
                web.is_none_or(|web| std::net::TcpStream::connect(web).is_err())
            });
            server.shared.lock().unwrap().asked.clear();
        },
    );
}
