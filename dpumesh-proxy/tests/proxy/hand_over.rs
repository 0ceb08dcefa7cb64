//! A newer proxy takes over from an older one while clients go on asking.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use dpumesh_proxy::program::{Options, Proxy};

use crate::harness::{Client, await_true, bootstrap};

fn saying(what: &str) -> String {
    let routes = format!(
        "[{{match: {{prefix: /}}, direct_response: {{status: 200, body: {{inline_string: {what}}}}}}}]"
    );
    bootstrap(&routes, "[]", "")
}

fn start(folder: &Path, name: &str, text: &str, concurrency: usize) -> Result<Proxy, String> {
    let path: PathBuf = folder.join(format!("{name}.yaml"));
    std::fs::write(&path, text).unwrap();
    let options = Options {
        concurrency,
        drain_time: Duration::from_secs(2),
        hand_over: Some(folder.join("hand-over")),
        ..Options::new(path)
    };
    Proxy::start(options).map_err(|error| error.to_string())
}

fn serves_hand_overs(folder: &Path) {
    await_true("the socket", || folder.join("hand-over").exists());
}

fn says(web: SocketAddr) -> String {
    Client::connect(web).get("/").text()
}

/// Asks until it is told to stop: on a new connection each time, or on one as long as it lasts. How often it was answered.
fn ask(web: SocketAddr, stop: &AtomicBool, reuses: bool) -> usize {
    let mut answered = 0;
    let mut client = Client::connect(web);
    while !stop.load(Ordering::Relaxed) {
        let answer = client.get("/");
        assert_eq!(answer.status(), 200);
        answered += 1;
        if !reuses || answer.header("connection") == Some("close") {
            client = Client::connect(web);
        }
    }
    answered
}

#[test]
fn no_request_fails_while_a_newer_proxy_takes_over() {
    let folder = tempfile::tempdir().unwrap();
    let first = start(folder.path(), "first", &saying("first"), 2).unwrap();
    let (web, admin) = (
        first.listener_address("web").unwrap(),
        first.admin_address().unwrap(),
    );
    serves_hand_overs(folder.path());
    let (stop, answered) = (AtomicBool::new(false), AtomicUsize::new(0));
    let last = std::thread::scope(|scope| {
        for reuses in [true, true, false, false] {
            let (stop, answered) = (&stop, &answered);
            scope.spawn(move || answered.fetch_add(ask(web, stop, reuses), Ordering::Relaxed));
        }
        std::thread::sleep(Duration::from_millis(200));
        // More workers than sockets were given, then fewer.
        let second = start(folder.path(), "second", &saying("second"), 3).unwrap();
        first.wait();
        assert_eq!(second.listener_address("web"), Some(web));
        assert_eq!(second.admin_address(), Some(admin));
        assert_eq!(says(web), "second");
        let third = start(folder.path(), "third", &saying("third"), 1).unwrap();
        second.wait();
        assert_eq!(says(web), "third");
        let mut asked = Client::connect(admin);
        asked.send("GET /server_info HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n\r\n");
        assert!(asked.receive().text().contains("third.yaml"));
        std::thread::sleep(Duration::from_millis(200));
        stop.store(true, Ordering::Relaxed);
        third
    });
    drop(last);
    assert!(answered.load(Ordering::Relaxed) > 100);
}

#[test]
fn nothing_changes_until_the_newer_one_is_ready() {
    let folder = tempfile::tempdir().unwrap();
    let first = start(folder.path(), "first", &saying("first"), 1).unwrap();
    let web = first.listener_address("web").unwrap();
    serves_hand_overs(folder.path());
    let refused = start(folder.path(), "bad", "nonsense: {}", 1).unwrap_err();
    assert!(refused.contains("nonsense"), "{refused}");
    // One that goes away behind the sockets, and one that speaks otherwise.
    for hello in ["dpumesh-proxy hand-over 1\n", "dpumesh-proxy hand-over 2\n"] {
        let mut newer = UnixStream::connect(folder.path().join("hand-over")).unwrap();
        newer.write_all(hello.as_bytes()).unwrap();
        newer.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        let mut octets = Vec::new();
        // It ends by itself for who speaks otherwise, else it waits for more.
        let _ = newer.read_to_end(&mut octets);
        assert_eq!(octets.is_empty(), hello.contains('2'), "{hello}");
    }
    let listens = |mode: u32| {
        use std::os::unix::fs::PermissionsExt;
        let metadata = std::fs::metadata(folder.path().join("hand-over")).unwrap();
        metadata.permissions().mode() & 0o777 == mode
    };
    assert!(listens(0o600));
    assert_eq!(says(web), "first");
    let second = start(folder.path(), "second", &saying("second"), 1).unwrap();
    first.wait();
    assert_eq!(says(web), "second");
    drop(second);
    // Nobody serves behind the name any more: the next one begins by itself.
    let third = start(folder.path(), "third", &saying("third"), 1).unwrap();
    assert_eq!(says(third.listener_address("web").unwrap()), "third");
}
