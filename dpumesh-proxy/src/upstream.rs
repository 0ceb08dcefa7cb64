//! A worker's way to a cluster: pick an endpoint, take a pooled connection or make one, give it back.
//!
//! A [`Lane`] is one worker's share of a cluster; nothing in it is shared with other workers but the counters. It is
//! rebuilt with each configuration, keeping what concerns unchanged endpoints. Pools are keyed by endpoint and, where
//! connections leave with the client's address, by that address too; with TLS also by whose certificate is shown and by the
//! application protocols offered, and with a PROXY header by what it says, so that no request travels as another's.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use dpumesh_hw::stream::kernel::{self, Origin};
use socket2::SockRef;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout, timeout_at};

use crate::balance::Held;
use crate::config::model::{Cluster, ClusterKind, Endpoint, Protocol};
use crate::health::Reporter;
use crate::http2;
use crate::http2::call::Call;
use crate::http2::pool::{Pool, Terms};
use crate::istio::Workload;
use crate::proxy_protocol::Outbound;
use crate::proxy_protocol::outbound::Told;
use crate::route::upgrade::Tunnel;
use crate::stats::{Cluster as Stat, Scope, Shard, Ssl};
use crate::tls::{self, ClientContext, Protocols, Secrets, Stream};
use crate::worker::Peer;

mod active;
mod pick;

pub(crate) use active::Active;
pub use pick::Picked;

/// Idle connections kept for one (endpoint, source address), at most.
const IDLE_PER_KEY: usize = 512;

/// Idle connections that are not for everybody, kept per endpoint over all keys, at most.
const IDLE_KEYED: usize = 1024;

/// How long a request that waits for a connection sleeps before it looks at the other workers' counters again.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// One worker's share of a cluster.
#[derive(Debug)]
pub struct Lane {
    /// The cluster.
    pub cluster: Arc<Cluster>,
    shard: Shard,
    secrets: Arc<dyn Secrets>,
    endpoints: Vec<Rc<EndpointLane>>,
    originals: RefCell<HashMap<SocketAddr, Rc<EndpointLane>>>,
    held: RefCell<Held>,
    reports: Reporter,
    freed: Rc<Freed>,
}

/// One worker's share of an endpoint.
#[derive(Debug)]
pub struct EndpointLane {
    /// Its address.
    pub address: SocketAddr,
    /// TLS to it; `None` for plain TCP.
    pub tls: Option<Arc<ClientContext>>,
    /// The PROXY header that its connections begin with.
    pub header: Option<Arc<Outbound>>,
    /// Who serves there.
    pub workload: Option<Arc<Workload>>,
    active: Cell<u32>,
    idle: RefCell<Vec<Pooled>>,
    keyed: RefCell<HashMap<Key, Vec<Pooled>>>,
    idle_keyed: Cell<usize>,
    http2: Pool<Option<Key>>,
}

/// What connections to one endpoint differ by.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    /// The address they leave with.
    source: Option<Origin>,
    /// Whose certificate they show.
    certificate: Option<Arc<str>>,
    /// What they offer instead of the cluster's own protocols.
    protocols: Option<Protocols>,
    /// What their PROXY header says.
    told: Option<Told>,
}

/// Wakes requests that wait for a connection.
#[derive(Debug, Default)]
pub struct Freed {
    notify: Notify,
    waiting: Cell<u32>,
}

/// An open connection, counted as long as it lives.
#[derive(Debug)]
pub struct Pooled {
    /// The connection.
    pub stream: Stream,
    /// Requests it has served.
    pub requests: u64,
    /// The SPIFFE id that the endpoint's certificate has.
    pub principal: Option<Arc<str>>,
    since: Instant,
    /// Of a stream of HTTP/2 the connection is counted, not the stream.
    _open: Option<Open>,
}

/// Counts a connection from the attempt to make it until it is gone.
#[derive(Debug)]
struct Open {
    stats: Arc<Scope>,
    shard: Shard,
    begun: Instant,
    freed: Rc<Freed>,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.stats.record_since(self.shard, Stat::CxLength, self.begun);
        self.stats.dec(self.shard, Stat::CxActive);
        self.stats.inc(self.shard, Stat::CxDestroy);
        self.freed.wake_one();
    }
}

impl Pooled {
    fn of_stream(stream: Stream, open: Open) -> Self {
        Self {
            principal: tls::principal(&stream),
            stream,
            requests: 0,
            since: Instant::now(),
            _open: Some(open),
        }
    }

    fn of_call(call: Call) -> Self {
        Self {
            principal: call.principal(),
            stream: Stream::Call(Box::new(call)),
            requests: 0,
            since: Instant::now(),
            _open: None,
        }
    }
}

impl Freed {
    pub(crate) fn wake_one(&self) {
        if self.waiting.get() > 0 {
            self.notify.notify_one();
        }
    }
}

/// Why there is no connection.
#[derive(Debug)]
pub enum NoConnection {
    /// The endpoint refused, or could not be reached.
    Failed(io::Error),
    /// No answer within the connect timeout.
    TimedOut,
    /// A circuit breaker is open.
    Overflow,
}

impl From<NoConnection> for io::Error {
    fn from(none: NoConnection) -> Self {
        match none {
            NoConnection::Failed(error) => error,
            NoConnection::TimedOut => io::ErrorKind::TimedOut.into(),
            NoConnection::Overflow => Self::other("too many connections"),
        }
    }
}

impl Lane {
    /// A worker's lane to `cluster`, taking over from `before` what still holds.
    pub fn new(
        cluster: Arc<Cluster>,
        shard: Shard,
        secrets: Arc<dyn Secrets>,
        reports: Reporter,
        before: Option<&Self>,
    ) -> Self {
        let kept = |address: SocketAddr| {
            let endpoint = before?.endpoints.iter().find(|e| e.address == address)?;
            Some(Rc::clone(endpoint))
        };
        let known: HashMap<SocketAddr, Rc<EndpointLane>> = match before {
            Some(lane) if lane.endpoints.len() > 16 => {
                lane.endpoints.iter().map(|e| (e.address, Rc::clone(e))).collect()
            }
            _ => HashMap::new(),
        };
        let endpoint = |e: &Endpoint| {
            let (address, tls) = (e.address, e.tls.as_ref());
            let old = if known.is_empty() {
                kept(address)
            } else {
                known.get(&address).map(Rc::clone)
            };
            let old = old.filter(|old| {
                same_transport(old.tls.as_ref(), tls) && old.header == e.header && old.workload == e.workload
            });
            old.unwrap_or_else(|| {
                let way = (tls.cloned(), e.header.clone());
                Rc::new(EndpointLane::new(address, way, e.workload.clone()))
            })
        };
        let endpoints = cluster.endpoints.iter().map(endpoint).collect();
        let originals = match before {
            Some(lane)
                if cluster.kind == ClusterKind::OriginalDst
                    && lane.cluster.header == cluster.header
                    && same_transport(lane.cluster.tls.as_ref(), cluster.tls.as_ref()) =>
            {
                lane.originals.take()
            }
            _ => HashMap::new(),
        };
        Self {
            endpoints,
            originals: RefCell::new(originals),
            held: RefCell::new(Held::new(
                &cluster.picker,
                before.map(|b| b.held.borrow()).as_deref(),
            )),
            reports,
            freed: before.map(|b| Rc::clone(&b.freed)).unwrap_or_default(),
            cluster,
            shard,
            secrets,
        }
    }

    fn original(&self, address: SocketAddr) -> Rc<EndpointLane> {
        let mut originals = self.originals.borrow_mut();
        let way = || (self.cluster.tls.clone(), self.cluster.header.clone());
        let endpoint = originals
            .entry(address)
            .or_insert_with(|| Rc::new(EndpointLane::new(address, way(), None)));
        Rc::clone(endpoint)
    }

    /// A pooled connection to the endpoint, if one is open and silent. `careful` asks the kernel once more.
    pub fn take_idle(&self, picked: &Picked, peer: &Peer, careful: bool) -> Option<Pooled> {
        let endpoint = &picked.endpoint;
        let key = endpoint.key(peer);
        if self.may_speak_http2(peer) {
            let call = endpoint.http2.take(&key, &self.terms(peer));
            if call.is_some() || self.cluster.protocol != Protocol::Auto {
                return call.map(Pooled::of_call);
            }
        }
        loop {
            let mut pooled = match &key {
                None => endpoint.idle.borrow_mut().pop()?,
                Some(key) => {
                    let pooled = endpoint.keyed.borrow_mut().get_mut(key)?.pop()?;
                    endpoint.idle_keyed.set(endpoint.idle_keyed.get() - 1);
                    pooled
                }
            };
            // Readable while idle means closed or out of step. The first look costs no system call.
            if pooled.stream.is_silent() && (!careful || pooled.stream.socket().is_some_and(is_silent)) {
                return Some(pooled);
            }
        }
    }

    /// Makes a connection to the endpoint for `peer`, waiting where the cluster's connection limit is reached.
    ///
    /// # Errors
    /// As [`NoConnection`] says.
    pub async fn connect(&self, picked: &Picked, peer: &Peer) -> Result<Pooled, NoConnection> {
        if self.may_speak_http2(peer) {
            return self.connect_http2(picked, peer).await;
        }
        self.wait_for_room(picked, || false).await?;
        self.dial(picked, peer, async |stream, open| {
            self.cluster.stats.inc(self.shard, Stat::CxHttp1Total);
            Ok(Pooled::of_stream(stream, open))
        })
        .await
    }

    /// Makes a connection of its own for a tunnel, which never goes back to the pool.
    ///
    /// # Errors
    /// As [`NoConnection`] says; endpoints that speak HTTP/2 only are not asked for a tunnel.
    pub async fn connect_for_tunnel(
        &self,
        picked: &Picked,
        peer: &Peer,
        tunnel: Tunnel,
    ) -> Result<Pooled, NoConnection> {
        let asked = tunnel != Tunnel::Terminated;
        if asked && self.cluster.protocol == Protocol::Http2 {
            let error = "tunnels over HTTP/2 are not supported";
            return Err(NoConnection::Failed(io::Error::other(error)));
        }
        let http1;
        let peer = if asked && self.cluster.protocol == Protocol::Auto {
            http1 = Peer {
                protocols: Some(Protocols(Arc::from([b"http/1.1".to_vec()]))),
                ..peer.clone()
            };
            &http1
        } else {
            peer
        };
        self.wait_for_room(picked, || false).await?;
        self.dial(picked, peer, async |stream, open| {
            self.cluster.stats.inc(self.shard, Stat::CxHttp1Total);
            Ok(Pooled::of_stream(stream, open))
        })
        .await
    }

    /// A stream on a connection that others are making, or on one made here.
    async fn connect_http2(&self, picked: &Picked, peer: &Peer) -> Result<Pooled, NoConnection> {
        let (endpoint, terms) = (&picked.endpoint, self.terms(peer));
        let key = endpoint.key(peer);
        let limit = Instant::now() + self.cluster.connect_timeout;
        let making = endpoint.http2.making(&key);
        let Ok(_making) = timeout_at(limit, making.lock()).await else {
            return Err(NoConnection::TimedOut);
        };
        let mut found = endpoint.http2.take(&key, &terms);
        if found.is_none() {
            let look = || {
                found = endpoint.http2.take(&key, &terms);
                found.is_some()
            };
            self.wait_for_room(picked, look).await?;
        }
        if let Some(call) = found {
            return Ok(Pooled::of_call(call));
        }
        self.dial(picked, peer, async |stream, open| {
            let agreed = match &stream {
                Stream::Tls(tls) => tls.get_ref().1.alpn_protocol(),
                _ => None,
            };
            if self.cluster.protocol == Protocol::Auto && agreed != Some(http2::ALPN) {
                self.cluster.stats.inc(self.shard, Stat::CxHttp1Total);
                return Ok(Pooled::of_stream(stream, open));
            }
            self.cluster.stats.inc(self.shard, Stat::CxHttp2Total);
            let call = endpoint.http2.begin(key, stream, &terms, open).await?;
            Ok(Pooled::of_call(call))
        })
        .await
    }

    fn may_speak_http2(&self, peer: &Peer) -> bool {
        match self.cluster.protocol {
            Protocol::Http1 => false,
            Protocol::Http2 | Protocol::Auto => true,
            Protocol::Downstream => peer.http2,
        }
    }

    fn terms(&self, peer: &Peer) -> Terms<'_> {
        Terms {
            http2: &self.cluster.http2,
            most_requests: self.cluster.max_requests_per_connection,
            for_http2: peer.http2,
            stats: self.cluster.http2_stats.as_ref(),
            shard: self.shard,
            freed: &self.freed,
        }
    }

    /// Makes a connection; `begin` makes of it what requests go by.
    async fn dial(
        &self,
        picked: &Picked,
        peer: &Peer,
        begin: impl AsyncFnOnce(Stream, Open) -> io::Result<Pooled>,
    ) -> Result<Pooled, NoConnection> {
        let (stats, shard) = (&self.cluster.stats, self.shard);
        stats.inc(shard, Stat::CxTotal);
        stats.inc(shard, Stat::CxActive);
        let begun = Instant::now();
        let open = Open {
            stats: Arc::clone(stats),
            shard,
            begun,
            freed: Rc::clone(&self.freed),
        };
        let attempt = async { begin(self.open(&picked.endpoint, peer).await?, open).await };
        let failure = match timeout(self.cluster.connect_timeout, attempt).await {
            Ok(Ok(pooled)) => {
                stats.record_since(shard, Stat::CxConnect, begun);
                return Ok(pooled);
            }
            Ok(Err(error)) => NoConnection::Failed(error),
            Err(_) => {
                stats.inc(shard, Stat::CxConnectTimeout);
                NoConnection::TimedOut
            }
        };
        stats.inc(shard, Stat::CxConnectFail);
        Err(failure)
    }

    /// TCP, a PROXY header and TLS where the endpoint has them.
    async fn open(&self, endpoint: &EndpointLane, peer: &Peer) -> io::Result<Stream> {
        let mut socket = kernel::connect(endpoint.address, peer.source).await?;
        if let Some(header) = &endpoint.header {
            socket.write_all(&header.header(peer)).await?;
        }
        let Some(tls) = &endpoint.tls else {
            return Ok(Stream::Plain(socket));
        };
        let protocols = peer.protocols.as_ref().or_else(|| {
            let automatic = self.cluster.protocol == Protocol::Auto && tls.protocols().0.is_empty();
            automatic.then(http2::either)
        });
        let begun = tls.connect(&*self.secrets, &peer.connection, protocols, socket);
        match begun.await {
            Ok(stream) => {
                tls.stats.inc(self.shard, Ssl::Handshake);
                Ok(Stream::Tls(stream))
            }
            Err(error) => {
                error.count(&tls.stats, self.shard);
                tracing::debug!(cluster = %self.cluster.name, endpoint = %endpoint.address, %error, "no TLS");
                Err(error.into_io())
            }
        }
    }

    /// Waits until a connection may be made, or `found` says that none is needed.
    async fn wait_for_room(
        &self,
        picked: &Picked,
        mut found: impl FnMut() -> bool,
    ) -> Result<(), NoConnection> {
        let (stats, shard, limits) = (&self.cluster.stats, self.shard, self.cluster.limits);
        let full = || stats.get(Stat::CxActive) >= u64::from(limits.max_connections);
        if !full() {
            return Ok(());
        }
        stats.inc(shard, Stat::CxOverflow);
        // An idle connection of another endpoint gives way.
        if self.close_an_idle_one(picked) && !full() {
            return Ok(());
        }
        if stats.get(Stat::RqPendingActive) >= u64::from(limits.max_pending) {
            stats.inc(shard, Stat::RqPendingOverflow);
            return Err(NoConnection::Overflow);
        }
        stats.inc(shard, Stat::RqPendingTotal);
        let _waiting = Waiting::new(self);
        while full() && !found() {
            let _ = timeout(LOOK_AGAIN, self.freed.notify.notified()).await;
            self.close_an_idle_one(picked);
        }
        Ok(())
    }

    fn close_an_idle_one(&self, picked: &Picked) -> bool {
        let originals = self.originals.borrow();
        let all = self.endpoints.iter().chain(originals.values());
        let mut others = all
            .filter(|e| !Rc::ptr_eq(e, &picked.endpoint))
            .chain([&picked.endpoint]);
        others.any(|e| e.close_one_idle())
    }

    /// Puts a connection back that may serve again.
    pub fn give_back(&self, picked: &Picked, peer: &Peer, mut pooled: Pooled) {
        if pooled.stream.is_http2() {
            // Its connection is in the pool all the time.
            return;
        }
        pooled.requests += 1;
        let most = self.cluster.max_requests_per_connection;
        if most > 0 && pooled.requests >= most {
            self.cluster.stats.inc(self.shard, Stat::CxMaxRequests);
            return;
        }
        pooled.since = Instant::now();
        picked.endpoint.put(picked.endpoint.key(peer), pooled);
        self.freed.wake_one();
    }

    /// Counts a response with `status`, the endpoint's or one given in its place.
    pub fn count(&self, status: u16) {
        let (stats, shard) = (&self.cluster.stats, self.shard);
        stats.inc(shard, Stat::RqCompleted);
        let class = match status {
            200..=299 => Stat::Rq2xx,
            300..=399 => Stat::Rq3xx,
            400..=499 => Stat::Rq4xx,
            500..=599 => Stat::Rq5xx,
            _ => return,
        };
        stats.inc(shard, class);
    }

    /// Closes pooled connections that were idle too long or that the endpoint closed.
    pub fn sweep(&self, now: Instant) {
        let idle_timeout = self.cluster.idle_timeout;
        let mut originals = self.originals.borrow_mut();
        for endpoint in self.endpoints.iter().chain(originals.values()) {
            endpoint.sweep(now, idle_timeout, &|| {
                self.cluster.stats.inc(self.shard, Stat::CxIdleTimeout)
            });
        }
        originals.retain(|_, endpoint| Rc::strong_count(endpoint) > 1 || !endpoint.is_empty());
    }
}

fn same_transport(a: Option<&Arc<ClientContext>>, b: Option<&Arc<ClientContext>>) -> bool {
    a.map(|tls| tls.fingerprint) == b.map(|tls| tls.fingerprint)
}

/// Whether an idle connection is still open and silent. One system call.
fn is_silent(stream: &TcpStream) -> bool {
    let peeked = SockRef::from(stream).peek(&mut [std::mem::MaybeUninit::uninit()]);
    matches!(peeked, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
}

struct Waiting<'a>(&'a Lane);

impl<'a> Waiting<'a> {
    fn new(lane: &'a Lane) -> Self {
        lane.freed.waiting.set(lane.freed.waiting.get() + 1);
        lane.cluster.stats.inc(lane.shard, Stat::RqPendingActive);
        Self(lane)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.freed.waiting.set(self.0.freed.waiting.get() - 1);
        self.0.cluster.stats.dec(self.0.shard, Stat::RqPendingActive);
    }
}

impl EndpointLane {
    fn new(
        address: SocketAddr,
        (tls, header): (Option<Arc<ClientContext>>, Option<Arc<Outbound>>),
        workload: Option<Arc<Workload>>,
    ) -> Self {
        Self {
            address,
            tls,
            header,
            workload,
            active: Cell::new(0),
            idle: RefCell::default(),
            keyed: RefCell::default(),
            idle_keyed: Cell::new(0),
            http2: Pool::default(),
        }
    }

    /// Whether it is a peer of the mesh, reached by a pod's own certificate: such a one is told who calls.
    pub fn is_in_mesh(&self) -> bool {
        self.workload.is_some() && self.tls.as_ref().is_some_and(|tls| tls.by_pod())
    }

    /// What a connection for `peer` may be used for again; `None` for all.
    fn key(&self, peer: &Peer) -> Option<Key> {
        let (mut certificate, mut protocols) = (None, None);
        if let Some(tls) = &self.tls {
            certificate = peer.connection.certificate.as_ref().filter(|_| tls.by_pod());
            protocols = peer.protocols.as_ref();
        }
        let told = self.header.as_ref().map(|header| header.tells(peer));
        if peer.source.is_none() && certificate.is_none() && protocols.is_none() && told.is_none() {
            return None;
        }
        Some(Key {
            source: peer.source,
            certificate: certificate.map(Arc::clone),
            protocols: protocols.cloned(),
            told,
        })
    }

    fn put(&self, key: Option<Key>, pooled: Pooled) {
        match key {
            None => {
                let mut idle = self.idle.borrow_mut();
                if idle.len() < IDLE_PER_KEY {
                    idle.push(pooled);
                }
            }
            Some(key) => {
                if self.idle_keyed.get() >= IDLE_KEYED {
                    return;
                }
                let mut pools = self.keyed.borrow_mut();
                let idle = pools.entry(key).or_default();
                if idle.len() < IDLE_PER_KEY {
                    idle.push(pooled);
                    self.idle_keyed.set(self.idle_keyed.get() + 1);
                }
            }
        }
    }

    fn is_empty(&self) -> bool {
        self.idle.borrow().is_empty() && self.idle_keyed.get() == 0 && self.http2.is_empty()
    }

    fn close_one_idle(&self) -> bool {
        if self.idle.borrow_mut().pop().is_some() {
            return true;
        }
        let popped = self.keyed.borrow_mut().values_mut().find_map(Vec::pop);
        if popped.is_some() {
            self.idle_keyed.set(self.idle_keyed.get() - 1);
        }
        popped.is_some() || self.http2.close_one_idle()
    }

    fn sweep(&self, now: Instant, idle_timeout: Option<Duration>, timed_out: &dyn Fn()) {
        let keep = |pooled: &mut Pooled| {
            if idle_timeout.is_some_and(|most| now.duration_since(pooled.since) >= most) {
                timed_out();
                return false;
            }
            pooled.stream.is_silent()
        };
        self.idle.borrow_mut().retain_mut(keep);
        let mut pools = self.keyed.borrow_mut();
        pools.retain(|_, idle| {
            idle.retain_mut(keep);
            !idle.is_empty()
        });
        self.idle_keyed.set(pools.values().map(Vec::len).sum());
        self.http2.sweep(now, idle_timeout, timed_out);
    }
}
