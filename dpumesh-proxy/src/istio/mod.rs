//! Istio's metrics, per local pod and from both reporters' view, as a sidecar of each pod would make them.
//!
//! ```text
//! cluster metadata ─► Pod (workload of an address) ─┐
//! endpoint metadata, certificates, peer headers ────┴► Facts ─► Reporter: key ─► Series (a worker's own cells) ─► /stats/prometheus
//! ```
//! Who a local pod is stands in the metadata of any cluster, under [`WORKLOADS`]: the adapter writes it there, and a stock Envoy
//! carries it without a look. A connection's pod is the one with its address: the client's on a listener whose
//! `traffic_direction` is OUTBOUND (reporter `source`), the destination's where it is INBOUND (reporter `destination`). On other
//! listeners, and for addresses that nobody named, nothing is reported.
//!
//! The peer's workload is what it says in `x-envoy-peer-metadata` (those headers go no further, and ours go out in mesh TLS), else what the
//! endpoint's metadata says (`istio`, `workload`); its principal is the certificate's; the service is the cluster's metadata
//! (`istio`, `services`). What is not known is `unknown`.
//!
//! A pod has at most [`MOST_SERIES`] series; what would make more is counted with peer and service `unknown`. Series go with their pod.

mod peer;
mod report;
mod series;

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

pub use peer::{Workload, told};
pub use report::{Facts, Protocol, Reporter, Role, Service};
pub use series::{MOST_SERIES, Metrics, Pod, Series};

use crate::config::model::{Config, Direction, Listener};
use crate::worker::Peer;

/// The key of the cluster metadata that says who the pods of this node are: a field per pod, called `NAME.NAMESPACE`, a struct of texts:
/// `addresses` (commas between them), `workload`, `namespace`, `canonical_name`, `canonical_revision`, `cluster`, `app`, `version`.
pub const WORKLOADS: &str = "dpumesh.workloads";

/// The local pods by address.
pub type Pods = HashMap<IpAddr, Arc<Pod>>;

/// Who reports a connection.
#[derive(Debug, Clone)]
pub struct Reporting {
    /// The local pod.
    pub pod: Arc<Pod>,
    /// Its part.
    pub role: Role,
}

impl Reporting {
    /// Who reports connections of `peer` on `listener`.
    pub fn of(config: &Config, listener: &Listener, peer: &Peer) -> Option<Self> {
        let (role, address) = match listener.direction? {
            Direction::Outbound => (Role::Source, peer.direct_remote.ip()),
            Direction::Inbound => (Role::Destination, peer.local.ip()),
        };
        let pod = config.workloads.get(&address.to_canonical())?;
        Some(Self {
            pod: Arc::clone(pod),
            role,
        })
    }
}
