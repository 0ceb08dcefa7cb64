//! The card as a whole: info, capabilities, events.

use dpumesh_core::steering::{Atomicity, Field};
use dpumesh_core::{
    ActionKinds, AttachmentKinds, BackendInfo, Capabilities, ConnectionKinds, CounterUnit, DpuId, Epoch,
    Event, EventKinds, MatchKinds, ResetLevels, Role, VfAttributes,
};

use super::{
    NO_PORT, get_counters, get_error, get_flag, get_mtu, get_owner, get_port, put_counters, put_error,
    put_owner, put_port, set,
};
use super::{get_cookie, put_cookie};
use crate::loader::abi::*;
use crate::loader::arena::{Arena, Broken, Reader, Sized32, terminate, terminated};
use crate::loader::codec::codes;

codes! { put_role, get_role, Role, u32,
    Role::Host => Role::Host, DM_ROLE_HOST;
    Role::Soc => Role::Soc, DM_ROLE_SOC;
    Role::Both => Role::Both, DM_ROLE_BOTH;
}

pub(crate) fn put_info(info: &BackendInfo) -> dm_info {
    let mut raw = dm_info::empty();
    raw.role = put_role(info.role);
    terminate(&mut raw.name, &info.name);
    terminate(&mut raw.version, &info.version);
    terminate(&mut raw.dpu, &info.dpu.0);
    terminate(&mut raw.device, &info.device);
    terminate(&mut raw.conformance, &info.conformance);
    raw
}

pub(crate) fn get_info(raw: &dm_info) -> Result<BackendInfo, Broken> {
    let name = terminated(&raw.name, "info.name")?;
    if name.is_empty() {
        return Err("info.name is empty".to_owned());
    }
    let dpu = terminated(&raw.dpu, "info.dpu")?;
    if dpu.is_empty() {
        return Err("info.dpu is empty".to_owned());
    }
    let version = terminated(&raw.version, "info.version")?;
    let mut info = BackendInfo::new(name, version, DpuId(dpu), get_role(raw.role, "info.role")?);
    info.device = terminated(&raw.device, "info.device")?;
    info.conformance = terminated(&raw.conformance, "info.conformance")?;
    Ok(info)
}

/// Fields in the order of their `DM_MATCH_*` numbers.
const FIELDS: [Field; 18] = [
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
    Field::CtState,
];

const ATOMICITY: [(Atomicity, u32); 3] = [
    (Atomicity::Continue, DM_CONTINUE),
    (Atomicity::Rollback, DM_ROLLBACK),
    (Atomicity::Atomic, DM_ATOMIC),
];

/// Capabilities without those of `transport`, which does not cross.
pub(crate) fn put_capabilities(have: &Capabilities) -> dm_capabilities {
    let mut raw = dm_capabilities::empty();
    terminate(&mut raw.mode, &have.mode);
    raw.events = have.events.bits().into();
    raw.max_vfs = have.vf.max_vfs.into();
    raw.vf_attributes = have.vf.attributes.bits().into();
    raw.vf_max_mtu = have.vf.max_mtu.map_or(0, |mtu| mtu.get().into());
    raw.vf_attachments = have.vf.attachments.bits().into();
    raw.vf_resets = have.vf.resets.bits().into();
    raw.vf_resizable = have.vf.resizable.into();
    let steering = &have.steering;
    raw.hardware_rules = steering.hardware_rules;
    raw.rules = steering.rules;
    raw.counters = steering.counters;
    raw.groups = steering.groups;
    raw.priorities = steering.priorities;
    raw.masks = steering.masks;
    raw.counter_unit = match steering.counter_unit {
        CounterUnit::L2 => DM_COUNTER_L2,
        CounterUnit::L3 => DM_COUNTER_L3,
    };
    raw.counter_age_ms = steering.counter_age_ms;
    raw.batch_max = steering.batch_max;
    for (atomicity, code) in ATOMICITY {
        raw.atomicity |= u32::from(steering.atomicity.contains(&atomicity)) << code;
    }
    raw.per_operation_status = steering.per_operation_status.into();
    raw.idle_timeout = steering.idle_timeout.into();
    raw.software_fallback = steering.software_fallback.into();
    raw.hardware_actions = steering.hardware_actions.bits();
    raw.actions = steering.actions.bits();
    for (index, field) in FIELDS.iter().enumerate() {
        let bits = |fields: &std::collections::BTreeMap<Field, MatchKinds>| {
            fields.get(field).map_or(0, |kinds| kinds.bits())
        };
        raw.hardware_fields[index] = bits(&steering.hardware_fields);
        raw.fields[index] = bits(&steering.fields);
    }
    raw.slots = have.offload.slots;
    raw.tables = have.offload.tables;
    raw.max_image = have.offload.max_image;
    raw.entries = have.offload.entries;
    raw.connections = have.offload.connections;
    raw.connection_kinds = have.offload.connection_kinds.bits().into();
    raw.open_ports = have.ports.open;
    raw.checksum_offload = have.ports.checksum_offload.into();
    raw.tso = have.ports.tso.into();
    raw.uso = have.ports.uso.into();
    raw
}

pub(crate) fn get_capabilities(raw: &dm_capabilities) -> Result<Capabilities, Broken> {
    let mut have = Capabilities::default();
    have.mode = terminated(&raw.mode, "capabilities.mode")?;
    have.events = flags(raw.events, EventKinds::from_bits, "capabilities.events")?;
    have.vf.max_vfs = super::small(raw.max_vfs, "capabilities.max_vfs")?;
    have.vf.attributes = flags(
        raw.vf_attributes,
        VfAttributes::from_bits,
        "capabilities.vf_attributes",
    )?;
    have.vf.max_mtu = match raw.vf_max_mtu {
        0 => None,
        mtu => Some(get_mtu(mtu, "capabilities.vf_max_mtu")?),
    };
    have.vf.attachments = flags(
        raw.vf_attachments,
        AttachmentKinds::from_bits,
        "capabilities.vf_attachments",
    )?;
    have.vf.resets = flags(raw.vf_resets, ResetLevels::from_bits, "capabilities.vf_resets")?;
    have.vf.resizable = get_flag(raw.vf_resizable, "capabilities.vf_resizable")?;
    get_steering(raw, &mut have)?;
    have.offload.slots = raw.slots;
    have.offload.tables = raw.tables;
    have.offload.max_image = raw.max_image;
    have.offload.entries = raw.entries;
    have.offload.connections = raw.connections;
    have.offload.connection_kinds = flags(
        raw.connection_kinds,
        ConnectionKinds::from_bits,
        "capabilities.connection_kinds",
    )?;
    have.ports.open = raw.open_ports;
    have.ports.checksum_offload = get_flag(raw.checksum_offload, "capabilities.checksum_offload")?;
    have.ports.tso = get_flag(raw.tso, "capabilities.tso")?;
    have.ports.uso = get_flag(raw.uso, "capabilities.uso")?;
    Ok(have)
}

fn get_steering(raw: &dm_capabilities, have: &mut Capabilities) -> Result<(), Broken> {
    let steering = &mut have.steering;
    steering.hardware_rules = raw.hardware_rules;
    steering.rules = raw.rules;
    steering.counters = raw.counters;
    steering.groups = raw.groups;
    steering.priorities = raw.priorities;
    steering.masks = raw.masks;
    steering.counter_unit = match raw.counter_unit {
        DM_COUNTER_L2 => CounterUnit::L2,
        DM_COUNTER_L3 => CounterUnit::L3,
        unit => {
            return Err(format!(
                "capabilities.counter_unit is {unit}, which means nothing"
            ));
        }
    };
    steering.counter_age_ms = raw.counter_age_ms;
    steering.batch_max = raw.batch_max;
    let known = ATOMICITY.iter().fold(0, |bits, (_, code)| bits | 1 << code);
    set(
        (raw.atomicity & !known == 0).then_some(()),
        raw.atomicity,
        "capabilities.atomicity",
    )?;
    steering.atomicity = ATOMICITY
        .iter()
        .filter(|(_, code)| raw.atomicity & 1 << code != 0)
        .map(|(atomicity, _)| *atomicity)
        .collect();
    steering.per_operation_status = get_flag(raw.per_operation_status, "capabilities.per_operation_status")?;
    steering.idle_timeout = get_flag(raw.idle_timeout, "capabilities.idle_timeout")?;
    steering.software_fallback = get_flag(raw.software_fallback, "capabilities.software_fallback")?;
    let actions = ActionKinds::from_bits(raw.hardware_actions);
    steering.hardware_actions = set(actions, raw.hardware_actions, "capabilities.hardware_actions")?;
    steering.actions = set(
        ActionKinds::from_bits(raw.actions),
        raw.actions,
        "capabilities.actions",
    )?;
    steering.hardware_fields = get_fields(&raw.hardware_fields, "capabilities.hardware_fields")?;
    steering.fields = get_fields(&raw.fields, "capabilities.fields")?;
    Ok(())
}

fn get_fields(raw: &[u8; 32], what: &str) -> Result<std::collections::BTreeMap<Field, MatchKinds>, Broken> {
    let mut fields = std::collections::BTreeMap::new();
    for (index, bits) in raw.iter().enumerate().filter(|(_, bits)| **bits != 0) {
        let kinds = MatchKinds::from_bits(*bits);
        let field = FIELDS
            .get(index)
            .ok_or_else(|| format!("{what}[{index}] is set, but there is no such field"))?;
        fields.insert(*field, set(kinds, (*bits).into(), what)?);
    }
    Ok(fields)
}

/// Flags of a narrower type; bits beyond it mean nothing.
fn flags<N: TryFrom<u32>, T>(raw: u32, of: impl Fn(N) -> Option<T>, what: &str) -> Result<T, Broken> {
    set(N::try_from(raw).ok().and_then(of), raw, what)
}

/// An event, with its error written to where the caller wants it; `None` for one that cannot be said.
pub(crate) fn put_event(event: &Event, error: *mut dm_error, arena: &mut Arena) -> Option<dm_event> {
    let mut raw = dm_event::empty();
    raw.port = NO_PORT;
    raw.error = error;
    match event {
        Event::Lost { epoch } => (raw.kind, raw.epoch) = (DM_EVENT_LOST, epoch.0),
        Event::Back { epoch } => (raw.kind, raw.epoch) = (DM_EVENT_BACK, epoch.0),
        Event::Link { port, up } => {
            (raw.kind, raw.port, raw.up) = (DM_EVENT_LINK, put_port(*port), (*up).into());
        }
        Event::Health(ailment) => {
            raw.kind = DM_EVENT_HEALTH;
            let told = ailment.as_ref().map_or_else(dm_error::empty, put_error);
            // SAFETY: null or the caller's struct, which tells its size.
            unsafe { crate::loader::arena::write_over(error, &told) };
        }
        Event::HighWater {
            resource,
            used,
            limit,
        } => {
            (raw.kind, raw.used, raw.limit) = (DM_EVENT_HIGH_WATER, *used, *limit);
            raw.resource = arena.text(resource);
        }
        Event::Aged { owner, rules } => {
            raw.kind = DM_EVENT_AGED;
            raw.owner = put_owner(*owner);
            let aged: Vec<dm_aged> = rules
                .iter()
                .map(|(cookie, counters)| {
                    let mut aged = dm_aged::empty();
                    aged.cookie = put_cookie(*cookie);
                    aged.has_counters = counters.is_some().into();
                    aged.counters = put_counters(counters.unwrap_or_default());
                    aged
                })
                .collect();
            raw.aged = arena.list(&aged);
        }
        Event::VfAdded(port) => (raw.kind, raw.port) = (DM_EVENT_VF_ADDED, put_port(*port)),
        Event::VfRemoved(port) => (raw.kind, raw.port) = (DM_EVENT_VF_REMOVED, put_port(*port)),
        Event::Overflowed(lost) => (raw.kind, raw.used) = (DM_EVENT_OVERFLOWED, *lost),
        _ => return None,
    }
    Some(raw)
}

pub(crate) fn get_event(
    raw: &dm_event,
    error: &dm_error,
    backend: &str,
    reader: &Reader,
) -> Result<Event, Broken> {
    let epoch = Epoch(raw.epoch);
    Ok(match raw.kind {
        DM_EVENT_LOST => Event::Lost { epoch },
        DM_EVENT_BACK => Event::Back { epoch },
        DM_EVENT_LINK => Event::Link {
            port: get_port(raw.port, "event.port")?,
            up: get_flag(raw.up, "event.up")?,
        },
        DM_EVENT_HEALTH if error.kind == 0 => Event::Health(None),
        DM_EVENT_HEALTH => Event::Health(Some(get_error(error, "backend.health", backend)?)),
        DM_EVENT_HIGH_WATER => Event::HighWater {
            resource: reader.text(raw.resource, "event.resource")?,
            used: raw.used,
            limit: raw.limit,
        },
        DM_EVENT_AGED => Event::Aged {
            owner: get_owner(raw.owner, "event.owner")?,
            rules: reader
                .list::<dm_aged>(raw.aged, "event.aged")?
                .iter()
                .map(|aged| {
                    let counted = get_flag(aged.has_counters, "event.aged.has_counters")?;
                    Ok((
                        get_cookie(aged.cookie),
                        counted.then(|| get_counters(aged.counters)),
                    ))
                })
                .collect::<Result<_, Broken>>()?,
        },
        DM_EVENT_VF_ADDED => Event::VfAdded(get_port(raw.port, "event.port")?),
        DM_EVENT_VF_REMOVED => Event::VfRemoved(get_port(raw.port, "event.port")?),
        DM_EVENT_OVERFLOWED => Event::Overflowed(raw.used),
        kind => return Err(format!("event.kind is {kind}, which means nothing")),
    })
}
