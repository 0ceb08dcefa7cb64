//! [`Dump`]: the resources in force as they were read, for `/config_dump`. They become JSON when somebody asks: a mesh has thousands, and most
//! updates are never looked at.

use std::sync::Arc;
use std::time::SystemTime;

use serde_json::Value;

use super::resource::{Item, filters};
use super::schema::At;

/// A listener or cluster, and whether it came by a file or a stream of its own.
#[derive(Debug)]
pub(super) struct Placed {
    pub(super) item: Arc<Item>,
    pub(super) dynamic: bool,
}

/// The resources of one configuration. Private keys are left out of all that is shown.
#[derive(Debug)]
pub struct Dump {
    pub(super) bootstrap: Arc<At>,
    pub(super) listeners: Vec<Placed>,
    pub(super) clusters: Vec<Placed>,
    pub(super) routes: Vec<Arc<Item>>,
    pub(super) endpoints: Vec<Arc<Item>>,
}

/// A resource as it is shown.
#[derive(Debug, Clone)]
pub struct Shown {
    /// Empty for what stands in the bootstrap.
    pub version: String,
    /// When it came.
    pub updated: SystemTime,
    /// Itself.
    pub value: Value,
}

impl Dump {
    pub(super) fn new(bootstrap: Arc<At>) -> Self {
        Self {
            bootstrap,
            listeners: Vec::new(),
            clusters: Vec::new(),
            routes: Vec::new(),
            endpoints: Vec::new(),
        }
    }

    /// The bootstrap.
    pub fn bootstrap(&self) -> Value {
        json(&self.bootstrap)
    }

    /// Listeners of the bootstrap.
    pub fn static_listeners(&self) -> Vec<Shown> {
        fixed(&self.listeners)
    }

    /// Listeners from LDS, with their versions.
    pub fn dynamic_listeners(&self) -> Vec<Shown> {
        moving(&self.listeners)
    }

    /// Clusters of the bootstrap.
    pub fn static_clusters(&self) -> Vec<Shown> {
        fixed(&self.clusters)
    }

    /// Clusters from CDS, with their versions.
    pub fn dynamic_clusters(&self) -> Vec<Shown> {
        moving(&self.clusters)
    }

    /// Route configurations that stand in listeners.
    pub fn static_routes(&self) -> Vec<Shown> {
        let mut all = Vec::new();
        for placed in &self.listeners {
            let filters = filters(&placed.item.at);
            let inline = filters.filter_map(|filter| filter.ok().flatten()?.message("route_config"));
            all.extend(inline.map(|routes| Shown {
                value: json(&routes),
                ..shown(&placed.item)
            }));
        }
        all
    }

    /// Route configurations from RDS, with their versions.
    pub fn dynamic_routes(&self) -> Vec<Shown> {
        self.routes.iter().map(|item| shown(item)).collect()
    }

    /// Endpoint assignments from EDS, with their versions.
    pub fn endpoints(&self) -> Vec<Shown> {
        self.endpoints.iter().map(|item| shown(item)).collect()
    }

    /// Endpoint assignments that stand in clusters of the bootstrap.
    pub fn static_endpoints(&self) -> Vec<Shown> {
        let fixed = self.clusters.iter().filter(|placed| !placed.dynamic);
        let inline = fixed.filter_map(|placed| {
            let assignment = placed.item.at.message("load_assignment")?;
            Some(Shown {
                value: json(&assignment),
                ..shown(&placed.item)
            })
        });
        inline.collect()
    }
}

fn fixed(placed: &[Placed]) -> Vec<Shown> {
    let fixed = placed.iter().filter(|placed| !placed.dynamic);
    fixed.map(|placed| shown(&placed.item)).collect()
}

fn moving(placed: &[Placed]) -> Vec<Shown> {
    let moving = placed.iter().filter(|placed| placed.dynamic);
    moving.map(|placed| shown(&placed.item)).collect()
}

fn shown(item: &Item) -> Shown {
    Shown {
        version: item.version.clone(),
        updated: item.updated,
        value: json(&item.at),
    }
}

fn json(at: &At) -> Value {
    let options = prost_reflect::SerializeOptions::new().use_proto_field_name(true);
    let value = at
        .message
        .serialize_with_options(serde_json::value::Serializer, &options);
    let mut value = value.unwrap_or_default();
    redact(&mut value);
    value
}

/// Takes private keys out of what is shown; the names of their files stay.
fn redact(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                if name == "private_key" && value.get("filename").is_none() {
                    *value = serde_json::json!({"inline_string": "[redacted]"});
                } else {
                    redact(value);
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(redact),
        _ => {}
    }
}
