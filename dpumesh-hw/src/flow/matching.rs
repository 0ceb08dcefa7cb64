//! [`Match`]: what a rule compares, built field by field into a mask and a key.
//!
//! A prefix becomes leading mask bits, a port range becomes several masks ([`range_to_masks`]); a rule with a range is
//! therefore several matches with one [`RuleIndex`](super::RuleIndex). Every distinct mask counts towards the
//! classifier's mask limit, so write rules with few shapes.
//!
//! Next: [`Classifier::insert`](super::Classifier::insert).

#![forbid(unsafe_code)]

use super::key::{
    DSCP, DST_PORT, ETHERTYPE, FLAGS, FlowFlags, PROTO, TCP_FLAGS, UNTAGGED, VLAN, WideKey, WideMask, ZONE,
    Zone, address_words, mac_word, mapped,
};
use ipnet::IpNet;
use std::net::IpAddr;

/// A mask and the key it compares with. Without any field it matches every packet.
///
/// ```
/// use dpumesh_hw::flow::{Match, range_to_masks};
/// let to_services = Match::any().dst("10.96.0.0/12".parse()?)?.proto(6);
/// let ports = range_to_masks(8000, 8010)?;
/// let matches: Vec<Match> = ports.into_iter().map(|p| to_services.dst_port(p)).collect();
/// assert_eq!(matches.len(), 3); // 8000/13 bits, 8008/15 bits, 8010 exact
/// assert!(matches.iter().all(|m| !m.mask.beyond_flow_key()));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Match {
    /// The bits that are compared.
    pub mask: WideMask,
    /// What they are compared with; bits outside the mask do not count.
    pub key: WideKey,
}

/// A port, or an aligned block of ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PortMask {
    /// First port of the block.
    pub value: u16,
    /// Compared bits; `0xffff` for one port.
    pub mask: u16,
}

impl PortMask {
    /// Just this port.
    pub fn exact(port: u16) -> Self {
        Self {
            value: port,
            mask: 0xffff,
        }
    }
}

/// A match that cannot be expressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MatchError {
    /// A range that ends before it begins.
    #[error("port range {low}..={high} is empty")]
    Range {
        /// First port.
        low: u16,
        /// Last port.
        high: u16,
    },
    /// IPv4 and IPv6 in one match.
    #[error("{field} {net} is of another address family than the rest of the match")]
    Family {
        /// `src` or `dst`.
        field: &'static str,
        /// The prefix that does not fit.
        net: IpNet,
    },
    /// A VLAN id that no frame can carry.
    #[error("vlan {vid} is not in 0..=4094")]
    Vlan {
        /// The id asked for.
        vid: u16,
    },
    /// A DSCP of more than 6 bits.
    #[error("dscp {dscp} is not in 0..=63")]
    Dscp {
        /// The value asked for.
        dscp: u8,
    },
}

impl Match {
    /// Every packet.
    pub fn any() -> Self {
        Self {
            mask: WideMask::NONE,
            key: WideKey::from_words([0; 8]),
        }
    }

    /// Whether a packet matches.
    pub fn accepts(&self, packet: &WideKey) -> bool {
        packet.agrees(&self.key, &self.mask)
    }

    /// Source address within `net`, and of its family.
    ///
    /// # Errors
    /// [`MatchError::Family`] if the match is about the other family already.
    pub fn src(self, net: IpNet) -> Result<Self, MatchError> {
        self.address("src", 0, net)
    }

    /// Destination address within `net`, and of its family.
    ///
    /// # Errors
    /// [`MatchError::Family`] if the match is about the other family already.
    pub fn dst(self, net: IpNet) -> Result<Self, MatchError> {
        self.address("dst", 2, net)
    }

    /// Source port (ICMP: type). Combine with [`proto`](Self::proto).
    pub fn src_port(self, port: PortMask) -> Self {
        self.compare(4, u64::from(port.value), u64::from(port.mask))
    }

    /// Destination port (ICMP: code). Combine with [`proto`](Self::proto).
    pub fn dst_port(self, port: PortMask) -> Self {
        self.compare(
            4,
            u64::from(port.value) << DST_PORT,
            u64::from(port.mask) << DST_PORT,
        )
    }

    /// Zone the packet came in by.
    pub fn zone(self, zone: Zone) -> Self {
        self.compare(4, u64::from(zone.0) << ZONE, 0xffff << ZONE)
    }

    /// Zone the packet came in by, in the bits of `mask`.
    pub fn zone_masked(self, zone: Zone, mask: Zone) -> Self {
        self.compare(4, u64::from(zone.0) << ZONE, u64::from(mask.0) << ZONE)
    }

    /// Source address in the bits of `mask`, and of its family.
    ///
    /// # Errors
    /// [`MatchError::Family`] if the match is about the other family already, or value and mask are of two.
    pub fn src_masked(self, value: IpAddr, mask: IpAddr) -> Result<Self, MatchError> {
        self.masked("src", 0, value, mask)
    }

    /// Destination address in the bits of `mask`, and of its family.
    ///
    /// # Errors
    /// [`MatchError::Family`] if the match is about the other family already, or value and mask are of two.
    pub fn dst_masked(self, value: IpAddr, mask: IpAddr) -> Result<Self, MatchError> {
        self.masked("dst", 2, value, mask)
    }

    /// IP protocol.
    pub fn proto(self, proto: u8) -> Self {
        self.compare(4, u64::from(proto) << PROTO, 0xff << PROTO)
    }

    /// The flags in `mask` are as in `value`.
    pub fn flags(self, value: FlowFlags, mask: FlowFlags) -> Self {
        self.compare(
            4,
            u64::from(value.bits()) << FLAGS,
            u64::from(mask.bits()) << FLAGS,
        )
    }

    /// Ethernet source, in the bits of `mask`.
    pub fn eth_src(self, address: [u8; 6], mask: [u8; 6]) -> Self {
        self.compare(5, mac_word(address), mac_word(mask))
    }

    /// Ethernet destination, in the bits of `mask`.
    pub fn eth_dst(self, address: [u8; 6], mask: [u8; 6]) -> Self {
        self.compare(6, mac_word(address), mac_word(mask))
    }

    /// EtherType behind the VLAN tag.
    pub fn ethertype(self, ethertype: u16) -> Self {
        self.compare(5, u64::from(ethertype) << ETHERTYPE, 0xffff << ETHERTYPE)
    }

    /// VLAN id, or untagged frames only.
    ///
    /// # Errors
    /// [`MatchError::Vlan`] for an id beyond 4094 (4095 is reserved, IEEE 802.1Q).
    pub fn vlan(self, vlan: Option<u16>) -> Result<Self, MatchError> {
        if let Some(vid) = vlan
            && vid > 4094
        {
            return Err(MatchError::Vlan { vid });
        }
        Ok(self.compare(6, u64::from(vlan.unwrap_or(UNTAGGED)) << VLAN, 0xffff << VLAN))
    }

    /// Mark, in the bits of `mask`.
    pub fn mark(self, value: u32, mask: u32) -> Self {
        self.compare(7, u64::from(value), u64::from(mask))
    }

    /// TCP flags, in the bits of `mask`.
    pub fn tcp_flags(self, value: u8, mask: u8) -> Self {
        self.compare(7, u64::from(value) << TCP_FLAGS, u64::from(mask) << TCP_FLAGS)
    }

    /// DSCP.
    ///
    /// # Errors
    /// [`MatchError::Dscp`] beyond 63.
    pub fn dscp(self, dscp: u8) -> Result<Self, MatchError> {
        if dscp > 63 {
            return Err(MatchError::Dscp { dscp });
        }
        Ok(self.compare(7, u64::from(dscp) << DSCP, 0x3f << DSCP))
    }

    /// IPv4 is told from IPv6 by the family flag: `::ffff:0:0/96` can be on the wire as IPv6, too.
    fn address(self, field: &'static str, word: usize, net: IpNet) -> Result<Self, MatchError> {
        let v6 = matches!(net, IpNet::V6(_));
        let family = u64::from(FlowFlags::IPV6.bits()) << FLAGS;
        let known = self.mask.words()[4] & family != 0;
        if known && (self.key.words()[4] & family != 0) != v6 {
            return Err(MatchError::Family { field, net });
        }
        let length = u32::from(net.prefix_len()) + if v6 { 0 } else { 96 };
        let bits = u128::MAX.checked_shl(128 - length).unwrap_or(0);
        let [high, low] = address_words(mapped(net.network()));
        Ok(self
            .compare(4, if v6 { family } else { 0 }, family)
            .compare(word, high, (bits >> 64) as u64)
            .compare(word + 1, low, bits as u64))
    }

    fn masked(
        self,
        field: &'static str,
        word: usize,
        value: IpAddr,
        mask: IpAddr,
    ) -> Result<Self, MatchError> {
        if value.is_ipv4() != mask.is_ipv4() {
            return Err(MatchError::Family {
                field,
                net: value.into(),
            });
        }
        let everything = IpNet::new_assert(value, 0).trunc();
        let [value_high, value_low] = address_words(mapped(value));
        let [mask_high, mask_low] = address_words(mapped(mask));
        let matching = self.address(field, word, everything)?;
        Ok(matching
            .compare(word, value_high, mask_high)
            .compare(word + 1, value_low, mask_low))
    }

    /// Adds bits to the comparison; a later call for the same bits wins.
    fn compare(self, word: usize, value: u64, bits: u64) -> Self {
        let (mut mask, mut key) = (*self.mask.words(), *self.key.words());
        mask[word] |= bits;
        key[word] = (key[word] & !bits) | (value & bits);
        Self {
            mask: WideMask::from_words(mask),
            key: WideKey::from_words(key),
        }
    }
}

/// The fewest aligned blocks that make up `low..=high`, in order: at most 30 for 16 bits.
///
/// # Errors
/// [`MatchError::Range`] if `low` is above `high`.
pub fn range_to_masks(low: u16, high: u16) -> Result<Vec<PortMask>, MatchError> {
    if low > high {
        return Err(MatchError::Range { low, high });
    }
    let (mut at, end) = (u32::from(low), u32::from(high) + 1);
    let mut blocks = Vec::new();
    while at < end {
        // As large as alignment allows and as the rest needs.
        let aligned = at.trailing_zeros().min(16);
        let fits = (end - at).ilog2();
        let size = 1 << aligned.min(fits);
        blocks.push(PortMask {
            value: at as u16,
            mask: !(size - 1) as u16,
        });
        at += size;
    }
    Ok(blocks)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::key::{FlowFields, FlowKey, WideFields};
    use proptest::prelude::*;

    fn packet(src: &str, dst: &str) -> WideFields {
        let (src, dst): (IpAddr, IpAddr) = (src.parse().unwrap(), dst.parse().unwrap());
        WideFields {
            flow: FlowKey::new(&FlowFields {
                src: mapped(src),
                dst: mapped(dst),
                src_port: 40000,
                dst_port: 443,
                zone: Zone(3),
                proto: 6,
                flags: if src.is_ipv6() {
                    FlowFlags::IPV6
                } else {
                    FlowFlags::empty()
                },
            }),
            eth_src: [2, 0, 0, 0, 0, 1],
            eth_dst: [2, 0, 0, 0, 0, 2],
            ethertype: if src.is_ipv6() { 0x86dd } else { 0x0800 },
            vlan: Some(100),
            mark: 0x10,
            tcp_flags: 0x02,
            dscp: 10,
        }
    }

    #[test]
    fn each_field_is_compared_and_only_that_field() {
        let p = WideKey::new(&packet("10.1.2.3", "10.9.0.1"));
        let any = Match::any();
        let broadcast = [0xff; 6];
        let cases = [
            (
                "src",
                any.src("10.1.0.0/16".parse().unwrap()).unwrap(),
                any.src("10.2.0.0/16".parse().unwrap()).unwrap(),
            ),
            (
                "dst",
                any.dst("10.9.0.1/32".parse().unwrap()).unwrap(),
                any.dst("10.9.0.2/32".parse().unwrap()).unwrap(),
            ),
            (
                "family",
                any.src("0.0.0.0/0".parse().unwrap()).unwrap(),
                any.src("::/0".parse().unwrap()).unwrap(),
            ),
            (
                "src_port",
                any.src_port(PortMask::exact(40000)),
                any.src_port(PortMask::exact(40001)),
            ),
            (
                "dst_port",
                any.dst_port(PortMask::exact(443)),
                any.dst_port(PortMask::exact(80)),
            ),
            ("zone", any.zone(Zone(3)), any.zone(Zone(4))),
            ("proto", any.proto(6), any.proto(17)),
            (
                "flags",
                any.flags(FlowFlags::empty(), FlowFlags::LATER_FRAGMENT),
                any.flags(FlowFlags::LATER_FRAGMENT, FlowFlags::LATER_FRAGMENT),
            ),
            (
                "eth_src",
                any.eth_src([2, 0, 0, 0, 0, 1], broadcast),
                any.eth_src([2, 0, 0, 0, 0, 9], broadcast),
            ),
            (
                "eth_dst",
                any.eth_dst([0; 6], [1, 0, 0, 0, 0, 0]),
                any.eth_dst(broadcast, [1, 0, 0, 0, 0, 0]),
            ),
            ("ethertype", any.ethertype(0x0800), any.ethertype(0x0806)),
            ("vlan", any.vlan(Some(100)).unwrap(), any.vlan(None).unwrap()),
            ("mark", any.mark(0x10, 0xf0), any.mark(0x20, 0xf0)),
            ("tcp_flags", any.tcp_flags(2, 0x12), any.tcp_flags(0x12, 0x12)),
            ("dscp", any.dscp(10).unwrap(), any.dscp(11).unwrap()),
        ];
        for (field, yes, no) in cases {
            assert!(yes.accepts(&p), "{field} should match");
            assert!(!no.accepts(&p), "{field} should not match");
            let expected = [
                "eth_src",
                "eth_dst",
                "ethertype",
                "vlan",
                "mark",
                "tcp_flags",
                "dscp",
            ]
            .contains(&field);
            assert_eq!(yes.mask.beyond_flow_key(), expected, "{field}");
        }
        assert!(any.accepts(&p));
    }

    #[test]
    fn a_mapped_address_on_the_wire_is_no_ipv4() {
        let mut fields = packet("fd00::1", "fd00::2");
        let mut flow = fields.flow.fields();
        flow.dst = mapped("10.0.0.1".parse().unwrap());
        fields.flow = FlowKey::new(&flow);
        let v4 = Match::any().dst("10.0.0.0/8".parse().unwrap()).unwrap();
        assert!(!v4.accepts(&WideKey::new(&fields)));
        let all_v6 = Match::any().dst("::/0".parse().unwrap()).unwrap();
        assert!(all_v6.accepts(&WideKey::new(&fields)));
    }

    #[test]
    fn what_cannot_be_expressed_is_refused_with_its_field() {
        let mixed = Match::any()
            .src("10.0.0.0/8".parse().unwrap())
            .unwrap()
            .dst("fd00::/8".parse().unwrap());
        let message = mixed.unwrap_err().to_string();
        assert_eq!(
            message,
            "dst fd00::/8 is of another address family than the rest of the match"
        );
        assert_eq!(Match::any().vlan(Some(4095)), Err(MatchError::Vlan { vid: 4095 }));
        assert_eq!(Match::any().dscp(64), Err(MatchError::Dscp { dscp: 64 }));
        assert_eq!(range_to_masks(2, 1), Err(MatchError::Range { low: 2, high: 1 }));
    }

    #[test]
    fn ranges_have_the_known_extremes() {
        assert_eq!(
            range_to_masks(0, 65535).unwrap(),
            [PortMask { value: 0, mask: 0 }]
        );
        assert_eq!(range_to_masks(80, 80).unwrap(), [PortMask::exact(80)]);
        assert_eq!(range_to_masks(1, 65534).unwrap().len(), 30);
    }

    proptest! {
        #[test]
        fn a_range_is_covered_exactly_once(a in any::<u16>(), b in any::<u16>(), probe in any::<u16>()) {
            let (low, high) = (a.min(b), a.max(b));
            let blocks = range_to_masks(low, high).unwrap();
            prop_assert!(blocks.len() <= 30);
            for port in [probe, low, high, low.wrapping_sub(1), high.wrapping_add(1)] {
                let covering = blocks.iter().filter(|b| port & b.mask == b.value).count();
                prop_assert_eq!(covering, usize::from((low..=high).contains(&port)));
            }
        }
    }
}
