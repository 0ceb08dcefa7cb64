//! One client connection: wait for a request, serve it, and again.
//!
//! ```text
//! next_request ─► route ─► filter ─► forward ─► exchange ─► respond ──┬─► count, log ─► next_request
//!                    └─────────┴──────────┴───────────┴─► local reply ─┘
//! ```
//! Each stage is a file: `read` takes a head off the connection, `request` decides what becomes of it, `filters` are
//! rules, faults and CORS, `forward` picks endpoint and connection, again if `attempts` says so, `exchange` sends the request until a response head is there, `respond` passes the
//! response on, `failure` says what to answer for an endpoint, `local` writes what the proxy says by itself,
//! `logged` counts and logs. All memory is the worker's: between requests a connection holds its socket and little
//! else.

mod attempts;
mod exchange;
mod failure;
mod filters;
mod forward;
mod local;
mod logged;
mod read;
mod redirect;
mod request;
mod respond;
mod view;

use std::borrow::Cow;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;

use tokio::time::Instant;

use self::local::Reply;
use self::read::Next;
use crate::alarm::{Alarm, earlier};
use crate::config::model::HttpManager;
use crate::stats::Http as Stat;
use crate::tls::Stream;
use crate::worker::{Buffers, Entry, Peer, Place, Program, Worker};

/// Serves a connection to its end; `program` is the one its listener comes from.
pub async fn serve(
    worker: Rc<Worker>,
    program: Rc<Program>,
    entry: Entry,
    stream: Stream,
    peer: Peer,
    place: Place,
    manager: Arc<HttpManager>,
) {
    let (stats, shard) = (Arc::clone(&manager.stats), worker.shard);
    stats.inc(shard, Stat::CxTotal);
    stats.inc(shard, Stat::CxActive);
    let mut session = Session {
        worker,
        entry,
        stream,
        peer,
        place,
        manager,
        program,
        alarm: Alarm::default(),
        served: 0,
        closing: false,
    };
    session.run().await;
    stats.dec(shard, Stat::CxActive);
    stats.inc(shard, Stat::CxDestroy);
}

struct Session {
    worker: Rc<Worker>,
    entry: Entry,
    stream: Stream,
    peer: Peer,
    place: Place,
    manager: Arc<HttpManager>,
    program: Rc<Program>,
    alarm: Alarm,
    served: u64,
    /// The listener is gone or has changed: the next response is the last.
    closing: bool,
}

/// What a request came to.
struct Outcome {
    status: u16,
    flags: &'static str,
    /// Envoy's `RESPONSE_CODE_DETAILS`; empty is none.
    details: Cow<'static, str>,
    /// A fault held the request up (`DI`).
    delayed: bool,
    /// A retry was due, but there was none left (`URX`).
    exhausted: bool,
    keep: bool,
    received: u64,
    sent: u64,
    upstream: Option<SocketAddr>,
    /// Our end of the connection to the endpoint, where a log asks for it.
    upstream_local: Option<SocketAddr>,
    /// Why there was no connection to the endpoint.
    transport_failure: Option<String>,
    cluster: Option<Arc<str>>,
    has_response: bool,
}

impl Outcome {
    fn new(status: u16, flags: &'static str) -> Self {
        Self {
            status,
            flags,
            details: Cow::Borrowed(""),
            delayed: false,
            exhausted: false,
            keep: false,
            received: 0,
            sent: 0,
            upstream: None,
            upstream_local: None,
            transport_failure: None,
            cluster: None,
            has_response: false,
        }
    }
}

impl Session {
    async fn run(&mut self) {
        let mut buffers: Option<Box<Buffers>> = None;
        loop {
            let mut held = match buffers.take() {
                Some(held) if !held.request_in.is_empty() => held,
                spare => {
                    if let Some(spare) = spare {
                        self.worker.return_buffers(spare);
                    }
                    if !self.wait_readable().await {
                        return;
                    }
                    self.worker.take_buffers()
                }
            };
            let keep = match self.next_request(&mut held).await {
                Next::Head(length) => self.request(&mut held, length).await,
                Next::Over => false,
                Next::Refused(refusal) => self.refuse(&mut held, refusal).await,
                Next::TimedOut => {
                    self.manager.stats.inc(self.worker.shard, Stat::RqHeaderTimeout);
                    let reply = Reply::new(408, "")
                        .body("request header timeout")
                        .because("request_header_timeout");
                    self.answer_no_request(&mut held, reply).await
                }
            };
            buffers = Some(held);
            if !keep {
                break;
            }
        }
        if let Some(spare) = buffers {
            self.worker.return_buffers(spare);
        }
    }

    /// Waits for the first octet of a request; false when the connection is to end instead.
    async fn wait_readable(&mut self) -> bool {
        let idle_until = self.manager.idle_timeout.map(|t| Instant::now() + t);
        let Self {
            stream,
            worker,
            alarm,
            entry,
            manager,
            ..
        } = self;
        poll_fn(|cx| {
            if stream.poll_read_ready(cx).is_ready() {
                return Poll::Ready(true);
            }
            let mut until = idle_until;
            if let Some((idle, _)) = worker.draining() {
                until = earlier(until, Some(idle));
            }
            if alarm.poll(cx, until).is_ready() {
                let member = if worker.draining().is_some() {
                    Stat::CxDrainClose
                } else {
                    Stat::CxIdleTimeout
                };
                manager.stats.inc(worker.shard, member);
                return Poll::Ready(false);
            }
            entry.wake_by(cx.waker());
            Poll::Pending
        })
        .await
    }

    /// Whether the next response is the connection's last; `persistent` is what the client asks for.
    fn is_last_response(&self, persistent: bool) -> bool {
        let spent = self.manager.max_requests > 0 && self.served >= self.manager.max_requests;
        if spent {
            self.manager.stats.inc(self.worker.shard, Stat::CxMaxRequests);
        }
        !persistent || self.closing || spent || self.worker.draining().is_some()
    }
}
