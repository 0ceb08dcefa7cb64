//! Fragmentation of IPv4 on the way (RFC 791 §3.2, RFC 1812 §4.2.2.7): a packet that is too long for the next link goes
//! in, packets that fit come out. Only what allows it: no packet with DF, and never IPv6.
//!
//! Every fragment repeats Ethernet header, tag and IPv4 header. Options without the copied flag become no-operations in
//! all but the first, so that no header changes its length. A fragment may be fragmented again.

use std::ops::Range;

use dpumesh_core::{Checksum, Frame, Mtu};

use super::field::{be16, put16};
use super::headers::{Headers, L3};
use super::ipv4;

/// Fragment offsets count these (RFC 791 §3.1).
const UNIT: usize = 8;
const MORE_FRAGMENTS: u16 = 0x2000;
const OFFSET: u16 = 0x1fff;

/// The fragments of one packet, written one by one.
#[derive(Debug)]
pub struct Fragments<'a> {
    octets: &'a [u8],
    mark: u32,
    l3: usize,
    /// The IPv4 packet's payload that is not written yet.
    rest: Range<usize>,
    /// Offset of the next fragment in units.
    offset: u16,
    /// The packet is a fragment itself, and not the last.
    more: bool,
    /// Payload octets of all fragments but the last.
    share: usize,
    first: bool,
}

impl<'a> Fragments<'a> {
    /// Prepares to send a packet over a link with an MTU; `None` if it may not be fragmented, is a super-frame, has an open
    /// checksum ([`super::checksum::complete`] first), or its header leaves no room for payload.
    pub fn of(frame: &'a Frame, mtu: Mtu) -> Option<Self> {
        let octets = frame.octets();
        let headers = Headers::parse(octets).ok()?;
        let open = matches!(frame.checksum, Checksum::Partial { .. });
        if headers.l3 != L3::Ipv4 || headers.dont_fragment || frame.gso.is_some() || open {
            return None;
        }
        let l3 = usize::from(headers.l3_offset);
        let packet = ipv4::Packet::new(&octets[l3..]).ok()?;
        let payload = l3 + packet.header_len()..l3 + packet.total_len();
        let room = usize::from(mtu.get()).checked_sub(packet.header_len())?;
        let share = room / UNIT * UNIT;
        let flags = be16(octets, l3 + ipv4::at::FLAGS_OFFSET);
        (share > 0).then_some(Self {
            octets,
            mark: frame.mark,
            l3,
            rest: payload,
            offset: flags & OFFSET,
            more: flags & MORE_FRAGMENTS != 0,
            share,
            first: true,
        })
    }

    /// Writes the next fragment; false when all are written, or `out` has no room.
    pub fn next_into(&mut self, out: &mut Frame) -> bool {
        if self.rest.is_empty() {
            return false;
        }
        let payload = self.rest.start..self.rest.end.min(self.rest.start + self.share);
        let last = payload.end == self.rest.end;
        let header = self.header_len();
        out.reset(dpumesh_core::HEADROOM);
        let length = header + payload.len();
        let area = out.receive_area();
        if area.len() < length {
            return false;
        }
        area[..header].copy_from_slice(&self.octets[..header]);
        area[header..length].copy_from_slice(&self.octets[payload.clone()]);
        let packet = &mut area[self.l3..length];
        if !self.first {
            blank_uncopied_options(&mut packet[ipv4::HEADER_LEN..header - self.l3]);
        }
        put16(packet, ipv4::at::TOTAL_LENGTH, (length - self.l3) as u16); // less than the packet's own
        let more = if last && !self.more { 0 } else { MORE_FRAGMENTS };
        put16(packet, ipv4::at::FLAGS_OFFSET, more | self.offset);
        if let Ok(mut packet) = ipv4::Packet::new(packet) {
            packet.fill_checksum();
        }
        out.set_len(length);
        (out.gso, out.mark, out.checksum) = (None, self.mark, Checksum::Unverified);
        self.offset += (payload.len() / UNIT) as u16; // a packet has less than 2^13 units
        self.rest.start = payload.end;
        self.first = false;
        true
    }

    /// Octets in front of the payload.
    fn header_len(&self) -> usize {
        self.l3 + usize::from(self.octets[self.l3] & 0xf) * 4
    }
}

/// Options that are not to be copied become no-operations (RFC 791 §3.1: type 1); what cannot be read stays.
fn blank_uncopied_options(options: &mut [u8]) {
    const END: u8 = 0;
    const NO_OPERATION: u8 = 1;
    const COPIED: u8 = 0x80;
    let mut at = 0;
    while let Some(&kind) = options.get(at) {
        let length = match (kind, options.get(at + 1)) {
            (END, _) => return,
            (NO_OPERATION, _) => 1,
            (_, Some(&length)) if length >= 2 && at + usize::from(length) <= options.len() => {
                usize::from(length)
            }
            _ => return,
        };
        if kind & COPIED == 0 {
            options[at..at + length].fill(NO_OPERATION);
        }
        at += length;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{Fragment, Ipv4Packet, VlanPacket};
    use proptest::prelude::*;

    /// An IPv4 packet in Ethernet, with options (padded to words by no-operations).
    fn packet(payload: usize, options: &[u8], flags: u16, tagged: bool) -> Frame {
        let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        if tagged {
            frame.extend([0x81, 0, 0, 100]);
        }
        frame.extend([8, 0]);
        let l3 = frame.len();
        let words = options.len().div_ceil(4);
        let header = ipv4::HEADER_LEN + words * 4;
        let mut ip = vec![0; ipv4::HEADER_LEN];
        ip[0] = 0x40 | (5 + words as u8);
        put16(&mut ip, ipv4::at::TOTAL_LENGTH, (header + payload) as u16);
        put16(&mut ip, ipv4::at::IDENTIFICATION, 0x1234);
        put16(&mut ip, ipv4::at::FLAGS_OFFSET, flags);
        (ip[8], ip[9]) = (64, 253); // for experiments: nothing above is looked at
        ip[12..20].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
        ip.extend(options);
        ip.resize(header, 1);
        frame.extend(ip);
        frame.extend((0..payload).map(|i| i as u8));
        Ipv4Packet::new(&mut frame[l3..])
            .expect("a packet")
            .fill_checksum();
        Frame::copy_of(&frame)
    }

    fn all(frame: &Frame, mtu: u16) -> Option<Vec<Frame>> {
        let mut fragments = Fragments::of(frame, Mtu::try_from(mtu).expect("an MTU"))?;
        let mut written = Vec::new();
        loop {
            let mut next = Frame::new();
            if !fragments.next_into(&mut next) {
                return Some(written);
            }
            written.push(next);
        }
    }

    proptest! {
        #[test]
        fn fragments_fit_and_are_the_packet_again(
            payload in 1..9000_usize, mtu in 576..3000_u16, tagged: bool, words in 0..6_usize, offset in 0..100_u16, more: bool,
        ) {
            // All fragments but the last are whole units.
            let payload = if more { payload.next_multiple_of(UNIT) } else { payload };
            let flags = offset | if more { MORE_FRAGMENTS } else { 0 };
            let original = packet(payload, &vec![1; words * 4], flags, tagged);
            let fragments = all(&original, mtu).expect("it may be fragmented");
            let l3 = if tagged { 18 } else { 14 };
            let mut whole = Vec::new();
            for (index, fragment) in fragments.iter().enumerate() {
                let octets = fragment.octets();
                prop_assert_eq!(&octets[..l3], &original.octets()[..l3]);
                let ip = Ipv4Packet::new(&octets[l3..]).expect("sound");
                prop_assert!(ip.verify_checksum() && ip.total_len() <= usize::from(mtu));
                prop_assert_eq!(ip.total_len() + l3, octets.len());
                prop_assert_eq!((ip.id(), ip.ttl(), ip.protocol()), (0x1234, 64, 253));
                let last = index + 1 == fragments.len();
                let field = be16(octets, l3 + ipv4::at::FLAGS_OFFSET);
                prop_assert_eq!(usize::from(field & OFFSET), usize::from(offset) + whole.len() / UNIT);
                prop_assert_eq!(field & MORE_FRAGMENTS != 0, more || !last);
                whole.extend_from_slice(ip.payload());
            }
            prop_assert_eq!(&whole[..], &original.octets()[original.len() - payload..]);
        }
    }

    #[test]
    fn options_are_copied_as_their_flag_says() {
        // Record route (7, not copied), router alert (148, copied), an end.
        let options = [7, 3, 4, 148, 4, 0, 0, 0];
        let fragments = all(&packet(1200, &options, 0, false), 576).expect("fragments");
        let of = |frame: &Frame| frame.octets()[14 + 20..14 + 28].to_vec();
        assert_eq!(of(&fragments[0]), options);
        assert_eq!(of(&fragments[1]), [1, 1, 1, 148, 4, 0, 0, 0]);
        assert!(fragments.len() > 2);
    }

    #[test]
    fn what_must_not_be_fragmented_is_not() {
        let fits = Mtu::try_from(576).expect("an MTU");
        assert!(
            Fragments::of(&packet(1000, &[], 0x4000, false), fits).is_none(),
            "DF"
        );
        let mut open = packet(1000, &[], 0, false);
        open.checksum = Checksum::Partial { start: 34, offset: 6 };
        assert!(Fragments::of(&open, fits).is_none(), "an open checksum");
        let v6 = Frame::copy_of(&crate::wire::samples::tcp_frame(true, 1000));
        assert!(Fragments::of(&v6, fits).is_none(), "IPv6");
    }

    #[test]
    fn a_first_and_a_last_fragment_are_told_apart() {
        let fragments = all(&packet(1000, &[], 0, true), 576).expect("fragments");
        let kinds: Vec<_> = fragments
            .iter()
            .map(|frame| Headers::parse(frame.octets()).expect("sound").fragment)
            .collect();
        assert!(matches!(kinds[0], Fragment::First { .. }));
        assert!(matches!(kinds.last(), Some(Fragment::Later { more: false, .. })));
        assert!(VlanPacket::new(&fragments[1].octets()[12..]).is_ok());
    }
}
