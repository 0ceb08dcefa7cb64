//! The floor's parts under this card's lives: fences and lease epochs are translated, and while the card is away, so are
//! its VFs and ports.
//!
//! The card's epoch is not the floor's: it also counts the processor's resets. A fence or a lease of the present life
//! becomes the floor's present one; any other becomes one that the floor refuses as stale.

use std::sync::Arc;

use async_trait::async_trait;
use dpumesh_core::transport::{ChannelConfig, ChannelName, ShmChannel, ShmListener, ShmTransport};
use dpumesh_core::vf::{
    AttachedVf, Attachment, Disruption, LeaseOwner, Released, ResetLevel, VfConfig, VfCount, VfLease,
    VfRequest, VfState,
};
use dpumesh_core::{
    Backend, BackendExt, Epoch, ErrorKind, Fence, PfIndex, PortInfo, PortIo, PortRef, Ports, Result,
    VfAllocator,
};

use crate::error::error;
use crate::worker::Shared;

/// VFs, ports and channels of the floor.
#[derive(Debug)]
pub(crate) struct Floor {
    pub(crate) shared: Arc<Shared>,
}

impl Floor {
    fn backend(&self, operation: &'static str) -> Result<&Arc<dyn Backend>> {
        let none = || error(ErrorKind::Unsupported, operation, "the card has no floor");
        self.shared.floor.as_ref().ok_or_else(none)
    }

    fn vf(&self, operation: &'static str) -> Result<&dyn VfAllocator> {
        self.shared.present(operation)?;
        self.backend(operation)?.require_vf()
    }

    /// The floor's VFs and its fence, for a caller of the present life.
    fn fenced(&self, fence: Fence, operation: &'static str) -> Result<(&dyn VfAllocator, Fence)> {
        self.shared.fenced(fence, operation)?;
        let floor = self.backend(operation)?;
        Ok((floor.require_vf()?, floor.fence()))
    }

    /// A lease as the floor knows it.
    fn downwards(&self, lease: &VfLease) -> VfLease {
        let floor = self.shared.floor.as_ref().map_or(Epoch(0), |floor| floor.epoch());
        let mut lease = lease.clone();
        let is_present = lease.epoch == self.shared.life().epoch;
        lease.epoch = if is_present {
            floor
        } else {
            Epoch(floor.0.wrapping_sub(1))
        };
        lease
    }

    /// A lease of the floor as this card's.
    fn upwards(&self, mut lease: VfLease) -> VfLease {
        let floor = self.shared.floor.as_ref().map_or(Epoch(0), |floor| floor.epoch());
        let own = self.shared.life().epoch;
        lease.epoch = if lease.epoch == floor {
            own
        } else {
            Epoch(own.0.wrapping_sub(1))
        };
        lease
    }
}

#[async_trait]
impl VfAllocator for Floor {
    async fn plan_vf_count(&self, pf: PfIndex, count: u16) -> Result<Disruption> {
        self.vf("vf.plan_vf_count")?.plan_vf_count(pf, count).await
    }

    async fn set_vf_count(&self, fence: Fence, pf: PfIndex, count: u16) -> Result<VfCount> {
        let (vf, fence) = self.fenced(fence, "vf.set_vf_count")?;
        vf.set_vf_count(fence, pf, count).await
    }

    async fn list(&self) -> Result<Vec<VfState>> {
        let mut states = self.vf("vf.list")?.list().await?;
        for state in &mut states {
            state.lease = state.lease.take().map(|lease| self.upwards(lease));
        }
        Ok(states)
    }

    async fn lease(&self, fence: Fence, request: &VfRequest) -> Result<VfLease> {
        let (vf, fence) = self.fenced(fence, "vf.lease")?;
        Ok(self.upwards(vf.lease(fence, request).await?))
    }

    async fn admit(&self, fence: Fence, lease: &VfLease) -> Result<()> {
        let (vf, fence) = self.fenced(fence, "vf.admit")?;
        vf.admit(fence, &self.downwards(lease)).await
    }

    async fn revoke(&self, fence: Fence, lease: &VfLease) -> Result<()> {
        let (vf, fence) = self.fenced(fence, "vf.revoke")?;
        vf.revoke(fence, &self.downwards(lease)).await
    }

    async fn configure(&self, fence: Fence, lease: &VfLease, config: &VfConfig) -> Result<()> {
        let (vf, fence) = self.fenced(fence, "vf.configure")?;
        vf.configure(fence, &self.downwards(lease), config).await
    }

    async fn attach(&self, fence: Fence, lease: &VfLease, attachment: &Attachment) -> Result<AttachedVf> {
        let (vf, fence) = self.fenced(fence, "vf.attach")?;
        vf.attach(fence, &self.downwards(lease), attachment).await
    }

    async fn detach(&self, fence: Fence, lease: &VfLease) -> Result<()> {
        let (vf, fence) = self.fenced(fence, "vf.detach")?;
        vf.detach(fence, &self.downwards(lease)).await
    }

    async fn release(&self, fence: Fence, lease: &VfLease, level: ResetLevel) -> Result<Released> {
        let (vf, fence) = self.fenced(fence, "vf.release")?;
        vf.release(fence, &self.downwards(lease), level).await
    }

    async fn reclaim(
        &self,
        fence: Fence,
        port: PortRef,
        live: &[LeaseOwner],
        level: ResetLevel,
    ) -> Result<ResetLevel> {
        let (vf, fence) = self.fenced(fence, "vf.reclaim")?;
        vf.reclaim(fence, port, live, level).await
    }
}

#[async_trait]
impl Ports for Floor {
    async fn list(&self) -> Result<Vec<PortInfo>> {
        self.shared.present("ports.list")?;
        self.backend("ports.list")?.require_ports()?.list().await
    }

    async fn open(&self, fence: Fence, port: PortRef) -> Result<Box<dyn PortIo>> {
        self.shared.fenced(fence, "ports.open")?;
        let floor = self.backend("ports.open")?;
        floor.require_ports()?.open(floor.fence(), port).await
    }
}

#[async_trait]
impl ShmTransport for Floor {
    async fn listen(&self, name: &ChannelName) -> Result<Box<dyn ShmListener>> {
        self.backend("transport.listen")?
            .require_transport()?
            .listen(name)
            .await
    }

    async fn connect(&self, name: &ChannelName, config: &ChannelConfig) -> Result<Box<dyn ShmChannel>> {
        let floor = self.backend("transport.connect")?;
        floor.require_transport()?.connect(name, config).await
    }
}
