//! A connection manager's HTTP filters, and what else it does to requests, into [`HttpPolicy`].
//!
//! | filter | here |
//! |---|---|
//! | `rbac` | [`super::rbac`]; metadata but claims, and filter state are refused |
//! | `fault`, `cors` | [`super::route_policy`]; what the route says goes before what the filter says |
//! | `jwt_authn` | [`super::jwt`]; keys come with the configuration, or are fetched |
//! | `ext_authz` | [`super::ext_authz`]; gRPC and HTTP |
//! | `local_ratelimit` | [`super::ratelimit`]; what the route says replaces what the filter says |
//! | `set_filter_state` | only `envoy.network.application_protocols`: what is offered to endpoints in TLS |
//! | `grpc_stats` | accepted, counts nothing |
//! | `router` | last |

use std::collections::HashMap;
use std::sync::Arc;

use super::ConfigError;
use super::schema::At;
use super::{ext_authz, jwt, ratelimit, rbac, route_policy, translate_route};
use crate::http1::policy::{ClientCert, EscapedSlashes, Forwarding, HttpFilter, HttpPolicy, PathPolicy};
use crate::stats::{self, Registry};

type Result<T> = std::result::Result<T, ConfigError>;

/// The filter state that names the protocols of upstream TLS.
const PROTOCOLS: &str = "envoy.network.application_protocols";

/// Reads what `at`, an `HttpConnectionManager` of the statistics prefix `prefix`, does to requests.
pub(super) fn policy(
    at: &At,
    prefix: &str,
    registry: &Registry,
    clusters: &HashMap<String, usize>,
) -> Result<HttpPolicy> {
    let mut policy = HttpPolicy {
        path: path_policy(at)?,
        client_cert: client_cert(at)?,
        upgrades: translate_route::upgrades(&at.messages("upgrade_configs"))?,
        ..HttpPolicy::default()
    };
    for field in ["use_remote_address", "strip_any_host_port"] {
        if at.flag(field) == Some(true) {
            return Err(at.refuse(field, "true is not supported yet"));
        }
    }
    let filters = at.messages("http_filters");
    let Some((last, before)) = filters.split_last() else {
        return Err(at.refuse("http_filters", "the router filter must be given"));
    };
    for filter in before {
        add(&mut policy, filter, prefix, (registry, clusters))?;
    }
    let router = config(last)?;
    if router.type_name() != "envoy.extensions.filters.http.router.v3.Router" {
        return Err(router.refuse("", "the last HTTP filter must be the router"));
    }
    policy.suppress_envoy_headers = router.flag("suppress_envoy_headers").unwrap_or(false);
    Ok(policy)
}

fn config(filter: &At) -> Result<At> {
    filter
        .any("typed_config")?
        .ok_or_else(|| filter.refuse("typed_config", "must be given"))
}

fn add(
    policy: &mut HttpPolicy,
    filter: &At,
    prefix: &str,
    (registry, clusters): (&Registry, &HashMap<String, usize>),
) -> Result<()> {
    let config = config(filter)?;
    let expect = |name: &str| {
        // Routes speak to a filter by its name, so it must be the one they use.
        if filter.text("name") == name {
            Ok(())
        } else {
            Err(filter.refuse("name", format!("must be {name:?}")))
        }
    };
    match config.type_name().as_str() {
        "envoy.extensions.filters.http.rbac.v3.RBAC" => {
            let filter = rbac::http(&config, prefix, registry)?;
            policy.filters.push(HttpFilter::Rbac(filter));
        }
        "envoy.extensions.filters.http.fault.v3.HTTPFault" => {
            expect("envoy.filters.http.fault")?;
            let fault = route_policy::fault(&config)?;
            let acts = fault.delay.is_some() || fault.abort.is_some();
            let scope = registry.scope(&format!("http.{prefix}.fault"), stats::Fault::TABLE);
            let fault = acts.then(|| Arc::new(fault));
            policy.filters.push(HttpFilter::Fault(fault, scope));
        }
        "envoy.extensions.filters.http.cors.v3.Cors" => {
            expect("envoy.filters.http.cors")?;
            let scope = registry.scope(&format!("http.{prefix}.cors"), stats::Cors::TABLE);
            policy.filters.push(HttpFilter::Cors(scope));
        }
        "envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication" => {
            // Access rules know claims by this name.
            expect("envoy.filters.http.jwt_authn")?;
            let filter = jwt::filter(&config, prefix, registry, clusters)?;
            policy.filters.push(HttpFilter::Jwt(Box::new(filter)));
        }
        "envoy.extensions.filters.http.ext_authz.v3.ExtAuthz" => {
            expect("envoy.filters.http.ext_authz")?;
            let filter = ext_authz::filter(&config, prefix, registry, clusters)?;
            policy.filters.push(HttpFilter::ExtAuthz(Box::new(filter)));
        }
        "envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit" => {
            expect("envoy.filters.http.local_ratelimit")?;
            let rate = ratelimit::http(&config, registry)?;
            policy.filters.push(HttpFilter::LocalRate(rate));
        }
        "envoy.extensions.filters.http.grpc_stats.v3.FilterConfig" => {}
        "envoy.extensions.filters.http.set_filter_state.v3.Config" => {
            for state in config.messages("on_request_headers") {
                policy.upstream_protocols = Some(upstream_protocols(&state)?);
            }
        }
        "envoy.extensions.filters.http.router.v3.Router" => {
            return Err(filter.refuse(
                "",
                "the router is a terminal filter, which must be the last of its chain",
            ));
        }
        other => {
            return Err(config.refuse("", format!("{other} is not an HTTP filter this proxy has")));
        }
    }
    Ok(())
}

fn upstream_protocols(state: &At) -> Result<Arc<[Vec<u8>]>> {
    let key = state.text("object_key");
    if key != PROTOCOLS {
        return Err(state.refuse("object_key", format!("{key:?} is not supported yet")));
    }
    let format = state.message("format_string");
    let text = format.and_then(|f| {
        f.message("text_format_source")
            .map(|source| source.text("inline_string"))
            .or_else(|| Some(f.text("text_format")))
    });
    let text = text.unwrap_or_default();
    if text.is_empty() || text.contains('%') {
        return Err(state.refuse("format_string", "must be literal text"));
    }
    Ok(text.split(',').map(|p| p.trim().as_bytes().to_vec()).collect())
}

fn path_policy(at: &At) -> Result<PathPolicy> {
    let escaped_slashes = match at.choice("path_with_escaped_slashes_action").as_str() {
        "REJECT_REQUEST" => EscapedSlashes::Reject,
        "UNESCAPE_AND_FORWARD" => EscapedSlashes::Unescape,
        "UNESCAPE_AND_REDIRECT" => {
            return Err(at.refuse(
                "path_with_escaped_slashes_action",
                "UNESCAPE_AND_REDIRECT is not supported yet",
            ));
        }
        _ => EscapedSlashes::Keep,
    };
    Ok(PathPolicy {
        normalize: at.flag("normalize_path").unwrap_or(false),
        merge_slashes: at.flag("merge_slashes").unwrap_or(false),
        escaped_slashes,
    })
}

fn client_cert(at: &At) -> Result<ClientCert> {
    let forwarding = match at.choice("forward_client_cert_details").as_str() {
        "FORWARD_ONLY" => Forwarding::Forward,
        "APPEND_FORWARD" => Forwarding::Append,
        "SANITIZE_SET" => Forwarding::Set,
        "ALWAYS_FORWARD_ONLY" => Forwarding::Always,
        _ => Forwarding::Sanitize,
    };
    let details = at.message("set_current_client_cert_details");
    let flag = |field: &str| details.as_ref().and_then(|d| d.flag(field)).unwrap_or(false);
    Ok(ClientCert {
        forwarding,
        subject: flag("subject"),
        uri: flag("uri"),
        dns: flag("dns"),
    })
}
