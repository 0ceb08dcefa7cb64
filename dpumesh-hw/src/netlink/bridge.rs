//! The embedded switch of an SR-IOV interface: what `bridge link set dev PF hwmode …` sets.
//!
//! An embedded bridge (VEB) hands frames from one function of the card to another inside the card; a VEPA (802.1Qbg) sends
//! every frame out on the wire. `RTM_SETLINK` of family `AF_BRIDGE` with `IFLA_AF_SPEC` {flags: self, mode}.

use netlink_packet_core::NlasIterator;

use super::attribute::{Attributes, half_at};
use super::vf::ifinfo;
use super::{LinkIndex, Netlink, NetlinkError, attributes};

const AF_BRIDGE: u8 = libc::AF_BRIDGE as u8;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_BRIDGE_FLAGS: u16 = 0;
const IFLA_BRIDGE_MODE: u16 = 1;
const BRIDGE_FLAGS_SELF: u16 = 2;

/// What the embedded switch does with a frame for another function of the card.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BridgeMode {
    /// Hands it over inside the card.
    Veb,
    /// Sends it out on the wire.
    Vepa,
}

impl Netlink {
    /// Mode of the embedded switch; `None` when the driver does not tell.
    ///
    /// # Errors
    /// If the kernel refuses the question.
    pub fn bridge_mode(&mut self, pf: LinkIndex) -> Result<Option<BridgeMode>, NetlinkError> {
        const RTM_GETLINK: u16 = 18;
        let head = ifinfo(AF_BRIDGE, LinkIndex(0));
        let replies = self.list(
            "list switches beside",
            pf,
            RTM_GETLINK,
            &head,
            &Attributes::default(),
        )?;
        Ok(replies.iter().find_map(|reply| parse(reply, pf)))
    }

    /// Sets the mode of the embedded switch.
    ///
    /// # Errors
    /// `EOPNOTSUPP` when the driver cannot.
    pub fn set_bridge_mode(&mut self, pf: LinkIndex, mode: BridgeMode) -> Result<(), NetlinkError> {
        const RTM_SETLINK: u16 = 19;
        let spec = Attributes::default()
            .half(IFLA_BRIDGE_FLAGS, BRIDGE_FLAGS_SELF)
            .half(IFLA_BRIDGE_MODE, mode as u16);
        let body = Attributes::default().nest(IFLA_AF_SPEC, spec);
        self.ask("set switch of", pf, RTM_SETLINK, &ifinfo(AF_BRIDGE, pf), &body)
            .map(drop)
    }
}

fn parse(payload: &[u8], pf: LinkIndex) -> Option<BridgeMode> {
    let index = super::attribute::word_at(payload, 4)?;
    if index != pf.0 {
        return None;
    }
    let spec = attributes(payload, 16).find(|attribute| attribute.kind() == IFLA_AF_SPEC)?;
    let mode = NlasIterator::new(spec.value())
        .map_while(Result::ok)
        .find(|attribute| attribute.kind() == IFLA_BRIDGE_MODE)
        .and_then(|attribute| half_at(attribute.value(), 0))?;
    match mode {
        0 => Some(BridgeMode::Veb),
        1 => Some(BridgeMode::Vepa),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mode_is_read_of_the_right_link_and_no_truncation_panics() {
        let spec = Attributes::default().half(IFLA_BRIDGE_MODE, 1);
        let mut whole = ifinfo(AF_BRIDGE, LinkIndex(7)).to_vec();
        whole.extend(
            Attributes::default()
                .bytes(IFLA_AF_SPEC, spec.as_slice())
                .as_slice(),
        );
        assert_eq!(parse(&whole, LinkIndex(7)), Some(BridgeMode::Vepa));
        assert_eq!(parse(&whole, LinkIndex(8)), None);
        for length in 0..whole.len() {
            let _ = parse(&whole[..length], LinkIndex(7));
        }
    }
}
