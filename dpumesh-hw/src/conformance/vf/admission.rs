//! The SoC's part of a lease: admit and revoke.

use dpumesh_core::vf::{LeaseId, LeaseOwner, VfLease, VfRequest};
use dpumesh_core::{BackendExt, DpuId, ErrorKind, PortRef};

use super::Host;
use crate::conformance::Rig;
use crate::conformance::check::{CaseResult, ensure_eq, refused};

pub(in crate::conformance) async fn admitting_the_same_lease_again_succeeds(rig: &dyn Rig) -> CaseResult {
    let (host, soc) = (Host::of(rig), rig.soc());
    let lease = host.lease("pod").await?;
    soc.require_vf()?.admit(soc.fence(), &lease).await?;
    soc.require_vf()?.admit(soc.fence(), &lease).await?;
    Ok(())
}

pub(in crate::conformance) async fn another_lease_of_the_port_conflicts_until_revoked(
    rig: &dyn Rig,
) -> CaseResult {
    let (host, soc) = (Host::of(rig), rig.soc());
    let vf = soc.require_vf()?;
    let old = host.lease("old").await?;
    vf.admit(soc.fence(), &old).await?;
    host.release(&old).await?;
    let new = host.lease("new").await?;
    ensure_eq!(new.port, old.port, "port of the new lease");
    refused(vf.admit(soc.fence(), &new).await, "vf.admit", ErrorKind::Conflict)?;
    vf.revoke(soc.fence(), &old).await?;
    vf.admit(soc.fence(), &new).await?;
    Ok(())
}

pub(in crate::conformance) async fn another_cards_lease_is_invalid(rig: &dyn Rig) -> CaseResult {
    let (host, soc) = (Host::of(rig), rig.soc());
    let mut lease = host.lease("pod").await?;
    lease.dpu = DpuId("some-other-card".into());
    let answer = soc.require_vf()?.admit(soc.fence(), &lease).await;
    refused(answer, "vf.admit", ErrorKind::Invalid)?;
    Ok(())
}

pub(in crate::conformance) async fn admitting_a_port_that_is_not_there_is_not_found(
    rig: &dyn Rig,
) -> CaseResult {
    let soc = rig.soc();
    let lease = VfLease::new(
        LeaseId(1),
        soc.info().dpu,
        PortRef::vf(u16::MAX),
        LeaseOwner("pod".into()),
        soc.epoch(),
    );
    let answer = soc.require_vf()?.admit(soc.fence(), &lease).await;
    refused(answer, "vf.admit", ErrorKind::NotFound)?;
    Ok(())
}

pub(in crate::conformance) async fn revoking_what_is_not_held_succeeds(rig: &dyn Rig) -> CaseResult {
    let (host, soc) = (Host::of(rig), rig.soc());
    let vf = soc.require_vf()?;
    let lease = host.lease("pod").await?;
    vf.revoke(soc.fence(), &lease).await?;
    vf.admit(soc.fence(), &lease).await?;
    vf.revoke(soc.fence(), &lease).await?;
    vf.revoke(soc.fence(), &lease).await?;
    Ok(())
}

pub(in crate::conformance) async fn revoking_another_lease_leaves_the_port_admitted(
    rig: &dyn Rig,
) -> CaseResult {
    let (host, soc) = (Host::of(rig), rig.soc());
    let vf = soc.require_vf()?;
    let lease = host.lease("pod").await?;
    vf.admit(soc.fence(), &lease).await?;
    let mut stranger = lease.clone();
    stranger.id = LeaseId(lease.id.0.wrapping_add(1000));
    vf.revoke(soc.fence(), &stranger).await?;
    // Still taken: the stranger's lease meets a conflict.
    refused(
        vf.admit(soc.fence(), &stranger).await,
        "vf.admit",
        ErrorKind::Conflict,
    )?;
    Ok(())
}

pub(in crate::conformance) async fn the_other_sides_calls_are_unsupported(rig: &dyn Rig) -> CaseResult {
    let (host, soc) = (Host::of(rig), rig.soc());
    let lease = host.lease("pod").await?;
    let answer = host.vf()?.admit(host.fence(), &lease).await;
    refused(answer, "vf.admit", ErrorKind::Unsupported)?;
    let answer = host.vf()?.revoke(host.fence(), &lease).await;
    refused(answer, "vf.revoke", ErrorKind::Unsupported)?;
    let answer = soc.require_vf()?.lease(soc.fence(), &VfRequest::new("pod")).await;
    refused(answer, "vf.lease", ErrorKind::Unsupported)?;
    Ok(())
}
