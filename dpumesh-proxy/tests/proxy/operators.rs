//! Envoy's operators in logs and header values, one by one: what this proxy and Envoy write of the same connection.

use std::sync::Mutex;

use rcgen::{CertificateParams, DnType, DnValue, SanType};
use serde_json::Value;

use crate::envoy::{Subject, at_both};
use crate::harness::{Client, Running, await_true, bootstrap, bootstrap_with, cluster};
use crate::mesh::Authority;

const FILE: &str = "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog";

/// A log whose lines are objects, a field for each operator.
fn log(folder: &str, operators: &[&str]) -> String {
    let field = |operator: &&str| {
        format!(
            "{}: {}",
            Value::from(*operator),
            Value::from(format!("%{operator}%"))
        )
    };
    let fields: Vec<String> = operators.iter().map(field).collect();
    format!(
        "access_log: [{{name: f, typed_config: {{'@type': {FILE}, path: '{folder}/log', log_format: {{json_format: {{{}}}}}}}}}]",
        fields.join(", ")
    )
}

fn lines(subject: &Subject, count: usize) -> Vec<Value> {
    let path = subject.folder().join("log");
    let read = || std::fs::read_to_string(&path).unwrap_or_default();
    await_true(&format!("{count} lines at {}", subject.name()), || {
        read().lines().count() >= count
    });
    read()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// Keeps what the first subject says, and holds what others say against it.
#[derive(Default)]
struct Said(Mutex<Option<Vec<Value>>>);

impl Said {
    fn same(&self, subject: &Subject, lines: Vec<Value>) {
        let mut first = self.0.lock().unwrap();
        match &*first {
            None => *first = Some(lines),
            Some(first) => {
                assert_eq!(first.len(), lines.len());
                for (index, (ours, theirs)) in first.iter().zip(&lines).enumerate() {
                    for key in ours.as_object().into_iter().flat_map(|fields| fields.keys()) {
                        assert_eq!(
                            ours[key],
                            theirs[key],
                            "{key} of line {index}: ours, and {}'s",
                            subject.name()
                        );
                    }
                    assert_eq!(ours, theirs);
                }
            }
        }
    }
}

#[test]
fn operators_that_say_the_same_at_any_time() {
    let operators = [
        "VIRTUAL_CLUSTER_NAME",
        "ROUNDTRIP_DURATION",
        "ROUTE_NAME",
        "HOSTNAME",
        "ENVIRONMENT(PATH)",
        "ENVIRONMENT(PATH):5",
        "ENVIRONMENT(NO_SUCH_THING_HERE)",
        "ACCESS_LOG_TYPE",
        "RESPONSE_FLAGS_LONG",
        "CUSTOM_FLAGS",
        "UPSTREAM_HOST_NAME",
        "UPSTREAM_HOST_NAME_WITHOUT_PORT",
        "QUERY_PARAMS",
        "REQUESTED_SERVER_NAME(SNI_ONLY)",
        "REQUESTED_SERVER_NAME(SNI_FIRST)",
        "REQUESTED_SERVER_NAME(HOST_FIRST)",
        "REQ(X-ENVOY-ORIGINAL-HOST)",
        "RESPONSE_CODE_DETAILS(ALLOW_WHITESPACES)",
        "RESPONSE_CODE_DETAILS",
        "STREAM_ID",
        "DOWNSTREAM_HANDSHAKE_DURATION",
        "DOWNSTREAM_TLS_VERSION",
        "DOWNSTREAM_TLS_CIPHER",
        "DOWNSTREAM_TLS_GROUP",
        "DOWNSTREAM_PEER_CERT",
        "DOWNSTREAM_PEER_SERIAL",
        "DOWNSTREAM_PEER_CERT_V_START",
        "DOWNSTREAM_LOCAL_IP_SAN",
        "DOWNSTREAM_DIRECT_LOCAL_ADDRESS_WITHOUT_PORT",
        "COMMON_DURATION(US_TX_END:DS_RX_BEG:us)",
    ];
    let said = Said::default();
    let endpoint = crate::harness::Endpoint::start("named");
    at_both(
        |_, folder| {
            let routes = "[{name: direct, match: {prefix: /direct}, direct_response: {status: 202}}, \
                          {name: changed, match: {prefix: /changed/}, route: {cluster: app, prefix_rewrite: '/?', host_rewrite_literal: other.example}}, \
                          {name: nowhere, match: {prefix: /nowhere}, route: {cluster: empty}}, \
                          {name: all, match: {prefix: /}, route: {cluster: app}}]";
            let app = cluster("app", &[endpoint.address], "")
                .replace("{endpoint: {", "{endpoint: {hostname: 'host.example:80', ");
            bootstrap(
                routes,
                &format!("[{app}, {}]", cluster("empty", &[], "")),
                &log(folder, &operators),
            )
        },
        |subject, _| {
            let mut client = subject.client();
            for (path, more) in [
                ("/direct?a", "x-request-id: 1f2e\r\n"),
                ("/changed/x?q", "x-request-id: 2\r\n"),
                ("/nowhere", "x-request-id: 3\r\n"),
                ("/plain?a=b&c", "x-request-id: 4\r\n"),
                ("/plain", "x-request-id: 5\r\n"),
            ] {
                client.send(format!(
                    "GET {path} HTTP/1.1\r\nHost: asked.example:81\r\n{more}\r\n"
                ));
                client.receive();
            }
            let lines = lines(subject, 5);
            assert_eq!(lines[0]["ROUTE_NAME"], "direct");
            assert_eq!(lines[2]["RESPONSE_FLAGS_LONG"], "NoHealthyUpstream");
            assert_eq!(lines[3]["UPSTREAM_HOST_NAME"], "host.example:80");
            assert_eq!(lines[3]["STREAM_ID"], "4");
            said.same(subject, lines);
        },
    );
}

#[test]
fn operators_that_differ_each_time_have_one_form() {
    let operators = [
        "CONNECTION_ID",
        "UNIQUE_ID",
        "EMIT_TIME",
        "START_TIME(%s)",
        "EMIT_TIME(%s)",
        "COMMON_DURATION(DS_RX_BEG:DS_TX_END)",
        "COMMON_DURATION(DS_RX_BEG:DS_RX_END:us)",
        "COMMON_DURATION(US_TX_END:US_RX_BEG:ns)",
        "COMMON_DURATION(US_RX_BEG:DS_TX_END:ms)",
        "STREAM_ID",
        "DURATION",
    ];
    at_both(
        |endpoint, folder| crate::harness::simple(endpoint.address, &log(folder, &operators)),
        |subject, _| {
            let mut first = subject.client();
            first.get("/a");
            first.get("/b");
            subject.client().get("/c");
            let lines = lines(subject, 3);
            let number = |line: usize, name: &str| {
                let value = &lines[line][name];
                value
                    .as_u64()
                    .unwrap_or_else(|| panic!("{name} is {value} at {}", subject.name()))
            };
            let text = |line: usize, name: &str| lines[line][name].as_str().unwrap().to_owned();
            assert_eq!(number(0, "CONNECTION_ID"), number(1, "CONNECTION_ID"));
            assert!(number(2, "CONNECTION_ID") > number(0, "CONNECTION_ID"));
            for name in ["UNIQUE_ID", "STREAM_ID"] {
                assert_eq!(text(0, name).len(), 36, "{name} at {}", subject.name());
                assert_ne!(text(0, name), text(1, name), "{name} at {}", subject.name());
            }
            assert_eq!(text(0, "EMIT_TIME").len(), "2026-11-22T15:36:48.833Z".len());
            let seconds = |name: &str| text(0, name).parse::<u64>().unwrap();
            assert!(seconds("START_TIME(%s)") <= seconds("EMIT_TIME(%s)"));
            assert_eq!(
                number(0, "COMMON_DURATION(DS_RX_BEG:DS_TX_END)"),
                number(0, "DURATION")
            );
            assert!(number(0, "COMMON_DURATION(US_TX_END:US_RX_BEG:ns)") > 0);
            assert!(number(0, "COMMON_DURATION(US_RX_BEG:DS_TX_END:ms)") <= number(0, "DURATION"));
            number(0, "COMMON_DURATION(DS_RX_BEG:DS_RX_END:us)");
        },
    );
}

#[test]
fn times_are_written_as_envoy_writes_them() {
    // What of a day is the same all day, and what is not.
    let all_day = [
        "Y", "y", "m", "d", "e", "j", "a", "A", "b", "B", "h", "D", "F", "x", "U", "W", "V", "G", "g", "u",
        "w", "C", "Z", "z", ":z", "Ez", "E4Y",
    ];
    let fleeting = [
        "c", "X", "r", "R", "T", "H", "I", "M", "S", "p", "P", "k", "l", "s", "f", "3f", "6f", "9f", "E3S",
        "E9S", "E*S",
    ];
    let formats: Vec<String> = all_day
        .iter()
        .chain(&fleeting)
        .map(|f| format!("START_TIME(%{f})"))
        .collect();
    let operators: Vec<&str> = formats.iter().map(String::as_str).collect();
    let said: Mutex<Option<Value>> = Mutex::default();
    at_both(
        |endpoint, folder| crate::harness::simple(endpoint.address, &log(folder, &operators)),
        |subject, _| {
            subject.client().get("/");
            let line = lines(subject, 1).remove(0);
            let mut first = said.lock().unwrap();
            let Some(first) = &*first else {
                *first = Some(line);
                return;
            };
            let field = |line: &Value, format: &str| {
                line[format!("START_TIME(%{format})")]
                    .as_str()
                    .unwrap()
                    .to_owned()
            };
            // A day may end between the two.
            if field(first, "F") == field(&line, "F") {
                for format in all_day {
                    assert_eq!(field(first, format), field(&line, format), "%{format}");
                }
            }
            // Digits are some digits, and what fills their place is one too.
            let shape = |text: String| -> String {
                let same = |c: char| if c.is_ascii_digit() || c == ' ' { '0' } else { c };
                text.to_ascii_lowercase()
                    .replace("am", "pm")
                    .chars()
                    .map(same)
                    .collect()
            };
            for format in fleeting.iter().filter(|f| !["c", "E*S"].contains(f)) {
                assert_eq!(
                    shape(field(first, format)),
                    shape(field(&line, format)),
                    "%{format}"
                );
            }
            for line in [first, &line] {
                let whole = field(line, "E9S");
                assert_eq!(
                    whole.trim_end_matches('0').trim_end_matches('.'),
                    field(line, "E*S"),
                    "{whole}"
                );
                let wanted = ["a", "b", "e", "T", "Y"]
                    .map(|format| field(line, format))
                    .join(" ");
                assert_eq!(field(line, "c"), wanted);
            }
        },
    );
}

#[test]
fn a_clients_certificate_is_told_as_envoy_tells_it() {
    let operators = [
        "DOWNSTREAM_TLS_VERSION",
        "DOWNSTREAM_TLS_CIPHER",
        "DOWNSTREAM_TLS_GROUP",
        "DOWNSTREAM_PEER_SUBJECT",
        "DOWNSTREAM_PEER_ISSUER",
        "DOWNSTREAM_PEER_SERIAL",
        "DOWNSTREAM_PEER_FINGERPRINT_256",
        "DOWNSTREAM_PEER_CERT",
        "DOWNSTREAM_PEER_CERT_V_START",
        "DOWNSTREAM_PEER_CERT_V_END",
        "DOWNSTREAM_PEER_CERT_V_END(%b %e %Y %T)",
        "DOWNSTREAM_PEER_URI_SAN",
        "DOWNSTREAM_PEER_DNS_SAN",
        "DOWNSTREAM_PEER_IP_SAN",
        "DOWNSTREAM_PEER_EMAIL_SAN",
        "DOWNSTREAM_LOCAL_SUBJECT",
        "DOWNSTREAM_LOCAL_URI_SAN",
        "DOWNSTREAM_LOCAL_DNS_SAN",
        "DOWNSTREAM_LOCAL_IP_SAN",
        "DOWNSTREAM_LOCAL_EMAIL_SAN",
        "REQUESTED_SERVER_NAME",
        "REQUESTED_SERVER_NAME(SNI_FIRST)",
        "REQUESTED_SERVER_NAME(HOST_FIRST)",
    ];
    let authority = Authority::new();
    let leaf = |name: &str| {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CountryName, "DE");
        params.distinguished_name.push(
            DnType::OrganizationName,
            DnValue::Utf8String("Bücher, \"Söhne\" + more".to_owned()),
        );
        params.distinguished_name.push(DnType::CommonName, name);
        params.serial_number = Some(vec![0x8f, 0x00, 0x0a].into());
        params.not_before = rcgen::date_time_ymd(2021, 2, 3);
        params.not_after = rcgen::date_time_ymd(2049, 12, 31);
        params.subject_alt_names = vec![
            SanType::URI("spiffe://td/ns/a/sa/b".try_into().unwrap()),
            SanType::DnsName("front.example".try_into().unwrap()),
            SanType::DnsName("second.example".try_into().unwrap()),
            SanType::IpAddress("192.0.2.7".parse().unwrap()),
            SanType::IpAddress("2001:db8::7".parse().unwrap()),
            SanType::Rfc822Name("who@example.org".try_into().unwrap()),
        ];
        authority.signed(params)
    };
    let pem = |text: &str| format!("{{inline_string: {}}}", Value::from(text));
    let root = pem(&authority.root);
    let common = |(chain, key): (String, String)| {
        format!(
            "tls_certificates: [{{certificate_chain: {}, private_key: {}}}], validation_context: {{trusted_ca: {root}}}, \
             tls_params: {{tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3, ecdh_curves: [P-256]}}",
            pem(&chain),
            pem(&key)
        )
    };
    let (server, client) = (common(leaf("server")), common(leaf(" client#")));
    let tls = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3";
    let said = Said::default();
    at_both(
        |endpoint, folder| {
            let socket = format!(
                "transport_socket: {{name: tls, typed_config: {{'@type': {tls}.DownstreamTlsContext, require_client_certificate: true, common_tls_context: {{{server}}}}}}}"
            );
            let whole = crate::harness::simple(endpoint.address, &log(folder, &operators));
            let inspector = "listener_filters: [{name: envoy.filters.listener.tls_inspector, typed_config: {'@type': type.googleapis.com/envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector}}]";
            // Where nobody inspects, Envoy knows of no name.
            whole
                .replace("    - filters:\n", &format!("    - {socket}\n      filters:\n"))
                .replace(
                    "    filter_chains:\n",
                    &format!("    {inspector}\n    filter_chains:\n"),
                )
        },
        |subject, _| {
            let socket = format!(
                ", transport_socket: {{name: tls, typed_config: {{'@type': {tls}.UpstreamTlsContext, sni: front.example, common_tls_context: {{{client}}}}}}}"
            );
            let routes = "[{match: {prefix: /}, route: {cluster: there}}]";
            let front = bootstrap(
                routes,
                &format!("[{}]", cluster("there", &[subject.web()], &socket)),
                "",
            );
            let front = Running::start(&front);
            let mut asking = Client::connect(front.web());
            assert_eq!(asking.get("/").status(), 200, "{}", subject.name());
            let lines = lines(subject, 1);
            assert_eq!(lines[0]["DOWNSTREAM_PEER_SERIAL"], "8f000a");
            said.same(subject, lines);
        },
    );
}

#[test]
fn connections_of_the_tcp_proxy_say_what_they_can() {
    let operators = [
        "ACCESS_LOG_TYPE",
        "RESPONSE_FLAGS_LONG",
        "UPSTREAM_HOST_NAME",
        "VIRTUAL_CLUSTER_NAME",
        "QUERY_PARAMS",
        "REQUESTED_SERVER_NAME(HOST_FIRST)",
        "COMMON_DURATION(US_TX_END:US_RX_BEG)",
        "BYTES_RECEIVED",
        "BYTES_SENT",
        "DOWNSTREAM_TLS_VERSION",
        "ROUTE_NAME",
    ];
    let said = Said::default();
    // The port would show.
    let endpoint = crate::harness::Endpoint::start("only");
    at_both(
        |_, folder| {
            format!(
                "admin: {{address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}}}\nstatic_resources:\n  listeners:\n  - name: web\n    \
                 address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}\n    filter_chains: [{{filters: [{{name: t, typed_config: \
                 {{'@type': type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy, stat_prefix: t, cluster: app, {}}}}}]}}]\n  \
                 clusters: [{}]\n",
                log(folder, &operators),
                cluster("app", &[endpoint.address], "")
            )
        },
        |subject, _| {
            let mut client = subject.client();
            client.send("GET /close-after HTTP/1.1\r\nHost: a\r\n\r\n");
            assert_eq!(client.receive().text(), "last");
            drop(client);
            said.same(subject, lines(subject, 1));
        },
    );
}

#[test]
fn header_values_know_the_connection_and_the_time() {
    let values = [
        ("x-about", "%ACCESS_LOG_TYPE%"),
        ("x-host", "%HOSTNAME%"),
        ("x-env", "%ENVIRONMENT(PATH):4%"),
        ("x-year", "%START_TIME(%Y)%"),
        ("x-query", "%QUERY_PARAMS%"),
        ("x-asked", "%REQUESTED_SERVER_NAME(HOST_FIRST)%"),
        ("x-stream", "%STREAM_ID%"),
        ("x-local", "%DOWNSTREAM_DIRECT_LOCAL_ADDRESS_WITHOUT_PORT%"),
    ];
    let add = values
        .map(|(name, value)| format!("{{header: {{key: {name}, value: '{value}'}}}}"))
        .join(", ");
    let said = Said::default();
    at_both(
        |endpoint, _| {
            let host = format!(
                "request_headers_to_add: [{add}, {{header: {{key: x-connection, value: 'n%CONNECTION_ID%'}}}}]"
            );
            let routes = "[{match: {prefix: /}, route: {cluster: app}}]";
            bootstrap_with(
                routes,
                &format!("[{}]", cluster("app", &[endpoint.address], "")),
                "",
                "",
                &host,
            )
        },
        |subject, _| {
            let mut client = subject.client();
            client.send("GET /x?a=b HTTP/1.1\r\nHost: asked.example\r\nx-request-id: 77\r\n\r\n");
            let text = client.receive().text();
            let value = |name: &str| {
                let line = text.lines().find_map(|l| l.strip_prefix(&format!("{name}: ")));
                line.unwrap_or_else(|| panic!("no {name} at {}: {text}", subject.name()))
                    .to_owned()
            };
            said.same(subject, values.map(|(name, _)| Value::from(value(name))).to_vec());
            let number = value("x-connection");
            assert!(number[1..].parse::<u64>().is_ok(), "{number}");
        },
    );
}

#[test]
fn what_is_not_known_here_is_refused_by_name() {
    for operator in [
        "REQ_WITHOUT_QUERY(:PATH)",
        "VIRTUAL_HOST_NAME",
        "START_TIME_LOCAL",
        "DOWNSTREAM_WIRE_BYTES_SENT",
        "UPSTREAM_TLS_VERSION",
        "UPSTREAM_PEER_SUBJECT",
        "DOWNSTREAM_PEER_FINGERPRINT_1",
        "DYNAMIC_METADATA(a:b)",
        "METADATA(ROUTE:a:b)",
        "FILTER_STATE(a)",
        "COMMON_DURATION(DS_CX_BEG:DS_RX_BEG)",
        "START_TIME(%L)",
        "TRACE_ID",
    ] {
        let bootstrap = crate::harness::simple("127.0.0.1:1".parse().unwrap(), &log("/nowhere", &[operator]));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bootstrap.yaml");
        std::fs::write(&path, &bootstrap).unwrap();
        let error =
            dpumesh_proxy::program::Proxy::start(dpumesh_proxy::program::Options::new(path)).unwrap_err();
        let error = error.to_string();
        assert!(
            error.contains("json_format") && error.contains("not supported yet"),
            "{operator}: {error}"
        );
    }
}
