//! `HttpConnectionManager.tracing` into [`crate::trace`]'s forms.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use super::ConfigError;
use super::balancing::percent;
use super::ext_authz::grpc_called;
use super::model::{Direction, Node, cluster_ref};
use super::schema::At;
use crate::stats::{self, Registry};
use crate::trace::{Exporter, Headers, Tag, Tracing, Way};

type Result<T> = std::result::Result<T, ConfigError>;

/// `max_path_tag_length` where there is none.
const LONGEST_PATH: u32 = 256;

/// `max_cache_size` where there is none.
const MOST_WAITING: u32 = 1024;

/// How long Zipkin may take.
const PATIENCE: Duration = Duration::from_secs(5);

const OPENTELEMETRY: &str = "envoy.config.trace.v3.OpenTelemetryConfig";
const ZIPKIN: &str = "envoy.config.trace.v3.ZipkinConfig";

/// Reads the tracing of a connection manager (`at`) of the statistics prefix `prefix`; `None` without a provider.
pub(super) fn tracing(
    at: &At,
    prefix: &str,
    direction: Option<Direction>,
    node: &Node,
    (registry, clusters): (&Registry, &HashMap<String, usize>),
) -> Result<Option<Arc<Tracing>>> {
    let Some(tracing) = at.message("tracing") else {
        return Ok(None);
    };
    let Some(provider) = tracing.message("provider") else {
        return Ok(None);
    };
    if tracing.flag("spawn_upstream_span") == Some(true) {
        return Err(tracing.refuse("spawn_upstream_span", "true is not supported yet"));
    }
    let Some(config) = provider.any("typed_config")? else {
        return Err(provider.refuse("typed_config", "must be given"));
    };
    let (headers, exporter) = match config.type_name().as_str() {
        OPENTELEMETRY => (Headers::W3c, opentelemetry(&config, node, (registry, clusters))?),
        ZIPKIN => {
            let headers = Headers::B3 {
                shared: config.flag("shared_span_context").unwrap_or(true),
                wide: config.flag("trace_id_128bit").unwrap_or(false),
            };
            (headers, zipkin(&config, node, (registry, clusters))?)
        }
        name => return Err(config.refuse("", format!("{name} is not supported yet"))),
    };
    let share = |field: &str| match tracing.message(field) {
        Some(share) => percent(&share).map(|share| (share * 100.0).round() as u32),
        None => Ok(10_000),
    };
    Ok(Some(Arc::new(Tracing {
        sampled: share("random_sampling")?,
        overall: share("overall_sampling")?,
        longest_path: tracing.number_or("max_path_tag_length", LONGEST_PATH) as usize,
        tags: tracing
            .messages("custom_tags")
            .iter()
            .map(tag)
            .collect::<Result<_>>()?,
        hidden: tracing.flag("no_context_propagation").unwrap_or(false),
        outbound: direction == Some(Direction::Outbound),
        stats: registry.scope(&format!("http.{prefix}.tracing"), stats::Tracing::TABLE),
        headers,
        exporter: Arc::new(exporter),
    })))
}

type Known<'a> = (&'a Registry, &'a HashMap<String, usize>);

fn opentelemetry(at: &At, node: &Node, (registry, clusters): Known<'_>) -> Result<Exporter> {
    let Some(service) = at.message("grpc_service") else {
        return Err(at.refuse("grpc_service", "must be given"));
    };
    let called = grpc_called(&service, clusters)?;
    Ok(Exporter {
        way: Way::Otlp,
        cluster: called.cluster,
        authority: called.authority,
        metadata: called.metadata,
        timeout: called.timeout,
        service: Some(at.text("service_name"))
            .filter(|name| !name.is_empty())
            .unwrap_or_else(|| "unknown_service:envoy".to_owned()),
        node: (node.id.clone(), node.cluster.clone()),
        most: at.number_or("max_cache_size", MOST_WAITING) as usize,
        stats: registry.scope("tracing.opentelemetry", stats::Tracer::TABLE),
    })
}

fn zipkin(at: &At, node: &Node, (registry, clusters): Known<'_>) -> Result<Exporter> {
    let version = at.choice("collector_endpoint_version");
    if version != "HTTP_JSON" {
        return Err(at.refuse(
            "collector_endpoint_version",
            format!("{version} is not supported yet"),
        ));
    }
    if at.choice("trace_context_option") != "USE_B3" {
        return Err(at.refuse("trace_context_option", "only USE_B3 is supported yet"));
    }
    let path = at.required_text("collector_endpoint")?;
    if !path.starts_with('/') || !path.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(at.refuse("collector_endpoint", "must be a path in visible ASCII"));
    }
    let host = at.text("collector_hostname");
    if !host.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(at.refuse("collector_hostname", "must be visible ASCII"));
    }
    Ok(Exporter {
        way: Way::Zipkin(path),
        cluster: cluster_ref(&at.required_text("collector_cluster")?, clusters),
        authority: host,
        metadata: Vec::new(),
        timeout: Some(PATIENCE),
        service: node.cluster.clone(),
        node: (node.id.clone(), node.cluster.clone()),
        most: MOST_WAITING as usize,
        stats: registry.scope("tracing.zipkin", stats::Tracer::TABLE),
    })
}

fn tag(at: &At) -> Result<(String, Tag)> {
    let name = at.required_text("tag")?;
    let value = if let Some(literal) = at.message("literal") {
        Tag::Literal(literal.required_text("value")?)
    } else if let Some(environment) = at.message("environment") {
        let variable = environment.required_text("name")?;
        let value = std::env::var(variable);
        Tag::Literal(value.unwrap_or_else(|_| environment.text("default_value")))
    } else if let Some(header) = at.message("request_header") {
        let name = header.required_text("name")?.to_ascii_lowercase();
        Tag::Header(name.into_bytes(), header.text("default_value"))
    } else {
        return Err(at.refuse(
            "",
            "only literal, environment and request_header are supported yet",
        ));
    };
    Ok((name, value))
}
