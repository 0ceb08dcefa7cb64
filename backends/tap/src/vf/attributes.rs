//! Attributes of a leased VF: MAC and MTU, which an ordinary network device has. The rest is refused by name.

use dpumesh_core::vf::{VfConfig, VfLease};
use dpumesh_core::{Effect, Error, ErrorKind, Fence, MacAddr, PortRef, Result, Retry};

use super::{TapVf, observed, recorded};
use crate::card::{Attributes, Change, error};

impl TapVf {
    pub(super) fn check_config(
        &self,
        change: &Change<'_>,
        operation: &'static str,
        index: u16,
        config: &VfConfig,
    ) -> Result<()> {
        let VfConfig {
            mac,
            vlan,
            trust,
            spoof_check,
            link_state,
            min_rate,
            max_rate,
            mtu,
        } = config;
        let unknown = [
            ("config.vlan", vlan.is_some()),
            ("config.trust", trust.is_some()),
            ("config.spoof_check", spoof_check.is_some()),
            ("config.link_state", link_state.is_some()),
            ("config.min_rate", min_rate.is_some()),
            ("config.max_rate", max_rate.is_some()),
        ];
        if let Some((field, _)) = unknown.into_iter().find(|(_, asked)| *asked) {
            let message = "the emulated card cannot set this attribute";
            return Err(error(ErrorKind::Unsupported, operation, message).field(field));
        }
        if let Some(mac) = mac {
            check_mac(change, operation, index, *mac)?;
        }
        let largest = self.card.options.vf_mtu()?;
        match mtu {
            Some(mtu) if *mtu > largest => {
                let message = format!("{mtu} octets are more than the card's {largest}");
                Err(error(ErrorKind::Invalid, operation, message).field("config.mtu"))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn set_attributes(&self, fence: Fence, lease: &VfLease, config: &VfConfig) -> Result<()> {
        const CONFIGURE: &str = "vf.configure";
        self.host(CONFIGURE)?;
        let mut change = self.card.fenced(CONFIGURE, fence)?;
        let index = self.leased(&change, CONFIGURE, lease)?;
        self.check_config(&change, CONFIGURE, index, config)?;
        let before = recorded(&change, index);
        let mut after = before.clone();
        apply(&mut after.attributes, config);
        let Some(found) = change.yard()?.find(index, &before)? else {
            return Err(missing(CONFIGURE, lease.port));
        };
        // A process that died may have recorded them without setting them.
        if after == before && observed(&before, Some(&found)) == after.attributes {
            return Ok(());
        }
        let wanted = after.attributes.clone();
        change.state.functions.insert(index, after);
        change.commit()?;
        let mut yard = change.yard()?;
        let Err(failed) = yard.set(&found, &wanted) else {
            return Ok(());
        };
        let again = yard.find(index, &before)?;
        let undone = yard.set(again.as_ref().unwrap_or(&found), &observed(&before, Some(&found)));
        if undone.is_err() {
            return Err(failed.effect(Effect::Partial));
        }
        change.state.functions.insert(index, before);
        change.commit()?;
        Err(failed)
    }
}

fn check_mac(change: &Change<'_>, operation: &'static str, index: u16, mac: MacAddr) -> Result<()> {
    if mac.is_zero() || mac.is_multicast() {
        let message = "must be the address of one station";
        return Err(error(ErrorKind::Invalid, operation, message).field("config.mac"));
    }
    let user = change
        .state
        .functions
        .iter()
        .find(|(other, vf)| **other != index && vf.attributes.mac == mac);
    let Some((user, _)) = user else { return Ok(()) };
    let message = format!("{mac} is in use by {}", PortRef::vf(*user));
    Err(error(ErrorKind::Conflict, operation, message)
        .field("config.mac")
        .object(PortRef::vf(*user)))
}

pub(super) fn apply(attributes: &mut Attributes, config: &VfConfig) {
    if let Some(mac) = config.mac {
        attributes.admin_mac = Some(mac);
        attributes.mac = mac;
    }
    attributes.mtu = config.mtu.unwrap_or(attributes.mtu);
}

pub(super) fn is_empty(config: &VfConfig) -> bool {
    *config == VfConfig::default()
}

pub(super) fn missing(operation: &'static str, port: PortRef) -> Error {
    let message = "its network device is nowhere to be found; release or reclaim the VF";
    error(ErrorKind::Io, operation, message)
        .object(port)
        .retry(Retry::Never)
}
