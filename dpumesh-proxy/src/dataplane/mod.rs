//! The program `dpu-dataplane`: the engine on a chosen backend, reached over the channel.
//!
//! ```text
//! agent (host) ── channel ──► control ─┬─ SoftSteering ─► engine thread ◄── frames ──► ports of the card
//!                                      └─ backend: admit, open                    └──► stack port ─► stack namespace ─► dpu-proxy
//! ```
//! This module is assembly: it opens the card, prepares the stack, starts the engine's thread and serves the channel.
//! What happens to a frame is told in [`dpumesh_hw::dataplane`], what the agent may ask in [`dpumesh_hw::channel`].
//!
//! When the dataplane ends, however it ends, its pods are closed: nobody reads their ports any more. When it starts
//! again it has a new epoch and no rules, and the agent replays leases and rules.

mod control;
mod stack;

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args as ClapArgs, Parser, ValueEnum};
use dpumesh_core::{Backend, BackendExt, Epoch, FlowSteering, MacAddr, Mtu, PortRef, Role};
use dpumesh_hw::channel::trust::Credentials;
use dpumesh_hw::dataplane::{
    Engine, EngineConfig, EngineHandle, FlowOffloadLimits, PortPolicy, SoftSteering,
};
use dpumesh_hw::events::EventHub;
use dpumesh_hw::netns::Namespace;
use dpumesh_hw::shm::SocketTransport;
use dpumesh_hw::stream::IngressPort;
use dpumesh_tap::device::UdpUplink;
use dpumesh_tap::{Mode, Profile, TapBackend, TapCard, TapOptions, VfKind};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

pub use control::NodeDataplane;
pub use stack::StackArgs;

/// Events waiting for a slow subscriber.
const EVENTS: usize = 256;
/// Folder of the card's directory where shared-memory channels are offered.
const CHANNELS: &str = "channels";
/// How often rules are aged.
const MAINTENANCE: Duration = Duration::from_secs(1);

/// The forwarding engine of a DPU's SoC
#[derive(Debug, Clone, Parser)]
#[command(
    name = "dpu-dataplane",
    version,
    about = "The forwarding engine of a DPU's SoC: steering rules in, frames between pods, uplink and proxy",
    after_help = "\
Examples:
  dpu-dataplane --dpu dpu0 --card /run/dpumesh/card0 --vtep 192.0.2.1 \\
      --stack-netns /run/netns/dpu-stack --listen 169.254.0.2:7070 --credentials /etc/dpumesh/dataplane
      the emulated card in that directory, VXLAN from 192.0.2.1, the node agent at port 7070
  dpu-dataplane ... --uplink up0
      the same without encapsulation, on the device up0

The credentials folder holds authority.pem, certificate.pem and key.pem, the certificate being for
<dpu>.dataplane.dpumesh; who connects must show one of the same authority for <dpu>.agent.dpumesh.
One line `ready` goes to standard output when the channel can be reached. SIGTERM and SIGINT end it."
)]
pub struct Args {
    /// Backend that drives the card
    #[arg(long, value_enum, default_value_t = BackendName::Tap)]
    pub backend: BackendName,
    /// Name of the card
    #[arg(
        long,
        value_name = "NAME",
        required_unless_present = "completions",
        default_value = ""
    )]
    pub dpu: String,
    /// Emulator: directory of the card's state, shared with the host's side as PCIe would be
    #[arg(
        long,
        value_name = "DIR",
        required_unless_present = "completions",
        default_value = ""
    )]
    pub card: PathBuf,
    /// Emulator: what the card can do: unlimited, k2-like or minimal
    #[arg(long, value_name = "PROFILE", default_value = "unlimited")]
    pub profile: Profile,
    /// Emulator: what stands for a VF; tap needs /dev/net/tun
    #[arg(long, value_enum, default_value_t = VfDevice::Auto)]
    pub vf_device: VfDevice,
    /// Emulator: network namespace for the card's ends of veth devices, best one with nothing else in it, which must
    /// outlive this program; that of this program by default
    #[arg(long, value_name = "PATH")]
    pub fabric_netns: Option<PathBuf>,
    #[command(flatten)]
    /// Where the network is
    pub uplink: UplinkArgs,
    #[command(flatten)]
    /// Where the proxy is
    pub stack: StackArgs,
    /// Address of the channel, on the management network
    #[arg(
        long,
        value_name = "ADDR:PORT",
        required_unless_present = "completions",
        default_value = "127.0.0.1:7070"
    )]
    pub listen: SocketAddr,
    /// Folder with authority.pem, certificate.pem and key.pem
    #[arg(
        long,
        value_name = "DIR",
        required_unless_present = "completions",
        default_value = ""
    )]
    pub credentials: PathBuf,
    /// Flows remembered; each takes about 80 octets
    #[arg(long, value_name = "N", default_value_t = 65_536, value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    pub flows: u32,
    /// error, warn, info, debug or trace, or a filter such as dpumesh_hw=debug
    #[arg(short, long, value_name = "LEVEL", default_value = "info")]
    pub log_level: String,
    /// Print shell completions and leave
    #[arg(long, value_enum, value_name = "SHELL")]
    pub completions: Option<clap_complete::Shell>,
}

/// Backends that this program links.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BackendName {
    /// The emulator.
    Tap,
}

/// What stands for an emulated VF.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum VfDevice {
    /// tap where /dev/net/tun opens, veth elsewhere.
    Auto,
    /// A persistent TAP device.
    Tap,
    /// A veth pair.
    Veth,
}

impl VfDevice {
    /// What that is on this machine, for this user.
    pub fn kind(self) -> VfKind {
        match self {
            Self::Auto => VfKind::available(),
            Self::Tap => VfKind::Tap,
            Self::Veth => VfKind::Veth,
        }
    }
}

/// Where the network is: one of both.
#[derive(Debug, Clone, ClapArgs)]
#[group(required = false, multiple = true)]
pub struct UplinkArgs {
    /// Overlay: tunnel endpoint, an address of this namespace; pods are reached through VXLAN
    #[arg(long, value_name = "ADDR", conflicts_with = "uplink")]
    pub vtep: Option<std::net::IpAddr>,
    /// Underlay: network device on which pods are reached without encapsulation
    #[arg(long, value_name = "DEVICE")]
    pub uplink: Option<String>,
    /// Largest L3 packet of the network in octets
    #[arg(long, value_name = "OCTETS", default_value = "1500", value_parser = parse_mtu)]
    pub uplink_mtu: Mtu,
}

fn parse_mtu(text: &str) -> Result<Mtu, String> {
    let octets: u16 = text.parse().map_err(|error| format!("{error}"))?;
    Mtu::try_from(octets).map_err(|error| error.to_string())
}

/// Why the dataplane did not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The arguments do not fit together.
    #[error("{0}")]
    Usage(String),
    /// The card.
    #[error(transparent)]
    Backend(#[from] dpumesh_core::Error),
    /// The stack namespace.
    #[error(transparent)]
    Stack(#[from] stack::StackError),
    /// The credentials.
    #[error("credentials: {0}")]
    Trust(#[from] dpumesh_hw::channel::trust::TrustError),
    /// The channel.
    #[error(transparent)]
    Channel(#[from] dpumesh_hw::channel::ServeError),
    /// The operating system said no.
    #[error("{what}: {error}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        error: io::Error,
    },
    /// The engine's thread is gone.
    #[error("the engine has stopped")]
    Engine,
}

fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
    let what = what.into();
    move |error| Error::Io { what, error }
}

/// Runs the program until it is told to end.
///
/// # Errors
/// The card cannot be opened, the stack cannot be prepared, the channel cannot be served.
pub fn run(args: &Args) -> Result<(), Error> {
    if let Some(shell) = args.completions {
        let mut command = <Args as clap::CommandFactory>::command();
        clap_complete::generate(shell, &mut command, "dpu-dataplane", &mut io::stdout());
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(io_error("start the runtime"))?;
    runtime.block_on(serve(args))
}

async fn serve(args: &Args) -> Result<(), Error> {
    let credentials = Credentials::read(&args.credentials)?;
    let options = card_options(args)?;
    let capabilities = options.profile.capabilities(options.vf_mtu()?);
    let events = Arc::new(EventHub::new(EVENTS));
    let (engine, worker) = start_engine(args, &capabilities)?;
    let epoch = life();
    let steering = Arc::new(SoftSteering::new(
        dpumesh_tap::NAME,
        engine.clone(),
        capabilities.steering,
        epoch,
        Arc::clone(&events),
    ));
    let card = Arc::new(open_card(&options, Arc::<SoftSteering>::clone(&steering) as _)?);
    // What leaves the stack may go to another node: it keeps to the network's MTU, whatever pods of one node may do.
    let stack_mtu = options.vf_mtu()?.min(options.uplink_mtu);
    let fabric = match &options.fabric_namespace {
        Some(path) => Namespace::open(path),
        None => Namespace::current(),
    };
    let fabric = fabric.map_err(|error| Error::Usage(format!("--fabric-netns: {error}")))?;
    let stack = stack::open(&args.stack, options.vf_kind, &fabric, stack_mtu)?;
    open_port(&engine, stack.port, PortRef::Stack(0), stack.policy).await?;
    open_uplink(&engine, card.as_ref(), &options).await?;
    let dataplane = Arc::new(NodeDataplane::new(card, engine.clone(), steering, events, epoch));
    let maintenance = tokio::spawn(maintain(Arc::clone(&dataplane)));
    let listener = TcpListener::bind(args.listen)
        .await
        .map_err(io_error(format!("listen on {}", args.listen)))?;
    let mut terminate = signal(SignalKind::terminate()).map_err(io_error("wait for SIGTERM"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(io_error("wait for SIGINT"))?;
    println!("ready");
    tracing::info!(listen = %args.listen, dpu = %args.dpu, epoch = epoch.0, "dataplane is ready");
    let shutdown = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    let served = dpumesh_hw::channel::serve(listener, &credentials, dataplane, shutdown).await;
    maintenance.abort();
    engine.stop();
    let stopped = tokio::task::spawn_blocking(move || worker.join()).await;
    served?;
    match stopped {
        Ok(Ok(Ok(()))) => Ok(()),
        Ok(Ok(Err(error))) => Err(io_error("wait for frames")(error.into())),
        _ => Err(Error::Engine),
    }
}

/// A number for this life of the dataplane that is larger than those of its former lives: milliseconds since 1970.
fn life() -> Epoch {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    Epoch(since.map_or(1, |since| since.as_millis() as u64)) // fits for 500 million years
}

fn card_options(args: &Args) -> Result<TapOptions, Error> {
    let BackendName::Tap = args.backend;
    let mode = match (&args.uplink.vtep, &args.uplink.uplink) {
        (Some(vtep), None) => Mode::Overlay { vtep: *vtep },
        (None, Some(device)) => Mode::Underlay {
            ifname: device.clone(),
        },
        _ => {
            return Err(Error::Usage(
                "give --vtep (overlay) or --uplink (underlay)".to_owned(),
            ));
        }
    };
    let mut options = TapOptions::new(&args.card, &args.dpu, Role::Soc, mode);
    options.profile = args.profile;
    options.uplink_mtu = args.uplink.uplink_mtu;
    options.vf_kind = args.vf_device.kind();
    options.fabric_namespace.clone_from(&args.fabric_netns);
    Ok(options)
}

/// The card, with the engine for its eswitch and channels in a folder of its directory.
fn open_card(options: &TapOptions, steering: Arc<dyn FlowSteering>) -> Result<TapBackend, Error> {
    let card = TapCard::open(options.clone())?;
    let transport = SocketTransport::new(options.card.join(CHANNELS), SocketTransport::usual_capabilities())?;
    let claims = transport.capabilities().clone();
    Ok(TapBackend::on(card, Some(steering), Some(Arc::new(transport)))
        .with_capabilities(|all| all.transport = claims))
}

type Worker = std::thread::JoinHandle<nix::Result<()>>;

fn start_engine(
    args: &Args,
    capabilities: &dpumesh_core::Capabilities,
) -> Result<(EngineHandle, Worker), Error> {
    let mut config = EngineConfig::new(random_seed()?);
    config.flows = args.flows;
    let np = u32::try_from(capabilities.offload.connections).unwrap_or(u32::MAX);
    config.offload = FlowOffloadLimits {
        flows: np,
        ..FlowOffloadLimits::default()
    };
    let (engine, handle) = Engine::new(&config).map_err(|errno| io_error("make the engine")(errno.into()))?;
    let worker = std::thread::Builder::new()
        .name("engine".to_owned())
        .spawn(move || engine.run());
    Ok((handle, worker.map_err(io_error("start the engine's thread"))?))
}

/// Seed of the hash tables: nobody outside may guess it.
fn random_seed() -> Result<u128, Error> {
    let mut octets = [0; 16];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| io::Read::read_exact(&mut file, &mut octets))
        .map_err(io_error("read /dev/urandom"))?;
    Ok(u128::from_ne_bytes(octets))
}

async fn open_uplink(engine: &EngineHandle, card: &dyn Backend, options: &TapOptions) -> Result<(), Error> {
    let port = PortRef::Uplink(0);
    let ports = card.require_ports()?;
    let info = ports.list().await?.into_iter().find(|info| info.port == port);
    let mac = match (&options.mode, info.and_then(|info| info.mac)) {
        (Mode::Overlay { vtep }, _) => UdpUplink::mac_of(*vtep),
        (Mode::Underlay { .. }, Some(mac)) => mac,
        (Mode::Underlay { ifname }, None) => {
            return Err(Error::Usage(format!(
                "the uplink device {ifname} has no MAC address"
            )));
        }
    };
    let io = ports.open(card.fence(), port).await?;
    let policy = PortPolicy::Uplink {
        mac,
        ingress: uplink_ingress(),
    };
    open_port(engine, io, port, policy).await
}

/// Number by which the proxy knows the uplink; agents number pods from 1.
fn uplink_ingress() -> IngressPort {
    IngressPort::new(u32::MAX).expect("not 0")
}

async fn open_port(
    engine: &EngineHandle,
    io: Box<dyn dpumesh_core::PortIo>,
    port: PortRef,
    policy: PortPolicy,
) -> Result<(), Error> {
    let opened = engine.open_port(io).await.map_err(|_| Error::Engine)?;
    let admitted = engine
        .set_policy(port, Some(policy))
        .await
        .map_err(|_| Error::Engine)?;
    if opened && admitted {
        Ok(())
    } else {
        Err(Error::Usage(format!("port {port} cannot be opened")))
    }
}

async fn maintain(dataplane: Arc<NodeDataplane>) {
    let mut tick = tokio::time::interval(MAINTENANCE);
    loop {
        tick.tick().await;
        if dataplane.maintain().await.is_err() {
            return; // the engine is gone, and with it the program
        }
    }
}

/// MAC of the router that stacks see; locally administered.
pub(crate) const STACK_GATEWAY: MacAddr = MacAddr([0x02, 0xd8, 0, 0, 0, 0xfe]);
