//! A [`Tree`] as the matcher tree of the xDS API, in its JSON form.
//!
//! Every matcher ends in `on_no_match`. Of a connection that offers protocols of two different groups, and first of all one that is in
//! neither, it is not decided which comes first: it is closed. (Mesh peers offer their own protocols first.)

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::tree::Tree;

/// The chain that closes every connection.
pub const DENY: &str = "deny";

/// The tree as a `Matcher`.
pub(super) fn matcher(tree: &Tree) -> Value {
    match tree {
        Tree::Chain(_) | Tree::Deny => json!({"on_no_match": on_match(tree)}),
        Tree::Ports { ports, other } => {
            let map = ports
                .iter()
                .map(|(port, tree)| (port.to_string(), on_match(tree)))
                .collect();
            exact("DestinationPortInput", map, other)
        }
        Tree::Destinations { groups, other } => prefixes("DestinationIPInput", groups, other),
        Tree::Sources { groups, other } => {
            let groups: Vec<(Vec<ipnet::IpNet>, &Tree)> = groups
                .iter()
                .map(|(addresses, tree)| (addresses.iter().map(|ip| ipnet::IpNet::from(*ip)).collect(), tree))
                .collect();
            prefixes_of("SourceIPInput", groups, other)
        }
        Tree::ServerNames {
            exact: names,
            below,
            other,
        } => {
            let rest = list(
                "ServerNameInput",
                below
                    .iter()
                    .map(|(suffix, tree)| (json!({"suffix": suffix}), tree)),
                other,
            );
            if names.is_empty() {
                return rest;
            }
            let map = names
                .iter()
                .map(|(name, tree)| (name.clone(), on_match(tree)))
                .collect();
            exact_or("ServerNameInput", map, &json!({"matcher": rest}))
        }
        Tree::Transport { tls, plain } => {
            let map = [("tls".to_owned(), on_match(tls))].into_iter().collect();
            exact("TransportProtocolInput", map, plain)
        }
        Tree::Protocols { groups, other } => protocols(groups, other),
    }
}

fn on_match(tree: &Tree) -> Value {
    let chain = match tree {
        Tree::Chain(name) => name,
        Tree::Deny => DENY,
        _ => return json!({"matcher": matcher(tree)}),
    };
    json!({"action": {"name": chain, "typed_config": {
        "@type": "type.googleapis.com/google.protobuf.StringValue", "value": chain}}})
}

fn input(kind: &str) -> Value {
    json!({"name": kind, "typed_config": {
        "@type": format!("type.googleapis.com/envoy.extensions.matching.common_inputs.network.v3.{kind}")}})
}

fn exact(kind: &str, map: Map<String, Value>, other: &Tree) -> Value {
    exact_or(kind, map, &on_match(other))
}

fn exact_or(kind: &str, map: Map<String, Value>, other: &Value) -> Value {
    if map.is_empty() {
        return json!({"on_no_match": other});
    }
    json!({"matcher_tree": {"input": input(kind), "exact_match_map": {"map": map}}, "on_no_match": other})
}

fn prefixes(kind: &str, groups: &[(Vec<ipnet::IpNet>, Tree)], other: &Tree) -> Value {
    prefixes_of(
        kind,
        groups.iter().map(|(nets, tree)| (nets.clone(), tree)).collect(),
        other,
    )
}

fn prefixes_of(kind: &str, groups: Vec<(Vec<ipnet::IpNet>, &Tree)>, other: &Tree) -> Value {
    if groups.is_empty() {
        return json!({"on_no_match": on_match(other)});
    }
    let range = |net: &ipnet::IpNet| json!({"address_prefix": net.addr().to_string(), "prefix_len": net.prefix_len()});
    let ranges: Vec<Value> = groups
        .iter()
        .map(|(nets, tree)| {
            let nets: Vec<Value> = nets.iter().map(range).collect();
            json!({"ranges": nets, "on_match": on_match(tree)})
        })
        .collect();
    json!({
        "matcher_tree": {"input": input(kind), "custom_match": {
            "name": "envoy.matching.custom_matchers.ip_range_matcher",
            "typed_config": {"@type": "type.googleapis.com/xds.type.matcher.v3.IPMatcher", "range_matchers": ranges}}},
        "on_no_match": on_match(other),
    })
}

fn single(kind: &str, value: Value) -> Value {
    json!({"single_predicate": {"input": input(kind), "value_match": value}})
}

fn list<'a>(kind: &str, cases: impl Iterator<Item = (Value, &'a Tree)>, other: &Tree) -> Value {
    let matchers: Vec<Value> = cases
        .map(|(value, tree)| json!({"predicate": single(kind, value), "on_match": on_match(tree)}))
        .collect();
    if matchers.is_empty() {
        return json!({"on_no_match": on_match(other)});
    }
    json!({"matcher_list": {"matchers": matchers}, "on_no_match": on_match(other)})
}

/// The input is the connection's protocols, each in quotes, with commas between them.
fn protocols(groups: &[(BTreeSet<String>, Tree)], other: &Tree) -> Value {
    const KIND: &str = "ApplicationProtocolInput";
    let first = |protocol: &String| single(KIND, json!({"prefix": format!("'{protocol}'")}));
    let among = |protocol: &String| single(KIND, json!({"contains": format!("'{protocol}'")}));
    let any_of = |predicates: Vec<Value>| match <[Value; 1]>::try_from(predicates) {
        Ok([only]) => only,
        Err(several) => json!({"or_matcher": {"predicate": several}}),
    };
    let mut matchers = Vec::new();
    if groups.len() > 1 {
        for (group, tree) in groups {
            let offered_first = any_of(group.iter().map(first).collect());
            matchers.push(json!({"predicate": offered_first, "on_match": on_match(tree)}));
        }
    }
    for (index, (group, tree)) in groups.iter().enumerate() {
        let offered = any_of(group.iter().map(among).collect());
        let others: Vec<Value> = groups
            .iter()
            .enumerate()
            .filter(|(at, _)| *at != index)
            .flat_map(|(_, (group, _))| group.iter().map(among))
            .collect();
        let predicate = if others.is_empty() {
            offered
        } else {
            json!({"and_matcher": {"predicate": [offered, {"not_matcher": any_of(others)}]}})
        };
        matchers.push(json!({"predicate": predicate, "on_match": on_match(tree)}));
    }
    if groups.len() > 1 {
        let all = any_of(
            groups
                .iter()
                .flat_map(|(group, _)| group.iter().map(among))
                .collect(),
        );
        matchers.push(json!({"predicate": all, "on_match": on_match(&Tree::Deny)}));
    }
    json!({"matcher_list": {"matchers": matchers}, "on_no_match": on_match(other)})
}
