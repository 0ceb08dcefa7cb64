//! xDS for a mesh on DPUs: what an unmodified istiod says to many sidecars, made into what one shared proxy does.
//!
//! ```text
//! istiod ─ADS─► client ─► translate ─► aggregate ─► snapshot ─► server ─ADS─► shared proxy (dpu-proxy or Envoy)
//!               a stream   wire types   pure         versions    add before
//!               per pod    stop here                             remove, ACK by name
//! ```
//!
//! | module | what it owns |
//! |---|---|
//! | [`discovery`] | the messages of the delta protocol, the types of resources |
//! | [`schema`] | Envoy's descriptors: messages from JSON and from `Any`, unknown fields noticed |
//! | [`client`] | one stream for one pod identity: connections, tokens, reconnects, ACK and NACK |
//! | [`translate`] | resources as istiod sends them into [`ir`]; Istio's own filters; refusals by path |
//! | [`mesh`] | what the controller tells the adapter: pods of its node, other nodes |
//! | [`ir`] | one pod's configuration in our own words |
//! | [`mod@aggregate`] | many pods' configurations as one, and the trees that choose by pod |
//! | [`snapshot`] | resources with versions, and the difference between two states |
//! | [`server`] | delta ADS towards the shared proxy |
//! | [`keys`] | keys made on the SoC, their certificates through a relay, SDS for Envoy beside them |
//! | [`local`] | the node agent's door: which pods are here, when they are governed |
//! | [`socket`] | Unix sockets that only their user opens |
//! | [`program`] | how the programs begin and end |
//! | [`adapter`] | all of it for the pods of a node; program `istio-dpu-adapter` |
//! | `controller` | pods, nodes and namespaces of the Kubernetes API for the adapters (feature `kube`); program `istio-dpu-controller` |

#![forbid(unsafe_code)]

pub mod adapter;
pub mod aggregate;
pub mod client;
#[cfg(feature = "kube")]
pub mod controller;
pub mod discovery;
pub mod ir;
pub mod keys;
pub mod local;
pub mod mesh;
pub mod program;
pub mod schema;
pub mod server;
pub mod snapshot;
pub mod socket;
pub mod translate;

#[cfg(test)]
mod recorded;
