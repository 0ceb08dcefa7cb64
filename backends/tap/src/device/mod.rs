//! The emulator's devices: what carries a port's frames on an ordinary kernel.
//!
//! | device | stands for | carried by |
//! |---|---|---|
//! | [`TapPort`] | a VF's representor | the descriptor of a persistent TAP whose network device is the pod's VF |
//! | [`PacketPort`] | a VF's representor, or the uplink in underlay mode | a packet socket on a veth end or NIC |
//! | [`UdpUplink`] | the uplink in overlay mode | a UDP socket on port 4789 that speaks VXLAN |
//!
//! All three hand frames on as [`dpumesh_core::Frame`], with checksum and segmentation left open where the kernel left
//! them open, and refuse (drop and count) what their limits do not allow.

pub mod fuzz;
mod outer;
mod packet;
mod tap;
mod udp;
mod veth;
mod virtio;

use dpumesh_core::{Checksum, Error, ErrorKind, Frame, GsoKind, MAX_FRAME, Mtu, PortIoLimits};

pub(crate) use outer::{Outer, rebuild};
pub use packet::{PacketOptions, PacketPort};
pub use tap::{TapPort, create_tap};
pub use udp::UdpUplink;
pub use veth::{create_pair, ready_card_end};

/// Octets of an Ethernet header without a VLAN tag.
const ETHERNET: usize = 14;

/// Limits of a device that finishes what is left open.
pub(crate) fn offloading(mtu: Mtu, uso: bool) -> PortIoLimits {
    let mut limits = PortIoLimits::plain(mtu);
    limits.max_frame = MAX_FRAME;
    limits.checksum_offload = true;
    limits.tso = true;
    limits.uso = uso;
    limits
}

/// Why a frame must not leave by a port with these limits; `None` when it may.
pub(crate) fn refusal(limits: &PortIoLimits, frame: &Frame) -> Option<&'static str> {
    if frame.len() < ETHERNET {
        return Some("shorter than an Ethernet header");
    }
    if frame.len() > limits.max_frame {
        return Some("longer than max_frame");
    }
    if let Checksum::Partial { start, offset } = frame.checksum {
        if !limits.checksum_offload {
            return Some("open checksum without checksum_offload");
        }
        if usize::from(start) + usize::from(offset) + 2 > frame.len() {
            return Some("open checksum beyond the end");
        }
    }
    let Some(gso) = frame.gso else {
        return (frame.len() > limits.mtu.frame_len()).then_some("longer than the MTU");
    };
    let offered = match gso.kind {
        GsoKind::TcpV4 | GsoKind::TcpV6 => limits.tso,
        GsoKind::Udp => limits.uso,
    };
    if !offered {
        return Some("super-frame of a kind without offload");
    }
    if !matches!(frame.checksum, Checksum::Partial { .. }) {
        return Some("super-frame with a closed checksum");
    }
    let header_len = usize::from(gso.header_len);
    if gso.size == 0 || header_len >= frame.len() || header_len < ETHERNET {
        return Some("super-frame without payload");
    }
    (header_len + usize::from(gso.size) > limits.mtu.frame_len()).then_some("segments longer than the MTU")
}

/// Translates what a system call about an open device said.
pub(crate) fn io_error(operation: &'static str, what: &str, error: std::io::Error) -> Error {
    let kind = match error.raw_os_error() {
        Some(libc::EBADFD | libc::ENODEV | libc::ENXIO | libc::ENETDOWN) => ErrorKind::DeviceLost,
        Some(libc::EPERM | libc::EACCES) => ErrorKind::Denied,
        Some(libc::EBUSY) => ErrorKind::Busy,
        Some(libc::ENOENT) => ErrorKind::NotFound,
        _ => ErrorKind::Io,
    };
    with_kind(kind, operation, what, error)
}

/// Translates what a system call said while a device was looked for or made.
pub(crate) fn open_error(operation: &'static str, what: &str, error: std::io::Error) -> Error {
    match error.raw_os_error() {
        Some(libc::ENODEV) => with_kind(ErrorKind::NotFound, operation, what, error),
        Some(libc::EEXIST) => with_kind(ErrorKind::Exists, operation, what, error),
        _ => io_error(operation, what, error),
    }
}

fn with_kind(kind: ErrorKind, operation: &'static str, what: &str, error: std::io::Error) -> Error {
    let code = error.raw_os_error();
    let mut translated = Error::new(kind, operation, format!("{what}: {error}"))
        .backend(crate::NAME)
        .source(error);
    translated.vendor_code = code.map(i64::from);
    translated
}
