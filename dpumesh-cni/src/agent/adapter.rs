//! [`Adapter`]: the governor that asks the node's adapter, over a Unix socket of this host.
//!
//! ```text
//! frame   length of the body in octets (u32, big endian, at most 256 KiB) · body: JSON
//! ask     {"govern":{"name","namespace","uid","addresses":[…]}}    answered when the pod's program is acknowledged, or never will be
//!         {"forget":{"name","namespace","uid"}}                    answered at once
//! answer  {"governed":{"version"}}  {"refused":{"reason"}}  {"forgotten":{}}
//! ```
//!
//! **Each pod has a connection of its own for as long as the agent has the pod**: after the answer it stays open without a word. When it ends, the adapter
//! has gone; it is asked again as soon as it is back, for every pod, governed or not. So neither side needs to remember the other's
//! restarts, and asking twice changes nothing. A governed pod stays governed meanwhile: its program is in the proxy.
//!
//! A `forget` that finds no adapter is tried again until it is taken; a pod of that name is asked for after it.
//!
//! The adapter knows one attachment of a pod: a second interface of the same pod on this network would replace the first there.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::governor::{GovernedPod, Governor, GovernorError};
use crate::talk::{MAX_BODY, PodName, body_length};

/// First wait before the adapter is tried again, and the last.
const WAIT: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// Asks the adapter behind a socket.
#[derive(Debug)]
pub struct Adapter {
    door: Arc<Door>,
    /// By namespace and name: the adapter tells pods apart by these.
    pods: Mutex<BTreeMap<(String, String), Conversation>>,
}

/// The adapter's socket, and whether somebody was last there.
#[derive(Debug)]
struct Door {
    socket: PathBuf,
    answered: AtomicBool,
}

/// A task that speaks for one pod. It ends with its handle.
#[derive(Debug)]
struct Conversation {
    about: Ask,
    state: watch::Receiver<State>,
    task: Option<JoinHandle<()>>,
}

impl Conversation {
    /// Its task, if it is a `forget` under way: what is asked next waits for it, or the adapter might forget that.
    fn into_forgetting(mut self) -> Option<JoinHandle<()>> {
        self.task.take_if(|_| matches!(self.about, Ask::Forget { .. }))
    }
}

impl Drop for Conversation {
    fn drop(&mut self) {
        self.task.iter().for_each(JoinHandle::abort);
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Waiting,
    Governed,
    Refused(String),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Ask {
    Govern {
        name: String,
        namespace: String,
        uid: String,
        addresses: Vec<IpAddr>,
    },
    Forget {
        name: String,
        namespace: String,
        uid: String,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Answer {
    Governed { version: String },
    Refused { reason: String },
    Forgotten {},
}

impl Adapter {
    /// A governor for the adapter that listens at `socket`, now or later. Works within a tokio runtime.
    pub fn new(socket: &Path) -> Self {
        Self {
            door: Arc::new(Door {
                socket: socket.to_owned(),
                answered: AtomicBool::new(true),
            }),
            pods: Mutex::default(),
        }
    }

    /// The conversation about a pod: the one that goes on, if it is about the same and not refused, or a new one.
    fn ask(&self, pod: &GovernedPod) -> watch::Receiver<State> {
        let PodName { name, namespace, uid } = pod.pod.clone();
        let key = (namespace.clone(), name.clone());
        let about = Ask::Govern {
            name,
            namespace,
            uid,
            addresses: pod.addresses.clone(),
        };
        let mut pods = self.pods();
        if let Some(known) = pods.get(&key).filter(|known| known.about == about)
            && !matches!(*known.state.borrow(), State::Refused(_))
        {
            return known.state.clone();
        }
        let before = pods.remove(&key).and_then(Conversation::into_forgetting);
        let (sender, state) = watch::channel(State::Waiting);
        let (door, question) = (Arc::clone(&self.door), about.clone());
        let task = tokio::spawn(async move {
            if let Some(forgetting) = before {
                let _ = forgetting.await;
            }
            govern(door, question, sender).await;
        });
        let conversation = Conversation {
            about,
            state: state.clone(),
            task: Some(task),
        };
        pods.insert(key, conversation);
        state
    }

    fn pods(&self) -> MutexGuard<'_, BTreeMap<(String, String), Conversation>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Governor for Adapter {
    async fn governed(&self, pod: &GovernedPod) -> Result<(), GovernorError> {
        if pod.pod.namespace.is_empty() {
            let message = "the runtime named no Kubernetes namespace, and the adapter knows pods by it";
            return Err(GovernorError(message.to_owned()));
        }
        let mut state = self.ask(pod);
        let said = state.wait_for(|state| *state != State::Waiting).await;
        match said.as_deref() {
            Ok(State::Refused(reason)) => Err(GovernorError(reason.clone())),
            Ok(_) => Ok(()),
            Err(_) => Err(GovernorError(
                "the pod was asked for anew, or forgotten, meanwhile".to_owned(),
            )),
        }
    }

    async fn resume(&self, pod: &GovernedPod) {
        if !pod.pod.namespace.is_empty() {
            self.ask(pod);
        }
    }

    async fn forget(&self, pod: &GovernedPod) {
        let PodName { name, namespace, uid } = pod.pod.clone();
        if namespace.is_empty() {
            return;
        }
        let key = (namespace.clone(), name.clone());
        let about = Ask::Forget { name, namespace, uid };
        let mut pods = self.pods();
        if pods
            .get(&key)
            .is_some_and(|known| !known.about.is_about(&pod.pod))
        {
            // A pod of that name was asked for anew; what the adapter knows is that one.
            return;
        }
        let task = tokio::spawn(forget(Arc::clone(&self.door), about.clone()));
        let (_, state) = watch::channel(State::Waiting);
        let conversation = Conversation {
            about,
            state,
            task: Some(task),
        };
        pods.insert(key, conversation);
        // Those that were taken are done.
        pods.retain(|_, known| {
            let over = known.task.as_ref().is_none_or(JoinHandle::is_finished);
            !over || matches!(known.about, Ask::Govern { .. })
        });
    }
}

impl Ask {
    fn is_about(&self, pod: &PodName) -> bool {
        match self {
            Self::Govern { uid, .. } | Self::Forget { uid, .. } => *uid == pod.uid,
        }
    }
}

/// Asks for a pod, and again whenever the adapter has gone.
async fn govern(door: Arc<Door>, about: Ask, state: watch::Sender<State>) {
    let mut wait = WAIT.0;
    loop {
        match door.ask(&about).await {
            Ok((mut stream, Answer::Governed { version })) => {
                tracing::debug!(?about, version, "governed");
                state.send_replace(State::Governed);
                wait = WAIT.0;
                // Nothing comes any more: what ends this is the end of the adapter.
                let _ = stream.read(&mut [0]).await;
            }
            Ok((_, Answer::Refused { reason })) => {
                tracing::warn!(?about, reason, "the adapter refuses a pod");
                // Who was governed goes on with what the proxy has.
                state.send_if_modified(|state| {
                    let waiting = *state == State::Waiting;
                    if waiting {
                        *state = State::Refused(reason);
                    }
                    waiting
                });
                return;
            }
            Ok((_, Answer::Forgotten {})) => {
                tracing::warn!(
                    ?about,
                    "the adapter gives an answer to something else; asked again"
                );
            }
            Err(_) => {}
        }
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(WAIT.1);
    }
}

/// Has a pod forgotten, however long the adapter is away.
async fn forget(door: Arc<Door>, about: Ask) {
    let mut wait = WAIT.0;
    loop {
        match door.ask(&about).await {
            Ok((_, Answer::Forgotten {})) => return,
            Ok((_, answer)) => tracing::warn!(?about, ?answer, "the adapter does not forget"),
            Err(_) => {}
        }
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(WAIT.1);
    }
}

impl Door {
    /// One question, and the answer whenever it comes.
    async fn ask(&self, about: &Ask) -> io::Result<(UnixStream, Answer)> {
        let asked = self.converse(about).await;
        let before = self.answered.swap(asked.is_ok(), Ordering::Relaxed);
        match &asked {
            Err(error) if before => {
                let socket = self.socket.display();
                tracing::warn!("the adapter at {socket} does not answer, and is tried again: {error}");
            }
            Ok(_) if !before => tracing::info!("the adapter at {} answers again", self.socket.display()),
            _ => {}
        }
        asked
    }

    async fn converse(&self, about: &Ask) -> io::Result<(UnixStream, Answer)> {
        let mut stream = UnixStream::connect(&self.socket).await?;
        stream.write_all(&frame(about)?).await?;
        let mut length = [0; 4];
        stream.read_exact(&mut length).await?;
        let mut body = vec![0; body_length(length)?];
        stream.read_exact(&mut body).await?;
        let answer = serde_json::from_slice(&body)?;
        Ok((stream, answer))
    }
}

fn frame(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let body = serde_json::to_vec(message)?;
    let length = u32::try_from(body.len()).ok().filter(|_| body.len() <= MAX_BODY);
    let length = length.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    Ok([&length.to_be_bytes()[..], &body].concat())
}

#[cfg(test)]
mod tests {
    use dpumesh_core::DpuId;
    use tokio::net::UnixListener;

    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    /// An adapter of a few lines: what it is asked, it hands to the test, which answers.
    struct Fake {
        listener: UnixListener,
    }

    impl Fake {
        fn at(socket: &Path) -> Self {
            let _ = std::fs::remove_file(socket);
            Self {
                listener: UnixListener::bind(socket).expect("bound"),
            }
        }

        /// The next question as JSON, and the connection it came by.
        async fn asked(&self) -> (UnixStream, String) {
            let asked = async {
                let (mut stream, _) = self.listener.accept().await.expect("accepted");
                let length = stream.read_u32().await.expect("a length");
                let mut body = vec![0; length as usize];
                stream.read_exact(&mut body).await.expect("a body");
                (stream, String::from_utf8(body).expect("text"))
            };
            tokio::time::timeout(LONG, asked).await.expect("asked in time")
        }
    }

    async fn answer(stream: &mut UnixStream, json: &str) {
        stream.write_u32(json.len() as u32).await.expect("written");
        stream.write_all(json.as_bytes()).await.expect("written");
    }

    fn pod(uid: &str) -> GovernedPod {
        let pod = PodName {
            name: "web-1".to_owned(),
            namespace: "shop".to_owned(),
            uid: uid.to_owned(),
        };
        let addresses = ["10.244.1.2", "fd00::2"].map(|text| text.parse().expect("an address"));
        GovernedPod::new(DpuId("dpu0".to_owned()), pod, addresses.to_vec(), 7)
    }

    const GOVERN: &str =
        r#"{"govern":{"name":"web-1","namespace":"shop","uid":"u1","addresses":["10.244.1.2","fd00::2"]}}"#;
    const GOVERNED: &str = r#"{"governed":{"version":"v1"}}"#;
    const FORGET: &str = r#"{"forget":{"name":"web-1","namespace":"shop","uid":"u1"}}"#;
    const FORGOTTEN: &str = r#"{"forgotten":{}}"#;

    #[tokio::test]
    async fn a_pod_is_asked_for_once_and_governed_when_the_answer_comes() {
        let folder = tempfile::tempdir().expect("a folder");
        let socket = folder.path().join("adapter.sock");
        let (fake, adapter) = (Fake::at(&socket), Adapter::new(&socket));
        let u1 = pod("u1");
        let mut wait = Box::pin(adapter.governed(&u1));
        tokio::select! {
            _ = &mut wait => panic!("nobody answered"),
            (mut stream, text) = fake.asked() => {
                assert_eq!(text, GOVERN);
                // A wait that is given up and taken up again is the same question.
                drop(wait);
                let again = adapter.governed(&u1);
                answer(&mut stream, GOVERNED).await;
                tokio::time::timeout(LONG, again).await.expect("in time").expect("governed");
                tokio::time::timeout(LONG, adapter.governed(&u1)).await.expect("at once").expect("governed");
            }
        }
    }

    #[tokio::test]
    async fn an_adapter_that_comes_back_is_asked_again_and_the_pod_stays_governed() {
        let folder = tempfile::tempdir().expect("a folder");
        let socket = folder.path().join("adapter.sock");
        let (adapter, u1) = (Adapter::new(&socket), pod("u1"));
        let wait = adapter.governed(&u1);
        let fake = async {
            // It was away when the pod came.
            tokio::time::sleep(WAIT.0 * 3).await;
            let fake = Fake::at(&socket);
            let (mut stream, _) = fake.asked().await;
            answer(&mut stream, GOVERNED).await;
            (fake, stream)
        };
        let (governed, (fake, stream)) = tokio::join!(wait, fake);
        governed.expect("governed");
        drop((fake, stream));
        let fake = Fake::at(&socket);
        let (mut stream, text) = fake.asked().await;
        assert_eq!(text, GOVERN);
        adapter.governed(&u1).await.expect("it has been all the time");
        answer(&mut stream, r#"{"refused":{"reason":"not any more"}}"#).await;
        adapter.governed(&u1).await.expect("what the proxy has, it keeps");
    }

    #[tokio::test]
    async fn an_agent_that_restarts_asks_for_the_pods_it_has() {
        let folder = tempfile::tempdir().expect("a folder");
        let socket = folder.path().join("adapter.sock");
        let (fake, adapter) = (Fake::at(&socket), Adapter::new(&socket));
        adapter.resume(&pod("u1")).await;
        let (_stream, text) = fake.asked().await;
        assert_eq!(text, GOVERN);
    }

    #[tokio::test]
    async fn a_refusal_is_told_with_its_reason() {
        let folder = tempfile::tempdir().expect("a folder");
        let socket = folder.path().join("adapter.sock");
        let (fake, adapter) = (Fake::at(&socket), Adapter::new(&socket));
        for reason in ["no binding", "still none"] {
            let json = format!(r#"{{"refused":{{"reason":"{reason}"}}}}"#);
            let refuse = async {
                let (mut stream, _) = fake.asked().await;
                answer(&mut stream, &json).await;
            };
            let u1 = pod("u1");
            let (told, ()) = tokio::join!(adapter.governed(&u1), refuse);
            assert_eq!(told, Err(GovernorError(reason.to_owned())));
        }
    }

    #[tokio::test]
    async fn a_pod_that_is_gone_is_forgotten_although_the_adapter_was_away() {
        let folder = tempfile::tempdir().expect("a folder");
        let socket = folder.path().join("adapter.sock");
        let adapter = Adapter::new(&socket);
        adapter.resume(&pod("u1")).await;
        tokio::time::timeout(LONG, adapter.forget(&pod("u1")))
            .await
            .expect("it does not wait");
        let fake = Fake::at(&socket);
        let (mut stream, text) = fake.asked().await;
        assert_eq!(text, FORGET, "and not asked for any more");
        answer(&mut stream, FORGOTTEN).await;
    }

    #[tokio::test]
    async fn a_pod_that_is_asked_for_again_is_asked_for_after_it_was_forgotten() {
        let folder = tempfile::tempdir().expect("a folder");
        let socket = folder.path().join("adapter.sock");
        let (fake, adapter) = (Fake::at(&socket), Adapter::new(&socket));
        adapter.forget(&pod("u1")).await;
        adapter.resume(&pod("u1")).await;
        let (mut stream, text) = fake.asked().await;
        assert_eq!(text, FORGET);
        answer(&mut stream, FORGOTTEN).await;
        assert_eq!(fake.asked().await.1, GOVERN);
    }

    #[tokio::test]
    async fn a_new_pod_of_the_same_name_takes_the_place_of_the_old_one() {
        let folder = tempfile::tempdir().expect("a folder");
        let socket = folder.path().join("adapter.sock");
        let adapter = Adapter::new(&socket);
        adapter.resume(&pod("u1")).await;
        adapter.resume(&pod("u2")).await;
        adapter.forget(&pod("u1")).await;
        let fake = Fake::at(&socket);
        let (_stream, text) = fake.asked().await;
        assert_eq!(text, GOVERN.replace("u1", "u2"));
    }

    #[tokio::test]
    async fn nonsense_is_no_answer_and_asked_again() {
        let folder = tempfile::tempdir().expect("a folder");
        let socket = folder.path().join("adapter.sock");
        let (fake, adapter) = (Fake::at(&socket), Adapter::new(&socket));
        adapter.resume(&pod("u1")).await;
        for nonsense in [
            &b"\xff\xff\xff\xff"[..],
            b"\0\0\0\x02{]",
            b"\0\0",
            b"\0\0\0\x02{}",
        ] {
            let (mut stream, text) = fake.asked().await;
            assert_eq!(text, GOVERN);
            stream.write_all(nonsense).await.expect("written");
        }
        let (mut stream, _) = fake.asked().await;
        answer(&mut stream, GOVERNED).await;
        adapter.governed(&pod("u1")).await.expect("governed");
    }

    #[tokio::test]
    async fn a_pod_outside_kubernetes_is_refused_at_once() {
        let adapter = Adapter::new(Path::new("/nowhere"));
        let mut pod = pod("u1");
        pod.pod.namespace.clear();
        let error = adapter.governed(&pod).await.expect_err("no namespace");
        assert!(error.0.contains("namespace"), "{error}");
    }
}
