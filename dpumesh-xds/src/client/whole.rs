//! The state-of-the-world protocol as changes: what [`super::state`] asks and is answered in delta messages, said in the other words.
//!
//! A response has everything of its type. What the client has already is left out here by its octets' hash; of clusters and listeners what
//! is missing is gone, of the other types a response may have a part, and nothing is gone but what is no longer asked for.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use crate::discovery::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse, Resource,
    ResourceType,
};

/// What one client has said and heard, by type URL. It outlives streams, but for the nonces.
#[derive(Debug, Default)]
pub(super) struct Whole {
    types: BTreeMap<String, Said>,
}

#[derive(Debug, Default)]
struct Said {
    /// All names asked for.
    names: BTreeSet<String>,
    /// Version of the last response that was taken.
    taken: String,
    /// The last response of this stream: nonce and version.
    last: (String, String),
}

/// What every resource has first: its name.
#[derive(Clone, PartialEq, prost::Message)]
struct Named {
    #[prost(string, tag = "1")]
    name: String,
}

/// A resource with its name beside it, as in xDS since v3.
#[derive(Clone, PartialEq, prost::Message)]
struct Wrapped {
    #[prost(message, optional, tag = "2")]
    resource: Option<prost_types::Any>,
    #[prost(string, tag = "3")]
    name: String,
}

const WRAPPER: &str = "type.googleapis.com/envoy.service.discovery.v3.Resource";

impl Whole {
    /// A stream begins: nonces are its own.
    pub(super) fn begin(&mut self) {
        for said in self.types.values_mut() {
            said.last = <(String, String)>::default();
        }
    }

    /// A request in the other words.
    pub(super) fn request(&mut self, delta: DeltaDiscoveryRequest) -> DiscoveryRequest {
        let said = self.types.entry(delta.type_url.clone()).or_default();
        said.names.extend(delta.resource_names_subscribe);
        for name in &delta.resource_names_unsubscribe {
            said.names.remove(name);
        }
        if !delta.response_nonce.is_empty() && delta.error_detail.is_none() {
            said.taken.clone_from(&said.last.1);
        }
        DiscoveryRequest {
            version_info: said.taken.clone(),
            node: delta.node,
            resource_names: said.names.iter().cloned().collect(),
            type_url: delta.type_url,
            response_nonce: said.last.0.clone(),
            error_detail: delta.error_detail,
        }
    }

    /// A response as changes to what `has` knows: the version of a resource that was taken.
    pub(super) fn response<'a>(
        &mut self,
        response: DiscoveryResponse,
        has: impl Iterator<Item = (&'a str, &'a str)>,
    ) -> DeltaDiscoveryResponse {
        let said = self.types.entry(response.type_url.clone()).or_default();
        said.last = (response.nonce.clone(), response.version_info.clone());
        let has: BTreeMap<&str, &str> = has.collect();
        let mut here = HashSet::new();
        let mut resources = Vec::new();
        for any in response.resources {
            let resource = named(any);
            here.insert(resource.name.clone());
            if has.get(resource.name.as_str()) != Some(&resource.version.as_str()) {
                resources.push(resource);
            }
        }
        let kind = ResourceType::from_url(&response.type_url);
        let whole = kind.is_some_and(ResourceType::is_wildcard);
        let gone = has.keys().filter(|name| whole && !here.contains(**name));
        DeltaDiscoveryResponse {
            system_version_info: response.version_info,
            removed_resources: gone.map(|name| (*name).to_owned()).collect(),
            resources,
            type_url: response.type_url,
            nonce: response.nonce,
        }
    }
}

/// A resource with its name, and a version that its octets make.
fn named(any: prost_types::Any) -> Resource {
    use prost::Message;
    let (name, any) = match (any.type_url == WRAPPER).then(|| Wrapped::decode(any.value.as_slice())) {
        Some(Ok(wrapped)) => (wrapped.name, wrapped.resource.unwrap_or_default()),
        _ => (String::new(), any),
    };
    // What is no message at all has no name here, and is refused where it is read.
    let inner = || {
        Named::decode(any.value.as_slice())
            .map(|named| named.name)
            .unwrap_or_default()
    };
    Resource {
        name: if name.is_empty() { inner() } else { name },
        version: blake3::hash(&any.value).to_hex().to_string(),
        resource: Some(any),
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;
    use crate::discovery::Status;

    const CDS: &str = ResourceType::Cluster.url();
    const EDS: &str = ResourceType::Endpoints.url();

    fn any(name: &str, more: &[u8]) -> prost_types::Any {
        let mut value = Named {
            name: name.to_owned(),
        }
        .encode_to_vec();
        value.extend_from_slice(more);
        prost_types::Any {
            type_url: CDS.to_owned(),
            value,
        }
    }

    fn response(url: &str, version: &str, resources: Vec<prost_types::Any>) -> DiscoveryResponse {
        DiscoveryResponse {
            version_info: version.to_owned(),
            resources,
            type_url: url.to_owned(),
            nonce: format!("n{version}"),
        }
    }

    fn names(resources: &[Resource]) -> Vec<&str> {
        resources.iter().map(|r| r.name.as_str()).collect()
    }

    #[test]
    fn a_response_is_what_changed() {
        let mut whole = Whole::default();
        let first = whole.response(
            response(CDS, "1", vec![any("a", b""), any("b", b"")]),
            std::iter::empty(),
        );
        assert_eq!(
            (names(&first.resources), first.removed_resources.len()),
            (vec!["a", "b"], 0)
        );
        let has: Vec<(&str, &str)> = first
            .resources
            .iter()
            .map(|r| (r.name.as_str(), r.version.as_str()))
            .collect();
        let changed = vec![any("a", b""), any("c", b""), any("b", b"\x12\x00")];
        let second = whole.response(response(CDS, "2", changed), has.iter().copied());
        assert_eq!(names(&second.resources), ["c", "b"]);
        let third = whole.response(response(CDS, "3", vec![any("b", b"")]), has.iter().copied());
        assert_eq!(
            (names(&third.resources), third.removed_resources),
            (vec![], vec!["a".to_owned()])
        );
        // A part of the endpoints says nothing of the others.
        let part = whole.response(response(EDS, "3", vec![any("b", b"")]), has.iter().copied());
        assert!(part.removed_resources.is_empty());
    }

    #[test]
    fn a_wrapped_resource_has_the_wrappers_name() {
        let wrapped = Wrapped {
            resource: Some(any("inner", b"")),
            name: "outer".to_owned(),
        };
        let wrapped = prost_types::Any {
            type_url: WRAPPER.to_owned(),
            value: wrapped.encode_to_vec(),
        };
        let resource = named(wrapped);
        assert_eq!(
            (resource.name.as_str(), resource.resource),
            ("outer", Some(any("inner", b"")))
        );
    }

    #[test]
    fn a_request_has_all_names_and_the_version_that_was_taken() {
        let mut whole = Whole::default();
        let delta = |subscribe: &[&str], unsubscribe: &[&str]| DeltaDiscoveryRequest {
            type_url: EDS.to_owned(),
            resource_names_subscribe: subscribe.iter().map(ToString::to_string).collect(),
            resource_names_unsubscribe: unsubscribe.iter().map(ToString::to_string).collect(),
            ..DeltaDiscoveryRequest::default()
        };
        let said = |request: DiscoveryRequest| {
            let names = request.resource_names.join(" ");
            (names, request.version_info, request.response_nonce)
        };
        let told = |names: &str, version: &str, nonce: &str| (names.into(), version.into(), nonce.into());
        assert_eq!(said(whole.request(delta(&["a", "b"], &[]))), told("a b", "", ""));
        whole.response(response(EDS, "1", vec![]), std::iter::empty());
        let ack = DeltaDiscoveryRequest {
            response_nonce: "n1".into(),
            ..delta(&[], &[])
        };
        assert_eq!(said(whole.request(ack.clone())), told("a b", "1", "n1"));
        assert_eq!(said(whole.request(delta(&["c"], &["a"]))), told("b c", "1", "n1"));
        whole.response(response(EDS, "2", vec![]), std::iter::empty());
        let nack = DeltaDiscoveryRequest {
            error_detail: Some(Status::default()),
            ..ack
        };
        assert_eq!(said(whole.request(nack)), told("b c", "1", "n2"));
        whole.begin();
        assert_eq!(said(whole.request(delta(&["b", "c"], &[]))), told("b c", "1", ""));
    }
}
