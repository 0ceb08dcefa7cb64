//! Coalescing (GRO): consecutive segments of one TCP stream become one super-frame, so that lookup, rewriting and
//! the send to a pod happen once. [`super::segment`] is the way back, and gives back the same segments.
//!
//! A segment is appended to the one in front of it when, as in Linux' `tcp_gro_receive`,
//!
//! * both are whole TCP packets without IP options and extension headers, and differ in nothing but lengths,
//!   checksums, sequence number, IPv4 identification, FIN and PSH. (Timestamps must be equal: taking the latest would
//!   lose what the sender measured.) The identification advances by one, unless DF makes it meaningless (RFC 6864);
//! * the sequence number continues; it has payload, no more than the first segment, and the whole stays within
//!   65,535 octets and within the first one's frame;
//! * nothing asks to be handed on: SYN, RST, URG never merge; PSH, FIN or a short segment is the last one; CWR may be
//!   on the first one only;
//! * **both checksums are right**. A segment is summed before it counts as merged, since the super-frame's
//!   checksum is made anew and would make what was corrupted look sound.
//!
//! Segments of a flow never overtake each other: what cannot be merged closes its flow's super-frame and stays
//! behind it. Other protocols, UDP too, are left alone.

use dpumesh_core::{Checksum, Frame, Gso, GsoKind};

use super::checksum::{self, Sum, Verdict};
use super::field::{be16, be32, put16};
use super::fragment::Fragment;
use super::headers::{Headers, L3};
use super::tcp::Flags;
use super::{ipv4, ipv6, protocol, tcp};

/// Flows that are open at one time; for one more, one of them is closed, in turn.
pub const FLOWS: usize = 8;

/// Largest IP packet made.
const MAX_PACKET: usize = 65_535;

/// Merges within `batch`, in place: the frames that remain are moved to the front in their order, and their number is
/// returned. Behind them lie the frames that were merged into others, to be used again.
///
/// A merged frame has [`Frame::gso`] set and its checksum [`Checksum::Partial`], like a super-frame from a sender.
/// Frames need room behind their octets to take others in; [`Frame::new`] gives it.
pub fn coalesce(batch: &mut [Frame]) -> usize {
    let mut flows = Coalescer::new();
    let mut kept = 0;
    for next in 0..batch.len() {
        let (front, rest) = batch.split_at_mut(next);
        let (heads, frame) = (&mut front[..kept], &rest[0]);
        if frame.gso.is_some() {
            flows.pass(heads, frame.octets());
        } else if flows.absorb(heads, kept, frame.octets(), frame.checksum) {
            continue;
        }
        batch.swap(kept, next);
        kept += 1;
    }
    flows.finish(&mut batch[..kept]);
    kept
}

/// The open flows of one batch. For a batch in frames use [`coalesce`]; this is for segments that are still octets,
/// such as the pieces of a `UDP_GRO` receive, so that they are copied once, to where they stay.
#[derive(Debug, Default)]
pub struct Coalescer {
    slots: [Option<Slot>; FLOWS],
    /// The slot to be taken next when all are taken.
    turn: usize,
}

/// A frame that others may be appended to.
#[derive(Clone, Copy, Debug)]
struct Slot {
    /// Its place among the heads.
    head: usize,
    /// The first segment's headers.
    headers: Headers,
    /// Length of the frame so far, without padding; another length means that the caller changed it.
    end: usize,
    /// Payload octets of the first segment.
    size: usize,
    /// Segments so far.
    segments: usize,
    /// Sequence number and identification that the next segment must have.
    sequence: u32,
    id: u16,
    /// FIN and PSH of the last segment.
    last_flags: Flags,
}

impl Coalescer {
    /// No flow open.
    pub const fn new() -> Self {
        Self {
            slots: [None; FLOWS],
            turn: 0,
        }
    }

    /// Offers a segment, to be appended to one of `heads`, the frames of this batch so far. True when it was, and is
    /// done with. False when the caller must keep it: as `heads[at]` of the next calls, unchanged.
    ///
    /// `checksum` is the segment's: only [`Checksum::Unverified`] ones are summed.
    pub fn absorb(&mut self, heads: &mut [Frame], at: usize, segment: &[u8], checksum: Checksum) -> bool {
        let Some(headers) = tcp_headers(segment) else {
            return false;
        };
        if let Some(index) = self.find(&headers) {
            match self.merge(index, heads, segment, checksum, &headers) {
                Merged::More => return true,
                Merged::Last => {
                    self.close(index, heads);
                    return true;
                }
                Merged::No => self.close(index, heads),
            }
        }
        if may_begin(&headers) {
            self.open(heads, at, segment, headers);
        }
        false
    }

    /// Tells that a frame which must not be merged (a super-frame) is kept at this place of the batch.
    pub fn pass(&mut self, heads: &mut [Frame], octets: &[u8]) {
        let Some(index) = tcp_headers(octets).and_then(|headers| self.find(&headers)) else {
            return;
        };
        self.close(index, heads);
    }

    /// Closes all flows; to be called at the end of a batch, before its frames are looked at.
    pub fn finish(&mut self, heads: &mut [Frame]) {
        for index in 0..FLOWS {
            self.close(index, heads);
        }
    }

    fn find(&self, headers: &Headers) -> Option<usize> {
        self.slots
            .iter()
            .position(|slot| slot.as_ref().is_some_and(|slot| slot.is_flow_of(headers)))
    }

    fn open(&mut self, heads: &mut [Frame], at: usize, segment: &[u8], headers: Headers) {
        let free = self.slots.iter().position(Option::is_none);
        let index = free.unwrap_or(self.turn);
        if free.is_none() {
            self.close(index, heads);
        }
        self.turn = (index + 1) % FLOWS;
        self.slots[index] = Some(Slot::of(at, segment, headers));
    }

    fn merge(
        &mut self,
        index: usize,
        heads: &mut [Frame],
        segment: &[u8],
        checksum: Checksum,
        headers: &Headers,
    ) -> Merged {
        let Some(slot) = &mut self.slots[index] else {
            return Merged::No;
        };
        let Some(head) = heads.get_mut(slot.head).filter(|head| slot.is_unchanged(head)) else {
            return Merged::No;
        };
        if !slot.continues(head.octets(), segment, headers) || !slot.has_room(head, headers.payload_len()) {
            return Merged::No;
        }
        if slot.segments == 1 && !slot.head_is_sound(head) {
            return Merged::No;
        }
        if !slot.append(head, segment, checksum, headers) {
            return Merged::No;
        }
        let ends = headers.payload_len() < slot.size || !slot.last_flags.is_empty();
        if ends { Merged::Last } else { Merged::More }
    }

    fn close(&mut self, index: usize, heads: &mut [Frame]) {
        let Some(slot) = self.slots[index].take().filter(|slot| slot.segments > 1) else {
            return;
        };
        if let Some(head) = heads.get_mut(slot.head).filter(|head| head.len() == slot.end) {
            slot.seal(head);
        }
    }
}

enum Merged {
    /// Appended; more may follow.
    More,
    /// Appended; the super-frame is complete.
    Last,
    /// Not appended, and nothing of the flow may be any more.
    No,
}

/// The headers of a whole TCP packet.
fn tcp_headers(octets: &[u8]) -> Option<Headers> {
    let headers = Headers::parse(octets).ok()?;
    (headers.protocol == protocol::TCP && headers.fragment == Fragment::None).then_some(headers)
}

fn may_begin(headers: &Headers) -> bool {
    use Flags as F;
    let plain_ip = match headers.l3 {
        L3::Ipv4 => usize::from(headers.l4_offset - headers.l3_offset) == ipv4::HEADER_LEN,
        _ => usize::from(headers.l4_offset - headers.l3_offset) == ipv6::HEADER_LEN,
    };
    let holds_back = F::SYN | F::RST | F::URG | F::FIN | F::PSH;
    plain_ip
        && headers.payload_len() > 0
        && headers.tcp_flags.contains(F::ACK)
        && !headers.tcp_flags.intersects(holds_back)
}

impl Slot {
    fn of(head: usize, segment: &[u8], headers: Headers) -> Self {
        let size = headers.payload_len();
        let l4 = usize::from(headers.l4_offset);
        let sequence = be32(segment, l4 + tcp::at::SEQUENCE).wrapping_add(size as u32);
        let id = identification(segment, &headers).wrapping_add(1);
        let end = headers.l3_end();
        Self {
            head,
            headers,
            end,
            size,
            segments: 1,
            sequence,
            id,
            last_flags: Flags::empty(),
        }
    }

    fn is_flow_of(&self, other: &Headers) -> bool {
        let own = &self.headers;
        own.src_port == other.src_port
            && own.dst_port == other.dst_port
            && own.src == other.src
            && own.dst == other.dst
            && own.l3 == other.l3
            && own.vlan == other.vlan
    }

    /// The frame is the one that was kept: no stage may touch it before the flow is closed.
    fn is_unchanged(&self, head: &Frame) -> bool {
        let padding = if self.segments == 1 {
            self.headers.padding as usize
        } else {
            0
        };
        head.gso.is_none() && head.len() == self.end + padding
    }

    /// `segment` says what the first one said, and begins where the last one ended.
    fn continues(&self, head: &[u8], segment: &[u8], headers: &Headers) -> bool {
        let (l3, l4, payload) = (
            usize::from(self.headers.l3_offset),
            usize::from(self.headers.l4_offset),
            self.headers.payload_offset(),
        );
        let lens = (1..=self.size).contains(&headers.payload_len());
        let places = (l3, l4, payload)
            == (
                usize::from(headers.l3_offset),
                usize::from(headers.l4_offset),
                headers.payload_offset(),
            );
        if !lens || !places || be32(segment, l4 + tcp::at::SEQUENCE) != self.sequence {
            return false;
        }
        head[..l3] == segment[..l3]
            && self.ip_continues(&head[l3..l4], &segment[l3..l4])
            && tcp_is_alike(&head[l4..payload], &segment[l4..payload])
    }

    fn ip_continues(&self, head: &[u8], ip: &[u8]) -> bool {
        if self.headers.l3 == L3::Ipv6 {
            let length = ipv6::at::PAYLOAD_LENGTH;
            return head[..length] == ip[..length] && head[length + 2..] == ip[length + 2..];
        }
        let dont_fragment = ip[ipv4::at::FLAGS_OFFSET] & 0x40 != 0;
        head[..ipv4::at::TOTAL_LENGTH] == ip[..ipv4::at::TOTAL_LENGTH]
            && (dont_fragment || be16(ip, ipv4::at::IDENTIFICATION) == self.id)
            && head[ipv4::at::FLAGS_OFFSET..ipv4::at::CHECKSUM]
                == ip[ipv4::at::FLAGS_OFFSET..ipv4::at::CHECKSUM]
            && head[ipv4::at::SOURCE..] == ip[ipv4::at::SOURCE..]
    }

    fn has_room(&self, head: &Frame, more: usize) -> bool {
        let padding = head.len() - self.end;
        self.end + more - usize::from(self.headers.l3_offset) <= MAX_PACKET
            && head.tailroom() + padding >= more
    }

    fn head_is_sound(&self, head: &Frame) -> bool {
        match head.checksum {
            Checksum::Partial { .. } => is_own_sum(head.checksum, &self.headers),
            _ => checksum::verify(head, &self.headers) == Verdict::Correct,
        }
    }

    /// Copies the payload behind the head's, summing it on the way; takes it back when the sum is wrong.
    fn append(&mut self, head: &mut Frame, segment: &[u8], checksum: Checksum, headers: &Headers) -> bool {
        let payload = &segment[headers.payload_offset()..headers.l3_end()];
        if !head.set_len(self.end + payload.len()) {
            return false;
        }
        let room = &mut head.octets_mut()[self.end..];
        let sound = match checksum {
            Checksum::Unverified => {
                let header = &segment[usize::from(headers.l4_offset)..headers.payload_offset()];
                let pseudo = headers.pseudo_sum(headers.l4_range().len() as u32);
                pseudo
                    .plus(Sum::of(header))
                    .plus(Sum::copy(payload, room))
                    .is_complete()
            }
            Checksum::Verified => {
                room.copy_from_slice(payload);
                true
            }
            Checksum::Partial { .. } => {
                room.copy_from_slice(payload);
                is_own_sum(checksum, headers)
            }
        };
        if !sound {
            head.set_len(self.end);
            return false;
        }
        self.end += payload.len();
        self.segments += 1;
        self.sequence = self.sequence.wrapping_add(payload.len() as u32);
        self.id = identification(segment, headers).wrapping_add(1);
        self.last_flags = headers.tcp_flags & (Flags::FIN | Flags::PSH);
        true
    }

    /// Makes the head a super-frame: lengths, the last segment's FIN and PSH, an open checksum.
    fn seal(&self, head: &mut Frame) {
        let (l3, l4) = (
            usize::from(self.headers.l3_offset),
            usize::from(self.headers.l4_offset),
        );
        let (l3_len, l4_len) = (self.end - l3, self.end - l4);
        let octets = head.octets_mut();
        if self.headers.l3 == L3::Ipv4 {
            let length = l3 + ipv4::at::TOTAL_LENGTH;
            let field = l3 + ipv4::at::CHECKSUM;
            let (old, new) = (Sum::word(be16(octets, length)), Sum::word(l3_len as u16));
            let sum = checksum::update(be16(octets, field), old, new);
            put16(octets, length, l3_len as u16);
            put16(octets, field, sum);
        } else {
            put16(octets, l3 + ipv6::at::PAYLOAD_LENGTH, l4_len as u16);
        }
        let flags = l4 + tcp::at::OFFSET_FLAGS;
        put16(octets, flags, be16(octets, flags) | self.last_flags.bits());
        put16(
            octets,
            l4 + tcp::at::CHECKSUM,
            self.headers.pseudo_sum(l4_len as u32).fold(),
        );
        head.checksum = Checksum::Partial {
            start: self.headers.l4_offset,
            offset: tcp::at::CHECKSUM as u16,
        };
        head.gso = Some(Gso {
            kind: if self.headers.l3 == L3::Ipv4 {
                GsoKind::TcpV4
            } else {
                GsoKind::TcpV6
            },
            size: self.size as u16,
            header_len: self.headers.payload_offset() as u16,
            ecn: self.headers.tcp_flags.contains(Flags::CWR),
        });
    }
}

/// An open checksum is the TCP header's, so that closing it anew changes nothing of what it covers.
fn is_own_sum(checksum: Checksum, headers: &Headers) -> bool {
    checksum
        == Checksum::Partial {
            start: headers.l4_offset,
            offset: tcp::at::CHECKSUM as u16,
        }
}

fn identification(octets: &[u8], headers: &Headers) -> u16 {
    match headers.l3 {
        L3::Ipv4 => be16(octets, usize::from(headers.l3_offset) + ipv4::at::IDENTIFICATION),
        _ => 0,
    }
}

/// Equal but for sequence number, checksum, FIN, PSH, and a CWR on the first.
fn tcp_is_alike(head: &[u8], segment: &[u8]) -> bool {
    const MAY_END: u16 = Flags::FIN.union(Flags::PSH).bits();
    let flags = |tcp| be16(tcp, tcp::at::OFFSET_FLAGS);
    let (first, next) = (flags(head), flags(segment));
    first & !Flags::CWR.bits() == next & !MAY_END
        && head[..tcp::at::SEQUENCE] == segment[..tcp::at::SEQUENCE]
        && head[tcp::at::ACKNOWLEDGMENT..tcp::at::OFFSET_FLAGS]
            == segment[tcp::at::ACKNOWLEDGMENT..tcp::at::OFFSET_FLAGS]
        && head[tcp::at::WINDOW..tcp::at::CHECKSUM] == segment[tcp::at::WINDOW..tcp::at::CHECKSUM]
        && head[tcp::at::URGENT..] == segment[tcp::at::URGENT..]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wire::Segments;
    use crate::wire::samples::{self, Super};

    fn segments(frame: &Frame) -> Vec<Frame> {
        let mut plan = Segments::of(frame).expect("a valid super-frame");
        let mut all = vec![];
        let mut out = Frame::new();
        while plan.next_into(&mut out).expect("room for any frame") {
            out.checksum = Checksum::Unverified; // as if it came over a wire
            all.push(out.clone());
        }
        all
    }

    fn three() -> Vec<Frame> {
        segments(
            &Super {
                payload: 3000,
                size: 1000,
                ..Super::default()
            }
            .build(),
        )
    }

    #[test]
    fn three_segments_become_the_super_frame_they_came_from() {
        let whole = Super {
            payload: 3000,
            size: 1000,
            flags: 0x99,
            timestamps: true,
            ..Super::default()
        }
        .build();
        let mut batch = segments(&whole);
        assert_eq!(coalesce(&mut batch), 1);
        assert_eq!(batch[0].octets(), whole.octets());
        assert_eq!((batch[0].gso, batch[0].checksum), (whole.gso, whole.checksum));
    }

    #[test]
    fn two_flows_are_merged_side_by_side() {
        let one = Super {
            payload: 3000,
            size: 1000,
            ..Super::default()
        }
        .build();
        let two = Super {
            payload: 2000,
            size: 1000,
            v6: true,
            ..Super::default()
        }
        .build();
        let (first, second) = (segments(&one), segments(&two));
        let mut batch: Vec<Frame> = [&first[0], &second[0], &first[1], &second[1], &first[2]]
            .map(Frame::clone)
            .into();
        assert_eq!(coalesce(&mut batch), 2);
        assert_eq!(
            (batch[0].octets(), batch[1].octets()),
            (one.octets(), two.octets())
        );
    }

    /// One change to the second of three segments, and how many frames remain of them.
    #[test]
    fn what_differs_is_not_merged_and_does_not_lose_its_place() {
        let kept = |change: fn(&mut [u8])| {
            let mut batch = three();
            let octets = batch[1].octets_mut();
            change(octets);
            samples::fill_ipv4_checksum(octets, 14);
            samples::fill_tcp_v4_checksum(octets);
            let wanted = batch.clone();
            let kept = coalesce(&mut batch);
            if kept == 3 {
                for (after, before) in batch.iter().zip(&wanted) {
                    assert_eq!(
                        after.octets(),
                        before.octets(),
                        "what was not merged is as it was"
                    );
                }
            }
            kept
        };
        assert_eq!(kept(|_| {}), 1);
        assert_eq!(kept(|o| o[0] ^= 4), 3, "destination MAC");
        assert_eq!(kept(|o| o[15] = 4), 3, "DSCP");
        assert_eq!(kept(|o| o[22] = 63), 3, "TTL");
        assert_eq!(kept(|o| o[41] ^= 1), 3, "sequence");
        assert_eq!(kept(|o| o[45] ^= 1), 3, "acknowledgment");
        assert_eq!(kept(|o| o[49] ^= 1), 3, "window");
        assert_eq!(kept(|o| o[47] |= 0x02), 3, "SYN");
        assert_eq!(kept(|o| o[47] |= 0x04), 3, "RST");
        assert_eq!(kept(|o| o[47] |= 0x20), 3, "URG");
        assert_eq!(kept(|o| o[47] |= 0x40), 3, "ECE");
        assert_eq!(
            kept(|o| o[47] |= 0x80),
            2,
            "CWR begins anew, and the third continues it"
        );
        assert_eq!(kept(|o| o[46] |= 0x01), 3, "AE");
        assert_eq!(
            kept(|o| o[47] |= 0x08),
            2,
            "PSH ends the first, the third is alone"
        );
        assert_eq!(
            kept(|o| o[19] ^= 8),
            1,
            "DF is set: the identification means nothing"
        );
        assert_eq!(kept(|o| o[20] = 0), 3, "DF");
        assert_eq!(
            kept(|o| o[35] ^= 1),
            3,
            "another flow: the third does not continue the first"
        );
    }

    #[test]
    fn without_df_the_identification_must_advance() {
        let check = |id: u8, wanted| {
            let mut batch = three();
            for (index, frame) in batch.iter_mut().enumerate() {
                let octets = frame.octets_mut();
                octets[20] = 0;
                octets[19] = if index == 1 { id } else { octets[19] };
                samples::fill_ipv4_checksum(octets, 14);
            }
            assert_eq!(coalesce(&mut batch), wanted);
        };
        check(78, 1);
        check(77, 3);
    }

    #[test]
    fn a_corrupted_segment_is_never_laundered() {
        for broken in 0..3 {
            let mut batch = three();
            batch[broken].octets_mut()[600] ^= 0x10;
            let corrupted = batch[broken].octets().to_vec();
            let kept = coalesce(&mut batch);
            assert_eq!(kept, if broken == 1 { 3 } else { 2 });
            let found = batch[..kept]
                .iter()
                .filter(|frame| frame.octets() == corrupted)
                .count();
            assert_eq!(found, 1, "it is forwarded as it came");
        }
    }

    #[test]
    fn who_is_vouched_for_is_not_summed() {
        let mut batch = three();
        for frame in &mut batch {
            frame.octets_mut()[50] ^= 0xff;
            frame.checksum = Checksum::Verified;
        }
        assert_eq!(coalesce(&mut batch), 1);
        let mut batch = three();
        for frame in &mut batch {
            frame.checksum = Checksum::Partial {
                start: 34,
                offset: 16,
            };
        }
        assert_eq!(coalesce(&mut batch), 1);
        let mut batch = three();
        batch[1].checksum = Checksum::Partial { start: 34, offset: 2 };
        assert_eq!(coalesce(&mut batch), 3, "somebody else's sum");
    }

    #[test]
    fn padding_does_not_become_payload() {
        let whole = Super {
            payload: 12,
            size: 4,
            ..Super::default()
        }
        .build();
        let mut batch = segments(&whole);
        for frame in &mut batch {
            assert!(frame.set_len(60));
            frame.octets_mut()[58..].fill(0xee);
        }
        assert_eq!(coalesce(&mut batch), 1);
        assert_eq!(batch[0].octets(), whole.octets());
    }

    #[test]
    fn the_largest_packet_and_the_room_are_kept_to() {
        let one = Super {
            payload: 40_000,
            size: 1000,
            ..Super::default()
        };
        let two = Super {
            sequence: one.sequence + 40_000,
            id: 77 + 40,
            ..one.clone()
        };
        let mut batch = [segments(&one.build()), segments(&two.build())].concat();
        assert_eq!(coalesce(&mut batch), 2);
        let lens: Vec<_> = batch[..2].iter().map(Frame::len).collect();
        assert_eq!(lens, [54 + 65_000, 54 + 15_000]);

        let mut batch: Vec<Frame> = three()
            .iter()
            .map(|frame| Frame::copy_of(frame.octets()))
            .collect();
        assert_eq!(coalesce(&mut batch), 3, "no room behind the first");
    }

    #[test]
    fn super_frames_udp_and_acks_pass_in_their_place() {
        let mut batch = three();
        let ahead = Super {
            sequence: 0x1000 + 1000,
            payload: 3000,
            size: 1000,
            ..Super::default()
        }
        .build();
        batch.insert(1, ahead);
        assert_eq!(
            coalesce(&mut batch),
            3,
            "the super-frame closes the first, the last two are merged"
        );
        assert_eq!(
            (batch[0].gso, batch[1].gso.is_some(), batch[2].gso.is_some()),
            (None, true, true)
        );

        let datagrams = segments(
            &Super {
                udp: true,
                payload: 300,
                size: 100,
                ..Super::default()
            }
            .build(),
        );
        assert_eq!(coalesce(&mut datagrams.clone()), 3);
        let acks: Vec<Frame> = (0..3)
            .map(|_| {
                segments(
                    &Super {
                        payload: 0,
                        ..Super::default()
                    }
                    .build(),
                )
                .remove(0)
            })
            .collect();
        assert_eq!(coalesce(&mut acks.clone()), 3);
    }

    #[test]
    fn more_flows_than_slots_are_still_in_order() {
        let mut batch = vec![];
        for port in 0..20u8 {
            for mut segment in three() {
                segment.octets_mut()[34] = port;
                samples::fill_tcp_v4_checksum(segment.octets_mut());
                batch.push(segment);
            }
        }
        let mut striped: Vec<Frame> = (0..3)
            .flat_map(|part| batch.iter().skip(part).step_by(3).cloned())
            .collect();
        assert_eq!(coalesce(&mut batch), 20);
        assert_eq!(
            coalesce(&mut striped),
            60,
            "each flow was closed before its next segment came"
        );
    }

    #[test]
    fn octets_are_absorbed_without_frames_of_their_own() {
        let whole = Super {
            payload: 3000,
            size: 1000,
            ..Super::default()
        }
        .build();
        let mut flows = Coalescer::new();
        let mut heads: Vec<Frame> = vec![];
        for segment in segments(&whole) {
            let at = heads.len();
            if !flows.absorb(&mut heads, at, segment.octets(), Checksum::Unverified) {
                heads.push(segment);
            }
        }
        flows.finish(&mut heads);
        assert_eq!(heads.len(), 1);
        assert_eq!(heads[0].octets(), whole.octets());
    }

    #[test]
    fn a_caller_that_loses_its_heads_loses_merging_only() {
        let mut flows = Coalescer::new();
        let batch = three();
        assert!(!flows.absorb(&mut [], 0, batch[0].octets(), Checksum::Unverified));
        assert!(!flows.absorb(&mut [], 0, batch[1].octets(), Checksum::Unverified));
        let mut other = [Frame::copy_of(&samples::ping_v4())];
        assert!(!flows.absorb(&mut other, 0, batch[2].octets(), Checksum::Unverified));
        flows.finish(&mut other);
        assert_eq!(other[0].octets(), samples::ping_v4());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(96))]
        #[test]
        fn segment_and_coalesce_are_inverse(shape in samples::any_super()) {
            let whole = Super { udp: false, padding: 0, ..shape }.build();
            let mut batch = segments(&whole);
            prop_assume!(batch.len() > 1);
            prop_assert_eq!(coalesce(&mut batch), 1);
            prop_assert_eq!(batch[0].octets(), whole.octets());
            prop_assert_eq!((batch[0].gso, batch[0].checksum), (whole.gso, whole.checksum));
        }
    }
}
