//! `JwtAuthentication` into [`crate::jwt`]'s forms.
//!
//! Keys come with the configuration (`local_jwks`), as istiod writes them, or from a service (`remote_jwks`).

use std::collections::HashMap;
use std::time::Duration;

use super::ConfigError;
use super::ext_authz::http_uri;
use super::rbac::named;
use super::schema::At;
use super::translate_route::{data_source, route_match};
use crate::jwt::keys::Keys;
use crate::jwt::remote::Remote;
use crate::jwt::{Filter, KeySet, Provider, Requirement, Source};
use crate::stats::{self, Registry};

type Result<T> = std::result::Result<T, ConfigError>;

/// Envoy's `clock_skew_seconds`.
const SKEW: u32 = 60;

/// `envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication`; `prefix` is the connection manager's.
pub(super) fn filter(
    at: &At,
    prefix: &str,
    registry: &Registry,
    clusters: &HashMap<String, usize>,
) -> Result<Filter> {
    let mut all = named(at, "providers");
    all.sort_by(|a, b| a.0.cmp(&b.0));
    let providers = all
        .iter()
        .map(|(_, at)| provider(at, clusters))
        .collect::<Result<_>>()?;
    let names: Vec<String> = all.into_iter().map(|(name, _)| name).collect();
    let rule = |at: &At| {
        let Some(matcher) = at.message("match") else {
            return Err(at.refuse("match", "must be given"));
        };
        let requires = at.message("requires");
        let requires = requires.map(|r| requirement(&r, &names)).transpose()?;
        Ok((route_match(&matcher)?, requires))
    };
    Ok(Filter {
        providers,
        rules: at.messages("rules").iter().map(rule).collect::<Result<_>>()?,
        bypass_preflight: at.flag("bypass_cors_preflight").unwrap_or(false),
        stats: registry.scope(&format!("http.{prefix}.jwt_authn"), stats::Jwt::TABLE),
    })
}

/// `cache_duration` where there is none.
const KEPT: Duration = Duration::from_secs(600);

fn keys(at: &At, clusters: &HashMap<String, usize>) -> Result<KeySet> {
    if let Some(local) = at.message("local_jwks") {
        let keys = Keys::parse(&data_source(&local)?).map_err(|e| at.refuse("local_jwks", e))?;
        return Ok(KeySet::Local(keys));
    }
    let Some(remote) = at.message("remote_jwks") else {
        return Err(at.refuse("local_jwks", "local_jwks or remote_jwks must be given"));
    };
    let Some(uri) = remote.message("http_uri") else {
        return Err(remote.refuse("http_uri", "must be given"));
    };
    let (text, cluster, timeout) = http_uri(&uri, clusters)?;
    let parsed: http::Uri = text.parse().map_err(|_| uri.refuse("uri", "is no URI"))?;
    let Some(authority) = parsed.authority() else {
        return Err(uri.refuse("uri", "must name a host: http://HOST/PATH"));
    };
    let path = parsed.path_and_query().map_or("/", |path| path.as_str());
    let request = format!("GET {path} HTTP/1.1\r\nhost: {authority}\r\n\r\n");
    let kept = remote.duration("cache_duration")?.unwrap_or(KEPT);
    let remote = Remote::new(request.into_bytes(), cluster, timeout, kept);
    Ok(KeySet::Remote(Box::new(remote)))
}

fn provider(at: &At, clusters: &HashMap<String, usize>) -> Result<Provider> {
    let keys = keys(at, clusters)?;
    let header = |at: &At| {
        let name = at.required_text("name")?.to_ascii_lowercase();
        Ok(Source::Header(
            name.into_bytes(),
            at.text("value_prefix").into_bytes(),
        ))
    };
    let mut sources: Vec<Source> = at
        .messages("from_headers")
        .iter()
        .map(header)
        .collect::<Result<_>>()?;
    let listed = |field: &str| at.texts(field).into_iter().map(String::into_bytes);
    sources.extend(listed("from_params").map(Source::Parameter));
    sources.extend(listed("from_cookies").map(Source::Cookie));
    if sources.is_empty() {
        sources = vec![
            Source::Header(b"authorization".to_vec(), b"Bearer ".to_vec()),
            Source::Parameter(b"access_token".to_vec()),
        ];
    }
    let some = |field: &str| Some(at.text(field)).filter(|text| !text.is_empty());
    let pad = at.flag("pad_forward_payload_header").unwrap_or(false);
    let words = at.message("normalize_payload_in_metadata");
    Ok(Provider {
        issuer: at.text("issuer"),
        audiences: at.texts("audiences"),
        keys,
        skew: match at.number_or("clock_skew_seconds", SKEW) {
            0 => u64::from(SKEW),
            seconds => u64::from(seconds),
        },
        sources,
        forward: at.flag("forward").unwrap_or(false),
        payload_header: some("forward_payload_header")
            .map(|name| (name.to_ascii_lowercase().into_bytes(), pad)),
        payload_key: some("payload_in_metadata"),
        words: words
            .map(|w| w.texts("space_delimited_claims"))
            .unwrap_or_default(),
    })
}

fn requirement(at: &At, names: &[String]) -> Result<Requirement> {
    let known = |at: &At| {
        let name = at.required_text("provider_name")?;
        let index = names.iter().position(|known| *known == name);
        index.ok_or_else(|| at.refuse("provider_name", format!("there is no provider {name:?}")))
    };
    let list = |at: &At| -> Result<Vec<Requirement>> {
        at.messages("requirements")
            .iter()
            .map(|one| requirement(one, names))
            .collect()
    };
    if at.has("provider_name") {
        return Ok(Requirement::Provider(known(at)?, None));
    }
    if let Some(both) = at.message("provider_and_audiences") {
        return Ok(Requirement::Provider(
            known(&both)?,
            Some(both.texts("audiences")),
        ));
    }
    if let Some(any) = at.message("requires_any") {
        return Ok(Requirement::Any(list(&any)?));
    }
    if let Some(all) = at.message("requires_all") {
        return Ok(Requirement::All(list(&all)?));
    }
    if at.has("allow_missing") {
        return Ok(Requirement::Missing);
    }
    if at.has("allow_missing_or_failed") {
        return Ok(Requirement::MissingOrFailed);
    }
    Err(at.refuse("", "a requirement must say what is required"))
}
