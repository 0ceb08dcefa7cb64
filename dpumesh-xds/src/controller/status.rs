//! What the controller says of itself, over plain HTTP.
//!
//! | path | answer |
//! |---|---|
//! | `/healthz` | 200 while the program runs |
//! | `/readyz` | 200 once everything was listed and while the watches are whole; otherwise 503 and what is missing |
//! | `/metrics` | counts, in Prometheus' text format |
//! | `/status` | all of it as JSON: counts, broken watches, findings, adapters |

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::{Arc, Mutex, PoisonError};

use axum::Router;
use axum::routing::get;
use http::StatusCode;
use serde::Serialize;

use super::adapters::{Adapters, Health};
use super::plan::Finding;
use super::watch::Facts;

/// What the last plan was made of and what was found.
#[derive(Debug, Clone, Default)]
pub(super) struct Seen {
    pods: usize,
    opted_in: usize,
    nodes: usize,
    namespaces: usize,
    services: usize,
    unlisted: Vec<&'static str>,
    broken: BTreeMap<&'static str, String>,
    findings: Vec<Finding>,
    plans: u64,
}

impl Seen {
    pub(super) fn new(facts: &Facts, findings: Vec<Finding>, plans: u64) -> Self {
        let world = &facts.world;
        Self {
            pods: world.pods.len(),
            opted_in: world.pods.values().filter(|pod| pod.is_opted_in()).count(),
            nodes: world.nodes.len(),
            namespaces: world.namespaces.len(),
            services: world.services.len(),
            unlisted: facts.unlisted.clone(),
            broken: facts.broken.clone(),
            findings,
            plans,
        }
    }
}

/// The page's state.
#[derive(Debug, Default)]
pub(super) struct Status {
    seen: Mutex<Option<Seen>>,
    adapters: Arc<Adapters>,
}

#[derive(Debug, Serialize)]
struct Page {
    ready: bool,
    waiting_for: Vec<String>,
    pods: usize,
    opted_in: usize,
    nodes: usize,
    namespaces: usize,
    services: usize,
    plans: u64,
    findings: Vec<Finding>,
    adapters: BTreeMap<String, Health>,
}

impl Status {
    pub(super) fn new(adapters: Arc<Adapters>) -> Arc<Self> {
        Arc::new(Self {
            seen: Mutex::default(),
            adapters,
        })
    }

    pub(super) fn see(&self, seen: Seen) {
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = Some(seen);
    }

    pub(super) fn routes(self: Arc<Self>) -> Router {
        let (ready, metrics) = (Arc::clone(&self), Arc::clone(&self));
        Router::new()
            .route("/healthz", get(async || "ok\n"))
            .route("/readyz", get(async move || ready.page().readiness()))
            .route("/metrics", get(async move || metrics.page().metrics()))
            .route("/status", get(async move || self.page().json()))
    }

    fn page(&self) -> Page {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let first = seen.is_none().then(|| "the first look at the API".to_owned());
        let seen = seen.unwrap_or_default();
        let unlisted = seen
            .unlisted
            .iter()
            .map(|kind| format!("the first list of {kind}"));
        let broken = seen
            .broken
            .iter()
            .map(|(kind, why)| format!("the watch of {kind}: {why}"));
        let waiting_for: Vec<String> = first.into_iter().chain(unlisted).chain(broken).collect();
        Page {
            ready: waiting_for.is_empty(),
            waiting_for,
            pods: seen.pods,
            opted_in: seen.opted_in,
            nodes: seen.nodes,
            namespaces: seen.namespaces,
            services: seen.services,
            plans: seen.plans,
            findings: seen.findings,
            adapters: self.adapters.health(),
        }
    }
}

impl Page {
    fn readiness(&self) -> (StatusCode, String) {
        if self.ready {
            return (StatusCode::OK, "ready\n".to_owned());
        }
        let text = format!("waiting for {}\n", self.waiting_for.join("; "));
        (StatusCode::SERVICE_UNAVAILABLE, text)
    }

    fn json(&self) -> (StatusCode, [(http::HeaderName, &'static str); 1], String) {
        let kind = [(http::header::CONTENT_TYPE, "application/json")];
        match serde_json::to_string_pretty(self) {
            Ok(text) => (StatusCode::OK, kind, text + "\n"),
            Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, kind, error.to_string()),
        }
    }

    fn metrics(&self) -> String {
        let adapters = self.adapters.values();
        let streams: usize = adapters.clone().map(|health| health.streams).sum();
        let refused: usize = adapters.clone().map(|health| health.refused.len()).sum();
        let acknowledged: u64 = adapters.map(|health| health.acknowledged).sum();
        let gauges: [(&str, &str, usize); 8] = [
            (
                "ready",
                "1 when everything is listed and watched",
                usize::from(self.ready),
            ),
            ("pods", "pods of the cluster", self.pods),
            ("pods_opted_in", "pods whose traffic is a card's", self.opted_in),
            ("nodes", "nodes of the cluster", self.nodes),
            (
                "findings",
                "things that somebody should look at: see /status",
                self.findings.len(),
            ),
            ("adapters", "adapters that ever asked", self.adapters.len()),
            ("adapter_streams", "streams of adapters now", streams),
            (
                "refused_resources",
                "resources that an adapter refused and has not taken since",
                refused,
            ),
        ];
        let mut text = String::new();
        for (name, help, value) in gauges {
            write(&mut text, name, help, "gauge", value as u64);
        }
        write(
            &mut text,
            "acknowledged_total",
            "responses that adapters took",
            "counter",
            acknowledged,
        );
        write(
            &mut text,
            "plans_total",
            "plans made of the cluster",
            "counter",
            self.plans,
        );
        text
    }
}

fn write(text: &mut String, name: &str, help: &str, kind: &str, value: u64) {
    let name = format!("dpumesh_controller_{name}");
    // A String takes everything.
    let _ = write!(
        text,
        "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}\n"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readiness_says_what_is_missing() {
        let status = Status::new(Arc::default());
        assert_eq!(status.page().readiness().0, StatusCode::SERVICE_UNAVAILABLE);
        let mut facts = Facts {
            unlisted: vec!["pods"],
            ..Facts::default()
        };
        status.see(Seen::new(&facts, Vec::new(), 0));
        assert_eq!(
            status.page().readiness().1,
            "waiting for the first list of pods\n"
        );
        facts.unlisted.clear();
        status.see(Seen::new(&facts, Vec::new(), 1));
        assert_eq!(status.page().readiness(), (StatusCode::OK, "ready\n".to_owned()));
        facts.broken.insert("nodes", "connection refused".to_owned());
        status.see(Seen::new(&facts, Vec::new(), 1));
        let (code, text) = status.page().readiness();
        assert_eq!(
            (code, text.as_str()),
            (
                StatusCode::SERVICE_UNAVAILABLE,
                "waiting for the watch of nodes: connection refused\n"
            )
        );
    }

    #[test]
    fn metrics_are_prometheus_text() {
        let status = Status::new(Arc::default());
        let finding = Finding {
            object: "node n1".into(),
            reason: "x".into(),
        };
        status.see(Seen::new(&Facts::default(), vec![finding], 3));
        let text = status.page().metrics();
        assert!(text.contains("\ndpumesh_controller_findings 1\n"), "{text}");
        assert!(
            text.contains(
                "# TYPE dpumesh_controller_plans_total counter\ndpumesh_controller_plans_total 3\n"
            )
        );
    }
}
