//! Giving a VF back by its lease, and getting back one that was not given.
//!
//! Teardown tries every step: home, function reset, attributes by difference. Only if all worked the VF is free.

use dpumesh_core::vf::{LeaseOwner, Released, ResetLevel, TeardownErrors, VfLease};
use dpumesh_core::{Effect, ErrorKind, Fence, PortRef, ResetLevels, Result};

use super::SriovVf;
use super::locate::Whereabouts;
use super::travel::{bind, unbind};
use crate::card::Change;
use crate::discover::{self, VirtualFunction};
use crate::kernel::Spot;

impl SriovVf {
    pub(super) fn end_lease(&self, fence: Fence, lease: &VfLease, level: ResetLevel) -> Result<Released> {
        const RELEASE: &str = "vf.release";
        self.host(RELEASE)?;
        let mut change = self.card.fenced(RELEASE, fence)?;
        check_level(&change, level)?;
        let Ok(port) = change.leased(lease) else {
            return Ok(Released::NotCurrent);
        };
        self.tear_down(&mut change, port, level)?;
        Ok(Released::Freed)
    }

    pub(super) fn get_back(
        &self,
        fence: Fence,
        port: PortRef,
        live: &[LeaseOwner],
        level: ResetLevel,
    ) -> Result<ResetLevel> {
        const RECLAIM: &str = "vf.reclaim";
        self.host(RECLAIM)?;
        let mut change = self.card.fenced(RECLAIM, fence)?;
        check_level(&change, level)?;
        let held = change.record.held(port);
        if change.vf(port).is_none() && held.is_none() {
            return Err(change
                .refuse(ErrorKind::NotFound, "there is no such VF")
                .object(port));
        }
        if held.is_some_and(|held| live.contains(&held.lease.owner)) {
            let message = "it is leased and its owner lives";
            return Err(change.refuse(ErrorKind::Busy, message).object(port));
        }
        let Err(failed) = self.tear_down(&mut change, port, ResetLevel::Config) else {
            return Ok(ResetLevel::Config);
        };
        if level == ResetLevel::Config {
            return Err(failed);
        }
        self.tear_down(&mut change, port, ResetLevel::Function)?;
        Ok(ResetLevel::Function)
    }

    /// Brings a VF home, resets it, restores its attributes and ends its lease.
    fn tear_down(&self, change: &mut Change<'_>, port: PortRef, level: ResetLevel) -> Result<()> {
        let mut failed = TeardownErrors::default();
        if let Some(function) = change.vf(port) {
            self.return_vf(change, port, &function, level, &mut failed);
        }
        if failed.0.is_empty() {
            if let Some(function) = change.record.functions.get_mut(&port) {
                function.held = None;
            }
            failed.0.extend(change.commit().err());
        }
        if failed.0.is_empty() {
            return Ok(());
        }
        let message = format!("the VF is not free, since not every step worked: {failed}");
        Err(change
            .refuse(ErrorKind::Io, message)
            .object(port)
            .effect(Effect::Partial)
            .source(failed))
    }

    fn return_vf(
        &self,
        change: &mut Change<'_>,
        port: PortRef,
        function: &VirtualFunction,
        level: ResetLevel,
        failed: &mut TeardownErrors,
    ) {
        let held = change.record.held(port).cloned();
        let driver = held.as_ref().and_then(|held| held.snapshot.driver.clone());
        if level == ResetLevel::Function {
            // Reset first where it is: a function in a broken state may refuse to move.
            failed
                .0
                .extend(self.reset(change, function, driver.as_deref()).err());
        }
        failed.0.extend(self.bring_home(change, port, function).err());
        if let Some(held) = held {
            let function = change.vf(port).unwrap_or_else(|| function.clone());
            failed
                .0
                .extend(self.restore(change, port, &function, &held.snapshot));
        }
        failed.0.extend(change.refresh().err());
        let home = change.vf(port).map(|function| change.locate(port, &function));
        if !matches!(home, Some(Ok(Whereabouts::Netdev { spot: Spot::Host, .. }))) && failed.0.is_empty() {
            failed.0.push(super::travel::missing(change, port));
        }
    }

    /// Function-level reset (PCI FLR): queues, link state and filters of the last owner are gone. The driver is away for
    /// that time, since not every driver survives a reset under it.
    fn reset(&self, change: &mut Change<'_>, function: &VirtualFunction, driver: Option<&str>) -> Result<()> {
        let done = (|| {
            if function.driver.is_some() {
                unbind(change, function)?;
            }
            let reset = discover::directory(function.pci).join("reset");
            let reset = change.kernel().write(&reset, "1");
            // The driver comes back whether or not the reset worked.
            bind(change, function, driver.or(function.driver.as_deref())).and(reset)
        })();
        done.map_err(|failed| change.failed(failed))?;
        change.refresh()
    }
}

fn check_level(change: &Change<'_>, level: ResetLevel) -> Result<()> {
    let needed = match level {
        ResetLevel::Config => ResetLevels::CONFIG,
        ResetLevel::Function => ResetLevels::FUNCTION,
        ResetLevel::Device => ResetLevels::DEVICE,
    };
    if change.record.abilities.resets.contains(needed) {
        return Ok(());
    }
    let message = match level {
        ResetLevel::Device => "a reset of the whole card disturbs every VF: that is the operator's to do",
        _ => "the kernel knows no reset of this card's VFs",
    };
    Err(change.refuse(ErrorKind::Unsupported, message).field("level"))
}
