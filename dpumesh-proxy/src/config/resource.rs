//! [`Item`]: a resource as it was read, and what it needs of others. It never changes, so what was found out about it once stays true.

use std::sync::OnceLock;
use std::time::SystemTime;

use super::ConfigError;
use super::schema::At;
use super::translate::{Result, WatchedFile, source_file};

/// A resource with its version.
#[derive(Debug)]
pub(super) struct Item {
    pub(super) at: At,
    /// Empty for what stands in the bootstrap.
    pub(super) version: String,
    /// When it came.
    pub(super) updated: SystemTime,
    routes: OnceLock<Result<Vec<RouteUse>>>,
}

/// A route configuration that a listener has by RDS.
#[derive(Debug, Clone)]
pub(super) struct RouteUse {
    /// Where from.
    pub(super) file: WatchedFile,
    /// Which.
    pub(super) name: String,
    /// Of the filter that asks.
    pub(super) stat_prefix: String,
}

/// An endpoint assignment that a cluster has by EDS.
#[derive(Debug, Clone)]
pub(super) struct EndpointsUse {
    /// Where from.
    pub(super) file: WatchedFile,
    /// Which.
    pub(super) name: String,
}

impl Item {
    pub(super) fn new(at: At, version: String) -> Self {
        Self {
            at,
            version,
            updated: SystemTime::now(),
            routes: OnceLock::new(),
        }
    }

    /// The route configurations that this listener has by RDS.
    pub(super) fn routes(&self) -> std::result::Result<&[RouteUse], ConfigError> {
        let found = self.routes.get_or_init(|| route_uses(&self.at));
        found.as_deref().map_err(ConfigError::clone)
    }

    /// The endpoint assignment that this cluster has by EDS.
    pub(super) fn endpoints(&self) -> Result<Option<EndpointsUse>> {
        let Some(eds) = self.at.message("eds_cluster_config") else {
            return Ok(None);
        };
        let Some(source) = eds.message("eds_config") else {
            return Ok(None);
        };
        let name = Some(eds.text("service_name")).filter(|name| !name.is_empty());
        Ok(Some(EndpointsUse {
            file: source_file(&source)?,
            name: name.unwrap_or_else(|| self.at.text("name")),
        }))
    }
}

fn route_uses(listener: &At) -> Result<Vec<RouteUse>> {
    let mut uses = Vec::new();
    for filter in filters(listener) {
        let Some(filter) = filter? else {
            continue;
        };
        let Some(rds) = filter.message("rds") else {
            continue;
        };
        let Some(source) = rds.message("config_source") else {
            continue;
        };
        uses.push(RouteUse {
            file: source_file(&source)?,
            name: rds.text("route_config_name"),
            stat_prefix: filter.text("stat_prefix"),
        });
    }
    Ok(uses)
}

/// The configurations of a listener's filters.
pub(super) fn filters(listener: &At) -> impl Iterator<Item = Result<Option<At>>> + use<> {
    let chains = listener
        .messages("filter_chains")
        .into_iter()
        .chain(listener.message("default_filter_chain"));
    let filters = chains.flat_map(|chain| chain.messages("filters"));
    filters.map(|filter| filter.any("typed_config"))
}
