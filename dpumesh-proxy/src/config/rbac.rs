//! `envoy.config.rbac.v3.RBAC` into [`crate::rbac`]'s rules.
//!
//! What cannot be decided here refuses the filter by name, never the traffic silently or not at all: metadata other than
//! the claims of tokens, filter state, conditions in CEL, matcher trees.

use std::net::IpAddr;
use std::sync::Arc;

use prost_reflect::Value;

use super::ConfigError;
use super::re2;
use super::schema::At;
use super::translate_route::{header_match, string_match};
use crate::rbac::{Action, ClaimMatch, Filter, Policies, Policy, Rule, Shadow};
use crate::stats::{self, Registry, Scope};

type Result<T> = std::result::Result<T, ConfigError>;

/// `envoy.extensions.filters.http.rbac.v3.RBAC`; `prefix` is the connection manager's.
pub(super) fn http(at: &At, prefix: &str, registry: &Registry) -> Result<Filter> {
    filter(at, &format!("http.{prefix}.rbac"), registry)
}

/// `envoy.extensions.filters.network.rbac.v3.RBAC`.
pub(super) fn network(at: &At, registry: &Registry) -> Result<Filter> {
    if at.choice("enforcement_type") != "ONE_TIME_ON_FIRST_BYTE" {
        return Err(at.refuse("enforcement_type", "only ONE_TIME_ON_FIRST_BYTE is supported yet"));
    }
    let prefix = at.required_text("stat_prefix")?;
    filter(at, &format!("{}.rbac", prefix.trim_end_matches('.')), registry)
}

fn filter(at: &At, scope: &str, registry: &Registry) -> Result<Filter> {
    let stats = registry.scope(scope, stats::Rbac::TABLE);
    Ok(Filter {
        rules: at.message("rules").map(|rules| policies(&rules)).transpose()?,
        shadow: match at.message("shadow_rules") {
            Some(rules) => {
                let rules = policies(&rules)?;
                Some(shadow(
                    rules,
                    at.text("shadow_rules_stat_prefix"),
                    &stats,
                    registry,
                ))
            }
            None => None,
        },
        stats,
    })
}

fn shadow(rules: Policies, prefix: String, stats: &Arc<Scope>, registry: &Registry) -> Shadow {
    if prefix.is_empty() {
        return Shadow {
            rules,
            stats: Arc::clone(stats),
            members: [
                stats::Rbac::ShadowAllowed.into(),
                stats::Rbac::ShadowDenied.into(),
            ],
            prefix,
        };
    }
    let name = format!("{}.{}", stats.name(), prefix.trim_end_matches('.'));
    Shadow {
        rules,
        stats: registry.scope(&name, stats::RbacShadow::TABLE),
        members: [
            stats::RbacShadow::Allowed.into(),
            stats::RbacShadow::Denied.into(),
        ],
        prefix,
    }
}

fn policies(at: &At) -> Result<Policies> {
    let action = match at.choice("action").as_str() {
        "ALLOW" => Action::Allow,
        "DENY" => Action::Deny,
        // Envoy notes in metadata that a policy held; nothing here reads that, the counters are all there is.
        "LOG" => Action::Log,
        other => return Err(at.refuse("action", format!("{other} is not supported yet"))),
    };
    let mut policies = named(at, "policies");
    policies.sort_by(|a, b| a.0.cmp(&b.0));
    let policies = policies
        .iter()
        .map(|(name, at)| policy(name, at))
        .collect::<Result<_>>()?;
    Ok(Policies { action, policies })
}

/// The messages of a `map<string, …>` field.
pub(super) fn named(at: &At, field: &str) -> Vec<(String, At)> {
    let mut out = Vec::new();
    if let Some(Value::Map(items)) = at.message.get_field_by_name(field).as_deref() {
        for (key, value) in items {
            if let (Some(key), Value::Message(message)) = (key.as_str(), value) {
                let path = format!("{}[{key}]", at.path_of(field));
                out.push((key.to_owned(), At::new(message.clone(), path)));
            }
        }
    }
    out
}

fn policy(name: &str, at: &At) -> Result<Policy> {
    let joined: String = name.split_whitespace().collect::<Vec<_>>().join("_");
    let rules = |field: &str, rule: fn(&At) -> Result<Rule>| -> Result<Vec<Rule>> {
        let list = at.messages(field);
        if list.is_empty() {
            return Err(at.refuse(field, "at least one must be given"));
        }
        list.iter().map(rule).collect()
    };
    Ok(Policy {
        name: name.to_owned(),
        details: format!("rbac_access_denied_matched_policy[{joined}]"),
        permissions: rules("permissions", permission)?,
        principals: rules("principals", principal)?,
    })
}

fn set(at: &At, field: &str, rule: fn(&At) -> Result<Rule>) -> Result<Vec<Rule>> {
    at.messages(field).iter().map(rule).collect()
}

fn permission(at: &At) -> Result<Rule> {
    if let Some(rules) = at.message("and_rules") {
        return Ok(Rule::And(set(&rules, "rules", permission)?));
    }
    if let Some(rules) = at.message("or_rules") {
        return Ok(Rule::Or(set(&rules, "rules", permission)?));
    }
    if let Some(rule) = at.message("not_rule") {
        return Ok(Rule::Not(Box::new(permission(&rule)?)));
    }
    if let Some(ip) = at.message("destination_ip") {
        return Ok(Rule::DestinationIp(cidr(&ip)?));
    }
    if at.has("destination_port") {
        let port = i64::from(at.number_or("destination_port", 0));
        return Ok(Rule::DestinationPort(port, port + 1));
    }
    if let Some(range) = at.message("destination_port_range") {
        return Ok(Rule::DestinationPort(range.signed("start"), range.signed("end")));
    }
    if let Some(name) = at.message("requested_server_name") {
        return Ok(Rule::ServerName(string_match(&name)?));
    }
    if let Some(template) = at.message("uri_template") {
        return uri_template(&template);
    }
    either(at)?.ok_or_else(|| at.refuse("", "a permission must say what is permitted"))
}

fn principal(at: &At) -> Result<Rule> {
    if let Some(ids) = at.message("and_ids") {
        return Ok(Rule::And(set(&ids, "ids", principal)?));
    }
    if let Some(ids) = at.message("or_ids") {
        return Ok(Rule::Or(set(&ids, "ids", principal)?));
    }
    if let Some(id) = at.message("not_id") {
        return Ok(Rule::Not(Box::new(principal(&id)?)));
    }
    if let Some(authenticated) = at.message("authenticated") {
        let name = authenticated.message("principal_name");
        return Ok(Rule::Authenticated(name.map(|n| string_match(&n)).transpose()?));
    }
    if let Some(ip) = at.message("direct_remote_ip") {
        return Ok(Rule::DirectRemoteIp(cidr(&ip)?));
    }
    // The deprecated one is the connection's, which a PROXY header changes, in Envoy as here.
    if let Some(ip) = at.message("source_ip") {
        return Ok(Rule::SourceIp(cidr(&ip)?));
    }
    if let Some(ip) = at.message("remote_ip") {
        return Ok(Rule::RemoteIp(cidr(&ip)?));
    }
    either(at)?.ok_or_else(|| at.refuse("", "a principal must say who it is"))
}

/// What permissions and principals both have.
fn either(at: &At) -> Result<Option<Rule>> {
    if at.flag("any") == Some(true) {
        return Ok(Some(Rule::Any));
    }
    if let Some(header) = at.message("header") {
        return Ok(Some(Rule::Header(header_match(&header)?)));
    }
    if let Some(metadata) = at.message("metadata") {
        return claim(&metadata).map(Some);
    }
    if let Some(path) = at.message("url_path").and_then(|p| p.message("path")) {
        return Ok(Some(Rule::Path(string_match(&path)?)));
    }
    Ok(None)
}

/// `MetadataMatcher`, where the metadata is a token's claims.
fn claim(at: &At) -> Result<Rule> {
    const CLAIMS: &str = "envoy.filters.http.jwt_authn";
    let filter = at.text("filter");
    if filter != CLAIMS {
        return Err(at.refuse(
            "filter",
            format!("{filter:?} is not supported yet, only {CLAIMS:?}"),
        ));
    }
    let path = at.messages("path");
    let path = path.iter().map(|segment| segment.required_text("key"));
    let path = path.collect::<Result<Vec<_>>>()?;
    let Some(value) = at.message("value").filter(|_| !path.is_empty()) else {
        return Err(at.refuse("", "path and value must be given"));
    };
    let rule = Rule::Claim(path, value_match(&value)?);
    Ok(if at.flag("invert") == Some(true) {
        Rule::Not(Box::new(rule))
    } else {
        rule
    })
}

/// `ValueMatcher`.
pub(super) fn value_match(at: &At) -> Result<ClaimMatch> {
    if let Some(text) = at.message("string_match") {
        return Ok(ClaimMatch::Text(string_match(&text)?));
    }
    if at.has("bool_match") {
        return Ok(ClaimMatch::Bool(at.flag("bool_match").unwrap_or(false)));
    }
    if at.has("present_match") {
        return Ok(ClaimMatch::Present(at.flag("present_match").unwrap_or(false)));
    }
    if let Some(one) = at.message("list_match").and_then(|list| list.message("one_of")) {
        return Ok(ClaimMatch::OneOf(Box::new(value_match(&one)?)));
    }
    if let Some(any) = at.message("or_match") {
        let any = any.messages("value_matchers");
        return Ok(ClaimMatch::Any(
            any.iter().map(value_match).collect::<Result<_>>()?,
        ));
    }
    Err(at.refuse("", "a rule on a value must be given"))
}

/// `*` is one segment of the path, `**` any number of them.
fn uri_template(at: &At) -> Result<Rule> {
    const SEGMENT: &str = r"[a-zA-Z0-9\-._~%!$&'()+,;:@]";
    let Some(config) = at.any("typed_config")? else {
        return Err(at.refuse("typed_config", "must be given"));
    };
    let template = config.required_text("path_template")?;
    let mut pattern = String::new();
    let mut rest = template.as_str();
    while let Some(star) = rest.find('*') {
        pattern.push_str(&regex::escape(&rest[..star]));
        rest = &rest[star..];
        if let Some(after) = rest.strip_prefix("**") {
            pattern.push_str(&SEGMENT.replace("@]", "@/]*"));
            rest = after;
        } else {
            pattern.push_str(&format!("{SEGMENT}+"));
            rest = &rest[1..];
        }
    }
    pattern.push_str(&regex::escape(rest));
    if !template.starts_with('/') || template.contains(['{', '}', '=']) {
        return Err(config.refuse("path_template", "only / with * and ** segments is supported yet"));
    }
    re2::whole(&pattern)
        .map(Rule::Template)
        .map_err(|e| config.refuse("path_template", e))
}

/// A prefix of addresses.
fn cidr(at: &At) -> Result<ipnet::IpNet> {
    let ip: IpAddr = at
        .text("address_prefix")
        .parse()
        .map_err(|_| at.refuse("address_prefix", "must be an IP address"))?;
    let length = u8::try_from(at.number_or("prefix_len", 0)).unwrap_or(u8::MAX);
    let net = ipnet::IpNet::new(ip, length).map_err(|e| at.refuse("prefix_len", e.to_string()))?;
    Ok(net.trunc())
}
