//! The last stage: frames made fit for their port, joined or cut, and written in one batch per port and turn.
//!
//! * What came from the network in single segments is joined to super-frames for a port that takes them.
//! * A super-frame for a port that does not is cut, an open checksum for a port that cannot finish it is finished.
//! * What the port does not take is dropped and counted: the dataplane never waits for a receiver.

use std::net::IpAddr;

use dpumesh_core::{Frame, Mtu, Result};

use super::port::Port;
use super::stats::{DropReason, Tally};
use crate::wire::{self, Headers, Segments, answer, checksum};

/// Frames kept for use again: enough for what a turn can have in flight on a few ports.
const KEPT: usize = 512;

/// Empty frames, the last used first: its memory is still in the cache.
#[derive(Debug, Default)]
pub(super) struct FramePool {
    free: Vec<Frame>,
    /// Frames there are, free or in use.
    made: usize,
    /// An empty list, kept for its memory.
    finished: Vec<Frame>,
}

impl FramePool {
    #[inline]
    pub(super) fn take(&mut self) -> Frame {
        self.free.pop().unwrap_or_else(|| {
            self.made += 1;
            Frame::default()
        })
    }

    #[inline]
    pub(super) fn give(&mut self, frame: Frame) {
        if self.free.len() < KEPT {
            self.free.push(frame);
        } else {
            self.made = self.made.saturating_sub(1);
        }
    }

    /// The next frames would have to be made: what is queued should go first.
    #[inline]
    pub(super) fn is_used_up(&self) -> bool {
        self.made >= KEPT && self.free.len() < super::engine::BATCH
    }

    pub(super) fn give_all(&mut self, frames: &mut Vec<Frame>) {
        frames.drain(..).for_each(|frame| self.give(frame));
    }
}

/// Octets of Ethernet header and tag in front of the L3 packet.
fn l2_len(octets: &[u8]) -> usize {
    if octets.get(12..14) == Some(&[0x81, 0x00]) {
        18
    } else {
        14
    }
}

/// Whether every packet that the frame stands for fits the MTU.
#[inline]
pub(super) fn fits(frame: &Frame, mtu: Mtu) -> bool {
    let end = match frame.gso {
        None => frame.len(),
        Some(gso) => frame
            .len()
            .min(usize::from(gso.header_len) + usize::from(gso.size)),
    };
    end <= l2_len(frame.octets()) + usize::from(mtu.get())
}

/// Writes into `reply` what tells the sender that its packet was too big; false when it must not or cannot be told.
/// `outer` octets of encapsulation in front were not the sender's.
pub(super) fn too_big(frame: &Frame, outer: usize, mtu: Mtu, reply: &mut Frame) -> bool {
    let inner = &frame.octets()[outer..];
    let (Some(mtu), Ok(headers)) = (mtu.minus(outer as u16), Headers::parse(inner)) else {
        return false;
    };
    // The router has no address of its own: it speaks as the one whom the sender wanted to reach.
    match headers.destination() {
        IpAddr::V4(from) => answer::fragmentation_needed(inner, &headers, from, mtu, reply).is_ok(),
        IpAddr::V6(from) => answer::packet_too_big(inner, &headers, from, mtu, reply).is_ok(),
    }
}

/// What flushing a port needs of the engine.
#[derive(Debug)]
pub(super) struct Transmit<'a> {
    pub(super) pool: &'a mut FramePool,
    pub(super) tally: &'a mut Tally,
}

impl Transmit<'_> {
    /// Writes a port's queue and empties it.
    pub(super) fn flush(&mut self, port: &mut Port) -> Result<()> {
        if port.limits.tso && port.coalesce && port.queue.len() > 1 {
            self.join(&mut port.queue);
        }
        port.coalesce = false;
        if !(port.limits.tso && port.limits.uso && port.limits.checksum_offload) {
            self.finish(port);
        }
        let waiting = port.queue.len();
        let octets: usize = port.queue.iter().map(Frame::len).sum();
        let Some(io) = port.io.as_mut() else {
            self.tally.drops[DropReason::EgressClosed as usize] += waiting as u64;
            self.pool.give_all(&mut port.queue);
            return Ok(());
        };
        let refused = io.refused();
        let taken = io.transmit(&mut port.queue)?.min(waiting); // else the queue goes when the port is closed
        let refused = io.refused().saturating_sub(refused);
        // What was taken holds anything now, what was not is as it was.
        let left: usize = port.queue[taken..].iter().map(Frame::len).sum();
        self.tally.drops[DropReason::EgressFull as usize] += (waiting - taken) as u64;
        self.tally.drops[DropReason::Egress as usize] += refused;
        // A port that counts more refused than it took is wrong, but not worth a panic.
        port.stats.tx_frames += (taken as u64).saturating_sub(refused);
        port.stats.tx_octets += (octets - left) as u64;
        self.pool.give_all(&mut port.queue);
        Ok(())
    }

    fn join(&mut self, queue: &mut Vec<Frame>) {
        let kept = wire::coalesce::coalesce(queue);
        self.tally.totals.coalesced += (queue.len() - kept) as u64;
        queue.drain(kept..).for_each(|frame| self.pool.give(frame));
    }

    /// Does in software what the port cannot.
    fn finish(&mut self, port: &mut Port) {
        let mut finished = std::mem::take(&mut self.pool.finished);
        for mut frame in port.queue.drain(..) {
            let cut = frame.gso.is_some_and(|gso| match gso.kind {
                dpumesh_core::GsoKind::Udp => !port.limits.uso,
                _ => !port.limits.tso,
            });
            if cut {
                if !self.cut(&frame, &mut finished) {
                    self.tally.drop(DropReason::Egress);
                }
                self.pool.give(frame);
            } else if !port.limits.checksum_offload && checksum::complete(&mut frame).is_err() {
                self.tally.drop(DropReason::Egress);
                self.pool.give(frame);
            } else {
                finished.push(frame);
            }
        }
        self.pool.finished = std::mem::replace(&mut port.queue, finished);
    }

    fn cut(&mut self, frame: &Frame, into: &mut Vec<Frame>) -> bool {
        let Ok(mut segments) = Segments::of(frame) else {
            return false;
        };
        loop {
            let mut segment = self.pool.take();
            match segments.next_into(&mut segment) {
                Ok(true) => into.push(segment),
                Ok(false) => {
                    self.pool.give(segment);
                    return true;
                }
                Err(_) => return false,
            }
        }
    }
}
