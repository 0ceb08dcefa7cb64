//! Leases: the host's half and the SoC's.
//!
//! A lease is recorded, with a snapshot of all that the VF has, before the attributes that came with the request are set. A
//! process that died in between left `configured: false`: the owner's next call sets them.

use dpumesh_core::vf::{VfLease, VfRequest, VfSelector};
use dpumesh_core::{ErrorKind, Fence, PortRef, Result};

use super::SriovVf;
use super::locate::Whereabouts;
use crate::card::{Change, indices};
use crate::discover::VirtualFunction;
use crate::isolation;
use crate::kernel::Spot;
use crate::record::{Held, Place};

const LEASE: &str = "vf.lease";

impl SriovVf {
    pub(super) fn make_lease(&self, fence: Fence, request: &VfRequest) -> Result<VfLease> {
        self.host(LEASE)?;
        let mut change = self.card.fenced(LEASE, fence)?;
        if request.owner.0.is_empty() {
            return Err(change
                .refuse(ErrorKind::Invalid, "must not be empty")
                .field("owner"));
        }
        if let Some(port) = change.port_of_owner(&request.owner) {
            return self.lease_again(&mut change, port, request);
        }
        isolation::admit(&change)?;
        let (port, function) = find_free(&change, &request.selector)?;
        self.check_config(&change, port, &request.config)?;
        let vlan = isolation::vlan_of(&change, port)?;
        let snapshot = self.snapshot(&change, port, &function)?;
        let id = change.record.take_lease_number();
        let (dpu, epoch) = (change.record.dpu.clone(), change.record.epoch);
        let lease = VfLease::new(id, dpu, port, request.owner.clone(), epoch);
        let untouched = request.config == Default::default() && vlan.is_none();
        let held = Held {
            lease: lease.clone(),
            pci: function.pci,
            snapshot: snapshot.clone(),
            config: request.config.clone(),
            configured: untouched,
            place: Place::Host,
            going: None,
        };
        change.record.functions.entry(port).or_default().held = Some(held);
        change.commit()?;
        if untouched {
            return Ok(lease);
        }
        if let Err(failed) = self.apply(&change, port, &function, &request.config, vlan) {
            return Err(self.undo_lease(&mut change, port, failed));
        }
        mark_configured(&mut change, port)?;
        Ok(lease)
    }

    /// The attributes are as before (the failed call saw to that): the lease goes.
    fn undo_lease(
        &self,
        change: &mut Change<'_>,
        port: PortRef,
        failed: dpumesh_core::Error,
    ) -> dpumesh_core::Error {
        if failed.effect != dpumesh_core::Effect::None {
            return failed; // the lease stays, so that its release restores what is not
        }
        if let Some(function) = change.record.functions.get_mut(&port) {
            function.held = None;
        }
        match change.commit() {
            Ok(()) => failed,
            Err(_) => failed.effect(dpumesh_core::Effect::Partial),
        }
    }

    /// The owner asks for what it has; a process that died before the attributes were set left that to be done.
    fn lease_again(&self, change: &mut Change<'_>, port: PortRef, request: &VfRequest) -> Result<VfLease> {
        let held = change.record.held(port).cloned();
        let Some(held) = held else {
            return Err(change.refuse(ErrorKind::Fault, "the lease vanished under the card's lock"));
        };
        if !held.configured {
            let function = change.function(port)?;
            self.check_config(change, port, &held.config)?;
            let vlan = isolation::vlan_of(change, port)?;
            self.apply(change, port, &function, &held.config, vlan)?;
            mark_configured(change, port)?;
        }
        let _ = request;
        Ok(held.lease)
    }

    pub(super) fn take(&self, fence: Fence, lease: &VfLease) -> Result<()> {
        const ADMIT: &str = "vf.admit";
        self.soc(ADMIT)?;
        let mut change = self.card.fenced(ADMIT, fence)?;
        if lease.dpu != change.record.dpu {
            let message = format!("the lease is of {}, this is {}", lease.dpu, change.record.dpu);
            return Err(change.refuse(ErrorKind::Invalid, message).field("lease.dpu"));
        }
        if lease.epoch != change.record.epoch {
            let message = format!("the lease is of life {}", lease.epoch.0);
            return Err(change.refuse(ErrorKind::Stale, message).field("lease.epoch"));
        }
        change.function(lease.port)?;
        isolation::admit(&change)?;
        let function = change.record.functions.entry(lease.port).or_default();
        match &function.admitted {
            Some(held) if held == lease => Ok(()),
            Some(other) => {
                let message = format!("lease {} of this port was not revoked", other.id.0);
                Err(change.refuse(ErrorKind::Conflict, message).object(lease.port))
            }
            None => {
                function.admitted = Some(lease.clone());
                change.commit()
            }
        }
    }

    pub(super) fn give_back(&self, fence: Fence, lease: &VfLease) -> Result<()> {
        const REVOKE: &str = "vf.revoke";
        self.soc(REVOKE)?;
        let mut change = self.card.fenced(REVOKE, fence)?;
        let function = change.record.functions.get_mut(&lease.port);
        let Some(function) = function.filter(|function| function.admitted.as_ref() == Some(lease)) else {
            return Ok(());
        };
        function.admitted = None;
        change.commit()
    }
}

impl Change<'_> {
    /// A VF that must be on the bus.
    pub(crate) fn function(&self, port: PortRef) -> Result<VirtualFunction> {
        self.vf(port).ok_or_else(|| {
            self.refuse(ErrorKind::NotFound, "there is no such VF")
                .object(port)
        })
    }
}

fn mark_configured(change: &mut Change<'_>, port: PortRef) -> Result<()> {
    if let Some(held) = change.record.held_mut(port) {
        held.configured = true;
    }
    change.commit()
}

/// The lowest free VF that fits and is where a free one belongs: at the host, with its network device.
fn find_free(change: &Change<'_>, selector: &VfSelector) -> Result<(PortRef, VirtualFunction)> {
    let all = change.vfs();
    let any = !all.is_empty();
    let fitting: Vec<_> = all
        .into_iter()
        .filter(|(port, function)| fits(selector, *port, function))
        .collect();
    if fitting.is_empty() && any {
        let message = "no VF of the card fits the selector";
        return Err(change.refuse(ErrorKind::NotFound, message).field("selector"));
    }
    let count = fitting.len();
    for (port, function) in fitting {
        if change.record.held(port).is_some() {
            continue;
        }
        let found = change.locate(port, &function)?;
        if matches!(found, Whereabouts::Netdev { spot: Spot::Host, .. }) {
            return Ok((port, function));
        }
    }
    let message = format!("vf is full: none of {count} is free and at the host");
    Err(change.refuse(ErrorKind::CapacityExceeded, message).object("vf"))
}

fn fits(selector: &VfSelector, port: PortRef, function: &VirtualFunction) -> bool {
    let driver = selector.driver.as_deref();
    selector.port.is_none_or(|wanted| wanted == port)
        && selector
            .pf
            .is_none_or(|pf| indices(port).is_some_and(|(of, _)| of == pf))
        && selector.pci.is_none_or(|pci| pci == function.pci)
        && selector
            .numa_node
            .is_none_or(|node| Some(node) == function.numa_node)
        && driver.is_none_or(|driver| function.driver.as_deref() == Some(driver))
}
