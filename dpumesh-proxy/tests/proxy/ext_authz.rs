//! Another service decides about requests. Each case is checked at Envoy too.

use std::io::{BufReader, Write};
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use dpumesh_proxy::ext_authz::message::{
    CheckRequest, CheckResponse, Denied, HeaderOption, HeaderValue, HttpResponse, HttpStatus, Passed,
    QueryParameter, Status,
};
use prost::Message as _;

use crate::envoy::{Subject, at_both};
use crate::harness::{Client, Endpoint, Message, bootstrap_with, cluster, read_message};

const FILTER: &str = "type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthz";
const PER_ROUTE: &str = "type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthzPerRoute";
const RBAC: &str = "type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC";
const HTTP2: &str = ", typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {\"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: {http2_protocol_options: {}}}}";

/// A service that keeps what it was asked.
struct Service<Q> {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<Q>>>,
}

impl<Q> Service<Q> {
    fn take(&self) -> Vec<Q> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }
}

fn header(name: &str, value: &str, append: Option<bool>) -> HeaderOption {
    HeaderOption {
        header: Some(HeaderValue {
            key: name.to_owned(),
            value: value.to_owned(),
            ..HeaderValue::default()
        }),
        append,
        append_action: 0,
    }
}

/// What the gRPC service says, by the path; `None` fails.
fn decide(path: &str) -> Option<CheckResponse> {
    let answer = |code, http_response| {
        let status = Some(Status { code });
        Some(CheckResponse {
            status,
            http_response,
        })
    };
    match path.split('?').next().unwrap_or_default() {
        "/denied" => answer(
            7,
            Some(HttpResponse::Denied(Denied {
                status: Some(HttpStatus { code: 401 }),
                headers: vec![
                    header("www-authenticate", "Basic", None),
                    header("content-type", "text/html", None),
                ],
                body: "<b>no</b>".to_owned(),
            })),
        ),
        "/denied-without-a-word" => answer(7, None),
        "/changed" => answer(
            0,
            Some(HttpResponse::Ok(Passed {
                headers: vec![
                    header("x-user", "me", None),
                    header("x-list", "b", Some(true)),
                    header("x-role", "admin", Some(false)),
                    header("x-absent", "1", Some(true)),
                ],
                headers_to_remove: vec!["x-secret".to_owned()],
                response_headers_to_add: vec![header("x-out", "1", None)],
                query_parameters_to_set: vec![QueryParameter {
                    key: "q".to_owned(),
                    value: "2".to_owned(),
                }],
                query_parameters_to_remove: vec!["gone".to_owned()],
            })),
        ),
        "/failed" => None,
        "/slow" => {
            std::thread::sleep(Duration::from_millis(600));
            answer(0, None)
        }
        _ => answer(0, None),
    }
}

fn grpc() -> Service<CheckRequest> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let asked: Arc<Mutex<Vec<CheckRequest>>> = Arc::default();
    let seen = Arc::clone(&asked);
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let seen = Arc::clone(&seen);
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build()
                    .unwrap();
                runtime.block_on(serve_grpc(stream, &seen));
            });
        }
    });
    Service { address, asked }
}

async fn serve_grpc(stream: std::net::TcpStream, seen: &Mutex<Vec<CheckRequest>>) {
    stream.set_nonblocking(true).unwrap();
    let stream = tokio::net::TcpStream::from_std(stream).unwrap();
    let Ok(mut connection) = h2::server::handshake(stream).await else {
        return;
    };
    while let Some(Ok((request, mut respond))) = connection.accept().await {
        assert_eq!(request.uri().path(), "/envoy.service.auth.v3.Authorization/Check");
        assert_eq!(request.headers()["content-type"], "application/grpc");
        assert_eq!(request.headers()["te"], "trailers");
        let mut body = request.into_body();
        let mut data = Vec::new();
        // Its frames come while the connection is driven.
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
        let request = CheckRequest::decode(&data[5..]).unwrap();
        let attributes = request.attributes.as_ref().unwrap();
        let path = attributes
            .request
            .as_ref()
            .unwrap()
            .http
            .as_ref()
            .unwrap()
            .path
            .clone();
        seen.lock().unwrap().push(request);
        let decided = decide(&path);
        let mut response = respond.send_response(http::Response::new(()), false).unwrap();
        let mut trailers = http::HeaderMap::new();
        match decided {
            Some(decided) => {
                let message = decided.encode_to_vec();
                let length = (message.len() as u32).to_be_bytes();
                let frame = [b"\0".as_slice(), &length, &message].concat();
                response.send_data(Bytes::from(frame), false).unwrap();
                trailers.insert("grpc-status", "0".parse().unwrap());
            }
            None => drop(trailers.insert("grpc-status", "13".parse().unwrap())),
        }
        response.send_trailers(trailers).unwrap();
    }
}

/// A service that answers by the path's last segment.
fn web() -> Service<Message> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let asked: Arc<Mutex<Vec<Message>>> = Arc::default();
    let seen = Arc::clone(&asked);
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let seen = Arc::clone(&seen);
            std::thread::spawn(move || {
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                while let Ok(Some(request)) = read_message(&mut reader, false, false) {
                    let path = request.first.split(' ').nth(1).unwrap_or_default().to_owned();
                    let answer = match path.rsplit('/').next().unwrap_or_default() {
                        "denied" => {
                            "401 No\r\nwww-authenticate: Basic\r\nx-told: yes\r\nset-cookie: a=1\r\nset-cookie: b=2\r\ncontent-length: 2\r\n\r\nno"
                        }
                        "moved" => "302 Found\r\nlocation: /login\r\ncontent-length: 0\r\n\r\n",
                        "failed" => "503 Bad\r\nx-told: yes\r\ncontent-length: 3\r\n\r\nbad",
                        _ => {
                            "200 OK\r\nx-user: me\r\nx-list: b\r\nx-hidden: h\r\nx-out: 1\r\nx-envoy-auth-headers-to-remove: x-secret, x-more\r\ncontent-length: 2\r\n\r\nok"
                        }
                    };
                    seen.lock().unwrap().push(request);
                    if stream.write_all(format!("HTTP/1.1 {answer}").as_bytes()).is_err() {
                        return;
                    }
                }
            });
        }
    });
    Service { address, asked }
}

fn filter(config: &str) -> String {
    format!(
        "- {{name: envoy.filters.http.ext_authz, typed_config: {{\"@type\": {FILTER}, transport_api_version: V3, {config}}}}}\n          "
    )
}

const BY_GRPC: &str = "grpc_service: {envoy_grpc: {cluster_name: authz}, timeout: 0.3s}";
const ALL: &str = "[{match: {prefix: /}, route: {cluster: app}}]";

fn clusters(endpoint: &Endpoint, service: SocketAddr, more: &str) -> String {
    format!(
        "[{}, {}]",
        cluster("app", &[endpoint.address], ""),
        cluster("authz", &[service], more)
    )
}

fn get(client: &mut Client, path: &str, headers: &str) -> Message {
    client.send(format!("GET {path} HTTP/1.1\r\nHost: a.example\r\n{headers}\r\n"));
    client.receive()
}

/// What reached the endpoint of a header.
fn sent_on(answer: &Message, name: &str) -> Option<String> {
    let text = answer.text();
    let mut lines = text.lines();
    let front = format!("{name}: ");
    lines.find_map(|line| line.strip_prefix(&front).map(str::to_owned))
}

fn counted(subject: &Subject, members: &[(&str, u64)]) {
    for (member, value) in members {
        subject.await_value(&format!("http.web.ext_authz.{member}"), *value);
    }
}

#[test]
fn a_grpc_service_lets_pass_denies_and_changes() {
    let service = grpc();
    at_both(
        |endpoint, _| {
            let routes = format!(
                "[{{match: {{prefix: /free}}, route: {{cluster: app}}, typed_per_filter_config: {{envoy.filters.http.ext_authz: {{\"@type\": {PER_ROUTE}, disabled: true}}}}}}, \
                 {{match: {{prefix: /told}}, route: {{cluster: app}}, typed_per_filter_config: {{envoy.filters.http.ext_authz: {{\"@type\": {PER_ROUTE}, check_settings: {{context_extensions: {{pod: shop}}}}}}}}}}, \
                 {{match: {{prefix: /}}, route: {{cluster: app}}}}]"
            );
            let clusters = clusters(endpoint, service.address, HTTP2);
            bootstrap_with(&routes, &clusters, "", &filter(BY_GRPC), "")
        },
        |subject, endpoint| {
            service.take();
            let mut client = subject.client();
            assert_eq!(get(&mut client, "/free", "").status(), 200);
            assert_eq!(service.take().len(), 0);

            let answer = get(
                &mut client,
                "/told?x=1",
                "X-One: 1\r\nX-One: 2\r\nAuthorization: b\r\n",
            );
            assert_eq!(answer.status(), 200);
            let asked = service.take().pop().expect("was asked").attributes.unwrap();
            assert_eq!(asked.context_extensions["pod"], "shop");
            let source = asked.source.unwrap();
            let address = source.address.unwrap().socket_address.unwrap();
            assert_eq!(address.address, "127.0.0.1");
            assert_ne!(address.port_value, 0);
            assert_eq!((source.principal, source.service), (String::new(), String::new()));
            let destination = asked
                .destination
                .unwrap()
                .address
                .unwrap()
                .socket_address
                .unwrap();
            assert_eq!(destination.port_value, u32::from(subject.web().port()));
            let request = asked.request.unwrap();
            assert!(request.time.is_some());
            let http = request.http.unwrap();
            let told = (
                &*http.method,
                &*http.path,
                &*http.host,
                &*http.scheme,
                &*http.protocol,
            );
            assert_eq!(told, ("GET", "/told?x=1", "a.example", "http", "HTTP/1.1"));
            assert_eq!(http.headers[":authority"], "a.example");
            assert_eq!(http.headers[":path"], "/told?x=1");
            assert_eq!(http.headers[":method"], "GET");
            assert_eq!(http.headers[":scheme"], "http");
            assert_eq!(http.headers["x-one"], "1,2");
            assert_eq!(http.headers["authorization"], "b");
            assert_eq!(http.headers["x-forwarded-proto"], "http");
            assert_eq!(http.headers["x-request-id"].len(), 36);
            assert!(http.body.is_empty());

            let answer = get(
                &mut client,
                "/changed?gone=1&q=0&stays=3",
                "X-User: client\r\nX-List: a\r\nX-Secret: s\r\n",
            );
            assert_eq!(answer.status(), 200, "{}", subject.name());
            assert_eq!(answer.header("x-out"), Some("1"));
            assert_eq!(sent_on(&answer, "x-user").as_deref(), Some("me"));
            assert_eq!(sent_on(&answer, "x-role").as_deref(), Some("admin"));
            assert_eq!(sent_on(&answer, "x-secret"), None);
            assert_eq!(sent_on(&answer, "x-list").as_deref(), Some("a,b"));
            assert_eq!(sent_on(&answer, "x-absent"), None, "{}", subject.name());
            let line = answer.text().lines().next().unwrap().to_owned();
            assert!(line.contains("stays=3") && line.contains("q=2"), "{line}");
            assert!(!line.contains("gone") && !line.contains("q=0"), "{line}");

            let before = endpoint.requests();
            let answer = get(&mut client, "/denied", "");
            assert_eq!((answer.status(), answer.text().as_str()), (401, "<b>no</b>"));
            assert_eq!(answer.header("www-authenticate"), Some("Basic"));
            assert_eq!(answer.header("content-type"), Some("text/html"));
            let answer = get(&mut client, "/denied-without-a-word", "");
            assert_eq!((answer.status(), answer.text().as_str()), (403, ""));
            let answer = get(&mut client, "/failed", "");
            assert_eq!((answer.status(), answer.text().as_str()), (403, ""));
            assert_eq!(get(&mut client, "/slow", "").status(), 403);
            assert_eq!(endpoint.requests(), before, "nothing of it was forwarded");
            counted(subject, &[("ok", 2), ("denied", 2), ("error", 2)]);
            if subject.name() == "ours" {
                counted(subject, &[("timeout", 1)]);
            }
        },
    );
}

#[test]
fn an_http_service_lets_pass_denies_and_changes() {
    let service = web();
    at_both(
        |endpoint, _| {
            let config = "http_service: {server_uri: {uri: \"http://authz.example\", cluster: authz, timeout: 1s}, path_prefix: /check, \
                 authorization_request: {headers_to_add: [{key: x-from, value: proxy}]}, \
                 authorization_response: {allowed_upstream_headers: {patterns: [{exact: x-user}]}, allowed_upstream_headers_to_append: {patterns: [{exact: x-list}]}, \
                 allowed_client_headers_on_success: {patterns: [{prefix: x-out}]}}}, allowed_headers: {patterns: [{prefix: x-may}]}";
            bootstrap_with(
                ALL,
                &clusters(endpoint, service.address, ""),
                "",
                &filter(config),
                "",
            )
        },
        |subject, endpoint| {
            service.take();
            let mut client = subject.client();
            client.send("POST /app?x HTTP/1.1\r\nHost: a.example\r\nX-User: client\r\nX-List: a\r\nX-Secret: s\r\nX-May-See: 1\r\nX-Not: 1\r\nAuthorization: t\r\nContent-Length: 3\r\n\r\nabc");
            let answer = client.receive();
            assert_eq!(answer.status(), 200);
            assert_eq!(sent_on(&answer, "x-user").as_deref(), Some("me"));
            // A line of its own; the endpoint shows the last.
            assert_eq!(sent_on(&answer, "x-list").as_deref(), Some("b"));
            assert_eq!(sent_on(&answer, "x-hidden"), None);
            assert_eq!(sent_on(&answer, "x-secret"), None, "{}", subject.name());
            assert_eq!(answer.header("x-out"), Some("1"));
            let asked = service.take().pop().expect("was asked");
            assert_eq!(asked.first, "POST /check/app?x HTTP/1.1");
            assert_eq!(asked.header("host"), Some("a.example"));
            assert_eq!(asked.header("authorization"), Some("t"));
            assert_eq!(asked.header("x-may-see"), Some("1"));
            assert_eq!(asked.header("x-from"), Some("proxy"));
            assert_eq!(asked.header("content-length"), Some("0"));
            assert_eq!(asked.header("x-not"), None);

            let before = endpoint.requests();
            let answer = get(&mut client, "/denied", "");
            assert_eq!((answer.status(), answer.text().as_str()), (401, "no"));
            assert_eq!(answer.header("www-authenticate"), Some("Basic"));
            assert_eq!(answer.header("x-told"), Some("yes"));
            let answer = get(&mut client, "/moved", "");
            assert_eq!(
                (answer.status(), answer.header("location")),
                (302, Some("/login"))
            );
            let answer = get(&mut client, "/failed", "");
            assert_eq!((answer.status(), answer.text().as_str()), (403, ""));
            assert_eq!(answer.header("x-told"), None);
            assert_eq!(endpoint.requests(), before);
            counted(subject, &[("ok", 1), ("denied", 2), ("error", 1)]);
        },
    );
}

#[test]
fn nobody_there_is_a_refusal_unless_it_is_configured_otherwise() {
    let gone = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for (more, status, told) in [
        ("", 403, None),
        (", status_on_error: {code: 503}", 503, None),
        (", failure_mode_allow: true", 200, None),
        (
            ", failure_mode_allow: true, failure_mode_allow_header_add: true",
            200,
            Some("true"),
        ),
        (", filter_enabled: {default_value: {numerator: 0}}", 200, None),
        (
            ", filter_enabled: {default_value: {numerator: 0}}, deny_at_disable: {default_value: true, runtime_key: k}",
            403,
            None,
        ),
    ] {
        at_both(
            |endpoint, _| {
                let config = format!("{BY_GRPC}{more}");
                bootstrap_with(ALL, &clusters(endpoint, gone, HTTP2), "", &filter(&config), "")
            },
            |subject, _| {
                let answer = get(&mut subject.client(), "/", "");
                assert_eq!(answer.status(), status, "{more} at {}", subject.name());
                let seen = sent_on(&answer, "x-envoy-auth-failure-mode-allowed");
                assert_eq!(seen.as_deref(), told, "{more} at {}", subject.name());
            },
        );
    }
}

#[test]
fn bodies_go_with_the_question_and_on() {
    let service = grpc();
    for partial in [false, true] {
        at_both(
            |endpoint, _| {
                let config = format!(
                    "{BY_GRPC}, with_request_body: {{max_request_bytes: 20, allow_partial_message: {partial}}}"
                );
                let clusters = clusters(endpoint, service.address, HTTP2);
                bootstrap_with(ALL, &clusters, "", &filter(&config), "")
            },
            |subject, _| {
                service.take();
                let mut client = subject.client();
                let whole = "ten octets";
                let long = whole.repeat(5);
                let chunked = |body: &str| {
                    let (a, b) = body.split_at(body.len() / 2);
                    format!(
                        "POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{:x}\r\n{a}\r\n{:x}\r\n{b}\r\n0\r\n\r\n",
                        a.len(),
                        b.len()
                    )
                };
                let plain = |body: &str| {
                    let length = body.len();
                    format!("POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n{body}")
                };
                for (request, body) in [
                    (plain(whole), whole),
                    (chunked(whole), whole),
                    (plain(&long), &long),
                    (chunked(&long), &long),
                ] {
                    let case = format!("{request} at {} partial {partial}", subject.name());
                    // In pieces, as a slow client sends it.
                    let (a, b) = request.split_at(request.len() - 9);
                    client.send(a);
                    std::thread::sleep(Duration::from_millis(30));
                    client.send(b);
                    let answer = client.receive();
                    let asked = service.take().pop();
                    let http = asked.and_then(|a| a.attributes?.request?.http);
                    if body.len() > 20 && !partial {
                        assert_eq!(answer.status(), 413, "{case}");
                        assert!(http.is_none(), "{case}");
                        client = subject.client();
                        continue;
                    }
                    assert_eq!((answer.status(), answer.text().as_str()), (200, body), "{case}");
                    let http = http.expect("was asked");
                    let cut = body.len() > 20;
                    assert_eq!(
                        http.headers["x-envoy-auth-partial-body"],
                        cut.to_string(),
                        "{case}"
                    );
                    assert_eq!(http.body, body[..body.len().min(20)], "{case}");
                }
            },
        );
    }
}

/// istiod's way for AuthorizationPolicy with action CUSTOM.
#[test]
fn shadow_rules_say_who_is_asked_about() {
    let service = grpc();
    at_both(
        |endpoint, _| {
            let config = format!(
                "{BY_GRPC}, filter_enabled_metadata: {{filter: envoy.filters.http.rbac, path: [{{key: istio_ext_authz_shadow_effective_policy_id}}], value: {{string_match: {{prefix: istio-ext-authz}}}}}}"
            );
            let rbac = format!(
                "- {{name: envoy.filters.http.rbac, typed_config: {{\"@type\": {RBAC}, shadow_rules_stat_prefix: istio_ext_authz_, shadow_rules: {{action: DENY, policies: {{\"istio-ext-authz-ns[shop]-policy[p]-rule[0]\": {{permissions: [{{url_path: {{path: {{prefix: /denied}}}}}}], principals: [{{any: true}}]}}}}}}}}}}\n          "
            );
            let filters = rbac + &filter(&config);
            bootstrap_with(ALL, &clusters(endpoint, service.address, HTTP2), "", &filters, "")
        },
        |subject, _| {
            service.take();
            let mut client = subject.client();
            assert_eq!(get(&mut client, "/free", "").status(), 200);
            assert!(service.take().is_empty());
            assert_eq!(get(&mut client, "/denied", "").status(), 401);
            assert_eq!(service.take().len(), 1);
            counted(subject, &[("disabled", 1), ("denied", 1)]);
        },
    );
}

/// What a service adds is part of the request: rules behind it see it.
#[test]
fn later_rules_see_what_was_added() {
    let service = grpc();
    at_both(
        |endpoint, _| {
            let rbac = format!(
                "- {{name: envoy.filters.http.rbac, typed_config: {{\"@type\": {RBAC}, rules: {{action: DENY, policies: {{admins: {{permissions: [{{header: {{name: x-role, string_match: {{exact: admin}}}}}}], principals: [{{any: true}}]}}}}}}}}}}\n          "
            );
            let filters = filter(BY_GRPC) + &rbac;
            bootstrap_with(ALL, &clusters(endpoint, service.address, HTTP2), "", &filters, "")
        },
        |subject, _| {
            let mut client = subject.client();
            assert_eq!(get(&mut client, "/", "").status(), 200);
            assert_eq!(
                get(&mut client, "/changed", "").status(),
                403,
                "{}",
                subject.name()
            );
        },
    );
}
