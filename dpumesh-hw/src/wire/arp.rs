//! ARP for IPv4 over Ethernet (RFC 826):
//! `htype 2 | ptype 2 | hlen 1 | plen 1 | operation 2 | sender MAC 6 | sender IP 4 | target MAC 6 | target IP 4`.

use std::net::Ipv4Addr;

use dpumesh_core::MacAddr;

use super::ethernet::ethertype;
use super::field::{array, be16, put, put16};
use super::malformed::{Layer, Malformed};

/// A view of an ARP packet.
#[derive(Clone, Copy, Debug)]
pub struct Packet<T: AsRef<[u8]>> {
    buffer: T,
}

/// Octets of a packet; what follows is Ethernet padding.
pub const LEN: usize = 28;

/// What the sender wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Who has the target address?
    Request,
    /// The sender has the sender address.
    Reply,
}

mod at {
    pub(super) const HARDWARE: usize = 0;
    pub(super) const PROTOCOL: usize = 2;
    pub(super) const LENGTHS: usize = 4;
    pub(super) const OPERATION: usize = 6;
    pub(super) const SENDER_MAC: usize = 8;
    pub(super) const SENDER_IP: usize = 14;
    pub(super) const TARGET_MAC: usize = 18;
    pub(super) const TARGET_IP: usize = 24;
}

const ETHERNET: u16 = 1;
const MAC_AND_IPV4: u16 = 0x0604;

impl<T: AsRef<[u8]>> Packet<T> {
    /// A view of `buffer`.
    ///
    /// # Errors
    /// Fewer than 28 octets; anything but IPv4 over Ethernet; an operation other than request and reply.
    pub fn new(buffer: T) -> Result<Self, Malformed> {
        let octets = buffer.as_ref();
        Malformed::at_least(Layer::Arp, "packet", LEN, octets.len())?;
        expect(octets, at::HARDWARE, "hardware type", ETHERNET, "1, Ethernet")?;
        expect(
            octets,
            at::PROTOCOL,
            "protocol type",
            ethertype::IPV4,
            "0x800, IPv4",
        )?;
        expect(
            octets,
            at::LENGTHS,
            "address lengths",
            MAC_AND_IPV4,
            "6 and 4 octets",
        )?;
        let operation = be16(octets, at::OPERATION);
        if !matches!(operation, 1 | 2) {
            let expected = "1 (request) or 2 (reply)";
            return Err(Malformed::invalid(
                Layer::Arp,
                "operation",
                u32::from(operation),
                expected,
            ));
        }
        Ok(Self { buffer })
    }

    /// Request or reply.
    pub fn operation(&self) -> Operation {
        match be16(self.buffer.as_ref(), at::OPERATION) {
            1 => Operation::Request,
            _ => Operation::Reply, // the constructor let nothing else pass
        }
    }

    /// MAC that the sender claims.
    pub fn sender_mac(&self) -> MacAddr {
        MacAddr(array(self.buffer.as_ref(), at::SENDER_MAC))
    }

    /// Address that the sender claims; 0.0.0.0 in a probe (RFC 5227).
    pub fn sender_ip(&self) -> Ipv4Addr {
        Ipv4Addr::from(array::<4>(self.buffer.as_ref(), at::SENDER_IP))
    }

    /// MAC of the target, zero in a request.
    pub fn target_mac(&self) -> MacAddr {
        MacAddr(array(self.buffer.as_ref(), at::TARGET_MAC))
    }

    /// Address asked for.
    pub fn target_ip(&self) -> Ipv4Addr {
        Ipv4Addr::from(array::<4>(self.buffer.as_ref(), at::TARGET_IP))
    }
}

impl<T: AsRef<[u8]> + AsMut<[u8]>> Packet<T> {
    /// Rewrites the sender's MAC.
    pub fn set_sender_mac(&mut self, mac: MacAddr) {
        put(self.buffer.as_mut(), at::SENDER_MAC, mac.0);
    }

    /// Rewrites the target's MAC.
    pub fn set_target_mac(&mut self, mac: MacAddr) {
        put(self.buffer.as_mut(), at::TARGET_MAC, mac.0);
    }
}

fn expect(
    octets: &[u8],
    at: usize,
    field: &'static str,
    value: u16,
    expected: &'static str,
) -> Result<(), Malformed> {
    match be16(octets, at) {
        found if found == value => Ok(()),
        found => Err(Malformed::invalid(Layer::Arp, field, u32::from(found), expected)),
    }
}

/// A packet to be emitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Repr {
    /// Request or reply.
    pub operation: Operation,
    /// MAC of the sender.
    pub sender_mac: MacAddr,
    /// Address of the sender.
    pub sender_ip: Ipv4Addr,
    /// MAC of the target; zero in a request.
    pub target_mac: MacAddr,
    /// Address of the target.
    pub target_ip: Ipv4Addr,
}

impl Repr {
    /// The packet's octets.
    pub fn emit(&self) -> [u8; LEN] {
        let mut packet = [0; LEN];
        put16(&mut packet, at::HARDWARE, ETHERNET);
        put16(&mut packet, at::PROTOCOL, ethertype::IPV4);
        put16(&mut packet, at::LENGTHS, MAC_AND_IPV4);
        let operation = match self.operation {
            Operation::Request => 1,
            Operation::Reply => 2,
        };
        put16(&mut packet, at::OPERATION, operation);
        put(&mut packet, at::SENDER_MAC, self.sender_mac.0);
        put(&mut packet, at::SENDER_IP, self.sender_ip.octets());
        put(&mut packet, at::TARGET_MAC, self.target_mac.0);
        put(&mut packet, at::TARGET_IP, self.target_ip.octets());
        packet
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REQUEST: [u8; LEN] = [
        0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 1, 10, 0, 0, 1, 0, 0, 0, 0, 0, 0, 10, 0, 0, 254,
    ];

    #[test]
    fn fields_are_read_and_emitted_alike() {
        let packet = Packet::new(REQUEST).expect("valid");
        let repr = Repr {
            operation: packet.operation(),
            sender_mac: packet.sender_mac(),
            sender_ip: packet.sender_ip(),
            target_mac: packet.target_mac(),
            target_ip: packet.target_ip(),
        };
        assert_eq!(repr.operation, Operation::Request);
        assert_eq!(repr.target_ip, Ipv4Addr::new(10, 0, 0, 254));
        assert_eq!(repr.emit(), REQUEST);
    }

    #[test]
    fn macs_are_rewritten_in_place() {
        let mut packet = Packet::new(REQUEST).expect("valid");
        packet.set_sender_mac(MacAddr([4; 6]));
        packet.set_target_mac(MacAddr([5; 6]));
        assert_eq!(
            (packet.sender_mac(), packet.target_mac()),
            (MacAddr([4; 6]), MacAddr([5; 6]))
        );
        assert_eq!(packet.sender_ip(), Ipv4Addr::new(10, 0, 0, 1));
    }

    #[test]
    fn everything_but_ipv4_over_ethernet_is_refused_by_name() {
        for len in 0..LEN {
            assert!(Packet::new(&REQUEST[..len]).unwrap_err().is_truncated());
        }
        let places = [
            (1, "hardware type"),
            (2, "protocol type"),
            (4, "address lengths"),
            (7, "operation"),
        ];
        for (place, field) in places {
            let mut packet = REQUEST;
            packet[place] = 0x77;
            assert_eq!(Packet::new(packet).unwrap_err().field, field);
        }
    }
}
