//! For any pods and any connection, the shared proxy does for a pod what its own sidecar would have done.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};

use super::shared::Proxy;
use super::{Connection, FirstOctets, OPTIONS, own};
use crate::aggregate::{INBOUND, OUTBOUND, aggregate, matcher::DENY};
use crate::ir::*;
use crate::schema::{self, At};
use crate::translate;

const PORTS: [u16; 4] = [80, 443, 8080, 9000];
const HOSTS: [&str; 3] = ["10.96.0.1", "10.96.0.2", "10.97.0.1"];
const NAMES: [&str; 4] = ["a.example", "*.example", "b.a.example", "*.a.example"];
const PROTOCOLS: [&str; 5] = ["istio-http/1.1", "istio", "h2", "http/1.1", "h2c"];
const CLUSTERS: [&str; 3] = ["one", "two", "absent"];

fn content(type_name: &'static str, json: &serde_json::Value) -> Content {
    let message = schema::value_to_message(type_name, json, "").unwrap();
    let mut references = References::default();
    if let Some(cluster) = json.pointer("/filters/0/typed_config/cluster") {
        references.clusters.insert(cluster.as_str().unwrap().to_owned());
    }
    Content {
        body: Body::new(type_name, translate::encode(&message)),
        references: Arc::new(references),
    }
}

/// A chain that is told by the statistics it keeps and the cluster it leads to.
fn chain(matches: ChainMatch, stat: usize, cluster: &str, stateful: bool) -> FilterChain {
    let json = serde_json::json!({"filters": [{"name": "tcp", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
        "stat_prefix": format!("s{stat}"), "cluster": cluster}}]});
    FilterChain {
        name: "chain".into(),
        matches,
        content: content("envoy.config.listener.v3.FilterChain", &json),
        stateful,
    }
}

fn some_of<T: Clone + std::fmt::Debug + 'static>(values: Vec<T>) -> impl Strategy<Value = Vec<T>> {
    let most = values.len().min(2);
    prop_oneof![2 => Just(Vec::new()), 1 => subsequence(values, 1..=most)]
}

fn matches() -> impl Strategy<Value = ChainMatch> {
    let prefixes: Vec<IpNet> = ["10.96.0.0/16", "10.96.0.1/32", "0.0.0.0/0"]
        .map(|p| p.parse().unwrap())
        .to_vec();
    (
        proptest::option::of(select(PORTS.to_vec())),
        some_of(prefixes),
        some_of(NAMES.map(String::from).to_vec()),
        proptest::option::of(select(vec!["tls".to_owned(), "raw_buffer".to_owned()])),
        some_of(PROTOCOLS.map(String::from).to_vec()),
    )
        .prop_map(
            |(destination_port, prefixes, server_names, transport, alpn)| ChainMatch {
                destination_port,
                prefixes,
                server_names,
                transport,
                alpn,
            },
        )
}

fn port_set() -> impl Strategy<Value = PortSet> {
    let some = subsequence(PORTS.to_vec(), 0..=2).prop_map(|ports| {
        let mut set = PortSet::none();
        ports.into_iter().for_each(|port| set.insert(port));
        set
    });
    (some, any::<bool>()).prop_map(|(set, turned)| if turned { set.complement() } else { set })
}

fn detection() -> impl Strategy<Value = Detection> {
    (port_set(), port_set()).prop_map(|(tls, http)| Detection {
        tls,
        http,
        timeout: None,
        continue_on_timeout: true,
    })
}

fn chains() -> impl Strategy<Value = (Vec<FilterChain>, Option<FilterChain>)> {
    let one = (
        matches(),
        0usize..4,
        select(CLUSTERS.to_vec()),
        prop::bool::weighted(0.1),
    )
        .prop_map(|(matches, stat, cluster, stateful)| chain(matches, stat, cluster, stateful));
    let default =
        (0usize..4, select(CLUSTERS.to_vec())).prop_map(|(s, c)| chain(ChainMatch::default(), s, c, false));
    (
        proptest::collection::vec(one, 0..5),
        proptest::option::of(default),
    )
}

fn listener(role: Role, name: String, addresses: Vec<SocketAddr>) -> impl Strategy<Value = Listener> {
    (chains(), detection()).prop_map(move |((chains, default_chain), detection)| Listener {
        name: name.clone(),
        role,
        addresses: addresses.clone(),
        chains,
        default_chain,
        detection,
    })
}

fn outbound() -> impl Strategy<Value = Vec<Listener>> {
    let mut all: Vec<BoxedStrategy<Listener>> = Vec::new();
    for port in &PORTS[..2] {
        for host in ["0.0.0.0", HOSTS[0], "::"] {
            let address = SocketAddr::new(host.parse().unwrap(), *port);
            all.push(listener(Role::Outbound, format!("{host}_{port}"), vec![address]).boxed());
        }
    }
    (all, subsequence((0..6).collect::<Vec<usize>>(), 0..=4)).prop_map(|(all, keep)| {
        all.into_iter()
            .enumerate()
            .filter(|(i, _)| keep.contains(i))
            .map(|(_, l)| l)
            .collect()
    })
}

fn cluster(name: &str, variant: usize, stateful: bool, pod: usize) -> Cluster {
    // Half of the variants differ between pods.
    let timeout = if variant < 2 { variant + 1 } else { 10 + pod };
    let json = serde_json::json!({"type": "EDS", "connect_timeout": format!("{timeout}s"), "eds_cluster_config": {"eds_config": {"ads": {}}}});
    Cluster {
        name: name.into(),
        content: content("envoy.config.cluster.v3.Cluster", &json),
        endpoints: Some(name.into()),
        stateful,
    }
}

fn assignment(name: &str, variant: usize) -> Assignment {
    let json = serde_json::json!({"policy": {"overprovisioning_factor": variant + 100}});
    Assignment {
        name: name.into(),
        content: content("envoy.config.endpoint.v3.ClusterLoadAssignment", &json),
    }
}

fn view(index: usize) -> impl Strategy<Value = PodView> {
    let any_address = |port| vec![SocketAddr::new("0.0.0.0".parse().unwrap(), port)];
    (
        listener(Role::CatchAll, "virtualOutbound".into(), any_address(15_001)),
        listener(Role::Inbound, "virtualInbound".into(), any_address(15_006)),
        outbound(),
        proptest::collection::vec((0usize..4, any::<bool>(), 0usize..2), 2),
        0usize..2,
    )
        .prop_map(move |(catch_all, inbound, outbound, clusters, account)| {
            let mut view = PodView::new(Pod {
                name: format!("p{index}"),
                addresses: vec![address(index), format!("fd00::{}", index + 1).parse().unwrap()],
                identity: Identity {
                    trust_domain: "cluster.local".into(),
                    namespace: "n".into(),
                    service_account: format!("sa{account}"),
                },
            });
            for listener in [catch_all, inbound].into_iter().chain(outbound) {
                view.listeners.insert(listener.name.clone(), Arc::new(listener));
            }
            for (name, (variant, stateful, endpoints)) in CLUSTERS.iter().zip(clusters) {
                view.clusters
                    .insert((*name).into(), Arc::new(cluster(name, variant, stateful, index)));
                view.endpoints
                    .insert((*name).into(), Arc::new(assignment(name, endpoints)));
            }
            view
        })
}

fn address(index: usize) -> IpAddr {
    format!("10.1.0.{}", index + 1).parse().unwrap()
}

fn first_octets() -> impl Strategy<Value = FirstOctets> {
    let offered: Vec<String> = PROTOCOLS
        .iter()
        .map(|p| (*p).to_owned())
        .chain(["unknown".to_owned()])
        .collect();
    let name = select(vec!["a.example", "x.example", "b.a.example", "y.a.example", "z"]);
    prop_oneof![
        4 => (proptest::option::of(name), subsequence(offered, 0..=3).prop_shuffle()).prop_map(|(name, protocols)| {
            FirstOctets::Tls { server_name: name.map(String::from), protocols }
        }),
        2 => select(vec!["http/1.1", "h2c", "http/1.0"]).prop_map(FirstOctets::Http),
        1 => Just(FirstOctets::Other),
    ]
}

fn connections() -> impl Strategy<Value = Vec<(usize, bool, Connection)>> {
    let hosts: Vec<IpAddr> = HOSTS
        .iter()
        .chain(&["fd01::1"])
        .map(|h| h.parse().unwrap())
        .collect();
    let ports: Vec<u16> = PORTS.iter().copied().chain([5]).collect();
    let one = (
        0usize..3,
        any::<bool>(),
        select(hosts),
        select(ports),
        first_octets(),
    )
        .prop_map(|(pod, inbound, host, port, first_octets)| {
            let pod_address = if host.is_ipv4() {
                address(pod)
            } else {
                format!("fd00::{}", pod + 1).parse().unwrap()
            };
            let (source, destination) = if inbound {
                (host, pod_address)
            } else {
                (pod_address, host)
            };
            (
                pod,
                inbound,
                Connection {
                    source,
                    destination,
                    port,
                    first_octets,
                },
            )
        });
    proptest::collection::vec(one, 24)
}

/// What a chain is, without its names: whose statistics, and which cluster with which endpoints.
#[derive(Debug, PartialEq)]
struct Meaning {
    stat: String,
    cluster: Option<(String, Option<u64>)>,
    certificate: Option<String>,
}

fn meant_by_view(view: &PodView, chain: &FilterChain, inbound: bool) -> Meaning {
    let tcp = At::new(translate::open(&chain.content.body), "")
        .messages("filters")
        .remove(0)
        .any("typed_config")
        .unwrap()
        .unwrap();
    let cluster = view.clusters.get(&tcp.text("cluster")).map(|cluster| {
        let body = At::new(translate::open(&cluster.content.body), "");
        let endpoints = &view.endpoints[cluster.endpoints.as_ref().unwrap()].content.body;
        (timeout(&body), factor(&At::new(translate::open(endpoints), "")))
    });
    Meaning {
        stat: tcp.text("stat_prefix"),
        cluster,
        certificate: (!inbound).then(|| view.pod.identity.spiffe()),
    }
}

fn meant_by_proxy(proxy: &Proxy, listener: &str, chain: &str, pod: &str) -> Meaning {
    let mut filters = proxy.filter_chain(listener, chain).messages("filters");
    let certificate = (filters.len() > 1).then(|| {
        let state = filters
            .remove(0)
            .any("typed_config")
            .unwrap()
            .unwrap()
            .messages("on_new_connection")
            .remove(0);
        state
            .message("format_string")
            .unwrap()
            .message("text_format_source")
            .unwrap()
            .text("inline_string")
    });
    let tcp = filters.remove(0).any("typed_config").unwrap().unwrap();
    let name = tcp.text("cluster");
    if let Some((_, owner)) = name.split_once('@') {
        let another = owner.starts_with('p') && owner != pod;
        assert!(!another, "a cluster of {owner} is used for {pod}");
    }
    let cluster = proxy.clusters.get(&name).map(|cluster| {
        let service = cluster
            .message("eds_cluster_config")
            .unwrap()
            .text("service_name");
        (timeout(cluster), factor(&proxy.endpoints[&service]))
    });
    Meaning {
        stat: tcp.text("stat_prefix"),
        cluster,
        certificate,
    }
}

fn timeout(cluster: &At) -> String {
    format!("{:?}", cluster.duration("connect_timeout").unwrap())
}

fn factor(assignment: &At) -> Option<u64> {
    assignment
        .message("policy")
        .unwrap()
        .number("overprovisioning_factor")
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, max_shrink_iters: 400, ..ProptestConfig::default() })]

    #[test]
    fn the_aggregate_restricted_to_a_pod_is_that_pods_own_view(
        views in (view(0), view(1), view(2)),
        connections in connections(),
    ) {
        let views = vec![views.0, views.1, views.2];
        let aggregate = aggregate(&views, &OPTIONS);
        let proxy = Proxy::new(&aggregate.snapshot);
        for (pod, inbound, connection) in connections {
            let view = &views[pod];
            let listener = if inbound { INBOUND } else { OUTBOUND };
            let chosen = proxy.chain(listener, &connection);
            if aggregate.closed.iter().any(|closed| closed.pod == view.pod.key()) {
                prop_assert_eq!(&chosen, DENY);
                continue;
            }
            let (own, undecided) = own::chain(view, inbound, &connection);
            match own {
                _ if chosen == DENY && undecided => {}
                None => prop_assert_eq!(&chosen, DENY, "{:?}", connection),
                Some(chain) => {
                    prop_assert_ne!(&chosen, DENY, "{:?} {:?}", connection, chain);
                    let expected = meant_by_view(view, chain, inbound);
                    let got = meant_by_proxy(&proxy, listener, &chosen, &view.pod.key());
                    prop_assert_eq!(got, expected, "{:?}", connection);
                }
            }
        }
    }
}
