//! Where one resource names another, as one table; and the renaming of such names.

use std::collections::BTreeMap;

use prost_reflect::{DynamicMessage, ReflectMessage as _, Value};

use super::{open, pack, sealed};
use crate::ir::{Content, References};
use crate::schema;

/// What a field names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Names {
    Cluster,
    Route,
}

/// Fields that name a cluster or a route configuration, by message.
pub(super) const TABLE: &[(&str, &str, Names)] = &[
    (
        "envoy.config.core.v3.GrpcService.EnvoyGrpc",
        "cluster_name",
        Names::Cluster,
    ),
    ("envoy.config.core.v3.HttpUri", "cluster", Names::Cluster),
    ("envoy.config.route.v3.RouteAction", "cluster", Names::Cluster),
    (
        "envoy.config.route.v3.RouteAction.RequestMirrorPolicy",
        "cluster",
        Names::Cluster,
    ),
    (
        "envoy.config.route.v3.WeightedCluster.ClusterWeight",
        "name",
        Names::Cluster,
    ),
    (
        "envoy.config.trace.v3.DatadogConfig",
        "collector_cluster",
        Names::Cluster,
    ),
    (
        "envoy.config.trace.v3.ZipkinConfig",
        "collector_cluster",
        Names::Cluster,
    ),
    (
        "envoy.extensions.filters.http.fault.v3.HTTPFault",
        "upstream_cluster",
        Names::Cluster,
    ),
    (
        "envoy.extensions.filters.network.http_connection_manager.v3.Rds",
        "route_config_name",
        Names::Route,
    ),
    (
        "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
        "cluster",
        Names::Cluster,
    ),
    (
        "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy.WeightedCluster.ClusterWeight",
        "name",
        Names::Cluster,
    ),
];

/// The cluster of the proxy's own key store: part of its bootstrap, in nobody's CDS.
const KEY_STORE: &str = "sds-grpc";

/// New names for some clusters and route configurations.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Renames {
    /// Clusters, old to new.
    pub clusters: BTreeMap<String, String>,
    /// Route configurations, old to new.
    pub routes: BTreeMap<String, String>,
}

/// The content with every reference renamed; the same content when nothing in it is renamed.
pub fn renamed(content: &Content, renames: &Renames) -> Content {
    let touched = content
        .references
        .clusters
        .iter()
        .any(|name| renames.clusters.contains_key(name))
        || content
            .references
            .routes
            .iter()
            .any(|name| renames.routes.contains_key(name));
    if !touched {
        return content.clone();
    }
    let mut message = open(&content.body);
    rename_in(&mut message, renames);
    let new = |names: &std::collections::BTreeSet<String>, table: &BTreeMap<String, String>| {
        names
            .iter()
            .map(|name| table.get(name).unwrap_or(name).clone())
            .collect()
    };
    let references = References {
        clusters: new(&content.references.clusters, &renames.clusters),
        routes: new(&content.references.routes, &renames.routes),
        extensions: content.references.extensions.clone(),
    };
    sealed(&message, content.body.type_name, references)
}

fn rename_in(message: &mut DynamicMessage, renames: &Renames) {
    let descriptor = message.descriptor();
    if descriptor.full_name() == "google.protobuf.Any" {
        // The walk that made this body opened every Any; one that does not open any more names nothing we rename.
        if let Ok(mut inner) = schema::unpack_any(message, "") {
            rename_in(&mut inner, renames);
            if let Value::Message(fresh) = pack(&inner) {
                *message = fresh;
            }
        }
        return;
    }
    if descriptor.full_name().starts_with("google.protobuf.") {
        return;
    }
    for (owner, field, names) in TABLE {
        if *owner == descriptor.full_name() && message.has_field_by_name(field) {
            let table = match names {
                Names::Cluster => &renames.clusters,
                Names::Route => &renames.routes,
            };
            if let Some(new) = table.get(&super::text(message, field)) {
                message.set_field_by_name(field, Value::String(new.clone()));
            }
        }
    }
    for (_, value) in message.fields_mut() {
        rename_in_value(value, renames);
    }
}

fn rename_in_value(value: &mut Value, renames: &Renames) {
    match value {
        Value::Message(message) => rename_in(message, renames),
        Value::List(items) => items.iter_mut().for_each(|item| rename_in_value(item, renames)),
        Value::Map(items) => items.values_mut().for_each(|item| rename_in_value(item, renames)),
        _ => {}
    }
}

/// Notes what the message itself (not what is inside it) names.
pub(super) fn collect(message: &DynamicMessage, references: &mut References) {
    let descriptor = message.descriptor();
    for (owner, field, names) in TABLE {
        if *owner == descriptor.full_name() && message.has_field_by_name(field) {
            let name = super::text(message, field);
            if name == KEY_STORE {
                continue;
            }
            match names {
                Names::Cluster => references.clusters.insert(name),
                Names::Route => references.routes.insert(name),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Text fields whose name speaks of a cluster and that name none, or none that travels by CDS.
    const NOT_REFERENCES: &[&str] = &[
        "envoy.config.core.v3.Node.cluster",
        "envoy.config.core.v3.ApiConfigSource.cluster_names",
        "envoy.config.endpoint.v3.ClusterLoadAssignment.cluster_name",
        "envoy.config.bootstrap.v3.ClusterManager.local_cluster_name",
        "envoy.config.metrics.v3.StatsdSink.tcp_cluster_name",
        "envoy.data.accesslog.v3.AccessLogCommon.upstream_cluster",
        "envoy.config.route.v3.RouteAction.cluster_header",
        "envoy.config.route.v3.RouteAction.cluster_specifier_plugin",
        "envoy.config.route.v3.RouteAction.RequestMirrorPolicy.cluster_header",
        "envoy.config.route.v3.WeightedCluster.ClusterWeight.cluster_header",
    ];

    #[test]
    fn every_text_field_that_names_a_cluster_is_in_the_table() {
        for (message, field, _) in TABLE {
            let descriptor = schema::message(message).unwrap_or_else(|| panic!("no message {message}"));
            assert!(
                descriptor.get_field_by_name(field).is_some(),
                "no field {field} in {message}"
            );
        }
        let pool = schema::message("google.protobuf.Any").unwrap();
        let mut missing = Vec::new();
        for message in pool.parent_pool().all_messages() {
            for field in message.fields() {
                let full = field.full_name().to_owned();
                let known = TABLE
                    .iter()
                    .any(|(m, f, _)| *m == message.full_name() && *f == field.name());
                let text = matches!(field.kind(), prost_reflect::Kind::String);
                if text
                    && field.name().contains("cluster")
                    && !known
                    && !NOT_REFERENCES.contains(&full.as_str())
                {
                    missing.push(full);
                }
            }
        }
        assert!(missing.is_empty(), "{missing:#?}");
    }
}
