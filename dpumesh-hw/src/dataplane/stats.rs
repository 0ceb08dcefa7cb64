//! What the dataplane counts. Every frame that came in is counted once as received and once as transmitted, answered,
//! or dropped with its reason.

use std::collections::BTreeMap;

use dpumesh_core::PortRef;
use serde::{Deserialize, Serialize};

macro_rules! drop_reasons {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// Why a frame was dropped. The texts are stable names for metrics.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[non_exhaustive]
        pub enum DropReason { $($(#[$doc])* $name,)* }

        impl DropReason {
            /// Every reason, in order.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// Stable name for metrics.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

drop_reasons! {
    /// A header is cut short or contradicts itself.
    Malformed = "malformed",
    /// The source MAC is not the VF's.
    SpoofedMac = "spoofed_mac",
    /// The source IP address is not the VF's.
    SpoofedIp = "spoofed_ip",
    /// A frame from the uplink claims a local pod's address.
    SpoofedUplink = "spoofed_uplink",
    /// A port that nobody gave a policy yet.
    NotAdmitted = "not_admitted",
    /// Link-local traffic that is not routed (router solicitations, multicast listener reports).
    LinkLocal = "link_local",
    /// No rule matched.
    NoRule = "no_rule",
    /// A rule says drop.
    Rule = "rule",
    /// TTL or hop limit ran out.
    Ttl = "ttl",
    /// Too long for the egress port. The sender is told, unless it may not be (an ICMP error) or is at the other end of
    /// a tunnel; IPv4 without DF leaves in fragments, but not into a tunnel (RFC 7348 §4.3).
    Mtu = "mtu",
    /// `Decapsulate` met something that is no such tunnel packet.
    NotATunnel = "not_a_tunnel",
    /// The tunnel's path marked congestion for a sender that does not know the mark (RFC 6040).
    Congestion = "congestion",
    /// A rewrite of the other address family, or of ports the packet lacks.
    RewriteMismatch = "rewrite_mismatch",
    /// More jumps and decapsulations than a packet may take.
    TooManyGroups = "too_many_groups",
    /// The egress port is not open.
    EgressClosed = "egress_closed",
    /// The egress port's queue is full.
    EgressFull = "egress_full",
    /// The frame has no room for an encapsulation.
    Headroom = "headroom",
    /// The egress port refused it, or a super-frame could not be cut for it.
    Egress = "egress",
}

/// Counts of an engine since it started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct EngineStats {
    /// By port.
    pub ports: BTreeMap<PortRef, PortStats>,
    /// Dropped frames by reason; reasons that did not occur are absent.
    pub drops: BTreeMap<String, u64>,
    /// Frames handed to the proxy.
    pub punted: u64,
    /// ARP and ND requests answered.
    pub neighbours_answered: u64,
    /// TCP resets sent because there was no proxy to punt to.
    pub resets_sent: u64,
    /// "Packet too big" sent.
    pub too_big_sent: u64,
    /// Frames that found their flow in the table.
    pub flow_hits: u64,
    /// Frames that had to be classified.
    pub flow_misses: u64,
    /// Flows in the table now.
    pub flows: u64,
    /// Flows that the network processor holds now.
    pub flows_offloaded: u64,
    /// Flows that it refused because it was full.
    pub offloads_refused: u64,
    /// Frames that fragmentation added: two for a packet that left in three.
    pub fragmented: u64,
    /// Answers of these kinds that were not sent, because a port had its share of them for the moment.
    pub answers_withheld: u64,
    /// TCP segments that were joined to super-frames.
    pub coalesced: u64,
    /// Frames whose flow the network processor held.
    pub offload_hits: u64,
}

/// Counts of one port. A super-frame is one frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PortStats {
    /// Its frames are read and written. A port that fails is closed.
    pub open: bool,
    /// Frames received.
    pub rx_frames: u64,
    /// Their octets, Ethernet header included.
    pub rx_octets: u64,
    /// Frames transmitted.
    pub tx_frames: u64,
    /// Their octets.
    pub tx_octets: u64,
    /// Frames from this port that were dropped.
    pub dropped: u64,
}

/// The counters as the worker keeps them.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) drops: [u64; DropReason::ALL.len()],
    pub(super) totals: EngineStats,
}

impl Tally {
    #[inline]
    pub(super) fn drop(&mut self, reason: DropReason) {
        self.drops[reason as usize] += 1;
    }

    /// The counters as others see them; the caller adds the ports'.
    pub(super) fn snapshot(&self) -> EngineStats {
        let mut stats = self.totals.clone();
        let counted = DropReason::ALL
            .iter()
            .zip(self.drops)
            .filter(|(_, count)| *count > 0);
        stats.drops = counted
            .map(|(reason, count)| (reason.as_str().to_owned(), count))
            .collect();
        stats
    }
}
