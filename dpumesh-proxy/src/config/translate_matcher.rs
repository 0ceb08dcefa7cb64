//! `filter_chain_matcher` (`xds.type.matcher.v3.Matcher`) and `filter_disabled` into [`crate::listener`].

use std::collections::HashMap;

use prost_reflect::Value;

use super::schema::At;
use super::translate::{Result, cidr};
use super::translate_tls;
use crate::listener::PortRanges;
use crate::listener::matcher::{Input, Kind, Matcher, OnMatch, Predicate};

const INPUTS: &str = "envoy.extensions.matching.common_inputs.network.v3.";

/// How deep matchers may nest.
const MAX_DEPTH: usize = 32;

/// Compiles a tree; `chains` are the names that actions may have.
pub(super) fn matcher(at: &At, chains: &HashMap<String, usize>) -> Result<Matcher<usize>> {
    nested(at, chains, 0)
}

fn nested(at: &At, chains: &HashMap<String, usize>, depth: usize) -> Result<Matcher<usize>> {
    if depth > MAX_DEPTH {
        return Err(at.refuse("", "nested too deeply"));
    }
    let next = |on: &At| on_match(on, chains, depth);
    let kind = if let Some(list) = at.message("matcher_list") {
        let entry = |entry: At| {
            let Some(condition) = entry.message("predicate") else {
                return Err(entry.refuse("predicate", "must be given"));
            };
            Ok((predicate(&condition, 0)?, next(&required(&entry, "on_match")?)?))
        };
        Kind::List(
            list.messages("matchers")
                .into_iter()
                .map(entry)
                .collect::<Result<_>>()?,
        )
    } else if let Some(tree) = at.message("matcher_tree") {
        self::tree(&tree, &next)?
    } else {
        Kind::Nothing
    };
    let otherwise = at.message("on_no_match").map(|on| next(&on)).transpose()?;
    Ok(Matcher { kind, otherwise })
}

fn required(at: &At, field: &str) -> Result<At> {
    at.message(field).ok_or_else(|| at.refuse(field, "must be given"))
}

fn on_match(at: &At, chains: &HashMap<String, usize>, depth: usize) -> Result<OnMatch<usize>> {
    if let Some(matcher) = at.message("matcher") {
        return Ok(OnMatch::Matcher(Box::new(nested(&matcher, chains, depth + 1)?)));
    }
    let action = required(at, "action")?;
    let name = match action.any("typed_config")? {
        Some(value) if value.type_name() == "google.protobuf.StringValue" => value.text("value"),
        _ => {
            return Err(action.refuse(
                "typed_config",
                "must be a google.protobuf.StringValue, the chain's name",
            ));
        }
    };
    match chains.get(&name) {
        Some(index) => Ok(OnMatch::Action(*index)),
        None => Err(action.refuse("typed_config", format!("there is no filter chain {name:?}"))),
    }
}

fn input(at: &At) -> Result<Input> {
    let input = required(at, "input")?;
    let kind = input
        .any("typed_config")?
        .map(|c| c.type_name())
        .unwrap_or_default();
    match kind.strip_prefix(INPUTS).unwrap_or_default() {
        "DestinationPortInput" => Ok(Input::DestinationPort),
        "SourcePortInput" => Ok(Input::SourcePort),
        "DestinationIPInput" => Ok(Input::DestinationIp),
        "SourceIPInput" => Ok(Input::SourceIp),
        "DirectSourceIPInput" => Ok(Input::DirectSourceIp),
        "ServerNameInput" => Ok(Input::ServerName),
        "TransportProtocolInput" => Ok(Input::TransportProtocol),
        "ApplicationProtocolInput" => Ok(Input::ApplicationProtocol),
        _ => Err(input.refuse("typed_config", format!("{kind:?} is not an input this proxy has"))),
    }
}

type Next<'a> = &'a dyn Fn(&At) -> Result<OnMatch<usize>>;

fn tree(at: &At, next: Next<'_>) -> Result<Kind<usize>> {
    let input = input(at)?;
    if let Some(map) = at.message("exact_match_map") {
        let entries = entries(&map, next)?;
        if !matches!(input, Input::DestinationPort | Input::SourcePort) {
            return Ok(Kind::Exact(
                input,
                entries.into_iter().map(|(k, v)| (k.into(), v)).collect(),
            ));
        }
        let mut ports = HashMap::new();
        for (key, value) in entries {
            let port = key
                .parse()
                .map_err(|_| map.refuse("map", format!("{key:?} is no port")))?;
            ports.insert(port, value);
        }
        return Ok(Kind::Port(input, ports));
    }
    if let Some(map) = at.message("prefix_match_map") {
        let mut entries: Vec<(Box<str>, OnMatch<usize>)> = entries(&map, next)?
            .into_iter()
            .map(|(k, v)| (k.into(), v))
            .collect();
        entries.sort_by_key(|(key, _)| std::cmp::Reverse(key.len()));
        return Ok(Kind::Prefix(input, entries));
    }
    let custom = required(at, "custom_match")?;
    let Some(ranges) = custom
        .any("typed_config")?
        .filter(|c| c.type_name() == "xds.type.matcher.v3.IPMatcher")
    else {
        return Err(custom.refuse(
            "typed_config",
            "only xds.type.matcher.v3.IPMatcher is supported yet",
        ));
    };
    if !matches!(input, Input::DestinationIp | Input::SourceIp) {
        return Err(at.refuse("input", "ip_range_matcher goes with an address"));
    }
    let mut groups = Vec::new();
    for range in ranges.messages("range_matchers") {
        if range.flag("exclusive") == Some(true) {
            return Err(range.refuse("exclusive", "true is not supported yet"));
        }
        let nets = range
            .messages("ranges")
            .iter()
            .map(cidr)
            .collect::<Result<Vec<_>>>()?;
        groups.push((nets, next(&required(&range, "on_match")?)?));
    }
    Ok(Matcher::ranges(input, groups))
}

/// The entries of a `MatchMap`.
fn entries(at: &At, next: Next<'_>) -> Result<Vec<(String, OnMatch<usize>)>> {
    let value = at.message.get_field_by_name("map");
    let Some(Value::Map(map)) = value.as_deref() else {
        return Ok(Vec::new());
    };
    let mut entries = Vec::new();
    for (key, value) in map {
        let (Some(key), Value::Message(on)) = (key.as_str(), value) else {
            continue;
        };
        let on = At::new(on.clone(), format!("{}[{key}]", at.path_of("map")));
        entries.push((key.to_owned(), next(&on)?));
    }
    Ok(entries)
}

fn predicate(at: &At, depth: usize) -> Result<Predicate> {
    if depth > MAX_DEPTH {
        return Err(at.refuse("", "nested too deeply"));
    }
    let all = |list: &At| {
        list.messages("predicate")
            .iter()
            .map(|p| predicate(p, depth + 1))
            .collect::<Result<Vec<_>>>()
    };
    if let Some(single) = at.message("single_predicate") {
        let value = required(&single, "value_match")?;
        return Ok(Predicate::Single(input(&single)?, translate_tls::text(&value)?));
    }
    if let Some(or) = at.message("or_matcher") {
        return Ok(Predicate::Or(all(&or)?));
    }
    if let Some(and) = at.message("and_matcher") {
        return Ok(Predicate::And(all(&and)?));
    }
    let not = required(at, "not_matcher")?;
    Ok(Predicate::Not(Box::new(predicate(&not, depth + 1)?)))
}

/// `ListenerFilter.filter_disabled`, as far as it is about destination ports.
pub(super) fn disabled(filter: &At) -> Result<PortRanges> {
    let mut disabled = Vec::new();
    if let Some(rule) = filter.message("filter_disabled") {
        ranges(&rule, &mut disabled, 0)?;
    }
    Ok(PortRanges { disabled })
}

fn ranges(rule: &At, into: &mut Vec<std::ops::Range<u32>>, depth: usize) -> Result<()> {
    if let Some(range) = rule.message("destination_port_range") {
        let bound = |field: &str| u32::try_from(range.signed(field)).unwrap_or_default();
        into.push(bound("start")..bound("end"));
        return Ok(());
    }
    if rule.flag("any_match") == Some(true) {
        into.push(0..65_536);
        return Ok(());
    }
    let Some(or) = rule.message("or_match").filter(|_| depth < MAX_DEPTH) else {
        return Err(rule.refuse(
            "",
            "only destination_port_range, or_match and any_match are supported yet",
        ));
    };
    or.messages("rules")
        .iter()
        .try_for_each(|rule| ranges(rule, into, depth + 1))
}
