//! The admin page: `/status` (JSON), `/ready`. For a loopback address: it has no authentication.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::routing::get;
use axum::{Json, Router};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;

use super::{Shown, relay};
use crate::{client, server};

/// What there is to show.
#[derive(Debug, Clone)]
pub struct Page {
    /// Of the adapter.
    pub shown: watch::Receiver<Shown>,
    /// Of its streams to istiod.
    pub streams: Arc<client::Counters>,
    /// Of its streams to proxies.
    pub proxies: Arc<server::Counters>,
    /// Of the certificate relay.
    pub relay: Arc<relay::Counters>,
}

impl Page {
    /// Everything, as `/status` gives it.
    pub fn status(&self) -> Value {
        let shown = self.shown.borrow().clone();
        let n = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (streams, proxies, relay) = (&self.streams, &self.proxies, &self.relay);
        json!({
            "generation": shown.generation,
            "pods": shown.pods,
            "proxies": shown.proxies,
            "aggregate": {
                "pods": shown.figures.pods,
                "outbound_profiles": shown.figures.outbound_profiles,
                "resources_in": shown.figures.resources_in,
                "resources_out": shown.figures.resources_out,
                "octets": shown.octets,
            },
            "istiod": {
                "streams": n(&streams.streams), "broken": n(&streams.broken), "responses": n(&streams.responses),
                "resources": n(&streams.resources), "acks": n(&streams.acks), "nacks": n(&streams.nacks),
            },
            "proxy": {
                "streams": n(&proxies.streams), "responses": n(&proxies.responses), "resources": n(&proxies.resources),
                "acks": n(&proxies.acks), "nacks": n(&proxies.nacks), "events_lost": n(&proxies.events_lost),
            },
            "certificates": {"signed": n(&relay.signed), "refused": n(&relay.refused), "failed": n(&relay.failed)},
        })
    }

    /// Serves until dropped.
    ///
    /// # Errors
    /// Those of the listener.
    pub async fn serve(self, listener: TcpListener) -> std::io::Result<()> {
        let routes = Router::new()
            .route("/status", get(move || async move { Json(self.status()) }))
            .route(
                "/ready",
                get(|| async { Json(BTreeMap::from([("ready", true)])) }),
            );
        axum::serve(listener, routes).await
    }
}
