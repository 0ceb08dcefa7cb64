//! A request's place in a trace, and its span.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::{Outcome, Session};
use crate::config::model::HttpManager;
use crate::http1::rewrite::{self, Rewrite};
use crate::stats::Tracing as Stat;
use crate::trace::otlp::{self, KeyValue, Span, attribute};
use crate::trace::outbox::Outbox;
use crate::trace::{self, Context, Headers, PARENT, Place, STATE, Tag, Tracing, b3};
use crate::worker::Buffers;

/// The header that requests are told apart by.
const REQUEST_ID: &[u8] = b"x-request-id";

/// A request that is traced.
#[derive(Debug, Clone, Copy)]
pub(super) struct Traced {
    place: Place,
    begun: SystemTime,
}

impl Session {
    /// Gives the request its place, and tells the endpoint.
    pub(super) fn begin_trace(
        &self,
        buffers: &mut Buffers,
        manager: &HttpManager,
        rewrite: &mut Rewrite<'_>,
    ) -> Option<Traced> {
        let tracing = manager.tracing.as_deref()?;
        let head = buffers.request_in.head();
        let given = buffers.request.fields.get(head, REQUEST_ID).unwrap_or_default();
        let id = if rewrite.made_id {
            &rewrite.request_id
        } else {
            given
        };
        let traced = tracing.is_traced(id);
        let member = if traced {
            Stat::RandomSampling
        } else {
            Stat::NotTraceable
        };
        tracing.stats.inc(self.worker.shard, member);
        match trace::told(id, traced) {
            Some(told) if rewrite.made_id => rewrite.request_id.copy_from_slice(&told),
            Some(told) => {
                buffers.request.fields.remove(head, REQUEST_ID);
                buffers.add_to_request(REQUEST_ID, &told);
            }
            None => {}
        }
        let place = match tracing.headers {
            Headers::W3c => by_w3c(buffers, traced, tracing.hidden),
            Headers::B3 { shared, wide } => by_b3(
                buffers,
                traced,
                (shared && !tracing.outbound, wide),
                tracing.hidden,
            ),
        };
        let begun = SystemTime::now();
        Some(Traced { place, begun })
    }

    /// Hands the span in, if it is recorded.
    pub(super) fn end_trace(
        &self,
        buffers: &Buffers,
        manager: &HttpManager,
        rewrite: &Rewrite<'_>,
        (traced, outcome): (&Traced, &Outcome),
    ) {
        let Some(tracing) = manager.tracing.as_deref() else {
            return;
        };
        if !traced.place.context.sampled {
            return;
        }
        let head = buffers.request_in.head();
        let get = |name: &[u8]| buffers.request.fields.get(head, name).map(lossy);
        let place = &traced.place;
        let host = lossy(
            rewrite
                .default_host
                .unwrap_or_else(|| buffers.request.authority.of_head(head)),
        );
        let kind = if tracing.outbound {
            otlp::CLIENT
        } else {
            otlp::SERVER
        };
        let fails = outcome.status == 0 || outcome.status >= 500;
        let span = Span {
            trace_id: place.context.trace.to_vec(),
            span_id: place.context.span.to_vec(),
            trace_state: get(STATE).unwrap_or_default(),
            parent_span_id: place.parent.map(|id| id.to_vec()).unwrap_or_default(),
            name: match tracing.headers {
                Headers::B3 { .. } => host.clone(),
                Headers::W3c if tracing.outbound => format!("egress {host}"),
                Headers::W3c => "ingress".to_owned(),
            },
            kind,
            start_time_unix_nano: nanoseconds(traced.begun),
            end_time_unix_nano: nanoseconds(SystemTime::now()),
            attributes: self.attributes(buffers, tracing, rewrite, (outcome, &host)),
            status: Some(otlp::Status {
                code: if fails { 2 } else { 0 },
            }),
        };
        Outbox::put(&self.worker, &tracing.exporter, &self.peer, span);
    }

    fn attributes(
        &self,
        buffers: &Buffers,
        tracing: &Tracing,
        rewrite: &Rewrite<'_>,
        (outcome, host): (&Outcome, &str),
    ) -> Vec<KeyValue> {
        let head = buffers.request_in.head();
        let get = |name: &[u8]| buffers.request.fields.get(head, name).map(lossy);
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        let scheme = if self.peer.connection.tls { "https" } else { "http" };
        let path = rewrite::path(buffers);
        let path = lossy(&path[..path.len().min(tracing.longest_path)]);
        let id = if rewrite.made_id {
            Some(lossy(&rewrite.request_id))
        } else {
            get(REQUEST_ID)
        };
        let mut all = vec![
            attribute("node_id", tracing.exporter.node.0.as_str()),
            attribute("zone", ""),
            attribute("guid:x-request-id", id.unwrap_or_default()),
            attribute("http.url", format!("{scheme}://{host}{path}")),
            attribute("http.method", lossy(buffers.request.method.of_head(head))),
            attribute(
                "downstream_cluster",
                or_dash(get(b"x-envoy-downstream-service-cluster")),
            ),
            attribute("user_agent", or_dash(get(b"user-agent"))),
            attribute("http.protocol", self.protocol(buffers)),
            attribute("peer.address", self.peer.remote.ip().to_canonical().to_string()),
            attribute("request_size", outcome.received.to_string()),
            attribute("response_size", outcome.sent.to_string()),
            attribute("component", "proxy"),
        ];
        if buffers.is_grpc() {
            all.push(attribute("grpc.path", lossy(rewrite::path(buffers))));
            all.push(attribute("grpc.authority", host));
            all.push(attribute("grpc.content_type", or_dash(get(b"content-type"))));
            all.extend(get(b"grpc-timeout").map(|timeout| attribute("grpc.timeout", timeout)));
        }
        if let Some(cluster) = &outcome.cluster {
            all.push(attribute("upstream_cluster", &**cluster));
            all.push(attribute("upstream_cluster.name", &**cluster));
        }
        all.push(attribute("http.status_code", outcome.status.to_string()));
        all.push(attribute(
            "response_flags",
            if outcome.flags.is_empty() {
                "-"
            } else {
                outcome.flags
            },
        ));
        if outcome.status == 0 || outcome.status >= 500 {
            all.push(attribute("error", "true"));
        }
        for (name, tag) in &tracing.tags {
            let value = match tag {
                Tag::Literal(value) => value.clone(),
                Tag::Header(header, otherwise) => get(header).unwrap_or_else(|| otherwise.clone()),
            };
            if !value.is_empty() {
                all.push(attribute(name, value));
            }
        }
        all
    }
}

/// The place that `traceparent` says, and the one that the endpoint is told.
fn by_w3c(buffers: &mut Buffers, traced: bool, hidden: bool) -> Place {
    let head = buffers.request_in.head();
    let parent = buffers.request.fields.get(head, PARENT).and_then(Context::parse);
    let place = Place::behind(parent, traced);
    if !hidden {
        if parent.is_none() {
            // Notes of nobody's trace.
            buffers.request.fields.remove(head, STATE);
        }
        buffers.request.fields.remove(head, PARENT);
        buffers.add_to_request(PARENT, &place.context.header());
    }
    place
}

/// The place that B3's headers say, and the one that the endpoint is told.
fn by_b3(buffers: &mut Buffers, traced: bool, kind: (bool, bool), hidden: bool) -> Place {
    let head = buffers.request_in.head();
    let fields = &mut buffers.request.fields;
    let said = b3::Said::parse(|name| fields.get(head, name));
    let place = Place::in_b3(said, traced, kind);
    if hidden {
        return place;
    }
    // One place, told in one way: as it came.
    for name in [b3::SINGLE, b3::TRACE, b3::SPAN, b3::PARENT, b3::SAMPLED] {
        fields.remove(head, name);
    }
    let context = &place.context;
    if said.single {
        buffers.add_to_request(b3::SINGLE, b3::single_text(context, place.parent).as_bytes());
        return place;
    }
    buffers.add_to_request(b3::TRACE, b3::trace_text(&context.trace).as_bytes());
    buffers.add_to_request(b3::SPAN, b3::span_text(&context.span).as_bytes());
    if let Some(parent) = place.parent {
        buffers.add_to_request(b3::PARENT, b3::span_text(&parent).as_bytes());
    }
    buffers.add_to_request(b3::SAMPLED, if context.sampled { b"1" } else { b"0" });
    place
}

fn lossy(octets: &[u8]) -> String {
    String::from_utf8_lossy(octets).into_owned()
}

fn nanoseconds(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
