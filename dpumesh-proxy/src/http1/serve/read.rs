//! Takes the next request head off the client's connection.

use std::future::poll_fn;
use std::task::Poll;

use tokio::time::Instant;

use super::Session;
use crate::http1::head::{Refusal, Scan};
use crate::stats::Http as Stat;
use crate::worker::Buffers;

/// What came of waiting for a request.
pub(super) enum Next {
    /// A head of so many octets stands at the front of the buffer.
    Head(usize),
    /// The connection is over.
    Over,
    /// It cannot be read.
    Refused(Refusal),
    /// The head did not arrive in time.
    TimedOut,
}

impl Session {
    pub(super) async fn next_request(&mut self, buffers: &mut Buffers) -> Next {
        let Self {
            stream,
            alarm,
            manager,
            worker,
            ..
        } = self;
        let input = &mut buffers.request_in;
        input.rewind();
        let mut scan = Scan::default();
        let mut deadline = None;
        poll_fn(|cx| {
            loop {
                match scan.find(input.unread()) {
                    Ok(Some(length)) if length > manager.max_head => {
                        return Poll::Ready(Next::Refused(Refusal::TooLarge));
                    }
                    Ok(Some(length)) => return Poll::Ready(Next::Head(length)),
                    Ok(None) if input.unread().len() > manager.max_head => {
                        return Poll::Ready(Next::Refused(Refusal::TooLarge));
                    }
                    Ok(None) => {}
                    Err(refusal) => return Poll::Ready(Next::Refused(refusal)),
                }
                match input.poll_fill(cx, stream) {
                    Poll::Ready(Ok(n)) if n > 0 => {
                        manager.stats.add(worker.shard, Stat::CxRxBytes, n as u64);
                    }
                    Poll::Ready(_) => return Poll::Ready(Next::Over),
                    Poll::Pending => break,
                }
            }
            if deadline.is_none() {
                let limit = manager.headers_timeout.or(manager.idle_timeout);
                deadline = limit.map(|t| Instant::now() + t);
            }
            if alarm.poll(cx, deadline).is_ready() {
                return Poll::Ready(Next::TimedOut);
            }
            Poll::Pending
        })
        .await
    }
}
