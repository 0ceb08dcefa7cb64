//! Counts what a request came to, and writes the access log's line.

use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use super::reported::grpc_status;
use super::view::forwarded_for;
use super::{Outcome, Session};
use crate::access_log::{About, Extra, Headers, Record};
use crate::http1::head::{FieldKind, Framing};
use crate::http1::rewrite::{self, Rewrite};
use crate::route::HeaderChanges;
use crate::stats::Http as Stat;
use crate::worker::Buffers;

impl Session {
    pub(super) fn count(&self, outcome: &Outcome) {
        let (stats, shard) = (&self.manager.stats, self.worker.shard);
        stats.inc(shard, Stat::RqCompleted);
        let class = match outcome.status {
            101 => Stat::Rq1xx,
            200..=299 => Stat::Rq2xx,
            300..=399 => Stat::Rq3xx,
            400..=499 => Stat::Rq4xx,
            500..=599 => Stat::Rq5xx,
            _ => return,
        };
        stats.inc(shard, class);
    }

    /// Logs a request that was read; `wall` and `begun` are the same moment.
    pub(super) fn log_request(
        &self,
        buffers: &Buffers,
        rewrite: &Rewrite<'_>,
        outcome: &Outcome,
        (wall, begun): (SystemTime, Instant),
    ) {
        let request = LoggedRequest { buffers, rewrite };
        let response = LoggedResponse {
            buffers,
            service_ms: rewrite.service_ms.as_deref(),
        };
        let mut record = self.record(outcome, wall, begun.elapsed());
        record.request = Some(&request);
        record.response = outcome.has_response.then_some(&response as &dyn Headers);
        record.protocol = Some(self.protocol(buffers));
        record.cluster = outcome.cluster.as_deref();
        if self.manager.access_log.iter().any(|log| log.asks_for_host_name()) {
            let mut clusters = self.program.config.clusters.iter();
            let cluster = clusters.find(|c| Some(&*c.name) == outcome.cluster.as_deref());
            record.extra.endpoints = cluster.map_or(&[], |c| &c.endpoints);
        }
        record.route = rewrite.route_name;
        record.extra.request_remote = forwarded_for(buffers);
        record.extra.grpc = grpc_status(buffers, outcome);
        record.extra.is_grpc = buffers.is_grpc();
        if buffers.request.fields.framing == Framing::None {
            record.extra.times.request_complete = Some(Duration::ZERO);
        }
        record.extra.attempts = if outcome.upstream.is_some() {
            rewrite.attempt
        } else {
            0
        };
        self.log(&record);
    }

    /// Header changes with their values made for this request, if any of them depends on it.
    pub(super) fn rendered(
        &self,
        buffers: &Buffers,
        rewrite: &Rewrite<'_>,
        changes: &HeaderChanges,
    ) -> Option<Box<HeaderChanges>> {
        if !changes.has_templates() {
            return None;
        }
        let request = LoggedRequest { buffers, rewrite };
        let outcome = Outcome::new(0, "");
        let mut record = self.record(&outcome, SystemTime::now(), Duration::ZERO);
        record.request = Some(&request);
        record.protocol = Some(self.protocol(buffers));
        record.extra.request_remote = forwarded_for(buffers);
        record.extra.about = About::Nothing;
        Some(Box::new(changes.rendered(&record)))
    }

    pub(super) fn record<'r>(
        &'r self,
        outcome: &'r Outcome,
        start: SystemTime,
        duration: Duration,
    ) -> Record<'r> {
        Record {
            start,
            duration,
            request: None,
            response: None,
            protocol: None,
            status: outcome.status,
            flags: outcome.flags,
            received: outcome.received,
            sent: outcome.sent,
            upstream: outcome.upstream,
            cluster: None,
            route: None,
            remote: self.peer.remote,
            direct_remote: self.peer.direct_remote,
            local: self.peer.local,
            direct_local: self.peer.direct_local,
            ingress: self.peer.ingress,
            extra: Extra {
                details: Some(&*outcome.details).filter(|d| !d.is_empty()),
                besides: outcome.besides,
                server_name: self.peer.connection.server_name.as_deref(),
                upstream_local: outcome.upstream_local,
                transport_failure: outcome.transport_failure.as_deref(),
                trailers: outcome.trailers.as_deref(),
                connection: Some(&self.peer.connection),
                connection_id: Some(self.peer.id),
                about: About::Request,
                chain: Some(&self.place.chain.name),
                upstream_protocol: outcome.upstream_protocol,
                upstream_peer: outcome.principal.as_deref(),
                times: outcome.times,
                ..Extra::default()
            },
        }
    }

    pub(super) fn protocol(&self, buffers: &Buffers) -> &'static str {
        if self.stream.is_http2() {
            "HTTP/2"
        } else if buffers.request.fields.http11 {
            "HTTP/1.1"
        } else {
            "HTTP/1.0"
        }
    }

    pub(super) fn log(&self, record: &Record<'_>) {
        let mut lines = self.worker.lines.borrow_mut();
        self.manager
            .access_log
            .iter()
            .for_each(|log| log.log(record, &mut lines));
    }
}

struct LoggedRequest<'a> {
    buffers: &'a Buffers,
    rewrite: &'a Rewrite<'a>,
}

impl Headers for LoggedRequest<'_> {
    fn header(&self, name: &[u8]) -> Option<&[u8]> {
        let head = self.buffers.request_in.head();
        let request = &self.buffers.request;
        match name {
            b":method" => Some(request.method.of_head(head)),
            b":path" => {
                let path = self
                    .rewrite
                    .path
                    .as_deref()
                    .unwrap_or_else(|| rewrite::path(self.buffers));
                Some(path).filter(|p| !p.is_empty())
            }
            b"x-envoy-original-path" if self.rewrite.path.is_some() => Some(rewrite::path(self.buffers)),
            b"x-envoy-original-host" if self.rewrite.host.is_some() => {
                let asked = request.authority.of_head(head);
                let asked = if asked.is_empty() {
                    self.rewrite.default_host
                } else {
                    Some(asked)
                };
                asked.filter(|a| !a.is_empty())
            }
            b":authority" | b"host" => {
                let authority = self.rewrite.host.or(self.rewrite.default_host);
                Some(authority.unwrap_or_else(|| request.authority.of_head(head))).filter(|a| !a.is_empty())
            }
            b":scheme" => Some(b"http"),
            b"x-request-id" if self.rewrite.made_id => Some(&self.rewrite.request_id),
            name => request.fields.get(head, name),
        }
    }
}

struct LoggedResponse<'a> {
    buffers: &'a Buffers,
    service_ms: Option<&'a [u8]>,
}

impl Headers for LoggedResponse<'_> {
    fn header(&self, name: &[u8]) -> Option<&[u8]> {
        let head = self.buffers.response_in.head();
        match name {
            b"x-envoy-upstream-service-time" => self.service_ms,
            name => {
                let response = &self.buffers.response.fields;
                let field = response.fields.iter().find(|f| f.name.of_head(head) == name)?;
                (field.kind != FieldKind::Hop).then(|| field.value.of_head(head))
            }
        }
    }
}
