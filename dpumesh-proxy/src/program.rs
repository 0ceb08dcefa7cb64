//! The proxy as a whole: its arguments, its start, its control thread, its end.
//!
//! [`run`] is the program `dpu-proxy`; [`Proxy`] is for whoever runs it inside another program. The control thread owns
//! the configuration files and the admin server; it opens listening sockets (inside the stack's network namespace, if
//! there is one), swaps the configuration pointer and tells the workers. Nothing on it can hold up a request.
//!
//! `control` is that thread, `apply` brings a configuration into force, `stream` is where one comes by ADS, `give` what a newer process gets.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use clap::{Parser, ValueEnum};
use dpumesh_hw::netns::NamespaceError;
use dpumesh_hw::stream::kernel::{self, SocketOptions};
use tokio::sync::mpsc;

use crate::access_log::Sinks;
use crate::closing::{Closing, Which};
use crate::config::ConfigError;
use crate::config::ads;
use crate::config::files::Files;
use crate::config::model::Config;
use crate::config::secret_files::SecretFiles;
use crate::hand_over::Inherited;
use crate::health::Reporter;
use crate::health::keeper::Keeper;
use crate::health::prober::Surroundings;
use crate::overload::Overload;
use crate::stats::Registry;
use crate::tls::Secrets;
use crate::tls::store::Stored;
use crate::worker::{self, Command, ListenerKey};

mod apply;
mod control;
mod give;
mod stream;

use self::control::{Control, Names, note};

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
