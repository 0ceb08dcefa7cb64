//! The abilities of processor and floor together.

use std::collections::BTreeMap;

use dpumesh_core::steering::{Atomicity, Field};
use dpumesh_core::{
    Backend, Capabilities, ConnectionKinds, CounterUnit, EventKinds, MatchKinds, OffloadCapabilities, Role,
    SteeringCapabilities,
};

use crate::entry::{hardware_actions, hardware_fields};
use crate::options::Mode;
use crate::steering::BATCH_MAX;
use crate::table::{self, Limits};

/// Abilities in a mode, on a floor.
pub(crate) fn of(limits: &Limits, mode: u32, floor: Option<&dyn Backend>, role: Role) -> Capabilities {
    let mut all = floor.map(Backend::capabilities).unwrap_or_default();
    all.mode = match (Mode::of_number(mode), all.mode.is_empty()) {
        (Some(mode), true) => mode.name().to_owned(),
        (Some(mode), false) => format!("{}, {}", mode.name(), all.mode),
        (None, _) => format!("mode {mode}"),
    };
    let below = floor.filter(|floor| floor.steering().is_some());
    let below = below.map(|floor| floor.capabilities().steering);
    all.steering = steering(limits, below.as_ref());
    all.offload = if role.is_soc() {
        offload(limits)
    } else {
        OffloadCapabilities::default()
    };
    if !role.is_soc() {
        all.steering = SteeringCapabilities::default();
    }
    all.events |= EventKinds::HIGH_WATER | EventKinds::HEALTH;
    if all.steering.idle_timeout {
        all.events |= EventKinds::AGED;
    }
    all
}

/// Rules: hardware has what the limits say, software has the rest.
fn steering(limits: &Limits, below: Option<&SteeringCapabilities>) -> SteeringCapabilities {
    let mut all = below.cloned().unwrap_or_default();
    let hardware = if limits.entries > 0 {
        hardware_fields(limits.fields)
    } else {
        BTreeMap::new()
    };
    all.fields = union(&all.fields, &hardware);
    all.hardware_fields = hardware;
    all.hardware_actions = if limits.entries > 0 {
        hardware_actions(limits)
    } else {
        dpumesh_core::ActionKinds::empty()
    };
    all.actions |= all.hardware_actions;
    all.hardware_rules = limits.entries;
    all.masks = limits.profiles;
    all.counters = limits.counters.into();
    all.counter_unit = CounterUnit::L2;
    all.counter_age_ms = all.counter_age_ms.max(limits.counter_age_ms);
    all.atomicity = [Atomicity::Continue, Atomicity::Rollback].into();
    all.batch_max = BATCH_MAX;
    all.per_operation_status = true;
    match below {
        Some(below) => {
            // Every rule is in software too.
            all.hardware_rules = all.hardware_rules.min(below.rules);
            all.idle_timeout = below.idle_timeout;
            all.software_fallback = true;
            if limits.entries == 0 {
                all.counters = below.counters;
            }
        }
        None => {
            all.rules = limits.entries;
            all.groups = limits.groups;
            all.priorities = limits.priorities;
            all.idle_timeout = limits.ageing != 0;
            all.software_fallback = false;
        }
    }
    all
}

fn union(
    one: &BTreeMap<Field, MatchKinds>,
    other: &BTreeMap<Field, MatchKinds>,
) -> BTreeMap<Field, MatchKinds> {
    let mut all = one.clone();
    for (field, kinds) in other {
        *all.entry(*field).or_default() |= *kinds;
    }
    all
}

fn offload(limits: &Limits) -> OffloadCapabilities {
    let mut all = OffloadCapabilities::default();
    all.slots = limits.slots;
    all.max_image = limits.max_image;
    all.tables = limits.program_tables;
    all.entries = limits.program_entries;
    all.connections = limits.connections;
    let kinds = [
        (table::CONNECTION_SPLICE, ConnectionKinds::SPLICE),
        (table::CONNECTION_TLS, ConnectionKinds::TLS_RECORDS),
        (table::CONNECTION_REWRITE, ConnectionKinds::REWRITE),
    ];
    for (bit, kind) in kinds {
        if limits.connection_kinds & bit != 0 && limits.connections > 0 {
            all.connection_kinds |= kind;
        }
    }
    all
}
