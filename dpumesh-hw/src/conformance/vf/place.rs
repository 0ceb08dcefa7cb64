//! Where a leased VF is used: attaching and detaching.

use std::path::PathBuf;

use dpumesh_core::vf::{Attachment, Released, VfLocation};
use dpumesh_core::{AttachmentKinds, ErrorKind};

use super::Host;
use crate::conformance::check::{CaseResult, Halt, ensure, ensure_eq, refused};
use crate::conformance::{Namespaces, Rig};

/// A namespace and the attachment to it under a name.
pub(super) async fn place(rig: &dyn Rig, ifname: &str) -> Result<(PathBuf, Attachment), Halt> {
    let path = namespaces(rig)?.fresh().await?;
    let attachment = Attachment::Netns {
        path: path.clone(),
        ifname: ifname.into(),
    };
    Ok((path, attachment))
}

fn namespaces(rig: &dyn Rig) -> Result<&dyn Namespaces, Halt> {
    rig.namespaces()
        .ok_or_else(|| Halt::not_supported("rig.namespaces", "the fixture makes no namespaces"))
}

pub(in crate::conformance) async fn attach_moves_the_vf(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let lease = host.lease("pod").await?;
    let (path, place) = place(rig, "net1").await?;
    let attached = host.vf()?.attach(host.fence(), &lease, &place).await?;
    let state = host.state(lease.port).await?;
    ensure_eq!(state.location, VfLocation::Netns { path }, "location");
    ensure_eq!(attached.mac, state.effective_mac, "effective MAC");
    ensure_eq!(attached.mtu, state.mtu, "effective MTU");
    ensure!(
        attached.ifindex.is_some_and(|index| index > 0),
        "a network device without an interface index"
    );
    Ok(())
}

pub(in crate::conformance) async fn attaching_to_where_it_is_succeeds(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let lease = host.lease("pod").await?;
    let (_, place) = place(rig, "net1").await?;
    let first = host.vf()?.attach(host.fence(), &lease, &place).await?;
    let second = host.vf()?.attach(host.fence(), &lease, &place).await?;
    ensure_eq!(second, first, "the attached VF");
    Ok(())
}

pub(in crate::conformance) async fn attaching_elsewhere_is_busy(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let lease = host.lease("pod").await?;
    let (path, here) = place(rig, "net1").await?;
    let (_, there) = place(rig, "net1").await?;
    host.vf()?.attach(host.fence(), &lease, &here).await?;
    let answer = host.vf()?.attach(host.fence(), &lease, &there).await;
    refused(answer, "vf.attach", ErrorKind::Busy)?;
    let state = host.state(lease.port).await?;
    ensure_eq!(state.location, VfLocation::Netns { path }, "location");
    Ok(())
}

pub(in crate::conformance) async fn a_missing_namespace_is_not_found(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let lease = host.lease("pod").await?;
    let (path, place) = place(rig, "net1").await?;
    namespaces(rig)?.remove(&path).await?;
    let before = host.state(lease.port).await?;
    let answer = host.vf()?.attach(host.fence(), &lease, &place).await;
    refused(answer, "vf.attach", ErrorKind::NotFound)?;
    ensure_eq!(host.state(lease.port).await?, before, "state after the refusal");
    Ok(())
}

pub(in crate::conformance) async fn a_taken_interface_name_exists(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let (first, second) = (host.lease("first").await?, host.lease("second").await?);
    let (_, place) = place(rig, "net1").await?;
    host.vf()?.attach(host.fence(), &first, &place).await?;
    let before = host.state(second.port).await?;
    let answer = host.vf()?.attach(host.fence(), &second, &place).await;
    refused(answer, "vf.attach", ErrorKind::Exists)?;
    ensure_eq!(host.state(second.port).await?, before, "state after the refusal");
    Ok(())
}

pub(in crate::conformance) async fn an_interface_name_has_at_most_15_octets(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let lease = host.lease("pod").await?;
    let (path, _) = place(rig, "net1").await?;
    for ifname in ["sixteen-octets-x", ""] {
        let place = Attachment::Netns {
            path: path.clone(),
            ifname: ifname.into(),
        };
        let answer = host.vf()?.attach(host.fence(), &lease, &place).await;
        refused(answer, "vf.attach", ErrorKind::Invalid)?;
    }
    let place = Attachment::Netns {
        path,
        ifname: "fifteen-octets-".into(),
    };
    host.vf()?.attach(host.fence(), &lease, &place).await?;
    Ok(())
}

pub(in crate::conformance) async fn an_unclaimed_attachment_is_unsupported(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let missing = AttachmentKinds::all() - host.backend.capabilities().vf.attachments;
    let lease = host.lease("pod").await?;
    let before = host.state(lease.port).await?;
    for kind in missing.iter() {
        let place = match kind {
            AttachmentKinds::NETNS => Attachment::Netns {
                path: PathBuf::from("/run/netns/somewhere"),
                ifname: "net1".into(),
            },
            AttachmentKinds::VFIO => Attachment::Vfio,
            _ => Attachment::VhostUser {
                socket: PathBuf::from("/run/vhost-user.sock"),
            },
        };
        let answer = host.vf()?.attach(host.fence(), &lease, &place).await;
        refused(answer, "vf.attach", ErrorKind::Unsupported)?;
        ensure_eq!(host.state(lease.port).await?, before, "state after the refusal");
    }
    Ok(())
}

pub(in crate::conformance) async fn detach_brings_the_vf_back(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let lease = host.lease("pod").await?;
    let (_, place) = place(rig, "net1").await?;
    host.vf()?.attach(host.fence(), &lease, &place).await?;
    host.vf()?.detach(host.fence(), &lease).await?;
    let state = host.state(lease.port).await?;
    ensure_eq!(state.location, VfLocation::Host, "location");
    ensure_eq!(state.lease, Some(lease.clone()), "lease");
    // And it can be attached again.
    host.vf()?.attach(host.fence(), &lease, &place).await?;
    Ok(())
}

pub(in crate::conformance) async fn detaching_twice_succeeds(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let lease = host.lease("pod").await?;
    host.vf()?.detach(host.fence(), &lease).await?;
    host.vf()?.detach(host.fence(), &lease).await?;
    Ok(())
}

pub(in crate::conformance) async fn detach_with_the_namespace_gone_succeeds(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let lease = host.lease("pod").await?;
    let (path, place) = place(rig, "net1").await?;
    host.vf()?.attach(host.fence(), &lease, &place).await?;
    namespaces(rig)?.remove(&path).await?;
    host.vf()?.detach(host.fence(), &lease).await?;
    ensure_eq!(host.release(&lease).await?, Released::Freed, "release");
    Ok(())
}
