//! `ExtAuthz` into [`crate::ext_authz`]'s forms, and the services that the proxy itself calls.

use std::collections::HashMap;
use std::time::Duration;

use super::ConfigError;
use super::model::{ClusterRef, cluster_ref};
use super::rbac::value_match;
use super::route_policy::percentage;
use super::schema::At;
use super::translate_route::string_match;
use crate::ext_authz::{Filter, Http, Noted, Path, PerRoute, Service, WithBody};
use crate::rbac::ClaimMatch;
use crate::route::fault::Percentage;
use crate::route::{Text, TextMatch, is_value, may_change};
use crate::stats::{self, Registry};

type Result<T> = std::result::Result<T, ConfigError>;
type Clusters = HashMap<String, usize>;

/// How long a service may take that is given no time.
const LONGEST: Duration = Duration::from_millis(200);

/// `envoy.extensions.filters.http.ext_authz.v3.ExtAuthz`; `prefix` is the connection manager's.
pub(super) fn filter(at: &At, prefix: &str, registry: &Registry, clusters: &Clusters) -> Result<Filter> {
    for field in [
        "clear_route_cache",
        "encode_raw_headers",
        "include_peer_certificate",
    ] {
        if at.flag(field) == Some(true) {
            return Err(at.refuse(field, "true is not supported yet"));
        }
    }
    let mut allowed = list(at, "allowed_headers")?;
    let (service, cluster, timeout) = if let Some(grpc) = at.message("grpc_service") {
        grpc_service(&grpc, clusters)?
    } else if let Some(http) = at.message("http_service") {
        let told = http.message("authorization_request");
        if let Some(told) = told.as_ref().filter(|_| allowed.is_none()) {
            allowed = list(told, "allowed_headers")?;
        }
        let always = ["authorization", ":method", ":path", ":authority", "host"];
        let always = always.map(|name| Text::new(TextMatch::Exact(name.into()), true));
        allowed.get_or_insert_default().extend(always);
        http_service(&http, clusters)?
    } else {
        return Err(at.refuse("grpc_service", "grpc_service or http_service must be given"));
    };
    let name = at.text("stat_prefix");
    let dot = if name.is_empty() { "" } else { "." };
    let added = at.flag("failure_mode_allow_header_add").unwrap_or(false);
    Ok(Filter {
        service,
        cluster,
        timeout,
        failure_mode_allow: (at.flag("failure_mode_allow") == Some(true)).then_some(added),
        body: at
            .message("with_request_body")
            .map(|b| with_body(&b))
            .transpose()?,
        status_on_error: match at.message("status_on_error") {
            Some(status) => http_status(&status)?,
            None => 403,
        },
        enabled: match at.message("filter_enabled") {
            Some(enabled) => percentage(&enabled, "default_value")?,
            None => Percentage::ALL,
        },
        enabled_by: at
            .message("filter_enabled_metadata")
            .map(|m| noted(&m))
            .transpose()?,
        deny_at_disable: match at.message("deny_at_disable") {
            Some(deny) => deny
                .message("default_value")
                .and_then(|v| v.flag("value"))
                .unwrap_or(false),
            None => false,
        },
        allowed,
        disallowed: list(at, "disallowed_headers")?.unwrap_or_default(),
        tls_session: at.flag("include_tls_session").unwrap_or(false),
        stats: registry.scope(
            &format!("http.{prefix}.ext_authz{dot}{name}"),
            stats::ExtAuthz::TABLE,
        ),
    })
}

/// `ExtAuthzPerRoute`; what it does not say is `outer`'s.
pub(super) fn per_route(at: &At, outer: Option<&PerRoute>) -> Result<PerRoute> {
    if at.has("disabled") {
        return match at.flag("disabled") {
            Some(true) => Ok(PerRoute {
                disabled: true,
                ..PerRoute::default()
            }),
            _ => Err(at.refuse("disabled", "must be true where it is given")),
        };
    }
    let Some(settings) = at.message("check_settings") else {
        return Err(at.refuse("", "disabled or check_settings must be given"));
    };
    let mut all = outer.cloned().unwrap_or_default();
    all.disabled = false;
    for (key, value) in settings.text_map("context_extensions") {
        match all.context.iter_mut().find(|(known, _)| *known == key) {
            Some((_, known)) => *known = value,
            None => all.context.push((key, value)),
        }
    }
    if let Some(body) = settings.message("with_request_body") {
        all.body = Some(Some(with_body(&body)?));
    }
    if settings.flag("disable_request_body_buffering") == Some(true) {
        all.body = Some(None);
    }
    Ok(all)
}

type Called = (Service, ClusterRef, Option<Duration>);

/// A gRPC service that the proxy calls.
pub(super) struct GrpcCalled {
    pub(super) cluster: ClusterRef,
    pub(super) authority: String,
    /// Header lines.
    pub(super) metadata: Vec<u8>,
    pub(super) timeout: Option<Duration>,
}

fn grpc_service(at: &At, clusters: &Clusters) -> Result<Called> {
    let called = grpc_called(at, clusters)?;
    let service = Service::Grpc {
        authority: called.authority,
        metadata: called.metadata,
    };
    Ok((service, called.cluster, called.timeout))
}

/// `GrpcService`.
pub(super) fn grpc_called(at: &At, clusters: &Clusters) -> Result<GrpcCalled> {
    let Some(envoy) = at.message("envoy_grpc") else {
        return Err(at.refuse("envoy_grpc", "must be given"));
    };
    let mut metadata = Vec::new();
    for pair in at.messages("initial_metadata") {
        let (name, value) = (
            pair.required_text("key")?.to_ascii_lowercase(),
            pair.text("value"),
        );
        if !may_change(name.as_bytes()) || value.contains('%') || !is_value(value.as_bytes()) {
            return Err(pair.refuse("", "must be a header without operators"));
        }
        metadata.extend_from_slice(format!("{name}: {value}\r\n").as_bytes());
    }
    Ok(GrpcCalled {
        authority: authority(&envoy)?,
        metadata,
        cluster: cluster_ref(&envoy.required_text("cluster_name")?, clusters),
        timeout: time_limit(at)?,
    })
}

fn authority(at: &At) -> Result<String> {
    let authority = at.text("authority");
    if !authority.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(at.refuse("authority", "must be visible ASCII"));
    }
    Ok(authority)
}

fn http_service(at: &At, clusters: &Clusters) -> Result<Called> {
    let Some(uri) = at.message("server_uri") else {
        return Err(at.refuse("server_uri", "must be given"));
    };
    let (prefix, instead) = (at.text("path_prefix"), at.text("path_override"));
    let path = match (prefix.is_empty(), instead.is_empty()) {
        (false, false) => return Err(at.refuse("path_override", "does not go with path_prefix")),
        (_, false) => Path::Instead(instead),
        _ => Path::Before(prefix),
    };
    let (Path::Before(text) | Path::Instead(text)) = &path;
    let graphic = text.bytes().all(|b| b.is_ascii_graphic());
    if !graphic || !(text.is_empty() || text.starts_with('/')) {
        return Err(at.refuse("path_prefix", "must begin with a slash, in visible ASCII"));
    }
    let mut add = Vec::new();
    for pair in at
        .message("authorization_request")
        .map(|r| r.messages("headers_to_add"))
        .unwrap_or_default()
    {
        let (name, value) = (
            pair.required_text("key")?.to_ascii_lowercase(),
            pair.text("value"),
        );
        if !may_change(name.as_bytes()) || value.contains('%') || !is_value(value.as_bytes()) {
            return Err(pair.refuse("", "must be a header without operators"));
        }
        add.push((name.into_bytes(), value.into_bytes()));
    }
    let answer = at.message("authorization_response");
    let answered = |field: &str| match &answer {
        Some(answer) => list(answer, field),
        None => Ok(None),
    };
    // What a client must see to understand a refusal.
    let always = ["www-authenticate", "location"];
    let always = always.map(|name| Text::new(TextMatch::Exact(name.into()), true));
    let http = Http {
        path,
        add,
        upstream: answered("allowed_upstream_headers")?.unwrap_or_default(),
        upstream_append: answered("allowed_upstream_headers_to_append")?.unwrap_or_default(),
        client: answered("allowed_client_headers")?.map(|mut list| {
            list.extend(always);
            list
        }),
        client_on_success: answered("allowed_client_headers_on_success")?.unwrap_or_default(),
    };
    let (_, cluster, timeout) = http_uri(&uri, clusters)?;
    Ok((Service::Http(Box::new(http)), cluster, timeout))
}

/// `HttpUri`: what it names, where that is, and how long an answer may take.
pub(super) fn http_uri(at: &At, clusters: &Clusters) -> Result<(String, ClusterRef, Option<Duration>)> {
    let uri = at.required_text("uri")?;
    let cluster = cluster_ref(&at.required_text("cluster")?, clusters);
    Ok((uri, cluster, time_limit(at)?))
}

/// `timeout`; 0 is none.
fn time_limit(at: &At) -> Result<Option<Duration>> {
    let limit = at.duration("timeout")?.unwrap_or(LONGEST);
    Ok((!limit.is_zero()).then_some(limit))
}

/// `ListStringMatcher`; `None` where it is not given, or empty.
fn list(at: &At, field: &str) -> Result<Option<Vec<Text>>> {
    let Some(list) = at.message(field) else {
        return Ok(None);
    };
    let patterns = list.messages("patterns");
    let rules = patterns.iter().map(string_match).collect::<Result<Vec<_>>>()?;
    Ok((!rules.is_empty()).then_some(rules))
}

fn with_body(at: &At) -> Result<WithBody> {
    let most = at.number_or("max_request_bytes", 0) as usize;
    if most == 0 {
        return Err(at.refuse("max_request_bytes", "must be greater than 0"));
    }
    Ok(WithBody {
        most,
        partial: at.flag("allow_partial_message").unwrap_or(false),
        as_bytes: at.flag("pack_as_bytes").unwrap_or(false),
    })
}

fn http_status(at: &At) -> Result<u16> {
    let code = at
        .message
        .get_field_by_name("code")
        .and_then(|code| code.as_enum_number());
    code.and_then(|code| u16::try_from(code).ok())
        .filter(|code| (200..600).contains(code))
        .ok_or_else(|| at.refuse("code", "must be between 200 and 599"))
}

/// `MetadataMatcher` on what shadow rules left.
fn noted(at: &At) -> Result<Noted> {
    const RBAC: &str = "envoy.filters.http.rbac";
    let filter = at.text("filter");
    if filter != RBAC {
        return Err(at.refuse(
            "filter",
            format!("{filter:?} is not supported yet, only {RBAC:?}"),
        ));
    }
    let path = at.messages("path");
    let key = match path.as_slice() {
        [segment] => segment.required_text("key")?,
        _ => return Err(at.refuse("path", "exactly one segment must be given")),
    };
    let known = ["shadow_effective_policy_id", "shadow_engine_result"];
    let known = known
        .iter()
        .position(|name| key.ends_with(name))
        .map(|i| (i, known[i]));
    let Some((index, name)) = known else {
        return Err(at.refuse("path", format!("{key:?} is not what shadow rules leave")));
    };
    let Some(value) = at.message("value") else {
        return Err(at.refuse("value", "must be given"));
    };
    let rule: ClaimMatch = value_match(&value)?;
    Ok(Noted {
        prefix: key[..key.len() - name.len()].to_owned(),
        policy: index == 0,
        rule,
        invert: at.flag("invert").unwrap_or(false),
    })
}
