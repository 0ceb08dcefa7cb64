//! Distributed traces: what endpoints are told, what collectors get. Each case is checked at Envoy too.

use std::collections::BTreeMap;
use std::io::{BufReader, Write};
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use dpumesh_proxy::trace::Context;
use dpumesh_proxy::trace::otlp::{CLIENT, EXPORT, ExportRequest, KeyValue, SERVER, Span};
use prost::Message as _;

use crate::envoy::at_both;
use crate::harness::{Client, Endpoint, Message, await_true, bootstrap, cluster, read_message};

const HTTP2: &str = ", typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {\"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: {http2_protocol_options: {}}}}";
const PROVIDER: &str = "provider: {name: envoy.tracers.opentelemetry, typed_config: {\"@type\": type.googleapis.com/envoy.config.trace.v3.OpenTelemetryConfig, grpc_service: {envoy_grpc: {cluster_name: collector}, timeout: 1s}, service_name: shop}}";
const ROUTES: &str =
    "[{match: {prefix: /no}, direct_response: {status: 503}}, {match: {prefix: /}, route: {cluster: app}}]";

/// A collector that keeps what it is sent.
struct Collector {
    address: SocketAddr,
    spans: Arc<Mutex<Vec<(String, Span)>>>,
}

impl Collector {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let spans: Arc<Mutex<Vec<(String, Span)>>> = Arc::default();
        let kept = Arc::clone(&spans);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let kept = Arc::clone(&kept);
                std::thread::spawn(move || {
                    let runtime = tokio::runtime::Builder::new_current_thread()
                        .enable_all()
                        .build()
                        .unwrap();
                    runtime.block_on(collect(stream, &kept));
                });
            }
        });
        Self { address, spans }
    }

    /// So many spans, once they are there.
    fn take(&self, count: usize) -> Vec<(String, Span)> {
        await_true("the spans", || self.spans.lock().unwrap().len() >= count);
        std::mem::take(&mut self.spans.lock().unwrap())
    }
}

async fn collect(stream: std::net::TcpStream, kept: &Mutex<Vec<(String, Span)>>) {
    stream.set_nonblocking(true).unwrap();
    let stream = tokio::net::TcpStream::from_std(stream).unwrap();
    let Ok(mut connection) = h2::server::handshake(stream).await else {
        return;
    };
    while let Some(Ok((request, mut respond))) = connection.accept().await {
        assert_eq!(request.uri().path(), EXPORT);
        let mut body = request.into_body();
        let mut data = Vec::new();
        loop {
            tokio::select! {
                part = body.data() => match part {
                    Some(part) => {
                        let part = part.unwrap();
                        body.flow_control().release_capacity(part.len()).unwrap();
                        data.extend_from_slice(&part);
                    }
                    None => break,
                },
                _ = std::future::poll_fn(|cx| connection.poll_closed(cx)) => return,
            }
        }
        for of_resource in ExportRequest::decode(&data[5..]).unwrap().resource_spans {
            let service = values(&of_resource.resource.unwrap().attributes)["service.name"].clone();
            let spans = of_resource
                .scope_spans
                .into_iter()
                .flat_map(|of_scope| of_scope.spans);
            kept.lock()
                .unwrap()
                .extend(spans.map(|span| (service.clone(), span)));
        }
        let head = http::Response::builder().header("content-type", "application/grpc");
        let mut response = respond.send_response(head.body(()).unwrap(), false).unwrap();
        response
            .send_data(Bytes::from_static(b"\0\0\0\0\0"), false)
            .unwrap();
        let mut trailers = http::HeaderMap::new();
        trailers.insert("grpc-status", "0".parse().unwrap());
        response.send_trailers(trailers).unwrap();
    }
}

fn values(attributes: &[KeyValue]) -> BTreeMap<String, String> {
    let pair = |a: &KeyValue| (a.key.clone(), a.value.clone().unwrap_or_default().string_value);
    attributes.iter().map(pair).collect()
}

fn traced(endpoint: &Endpoint, collector: SocketAddr, tracing: &str) -> String {
    let clusters = format!(
        "[{}, {}]",
        cluster("app", &[endpoint.address], ""),
        cluster("collector", &[collector], HTTP2)
    );
    bootstrap(ROUTES, &clusters, &format!("tracing: {{{PROVIDER}, {tracing}}}"))
}

fn get(client: &mut Client, path: &str, headers: &str) -> Message {
    client.send(format!(
        "GET {path} HTTP/1.1\r\nHost: a.example\r\nUser-Agent: test\r\n{headers}\r\n"
    ));
    client.receive()
}

/// What reached the endpoint of a header.
fn sent_on(answer: &Message, name: &str) -> Option<String> {
    let text = answer.text();
    let front = format!("{name}: ");
    text.lines()
        .find_map(|line| line.strip_prefix(&front).map(str::to_owned))
}

fn context(answer: &Message) -> Context {
    let text = sent_on(answer, "traceparent").expect("a traceparent");
    Context::parse(text.as_bytes()).expect("a good one")
}

const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331";

#[test]
fn a_request_goes_on_in_its_trace_and_a_span_is_told() {
    let collector = Collector::start();
    at_both(
        |endpoint, _| {
            let tags = "custom_tags: [{tag: fixed, literal: {value: x}}, {tag: asked, request_header: {name: X-Asked, default_value: nothing}}, {tag: home, environment: {name: NO_SUCH_VARIABLE, default_value: away}}], max_path_tag_length: 8";
            traced(endpoint, collector.address, tags)
        },
        |subject, _| {
            collector.spans.lock().unwrap().clear();
            let mut client = subject.client();
            let headers = format!("traceparent: {PARENT}-01\r\ntracestate: a=1,b=2\r\nX-Asked: me\r\n");
            let answer = get(&mut client, "/long/path?query", &headers);
            let told = context(&answer);
            let parent = Context::parse(format!("{PARENT}-01").as_bytes()).unwrap();
            assert_eq!(
                (told.trace, told.sampled),
                (parent.trace, true),
                "{}",
                subject.name()
            );
            assert_ne!(told.span, parent.span);
            assert_eq!(sent_on(&answer, "tracestate").as_deref(), Some("a=1,b=2"));
            let (service, span) = collector.take(1).pop().unwrap();
            assert_eq!(service, "shop");
            assert_eq!(span.trace_id, parent.trace);
            assert_eq!(span.span_id, told.span, "the endpoint's parent is this span");
            assert_eq!(span.parent_span_id, parent.span);
            assert_eq!(span.trace_state, "a=1,b=2");
            assert_eq!(
                (span.name.as_str(), span.kind),
                ("ingress", SERVER),
                "{}",
                subject.name()
            );
            assert!(span.start_time_unix_nano > 0 && span.end_time_unix_nano >= span.start_time_unix_nano);
            let tags = values(&span.attributes);
            for (name, value) in [
                ("component", "proxy"),
                ("node_id", "test"),
                ("http.method", "GET"),
                ("http.url", "http://a.example/long/pa"),
                ("http.protocol", "HTTP/1.1"),
                ("http.status_code", "200"),
                ("user_agent", "test"),
                ("downstream_cluster", "-"),
                ("peer.address", "127.0.0.1"),
                ("request_size", "0"),
                ("response_flags", "-"),
                ("upstream_cluster", "app"),
                ("upstream_cluster.name", "app"),
                ("fixed", "x"),
                ("asked", "me"),
                ("home", "away"),
            ] {
                assert_eq!(
                    tags.get(name).map(String::as_str),
                    Some(value),
                    "{name} at {}",
                    subject.name()
                );
            }
            assert_eq!(
                tags["guid:x-request-id"],
                sent_on(&answer, "x-request-id").unwrap()
            );
            assert_eq!(tags["response_size"], answer.body.len().to_string());
            assert!(!tags.contains_key("error"));

            // Without a trace one begins; a failure is told as one.
            let answer = get(&mut client, "/no", "");
            assert_eq!(answer.status(), 503);
            let (_, span) = collector.take(1).pop().unwrap();
            assert!(span.parent_span_id.is_empty());
            assert_ne!(span.trace_id, parent.trace);
            let tags = values(&span.attributes);
            assert_eq!(
                (tags["error"].as_str(), tags["http.status_code"].as_str()),
                ("true", "503")
            );
            assert_eq!(tags["asked"], "nothing");
            assert_eq!(
                span.status.map(|status| status.code),
                Some(2),
                "{}",
                subject.name()
            );

            // What is not recorded is not told, but goes on.
            let answer = get(&mut client, "/", &format!("traceparent: {PARENT}-00\r\n"));
            let told = context(&answer);
            assert_eq!(
                (told.trace, told.sampled),
                (parent.trace, false),
                "{}",
                subject.name()
            );
            let stat = subject.await_stat("tracing.opentelemetry.spans_sent", 2);
            assert_eq!(stat, 2, "{}", subject.name());
            assert!(collector.spans.lock().unwrap().is_empty());
            // What is no traceparent begins a trace, as the standard has it; Envoy lets it pass and traces nothing.
            if subject.name() == "ours" {
                let told = context(&get(
                    &mut client,
                    "/",
                    "traceparent: nonsense\r\ntracestate: a=1\r\n",
                ));
                assert!(told.sampled);
                let (_, span) = collector.take(1).pop().unwrap();
                assert_eq!(
                    (span.trace_id.as_slice(), span.trace_state.as_str()),
                    (told.trace.as_slice(), "")
                );
            }
        },
    );
}

#[test]
fn requests_are_sampled_and_sent_out_as_a_client() {
    let collector = Collector::start();
    at_both(
        |endpoint, _| {
            traced(endpoint, collector.address, "random_sampling: {value: 0}").replace(
                "  - name: web\n",
                "  - name: web\n    traffic_direction: OUTBOUND\n",
            )
        },
        |subject, _| {
            collector.spans.lock().unwrap().clear();
            let mut client = subject.client();
            let told = context(&get(&mut client, "/", ""));
            assert!(!told.sampled, "{}", subject.name());
            // Who asked does not decide alone: a hop before says so by the request's id.
            let answer = get(&mut client, "/", &format!("traceparent: {PARENT}-01\r\n"));
            assert!(!context(&answer).sampled, "{}", subject.name());
            let id = "cecab692-ce09-963e-a983-9f79636837d4";
            let headers = format!("traceparent: {PARENT}-01\r\nx-request-id: {id}\r\n");
            let answer = get(&mut client, "/", &headers);
            assert!(context(&answer).sampled, "{}", subject.name());
            assert_eq!(sent_on(&answer, "x-request-id").as_deref(), Some(id));
            let (_, span) = collector.take(1).pop().unwrap();
            let told = (span.name.as_str(), span.kind);
            assert_eq!(told, ("egress a.example", CLIENT), "{}", subject.name());
            assert_eq!(subject.await_stat("http.web.tracing.not_traceable", 2), 2);
        },
    );
}

#[test]
fn a_collector_that_is_not_there_holds_nothing_up() {
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    at_both(
        |endpoint, _| traced(endpoint, nobody, "overall_sampling: {value: 100}"),
        |subject, _| {
            let mut client = subject.client();
            for _ in 0..20 {
                assert_eq!(get(&mut client, "/", "").status(), 200);
            }
            if subject.name() == "ours" {
                subject.await_stat("tracing.opentelemetry.spans_dropped", 20);
            }
        },
    );
}

/// A Zipkin collector that keeps the spans it is sent.
fn zipkin() -> (SocketAddr, Arc<Mutex<Vec<serde_json::Value>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let spans: Arc<Mutex<Vec<serde_json::Value>>> = Arc::default();
    let of_all = Arc::clone(&spans);
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let kept = Arc::clone(&of_all);
            std::thread::spawn(move || {
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                while let Ok(Some(request)) = read_message(&mut reader, false, false) {
                    assert_eq!(request.first, "POST /api/v2/spans HTTP/1.1");
                    assert_eq!(request.header("content-type"), Some("application/json"));
                    let told: Vec<serde_json::Value> = serde_json::from_slice(&request.body).unwrap();
                    kept.lock().unwrap().extend(told);
                    if stream
                        .write_all(b"HTTP/1.1 202 Accepted\r\ncontent-length: 0\r\n\r\n")
                        .is_err()
                    {
                        return;
                    }
                }
            });
        }
    });
    (address, spans)
}

const TRACE_ID: &str = "463ac35c9f6413ad";
const SPAN_ID: &str = "a2fb4a1d1a96d312";

#[test]
fn zipkins_headers_go_on_and_its_collector_is_told() {
    let (address, spans) = zipkin();
    for outbound in [false, true] {
        at_both(
            |endpoint, _| {
                let provider = "provider: {name: envoy.tracers.zipkin, typed_config: {\"@type\": type.googleapis.com/envoy.config.trace.v3.ZipkinConfig, collector_cluster: collector, collector_endpoint: /api/v2/spans, collector_endpoint_version: HTTP_JSON}}";
                let clusters = format!(
                    "[{}, {}]",
                    cluster("app", &[endpoint.address], ""),
                    cluster("collector", &[address], "")
                );
                let text = bootstrap(ROUTES, &clusters, &format!("tracing: {{{provider}}}"));
                let direction = if outbound {
                    "\n    traffic_direction: OUTBOUND"
                } else {
                    ""
                };
                text.replace("  - name: web\n", &format!("  - name: web{direction}\n"))
            },
            |subject, _| {
                spans.lock().unwrap().clear();
                let mut client = subject.client();
                let parent =
                    format!("x-b3-traceid: {TRACE_ID}\r\nx-b3-spanid: {SPAN_ID}\r\nx-b3-sampled: 1\r\n");
                let answer = get(&mut client, "/", &parent);
                let case = format!("{} outbound {outbound}", subject.name());
                assert_eq!(
                    sent_on(&answer, "x-b3-traceid").as_deref(),
                    Some(TRACE_ID),
                    "{case}"
                );
                assert_eq!(sent_on(&answer, "x-b3-sampled").as_deref(), Some("1"), "{case}");
                let span = sent_on(&answer, "x-b3-spanid").unwrap();
                let before = sent_on(&answer, "x-b3-parentspanid");
                // Who came in shares the caller's span; who goes out has its own.
                assert_eq!(span == SPAN_ID, !outbound, "{case}");
                assert_eq!(before.as_deref(), outbound.then_some(SPAN_ID), "{case}");
                // Not to be recorded: told on, and to nobody else.
                let answer = get(&mut client, "/", &format!("b3: {TRACE_ID}-{SPAN_ID}-0\r\n"));
                let single = sent_on(&answer, "b3").unwrap();
                let parts: Vec<&str> = single.split('-').collect();
                assert_eq!((parts[0], parts[2]), (TRACE_ID, "0"), "{case}");
                assert_eq!(parts[1] == SPAN_ID, !outbound, "{case}");
                assert_eq!(parts.get(3), outbound.then_some(&SPAN_ID), "{case}");
                // A trace that begins here.
                let answer = get(&mut client, "/", "");
                assert_eq!(sent_on(&answer, "x-b3-parentspanid"), None, "{case}");
                assert_eq!(sent_on(&answer, "x-b3-traceid").unwrap().len(), 16, "{case}");
                await_true("the spans", || spans.lock().unwrap().len() >= 2);
                let told = std::mem::take(&mut *spans.lock().unwrap());
                assert_eq!(told.len(), 2, "{case}");
                let first = told.iter().find(|s| s["traceId"] == TRACE_ID).expect("the first");
                assert_eq!(first["id"], span.as_str(), "{case}");
                assert_eq!(
                    first["kind"],
                    if outbound { "CLIENT" } else { "SERVER" },
                    "{case}"
                );
                assert_eq!(first["name"], "a.example", "{case}");
                assert_eq!(first["localEndpoint"]["serviceName"], "test", "{case}");
                assert_eq!(first["tags"]["http.status_code"], "200", "{case}");
                assert_eq!(first["tags"]["upstream_cluster"], "app", "{case}");
                assert!(first["duration"].as_u64() > Some(0), "{case}");
                assert!(
                    first["timestamp"].as_u64() > Some(1_000_000_000_000_000),
                    "{case}"
                );
            },
        );
    }
}
