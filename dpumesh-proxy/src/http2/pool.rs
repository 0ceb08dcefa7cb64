//! Connections to endpoints that speak HTTP/2, each shared by the streams of one worker that may travel together.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::{Future as _, poll_fn};
use std::hash::Hash;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use h2::client::{Builder, SendRequest};
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::call::Call;
use super::cork::Cork;
use super::keepalive::{Heard, Keepalive};
use super::serve::Begun;
use super::{LOCAL_RESETS, PENDING_RESETS, SEND_BUFFER};
use crate::config::model::Http2;
use crate::stats::{ClusterHttp2, Scope, Shard};
use crate::tls::Stream;
use crate::upstream::Freed;

/// Largest response head, octets, as for HTTP/1.1.
const LARGEST_RESPONSE_HEAD: u32 = 64 * 1024;

/// The connections of one endpoint, by what they differ in.
#[derive(Debug)]
pub struct Pool<K> {
    connections: RefCell<HashMap<K, Vec<Rc<Shared>>>>,
    making: RefCell<HashMap<K, Rc<Mutex<()>>>>,
}

impl<K> Default for Pool<K> {
    fn default() -> Self {
        Self {
            connections: RefCell::default(),
            making: RefCell::default(),
        }
    }
}

/// A connection and who uses it.
#[derive(Debug)]
pub struct Shared {
    request: SendRequest<Bytes>,
    streams: Cell<usize>,
    /// The most streams at once, as configured.
    most: usize,
    served: Cell<u64>,
    since: Cell<Instant>,
    closed: Rc<Cell<bool>>,
    /// Whether it runs over TLS.
    pub(super) tls: bool,
    /// Our end of it.
    pub(super) local: Option<SocketAddr>,
    /// The SPIFFE id that the endpoint's certificate has.
    pub(super) principal: Option<Arc<str>>,
    freed: Rc<Freed>,
}

impl Shared {
    /// Whether it takes one more stream. `most_requests`: after so many it is left; 0 is no limit.
    fn has_room(&self, most_requests: u64) -> bool {
        let most = self.most.min(self.request.current_max_send_streams());
        let spent = most_requests > 0 && self.served.get() >= most_requests;
        !self.closed.get() && !spent && self.streams.get() < most
    }

    /// Whether the endpoint has said GOAWAY, or the connection is broken.
    fn is_leaving(&self) -> bool {
        let mut request = self.request.clone();
        let ready = request.poll_ready(&mut Context::from_waker(std::task::Waker::noop()));
        self.closed.get() || matches!(ready, std::task::Poll::Ready(Err(_)))
    }

    fn call(self: &Rc<Self>, for_http2: bool) -> Call {
        self.served.set(self.served.get() + 1);
        Call::new(self.request.clone(), Rc::clone(self), for_http2)
    }
}

/// Counts a stream of a connection as open.
#[derive(Debug)]
pub(super) struct InUse(Rc<Shared>);

impl InUse {
    pub(super) fn new(shared: Rc<Shared>) -> Self {
        shared.streams.set(shared.streams.get() + 1);
        Self(shared)
    }

    pub(super) fn shared(&self) -> &Shared {
        &self.0
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        self.0.streams.set(self.0.streams.get() - 1);
        self.0.since.set(Instant::now());
        self.0.freed.wake_one();
    }
}

/// How a connection is made and used.
#[derive(Debug)]
pub struct Terms<'a> {
    /// Limits.
    pub http2: &'a Http2,
    /// Requests after which a connection is left; 0 is no limit.
    pub most_requests: u64,
    /// Whether the client speaks HTTP/2.
    pub for_http2: bool,
    /// `cluster.NAME.http2.*`, where connections are kept alive.
    pub stats: Option<&'a Arc<Scope>>,
    /// Its shard.
    pub shard: Shard,
    /// Told when a stream or the connection ends.
    pub freed: &'a Rc<Freed>,
}

impl<K: Eq + Hash + Clone> Pool<K> {
    /// To be held while a connection is made: those that may use it wait for its streams, others do not.
    pub fn making(&self, key: &K) -> Rc<Mutex<()>> {
        let mut making = self.making.borrow_mut();
        Rc::clone(making.entry(key.clone()).or_default())
    }

    /// A stream on a connection that is open and has room.
    pub fn take(&self, key: &K, terms: &Terms<'_>) -> Option<Call> {
        let mut connections = self.connections.borrow_mut();
        let shared = connections.get_mut(key)?;
        shared.retain(|c| !c.is_leaving());
        let found = shared.iter().find(|c| c.has_room(terms.most_requests));
        found.map(|c| c.call(terms.for_http2))
    }

    /// Begins HTTP/2 on `stream`, puts the connection into the pool and opens a stream on it. `counted` lives as long as the connection.
    ///
    /// # Errors
    /// The connection's.
    pub async fn begin(
        &self,
        key: K,
        stream: Stream,
        terms: &Terms<'_>,
        counted: impl Sized + 'static,
    ) -> io::Result<Call> {
        let tls = matches!(stream, Stream::Tls(_));
        let (local, principal) = (stream.local_addr(), crate::tls::principal(&stream));
        let kept = terms.http2.keepalive.zip(terms.stats);
        let heard = kept.map(|_| Heard::default());
        let cork = Cork::from(stream);
        let begun = Begun {
            octets: Bytes::new(),
            cork: cork.clone(),
            heard: heard.clone(),
            turn: None,
        };
        let begun = builder(terms.http2).handshake(begun).await;
        let (request, mut connection) = begun.map_err(super::broken)?;
        let mut keepalive = kept.zip(heard).and_then(|((settings, stats), heard)| {
            let pings = Keepalive::new(settings, connection.ping_pong()?, heard);
            Some((pings, Arc::clone(stats)))
        });
        let shard = terms.shard;
        let closed = Rc::new(Cell::new(false));
        let shared = Rc::new(Shared {
            request,
            streams: Cell::new(0),
            most: terms.http2.streams as usize,
            served: Cell::new(0),
            since: Cell::new(Instant::now()),
            closed: Rc::clone(&closed),
            tls,
            local,
            principal,
            freed: Rc::clone(terms.freed),
        });
        tokio::task::spawn_local(async move {
            let _counted = counted;
            let ended = poll_fn(|cx| {
                if let Poll::Ready(ended) = Pin::new(&mut connection).poll(cx) {
                    return Poll::Ready(Some(ended));
                }
                if let Poll::Ready(Err(error)) = cork.poll_drain(cx) {
                    tracing::debug!(%error, "an endpoint's connection takes nothing more");
                    return Poll::Ready(Some(Ok(())));
                }
                let gone = keepalive.as_mut().is_some_and(|(k, _)| k.poll(cx).is_ready());
                if gone { Poll::Ready(None) } else { Poll::Pending }
            });
            match (ended.await, &keepalive) {
                (Some(Err(error)), _) => tracing::debug!(%error, "HTTP/2 to an endpoint ended"),
                (None, Some((_, stats))) => stats.inc(shard, ClusterHttp2::KeepaliveTimeout),
                _ => {}
            }
            closed.set(true);
        });
        let call = shared.call(terms.for_http2);
        self.connections.borrow_mut().entry(key).or_default().push(shared);
        Ok(call)
    }

    /// Whether no connection is left.
    pub fn is_empty(&self) -> bool {
        self.connections.borrow().is_empty()
    }

    /// Leaves a connection without streams, if there is one. It is closed soon.
    pub fn close_one_idle(&self) -> bool {
        let mut connections = self.connections.borrow_mut();
        connections.values_mut().any(|all| {
            let idle = all.iter().position(|c| c.streams.get() == 0);
            idle.map(|at| all.swap_remove(at)).is_some()
        })
    }

    /// Leaves connections that are closed, spent, or idle too long.
    pub fn sweep(&self, now: Instant, idle_timeout: Option<Duration>, timed_out: &dyn Fn()) {
        self.making
            .borrow_mut()
            .retain(|_, held| Rc::strong_count(held) > 1);
        let mut connections = self.connections.borrow_mut();
        connections.retain(|_, all| {
            all.retain(|c| {
                let idle = c.streams.get() == 0;
                if idle && idle_timeout.is_some_and(|most| now.duration_since(c.since.get()) >= most) {
                    timed_out();
                    return false;
                }
                !c.is_leaving()
            });
            !all.is_empty()
        });
    }
}

fn builder(http2: &Http2) -> Builder {
    let mut builder = Builder::new();
    builder
        .enable_push(false)
        .initial_window_size(http2.stream_window)
        .initial_connection_window_size(http2.connection_window)
        .max_header_list_size(LARGEST_RESPONSE_HEAD)
        .max_send_buffer_size(SEND_BUFFER)
        .max_pending_accept_reset_streams(PENDING_RESETS)
        .max_local_error_reset_streams(Some(LOCAL_RESETS));
    builder
}
