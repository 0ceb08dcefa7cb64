//! Spans as Zipkin takes them (its API's version 2, JSON).

use serde_json::{Value, json};

use super::Exporter;
use super::b3::{span_text, trace_text};
use super::otlp::{CLIENT, Span};

/// The request that hands spans in, in text.
pub(super) fn request(exporter: &Exporter, path: &str, spans: &[Span]) -> Vec<u8> {
    let all: Vec<Value> = spans.iter().map(|one| span(exporter, one)).collect();
    let body = Value::Array(all).to_string();
    let host = Some(exporter.authority.as_str()).filter(|host| !host.is_empty());
    let host = host.unwrap_or(&exporter.cluster.name);
    let length = body.len();
    format!("POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}").into_bytes()
}

fn span(exporter: &Exporter, span: &Span) -> Value {
    let trace: [u8; 16] = span.trace_id.as_slice().try_into().unwrap_or_default();
    let tags: serde_json::Map<String, Value> = span
        .attributes
        .iter()
        .map(|a| {
            (
                a.key.clone(),
                a.value.clone().unwrap_or_default().string_value.into(),
            )
        })
        .collect();
    let begun = span.start_time_unix_nano / 1000;
    let mut value = json!({
        "traceId": trace_text(&trace),
        "id": span_text(&span.span_id),
        "kind": if span.kind == CLIENT { "CLIENT" } else { "SERVER" },
        "name": span.name,
        "timestamp": begun,
        "duration": (span.end_time_unix_nano / 1000).saturating_sub(begun).max(1),
        "localEndpoint": {"serviceName": exporter.service},
        "tags": tags,
    });
    if !span.parent_span_id.is_empty() {
        value["parentId"] = span_text(&span.parent_span_id).into();
    }
    value
}
