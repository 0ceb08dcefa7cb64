//! Frames of a fake card: what its VFs send, as the host's devices receive it, and what the host sends.
//!
//! A frame of a VF comes out at its representor in switchdev mode, else at its PF with the VF's tag, if it has one.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use dpumesh_core::{Frame, HEADROOM, MAX_FRAME, Mtu, PortIo, PortIoLimits, PortRef, Result};
use dpumesh_hw::netlink::LinkIndex;

/// Octets on the air of a fake machine; clones are the same.
#[derive(Clone, Debug, Default)]
pub(super) struct Air(Arc<Mutex<Devices>>);

#[derive(Debug, Default)]
struct Devices {
    sockets: Vec<(LinkIndex, Weak<Mutex<Queue>>)>,
    sent: Vec<(LinkIndex, Vec<u8>)>,
}

type Queue = VecDeque<Vec<u8>>;

impl Air {
    fn devices(&self) -> MutexGuard<'_, Devices> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A frame arrives at a device of the host.
    pub(super) fn deliver(&self, link: LinkIndex, octets: &[u8]) {
        let devices = self.devices();
        let sockets = devices.sockets.iter().filter(|(of, _)| *of == link);
        for queue in sockets.filter_map(|(_, queue)| queue.upgrade()) {
            let mut queue = queue.lock().unwrap_or_else(PoisonError::into_inner);
            queue.push_back(octets.to_vec());
        }
    }

    pub(super) fn take_sent(&self) -> Vec<(LinkIndex, Vec<u8>)> {
        std::mem::take(&mut self.devices().sent)
    }

    pub(super) fn open(&self, port: PortRef, link: LinkIndex, mtu: Mtu) -> FakePort {
        let queue = Arc::default();
        let mut devices = self.devices();
        devices.sockets.retain(|(_, queue)| Weak::strong_count(queue) > 0);
        devices.sockets.push((link, Arc::downgrade(&queue)));
        let mut limits = PortIoLimits::plain(mtu);
        limits.max_frame = MAX_FRAME;
        (limits.checksum_offload, limits.tso, limits.uso) = (true, true, true);
        FakePort {
            port,
            link,
            limits,
            queue,
            air: self.clone(),
            refused: 0,
        }
    }
}

/// A packet socket.
#[derive(Debug)]
pub(super) struct FakePort {
    port: PortRef,
    link: LinkIndex,
    limits: PortIoLimits,
    queue: Arc<Mutex<Queue>>,
    air: Air,
    refused: u64,
}

impl PortIo for FakePort {
    fn port(&self) -> PortRef {
        self.port
    }

    fn limits(&self) -> PortIoLimits {
        self.limits
    }

    fn receive(&mut self, frames: &mut [Frame]) -> Result<usize> {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let mut count = 0;
        for frame in frames {
            let Some(octets) = queue.pop_front() else { break };
            frame.reset(HEADROOM);
            frame.fill(&octets);
            count += 1;
        }
        Ok(count)
    }

    fn transmit(&mut self, frames: &mut [Frame]) -> Result<usize> {
        let mut devices = self.air.devices();
        for frame in frames.iter() {
            let longest = match frame.gso {
                Some(_) => self.limits.max_frame,
                None => self.limits.mtu.frame_len(),
            };
            if (14..=longest).contains(&frame.len()) {
                devices.sent.push((self.link, frame.octets().to_vec()));
            } else {
                self.refused += 1;
            }
        }
        Ok(frames.len())
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn refused(&self) -> u64 {
        self.refused
    }
}
