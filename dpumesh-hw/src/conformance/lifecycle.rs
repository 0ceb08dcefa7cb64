//! Who a backend is and what survives its card's and its process's end: the sentences of [`dpumesh_core::Backend`] and of
//! epochs.

use dpumesh_core::steering::{Batch, Cookie, MissPolicy};
use dpumesh_core::vf::{Attachment, Released, ResetLevel, VfConfig, VfLease, VfRequest};
use dpumesh_core::{
    BackendExt, ErrorKind, FlowSteeringExt, Frame, OffloadCapabilities, PortCapabilities,
    SteeringCapabilities, TransportCapabilities, VfAttributes, VfCapabilities,
};

use super::check::{CaseResult, Halt, ensure, ensure_eq, refused};
use super::probe::{admitted, frame};
use super::sample::{MINE, NO_PORT, Sampler, fence_of};
use super::{Crash, Reset, Rig};

fn reset(rig: &dyn Rig) -> Result<&dyn Reset, Halt> {
    rig.reset()
        .ok_or_else(|| Halt::not_supported("rig.reset", "the fixture cannot reset the card"))
}

fn crash(rig: &dyn Rig) -> Result<&dyn Crash, Halt> {
    rig.crash()
        .ok_or_else(|| Halt::not_supported("rig.crash", "the fixture cannot crash the process"))
}

pub(super) async fn info_and_capabilities_are_constant(rig: &dyn Rig) -> CaseResult {
    for backend in [rig.host(), rig.soc()] {
        let (info, capabilities) = (backend.info(), backend.capabilities());
        ensure!(!info.name.is_empty(), "a backend without a name");
        ensure!(!info.dpu.0.is_empty(), "a card without a name");
        if let Some(vf) = backend.vf().filter(|_| info.role.is_host()) {
            let lease = vf.lease(backend.fence(), &VfRequest::new("pod")).await?;
            vf.release(backend.fence(), &lease, ResetLevel::Config).await?;
        }
        ensure_eq!(backend.info(), info, "info asked again");
        ensure_eq!(backend.capabilities(), capabilities, "capabilities asked again");
    }
    Ok(())
}

pub(super) async fn both_halves_are_of_one_card(rig: &dyn Rig) -> CaseResult {
    let (host, soc) = (rig.host(), rig.soc());
    ensure_eq!(host.info().dpu, soc.info().dpu, "card of the SoC's half");
    ensure!(
        host.info().role.is_host(),
        "the host's half has role {:?}",
        host.info().role
    );
    ensure!(
        soc.info().role.is_soc(),
        "the SoC's half has role {:?}",
        soc.info().role
    );
    ensure_eq!(host.epoch(), soc.epoch(), "epoch of the SoC's half");
    Ok(())
}

pub(super) async fn a_part_is_there_when_it_is_claimed(rig: &dyn Rig) -> CaseResult {
    for backend in [rig.host(), rig.soc()] {
        let claims = backend.capabilities();
        let role = backend.info().role;
        // A part without an ability is a lie, and so is an ability that no part of either half has.
        ensure!(
            backend.vf().is_none() || claims.vf != VfCapabilities::default(),
            "there is a vf part, but vf.* claims nothing"
        );
        ensure!(
            backend.steering().is_none() || claims.steering != SteeringCapabilities::default(),
            "there is a steering part, but steering.* claims nothing"
        );
        ensure!(
            backend.offload().is_none() || claims.offload != OffloadCapabilities::default(),
            "there is an offload part, but offload.* claims nothing"
        );
        ensure!(
            backend.transport().is_none() || claims.transport != TransportCapabilities::default(),
            "there is a transport part, but transport.* claims nothing"
        );
        ensure!(
            backend.ports().is_none() || claims.ports != PortCapabilities::default(),
            "there is a ports part, but ports.* claims nothing"
        );
        ensure!(
            backend.ports().is_none() || role.is_soc(),
            "a backend of role {role:?} sees frames of ports"
        );
        if role.is_soc() {
            let claimed = [
                (
                    "steering",
                    claims.steering != SteeringCapabilities::default(),
                    backend.steering().is_some(),
                ),
                (
                    "offload",
                    claims.offload != OffloadCapabilities::default(),
                    backend.offload().is_some(),
                ),
                (
                    "ports",
                    claims.ports != PortCapabilities::default(),
                    backend.ports().is_some(),
                ),
            ];
            for (part, claimed, there) in claimed {
                ensure!(
                    !claimed || there,
                    "{part}.* claims something, but there is no such part"
                );
            }
        }
        if role.is_host() {
            ensure!(
                claims.vf == VfCapabilities::default() || backend.vf().is_some(),
                "vf.* claims something, but there is no such part"
            );
        }
    }
    Ok(())
}

pub(super) async fn a_lost_card_fails_every_call_fast(rig: &dyn Rig) -> CaseResult {
    let (host, soc) = (rig.host(), rig.soc());
    let lease = match host.vf() {
        Some(vf) => Some(vf.lease(host.fence(), &VfRequest::new("pod")).await?),
        None => None,
    };
    let epoch = soc.epoch();
    reset(rig)?.lose().await?;
    let lost = ErrorKind::DeviceLost;
    if let (Some(vf), Some(lease)) = (host.vf(), &lease) {
        let fence = host.fence();
        refused(vf.list().await, "vf.list", lost)?;
        refused(vf.lease(fence, &VfRequest::new("late")).await, "vf.lease", lost)?;
        let config = VfConfig::default();
        refused(vf.configure(fence, lease, &config).await, "vf.configure", lost)?;
        refused(vf.detach(fence, lease).await, "vf.detach", lost)?;
        refused(
            vf.release(fence, lease, ResetLevel::Config).await,
            "vf.release",
            lost,
        )?;
        let answer = vf.reclaim(fence, lease.port, &[], ResetLevel::Config).await;
        refused(answer, "vf.reclaim", lost)?;
    }
    let fence = soc.fence();
    if let (Some(vf), Some(lease)) = (soc.vf(), &lease) {
        refused(vf.admit(fence, lease).await, "vf.admit", lost)?;
        refused(vf.revoke(fence, lease).await, "vf.revoke", lost)?;
    }
    if let Some(steering) = soc.steering() {
        refused(steering.validate(&[]).await, "steering.validate", lost)?;
        refused(
            steering.apply(fence, &Batch::new(Vec::new())).await,
            "steering.apply",
            lost,
        )?;
        refused(steering.list(MINE).await, "steering.list", lost)?;
        refused(
            steering.counters(MINE, &[Cookie(1)]).await,
            "steering.counters",
            lost,
        )?;
        refused(steering.flush(fence, MINE).await, "steering.flush", lost)?;
        let answer = steering.set_miss_policy(fence, NO_PORT, MissPolicy::Drop).await;
        refused(answer, "steering.set_miss_policy", lost)?;
        refused(steering.occupancy().await, "steering.occupancy", lost)?;
    }
    if let Some(offload) = soc.offload() {
        refused(offload.programs().await, "offload.programs", lost)?;
        refused(offload.tables().await, "offload.tables", lost)?;
        refused(offload.stats().await, "offload.stats", lost)?;
        let slot = dpumesh_core::offload::Slot(0);
        refused(offload.activate(fence, slot).await, "offload.activate", lost)?;
        refused(offload.unload(fence, slot).await, "offload.unload", lost)?;
    }
    if let Some(ports) = soc.ports() {
        refused(ports.list().await, "ports.list", lost)?;
        refused(ports.open(fence, NO_PORT).await, "ports.open", lost)?;
    }
    ensure_eq!(soc.epoch(), epoch, "epoch while the card is away: the last one");
    Ok(())
}

pub(super) async fn the_error_of_a_lost_card_says_after_reset(rig: &dyn Rig) -> CaseResult {
    let soc = rig.soc();
    let steering = soc.require_steering()?;
    reset(rig)?.lose().await?;
    let error = refused(steering.list(MINE).await, "steering.list", ErrorKind::DeviceLost)?;
    ensure_eq!(error.retry, dpumesh_core::Retry::AfterReset, "advice");
    reset(rig)?.bring_back().await?;
    steering.list(MINE).await?;
    Ok(())
}

pub(super) async fn the_epoch_grows_with_each_return(rig: &dyn Rig) -> CaseResult {
    for _ in 0..3 {
        let before = [rig.host().epoch(), rig.soc().epoch()];
        reset(rig)?.lose().await?;
        reset(rig)?.bring_back().await?;
        let after = [rig.host().epoch(), rig.soc().epoch()];
        ensure!(
            after[0] > before[0] && after[1] > before[1],
            "epochs {before:?} of host and SoC became {after:?}"
        );
    }
    Ok(())
}

pub(super) async fn a_fence_of_the_former_life_is_stale(rig: &dyn Rig) -> CaseResult {
    let (host, soc) = (rig.host(), rig.soc());
    let (old_host, old_soc) = (fence_of(&*host), fence_of(&*soc));
    reset(rig)?.lose().await?;
    reset(rig)?.bring_back().await?;
    if let Some(vf) = host.vf() {
        let answer = vf.lease(old_host, &VfRequest::new("pod")).await;
        refused(answer, "vf.lease", ErrorKind::Stale)?;
        ensure!(
            vf.list().await?.iter().all(|state| state.lease.is_none()),
            "a stale fence leased a VF"
        );
        vf.lease(host.fence(), &VfRequest::new("pod")).await?;
    }
    if soc.steering().is_some() {
        let sample = Sampler::new(rig).await?;
        let steering = soc.require_steering()?;
        let answer = steering.add(old_soc, sample.rule(1)).await;
        refused(answer, "steering.apply", ErrorKind::Stale)?;
        ensure!(
            steering.list(MINE).await?.is_empty(),
            "a stale fence installed a rule"
        );
        steering.add(soc.fence(), sample.rule(1)).await?;
    }
    Ok(())
}

async fn leases(rig: &dyn Rig) -> Result<Vec<VfLease>, Halt> {
    let host = rig.host();
    let states = host.require_vf()?.list().await?;
    Ok(states.into_iter().filter_map(|state| state.lease).collect())
}

pub(super) async fn a_lease_of_the_former_life_touches_nothing(rig: &dyn Rig) -> CaseResult {
    let host = rig.host();
    let old = host
        .require_vf()?
        .lease(host.fence(), &VfRequest::new("old"))
        .await?;
    reset(rig)?.lose().await?;
    reset(rig)?.bring_back().await?;
    let (vf, fence) = (host.require_vf()?, host.fence());
    for lease in leases(rig).await? {
        ensure_eq!(lease.epoch, host.epoch(), "epoch of a lease that survived");
    }
    let config = VfConfig::default();
    refused(
        vf.configure(fence, &old, &config).await,
        "vf.configure",
        ErrorKind::Stale,
    )?;
    if let Some(vf) = rig.soc().vf() {
        let answer = vf.admit(rig.soc().fence(), &old).await;
        refused(answer, "vf.admit", ErrorKind::Stale)?;
    }
    let new = vf.lease(fence, &VfRequest::new("new")).await?;
    ensure_eq!(new.epoch, host.epoch(), "epoch of a new lease");
    ensure!(new.id != old.id, "a lease number was given twice");
    let before = vf.list().await?;
    let released = vf.release(fence, &old, ResetLevel::Config).await?;
    ensure_eq!(released, Released::NotCurrent, "late release of the old lease");
    ensure_eq!(vf.list().await?, before, "VFs after the late release");
    if host
        .capabilities()
        .vf
        .attachments
        .contains(dpumesh_core::AttachmentKinds::NETNS)
    {
        let place = Attachment::Netns {
            path: "/run/netns/of-the-old-pod".into(),
            ifname: "net1".into(),
        };
        refused(
            vf.attach(fence, &old, &place).await,
            "vf.attach",
            ErrorKind::Stale,
        )?;
    }
    Ok(())
}

pub(super) async fn rules_of_the_former_life_are_gone_or_listed(rig: &dyn Rig) -> CaseResult {
    let soc = rig.soc();
    let sample = Sampler::new(rig).await?;
    let steering = soc.require_steering()?;
    steering.add(soc.fence(), sample.counting(1)).await?;
    steering.add(soc.fence(), sample.rule(2)).await?;
    reset(rig)?.lose().await?;
    reset(rig)?.bring_back().await?;
    let survivors = steering.list(MINE).await?;
    for (rule, cookie) in [(sample.counting(1), 1), (sample.rule(2), 2)] {
        let listed = survivors.iter().find(|each| each.rule.cookie == Cookie(cookie));
        let change = steering.add(soc.fence(), rule.clone()).await?;
        match (listed, &change) {
            (None, dpumesh_core::steering::Change::Added(_)) => {}
            (Some(listed), dpumesh_core::steering::Change::Present(_)) => {
                ensure_eq!(listed.rule, rule, "rule that survived");
            }
            _ => {
                return Err(Halt::failed(format!(
                    "replaying cookie {cookie} gave {change:?}, list said {listed:?}"
                )));
            }
        }
    }
    let counters = steering.counters(MINE, &[Cookie(1)]).await?;
    let Some(counters) = counters[0] else {
        return Err(Halt::failed("no counters of a counting rule"));
    };
    ensure_eq!(counters.epoch, soc.epoch(), "life of the card of the counters");
    ensure_eq!(counters.packets, 0, "frames counted in the new life");
    Ok(())
}

pub(super) async fn an_admission_ends_with_the_cards_life(rig: &dyn Rig) -> CaseResult {
    let soc = rig.soc();
    let lease = admitted(rig, "pod").await?;
    reset(rig)?.lose().await?;
    reset(rig)?.bring_back().await?;
    let survives = leases(rig).await?.contains(&lease);
    ensure!(!survives, "a lease of the former life is listed as current");
    let answer = soc.require_ports()?.open(soc.fence(), lease.port).await;
    refused(answer, "ports.open", ErrorKind::Denied)?;
    Ok(())
}

pub(super) async fn an_open_port_ends_with_device_lost(rig: &dyn Rig) -> CaseResult {
    let soc = rig.soc();
    let lease = admitted(rig, "pod").await?;
    let mut port = soc.require_ports()?.open(soc.fence(), lease.port).await?;
    reset(rig)?.lose().await?;
    let mut frames = [Frame::copy_of(&frame(1))];
    let answer = port.receive(&mut frames).map_err(|error| error.kind);
    ensure_eq!(
        answer,
        Err(ErrorKind::DeviceLost),
        "receive while the card is away"
    );
    let mut frames = [Frame::copy_of(&frame(1))];
    let answer = port.transmit(&mut frames).map_err(|error| error.kind);
    ensure_eq!(
        answer,
        Err(ErrorKind::DeviceLost),
        "transmit while the card is away"
    );
    reset(rig)?.bring_back().await?;
    let answer = port.receive(&mut [Frame::new()]).map_err(|error| error.kind);
    ensure_eq!(
        answer,
        Err(ErrorKind::DeviceLost),
        "receive on a port of the former life"
    );
    Ok(())
}

pub(super) async fn a_lease_survives_its_process(rig: &dyn Rig) -> CaseResult {
    let (lease, before) = {
        let host = rig.host();
        let vf = host.require_vf()?;
        let lease = vf.lease(host.fence(), &VfRequest::new("pod")).await?;
        if host.capabilities().vf.attributes.contains(VfAttributes::MAC) {
            let config = VfConfig {
                mac: Some(dpumesh_core::MacAddr([2, 0xc4, 0, 0, 0, 1])),
                ..VfConfig::default()
            };
            vf.configure(host.fence(), &lease, &config).await?;
        }
        (lease, vf.list().await?)
    };
    let listed = before.iter().any(|state| state.lease.as_ref() == Some(&lease));
    ensure!(listed, "the lease is not listed even before the crash");
    crash(rig)?.crash().await?;
    let host = rig.host();
    let vf = host.require_vf()?;
    ensure_eq!(vf.list().await?, before, "VFs as the new process sees them");
    let again = vf.lease(host.fence(), &VfRequest::new("pod")).await?;
    ensure_eq!(again, lease, "lease of the same owner");
    let other = vf.lease(host.fence(), &VfRequest::new("other")).await?;
    ensure!(other.id != lease.id, "a lease number was given twice");
    Ok(())
}

pub(super) async fn a_new_process_releases_what_the_old_one_leased(rig: &dyn Rig) -> CaseResult {
    let (lease, clean) = {
        let host = rig.host();
        let vf = host.require_vf()?;
        let clean = vf.list().await?;
        let lease = vf.lease(host.fence(), &VfRequest::new("pod")).await?;
        if host.capabilities().vf.attributes.contains(VfAttributes::MAC) {
            let config = VfConfig {
                mac: Some(dpumesh_core::MacAddr([2, 0xc4, 0, 0, 0, 1])),
                ..VfConfig::default()
            };
            vf.configure(host.fence(), &lease, &config).await?;
        }
        (lease, clean)
    };
    crash(rig)?.crash().await?;
    let host = rig.host();
    let vf = host.require_vf()?;
    let released = vf.release(host.fence(), &lease, ResetLevel::Config).await?;
    ensure_eq!(released, Released::Freed, "release by the new process");
    ensure_eq!(vf.list().await?, clean, "VFs after the release");
    Ok(())
}

pub(super) async fn rules_after_a_crash_are_what_list_shows(rig: &dyn Rig) -> CaseResult {
    let sample = Sampler::new(rig).await?;
    {
        let soc = rig.soc();
        soc.require_steering()?.add(soc.fence(), sample.rule(1)).await?;
    }
    crash(rig)?.crash().await?;
    let soc = rig.soc();
    let steering = soc.require_steering()?;
    let listed = steering.list(MINE).await?;
    let change = steering.add(soc.fence(), sample.rule(1)).await?;
    ensure_eq!(
        matches!(change, dpumesh_core::steering::Change::Present(_)),
        !listed.is_empty(),
        "replaying a rule after a crash gave {change:?}, list said {listed:?}"
    );
    Ok(())
}

pub(super) async fn programs_of_the_former_life_are_gone_or_listed(rig: &dyn Rig) -> CaseResult {
    let soc = rig.soc();
    let offload = soc.require_offload()?;
    let programs = rig.programs();
    let slots = offload.programs().await?;
    let (Some(program), Some(info)) = (programs.first(), slots.last()) else {
        return Err(Halt::not_supported("rig.programs", "no program or no slot"));
    };
    offload.load(soc.fence(), info.slot, program).await?;
    offload.activate(soc.fence(), info.slot).await?;
    reset(rig)?.lose().await?;
    reset(rig)?.bring_back().await?;
    let listed = offload.programs().await?;
    let running = |state| state == dpumesh_core::offload::ProgramState::Running;
    let survived = listed.iter().any(|info| running(info.state));
    let tables = offload.tables().await?;
    ensure!(
        survived || tables.is_empty(),
        "no program runs, yet it has tables {tables:?}"
    );
    ensure_eq!(
        offload.stats().await?.connections,
        0,
        "connections carried in the new life"
    );
    // Replaying works either way.
    offload.load(soc.fence(), info.slot, program).await?;
    offload.activate(soc.fence(), info.slot).await?;
    Ok(())
}
