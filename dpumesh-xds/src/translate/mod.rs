//! What istiod sends a sidecar, turned into our own types. Pure; wire types stop here.
//!
//! ```text
//! bytes ─► decode ─► walk: unknown fields, Istio's own filters, secrets, references ─► normalise ─► canonical bytes ─► ir
//! ```
//!
//! A resource is taken or refused as a whole; a refusal names the resource, the field path and the reason. Refused are bytes that are
//! not the message they claim to be, extension types nobody here knows, fields that a security filter or a transport socket
//! has and the schema has not, and what could not keep its meaning in a proxy shared by many pods. Other unknown fields are
//! carried on and reported as a [`Note`]. The filters that only Istio's build of Envoy has are in one table, [`istio::TABLE`].

mod canonical;
mod cluster;
pub mod istio;
mod listener;
mod reference;
mod walk;

use std::sync::Arc;

use prost_reflect::{DynamicMessage, Value};

pub use reference::{Renames, renamed};

use crate::discovery::ResourceType;
use crate::ir::{Assignment, Body, Cluster, Content, Identity, Listener, RouteConfig};
use crate::schema::{self, ConfigError};
use walk::Walk;

pub(crate) use canonical::encode;

/// The largest resource that is looked at, in octets.
pub const MAX_RESOURCE: usize = 16 << 20;

/// Something that was taken although not all of it is understood or kept.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Note {
    /// `listener "virtualInbound"`.
    pub resource: String,
    /// Field path.
    pub path: String,
    /// What was noticed.
    pub what: String,
}

/// A translated resource.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item {
    /// LDS.
    Listener(Arc<Listener>),
    /// RDS.
    Route(Arc<RouteConfig>),
    /// CDS.
    Cluster(Arc<Cluster>),
    /// EDS.
    Endpoints(Arc<Assignment>),
}

/// A translated resource and what was noticed on the way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Translated {
    /// The resource.
    pub item: Item,
    /// Fields without effect, stripped filters and the like.
    pub notes: Vec<Note>,
}

/// Translates the resource `name` of type `kind`, sent for a workload of `identity` as `type_url` and `bytes`.
///
/// # Errors
/// Names the resource, the field path and the reason. Nothing of a refused resource is used.
pub fn translate(
    kind: ResourceType,
    name: &str,
    type_url: &str,
    bytes: &[u8],
    identity: &Identity,
) -> Result<Translated, ConfigError> {
    let title = format!("{} \"{name}\"", kind.word());
    let mut walk = Walk::new(identity);
    let item =
        read(kind, name, type_url, bytes, &mut walk).map_err(|error| error.in_resource(title.clone()))?;
    let note = |(path, what)| Note {
        resource: title.clone(),
        path,
        what,
    };
    let mut notes: Vec<Note> = walk.notes.into_iter().map(note).collect();
    notes.sort();
    notes.dedup();
    Ok(Translated { item, notes })
}

fn read(
    kind: ResourceType,
    name: &str,
    type_url: &str,
    bytes: &[u8],
    walk: &mut Walk<'_>,
) -> Result<Item, ConfigError> {
    let whole = |reason: String| ConfigError::new("", reason);
    if type_url != kind.url() {
        return Err(whole(format!("is of type {type_url:?}, not {}", kind.url())));
    }
    if bytes.len() > MAX_RESOURCE {
        return Err(whole(format!(
            "has {} octets, more than {MAX_RESOURCE}",
            bytes.len()
        )));
    }
    let descriptor = schema::message(kind.message_name())
        .ok_or_else(|| whole(format!("{} resources are not translated", kind.word())))?;
    let mut message = DynamicMessage::decode(descriptor, bytes)
        .map_err(|error| whole(format!("not a valid {}: {error}", kind.message_name())))?;
    let name_field = if kind == ResourceType::Endpoints {
        "cluster_name"
    } else {
        "name"
    };
    let own_name = text(&message, name_field);
    if own_name != name {
        return Err(ConfigError::new(
            name_field,
            format!("is {own_name:?} in a resource called {name:?}"),
        ));
    }
    match kind {
        ResourceType::Listener => {
            let read = listener::read(name, message, walk)?;
            Ok(Item::Listener(Arc::new(read)))
        }
        ResourceType::Cluster => Ok(Item::Cluster(Arc::new(cluster::read(name, message, walk)?))),
        ResourceType::Route => {
            message.clear_field_by_name("name");
            let content = walk.content(&mut message, "envoy.config.route.v3.RouteConfiguration", "")?;
            Ok(Item::Route(Arc::new(RouteConfig {
                name: name.to_owned(),
                content,
            })))
        }
        ResourceType::Endpoints => {
            message.clear_field_by_name("cluster_name");
            let content = walk.content(&mut message, "envoy.config.endpoint.v3.ClusterLoadAssignment", "")?;
            Ok(Item::Endpoints(Arc::new(Assignment {
                name: name.to_owned(),
                content,
            })))
        }
        other => Err(whole(format!("{} resources are not translated", other.word()))),
    }
}

/// The text of a field, empty when unset.
fn text(message: &DynamicMessage, field: &str) -> String {
    message
        .get_field_by_name(field)
        .and_then(|value| value.as_str().map(str::to_owned))
        .unwrap_or_default()
}

/// A body's message, as a fresh one to change.
///
/// # Panics
/// Never: a [`Body`] is made of an encoded message of its type.
pub(crate) fn open(body: &Body) -> DynamicMessage {
    let descriptor = schema::message(body.type_name).expect("a body's type comes from the schema");
    DynamicMessage::decode(descriptor, &*body.bytes)
        .expect("a body's bytes were encoded from a message of its type")
}

/// The content of a message whose references are known already.
fn sealed(message: &DynamicMessage, type_name: &'static str, references: crate::ir::References) -> Content {
    Content {
        body: Body::new(type_name, encode(message)),
        references: Arc::new(references),
    }
}

/// A message written as JSON in this program, not by somebody else.
fn written(type_name: &str, json: &serde_json::Value) -> DynamicMessage {
    schema::value_to_message(type_name, json, "")
        .expect("JSON written here follows the schema, which a test reads")
}

/// An `Any` around a message.
pub(crate) fn pack(message: &DynamicMessage) -> Value {
    use prost_reflect::ReflectMessage as _;
    let mut any =
        DynamicMessage::new(schema::message("google.protobuf.Any").expect("part of every descriptor set"));
    let url = format!("type.googleapis.com/{}", message.descriptor().full_name());
    any.set_field_by_name("type_url", Value::String(url));
    any.set_field_by_name("value", Value::Bytes(encode(message).into()));
    Value::Message(any)
}

#[cfg(test)]
mod tests;
