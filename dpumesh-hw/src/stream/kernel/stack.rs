//! Makes a network namespace a stack for interception.
//!
//! What is set up, for IPv4 and IPv6 alike:
//! * rule: what comes in by the stack interface is looked up in a table of its own, where everything is local;
//! * main table: everything leaves by the stack interface, which resolves no neighbours;
//! * the interception table of [`crate::netlink::nft`];
//! * kernel settings: the packet's mark becomes the accepted socket's, ports in TIME_WAIT are used again (without
//!   that, short connections to one endpoint soon use up its source ports), a wide range of source ports.
//!
//! A proxy that has one port for what leaves pods and another for what comes to them ([`InboundPort`]) sees a connection
//! from pod to pod of one node twice, as two proxies would: what it connects with the mark [`HAIRPIN_MARK`] is looked
//! up in one more table, which has the addresses of local pods ([`KernelStack::set_local_pods`]) as local. Such packets loop
//! back by `lo` to its inbound port and never reach the dataplane; what has no entry there leaves by the stack interface.
//! Without the mark, everything leaves: so do connections of its inbound side to the pods.
//!
//! Turned down, because tried and found not to work: `local default` in the table `local`, and a rule by mark
//! (it catches the proxy's replies too once accepted sockets carry the mark).

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use ipnet::IpNet;

use crate::netlink::nft::{Inbound, Interception, InterceptionCounters, NfTables};
use crate::netlink::sysctl::{self, SysctlError};
use crate::netlink::{
    Link, LinkChange, Netlink, NetlinkError, PROTOCOL, Route, RouteKind, RouteMetrics, Rule,
};
use crate::netns::{Namespace, NamespaceError};
use crate::stream::IngressPort;

/// Mark of the proxy's connections for pods that go to its own inbound port if their endpoint is a pod of this node. Ports
/// of a card are numbered from 1, so that no [`IngressPort`] is this.
pub const HAIRPIN_MARK: u32 = 0xffff_fffd;

/// How the stack shall be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelStackConfig {
    /// The stack interface; it exists in the namespace already.
    pub interface: String,
    /// The proxy's TCP port.
    pub proxy_port: u16,
    /// Where what comes to pods goes instead; `None`: to `proxy_port` as well.
    pub inbound: Option<InboundPort>,
    /// Routing table for incoming packets; not one of the kernel's own. The next one is for hairpins.
    pub table: u32,
    /// Reserved node-local source addresses.
    pub local_source: LocalSource,
    /// Path properties of everything that leaves the stack: congestion control, MTU, announced segment size.
    pub metrics: RouteMetrics,
}

/// The proxy's port for what comes to pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InboundPort {
    /// Its TCP port.
    pub port: u16,
    /// The ingress port by which the network's packets come.
    pub network: IngressPort,
}

/// Node-local addresses that no pod has: the source of the node's own connections and of a pod's connections to
/// itself. The dataplane routes them to the stack.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct LocalSource {
    /// For IPv4.
    pub v4: Option<Ipv4Addr>,
    /// For IPv6.
    pub v6: Option<Ipv6Addr>,
}

impl LocalSource {
    /// The one of the same family as `other`.
    pub fn like(self, other: IpAddr) -> Option<IpAddr> {
        match other {
            IpAddr::V4(_) => self.v4.map(IpAddr::V4),
            IpAddr::V6(_) => self.v6.map(IpAddr::V6),
        }
    }
}

impl KernelStackConfig {
    /// Table 100, the interface's MTU, the system's congestion control.
    pub fn new(interface: &str, proxy_port: u16, local_source: LocalSource) -> Self {
        Self {
            interface: interface.to_owned(),
            proxy_port,
            inbound: None,
            table: 100,
            local_source,
            metrics: RouteMetrics::default(),
        }
    }
}

/// A namespace set up for interception.
#[derive(Debug)]
pub struct KernelStack {
    namespace: Namespace,
    config: KernelStackConfig,
    ipv6: bool,
}

/// What kept a stack from being set up.
#[derive(Debug, thiserror::Error)]
pub enum StackError {
    /// The configuration cannot be meant.
    #[error("stack configuration: {0}")]
    Config(String),
    /// The namespace.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    /// Links, routes, rules or nf_tables.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// A kernel setting.
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
}

impl KernelStack {
    /// Sets up `namespace`. May be run again on the same namespace, with the same or another configuration: rules
    /// and routes of ours that no longer belong are removed, and connections go on. The interception table comes
    /// before the interface is up and anything is routed, so a stack that is half set up lets nothing in. Blocks for
    /// some milliseconds.
    ///
    /// # Errors
    /// Names the object that was refused. What was set up before it stays; running again is safe.
    pub fn prepare(namespace: &Namespace, config: KernelStackConfig) -> Result<Self, StackError> {
        let stack = Self::attach(namespace, config)?;
        let mut netlink = Netlink::open_in(namespace)?;
        let link = netlink.link(&stack.config.interface)?;
        stack.settings(&mut netlink, &link)?;
        NfTables::open_in(namespace)?.replace(&stack.interception())?;
        stack.raise(&mut netlink, &link)?;
        for ipv6 in stack.families() {
            stack.route(&mut netlink, &link, ipv6)?;
            stack.rules(&mut netlink, ipv6)?;
        }
        Ok(stack)
    }

    /// Makes these, and no other, the addresses of pods of this node: what the proxy connects to them with [`HAIRPIN_MARK`]
    /// goes to its inbound port. A pod must be in before the dataplane passes on to it what leaves the stack. Blocks for
    /// well under a millisecond per address.
    ///
    /// # Errors
    /// If the kernel refuses; the next call starts from what is there.
    pub fn set_local_pods(&self, addresses: &BTreeSet<IpAddr>) -> Result<(), StackError> {
        let table = self.hairpin_table();
        let mut netlink = Netlink::open_in(&self.namespace)?;
        let loopback = netlink.link("lo")?.index;
        let wanted: BTreeSet<IpNet> = addresses
            .iter()
            .filter(|address| self.ipv6 || address.is_ipv4())
            .map(|address| IpNet::from(*address))
            .collect();
        for net in &wanted {
            netlink.replace_route(&Route::new(*net).kind(RouteKind::Local).table(table).on(loopback))?;
        }
        for route in netlink.routes(Some(table))? {
            if !wanted.contains(&route.destination) {
                accept_missing(netlink.delete_route(&route))?;
            }
        }
        Ok(())
    }

    fn hairpin_table(&self) -> u32 {
        self.config.table + 1
    }

    /// Uses a namespace that another process has prepared with the same configuration.
    ///
    /// # Errors
    /// If the configuration cannot be meant, or descriptors have run out.
    pub fn attach(namespace: &Namespace, config: KernelStackConfig) -> Result<Self, StackError> {
        check(&config)?;
        let ipv6 = namespace.run(|| Path::new("/proc/sys/net/ipv6").exists())?;
        Ok(Self {
            namespace: namespace.try_clone()?,
            config,
            ipv6,
        })
    }

    /// Takes the interception away: the stack interface goes down, then rules and table go. The namespace stays. A
    /// stack that ends needs nothing of this: dropping the last handle on the namespace removes everything.
    ///
    /// # Errors
    /// If the kernel refuses. If the interface cannot be taken down, the rest stays; otherwise everything is tried
    /// and the first refusal is returned.
    pub fn withdraw(&self) -> Result<(), StackError> {
        let mut netlink = Netlink::open_in(&self.namespace)?;
        let down = netlink
            .link(&self.config.interface)
            .and_then(|link| netlink.change_link(link.index, &LinkChange::new().down()));
        if let Err(error) = &down
            && !error.is_missing()
        {
            // Without the table, what still comes in could reach other listeners: then it stays.
            return down.map_err(StackError::from);
        }
        let mut outcomes: Vec<Result<(), NetlinkError>> = self
            .own_rules(&mut netlink)?
            .iter()
            .map(|rule| netlink.delete_rule(rule))
            .collect();
        outcomes.push(NfTables::open_in(&self.namespace)?.delete());
        outcomes
            .into_iter()
            .collect::<Result<(), _>>()
            .map_err(StackError::from)
    }

    /// What the interception has done since `prepare`; `None` if it is not in place.
    ///
    /// # Errors
    /// If the kernel refuses the question.
    pub fn counters(&self) -> Result<Option<InterceptionCounters>, StackError> {
        Ok(NfTables::open_in(&self.namespace)?.counters()?)
    }

    /// The stack namespace.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Its configuration.
    pub fn config(&self) -> &KernelStackConfig {
        &self.config
    }

    /// Whether the kernel has IPv6.
    pub fn has_ipv6(&self) -> bool {
        self.ipv6
    }

    fn families(&self) -> impl Iterator<Item = bool> {
        [false, true].into_iter().filter(|ipv6| self.ipv6 || !ipv6)
    }

    fn interception(&self) -> Interception {
        Interception {
            interface: self.config.interface.clone(),
            port: self.config.proxy_port,
            inbound: self.config.inbound.map(|inbound| Inbound {
                port: inbound.port,
                network: inbound.network,
                hairpin: HAIRPIN_MARK,
            }),
        }
    }

    fn settings(&self, netlink: &mut Netlink, link: &Link) -> Result<(), StackError> {
        if self.ipv6 && !link.up {
            // Without a link-local address there is nothing to announce or to wait for. Must precede "up".
            let quiet = self.setting("ipv6/conf/{}/addr_gen_mode", "1");
            sysctl::set_all(&self.namespace, &[quiet])?;
        }
        let mut settings = vec![
            self.setting("ipv4/tcp_fwmark_accept", "1"),
            self.setting("ipv4/tcp_tw_reuse", "1"),
            self.setting("ipv4/ip_local_port_range", "1024 65535"),
            self.setting("ipv4/ip_local_reserved_ports", &self.reserved_ports()),
            self.setting("ipv4/ip_forward", "0"),
            // Packets come in by the only route there is; whose address they may bear, the dataplane has checked.
            self.setting("ipv4/conf/all/rp_filter", "0"),
            self.setting("ipv4/conf/{}/rp_filter", "0"),
            self.setting("ipv4/conf/{}/accept_redirects", "0"),
            self.setting("ipv4/conf/{}/send_redirects", "0"),
        ];
        if self.config.inbound.is_some() {
            // A reset of a hairpin goes back the way that the hairpin came.
            settings.push(self.setting("ipv4/fwmark_reflect", "1"));
            if self.ipv6 {
                settings.push(self.setting("ipv6/fwmark_reflect", "1"));
            }
        }
        if self.ipv6 {
            settings.extend([
                self.setting("ipv6/conf/{}/disable_ipv6", "0"),
                self.setting("ipv6/conf/lo/disable_ipv6", "0"),
                self.setting("ipv6/conf/{}/accept_ra", "0"),
                self.setting("ipv6/conf/{}/accept_dad", "0"),
                self.setting("ipv6/conf/{}/accept_redirects", "0"),
                self.setting("ipv6/conf/all/forwarding", "0"),
            ]);
        }
        sysctl::set_all(&self.namespace, &settings)?;
        // Kernels before 6.7 hide it in user namespaces; then the queue of a listener is shorter.
        match sysctl::set(&self.namespace, "core/somaxconn", "65535") {
            Err(error) if error.is_missing() => {
                tracing::info!(%error, "listener queues stay at the system's length")
            }
            outcome => outcome?,
        }
        let loopback = netlink.link("lo")?;
        Ok(netlink.change_link(loopback.index, &LinkChange::new().up())?)
    }

    fn reserved_ports(&self) -> String {
        let inbound = self.config.inbound.map(|inbound| format!(",{}", inbound.port));
        format!("{}{}", self.config.proxy_port, inbound.unwrap_or_default())
    }

    fn setting(&self, key: &str, value: &str) -> (String, String) {
        (key.replace("{}", &self.config.interface), value.to_owned())
    }

    fn raise(&self, netlink: &mut Netlink, link: &Link) -> Result<(), StackError> {
        Ok(netlink.change_link(link.index, &LinkChange::new().arp(false).up())?)
    }

    fn route(&self, netlink: &mut Netlink, link: &Link, ipv6: bool) -> Result<(), StackError> {
        let any = || {
            if ipv6 {
                Route::default_v6()
            } else {
                Route::default_v4()
            }
        };
        let loopback = netlink.link("lo")?.index;
        let local = any().kind(RouteKind::Local).table(self.config.table).on(loopback);
        let out = any().on(link.index).metrics(self.config.metrics.clone());
        let stale: Vec<Route> = netlink.routes(None)?;
        let stale = stale.iter().filter(|route| {
            let same_family = route.destination.addr().is_ipv6() == ipv6;
            let wanted = [&local, &out]
                .iter()
                .any(|kept| kept.table == route.table && kept.link == route.link);
            same_family && route.protocol == PROTOCOL && route.destination.prefix_len() == 0 && !wanted
        });
        netlink.replace_route(&local)?;
        netlink.replace_route(&out)?;
        for route in stale {
            accept_missing(netlink.delete_route(route))?;
        }
        Ok(())
    }

    /// Before the main table (32766) and after the kernel's own (0).
    fn rules(&self, netlink: &mut Netlink, ipv6: bool) -> Result<(), StackError> {
        let incoming = Rule::incoming(ipv6, &self.config.interface, self.config.table, 100);
        let hairpin = self
            .config
            .inbound
            .map(|_| Rule::marked(ipv6, HAIRPIN_MARK, self.hairpin_table(), 99));
        let wanted: Vec<Rule> = [Some(incoming), hairpin].into_iter().flatten().collect();
        let present = self.own_rules(netlink)?;
        for rule in wanted.iter().filter(|rule| !present.contains(rule)) {
            netlink.add_rule(rule)?;
        }
        for rule in present
            .iter()
            .filter(|rule| rule.ipv6 == ipv6 && !wanted.contains(rule))
        {
            accept_missing(netlink.delete_rule(rule))?;
        }
        Ok(())
    }

    fn own_rules(&self, netlink: &mut Netlink) -> Result<Vec<Rule>, NetlinkError> {
        let mut rules = netlink.rules()?;
        rules.retain(|rule| rule.protocol == PROTOCOL);
        Ok(rules)
    }
}

fn accept_missing(outcome: Result<(), NetlinkError>) -> Result<(), NetlinkError> {
    outcome.or_else(|error| if error.is_missing() { Ok(()) } else { Err(error) })
}

fn check(config: &KernelStackConfig) -> Result<(), StackError> {
    let complain = |what: String| Err(StackError::Config(what));
    if config.proxy_port == 0 {
        return complain("proxy_port is 0".into());
    }
    if let Some(inbound) = &config.inbound {
        if inbound.port == 0 || inbound.port == config.proxy_port {
            return complain(format!("inbound.port is {}", inbound.port));
        }
        if inbound.network.get() == HAIRPIN_MARK {
            return complain(format!("inbound.network {HAIRPIN_MARK} is the hairpin's mark"));
        }
    }
    if matches!(config.table, 0 | 252..=255 | u32::MAX) {
        return complain(format!("table {} is the kernel's own", config.table));
    }
    let local = config.local_source;
    let reserved = [local.v4.map(IpAddr::V4), local.v6.map(IpAddr::V6)];
    for address in reserved.into_iter().flatten() {
        if address.is_loopback() || address.is_unspecified() || address.is_multicast() {
            return complain(format!(
                "local_source {address} cannot be the source of a packet between interfaces"
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_that_cannot_be_meant_is_refused_by_field() {
        let good = KernelStackConfig::new("stk0", 15001, LocalSource::default());
        assert!(check(&good).is_ok());
        let says = |config: KernelStackConfig| check(&config).expect_err("refused").to_string();
        assert!(
            says(KernelStackConfig {
                proxy_port: 0,
                ..good.clone()
            })
            .contains("proxy_port")
        );
        assert!(
            says(KernelStackConfig {
                inbound: Some(InboundPort {
                    port: 15001,
                    network: IngressPort::new(1).expect("not 0"),
                }),
                ..good.clone()
            })
            .contains("inbound.port")
        );
        assert!(
            says(KernelStackConfig {
                table: 254,
                ..good.clone()
            })
            .contains("table 254")
        );
        let local_source = LocalSource {
            v4: Some(Ipv4Addr::LOCALHOST),
            v6: None,
        };
        assert!(says(KernelStackConfig { local_source, ..good }).contains("local_source"));
    }
}
