//! [`Trace`]: what a backend was asked, how long it took and what came of it, as `tracing` data.
//!
//! Control calls are spans at `DEBUG` with an event at their end; one that was dropped before its end says so. Data-path
//! calls are events at `TRACE`, and cost one comparison while that level is off. Failures are events at `WARN` with kind
//! and effect. Fields: `method`, `items`, `elapsed_us`, `kind`, `effect`, `error`.

use std::sync::Arc;
use std::time::Instant;

use dpumesh_core::steering::{Batch, BatchOutcome};
use dpumesh_core::{Backend, Event, Fence, FlowSteering, Result};
use tracing::{Instrument, Level};

use super::around::{Around, Call, Layer};

/// A backend whose calls are traced.
pub type Trace = Around<Tracing>;

/// The layer of [`Trace`].
#[derive(Debug)]
pub struct Tracing {
    backend: String,
}

impl Trace {
    /// Traces a backend.
    pub fn new(inner: Arc<dyn Backend>) -> Self {
        let backend = inner.info().name;
        Self::with_layer(inner, Tracing { backend })
    }
}

impl Layer for Tracing {
    async fn around<'a, T: Send + 'a>(
        &'a self,
        call: Call,
        run: impl Future<Output = Result<T>> + Send + 'a,
    ) -> Result<T> {
        let span = tracing::debug_span!(
            "backend_call",
            backend = self.backend,
            method = call.method,
            items = call.items
        );
        async {
            let ending = Ending::new(call);
            let result = run.await;
            ending.told(&result);
            result
        }
        .instrument(span)
        .await
    }

    fn inline<T>(&self, call: Call, run: impl FnOnce() -> Result<T>) -> Result<T> {
        let result = run();
        match &result {
            Ok(_) => tracing::trace!(
                backend = self.backend,
                method = call.method,
                items = call.items,
                "done"
            ),
            Err(error) => tracing::warn!(backend = self.backend, method = call.method, %error, "failed"),
        }
        result
    }

    /// As any call, and an event for each operation that failed.
    async fn around_apply<'a>(
        &'a self,
        call: Call,
        steering: &'a dyn FlowSteering,
        fence: Fence,
        batch: &'a Batch,
    ) -> Result<BatchOutcome> {
        let outcome = self.around(call, steering.apply(fence, batch)).await?;
        for error in outcome.results.iter().filter_map(|result| result.as_ref().err()) {
            tracing::warn!(backend = self.backend, method = call.method, kind = ?error.kind, %error, "operation failed");
        }
        Ok(outcome)
    }

    fn event(&self, event: &Event) {
        tracing::debug!(backend = self.backend, ?event, "event");
    }
}

/// Says how a call ended, dropped calls included.
struct Ending {
    call: Call,
    began: Option<Instant>,
    told: bool,
}

impl Ending {
    fn new(call: Call) -> Self {
        Self {
            call,
            began: tracing::enabled!(Level::DEBUG).then(Instant::now),
            told: false,
        }
    }

    fn told<T>(mut self, result: &Result<T>) {
        self.told = true;
        let elapsed_us = self.elapsed_us();
        match result {
            Ok(_) => tracing::debug!(method = self.call.method, elapsed_us, "done"),
            Err(error) => tracing::warn!(
                method = self.call.method,
                elapsed_us,
                kind = ?error.kind,
                effect = ?error.effect,
                %error,
                "failed"
            ),
        }
    }

    fn elapsed_us(&self) -> Option<u64> {
        self.began.map(|began| began.elapsed().as_micros() as u64) // half a million years
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        if !self.told {
            let elapsed_us = self.elapsed_us();
            tracing::warn!(method = self.call.method, elapsed_us, "dropped before its end");
        }
    }
}
