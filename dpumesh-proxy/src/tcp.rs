//! The TCP proxy: two connections, octets both ways, half-close kept, RST passed on.
//!
//! A direction that ends is shut down on the other side while the opposite one goes on. A connection that breaks resets
//! its counterpart, so that neither side takes a broken stream for a finished one. A connection whose filter chain is changed or gone
//! (its rules may be others now) is closed a little later.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, SystemTime};

use tokio::io::AsyncWrite;
use tokio::time::{Instant, timeout};

use crate::access_log::{About, Besides, Extra, Record};
use crate::alarm::{Alarm, earlier};
use crate::balance::{Ask, policy};
use crate::config::model::{TcpProxy, Terminal};
use crate::health::outlier::Outcome;
use crate::http1::buffer::Buffer;
use crate::http1::serve::reported::named;
use crate::istio::{Facts, Protocol, Reporting, Role, Series, Service};
use crate::stats::{Cluster as ClusterStat, Istio, Tcp as Stat};
use crate::tls::Stream;
use crate::upstream::{Lane, NoConnection, Picked, Pooled};
use crate::worker::{Buffers, Entry, Peer, Place, Worker};

pub mod tunnel;

/// How long a connection may go on whose filter chain is changed or gone.
const CHAIN_GONE: Duration = Duration::from_secs(10);

/// Relays one connection to its end.
pub(crate) async fn relay(
    worker: Rc<Worker>,
    entry: Entry,
    mut client: Stream,
    peer: Peer,
    place: Place,
    proxy: Arc<TcpProxy>,
) {
    let (begun, wall) = (Instant::now(), SystemTime::now());
    let (stats, shard) = (&proxy.stats, worker.shard);
    stats.inc(shard, Stat::CxTotal);
    let program = worker.program();
    let target = proxy.clusters.pick(fastrand::u64(..));
    // The proxy's own configuration may be older than the program: then its cluster is found by name.
    let lane = program.lanes.iter().find(|l| *l.cluster.name == *target.name);
    let mut end = End::default();
    let reporting = Reporting::of(&program.config, &place.listener, &peer);
    let reported = |lane: Option<&Lane>, server: Option<(&Picked, &Pooled)>, flags: &str| {
        let reporting = reporting.as_ref()?;
        Some(series(&worker, reporting, &peer, lane, server, flags))
    };
    let (mut open, mut principal) = (None, None);
    match lane {
        None => {
            stats.inc(shard, Stat::CxNoRoute);
            end.flags = "NC";
        }
        Some(lane) => {
            let mut attempts = 0;
            let ask = Ask {
                hash: proxy.hash_source_ip.then(|| policy::of_ip(peer.remote.ip())),
                ..Ask::any(peer.local)
            };
            let server = loop {
                attempts += 1;
                let Some(picked) = lane.pick(&ask) else {
                    lane.cluster.stats.inc(shard, ClusterStat::CxNoneHealthy);
                    end.flags = "UH";
                    break None;
                };
                let address = picked.endpoint.address;
                end.upstream = Some(address);
                let connected = match lane.connect(&picked, &peer).await {
                    Ok(mut server) => match &proxy.tunneling {
                        None => Ok((server, None)),
                        Some(tunneling) => {
                            let record = Record::of_connection(&peer, wall);
                            let opened = Box::pin(tunnel::open(tunneling, &worker, &record, &mut server));
                            match timeout(lane.cluster.connect_timeout, opened).await {
                                Ok(Ok(early)) => Ok((server, Some(early))),
                                Ok(Err(error)) => Err(NoConnection::Failed(error)),
                                Err(_) => Err(NoConnection::TimedOut),
                            }
                        }
                    },
                    Err(failure) => Err(failure),
                };
                match connected {
                    Ok((server, early)) => {
                        lane.note(&picked, Outcome::Served);
                        break Some((picked, server, early));
                    }
                    Err(failure) => {
                        let (flags, outcome) = match failure {
                            NoConnection::Overflow => ("UO", None),
                            NoConnection::TimedOut => ("UF", Some(Outcome::TimedOut)),
                            NoConnection::Failed(_) => ("UF", Some(Outcome::Failed)),
                        };
                        end.flags = flags;
                        if let Some(outcome) = outcome {
                            lane.note(&picked, outcome);
                        }
                        if attempts >= proxy.max_connect_attempts || matches!(failure, NoConnection::Overflow)
                        {
                            break None;
                        }
                    }
                }
            };
            match server {
                None => client.reset_on_close(),
                Some((picked, server, early)) => {
                    end.flags = "";
                    principal = server.principal.clone();
                    open = reported(Some(&**lane), Some((&picked, &server)), "");
                    if let Some(open) = &open {
                        open.opened();
                    }
                    let ends = (&mut client, server, early);
                    let how = (proxy.idle_timeout, open.as_deref());
                    pump(&worker, &entry, &place, ends, how, &mut end).await;
                    lane.cluster
                        .stats
                        .add(shard, ClusterStat::CxTxBytes, end.received);
                    lane.cluster.stats.add(shard, ClusterStat::CxRxBytes, end.sent);
                    if end.idle {
                        stats.inc(shard, Stat::IdleTimeout);
                    }
                }
            }
        }
    }
    stats.add(shard, Stat::CxRxBytes, end.received);
    stats.add(shard, Stat::CxTxBytes, end.sent);
    if open.is_none() {
        // It never got anywhere: opened and closed at once.
        open = reported(lane.map(|l| &**l), None, end.flags);
        open.iter().for_each(|s| s.opened());
    }
    open.iter().for_each(|s| s.closed());
    if proxy.access_log.is_empty() {
        return;
    }
    let mut record = Record::of_connection(&peer, wall);
    record.duration = begun.elapsed();
    (record.flags, record.received, record.sent) = (end.flags, end.received, end.sent);
    (record.upstream, record.cluster) = (end.upstream, Some(&*target.name));
    record.extra.endpoints = lane.map_or(&[], |l| &l.cluster.endpoints);
    record.extra.chain = Some(&place.chain.name);
    record.extra.upstream_peer = principal.as_deref();
    let mut lines = worker.lines.borrow_mut();
    proxy
        .access_log
        .iter()
        .for_each(|log| log.log(&record, &mut lines));
}

/// The series of Istio's metrics that a connection counts in.
fn series(
    worker: &Worker,
    reporting: &Reporting,
    peer: &Peer,
    lane: Option<&Lane>,
    server: Option<(&Picked, &Pooled)>,
    flags: &str,
) -> Arc<Series> {
    let connection = &peer.connection;
    let mut service = Service::default();
    if let Some(lane) = lane {
        named(&lane.cluster, &mut service);
    }
    let (peer_principal, local_principal) = match reporting.role {
        Role::Source => {
            let by_tls = server.is_some_and(|(_, s)| matches!(s.stream, Stream::Tls(_)));
            let shown = connection.certificate.as_deref().filter(|_| by_tls);
            (server.and_then(|(_, s)| s.principal.as_deref()), shown)
        }
        Role::Destination => {
            let theirs = connection.peer.as_ref().and_then(|p| p.uri_sans.first());
            let ours = connection.local.as_ref().and_then(|l| l.uri_sans.first());
            (theirs.map(String::as_str), ours.map(String::as_str))
        }
    };
    let facts = Facts {
        role: reporting.role,
        protocol: Protocol::Tcp,
        status: 0,
        grpc: None,
        flags: (flags, Besides::default()),
        service,
        peer: match reporting.role {
            Role::Source => server.and_then(|(picked, _)| picked.endpoint.workload.as_deref()),
            Role::Destination => None,
        },
        peer_principal,
        local_principal,
    };
    let mut reporter = worker.reporter.borrow_mut();
    let (series, too_many) = reporter.series(worker.shard, &reporting.pod, &facts);
    if too_many {
        worker.istio.inc(worker.shard, Istio::SeriesOverflow);
    }
    Arc::clone(series)
}

impl<'r> Record<'r> {
    /// What is known of a connection when it has come.
    fn of_connection(peer: &'r Peer, start: SystemTime) -> Self {
        Self {
            start,
            duration: Duration::ZERO,
            request: None,
            response: None,
            protocol: None,
            status: 0,
            flags: "",
            received: 0,
            sent: 0,
            upstream: None,
            cluster: None,
            route: None,
            remote: peer.remote,
            direct_remote: peer.direct_remote,
            local: peer.local,
            direct_local: peer.direct_local,
            ingress: peer.ingress,
            extra: Extra {
                server_name: peer.connection.server_name.as_deref(),
                connection: Some(&peer.connection),
                connection_id: Some(peer.id),
                about: About::Connection,
                ..Extra::default()
            },
        }
    }
}

/// Logs a connection that the access rules of its chain refused.
pub(crate) fn log_refused(worker: &Worker, terminal: &Terminal, peer: &Peer, details: &str) {
    let logs = match terminal {
        Terminal::Tcp(proxy) => &proxy.access_log,
        Terminal::Http(manager) => &manager.access_log,
    };
    let mut record = Record::of_connection(peer, SystemTime::now());
    record.extra.termination = Some(details);
    let mut lines = worker.lines.borrow_mut();
    logs.iter().for_each(|log| log.log(&record, &mut lines));
}

/// How a connection ended.
#[derive(Debug, Default)]
struct End {
    flags: &'static str,
    received: u64,
    sent: u64,
    upstream: Option<std::net::SocketAddr>,
    idle: bool,
}

async fn pump(
    worker: &Worker,
    entry: &Entry,
    place: &Place,
    (client, mut server, early): (&mut Stream, Pooled, Option<Box<Buffers>>),
    (idle_timeout, series): (Option<Duration>, Option<&Series>),
    end: &mut End,
) {
    let mut alarm = Alarm::default();
    let mut idle_until = idle_timeout.map(|t| Instant::now() + t);
    let mut seen = 0;
    let (mut generation, mut gone) = (worker.generation(), None);
    let (mut up, mut down) = (Direction::default(), Direction::default());
    down.buffers = early;
    let mut told = (0, 0);
    let mut tell = |sent: u64, received: u64| {
        if let Some(series) = series {
            series.moved(sent - told.0, received - told.1);
            told = (sent, received);
        }
    };
    let result: Result<(), Broken> = poll_fn(|cx| {
        let a = up.poll(
            cx,
            worker,
            client,
            &mut server.stream,
            Broken::Client,
            Broken::Server,
        )?;
        let b = down.poll(
            cx,
            worker,
            &mut server.stream,
            client,
            Broken::Server,
            Broken::Client,
        )?;
        if a.is_ready() && b.is_ready() {
            return Poll::Ready(Ok(()));
        }
        tell(down.moved, up.moved);
        entry.wake_by(cx.waker());
        if generation != worker.generation() {
            generation = worker.generation();
            gone = if place.is_in_force(&worker.program()) {
                None
            } else {
                gone.or_else(|| Some(Instant::now() + CHAIN_GONE))
            };
        }
        let last = earlier(worker.draining().map(|(_, deadline)| deadline), gone);
        while alarm.poll(cx, earlier(idle_until, last)).is_ready() {
            let now = Instant::now();
            if last.is_some_and(|last| now >= last) {
                return Poll::Ready(Err(Broken::Drained));
            }
            if seen == up.moved + down.moved {
                return Poll::Ready(Err(Broken::Idle));
            }
            seen = up.moved + down.moved;
            idle_until = idle_timeout.map(|t| now + t);
        }
        Poll::Pending
    })
    .await;
    tell(down.moved, up.moved);
    up.finish(worker);
    down.finish(worker);
    (end.received, end.sent) = (up.moved, down.moved);
    match result {
        Ok(()) => {}
        Err(Broken::Idle) => end.idle = true,
        Err(Broken::Drained) => {}
        Err(Broken::Client) => {
            end.flags = "DC";
            server.stream.reset_on_close();
        }
        Err(Broken::Server) => {
            end.flags = "UC";
            client.reset_on_close();
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Broken {
    Client,
    Server,
    Idle,
    Drained,
}

/// One direction: read, write, shut down.
#[derive(Debug, Default)]
struct Direction {
    buffers: Option<Box<Buffers>>,
    moved: u64,
    ended: bool,
    done: bool,
}

impl Direction {
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        worker: &Worker,
        from: &mut Stream,
        to: &mut Stream,
        reader: Broken,
        writer: Broken,
    ) -> Result<Poll<()>, Broken> {
        loop {
            if self.done {
                return Ok(Poll::Ready(()));
            }
            match self.step(cx, worker, from, to) {
                Poll::Pending => {
                    // A silent connection holds no buffer.
                    if self.buffers.as_ref().is_some_and(|b| b.request_in.is_empty()) {
                        self.finish(worker);
                    }
                    return Ok(Poll::Pending);
                }
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(Side::Read)) => return Err(reader),
                Poll::Ready(Err(Side::Write)) => return Err(writer),
            }
        }
    }

    fn step(
        &mut self,
        cx: &mut Context<'_>,
        worker: &Worker,
        from: &mut Stream,
        to: &mut Stream,
    ) -> Poll<Result<(), Side>> {
        let buffer: &mut Buffer = match &mut self.buffers {
            Some(buffers) => &mut buffers.request_in,
            none => {
                if !self.ended {
                    ready!(from.poll_read_ready(cx)).map_err(|_| Side::Read)?;
                }
                &mut none.insert(worker.take_buffers(None)).request_in
            }
        };
        if !buffer.is_empty() {
            let n = ready!(Pin::new(&mut *to).poll_write(cx, buffer.unread()))
                .map_err(|_: io::Error| Side::Write)?;
            buffer.consume(n);
            self.moved += n as u64;
            return Poll::Ready(Ok(()));
        }
        if self.ended {
            ready!(Pin::new(&mut *to).poll_shutdown(cx)).map_err(|_| Side::Write)?;
            self.done = true;
            return Poll::Ready(Ok(()));
        }
        buffer.grow_for(self.moved);
        let n = ready!(buffer.poll_fill(cx, from)).map_err(|_| Side::Read)?;
        self.ended = n == 0;
        Poll::Ready(Ok(()))
    }

    fn finish(&mut self, worker: &Worker) {
        if let Some(buffers) = self.buffers.take() {
            worker.return_buffers(buffers);
        }
    }
}

enum Side {
    Read,
    Write,
}
