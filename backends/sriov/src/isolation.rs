//! [`Isolation`]: what keeps one VF of a card from talking to another, or to the wire, past the host.
//!
//! A NIC without switchdev has a learning-free switch inside: a frame for the MAC of another VF is handed over in the card, and
//! the host never sees it. A pod that shall be protected by a proxy on the host must not sit on such a card. What can stop
//! it, from best to least:
//!
//! | verdict | how | what the host sees |
//! |---|---|---|
//! | [`Switchdev`](Isolation::Switchdev) | a frame without a rule goes to the VF's representor | every frame |
//! | [`VlanPerVf`](Isolation::VlanPerVf) | each leased VF has a VLAN of its own, that the card adds and removes | frames for the PF, tagged |
//! | [`AntiLoopback`](Isolation::AntiLoopback) | the switch sends every frame out on the wire (VEPA) | what comes back from there |
//! | [`None`](Isolation::None) | – | nothing: no VF is leased unless protection is waived |

use dpumesh_core::{ErrorKind, PfIndex, Result, VfAttributes};
use dpumesh_hw::netlink::{BridgeMode, EswitchMode};
use serde::{Deserialize, Serialize};

use crate::card::{Change, indices};
use crate::options::Protect;

/// What keeps the VFs of a card from talking past the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Isolation {
    /// The eswitch hands every frame without a rule to a representor.
    Switchdev,
    /// Each leased VF is alone in a VLAN, with the PF as the other end.
    VlanPerVf,
    /// The embedded switch hands nothing over inside the card.
    AntiLoopback,
    /// Nothing does.
    None {
        /// What was looked for.
        reason: String,
    },
}

impl Default for Isolation {
    fn default() -> Self {
        Self::None {
            reason: "the card was not looked at yet".into(),
        }
    }
}

impl Isolation {
    /// No frame goes from one VF to another inside the card.
    pub fn holds(&self) -> bool {
        !matches!(self, Self::None { .. })
    }

    /// Frames of a VF reach the host, where a dataplane can take them.
    pub fn intercepts(&self) -> bool {
        matches!(self, Self::Switchdev | Self::VlanPerVf)
    }
}

/// Finds out what holds on this card, and sets what has to be set once.
pub(crate) fn judge(change: &Change<'_>, attributes: VfAttributes) -> Result<Isolation> {
    let kernel = change.kernel();
    let modes: Vec<_> = change
        .inner
        .pfs
        .iter()
        .map(|pci| kernel.eswitch_mode(*pci).map_err(|failed| change.failed(failed)))
        .collect::<Result<_>>()?;
    if modes.iter().all(|mode| *mode == Some(EswitchMode::Switchdev)) {
        return Ok(Isolation::Switchdev);
    }
    if attributes.contains(VfAttributes::VLAN) {
        return Ok(Isolation::VlanPerVf);
    }
    let pfs = 0..u16::try_from(change.inner.pfs.len()).unwrap_or(u16::MAX);
    let mut refusal = None;
    for pf in pfs.map(PfIndex) {
        let link = change.pf_link(pf)?.index;
        if kernel.bridge_mode(link).ok().flatten() == Some(BridgeMode::Vepa) {
            continue;
        }
        if let Err(failed) = kernel.set_bridge_mode(link, BridgeMode::Vepa) {
            refusal.get_or_insert(failed.what);
        }
    }
    Ok(match refusal {
        None => Isolation::AntiLoopback,
        Some(refusal) => Isolation::None {
            reason: format!(
                "the eswitch is not in switchdev mode, the driver sets no VLAN of a VF, and its switch cannot be told to send \
                 everything out on the wire ({refusal}): frames from VF to VF would never be seen"
            ),
        },
    })
}

/// Refuses a lease on a card where a protected pod could be bypassed.
pub(crate) fn admit(change: &Change<'_>) -> Result<()> {
    match (&change.record.abilities.isolation, change.inner.options.protect) {
        (Isolation::None { reason }, Protect::Required) => Err(change
            .refuse(
                ErrorKind::Denied,
                format!("a pod on this card cannot be protected: {reason}"),
            )
            .object(change.inner.options.device)),
        _ => Ok(()),
    }
}

/// The VLAN in which a leased VF is alone; `None` where VLANs are the owners'.
pub(crate) fn vlan_of(change: &Change<'_>, port: dpumesh_core::PortRef) -> Result<Option<u16>> {
    if !owns_vlans(change) {
        return Ok(None);
    }
    let (first, last) = change.inner.options.vlans;
    let (pf, vf) = indices(port).unwrap_or((PfIndex(0), 0));
    let before: u32 = change
        .pfs()
        .take(usize::from(pf.0))
        .map(|pf| u32::from(pf.total_vfs))
        .sum();
    let id = u32::from(first) + before + u32::from(vf);
    match u16::try_from(id) {
        Ok(id) if id <= last => Ok(Some(id)),
        _ => Err(change
            .refuse(
                ErrorKind::CapacityExceeded,
                format!("{port} would need VLAN {id}: the card's own are {first} to {last}"),
            )
            .object("vlans")),
    }
}

/// The card needs the VFs' VLANs for itself.
pub(crate) fn owns_vlans(change: &Change<'_>) -> bool {
    change.record.abilities.isolation == Isolation::VlanPerVf
        && change.inner.options.protect == Protect::Required
}
