//! From what is known of a request to its series: a key of its facts, looked up in the worker's own table.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::peer::Workload;
use super::series::{MOST_SERIES, Pod, Series, escaped};
use crate::access_log::{Besides, join_flags};
use crate::stats::Shard;

/// What peers said of themselves that a worker keeps, at most.
const MOST_PEERS: usize = 1024;

/// Which end of a connection reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The client's proxy.
    Source,
    /// The server's proxy.
    Destination,
}

/// `request_protocol`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP that is no gRPC.
    Http,
    /// gRPC.
    Grpc,
    /// Anything.
    Tcp,
}

/// The service meant. Empty is unknown.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Service<'a> {
    /// `destination_service`.
    pub host: &'a str,
    /// `destination_service_name`.
    pub name: &'a str,
    /// `destination_service_namespace`.
    pub namespace: &'a str,
}

/// What the labels of a request or connection are made of, beside the pod that reports.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'a> {
    /// Who reports.
    pub role: Role,
    /// What was spoken.
    pub protocol: Protocol,
    /// The status sent; 0 if none.
    pub status: u16,
    /// gRPC's status.
    pub grpc: Option<u32>,
    /// Envoy's response flag, and whether `DI` and `URX` go with it.
    pub flags: (&'a str, Besides),
    /// The service.
    pub service: Service<'a>,
    /// The other end.
    pub peer: Option<&'a Workload>,
    /// Whom the other end's certificate names.
    pub peer_principal: Option<&'a str>,
    /// Whom ours names.
    pub local_principal: Option<&'a str>,
}

/// A worker's series.
#[derive(Debug, Default)]
pub struct Reporter {
    series: HashMap<Box<[u8]>, Arc<Series>>,
    /// Pods that have all the series they may have.
    full: HashSet<u64>,
    key: Vec<u8>,
    peers: HashMap<Box<[u8]>, Option<Arc<Workload>>>,
}

impl Reporter {
    /// Forgets everything: pods came or left. Numbers stay with the pods.
    pub fn clear(&mut self) {
        self.series.clear();
        self.full.clear();
    }

    /// The series of these facts, and whether it is the one for what is too much.
    pub fn series(&mut self, shard: Shard, pod: &Pod, facts: &Facts<'_>) -> (&Arc<Series>, bool) {
        let mut key = std::mem::take(&mut self.key);
        write_key(pod, facts, &mut key);
        let mut too_many = false;
        if !self.series.contains_key(&*key) {
            let (fresh, overflow) = self.meet(shard, pod, facts);
            too_many = overflow;
            if overflow {
                write_key(pod, &nobody(facts), &mut key);
            }
            self.series.entry((*key).into()).or_insert(fresh);
        }
        self.key = key;
        (&self.series[&*self.key], too_many)
    }

    fn meet(&mut self, shard: Shard, pod: &Pod, facts: &Facts<'_>) -> (Arc<Series>, bool) {
        let tcp = facts.protocol == Protocol::Tcp;
        if !self.full.contains(&pod.id) {
            match pod.series(shard, &labels(&pod.workload, facts), tcp, MOST_SERIES) {
                Some(series) => return (series, false),
                None => drop(self.full.insert(pod.id)),
            }
        }
        let facts = nobody(facts);
        let mut key = Vec::new();
        write_key(pod, &facts, &mut key);
        let known = self.series.get(&*key).map(Arc::clone);
        let make = || pod.series(shard, &labels(&pod.workload, &facts), tcp, usize::MAX);
        let series = known.or_else(make).expect("without a limit there is always room");
        (series, true)
    }

    /// The workload that the value of `x-envoy-peer-metadata` names.
    pub fn peer(&mut self, header: &[u8]) -> Option<Arc<Workload>> {
        if let Some(known) = self.peers.get(header) {
            return known.clone();
        }
        let read = Workload::of_header(header).map(Arc::new);
        if self.peers.len() >= MOST_PEERS {
            self.peers.clear();
        }
        self.peers.insert(header.into(), read.clone());
        read
    }
}

/// The same with all unknown that others choose: of these there are but a few.
fn nobody<'a>(facts: &Facts<'a>) -> Facts<'a> {
    Facts {
        status: 0,
        grpc: None,
        flags: ("", Besides::default()),
        service: Service::default(),
        peer: None,
        peer_principal: None,
        local_principal: None,
        ..*facts
    }
}

fn write_key(pod: &Pod, facts: &Facts<'_>, key: &mut Vec<u8>) {
    key.clear();
    key.extend_from_slice(&pod.id.to_ne_bytes());
    let (flags, besides) = facts.flags;
    key.extend_from_slice(&[
        facts.role as u8,
        facts.protocol as u8,
        u8::from(besides.delayed),
        u8::from(besides.exhausted),
        u8::from(besides.overflowed),
    ]);
    key.extend_from_slice(&facts.status.to_ne_bytes());
    key.extend_from_slice(&facts.grpc.unwrap_or(u32::MAX).to_ne_bytes());
    let mut text = |text: &str| {
        key.extend_from_slice(text.as_bytes());
        // No UTF-8 text has it.
        key.push(0xff);
    };
    text(flags);
    for part in [facts.service.host, facts.service.name, facts.service.namespace] {
        text(part);
    }
    for part in [facts.peer_principal, facts.local_principal] {
        text(part.unwrap_or_default());
    }
    if let Some(peer) = facts.peer {
        let Workload {
            name,
            namespace,
            canonical,
            revision,
            cluster,
            app,
            version,
        } = peer;
        for part in [name, namespace, canonical, revision, cluster, app, version] {
            text(part);
        }
    }
}

/// The namespace in `spiffe://TD/ns/NAMESPACE/sa/ACCOUNT`.
fn namespace_of(principal: &str) -> Option<&str> {
    let rest = principal.strip_prefix("spiffe://")?;
    let mut parts = rest.split('/').skip(1);
    (parts.next()? == "ns").then(|| parts.next()).flatten()
}

/// The labels in Istio's order, as Prometheus' text has them.
fn labels(own: &Workload, facts: &Facts<'_>) -> String {
    let nobody = Workload::default();
    let peer = facts.peer.unwrap_or(&nobody);
    let san = facts.peer_principal.and_then(namespace_of);
    let peer_namespace = san.filter(|n| !n.is_empty()).unwrap_or(&peer.namespace);
    let (source, destination) = match facts.role {
        Role::Source => (
            End::new(own, &own.namespace, facts.local_principal),
            End::new(peer, peer_namespace, facts.peer_principal),
        ),
        Role::Destination => (
            End::new(peer, peer_namespace, facts.peer_principal),
            End::new(own, &own.namespace, facts.local_principal),
        ),
    };
    // Who serves knows its own service where nobody named it.
    let (service, service_namespace) = match facts.role {
        Role::Source => ("", peer_namespace),
        Role::Destination => (own.canonical.as_str(), own.namespace.as_str()),
    };
    let or = |text: &'_ str, other: &'_ str| if text.is_empty() { other } else { text }.to_owned();
    let reporter = match facts.role {
        Role::Source => "source",
        Role::Destination => "destination",
    };
    let protocol = match facts.protocol {
        Protocol::Http => "http",
        Protocol::Grpc => "grpc",
        Protocol::Tcp => "tcp",
    };
    let mut out = Labels(String::with_capacity(1024));
    out.put("reporter", reporter);
    out.put("source_workload", source.workload.name.as_str());
    out.put("source_canonical_service", &source.workload.canonical);
    out.put(
        "source_canonical_revision",
        &or(&source.workload.revision, "latest"),
    );
    out.put("source_workload_namespace", source.namespace);
    out.put("source_principal", source.principal);
    out.put("source_app", &source.workload.app);
    out.put("source_version", &source.workload.version);
    out.put("source_cluster", &source.workload.cluster);
    out.put("destination_workload", &destination.workload.name);
    out.put("destination_workload_namespace", destination.namespace);
    out.put("destination_principal", destination.principal);
    out.put("destination_app", &destination.workload.app);
    out.put("destination_version", &destination.workload.version);
    out.put("destination_service", &or(facts.service.host, service));
    out.put("destination_canonical_service", &destination.workload.canonical);
    let revision = or(&destination.workload.revision, "latest");
    out.put("destination_canonical_revision", &revision);
    out.put("destination_service_name", &or(facts.service.name, service));
    let namespace = match facts.role {
        Role::Source => or(facts.service.namespace, service_namespace),
        Role::Destination => service_namespace.to_owned(),
    };
    out.put("destination_service_namespace", &namespace);
    out.put("destination_cluster", &destination.workload.cluster);
    out.put("request_protocol", protocol);
    if facts.protocol != Protocol::Tcp {
        out.put("response_code", itoa::Buffer::new().format(facts.status));
        let grpc = facts.grpc.map(|status| status.to_string());
        out.plain("grpc_response_status", grpc.as_deref().unwrap_or_default());
    }
    let (flag, besides) = facts.flags;
    let mut flags = Vec::new();
    join_flags(flag, besides, &mut flags);
    out.put("response_flags", &String::from_utf8_lossy(&flags));
    let mutual = facts.peer_principal.is_some() && facts.local_principal.is_some();
    let security = match facts.role {
        Role::Source => "unknown",
        Role::Destination if mutual => "mutual_tls",
        Role::Destination => "none",
    };
    out.put("connection_security_policy", security);
    out.0
}

/// One end of a connection in the labels.
struct End<'a> {
    workload: &'a Workload,
    namespace: &'a str,
    principal: &'a str,
}

impl<'a> End<'a> {
    fn new(workload: &'a Workload, namespace: &'a str, principal: Option<&'a str>) -> Self {
        Self {
            workload,
            namespace,
            principal: principal.unwrap_or_default(),
        }
    }
}

struct Labels(String);

impl Labels {
    /// A label; what is empty is `unknown`.
    fn put(&mut self, name: &str, value: &str) {
        self.plain(name, if value.is_empty() { "unknown" } else { value });
    }

    fn plain(&mut self, name: &str, value: &str) {
        if !self.0.is_empty() {
            self.0.push(',');
        }
        self.0.push_str(name);
        self.0.push_str("=\"");
        self.0.push_str(&escaped(value));
        self.0.push('"');
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::istio::Metrics;

    fn own() -> Workload {
        Workload {
            name: "front".into(),
            namespace: "shop".into(),
            canonical: "front-svc".into(),
            revision: String::new(),
            cluster: "Kubernetes".into(),
            app: "front".into(),
            version: String::new(),
        }
    }

    fn facts<'a>(role: Role, peer: Option<&'a Workload>) -> Facts<'a> {
        Facts {
            role,
            protocol: Protocol::Http,
            status: 200,
            grpc: None,
            flags: ("", Besides::default()),
            service: Service {
                host: "reviews.shop.svc.cluster.local",
                name: "reviews",
                namespace: "shop",
            },
            peer,
            peer_principal: Some("spiffe://cluster.local/ns/bank/sa/reviews"),
            local_principal: Some("spiffe://cluster.local/ns/shop/sa/front"),
        }
    }

    /// As Istio's own filter has them for such a request.
    #[test]
    fn labels_are_istios() {
        let reviews = Workload::of_endpoint("reviews-v1;bank;reviews;v1;Kubernetes").unwrap();
        assert_eq!(
            labels(&own(), &facts(Role::Source, Some(&reviews))),
            "reporter=\"source\",source_workload=\"front\",source_canonical_service=\"front-svc\",source_canonical_revision=\"latest\",\
             source_workload_namespace=\"shop\",source_principal=\"spiffe://cluster.local/ns/shop/sa/front\",source_app=\"front\",\
             source_version=\"unknown\",source_cluster=\"Kubernetes\",destination_workload=\"reviews-v1\",\
             destination_workload_namespace=\"bank\",destination_principal=\"spiffe://cluster.local/ns/bank/sa/reviews\",\
             destination_app=\"unknown\",destination_version=\"unknown\",destination_service=\"reviews.shop.svc.cluster.local\",\
             destination_canonical_service=\"reviews\",destination_canonical_revision=\"v1\",destination_service_name=\"reviews\",\
             destination_service_namespace=\"shop\",destination_cluster=\"Kubernetes\",request_protocol=\"http\",response_code=\"200\",\
             grpc_response_status=\"\",response_flags=\"-\",connection_security_policy=\"unknown\""
        );
        let mut unknown = facts(Role::Destination, None);
        unknown.service = Service::default();
        unknown.protocol = Protocol::Tcp;
        let text = labels(&own(), &unknown);
        for part in [
            "reporter=\"destination\",source_workload=\"unknown\"",
            "source_canonical_revision=\"latest\",source_workload_namespace=\"bank\"",
            "destination_service=\"front-svc\"",
            "destination_service_name=\"front-svc\",destination_service_namespace=\"shop\"",
            "request_protocol=\"tcp\",response_flags=\"-\",connection_security_policy=\"mutual_tls\"",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        unknown.peer_principal = None;
        assert!(labels(&own(), &unknown).ends_with("connection_security_policy=\"none\""));
        unknown.flags = (
            "UF",
            Besides {
                delayed: true,
                exhausted: true,
                overflowed: false,
            },
        );
        assert!(labels(&own(), &unknown).contains("response_flags=\"URX,UF,DI\""));
    }

    #[test]
    fn equal_facts_are_one_series_and_too_many_are_nobodys() {
        let metrics = Metrics::default();
        let pod = metrics.pod("front-1.shop", "10.0.0.1", own());
        metrics.keep([&pod].into_iter());
        let mut reporter = Reporter::default();
        let shard = Shard::worker(0);
        for round in 0..2 {
            for status in 0..1000 {
                let mut one = facts(Role::Source, None);
                one.status = status;
                let (series, too_many) = reporter.series(shard, &pod, &one);
                assert_eq!(too_many, usize::from(status) >= MOST_SERIES, "{round} {status}");
                series.request(std::time::Duration::ZERO, 1, 1);
            }
        }
        assert_eq!(reporter.series.len(), MOST_SERIES + 1);
        let text = metrics.prometheus(None);
        let counts: Vec<u64> = text
            .lines()
            .filter_map(|l| l.strip_prefix("istio_requests_total{"))
            .filter_map(|l| l.rsplit(' ').next()?.parse().ok())
            .collect();
        assert_eq!(counts.len(), MOST_SERIES + 1);
        assert_eq!(counts.iter().sum::<u64>(), 2000, "none is lost");
        assert_eq!(counts.iter().max(), Some(&1000));
        reporter.clear();
        let first = &facts(Role::Source, None);
        reporter
            .series(shard, &pod, first)
            .0
            .request(std::time::Duration::ZERO, 1, 1);
        assert!(
            metrics.prometheus(None).contains("} 3\n"),
            "the old cells are found again"
        );
    }

    #[test]
    fn a_peers_header_is_read_once() {
        let mut reporter = Reporter::default();
        let (_, value) = super::super::told("front-1.shop", "10.0.0.1", &own());
        let first = reporter.peer(value.as_bytes()).unwrap();
        assert_eq!(*first, own());
        let second = reporter.peer(value.as_bytes()).unwrap();
        assert!(Arc::ptr_eq(&first, &second));
        assert_eq!(reporter.peer(b"*"), None);
        for number in 0..2 * MOST_PEERS {
            reporter.peer(number.to_string().as_bytes());
        }
        assert!(reporter.peers.len() <= MOST_PEERS);
    }
}
