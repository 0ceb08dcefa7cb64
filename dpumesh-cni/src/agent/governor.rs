//! [`Governor`]: who knows when a pod's program is in force in the node's proxy.

use std::fmt;
use std::net::IpAddr;

use async_trait::async_trait;
use dpumesh_core::DpuId;

use crate::talk::PodName;

/// Says when a pod is governed: the program that istiod has for it is acknowledged by the node's proxy.
///
/// Until then the pod's port is open to nothing. Calls for different pods are made at once.
#[async_trait]
pub trait Governor: Send + Sync + fmt::Debug {
    /// Waits until the program for this pod is acknowledged.
    ///
    /// Blocks for as long as it takes: the agent has a bound of its own and drops the future at it. Dropping it leaves nothing
    /// behind that [`Self::forget`] does not take away; asking again for the same pod continues or succeeds at once. After a
    /// restart of the agent it is asked again for every pod that was not governed.
    ///
    /// # Errors
    /// There will be no program for this pod, whatever time passes; the text tells people why.
    async fn governed(&self, pod: &GovernedPod) -> Result<(), GovernorError>;

    /// This pod was governed when the agent ended, and the agent is back: called once for each of them. Does not wait; the pod
    /// is governed whatever becomes of this.
    async fn resume(&self, pod: &GovernedPod);

    /// The pod is gone; its program may go as well. Called once for each pod that was asked for, not after a restart between.
    async fn forget(&self, pod: &GovernedPod);
}

/// A pod as the proxy's side knows it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct GovernedPod {
    /// The card whose proxy serves it.
    pub dpu: DpuId,
    /// Who it is. The address is in no cluster's records yet: runtimes publish it after ADD.
    pub pod: PodName,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Number by which the proxy knows its port.
    pub ingress: u32,
}

impl GovernedPod {
    /// A pod of a card.
    pub fn new(dpu: DpuId, pod: PodName, addresses: Vec<IpAddr>, ingress: u32) -> Self {
        Self {
            dpu,
            pod,
            addresses,
            ingress,
        }
    }
}

/// Why a pod will not be governed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct GovernorError(pub String);

/// Every pod is governed at once: for nodes whose proxy has one program for all, from a file.
#[derive(Clone, Copy, Debug, Default)]
pub struct Immediate;

#[async_trait]
impl Governor for Immediate {
    async fn governed(&self, _: &GovernedPod) -> Result<(), GovernorError> {
        Ok(())
    }

    async fn resume(&self, _: &GovernedPod) {}

    async fn forget(&self, _: &GovernedPod) {}
}
