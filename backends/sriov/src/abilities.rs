//! What a card is able to do, found by asking its driver: each attribute of a free VF is set to the value that it has. No table
//! of vendors.
//!
//! A card without a VF gets one for the time of the questions: nobody is disturbed, since nobody has one.

use std::path::Path;

use dpumesh_core::{AttachmentKinds, Mtu, PfIndex, ResetLevels, Result, VfAttributes};
use dpumesh_hw::netlink::{EswitchMode, LinkIndex, Vf, VfSetting};

use crate::card::Change;
use crate::discover::{self, VirtualFunction};
use crate::kernel::{Kernel, KernelError};
use crate::options::Protect;
use crate::record::Abilities;
use crate::vf::count;
use crate::{Isolation, isolation};

/// Driver by which user space gets a function.
pub(crate) const VFIO: &str = "vfio-pci";

/// Finds out what the card is able to do now.
pub(crate) fn probe(change: &mut Change<'_>) -> Result<Abilities> {
    let pf = change.pf(PfIndex(0))?;
    let borrowed = pf.num_vfs == 0;
    if borrowed {
        count::write(change, &pf, 1)?;
    }
    let found = ask(change);
    if borrowed {
        count::write(change, &pf, 0)?;
    }
    found
}

fn ask(change: &Change<'_>) -> Result<Abilities> {
    let kernel = change.kernel();
    let pf = change.pf(PfIndex(0))?;
    let link = change.pf_link(PfIndex(0))?.index;
    let mut abilities = Abilities::default();
    let mode = kernel
        .eswitch_mode(pf.pci)
        .map_err(|failed| change.failed(failed))?;
    abilities.switchdev = mode == Some(EswitchMode::Switchdev);
    abilities.resets = ResetLevels::CONFIG;
    let sysfs = kernel.sysfs();
    let Some(function) = discover::vfs(sysfs, pf.pci).into_iter().next() else {
        abilities.isolation = isolation::judge(change, abilities.attributes)?;
        return Ok(abilities);
    };
    if function.can_reset {
        abilities.resets |= ResetLevels::FUNCTION;
    }
    let vfs = kernel.vfs(link).map_err(|failed| change.failed(failed))?;
    if let Some(vf) = vfs.iter().find(|vf| vf.index == function.index) {
        abilities.attributes = try_attributes(kernel, link, vf);
    }
    abilities.max_mtu = largest_mtu(change, &function);
    if abilities.max_mtu.is_some() {
        abilities.attributes |= VfAttributes::MTU;
    }
    abilities.isolation = isolation::judge(change, abilities.attributes)?;
    if abilities.isolation == Isolation::VlanPerVf && change.inner.options.protect == Protect::Required {
        // The card needs them for itself.
        abilities.attributes -= VfAttributes::VLAN;
    }
    Ok(abilities)
}

fn try_attributes(kernel: &dyn Kernel, pf: LinkIndex, vf: &Vf) -> VfAttributes {
    let takes = |setting: VfSetting| is_taken(&kernel.set_vf(pf, vf.index, &setting));
    let mut able = VfAttributes::empty();
    able.set(VfAttributes::MAC, takes(VfSetting::Mac(vf.mac)));
    let vlan = VfSetting::Vlan {
        id: vf.vlan,
        qos: vf.qos,
        protocol: vf.vlan_protocol,
    };
    able.set(VfAttributes::VLAN, takes(vlan));
    able.set(
        VfAttributes::SPOOF_CHECK,
        vf.spoof_check.is_some_and(|on| takes(VfSetting::SpoofCheck(on))),
    );
    able.set(
        VfAttributes::TRUST,
        vf.trust.is_some_and(|on| takes(VfSetting::Trust(on))),
    );
    able.set(
        VfAttributes::LINK_STATE,
        takes(VfSetting::LinkState(vf.link_state)),
    );
    let before = VfSetting::Rate {
        min: vf.min_rate,
        max: vf.max_rate,
    };
    if takes(before) {
        // A driver that knows only one of them refuses the other by its value.
        able.set(
            VfAttributes::MAX_RATE,
            takes(VfSetting::Rate { min: 0, max: 100 }),
        );
        able.set(VfAttributes::MIN_RATE, takes(VfSetting::Rate { min: 10, max: 0 }));
        takes(before);
    }
    able
}

fn is_taken(answer: &Result<(), KernelError>) -> bool {
    // Busy is not unable.
    match answer {
        Ok(()) => true,
        Err(failed) => failed.errno == Some(libc::EBUSY),
    }
}

fn largest_mtu(change: &Change<'_>, function: &VirtualFunction) -> Option<Mtu> {
    let link = discover::netdev_of(change.links(), function.pci)?;
    let octets = link.max_mtu.unwrap_or(1500).min(u16::MAX.into());
    u16::try_from(octets).ok()?.try_into().ok()
}

/// How a VF can be attached on this machine.
pub(crate) fn attachments(sysfs: &Path) -> AttachmentKinds {
    let mut kinds = AttachmentKinds::NETNS;
    kinds.set(
        AttachmentKinds::VFIO,
        sysfs.join("bus/pci/drivers").join(VFIO).exists(),
    );
    kinds
}
