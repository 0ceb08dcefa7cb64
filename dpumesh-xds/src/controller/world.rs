//! [`World`]: the facts of the Kubernetes API that matter here, and nothing else of its objects.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1 as api;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::{DPU, OPT_IN, OPTED_IN, SIDECAR, TUNNEL_ENDPOINT};

/// Everything known of a cluster at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct World {
    /// By `NAMESPACE/NAME`.
    pub pods: BTreeMap<String, Pod>,
    /// By name.
    pub nodes: BTreeMap<String, Node>,
    /// By name.
    pub namespaces: BTreeMap<String, Namespace>,
    /// By `NAMESPACE/NAME`.
    pub services: BTreeMap<String, Service>,
}

/// A pod.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pod {
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its uid.
    pub uid: String,
    /// Its service account.
    pub service_account: String,
    /// The node it is bound to, if it is.
    pub node: Option<String>,
    /// Its addresses as the kubelet wrote them.
    pub addresses: Vec<String>,
    /// Whether it is ready.
    pub ready: bool,
    /// Whether it has an interface of its own.
    pub own_network: bool,
    /// Whether it has ended: its addresses may be another's by now.
    pub ended: bool,
    /// Whether it is being deleted.
    pub leaving: bool,
    /// Whether it has a sidecar of Istio's.
    pub sidecar: bool,
    /// Its value of [`OPT_IN`].
    pub opt_in: Option<String>,
    /// Its labels, if it is opted in.
    pub labels: BTreeMap<String, String>,
}

/// A node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// Its annotation [`TUNNEL_ENDPOINT`], whatever it says.
    pub tunnel_endpoint: Option<String>,
    /// Its annotation [`DPU`].
    pub dpu: Option<String>,
    /// Prefixes that its pods get addresses from.
    pub pod_cidrs: Vec<String>,
}

/// A namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Namespace {
    /// Its name.
    pub name: String,
    /// Whether new pods in it are opted in.
    pub opted_in: bool,
}

/// A service, as far as it is not the proxies': those are told of services by istiod.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Service {
    /// Its addresses in the cluster; none for a headless service, whose pods are called at their own.
    pub addresses: Vec<String>,
    /// Its ports that carry no TCP, as `53/UDP`.
    pub beside_tcp: Vec<String>,
}

impl Pod {
    /// Whether its traffic is the card's.
    pub fn is_opted_in(&self) -> bool {
        self.opt_in.as_deref() == Some(OPTED_IN) && self.own_network && !self.ended
    }

    /// `NAMESPACE/NAME`.
    pub fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }
}

/// Something that is read from an object of the API.
pub(super) trait Fact: Sized + PartialEq {
    /// The API's object.
    type Object: 'static;
    /// What people call these.
    const WORD: &'static str;

    /// The key under which it is kept, and what is kept.
    fn read(object: Self::Object) -> (String, Self);
}

impl Fact for Pod {
    type Object = api::Pod;
    const WORD: &'static str = "pods";

    fn read(object: api::Pod) -> (String, Self) {
        let (meta, spec) = (object.metadata, object.spec.unwrap_or_default());
        let status = object.status.unwrap_or_default();
        let opt_in = label(&meta, OPT_IN);
        let ready = |condition: &api::PodCondition| condition.type_ == "Ready" && condition.status == "True";
        let listed = status.pod_ips.unwrap_or_default();
        let addresses = match listed.is_empty() {
            true => status.pod_ip.into_iter().collect(),
            false => listed.into_iter().map(|address| address.ip).collect(),
        };
        let pod = Self {
            uid: meta.uid.unwrap_or_default(),
            service_account: spec.service_account_name.unwrap_or_else(|| "default".to_owned()),
            node: spec.node_name.filter(|node| !node.is_empty()),
            addresses,
            ready: status.conditions.unwrap_or_default().iter().any(ready),
            own_network: spec.host_network != Some(true),
            ended: matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")),
            leaving: meta.deletion_timestamp.is_some(),
            sidecar: meta.annotations.is_some_and(|all| all.contains_key(SIDECAR)),
            labels: match opt_in.as_deref() {
                Some(OPTED_IN) => meta.labels.unwrap_or_default(),
                _ => BTreeMap::new(),
            },
            opt_in,
            name: meta.name.unwrap_or_default(),
            namespace: meta.namespace.unwrap_or_default(),
        };
        (pod.key(), pod)
    }
}

impl Fact for Node {
    type Object = api::Node;
    const WORD: &'static str = "nodes";

    fn read(object: api::Node) -> (String, Self) {
        let (mut meta, spec) = (object.metadata, object.spec.unwrap_or_default());
        let mut annotations = meta.annotations.take().unwrap_or_default();
        let listed = spec.pod_cidrs.unwrap_or_default();
        let node = Self {
            name: meta.name.unwrap_or_default(),
            tunnel_endpoint: annotations.remove(TUNNEL_ENDPOINT),
            dpu: annotations.remove(DPU),
            pod_cidrs: match listed.is_empty() {
                true => spec.pod_cidr.into_iter().collect(),
                false => listed,
            },
        };
        (node.name.clone(), node)
    }
}

impl Fact for Namespace {
    type Object = api::Namespace;
    const WORD: &'static str = "namespaces";

    fn read(object: api::Namespace) -> (String, Self) {
        let opted_in = label(&object.metadata, OPT_IN).as_deref() == Some(OPTED_IN);
        let name = object.metadata.name.unwrap_or_default();
        (name.clone(), Self { name, opted_in })
    }
}

impl Fact for Service {
    type Object = api::Service;
    const WORD: &'static str = "services";

    fn read(object: api::Service) -> (String, Self) {
        let (meta, spec) = (object.metadata, object.spec.unwrap_or_default());
        let listed = spec.cluster_ips.unwrap_or_default();
        let addresses = match listed.is_empty() {
            true => spec.cluster_ip.into_iter().collect(),
            false => listed,
        };
        let beside_tcp = spec.ports.unwrap_or_default().into_iter().filter_map(|port| {
            // TCP where nothing is said.
            let protocol = port.protocol.filter(|protocol| protocol != "TCP")?;
            Some(format!("{}/{protocol}", port.port))
        });
        let service = Self {
            // What the API writes instead of an address.
            addresses: addresses
                .into_iter()
                .filter(|address| !matches!(address.as_str(), "" | "None"))
                .collect(),
            beside_tcp: beside_tcp.collect(),
        };
        let key = format!(
            "{}/{}",
            meta.namespace.unwrap_or_default(),
            meta.name.unwrap_or_default()
        );
        (key, service)
    }
}

fn label(meta: &ObjectMeta, name: &str) -> Option<String> {
    meta.labels.as_ref()?.get(name).cloned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(json: serde_json::Value) -> Pod {
        Pod::read(serde_json::from_value(json).unwrap()).1
    }

    #[test]
    fn a_pod_is_read_from_the_apis_object() {
        let whole = pod(serde_json::json!({
            "metadata": {"name": "web-1", "namespace": "shop", "uid": "u",
                "labels": {"dpumesh.io/dataplane": "dpu", "app": "web"}},
            "spec": {"nodeName": "n1", "serviceAccountName": "web", "containers": []},
            "status": {"phase": "Running", "podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}],
                "conditions": [{"type": "Ready", "status": "True"}]}
        }));
        assert_eq!(whole.addresses, ["10.0.0.1", "fd00::1"]);
        assert_eq!(
            (whole.key().as_str(), whole.node.as_deref()),
            ("shop/web-1", Some("n1"))
        );
        assert!(whole.is_opted_in() && whole.ready && !whole.leaving && !whole.sidecar);
        assert_eq!(whole.labels["app"], "web");

        let bare = pod(serde_json::json!({"metadata": {"name": "x", "labels": {"app": "x"}}}));
        assert_eq!(bare.service_account, "default");
        assert!(!bare.is_opted_in() && !bare.ready && bare.node.is_none());
        assert!(bare.labels.is_empty(), "nobody asks for those");
    }

    #[test]
    fn pods_without_an_interface_of_their_own_and_pods_that_ended_are_out() {
        for (spec, status) in [
            (
                serde_json::json!({"hostNetwork": true, "containers": []}),
                serde_json::json!({}),
            ),
            (
                serde_json::json!({"containers": []}),
                serde_json::json!({"phase": "Succeeded"}),
            ),
            (
                serde_json::json!({"containers": []}),
                serde_json::json!({"phase": "Failed"}),
            ),
        ] {
            let json = serde_json::json!({"metadata": {"labels": {"dpumesh.io/dataplane": "dpu"}}, "spec": spec, "status": status});
            assert!(!pod(json).is_opted_in());
        }
    }

    #[test]
    fn a_node_and_a_namespace_are_read() {
        let (name, node) = Node::read(serde_json::from_value(serde_json::json!({
            "metadata": {"name": "n1", "annotations": {"dpumesh.io/tunnel-endpoint": "192.0.2.1", "dpumesh.io/dpu": "dpu0"}},
            "spec": {"podCIDR": "10.0.0.0/24"}
        })).unwrap());
        assert_eq!(name, "n1");
        assert_eq!(node.tunnel_endpoint.as_deref(), Some("192.0.2.1"));
        assert_eq!(
            (node.dpu.as_deref(), node.pod_cidrs),
            (Some("dpu0"), vec!["10.0.0.0/24".to_owned()])
        );
        let (_, namespace) = Namespace::read(
            serde_json::from_value(serde_json::json!({
                "metadata": {"name": "shop", "labels": {"dpumesh.io/dataplane": "dpu"}}
            }))
            .unwrap(),
        );
        assert!(namespace.opted_in);
    }

    #[test]
    fn a_service_is_read_for_what_is_not_tcp() {
        let read = |spec| {
            let object = serde_json::json!({"metadata": {"name": "kube-dns", "namespace": "kube-system"}, "spec": spec});
            Service::read(serde_json::from_value(object).unwrap())
        };
        let (key, dns) = read(
            serde_json::json!({"clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10", "fd00::a"],
            "ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}, {"port": 9153}]}),
        );
        assert_eq!(key, "kube-system/kube-dns");
        assert_eq!(dns.addresses, ["10.96.0.10", "fd00::a"]);
        assert_eq!(dns.beside_tcp, ["53/UDP"]);
        let (_, headless) =
            read(serde_json::json!({"clusterIP": "None", "ports": [{"port": 53, "protocol": "UDP"}]}));
        assert!(headless.addresses.is_empty());
        assert_eq!(
            read(serde_json::json!({"type": "ExternalName"})).1,
            Service::default()
        );
    }
}
