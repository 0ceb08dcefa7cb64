//! Who a workload is, and the forms in which that travels: endpoint metadata and the `x-envoy-peer-metadata` header.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use prost::Message as _;

/// The longest header that is read, octets. Istio's own are some hundred.
const LONGEST: usize = 8 * 1024;

const CANONICAL_NAME: &str = "service.istio.io/canonical-name";
const CANONICAL_REVISION: &str = "service.istio.io/canonical-revision";

/// A workload as the metrics' labels name it. Empty is unknown.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Workload {
    /// Deployment or the like.
    pub name: String,
    /// Kubernetes namespace.
    pub namespace: String,
    /// Istio's canonical service.
    pub canonical: String,
    /// Its revision.
    pub revision: String,
    /// The cluster (of machines) it runs in.
    pub cluster: String,
    /// Label `app`.
    pub app: String,
    /// Label `version`.
    pub version: String,
}

impl Workload {
    /// Of endpoint metadata: `workload;namespace;canonical;revision;cluster`.
    pub fn of_endpoint(text: &str) -> Option<Self> {
        let parts: Vec<&str> = text.split(';').collect();
        let [name, namespace, canonical, revision, cluster, ..] = parts[..] else {
            return None;
        };
        Some(Self {
            name: name.to_owned(),
            namespace: namespace.to_owned(),
            canonical: canonical.to_owned(),
            revision: revision.to_owned(),
            cluster: cluster.to_owned(),
            ..Self::default()
        })
    }

    /// Of the value of `x-envoy-peer-metadata`; `None` for what is none.
    pub fn of_header(value: &[u8]) -> Option<Self> {
        if value.len() > LONGEST {
            return None;
        }
        let fields = Fields::decode(&*STANDARD.decode(value).ok()?).ok()?;
        let labels = fields.fields.get("LABELS").and_then(|v| v.fields.as_ref());
        let label = |name: &str| labels.map_or_else(String::new, |l| l.text(name));
        Some(Self {
            name: fields.text("WORKLOAD_NAME"),
            namespace: fields.text("NAMESPACE"),
            canonical: label(CANONICAL_NAME),
            revision: label(CANONICAL_REVISION),
            cluster: fields.text("CLUSTER_ID"),
            app: label("app"),
            version: label("version"),
        })
    }
}

/// What peers are told of a pod (`NAME.NAMESPACE`): the values of `x-envoy-peer-metadata-id` and `x-envoy-peer-metadata`.
pub fn told(pod: &str, address: &str, workload: &Workload) -> (String, String) {
    let value = |text: &str| FieldValue {
        text: Some(text.to_owned()),
        fields: None,
    };
    let set = |all: &[(&str, &str)]| -> BTreeMap<String, FieldValue> {
        let known = all.iter().filter(|(_, text)| !text.is_empty());
        known
            .map(|(key, text)| ((*key).to_owned(), value(text)))
            .collect()
    };
    let (name, namespace) = pod.rsplit_once('.').unwrap_or((pod, ""));
    let labels = set(&[
        ("app", &workload.app),
        ("version", &workload.version),
        (CANONICAL_NAME, &workload.canonical),
        (CANONICAL_REVISION, &workload.revision),
    ]);
    let mut fields = set(&[
        ("NAME", name),
        ("NAMESPACE", &workload.namespace),
        ("WORKLOAD_NAME", &workload.name),
        ("CLUSTER_ID", &workload.cluster),
    ]);
    let labels = FieldValue {
        text: None,
        fields: Some(Fields { fields: labels }),
    };
    fields.insert("LABELS".to_owned(), labels);
    let id = format!("sidecar~{address}~{pod}~{namespace}.svc.cluster.local");
    (id, STANDARD.encode(Fields { fields }.encode_to_vec()))
}

/// `google.protobuf.Struct`, as far as it is read here: texts and structs.
#[derive(Clone, PartialEq, prost::Message)]
struct Fields {
    #[prost(btree_map = "string, message", tag = "1")]
    fields: BTreeMap<String, FieldValue>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct FieldValue {
    #[prost(string, optional, tag = "3")]
    text: Option<String>,
    #[prost(message, optional, tag = "5")]
    fields: Option<Fields>,
}

impl Fields {
    fn text(&self, key: &str) -> String {
        let value = self.fields.get(key).and_then(|v| v.text.clone());
        value.unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn front() -> Workload {
        Workload {
            name: "front".into(),
            namespace: "shop".into(),
            canonical: "front-svc".into(),
            revision: "v2".into(),
            cluster: "Kubernetes".into(),
            app: "front-app".into(),
            version: "2".into(),
        }
    }

    #[test]
    fn what_a_peer_is_told_is_what_it_reads() {
        let (id, value) = told("front-1.shop", "10.0.0.1", &front());
        assert_eq!(id, "sidecar~10.0.0.1~front-1.shop~shop.svc.cluster.local");
        assert_eq!(Workload::of_header(value.as_bytes()), Some(front()));
        let octets = STANDARD.decode(&value).unwrap();
        for end in 0..octets.len() {
            // Some beginnings of a message are messages; none may do harm.
            let _ = Workload::of_header(STANDARD.encode(&octets[..end]).as_bytes());
        }
        for bad in ["*", "AAAA", &"A".repeat(LONGEST + 1)] {
            assert_eq!(Workload::of_header(bad.as_bytes()), None, "{bad:.10}");
        }
        assert_eq!(Workload::of_header(b""), Some(Workload::default()));
    }

    #[test]
    fn endpoint_metadata_has_five_parts() {
        let wanted = Workload {
            app: String::new(),
            version: String::new(),
            ..front()
        };
        let text = "front;shop;front-svc;v2;Kubernetes";
        assert_eq!(Workload::of_endpoint(text), Some(wanted));
        assert_eq!(Workload::of_endpoint("front;shop"), None);
    }
}
