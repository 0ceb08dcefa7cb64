//! Neighbours: which Ethernet address an IP address on a link has.

use std::fmt;
use std::net::IpAddr;

use netlink_packet_core::{Emitable, NLM_F_CREATE, NLM_F_REPLACE, ParseableParametrized};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourHeader, NeighbourMessage, NeighbourState,
};

use super::{LinkIndex, Netlink, NetlinkError, attributes, family_of};

/// An entry of the neighbour table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Neighbour {
    /// The interface it is reached by.
    pub link: LinkIndex,
    /// Its address.
    pub address: IpAddr,
    /// Its Ethernet address; `None` if it is not known (yet).
    pub mac: Option<[u8; 6]>,
    /// Configured, as opposed to learned.
    pub permanent: bool,
}

impl Neighbour {
    /// A configured neighbour.
    pub fn permanent(link: LinkIndex, address: IpAddr, mac: [u8; 6]) -> Self {
        Self {
            link,
            address,
            mac: Some(mac),
            permanent: true,
        }
    }

    fn message(&self) -> NeighbourMessage {
        let mut message = NeighbourMessage::default();
        message.header.family = family_of(self.address);
        message.header.ifindex = self.link.0;
        message.header.state = if self.permanent {
            NeighbourState::Permanent
        } else {
            NeighbourState::Reachable
        };
        message
            .attributes
            .push(NeighbourAttribute::Destination(self.address.into()));
        message.attributes.extend(
            self.mac
                .map(|mac| NeighbourAttribute::LinkLayerAddress(mac.to_vec())),
        );
        message
    }
}

impl fmt::Display for Neighbour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "neighbour {} on {}", self.address, self.link)
    }
}

impl Netlink {
    /// Sets a neighbour, in place of what was known about its address.
    ///
    /// # Errors
    /// If there is no such interface (`is_missing`), or it is down.
    pub fn set_neighbour(&mut self, neighbour: &Neighbour) -> Result<(), NetlinkError> {
        let message = RouteNetlinkMessage::NewNeighbour(neighbour.message());
        self.change("set", neighbour, message, NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// Forgets a neighbour.
    ///
    /// # Errors
    /// `is_missing` if it is not known.
    pub fn delete_neighbour(&mut self, neighbour: &Neighbour) -> Result<(), NetlinkError> {
        self.change(
            "delete",
            neighbour,
            RouteNetlinkMessage::DelNeighbour(neighbour.message()),
            0,
        )
    }

    /// All neighbours of both families, without those of interfaces that resolve none.
    ///
    /// # Errors
    /// If the kernel refuses the question.
    pub fn neighbours(&mut self) -> Result<Vec<Neighbour>, NetlinkError> {
        let question = RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default());
        let replies = self.dump("list", "neighbours", &question)?;
        Ok(replies.iter().filter_map(|reply| parse(reply)).collect())
    }
}

pub(super) fn parse(payload: &[u8]) -> Option<Neighbour> {
    let header = NeighbourHeader::parse(payload).ok()?;
    if header.state == NeighbourState::Noarp {
        return None;
    }
    let (mut address, mut mac) = (None, None);
    for attribute in attributes(payload, header.buffer_len()) {
        match NeighbourAttribute::parse_with_param(&attribute, header.family) {
            Ok(NeighbourAttribute::Destination(NeighbourAddress::Inet(ip))) => address = Some(IpAddr::V4(ip)),
            Ok(NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip))) => {
                address = Some(IpAddr::V6(ip))
            }
            Ok(NeighbourAttribute::LinkLayerAddress(octets)) => mac = octets.try_into().ok(),
            _ => {}
        }
    }
    let permanent = header.state == NeighbourState::Permanent;
    Some(Neighbour {
        link: LinkIndex(header.ifindex),
        address: address?,
        mac,
        permanent,
    })
}
