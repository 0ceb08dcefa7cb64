//! The virtio-net header that stands before each frame of a TAP or of a packet socket (virtio 1.3 §5.1.6), and its
//! translation to and from [`Frame::checksum`] and [`Frame::gso`].
//!
//! ```text
//! 0 flags  1 gso_type  2 hdr_len  4 gso_size  6 csum_start  8 csum_offset      (10 octets, host byte order)
//! ```
//! The kernel's `hdr_len` is how much of the frame happened to be linear, not where the payload starts; on reception the
//! header length is therefore read from the L4 header at `csum_start`.

use dpumesh_core::{Checksum, Frame, Gso, GsoKind};

/// Octets of the header, without the count of merged buffers.
pub(crate) const HEADER: usize = 10;

const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

const ETHERNET: usize = 14;
const TCP: usize = 20;
const UDP: usize = 8;

/// The header that tells the kernel of a frame's open ends. The frame has passed [`super::refusal`].
pub(crate) fn encode(frame: &Frame) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    match frame.checksum {
        Checksum::Unverified => {}
        Checksum::Verified => header[0] = DATA_VALID,
        Checksum::Partial { start, offset } => {
            header[0] = NEEDS_CSUM;
            header[6..8].copy_from_slice(&start.to_ne_bytes());
            header[8..10].copy_from_slice(&offset.to_ne_bytes());
        }
    }
    if let Some(gso) = frame.gso {
        header[1] = match gso.kind {
            GsoKind::TcpV4 => GSO_TCPV4,
            GsoKind::TcpV6 => GSO_TCPV6,
            GsoKind::Udp => GSO_UDP_L4,
        };
        if gso.ecn {
            header[1] |= GSO_ECN;
        }
        header[2..4].copy_from_slice(&gso.header_len.to_ne_bytes());
        header[4..6].copy_from_slice(&gso.size.to_ne_bytes());
    }
    header
}

/// Notes in the frame what the kernel left open. `None`: the header contradicts the frame, which must be dropped.
pub(crate) fn decode(header: &[u8; HEADER], frame: &mut Frame) -> Option<()> {
    let field = |at: usize| u16::from_ne_bytes([header[at], header[at + 1]]);
    let (start, offset) = (field(6), field(8));
    if frame.len() < ETHERNET {
        return None;
    }
    frame.checksum = match header[0] & (NEEDS_CSUM | DATA_VALID) {
        0 => Checksum::Unverified,
        DATA_VALID => Checksum::Verified,
        _ => {
            let end = usize::from(start) + usize::from(offset) + 2;
            if usize::from(start) < ETHERNET || end > frame.len() {
                return None;
            }
            Checksum::Partial { start, offset }
        }
    };
    let kind = match header[1] & !GSO_ECN {
        GSO_NONE => return Some(()),
        GSO_TCPV4 => GsoKind::TcpV4,
        GSO_TCPV6 => GsoKind::TcpV6,
        GSO_UDP_L4 => GsoKind::Udp,
        _ => return None,
    };
    let size = field(4);
    if size == 0 || !matches!(frame.checksum, Checksum::Partial { .. }) {
        return None;
    }
    let header_len = payload_start(frame.octets(), kind, usize::from(start))?;
    // A frame that one segment holds needs no cutting.
    if frame.len() - usize::from(header_len) > usize::from(size) {
        let ecn = header[1] & GSO_ECN != 0;
        frame.gso = Some(Gso {
            kind,
            size,
            header_len,
            ecn,
        });
    }
    Some(())
}

/// First octet behind the L4 header that starts at `l4`.
fn payload_start(octets: &[u8], kind: GsoKind, l4: usize) -> Option<u16> {
    let len = match kind {
        GsoKind::Udp => UDP,
        GsoKind::TcpV4 | GsoKind::TcpV6 => usize::from(octets.get(l4 + 12)? >> 4) * 4,
    };
    let shortest = if kind == GsoKind::Udp { UDP } else { TCP };
    let end = l4 + len;
    (len >= shortest && end < octets.len())
        .then(|| u16::try_from(end).ok())
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp_frame(len: usize) -> Frame {
        let mut octets = vec![0; len];
        octets[34 + 12] = 8 << 4;
        Frame::copy_of(&octets)
    }

    #[test]
    fn promises_survive_the_header() {
        let mut frame = tcp_frame(3000);
        frame.checksum = Checksum::Partial {
            start: 34,
            offset: 16,
        };
        frame.gso = Some(Gso {
            kind: GsoKind::TcpV4,
            size: 1448,
            header_len: 66,
            ecn: true,
        });
        let mut read = tcp_frame(3000);
        decode(&encode(&frame), &mut read).expect("consistent");
        assert_eq!((read.checksum, read.gso), (frame.checksum, frame.gso));
        let mut plain = tcp_frame(100);
        plain.checksum = Checksum::Verified;
        let mut read = tcp_frame(100);
        decode(&encode(&plain), &mut read).expect("consistent");
        assert_eq!((read.checksum, read.gso), (Checksum::Verified, None));
    }

    #[test]
    fn a_header_that_contradicts_its_frame_is_refused() {
        let header = |flags, kind, size: u16, start: u16, offset: u16| {
            let mut header = [0; HEADER];
            header[0] = flags;
            header[1] = kind;
            header[4..6].copy_from_slice(&size.to_ne_bytes());
            header[6..8].copy_from_slice(&start.to_ne_bytes());
            header[8..10].copy_from_slice(&offset.to_ne_bytes());
            header
        };
        let cases = [
            ("sum beyond the frame", header(NEEDS_CSUM, 0, 0, 99, 0)),
            ("sum inside Ethernet", header(NEEDS_CSUM, 0, 0, 4, 2)),
            ("segments of nothing", header(NEEDS_CSUM, GSO_TCPV4, 0, 34, 16)),
            ("closed checksum", header(0, GSO_TCPV4, 10, 34, 16)),
            ("unknown segmentation", header(NEEDS_CSUM, 3, 10, 34, 6)),
            (
                "L4 header beyond the frame",
                header(NEEDS_CSUM, GSO_TCPV4, 10, 90, 6),
            ),
        ];
        for (what, header) in cases {
            assert!(decode(&header, &mut tcp_frame(100)).is_none(), "{what}");
        }
    }

    #[test]
    fn no_length_panics() {
        for len in 0..120 {
            let mut frame = Frame::copy_of(&vec![0xff; len]);
            for kind in 0..=255 {
                let header = [NEEDS_CSUM, kind, 1, 1, 1, 1, 20, 0, 3, 0];
                let _ = decode(&header, &mut frame);
            }
        }
    }
}
