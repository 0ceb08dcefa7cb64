//! What the controller tells a node's adapter: the *inbound* configuration, one [`Binding`] for each opted-in pod of that node, and the *internal*
//! configuration, one [`Peer`] for each other node.
//!
//! Both are resources of delta ADS like all others ([`crate::discovery::ResourceType::Binding`] and `Peer`): subscribed to by wildcard, acknowledged
//! or refused by name. They hold facts of the Kubernetes API and nothing of policy: that comes from istiod.
//!
//! | message | resource name | type URL |
//! |---|---|---|
//! | [`Binding`] | `NAMESPACE/NAME` | `type.googleapis.com/dpumesh.v1.Binding` |
//! | [`Peer`] | name of the node | `type.googleapis.com/dpumesh.v1.Peer` |
//!
//! Field numbers are given away once; a field that is not known here is skipped.

use std::collections::BTreeMap;

/// A pod of the adapter's node: who it is and where.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Binding {
    /// Kubernetes name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Kubernetes namespace.
    #[prost(string, tag = "2")]
    pub namespace: String,
    /// Kubernetes uid: a pod of the same name with another uid is another pod.
    #[prost(string, tag = "3")]
    pub uid: String,
    /// Its service account.
    #[prost(string, tag = "4")]
    pub service_account: String,
    /// Trust domain of the mesh.
    #[prost(string, tag = "5")]
    pub trust_domain: String,
    /// Its addresses; none until the API has them, which is after the CNI plugin's ADD.
    #[prost(string, repeated, tag = "6")]
    pub addresses: Vec<String>,
    /// Name of its node.
    #[prost(string, tag = "7")]
    pub node: String,
    /// The card that is to serve it; empty where nobody chose.
    #[prost(string, tag = "8")]
    pub dpu: String,
    /// Whether Kubernetes calls it ready.
    #[prost(bool, tag = "9")]
    pub ready: bool,
    /// Its labels.
    #[prost(btree_map = "string, string", tag = "10")]
    pub labels: BTreeMap<String, String>,
}

/// Another node: where its pods are reached.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Peer {
    /// Its name.
    #[prost(string, tag = "1")]
    pub node: String,
    /// IP address of its tunnel endpoint.
    #[prost(string, tag = "2")]
    pub tunnel_endpoint: String,
    /// IP addresses of its opted-in pods.
    #[prost(string, repeated, tag = "3")]
    pub addresses: Vec<String>,
    /// Prefixes that the node gives its pods addresses from; not all of them are opted in.
    #[prost(string, repeated, tag = "4")]
    pub pod_cidrs: Vec<String>,
}

impl Binding {
    /// Its name as a resource: `NAMESPACE/NAME`.
    pub fn resource_name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// The identity that its certificate carries.
    pub fn spiffe_id(&self) -> String {
        let Self {
            trust_domain,
            namespace,
            service_account,
            ..
        } = self;
        format!("spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}")
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;

    #[test]
    fn the_octets_on_the_wire_stay_as_they_are() {
        let binding = Binding {
            name: "web-1".into(),
            namespace: "shop".into(),
            uid: "u".into(),
            service_account: "web".into(),
            trust_domain: "td".into(),
            addresses: vec!["10.0.0.1".into()],
            node: "n".into(),
            dpu: "d".into(),
            ready: true,
            labels: [("a".to_owned(), "b".to_owned())].into(),
        };
        let octets = b"\x0a\x05web-1\x12\x04shop\x1a\x01u\x22\x03web\x2a\x02td\x32\x0810.0.0.1\x3a\x01n\x42\x01d\x48\x01\x52\x06\x0a\x01a\x12\x01b";
        assert_eq!(binding.encode_to_vec(), octets);
        assert_eq!(Binding::decode(&octets[..]).unwrap(), binding);
        assert_eq!(binding.resource_name(), "shop/web-1");
        assert_eq!(binding.spiffe_id(), "spiffe://td/ns/shop/sa/web");

        let peer = Peer {
            node: "n".into(),
            tunnel_endpoint: "192.0.2.1".into(),
            addresses: vec!["10.0.0.1".into()],
            pod_cidrs: vec!["10.0.0.0/24".into()],
        };
        let octets = b"\x0a\x01n\x12\x09192.0.2.1\x1a\x0810.0.0.1\x22\x0b10.0.0.0/24";
        assert_eq!(peer.encode_to_vec(), octets);
        assert_eq!(Peer::decode(&octets[..]).unwrap(), peer);
    }
}
