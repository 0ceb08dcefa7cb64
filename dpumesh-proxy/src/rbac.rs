//! Who may do what: the rules of `envoy.filters.http.rbac` and `envoy.filters.network.rbac`, compiled.
//!
//! ```text
//! Filter ─► Policies (ALLOW, DENY or LOG) ─► Policy ─► permissions (what is asked for) and principals (who asks)
//! ```
//! A policy holds when one of its permissions and one of its principals hold. Of DENY policies none may hold, of ALLOW
//! policies one must; they are tried in the order of their names. Nothing here allocates, and nothing is taken from a
//! request that the connection knows better: names come from the verified certificate, addresses from the socket.
//! The configuration becomes rules in `config::rbac`.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use regex::bytes::Regex;
use serde_json::Value;

use crate::jwt::Claims;
use crate::route::{HeaderMatch, RequestView, Text};
use crate::stats::{Rbac as Stat, Scope, Shard};
use crate::tls::PeerIdentity;
use crate::worker::Peer;

/// The body of a refused request's 403.
pub const DENIED_BODY: &str = "RBAC: access denied";

/// The details of a refusal by ALLOW policies, of which none held.
pub const DENIED_BY_NONE: &str = "rbac_access_denied_matched_policy[none]";

/// What the rules know of the connection.
#[derive(Debug, Clone, Copy)]
pub struct Connection<'a> {
    /// What the client's verified certificate names; `None` without one.
    pub peer: Option<&'a PeerIdentity>,
    /// The socket's other end.
    pub direct_remote: SocketAddr,
    /// The same, or whom a PROXY header names.
    pub source: SocketAddr,
    /// Who the request says it comes from (`x-forwarded-for`), where that is believed; else as `source`.
    pub remote: IpAddr,
    /// The address the client meant.
    pub destination: SocketAddr,
    /// The name asked for in the TLS handshake; empty without one.
    pub server_name: &'a [u8],
    /// The claims of the request's tokens, once they are verified.
    pub claims: Option<&'a Claims>,
}

/// One filter: rules in force, and rules that are only counted.
#[derive(Debug)]
pub struct Filter {
    /// Rules in force; `None` lets everything pass.
    pub rules: Option<Policies>,
    /// Rules that change nothing but counters.
    pub shadow: Option<Shadow>,
    /// `PREFIX.rbac.*`
    pub stats: Arc<Scope>,
}

/// Rules that are tried, not enforced.
#[derive(Debug)]
pub struct Shadow {
    /// The rules.
    pub rules: Policies,
    /// `PREFIX.rbac.NAME.*`, or `PREFIX.rbac.*` for rules without a name.
    pub stats: Arc<Scope>,
    /// Counts what they let pass, and what they would have refused.
    pub members: [usize; 2],
    /// What stands before the names of what later filters are told.
    pub prefix: String,
}

/// What shadow rules came to.
#[derive(Debug, Clone, Copy)]
pub struct Noted<'a> {
    /// Their prefix.
    pub prefix: &'a str,
    /// The policy that held.
    pub policy: Option<&'a str>,
    /// They let it pass.
    pub allowed: bool,
}

/// Policies of one action, by name.
#[derive(Debug)]
pub struct Policies {
    /// What it means that one holds.
    pub action: Action,
    /// In the order of their names.
    pub policies: Vec<Policy>,
}

/// What a policy does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Only what a policy allows passes.
    Allow,
    /// What a policy names does not pass.
    Deny,
    /// Everything passes (Istio's AUDIT).
    Log,
}

/// A policy.
#[derive(Debug)]
pub struct Policy {
    /// Its name.
    pub name: String,
    /// What a refusal by it is logged as: `rbac_access_denied_matched_policy[NAME]`.
    pub details: String,
    /// What is asked for; one must hold.
    pub permissions: Vec<Rule>,
    /// Who asks; one must hold.
    pub principals: Vec<Rule>,
}

/// A condition on a request and its connection.
#[derive(Debug)]
pub enum Rule {
    /// Always.
    Any,
    /// All of them.
    And(Vec<Self>),
    /// One of them.
    Or(Vec<Self>),
    /// Not it.
    Not(Box<Self>),
    /// A header, or `:method`, `:authority`, `:path`.
    Header(HeaderMatch),
    /// The path without its query.
    Path(Text),
    /// The path without its query, by a template compiled to an expression.
    Template(Regex),
    /// The destination address.
    DestinationIp(IpNet),
    /// A range of destination ports: first, and one behind the last.
    DestinationPort(i64, i64),
    /// The name of the TLS handshake.
    ServerName(Text),
    /// A verified certificate; with a rule, one of its names.
    Authenticated(Option<Text>),
    /// The socket's other end.
    DirectRemoteIp(IpNet),
    /// The same, or whom a PROXY header names.
    SourceIp(IpNet),
    /// Where the request says it comes from.
    RemoteIp(IpNet),
    /// A claim of a verified token: its path, and the rule.
    Claim(Vec<String>, ClaimMatch),
}

/// A rule on a claim. One that is not there fulfils none.
#[derive(Debug)]
pub enum ClaimMatch {
    /// It is text, and this holds.
    Text(Text),
    /// It is this.
    Bool(bool),
    /// It is there (`false`: never holds, as in Envoy).
    Present(bool),
    /// It is a list, and this holds for one of its items.
    OneOf(Box<Self>),
    /// One of these holds.
    Any(Vec<Self>),
}

impl ClaimMatch {
    /// Whether it holds for a value.
    pub fn holds(&self, value: &Value) -> bool {
        match self {
            Self::Text(text) => value.as_str().is_some_and(|value| text.holds(value.as_bytes())),
            Self::Bool(wanted) => value.as_bool() == Some(*wanted),
            Self::Present(wanted) => *wanted,
            Self::OneOf(rule) => value
                .as_array()
                .is_some_and(|items| items.iter().any(|i| rule.holds(i))),
            Self::Any(rules) => rules.iter().any(|rule| rule.holds(value)),
        }
    }
}

impl Filter {
    /// Tries and counts the shadow rules.
    pub fn try_shadow(
        &self,
        connection: &Connection<'_>,
        request: &impl RequestView,
        shard: Shard,
    ) -> Option<Noted<'_>> {
        let shadow = self.shadow.as_ref()?;
        let held = shadow.rules.held(connection, request);
        let allowed = shadow.rules.passes(held);
        shadow.stats.inc(shard, shadow.members[usize::from(!allowed)]);
        Some(Noted {
            prefix: &shadow.prefix,
            policy: held.map(|policy| policy.name.as_str()),
            allowed,
        })
    }

    /// Decides by the rules in force, and counts.
    ///
    /// # Errors
    /// The details of the refusal.
    pub fn check(
        &self,
        connection: &Connection<'_>,
        request: &impl RequestView,
        shard: Shard,
    ) -> Result<(), &str> {
        let Some(rules) = &self.rules else {
            return Ok(());
        };
        let decision = rules.decide(connection, request);
        let member = if decision.is_ok() {
            Stat::Allowed
        } else {
            Stat::Denied
        };
        self.stats.inc(shard, member);
        decision
    }
}

impl Policies {
    /// Whether the request passes.
    ///
    /// # Errors
    /// The details of the refusal.
    pub fn decide(&self, connection: &Connection<'_>, request: &impl RequestView) -> Result<(), &str> {
        let held = self.held(connection, request);
        if self.passes(held) {
            return Ok(());
        }
        Err(held.map_or(DENIED_BY_NONE, |policy| &policy.details))
    }

    /// The first policy that holds. Nothing follows from a policy that logs, so none is looked for.
    fn held(&self, connection: &Connection<'_>, request: &impl RequestView) -> Option<&Policy> {
        if self.action == Action::Log {
            return None;
        }
        self.policies.iter().find(|p| p.holds(connection, request))
    }

    fn passes(&self, held: Option<&Policy>) -> bool {
        match self.action {
            Action::Log => true,
            Action::Allow => held.is_some(),
            Action::Deny => held.is_none(),
        }
    }
}

impl Policy {
    fn holds(&self, connection: &Connection<'_>, request: &impl RequestView) -> bool {
        let one = |rules: &[Rule]| rules.iter().any(|r| r.holds(connection, request));
        one(&self.permissions) && one(&self.principals)
    }
}

impl Rule {
    fn holds(&self, connection: &Connection<'_>, request: &impl RequestView) -> bool {
        match self {
            Self::Any => true,
            Self::And(rules) => rules.iter().all(|r| r.holds(connection, request)),
            Self::Or(rules) => rules.iter().any(|r| r.holds(connection, request)),
            Self::Not(rule) => !rule.holds(connection, request),
            Self::Header(header) => header.holds(request),
            Self::Path(text) => bare_path(request).is_some_and(|path| text.holds(path)),
            Self::Template(regex) => bare_path(request).is_some_and(|path| regex.is_match(path)),
            Self::DestinationIp(net) => inside(net, connection.destination.ip()),
            Self::DestinationPort(from, to) => {
                (*from..*to).contains(&i64::from(connection.destination.port()))
            }
            Self::ServerName(text) => text.holds(connection.server_name),
            Self::Authenticated(name) => connection
                .peer
                .is_some_and(|peer| name.as_ref().is_none_or(|name| is_named(peer, name))),
            Self::DirectRemoteIp(net) => inside(net, connection.direct_remote.ip()),
            Self::SourceIp(net) => inside(net, connection.source.ip()),
            Self::RemoteIp(net) => inside(net, connection.remote),
            Self::Claim(path, rule) => {
                let claim = connection.claims.and_then(|claims| claims.get(path));
                claim.is_some_and(|claim| rule.holds(claim))
            }
        }
    }
}

/// Any URI name, any DNS name or the subject, as in Envoy.
fn is_named(peer: &PeerIdentity, name: &Text) -> bool {
    let mut sans = peer.uri_sans.iter().chain(&peer.dns_sans);
    sans.any(|san| name.holds(san.as_bytes())) || name.holds(peer.subject.as_bytes())
}

/// Whether a connection passes the rules of its chain. They are asked at once, not at the first octet as in Envoy:
/// nothing they look at changes by it, and a server that speaks first says nothing to a client that may not be there.
///
/// # Errors
/// The details of the refusal.
pub fn admit<'a>(filters: &'a [Filter], peer: &Peer, shard: Shard) -> Result<(), &'a str> {
    if filters.is_empty() {
        return Ok(());
    }
    let connection = Connection::of(peer);
    filters.iter().try_for_each(|filter| {
        filter.try_shadow(&connection, &NoRequest, shard);
        filter.check(&connection, &NoRequest, shard)
    })
}

impl<'a> Connection<'a> {
    /// A connection of which no request says where it comes from.
    pub fn of(peer: &'a Peer) -> Self {
        Self {
            peer: peer.connection.peer.as_deref(),
            direct_remote: peer.direct_remote,
            source: peer.remote,
            remote: peer.remote.ip(),
            destination: peer.local,
            server_name: peer.connection.server_name.as_deref().unwrap_or("").as_bytes(),
            claims: None,
        }
    }
}

/// The path without its query; `None` where there is no request.
fn bare_path(request: &impl RequestView) -> Option<&[u8]> {
    let path = request.path();
    (!path.is_empty()).then(|| path.split(|b| *b == b'?').next().unwrap_or(path))
}

/// An IPv4 address counts as itself, however the socket writes it.
fn inside(net: &IpNet, ip: IpAddr) -> bool {
    net.contains(&ip.to_canonical())
}

/// A connection of which no request is read: no header is there.
#[derive(Debug, Clone, Copy)]
pub struct NoRequest;

impl RequestView for NoRequest {
    fn host(&self) -> &[u8] {
        b""
    }
    fn path(&self) -> &[u8] {
        b""
    }
    fn method(&self) -> &[u8] {
        b""
    }
    fn each_header<'a>(&'a self, _name: &[u8], _see: &mut dyn FnMut(&'a [u8])) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::route::TextMatch;

    fn connection(peer: Option<&PeerIdentity>) -> Connection<'_> {
        Connection {
            peer,
            direct_remote: "[::ffff:10.0.0.1]:5".parse().unwrap(),
            source: "198.51.100.1:6".parse().unwrap(),
            remote: "192.0.2.1".parse().unwrap(),
            destination: "10.0.0.2:8080".parse().unwrap(),
            server_name: b"sni.example",
            claims: None,
        }
    }

    fn text(text: &str) -> Text {
        Text::new(TextMatch::Exact(text.into()), false)
    }

    fn net(net: &str) -> IpNet {
        net.parse().unwrap()
    }

    #[test]
    fn rules_hold_as_they_say() {
        let peer = PeerIdentity {
            uri_sans: vec!["spiffe://td/ns/a/sa/b".to_owned()],
            ..PeerIdentity::default()
        };
        let known = connection(Some(&peer));
        let unknown = connection(None);
        let name = || Rule::Authenticated(Some(text("spiffe://td/ns/a/sa/b")));
        for (rule, connection, wanted) in [
            (Rule::Any, unknown, true),
            (Rule::And(vec![]), unknown, true),
            (Rule::Or(vec![]), unknown, false),
            (
                Rule::And(vec![Rule::Any, Rule::Not(Box::new(Rule::Any))]),
                unknown,
                false,
            ),
            (
                Rule::Or(vec![Rule::Not(Box::new(Rule::Any)), Rule::Any]),
                unknown,
                true,
            ),
            (name(), known, true),
            (name(), unknown, false),
            (Rule::Authenticated(None), known, true),
            (Rule::Authenticated(None), unknown, false),
            (
                Rule::Authenticated(Some(text("spiffe://td/ns/a/sa/bb"))),
                known,
                false,
            ),
            (Rule::DirectRemoteIp(net("10.0.0.0/8")), unknown, true),
            (Rule::DirectRemoteIp(net("192.0.2.0/24")), unknown, false),
            (Rule::RemoteIp(net("192.0.2.0/24")), unknown, true),
            (Rule::DestinationIp(net("10.0.0.2/32")), unknown, true),
            (Rule::DestinationPort(8080, 8081), unknown, true),
            (Rule::DestinationPort(8081, 9000), unknown, false),
            (Rule::ServerName(text("sni.example")), unknown, true),
            (Rule::Path(text("")), unknown, false),
        ] {
            assert_eq!(rule.holds(&connection, &NoRequest), wanted, "{rule:?}");
        }
    }

    fn policy(name: &str, permission: Rule) -> Policy {
        Policy {
            name: name.to_owned(),
            details: name.to_owned(),
            permissions: vec![permission],
            principals: vec![Rule::Any],
        }
    }

    #[test]
    fn deny_names_its_policy_and_allow_needs_one() {
        let never = || Rule::Not(Box::new(Rule::Any));
        let decide = |action, policies: Vec<Policy>| {
            let policies = Policies { action, policies };
            let decision = policies.decide(&connection(None), &NoRequest);
            decision.map_err(str::to_owned)
        };
        assert_eq!(decide(Action::Allow, vec![]), Err(DENIED_BY_NONE.to_owned()));
        assert_eq!(decide(Action::Deny, vec![]), Ok(()));
        assert_eq!(
            decide(Action::Deny, vec![policy("a", never()), policy("b", Rule::Any)]),
            Err("b".to_owned())
        );
        assert_eq!(
            decide(Action::Allow, vec![policy("a", never()), policy("b", Rule::Any)]),
            Ok(())
        );
        let nobody = Policy {
            principals: vec![],
            ..policy("a", Rule::Any)
        };
        assert_eq!(decide(Action::Log, vec![policy("a", Rule::Any)]), Ok(()));
        assert_eq!(decide(Action::Log, vec![policy("a", never())]), Ok(()));
        assert_eq!(
            decide(Action::Allow, vec![nobody]),
            Err(DENIED_BY_NONE.to_owned())
        );
    }
}
