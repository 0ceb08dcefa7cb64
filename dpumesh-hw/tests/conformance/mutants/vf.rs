//! Bugs of leases.

use std::sync::atomic::Ordering;

use async_trait::async_trait;
use dpumesh_core::vf::{
    AttachedVf, Attachment, Disruption, LeaseOwner, Released, ResetLevel, TeardownErrors, VfConfig, VfCount,
    VfLease, VfLocation, VfRequest, VfState,
};
use dpumesh_core::{Error, ErrorKind, Fence, MacAddr, PfIndex, PortRef, Result, VfAllocator};

use super::mutant::{Bug, Part};

#[async_trait]
impl VfAllocator for Part {
    async fn plan_vf_count(&self, pf: PfIndex, count: u16) -> Result<Disruption> {
        self.inner_vf().plan_vf_count(pf, count).await
    }

    async fn set_vf_count(&self, fence: Fence, pf: PfIndex, count: u16) -> Result<VfCount> {
        let mut answer = self.inner_vf().set_vf_count(self.fence(fence), pf, count).await?;
        if self.has(Bug::PromisesEveryVf) {
            answer.actual = count;
        }
        Ok(answer)
    }

    async fn list(&self) -> Result<Vec<VfState>> {
        let mut states = self.inner_vf().list().await?;
        let kept = *self.mac.lock().expect("no panic under the lock");
        for state in &mut states {
            match (self.bug, kept) {
                (Bug::ListsNoLeases, _) => state.lease = None,
                (Bug::ForgetsToRestoreTheMac, Some((port, mac))) if port == state.port => {
                    state.admin_mac = mac
                }
                (Bug::SetsOnlyTheAdministrativeMac, Some((port, _))) if port == state.port => {
                    state.effective_mac = MacAddr([2, 0, 0, 0, 0, 0xee]);
                }
                _ => {}
            }
        }
        Ok(states)
    }

    async fn lease(&self, fence: Fence, request: &VfRequest) -> Result<VfLease> {
        let mut request = request.clone();
        let states = self.inner_vf().list().await.unwrap_or_default();
        if self.has(Bug::LeasesTheHighestIndex) {
            let free = states.iter().rfind(|state| state.lease.is_none());
            request.selector.port = request.selector.port.or_else(|| free.map(|state| state.port));
        }
        if self.has(Bug::GivesASecondLeaseToOneOwner) {
            let count = self.calls.fetch_add(1, Ordering::Relaxed);
            request.owner.0 = format!("{}#{count}", request.owner.0);
        }
        self.inner_vf().lease(self.fence(fence), &request).await
    }

    async fn admit(&self, fence: Fence, lease: &VfLease) -> Result<()> {
        match self.inner_vf().admit(self.fence(fence), lease).await {
            Err(error) if self.has(Bug::AdmitsOverAnotherLease) && error.kind == ErrorKind::Conflict => {
                Ok(())
            }
            answer => answer,
        }
    }

    async fn revoke(&self, fence: Fence, lease: &VfLease) -> Result<()> {
        self.inner_vf().revoke(self.fence(fence), lease).await
    }

    async fn configure(&self, fence: Fence, lease: &VfLease, config: &VfConfig) -> Result<()> {
        self.linger("vf.configure").await?;
        let fence = self.fence(fence);
        if let Some(mac) = config.mac {
            *self.mac.lock().expect("no panic under the lock") = Some((lease.port, mac));
        }
        let answer = self.inner_vf().configure(fence, lease, config).await;
        if self.has(Bug::ConfiguresHalfBeforeItFails) && answer.is_err() {
            let half = VfConfig {
                mac: None,
                ..config.clone()
            };
            self.inner_vf().configure(fence, lease, &half).await?;
        }
        match answer {
            Err(error)
                if self.has(Bug::IgnoresWhatItCannotConfigure) && error.kind == ErrorKind::Unsupported =>
            {
                Ok(())
            }
            answer => answer,
        }
    }

    async fn attach(&self, fence: Fence, lease: &VfLease, attachment: &Attachment) -> Result<AttachedVf> {
        self.linger("vf.attach").await?;
        let attached = self
            .inner_vf()
            .attach(self.fence(fence), lease, attachment)
            .await?;
        self.detached.store(0, Ordering::Relaxed);
        self.calls.fetch_add(1, Ordering::Relaxed);
        Ok(attached)
    }

    async fn detach(&self, fence: Fence, lease: &VfLease) -> Result<()> {
        let before = self.detached.fetch_add(1, Ordering::Relaxed);
        if self.has(Bug::IsSurprisedByASecondDetach) && before > 0 {
            return Err(Error::new(ErrorKind::NotFound, "vf.detach", "it is not attached"));
        }
        self.inner_vf().detach(self.fence(fence), lease).await
    }

    async fn release(&self, fence: Fence, lease: &VfLease, level: ResetLevel) -> Result<Released> {
        self.linger("vf.release").await?;
        let fence = self.fence(fence);
        let mut lease = lease.clone();
        if self.has(Bug::NeedsTheNamespaceToRelease) && self.calls.load(Ordering::Relaxed) > 0 {
            let states = self.inner_vf().list().await?;
            let state = states.into_iter().find(|state| state.port == lease.port);
            if state.is_some_and(|state| state.location == VfLocation::Host) {
                return Err(Error::new(ErrorKind::Io, "vf.release", "the namespace is gone"));
            }
        }
        if self.has(Bug::ReleasesByPortInsteadOfLease) {
            let states = self.inner_vf().list().await?;
            let current = states.into_iter().filter_map(|state| state.lease);
            lease = current
                .into_iter()
                .find(|current| current.port == lease.port)
                .unwrap_or(lease);
        }
        let answer = self.inner_vf().release(fence, &lease, level).await;
        if self.has(Bug::FreesDespiteAFailedRelease) && answer.is_err() {
            self.inner_vf()
                .reclaim(fence, lease.port, &[], ResetLevel::Device)
                .await?;
        }
        let kept = *self.mac.lock().expect("no panic under the lock");
        match (self.bug, answer) {
            (Bug::GivesUpAtTheFirstStep, Err(error)) => {
                let config = VfConfig {
                    mac: kept.map(|(_, mac)| mac),
                    ..VfConfig::default()
                };
                self.inner_vf().configure(fence, &lease, &config).await?;
                Err(error)
            }
            (Bug::TellsOnlyTheFirstFailure, Err(error)) => {
                let first = Error::new(ErrorKind::Io, "vf.release", "the VF does not move");
                Err(error.source(TeardownErrors(vec![first])))
            }
            (_, answer) => answer,
        }
    }

    async fn reclaim(
        &self,
        fence: Fence,
        port: PortRef,
        live: &[LeaseOwner],
        level: ResetLevel,
    ) -> Result<ResetLevel> {
        let live = if self.has(Bug::ReclaimsFromTheLiving) {
            &[]
        } else {
            live
        };
        self.inner_vf()
            .reclaim(self.fence(fence), port, live, level)
            .await
    }
}
