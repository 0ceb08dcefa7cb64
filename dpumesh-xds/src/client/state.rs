//! What one client wants and has, and the requests that follow from it. No I/O.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::{Applied, MAX_RESPONSE, Rejection, Update};
use crate::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, ResourceType, Status};

/// Octets of a NACK's message: it travels to a control plane that logs it.
const MAX_REASON: usize = 4096;

/// `INVALID_ARGUMENT`.
const INVALID: i32 = 3;

/// One client's subscriptions.
#[derive(Debug)]
pub(super) struct State {
    node: Node,
    order: Vec<ResourceType>,
    types: BTreeMap<ResourceType, Subscription>,
}

#[derive(Debug, Default)]
struct Subscription {
    wildcard: bool,
    names: BTreeSet<String>,
    /// Name to version of what was applied.
    has: HashMap<String, String>,
}

/// What an acknowledgement needs to know of its response.
#[derive(Debug)]
pub(super) struct Receipt {
    kind: ResourceType,
    nonce: String,
    versions: Vec<(String, String)>,
    removed: Vec<String>,
}

impl State {
    pub(super) fn new(node: Node, wildcards: &[ResourceType]) -> Self {
        let wildcard = |kind: &ResourceType| {
            let subscription = Subscription {
                wildcard: true,
                ..Subscription::default()
            };
            (*kind, subscription)
        };
        Self {
            node,
            order: wildcards.to_vec(),
            types: wildcards.iter().map(wildcard).collect(),
        }
    }

    /// Names and versions of what was taken of a type.
    pub(super) fn versions(&self, kind: Option<ResourceType>) -> impl Iterator<Item = (&str, &str)> {
        let subscription = kind.and_then(|kind| self.types.get(&kind));
        let has = subscription
            .into_iter()
            .flat_map(|subscription| &subscription.has);
        has.map(|(name, version)| (name.as_str(), version.as_str()))
    }

    /// The first requests of a stream, one for each type.
    pub(super) fn hello(&self) -> Vec<DeltaDiscoveryRequest> {
        let mut requests = Vec::new();
        for kind in &self.order {
            let Some(subscription) = self.types.get(kind) else {
                continue;
            };
            if !subscription.wildcard && subscription.names.is_empty() {
                continue;
            }
            requests.push(DeltaDiscoveryRequest {
                node: requests.is_empty().then(|| self.node.clone()),
                type_url: kind.url().to_owned(),
                resource_names_subscribe: subscription.names.iter().cloned().collect(),
                initial_resource_versions: subscription.has.clone(),
                ..DeltaDiscoveryRequest::default()
            });
        }
        requests
    }

    /// Checks a response as a whole. `Err` is its NACK.
    pub(super) fn receive(
        &self,
        response: DeltaDiscoveryResponse,
    ) -> Result<(Update, Receipt), Box<DeltaDiscoveryRequest>> {
        let octets: usize = response
            .resources
            .iter()
            .filter_map(|r| r.resource.as_ref())
            .map(|any| any.value.len())
            .sum();
        let kind = ResourceType::from_url(&response.type_url);
        let reason = match kind {
            None => Some(format!("type {:?} is not known here", response.type_url)),
            Some(kind) if !self.types.contains_key(&kind) => {
                Some(format!("no {kind} resources were asked for"))
            }
            Some(kind) if octets > MAX_RESPONSE => Some(format!(
                "{octets} octets of {kind} resources are more than {MAX_RESPONSE}"
            )),
            Some(_) => None,
        };
        let (Some(kind), None) = (kind, &reason) else {
            return Err(Box::new(nack(
                response.type_url,
                response.nonce,
                reason.unwrap_or_default(),
            )));
        };
        let receipt = Receipt {
            kind,
            nonce: response.nonce,
            versions: response
                .resources
                .iter()
                .map(|r| (r.name.clone(), r.version.clone()))
                .collect(),
            removed: response.removed_resources.clone(),
        };
        let update = Update {
            kind,
            resources: response.resources,
            removed: response.removed_resources,
        };
        Ok((update, receipt))
    }

    /// Notes what was taken; the ACK or NACK, and what is asked for because of it.
    pub(super) fn applied(&mut self, receipt: Receipt, applied: Applied) -> Vec<DeltaDiscoveryRequest> {
        let subscription = self.types.entry(receipt.kind).or_default();
        for (name, version) in receipt.versions {
            if applied.rejected.iter().all(|rejection| rejection.name != name) {
                subscription.has.insert(name, version);
            }
        }
        for name in receipt.removed {
            subscription.has.remove(&name);
        }
        let url = receipt.kind.url().to_owned();
        let answer = if applied.rejected.is_empty() {
            DeltaDiscoveryRequest {
                type_url: url,
                response_nonce: receipt.nonce,
                ..DeltaDiscoveryRequest::default()
            }
        } else {
            nack(url, receipt.nonce, reasons(&applied.rejected))
        };
        let mut requests = vec![answer];
        for (kind, names) in applied.wanted {
            requests.extend(self.want(kind, names));
        }
        requests
    }

    fn want(&mut self, kind: ResourceType, names: BTreeSet<String>) -> Option<DeltaDiscoveryRequest> {
        if !self.order.contains(&kind) {
            self.order.push(kind);
        }
        let subscription = self.types.entry(kind).or_default();
        if subscription.names == names {
            return None;
        }
        let request = DeltaDiscoveryRequest {
            type_url: kind.url().to_owned(),
            resource_names_subscribe: names.difference(&subscription.names).cloned().collect(),
            resource_names_unsubscribe: subscription.names.difference(&names).cloned().collect(),
            ..DeltaDiscoveryRequest::default()
        };
        subscription.has.retain(|name, _| names.contains(name));
        subscription.names = names;
        Some(request)
    }
}

fn nack(type_url: String, response_nonce: String, message: String) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url,
        response_nonce,
        error_detail: Some(Status {
            code: INVALID,
            message,
        }),
        ..DeltaDiscoveryRequest::default()
    }
}

/// All reasons, as far as there is room; a reason begins with its resource.
fn reasons(rejected: &[Rejection]) -> String {
    let mut text = String::new();
    for (index, rejection) in rejected.iter().enumerate() {
        if text.len() + rejection.reason.len() > MAX_REASON {
            text.push_str(&format!("; and {} more", rejected.len() - index));
            break;
        }
        if index > 0 {
            text.push_str("; ");
        }
        text.push_str(&rejection.reason);
    }
    text
}
