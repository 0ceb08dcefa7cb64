//! Why octets were refused: the layer, the field, and what was wrong with it.

use std::fmt;

/// Octets that are no valid packet of a layer, or that this dataplane does not forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{layer} {field}: {reason}")]
pub struct Malformed {
    /// Whose rule was broken.
    pub layer: Layer,
    /// The field that shows it, in the words of its RFC.
    pub field: &'static str,
    /// What is wrong with the field.
    pub reason: Reason,
}

/// What is wrong with a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The octets end too early.
    Truncated {
        /// Octets of this layer that the field asks for.
        need: u32,
        /// Octets of this layer that are there.
        have: u32,
    },
    /// The field holds a value that is not allowed.
    Invalid {
        /// The value.
        found: u32,
        /// What would be allowed.
        expected: &'static str,
    },
}

/// The layers that can refuse a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Layer {
    /// The metadata beside the octets: open checksum, segmentation.
    Frame,
    /// Ethernet II.
    Ethernet,
    /// IEEE 802.1Q.
    Vlan,
    /// RFC 826.
    Arp,
    /// RFC 791.
    Ipv4,
    /// RFC 8200.
    Ipv6,
    /// RFC 792.
    Icmpv4,
    /// RFC 4443 and RFC 4861.
    Icmpv6,
    /// RFC 9293.
    Tcp,
    /// RFC 768.
    Udp,
    /// RFC 7348.
    Vxlan,
}

/// The caller's buffer is too small for what was to be written; nothing was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{need} octets do not fit into a buffer of {have}")]
pub struct NoRoom {
    /// Octets needed.
    pub need: usize,
    /// Octets there.
    pub have: usize,
}

impl Malformed {
    /// A value that is not allowed.
    pub(super) const fn invalid(
        layer: Layer,
        field: &'static str,
        found: u32,
        expected: &'static str,
    ) -> Self {
        Self {
            layer,
            field,
            reason: Reason::Invalid { found, expected },
        }
    }

    /// Refuses when fewer than `need` of the octets that `field` asks for are there.
    pub(super) const fn at_least(
        layer: Layer,
        field: &'static str,
        need: usize,
        have: usize,
    ) -> Result<(), Self> {
        if have >= need {
            return Ok(());
        }
        let reason = Reason::Truncated {
            need: need as u32,
            have: have as u32,
        };
        Err(Self { layer, field, reason })
    }

    /// True when more octets could have made the packet valid.
    pub const fn is_truncated(&self) -> bool {
        matches!(self.reason, Reason::Truncated { .. })
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Truncated { need, have } => write!(f, "asks for {need} octets, {have} are there"),
            Self::Invalid { found, expected } => write!(f, "{found} ({found:#x}) instead of {expected}"),
        }
    }
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Frame => "frame",
            Self::Ethernet => "Ethernet",
            Self::Vlan => "802.1Q",
            Self::Arp => "ARP",
            Self::Ipv4 => "IPv4",
            Self::Ipv6 => "IPv6",
            Self::Icmpv4 => "ICMPv4",
            Self::Icmpv6 => "ICMPv6",
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Vxlan => "VXLAN",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_names_layer_field_and_reason() {
        let short = Malformed::at_least(Layer::Ipv4, "total length", 60, 46).unwrap_err();
        assert_eq!(
            short.to_string(),
            "IPv4 total length: asks for 60 octets, 46 are there"
        );
        assert!(short.is_truncated());
        let wrong = Malformed::invalid(Layer::Tcp, "data offset", 3, "5 to 15");
        assert_eq!(wrong.to_string(), "TCP data offset: 3 (0x3) instead of 5 to 15");
        assert!(!wrong.is_truncated());
    }
}
