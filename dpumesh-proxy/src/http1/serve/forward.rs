//! A request's way to an endpoint: pick one, take a pooled connection or make one, once more if a pooled one was dead.
//!
//! A pooled connection may turn out to be dead before any octet of a response. Then a request is sent again, once, on a
//! new connection, if the endpoint has not seen any of it or if seeing it twice does no harm.

use tokio::time::{Instant, timeout_at};

use super::failure::Failure;
use super::local::{Reply, RequestBody};
use super::{Outcome, Session};
use crate::config::model::HttpManager;
use crate::http1::body::{Flow, Out};
use crate::http1::head::Framing;
use crate::http1::rewrite::{self, Changes, Rewrite};
use crate::route::Forward;
use crate::stats::{Cluster as ClusterStat, Shard};
use crate::upstream::{Lane, NoConnection, Picked, Pooled};
use crate::worker::Buffers;

/// A request on its way to a cluster: what every stage from here on has to know.
pub(super) struct Forwarding<'a, 'r> {
    pub(super) manager: &'a HttpManager,
    pub(super) lane: &'a Lane,
    pub(super) forward: &'a Forward,
    pub(super) changes: Changes<'a>,
    pub(super) rewrite: &'r mut Rewrite<'a>,
    pub(super) begun: Instant,
    /// When the response must be complete.
    pub(super) deadline: Option<Instant>,
}

impl Session {
    /// Forwards the request and answers it, with the endpoint's response or for the endpoint.
    pub(super) async fn forward(&mut self, buffers: &mut Buffers, call: &mut Forwarding<'_, '_>) -> Outcome {
        let (lane, shard) = (call.lane, self.worker.shard);
        let stats = &lane.cluster.stats;
        let Some(picked) = lane.pick(self.peer.local) else {
            stats.inc(shard, ClusterStat::CxNoneHealthy);
            let reply = Reply::new(503, "UH").body("no healthy upstream");
            return self.reply(buffers, reply).await;
        };
        let address = picked.endpoint.address;
        if stats.get(ClusterStat::RqActive) >= u64::from(lane.cluster.limits.max_requests) {
            stats.inc(shard, ClusterStat::RqPendingOverflow);
            let failure = NoConnection::Overflow;
            return self
                .not_connected(buffers, failure, address, RequestBody::Untouched)
                .await;
        }
        let replayable = is_replayable(buffers);
        let mut pooled = lane.take_idle(&picked, self.peer.source, !replayable);
        let mut retried = false;
        // A flow of which nothing was sent yet: it goes on with the next connection.
        let mut kept: Option<Flow> = None;
        let _active = Active::new(lane, shard);
        loop {
            let reused = pooled.is_some();
            let body = kept.as_ref().map_or(RequestBody::Untouched, RequestBody::behind);
            let mut connection = match pooled.take() {
                Some(pooled) => pooled,
                None => match self.connect(call, &picked).await {
                    Ok(Ok(connection)) => connection,
                    Ok(Err(failure)) => return self.not_connected(buffers, failure, address, body).await,
                    Err(failure) => return self.failed(buffers, lane, failure, address, body).await,
                },
            };
            if !retried {
                stats.inc(shard, ClusterStat::RqTotal);
            }
            let begun = kept.take().map_or_else(|| begin(buffers, call), Ok);
            let mut flow = match begun {
                Ok(flow) => flow,
                Err(failure) => {
                    return self
                        .failed(buffers, lane, failure, address, RequestBody::Begun)
                        .await;
                }
            };
            match self.exchange(buffers, call, &mut connection, &mut flow).await {
                Ok(sent) => {
                    let response = self.respond(buffers, call, &picked, connection, flow, sent);
                    let mut outcome = response.await;
                    if retried {
                        stats.inc(shard, ClusterStat::RqRetrySuccess);
                    }
                    outcome.upstream = Some(address);
                    return outcome;
                }
                Err(Failure::Upstream { answered: false })
                    if reused && !retried && (replayable || flow.untouched()) =>
                {
                    retried = true;
                    stats.inc(shard, ClusterStat::RqRetry);
                    kept = Some(flow).filter(Flow::untouched);
                }
                Err(failure) => {
                    let body = RequestBody::behind(&flow);
                    return self.failed(buffers, lane, failure, address, body).await;
                }
            }
        }
    }

    /// A new connection; the outer error is the request's own deadline.
    async fn connect(
        &self,
        call: &Forwarding<'_, '_>,
        picked: &Picked,
    ) -> Result<Result<Pooled, NoConnection>, Failure> {
        let attempt = call.lane.connect(picked, self.peer.source);
        match call.deadline {
            Some(at) => timeout_at(at, attempt).await.map_err(|_| Failure::Timeout),
            None => Ok(attempt.await),
        }
    }
}

/// Writes the request's head, and what is there of its body, to the buffer for the endpoint.
fn begin(buffers: &mut Buffers, call: &mut Forwarding<'_, '_>) -> Result<Flow, Failure> {
    buffers.request_out.clear();
    let expected = call.deadline.map(|at| at - call.begun);
    rewrite::request_head(buffers, call.manager, call.rewrite, &call.changes, expected);
    let framing = buffers.request.fields.framing;
    let out = if framing == Framing::Chunked {
        Out::Chunked
    } else {
        Out::Plain
    };
    let mut flow = Flow::new(framing, out);
    flow.prefill(&mut buffers.request_in, &mut buffers.request_out)
        .map_err(Failure::from_client)?;
    Ok(flow)
}

/// Whether the request may be sent a second time without harm (RFC 9110, 9.2.2) and without having been kept.
fn is_replayable(buffers: &Buffers) -> bool {
    let method = buffers.request.method.of_head(buffers.request_in.head());
    buffers.request.fields.framing == Framing::None
        && matches!(
            method,
            b"GET" | b"HEAD" | b"OPTIONS" | b"TRACE" | b"PUT" | b"DELETE"
        )
}

/// Counts a request as active in its cluster.
struct Active<'a>(&'a Lane, Shard);

impl<'a> Active<'a> {
    fn new(lane: &'a Lane, shard: Shard) -> Self {
        lane.cluster.stats.inc(shard, ClusterStat::RqActive);
        Self(lane, shard)
    }
}

impl Drop for Active<'_> {
    fn drop(&mut self) {
        self.0.cluster.stats.dec(self.1, ClusterStat::RqActive);
    }
}
