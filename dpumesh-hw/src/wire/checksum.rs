//! The Internet checksum (RFC 1071): summing, finishing, verifying, and changing without summing again (RFC 1624).
//!
//! [`Sum`] is an unfolded ones' complement sum of octets in their order in memory; it is swapped to numbers only
//! when it is folded, so that sums add without swaps. [`complete`] finishes what a sender left open
//! ([`Checksum::Partial`]); [`verify`] tells whether a frame's L4 checksum is right.

use std::net::IpAddr;

use dpumesh_core::{Checksum, Frame};

use super::field::{be16, put16};
use super::fragment::Fragment;
use super::headers::{Headers, L3};
use super::malformed::{Layer, Malformed};
use super::{protocol, tcp, udp};

/// A ones' complement sum that is still open.
///
/// The octets it was made of count as pairs: a piece that does not begin at an even place of its packet must be
/// [`Sum::swapped`] before it is added.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum(u64); // below 2^32 after every operation; 16-bit words as the machine loads them

/// What [`verify`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// The checksum is right, or somebody trusted vouches for the contents.
    Correct,
    /// The checksum is wrong: the frame must not be merged, answered or delivered.
    Wrong,
    /// A UDP datagram over IPv4 without checksum.
    Absent,
    /// A fragment, or a protocol whose checksum is not known here.
    NotCovered,
}

impl Sum {
    /// The sum of `octets`; an odd last one counts as if a zero followed (RFC 1071 §1).
    #[inline]
    pub fn of(octets: &[u8]) -> Self {
        let mut blocks = octets.chunks_exact(BLOCK);
        let mut lanes = [0u64; LANES];
        for block in &mut blocks {
            add_block(&mut lanes, block);
        }
        Self::reduced(lanes.iter().sum::<u64>() + tail(blocks.remainder()))
    }

    /// Copies `from` to `to`, which is as long, and sums it on the way: one pass over memory instead of two.
    /// Of slices of different length only the shorter length is copied and summed.
    #[inline]
    pub fn copy(from: &[u8], to: &mut [u8]) -> Self {
        let len = from.len().min(to.len());
        let (from, to) = (&from[..len], &mut to[..len]);
        let (mut sources, mut targets) = (from.chunks_exact(BLOCK), to.chunks_exact_mut(BLOCK));
        let mut lanes = [0u64; LANES];
        for (source, target) in (&mut sources).zip(&mut targets) {
            target.copy_from_slice(source);
            add_block(&mut lanes, source);
        }
        targets.into_remainder().copy_from_slice(sources.remainder());
        Self::reduced(lanes.iter().sum::<u64>() + tail(sources.remainder()))
    }

    /// The sum of one number.
    pub const fn word(value: u16) -> Self {
        Self(value.to_be() as u64)
    }

    /// The sum of a 32-bit number's two halves.
    pub const fn long(value: u32) -> Self {
        Self(value.to_be() as u64)
    }

    /// The sum of the pseudo-header in front of TCP, UDP (RFC 9293 §3.1, RFC 768) and ICMPv6 (RFC 8200 §8.1) for an
    /// upper-layer packet of `len` octets. Addresses of two families have no pseudo-header; they are summed alike.
    pub fn pseudo(source: IpAddr, destination: IpAddr, protocol: u8, len: u32) -> Self {
        let address = |address| match address {
            IpAddr::V4(v4) => Self::of(&std::net::Ipv4Addr::octets(&v4)),
            IpAddr::V6(v6) => Self::of(&std::net::Ipv6Addr::octets(&v6)),
        };
        address(source)
            .plus(address(destination))
            .plus(Self::word(u16::from(protocol)))
            .plus(Self::long(len))
    }

    /// The sum of both.
    pub const fn plus(self, other: Self) -> Self {
        Self::reduced(self.0 + other.0)
    }

    /// This sum without `other`.
    pub const fn minus(self, other: Self) -> Self {
        Self::reduced(self.0 + (!other.0 & 0xffff_ffff))
    }

    /// The sum of the same octets, begun at an odd place of a packet.
    pub const fn swapped(self) -> Self {
        Self((self.native() as u16).swap_bytes() as u64)
    }

    /// The sum as a number of 16 bits: the content of a checksum field that holds a pseudo-header only.
    pub const fn fold(self) -> u16 {
        u16::from_be(self.native() as u16)
    }

    /// What belongs into a checksum field that was zero while summing.
    pub const fn checksum(self) -> u16 {
        !self.fold()
    }

    /// True when the sum, taken over a packet with its checksum in place, says that nothing was changed.
    pub const fn is_complete(self) -> bool {
        self.fold() == 0xffff
    }

    /// Folded to 16 bits in the machine's order.
    const fn native(self) -> u64 {
        let sum = (self.0 & 0xffff) + (self.0 >> 16); // below 2^17
        let sum = (sum & 0xffff) + (sum >> 16);
        (sum & 0xffff) + (sum >> 16)
    }

    /// Below 2^33 from anything, below 2^32 from anything below 2^63.
    const fn reduced(sum: u64) -> Self {
        let sum = (sum & 0xffff_ffff) + (sum >> 32);
        Self((sum & 0xffff_ffff) + (sum >> 32))
    }
}

/// Octets per step of the loop: enough for the compiler to keep all vector units busy.
const BLOCK: usize = 64;
const LANES: usize = 8;

/// Adds the block's 32-bit halves of eight 64-bit words: no carry can be lost for 2^31 blocks.
#[inline(always)]
fn add_block(lanes: &mut [u64; LANES], block: &[u8]) {
    for (lane, word) in lanes.iter_mut().zip(block.chunks_exact(8)) {
        let word = u64::from_ne_bytes([
            word[0], word[1], word[2], word[3], word[4], word[5], word[6], word[7],
        ]);
        *lane += (word & 0xffff_ffff) + (word >> 32);
    }
}

/// The sum of fewer octets than a block.
#[inline(always)]
fn tail(octets: &[u8]) -> u64 {
    let mut words = octets.chunks_exact(4);
    let mut sum: u64 = 0;
    for word in &mut words {
        sum += u64::from(u32::from_ne_bytes([word[0], word[1], word[2], word[3]]));
    }
    let mut last = [0; 4];
    let rest = words.remainder();
    last[..rest.len()].copy_from_slice(rest);
    sum + u64::from(u32::from_ne_bytes(last))
}

/// The checksum field after octets summing to `old` became octets summing to `new` (RFC 1624 §3, equation 3).
///
/// For UDP, a field of 0 (no checksum) must be left alone by the caller.
pub const fn update(field: u16, old: Sum, new: Sum) -> u16 {
    Sum::word(!field).minus(old).plus(new).checksum()
}

/// The same for a field under [`Checksum::Partial`], which holds the pseudo-header's sum, not its complement. Only
/// changes of the pseudo-header (addresses, length) belong here; what is summed later must not be accounted twice.
pub const fn update_partial(field: u16, old: Sum, new: Sum) -> u16 {
    Sum::word(field).minus(old).plus(new).fold()
}

/// Finishes the checksum that a sender left open; the frame is [`Checksum::Verified`] then. Frames whose checksum
/// is not open are left alone.
///
/// A sum of 0 is stored as 0xffff: for UDP 0 would mean "none", for the others both are the same number.
///
/// # Errors
/// The place to be summed or to be written lies outside the frame; or the frame is a super-frame, whose checksum is
/// finished per segment ([`super::segment`]). The frame is unchanged.
pub fn complete(frame: &mut Frame) -> Result<(), Malformed> {
    let Checksum::Partial { start, offset } = frame.checksum else {
        return Ok(());
    };
    if let Some(gso) = frame.gso {
        let expected = "no segmentation: a super-frame's checksum is finished per segment";
        return Err(Malformed::invalid(
            Layer::Frame,
            "gso size",
            u32::from(gso.size),
            expected,
        ));
    }
    complete_octets(frame.octets_mut(), start, offset)?;
    frame.checksum = Checksum::Verified;
    Ok(())
}

pub(super) fn complete_octets(octets: &mut [u8], start: u16, offset: u16) -> Result<(), Malformed> {
    let (start, field) = (usize::from(start), usize::from(start) + usize::from(offset));
    Malformed::at_least(Layer::Frame, "checksum start and offset", field + 2, octets.len())?;
    let sum = Sum::of(&octets[start..]).checksum();
    put16(octets, field, if sum == 0 { 0xffff } else { sum });
    Ok(())
}

/// Whether the frame's L4 checksum is right; `headers` are the frame's own.
///
/// A frame that is [`Checksum::Verified`] or [`Checksum::Partial`] is not summed: its sender is trusted with its
/// contents.
pub fn verify(frame: &Frame, headers: &Headers) -> Verdict {
    match frame.checksum {
        Checksum::Verified | Checksum::Partial { .. } => Verdict::Correct,
        Checksum::Unverified => verify_octets(frame.octets(), headers),
    }
}

/// Whether the L4 checksum in `octets` is right; `headers` are their own.
pub fn verify_octets(octets: &[u8], headers: &Headers) -> Verdict {
    let Some(mut l4) = octets.get(headers.l4_range()) else {
        return Verdict::NotCovered;
    };
    if headers.fragment != Fragment::None {
        return Verdict::NotCovered;
    }
    match (headers.protocol, headers.l3) {
        (protocol::TCP, _) if l4.len() >= tcp::HEADER_LEN => {}
        (protocol::UDP, l3) if l4.len() >= udp::HEADER_LEN => {
            l4 = &l4[..usize::from(be16(l4, udp::at::LENGTH)).min(l4.len())];
            if be16(octets, usize::from(headers.l4_offset) + udp::at::CHECKSUM) == 0 {
                return if l3 == L3::Ipv4 {
                    Verdict::Absent
                } else {
                    Verdict::Wrong
                };
            }
        }
        (protocol::ICMPV4, L3::Ipv4) => return judge(Sum::of(l4)),
        (protocol::ICMPV6, L3::Ipv6) => {}
        _ => return Verdict::NotCovered,
    }
    judge(headers.pseudo_sum(l4.len() as u32).plus(Sum::of(l4)))
}

fn judge(sum: Sum) -> Verdict {
    if sum.is_complete() {
        Verdict::Correct
    } else {
        Verdict::Wrong
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;

    use super::*;

    /// RFC 1071 word by word, independent of the code above.
    pub(in crate::wire) fn naive(octets: &[u8]) -> u16 {
        let mut sum: u32 = 0;
        for pair in octets.chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
            if sum > 0xffff {
                sum -= 0xffff;
            }
        }
        sum as u16
    }

    #[test]
    fn the_example_of_rfc_1071() {
        let sum = Sum::of(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]);
        assert_eq!((sum.fold(), sum.checksum()), (0xddf2, 0x220d));
    }

    #[test]
    fn the_example_of_rfc_1624() {
        // Section 4: the field 0xDD2F, the word 0x5555 becomes 0x3285; the old equation 2 gave 0xFFFF here.
        assert_eq!(update(0xdd2f, Sum::word(0x5555), Sum::word(0x3285)), 0x0000);
    }

    #[test]
    fn pseudo_headers_are_summed_like_their_octets() {
        let (a, b) = (Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(198, 51, 100, 7));
        let octets = [&a.octets()[..], &b.octets(), &[0, 6, 0x12, 0x34]].concat();
        assert_eq!(Sum::pseudo(a.into(), b.into(), 6, 0x1234).fold(), naive(&octets));
        let (a, b) = (
            Ipv6Addr::new(0x2001, 0xdb8, 0, 1, 2, 3, 4, 5),
            Ipv6Addr::LOCALHOST,
        );
        let octets = [&a.octets()[..], &b.octets(), &[0, 1, 0x12, 0x34, 0, 0, 0, 58]].concat();
        assert_eq!(
            Sum::pseudo(a.into(), b.into(), 58, 0x1_1234).fold(),
            naive(&octets)
        );
    }

    #[test]
    fn a_partial_checksum_outside_the_frame_is_refused() {
        let mut frame = Frame::copy_of(&[0; 20]);
        for (start, offset) in [(20, 0), (0, 19), (19, 0), (u16::MAX, u16::MAX)] {
            frame.checksum = Checksum::Partial { start, offset };
            assert_eq!(
                complete(&mut frame).unwrap_err().field,
                "checksum start and offset"
            );
            assert_eq!(frame.checksum, Checksum::Partial { start, offset });
        }
        frame.checksum = Checksum::Partial { start: 10, offset: 8 };
        complete(&mut frame).expect("inside");
        assert_eq!(frame.checksum, Checksum::Verified);
        assert_eq!(frame.octets()[18..], [0xff, 0xff]);
    }

    #[test]
    fn even_and_odd_lengths_around_the_block_are_summed_right() {
        let octets: Vec<u8> = (0..400u32).map(|i| (i * 7 + 250) as u8).collect();
        for len in 0..octets.len() {
            assert_eq!(
                Sum::of(&octets[..len]).fold(),
                naive(&octets[..len]),
                "{len} octets"
            );
            let mut copy = vec![0; len];
            assert_eq!(Sum::copy(&octets[..len], &mut copy).fold(), naive(&octets[..len]));
            assert_eq!(copy, octets[..len]);
        }
        let ones = vec![0xff; 65_535];
        assert_eq!(Sum::of(&ones).fold(), naive(&ones));
    }

    proptest! {
        #[test]
        fn sums_add_up_in_any_pieces(octets: Vec<u8>, cut: prop::sample::Index) {
            let cut = if octets.is_empty() { 0 } else { cut.index(octets.len()) };
            let (front, back) = octets.split_at(cut);
            let back = if cut % 2 == 0 { Sum::of(back) } else { Sum::of(back).swapped() };
            prop_assert_eq!(Sum::of(front).plus(back).fold(), naive(&octets));
        }

        #[test]
        fn an_incremental_update_is_as_good_as_a_new_sum(
            mut octets in prop::collection::vec(any::<u8>(), 16..64), place in 1..7usize, new: [u8; 2],
        ) {
            octets.truncate(octets.len() / 2 * 2);
            octets[0..2].fill(0);
            let sum = Sum::of(&octets).checksum();
            put16(&mut octets, 0, sum);
            let place = 2 * place;
            let field = update(sum, Sum::of(&octets[place..place + 2]), Sum::of(&new));
            octets[place..place + 2].copy_from_slice(&new);
            put16(&mut octets, 0, field);
            prop_assert_eq!(naive(&octets) % 0xffff, 0);

            put16(&mut octets, 0, 0);
            let full = Sum::of(&octets).checksum();
            // Only a packet of zeros has two right answers.
            prop_assert!(field == full || octets.iter().all(|&octet| octet == 0));
        }

        #[test]
        fn a_partial_field_is_updated_like_its_pseudo_header(a: u32, b: u32, c: u32) {
            let pseudo = |source: u32| Sum::pseudo(Ipv4Addr::from(source).into(), Ipv4Addr::from(b).into(), 6, 99);
            let updated = update_partial(pseudo(a).fold(), Sum::long(a), Sum::long(c));
            prop_assert_eq!(updated % 0xffff, pseudo(c).fold() % 0xffff);
        }
    }
}
