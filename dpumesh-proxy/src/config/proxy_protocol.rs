//! PROXY headers: the listener filter that takes them, the transport socket that puts them on.

use std::sync::Arc;

use prost_reflect::Value;

use super::schema::At;
use super::translate::{Context, Result, Way};
use crate::proxy_protocol::{Inbound, Outbound, Passed, Version};
use crate::stats::{ProxyProtocol, ProxyProtocolVersion, Registry};

pub(super) const LISTENER_FILTER: &str = "envoy.extensions.filters.listener.proxy_protocol.v3.ProxyProtocol";

const TRANSPORT: &str = "envoy.extensions.transport_sockets.proxy_protocol.v3.ProxyProtocolUpstreamTransport";

/// The most octets of TLVs that a header is given by configuration.
const MOST_ADDED: usize = 4096;

/// `envoy.filters.listener.proxy_protocol`; without a configuration, of its defaults.
pub(super) fn inbound(at: Option<&At>, registry: &Registry) -> Result<Inbound> {
    let prefix = at.map(|at| at.text("stat_prefix")).filter(|p| !p.is_empty());
    let scope = match prefix {
        Some(prefix) => format!("proxy_proto.{prefix}"),
        None => "proxy_proto".to_owned(),
    };
    let of = |version| {
        let name = format!("{scope}.versions.{version}");
        registry.scope(&name, ProxyProtocolVersion::TABLE)
    };
    Ok(Inbound {
        optional: at
            .and_then(|at| at.flag("allow_requests_without_proxy_protocol"))
            .unwrap_or(false),
        refused: at
            .map(|at| versions(at, "disallowed_versions"))
            .unwrap_or_default(),
        kept: match at {
            Some(at) => passed(at)?,
            None => Passed::None,
        },
        stats: registry.scope(&scope, ProxyProtocol::TABLE),
        versions: [of("v1"), of("v2")],
    })
}

fn versions(at: &At, field: &str) -> Vec<Version> {
    let named = at.message.get_field_by_name(field);
    let Some(Value::List(named)) = named.as_deref() else {
        return Vec::new();
    };
    let version = |value: &Value| match value.as_enum_number() {
        Some(1) => Version::V2,
        _ => Version::V1,
    };
    named.iter().map(version).collect()
}

/// `pass_through_tlvs`
fn passed(at: &At) -> Result<Passed> {
    let Some(tlvs) = at.message("pass_through_tlvs") else {
        return Ok(Passed::None);
    };
    if tlvs.choice("match_type") == "INCLUDE_ALL" {
        return Ok(Passed::All);
    }
    let types = tlvs.numbers("tlv_type").into_iter().map(u8::try_from);
    let types = types.collect::<std::result::Result<_, _>>();
    Ok(Passed::Types(
        types.map_err(|_| tlvs.refuse("tlv_type", "must be at most 255"))?,
    ))
}

impl Context<'_> {
    /// A cluster's `TransportSocket`: a PROXY header and what stands behind it, or that alone.
    pub(super) fn way(&self, socket: &At, scope: &str) -> Result<Way> {
        let Some(config) = socket
            .any("typed_config")?
            .filter(|config| config.type_name() == TRANSPORT)
        else {
            return Ok(Way {
                tls: self.client_context(socket, scope)?,
                header: None,
            });
        };
        let Some(behind) = config.message("transport_socket") else {
            return Err(config.refuse("transport_socket", "must be given"));
        };
        Ok(Way {
            tls: self.client_context(&behind, scope)?,
            header: Some(Arc::new(outbound(&config)?)),
        })
    }
}

fn outbound(at: &At) -> Result<Outbound> {
    let Some(config) = at.message("config") else {
        return Ok(Outbound {
            version: Version::V1,
            passed: Passed::None,
            added: Vec::new(),
        });
    };
    let version = if config.choice("version") == "V2" {
        Version::V2
    } else {
        Version::V1
    };
    let (mut added, mut kinds) = (Vec::new(), Vec::new());
    for tlv in config.messages("added_tlvs") {
        let kind = u8::try_from(tlv.number_or("type", 0));
        let kind = kind.map_err(|_| tlv.refuse("type", "must be at most 255"))?;
        if kinds.contains(&kind) {
            return Err(tlv.refuse("type", "appears twice"));
        }
        kinds.push(kind);
        let value = tlv.bytes("value");
        let length = u16::try_from(value.len())
            .ok()
            .filter(|_| added.len() + value.len() <= MOST_ADDED);
        let Some(length) = length else {
            let most = format!("all together must be at most {MOST_ADDED} octets");
            return Err(tlv.refuse("value", most));
        };
        added.push(kind);
        added.extend_from_slice(&length.to_be_bytes());
        added.extend_from_slice(&value);
    }
    let passed = passed(&config)?;
    if version == Version::V1 && (passed != Passed::None || !added.is_empty()) {
        return Err(config.refuse("version", "TLVs go with V2 only"));
    }
    Ok(Outbound {
        version,
        passed,
        added,
    })
}
