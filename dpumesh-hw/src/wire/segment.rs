//! Segmentation in software (TSO, USO): a super-frame goes in, frames of the path's MTU with finished checksums come
//! out. [`super::coalesce`] is the way back.
//!
//! What is rewritten per segment, as Linux' `tcp_gso_segment` and `__udp_gso_segment` do:
//!
//! | field | rule |
//! |---|---|
//! | IPv4 total length, IPv6 payload length, UDP length | those of the segment |
//! | IPv4 identification | one more per segment |
//! | TCP sequence number | advances by the payload in front |
//! | FIN, PSH | the last segment only |
//! | CWR | the first segment only (RFC 3168 §6.1.2) |
//! | URG, urgent pointer | in segments that lie before the urgent data's end, counted from each one's beginning |
//! | checksums | complete |
//!
//! Everything else, options and extension headers included, is repeated. Where the payload begins is read from the
//! headers: [`dpumesh_core::Gso::header_len`] is a hint of its sender and not believed.
//!
//! The payload is summed while it is copied, once; the headers' part of each checksum is summed once per super-frame
//! and then changed by the words that differ.
//!
//! A frame that is no super-frame passes through as its own single segment, so that a sender needs one path only.

use dpumesh_core::{Checksum, Frame, Gso, GsoKind};

use super::checksum::{self, Sum, Verdict};
use super::field::{be16, be32, put16, put32};
use super::fragment::Fragment;
use super::headers::{Headers, L3};
use super::malformed::{Layer, Malformed, NoRoom};
use super::tcp::Flags;
use super::{ipv4, ipv6, protocol, tcp, udp};

/// The segments of one frame, written one by one or in runs.
#[derive(Debug)]
pub struct Segments<'a> {
    /// The frame without trailing padding.
    octets: &'a [u8],
    mark: u32,
    /// What the segments are to be taken for.
    checksum: Checksum,
    plan: Plan,
    /// First payload octet of the next segment, counted from the first of all.
    at: usize,
    /// Segments written so far.
    index: usize,
}

/// Segments that lie one behind the other, as `UDP_SEGMENT` wants them: all of the same size but the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Octets written.
    pub octets: usize,
    /// Segments written.
    pub segments: usize,
    /// Octets from one segment's prefix to the next one's: the size to give to `UDP_SEGMENT`.
    pub stride: usize,
}

#[derive(Debug)]
enum Plan {
    /// One segment, as it is; finish the checksum at these places.
    Whole(Option<(u16, u16)>),
    Cut(Cut),
}

/// How a super-frame is cut, with what its segments have in common.
#[derive(Debug)]
struct Cut {
    ipv4: bool,
    tcp: bool,
    l3: usize,
    l4: usize,
    /// Octets in front of the payload.
    header_len: usize,
    /// Payload octets of every segment but the last.
    size: usize,
    /// A UDP sender without checksums gets segments without.
    unsummed: bool,
    /// The IPv4 header without length, identification and checksum.
    ip_base: Sum,
    /// Pseudo-header and L4 header without lengths and the fields that differ.
    l4_base: Sum,
    id: u16,
    sequence: u32,
    offset_flags: u16,
    urgent: u16,
}

impl<'a> Segments<'a> {
    /// Plans the segmentation of `frame`.
    ///
    /// # Errors
    /// A super-frame whose headers are malformed, are not those of its [`GsoKind`], are fragmented, have SYN or RST
    /// set, or whose segment size is 0; an open checksum that is not that of its L4 header, or, in a frame that is no
    /// super-frame, lies outside; a super-frame that nobody vouches for with a wrong checksum (cutting it would
    /// make what was corrupted look sound).
    pub fn of(frame: &'a Frame) -> Result<Self, Malformed> {
        let octets = frame.octets();
        let Some(gso) = frame.gso else {
            let open = open_checksum(frame)?;
            let checksum = if open.is_some() {
                Checksum::Verified
            } else {
                frame.checksum
            };
            return Ok(Self {
                octets,
                mark: frame.mark,
                checksum,
                plan: Plan::Whole(open),
                at: 0,
                index: 0,
            });
        };
        let headers = Headers::parse(octets)?;
        check_gso(&gso, &headers)?;
        check_udp_length(octets, &headers)?;
        check_checksum(frame, &headers)?;
        let octets = &octets[..headers.l3_end()];
        let plan = Plan::Cut(Cut::of(octets, &headers, usize::from(gso.size)));
        Ok(Self {
            octets,
            mark: frame.mark,
            checksum: Checksum::Verified,
            plan,
            at: 0,
            index: 0,
        })
    }

    /// Segments still to be written.
    pub fn remaining(&self) -> usize {
        match &self.plan {
            Plan::Whole(_) => 1 - self.index,
            Plan::Cut(cut) => cut.count(self.octets.len()) - self.index,
        }
    }

    /// Octets of the next segment; `None` after the last.
    pub fn next_len(&self) -> Option<usize> {
        if self.remaining() == 0 {
            return None;
        }
        Some(match &self.plan {
            Plan::Whole(_) => self.octets.len(),
            Plan::Cut(cut) => cut.header_len + cut.size.min(self.octets.len() - cut.header_len - self.at),
        })
    }

    /// Writes the next segment into `out`, behind [`dpumesh_core::HEADROOM`]. False, and `out` untouched, after the
    /// last.
    ///
    /// The segment is [`Checksum::Verified`], or, when the frame was none to be cut and had no open checksum, what the
    /// frame was; the frame's mark goes along.
    ///
    /// # Errors
    /// The segment does not fit; it stays the next one.
    pub fn next_into(&mut self, out: &mut Frame) -> Result<bool, NoRoom> {
        let Some(need) = self.next_len() else {
            return Ok(false);
        };
        out.reset(dpumesh_core::HEADROOM);
        if !out.set_len(need) {
            return Err(NoRoom {
                need,
                have: out.tailroom(),
            });
        }
        self.write_next(out.octets_mut());
        out.checksum = self.checksum;
        out.mark = self.mark;
        Ok(true)
    }

    /// Writes as many of the next segments as fit into `out` and are allowed by `most`, one behind the other, each
    /// with `prefix` in front: one buffer for one send with `UDP_SEGMENT`, `prefix` being an encapsulation's header
    /// such as VXLAN's. `None` after the last segment. Linux takes 64 segments per send (newer kernels
    /// 128) and 65,507 octets over IPv4.
    ///
    /// # Errors
    /// Not one segment fits (or `most` is 0); it stays the next one.
    pub fn run_into(&mut self, prefix: &[u8], most: usize, out: &mut [u8]) -> Result<Option<Run>, NoRoom> {
        let Some(first) = self.next_len() else {
            return Ok(None);
        };
        let stride = prefix.len() + first;
        if out.len() < stride || most == 0 {
            return Err(NoRoom {
                need: stride,
                have: if most == 0 { 0 } else { out.len() },
            });
        }
        let mut run = Run {
            octets: 0,
            segments: 0,
            stride,
        };
        while let Some(len) = self.next_len().filter(|_| run.segments < most) {
            let end = run.octets + prefix.len() + len;
            let Some(room) = out.get_mut(run.octets..end) else {
                break;
            };
            let (front, segment) = room.split_at_mut(prefix.len());
            front.copy_from_slice(prefix);
            self.write_next(segment);
            run.octets = end;
            run.segments += 1;
        }
        Ok(Some(run))
    }

    /// Writes the next segment into `out`, which is as long as [`Segments::next_len`] says.
    fn write_next(&mut self, out: &mut [u8]) {
        match &self.plan {
            Plan::Whole(open) => {
                out.copy_from_slice(self.octets);
                if let Some((start, offset)) = *open {
                    checksum::complete_octets(out, start, offset).expect("the place was checked by `of`");
                }
            }
            Plan::Cut(cut) => {
                cut.write(self.octets, self.at, self.index, out);
                self.at += out.len() - cut.header_len;
            }
        }
        self.index += 1;
    }
}

/// Start and offset of a frame's open checksum.
fn open_checksum(frame: &Frame) -> Result<Option<(u16, u16)>, Malformed> {
    let Checksum::Partial { start, offset } = frame.checksum else {
        return Ok(None);
    };
    let need = usize::from(start) + usize::from(offset) + 2;
    Malformed::at_least(Layer::Frame, "checksum start and offset", need, frame.len())?;
    Ok(Some((start, offset)))
}

fn check_gso(gso: &Gso, headers: &Headers) -> Result<(), Malformed> {
    let fits = match gso.kind {
        GsoKind::TcpV4 => headers.l3 == L3::Ipv4 && headers.protocol == protocol::TCP,
        GsoKind::TcpV6 => headers.l3 == L3::Ipv6 && headers.protocol == protocol::TCP,
        GsoKind::Udp => headers.is_ip() && headers.protocol == protocol::UDP,
    };
    if !fits {
        let expected = "the protocol that segmentation was asked for";
        return Err(Malformed::invalid(
            Layer::Frame,
            "gso kind",
            u32::from(headers.protocol),
            expected,
        ));
    }
    if gso.size == 0 {
        return Err(Malformed::invalid(Layer::Frame, "gso size", 0, "1 octet or more"));
    }
    if headers.fragment != Fragment::None {
        return Err(Malformed::invalid(
            Layer::Frame,
            "gso kind",
            0,
            "no segmentation of a fragment",
        ));
    }
    if headers.tcp_flags.intersects(Flags::SYN | Flags::RST) {
        let found = u32::from(headers.tcp_flags.bits());
        return Err(Malformed::invalid(
            Layer::Tcp,
            "flags",
            found,
            "neither SYN nor RST in a super-frame",
        ));
    }
    Ok(())
}

/// Octets behind the datagram (RFC 9868) would become payload.
fn check_udp_length(octets: &[u8], headers: &Headers) -> Result<(), Malformed> {
    if headers.protocol != protocol::UDP {
        return Ok(());
    }
    let length = be16(octets, usize::from(headers.l4_offset) + udp::at::LENGTH);
    if usize::from(length) == headers.l4_range().len() {
        return Ok(());
    }
    Err(Malformed::invalid(
        Layer::Udp,
        "length",
        u32::from(length),
        "the packet's, in a super-frame",
    ))
}

fn check_checksum(frame: &Frame, headers: &Headers) -> Result<(), Malformed> {
    let place = checksum_at(headers.protocol == protocol::TCP) as u16;
    match frame.checksum {
        Checksum::Partial { start, offset } if start == headers.l4_offset && offset == place => Ok(()),
        Checksum::Partial { start, .. } => {
            let expected = "the L4 header's checksum";
            Err(Malformed::invalid(
                Layer::Frame,
                "checksum start and offset",
                u32::from(start),
                expected,
            ))
        }
        Checksum::Verified => Ok(()),
        Checksum::Unverified => match checksum::verify(frame, headers) {
            Verdict::Correct | Verdict::Absent => Ok(()),
            Verdict::Wrong | Verdict::NotCovered => {
                let layer = if headers.protocol == protocol::TCP {
                    Layer::Tcp
                } else {
                    Layer::Udp
                };
                let at = usize::from(headers.l4_offset) + usize::from(place);
                let found = u32::from(be16(frame.octets(), at));
                Err(Malformed::invalid(
                    layer,
                    "checksum",
                    found,
                    "the sum of a super-frame to be cut",
                ))
            }
        },
    }
}

const fn checksum_at(tcp: bool) -> usize {
    if tcp { tcp::at::CHECKSUM } else { udp::at::CHECKSUM }
}

impl Cut {
    fn of(octets: &[u8], headers: &Headers, size: usize) -> Self {
        let (l3, l4) = (usize::from(headers.l3_offset), usize::from(headers.l4_offset));
        let (ipv4, tcp) = (headers.l3 == L3::Ipv4, headers.protocol == protocol::TCP);
        let header_len = headers.payload_offset();
        let (ip, header) = (&octets[l3..l4], &octets[l4..header_len]);
        let word = |at| Sum::word(be16(header, at));
        let varying = if tcp {
            Sum::long(be32(header, tcp::at::SEQUENCE))
                .plus(word(tcp::at::OFFSET_FLAGS))
                .plus(word(tcp::at::CHECKSUM))
                .plus(word(tcp::at::URGENT))
        } else {
            word(udp::at::LENGTH).plus(word(udp::at::CHECKSUM))
        };
        let ip_varying = |at| Sum::word(be16(ip, at));
        Self {
            ipv4,
            tcp,
            l3,
            l4,
            header_len,
            size,
            unsummed: !tcp && ipv4 && be16(header, udp::at::CHECKSUM) == 0,
            ip_base: Sum::of(ip)
                .minus(ip_varying(ipv4::at::TOTAL_LENGTH))
                .minus(ip_varying(ipv4::at::IDENTIFICATION))
                .minus(ip_varying(ipv4::at::CHECKSUM)),
            l4_base: headers.pseudo_sum(0).plus(Sum::of(header)).minus(varying),
            id: be16(ip, ipv4::at::IDENTIFICATION),
            sequence: if tcp { be32(header, tcp::at::SEQUENCE) } else { 0 },
            offset_flags: if tcp {
                be16(header, tcp::at::OFFSET_FLAGS)
            } else {
                0
            },
            urgent: if tcp { be16(header, tcp::at::URGENT) } else { 0 },
        }
    }

    /// Segments of a super-frame of `len` octets; one that carries no payload is one segment.
    const fn count(&self, len: usize) -> usize {
        let count = (len - self.header_len).div_ceil(self.size);
        if count == 0 { 1 } else { count }
    }

    /// Writes segment `index`, whose payload begins at `at`, into `out`.
    fn write(&self, octets: &[u8], at: usize, index: usize, out: &mut [u8]) {
        let (header, payload) = out.split_at_mut(self.header_len);
        header.copy_from_slice(&octets[..self.header_len]);
        let from = self.header_len + at;
        let payload_sum = Sum::copy(&octets[from..from + payload.len()], payload);
        let end = header.len() + payload.len();
        let last = from + payload.len() == octets.len();
        self.write_ip(&mut header[self.l3..self.l4], end - self.l3, index);
        let l4_len = (end - self.l4) as u16;
        let l4 = &mut header[self.l4..];
        let base = self.l4_base.plus(payload_sum).plus(Sum::word(l4_len));
        if self.tcp {
            self.write_tcp(l4, base, at, last)
        } else {
            self.write_udp(l4, base, l4_len)
        }
    }

    fn write_ip(&self, ip: &mut [u8], len: usize, index: usize) {
        if !self.ipv4 {
            put16(ip, ipv6::at::PAYLOAD_LENGTH, (len - ipv6::HEADER_LEN) as u16);
            return;
        }
        let (len, id) = (len as u16, self.id.wrapping_add(index as u16));
        put16(ip, ipv4::at::TOTAL_LENGTH, len);
        put16(ip, ipv4::at::IDENTIFICATION, id);
        let sum = self.ip_base.plus(Sum::word(len)).plus(Sum::word(id));
        put16(ip, ipv4::at::CHECKSUM, sum.checksum());
    }

    fn write_tcp(&self, tcp: &mut [u8], base: Sum, at: usize, last: bool) {
        let sequence = self.sequence.wrapping_add(at as u32);
        let (mut flags, mut urgent) = (self.offset_flags, self.urgent);
        if !last {
            flags &= !(Flags::FIN | Flags::PSH).bits();
        }
        if at > 0 {
            flags &= !Flags::CWR.bits();
            urgent = usize::from(urgent).saturating_sub(at) as u16; // smaller than the u16 it came from
            if urgent == 0 {
                flags &= !Flags::URG.bits();
            }
        }
        put32(tcp, tcp::at::SEQUENCE, sequence);
        put16(tcp, tcp::at::OFFSET_FLAGS, flags);
        put16(tcp, tcp::at::URGENT, urgent);
        let sum = base
            .plus(Sum::long(sequence))
            .plus(Sum::word(flags))
            .plus(Sum::word(urgent));
        put16(tcp, tcp::at::CHECKSUM, sum.checksum());
    }

    fn write_udp(&self, udp: &mut [u8], base: Sum, len: u16) {
        put16(udp, udp::at::LENGTH, len);
        let sum = match base.plus(Sum::word(len)).checksum() {
            _ if self.unsummed => 0,
            0 => 0xffff,
            sum => sum,
        };
        put16(udp, udp::at::CHECKSUM, sum);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wire::checksum::tests::naive;
    use crate::wire::samples::{self, Super};

    fn cut(frame: &Frame) -> Vec<Frame> {
        let mut segments = Segments::of(frame).expect("a valid super-frame");
        let announced = segments.remaining();
        let mut all = vec![];
        let mut out = Frame::with_capacity(dpumesh_core::HEADROOM, 2048);
        while segments.next_into(&mut out).expect("room for an MTU") {
            all.push(out.clone());
        }
        assert_eq!(
            (announced, segments.remaining(), segments.next_len()),
            (all.len(), 0, None)
        );
        all
    }

    /// The L4 checksum by RFC 1071 word by word over a pseudo-header put together here.
    fn naive_l4_is_right(octets: &[u8]) -> bool {
        let headers = Headers::parse(octets).expect("a sound segment");
        let l4 = &octets[headers.l4_range()];
        let skip = if headers.l3 == L3::Ipv4 { 12 } else { 0 };
        let length = (l4.len() as u32).to_be_bytes();
        let pseudo = [
            &headers.src[skip..],
            &headers.dst[skip..],
            &length,
            &[0, 0, 0, headers.protocol],
            l4,
        ];
        naive(&pseudo.concat()) == 0xffff
    }

    #[test]
    fn a_tcp_super_frame_becomes_three_segments() {
        let frame = Super {
            payload: 3000,
            size: 1448,
            flags: 0x99,
            ..Super::default()
        }
        .build();
        let segments = cut(&frame);
        let views: Vec<_> = segments
            .iter()
            .map(|s| Headers::parse(s.octets()).expect("sound"))
            .collect();
        assert_eq!(
            views.iter().map(Headers::payload_len).collect::<Vec<_>>(),
            [1448, 1448, 104]
        );
        let flags: Vec<_> = views.iter().map(|v| v.tcp_flags.bits()).collect();
        assert_eq!(flags, [0x90, 0x10, 0x19]); // CWR ACK, ACK, ACK PSH FIN
        for (index, segment) in segments.iter().enumerate() {
            let octets = segment.octets();
            assert!(naive_l4_is_right(octets));
            assert_eq!(segment.checksum, Checksum::Verified);
            assert_eq!(be16(octets, 18), 77 + index as u16, "identification");
            assert_eq!(be32(octets, 38), 0x1000 + 1448 * index as u32, "sequence");
        }
    }

    #[test]
    fn urgent_data_is_counted_from_each_segment() {
        let mut frame = Super {
            payload: 30,
            size: 10,
            flags: 0x38,
            ..Super::default()
        }
        .build();
        put16(frame.octets_mut(), 52, 15);
        let segments = cut(&frame);
        let urgent: Vec<_> = segments
            .iter()
            .map(|s| (s.octets()[47] & 0x20 != 0, be16(s.octets(), 52)))
            .collect();
        assert_eq!(urgent, [(true, 15), (true, 5), (false, 0)]);
        assert!(segments.iter().all(|segment| naive_l4_is_right(segment.octets())));
    }

    #[test]
    fn each_udp_segment_is_a_datagram() {
        for v6 in [false, true] {
            let frame = Super {
                udp: true,
                v6,
                payload: 2500,
                size: 1000,
                ..Super::default()
            }
            .build();
            let segments = cut(&frame);
            let lens: Vec<_> = segments
                .iter()
                .map(|s| Headers::parse(s.octets()).expect("sound").payload_len())
                .collect();
            assert_eq!(lens, [1000, 1000, 500]);
            assert!(segments.iter().all(|segment| naive_l4_is_right(segment.octets())));
        }
    }

    #[test]
    fn a_frame_that_is_no_super_frame_passes_with_its_checksum_finished() {
        let mut frame = Super {
            payload: 100,
            size: 1448,
            ..Super::default()
        }
        .build();
        frame.gso = None;
        let [segment] = &cut(&frame)[..] else {
            panic!("one")
        };
        assert!(naive_l4_is_right(segment.octets()));
        let arp = Frame::copy_of(&samples::arp_request());
        let [segment] = &cut(&arp)[..] else { panic!("one") };
        assert_eq!(
            (segment.octets(), segment.checksum),
            (arp.octets(), Checksum::Unverified)
        );
    }

    #[test]
    fn a_run_is_what_single_segments_are_with_a_prefix() {
        let frame = Super {
            payload: 10_000,
            size: 1448,
            vlan: true,
            ..Super::default()
        }
        .build();
        let singles = cut(&frame);
        let mut segments = Segments::of(&frame).expect("valid");
        let mut out = vec![0; 4000];
        let mut runs = vec![];
        while let Some(run) = segments
            .run_into(b"prefix!!", 64, &mut out)
            .expect("room for two")
        {
            for chunk in out[..run.octets].chunks(run.stride) {
                runs.push(chunk.to_vec());
            }
        }
        assert_eq!(runs.len(), singles.len());
        for (run, single) in runs.iter().zip(&singles) {
            assert_eq!(run[..], [&b"prefix!!"[..], single.octets()].concat());
        }
        let mut segments = Segments::of(&frame).expect("valid");
        let run = segments
            .run_into(&[], 3, &mut vec![0; 65_536])
            .expect("room")
            .expect("segments");
        assert_eq!((run.segments, segments.remaining()), (3, singles.len() - 3));
    }

    #[test]
    fn without_room_the_segment_stays() {
        let frame = Super {
            payload: 3000,
            size: 1448,
            ..Super::default()
        }
        .build();
        let mut segments = Segments::of(&frame).expect("valid");
        let mut small = Frame::with_capacity(dpumesh_core::HEADROOM, 100);
        assert_eq!(
            segments.next_into(&mut small),
            Err(NoRoom {
                need: 1502,
                have: 100
            })
        );
        assert_eq!(
            segments.run_into(b"12345678", 64, &mut [0; 99]),
            Err(NoRoom { need: 1510, have: 99 })
        );
        assert!(segments.run_into(&[], 0, &mut [0; 2000]).is_err());
        assert_eq!(segments.remaining(), 3);
    }

    #[test]
    fn what_cannot_be_cut_is_refused_by_name() {
        let valid = || {
            Super {
                payload: 3000,
                size: 1448,
                ..Super::default()
            }
            .build()
        };
        let refused = |change: fn(&mut Frame)| {
            let mut frame = valid();
            change(&mut frame);
            Segments::of(&frame).unwrap_err().field
        };
        fn gso(frame: &mut Frame) -> &mut Gso {
            frame.gso.as_mut().expect("a super-frame")
        }
        assert_eq!(refused(|frame| gso(frame).size = 0), "gso size");
        assert_eq!(refused(|frame| gso(frame).kind = GsoKind::TcpV6), "gso kind");
        assert_eq!(refused(|frame| gso(frame).kind = GsoKind::Udp), "gso kind");
        assert_eq!(refused(|frame| frame.octets_mut()[47] |= 2), "flags");
        assert_eq!(
            refused(|frame| frame.checksum = Checksum::Partial {
                start: 14,
                offset: 10
            }),
            "checksum start and offset"
        );
        assert_eq!(refused(|frame| frame.checksum = Checksum::Unverified), "checksum");
        let mut datagram = Super {
            udp: true,
            ..Super::default()
        }
        .build();
        datagram.octets_mut()[39] -= 1;
        assert_eq!(Segments::of(&datagram).unwrap_err().field, "length");
        let mut finished = valid();
        finished.gso = None;
        checksum::complete(&mut finished).expect("valid");
        finished.gso = valid().gso;
        finished.checksum = Checksum::Unverified;
        assert_eq!(cut(&finished).len(), 3);
        assert!(
            checksum::complete(&mut valid()).is_err(),
            "a super-frame's own checksum stays open"
        );
    }

    #[test]
    fn a_udp_sender_without_checksums_gets_segments_without() {
        let mut frame = Super {
            udp: true,
            payload: 300,
            size: 100,
            ..Super::default()
        }
        .build();
        put16(frame.octets_mut(), 40, 0);
        frame.checksum = Checksum::Verified;
        assert!(cut(&frame).iter().all(|segment| be16(segment.octets(), 40) == 0));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        #[test]
        fn segments_carry_the_payload_in_order_with_right_checksums(shape in samples::any_super()) {
            let frame = shape.build();
            let headers = Headers::parse(frame.octets()).expect("valid");
            let mut payload: Vec<u8> = vec![];
            for segment in cut(&frame) {
                prop_assert!(naive_l4_is_right(segment.octets()));
                let view = Headers::parse(segment.octets()).expect("sound");
                prop_assert_eq!(checksum::verify_octets(segment.octets(), &view), Verdict::Correct);
                prop_assert_eq!(view.padding, 0);
                payload.extend(&segment.octets()[view.payload_offset()..]);
            }
            prop_assert_eq!(&payload[..], &frame.octets()[headers.payload_offset()..headers.l3_end()]);
        }
    }
}
