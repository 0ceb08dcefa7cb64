//! How many VFs there are: `sriov_numvfs`, which goes through zero, and what that disturbs.

use std::thread;
use std::time::{Duration, Instant};

use dpumesh_core::vf::{Disruption, VfCount};
use dpumesh_core::{Effect, ErrorKind, Fence, PfIndex, Result};

use super::SriovVf;
use crate::card::{Change, indices};
use crate::discover::{self, Pf};

/// Drivers give their VFs network devices within this time, or the count is what came up.
const ENUMERATION: Duration = Duration::from_secs(20);
const PAUSE: Duration = Duration::from_millis(5);

impl SriovVf {
    pub(super) fn plan(&self, pf: PfIndex, count: u16) -> Result<Disruption> {
        const PLAN: &str = "vf.plan_vf_count";
        self.host(PLAN)?;
        let change = self.card.look(PLAN)?;
        let function = change.pf(pf)?;
        check_count(&change, &function, count)?;
        Ok(if count != function.num_vfs && is_leased(&change, pf) {
            Disruption::Drain
        } else {
            Disruption::None
        })
    }

    pub(crate) fn set_count(&self, fence: Fence, pf: PfIndex, count: u16) -> Result<VfCount> {
        const SET: &str = "vf.set_vf_count";
        self.host(SET)?;
        let mut change = self.card.fenced(SET, fence)?;
        let function = change.pf(pf)?;
        check_count(&change, &function, count)?;
        if count == function.num_vfs {
            return Ok(done(count, count));
        }
        if is_leased(&change, pf) {
            let message = "a VF is leased, and the kernel changes the number only through zero";
            return Err(change.refuse(ErrorKind::Busy, message).field("pf"));
        }
        let written = write(&mut change, &function, count);
        // What was made is told, whether it is all that was asked for or not.
        change.commit()?;
        written?;
        let actual = discover::vfs(change.kernel().sysfs(), function.pci).len();
        let actual = u16::try_from(actual).unwrap_or(u16::MAX);
        Ok(done(actual, count))
    }
}

/// Fewer than asked for: the firmware has its own limit, which takes a reboot to change.
fn done(actual: u16, asked: u16) -> VfCount {
    let needs = if actual < asked {
        Disruption::Reboot
    } else {
        Disruption::None
    };
    VfCount { actual, needs }
}

fn check_count(change: &Change<'_>, pf: &Pf, count: u16) -> Result<()> {
    if count <= pf.total_vfs {
        return Ok(());
    }
    let message = format!("{count} VFs are more than the {} that the card has", pf.total_vfs);
    Err(change.refuse(ErrorKind::CapacityExceeded, message).object("vf"))
}

fn is_leased(change: &Change<'_>, pf: PfIndex) -> bool {
    let mut functions = change.record.functions.iter();
    functions
        .any(|(port, function)| indices(*port).is_some_and(|(of, _)| of == pf) && function.held.is_some())
}

/// Changes the number through zero, and waits until the VFs are enumerated and those with a driver have their network
/// devices. The record is changed, and not committed.
pub(crate) fn write(change: &mut Change<'_>, pf: &Pf, count: u16) -> Result<()> {
    let attribute = discover::directory(pf.pci).join("sriov_numvfs");
    let mut effect = Effect::None;
    for number in [0, count] {
        let now = discover::pf(change.kernel().sysfs(), pf.pci).map(|pf| pf.num_vfs);
        if now == Some(number) {
            continue;
        }
        let written = change.kernel().write(&attribute, &number.to_string());
        written.map_err(|failed| change.failed(failed).effect(effect).object(pf.pci))?;
        effect = Effect::Partial;
        let index = change.inner.pfs.iter().position(|pci| *pci == pf.pci);
        let index = PfIndex(index.unwrap_or_default() as u16);
        *change.record.makings.entry(index).or_default() += 1;
    }
    await_netdevs(change, pf)
}

fn await_netdevs(change: &mut Change<'_>, pf: &Pf) -> Result<()> {
    let until = Instant::now() + ENUMERATION;
    loop {
        change.refresh()?;
        let vfs = discover::vfs(change.kernel().sysfs(), pf.pci);
        let enumerated = discover::pf(change.kernel().sysfs(), pf.pci).map(|pf| pf.num_vfs);
        let late = vfs
            .iter()
            .filter(|vf| {
                vf.driver
                    .as_deref()
                    .is_some_and(|driver| driver != crate::abilities::VFIO)
            })
            .find(|vf| discover::netdev_of(change.links(), vf.pci).is_none());
        match late {
            None if enumerated == Some(vfs.len() as u16) => return Ok(()),
            _ if Instant::now() < until => thread::sleep(PAUSE),
            Some(vf) => {
                let message = format!(
                    "{} has a driver but no network device after {ENUMERATION:?}",
                    vf.pci
                );
                return Err(change.refuse(ErrorKind::Timeout, message).effect(Effect::Unknown));
            }
            None => return Ok(()),
        }
    }
}
