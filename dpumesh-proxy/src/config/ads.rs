//! Resources by the aggregated delta stream (ADS): what is accepted, what is in force, what is wanted.
//!
//! ```text
//! Update ─► Change (decoded, checked) ─► accepted + change ─► compile all ─┬─► in force, ACK
//!               ▲                                                          └─► the resource at fault leaves the change, once more
//!               └──────────────────────────────────────────────────────────────┘
//! ```
//! A listener that names a route configuration which has not come yet is accepted, but its last version (or nothing) stays in force until it
//! has; likewise a cluster and its endpoints. A route configuration or an endpoint assignment in use is kept when it is removed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use dpumesh_xds::client::{Protocol, Rejection, Security, Update};
use dpumesh_xds::discovery::{Node, ResourceType};
use prost::Message as _;
use prost_reflect::DynamicMessage;

use super::ConfigError;
use super::dump::Dump;
use super::files::Service;
use super::resource::Item;
use super::schema::{self, At};
use super::support;
use super::translate::{ADS, Context, Result, socket_address};
use super::translate_route::data_source;
use crate::stats::{Registry, Shard, Subscription};

type Items = BTreeMap<String, Arc<Item>>;

/// What the stream has brought.
#[derive(Debug, Clone, Default)]
pub(super) struct AdsResources {
    listeners: Items,
    clusters: Items,
    routes: Items,
    endpoints: Items,
    /// The last versions that had all they refer to.
    ready_listeners: Items,
    ready_clusters: Items,
}

impl AdsResources {
    fn of(&mut self, service: Service) -> &mut Items {
        match service {
            Service::Lds => &mut self.listeners,
            Service::Cds => &mut self.clusters,
            Service::Rds => &mut self.routes,
            Service::Eds => &mut self.endpoints,
        }
    }

    /// What is there once `change` is accepted.
    pub(super) fn with(&self, change: &Change) -> Self {
        let mut new = self.clone();
        let keeps = matches!(change.service, Service::Rds | Service::Eds);
        let items = new.of(change.service);
        for (name, item) in &change.items {
            items.insert(name.clone(), Arc::clone(item));
        }
        for name in change.removed.iter().filter(|_| !keeps) {
            items.remove(name);
        }
        new.settle();
        new
    }

    /// Finds out what is in force, and forgets what nothing refers to.
    fn settle(&mut self) {
        self.ready_listeners = ready(&self.listeners, &self.ready_listeners, |item| {
            route_names(item).all(|name| self.routes.contains_key(name))
        });
        self.ready_clusters = ready(&self.clusters, &self.ready_clusters, |item| {
            endpoints_name(item).is_none_or(|name| self.endpoints.contains_key(&name))
        });
        let mut routes = BTreeSet::new();
        for item in self.listeners.values().chain(self.ready_listeners.values()) {
            routes.extend(route_names(item));
        }
        self.routes.retain(|name, _| routes.contains(name.as_str()));
        let clusters = self.clusters.values().chain(self.ready_clusters.values());
        let endpoints: BTreeSet<String> = clusters.filter_map(|item| endpoints_name(item)).collect();
        self.endpoints.retain(|name, _| endpoints.contains(name));
    }

    /// The listeners or clusters in force.
    pub(super) fn in_force(&self, service: Service) -> Vec<Arc<Item>> {
        match service {
            Service::Lds => self.ready_listeners.values().map(Arc::clone).collect(),
            // A cluster without a ready version is there without endpoints: its requests are answered, not lost.
            Service::Cds => self
                .clusters
                .iter()
                .map(|(name, item)| Arc::clone(self.ready_clusters.get(name).unwrap_or(item)))
                .collect(),
            Service::Rds | Service::Eds => Vec::new(),
        }
    }

    /// Lets a compilation look up what came by the stream.
    pub(super) fn endpoints_and_routes(&self, context: &mut Context<'_>, dump: &mut Dump) {
        let key = |name: &String| (ADS.to_owned(), name.clone());
        for (name, item) in &self.routes {
            dump.routes.push(Arc::clone(item));
            context.rds.insert(key(name), Arc::clone(item));
        }
        for (name, item) in &self.endpoints {
            dump.endpoints.push(Arc::clone(item));
            context.eds.insert(key(name), Arc::clone(item));
        }
    }

    /// The names to be asked for.
    pub(super) fn wanted(&self) -> Vec<(ResourceType, BTreeSet<String>)> {
        let routes = self.listeners.values().flat_map(|item| route_names(item));
        let endpoints = self.clusters.values().filter_map(|item| endpoints_name(item));
        vec![
            (ResourceType::Endpoints, endpoints.collect()),
            (ResourceType::Route, routes.map(str::to_owned).collect()),
        ]
    }
}

/// Of each accepted resource the newest version that has all it needs.
fn ready(accepted: &Items, before: &Items, has_all: impl Fn(&Item) -> bool) -> Items {
    let mut ready = Items::new();
    for (name, item) in accepted {
        let old = before.get(name);
        if has_all(item) {
            ready.insert(name.clone(), Arc::clone(item));
        } else if let Some(old) = old.filter(|old| has_all(old)) {
            ready.insert(name.clone(), Arc::clone(old));
        }
    }
    ready
}

/// The route configurations by the stream that a listener names.
fn route_names(listener: &Item) -> impl Iterator<Item = &str> {
    // One that cannot be read is refused when it is compiled.
    let uses = listener.routes().unwrap_or_default();
    uses.iter()
        .filter(|one| one.file.path == ADS)
        .map(|one| one.name.as_str())
}

/// The endpoint assignment by the stream that a cluster names.
fn endpoints_name(cluster: &Item) -> Option<String> {
    let found = cluster.endpoints().ok().flatten();
    found.filter(|one| one.file.path == ADS).map(|one| one.name)
}

/// An update, decoded and checked by itself.
#[derive(Debug)]
pub(super) struct Change {
    pub(super) service: Service,
    items: BTreeMap<String, Arc<Item>>,
    removed: Vec<String>,
}

impl Change {
    /// Reads an update; resources that cannot be read are `rejected`. `None` for a type that nobody asked for.
    pub(super) fn read(update: &Update, rejected: &mut Vec<Rejection>) -> Option<Self> {
        let service = match update.kind {
            ResourceType::Listener => Service::Lds,
            ResourceType::Cluster => Service::Cds,
            ResourceType::Route => Service::Rds,
            ResourceType::Endpoints => Service::Eds,
            _ => return None,
        };
        let mut items = BTreeMap::new();
        for resource in &update.resources {
            match item(service, resource) {
                Ok(item) => drop(items.insert(resource.name.clone(), Arc::new(item))),
                Err(error) => rejected.push(rejection(service, &resource.name, &error)),
            }
        }
        Some(Self {
            service,
            items,
            removed: update.removed.clone(),
        })
    }

    /// Takes the resource that `error` names out of the change, or all of them where it names none of these. False when nothing is
    /// left to be tried.
    pub(super) fn reject(&mut self, error: &ConfigError, rejected: &mut Vec<Rejection>) -> bool {
        let at_fault = |name: &&String| error.resource.as_ref() == Some(&title(self.service, name));
        if let Some(name) = self.items.keys().find(at_fault).cloned() {
            rejected.push(rejection(self.service, &name, error));
            self.items.remove(&name);
            return !self.items.is_empty() || !self.removed.is_empty();
        }
        // A listener is refused for what a route configuration of this change says, and the like.
        let names = std::mem::take(&mut self.items).into_keys();
        rejected.extend(names.map(|name| rejection(self.service, &name, error)));
        false
    }
}

fn title(service: Service, name: &str) -> String {
    format!("{} {name:?}", service.kind().noun)
}

fn rejection(service: Service, name: &str, error: &ConfigError) -> Rejection {
    let reason = error.clone().in_resource(title(service, name)).to_string();
    tracing::warn!(reason, "resource refused; the last good one stays");
    Rejection {
        name: name.to_owned(),
        reason,
    }
}

fn item(service: Service, resource: &dpumesh_xds::discovery::Resource) -> Result<Item> {
    let Some(any) = &resource.resource else {
        return Err(ConfigError::new("", "is empty"));
    };
    let expected = service.kind().resource;
    let found = any.type_url.rsplit('/').next().unwrap_or_default();
    if found != expected {
        return Err(ConfigError::new(
            "",
            format!("expected {expected}, found {found}"),
        ));
    }
    let descriptor = schema::message(expected).expect("a type of the checked-in set");
    let message = DynamicMessage::decode(descriptor, &*any.value)
        .map_err(|e| ConfigError::new("", format!("not a valid {expected}: {e}")))?;
    support::check(&message, "")?;
    let at = At::new(message, "");
    let name = at.text(service.kind().name_field);
    if name != resource.name {
        return Err(at.refuse(
            service.kind().name_field,
            format!("{name:?} is not the resource's name {:?}", resource.name),
        ));
    }
    Ok(Item::new(at, resource.version.clone()))
}

/// Counts an update under the names Envoy uses for the subscription.
pub(super) fn count(registry: &Registry, service: Service, good: bool) {
    let name = match service {
        Service::Lds => "listener_manager.lds",
        Service::Cds => "cluster_manager.cds",
        Service::Rds => "ads.rds",
        Service::Eds => "ads.eds",
    };
    let scope = registry.scope(name, Subscription::TABLE);
    scope.inc(Shard::CONTROL, Subscription::Attempt);
    let member = if good {
        Subscription::Success
    } else {
        Subscription::Rejected
    };
    scope.inc(Shard::CONTROL, member);
}

/// The other end of the aggregated stream.
#[derive(Debug)]
pub struct Server {
    /// `host:port`.
    pub address: String,
    /// How the connection is secured.
    pub security: Security,
    /// Who asks.
    pub node: Node,
    /// In which words.
    pub protocol: Protocol,
}

/// Reads `dynamic_resources.ads_config` and the cluster it names.
pub(super) fn server(bootstrap: &At) -> Result<Option<Server>> {
    let Some(config) = bootstrap
        .message("dynamic_resources")
        .and_then(|d| d.message("ads_config"))
    else {
        return Ok(None);
    };
    let protocol = match config.choice("api_type").as_str() {
        "DELTA_GRPC" => Protocol::Delta,
        "GRPC" => Protocol::Whole,
        other => return Err(config.refuse("api_type", format!("{other} is not supported yet"))),
    };
    let services = config.messages("grpc_services");
    let [service] = services.as_slice() else {
        return Err(config.refuse("grpc_services", "exactly one must be given"));
    };
    let Some(envoy) = service.message("envoy_grpc") else {
        return Err(service.refuse("envoy_grpc", "must be given"));
    };
    for (at, field) in [
        (service, "timeout"),
        (service, "initial_metadata"),
        (&envoy, "authority"),
    ] {
        if at.has(field) {
            return Err(at.refuse(field, "is not supported for a management server yet"));
        }
    }
    let name = envoy.required_text("cluster_name")?;
    let clusters = bootstrap
        .message("static_resources")
        .map(|s| s.messages("clusters"))
        .unwrap_or_default();
    let Some(cluster) = clusters.iter().find(|c| c.text("name") == name) else {
        return Err(envoy.refuse("cluster_name", format!("there is no static cluster {name:?}")));
    };
    let node = bootstrap
        .message("node")
        .map(|node| node.message.encode_to_vec())
        .unwrap_or_default();
    Ok(Some(Server {
        address: address(cluster)?,
        security: security(cluster)?,
        protocol,
        node: Node::decode(&*node).map_err(|e| ConfigError::new("node", e.to_string()))?,
    }))
}

fn address(cluster: &At) -> Result<String> {
    let endpoints = cluster
        .message("load_assignment")
        .map(|a| a.messages("endpoints"))
        .unwrap_or_default();
    let mut all = endpoints.iter().flat_map(|e| e.messages("lb_endpoints"));
    let endpoint = all.next().and_then(|e| e.message("endpoint"));
    let Some(address) = endpoint.and_then(|e| e.message("address")) else {
        return Err(cluster.refuse("load_assignment", "must have an endpoint"));
    };
    socket_address(&address).map(|a| a.to_string())
}

fn security(cluster: &At) -> Result<Security> {
    let Some(socket) = cluster.message("transport_socket") else {
        return Ok(Security::Plaintext);
    };
    let Some(tls) = socket.any("typed_config")? else {
        return Err(socket.refuse("typed_config", "must be given"));
    };
    let name = tls.required_text("sni")?;
    let common = tls.message("common_tls_context");
    let pem = |at: Option<&At>, field: &str| -> Result<String> {
        let source = at.and_then(|at| at.message(field));
        let Some(source) = source else {
            return Err(cluster.refuse(
                "transport_socket",
                format!("{field} must be given for the aggregated stream"),
            ));
        };
        String::from_utf8(data_source(&source)?).map_err(|_| source.refuse("", "must be PEM"))
    };
    let validation = common.as_ref().and_then(|c| c.message("validation_context"));
    for rule in validation
        .iter()
        .flat_map(|v| v.messages("match_typed_subject_alt_names"))
    {
        let exact = rule.message("matcher").map(|m| m.text("exact"));
        if rule.choice("san_type") != "DNS" || exact.as_ref() != Some(&name) {
            return Err(rule.refuse(
                "matcher",
                "must be the DNS name of sni for the aggregated stream: that is what is verified",
            ));
        }
    }
    let roots = pem(validation.as_ref(), "trusted_ca")?;
    let own = common
        .as_ref()
        .and_then(|c| c.messages("tls_certificates").into_iter().next());
    let client = match &own {
        None => None,
        Some(own) => Some((
            pem(Some(own), "certificate_chain")?,
            pem(Some(own), "private_key")?,
        )),
    };
    Ok(Security::Tls { roots, name, client })
}

#[cfg(test)]
mod tests;
