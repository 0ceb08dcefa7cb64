//! Rules about identities: decided by what the TLS handshake proved, and told on as `x-forwarded-client-cert`.

use crate::harness::{Client, Endpoint, Running};
use crate::mesh::{Authority, FRONT, REVIEWS, http, inbound, outbound, tcp};

const OTHER: &str = "spiffe://td/ns/bank/sa/other";

/// A connection manager with `extra` fields and `filters` (flow form, each with a comma behind).
fn manager(extra: &str, filters: &str) -> String {
    format!(
        "{{name: hcm, typed_config: {{'@type': type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager, \
         stat_prefix: web, {extra} route_config: {{virtual_hosts: [{{name: all, domains: ['*'], routes: [{{match: {{prefix: /}}, route: {{cluster: app}}}}]}}]}}, \
         http_filters: [{filters} {{name: r, typed_config: {{'@type': type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}}}]}}}}"
    )
}

/// An inbound proxy with `filter` and an outbound one that calls it as `web`: front, `web2`: other.
fn pair(endpoint: &Endpoint, filter: &str, out: &str) -> (Running, Running) {
    let authority = Authority::new();
    let text = inbound(endpoint.address, filter, "deny");
    let inbound = Running::start_with_secrets(&text, authority.store(&[REVIEWS]));
    let text = outbound(inbound.web(), REVIEWS, out, &[FRONT, OTHER]);
    let outbound = Running::start_with_secrets(&text, authority.store(&[FRONT, OTHER]));
    (inbound, outbound)
}

/// What Istio writes for principals, namespaces and accounts, and who passes: front, other.
const RULES: &[(&str, &str, bool, bool)] = &[
    ("exact", "exact: 'spiffe://td/ns/shop/sa/front'", true, false),
    ("prefix", "prefix: 'spiffe://td/ns/b'", false, true),
    (
        "suffix",
        "safe_regex: {regex: 'spiffe://.*/sa/front'}",
        true,
        false,
    ),
    ("anybody", "safe_regex: {regex: '.+'}", true, true),
    ("namespace", "safe_regex: {regex: '.*/ns/bank/.*'}", false, true),
    (
        "account",
        "safe_regex: {regex: 'spiffe://.+/ns/shop/(.+/|)sa/front(/.+)?'}",
        true,
        false,
    ),
    ("nobody", "exact: 'td/ns/shop/sa/front'", false, false),
];

#[test]
fn requests_are_let_in_by_the_clients_identity() {
    let policies: Vec<String> = RULES
        .iter()
        .map(|(name, rule, ..)| {
            format!(
                "{name}: {{permissions: [{{url_path: {{path: {{exact: /{name}}}}}}}], principals: [{{authenticated: {{principal_name: {{{rule}}}}}}}]}}"
            )
        })
        .collect();
    let rbac = format!(
        "{{name: envoy.filters.http.rbac, typed_config: {{'@type': type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC, rules: {{policies: {{{}}}}}}}}},",
        policies.join(", ")
    );
    let endpoint = Endpoint::start("app");
    let (inbound, outbound) = pair(&endpoint, &manager("", &rbac), &http("mesh"));
    let mut front = outbound.client();
    let mut other = Client::connect(outbound.proxy.listener_address("web2").unwrap());
    for (name, _, by_front, by_other) in RULES {
        for (client, passes) in [(&mut front, by_front), (&mut other, by_other)] {
            // A header about identity is no identity.
            client.send(format!(
                "GET /{name} HTTP/1.1\r\nHost: a\r\nX-Forwarded-Client-Cert: URI={FRONT}\r\n\r\n"
            ));
            let status = if *passes { 200 } else { 403 };
            assert_eq!(client.receive().status(), status, "{name}");
        }
    }
    let passed = RULES
        .iter()
        .map(|(_, _, a, b)| usize::from(*a) + usize::from(*b))
        .sum::<usize>();
    assert_eq!(endpoint.requests(), passed);
    assert_eq!(inbound.stat("http.web.rbac.allowed"), passed as u64);
    assert_eq!(
        inbound.stat("http.web.rbac.denied"),
        (2 * RULES.len() - passed) as u64
    );
}

#[test]
fn connections_are_let_in_by_the_clients_identity() {
    let rbac = format!(
        "{{name: rbac, typed_config: {{'@type': type.googleapis.com/envoy.extensions.filters.network.rbac.v3.RBAC, stat_prefix: tcp., \
         rules: {{policies: {{p: {{permissions: [{{any: true}}], principals: [{{authenticated: {{principal_name: {{exact: '{FRONT}'}}}}}}]}}}}}}}}}}, {}",
        tcp("app")
    );
    let endpoint = Endpoint::start("app");
    let (inbound, outbound) = pair(&endpoint, &rbac, &tcp("mesh"));
    assert_eq!(outbound.client().get("/until-close").status(), 200);
    let mut other = Client::connect(outbound.proxy.listener_address("web2").unwrap());
    other.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    assert!(other.is_closed());
    assert_eq!(endpoint.requests(), 1);
    inbound.await_stat("tcp.rbac.denied", 1);
    assert_eq!(inbound.stat("tcp.rbac.allowed"), 1);
}

#[test]
fn endpoints_are_told_of_the_clients_certificate() {
    let endpoint = Endpoint::start("app");
    let details = "set_current_client_cert_details: {subject: true, dns: true, uri: true},";
    for (how, own, wanted) in [
        ("APPEND_FORWARD", "By=earlier", Some("By=earlier,By=")),
        ("APPEND_FORWARD", "", Some("By=")),
        ("SANITIZE_SET", "By=earlier", Some("By=")),
        ("FORWARD_ONLY", "By=earlier", Some("By=earlier")),
        ("SANITIZE", "By=earlier", None),
    ] {
        let extra = format!("forward_client_cert_details: {how}, {details}");
        // The outbound side forwards as well, so that what the client says arrives at all.
        let out = http("mesh").replace(
            "stat_prefix: web,",
            "stat_prefix: web, forward_client_cert_details: ALWAYS_FORWARD_ONLY,",
        );
        let (_inbound, outbound) = pair(&endpoint, &manager(&extra, ""), &out);
        let mut client = outbound.client();
        let header = if own.is_empty() {
            String::new()
        } else {
            format!("X-Forwarded-Client-Cert: {own}\r\n")
        };
        client.send(format!("GET / HTTP/1.1\r\nHost: a\r\n{header}\r\n"));
        let seen = client.receive().text();
        let line = seen
            .lines()
            .find_map(|l| l.strip_prefix("x-forwarded-client-cert: "));
        let Some(front) = wanted else {
            assert_eq!(line, None, "{how}");
            continue;
        };
        let line = line.unwrap_or_else(|| panic!("{how}: {seen}"));
        if how == "FORWARD_ONLY" {
            assert_eq!(line, front);
            continue;
        }
        let element = line
            .strip_prefix(front)
            .unwrap_or_else(|| panic!("{how}: {line}"));
        let (by, rest) = element.split_once(";Hash=").unwrap();
        assert_eq!(by, REVIEWS);
        let (hash, rest) = rest.split_at(64);
        assert!(hash.bytes().all(|b| b.is_ascii_hexdigit()), "{line}");
        let rest = rest.strip_prefix(";Subject=\"").and_then(|r| r.split_once('"'));
        assert_eq!(
            rest.map(|(_, uri)| uri),
            Some(format!(";URI={FRONT}").as_str()),
            "{line}"
        );
        assert!(
            seen.contains("x-forwarded-proto: http\n"),
            "said by the first proxy: {seen}"
        );
    }
}
