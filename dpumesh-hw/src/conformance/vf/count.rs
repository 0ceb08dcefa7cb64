//! How many VFs there are, and changing it.

use dpumesh_core::vf::Disruption;
use dpumesh_core::{ErrorKind, PfIndex, PortRef};

use super::Host;
use crate::conformance::Rig;
use crate::conformance::check::{CaseResult, Halt, ensure, ensure_eq, refused};
use crate::conformance::disturb::{Disturbance, disturb};

fn pf_of(port: PortRef) -> PfIndex {
    match port {
        PortRef::Vf { pf, .. } | PortRef::Pf { pf, .. } => pf,
        _ => PfIndex(0),
    }
}

pub(in crate::conformance) async fn the_vf_count_does_not_change_under_a_lease(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let lease = host.lease("pod").await?;
    let before = host.vf()?.list().await?;
    let answer = host.vf()?.set_vf_count(host.fence(), pf_of(lease.port), 0).await;
    refused(answer, "vf.set_vf_count", ErrorKind::Busy)?;
    ensure_eq!(host.vf()?.list().await?, before, "VFs after the refusal");
    Ok(())
}

pub(in crate::conformance) async fn the_vf_count_becomes_what_the_answer_says(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let limit = host.backend.capabilities().vf.max_vfs;
    let Some(pf) = host.vf()?.list().await?.first().map(|state| pf_of(state.port)) else {
        return Err(Halt::failed("the card lists no VF"));
    };
    for wanted in [1, limit.min(2)] {
        let count = host.vf()?.set_vf_count(host.fence(), pf, wanted).await?;
        ensure!(count.actual <= wanted, "{} VFs for {wanted} asked", count.actual);
        let listed = host.vf()?.list().await?;
        let listed = listed.iter().filter(|state| pf_of(state.port) == pf).count();
        ensure_eq!(listed, usize::from(count.actual), "VFs listed");
    }
    Ok(())
}

pub(in crate::conformance) async fn planning_a_vf_count_changes_nothing(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let before = host.vf()?.list().await?;
    let Some(pf) = before.first().map(|state| pf_of(state.port)) else {
        return Err(Halt::failed("the card lists no VF"));
    };
    host.vf()?.plan_vf_count(pf, 1).await?;
    ensure_eq!(host.vf()?.list().await?, before, "VFs after planning");
    Ok(())
}

pub(in crate::conformance) async fn a_vf_count_out_of_range_is_refused(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let before = host.vf()?.list().await?;
    let Some(pf) = before.first().map(|state| pf_of(state.port)) else {
        return Err(Halt::failed("the card lists no VF"));
    };
    let (vf, fence) = (host.vf()?, host.fence());
    if let Some(above) = host.backend.capabilities().vf.max_vfs.checked_add(1) {
        let answer = vf.plan_vf_count(pf, above).await;
        refused(answer, "vf.plan_vf_count", ErrorKind::CapacityExceeded)?;
        let answer = vf.set_vf_count(fence, pf, above).await;
        refused(answer, "vf.set_vf_count", ErrorKind::CapacityExceeded)?;
    }
    let nowhere = PfIndex(u16::MAX);
    let answer = vf.plan_vf_count(nowhere, 1).await;
    refused(answer, "vf.plan_vf_count", ErrorKind::NotFound)?;
    let answer = vf.set_vf_count(fence, nowhere, 1).await;
    refused(answer, "vf.set_vf_count", ErrorKind::NotFound)?;
    ensure_eq!(vf.list().await?, before, "VFs after the refusals");
    Ok(())
}

pub(in crate::conformance) async fn a_fixed_vf_count_is_unsupported(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let before = host.vf()?.list().await?;
    let Some(pf) = before.first().map(|state| pf_of(state.port)) else {
        return Err(Halt::failed("the card lists no VF"));
    };
    let answer = host.vf()?.plan_vf_count(pf, 1).await;
    refused(answer, "vf.plan_vf_count", ErrorKind::Unsupported)?;
    let answer = host.vf()?.set_vf_count(host.fence(), pf, 1).await;
    refused(answer, "vf.set_vf_count", ErrorKind::Unsupported)?;
    ensure_eq!(host.vf()?.list().await?, before, "VFs after the refusals");
    Ok(())
}

pub(in crate::conformance) async fn fewer_vfs_than_asked_for_are_told(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let Some(pf) = host.vf()?.list().await?.first().map(|state| pf_of(state.port)) else {
        return Err(Halt::failed("the card lists no VF"));
    };
    host.vf()?.set_vf_count(host.fence(), pf, 0).await?;
    disturb(rig, Disturbance::FewerVfs(Some(1))).await?;
    let count = host.vf()?.set_vf_count(host.fence(), pf, 2).await?;
    ensure_eq!(
        count.actual,
        1,
        "VFs of a card that gives one, whatever it is asked for"
    );
    ensure!(
        count.needs != Disruption::None,
        "nothing is needed to get the rest, yet the card did not give it"
    );
    ensure_eq!(host.vf()?.list().await?.len(), 1, "VFs listed");
    disturb(rig, Disturbance::FewerVfs(None)).await
}
