//! Clusters.

use prost_reflect::{DynamicMessage, Value};

use super::text;
use super::walk::Walk;
use crate::ir::Cluster;
use crate::schema::{At, ConfigError};

const TYPE: &str = "envoy.config.cluster.v3.Cluster";

/// Source addresses by which a sidecar tells its own connections apart. There is no sidecar.
const SIDECAR_SOURCE: [&str; 2] = ["127.0.0.6", "::6"];

pub(super) fn read(
    name: &str,
    mut message: DynamicMessage,
    walk: &mut Walk<'_>,
) -> Result<Cluster, ConfigError> {
    let at = At::new(message.clone(), "");
    let kind = at.choice("type");
    let endpoints = match at.message("eds_cluster_config") {
        Some(eds) => Some(endpoints_name(name, &eds)?),
        None if kind == "EDS" => return Err(at.refuse("eds_cluster_config", "must be given for type EDS")),
        None => None,
    };
    let stateful = limits_one_proxy(&at, &kind);
    message.clear_field_by_name("name");
    if let Some(Value::Message(eds)) = message.get_field_by_name_mut("eds_cluster_config") {
        eds.clear_field_by_name("service_name");
    }
    if endpoints.is_none() {
        message.clear_field_by_name("eds_cluster_config");
    }
    if sidecar_source(&at) {
        message.clear_field_by_name("upstream_bind_config");
        walk.note("upstream_bind_config", "the sidecar's source address is not used");
    }
    let content = walk.content(&mut message, TYPE, "")?;
    Ok(Cluster {
        name: name.to_owned(),
        content,
        endpoints,
        stateful,
    })
}

fn endpoints_name(name: &str, eds: &At) -> Result<String, ConfigError> {
    let ads = eds.message("eds_config").is_some_and(|source| source.has("ads"));
    if !ads {
        return Err(eds.refuse("eds_config", "endpoints come by ADS only"));
    }
    let service = text(&eds.message, "service_name");
    Ok(if service.is_empty() {
        name.to_owned()
    } else {
        service
    })
}

fn sidecar_source(at: &At) -> bool {
    at.message("upstream_bind_config")
        .and_then(|bind| bind.message("source_address"))
        .is_some_and(|source| SIDECAR_SOURCE.contains(&text(&source.message, "address").as_str()))
}

/// Whether the cluster limits or judges by what one proxy sees. Envoy's limits count per cluster, Istio's are meant per pod; without
/// any threshold Envoy has limits of its own. A cluster that can have no endpoint limits nothing.
fn limits_one_proxy(at: &At, kind: &str) -> bool {
    if kind == "STATIC" && !at.has("load_assignment") {
        return false;
    }
    if at.has("outlier_detection") {
        return true;
    }
    let Some(breakers) = at.message("circuit_breakers") else {
        return true;
    };
    let thresholds = breakers.messages("thresholds");
    let unlimited = |threshold: &At| {
        let limits = [
            "max_connections",
            "max_pending_requests",
            "max_requests",
            "max_retries",
        ];
        limits
            .iter()
            .all(|limit| threshold.number(limit) == Some(u64::from(u32::MAX)))
            && !threshold.has("retry_budget")
            && !threshold.has("max_connection_pools")
    };
    breakers.has("per_host_thresholds")
        || !thresholds.iter().any(|t| t.choice("priority") == "DEFAULT")
        || !thresholds.iter().all(unlimited)
}
