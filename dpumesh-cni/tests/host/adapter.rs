//! The agent and the node's adapter: who waits for whom, and what a restart of either costs.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use crate::world::{Pod, World, address, eventually, ping};

/// An adapter of a few lines: it governs every pod, or leaves the question open.
struct Fake {
    path: PathBuf,
    asked: Arc<Mutex<Vec<Value>>>,
    ended: Arc<AtomicBool>,
    accepting: Option<thread::JoinHandle<()>>,
}

impl Fake {
    fn start(path: &Path, governs: bool) -> Self {
        let listener = UnixListener::bind(path).expect("bound");
        listener.set_nonblocking(true).expect("set");
        let (asked, ended) = (Arc::<Mutex<Vec<Value>>>::default(), Arc::<AtomicBool>::default());
        let (all, over) = (Arc::clone(&asked), Arc::clone(&ended));
        let accepting = thread::spawn(move || {
            let mut streams: Vec<UnixStream> = Vec::new();
            while !over.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((stream, _)) => {
                        stream.set_nonblocking(false).expect("set");
                        streams.push(stream.try_clone().expect("copied"));
                        let all = Arc::clone(&all);
                        thread::spawn(move || while converse(&stream, &all, governs).is_some() {});
                    }
                    Err(_) => thread::sleep(Duration::from_millis(5)),
                }
            }
            for stream in streams {
                let _ = stream.shutdown(Shutdown::Both);
            }
        });
        Self {
            path: path.to_owned(),
            asked,
            ended,
            accepting: Some(accepting),
        }
    }

    fn was_asked(&self, question: &Value) -> bool {
        self.asked.lock().expect("whole").contains(question)
    }
}

impl Drop for Fake {
    /// Ends as a program does: nobody listens, every connection is over.
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
        self.ended.store(true, Ordering::Relaxed);
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
    }
}

/// One question and its answer; `None` when the connection is over.
fn converse(mut stream: &UnixStream, all: &Mutex<Vec<Value>>, governs: bool) -> Option<()> {
    let mut length = [0; 4];
    stream.read_exact(&mut length).ok()?;
    let mut body = vec![0; u32::from_be_bytes(length) as usize];
    stream.read_exact(&mut body).ok()?;
    let question: Value = serde_json::from_slice(&body).expect("JSON");
    let answer = match question.get("govern") {
        Some(_) if governs => Some(json!({"governed": {"version": "v1"}})),
        Some(_) => None,
        None => Some(json!({"forgotten": {}})),
    };
    all.lock().expect("whole").push(question);
    if let Some(answer) = answer {
        let body = answer.to_string();
        let length = u32::try_from(body.len()).expect("short").to_be_bytes();
        stream.write_all(&[&length, body.as_bytes()].concat()).ok()?;
    }
    Some(())
}

fn govern(container: &str, address: IpAddr) -> Value {
    let name = format!("pod-{container}");
    json!({"govern": {"name": name, "namespace": "shop", "uid": "", "addresses": [address]}})
}

pub(crate) fn the_adapter_says_when_a_pod_is_governed() {
    let mut world = World::without_agent(1);
    let runtime = world.runtime("1.0.0");
    let path = world.path("adapter.sock");
    let socket = path.to_str().expect("UTF-8").to_owned();
    let (a, b) = (Pod::new("a"), Pod::new("b"));

    // An adapter that is away, and one that leaves the question open, are waited for as long as the agent is told to.
    world.start_agent(&["--adapter", &socket, "--govern-within", "0.5"]);
    assert_eq!(a.add(&runtime).expect_err("nobody governs")["code"], 11);
    {
        let silent = Fake::start(&path, false);
        let error = a.add(&runtime).expect_err("not governed");
        assert!(
            error["msg"]
                .as_str()
                .expect("a text")
                .contains("not acknowledged"),
            "{error}"
        );
        let forget = json!({"forget": {"name": "pod-a", "namespace": "shop", "uid": ""}});
        eventually("the pod that was given up is forgotten", || {
            silent.was_asked(&forget)
        });
    }
    world.assert_empty();

    let more = ["--adapter", &socket, "--govern-within", "20"];
    world.start_agent(&more);
    let (from, to, first) = thread::scope(|scope| {
        let add = scope.spawn(|| (a.add(&runtime), b.add(&runtime)));
        // It comes while the first ADD waits.
        eventually("the ADD has an address", || world.given_addresses() > 0);
        let adapter = Fake::start(&path, true);
        let (first, second) = add.join().expect("ended");
        (
            address(&first.expect("governed")),
            address(&second.expect("governed")),
            adapter,
        )
    });
    assert!(ping(&a, to) && ping(&b, from));
    assert!(first.was_asked(&govern("a", from)) && first.was_asked(&govern("b", to)));

    // One that went and came back is asked again; nobody's traffic waits for its answer.
    drop(first);
    assert!(ping(&a, to), "governed pods stay governed");
    let second = Fake::start(&path, false);
    eventually("the adapter is asked again", || {
        second.was_asked(&govern("a", from)) && second.was_asked(&govern("b", to))
    });
    assert!(ping(&a, to) && ping(&b, from));

    // So is it when the agent went and came back.
    world.agent.take().expect("runs").kill();
    drop(second);
    let third = Fake::start(&path, false);
    world.start_agent(&more);
    eventually("the agent asks for the pods it has", || {
        third.was_asked(&govern("a", from)) && third.was_asked(&govern("b", to))
    });
    assert!(ping(&a, to) && ping(&b, from));

    for (pod, container) in [(&a, "a"), (&b, "b")] {
        pod.del(&runtime, None).expect("deleted");
        let name = format!("pod-{container}");
        let forget = json!({"forget": {"name": name, "namespace": "shop", "uid": ""}});
        eventually("the pod is forgotten", || third.was_asked(&forget));
    }
    world.assert_empty();
}
