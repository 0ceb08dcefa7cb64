//! [`Ports`]: frame queues with two ends, and the outer end for tests ([`Wire`]).

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use async_trait::async_trait;
use dpumesh_core::port::PortIoLimits;
use dpumesh_core::{
    Checksum, Error, ErrorKind, Fence, Frame, GsoKind, MAX_FRAME, Mtu, PortInfo, PortIo, PortRef, Ports,
    Result,
};

use super::device::{Card, State, error};
use super::eswitch::{self, DropReason, Fate};

/// Both queues of a port.
#[derive(Debug)]
pub(super) struct Port {
    pub(super) link_up: bool,
    /// Frames that left the card, waiting for the outer end.
    pub(super) outer: VecDeque<Arrival>,
    /// Frames that no rule matched, waiting for the SoC.
    pub(super) inner: VecDeque<Frame>,
    /// Number of the opening that may read it.
    pub(super) open: Option<u64>,
    /// Frames that it still gives before it fails.
    left: Option<usize>,
}

/// A frame that left the card.
#[derive(Clone, Debug)]
pub struct Arrival {
    /// Port by which it came in: the identity of a punted frame.
    pub ingress: PortRef,
    /// The frame.
    pub frame: Frame,
}

impl Default for Port {
    fn default() -> Self {
        Self {
            link_up: true,
            outer: VecDeque::new(),
            inner: VecDeque::new(),
            open: None,
            left: None,
        }
    }
}

impl Port {
    /// Closes it and forgets its frames.
    pub(super) fn clear(&mut self) {
        self.outer.clear();
        self.close();
    }

    /// Takes the inner end from whoever had it.
    pub(super) fn close(&mut self) {
        self.inner.clear();
        self.open = None;
    }
}

/// The outer end of a port.
#[derive(Clone, Debug)]
pub struct Wire {
    card: Arc<Card>,
    port: PortRef,
}

impl Wire {
    pub(super) fn of(card: &Arc<Card>, port: PortRef) -> Option<Self> {
        card.state().ports.contains_key(&port).then(|| Self {
            card: Arc::clone(card),
            port,
        })
    }

    /// The port.
    pub fn port(&self) -> PortRef {
        self.port
    }

    /// Sends a frame into the card and tells what became of it.
    pub fn send(&self, frame: Frame) -> Fate {
        let mut state = self.card.state();
        self.card.age(&mut state);
        let now_ms = self.card.now_ms();
        eswitch::switch(&mut state, self.card.config(), self.port, frame, now_ms)
    }

    /// What the port does with a frame that is sent into the card before any rule sees it: link, lease, length, spoofing
    /// and VLAN of the VF. For cards that put tables of their own between port and rules.
    ///
    /// # Errors
    /// Why the port drops it.
    pub fn enter(&self, mut frame: Frame) -> std::result::Result<Frame, DropReason> {
        let state = self.card.state();
        eswitch::enter(&state, self.card.config().mtu, self.port, &mut frame)?;
        Ok(frame)
    }

    /// Puts a frame that some rule sent here at the outer end. Whether the port takes it is in the answer.
    ///
    /// # Errors
    /// Why the port drops it.
    pub fn leave(&self, ingress: PortRef, frame: Frame) -> std::result::Result<(), DropReason> {
        let mut state = self.card.state();
        eswitch::deliver(&mut state, self.card.config(), ingress, self.port, frame).map_or(Ok(()), Err)
    }

    /// The next frame that left the card here.
    pub fn receive(&self) -> Option<Arrival> {
        self.card.state().ports.get_mut(&self.port)?.outer.pop_front()
    }
}

/// Ports of a card in memory.
#[derive(Debug)]
pub(super) struct MemoryPorts(Arc<Card>);

impl MemoryPorts {
    pub(super) fn new(card: Arc<Card>) -> Self {
        Self(card)
    }
}

#[async_trait]
impl Ports for MemoryPorts {
    async fn list(&self) -> Result<Vec<PortInfo>> {
        let state = self.0.present("ports.list")?;
        let infos = state.ports.iter().map(|(port, end)| {
            let mut info = PortInfo::new(*port, state.mtu(*port, self.0.config().mtu));
            info.link_up = end.link_up && state.function(*port).is_none_or(|vf| vf.link_up());
            info.mac = state.function(*port).map(|vf| vf.attributes.mac);
            info
        });
        Ok(infos.collect())
    }

    async fn open(&self, fence: Fence, port: PortRef) -> Result<Box<dyn PortIo>> {
        const OPEN: &str = "ports.open";
        let mut state = self.0.fenced(fence, OPEN)?;
        let refuse = |kind, message| Err(error(kind, OPEN, message).object(port));
        let Some(end) = state.ports.get(&port) else {
            return refuse(ErrorKind::NotFound, "there is no such port");
        };
        if end.open.is_some() {
            return refuse(ErrorKind::Busy, "the port is open already");
        }
        if state.function(port).is_some_and(|vf| vf.admitted.is_none()) {
            return refuse(ErrorKind::Denied, "no lease of this VF was admitted");
        }
        let (used, limit) = (state.open_ports(), state.capabilities.ports.open);
        if used >= limit as usize {
            let message = format!("ports.open is full: {used} of {limit}");
            return Err(error(ErrorKind::CapacityExceeded, OPEN, message).object(OPEN));
        }
        let opening = state.number();
        let limits = state.limits(port, self.0.config().mtu);
        if let Some(end) = state.ports.get_mut(&port) {
            end.open = Some(opening);
        }
        Ok(Box::new(MemoryPort {
            card: Arc::clone(&self.0),
            port,
            opening,
            limits,
            refused: 0,
        }))
    }
}

/// The inner end of a port, open.
#[derive(Debug)]
struct MemoryPort {
    card: Arc<Card>,
    port: PortRef,
    opening: u64,
    limits: PortIoLimits,
    refused: u64,
}

impl MemoryPort {
    fn closed(&self, operation: &'static str) -> Error {
        let message = "the card went away or the lease was revoked";
        error(ErrorKind::DeviceLost, operation, message).object(self.port)
    }

    fn is_within_limits(&self, frame: &Frame) -> bool {
        let limits = &self.limits;
        let offload = match frame.gso {
            None => frame.len() <= limits.mtu.frame_len(),
            Some(gso) => match gso.kind {
                GsoKind::TcpV4 | GsoKind::TcpV6 => limits.tso,
                GsoKind::Udp => limits.uso,
            },
        };
        let checksum = limits.checksum_offload || !matches!(frame.checksum, Checksum::Partial { .. });
        offload && checksum && frame.len() <= limits.max_frame
    }
}

impl PortIo for MemoryPort {
    fn port(&self) -> PortRef {
        self.port
    }

    fn limits(&self) -> PortIoLimits {
        self.limits
    }

    fn receive(&mut self, frames: &mut [Frame]) -> Result<usize> {
        let mut state = self.card.state();
        let end = state.ports.get_mut(&self.port);
        let Some(end) = end.filter(|end| end.open == Some(self.opening)) else {
            drop(state);
            return Err(self.closed("ports.receive"));
        };
        if end.left == Some(0) && !frames.is_empty() {
            let message = "the port gives no more frames";
            return Err(error(ErrorKind::Io, "ports.receive", message).object(self.port));
        }
        let most = end.left.map_or(frames.len(), |left| left.min(frames.len()));
        let mut count = 0;
        while count < most {
            let Some(waiting) = end.inner.pop_front() else {
                break;
            };
            let slot = &mut frames[count];
            // A slot too small for the frame loses it, as a receive buffer of a NIC does.
            if slot.fill(waiting.octets()) {
                slot.checksum = waiting.checksum;
                slot.gso = waiting.gso;
                count += 1;
            }
        }
        end.left = end.left.map(|left| left - count);
        Ok(count)
    }

    fn transmit(&mut self, frames: &mut [Frame]) -> Result<usize> {
        let mut state = self.card.state();
        for (taken, frame) in frames.iter().enumerate() {
            let is_open = state
                .ports
                .get(&self.port)
                .is_some_and(|end| end.open == Some(self.opening));
            if !is_open {
                drop(state);
                return Err(self.closed("ports.transmit"));
            }
            if !self.is_within_limits(frame) {
                self.refused += 1;
                continue;
            }
            if eswitch::is_full(&state, self.card.config(), self.port) {
                return Ok(taken);
            }
            eswitch::deliver(
                &mut state,
                self.card.config(),
                self.port,
                self.port,
                frame.clone(),
            );
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

impl Drop for MemoryPort {
    fn drop(&mut self) {
        let mut state = self.card.state();
        if let Some(end) = state.ports.get_mut(&self.port)
            && end.open == Some(self.opening)
        {
            end.close();
        }
    }
}

impl Card {
    pub(super) fn fail_port(&self, port: PortRef, after: Option<usize>) {
        if let Some(end) = self.state().ports.get_mut(&port) {
            end.left = after;
        }
    }
}

impl State {
    /// Largest L3 packet of a port.
    pub(super) fn mtu(&self, port: PortRef, others: Mtu) -> Mtu {
        self.function(port).map_or(others, |vf| vf.attributes.mtu)
    }

    fn open_ports(&self) -> usize {
        self.ports.values().filter(|end| end.open.is_some()).count()
    }

    fn limits(&self, port: PortRef, others: Mtu) -> PortIoLimits {
        let can = &self.capabilities.ports;
        let mut limits = PortIoLimits::plain(self.mtu(port, others));
        limits.checksum_offload = can.checksum_offload;
        limits.tso = can.tso;
        limits.uso = can.uso;
        if can.tso || can.uso {
            limits.max_frame = MAX_FRAME;
        }
        limits
    }
}
