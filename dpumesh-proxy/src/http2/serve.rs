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
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};

use super::exchange::Exchange;
use super::{LOCAL_RESETS, PENDING_RESETS, SEND_BUFFER};
use crate::alarm::{Alarm, earlier};
use crate::config::model::HttpManager;
use crate::http1::serve::{same_place, serve_stream};
use crate::stats::{Http as Stat, Http2 as Stat2, Scope, Shard};
use crate::tls::Stream;
use crate::worker::{Entry, Peer, Place, Program, Worker};

/// A connection's octets, of which some have been read already.
#[derive(Debug)]
pub struct Begun {
    /// What was read.
    pub octets: Bytes,
    /// Where the rest comes from.
    pub stream: Stream,
}

impl AsyncRead for Begun {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, room: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.octets.is_empty() {
            return Pin::new(&mut this.stream).poll_read(cx, room);
        }
        let n = this.octets.len().min(room.remaining());
        room.put_slice(&this.octets.split_to(n));
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Begun {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, data)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(cx, data)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

/// A connection, and what its streams are served by.
struct Client {
    worker: Rc<Worker>,
    program: Rc<Program>,
    entry: Entry,
    peer: Peer,
    place: Place,
    manager: Arc<HttpManager>,
    streams: Rc<Streams>,
    served: u64,
    alarm: Alarm,
    /// GOAWAY has been said.
    leaving: bool,
}

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
    /// The drain's time is up, or a client that was told to go does not.
    Abandon,
}

/// Serves a connection to its end. `program` is the one its listener comes from.
pub async fn serve(
    worker: Rc<Worker>,
    program: Rc<Program>,
    entry: Entry,
    begun: Begun,
    peer: Peer,
    place: Place,
    manager: Arc<HttpManager>,
) {
    let (stats, shard) = (Arc::clone(&manager.stats), worker.shard);
    stats.inc(shard, Stat::CxHttp2Total);
    stats.inc(shard, Stat::CxHttp2Active);
    let limit = manager.headers_timeout.or(manager.idle_timeout);
    let handshake = builder(&manager).handshake(begun);
    let shaken = match limit {
        Some(limit) => timeout(limit, handshake).await.ok(),
        None => Some(handshake.await),
    };
    match shaken {
        Some(Ok(connection)) => {
            let client = Client {
                worker,
                program,
                entry,
                peer,
                place,
                manager: Arc::clone(&manager),
                streams: Rc::default(),
                served: 0,
                alarm: Alarm::default(),
                leaving: false,
            };
            client.run(connection).await;
        }
        Some(Err(error)) => {
            tracing::debug!(client = %peer.remote, %error, "no HTTP/2");
            stats.inc(shard, Stat::CxProtocolError);
        }
        None => stats.inc(shard, Stat::RqHeaderTimeout),
    }
    stats.dec(shard, Stat::CxHttp2Active);
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
            match connection.poll_accept(cx) {
                Poll::Ready(Some(Ok((request, response)))) => {
                    return Poll::Ready(Event::Request(Box::new(request), response));
                }
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Event::Over(Some(error))),
                Poll::Ready(None) => return Poll::Ready(Event::Over(None)),
                Poll::Pending => {}
            }
            self.entry.wake_by(cx.waker());
            while ended.as_mut().poll(cx).is_ready() {
                idle_since = Instant::now();
                ended.set(streams.ended.notified());
            }
            let idle = streams.open.get() == 0;
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
        })
        .await
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
        let exchange = match Exchange::new(request, response) {
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
        let served = serve_stream(
            Rc::clone(&self.worker),
            Rc::clone(&self.program),
            self.worker.enter(),
            stream,
            Peer {
                http2: true,
                ..self.peer.clone()
            },
            self.place.clone(),
            Arc::clone(&self.manager),
        );
        tokio::task::spawn_local(async move {
            let _open = open;
            served.await;
        });
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
