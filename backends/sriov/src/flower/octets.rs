//! Netlink attributes as octets: what `netlink-packet-route` has no types for (most of tc's actions).
//!
//! An attribute is `length (2), kind (2), value`, padded to four octets, numbers in host order unless said otherwise. Reading
//! never panics and ends at the first malformed attribute.

use netlink_packet_core::NlasIterator;

/// The bit of an attribute's kind that says its value is a list of attributes.
const NESTED: u16 = 1 << 15;
/// The bits that are not the kind.
const FLAGS: u16 = 0xc000;

/// Attributes, one behind another.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Writer(Vec<u8>);

impl Writer {
    /// Begins behind a fixed part.
    pub(super) fn behind(fixed: Vec<u8>) -> Self {
        Self(fixed)
    }

    /// Adds an attribute.
    pub(super) fn put(mut self, kind: u16, value: &[u8]) -> Self {
        let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX); // ours are a few kilobytes at most
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    /// Adds a list of attributes.
    pub(super) fn nest(self, kind: u16, inner: Self) -> Self {
        self.put(kind | NESTED, &inner.0)
    }

    /// Adds a number in host order.
    pub(super) fn u32(self, kind: u16, value: u32) -> Self {
        self.put(kind, &value.to_ne_bytes())
    }

    /// Adds a number in host order.
    pub(super) fn u16(self, kind: u16, value: u16) -> Self {
        self.put(kind, &value.to_ne_bytes())
    }

    /// Adds a name.
    pub(super) fn text(self, kind: u16, value: &str) -> Self {
        self.put(kind, &[value.as_bytes(), &[0]].concat())
    }

    pub(super) fn finish(self) -> Vec<u8> {
        self.0
    }
}

/// The attributes in `octets`, by kind.
pub(super) fn attributes(octets: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    NlasIterator::new(octets).map_while(move |attribute| {
        let attribute = attribute.ok()?;
        // The iterator hands out copies of the buffer's borrow: the value is found again by its place.
        let kind = attribute.kind() & !FLAGS;
        let inner = attribute.into_inner();
        Some((kind, inner.get(4..usize::from(u16_at(inner, 0)?))?))
    })
}

/// The first attribute of a kind.
pub(super) fn find(octets: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(octets)
        .find(|(found, _)| *found == kind)
        .map(|(_, value)| value)
}

/// A number in host order.
pub(super) fn u16_at(octets: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(octets.get(at..at + 2)?.try_into().ok()?))
}

/// A number in host order.
pub(super) fn u32_at(octets: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(octets.get(at..at + 4)?.try_into().ok()?))
}

/// A number in host order.
pub(super) fn u64_at(octets: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(octets.get(at..at + 8)?.try_into().ok()?))
}

/// A name.
pub(super) fn text(octets: &[u8]) -> Option<&str> {
    let end = octets
        .iter()
        .position(|octet| *octet == 0)
        .unwrap_or(octets.len());
    std::str::from_utf8(&octets[..end]).ok()
}
