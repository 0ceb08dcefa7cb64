//! Which route takes a request: virtual host by host, then the first route whose match holds.
//!
//! Works on borrowed parts of the request and allocates nothing. Order and details are Envoy's: exact domains before
//! the longest suffix wildcard (`*.a.b`), before the longest prefix wildcard (`a.*`), before `*`; path matches look at
//! the path without its query; of a repeated header one value has to match (inverted: none may).

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use regex::bytes::Regex;

use crate::access_log::{Record, Template};
use crate::balance::policy::HashPolicy;
use crate::balance::subset::Criteria;
use crate::config::model::{ClusterRef, Weighted};
use crate::ext_authz;
use crate::ratelimit::LocalRate;

pub mod cors;
pub mod fault;
pub mod retry;
pub mod upgrade;

/// A compiled `RouteConfiguration`.
#[derive(Debug, Default)]
pub struct RouteTable {
    /// Its name.
    pub name: String,
    /// `ignore_port_in_host_matching`.
    pub ignore_port: bool,
    /// Headers changed on every request and response.
    pub headers: HeaderChanges,
    /// Virtual hosts in file order.
    pub hosts: Vec<VirtualHost>,
    /// Host → virtual host; lower case.
    pub exact: HashMap<Vec<u8>, usize>,
    /// `*.suffix`, without the star, longest first.
    pub suffixes: Vec<(Vec<u8>, usize)>,
    /// `prefix.*`, without the star, longest first.
    pub prefixes: Vec<(Vec<u8>, usize)>,
    /// `*`.
    pub any: Option<usize>,
}

/// A virtual host.
#[derive(Debug)]
pub struct VirtualHost {
    /// Its name.
    pub name: String,
    /// Headers changed on its requests and responses.
    pub headers: HeaderChanges,
    /// Routes, first match wins.
    pub routes: Vec<Route>,
    /// Endpoints are told how many attempts this one is (`x-envoy-attempt-count`).
    pub attempt_count_in_request: bool,
    /// Clients are told how many attempts there were.
    pub attempt_count_in_response: bool,
}

/// A route.
#[derive(Debug)]
pub struct Route {
    /// Its name, often empty.
    pub name: String,
    /// Which requests it takes.
    pub matcher: RouteMatch,
    /// What it does with them.
    pub action: Action,
    /// Headers changed on its requests and responses.
    pub headers: HeaderChanges,
    /// Replaces the fault filter's own configuration.
    pub fault: Option<Arc<fault::Fault>>,
    /// Replaces the rate limit filter's own configuration.
    pub local_rate: Option<Arc<LocalRate>>,
    /// What the CORS filter does.
    pub cors: Option<Arc<cors::Cors>>,
    /// What the external authorization filter does differently.
    pub ext_authz: Option<Arc<ext_authz::PerRoute>>,
}

/// `RouteMatch`.
#[derive(Debug)]
pub struct RouteMatch {
    /// The path rule.
    pub path: PathMatch,
    /// Whether letter case counts in a prefix or path.
    pub case_sensitive: bool,
    /// Header rules; all must hold.
    pub headers: Vec<HeaderMatch>,
    /// Query parameter rules; all must hold.
    pub query: Vec<QueryMatch>,
    /// Only gRPC requests (`grpc`).
    pub grpc: bool,
}

/// A path rule.
#[derive(Debug)]
pub enum PathMatch {
    /// The path begins with this.
    Prefix(Vec<u8>),
    /// The path is this.
    Exact(Vec<u8>),
    /// The path is this, or continues it after a `/`.
    Segments(Vec<u8>),
    /// The whole path matches.
    Regex(Regex),
    /// A CONNECT request, which has no path and is taken by no other rule (`connect_matcher`).
    Connect,
}

/// A rule on one header.
#[derive(Debug)]
pub struct HeaderMatch {
    /// The name, lower case; pseudo headers `:method`, `:path`, `:authority`, `:scheme` as in Envoy.
    pub name: Vec<u8>,
    /// The rule.
    pub value: ValueMatch,
    /// Turns the outcome around.
    pub invert: bool,
    /// A header that is not there counts as an empty one; otherwise the rule fails (inverted or not).
    pub missing_is_empty: bool,
}

/// A rule on one query parameter.
#[derive(Debug)]
pub struct QueryMatch {
    /// Its name.
    pub name: Vec<u8>,
    /// The rule.
    pub value: ValueMatch,
}

/// A rule on a value.
#[derive(Debug)]
pub enum ValueMatch {
    /// There (true) or not there (false).
    Present(bool),
    /// A decimal number in `start..end`.
    Range(i64, i64),
    /// A text rule.
    Text(Text),
}

/// A rule on text, with or without regard to letter case.
#[derive(Debug)]
pub struct Text {
    rule: TextMatch,
    ignore_case: bool,
}

/// A rule on text.
#[derive(Debug)]
pub enum TextMatch {
    /// All of it.
    Exact(Vec<u8>),
    /// Its beginning.
    Prefix(Vec<u8>),
    /// Its end.
    Suffix(Vec<u8>),
    /// Any part.
    Contains(Vec<u8>),
    /// All of it matches.
    Regex(Regex),
}

/// What a route does.
#[derive(Debug)]
pub enum Action {
    /// Forwards to a cluster.
    Forward(Box<Forward>),
    /// Sends the client elsewhere.
    Redirect(Box<Redirect>),
    /// Answers by itself.
    Direct {
        /// The status.
        status: u16,
        /// The body.
        body: Vec<u8>,
    },
}

/// `max_stream_duration` of a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StreamDuration {
    /// Replaces the connection manager's limit: `Some(None)` is no limit.
    pub most: Option<Option<Duration>>,
    /// Where a request says `grpc-timeout`, that is the limit, up to this; `Some(None)` is no bound.
    pub grpc: Option<Option<Duration>>,
}

/// `RouteAction`.
#[derive(Debug)]
pub struct Forward {
    /// Where to.
    pub to: Target,
    /// Status when the cluster does not exist.
    pub not_found_status: u16,
    /// From the end of the request to the end of the response; `None` is no limit.
    pub timeout: Option<Duration>,
    /// A gRPC request may say its own limit (`grpc-timeout`), up to this; `Some(None)` is no bound.
    pub grpc_timeout: Option<Option<Duration>>,
    /// How long a request and its response may take in all.
    pub stream_duration: StreamDuration,
    /// Replaces the connection manager's stream idle timeout: `Some(None)` switches it off.
    pub idle_timeout: Option<Option<Duration>>,
    /// Replaces the path or a part of it.
    pub path_rewrite: Option<PathRewrite>,
    /// Replaces the host.
    pub host_rewrite: Option<Vec<u8>>,
    /// When the request is sent once more.
    pub retry: Option<Arc<retry::RetryPolicy>>,
    /// What consistent hashing goes by.
    pub hash: Vec<HashPolicy>,
    /// Which of the cluster's endpoints come into question.
    pub subset: Option<Criteria>,
    /// Who gets a copy of the requests.
    pub mirrors: Vec<Mirror>,
    /// Which tunnels it allows or forbids.
    pub upgrades: upgrade::Upgrades,
}

/// `RequestMirrorPolicy`.
#[derive(Debug)]
pub struct Mirror {
    /// Where copies go.
    pub cluster: ClusterRef,
    /// Of how many requests.
    pub share: fault::Percentage,
    /// Copies are for the host `HOST-shadow`.
    pub renames_host: bool,
}

/// What a route replaces of the path.
#[derive(Debug)]
pub enum PathRewrite {
    /// The matched prefix (or path).
    Prefix(Vec<u8>),
    /// Every match of an expression in the path without its query, by a replacement in the `regex` crate's form.
    Regex(Regex, Vec<u8>),
}

/// How the cluster is found.
#[derive(Debug)]
pub enum Target {
    /// Named.
    Cluster(ClusterRef),
    /// Named by a request header (lower case).
    Header(Vec<u8>, HashMap<Vec<u8>, ClusterRef>),
    /// By weight; each with its own header changes and choice of endpoints.
    Weighted(Weighted<(ClusterRef, HeaderChanges, Option<Criteria>)>),
}

/// `RedirectAction`.
#[derive(Debug)]
pub struct Redirect {
    /// 301, 302, 303, 307 or 308.
    pub status: u16,
    /// New scheme.
    pub scheme: Option<String>,
    /// New host.
    pub host: Option<String>,
    /// New port.
    pub port: Option<u16>,
    /// New path, or the matched prefix's replacement.
    pub path: RedirectPath,
    /// Leaves the query out.
    pub strip_query: bool,
}

/// What a redirect does to the path.
#[derive(Debug)]
pub enum RedirectPath {
    /// Nothing.
    Keep,
    /// Replaces it.
    Replace(Vec<u8>),
    /// Replaces the matched prefix.
    Prefix(Vec<u8>),
}

/// Headers to remove and add, for requests and for responses.
#[derive(Debug, Clone, Default)]
pub struct HeaderChanges {
    /// Request headers to remove, lower case.
    pub request_remove: Vec<Vec<u8>>,
    /// Request headers to add.
    pub request_add: Vec<AddHeader>,
    /// Response headers to remove, lower case.
    pub response_remove: Vec<Vec<u8>>,
    /// Response headers to add.
    pub response_add: Vec<AddHeader>,
}

/// One header to add.
#[derive(Debug, Clone)]
pub struct AddHeader {
    /// Lower case.
    pub name: Vec<u8>,
    /// Literal, where there is no template.
    pub value: Vec<u8>,
    /// Makes the value for a request; one that comes out empty adds nothing.
    pub template: Option<Arc<Template>>,
    /// When the header is there already.
    pub how: AddHow,
}

/// `append_action`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AddHow {
    /// A further line.
    Append,
    /// Only if there is none.
    IfAbsent,
    /// Replaces all there are, or adds.
    Overwrite,
    /// Replaces all there are, adds none.
    OverwriteIfExists,
}

impl HeaderChanges {
    /// Whether nothing changes.
    pub fn is_empty(&self) -> bool {
        self.request_remove.is_empty()
            && self.request_add.is_empty()
            && self.response_remove.is_empty()
            && self.response_add.is_empty()
    }

    /// Whether a value depends on the request.
    pub fn has_templates(&self) -> bool {
        let mut all = self.request_add.iter().chain(&self.response_add);
        all.any(|header| header.template.is_some())
    }

    /// The same with all values made for a request.
    pub fn rendered(&self, record: &Record<'_>) -> Self {
        let mut fresh = self.clone();
        for list in [&mut fresh.request_add, &mut fresh.response_add] {
            list.retain_mut(|header| match header.template.take() {
                Some(template) => {
                    header.value = template.render(record);
                    !header.value.is_empty()
                }
                None => true,
            });
        }
        fresh
    }
}

/// What routing looks at.
pub trait RequestView {
    /// The host, as sent.
    fn host(&self) -> &[u8];
    /// The path with its query.
    fn path(&self) -> &[u8];
    /// The method.
    fn method(&self) -> &[u8];
    /// `http` or `https`.
    fn scheme(&self) -> &[u8] {
        b"http"
    }
    /// The values of a header by its lower-case name, in order.
    fn each_header<'a>(&'a self, name: &[u8], see: &mut dyn FnMut(&'a [u8]));
}

impl RouteTable {
    /// The virtual host and route for a request.
    pub fn find(&self, request: &impl RequestView) -> Option<(&VirtualHost, &Route)> {
        let host = self.virtual_host(request.host())?;
        let path = request.path();
        let bare = path.split(|b| *b == b'?').next().unwrap_or(path);
        let route = host
            .routes
            .iter()
            .find(|r| r.matcher.holds(bare, path, request))?;
        Some((host, route))
    }

    fn virtual_host(&self, host: &[u8]) -> Option<&VirtualHost> {
        if self.exact.is_empty() && self.suffixes.is_empty() && self.prefixes.is_empty() {
            return self.any.map(|index| &self.hosts[index]);
        }
        let mut lower = [0u8; 256];
        let host = if self.ignore_port {
            without_port(host)
        } else {
            host
        };
        let Some(lower) = lower.get_mut(..host.len()) else {
            return self.any.map(|index| &self.hosts[index]);
        };
        lower.copy_from_slice(host);
        lower.make_ascii_lowercase();
        let lower: &[u8] = lower;
        let longer = |wildcard: &Vec<u8>| lower.len() > wildcard.len();
        let index = self
            .exact
            .get(lower)
            .or_else(|| {
                self.suffixes
                    .iter()
                    .find(|(s, _)| longer(s) && lower.ends_with(s))
                    .map(|(_, i)| i)
            })
            .or_else(|| {
                self.prefixes
                    .iter()
                    .find(|(p, _)| longer(p) && lower.starts_with(p))
                    .map(|(_, i)| i)
            })
            .or(self.any.as_ref())?;
        Some(&self.hosts[*index])
    }
}

/// The host without `:port`; an IPv6 address keeps its brackets.
fn without_port(host: &[u8]) -> &[u8] {
    match host.iter().rposition(|b| *b == b':') {
        Some(colon) if host[colon + 1..].iter().all(u8::is_ascii_digit) && !host[colon..].contains(&b']') => {
            &host[..colon]
        }
        _ => host,
    }
}

impl RouteMatch {
    /// Whether it takes a request.
    pub fn takes(&self, request: &impl RequestView) -> bool {
        let path = request.path();
        let bare = path.split(|b| *b == b'?').next().unwrap_or(path);
        self.holds(bare, path, request)
    }

    fn holds(&self, bare: &[u8], path: &[u8], request: &impl RequestView) -> bool {
        self.path.holds(bare, self.case_sensitive)
            && self.headers.iter().all(|h| h.holds(request))
            && (self.query.is_empty() || self.query.iter().all(|q| q.holds(&path[bare.len()..])))
            && (!self.grpc || is_grpc(request))
    }
}

fn is_grpc(request: &impl RequestView) -> bool {
    let mut grpc = false;
    request.each_header(b"content-type", &mut |value| grpc |= crate::http1::is_grpc(value));
    grpc
}

impl PathMatch {
    fn holds(&self, path: &[u8], case_sensitive: bool) -> bool {
        let same = |a: &[u8], b: &[u8]| {
            if case_sensitive {
                a == b
            } else {
                a.eq_ignore_ascii_case(b)
            }
        };
        let begins = |prefix: &[u8]| path.len() >= prefix.len() && same(&path[..prefix.len()], prefix);
        match self {
            Self::Prefix(prefix) => begins(prefix) && !path.is_empty(),
            Self::Exact(exact) => same(path, exact),
            Self::Segments(prefix) => begins(prefix) && matches!(path.get(prefix.len()), None | Some(b'/')),
            Self::Regex(regex) => regex.is_match(path) && !path.is_empty(),
            Self::Connect => path.is_empty(),
        }
    }

    /// How much of the path a prefix rewrite replaces: the prefix, or all of it.
    pub fn matched_len(&self, path: &[u8]) -> usize {
        match self {
            Self::Prefix(prefix) | Self::Segments(prefix) => prefix.len(),
            Self::Exact(_) | Self::Regex(_) | Self::Connect => path.len(),
        }
    }
}

impl HeaderMatch {
    /// Whether the rule holds for a request.
    pub fn holds(&self, request: &impl RequestView) -> bool {
        let pseudo = match self.name.as_slice() {
            b":method" => Some(request.method()),
            b":path" => Some(request.path()),
            b":authority" | b"host" => Some(request.host()),
            b":scheme" => Some(request.scheme()),
            _ => None,
        };
        let (mut there, mut holds) = (pseudo.is_some(), false);
        match pseudo {
            Some(value) => holds = self.value.holds(value),
            None => request.each_header(&self.name, &mut |value| {
                there = true;
                holds |= self.value.holds(value);
            }),
        }
        match &self.value {
            ValueMatch::Present(wanted) => (there == *wanted) ^ self.invert,
            _ if there => holds ^ self.invert,
            value => self.missing_is_empty && (value.holds(b"") ^ self.invert),
        }
    }
}

impl QueryMatch {
    /// `query` begins at the `?`, or is empty.
    fn holds(&self, query: &[u8]) -> bool {
        let mut pairs = query.get(1..).unwrap_or_default().split(|b| *b == b'&');
        let found = pairs.find_map(|pair| {
            let (name, value) = match pair.iter().position(|b| *b == b'=') {
                Some(equals) => (&pair[..equals], &pair[equals + 1..]),
                None => (pair, b"".as_slice()),
            };
            (name == self.name).then_some(value)
        });
        match (&self.value, found) {
            (ValueMatch::Present(wanted), found) => found.is_some() == *wanted,
            (_, None) => false,
            (value, Some(found)) => value.holds(found),
        }
    }
}

impl ValueMatch {
    fn holds(&self, value: &[u8]) -> bool {
        match self {
            Self::Present(wanted) => *wanted,
            Self::Range(start, end) => {
                let number = std::str::from_utf8(value)
                    .ok()
                    .and_then(|v| v.parse::<i64>().ok());
                number.is_some_and(|n| n >= *start && n < *end)
            }
            Self::Text(text) => text.holds(value),
        }
    }
}

impl Text {
    /// A rule; `ignore_case` has no effect on an expression, which says for itself.
    pub fn new(rule: TextMatch, ignore_case: bool) -> Self {
        Self { rule, ignore_case }
    }

    /// Whether it holds for `value`.
    pub fn holds(&self, value: &[u8]) -> bool {
        if !self.ignore_case {
            return self.rule.holds(value);
        }
        let at = |from: usize, text: &[u8]| {
            let part = value.get(from..from + text.len());
            part.is_some_and(|part| part.eq_ignore_ascii_case(text))
        };
        match &self.rule {
            TextMatch::Exact(text) => value.eq_ignore_ascii_case(text),
            TextMatch::Prefix(text) => at(0, text),
            TextMatch::Suffix(text) => value.len() >= text.len() && at(value.len() - text.len(), text),
            TextMatch::Contains(text) => (0..=value.len()).any(|from| at(from, text)),
            TextMatch::Regex(regex) => regex.is_match(value),
        }
    }
}

impl TextMatch {
    fn holds(&self, value: &[u8]) -> bool {
        match self {
            Self::Exact(text) => value == text.as_slice(),
            Self::Prefix(text) => value.starts_with(text),
            Self::Suffix(text) => value.ends_with(text),
            Self::Contains(text) => memchr::memmem::find(value, text).is_some(),
            Self::Regex(regex) => regex.is_match(value),
        }
    }
}

/// Names that belong to the framing or to the request line are not the configuration's to change, nor an authorization service's.
pub(crate) fn may_change(name: &[u8]) -> bool {
    const FRAMING: [&[u8]; 9] = [
        b"host",
        b"content-length",
        b"transfer-encoding",
        b"connection",
        b"upgrade",
        b"keep-alive",
        b"proxy-connection",
        b"te",
        b"trailer",
    ];
    !name.is_empty() && name.iter().all(|b| crate::http1::is_token(*b)) && !FRAMING.contains(&name)
}

/// Visible octets, spaces, tabs and bytes above ASCII.
pub(crate) fn is_value(value: &[u8]) -> bool {
    value.iter().all(|b| *b == b'\t' || (*b >= 0x20 && *b != 0x7f))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Request(&'static str, &'static str, Vec<(&'static str, &'static str)>);

    impl RequestView for Request {
        fn host(&self) -> &[u8] {
            self.0.as_bytes()
        }
        fn path(&self) -> &[u8] {
            self.1.as_bytes()
        }
        fn method(&self) -> &[u8] {
            b"GET"
        }
        fn each_header<'a>(&'a self, name: &[u8], see: &mut dyn FnMut(&'a [u8])) {
            self.2
                .iter()
                .filter(|(n, _)| n.as_bytes() == name)
                .for_each(|(_, v)| see(v.as_bytes()));
        }
    }

    fn host(name: &str) -> VirtualHost {
        let matcher = RouteMatch {
            path: PathMatch::Prefix(b"/".to_vec()),
            case_sensitive: true,
            headers: Vec::new(),
            grpc: false,
            query: Vec::new(),
        };
        let action = Action::Direct {
            status: 200,
            body: Vec::new(),
        };
        let route = Route {
            name: String::new(),
            matcher,
            action,
            headers: HeaderChanges::default(),
            fault: None,
            local_rate: None,
            ext_authz: None,
            cors: None,
        };
        VirtualHost {
            name: name.to_owned(),
            headers: HeaderChanges::default(),
            routes: vec![route],
            attempt_count_in_request: false,
            attempt_count_in_response: false,
        }
    }

    #[test]
    fn hosts_match_exact_then_suffix_then_prefix_then_any() {
        let table = RouteTable {
            hosts: ["exact", "long suffix", "suffix", "prefix", "any"]
                .map(host)
                .into_iter()
                .collect(),
            exact: [(b"a.example.com".to_vec(), 0)].into_iter().collect(),
            suffixes: vec![(b".b.example.com".to_vec(), 1), (b".example.com".to_vec(), 2)],
            prefixes: vec![(b"www.".to_vec(), 3)],
            any: Some(4),
            ..RouteTable::default()
        };
        for (name, wanted) in [
            ("a.example.com", "exact"),
            ("A.Example.COM", "exact"),
            ("x.b.example.com", "long suffix"),
            ("x.example.com", "suffix"),
            (".example.com", "any"),
            ("www.other", "prefix"),
            ("other", "any"),
            ("a.example.com:80", "any"),
        ] {
            let request = Request(name, "/", Vec::new());
            assert_eq!(table.find(&request).unwrap().0.name, wanted, "{name}");
        }
        let table = RouteTable {
            ignore_port: true,
            ..table
        };
        assert_eq!(
            table
                .find(&Request("a.example.com:80", "/", Vec::new()))
                .unwrap()
                .0
                .name,
            "exact"
        );
        let long: &'static str = Box::leak("x".repeat(300).into_boxed_str());
        assert_eq!(table.find(&Request(long, "/", Vec::new())).unwrap().0.name, "any");
    }

    #[test]
    fn paths_match() {
        let holds = |rule: &PathMatch, path: &str, case| rule.holds(path.as_bytes(), case);
        let segments = PathMatch::Segments(b"/api".to_vec());
        assert!(
            holds(&segments, "/api", true)
                && holds(&segments, "/api/x", true)
                && !holds(&segments, "/apix", true)
        );
        let exact = PathMatch::Exact(b"/A".to_vec());
        assert!(holds(&exact, "/a", false) && !holds(&exact, "/a", true) && !holds(&exact, "/a/", false));
        assert!(!holds(&PathMatch::Prefix(b"/long".to_vec()), "/lo", true));
    }

    fn header(value: ValueMatch, invert: bool, missing_is_empty: bool) -> HeaderMatch {
        HeaderMatch {
            name: b"x".to_vec(),
            value,
            invert,
            missing_is_empty,
        }
    }

    #[test]
    fn headers_match_as_in_envoy() {
        let exact = |v: &str| ValueMatch::Text(Text::new(TextMatch::Exact(v.into()), false));
        let request = |values: &[&'static str]| Request("h", "/", values.iter().map(|v| ("x", *v)).collect());
        for (rule, values, wanted) in [
            (header(exact("a"), false, false), vec!["a"], true),
            (header(exact("a"), true, false), vec!["a"], false),
            (header(exact("a"), true, false), vec![], false),
            (header(exact("a"), true, true), vec![], true),
            (header(exact("b"), false, false), vec!["a", "b"], true),
            (header(exact("a,b"), false, false), vec!["a", "b"], false),
            (header(exact("b"), true, false), vec!["a", "b"], false),
            (header(exact("c"), true, false), vec!["a", "b"], true),
            (header(ValueMatch::Present(true), false, false), vec![], false),
            (header(ValueMatch::Present(true), true, false), vec![], true),
            (header(ValueMatch::Present(false), false, false), vec![], true),
            (header(ValueMatch::Range(-5, 5), false, false), vec!["-5"], true),
            (header(ValueMatch::Range(-5, 5), false, false), vec!["5"], false),
            (header(ValueMatch::Range(-5, 5), false, false), vec!["x"], false),
            (
                header(
                    ValueMatch::Text(Text::new(TextMatch::Suffix(b"z".to_vec()), true)),
                    false,
                    false,
                ),
                vec!["AZ"],
                true,
            ),
            (
                header(
                    ValueMatch::Text(Text::new(TextMatch::Contains(b"MID".to_vec()), true)),
                    false,
                    false,
                ),
                vec!["amidb"],
                true,
            ),
        ] {
            assert_eq!(rule.holds(&request(&values)), wanted, "{rule:?} {values:?}");
        }
    }
}
