//! [`Peers`]: pods of other nodes and the way to them, from a file.
//!
//! ```json
//! { "nodes": [ { "name": "node-2", "vtep": "192.0.2.2", "prefixes": ["10.244.2.0/24"],
//!                "pods": [ { "name": "shop/db", "addresses": ["10.244.2.2", "fd00:244:2::2"] } ] } ] }
//! ```
//! `prefixes` are what the node gives its pods addresses from: pods that nobody names, such as those of a node without a DPU, are reached by
//! them. A prefix in which somebody else has an address is left out, with a warning.
//!
//! In an overlay a node is reached at its tunnel endpoint (`vtep`), in an underlay by the MAC of its uplink (`mac`). The file is
//! read again when it changes and on SIGHUP; one that is wrong changes nothing.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use dpumesh_core::{MacAddr, PortRef, Vni};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use tokio::signal::unix::{SignalKind, signal};

use super::Node;
use crate::rules::{Network, Pod, Prefix};

/// How often the file is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// How this node is reached by the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LocalNetwork {
    /// In VXLAN.
    Overlay {
        /// Its tunnel endpoint.
        vtep: IpAddr,
        /// Number of the pods' network.
        vni: Vni,
    },
    /// As it is.
    Underlay {
        /// MAC of the SoC's uplink.
        mac: MacAddr,
    },
}

/// Every other node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Peers {
    /// The nodes.
    pub nodes: Vec<PeerNode>,
}

/// Another node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PeerNode {
    /// Its name.
    pub name: String,
    /// Its tunnel endpoint, in an overlay.
    #[serde(default)]
    pub vtep: Option<IpAddr>,
    /// MAC of its uplink, in an underlay.
    #[serde(default)]
    pub mac: Option<MacAddr>,
    /// What it gives its pods addresses from.
    #[serde(default)]
    pub prefixes: Vec<IpNet>,
    /// Its pods.
    #[serde(default)]
    pub pods: Vec<PeerPod>,
}

/// A pod of another node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PeerPod {
    /// Its name.
    pub name: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
}

/// Why peers cannot be taken.
#[derive(Debug, thiserror::Error)]
#[error("{}: {reason}", path.display())]
pub struct PeersError {
    path: PathBuf,
    reason: String,
}

impl Peers {
    /// Reads a file for a node that is reached as `local` is.
    ///
    /// # Errors
    /// It cannot be read, a node lacks its `vtep` or `mac`, or two pods have one address.
    pub fn read(path: &Path, local: &LocalNetwork) -> Result<Self, PeersError> {
        let wrong = |reason| PeersError {
            path: path.to_owned(),
            reason,
        };
        let octets = fs::read(path).map_err(|error| wrong(error.to_string()))?;
        let peers: Self = serde_json::from_slice(&octets).map_err(|error| wrong(error.to_string()))?;
        peers.check(local).map_err(wrong)?;
        Ok(peers)
    }

    fn check(&self, local: &LocalNetwork) -> Result<(), String> {
        let mut owners = BTreeMap::new();
        for (index, node) in self.nodes.iter().enumerate() {
            let lacks = match local {
                LocalNetwork::Overlay { vtep, .. } => match node.vtep {
                    None => Some("vtep"),
                    Some(theirs) if theirs.is_ipv4() != vtep.is_ipv4() => {
                        return Err(format!("nodes[{index}].vtep: {theirs} is not of {vtep}'s family"));
                    }
                    Some(_) => None,
                },
                LocalNetwork::Underlay { .. } => node.mac.is_none().then_some("mac"),
            };
            if let Some(field) = lacks {
                return Err(format!(
                    "nodes[{index}].{field}: must be set to reach {}",
                    node.name
                ));
            }
            for pod in &node.pods {
                for address in &pod.addresses {
                    if let Some(other) = owners.insert(*address, &pod.name) {
                        return Err(format!(
                            "nodes[{index}]: {address} is both {other}'s and {}'s",
                            pod.name
                        ));
                    }
                }
            }
        }
        Ok(())
    }

    /// The network of all nodes, this one being number 0, the pods of the others, and their prefixes.
    ///
    /// An address that a local pod has is left out: who sends from a local port is known better than what a file says.
    pub(super) fn network(&self, local: &LocalNetwork, taken: &[IpAddr]) -> (Network, Vec<Pod>, Vec<Prefix>) {
        let reached: Vec<&PeerNode>;
        let network = match *local {
            LocalNetwork::Overlay { vtep, vni } => {
                let others = self
                    .nodes
                    .iter()
                    .filter_map(|node| node.vtep.map(|vtep| (node, vtep)));
                let (nodes, others): (Vec<_>, Vec<_>) = others.unzip();
                reached = nodes;
                let vteps = std::iter::once(vtep).chain(others).collect();
                Network::Overlay { vteps, vni }
            }
            LocalNetwork::Underlay { mac } => {
                let others = self
                    .nodes
                    .iter()
                    .filter_map(|node| node.mac.map(|mac| (node, mac)));
                let (nodes, others): (Vec<_>, Vec<_>) = others.unzip();
                reached = nodes;
                let macs = std::iter::once(mac).chain(others).collect();
                Network::Underlay { macs }
            }
        };
        let mut pods = Vec::new();
        for (node, peer) in (1..).zip(&reached) {
            for pod in &peer.pods {
                let addresses = pod.addresses.iter().filter(|address| !taken.contains(address));
                pods.push(Pod {
                    name: pod.name.clone(),
                    node,
                    port: PortRef::Uplink(0),
                    mac: MacAddr::default(),
                    addresses: addresses.copied().collect(),
                });
            }
        }
        let prefixes = self.prefixes(&reached, taken);
        (network, pods, prefixes)
    }

    /// Prefixes of the nodes, numbered from 1, in which nobody else has an address.
    fn prefixes(&self, nodes: &[&PeerNode], taken: &[IpAddr]) -> Vec<Prefix> {
        let mut prefixes = Vec::new();
        for (number, node) in (1..).zip(nodes) {
            for net in &node.prefixes {
                let others = self.nodes.iter().filter(|other| other.name != node.name);
                let mut theirs = others.clone().flat_map(|other| &other.pods);
                let inside = |address: &IpAddr| net.contains(address);
                let claimed = taken.iter().any(inside)
                    || theirs.any(|pod| pod.addresses.iter().any(inside))
                    || others
                        .flat_map(|other| &other.prefixes)
                        .any(|other| other.contains(net) || net.contains(other));
                if claimed {
                    tracing::warn!(node = node.name, %net, "left out: somebody else has addresses in this prefix");
                } else {
                    prefixes.push(Prefix {
                        node: number,
                        net: *net,
                    });
                }
            }
        }
        prefixes
    }
}

/// Reads the file again whenever it changes, and on SIGHUP; never ends.
///
/// # Errors
/// SIGHUP cannot be waited for.
pub async fn watch_peers(node: Arc<Node>, path: PathBuf) -> std::io::Result<()> {
    let mut hangup = signal(SignalKind::hangup())?;
    let mut tick = tokio::time::interval(LOOK);
    let mut seen = version(&path);
    loop {
        let asked = tokio::select! {
            _ = hangup.recv() => true,
            _ = tick.tick() => false,
        };
        let now = version(&path);
        if !asked && now == seen {
            continue;
        }
        seen = now;
        match Peers::read(&path, &node.options().network) {
            Ok(peers) => {
                tracing::info!(nodes = peers.nodes.len(), "peers read again");
                node.set_peers(peers).await;
            }
            Err(error) => tracing::error!("peers stay as they were: {error}"),
        }
    }
}

/// What changes when a file is written or replaced.
fn version(path: &Path) -> Option<(u64, u64, i64, i64)> {
    let file = fs::metadata(path).ok()?;
    Some((file.ino(), file.size(), file.mtime(), file.mtime_nsec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn overlay() -> LocalNetwork {
        LocalNetwork::Overlay {
            vtep: "192.0.2.1".parse().expect("an address"),
            vni: Vni::try_from(42).expect("24 bits"),
        }
    }

    fn read(json: &str, local: &LocalNetwork) -> Result<Peers, PeersError> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("peers.json");
        fs::write(&path, json).expect("written");
        Peers::read(&path, local)
    }

    const TWO: &str = r#"{"nodes":[{"name":"n2","vtep":"192.0.2.2","pods":[{"name":"b","addresses":["10.1.0.2"]}]},
        {"name":"n3","vtep":"192.0.2.3","pods":[{"name":"c","addresses":["10.1.0.3"]}]}]}"#;

    #[test]
    fn nodes_are_numbered_behind_this_one() {
        let peers = read(TWO, &overlay()).expect("taken");
        let (network, pods, _) = peers.network(&overlay(), &["10.1.0.3".parse().expect("an address")]);
        let Network::Overlay { vteps, .. } = network else {
            panic!("an overlay");
        };
        assert_eq!(vteps.len(), 3);
        assert_eq!((pods[0].node, pods[0].addresses.len()), (1, 1));
        assert_eq!(
            (pods[1].node, pods[1].addresses.len()),
            (2, 0),
            "a local pod has it"
        );
    }

    #[test]
    fn a_prefix_in_which_somebody_else_has_an_address_is_left_out() {
        let json = |prefixes: [&str; 2]| {
            let [two, three] = prefixes;
            format!(
                r#"{{"nodes":[{{"name":"n2","vtep":"192.0.2.2","prefixes":["{two}"],"pods":[{{"name":"b","addresses":["10.2.0.2"]}}]}},
                {{"name":"n3","vtep":"192.0.2.3","prefixes":["{three}"]}}]}}"#
            )
        };
        let taken: IpAddr = "10.1.0.9".parse().expect("an address");
        for (prefixes, expected) in [
            (
                ["10.2.0.0/24", "10.3.0.0/24"],
                vec![(1, "10.2.0.0/24"), (2, "10.3.0.0/24")],
            ),
            (["10.1.0.0/24", "10.3.0.0/24"], vec![(2, "10.3.0.0/24")]),
            (["10.4.0.0/24", "10.2.0.0/24"], vec![(1, "10.4.0.0/24")]),
            (["10.2.0.0/24", "10.2.0.0/16"], vec![]),
        ] {
            let peers = read(&json(prefixes), &overlay()).expect("taken");
            let (_, _, reached) = peers.network(&overlay(), &[taken]);
            let reached: Vec<_> = reached.iter().map(|p| (p.node, p.net.to_string())).collect();
            let expected: Vec<_> = expected
                .into_iter()
                .map(|(node, net)| (node, net.to_owned()))
                .collect();
            assert_eq!(reached, expected, "{prefixes:?}");
        }
        read(&json(["10.2.0.0/33", "10.3.0.0/24"]), &overlay()).expect_err("no prefix");
    }

    #[test]
    fn what_is_wrong_is_named() {
        let error = read(&TWO.replace(r#""vtep":"192.0.2.3","#, ""), &overlay()).expect_err("no way there");
        assert!(error.to_string().contains("nodes[1].vtep"), "{error}");
        let error = read(&TWO.replace("192.0.2.3", "fd00::3"), &overlay()).expect_err("another family");
        assert!(error.to_string().contains("nodes[1].vtep"), "{error}");
        let error = read(&TWO.replace("10.1.0.3", "10.1.0.2"), &overlay()).expect_err("twice");
        assert!(error.to_string().contains("both b's and c's"), "{error}");
        let mac = LocalNetwork::Underlay {
            mac: MacAddr([2, 0, 0, 0, 0, 1]),
        };
        let error = read(TWO, &mac).expect_err("no MAC");
        assert!(error.to_string().contains("nodes[0].mac"), "{error}");
        assert!(read(r#"{"nodes":[],"moon":1}"#, &overlay()).is_err());
    }
}
