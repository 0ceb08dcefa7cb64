//! The controller's word: which pods are in the cluster, and where the other nodes' pods are.
//!
//! A delta ADS stream with the node id `adapter~NODE`, and two types, both by wildcard: [`Binding`] goes into the table of pods, [`Peer`] into
//! the file that the node's agent reads. A resource that makes no sense is refused by name and field; the last good one stays.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use ipnet::IpNet;
use prost::Message;
use serde::Serialize;

use super::disk;
use super::pods::Pods;
use crate::client::{Applied, Apply, Rejection, Update};
use crate::discovery::{Node, Resource, ResourceType};
use crate::mesh::{Binding, Peer};

/// How the adapter of a node names itself to the controller.
pub fn node(name: &str) -> Node {
    Node {
        id: format!("adapter~{name}"),
        cluster: String::new(),
        metadata: None,
        user_agent_name: "istio-dpu-adapter".to_owned(),
    }
}

/// Takes what the controller says.
#[derive(Debug)]
pub struct Word {
    pods: Arc<Pods>,
    peers_file: Option<PathBuf>,
    peers: BTreeMap<String, Peer>,
    /// The first answer has all bindings there are.
    first: bool,
}

impl Word {
    /// Into `pods`, and into the file for the agent.
    pub fn new(pods: Arc<Pods>, peers_file: Option<PathBuf>) -> Self {
        Self {
            pods,
            peers_file,
            peers: BTreeMap::new(),
            first: true,
        }
    }

    fn bindings(&mut self, update: Update) -> Vec<Rejection> {
        let (bindings, rejected) = each(update.resources, binding);
        let all = std::mem::take(&mut self.first);
        self.pods.bind(bindings, &update.removed, all);
        rejected
    }

    fn peers(&mut self, update: Update) -> Vec<Rejection> {
        let (peers, rejected) = each(update.resources, peer);
        for name in &update.removed {
            self.peers.remove(name);
        }
        self.peers
            .extend(peers.into_iter().map(|peer| (peer.node.clone(), peer)));
        if let Some(path) = &self.peers_file {
            let written = serde_json::to_vec_pretty(&file(&self.peers))
                .map_err(std::io::Error::other)
                .and_then(|text| disk::replace(path, &text));
            if let Err(error) = written {
                tracing::error!(path = %path.display(), %error, "peers could not be written");
            }
        }
        rejected
    }
}

#[async_trait]
impl Apply for Word {
    async fn apply(&mut self, update: Update) -> Applied {
        let rejected = match update.kind {
            ResourceType::Binding => self.bindings(update),
            ResourceType::Peer => self.peers(update),
            _ => Vec::new(),
        };
        Applied {
            rejected,
            wanted: Vec::new(),
        }
    }

    fn lost(&mut self, reason: &str) {
        tracing::info!(reason, "stream to the controller ended; what it said stays");
    }
}

fn each<T>(
    resources: Vec<Resource>,
    read: impl Fn(&Resource) -> Result<T, String>,
) -> (Vec<T>, Vec<Rejection>) {
    let mut taken = Vec::new();
    let mut rejected = Vec::new();
    for resource in resources {
        match read(&resource) {
            Ok(value) => taken.push(value),
            Err(reason) => rejected.push(Rejection {
                name: resource.name,
                reason,
            }),
        }
    }
    (taken, rejected)
}

fn decode<T: Message + Default>(resource: &Resource, kind: ResourceType) -> Result<T, String> {
    let any = resource
        .resource
        .as_ref()
        .filter(|any| any.type_url == kind.url())
        .ok_or_else(|| format!("{kind} {:?}: is no {}", resource.name, kind.message_name()))?;
    T::decode(&*any.value).map_err(|error| format!("{kind} {:?}: {error}", resource.name))
}

fn binding(resource: &Resource) -> Result<Binding, String> {
    let binding: Binding = decode(resource, ResourceType::Binding)?;
    let fields = [
        ("name", &binding.name),
        ("namespace", &binding.namespace),
        ("uid", &binding.uid),
        ("service_account", &binding.service_account),
        ("trust_domain", &binding.trust_domain),
    ];
    for (field, value) in fields {
        if value.is_empty() || value.contains('/') {
            return Err(format!(
                "binding {:?}: {field}: {value:?} is no name",
                resource.name
            ));
        }
    }
    if binding.resource_name() != resource.name {
        return Err(format!(
            "binding {:?}: name: is of {}",
            resource.name,
            binding.resource_name()
        ));
    }
    Ok(binding)
}

fn peer(resource: &Resource) -> Result<Peer, String> {
    let peer: Peer = decode(resource, ResourceType::Peer)?;
    if peer.node.is_empty() || peer.node != resource.name {
        return Err(format!(
            "peer {:?}: node: {:?} is another",
            resource.name, peer.node
        ));
    }
    let addresses = peer.addresses.iter().map(|a| ("addresses", a));
    let tunnel = std::iter::once(("tunnel_endpoint", &peer.tunnel_endpoint)).filter(|(_, a)| !a.is_empty());
    for (field, address) in addresses.chain(tunnel) {
        if address.parse::<IpAddr>().is_err() {
            return Err(format!(
                "peer {:?}: {field}: {address:?} is no address",
                resource.name
            ));
        }
    }
    for prefix in &peer.pod_cidrs {
        if prefix.parse::<IpNet>().is_err() {
            return Err(format!(
                "peer {:?}: pod_cidrs: {prefix:?} is no prefix",
                resource.name
            ));
        }
    }
    Ok(peer)
}

/// The agent's file of peers.
#[derive(Debug, Serialize)]
struct File<'a> {
    nodes: Vec<FileNode<'a>>,
}

#[derive(Debug, Serialize)]
struct FileNode<'a> {
    name: &'a str,
    vtep: &'a str,
    prefixes: &'a [String],
    pods: Vec<FilePod<'a>>,
}

#[derive(Debug, Serialize)]
struct FilePod<'a> {
    name: &'a str,
    addresses: [&'a str; 1],
}

/// Nodes without a tunnel endpoint cannot be reached, and are left out. A pod goes by its address here: the controller tells no more. Pods
/// that did not opt in are reached by their node's prefixes.
fn file(peers: &BTreeMap<String, Peer>) -> File<'_> {
    let mut nodes = Vec::new();
    for peer in peers.values().filter(|peer| !peer.tunnel_endpoint.is_empty()) {
        let mut pods = Vec::new();
        for address in &peer.addresses {
            pods.push(FilePod {
                name: address,
                addresses: [address],
            });
        }
        nodes.push(FileNode {
            name: &peer.node,
            vtep: &peer.tunnel_endpoint,
            prefixes: &peer.pod_cidrs,
            pods,
        });
    }
    File { nodes }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resource(kind: ResourceType, name: &str, message: &impl Message) -> Resource {
        Resource {
            name: name.into(),
            version: "1".into(),
            resource: Some(prost_types::Any {
                type_url: kind.url().into(),
                value: message.encode_to_vec(),
            }),
        }
    }

    fn update(kind: ResourceType, resources: Vec<Resource>) -> Update {
        Update {
            kind,
            resources,
            removed: Vec::new(),
        }
    }

    fn good() -> Binding {
        Binding {
            name: "p".into(),
            namespace: "n".into(),
            uid: "u".into(),
            service_account: "sa".into(),
            trust_domain: "td".into(),
            ..Binding::default()
        }
    }

    #[tokio::test]
    async fn a_binding_that_makes_no_sense_is_refused_by_field() {
        let mut word = Word::new(Arc::default(), None);
        let nameless = Binding {
            service_account: String::new(),
            ..good()
        };
        let other = Resource {
            resource: Some(prost_types::Any {
                type_url: ResourceType::Peer.url().into(),
                value: vec![],
            }),
            ..resource(ResourceType::Binding, "n/x", &good())
        };
        let resources = vec![
            resource(ResourceType::Binding, "n/p", &good()),
            resource(ResourceType::Binding, "n/p", &nameless),
            resource(ResourceType::Binding, "n/q", &good()),
            other,
        ];
        let reasons: Vec<String> = word
            .apply(update(ResourceType::Binding, resources))
            .await
            .rejected
            .into_iter()
            .map(|r| r.reason)
            .collect();
        assert_eq!(
            reasons,
            [
                "binding \"n/p\": service_account: \"\" is no name",
                "binding \"n/q\": name: is of n/p",
                "binding \"n/x\": is no dpumesh.v1.Binding",
            ]
        );
    }

    #[tokio::test]
    async fn peers_are_written_for_the_agent() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("peers.json");
        let mut word = Word::new(Arc::default(), Some(path.clone()));
        let peer = |node: &str, tunnel: &str, address: &str| Peer {
            node: node.into(),
            tunnel_endpoint: tunnel.into(),
            addresses: vec![address.into()],
            pod_cidrs: vec!["10.244.2.0/24".into()],
        };
        let unlike = Peer {
            pod_cidrs: vec!["10.244.5.0".into()],
            ..peer("node-5", "192.0.2.5", "10.244.5.2")
        };
        let resources = vec![
            resource(
                ResourceType::Peer,
                "node-2",
                &peer("node-2", "192.0.2.2", "10.244.2.2"),
            ),
            resource(ResourceType::Peer, "node-3", &peer("node-3", "", "10.244.3.2")),
            resource(ResourceType::Peer, "node-4", &peer("node-4", "192.0.2.4", "ten")),
            resource(ResourceType::Peer, "node-5", &unlike),
        ];
        let applied = word.apply(update(ResourceType::Peer, resources)).await;
        assert_eq!(
            applied.rejected[0].reason,
            "peer \"node-4\": addresses: \"ten\" is no address"
        );
        assert_eq!(
            applied.rejected[1].reason,
            "peer \"node-5\": pod_cidrs: \"10.244.5.0\" is no prefix"
        );
        let written: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let expected = serde_json::json!({"nodes": [{"name": "node-2", "vtep": "192.0.2.2",
            "prefixes": ["10.244.2.0/24"], "pods": [{"name": "10.244.2.2", "addresses": ["10.244.2.2"]}]}]});
        assert_eq!(written, expected);
    }
}
