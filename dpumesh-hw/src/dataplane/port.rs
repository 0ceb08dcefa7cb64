//! Ports of the dataplane: an index for each [`PortRef`], the policy of what may come in, the queue of what goes out.
//!
//! A port that rules speak of gets its index at once, and its frames when somebody opens it; until then what is sent
//! there is dropped as [`DropReason::EgressClosed`](super::DropReason::EgressClosed).

use std::collections::HashMap;
use std::net::IpAddr;

use dpumesh_core::{Frame, MacAddr, PortIo, PortIoLimits, PortRef};

use super::stats::PortStats;
use crate::flow::mapped;
use crate::stream::IngressPort;

/// Dense number of a port within one engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct PortIndex(pub(super) u16);

/// Ports that one engine can number: what fits a [`crate::flow::Zone`] beside the tunnel bits.
pub(super) const MAX_PORTS: usize = 1 << super::key::PORT_BITS;

/// Frames of our own (ICMP errors, resets, ARP and ND answers) per port and tick: nobody can make the dataplane a source
/// of floods (RFC 4443 §2.4(f), RFC 1812 §4.3.2.8).
pub(super) const ANSWERS_PER_TICK: u32 = 128;

/// What may come in by a port, and how the dataplane speaks there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PortPolicy {
    /// A pod's virtual function.
    Vf {
        /// The only source MAC it may use.
        mac: MacAddr,
        /// The only source addresses it may use.
        addresses: Vec<IpAddr>,
        /// The router's MAC, by which ARP and ND are answered for every address but the pod's own.
        gateway: MacAddr,
        /// The identity that the proxy sees: travels in the source MAC of punted frames.
        ingress: IngressPort,
    },
    /// The network. Frames that claim a local pod's address are dropped.
    Uplink {
        /// Our MAC on that link, by which ARP and ND are answered for local pods.
        mac: MacAddr,
        /// The identity that the proxy sees.
        ingress: IngressPort,
    },
    /// The stack of the proxy.
    Stack {
        /// MAC of the stack's interface.
        mac: MacAddr,
        /// MAC that the stack has as its router.
        gateway: MacAddr,
    },
}

/// One port.
#[derive(Debug)]
pub(super) struct Port {
    pub(super) port: PortRef,
    pub(super) policy: Option<PortPolicy>,
    /// The policy's addresses, IPv4 mapped, as numbers: compared with every frame's source.
    sources: Vec<u128>,
    pub(super) io: Option<Box<dyn PortIo>>,
    pub(super) limits: PortIoLimits,
    pub(super) queue: Vec<Frame>,
    /// The queue holds segments from the network that may be joined.
    pub(super) coalesce: bool,
    pub(super) stats: PortStats,
    /// Frames of our own that may still be sent there in this tick.
    pub(super) answers_left: u32,
}

impl Port {
    /// Whether the address is its pod's, IPv4 mapped.
    #[inline]
    pub(super) fn owns(&self, address: &[u8; 16]) -> bool {
        self.sources.contains(&u128::from_ne_bytes(*address))
    }
}

/// All ports of an engine.
#[derive(Debug, Default)]
pub(super) struct Ports {
    slots: Vec<Port>,
    by_ref: HashMap<PortRef, PortIndex>,
    /// Addresses of local pods, IPv4 mapped.
    local: HashMap<[u8; 16], PortIndex>,
    /// The port behind which the proxy listens.
    stack: Option<PortIndex>,
}

impl Ports {
    /// The index of a port, given now if it has none; `None` when all are given.
    pub(super) fn intern(&mut self, port: PortRef) -> Option<PortIndex> {
        if let Some(index) = self.by_ref.get(&port) {
            return Some(*index);
        }
        if self.slots.len() == MAX_PORTS {
            return None;
        }
        let index = PortIndex(self.slots.len() as u16); // below MAX_PORTS
        let limits = PortIoLimits::plain(dpumesh_core::Mtu::ETHERNET);
        self.slots.push(Port {
            port,
            policy: None,
            sources: Vec::new(),
            io: None,
            limits,
            queue: Vec::new(),
            coalesce: false,
            stats: PortStats::default(),
            answers_left: ANSWERS_PER_TICK,
        });
        self.by_ref.insert(port, index);
        Some(index)
    }

    pub(super) fn index(&self, port: PortRef) -> Option<PortIndex> {
        self.by_ref.get(&port).copied()
    }

    #[inline]
    pub(super) fn get(&self, index: PortIndex) -> &Port {
        &self.slots[usize::from(index.0)]
    }

    #[inline]
    pub(super) fn get_mut(&mut self, index: PortIndex) -> &mut Port {
        &mut self.slots[usize::from(index.0)]
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (PortIndex, &Port)> {
        self.slots
            .iter()
            .enumerate()
            .map(|(index, port)| (PortIndex(index as u16), port))
    }

    pub(super) fn indices(&self) -> impl Iterator<Item = PortIndex> + use<> {
        (0..self.slots.len()).map(|index| PortIndex(index as u16))
    }

    /// The local pod's port with this address, IPv4 mapped.
    #[inline]
    pub(super) fn local(&self, address: &[u8; 16]) -> Option<PortIndex> {
        self.local.get(address).copied()
    }

    /// The stack port and its MAC, while it is open.
    #[inline]
    pub(super) fn open_stack(&self) -> Option<(PortIndex, MacAddr)> {
        let index = self.stack?;
        let port = self.get(index);
        match &port.policy {
            Some(PortPolicy::Stack { mac, .. }) if port.io.is_some() => Some((index, *mac)),
            _ => None,
        }
    }

    /// Replaces a port's policy; its pod's addresses become, or cease to be, local. False when another port has one
    /// of the addresses: nothing changed then.
    pub(super) fn set_policy(&mut self, index: PortIndex, policy: Option<PortPolicy>) -> bool {
        let addresses = match &policy {
            Some(PortPolicy::Vf { addresses, .. }) => addresses.as_slice(),
            _ => &[],
        };
        if addresses
            .iter()
            .any(|address| self.local(&mapped(*address)).is_some_and(|owner| owner != index))
        {
            return false;
        }
        self.local.retain(|_, owner| *owner != index);
        self.local
            .extend(addresses.iter().map(|address| (mapped(*address), index)));
        if self.stack == Some(index) {
            self.stack = None;
        }
        if matches!(policy, Some(PortPolicy::Stack { .. })) {
            self.stack = Some(index);
        }
        let sources = addresses
            .iter()
            .map(|address| u128::from_ne_bytes(mapped(*address)));
        self.get_mut(index).sources = sources.collect();
        self.get_mut(index).policy = policy;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vf(address: &str) -> PortPolicy {
        PortPolicy::Vf {
            mac: MacAddr([2, 0, 0, 0, 0, 1]),
            addresses: vec![address.parse().expect("address")],
            gateway: MacAddr([2, 0, 0, 0, 0, 254]),
            ingress: IngressPort::new(1).expect("not 0"),
        }
    }

    #[test]
    fn an_address_is_local_to_one_port_only() {
        let mut ports = Ports::default();
        let (a, b) = (
            ports.intern(PortRef::vf(0)).expect("room"),
            ports.intern(PortRef::vf(1)).expect("room"),
        );
        let address = mapped("10.0.0.1".parse().expect("address"));
        assert!(ports.set_policy(a, Some(vf("10.0.0.1"))));
        assert!(!ports.set_policy(b, Some(vf("10.0.0.1"))));
        assert_eq!(ports.local(&address), Some(a));
        assert!(ports.set_policy(a, None));
        assert!(ports.set_policy(b, Some(vf("10.0.0.1"))));
        assert_eq!(ports.local(&address), Some(b));
    }
}
