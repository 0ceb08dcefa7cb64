//! Listeners: what they are for, which connections go to which chain, and what each chain carries.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use prost_reflect::{DynamicMessage, ReflectMessage as _, Value};

use super::walk::Walk;
use crate::ir::{ChainMatch, Detection, FilterChain, Listener, PortSet, Role};
use crate::schema::{At, ConfigError};

const CHAIN: &str = "envoy.config.listener.v3.FilterChain";
const TLS_INSPECTOR: &str = "envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector";
const HTTP_INSPECTOR: &str = "envoy.extensions.filters.listener.http_inspector.v3.HttpInspector";
const ORIGINAL_DST: &str = "envoy.extensions.filters.listener.original_dst.v3.OriginalDst";

/// Fields that have their effect here, or none in a shared proxy.
const READ: &[&str] = &[
    "name",
    "address",
    "additional_addresses",
    "filter_chains",
    "default_filter_chain",
    "listener_filters",
    "listener_filters_timeout",
    "continue_on_listener_filters_timeout",
    "traffic_direction",
    "use_original_dst",
    "bind_to_port",
];

/// Fields that would change which connections go where.
const REFUSED: &[&str] = &[
    "filter_chain_matcher",
    "fcds_config",
    "udp_listener_config",
    "api_listener",
    "internal_listener",
];

pub(super) fn read(
    name: &str,
    message: DynamicMessage,
    walk: &mut Walk<'_>,
) -> Result<Listener, ConfigError> {
    let at = At::new(message, "");
    for unknown in at.message.unknown_fields() {
        walk.notes.push((
            String::new(),
            format!(
                "unknown field number {} of envoy.config.listener.v3.Listener",
                unknown.number()
            ),
        ));
    }
    for (field, _) in at.message.fields() {
        if REFUSED.contains(&field.name()) {
            return Err(at.refuse(field.name(), "is not supported yet"));
        }
        if !READ.contains(&field.name()) {
            walk.note(
                field.name(),
                "belongs to the sidecar's own listener and is not carried over",
            );
        }
    }
    let addresses = addresses(&at)?;
    let role = role(&at);
    let mut chains = Vec::new();
    for (index, chain) in at.messages("filter_chains").into_iter().enumerate() {
        chains.push(read_chain(&chain, &format!("chain-{index}"), walk)?);
    }
    let default_chain = match at.message("default_filter_chain") {
        Some(chain) => Some(read_chain(&chain, "default", walk)?),
        None => None,
    };
    Ok(Listener {
        name: name.to_owned(),
        role,
        addresses,
        chains,
        default_chain,
        detection: detection(&at)?,
    })
}

fn role(at: &At) -> Role {
    let outbound = at.choice("traffic_direction") == "OUTBOUND";
    let original_dst = at.flag("use_original_dst") == Some(true) || at.text("name") == "virtualInbound";
    let binds = at.flag("bind_to_port") != Some(false);
    match (original_dst, outbound, binds) {
        (true, true, _) => Role::CatchAll,
        (true, false, _) => Role::Inbound,
        (false, true, false) => Role::Outbound,
        (false, ..) => Role::OwnPort,
    }
}

fn addresses(at: &At) -> Result<Vec<SocketAddr>, ConfigError> {
    let mut found = Vec::new();
    if let Some(address) = at.message("address") {
        found.push(address);
    }
    for more in at.messages("additional_addresses") {
        found.extend(more.message("address"));
    }
    if found.is_empty() {
        return Err(at.refuse("address", "must be given"));
    }
    found.iter().map(socket_address).collect()
}

fn socket_address(at: &At) -> Result<SocketAddr, ConfigError> {
    let Some(socket) = at.message("socket_address") else {
        return Err(at.refuse("", "only socket addresses are supported yet"));
    };
    let ip: IpAddr = socket
        .text("address")
        .parse()
        .map_err(|_| socket.refuse("address", "must be an IP address"))?;
    let port = socket
        .number("port_value")
        .and_then(|port| u16::try_from(port).ok());
    let port = port.ok_or_else(|| socket.refuse("port_value", "must be a port"))?;
    if socket.choice("protocol") == "UDP" {
        return Err(socket.refuse("protocol", "UDP is not supported yet"));
    }
    Ok(SocketAddr::new(ip, port))
}

fn read_chain(at: &At, place: &str, walk: &mut Walk<'_>) -> Result<FilterChain, ConfigError> {
    let matches = match at.message("filter_chain_match") {
        Some(matches) => read_match(&matches)?,
        None => ChainMatch::default(),
    };
    let mut body = at.message.clone();
    body.clear_field_by_name("filter_chain_match");
    body.clear_field_by_name("name");
    let content = walk.content(&mut body, CHAIN, &at.path)?;
    if let Some(Value::List(filters)) = body.get_field_by_name("filters").as_deref()
        && filters.is_empty()
    {
        return Err(at.refuse("filters", "nothing is left of them"));
    }
    let name = at.text("name");
    Ok(FilterChain {
        name: if name.is_empty() { place.to_owned() } else { name },
        matches,
        content,
        stateful: walk.stateful,
    })
}

fn read_match(at: &At) -> Result<ChainMatch, ConfigError> {
    const KNOWN: &[&str] = &[
        "destination_port",
        "prefix_ranges",
        "server_names",
        "transport_protocol",
        "application_protocols",
    ];
    if let Some(unknown) = at.message.unknown_fields().next() {
        let what = format!(
            "unknown field number {} of {}",
            unknown.number(),
            at.message.descriptor().full_name()
        );
        return Err(at.refuse("", what));
    }
    for (field, _) in at.message.fields() {
        if !KNOWN.contains(&field.name()) {
            return Err(at.refuse(field.name(), "is not supported in a chain's match yet"));
        }
    }
    let destination_port = match at.number("destination_port") {
        None => None,
        Some(port) => match u16::try_from(port) {
            Ok(port) if port > 0 => Some(port),
            _ => return Err(at.refuse("destination_port", "must be a port")),
        },
    };
    let mut prefixes = Vec::new();
    for range in at.messages("prefix_ranges") {
        prefixes.push(read_prefix(&range)?);
    }
    let mut server_names = Vec::new();
    for (index, name) in at.texts("server_names").into_iter().enumerate() {
        let name = name.to_ascii_lowercase();
        let rest = name.strip_prefix("*.").unwrap_or(&name);
        if rest.is_empty() || rest.contains('*') {
            return Err(at.refuse(
                &format!("server_names[{index}]"),
                "only a leading `*.` may be a wildcard",
            ));
        }
        server_names.push(name);
    }
    let transport = Some(at.text("transport_protocol")).filter(|t| !t.is_empty());
    if let Some(other) = transport
        .as_deref()
        .filter(|t| !matches!(*t, "tls" | "raw_buffer"))
    {
        return Err(at.refuse("transport_protocol", format!("{other:?} is not supported yet")));
    }
    let alpn = at.texts("application_protocols");
    if alpn
        .iter()
        .any(|protocol| protocol.is_empty() || protocol.contains(['\'', ',']))
    {
        return Err(at.refuse(
            "application_protocols",
            "a protocol is empty or has a quote or comma in it",
        ));
    }
    Ok(ChainMatch {
        destination_port,
        prefixes,
        server_names,
        transport,
        alpn,
    })
}

fn read_prefix(at: &At) -> Result<IpNet, ConfigError> {
    let address: IpAddr = at
        .text("address_prefix")
        .parse()
        .map_err(|_| at.refuse("address_prefix", "must be an IP address"))?;
    let length = u8::try_from(at.number("prefix_len").unwrap_or(0)).unwrap_or(u8::MAX);
    let net =
        IpNet::new(address, length).map_err(|_| at.refuse("prefix_len", "is longer than the address"))?;
    Ok(net.trunc())
}

fn detection(at: &At) -> Result<Detection, ConfigError> {
    let timeout = match at.duration("listener_filters_timeout")? {
        Some(zero) if zero.is_zero() => None,
        Some(some) => Some(some),
        None => Some(std::time::Duration::from_secs(15)), // Envoy's default
    };
    let mut detection = Detection {
        tls: PortSet::none(),
        http: PortSet::none(),
        timeout,
        continue_on_timeout: at.flag("continue_on_listener_filters_timeout") == Some(true),
    };
    for filter in at.messages("listener_filters") {
        let Some(config) = filter.any("typed_config")? else {
            return Err(filter.refuse("typed_config", "must be given"));
        };
        let enabled = match filter.message("filter_disabled") {
            Some(disabled) => ports(&disabled, 0)?.complement(),
            None => PortSet::all(),
        };
        match config.type_name().as_str() {
            TLS_INSPECTOR => detection.tls = enabled,
            HTTP_INSPECTOR => detection.http = enabled,
            ORIGINAL_DST => {}
            other => {
                return Err(filter.refuse(
                    "typed_config",
                    format!("listener filter {other} is not supported yet"),
                ));
            }
        }
    }
    Ok(detection)
}

/// The ports for which a listener filter's predicate holds.
fn ports(at: &At, depth: usize) -> Result<PortSet, ConfigError> {
    if depth > 32 {
        return Err(at.refuse("", "nests too deep"));
    }
    if let Some(unknown) = at.message.unknown_fields().next() {
        return Err(at.refuse(
            "",
            format!("unknown field number {} of {}", unknown.number(), at.type_name()),
        ));
    }
    if at.flag("any_match") == Some(true) {
        return Ok(PortSet::all());
    }
    if let Some(range) = at.message("destination_port_range") {
        let bound =
            |field| u32::try_from(range.signed(field)).map_err(|_| range.refuse(field, "must be a port"));
        let mut set = PortSet::none();
        set.insert_range(bound("start")?, bound("end")?);
        return Ok(set);
    }
    if let Some(inner) = at.message("not_match") {
        return Ok(ports(&inner, depth + 1)?.complement());
    }
    if let Some(rules) = at.message("or_match") {
        let mut all = PortSet::none();
        for rule in rules.messages("rules") {
            all = all.union(&ports(&rule, depth + 1)?);
        }
        return Ok(all);
    }
    if let Some(rules) = at.message("and_match") {
        let mut all = PortSet::all();
        for rule in rules.messages("rules") {
            all = all.intersection(&ports(&rule, depth + 1)?);
        }
        return Ok(all);
    }
    Err(at.refuse("", "is a predicate that is not supported yet"))
}
