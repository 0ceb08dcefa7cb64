//! What a rule does with a frame.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::Group;
use crate::addr::{MacAddr, VlanId, Vni};
use crate::port::PortRef;

/// One step of a rule. Steps are carried out in order; a *final* one ends the list.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Action {
    /// Final: the frame is gone.
    Drop,
    /// Final: the frame leaves by a port of the card.
    Forward(PortRef),
    /// Final: the frame goes to the shared proxy, with the port it came in on as its identity.
    Punt,
    /// Final: the frame goes to the SoC's own network stack.
    ToKernel,
    /// Final: the frame goes to a receive queue of its port.
    Queue(u16),
    /// Final: the frame goes to one of these queues by the hash of its flow.
    Rss(Vec<u16>),
    /// Final: matching goes on in a group of a higher number.
    Jump(Group),
    /// Puts the frame into a tunnel.
    Encapsulate(Encapsulation),
    /// Takes the frame out of its tunnel. What is no such tunnel packet is dropped.
    Decapsulate(TunnelKind),
    /// Writes a header field; checksums follow (NAT).
    Rewrite(RewriteField),
    /// Counts TTL or hop limit down; a packet that arrives with 1 or 0 is dropped.
    DecrementTtl,
    /// Adds an 802.1Q tag.
    PushVlan(VlanId),
    /// Takes the 802.1Q tag off.
    PopVlan,
    /// Sets the mark that later groups can match.
    Mark(u32),
    /// Counts packets and octets for [`super::FlowSteering::counters`].
    Count,
    /// Sends a copy out of a port.
    Mirror(PortRef),
    /// Drops what exceeds a meter.
    Meter(MeterId),
    /// Looks the connection up.
    Conntrack(Conntrack),
}

impl Action {
    /// True for an action that ends a rule's list.
    pub const fn is_final(&self) -> bool {
        matches!(
            self,
            Self::Drop
                | Self::Forward(_)
                | Self::Punt
                | Self::ToKernel
                | Self::Queue(_)
                | Self::Rss(_)
                | Self::Jump(_)
        )
    }
}

/// The outer headers of a tunnel.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Encapsulation {
    /// Which encapsulation.
    pub kind: TunnelKind,
    /// Network identifier.
    pub vni: Vni,
    /// Outer source address: this node's tunnel endpoint.
    pub local: IpAddr,
    /// Outer destination address: the remote node's tunnel endpoint, of the same family.
    pub remote: IpAddr,
    /// Outer source MAC.
    pub eth_src: MacAddr,
    /// Outer destination MAC: the next hop.
    pub eth_dst: MacAddr,
}

/// Kind of tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum TunnelKind {
    /// VXLAN (RFC 7348), UDP port 4789.
    Vxlan,
    /// Geneve (RFC 8926), UDP port 6081.
    Geneve,
}

impl TunnelKind {
    /// Octets that the encapsulation adds to an L3 packet on the wire: outer IP, UDP, tunnel header and the inner
    /// Ethernet header. 50 over IPv4, 70 over IPv6.
    pub const fn overhead(self, outer: IpAddr) -> u16 {
        match outer {
            IpAddr::V4(_) => 50,
            IpAddr::V6(_) => 70,
        }
    }
}

/// A header field and what to write into it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum RewriteField {
    /// Source MAC.
    EthSrc(MacAddr),
    /// Destination MAC.
    EthDst(MacAddr),
    /// Source IP address; a packet of the other family is dropped.
    IpSrc(IpAddr),
    /// Destination IP address; a packet of the other family is dropped.
    IpDst(IpAddr),
    /// Source port of TCP or UDP.
    L4Src(u16),
    /// Destination port of TCP or UDP.
    L4Dst(u16),
    /// Differentiated services code point, 0 to 63.
    Dscp(u8),
}

/// A meter of the card.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MeterId(pub u32);

/// A connection table of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CtZone(pub u16);

/// A connection-tracking step (kernel `act_ct`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Conntrack {
    /// Which table.
    pub zone: CtZone,
    /// Enter the connection if it is new.
    pub commit: bool,
}
