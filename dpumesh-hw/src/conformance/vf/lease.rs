//! Getting a VF: who gets which, and what a lease is worth.

use std::path::PathBuf;

use dpumesh_core::vf::{Attachment, LeaseOwner, ResetLevel, VfConfig, VfLocation, VfRequest};
use dpumesh_core::{AttachmentKinds, BackendExt, Epoch, ErrorKind, Fence, PfIndex, PortRef};

use super::Host;
use crate::conformance::Rig;
use crate::conformance::check::{CaseResult, Halt, cancelled, ensure, ensure_eq, refused, refused_as};

pub(in crate::conformance) async fn lease_gives_the_lowest_index_that_fits(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let mut free: Vec<PortRef> = host.vf()?.list().await?.iter().map(|state| state.port).collect();
    free.sort();
    for (i, port) in free.into_iter().take(3).enumerate() {
        ensure_eq!(
            host.lease(&format!("pod{i}")).await?.port,
            port,
            "port of lease {i}"
        );
    }
    Ok(())
}

pub(in crate::conformance) async fn a_freed_lower_index_is_given_again(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let first = host.lease("first").await?;
    host.lease("second").await?;
    host.release(&first).await?;
    ensure_eq!(
        host.lease("third").await?.port,
        first.port,
        "port of the next lease"
    );
    Ok(())
}

pub(in crate::conformance) async fn the_same_owner_gets_the_same_lease(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let lease = host.lease("pod").await?;
    ensure_eq!(host.lease("pod").await?, lease, "lease of the same owner");
    ensure_eq!(host.leases().await?, vec![lease], "leases listed");
    Ok(())
}

pub(in crate::conformance) async fn a_lease_names_card_port_owner_and_epoch(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let lease = host.lease("pod").await?;
    ensure_eq!(lease.dpu, host.backend.info().dpu, "card");
    ensure_eq!(lease.owner, LeaseOwner("pod".into()), "owner");
    ensure_eq!(lease.epoch, host.backend.epoch(), "epoch");
    ensure!(lease.port.is_vf(), "a lease of {}, which is no VF", lease.port);
    ensure_eq!(host.state(lease.port).await?.lease, Some(lease), "lease listed");
    Ok(())
}

pub(in crate::conformance) async fn a_lease_number_is_never_given_twice(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let mut seen = std::collections::BTreeSet::new();
    for i in 0..5 {
        let lease = host.lease(&format!("pod{}", i % 2)).await?;
        ensure!(seen.insert(lease.id), "number {} was given twice", lease.id.0);
        host.release(&lease).await?;
    }
    Ok(())
}

pub(in crate::conformance) async fn an_empty_owner_is_invalid(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let answer = host.vf()?.lease(host.fence(), &VfRequest::new("")).await;
    let error = refused(answer, "vf.lease", ErrorKind::Invalid)?;
    let field = error.object.as_ref().map_or("", |object| &object.field);
    ensure!(
        field.ends_with("owner"),
        "the error names field `{field}`, not the owner"
    );
    ensure!(host.leases().await?.is_empty(), "a refused request left a lease");
    Ok(())
}

pub(in crate::conformance) async fn when_no_vf_is_free_the_error_names_vf(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let count = host.vf()?.list().await?.len();
    for i in 0..count {
        host.lease(&format!("pod{i}")).await?;
    }
    let answer = host
        .vf()?
        .lease(host.fence(), &VfRequest::new("one-too-many"))
        .await;
    let error = refused(answer, "vf.lease", ErrorKind::CapacityExceeded)?;
    let name = error.object.as_ref().map_or("", |object| &object.name);
    ensure_eq!(name, "vf", "resource that the error names");
    ensure_eq!(host.leases().await?.len(), count, "leases listed");
    Ok(())
}

pub(in crate::conformance) async fn a_selector_that_fits_none_is_not_found(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let mut request = VfRequest::new("pod");
    request.selector.port = Some(PortRef::vf(u16::MAX));
    let answer = host.vf()?.lease(host.fence(), &request).await;
    refused(answer, "vf.lease", ErrorKind::NotFound)?;
    let mut request = VfRequest::new("pod");
    request.selector.pf = Some(PfIndex(u16::MAX));
    let answer = host.vf()?.lease(host.fence(), &request).await;
    refused(answer, "vf.lease", ErrorKind::NotFound)?;
    Ok(())
}

pub(in crate::conformance) async fn a_selector_picks_its_port(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let Some(last) = host.vf()?.list().await?.iter().map(|state| state.port).max() else {
        return Err(Halt::failed("the card lists no VF"));
    };
    let mut request = VfRequest::new("pod");
    request.selector.port = Some(last);
    let lease = host.vf()?.lease(host.fence(), &request).await?;
    ensure_eq!(lease.port, last, "port");
    Ok(())
}

pub(in crate::conformance) async fn a_selector_picks_by_pci_address_and_driver(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let states = host.vf()?.list().await?;
    let Some((port, pci)) = states
        .iter()
        .rev()
        .find_map(|state| state.pci.map(|pci| (state.port, pci)))
    else {
        return Err(Halt::not_supported("vf.pci", "the VFs have no PCI address"));
    };
    let mut request = VfRequest::new("pod");
    request.selector.driver = Some("no-such-driver".into());
    let answer = host.vf()?.lease(host.fence(), &request).await;
    refused(answer, "vf.lease", ErrorKind::NotFound)?;
    let mut request = VfRequest::new("pod");
    request.selector.pci = Some(pci);
    let lease = host.vf()?.lease(host.fence(), &request).await?;
    ensure_eq!(lease.port, port, "port of the lease at {pci}");
    Ok(())
}

pub(in crate::conformance) async fn concurrent_leases_are_different_vfs(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let vf = host.vf()?;
    let requests: Vec<VfRequest> = ["a", "b", "a"].map(VfRequest::new).into();
    let fence = host.fence();
    let (a, b, again) = tokio::join!(
        vf.lease(fence, &requests[0]),
        vf.lease(fence, &requests[1]),
        vf.lease(fence, &requests[2])
    );
    let (a, b, again) = (a?, b?, again?);
    ensure!(a.port != b.port && a.id != b.id, "two owners share {}", a.port);
    ensure_eq!(again, a, "lease of the same owner");
    Ok(())
}

pub(in crate::conformance) async fn cancelling_a_lease_leaves_what_list_shows(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let request = VfRequest::new("pod");
    cancelled(host.vf()?.lease(host.fence(), &request)).await;
    let before = host.leases().await?;
    let lease = host.lease("pod").await?;
    if let Some(left) = before.first() {
        ensure_eq!(lease, *left, "lease of the same owner");
    }
    ensure_eq!(host.leases().await?, vec![lease], "leases listed");
    Ok(())
}

pub(in crate::conformance) async fn list_shows_each_vf_once_within_the_limit(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let states = host.vf()?.list().await?;
    let limit = host.backend.capabilities().vf.max_vfs;
    ensure!(!states.is_empty(), "the card lists no VF");
    let mut of_pf = std::collections::BTreeMap::<_, u16>::new();
    let mut seen = std::collections::BTreeSet::new();
    for state in &states {
        ensure!(seen.insert(state.port), "{} is listed twice", state.port);
        let PortRef::Vf { controller, pf, .. } = state.port else {
            return Err(Halt::failed(format!("{} is no VF", state.port)));
        };
        let count = of_pf.entry((controller, pf)).or_default();
        *count += 1;
        ensure!(*count <= limit, "more VFs than vf.max_vfs = {limit}");
        ensure!(
            state.lease.is_none(),
            "a fresh card has a lease of {}",
            state.port
        );
        ensure_eq!(
            state.location,
            VfLocation::Host,
            "location of free {}",
            state.port
        );
    }
    Ok(())
}

pub(in crate::conformance) async fn a_lease_that_is_not_current_is_stale(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let old = host.lease("old").await?;
    host.release(&old).await?;
    let new = host.lease("new").await?;
    ensure_eq!(new.port, old.port, "port of the new lease");
    let before = host.state(new.port).await?;
    let (vf, fence) = (host.vf()?, host.fence());
    let config = VfConfig::default();
    refused(
        vf.configure(fence, &old, &config).await,
        "vf.configure",
        ErrorKind::Stale,
    )?;
    let place = Attachment::Netns {
        path: PathBuf::from("/run/netns/of-the-old-pod"),
        ifname: "net1".into(),
    };
    if host
        .backend
        .capabilities()
        .vf
        .attachments
        .contains(AttachmentKinds::NETNS)
    {
        refused(
            vf.attach(fence, &old, &place).await,
            "vf.attach",
            ErrorKind::Stale,
        )?;
    }
    refused(vf.detach(fence, &old).await, "vf.detach", ErrorKind::Stale)?;
    ensure_eq!(host.state(new.port).await?, before, "the new owner's VF");
    Ok(())
}

pub(in crate::conformance) async fn a_stale_fence_leases_and_changes_nothing(rig: &dyn Rig) -> CaseResult {
    let (host, soc) = (Host::of(rig), rig.soc());
    let lease = host.lease("pod").await?;
    let before = host.vf()?.list().await?;
    let (vf, old) = (host.vf()?, Fence(Epoch(host.backend.epoch().0.wrapping_sub(1))));
    let config = VfConfig::default();
    let request = VfRequest::new("other");
    let pf = PfIndex(0);
    refused(vf.lease(old, &request).await, "vf.lease", ErrorKind::Stale)?;
    refused(
        vf.configure(old, &lease, &config).await,
        "vf.configure",
        ErrorKind::Stale,
    )?;
    refused(vf.detach(old, &lease).await, "vf.detach", ErrorKind::Stale)?;
    let answer = vf.release(old, &lease, ResetLevel::Config).await;
    refused(answer, "vf.release", ErrorKind::Stale)?;
    let answer = vf.reclaim(old, lease.port, &[], ResetLevel::Config).await;
    refused(answer, "vf.reclaim", ErrorKind::Stale)?;
    if host.backend.capabilities().vf.resizable {
        refused(
            vf.set_vf_count(old, pf, 1).await,
            "vf.set_vf_count",
            ErrorKind::Stale,
        )?;
    }
    ensure_eq!(vf.list().await?, before, "VFs after the refusals");
    if let Some(vf) = soc.vf() {
        refused(vf.admit(old, &lease).await, "vf.admit", ErrorKind::Stale)?;
        refused(vf.revoke(old, &lease).await, "vf.revoke", ErrorKind::Stale)?;
    }
    Ok(())
}

pub(in crate::conformance) async fn occupancy_of_vf_is_the_number_of_leases(rig: &dyn Rig) -> CaseResult {
    let (host, soc) = (Host::of(rig), rig.soc());
    let steering = soc.require_steering()?;
    let used = |all: Vec<dpumesh_core::steering::Occupancy>| {
        all.into_iter()
            .find(|each| each.resource == "vf")
            .map(|each| (each.used, each.limit))
    };
    let count = host.vf()?.list().await?.len() as u64;
    let Some(before) = used(steering.occupancy().await?) else {
        return Err(Halt::not_supported(
            "occupancy.vf",
            "the card does not tell how many VFs are leased",
        ));
    };
    ensure_eq!(before, (0, count), "used and limit of `vf` on a fresh card");
    let lease = host.lease("pod").await?;
    ensure_eq!(
        used(steering.occupancy().await?),
        Some((1, count)),
        "used and limit with a lease"
    );
    host.release(&lease).await?;
    ensure_eq!(
        used(steering.occupancy().await?),
        Some((0, count)),
        "used and limit after the release"
    );
    Ok(())
}

pub(in crate::conformance) async fn refusals_of_a_lease_say_never_or_after_free(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let count = host.vf()?.list().await?.len();
    for i in 0..count {
        host.lease(&format!("pod{i}")).await?;
    }
    let answer = host.vf()?.lease(host.fence(), &VfRequest::new("late")).await;
    let error = refused_as(answer, "vf.lease", &[ErrorKind::CapacityExceeded])?;
    ensure_eq!(
        error.retry,
        dpumesh_core::Retry::AfterFree,
        "advice when none is free"
    );
    let lease = host.lease("pod0").await?;
    host.release(&lease).await?;
    host.lease("late").await?;
    Ok(())
}
