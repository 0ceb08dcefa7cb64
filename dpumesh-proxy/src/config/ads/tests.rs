//! The stream's resources, with what a real istiod sent three sidecars as one shared proxy's configuration.

use std::path::{Path, PathBuf};

use dpumesh_xds::aggregate::{Interception, Options, aggregate};
use dpumesh_xds::client::Applied;
use dpumesh_xds::discovery::{DeltaDiscoveryResponse, Resource};
use dpumesh_xds::ir::{Identity, Pod, PodView, Workload};
use dpumesh_xds::snapshot::Snapshot;
use dpumesh_xds::translate::{Item as Translated, translate};
use prost::Message as _;

use super::*;
use crate::access_log::Sinks;
use crate::config::files::Files;
use crate::config::model::{Cluster, Config, Direction, Listener, Service};

const BOOTSTRAP: &str = r"
node: {id: proxy~node-1, cluster: dpu}
dynamic_resources:
  ads_config: {api_type: DELTA_GRPC, transport_api_version: V3, grpc_services: [{envoy_grpc: {cluster_name: adapter}}]}
  cds_config: {ads: {}, resource_api_version: V3}
  lds_config: {ads: {}, resource_api_version: V3}
static_resources:
  clusters:
  - name: adapter
    type: STATIC
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        '@type': type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {http2_protocol_options: {}}
    load_assignment:
      cluster_name: adapter
      endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: 192.0.2.1, port_value: 15010}}}}]}]
";

struct World {
    files: Files,
    registry: Registry,
    sinks: Sinks,
    config: Option<Config>,
}

impl World {
    fn new() -> Self {
        let registry = Registry::new(1);
        let sinks = Sinks::new(&registry).unwrap();
        let mut files = Files::parse(Path::new("proxy.yaml"), BOOTSTRAP).unwrap();
        let config = Some(files.load(&registry, &sinks).unwrap());
        Self {
            files,
            registry,
            sinks,
            config,
        }
    }

    fn apply(&mut self, update: &Update) -> Applied {
        let config = &mut self.config;
        let mut accept = |new| {
            *config = Some(new);
            Ok(())
        };
        self.files
            .apply_ads(update, &self.registry, &self.sinks, &mut accept)
    }

    fn config(&self) -> &Config {
        self.config.as_ref().unwrap()
    }
}

fn view(name: &str, account: &str, address: &str) -> PodView {
    let identity = Identity {
        trust_domain: "cluster.local".into(),
        namespace: "shop".into(),
        service_account: account.into(),
    };
    let mut view = PodView::new(Pod {
        name: name.into(),
        addresses: vec![address.parse().unwrap()],
        identity: identity.clone(),
    });
    view.workload = Workload {
        name: account.into(),
        canonical_name: account.into(),
        ..Workload::default()
    };
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/peers/recorded");
    for (file, kind) in [
        ("cds", ResourceType::Cluster),
        ("eds", ResourceType::Endpoints),
        ("lds", ResourceType::Listener),
        ("rds", ResourceType::Route),
    ] {
        let bytes = std::fs::read(folder.join(format!("{name}.shop/{file}.pb"))).unwrap();
        for resource in DeltaDiscoveryResponse::decode(&*bytes).unwrap().resources {
            let any = resource.resource.unwrap();
            match translate(kind, &resource.name, &any.type_url, &any.value, &identity)
                .unwrap()
                .item
            {
                Translated::Listener(item) => drop(view.listeners.insert(resource.name, item)),
                Translated::Route(item) => drop(view.routes.insert(resource.name, item)),
                Translated::Cluster(item) => drop(view.clusters.insert(resource.name, item)),
                Translated::Endpoints(item) => drop(view.endpoints.insert(resource.name, item)),
            }
        }
    }
    view
}

fn recorded() -> Snapshot {
    let views = [
        view("front-1", "front", "10.244.1.11"),
        view("reviews-1", "reviews", "10.244.1.12"),
        view("reviews-2", "reviews", "10.244.2.12"),
    ];
    let options = Options {
        outbound: "127.0.0.1:15001".parse().unwrap(),
        inbound: "127.0.0.1:15006".parse().unwrap(),
        interception: Interception::Transparent,
    };
    aggregate(&views, &options).snapshot
}

fn update(snapshot: &Snapshot, kind: ResourceType) -> Update {
    let resources = snapshot.of(kind).map(|(name, published)| Resource {
        name: name.clone(),
        version: published.version.clone(),
        resource: Some(published.resource.clone()),
    });
    Update {
        kind,
        resources: resources.collect(),
        removed: Vec::new(),
    }
}

/// In the order in which they are published.
const KINDS: [ResourceType; 4] = [
    ResourceType::Cluster,
    ResourceType::Endpoints,
    ResourceType::Listener,
    ResourceType::Route,
];

#[test]
fn an_update_makes_anew_what_it_touches_and_nothing_else() {
    let snapshot = recorded();
    let mut world = World::new();
    for kind in KINDS {
        world.apply(&update(&snapshot, kind));
    }
    let before = (world.config().clusters.clone(), world.config().listeners.clone());
    let anew = |world: &World| {
        let known = |cluster: &&Arc<Cluster>| !before.0.iter().any(|old| Arc::ptr_eq(old, cluster));
        let clusters = world.config().clusters.iter().filter(known);
        let clusters: Vec<String> = clusters.map(|cluster| cluster.name.clone()).collect();
        let listeners = &world.config().listeners;
        let same = listeners
            .iter()
            .zip(&before.1)
            .all(|(new, old)| Arc::ptr_eq(new, old));
        (clusters, same)
    };

    let mut change = update(&snapshot, ResourceType::Endpoints);
    change.resources.truncate(1);
    let name = change.resources[0].name.clone();
    world.apply(&change);
    assert_eq!(
        anew(&world),
        (vec![name], true),
        "one cluster's endpoints came again"
    );

    let mut change = update(&snapshot, ResourceType::Route);
    change.resources.truncate(1);
    world.apply(&change);
    assert!(!anew(&world).1, "routes came again");

    let change = Update {
        kind: ResourceType::Cluster,
        resources: Vec::new(),
        removed: vec![before.0[1].name.clone()],
    };
    world.apply(&change);
    let (clusters, _) = anew(&world);
    assert_eq!(clusters.len(), 1, "the others are as they were");
    let inbound = |listeners: &[Arc<Listener>]| Arc::clone(&listeners[0]);
    let (old, new) = (inbound(&before.1), inbound(&world.config().listeners));
    assert_eq!(old.name, new.name);
    assert!(!Arc::ptr_eq(&old, &new), "it points to clusters by index");
}

#[test]
fn what_istiod_and_the_adapter_say_names_workloads_and_services() {
    let snapshot = recorded();
    let mut world = World::new();
    for kind in KINDS {
        world.apply(&update(&snapshot, kind));
    }
    let config = world.config();
    let pod = &config.workloads[&"10.244.1.11".parse().unwrap()];
    assert_eq!((&*pod.name, &*pod.workload.name), ("front-1.shop", "front"));
    assert_eq!(config.workloads.len(), 3);
    for listener in &config.listeners {
        let wanted = if listener.name == "inbound" {
            Direction::Inbound
        } else {
            Direction::Outbound
        };
        assert_eq!(listener.direction, Some(wanted), "{}", listener.name);
    }
    for (front, name, endpoints) in [
        ("outbound|80||reviews", "reviews", true),
        ("inbound|8080||@reviews-1", "reviews", false),
    ] {
        let mut clusters = config.clusters.iter();
        let cluster = clusters.find(|c| c.name.starts_with(front)).unwrap();
        let wanted = Service {
            host: "reviews.shop.svc.cluster.local".into(),
            name: name.into(),
            namespace: "shop".into(),
        };
        assert_eq!(cluster.service, Some(wanted), "{front}");
        let known = |e: &crate::config::model::Endpoint| {
            let workload = e.workload.as_ref();
            workload.is_some_and(|w| w.namespace == "shop" && w.canonical == "reviews")
        };
        assert_eq!(!cluster.endpoints.is_empty(), endpoints);
        assert!(cluster.endpoints.iter().all(known), "{:?}", cluster.endpoints);
    }
}

#[test]
fn recorded_configuration_is_taken_whole() {
    let snapshot = recorded();
    let mut world = World::new();
    let mut wanted = Vec::new();
    for kind in KINDS {
        let applied = world.apply(&update(&snapshot, kind));
        let reasons: BTreeSet<&str> = applied.rejected.iter().map(|r| r.reason.as_str()).collect();
        assert_eq!(reasons, BTreeSet::new(), "{kind}");
        wanted = applied.wanted;
        if kind == ResourceType::Listener {
            let listeners: Vec<&str> = names(world.config());
            assert_eq!(
                listeners,
                ["inbound"],
                "the other waits for its route configurations"
            );
        }
    }
    let config = world.config();
    assert_eq!(names(config), ["inbound", "outbound"]);
    for (kind, names) in wanted {
        let there: BTreeSet<String> = snapshot.of(kind).map(|(name, _)| name.clone()).collect();
        assert_eq!(names, there, "{kind}");
    }
    let cluster = |name: &str| config.clusters.iter().find(|c| c.name == name).unwrap();
    let front = cluster("outbound|80||front.shop.svc.cluster.local");
    assert!(front.endpoints.iter().all(|e| e.tls.is_some()));
    assert!(
        cluster("outbound|80||api.example.com")
            .endpoints
            .iter()
            .all(|e| e.tls.is_none())
    );
}

fn names(config: &Config) -> Vec<&str> {
    config.listeners.iter().map(|l| l.name.as_str()).collect()
}
