//! The aggregate, read back as Envoy would, beside each pod's own view, read as Envoy would: two evaluators that share no code with
//! what they judge.

mod own;
mod property;
mod shared;

use std::net::IpAddr;

use super::*;
use crate::recorded;
use shared::Proxy;

pub(super) const OPTIONS: Options = Options {
    outbound: SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 15_001),
    inbound: SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 15_006),
    interception: Interception::Transparent,
};

/// A connection before its chain is chosen.
#[derive(Debug, Clone)]
pub(super) struct Connection {
    pub(super) source: IpAddr,
    pub(super) destination: IpAddr,
    pub(super) port: u16,
    pub(super) first_octets: FirstOctets,
}

#[derive(Debug, Clone)]
pub(super) enum FirstOctets {
    Tls {
        server_name: Option<String>,
        protocols: Vec<String>,
    },
    Http(&'static str),
    Other,
}

fn views() -> Vec<PodView> {
    (0..recorded::PODS.len())
        .map(|index| recorded::view(index).0)
        .collect()
}

fn connection(source: &str, destination: &str, port: u16, first_octets: FirstOctets) -> Connection {
    Connection {
        source: source.parse().unwrap(),
        destination: destination.parse().unwrap(),
        port,
        first_octets,
    }
}

fn mesh_tls(protocols: &[&str]) -> FirstOctets {
    FirstOctets::Tls {
        server_name: Some("outbound_.80_._.reviews.shop.svc.cluster.local".into()),
        protocols: protocols.iter().map(|p| (*p).to_owned()).collect(),
    }
}

#[test]
fn recorded_pods_go_where_their_sidecars_would_send_them() {
    let aggregate = aggregate(&views(), &OPTIONS);
    assert_eq!(aggregate.closed, []);
    let proxy = Proxy::new(&aggregate.snapshot);
    let chain = |name: &str, c: &Connection| {
        proxy
            .chain(name, c)
            .rsplit_once('@')
            .map_or_else(|| "deny".to_owned(), |(name, _)| name.to_owned())
    };

    let http = connection("10.244.1.11", "10.96.1.2", 80, FirstOctets::Http("http/1.1"));
    assert_eq!(chain(OUTBOUND, &http), "0.0.0.0_80/chain-0");
    let tcp = connection("10.244.1.11", "10.96.1.2", 9000, FirstOctets::Other);
    assert_eq!(chain(OUTBOUND, &tcp), "10.96.1.2_9000/chain-0");
    let unknown_port = connection("10.244.1.11", "192.0.2.7", 7777, FirstOctets::Other);
    assert_eq!(
        chain(OUTBOUND, &unknown_port),
        "virtualOutbound/virtualOutbound-catchall-tcp"
    );
    let not_http = connection("10.244.1.12", "10.96.1.2", 80, FirstOctets::Other);
    assert_eq!(chain(OUTBOUND, &not_http), "0.0.0.0_80/PassthroughFilterChain");
    let stranger = connection("10.244.9.9", "10.96.1.2", 80, FirstOctets::Http("http/1.1"));
    assert_eq!(chain(OUTBOUND, &stranger), "deny");

    let mesh = connection(
        "10.244.1.11",
        "10.244.1.12",
        8080,
        mesh_tls(&["istio-http/1.1", "istio"]),
    );
    assert_eq!(
        chain(INBOUND, &mesh),
        "reviews-1.shop/virtualInbound/0.0.0.0_8080"
    );
    let plain = connection("10.244.1.11", "10.244.1.12", 8080, FirstOctets::Http("http/1.1"));
    assert_eq!(chain(INBOUND, &plain), "deny", "STRICT");
    let other_port = connection(
        "10.244.1.11",
        "10.244.1.12",
        1234,
        mesh_tls(&["istio-http/1.1", "istio"]),
    );
    assert_eq!(
        chain(INBOUND, &other_port),
        "reviews-1.shop/virtualInbound/virtualInbound-catchall-http"
    );
    let nobody = connection("10.244.1.11", "10.244.9.9", 8080, mesh_tls(&["istio"]));
    assert_eq!(chain(INBOUND, &nobody), "deny");
}

#[test]
fn what_is_equal_is_shared_and_what_holds_state_is_not() {
    let aggregate = aggregate(&views(), &OPTIONS);
    let clusters: Vec<&str> = aggregate
        .snapshot
        .of(ResourceType::Cluster)
        .map(|(name, _)| name.as_str())
        .collect();
    let front: Vec<_> = clusters
        .iter()
        .filter(|name| name.starts_with("outbound|80||front"))
        .collect();
    assert_eq!(front, [&"outbound|80||front.shop.svc.cluster.local"]);
    let reviews: Vec<_> = clusters
        .iter()
        .filter(|name| name.starts_with("outbound|80|v1|"))
        .copied()
        .collect();
    let of = |pod: &str| format!("outbound|80|v1|reviews.shop.svc.cluster.local@{pod}.shop");
    assert_eq!(reviews, [of("front-1"), of("reviews-1"), of("reviews-2")]);
    // The two reviews pods have one identity and equal clusters but own limits: three routes, one per pod.
    assert_eq!(aggregate.snapshot.of(ResourceType::Route).count(), 3);
    assert_eq!(aggregate.snapshot.of(ResourceType::Endpoints).count(), 10);
}

#[test]
fn only_clusters_discovered_by_eds_say_how() {
    let proxy = Proxy::new(&aggregate(&views(), &OPTIONS).snapshot);
    for (name, cluster) in &proxy.clusters {
        assert_eq!(
            cluster.has("eds_cluster_config"),
            cluster.choice("type") == "EDS",
            "{name}"
        );
    }
}

#[test]
fn same_pods_in_any_order_give_the_same_bytes() {
    let forwards = aggregate(&views(), &OPTIONS).snapshot;
    let mut turned = views();
    turned.reverse();
    assert!(forwards == aggregate(&turned, &OPTIONS).snapshot);
}

#[test]
fn a_pod_that_comes_changes_no_other_pods_chains() {
    let all = views();
    let before = aggregate(&all[..2], &OPTIONS).snapshot;
    let after = aggregate(&all, &OPTIONS).snapshot;
    let (before, after) = (Proxy::new(&before), Proxy::new(&after));
    for name in before.chain_names(INBOUND) {
        assert_eq!(
            before.chain_bytes(INBOUND, &name),
            after.chain_bytes(INBOUND, &name),
            "{name}"
        );
    }
}

#[test]
fn pods_that_come_and_go_leave_others_clusters_and_chains_as_they_are() {
    let all = views();
    let orders: [&[usize]; 6] = [&[0, 1], &[0, 1, 2], &[1, 2], &[0, 1, 2], &[0, 2], &[0]];
    let mut before = Aggregate::default();
    for order in orders {
        let present: Vec<PodView> = order.iter().map(|index| all[*index].clone()).collect();
        let after = before.next(&present, &OPTIONS);
        for ((kind, name), users) in &before.users {
            let stays = |pod: &String| present.iter().any(|view| view.pod.key() == *pod);
            if *kind == ResourceType::Listener || !users.iter().any(stays) {
                continue;
            }
            let content = |made: &Aggregate| made.snapshot.get(*kind, name).map(|p| p.version.clone());
            assert_eq!(content(&before), content(&after), "{kind} {name}");
        }
        before = after;
    }
}

#[test]
fn inbound_clusters_carry_their_pods_name() {
    let made = aggregate(&views(), &OPTIONS);
    for view in views() {
        let name = format!("inbound|8080||@{}", view.pod.key());
        assert!(
            made.snapshot.get(ResourceType::Cluster, &name).is_some(),
            "{name}"
        );
    }
}

#[test]
fn the_proxy_is_told_who_the_pods_are() {
    let mut all = views();
    all[0].workload = crate::ir::Workload {
        name: "front".into(),
        canonical_name: "front-svc".into(),
        canonical_revision: "v1".into(),
        cluster: "Kubernetes".into(),
        ..Default::default()
    };
    all[1].workload = all[0].workload.clone();
    all[1].routes.clear();
    let proxy = Proxy::new(&aggregate(&all, &OPTIONS).snapshot);
    let said = format!("{:?}", proxy.clusters[DENY_CLUSTER].message("metadata"));
    for part in [
        WORKLOADS,
        "front-1.shop",
        "10.244.1.11",
        "front-svc",
        "v1",
        "Kubernetes",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    for pod in ["reviews-1.shop", "reviews-2.shop"] {
        assert!(!said.contains(pod), "without a program, or nothing known: {said}");
    }
}

#[test]
fn no_whole_program_no_way_through() {
    let mut all = views();
    all[0].routes.clear();
    all[1].pod.addresses = all[2].pod.addresses.clone();
    let aggregate = aggregate(&all, &OPTIONS);
    let reasons: Vec<_> = aggregate
        .closed
        .iter()
        .map(|c| (c.pod.as_str(), c.reason.as_str()))
        .collect();
    assert_eq!(
        reasons,
        [
            ("front-1.shop", "waits for route 80"),
            ("reviews-1.shop", "another pod claims its address 10.244.2.12 too"),
            ("reviews-2.shop", "another pod claims its address 10.244.2.12 too"),
        ]
    );
    let proxy = Proxy::new(&aggregate.snapshot);
    let http = connection("10.244.2.12", "10.96.1.2", 80, FirstOctets::Http("http/1.1"));
    assert_eq!(proxy.chain(OUTBOUND, &http), matcher::DENY);
}

#[test]
fn golden_summary_of_the_recorded_node() {
    let aggregate = aggregate(&views(), &OPTIONS);
    let mut text = format!("{:?}\n", aggregate.figures);
    for kind in ResourceType::ALL {
        for (name, published) in aggregate.snapshot.of(kind) {
            text.push_str(&format!("{kind}\t{name}\t{}\n", published.version));
        }
    }
    let proxy = Proxy::new(&aggregate.snapshot);
    for listener in [OUTBOUND, INBOUND] {
        for chain in proxy.chain_names(listener) {
            text.push_str(&format!("{listener} chain\t{chain}\n"));
        }
    }
    for note in &aggregate.notes {
        text.push_str(&format!(
            "note\t{}\t{}\t{}\n",
            note.resource, note.path, note.what
        ));
    }
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/recorded/aggregate.txt");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(path, &text).unwrap();
    }
    let golden = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        golden == text,
        "run with UPDATE_GOLDEN=1 and look at the difference:\n{text}"
    );
}
