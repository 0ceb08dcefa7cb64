//! What runs on a host: the CNI plugin `istio-dpu-cni` and the node agent `istio-dpu-agent`.
//!
//! ```text
//! runtime ─ CNI: environment, JSON ─► istio-dpu-cni ─ UNIX socket ─► istio-dpu-agent ─┬─ VfAllocator: the VF into the pod
//!                                        │                                            └─ channel: policy, rules ─► dpu-dataplane
//!                                        └─ delegated IPAM, addresses and routes in the pod
//! ```
//!
//! | module | story |
//! |---|---|
//! | [`protocol`] | CNI as data: what a runtime says and is answered |
//! | [`plugin`] | one call of a runtime, carried out |
//! | [`talk`] | what plugin and agent say to each other |
//! | `agent` | the node agent: leases, dataplane, recovery (feature `agent`) |
//! | [`rules`] | the steering rules of a node, a pure function of its pods and its network |
#![forbid(unsafe_code)]

#[cfg(feature = "agent")]
pub mod agent;
pub mod plugin;
pub mod protocol;
pub mod rules;
pub mod talk;
