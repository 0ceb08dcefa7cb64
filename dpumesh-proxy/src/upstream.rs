//! A worker's way to a cluster: pick an endpoint, take a pooled connection or make one, give it back.
//!
//! A [`Lane`] is one worker's share of a cluster; nothing in it is shared with other workers but the counters. It is
//! rebuilt with each configuration, keeping what concerns unchanged endpoints. Pools are keyed by endpoint and, where
//! connections leave with the client's address, by that address too.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use dpumesh_hw::stream::kernel::{self, Origin};
use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};

use crate::config::model::{Balance, Cluster, ClusterKind};
use crate::stats::{Cluster as Stat, Scope, Shard};
use crate::tls::Stream;

/// Idle connections kept for one (endpoint, source address), at most.
const IDLE_PER_KEY: usize = 512;

/// Idle connections that leave with clients' addresses, kept per endpoint over all of them, at most.
const IDLE_BY_SOURCE: usize = 1024;

/// How long a request that waits for a connection sleeps before it looks at the other workers' counters again.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// One worker's share of a cluster.
#[derive(Debug)]
pub struct Lane {
    /// The cluster.
    pub cluster: Arc<Cluster>,
    shard: Shard,
    endpoints: Vec<Rc<EndpointLane>>,
    originals: RefCell<HashMap<SocketAddr, Rc<EndpointLane>>>,
    cursor: Cell<usize>,
    freed: Rc<Freed>,
}

/// One worker's share of an endpoint.
#[derive(Debug)]
pub struct EndpointLane {
    /// Its address.
    pub address: SocketAddr,
    active: Cell<u32>,
    idle: RefCell<Vec<Pooled>>,
    by_source: RefCell<HashMap<Origin, Vec<Pooled>>>,
    idle_by_source: Cell<usize>,
}

#[derive(Debug, Default)]
struct Freed {
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
    since: Instant,
    _open: Open,
}

/// Counts a connection from the attempt to make it until it is gone.
#[derive(Debug)]
struct Open {
    stats: Arc<Scope>,
    shard: Shard,
    freed: Rc<Freed>,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.stats.dec(self.shard, Stat::CxActive);
        self.stats.inc(self.shard, Stat::CxDestroy);
        self.freed.wake_one();
    }
}

impl Freed {
    fn wake_one(&self) {
        if self.waiting.get() > 0 {
            self.notify.notify_one();
        }
    }
}

/// An endpoint picked for one request; counts as load until dropped.
#[derive(Debug)]
pub struct Picked {
    /// The endpoint.
    pub endpoint: Rc<EndpointLane>,
}

impl Drop for Picked {
    fn drop(&mut self) {
        self.endpoint
            .active
            .set(self.endpoint.active.get().saturating_sub(1));
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

impl Lane {
    /// A worker's lane to `cluster`, taking over from `before` what still holds.
    pub fn new(cluster: Arc<Cluster>, shard: Shard, before: Option<&Self>) -> Self {
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
        let endpoint = |address: SocketAddr| {
            let old = if known.is_empty() {
                kept(address)
            } else {
                known.get(&address).map(Rc::clone)
            };
            old.unwrap_or_else(|| Rc::new(EndpointLane::new(address)))
        };
        let endpoints = cluster.endpoints.iter().map(|e| endpoint(e.address)).collect();
        let originals = match before {
            Some(lane) if cluster.kind == ClusterKind::OriginalDst => lane.originals.take(),
            _ => HashMap::new(),
        };
        Self {
            endpoints,
            originals: RefCell::new(originals),
            cursor: Cell::new(before.map_or_else(|| fastrand::usize(..), |b| b.cursor.get())),
            freed: before.map(|b| Rc::clone(&b.freed)).unwrap_or_default(),
            cluster,
            shard,
        }
    }

    /// Picks an endpoint; `original` is the address the client meant. `None` when there is none that is healthy.
    pub fn pick(&self, original: SocketAddr) -> Option<Picked> {
        let endpoint = match self.cluster.balance {
            Balance::Provided => self.original(original),
            Balance::RoundRobin => {
                let at = self.cursor.get();
                self.cursor.set(at.wrapping_add(1));
                self.scheduled(at)?
            }
            Balance::Random => self.scheduled(fastrand::usize(..))?,
            Balance::LeastRequest => {
                let (a, b) = (
                    self.scheduled(fastrand::usize(..))?,
                    self.scheduled(fastrand::usize(..))?,
                );
                if b.active.get() < a.active.get() { b } else { a }
            }
        };
        endpoint.active.set(endpoint.active.get() + 1);
        Some(Picked { endpoint })
    }

    fn scheduled(&self, at: usize) -> Option<Rc<EndpointLane>> {
        let schedule = &self.cluster.schedule;
        if schedule.is_empty() {
            return None;
        }
        self.endpoints
            .get(schedule[at % schedule.len()] as usize)
            .map(Rc::clone)
    }

    fn original(&self, address: SocketAddr) -> Rc<EndpointLane> {
        let mut originals = self.originals.borrow_mut();
        let endpoint = originals
            .entry(address)
            .or_insert_with(|| Rc::new(EndpointLane::new(address)));
        Rc::clone(endpoint)
    }

    /// A pooled connection to the endpoint, if one is open and silent. `careful` asks the kernel once more.
    pub fn take_idle(&self, picked: &Picked, source: Option<Origin>, careful: bool) -> Option<Pooled> {
        loop {
            let mut pooled = match source {
                None => picked.endpoint.idle.borrow_mut().pop()?,
                Some(source) => {
                    let mut pools = picked.endpoint.by_source.borrow_mut();
                    let pooled = pools.get_mut(&source)?.pop()?;
                    picked
                        .endpoint
                        .idle_by_source
                        .set(picked.endpoint.idle_by_source.get() - 1);
                    pooled
                }
            };
            // Readable while idle means closed or out of step. The first look costs no system call.
            if pooled.stream.is_silent() && (!careful || is_silent(pooled.stream.socket())) {
                return Some(pooled);
            }
        }
    }

    /// Makes a connection to the endpoint, waiting where the cluster's connection limit is reached.
    ///
    /// # Errors
    /// As [`NoConnection`] says.
    pub async fn connect(&self, picked: &Picked, source: Option<Origin>) -> Result<Pooled, NoConnection> {
        self.wait_for_room(picked).await?;
        let (stats, shard) = (&self.cluster.stats, self.shard);
        stats.inc(shard, Stat::CxTotal);
        stats.inc(shard, Stat::CxActive);
        let open = Open {
            stats: Arc::clone(stats),
            shard,
            freed: Rc::clone(&self.freed),
        };
        let attempt = timeout(
            self.cluster.connect_timeout,
            kernel::connect(picked.endpoint.address, source),
        )
        .await;
        let failure = match attempt {
            Ok(Ok(stream)) => {
                return Ok(Pooled {
                    stream: stream.into(),
                    requests: 0,
                    since: Instant::now(),
                    _open: open,
                });
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

    async fn wait_for_room(&self, picked: &Picked) -> Result<(), NoConnection> {
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
        while full() {
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
    pub fn give_back(&self, picked: &Picked, source: Option<Origin>, mut pooled: Pooled) {
        pooled.requests += 1;
        let most = self.cluster.max_requests_per_connection;
        if most > 0 && pooled.requests >= most {
            self.cluster.stats.inc(self.shard, Stat::CxMaxRequests);
            return;
        }
        pooled.since = Instant::now();
        picked.endpoint.put(source, pooled);
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
    fn new(address: SocketAddr) -> Self {
        Self {
            address,
            active: Cell::new(0),
            idle: RefCell::default(),
            by_source: RefCell::default(),
            idle_by_source: Cell::new(0),
        }
    }

    fn put(&self, source: Option<Origin>, pooled: Pooled) {
        match source {
            None => {
                let mut idle = self.idle.borrow_mut();
                if idle.len() < IDLE_PER_KEY {
                    idle.push(pooled);
                }
            }
            Some(source) => {
                if self.idle_by_source.get() >= IDLE_BY_SOURCE {
                    return;
                }
                let mut pools = self.by_source.borrow_mut();
                let idle = pools.entry(source).or_default();
                if idle.len() < IDLE_PER_KEY {
                    idle.push(pooled);
                    self.idle_by_source.set(self.idle_by_source.get() + 1);
                }
            }
        }
    }

    fn is_empty(&self) -> bool {
        self.idle.borrow().is_empty() && self.idle_by_source.get() == 0
    }

    fn close_one_idle(&self) -> bool {
        if self.idle.borrow_mut().pop().is_some() {
            return true;
        }
        let popped = self.by_source.borrow_mut().values_mut().find_map(Vec::pop);
        if popped.is_some() {
            self.idle_by_source.set(self.idle_by_source.get() - 1);
        }
        popped.is_some()
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
        let mut pools = self.by_source.borrow_mut();
        pools.retain(|_, idle| {
            idle.retain_mut(keep);
            !idle.is_empty()
        });
        self.idle_by_source.set(pools.values().map(Vec::len).sum());
    }
}
