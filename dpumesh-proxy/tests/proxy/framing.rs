//! Messages that can be read in two ways are refused, and nothing of them reaches an endpoint.

use crate::harness::{Client, Endpoint, Running, simple};

/// Refused requests: name, octets. Each is followed by a request that must not be seen by anyone.
const REFUSED: &[(&str, &str)] = &[
    (
        "content-length beside transfer-encoding",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ),
    (
        "transfer-encoding beside content-length",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    ),
    (
        "two content-lengths",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n12345",
    ),
    (
        "the same content-length twice",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\n12345",
    ),
    (
        "a list of content-lengths",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5, 5\r\n\r\n12345",
    ),
    (
        "a signed content-length",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +5\r\n\r\n12345",
    ),
    (
        "a negative content-length",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
    ),
    (
        "a hexadecimal content-length",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0x5\r\n\r\n12345",
    ),
    (
        "a content-length with a blank inside",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1 2\r\n\r\n1",
    ),
    (
        "an empty content-length",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length:\r\n\r\n",
    ),
    (
        "a content-length beyond 64 bits",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999\r\n\r\n",
    ),
    (
        "a content-length with a point",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5.0\r\n\r\n12345",
    ),
    (
        "transfer-encoding identity",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: identity\r\n\r\n",
    ),
    (
        "transfer-encoding gzip, chunked",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    ),
    (
        "transfer-encoding chunked, gzip",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    ),
    (
        "transfer-encoding chunked, chunked",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    ),
    (
        "transfer-encoding twice",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ),
    (
        "transfer-encoding xchunked",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    ),
    (
        "transfer-encoding with a vertical tab",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    ),
    (
        "transfer-encoding quoted",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: \"chunked\"\r\n\r\n0\r\n\r\n",
    ),
    (
        "an empty transfer-encoding",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding:\r\n\r\n",
    ),
    (
        "transfer-encoding with a parameter",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked;a=b\r\n\r\n0\r\n\r\n",
    ),
    (
        "a blank before the colon",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    ),
    (
        "a tab before the colon",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length\t: 5\r\n\r\n12345",
    ),
    (
        "a folded line",
        "GET / HTTP/1.1\r\nHost: a\r\nX: 1\r\n folded\r\n\r\n",
    ),
    (
        "a folded line with a tab",
        "GET / HTTP/1.1\r\nHost: a\r\nX: 1\r\n\tfolded\r\n\r\n",
    ),
    ("a folded first header", "GET / HTTP/1.1\r\n Host: a\r\n\r\n"),
    (
        "a folded transfer-encoding",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    ),
    (
        "bare LF after the request line",
        "GET / HTTP/1.1\nHost: a\r\n\r\n",
    ),
    (
        "bare LF after a header",
        "GET / HTTP/1.1\r\nHost: a\nX: 1\r\n\r\n",
    ),
    ("bare LF at the end", "GET / HTTP/1.1\r\nHost: a\r\n\n"),
    ("bare LFs only", "GET / HTTP/1.1\nHost: a\n\n"),
    (
        "a bare CR in a value",
        "GET / HTTP/1.1\r\nHost: a\r\nX: 1\r2\r\n\r\n",
    ),
    (
        "a bare CR before a line",
        "GET / HTTP/1.1\r\nHost: a\r\n\rX: 1\r\n\r\n",
    ),
    ("two CRs", "GET / HTTP/1.1\r\r\nHost: a\r\n\r\n"),
    ("NUL in a value", "GET / HTTP/1.1\r\nHost: a\r\nX: 1\x002\r\n\r\n"),
    ("NUL in a name", "GET / HTTP/1.1\r\nHost: a\r\nX\x00: 1\r\n\r\n"),
    ("DEL in a value", "GET / HTTP/1.1\r\nHost: a\r\nX: \x7f\r\n\r\n"),
    ("an empty header name", "GET / HTTP/1.1\r\nHost: a\r\n: 1\r\n\r\n"),
    (
        "a header without a colon",
        "GET / HTTP/1.1\r\nHost: a\r\nnothing\r\n\r\n",
    ),
    (
        "a blank in a header name",
        "GET / HTTP/1.1\r\nHost: a\r\nX Y: 1\r\n\r\n",
    ),
    (
        "a bracket in a header name",
        "GET / HTTP/1.1\r\nHost: a\r\nX[Y]: 1\r\n\r\n",
    ),
    (
        "a header name above ASCII",
        "GET / HTTP/1.1\r\nHost: a\r\nX\u{e9}: 1\r\n\r\n",
    ),
    ("an empty line first", "\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n"),
    ("a blank first", " GET / HTTP/1.1\r\nHost: a\r\n\r\n"),
    (
        "two blanks in the request line",
        "GET  / HTTP/1.1\r\nHost: a\r\n\r\n",
    ),
    ("a blank after the version", "GET / HTTP/1.1 \r\nHost: a\r\n\r\n"),
    ("a tab in the request line", "GET\t/ HTTP/1.1\r\nHost: a\r\n\r\n"),
    ("a blank in the target", "GET /a b HTTP/1.1\r\nHost: a\r\n\r\n"),
    ("NUL in the target", "GET /a\x00b HTTP/1.1\r\nHost: a\r\n\r\n"),
    ("a target above ASCII", "GET /\u{e9} HTTP/1.1\r\nHost: a\r\n\r\n"),
    ("a fragment", "GET /a#b HTTP/1.1\r\nHost: a\r\n\r\n"),
    ("a target without a slash", "GET a HTTP/1.1\r\nHost: a\r\n\r\n"),
    (
        "a target of another scheme",
        "GET ftp://a/ HTTP/1.1\r\nHost: a\r\n\r\n",
    ),
    (
        "user information in the target",
        "GET http://u@a/ HTTP/1.1\r\nHost: a\r\n\r\n",
    ),
    (
        "an empty authority in the target",
        "GET http:/// HTTP/1.1\r\nHost: a\r\n\r\n",
    ),
    ("an asterisk without OPTIONS", "GET * HTTP/1.1\r\nHost: a\r\n\r\n"),
    ("no target", "GET HTTP/1.1\r\nHost: a\r\n\r\n"),
    ("HTTP/0.9", "GET /\r\n\r\n"),
    ("no version number", "GET / HTTP/\r\nHost: a\r\n\r\n"),
    ("a lower-case version", "GET / http/1.1\r\nHost: a\r\n\r\n"),
    ("HTTP/1.2", "GET / HTTP/1.2\r\nHost: a\r\n\r\n"),
    (
        "HTTP/2.0 without the preface",
        "GET / HTTP/2.0\r\nHost: a\r\n\r\n",
    ),
    (
        "the HTTP/2 preface with a header",
        "PRI * HTTP/2.0\r\nHost: a\r\n\r\nSM\r\n\r\n",
    ),
    (
        "the HTTP/2 preface as a path",
        "PRI /x HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ),
    ("a bracket in the method", "GE(T / HTTP/1.1\r\nHost: a\r\n\r\n"),
    ("no host", "GET / HTTP/1.1\r\n\r\n"),
    ("an empty host", "GET / HTTP/1.1\r\nHost:\r\n\r\n"),
    ("two hosts", "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"),
    (
        "the same host twice",
        "GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
    ),
    ("a host with a path", "GET / HTTP/1.1\r\nHost: a/b\r\n\r\n"),
    (
        "a host with user information",
        "GET / HTTP/1.1\r\nHost: u@a\r\n\r\n",
    ),
    ("a host with a blank", "GET / HTTP/1.1\r\nHost: a b\r\n\r\n"),
    ("a list of hosts", "GET / HTTP/1.1\r\nHost: a b,c\r\n\r\n"),
    (
        "a host with a port of letters",
        "GET / HTTP/1.1\r\nHost: a:b\r\n\r\n",
    ),
    (
        "transfer-encoding in HTTP/1.0",
        "POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ),
    ("CONNECT with a path", "CONNECT /a HTTP/1.1\r\nHost: a\r\n\r\n"),
    ("a TLS hello", "\x16\x03\x01\x00\x05hello\n\r\n\r\n"),
];

/// Chunked bodies that are refused after a good head.
const REFUSED_CHUNKS: &[(&str, &str)] = &[
    ("no size", "\r\nabc\r\n0\r\n\r\n"),
    ("a size of letters", "xyz\r\nabc\r\n0\r\n\r\n"),
    ("a prefixed size", "0x3\r\nabc\r\n0\r\n\r\n"),
    ("a signed size", "+3\r\nabc\r\n0\r\n\r\n"),
    ("a negative size", "-3\r\nabc\r\n0\r\n\r\n"),
    ("a size beyond 60 bits", "10000000000000003\r\nabc\r\n0\r\n\r\n"),
    ("a blank before the size", " 3\r\nabc\r\n0\r\n\r\n"),
    ("a blank after the size", "3 \r\nabc\r\n0\r\n\r\n"),
    ("a size line with bare LF", "3\nabc\r\n0\r\n\r\n"),
    ("data with bare LF", "3\r\nabc\n0\r\n\r\n"),
    ("data longer than its size", "3\r\nabcd\r\n0\r\n\r\n"),
    ("data ending in CR alone", "3\r\nabc\r0\r\n\r\n"),
    ("an extension of garbage", "3;\r\nabc\r\n0\r\n\r\n"),
    ("an extension with a blank name", "3; =1\r\nabc\r\n0\r\n\r\n"),
    ("an extension with an open quote", "3;a=\"b\r\nabc\r\n0\r\n\r\n"),
    ("an extension with a bare CR", "3;a\rb\r\nabc\r\n0\r\n\r\n"),
    ("an extension with a bare LF", "3;a\nb\r\nabc\r\n0\r\n\r\n"),
    ("an extension without a semicolon", "3 a=b\r\nabc\r\n0\r\n\r\n"),
    ("a last chunk with a bare LF", "3\r\nabc\r\n0\n\n"),
    ("a trailer without a colon", "3\r\nabc\r\n0\r\ntrailer\r\n\r\n"),
    ("a trailer with a blank name", "3\r\nabc\r\n0\r\nx y: 1\r\n\r\n"),
    ("a folded trailer", "3\r\nabc\r\n0\r\nx: 1\r\n 2\r\n\r\n"),
    ("a trailer with NUL", "3\r\nabc\r\n0\r\nx: \x00\r\n\r\n"),
];

const SMUGGLED: &str = "GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n";

#[test]
fn ambiguous_requests_are_refused_and_reach_nobody() {
    let endpoint = Endpoint::start("only");
    let running = Running::start(&simple(endpoint.address, ""));
    for (name, octets) in REFUSED {
        let mut client = Client::connect(running.web());
        client.send(format!("{octets}{SMUGGLED}"));
        let response = client.receive();
        assert!(
            (400..=505).contains(&response.status()),
            "{name}: {}",
            response.first
        );
        assert_eq!(response.header("connection"), Some("close"), "{name}");
        assert!(client.is_closed(), "{name}: the connection stays open");
        assert_eq!(endpoint.requests(), 0, "{name}: an endpoint saw it");
    }
    assert!(REFUSED.len() + REFUSED_CHUNKS.len() >= 100);
}

#[test]
fn ambiguous_chunks_are_refused_and_complete_no_request() {
    let endpoint = Endpoint::start("only");
    let running = Running::start(&simple(endpoint.address, ""));
    for (name, chunks) in REFUSED_CHUNKS {
        let mut client = Client::connect(running.web());
        client.send("POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n");
        client.send(format!("{chunks}{SMUGGLED}"));
        let response = client.receive();
        assert_eq!(response.status(), 400, "{name}: {}", response.first);
        assert!(client.is_closed(), "{name}: the connection stays open");
        assert_eq!(endpoint.requests(), 0, "{name}: an endpoint saw a whole request");
    }
}

#[test]
fn unusual_but_clear_requests_pass() {
    let endpoint = Endpoint::start("only");
    let running = Running::start(&simple(endpoint.address, ""));
    let passed = [
        (
            "tabs around a value",
            "GET / HTTP/1.1\r\nHost: a\r\nX:\t1 \t\r\n\r\n",
            "x: 1\n",
        ),
        ("an empty value", "GET / HTTP/1.1\r\nHost: a\r\nX:\r\n\r\n", "x:"),
        (
            "CHUNKED in capitals",
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: CHUNKED\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
            "chunked",
        ),
        (
            "extensions and trailers",
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3;a;b=c;d=\"e \\\" f\"\r\nabc\r\n0;x\r\nt: 1\r\n\r\n",
            "POST /",
        ),
        (
            "an IPv6 host",
            "GET / HTTP/1.1\r\nHost: [::1]:80\r\n\r\n",
            "host: [::1]:80",
        ),
        (
            "an absolute target over host",
            "GET http://b:8/p?q HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET /p?q HTTP/1.1\nhost: b:8",
        ),
        (
            "an absolute target without a path",
            "GET http://b HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET / HTTP/1.1\nhost: b",
        ),
        (
            "connection names a header",
            "GET / HTTP/1.1\r\nHost: a\r\nConnection: x-mine\r\nX-Mine: 1\r\nX-Other: 2\r\n\r\n",
            "x-other: 2",
        ),
        (
            "an unknown method",
            "BREW / HTTP/1.1\r\nHost: a\r\n\r\n",
            "BREW / HTTP/1.1",
        ),
        (
            "a zero content-length",
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
            "content-length: 0",
        ),
        (
            "obs-text in a value",
            "GET / HTTP/1.1\r\nHost: a\r\nX: \u{e9}\r\n\r\n",
            "x: \u{e9}",
        ),
    ];
    let mut client = running.client();
    for (name, octets, wanted) in passed {
        client.send(octets);
        let response = client.receive();
        assert_eq!(response.status(), 200, "{name}: {}", response.text());
        assert!(response.text().contains(wanted), "{name}: {}", response.text());
        assert!(!response.text().contains("x-mine"), "{name}: {}", response.text());
    }
    assert_eq!(endpoint.requests(), passed.len());
}

#[test]
fn ambiguous_responses_are_not_passed_on() {
    let endpoint = Endpoint::start("only");
    let running = Running::start(&simple(endpoint.address, ""));
    let mut client = running.client();
    let response = client.get("/ambiguous");
    assert_eq!(response.status(), 502);
    assert!(response.text().ends_with("protocol error"));
    assert_eq!(client.get("/").status(), 200);
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
