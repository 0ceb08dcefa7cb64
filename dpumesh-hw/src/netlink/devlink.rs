//! devlink: mode of a card's eswitch, and its ports with what each stands for (kernel
//! `Documentation/networking/devlink/devlink-port.rst`).
//!
//! Generic netlink: a family's number is asked by name, then each message is a netlink header, {command (1), version (1),
//! reserved (2)} and attributes in host byte order (`linux/devlink.h`). A card is named by its bus and address, as
//! `pci/0000:3b:00.0`.

use std::fmt;

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST};

use super::attribute::{Attributes, half_at, text_of, word_at};
use super::channel::{Channel, Failure, Reply};
use super::vf::message;
use super::{LinkIndex, NetlinkError, attributes};
use crate::netns::Namespace;

const NETLINK_GENERIC: isize = 16;
const GENL_HEADER: usize = 4;
const CONTROL: u16 = 16;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
const CMD_PORT_GET: u8 = 5;
const CMD_ESWITCH_GET: u8 = 29;
const CMD_ESWITCH_SET: u8 = 30;
const ATTR_BUS_NAME: u16 = 1;
const ATTR_DEV_NAME: u16 = 2;
const ATTR_PORT_INDEX: u16 = 3;
const ATTR_PORT_NETDEV_IFINDEX: u16 = 6;
const ATTR_ESWITCH_MODE: u16 = 25;
const ATTR_PORT_FLAVOUR: u16 = 77;
const ATTR_PORT_NUMBER: u16 = 78;
const ATTR_PORT_PCI_PF_NUMBER: u16 = 127;
const ATTR_PORT_PCI_VF_NUMBER: u16 = 128;
const ATTR_PORT_EXTERNAL: u16 = 149;
const ATTR_PORT_CONTROLLER_NUMBER: u16 = 150;
const BUS: &str = "pci";

/// What an eswitch does without rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EswitchMode {
    /// Switches by MAC and VLAN, by itself.
    Legacy,
    /// Hands every frame without a rule to a representor.
    Switchdev,
}

/// A port of a card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DevlinkPort {
    /// Its number on the card.
    pub index: u32,
    /// What it stands for.
    pub flavour: PortFlavour,
    /// Its network device in the namespace of the socket.
    pub link: Option<LinkIndex>,
    /// Which host its function belongs to; 0 is the first.
    pub controller: u32,
    /// It belongs to another host than the one that asks.
    pub external: bool,
}

/// What a port stands for (`DEVLINK_PORT_FLAVOUR_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortFlavour {
    /// A port to the wire, by its number.
    Physical(u32),
    /// A physical function.
    Pf(u16),
    /// A virtual function.
    Vf {
        /// Its physical function.
        pf: u16,
        /// Its number there.
        vf: u16,
    },
    /// Any other, by its number.
    Other(u16),
}

/// A conversation with devlink in one namespace.
#[derive(Debug)]
pub struct Devlink {
    channel: Channel,
    family: u16,
}

impl Devlink {
    /// Opens a conversation in the calling thread's namespace; `None` on a kernel without devlink.
    ///
    /// # Errors
    /// If the kernel gives no socket.
    pub fn open() -> Result<Option<Self>, NetlinkError> {
        let failed = |failure| NetlinkError::new("open", "devlink", failure);
        let mut channel = Channel::open(NETLINK_GENERIC).map_err(failed)?;
        let question = Attributes::default().text(CTRL_ATTR_FAMILY_NAME, "devlink");
        let flags = NLM_F_REQUEST | NLM_F_ACK;
        let asked = channel.request(message(CONTROL, flags, &[CTRL_CMD_GETFAMILY, 2, 0, 0], &question));
        match asked {
            Ok(replies) => Ok(replies
                .iter()
                .find_map(|reply| number(reply, CTRL_ATTR_FAMILY_ID))
                .map(|family| Self { channel, family })),
            Err(Failure::Kernel {
                errno: libc::ENOENT, ..
            }) => Ok(None),
            Err(failure) => Err(failed(failure)),
        }
    }

    /// Opens a conversation inside `namespace`.
    ///
    /// # Errors
    /// As [`Devlink::open`], or if the namespace cannot be entered.
    pub fn open_in(namespace: &Namespace) -> Result<Option<Self>, NetlinkError> {
        let entered = namespace.run(Self::open);
        entered.map_err(|error| {
            let failure = Failure::Io(std::io::Error::other(error));
            NetlinkError::new("open devlink in", namespace.id(), failure)
        })?
    }

    /// Mode of the eswitch of the card at a PCI address; `None` when the driver has none to tell of.
    ///
    /// # Errors
    /// `EPERM` and the like; a card without devlink or without eswitch is no error.
    pub fn eswitch_mode(&mut self, pci: &str) -> Result<Option<EswitchMode>, NetlinkError> {
        match self.ask("get eswitch of", pci, CMD_ESWITCH_GET, NLM_F_ACK, &card(pci)) {
            Ok(replies) => Ok(replies
                .iter()
                .find_map(|reply| match number(reply, ATTR_ESWITCH_MODE)? {
                    0 => Some(EswitchMode::Legacy),
                    1 => Some(EswitchMode::Switchdev),
                    _ => None,
                })),
            Err(error) if error.is_missing() || error.errno() == Some(libc::EOPNOTSUPP) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sets the mode of the eswitch. May take seconds; representors come and go with it, and drivers differ in whether
    /// VFs may be there meanwhile.
    ///
    /// # Errors
    /// `EOPNOTSUPP` without eswitch, `EBUSY` or `EINVAL` while VFs or rules are in the way.
    pub fn set_eswitch_mode(&mut self, pci: &str, mode: EswitchMode) -> Result<(), NetlinkError> {
        let body = card(pci).half(ATTR_ESWITCH_MODE, mode as u16);
        self.ask("set eswitch of", pci, CMD_ESWITCH_SET, NLM_F_ACK, &body)
            .map(drop)
    }

    /// The ports of the card at a PCI address, by their numbers.
    ///
    /// # Errors
    /// If the kernel refuses the question.
    pub fn ports(&mut self, pci: &str) -> Result<Vec<DevlinkPort>, NetlinkError> {
        let replies = self.ask(
            "list ports of",
            pci,
            CMD_PORT_GET,
            NLM_F_DUMP,
            &Attributes::default(),
        )?;
        let mut ports: Vec<DevlinkPort> = replies.iter().filter_map(|reply| parse(reply, pci)).collect();
        ports.sort_by_key(|port| port.index);
        Ok(ports)
    }

    fn ask(
        &mut self,
        operation: &'static str,
        object: impl fmt::Display,
        command: u8,
        flags: u16,
        body: &Attributes,
    ) -> Result<Vec<Reply>, NetlinkError> {
        let request = message(self.family, NLM_F_REQUEST | flags, &[command, 1, 0, 0], body);
        self.channel
            .request(request)
            .map_err(|failure| NetlinkError::new(operation, object, failure))
    }
}

fn card(pci: &str) -> Attributes {
    Attributes::default()
        .text(ATTR_BUS_NAME, BUS)
        .text(ATTR_DEV_NAME, pci)
}

fn number(reply: &[u8], kind: u16) -> Option<u16> {
    attributes(reply, GENL_HEADER)
        .find(|attribute| attribute.kind() == kind)
        .and_then(|attribute| half_at(attribute.value(), 0))
}

fn parse(reply: &[u8], pci: &str) -> Option<DevlinkPort> {
    let (mut bus, mut card, mut index, mut flavour) = (None, None, None, None);
    let (mut link, mut controller, mut external) = (None, 0, false);
    let (mut wire, mut pf, mut vf) = (None, None, None);
    for attribute in attributes(reply, GENL_HEADER) {
        let value = attribute.value();
        match attribute.kind() {
            ATTR_BUS_NAME => bus = Some(text_of(value)),
            ATTR_DEV_NAME => card = Some(text_of(value)),
            ATTR_PORT_INDEX => index = word_at(value, 0),
            ATTR_PORT_FLAVOUR => flavour = half_at(value, 0),
            ATTR_PORT_NUMBER => wire = word_at(value, 0),
            ATTR_PORT_PCI_PF_NUMBER => pf = half_at(value, 0),
            ATTR_PORT_PCI_VF_NUMBER => vf = half_at(value, 0),
            ATTR_PORT_NETDEV_IFINDEX => link = word_at(value, 0).filter(|index| *index != 0),
            ATTR_PORT_CONTROLLER_NUMBER => controller = word_at(value, 0).unwrap_or(0),
            ATTR_PORT_EXTERNAL => external = value.first() == Some(&1),
            _ => {}
        }
    }
    if bus.as_deref() != Some(BUS) || card.as_deref() != Some(pci) {
        return None;
    }
    let flavour = match (flavour?, wire, pf, vf) {
        (0, Some(wire), ..) => PortFlavour::Physical(wire),
        (3, _, Some(pf), _) => PortFlavour::Pf(pf),
        (4, _, Some(pf), Some(vf)) => PortFlavour::Vf { pf, vf },
        (other, ..) => PortFlavour::Other(other),
    };
    Some(DevlinkPort {
        index: index?,
        flavour,
        link: link.map(LinkIndex),
        controller,
        external,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port() -> Vec<u8> {
        let mut octets = vec![CMD_PORT_GET, 1, 0, 0];
        let body = card("0000:3b:00.0")
            .word(ATTR_PORT_INDEX, 5)
            .half(ATTR_PORT_FLAVOUR, 4)
            .half(ATTR_PORT_PCI_PF_NUMBER, 0)
            .half(ATTR_PORT_PCI_VF_NUMBER, 7)
            .word(ATTR_PORT_NETDEV_IFINDEX, 42)
            .word(ATTR_PORT_CONTROLLER_NUMBER, 1)
            .bytes(ATTR_PORT_EXTERNAL, &[1]);
        octets.extend(body.as_slice());
        octets
    }

    #[test]
    fn a_port_says_what_it_stands_for() {
        let expected = DevlinkPort {
            index: 5,
            flavour: PortFlavour::Vf { pf: 0, vf: 7 },
            link: Some(LinkIndex(42)),
            controller: 1,
            external: true,
        };
        assert_eq!(parse(&port(), "0000:3b:00.0"), Some(expected));
        assert_eq!(parse(&port(), "0000:3b:00.1"), None);
    }

    #[test]
    fn no_truncation_panics() {
        let whole = port();
        for length in 0..whole.len() {
            let _ = parse(&whole[..length], "0000:3b:00.0");
        }
    }
}
