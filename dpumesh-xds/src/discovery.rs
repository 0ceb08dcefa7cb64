//! The messages of the delta discovery protocol and the names of what it carries.
//!
//! Written by hand from `envoy/service/discovery/v3/discovery.proto` (field numbers are facts), with only the fields that a
//! sidecar and its control plane use; a field that is not here is skipped, as protobuf has it. The *resources* inside are
//! not skipped over so lightly: they stay bytes here and are read by [`crate::translate`].

use std::collections::HashMap;

/// Path of the streaming call, both ends.
pub const DELTA_CALL: &str =
    "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";

/// Path of the streaming call of the state-of-the-world protocol.
pub const WHOLE_CALL: &str =
    "/envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources";

/// Name of the gRPC service.
pub const SERVICE: &str = "envoy.service.discovery.v3.AggregatedDiscoveryService";

/// What kind of thing a resource is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ResourceType {
    /// CDS: clusters.
    Cluster,
    /// EDS: endpoints of clusters.
    Endpoints,
    /// LDS: listeners.
    Listener,
    /// RDS: route configurations.
    Route,
    /// ECDS: configurations of extensions.
    Extension,
    /// NDS: Istio's table of host names.
    NameTable,
    /// SDS: secrets. Never asked for and never served.
    Secret,
    /// Our own: a pod of the adapter's node, [`crate::mesh::Binding`].
    Binding,
    /// Our own: another node, [`crate::mesh::Peer`].
    Peer,
}

impl ResourceType {
    /// Every type, in the order in which additions travel: what is referred to comes before what refers to it.
    pub const ALL: [Self; 9] = [
        Self::Cluster,
        Self::Endpoints,
        Self::Extension,
        Self::Listener,
        Self::Route,
        Self::NameTable,
        Self::Secret,
        Self::Binding,
        Self::Peer,
    ];

    /// The type URL on the wire.
    pub const fn url(self) -> &'static str {
        match self {
            Self::Cluster => "type.googleapis.com/envoy.config.cluster.v3.Cluster",
            Self::Endpoints => "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
            Self::Listener => "type.googleapis.com/envoy.config.listener.v3.Listener",
            Self::Route => "type.googleapis.com/envoy.config.route.v3.RouteConfiguration",
            Self::Extension => "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig",
            Self::NameTable => "type.googleapis.com/istio.networking.nds.v1.NameTable",
            Self::Secret => "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret",
            Self::Binding => "type.googleapis.com/dpumesh.v1.Binding",
            Self::Peer => "type.googleapis.com/dpumesh.v1.Peer",
        }
    }

    /// The full name of the message.
    pub fn message_name(self) -> &'static str {
        self.url().rsplit('/').next().unwrap_or_default()
    }

    /// The type of a URL; `None` for one that nobody here knows.
    pub fn from_url(url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.url() == url)
    }

    /// Whether an empty first subscription means everything there is.
    pub const fn is_wildcard(self) -> bool {
        matches!(self, Self::Cluster | Self::Listener | Self::Binding | Self::Peer)
    }

    /// Whether nothing refers to a resource of this type: it can go at any time.
    pub const fn stands_alone(self) -> bool {
        matches!(self, Self::Binding | Self::Peer)
    }

    /// The word people use: `listener`, `cluster` …
    pub const fn word(self) -> &'static str {
        match self {
            Self::Cluster => "cluster",
            Self::Endpoints => "endpoints",
            Self::Listener => "listener",
            Self::Route => "route",
            Self::Extension => "extension",
            Self::NameTable => "name table",
            Self::Secret => "secret",
            Self::Binding => "binding",
            Self::Peer => "peer",
        }
    }
}

impl std::fmt::Display for ResourceType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.word())
    }
}

/// Who asks: `envoy.config.core.v3.Node`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Node {
    /// For Istio `sidecar~IP~POD.NAMESPACE~NAMESPACE.svc.cluster.local`.
    #[prost(string, tag = "1")]
    pub id: String,
    /// The service the proxy belongs to.
    #[prost(string, tag = "2")]
    pub cluster: String,
    /// What changes the configuration a control plane makes.
    #[prost(message, optional, tag = "3")]
    pub metadata: Option<prost_types::Struct>,
    /// What software asks.
    #[prost(string, tag = "6")]
    pub user_agent_name: String,
}

/// `google.rpc.Status`: why a response was refused.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Status {
    /// A gRPC code.
    #[prost(int32, tag = "1")]
    pub code: i32,
    /// For people.
    #[prost(string, tag = "2")]
    pub message: String,
}

/// What a client asks, and whether it took what it was sent.
#[derive(Clone, PartialEq, prost::Message)]
pub struct DeltaDiscoveryRequest {
    /// Only in the first request of a stream.
    #[prost(message, optional, tag = "1")]
    pub node: Option<Node>,
    /// Which type this is about.
    #[prost(string, tag = "2")]
    pub type_url: String,
    /// Names wanted from now on.
    #[prost(string, repeated, tag = "3")]
    pub resource_names_subscribe: Vec<String>,
    /// Names no longer wanted.
    #[prost(string, repeated, tag = "4")]
    pub resource_names_unsubscribe: Vec<String>,
    /// After a reconnect: name to version of what the client still has.
    #[prost(map = "string, string", tag = "5")]
    pub initial_resource_versions: HashMap<String, String>,
    /// Set when this answers a response.
    #[prost(string, tag = "6")]
    pub response_nonce: String,
    /// Set when that response was refused.
    #[prost(message, optional, tag = "7")]
    pub error_detail: Option<Status>,
}

/// One named resource.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Resource {
    /// Opaque.
    #[prost(string, tag = "1")]
    pub version: String,
    /// The message.
    #[prost(message, optional, tag = "2")]
    pub resource: Option<prost_types::Any>,
    /// Unique within its type.
    #[prost(string, tag = "3")]
    pub name: String,
}

/// Changes of one type.
#[derive(Clone, PartialEq, prost::Message)]
pub struct DeltaDiscoveryResponse {
    /// For people.
    #[prost(string, tag = "1")]
    pub system_version_info: String,
    /// Added or changed.
    #[prost(message, repeated, tag = "2")]
    pub resources: Vec<Resource>,
    /// Which type.
    #[prost(string, tag = "4")]
    pub type_url: String,
    /// To be said back.
    #[prost(string, tag = "5")]
    pub nonce: String,
    /// Gone.
    #[prost(string, repeated, tag = "6")]
    pub removed_resources: Vec<String>,
}

/// What a state-of-the-world client asks: all it wants, each time.
#[derive(Clone, PartialEq, prost::Message)]
pub struct DiscoveryRequest {
    /// Version of the last response it took.
    #[prost(string, tag = "1")]
    pub version_info: String,
    /// Who asks.
    #[prost(message, optional, tag = "2")]
    pub node: Option<Node>,
    /// All names wanted.
    #[prost(string, repeated, tag = "3")]
    pub resource_names: Vec<String>,
    /// Which type this is about.
    #[prost(string, tag = "4")]
    pub type_url: String,
    /// Set when this answers a response.
    #[prost(string, tag = "5")]
    pub response_nonce: String,
    /// Set when that response was refused.
    #[prost(message, optional, tag = "6")]
    pub error_detail: Option<Status>,
}

/// Resources for a state-of-the-world client.
#[derive(Clone, PartialEq, prost::Message)]
pub struct DiscoveryResponse {
    /// Opaque.
    #[prost(string, tag = "1")]
    pub version_info: String,
    /// The messages.
    #[prost(message, repeated, tag = "2")]
    pub resources: Vec<prost_types::Any>,
    /// Which type.
    #[prost(string, tag = "4")]
    pub type_url: String,
    /// To be said back.
    #[prost(string, tag = "5")]
    pub nonce: String,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema;

    #[test]
    fn field_numbers_are_those_of_the_published_files() {
        let cases: &[(&str, &[(&str, u32)])] = &[
            (
                "envoy.config.core.v3.Node",
                &[("id", 1), ("cluster", 2), ("metadata", 3), ("user_agent_name", 6)],
            ),
            (
                "envoy.service.discovery.v3.DeltaDiscoveryRequest",
                &[
                    ("node", 1),
                    ("type_url", 2),
                    ("resource_names_subscribe", 3),
                    ("resource_names_unsubscribe", 4),
                    ("initial_resource_versions", 5),
                    ("response_nonce", 6),
                    ("error_detail", 7),
                ],
            ),
            (
                "envoy.service.discovery.v3.DeltaDiscoveryResponse",
                &[
                    ("system_version_info", 1),
                    ("resources", 2),
                    ("type_url", 4),
                    ("nonce", 5),
                    ("removed_resources", 6),
                ],
            ),
            (
                "envoy.service.discovery.v3.DiscoveryRequest",
                &[
                    ("version_info", 1),
                    ("node", 2),
                    ("resource_names", 3),
                    ("type_url", 4),
                    ("response_nonce", 5),
                    ("error_detail", 6),
                ],
            ),
            (
                "envoy.service.discovery.v3.DiscoveryResponse",
                &[
                    ("version_info", 1),
                    ("resources", 2),
                    ("type_url", 4),
                    ("nonce", 5),
                ],
            ),
            (
                "envoy.service.discovery.v3.Resource",
                &[("version", 1), ("resource", 2), ("name", 3)],
            ),
        ];
        for (message, fields) in cases {
            let message = schema::message(message).unwrap();
            for (field, number) in *fields {
                assert_eq!(
                    message.get_field_by_name(field).unwrap().number(),
                    *number,
                    "{field}"
                );
            }
        }
    }

    #[test]
    fn a_url_names_its_type() {
        for kind in ResourceType::ALL {
            assert_eq!(ResourceType::from_url(kind.url()), Some(kind));
        }
        assert_eq!(ResourceType::from_url("type.googleapis.com/other"), None);
    }
}
