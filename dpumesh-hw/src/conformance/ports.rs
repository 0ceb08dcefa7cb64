//! Frames of ports: the sentences of [`dpumesh_core::Ports`] and [`dpumesh_core::PortIo`].

use std::time::{Duration, Instant};

use dpumesh_core::vf::ResetLevel;
use dpumesh_core::{BackendExt, Epoch, ErrorKind, Fence, Frame, HEADROOM, PortIo, PortRef};

use super::Rig;
use super::check::{CaseResult, Halt, ensure, ensure_eq, refused};
use super::disturb::{Disturbance, disturb};
use super::probe::{ARRIVAL, admitted, frame, frame_with, tag_of, to_software};
use super::sample::{NO_PORT, some_port};

/// The next frame that a port gives within a time.
pub(super) async fn receive_one(port: &mut dyn PortIo, within: Duration) -> Result<Option<Vec<u8>>, Halt> {
    let begun = Instant::now();
    let mut frames = [Frame::new()];
    loop {
        if port.receive(&mut frames)? == 1 {
            return Ok(Some(frames[0].octets().to_vec()));
        }
        if begun.elapsed() > within {
            return Ok(None);
        }
        // A port may have no descriptor to wait for.
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Opens a port that may be opened: a VF's is admitted first.
async fn open(rig: &dyn Rig, owner: &str) -> Result<Box<dyn PortIo>, Halt> {
    let soc = rig.soc();
    let port = match rig.host().vf() {
        Some(_) => admitted(rig, owner).await?.port,
        None => some_port(rig).await?,
    };
    to_software(rig, port).await?;
    Ok(soc.require_ports()?.open(soc.fence(), port).await?)
}

pub(super) async fn list_of_ports_is_in_ascending_order(rig: &dyn Rig) -> CaseResult {
    let soc = rig.soc();
    let listed: Vec<PortRef> = soc
        .require_ports()?
        .list()
        .await?
        .iter()
        .map(|info| info.port)
        .collect();
    let mut sorted = listed.clone();
    sorted.sort();
    sorted.dedup();
    ensure_eq!(listed, sorted, "ports listed");
    if let Some(vf) = rig.host().vf() {
        for state in vf.list().await? {
            ensure!(
                listed.contains(&state.port),
                "{} exists but is not listed",
                state.port
            );
        }
    }
    Ok(())
}

pub(super) async fn an_open_port_tells_who_it_is_and_what_it_takes(rig: &dyn Rig) -> CaseResult {
    let lease = admitted(rig, "pod").await?;
    let soc = rig.soc();
    let port = soc.require_ports()?.open(soc.fence(), lease.port).await?;
    ensure_eq!(port.port(), lease.port, "port");
    let limits = port.limits();
    ensure!(
        limits.max_frame >= limits.mtu.frame_len() - 4,
        "max_frame {} is below the MTU of {}",
        limits.max_frame,
        limits.mtu
    );
    let claims = soc.capabilities().ports;
    ensure!(
        (claims.checksum_offload || !limits.checksum_offload)
            && (claims.tso || !limits.tso)
            && (claims.uso || !limits.uso),
        "the port offers {limits:?}, the capabilities {claims:?}"
    );
    ensure_eq!(port.limits(), limits, "limits asked again");
    ensure_eq!(port.refused(), 0, "refused frames of a fresh port");
    Ok(())
}

pub(super) async fn a_port_has_one_reader(rig: &dyn Rig) -> CaseResult {
    let soc = rig.soc();
    let first = open(rig, "pod").await?;
    let port = first.port();
    let answer = soc.require_ports()?.open(soc.fence(), port).await;
    refused(answer, "ports.open", ErrorKind::Busy)?;
    drop(first);
    soc.require_ports()?.open(soc.fence(), port).await?;
    Ok(())
}

pub(super) async fn opening_a_port_that_is_not_there_is_not_found(rig: &dyn Rig) -> CaseResult {
    let soc = rig.soc();
    let answer = soc.require_ports()?.open(soc.fence(), NO_PORT).await;
    refused(answer, "ports.open", ErrorKind::NotFound)?;
    Ok(())
}

pub(super) async fn a_vfs_port_is_denied_until_admitted_and_after_revoked(rig: &dyn Rig) -> CaseResult {
    let (host, soc) = (rig.host(), rig.soc());
    let request = dpumesh_core::vf::VfRequest::new("pod");
    let lease = host.require_vf()?.lease(host.fence(), &request).await?;
    let (ports, vf, fence) = (soc.require_ports()?, soc.require_vf()?, soc.fence());
    refused(
        ports.open(fence, lease.port).await,
        "ports.open",
        ErrorKind::Denied,
    )?;
    vf.admit(fence, &lease).await?;
    drop(ports.open(fence, lease.port).await?);
    vf.revoke(fence, &lease).await?;
    refused(
        ports.open(fence, lease.port).await,
        "ports.open",
        ErrorKind::Denied,
    )?;
    Ok(())
}

pub(super) async fn revoking_ends_open_frames_with_device_lost(rig: &dyn Rig) -> CaseResult {
    let soc = rig.soc();
    let lease = admitted(rig, "pod").await?;
    let mut port = soc.require_ports()?.open(soc.fence(), lease.port).await?;
    soc.require_vf()?.revoke(soc.fence(), &lease).await?;
    let mut frames = [Frame::copy_of(&frame(1))];
    let answer = port.receive(&mut frames).map_err(|error| error.kind);
    ensure_eq!(answer, Err(ErrorKind::DeviceLost), "receive on a revoked port");
    let mut frames = [Frame::copy_of(&frame(1))];
    let answer = port.transmit(&mut frames).map_err(|error| error.kind);
    ensure_eq!(answer, Err(ErrorKind::DeviceLost), "transmit on a revoked port");
    Ok(())
}

pub(super) async fn a_released_lease_opens_no_port(rig: &dyn Rig) -> CaseResult {
    let (host, soc) = (rig.host(), rig.soc());
    let lease = admitted(rig, "pod").await?;
    let answer = host
        .require_vf()?
        .release(host.fence(), &lease, ResetLevel::Config)
        .await;
    answer?;
    soc.require_vf()?.revoke(soc.fence(), &lease).await?;
    let answer = soc.require_ports()?.open(soc.fence(), lease.port).await;
    refused(answer, "ports.open", ErrorKind::Denied)?;
    Ok(())
}

pub(super) async fn a_stale_fence_opens_no_port(rig: &dyn Rig) -> CaseResult {
    let soc = rig.soc();
    let lease = admitted(rig, "pod").await?;
    let old = Fence(Epoch(soc.epoch().0.wrapping_sub(1)));
    let answer = soc.require_ports()?.open(old, lease.port).await;
    refused(answer, "ports.open", ErrorKind::Stale)?;
    drop(soc.require_ports()?.open(soc.fence(), lease.port).await?);
    Ok(())
}

pub(super) async fn nothing_waiting_is_zero_frames(rig: &dyn Rig) -> CaseResult {
    let mut port = open(rig, "pod").await?;
    let mut frames = [Frame::new(), Frame::new()];
    ensure_eq!(port.receive(&mut frames)?, 0, "frames of a silent port");
    ensure_eq!(port.receive(&mut [])?, 0, "frames into no room");
    ensure_eq!(port.transmit(&mut [])?, 0, "frames taken of none");
    Ok(())
}

pub(super) async fn frames_are_received_in_arrival_order(rig: &dyn Rig) -> CaseResult {
    let mut port = open(rig, "pod").await?;
    let Some(probe) = rig.probe() else {
        return Err(Halt::not_supported("rig.probe", "the fixture sends no frames"));
    };
    for tag in 1..=7 {
        probe.inject(port.port(), &frame(tag)).await?;
    }
    let begun = Instant::now();
    let mut found = Vec::new();
    let mut frames: Vec<Frame> = (0..3).map(|_| Frame::new()).collect();
    while found.len() < 7 && begun.elapsed() < ARRIVAL {
        for slot in &mut frames {
            slot.mark = 77;
            slot.fill(&[0xff; 9]);
        }
        let count = port.receive(&mut frames)?;
        ensure!(
            count <= frames.len(),
            "{count} frames into {} slots",
            frames.len()
        );
        for slot in &frames[..count] {
            ensure_eq!(slot.headroom(), HEADROOM, "headroom of a received frame");
            ensure_eq!(slot.mark, 0, "mark of a received frame");
            let tag = tag_of(slot.octets());
            ensure!(slot.octets() == frame(tag), "the octets of frame {tag} changed");
            found.push(tag);
        }
        if count == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    ensure_eq!(found, (1..=7).collect::<Vec<_>>(), "frames received");
    Ok(())
}

pub(super) async fn frames_are_transmitted_in_order(rig: &dyn Rig) -> CaseResult {
    let mut port = open(rig, "pod").await?;
    let Some(probe) = rig.probe() else {
        return Err(Halt::not_supported("rig.probe", "the fixture sends no frames"));
    };
    let mut frames: Vec<Frame> = (1..=5).map(|tag| Frame::copy_of(&frame(tag))).collect();
    ensure_eq!(port.transmit(&mut frames)?, 5, "frames taken");
    for tag in 1..=5 {
        let found = probe.observed(port.port(), ARRIVAL).await?;
        ensure!(
            found.as_deref() == Some(&frame(tag)[..]),
            "the function received {:?}, expected frame {tag}",
            found.as_deref().map(tag_of)
        );
    }
    Ok(())
}

pub(super) async fn dropping_a_port_loses_no_transmitted_frame(rig: &dyn Rig) -> CaseResult {
    let mut port = open(rig, "pod").await?;
    let Some(probe) = rig.probe() else {
        return Err(Halt::not_supported("rig.probe", "the fixture sends no frames"));
    };
    let name = port.port();
    ensure_eq!(
        port.transmit(&mut [Frame::copy_of(&frame(1))])?,
        1,
        "frames taken"
    );
    drop(port);
    let found = probe.observed(name, ARRIVAL).await?;
    ensure_eq!(found.as_deref().map(tag_of), Some(1), "frame at the function");
    Ok(())
}

pub(super) async fn a_frame_too_long_is_refused_counted_and_taken(rig: &dyn Rig) -> CaseResult {
    let mut port = open(rig, "pod").await?;
    let limit = port.limits().max_frame;
    let long = Frame::copy_of(&vec![0x02; limit + 1]);
    let mut frames = [Frame::copy_of(&frame(1)), long, Frame::copy_of(&frame(2))];
    ensure_eq!(port.transmit(&mut frames)?, 3, "frames taken");
    ensure_eq!(port.refused(), 1, "frames refused");
    let Some(probe) = rig.probe() else {
        return Ok(());
    };
    for tag in [1, 2] {
        let found = probe.observed(port.port(), ARRIVAL).await?;
        ensure_eq!(found.as_deref().map(tag_of), Some(tag), "frame at the function");
    }
    Ok(())
}

pub(super) async fn an_open_checksum_is_refused_where_it_is_not_offered(rig: &dyn Rig) -> CaseResult {
    let mut port = open(rig, "pod").await?;
    if port.limits().checksum_offload {
        return Err(Halt::not_supported(
            "ports.checksum_offload",
            "the port takes open checksums: nothing to refuse",
        ));
    }
    let mut open = Frame::copy_of(&frame(1));
    open.checksum = dpumesh_core::Checksum::Partial { start: 34, offset: 6 };
    ensure_eq!(port.transmit(&mut [open])?, 1, "frames taken");
    ensure_eq!(port.refused(), 1, "frames refused");
    Ok(())
}

pub(super) async fn a_super_frame_is_refused_where_it_is_not_offered(rig: &dyn Rig) -> CaseResult {
    let mut port = open(rig, "pod").await?;
    if port.limits().uso {
        return Err(Halt::not_supported(
            "ports.uso",
            "the port takes UDP super-frames: nothing to refuse",
        ));
    }
    let mut large = Frame::copy_of(&frame_with(1, 64, 800));
    large.gso = Some(dpumesh_core::Gso {
        kind: dpumesh_core::GsoKind::Udp,
        size: 400,
        header_len: 42,
        ecn: false,
    });
    ensure_eq!(port.transmit(&mut [large])?, 1, "frames taken");
    ensure_eq!(port.refused(), 1, "frames refused");
    Ok(())
}

pub(super) async fn the_descriptor_polls_readable_when_a_frame_waits(rig: &dyn Rig) -> CaseResult {
    let mut port = open(rig, "pod").await?;
    let Some(probe) = rig.probe() else {
        return Err(Halt::not_supported("rig.probe", "the fixture sends no frames"));
    };
    let Some(descriptor) = port.poll_fd() else {
        return Err(Halt::not_supported("ports.poll_fd", "the port must be polled"));
    };
    let descriptor = descriptor
        .try_clone_to_owned()
        .map_err(|error| Halt::failed(format!("the descriptor cannot be cloned: {error}")))?;
    probe.inject(port.port(), &frame(1)).await?;
    ensure!(
        readable(descriptor, ARRIVAL).await?,
        "the descriptor stays silent with a frame waiting"
    );
    let found = receive_one(&mut *port, ARRIVAL).await?;
    ensure_eq!(found.as_deref().map(tag_of), Some(1), "frame received");
    Ok(())
}

/// Waits until a descriptor polls readable; false when it did not within the time.
pub(super) async fn readable(descriptor: std::os::fd::OwnedFd, within: Duration) -> Result<bool, Halt> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::AsFd;
    let begun = Instant::now();
    loop {
        let mut fds = [PollFd::new(descriptor.as_fd(), PollFlags::POLLIN)];
        let ready = poll(&mut fds, PollTimeout::ZERO)
            .map_err(|error| Halt::failed(format!("poll on the descriptor: {error}")))?;
        if ready > 0 {
            return Ok(true);
        }
        if begun.elapsed() > within {
            return Ok(false);
        }
        // Polled in steps, not awaited: an epoll registration would hide a descriptor that is level-triggered wrongly.
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

pub(super) async fn the_claimed_number_of_ports_can_be_open(rig: &dyn Rig) -> CaseResult {
    let soc = rig.soc();
    let limit = soc.capabilities().ports.open as usize;
    ensure!(limit > 0, "ports.open is 0: no port could be opened");
    let ports = soc.require_ports()?;
    let vfs = match rig.host().vf() {
        Some(vf) => vf.list().await?.len(),
        None => 0,
    };
    for i in 0..vfs {
        admitted(rig, &format!("pod{i}")).await?;
    }
    let all: Vec<PortRef> = ports.list().await?.iter().map(|info| info.port).collect();
    let mut held = Vec::new();
    for port in &all {
        match ports.open(soc.fence(), *port).await {
            Ok(open) => held.push(open),
            Err(error) if error.kind == ErrorKind::CapacityExceeded && held.len() == limit => {
                let name = error.object.as_ref().map_or("", |object| &object.name);
                ensure_eq!(name, "ports.open", "resource that the error names");
                return Ok(());
            }
            Err(error) => {
                return Err(Halt::failed(format!(
                    "{} of {limit} ports are open, but {port}: {error}",
                    held.len()
                )));
            }
        }
        ensure!(
            held.len() <= limit,
            "{} ports are open, {limit} are claimed",
            held.len()
        );
    }
    if held.len() < limit {
        return Err(Halt::not_supported(
            "ports.open",
            format!("{limit} are claimed, the card has {} ports", all.len()),
        ));
    }
    Ok(())
}

pub(super) async fn an_error_comes_behind_the_frames_before_it(rig: &dyn Rig) -> CaseResult {
    let mut port = open(rig, "pod").await?;
    let Some(probe) = rig.probe() else {
        return Err(Halt::not_supported("rig.probe", "the fixture sends no frames"));
    };
    let name = port.port();
    for tag in 1..=5 {
        probe.inject(name, &frame(tag)).await?;
    }
    disturb(
        rig,
        Disturbance::PortFails {
            port: name,
            after: Some(3),
        },
    )
    .await?;
    let mut frames: Vec<Frame> = (0..8).map(|_| Frame::new()).collect();
    let mut found = Vec::new();
    let begun = Instant::now();
    let error = loop {
        match port.receive(&mut frames) {
            Ok(0) if begun.elapsed() < ARRIVAL => tokio::time::sleep(Duration::from_millis(1)).await,
            Ok(0) => return Err(Halt::failed(format!("no error after frames {found:?}"))),
            Ok(count) => found.extend(frames[..count].iter().map(|frame| tag_of(frame.octets()))),
            Err(error) => break error,
        }
    };
    ensure_eq!(found, vec![1, 2, 3], "frames received before the error");
    ensure_eq!(error.kind, ErrorKind::Io, "kind of the error");
    disturb(
        rig,
        Disturbance::PortFails {
            port: name,
            after: None,
        },
    )
    .await?;
    for tag in [4, 5] {
        let found = receive_one(&mut *port, ARRIVAL).await?;
        ensure_eq!(found.as_deref().map(tag_of), Some(tag), "frame behind the error");
    }
    Ok(())
}
