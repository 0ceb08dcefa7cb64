//! Tunnels of clients that speak HTTP/2: CONNECT, and upgrades by `:protocol` (RFC 8441).

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::sync::mpsc;
use std::time::Duration;

use bytes::Bytes;
use h2::ext::Protocol;
use h2::{Reason, RecvStream, SendStream};
use http::{Request, Response};

use crate::envoy::{Subject, at_both};
use crate::harness::{bootstrap_with, cluster};
use crate::http2::{Http2Client, client};
use crate::tunnel::Opener;

const MANAGER: &str = "codec_type: HTTP2\n          http2_protocol_options: {allow_connect: true}\n          \
                       upgrade_configs: [{upgrade_type: websocket}, {upgrade_type: CONNECT}]";

/// An endpoint that hands out what connects to it.
struct Raw {
    address: SocketAddr,
    accepted: mpsc::Receiver<std::net::TcpStream>,
}

impl Raw {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (send, accepted) = mpsc::channel();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(stream) = stream else { return };
                stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
                if send.send(stream).is_err() {
                    return;
                }
            }
        });
        Self { address, accepted }
    }

    fn accept(&self) -> std::net::TcpStream {
        self.accepted
            .recv_timeout(Duration::from_secs(20))
            .expect("a connection")
    }
}

fn bootstrap(app: SocketAddr, raw: SocketAddr) -> String {
    let end = "upgrade_configs: [{upgrade_type: CONNECT, connect_config: {}}]";
    let routes = format!(
        "[{{match: {{connect_matcher: {{}}, headers: [{{name: x-app, present_match: true}}]}}, route: {{cluster: app}}}}, \
          {{match: {{connect_matcher: {{}}, headers: [{{name: x-off, present_match: true}}]}}, route: {{cluster: app, upgrade_configs: [{{upgrade_type: CONNECT, enabled: false}}]}}}}, \
          {{match: {{connect_matcher: {{}}}}, route: {{cluster: raw, {end}}}}}, {{match: {{prefix: /}}, route: {{cluster: app}}}}]"
    );
    let clusters = format!("[{}, {}]", cluster("app", &[app], ""), cluster("raw", &[raw], ""));
    bootstrap_with(&routes, &clusters, MANAGER, "", "")
}

/// One stream of a client, and what reads and writes it.
struct Stream {
    client: Http2Client,
    response: Option<Response<RecvStream>>,
    out: SendStream<Bytes>,
}

impl Stream {
    fn begin(subject: &Subject, request: Request<()>) -> Self {
        let mut client = client(subject);
        // The server says with its first SETTINGS whether it knows `:protocol`.
        let send = client.send.clone();
        client.send = client.runtime.block_on(send.ready()).unwrap();
        crate::harness::await_true("settings have come", || {
            client.send.is_extended_connect_protocol_enabled()
        });
        let (response, out) = client.begin(request, false);
        let response = client.runtime.block_on(response).unwrap();
        Self {
            client,
            response: Some(response),
            out,
        }
    }

    fn status(&self) -> u16 {
        self.response.as_ref().unwrap().status().as_u16()
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.response.as_ref().unwrap().headers().get(name)?.to_str().ok()
    }

    fn write(&mut self, data: &'static [u8], ends: bool) {
        let _inside = self.client.runtime.enter();
        self.out.send_data(Bytes::from_static(data), ends).unwrap();
    }

    /// What comes until the endpoint's end, which is the stream's. (Envoy resets the stream with CONNECT_ERROR.)
    fn rest(&mut self, subject: &Subject) -> String {
        let body = self.response.as_mut().unwrap().body_mut();
        self.client.runtime.block_on(async {
            let mut text = Vec::new();
            loop {
                match body.data().await {
                    Some(Ok(data)) => text.extend_from_slice(&data),
                    Some(Err(error)) => {
                        assert!(matches!(subject, Subject::Envoy { .. }), "{error}");
                        assert_eq!(error.reason(), Some(Reason::CONNECT_ERROR));
                        break;
                    }
                    None => break,
                }
            }
            String::from_utf8(text).unwrap()
        })
    }

    /// So many octets, or all up to the end.
    fn read(&mut self, length: usize) -> Result<String, h2::Error> {
        let body = self.response.as_mut().unwrap().body_mut();
        self.client.runtime.block_on(async {
            let mut text = Vec::new();
            while text.len() < length {
                let Some(data) = body.data().await else { break };
                let data = data?;
                body.flow_control().release_capacity(data.len())?;
                text.extend_from_slice(&data);
            }
            Ok(String::from_utf8(text).unwrap())
        })
    }
}

fn websocket(path: &str, protocol: &'static str) -> Request<()> {
    let mut request = Request::builder()
        .method("CONNECT")
        .uri(format!("http://test{path}"))
        .header("sec-websocket-version", "13")
        .body(())
        .unwrap();
    request.extensions_mut().insert(Protocol::from_static(protocol));
    request
}

fn connect(more: &str) -> Request<()> {
    let request = Request::builder().method("CONNECT").uri("far.example:443");
    let request = if more.is_empty() {
        request
    } else {
        request.header(more, "1")
    };
    request.body(()).unwrap()
}

#[test]
fn a_websocket_is_asked_for_by_connect_and_opened_by_101() {
    let (opener, raw) = (Opener::start(), Raw::start());
    at_both(
        |_, _| bootstrap(opener.address, raw.address),
        |subject, _| {
            let name = subject.name();
            let mut stream = Stream::begin(subject, websocket("/chat?a", "websocket"));
            assert_eq!(stream.status(), 200, "{name}");
            assert_eq!(stream.header("sec-websocket-accept"), Some("x"), "{name}");
            for gone in ["upgrade", "connection", "transfer-encoding", "content-length"] {
                assert_eq!(stream.header(gone), None, "{name}");
            }
            let head = opener.last_head().to_ascii_lowercase();
            assert!(
                head.starts_with("get /chat?a http/1.1\r\nhost: test\r\n"),
                "{name}: {head}"
            );
            for line in [
                "connection: upgrade\r\n",
                "upgrade: websocket\r\n",
                "sec-websocket-version: 13\r\n",
            ] {
                assert!(head.contains(line), "{name}: {head}");
            }
            assert!(
                !head.contains("transfer-encoding") && !head.contains("content-length"),
                "{name}: {head}"
            );
            assert_eq!(stream.read(6).unwrap(), "first,", "{name}");
            stream.write(b"to and fro", false);
            assert_eq!(stream.read(10).unwrap(), "to and fro", "{name}");
            stream.write(b"bye", false);
            assert_eq!(stream.rest(subject), "bye", "{name}");
            // An endpoint that says no, and a proxy that does.
            let mut stream = Stream::begin(subject, websocket("/no", "websocket"));
            assert_eq!(stream.status(), 403, "{name}");
            assert_eq!(stream.read(usize::MAX).unwrap(), "nay\n", "{name}");
            let heads = opener.last_head();
            let stream = Stream::begin(subject, websocket("/chat", "other"));
            assert_eq!(stream.status(), 403, "{name}");
            assert_eq!(opener.last_head(), heads, "{name}");
            assert_eq!(
                subject.await_stat("http.web.downstream_cx_upgrades_total", 2),
                2,
                "{name}"
            );
            assert!(opener.early.lock().unwrap().is_empty(), "{name}");
        },
    );
}

#[test]
fn connect_ends_here_or_at_the_endpoint() {
    let (opener, raw) = (Opener::start(), Raw::start());
    at_both(
        |_, _| bootstrap(opener.address, raw.address),
        |subject, _| {
            let name = subject.name();
            let mut stream = Stream::begin(subject, connect(""));
            assert_eq!(stream.status(), 200, "{name}");
            let mut server = raw.accept();
            stream.write(b"question", false);
            let mut octets = [0; 8];
            server.read_exact(&mut octets).unwrap();
            assert_eq!(&octets, b"question", "{name}");
            server.write_all(b"answer").unwrap();
            assert_eq!(stream.read(6).unwrap(), "answer", "{name}");
            // Much of it, both ways at once.
            let mut writer = server.try_clone().unwrap();
            let flood = std::thread::spawn(move || writer.write_all(&vec![b'x'; 3 << 20]));
            assert_eq!(stream.read(3 << 20).unwrap().len(), 3 << 20, "{name}");
            flood.join().unwrap().unwrap();
            drop(server);
            assert_eq!(stream.rest(subject), "", "{name}");

            let mut stream = Stream::begin(subject, connect("x-app"));
            assert_eq!(stream.status(), 200, "{name}");
            assert_eq!(stream.header("x-opened"), Some("yes"), "{name}");
            assert!(
                opener
                    .last_head()
                    .starts_with("CONNECT far.example:443 HTTP/1.1\r\n"),
                "{name}"
            );
            assert_eq!(stream.read(6).unwrap(), "first,", "{name}");
            stream.write(b"bye", false);
            assert_eq!(stream.rest(subject), "bye", "{name}");

            let stream = Stream::begin(subject, connect("x-off"));
            assert_eq!(stream.status(), 403, "{name}");
        },
    );
}

#[test]
fn an_end_and_a_reset_reach_the_other_side() {
    let (opener, raw) = (Opener::start(), Raw::start());
    at_both(
        |_, _| bootstrap(opener.address, raw.address),
        |subject, _| {
            let name = subject.name();
            // The client's end, with what was said before it.
            let mut stream = Stream::begin(subject, connect(""));
            let mut server = raw.accept();
            stream.write(b"last words", true);
            let mut said = String::new();
            server.read_to_string(&mut said).unwrap();
            assert_eq!(said, "last words", "{name}");
            drop(stream);
            // Its reset.
            let mut stream = Stream::begin(subject, connect(""));
            let mut server = raw.accept();
            stream.out.send_reset(Reason::CANCEL);
            let _inside = stream.client.runtime.enter();
            let mut octet = [0];
            assert!(matches!(server.read(&mut octet), Ok(0) | Err(_)), "{name}");
            // The endpoint's: no end that could be taken for a good one.
            let mut stream = Stream::begin(subject, connect(""));
            let server = raw.accept();
            socket2::SockRef::from(&server)
                .set_linger(Some(Duration::ZERO))
                .unwrap();
            drop(server);
            assert!(stream.read(usize::MAX).is_err(), "{name}");
        },
    );
}

#[test]
fn without_allow_connect_no_client_is_told_of_it() {
    let opener = Opener::start();
    at_both(
        |_, _| {
            let routes = "[{match: {connect_matcher: {}}, route: {cluster: app}}, {match: {prefix: /}, route: {cluster: app}}]";
            let clusters = format!("[{}]", cluster("app", &[opener.address], ""));
            bootstrap_with(
                routes,
                &clusters,
                "codec_type: HTTP2\n          upgrade_configs: [{upgrade_type: websocket}, {upgrade_type: CONNECT}]",
                "",
                "",
            )
        },
        |subject, _| {
            let mut client = client(subject);
            // Once there is an answer, its settings have come.
            let request = Request::builder().uri("http://test/no").body(()).unwrap();
            let (response, _) = client.begin(request, true);
            assert_eq!(client.runtime.block_on(response).unwrap().status(), 403);
            assert!(
                !client.send.is_extended_connect_protocol_enabled(),
                "{}",
                subject.name()
            );
            // Nor is CONNECT itself served.
            let (response, _out) = client.begin(connect("x-app"), false);
            let status = client.runtime.block_on(response).map(|r| r.status().as_u16());
            let wanted = if matches!(subject, Subject::Ours(_)) {
                403
            } else {
                502
            };
            assert_eq!(status.ok(), Some(wanted), "{}", subject.name());
        },
    );
}

#[test]
fn an_end_that_comes_behind_a_body_of_known_length_is_no_loss() {
    let raw = Raw::start();
    at_both(
        |_, _| bootstrap(raw.address, raw.address),
        |subject, _| {
            let mut client = client(subject);
            let request = Request::builder()
                .method("POST")
                .uri("http://test/")
                .header("content-length", "4");
            let (response, mut out) = client.begin(request.body(()).unwrap(), false);
            let inside = client.runtime.enter();
            out.send_data(Bytes::from_static(b"body"), false).unwrap();
            let mut server = raw.accept();
            let mut seen = Vec::new();
            while !seen.ends_with(b"\r\n\r\nbody") {
                let mut octets = [0; 1024];
                let n = server.read(&mut octets).unwrap();
                assert!(n > 0, "{}", subject.name());
                seen.extend_from_slice(&octets[..n]);
            }
            out.send_data(Bytes::new(), true).unwrap();
            drop(inside);
            // Time for the end to come.
            std::thread::sleep(Duration::from_millis(100));
            server
                .write_all(b"HTTP/1.1 202 Fine\r\ncontent-length: 0\r\n\r\n")
                .unwrap();
            let response = client.runtime.block_on(response).unwrap();
            assert_eq!(response.status(), 202, "{}", subject.name());
        },
    );
}
