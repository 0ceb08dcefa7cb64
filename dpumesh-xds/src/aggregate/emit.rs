//! The interned parts as Envoy resources.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use prost_reflect::{DynamicMessage, Value};
use serde_json::json;

use super::matcher::{self, DENY};
use super::program::{Program, Shared, SharedChain, group};
use super::tree::Tree;
use super::{
    DENY_CLUSTER, HAIRPIN_MARK, INBOUND, Interception, OUTBOUND, Options, WIDENED_TIMEOUT, WORKLOADS,
};
use crate::discovery::ResourceType;
use crate::ir::{Body, PodView, PortSet, Role, Workload};
use crate::schema;
use crate::snapshot::Snapshot;
use crate::translate::{Note, encode, open};

/// The key by which the outbound chain tells the upstream TLS context whose certificate to show.
const CERTIFICATE_KEY: &str = "envoy.tls.certificate_mappers.on_demand_secret";

pub(super) fn snapshot(
    shared: &Shared,
    programs: &[Program],
    views: &[&PodView],
    options: &Options,
    notes: &mut Vec<Note>,
) -> Snapshot {
    let mut snapshot = Snapshot::default();
    let deny = encode(&deny_cluster(programs, views));
    snapshot.insert(ResourceType::Cluster, DENY_CLUSTER, deny);
    for (name, cluster) in &shared.clusters {
        let mut message = named(&cluster.content.body, "name", name);
        // Asked in this order: asking for a field to change it puts it there.
        if let Some(service) = &cluster.endpoints
            && let Some(Value::Message(eds)) = message.get_field_by_name_mut("eds_cluster_config")
        {
            eds.set_field_by_name("service_name", Value::String(service.clone()));
        }
        snapshot.insert(ResourceType::Cluster, name, encode(&message));
    }
    for (name, content) in &shared.endpoints {
        snapshot.insert(
            ResourceType::Endpoints,
            name,
            encode(&named(&content.body, "cluster_name", name)),
        );
    }
    for (name, content) in &shared.routes {
        snapshot.insert(
            ResourceType::Route,
            name,
            encode(&named(&content.body, "name", name)),
        );
    }
    let pods: BTreeMap<String, &PodView> = views.iter().map(|view| (view.pod.key(), *view)).collect();
    let mut put = |name: &str, side: Side<'_>| {
        let listener = side.listener(name, options, notes);
        snapshot.insert(ResourceType::Listener, name, encode(&listener));
    };
    put(
        OUTBOUND,
        Side {
            inbound: false,
            chains: &shared.outbound,
            programs,
            pods: &pods,
        },
    );
    put(
        INBOUND,
        Side {
            inbound: true,
            chains: &shared.inbound,
            programs,
            pods: &pods,
        },
    );
    snapshot
}

fn named(body: &Body, field: &str, name: &str) -> DynamicMessage {
    let mut message = open(body);
    message.set_field_by_name(field, Value::String(name.to_owned()));
    message
}

fn deny_cluster(programs: &[Program], views: &[&PodView]) -> DynamicMessage {
    let mut cluster = json!({"name": DENY_CLUSTER, "type": "STATIC", "connect_timeout": "1s"});
    let workloads = workloads(programs, views);
    if !workloads.is_empty() {
        cluster["metadata"] = json!({"filter_metadata": {WORKLOADS: workloads}});
    }
    written("envoy.config.cluster.v3.Cluster", &cluster)
}

/// Who the pods with a program are.
fn workloads(programs: &[Program], views: &[&PodView]) -> serde_json::Map<String, serde_json::Value> {
    let has_program = |key: &String| programs.iter().any(|program| program.pod == *key);
    let known = views
        .iter()
        .filter(|view| view.workload != Workload::default() && has_program(&view.pod.key()));
    let describe = |view: &&PodView| {
        let (workload, identity) = (&view.workload, &view.pod.identity);
        let addresses: Vec<String> = view.pod.addresses.iter().map(ToString::to_string).collect();
        let said = json!({
            "addresses": addresses.join(","),
            "workload": workload.name,
            "namespace": identity.namespace,
            "canonical_name": workload.canonical_name,
            "canonical_revision": workload.canonical_revision,
            "cluster": workload.cluster,
            "app": workload.app,
            "version": workload.version,
        });
        (view.pod.key(), said)
    };
    known.map(describe).collect()
}

/// Reads a message that this module wrote as JSON.
fn written(type_name: &str, value: &serde_json::Value) -> DynamicMessage {
    schema::value_to_message(type_name, value, "")
        .expect("JSON written here follows the schema, as the tests' evaluator reads it back")
}

/// One direction.
struct Side<'a> {
    inbound: bool,
    chains: &'a BTreeMap<String, SharedChain>,
    programs: &'a [Program],
    pods: &'a BTreeMap<String, &'a PodView>,
}

impl Side<'_> {
    fn listener(&self, name: &str, options: &Options, notes: &mut Vec<Note>) -> DynamicMessage {
        let bind = if self.inbound {
            options.inbound
        } else {
            options.outbound
        };
        let (filters, timeout, continues) = self.listener_filters(options.interception, notes);
        let mut skeleton = json!({
            "name": name,
            "stat_prefix": name,
            "address": address(bind),
            "traffic_direction": if self.inbound { "INBOUND" } else { "OUTBOUND" },
            "filter_chain_matcher": matcher::matcher(&self.by_pod()),
            "listener_filters": filters,
            "listener_filters_timeout": timeout.map_or_else(|| "0s".to_owned(), |t| format!("{}s", t.as_secs_f64())),
            "continue_on_listener_filters_timeout": continues,
        });
        if options.interception == Interception::Transparent {
            skeleton["transparent"] = json!(true);
        }
        let mut listener = written("envoy.config.listener.v3.Listener", &skeleton);
        let mut chains = vec![Value::Message(deny_chain())];
        for (name, chain) in self.chains {
            let mut message = named(&chain.content.body, "name", name);
            if let Some(identity) = &chain.identity {
                show_certificate(&mut message, &identity.spiffe());
            }
            chains.push(Value::Message(message));
        }
        listener.set_field_by_name("filter_chains", Value::List(chains));
        listener
    }

    /// The pod first: by source address on the way out, by destination on the way in.
    fn by_pod(&self) -> Tree {
        let other = Box::new(Tree::Deny);
        let of = |program: &Program| -> Vec<IpAddr> {
            self.pods
                .get(&program.pod)
                .map(|view| view.pod.addresses.clone())
                .unwrap_or_default()
        };
        if self.inbound {
            let nets = |members: Vec<&Program>| members.into_iter().flat_map(of).map(Into::into).collect();
            let groups = group(self.programs, |p| &p.inbound).into_iter();
            let groups = groups
                .map(|(members, tree)| (nets(members), tree.clone()))
                .collect();
            Tree::Destinations { groups, other }
        } else {
            let groups = group(self.programs, |p| &p.outbound).into_iter();
            let groups = groups
                .map(|(members, tree)| (members.into_iter().flat_map(of).collect(), tree.clone()))
                .collect();
            Tree::Sources { groups, other }
        }
    }

    fn listener_filters(
        &self,
        interception: Interception,
        notes: &mut Vec<Note>,
    ) -> (Vec<serde_json::Value>, Option<Duration>, bool) {
        let mut filters = Vec::new();
        match interception {
            Interception::Transparent | Interception::Redirect => {
                filters.push(listener_filter("original_dst", "OriginalDst", None));
            }
            Interception::ProxyProtocol => {
                filters.push(listener_filter("proxy_protocol", "ProxyProtocol", None))
            }
        }
        if interception == Interception::Transparent {
            filters.push(self.original_source());
        }
        let tls = self.detection(|d| &d.tls);
        let http = self.detection(|d| &d.http);
        if !tls.any.is_empty() {
            filters.push(listener_filter("tls_inspector", "TlsInspector", Some(&tls.any)));
        }
        if !http.any.is_empty() {
            filters.push(listener_filter(
                "http_inspector",
                "HttpInspector",
                Some(&http.any),
            ));
        }
        let widened = tls.widened().union(&http.widened());
        let (mut timeout, continues) = self.timeout();
        if !widened.is_empty() {
            timeout = Some(timeout.map_or(WIDENED_TIMEOUT, |t| t.min(WIDENED_TIMEOUT)));
            notes.push(Note {
                resource: format!("listener {:?}", if self.inbound { INBOUND } else { OUTBOUND }),
                path: "listener_filters".to_owned(),
                what: format!(
                    "ports {widened:?} are looked into for some pods or destinations and so for all"
                ),
            });
        }
        (filters, timeout, continues)
    }

    /// Connections leave with the client's address. What leaves pods is marked, so that what is for a pod of this node comes to
    /// the inbound listener, as it does for other nodes'; what goes on from there to the pod is not.
    fn original_source(&self) -> serde_json::Value {
        let mut filter = listener_filter("original_src", "OriginalSrc", None);
        if !self.inbound {
            filter["typed_config"]["mark"] = json!(HAIRPIN_MARK);
        }
        filter
    }

    /// The listeners of this direction, each with the ports it can get connections for.
    fn listeners(&self) -> impl Iterator<Item = (&crate::ir::Listener, PortSet)> {
        let views = self
            .programs
            .iter()
            .filter_map(|program| self.pods.get(&program.pod));
        views.flat_map(move |view| {
            let whole = |l: &crate::ir::Listener| {
                l.addresses
                    .iter()
                    .filter(|a| a.ip().is_unspecified())
                    .map(|a| a.port())
                    .collect::<Vec<_>>()
            };
            let taken = ports(
                view.listeners
                    .values()
                    .filter(|l| l.role == Role::Outbound)
                    .flat_map(|l| whole(l)),
            );
            view.listeners.values().filter_map(move |l| match l.role {
                Role::Inbound if self.inbound => Some((&**l, PortSet::all())),
                Role::CatchAll if !self.inbound => Some((&**l, taken.clone().complement())),
                Role::Outbound if !self.inbound => {
                    Some((&**l, ports(l.addresses.iter().map(SocketAddr::port))))
                }
                _ => None,
            })
        })
    }

    fn detection(&self, of: impl Fn(&crate::ir::Detection) -> &PortSet) -> Looked {
        let mut looked = Looked {
            any: PortSet::none(),
            not: PortSet::none(),
        };
        for (listener, ports) in self.listeners() {
            let on = of(&listener.detection).clone();
            looked.any = looked.any.union(&on.clone().intersection(&ports));
            looked.not = looked.not.union(&on.complement().intersection(&ports));
        }
        looked
    }

    /// The longest wait that all allow, and going on after it only where all do.
    fn timeout(&self) -> (Option<Duration>, bool) {
        let mut shortest: Option<Duration> = None;
        let mut continues = true;
        let looks = |l: &crate::ir::Listener| !l.detection.tls.is_empty() || !l.detection.http.is_empty();
        for (listener, _) in self.listeners().filter(|(l, _)| looks(l)) {
            shortest = match (shortest, listener.detection.timeout) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            };
            continues &= listener.detection.continue_on_timeout;
        }
        (shortest, continues)
    }
}

fn ports(each: impl Iterator<Item = u16>) -> PortSet {
    let mut set = PortSet::none();
    each.for_each(|port| set.insert(port));
    set
}

/// Ports that some listener looks into, and ports that some listener does not.
struct Looked {
    any: PortSet,
    not: PortSet,
}

impl Looked {
    fn widened(&self) -> PortSet {
        self.any.clone().intersection(&self.not)
    }
}

fn listener_filter(name: &str, message: &str, only: Option<&PortSet>) -> serde_json::Value {
    let mut filter = json!({
        "name": format!("envoy.filters.listener.{name}"),
        "typed_config": {"@type": format!("type.googleapis.com/envoy.extensions.filters.listener.{name}.v3.{message}")},
    });
    let off: Vec<serde_json::Value> = only
        .map(|ports| ports.clone().complement().ranges())
        .unwrap_or_default()
        .into_iter()
        .map(|(start, end)| json!({"destination_port_range": {"start": start, "end": end}}))
        .collect();
    match off.as_slice() {
        [] => {}
        [single] => filter["filter_disabled"] = single.clone(),
        _ => filter["filter_disabled"] = json!({"or_match": {"rules": off}}),
    }
    filter
}

fn address(bind: SocketAddr) -> serde_json::Value {
    json!({"socket_address": {"address": bind.ip().to_string(), "port_value": bind.port()}})
}

fn deny_chain() -> DynamicMessage {
    written(
        "envoy.config.listener.v3.FilterChain",
        &json!({"name": DENY, "filters": [{"name": "envoy.filters.network.tcp_proxy", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
            "stat_prefix": DENY, "cluster": DENY_CLUSTER}}]}),
    )
}

/// Puts a filter first that names the certificate for upstream connections of this chain.
fn show_certificate(chain: &mut DynamicMessage, spiffe: &str) {
    let filter = written(
        "envoy.config.listener.v3.Filter",
        &json!({"name": "envoy.filters.network.set_filter_state", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.set_filter_state.v3.Config",
            "on_new_connection": [{
                "object_key": CERTIFICATE_KEY,
                "factory_key": "envoy.hashable_string",
                "format_string": {"text_format_source": {"inline_string": spiffe.replace('%', "%%")}},
                "shared_with_upstream": "ONCE"}]}}),
    );
    if let Some(Value::List(filters)) = chain.get_field_by_name_mut("filters") {
        filters.insert(0, Value::Message(filter));
    }
}
