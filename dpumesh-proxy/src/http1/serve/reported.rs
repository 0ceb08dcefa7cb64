//! Istio's metrics of a request.

use std::time::Duration;

use super::{Outcome, Session};
use crate::http1::rewrite::Rewrite;
use crate::istio::{Facts, Protocol, Reporting, Role, Service};
use crate::stats;
use crate::worker::Buffers;

/// Clusters that Istio's metrics call by their own name, whatever service was meant.
const NO_SERVICE: &[&str] = &[
    "BlackHoleCluster",
    "PassthroughCluster",
    "InboundPassthroughCluster",
    "InboundPassthroughClusterIpv4",
    "InboundPassthroughClusterIpv6",
];

impl Session {
    /// Counts a request that was read.
    pub(super) fn report(
        &self,
        buffers: &Buffers,
        rewrite: &Rewrite<'_>,
        outcome: &Outcome,
        reporting: &Reporting,
        duration: Duration,
    ) {
        let head = buffers.request_in.head();
        let is_grpc = buffers.is_grpc();
        let role = reporting.role;
        let said = match role {
            Role::Source if !outcome.has_response => None,
            Role::Source => buffers
                .response
                .fields
                .get(buffers.response_in.head(), b"x-envoy-peer-metadata"),
            Role::Destination => buffers.request.fields.get(head, b"x-envoy-peer-metadata"),
        };
        let mut reporter = self.worker.reporter.borrow_mut();
        let said = said.and_then(|value| reporter.peer(value));
        let connection = &self.peer.connection;
        let (peer_principal, local_principal) = match role {
            Role::Source => (
                outcome.principal.as_deref(),
                connection.certificate.as_deref().filter(|_| outcome.by_tls),
            ),
            Role::Destination => {
                let peer = connection.peer.as_ref().and_then(|p| p.uri_sans.first());
                let local = connection.local.as_ref().and_then(|l| l.uri_sans.first());
                (peer.map(String::as_str), local.map(String::as_str))
            }
        };
        let facts = Facts {
            role,
            protocol: if is_grpc { Protocol::Grpc } else { Protocol::Http },
            status: outcome.status,
            grpc: is_grpc.then(|| grpc_status(buffers, outcome)).flatten(),
            flags: (outcome.flags, outcome.besides),
            service: service(buffers, rewrite, outcome, role),
            peer: said.as_deref().or(outcome.workload.as_deref()),
            peer_principal,
            local_principal,
        };
        let (series, too_many) = reporter.series(self.worker.shard, &reporting.pod, &facts);
        series.request(duration, head.len() as u64 + outcome.received, outcome.wire_sent);
        if too_many {
            self.worker
                .istio
                .inc(self.worker.shard, stats::Istio::SeriesOverflow);
        }
    }
}

/// The service meant: that of the cluster, else, for who calls, the host asked for.
fn service<'a>(
    buffers: &'a Buffers,
    rewrite: &'a Rewrite<'_>,
    outcome: &'a Outcome,
    role: Role,
) -> Service<'a> {
    let mut service = Service::default();
    if role == Role::Source {
        let own = rewrite
            .default_host
            .unwrap_or_else(|| buffers.request.authority.of_head(buffers.request_in.head()));
        let host = rewrite.host.unwrap_or(own);
        service.host = std::str::from_utf8(host).unwrap_or_default();
        service.name = service.host;
    }
    match (rewrite.route_name, &outcome.to) {
        (Some("block_all"), _) => service.name = "BlackHoleCluster",
        (Some("allow_any"), _) => service.name = "PassthroughCluster",
        (_, Some(cluster)) => named(cluster, &mut service),
        _ => {}
    }
    service
}

/// What a cluster says of the service.
pub(crate) fn named<'a>(cluster: &'a crate::config::model::Cluster, service: &mut Service<'a>) {
    // Of a cluster of one pod the name goes on behind `@`.
    let name = cluster.name.split('@').next().unwrap_or_default();
    if NO_SERVICE.contains(&name) {
        service.name = name;
    } else if let Some(own) = &cluster.service {
        *service = Service {
            host: &own.host,
            name: &own.name,
            namespace: &own.namespace,
        };
    }
}

/// gRPC's status: the trailers', else the head's, else what the HTTP status stands for.
pub(super) fn grpc_status(buffers: &Buffers, outcome: &Outcome) -> Option<u32> {
    let number = |value: &[u8]| std::str::from_utf8(value).ok()?.trim().parse().ok();
    let trailers = outcome.trailers.as_deref().unwrap_or_default();
    let trailer = trailers.split(|b| *b == b'\n').find_map(|line| {
        let colon = line.iter().position(|b| *b == b':')?;
        let (name, value) = line.split_at(colon);
        name.eq_ignore_ascii_case(b"grpc-status")
            .then(|| number(&value[1..]))
            .flatten()
    });
    let head = || {
        let fields = &buffers.response.fields;
        let value = fields.get(buffers.response_in.head(), b"grpc-status")?;
        number(value)
    };
    trailer
        .or(outcome.grpc_status)
        .or_else(|| outcome.has_response.then(head).flatten())
        .or(match outcome.status {
            0 => None,
            400 => Some(13),
            401 => Some(16),
            403 => Some(7),
            404 => Some(12),
            429 | 502..=504 => Some(14),
            _ => Some(2),
        })
}
