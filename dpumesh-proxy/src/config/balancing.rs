//! What clusters, assignments and routes say of balancing into [`crate::balance`]'s forms.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;

use prost_reflect::Value;

use super::ConfigError;
use super::istio;
use super::model::{Balance, ClusterKind, Endpoint};
use super::re2;
use super::schema::At;
use super::translate::{Sockets, socket_address};
use crate::balance::policy::{By, Cookie, HashPolicy};
use crate::balance::subset::{Config as Subsets, Criteria, Fallback, Fields, Selector};
use crate::balance::{Locality, SlowStart, Spread};
use crate::health::{Eds, State};
use crate::route::is_value;

type Result<T> = std::result::Result<T, ConfigError>;

/// The metadata that subsets go by.
const SUBSET_METADATA: &str = "envoy.lb";

/// Largest ring, in points.
const LARGEST_RING: u64 = 8 * 1024 * 1024;

/// Largest table, in places.
const LARGEST_TABLE: u32 = 5_000_011;

/// How a cluster spreads its requests over the endpoints of `assignment`; its localities are empty yet.
pub(super) fn spread(at: &At, kind: &ClusterKind, assignment: Option<&At>) -> Result<Spread> {
    let common = at.message("common_lb_config");
    let panic = common.as_ref().and_then(|c| c.message("healthy_panic_threshold"));
    let panic_below = match panic {
        None => 50,
        Some(percent) => self::percent(&percent)?.round() as u32,
    };
    let policy = assignment.and_then(|a| a.message("policy"));
    let factor = policy.as_ref().and_then(|p| p.number("overprovisioning_factor"));
    if let (Some(0), Some(policy)) = (factor, &policy) {
        return Err(policy.refuse("overprovisioning_factor", "must be greater than 0"));
    }
    let subsets = match at.message("lb_subset_config") {
        Some(config) => subsets(&config)?.map(Arc::new),
        None => None,
    };
    let weighted = common.is_some_and(|c| c.has("locality_weighted_lb_config"));
    Ok(Spread {
        balance: balance(at, kind)?,
        panic_below,
        overprovisioning: factor.map_or(140, |f| u32::try_from(f).unwrap_or(u32::MAX)),
        weighted_availability: policy
            .and_then(|p| p.flag("weighted_priority_health"))
            .unwrap_or(false),
        // Subsets have no regard to localities (`locality_weight_aware` is refused).
        by_locality: weighted && subsets.is_none(),
        localities: Vec::new(),
        subsets,
        slow_start: slow_start(at)?,
    })
}

/// The slow start of the policy in use.
fn slow_start(at: &At) -> Result<Option<SlowStart>> {
    let config = match at.choice("lb_policy").as_str() {
        "ROUND_ROBIN" => at.message("round_robin_lb_config"),
        "LEAST_REQUEST" => at.message("least_request_lb_config"),
        _ => None,
    };
    let Some(at) = config.and_then(|c| c.message("slow_start_config")) else {
        return Ok(None);
    };
    let window = at.duration("slow_start_window")?.unwrap_or_default();
    let aggression = at.message("aggression").map(|a| double(&a, "default_value"));
    let aggression = aggression.unwrap_or(1.0);
    if !(aggression > 0.0 && aggression.is_finite()) {
        return Err(at.refuse("aggression.default_value", "must be greater than 0"));
    }
    let least = at
        .message("min_weight_percent")
        .map(|p| percent(&p))
        .transpose()?;
    Ok((!window.is_zero()).then_some(SlowStart {
        window,
        aggression,
        least: least.unwrap_or(10.0) / 100.0,
    }))
}

fn double(at: &At, field: &str) -> f64 {
    let value = at.message.get_field_by_name(field);
    value.and_then(|v| v.as_f64()).unwrap_or_default()
}

/// A `Percent`.
pub(super) fn percent(at: &At) -> Result<f64> {
    let value = double(at, "value");
    if (0.0..=100.0).contains(&value) {
        Ok(value)
    } else {
        Err(at.refuse("value", "must be between 0 and 100"))
    }
}

fn balance(at: &At, kind: &ClusterKind) -> Result<Balance> {
    let original = *kind == ClusterKind::OriginalDst;
    match at.choice("lb_policy").as_str() {
        "CLUSTER_PROVIDED" if original => Ok(Balance::Provided),
        "CLUSTER_PROVIDED" => Err(at.refuse("lb_policy", "CLUSTER_PROVIDED goes with ORIGINAL_DST only")),
        _ if original => Err(at.refuse(
            "lb_policy",
            "must be CLUSTER_PROVIDED for an ORIGINAL_DST cluster",
        )),
        "ROUND_ROBIN" => Ok(Balance::RoundRobin),
        "RANDOM" => Ok(Balance::Random),
        "LEAST_REQUEST" => Ok(Balance::LeastRequest),
        "RING_HASH" => ring(at.message("ring_hash_lb_config").as_ref()),
        "MAGLEV" => table(at.message("maglev_lb_config").as_ref()),
        other => Err(at.refuse("lb_policy", format!("{other} is not supported yet"))),
    }
}

fn ring(at: Option<&At>) -> Result<Balance> {
    let (mut least, mut most) = (1024, LARGEST_RING);
    if let Some(at) = at {
        if at.choice("hash_function") != "XX_HASH" {
            return Err(at.refuse("hash_function", "only XX_HASH is supported yet"));
        }
        for (field, size) in [
            ("minimum_ring_size", &mut least),
            ("maximum_ring_size", &mut most),
        ] {
            *size = at.number(field).unwrap_or(*size);
            if !(1..=LARGEST_RING).contains(size) {
                return Err(at.refuse(field, format!("must be between 1 and {LARGEST_RING}")));
            }
        }
        if least > most {
            return Err(at.refuse("minimum_ring_size", "must not be greater than maximum_ring_size"));
        }
    }
    Ok(Balance::RingHash { least, most })
}

fn table(at: Option<&At>) -> Result<Balance> {
    let Some(at) = at else {
        return Ok(Balance::Maglev { size: 65_537 });
    };
    let size = at.number_or("table_size", 65_537);
    if size > LARGEST_TABLE || !is_prime(size) {
        return Err(at.refuse(
            "table_size",
            format!("must be a prime number of at most {LARGEST_TABLE}"),
        ));
    }
    Ok(Balance::Maglev { size })
}

fn is_prime(number: u32) -> bool {
    let number = u64::from(number);
    number > 1 && (2..).take_while(|d| d * d <= number).all(|d| number % d != 0)
}

fn subsets(at: &At) -> Result<Option<Subsets>> {
    let mut selectors = Vec::new();
    for selector in at.messages("subset_selectors") {
        let mut keys = selector.texts("keys");
        keys.sort();
        keys.dedup();
        if keys.is_empty() {
            return Err(selector.refuse("keys", "must be given"));
        }
        let fallback = match selector.choice("fallback_policy").as_str() {
            "NO_FALLBACK" => Some(Fallback::None),
            "ANY_ENDPOINT" => Some(Fallback::Any),
            "DEFAULT_SUBSET" => Some(Fallback::Default),
            "KEYS_SUBSET" => Some(Fallback::Keys(fewer_keys(&selector, &keys)?)),
            _ => None,
        };
        if selector.has("fallback_keys_subset") && !matches!(fallback, Some(Fallback::Keys(_))) {
            return Err(selector.refuse("fallback_keys_subset", "goes with KEYS_SUBSET only"));
        }
        selectors.push(Selector { keys, fallback });
    }
    // Without selectors there is no subset to balance over, whatever else is said.
    if selectors.is_empty() {
        return Ok(None);
    }
    Ok(Some(Subsets {
        fallback: match at.choice("fallback_policy").as_str() {
            "ANY_ENDPOINT" => Fallback::Any,
            "DEFAULT_SUBSET" => Fallback::Default,
            _ => Fallback::None,
        },
        default_subset: at
            .message("default_subset")
            .map(|s| json_fields(&s))
            .unwrap_or_default(),
        selectors,
    }))
}

fn fewer_keys(selector: &At, keys: &[String]) -> Result<Vec<String>> {
    let fewer = selector.texts("fallback_keys_subset");
    let field = "fallback_keys_subset";
    if fewer.is_empty() {
        return Err(selector.refuse(field, "must be given for KEYS_SUBSET"));
    }
    if !fewer.iter().all(|key| keys.contains(key)) || fewer.len() >= keys.len() {
        return Err(selector.refuse(field, "must be some of the selector's keys, and not all"));
    }
    Ok(fewer)
}

/// What a `metadata_match` asks of endpoints, added to what `outer` asks.
pub(super) fn criteria(at: &At, outer: Option<&Criteria>) -> Option<Criteria> {
    let own = at
        .message("metadata_match")
        .map(|m| metadata(&m))
        .unwrap_or_default();
    let outer = outer.map(|c| c.fields().to_vec()).unwrap_or_default();
    Criteria::new(outer.into_iter().chain(own))
}

/// What a `Metadata` says for subsets.
fn metadata(at: &At) -> Vec<(String, String)> {
    let Some(Value::Map(map)) = at
        .message
        .get_field_by_name("filter_metadata")
        .map(|v| v.into_owned())
    else {
        return Vec::new();
    };
    let of_subsets = map
        .into_iter()
        .find(|(key, _)| key.as_str() == Some(SUBSET_METADATA));
    match of_subsets {
        Some((_, Value::Message(message))) => json_fields(&At::new(message, "")),
        _ => Vec::new(),
    }
}

/// The fields of a `google.protobuf.Struct`, sorted, values as JSON.
fn json_fields(at: &At) -> Vec<(String, String)> {
    let Some(Value::Map(map)) = at.message.get_field_by_name("fields").map(|v| v.into_owned()) else {
        return Vec::new();
    };
    let field = |(key, value): (prost_reflect::MapKey, Value)| {
        let json = serde_json::to_string(value.as_message()?).ok()?;
        Some((key.as_str()?.to_owned(), json))
    };
    let mut fields: Vec<_> = map.into_iter().filter_map(field).collect();
    fields.sort();
    fields
}

/// What is known of endpoints' health.
pub(super) struct States {
    /// Of those that were there before.
    pub(super) known: HashMap<SocketAddr, Arc<State>>,
    /// New ones are unhealthy until they have been checked.
    pub(super) checked: bool,
}

impl States {
    fn of(&self, address: SocketAddr) -> Arc<State> {
        match self.known.get(&address) {
            Some(state) => Arc::clone(state),
            None if self.checked => Arc::new(State::unchecked()),
            None => Arc::default(),
        }
    }
}

/// The endpoints of an assignment; their localities are added to `spread`.
pub(super) fn endpoints(
    assignment: &At,
    sockets: &Sockets,
    spread: &mut Spread,
    states: &States,
) -> Result<Vec<Endpoint>> {
    let mut endpoints = Vec::new();
    let mut seen = std::collections::HashSet::new();
    for locality in assignment.messages("endpoints") {
        let place = self::locality(&locality, spread)?;
        for entry in locality.messages("lb_endpoints") {
            let endpoint = entry.message("endpoint");
            let address = endpoint.as_ref().and_then(|e| e.message("address"));
            let (Some(endpoint), Some(address)) = (endpoint, address) else {
                return Err(entry.refuse("endpoint.address", "must be given"));
            };
            let weight = entry.number_or("load_balancing_weight", 1);
            if weight == 0 {
                return Err(entry.refuse("load_balancing_weight", "must be at least 1"));
            }
            let eds = match entry.choice("health_status").as_str() {
                "UNKNOWN" | "HEALTHY" => Eds::Healthy,
                "DEGRADED" => Eds::Degraded,
                "DRAINING" => Eds::Draining,
                _ => Eds::Unhealthy,
            };
            let address = socket_address(&address)?;
            let said: Arc<Fields> = entry
                .message("metadata")
                .map(|m| metadata(&m))
                .unwrap_or_default()
                .into();
            if seen.insert(address) {
                let way = sockets.of_endpoint(&entry);
                endpoints.push(Endpoint {
                    address,
                    weight,
                    eds,
                    locality: place,
                    tls: way.tls,
                    header: way.header,
                    hostname: endpoint.text("hostname"),
                    metadata: said,
                    check_port: check_port(&endpoint)?,
                    state: states.of(address),
                    workload: istio::workload(&entry),
                });
            }
        }
    }
    Ok(endpoints)
}

/// The port at which health checks ask, where it is another one.
fn check_port(endpoint: &At) -> Result<Option<u16>> {
    let Some(config) = endpoint.message("health_check_config") else {
        return Ok(None);
    };
    let port = u16::try_from(config.number_or("port_value", 0));
    let port = port.map_err(|_| config.refuse("port_value", "must be at most 65535"))?;
    Ok((port > 0).then_some(port))
}

/// The place of a locality; one that comes twice in a priority is one.
fn locality(at: &At, spread: &mut Spread) -> Result<u32> {
    let priority = at.number_or("priority", 0);
    if priority > 128 {
        return Err(at.refuse("priority", "must be at most 128"));
    }
    let name = at.message("locality");
    let part = |field: &str| name.as_ref().map(|n| n.text(field)).unwrap_or_default();
    let name = ["region", "zone", "sub_zone"].map(part);
    let known = |l: &Locality| l.priority == priority && l.name == name;
    let place = match spread.localities.iter().position(known) {
        Some(place) => place,
        None => {
            spread.localities.push(Locality {
                priority,
                weight: 0,
                name,
            });
            spread.localities.len() - 1
        }
    };
    if let Some(weight) = at.number("load_balancing_weight") {
        if weight == 0 {
            return Err(at.refuse("load_balancing_weight", "must be at least 1"));
        }
        spread.localities[place].weight = u32::try_from(weight).unwrap_or(u32::MAX);
    }
    Ok(place as u32)
}

/// `hash_policy` of a route.
pub(super) fn hash_policies(at: &At) -> Result<Vec<HashPolicy>> {
    let mut policies = Vec::new();
    for policy in at.messages("hash_policy") {
        let terminal = policy.flag("terminal").unwrap_or(false);
        let by = if let Some(header) = policy.message("header") {
            By::Header(header_name(&header)?, rewrite(&header)?)
        } else if let Some(cookie) = policy.message("cookie") {
            By::Cookie(self::cookie(&cookie)?)
        } else if let Some(connection) = policy.message("connection_properties") {
            if !connection.flag("source_ip").unwrap_or(false) {
                continue;
            }
            By::SourceIp
        } else if let Some(query) = policy.message("query_parameter") {
            By::Query(query.required_text("name")?.into_bytes())
        } else {
            return Err(policy.refuse(
                "",
                "header, cookie, connection_properties or query_parameter must be given",
            ));
        };
        policies.push(HashPolicy { by, terminal });
    }
    Ok(policies)
}

fn header_name(at: &At) -> Result<Vec<u8>> {
    Ok(at.required_text("header_name")?.to_ascii_lowercase().into_bytes())
}

fn rewrite(at: &At) -> Result<Option<(regex::bytes::Regex, Vec<u8>)>> {
    let Some(rewrite) = at.message("regex_rewrite") else {
        return Ok(None);
    };
    let Some(pattern) = rewrite.message("pattern") else {
        return Err(rewrite.refuse("pattern", "must be given"));
    };
    let regex = re2::part(&pattern.required_text("regex")?).map_err(|e| pattern.refuse("regex", e))?;
    let with = re2::replacement(&rewrite.text("substitution"), &regex)
        .map_err(|e| rewrite.refuse("substitution", e))?;
    Ok(Some((regex, with)))
}

fn cookie(at: &At) -> Result<Cookie> {
    let name = at.required_text("name")?;
    let mut attributes = String::new();
    let path = at.text("path");
    if !path.is_empty() {
        attributes.push_str(&format!("; Path={path}"));
    }
    for attribute in at.messages("attributes") {
        attributes.push_str(&format!("; {}", attribute.required_text("name")?));
        let value = attribute.text("value");
        if !value.is_empty() {
            attributes.push_str(&format!("={value}"));
        }
    }
    attributes.push_str("; HttpOnly");
    if !name.bytes().all(crate::http1::is_token) {
        return Err(at.refuse("name", "is not a valid cookie name"));
    }
    if !is_value(attributes.as_bytes()) {
        return Err(at.refuse("", "path and attributes must be valid in a header"));
    }
    Ok(Cookie {
        name: name.into_bytes(),
        ttl: at.duration("ttl")?.map(|ttl| ttl.as_secs()),
        attributes,
    })
}

/// Whether a TCP proxy's `hash_policy` goes by the client's address.
pub(super) fn hashes_source_ip(at: &At) -> Result<bool> {
    let policies = at.messages("hash_policy");
    if policies.len() > 1 {
        return Err(at.refuse("hash_policy", "at most one"));
    }
    if let Some(policy) = policies.first().filter(|p| !p.has("source_ip")) {
        return Err(policy.refuse("source_ip", "must be given"));
    }
    Ok(!policies.is_empty())
}
