//! STRICT_DNS and LOGICAL_DNS clusters: what there is to look up, and the assignment that the answers make.
//!
//! The answers stand in an endpoint assignment of its own, with addresses where the cluster's has names; from there on such a cluster is
//! as one by EDS. `dns` asks.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use prost_reflect::{DynamicMessage, Value};

use super::ConfigError;
use super::resource::Item;
use super::schema::At;
use crate::stats::{self, Registry, Scope};

type Result<T> = std::result::Result<T, ConfigError>;

/// Stands for the answers among the files that assignments come from.
pub(super) const DNS: &str = "DNS";

/// `dns_refresh_rate` where there is none.
const REFRESH: Duration = Duration::from_secs(5);

/// Which addresses count (`dns_lookup_family`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// IPv6 ones, or IPv4 where there are none.
    Auto,
    /// IPv4.
    V4,
    /// IPv6.
    V6,
    /// IPv4 ones, or IPv6 where there are none.
    V4Preferred,
    /// All.
    All,
}

impl Family {
    /// Those of `found` that count, in order, each once.
    pub fn choose(self, found: impl IntoIterator<Item = IpAddr>) -> Vec<IpAddr> {
        let mut all = Vec::new();
        for address in found {
            if !all.contains(&address) {
                all.push(address);
            }
        }
        let (v4, v6): (Vec<IpAddr>, Vec<IpAddr>) = all.iter().partition(|a| a.is_ipv4());
        match self {
            Self::V4 => v4,
            Self::V6 => v6,
            Self::Auto => {
                if v6.is_empty() {
                    v4
                } else {
                    v6
                }
            }
            Self::V4Preferred => {
                if v4.is_empty() {
                    v6
                } else {
                    v4
                }
            }
            Self::All => all,
        }
    }
}

/// A cluster's names.
#[derive(Debug)]
pub struct Lookup {
    /// The cluster.
    pub cluster: String,
    /// What is looked up, each once.
    pub names: Vec<String>,
    /// Which addresses count.
    pub family: Family,
    /// How long after an answer they are looked up again.
    pub refresh: Duration,
    /// How long after a failure.
    pub after_failure: Duration,
    /// At most so much is added to either.
    pub jitter: Duration,
    /// The first address of the only name is the only endpoint.
    pub logical: bool,
    /// `cluster.NAME.*`
    pub stats: Arc<Scope>,
    item: Arc<Item>,
}

/// A cluster's endpoints as they were last found.
#[derive(Debug, Clone)]
pub struct Resolved {
    pub(super) of: Arc<Item>,
    pub(super) assignment: Arc<Item>,
}

impl Resolved {
    /// Whether it is what was found for this cluster's names as they are now, whatever else of it is another.
    pub(super) fn is_of(&self, cluster: &Arc<Item>) -> bool {
        let asks = |at: &At| {
            ["type", "dns_lookup_family", "load_assignment"]
                .map(|f| at.message.get_field_by_name(f).map(|v| v.into_owned()))
        };
        Arc::ptr_eq(&self.of, cluster) || asks(&self.of.at) == asks(&cluster.at)
    }
}

/// Whether the cluster is one of these.
pub(super) fn is_dns(cluster: &At) -> bool {
    matches!(cluster.choice("type").as_str(), "STRICT_DNS" | "LOGICAL_DNS")
}

/// What is to be looked up for a cluster; `None` for one of another type.
pub(super) fn lookup(item: &Arc<Item>, registry: &Registry) -> Result<Option<Arc<Lookup>>> {
    let at = &item.at;
    if !is_dns(at) {
        return Ok(None);
    }
    let logical = at.choice("type") == "LOGICAL_DNS";
    let Some(assignment) = at.message("load_assignment") else {
        return Err(at.refuse("load_assignment", "must be given: it has the names"));
    };
    let mut names = Vec::new();
    let mut count = 0;
    for socket in sockets(&assignment)? {
        let name = socket.required_text("address")?;
        if name.len() > 253
            || !name
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"-_.:".contains(&b))
        {
            return Err(socket.refuse("address", "must be a host name or an address"));
        }
        if socket.number_or("port_value", 0) > 0xffff {
            return Err(socket.refuse("port_value", "must be at most 65535"));
        }
        count += 1;
        if !names.contains(&name) {
            names.push(name);
        }
    }
    if logical && count != 1 {
        return Err(assignment.refuse("endpoints", "must be exactly one for a LOGICAL_DNS cluster"));
    }
    let resolver = at.message("typed_dns_resolver_config");
    if let Some(config) = resolver.map(|r| r.any("typed_config")).transpose()?.flatten()
        && !config.messages("resolvers").is_empty()
    {
        return Err(config.refuse("resolvers", "only the system's are asked yet"));
    }
    let duration = |at: &At, field: &str| at.duration(field).map(|d| d.filter(|d| !d.is_zero()));
    let mut refresh = duration(at, "dns_refresh_rate")?.unwrap_or(REFRESH);
    let after_failure = match at.message("dns_failure_refresh_rate") {
        Some(rate) => duration(&rate, "base_interval")?,
        None => None,
    };
    let after_failure = after_failure.unwrap_or(refresh);
    if at.flag("respect_dns_ttl") == Some(true) {
        // The system's resolver tells no lifetimes: names are looked up as often as short ones ask for.
        refresh = refresh.min(REFRESH);
    }
    let name = Some(at.text("alt_stat_name")).filter(|n| !n.is_empty());
    let scope = format!("cluster.{}", name.unwrap_or_else(|| at.text("name")));
    Ok(Some(Arc::new(Lookup {
        cluster: at.text("name"),
        names,
        family: match at.choice("dns_lookup_family").as_str() {
            "V4_ONLY" => Family::V4,
            "V6_ONLY" => Family::V6,
            "V4_PREFERRED" => Family::V4Preferred,
            "ALL" => Family::All,
            _ => Family::Auto,
        },
        refresh,
        after_failure,
        jitter: at.duration("dns_jitter")?.unwrap_or_default(),
        logical,
        stats: registry.scope(&scope, stats::Cluster::TABLE),
        item: Arc::clone(item),
    })))
}

/// The socket addresses of an assignment.
fn sockets(assignment: &At) -> Result<Vec<At>> {
    let mut all = Vec::new();
    for locality in assignment.messages("endpoints") {
        for entry in locality.messages("lb_endpoints") {
            let endpoint = entry.message("endpoint");
            let address = endpoint.and_then(|e| e.message("address"));
            let socket = address.and_then(|a| a.message("socket_address"));
            let socket =
                socket.ok_or_else(|| entry.refuse("endpoint.address.socket_address", "must be given"))?;
            if socket.choice("protocol") != "TCP" {
                return Err(socket.refuse("protocol", "only TCP is supported yet"));
            }
            all.push(socket);
        }
    }
    Ok(all)
}

impl Lookup {
    /// Whether it asks the same as another one.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.item, &other.item) || self.item.at.message == other.item.at.message
    }

    /// The cluster's assignment with the addresses of its names (those of [`Self::names`], in order) in their place.
    pub fn resolved(&self, found: &[Vec<IpAddr>]) -> Resolved {
        let assignment = self.item.at.message("load_assignment");
        let path = assignment.as_ref().map_or("", |a| a.path.as_str()).to_owned();
        let message = assignment.map(|a| self.expanded(&a.message, found));
        let at = message.map_or_else(|| self.item.at.clone(), |message| At::new(message, path));
        Resolved {
            of: Arc::clone(&self.item),
            assignment: Arc::new(Item::new(at, String::new())),
        }
    }

    fn expanded(&self, assignment: &DynamicMessage, found: &[Vec<IpAddr>]) -> DynamicMessage {
        each(assignment, "endpoints", &|locality| {
            vec![each(locality, "lb_endpoints", &|entry| {
                let name = name(entry).unwrap_or_default();
                let index = self.names.iter().position(|known| *known == name);
                let addresses = index.and_then(|index| found.get(index));
                let most = if self.logical { 1 } else { usize::MAX };
                let addresses = addresses.into_iter().flatten().take(most);
                addresses.map(|ip| placed(entry, &name, *ip)).collect()
            })]
        })
    }
}

/// A message with each item of a list replaced by what `change` makes of it.
fn each(
    message: &DynamicMessage,
    field: &str,
    change: &dyn Fn(&DynamicMessage) -> Vec<DynamicMessage>,
) -> DynamicMessage {
    let mut message = message.clone();
    let list = message.get_field_by_name(field).map(|list| list.into_owned());
    if let Some(Value::List(list)) = list {
        let items = list.iter().filter_map(Value::as_message);
        let items = items.flat_map(change).map(Value::Message).collect();
        message.set_field_by_name(field, Value::List(items));
    }
    message
}

/// The name of an `LbEndpoint`.
fn name(entry: &DynamicMessage) -> Option<String> {
    let mut message = entry.clone();
    for field in ["endpoint", "address", "socket_address"] {
        message = message.get_field_by_name(field)?.as_message()?.clone();
    }
    Some(message.get_field_by_name("address")?.as_str()?.to_owned())
}

/// An `LbEndpoint` with an address for its name, which it keeps as its host name where it has none.
fn placed(entry: &DynamicMessage, name: &str, ip: IpAddr) -> DynamicMessage {
    changed(entry, "endpoint", |endpoint| {
        let unnamed = endpoint.get_field_by_name("hostname");
        if unnamed.is_some_and(|n| n.as_str() == Some("")) {
            endpoint.set_field_by_name("hostname", Value::String(name.to_owned()));
        }
        *endpoint = changed(endpoint, "address", |address| {
            *address = changed(address, "socket_address", |socket| {
                socket.set_field_by_name("address", Value::String(ip.to_string()));
            });
        });
    })
}

/// A message with a change to one of its messages.
fn changed(
    message: &DynamicMessage,
    field: &str,
    change: impl FnOnce(&mut DynamicMessage),
) -> DynamicMessage {
    let mut message = message.clone();
    let inner = message.get_field_by_name(field).map(|value| value.into_owned());
    if let Some(Value::Message(mut inner)) = inner {
        change(&mut inner);
        message.set_field_by_name(field, Value::Message(inner));
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_family_chooses() {
        let found: Vec<IpAddr> = ["127.0.0.1", "::1", "127.0.0.2", "127.0.0.1"]
            .map(|a| a.parse().unwrap())
            .into();
        let chosen = |family: Family, found: &[IpAddr]| {
            let chosen = family.choose(found.iter().copied());
            chosen
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
                .join(" ")
        };
        for (family, both, only_v4) in [
            (Family::Auto, "::1", "127.0.0.1"),
            (Family::V4, "127.0.0.1 127.0.0.2", "127.0.0.1"),
            (Family::V6, "::1", ""),
            (Family::V4Preferred, "127.0.0.1 127.0.0.2", "127.0.0.1"),
            (Family::All, "127.0.0.1 ::1 127.0.0.2", "127.0.0.1"),
        ] {
            assert_eq!(chosen(family, &found), both, "{family:?}");
            assert_eq!(chosen(family, &found[..1]), only_v4, "{family:?}");
        }
    }
}
