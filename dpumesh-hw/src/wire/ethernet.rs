//! Ethernet II: `destination 6 | source 6 | ethertype 2 | payload`, without preamble and FCS.

use dpumesh_core::MacAddr;

use super::field::{array, be16, put};
use super::malformed::{Layer, Malformed};

/// A view of a frame.
#[derive(Clone, Copy, Debug)]
pub struct Packet<T: AsRef<[u8]>> {
    buffer: T,
}

/// Octets of the header.
pub const HEADER_LEN: usize = 14;

mod at {
    pub(super) const DESTINATION: usize = 0;
    pub(super) const SOURCE: usize = 6;
    pub(super) const ETHERTYPE: usize = 12;
}

/// Ethertypes that the dataplane reads behind.
pub mod ethertype {
    /// IPv4.
    pub const IPV4: u16 = 0x0800;
    /// ARP.
    pub const ARP: u16 = 0x0806;
    /// An 802.1Q customer tag.
    pub const VLAN: u16 = 0x8100;
    /// IPv6.
    pub const IPV6: u16 = 0x86dd;
    /// An 802.1ad service tag (QinQ): opaque to this dataplane.
    pub const QINQ: u16 = 0x88a8;
}

impl<T: AsRef<[u8]>> Packet<T> {
    /// A view of `buffer`.
    ///
    /// # Errors
    /// Fewer than 14 octets.
    pub fn new(buffer: T) -> Result<Self, Malformed> {
        Malformed::at_least(Layer::Ethernet, "header", HEADER_LEN, buffer.as_ref().len())?;
        Ok(Self { buffer })
    }

    /// Destination MAC.
    pub fn destination(&self) -> MacAddr {
        MacAddr(array(self.buffer.as_ref(), at::DESTINATION))
    }

    /// Source MAC.
    pub fn source(&self) -> MacAddr {
        MacAddr(array(self.buffer.as_ref(), at::SOURCE))
    }

    /// Ethertype, or the length of an 802.3 frame when below 1536.
    pub fn ethertype(&self) -> u16 {
        be16(self.buffer.as_ref(), at::ETHERTYPE)
    }

    /// Everything behind the header, padding included.
    pub fn payload(&self) -> &[u8] {
        &self.buffer.as_ref()[HEADER_LEN..]
    }
}

impl<T: AsRef<[u8]> + AsMut<[u8]>> Packet<T> {
    /// Rewrites the destination MAC.
    pub fn set_destination(&mut self, mac: MacAddr) {
        put(self.buffer.as_mut(), at::DESTINATION, mac.0);
    }

    /// Rewrites the source MAC.
    pub fn set_source(&mut self, mac: MacAddr) {
        put(self.buffer.as_mut(), at::SOURCE, mac.0);
    }
}

/// A header to be emitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Repr {
    /// Destination MAC.
    pub destination: MacAddr,
    /// Source MAC.
    pub source: MacAddr,
    /// Ethertype of what follows.
    pub ethertype: u16,
}

impl Repr {
    /// The header's octets.
    pub fn emit(&self) -> [u8; HEADER_LEN] {
        let mut header = [0; HEADER_LEN];
        put(&mut header, at::DESTINATION, self.destination.0);
        put(&mut header, at::SOURCE, self.source.0);
        put(&mut header, at::ETHERTYPE, self.ethertype.to_be_bytes());
        header
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: [u8; 16] = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x08, 0x06, 0xaa, 0xbb];

    #[test]
    fn fields_are_read_and_emitted_alike() {
        let packet = Packet::new(HEADER).expect("long enough");
        let repr = Repr {
            destination: packet.destination(),
            source: packet.source(),
            ethertype: packet.ethertype(),
        };
        assert_eq!(repr.destination, MacAddr([2, 0, 0, 0, 0, 1]));
        assert_eq!(repr.ethertype, ethertype::ARP);
        assert_eq!(packet.payload(), [0xaa, 0xbb]);
        assert_eq!(repr.emit(), HEADER[..HEADER_LEN]);
    }

    #[test]
    fn addresses_are_rewritten_in_place() {
        let mut packet = Packet::new(HEADER).expect("long enough");
        packet.set_destination(MacAddr::BROADCAST);
        packet.set_source(MacAddr([9; 6]));
        assert_eq!(
            (packet.destination(), packet.source()),
            (MacAddr::BROADCAST, MacAddr([9; 6]))
        );
        assert_eq!(packet.ethertype(), ethertype::ARP);
    }

    #[test]
    fn a_short_frame_is_refused() {
        for len in 0..HEADER_LEN {
            let refused = Packet::new(&HEADER[..len]).unwrap_err();
            assert_eq!((refused.layer, refused.is_truncated()), (Layer::Ethernet, true));
        }
    }
}
