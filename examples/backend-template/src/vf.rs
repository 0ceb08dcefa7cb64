//! [`VfAllocator`] for a card with four VFs whose MAC can be set, and nothing else: the floor of every card.
//!
//! A call decides everything before it touches the card, so one that is refused leaves no trace. A card with real VFs
//! also writes a lease to a journal before it touches the VF, so that a crash leaves a record to undo:
//! `backends/sriov` shows how.

use async_trait::async_trait;
use dpumesh_core::vf::{
    AttachedVf, Attachment, Disruption, LeaseId, LeaseOwner, Released, ResetLevel, VfConfig, VfCount,
    VfLease, VfRequest, VfState,
};
use dpumesh_core::{
    Capabilities, ErrorKind, Fence, MacAddr, Mtu, PfIndex, PortRef, ResetLevels, Result, VfAllocator,
    VfAttributes,
};

use crate::card::{Life, MyCard, NAME, error};

/// VFs of the card.
const COUNT: u16 = 4;

/// Every VF, by index.
#[derive(Debug)]
pub(crate) struct Vfs {
    all: Vec<Vf>,
    given: u64,
}

#[derive(Debug)]
struct Vf {
    port: PortRef,
    mac: MacAddr,
    /// The host's lease, and the MAC to go back to.
    lease: Option<(VfLease, MacAddr)>,
    /// The lease that the SoC took.
    admitted: Option<VfLease>,
}

/// What the card promises. The kit takes each claim at its word.
pub(crate) fn claim(capabilities: &mut Capabilities) {
    capabilities.vf.max_vfs = COUNT;
    capabilities.vf.attributes = VfAttributes::MAC;
    capabilities.vf.resets = ResetLevels::CONFIG;
}

impl Default for Vfs {
    fn default() -> Self {
        let vf = |index: u16| Vf {
            port: PortRef::vf(index),
            mac: MacAddr([0x02, 0, 0, 0, 0, index as u8]),
            lease: None,
            admitted: None,
        };
        Self {
            all: (0..COUNT).map(vf).collect(),
            given: 0,
        }
    }
}

impl Vfs {
    /// True for a port of the card.
    #[allow(dead_code, reason = "steering asks, from step 3 on")]
    pub(crate) fn has(&self, port: PortRef) -> bool {
        self.all.iter().any(|vf| vf.port == port)
    }

    fn leased(&mut self, operation: &'static str, lease: &VfLease) -> Result<&mut Vf> {
        let held = |vf: &&mut Vf| vf.lease.as_ref().is_some_and(|(held, _)| held == lease);
        self.all
            .iter_mut()
            .find(held)
            .ok_or_else(|| error(ErrorKind::Stale, operation, "the lease is not current").object("lease"))
    }

    /// Whether a VF may get these attributes.
    fn check(&self, operation: &'static str, port: PortRef, config: &VfConfig) -> Result<()> {
        let asked = [
            (config.vlan.is_some(), "config.vlan"),
            (config.trust.is_some(), "config.trust"),
            (config.spoof_check.is_some(), "config.spoof_check"),
            (config.link_state.is_some(), "config.link_state"),
            (config.min_rate.is_some(), "config.min_rate"),
            (config.max_rate.is_some(), "config.max_rate"),
            (config.mtu.is_some(), "config.mtu"),
        ];
        if let Some((_, field)) = asked.iter().find(|(asked, _)| *asked) {
            let message = "the card cannot set this attribute";
            return Err(error(ErrorKind::Unsupported, operation, message).field(*field));
        }
        let Some(mac) = config.mac else { return Ok(()) };
        if mac.is_zero() || mac.is_multicast() {
            let message = "must be the address of one station";
            return Err(error(ErrorKind::Invalid, operation, message).field("config.mac"));
        }
        match self.all.iter().find(|vf| vf.port != port && vf.mac == mac) {
            Some(user) => {
                let message = format!("{mac} is in use by {}", user.port);
                Err(error(ErrorKind::Conflict, operation, message).field("config.mac"))
            }
            None => Ok(()),
        }
    }
}

#[async_trait]
impl VfAllocator for MyCard {
    async fn plan_vf_count(&self, pf: PfIndex, _count: u16) -> Result<Disruption> {
        const PLAN: &str = "vf.plan_vf_count";
        drop(self.present(PLAN)?);
        Err(fixed(PLAN, pf))
    }

    async fn set_vf_count(&self, fence: Fence, pf: PfIndex, _count: u16) -> Result<VfCount> {
        const SET: &str = "vf.set_vf_count";
        drop(self.fenced(SET, fence)?);
        Err(fixed(SET, pf))
    }

    async fn list(&self) -> Result<Vec<VfState>> {
        let life = self.present("vf.list")?;
        let state = |vf: &Vf| {
            let mut state = VfState::new(vf.port, vf.mac, Mtu::ETHERNET);
            state.lease = vf.lease.as_ref().map(|(lease, _)| lease.clone());
            state
        };
        Ok(life.vfs.all.iter().map(state).collect())
    }

    async fn lease(&self, fence: Fence, request: &VfRequest) -> Result<VfLease> {
        const LEASE: &str = "vf.lease";
        let mut life = self.fenced(LEASE, fence)?;
        let Life { epoch, vfs, .. } = &mut *life;
        if request.owner.0.is_empty() {
            return Err(error(ErrorKind::Invalid, LEASE, "must not be empty").field("owner"));
        }
        let mut leases = vfs.all.iter().filter_map(|vf| vf.lease.as_ref());
        if let Some((lease, _)) = leases.find(|(lease, _)| lease.owner == request.owner) {
            return Ok(lease.clone());
        }
        let wanted = &request.selector;
        let fits = |vf: &Vf| {
            wanted.port.is_none_or(|port| port == vf.port)
                && wanted.pf.is_none_or(|pf| pf == PfIndex(0))
                && wanted.driver.as_ref().is_none_or(|driver| driver == NAME)
                && wanted.numa_node.is_none_or(|node| node == 0)
                && wanted.pci.is_none()
        };
        if !vfs.all.iter().any(fits) {
            let message = "no VF of the card fits the selector";
            return Err(error(ErrorKind::NotFound, LEASE, message).field("selector"));
        }
        let Some(index) = vfs.all.iter().position(|vf| fits(vf) && vf.lease.is_none()) else {
            let message = format!("vf is full: {COUNT} of {COUNT}");
            return Err(error(ErrorKind::CapacityExceeded, LEASE, message).object("vf"));
        };
        let port = vfs.all[index].port;
        vfs.check(LEASE, port, &request.config)?;
        vfs.given += 1;
        // No number twice on a card: each life has numbers of its own.
        let id = LeaseId(epoch.0 << 32 | vfs.given);
        let lease = VfLease::new(id, self.dpu().clone(), port, request.owner.clone(), *epoch);
        let vf = &mut vfs.all[index];
        vf.lease = Some((lease.clone(), vf.mac));
        vf.mac = request.config.mac.unwrap_or(vf.mac);
        Ok(lease)
    }

    async fn admit(&self, fence: Fence, lease: &VfLease) -> Result<()> {
        const ADMIT: &str = "vf.admit";
        let mut life = self.fenced(ADMIT, fence)?;
        if lease.dpu != *self.dpu() {
            let message = format!("the lease is of {}, this is {}", lease.dpu, self.dpu());
            return Err(error(ErrorKind::Invalid, ADMIT, message).field("lease.dpu"));
        }
        if lease.epoch != life.epoch {
            return Err(error(ErrorKind::Stale, ADMIT, "the lease is of a former life").object("lease"));
        }
        let Some(vf) = life.vfs.all.iter_mut().find(|vf| vf.port == lease.port) else {
            return Err(error(ErrorKind::NotFound, ADMIT, "there is no such VF").object(lease.port));
        };
        match &vf.admitted {
            Some(other) if other != lease => {
                let message = format!("lease {} of this port was not revoked", other.id.0);
                Err(error(ErrorKind::Conflict, ADMIT, message).object(lease.port))
            }
            _ => {
                vf.admitted = Some(lease.clone());
                Ok(())
            }
        }
    }

    async fn revoke(&self, fence: Fence, lease: &VfLease) -> Result<()> {
        let mut life = self.fenced("vf.revoke", fence)?;
        let held = life
            .vfs
            .all
            .iter_mut()
            .find(|vf| vf.admitted.as_ref() == Some(lease));
        if let Some(vf) = held {
            vf.admitted = None;
        }
        Ok(())
    }

    async fn configure(&self, fence: Fence, lease: &VfLease, config: &VfConfig) -> Result<()> {
        const CONFIGURE: &str = "vf.configure";
        let mut life = self.fenced(CONFIGURE, fence)?;
        life.vfs.leased(CONFIGURE, lease)?;
        life.vfs.check(CONFIGURE, lease.port, config)?;
        let vf = life.vfs.leased(CONFIGURE, lease)?;
        vf.mac = config.mac.unwrap_or(vf.mac);
        Ok(())
    }

    async fn attach(&self, fence: Fence, lease: &VfLease, _attachment: &Attachment) -> Result<AttachedVf> {
        const ATTACH: &str = "vf.attach";
        let mut life = self.fenced(ATTACH, fence)?;
        life.vfs.leased(ATTACH, lease)?;
        let message = "VFs cannot be attached like this";
        Err(error(ErrorKind::Unsupported, ATTACH, message).field("attachment"))
    }

    async fn detach(&self, fence: Fence, lease: &VfLease) -> Result<()> {
        const DETACH: &str = "vf.detach";
        self.fenced(DETACH, fence)?.vfs.leased(DETACH, lease)?;
        Ok(())
    }

    async fn release(&self, fence: Fence, lease: &VfLease, level: ResetLevel) -> Result<Released> {
        const RELEASE: &str = "vf.release";
        let mut life = self.fenced(RELEASE, fence)?;
        only_config(RELEASE, level)?;
        let Ok(vf) = life.vfs.leased(RELEASE, lease) else {
            return Ok(Released::NotCurrent);
        };
        if let Some((_, mac)) = vf.lease.take() {
            vf.mac = mac;
        }
        Ok(Released::Freed)
    }

    async fn reclaim(
        &self,
        fence: Fence,
        port: PortRef,
        live: &[LeaseOwner],
        level: ResetLevel,
    ) -> Result<ResetLevel> {
        const RECLAIM: &str = "vf.reclaim";
        let mut life = self.fenced(RECLAIM, fence)?;
        only_config(RECLAIM, level)?;
        let Some(vf) = life.vfs.all.iter_mut().find(|vf| vf.port == port) else {
            return Err(error(ErrorKind::NotFound, RECLAIM, "there is no such VF").object(port));
        };
        if vf
            .lease
            .as_ref()
            .is_some_and(|(lease, _)| live.contains(&lease.owner))
        {
            let message = "it is leased and its owner lives";
            return Err(error(ErrorKind::Busy, RECLAIM, message).object(port));
        }
        if let Some((_, mac)) = vf.lease.take() {
            vf.mac = mac;
        }
        Ok(ResetLevel::Config)
    }
}

fn fixed(operation: &'static str, pf: PfIndex) -> dpumesh_core::Error {
    if pf != PfIndex(0) {
        return error(ErrorKind::NotFound, operation, "there is no such PF").field("pf");
    }
    error(ErrorKind::Unsupported, operation, "the number of VFs is fixed").field("count")
}

fn only_config(operation: &'static str, level: ResetLevel) -> Result<()> {
    if level == ResetLevel::Config {
        return Ok(());
    }
    Err(error(ErrorKind::Unsupported, operation, "the card has no such reset").field("level"))
}
