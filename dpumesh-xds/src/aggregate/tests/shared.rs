//! What the shared proxy does with the emitted resources: the matcher tree of the xDS API, walked over the protobuf messages
//! themselves.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use prost_reflect::DynamicMessage;

use super::{Connection, FirstOctets};
use crate::discovery::ResourceType;
use crate::schema::{self, At};
use crate::snapshot::Snapshot;

pub(super) struct Proxy {
    listeners: BTreeMap<String, At>,
    pub(super) clusters: BTreeMap<String, At>,
    pub(super) endpoints: BTreeMap<String, At>,
}

impl Proxy {
    pub(super) fn new(snapshot: &Snapshot) -> Self {
        let read = |kind: ResourceType| {
            let descriptor = schema::message(kind.message_name()).unwrap();
            let decode =
                |bytes: &[u8]| At::new(DynamicMessage::decode(descriptor.clone(), bytes).unwrap(), "");
            snapshot
                .of(kind)
                .map(|(name, p)| (name.clone(), decode(&p.resource.value)))
                .collect()
        };
        Self {
            listeners: read(ResourceType::Listener),
            clusters: read(ResourceType::Cluster),
            endpoints: read(ResourceType::Endpoints),
        }
    }

    /// The name of the chain that gets the connection.
    pub(super) fn chain(&self, listener: &str, c: &Connection) -> String {
        let listener = &self.listeners[listener];
        let seen = Seen::new(listener, c);
        let name = evaluate(&listener.message("filter_chain_matcher").unwrap(), &seen)
            .expect("every matcher has an on_no_match");
        assert_eq!(self.chains(listener, &name).len(), 1, "one chain of name {name}");
        name
    }

    pub(super) fn chain_names(&self, listener: &str) -> Vec<String> {
        self.listeners[listener]
            .messages("filter_chains")
            .iter()
            .map(|c| c.text("name"))
            .collect()
    }

    pub(super) fn filter_chain(&self, listener: &str, name: &str) -> At {
        self.chains(&self.listeners[listener], name).remove(0)
    }

    pub(super) fn chain_bytes(&self, listener: &str, name: &str) -> Vec<u8> {
        crate::translate::encode(&self.filter_chain(listener, name).message)
    }

    fn chains(&self, listener: &At, name: &str) -> Vec<At> {
        listener
            .messages("filter_chains")
            .into_iter()
            .filter(|c| c.text("name") == name)
            .collect()
    }
}

/// The inputs a matcher can ask for.
struct Seen {
    source: IpAddr,
    destination: IpAddr,
    port: u16,
    transport: &'static str,
    server_name: Option<String>,
    protocols: Option<String>,
}

impl Seen {
    fn new(listener: &At, c: &Connection) -> Self {
        let mut seen = Self {
            source: c.source,
            destination: c.destination,
            port: c.port,
            transport: "raw_buffer",
            server_name: None,
            protocols: None,
        };
        let quoted =
            |protocols: &[String]| (!protocols.is_empty()).then(|| format!("'{}'", protocols.join("','")));
        match &c.first_octets {
            FirstOctets::Tls {
                server_name,
                protocols,
            } if looks(listener, "tls_inspector", c.port) => {
                seen.transport = "tls";
                seen.server_name.clone_from(server_name);
                seen.protocols = quoted(protocols);
            }
            FirstOctets::Http(protocol) if looks(listener, "http_inspector", c.port) => {
                seen.protocols = quoted(&[(*protocol).to_owned()]);
            }
            _ => {}
        }
        seen
    }

    fn text(&self, input: &At) -> Option<String> {
        let kind = input.any("typed_config").unwrap().unwrap().type_name();
        match kind.rsplit('.').next().unwrap() {
            "SourceIPInput" => Some(self.source.to_string()),
            "DestinationIPInput" => Some(self.destination.to_string()),
            "DestinationPortInput" => Some(self.port.to_string()),
            "TransportProtocolInput" => Some(self.transport.to_owned()),
            "ServerNameInput" => self.server_name.clone(),
            "ApplicationProtocolInput" => self.protocols.clone(),
            other => panic!("input {other}"),
        }
    }
}

fn looks(listener: &At, name: &str, port: u16) -> bool {
    let filter = listener
        .messages("listener_filters")
        .into_iter()
        .find(|f| f.text("name").ends_with(name));
    filter.is_some_and(|filter| {
        filter
            .message("filter_disabled")
            .is_none_or(|off| !holds(&off, port))
    })
}

fn holds(predicate: &At, port: u16) -> bool {
    if let Some(range) = predicate.message("destination_port_range") {
        return (range.signed("start")..range.signed("end")).contains(&i64::from(port));
    }
    let rules = predicate
        .message("or_match")
        .expect("only ranges and their union are emitted");
    rules.messages("rules").iter().any(|rule| holds(rule, port))
}

fn evaluate(matcher: &At, seen: &Seen) -> Option<String> {
    let hit = if let Some(tree) = matcher.message("matcher_tree") {
        by_tree(&tree, seen)
    } else if let Some(list) = matcher.message("matcher_list") {
        let matchers = list.messages("matchers");
        let first = matchers
            .iter()
            .find(|m| predicate(&m.message("predicate").unwrap(), seen));
        first.map(|m| act(&m.message("on_match").unwrap(), seen))
    } else {
        None
    };
    // A nested matcher that finds nothing would have to fall through here; none may.
    match hit {
        Some(found) => Some(found.expect("nested matchers are total")),
        None => act(&matcher.message("on_no_match")?, seen),
    }
}

fn act(on_match: &At, seen: &Seen) -> Option<String> {
    if let Some(action) = on_match.message("action") {
        let value = action.any("typed_config").unwrap().unwrap();
        assert_eq!(value.type_name(), "google.protobuf.StringValue");
        return Some(value.text("value"));
    }
    evaluate(&on_match.message("matcher").unwrap(), seen)
}

fn by_tree(tree: &At, seen: &Seen) -> Option<Option<String>> {
    let value = seen.text(&tree.message("input").unwrap())?;
    if let Some(custom) = tree.message("custom_match") {
        return by_prefix(
            &custom.any("typed_config").unwrap().unwrap(),
            value.parse().unwrap(),
            seen,
        );
    }
    let map = tree.message("exact_match_map").unwrap();
    let entries = map.message.get_field_by_name("map").unwrap().into_owned();
    let on_match = entries
        .as_map()?
        .get(&prost_reflect::MapKey::String(value))?
        .as_message()?
        .clone();
    Some(act(&At::new(on_match, ""), seen))
}

fn by_prefix(matcher: &At, address: IpAddr, seen: &Seen) -> Option<Option<String>> {
    let mut best: Option<(u8, At)> = None;
    for range in matcher.messages("range_matchers") {
        for cidr in range.messages("ranges") {
            let length = u8::try_from(cidr.number("prefix_len").unwrap_or(0)).unwrap();
            let net = IpNet::new(cidr.text("address_prefix").parse().unwrap(), length).unwrap();
            if net.contains(&address) && best.as_ref().is_none_or(|(known, _)| *known < length) {
                best = Some((length, range.message("on_match").unwrap()));
            }
        }
    }
    best.map(|(_, on_match)| act(&on_match, seen))
}

fn predicate(at: &At, seen: &Seen) -> bool {
    if let Some(single) = at.message("single_predicate") {
        let Some(value) = seen.text(&single.message("input").unwrap()) else {
            return false;
        };
        let matching = single.message("value_match").unwrap();
        let (prefix, suffix, contains) = (
            matching.text("prefix"),
            matching.text("suffix"),
            matching.text("contains"),
        );
        assert!(!(prefix.is_empty() && suffix.is_empty() && contains.is_empty()));
        return value.starts_with(&prefix) && value.ends_with(&suffix) && value.contains(&contains);
    }
    let all = |field: &str| at.message(field).map(|list| list.messages("predicate"));
    if let Some(list) = all("or_matcher") {
        assert!(list.len() > 1, "Envoy wants two");
        return list.iter().any(|p| predicate(p, seen));
    }
    if let Some(list) = all("and_matcher") {
        assert!(list.len() > 1, "Envoy wants two");
        return list.iter().all(|p| predicate(p, seen));
    }
    !predicate(&at.message("not_matcher").unwrap(), seen)
}
