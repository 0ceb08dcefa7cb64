//! HTTP/2 at either end and at both: what passes, what is refused, how streams end. Cases run at Envoy too where it is there.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, Request, Response};
use tokio::runtime::Runtime;

use crate::envoy::{Subject, at_both};
use crate::harness::{Running, await_true, bootstrap_with, cluster, pattern, simple};

const OPTIONS: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
const HTTP2: &str = "explicit_http_config: {http2_protocol_options: {}}";

/// The part of a cluster that says what its endpoints speak.
fn speaks(protocol: &str) -> String {
    format!(
        ", typed_extension_protocol_options: {{{OPTIONS}: {{\"@type\": type.googleapis.com/{OPTIONS}, {protocol}}}}}"
    )
}

fn to_http2(endpoint: SocketAddr, extra: &str, route: &str, filters: &str) -> String {
    let routes = format!("[{{match: {{prefix: /}}, route: {{cluster: app{route}}}}}]");
    let app = format!("[{}]", cluster("app", &[endpoint], &speaks(HTTP2)));
    bootstrap_with(&routes, &app, extra, filters, "")
}

/// An endpoint that speaks HTTP/2 only.
struct Http2Endpoint {
    address: SocketAddr,
    seen: Arc<Seen>,
    _runtime: Runtime,
}

#[derive(Default)]
struct Seen {
    requests: AtomicUsize,
    connections: AtomicUsize,
    sent: AtomicUsize,
    cancelled: AtomicBool,
}

fn runtime() -> Runtime {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(1).enable_all().build().unwrap()
}

impl Http2Endpoint {
    fn start() -> Self {
        let runtime = runtime();
        let seen = Arc::new(Seen::default());
        let listener = runtime
            .block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))
            .unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::clone(&seen);
        runtime.spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                shared.connections.fetch_add(1, Ordering::SeqCst);
                let seen = Arc::clone(&shared);
                tokio::spawn(async move {
                    let Ok(mut connection) = h2::server::handshake(socket).await else {
                        return;
                    };
                    while let Some(Ok((request, response))) = connection.accept().await {
                        tokio::spawn(answer(request, response, Arc::clone(&seen)));
                    }
                });
            }
        });
        Self {
            address,
            seen,
            _runtime: runtime,
        }
    }

    fn requests(&self) -> usize {
        self.seen.requests.load(Ordering::SeqCst)
    }
}

/// Answers by path; a failure here is one that the client sees.
async fn answer(request: Request<RecvStream>, response: SendResponse<Bytes>, seen: Arc<Seen>) {
    let _ = try_answer(request, response, &seen).await;
}

async fn try_answer(
    request: Request<RecvStream>,
    mut response: SendResponse<Bytes>,
    seen: &Seen,
) -> Result<(), h2::Error> {
    let count = seen.requests.fetch_add(1, Ordering::SeqCst) + 1;
    let (parts, mut body) = request.into_parts();
    let wanted: usize = parts.uri.query().and_then(|q| q.parse().ok()).unwrap_or(0);
    let head = |status: u16, fields: &[(&str, &str)]| {
        let mut head = Response::builder().status(status);
        for (name, value) in fields {
            head = head.header(*name, *value);
        }
        head.body(()).unwrap()
    };
    let grpc = ("content-type", "application/grpc");
    match parts.uri.path() {
        "/echo" | "/grpc" => {
            let is_grpc = parts.uri.path() == "/grpc";
            let fields: &[_] = if is_grpc { &[grpc] } else { &[("x-endpoint", "h2")] };
            let mut out = response.send_response(head(200, fields), false)?;
            while let Some(data) = body.data().await {
                let data = data?;
                body.flow_control().release_capacity(data.len())?;
                write(&mut out, &data).await?;
            }
            let mut trailers = body.trailers().await?.unwrap_or_default();
            if is_grpc {
                trailers.insert("grpc-status", "0".parse().unwrap());
                trailers.insert("grpc-message", "x".repeat(6000).parse().unwrap());
            }
            if trailers.is_empty() {
                out.send_data(Bytes::new(), true)?;
            } else {
                out.send_trailers(trailers)?;
            }
        }
        "/reset" => response.send_reset(Reason::INTERNAL_ERROR),
        "/refuse" if count < wanted => response.send_reset(Reason::REFUSED_STREAM),
        "/unavailable" if count < wanted => {
            while let Some(data) = body.data().await {
                body.flow_control().release_capacity(data?.len())?;
            }
            response.send_response(head(200, &[grpc, ("grpc-status", "14")]), true)?;
        }
        "/late-reset" => {
            let mut out = response.send_response(head(200, &[]), false)?;
            write(&mut out, b"half").await?;
            tokio::time::sleep(Duration::from_millis(100)).await;
            out.send_reset(Reason::INTERNAL_ERROR);
        }
        "/hang" => {
            let mut out = response.send_response(head(200, &[]), false)?;
            write(&mut out, b"begun").await?;
            let reset = std::future::poll_fn(|cx| out.poll_reset(cx)).await;
            seen.cancelled.store(reset.is_ok(), Ordering::SeqCst);
        }
        "/silent" => {
            let reset = std::future::poll_fn(|cx| response.poll_reset(cx)).await;
            seen.cancelled.store(reset.is_ok(), Ordering::SeqCst);
        }
        "/slow" => {
            tokio::time::sleep(Duration::from_millis(400)).await;
            let mut out = response.send_response(head(200, &[]), false)?;
            out.send_data(Bytes::from_static(b"late"), true)?;
        }
        "/flood" => {
            let mut out = response.send_response(head(200, &[]), false)?;
            let piece = pattern(16 * 1024);
            for _ in 0..4096 {
                write(&mut out, &piece).await?;
                seen.sent.fetch_add(piece.len(), Ordering::SeqCst);
            }
            out.send_data(Bytes::new(), true)?;
        }
        "/nothing" => {
            response.send_response(head(200, &[]), true)?;
        }
        "/length" => {
            let mut out = response.send_response(head(200, &[("content-length", "4")]), false)?;
            out.send_data(Bytes::from_static(b"four"), true)?;
        }
        _ => {
            let mut text = format!("{} {}\n", parts.method, parts.uri);
            for (name, value) in &parts.headers {
                text.push_str(&format!("{name}: {}\n", value.to_str().unwrap_or("?")));
            }
            let mut out = response.send_response(head(200, &[]), false)?;
            out.send_data(text.into(), true)?;
        }
    }
    Ok(())
}

async fn write(out: &mut SendStream<Bytes>, mut data: &[u8]) -> Result<(), h2::Error> {
    while !data.is_empty() {
        out.reserve_capacity(data.len());
        let room = std::future::poll_fn(|cx| out.poll_capacity(cx)).await;
        let room = room.unwrap_or(Ok(0))?;
        if room == 0 {
            return Err(Reason::CANCEL.into());
        }
        let n = room.min(data.len());
        out.send_data(Bytes::copy_from_slice(&data[..n]), false)?;
        data = &data[n..];
    }
    Ok(())
}

/// A client connection.
pub(crate) struct Http2Client {
    pub(crate) runtime: Runtime,
    pub(crate) send: SendRequest<Bytes>,
    closed: Arc<AtomicBool>,
}

/// A response, whole.
#[derive(Debug, Default)]
struct Answer {
    status: u16,
    headers: HeaderMap,
    body: Vec<u8>,
    trailers: HeaderMap,
}

impl Answer {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|v| v.to_str().ok())
    }

    fn trailer(&self, name: &str) -> Option<&str> {
        self.trailers.get(name).and_then(|v| v.to_str().ok())
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

impl Http2Client {
    fn connect(to: SocketAddr) -> Self {
        let runtime = runtime();
        let closed = Arc::new(AtomicBool::new(false));
        let send = runtime.block_on(async {
            let socket = tokio::net::TcpStream::connect(to).await.unwrap();
            Self::over(socket, Arc::clone(&closed)).await
        });
        Self {
            runtime,
            send,
            closed,
        }
    }

    async fn over<S>(stream: S, closed: Arc<AtomicBool>) -> SendRequest<Bytes>
    where
        S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    {
        let mut builder = h2::client::Builder::new();
        builder.initial_connection_window_size(1 << 20);
        let (send, connection) = builder.handshake(stream).await.unwrap();
        tokio::spawn(async move {
            // How it ended is for the streams to tell.
            let _ = connection.await;
            closed.store(true, Ordering::SeqCst);
        });
        send
    }

    fn request(&self, method: &str, path: &str, fields: &[(&str, &str)]) -> Request<()> {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("http://test{path}"));
        for (name, value) in fields {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap()
    }

    pub(crate) fn begin(&mut self, request: Request<()>, ends: bool) -> (ResponseFuture, SendStream<Bytes>) {
        let send = self.send.clone();
        let mut send = self.runtime.block_on(send.ready()).unwrap();
        let _inside = self.runtime.enter();
        send.send_request(request, ends).unwrap()
    }

    fn ask(
        &mut self,
        method: &str,
        path: &str,
        fields: &[(&str, &str)],
        body: &[u8],
    ) -> Result<Answer, h2::Error> {
        let request = self.request(method, path, fields);
        let (answer, mut out) = self.begin(request, body.is_empty());
        let body = body.to_vec();
        self.runtime.block_on(async move {
            let sent = tokio::spawn(async move {
                if !body.is_empty() {
                    write(&mut out, &body).await?;
                    out.send_data(Bytes::new(), true)?;
                }
                Ok::<_, h2::Error>(())
            });
            let answer = whole(answer).await;
            // A server may answer before it has heard all.
            let _ = sent.await.unwrap();
            answer
        })
    }

    fn get(&mut self, path: &str) -> Answer {
        self.ask("GET", path, &[], b"").unwrap()
    }
}

async fn whole(answer: ResponseFuture) -> Result<Answer, h2::Error> {
    let (parts, mut body) = answer.await?.into_parts();
    let mut answer = Answer {
        status: parts.status.as_u16(),
        headers: parts.headers,
        ..Answer::default()
    };
    while let Some(data) = body.data().await {
        let data = data?;
        body.flow_control().release_capacity(data.len())?;
        answer.body.extend_from_slice(&data);
    }
    answer.trailers = body.trailers().await?.unwrap_or_default();
    Ok(answer)
}

pub(crate) fn client(subject: &Subject) -> Http2Client {
    Http2Client::connect(subject.web())
}

#[test]
fn an_http2_client_reaches_an_http1_endpoint() {
    at_both(
        |endpoint, _| simple(endpoint.address, ""),
        |subject, _| {
            let mut client = client(subject);
            let head = client.ask(
                "GET",
                "/x?y=1",
                &[("te", "trailers"), ("cookie", "a=1"), ("cookie", "b=2")],
                b"",
            );
            let head = head.unwrap();
            assert_eq!(head.status, 200, "{head:?}");
            let text = head.text();
            for line in [
                "GET /x?y=1 HTTP/1.1\n",
                "host: test\n",
                "x-forwarded-proto: http\n",
                "cookie: a=1; b=2\n",
            ] {
                assert!(text.contains(line), "{} {text}", subject.name());
            }
            assert!(!text.contains("transfer-encoding"), "{} {text}", subject.name());
            assert_eq!(head.header("server"), Some("envoy"));
            assert!(head.header("date").is_some());
            for gone in ["connection", "transfer-encoding", "keep-alive"] {
                assert_eq!(head.header(gone), None);
            }
            let echo = client
                .ask("POST", "/echo", &[("content-length", "5")], b"hello")
                .unwrap();
            assert_eq!((echo.status, echo.text().as_str()), (200, "hello"));
            let big = pattern(3 << 20);
            let echo = client.ask("POST", "/echo", &[], &big).unwrap();
            assert!(echo.body == big, "{} octets", echo.body.len());
            let chunked = client.get("/chunked");
            assert_eq!(chunked.text(), "one two three");
            assert!(chunked.trailers.is_empty());
            let head = client.ask("HEAD", "/echo", &[], b"").unwrap();
            assert_eq!((head.status, head.body.len()), (200, 0));
            assert_eq!(client.get("/no-content").status, 204);
            assert_eq!(client.get("/status?404").status, 404);
            assert_eq!(subject.await_stat("http.web.downstream_cx_http2_total", 1), 1);
            assert_eq!(subject.await_stat("http.web.downstream_cx_total", 1), 1);
            assert_eq!(subject.await_stat("cluster.app.upstream_cx_http1_total", 1), 1);
        },
    );
}

#[test]
fn an_http1_client_reaches_an_http2_endpoint() {
    let endpoint = Http2Endpoint::start();
    at_both(
        |_, _| to_http2(endpoint.address, "", "", ""),
        |subject, _| {
            let mut client = subject.client();
            let head = client.get("/x?y=1");
            assert_eq!(head.status(), 200);
            assert!(
                head.text().starts_with("GET http://test/x?y=1\n"),
                "{}",
                head.text()
            );
            assert_eq!(head.header("transfer-encoding"), Some("chunked"));
            client.send("POST /echo HTTP/1.1\r\nhost: test\r\ncontent-length: 5\r\n\r\nhello");
            assert_eq!(client.receive().text(), "hello");
            client.send("POST /echo HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n");
            assert_eq!(client.receive().text(), "abcde");
            let length = client.get("/length");
            assert_eq!(
                (length.header("content-length"), length.text().as_str()),
                (Some("4"), "four")
            );
            let nothing = client.get("/nothing");
            assert_eq!(nothing.header("content-length"), Some("0"), "{nothing:?}");
            let reset = client.get("/reset");
            assert_eq!(reset.status(), 503);
            assert!(
                reset.text().contains("reset reason: remote reset"),
                "{}",
                reset.text()
            );
            assert_eq!(client.get("/length").status(), 200);
            assert_eq!(subject.await_stat("cluster.app.upstream_cx_http2_total", 1), 1);
            assert_eq!(subject.await_stat("cluster.app.upstream_rq_rx_reset", 1), 1);
        },
    );
}

#[test]
fn many_streams_share_few_connections_and_bodies_stay_whole() {
    let endpoint = Http2Endpoint::start();
    at_both(
        |_, _| to_http2(endpoint.address, "", "", ""),
        |subject, _| {
            let before = endpoint.seen.connections.load(Ordering::SeqCst);
            let mut client = client(subject);
            let bodies: Vec<Vec<u8>> = (0..90).map(|i| pattern(20_000 + i)).collect();
            let begun: Vec<_> = bodies
                .iter()
                .map(|_| {
                    let request = client.request("POST", "/echo", &[]);
                    client.begin(request, false)
                })
                .collect();
            client.runtime.block_on(async {
                let mut asked = Vec::new();
                for ((answer, mut out), body) in begun.into_iter().zip(bodies.clone()) {
                    asked.push(tokio::spawn(async move {
                        let sent = tokio::spawn(async move {
                            write(&mut out, &body).await.unwrap();
                            out.send_data(Bytes::new(), true).unwrap();
                        });
                        let answer = whole(answer).await.unwrap();
                        sent.await.unwrap();
                        answer
                    }));
                }
                for (asked, body) in asked.into_iter().zip(&bodies) {
                    let answer = asked.await.unwrap();
                    assert!(answer.status == 200 && answer.body == *body);
                }
            });
            let made = endpoint.seen.connections.load(Ordering::SeqCst) - before;
            assert!(
                (1..=3).contains(&made),
                "{made} connections at {}",
                subject.name()
            );
        },
    );
}

#[test]
fn grpc_has_trailers_and_both_directions_at_once() {
    let endpoint = Http2Endpoint::start();
    at_both(
        |_, _| to_http2(endpoint.address, "", "", ""),
        |subject, _| {
            let mut client = client(subject);
            let fields = [("content-type", "application/grpc+proto"), ("te", "trailers")];
            let unary = client.ask("POST", "/grpc", &fields, b"\0\0\0\0\x02hi").unwrap();
            assert_eq!(unary.body, b"\0\0\0\0\x02hi");
            assert_eq!(unary.trailer("grpc-status"), Some("0"));
            assert_eq!(unary.trailer("grpc-message").map(str::len), Some(6000));
            assert_eq!(unary.header("content-type"), Some("application/grpc"));
            let request = client.request("POST", "/grpc", &fields);
            let (answer, mut out) = client.begin(request, false);
            client.runtime.block_on(async {
                let mut body = answer.await.unwrap().into_body();
                for turn in 0..20u8 {
                    out.send_data(Bytes::from(vec![turn; 100]), false).unwrap();
                    let mut heard = Vec::new();
                    while heard.len() < 100 {
                        let data = body.data().await.unwrap().unwrap();
                        body.flow_control().release_capacity(data.len()).unwrap();
                        heard.extend_from_slice(&data);
                    }
                    assert_eq!(heard, [turn; 100]);
                }
                let mut trailers = HeaderMap::new();
                trailers.insert("x-sum", "20".parse().unwrap());
                out.send_trailers(trailers).unwrap();
                assert!(body.data().await.is_none());
                let trailers = body.trailers().await.unwrap().unwrap();
                assert_eq!(trailers.get("grpc-status").unwrap(), "0");
                assert_eq!(trailers.get("x-sum").unwrap(), "20");
            });
        },
    );
}

#[test]
fn a_client_that_gives_up_stops_the_endpoint() {
    let endpoint = Http2Endpoint::start();
    at_both(
        |_, _| to_http2(endpoint.address, "", "", ""),
        |subject, _| {
            let mut client = client(subject);
            for path in ["/silent", "/hang"] {
                endpoint.seen.cancelled.store(false, Ordering::SeqCst);
                let before = endpoint.requests();
                let request = client.request("GET", path, &[]);
                let (mut answer, mut out) = client.begin(request, true);
                await_true("the endpoint has the request", || endpoint.requests() > before);
                if path == "/hang" {
                    client.runtime.block_on(async {
                        let mut body = (&mut answer).await.unwrap().into_body();
                        assert_eq!(body.data().await.unwrap().unwrap(), "begun");
                    });
                } else {
                    out.send_reset(Reason::CANCEL);
                }
                drop((answer, out));
                await_true("the endpoint's stream is reset", || {
                    endpoint.seen.cancelled.load(Ordering::SeqCst)
                });
            }
            assert_eq!(client.get("/length").text(), "four");
            subject.await_stat("http.web.downstream_rq_rx_reset", 2);
        },
    );
}

#[test]
fn a_reset_by_the_endpoint_is_a_503_or_a_reset() {
    let endpoint = Http2Endpoint::start();
    let retry = ", retry_policy: {retry_on: \"refused-stream,unavailable\", num_retries: 2}";
    at_both(
        |_, _| to_http2(endpoint.address, "", retry, ""),
        |subject, _| {
            let mut client = client(subject);
            let reset = client.get("/reset");
            assert_eq!(reset.status, 503, "{reset:?}");
            assert!(
                reset.text().contains("reset reason: remote reset"),
                "{}",
                reset.text()
            );
            let late = client.ask("GET", "/late-reset", &[], b"");
            assert!(late.as_ref().is_err_and(h2::Error::is_reset), "{late:?}");
            let wanted = endpoint.requests() + 2;
            let refused = client.ask("POST", &format!("/refuse?{wanted}"), &[], b"");
            assert_eq!(refused.unwrap().status, 200);
            let wanted = endpoint.requests() + 3;
            let grpc = [("content-type", "application/grpc"), ("te", "trailers")];
            let again = client.ask("POST", &format!("/unavailable?{wanted}"), &grpc, b"\0\0\0\0\x01x");
            let again = again.unwrap();
            assert_eq!((again.status, endpoint.requests()), (200, wanted), "{again:?}");
            let failed = client.ask("POST", "/reset", &grpc, b"\0\0\0\0\x01x").unwrap();
            assert_eq!(
                (failed.status, failed.header("grpc-status")),
                (200, Some("14")),
                "{failed:?}"
            );
            assert!(
                failed
                    .header("grpc-message")
                    .is_some_and(|m| m.contains("remote reset"))
            );
            assert_eq!(failed.header("content-length"), None);
        },
    );
}

#[test]
fn rules_and_routes_are_for_http2_too() {
    let rbac = "- {name: envoy.filters.http.rbac, typed_config: {\"@type\": \
                type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC, rules: {action: DENY, policies: \
                {x: {permissions: [{url_path: {path: {prefix: /admin}}}], principals: [{any: true}]}}}}}\n          ";
    let routes = "[{match: {prefix: /, grpc: {}, headers: [{name: x-direct, present_match: true}]}, \
                  direct_response: {status: 418, body: {inline_string: tea}}}, \
                  {match: {prefix: /old}, redirect: {path_redirect: /new}}, {match: {prefix: /}, route: {cluster: app}}]";
    at_both(
        |endpoint, folder| {
            let app = format!("[{}]", cluster("app", &[endpoint.address], ""));
            let log = format!(
                "access_log: [{{name: file, typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog, \
                 path: {folder}/log, log_format: {{text_format_source: {{inline_string: \"%PROTOCOL% %RESPONSE_CODE% %REQ(:PATH)% %REQ(:AUTHORITY)%\\n\"}}}}}}}}]"
            );
            bootstrap_with(routes, &app, &log, rbac, "")
        },
        |subject, _| {
            let mut client = client(subject);
            let grpc = [("content-type", "application/grpc"), ("x-direct", "1")];
            assert_eq!(client.get("/admin/x").status, 403);
            let denied = client.ask("POST", "/admin", &grpc, b"").unwrap();
            assert_eq!(
                (denied.status, denied.header("grpc-status")),
                (200, Some("7")),
                "{denied:?}"
            );
            let direct = client.ask("POST", "/x", &grpc, b"").unwrap();
            assert_eq!(
                (direct.status, direct.header("grpc-status")),
                (200, Some("2")),
                "{direct:?}"
            );
            assert_eq!(direct.header("grpc-message"), Some("tea"));
            let moved = client.get("/old/x?q");
            assert_eq!(
                (moved.status, moved.header("location")),
                (301, Some("http://test/new?q"))
            );
            assert_eq!(client.ask("POST", "/echo", &[], b"x").unwrap().text(), "x");
            assert_eq!(
                client.ask("GET", "/a", &[("x-direct", "1")], b"").unwrap().status,
                200
            );
            let log = subject.folder().join("log");
            let logged = || std::fs::read_to_string(&log).unwrap_or_default();
            await_true("the log has all", || logged().lines().count() >= 6);
            assert!(logged().contains("HTTP/2 403 /admin/x test\n"), "{}", logged());
            assert!(logged().contains("HTTP/2 200 /echo test\n"), "{}", logged());
        },
    );
}

#[test]
fn a_slow_reader_stops_the_endpoint() {
    let endpoint = Http2Endpoint::start();
    let running = Running::start(&to_http2(endpoint.address, "", "", ""));
    let mut client = Http2Client::connect(running.web());
    let request = client.request("GET", "/flood", &[]);
    let (answer, _out) = client.begin(request, true);
    let body = client.runtime.block_on(answer).unwrap().into_body();
    let sent = || endpoint.seen.sent.load(Ordering::SeqCst);
    let mut before = usize::MAX;
    await_true("the endpoint comes to a stand", || {
        std::thread::sleep(Duration::from_millis(200));
        std::mem::replace(&mut before, sent()) == before
    });
    assert!(sent() < 4 << 20, "{} octets went out", sent());
    assert!(client.get("/length").status == 200, "other streams go on");
    drop(body);
}

#[test]
fn a_drain_says_goaway_and_serves_what_was_begun() {
    let endpoint = Http2Endpoint::start();
    let running = Running::start(&to_http2(endpoint.address, "", "", ""));
    let mut client = Http2Client::connect(running.web());
    let request = client.request("GET", "/slow", &[]);
    let (answer, _) = client.begin(request, true);
    await_true("the endpoint has it", || endpoint.requests() == 1);
    assert_eq!(running.stat("http2.streams_active"), 1);
    running.proxy.drain();
    let answer = client.runtime.block_on(whole(answer)).unwrap();
    assert_eq!(answer.text(), "late");
    await_true("the connection ends", || client.closed.load(Ordering::SeqCst));
}

#[test]
fn an_endpoint_that_says_goaway_is_left_without_a_failed_request() {
    let endpoint = Http2Endpoint::start();
    let inner = Running::start(&to_http2(
        endpoint.address,
        "common_http_protocol_options: {max_requests_per_connection: 7}",
        "",
        "",
    ));
    let outer = Running::start(&to_http2(inner.web(), "", "", ""));
    let mut client = Http2Client::connect(outer.web());
    for _ in 0..60 {
        assert_eq!(client.get("/length").text(), "four");
    }
    assert!(inner.stat("http.web.downstream_cx_http2_total") >= 8);
    assert_eq!(outer.stat("http.web.downstream_rq_5xx"), 0);
}

#[test]
fn a_cluster_speaks_what_its_client_speaks() {
    let endpoint = crate::harness::Endpoint::start("only");
    let inner = Running::start(&simple(endpoint.address, ""));
    let protocol = "use_downstream_protocol_config: {http_protocol_options: {}, http2_protocol_options: {}}";
    let app = format!("[{}]", cluster("app", &[inner.web()], &speaks(protocol)));
    let outer = bootstrap_with("[{match: {prefix: /}, route: {cluster: app}}]", &app, "", "", "");
    let outer = Running::start(&outer);
    assert_eq!(outer.client().get("/x").status(), 200);
    assert_eq!(Http2Client::connect(outer.web()).get("/x").status, 200);
    let counted = |name: &str| inner.stat(&format!("http.web.downstream_cx_{name}_total"));
    assert_eq!((counted("http1"), counted("http2")), (1, 1));
    assert_eq!(outer.stat("cluster.app.upstream_cx_http2_total"), 1);
}

#[test]
fn an_endpoint_gets_no_more_streams_than_it_is_said_to_take() {
    let endpoint = Http2Endpoint::start();
    let protocol = "explicit_http_config: {http2_protocol_options: {max_concurrent_streams: 2}}";
    at_both(
        |_, _| {
            let app = format!("[{}]", cluster("app", &[endpoint.address], &speaks(protocol)));
            bootstrap_with("[{match: {prefix: /}, route: {cluster: app}}]", &app, "", "", "")
        },
        |subject, _| {
            let before = endpoint.seen.connections.load(Ordering::SeqCst);
            let mut client = client(subject);
            let begun: Vec<_> = (0..6)
                .map(|_| {
                    let request = client.request("GET", "/slow", &[]);
                    client.begin(request, true).0
                })
                .collect();
            for answer in begun {
                assert_eq!(client.runtime.block_on(whole(answer)).unwrap().text(), "late");
            }
            let made = endpoint.seen.connections.load(Ordering::SeqCst) - before;
            assert_eq!(made, 3, "{}", subject.name());
        },
    );
}

#[test]
fn faults_and_time_limits_are_told_the_grpc_way() {
    let endpoint = Http2Endpoint::start();
    let fault = "- {name: envoy.filters.http.fault, typed_config: {\"@type\": \
                 type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault, abort: {grpc_status: 8, percentage: \
                 {numerator: 100}}, headers: [{name: x-fault, present_match: true}]}}\n          ";
    let route = ", timeout: 0s, max_stream_duration: {grpc_timeout_header_max: 2s}";
    at_both(
        |_, _| to_http2(endpoint.address, "", route, fault),
        |subject, _| {
            let mut client = client(subject);
            let fields = [("content-type", "application/grpc"), ("x-fault", "1")];
            let aborted = client.ask("POST", "/grpc", &fields, b"x").unwrap();
            assert_eq!(
                (aborted.status, aborted.header("grpc-status")),
                (200, Some("8")),
                "{aborted:?}"
            );
            assert_eq!(aborted.header("grpc-message"), Some("fault filter abort"));
            let fields = [("content-type", "application/grpc"), ("grpc-timeout", "150m")];
            let late = client.ask("POST", "/silent", &fields, b"").unwrap();
            assert_eq!(
                (late.status, late.header("grpc-status")),
                (200, Some("4")),
                "{late:?} at {}",
                subject.name()
            );
            await_true("the endpoint's stream is reset", || {
                endpoint.seen.cancelled.swap(false, Ordering::SeqCst)
            });
        },
    );
}

/// A frame (RFC 9113 §4.1).
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    out.extend_from_slice(&[kind, flags]);
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(payload);
    out
}

/// Literal fields without indexing (RFC 7541 §6.2.2).
fn block(fields: &[(&[u8], &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, value) in fields {
        out.extend_from_slice(&[0, name.len() as u8]);
        out.extend_from_slice(name);
        out.push(value.len() as u8);
        out.extend_from_slice(value);
    }
    out
}

/// What became of stream 1.
#[derive(Debug, PartialEq, Eq)]
enum Fate {
    Reset,
    ConnectionOver,
    Answered,
}

fn fate(to: SocketAddr, frames: &[Vec<u8>]) -> Fate {
    let mut socket = TcpStream::connect(to).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut out = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    out.extend(frame(4, 0, 0, &[]));
    frames.iter().for_each(|f| out.extend_from_slice(f));
    socket.write_all(&out).unwrap();
    loop {
        let mut head = [0; 9];
        if socket.read_exact(&mut head).is_err() {
            return Fate::ConnectionOver;
        }
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
        let mut payload = vec![0; length];
        if socket.read_exact(&mut payload).is_err() {
            return Fate::ConnectionOver;
        }
        match (head[3], stream) {
            (3, 1) => return Fate::Reset,
            (1, 1) => return Fate::Answered,
            (7, _) => return Fate::ConnectionOver,
            _ => {}
        }
    }
}

type Fields = Vec<(&'static [u8], &'static [u8])>;

fn get(more: &[(&'static [u8], &'static [u8])]) -> Fields {
    let mut fields: Fields = vec![
        (b":method", b"GET"),
        (b":scheme", b"http"),
        (b":authority", b"test"),
        (b":path", b"/x"),
    ];
    fields.extend_from_slice(more);
    fields
}

#[test]
fn malformed_requests_never_reach_an_endpoint() {
    let malformed: Vec<(&str, Fields)> = vec![
        ("CR LF in a value", get(&[(b"x", b"a\r\nb: c")])),
        ("LF in a value", get(&[(b"x", b"a\nb")])),
        ("CR in a value", get(&[(b"x", b"a\rb")])),
        ("NUL in a value", get(&[(b"x", b"a\0b")])),
        (
            "a second request in a value",
            get(&[(b"x", b"\r\n\r\nGET /y HTTP/1.1\r\nhost: y")]),
        ),
        ("an upper-case name", get(&[(b"X-Up", b"1")])),
        ("a space in a name", get(&[(b"x y", b"1")])),
        ("a colon in a name", get(&[(b"x:y", b"1")])),
        ("CR LF in a name", get(&[(b"x\r\ny", b"1")])),
        ("an empty name", get(&[(b"", b"1")])),
        ("connection", get(&[(b"connection", b"close")])),
        ("keep-alive", get(&[(b"keep-alive", b"1")])),
        ("proxy-connection", get(&[(b"proxy-connection", b"close")])),
        ("transfer-encoding", get(&[(b"transfer-encoding", b"chunked")])),
        ("upgrade", get(&[(b"upgrade", b"h2c")])),
        ("te: gzip", get(&[(b"te", b"gzip")])),
        (
            "two lengths",
            get(&[(b"content-length", b"0"), (b"content-length", b"1")]),
        ),
        ("a length that is none", get(&[(b"content-length", b"+1")])),
        ("a length without octets", get(&[(b"content-length", b"1")])),
        ("an unknown pseudo-header", get(&[(b":proto", b"x")])),
        (
            "a pseudo-header behind a field",
            vec![
                (b":method", b"GET"),
                (b":scheme", b"http"),
                (b"x", b"1"),
                (b":path", b"/"),
            ],
        ),
        ("two paths", get(&[(b":path", b"/y")])),
        (
            "no path",
            vec![
                (b":method", b"GET"),
                (b":scheme", b"http"),
                (b":authority", b"test"),
            ],
        ),
        (
            "an empty path",
            vec![
                (b":method", b"GET"),
                (b":scheme", b"http"),
                (b":authority", b"test"),
                (b":path", b""),
            ],
        ),
        (
            "no method",
            vec![(b":scheme", b"http"), (b":authority", b"test"), (b":path", b"/")],
        ),
        (
            "no scheme",
            vec![(b":method", b"GET"), (b":authority", b"test"), (b":path", b"/")],
        ),
        (
            "a space in the path",
            vec![
                (b":method", b"GET"),
                (b":scheme", b"http"),
                (b":authority", b"test"),
                (b":path", b"/ HTTP/1.1\r\nx: y"),
            ],
        ),
        (
            "a space in the method",
            vec![
                (b":method", b"GET /y"),
                (b":scheme", b"http"),
                (b":authority", b"test"),
                (b":path", b"/"),
            ],
        ),
        (
            "an authority with a path",
            vec![
                (b":method", b"GET"),
                (b":scheme", b"http"),
                (b":authority", b"test/x"),
                (b":path", b"/"),
            ],
        ),
        ("a status", get(&[(b":status", b"200")])),
    ];
    at_both(
        |endpoint, _| simple(endpoint.address, ""),
        |subject, endpoint| {
            for (what, fields) in &malformed {
                let found = fate(subject.web(), &[frame(1, 5, 1, &block(fields))]);
                match subject {
                    Subject::Ours(_) => assert_ne!(found, Fate::Answered, "{what}"),
                    // Envoy ends the connection at most of them, and answers 400 to the rest.
                    Subject::Envoy { .. } => {}
                }
                if matches!(subject, Subject::Ours(_)) {
                    assert_eq!(endpoint.requests(), 0, "{what}");
                }
            }
            // Sound but for one thing: these are checked against what they are next to.
            let found = fate(subject.web(), &[frame(1, 5, 1, &block(&get(&[])))]);
            assert_eq!(found, Fate::Answered);
        },
    );
}

#[test]
fn a_body_is_as_long_as_it_says() {
    let running = |address| Running::start(&simple(address, ""));
    let endpoint = crate::harness::Endpoint::start("only");
    let subject = running(endpoint.address);
    let mut post = get(&[(b"content-length", b"3")]);
    post[0] = (b":method", b"POST");
    post[3] = (b":path", b"/echo");
    for (what, data) in [("short", b"ab".as_slice()), ("long", b"abcd")] {
        let frames = [frame(1, 4, 1, &block(&post)), frame(0, 1, 1, data)];
        let found = fate(subject.web(), &frames);
        assert_ne!(found, Fate::Answered, "{what}");
    }
    let frames = [frame(1, 4, 1, &block(&post)), frame(0, 1, 1, b"abc")];
    assert_eq!(fate(subject.web(), &frames), Fate::Answered);
    assert_eq!(endpoint.requests(), 1);
    let host = get(&[(b"host", b"other")]);
    assert_eq!(fate(subject.web(), &[frame(1, 5, 1, &block(&host))]), Fate::Reset);
    let host = get(&[(b"host", b"test")]);
    assert_eq!(
        fate(subject.web(), &[frame(1, 5, 1, &block(&host))]),
        Fate::Answered
    );
    assert_eq!(subject.stat("http2.rx_messaging_error"), 1);
}

#[test]
fn floods_end_the_connection_and_nobody_else_s() {
    let endpoint = crate::harness::Endpoint::start("only");
    let subject = Running::start(&simple(endpoint.address, ""));
    let mut post = get(&[]);
    post[0] = (b":method", b"POST");
    let head = block(&get(&[]));
    let resets: Vec<Vec<u8>> = (1..20_000)
        .step_by(2)
        .flat_map(|stream| {
            [
                frame(1, 5, stream, &head),
                frame(3, 0, stream, &8u32.to_be_bytes()),
            ]
        })
        .collect();
    let malformed = block(&get(&[(b"connection", b"x")]));
    let malformed: Vec<Vec<u8>> = (1..20_000)
        .step_by(2)
        .map(|stream| frame(1, 5, stream, &malformed))
        .collect();
    let mut continuations = vec![frame(1, 1, 1, &head)];
    continuations.extend((0..20_000).map(|_| frame(9, 0, 1, &block(&[(b"x", &[b'a'; 100])]))));
    let mut empty = vec![frame(1, 4, 1, &block(&post))];
    empty.extend((0..100_000).map(|_| frame(0, 0, 1, b"")));
    for (what, frames) in [
        ("rapid reset", resets),
        ("malformed streams", malformed),
        ("CONTINUATION", continuations),
        ("empty DATA", empty),
    ] {
        let mut socket = TcpStream::connect(subject.web()).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut out = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        out.extend(frame(4, 0, 0, &[]));
        out.extend(frames.concat());
        let mut writer = socket.try_clone().unwrap();
        let written = std::thread::spawn(move || writer.write_all(&out).is_ok());
        let mut rest = Vec::new();
        let ended = match socket.read_to_end(&mut rest) {
            Ok(_) => true,
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        };
        assert!(
            ended,
            "{what}: the connection is still open after {} octets",
            rest.len()
        );
        // Whether all could be written depends on when the proxy hung up.
        let _ = written.join().unwrap();
        assert_eq!(
            subject.client().get("/x").status(),
            200,
            "{what}: others are served"
        );
    }
}

/// [`simple`] behind TLS that agrees on h2 or http/1.1.
fn behind_tls(endpoint: SocketAddr, (chain, key): &(String, String)) -> String {
    simple(endpoint, "").replace(
        "    filter_chains:\n    - filters:",
        &format!(
            "    filter_chains:\n    - transport_socket: {{name: tls, typed_config: {{\"@type\": \
             type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext, common_tls_context: \
             {{alpn_protocols: [h2, http/1.1], tls_certificates: [{{certificate_chain: {{inline_string: {chain:?}}}, \
             private_key: {{inline_string: {key:?}}}}}]}}}}}}\n      filters:"
        ),
    )
}

#[test]
fn http2_is_agreed_on_with_endpoints_too() {
    let authority = crate::mesh::Authority::new();
    let leaf = authority.leaf_named("spiffe://td/ns/a/sa/b", Some("test"));
    let endpoint = crate::harness::Endpoint::start("only");
    let inner = Running::start(&behind_tls(endpoint.address, &leaf));
    let http1 = inner.stat("http.web.downstream_cx_http1_total");
    for (offered, http2) in [("h2, http/1.1", 1), ("http/1.1", 0), ("", 1)] {
        // Without a list of its own it offers both.
        let socket = format!(
            "{}, transport_socket: {{name: tls, typed_config: {{\"@type\": \
             type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext, sni: test, common_tls_context: \
             {{alpn_protocols: [{offered}], validation_context: {{trusted_ca: {{inline_string: {:?}}}}}}}}}}}",
            speaks("auto_config: {}"),
            authority.root
        );
        let app = format!("[{}]", cluster("app", &[inner.web()], &socket));
        let outer = bootstrap_with("[{match: {prefix: /}, route: {cluster: app}}]", &app, "", "", "");
        let outer = Running::start(&outer);
        for _ in 0..3 {
            let head = outer.client().get("/x");
            assert_eq!(head.status(), 200, "{}", head.text());
        }
        assert_eq!(outer.stat("cluster.app.upstream_cx_http2_total"), http2);
        assert_eq!(outer.stat("cluster.app.upstream_cx_http1_total"), 1 - http2);
    }
    assert_eq!(inner.stat("http.web.downstream_cx_http2_total"), 2);
    assert_eq!(inner.stat("http.web.downstream_cx_http1_total"), http1 + 1);
}

#[test]
fn http2_is_agreed_on_in_tls() {
    let authority = crate::mesh::Authority::new();
    let leaf = authority.leaf_named("spiffe://td/ns/a/sa/b", Some("test"));
    let endpoint = crate::harness::Endpoint::start("only");
    let text = behind_tls(endpoint.address, &leaf);
    let subject = Running::start(&text);
    let mut roots = rustls::RootCertStore::empty();
    let root = rustls::pki_types::pem::PemObject::from_pem_slice(authority.root.as_bytes());
    roots.add(root.unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider);
    let builder = builder.with_safe_default_protocol_versions().unwrap();
    let mut config = builder.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let runtime = runtime();
    let closed = Arc::new(AtomicBool::new(false));
    let send = runtime.block_on(async {
        let socket = tokio::net::TcpStream::connect(subject.web()).await.unwrap();
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        let name = "test".try_into().unwrap();
        let stream = connector.connect(name, socket).await.unwrap();
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(b"h2".as_slice()));
        Http2Client::over(stream, Arc::clone(&closed)).await
    });
    let mut client = Http2Client {
        runtime,
        send,
        closed,
    };
    let head = client.get("/x");
    assert_eq!(head.status, 200);
    assert!(
        head.text().contains("x-forwarded-proto: https\n"),
        "{}",
        head.text()
    );
    assert_eq!(subject.stat("http.web.downstream_cx_http2_total"), 1);
    assert_eq!(subject.stat("http.web.downstream_cx_http1_total"), 0);
}
