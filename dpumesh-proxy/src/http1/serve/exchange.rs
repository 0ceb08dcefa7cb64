//! The request goes out and the response head comes in, both at once: an endpoint may answer before it has heard all.

use std::future::poll_fn;
use std::task::Poll;

use tokio::io::AsyncWriteExt;
use tokio::time::Instant;

use super::Session;
use super::failure::Failure;
use super::forward::Forwarding;
use crate::alarm::{Watch, earlier};
use crate::http1::body::{Flow, FlowError};
use crate::http1::buffer::Buffer;
use crate::http1::head::{ResponseHead, Scan};
use crate::http1::reply;
use crate::route::upgrade::Tunnel;
use crate::stats::Http as Stat;
use crate::upstream::Pooled;
use crate::worker::Buffers;

/// Octets a client may send ahead while its request is being answered.
pub(super) const AHEAD: usize = 64 * 1024;

/// Largest response head, octets, interim ones before it included.
pub(crate) const LARGEST_RESPONSE_HEAD: usize = 64 * 1024;

impl Session {
    /// Sends the request and waits for the response head. True when all of the request was sent by then.
    pub(super) async fn exchange(
        &mut self,
        buffers: &mut Buffers,
        call: &Forwarding<'_, '_>,
        connection: &mut Pooled,
        flow: &mut Flow,
    ) -> Result<bool, Failure> {
        let Self {
            stream,
            alarm,
            worker,
            ..
        } = self;
        let Buffers {
            request_in,
            request_out,
            response_in,
            request,
            response,
            response_out,
            ..
        } = buffers;
        if request.expects_continue && !flow.read_all() {
            stream
                .write_all(reply::CONTINUE)
                .await
                .map_err(|_| Failure::Client)?;
            call.manager.stats.inc(worker.shard, Stat::Rq1xx);
            request.expects_continue = false;
        }
        response_in.clear();
        let (mut sending, mut broken) = (true, false);
        let (mut scan, mut interim) = (Scan::default(), 0);
        let idle_timeout = call.forward.idle_timeout;
        let mut watch = Watch::new(idle_timeout.unwrap_or(call.manager.stream_idle_timeout));
        let result = poll_fn(|cx| {
            if sending {
                match flow.poll(cx, stream, &mut connection.stream, request_in, request_out) {
                    Poll::Ready(Ok(())) => {
                        sending = false;
                        call.note_sent();
                    }
                    Poll::Ready(Err(FlowError::Write(_))) => {
                        // The endpoint may have answered before it closed: what it said is read below.
                        (sending, broken) = (false, true);
                    }
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(Failure::from_client(error))),
                    Poll::Pending => {}
                }
            } else if request_in.unread().len() < AHEAD {
                // Nothing is expected of the client now, but it may go away.
                match request_in.poll_fill(cx, stream) {
                    Poll::Ready(Ok(n)) if n > 0 => cx.waker().wake_by_ref(),
                    Poll::Ready(_) => return Poll::Ready(Err(Failure::Client)),
                    Poll::Pending => {}
                }
            }
            let begun = flow.wire_out > 0;
            loop {
                match scan.find(response_in.unread()) {
                    Ok(Some(length)) if length + interim > LARGEST_RESPONSE_HEAD => {
                        return Poll::Ready(Err(Failure::Protocol { begun }));
                    }
                    Ok(Some(length)) => {
                        match is_interim(response_in, response, length, call.rewrite.tunnel) {
                            Ok(true) => {
                                interim += length;
                                continue;
                            }
                            Ok(false) => return Poll::Ready(Ok(())),
                            Err(failure) => return Poll::Ready(Err(failure)),
                        }
                    }
                    Ok(None) if response_in.unread().len() > LARGEST_RESPONSE_HEAD => {
                        return Poll::Ready(Err(Failure::Protocol { begun }));
                    }
                    Ok(None) => {}
                    Err(_) => return Poll::Ready(Err(Failure::Protocol { begun })),
                }
                match response_in.poll_fill(cx, &mut connection.stream) {
                    Poll::Ready(Ok(n)) if n > 0 => {}
                    Poll::Ready(ended) => {
                        let answered = !response_in.is_empty();
                        let failure = Failure::from_endpoint(ended.as_ref().err(), answered, begun);
                        return Poll::Ready(Err(failure));
                    }
                    Poll::Pending => break,
                }
            }
            if let Poll::Ready(failure) = call.poll_end(cx, alarm) {
                return Poll::Ready(Err(failure));
            }
            if !sending
                && alarm
                    .poll(cx, earlier(call.deadline, call.try_deadline))
                    .is_ready()
            {
                let whole = call.deadline.is_some_and(|at| Instant::now() >= at);
                return Poll::Ready(Err(if whole {
                    Failure::Timeout
                } else {
                    Failure::TryTimeout
                }));
            }
            if watch.poll(cx, alarm, flow.wire_in + flow.wire_out).is_ready() {
                return Poll::Ready(Err(if sending { Failure::Idle } else { Failure::Timeout }));
            }
            Poll::Pending
        })
        .await;
        response_out.clear();
        result.map(|()| !sending && !broken)
    }
}

/// Parses a response head; true when it was an interim one and has been dropped.
fn is_interim(
    input: &mut Buffer,
    response: &mut ResponseHead,
    length: usize,
    tunnel: Option<Tunnel>,
) -> Result<bool, Failure> {
    response
        .parse(&mut input.unread_mut()[..length])
        .map_err(|_| Failure::Protocol { begun: true })?;
    match response.status {
        101 if tunnel == Some(Tunnel::Upgrade) => {
            input.keep_head(length);
            Ok(false)
        }
        101 => Err(Failure::Protocol { begun: true }),
        100..=199 => {
            input.consume(length);
            input.rewind();
            Ok(true)
        }
        _ => {
            input.keep_head(length);
            Ok(false)
        }
    }
}
