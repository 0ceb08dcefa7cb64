//! Interfaces: list, create as a veth pair, change, move between namespaces, delete.

use std::fmt;
use std::os::fd::{AsFd, AsRawFd};

use netlink_packet_core::{Emitable, NLM_F_CREATE, NLM_F_EXCL, ParseableParametrized};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkHeader, LinkInfo, LinkMessage,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::{Netlink, NetlinkError, attributes};
use crate::netns::Namespace;

const IFLA_PHYS_SWITCH_ID: u16 = 36;

/// An interface's number in its namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LinkIndex(pub u32);

impl fmt::Display for LinkIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "interface {}", self.0)
    }
}

/// An interface as the kernel describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its number.
    pub index: LinkIndex,
    /// Its name, at most 15 octets.
    pub name: String,
    /// Its Ethernet address; `None` for what has none.
    pub mac: Option<[u8; 6]>,
    /// Largest packet, octets, without the Ethernet header.
    pub mtu: u32,
    /// Switched on by an administrator (IFF_UP).
    pub up: bool,
    /// Has a carrier (IFF_LOWER_UP).
    pub carrier: bool,
    /// Passes packets (IFF_RUNNING). Follows `up` and `carrier` by some milliseconds, in the background: what is
    /// sent in between is lost, so whoever needs the first packet waits for this.
    pub running: bool,
    /// Resolves no neighbours (IFF_NOARP).
    pub noarp: bool,
    /// Driver kind such as `veth` or `tun`; `None` for physical ones.
    pub kind: Option<String>,
    /// For a pair or a stacked interface: number of the other one, in its own namespace.
    pub peer: Option<LinkIndex>,
    /// Free text kept with the interface, see [`LinkChange::alias`].
    pub alias: Option<String>,
    /// The device it belongs to, as the PCI address `0000:3b:00.0`; `None` for a virtual one, and before Linux 5.14.
    pub parent: Option<String>,
    /// Name of the card's port that it is or stands for, as `p0` or `pf0vf3` (`phys_port_name`).
    pub port_name: Option<String>,
    /// Identity of the switch that the port belongs to (`phys_switch_id`).
    pub switch_id: Option<Vec<u8>>,
    /// Largest MTU that its driver takes, octets.
    pub max_mtu: Option<u32>,
    /// Counters at the time of the question.
    pub statistics: LinkStatistics,
}

/// Counters of an interface since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkStatistics {
    /// Packets received.
    pub rx_packets: u64,
    /// Packets sent.
    pub tx_packets: u64,
    /// Octets received.
    pub rx_octets: u64,
    /// Octets sent.
    pub tx_octets: u64,
    /// Received packets thrown away.
    pub rx_dropped: u64,
    /// Packets to send thrown away.
    pub tx_dropped: u64,
    /// Bad packets received.
    pub rx_errors: u64,
    /// Failures to send.
    pub tx_errors: u64,
}

/// One end of a veth pair to be made.
#[derive(Clone, Debug, Default)]
pub struct VethEnd<'a> {
    name: &'a str,
    namespace: Option<&'a Namespace>,
    mac: Option<[u8; 6]>,
    mtu: Option<u32>,
}

impl<'a> VethEnd<'a> {
    /// An end called `name` (1 to 15 octets) in the namespace of the socket.
    pub fn new(name: &'a str) -> Self {
        Self {
            name,
            ..Self::default()
        }
    }

    /// Born in `namespace` instead.
    #[must_use]
    pub fn in_namespace(mut self, namespace: &'a Namespace) -> Self {
        self.namespace = Some(namespace);
        self
    }

    /// With this Ethernet address instead of a random one.
    #[must_use]
    pub fn mac(mut self, mac: [u8; 6]) -> Self {
        self.mac = Some(mac);
        self
    }

    /// With this MTU, octets.
    #[must_use]
    pub fn mtu(mut self, mtu: u32) -> Self {
        self.mtu = Some(mtu);
        self
    }

    fn attributes(&self) -> Vec<LinkAttribute> {
        let mut attributes = vec![LinkAttribute::IfName(self.name.to_owned())];
        attributes.extend(self.namespace.map(net_ns));
        attributes.extend(self.mac.map(|mac| LinkAttribute::Address(mac.to_vec())));
        attributes.extend(self.mtu.map(LinkAttribute::Mtu));
        attributes
    }
}

/// Changes to make to an interface in one request.
#[derive(Clone, Debug, Default)]
pub struct LinkChange<'a> {
    flags: LinkFlags,
    mask: LinkFlags,
    name: Option<&'a str>,
    namespace: Option<&'a Namespace>,
    mac: Option<[u8; 6]>,
    mtu: Option<u32>,
    alias: Option<&'a str>,
}

impl<'a> LinkChange<'a> {
    /// No change yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Switch it on.
    #[must_use]
    pub fn up(self) -> Self {
        self.flag(LinkFlags::Up, true)
    }

    /// Switch it off.
    #[must_use]
    pub fn down(self) -> Self {
        self.flag(LinkFlags::Up, false)
    }

    /// Whether it resolves neighbours (ARP, ND). Without, frames leave with the interface's own address as
    /// destination unless there is a permanent neighbour entry.
    #[must_use]
    pub fn arp(self, resolve: bool) -> Self {
        self.flag(LinkFlags::Noarp, !resolve)
    }

    /// Rename; the interface must be down on kernels before 6.2.
    #[must_use]
    pub fn name(mut self, name: &'a str) -> Self {
        self.name = Some(name);
        self
    }

    /// Move into `namespace`. Addresses and routes are lost on the way, and it arrives switched off.
    #[must_use]
    pub fn namespace(mut self, namespace: &'a Namespace) -> Self {
        self.namespace = Some(namespace);
        self
    }

    /// New Ethernet address.
    #[must_use]
    pub fn mac(mut self, mac: [u8; 6]) -> Self {
        self.mac = Some(mac);
        self
    }

    /// New MTU, octets.
    #[must_use]
    pub fn mtu(mut self, mtu: u32) -> Self {
        self.mtu = Some(mtu);
        self
    }

    /// Free text kept with the interface (`ip link` shows it as alias), at most 255 octets.
    #[must_use]
    pub fn alias(mut self, alias: &'a str) -> Self {
        self.alias = Some(alias);
        self
    }

    fn flag(mut self, flag: LinkFlags, on: bool) -> Self {
        self.mask |= flag;
        self.flags.set(flag, on);
        self
    }
}

impl Netlink {
    /// Makes a pair of connected interfaces, each directly in its namespace, both switched off.
    ///
    /// # Errors
    /// If a name is taken in its namespace (`is_exists`) or malformed.
    pub fn create_veth(&mut self, near: &VethEnd<'_>, far: &VethEnd<'_>) -> Result<(), NetlinkError> {
        let object = format!("veth {} / {}", near.name, far.name);
        check_name("create", near.name)?;
        check_name("create", far.name)?;
        let mut peer = LinkMessage::default();
        peer.attributes = far.attributes();
        let mut message = LinkMessage::default();
        message.attributes = near.attributes();
        message.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
        ]));
        self.change(
            "create",
            object,
            RouteNetlinkMessage::NewLink(message),
            NLM_F_CREATE | NLM_F_EXCL,
        )
    }

    /// Changes an interface. One request; if a part is refused, earlier parts of it may have taken effect.
    ///
    /// # Errors
    /// If there is no such interface (`is_missing`) or the driver refuses the change.
    pub fn change_link(&mut self, link: LinkIndex, change: &LinkChange<'_>) -> Result<(), NetlinkError> {
        let mut message = link_message(link);
        message.header.flags = change.flags;
        message.header.change_mask = change.mask;
        if let Some(name) = change.name {
            check_name("rename", name)?;
            message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        }
        message.attributes.extend(change.namespace.map(net_ns));
        message
            .attributes
            .extend(change.mac.map(|mac| LinkAttribute::Address(mac.to_vec())));
        message.attributes.extend(change.mtu.map(LinkAttribute::Mtu));
        message
            .attributes
            .extend(change.alias.map(|alias| LinkAttribute::IfAlias(alias.to_owned())));
        self.change("change", link, RouteNetlinkMessage::SetLink(message), 0)
    }

    /// Deletes an interface; of a pair, both ends go.
    ///
    /// # Errors
    /// If there is no such interface (`is_missing`) or it is not a virtual one.
    pub fn delete_link(&mut self, link: LinkIndex) -> Result<(), NetlinkError> {
        self.change(
            "delete",
            link,
            RouteNetlinkMessage::DelLink(link_message(link)),
            0,
        )
    }

    /// The interface called `name`.
    ///
    /// # Errors
    /// `is_missing` if there is none.
    pub fn link(&mut self, name: &str) -> Result<Link, NetlinkError> {
        check_name("find", name)?;
        let mut question = LinkMessage::default();
        question.attributes.push(LinkAttribute::IfName(name.to_owned()));
        let object = format!("interface {name}");
        let replies = self.get("find", &object, RouteNetlinkMessage::GetLink(question))?;
        let found = replies.iter().find_map(|reply| parse(reply));
        found.ok_or_else(|| NetlinkError::missing("find", object, libc::ENODEV))
    }

    /// All interfaces of the namespace, in the order of their numbers.
    ///
    /// # Errors
    /// If the kernel refuses the question.
    pub fn links(&mut self) -> Result<Vec<Link>, NetlinkError> {
        let question = RouteNetlinkMessage::GetLink(LinkMessage::default());
        let replies = self.dump("list", "interfaces", &question)?;
        let mut links: Vec<Link> = replies.iter().filter_map(|reply| parse(reply)).collect();
        links.sort_by_key(|link| link.index);
        Ok(links)
    }
}

/// Names must not reach the kernel cut short or as part of a path.
pub(super) fn check_name(operation: &'static str, name: &str) -> Result<(), NetlinkError> {
    let bad = name.is_empty()
        || name.len() > 15
        || name == "."
        || name == ".."
        || name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace() || c == '\0');
    if bad {
        return Err(NetlinkError::missing(
            operation,
            format!("interface name {name:?}"),
            libc::EINVAL,
        ));
    }
    Ok(())
}

fn link_message(link: LinkIndex) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = link.0;
    message
}

fn net_ns(namespace: &Namespace) -> LinkAttribute {
    LinkAttribute::NetNsFd(namespace.as_fd().as_raw_fd())
}

pub(super) fn parse(payload: &[u8]) -> Option<Link> {
    let header = LinkHeader::parse(payload).ok()?;
    let mut link = Link {
        index: LinkIndex(header.index),
        name: String::new(),
        mac: None,
        mtu: 0,
        up: header.flags.contains(LinkFlags::Up),
        carrier: header.flags.contains(LinkFlags::LowerUp),
        running: header.flags.contains(LinkFlags::Running),
        noarp: header.flags.contains(LinkFlags::Noarp),
        kind: None,
        peer: None,
        alias: None,
        parent: None,
        port_name: None,
        switch_id: None,
        max_mtu: None,
        statistics: LinkStatistics::default(),
    };
    for attribute in attributes(payload, header.buffer_len()) {
        match LinkAttribute::parse_with_param(&attribute, AddressFamily::Unspec) {
            Ok(LinkAttribute::IfName(name)) => link.name = name,
            Ok(LinkAttribute::Address(mac)) => link.mac = mac.try_into().ok(),
            Ok(LinkAttribute::Mtu(mtu)) => link.mtu = mtu,
            Ok(LinkAttribute::IfAlias(alias)) => link.alias = Some(alias),
            Ok(LinkAttribute::ParentDevName(parent)) => link.parent = Some(parent),
            Ok(LinkAttribute::PhysPortName(name)) => link.port_name = Some(name),
            Ok(LinkAttribute::MaxMtu(mtu)) => link.max_mtu = Some(mtu).filter(|mtu| *mtu > 0),
            _ if attribute.kind() == IFLA_PHYS_SWITCH_ID => link.switch_id = Some(attribute.value().to_vec()),
            Ok(LinkAttribute::Link(peer)) => link.peer = Some(LinkIndex(peer)),
            Ok(LinkAttribute::LinkInfo(infos)) => {
                link.kind = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind.to_string()),
                    _ => None,
                });
            }
            Ok(LinkAttribute::Stats64(counters)) => {
                link.statistics = LinkStatistics {
                    rx_packets: counters.rx_packets,
                    tx_packets: counters.tx_packets,
                    rx_octets: counters.rx_bytes,
                    tx_octets: counters.tx_bytes,
                    rx_dropped: counters.rx_dropped,
                    tx_dropped: counters.tx_dropped,
                    rx_errors: counters.rx_errors,
                    tx_errors: counters.tx_errors,
                };
            }
            _ => {}
        }
    }
    Some(link)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_the_kernel_would_cut_or_misread_are_refused() {
        for bad in ["", "..", "a/b", "a b", "a:b", "sixteen-octets-x"] {
            assert!(check_name("create", bad).is_err(), "{bad:?}");
        }
        assert!(check_name("create", "fifteen-octets-").is_ok());
    }

    #[test]
    fn a_truncated_description_never_panics() {
        let mut message = LinkMessage::default();
        message.header.index = 4;
        message.attributes = vec![
            LinkAttribute::IfName("stk0".into()),
            LinkAttribute::Address(vec![2, 0, 0, 0, 0, 1]),
        ];
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut bytes);
        let whole = parse(&bytes).expect("whole");
        assert_eq!(
            (whole.name.as_str(), whole.mac),
            ("stk0", Some([2, 0, 0, 0, 0, 1]))
        );
        for length in 0..bytes.len() {
            let _ = parse(&bytes[..length]);
        }
    }
}
