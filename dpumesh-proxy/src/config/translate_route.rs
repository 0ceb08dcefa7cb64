//! Route configurations into [`crate::route`]'s tables.

use std::collections::HashMap;
use std::sync::Arc;

use regex::bytes::Regex;

use super::ConfigError;
use super::balancing;
use super::model::{ClusterRef, Weighted, cluster_ref};
use super::re2;
use super::route_policy::{self, PerFilter, per_filter};
use super::schema::At;
use crate::access_log::Template;
use crate::route::fault::Percentage;
use crate::route::upgrade::{CONNECT, Upgrade, Upgrades};
use crate::route::{
    Action, AddHeader, AddHow, Forward, HeaderChanges, HeaderMatch, Mirror, PathMatch, PathRewrite,
    QueryMatch, Redirect, RedirectPath, Route, RouteMatch, RouteTable, StreamDuration, Target, Text,
    TextMatch, ValueMatch, VirtualHost, is_value, may_change,
};
use crate::stats::Registry;

type Result<T> = std::result::Result<T, ConfigError>;
type Clusters = HashMap<String, usize>;

/// Compiles a route configuration. `validate` is what `validate_clusters` means when it is unset.
pub(super) fn table(at: &At, clusters: &Clusters, registry: &Registry, validate: bool) -> Result<RouteTable> {
    let validate = at.flag("validate_clusters").unwrap_or(validate);
    let limit = at.number_or("max_direct_response_body_size_bytes", 4096) as usize;
    let mut table = RouteTable {
        name: at.text("name"),
        ignore_port: at.flag("ignore_port_in_host_matching").unwrap_or(false),
        headers: header_changes(at)?,
        ..RouteTable::default()
    };
    let of_all = per_filter(at, &PerFilter::default(), registry)?;
    for host in at.messages("virtual_hosts") {
        let index = table.hosts.len();
        domains(&mut table, &host, index)?;
        let of_host = per_filter(&host, &of_all, registry)?;
        let retry = host.message("retry_policy");
        let retry = retry.map(|r| route_policy::retry(&r)).transpose()?.flatten();
        let routes = host.messages("routes");
        let routes = routes.iter().map(|at| {
            let of_route = per_filter(at, &of_host, registry)?;
            let mut route = route(at, clusters, validate, limit, of_route)?;
            if let Action::Forward(forward) = &mut route.action {
                let has_own = at.message("route").is_some_and(|r| r.has("retry_policy"));
                forward.retry = forward
                    .retry
                    .take()
                    .or_else(|| retry.clone().filter(|_| !has_own));
            }
            Ok(route)
        });
        let routes = routes.collect::<Result<_>>()?;
        table.hosts.push(VirtualHost {
            name: host.text("name"),
            headers: header_changes(&host)?,
            routes,
            attempt_count_in_request: host.flag("include_request_attempt_count").unwrap_or(false),
            attempt_count_in_response: host.flag("include_attempt_count_in_response").unwrap_or(false),
        });
    }
    table.suffixes.sort_by_key(|(s, _)| std::cmp::Reverse(s.len()));
    table.prefixes.sort_by_key(|(p, _)| std::cmp::Reverse(p.len()));
    Ok(table)
}

fn domains(table: &mut RouteTable, host: &At, index: usize) -> Result<()> {
    let domains = host.texts("domains");
    if domains.is_empty() {
        return Err(host.refuse("domains", "at least one domain must be given"));
    }
    for (place, domain) in domains.iter().enumerate() {
        let lower = domain.to_ascii_lowercase().into_bytes();
        let at = format!("domains[{place}]");
        let fresh = if lower == b"*" {
            table.any.replace(index).is_none()
        } else if let Some(suffix) = lower.strip_prefix(b"*") {
            put(&mut table.suffixes, suffix, index)
        } else if let Some(prefix) = lower.strip_suffix(b"*") {
            put(&mut table.prefixes, prefix, index)
        } else {
            table.exact.insert(lower.clone(), index).is_none()
        };
        if !fresh {
            return Err(host.refuse(
                &at,
                format!("{domain:?} appears twice in one route configuration"),
            ));
        }
        if lower.len() > 1 && lower[1..lower.len() - 1].contains(&b'*') {
            return Err(host.refuse(&at, "a wildcard stands at the beginning or at the end only"));
        }
    }
    Ok(())
}

fn put(list: &mut Vec<(Vec<u8>, usize)>, part: &[u8], index: usize) -> bool {
    let fresh = !list.iter().any(|(known, _)| known == part);
    list.push((part.to_vec(), index));
    fresh
}

fn route(at: &At, clusters: &Clusters, validate: bool, limit: usize, filters: PerFilter) -> Result<Route> {
    let Some(matcher) = at.message("match") else {
        return Err(at.refuse("match", "must be given"));
    };
    let action = if let Some(forward) = at.message("route") {
        Action::Forward(Box::new(self::forward(&forward, clusters, validate)?))
    } else if let Some(redirect) = at.message("redirect") {
        Action::Redirect(Box::new(self::redirect(&redirect)?))
    } else if let Some(direct) = at.message("direct_response") {
        direct_response(&direct, limit)?
    } else {
        return Err(at.refuse("route", "route, redirect or direct_response must be given"));
    };
    Ok(Route {
        name: at.text("name"),
        matcher: route_match(&matcher)?,
        action,
        headers: header_changes(at)?,
        fault: filters.fault,
        cors: filters.cors,
        ext_authz: filters.ext_authz,
        local_rate: filters.local_rate,
    })
}

pub(super) fn route_match(at: &At) -> Result<RouteMatch> {
    let path = if at.has("prefix") {
        PathMatch::Prefix(at.text("prefix").into_bytes())
    } else if at.has("path") {
        PathMatch::Exact(at.text("path").into_bytes())
    } else if at.has("path_separated_prefix") {
        let prefix = at.text("path_separated_prefix");
        if !prefix.starts_with('/') || prefix.ends_with('/') || prefix.contains(['?', '#']) {
            return Err(at.refuse(
                "path_separated_prefix",
                "must begin with a slash, not end with one, and hold no ? or #",
            ));
        }
        PathMatch::Segments(prefix.into_bytes())
    } else if let Some(regex) = at.message("safe_regex") {
        PathMatch::Regex(whole(&regex)?)
    } else if at.has("connect_matcher") {
        PathMatch::Connect
    } else {
        return Err(at.refuse(
            "",
            "prefix, path, path_separated_prefix, safe_regex or connect_matcher must be given",
        ));
    };
    Ok(RouteMatch {
        path,
        case_sensitive: at.flag("case_sensitive").unwrap_or(true),
        headers: at
            .messages("headers")
            .iter()
            .map(header_match)
            .collect::<Result<_>>()?,
        query: at
            .messages("query_parameters")
            .iter()
            .map(query_match)
            .collect::<Result<_>>()?,
        grpc: at.has("grpc"),
    })
}

/// A regular expression that has to match all of its input, as RE2's full match does.
fn whole(at: &At) -> Result<Regex> {
    let pattern = at.required_text("regex")?;
    re2::whole(&pattern).map_err(|e| at.refuse("regex", e))
}

/// `HeaderMatcher`.
pub(super) fn header_match(at: &At) -> Result<HeaderMatch> {
    let name = at.required_text("name")?.to_ascii_lowercase();
    let text = |field: &str, rule: fn(Vec<u8>) -> TextMatch| {
        ValueMatch::Text(Text::new(rule(at.text(field).into_bytes()), false))
    };
    let value = if at.has("exact_match") {
        text("exact_match", TextMatch::Exact)
    } else if at.has("prefix_match") {
        text("prefix_match", TextMatch::Prefix)
    } else if at.has("suffix_match") {
        text("suffix_match", TextMatch::Suffix)
    } else if at.has("contains_match") {
        text("contains_match", TextMatch::Contains)
    } else if let Some(regex) = at.message("safe_regex_match") {
        ValueMatch::Text(Text::new(TextMatch::Regex(whole(&regex)?), false))
    } else if let Some(range) = at.message("range_match") {
        ValueMatch::Range(range.signed("start"), range.signed("end"))
    } else if let Some(string) = at.message("string_match") {
        ValueMatch::Text(string_match(&string)?)
    } else {
        ValueMatch::Present(at.flag("present_match").unwrap_or(true))
    };
    Ok(HeaderMatch {
        name: name.into_bytes(),
        value,
        invert: at.flag("invert_match").unwrap_or(false),
        missing_is_empty: at.flag("treat_missing_header_as_empty").unwrap_or(false),
    })
}

fn query_match(at: &At) -> Result<QueryMatch> {
    let name = at.required_text("name")?.into_bytes();
    let value = match at.message("string_match") {
        Some(string) => ValueMatch::Text(string_match(&string)?),
        None => ValueMatch::Present(at.flag("present_match").unwrap_or(true)),
    };
    Ok(QueryMatch { name, value })
}

/// `StringMatcher`.
pub(super) fn string_match(at: &At) -> Result<Text> {
    let text = |field: &str| at.text(field).into_bytes();
    let rule = if at.has("exact") {
        TextMatch::Exact(text("exact"))
    } else if at.has("prefix") {
        TextMatch::Prefix(text("prefix"))
    } else if at.has("suffix") {
        TextMatch::Suffix(text("suffix"))
    } else if at.has("contains") {
        TextMatch::Contains(text("contains"))
    } else if let Some(regex) = at.message("safe_regex") {
        TextMatch::Regex(whole(&regex)?)
    } else {
        return Err(at.refuse("", "exact, prefix, suffix, contains or safe_regex must be given"));
    };
    Ok(Text::new(rule, at.flag("ignore_case").unwrap_or(false)))
}

fn forward(at: &At, clusters: &Clusters, validate: bool) -> Result<Forward> {
    let named = |at: &At, field: &str| {
        let name = at.required_text(field)?;
        let cluster = cluster_ref(&name, clusters);
        if validate && cluster.index.is_none() {
            return Err(at.refuse(field, format!("unknown cluster {name:?}")));
        }
        Ok(cluster)
    };
    let subset = balancing::criteria(at, None);
    let to = if let Some(weighted) = at.message("weighted_clusters") {
        let entries = weighted.messages("clusters");
        let entry = |e: &At| {
            let subset = balancing::criteria(e, subset.as_ref());
            Ok((
                e.number_or("weight", 0),
                (named(e, "name")?, header_changes(e)?, subset),
            ))
        };
        let split = entries.iter().map(entry).collect::<Result<Vec<_>>>()?;
        let split = Weighted::new(split);
        Target::Weighted(
            split.ok_or_else(|| weighted.refuse("clusters", "the weights must not sum up to 0"))?,
        )
    } else if at.has("cluster_header") {
        let all = clusters
            .keys()
            .map(|name| (name.clone().into_bytes(), cluster_ref(name, clusters)))
            .collect();
        let name = at
            .required_text("cluster_header")?
            .to_ascii_lowercase()
            .into_bytes();
        if name.first() == Some(&b':') {
            return Err(at.refuse("cluster_header", "pseudo headers are not supported yet"));
        }
        Target::Header(name, all)
    } else {
        Target::Cluster(named(at, "cluster")?)
    };
    let stream_duration = stream_duration(at)?;
    let grpc_timeout = match stream_duration {
        Some(_) => None,
        None => at.duration("max_grpc_timeout")?.map(unless_zero),
    };
    let not_found_status = match at.choice("cluster_not_found_response_code").as_str() {
        "NOT_FOUND" => 404,
        "INTERNAL_SERVER_ERROR" => 500,
        _ => 503,
    };
    let timeout = at
        .duration("timeout")?
        .unwrap_or(std::time::Duration::from_secs(15));
    Ok(Forward {
        to,
        not_found_status,
        // As in Envoy: one or the other.
        timeout: unless_zero(timeout).filter(|_| stream_duration.is_none()),
        grpc_timeout,
        stream_duration: stream_duration.unwrap_or_default(),
        idle_timeout: at.duration("idle_timeout")?.map(|d| (!d.is_zero()).then_some(d)),
        path_rewrite: path_rewrite(at)?,
        host_rewrite: checked_value(at, "host_rewrite_literal")?,
        retry: match at.message("retry_policy") {
            Some(retry) => route_policy::retry(&retry)?,
            None => None,
        },
        hash: balancing::hash_policies(at)?,
        subset,
        mirrors: mirrors(at, named)?,
        upgrades: upgrades(&at.messages("upgrade_configs"))?,
    })
}

fn mirrors(at: &At, named: impl Fn(&At, &str) -> Result<ClusterRef>) -> Result<Vec<Mirror>> {
    let mirror = |at: &At| {
        let share = match at.message("runtime_fraction") {
            Some(fraction) => route_policy::percentage(&fraction, "default_value")?,
            None => Percentage::ALL,
        };
        Ok(Mirror {
            cluster: named(at, "cluster")?,
            share,
            renames_host: at.flag("disable_shadow_host_suffix_append") != Some(true),
        })
    };
    at.messages("request_mirror_policies")
        .iter()
        .map(mirror)
        .collect()
}

/// `upgrade_configs` of a route or of a connection manager.
pub(super) fn upgrades(configs: &[At]) -> Result<Upgrades> {
    let mut upgrades = Upgrades::default();
    for config in configs {
        let kind = config
            .required_text("upgrade_type")?
            .to_ascii_lowercase()
            .into_bytes();
        let terminated = config.has("connect_config");
        if terminated && kind != CONNECT {
            return Err(config.refuse("connect_config", "is for CONNECT only"));
        }
        if kind == b"h2c" {
            return Err(config.refuse("upgrade_type", "h2c is not supported yet"));
        }
        if upgrades.0.iter().any(|u| u.kind == kind) {
            return Err(config.refuse("upgrade_type", "appears twice"));
        }
        upgrades.0.push(Upgrade {
            kind,
            enabled: config.flag("enabled").unwrap_or(true),
            terminated,
        });
    }
    Ok(upgrades)
}

fn path_rewrite(at: &At) -> Result<Option<PathRewrite>> {
    if let Some(prefix) = path_part(at, "prefix_rewrite")? {
        return Ok(Some(PathRewrite::Prefix(prefix)));
    }
    let Some(rewrite) = at.message("regex_rewrite") else {
        return Ok(None);
    };
    let Some(pattern) = rewrite.message("pattern") else {
        return Err(rewrite.refuse("pattern", "must be given"));
    };
    let regex = re2::part(&pattern.required_text("regex")?).map_err(|e| pattern.refuse("regex", e))?;
    let text = rewrite.text("substitution");
    if !text.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(rewrite.refuse("substitution", "must be visible ASCII"));
    }
    let with = re2::replacement(&text, &regex).map_err(|e| rewrite.refuse("substitution", e))?;
    Ok(Some(PathRewrite::Regex(regex, with)))
}

/// A limit of which 0 is none.
fn unless_zero(limit: std::time::Duration) -> Option<std::time::Duration> {
    (!limit.is_zero()).then_some(limit)
}

/// `max_stream_duration`. With it `max_grpc_timeout`, which is older, has no effect.
fn stream_duration(at: &At) -> Result<Option<StreamDuration>> {
    let Some(limits) = at.message("max_stream_duration") else {
        return Ok(None);
    };
    Ok(Some(StreamDuration {
        most: limits.duration("max_stream_duration")?.map(unless_zero),
        grpc: limits.duration("grpc_timeout_header_max")?.map(unless_zero),
    }))
}

fn redirect(at: &At) -> Result<Redirect> {
    let status = match at.choice("response_code").as_str() {
        "FOUND" => 302,
        "SEE_OTHER" => 303,
        "TEMPORARY_REDIRECT" => 307,
        "PERMANENT_REDIRECT" => 308,
        _ => 301,
    };
    let some = |field: &str| checked_value(at, field).map(|v| v.and_then(|v| String::from_utf8(v).ok()));
    let scheme = if at.flag("https_redirect") == Some(true) {
        Some("https".to_owned())
    } else {
        some("scheme_redirect")?
    };
    let path = if let Some(path) = path_part(at, "path_redirect")? {
        RedirectPath::Replace(path)
    } else if let Some(prefix) = path_part(at, "prefix_rewrite")? {
        RedirectPath::Prefix(prefix)
    } else {
        RedirectPath::Keep
    };
    let port = at.number("port_redirect").filter(|p| *p > 0);
    Ok(Redirect {
        status,
        scheme,
        host: some("host_redirect")?,
        port: port
            .map(u16::try_from)
            .transpose()
            .map_err(|_| at.refuse("port_redirect", "must be at most 65535"))?,
        path,
        strip_query: at.flag("strip_query").unwrap_or(false),
    })
}

fn direct_response(at: &At, limit: usize) -> Result<Action> {
    let status = at.number_or("status", 0);
    if !(200..600).contains(&status) {
        return Err(at.refuse("status", "must be between 200 and 599"));
    }
    let body = at
        .message("body")
        .map(|b| data_source(&b))
        .transpose()?
        .unwrap_or_default();
    if body.len() > limit {
        return Err(at.refuse(
            "body",
            format!("{} octets, more than the {limit} allowed", body.len()),
        ));
    }
    Ok(Action::Direct {
        status: u16::try_from(status).unwrap_or(200),
        body,
    })
}

/// The octets a `DataSource` names.
pub(super) fn data_source(at: &At) -> Result<Vec<u8>> {
    if at.has("inline_string") {
        return Ok(at.text("inline_string").into_bytes());
    }
    if at.has("inline_bytes") {
        return Ok(at.bytes("inline_bytes"));
    }
    let file = at.required_text("filename")?;
    std::fs::read(&file).map_err(|e| at.refuse("filename", format!("{file}: {e}")))
}

fn header_changes(at: &At) -> Result<HeaderChanges> {
    let remove = |field: &str| -> Result<Vec<Vec<u8>>> {
        let names = at
            .texts(field)
            .into_iter()
            .map(|n| n.to_ascii_lowercase().into_bytes());
        names
            .map(|n| {
                if may_change(&n) {
                    Ok(n)
                } else {
                    Err(at.refuse(field, refused_name(&n)))
                }
            })
            .collect()
    };
    let add = |field: &str| -> Result<Vec<AddHeader>> { at.messages(field).iter().map(add_header).collect() };
    Ok(HeaderChanges {
        request_remove: remove("request_headers_to_remove")?,
        request_add: add("request_headers_to_add")?,
        response_remove: remove("response_headers_to_remove")?,
        response_add: add("response_headers_to_add")?,
    })
}

pub(super) fn add_header(at: &At) -> Result<AddHeader> {
    let Some(header) = at.message("header") else {
        return Err(at.refuse("header", "must be given"));
    };
    let name = header.required_text("key")?.to_ascii_lowercase().into_bytes();
    if !may_change(&name) {
        return Err(header.refuse("key", refused_name(&name)));
    }
    let raw = header.text("value");
    let template = if raw.replace("%%", "").contains('%') {
        let template = Template::new(&raw).map_err(|e| header.refuse("value", e))?;
        Some(Arc::new(template))
    } else {
        None
    };
    let value = raw.replace("%%", "%").into_bytes();
    if !is_value(&value) {
        return Err(header.refuse("value", "is not a valid header value"));
    }
    let how = match (at.flag("append"), at.choice("append_action").as_str()) {
        (Some(false), _) | (None, "OVERWRITE_IF_EXISTS_OR_ADD") => AddHow::Overwrite,
        (None, "ADD_IF_ABSENT") => AddHow::IfAbsent,
        (None, "OVERWRITE_IF_EXISTS") => AddHow::OverwriteIfExists,
        _ => AddHow::Append,
    };
    Ok(AddHeader {
        name,
        value,
        template,
        how,
    })
}

fn refused_name(name: &[u8]) -> String {
    format!(
        "header {:?} cannot be added or removed",
        String::from_utf8_lossy(name)
    )
}

fn checked_value(at: &At, field: &str) -> Result<Option<Vec<u8>>> {
    let value = at.text(field).into_bytes();
    if !value.iter().all(|b| b.is_ascii_graphic()) {
        return Err(at.refuse(field, "must be visible ASCII"));
    }
    Ok((!value.is_empty()).then_some(value))
}

fn path_part(at: &At, field: &str) -> Result<Option<Vec<u8>>> {
    let value = checked_value(at, field)?;
    match value {
        Some(path) if path[0] != b'/' => Err(at.refuse(field, "must begin with a slash")),
        value => Ok(value),
    }
}
