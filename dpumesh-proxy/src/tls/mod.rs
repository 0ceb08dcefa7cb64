//! TLS of the mesh: who is at the other end of a connection, and whom this end speaks for.
//!
//! | module | what it owns |
//! |---|---|
//! | [`context`] | a transport socket of the configuration, and handshakes with it |
//! | `proven` | chains that were verified before |
//! | [`san`] | rules on subject alternative names |
//! | [`secrets`] | keys, chains and roots by name |
//! | [`store`] | the same from this machine's key store |
//! | [`stream`] | one type for plain and TLS connections; a plain one costs nothing more than its socket |
//!
//! Identities are SPIFFE: a URI subject alternative name of the certificate. Host names are not looked at unless the configuration asks.

pub mod context;
pub(crate) mod leaf;
mod proven;
pub mod san;
pub mod secrets;
pub mod store;
pub mod stream;
mod verify;

use std::sync::Arc;
use std::time::Duration;

pub use context::{ClientContext, HandshakeError, Protocols, ServerContext};
pub use secrets::{Certified, Held, Listed, Roots, Secrets};
pub use stream::Stream;

/// The first URI in the certificate that an endpoint has proved itself with.
pub(crate) fn principal(stream: &Stream) -> Option<Arc<str>> {
    let Stream::Tls(tls) = stream else {
        return None;
    };
    let certificate = tls.get_ref().1.peer_certificates()?.first()?;
    let names = san::Names::of(certificate).ok()?;
    names.uri.first().map(|uri| Arc::from(uri.as_str()))
}

/// What a verified certificate says of the peer. Exists only after the handshake proved it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PeerIdentity {
    /// URI subject alternative names, in the certificate's order; `spiffe://…` in a mesh.
    pub uri_sans: Vec<String>,
    /// DNS subject alternative names.
    pub dns_sans: Vec<String>,
    /// Mail addresses among them.
    pub email_sans: Vec<String>,
    /// IP addresses among them, as text.
    pub ip_sans: Vec<String>,
    /// The subject's distinguished name (RFC 2253); empty in a mesh.
    pub subject: String,
    /// SHA-256 of the certificate's DER: `Hash` of `x-forwarded-client-cert`.
    pub sha256: [u8; 32],
    /// The certificate, DER.
    pub certificate: Vec<u8>,
}

/// Whom this end speaks for: the certificate it showed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LocalIdentity {
    /// URI subject alternative names of our certificate: `By` of `x-forwarded-client-cert`.
    pub uri_sans: Vec<String>,
    /// DNS subject alternative names.
    pub dns_sans: Vec<String>,
    /// Mail addresses among them.
    pub email_sans: Vec<String>,
    /// IP addresses among them, as text.
    pub ip_sans: Vec<String>,
    /// The subject's distinguished name (RFC 2253).
    pub subject: String,
}

/// What was agreed on in a handshake, in OpenSSL's words. The default is that of plain TCP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Agreed {
    /// `TLSv1.2` or `TLSv1.3`.
    pub version: &'static str,
    /// `TLS_AES_256_GCM_SHA384`, `ECDHE-ECDSA-AES128-GCM-SHA256`, …
    pub cipher: &'static str,
    /// `X25519`, `P-256`, …
    pub group: &'static str,
    /// From the connection's begin to the handshake's end.
    pub took: Option<Duration>,
}

/// What is known of a client connection beyond its addresses. The default is that of plain TCP.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Connection {
    /// Whether TLS was terminated here.
    pub tls: bool,
    /// What was agreed on then.
    pub agreed: Agreed,
    /// The verified peer; `None` on a plain connection and where the peer showed no certificate.
    pub peer: Option<Arc<PeerIdentity>>,
    /// Whom we answered as; `None` on a plain connection.
    pub local: Option<Arc<LocalIdentity>>,
    /// The server name the client asked for (SNI), of TLS terminated here or passed through.
    pub server_name: Option<Arc<str>>,
    /// The application protocol agreed on (ALPN).
    pub alpn: Option<Arc<str>>,
    /// Name of the certificate that upstream TLS shows: the SPIFFE id of the pod that sends (set by the chain's `set_filter_state`).
    pub certificate: Option<Arc<str>>,
}
