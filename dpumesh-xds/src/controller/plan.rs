//! [`plan`]: what each node's adapter shall have, from the world alone. No I/O, no clock, and no memory: the same world gives the same plan.
//!
//! **Rather unreachable than sent somewhere wrong.** A node whose tunnel endpoint is absent, wrong or another node's too is nobody's peer; an address that
//! two pods claim is neither's, unless all but one of them are being deleted. Each is a [`Finding`] with a name.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use prost::Message;
use serde::Serialize;

use super::TUNNEL_ENDPOINT;
use super::world::{Node, Pod, World};
use crate::discovery::ResourceType;
use crate::mesh::{Binding, Peer};
use crate::snapshot::Snapshot;

/// What is to be told, and what is wrong.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Plan {
    /// By node.
    pub nodes: BTreeMap<String, Snapshot>,
    /// What somebody should look at, in the order of names.
    pub findings: Vec<Finding>,
}

/// Something in the cluster that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Finding {
    /// Kind and name of the object: `node n1`, `pod shop/web-1`.
    pub object: String,
    /// What about it, and what follows.
    pub reason: String,
}

/// Each node's configuration: [`plan`] without its findings.
pub fn configs(world: &World, trust_domain: &str) -> BTreeMap<String, Snapshot> {
    plan(world, trust_domain).nodes
}

/// What each node's adapter shall have: a [`Binding`] for every opted-in pod of the node, a [`Peer`] for every other node that can be reached.
pub fn plan(world: &World, trust_domain: &str) -> Plan {
    let mut findings = Vec::new();
    let addresses = addresses(world, &mut findings);
    let peers = peers(world, &addresses, &mut findings);
    let mut nodes: BTreeMap<String, Snapshot> = BTreeMap::new();
    for name in world.nodes.keys() {
        nodes.entry(name.clone()).or_default();
    }
    for pod in world.pods.values().filter(|pod| pod.is_opted_in()) {
        if let Some(node) = &pod.node {
            let dpu = world.nodes.get(node).and_then(|node| node.dpu.clone());
            let binding = binding(pod, &addresses, dpu, trust_domain);
            let snapshot = nodes.entry(node.clone()).or_default();
            snapshot.insert(ResourceType::Binding, pod.key(), binding.encode_to_vec());
        }
    }
    for (peer, octets) in &peers {
        for (node, snapshot) in &mut nodes {
            if node != peer {
                snapshot.insert(ResourceType::Peer, peer.clone(), octets.clone());
            }
        }
    }
    overlooked(world, &mut findings);
    unreached(world, &mut findings);
    findings.sort();
    Plan { nodes, findings }
}

/// Addresses by the key of the pod that has them and nobody else.
type Addresses = BTreeMap<String, Vec<IpAddr>>;

fn addresses(world: &World, findings: &mut Vec<Finding>) -> Addresses {
    let mut claims: BTreeMap<IpAddr, Vec<&Pod>> = BTreeMap::new();
    for pod in world.pods.values().filter(|pod| pod.is_opted_in()) {
        for text in &pod.addresses {
            match text.parse() {
                Ok(address) => claims.entry(address).or_default().push(pod),
                Err(_) => findings.push(Finding {
                    object: format!("pod {}", pod.key()),
                    reason: format!("status.podIPs: {text:?} is no IP address; left out"),
                }),
            }
        }
    }
    let mut owned: Addresses = BTreeMap::new();
    for (address, mut pods) in claims {
        pods.dedup_by_key(|pod| pod.key());
        let staying: Vec<&Pod> = pods.iter().copied().filter(|pod| !pod.leaving).collect();
        match (staying.as_slice(), pods.as_slice()) {
            ([one], _) | ([], [one]) => owned.entry(one.key()).or_default().push(address),
            _ => findings.extend(pods.iter().map(|pod| {
                let others = pods.iter().filter(|other| other.key() != pod.key());
                let others: Vec<String> = others.map(|other| other.key()).collect();
                Finding {
                    object: format!("pod {}", pod.key()),
                    reason: format!(
                        "{address} is also claimed by {}; neither is reached by it",
                        others.join(", ")
                    ),
                }
            })),
        }
    }
    owned
}

/// Every node that others can reach, as an encoded [`Peer`].
fn peers(world: &World, addresses: &Addresses, findings: &mut Vec<Finding>) -> BTreeMap<String, Vec<u8>> {
    let endpoints = endpoints(world, findings);
    let mut peers: BTreeMap<&str, Peer> = BTreeMap::new();
    for (name, endpoint) in &endpoints {
        let node = &world.nodes[*name];
        peers.insert(
            name,
            Peer {
                node: (*name).to_owned(),
                tunnel_endpoint: endpoint.to_string(),
                addresses: Vec::new(),
                pod_cidrs: prefixes(node, findings),
            },
        );
    }
    for (key, addresses) in addresses {
        let peer = world.pods[key]
            .node
            .as_deref()
            .and_then(|node| peers.get_mut(node));
        if let Some(peer) = peer {
            peer.addresses.extend(addresses.iter().map(IpAddr::to_string));
        }
    }
    peers
        .into_iter()
        .map(|(name, peer)| (name.to_owned(), peer.encode_to_vec()))
        .collect()
}

/// The tunnel endpoint of each node that has a usable one of its own.
fn endpoints<'a>(world: &'a World, findings: &mut Vec<Finding>) -> BTreeMap<&'a str, IpAddr> {
    let mut by_endpoint: BTreeMap<IpAddr, Vec<&str>> = BTreeMap::new();
    for (name, node) in &world.nodes {
        match endpoint(node) {
            Ok(Some(endpoint)) => by_endpoint.entry(endpoint).or_default().push(name),
            Ok(None) if serves(world, name) => findings.push(Finding {
                object: format!("node {name}"),
                reason: format!(
                    "annotation {TUNNEL_ENDPOINT} is absent; other nodes cannot reach its opted-in pods"
                ),
            }),
            Ok(None) => {}
            Err(reason) => findings.push(Finding {
                object: format!("node {name}"),
                reason: format!(
                    "annotation {TUNNEL_ENDPOINT}: {reason}; other nodes cannot reach its opted-in pods"
                ),
            }),
        }
    }
    let mut endpoints = BTreeMap::new();
    for (endpoint, names) in by_endpoint {
        match names.as_slice() {
            [name] => drop(endpoints.insert(*name, endpoint)),
            _ => findings.extend(names.iter().map(|name| Finding {
                object: format!("node {name}"),
                reason: format!(
                    "annotation {TUNNEL_ENDPOINT}: {endpoint} is that of several nodes ({}); nobody is sent there",
                    names.join(", ")
                ),
            })),
        }
    }
    endpoints
}

fn endpoint(node: &Node) -> Result<Option<IpAddr>, String> {
    let Some(text) = &node.tunnel_endpoint else {
        return Ok(None);
    };
    let address: IpAddr = text.parse().map_err(|_| format!("{text:?} is no IP address"))?;
    let broadcast = matches!(address, IpAddr::V4(address) if address.is_broadcast());
    if address.is_unspecified() || address.is_multicast() || address.is_loopback() || broadcast {
        return Err(format!("{text:?} is no address of one machine on a network"));
    }
    Ok(Some(address))
}

fn serves(world: &World, node: &str) -> bool {
    let mut pods = world.pods.values();
    pods.any(|pod| pod.is_opted_in() && pod.node.as_deref() == Some(node))
}

fn prefixes(node: &Node, findings: &mut Vec<Finding>) -> Vec<String> {
    let mut prefixes = Vec::new();
    for text in &node.pod_cidrs {
        match text.parse::<IpNet>() {
            Ok(prefix) => prefixes.push(prefix.to_string()),
            Err(_) => findings.push(Finding {
                object: format!("node {}", node.name),
                reason: format!("spec.podCIDRs: {text:?} is no prefix; left out"),
            }),
        }
    }
    prefixes
}

fn binding(pod: &Pod, addresses: &Addresses, dpu: Option<String>, trust_domain: &str) -> Binding {
    let addresses = addresses.get(&pod.key());
    Binding {
        name: pod.name.clone(),
        namespace: pod.namespace.clone(),
        uid: pod.uid.clone(),
        service_account: pod.service_account.clone(),
        trust_domain: trust_domain.to_owned(),
        addresses: addresses.into_iter().flatten().map(IpAddr::to_string).collect(),
        node: pod.node.clone().unwrap_or_default(),
        dpu: dpu.unwrap_or_default(),
        ready: pod.ready,
        labels: pod.labels.clone(),
    }
}

/// Pods that somebody may think are governed and are not, and pods that are governed twice.
fn overlooked(world: &World, findings: &mut Vec<Finding>) {
    for pod in world.pods.values().filter(|pod| pod.own_network && !pod.ended) {
        let namespace = world.namespaces.get(&pod.namespace);
        let meant = pod.opt_in.is_none() && namespace.is_some_and(|namespace| namespace.opted_in);
        let reason = if meant {
            "its namespace is opted in, it is not: it was created before, or without the webhook; create it anew"
        } else if pod.is_opted_in() && pod.sidecar {
            "has a sidecar beside the card: its traffic passes two proxies; create it anew with the webhook in place"
        } else {
            continue;
        };
        findings.push(Finding {
            object: format!("pod {}", pod.key()),
            reason: reason.to_owned(),
        });
    }
}

/// Services with ports that opted-in pods do not reach: the proxies know TCP, and past them nothing translates a service's address.
fn unreached(world: &World, findings: &mut Vec<Finding>) {
    if !world.pods.values().any(Pod::is_opted_in) {
        return;
    }
    let services = world.services.iter();
    for (key, service) in services.filter(|(_, one)| !one.addresses.is_empty() && !one.beside_tcp.is_empty())
    {
        findings.push(Finding {
            object: format!("service {key}"),
            reason: format!(
                "opted-in pods do not reach {} at {}: only TCP is carried to a service's address; give them the address of a pod",
                service.beside_tcp.join(", "),
                service.addresses.join(", ")
            ),
        });
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::controller::{Namespace, OPTED_IN, Service};

    fn node(name: &str, endpoint: Option<&str>) -> Node {
        Node {
            name: name.to_owned(),
            tunnel_endpoint: endpoint.map(str::to_owned),
            pod_cidrs: vec!["10.0.0.0/24".to_owned()],
            ..Node::default()
        }
    }

    fn pod(name: &str, node: &str, address: &str) -> Pod {
        Pod {
            name: name.to_owned(),
            namespace: "shop".to_owned(),
            uid: format!("uid-{name}"),
            service_account: "web".to_owned(),
            node: Some(node.to_owned()),
            addresses: vec![address.to_owned()],
            own_network: true,
            opt_in: Some(OPTED_IN.to_owned()),
            ..Pod::default()
        }
    }

    fn world(nodes: &[Node], pods: &[Pod]) -> World {
        World {
            pods: pods.iter().map(|pod| (pod.key(), pod.clone())).collect(),
            nodes: nodes
                .iter()
                .map(|node| (node.name.clone(), node.clone()))
                .collect(),
            ..World::default()
        }
    }

    fn two_nodes() -> [Node; 2] {
        [node("n1", Some("192.0.2.1")), node("n2", Some("192.0.2.2"))]
    }

    fn bindings(snapshot: &Snapshot) -> Vec<Binding> {
        let all = snapshot.of(ResourceType::Binding);
        all.map(|(_, published)| Binding::decode(&published.resource.value[..]).unwrap())
            .collect()
    }

    fn peers_of(snapshot: &Snapshot) -> Vec<Peer> {
        let all = snapshot.of(ResourceType::Peer);
        all.map(|(_, published)| Peer::decode(&published.resource.value[..]).unwrap())
            .collect()
    }

    fn objects(plan: &Plan) -> Vec<&str> {
        plan.findings
            .iter()
            .map(|finding| finding.object.as_str())
            .collect()
    }

    #[test]
    fn a_port_of_a_service_that_no_proxy_carries_is_named() {
        let service = |address: &str, port: &str| Service {
            addresses: vec![address.to_owned()],
            beside_tcp: vec![port.to_owned()],
        };
        let mut world = world(&two_nodes(), &[]);
        world
            .services
            .insert("kube-system/kube-dns".to_owned(), service("10.96.0.10", "53/UDP"));
        world.services.insert("shop/web".to_owned(), Service::default());
        let mut headless = service("", "5060/SCTP");
        headless.addresses.clear();
        world.services.insert("shop/calls".to_owned(), headless);
        assert_eq!(plan(&world, "td").findings, [], "nobody asks");
        let pod = pod("a", "n1", "10.0.0.1");
        world.pods.insert(pod.key(), pod);
        let plan = plan(&world, "td");
        assert_eq!(objects(&plan), ["service kube-system/kube-dns"]);
        assert!(
            plan.findings[0].reason.contains("53/UDP at 10.96.0.10"),
            "{plan:?}"
        );
    }

    #[test]
    fn each_node_gets_its_own_pods_and_the_other_nodes() {
        let mut stranger = pod("plain", "n1", "10.0.0.9");
        stranger.opt_in = None;
        let plan = plan(
            &world(
                &two_nodes(),
                &[pod("a", "n1", "10.0.0.1"), pod("b", "n2", "10.0.1.1"), stranger],
            ),
            "cluster.local",
        );
        assert_eq!(plan.findings, []);
        let first = &plan.nodes["n1"];
        assert_eq!(first.len(), 2);
        let binding = &bindings(first)[0];
        assert_eq!(binding.spiffe_id(), "spiffe://cluster.local/ns/shop/sa/web");
        assert_eq!((binding.name.as_str(), binding.node.as_str()), ("a", "n1"));
        assert_eq!(binding.addresses, ["10.0.0.1"]);
        assert_eq!(
            peers_of(first),
            [Peer {
                node: "n2".into(),
                tunnel_endpoint: "192.0.2.2".into(),
                addresses: vec!["10.0.1.1".into()],
                pod_cidrs: vec!["10.0.0.0/24".into()],
            }]
        );
        assert_eq!(bindings(&plan.nodes["n2"])[0].name, "b");
        assert_eq!(peers_of(&plan.nodes["n2"])[0].addresses, ["10.0.0.1"]);
    }

    #[test]
    fn a_pod_without_an_address_has_a_binding_already() {
        let mut early = pod("a", "n1", "");
        early.addresses.clear();
        let plan = plan(&world(&two_nodes(), &[early]), "td");
        assert_eq!(bindings(&plan.nodes["n1"])[0].addresses, Vec::<String>::new());
        assert_eq!(peers_of(&plan.nodes["n2"])[0].addresses, Vec::<String>::new());
    }

    #[test]
    fn a_node_with_a_wrong_endpoint_is_nobodys_peer_and_is_named() {
        for wrong in [
            "",
            "host-2",
            "192.0.2.2:4789",
            "0.0.0.0",
            "127.0.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "::",
        ] {
            let nodes = [node("n1", Some("192.0.2.1")), node("n2", Some(wrong))];
            let plan = plan(&world(&nodes, &[pod("b", "n2", "10.0.1.1")]), "td");
            assert_eq!(peers_of(&plan.nodes["n1"]), [], "{wrong:?}");
            assert_eq!(
                bindings(&plan.nodes["n2"]).len(),
                1,
                "its own pods are still served"
            );
            assert_eq!(peers_of(&plan.nodes["n2"])[0].node, "n1");
            assert_eq!(objects(&plan), ["node n2"], "{wrong:?}");
            assert!(plan.findings[0].reason.contains(TUNNEL_ENDPOINT));
        }
    }

    #[test]
    fn an_absent_endpoint_matters_only_where_pods_are() {
        let nodes = [node("n1", Some("192.0.2.1")), node("n2", None)];
        assert_eq!(plan(&world(&nodes, &[]), "td").findings, []);
        let plan = plan(&world(&nodes, &[pod("b", "n2", "10.0.1.1")]), "td");
        assert_eq!(objects(&plan), ["node n2"]);
    }

    #[test]
    fn an_endpoint_of_two_nodes_is_neithers() {
        let nodes = [
            node("n1", Some("192.0.2.1")),
            node("n2", Some("192.0.2.1")),
            node("n3", Some("192.0.2.3")),
        ];
        let plan = plan(&world(&nodes, &[]), "td");
        assert_eq!(peers_of(&plan.nodes["n3"]), []);
        assert_eq!(objects(&plan), ["node n1", "node n2"]);
    }

    #[test]
    fn an_address_of_two_pods_is_neithers_unless_one_is_leaving() {
        let (mut old, new) = (pod("old", "n1", "10.0.0.1"), pod("new", "n2", "10.0.0.1"));
        let disputed = plan(&world(&two_nodes(), &[old.clone(), new.clone()]), "td");
        assert_eq!(objects(&disputed), ["pod shop/new", "pod shop/old"]);
        assert!(peers_of(&disputed.nodes["n1"])[0].addresses.is_empty());
        assert!(bindings(&disputed.nodes["n2"])[0].addresses.is_empty());
        old.leaving = true;
        let settled = plan(&world(&two_nodes(), &[old, new]), "td");
        assert_eq!(settled.findings, []);
        assert_eq!(peers_of(&settled.nodes["n1"])[0].addresses, ["10.0.0.1"]);
        assert!(bindings(&settled.nodes["n1"])[0].addresses.is_empty());
    }

    #[test]
    fn who_only_seems_to_be_governed_is_named() {
        let (mut before, mut twice, mut out) = (
            pod("before", "n1", "10.0.0.1"),
            pod("twice", "n1", "10.0.0.2"),
            pod("out", "n1", "10.0.0.3"),
        );
        before.opt_in = None;
        twice.sidecar = true;
        out.opt_in = Some("sidecar".to_owned());
        let mut world = world(&two_nodes(), &[before, twice, out]);
        let shop = Namespace {
            name: "shop".to_owned(),
            opted_in: true,
        };
        world.namespaces.insert("shop".to_owned(), shop);
        let plan = plan(&world, "td");
        assert_eq!(objects(&plan), ["pod shop/before", "pod shop/twice"]);
        assert_eq!(bindings(&plan.nodes["n1"]).len(), 1);
    }

    fn worlds() -> impl Strategy<Value = World> {
        let endpoint = prop_oneof![
            Just(None),
            Just(Some("nonsense".to_owned())),
            (1u8..5).prop_map(|last| Some(format!("192.0.2.{last}"))),
        ];
        let nodes = proptest::collection::btree_map("n[1-4]", endpoint, 0..4);
        let one = ("n[1-4]", 1u8..12, any::<[bool; 4]>());
        let pods = proptest::collection::btree_map("p[a-h]", one, 0..8);
        (nodes, pods).prop_map(|(nodes, pods)| {
            let nodes: Vec<Node> = nodes
                .iter()
                .map(|(name, endpoint)| node(name, endpoint.as_deref()))
                .collect();
            let pods: Vec<Pod> = pods
                .into_iter()
                .map(|(name, (node, last, [in_, leaving, ended, ready]))| Pod {
                    opt_in: in_.then(|| OPTED_IN.to_owned()),
                    leaving,
                    ended,
                    ready,
                    ..pod(&name, &node, &format!("10.0.0.{last}"))
                })
                .collect();
            world(&nodes, &pods)
        })
    }

    proptest! {
        #[test]
        fn whatever_the_world_nobody_is_sent_somewhere_wrong(world in worlds()) {
            let plan = plan(&world, "td");
            for (name, snapshot) in &plan.nodes {
                let mut own: Vec<String> = bindings(snapshot).iter().map(Binding::resource_name).collect();
                let mut expected: Vec<String> = world.pods.values()
                    .filter(|pod| pod.is_opted_in() && pod.node.as_ref() == Some(name))
                    .map(Pod::key)
                    .collect();
                own.sort();
                expected.sort();
                prop_assert_eq!(own, expected);
                let mut seen = std::collections::BTreeSet::new();
                for peer in peers_of(snapshot) {
                    prop_assert_ne!(&peer.node, name);
                    prop_assert_eq!(Some(&peer.tunnel_endpoint), world.nodes[&peer.node].tunnel_endpoint.as_ref());
                    prop_assert!(seen.insert(peer.tunnel_endpoint.clone()), "an endpoint twice");
                    for address in &peer.addresses {
                        prop_assert!(seen.insert(address.clone()), "an address twice");
                        let owners: Vec<&Pod> = world.pods.values()
                            .filter(|pod| pod.is_opted_in() && pod.addresses.contains(address))
                            .collect();
                        prop_assert!(owners.iter().any(|pod| pod.node.as_ref() == Some(&peer.node)));
                        prop_assert!(owners.iter().filter(|pod| !pod.leaving).count() <= 1);
                    }
                }
            }
        }
    }
}
