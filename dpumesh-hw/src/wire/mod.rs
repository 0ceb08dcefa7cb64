//! Octets to fields and back: what the dataplane knows about protocols, and nothing of ports, tables or rules.
//!
//! Three layers, each usable alone:
//!
//! 1. **Views**, one file per protocol, each with the same parts in the same order: `Packet` over octets with a
//!    checked constructor, the places of its fields, getters, setters, a `Repr` where something is emitted, tests.
//!    Inside a file the short name is used ([`tcp::Packet`]), outside the long one ([`TcpPacket`]).
//! 2. **[`Headers`]**, the one pass over a frame from which lookup and classification work.
//! 3. **Arithmetic on frames**: [`checksum`], [`segment`] (TSO and USO in software), [`coalesce`] (GRO), [`fragmentation`], [`answer`]
//!    (the frames the dataplane sends by itself) and [`encap`] (VXLAN).
//!
//! A view copies nothing. Its constructor checks every length that its getters rely on, so getters do not fail;
//! what is wrong with a packet is told by [`Malformed`], with layer and field. Nothing here panics on any octets:
//! `fuzz/` runs every parser over arbitrary input, and its corpus runs as a unit test.
//!
//! From here a frame goes to the flow table (`flow`), keyed by [`Headers`].
#![forbid(unsafe_code)]

pub mod answer;
pub mod arp;
pub mod checksum;
pub mod coalesce;
pub mod encap;
pub mod ethernet;
mod field;
pub mod fragment;
pub mod fragmentation;
#[doc(hidden)]
pub mod fuzz;
pub mod headers;
pub mod icmpv4;
pub mod icmpv6;
pub mod ipv4;
pub mod ipv6;
pub mod malformed;
pub mod protocol;
#[cfg(test)]
mod samples;
pub mod segment;
pub mod tcp;
pub mod udp;
pub mod vlan;
pub mod vxlan;

pub use arp::Packet as ArpPacket;
pub use coalesce::Coalescer;
pub use ethernet::Packet as EthernetPacket;
pub use fragment::Fragment;
pub use fragmentation::Fragments;
pub use headers::{Headers, L3};
pub use icmpv4::Packet as Icmpv4Packet;
pub use icmpv6::Packet as Icmpv6Packet;
pub use ipv4::Packet as Ipv4Packet;
pub use ipv6::Packet as Ipv6Packet;
pub use malformed::{Layer, Malformed, NoRoom, Reason};
pub use segment::Segments;
pub use tcp::{Flags as TcpFlags, Packet as TcpPacket};
pub use udp::Packet as UdpPacket;
pub use vlan::{Packet as VlanPacket, Tag as VlanTag};
pub use vxlan::Packet as VxlanPacket;
