//! Attributes of a VF: read as one snapshot, set as one transaction, restored by difference.
//!
//! Order: through the PF first, then the network device; a driver refuses a MAC of the VF's own choice while the PF did not give it.
//! A MAC has two sides, the one that the PF administers and the one that the function uses; both are set and both are
//! restored, each by what it is and not by who set it.

use std::thread;
use std::time::Duration;

use dpumesh_core::vf::{LinkState, VfConfig, VfLease};
use dpumesh_core::{Effect, Error, ErrorKind, Fence, MacAddr, PortRef, Result, VfAttributes};
use dpumesh_hw::netlink::vf::{VLAN_8021AD, VLAN_8021Q};
use dpumesh_hw::netlink::{LinkIndex, Vf, VfLinkState, VfSetting};

use super::SriovVf;
use super::locate::{Whereabouts, mac_of};
use crate::card::{Change, indices};
use crate::discover::VirtualFunction;
use crate::kernel::{LinkEdit, Outcome, Spot};
use crate::record::{Admin, Netdev, Snapshot};

/// Drivers answer `EBUSY` while they reset a VF; there is nothing to wait on but time.
const ATTEMPTS: u32 = 40;
const PAUSE: Duration = Duration::from_millis(10);

impl SriovVf {
    pub(super) fn set_attributes(&self, fence: Fence, lease: &VfLease, config: &VfConfig) -> Result<()> {
        const CONFIGURE: &str = "vf.configure";
        self.host(CONFIGURE)?;
        let mut change = self.card.fenced(CONFIGURE, fence)?;
        let port = change.leased(lease)?;
        self.check_config(&change, port, config)?;
        let function = change.function(port)?;
        let before = change
            .record
            .held(port)
            .map(|held| held.config.clone())
            .unwrap_or_default();
        let merged = merge(&before, config);
        if merged != before {
            // What a crash from here on leaves is what release restores by difference.
            if let Some(held) = change.record.held_mut(port) {
                held.config = merged;
            }
            change.commit()?;
        }
        let Err(failed) = self.apply(&change, port, &function, config, None) else {
            return Ok(());
        };
        if failed.effect == Effect::None
            && let Some(held) = change.record.held_mut(port)
        {
            held.config = before;
            change.commit()?;
        }
        Err(failed)
    }

    /// Refuses, by name, what the card cannot do or what makes no sense, before anything is touched.
    pub(super) fn check_config(&self, change: &Change<'_>, port: PortRef, config: &VfConfig) -> Result<()> {
        let able = &change.record.abilities;
        let asked = [
            ("config.mac", VfAttributes::MAC, config.mac.is_some()),
            ("config.vlan", VfAttributes::VLAN, config.vlan.is_some()),
            ("config.trust", VfAttributes::TRUST, config.trust.is_some()),
            (
                "config.spoof_check",
                VfAttributes::SPOOF_CHECK,
                config.spoof_check.is_some(),
            ),
            (
                "config.link_state",
                VfAttributes::LINK_STATE,
                config.link_state.is_some(),
            ),
            (
                "config.min_rate",
                VfAttributes::MIN_RATE,
                config.min_rate.is_some(),
            ),
            (
                "config.max_rate",
                VfAttributes::MAX_RATE,
                config.max_rate.is_some(),
            ),
            ("config.mtu", VfAttributes::MTU, config.mtu.is_some()),
        ];
        let unable = asked
            .iter()
            .find(|(_, kind, asked)| *asked && !able.attributes.contains(*kind));
        if let Some((field, kind, _)) = unable {
            let message = if *kind == VfAttributes::VLAN && crate::isolation::owns_vlans(change) {
                "the card keeps its VFs apart by VLANs of its own"
            } else {
                "the card's driver cannot set this attribute"
            };
            return Err(change.refuse(ErrorKind::Unsupported, message).field(*field));
        }
        if let Some(vlan) = config.vlan
            && vlan.qos > 7
        {
            let message = format!("priority {} is above 7", vlan.qos);
            return Err(change.refuse(ErrorKind::Invalid, message).field("config.vlan"));
        }
        if let (Some(mtu), Some(largest)) = (config.mtu, able.max_mtu)
            && mtu > largest
        {
            let message = format!("{mtu} octets are more than the card's {largest}");
            return Err(change.refuse(ErrorKind::Invalid, message).field("config.mtu"));
        }
        config.mac.map_or(Ok(()), |mac| check_mac(change, port, mac))
    }

    /// All that a VF has now.
    pub(super) fn snapshot(
        &self,
        change: &Change<'_>,
        port: PortRef,
        function: &VirtualFunction,
    ) -> Result<Snapshot> {
        let admin = admin_of(change, port)?;
        let netdev = match change.locate(port, function)? {
            Whereabouts::Netdev { spot, link } => Some(Netdev {
                name: link.name.clone(),
                mac: mac_of(&link),
                mtu: link.mtu,
                up: link.up,
                addresses: change
                    .kernel()
                    .addresses(&spot, link.index)
                    .map_err(|failed| change.failed(failed))?,
            }),
            _ => None,
        };
        Ok(Snapshot {
            admin,
            driver: function.driver.clone(),
            netdev,
        })
    }

    /// Sets attributes; on a failure those already set are put back.
    pub(super) fn apply(
        &self,
        change: &Change<'_>,
        port: PortRef,
        function: &VirtualFunction,
        config: &VfConfig,
        vlan: Option<u16>,
    ) -> Result<()> {
        let (before, mut wanted) = (admin_of(change, port)?, admin_of(change, port)?);
        want(&mut wanted, config);
        if let Some(vlan) = vlan {
            (wanted.vlan, wanted.qos, wanted.service_tag) = (vlan, 0, false);
        }
        let device = change.locate(port, function)?;
        let outcome =
            set_admin(change, port, &before, &wanted).and_then(|()| set_netdev(change, &device, config));
        let Err((field, failed)) = outcome else {
            return Ok(());
        };
        let failed = change.failed(failed).field(field);
        // In the order in which drivers take it, like the way there: the PF first.
        let now = admin_of(change, port)?;
        let undone = set_admin(change, port, &now, &before).and_then(|()| undo_netdev(change, &device));
        match undone {
            Ok(()) => Err(failed),
            Err((field, _)) => Err(failed.effect(Effect::Partial).field(field)),
        }
    }

    /// Makes a VF's attributes equal to its snapshot: what differs is set, whoever changed it.
    pub(super) fn restore(
        &self,
        change: &Change<'_>,
        port: PortRef,
        function: &VirtualFunction,
        snapshot: &Snapshot,
    ) -> Vec<Error> {
        let mut failed = Vec::new();
        match admin_of(change, port) {
            Err(error) => failed.push(error),
            Ok(now) => {
                if let Err((field, refused)) = set_admin(change, port, &now, &snapshot.admin) {
                    failed.push(change.failed(refused).field(field));
                }
            }
        }
        let found = change.locate(port, function);
        match (found, &snapshot.netdev) {
            (Err(error), _) => failed.push(error),
            (Ok(Whereabouts::Netdev { spot, link }), Some(before)) => {
                failed.extend(restore_netdev(change, &spot, &link, before));
            }
            _ => {}
        }
        failed
    }
}

type Refused = (&'static str, crate::kernel::KernelError);

fn set_netdev(change: &Change<'_>, device: &Whereabouts, config: &VfConfig) -> Result<(), Refused> {
    // Bound to VFIO: whoever drives it reads what the PF administers.
    let Whereabouts::Netdev { spot, link } = device else {
        return Ok(());
    };
    if let Some(mac) = config.mac {
        set_mac(change, spot, link, mac).map_err(|failed| ("config.mac", failed))?;
    }
    if let Some(mtu) = config
        .mtu
        .map(|mtu| u32::from(mtu.get()))
        .filter(|mtu| *mtu != link.mtu)
    {
        set_mtu(change, spot, link, mtu).map_err(|failed| ("config.mtu", failed))?;
    }
    Ok(())
}

/// Puts a network device back to what it was.
fn undo_netdev(change: &Change<'_>, before: &Whereabouts) -> Result<(), Refused> {
    let Whereabouts::Netdev { spot, link } = before else {
        return Ok(());
    };
    let now = change.kernel().links(spot).map_err(|failed| ("config", failed))?;
    let Some(now) = now.iter().find(|now| now.index == link.index) else {
        return Ok(());
    };
    if now.mac != link.mac {
        set_mac(change, spot, now, mac_of(link)).map_err(|failed| ("config.mac", failed))?;
    }
    if now.mtu != link.mtu {
        set_mtu(change, spot, now, link.mtu).map_err(|failed| ("config.mtu", failed))?;
    }
    Ok(())
}

fn set_mtu(change: &Change<'_>, spot: &Spot, link: &dpumesh_hw::netlink::Link, mtu: u32) -> Outcome<()> {
    let edit = LinkEdit {
        mtu: Some(mtu),
        ..LinkEdit::default()
    };
    patiently(|| change.kernel().change_link(spot, link.index, &edit))
}

fn restore_netdev(
    change: &Change<'_>,
    spot: &Spot,
    link: &dpumesh_hw::netlink::Link,
    before: &Netdev,
) -> Vec<Error> {
    let mut failed = Vec::new();
    let mut step = |done: Outcome<()>| failed.extend(done.err().map(|refused| change.failed(refused)));
    let kernel = change.kernel();
    if mac_of(link) != before.mac {
        step(set_mac(change, spot, link, before.mac));
    }
    if link.mtu != before.mtu {
        step(set_mtu(change, spot, link, before.mtu));
    }
    if link.name != before.name {
        let edit = LinkEdit {
            name: Some(before.name.clone()),
            ..LinkEdit::default()
        };
        // Somebody else has the name by now: it says nothing about who a VF is.
        step(match kernel.change_link(spot, link.index, &edit) {
            Err(taken) if taken.errno == Some(libc::EEXIST) => Ok(()),
            other => other,
        });
    }
    if link.up != before.up {
        step(kernel.change_link(spot, link.index, &LinkEdit::up(before.up)));
    }
    match kernel.addresses(spot, link.index) {
        Err(refused) => step(Err(refused)),
        Ok(now) => {
            for net in before.addresses.iter().filter(|net| !now.contains(net)) {
                step(kernel.add_address(spot, link.index, *net));
            }
        }
    }
    failed
}

/// Sets the MAC that a function uses, and looks whether it does.
pub(super) fn set_mac(
    change: &Change<'_>,
    spot: &Spot,
    link: &dpumesh_hw::netlink::Link,
    mac: MacAddr,
) -> Outcome<()> {
    let kernel = change.kernel();
    let uses = |mac: MacAddr| -> Outcome<bool> {
        let links = kernel.links(spot)?;
        Ok(links
            .iter()
            .any(|now| now.index == link.index && mac_of(now) == mac))
    };
    // Some drivers take it over by themselves when the PF administers it.
    if uses(mac)? {
        return Ok(());
    }
    let edit = LinkEdit {
        mac: Some(mac.0),
        ..LinkEdit::default()
    };
    let set = patiently(|| kernel.change_link(spot, link.index, &edit));
    if set.is_ok() && uses(mac)? {
        return Ok(());
    }
    // The others when they are switched on again.
    kernel.change_link(spot, link.index, &LinkEdit::up(false))?;
    let mut set = patiently(|| kernel.change_link(spot, link.index, &edit));
    if set.is_err() || link.up {
        kernel.change_link(spot, link.index, &LinkEdit::up(true))?;
        if set.is_err() {
            set = patiently(|| kernel.change_link(spot, link.index, &edit));
        }
        if !link.up {
            kernel.change_link(spot, link.index, &LinkEdit::up(false))?;
        }
    }
    if uses(mac)? {
        return Ok(());
    }
    set.and_then(|()| {
        Err(crate::kernel::KernelError {
            what: format!(
                "the driver of {} acknowledged {mac} and does not use it",
                link.name
            ),
            errno: None,
        })
    })
}

/// Tries again while the driver is busy, for a bounded time.
pub(super) fn patiently(mut work: impl FnMut() -> Outcome<()>) -> Outcome<()> {
    for _ in 1..ATTEMPTS {
        match work() {
            Err(busy) if busy.errno == Some(libc::EBUSY) => thread::sleep(PAUSE),
            other => return other,
        }
    }
    work()
}

/// What the PF administers of a VF now.
fn admin_of(change: &Change<'_>, port: PortRef) -> Result<Admin> {
    let (link, index) = pf_of(change, port)?;
    let vfs = change
        .kernel()
        .vfs(link)
        .map_err(|failed| change.failed(failed))?;
    let found = vfs.into_iter().find(|vf| vf.index == index);
    found.map(|vf| Admin::of(&vf)).ok_or_else(|| {
        let message = "its physical function does not list it";
        change.refuse(ErrorKind::Io, message).object(port)
    })
}

fn pf_of(change: &Change<'_>, port: PortRef) -> Result<(LinkIndex, u16)> {
    let (pf, index) = indices(port).ok_or_else(|| {
        change
            .refuse(ErrorKind::NotFound, "there is no such VF")
            .object(port)
    })?;
    Ok((change.pf_link(pf)?.index, index))
}

fn set_admin(change: &Change<'_>, port: PortRef, now: &Admin, wanted: &Admin) -> Result<(), Refused> {
    let settings = difference(now, wanted);
    if settings.is_empty() {
        return Ok(());
    }
    let Ok((link, index)) = pf_of(change, port) else {
        return Err((
            "config",
            crate::kernel::KernelError {
                what: "the physical function is gone".into(),
                errno: Some(libc::ENODEV),
            },
        ));
    };
    for (field, setting) in settings {
        patiently(|| change.kernel().set_vf(link, index, &setting)).map_err(|failed| (field, failed))?;
    }
    Ok(())
}

/// What has to be set to get from one to the other, in the order in which drivers take it.
fn difference(now: &Admin, wanted: &Admin) -> Vec<(&'static str, VfSetting)> {
    let mut settings = Vec::new();
    if now.mac != wanted.mac {
        settings.push(("config.mac", VfSetting::Mac(wanted.mac.0)));
    }
    let vlan = |admin: &Admin| (admin.vlan, admin.qos, admin.service_tag && admin.vlan != 0);
    if vlan(now) != vlan(wanted) {
        let protocol = if wanted.service_tag {
            VLAN_8021AD
        } else {
            VLAN_8021Q
        };
        let (id, qos) = (wanted.vlan, wanted.qos);
        settings.push(("config.vlan", VfSetting::Vlan { id, qos, protocol }));
    }
    if let Some(on) = wanted.trust.filter(|_| now.trust != wanted.trust) {
        settings.push(("config.trust", VfSetting::Trust(on)));
    }
    if let Some(on) = wanted
        .spoof_check
        .filter(|_| now.spoof_check != wanted.spoof_check)
    {
        settings.push(("config.spoof_check", VfSetting::SpoofCheck(on)));
    }
    if now.link_state != wanted.link_state {
        let state = match wanted.link_state {
            LinkState::Auto => VfLinkState::Auto,
            LinkState::Enable => VfLinkState::Enable,
            LinkState::Disable => VfLinkState::Disable,
        };
        settings.push(("config.link_state", VfSetting::LinkState(state)));
    }
    if (now.min_rate, now.max_rate) != (wanted.min_rate, wanted.max_rate) {
        let field = if now.min_rate == wanted.min_rate {
            "config.max_rate"
        } else {
            "config.min_rate"
        };
        let (min, max) = (wanted.min_rate, wanted.max_rate);
        settings.push((field, VfSetting::Rate { min, max }));
    }
    settings
}

fn want(admin: &mut Admin, config: &VfConfig) {
    admin.mac = config.mac.unwrap_or(admin.mac);
    if let Some(vlan) = config.vlan {
        admin.vlan = vlan.id.map_or(0, |id| id.get());
        (admin.qos, admin.service_tag) = (vlan.qos, vlan.service_tag);
    }
    admin.trust = config.trust.or(admin.trust);
    admin.spoof_check = config.spoof_check.or(admin.spoof_check);
    admin.link_state = config.link_state.unwrap_or(admin.link_state);
    admin.min_rate = config.min_rate.map_or(admin.min_rate, |rate| rate.0);
    admin.max_rate = config.max_rate.map_or(admin.max_rate, |rate| rate.0);
}

fn merge(before: &VfConfig, then: &VfConfig) -> VfConfig {
    VfConfig {
        mac: then.mac.or(before.mac),
        vlan: then.vlan.or(before.vlan),
        trust: then.trust.or(before.trust),
        spoof_check: then.spoof_check.or(before.spoof_check),
        link_state: then.link_state.or(before.link_state),
        min_rate: then.min_rate.or(before.min_rate),
        max_rate: then.max_rate.or(before.max_rate),
        mtu: then.mtu.or(before.mtu),
    }
}

impl Admin {
    fn of(vf: &Vf) -> Self {
        Self {
            mac: MacAddr(vf.mac),
            vlan: vf.vlan,
            qos: vf.qos,
            service_tag: vf.vlan_protocol == VLAN_8021AD,
            spoof_check: vf.spoof_check,
            trust: vf.trust,
            link_state: match vf.link_state {
                VfLinkState::Auto => LinkState::Auto,
                VfLinkState::Enable => LinkState::Enable,
                VfLinkState::Disable => LinkState::Disable,
            },
            min_rate: vf.min_rate,
            max_rate: vf.max_rate,
        }
    }
}

/// A MAC must be one station's, and no other function of the card may have it: administered or in use.
fn check_mac(change: &Change<'_>, port: PortRef, mac: MacAddr) -> Result<()> {
    if mac.is_zero() || mac.is_multicast() {
        let message = "must be the address of one station";
        return Err(change.refuse(ErrorKind::Invalid, message).field("config.mac"));
    }
    let functions = change.vfs();
    let mut user = None;
    for (pf, pci) in change.inner.pfs.iter().enumerate() {
        let pf = u16::try_from(pf).unwrap_or(u16::MAX);
        let Some(link) = crate::discover::netdev_of(change.links(), *pci) else {
            continue;
        };
        if mac_of(link) == mac {
            user = Some(PortRef::Pf {
                controller: dpumesh_core::ControllerId(0),
                pf: dpumesh_core::PfIndex(pf),
            });
        }
        let vfs = change
            .kernel()
            .vfs(link.index)
            .map_err(|failed| change.failed(failed))?;
        let administered = vfs.into_iter().filter(|vf| MacAddr(vf.mac) == mac);
        let mut others = administered
            .map(|vf| crate::card::port(pf, vf.index))
            .filter(|other| *other != port);
        user = user.or_else(|| others.next());
    }
    let in_use = functions
        .iter()
        .filter(|(other, _)| *other != port)
        .find(|(_, function)| {
            let link = crate::discover::netdev_of(change.links(), function.pci);
            link.is_some_and(|link| mac_of(link) == mac)
        });
    let Some(user) = user.or_else(|| in_use.map(|(other, _)| *other)) else {
        return Ok(());
    };
    let message = format!("{mac} is in use by {user}");
    Err(change
        .refuse(ErrorKind::Conflict, message)
        .field("config.mac")
        .object(user))
}
