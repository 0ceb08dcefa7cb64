//! One client connection that speaks HTTP/2: every stream is served by a task of its own.

use std::cell::Cell;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use h2::server::{Builder, Connection};
use h2::{Reason, RecvStream, server::SendResponse};
use http::Request;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};

use super::backlog::Backlog;
use super::cork::Cork;
use super::exchange::Exchange;
use super::keepalive::{Heard, Keepalive};
use super::{LOCAL_RESETS, PENDING_RESETS, PREFACE, SEND_BUFFER};
use crate::alarm::{Alarm, earlier};
use crate::config::model::HttpManager;
use crate::http1::buffer::Allowance;
use crate::http1::serve::{LINGER, same_place, serve_stream};
use crate::stats::{Http as Stat, Http2 as Stat2, Scope, Shard};
use crate::tls::Stream;
use crate::worker::{Entry, Peer, Place, Program, Worker};

/// A connection's octets, of which some have been read already.
#[derive(Debug)]
pub struct Begun {
    /// What was read.
    pub octets: Bytes,
    /// Where the rest comes from, and where answers go.
    pub cork: Cork,
    /// Counts what comes, where somebody wants to know.
    pub heard: Option<Heard>,
    /// What was done in one turn, where that has a bound.
    pub turn: Option<Rc<Cell<usize>>>,
}

impl Begun {
    /// Whether enough was done in this turn; then the next one is asked for.
    fn is_others_turn(&self, cx: &Context<'_>) -> bool {
        let enough = self.turn.as_ref().is_some_and(|turn| turn.get() >= TURN);
        if enough {
            cx.waker().wake_by_ref();
        }
        enough
    }

    fn note(&self, cost: usize) {
        if let Some(turn) = &self.turn {
            turn.set(turn.get() + cost);
        }
    }
}

impl AsyncRead for Begun {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, room: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.octets.is_empty() {
            if this.is_others_turn(cx) {
                return Poll::Pending;
            }
            let before = room.filled().len();
            let read = Pin::new(&mut this.cork).poll_read(cx, room);
            let n = room.filled().len() - before;
            this.note(n);
            if let Some(heard) = &this.heard {
                heard.set(heard.get() + n as u64);
            }
            return read;
        }
        let n = this.octets.len().min(room.remaining());
        room.put_slice(&this.octets.split_to(n));
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Begun {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.is_others_turn(cx) {
            return Poll::Pending;
        }
        this.note(WRITE);
        Pin::new(&mut this.cork).poll_write(cx, data)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.is_others_turn(cx) {
            return Poll::Pending;
        }
        this.note(WRITE);
        Pin::new(&mut this.cork).poll_write_vectored(cx, data)
    }

    fn is_write_vectored(&self) -> bool {
        self.cork.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().cork).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().cork).poll_shutdown(cx)
    }
}

/// A connection, and what its streams are served by.
struct Client {
    cork: Cork,
    worker: Rc<Worker>,
    program: Rc<Program>,
    entry: Entry,
    peer: Peer,
    place: Place,
    manager: Arc<HttpManager>,
    streams: Rc<Streams>,
    served: u64,
    alarm: Alarm,
    keepalive: Option<Keepalive>,
    turn: Rc<Cell<usize>>,
    /// Of all streams.
    allowance: Allowance,
    backlog: Arc<Backlog>,
    /// GOAWAY has been said.
    leaving: bool,
}

/// Octets that are taken off a connection before others have their turn: frames can be small, and costly.
const TURN: usize = 8 * 1024;

/// What a write counts for, octets: every PING asks for one.
const WRITE: usize = 1024;

/// The streams that are being served.
#[derive(Debug, Default)]
struct Streams {
    open: Cell<usize>,
    ended: Notify,
}

/// What the connection's task is woken by.
enum Event {
    Request(Box<Request<RecvStream>>, SendResponse<Bytes>),
    Over(Option<h2::Error>),
    Leave(Stat),
    /// The drain's time is up, a client that was told to go does not, or one is gone.
    Abandon,
}

/// Serves a connection to its end. `program` is the one its listener comes from.
pub async fn serve(
    worker: Rc<Worker>,
    program: Rc<Program>,
    entry: Entry,
    mut begun: Begun,
    peer: Peer,
    place: Place,
    manager: Arc<HttpManager>,
) {
    let (stats, shard) = (Arc::clone(&manager.stats), worker.shard);
    stats.inc(shard, Stat::CxHttp2Total);
    stats.inc(shard, Stat::CxHttp2Active);
    let limit = manager.headers_timeout.or(manager.idle_timeout);
    let kept = manager
        .http2
        .keepalive
        .map(|settings| (settings, Heard::default()));
    let turn = Rc::new(Cell::new(0));
    begun.turn = Some(Rc::clone(&turn));
    let cork = begun.cork.clone();
    begun.heard = kept.as_ref().map(|(_, heard)| Rc::clone(heard));
    let handshake = async {
        if begins_well(&mut begun).await {
            builder(&manager).handshake(begun).await.map(Some)
        } else {
            end(begun).await;
            Ok(None)
        }
    };
    let shaken = match limit {
        Some(limit) => timeout(limit, handshake).await.ok(),
        None => Some(handshake.await),
    };
    match shaken {
        Some(Ok(Some(mut connection))) => {
            let kept = kept.and_then(|(settings, heard)| Some((settings, connection.ping_pong()?, heard)));
            let client = Client {
                cork,
                worker,
                program,
                entry,
                peer,
                place,
                manager: Arc::clone(&manager),
                streams: Rc::default(),
                served: 0,
                alarm: Alarm::default(),
                turn,
                keepalive: kept.map(|(settings, pings, heard)| Keepalive::new(settings, pings, heard)),
                allowance: Allowance::default(),
                backlog: Arc::default(),
                leaving: false,
            };
            client.run(connection).await;
        }
        Some(Ok(None)) => stats.inc(shard, Stat::CxProtocolError),
        Some(Err(error)) => {
            tracing::debug!(client = %peer.remote, %error, "no HTTP/2");
            stats.inc(shard, Stat::CxProtocolError);
        }
        None => stats.inc(shard, Stat::RqHeaderTimeout),
    }
    stats.dec(shard, Stat::CxHttp2Active);
}

/// Whether the connection begins with the preface, which stays to be read.
async fn begins_well(begun: &mut Begun) -> bool {
    let (mut octets, mut had) = ([0; PREFACE.len()], 0);
    while had < octets.len() {
        match begun.read(&mut octets[had..]).await {
            Ok(n) if n > 0 => had += n,
            _ => return false,
        }
        if octets[..had] != PREFACE[..had] {
            return false;
        }
    }
    begun.octets = [&octets, &*begun.octets].concat().into();
    true
}

/// Ends a connection that is none, so that the client sees an end and not a reset: its rest is read for a moment and dropped.
async fn end(mut begun: Begun) {
    if begun.shutdown().await.is_ok() {
        let mut room = [0; 1024];
        let _ = timeout(LINGER, async {
            while begun.read(&mut room).await.is_ok_and(|n| n > 0) {}
        })
        .await;
    }
}

fn builder(manager: &HttpManager) -> Builder {
    let mut builder = h2::server::Builder::new();
    builder
        .max_concurrent_streams(manager.http2.streams)
        .initial_window_size(manager.http2.stream_window)
        .initial_connection_window_size(manager.http2.connection_window)
        .max_header_list_size(u32::try_from(manager.max_head).unwrap_or(u32::MAX))
        .max_send_buffer_size(SEND_BUFFER)
        .max_pending_accept_reset_streams(PENDING_RESETS)
        .max_local_error_reset_streams(Some(LOCAL_RESETS));
    if manager.http2.connect {
        builder.enable_connect_protocol();
    }
    builder
}

impl Client {
    async fn run(mut self, mut connection: Connection<Begun, Bytes>) {
        let (stats, shard) = (Arc::clone(&self.manager.stats), self.worker.shard);
        let mut idle_since = Instant::now();
        loop {
            let event = self.next(&mut connection, idle_since).await;
            match event {
                Event::Request(request, response) => self.begin(*request, response),
                Event::Leave(why) => {
                    stats.inc(shard, why);
                    self.leave(&mut connection);
                }
                Event::Abandon => return,
                Event::Over(error) => {
                    if let Some(error) = error {
                        self.note(&error);
                    }
                    return;
                }
            }
            if self.manager.max_requests > 0 && self.served >= self.manager.max_requests && !self.leaving {
                stats.inc(shard, Stat::CxMaxRequests);
                self.leave(&mut connection);
            }
            idle_since = Instant::now();
        }
    }

    /// Says GOAWAY: streams that were begun are served, no more come.
    fn leave(&mut self, connection: &mut Connection<Begun, Bytes>) {
        self.worker.http2.inc(self.worker.shard, Stat2::GoawaySent);
        self.leaving = true;
        connection.graceful_shutdown();
    }

    async fn next(&mut self, connection: &mut Connection<Begun, Bytes>, mut idle_since: Instant) -> Event {
        let streams = Rc::clone(&self.streams);
        let mut ended = std::pin::pin!(streams.ended.notified());
        poll_fn(|cx| {
            self.turn.set(0);
            let event = self.poll_next(connection, cx);
            if event.is_ready() {
                return event;
            }
            while ended.as_mut().poll(cx).is_ready() {
                idle_since = Instant::now();
                ended.set(streams.ended.notified());
            }
            let event = self.poll_end(idle_since, cx);
            match self.cork.poll_drain(cx) {
                Poll::Ready(Err(_)) => Poll::Ready(Event::Abandon),
                _ => event,
            }
        })
        .await
    }

    /// What the client does.
    fn poll_next(&mut self, connection: &mut Connection<Begun, Bytes>, cx: &mut Context<'_>) -> Poll<Event> {
        match connection.poll_accept(cx) {
            Poll::Ready(Some(Ok((request, response)))) => {
                return Poll::Ready(Event::Request(Box::new(request), response));
            }
            Poll::Ready(Some(Err(error))) => return Poll::Ready(Event::Over(Some(error))),
            Poll::Ready(None) => return Poll::Ready(Event::Over(None)),
            Poll::Pending => {}
        }
        if self.keepalive.as_mut().is_some_and(|k| k.poll(cx).is_ready()) {
            self.worker.http2.inc(self.worker.shard, Stat2::KeepaliveTimeout);
            return Poll::Ready(Event::Abandon);
        }
        Poll::Pending
    }

    /// Whether the connection has to end although the client does nothing.
    fn poll_end(&mut self, idle_since: Instant, cx: &mut Context<'_>) -> Poll<Event> {
        self.entry.wake_by(cx.waker());
        let idle = self.streams.open.get() == 0;
        let grace = self.manager.idle_timeout.filter(|_| idle).map(|t| idle_since + t);
        let draining = self.worker.draining();
        if !self.leaving {
            let closes = self.worker.closing.closes(self.place.listener.direction);
            if draining.is_some() || closes || !self.is_in_force() {
                return Poll::Ready(Event::Leave(Stat::CxDrainClose));
            }
            return match self.alarm.poll(cx, grace) {
                Poll::Ready(()) => Poll::Ready(Event::Leave(Stat::CxIdleTimeout)),
                Poll::Pending => Poll::Pending,
            };
        }
        let until = draining.map(|(idle_end, end)| if idle { idle_end } else { end });
        match self.alarm.poll(cx, earlier(until, grace)) {
            Poll::Ready(()) => Poll::Ready(Event::Abandon),
            Poll::Pending => Poll::Pending,
        }
    }

    /// Whether new streams may come: the listener's chain is still there.
    fn is_in_force(&mut self) -> bool {
        if self.worker.generation() == self.program.config.generation {
            return true;
        }
        let program = self.worker.program();
        let Some((place, manager)) = same_place(&self.place, &program) else {
            return false;
        };
        self.manager = manager.unwrap_or_else(|| Arc::clone(&self.manager));
        (self.place, self.program) = (place, program);
        true
    }

    /// Gives a stream to a task.
    fn begin(&mut self, request: Request<RecvStream>, response: SendResponse<Bytes>) {
        self.served += 1;
        let exchange = match Exchange::new(request, response, Arc::clone(&self.backlog)) {
            Ok(exchange) => exchange,
            Err((mut response, reason)) => {
                tracing::debug!(client = %self.peer.remote, reason, "stream refused");
                let (stats, shard) = (&self.manager.stats, self.worker.shard);
                stats.inc(shard, Stat::RqTotal);
                stats.inc(shard, Stat::RqTxReset);
                self.worker.http2.inc(shard, Stat2::RxMessagingError);
                response.send_reset(Reason::PROTOCOL_ERROR);
                return;
            }
        };
        let open = Open::new(&self.streams, &self.worker);
        let stream = Stream::Exchange(Box::new(exchange));
        // Boxed: a task moves what it runs several times, and this is some kilobytes.
        tokio::task::spawn_local(Box::pin(serve_stream(
            Rc::clone(&self.worker),
            Rc::clone(&self.program),
            (self.worker.enter(), open),
            stream,
            Peer {
                http2: true,
                small: Some(self.allowance.clone()),
                ..self.peer.clone()
            },
            self.place.clone(),
            Arc::clone(&self.manager),
        )));
    }

    fn note(&self, error: &h2::Error) {
        let (stats, shard) = (&self.manager.stats, self.worker.shard);
        tracing::debug!(client = %self.peer.remote, %error, "HTTP/2 ended");
        if error.is_library() && error.reason().is_some_and(|r| r != Reason::NO_ERROR) {
            stats.inc(shard, Stat::CxProtocolError);
        }
    }
}

/// Counts a stream as open.
struct Open {
    streams: Rc<Streams>,
    stats: Arc<Scope>,
    shard: Shard,
}

impl Open {
    fn new(streams: &Rc<Streams>, worker: &Worker) -> Self {
        streams.open.set(streams.open.get() + 1);
        worker.http2.inc(worker.shard, Stat2::StreamsActive);
        Self {
            streams: Rc::clone(streams),
            stats: Arc::clone(&worker.http2),
            shard: worker.shard,
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.stats.dec(self.shard, Stat2::StreamsActive);
        self.streams.open.set(self.streams.open.get() - 1);
        self.streams.ended.notify_one();
    }
}
