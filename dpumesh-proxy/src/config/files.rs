//! The bootstrap and its xDS files as one unit: read, compiled together, replaced together.
//!
//! Each file's last good content is kept. [`Files::reload`] looks at what changed on disk (by looking: symlinks are
//! followed, so that a swapped folder of a `watched_directory` shows as well as a replaced file), tries the new contents,
//! and gives a new [`Config`] on only when all of it compiles; a content that was refused is remembered so that it is
//! reported once, and the last good one goes on serving.

use std::cell::RefCell;
use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use dpumesh_xds::client::{Applied, Update};

use super::ConfigError;
use super::ads::{self, AdsResources};
use super::dns::{self, Resolved};
use super::dump::{Dump, Placed};
use super::made::Made;
use super::model::{Config, Node, Subscriptions};
use super::overload;
use super::resource::{EndpointsUse, Item, RouteUse};
use super::schema::{At, unpack_any, value_to_message};
use super::support;
use super::text::text_to_value;
use super::translate::{ADS, Context, WatchedFile, socket_address, source_file};
use super::translate_tls::StaticSecrets;
use crate::access_log::Sinks;
use crate::overload::Manager;
use crate::stats::{self, Registry, Shard, Subscription};

type Result<T> = std::result::Result<T, ConfigError>;

/// What a file is read for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Service {
    Lds,
    Cds,
    Rds,
    Eds,
}

/// What resources of one type are called.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kind {
    /// The message's name.
    pub(super) resource: &'static str,
    pub(super) noun: &'static str,
    pub(super) name_field: &'static str,
}

const fn kind(resource: &'static str, noun: &'static str) -> Kind {
    Kind {
        resource,
        noun,
        name_field: "name",
    }
}

/// Of a file that secrets come from.
pub(super) const SECRETS: Kind = kind("envoy.extensions.transport_sockets.tls.v3.Secret", "secret");

impl Service {
    pub(super) fn kind(self) -> Kind {
        match self {
            Self::Lds => kind("envoy.config.listener.v3.Listener", "listener"),
            Self::Cds => kind("envoy.config.cluster.v3.Cluster", "cluster"),
            Self::Rds => kind("envoy.config.route.v3.RouteConfiguration", "route configuration"),
            Self::Eds => Kind {
                name_field: "cluster_name",
                ..kind(
                    "envoy.config.endpoint.v3.ClusterLoadAssignment",
                    "endpoint assignment",
                )
            },
        }
    }
}

/// The content of an xDS file.
#[derive(Debug, Clone)]
pub(super) struct Resources {
    pub(super) items: Vec<Arc<Item>>,
}

/// What tells one state of a file on disk from another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stamp {
    modified: Option<SystemTime>,
    length: u64,
    inode: u64,
}

impl Stamp {
    /// Another one says that the file was replaced and not written in place.
    pub(super) fn inode(&self) -> u64 {
        self.inode
    }
}

#[derive(Debug)]
struct Known {
    stamp: Option<Stamp>,
    /// A state seen once that is still to settle: a file written in place is read when two looks agree.
    settling: Option<Stamp>,
    good: Resources,
}

/// The bootstrap, and the resources that stand in it.
#[derive(Debug)]
struct Bootstrap {
    at: Arc<At>,
    listeners: Vec<Arc<Item>>,
    clusters: Vec<Arc<Item>>,
}

impl Bootstrap {
    fn new(at: At) -> Self {
        let fixed = at.message("static_resources");
        let items = |field: &str| {
            let listed = fixed.iter().flat_map(|fixed| fixed.messages(field));
            listed.map(|at| Arc::new(Item::new(at, String::new()))).collect()
        };
        Self {
            listeners: items("listeners"),
            clusters: items("clusters"),
            at: Arc::new(at),
        }
    }
}

/// A bootstrap and its files.
#[derive(Debug)]
pub struct Files {
    bootstrap: Bootstrap,
    made: Made,
    known: BTreeMap<(Service, String), Known>,
    pub(super) ads: AdsResources,
    /// What the names of clusters were last found to be.
    resolved: HashMap<String, Resolved>,
    generation: u64,
}

impl Files {
    /// Reads the bootstrap file; the xDS files are read by [`Self::load`].
    ///
    /// # Errors
    /// The file cannot be read, is not a bootstrap, or sets something this proxy does not implement.
    pub fn open(path: &Path) -> Result<Self> {
        let text =
            std::fs::read_to_string(path).map_err(|e| ConfigError::new("", e.to_string()).in_file(path))?;
        Self::parse(path, &text).map_err(|e| e.in_file(path))
    }

    /// Like [`Self::open`], from text already read; `path` names it and tells JSON from YAML.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn parse(path: &Path, text: &str) -> Result<Self> {
        let value = text_to_value(path, text)?;
        let message = value_to_message("envoy.config.bootstrap.v3.Bootstrap", &value, "")?;
        support::check(&message, "")?;
        Ok(Self {
            bootstrap: Bootstrap::new(At::new(message, "")),
            made: Made::default(),
            known: BTreeMap::new(),
            ads: AdsResources::default(),
            resolved: HashMap::new(),
            generation: 0,
        })
    }

    /// Where the admin server is to listen.
    ///
    /// # Errors
    /// The address is none.
    pub fn admin(&self) -> Result<Option<std::net::SocketAddr>> {
        let address = self
            .bootstrap
            .at
            .message("admin")
            .and_then(|a| a.message("address"));
        address.map(|a| socket_address(&a)).transpose()
    }

    /// Compiles everything for the first time.
    ///
    /// # Errors
    /// The first thing refused, in whichever file.
    pub fn load(&mut self, registry: &Registry, sinks: &Sinks) -> Result<Config> {
        ads::server(&self.bootstrap.at)?;
        overload::manager(&self.bootstrap.at, registry)?;
        let mut fresh = HashMap::new();
        let mut read = |service: Service, file: &WatchedFile| {
            let key = (service, file.path.clone());
            if let Some((_, resources)) = fresh.get(&key) {
                return Ok(Resources::clone(resources));
            }
            let stamp = stamp(&file.path);
            let resources = read_file(service.kind(), &file.path)?;
            fresh.insert(key, (stamp, resources.clone()));
            Ok(resources)
        };
        let (config, made) = compile(
            &self.bootstrap,
            &self.made,
            self.generation + 1,
            registry,
            sinks,
            (&self.ads, &self.resolved),
            &mut read,
        )?;
        for (key, (stamp, resources)) in fresh {
            count(registry, &config, key.0, &key.1, true);
            self.known.insert(
                key,
                Known {
                    stamp,
                    settling: None,
                    good: resources,
                },
            );
        }
        self.made = made;
        self.generation += 1;
        Ok(config)
    }

    /// Looks at the files. A changed configuration is given to `accept`; where that (or reading, or compiling) refuses,
    /// the last good one stays. `tell` hears of each changed file, once per content, that it is in force or why not.
    /// True when something was accepted.
    pub fn reload(
        &mut self,
        registry: &Registry,
        sinks: &Sinks,
        current: &Config,
        accept: &mut dyn FnMut(Config) -> Result<()>,
        tell: &mut dyn FnMut(&str, Result<()>),
    ) -> bool {
        let changed = self.changed();
        // All changes together first; if that is refused, one by one, so that one bad file holds up no other.
        let several = changed.len() > 1;
        if changed.is_empty() {
            return false;
        }
        if several && self.try_files(&changed, registry, sinks, accept).is_ok() {
            for (service, path) in &changed {
                count(registry, current, *service, path, true);
                tell(path, Ok(()));
            }
            return true;
        }
        let mut any = false;
        for (service, path) in changed {
            let tried = self.try_files(&[(service, path.clone())], registry, sinks, accept);
            count(registry, current, service, &path, tried.is_ok());
            any |= tried.is_ok();
            if tried.is_err()
                && let Some(known) = self.known.get_mut(&(service, path.clone()))
            {
                known.stamp = stamp(&path);
            }
            tell(&path, tried);
        }
        any
    }

    /// What is done when there is too much of something.
    ///
    /// # Errors
    /// It says what is not supported.
    pub fn overload(&self, registry: &Registry) -> Result<Option<Manager>> {
        overload::manager(&self.bootstrap.at, registry)
    }

    /// Where the aggregated stream comes from, if the bootstrap names one.
    ///
    /// # Errors
    /// It is named in a way that is not supported.
    pub fn ads_server(&self) -> Result<Option<ads::Server>> {
        ads::server(&self.bootstrap.at)
    }

    /// Tries a change that the aggregated stream brought; resources at fault are left out one by one, with all others
    /// taking effect. What it takes, and what is wanted from now on, goes back to the stream.
    pub fn apply_ads(
        &mut self,
        update: &Update,
        registry: &Registry,
        sinks: &Sinks,
        accept: &mut dyn FnMut(Config) -> Result<()>,
    ) -> Applied {
        let mut rejected = Vec::new();
        let Some(mut change) = ads::Change::read(update, &mut rejected) else {
            return Applied::default();
        };
        loop {
            let tried = self.ads.with(&change);
            match self.try_ads(&tried, registry, sinks, accept) {
                Ok(()) => {
                    self.ads = tried;
                    break;
                }
                Err(error) => {
                    if !change.reject(&error, &mut rejected) {
                        break;
                    }
                }
            }
        }
        ads::count(registry, change.service, rejected.is_empty());
        Applied {
            rejected,
            wanted: self.ads.wanted(),
        }
    }

    fn try_ads(
        &mut self,
        tried: &AdsResources,
        registry: &Registry,
        sinks: &Sinks,
        accept: &mut dyn FnMut(Config) -> Result<()>,
    ) -> Result<()> {
        let known = &self.known;
        let mut read = |service: Service, file: &WatchedFile| match known.get(&(service, file.path.clone())) {
            Some(known) => Ok(known.good.clone()),
            // A cluster or listener of the stream may not name files: their contents are not watched.
            None => Err(ConfigError::new(
                "",
                "a resource of the aggregated stream names a file",
            )),
        };
        let (config, made) = compile(
            &self.bootstrap,
            &self.made,
            self.generation + 1,
            registry,
            sinks,
            (tried, &self.resolved),
            &mut read,
        )?;
        accept(config)?;
        self.made = made;
        self.generation += 1;
        Ok(())
    }

    /// Takes what the names of clusters were found to be.
    ///
    /// # Errors
    /// What `accept` says; what was in force stays.
    pub fn take_resolved(
        &mut self,
        found: Vec<Resolved>,
        registry: &Registry,
        sinks: &Sinks,
        accept: &mut dyn FnMut(Config) -> Result<()>,
    ) -> Result<()> {
        for resolved in found {
            self.resolved.insert(resolved.of.at.text("name"), resolved);
        }
        let tried = self.ads.clone();
        self.try_ads(&tried, registry, sinks, accept)?;
        let Self { resolved, made, .. } = self;
        resolved.retain(|cluster, _| made.order.contains(cluster));
        Ok(())
    }

    /// Whether the configuration in force reads this file.
    pub fn reads(&self, path: &str) -> bool {
        self.known.keys().any(|(_, known)| known == path)
    }

    fn changed(&mut self) -> Vec<(Service, String)> {
        let mut changed = Vec::new();
        for (key, known) in &mut self.known {
            let now = stamp(&key.1);
            if now.is_none() || now == known.stamp {
                continue;
            }
            let replaced = now.as_ref().map(|s| s.inode) != known.stamp.as_ref().map(|s| s.inode);
            if replaced || known.settling == now {
                changed.push(key.clone());
            } else {
                known.settling = now;
            }
        }
        changed
    }

    fn try_files(
        &mut self,
        changed: &[(Service, String)],
        registry: &Registry,
        sinks: &Sinks,
        accept: &mut dyn FnMut(Config) -> Result<()>,
    ) -> Result<()> {
        let mut fresh: HashMap<(Service, String), (Option<Stamp>, Resources)> = HashMap::new();
        for (service, path) in changed {
            let stamp = stamp(path);
            fresh.insert(
                (*service, path.clone()),
                (stamp, read_file(service.kind(), path)?),
            );
        }
        let known = &self.known;
        let mut read = |service: Service, file: &WatchedFile| {
            let key = (service, file.path.clone());
            if let Some((_, resources)) = fresh.get(&key) {
                return Ok(resources.clone());
            }
            if let Some(known) = known.get(&key) {
                return Ok(known.good.clone());
            }
            let stamp = stamp(&file.path);
            let resources = read_file(service.kind(), &file.path)?;
            fresh.insert(key, (stamp, resources.clone()));
            Ok(resources)
        };
        let mut used = HashSet::new();
        let mut note = |service: Service, file: &WatchedFile| {
            used.insert((service, file.path.clone()));
            read(service, file)
        };
        let (config, made) = compile(
            &self.bootstrap,
            &self.made,
            self.generation + 1,
            registry,
            sinks,
            (&self.ads, &self.resolved),
            &mut note,
        )?;
        accept(config)?;
        self.made = made;
        for (key, (stamp, good)) in fresh {
            self.known.insert(
                key,
                Known {
                    stamp,
                    settling: None,
                    good,
                },
            );
        }
        self.known.retain(|key, _| used.contains(key));
        self.generation += 1;
        Ok(())
    }
}

pub(super) fn stamp(path: &str) -> Option<Stamp> {
    use std::os::unix::fs::MetadataExt;
    let metadata = std::fs::metadata(path).ok()?;
    Some(Stamp {
        modified: metadata.modified().ok(),
        length: metadata.len(),
        inode: metadata.ino(),
    })
}

/// Counts an update under the names Envoy uses for the subscription.
fn count(registry: &Registry, config: &Config, service: Service, path: &str, good: bool) {
    let subscription = |name: &str| {
        let scope = registry.scope(name, Subscription::TABLE);
        scope.inc(Shard::CONTROL, Subscription::Attempt);
        scope.inc(
            Shard::CONTROL,
            if good {
                Subscription::Success
            } else {
                Subscription::Rejected
            },
        );
    };
    match service {
        Service::Lds => subscription("listener_manager.lds"),
        Service::Cds => subscription("cluster_manager.cds"),
        Service::Rds => {
            for (_, name) in config.reads.routes.iter().filter(|(file, _)| file == path) {
                subscription(name);
            }
        }
        Service::Eds => {
            for cluster in config
                .reads
                .endpoints
                .iter()
                .filter(|(file, _)| file == path)
                .map(|(_, c)| *c)
            {
                let scope = &config.clusters[cluster].stats;
                scope.inc(Shard::CONTROL, stats::Cluster::UpdateAttempt);
                let member = if good {
                    stats::Cluster::UpdateSuccess
                } else {
                    stats::Cluster::UpdateRejected
                };
                scope.inc(Shard::CONTROL, member);
            }
        }
    }
}

pub(super) fn read_file(kind: Kind, path: &str) -> Result<Resources> {
    let text =
        std::fs::read_to_string(path).map_err(|e| ConfigError::new("", e.to_string()).in_file(path))?;
    resources(kind, path, &text).map_err(|e| e.in_file(path))
}

/// Reads a `DiscoveryResponse`; a resource at fault is named.
fn resources(kind: Kind, path: &str, text: &str) -> Result<Resources> {
    let value = text_to_value(Path::new(path), text)?;
    let message = value_to_message("envoy.service.discovery.v3.DiscoveryResponse", &value, "")
        .map_err(|e| name_resource(e, kind, &value))?;
    let response = At::new(message, "");
    let mut items = Vec::new();
    let mut names = HashSet::new();
    for (index, any) in response.messages("resources").into_iter().enumerate() {
        let path = format!("resources[{index}]");
        let mut item = At::new(unpack_any(&any.message, &path)?, path.clone());
        if item.type_name() == "envoy.service.discovery.v3.Resource" {
            let Some(inner) = item.any("resource")? else {
                return Err(item.refuse("resource", "must be given"));
            };
            item = inner;
        }
        if item.type_name() != kind.resource {
            let found = item.type_name();
            return Err(ConfigError::new(
                path,
                format!("expected {}, found {found}", kind.resource),
            ));
        }
        let name = item.text(kind.name_field);
        let resource = format!("{} {name:?}", kind.noun);
        support::check(&item.message, &item.path).map_err(|e| e.in_resource(&resource))?;
        if !names.insert(name) {
            return Err(item
                .refuse(kind.name_field, "appears twice")
                .in_resource(resource));
        }
        items.push(item);
    }
    let version = response.text("version_info");
    for (field, _) in response.message.fields() {
        if !["version_info", "resources", "type_url", "nonce"].contains(&field.name()) {
            return Err(response.refuse(field.name(), "is not supported yet"));
        }
    }
    let item = |at| Arc::new(Item::new(at, version.clone()));
    Ok(Resources {
        items: items.into_iter().map(item).collect(),
    })
}

/// Finds the name of the resource that an error's path points into.
fn name_resource(error: ConfigError, kind: Kind, value: &serde_json::Value) -> ConfigError {
    let index = error
        .path
        .strip_prefix("resources[")
        .and_then(|rest| rest.split(']').next()?.parse::<usize>().ok());
    let resource = index.and_then(|index| value.get("resources")?.get(index));
    let camel = if kind.name_field == "cluster_name" {
        "clusterName"
    } else {
        "name"
    };
    let name = resource.and_then(|r| r.get(kind.name_field).or_else(|| r.get(camel))?.as_str());
    match name {
        Some(name) => error.in_resource(format!("{} {name:?}", kind.noun)),
        None => error,
    }
}

/// A resource; for dynamic ones the file it comes from.
type Gathered = (Arc<Item>, Option<String>);

type Read<'a> = &'a mut dyn FnMut(Service, &WatchedFile) -> Result<Resources>;

fn compile(
    bootstrap: &Bootstrap,
    before: &Made,
    generation: u64,
    registry: &Registry,
    sinks: &Sinks,
    (ads, resolved): (&AdsResources, &HashMap<String, Resolved>),
    read: Read<'_>,
) -> Result<(Config, Made)> {
    let fixed = bootstrap.at.message("static_resources");
    let dynamic = bootstrap.at.message("dynamic_resources");
    let mut dump = Dump::new(Arc::clone(&bootstrap.at));
    let mut reads = Subscriptions::default();
    let mut gather = |service: Service, fixed: &[Arc<Item>], source: &str| -> Result<Vec<Gathered>> {
        let mut all: Vec<_> = fixed.iter().map(|item| (Arc::clone(item), None)).collect();
        if let Some(source) = dynamic.as_ref().and_then(|d| d.message(source)) {
            let file = source_file(&source)?;
            let items = if file.path == ADS {
                ads.in_force(service)
            } else {
                read(service, &file)?.items
            };
            all.extend(items.into_iter().map(|item| (item, Some(file.path.clone()))));
        }
        Ok(all)
    };
    let clusters = gather(Service::Cds, &bootstrap.clusters, "cds_config")?;
    let listeners = gather(Service::Lds, &bootstrap.listeners, "lds_config")?;
    let node = bootstrap.at.message("node");
    let node = node
        .map(|n| Node {
            id: n.text("id"),
            cluster: n.text("cluster"),
        })
        .unwrap_or_default();
    let mut context = Context {
        registry,
        node: &node,
        sinks,
        clusters: HashMap::new(),
        entered: HashSet::new(),
        rds: HashMap::new(),
        eds: HashMap::new(),
        secrets: StaticSecrets::read(fixed.as_ref())?,
        before,
        made: RefCell::default(),
    };
    ads.endpoints_and_routes(&mut context, &mut dump);
    let mut lookups = Vec::new();
    for (item, file) in &clusters {
        let name = item.at.text("name");
        let lookup = dns::lookup(item, registry).map_err(|e| from(e, "cluster", &name, file.as_ref()))?;
        if let Some(found) = resolved.get(&name).filter(|found| found.is_of(item)) {
            let key = (dns::DNS.to_owned(), name);
            context.eds.insert(key, Arc::clone(&found.assignment));
        }
        lookups.extend(lookup);
    }
    for (index, (item, file)) in clusters.iter().enumerate() {
        let cluster = &item.at;
        let name = cluster.text("name");
        if context.clusters.insert(name.clone(), index).is_some() {
            return Err(from(
                cluster.refuse("name", "appears twice"),
                "cluster",
                &name,
                file.as_ref(),
            ));
        }
        context.made.get_mut().order.push(name.clone());
        read_endpoints(&mut context, &mut dump, &mut reads, index, item, read)
            .map_err(|e| from(e, "cluster", &name, file.as_ref()))?;
    }
    let mut compiled = Vec::new();
    for (item, file) in &clusters {
        let at = &item.at;
        let name = at.text("name");
        let cluster = context.cluster(item, file.is_some());
        compiled.push(cluster.map_err(|e| from(e, "cluster", &name, file.as_ref()))?);
        dump.clusters.push(Placed {
            item: Arc::clone(item),
            dynamic: file.is_some(),
        });
    }
    let mut names = HashSet::new();
    let mut compiled_listeners = Vec::new();
    for (item, file) in &listeners {
        let at = &item.at;
        let name = at.text("name");
        let wrap = |e| from(e, "listener", &name, file.as_ref());
        read_routes(&mut context, &mut dump, &mut reads, item, read).map_err(wrap)?;
        let listener = context.listener(item, file.is_some()).map_err(wrap)?;
        if !names.insert(listener.name.clone()) {
            return Err(wrap(at.refuse("name", "appears twice")));
        }
        compiled_listeners.push(listener);
        dump.listeners.push(Placed {
            item: Arc::clone(item),
            dynamic: file.is_some(),
        });
    }
    let admin = bootstrap.at.message("admin").and_then(|a| a.message("address"));
    let admin = admin.map(|a| socket_address(&a)).transpose()?;
    let config = Config {
        generation,
        node: node.clone(),
        admin,
        listeners: compiled_listeners,
        workloads: compiled
            .iter()
            .flat_map(|c| c.workloads.iter().cloned())
            .collect(),
        clusters: compiled,
        lookups,
        reads,
        dump,
    };
    Ok((config, context.made.into_inner()))
}

/// Says which file and resource an error of a dynamic resource comes from; static ones speak by their path.
fn from(error: ConfigError, noun: &str, name: &str, file: Option<&String>) -> ConfigError {
    match file {
        Some(file) if file == ADS => error.in_resource(format!("{noun} {name:?}")),
        Some(file) => error.in_resource(format!("{noun} {name:?}")).in_file(file),
        None => error,
    }
}

fn read_endpoints(
    context: &mut Context<'_>,
    dump: &mut Dump,
    reads: &mut Subscriptions,
    index: usize,
    cluster: &Item,
    read: Read<'_>,
) -> Result<()> {
    let Some(EndpointsUse { file, .. }) = cluster.endpoints()? else {
        return Ok(());
    };
    reads.endpoints.push((file.path.clone(), index));
    if file.path == ADS || !context.entered.insert((Service::Eds, file.path.clone())) {
        return Ok(());
    }
    for item in read(Service::Eds, &file)?.items {
        let key = (file.path.clone(), item.at.text("cluster_name"));
        if let Entry::Vacant(entry) = context.eds.entry(key) {
            dump.endpoints.push(Arc::clone(&item));
            entry.insert(item);
        }
    }
    Ok(())
}

fn read_routes(
    context: &mut Context<'_>,
    dump: &mut Dump,
    reads: &mut Subscriptions,
    listener: &Item,
    read: Read<'_>,
) -> Result<()> {
    for RouteUse {
        file,
        name,
        stat_prefix,
    } in listener.routes()?
    {
        let scope = format!("http.{stat_prefix}.rds.{name}");
        reads.routes.push((file.path.clone(), scope));
        if file.path == ADS || !context.entered.insert((Service::Rds, file.path.clone())) {
            continue;
        }
        for item in read(Service::Rds, file)?.items {
            let key = (file.path.clone(), item.at.text("name"));
            if let Entry::Vacant(entry) = context.rds.entry(key) {
                dump.routes.push(Arc::clone(&item));
                entry.insert(item);
            }
        }
    }
    Ok(())
}
