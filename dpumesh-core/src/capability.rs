//! What a card can do: coarse limits. Zero or empty means "not at all".
//!
//! Limits are per mode (eswitch mode, firmware profile): a change of mode is a new epoch. They are honest upper bounds,
//! not promises about a particular rule: for that there is [`crate::steering::FlowSteering::validate`]. A capability that
//! is claimed and does not hold is a failure of the conformance kit.

use std::collections::{BTreeMap, BTreeSet};

use bitflags::bitflags;
use serde::{Deserialize, Serialize};

use crate::addr::Mtu;
use crate::steering::{Atomicity, Field};

/// Abilities of one card in its present mode.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct Capabilities {
    /// The mode these limits belong to, as `switchdev` or `k2-like`.
    pub mode: String,
    /// Virtual functions.
    pub vf: VfCapabilities,
    /// Steering rules.
    pub steering: SteeringCapabilities,
    /// The network processor.
    pub offload: OffloadCapabilities,
    /// Shared-memory channels.
    pub transport: TransportCapabilities,
    /// Frames of ports.
    pub ports: PortCapabilities,
    /// Which events are raised; `Lost` and `Back` always are.
    pub events: EventKinds,
}

/// Limits of [`crate::vf::VfAllocator`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct VfCapabilities {
    /// Most VFs per physical function.
    pub max_vfs: u16,
    /// Attributes that can be set.
    pub attributes: VfAttributes,
    /// Largest MTU of a VF.
    pub max_mtu: Option<Mtu>,
    /// Where a VF can be attached.
    pub attachments: AttachmentKinds,
    /// How a VF can be reset when it is released.
    pub resets: ResetLevels,
    /// The number of VFs can be changed.
    pub resizable: bool,
}

/// Limits of [`crate::steering::FlowSteering`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct SteeringCapabilities {
    /// Rules that the card itself can hold.
    pub hardware_rules: u64,
    /// Rules in all, software included.
    pub rules: u64,
    /// Groups.
    pub groups: u32,
    /// Priority levels per group; priorities 0 to `priorities - 1` are accepted.
    pub priorities: u32,
    /// Different sets of masks that the card can hold at a time.
    pub masks: u32,
    /// Rules that can count.
    pub counters: u64,
    /// What counted octets are.
    pub counter_unit: CounterUnit,
    /// How old a counter value may be, in milliseconds.
    pub counter_age_ms: u32,
    /// How each field can be matched in hardware.
    pub hardware_fields: BTreeMap<Field, MatchKinds>,
    /// How each field can be matched at all.
    pub fields: BTreeMap<Field, MatchKinds>,
    /// Actions that hardware carries out.
    pub hardware_actions: ActionKinds,
    /// Actions that are carried out at all.
    pub actions: ActionKinds,
    /// Batch guarantees on offer.
    pub atomicity: BTreeSet<Atomicity>,
    /// Longest batch.
    pub batch_max: u32,
    /// Each operation of a batch gets a status of its own.
    pub per_operation_status: bool,
    /// Rules can age.
    pub idle_timeout: bool,
    /// What hardware cannot hold runs in software.
    pub software_fallback: bool,
}

/// Limits of [`crate::offload::NpOffload`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct OffloadCapabilities {
    /// Program slots.
    pub slots: u32,
    /// Largest program image in octets.
    pub max_image: u64,
    /// Tables that programs may declare.
    pub tables: u32,
    /// Entries over all tables.
    pub entries: u64,
    /// Established connections that the NP can carry.
    pub connections: u64,
    /// What it can do for a connection.
    pub connection_kinds: ConnectionKinds,
}

/// Limits of [`crate::transport::ShmTransport`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct TransportCapabilities {
    /// Channels at a time.
    pub channels: u32,
    /// Largest message in octets.
    pub max_message: u32,
    /// Largest ring per direction in octets.
    pub max_ring: u32,
    /// Message mode.
    pub messages: bool,
    /// Stream mode.
    pub streams: bool,
}

/// Limits of [`crate::port::Ports`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct PortCapabilities {
    /// Ports that can be open at a time.
    pub open: u32,
    /// Checksums can be left open for the card.
    pub checksum_offload: bool,
    /// TCP super-frames are cut by the card.
    pub tso: bool,
    /// UDP super-frames are cut by the card.
    pub uso: bool,
}

/// What the octets of a counter are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CounterUnit {
    /// Frame octets, Ethernet header included, FCS not.
    #[default]
    L2,
    /// IP packet octets (tc flower in hardware counts like this).
    L3,
}

bitflags! {
    /// Ways in which a field can be matched.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
    #[serde(transparent)]
    pub struct MatchKinds: u8 {
        /// The whole value.
        const EXACT = 0x01;
        /// Leading bits.
        const PREFIX = 0x02;
        /// Any bits.
        const MASK = 0x04;
        /// A range.
        const RANGE = 0x08;
    }
}

bitflags! {
    /// Kinds of [`crate::steering::Action`].
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
    #[serde(transparent)]
    pub struct ActionKinds: u32 {
        /// `Drop`.
        const DROP = 1;
        /// `Forward`.
        const FORWARD = 1 << 1;
        /// `Punt`.
        const PUNT = 1 << 2;
        /// `ToKernel`.
        const TO_KERNEL = 1 << 3;
        /// `Queue` and `Rss`.
        const QUEUE = 1 << 4;
        /// `Jump`.
        const JUMP = 1 << 5;
        /// `Encapsulate` and `Decapsulate` with VXLAN.
        const VXLAN = 1 << 6;
        /// `Encapsulate` and `Decapsulate` with Geneve.
        const GENEVE = 1 << 7;
        /// `Rewrite` of MAC addresses.
        const REWRITE_ETH = 1 << 8;
        /// `Rewrite` of IP addresses and ports (NAT).
        const REWRITE_IP = 1 << 9;
        /// `Rewrite` of the DSCP.
        const REWRITE_DSCP = 1 << 10;
        /// `DecrementTtl`.
        const TTL = 1 << 11;
        /// `PushVlan` and `PopVlan`.
        const VLAN = 1 << 12;
        /// `Mark`.
        const MARK = 1 << 13;
        /// `Count`.
        const COUNT = 1 << 14;
        /// `Mirror`.
        const MIRROR = 1 << 15;
        /// `Meter`.
        const METER = 1 << 16;
        /// `Conntrack`.
        const CONNTRACK = 1 << 17;
    }
}

bitflags! {
    /// Attributes of a VF that can be set.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
    #[serde(transparent)]
    pub struct VfAttributes: u16 {
        /// Administrative MAC.
        const MAC = 1;
        /// VLAN with QoS and protocol.
        const VLAN = 1 << 1;
        /// Trust.
        const TRUST = 1 << 2;
        /// Anti-spoofing.
        const SPOOF_CHECK = 1 << 3;
        /// Link state.
        const LINK_STATE = 1 << 4;
        /// Smallest transmit rate.
        const MIN_RATE = 1 << 5;
        /// Largest transmit rate.
        const MAX_RATE = 1 << 6;
        /// MTU.
        const MTU = 1 << 7;
    }
}

bitflags! {
    /// Kinds of [`crate::vf::Attachment`].
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
    #[serde(transparent)]
    pub struct AttachmentKinds: u8 {
        /// A network device in a namespace.
        const NETNS = 1;
        /// A VFIO device.
        const VFIO = 1 << 1;
        /// A vhost-user socket.
        const VHOST_USER = 1 << 2;
    }
}

bitflags! {
    /// [`crate::vf::ResetLevel`]s on offer.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
    #[serde(transparent)]
    pub struct ResetLevels: u8 {
        /// Attributes are restored.
        const CONFIG = 1;
        /// Function-level reset.
        const FUNCTION = 1 << 1;
        /// The whole device.
        const DEVICE = 1 << 2;
    }
}

bitflags! {
    /// What the NP can do for a connection.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
    #[serde(transparent)]
    pub struct ConnectionKinds: u8 {
        /// Established L4 splice.
        const SPLICE = 1;
        /// TLS record crypto.
        const TLS_RECORDS = 1 << 1;
        /// Header rewrite.
        const REWRITE = 1 << 2;
    }
}

bitflags! {
    /// Kinds of [`crate::event::Event`] beyond `Lost` and `Back`.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
    #[serde(transparent)]
    pub struct EventKinds: u8 {
        /// Link changes.
        const LINK = 1;
        /// Health changes.
        const HEALTH = 1 << 1;
        /// A resource passes its high-water mark.
        const HIGH_WATER = 1 << 2;
        /// Rules aged out.
        const AGED = 1 << 3;
        /// VFs came or went.
        const VF = 1 << 4;
    }
}

/// An ability that was required and is not there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{ability}: {required} required, {offered} offered")]
pub struct Missing {
    /// Path of the ability, as `steering.hardware_rules`.
    pub ability: &'static str,
    /// What was asked for.
    pub required: String,
    /// What there is.
    pub offered: String,
}

impl Capabilities {
    /// Compares with the least that a program needs; empty when all of it is there.
    ///
    /// Numbers must be at least as large, sets must contain the required ones; `mode`, `counter_unit` and
    /// `counter_age_ms` are not compared.
    pub fn missing(&self, required: &Self) -> Vec<Missing> {
        let mut missing = Vec::new();
        let mut number = |ability, offered: u64, required: u64| {
            if offered < required {
                let (required, offered) = (required.to_string(), offered.to_string());
                missing.push(Missing {
                    ability,
                    required,
                    offered,
                });
            }
        };
        let (have, need) = (self, required);
        number("vf.max_vfs", have.vf.max_vfs.into(), need.vf.max_vfs.into());
        number(
            "steering.hardware_rules",
            have.steering.hardware_rules,
            need.steering.hardware_rules,
        );
        number("steering.rules", have.steering.rules, need.steering.rules);
        number(
            "steering.groups",
            have.steering.groups.into(),
            need.steering.groups.into(),
        );
        number(
            "steering.priorities",
            have.steering.priorities.into(),
            need.steering.priorities.into(),
        );
        number(
            "steering.masks",
            have.steering.masks.into(),
            need.steering.masks.into(),
        );
        number(
            "steering.counters",
            have.steering.counters,
            need.steering.counters,
        );
        number(
            "steering.batch_max",
            have.steering.batch_max.into(),
            need.steering.batch_max.into(),
        );
        number(
            "offload.slots",
            have.offload.slots.into(),
            need.offload.slots.into(),
        );
        number(
            "offload.tables",
            have.offload.tables.into(),
            need.offload.tables.into(),
        );
        number("offload.entries", have.offload.entries, need.offload.entries);
        number(
            "offload.connections",
            have.offload.connections,
            need.offload.connections,
        );
        number(
            "transport.channels",
            have.transport.channels.into(),
            need.transport.channels.into(),
        );
        number(
            "transport.max_message",
            have.transport.max_message.into(),
            need.transport.max_message.into(),
        );
        number("ports.open", have.ports.open.into(), need.ports.open.into());
        let mut set = |ability, offered: u64, required: u64, names: &dyn Fn(u64) -> String| {
            if offered & required != required {
                missing.push(Missing {
                    ability,
                    required: names(required),
                    offered: names(offered),
                });
            }
        };
        let hex = |bits: u64| format!("{bits:#x}");
        set(
            "vf.attributes",
            have.vf.attributes.bits().into(),
            need.vf.attributes.bits().into(),
            &|bits| format!("{:?}", VfAttributes::from_bits_truncate(bits as u16)),
        );
        set(
            "vf.attachments",
            have.vf.attachments.bits().into(),
            need.vf.attachments.bits().into(),
            &hex,
        );
        set(
            "vf.resets",
            have.vf.resets.bits().into(),
            need.vf.resets.bits().into(),
            &hex,
        );
        set(
            "steering.actions",
            have.steering.actions.bits().into(),
            need.steering.actions.bits().into(),
            &|bits| format!("{:?}", ActionKinds::from_bits_truncate(bits as u32)),
        );
        set(
            "steering.hardware_actions",
            have.steering.hardware_actions.bits().into(),
            need.steering.hardware_actions.bits().into(),
            &|bits| format!("{:?}", ActionKinds::from_bits_truncate(bits as u32)),
        );
        set(
            "events",
            have.events.bits().into(),
            need.events.bits().into(),
            &hex,
        );
        for (field, kinds) in &need.steering.fields {
            let offered = have.steering.fields.get(field).copied().unwrap_or_default();
            set(
                field.path(),
                offered.bits().into(),
                kinds.bits().into(),
                &|bits| format!("{:?}", MatchKinds::from_bits_truncate(bits as u8)),
            );
        }
        missing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        let mut need = Capabilities::default();
        need.steering.rules = 10;
        need.steering.actions = ActionKinds::PUNT | ActionKinds::VXLAN;
        need.steering.fields.insert(Field::Ip4Dst, MatchKinds::PREFIX);
        let mut have = Capabilities::default();
        have.steering.rules = 8;
        have.steering.actions = ActionKinds::PUNT;
        have.steering.fields.insert(Field::Ip4Dst, MatchKinds::EXACT);
        let texts: Vec<String> = have.missing(&need).iter().map(ToString::to_string).collect();
        assert_eq!(texts[0], "steering.rules: 10 required, 8 offered");
        assert!(
            texts[1].starts_with("steering.actions: ActionKinds(PUNT | VXLAN) required"),
            "{}",
            texts[1]
        );
        assert!(texts[2].starts_with("pattern.ip_dst: "), "{}", texts[2]);
        assert!(need.missing(&need).is_empty());
    }
}
