//! Netlink attributes in host byte order, written by hand: for messages that netlink-packet-route does not know, or reads
//! with a loss.
//!
//! Layout: length (2, with this header, without padding), type (2), value, padded to four octets.

use super::channel::aligned;

/// Attributes being written one after the other.
#[derive(Debug, Default)]
pub(super) struct Attributes(Vec<u8>);

impl Attributes {
    pub(super) fn bytes(mut self, kind: u16, value: &[u8]) -> Self {
        // Values are numbers, names and nests of these: far below 64 KiB.
        let length = u16::try_from(4 + value.len()).expect("attributes here are short");
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(aligned(self.0.len()), 0);
        self
    }

    pub(super) fn half(self, kind: u16, value: u16) -> Self {
        self.bytes(kind, &value.to_ne_bytes())
    }

    pub(super) fn word(self, kind: u16, value: u32) -> Self {
        self.bytes(kind, &value.to_ne_bytes())
    }

    pub(super) fn words(self, kind: u16, values: &[u32]) -> Self {
        let octets: Vec<u8> = values.iter().flat_map(|value| value.to_ne_bytes()).collect();
        self.bytes(kind, &octets)
    }

    /// A text with its final zero.
    pub(super) fn text(self, kind: u16, value: &str) -> Self {
        let mut octets = value.as_bytes().to_vec();
        octets.push(0);
        self.bytes(kind, &octets)
    }

    pub(super) fn nest(self, kind: u16, inner: Self) -> Self {
        self.bytes(kind | netlink_packet_core::NLA_F_NESTED, &inner.0)
    }

    pub(super) fn as_slice(&self) -> &[u8] {
        &self.0
    }
}

/// The number at `at`, if the value reaches that far.
pub(super) fn word_at(value: &[u8], at: usize) -> Option<u32> {
    value
        .get(at..at.checked_add(4)?)?
        .first_chunk()
        .map(|octets| u32::from_ne_bytes(*octets))
}

pub(super) fn half_at(value: &[u8], at: usize) -> Option<u16> {
    value
        .get(at..at.checked_add(2)?)?
        .first_chunk()
        .map(|octets| u16::from_ne_bytes(*octets))
}

/// A text up to its final zero.
pub(super) fn text_of(value: &[u8]) -> String {
    let end = value.iter().position(|octet| *octet == 0).unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end]).into_owned()
}
