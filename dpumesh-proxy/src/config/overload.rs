//! `OverloadManager` of the bootstrap into [`crate::overload`]'s forms.

use std::sync::Arc;
use std::time::Duration;

use super::ConfigError;
use super::schema::At;
use crate::overload::{Action, Manager, Overload, Resource, Trigger};
use crate::stats::{self, Registry};

type Result<T> = std::result::Result<T, ConfigError>;

/// Reads it; `None` where there is none.
pub(super) fn manager(bootstrap: &At, registry: &Registry) -> Result<Option<Manager>> {
    let Some(at) = bootstrap.message("overload_manager") else {
        return Ok(None);
    };
    let (mut names, mut resources, mut most) = (Vec::new(), Vec::new(), None);
    for monitor in at.messages("resource_monitors") {
        let name = monitor.required_text("name")?;
        if names.contains(&name) {
            return Err(monitor.refuse("name", "appears twice"));
        }
        let Some(config) = monitor.any("typed_config")? else {
            return Err(monitor.refuse("typed_config", "must be given"));
        };
        let resource = match config.type_name().as_str() {
            "envoy.extensions.resource_monitors.fixed_heap.v3.FixedHeapConfig" => {
                Resource::Heap(positive(&config, "max_heap_size_bytes")?)
            }
            "envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig" => {
                let connections = positive(&config, "max_active_downstream_connections")?;
                most = Some(connections);
                Resource::Connections(connections)
            }
            other => return Err(config.refuse("", format!("{other} is not a monitor this proxy has"))),
        };
        resources.push((
            resource,
            registry.scope(&format!("overload.{name}"), stats::OverloadResource::TABLE),
        ));
        names.push(name);
    }
    let mut actions = Vec::new();
    for action in at.messages("actions") {
        let name = action.required_text("name")?;
        let kind = match name.strip_prefix("envoy.overload_actions.") {
            Some("stop_accepting_requests") => Action::StopAcceptingRequests,
            Some("disable_http_keepalive") => Action::DisableKeepalive,
            Some("stop_accepting_connections") => Action::StopAcceptingConnections,
            Some("shrink_heap") => Action::ShrinkHeap,
            _ => return Err(action.refuse("name", format!("{name} is not supported yet"))),
        };
        let triggers = action.messages("triggers");
        let triggers = triggers
            .iter()
            .map(|t| trigger(t, &names))
            .collect::<Result<Vec<_>>>()?;
        if triggers.is_empty() {
            return Err(action.refuse("triggers", "at least one must be given"));
        }
        let scope = registry.scope(&format!("overload.{name}"), stats::OverloadAction::TABLE);
        actions.push((kind, triggers, scope));
    }
    let interval = at.duration("refresh_interval")?.filter(|d| !d.is_zero());
    Ok(Some(Manager {
        interval: interval.unwrap_or(Duration::from_secs(1)),
        resources,
        actions,
        overload: Arc::new(Overload::bounded(most)),
        looked: None,
    }))
}

fn positive(at: &At, field: &str) -> Result<u64> {
    let value = at.message.get_field_by_name(field);
    let value = value.and_then(|v| {
        v.as_u64()
            .or_else(|| v.as_i64().and_then(|v| u64::try_from(v).ok()))
    });
    value
        .filter(|value| *value > 0)
        .ok_or_else(|| at.refuse(field, "must be greater than 0"))
}

fn trigger(at: &At, names: &[String]) -> Result<Trigger> {
    let name = at.required_text("name")?;
    let resource = names.iter().position(|known| *known == name);
    let resource =
        resource.ok_or_else(|| at.refuse("name", format!("there is no resource monitor {name:?}")))?;
    let part = |at: &At, field: &str| {
        let value = at
            .message
            .get_field_by_name(field)
            .and_then(|v| v.as_f64())
            .unwrap_or_default();
        if (0.0..=1.0).contains(&value) {
            Ok(value)
        } else {
            Err(at.refuse(field, "must be between 0 and 1"))
        }
    };
    let (from, to) = if let Some(threshold) = at.message("threshold") {
        let value = part(&threshold, "value")?;
        (value, value)
    } else if let Some(scaled) = at.message("scaled") {
        let (from, to) = (
            part(&scaled, "scaling_threshold")?,
            part(&scaled, "saturation_threshold")?,
        );
        if from >= to {
            return Err(scaled.refuse("scaling_threshold", "must be less than saturation_threshold"));
        }
        (from, to)
    } else {
        return Err(at.refuse("", "threshold or scaled must be given"));
    };
    Ok(Trigger { resource, from, to })
}
