//! The proxy as a whole: its arguments, its start, its control thread, its end.
//!
//! [`run`] is the program `dpu-proxy`; [`Proxy`] is for whoever runs it inside another program. The control thread owns
//! the configuration files and the admin server; it opens listening sockets (inside the stack's network namespace, if
//! there is one), swaps the configuration pointer and tells the workers. Nothing on it can hold up a request.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use clap::{Parser, ValueEnum};
use dpumesh_hw::netns::{Namespace, NamespaceError};
use dpumesh_hw::stream::kernel::{self, SocketOptions};
use dpumesh_xds::discovery::ResourceType;
use tokio::sync::mpsc;

use crate::access_log::Sinks;
use crate::admin;
use crate::closing::{Closing, Which};
use crate::config::ConfigError;
use crate::config::ads;
use crate::config::dns::Resolved;
use crate::config::files::Files;
use crate::config::model::Config;
use crate::config::secret_files::SecretFiles;
use crate::dns::{self, Resolver};
use crate::hand_over::{self, Give, Inherited, Passed};
use crate::health::keeper::Keeper;
use crate::health::prober::Surroundings;
use crate::health::{Report, Reporter};
use crate::overload::{Manager, Overload};
use crate::stats::{self, Registry, Shard};
use crate::tls::Secrets;
use crate::tls::context::{Secret, Shown};
use crate::tls::store::Stored;
use crate::worker::{self, Command, ListenerKey};

mod stream;

/// The aggregated stream's server, and the store of keys whose CSRs it relays.
type Ads = (ads::Server, Arc<Stored>);

/// How often the configuration files are looked at.
const LOOK: Duration = Duration::from_millis(100);

/// Arguments of `dpu-proxy`.
#[derive(Debug, Clone, Parser)]
#[command(
    name = "dpu-proxy",
    version,
    about = "The shared service proxy of a DPU: reads an Envoy v3 bootstrap, proxies HTTP/1.1, HTTP/2 and TCP",
    after_help = "\
Examples:
  dpu-proxy -c proxy.yaml                              serve
  dpu-proxy -c proxy.yaml --mode validate              say what is wrong with the file, or OK
  dpu-proxy -c proxy.yaml --stack-netns /run/netns/stk listen and connect inside that network namespace

The file is an Envoy v3 bootstrap (YAML, or JSON if it is named .json): static_resources, and listeners, clusters,
routes and endpoints from watched files (path_config_source) or from a management server (ads, gRPC). A field that
this proxy does not implement is refused with its path. A bad update is refused and logged; what was good goes on.

SIGTERM and SIGINT (and POST /quitquitquit on the admin address) drain: no new connections, `connection: close`
on every response; idle connections are closed after a quarter of --drain-time-s, the rest at its end.
A second signal ends it at once.

To put another version or bootstrap in its place without refusing a connection, run both with the same --hand-over PATH:
the newer one takes the listening sockets (the admin server's too), and once it accepts, the older one drains."
)]
pub struct Args {
    /// The bootstrap file
    #[arg(short, long, value_name = "FILE", required_unless_present = "completions")]
    pub config_path: Option<PathBuf>,
    /// Worker threads; as many as there are processors by default
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub concurrency: Option<u16>,
    /// Serve, or only check the configuration
    #[arg(long, value_enum, default_value_t = Mode::Serve)]
    pub mode: Mode,
    /// error, warn, info, debug or trace, or a filter such as dpumesh_proxy=debug
    #[arg(short, long, value_name = "LEVEL", default_value = "info")]
    pub log_level: String,
    /// Network namespace the workers listen and connect in; the admin server stays outside
    #[arg(long, value_name = "PATH")]
    pub stack_netns: Option<PathBuf>,
    /// Seconds a drain may take
    #[arg(long, value_name = "SECONDS", default_value_t = 5)]
    pub drain_time_s: u64,
    /// UNIX socket by which a newer process takes over; one that serves there is taken over from
    #[arg(long, value_name = "PATH")]
    pub hand_over: Option<PathBuf>,
    /// Print shell completions and leave
    #[arg(long, value_enum, value_name = "SHELL")]
    pub completions: Option<clap_complete::Shell>,
}

/// What the program does with the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// Serves.
    Serve,
    /// Checks and leaves.
    Validate,
}

/// Why the proxy did not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration was refused.
    #[error("configuration refused: {0}")]
    Config(#[from] ConfigError),
    /// The stack's network namespace.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    /// The operating system said no.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: std::io::Error,
    },
}

impl Error {
    fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}

/// Runs the program until it is told to end.
///
/// # Errors
/// The configuration is refused, a listener cannot be opened, a thread cannot be started.
pub fn run(args: &Args) -> Result<(), Error> {
    if let Some(shell) = args.completions {
        let mut command = <Args as clap::CommandFactory>::command();
        clap_complete::generate(shell, &mut command, "dpu-proxy", &mut std::io::stdout());
        return Ok(());
    }
    let path = args.config_path.clone().unwrap_or_default();
    if args.mode == Mode::Validate {
        validate(&path)?;
        println!("configuration '{}' OK", path.display());
        return Ok(());
    }
    let concurrency = args.concurrency.map(usize::from);
    let concurrency = concurrency
        .or_else(|| std::thread::available_parallelism().ok().map(Into::into))
        .unwrap_or(1);
    let proxy = Proxy::start(Options {
        config_path: path,
        concurrency,
        stack_netns: args.stack_netns.clone(),
        drain_time: Duration::from_secs(args.drain_time_s),
        signals: true,
        secrets: None,
        hand_over: args.hand_over.clone(),
    })?;
    proxy.wait();
    Ok(())
}

/// Compiles the configuration and leaves.
///
/// # Errors
/// Why it is refused.
pub fn validate(path: &Path) -> Result<(), Error> {
    let registry = Registry::new(0);
    let sinks = Sinks::new(&registry).map_err(Error::io("starting the log writer"))?;
    Files::open(path)?.load(&registry, &sinks)?;
    Ok(())
}

/// What a proxy is started with.
#[derive(Debug, Clone)]
pub struct Options {
    /// The bootstrap file.
    pub config_path: PathBuf,
    /// Worker threads, at least 1.
    pub concurrency: usize,
    /// Network namespace of the workers' sockets.
    pub stack_netns: Option<PathBuf>,
    /// Bound on a drain.
    pub drain_time: Duration,
    /// Drain on SIGTERM and SIGINT. For programs; leave it off when embedding.
    pub signals: bool,
    /// Keys, chains and roots that the configuration names by SDS. `None`: keys are made here, and the server of the aggregated
    /// stream relays their CSRs.
    pub secrets: Option<Arc<dyn Secrets>>,
    /// UNIX socket by which a newer process takes the listening sockets over. A process that serves there is taken over from:
    /// it drains once this one accepts. Its statistics and connections stay its own.
    pub hand_over: Option<PathBuf>,
}

impl Options {
    /// One worker, no namespace, 5 s to drain, no signals.
    pub fn new(config_path: impl Into<PathBuf>) -> Self {
        Self {
            config_path: config_path.into(),
            concurrency: 1,
            stack_netns: None,
            drain_time: Duration::from_secs(5),
            signals: false,
            secrets: None,
            hand_over: None,
        }
    }
}

/// A running proxy. Dropping it drains it and waits.
#[derive(Debug)]
pub struct Proxy {
    shared: Arc<Shared>,
    control: Option<JoinHandle<()>>,
}

/// What the admin server and the control thread share.
#[derive(Debug)]
pub struct Shared {
    /// The configuration in force.
    pub config: Arc<ArcSwap<Config>>,
    /// Every counter.
    pub registry: Arc<Registry>,
    /// Access log sinks.
    pub sinks: Sinks,
    /// Keys, chains and roots.
    pub(crate) secrets: Arc<SecretFiles>,
    /// What it was started with.
    pub options: Options,
    /// When it was started.
    pub started: Instant,
    /// What operators said about ending.
    pub closing: Arc<Closing>,
    admin: Mutex<Option<SocketAddr>>,
    refused: Mutex<BTreeMap<String, Refused>>,
    bound: Mutex<BTreeMap<ListenerKey, (SocketAddr, SocketOptions)>>,
    state: AtomicU8,
    /// Sockets of an older process that are still to be taken up.
    inherited: Mutex<Option<Inherited>>,
    /// A newer process serves what this one listened on.
    handed_over: AtomicBool,
    quit: mpsc::UnboundedSender<()>,
    reports: Reporter,
    stop: mpsc::UnboundedSender<Which>,
}

/// An update of a watched file that was refused, while the last good one serves.
#[derive(Debug, Clone)]
pub struct Refused {
    /// When it was looked at.
    pub at: SystemTime,
    /// Where the fault lies and why.
    pub error: ConfigError,
}

/// As in Envoy's `ServerInfo.State`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Serving.
    Live = 0,
    /// Ending.
    Draining = 1,
    /// Not yet serving.
    Initializing = 3,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Live => "LIVE",
            Self::Draining => "DRAINING",
            Self::Initializing => "INITIALIZING",
        })
    }
}

impl Shared {
    /// Where it stands.
    pub fn state(&self) -> State {
        match self.state.load(Ordering::Acquire) {
            0 if self.closing.health_failed() => State::Draining,
            0 => State::Live,
            1 => State::Draining,
            _ => State::Initializing,
        }
    }

    /// The updates that were refused and not made good since, by file.
    pub fn refused(&self) -> Vec<Refused> {
        lock(&self.refused).values().cloned().collect()
    }

    /// Listener sockets: name, configured address, address in fact (they differ for port 0).
    pub fn bound(&self) -> Vec<(String, SocketAddr, SocketAddr)> {
        lock(&self.bound)
            .iter()
            .map(|((name, address), (bound, _))| (name.clone(), *address, *bound))
            .collect()
    }

    /// Closes the sockets of these listeners; connections go on.
    pub fn stop_listening(&self, which: Which) {
        self.closing.stop(which);
        // As for `quit`.
        let _ = self.stop.send(which);
    }

    /// Begins the drain.
    pub fn quit(&self) {
        // The control thread is gone when this fails, and with it everything that could drain.
        let _ = self.quit.send(());
    }
}

impl Proxy {
    /// Starts workers and the control thread; returns once every listener accepts.
    ///
    /// # Errors
    /// The configuration is refused, a listener cannot be opened, a namespace not entered, a thread not started.
    pub fn start(options: Options) -> Result<Self, Error> {
        let registry = Arc::new(Registry::new(options.concurrency));
        let sinks = Sinks::new(&registry).map_err(Error::io("starting the log writer"))?;
        let mut files = Files::open(&options.config_path)?;
        let mut config = files.load(&registry, &sinks)?;
        let overload = files.overload(&registry)?;
        let ads = files.ads_server()?;
        let (found, resolved) = mpsc::unbounded_channel();
        let mut names = Names::new(options.stack_netns.clone(), found);
        let first = names
            .start(&config)
            .map_err(Error::io("starting to look names up"))?;
        if !first.is_empty() {
            let mut accept = |fresh| {
                config = fresh;
                Ok(())
            };
            files.take_resolved(first, &registry, &sinks, &mut accept)?;
        }
        let stored = Arc::new(Stored::default());
        let secrets = options
            .secrets
            .clone()
            .unwrap_or_else(|| Arc::clone(&stored) as Arc<dyn Secrets>);
        let secrets = Arc::new(SecretFiles::over(secrets));
        let inherited = match &options.hand_over {
            Some(path) => {
                Inherited::take(path).map_err(Error::io(format!("taking over by {}", path.display())))?
            }
            None => None,
        };
        let (quit, quits) = mpsc::unbounded_channel();
        let (reports, reported) = mpsc::unbounded_channel();
        let (stop, stops) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared {
            secrets,
            config: Arc::new(ArcSwap::from_pointee(config)),
            registry,
            sinks,
            started: Instant::now(),
            closing: Arc::default(),
            admin: Mutex::default(),
            refused: Mutex::default(),
            bound: Mutex::default(),
            state: AtomicU8::new(State::Initializing as u8),
            inherited: Mutex::new(inherited),
            handed_over: AtomicBool::new(false),
            quit,
            reports,
            stop,
            options,
        });
        let admin = match shared.config.load().admin {
            None => None,
            Some(address) => {
                let inherited = lock(&shared.inherited).as_mut().and_then(|i| i.admin(address));
                Some(inherited.map_or_else(|| listen_admin(address), Ok)?)
            }
        };
        *lock(&shared.admin) = admin.as_ref().and_then(|a| a.local_addr().ok());
        let workers = start_workers(&shared, overload.as_ref().map(|o| Arc::clone(&o.overload)))?;
        let control = Control {
            shared: Arc::clone(&shared),
            files,
            workers,
            keeper: Keeper::new(Surroundings {
                netns: shared.options.stack_netns.clone(),
                secrets: Arc::<SecretFiles>::clone(&shared.secrets),
                reports: shared.reports.clone(),
            }),
            names,
            overload,
        };
        control.apply_first()?;
        shared
            .secrets
            .look(&mut |file, outcome| note(&mut lock(&shared.refused), file, outcome));
        if ads.is_none() {
            shared.state.store(State::Live as u8, Ordering::Release);
        }
        let thread = std::thread::Builder::new().name("control".to_owned());
        let control = thread
            .spawn(move || {
                control.run(
                    admin,
                    ads.map(|ads| (ads, stored)),
                    (quits, stops, reported, resolved),
                )
            })
            .map_err(Error::io("starting the control thread"))?;
        Ok(Self {
            shared,
            control: Some(control),
        })
    }

    /// What the admin server shows.
    pub fn shared(&self) -> &Shared {
        &self.shared
    }

    /// The admin server's address.
    pub fn admin_address(&self) -> Option<SocketAddr> {
        *lock(&self.shared.admin)
    }

    /// The first address a listener listens on, in fact.
    pub fn listener_address(&self, name: &str) -> Option<SocketAddr> {
        self.shared
            .bound()
            .into_iter()
            .find(|(n, ..)| n == name)
            .map(|(.., bound)| bound)
    }

    /// A counter's or gauge's value by its full name.
    pub fn stat(&self, name: &str) -> Option<u64> {
        self.shared.registry.value(name)
    }

    /// Begins the drain; [`Self::wait`] returns when it is over.
    pub fn drain(&self) {
        self.shared.quit();
    }

    /// Waits until the proxy has ended.
    pub fn wait(mut self) {
        self.join();
    }

    fn join(&mut self) {
        if let Some(control) = self.control.take()
            && control.join().is_err()
        {
            tracing::error!("the control thread panicked");
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if self.control.is_some() {
            self.drain();
            self.join();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn listen_admin(address: SocketAddr) -> Result<TcpListener, Error> {
    let options = SocketOptions {
        transparent: false,
        freebind: false,
        dual_stack: false,
        reuse_port: false,
        backlog: 128,
    };
    kernel::listen(address, options).map_err(Error::io(format!("admin address {address}")))
}

#[derive(Debug)]
struct Running {
    commands: mpsc::UnboundedSender<Command>,
    thread: JoinHandle<()>,
}

fn start_workers(shared: &Shared, overload: Option<Arc<Overload>>) -> Result<Vec<Running>, Error> {
    let overload = overload.unwrap_or_default();
    let (ready, wait) = std::sync::mpsc::channel();
    let mut workers = Vec::new();
    for index in 0..shared.options.concurrency.max(1) {
        let (commands, receiver) = mpsc::unbounded_channel();
        let start = worker::Start {
            index,
            config: Arc::clone(&shared.config),
            commands: receiver,
            stack_netns: shared.options.stack_netns.clone(),
            registry: Arc::clone(&shared.registry),
            secrets: Arc::<SecretFiles>::clone(&shared.secrets),
            reports: shared.reports.clone(),
            closing: Arc::clone(&shared.closing),
            overload: Arc::clone(&overload),
            ready: ready.clone(),
        };
        let thread = std::thread::Builder::new()
            .name(format!("worker-{index}"))
            .spawn(move || worker::run(start))
            .map_err(Error::io("starting a worker"))?;
        workers.push(Running { commands, thread });
    }
    drop(ready);
    for _ in &workers {
        match wait.recv() {
            Ok(Ok(())) => {}
            Ok(Err(source)) => return Err(Error::io("starting a worker")(source)),
            Err(_) => {
                return Err(Error::io("starting a worker")(
                    std::io::ErrorKind::BrokenPipe.into(),
                ));
            }
        }
    }
    Ok(workers)
}

/// What the control thread is told: to end, to stop listening, what there is to judge of endpoints, what names were found to be.
type Orders = (
    mpsc::UnboundedReceiver<()>,
    mpsc::UnboundedReceiver<Which>,
    mpsc::UnboundedReceiver<Report>,
    mpsc::UnboundedReceiver<Resolved>,
);

/// The control thread's own.
#[derive(Debug)]
struct Control {
    shared: Arc<Shared>,
    files: Files,
    workers: Vec<Running>,
    keeper: Keeper,
    names: Names,
    /// What is done when there is too much of something.
    overload: Option<Manager>,
}

/// Who looks names up, once there are any.
#[derive(Debug)]
struct Names {
    netns: Option<PathBuf>,
    found: dns::Reports,
    resolver: Option<Resolver>,
    /// The configuration whose names they are.
    generation: u64,
}

impl Names {
    fn new(netns: Option<PathBuf>, found: dns::Reports) -> Self {
        Self {
            netns,
            found,
            resolver: None,
            generation: 0,
        }
    }

    /// Begins with the names of `config`; what was found of them in a moment.
    fn start(&mut self, config: &Config) -> std::io::Result<Vec<Resolved>> {
        self.generation = config.generation;
        if config.lookups.is_empty() {
            return Ok(Vec::new());
        }
        let (resolver, first) =
            Resolver::start(self.netns.clone(), config.lookups.clone(), self.found.clone())?;
        self.resolver = Some(resolver);
        Ok(first)
    }

    /// Goes on with those of another configuration.
    fn follow(&mut self, config: &Config) {
        if self.generation == config.generation {
            return;
        }
        self.generation = config.generation;
        if self.resolver.is_none() && !config.lookups.is_empty() {
            match Resolver::start(self.netns.clone(), Vec::new(), self.found.clone()) {
                Ok((resolver, _)) => self.resolver = Some(resolver),
                Err(error) => tracing::error!(%error, "names are not looked up"),
            }
        }
        if let Some(resolver) = &self.resolver {
            resolver.follow(config.lookups.clone());
        }
    }
}

async fn until(due: Option<tokio::time::Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due).await,
        None => std::future::pending().await,
    }
}

/// New sockets for each worker, and what they are bound to.
struct Opened {
    sockets: Vec<Vec<(ListenerKey, TcpListener)>>,
    bound: BTreeMap<ListenerKey, (SocketAddr, SocketOptions)>,
}

impl Control {
    fn apply_first(&self) -> Result<(), Error> {
        let config = self.shared.config.load_full();
        let opened = open(&self.shared, &config)?;
        commit(&self.shared, &self.workers, None, opened);
        Ok(())
    }

    fn run(self, admin: Option<TcpListener>, ads: Option<Ads>, orders: Orders) {
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => {
                tracing::error!(%error, "the control thread has no runtime");
                return;
            }
        };
        tokio::task::LocalSet::new().block_on(&runtime, self.serve(admin, ads, orders));
    }

    async fn serve(
        mut self,
        admin: Option<TcpListener>,
        ads: Option<Ads>,
        (mut quits, mut stops, mut reports, mut resolved): Orders,
    ) {
        let admin_copy = admin.as_ref().and_then(|admin| admin.try_clone().ok());
        let mut giver = Some(self.giver(admin_copy));
        let admin = admin.map(|admin| {
            tokio::task::spawn_local(admin::serve(admin, Arc::clone(&self.shared))).abort_handle()
        });
        let (sender, mut updates) = mpsc::channel(1);
        if let Some((server, stored)) = ads {
            stream::begin(&self.shared, server, &stored, sender);
        }
        let mut signals = self.shared.options.signals.then(Signals::new).flatten();
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        self.keep_health();
        loop {
            let due = self.keeper.due();
            tokio::select! {
                _ = quits.recv() => break,
                Some(which) = stops.recv() => {
                    for worker in &self.workers {
                        // A worker that is gone listens no more.
                        let _ = worker.commands.send(Command::StopListening(which));
                    }
                }
                () = Signals::next(&mut signals) => break,
                _ = look.tick() => {
                    self.look();
                    self.take_over(&mut giver);
                    if let Some(overload) = &mut self.overload {
                        overload.tick(Instant::now());
                    }
                }
                Some(update) = updates.recv() => self.update(update),
                Some(found) = resolved.recv() => self.place(found),
                Some(report) = reports.recv() => self.keeper.take(&report, tokio::time::Instant::now()),
                () = until(due) => self.keeper.tick(tokio::time::Instant::now()),
            }
        }
        if self.shared.handed_over.load(Ordering::Acquire)
            && let Some(admin) = admin
        {
            // Whoever asks from now on asks the newer process.
            admin.abort();
        }
        self.drain(quits, signals).await;
    }

    /// Who gives this process's sockets away.
    fn giver(&self, admin: Option<TcpListener>) -> Giver {
        Giver {
            shared: Arc::clone(&self.shared),
            workers: self.workers.iter().map(|w| w.commands.clone()).collect(),
            admin,
        }
    }

    /// Once everything is in force: lets an older process go, and serves newer ones.
    fn take_over(&self, giver: &mut Option<Giver>) {
        let Some(path) = &self.shared.options.hand_over else {
            return;
        };
        if self.shared.state() != State::Live {
            return;
        }
        let Some(giver) = giver.take() else {
            return;
        };
        if let Err(error) = hand_over::serve(path, giver) {
            tracing::error!(path = %path.display(), %error, "no newer process can take over");
        }
        if let Some(inherited) = lock(&self.shared.inherited).take() {
            inherited.ready();
        }
    }

    /// Takes up whose health is to be kept and which names are looked up, where the configuration is another.
    fn keep_health(&mut self) {
        let config = self.shared.config.load();
        self.keeper.follow(&config, tokio::time::Instant::now());
        self.names.follow(&config);
    }

    /// Takes what names were found to be.
    fn place(&mut self, found: Resolved) {
        let Self {
            shared,
            files,
            workers,
            ..
        } = self;
        let mut accept = |config: Config| take(shared, workers, config);
        let placed = files.take_resolved(vec![found], &shared.registry, &shared.sinks, &mut accept);
        if let Err(error) = placed {
            tracing::warn!(%error, "what names were found to be is not taken");
        }
        self.keep_health();
    }

    fn look(&mut self) {
        let Self {
            shared,
            files,
            workers,
            ..
        } = self;
        let current = shared.config.load_full();
        let mut accept = |config: Config| take(shared, workers, config);
        let mut refused = lock(&shared.refused).clone();
        let mut tell = |file: &str, outcome| note(&mut refused, file, outcome);
        files.reload(&shared.registry, &shared.sinks, &current, &mut accept, &mut tell);
        shared.secrets.look(&mut tell);
        refused.retain(|file, _| files.reads(file) || shared.secrets.reads(file));
        *lock(&shared.refused) = refused;
        self.keep_health();
    }

    /// A change from the aggregated stream.
    fn update(&mut self, update: stream::Arrived) {
        let Self {
            shared,
            files,
            workers,
            ..
        } = self;
        let mut accept = |config: Config| take(shared, workers, config);
        let applied = files.apply_ads(&update.update, &shared.registry, &shared.sinks, &mut accept);
        if update.update.kind == ResourceType::Listener && shared.state() == State::Initializing {
            shared.state.store(State::Live as u8, Ordering::Release);
        }
        // The stream is gone where this fails; what was taken stays.
        let _ = update.answer.send(applied);
        self.keep_health();
    }

    async fn drain(self, mut quits: mpsc::UnboundedReceiver<()>, mut signals: Option<Signals>) {
        let Self { shared, workers, .. } = self;
        shared.state.store(State::Draining as u8, Ordering::Release);
        let limit = shared.options.drain_time;
        tracing::info!(seconds = limit.as_secs_f32(), "draining");
        let now = tokio::time::Instant::now();
        let (idle, deadline) = (now + limit / 4, now + limit);
        for worker in &workers {
            // A worker that is gone has nothing left to drain.
            let _ = worker.commands.send(Command::Drain { idle, deadline });
        }
        let ended = async {
            while workers.iter().any(|w| !w.thread.is_finished()) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::select! {
            () = ended => {}
            () = tokio::time::sleep_until(deadline + Duration::from_secs(1)) => {}
            _ = quits.recv() => {}
            () = Signals::next(&mut signals) => {}
        }
        for worker in workers {
            drop(worker.commands);
            if worker.thread.is_finished() && worker.thread.join().is_err() {
                tracing::error!("a worker panicked");
            }
        }
        shared.sinks.settle();
    }
}

/// Remembers why a file was refused, or that it is not any more.
fn note(refused: &mut BTreeMap<String, Refused>, file: &str, outcome: Result<(), ConfigError>) {
    match outcome {
        Ok(()) => drop(refused.remove(file)),
        Err(error) => {
            tracing::warn!(%error, "update refused; the last good one stays");
            let at = SystemTime::now();
            refused.insert(file.to_owned(), Refused { at, error });
        }
    }
}

/// Opens what `config` listens on and makes it the one in force.
fn take(shared: &Shared, workers: &[Running], config: Config) -> Result<(), ConfigError> {
    let opened = open(shared, &config).map_err(|e| {
        let scope = shared
            .registry
            .scope("listener_manager", stats::ListenerManager::TABLE);
        scope.inc(Shard::CONTROL, stats::ListenerManager::CreateFailure);
        ConfigError::new("", e.to_string())
    })?;
    let generation = config.generation;
    commit(shared, workers, Some(Arc::new(config)), opened);
    tracing::info!(generation, "configuration updated");
    Ok(())
}

/// Opens the sockets `config` has and the proxy not yet.
fn open(shared: &Shared, config: &Config) -> Result<Opened, Error> {
    let known = lock(&shared.bound).clone();
    let (netns, workers) = (
        shared.options.stack_netns.clone(),
        shared.options.concurrency.max(1),
    );
    let wanted: Vec<(ListenerKey, SocketOptions)> = config
        .listeners
        .iter()
        .filter(|l| !shared.closing.has_stopped(l.direction))
        .flat_map(|l| l.addresses.iter().map(|a| ((l.name.clone(), *a), l.socket)))
        .collect();
    let inherited = |key: &ListenerKey, options: SocketOptions| -> std::io::Result<Vec<TcpListener>> {
        let sockets = lock(&shared.inherited)
            .as_mut()
            .map(|inherited| inherited.listener(key, &format!("{options:?}")))
            .unwrap_or_default();
        sockets
            .iter()
            .try_for_each(|socket| socket.set_nonblocking(true))?;
        Ok(sockets)
    };
    let open_all = || -> Result<Opened, Error> {
        if let Some(path) = &netns {
            Namespace::open(path)?.enter_thread()?;
        }
        let mut opened = Opened {
            sockets: (0..workers).map(|_| Vec::new()).collect(),
            bound: BTreeMap::new(),
        };
        for (key, options) in wanted {
            if let Some(kept) = known.get(&key).filter(|(_, o)| *o == options) {
                opened.bound.insert(key, *kept);
                continue;
            }
            let refused = |source| Error::io(format!("listener {:?} at {}", key.0, key.1))(source);
            let mut address = key.1;
            let inherited = inherited(&key, options).map_err(refused)?;
            let taken = inherited.len();
            for (index, socket) in inherited.into_iter().enumerate() {
                address = socket.local_addr().map_err(refused)?;
                opened.sockets[index % workers].push((key.clone(), socket));
            }
            for (index, sockets) in opened.sockets.iter_mut().enumerate().skip(taken) {
                if index > 0 && !options.reuse_port {
                    break;
                }
                let socket = kernel::listen(address, options).map_err(refused)?;
                address = socket.local_addr().map_err(refused)?;
                sockets.push((key.clone(), socket));
            }
            opened.bound.insert(key, (address, options));
        }
        Ok(opened)
    };
    // Entering a namespace is for a thread that ends: the control thread's own stays as it is.
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("listen".to_owned());
        let thread = thread.spawn_scoped(scope, open_all);
        let thread = thread.map_err(Error::io("starting a thread to listen"))?;
        thread
            .join()
            .unwrap_or_else(|_| Err(Error::io("listening")(std::io::ErrorKind::Other.into())))
    })
}

/// What a newer process is given.
struct Giver {
    shared: Arc<Shared>,
    workers: Vec<mpsc::UnboundedSender<Command>>,
    admin: Option<TcpListener>,
}

impl Give for Giver {
    fn sockets(&self) -> Vec<Passed> {
        let (answer, answers) = std::sync::mpsc::channel();
        for worker in &self.workers {
            // A worker that is gone listens to nothing.
            let _ = worker.send(Command::Copy(answer.clone()));
        }
        drop(answer);
        let how = lock(&self.shared.bound).clone();
        let options = |key: &ListenerKey| how.get(key).map(|(_, options)| format!("{options:?}"));
        let listener = |(key, socket): (ListenerKey, TcpListener)| Passed {
            options: options(&key).unwrap_or_default(),
            listener: Some(key.0),
            address: key.1,
            socket,
        };
        let mut all: Vec<Passed> = answers.iter().flatten().map(listener).collect();
        let configured = self.shared.config.load().admin;
        let admin = self.admin.as_ref().and_then(|admin| admin.try_clone().ok());
        all.extend(configured.zip(admin).map(|(address, socket)| Passed {
            listener: None,
            address,
            options: String::new(),
            socket,
        }));
        all
    }

    fn handed_over(&self) {
        self.shared.handed_over.store(true, Ordering::Release);
        self.shared.quit();
    }
}

/// Makes `config` (or the one already there) the one in force and tells the workers.
fn commit(shared: &Shared, workers: &[Running], config: Option<Arc<Config>>, opened: Opened) {
    let before = shared.config.load_full();
    let pods = &config.as_ref().unwrap_or(&before).workloads;
    shared.registry.istio.keep(pods.values());
    // Whoever sees the new configuration finds its addresses.
    *lock(&shared.bound) = opened.bound;
    if let Some(config) = config {
        count_changes(shared, Some(&before), &config);
        want_secrets(shared, &config);
        shared.config.store(config);
    } else {
        count_changes(shared, None, &before);
        want_secrets(shared, &before);
    }
    for (worker, sockets) in workers.iter().zip(opened.sockets) {
        // A worker that is gone panicked; the others go on.
        let _ = worker.commands.send(Command::Apply(sockets));
    }
}

/// Tells the key store which names are in use.
fn want_secrets(shared: &Shared, config: &Config) {
    let (mut certificates, mut roots) = (BTreeSet::new(), BTreeSet::new());
    for listener in &config.listeners {
        for chain in listener.chains.iter().chain(&listener.default_chain) {
            certificates.extend(chain.certificate.clone());
            if let Some(tls) = &chain.tls {
                certificates.extend(tls.certificate.name());
                roots.extend(tls.roots.as_ref().and_then(Secret::name));
            }
        }
    }
    for cluster in &config.clusters {
        let contexts = cluster.endpoints.iter().filter_map(|e| e.tls.as_ref());
        for tls in contexts.chain(&cluster.tls) {
            roots.extend(tls.roots.name());
            if let Shown::Fixed(secret) = &tls.shown {
                certificates.extend(secret.name());
            }
        }
    }
    shared.secrets.want(&certificates, &roots);
}

fn count_changes(shared: &Shared, before: Option<&Config>, now: &Config) {
    use stats::{Cluster, ClusterManager, ListenerManager, Server};
    let listeners = shared.registry.scope("listener_manager", ListenerManager::TABLE);
    let clusters = shared.registry.scope("cluster_manager", ClusterManager::TABLE);
    let server = shared.registry.scope("server", Server::TABLE);
    let one = Shard::CONTROL;
    let old_listeners = by_name(before.map(|b| b.listeners.as_slice()), |listener| &listener.name);
    let old_clusters = by_name(before.map(|b| b.clusters.as_slice()), |cluster| &cluster.name);
    let mut kept = (0, 0);
    for listener in &now.listeners {
        let old = old_listeners.get(listener.name.as_str());
        kept.0 += usize::from(old.is_some());
        match old {
            None => {
                listeners.inc(one, ListenerManager::Added);
                listeners.add(
                    one,
                    ListenerManager::CreateSuccess,
                    shared.options.concurrency as u64,
                );
            }
            Some(old) if old.fingerprint != listener.fingerprint => {
                listeners.inc(one, ListenerManager::Modified)
            }
            Some(_) => {}
        }
    }
    for cluster in &now.clusters {
        let old = old_clusters.get(cluster.name.as_str());
        kept.1 += usize::from(old.is_some());
        if old.is_some_and(|old| Arc::ptr_eq(old, cluster)) {
            continue;
        }
        if old.is_none() {
            clusters.inc(one, ClusterManager::Added);
        }
        if old.is_none_or(|old| old.endpoints != cluster.endpoints) && !cluster.endpoints.is_empty() {
            cluster.stats.inc(one, Cluster::MembershipChange);
        }
        cluster.count_members();
    }
    listeners.add(
        one,
        ListenerManager::Removed,
        (old_listeners.len() - kept.0) as u64,
    );
    clusters.add(one, ClusterManager::Removed, (old_clusters.len() - kept.1) as u64);
    listeners.set(one, ListenerManager::Active, now.listeners.len() as u64);
    listeners.set(one, ListenerManager::WorkersStarted, 1);
    clusters.set(one, ClusterManager::Active, now.clusters.len() as u64);
    server.set(one, Server::Concurrency, shared.options.concurrency as u64);
    server.set(one, Server::Live, 1);
}

fn by_name<'a, T>(
    all: Option<&'a [Arc<T>]>,
    name: impl Fn(&'a T) -> &'a str,
) -> HashMap<&'a str, &'a Arc<T>> {
    let all = all.unwrap_or_default().iter();
    all.map(|one| (name(one), one)).collect()
}

struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> Option<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        match (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) {
            (Ok(terminate), Ok(interrupt)) => Some(Self { terminate, interrupt }),
            (Err(error), _) | (_, Err(error)) => {
                tracing::warn!(%error, "signals are not handled");
                None
            }
        }
    }

    async fn next(signals: &mut Option<Self>) {
        match signals {
            None => std::future::pending().await,
            Some(Self { terminate, interrupt }) => {
                tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
            }
        }
    }
}
