//! [`VfAllocator`] of an SR-IOV card: leases, attributes and the way of a VF into a pod and back.
//!
//! | file | story |
//! |---|---|
//! | `count` | how many VFs there are |
//! | `lease` | who gets which; the SoC's half of a lease |
//! | `attributes` | what a VF has, set as one transaction, restored by difference |
//! | `locate` | where a VF is now |
//! | `travel` | into a namespace or to VFIO, and home |
//! | `release` | giving back, and getting back what was not given |
//!
//! Each call is one transaction on the card ([`crate::card`]), run where it may block. What it is about to do is written
//! down before anything is touched.

mod attributes;
pub(crate) mod count;
#[cfg(test)]
mod crash;
mod lease;
mod locate;
#[cfg(test)]
mod pains;
mod release;
mod travel;

use std::sync::Arc;

use async_trait::async_trait;
use dpumesh_core::vf::{
    AttachedVf, Attachment, Disruption, LeaseOwner, Released, ResetLevel, VfConfig, VfCount, VfLease,
    VfLocation, VfRequest, VfState,
};
use dpumesh_core::{Effect, ErrorKind, Fence, MacAddr, Mtu, PfIndex, PortRef, Result, Role, VfAllocator};

use crate::card::{Change, FormerLease, Inner, error, indices};
use crate::discover::VirtualFunction;
use crate::record::{Held, Place};
pub(crate) use locate::mtu_of;
use locate::{Whereabouts, mac_of};

/// VFs of a card.
#[derive(Clone, Debug)]
pub(crate) struct SriovVf {
    card: Arc<Inner>,
}

impl SriovVf {
    pub(crate) fn new(card: Arc<Inner>) -> Self {
        Self { card }
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
        let message = format!("this is {whose} part, and this side is the other");
        Err(error(ErrorKind::Unsupported, operation, message))
    }

    pub(crate) fn observe(&self) -> Result<Vec<VfState>> {
        let change = self.card.look("vf.list")?;
        let soc_only = self.card.options.role == Role::Soc;
        let mut states = Vec::new();
        let present = change.vfs();
        let mut admin = Vec::new();
        let pfs: std::collections::BTreeSet<PfIndex> = present
            .iter()
            .filter_map(|(port, _)| Some(indices(*port)?.0))
            .collect();
        for pf in pfs {
            let link = change.pf_link(pf)?.index;
            let vfs = change
                .kernel()
                .vfs(link)
                .map_err(|failed| change.failed(failed))?;
            admin.extend(vfs.into_iter().map(|vf| (crate::card::port(pf.0, vf.index), vf)));
        }
        for (port, function) in &present {
            let found = change.locate(*port, function)?;
            let admin_mac = admin
                .iter()
                .find(|(of, _)| of == port)
                .map_or([0; 6], |(_, vf)| vf.mac);
            states.push(state_of(
                &change,
                *port,
                function,
                &found,
                MacAddr(admin_mac),
                soc_only,
            ));
        }
        // A leased VF that is not on the bus any more.
        for (port, function) in &change.record.functions {
            let gone = !present.iter().any(|(of, _)| of == port);
            if let Some(held) = function.held.as_ref().filter(|_| gone) {
                let mut state = VfState::new(*port, MacAddr::default(), Mtu::default());
                state.pci = Some(held.pci);
                state.location = VfLocation::Missing;
                state.lease = Some(held.lease.clone());
                states.push(state);
            }
        }
        states.sort_by_key(|state| state.port);
        Ok(states)
    }
}

fn state_of(
    change: &Change<'_>,
    port: PortRef,
    function: &VirtualFunction,
    found: &Whereabouts,
    admin_mac: MacAddr,
    soc_only: bool,
) -> VfState {
    let remembered = change.record.functions.get(&port);
    let held = remembered.and_then(|function| function.held.as_ref());
    let (mac, mtu) = match (found.link(), held.and_then(|held| held.snapshot.netdev.as_ref())) {
        (Some(link), _) => (mac_of(link), link.mtu),
        (None, Some(before)) => (before.mac, before.mtu),
        (None, None) => (admin_mac, u32::from(Mtu::ETHERNET.get())),
    };
    let mut state = VfState::new(port, mac, locate::mtu_of(mtu));
    state.admin_mac = admin_mac;
    state.pci = Some(function.pci);
    state.location = found.location();
    state.lease = if soc_only {
        remembered.and_then(|function| function.admitted.clone())
    } else {
        held.map(|held| held.lease.clone())
    };
    state
}

/// What is told of a lease of a former life.
pub(crate) fn former(held: &Held) -> FormerLease {
    let attachment = match held.going.as_ref().unwrap_or(&held.place) {
        Place::Host => None,
        Place::Netns { path, ifname } => Some(Attachment::Netns {
            path: path.clone(),
            ifname: ifname.clone(),
        }),
        Place::Vfio => Some(Attachment::Vfio),
    };
    FormerLease {
        lease: held.lease.clone(),
        config: held.config.clone(),
        attachment,
    }
}

#[async_trait]
impl VfAllocator for SriovVf {
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
