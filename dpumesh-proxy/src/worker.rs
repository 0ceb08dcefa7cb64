//! A worker: one thread, one tokio current-thread runtime, its own listening sockets, pools, buffers and log lines.
//!
//! Workers share nothing on the path of a request but the configuration (immutable) and the counters (one shard each).
//! The control thread talks to a worker by [`Command`]s.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::task::{Poll, Waker};
use std::time::Duration;

use arc_swap::ArcSwap;
use dpumesh_hw::netns::Namespace;
use dpumesh_hw::stream::IngressPort;
use dpumesh_hw::stream::kernel::{self, Origin};
use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, LocalSet};
use tokio::time::{Instant, timeout_at};

use crate::access_log::Lines;
use crate::closing::{Closing, Which};
use crate::config::model::{Config, Direction, FilterChain, Listener, Terminal};
use crate::health;
use crate::http1::buffer::{Allowance, Buffer};
use crate::http1::head::{RequestHead, ResponseHead};
use crate::http1::reply::Date;
use crate::http1::{self, serve};
use crate::istio::Reporter;
use crate::listener::inspect::Blind;
use crate::listener::{Facts, Seen};
use crate::overload::{Open, Overload};
use crate::proxy_protocol::inbound::Said;
use crate::rbac;
use crate::stats::{self, Registry, Scope, Shard};
use crate::tcp;
use crate::tls::{Connection, Protocols, Secrets, Stream};
use crate::trace::outbox::Outbox;
use crate::turns::{Pod, Turns};
use crate::upstream::Lane;

/// The number of the next connection of a client.
static NEXT_CONNECTION: AtomicU64 = AtomicU64::new(0);

/// Spare sets of buffers a worker keeps.
const SPARE_BUFFERS: usize = 256;

const TICK: Duration = Duration::from_secs(1);

/// The same while draining.
const DRAIN_TICK: Duration = Duration::from_millis(20);

/// What the control thread tells a worker.
#[derive(Debug)]
pub enum Command {
    /// Take the configuration in the shared pointer; these sockets are new.
    Apply(Vec<(ListenerKey, TcpListener)>),
    /// Answer with a copy of each listening socket.
    Copy(std::sync::mpsc::Sender<Vec<(ListenerKey, TcpListener)>>),
    /// Close the sockets of these listeners; connections go on.
    StopListening(Which),
    /// Stop accepting; end connections at their next response; end all at `deadline`.
    Drain {
        /// When idle connections are closed.
        idle: Instant,
        /// When all are.
        deadline: Instant,
    },
}

/// Which listening socket: the listener's name and the address.
pub type ListenerKey = (String, SocketAddr);

/// What a worker is started with.
#[derive(Debug)]
pub struct Start {
    /// Its number, from 0.
    pub index: usize,
    /// The configuration in force.
    pub config: Arc<ArcSwap<Config>>,
    /// Commands.
    pub commands: mpsc::UnboundedReceiver<Command>,
    /// The network namespace to work in.
    pub stack_netns: Option<PathBuf>,
    /// Every counter.
    pub registry: Arc<Registry>,
    /// Keys, chains and roots.
    pub secrets: Arc<dyn Secrets>,
    /// Where the health of endpoints is judged.
    pub reports: health::Reporter,
    /// What operators said about ending.
    pub closing: Arc<Closing>,
    /// What there is too much of.
    pub overload: Arc<Overload>,
    /// Called when it is ready to serve, or with the reason why not.
    pub ready: std::sync::mpsc::Sender<std::io::Result<()>>,
}

/// A worker's state, shared by the tasks on its thread.
#[derive(Debug)]
pub struct Worker {
    /// Its shard of every counter.
    pub shard: Shard,
    /// Access log lines not yet handed over.
    pub lines: RefCell<Lines>,
    /// The `date` of this second.
    pub date: RefCell<Date>,
    /// Whose requests may begin.
    pub(crate) turns: Rc<Turns>,
    /// Spans not yet handed over.
    pub(crate) spans: Outbox,
    /// Its share of Istio's metrics.
    pub reporter: RefCell<Reporter>,
    /// `dpumesh.istio.*`
    pub istio: Arc<Scope>,
    program: RefCell<Rc<Program>>,
    generation: Cell<u64>,
    draining: Cell<Option<(Instant, Instant)>>,
    spare: RefCell<VecDeque<Box<Buffers>>>,
    spare_small: RefCell<VecDeque<Box<Buffers>>>,
    wakers: RefCell<Wakers>,
    connections: Cell<usize>,
    /// In a stack namespace: the counters of each ingress port.
    ingress: Option<RefCell<HashMap<IngressPort, Arc<Scope>>>>,
    registry: Arc<Registry>,
    /// `http2.*`
    pub http2: Arc<Scope>,
    /// What is known of every plain connection.
    plain: Arc<Connection>,
    secrets: Arc<dyn Secrets>,
    reports: health::Reporter,
    /// What operators said about ending.
    pub closing: Arc<Closing>,
    /// What there is too much of.
    pub overload: Arc<Overload>,
}

/// A configuration as one worker sees it.
#[derive(Debug)]
pub struct Program {
    /// The configuration.
    pub config: Arc<Config>,
    /// A lane per cluster, same order.
    pub lanes: Vec<Rc<Lane>>,
}

/// What serving one request needs in memory; kept by the worker between requests.
#[derive(Debug, Default)]
pub struct Buffers {
    /// From the client.
    pub request_in: Buffer,
    /// To the endpoint.
    pub request_out: Vec<u8>,
    /// From the endpoint.
    pub response_in: Buffer,
    /// To the client.
    pub response_out: Vec<u8>,
    /// The request.
    pub request: RequestHead,
    /// The response.
    pub response: ResponseHead,
    small: bool,
}

impl Buffers {
    fn make_small(&mut self, allowance: &Allowance) {
        self.small = true;
        self.request_in.make_small(allowance.clone());
        self.response_in.make_small(allowance.clone());
    }

    /// Whether the request is gRPC.
    pub fn is_grpc(&self) -> bool {
        let kind = self.request.fields.get(self.request_in.head(), b"content-type");
        kind.is_some_and(http1::is_grpc)
    }

    /// Adds a line to the request, its name in lower case: as if the client had sent it.
    pub(crate) fn add_to_request(&mut self, name: &[u8], value: &[u8]) {
        let at = self.request_in.extend_head(&[name, value].concat());
        self.request.fields.add(at, name, value.len());
    }
}

/// Where a connection came in: which chain of which listener.
#[derive(Debug, Clone)]
pub struct Place {
    /// The listener.
    pub listener: Arc<Listener>,
    /// The chain.
    pub chain: Arc<FilterChain>,
}

impl Place {
    /// Whether `program` has this chain still.
    pub fn is_in_force(&self, program: &Program) -> bool {
        let mut listeners = program.config.listeners.iter();
        let now = listeners.find(|l| l.name == self.listener.name);
        now.is_some_and(|now| now.same_chain(&self.listener, &self.chain).is_some())
    }
}

/// The two ends of a client connection.
#[derive(Debug, Clone)]
pub struct Peer {
    /// The connection's number in this process.
    pub id: u64,
    /// The client: the socket's other end, or whom a PROXY header names.
    pub remote: SocketAddr,
    /// The socket's other end.
    pub direct_remote: SocketAddr,
    /// The address the client meant, by a PROXY header too.
    pub local: SocketAddr,
    /// The socket's own address.
    pub direct_local: SocketAddr,
    /// The TLVs of a PROXY header that endpoints may be told.
    pub tlvs: Option<Arc<[u8]>>,
    /// What upstream connections are bound to.
    pub source: Option<Origin>,
    /// The dataplane's port that the connection came in by, for a transparent listener in a stack namespace. The only
    /// thing here that says which pod the client is without being asked to believe an address.
    pub ingress: Option<IngressPort>,
    /// Who the client is by its certificate, and whom this connection speaks for.
    pub connection: Arc<Connection>,
    /// Application protocols that upstream TLS offers for this connection's requests, instead of the cluster's own.
    pub protocols: Option<Protocols>,
    /// Whether it speaks HTTP/2.
    pub http2: bool,
    /// Of a stream of HTTP/2, one of many: its buffers are small, within what its connection is allowed.
    pub small: Option<Allowance>,
}

impl Peer {
    /// The pod that its connection is one of, at a listener of this direction.
    pub(crate) fn pod(&self, direction: Option<Direction>) -> Pod {
        match (self.ingress, direction) {
            (Some(port), _) => Pod::Port(port),
            (None, Some(Direction::Inbound)) => Pod::Address(self.local.ip()),
            (None, _) => Pod::Address(self.remote.ip()),
        }
    }
}

#[derive(Debug, Default)]
struct Wakers {
    slots: Vec<Option<Waker>>,
    free: Vec<usize>,
}

/// A connection's entry in its worker: counted, and woken for drain and new configurations.
#[derive(Debug)]
pub struct Entry {
    worker: Rc<Worker>,
    key: usize,
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut wakers = self.worker.wakers.borrow_mut();
        wakers.slots[self.key] = None;
        wakers.free.push(self.key);
        self.worker.connections.set(self.worker.connections.get() - 1);
    }
}

impl Entry {
    /// Notes whom to wake. Once is enough for a task.
    pub fn wake_by(&self, waker: &Waker) {
        let slot = &mut self.worker.wakers.borrow_mut().slots[self.key];
        if !slot.as_ref().is_some_and(|w| w.will_wake(waker)) {
            *slot = Some(waker.clone());
        }
    }
}

impl Worker {
    fn new(start: &Start, config: Arc<Config>) -> Rc<Self> {
        let shard = Shard::worker(start.index);
        let generation = config.generation;
        let program = Program::new(config, shard, (&start.secrets, &start.reports), None);
        Rc::new(Self {
            shard,
            lines: RefCell::new(Lines::new(shard)),
            date: RefCell::default(),
            turns: Rc::default(),
            spans: Outbox::default(),
            reporter: RefCell::default(),
            istio: start.registry.scope("dpumesh.istio", stats::Istio::TABLE),
            program: RefCell::new(Rc::new(program)),
            generation: Cell::new(generation),
            draining: Cell::new(None),
            spare: RefCell::default(),
            spare_small: RefCell::default(),
            wakers: RefCell::default(),
            connections: Cell::new(0),
            ingress: start.stack_netns.as_ref().map(|_| RefCell::default()),
            registry: Arc::clone(&start.registry),
            http2: start.registry.scope("http2", stats::Http2::TABLE),
            plain: Arc::default(),
            secrets: Arc::clone(&start.secrets),
            reports: start.reports.clone(),
            closing: Arc::clone(&start.closing),
            overload: Arc::clone(&start.overload),
        })
    }

    /// The configuration in force.
    pub fn program(&self) -> Rc<Program> {
        Rc::clone(&self.program.borrow())
    }

    /// The number of the configuration in force.
    #[inline]
    pub fn generation(&self) -> u64 {
        self.generation.get()
    }

    /// While draining: when idle connections are closed, and when all are.
    #[inline]
    pub fn draining(&self) -> Option<(Instant, Instant)> {
        self.draining.get()
    }

    /// A set of buffers; with an allowance, one of many that a single client can have.
    pub fn take_buffers(&self, small: Option<&Allowance>) -> Box<Buffers> {
        let Some(allowance) = small else {
            return self.spare.borrow_mut().pop_back().unwrap_or_default();
        };
        let mut buffers = self.spare_small.borrow_mut().pop_back().unwrap_or_default();
        buffers.make_small(allowance);
        buffers
    }

    /// Returns a set of buffers.
    pub fn return_buffers(&self, mut buffers: Box<Buffers>) {
        let kept = if buffers.small {
            &self.spare_small
        } else {
            &self.spare
        };
        let mut spare = kept.borrow_mut();
        if spare.len() < SPARE_BUFFERS {
            buffers.request_in.clear();
            buffers.response_in.clear();
            for out in [&mut buffers.request_out, &mut buffers.response_out] {
                out.clear();
                out.shrink_to(if buffers.small { 2 * 1024 } else { 64 * 1024 });
            }
            spare.push_back(buffers);
        }
    }

    /// Enters a connection.
    pub fn enter(self: &Rc<Self>) -> Entry {
        let mut wakers = self.wakers.borrow_mut();
        let key = wakers.free.pop().unwrap_or_else(|| {
            wakers.slots.push(None);
            wakers.slots.len() - 1
        });
        self.connections.set(self.connections.get() + 1);
        Entry {
            worker: Rc::clone(self),
            key,
        }
    }

    fn ingress(&self, listener: &Listener, stream: &TcpStream) -> Option<IngressPort> {
        if self.ingress.is_none() || !listener.socket.transparent {
            return None;
        }
        kernel::ingress(stream).ok().flatten()
    }

    fn wake_all(&self) {
        let wakers: Vec<Waker> = self.wakers.borrow().slots.iter().flatten().cloned().collect();
        wakers.into_iter().for_each(Waker::wake);
    }

    fn apply(&self, config: Arc<Config>) {
        let before = self.program();
        if before.config.workloads != config.workloads {
            self.reporter.borrow_mut().clear();
        }
        self.generation.set(config.generation);
        let program = Program::new(config, self.shard, (&self.secrets, &self.reports), Some(&before));
        *self.program.borrow_mut() = Rc::new(program);
    }
}

/// Counts a connection under its ingress port as long as it lives.
struct ByPort {
    stats: Arc<Scope>,
    shard: Shard,
}

impl ByPort {
    fn new(worker: &Worker, port: IngressPort) -> Self {
        let make = || {
            let name = format!("ingress.{}", port.get());
            worker.registry.scope(&name, stats::Ingress::TABLE)
        };
        let stats = match &worker.ingress {
            Some(known) => Arc::clone(known.borrow_mut().entry(port).or_insert_with(make)),
            None => make(),
        };
        stats.inc(worker.shard, stats::Ingress::CxTotal);
        stats.inc(worker.shard, stats::Ingress::CxActive);
        Self {
            stats,
            shard: worker.shard,
        }
    }
}

impl Drop for ByPort {
    fn drop(&mut self) {
        self.stats.dec(self.shard, stats::Ingress::CxActive);
    }
}

impl Program {
    fn new(
        config: Arc<Config>,
        shard: Shard,
        (secrets, reports): (&Arc<dyn Secrets>, &health::Reporter),
        before: Option<&Self>,
    ) -> Self {
        let old: HashMap<&str, &Rc<Lane>> = match before {
            Some(before) => before
                .lanes
                .iter()
                .map(|l| (l.cluster.name.as_str(), l))
                .collect(),
            None => HashMap::new(),
        };
        let lane = |cluster: &Arc<crate::config::model::Cluster>| {
            let old = old.get(cluster.name.as_str()).map(|l| l.as_ref());
            let (secrets, reports) = (Arc::clone(secrets), reports.clone());
            Rc::new(Lane::new(Arc::clone(cluster), shard, secrets, reports, old))
        };
        let lanes = config.clusters.iter().map(lane).collect();
        Self { config, lanes }
    }
}

/// Runs a worker until it is drained or the control thread is gone.
pub fn run(start: Start) {
    let prepared = prepare(&start);
    let runtime = match prepared {
        Ok(runtime) => {
            let _ = start.ready.send(Ok(()));
            runtime
        }
        Err(error) => {
            let _ = start.ready.send(Err(error));
            return;
        }
    };
    LocalSet::new().block_on(&runtime, control(start));
}

fn prepare(start: &Start) -> std::io::Result<tokio::runtime::Runtime> {
    if let Some(path) = &start.stack_netns {
        let namespace = Namespace::open(path).map_err(std::io::Error::other)?;
        namespace.enter_thread().map_err(std::io::Error::other)?;
    }
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .event_interval(61)
        .build()
}

async fn control(start: Start) {
    let worker = Worker::new(&start, start.config.load_full());
    let Start {
        config, mut commands, ..
    } = start;
    let mut accepting: HashMap<ListenerKey, Vec<Accepting>> = HashMap::new();
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        if let Some((_, deadline)) = worker.draining() {
            if worker.connections.get() == 0 || Instant::now() >= deadline {
                return;
            }
            tick = tokio::time::interval_at(Instant::now() + DRAIN_TICK, DRAIN_TICK);
        }
        tokio::select! {
            command = commands.recv() => match command {
                None => return,
                Some(Command::Apply(sockets)) => {
                    let config = config.load_full();
                    end_listening(&worker, &mut accepting, &config);
                    worker.apply(config);
                    begin_listening(&worker, &mut accepting, sockets);
                    worker.wake_all();
                }
                Some(Command::StopListening(_)) => {
                    let program = worker.program();
                    let stopped = |name: &str| {
                        let mut listeners = program.config.listeners.iter();
                        listeners.any(|l| l.name == name && worker.closing.has_stopped(l.direction))
                    };
                    accepting
                        .extract_if(|key, _| stopped(&key.0))
                        .for_each(|(key, last)| end_all(last, &worker, &key.0));
                }
                Some(Command::Copy(answer)) => {
                    // Nobody waits any more where this fails.
                    let _ = answer.send(copies(&accepting));
                }
                Some(Command::Drain { idle, deadline }) => {
                    worker.draining.set(Some((idle, deadline)));
                    accepting.drain().for_each(|(key, last)| end_all(last, &worker, &key.0));
                    worker.wake_all();
                }
            },
            _ = tick.tick() => {
                worker.lines.borrow_mut().flush();
                let now = Instant::now();
                worker.program().lanes.iter().for_each(|lane| lane.sweep(now));
                if worker.draining().is_some_and(|(idle, _)| now >= idle) {
                    worker.wake_all();
                }
            }
        }
    }
}

/// A listening socket and the task that takes connections off it.
struct Accepting {
    socket: Rc<tokio::net::TcpListener>,
    task: AbortHandle,
}

impl Accepting {
    fn start(worker: &Rc<Worker>, name: &str, socket: TcpListener) -> std::io::Result<Self> {
        let socket = Rc::new(tokio::net::TcpListener::from_std(socket)?);
        let task = accept(Rc::clone(worker), name.to_owned(), Rc::clone(&socket));
        let task = tokio::task::spawn_local(task).abort_handle();
        Ok(Self { socket, task })
    }

    /// Closes the socket. Closing resets what waits in its queue: clients whose connection is established and who may
    /// have sent a request. They are served first.
    fn end(self, worker: &Rc<Worker>, name: &str) {
        self.task.abort();
        // The runtime may not have heard of them yet, so the kernel is asked.
        while let Ok((stream, remote)) = SockRef::from(&*self.socket).accept() {
            let stream = std::net::TcpStream::from(stream);
            let stream = stream.set_nonblocking(true).and_then(|()| stream.try_into());
            if let (Ok(stream), Some(remote)) = (stream, remote.as_socket()) {
                serve_one(worker, name, stream, remote);
            }
        }
    }
}

fn end_all(all: Vec<Accepting>, worker: &Rc<Worker>, name: &str) {
    all.into_iter().for_each(|last| last.end(worker, name));
}

/// The same sockets once more, for another process.
fn copies(accepting: &HashMap<ListenerKey, Vec<Accepting>>) -> Vec<(ListenerKey, TcpListener)> {
    let all = accepting
        .iter()
        .flat_map(|(key, all)| all.iter().map(move |one| (key, one)));
    let copy = |(key, one): (&ListenerKey, &Accepting)| {
        let copy = one.socket.as_fd().try_clone_to_owned().ok()?;
        Some((key.clone(), TcpListener::from(copy)))
    };
    all.filter_map(copy).collect()
}

/// Takes up new sockets; those whose listener is gone have ended before.
fn begin_listening(
    worker: &Rc<Worker>,
    accepting: &mut HashMap<ListenerKey, Vec<Accepting>>,
    sockets: Vec<(ListenerKey, TcpListener)>,
) {
    for (key, _) in &sockets {
        if let Some(old) = accepting.remove(key) {
            end_all(old, worker, &key.0);
        }
    }
    for (key, socket) in sockets {
        match Accepting::start(worker, &key.0, socket) {
            Ok(new) => accepting.entry(key).or_default().push(new),
            Err(error) => {
                tracing::error!(listener = %key.0, address = %key.1, %error, "a listening socket was lost");
            }
        }
    }
}

/// Ends the sockets that `config` does not have, while the configuration that has them is still in force.
fn end_listening(worker: &Rc<Worker>, accepting: &mut HashMap<ListenerKey, Vec<Accepting>>, config: &Config) {
    let is_gone = |(name, address): &ListenerKey| {
        let mut listeners = config.listeners.iter();
        !listeners.any(|l| l.name == *name && l.addresses.contains(address))
    };
    accepting
        .extract_if(|key, _| is_gone(key))
        .for_each(|(key, gone)| end_all(gone, worker, &key.0));
}

async fn accept(worker: Rc<Worker>, name: String, socket: Rc<tokio::net::TcpListener>) {
    loop {
        while worker.overload.stops_accepting() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        match socket.accept().await {
            Ok((stream, remote)) => serve_one(&worker, &name, stream, remote),
            Err(error) => {
                // Out of descriptors or the like: the queue keeps what it has, look again soon.
                tracing::warn!(listener = %name, %error, "accept failed");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

fn serve_one(worker: &Rc<Worker>, name: &str, stream: TcpStream, remote: SocketAddr) {
    let program = worker.program();
    if let Some(listener) = program.config.listeners.iter().find(|l| l.name == name) {
        let Some(open) = worker.overload.open() else {
            listener
                .stats
                .inc(worker.shard, stats::Listener::GlobalCxOverflow);
            return;
        };
        // Entered before its task runs: a drain waits for it from now on.
        let (entry, listener) = (worker.enter(), Arc::clone(listener));
        let held = (entry, open);
        tokio::task::spawn_local(connection(held, Rc::clone(&program), listener, stream, remote));
    }
}

/// `_open` is given up behind it (an async block around this would hold all of it twice).
async fn connection(
    (entry, _open): (Entry, Open),
    program: Rc<Program>,
    listener: Arc<Listener>,
    stream: TcpStream,
    direct_remote: SocketAddr,
) {
    let worker = Rc::clone(&entry.worker);
    let accepted = Instant::now();
    let Ok(direct_local) = stream.local_addr() else {
        return;
    };
    let mut local = direct_local;
    if listener.original_dst {
        local = kernel::original_destination(&stream, local);
    }
    let (stats, shard) = (Arc::clone(&listener.stats), worker.shard);
    stats.inc(shard, stats::Listener::CxTotal);
    let until = listener.inspectors.until();
    let said = proxy_header(&worker, &entry, &listener, &stream, until).await;
    let Some(Said { ends, tlvs }) = said else {
        return;
    };
    let mut remote = direct_remote;
    if let Some(ends) = ends {
        (remote, local) = (ends.source, ends.destination);
    }
    let seen = first_octets(&worker, &entry, &listener, &stream, (local.port(), until)).await;
    let Some(seen) = seen else {
        return;
    };
    let facts = Facts {
        source: remote,
        direct: direct_remote,
        destination: local,
        seen: &seen,
    };
    let Some(chain) = listener.chain(&facts).map(Arc::clone) else {
        stats.inc(shard, stats::Listener::NoFilterChainMatch);
        return;
    };
    let ingress = worker.ingress(&listener, &stream);
    let now = std::time::Instant::now();
    if !chain.rates.iter().all(|rate| rate.admits(now, shard)) {
        return;
    }
    let Some((stream, connection)) = terminate(&worker, &chain, stream, (&seen, accepted)).await else {
        return;
    };
    let terminal = chain.terminal.clone();
    let peer = Peer {
        id: NEXT_CONNECTION.fetch_add(1, Relaxed),
        remote,
        direct_remote,
        local,
        direct_local,
        tlvs,
        source: listener.original_src.map(|o| Origin {
            ip: remote.ip(),
            mark: o.mark,
        }),
        ingress,
        connection,
        protocols: match &terminal {
            Terminal::Http(manager) => manager.policy.upstream_protocols.clone().map(Protocols),
            Terminal::Tcp(_) => None,
        },
        http2: false,
        small: None,
    };
    if let Err(details) = rbac::admit(&chain.rbac, &peer, shard) {
        tcp::log_refused(&worker, &terminal, &peer, details);
        stream.reset_on_close();
        return;
    }
    let _by_port = ingress.map(|port| ByPort::new(&worker, port));
    stats.inc(shard, stats::Listener::CxActive);
    let begun = Instant::now();
    let place = Place { listener, chain };
    match terminal {
        Terminal::Http(manager) => serve::serve(worker, program, entry, stream, peer, place, manager).await,
        Terminal::Tcp(proxy) => tcp::relay(worker, entry, stream, peer, place, proxy).await,
    }
    stats.dec(shard, stats::Listener::CxActive);
    stats.inc(shard, stats::Listener::CxDestroy);
    stats.record_since(shard, stats::Listener::CxLength, begun);
}

/// Takes a PROXY header off the connection, where the listener has them; `None` where the connection is refused or ends meanwhile.
async fn proxy_header(
    worker: &Worker,
    entry: &Entry,
    listener: &Listener,
    stream: &TcpStream,
    until: Option<Instant>,
) -> Option<Said> {
    let Some(filter) = &listener.proxy_protocol else {
        return Some(Said::default());
    };
    let take = async {
        let take = filter.take(stream, worker.shard);
        match until {
            Some(until) => timeout_at(until, take).await.map_err(drop),
            None => Ok(take.await),
        }
    };
    match until_drained(worker, entry, std::pin::pin!(take)).await? {
        Ok(said) => said.ok()?,
        Err(()) => timed_out(worker, listener).then(Said::default),
    }
}

/// Counts a connection that said too little in time, and whether it goes on as it is.
fn timed_out(worker: &Worker, listener: &Listener) -> bool {
    if !listener.inspectors.goes_on {
        listener.stats.inc(worker.shard, stats::Listener::PreCxTimeout);
    }
    listener.inspectors.goes_on
}

/// What the connection's first octets say, where the listener looks at them; `None` where it ends meanwhile.
async fn first_octets(
    worker: &Worker,
    entry: &Entry,
    listener: &Listener,
    stream: &TcpStream,
    (port, until): (u16, Option<Instant>),
) -> Option<Seen> {
    if !listener.inspectors.look_at(port) {
        return Some(Seen::default());
    }
    let look = std::pin::pin!(listener.inspectors.look(stream, port, until));
    let looked = until_drained(worker, entry, look).await?;
    match looked {
        Ok(seen) => Some(seen),
        Err(Blind::TimedOut) => {
            listener.stats.inc(worker.shard, stats::Listener::PreCxTimeout);
            None
        }
        Err(Blind::Lost(_)) => None,
    }
}

/// Awaits `what` unless the worker drains: before its chain is known, a connection has nothing to finish.
async fn until_drained<F: Future + Unpin>(worker: &Worker, entry: &Entry, mut what: F) -> Option<F::Output> {
    std::future::poll_fn(|cx| {
        if let Poll::Ready(done) = std::pin::Pin::new(&mut what).poll(cx) {
            return Poll::Ready(Some(done));
        }
        entry.wake_by(cx.waker());
        match worker.draining() {
            Some((idle, _)) if Instant::now() >= idle => Poll::Ready(None),
            _ => Poll::Pending,
        }
    })
    .await
}

/// Ends TLS where the chain has it; what is known of the connection then. `None` where the handshake failed.
async fn terminate(
    worker: &Worker,
    chain: &FilterChain,
    socket: TcpStream,
    (seen, accepted): (&Seen, Instant),
) -> Option<(Stream, Arc<Connection>)> {
    let shard = worker.shard;
    let Some(tls) = &chain.tls else {
        if chain.certificate.is_none() && seen.server_name.is_empty() {
            return Some((socket.into(), Arc::clone(&worker.plain)));
        }
        let connection = Connection {
            certificate: chain.certificate.clone(),
            server_name: Some(&*seen.server_name).filter(|n| !n.is_empty()).map(Arc::from),
            ..Connection::default()
        };
        return Some((socket.into(), Arc::new(connection)));
    };
    let mut known = Connection {
        certificate: chain.certificate.clone(),
        ..Connection::default()
    };
    match tls.accept(&*worker.secrets, socket, &mut known).await {
        Ok(stream) => {
            tls.stats.inc(shard, stats::Ssl::Handshake);
            known.agreed.took = Some(accepted.elapsed());
            if known.peer.is_none() {
                tls.stats.inc(shard, stats::Ssl::NoCertificate);
            }
            Some((Stream::Tls(stream), Arc::new(known)))
        }
        Err(error) => {
            error.count(&tls.stats, shard);
            tracing::debug!(chain = %chain.name, %error, "no TLS");
            None
        }
    }
}
