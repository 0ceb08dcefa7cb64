//! What a real istiod sent three sidecars, for tests: `tests/peers/recorded/POD.NAMESPACE/{lds,cds,rds,eds}.pb`, each one
//! `DeltaDiscoveryResponse` as it came.

use std::path::PathBuf;

use prost::Message as _;

use crate::discovery::{DeltaDiscoveryResponse, Resource, ResourceType};
use crate::ir::{Identity, Pod, PodView};
use crate::translate::{Item, Note, translate};

pub(crate) const PODS: [(&str, &str, &str); 3] = [
    ("front-1", "front", "10.244.1.11"),
    ("reviews-1", "reviews", "10.244.1.12"),
    ("reviews-2", "reviews", "10.244.2.12"),
];

pub(crate) const TYPES: [(&str, ResourceType); 4] = [
    ("cds", ResourceType::Cluster),
    ("eds", ResourceType::Endpoints),
    ("lds", ResourceType::Listener),
    ("rds", ResourceType::Route),
];

pub(crate) fn pod(index: usize) -> Pod {
    let (name, account, address) = PODS[index];
    Pod {
        name: name.into(),
        addresses: vec![address.parse().unwrap()],
        identity: Identity {
            trust_domain: "cluster.local".into(),
            namespace: "shop".into(),
            service_account: account.into(),
        },
    }
}

pub(crate) fn response(pod: usize, file: &str) -> DeltaDiscoveryResponse {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/peers/recorded");
    let path = folder.join(format!("{}.shop/{file}.pb", PODS[pod].0));
    let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    DeltaDiscoveryResponse::decode(&*bytes).unwrap()
}

pub(crate) fn resources(pod: usize, file: &str) -> Vec<Resource> {
    response(pod, file).resources
}

/// Everything one pod was sent, translated.
pub(crate) fn view(index: usize) -> (PodView, Vec<Note>) {
    let pod = pod(index);
    let mut view = PodView::new(pod.clone());
    let mut notes = Vec::new();
    for (file, kind) in TYPES {
        for resource in resources(index, file) {
            let any = resource.resource.unwrap();
            let translated = translate(kind, &resource.name, &any.type_url, &any.value, &pod.identity)
                .unwrap_or_else(|error| panic!("{error}"));
            notes.extend(translated.notes);
            match translated.item {
                Item::Listener(item) => drop(view.listeners.insert(resource.name, item)),
                Item::Route(item) => drop(view.routes.insert(resource.name, item)),
                Item::Cluster(item) => drop(view.clusters.insert(resource.name, item)),
                Item::Endpoints(item) => drop(view.endpoints.insert(resource.name, item)),
            }
        }
    }
    (view, notes)
}
