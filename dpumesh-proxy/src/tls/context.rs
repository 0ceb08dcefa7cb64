//! A transport socket of the configuration, and what rustls needs for a handshake with it.
//!
//! A context names its secrets; the rustls configuration is made from them when a handshake needs it and kept as long as the secrets are the
//! same. A client context has one for each certificate that connections through it show, since the certificate goes with the
//! pod that sends.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, SupportedKxGroup, aws_lc_rs};
use rustls::pki_types::ServerName;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::sign::SingleCertAndKey;
use rustls::{
    CertificateError, ClientConfig, Error, ServerConfig, SupportedCipherSuite, SupportedProtocolVersion,
};
use tokio::net::TcpStream;
use tokio_rustls::{LazyConfigAcceptor, TlsConnector, TlsStream};

use super::proven::Usage;
use super::san::Rule;
use super::secrets::{Certified, Roots, Secrets};
use super::verify::{Clients, Rules, Servers};
use super::{Agreed, Connection};
use crate::stats::{Scope, Shard, Ssl};

/// A secret by its name, or here.
#[derive(Debug)]
pub enum Secret<T> {
    /// To be asked for.
    Named(Arc<str>),
    /// In the configuration itself.
    Inline(Arc<T>),
}

impl<T> Secret<T> {
    /// Its name, where it has to be asked for.
    pub fn name(&self) -> Option<Arc<str>> {
        match self {
            Self::Named(name) => Some(Arc::clone(name)),
            Self::Inline(_) => None,
        }
    }
}

/// Application protocols in order of preference (ALPN).
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Protocols(pub Arc<[Vec<u8>]>);

impl Protocols {
    /// From a list with commas.
    pub fn from_list(list: &str) -> Self {
        let each = list.split(',').map(str::trim).filter(|p| !p.is_empty());
        Self(each.map(|p| p.as_bytes().to_vec()).collect())
    }
}

/// What both ends have.
#[derive(Debug, Clone)]
pub struct Parameters {
    /// Protocol versions, of 1.2 and 1.3.
    pub versions: Vec<&'static SupportedProtocolVersion>,
    /// Cipher suites of TLS 1.2; empty for all that rustls has.
    pub suites: Vec<SupportedCipherSuite>,
    /// Key exchange groups; empty for all that rustls has.
    pub groups: Vec<&'static dyn SupportedKxGroup>,
    /// Offered or accepted application protocols.
    pub protocols: Protocols,
    /// Rules on the peer's names; without rules any name.
    pub names: Arc<[Rule]>,
}

impl Parameters {
    /// AES-128 before AES-256, as Envoy has it: SHA-384, which comes with the latter, is a tenth of a handshake's cost.
    fn provider(&self) -> Arc<CryptoProvider> {
        let mut provider = aws_lc_rs::default_provider();
        provider.cipher_suites.sort_by_key(|suite| !uses_aes_128(suite));
        if !self.suites.is_empty() {
            provider
                .cipher_suites
                .retain(|suite| suite.tls13().is_some() || self.suites.contains(suite));
        }
        if !self.groups.is_empty() {
            provider.kx_groups = self.groups.clone();
        }
        Arc::new(provider)
    }

    fn rules(&self, provider: &CryptoProvider) -> Rules {
        Rules {
            names: Arc::clone(&self.names),
            algorithms: provider.signature_verification_algorithms,
        }
    }
}

fn uses_aes_128(suite: &SupportedCipherSuite) -> bool {
    use rustls::CipherSuite::*;
    matches!(
        suite.suite(),
        TLS13_AES_128_GCM_SHA256
            | TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256
            | TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256
    )
}

/// Why there was no handshake, or why it failed.
#[derive(Debug)]
pub enum HandshakeError {
    /// A secret is not there (yet).
    Missing(Arc<str>),
    /// A secret or a parameter cannot be used.
    Unusable(Error),
    /// The peer, or the way to it.
    Failed(io::Error),
    /// It took too long.
    TimedOut,
}

impl fmt::Display for HandshakeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing(name) => write!(f, "secret {name:?} is not there"),
            Self::Unusable(error) => write!(f, "TLS cannot be set up: {error}"),
            Self::Failed(error) => write!(f, "TLS handshake: {error}"),
            Self::TimedOut => f.write_str("TLS handshake: timed out"),
        }
    }
}

impl HandshakeError {
    /// As an error of the connection.
    pub fn into_io(self) -> io::Error {
        match self {
            Self::Failed(error) => error,
            Self::TimedOut => io::ErrorKind::TimedOut.into(),
            other => io::Error::other(other.to_string()),
        }
    }

    /// Counts it under Envoy's names.
    pub fn count(&self, stats: &Scope, shard: Shard) {
        let failed = match self {
            Self::Missing(_) => {
                stats.inc(shard, Ssl::ContextNotReady);
                return;
            }
            Self::Failed(error) => error.get_ref().and_then(|e| e.downcast_ref::<Error>()),
            Self::Unusable(_) | Self::TimedOut => None,
        };
        match failed {
            Some(Error::NoCertificatesPresented) => stats.inc(shard, Ssl::FailVerifyNoCert),
            Some(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)) => {
                stats.inc(shard, Ssl::FailVerifySan);
            }
            Some(Error::InvalidCertificate(_)) => stats.inc(shard, Ssl::FailVerifyError),
            _ => {}
        }
        stats.inc(shard, Ssl::ConnectionError);
    }
}

fn find<T>(secret: &Secret<T>, look_up: impl Fn(&str) -> Option<Arc<T>>) -> Result<Arc<T>, HandshakeError> {
    match secret {
        Secret::Inline(here) => Ok(Arc::clone(here)),
        Secret::Named(name) => look_up(name).ok_or_else(|| HandshakeError::Missing(Arc::clone(name))),
    }
}

/// `DownstreamTlsContext`: TLS that clients begin.
#[derive(Debug)]
pub struct ServerContext {
    /// Key and chain to show.
    pub certificate: Secret<Certified>,
    /// Roots that clients' certificates must lead to; `None` asks for no certificate.
    pub roots: Option<Secret<Roots>>,
    /// Whether a client without certificate is refused.
    pub require_certificate: bool,
    /// Versions, suites, protocols, names.
    pub parameters: Parameters,
    /// Bound on the handshake.
    pub timeout: Option<Duration>,
    /// `listener.NAME.ssl.*`
    pub stats: Arc<Scope>,
    made: Mutex<Option<Arc<Server>>>,
}

/// A server's rustls configuration and the secrets it was made of.
#[derive(Debug)]
struct Server {
    certificate: Arc<Certified>,
    roots: Option<Arc<Roots>>,
    config: Arc<ServerConfig>,
    /// For clients that offer none of our application protocols: they are served without any, as Envoy does.
    without_protocols: Arc<ServerConfig>,
}

impl ServerContext {
    /// A context.
    pub fn new(
        certificate: Secret<Certified>,
        roots: Option<Secret<Roots>>,
        require_certificate: bool,
        parameters: Parameters,
        timeout: Option<Duration>,
        stats: Arc<Scope>,
    ) -> Self {
        Self {
            certificate,
            roots,
            require_certificate,
            parameters,
            timeout,
            stats,
            made: Mutex::default(),
        }
    }

    /// Accepts TLS on `socket`; what is known of the connection is added to `known`.
    ///
    /// # Errors
    /// As [`HandshakeError`] says; the socket is closed.
    pub async fn accept(
        &self,
        secrets: &dyn Secrets,
        socket: TcpStream,
        known: &mut Connection,
    ) -> Result<Box<TlsStream<TcpStream>>, HandshakeError> {
        let handshake = self.handshake(secrets, socket);
        let (stream, server) = match self.timeout {
            Some(most) => tokio::time::timeout(most, handshake)
                .await
                .map_err(|_| HandshakeError::TimedOut)??,
            None => handshake.await?,
        };
        let session = stream.get_ref().1;
        known.tls = true;
        known.agreed = agreed(session);
        known.local = Some(Arc::clone(&server.certificate.identity));
        known.server_name = session.server_name().map(Arc::from);
        known.alpn = session
            .alpn_protocol()
            .map(|p| Arc::from(String::from_utf8_lossy(p)));
        let proven = server.roots.as_ref().map(|roots| &roots.proven);
        known.peer = proven
            .zip(session.peer_certificates())
            .and_then(|(proven, chain)| proven.peer(Usage::Client, chain));
        Ok(Box::new(TlsStream::Server(stream)))
    }

    async fn handshake(
        &self,
        secrets: &dyn Secrets,
        socket: TcpStream,
    ) -> Result<(tokio_rustls::server::TlsStream<TcpStream>, Arc<Server>), HandshakeError> {
        let server = self.server(secrets)?;
        let start = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), socket)
            .await
            .map_err(HandshakeError::Failed)?;
        let offered = start.client_hello().alpn();
        let ours = &server.config.alpn_protocols;
        let common = offered.is_none_or(|mut offered| offered.any(|o| ours.iter().any(|p| p == o)));
        let config = if common {
            &server.config
        } else {
            &server.without_protocols
        };
        let stream = start
            .into_stream(Arc::clone(config))
            .await
            .map_err(HandshakeError::Failed)?;
        Ok((stream, server))
    }

    fn server(&self, secrets: &dyn Secrets) -> Result<Arc<Server>, HandshakeError> {
        let certificate = find(&self.certificate, |name| secrets.certificate(name))?;
        let roots = self
            .roots
            .as_ref()
            .map(|roots| find(roots, |name| secrets.roots(name)))
            .transpose()?;
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(made) = &*made
            && Arc::ptr_eq(&made.certificate, &certificate)
            && same(made.roots.as_ref(), roots.as_ref())
        {
            return Ok(Arc::clone(made));
        }
        let config = self
            .config(&certificate, roots.as_deref())
            .map_err(HandshakeError::Unusable)?;
        let mut without_protocols = config.clone();
        without_protocols.alpn_protocols.clear();
        let server = Arc::new(Server {
            certificate,
            roots,
            config: Arc::new(config),
            without_protocols: Arc::new(without_protocols),
        });
        *made = Some(Arc::clone(&server));
        Ok(server)
    }

    fn config(&self, certificate: &Certified, roots: Option<&Roots>) -> Result<ServerConfig, Error> {
        let provider = self.parameters.provider();
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&self.parameters.versions)?;
        let builder = match roots {
            None => builder.with_no_client_auth(),
            Some(roots) => {
                let chain = WebPkiClientVerifier::builder_with_provider(
                    Arc::clone(&roots.store),
                    Arc::clone(&provider),
                );
                let chain = if self.require_certificate {
                    chain
                } else {
                    chain.allow_unauthenticated()
                };
                let chain = chain.build().map_err(|e| Error::General(e.to_string()))?;
                let rules = self.parameters.rules(&provider);
                let proven = Arc::clone(&roots.proven);
                builder.with_client_cert_verifier(Arc::new(Clients { chain, proven, rules }))
            }
        };
        let key = SingleCertAndKey::from(Arc::clone(&certificate.key));
        let mut config = builder.with_cert_resolver(Arc::new(key));
        config.alpn_protocols = self.parameters.protocols.0.to_vec();
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        // As Envoy without `prefer_client_ciphers`.
        config.ignore_client_order = true;
        Ok(config)
    }
}

fn same<T>(a: Option<&Arc<T>>, b: Option<&Arc<T>>) -> bool {
    match (a, b) {
        (None, None) => true,
        (Some(a), Some(b)) => Arc::ptr_eq(a, b),
        _ => false,
    }
}

/// What a handshake has agreed on.
fn agreed(session: &rustls::ServerConnection) -> Agreed {
    use rustls::{CipherSuite, NamedGroup, ProtocolVersion};
    Agreed {
        version: match session.protocol_version() {
            Some(ProtocolVersion::TLSv1_3) => "TLSv1.3",
            Some(ProtocolVersion::TLSv1_2) => "TLSv1.2",
            _ => "",
        },
        cipher: match session.negotiated_cipher_suite().map(|suite| suite.suite()) {
            Some(CipherSuite::TLS13_AES_128_GCM_SHA256) => "TLS_AES_128_GCM_SHA256",
            Some(CipherSuite::TLS13_AES_256_GCM_SHA384) => "TLS_AES_256_GCM_SHA384",
            Some(CipherSuite::TLS13_CHACHA20_POLY1305_SHA256) => "TLS_CHACHA20_POLY1305_SHA256",
            Some(CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256) => "ECDHE-ECDSA-AES128-GCM-SHA256",
            Some(CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384) => "ECDHE-ECDSA-AES256-GCM-SHA384",
            Some(CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256) => {
                "ECDHE-ECDSA-CHACHA20-POLY1305"
            }
            Some(CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256) => "ECDHE-RSA-AES128-GCM-SHA256",
            Some(CipherSuite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384) => "ECDHE-RSA-AES256-GCM-SHA384",
            Some(CipherSuite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256) => "ECDHE-RSA-CHACHA20-POLY1305",
            _ => "",
        },
        group: match session.negotiated_key_exchange_group().map(|group| group.name()) {
            Some(NamedGroup::X25519) => "X25519",
            Some(NamedGroup::secp256r1) => "P-256",
            Some(NamedGroup::secp384r1) => "P-384",
            Some(NamedGroup::X25519MLKEM768) => "X25519MLKEM768",
            _ => "",
        },
        took: None,
    }
}

/// Which certificate a client shows.
#[derive(Debug)]
pub enum Shown {
    /// None.
    Nothing,
    /// Always this one.
    Fixed(Secret<Certified>),
    /// That of the connection's pod ([`Connection::certificate`]), or else of this name.
    OfConnection {
        /// For connections without a pod; no key store has it.
        default: Arc<str>,
    },
}

/// `UpstreamTlsContext`: TLS that the proxy begins.
#[derive(Debug)]
pub struct ClientContext {
    /// Of the message it was made from: equal hash, same context.
    pub fingerprint: u64,
    /// Which certificate it shows.
    pub shown: Shown,
    /// Roots that servers' certificates must lead to.
    pub roots: Secret<Roots>,
    /// The name asked for (SNI).
    pub server_name: Option<ServerName<'static>>,
    /// Whether the server's certificate must be for that name, beside the rules on names (`auto_sni_san_validation`).
    pub verify_name: bool,
    /// Versions, suites, protocols, names.
    pub parameters: Parameters,
    /// `cluster.NAME.ssl.*`
    pub stats: Arc<Scope>,
    made: Mutex<HashMap<Offer, Client>>,
}

/// Whose certificate is shown, and which protocols are offered instead of the context's own.
type Offer = (Arc<str>, Option<Protocols>);

/// A client's rustls configuration and the secrets it was made of.
#[derive(Debug)]
struct Client {
    certificate: Option<Arc<Certified>>,
    roots: Arc<Roots>,
    config: Arc<ClientConfig>,
}

impl ClientContext {
    /// A context.
    pub fn new(
        fingerprint: u64,
        shown: Shown,
        roots: Secret<Roots>,
        server_name: Option<ServerName<'static>>,
        verify_name: bool,
        parameters: Parameters,
        stats: Arc<Scope>,
    ) -> Self {
        Self {
            fingerprint,
            shown,
            roots,
            server_name,
            verify_name,
            parameters,
            stats,
            made: Mutex::default(),
        }
    }

    /// Whether connections differ by the pod that they are made for.
    pub fn by_pod(&self) -> bool {
        matches!(self.shown, Shown::OfConnection { .. })
    }

    /// What it offers by itself.
    pub fn protocols(&self) -> &Protocols {
        &self.parameters.protocols
    }

    /// Begins TLS on `socket` for `connection`, offering `protocols` instead of the context's own where given.
    ///
    /// # Errors
    /// As [`HandshakeError`] says; the socket is closed.
    pub async fn connect(
        &self,
        secrets: &dyn Secrets,
        connection: &Connection,
        protocols: Option<&Protocols>,
        socket: TcpStream,
    ) -> Result<Box<TlsStream<TcpStream>>, HandshakeError> {
        let config = self.client(secrets, connection, protocols)?;
        let name = match &self.server_name {
            Some(name) => name.clone(),
            // An address is not sent as SNI.
            None => ServerName::from(socket.peer_addr().map_err(HandshakeError::Failed)?.ip()),
        };
        let stream = TlsConnector::from(config)
            .connect(name, socket)
            .await
            .map_err(HandshakeError::Failed)?;
        Ok(Box::new(TlsStream::Client(stream)))
    }

    fn client(
        &self,
        secrets: &dyn Secrets,
        connection: &Connection,
        protocols: Option<&Protocols>,
    ) -> Result<Arc<ClientConfig>, HandshakeError> {
        let certificate = match &self.shown {
            Shown::Nothing => None,
            Shown::Fixed(secret) => Some(find(secret, |name| secrets.certificate(name))?),
            Shown::OfConnection { default } => {
                let name = connection.certificate.as_ref().unwrap_or(default);
                let found = secrets.certificate(name);
                Some(found.ok_or_else(|| HandshakeError::Missing(Arc::clone(name)))?)
            }
        };
        let roots = find(&self.roots, |name| secrets.roots(name))?;
        let name = match (&self.shown, &connection.certificate) {
            (Shown::OfConnection { .. }, Some(name)) => Arc::clone(name),
            _ => Arc::from(""),
        };
        let key = (name, protocols.cloned());
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(made) = made.get(&key)
            && same(made.certificate.as_ref(), certificate.as_ref())
            && Arc::ptr_eq(&made.roots, &roots)
        {
            return Ok(Arc::clone(&made.config));
        }
        let config = self
            .config(certificate.as_deref(), &roots, protocols)
            .map_err(HandshakeError::Unusable)?;
        let config = Arc::new(config);
        let client = Client {
            certificate,
            roots,
            config: Arc::clone(&config),
        };
        made.insert(key, client);
        Ok(config)
    }

    fn config(
        &self,
        certificate: Option<&Certified>,
        roots: &Roots,
        protocols: Option<&Protocols>,
    ) -> Result<ClientConfig, Error> {
        let provider = self.parameters.provider();
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&self.parameters.versions)?;
        let builder = if self.verify_name {
            let by_name = WebPkiServerVerifier::builder_with_provider(Arc::clone(&roots.store), provider)
                .build()
                .map_err(|e| Error::General(e.to_string()))?;
            builder.with_webpki_verifier(by_name)
        } else {
            let verifier = Servers {
                roots: Arc::clone(&roots.store),
                proven: Arc::clone(&roots.proven),
                rules: self.parameters.rules(&provider),
            };
            builder
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(verifier))
        };
        let mut config = match certificate {
            None => builder.with_no_client_auth(),
            Some(certificate) => {
                let key = SingleCertAndKey::from(Arc::clone(&certificate.key));
                builder.with_client_cert_resolver(Arc::new(key))
            }
        };
        config.alpn_protocols = protocols.unwrap_or(&self.parameters.protocols).0.to_vec();
        config.resumption = Resumption::disabled();
        config.enable_sni = self.server_name.is_some();
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use rustls::CipherSuite;

    use super::*;

    #[test]
    fn aes_128_comes_before_aes_256_in_both_versions() {
        let parameters = Parameters {
            versions: Vec::new(),
            suites: Vec::new(),
            groups: Vec::new(),
            protocols: Protocols::default(),
            names: Arc::default(),
        };
        let suites = parameters.provider().cipher_suites.clone();
        let place = |wanted| suites.iter().position(|s| s.suite() == wanted).unwrap();
        use CipherSuite::*;
        assert_eq!(place(TLS13_AES_128_GCM_SHA256), 0);
        assert!(
            place(TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256) < place(TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384)
        );
    }
}
