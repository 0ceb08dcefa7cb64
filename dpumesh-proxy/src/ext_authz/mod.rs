//! Another service decides (`envoy.filters.http.ext_authz`): what it is asked, what its answer means.
//!
//! ```text
//! request ─► Question ─┬─ gRPC: CheckRequest ─► CheckResponse ─┬─► Decision: passes with changes, denied, failed
//!                      └─ HTTP: the head       ─► status, head ─┘
//! ```
//! [`message`] has the messages of the gRPC service. Nothing here waits: `http1::serve` asks and acts. A question that is not answered
//! denies the request, unless the configuration says otherwise. What an answer adds to a request becomes part of it, and
//! so rules of later filters see it.

pub mod message;

mod grpc;
mod http;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::config::model::ClusterRef;
use crate::rbac::ClaimMatch;
use crate::route::fault::Percentage;
use crate::route::{AddHeader, AddHow, Text};
use crate::stats::Scope;
use crate::tls::Connection;

pub(crate) use self::grpc::{check_request, decision as grpc_decision};
pub(crate) use self::http::{decision as http_decision, request as http_request};

/// The flag of requests that were not allowed.
pub const FLAG: &str = "UAEX";

/// Octets of an answer's body that are taken.
pub(crate) const LONGEST_ANSWER: usize = 1 << 20;

/// The gRPC method that is called.
pub(crate) const CHECK: &str = "/envoy.service.auth.v3.Authorization/Check";

/// `ExtAuthz`: the filter of one connection manager.
#[derive(Debug)]
pub struct Filter {
    /// Who decides.
    pub service: Service,
    /// Its cluster.
    pub cluster: ClusterRef,
    /// How long it may take; `None` is for ever.
    pub timeout: Option<Duration>,
    /// Requests pass when there is no answer; with a flag, the endpoint is told (`x-envoy-auth-failure-mode-allowed`).
    pub failure_mode_allow: Option<bool>,
    /// The body goes with the question.
    pub body: Option<WithBody>,
    /// What the client is answered when there is no answer.
    pub status_on_error: u16,
    /// Of so many requests it is asked,
    pub enabled: Percentage,
    /// and only of those of which this holds.
    pub enabled_by: Option<Noted>,
    /// The other requests do not pass.
    pub deny_at_disable: bool,
    /// The headers that it is told; `None` is all.
    pub allowed: Option<Vec<Text>>,
    /// The headers that it is not told.
    pub disallowed: Vec<Text>,
    /// It is told the name of the TLS handshake.
    pub tls_session: bool,
    /// `http.PREFIX.ext_authz.*`
    pub stats: Arc<Scope>,
}

/// How the service is asked.
#[derive(Debug)]
pub enum Service {
    /// `envoy.service.auth.v3.Authorization`.
    Grpc {
        /// The authority; the cluster's name where it is empty.
        authority: String,
        /// Lines of initial metadata.
        metadata: Vec<u8>,
    },
    /// With the request's own method.
    Http(Box<Http>),
}

/// `HttpService`.
#[derive(Debug)]
pub struct Http {
    /// Stands before the path, or in its place.
    pub path: Path,
    /// Headers added to the question.
    pub add: Vec<(Vec<u8>, Vec<u8>)>,
    /// Headers of the answer that replace the request's.
    pub upstream: Vec<Text>,
    /// Those that are added to the request.
    pub upstream_append: Vec<Text>,
    /// Those that a denied client sees; `None` is all.
    pub client: Option<Vec<Text>>,
    /// Those that an admitted client sees.
    pub client_on_success: Vec<Text>,
}

/// `path_prefix` or `path_override`.
#[derive(Debug)]
pub enum Path {
    /// Before the request's.
    Before(String),
    /// Instead of it.
    Instead(String),
}

/// `BufferSettings`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WithBody {
    /// So many octets.
    pub most: usize,
    /// Of a longer one the beginning, instead of a refusal.
    pub partial: bool,
    /// As octets, not as text.
    pub as_bytes: bool,
}

/// `ExtAuthzPerRoute`.
#[derive(Debug, Clone, Default)]
pub struct PerRoute {
    /// Nobody is asked.
    pub disabled: bool,
    /// Told to the service.
    pub context: Vec<(String, String)>,
    /// Instead of the filter's; `Some(None)` is no body.
    pub body: Option<Option<WithBody>>,
}

/// `MetadataMatcher` on what an RBAC filter before has noted of its shadow rules.
#[derive(Debug)]
pub struct Noted {
    /// `PREFIX` of `PREFIXshadow_effective_policy_id` or `PREFIXshadow_engine_result`.
    pub prefix: String,
    /// Which of the two: the policy's name, or `allowed` and `denied`.
    pub policy: bool,
    /// What it must be.
    pub rule: ClaimMatch,
    /// It must not be.
    pub invert: bool,
}

impl Noted {
    /// Whether it holds for what the shadow rules of this prefix came to: the policy that held, and whether they let it pass.
    pub fn holds(&self, noted: Option<(Option<&str>, bool)>) -> bool {
        let value = match noted {
            Some((policy, _)) if self.policy => policy,
            Some((_, true)) => Some("allowed"),
            Some((_, false)) => Some("denied"),
            None => None,
        };
        value.is_some_and(|value| self.rule.holds(&value.into())) != self.invert
    }
}

/// What is told of a request.
#[derive(Debug)]
pub(crate) struct Question<'a> {
    pub(crate) id: String,
    pub(crate) method: &'a [u8],
    pub(crate) path: &'a [u8],
    pub(crate) host: &'a [u8],
    pub(crate) scheme: &'a [u8],
    pub(crate) protocol: &'static str,
    /// Header lines, without the pseudo ones; names in lower case.
    pub(crate) fields: Vec<(&'a [u8], &'a [u8])>,
    /// The body's length as the head says it.
    pub(crate) size: i64,
    /// The body, and whether it is cut.
    pub(crate) body: Option<(&'a [u8], bool)>,
    pub(crate) as_bytes: bool,
    pub(crate) client: SocketAddr,
    pub(crate) local: SocketAddr,
    pub(crate) connection: &'a Connection,
    pub(crate) service: &'a [u8],
    pub(crate) context: &'a [(String, String)],
}

impl Question<'_> {
    /// Headers and pseudo headers that `filter` tells, in order.
    fn told<'b>(&'b self, filter: &Filter) -> Vec<(&'b [u8], &'b [u8])> {
        let pseudo: [(&[u8], &[u8]); 4] = [
            (b":authority", self.host),
            (b":method", self.method),
            (b":path", self.path),
            (b":scheme", self.scheme),
        ];
        let is_told = |name: &[u8]| {
            let among = |rules: &[Text]| rules.iter().any(|rule| rule.holds(name));
            let allowed = filter.allowed.as_deref().is_none_or(among);
            allowed && !among(&filter.disallowed)
        };
        let all = pseudo.into_iter().chain(self.fields.iter().copied());
        all.filter(|(name, _)| is_told(name)).collect()
    }
}

/// What a service decided.
#[derive(Debug)]
pub(crate) enum Decision {
    /// The request passes, changed.
    Passed(Changes),
    /// The client is answered this.
    Denied(Denial),
    /// The answer is none, or the service says that it failed; with a status of its own, if any.
    Failed(Option<u16>),
}

/// What an answer changes.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    pub(crate) remove: Vec<Vec<u8>>,
    pub(crate) request: Vec<AddHeader>,
    /// Put behind the value of a header that is there; of one that is not nothing comes.
    pub(crate) joined: Vec<AddHeader>,
    pub(crate) response: Vec<AddHeader>,
    pub(crate) query_set: Vec<(String, String)>,
    pub(crate) query_remove: Vec<String>,
}

/// What a refused client is answered.
#[derive(Debug)]
pub(crate) struct Denial {
    pub(crate) status: u16,
    pub(crate) headers: Vec<AddHeader>,
    pub(crate) body: Vec<u8>,
}

/// A header of an answer; `None` where it cannot be one, or is not for others to say.
fn header(name: &[u8], value: &[u8], how: AddHow) -> Option<AddHeader> {
    let name = name.to_ascii_lowercase();
    crate::route::may_change(&name).then_some(())?;
    crate::route::is_value(value).then(|| AddHeader {
        name,
        value: value.to_vec(),
        template: None,
        how,
    })
}

/// Puts a header in the place of others of its name; of several such ones all stay.
fn replace(headers: &mut Vec<AddHeader>, header: Option<AddHeader>) {
    let Some(mut header) = header else {
        return;
    };
    if header.how == AddHow::Overwrite && headers.iter().any(|known| known.name == header.name) {
        header.how = AddHow::Append;
    }
    headers.push(header);
}

/// The status of a refusal: one that HTTP has for answers, else 403.
fn status(code: i32) -> u16 {
    u16::try_from(code)
        .ok()
        .filter(|code| (200..600).contains(code))
        .unwrap_or(403)
}

/// The path with parameters of its query set and removed. Of a name that is set one stays.
pub(crate) fn with_query(path: &[u8], changes: &Changes) -> Option<Vec<u8>> {
    if changes.query_set.is_empty() && changes.query_remove.is_empty() {
        return None;
    }
    let mark = path.iter().position(|b| *b == b'?').unwrap_or(path.len());
    let (bare, query) = path.split_at(mark);
    let query = query.strip_prefix(b"?").unwrap_or_default();
    let name = |pair: &[u8]| pair.split(|b| *b == b'=').next().unwrap_or_default().to_vec();
    let goes = |pair: &&[u8]| {
        let name = name(pair);
        let set = changes
            .query_set
            .iter()
            .any(|(known, _)| known.as_bytes() == name);
        set || changes.query_remove.iter().any(|known| known.as_bytes() == name)
    };
    let mut pairs: Vec<Vec<u8>> = query
        .split(|b| *b == b'&')
        .filter(|pair| !pair.is_empty() && !goes(pair))
        .map(<[u8]>::to_vec)
        .collect();
    let escaped = |text: &str| {
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.~".contains(&b);
        let octet = |b: u8| {
            if plain(b) {
                char::from(b).to_string()
            } else {
                format!("%{b:02X}")
            }
        };
        text.bytes().map(octet).collect::<String>()
    };
    for (name, value) in &changes.query_set {
        pairs.push(format!("{}={}", escaped(name), escaped(value)).into_bytes());
    }
    let mut fresh = bare.to_vec();
    if !pairs.is_empty() {
        fresh.push(b'?');
        fresh.extend_from_slice(&pairs.join(&b'&'));
    }
    Some(fresh)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_is_changed() {
        for (path, set, remove, wanted) in [
            ("/a", &[("x", "1")][..], &[][..], "/a?x=1"),
            ("/a?x=0&y=2&x=3", &[("x", "1")], &[], "/a?y=2&x=1"),
            ("/a?x=0", &[], &["x"], "/a"),
            ("/a?x=0", &[("b c", "&=")], &["y"], "/a?x=0&b%20c=%26%3D"),
        ] {
            let changes = Changes {
                query_set: set.iter().map(|(n, v)| (n.to_string(), v.to_string())).collect(),
                query_remove: remove.iter().map(ToString::to_string).collect(),
                ..Changes::default()
            };
            let fresh = with_query(path.as_bytes(), &changes).unwrap();
            assert_eq!(String::from_utf8(fresh).unwrap(), wanted);
        }
        assert!(with_query(b"/a?x", &Changes::default()).is_none());
    }
}
