//! Verification of a mesh peer: its chain must lead to the roots, and one of its names must match one of the rules.
//!
//! The name a server was asked for plays no part: in a mesh one address serves many names, and who serves is said by the SPIFFE id.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme};

use super::proven::{Proven, Usage};
use super::san::{Names, Rule};

/// What a peer's certificate must be.
#[derive(Debug, Clone)]
pub(super) struct Rules {
    /// One of these must match; without rules any name will do.
    pub(super) names: Arc<[Rule]>,
    pub(super) algorithms: WebPkiSupportedAlgorithms,
}

impl Rules {
    fn check(&self, certificate: &CertificateDer<'_>) -> Result<(), Error> {
        if self.names.is_empty() {
            return Ok(());
        }
        let names = Names::of(certificate).map_err(|_| CertificateError::BadEncoding)?;
        if self.names.iter().any(|rule| rule.matches(&names)) {
            Ok(())
        } else {
            Err(CertificateError::ApplicationVerificationFailure.into())
        }
    }
}

/// Verifies servers, without regard to the name they were asked for.
#[derive(Debug)]
pub(super) struct Servers {
    pub(super) roots: Arc<rustls::RootCertStore>,
    pub(super) proven: Arc<Proven>,
    pub(super) rules: Rules,
}

impl ServerCertVerifier for Servers {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.proven.check(Usage::Server, leaf, intermediates, now, || {
            let parsed = ParsedCertificate::try_from(leaf)?;
            let algorithms = self.rules.algorithms.all;
            verify_server_cert_signed_by_trust_anchor(&parsed, &self.roots, intermediates, now, algorithms)
        })?;
        self.rules.check(leaf)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls12_signature(message, certificate, signature, &self.rules.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signature, &self.rules.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.rules.algorithms.supported_schemes()
    }
}

/// Verifies clients: the chain by `chain`, then the names.
#[derive(Debug)]
pub(super) struct Clients {
    pub(super) chain: Arc<dyn ClientCertVerifier>,
    pub(super) proven: Arc<Proven>,
    pub(super) rules: Rules,
}

impl ClientCertVerifier for Clients {
    fn client_auth_mandatory(&self) -> bool {
        self.chain.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.proven.check(Usage::Client, leaf, intermediates, now, || {
            self.chain.verify_client_cert(leaf, intermediates, now).map(drop)
        })?;
        self.rules.check(leaf)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}
