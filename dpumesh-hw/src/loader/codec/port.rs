//! Ports and their frames.

use dpumesh_core::port::PortIoLimits;
use dpumesh_core::{Checksum, Frame, Gso, GsoKind, MacAddr, PortInfo};

use super::{get_flag, get_mtu, get_port, put_port};
use crate::loader::abi::*;
use crate::loader::arena::{Arena, Broken, Reader, Sized32};

pub(crate) fn put_port_info(info: &PortInfo, arena: &mut Arena) -> dm_port_info {
    let mut raw = dm_port_info::empty();
    raw.port = put_port(info.port);
    if let Some(mac) = info.mac {
        raw.has_mac = 1;
        raw.mac = mac.0;
    }
    raw.mtu = info.mtu.get().into();
    raw.link_up = info.link_up.into();
    if let Some(netdev) = &info.netdev {
        raw.netdev = arena.text(netdev);
    }
    raw.poll_fd = -1;
    raw
}

pub(crate) fn get_port_info(raw: &dm_port_info, reader: &Reader) -> Result<PortInfo, Broken> {
    let port = get_port(raw.port, "port.port")?;
    let mut info = PortInfo::new(port, get_mtu(raw.mtu, "port.mtu")?);
    info.mac = get_flag(raw.has_mac, "port.has_mac")?.then_some(MacAddr(raw.mac));
    info.link_up = get_flag(raw.link_up, "port.link_up")?;
    let netdev = reader.text(raw.netdev, "port.netdev")?;
    info.netdev = (!netdev.is_empty()).then_some(netdev);
    Ok(info)
}

/// An open port: its handle, its descriptor and what may be sent there.
pub(crate) fn put_open(limits: &PortIoLimits, handle: u64, poll_fd: i32) -> dm_port_info {
    let mut raw = dm_port_info::empty();
    (raw.handle, raw.poll_fd) = (handle, poll_fd);
    raw.mtu = limits.mtu.get().into();
    raw.max_frame = limits.max_frame as u64;
    raw.checksum_offload = limits.checksum_offload.into();
    raw.tso = limits.tso.into();
    raw.uso = limits.uso.into();
    raw
}

pub(crate) fn get_limits(raw: &dm_port_info) -> Result<PortIoLimits, Broken> {
    let mut limits = PortIoLimits::plain(get_mtu(raw.mtu, "port.mtu")?);
    limits.max_frame = raw.max_frame as usize;
    limits.checksum_offload = get_flag(raw.checksum_offload, "port.checksum_offload")?;
    limits.tso = get_flag(raw.tso, "port.tso")?;
    limits.uso = get_flag(raw.uso, "port.uso")?;
    Ok(limits)
}

/// What a frame carries beside its octets.
pub(crate) fn put_marks(frame: &Frame, raw: &mut dm_frame) {
    (raw.sum_start, raw.sum_offset) = (0, 0);
    raw.checksum = match frame.checksum {
        Checksum::Unverified => DM_CHECKSUM_UNVERIFIED,
        Checksum::Verified => DM_CHECKSUM_VERIFIED,
        Checksum::Partial { start, offset } => {
            (raw.sum_start, raw.sum_offset) = (start, offset);
            DM_CHECKSUM_PARTIAL
        }
    };
    raw.gso = frame.gso.map_or(DM_GSO_NONE, |gso| match gso.kind {
        GsoKind::TcpV4 => DM_GSO_TCP4,
        GsoKind::TcpV6 => DM_GSO_TCP6,
        GsoKind::Udp => DM_GSO_UDP,
    });
    (raw.gso_size, raw.gso_header_len, raw.gso_ecn) = frame
        .gso
        .map_or((0, 0, 0), |gso| (gso.size, gso.header_len, gso.ecn.into()));
}

pub(crate) fn get_marks(raw: &dm_frame, frame: &mut Frame) -> Result<(), Broken> {
    frame.checksum = match raw.checksum {
        DM_CHECKSUM_UNVERIFIED => Checksum::Unverified,
        DM_CHECKSUM_VERIFIED => Checksum::Verified,
        DM_CHECKSUM_PARTIAL => Checksum::Partial {
            start: raw.sum_start,
            offset: raw.sum_offset,
        },
        checksum => return Err(format!("frame.checksum is {checksum}, which means nothing")),
    };
    let kind = match raw.gso {
        DM_GSO_NONE => None,
        DM_GSO_TCP4 => Some(GsoKind::TcpV4),
        DM_GSO_TCP6 => Some(GsoKind::TcpV6),
        DM_GSO_UDP => Some(GsoKind::Udp),
        gso => return Err(format!("frame.gso is {gso}, which means nothing")),
    };
    frame.gso = kind.map(|kind| Gso {
        kind,
        size: raw.gso_size,
        header_len: raw.gso_header_len,
        ecn: raw.gso_ecn != 0,
    });
    Ok(())
}
