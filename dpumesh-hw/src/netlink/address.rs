//! Addresses of interfaces.

use std::fmt;

use ipnet::IpNet;
use netlink_packet_core::{Emitable, NLM_F_CREATE, NLM_F_REPLACE, Parseable};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeader, AddressHeaderFlags, AddressMessage,
};

use super::{LinkIndex, Netlink, NetlinkError, attributes, family_of};

/// An address on an interface, with its prefix length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Address {
    /// The interface.
    pub link: LinkIndex,
    /// Address and prefix length.
    pub net: IpNet,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "address {} on {}", self.net, self.link)
    }
}

impl Netlink {
    /// Gives an interface an address, usable at once: an IPv6 address skips duplicate address detection (RFC 4862
    /// §5.4), because whoever assigns addresses to VFs has made sure of them. There already: no error.
    ///
    /// # Errors
    /// If there is no such interface (`is_missing`).
    pub fn add_address(&mut self, address: &Address) -> Result<(), NetlinkError> {
        let message = RouteNetlinkMessage::NewAddress(message(address));
        self.change("add", address, message, NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// Takes an address away, and with it the routes that used it as source.
    ///
    /// # Errors
    /// `is_missing` if it is not there.
    pub fn delete_address(&mut self, address: &Address) -> Result<(), NetlinkError> {
        self.change(
            "delete",
            address,
            RouteNetlinkMessage::DelAddress(message(address)),
            0,
        )
    }

    /// All addresses of the namespace, sorted.
    ///
    /// # Errors
    /// If the kernel refuses the question.
    pub fn addresses(&mut self) -> Result<Vec<Address>, NetlinkError> {
        let question = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        let replies = self.dump("list", "addresses", &question)?;
        let mut found: Vec<Address> = replies.iter().filter_map(|reply| parse(reply)).collect();
        found.sort_unstable();
        Ok(found)
    }
}

fn message(address: &Address) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family_of(address.net.addr());
    message.header.prefix_len = address.net.prefix_len();
    message.header.index = address.link.0;
    message.attributes = vec![
        AddressAttribute::Local(address.net.addr()),
        AddressAttribute::Address(address.net.addr()),
    ];
    if address.net.addr().is_ipv6() {
        message.header.flags = AddressHeaderFlags::Nodad;
        message
            .attributes
            .push(AddressAttribute::Flags(AddressFlags::Nodad));
    }
    message
}

pub(super) fn parse(payload: &[u8]) -> Option<Address> {
    let header = AddressHeader::parse(payload).ok()?;
    let (mut address, mut local) = (None, None);
    for attribute in attributes(payload, header.buffer_len()) {
        match AddressAttribute::parse(&attribute) {
            Ok(AddressAttribute::Local(ip)) => local = Some(ip),
            Ok(AddressAttribute::Address(ip)) => address = Some(ip),
            _ => {}
        }
    }
    // On point-to-point links "address" is the other side's; IPv6 has no "local" otherwise.
    let net = IpNet::new(local.or(address)?, header.prefix_len).ok()?;
    Some(Address {
        link: LinkIndex(header.index),
        net,
    })
}
