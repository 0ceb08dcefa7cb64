//! Checks of [`VfAllocator`].

use async_trait::async_trait;
use dpumesh_core::vf::{
    AttachedVf, Attachment, Disruption, LeaseOwner, Released, ResetLevel, VfConfig, VfCount, VfLease,
    VfRequest, VfState,
};
use dpumesh_core::{BackendExt, Fence, PfIndex, PortRef, Result, VfAllocator};

use super::{Checked, Look};

#[async_trait]
impl VfAllocator for Checked {
    async fn plan_vf_count(&self, pf: PfIndex, count: u16) -> Result<Disruption> {
        let look = self.reading("vf.plan_vf_count");
        look.general(self.inner.require_vf()?.plan_vf_count(pf, count).await)
    }

    async fn set_vf_count(&self, fence: Fence, pf: PfIndex, count: u16) -> Result<VfCount> {
        let look = self.fenced("vf.set_vf_count", fence);
        let set = look.general(self.inner.require_vf()?.set_vf_count(fence, pf, count).await)?;
        self.on_host(&look)?;
        look.hold(set.actual <= count, || {
            format!("{} VFs are there where {count} were asked for", set.actual)
        })?;
        Ok(set)
    }

    async fn list(&self) -> Result<Vec<VfState>> {
        let look = self.reading("vf.list");
        let states = look.general(self.inner.require_vf()?.list().await)?;
        let mut ports: Vec<PortRef> = states.iter().map(|state| state.port).collect();
        ports.sort_unstable();
        look.ascending(ports.into_iter())?;
        for state in &states {
            look.hold(state.port.is_vf(), || format!("{} is no VF", state.port))?;
            let of_port = state.lease.as_ref().is_none_or(|lease| lease.port == state.port);
            look.hold(of_port, || {
                format!("the lease of {} is of another port", state.port)
            })?;
        }
        Ok(states)
    }

    async fn lease(&self, fence: Fence, request: &VfRequest) -> Result<VfLease> {
        let look = self.fenced("vf.lease", fence);
        let lease = look.general(self.inner.require_vf()?.lease(fence, request).await)?;
        self.on_host(&look)?;
        look.hold(!request.owner.0.is_empty(), || "a lease was made for nobody")?;
        look.hold(lease.owner == request.owner, || "the lease is another's")?;
        look.hold(
            lease.epoch == fence.0,
            || "the lease is of another life of the card",
        )?;
        look.hold(
            lease.dpu == self.inner.info().dpu,
            || "the lease is of another card",
        )?;
        look.hold(lease.port.is_vf(), || "the lease is of no VF")?;
        Ok(lease)
    }

    async fn admit(&self, fence: Fence, lease: &VfLease) -> Result<()> {
        let look = self.fenced("vf.admit", fence);
        look.general(self.inner.require_vf()?.admit(fence, lease).await)?;
        self.on_soc(&look)?;
        look.hold(
            lease.dpu == self.inner.info().dpu,
            || "another card's lease was admitted",
        )
    }

    async fn revoke(&self, fence: Fence, lease: &VfLease) -> Result<()> {
        let look = self.fenced("vf.revoke", fence);
        look.general(self.inner.require_vf()?.revoke(fence, lease).await)?;
        self.on_soc(&look)
    }

    async fn configure(&self, fence: Fence, lease: &VfLease, config: &VfConfig) -> Result<()> {
        let look = self.fenced("vf.configure", fence);
        look.general(self.inner.require_vf()?.configure(fence, lease, config).await)?;
        self.on_host(&look)?;
        current(&look, fence, lease)
    }

    async fn attach(&self, fence: Fence, lease: &VfLease, attachment: &Attachment) -> Result<AttachedVf> {
        let look = self.fenced("vf.attach", fence);
        let attached = look.general(self.inner.require_vf()?.attach(fence, lease, attachment).await)?;
        self.on_host(&look)?;
        current(&look, fence, lease)?;
        Ok(attached)
    }

    async fn detach(&self, fence: Fence, lease: &VfLease) -> Result<()> {
        let look = self.fenced("vf.detach", fence);
        look.general(self.inner.require_vf()?.detach(fence, lease).await)?;
        self.on_host(&look)?;
        current(&look, fence, lease)
    }

    async fn release(&self, fence: Fence, lease: &VfLease, level: ResetLevel) -> Result<Released> {
        let look = self.fenced("vf.release", fence);
        let released = look.general(self.inner.require_vf()?.release(fence, lease, level).await)?;
        self.on_host(&look)?;
        look.hold(
            released == Released::NotCurrent || lease.epoch == fence.0,
            || "a lease of another life freed a VF",
        )?;
        Ok(released)
    }

    async fn reclaim(
        &self,
        fence: Fence,
        port: PortRef,
        live: &[LeaseOwner],
        level: ResetLevel,
    ) -> Result<ResetLevel> {
        let look = self.fenced("vf.reclaim", fence);
        let went = look.general(self.inner.require_vf()?.reclaim(fence, port, live, level).await)?;
        self.on_host(&look)?;
        look.hold(went <= level, || {
            format!("it went to {went:?} where {level:?} was most")
        })?;
        Ok(went)
    }
}

impl Checked {
    fn on_host(&self, look: &Look<'_>) -> Result<()> {
        look.hold(
            self.inner.info().role.is_host(),
            || "the host's part was done on the SoC",
        )
    }

    fn on_soc(&self, look: &Look<'_>) -> Result<()> {
        look.hold(
            self.inner.info().role.is_soc(),
            || "the SoC's part was done on the host",
        )
    }
}

fn current(look: &Look<'_>, fence: Fence, lease: &VfLease) -> Result<()> {
    look.hold(lease.epoch == fence.0, || "a lease of another life was taken")
}
