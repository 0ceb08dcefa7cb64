//! What a packet looks like to the tables: [`FlowKey`] for exact match, [`WideKey`] for masked rules.
//!
//! Both are machine words, so that masking, hashing and comparing cost one instruction per 8 octets. The first five
//! words of a [`WideKey`] *are* the flow key. Bit 0 is the least significant bit.
//!
//! | word | bits | field |
//! |---|---|---|
//! | 0, 1 | 63..0 each | source address, network order: word 0 holds octets 0..8 (IPv4 as `::ffff:a.b.c.d`) |
//! | 2, 3 | 63..0 each | destination address, likewise |
//! | 4 | 15..0 | source port (ICMP: type) |
//! | 4 | 31..16 | destination port (ICMP: code) |
//! | 4 | 47..32 | zone |
//! | 4 | 55..48 | IP protocol |
//! | 4 | 63..56 | [`FlowFlags`] |
//! | 5 | 47..0 | Ethernet source |
//! | 5 | 63..48 | EtherType (behind the VLAN tag, if any) |
//! | 6 | 47..0 | Ethernet destination |
//! | 6 | 63..48 | VLAN id 0..=4094, or 0xffff for an untagged frame |
//! | 7 | 31..0 | mark |
//! | 7 | 39..32 | TCP flags (RFC 9293, CWR to FIN) |
//! | 7 | 47..40 | DSCP (RFC 2474, 0..=63) |
//! | 7 | 63..48 | reserved, zero |
//!
//! A later fragment has no transport header: its ports are 0 and [`FlowFlags::LATER_FRAGMENT`] is set, so it never
//! hits the flow of its first fragment by accident. A frame that is not IP has all-zero words 0..4 but for the zone;
//! a rule about it looks at the EtherType, which a flow key lacks, so its answers are never cached.

#![forbid(unsafe_code)]

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};

bitflags::bitflags! {
    /// What the addresses and ports of a flow key mean.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct FlowFlags: u8 {
        /// The packet is IPv6; without it the addresses are IPv4, mapped.
        const IPV6 = 1;
        /// First fragment of several: ports are valid, more octets follow elsewhere.
        const FIRST_FRAGMENT = 1 << 1;
        /// Not the first fragment: ports are absent and read 0.
        const LATER_FRAGMENT = 1 << 2;
    }
}

/// A small id for (ingress port, VNI), interned by the engine: equal addresses in two zones are two flows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Zone(pub u16);

/// The fields of a [`FlowKey`], by name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowFields {
    /// Source address in network order; IPv4 mapped, see [`mapped`].
    pub src: [u8; 16],
    /// Destination address, likewise.
    pub dst: [u8; 16],
    /// Source port in host order (ICMP: type); 0 where there is none.
    pub src_port: u16,
    /// Destination port in host order (ICMP: code); 0 where there is none.
    pub dst_port: u16,
    /// Where the packet came in.
    pub zone: Zone,
    /// IP protocol number (IANA); behind the extension headers for IPv6.
    pub proto: u8,
    /// Family and fragment bits.
    pub flags: FlowFlags,
}

/// An exact flow: the key of [`FlowTable`](super::FlowTable). 40 octets; layout in the module documentation.
///
/// ```
/// use dpumesh_hw::flow::{FlowFields, FlowKey, mapped};
/// let key = FlowKey::new(&FlowFields {
///     src: mapped("10.0.0.1".parse()?),
///     dst: mapped("10.0.0.2".parse()?),
///     src_port: 40000,
///     dst_port: 80,
///     proto: 6,
///     ..FlowFields::default()
/// });
/// assert_eq!(key.fields().dst_port, 80);
/// assert_eq!(key.to_string(), "10.0.0.1:40000 > 10.0.0.2:80 proto 6 zone 0");
/// # Ok::<(), std::net::AddrParseError>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct FlowKey {
    words: [u64; 5],
}

impl FlowKey {
    /// A key no packet has: it marks a vacant record of the flow table.
    pub(super) const VACANT: Self = Self {
        words: [0, 0, 0, 0, 0x80 << FLAGS],
    };

    /// Packs the fields.
    #[inline]
    pub fn new(f: &FlowFields) -> Self {
        let [w0, w1] = address_words(f.src);
        let [w2, w3] = address_words(f.dst);
        let w4 = u64::from(f.src_port)
            | u64::from(f.dst_port) << DST_PORT
            | u64::from(f.zone.0) << ZONE
            | u64::from(f.proto) << PROTO
            | u64::from(f.flags.bits() & FlowFlags::all().bits()) << FLAGS;
        Self {
            words: [w0, w1, w2, w3, w4],
        }
    }

    /// Unpacks all fields.
    pub fn fields(&self) -> FlowFields {
        FlowFields {
            src: self.src(),
            dst: self.dst(),
            src_port: self.src_port(),
            dst_port: self.dst_port(),
            zone: self.zone(),
            proto: self.proto(),
            flags: self.flags(),
        }
    }

    /// Source address in network order, IPv4 mapped.
    pub fn src(&self) -> [u8; 16] {
        address_octets(self.words[0], self.words[1])
    }

    /// Destination address in network order, IPv4 mapped.
    pub fn dst(&self) -> [u8; 16] {
        address_octets(self.words[2], self.words[3])
    }

    /// Source port, or ICMP type.
    #[inline]
    pub fn src_port(&self) -> u16 {
        self.words[4] as u16
    }

    /// Destination port, or ICMP code.
    #[inline]
    pub fn dst_port(&self) -> u16 {
        (self.words[4] >> DST_PORT) as u16
    }

    /// Where the packet came in.
    #[inline]
    pub fn zone(&self) -> Zone {
        Zone((self.words[4] >> ZONE) as u16)
    }

    /// IP protocol number.
    #[inline]
    pub fn proto(&self) -> u8 {
        (self.words[4] >> PROTO) as u8
    }

    /// Family and fragment bits.
    #[inline]
    pub fn flags(&self) -> FlowFlags {
        FlowFlags::from_bits_truncate((self.words[4] >> FLAGS) as u8)
    }

    #[inline(always)]
    pub(super) fn words(&self) -> &[u64; 5] {
        &self.words
    }

    /// Equality without a branch, for loops that keep many loads in flight.
    #[inline(always)]
    pub(super) fn same(&self, other: &Self) -> bool {
        let (a, b) = (&self.words, &other.words);
        ((a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]) | (a[4] ^ b[4])) == 0
    }
}

/// `source:port > destination:port proto N zone N`, plus the fragment bits if any.
impl fmt::Display for FlowKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ip = |octets| {
            let v6 = Ipv6Addr::from(octets);
            if self.flags().contains(FlowFlags::IPV6) {
                IpAddr::V6(v6)
            } else {
                v6.to_canonical()
            }
        };
        let end = |octets, port| std::net::SocketAddr::new(ip(octets), port);
        write!(
            f,
            "{} > {} proto {} zone {}",
            end(self.src(), self.src_port()),
            end(self.dst(), self.dst_port()),
            self.proto(),
            self.zone().0
        )?;
        if self.flags().contains(FlowFlags::FIRST_FRAGMENT) {
            f.write_str(" first fragment")?;
        }
        if self.flags().contains(FlowFlags::LATER_FRAGMENT) {
            f.write_str(" later fragment")?;
        }
        Ok(())
    }
}

impl fmt::Debug for FlowKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FlowKey({self})")
    }
}

/// The fields of a [`WideKey`], by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WideFields {
    /// The exact-match part.
    pub flow: FlowKey,
    /// Ethernet source.
    pub eth_src: [u8; 6],
    /// Ethernet destination.
    pub eth_dst: [u8; 6],
    /// EtherType, behind the VLAN tag if there is one.
    pub ethertype: u16,
    /// VLAN id (12 bits) of the outermost tag; `None` for an untagged frame.
    pub vlan: Option<u16>,
    /// Mark carried with the packet.
    pub mark: u32,
    /// TCP flags; 0 where there is no TCP header.
    pub tcp_flags: u8,
    /// DSCP, 6 bits; 0 where there is no IP header.
    pub dscp: u8,
}

/// Everything a masked rule can look at. 64 octets; layout in the module documentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WideKey {
    words: [u64; 8],
}

impl WideKey {
    /// Packs the fields; bits beyond a field's width are cut off.
    #[inline]
    pub fn new(f: &WideFields) -> Self {
        let [w0, w1, w2, w3, w4] = f.flow.words;
        let vlan = f.vlan.map_or(UNTAGGED, |vid| vid & VID_BITS);
        Self {
            words: [
                w0,
                w1,
                w2,
                w3,
                w4,
                mac_word(f.eth_src) | u64::from(f.ethertype) << ETHERTYPE,
                mac_word(f.eth_dst) | u64::from(vlan) << VLAN,
                u64::from(f.mark) | u64::from(f.tcp_flags) << TCP_FLAGS | u64::from(f.dscp & 0x3f) << DSCP,
            ],
        }
    }

    /// Unpacks all fields.
    pub fn fields(&self) -> WideFields {
        let w = &self.words;
        let vlan = (w[6] >> VLAN) as u16;
        WideFields {
            flow: self.flow(),
            eth_src: mac_octets(w[5]),
            eth_dst: mac_octets(w[6]),
            ethertype: (w[5] >> ETHERTYPE) as u16,
            vlan: (vlan != UNTAGGED).then_some(vlan),
            mark: w[7] as u32,
            tcp_flags: (w[7] >> TCP_FLAGS) as u8,
            dscp: (w[7] >> DSCP) as u8,
        }
    }

    /// The exact-match part.
    #[inline]
    pub fn flow(&self) -> FlowKey {
        let [w0, w1, w2, w3, w4, ..] = self.words;
        FlowKey {
            words: [w0, w1, w2, w3, w4],
        }
    }

    /// This key with every bit outside `mask` cleared.
    #[inline]
    pub fn masked(&self, mask: &WideMask) -> Self {
        Self {
            words: std::array::from_fn(|i| self.words[i] & mask.words[i]),
        }
    }

    /// Whether the two keys agree in every bit of `mask`.
    #[inline]
    pub fn agrees(&self, other: &Self, mask: &WideMask) -> bool {
        let differing = (0..8).fold(0, |d, i| d | ((self.words[i] ^ other.words[i]) & mask.words[i]));
        differing == 0
    }

    #[inline(always)]
    pub(super) fn words(&self) -> &[u64; 8] {
        &self.words
    }

    pub(super) fn from_words(words: [u64; 8]) -> Self {
        Self { words }
    }
}

/// The bits of a [`WideKey`] that a rule looks at; same layout, a set bit is compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct WideMask {
    words: [u64; 8],
}

impl WideMask {
    /// Looks at nothing: matches every packet.
    pub const NONE: Self = Self { words: [0; 8] };
    /// Looks at every field there is (and at no reserved bit).
    pub const ALL: Self = Self {
        words: [
            !0,
            !0,
            !0,
            !0,
            !0,
            !0,
            !0,
            0xffff_ffff | 0xff << TCP_FLAGS | 0x3f << DSCP,
        ],
    };

    /// Whether the mask looks at a field that [`FlowKey`] lacks. Answers that depend on such a mask must not be
    /// cached by flow key: the next packet of the flow may differ in that field.
    #[inline]
    pub fn beyond_flow_key(&self) -> bool {
        (self.words[5] | self.words[6] | self.words[7]) != 0
    }

    /// Whether every bit of `self` is in `other`.
    pub fn within(&self, other: &Self) -> bool {
        (0..8).all(|i| self.words[i] & !other.words[i] == 0)
    }

    /// The bits both masks look at.
    pub fn both(&self, other: &Self) -> Self {
        Self {
            words: std::array::from_fn(|i| self.words[i] & other.words[i]),
        }
    }

    #[inline(always)]
    pub(super) fn words(&self) -> &[u64; 8] {
        &self.words
    }

    /// Reserved bits are cut off.
    pub(super) fn from_words(words: [u64; 8]) -> Self {
        Self { words }.both(&Self::ALL)
    }
}

/// An address in the form the keys hold: IPv4 becomes `::ffff:a.b.c.d` (RFC 4291, 2.5.5.2).
pub fn mapped(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

pub(super) const DST_PORT: u32 = 16;
pub(super) const ZONE: u32 = 32;
pub(super) const PROTO: u32 = 48;
pub(super) const FLAGS: u32 = 56;
pub(super) const ETHERTYPE: u32 = 48;
pub(super) const VLAN: u32 = 48;
pub(super) const TCP_FLAGS: u32 = 32;
pub(super) const DSCP: u32 = 40;
pub(super) const UNTAGGED: u16 = 0xffff;
const VID_BITS: u16 = 0x0fff;

#[inline]
pub(super) fn address_words(octets: [u8; 16]) -> [u64; 2] {
    let whole = u128::from_be_bytes(octets);
    [(whole >> 64) as u64, whole as u64]
}

fn address_octets(high: u64, low: u64) -> [u8; 16] {
    (u128::from(high) << 64 | u128::from(low)).to_be_bytes()
}

#[inline]
pub(super) fn mac_word(m: [u8; 6]) -> u64 {
    u64::from_be_bytes([0, 0, m[0], m[1], m[2], m[3], m[4], m[5]])
}

fn mac_octets(word: u64) -> [u8; 6] {
    let [_, _, a, b, c, d, e, f] = word.to_be_bytes();
    [a, b, c, d, e, f]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn flow_fields() -> impl Strategy<Value = FlowFields> {
        (
            any::<[u8; 16]>(),
            any::<[u8; 16]>(),
            any::<(u16, u16, u16, u8)>(),
            0u8..8,
        )
            .prop_map(
                |(src, dst, (src_port, dst_port, zone, proto), flags)| FlowFields {
                    src,
                    dst,
                    src_port,
                    dst_port,
                    zone: Zone(zone),
                    proto,
                    flags: FlowFlags::from_bits_truncate(flags),
                },
            )
    }

    fn wide_fields() -> impl Strategy<Value = WideFields> {
        let link = (
            any::<[u8; 6]>(),
            any::<[u8; 6]>(),
            any::<u16>(),
            proptest::option::of(0u16..4095),
        );
        (flow_fields(), link, any::<(u32, u8)>(), 0u8..64).prop_map(
            |(flow, (eth_src, eth_dst, ethertype, vlan), (mark, tcp_flags), dscp)| WideFields {
                flow: FlowKey::new(&flow),
                eth_src,
                eth_dst,
                ethertype,
                vlan,
                mark,
                tcp_flags,
                dscp,
            },
        )
    }

    proptest! {
        #[test]
        fn flow_fields_survive_packing(f in flow_fields()) {
            prop_assert_eq!(FlowKey::new(&f).fields(), f);
        }

        #[test]
        fn wide_fields_survive_packing(f in wide_fields()) {
            let key = WideKey::new(&f);
            prop_assert_eq!(key.fields(), f);
            prop_assert_eq!(key.flow(), f.flow);
            prop_assert_eq!(key.masked(&WideMask::ALL), key, "no field outside the full mask");
        }

        #[test]
        fn agreeing_is_equality_under_the_mask(a in any::<[u64; 8]>(), b in any::<[u64; 8]>(), m in any::<[u64; 8]>()) {
            let (a, b, m) = (WideKey::from_words(a), WideKey::from_words(b), WideMask::from_words(m));
            prop_assert_eq!(a.agrees(&b, &m), a.masked(&m) == b.masked(&m));
            prop_assert!(a.agrees(&a.masked(&m), &m));
        }
    }

    #[test]
    fn sizes_are_the_layout() {
        assert_eq!(size_of::<FlowKey>(), 40);
        assert_eq!(size_of::<WideKey>(), 64);
        assert_eq!(size_of::<WideMask>(), 64);
    }

    #[test]
    fn no_packet_has_the_vacant_key() {
        let f = FlowKey::VACANT.fields();
        assert_ne!(FlowKey::new(&f), FlowKey::VACANT);
        let smuggled = FlowFields {
            flags: FlowFlags::from_bits_retain(0x80),
            ..f
        };
        assert_ne!(FlowKey::new(&smuggled), FlowKey::VACANT);
    }

    #[test]
    fn documented_bit_offsets_hold() {
        let f = FlowFields {
            src_port: 0x1111,
            dst_port: 0x2222,
            zone: Zone(0x3333),
            proto: 0x44,
            flags: FlowFlags::IPV6,
            src: mapped("10.1.2.3".parse().unwrap()),
            ..FlowFields::default()
        };
        let key = WideKey::new(&WideFields {
            flow: FlowKey::new(&f),
            eth_src: [1, 2, 3, 4, 5, 6],
            eth_dst: [7, 8, 9, 10, 11, 12],
            ethertype: 0x0800,
            vlan: None,
            mark: 0xdead_beef,
            tcp_flags: 0x12,
            dscp: 46,
        });
        assert_eq!(
            key.words(),
            &[
                0,
                0x0000_ffff_0a01_0203,
                0,
                0,
                0x0144_3333_2222_1111,
                0x0800_0102_0304_0506,
                0xffff_0708_090a_0b0c,
                0x0000_2e12_dead_beef,
            ]
        );
    }

    #[test]
    fn masks_beyond_the_flow_key_are_known() {
        assert!(!WideMask::NONE.beyond_flow_key());
        assert!(!WideMask::from_words([!0, !0, !0, !0, !0, 0, 0, 0]).beyond_flow_key());
        for word in 5..8 {
            let mut words = [0; 8];
            words[word] = 1;
            assert!(WideMask::from_words(words).beyond_flow_key());
        }
    }

    #[test]
    fn display_names_family_and_fragments() {
        let f = FlowFields {
            src: mapped("fd00::1".parse().unwrap()),
            dst: mapped("::ffff:10.0.0.1".parse().unwrap()),
            proto: 17,
            flags: FlowFlags::IPV6 | FlowFlags::LATER_FRAGMENT,
            ..FlowFields::default()
        };
        assert_eq!(
            FlowKey::new(&f).to_string(),
            "[fd00::1]:0 > [::ffff:10.0.0.1]:0 proto 17 zone 0 later fragment"
        );
    }
}
