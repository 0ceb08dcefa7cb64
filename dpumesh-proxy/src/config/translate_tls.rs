//! Transport sockets and secrets into [`crate::tls`].
//!
//! A secret is inline, static (`static_resources.secrets`, by name without `sds_config`) or by SDS. Whatever SDS source the configuration
//! names, the proxy asks its own key store for the name: data-plane keys are on this machine already.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use rustls::crypto::SupportedKxGroup;
use rustls::crypto::aws_lc_rs::{cipher_suite, kx_group};
use rustls::pki_types::ServerName;
use rustls::{SupportedCipherSuite, SupportedProtocolVersion};

use super::schema::At;
use super::secret_files;
use super::translate::{Context, Result, fingerprint};
use super::translate_route;
use crate::stats;
use crate::tls::context::{Parameters, Secret, Shown};
use crate::tls::san::{Kind, Pattern, Rule, Text};
use crate::tls::{Certified, ClientContext, Protocols, Roots, ServerContext};

const RAW: &str = "envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer";
const DOWNSTREAM: &str = "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext";
const UPSTREAM: &str = "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext";
const ON_DEMAND: &str = "envoy.extensions.transport_sockets.tls.cert_selectors.on_demand_secret.v3.Config";
const BY_FILTER_STATE: &str =
    "envoy.extensions.transport_sockets.tls.cert_mappers.filter_state_override.v3.Config";

/// Secrets of the bootstrap, by name.
#[derive(Debug, Default)]
pub(super) struct StaticSecrets {
    certificates: HashMap<String, Arc<Certified>>,
    roots: HashMap<String, Arc<Roots>>,
}

impl StaticSecrets {
    /// Reads `static_resources.secrets`.
    pub(super) fn read(fixed: Option<&At>) -> Result<Self> {
        let mut secrets = Self::default();
        for secret in fixed.iter().flat_map(|f| f.messages("secrets")) {
            match content(&secret)? {
                (name, Content::Certified(certified)) => {
                    drop(secrets.certificates.insert(name, Arc::new(certified)));
                }
                (name, Content::Roots(roots)) => drop(secrets.roots.insert(name, Arc::new(roots))),
            }
        }
        Ok(secrets)
    }
}

/// What a secret holds.
pub(super) enum Content {
    Certified(Certified),
    Roots(Roots),
}

/// The name and content of a `Secret`.
pub(super) fn content(secret: &At) -> Result<(String, Content)> {
    let name = secret.required_text("name")?;
    if let Some(certificate) = secret.message("tls_certificate") {
        return Ok((name, Content::Certified(certified(&certificate)?)));
    }
    let Some(validation) = secret.message("validation_context") else {
        return Err(secret.refuse("", "tls_certificate or validation_context must be given"));
    };
    only_roots(&validation)?;
    match validation.message("trusted_ca") {
        Some(pem) => Ok((name, Content::Roots(roots(&pem)?))),
        None => Err(validation.refuse("trusted_ca", "must be given")),
    }
}

/// A secret may bring roots; rules on names belong to the transport socket.
fn only_roots(validation: &At) -> Result<()> {
    for field in ["match_typed_subject_alt_names", "match_subject_alt_names"] {
        if validation.has(field) {
            return Err(validation.refuse(field, "is not supported in a secret yet"));
        }
    }
    Ok(())
}

fn certified(at: &At) -> Result<Certified> {
    let part = |field: &str| match at.message(field) {
        Some(source) => translate_route::data_source(&source),
        None => Err(at.refuse(field, "must be given")),
    };
    Certified::from_pem(&part("certificate_chain")?, &part("private_key")?)
        .map_err(|e| at.refuse("", e.to_string()))
}

fn roots(source: &At) -> Result<Roots> {
    Roots::from_pem(&translate_route::data_source(source)?).map_err(|e| source.refuse("", e.to_string()))
}

impl Context<'_> {
    /// `FilterChain.transport_socket`; `None` for plain TCP. `http2`: the chain speaks it, or passes it through.
    pub(super) fn server_context(
        &self,
        chain: &At,
        scope: &str,
        http2: bool,
    ) -> Result<Option<Arc<ServerContext>>> {
        let Some(socket) = chain.message("transport_socket") else {
            return Ok(None);
        };
        let Some(at) = socket_config(&socket)? else {
            return Ok(None);
        };
        if at.type_name() != DOWNSTREAM {
            return Err(at.refuse(
                "",
                format!("{} is not supported for filter chains yet", at.type_name()),
            ));
        }
        for field in ["require_sni", "full_scan_certs_on_sni_mismatch"] {
            if at.flag(field) == Some(true) {
                return Err(at.refuse(field, "true is not supported yet"));
            }
        }
        let Some(common) = at.message("common_tls_context") else {
            return Err(at.refuse("common_tls_context", "must be given"));
        };
        if common.has("custom_tls_certificate_selector") {
            return Err(common.refuse(
                "custom_tls_certificate_selector",
                "is not supported for filter chains yet",
            ));
        }
        let Some(certificate) = self.certificate(&common)? else {
            return Err(common.refuse("tls_certificates", "a certificate must be given"));
        };
        let (roots, names) = self.validation(&common)?;
        let require = at.flag("require_client_certificate").unwrap_or(false);
        if require && roots.is_none() {
            return Err(common.refuse(
                "validation_context",
                "trusted roots must be given where a client certificate is required",
            ));
        }
        let mut parameters = parameters(&common, names)?;
        if !http2 {
            // What is not spoken is not agreed on.
            let kept = parameters.protocols.0.iter().filter(|p| **p != b"h2").cloned();
            parameters.protocols = Protocols(kept.collect());
        }
        let timeout = chain
            .duration("transport_socket_connect_timeout")?
            .filter(|t| !t.is_zero());
        Ok(Some(Arc::new(ServerContext::new(
            certificate,
            roots,
            require,
            parameters,
            Some(timeout.unwrap_or(LONGEST_HANDSHAKE)),
            self.registry.scope(&format!("{scope}.ssl"), stats::Ssl::TABLE),
        ))))
    }

    /// A `TransportSocket` of a cluster; `None` for plain TCP.
    pub(super) fn client_context(&self, socket: &At, scope: &str) -> Result<Option<Arc<ClientContext>>> {
        let Some(at) = socket_config(socket)? else {
            return Ok(None);
        };
        if at.type_name() != UPSTREAM {
            return Err(at.refuse(
                "",
                format!("{} is not supported for clusters yet", at.type_name()),
            ));
        }
        if at.flag("auto_host_sni") == Some(true) {
            return Err(at.refuse("auto_host_sni", "true is not supported yet"));
        }
        let Some(common) = at.message("common_tls_context") else {
            return Err(at.refuse("common_tls_context", "must be given"));
        };
        let shown = match common.message("custom_tls_certificate_selector") {
            Some(selector) => on_demand(&selector)?,
            None => match self.certificate(&common)? {
                Some(secret) => Shown::Fixed(secret),
                None => Shown::Nothing,
            },
        };
        let (roots, names) = self.validation(&common)?;
        let Some(roots) = roots else {
            return Err(common.refuse(
                "validation_context",
                "trusted roots must be given: a server that is not verified is not connected to",
            ));
        };
        let sni = at.text("sni");
        let server_name = if sni.is_empty() {
            None
        } else {
            let name = ServerName::try_from(sni).map_err(|_| at.refuse("sni", "must be a host name"))?;
            Some(name)
        };
        let verify_name = at.flag("auto_sni_san_validation").unwrap_or(false);
        if verify_name && (server_name.is_none() || !names.is_empty()) {
            return Err(at.refuse(
                "auto_sni_san_validation",
                "goes with sni and without match_typed_subject_alt_names",
            ));
        }
        Ok(Some(Arc::new(ClientContext::new(
            fingerprint(&at),
            shown,
            roots,
            server_name,
            verify_name,
            parameters(&common, names)?,
            self.registry.scope(&format!("{scope}.ssl"), stats::Ssl::TABLE),
        ))))
    }

    fn certificate(&self, common: &At) -> Result<Option<Secret<Certified>>> {
        let inline = common.messages("tls_certificates");
        let named = common.messages("tls_certificate_sds_secret_configs");
        if inline.len() + named.len() > 1 {
            return Err(common.refuse(
                "tls_certificate_sds_secret_configs",
                "only one certificate is supported yet",
            ));
        }
        if let Some(inline) = inline.first() {
            return Ok(Some(Secret::Inline(Arc::new(certified(inline)?))));
        }
        let Some(named) = named.first() else {
            return Ok(None);
        };
        self.named(named, &self.secrets.certificates).map(Some)
    }

    fn named<T>(&self, at: &At, fixed: &HashMap<String, Arc<T>>) -> Result<Secret<T>> {
        let name = at.required_text("name")?;
        if name.starts_with(secret_files::PREFIX) || name.contains('|') {
            return Err(at.refuse(
                "name",
                format!("must not begin with {:?} or contain '|'", secret_files::PREFIX),
            ));
        }
        if let Some(source) = at.message("sds_config") {
            let file = source.message("path_config_source");
            let file = file.map(|file| file.required_text("path")).transpose()?;
            return Ok(Secret::Named(match file {
                Some(file) => secret_files::name(&file, &name),
                None => name.into(),
            }));
        }
        match fixed.get(&name) {
            Some(secret) => Ok(Secret::Inline(Arc::clone(secret))),
            None => Err(at.refuse(
                "name",
                format!("static_resources.secrets has no such secret {name:?}"),
            )),
        }
    }

    /// Roots and rules on names.
    fn validation(&self, common: &At) -> Result<Validation> {
        let mut named = common.message("validation_context_sds_secret_config");
        let mut context = common.message("validation_context");
        if let Some(combined) = common.message("combined_validation_context") {
            named = combined.message("validation_context_sds_secret_config");
            context = combined.message("default_validation_context");
        }
        let mut found = None;
        let mut rules = Vec::new();
        if let Some(context) = context {
            if context.choice("trust_chain_verification") != "VERIFY_TRUST_CHAIN" {
                return Err(context.refuse("trust_chain_verification", "must be VERIFY_TRUST_CHAIN"));
            }
            if let Some(pem) = context.message("trusted_ca") {
                found = Some(Secret::Inline(Arc::new(roots(&pem)?)));
            }
            for typed in context.messages("match_typed_subject_alt_names") {
                let kind = match typed.choice("san_type").as_str() {
                    "URI" => Kind::Uri,
                    "DNS" => Kind::Dns,
                    "EMAIL" => Kind::Email,
                    "IP_ADDRESS" => Kind::Ip,
                    other => return Err(typed.refuse("san_type", format!("{other} is not supported yet"))),
                };
                let Some(matcher) = typed.message("matcher") else {
                    return Err(typed.refuse("matcher", "must be given"));
                };
                let text = text(&matcher)?;
                rules.push(Rule { kind, text });
            }
            for matcher in context.messages("match_subject_alt_names") {
                let text = text(&matcher)?;
                rules.push(Rule {
                    kind: Kind::Any,
                    text,
                });
            }
        }
        if let Some(named) = named {
            found = Some(self.named(&named, &self.secrets.roots)?);
        }
        if found.is_none() && !rules.is_empty() {
            return Err(common.refuse(
                "validation_context",
                "names are verified only under trusted roots",
            ));
        }
        Ok((found, rules.into()))
    }
}

/// Roots, and rules on names.
type Validation = (Option<Secret<Roots>>, Arc<[Rule]>);

/// A handshake that takes longer is given up, where the configuration sets no bound.
const LONGEST_HANDSHAKE: Duration = Duration::from_secs(15);

/// The configuration of a transport socket; `None` for plain TCP.
fn socket_config(socket: &At) -> Result<Option<At>> {
    match socket.any("typed_config")? {
        Some(config) if config.type_name() == RAW => Ok(None),
        None if socket.text("name") == "envoy.transport_sockets.raw_buffer" => Ok(None),
        None => Err(socket.refuse("typed_config", "must be given")),
        config => Ok(config),
    }
}

fn on_demand(selector: &At) -> Result<Shown> {
    let Some(config) = selector
        .any("typed_config")?
        .filter(|c| c.type_name() == ON_DEMAND)
    else {
        return Err(selector.refuse("typed_config", format!("only {ON_DEMAND} is supported yet")));
    };
    let mapper = config
        .message("certificate_mapper")
        .map(|m| m.any("typed_config"))
        .transpose()?
        .flatten();
    let Some(mapper) = mapper.filter(|m| m.type_name() == BY_FILTER_STATE) else {
        return Err(config.refuse(
            "certificate_mapper",
            format!("only {BY_FILTER_STATE} is supported yet"),
        ));
    };
    let default = mapper.required_text("default_value")?.into();
    Ok(Shown::OfConnection { default })
}

fn parameters(common: &At, names: Arc<[Rule]>) -> Result<Parameters> {
    let params = common.message("tls_params");
    let protocols = common.texts("alpn_protocols");
    let protocols = Protocols(protocols.iter().map(|p| p.as_bytes().to_vec()).collect());
    let mut parameters = Parameters {
        versions: vec![&rustls::version::TLS12, &rustls::version::TLS13],
        suites: Vec::new(),
        groups: Vec::new(),
        protocols,
        names,
    };
    let Some(params) = params else {
        return Ok(parameters);
    };
    parameters.versions = versions(&params)?;
    parameters.suites = suites(&params, &parameters.versions)?;
    parameters.groups = groups(&params)?;
    Ok(parameters)
}

fn versions(params: &At) -> Result<Vec<&'static SupportedProtocolVersion>> {
    let minimum = match params.choice("tls_minimum_protocol_version").as_str() {
        "TLS_AUTO" | "TLSv1_2" => 2,
        "TLSv1_3" => 3,
        other => {
            return Err(params.refuse(
                "tls_minimum_protocol_version",
                format!("{other}: versions before TLS 1.2 are not spoken"),
            ));
        }
    };
    let maximum = match params.choice("tls_maximum_protocol_version").as_str() {
        "TLS_AUTO" | "TLSv1_3" => 3,
        "TLSv1_2" => 2,
        other => {
            return Err(params.refuse(
                "tls_maximum_protocol_version",
                format!("{other}: versions before TLS 1.2 are not spoken"),
            ));
        }
    };
    if minimum > maximum {
        return Err(params.refuse("tls_minimum_protocol_version", "is above the maximum"));
    }
    let all: [(i32, &'static SupportedProtocolVersion); 2] =
        [(2, &rustls::version::TLS12), (3, &rustls::version::TLS13)];
    let within = all.into_iter().filter(|(v, _)| (minimum..=maximum).contains(v));
    Ok(within.map(|(_, version)| version).collect())
}

/// The suites of TLS 1.2 by their names. Those without forward secrecy are never offered; one must be left.
fn suites(params: &At, versions: &[&'static SupportedProtocolVersion]) -> Result<Vec<SupportedCipherSuite>> {
    let mut suites = Vec::new();
    let wanted = params.texts("cipher_suites");
    for name in &wanted {
        // Suites in brackets are equal in preference; the order here is rustls' own.
        for name in name.trim_matches(['[', ']']).split('|') {
            suites.extend(match name {
                "ECDHE-ECDSA-AES128-GCM-SHA256" => {
                    Some(cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256)
                }
                "ECDHE-ECDSA-AES256-GCM-SHA384" => {
                    Some(cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384)
                }
                "ECDHE-ECDSA-CHACHA20-POLY1305" => {
                    Some(cipher_suite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256)
                }
                "ECDHE-RSA-AES128-GCM-SHA256" => Some(cipher_suite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256),
                "ECDHE-RSA-AES256-GCM-SHA384" => Some(cipher_suite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384),
                "ECDHE-RSA-CHACHA20-POLY1305" => {
                    Some(cipher_suite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256)
                }
                "AES128-GCM-SHA256"
                | "AES256-GCM-SHA384"
                | "AES128-SHA"
                | "AES256-SHA"
                | "ECDHE-ECDSA-AES128-SHA"
                | "ECDHE-ECDSA-AES256-SHA"
                | "ECDHE-RSA-AES128-SHA"
                | "ECDHE-RSA-AES256-SHA" => None,
                other => {
                    return Err(params.refuse("cipher_suites", format!("{other:?} is no suite known here")));
                }
            });
        }
    }
    let speaks_12 = versions
        .iter()
        .any(|v| v.version == rustls::ProtocolVersion::TLSv1_2);
    if !wanted.is_empty() && suites.is_empty() && speaks_12 {
        return Err(params.refuse("cipher_suites", "none of them is supported"));
    }
    Ok(suites)
}

fn groups(params: &At) -> Result<Vec<&'static dyn SupportedKxGroup>> {
    let group = |name: &String| match name.as_str() {
        "X25519" => Ok(kx_group::X25519),
        "P-256" => Ok(kx_group::SECP256R1),
        "P-384" => Ok(kx_group::SECP384R1),
        "X25519MLKEM768" => Ok(kx_group::X25519MLKEM768),
        other => Err(params.refuse("ecdh_curves", format!("{other:?} is not supported yet"))),
    };
    params.texts("ecdh_curves").iter().map(group).collect()
}

/// `envoy.type.matcher.v3.StringMatcher` on a name.
pub(super) fn text(at: &At) -> Result<Text> {
    let ignore_case = at.flag("ignore_case").unwrap_or(false);
    let value = |field: &str| {
        let text = at.text(field);
        if ignore_case {
            text.to_ascii_lowercase()
        } else {
            text
        }
    };
    let pattern = if at.has("exact") {
        Pattern::Exact(value("exact"))
    } else if at.has("prefix") {
        Pattern::Prefix(value("prefix"))
    } else if at.has("suffix") {
        Pattern::Suffix(value("suffix"))
    } else if at.has("contains") {
        Pattern::Contains(value("contains"))
    } else if let Some(regex) = at.message("safe_regex") {
        if ignore_case {
            return Err(at.refuse("ignore_case", "does not go with safe_regex"));
        }
        let whole = regex::Regex::new(&format!("^(?:{})$", regex.text("regex")));
        Pattern::Regex(whole.map_err(|e| regex.refuse("regex", e.to_string()))?)
    } else {
        return Err(at.refuse(
            "",
            "one of exact, prefix, suffix, contains, safe_regex must be given",
        ));
    };
    Ok(Text { pattern, ignore_case })
}
