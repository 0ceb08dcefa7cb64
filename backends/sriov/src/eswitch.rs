//! Mode of the eswitch, and the representors that switchdev mode brings.
//!
//! Drivers change the mode only while no VF is in use, and some only while there is none: the VFs go first and come again
//! afterwards. A card that is still busy with that answers `EINVAL` or `EBUSY`, so it is asked again for a bounded time.

use std::thread;
use std::time::{Duration, Instant};

use dpumesh_core::vf::Disruption;
use dpumesh_core::{ControllerId, Effect, Epoch, ErrorKind, Fence, PfIndex, PortRef, Result, VfIndex};
use dpumesh_hw::netlink::{EswitchMode, LinkIndex, PortFlavour};

use crate::Card;
use crate::card::{Change, port};
use crate::discover::{self, Pf};
use crate::vf::count;

const PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(50);

/// The network device that stands for a port of the eswitch.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Representor {
    /// Which port.
    pub port: PortRef,
    /// Its device in the host's namespace.
    pub link: LinkIndex,
    /// The device's name now, for display only.
    pub name: String,
}

impl Card {
    /// Tells what changing the mode would disturb, without doing it.
    ///
    /// # Errors
    /// `Unsupported` without an eswitch that devlink knows, `DeviceLost`, `Io`.
    pub fn plan_eswitch_mode(&self, mode: EswitchMode) -> Result<Disruption> {
        let change = self.inner().look("sriov.plan_eswitch_mode")?;
        if modes(&change)?.iter().all(|(_, now)| *now == mode) {
            return Ok(Disruption::None);
        }
        Ok(Disruption::Drain)
    }

    /// Changes the mode of the eswitch: VFs go and come, and the card begins a new life, since it can do other things. Blocks,
    /// for seconds. The mode that it has already is no change.
    ///
    /// # Errors
    /// `Busy` while a VF is leased; `Unsupported`; `Stale`, `DeviceLost`; `Timeout`, `Io` with [`Effect::Partial`] when it
    /// could not be put back.
    pub fn set_eswitch_mode(&self, fence: Fence, mode: EswitchMode) -> Result<Epoch> {
        let mut change = self.inner().fenced("sriov.set_eswitch_mode", fence)?;
        let before = modes(&change)?;
        if before.iter().all(|(_, now)| *now == mode) {
            return Ok(change.record.epoch);
        }
        if change
            .record
            .functions
            .values()
            .any(|function| function.held.is_some())
        {
            let message = "a VF is leased, and all of them go for a change of the mode";
            return Err(change.refuse(ErrorKind::Busy, message));
        }
        for (pf, now) in &before {
            if let Err(failed) = switch(&mut change, pf, mode) {
                let done = before.iter().take_while(|(other, _)| other.pci != pf.pci);
                let mut undone = Ok(());
                for (pf, now) in done.chain([&(pf.clone(), *now)]) {
                    let back = switch(&mut change, pf, *now);
                    undone = undone.and(back);
                }
                let renewed = change.renew_life();
                return Err(match undone.and(renewed) {
                    Ok(()) => failed,
                    Err(_) => failed.effect(Effect::Partial),
                });
            }
        }
        change.renew_life()?;
        Ok(change.record.epoch)
    }

    /// The representors and uplinks that are there now, by ascending port; none outside of switchdev mode.
    ///
    /// Each is found by what devlink says of the card's ports, or by switch and port name where devlink says nothing, and checked
    /// against the device that has that number now.
    ///
    /// # Errors
    /// `DeviceLost`, `Io`.
    pub fn representors(&self) -> Result<Vec<Representor>> {
        representors(&self.inner().look("sriov.representors")?)
    }
}

/// What [`Card::representors`] tells, within a transaction.
pub(crate) fn representors(change: &Change<'_>) -> Result<Vec<Representor>> {
    let mut found = Vec::new();
    for (index, pci) in (0..).zip(&change.inner.pfs) {
        let mode = change
            .kernel()
            .eswitch_mode(*pci)
            .map_err(|failed| change.failed(failed))?;
        if mode == Some(EswitchMode::Switchdev) {
            let ports = change
                .kernel()
                .ports(*pci)
                .map_err(|failed| change.failed(failed))?;
            collect(change, index, *pci, &ports, &mut found);
        }
    }
    found.sort_by_key(|representor: &Representor| representor.port);
    found.dedup_by_key(|representor| representor.port);
    Ok(found)
}

fn collect(
    change: &Change<'_>,
    pf: u16,
    pci: dpumesh_core::PciAddress,
    ports: &[dpumesh_hw::netlink::DevlinkPort],
    found: &mut Vec<Representor>,
) {
    let own = |link: &&dpumesh_hw::netlink::Link| link.parent.as_deref() == Some(&pci.to_string());
    for told in ports {
        let Some(link) = change
            .links()
            .iter()
            .filter(own)
            .find(|link| Some(link.index) == told.link)
        else {
            continue;
        };
        let named = match (told.flavour, discover::representee(link)) {
            // devlink and the device must agree: the number may be another device's by now.
            (PortFlavour::Vf { vf, .. }, Some((_, named))) if vf != named => continue,
            (PortFlavour::Vf { vf, .. }, _) if told.controller == 0 => port(pf, vf),
            (PortFlavour::Vf { pf, vf }, _) => PortRef::Vf {
                controller: ControllerId(u16::try_from(told.controller).unwrap_or(u16::MAX)),
                pf: PfIndex(pf),
                vf: VfIndex(vf),
            },
            (PortFlavour::Pf(of), _) => PortRef::Pf {
                controller: ControllerId(u16::try_from(told.controller).unwrap_or(u16::MAX)),
                pf: PfIndex(of),
            },
            (PortFlavour::Physical(_), None) => PortRef::Uplink(pf),
            _ => continue,
        };
        found.push(Representor {
            port: named,
            link: link.index,
            name: link.name.clone(),
        });
    }
    for link in change
        .links()
        .iter()
        .filter(own)
        .filter(|link| link.switch_id.is_some())
    {
        let port = discover::representee(link).map_or(PortRef::Uplink(pf), |(_, vf)| port(pf, vf));
        if !found.iter().any(|known| known.port == port) {
            found.push(Representor {
                port,
                link: link.index,
                name: link.name.clone(),
            });
        }
    }
}

fn modes(change: &Change<'_>) -> Result<Vec<(Pf, EswitchMode)>> {
    let pfs: Vec<Pf> = change.pfs().collect();
    pfs.into_iter()
        .map(|pf| {
            let mode = change
                .kernel()
                .eswitch_mode(pf.pci)
                .map_err(|failed| change.failed(failed))?;
            let mode = mode.ok_or_else(|| {
                let message = "devlink knows no eswitch of this card";
                change.refuse(ErrorKind::Unsupported, message).object(pf.pci)
            })?;
            Ok((pf, mode))
        })
        .collect()
}

fn switch(change: &mut Change<'_>, pf: &Pf, mode: EswitchMode) -> Result<()> {
    if change.kernel().eswitch_mode(pf.pci).ok().flatten() != Some(mode) {
        count::write(change, pf, 0)?;
        let until = Instant::now() + PATIENCE;
        loop {
            match change.kernel().set_eswitch_mode(pf.pci, mode) {
                Ok(()) => break,
                Err(failed)
                    if matches!(failed.errno, Some(libc::EBUSY | libc::EINVAL)) && Instant::now() < until =>
                {
                    thread::sleep(PAUSE);
                }
                Err(failed) => return Err(change.failed(failed).object(pf.pci)),
            }
        }
    }
    count::write(change, pf, pf.num_vfs)
}
