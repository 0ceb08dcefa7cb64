//! Upgrades and CONNECT: which are allowed, what opens a tunnel, and that nothing gets through before that.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::envoy::at_both;
use crate::harness::{Client, bootstrap_with, cluster, read_message};

/// An endpoint that opens tunnels and sends back what comes by them. What came before it agreed is kept.
pub(crate) struct Opener {
    pub(crate) address: SocketAddr,
    /// Request heads, as they came.
    heads: Arc<Mutex<Vec<String>>>,
    /// What came behind heads while nothing was agreed upon.
    pub(crate) early: Arc<Mutex<Vec<u8>>>,
}

impl Opener {
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (heads, early) = (
            Arc::<Mutex<Vec<String>>>::default(),
            Arc::<Mutex<Vec<u8>>>::default(),
        );
        let (seen, kept) = (Arc::clone(&heads), Arc::clone(&early));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(stream) = stream else { return };
                let (seen, kept) = (Arc::clone(&seen), Arc::clone(&kept));
                // A broken connection ends the thread; the test sees it from the other side.
                std::thread::spawn(move || open(stream, &seen, &kept));
            }
        });
        Self {
            address,
            heads,
            early,
        }
    }

    pub(crate) fn last_head(&self) -> String {
        self.heads.lock().unwrap().last().cloned().unwrap_or_default()
    }
}

fn open(mut stream: TcpStream, heads: &Mutex<Vec<String>>, early: &Mutex<Vec<u8>>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head)? == 0 {
            return Ok(());
        }
    }
    heads.lock().unwrap().push(head.clone());
    // Time for what must not come, to come.
    stream.set_read_timeout(Some(Duration::from_millis(200)))?;
    let mut octets = [0; 1024];
    if let Ok(n) = reader.read(&mut octets) {
        early.lock().unwrap().extend_from_slice(&octets[..n]);
    }
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    if head.contains("/no ") || head.starts_with("CONNECT no:1 ") {
        write!(stream, "HTTP/1.1 403 No\r\ncontent-length: 4\r\n\r\nnay\n")?;
    } else if head.starts_with("CONNECT ") {
        write!(stream, "HTTP/1.1 200 Fine\r\nx-opened: yes\r\n\r\nfirst,")?;
    } else if head.contains("/other ") {
        write!(stream, "HTTP/1.1 101 Fine\r\nconnection: upgrade\r\n\r\n")?;
    } else {
        write!(
            stream,
            "HTTP/1.1 101 Fine\r\nupgrade: websocket\r\nconnection: Upgrade\r\nsec-websocket-accept: x\r\n\r\nfirst,"
        )?;
    }
    loop {
        let n = reader.read(&mut octets)?;
        if n == 0 {
            return stream.shutdown(std::net::Shutdown::Write);
        }
        stream.write_all(&octets[..n])?;
        if octets[..n].ends_with(b"bye") {
            return Ok(());
        }
    }
}

const WEBSOCKET: &str = "GET /PATH HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: k\r\n\r\n";

fn receive_head(client: &mut Client) -> crate::harness::Message {
    read_message(&mut client.reader, true, false)
        .unwrap()
        .expect("a response")
}

fn read_text(client: &mut Client, length: usize) -> String {
    let mut text = vec![0; length];
    client.reader.read_exact(&mut text).unwrap();
    String::from_utf8(text).unwrap()
}

#[test]
fn a_websocket_is_opened_by_101_and_carries_octets_both_ways() {
    let opener = Opener::start();
    let routes = "[{match: {prefix: /off}, route: {cluster: app, upgrade_configs: [{upgrade_type: websocket, enabled: false}]}}, \
                  {match: {prefix: /}, route: {cluster: app, prefix_rewrite: /new/}}]";
    at_both(
        |_, _| {
            let clusters = format!("[{}]", cluster("app", &[opener.address], ""));
            bootstrap_with(
                routes,
                &clusters,
                "upgrade_configs: [{upgrade_type: WebSocket}]",
                "",
                "",
            )
        },
        |subject, _| {
            let mut client = subject.client();
            client.send(WEBSOCKET.replace("PATH", "a"));
            let response = receive_head(&mut client);
            let name = subject.name();
            assert_eq!(response.status(), 101, "{name}");
            assert_eq!(response.header("upgrade"), Some("websocket"), "{name}");
            assert_eq!(response.header("connection"), Some("Upgrade"), "{name}");
            assert_eq!(response.header("sec-websocket-accept"), Some("x"), "{name}");
            for absent in ["content-length", "transfer-encoding"] {
                assert_eq!(response.header(absent), None, "{name}");
            }
            assert_eq!(read_text(&mut client, 6), "first,", "{name}");
            let head = opener.last_head();
            assert!(head.starts_with("GET /new/a HTTP/1.1\r\n"), "{name}: {head}");
            for line in [
                "connection: Upgrade\r\n",
                "upgrade: websocket\r\n",
                "sec-websocket-key: k\r\n",
            ] {
                assert!(
                    head.to_lowercase().contains(&line.to_lowercase()),
                    "{name}: {head}"
                );
            }
            assert!(
                !head.contains("content-length") && !head.contains("transfer-encoding"),
                "{name}: {head}"
            );
            assert_eq!(subject.await_stat("http.web.downstream_cx_upgrades_active", 1), 1);
            client.send("hello");
            assert_eq!(read_text(&mut client, 5), "hello");
            let long = "x".repeat(300_000);
            let mut writer = client.reader.get_ref().try_clone().unwrap();
            let sent = long.clone();
            let writing = std::thread::spawn(move || writer.write_all(sent.as_bytes()).unwrap());
            assert!(read_text(&mut client, long.len()) == long);
            writing.join().unwrap();
            // The endpoint ends it.
            client.send("bye");
            assert_eq!(read_text(&mut client, 3), "bye");
            assert!(client.is_closed(), "{name}");
            assert_eq!(subject.await_stat("http.web.downstream_cx_upgrades_total", 1), 1);
            assert_eq!(subject.await_stat("http.web.downstream_rq_1xx", 1), 1, "{name}");
            // A route may forbid it.
            let mut client = subject.client();
            client.send(WEBSOCKET.replace("PATH", "off"));
            let response = client.receive();
            assert_eq!((response.status(), response.text().as_str()), (403, ""), "{name}");
            assert!(client.is_closed(), "{name}");
            assert_eq!(
                subject.await_stat("http.web.downstream_rq_ws_on_non_ws_route", 1),
                1
            );
        },
    );
}

#[test]
fn only_what_is_allowed_is_upgraded() {
    let opener = Opener::start();
    let routes = "[{match: {prefix: /here}, route: {cluster: app, upgrade_configs: [{upgrade_type: foo}]}}, {match: {prefix: /}, route: {cluster: app}}]";
    at_both(
        |_, _| {
            let clusters = format!("[{}]", cluster("app", &[opener.address], ""));
            bootstrap_with(routes, &clusters, "", "", "")
        },
        |subject, _| {
            for (path, upgrade, status) in [
                ("/here", "foo", 101),
                ("/here", "FOO", 101),
                ("/here", "websocket", 403),
                ("/there", "foo", 403),
                ("/here", "foo, websocket", 403),
                ("/here", "foo\r\nUpgrade: websocket", 403),
            ] {
                let before = opener.heads.lock().unwrap().len();
                let mut client = subject.client();
                client.send(format!(
                    "GET {path} HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, Upgrade\r\nUpgrade: {upgrade}\r\n\r\n"
                ));
                // The endpoint agrees to something else than what was asked for: that is no agreement here.
                let response = receive_head(&mut client);
                let ours = subject.name() == "ours" && status == 101;
                let wanted = if ours { 502 } else { status };
                assert_eq!(
                    response.status(),
                    wanted,
                    "{path} {upgrade} at {}",
                    subject.name()
                );
                let asked = opener.heads.lock().unwrap().len() - before;
                assert_eq!(
                    asked,
                    usize::from(status == 101),
                    "{path} {upgrade} at {}",
                    subject.name()
                );
            }
        },
    );
}

#[test]
fn nothing_goes_through_before_the_endpoint_agrees() {
    let opener = Opener::start();
    let manager = "upgrade_configs: [{upgrade_type: websocket}, {upgrade_type: CONNECT}]";
    let routes = "[{match: {connect_matcher: {}}, route: {cluster: app}}, {match: {prefix: /}, route: {cluster: app}}]";
    let clusters = format!("[{}]", cluster("app", &[opener.address], ""));
    let running = crate::harness::Running::start(&bootstrap_with(routes, &clusters, manager, "", ""));
    let smuggled = "GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n";
    for (request, status) in [
        (WEBSOCKET.replace("PATH", "no"), 403),
        (WEBSOCKET.replace("PATH", "other"), 502),
        ("CONNECT no:1 HTTP/1.1\r\nHost: no:1\r\n\r\n".to_owned(), 403),
    ] {
        let before = opener.heads.lock().unwrap().len();
        let mut client = running.client();
        client.send(format!("{request}{smuggled}"));
        assert_eq!(client.receive().status(), status, "{request}");
        assert!(client.is_closed(), "{request}");
        assert_eq!(opener.heads.lock().unwrap().len(), before + 1, "{request}");
    }
    assert_eq!(*opener.early.lock().unwrap(), b"");
    // What was sent ahead goes through once it is agreed.
    let mut client = running.client();
    client.send(format!("{}ahead", WEBSOCKET.replace("PATH", "a")));
    assert_eq!(receive_head(&mut client).status(), 101);
    assert_eq!(read_text(&mut client, 11), "first,ahead");
    assert_eq!(*opener.early.lock().unwrap(), b"");
    // A body makes it no request for a tunnel.
    let before = opener.heads.lock().unwrap().len();
    for body in [
        "Content-Length: 3\r\n\r\nabc",
        "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ] {
        for front in [
            "GET /a HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n",
            "CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n",
        ] {
            let mut client = running.client();
            client.send(format!("{front}{body}"));
            assert_eq!(client.receive().status(), 400, "{front}{body}");
            assert!(client.is_closed());
        }
    }
    assert_eq!(opener.heads.lock().unwrap().len(), before);
}

#[test]
fn connect_is_forwarded_or_ends_here() {
    let opener = Opener::start();
    let echo = TcpListener::bind("127.0.0.1:0").unwrap();
    let raw = echo.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in echo.incoming() {
            let Ok(mut stream) = stream else { return };
            std::thread::spawn(move || {
                let mut octets = [0; 64];
                while let Ok(n) = stream.read(&mut octets) {
                    if n == 0 || stream.write_all(&octets[..n]).is_err() || octets[..n].ends_with(b"bye") {
                        return;
                    }
                }
            });
        }
    });
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap();
    let closed = nobody.local_addr().unwrap();
    drop(nobody);
    let end = "upgrade_configs: [{upgrade_type: CONNECT, connect_config: {}}]";
    let routes = format!(
        "[{{match: {{connect_matcher: {{}}, headers: [{{name: x-end, present_match: true}}]}}, route: {{cluster: raw, {end}}}}}, \
          {{match: {{connect_matcher: {{}}, headers: [{{name: x-closed, present_match: true}}]}}, route: {{cluster: closed, {end}}}}}, \
          {{match: {{connect_matcher: {{}}, headers: [{{name: x-off, present_match: true}}]}}, route: {{cluster: app, upgrade_configs: [{{upgrade_type: CONNECT, enabled: false}}]}}}}, \
          {{match: {{connect_matcher: {{}}, headers: [{{name: x-none, present_match: true, invert_match: true}}]}}, route: {{cluster: app}}}}, \
          {{match: {{prefix: /}}, direct_response: {{status: 201}}}}]"
    );
    at_both(
        |_, _| {
            let clusters = format!(
                "[{}, {}, {}]",
                cluster("app", &[opener.address], ""),
                cluster("raw", &[raw], ""),
                cluster("closed", &[closed], "")
            );
            bootstrap_with(
                &routes,
                &clusters,
                "upgrade_configs: [{upgrade_type: CONNECT}]",
                "",
                "",
            )
        },
        |subject, _| {
            let name = subject.name();
            let connect = |more: &str| {
                let mut client = subject.client();
                client.send(format!(
                    "CONNECT far.example:443 HTTP/1.1\r\nHost: far.example:443\r\n{more}\r\n"
                ));
                client
            };
            let mut client = connect("");
            let response = receive_head(&mut client);
            assert_eq!(response.status(), 200, "{name}");
            assert_eq!(response.header("x-opened"), Some("yes"), "{name}");
            assert_eq!(response.header("transfer-encoding"), None, "{name}");
            assert_eq!(response.header("content-length"), None, "{name}");
            assert_eq!(read_text(&mut client, 6), "first,", "{name}");
            client.send("to and fro bye");
            assert_eq!(read_text(&mut client, 14), "to and fro bye", "{name}");
            assert!(client.is_closed(), "{name}");
            let head = opener.last_head();
            assert!(
                head.starts_with("CONNECT far.example:443 HTTP/1.1\r\nhost: far.example:443\r\n"),
                "{name}: {head}"
            );
            let mut client = connect("X-End: 1\r\n");
            let response = receive_head(&mut client);
            assert_eq!(response.status(), 200, "{name}");
            assert_eq!(response.header("transfer-encoding"), None, "{name}");
            client.send("plain octets bye");
            assert_eq!(read_text(&mut client, 16), "plain octets bye", "{name}");
            assert!(client.is_closed(), "{name}");
            assert_eq!(connect("X-Closed: 1\r\n").receive().status(), 503, "{name}");
            assert_eq!(connect("X-Off: 1\r\n").receive().status(), 403, "{name}");
            assert_eq!(connect("X-None: 1\r\n").receive().status(), 404, "{name}");
            assert_eq!(subject.client().get("/").status(), 201, "{name}");
            assert_eq!(
                subject.await_stat("http.web.downstream_cx_upgrades_total", 4),
                4,
                "{name}"
            );
        },
    );
}

#[test]
fn a_silent_tunnel_ends() {
    let opener = Opener::start();
    let routes = "[{match: {prefix: /}, route: {cluster: app, timeout: 0.7s, idle_timeout: 1s}}]";
    at_both(
        |_, _| {
            let clusters = format!("[{}]", cluster("app", &[opener.address], ""));
            bootstrap_with(
                routes,
                &clusters,
                "upgrade_configs: [{upgrade_type: websocket}]",
                "",
                "",
            )
        },
        |subject, _| {
            let mut client = subject.client();
            client.send(WEBSOCKET.replace("PATH", "a"));
            assert_eq!(receive_head(&mut client).status(), 101, "{}", subject.name());
            assert_eq!(read_text(&mut client, 6), "first,");
            // The route's timeout counts until it is open.
            for _ in 0..3 {
                std::thread::sleep(Duration::from_millis(300));
                client.send("beat");
                assert_eq!(read_text(&mut client, 4), "beat", "{}", subject.name());
            }
            assert!(client.is_closed(), "{}", subject.name());
            assert_eq!(subject.await_stat("http.web.downstream_rq_idle_timeout", 1), 1);
        },
    );
}
