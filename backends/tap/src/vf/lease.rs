//! Leases: the host's half and the SoC's.
//!
//! A lease is recorded, with a snapshot of the VF's attributes, before the attributes that came with the request are
//! set. A process that died in between left `configured: false`: the owner's next call sets them.

use dpumesh_core::vf::{VfLease, VfRequest, VfSelector};
use dpumesh_core::{Effect, ErrorKind, Fence, PfIndex, PortRef, Result};

use super::attributes::{apply, is_empty};
use super::{TapVf, observed, recorded};
use crate::card::{Attributes, Change, Function, Held, Place, error, index_of};
use crate::yard::Found;

impl TapVf {
    pub(super) fn make_lease(&self, fence: Fence, request: &VfRequest) -> Result<VfLease> {
        const LEASE: &str = "vf.lease";
        self.host(LEASE)?;
        let mut change = self.card.fenced(LEASE, fence)?;
        if request.owner.0.is_empty() {
            return Err(error(ErrorKind::Invalid, LEASE, "must not be empty").field("owner"));
        }
        let mine = |function: &Function| {
            function
                .held
                .as_ref()
                .is_some_and(|held| held.lease.owner == request.owner)
        };
        let index = change
            .state
            .functions
            .iter()
            .find(|(_, function)| mine(function))
            .map(|(index, _)| *index);
        if let Some(index) = index {
            return self.lease_again(&mut change, index, request);
        }
        let (index, found) = self.find_free(&change, &request.selector)?;
        self.check_config(&change, LEASE, index, &request.config)?;
        let id = change.state.take_lease_number();
        let (dpu, epoch) = (change.state.dpu.clone(), change.state.epoch);
        let lease = VfLease::new(id, dpu, PortRef::vf(index), request.owner.clone(), epoch);
        let mut function = recorded(&change, index);
        let snapshot = observed(&function, Some(&found));
        let configured = is_empty(&request.config);
        function.held = Some(Held {
            lease: lease.clone(),
            snapshot: snapshot.clone(),
            configured,
        });
        apply(&mut function.attributes, &request.config);
        let wanted = function.attributes.clone();
        change.state.functions.insert(index, function);
        change.commit()?;
        if !configured {
            let set = change.yard()?.set(&found, &wanted);
            self.finish_lease(&mut change, index, &found, snapshot, set)?;
        }
        Ok(lease)
    }

    /// The owner asks for what it has; a process that died before the attributes were set left that to be done.
    fn lease_again(&self, change: &mut Change<'_>, index: u16, request: &VfRequest) -> Result<VfLease> {
        let function = recorded(change, index);
        let Some(held) = function.held else {
            return Err(error(
                ErrorKind::Fault,
                "vf.lease",
                "the lease vanished under the card's lock",
            ));
        };
        if !held.configured {
            self.check_config(change, "vf.lease", index, &request.config)?;
            let mut yard = change.yard()?;
            if let Some(found) = yard.find(index, &recorded(change, index))? {
                yard.set(&found, &function.attributes)?;
            }
            mark_configured(change, index);
            change.commit()?;
        }
        Ok(held.lease)
    }

    /// Notes that the attributes are set, or takes the lease back when they could not be.
    fn finish_lease(
        &self,
        change: &mut Change<'_>,
        index: u16,
        found: &Found,
        snapshot: Attributes,
        set: Result<()>,
    ) -> Result<()> {
        let Err(failed) = set else {
            mark_configured(change, index);
            return change.commit();
        };
        let mut yard = change.yard()?;
        let mut function = recorded(change, index);
        let again = yard.find(index, &function)?;
        if yard.set(again.as_ref().unwrap_or(found), &snapshot).is_err() {
            return Err(failed.effect(Effect::Partial));
        }
        function.held = None;
        function.attributes = snapshot;
        change.state.functions.insert(index, function);
        change.commit()?;
        Err(failed)
    }

    /// The lowest free VF that fits. One that nobody leases but that is not at home is stray: reclaimed first.
    fn find_free(&self, change: &Change<'_>, selector: &VfSelector) -> Result<(u16, Found)> {
        let fits = |index: u16| {
            selector.port.is_none_or(|port| index_of(port) == Some(index))
                && selector.pf.is_none_or(|pf| pf == PfIndex(0))
                && selector.pci.is_none()
                && selector.numa_node.is_none()
                && selector
                    .driver
                    .as_deref()
                    .is_none_or(|driver| driver == change.state.kind.driver())
        };
        let fitting: Vec<u16> = change
            .state
            .functions
            .keys()
            .copied()
            .filter(|index| fits(*index))
            .collect();
        if fitting.is_empty() && !change.state.functions.is_empty() {
            let message =
                "no VF of the card fits the selector (an emulated one has no PCI address and no NUMA node)";
            return Err(error(ErrorKind::NotFound, "vf.lease", message).field("selector"));
        }
        let mut yard = change.yard()?;
        for index in &fitting {
            let function = &change.state.functions[index];
            if function.held.is_some() {
                continue;
            }
            if let Some(found) = yard
                .find(*index, function)?
                .filter(|found| found.place == Place::Host)
            {
                return Ok((*index, found));
            }
        }
        let message = format!("vf is full: {0} of {0}", fitting.len());
        Err(error(ErrorKind::CapacityExceeded, "vf.lease", message).object("vf"))
    }

    pub(super) fn leased(
        &self,
        change: &Change<'_>,
        operation: &'static str,
        lease: &VfLease,
    ) -> Result<u16> {
        let current = |function: &&Function| function.held.as_ref().is_some_and(|held| held.lease == *lease);
        let index =
            index_of(lease.port).filter(|_| change.state.function(lease.port).filter(current).is_some());
        index.ok_or_else(|| {
            let message = format!("lease {} is not current", lease.id.0);
            error(ErrorKind::Stale, operation, message).object(lease.port)
        })
    }
}

fn mark_configured(change: &mut Change<'_>, index: u16) {
    if let Some(held) = change
        .state
        .functions
        .get_mut(&index)
        .and_then(|function| function.held.as_mut())
    {
        held.configured = true;
    }
}

impl TapVf {
    pub(super) fn take(&self, fence: Fence, lease: &VfLease) -> Result<()> {
        const ADMIT: &str = "vf.admit";
        self.soc(ADMIT)?;
        let mut change = self.card.fenced(ADMIT, fence)?;
        if lease.dpu != change.state.dpu {
            let message = format!("the lease is of {}, this is {}", lease.dpu, change.state.dpu);
            return Err(error(ErrorKind::Invalid, ADMIT, message).field("lease.dpu"));
        }
        if lease.epoch != change.state.epoch {
            let message = format!("the lease is of life {}", lease.epoch.0);
            return Err(error(ErrorKind::Stale, ADMIT, message).field("lease.epoch"));
        }
        let function = index_of(lease.port).and_then(|index| change.state.functions.get_mut(&index));
        let Some(function) = function else {
            return Err(error(ErrorKind::NotFound, ADMIT, "there is no such VF").object(lease.port));
        };
        match &function.admitted {
            Some(held) if held == lease => Ok(()),
            Some(other) => {
                let message = format!("lease {} of this port was not revoked", other.id.0);
                Err(error(ErrorKind::Conflict, ADMIT, message).object(lease.port))
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
        let function = index_of(lease.port).and_then(|index| change.state.functions.get_mut(&index));
        let Some(function) = function.filter(|function| function.admitted.as_ref() == Some(lease)) else {
            return Ok(());
        };
        function.admitted = None;
        change.commit()
    }
}
