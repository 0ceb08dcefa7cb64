//! One Ethernet frame in memory, with what its sender left for hardware to finish.
//!
//! A [`Frame`] owns its octets and keeps headroom in front of them, so that an encapsulation is pushed without
//! moving the payload. Beside the octets it carries the two promises of the virtio-net header (virtio 1.3 §5.1.6):
//! the state of its L4 checksum and, for a super-frame, how it must be cut ([`Gso`]). Frames are allocated once,
//! in batches, and used again; nothing here allocates after [`Frame::with_capacity`].
//!
//! Lengths are in octets, from the destination MAC to the last payload octet, without preamble and FCS.

use serde::{Deserialize, Serialize};

/// An Ethernet frame (or a super-frame awaiting segmentation) with headroom.
#[derive(Clone)]
pub struct Frame {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// Whether the L4 checksum in the octets is final.
    pub checksum: Checksum,
    /// Present on a super-frame: how to cut it.
    pub gso: Option<Gso>,
    /// Free for the dataplane's stages; zero when a port hands the frame in.
    pub mark: u32,
}

/// State of the L4 checksum field of a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Checksum {
    /// The field holds what arrived on the wire; nobody has verified it.
    #[default]
    Unverified,
    /// Somebody trusted (NIC, kernel, or a sender in this machine's memory) vouches for the contents.
    Verified,
    /// The field holds the pseudo-header sum; the ones' complement sum from `start` to the end of the frame is still
    /// to be stored at `start + offset` (`VIRTIO_NET_HDR_F_NEEDS_CSUM`).
    Partial {
        /// First octet to be summed, counted from the destination MAC.
        start: u16,
        /// Where the sum goes, counted from `start`.
        offset: u16,
    },
}

/// How a super-frame is cut into frames of the path's MTU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Gso {
    /// Which protocol's rules apply.
    pub kind: GsoKind,
    /// Payload octets of every segment but the last (TCP: the MSS).
    pub size: u16,
    /// Octets in front of the first payload octet, Ethernet header included.
    pub header_len: u16,
    /// The TCP flow negotiated ECN: only the first segment keeps CWR (RFC 3168).
    pub ecn: bool,
}

/// Segmentation rule of a super-frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum GsoKind {
    /// TCP over IPv4 (`VIRTIO_NET_HDR_GSO_TCPV4`).
    TcpV4,
    /// TCP over IPv6 (`VIRTIO_NET_HDR_GSO_TCPV6`).
    TcpV6,
    /// UDP, each segment a datagram of its own (`VIRTIO_NET_HDR_GSO_UDP_L4`).
    Udp,
}

/// Room in front of a received frame: enough for Ethernet, 802.1Q, IPv6, UDP and VXLAN headers, rounded up.
pub const HEADROOM: usize = 128;

/// Largest frame a port may hand in: a 65,535-octet IP packet behind an Ethernet and an 802.1Q header.
pub const MAX_FRAME: usize = 65_535 + 18;

impl Frame {
    /// A frame with [`HEADROOM`] and room for [`MAX_FRAME`] octets.
    pub fn new() -> Self {
        Self::with_capacity(HEADROOM, MAX_FRAME)
    }

    /// An empty frame with `headroom` octets in front and room for `capacity` octets.
    pub fn with_capacity(headroom: usize, capacity: usize) -> Self {
        Self {
            buffer: vec![0; headroom + capacity].into_boxed_slice(),
            start: headroom,
            end: headroom,
            checksum: Checksum::default(),
            gso: None,
            mark: 0,
        }
    }

    /// A frame that holds a copy of `octets`, with [`HEADROOM`] in front.
    pub fn copy_of(octets: &[u8]) -> Self {
        let mut frame = Self::with_capacity(HEADROOM, octets.len());
        frame.fill(octets);
        frame
    }

    /// The octets of the frame.
    pub fn octets(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// The octets of the frame, to be rewritten in place.
    pub fn octets_mut(&mut self) -> &mut [u8] {
        &mut self.buffer[self.start..self.end]
    }

    /// Length in octets.
    pub fn len(&self) -> usize {
        self.end - self.start
    }

    /// True when the frame holds no octets.
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Octets that [`Frame::push_front`] can still take.
    pub fn headroom(&self) -> usize {
        self.start
    }

    /// Octets that the frame could grow by at its end.
    pub fn tailroom(&self) -> usize {
        self.buffer.len() - self.end
    }

    /// Empties the frame, puts its start back behind `headroom` octets and forgets its metadata.
    ///
    /// A `headroom` beyond the buffer is cut to the buffer's size.
    pub fn reset(&mut self, headroom: usize) {
        self.start = headroom.min(self.buffer.len());
        self.end = self.start;
        self.checksum = Checksum::default();
        self.gso = None;
        self.mark = 0;
    }

    /// Everything from the frame's start to the end of its buffer, for a port to receive into;
    /// follow with [`Frame::set_len`].
    pub fn receive_area(&mut self) -> &mut [u8] {
        &mut self.buffer[self.start..]
    }

    /// Sets the length after octets were written into [`Frame::receive_area`]. False, and no change, when `len` does
    /// not fit the buffer.
    pub fn set_len(&mut self, len: usize) -> bool {
        let fits = len <= self.buffer.len() - self.start;
        if fits {
            self.end = self.start + len;
        }
        fits
    }

    /// Replaces contents and metadata by a copy of `octets`. False, and an empty frame, when they do not fit behind
    /// [`HEADROOM`].
    pub fn fill(&mut self, octets: &[u8]) -> bool {
        self.reset(HEADROOM);
        if !self.set_len(octets.len()) {
            return false;
        }
        self.octets_mut().copy_from_slice(octets);
        true
    }

    /// Grows the frame at its front and returns the new octets, whose contents are unspecified; `None`, and no
    /// change, without the headroom. An open [`Checksum::Partial`] moves along; [`Gso::header_len`] is the caller's.
    pub fn push_front(&mut self, count: usize) -> Option<&mut [u8]> {
        let start = self.start.checked_sub(count)?;
        if let Checksum::Partial { start: sum, .. } = &mut self.checksum {
            *sum = u16::try_from(usize::from(*sum) + count).ok()?;
        }
        self.start = start;
        Some(&mut self.buffer[start..start + count])
    }

    /// Cuts `count` octets from the front. False, and no change, when the frame is shorter or an open partial
    /// checksum would lose its start.
    pub fn pull_front(&mut self, count: usize) -> bool {
        if count > self.len() {
            return false;
        }
        if let Checksum::Partial { start, .. } = &mut self.checksum {
            let Some(moved) = usize::from(*start).checked_sub(count) else {
                return false;
            };
            *start = moved as u16; // smaller than the u16 it came from
        }
        self.start += count;
        true
    }
}

impl Default for Frame {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for Frame {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Frame")
            .field("len", &self.len())
            .field("checksum", &self.checksum)
            .field("gso", &self.gso)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headroom_takes_an_encapsulation_and_gives_it_back() {
        let mut frame = Frame::copy_of(&[1, 2, 3, 4]);
        frame.checksum = Checksum::Partial { start: 2, offset: 0 };
        frame.push_front(50).expect("128 octets of headroom").fill(9);
        assert_eq!(frame.len(), 54);
        assert_eq!(frame.checksum, Checksum::Partial { start: 52, offset: 0 });
        assert!(frame.pull_front(50));
        assert_eq!(frame.octets(), [1, 2, 3, 4]);
        assert_eq!(frame.checksum, Checksum::Partial { start: 2, offset: 0 });
    }

    #[test]
    fn what_does_not_fit_changes_nothing() {
        let mut frame = Frame::copy_of(&[1, 2, 3]);
        assert!(frame.push_front(HEADROOM + 1).is_none());
        assert!(!frame.pull_front(4));
        assert!(!frame.set_len(4));
        assert_eq!(frame.octets(), [1, 2, 3]);
        frame.checksum = Checksum::Partial { start: 1, offset: 0 };
        assert!(!frame.pull_front(2));
        assert_eq!(frame.octets(), [1, 2, 3]);
    }
}
