//! The loop over one client connection: read a request, route it, forward it, log it.
//!
//! ```text
//! next_request ─► route ─► connect ─► exchange (request out, response head in) ─► respond ─► finish ─┐
//!      ▲                     └─ local reply ────────────────────────────────────────────────► finish ─┤
//!      └──────────────────────────────────────────────────────────────────────────────────────────────┘
//! ```
//! All memory is the worker's: between requests a connection holds its socket and little else.

use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

use super::body::{Flow, FlowError, Out};
use super::head::{FieldKind, Framing, Refusal, Scan};
use super::reply;
use super::rewrite::{self, Changes, Rewrite};
use crate::access_log::{Headers, Record};
use crate::alarm::{Alarm, earlier};
use crate::config::model::{ClusterRef, HttpManager, Terminal, Underscores};
use crate::io as sockets;
use crate::route::{
    Action, Forward, HeaderChanges, Redirect, RedirectPath, RequestView, Route, Target, VirtualHost,
};
use crate::stats::{Cluster as ClusterStat, Http as Stat};
use crate::upstream::{Lane, NoConnection, Picked, Pooled};
use crate::worker::{Buffers, Entry, Peer, Place, Program, Worker};

/// Octets a client may send ahead while its request is being answered.
const AHEAD: usize = 64 * 1024;

/// After a refusal the client's remaining octets are read for at most this long, so that it sees the answer.
const LINGER: Duration = Duration::from_millis(500);

/// Largest response head, octets.
const LARGEST_RESPONSE_HEAD: usize = 64 * 1024;

/// Serves a connection to its end.
pub async fn serve(
    worker: Rc<Worker>,
    entry: Entry,
    stream: TcpStream,
    peer: Peer,
    place: Place,
    manager: Arc<HttpManager>,
) {
    let (stats, shard) = (Arc::clone(&manager.stats), worker.shard);
    stats.inc(shard, Stat::CxTotal);
    stats.inc(shard, Stat::CxActive);
    let program = worker.program();
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
    stream: TcpStream,
    peer: Peer,
    place: Place,
    manager: Arc<HttpManager>,
    program: Rc<Program>,
    alarm: Alarm,
    served: u64,
    /// The listener is gone or has changed: the next response is the last.
    closing: bool,
}

/// What came of waiting for a request.
enum Next {
    /// A head of so many octets stands at the front of the buffer.
    Head(usize),
    /// The connection is over.
    Over,
    /// It cannot be read.
    Refused(Refusal),
    /// The head did not arrive in time.
    TimedOut,
}

/// What a request came to.
struct Outcome {
    status: u16,
    flags: &'static str,
    keep: bool,
    received: u64,
    sent: u64,
    upstream: Option<std::net::SocketAddr>,
    cluster: Option<Arc<str>>,
    has_response: bool,
}

impl Outcome {
    fn new(status: u16, flags: &'static str) -> Self {
        Self {
            status,
            flags,
            keep: false,
            received: 0,
            sent: 0,
            upstream: None,
            cluster: None,
            has_response: false,
        }
    }
}

impl Session {
    async fn run(&mut self) {
        let mut buffers: Option<Box<Buffers>> = None;
        loop {
            let held = match buffers.take() {
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
            let mut held = held;
            let keep = match self.next_request(&mut held).await {
                Next::Head(length) => self.request(&mut held, length).await,
                Next::Over => false,
                Next::Refused(refusal) => self.refuse(&mut held, refusal).await,
                Next::TimedOut => {
                    self.manager.stats.inc(self.worker.shard, Stat::RqHeaderTimeout);
                    let outcome = Outcome::new(408, "");
                    self.unparsed(&mut held, outcome, "request header timeout").await
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

    async fn next_request(&mut self, buffers: &mut Buffers) -> Next {
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

    /// Answers what could not be read as a request and closes.
    async fn refuse(&mut self, buffers: &mut Buffers, refusal: Refusal) -> bool {
        let (stats, shard) = (&self.manager.stats, self.worker.shard);
        let status = match refusal {
            Refusal::Bad(_) => 400,
            Refusal::Version => 505,
            Refusal::TooLarge => {
                stats.inc(shard, Stat::RqTooLarge);
                431
            }
        };
        stats.inc(shard, Stat::CxProtocolError);
        tracing::debug!(client = %self.peer.remote, %refusal, "request refused");
        self.unparsed(buffers, Outcome::new(status, "DPE"), reply::reason(status))
            .await
    }

    /// Replies to something that is no request, logs it and closes.
    async fn unparsed(&mut self, buffers: &mut Buffers, mut outcome: Outcome, body: &str) -> bool {
        let (stats, shard) = (Arc::clone(&self.manager.stats), self.worker.shard);
        stats.inc(shard, Stat::RqTotal);
        buffers.response_out.clear();
        outcome.sent = body.len() as u64;
        self.local_head(
            outcome.status,
            &[],
            body.len(),
            Some("text/plain"),
            true,
            true,
            &mut buffers.response_out,
        );
        buffers.response_out.extend_from_slice(body.as_bytes());
        self.write_out(buffers).await;
        self.count(&outcome);
        let record = self.record(&outcome, SystemTime::now(), Duration::ZERO);
        self.log(&record);
        self.linger(buffers).await;
        false
    }

    /// Serves the request whose head stands in the buffer; true when the connection may go on.
    async fn request(&mut self, buffers: &mut Buffers, length: usize) -> bool {
        let begun = Instant::now();
        let Buffers {
            request_in, request, ..
        } = buffers;
        let parsed = request.parse(&mut request_in.unread_mut()[..length]);
        if let Err(refusal) = parsed {
            return self.refuse(buffers, refusal).await;
        }
        if buffers.request.fields.fields.len() > self.manager.max_headers {
            return self.refuse(buffers, Refusal::TooLarge).await;
        }
        buffers.request_in.keep_head(length);
        self.catch_up();
        self.served += 1;
        let wall = if self.manager.access_log.is_empty() {
            SystemTime::UNIX_EPOCH
        } else {
            SystemTime::now()
        };
        let manager = Arc::clone(&self.manager);
        let program = Rc::clone(&self.program);
        manager.stats.inc(self.worker.shard, Stat::RqTotal);
        manager.stats.inc(self.worker.shard, Stat::RqActive);
        let mut rewrite = Rewrite::new(&manager, &buffers.request, buffers.request_in.head());
        let outcome = match self.check(buffers, &manager) {
            Some((status, flags, body)) => {
                let outcome = Outcome::new(status, flags);
                self.reply(buffers, outcome, &[], body, true).await
            }
            None => {
                self.routed(buffers, &manager, &program, &mut rewrite, begun)
                    .await
            }
        };
        manager.stats.dec(self.worker.shard, Stat::RqActive);
        self.count(&outcome);
        if !manager.access_log.is_empty() {
            let view = LoggedRequest {
                buffers,
                rewrite: &rewrite,
            };
            let response = LoggedResponse {
                buffers,
                service_ms: rewrite.service_ms.as_deref(),
            };
            let mut record = self.record(&outcome, wall, begun.elapsed());
            record.request = Some(&view);
            record.response = outcome.has_response.then_some(&response as &dyn Headers);
            record.protocol = Some(if buffers.request.fields.http11 {
                "HTTP/1.1"
            } else {
                "HTTP/1.0"
            });
            record.cluster = outcome.cluster.as_deref();
            record.route = rewrite.route_name;
            self.log(&record);
        }
        if !outcome.keep && outcome.flags != "DC" {
            self.linger(buffers).await;
        }
        outcome.keep
    }

    /// Takes up a newer configuration: same listener, new routes; changed listener, close after this request.
    fn catch_up(&mut self) {
        if self.worker.generation() == self.program.config.generation {
            return;
        }
        self.program = self.worker.program();
        let name = &self.place.listener.name;
        let current = self.program.config.listeners.iter().find(|l| l.name == *name);
        match current {
            Some(listener) if listener.fingerprint == self.place.listener.fingerprint => {
                self.place.listener = Arc::clone(listener);
                if let Some(Terminal::Http(manager)) = self.place.chain().map(|c| &c.terminal) {
                    self.manager = Arc::clone(manager);
                }
            }
            _ => self.closing = true,
        }
    }

    /// Requests that are refused whatever the routes say: status, flags, body.
    fn check(&self, buffers: &Buffers, manager: &HttpManager) -> Option<(u16, &'static str, &'static str)> {
        let request = &buffers.request;
        let head = buffers.request_in.head();
        if !request.fields.http11 && !manager.accept_http_10 {
            return Some((426, "DPE", "Upgrade Required"));
        }
        if request.absolute {
            manager.stats.inc(self.worker.shard, Stat::RqNonRelativePath);
        }
        if !request.has_host && (request.fields.http11 || manager.default_host_http_10.is_none()) {
            return Some((400, "", ""));
        }
        if request.has_host && request.authority.is_empty() {
            return Some((400, "", ""));
        }
        if request.method.of_head(head) == b"CONNECT" {
            return Some((404, "NR", ""));
        }
        if request.upgrade {
            manager.stats.inc(self.worker.shard, Stat::RqUpgradeRefused);
            return Some((403, "", ""));
        }
        if manager.underscores == Underscores::Reject
            && request
                .fields
                .fields
                .iter()
                .any(|f| f.name.of_head(head).contains(&b'_'))
        {
            return Some((400, "", ""));
        }
        None
    }

    async fn routed<'a>(
        &mut self,
        buffers: &mut Buffers,
        manager: &'a HttpManager,
        program: &Rc<Program>,
        rewrite: &mut Rewrite<'a>,
        begun: Instant,
    ) -> Outcome {
        let shard = self.worker.shard;
        let found = {
            let view = View {
                buffers,
                host: rewrite.default_host,
            };
            manager.routes.find(&view)
        };
        let Some((host, route)) = found else {
            manager.stats.inc(shard, Stat::NoRoute);
            return self.reply(buffers, Outcome::new(404, "NR"), &[], "", false).await;
        };
        rewrite.route_name = Some(&route.name);
        let levels = [&route.headers, &host.headers, &manager.routes.headers];
        match &route.action {
            Action::Direct { status, body } => {
                manager.stats.inc(shard, Stat::RqDirectResponse);
                self.reply_bytes(buffers, Outcome::new(*status, ""), &[], body, &levels, false)
                    .await
            }
            Action::Redirect(redirect) => {
                manager.stats.inc(shard, Stat::RqRedirect);
                let location = location(redirect, route, buffers, rewrite);
                let outcome = Outcome::new(redirect.status, "");
                self.reply_bytes(buffers, outcome, &[(b"location", &location)], b"", &levels, false)
                    .await
            }
            Action::Forward(forward) => {
                manager.stats.inc(shard, Stat::RouterRqTotal);
                self.forward(buffers, manager, program, rewrite, (host, route, forward), begun)
                    .await
            }
        }
    }

    async fn forward<'a>(
        &mut self,
        buffers: &mut Buffers,
        manager: &'a HttpManager,
        program: &Rc<Program>,
        rewrite: &mut Rewrite<'a>,
        (host, route, forward): (&'a VirtualHost, &'a Route, &'a Forward),
        begun: Instant,
    ) -> Outcome {
        let shard = self.worker.shard;
        let mut levels: [Option<&HeaderChanges>; 4] = [
            None,
            Some(&route.headers),
            Some(&host.headers),
            Some(&manager.routes.headers),
        ];
        let cluster = match &forward.to {
            Target::Cluster(cluster) => Some(cluster),
            Target::Weighted(split) => {
                let (cluster, changes) = split.pick(fastrand::u64(..));
                levels[0] = Some(changes);
                Some(cluster)
            }
            Target::Header(name, all) => buffers
                .request
                .fields
                .get(buffers.request_in.head(), name)
                .and_then(|value| all.get(value)),
        };
        let lane = cluster.and_then(|c: &ClusterRef| program.lanes.get(c.index?));
        let Some(lane) = lane else {
            manager.stats.inc(shard, Stat::NoCluster);
            let mut outcome = Outcome::new(forward.not_found_status, "NC");
            outcome.cluster = cluster.map(|c| Arc::clone(&c.name));
            return self.reply(buffers, outcome, &[], "", false).await;
        };
        let changes = Changes::of(&levels);
        rewrite.plan(forward, route, &buffers.request, buffers.request_in.head());
        let mut outcome = self
            .upstream(buffers, manager, lane, rewrite, &changes, forward, begun)
            .await;
        outcome.cluster = cluster.map(|c| Arc::clone(&c.name));
        outcome
    }

    /// Picks an endpoint and sends the request there, once more if a pooled connection had died.
    #[expect(
        clippy::too_many_arguments,
        reason = "one request's parts, each borrowed from a different owner"
    )]
    async fn upstream(
        &mut self,
        buffers: &mut Buffers,
        manager: &HttpManager,
        lane: &Rc<Lane>,
        rewrite: &mut Rewrite<'_>,
        changes: &Changes<'_>,
        forward: &Forward,
        begun: Instant,
    ) -> Outcome {
        let (stats, shard) = (Arc::clone(&lane.cluster.stats), self.worker.shard);
        let Some(picked) = lane.pick(self.peer.local) else {
            stats.inc(shard, ClusterStat::CxNoneHealthy);
            return self
                .reply(
                    buffers,
                    Outcome::new(503, "UH"),
                    &[],
                    "no healthy upstream",
                    false,
                )
                .await;
        };
        let address = picked.endpoint.address;
        let source = self.peer.source;
        let limits = lane.cluster.limits;
        if stats.get(ClusterStat::RqActive) >= u64::from(limits.max_requests) {
            stats.inc(shard, ClusterStat::RqPendingOverflow);
            return self.overflow(buffers, address).await;
        }
        let timeout_at = rewrite.timeout(forward).map(|t| begun + t);
        let replayable = buffers.request.fields.framing == Framing::None
            && is_idempotent(buffers.request.method.of_head(buffers.request_in.head()));
        let mut pooled = lane.take_idle(&picked, source, !replayable);
        let mut retried = false;
        let _active = Active::new(lane, shard);
        loop {
            let reused = pooled.is_some();
            let mut connection = match pooled.take() {
                Some(pooled) => pooled,
                None => {
                    let attempt = lane.connect(&picked, source);
                    let attempt = match timeout_at {
                        Some(at) => tokio::time::timeout_at(at, attempt).await,
                        None => Ok(attempt.await),
                    };
                    match attempt {
                        Ok(Ok(connection)) => connection,
                        Ok(Err(failure)) => return self.not_connected(buffers, failure, address).await,
                        Err(_) => return self.timed_out(buffers, lane, address).await,
                    }
                }
            };
            if !retried {
                stats.inc(shard, ClusterStat::RqTotal);
            }
            buffers.request_out.clear();
            rewrite::request_head(
                buffers,
                manager,
                rewrite,
                changes,
                timeout_at.map(|at| at - begun),
            );
            let exchange = self
                .exchange(buffers, &mut connection, timeout_at, manager, forward)
                .await;
            let failure = match exchange {
                Ok((flow, answered)) => {
                    let mut outcome = self
                        .respond(
                            buffers, manager, lane, &picked, connection, flow, answered, rewrite, changes,
                            timeout_at,
                        )
                        .await;
                    if retried {
                        stats.inc(shard, ClusterStat::RqRetrySuccess);
                    }
                    outcome.upstream = Some(address);
                    return outcome;
                }
                Err(failure) => failure,
            };
            match failure {
                Failure::Upstream { answered: false } if reused && replayable && !retried => {
                    retried = true;
                    stats.inc(shard, ClusterStat::RqRetry);
                }
                failure => return self.failed(buffers, lane, failure, address).await,
            }
        }
    }

    /// Sends the request and waits for the response head, both at once.
    async fn exchange(
        &mut self,
        buffers: &mut Buffers,
        connection: &mut Pooled,
        timeout_at: Option<Instant>,
        manager: &HttpManager,
        forward: &Forward,
    ) -> Result<(Flow, Answered), Failure> {
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
        } = buffers;
        let framing = request.fields.framing;
        let out = if framing == Framing::Chunked {
            Out::Chunked
        } else {
            Out::Plain
        };
        let mut flow = Flow::new(framing, out);
        flow.prefill(request_in, request_out)
            .map_err(Failure::from_client)?;
        if request.expects_continue && !flow.read_all() {
            stream
                .write_all(reply::CONTINUE)
                .await
                .map_err(|_| Failure::Client)?;
            manager.stats.inc(worker.shard, Stat::Rq1xx);
        }
        response_in.clear();
        let mut sent = false;
        let mut scan = Scan::default();
        let mut watch = Watch::new(forward.idle_timeout.unwrap_or(manager.stream_idle_timeout));
        let result = poll_fn(|cx| {
            if !sent {
                match flow.poll(cx, stream, &mut connection.stream, request_in, request_out) {
                    Poll::Ready(Ok(())) => sent = true,
                    Poll::Ready(Err(FlowError::Write(_))) => {
                        // The endpoint may have answered before it closed: what it said is read below.
                        sent = true;
                        flow.wire_out |= BROKEN;
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
            loop {
                match scan.find(response_in.unread()) {
                    Ok(Some(length)) => match interim(response_in, response, length) {
                        Ok(true) => continue,
                        Ok(false) => return Poll::Ready(Ok(())),
                        Err(()) => return Poll::Ready(Err(Failure::Protocol)),
                    },
                    Ok(None) if response_in.unread().len() > LARGEST_RESPONSE_HEAD => {
                        return Poll::Ready(Err(Failure::Protocol));
                    }
                    Ok(None) => {}
                    Err(_) => return Poll::Ready(Err(Failure::Protocol)),
                }
                match response_in.poll_fill(cx, &mut connection.stream) {
                    Poll::Ready(Ok(n)) if n > 0 => {}
                    Poll::Ready(_) => {
                        let answered = !response_in.is_empty();
                        return Poll::Ready(Err(Failure::Upstream { answered }));
                    }
                    Poll::Pending => break,
                }
            }
            if sent && alarm.poll(cx, timeout_at).is_ready() {
                return Poll::Ready(Err(Failure::Timeout));
            }
            if watch.poll(cx, alarm, flow.wire_in + flow.wire_out).is_ready() {
                return Poll::Ready(Err(if sent { Failure::Timeout } else { Failure::Idle }));
            }
            Poll::Pending
        })
        .await;
        response_out.clear();
        let broken = flow.wire_out & BROKEN != 0;
        flow.wire_out &= !BROKEN;
        result.map(|()| {
            (
                flow,
                Answered {
                    request_sent: sent && !broken,
                },
            )
        })
    }

    /// Sends the response; the request's body goes on being sent where it has not ended.
    #[expect(
        clippy::too_many_arguments,
        reason = "one request's parts, each borrowed from a different owner"
    )]
    async fn respond(
        &mut self,
        buffers: &mut Buffers,
        manager: &HttpManager,
        lane: &Rc<Lane>,
        picked: &Picked,
        mut connection: Pooled,
        mut request_flow: Flow,
        answered: Answered,
        rewrite: &mut Rewrite<'_>,
        changes: &Changes<'_>,
        timeout_at: Option<Instant>,
    ) -> Outcome {
        let shard = self.worker.shard;
        let stats = &lane.cluster.stats;
        let is_head = buffers.request.method.of_head(buffers.request_in.head()) == b"HEAD";
        let status = buffers.response.status;
        let framing = match buffers.response.fields.framing {
            _ if is_head || status == 204 || status == 304 => Framing::None,
            framing => framing,
        };
        let http11 = buffers.request.fields.http11;
        let mut sent = answered.request_sent;
        let mut close = !sent || self.last_response(&buffers.request.fields.persistent());
        let out = match framing {
            Framing::Chunked | Framing::Close if http11 => Out::Chunked,
            Framing::Chunked | Framing::Close => {
                close = true;
                Out::Plain
            }
            _ => Out::Plain,
        };
        let until_close = out == Out::Plain && matches!(framing, Framing::Chunked | Framing::Close);
        rewrite.note_service_time();
        {
            let mut date = self.worker.date.borrow_mut();
            rewrite::response_head(
                buffers,
                manager,
                rewrite,
                changes,
                out,
                close,
                date.at(SystemTime::now()),
            );
        }
        let mut flow = Flow::new(framing, out);
        let Self { stream, alarm, .. } = self;
        let Buffers {
            request_in,
            request_out,
            response_in,
            response_out,
            ..
        } = buffers;
        let mut watch = Watch::new(manager.stream_idle_timeout);
        let mut failure = flow
            .prefill(response_in, response_out)
            .err()
            .map(|_| Failure::Protocol);
        if failure.is_none() {
            let result = poll_fn(|cx| {
                if !sent {
                    match request_flow.poll(cx, stream, &mut connection.stream, request_in, request_out) {
                        Poll::Ready(Ok(())) => sent = true,
                        Poll::Ready(Err(FlowError::Write(_))) | Poll::Pending => {}
                        Poll::Ready(Err(_)) => return Poll::Ready(Err(Failure::Client)),
                    }
                }
                match flow.poll(cx, &mut connection.stream, stream, response_in, response_out) {
                    Poll::Ready(Ok(())) => return Poll::Ready(Ok(())),
                    Poll::Ready(Err(FlowError::Write(_))) => return Poll::Ready(Err(Failure::Client)),
                    Poll::Ready(Err(FlowError::Read(_))) => {
                        return Poll::Ready(Err(Failure::Upstream { answered: true }));
                    }
                    Poll::Ready(Err(FlowError::Framing(_))) => return Poll::Ready(Err(Failure::Protocol)),
                    Poll::Pending => {}
                }
                if alarm.poll(cx, timeout_at).is_ready() {
                    return Poll::Ready(Err(Failure::Timeout));
                }
                if watch.poll(cx, alarm, flow.wire_in + flow.wire_out).is_ready() {
                    return Poll::Ready(Err(Failure::Idle));
                }
                Poll::Pending
            });
            failure = result.await.err();
        }
        stats.add(shard, ClusterStat::CxTxBytes, request_flow.wire_out);
        stats.add(
            shard,
            ClusterStat::CxRxBytes,
            flow.wire_in + response_in.head().len() as u64,
        );
        manager.stats.add(shard, Stat::CxTxBytes, flow.wire_out);
        count_upstream(lane, shard, status);
        let mut outcome = Outcome::new(status, "");
        outcome.has_response = true;
        outcome.received = request_flow.body;
        outcome.sent = flow.body;
        match failure {
            None => {
                let reusable = sent
                    && buffers.response.fields.persistent()
                    && framing != Framing::Close
                    && buffers.response_in.is_empty();
                if reusable {
                    lane.give_back(picked, self.peer.source, connection);
                }
                if !sent {
                    manager.stats.inc(shard, Stat::RqEarlyResponse);
                }
                outcome.keep = !close && sent;
            }
            Some(failure) => {
                outcome.flags = failure.flags();
                if matches!(failure, Failure::Client) {
                    manager.stats.inc(shard, Stat::RqRxReset);
                    stats.inc(shard, ClusterStat::RqTxReset);
                } else {
                    manager.stats.inc(shard, Stat::RqTxReset);
                    stats.inc(shard, ClusterStat::RqRxReset);
                    if until_close {
                        // Only a RST tells the client that this is not the end of the body.
                        sockets::reset_on_close(&self.stream);
                    }
                    // Half of the response is with the client: nothing more can be said to it.
                    outcome.flags = if outcome.flags.is_empty() {
                        "UPE"
                    } else {
                        outcome.flags
                    };
                }
                outcome.keep = false;
            }
        }
        outcome
    }

    /// Whether this response is the connection's last.
    fn last_response(&self, persistent: &bool) -> bool {
        let spent = self.manager.max_requests > 0 && self.served >= self.manager.max_requests;
        if spent {
            self.manager.stats.inc(self.worker.shard, Stat::CxMaxRequests);
        }
        !persistent || self.closing || spent || self.worker.draining().is_some()
    }

    async fn not_connected(
        &mut self,
        buffers: &mut Buffers,
        failure: NoConnection,
        address: std::net::SocketAddr,
    ) -> Outcome {
        let reason = match failure {
            NoConnection::Overflow => return self.overflow(buffers, address).await,
            NoConnection::TimedOut => "connection timeout",
            NoConnection::Failed(error) => {
                tracing::debug!(endpoint = %address, %error, "connecting failed");
                "remote connection failure"
            }
        };
        let body = format!("{DISCONNECTED}{reason}");
        let mut outcome = Outcome::new(503, "UF");
        outcome.upstream = Some(address);
        self.reply(buffers, outcome, &[], &body, false).await
    }

    async fn overflow(&mut self, buffers: &mut Buffers, address: std::net::SocketAddr) -> Outcome {
        let mut outcome = Outcome::new(503, "UO");
        outcome.upstream = Some(address);
        let body = format!("{DISCONNECTED}overflow");
        self.reply(
            buffers,
            outcome,
            &[(b"x-envoy-overloaded", b"true")],
            &body,
            false,
        )
        .await
    }

    async fn timed_out(
        &mut self,
        buffers: &mut Buffers,
        lane: &Lane,
        address: std::net::SocketAddr,
    ) -> Outcome {
        self.failed(buffers, lane, Failure::Timeout, address).await
    }

    /// Answers for an endpoint that did not.
    async fn failed(
        &mut self,
        buffers: &mut Buffers,
        lane: &Lane,
        failure: Failure,
        address: std::net::SocketAddr,
    ) -> Outcome {
        let (stats, shard) = (&lane.cluster.stats, self.worker.shard);
        let (status, body) = match &failure {
            Failure::Client => {
                stats.inc(shard, ClusterStat::RqTxReset);
                self.manager.stats.inc(shard, Stat::RqRxReset);
                let mut outcome = Outcome::new(0, "DC");
                outcome.upstream = Some(address);
                return outcome;
            }
            Failure::BadBody => {
                stats.inc(shard, ClusterStat::RqTxReset);
                self.manager.stats.inc(shard, Stat::CxProtocolError);
                (400, "Bad Request".to_owned())
            }
            Failure::Timeout => {
                stats.inc(shard, ClusterStat::RqTimeout);
                (504, "upstream request timeout".to_owned())
            }
            Failure::Idle => {
                self.manager.stats.inc(shard, Stat::RqIdleTimeout);
                (408, "stream timeout".to_owned())
            }
            Failure::Upstream { .. } => {
                stats.inc(shard, ClusterStat::RqRxReset);
                (503, format!("{DISCONNECTED}connection termination"))
            }
            Failure::Protocol => {
                stats.inc(shard, ClusterStat::CxProtocolError);
                (502, format!("{DISCONNECTED}protocol error"))
            }
        };
        if status >= 500 {
            count_upstream(lane, shard, status);
        }
        let mut outcome = Outcome::new(status, failure.flags());
        outcome.upstream = Some(address);
        let bad_body = matches!(failure, Failure::BadBody);
        self.reply(buffers, outcome, &[], &body, bad_body).await
    }

    async fn reply(
        &mut self,
        buffers: &mut Buffers,
        outcome: Outcome,
        extra: &[(&[u8], &[u8])],
        body: &str,
        close: bool,
    ) -> Outcome {
        self.reply_bytes(buffers, outcome, extra, body.as_bytes(), &[], close)
            .await
    }

    /// Sends a response of the proxy's own.
    async fn reply_bytes(
        &mut self,
        buffers: &mut Buffers,
        mut outcome: Outcome,
        extra: &[(&[u8], &[u8])],
        body: &[u8],
        levels: &[&HeaderChanges],
        close: bool,
    ) -> Outcome {
        let request = &buffers.request;
        let finished = swallow(request.fields.framing, &mut buffers.request_in);
        let close = close || !finished || self.last_response(&request.fields.persistent());
        let is_head = request.method.of_head(buffers.request_in.head()) == b"HEAD";
        let http11 = request.fields.http11;
        let out = &mut buffers.response_out;
        out.clear();
        let kind = (!body.is_empty()).then_some("text/plain");
        self.local_head(outcome.status, extra, body.len(), kind, close, http11, out);
        rewrite::change_local(levels, out);
        if !is_head {
            out.extend_from_slice(body);
            outcome.sent = body.len() as u64;
        }
        let written = self.write_out(buffers).await;
        outcome.keep = written && !close;
        outcome
    }

    #[expect(clippy::too_many_arguments, reason = "the parts of a head")]
    fn local_head(
        &self,
        status: u16,
        extra: &[(&[u8], &[u8])],
        length: usize,
        content_type: Option<&str>,
        close: bool,
        http11: bool,
        out: &mut Vec<u8>,
    ) {
        reply::status_line(status, out);
        for (name, value) in extra {
            reply::header(name, value, out);
        }
        if status != 204 && status != 304 {
            reply::header_number(b"content-length", length as u64, out);
        }
        if let Some(content_type) = content_type {
            reply::header(b"content-type", content_type.as_bytes(), out);
        }
        reply::header(b"date", self.worker.date.borrow_mut().at(SystemTime::now()), out);
        reply::header(b"server", self.manager.server_name.as_bytes(), out);
        if close {
            reply::header(b"connection", b"close", out);
        } else if !http11 {
            reply::header(b"connection", b"keep-alive", out);
        }
        out.extend_from_slice(b"\r\n");
    }

    async fn write_out(&mut self, buffers: &mut Buffers) -> bool {
        let limit = self
            .manager
            .stream_idle_timeout
            .unwrap_or(Duration::from_secs(300));
        let written = timeout(limit, self.stream.write_all(&buffers.response_out)).await;
        let length = buffers.response_out.len() as u64;
        self.manager.stats.add(self.worker.shard, Stat::CxTxBytes, length);
        matches!(written, Ok(Ok(())))
    }

    /// Ends the connection so that the last response arrives: no more from us, the client's rest is read and dropped.
    async fn linger(&mut self, buffers: &mut Buffers) {
        if self.stream.shutdown().await.is_err() {
            return;
        }
        let input = &mut buffers.request_in;
        let _ = timeout(LINGER, async {
            loop {
                input.clear();
                match poll_fn(|cx| input.poll_fill(cx, &mut self.stream)).await {
                    Ok(n) if n > 0 => {}
                    _ => return,
                }
            }
        })
        .await;
    }

    fn count(&self, outcome: &Outcome) {
        let (stats, shard) = (&self.manager.stats, self.worker.shard);
        stats.inc(shard, Stat::RqCompleted);
        let class = match outcome.status {
            200..=299 => Stat::Rq2xx,
            300..=399 => Stat::Rq3xx,
            400..=499 => Stat::Rq4xx,
            500..=599 => Stat::Rq5xx,
            _ => return,
        };
        stats.inc(shard, class);
    }

    fn record<'r>(&self, outcome: &Outcome, start: SystemTime, duration: Duration) -> Record<'r> {
        Record {
            start,
            duration,
            request: None,
            response: None,
            protocol: None,
            status: outcome.status,
            flags: outcome.flags,
            received: outcome.received,
            sent: outcome.sent,
            upstream: outcome.upstream,
            cluster: None,
            route: None,
            remote: self.peer.remote,
            local: self.peer.local,
        }
    }

    fn log(&self, record: &Record<'_>) {
        let mut lines = self.worker.lines.borrow_mut();
        self.manager
            .access_log
            .iter()
            .for_each(|log| log.log(record, &mut lines));
    }
}

const DISCONNECTED: &str = "upstream connect error or disconnect/reset before headers. reset reason: ";

/// Marks a request whose endpoint stopped reading.
const BROKEN: u64 = 1 << 63;

struct Answered {
    /// All of the request was sent before the response began.
    request_sent: bool,
}

/// Why a request got no (whole) response.
#[derive(Debug)]
enum Failure {
    /// The client went away.
    Client,
    /// The client's body is malformed.
    BadBody,
    /// The route's timeout.
    Timeout,
    /// Nothing moved for the stream idle timeout.
    Idle,
    /// The endpoint closed; `answered` if it had said something.
    Upstream { answered: bool },
    /// The endpoint does not speak HTTP.
    Protocol,
}

impl Failure {
    fn from_client(error: FlowError) -> Self {
        if matches!(error, FlowError::Framing(_)) {
            Self::BadBody
        } else {
            Self::Client
        }
    }

    fn flags(&self) -> &'static str {
        match self {
            Self::Client => "DC",
            Self::BadBody => "DPE",
            Self::Timeout => "UT",
            Self::Idle => "SI",
            Self::Upstream { .. } => "UC",
            Self::Protocol => "UPE",
        }
    }
}

/// The stream idle timeout: fires when a whole period passed without progress, so between one and two periods after
/// the last octet. Looks at the clock only when its period ends.
struct Watch {
    period: Option<Duration>,
    until: Option<Instant>,
    progress: u64,
}

impl Watch {
    fn new(period: Option<Duration>) -> Self {
        Self {
            period,
            until: None,
            progress: 0,
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>, alarm: &mut Alarm, progress: u64) -> Poll<()> {
        let Some(period) = self.period else {
            return Poll::Pending;
        };
        let until = *self.until.get_or_insert_with(|| Instant::now() + period);
        if alarm.poll(cx, Some(until)).is_pending() {
            return Poll::Pending;
        }
        if progress == self.progress {
            return Poll::Ready(());
        }
        self.progress = progress;
        let until = Instant::now() + period;
        self.until = Some(until);
        alarm.poll(cx, Some(until))
    }
}

/// Counts a request as active in its cluster.
struct Active<'a>(&'a Lane, crate::stats::Shard);

impl<'a> Active<'a> {
    fn new(lane: &'a Lane, shard: crate::stats::Shard) -> Self {
        lane.cluster.stats.inc(shard, ClusterStat::RqActive);
        Self(lane, shard)
    }
}

impl Drop for Active<'_> {
    fn drop(&mut self) {
        self.0.cluster.stats.dec(self.1, ClusterStat::RqActive);
    }
}

fn count_upstream(lane: &Lane, shard: crate::stats::Shard, status: u16) {
    let stats = &lane.cluster.stats;
    stats.inc(shard, ClusterStat::RqCompleted);
    let class = match status {
        200..=299 => ClusterStat::Rq2xx,
        300..=399 => ClusterStat::Rq3xx,
        400..=499 => ClusterStat::Rq4xx,
        500..=599 => ClusterStat::Rq5xx,
        _ => return,
    };
    stats.inc(shard, class);
}

/// Parses a response head. `Ok(true)` when it was an interim one and has been dropped.
fn interim(
    input: &mut super::buffer::Buffer,
    response: &mut super::head::ResponseHead,
    length: usize,
) -> Result<bool, ()> {
    response
        .parse(&mut input.unread_mut()[..length])
        .map_err(|_| ())?;
    match response.status {
        101 => Err(()),
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

fn is_idempotent(method: &[u8]) -> bool {
    matches!(
        method,
        b"GET" | b"HEAD" | b"OPTIONS" | b"TRACE" | b"PUT" | b"DELETE"
    )
}

/// Takes the request's body off the buffer if all of it is there; false when some is still to come.
fn swallow(framing: Framing, input: &mut super::buffer::Buffer) -> bool {
    match framing {
        Framing::None => true,
        Framing::Length(length) if length <= input.unread().len() as u64 => {
            input.consume(usize::try_from(length).unwrap_or_default());
            true
        }
        _ => false,
    }
}

fn location(redirect: &Redirect, route: &Route, buffers: &Buffers, rewrite: &Rewrite<'_>) -> Vec<u8> {
    let head = buffers.request_in.head();
    let forwarded = buffers
        .request
        .fields
        .get(head, b"x-forwarded-proto")
        .filter(|p| *p == b"https" || *p == b"http");
    let scheme = redirect
        .scheme
        .as_ref()
        .map(String::as_bytes)
        .or(forwarded)
        .unwrap_or(b"http");
    let authority = rewrite
        .default_host
        .unwrap_or_else(|| buffers.request.authority.of_head(head));
    let path = rewrite::path(buffers);
    let bare = path.split(|b| *b == b'?').next().unwrap_or(path);
    let query = if redirect.strip_query {
        b"".as_slice()
    } else {
        &path[bare.len()..]
    };
    let mut out = Vec::with_capacity(64);
    out.extend_from_slice(scheme);
    out.extend_from_slice(b"://");
    match (&redirect.host, redirect.port) {
        (Some(host), None) => out.extend_from_slice(host.as_bytes()),
        (host, port) => {
            let host = host.as_ref().map_or(authority, |h| h.as_bytes());
            let colon = host
                .iter()
                .rposition(|b| *b == b':')
                .filter(|c| !host[*c..].contains(&b']'));
            let default: Option<&[u8]> = if scheme == b"https" { Some(b":80") } else { None };
            match port {
                Some(port) => {
                    out.extend_from_slice(&host[..colon.unwrap_or(host.len())]);
                    out.extend_from_slice(format!(":{port}").as_bytes());
                }
                None => {
                    let cut = colon.filter(|c| default == Some(&host[*c..]));
                    out.extend_from_slice(&host[..cut.unwrap_or(host.len())]);
                }
            }
        }
    }
    match &redirect.path {
        RedirectPath::Keep => out.extend_from_slice(bare),
        RedirectPath::Replace(path) => {
            out.extend_from_slice(path);
            if path.contains(&b'?') {
                return out;
            }
        }
        RedirectPath::Prefix(prefix) => {
            out.extend_from_slice(prefix);
            out.extend_from_slice(&bare[route.matcher.path.matched_len(bare).min(bare.len())..]);
        }
    }
    out.extend_from_slice(query);
    out
}

struct View<'a> {
    buffers: &'a Buffers,
    host: Option<&'a [u8]>,
}

impl RequestView for View<'_> {
    fn host(&self) -> &[u8] {
        let head = self.buffers.request_in.head();
        self.host
            .unwrap_or_else(|| self.buffers.request.authority.of_head(head))
    }

    fn path(&self) -> &[u8] {
        rewrite::path(self.buffers)
    }

    fn method(&self) -> &[u8] {
        self.buffers
            .request
            .method
            .of_head(self.buffers.request_in.head())
    }

    fn each_header<'a>(&'a self, name: &[u8], see: &mut dyn FnMut(&'a [u8])) {
        let head = self.buffers.request_in.head();
        for field in &self.buffers.request.fields.fields {
            if field.name.of_head(head) == name {
                see(field.value.of_head(head));
            }
        }
    }
}

struct LoggedRequest<'a> {
    buffers: &'a Buffers,
    rewrite: &'a Rewrite<'a>,
}

impl Headers for LoggedRequest<'_> {
    fn header(&self, name: &[u8]) -> Option<&[u8]> {
        let head = self.buffers.request_in.head();
        let request = &self.buffers.request;
        match name {
            b":method" => Some(request.method.of_head(head)),
            b":path" => {
                let path = self
                    .rewrite
                    .path
                    .as_deref()
                    .unwrap_or_else(|| rewrite::path(self.buffers));
                Some(path).filter(|p| !p.is_empty())
            }
            b"x-envoy-original-path" if self.rewrite.path.is_some() => Some(rewrite::path(self.buffers)),
            b":authority" | b"host" => {
                let authority = self.rewrite.host.or(self.rewrite.default_host);
                Some(authority.unwrap_or_else(|| request.authority.of_head(head))).filter(|a| !a.is_empty())
            }
            b":scheme" => Some(b"http"),
            b"x-request-id" if self.rewrite.made_id => Some(&self.rewrite.request_id),
            name => request.fields.get(head, name),
        }
    }
}

struct LoggedResponse<'a> {
    buffers: &'a Buffers,
    service_ms: Option<&'a [u8]>,
}

impl Headers for LoggedResponse<'_> {
    fn header(&self, name: &[u8]) -> Option<&[u8]> {
        let head = self.buffers.response_in.head();
        match name {
            b"x-envoy-upstream-service-time" => self.service_ms,
            name => {
                let response = &self.buffers.response.fields;
                let field = response.fields.iter().find(|f| f.name.of_head(head) == name)?;
                (field.kind != FieldKind::Hop).then(|| field.value.of_head(head))
            }
        }
    }
}
