//! What a connection manager does to requests besides routing them.

use std::sync::Arc;

use crate::ext_authz;
use crate::jwt;
use crate::ratelimit::LocalRate;
use crate::rbac;
use crate::route::fault::Fault;
use crate::route::upgrade::Upgrades;
use crate::stats::Scope;

/// Filters and rewriting of one connection manager. The default does nothing.
#[derive(Debug, Default)]
pub struct HttpPolicy {
    /// HTTP filters before the router, in order.
    pub filters: Vec<HttpFilter>,
    /// How paths are brought into one form before anything looks at them.
    pub path: PathPolicy,
    /// What becomes of `x-forwarded-client-cert`.
    pub client_cert: ClientCert,
    /// The protocols offered in the TLS handshake with endpoints, in place of the cluster's
    /// (`envoy.network.application_protocols`).
    pub upstream_protocols: Option<Arc<[Vec<u8>]>>,
    /// Which tunnels are allowed, where the route does not say.
    pub upgrades: Upgrades,
    /// `suppress_envoy_headers` of the router.
    pub suppress_envoy_headers: bool,
}

/// An HTTP filter.
#[derive(Debug)]
pub enum HttpFilter {
    /// `envoy.filters.http.rbac`
    Rbac(rbac::Filter),
    /// `envoy.filters.http.fault`: for requests whose route says nothing, this; and `http.PREFIX.fault.*`.
    Fault(Option<Arc<Fault>>, Arc<Scope>),
    /// `envoy.filters.http.jwt_authn`
    Jwt(Box<jwt::Filter>),
    /// `envoy.filters.http.ext_authz`
    ExtAuthz(Box<ext_authz::Filter>),
    /// `envoy.filters.http.local_ratelimit`: for requests whose route says nothing, this.
    LocalRate(Arc<LocalRate>),
    /// `envoy.filters.http.cors`: what the route says; and `http.PREFIX.cors.*`.
    Cors(Arc<Scope>),
}

/// `normalize_path`, `merge_slashes`, `path_with_escaped_slashes_action`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PathPolicy {
    /// Takes `.` and `..` segments out, decodes what needs no encoding, encodes what does (RFC 3986, 6.2.2).
    pub normalize: bool,
    /// Makes one slash of several.
    pub merge_slashes: bool,
    /// What becomes of `%2F` and `%5C`.
    pub escaped_slashes: EscapedSlashes,
}

/// What becomes of `%2F` and `%5C` in a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EscapedSlashes {
    /// They stay.
    #[default]
    Keep,
    /// The request is refused.
    Reject,
    /// They become slashes and backslashes.
    Unescape,
}

/// What becomes of `x-forwarded-client-cert`. Without a verified client certificate only
/// [`Forwarding::Always`] lets a client's own pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ClientCert {
    /// What becomes of the client's own.
    pub forwarding: Forwarding,
    /// `Subject` is told of the client's certificate.
    pub subject: bool,
    /// `URI` is told.
    pub uri: bool,
    /// `DNS` is told.
    pub dns: bool,
}

/// `forward_client_cert_details`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Forwarding {
    /// Left out.
    #[default]
    Sanitize,
    /// Passed on.
    Forward,
    /// Passed on, with this connection's certificate behind it.
    Append,
    /// Replaced by this connection's certificate.
    Set,
    /// Passed on, with or without certificate.
    Always,
}
