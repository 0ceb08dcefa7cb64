//! The steering rules of a node: a pure function of what is known about its pods and its network.
//!
//! [`rules`] says what shall be installed; applying it is a difference, add before remove
//! ([`dpumesh_core::FlowSteeringExt::replace`]). A card may have no more than four priorities, so that is all that the
//! rules use: what must reach the proxy or comes from it, what the network sends past it, what pods send each other past
//! it, and the rest that is counted. They say the same for every pod:
//!
//! | from | what | goes |
//! |---|---|---|
//! | a pod | TCP | to the proxy, always |
//! | a pod | UDP to port 53 and 7, ICMP | to the pod it is for, without the proxy |
//! | a pod | anything else | nowhere: dropped, counted by rule |
//! | the proxy | IP | to the pod it is for, here or through the network; else to the node whose prefix it is of |
//! | the network | TCP to a local pod | to the proxy |
//! | the network | UDP to port 53 and 7, ICMP | to the local pod it is for |
//! | the network | anything else | nowhere: a node is no router between others |

use std::net::IpAddr;

use dpumesh_core::steering::{
    Action, Cookie, Encapsulation, Group, IpMatch, IpProtocol, Owner, Pattern, Priority, RewriteField,
    SteeringRule, TunnelKind,
};
use dpumesh_core::{MacAddr, PortRef, Vni};
use ipnet::IpNet;

/// A pod as every node knows it.
///
/// ```
/// use dpumesh_cni::rules::{Network, Pod, intercept, rules};
/// use dpumesh_core::{MacAddr, PortRef};
///
/// let pod = |name: &str, node, address: &str| Pod {
///     name: name.to_owned(),
///     node,
///     port: PortRef::vf(0),
///     mac: "02:00:00:00:00:01".parse().expect("a MAC"),
///     addresses: vec![address.parse().expect("an address")],
/// };
/// let pods = [pod("shop/web", 0, "10.244.1.1"), pod("shop/db", 1, "10.244.2.1")];
/// let network = Network::Underlay { macs: vec![MacAddr([2, 0, 0, 0, 0, 7]), MacAddr([2, 0, 0, 0, 0, 8])] };
/// let rules = rules(0, &pods, &network);
/// assert!(rules.iter().any(|rule| rule.cookie == intercept(&pods[0])));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Its name, for people.
    pub name: String,
    /// Which node it runs on: an index into [`Network`]'s lists.
    pub node: usize,
    /// Its VF; read for pods of this node only.
    pub port: PortRef,
    /// The VF's MAC; read for pods of this node only.
    pub mac: MacAddr,
    /// Its addresses, of either family; no other pod has one of them.
    pub addresses: Vec<IpAddr>,
}

/// Addresses that another node gives its pods: they are reached there, whether or not anybody has told of each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prefix {
    /// Which node: an index into [`Network`]'s lists.
    pub node: usize,
    /// The addresses.
    pub net: IpNet,
}

/// How packets get from node to node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Network {
    /// In VXLAN between tunnel endpoints, by node.
    Overlay {
        /// Each node's tunnel endpoint, by number of the node.
        vteps: Vec<IpAddr>,
        /// Number of the pods' network.
        vni: Vni,
    },
    /// As they are, between these MACs, by node.
    Underlay {
        /// MAC of each node's uplink, by number of the node.
        macs: Vec<MacAddr>,
    },
}

/// MAC of the router that every pod sees, and that frames in the tunnel between nodes are for.
pub const GATEWAY: MacAddr = MacAddr([0x02, 0xd7, 0, 0, 0, 0xfe]);

/// UDP ports that pods may reach without the proxy: echo and DNS.
pub const UDP_PORTS: [u16; 2] = [7, 53];

/// What must reach the proxy, what comes from it, what comes from the network for a local pod, and the way out of the
/// tunnel.
const INTERCEPT: u32 = 0;
/// Everything else that comes from the network, and what the proxy sends to addresses that only a prefix names.
const FROM_NETWORK: u32 = 1;
/// What pods send each other without the proxy.
const BETWEEN_PODS: u32 = 2;
/// Everything else that is to be counted.
const REST: u32 = 3;

const UPLINK: PortRef = PortRef::Uplink(0);
const STACK: PortRef = PortRef::Stack(0);
/// Where packets out of the tunnel are classified.
const INNER: Group = Group(1);

/// Cookie of the rule that drops and counts a pod's UDP that no other rule forwards.
pub fn other_udp(pod: &Pod) -> Cookie {
    Cookie((0xd0 << 64) | u128::from(vf_number(pod)))
}

/// Cookie of the rule that hands a pod's TCP to the proxy.
pub fn intercept(pod: &Pod) -> Cookie {
    Cookie((0xc0 << 64) | u128::from(vf_number(pod)))
}

/// Number by which the proxy knows a pod's port; not 0, and another for each port of a card.
pub fn ingress(pod: &Pod) -> u32 {
    match pod.port {
        PortRef::Vf { pf, vf, .. } => (u32::from(pf.0) << 16) + u32::from(vf.0) + 1,
        _ => u32::MAX - 1,
    }
}

fn vf_number(pod: &Pod) -> u16 {
    match pod.port {
        PortRef::Vf { vf, .. } => vf.0,
        _ => u16::MAX,
    }
}

/// The rules of node `here` for the pods of all nodes.
///
/// # Panics
/// When `here`, or the node of a pod, has no entry in the network's lists.
pub fn rules(here: usize, pods: &[Pod], network: &Network) -> Vec<SteeringRule> {
    let mut rules = Rules {
        here,
        network,
        all: Vec::new(),
    };
    rules.tunnel_exit();
    rules.add(
        Group::default(),
        FROM_NETWORK,
        from(UPLINK),
        vec![Action::Count, Action::Drop],
    );
    for pod in pods {
        if pod.node == here {
            rules.local(pod);
        } else {
            rules.remote(pod);
        }
    }
    rules.all
}

/// The rules of node `here` for what goes to addresses of other nodes that no [`Pod`] names. A pod's own rules come first for what the proxy
/// sends.
///
/// No pod of another node than the prefix's may have an address in it, and no two prefixes of different nodes may overlap: rules of
/// one priority would contradict each other.
///
/// # Panics
/// As [`rules`].
pub fn rules_to_prefixes(here: usize, prefixes: &[Prefix], network: &Network) -> Vec<SteeringRule> {
    let mut rules = Rules {
        here,
        network,
        all: Vec::new(),
    };
    for prefix in prefixes.iter().filter(|prefix| prefix.node != here) {
        rules.toward(
            prefix.net.trunc().into(),
            prefix.net.addr(),
            prefix.node,
            FROM_NETWORK,
        );
    }
    rules.all
}

/// A rule's name is made from what it matches, and so of whom it speaks: a pod that joins or leaves renames no other pod's
/// rules, and a rule that shall do something else with the same packets keeps its name, so that a difference exchanges the
/// two in one place instead of having both at once.
fn cookie_of(group: Group, priority: u32, pattern: &Pattern) -> Cookie {
    // FNV-1a, 128 bits (draft-eastlake-fnv): the same in every release and on every machine.
    const BASIS: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    // A pattern is plain data: its JSON exists, and differs when it does.
    let text = serde_json::to_vec(&(group, priority, pattern)).unwrap_or_default();
    Cookie(text.iter().fold(BASIS, |hash, octet| {
        (hash ^ u128::from(*octet)).wrapping_mul(PRIME)
    }))
}

struct Rules<'a> {
    here: usize,
    network: &'a Network,
    all: Vec<SteeringRule>,
}

impl Rules<'_> {
    fn add(&mut self, group: Group, priority: u32, pattern: Pattern, actions: Vec<Action>) {
        let cookie = cookie_of(group, priority, &pattern);
        self.add_as(cookie, group, priority, pattern, actions);
    }

    fn add_as(
        &mut self,
        cookie: Cookie,
        group: Group,
        priority: u32,
        pattern: Pattern,
        actions: Vec<Action>,
    ) {
        let rule = SteeringRule::new(cookie, Owner::Agent, Priority(priority), pattern, actions);
        self.all.push(rule.in_group(group));
    }

    /// Overlay: what other nodes send to our tunnel endpoint is taken out and classified by its inner headers. Nobody else
    /// on the network may send into the tunnel.
    fn tunnel_exit(&mut self) {
        let Network::Overlay { vteps, .. } = self.network else {
            return;
        };
        for (node, vtep) in vteps.iter().enumerate() {
            if node == self.here {
                continue;
            }
            let outer = Pattern {
                ip_proto: Some(IpProtocol::UDP),
                l4_dst: Some(4789.into()),
                ip_src: Some(IpMatch::from(*vtep)),
                ip_dst: Some(IpMatch::from(vteps[self.here])),
                ..from(UPLINK)
            };
            let actions = vec![
                Action::Count,
                Action::Decapsulate(TunnelKind::Vxlan),
                Action::Jump(INNER),
            ];
            self.add(Group::default(), INTERCEPT, outer, actions);
        }
    }

    fn local(&mut self, pod: &Pod) {
        let tcp = Pattern {
            ip_proto: Some(IpProtocol::TCP),
            ..from(pod.port)
        };
        self.add_as(
            intercept(pod),
            Group::default(),
            INTERCEPT,
            tcp,
            vec![Action::Count, Action::Punt],
        );
        let udp = Pattern {
            ip_proto: Some(IpProtocol::UDP),
            ..from(pod.port)
        };
        self.add_as(
            other_udp(pod),
            Group::default(),
            REST,
            udp,
            vec![Action::Count, Action::Drop],
        );
        for address in &pod.addresses {
            let deliver = [
                Action::Count,
                Action::Rewrite(RewriteField::EthSrc(GATEWAY)),
                Action::Rewrite(RewriteField::EthDst(pod.mac)),
                Action::Forward(pod.port),
            ];
            let proxied = Pattern {
                port: Some(STACK),
                ..to(*address)
            };
            self.add(Group::default(), INTERCEPT, proxied, deliver.to_vec());
            let (group, network) = self.arrival(*address);
            let tcp = Pattern {
                ip_proto: Some(IpProtocol::TCP),
                ..network.clone()
            };
            self.add(group, INTERCEPT, tcp, vec![Action::Count, Action::Punt]);
            self.without_proxy(group, INTERCEPT, &network, *address, &deliver);
            self.without_proxy(Group::default(), BETWEEN_PODS, &to(*address), *address, &deliver);
        }
    }

    fn remote(&mut self, pod: &Pod) {
        for address in &pod.addresses {
            self.toward((*address).into(), *address, pod.node, INTERCEPT);
        }
    }

    /// To another node: what the proxy sends, at this priority, and what pods send without it.
    fn toward(&mut self, destination: IpMatch, family: IpAddr, node: usize, proxied_at: u32) {
        let send = self.to_node(node);
        let all = Pattern {
            ip_dst: Some(destination),
            ..Pattern::default()
        };
        let proxied = Pattern {
            port: Some(STACK),
            ..all.clone()
        };
        self.add(Group::default(), proxied_at, proxied, send.clone());
        self.without_proxy(Group::default(), BETWEEN_PODS, &all, family, &send);
    }

    /// UDP to the open ports, and ICMP.
    fn without_proxy(
        &mut self,
        group: Group,
        priority: u32,
        base: &Pattern,
        address: IpAddr,
        actions: &[Action],
    ) {
        for port in UDP_PORTS {
            let udp = Pattern {
                ip_proto: Some(IpProtocol::UDP),
                l4_dst: Some(port.into()),
                ..base.clone()
            };
            self.add(group, priority, udp, actions.to_vec());
            let reply = Pattern {
                ip_proto: Some(IpProtocol::UDP),
                l4_src: Some(port.into()),
                ..base.clone()
            };
            self.add(group, priority, reply, actions.to_vec());
        }
        let icmp = if address.is_ipv4() {
            IpProtocol::ICMP
        } else {
            IpProtocol::ICMPV6
        };
        self.add(
            group,
            priority,
            Pattern {
                ip_proto: Some(icmp),
                ..base.clone()
            },
            actions.to_vec(),
        );
    }

    /// Where, and by what, packets from the network to a local pod are recognised.
    fn arrival(&self, address: IpAddr) -> (Group, Pattern) {
        match self.network {
            Network::Overlay { vni, .. } => (
                INNER,
                Pattern {
                    vni: Some(*vni),
                    ..to(address)
                },
            ),
            Network::Underlay { .. } => (
                Group::default(),
                Pattern {
                    port: Some(UPLINK),
                    ..to(address)
                },
            ),
        }
    }

    fn to_node(&self, node: usize) -> Vec<Action> {
        match self.network {
            Network::Overlay { vteps, vni } => {
                let outer = Encapsulation {
                    kind: TunnelKind::Vxlan,
                    vni: *vni,
                    local: vteps[self.here],
                    remote: vteps[node],
                    eth_src: GATEWAY,
                    eth_dst: GATEWAY,
                };
                vec![
                    Action::Count,
                    Action::Rewrite(RewriteField::EthSrc(tunnel_mac(vteps[self.here]))),
                    Action::Rewrite(RewriteField::EthDst(GATEWAY)),
                    Action::Encapsulate(outer),
                    Action::Forward(UPLINK),
                ]
            }
            Network::Underlay { macs } => vec![
                Action::Count,
                Action::Rewrite(RewriteField::EthSrc(macs[self.here])),
                Action::Rewrite(RewriteField::EthDst(macs[node])),
                Action::Forward(UPLINK),
            ],
        }
    }
}

/// MAC by which a node's frames in the tunnel are known: its endpoint's last four octets. They are for [`GATEWAY`], and must not be from it:
/// a Linux VXLAN device that has this MAC, as a node without a DPU needs, drops what seems to come from itself.
fn tunnel_mac(vtep: IpAddr) -> MacAddr {
    let last = match vtep {
        IpAddr::V4(v4) => v4.octets(),
        IpAddr::V6(v6) => {
            let [.., a, b, c, d] = v6.octets();
            [a, b, c, d]
        }
    };
    let [a, b, c, d] = last;
    MacAddr([0x02, 0xd7, a, b, c, d])
}

fn from(port: PortRef) -> Pattern {
    Pattern {
        port: Some(port),
        ..Pattern::default()
    }
}

fn to(address: IpAddr) -> Pattern {
    Pattern {
        ip_dst: Some(IpMatch::from(address)),
        ..Pattern::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn pods() -> Vec<Pod> {
        let pod = |name: &str, node, vf, v4: &str, v6: &str| Pod {
            name: name.to_owned(),
            node,
            port: PortRef::vf(vf),
            mac: MacAddr([2, 0, 0, 0, node as u8, vf as u8]),
            addresses: vec![v4.parse().expect("address"), v6.parse().expect("address")],
        };
        vec![
            pod("a", 0, 0, "10.244.1.1", "fd00:244:1::1"),
            pod("b", 0, 1, "10.244.1.2", "fd00:244:1::2"),
            pod("c", 1, 0, "10.244.2.1", "fd00:244:2::1"),
        ]
    }

    #[test]
    fn every_rule_makes_sense_and_has_a_cookie_of_its_own() {
        let vni = Vni::try_from(42).expect("24 bits");
        let networks = [
            Network::Overlay {
                vteps: vec!["192.0.2.1".parse().expect("address"); 2],
                vni,
            },
            Network::Underlay {
                macs: vec![GATEWAY; 2],
            },
        ];
        for network in networks {
            for here in 0..2 {
                let rules = rules(here, &pods(), &network);
                let cookies: HashSet<_> = rules.iter().map(|rule| rule.cookie).collect();
                assert_eq!(cookies.len(), rules.len());
                for rule in &rules {
                    rule.check().unwrap_or_else(|error| panic!("{rule:?}: {error}"));
                }
            }
        }
    }

    #[test]
    fn a_prefix_leads_to_its_node_behind_the_pods_that_are_named() {
        let network = Network::Overlay {
            vteps: ["192.0.2.1", "192.0.2.2", "192.0.2.3"]
                .map(|vtep| vtep.parse().expect("address"))
                .to_vec(),
            vni: Vni::try_from(42).expect("24 bits"),
        };
        let prefix = |node, net: &str| Prefix {
            node,
            net: net.parse().expect("a prefix"),
        };
        let prefixes = [
            prefix(0, "10.244.1.0/24"),
            prefix(1, "10.244.2.0/24"),
            prefix(2, "10.244.3.9/24"),
            prefix(2, "fd00:244:3::/64"),
        ];
        let named = rules(0, &pods(), &network);
        let all = rules_to_prefixes(0, &prefixes, &network);
        assert!(
            all.iter().all(|rule| rule.check().is_ok()),
            "host bits are cut off"
        );
        assert_eq!(all.len(), 3 * 6, "none to ourselves");
        let cookies: HashSet<_> = named.iter().chain(&all).map(|rule| rule.cookie).collect();
        assert_eq!(cookies.len(), named.len() + all.len());
        let from_proxy = |rule: &&SteeringRule| rule.pattern.port == Some(STACK);
        let first = named.iter().filter(from_proxy).map(|rule| rule.priority).max();
        assert!(
            all.iter()
                .filter(from_proxy)
                .all(|rule| Some(rule.priority) > first)
        );
        let remote = |rule: &SteeringRule| {
            rule.actions.iter().find_map(|action| match action {
                Action::Encapsulate(outer) => Some(outer.remote.to_string()),
                _ => None,
            })
        };
        let source = Action::Rewrite(RewriteField::EthSrc("02:d7:c0:00:02:01".parse().expect("a MAC")));
        assert!(
            all.iter().all(|rule| rule.actions.contains(&source)),
            "never the gateway's own"
        );
        assert_eq!(remote(&all[0]).as_deref(), Some("192.0.2.2"));
        assert!(
            all[6..]
                .iter()
                .all(|rule| remote(rule).as_deref() == Some("192.0.2.3"))
        );
    }

    #[test]
    fn a_pod_that_leaves_renames_no_other_pods_rules() {
        let network = Network::Underlay {
            macs: vec![GATEWAY; 2],
        };
        let all = rules(0, &pods(), &network);
        for gone in 0..3 {
            let mut rest = pods();
            let gone = rest.remove(gone);
            let left = rules(0, &rest, &network);
            assert!(
                left.iter().all(|rule| all.contains(rule)),
                "without {}",
                gone.name
            );
            assert!(left.len() < all.len());
        }
    }

    #[test]
    fn an_address_that_moves_keeps_the_names_of_the_rules_to_it() {
        let network = Network::Underlay {
            macs: vec![GATEWAY; 2],
        };
        let before = rules(1, &pods(), &network); // from there, `a` is remote
        let mut moved = pods();
        moved[0].node = 1;
        moved[0].port = PortRef::vf(9);
        let after = rules(1, &moved, &network);
        // Two rules of one match with different actions must never be installed at once.
        for rule in &after {
            let twin = before.iter().find(|other| {
                (other.group, other.priority, &other.pattern) == (rule.group, rule.priority, &rule.pattern)
            });
            assert!(twin.is_none_or(|twin| twin.cookie == rule.cookie), "{rule:?}");
        }
    }

    #[test]
    fn tcp_of_a_pod_has_no_way_but_the_proxy() {
        let network = Network::Underlay {
            macs: vec![GATEWAY; 2],
        };
        let rules = rules(0, &pods(), &network);
        for rule in rules
            .iter()
            .filter(|rule| rule.actions.iter().any(|a| matches!(a, Action::Forward(_))))
        {
            let from_stack = rule.pattern.port == Some(STACK);
            let not_tcp = rule
                .pattern
                .ip_proto
                .is_some_and(|proto| proto != IpProtocol::TCP);
            assert!(from_stack || not_tcp, "{rule:?} would forward TCP of a pod");
        }
    }

    #[test]
    fn nothing_from_the_network_goes_back_to_it() {
        let network = Network::Underlay {
            macs: vec![GATEWAY; 2],
        };
        let rules = rules(0, &pods(), &network);
        let back = rules.iter().filter(|rule| {
            let from_network = rule.pattern.port.is_none_or(|port| port == UPLINK);
            from_network && rule.actions.contains(&Action::Forward(UPLINK))
        });
        let dropped = rules
            .iter()
            .find(|rule| rule.pattern == from(UPLINK))
            .expect("a rule for everything from the network");
        assert_eq!(dropped.actions.last(), Some(&Action::Drop));
        for rule in back {
            assert!(
                dropped.priority < rule.priority,
                "{rule:?} is asked before {dropped:?}"
            );
        }
    }
}
