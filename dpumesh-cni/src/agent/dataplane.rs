//! The agent's side of the channel: connect, notice a new life of the dataplane, and make it what it shall be.
//!
//! A connection comes back by itself; whether the dataplane behind it is still the same tells its epoch, asked for once a
//! second and after every `Stale`. A new life knows no port and no rule, so everything is told again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use dpumesh_core::steering::{Atomicity, Owner};
use dpumesh_core::vf::{LeaseId, VfLease};
use dpumesh_core::{DpuId, Epoch, Error, ErrorKind, Fence, FlowSteeringExt, Result};
use dpumesh_hw::channel::trust::Credentials;
use dpumesh_hw::channel::{Attachment, Dataplane, DataplaneClient};

use super::Node;
use crate::rules::{GATEWAY, Network, Pod, Prefix, rules, rules_to_prefixes};
use crate::talk::AttachmentKey;

/// How often the dataplane is asked whether it is there and the same.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// Pauses between attempts to connect: from, to.
const PAUSES: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(2)];
/// How often one reconciliation begins anew because the dataplane restarted under it.
const ATTEMPTS: usize = 3;

/// Where the dataplane is.
#[derive(Clone, Debug)]
pub struct DataplaneAddress {
    /// `host:port` on the management network.
    pub address: String,
    /// Name of the card.
    pub dpu: DpuId,
    /// The agent's.
    pub credentials: Credentials,
}

/// What the dataplane was told, in which of its lives.
#[derive(Debug, Default)]
pub(super) struct Link {
    client: Option<DataplaneClient>,
    told: Told,
}

#[derive(Debug, Default)]
struct Told {
    epoch: Option<Epoch>,
    open: BTreeSet<LeaseId>,
    /// It knows what it shall be.
    informed: bool,
    /// And it is so: every port that shall be open is.
    complete: bool,
}

/// What the dataplane shall be.
#[derive(Clone, Debug, Default)]
pub(super) struct Target {
    /// Ports to be closed.
    pub(super) closing: Vec<VfLease>,
    /// Ports to be open.
    pub(super) open: Vec<(AttachmentKey, Attachment)>,
    /// Pods that have rules: governed ones here, whose port must be open, and those of other nodes.
    pub(super) ruled: Vec<(Option<AttachmentKey>, Pod)>,
    /// Addresses of other nodes that no pod names.
    pub(super) prefixes: Vec<Prefix>,
    /// The way between nodes.
    pub(super) network: Option<Network>,
}

/// Ports that could not be opened, each with its reason.
pub(super) type Unopened = BTreeMap<AttachmentKey, Error>;

impl Link {
    /// Whether somebody is there who knows what the dataplane shall be.
    pub(super) fn is_informed(&self) -> bool {
        self.client.is_some() && self.told.informed
    }

    /// Whether nothing is left to be told or tried again.
    pub(super) fn is_complete(&self) -> bool {
        self.is_informed() && self.told.complete
    }

    /// Whether this port is open in the dataplane's present life, as far as is known.
    pub(super) fn is_open(&self, lease: LeaseId) -> bool {
        self.client.is_some() && self.told.open.contains(&lease)
    }

    /// Connects if need be, and asks whether the dataplane is the same; if not, nothing that it was told counts any more.
    async fn refresh(&mut self, address: &DataplaneAddress) -> std::result::Result<(), String> {
        let epoch = match &self.client {
            Some(client) => client.refresh().await.map_err(|error| error.to_string()),
            None => {
                let connected =
                    DataplaneClient::connect(&address.address, &address.dpu, &address.credentials).await;
                connected.map_err(|error| error.to_string()).map(|client| {
                    let epoch = client.epoch();
                    self.client = Some(client);
                    epoch
                })
            }
        };
        let epoch = epoch.inspect_err(|_| self.told.informed = false)?;
        if self.told.epoch != Some(epoch) {
            self.told = Told {
                epoch: Some(epoch),
                ..Told::default()
            };
        }
        Ok(())
    }

    /// Makes the dataplane what it shall be: closes ports, opens ports, then exchanges the rules, new ones before old ones.
    pub(super) async fn reconcile(&mut self, target: &Target) -> Result<Unopened> {
        let Some(client) = self.client.clone() else {
            let message = "there is no channel to the dataplane yet; is dpu-dataplane running, and is --dataplane its address?";
            return Err(Error::new(ErrorKind::DeviceLost, "agent.reconcile", message));
        };
        self.told.informed = false;
        let mut attempt = 1;
        loop {
            let epoch = client.epoch();
            if self.told.epoch != Some(epoch) {
                self.told = Told {
                    epoch: Some(epoch),
                    ..Told::default()
                };
            }
            match self.tell(&client, Fence(epoch), target).await {
                // The client has asked for the new epoch already.
                Err(error) if error.kind == ErrorKind::Stale && attempt < ATTEMPTS => attempt += 1,
                Ok(unopened) => {
                    self.told.informed = true;
                    self.told.complete = unopened.is_empty();
                    return Ok(unopened);
                }
                failed => return failed,
            }
        }
    }

    async fn tell(&mut self, client: &DataplaneClient, fence: Fence, target: &Target) -> Result<Unopened> {
        for lease in &target.closing {
            client.detach(fence, lease).await?;
            self.told.open.remove(&lease.id);
        }
        let mut unopened = Unopened::new();
        for (key, attachment) in &target.open {
            if self.told.open.contains(&attachment.lease.id) {
                continue;
            }
            match client.attach(fence, attachment).await {
                Ok(()) => {
                    self.told.open.insert(attachment.lease.id);
                }
                Err(error) if matches!(error.kind, ErrorKind::Stale | ErrorKind::DeviceLost) => {
                    return Err(error);
                }
                Err(error) => {
                    unopened.insert(key.clone(), error);
                }
            }
        }
        let is_open =
            |key: &Option<AttachmentKey>| key.as_ref().is_none_or(|key| !unopened.contains_key(key));
        let ruled = target.ruled.iter().filter(|(key, _)| is_open(key));
        let pods: Vec<Pod> = ruled.map(|(_, pod)| pod.clone()).collect();
        let rules = target.network.as_ref().map_or_else(Vec::new, |network| {
            let mut all = rules(0, &pods, network);
            all.extend(rules_to_prefixes(0, &target.prefixes, network));
            all
        });
        let steering = client.steering();
        let replaced = steering
            .replace(fence, Owner::Agent, rules, Atomicity::Rollback)
            .await?;
        replaced.into_result()?;
        Ok(unopened)
    }
}

/// A pod's port as the dataplane is told of it.
pub(super) fn attachment(lease: &VfLease, pod: &Pod) -> Attachment {
    Attachment {
        lease: lease.clone(),
        mac: pod.mac,
        addresses: pod.addresses.clone(),
        gateway: GATEWAY,
        ingress: crate::rules::ingress(pod),
    }
}

/// Keeps a node's dataplane connected and complete; never ends.
pub async fn keep_connected(node: Arc<Node>, address: DataplaneAddress) {
    let [shortest, longest] = PAUSES;
    let (mut pause, mut away) = (shortest, false);
    loop {
        let refreshed = node.link().lock().await.refresh(&address).await;
        match refreshed {
            Ok(()) => {
                if away {
                    tracing::info!(address = address.address, "the dataplane is there");
                }
                (pause, away) = (shortest, false);
                node.catch_up().await;
                tokio::time::sleep(HEARTBEAT).await;
            }
            Err(error) => {
                if !away {
                    tracing::warn!("the dataplane is away, pods cannot be added: {error}");
                }
                away = true;
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(longest);
            }
        }
    }
}
