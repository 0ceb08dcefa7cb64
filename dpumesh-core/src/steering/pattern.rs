//! What a rule looks at. A field left `None` is not looked at.

use std::net::IpAddr;

use bitflags::bitflags;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::addr::{MacAddr, VlanId, Vni};
use crate::port::PortRef;

/// The pattern of a rule: the conjunction of its fields.
///
/// Fields of L3 and L4 refer to the outermost packet, or, after a decapsulation in an earlier group, to the inner.
/// Later fragments carry no L4 header: a pattern with an L4 field never matches them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Pattern {
    /// Port the frame came in on. Never derived from what the frame claims.
    pub port: Option<PortRef>,
    /// Source MAC.
    pub eth_src: Option<Masked<MacAddr>>,
    /// Destination MAC.
    pub eth_dst: Option<Masked<MacAddr>>,
    /// EtherType after an 802.1Q tag.
    pub ethertype: Option<EtherType>,
    /// 802.1Q tag.
    pub vlan: Option<VlanMatch>,
    /// Network identifier of the tunnel that the frame came out of, or is in.
    pub vni: Option<Vni>,
    /// Source IP address.
    pub ip_src: Option<IpMatch>,
    /// Destination IP address.
    pub ip_dst: Option<IpMatch>,
    /// IPv4 protocol or last IPv6 next header.
    pub ip_proto: Option<IpProtocol>,
    /// Differentiated services code point.
    pub dscp: Option<DscpMatch>,
    /// Fragmentation.
    pub fragment: Option<FragmentMatch>,
    /// Source port of TCP, UDP or SCTP.
    pub l4_src: Option<PortRange>,
    /// Destination port of TCP, UDP or SCTP.
    pub l4_dst: Option<PortRange>,
    /// TCP flags.
    pub tcp_flags: Option<Masked<TcpFlags>>,
    /// Mark set by an earlier group.
    pub mark: Option<Masked<u32>>,
    /// Connection state found by an earlier [`super::Action::Conntrack`].
    pub ct_state: Option<Masked<CtStates>>,
}

/// Field of a [`Pattern`], to speak about in capabilities and errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Field {
    /// [`Pattern::port`].
    Port,
    /// [`Pattern::eth_src`].
    EthSrc,
    /// [`Pattern::eth_dst`].
    EthDst,
    /// [`Pattern::ethertype`].
    Ethertype,
    /// [`Pattern::vlan`].
    Vlan,
    /// [`Pattern::vni`].
    Vni,
    /// [`Pattern::ip_src`], an IPv4 address.
    Ip4Src,
    /// [`Pattern::ip_dst`], an IPv4 address.
    Ip4Dst,
    /// [`Pattern::ip_src`], an IPv6 address.
    Ip6Src,
    /// [`Pattern::ip_dst`], an IPv6 address.
    Ip6Dst,
    /// [`Pattern::ip_proto`].
    IpProto,
    /// [`Pattern::dscp`].
    Dscp,
    /// [`Pattern::fragment`].
    Fragment,
    /// [`Pattern::l4_src`].
    L4Src,
    /// [`Pattern::l4_dst`].
    L4Dst,
    /// [`Pattern::tcp_flags`].
    TcpFlags,
    /// [`Pattern::mark`].
    Mark,
    /// [`Pattern::ct_state`].
    CtState,
}

impl Field {
    /// Path of the field within a rule, as errors and verdicts name it.
    pub const fn path(self) -> &'static str {
        match self {
            Self::Port => "pattern.port",
            Self::EthSrc => "pattern.eth_src",
            Self::EthDst => "pattern.eth_dst",
            Self::Ethertype => "pattern.ethertype",
            Self::Vlan => "pattern.vlan",
            Self::Vni => "pattern.vni",
            Self::Ip4Src | Self::Ip6Src => "pattern.ip_src",
            Self::Ip4Dst | Self::Ip6Dst => "pattern.ip_dst",
            Self::IpProto => "pattern.ip_proto",
            Self::Dscp => "pattern.dscp",
            Self::Fragment => "pattern.fragment",
            Self::L4Src => "pattern.l4_src",
            Self::L4Dst => "pattern.l4_dst",
            Self::TcpFlags => "pattern.tcp_flags",
            Self::Mark => "pattern.mark",
            Self::CtState => "pattern.ct_state",
        }
    }
}

/// A value of which only the bits set in `mask` are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Masked<T> {
    /// What the bits must be.
    pub value: T,
    /// Which bits count.
    pub mask: T,
}

/// An IP address pattern.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IpMatch {
    /// An address in a prefix; a full-length prefix is an exact match. Host bits must be zero.
    Prefix(IpNet),
    /// An arbitrary mask of the same family.
    Masked(Masked<IpAddr>),
}

impl From<IpAddr> for IpMatch {
    fn from(address: IpAddr) -> Self {
        Self::Prefix(address.into())
    }
}

impl From<IpNet> for IpMatch {
    /// The prefix with its host bits cleared.
    fn from(prefix: IpNet) -> Self {
        Self::Prefix(prefix.trunc())
    }
}

/// An EtherType (IEEE 802 numbers registry).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct EtherType(pub u16);

impl EtherType {
    /// IPv4.
    pub const IPV4: Self = Self(0x0800);
    /// ARP.
    pub const ARP: Self = Self(0x0806);
    /// IPv6.
    pub const IPV6: Self = Self(0x86dd);
}

/// An IP protocol number (IANA protocol-numbers registry).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct IpProtocol(pub u8);

impl IpProtocol {
    /// ICMP for IPv4.
    pub const ICMP: Self = Self(1);
    /// TCP.
    pub const TCP: Self = Self(6);
    /// UDP.
    pub const UDP: Self = Self(17);
    /// ICMP for IPv6.
    pub const ICMPV6: Self = Self(58);
    /// SCTP.
    pub const SCTP: Self = Self(132);

    /// True for the protocols whose ports a pattern can look at.
    pub const fn has_ports(self) -> bool {
        matches!(self, Self::TCP | Self::UDP | Self::SCTP)
    }
}

/// An inclusive range of L4 ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PortRange {
    /// First port.
    pub first: u16,
    /// Last port; not below `first`.
    pub last: u16,
}

impl From<u16> for PortRange {
    fn from(port: u16) -> Self {
        Self {
            first: port,
            last: port,
        }
    }
}

/// An 802.1Q tag pattern.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VlanMatch {
    /// No tag.
    Untagged,
    /// A tag with this identifier.
    Id(VlanId),
}

/// A differentiated services code point, 0 to 63 (RFC 2474).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct DscpMatch(pub u8);

/// A fragmentation pattern (RFC 791, RFC 8200 §4.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FragmentMatch {
    /// A whole packet.
    Whole,
    /// Any fragment.
    Any,
    /// The fragment at offset 0.
    First,
    /// A fragment behind it.
    Later,
}

bitflags! {
    /// TCP flags in the order of the header's octet (RFC 9293 §3.1).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
    #[serde(transparent)]
    pub struct TcpFlags: u8 {
        /// Sender is done.
        const FIN = 0x01;
        /// Synchronise sequence numbers.
        const SYN = 0x02;
        /// Reset.
        const RST = 0x04;
        /// Push.
        const PSH = 0x08;
        /// Acknowledgement is valid.
        const ACK = 0x10;
        /// Urgent pointer is valid.
        const URG = 0x20;
        /// ECN echo.
        const ECE = 0x40;
        /// Congestion window reduced.
        const CWR = 0x80;
    }
}

bitflags! {
    /// Connection states (kernel `act_ct`, OVS `ct_state`).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
    #[serde(transparent)]
    pub struct CtStates: u8 {
        /// The packet went through connection tracking.
        const TRACKED = 0x01;
        /// First packet of a connection.
        const NEW = 0x02;
        /// Packets were seen both ways.
        const ESTABLISHED = 0x04;
        /// Belongs to another connection's helper.
        const RELATED = 0x08;
        /// Reply direction.
        const REPLY = 0x10;
        /// Fits no connection.
        const INVALID = 0x20;
    }
}
