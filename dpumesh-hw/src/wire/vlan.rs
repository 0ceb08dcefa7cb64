//! IEEE 802.1Q: the four octets `TCI 2 | ethertype 2` behind an Ethernet header of type 0x8100, where
//! `TCI = PCP 3 bits | DEI 1 bit | VLAN identifier 12 bits`.

use dpumesh_core::VlanId;

use super::field::{be16, put16};
use super::malformed::{Layer, Malformed};

/// A view of what follows ethertype 0x8100.
#[derive(Clone, Copy, Debug)]
pub struct Packet<T: AsRef<[u8]>> {
    buffer: T,
}

/// A tag's 16 bits of control information.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tag(u16);

/// Octets of the tag behind the Ethernet header.
pub const HEADER_LEN: usize = 4;

mod at {
    pub(super) const TCI: usize = 0;
    pub(super) const ETHERTYPE: usize = 2;
}

impl<T: AsRef<[u8]>> Packet<T> {
    /// A view of `buffer`.
    ///
    /// # Errors
    /// Fewer than 4 octets, or the reserved identifier 4095.
    pub fn new(buffer: T) -> Result<Self, Malformed> {
        let octets = buffer.as_ref();
        Malformed::at_least(Layer::Vlan, "tag", HEADER_LEN, octets.len())?;
        let id = be16(octets, at::TCI) & Tag::ID;
        if id == Tag::ID {
            return Err(Malformed::invalid(
                Layer::Vlan,
                "identifier",
                u32::from(id),
                "0 to 4094",
            ));
        }
        Ok(Self { buffer })
    }

    /// Priority and identifier.
    pub fn tag(&self) -> Tag {
        Tag(be16(self.buffer.as_ref(), at::TCI))
    }

    /// Ethertype of what follows.
    pub fn ethertype(&self) -> u16 {
        be16(self.buffer.as_ref(), at::ETHERTYPE)
    }

    /// Everything behind the tag.
    pub fn payload(&self) -> &[u8] {
        &self.buffer.as_ref()[HEADER_LEN..]
    }
}

impl<T: AsRef<[u8]> + AsMut<[u8]>> Packet<T> {
    /// Rewrites priority and identifier.
    pub fn set_tag(&mut self, tag: Tag) {
        put16(self.buffer.as_mut(), at::TCI, tag.0);
    }
}

impl Tag {
    const ID: u16 = 0x0fff;
    const DEI: u16 = 0x1000;

    /// A tag; `None` is the identifier 0, a frame with priority but of no VLAN. Of `pcp` the lower 3 bits count.
    pub fn new(id: Option<VlanId>, pcp: u8, dei: bool) -> Self {
        let dei = if dei { Self::DEI } else { 0 };
        Self(u16::from(pcp & 7) << 13 | dei | id.map_or(0, VlanId::get))
    }

    /// VLAN identifier; `None` in a priority tag.
    pub fn id(self) -> Option<VlanId> {
        VlanId::try_from(self.0 & Self::ID).ok()
    }

    /// Priority code point, 0 to 7.
    pub const fn pcp(self) -> u8 {
        (self.0 >> 13) as u8
    }

    /// Drop eligible indicator.
    pub const fn dei(self) -> bool {
        self.0 & Self::DEI != 0
    }

    /// The tag and the ethertype of what follows it, as they stand behind ethertype 0x8100.
    pub const fn emit(self, ethertype: u16) -> [u8; HEADER_LEN] {
        let [a, b] = self.0.to_be_bytes();
        let [c, d] = ethertype.to_be_bytes();
        [a, b, c, d]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_is_read_and_emitted_alike() {
        let packet = Packet::new([0xb0, 0x64, 0x08, 0x00, 7]).expect("valid");
        let tag = packet.tag();
        assert_eq!(
            (tag.id().map(VlanId::get), tag.pcp(), tag.dei()),
            (Some(100), 5, true)
        );
        assert_eq!((packet.ethertype(), packet.payload()), (0x0800, &[7][..]));
        assert_eq!(Tag::new(tag.id(), 5, true).emit(0x0800), [0xb0, 0x64, 0x08, 0x00]);
    }

    #[test]
    fn a_priority_tag_has_no_identifier() {
        let mut packet = Packet::new([0x60, 0, 0x86, 0xdd]).expect("valid");
        assert_eq!((packet.tag().id(), packet.tag().pcp()), (None, 3));
        packet.set_tag(Tag::new(VlanId::try_from(7).ok(), 0, false));
        assert_eq!(packet.tag().id().map(VlanId::get), Some(7));
    }

    #[test]
    fn short_and_reserved_tags_are_refused() {
        for len in 0..HEADER_LEN {
            assert!(Packet::new(&[0u8; 4][..len]).unwrap_err().is_truncated());
        }
        assert_eq!(Packet::new([0xff, 0xff, 8, 0]).unwrap_err().field, "identifier");
    }
}
