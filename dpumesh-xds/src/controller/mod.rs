//! `istio-dpu-controller`: what the Kubernetes API knows, told to each node's adapter.
//!
//! ```text
//! API ─watch─► facts ─► world ─► plan (pure) ─► a snapshot per node ─delta ADS─► that node's adapter, known by its certificate
//!  └─admission─► webhook: labels of opted-in pods
//! ```
//!
//! | module | what it owns |
//! |---|---|
//! | `world` | pods, nodes, namespaces and services, with only what is used of them |
//! | `plan` | [`configs`]: the world as [`crate::mesh`] messages, by node; what is wrong with it, by name |
//! | `watch` | the API's watches: lists, changes, outages |
//! | `adapters` | one publisher for each node; whose certificate may have which |
//! | `webhook` | `/mutate`: no sidecar beside a card |
//! | `status` | `/healthz`, `/readyz`, `/metrics`, `/status` |
//! | `manifests` | what it must be given in the cluster: roles, webhook |
//! | `program` | the command line, and all of it together |
//!
//! # Opting in
//! The label [`OPT_IN`] = [`OPTED_IN`] **of the pod** decides, and the admission webhook writes it on pods of namespaces that have it. So the
//! decision is made once, when a pod is created, as its interface is: a namespace that is labelled later changes nothing for pods that
//! run without a virtual function. They are named in `/status` until they are created anew.
//!
//! # Services
//! The proxies know services from istiod. Here they are watched for what no proxy carries: a port of a service that is not TCP is out of reach at
//! the service's address, and `/status` says so by name.
//!
//! # When the API is away
//! Adapters keep what they have and may reconnect; watches resume by themselves, at most 5 s apart; `/readyz` says what is
//! missing. Nothing is published before everything was listed once, so a controller that starts takes nothing away from anybody.
//!
//! # Several of them
//! A controller keeps nothing and writes nothing: any number may run at once and say the same, and an adapter asks any of them. There is no leader,
//! and no need for one until the controller writes to the API.

mod adapters;
mod https;
mod manifests;
mod plan;
mod program;
mod status;
mod watch;
mod webhook;
mod world;

pub use adapters::{Adapters, AdaptersService};
pub use manifests::{WebhookPlace, rbac, webhook_configuration};
pub use plan::{Finding, Plan, configs, plan};
pub use program::{Args, Error, run};
pub use watch::{Facts, watch};
pub use webhook::mutate;
pub use world::{Namespace, Node, Pod, Service, World};

/// Label by which pods and namespaces opt in.
pub const OPT_IN: &str = "dpumesh.io/dataplane";
/// Its value that does; any other opts out.
pub const OPTED_IN: &str = "dpu";
/// Node annotation: IP address of the tunnel endpoint of the node's card.
pub const TUNNEL_ENDPOINT: &str = "dpumesh.io/tunnel-endpoint";
/// Node annotation: name of the card that serves the node's pods, where there are several.
pub const DPU: &str = "dpumesh.io/dpu";
/// Annotation that Istio's injector writes on a pod with a sidecar.
const SIDECAR: &str = "sidecar.istio.io/status";

/// The id by which the adapter of a node introduces itself.
pub fn adapter_id(node: &str) -> String {
    format!("adapter~{node}")
}
