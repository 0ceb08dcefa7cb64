//! [`Dump`]: the resources in force as they were read, for `/config_dump`. They become JSON when somebody asks: a mesh has thousands, and most
//! updates are never looked at.

use std::sync::Arc;

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
    pub fn static_listeners(&self) -> Vec<Value> {
        fixed(&self.listeners)
    }

    /// Listeners from LDS, with their versions.
    pub fn dynamic_listeners(&self) -> Vec<(String, Value)> {
        moving(&self.listeners)
    }

    /// Clusters of the bootstrap.
    pub fn static_clusters(&self) -> Vec<Value> {
        fixed(&self.clusters)
    }

    /// Clusters from CDS, with their versions.
    pub fn dynamic_clusters(&self) -> Vec<(String, Value)> {
        moving(&self.clusters)
    }

    /// Route configurations that stand in listeners.
    pub fn static_routes(&self) -> Vec<Value> {
        let filters = self.listeners.iter().flat_map(|placed| filters(&placed.item.at));
        let inline = filters.filter_map(|filter| filter.ok().flatten()?.message("route_config"));
        inline.map(|routes| json(&routes)).collect()
    }

    /// Route configurations from RDS, with their versions.
    pub fn dynamic_routes(&self) -> Vec<(String, Value)> {
        self.routes.iter().map(|item| versioned(item)).collect()
    }

    /// Endpoint assignments from EDS, with their versions.
    pub fn endpoints(&self) -> Vec<(String, Value)> {
        self.endpoints.iter().map(|item| versioned(item)).collect()
    }
}

fn fixed(placed: &[Placed]) -> Vec<Value> {
    let fixed = placed.iter().filter(|placed| !placed.dynamic);
    fixed.map(|placed| json(&placed.item.at)).collect()
}

fn moving(placed: &[Placed]) -> Vec<(String, Value)> {
    let moving = placed.iter().filter(|placed| placed.dynamic);
    moving.map(|placed| versioned(&placed.item)).collect()
}

fn versioned(item: &Item) -> (String, Value) {
    (item.version.clone(), json(&item.at))
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
