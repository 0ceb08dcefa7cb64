//! Routes: prefix to next hop, per table, with metrics.

use std::fmt;
use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use netlink_packet_core::{Emitable, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, ParseableParametrized};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteLwEnCapType, RouteMessage, RouteMetric,
    RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::{LinkIndex, Netlink, NetlinkError, PROTOCOL, attributes};

/// Bit of RTAX_LOCK that pins the MTU against path MTU discovery.
const LOCK_MTU: u32 = 1 << 2;

/// A route.
///
/// ```
/// use dpumesh_hw::netlink::{LinkIndex, Route};
///
/// let route = Route::new("10.96.0.0/16".parse()?).via("169.254.1.1".parse()?).on(LinkIndex(3)).onlink();
/// assert_eq!(route.to_string(), "route 10.96.0.0/16 via 169.254.1.1 on interface 3 table 254");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// Which destinations; `0.0.0.0/0` or `::/0` for the default route. Host bits are ignored.
    pub destination: IpNet,
    /// What happens to a packet.
    pub kind: RouteKind,
    /// The table; [`Route::MAIN`] unless said otherwise.
    pub table: u32,
    /// The interface it leaves by.
    pub link: Option<LinkIndex>,
    /// The next hop; `None`: the destination itself is a neighbour.
    pub gateway: Option<IpAddr>,
    /// Take the gateway for a neighbour although no route says so.
    pub onlink: bool,
    /// Source address for local senders that have not chosen one.
    pub source: Option<IpAddr>,
    /// Among routes of equal length the lowest wins. 0: the kernel's own choice.
    pub priority: u32,
    /// Properties of the path.
    pub metrics: RouteMetrics,
    /// Who made it (`RTPROT_*`); [`super::PROTOCOL`] for ours. Ignored when deleting.
    pub protocol: u8,
}

/// What a route does with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RouteKind {
    /// Sends it on.
    Unicast,
    /// Delivers it on this machine, whatever its destination address.
    Local,
    /// Drops it silently.
    Blackhole,
    /// Drops it and tells the sender (ICMP unreachable).
    Unreachable,
    /// Any other kind, by its `RTN_*` number.
    Other(u8),
}

/// Properties of the path that a route leads to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RouteMetrics {
    /// Octets of the largest packet; `None`: the interface's.
    pub mtu: Option<u32>,
    /// Do not let path MTU discovery change the MTU.
    pub mtu_lock: bool,
    /// TCP congestion control of connections by this route, such as `cubic`.
    pub congestion: Option<String>,
    /// TCP maximum segment size to announce, octets.
    pub advertised_mss: Option<u32>,
}

impl Route {
    /// The table that is consulted without any rule of ours.
    pub const MAIN: u32 = 254;
    /// The table of the machine's own addresses.
    pub const LOCAL: u32 = 255;

    /// A unicast route of the main table to `destination`.
    pub fn new(destination: IpNet) -> Self {
        Self {
            destination: destination.trunc(),
            kind: RouteKind::Unicast,
            table: Self::MAIN,
            link: None,
            gateway: None,
            onlink: false,
            source: None,
            priority: 0,
            metrics: RouteMetrics::default(),
            protocol: PROTOCOL,
        }
    }

    /// The IPv4 default route.
    pub fn default_v4() -> Self {
        Self::new(IpNet::V4(Ipv4Net::default()))
    }

    /// The IPv6 default route.
    pub fn default_v6() -> Self {
        Self::new(IpNet::V6(Ipv6Net::default()))
    }

    /// Leaves by `link`.
    #[must_use]
    pub fn on(mut self, link: LinkIndex) -> Self {
        self.link = Some(link);
        self
    }

    /// By the next hop `gateway`.
    #[must_use]
    pub fn via(mut self, gateway: IpAddr) -> Self {
        self.gateway = Some(gateway);
        self
    }

    /// The gateway is a neighbour although no route says so.
    #[must_use]
    pub fn onlink(mut self) -> Self {
        self.onlink = true;
        self
    }

    /// Does something else than sending on.
    #[must_use]
    pub fn kind(mut self, kind: RouteKind) -> Self {
        self.kind = kind;
        self
    }

    /// In another table.
    #[must_use]
    pub fn table(mut self, table: u32) -> Self {
        self.table = table;
        self
    }

    /// With this preferred source address.
    #[must_use]
    pub fn source(mut self, source: IpAddr) -> Self {
        self.source = Some(source);
        self
    }

    /// With these path properties.
    #[must_use]
    pub fn metrics(mut self, metrics: RouteMetrics) -> Self {
        self.metrics = metrics;
        self
    }

    fn message(&self) -> RouteMessage {
        let mut message = RouteMessage::default();
        let header = &mut message.header;
        header.address_family = super::family_of(self.destination.addr());
        header.destination_prefix_length = self.destination.prefix_len();
        header.protocol = RouteProtocol::from(self.protocol);
        header.scope = self.scope();
        header.kind = self.kind.into();
        header.flags = if self.onlink {
            RouteFlags::Onlink
        } else {
            RouteFlags::empty()
        };
        let attributes = &mut message.attributes;
        attributes.push(RouteAttribute::Table(self.table));
        if self.destination.prefix_len() > 0 {
            attributes.push(RouteAttribute::Destination(self.destination.network().into()));
        }
        attributes.extend(self.link.map(|link| RouteAttribute::Oif(link.0)));
        attributes.extend(
            self.gateway
                .map(|gateway| RouteAttribute::Gateway(gateway.into())),
        );
        attributes.extend(
            self.source
                .map(|source| RouteAttribute::PrefSource(source.into())),
        );
        if self.priority != 0 {
            attributes.push(RouteAttribute::Priority(self.priority));
        }
        let metrics = self.metrics.attributes();
        if !metrics.is_empty() {
            attributes.push(RouteAttribute::Metrics(metrics));
        }
        message
    }

    /// How far away the destination is, for IPv4; the kernel derives it for IPv6.
    fn scope(&self) -> RouteScope {
        match self.kind {
            RouteKind::Local => RouteScope::Host,
            RouteKind::Unicast if self.gateway.is_none() => RouteScope::Link,
            _ => RouteScope::Universe,
        }
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "route {}", self.destination)?;
        if self.kind != RouteKind::Unicast {
            write!(f, " ({:?})", self.kind)?;
        }
        if let Some(gateway) = self.gateway {
            write!(f, " via {gateway}")?;
        }
        if let Some(link) = self.link {
            write!(f, " on {link}")?;
        }
        write!(f, " table {}", self.table)
    }
}

impl RouteMetrics {
    fn attributes(&self) -> Vec<RouteMetric> {
        let mut metrics = Vec::new();
        if self.mtu_lock {
            metrics.push(RouteMetric::Lock(LOCK_MTU));
        }
        metrics.extend(self.mtu.map(RouteMetric::Mtu));
        metrics.extend(self.advertised_mss.map(RouteMetric::Advmss));
        metrics.extend(self.congestion.clone().map(RouteMetric::CcAlgo));
        metrics
    }

    fn read(metrics: &[RouteMetric]) -> Self {
        let mut read = Self::default();
        for metric in metrics {
            match metric {
                RouteMetric::Lock(bits) => read.mtu_lock = bits & LOCK_MTU != 0,
                RouteMetric::Mtu(mtu) => read.mtu = Some(*mtu),
                RouteMetric::Advmss(size) => read.advertised_mss = Some(*size),
                RouteMetric::CcAlgo(name) => read.congestion = Some(name.clone()),
                _ => {}
            }
        }
        read
    }
}

impl From<RouteKind> for RouteType {
    fn from(kind: RouteKind) -> Self {
        match kind {
            RouteKind::Unicast => Self::Unicast,
            RouteKind::Local => Self::Local,
            RouteKind::Blackhole => Self::BlackHole,
            RouteKind::Unreachable => Self::Unreachable,
            RouteKind::Other(number) => Self::from(number),
        }
    }
}

impl From<RouteType> for RouteKind {
    fn from(kind: RouteType) -> Self {
        match kind {
            RouteType::Unicast => Self::Unicast,
            RouteType::Local => Self::Local,
            RouteType::BlackHole => Self::Blackhole,
            RouteType::Unreachable => Self::Unreachable,
            other => Self::Other(other.into()),
        }
    }
}

impl Netlink {
    /// Adds a route.
    ///
    /// # Errors
    /// `is_exists` if its table has one for the same destination and priority; if the gateway is no neighbour.
    pub fn add_route(&mut self, route: &Route) -> Result<(), NetlinkError> {
        let message = RouteNetlinkMessage::NewRoute(route.message());
        self.change("add", route, message, NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Adds a route, in place of the one with the same destination, table and priority if there is one.
    ///
    /// # Errors
    /// As [`add_route`](Self::add_route), without `is_exists`.
    pub fn replace_route(&mut self, route: &Route) -> Result<(), NetlinkError> {
        let message = RouteNetlinkMessage::NewRoute(route.message());
        self.change("replace", route, message, NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// Deletes the route with this destination, table, kind and, where given, interface, gateway and priority.
    ///
    /// # Errors
    /// `is_missing` if there is none.
    pub fn delete_route(&mut self, route: &Route) -> Result<(), NetlinkError> {
        let mut message = route.message();
        message.header.protocol = RouteProtocol::Unspec;
        message
            .attributes
            .retain(|attribute| !matches!(attribute, RouteAttribute::Metrics(_)));
        self.change("delete", route, RouteNetlinkMessage::DelRoute(message), 0)
    }

    /// All IPv4 and IPv6 routes of `table`; of all tables for `None`. Multipath routes show their destination only.
    ///
    /// # Errors
    /// If the kernel refuses the question.
    pub fn routes(&mut self, table: Option<u32>) -> Result<Vec<Route>, NetlinkError> {
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut question = RouteMessage::default();
            question.header.address_family = family;
            let replies = self.dump("list", "routes", &RouteNetlinkMessage::GetRoute(question))?;
            routes.extend(replies.iter().filter_map(|reply| parse(reply)));
        }
        routes.retain(|route| table.is_none_or(|table| route.table == table));
        Ok(routes)
    }
}

pub(super) fn parse(payload: &[u8]) -> Option<Route> {
    let header = RouteHeader::parse(payload).ok()?;
    // Entries of the route cache (learned path MTUs) are no configuration.
    if header.flags.contains(RouteFlags::Cloned) {
        return None;
    }
    let any = match header.address_family {
        AddressFamily::Inet => IpNet::V4(Ipv4Net::default()),
        AddressFamily::Inet6 => IpNet::V6(Ipv6Net::default()),
        _ => return None,
    };
    let mut route = Route::new(any)
        .kind(header.kind.into())
        .table(header.table.into());
    route.protocol = header.protocol.into();
    route.onlink = header.flags.contains(RouteFlags::Onlink);
    let parameters = (header.address_family, header.kind, RouteLwEnCapType::None);
    for attribute in attributes(payload, header.buffer_len()) {
        let Ok(attribute) = RouteAttribute::parse_with_param(&attribute, parameters) else {
            continue;
        };
        match attribute {
            RouteAttribute::Table(table) => route.table = table,
            RouteAttribute::Destination(address) => {
                route.destination = IpNet::new(ip(&address)?, header.destination_prefix_length).ok()?;
            }
            RouteAttribute::Oif(index) => route.link = Some(LinkIndex(index)),
            RouteAttribute::Gateway(address) => route.gateway = ip(&address),
            RouteAttribute::PrefSource(address) => route.source = ip(&address),
            RouteAttribute::Priority(priority) => route.priority = priority,
            RouteAttribute::Metrics(metrics) => route.metrics = RouteMetrics::read(&metrics),
            _ => {}
        }
    }
    Some(route)
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some(IpAddr::V4(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        _ => None,
    }
}
