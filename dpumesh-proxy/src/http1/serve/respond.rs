//! The response goes out; the request's body goes on being sent where it has not ended.

use std::borrow::Cow;
use std::future::poll_fn;
use std::task::Poll;
use std::time::SystemTime;

use super::failure::Failure;
use super::forward::Forwarding;
use super::{Outcome, Session};
use crate::access_log::Times;
use crate::alarm::Watch;
use crate::health::outlier::Outcome as Noted;
use crate::http1::body::{Flow, FlowError, Out};
use crate::http1::head::Framing;
use crate::http1::rewrite;
use crate::stats::{Cluster as ClusterStat, Http as Stat};
use crate::upstream::{Picked, Pooled};
use crate::worker::Buffers;

/// How the response is passed on.
struct Delivery {
    /// As the endpoint frames it.
    framing: Framing,
    /// As the client gets it.
    out: Out,
    /// The connection ends behind it.
    close: bool,
}

impl Delivery {
    /// Whether the client knows the body's end only by the connection's.
    fn is_until_close(&self) -> bool {
        self.out == Out::Plain && matches!(self.framing, Framing::Chunked | Framing::Close)
    }
}

impl Session {
    /// Passes the response whose head has been read on. `sent`: all of the request has been sent.
    pub(super) async fn respond(
        &mut self,
        buffers: &mut Buffers,
        call: &mut Forwarding<'_, '_>,
        picked: &Picked,
        mut connection: Pooled,
        mut request: Flow,
        mut sent: bool,
    ) -> Outcome {
        let delivery = self.delivery(buffers, sent);
        call.rewrite.note_service_time();
        rewrite::response_head(
            buffers,
            call.manager,
            call.rewrite,
            &call.changes,
            delivery.out,
            delivery.close,
            self.worker.date.borrow_mut().at(SystemTime::now()),
        );
        let mut response = Flow::new(delivery.framing, delivery.out);
        if self.stream.is_http2() && connection.stream.is_http2() {
            response.pass_trailers();
        }
        let asked = call
            .manager
            .access_log
            .iter()
            .any(|l| l.asks_for_upstream_local());
        let local = asked.then(|| connection.stream.local_addr()).flatten();
        let principal = connection.principal.clone();
        let speaks_http2 = connection.stream.is_http2();
        let response_begun = call.begun.elapsed();
        let relayed = self.relay(
            buffers,
            call,
            &mut connection,
            (&mut request, &mut sent),
            &mut response,
        );
        let relayed = relayed.await;
        let (stats, shard) = (&call.lane.cluster.stats, self.worker.shard);
        stats.add(shard, ClusterStat::CxTxBytes, request.wire_out);
        let head = buffers.response_in.head().len() as u64;
        stats.add(shard, ClusterStat::CxRxBytes, response.wire_in + head);
        call.manager.stats.add(shard, Stat::CxTxBytes, response.wire_out);
        let status = buffers.response.status;
        call.lane.count(status);
        let mut outcome = Outcome::new(status, "");
        outcome.has_response = true;
        outcome.upstream_local = local;
        outcome.principal = principal;
        outcome.upstream_protocol = Some(if speaks_http2 { "HTTP/2" } else { "HTTP/1.1" });
        outcome.times = Times {
            request_complete: call.complete.get().map(|at| at - call.begun),
            request_sent: call.sent.get().map(|at| at - call.begun),
            response_begun: Some(response_begun),
        };
        outcome.by_tls = picked.endpoint.tls.is_some();
        outcome.wire_sent = response.wire_out;
        outcome.trailers = response.take_trailers();
        outcome.details = Cow::Borrowed("via_upstream");
        outcome.received = request.body;
        outcome.sent = response.body;
        match relayed {
            Ok(()) => {
                let reusable = sent
                    && buffers.response.fields.persistent()
                    && delivery.framing != Framing::Close
                    && buffers.response_in.is_empty();
                if reusable {
                    call.lane.give_back(picked, &self.peer, connection);
                }
                // As in Envoy: what answers before it has heard all has no time.
                if let Some(complete) = call.complete.get() {
                    stats.record_since(shard, ClusterStat::RqTime, complete);
                }
                if !sent {
                    call.manager.stats.inc(shard, Stat::RqEarlyResponse);
                }
                outcome.keep = !delivery.close && sent;
            }
            // Half of the response is with the client: nothing more can be said to it.
            Err(failure) => {
                if let Some(noted @ Noted::Failed) = failure.noted() {
                    call.lane.note(picked, noted);
                }
                outcome.flags = failure.flags();
                outcome.details = failure.late_details().into();
                if matches!(failure, Failure::Client) {
                    call.manager.stats.inc(shard, Stat::RqRxReset);
                    stats.inc(shard, ClusterStat::RqTxReset);
                } else {
                    call.manager.stats.inc(shard, Stat::RqTxReset);
                    stats.inc(shard, ClusterStat::RqRxReset);
                    if delivery.is_until_close() {
                        // Only a RST tells the client that this is not the end of the body.
                        // A connection that is gone already needs none.
                        self.stream.reset_on_close();
                    }
                }
            }
        }
        outcome
    }

    fn delivery(&self, buffers: &Buffers, sent: bool) -> Delivery {
        let Buffers {
            request, response, ..
        } = buffers;
        let is_head = request.method.of_head(buffers.request_in.head()) == b"HEAD";
        let framing = match response.fields.framing {
            _ if is_head || matches!(response.status, 204 | 304) => Framing::None,
            framing => framing,
        };
        let of_unknown_length = matches!(framing, Framing::Chunked | Framing::Close);
        let http11 = request.fields.http11;
        let last = !sent || self.is_last_response(request.fields.persistent());
        Delivery {
            framing,
            out: if of_unknown_length && http11 {
                Out::Chunked
            } else {
                Out::Plain
            },
            close: last || (of_unknown_length && !http11),
        }
    }

    /// Moves what is left of both messages until the response has ended.
    async fn relay(
        &mut self,
        buffers: &mut Buffers,
        call: &Forwarding<'_, '_>,
        connection: &mut Pooled,
        (request, sent): (&mut Flow, &mut bool),
        response: &mut Flow,
    ) -> Result<(), Failure> {
        let Self { stream, alarm, .. } = self;
        let Buffers {
            request_in,
            request_out,
            response_in,
            response_out,
            ..
        } = buffers;
        let mut watch = Watch::new(call.manager.stream_idle_timeout);
        response
            .prefill(response_in, response_out)
            .map_err(|_| Failure::Protocol { begun: true })?;
        poll_fn(|cx| {
            if stream.poll_gone(cx).is_ready() {
                return Poll::Ready(Err(Failure::Client));
            }
            if !*sent {
                match request.poll(cx, stream, &mut connection.stream, request_in, request_out) {
                    Poll::Ready(Ok(())) => {
                        *sent = true;
                        call.note_sent();
                    }
                    Poll::Ready(Err(FlowError::Write(_))) | Poll::Pending => {}
                    Poll::Ready(Err(_)) => return Poll::Ready(Err(Failure::Client)),
                }
            }
            match response.poll(cx, &mut connection.stream, stream, response_in, response_out) {
                Poll::Ready(Ok(())) => return Poll::Ready(Ok(())),
                Poll::Ready(Err(FlowError::Write(_))) => return Poll::Ready(Err(Failure::Client)),
                Poll::Ready(Err(FlowError::Read(error))) => {
                    return Poll::Ready(Err(Failure::from_endpoint(error.as_ref(), true, true)));
                }
                Poll::Ready(Err(FlowError::Framing(_))) => {
                    return Poll::Ready(Err(Failure::Protocol { begun: true }));
                }
                Poll::Pending => {}
            }
            if let Poll::Ready(failure) = call.poll_end(cx, alarm) {
                return Poll::Ready(Err(failure));
            }
            if alarm.poll(cx, call.deadline).is_ready() {
                return Poll::Ready(Err(Failure::Timeout));
            }
            if watch
                .poll(cx, alarm, response.wire_in + response.wire_out)
                .is_ready()
            {
                return Poll::Ready(Err(Failure::Idle));
            }
            Poll::Pending
        })
        .await
    }
}
