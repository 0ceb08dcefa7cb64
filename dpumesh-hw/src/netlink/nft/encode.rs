//! nf_tables messages as octets: nested attributes, numbers in network byte order, expressions by name.
//!
//! Layout (`linux/netfilter/nf_tables.h`): netlink header (16), `nfgenmsg` {family, version, resource id} (4), then
//! attributes of length (2), type (2), value, padded to four. An expression is {name, data}; expressions hand values
//! to each other in registers.

use netlink_packet_core::NLA_F_NESTED;

use crate::netlink::channel::{HEADER, aligned};

const SUBSYSTEM: u16 = 10;
pub(super) const BATCH_BEGIN: u16 = 16;
pub(super) const BATCH_END: u16 = 17;
pub(super) const NEW_TABLE: u16 = SUBSYSTEM << 8;
pub(super) const DELETE_TABLE: u16 = SUBSYSTEM << 8 | 2;
pub(super) const NEW_CHAIN: u16 = SUBSYSTEM << 8 | 3;
pub(super) const NEW_RULE: u16 = SUBSYSTEM << 8 | 6;
pub(super) const GET_RULE: u16 = SUBSYSTEM << 8 | 7;
/// Family for IPv4 and IPv6 together.
const INET: u8 = 1;

/// One message; its sequence number is filled in when it is sent.
pub(super) fn message(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
    let batch_mark = kind == BATCH_BEGIN || kind == BATCH_END;
    let (family, resource) = if batch_mark { (0, SUBSYSTEM) } else { (INET, 0) };
    let length = HEADER + 4 + body.len();
    let mut octets = Vec::with_capacity(aligned(length));
    octets.extend((length as u32).to_ne_bytes());
    octets.extend(kind.to_ne_bytes());
    octets.extend(flags.to_ne_bytes());
    octets.extend([0; 8]);
    octets.extend([family, 0]);
    octets.extend(resource.to_be_bytes());
    octets.extend(body);
    octets.resize(aligned(length), 0);
    octets
}

/// A rule's comment as `nft list ruleset` shows it: type 0, length, text with final zero.
pub(super) fn comment(text: &str) -> Vec<u8> {
    let mut octets = vec![
        0,
        u8::try_from(text.len() + 1).expect("comments here are short constants"),
    ];
    octets.extend(text.as_bytes());
    octets.push(0);
    octets
}

pub(super) fn read_comment(octets: &[u8]) -> Option<String> {
    let [0, length, text @ ..] = octets else {
        return None;
    };
    let text = text.get(..usize::from(*length))?.strip_suffix(&[0])?;
    Some(String::from_utf8_lossy(text).into_owned())
}

/// Attributes being written one after the other.
#[derive(Debug, Default)]
pub(super) struct Attributes(Vec<u8>);

impl Attributes {
    pub(super) fn bytes(&mut self, kind: u16, value: &[u8]) {
        let length = 4 + value.len();
        self.0.extend(
            u16::try_from(length)
                .expect("attributes here are short")
                .to_ne_bytes(),
        );
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len() + aligned(length) - length, 0);
    }

    pub(super) fn text(&mut self, kind: u16, value: &str) {
        let mut octets = value.as_bytes().to_vec();
        octets.push(0);
        self.bytes(kind, &octets);
    }

    pub(super) fn word(&mut self, kind: u16, value: u32) {
        self.bytes(kind, &value.to_be_bytes());
    }

    pub(super) fn nest(&mut self, kind: u16, write: impl FnOnce(&mut Self)) {
        let mut inner = Self::default();
        write(&mut inner);
        self.bytes(kind | NLA_F_NESTED, &inner.0);
    }

    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.0
    }
}

/// Where expressions hand values to each other.
#[derive(Clone, Copy, Debug)]
pub(super) enum Register {
    Verdict = 0,
    One = 1,
}

/// The expressions of one rule, in the order they are evaluated; a comparison that fails ends the rule.
#[derive(Debug, Default)]
pub(super) struct Expressions(Attributes);

impl Expressions {
    /// Packets that came in by the interface of this name.
    pub(super) fn from_interface(name: &str) -> Self {
        const IIFNAME: u32 = 6;
        let mut padded = [0; libc::IFNAMSIZ];
        padded[..name.len()].copy_from_slice(name.as_bytes());
        Self::default().load_meta(IIFNAME).equals(&padded)
    }

    /// Packets that bear exactly this mark.
    pub(super) fn marked(self, mark: u32) -> Self {
        const MARK: u32 = 3;
        self.load_meta(MARK).equals(&mark.to_ne_bytes())
    }

    pub(super) fn transport_protocol(self, number: u8) -> Self {
        const L4PROTO: u32 = 16;
        self.load_meta(L4PROTO).equals(&[number])
    }

    pub(super) fn network_protocol(self, family: u8) -> Self {
        const NFPROTO: u32 = 15;
        self.load_meta(NFPROTO).equals(&[family])
    }

    /// Loads `length` octets of the Ethernet source address.
    pub(super) fn source_mac(self, offset: usize, length: usize) -> Self {
        const LINK_LAYER: u32 = 0;
        const SOURCE: usize = 6;
        self.load_payload(LINK_LAYER, SOURCE + offset, length)
    }

    /// Loads octets of the transport header.
    pub(super) fn transport(self, offset: usize, length: usize) -> Self {
        const TRANSPORT: u32 = 2;
        self.load_payload(TRANSPORT, offset, length)
    }

    pub(super) fn equals(self, value: &[u8]) -> Self {
        const EQUAL: u32 = 0;
        self.push("cmp", |data| {
            data.word(1, Register::One as u32);
            data.word(2, EQUAL);
            data.nest(3, |constant| constant.bytes(1, value));
        })
    }

    /// Turns a 32-bit number in network byte order into host byte order.
    pub(super) fn in_host_order(self) -> Self {
        const NTOH: u32 = 0;
        self.push("byteorder", |data| {
            data.word(1, Register::One as u32);
            data.word(2, Register::One as u32);
            data.word(3, NTOH);
            data.word(4, 4);
            data.word(5, 4);
        })
    }

    pub(super) fn set_mark(self) -> Self {
        const MARK: u32 = 3;
        self.push("meta", |data| {
            data.word(2, MARK);
            data.word(3, Register::One as u32);
        })
    }

    /// Hands the packet to a transparent socket: the one that owns the connection, else one listening on `port`.
    pub(super) fn tproxy(self, port: u16) -> Self {
        const ANY_FAMILY: u32 = 0;
        let loaded = self.push("immediate", |data| {
            data.word(1, Register::One as u32);
            data.nest(2, |constant| constant.bytes(1, &port.to_be_bytes()));
        });
        loaded.push("tproxy", |data| {
            data.word(1, ANY_FAMILY);
            data.word(3, Register::One as u32);
        })
    }

    pub(super) fn counter(self) -> Self {
        self.push("counter", |_| {})
    }

    pub(super) fn tcp_reset(self) -> Self {
        const TCP_RST: u32 = 1;
        self.push("reject", |data| data.word(1, TCP_RST))
    }

    pub(super) fn accept(self) -> Self {
        self.verdict(1)
    }

    pub(super) fn drop(self) -> Self {
        self.verdict(0)
    }

    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.0.into_bytes()
    }

    fn verdict(self, code: u32) -> Self {
        self.push("immediate", |data| {
            data.word(1, Register::Verdict as u32);
            data.nest(2, |constant| constant.nest(2, |verdict| verdict.word(1, code)));
        })
    }

    fn load_meta(self, key: u32) -> Self {
        self.push("meta", |data| {
            data.word(1, Register::One as u32);
            data.word(2, key);
        })
    }

    fn load_payload(self, base: u32, offset: usize, length: usize) -> Self {
        self.push("payload", |data| {
            data.word(1, Register::One as u32);
            data.word(2, base);
            data.word(3, offset as u32);
            data.word(4, length as u32);
        })
    }

    fn push(mut self, name: &str, write: impl FnOnce(&mut Attributes)) -> Self {
        self.0.nest(1, |expression| {
            expression.text(1, name);
            expression.nest(2, write);
        });
        self
    }
}

#[cfg(test)]
mod tests {
    use netlink_packet_core::NlasIterator;
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn attributes_are_padded_but_their_length_is_not() {
        let mut attributes = Attributes::default();
        attributes.bytes(5, &[1, 2, 3]);
        let octets = attributes.into_bytes();
        assert_eq!(octets.len(), 8);
        assert_eq!(u16::from_ne_bytes([octets[0], octets[1]]), 7);
    }

    #[test]
    fn a_comment_is_read_back_at_no_shorter_length() {
        let octets = comment("to the proxy");
        assert_eq!(read_comment(&octets).as_deref(), Some("to the proxy"));
        for length in 0..octets.len() {
            assert_eq!(read_comment(&octets[..length]), None);
        }
    }

    #[test]
    fn a_message_carries_family_and_length() {
        let octets = message(NEW_TABLE, 0, &[0; 8]);
        assert_eq!(octets.len(), 28);
        assert_eq!(octets[16], INET);
        let begin = message(BATCH_BEGIN, 0, &[]);
        assert_eq!(begin[16..20], [0, 0, 0, 10]);
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(
            list in vec((0u16..0x3fff, vec(any::<u8>(), 0..40)), 0..20),
        ) {
            let mut written = Attributes::default();
            written.nest(9, |inner| list.iter().for_each(|(kind, value)| inner.bytes(*kind, value)));
            let octets = written.into_bytes();
            let outer: Vec<_> = NlasIterator::new(octets.as_slice()).map(|found| found.expect("well formed")).collect();
            prop_assert_eq!(outer.len(), 1);
            prop_assert_eq!(outer[0].kind(), 9);
            let read: Vec<(u16, Vec<u8>)> = NlasIterator::new(outer[0].value())
                .map(|found| found.map(|found| (found.kind(), found.value().to_vec())).expect("well formed"))
                .collect();
            prop_assert_eq!(read, list);
        }
    }
}
