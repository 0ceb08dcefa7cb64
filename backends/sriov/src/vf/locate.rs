//! Where a VF is now: looked for, never assumed.
//!
//! A VF's network device is known by the PCI function that it belongs to. It is looked for where its record says it was
//! about to go, where it was, at the host, and in the machine's first namespace: there the kernel puts a function whose
//! namespace died.

use dpumesh_core::vf::VfLocation;
use dpumesh_core::{MacAddr, Mtu, PortRef, Result};
use dpumesh_hw::netlink::Link;

use crate::abilities::VFIO;
use crate::card::Change;
use crate::discover::{self, VirtualFunction};
use crate::kernel::Spot;

/// Where a VF was found.
#[derive(Clone, Debug)]
pub(crate) enum Whereabouts {
    /// As a network device.
    Netdev {
        /// In which namespace.
        spot: Spot,
        /// The device.
        link: Box<Link>,
    },
    /// Without network device, bound to this driver.
    Driver(String),
    /// Without network device and without driver.
    Unbound,
    /// Its driver should have made a network device, which is nowhere we know.
    Nowhere,
}

impl Whereabouts {
    pub(crate) fn link(&self) -> Option<&Link> {
        match self {
            Self::Netdev { link, .. } => Some(link),
            _ => None,
        }
    }

    pub(crate) fn location(&self) -> VfLocation {
        match self {
            Self::Netdev { spot: Spot::Host, .. } => VfLocation::Host,
            Self::Netdev { spot: Spot::Init, .. } => VfLocation::Netns {
                path: "/proc/1/ns/net".into(),
            },
            Self::Netdev {
                spot: Spot::At(path), ..
            } => VfLocation::Netns { path: path.clone() },
            Self::Driver(driver) => VfLocation::Driver(driver.clone()),
            Self::Unbound => VfLocation::Driver("none".into()),
            Self::Nowhere => VfLocation::Missing,
        }
    }
}

impl Change<'_> {
    /// Looks for a VF.
    pub(crate) fn locate(&self, port: PortRef, function: &VirtualFunction) -> Result<Whereabouts> {
        match function.driver.as_deref() {
            None => return Ok(Whereabouts::Unbound),
            Some(VFIO) => return Ok(Whereabouts::Driver(VFIO.into())),
            Some(_) => {}
        }
        if let Some(link) = discover::netdev_of(self.links(), function.pci) {
            return Ok(at(Spot::Host, link));
        }
        let held = self.record.held(port);
        let spots = held.into_iter().flat_map(|held| {
            let going = held.going.as_ref().and_then(|place| place.spot());
            [going, held.place.spot()].into_iter().flatten()
        });
        for spot in spots.chain([Spot::Init]) {
            if spot == Spot::Host {
                continue;
            }
            // A namespace that died, or whose path names something else by now, is no place to be found at.
            let Ok(links) = self.kernel().links(&spot) else {
                continue;
            };
            if let Some(link) = discover::netdev_of(&links, function.pci) {
                return Ok(at(spot, link));
            }
        }
        // Drivers of other purposes (uio, vdpa) make no network device of ours to look for.
        let before = held.and_then(|held| held.snapshot.driver.as_deref());
        Ok(match (function.driver.as_deref(), before) {
            (Some(now), Some(before)) if now != before => Whereabouts::Driver(now.to_owned()),
            (Some(now), None) if !makes_netdevs(self, function, now) => Whereabouts::Driver(now.to_owned()),
            _ => Whereabouts::Nowhere,
        })
    }
}

/// Another VF of the card shows that this driver makes network devices.
fn makes_netdevs(change: &Change<'_>, function: &VirtualFunction, driver: &str) -> bool {
    let others = change.vfs().into_iter();
    let mut others =
        others.filter(|(_, other)| other.pci != function.pci && other.driver.as_deref() == Some(driver));
    others.any(|(_, other)| discover::netdev_of(change.links(), other.pci).is_some())
}

fn at(spot: Spot, link: &Link) -> Whereabouts {
    Whereabouts::Netdev {
        spot,
        link: Box::new(link.clone()),
    }
}

pub(crate) fn mac_of(link: &Link) -> MacAddr {
    MacAddr(link.mac.unwrap_or_default())
}

pub(crate) fn mtu_of(octets: u32) -> Mtu {
    let octets = u16::try_from(octets).unwrap_or(u16::MAX);
    Mtu::try_from(octets).unwrap_or_default()
}
