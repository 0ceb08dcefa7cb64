//! A request's way to an endpoint: pick one, take a pooled connection or make one; again, where the route says so.
//!
//! A pooled connection may turn out to be dead before any octet of a response. Then a request is sent again, once, on a
//! new connection, if the endpoint has not seen any of it or if seeing it twice does no harm. That is no retry in the
//! sense of the route's policy; where the policy covers the case, it alone decides.

use std::cell::Cell;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use super::attempts::{Attempts, can_be_sent_again, takes_rest_of_response};
use super::failure::{Broken, Failure};
use super::local::{Reply, RequestBody};
use super::tunnel::opens;
use super::{Outcome, Session};
use crate::alarm::{Alarm, earlier};
use crate::balance::Ask;
use crate::config::model::HttpManager;
use crate::health::outlier::Outcome as Noted;
use crate::http1::body::{Flow, Out};
use crate::http1::copy::Writer;
use crate::http1::head::Framing;
use crate::http1::rewrite::{self, Changes, Rewrite};
use crate::route::Forward;
use crate::route::upgrade::Tunnel;
use crate::stats::Cluster as ClusterStat;
use crate::upstream::{Active, Lane, NoConnection, Picked, Pooled};
use crate::worker::{Buffers, Peer};

/// A request on its way to a cluster: what every stage from here on has to know.
pub(super) struct Forwarding<'a, 'r> {
    pub(super) manager: &'a HttpManager,
    pub(super) lane: &'a Lane,
    /// Which endpoints come into question.
    pub(super) ask: Ask<'r>,
    pub(super) forward: &'a Forward,
    pub(super) changes: Changes<'r>,
    pub(super) rewrite: &'r mut Rewrite<'a>,
    pub(super) begun: Instant,
    /// When all of the request had come, and when all of it had been sent.
    pub(super) complete: Cell<Option<Instant>>,
    pub(super) sent: Cell<Option<Instant>>,
    /// When the response must be complete.
    pub(super) deadline: Option<Instant>,
    /// When the response to this attempt must have begun.
    pub(super) try_deadline: Option<Instant>,
    /// When all of the exchange must be over.
    pub(super) stream_end: Option<Instant>,
    /// When all of this attempt must be over, as the cluster has it.
    pub(super) attempt_end: Option<Instant>,
    /// Octets of the head that stands in the buffer for the endpoint.
    pub(super) head_length: usize,
    /// Who gets a copy of the body.
    pub(super) copies: Vec<Writer>,
}

impl Forwarding<'_, '_> {
    /// All of the request has been sent, and so had come.
    pub(super) fn note_sent(&self) {
        let now = Instant::now();
        self.sent.set(Some(now));
        if self.complete.get().is_none() {
            self.complete.set(Some(now));
        }
    }
}

impl Forwarding<'_, '_> {
    /// Ready when what may take its time no longer may: a limit on the exchange as a whole has passed.
    pub(super) fn poll_end(&self, cx: &mut Context<'_>, alarm: &mut Alarm) -> Poll<Failure> {
        ready!(alarm.poll(cx, earlier(self.stream_end, self.attempt_end)));
        let whole = self.stream_end.is_some_and(|at| Instant::now() >= at);
        Poll::Ready(if whole {
            Failure::StreamDuration
        } else {
            Failure::AttemptDuration
        })
    }

    /// Which limit a wait has come to an end by.
    fn passed(&self) -> Failure {
        match (self.deadline, self.stream_end) {
            (Some(deadline), Some(end)) if end < deadline => Failure::StreamDuration,
            (None, Some(_)) => Failure::StreamDuration,
            _ => Failure::Timeout,
        }
    }
}

impl Session {
    /// Forwards the request and answers it, with the endpoint's response or for the endpoint.
    pub(super) async fn forward(&mut self, buffers: &mut Buffers, call: &mut Forwarding<'_, '_>) -> Outcome {
        let (lane, shard) = (call.lane, self.worker.shard);
        let stats = &lane.cluster.stats;
        if !call.forward.mirrors.is_empty() && call.rewrite.tunnel.is_none() {
            call.copies = self.begin_mirrors(buffers, call);
        }
        let mut attempts = Attempts::new(call.forward.retry.as_deref());
        // What has been taken of the request's body so far.
        let mut flow: Option<Flow> = None;
        let mut active = None;
        loop {
            let Some(picked) = attempts.pick(lane, &call.ask) else {
                stats.inc(shard, ClusterStat::CxNoneHealthy);
                let reply = Reply::new(503, "UH")
                    .body("no healthy upstream")
                    .because("no_healthy_upstream")
                    .after(RequestBody::behind(flow.as_ref()));
                return self.reply(buffers, reply).await;
            };
            let address = picked.endpoint.address;
            let reported = self.reporting.is_some();
            let workload = || picked.endpoint.workload.clone().filter(|_| reported);
            let turn = if active.is_none() && lane.is_full() {
                stats.inc(shard, ClusterStat::RqPendingOverflow);
                Turn::Broken(Broken::NotConnected(NoConnection::Overflow))
            } else {
                active.get_or_insert_with(|| Active::new(lane));
                self.attempt(buffers, call, &picked, &mut attempts, &mut flow)
                    .await
            };
            let (broken, pause) = match turn {
                Turn::Done(mut outcome) => {
                    outcome.upstream = Some(address);
                    outcome.workload = workload();
                    outcome.besides.exhausted = attempts.exhausted;
                    outcome.besides.overflowed = attempts.overflowed;
                    return outcome;
                }
                Turn::Again(pause) => (None, Some(pause)),
                Turn::Broken(broken) => {
                    let again = attempts.concerns(&broken) && can_be_sent_again(flow.as_ref());
                    let pause = if again {
                        attempts.again(lane, address)
                    } else {
                        None
                    };
                    (Some(broken), pause)
                }
            };
            if attempts.exhausted {
                stats.inc(shard, ClusterStat::RqRetryLimitExceeded);
            }
            if attempts.overflowed {
                stats.inc(shard, ClusterStat::RqRetryOverflow);
            }
            let failure = match (pause, broken) {
                (Some(pause), _) => {
                    stats.inc(shard, ClusterStat::RqRetry);
                    match self.pause_before_retry(buffers, call, pause).await {
                        Ok(()) => None,
                        Err(failure) => Some(Broken::Failed(failure)),
                    }
                }
                (None, broken) => broken,
            };
            if let Some(broken) = failure {
                let body = RequestBody::behind(flow.as_ref());
                let mut outcome = self.broken(buffers, lane, broken, address, body).await;
                outcome.besides.exhausted = attempts.exhausted;
                outcome.besides.overflowed = attempts.overflowed;
                outcome.workload = workload();
                return outcome;
            }
            call.rewrite.attempt = attempts.number;
        }
    }

    async fn pause_before_retry(
        &mut self,
        buffers: &mut Buffers,
        call: &Forwarding<'_, '_>,
        pause: Duration,
    ) -> Result<(), Failure> {
        let left =
            earlier(call.deadline, call.stream_end).map(|at| at.saturating_duration_since(Instant::now()));
        let short = left.filter(|left| *left <= pause);
        let paused = self.pause(buffers, short.unwrap_or(pause)).await;
        paused.map_err(|_| Failure::Client)?;
        if short.is_some() {
            Err(call.passed())
        } else {
            Ok(())
        }
    }

    /// One attempt at one endpoint; a pooled connection that proves dead is replaced by a new one where that is safe.
    async fn attempt(
        &mut self,
        buffers: &mut Buffers,
        call: &mut Forwarding<'_, '_>,
        picked: &Picked,
        attempts: &mut Attempts<'_>,
        kept: &mut Option<Flow>,
    ) -> Turn {
        let (lane, shard) = (call.lane, self.worker.shard);
        let stats = &lane.cluster.stats;
        let replayable = is_replayable(buffers);
        let tunnel = call.rewrite.tunnel;
        let mut pooled = match tunnel {
            None => lane.take_idle(picked, &self.peer, !replayable),
            Some(_) => None,
        };
        let mut replayed = false;
        loop {
            let reused = pooled.is_some();
            let mut connection = match pooled.take() {
                Some(pooled) => pooled,
                // Boxed: a connection is rarely made, and the state of its making would be part of every request's.
                None => match Box::pin(self.connect(call, picked)).await {
                    Ok(Ok(connection)) => connection,
                    Ok(Err(failure)) => {
                        if !matches!(failure, NoConnection::Overflow) {
                            lane.note(picked, Noted::Failed);
                        }
                        return Turn::Broken(Broken::NotConnected(failure));
                    }
                    Err(failure) => return Turn::Broken(Broken::Failed(failure)),
                },
            };
            lane.note(picked, Noted::Connected);
            if !replayed {
                stats.inc(shard, ClusterStat::RqTotal);
            }
            if tunnel == Some(Tunnel::Terminated) {
                let tunnel = Box::pin(self.terminate(buffers, call, connection));
                return Turn::Done(tunnel.await);
            }
            let trailers = self.stream.is_http2() && connection.stream.is_http2();
            call.rewrite.to_mesh = picked.endpoint.is_in_mesh();
            let mut flow = match begin(buffers, call, &self.peer, attempts, kept.take(), trailers) {
                Ok(flow) => flow,
                Err(broken) => {
                    let (flow, failure) = *broken;
                    *kept = Some(flow);
                    return Turn::Broken(Broken::Failed(failure));
                }
            };
            call.try_deadline = attempts.deadline(call.deadline);
            call.attempt_end = lane.cluster.max_stream_duration.map(|t| Instant::now() + t);
            match self.exchange(buffers, call, &mut connection, &mut flow).await {
                Ok(sent) => {
                    if lane.cluster.outlier.is_some() {
                        lane.note(picked, Noted::Status(status_of(buffers)));
                    }
                    match tunnel.map(|tunnel| opens(tunnel, buffers)) {
                        None | Some(Some(false)) => {}
                        Some(Some(true)) => {
                            let tunnel = Box::pin(self.tunnel(buffers, call, connection));
                            return Turn::Done(tunnel.await);
                        }
                        Some(None) => {
                            let failure = Failure::Protocol { begun: true };
                            return Turn::Broken(Broken::Failed(failure));
                        }
                    }
                    if attempts.concern_response(buffers, &flow)
                        && let Some(pause) = attempts.again(lane, picked.endpoint.address)
                    {
                        if sent && takes_rest_of_response(buffers) {
                            lane.give_back(picked, &self.peer, connection);
                        }
                        *kept = Some(flow);
                        return Turn::Again(pause);
                    }
                    if attempts.exhausted {
                        stats.inc(shard, ClusterStat::RqRetryLimitExceeded);
                    } else if attempts.overflowed {
                        stats.inc(shard, ClusterStat::RqRetryOverflow);
                    } else if replayed || attempts.number > 1 {
                        stats.inc(shard, ClusterStat::RqRetrySuccess);
                    }
                    let outcome = self.respond(buffers, call, picked, connection, flow, sent);
                    return Turn::Done(outcome.await);
                }
                Err(failure) => {
                    let dead = reused
                        && !replayed
                        && attempts.number == 1
                        && matches!(
                            failure,
                            Failure::Upstream { answered: false, .. } | Failure::Reset { refused: true, .. }
                        )
                        && (replayable || flow.untouched());
                    *kept = Some(flow);
                    let noted = failure.noted();
                    let broken = Broken::Failed(failure);
                    if !dead || attempts.concerns(&broken) {
                        if let Some(noted) = noted {
                            lane.note(picked, noted);
                        }
                        return Turn::Broken(broken);
                    }
                    replayed = true;
                    stats.inc(shard, ClusterStat::RqRetry);
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
        let attempt = async {
            match call.rewrite.tunnel {
                None => call.lane.connect(picked, &self.peer).await,
                Some(tunnel) => call.lane.connect_for_tunnel(picked, &self.peer, tunnel).await,
            }
        };
        match earlier(call.deadline, call.stream_end) {
            Some(at) => timeout_at(at, attempt).await.map_err(|_| call.passed()),
            None => Ok(attempt.await),
        }
    }
}

/// What came of one attempt.
#[expect(
    clippy::large_enum_variant,
    reason = "one at a time, on the stack; a box would be an allocation per request"
)]
enum Turn {
    /// The request has been answered.
    Done(Outcome),
    /// The response was one to try again after, when this has passed.
    Again(Duration),
    /// There was no response.
    Broken(Broken),
}

/// Writes the request's head, and what is there of its body, to the buffer for the endpoint. `before` is how far the
/// body had got in an earlier attempt.
fn begin(
    buffers: &mut Buffers,
    call: &mut Forwarding<'_, '_>,
    peer: &Peer,
    attempts: &Attempts<'_>,
    before: Option<Flow>,
    trailers: bool,
) -> Result<Flow, Box<(Flow, Failure)>> {
    // Of a message of which nothing was sent, what stands behind the head stays.
    let behind = match &before {
        Some(flow) if flow.untouched() => buffers.request_out.split_off(call.head_length),
        _ => Vec::new(),
    };
    buffers.request_out.clear();
    let expected = time_limit(call, attempts);
    let changes = &call.changes;
    rewrite::request_head(
        buffers,
        call.manager,
        &peer.connection,
        call.rewrite,
        changes,
        expected,
    );
    call.head_length = buffers.request_out.len();
    if let Some(mut flow) = before {
        if flow.untouched() {
            buffers.request_out.extend_from_slice(&behind);
        } else {
            flow.replay(&mut buffers.request_out);
        }
        return Ok(flow);
    }
    let framing = buffers.request.fields.framing;
    let out = if framing == Framing::Chunked {
        Out::Chunked
    } else {
        Out::Plain
    };
    let mut flow = Flow::new(framing, out);
    if trailers {
        flow.pass_trailers();
    }
    attempts.prepare(buffers, &mut flow);
    flow.copy_to(std::mem::take(&mut call.copies));
    match flow.prefill(&mut buffers.request_in, &mut buffers.request_out) {
        Ok(()) => Ok(flow),
        Err(error) => Err(Box::new((flow, Failure::from_client(error)))),
    }
}

/// What the endpoint is told of the time it has: one attempt's limit, or what is left of the request's.
fn time_limit(call: &Forwarding<'_, '_>, attempts: &Attempts<'_>) -> Option<Duration> {
    let whole = call.deadline.map(|at| at - call.begun);
    let limit = attempts.try_limit().or(whole)?;
    let left = match (whole, attempts.number) {
        (None, _) => limit,
        (Some(whole), 1) => whole,
        (Some(whole), _) => whole
            .saturating_sub(call.begun.elapsed())
            .max(Duration::from_millis(1)),
    };
    Some(limit.min(left))
}

/// The status that a response's head tells: that of gRPC where the request is gRPC and the head has one.
fn status_of(buffers: &Buffers) -> u16 {
    let response = &buffers.response;
    let grpc = || response.fields.get(buffers.response_in.head(), b"grpc-status");
    match grpc().filter(|_| buffers.is_grpc()) {
        Some(status) => grpc_as_http(status),
        None => response.status,
    }
}

/// Envoy's HTTP status for a gRPC status.
fn grpc_as_http(status: &[u8]) -> u16 {
    match status {
        b"0" => 200,
        b"1" => 499,
        b"3" | b"9" | b"11" => 400,
        b"4" => 504,
        b"5" => 404,
        b"6" | b"10" => 409,
        b"7" => 403,
        b"8" => 429,
        b"12" => 501,
        b"14" => 503,
        b"16" => 401,
        _ => 500,
    }
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
