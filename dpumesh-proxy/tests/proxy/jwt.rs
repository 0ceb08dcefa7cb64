//! JSON Web Tokens, and access rules on their claims, as istiod writes them for RequestAuthentication and
//! AuthorizationPolicy. Each case is checked at Envoy too.

use std::io::{BufReader, Write};
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use serde_json::{Value, json};

use crate::envoy::at_both;
use crate::harness::{Client, Endpoint, Message, bootstrap_with, cluster, read_message};

const JWT: &str = "type.googleapis.com/envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication";
const RBAC: &str = "type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC";

/// A key pair of an issuer.
struct Issuer {
    name: &'static str,
    key: EncodingKey,
    public: Value,
}

impl Issuer {
    fn new(name: &'static str, id: &str) -> Self {
        let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        let point = pair.public_key_raw();
        let part = |octets: &[u8]| URL_SAFE_NO_PAD.encode(octets);
        Self {
            name,
            key: EncodingKey::from_ec_der(&pair.serialize_der()),
            public: json!({"kty": "EC", "crv": "P-256", "alg": "ES256", "kid": id, "x": part(&point[1..33]), "y": part(&point[33..])}),
        }
    }

    fn keys(&self) -> String {
        json!({"keys": [self.public]}).to_string()
    }

    fn token(&self, more: &Value) -> String {
        let mut claims = json!({"iss": self.name, "sub": "me", "exp": 9_999_999_999u64});
        for (name, value) in more.as_object().unwrap() {
            claims[name] = value.clone();
        }
        let mut header = Header::new(Algorithm::ES256);
        header.kid = self.public["kid"].as_str().map(str::to_owned);
        encode(&header, &claims, &self.key).unwrap()
    }
}

fn filter(config: &str) -> String {
    format!(
        "- {{name: envoy.filters.http.jwt_authn, typed_config: {{\"@type\": {JWT}, {config}}}}}\n          "
    )
}

fn app(endpoint: &Endpoint) -> String {
    format!("[{}]", cluster("app", &[endpoint.address], ""))
}

const ALL: &str = "[{match: {prefix: /}, route: {cluster: app}}]";

fn get(client: &mut Client, path: &str, headers: &str) -> Message {
    client.send(format!("GET {path} HTTP/1.1\r\nHost: a\r\n{headers}\r\n"));
    client.receive()
}

fn bearer(token: &str) -> String {
    format!("Authorization: Bearer {token}\r\n")
}

#[test]
fn tokens_are_asked_for_as_istio_does() {
    let issuer = Issuer::new("https://issuer.example", "k1");
    let forged = Issuer::new("https://issuer.example", "k1");
    let other = Issuer::new("https://other.example", "k2");
    let config = format!(
        "bypass_cors_preflight: true, providers: {{origins-0: {{issuer: \"{}\", audiences: [shop], local_jwks: {{inline_string: '{}'}}, payload_in_metadata: payload}}}}, \
         rules: [{{match: {{prefix: /free}}}}, {{match: {{prefix: /must}}, requires: {{provider_name: origins-0}}}}, \
         {{match: {{prefix: /}}, requires: {{requires_any: {{requirements: [{{provider_name: origins-0}}, {{allow_missing: {{}}}}]}}}}}}]",
        issuer.name,
        issuer.keys()
    );
    let good = issuer.token(&json!({"aud": "shop"}));
    let mut sections: Vec<&str> = good.split('.').collect();
    let none = URL_SAFE_NO_PAD.encode(r#"{"alg":"none"}"#);
    sections[0] = &none;
    let unsigned = format!("{}.{}.e30", sections[0], sections[1]);
    let cut = format!("{}.", good.rsplit_once('.').unwrap().0);
    let cases = [
        ("/", String::new(), 200, ""),
        ("/free", bearer("nonsense"), 200, ""),
        ("/must", String::new(), 401, "Jwt is missing"),
        ("/must", bearer(&good), 200, ""),
        ("/", bearer(&good), 200, ""),
        (
            "/",
            bearer(&issuer.token(&json!({"aud": ["x", "https://shop/"]}))),
            200,
            "",
        ),
        (
            "/",
            bearer(&issuer.token(&json!({"aud": "other"}))),
            403,
            "Audiences in Jwt are not allowed",
        ),
        (
            "/",
            bearer(&issuer.token(&json!({}))),
            403,
            "Audiences in Jwt are not allowed",
        ),
        (
            "/",
            bearer(&issuer.token(&json!({"aud": "shop", "exp": 1}))),
            401,
            "Jwt is expired",
        ),
        (
            "/",
            bearer(&issuer.token(&json!({"aud": "shop", "nbf": 9_999_999_998u64}))),
            401,
            "Jwt not yet valid",
        ),
        (
            "/",
            bearer(&forged.token(&json!({"aud": "shop"}))),
            401,
            "Jwt verification fails",
        ),
        (
            "/",
            bearer(&other.token(&json!({"aud": "shop"}))),
            401,
            "Jwt issuer is not configured",
        ),
        ("/", bearer(&unsigned), 401, "Jwt header [alg] is not supported"),
        (
            "/",
            bearer(&cut),
            401,
            "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections",
        ),
        (
            "/",
            bearer("nonsense"),
            401,
            "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections",
        ),
        ("/", "Authorization: Basic abc\r\n".to_owned(), 200, ""),
    ];
    at_both(
        |endpoint, _| bootstrap_with(ALL, &app(endpoint), "", &filter(&config), ""),
        |subject, endpoint| {
            let name = subject.name();
            let mut client = subject.client();
            let (mut allowed, mut denied) = (0, 0);
            for (path, headers, status, body) in &cases {
                let response = get(&mut client, path, headers);
                assert_eq!(
                    response.status(),
                    *status,
                    "{path} {headers} {body} at {name}: {}",
                    response.text()
                );
                if *status == 200 {
                    allowed += 1;
                    let left = response.text().contains("authorization: Bearer");
                    assert_eq!(
                        left,
                        *path == "/free",
                        "a token that was used is not passed on by {name}"
                    );
                    continue;
                }
                denied += 1;
                assert_eq!(response.text(), *body, "{name}");
                let error = if *body == "Jwt is missing" {
                    ""
                } else {
                    ", error=\"invalid_token\""
                };
                let wanted = format!("Bearer realm=\"http://a{path}\"{error}");
                assert_eq!(
                    response.header("www-authenticate"),
                    Some(wanted.as_str()),
                    "{name}"
                );
            }
            client.send("OPTIONS /must HTTP/1.1\r\nHost: a\r\nOrigin: o\r\nAccess-Control-Request-Method: GET\r\n\r\n");
            assert_eq!(client.receive().status(), 200, "{name}");
            assert_eq!(endpoint.requests(), allowed + 1, "{name}");
            for (stat, wanted) in [
                ("allowed", allowed as u64 + 1),
                ("denied", denied),
                ("cors_preflight_bypassed", 1),
            ] {
                let stat = format!("http.web.jwt_authn.{stat}");
                assert_eq!(subject.await_stat(&stat, wanted), wanted, "{stat} at {name}");
            }
        },
    );
}

#[test]
fn tokens_stand_where_providers_say() {
    let issuer = Issuer::new("one", "k1");
    let other = Issuer::new("two", "k2");
    let config = format!(
        "providers: {{a: {{issuer: one, local_jwks: {{inline_string: '{}'}}, from_headers: [{{name: x-token, value_prefix: 'T='}}], from_params: [tok], from_cookies: [jar], \
         forward_payload_header: x-payload}}, \
         b: {{issuer: two, local_jwks: {{inline_string: '{}'}}, forward: true}}}}, \
         rules: [{{match: {{prefix: /both}}, requires: {{requires_all: {{requirements: [{{provider_name: a}}, {{provider_name: b}}]}}}}}}, \
         {{match: {{prefix: /any}}, requires: {{requires_any: {{requirements: [{{provider_name: a}}, {{provider_name: b}}]}}}}}}, \
         {{match: {{prefix: /aud}}, requires: {{provider_and_audiences: {{provider_name: b, audiences: [x]}}}}}}, \
         {{match: {{prefix: /}}, requires: {{allow_missing_or_failed: {{}}}}}}]",
        issuer.keys(),
        other.keys()
    );
    let (one, two) = (issuer.token(&json!({})), other.token(&json!({})));
    let x_token = format!("X-Token: T={one}\r\n");
    let cases = [
        ("/any".to_owned(), x_token.clone(), 200),
        (format!("/any?tok={one}&q=1"), String::new(), 200),
        ("/any".to_owned(), format!("Cookie: b=1; jar={one}\r\n"), 200),
        ("/any".to_owned(), bearer(&one), 401),
        ("/any".to_owned(), bearer(&two), 200),
        (format!("/any?access_token={two}"), String::new(), 200),
        ("/any".to_owned(), String::new(), 401),
        ("/both".to_owned(), x_token.clone(), 401),
        ("/both".to_owned(), format!("{x_token}{}", bearer(&two)), 200),
        ("/aud".to_owned(), bearer(&two), 403),
        ("/aud".to_owned(), bearer(&other.token(&json!({"aud": "x"}))), 200),
        ("/else".to_owned(), bearer("nonsense"), 200),
        ("/else".to_owned(), String::new(), 200),
    ];
    at_both(
        |endpoint, _| bootstrap_with(ALL, &app(endpoint), "", &filter(&config), ""),
        |subject, _| {
            let name = subject.name();
            let mut client = subject.client();
            for (path, headers, status) in &cases {
                let response = get(&mut client, path, headers);
                assert_eq!(
                    response.status(),
                    *status,
                    "{path} {headers} at {name}: {}",
                    response.text()
                );
            }
            let seen = get(&mut client, "/any", &format!("{x_token}X-Payload: forged\r\n")).text();
            assert!(!seen.contains("x-token"), "{name}: {seen}");
            let payload = one.split('.').nth(1).unwrap();
            assert!(
                seen.contains(&format!("x-payload: {payload}\n")),
                "{name}: {seen}"
            );
            assert!(!seen.contains("forged"), "{name}: {seen}");
            let seen = get(&mut client, &format!("/any?q=1&tok={one}&r=2"), "").text();
            assert!(seen.starts_with("GET /any?q=1&r=2 HTTP"), "{name}: {seen}");
            let seen = get(&mut client, "/any", &bearer(&two)).text();
            assert!(seen.contains("authorization: Bearer"), "{name}: {seen}");
        },
    );
}

#[test]
fn access_rules_know_claims() {
    let issuer = Issuer::new("https://issuer.example", "k1");
    let jwt = filter(&format!(
        "providers: {{origins-0: {{issuer: \"{}\", local_jwks: {{inline_string: '{}'}}, payload_in_metadata: payload, \
         normalize_payload_in_metadata: {{space_delimited_claims: [scope, permission]}}}}}}, \
         rules: [{{match: {{prefix: /}}, requires: {{requires_any: {{requirements: [{{provider_name: origins-0}}, {{allow_missing: {{}}}}]}}}}}}]",
        issuer.name,
        issuer.keys()
    ));
    let claim = |path: &[&str], value: &str| {
        let path: Vec<String> = path.iter().map(|key| format!("{{key: {key}}}")).collect();
        format!(
            "metadata: {{filter: envoy.filters.http.jwt_authn, path: [{{key: payload}}, {}], value: {{{value}}}}}",
            path.join(", ")
        )
    };
    let any_list = |text: &str| format!("list_match: {{one_of: {{string_match: {{exact: {text}}}}}}}");
    let rules = [
        (
            "principal",
            format!(
                "and_ids: {{ids: [{{{}}}, {{{}}}]}}",
                claim(&["iss"], "string_match: {exact: \"https://issuer.example\"}"),
                claim(&["sub"], "string_match: {exact: me}")
            ),
        ),
        ("group", claim(&["groups"], &any_list("admins"))),
        (
            "either",
            claim(
                &["role"],
                &format!(
                    "or_match: {{value_matchers: [{{string_match: {{prefix: ad}}}}, {{{}}}]}}",
                    any_list("admin")
                ),
            ),
        ),
        ("scope", claim(&["scope"], &any_list("write"))),
        (
            "deep",
            claim(&["a", "b"], "string_match: {safe_regex: {regex: \"v[0-9]+\"}}"),
        ),
        ("flag", claim(&["flag"], "bool_match: true")),
        ("there", claim(&["there"], "present_match: true")),
        (
            "not",
            format!("not_id: {{{}}}", claim(&["sub"], "string_match: {exact: me}")),
        ),
    ];
    let policies: Vec<String> = rules
        .iter()
        .map(|(name, rule)| {
            format!("{name}: {{permissions: [{{url_path: {{path: {{exact: /{name}}}}}}}], principals: [{{{rule}}}]}}")
        })
        .collect();
    let rbac = format!(
        "- {{name: envoy.filters.http.rbac, typed_config: {{\"@type\": {RBAC}, rules: {{policies: {{{}}}}}}}}}\n          ",
        policies.join(", ")
    );
    let cases = [
        ("/principal", Some(json!({})), 200),
        ("/principal", Some(json!({"sub": "you"})), 403),
        ("/principal", None, 403),
        ("/group", Some(json!({"groups": ["users", "admins"]})), 200),
        ("/group", Some(json!({"groups": ["users"]})), 403),
        ("/group", Some(json!({"groups": "admins"})), 403),
        ("/group", Some(json!({})), 403),
        ("/either", Some(json!({"role": "admin"})), 200),
        ("/either", Some(json!({"role": ["x", "admin"]})), 200),
        ("/either", Some(json!({"role": 1})), 403),
        ("/scope", Some(json!({"scope": "read write"})), 200),
        ("/scope", Some(json!({"scope": "read"})), 403),
        ("/deep", Some(json!({"a": {"b": "v12"}})), 200),
        ("/deep", Some(json!({"a": {"b": "w"}})), 403),
        ("/deep", Some(json!({"a": "v1"})), 403),
        ("/flag", Some(json!({"flag": true})), 200),
        ("/flag", Some(json!({"flag": "true"})), 403),
        ("/there", Some(json!({"there": [1]})), 200),
        ("/there", Some(json!({})), 403),
        ("/not", None, 200),
        ("/not", Some(json!({})), 403),
    ];
    at_both(
        |endpoint, _| bootstrap_with(ALL, &app(endpoint), "", &format!("{jwt}{rbac}"), ""),
        |subject, _| {
            let mut client = subject.client();
            for (path, claims, status) in &cases {
                let headers = claims
                    .as_ref()
                    .map(|c| bearer(&issuer.token(c)))
                    .unwrap_or_default();
                let response = get(&mut client, path, &headers);
                assert_eq!(
                    response.status(),
                    *status,
                    "{path} {claims:?} at {}",
                    subject.name()
                );
            }
        },
    );
}

/// A service that has keys and counts how often it was asked; without keys it says 500.
fn key_server(keys: Option<String>) -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let asked = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&asked);
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            while let Ok(Some(request)) = read_message(&mut reader, false, false) {
                assert_eq!(request.first, "GET /keys?x=1 HTTP/1.1");
                assert_eq!(request.header("host"), Some("issuer.example"));
                seen.fetch_add(1, Ordering::SeqCst);
                // So that others come meanwhile.
                std::thread::sleep(Duration::from_millis(50));
                let answer = match &keys {
                    Some(keys) => format!("200 OK\r\ncontent-length: {}\r\n\r\n{keys}", keys.len()),
                    None => "500 No\r\ncontent-length: 0\r\n\r\n".to_owned(),
                };
                if stream.write_all(format!("HTTP/1.1 {answer}").as_bytes()).is_err() {
                    break;
                }
            }
        }
    });
    (address, asked)
}

#[test]
fn keys_are_fetched_once_and_kept() {
    let issuer = Issuer::new("https://issuer.example", "k1");
    let (token, keys) = (issuer.token(&json!({})), issuer.keys());
    for (keys, status, text) in [(Some(keys), 200, ""), (None, 401, "Jwks remote fetch is failed")] {
        let (server, asked) = key_server(keys);
        at_both(
            |endpoint, _| {
                asked.store(0, Ordering::SeqCst);
                let config = "providers: {p: {issuer: \"https://issuer.example\", remote_jwks: {http_uri: {uri: \"https://issuer.example/keys?x=1\", cluster: keys, timeout: 5s}, cache_duration: 300s}}}, \
                     rules: [{match: {prefix: /}, requires: {provider_name: p}}]";
                let clusters = format!(
                    "[{}, {}]",
                    cluster("app", &[endpoint.address], ""),
                    cluster("keys", &[server], "")
                );
                bootstrap_with(ALL, &clusters, "", &filter(config), "")
            },
            |subject, _| {
                // Without a token nobody is asked.
                let answer = get(&mut subject.client(), "/", "");
                assert_eq!((answer.status(), answer.text().as_str()), (401, "Jwt is missing"));
                assert_eq!(asked.load(Ordering::SeqCst), 0);
                let requests = || {
                    let answer = get(&mut subject.client(), "/", &bearer(&token));
                    assert_eq!(answer.status(), status, "{}", subject.name());
                    if status != 200 {
                        assert_eq!(answer.text(), text, "{}", subject.name());
                    }
                };
                requests();
                std::thread::scope(|all| (0..8).for_each(|_| drop(all.spawn(requests))));
                requests();
                let asked = asked.load(Ordering::SeqCst);
                if status == 200 {
                    assert_eq!(asked, 1, "{}", subject.name());
                    subject.await_value("http.web.jwt_authn.jwks_fetch_success", 1);
                } else {
                    assert!(asked >= 1, "{}", subject.name());
                    subject.await_stat("http.web.jwt_authn.jwks_fetch_failed", 1);
                }
            },
        );
    }
}
