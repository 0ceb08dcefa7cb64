//! Addresses and small numbers of the wire, each a type of its own so that they cannot be mixed up.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// An IEEE 802 MAC address, in transmission order.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    /// The broadcast address.
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// The group bit is set: multicast or broadcast.
    pub const fn is_multicast(self) -> bool {
        self.0[0] & 1 == 1
    }

    /// All octets zero: no address.
    pub const fn is_zero(self) -> bool {
        matches!(self.0, [0, 0, 0, 0, 0, 0])
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A value out of its range, or a text that is no such value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{value}` is not a {what}: {expected}")]
pub struct InvalidValue {
    what: &'static str,
    value: String,
    expected: &'static str,
}

impl InvalidValue {
    pub(crate) fn new(what: &'static str, value: impl fmt::Display, expected: &'static str) -> Self {
        Self {
            what,
            value: value.to_string(),
            expected,
        }
    }
}

impl FromStr for MacAddr {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        let refuse = || InvalidValue::new("MAC address", text, "six pairs of hex digits joined by colons");
        let mut octets = [0; 6];
        let mut parts = text.split(':');
        for octet in &mut octets {
            let part = parts.next().ok_or_else(refuse)?;
            if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(refuse());
            }
            *octet = u8::from_str_radix(part, 16).map_err(|_| refuse())?;
        }
        parts.next().is_none().then_some(Self(octets)).ok_or_else(refuse)
    }
}

impl From<MacAddr> for String {
    fn from(mac: MacAddr) -> Self {
        mac.to_string()
    }
}

impl TryFrom<String> for MacAddr {
    type Error = InvalidValue;

    fn try_from(text: String) -> Result<Self, InvalidValue> {
        text.parse()
    }
}

/// An 802.1Q VLAN identifier, 1 to 4094.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "u16", try_from = "u16")]
pub struct VlanId(u16);

impl VlanId {
    /// The identifier as a number.
    pub const fn get(self) -> u16 {
        self.0
    }
}

impl TryFrom<u16> for VlanId {
    type Error = InvalidValue;

    fn try_from(id: u16) -> Result<Self, InvalidValue> {
        match id {
            1..=4094 => Ok(Self(id)),
            _ => Err(InvalidValue::new("VLAN identifier", id, "1 to 4094")),
        }
    }
}

impl From<VlanId> for u16 {
    fn from(id: VlanId) -> Self {
        id.0
    }
}

/// A VXLAN or Geneve network identifier, 24 bits (RFC 7348 §5, RFC 8926 §3.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "u32", try_from = "u32")]
pub struct Vni(u32);

impl Vni {
    /// The identifier as a number.
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl TryFrom<u32> for Vni {
    type Error = InvalidValue;

    fn try_from(id: u32) -> Result<Self, InvalidValue> {
        match id {
            0..=0xff_ffff => Ok(Self(id)),
            _ => Err(InvalidValue::new("VNI", id, "0 to 16777215")),
        }
    }
}

impl From<Vni> for u32 {
    fn from(id: Vni) -> Self {
        id.0
    }
}

/// Largest L3 packet of a link in octets, as Linux counts it: without the Ethernet header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "u16", try_from = "u16")]
pub struct Mtu(u16);

impl Mtu {
    /// Ethernet's usual 1,500 octets.
    pub const ETHERNET: Self = Self(1500);
    /// IPv6's smallest link MTU (RFC 8200 §5).
    pub const MIN_IPV6: Self = Self(1280);

    /// Octets.
    pub const fn get(self) -> u16 {
        self.0
    }

    /// Longest frame in octets: the packet behind an Ethernet and an 802.1Q header, without FCS.
    pub const fn frame_len(self) -> usize {
        self.0 as usize + 18
    }

    /// What is left after an encapsulation of `overhead` octets; `None` below the IPv4 minimum of 68 (RFC 791).
    pub fn minus(self, overhead: u16) -> Option<Self> {
        self.0
            .checked_sub(overhead)
            .and_then(|octets| Self::try_from(octets).ok())
    }
}

impl Default for Mtu {
    fn default() -> Self {
        Self::ETHERNET
    }
}

impl TryFrom<u16> for Mtu {
    type Error = InvalidValue;

    fn try_from(octets: u16) -> Result<Self, InvalidValue> {
        match octets {
            68.. => Ok(Self(octets)),
            _ => Err(InvalidValue::new("MTU", octets, "68 octets or more")),
        }
    }
}

impl From<Mtu> for u16 {
    fn from(mtu: Mtu) -> Self {
        mtu.0
    }
}

impl fmt::Display for Mtu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mac_addresses_are_written_and_read_alike() {
        let mac: MacAddr = "02:50:0a:ff:00:01".parse().expect("valid");
        assert_eq!(mac.to_string(), "02:50:0a:ff:00:01");
        for text in [
            "",
            "02:50",
            "02:50:0a:ff:00:01:02",
            "2:50:0a:ff:00:01",
            "+2:50:0a:ff:00:01",
        ] {
            assert!(text.parse::<MacAddr>().is_err(), "{text} must be refused");
        }
    }

    #[test]
    fn numbers_keep_to_their_range() {
        assert!(VlanId::try_from(0).is_err() && VlanId::try_from(4095).is_err());
        assert!(Vni::try_from(1 << 24).is_err());
        assert!(Mtu::try_from(67).is_err());
        assert_eq!(Mtu::ETHERNET.minus(50).map(Mtu::get), Some(1450));
        assert!(Mtu::ETHERNET.minus(1450).is_none());
    }
}
