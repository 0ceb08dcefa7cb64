//! [`VfAllocator`] of the emulated card: leases, attributes and the way of a VF into a pod and back.
//!
//! Each call is one transaction on the card ([`crate::card`]), run where it may block. What it is about to do is
//! decided and written down before a device is touched, so that a call that fails has changed nothing, and a process
//! that dies leaves a record from which the next one goes on.

mod attributes;
#[cfg(test)]
mod crash;
mod lease;
mod travel;

use std::sync::Arc;

use async_trait::async_trait;
use dpumesh_core::vf::{
    AttachedVf, Attachment, Disruption, LeaseOwner, Released, ResetLevel, VfConfig, VfCount, VfLease,
    VfLocation, VfRequest, VfState,
};
use dpumesh_core::{Effect, ErrorKind, Fence, MacAddr, PfIndex, PortRef, Result, Role, VfAllocator};

use crate::card::{Attributes, Card, Change, Function, error};
use crate::yard::Found;

/// VFs of an emulated card, from one side.
#[derive(Clone, Debug)]
pub(crate) struct TapVf {
    card: Arc<Card>,
    max_vfs: u16,
}

impl TapVf {
    pub(crate) fn new(card: Arc<Card>, max_vfs: u16) -> Self {
        Self { card, max_vfs }
    }

    /// Runs a transaction where it may block. Cancelled, it still runs to its end.
    async fn blocking<T: Send + 'static>(
        &self,
        operation: &'static str,
        work: impl FnOnce(&Self) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let vf = self.clone();
        let done = tokio::task::spawn_blocking(move || work(&vf)).await;
        done.unwrap_or_else(|failed| {
            Err(error(ErrorKind::Fault, operation, "the call broke off")
                .effect(Effect::Unknown)
                .source(failed))
        })
    }

    fn host(&self, operation: &'static str) -> Result<()> {
        self.side(operation, self.card.options.role.is_host(), "the host's")
    }

    fn soc(&self, operation: &'static str) -> Result<()> {
        self.side(operation, self.card.options.role.is_soc(), "the SoC's")
    }

    fn side(&self, operation: &'static str, is_ours: bool, whose: &str) -> Result<()> {
        if is_ours {
            return Ok(());
        }
        Err(error(
            ErrorKind::Unsupported,
            operation,
            format!("this is {whose} part, and this side is the other"),
        ))
    }
}

impl TapVf {
    fn check_count(&self, operation: &'static str, pf: PfIndex, count: u16) -> Result<()> {
        if pf != PfIndex(0) {
            return Err(error(
                ErrorKind::NotFound,
                operation,
                "the card has one physical function",
            )
            .field("pf"));
        }
        if count > self.max_vfs {
            let message = format!("{count} VFs are more than the {} that the card has", self.max_vfs);
            return Err(error(ErrorKind::CapacityExceeded, operation, message).object("vf"));
        }
        Ok(())
    }

    fn plan(&self, pf: PfIndex, count: u16) -> Result<Disruption> {
        const PLAN: &str = "vf.plan_vf_count";
        self.host(PLAN)?;
        let look = self.card.look(PLAN)?;
        self.check_count(PLAN, pf, count)?;
        let leased = look
            .state
            .functions
            .range(count..)
            .any(|(_, function)| function.held.is_some());
        Ok(if leased {
            Disruption::Drain
        } else {
            Disruption::None
        })
    }

    pub(crate) fn set_count(&self, fence: Fence, pf: PfIndex, count: u16) -> Result<VfCount> {
        const SET: &str = "vf.set_vf_count";
        self.host(SET)?;
        let mut change = self.card.fenced(SET, fence)?;
        self.check_count(SET, pf, count)?;
        if let Some((index, _)) = change
            .state
            .functions
            .range(count..)
            .find(|(_, vf)| vf.held.is_some())
        {
            return Err(
                error(ErrorKind::Busy, SET, "a VF that would go is leased").object(PortRef::vf(*index))
            );
        }
        for index in change
            .state
            .functions
            .range(count..)
            .map(|(index, _)| *index)
            .rev()
            .collect::<Vec<_>>()
        {
            change.delete(SET, index)?;
            change.state.functions.remove(&index);
        }
        for index in 0..count {
            if !change.state.functions.contains_key(&index) {
                let serial = change.state.take_serial();
                let attributes = self.card.factory_attributes(index);
                change
                    .state
                    .functions
                    .insert(index, Function::at_home(serial, attributes));
            }
        }
        change.commit()?;
        // Those that were there may lack their device, if a process died when it was about to make them.
        for index in 0..count {
            let function = recorded(&change, index);
            let mut yard = change.yard()?;
            if yard.find(index, &function)?.is_none() && function.held.is_none() {
                yard.make(index, &function)
                    .map_err(|error| error.effect(Effect::Partial))?;
            }
        }
        Ok(VfCount {
            actual: count,
            needs: Disruption::None,
        })
    }
}

impl TapVf {
    fn observe(&self) -> Result<Vec<VfState>> {
        let look = self.card.look("vf.list")?;
        let mut yard = look.yard()?;
        let role = self.card.options.role;
        let functions = look.state.functions.iter();
        functions
            .map(|(index, function)| {
                Ok(state_of(
                    *index,
                    function,
                    yard.find(*index, function)?.as_ref(),
                    role,
                ))
            })
            .collect()
    }
}

fn state_of(index: u16, function: &Function, found: Option<&Found>, role: Role) -> VfState {
    let attributes = observed(function, found);
    let mut state = VfState::new(PortRef::vf(index), attributes.mac, attributes.mtu);
    state.admin_mac = attributes.admin_mac.unwrap_or_default();
    state.location = found.map_or(VfLocation::Missing, |found| found.place.location());
    state.lease = match role {
        Role::Soc => function.admitted.clone(),
        Role::Host | Role::Both => function.held.as_ref().map(|held| held.lease.clone()),
    };
    state
}

/// What the device has; what it ought to have, where there is none.
fn observed(function: &Function, found: Option<&Found>) -> Attributes {
    let mut attributes = function.attributes.clone();
    if let Some(found) = found {
        attributes.mac = found.link.mac.map_or(attributes.mac, MacAddr);
        let mtu = u16::try_from(found.link.mtu)
            .ok()
            .and_then(|mtu| mtu.try_into().ok());
        attributes.mtu = mtu.unwrap_or(attributes.mtu);
    }
    attributes
}

/// A function that the caller has seen in the state.
fn recorded(change: &Change<'_>, index: u16) -> Function {
    // Every caller took the index from the state's own map, under the lock that still holds.
    change
        .state
        .functions
        .get(&index)
        .cloned()
        .unwrap_or_else(|| Function::at_home(0, change.card.factory_attributes(index)))
}

#[async_trait]
impl VfAllocator for TapVf {
    async fn plan_vf_count(&self, pf: PfIndex, count: u16) -> Result<Disruption> {
        self.blocking("vf.plan_vf_count", move |vf| vf.plan(pf, count))
            .await
    }

    async fn set_vf_count(&self, fence: Fence, pf: PfIndex, count: u16) -> Result<VfCount> {
        self.blocking("vf.set_vf_count", move |vf| vf.set_count(fence, pf, count))
            .await
    }

    async fn list(&self) -> Result<Vec<VfState>> {
        self.blocking("vf.list", Self::observe).await
    }

    async fn lease(&self, fence: Fence, request: &VfRequest) -> Result<VfLease> {
        let request = request.clone();
        self.blocking("vf.lease", move |vf| vf.make_lease(fence, &request))
            .await
    }

    async fn admit(&self, fence: Fence, lease: &VfLease) -> Result<()> {
        let lease = lease.clone();
        self.blocking("vf.admit", move |vf| vf.take(fence, &lease)).await
    }

    async fn revoke(&self, fence: Fence, lease: &VfLease) -> Result<()> {
        let lease = lease.clone();
        self.blocking("vf.revoke", move |vf| vf.give_back(fence, &lease))
            .await
    }

    async fn configure(&self, fence: Fence, lease: &VfLease, config: &VfConfig) -> Result<()> {
        let (lease, config) = (lease.clone(), config.clone());
        self.blocking("vf.configure", move |vf| {
            vf.set_attributes(fence, &lease, &config)
        })
        .await
    }

    async fn attach(&self, fence: Fence, lease: &VfLease, attachment: &Attachment) -> Result<AttachedVf> {
        let (lease, attachment) = (lease.clone(), attachment.clone());
        self.blocking("vf.attach", move |vf| vf.put(fence, &lease, &attachment))
            .await
    }

    async fn detach(&self, fence: Fence, lease: &VfLease) -> Result<()> {
        let lease = lease.clone();
        self.blocking("vf.detach", move |vf| vf.fetch(fence, &lease))
            .await
    }

    async fn release(&self, fence: Fence, lease: &VfLease, level: ResetLevel) -> Result<Released> {
        let lease = lease.clone();
        self.blocking("vf.release", move |vf| vf.end_lease(fence, &lease, level))
            .await
    }

    async fn reclaim(
        &self,
        fence: Fence,
        port: PortRef,
        live: &[LeaseOwner],
        level: ResetLevel,
    ) -> Result<ResetLevel> {
        let live = live.to_vec();
        self.blocking("vf.reclaim", move |vf| vf.get_back(fence, port, &live, level))
            .await
    }
}
