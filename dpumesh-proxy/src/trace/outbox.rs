//! A worker's spans on their way to their collectors.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use tokio::time::timeout;

use super::otlp::{EXPORT, ExportRequest, Resource, ResourceSpans, ScopeSpans, Span, attribute};
use super::{Exporter, Way, zipkin};
use crate::callout;
use crate::stats::Tracer as Stat;
use crate::worker::{Peer, Worker};

/// So many spans go at once.
const SOME: usize = 512;

/// How long the first one waits for more.
const PATIENCE: Duration = Duration::from_secs(1);

/// Octets of a collector's answer.
const LONGEST_ANSWER: usize = 64 * 1024;

/// Spans that wait, by exporter.
#[derive(Debug, Default)]
pub(crate) struct Outbox(RefCell<HashMap<usize, Vec<Span>>>);

impl Outbox {
    /// Takes a span; there is a task that sends it. Where too many wait it is dropped.
    pub(crate) fn put(worker: &Rc<Worker>, exporter: &Arc<Exporter>, peer: &Peer, span: Span) {
        let mut waiting = worker.spans.0.borrow_mut();
        let spans = waiting.entry(key(exporter)).or_default();
        if spans.len() >= exporter.most {
            exporter.stats.inc(worker.shard, Stat::SpansDropped);
            return;
        }
        spans.push(span);
        if spans.len() == 1 {
            let (worker, exporter) = (Rc::clone(worker), Arc::clone(exporter));
            let peer = callout::asks_for(peer, None);
            tokio::task::spawn_local(async move {
                tokio::time::sleep(PATIENCE).await;
                send(&worker, &exporter, &peer).await;
            });
        }
    }
}

fn key(exporter: &Arc<Exporter>) -> usize {
    Arc::as_ptr(exporter) as usize
}

/// Sends what waits, some at a time.
async fn send(worker: &Rc<Worker>, exporter: &Arc<Exporter>, peer: &Peer) {
    let all = worker
        .spans
        .0
        .borrow_mut()
        .remove(&key(exporter))
        .unwrap_or_default();
    for spans in all.chunks(SOME) {
        let count = spans.len() as u64;
        let member = match export(worker, exporter, peer, spans).await {
            Ok(()) => Stat::SpansSent,
            Err(error) => {
                tracing::debug!(cluster = %exporter.cluster.name, %error, "spans were not taken");
                Stat::SpansDropped
            }
        };
        exporter.stats.add(worker.shard, member, count);
    }
}

async fn export(
    worker: &Rc<Worker>,
    exporter: &Exporter,
    peer: &Peer,
    spans: &[Span],
) -> std::io::Result<()> {
    let program = worker.program();
    let lane = program.config.cluster_index(&exporter.cluster.name);
    let lane = lane.and_then(|index| program.lanes.get(index)).map(Rc::clone);
    let lane = lane.ok_or_else(|| std::io::Error::other("there is no such cluster"))?;
    let request = match &exporter.way {
        Way::Otlp => otlp_request(exporter, spans),
        Way::Zipkin(path) => zipkin::request(exporter, path, spans),
    };
    let call = callout::call(Rc::clone(worker), lane, peer.clone(), request, LONGEST_ANSWER);
    let answer = timeout(exporter.timeout.unwrap_or(Duration::MAX), call).await;
    let answer = answer.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))?;
    match &exporter.way {
        Way::Otlp => answer.grpc_message().map(|_| ()),
        Way::Zipkin(_) if matches!(answer.status, 200..=299) => Ok(()),
        Way::Zipkin(_) => Err(std::io::Error::other(format!("status {}", answer.status))),
    }
}

fn otlp_request(exporter: &Exporter, spans: &[Span]) -> Vec<u8> {
    let resource = Resource {
        attributes: vec![
            attribute("service.name", exporter.service.as_str()),
            attribute("telemetry.sdk.language", "rust"),
            attribute("telemetry.sdk.name", env!("CARGO_PKG_NAME")),
            attribute("telemetry.sdk.version", env!("CARGO_PKG_VERSION")),
        ],
    };
    let request = ExportRequest {
        resource_spans: vec![ResourceSpans {
            resource: Some(resource),
            scope_spans: vec![ScopeSpans {
                spans: spans.to_vec(),
            }],
        }],
    };
    let authority = Some(exporter.authority.as_str()).filter(|a| !a.is_empty());
    let authority = authority.unwrap_or(&exporter.cluster.name);
    callout::grpc_request(EXPORT, authority, &exporter.metadata, &request.encode_to_vec())
}
