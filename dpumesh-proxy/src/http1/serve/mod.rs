//! One client connection: wait for a request, serve it, and again.
//!
//! ```text
//! next_request ─► route ─► filter ─► forward ─► exchange ─► respond ──┬─► count, log ─► next_request
//!                    └─────────┴──────────┴───────────┴─► local reply ─┘
//! ```
//! Each stage is a file: `read` takes a head off the connection, `request` decides what becomes of it, `filters` are
//! rules, faults and CORS, `forward` picks endpoint and connection, again if `attempts` says so, `exchange` sends the request until a response head is there, `respond` passes the
//! response on, `mirror` sends copies elsewhere, `tunnel` is what comes of upgrades and CONNECT, `failure` says what to answer for an endpoint, `local` writes what the proxy says by itself,
//! `logged` counts and logs, `reported` makes Istio's metrics. All memory is the worker's: between requests a connection holds its socket and little
//! else.

mod attempts;
mod authenticate;
mod authorize;
mod exchange;
mod failure;
mod filters;
mod forward;
mod local;
mod logged;
mod mirror;
mod read;
mod redirect;
pub(crate) mod reported;
mod request;
mod respond;
mod traced;
mod tunnel;
mod view;

use std::borrow::Cow;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;

use bytes::Bytes;
use tokio::time::Instant;

pub(crate) use self::exchange::LARGEST_RESPONSE_HEAD;
pub(crate) use self::local::LINGER;
use self::local::Reply;
use self::read::Next;
use crate::access_log::{Besides, Times};
use crate::alarm::{Alarm, earlier};
use crate::config::model::{Cluster, Codec, HttpManager, Terminal};
use crate::http2::{self, serve::Begun};
use crate::istio::{Reporting, Workload};
use crate::stats::Http as Stat;
use crate::tls::Stream;
use crate::turns::Turn;
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
    let (stats, shard, begun) = (Arc::clone(&manager.stats), worker.shard, Instant::now());
    stats.inc(shard, Stat::CxTotal);
    stats.inc(shard, Stat::CxActive);
    if speaks_http2(&manager, &peer) {
        let begun = Begun {
            octets: Bytes::new(),
            cork: stream.into(),
            heard: None,
            turn: None,
        };
        // Boxed: a connection that speaks HTTP/1.1 does without its memory.
        Box::pin(http2::serve::serve(
            worker, program, entry, begun, peer, place, manager,
        ))
        .await;
    } else {
        serve_http1(worker, program, entry, stream, peer, place, manager).await;
    }
    stats.dec(shard, Stat::CxActive);
    stats.inc(shard, Stat::CxDestroy);
    stats.record_since(shard, Stat::CxLength, begun);
}

/// Whether the connection begins with HTTP/2 for sure. Without ALPN only its first octets tell.
fn speaks_http2(manager: &HttpManager, peer: &Peer) -> bool {
    match manager.codec {
        Codec::Http1 => false,
        Codec::Http2 => true,
        Codec::Auto => peer.connection.alpn.as_deref().map(str::as_bytes) == Some(http2::ALPN),
    }
}

async fn serve_http1(
    worker: Rc<Worker>,
    program: Rc<Program>,
    entry: Entry,
    stream: Stream,
    peer: Peer,
    place: Place,
    manager: Arc<HttpManager>,
) {
    let (stats, shard) = (Arc::clone(&manager.stats), worker.shard);
    stats.inc(shard, Stat::CxHttp1Total);
    stats.inc(shard, Stat::CxHttp1Active);
    let mut session = Session::new(worker, program, entry, stream, peer, place, manager);
    let preface = session.run().await;
    stats.dec(shard, Stat::CxHttp1Active);
    if let Some(octets) = preface {
        // It was no HTTP/1.1 connection at all; counters have no way back.
        stats.add(shard, Stat::CxHttp1Total, u64::MAX);
        Box::pin(session.go_on_in_http2(octets)).await;
    }
}

/// Serves a client's HTTP/2 stream: its one exchange. `held` is given up behind it.
pub(crate) fn serve_stream(
    worker: Rc<Worker>,
    program: Rc<Program>,
    (entry, held): (Entry, impl Sized),
    stream: Stream,
    peer: Peer,
    place: Place,
    manager: Arc<HttpManager>,
) -> impl Future<Output = ()> {
    // Made before the future, which would hold its parts beside it.
    let mut session = Session::new(worker, program, entry, stream, peer, place, manager);
    async move {
        session.run().await;
        drop(held);
    }
}

/// Where the chain that a connection came in by stands in `program`: itself, and its connection manager there.
pub(crate) fn same_place(place: &Place, program: &Program) -> Option<(Place, Option<Arc<HttpManager>>)> {
    let name = &place.listener.name;
    let listener = program.config.listeners.iter().find(|l| l.name == *name)?;
    let chain = listener.same_chain(&place.listener, &place.chain)?;
    let manager = match &chain.terminal {
        Terminal::Http(manager) => Some(Arc::clone(manager)),
        Terminal::Tcp(_) => None,
    };
    let place = Place {
        listener: Arc::clone(listener),
        chain: Arc::clone(chain),
    };
    Some((place, manager))
}

impl Session {
    fn new(
        worker: Rc<Worker>,
        program: Rc<Program>,
        entry: Entry,
        stream: Stream,
        peer: Peer,
        place: Place,
        manager: Arc<HttpManager>,
    ) -> Self {
        let reporting = Reporting::of(&program.config, &place.listener, &peer);
        let turn = worker.turns.of(peer.pod(place.listener.direction));
        Self {
            reporting,
            turn,
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
            preface: false,
        }
    }

    /// What it began with was HTTP/2's preface, of which `octets` have been read.
    async fn go_on_in_http2(self, octets: Bytes) {
        let Self {
            worker,
            entry,
            stream,
            peer,
            place,
            manager,
            program,
            ..
        } = self;
        let begun = Begun {
            octets,
            cork: stream.into(),
            heard: None,
            turn: None,
        };
        http2::serve::serve(worker, program, entry, begun, peer, place, manager).await;
    }
}

struct Session {
    worker: Rc<Worker>,
    entry: Entry,
    stream: Stream,
    peer: Peer,
    place: Place,
    manager: Arc<HttpManager>,
    program: Rc<Program>,
    /// The local pod, and whether it is client or server, where Istio's metrics are made of it.
    reporting: Option<Reporting>,
    alarm: Alarm,
    /// Its pod's turns.
    turn: Rc<Turn>,
    served: u64,
    /// The listener is gone or has changed: the next response is the last.
    closing: bool,
    /// What stands in the buffer is HTTP/2's preface, not a request.
    preface: bool,
}

/// What a request came to.
struct Outcome {
    status: u16,
    flags: &'static str,
    /// Envoy's `RESPONSE_CODE_DETAILS`; empty is none.
    details: Cow<'static, str>,
    /// What has flags of its own.
    besides: Besides,
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
    /// Octets sent to the client, head included.
    wire_sent: u64,
    /// gRPC's status, where the proxy said it.
    grpc_status: Option<u32>,
    /// The response's trailers, where they were passed on.
    trailers: Option<Vec<u8>>,
    /// The cluster the request went to, where Istio's metrics ask for it; so too the endpoint's workload and principal, and
    /// whether it was reached by TLS.
    to: Option<Arc<Cluster>>,
    workload: Option<Arc<Workload>>,
    principal: Option<Arc<str>>,
    by_tls: bool,
    /// What the endpoint speaks.
    upstream_protocol: Option<&'static str>,
    times: Times,
}

impl Outcome {
    fn new(status: u16, flags: &'static str) -> Self {
        Self {
            status,
            flags,
            details: Cow::Borrowed(""),
            besides: Besides::default(),
            keep: false,
            received: 0,
            sent: 0,
            upstream: None,
            upstream_local: None,
            transport_failure: None,
            cluster: None,
            has_response: false,
            wire_sent: 0,
            grpc_status: None,
            trailers: None,
            to: None,
            workload: None,
            principal: None,
            by_tls: false,
            upstream_protocol: None,
            times: Times::default(),
        }
    }
}

impl Session {
    /// Serves requests until the connection is to end; or what has been read, if that is the beginning of HTTP/2.
    async fn run(&mut self) -> Option<Bytes> {
        let mut buffers: Option<Box<Buffers>> = None;
        loop {
            let mut held = match buffers.take() {
                Some(held) if !held.request_in.is_empty() => held,
                spare => {
                    if let Some(spare) = spare {
                        self.worker.return_buffers(spare);
                    }
                    if !self.wait_readable().await {
                        return None;
                    }
                    self.worker.take_buffers(self.peer.small.as_ref())
                }
            };
            self.worker.turns.take(&self.turn).await;
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
            let preface = self
                .preface
                .then(|| Bytes::copy_from_slice(held.request_in.unread()));
            buffers = Some(held);
            // A stream of HTTP/2 is one exchange.
            if !keep || self.stream.is_http2() {
                if let Some(spare) = buffers {
                    self.worker.return_buffers(spare);
                }
                return preface;
            }
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
        let closes = self.worker.closing.closes(self.place.listener.direction);
        if self.worker.overload.ends_connection() {
            self.manager
                .stats
                .inc(self.worker.shard, Stat::CxOverloadKeepalive);
            return true;
        }
        !persistent || self.closing || spent || closes || self.worker.draining().is_some()
    }
}
