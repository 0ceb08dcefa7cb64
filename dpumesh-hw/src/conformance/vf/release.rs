//! Giving a VF back: release by its lease, reclaim without one.

use dpumesh_core::vf::{LeaseId, LeaseOwner, Released, ResetLevel, TeardownErrors, VfLocation, VfRequest};
use dpumesh_core::{Effect, ErrorKind, ResetLevels, VfAttributes};

use super::attributes::sample;
use super::place::place;
use super::{Host, mac};
use crate::conformance::check::{CaseResult, Halt, ensure, ensure_eq, refused};
use crate::conformance::disturb::{Disturbance, disturb};
use crate::conformance::sample::NO_PORT;
use crate::conformance::{Rig, Sabotage};

pub(in crate::conformance) async fn releasing_again_is_not_current(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let lease = host.lease("pod").await?;
    ensure_eq!(host.release(&lease).await?, Released::Freed, "first release");
    ensure_eq!(
        host.release(&lease).await?,
        Released::NotCurrent,
        "second release"
    );
    ensure!(host.leases().await?.is_empty(), "a released lease is listed");
    Ok(())
}

pub(in crate::conformance) async fn a_late_release_never_touches_the_next_owners_vf(
    rig: &dyn Rig,
) -> CaseResult {
    let host = Host::of(rig);
    let old = host.lease("pod").await?;
    host.release(&old).await?;
    // The same owner text again: only the number tells the leases apart.
    let new = host.lease("pod").await?;
    if host
        .backend
        .capabilities()
        .vf
        .attributes
        .contains(VfAttributes::MAC)
    {
        host.configure(&new, mac(3)).await?;
    }
    let before = host.state(new.port).await?;
    ensure_eq!(before.lease, Some(new.clone()), "lease before");
    ensure_eq!(host.release(&old).await?, Released::NotCurrent, "late release");
    ensure_eq!(host.state(new.port).await?, before, "the next owner's VF");
    Ok(())
}

pub(in crate::conformance) async fn a_forged_lease_releases_nothing(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let lease = host.lease("pod").await?;
    let mut forged = lease.clone();
    forged.id = LeaseId(lease.id.0.wrapping_add(1000));
    ensure_eq!(
        host.release(&forged).await?,
        Released::NotCurrent,
        "release of a forged lease"
    );
    ensure_eq!(host.leases().await?, vec![lease], "leases listed");
    Ok(())
}

pub(in crate::conformance) async fn release_restores_the_attributes(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let claimed = host.backend.capabilities().vf.attributes;
    let lease = host.lease("pod").await?;
    let before = host.state(lease.port).await?;
    for attribute in claimed.iter() {
        host.configure(&lease, sample(attribute)).await?;
    }
    host.release(&lease).await?;
    let after = host.state(lease.port).await?;
    ensure_eq!(after.admin_mac, before.admin_mac, "administrative MAC");
    ensure_eq!(after.effective_mac, before.effective_mac, "effective MAC");
    ensure_eq!(after.mtu, before.mtu, "MTU");
    ensure_eq!(after.location, VfLocation::Host, "location");
    ensure_eq!(after.lease, None, "lease");
    Ok(())
}

pub(in crate::conformance) async fn release_undoes_the_attributes_given_with_the_lease(
    rig: &dyn Rig,
) -> CaseResult {
    let host = Host::of(rig);
    let clean = host.vf()?.list().await?;
    let request = VfRequest::new("pod").with_config(mac(1));
    let lease = host.vf()?.lease(host.fence(), &request).await?;
    host.release(&lease).await?;
    ensure_eq!(host.vf()?.list().await?, clean, "VFs after the release");
    // The MAC is free again for another VF.
    host.lease("holder-of-the-first-vf").await?;
    host.vf()?
        .lease(host.fence(), &VfRequest::new("next").with_config(mac(1)))
        .await?;
    Ok(())
}

fn level_of(flag: ResetLevels) -> ResetLevel {
    match flag {
        ResetLevels::CONFIG => ResetLevel::Config,
        ResetLevels::FUNCTION => ResetLevel::Function,
        _ => ResetLevel::Device,
    }
}

pub(in crate::conformance) async fn each_claimed_reset_level_works(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let claimed = host.backend.capabilities().vf.resets;
    ensure!(
        claimed.contains(ResetLevels::CONFIG),
        "every backend restores attributes"
    );
    // A reset of the whole device disturbs every VF and may well end the card's life: only the others are tried.
    for flag in (claimed - ResetLevels::DEVICE).iter() {
        let lease = host.lease("pod").await?;
        let answer = host.vf()?.release(host.fence(), &lease, level_of(flag)).await;
        match answer {
            Ok(released) => ensure_eq!(released, Released::Freed, "release at {flag:?}"),
            Err(error) => return Err(Halt::failed(format!("vf.resets claims {flag:?}: {error}"))),
        }
    }
    Ok(())
}

pub(in crate::conformance) async fn an_unclaimed_reset_level_is_unsupported_and_the_lease_stays(
    rig: &dyn Rig,
) -> CaseResult {
    let host = Host::of(rig);
    let missing = ResetLevels::all() - host.backend.capabilities().vf.resets;
    let lease = host.lease("pod").await?;
    for flag in missing.iter() {
        let answer = host.vf()?.release(host.fence(), &lease, level_of(flag)).await;
        refused(answer, "vf.release", ErrorKind::Unsupported)?;
        ensure_eq!(
            host.leases().await?,
            vec![lease.clone()],
            "leases after the refusal"
        );
    }
    Ok(())
}

pub(in crate::conformance) async fn release_detaches(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let lease = host.lease("pod").await?;
    let (_, place) = place(rig, "net1").await?;
    host.vf()?.attach(host.fence(), &lease, &place).await?;
    ensure_eq!(host.release(&lease).await?, Released::Freed, "release");
    let state = host.state(lease.port).await?;
    ensure_eq!(state.location, VfLocation::Host, "location");
    Ok(())
}

pub(in crate::conformance) async fn a_release_that_fails_keeps_the_lease(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let lease = host.lease("pod").await?;
    let (path, place) = place(rig, "net1").await?;
    host.vf()?.attach(host.fence(), &lease, &place).await?;
    sabotage(rig)?.jam(lease.port, true).await?;
    let answer = host.vf()?.release(host.fence(), &lease, ResetLevel::Config).await;
    let error = match answer {
        Ok(released) => return Err(Halt::failed(format!("a jammed VF was {released:?}"))),
        Err(error) => error,
    };
    ensure_eq!(error.kind, ErrorKind::Io, "kind of the failure");
    ensure_eq!(error.effect, Effect::Partial, "effect of the failure");
    ensure!(
        std::error::Error::source(&error).is_some(),
        "the error does not list what failed: {error}"
    );
    let state = host.state(lease.port).await?;
    ensure_eq!(state.lease, Some(lease.clone()), "lease of the jammed VF");
    ensure_eq!(
        state.location,
        VfLocation::Netns { path },
        "location of the jammed VF"
    );
    sabotage(rig)?.jam(lease.port, false).await?;
    ensure_eq!(
        host.release(&lease).await?,
        Released::Freed,
        "release when nothing is jammed"
    );
    let state = host.state(lease.port).await?;
    ensure_eq!(
        (state.lease, state.location),
        (None, VfLocation::Host),
        "the VF after it"
    );
    Ok(())
}

pub(in crate::conformance) async fn a_stray_vf_is_shown_and_reclaimed(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let Some(port) = host.vf()?.list().await?.first().map(|state| state.port) else {
        return Err(Halt::failed("the card lists no VF"));
    };
    let clean = host.state(port).await?;
    sabotage(rig)?.strand(port).await?;
    ensure!(
        host.state(port).await?.location != VfLocation::Host,
        "a stray VF is listed at the host"
    );
    let levels = host.backend.capabilities().vf.resets;
    let most = [
        (ResetLevels::DEVICE, ResetLevel::Device),
        (ResetLevels::FUNCTION, ResetLevel::Function),
    ];
    let most = most
        .into_iter()
        .find(|(flag, _)| levels.contains(*flag))
        .map_or(ResetLevel::Config, |(_, level)| level);
    let went = host.vf()?.reclaim(host.fence(), port, &[], most).await?;
    ensure!(went <= most, "it went to {went:?}, {most:?} was the limit");
    ensure_eq!(host.state(port).await?, clean, "the reclaimed VF");
    host.lease("next").await?;
    Ok(())
}

pub(in crate::conformance) async fn reclaim_goes_no_further_than_its_level(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let Some(port) = host.vf()?.list().await?.first().map(|state| state.port) else {
        return Err(Halt::failed("the card lists no VF"));
    };
    sabotage(rig)?.strand(port).await?;
    let before = host.state(port).await?;
    let level = ResetLevel::Config;
    match host.vf()?.reclaim(host.fence(), port, &[], level).await {
        Ok(went) => ensure_eq!(went, level, "how far it went"),
        Err(error) => {
            ensure_eq!(error.kind, ErrorKind::Io, "kind of the refusal");
            ensure_eq!(host.state(port).await?, before, "the VF after the refusal");
        }
    }
    Ok(())
}

fn sabotage(rig: &dyn Rig) -> Result<&dyn Sabotage, Halt> {
    rig.sabotage()
        .ok_or_else(|| Halt::not_supported("rig.sabotage", "the fixture cannot make VFs misbehave"))
}

pub(in crate::conformance) async fn reclaim_spares_a_living_owner(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let lease = host.lease("alive").await?;
    let before = host.state(lease.port).await?;
    let live = [LeaseOwner("alive".into())];
    let answer = host
        .vf()?
        .reclaim(host.fence(), lease.port, &live, ResetLevel::Config)
        .await;
    refused(answer, "vf.reclaim", ErrorKind::Busy)?;
    ensure_eq!(host.state(lease.port).await?, before, "the living owner's VF");
    Ok(())
}

pub(in crate::conformance) async fn reclaim_frees_a_dead_owners_vf(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let clean = host.vf()?.list().await?;
    let lease = host.lease("dead").await?;
    if host
        .backend
        .capabilities()
        .vf
        .attributes
        .contains(VfAttributes::MAC)
    {
        host.configure(&lease, mac(4)).await?;
    }
    let live = [LeaseOwner("somebody-else".into())];
    let went = host
        .vf()?
        .reclaim(host.fence(), lease.port, &live, ResetLevel::Config)
        .await?;
    ensure_eq!(went, ResetLevel::Config, "how far it had to go");
    ensure_eq!(host.vf()?.list().await?, clean, "VFs after the reclaim");
    ensure_eq!(
        host.release(&lease).await?,
        Released::NotCurrent,
        "the dead owner's late release"
    );
    Ok(())
}

pub(in crate::conformance) async fn reclaiming_a_port_that_is_not_there_is_not_found(
    rig: &dyn Rig,
) -> CaseResult {
    let host = Host::of(rig);
    let answer = host
        .vf()?
        .reclaim(host.fence(), NO_PORT, &[], ResetLevel::Config)
        .await;
    refused(answer, "vf.reclaim", ErrorKind::NotFound)?;
    Ok(())
}

pub(in crate::conformance) async fn reclaim_refuses_an_unclaimed_level(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let missing = ResetLevels::all() - host.backend.capabilities().vf.resets;
    let lease = host.lease("dead").await?;
    for flag in missing.iter() {
        let answer = host
            .vf()?
            .reclaim(host.fence(), lease.port, &[], level_of(flag))
            .await;
        refused(answer, "vf.reclaim", ErrorKind::Unsupported)?;
    }
    ensure_eq!(host.leases().await?, vec![lease], "leases after the refusals");
    Ok(())
}

pub(in crate::conformance) async fn release_with_the_namespace_gone_frees_the_vf(
    rig: &dyn Rig,
) -> CaseResult {
    let host = Host::of(rig);
    let lease = host.lease("pod").await?;
    let (path, place) = place(rig, "net1").await?;
    host.vf()?.attach(host.fence(), &lease, &place).await?;
    let Some(namespaces) = rig.namespaces() else {
        return Err(Halt::not_supported(
            "rig.namespaces",
            "the fixture makes no namespaces",
        ));
    };
    namespaces.remove(&path).await?;
    ensure_eq!(host.release(&lease).await?, Released::Freed, "release");
    let state = host.state(lease.port).await?;
    ensure_eq!(
        (state.lease, state.location),
        (None, VfLocation::Host),
        "the VF whose namespace is gone"
    );
    ensure_eq!(
        host.lease("next").await?.port,
        lease.port,
        "port of the next lease"
    );
    Ok(())
}

pub(in crate::conformance) async fn a_release_tries_the_steps_behind_one_that_fails(
    rig: &dyn Rig,
) -> CaseResult {
    let host = Host::of(rig);
    let clean = host.vf()?.list().await?;
    let lease = host.lease("pod").await?;
    let leased = host.state(lease.port).await?;
    host.configure(&lease, mac(4)).await?;
    let (_, place) = place(rig, "net1").await?;
    host.vf()?.attach(host.fence(), &lease, &place).await?;
    sabotage(rig)?.jam(lease.port, true).await?;
    if let Ok(released) = host.vf()?.release(host.fence(), &lease, ResetLevel::Config).await {
        return Err(Halt::failed(format!("a jammed VF was {released:?}")));
    }
    let state = host.state(lease.port).await?;
    ensure_eq!(
        state.admin_mac,
        leased.admin_mac,
        "administrative MAC: it is restored though the VF did not come home"
    );
    sabotage(rig)?.jam(lease.port, false).await?;
    ensure_eq!(
        host.release(&lease).await?,
        Released::Freed,
        "release when nothing is jammed"
    );
    ensure_eq!(host.vf()?.list().await?, clean, "VFs after it");
    Ok(())
}

pub(in crate::conformance) async fn a_release_tells_every_step_that_failed(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let clean = host.vf()?.list().await?;
    let lease = host.lease("pod").await?;
    host.configure(&lease, mac(4)).await?;
    let (_, place) = place(rig, "net1").await?;
    host.vf()?.attach(host.fence(), &lease, &place).await?;
    let port = lease.port;
    disturb(rig, Disturbance::AttributesFail { port, fail: true }).await?;
    sabotage(rig)?.jam(port, true).await?;
    let error = match host.vf()?.release(host.fence(), &lease, ResetLevel::Config).await {
        Ok(released) => return Err(Halt::failed(format!("a broken VF was {released:?}"))),
        Err(error) => error,
    };
    ensure_eq!(error.effect, Effect::Partial, "effect of the failure");
    let told = std::error::Error::source(&error).map_or(0, failures);
    ensure!(told >= 2, "two steps failed, the error lists {told}: {error}");
    ensure_eq!(
        host.leases().await?,
        vec![lease.clone()],
        "leases after the failure"
    );
    sabotage(rig)?.jam(port, false).await?;
    disturb(rig, Disturbance::AttributesFail { port, fail: false }).await?;
    ensure_eq!(
        host.release(&lease).await?,
        Released::Freed,
        "release when nothing is broken"
    );
    ensure_eq!(host.vf()?.list().await?, clean, "VFs after it");
    Ok(())
}

/// How many failures a teardown's error lists; as text, when it came through an interface that carries texts.
fn failures(source: &(dyn std::error::Error + 'static)) -> usize {
    match source.downcast_ref::<TeardownErrors>() {
        Some(errors) => errors.0.len(),
        None => source.to_string().split("; ").count(),
    }
}
