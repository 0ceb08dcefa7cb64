//! Callers who give up: a call that was dropped leaves nothing that its repetition, or the release, trips over.

use dpumesh_core::vf::{Released, ResetLevel, VfLocation};

use super::place::place;
use super::{Host, mac};
use crate::conformance::Rig;
use crate::conformance::check::{CaseResult, cancelled, ensure, ensure_eq};

pub(in crate::conformance) async fn a_cancelled_attach_can_be_repeated_or_released(
    rig: &dyn Rig,
) -> CaseResult {
    let host = Host::of(rig);
    let clean = host.vf()?.list().await?;
    for repeat in [true, false] {
        let lease = host.lease("pod").await?;
        let (path, place) = place(rig, "net1").await?;
        cancelled(host.vf()?.attach(host.fence(), &lease, &place)).await;
        let there = VfLocation::Netns { path };
        if repeat {
            host.vf()?.attach(host.fence(), &lease, &place).await?;
            let state = host.state(lease.port).await?;
            ensure_eq!(state.location, there, "location after attaching again");
            ensure_eq!(state.lease, Some(lease.clone()), "lease after attaching again");
        }
        ensure_eq!(host.release(&lease).await?, Released::Freed, "release");
        ensure_eq!(host.vf()?.list().await?, clean, "VFs after the release");
    }
    Ok(())
}

pub(in crate::conformance) async fn a_cancelled_configure_can_be_repeated_or_released(
    rig: &dyn Rig,
) -> CaseResult {
    let host = Host::of(rig);
    let clean = host.vf()?.list().await?;
    for repeat in [true, false] {
        let lease = host.lease("pod").await?;
        let before = host.state(lease.port).await?;
        let config = mac(6);
        cancelled(host.vf()?.configure(host.fence(), &lease, &config)).await;
        if repeat {
            host.configure(&lease, config.clone()).await?;
            let found = host.state(lease.port).await?.admin_mac;
            ensure_eq!(Some(found), config.mac, "MAC after configuring again");
        } else {
            let found = host.state(lease.port).await?.admin_mac;
            ensure!(
                found == before.admin_mac || Some(found) == config.mac,
                "a cancelled configure left the MAC {found}, neither the old nor the new one"
            );
        }
        ensure_eq!(host.release(&lease).await?, Released::Freed, "release");
        ensure_eq!(host.vf()?.list().await?, clean, "VFs after the release");
    }
    Ok(())
}

pub(in crate::conformance) async fn a_cancelled_release_can_be_repeated(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let clean = host.vf()?.list().await?;
    let lease = host.lease("pod").await?;
    host.configure(&lease, mac(6)).await?;
    let release = host.vf()?.release(host.fence(), &lease, ResetLevel::Config);
    cancelled(release).await;
    // Begun or not, done or not: after the next one it is done.
    host.release(&lease).await?;
    ensure_eq!(host.vf()?.list().await?, clean, "VFs after the second release");
    let again = host.release(&lease).await?;
    ensure_eq!(again, Released::NotCurrent, "third release");
    let next = host.lease("next").await?;
    ensure_eq!(next.port, lease.port, "port of the next lease");
    Ok(())
}
