//! Fragmentation as both IP versions tell it: one type, one set of rules.

use super::malformed::{Layer, Malformed};

/// Which part of its packet an IP packet carries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Fragment {
    /// All of it (also an IPv6 atomic fragment, RFC 6946).
    #[default]
    None,
    /// The beginning; the L4 header is here.
    First {
        /// Identification: 16 bits in IPv4, 32 in IPv6.
        id: u32,
    },
    /// A part without L4 header.
    Later {
        /// Identification: 16 bits in IPv4, 32 in IPv6.
        id: u32,
        /// Place in the packet's fragmentable part, in octets.
        offset: u16,
        /// Another fragment follows.
        more: bool,
    },
}

impl Fragment {
    /// From the header's fields, `offset` in octets.
    pub(super) const fn from_fields(id: u32, offset: u16, more: bool) -> Self {
        match (offset, more) {
            (0, false) => Self::None,
            (0, true) => Self::First { id },
            _ => Self::Later { id, offset, more },
        }
    }

    /// True for a part that has no L4 header.
    pub const fn is_later(self) -> bool {
        matches!(self, Self::Later { .. })
    }

    /// The rules that hold for a fragment carrying `len` octets: all but the last carry a multiple of 8, and none
    /// reaches beyond 65,535 octets (RFC 791 §3.1, RFC 8200 §4.5).
    pub(super) const fn check(self, layer: Layer, len: usize) -> Result<(), Malformed> {
        let (offset, more) = match self {
            Self::None => return Ok(()),
            Self::First { .. } => (0, true),
            Self::Later { offset, more, .. } => (offset, more),
        };
        if more && (len == 0 || !len.is_multiple_of(8)) {
            let expected = "a multiple of 8 octets in all fragments but the last";
            return Err(Malformed::invalid(layer, "fragment length", len as u32, expected));
        }
        if offset as usize + len > 65_535 {
            let expected = "an end within 65535 octets";
            return Err(Malformed::invalid(
                layer,
                "fragment offset",
                offset as u32,
                expected,
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_atomic_fragment_is_none() {
        assert_eq!(Fragment::from_fields(7, 0, false), Fragment::None);
        assert_eq!(Fragment::from_fields(7, 0, true), Fragment::First { id: 7 });
        let last = Fragment::Later {
            id: 7,
            offset: 8,
            more: false,
        };
        assert_eq!(Fragment::from_fields(7, 8, false), last);
    }

    #[test]
    fn fragments_keep_to_eight_octets_and_to_the_largest_packet() {
        let check = |offset, more, len| Fragment::from_fields(1, offset, more).check(Layer::Ipv4, len);
        assert!(check(0, true, 1480).is_ok());
        assert_eq!(check(0, true, 1479).unwrap_err().field, "fragment length");
        assert_eq!(check(8, true, 0).unwrap_err().field, "fragment length");
        assert!(check(65_528, false, 7).is_ok());
        assert_eq!(check(65_528, false, 8).unwrap_err().field, "fragment offset");
    }
}
