//! What metadata says of services and workloads, for Istio's metrics ([`crate::istio`]).

use std::net::IpAddr;
use std::sync::Arc;

use prost_reflect::Value;

use super::model::Service;
use super::schema::At;
use super::translate::{Fields, Result, fields, metadata};
use crate::istio::{Metrics, Pod, WORKLOADS, Workload};

/// The service a cluster stands for: the first of `istio`, `services`.
pub(super) fn service(cluster: &At) -> Option<Service> {
    let own = metadata(cluster, "istio");
    let (_, services) = own.iter().find(|(key, _)| key == "services")?;
    let list = at(services)?.message("list_value")?;
    let first = fields(&list.messages("values").first()?.message("struct_value")?);
    let host = text(&first, "host");
    let name = Some(text(&first, "name")).filter(|n| !n.is_empty());
    Some(Service {
        name: name.unwrap_or_else(|| host.split('.').next().unwrap_or_default().to_owned()),
        namespace: text(&first, "namespace"),
        host,
    })
}

/// Who serves at an endpoint: `istio`, `workload`.
pub(super) fn workload(endpoint: &At) -> Option<Arc<Workload>> {
    let text = text(&metadata(endpoint, "istio"), "workload");
    Workload::of_endpoint(&text).map(Arc::new)
}

/// Who local pods are.
pub(super) fn workloads(cluster: &At, metrics: &Metrics) -> Result<Vec<(IpAddr, Arc<Pod>)>> {
    let mut pods = Vec::new();
    for (name, value) in metadata(cluster, WORKLOADS) {
        let path = format!("metadata.filter_metadata[{WORKLOADS}].{name}");
        let said = at(&value).and_then(|v| v.message("struct_value"));
        let Some(said) = said.map(|s| fields(&s)) else {
            return Err(cluster.refuse(&path, "must be a struct"));
        };
        let known = |key: &str| text(&said, key);
        let addresses = known("addresses");
        let parsed: std::result::Result<Vec<IpAddr>, _> = addresses.split(',').map(str::parse).collect();
        let Ok(parsed) = parsed else {
            return Err(cluster.refuse(&path, "addresses must be IP addresses, with commas between them"));
        };
        let workload = Workload {
            name: known("workload"),
            namespace: known("namespace"),
            canonical: known("canonical_name"),
            revision: known("canonical_revision"),
            cluster: known("cluster"),
            app: known("app"),
            version: known("version"),
        };
        let pod = metrics.pod(&name, &addresses, workload);
        pods.extend(parsed.into_iter().map(|ip| (ip.to_canonical(), Arc::clone(&pod))));
    }
    Ok(pods)
}

fn text(of: &Fields, key: &str) -> String {
    let found = of.iter().find(|(k, _)| k == key);
    found
        .and_then(|(_, value)| at(value))
        .map(|value| value.text("string_value"))
        .unwrap_or_default()
}

/// A `google.protobuf.Value`.
fn at(value: &Value) -> Option<At> {
    match value {
        Value::Message(message) => Some(At::new(message.clone(), "")),
        _ => None,
    }
}
