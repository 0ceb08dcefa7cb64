//! Finite hardware profiles: what the emulated card claims to have.
//!
//! Real cards match only exactly, have few priorities, scarce counters, and tell of a batch only how far they got. A
//! program that was only ever run on an endless emulator meets that on the first customer's card. So the emulator has
//! the same limits on demand, and what the emulated NP cannot hold runs in software and says so.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use dpumesh_core::steering::{Atomicity, Field};
use dpumesh_core::{
    ActionKinds, AttachmentKinds, Capabilities, CounterUnit, EventKinds, MatchKinds, Mtu, ResetLevels,
    VfAttributes,
};
use serde::{Deserialize, Serialize};

/// Which card the emulator pretends to be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Profile {
    /// A card without limits that anybody would meet.
    #[default]
    Unlimited,
    /// Shaped like what is known of Yusur's K2: exact match only, few priorities, 256 VFs, scarce counters, a few thousand
    /// entries, no status per operation.
    K2Like,
    /// The least that the contract allows to work with.
    Minimal,
}

/// Every profile, for command lines and for tests that run on all.
pub const PROFILES: [Profile; 3] = [Profile::Unlimited, Profile::K2Like, Profile::Minimal];

/// Largest MTU of an emulated VF: a TAP takes 65,521 octets.
pub(crate) const LARGEST_MTU: u16 = 65_520;

/// Actions that the emulator's software carries out, whatever the profile.
const SOFTWARE_ACTIONS: ActionKinds = ActionKinds::DROP
    .union(ActionKinds::FORWARD)
    .union(ActionKinds::PUNT)
    .union(ActionKinds::JUMP)
    .union(ActionKinds::VXLAN)
    .union(ActionKinds::REWRITE_ETH)
    .union(ActionKinds::REWRITE_IP)
    .union(ActionKinds::REWRITE_DSCP)
    .union(ActionKinds::TTL)
    .union(ActionKinds::VLAN)
    .union(ActionKinds::MARK)
    .union(ActionKinds::COUNT);

const FIELDS: [Field; 17] = [
    Field::Port,
    Field::EthSrc,
    Field::EthDst,
    Field::Ethertype,
    Field::Vlan,
    Field::Vni,
    Field::Ip4Src,
    Field::Ip4Dst,
    Field::Ip6Src,
    Field::Ip6Dst,
    Field::IpProto,
    Field::Dscp,
    Field::Fragment,
    Field::L4Src,
    Field::L4Dst,
    Field::TcpFlags,
    Field::Mark,
];

impl Profile {
    /// Name, as on command lines.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unlimited => "unlimited",
            Self::K2Like => "k2-like",
            Self::Minimal => "minimal",
        }
    }

    /// The card's abilities, with VFs of up to `max_mtu`.
    ///
    /// Those of the network processor and of shared memory are not of the profile's making: they are zero here.
    pub fn capabilities(self, max_mtu: Mtu) -> Capabilities {
        let mut card = Capabilities::default();
        card.mode = self.name().to_owned();
        card.vf.attributes = VfAttributes::MAC | VfAttributes::MTU;
        card.vf.max_mtu = Some(max_mtu);
        card.vf.attachments = AttachmentKinds::NETNS;
        card.vf.resets = ResetLevels::CONFIG | ResetLevels::FUNCTION;
        card.vf.resizable = true;
        card.ports.checksum_offload = true;
        card.ports.tso = true;
        card.ports.uso = true;
        card.events = EventKinds::VF;
        let steering = &mut card.steering;
        steering.counter_unit = CounterUnit::L2;
        steering.fields = software_fields();
        steering.actions = SOFTWARE_ACTIONS;
        steering.software_fallback = true;
        match self {
            Self::Unlimited => {
                card.vf.max_vfs = 1024;
                steering.hardware_rules = 1 << 20;
                steering.rules = 1 << 20;
                steering.groups = 256;
                steering.priorities = 1 << 16;
                steering.masks = 64;
                steering.counters = 1 << 20;
                steering.hardware_fields = software_fields();
                steering.hardware_actions = SOFTWARE_ACTIONS;
                steering.atomicity =
                    BTreeSet::from([Atomicity::Continue, Atomicity::Rollback, Atomicity::Atomic]);
                steering.batch_max = 4096;
                steering.per_operation_status = true;
                steering.idle_timeout = true;
            }
            Self::K2Like => {
                card.vf.max_vfs = 256;
                steering.hardware_rules = 4096;
                steering.rules = 1 << 16;
                steering.groups = 4;
                steering.priorities = 4;
                steering.masks = 8;
                steering.counters = 256;
                steering.counter_age_ms = 1000;
                steering.hardware_fields = exact_fields(&FIELDS);
                steering.hardware_actions = SOFTWARE_ACTIONS - ActionKinds::REWRITE_DSCP - ActionKinds::MARK;
                steering.atomicity = BTreeSet::from([Atomicity::Continue, Atomicity::Rollback]);
                steering.batch_max = 256;
                steering.idle_timeout = true;
            }
            Self::Minimal => {
                card.vf.max_vfs = 4;
                steering.hardware_rules = 16;
                steering.rules = 64;
                steering.groups = 1;
                steering.priorities = 2;
                steering.masks = 1;
                steering.counters = 4;
                steering.hardware_fields = exact_fields(&[
                    Field::Port,
                    Field::EthDst,
                    Field::Ethertype,
                    Field::Ip4Dst,
                    Field::Ip6Dst,
                ]);
                steering.hardware_actions = ActionKinds::DROP | ActionKinds::FORWARD | ActionKinds::PUNT;
                steering.actions = SOFTWARE_ACTIONS - ActionKinds::JUMP;
                steering.atomicity = BTreeSet::from([Atomicity::Continue]);
                steering.batch_max = 8;
            }
        }
        card.ports.open = u32::from(card.vf.max_vfs) + 1;
        card
    }
}

/// How software matches each field: a range where the field is a number that has one, a prefix of addresses, a mask
/// where the pattern can carry one.
fn software_fields() -> BTreeMap<Field, MatchKinds> {
    let kinds = |field| match field {
        Field::EthSrc | Field::EthDst | Field::TcpFlags | Field::Mark => MatchKinds::EXACT | MatchKinds::MASK,
        Field::Ip4Src | Field::Ip4Dst | Field::Ip6Src | Field::Ip6Dst => {
            MatchKinds::EXACT | MatchKinds::PREFIX | MatchKinds::MASK
        }
        Field::L4Src | Field::L4Dst => MatchKinds::EXACT | MatchKinds::RANGE,
        _ => MatchKinds::EXACT,
    };
    FIELDS.into_iter().map(|field| (field, kinds(field))).collect()
}

fn exact_fields(fields: &[Field]) -> BTreeMap<Field, MatchKinds> {
    fields.iter().map(|field| (*field, MatchKinds::EXACT)).collect()
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A text that is no [`Profile`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a profile: expected unlimited, k2-like or minimal")]
pub struct ParseProfileError(String);

impl FromStr for Profile {
    type Err = ParseProfileError;

    fn from_str(text: &str) -> Result<Self, ParseProfileError> {
        let found = PROFILES.into_iter().find(|profile| profile.name() == text);
        found.ok_or_else(|| ParseProfileError(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn profiles_are_written_and_read_alike() {
        for profile in PROFILES {
            assert_eq!(profile.to_string().parse(), Ok(profile));
        }
        assert!("k3".parse::<Profile>().is_err());
    }

    #[test]
    fn hardware_never_does_what_software_does_not() {
        for profile in PROFILES {
            let steering = profile.capabilities(Mtu::ETHERNET).steering;
            assert!(steering.actions.contains(steering.hardware_actions), "{profile}");
            assert!(steering.hardware_rules <= steering.rules, "{profile}");
            for (field, kinds) in &steering.hardware_fields {
                assert!(steering.fields[field].contains(*kinds), "{profile}: {field:?}");
            }
        }
    }

    #[test]
    fn the_unlimited_card_has_all_that_the_others_have() {
        let unlimited = Profile::Unlimited.capabilities(Mtu::ETHERNET);
        for profile in PROFILES {
            assert_eq!(
                unlimited.missing(&profile.capabilities(Mtu::ETHERNET)),
                [],
                "{profile}"
            );
        }
    }
}
