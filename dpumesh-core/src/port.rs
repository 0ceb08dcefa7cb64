//! Ports of the card: who they are ([`PortRef`]) and how their frames are read and written ([`Ports`], [`PortIo`]).
//!
//! A port is a virtual port of the eswitch: the uplink, a physical function, or a virtual function seen through its
//! representor (kernel `Documentation/networking/representors.rst`). Its identity is `PortRef`, never a network
//! device name: names are chosen by udev, differ between host and SoC, and get reused.

use std::fmt;
use std::os::fd::BorrowedFd;
use std::str::FromStr;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::addr::{MacAddr, Mtu};
use crate::backend::Fence;
use crate::error::Result;
use crate::frame::Frame;

/// Which host a PCI function belongs to, as devlink counts external controllers; 0 is the first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ControllerId(pub u16);

/// Index of a physical function on its controller.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PfIndex(pub u16);

/// Index of a virtual function on its physical function, as in `ip link set PF vf N`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct VfIndex(pub u16);

/// A virtual port of one card's eswitch: the name that host and SoC share for it.
///
/// Written `uplink0`, `c0pf1`, `c0pf1vf7` (the kernel's `phys_port_name` form) or `stack0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum PortRef {
    /// A network port of the card.
    Uplink(u16),
    /// A physical function.
    Pf {
        /// Host it belongs to.
        controller: ControllerId,
        /// Its index there.
        pf: PfIndex,
    },
    /// A virtual function; frames on its representor are those it sent or will receive.
    Vf {
        /// Host it belongs to.
        controller: ControllerId,
        /// Physical function it was made from.
        pf: PfIndex,
        /// Its index there.
        vf: VfIndex,
    },
    /// Where frames for the shared proxy go: the entry of a stream engine on the SoC. Not a PCI function.
    Stack(u16),
}

/// What the eswitch knows of a port now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct PortInfo {
    /// Which port.
    pub port: PortRef,
    /// MAC address that the function uses, when the eswitch knows it.
    pub mac: Option<MacAddr>,
    /// Largest L3 packet in octets.
    pub mtu: Mtu,
    /// Carrier.
    pub link_up: bool,
    /// Name of the representor's network device, for display only.
    pub netdev: Option<String>,
}

impl PortInfo {
    /// A port with its link up and nothing else known.
    pub fn new(port: PortRef, mtu: Mtu) -> Self {
        Self {
            port,
            mac: None,
            mtu,
            link_up: true,
            netdev: None,
        }
    }
}

/// What a port's frames may look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct PortIoLimits {
    /// Largest L3 packet of a frame that is not a super-frame, in octets.
    pub mtu: Mtu,
    /// Largest frame in octets, super-frames included; transmitting a longer one is an error of that frame.
    pub max_frame: usize,
    /// Open checksums ([`crate::frame::Checksum::Partial`]) may be transmitted.
    pub checksum_offload: bool,
    /// TCP super-frames may be transmitted.
    pub tso: bool,
    /// UDP super-frames may be transmitted.
    pub uso: bool,
}

impl PortIoLimits {
    /// A port without offloads: every frame is final and fits the MTU.
    pub fn plain(mtu: Mtu) -> Self {
        Self {
            mtu,
            max_frame: mtu.frame_len(),
            checksum_offload: false,
            tso: false,
            uso: false,
        }
    }
}

/// The ports of a card, on the side that sees their frames (role SoC).
#[async_trait]
pub trait Ports: Send + Sync + fmt::Debug {
    /// Lists the ports that exist now, in ascending [`PortRef`] order.
    ///
    /// Observed state, never a cache. Read-only; cancelling leaves nothing behind.
    ///
    /// # Errors
    /// `DeviceLost` while the card is away.
    async fn list(&self) -> Result<Vec<PortInfo>>;

    /// Opens a port's frames for reading and writing.
    ///
    /// A port has one reader: opening it a second time before the first `PortIo` was dropped is `Busy`. A VF's port
    /// opens only after [`crate::vf::VfAllocator::admit`] took its lease (`Denied` before that). Completes when frames
    /// can flow. Cancelling leaves the port closed.
    ///
    /// Where backends differ: SR-IOV opens the representor's network device, the Yusur backend an NP queue, the
    /// emulator attaches to the persistent TAP that stands for the VF, the memory backend hands out an end of an
    /// in-process queue.
    ///
    /// # Errors
    /// `NotFound` (no such port), `Busy`, `Denied`, `CapacityExceeded` (`ports.open`), `Stale` (old epoch),
    /// `DeviceLost`, `Io`.
    async fn open(&self, fence: Fence, port: PortRef) -> Result<Box<dyn PortIo>>;
}

/// Frames of one port, in batches. Synchronous, never blocks, owned by one thread.
///
/// Dropping it closes the port; frames not yet received are lost, those transmitted are not.
pub trait PortIo: Send + fmt::Debug {
    /// The port.
    fn port(&self) -> PortRef;

    /// What may be transmitted; constant for the life of the `PortIo`.
    fn limits(&self) -> PortIoLimits;

    /// Receives up to `frames.len()` frames into the first slots, in arrival order, and returns how many.
    ///
    /// Each used slot is [`Frame::reset`] to [`crate::frame::HEADROOM`] first. Zero means none is waiting. Ends early
    /// rather than wait.
    ///
    /// # Errors
    /// `DeviceLost` when the device went away, `Io` else. Frames received before the error are counted first; the
    /// error comes with the next call.
    fn receive(&mut self, frames: &mut [Frame]) -> Result<usize>;

    /// Transmits the first frames of the slice, in order, and returns how many the port took.
    ///
    /// Fewer than `frames.len()` means that the port is full: the caller keeps or drops the rest. Taken frames' contents
    /// are unspecified afterwards. A frame that breaks [`PortIo::limits`] is counted by the port as refused, dropped,
    /// and reported as taken, so that one bad frame cannot stop a batch.
    ///
    /// # Errors
    /// `DeviceLost`, `Io`; frames before the failing one were taken.
    fn transmit(&mut self, frames: &mut [Frame]) -> Result<usize>;

    /// Descriptor that polls readable when [`PortIo::receive`] would return frames; `None` when the port must be
    /// polled.
    fn poll_fd(&self) -> Option<BorrowedFd<'_>>;

    /// Frames that `transmit` dropped because they broke the limits.
    fn refused(&self) -> u64;
}

impl PortRef {
    /// VF `vf` of physical function 0 on controller 0: the common single-host card.
    pub const fn vf(vf: u16) -> Self {
        Self::Vf {
            controller: ControllerId(0),
            pf: PfIndex(0),
            vf: VfIndex(vf),
        }
    }

    /// True for a virtual function.
    pub const fn is_vf(self) -> bool {
        matches!(self, Self::Vf { .. })
    }
}

impl fmt::Display for PortRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Uplink(n) => write!(f, "uplink{n}"),
            Self::Pf { controller, pf } => write!(f, "c{}pf{}", controller.0, pf.0),
            Self::Vf { controller, pf, vf } => write!(f, "c{}pf{}vf{}", controller.0, pf.0, vf.0),
            Self::Stack(n) => write!(f, "stack{n}"),
        }
    }
}

/// A text that is no [`PortRef`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a port: expected uplink<N>, c<N>pf<N>, c<N>pf<N>vf<N> or stack<N>")]
pub struct ParsePortError(String);

impl FromStr for PortRef {
    type Err = ParsePortError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse_port(text).ok_or_else(|| ParsePortError(text.to_owned()))
    }
}

fn parse_port(text: &str) -> Option<PortRef> {
    if let Some(n) = text.strip_prefix("uplink") {
        return Some(PortRef::Uplink(index(n)?));
    }
    if let Some(n) = text.strip_prefix("stack") {
        return Some(PortRef::Stack(index(n)?));
    }
    let (controller, function) = text.strip_prefix('c')?.split_once("pf")?;
    let controller = ControllerId(index(controller)?);
    Some(match function.split_once("vf") {
        Some((pf, vf)) => PortRef::Vf {
            controller,
            pf: PfIndex(index(pf)?),
            vf: VfIndex(index(vf)?),
        },
        None => PortRef::Pf {
            controller,
            pf: PfIndex(index(function)?),
        },
    })
}

/// Digits only: `u16::from_str` alone would accept `+7`.
fn index(digits: &str) -> Option<u16> {
    digits
        .bytes()
        .all(|b| b.is_ascii_digit())
        .then(|| digits.parse().ok())
        .flatten()
}

impl From<PortRef> for String {
    fn from(port: PortRef) -> Self {
        port.to_string()
    }
}

impl TryFrom<String> for PortRef {
    type Error = ParsePortError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_written_and_read_alike() {
        for text in ["uplink0", "c0pf1", "c2pf1vf7", "stack3", "c65535pf65535vf65535"] {
            assert_eq!(text.parse::<PortRef>().expect(text).to_string(), text);
        }
        for text in [
            "",
            "uplink",
            "vf1",
            "c0pf",
            "c0pf1vf",
            "c0pf1vf+7",
            "c0pf70000",
            "eth0",
        ] {
            assert!(text.parse::<PortRef>().is_err(), "{text} must be refused");
        }
    }
}
