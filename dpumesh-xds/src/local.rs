//! The node agent's door: which pods are on the node, and when they are governed.
//!
//! A Unix socket that only its user opens. A message is its body's length in octets (u32, big endian, at most 256 KiB) and the body, JSON:
//!
//! | request | answer |
//! |---|---|
//! | `{"govern":{"name":…,"namespace":…,"uid":…,"addresses":[…]}}` | `{"governed":{"version":…}}` once every connected proxy has acknowledged the pod's whole program; until then none. `{"refused":{"reason":…}}`: it will not come to that |
//! | `{"forget":{"name":…,"namespace":…,"uid":…}}` | `{"forgotten":{}}` |
//!
//! A connection may be used again after an answer. To close it while waiting takes nothing back: the pod is on the node until it is
//! forgotten, and asking again continues.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::UnixListenerStream;

use crate::adapter::govern::{Report, State};
use crate::adapter::pods::{Asked, Pods, key};

/// The longest message, in octets.
pub const MAX_BODY: usize = 256 << 10;

/// What the agent asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// A pod has its addresses; answer when it is governed.
    Govern(Govern),
    /// A pod is gone.
    Forget(Forget),
}

/// See [`Request::Govern`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Govern {
    /// Kubernetes name.
    pub name: String,
    /// Kubernetes namespace.
    pub namespace: String,
    /// Kubernetes uid; empty where the runtime does not say it.
    #[serde(default)]
    pub uid: String,
    /// What it was given.
    pub addresses: Vec<IpAddr>,
}

/// See [`Request::Forget`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forget {
    /// Kubernetes name.
    pub name: String,
    /// Kubernetes namespace.
    pub namespace: String,
    /// Kubernetes uid.
    #[serde(default)]
    pub uid: String,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// The proxy has the program.
    Governed {
        /// Of which configuration.
        version: String,
    },
    /// There will be none.
    Refused {
        /// For people.
        reason: String,
    },
    /// The pod is forgotten.
    Forgotten {},
}

/// How all pods stand, as [`crate::adapter`] shows it.
pub type Board = watch::Receiver<BTreeMap<String, Report>>;

/// Serves agents until dropped.
pub async fn serve(mut incoming: UnixListenerStream, pods: Arc<Pods>, board: Board) {
    while let Some(accepted) = incoming.next().await {
        match accepted {
            Ok(stream) => {
                let (pods, board) = (Arc::clone(&pods), board.clone());
                tokio::spawn(async move {
                    if let Err(error) = converse(stream, &pods, board).await {
                        tracing::warn!(%error, "an agent's connection ended");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "an agent could not connect");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    }
}

async fn converse(mut stream: UnixStream, pods: &Pods, mut board: Board) -> io::Result<()> {
    while let Some(body) = read(&mut stream).await? {
        let request = serde_json::from_slice(&body).map_err(|error| error.to_string());
        let answer = match request {
            Ok(Request::Govern(govern)) => match nonsense(&govern) {
                Some(reason) => Answer::Refused { reason },
                None => {
                    // The pod is on the node from now on, whether its agent waits or not.
                    let asked = ask(govern, pods);
                    tokio::select! {
                        answer = governed(&asked, pods, &mut board) => answer,
                        () = anything(&stream) => return Ok(()),
                    }
                }
            },
            Ok(Request::Forget(forget)) => {
                pods.forget(&forget.namespace, &forget.name, &forget.uid);
                Answer::Forgotten {}
            }
            Err(reason) => Answer::Refused { reason },
        };
        write(&mut stream, &answer).await?;
    }
    Ok(())
}

/// Waits until something comes, where nothing is to come before the answer: the connection ends then.
async fn anything(stream: &UnixStream) {
    while stream.readable().await.is_ok() {
        // Readiness may be of what was read already.
        match stream.try_read(&mut [0]) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            _ => return,
        }
    }
}

fn ask(govern: Govern, pods: &Pods) -> Asked {
    let Govern {
        name,
        namespace,
        uid,
        addresses,
    } = govern;
    let asked = Asked {
        name,
        namespace,
        uid,
        addresses,
    };
    pods.ask(asked.clone());
    asked
}

/// Waits until a pod is governed, or will not be.
async fn governed(asked: &Asked, pods: &Pods, board: &mut Board) -> Answer {
    let key = key(&asked.namespace, &asked.name);
    let Asked { uid, addresses, .. } = asked;
    loop {
        // Of the pod that is asked for now, with these addresses: not of the one before it.
        let current = pods.local().remove(&key);
        let wanted = current.filter(|pod| (uid.is_empty() || pod.uid == *uid) && pod.addresses == *addresses);
        let report = wanted.and_then(|pod| {
            let report = board.borrow_and_update().get(&key).cloned();
            report.filter(|report| report.uid == pod.uid && report.addresses == pod.addresses)
        });
        match report.map(|report| report.state) {
            Some(State::Governed(generation)) => {
                let version = generation.to_string();
                return Answer::Governed { version };
            }
            Some(State::Refused(reason)) => return Answer::Refused { reason },
            Some(State::Waiting(_)) | None => {}
        }
        if board.changed().await.is_err() {
            let reason = "the adapter ends".to_owned();
            return Answer::Refused { reason };
        }
    }
}

fn nonsense(govern: &Govern) -> Option<String> {
    let a_name = |name: &str| {
        !name.is_empty()
            && name.len() <= 253
            && !name.starts_with('.')
            && name
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.')
    };
    for (field, value) in [("name", &govern.name), ("namespace", &govern.namespace)] {
        if !a_name(value) {
            return Some(format!("{field}: {value:?} is no name"));
        }
    }
    if govern.addresses.is_empty() {
        return Some("addresses: there is none".to_owned());
    }
    None
}

/// One message's body; `None` at the end.
async fn read(stream: &mut UnixStream) -> io::Result<Option<Vec<u8>>> {
    let mut length = [0; 4];
    match stream.read_exact(&mut length).await {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    }
    let length = u32::from_be_bytes(length) as usize;
    if length > MAX_BODY {
        let text = format!("a message of {length} octets is longer than {MAX_BODY}");
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await?;
    Ok(Some(body))
}

async fn write(stream: &mut UnixStream, answer: &Answer) -> io::Result<()> {
    let body = serde_json::to_vec(answer).map_err(io::Error::other)?;
    let length = u32::try_from(body.len()).map_err(io::Error::other)?;
    let mut frame = length.to_be_bytes().to_vec();
    frame.extend(body);
    stream.write_all(&frame).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::Binding;

    #[test]
    fn the_words_on_the_wire_stay_as_they_are() {
        let requests = [
            r#"{"govern":{"name":"p","namespace":"n","uid":"u","addresses":["10.0.0.1","fd00::1"]}}"#,
            r#"{"forget":{"name":"p","namespace":"n","uid":"u"}}"#,
        ];
        for text in requests {
            let request: Request = serde_json::from_str(text).unwrap();
            assert_eq!(serde_json::to_string(&request).unwrap(), text);
        }
        let answers = [
            (
                Answer::Governed { version: "7".into() },
                r#"{"governed":{"version":"7"}}"#,
            ),
            (
                Answer::Refused { reason: "no".into() },
                r#"{"refused":{"reason":"no"}}"#,
            ),
            (Answer::Forgotten {}, r#"{"forgotten":{}}"#),
        ];
        for (answer, text) in answers {
            assert_eq!(serde_json::to_string(&answer).unwrap(), text);
        }
    }

    struct Agent(UnixStream);

    impl Agent {
        async fn say(&mut self, text: &str) {
            let mut frame = u32::try_from(text.len()).unwrap().to_be_bytes().to_vec();
            frame.extend(text.as_bytes());
            self.0.write_all(&frame).await.unwrap();
        }

        async fn hear(&mut self) -> String {
            let heard = tokio::time::timeout(std::time::Duration::from_secs(20), read(&mut self.0)).await;
            String::from_utf8(heard.unwrap().unwrap().unwrap()).unwrap()
        }
    }

    const GOVERN: &str = r#"{"govern":{"name":"p","namespace":"n","uid":"u","addresses":["10.0.0.1"]}}"#;

    fn report(uid: &str, address: &str, state: State) -> BTreeMap<String, Report> {
        let report = Report {
            uid: uid.into(),
            addresses: vec![address.parse().unwrap()],
            state,
            quarantined: None,
        };
        BTreeMap::from([("p.n".to_owned(), report)])
    }

    #[tokio::test]
    async fn an_agent_waits_until_its_pod_is_governed() {
        let pods = Arc::new(Pods::default());
        let (board, watch) = watch::channel(report("old", "10.0.0.1", State::Governed(1)));
        let (agent, stream) = UnixStream::pair().unwrap();
        let mut agent = Agent(agent);
        let served = Arc::clone(&pods);
        let server = tokio::spawn(async move { converse(stream, &served, watch).await });
        agent.say(GOVERN).await;
        let asked = tokio::time::timeout(std::time::Duration::from_secs(20), pods.changed.notified());
        asked.await.unwrap();
        let binding = Binding {
            name: "p".into(),
            namespace: "n".into(),
            uid: "u".into(),
            service_account: "sa".into(),
            trust_domain: "td".into(),
            ..Binding::default()
        };
        pods.bind(vec![binding], &[], true);
        for state in [
            report("old", "10.0.0.1", State::Governed(2)),
            report("u", "10.0.0.9", State::Governed(2)),
            report("u", "10.0.0.1", State::Waiting("for more".into())),
        ] {
            board.send_replace(state);
            let heard = tokio::time::timeout(std::time::Duration::from_millis(20), agent.hear()).await;
            assert!(heard.is_err(), "too early: {heard:?}");
        }
        board.send_replace(report("u", "10.0.0.1", State::Governed(3)));
        assert_eq!(agent.hear().await, r#"{"governed":{"version":"3"}}"#);
        agent
            .say(r#"{"forget":{"name":"p","namespace":"n","uid":"u"}}"#)
            .await;
        assert_eq!(agent.hear().await, r#"{"forgotten":{}}"#);
        assert!(pods.local().is_empty());
        for (nonsense, reason) in [
            (
                r#"{"govern":{"name":"../p","namespace":"n","addresses":["10.0.0.1"]}}"#,
                "name",
            ),
            (
                r#"{"govern":{"name":"p","namespace":"n","addresses":[]}}"#,
                "addresses",
            ),
            (r#"{"rule":{}}"#, "unknown variant"),
        ] {
            agent.say(nonsense).await;
            let heard = agent.hear().await;
            assert!(
                heard.starts_with(r#"{"refused"#) && heard.contains(reason),
                "{heard}"
            );
        }
        drop(agent);
        server.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_message_that_is_too_long_ends_the_connection() {
        let (mut agent, stream) = UnixStream::pair().unwrap();
        let (_board, watch) = watch::channel(BTreeMap::new());
        agent.write_all(&u32::MAX.to_be_bytes()).await.unwrap();
        let ended = converse(stream, &Pods::default(), watch).await;
        assert_eq!(ended.unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
