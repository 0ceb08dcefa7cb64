//! [`PciAddress`]: where a PCI function sits, parsed once, so that no text from outside ever becomes part of a sysfs path.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::addr::InvalidValue;

/// Domain, bus, device and function, as `0000:3b:00.2`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct PciAddress {
    domain: u16,
    bus: u8,
    device: u8,
    function: u8,
}

impl PciAddress {
    /// An address; `None` when the device is above 31 or the function above 7.
    pub fn new(domain: u16, bus: u8, device: u8, function: u8) -> Option<Self> {
        (device < 32 && function < 8).then_some(Self {
            domain,
            bus,
            device,
            function,
        })
    }

    /// The domain (segment).
    pub const fn domain(self) -> u16 {
        self.domain
    }

    /// The bus.
    pub const fn bus(self) -> u8 {
        self.bus
    }

    /// The device on its bus, 0 to 31.
    pub const fn device(self) -> u8 {
        self.device
    }

    /// The function of its device, 0 to 7.
    pub const fn function(self) -> u8 {
        self.function
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:04x}:{:02x}:{:02x}.{}",
            self.domain, self.bus, self.device, self.function
        )
    }
}

impl FromStr for PciAddress {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        parse(text).ok_or_else(|| InvalidValue::new("PCI address", text, "DDDD:BB:DD.F in hex digits"))
    }
}

fn parse(text: &str) -> Option<PciAddress> {
    let hex = |digits: &str, width: usize| {
        let valid = digits.len() == width && digits.bytes().all(|b| b.is_ascii_hexdigit());
        valid.then(|| u16::from_str_radix(digits, 16).ok()).flatten()
    };
    let (domain, rest) = text.split_once(':')?;
    let (bus, rest) = rest.split_once(':')?;
    let (device, function) = rest.split_once('.')?;
    PciAddress::new(
        hex(domain, 4)?,
        hex(bus, 2)?.try_into().ok()?,
        hex(device, 2)?.try_into().ok()?,
        hex(function, 1)?.try_into().ok()?,
    )
}

impl From<PciAddress> for String {
    fn from(address: PciAddress) -> Self {
        address.to_string()
    }
}

impl TryFrom<String> for PciAddress {
    type Error = InvalidValue;

    fn try_from(text: String) -> Result<Self, InvalidValue> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_addresses_are_taken() {
        assert_eq!(
            "0000:3b:1f.7".parse::<PciAddress>().expect("valid").to_string(),
            "0000:3b:1f.7"
        );
        for text in [
            "",
            "3b:00.0",
            "0000:3b:20.0",
            "0000:3b:00.8",
            "../../etc",
            "0000:3b:00.0/x",
            "+000:3b:00.0",
        ] {
            assert!(text.parse::<PciAddress>().is_err(), "{text} must be refused");
        }
    }
}
