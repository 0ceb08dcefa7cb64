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
//!
//! # What was seen on a real driver
//! Intel 82576 (`igb`, `igbvf`, Linux 6.12, emulated by QEMU), three VFs in three namespaces, the PF, and the other end of the wire;
//! `tests/machine/lab.rs` prints who saw what, and the table is from there. Asserted, in `tests/machine/own.rs`, is what a lease stands
//! on: the bold entries, with foreign sources and foreign tags, and the frame for the PF with its tag. The rest is an observation.
//!
//! | a frame of VF 0 for | nothing set | all VFs in VLAN 101 | VFs in VLAN 101, 102, 103 |
//! |---|---|---|---|
//! | VF 1 | VF 1 | VF 1 | **nobody** |
//! | VF 1, with the MAC of VF 2 as source (spoof check on) | VF 1 | VF 1 | **nobody** |
//! | VF 1, with a tag of VF 1's VLAN | nobody | VF 1, tag left on | **nobody** |
//! | everybody | VFs, PF, wire | VFs, PF (101), wire (101) | PF (101), wire (101) |
//! | a station that nobody is | VFs, wire | VFs, wire (101) | wire (101) |
//! | the PF | PF | PF (101) | PF (101) |
//! | VF 0, *from the wire*, tagged 101 | PF (101) | VF 0 | VF 0 |
//!
//! * A VLAN for each VF stops every frame between VFs, also with a foreign source or a tag of its own, and (observed)
//!   for a trusted and promiscuous receiver. The PF gets what is for its MAC or for everybody, with the VF's tag: the tag is the VF's identity,
//!   and nothing that the VF can send changes it. So a dataplane on the PF, whose MAC every pod has for its router, gets the pods' traffic.
//! * It does not stop the wire: a frame for a station that is not on the card leaves under the tag, and one from the wire with the tag
//!   reaches the VF. The PF, promiscuous or not, does not see them. Whoever names [`Options::vlans`](crate::Options::vlans)
//!   vouches that the switch at the port drops these VLANs.
//! * Observed: spoof check alone stops nothing here, and `igb` refuses `hwmode vepa` (`EOPNOTSUPP`). So [`Isolation::AntiLoopback`] was seen
//!   on no real card; a test has it on a fake one.
//! * With the PF switched off nothing passes at all.

use dpumesh_core::{ErrorKind, PfIndex, PortRef, Result, VfAttributes, VlanId};
use dpumesh_hw::netlink::{BridgeMode, EswitchMode, LinkIndex};
use serde::{Deserialize, Serialize};

use crate::Card;
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

/// How frames of a leased VF are found on the trunk that its physical function is.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TrunkPort {
    /// The VF.
    pub port: PortRef,
    /// The tag that its frames have there, and that a frame for it must have. Nothing that the VF sends changes it.
    pub vlan: VlanId,
    /// The physical function's device in the host's namespace.
    pub link: LinkIndex,
    /// That device's name now, for display only.
    pub name: String,
}

impl Card {
    /// The leased VFs of a card with [`Isolation::VlanPerVf`], by ascending port: what representors are in switchdev mode, tags
    /// on the PF are here. None otherwise.
    ///
    /// # Errors
    /// `DeviceLost`, `Io`.
    pub fn trunk(&self) -> Result<Vec<TrunkPort>> {
        let change = self.inner().look("sriov.trunk")?;
        let mut ports = Vec::new();
        for (port, function) in &change.record.functions {
            let (Some(_), Some((pf, _))) = (&function.held, indices(*port)) else {
                continue;
            };
            let Some(vlan) = vlan_of(&change, *port)?.and_then(|id| VlanId::try_from(id).ok()) else {
                continue;
            };
            let link = change.pf_link(pf)?;
            ports.push(TrunkPort {
                port: *port,
                vlan,
                link: link.index,
                name: link.name.clone(),
            });
        }
        Ok(ports)
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
    let vlans = match (
        attributes.contains(VfAttributes::VLAN),
        change.inner.options.vlans,
    ) {
        (true, Some(_)) => return Ok(Isolation::VlanPerVf),
        (true, None) => "a VLAN for each VF would, but `vlans` names none that the switch at its ports drops",
        (false, _) => "the driver sets no VLAN of a VF",
    };
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
                "the eswitch is not in switchdev mode; {vlans}; and its switch cannot be told to send everything out on the wire \
                 ({refusal}): frames from VF to VF would never be seen"
            ),
        },
    })
}

/// Refuses a lease, or the SoC's half of one, on a card where a protected pod could be bypassed.
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
pub(crate) fn vlan_of(change: &Change<'_>, port: PortRef) -> Result<Option<u16>> {
    if !owns_vlans(change) {
        return Ok(None);
    }
    let Some((first, last)) = change.inner.options.vlans else {
        return Ok(None);
    };
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use dpumesh_core::vf::VfRequest;
    use dpumesh_core::{Backend, BackendExt};

    use super::*;
    use crate::fake::{FakeMachine, Model};
    use crate::{Options, Parts};

    async fn lease_on(model: Model) -> (Isolation, Option<ErrorKind>, Vec<String>) {
        let machine = FakeMachine::new(model).expect("a machine");
        let options = Options::new(machine.device(), "dpu0", machine.directory());
        let card = Card::open_on(options, Arc::new(machine.clone()), Parts::default()).expect("opened");
        let calls = machine.take_calls();
        let vf = card.require_vf().expect("VFs");
        vf.set_vf_count(card.fence(), PfIndex(0), 1).await.expect("made");
        let leased = vf.lease(card.fence(), &VfRequest::new("pod")).await;
        assert!(
            card.ports().is_none() && card.steering().is_none(),
            "the host sees no frame"
        );
        (card.isolation(), leased.err().map(|failed| failed.kind), calls)
    }

    #[tokio::test]
    async fn without_vlans_a_card_that_knows_vepa_is_told_so_on_each_port() {
        let (isolation, refused, calls) = lease_on(Model::mlx5()).await;
        assert_eq!((&isolation, refused), (&Isolation::AntiLoopback, None));
        assert!(isolation.holds() && !isolation.intercepts());
        let told = calls.iter().filter(|call| call.contains("Vepa")).count();
        assert_eq!(told, 2, "{calls:?}");
    }

    #[tokio::test]
    async fn without_vlans_and_vepa_nothing_is_leased() {
        for model in [Model::igb(), Model::bare()] {
            let (isolation, refused, _) = lease_on(model).await;
            assert!(!isolation.holds());
            assert_eq!(refused, Some(ErrorKind::Denied));
        }
    }
}
