//! [`Yard`]: the network devices that stand for VFs, and their way between namespaces.
//!
//! A device is at home in the host's namespace, switched off, under the card's own name for it; in a pod it has the pod's
//! name. It is looked for where it was about to go, where it is recorded, and at home, and known by its label (the
//! interface's alias: card, VF, serial number), never by name or path alone: both are used again by others. A
//! namespace that vanished took the device along (real VFs return to the host, virtual devices die with their namespace):
//! then it is made anew.

use std::collections::HashMap;
use std::path::PathBuf;

use dpumesh_core::{ErrorKind, PortRef, Result};
use dpumesh_hw::netlink::{Link, LinkChange, LinkIndex, Netlink, NetlinkError};
use dpumesh_hw::netns::Namespace;

use crate::card::{Attributes, Card, Function, Place, error, namespace_error};
use crate::device::{create_pair, create_tap};
use crate::{TapOptions, VfKind};

/// Devices of one card, during one transaction.
#[derive(Debug)]
pub(crate) struct Yard<'a> {
    card: &'a Card,
    operation: &'static str,
    kind: VfKind,
    host: Namespace,
    fabric: Option<Namespace>,
    /// What was listed, until something changes.
    seen: HashMap<Option<PathBuf>, Vec<Link>>,
}

/// A device where it was found.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) place: Place,
    pub(crate) namespace: Namespace,
    pub(crate) link: Link,
}

impl<'a> Yard<'a> {
    pub(crate) fn new(
        card: &'a Card,
        operation: &'static str,
        kind: VfKind,
        host: Namespace,
        fabric: Option<Namespace>,
    ) -> Self {
        Self {
            card,
            operation,
            kind,
            host,
            fabric,
            seen: HashMap::new(),
        }
    }

    /// Makes a VF's device at home, as the function says it ought to be.
    pub(crate) fn make(&mut self, index: u16, function: &Function) -> Result<()> {
        self.card.steps.pass();
        self.seen.clear();
        let name = home_name(&self.card.options, index);
        // A process that died left one without a label.
        self.sweep(&self.host, &name)?;
        match self.kind {
            VfKind::Tap => create_tap(&self.host, &name).map_err(|mut error| {
                error.operation = self.operation.into();
                error
            })?,
            VfKind::Veth => self.make_pair(&name, &fabric_name(&self.card.options, index))?,
        }
        let mut netlink = self.netlink(&self.host)?;
        let link = netlink.link(&name).map_err(|error| self.failed(error))?;
        let (label, attributes) = (self.label(index, function), &function.attributes);
        let change = LinkChange::new()
            .mac(attributes.mac.0)
            .mtu(attributes.mtu.get().into())
            .alias(&label);
        self.card.steps.pass();
        netlink
            .change_link(link.index, &change)
            .map_err(|error| self.failed(error))
    }

    fn make_pair(&self, name: &str, outer: &str) -> Result<()> {
        let fabric = self.fabric()?;
        self.sweep(fabric, outer)?;
        create_pair(&self.host, name, fabric, outer).map_err(|mut error| {
            error.operation = self.operation.into();
            error
        })
    }

    /// Deletes what a process that died left half made of a VF.
    pub(crate) fn sweep_home(&self, index: u16) -> Result<()> {
        self.sweep(&self.host, &home_name(&self.card.options, index))
    }

    /// Deletes a device of ours that lacks a label: half made, or the card's end of a pair whose other end is dying with
    /// its namespace.
    fn sweep(&self, namespace: &Namespace, name: &str) -> Result<()> {
        let mut netlink = self.netlink(namespace)?;
        let deleted = match netlink.link(name) {
            Ok(link) if link.kind.as_deref() == Some(self.kind.driver()) && link.alias.is_none() => {
                netlink.delete_link(link.index)
            }
            Ok(_) => Ok(()),
            Err(error) => Err(error),
        };
        match deleted {
            Err(error) if !error.is_missing() => Err(self.failed(error)),
            _ => Ok(()),
        }
    }

    /// By which a device is known.
    fn label(&self, index: u16, function: &Function) -> String {
        format!(
            "dpumesh {:08x} {} {}",
            self.card.number(),
            PortRef::vf(index),
            function.serial
        )
    }

    /// Looks for a VF's device.
    pub(crate) fn find(&mut self, index: u16, function: &Function) -> Result<Option<Found>> {
        let places = [function.going.as_ref(), Some(&function.place), Some(&Place::Host)];
        let mut tried: Vec<&Place> = Vec::new();
        for place in places.into_iter().flatten() {
            if tried.contains(&place) {
                continue;
            }
            tried.push(place);
            if let Some(found) = self.find_at(index, place, function)? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    fn find_at(&mut self, index: u16, place: &Place, function: &Function) -> Result<Option<Found>> {
        let (namespace, path) = match place {
            Place::Host => (
                self.host
                    .try_clone()
                    .map_err(|error| namespace_error(self.operation, error))?,
                None,
            ),
            Place::Netns { path, .. } => match Namespace::open(path) {
                // A path that was used again leads to the host itself: that is looked at as home.
                Ok(namespace) if namespace != self.host => (namespace, Some(path.clone())),
                _ => return Ok(None),
            },
        };
        let label = self.label(index, function);
        let links = self.links(path, &namespace)?;
        let link = links.iter().find(|link| link.alias.as_ref() == Some(&label));
        Ok(link.cloned().map(|link| Found {
            place: place.clone(),
            namespace,
            link,
        }))
    }

    fn links(&mut self, path: Option<PathBuf>, namespace: &Namespace) -> Result<&[Link]> {
        if !self.seen.contains_key(&path) {
            // What can be opened but not entered is no namespace (any more).
            let links = match Netlink::open_in(namespace) {
                Ok(mut netlink) => netlink.links().map_err(|error| self.failed(error))?,
                Err(_) if path.is_some() => Vec::new(),
                Err(error) => return Err(self.failed(error)),
            };
            self.seen.insert(path.clone(), links);
        }
        Ok(self.seen.get(&path).map_or(&[], Vec::as_slice))
    }

    /// Moves a device from home into a namespace, under a new name, and switches it on. Returns it as it is there.
    pub(crate) fn send(&mut self, found: &Found, to: &Namespace, ifname: &str) -> Result<Link> {
        self.card.steps.pass();
        self.seen.clear();
        let away = LinkChange::new().down().namespace(to).name(ifname);
        self.netlink(&found.namespace)?
            .change_link(found.link.index, &away)
            .map_err(|error| self.failed(error))?;
        self.card.steps.pass();
        let mut netlink = self.netlink(to)?;
        let link = netlink.link(ifname).map_err(|error| self.failed(error))?;
        netlink
            .change_link(link.index, &LinkChange::new().up())
            .map_err(|error| self.failed(error))?;
        Ok(link)
    }

    /// Switches a device on.
    pub(crate) fn switch_on(&mut self, found: &Found) -> Result<()> {
        self.seen.clear();
        let up = self
            .netlink(&found.namespace)?
            .change_link(found.link.index, &LinkChange::new().up());
        up.map_err(|error| self.failed(error))
    }

    /// Moves a device back home, under its own name, switched off.
    pub(crate) fn bring_home(&mut self, index: u16, found: &Found) -> Result<()> {
        self.card.steps.pass();
        self.seen.clear();
        let name = home_name(&self.card.options, index);
        let change = match found.place {
            Place::Host => LinkChange::new().down(),
            // The kernel would move it first and then fail to rename it.
            Place::Netns { .. } if self.is_taken(&self.host, &name)? => {
                let message = "another interface on the host has its name";
                return Err(error(ErrorKind::Io, self.operation, message).object(name));
            }
            Place::Netns { .. } => LinkChange::new().down().namespace(&self.host).name(&name),
        };
        let mut netlink = self.netlink(&found.namespace)?;
        netlink
            .change_link(found.link.index, &change)
            .map_err(|error| self.failed(error))
    }

    /// Sets MAC, then MTU, where they differ from what the device has.
    pub(crate) fn set(&mut self, found: &Found, wanted: &Attributes) -> Result<()> {
        self.seen.clear();
        let mut netlink = self.netlink(&found.namespace)?;
        let (mac, mtu) = (wanted.mac.0, u32::from(wanted.mtu.get()));
        if found.link.mac != Some(mac) {
            self.card.steps.pass();
            let changed = netlink.change_link(found.link.index, &LinkChange::new().mac(mac));
            changed.map_err(|error| self.failed(error).field("config.mac"))?;
        }
        if found.link.mtu != mtu {
            self.card.steps.pass();
            let changed = netlink.change_link(found.link.index, &LinkChange::new().mtu(mtu));
            changed.map_err(|error| self.failed(error).field("config.mtu"))?;
        }
        Ok(())
    }

    /// Deletes a device; of a veth pair both ends go.
    pub(crate) fn delete(&mut self, found: &Found) -> Result<()> {
        self.card.steps.pass();
        self.seen.clear();
        match self.netlink(&found.namespace)?.delete_link(found.link.index) {
            Err(error) if !error.is_missing() => Err(self.failed(error)),
            _ => Ok(()),
        }
    }

    /// True for the host's own namespace.
    pub(crate) fn is_home(&self, namespace: &Namespace) -> bool {
        *namespace == self.host
    }

    /// True when an interface of this name is in a namespace.
    pub(crate) fn is_taken(&self, namespace: &Namespace, ifname: &str) -> Result<bool> {
        match self.netlink(namespace)?.link(ifname) {
            Ok(_) => Ok(true),
            Err(error) if error.is_missing() => Ok(false),
            Err(error) => Err(self.failed(error)),
        }
    }

    /// The namespace and name by which the SoC reads a VF's frames.
    pub(crate) fn representor(
        &mut self,
        index: u16,
        function: &Function,
    ) -> Result<Option<(Namespace, String)>> {
        match self.kind {
            VfKind::Tap => Ok(self
                .find(index, function)?
                .map(|found| (found.namespace, found.link.name))),
            VfKind::Veth => {
                let fabric = self
                    .fabric()?
                    .try_clone()
                    .map_err(|error| namespace_error(self.operation, error))?;
                Ok(Some((fabric, fabric_name(&self.card.options, index))))
            }
        }
    }

    fn fabric(&self) -> Result<&Namespace> {
        self.fabric.as_ref().ok_or_else(|| {
            let message =
                "veth VFs need the namespace of the card's ends: open the SoC's side first, or name it";
            error(ErrorKind::NotFound, self.operation, message).field("fabric_namespace")
        })
    }

    fn netlink(&self, namespace: &Namespace) -> Result<Netlink> {
        Netlink::open_in(namespace).map_err(|error| self.failed(error))
    }

    fn failed(&self, failed: NetlinkError) -> dpumesh_core::Error {
        let kind = match failed.errno() {
            Some(libc::EEXIST) => ErrorKind::Exists,
            Some(libc::EPERM | libc::EACCES) => ErrorKind::Denied,
            _ => ErrorKind::Io,
        };
        let mut translated = error(kind, self.operation, failed.to_string());
        translated.vendor_code = failed.errno().map(i64::from);
        translated.source(failed)
    }
}

/// Interface index as the contract carries it.
pub(crate) fn index_number(index: LinkIndex) -> u32 {
    index.0
}

/// Name of a VF's device on the host, as `dpu0vf3`.
pub(crate) fn home_name(options: &TapOptions, index: u16) -> String {
    format!("{}vf{index}", short_name(options))
}

/// Name of the card's end of a veth VF, as `dpu0rep3`.
fn fabric_name(options: &TapOptions, index: u16) -> String {
    format!("{}rep{index}", short_name(options))
}

/// The card's name as far as it fits into a device name: 15 octets with `rep` and five digits.
fn short_name(options: &TapOptions) -> String {
    options
        .dpu
        .0
        .chars()
        .filter(char::is_ascii_alphanumeric)
        .take(7)
        .collect()
}
