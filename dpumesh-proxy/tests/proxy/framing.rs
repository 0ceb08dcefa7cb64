//! Messages that can be read in two ways are refused, and nothing of them reaches anybody; what passes says on the other side what it
//! said on this one.
//!
//! The cases are data: `framing/requests.txt` and `framing/responses.txt`, each line with its fate. What they are held against is
//! `framing/strict.rs`, a second reading of RFC 9112 that shares nothing with the proxy's. With `ENVOY_BIN` every case is Envoy's too;
//! `framing/envoy.txt` has its fates that differ, each under a reason.

mod corpus;
mod strict;

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use self::corpus::{Case, spelled};
use self::strict::{End, Framing, Message};
use crate::envoy;
use crate::harness::{Endpoint, Running, await_true, bootstrap, cluster, simple};

/// What a client sends behind every case.
const NEXT: &[u8] = b"GET /next HTTP/1.1\r\nHost: a\r\n\r\n";

/// What an endpoint sends behind every case, though nobody asked.
const UNASKED: &[u8] = b"HTTP/1.1 200 OK\r\nX-Unasked: 1\r\nContent-Length: 7\r\n\r\nunasked";

/// Envoy waits a second for a client that it has told to go, unless told not to.
const AT_ONCE: &str = "delayed_close_timeout: 0s";

/// How long nothing may come before a case has failed.
const PATIENCE: Duration = Duration::from_secs(20);

#[test]
fn every_request_has_its_fate_and_is_forwarded_as_it_was() {
    let cases = corpus::requests();
    assert!(cases.len() >= 400, "{} cases", cases.len());
    let endpoint = Recorder::start();
    let running = Running::start(&all_routes(endpoint.address, ""));
    let fates = cases.iter().map(|case| send(running.web(), case, &case.fate));
    let wrong = differing(&cases, fates, |case| case.fate.as_str());
    assert!(
        wrong.is_empty(),
        "{} fates differ:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
    drop(running);
    let mut wanted = Vec::new();
    for case in &cases {
        let (messages, _) = strict::requests(&[&case.octets, NEXT].concat());
        let statuses = case.fate.trim_end_matches('!').split('+');
        for (number, _) in statuses.enumerate().filter(|(_, status)| *status == "200") {
            let message = messages.get(number);
            let message =
                message.unwrap_or_else(|| panic!("{}: forwarded, and no message to anybody else", case.name));
            wanted.push((case.name.as_str(), Meaning::of(message)));
        }
    }
    let seen = endpoint.messages();
    for ((name, wanted), seen) in wanted.iter().zip(&seen) {
        assert_eq!(seen, wanted, "{name}");
    }
    assert_eq!(seen.len(), wanted.len());
}

#[test]
fn every_response_has_its_fate_and_the_next_request_its_own_response() {
    let cases = Arc::new(corpus::responses());
    assert!(cases.len() >= 100, "{} cases", cases.len());
    let endpoint = responding(&cases);
    let running = Running::start(&simple(endpoint, ""));
    let fates = (0..cases.len()).map(|number| ask(running.web(), &cases, number, true));
    let wrong = differing(&cases, fates, |case| case.fate.as_str());
    assert!(
        wrong.is_empty(),
        "{} fates differ:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}

#[test]
fn envoy_differs_where_it_is_written_down() {
    let Some(binary) = std::env::var_os("ENVOY_BIN") else {
        eprintln!("SKIP envoy: the corpus is not compared with it (set ENVOY_BIN)");
        return;
    };
    let start =
        |bootstrap: &str| envoy::start_envoy(binary.as_ref(), tempfile::tempdir().unwrap(), bootstrap);
    let differs = corpus::envoy();
    let (requests, responses) = (corpus::requests(), Arc::new(corpus::responses()));
    let envoy = start(&all_routes(Recorder::start().address, AT_ONCE));
    let fate = |case: &Case| {
        differs
            .get(case.name.as_str())
            .map_or(case.fate.as_str(), |f| spelled(f))
            .to_owned()
    };
    let fates = requests.iter().map(|case| send(envoy.web(), case, &fate(case)));
    let mut wrong = differing(&requests, fates, |case| {
        differs
            .get(case.name.as_str())
            .map_or(&*case.fate, |f| spelled(f))
    });
    let named = |case: &Case| format!("response: {}", case.name);
    let envoy = start(&simple(responding(&responses), AT_ONCE));
    let fates = (0..responses.len()).map(|number| ask(envoy.web(), &responses, number, false));
    wrong.extend(
        differing(&responses, fates, |case| {
            differs.get(named(case).as_str()).map_or(&*case.fate, |f| f)
        })
        .into_iter()
        .map(|line| line.replacen(" | ", " | response: ", 1)),
    );
    let fates: HashMap<String, &str> = requests
        .iter()
        .map(|c| (c.name.clone(), c.fate.as_str()))
        .chain(responses.iter().map(|c| (named(c), c.fate.as_str())))
        .collect();
    for (name, fate) in &differs {
        let ours = fates
            .get(*name)
            .unwrap_or_else(|| panic!("envoy.txt: no such case: {name}"));
        assert_ne!(*ours, spelled(fate), "envoy.txt: no difference: {name}");
    }
    assert!(
        wrong.is_empty(),
        "Envoy differs in {} more:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}

/// The cases whose fate is another one, in the form of `envoy.txt`.
fn differing<'a>(
    cases: &'a [Case],
    fates: impl Iterator<Item = String>,
    wanted: impl Fn(&'a Case) -> &'a str,
) -> Vec<String> {
    let pairs = cases
        .iter()
        .zip(fates)
        .filter(|(case, fate)| wanted(case) != fate);
    pairs
        .map(|(case, fate)| format!("{fate} | {}", case.name))
        .collect()
}

fn all_routes(endpoint: SocketAddr, extra: &str) -> String {
    let routes = "[{match: {prefix: /direct}, direct_response: {status: 202}}, {match: {prefix: /redirect}, redirect: {path_redirect: /x}}, \
                  {match: {prefix: /nobody}, route: {cluster: nobody}}, {match: {prefix: /}, route: {cluster: app}}]";
    let clusters = format!(
        "[{}, {}]",
        cluster("app", &[endpoint], ""),
        cluster("nobody", &[], "")
    );
    bootstrap(routes, &clusters, extra)
}

/// Plays a request case: its fate. One that is to be `wanted` need not be waited for.
fn send(web: SocketAddr, case: &Case, wanted: &str) -> String {
    let mut client = connect(web);
    // A proxy that has refused need not read it all.
    let _ = client.write_all(&[&case.octets, NEXT].concat());
    let (mut octets, mut asked) = (Vec::new(), false);
    loop {
        let fate = statuses(&octets);
        if !asked && !wanted.ends_with('!') && fate == wanted {
            // Nothing more is to come: the proxy hears the end, and has judged all that stood before it.
            asked = true;
            let _ = client.shutdown(Shutdown::Write);
        }
        match read(&mut client, &mut octets) {
            Got::Some => {}
            Got::End if asked => return fate,
            Got::End => return format!("{fate}!"),
            Got::Nothing => return fate,
        }
    }
}

/// The final statuses of the responses in `octets`.
fn statuses(octets: &[u8]) -> String {
    let (mut rest, mut all) = (octets, Vec::new());
    while let Ok((response, behind)) = strict::response(rest, "GET", true) {
        rest = behind;
        if !response.status().starts_with('1') {
            all.push(response.status().to_owned());
        }
    }
    all.join("+")
}

/// Plays a response case: what the client gets of it. Where it is judged, what passes must be what was sent, and the next request must
/// get its own response.
fn ask(web: SocketAddr, cases: &[Case], number: usize, judged: bool) -> String {
    let case = &cases[number];
    let method = case.name.split_once(": ").map_or("GET", |(method, _)| method);
    let mut client = connect(web);
    client
        .write_all(format!("{method} /{number} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes())
        .unwrap();
    let (response, open) = receive(&mut client, method);
    if !judged {
        return response.map_or_else(|| "cut".to_owned(), |response| response.status().to_owned());
    }
    let Some(response) = response else {
        next_is_its_own(connect(web), case);
        return "cut".to_owned();
    };
    let status = response.status().to_owned();
    if !matches!(status.as_str(), "502" | "503") {
        let (mut rest, mut sent) = (case.octets.as_slice(), None);
        while let Ok((message, behind)) = strict::response(rest, method, true) {
            rest = behind;
            let is_final = !message.status().starts_with('1');
            sent = Some(message);
            if is_final {
                break;
            }
        }
        let sent = sent.unwrap_or_else(|| panic!("{}: passed on, and no message to anybody else", case.name));
        assert_eq!(
            (response.status(), &response.body),
            (sent.status(), &sent.body),
            "{}",
            case.name
        );
        assert_eq!(response.values("x-unasked").count(), 0, "{}", case.name);
    }
    let goes_on = open && !response.values("connection").any(|v| v == b"close");
    next_is_its_own(if goes_on { client } else { connect(web) }, case);
    status
}

fn next_is_its_own(mut client: TcpStream, case: &Case) {
    client
        .write_all(b"GET /after HTTP/1.1\r\nHost: a\r\n\r\n")
        .unwrap();
    let (response, _) = receive(&mut client, "GET");
    let body = response.map(|response| response.body);
    assert_eq!(
        body.as_deref(),
        Some(b"after".as_slice()),
        "{}: the next request",
        case.name
    );
}

/// One response, if it is whole; whether the connection is open still.
fn receive(client: &mut TcpStream, method: &str) -> (Option<Message>, bool) {
    let mut octets = Vec::new();
    loop {
        let mut rest = octets.as_slice();
        while let Ok((response, behind)) = strict::response(rest, method, false) {
            if !response.status().starts_with('1') {
                return (Some(response), behind.is_empty());
            }
            rest = behind;
        }
        match read(client, &mut octets) {
            Got::Some => {}
            _ => {
                return (
                    strict::response(&octets, method, false).ok().map(|(r, _)| r),
                    false,
                );
            }
        }
    }
}

enum Got {
    Some,
    /// The proxy has closed.
    End,
    /// It says nothing.
    Nothing,
}

fn read(client: &mut TcpStream, octets: &mut Vec<u8>) -> Got {
    let mut room = [0; 16 * 1024];
    match client.read(&mut room) {
        Ok(0) => Got::End,
        Ok(n) => {
            octets.extend_from_slice(&room[..n]);
            Got::Some
        }
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => Got::Nothing,
        Err(_) => Got::End,
    }
}

fn connect(web: SocketAddr) -> TcpStream {
    let client = TcpStream::connect(web).unwrap();
    client.set_nodelay(true).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client
}

/// What a request says, whichever way it stands.
#[derive(Debug, PartialEq, Eq)]
struct Meaning {
    method: String,
    target: String,
    host: String,
    fields: Vec<(String, String)>,
    chunked: bool,
    body: String,
}

impl Meaning {
    /// Without what belongs to one hop, and what this one adds.
    fn of(message: &Message) -> Self {
        let text = |octets: &[u8]| octets.escape_ascii().to_string();
        let target = text(&message.first[1]);
        let host = message.values("host").next().unwrap_or_default();
        let (host, target) = match target.split_once("://") {
            Some((scheme, rest)) if !scheme.contains('/') => {
                let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
                let path = if path.is_empty() { "/" } else { path };
                (host.to_owned(), path.to_owned())
            }
            _ => (text(host), target),
        };
        let named: Vec<u8> = message
            .values("connection")
            .collect::<Vec<_>>()
            .join(&b',')
            .to_ascii_lowercase();
        let is_named = |name: &[u8]| named.split(|b| *b == b',').any(|n| n.trim_ascii() == name);
        let own = [
            "host",
            "content-length",
            "transfer-encoding",
            "connection",
            "keep-alive",
            "proxy-connection",
            "upgrade",
            "trailer",
            "http2-settings",
            "expect",
            "x-forwarded-proto",
            "x-request-id",
            "x-envoy-expected-rq-timeout-ms",
        ];
        let fields = message
            .fields
            .iter()
            .filter(|(name, _)| !own.iter().any(|o| o.as_bytes() == name.as_slice()) && !is_named(name));
        Self {
            method: text(&message.first[0]),
            target,
            host,
            fields: fields.map(|(n, v)| (text(n), text(v))).collect(),
            chunked: message.framing == Framing::Chunked,
            body: text(&message.body),
        }
    }
}

/// An endpoint that keeps every octet it gets, and answers once per connection.
struct Recorder {
    address: SocketAddr,
    /// Per connection, in the order in which they came.
    octets: Arc<Mutex<Vec<Vec<u8>>>>,
    open: Arc<AtomicUsize>,
}

impl Recorder {
    fn start() -> Self {
        let closes = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
        Self::answering(closes, |octets| !strict::requests(octets).0.is_empty())
    }

    /// One that says `answer` as soon as what has come is `enough`.
    fn answering(answer: &'static [u8], enough: fn(&[u8]) -> bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let octets: Arc<Mutex<Vec<Vec<u8>>>> = Arc::default();
        let open = Arc::new(AtomicUsize::new(0));
        let (all, count) = (Arc::clone(&octets), Arc::clone(&open));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                count.fetch_add(1, Ordering::SeqCst);
                let mut slots = all.lock().unwrap();
                slots.push(Vec::new());
                let (slot, all, count) = (slots.len() - 1, Arc::clone(&all), Arc::clone(&count));
                std::thread::spawn(move || {
                    record(stream, answer, |octets| {
                        let kept = &mut all.lock().unwrap()[slot];
                        kept.extend_from_slice(octets);
                        enough(kept)
                    });
                    count.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        Self {
            address,
            octets,
            open,
        }
    }

    /// What each request said. Call when the proxy is gone.
    fn messages(&self) -> Vec<Meaning> {
        await_true("all connections have ended", || {
            self.open.load(Ordering::SeqCst) == 0
        });
        let octets = self.octets.lock().unwrap();
        let mut all = Vec::new();
        for octets in octets.iter() {
            let (messages, end) = strict::requests(octets);
            let fine = matches!(
                (messages.len(), end),
                (1, End::Clean) | (0, End::Clean | End::Incomplete)
            );
            assert!(
                fine,
                "{end:?} behind {} messages: {}",
                messages.len(),
                octets.escape_ascii()
            );
            all.extend(messages.iter().map(Meaning::of));
        }
        all
    }
}

fn record(mut stream: TcpStream, answer: &[u8], mut enough: impl FnMut(&[u8]) -> bool) {
    let (mut room, mut answered) = ([0; 16 * 1024], false);
    while let Ok(n) = stream.read(&mut room) {
        if n == 0 {
            return;
        }
        if enough(&room[..n]) && !answered {
            answered = true;
            // The other side sees it if it fails.
            let _ = stream.write_all(answer);
        }
    }
}

/// An endpoint that answers `/N` with the octets of case N, and all else with `after`.
fn responding(cases: &Arc<Vec<Case>>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let cases = Arc::clone(cases);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let cases = Arc::clone(&cases);
            std::thread::spawn(move || respond(stream, &cases));
        }
    });
    address
}

fn respond(mut stream: TcpStream, cases: &[Case]) {
    let (mut room, mut octets) = ([0; 16 * 1024], Vec::new());
    while let Ok(n @ 1..) = stream.read(&mut room) {
        octets.extend_from_slice(&room[..n]);
        let (messages, _) = strict::requests(&octets);
        let Some(request) = messages.first() else { continue };
        let path = String::from_utf8_lossy(&request.first[1][1..]).into_owned();
        octets.clear();
        let written = match path.parse::<usize>() {
            Ok(number) if cases[number].ends => {
                // The proxy may have gone after its first octets.
                let _ = stream.write_all(&cases[number].octets);
                return;
            }
            Ok(number) => stream.write_all(&[&cases[number].octets, UNASKED].concat()),
            Err(_) => stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nafter"),
        };
        if written.is_err() {
            return;
        }
    }
}

#[test]
fn a_body_that_the_endpoint_did_not_wait_for_is_nobodys_request() {
    // CVE-2025-4366: what is left of a body must not be what its connection carries next, on either side.
    let inner = "GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n";
    for framing in [
        format!("Content-Length: {}", inner.len()),
        "Transfer-Encoding: chunked".to_owned(),
    ] {
        let endpoint = Recorder::answering(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", |octets| {
            octets.windows(4).any(|end| end == b"\r\n\r\n")
        });
        let running = Running::start(&simple(endpoint.address, ""));
        let mut client = running.client();
        client.send(format!("POST /early HTTP/1.1\r\nHost: a\r\n{framing}\r\n\r\n"));
        let response = client.receive();
        assert_eq!(
            (response.status(), response.header("connection")),
            (200, Some("close")),
            "{framing}"
        );
        // The proxy may have closed already.
        let _ = client.reader.get_mut().write_all(inner.as_bytes());
        assert!(client.is_closed(), "{framing}");
        assert_eq!(running.client().get("/after").status(), 200, "{framing}");
        drop(running);
        let targets: Vec<String> = endpoint.messages().into_iter().map(|m| m.target).collect();
        assert!(targets.ends_with(&["/after".to_owned()]), "{targets:?}");
        assert!(
            targets.iter().all(|t| t == "/after" || t == "/early"),
            "{targets:?}"
        );
    }
}

#[test]
fn an_answer_in_an_endpoints_place_ends_exactly_behind_the_requests_body() {
    let endpoint = Endpoint::start("only");
    let running = Running::start(&simple(endpoint.address, ""));
    let next = "GET /next HTTP/1.1\r\nHost: a\r\n\r\n";
    for (body, rest) in [
        ("Content-Length: 2\r\n\r\n", "ab"),
        ("Transfer-Encoding: chunked\r\n\r\n", "2\r\nab\r\n0\r\n\r\n"),
    ] {
        let mut client = running.client();
        client.send(format!("POST /hang-up HTTP/1.1\r\nHost: a\r\n{body}{rest}{next}"));
        let response = client.receive();
        assert_eq!(
            (response.status(), response.header("connection")),
            (503, None),
            "{body}"
        );
        assert!(client.receive().text().starts_with("GET /next "), "{body}");
        assert_eq!(client.get("/again").status(), 200);
    }
}

#[test]
fn an_answer_in_the_middle_of_a_requests_body_ends_the_connection() {
    let endpoint = Endpoint::start("only");
    let extra = "stream_idle_timeout: 0.2s";
    let running = Running::start(&simple(endpoint.address, extra));
    for body in [
        "Content-Length: 4\r\n\r\nab",
        "Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n",
    ] {
        let mut client = running.client();
        client.send(format!("POST /echo HTTP/1.1\r\nHost: a\r\n{body}"));
        let response = client.receive();
        assert_eq!(
            (response.status(), response.header("connection")),
            (408, Some("close"))
        );
        assert!(client.is_closed());
    }
}
