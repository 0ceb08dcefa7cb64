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
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::{Args as ClapArgs, Parser, ValueEnum};
use dpumesh_core::{
    Backend, BackendExt, Epoch, Event, EventStream, FlowSteering, MacAddr, Mtu, PortRef, Role,
};
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
use tokio::sync::oneshot;

pub use control::NodeDataplane;
pub use stack::StackArgs;

/// Events waiting for a slow subscriber.
const EVENTS: usize = 256;
/// Folder of the card's directory where shared-memory channels are offered.
const CHANNELS: &str = "channels";
/// How often rules are aged.
const MAINTENANCE: Duration = Duration::from_secs(1);
/// File in a card's directory: the number of the dataplane's last life.
const LIFE: &str = "dataplane-life";
const UPLINK: PortRef = PortRef::Uplink(0);

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
        default_value = "unset",
        hide_default_value = true
    )]
    pub dpu: String,
    /// Emulator: directory of the card's state, shared with the host's side as PCIe would be
    #[arg(
        long,
        value_name = "DIR",
        required_unless_present = "completions",
        default_value = "unset",
        hide_default_value = true
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
        default_value = "unset",
        hide_default_value = true
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
    /// The card went away.
    #[error("the card is lost: start again once it is back, and the agent replays leases and rules")]
    CardLost,
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
    let (engine, worker, ended) = start_engine(args, &capabilities)?;
    let card = TapCard::open(options.clone())?;
    let epoch = life(&options.card)?;
    let steering = Arc::new(SoftSteering::new(
        dpumesh_tap::NAME,
        engine.clone(),
        capabilities.steering,
        epoch,
        Arc::clone(&events),
    ));
    let card = Arc::new(equip(card, &options, Arc::<SoftSteering>::clone(&steering) as _)?);
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
    let mut lost = std::pin::pin!(until_lost(card.events(), Arc::clone(&events)));
    let mut dataplane = NodeDataplane::new(
        Arc::<TapBackend>::clone(&card),
        engine.clone(),
        steering,
        events,
        epoch,
    );
    if args.stack.inbound_port.is_some() {
        dataplane = dataplane.with_hairpins(stack.kernel);
    }
    let dataplane = Arc::new(dataplane);
    let maintenance = tokio::spawn(maintain(Arc::clone(&dataplane), engine.clone(), card, options));
    let listener = TcpListener::bind(args.listen)
        .await
        .map_err(io_error(format!("listen on {}", args.listen)))?;
    let mut terminate = signal(SignalKind::terminate()).map_err(io_error("wait for SIGTERM"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(io_error("wait for SIGINT"))?;
    println!("ready");
    tracing::info!(listen = %args.listen, dpu = %args.dpu, epoch = epoch.0, "dataplane is ready");
    let mut card_lost = false;
    let shutdown = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            _ = ended => tracing::error!("the engine has stopped"),
            () = &mut lost => {
                tracing::error!("the card is lost, and with it leases and ports");
                card_lost = true;
            }
        }
    };
    let served = dpumesh_hw::channel::serve(listener, &credentials, dataplane, shutdown).await;
    maintenance.abort();
    engine.stop();
    let stopped = tokio::task::spawn_blocking(move || worker.join()).await;
    served?;
    match stopped {
        Ok(Ok(Ok(()))) if card_lost => Err(Error::CardLost),
        Ok(Ok(Ok(()))) => Ok(()),
        Ok(Ok(Err(error))) => Err(io_error("wait for frames")(error.into())),
        _ => Err(Error::Engine),
    }
}

/// Passes the card's events on, until the card is lost: a card that returns knows no lease and no port, as after a start
/// of this program, so that is how it is dealt with.
async fn until_lost(mut card: Box<dyn EventStream>, events: Arc<EventHub>) {
    while let Some(event) = card.next().await {
        if matches!(event, Event::Lost { .. }) {
            return;
        }
        events.raise(&event);
    }
}

/// A number for this life of the dataplane that is larger than those of its former lives: milliseconds since 1970, or one
/// more than the last where the clock stands or was set back. The last one is in a file of the card's directory.
fn life(card: &Path) -> Result<Epoch, Error> {
    let file = card.join(LIFE);
    let last = match std::fs::read_to_string(&file) {
        Ok(text) => text.trim().parse().unwrap_or(0),
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        Err(error) => return Err(io_error(format!("read {}", file.display()))(error)),
    };
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let now = since.map_or(0, |since| since.as_millis() as u64); // fits for 500 million years
    let life = now.max(last + 1);
    let new = card.join(format!("{LIFE}.new"));
    std::fs::write(&new, life.to_string())
        .and_then(|()| std::fs::rename(&new, &file))
        .map_err(io_error(format!("write {}", file.display())))?;
    Ok(Epoch(life))
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
fn equip(card: TapCard, options: &TapOptions, steering: Arc<dyn FlowSteering>) -> Result<TapBackend, Error> {
    let transport = SocketTransport::new(options.card.join(CHANNELS), SocketTransport::usual_capabilities())?;
    let claims = transport.capabilities().clone();
    Ok(TapBackend::on(card, Some(steering), Some(Arc::new(transport)))
        .with_capabilities(|all| all.transport = claims))
}

type Worker = std::thread::JoinHandle<nix::Result<()>>;

/// The receiver ends when the engine's thread does, for whatever reason.
fn start_engine(
    args: &Args,
    capabilities: &dpumesh_core::Capabilities,
) -> Result<(EngineHandle, Worker, oneshot::Receiver<()>), Error> {
    let mut config = EngineConfig::new(random_seed()?);
    config.flows = args.flows;
    let np = u32::try_from(capabilities.offload.connections).unwrap_or(u32::MAX);
    config.offload = FlowOffloadLimits {
        flows: np,
        ..FlowOffloadLimits::default()
    };
    let (engine, handle) = Engine::new(&config).map_err(|errno| io_error("make the engine")(errno.into()))?;
    let (running, ended) = oneshot::channel::<()>();
    let worker = std::thread::Builder::new()
        .name("engine".to_owned())
        .spawn(move || {
            let _running = running; // dropped with the thread, also when it panics
            engine.run()
        });
    let worker = worker.map_err(io_error("start the engine's thread"))?;
    Ok((handle, worker, ended))
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
    let ports = card.require_ports()?;
    let info = ports.list().await?.into_iter().find(|info| info.port == UPLINK);
    let mac = match (&options.mode, info.and_then(|info| info.mac)) {
        (Mode::Overlay { vtep }, _) => UdpUplink::mac_of(*vtep),
        (Mode::Underlay { .. }, Some(mac)) => mac,
        (Mode::Underlay { ifname }, None) => {
            return Err(Error::Usage(format!(
                "the uplink device {ifname} has no MAC address"
            )));
        }
    };
    let io = ports.open(card.fence(), UPLINK).await?;
    let policy = PortPolicy::Uplink {
        mac,
        ingress: uplink_ingress(),
    };
    open_port(engine, io, UPLINK, policy).await
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

/// Ages rules, and opens the uplink again after its device failed or was made anew.
async fn maintain(
    dataplane: Arc<NodeDataplane>,
    engine: EngineHandle,
    card: Arc<TapBackend>,
    options: TapOptions,
) {
    let mut tick = tokio::time::interval(MAINTENANCE);
    loop {
        tick.tick().await;
        if dataplane.maintain().await.is_err() {
            return; // the engine has ended, and that ends the program
        }
        let Ok(stats) = engine.stats().await else { return };
        if stats.ports.get(&UPLINK).is_some_and(|uplink| uplink.open) {
            continue;
        }
        match open_uplink(&engine, card.as_ref(), &options).await {
            Ok(()) => tracing::warn!("the uplink was closed and is open again"),
            Err(error) => tracing::warn!(%error, "the uplink is closed: no traffic with other nodes"),
        }
    }
}

/// MAC of the router that stacks see; locally administered.
pub(crate) const STACK_GATEWAY: MacAddr = MacAddr([0x02, 0xd8, 0, 0, 0, 0xfe]);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn completions_need_no_other_option_and_work_does() {
        let completions = Args::try_parse_from(["dpu-dataplane", "--completions", "bash"]);
        assert!(completions.expect("accepted").completions.is_some());
        let error = Args::try_parse_from(["dpu-dataplane", "--vtep", "192.0.2.1"]).expect_err("refused");
        for option in ["--dpu", "--card", "--credentials", "--stack-netns"] {
            assert!(error.to_string().contains(option), "{option}: {error}");
        }
    }

    #[test]
    fn lives_have_growing_numbers() {
        let card = tempfile::tempdir().expect("a folder");
        let first = life(card.path()).expect("written");
        let second = life(card.path()).expect("written");
        assert!(second > first);
        // The clock was set back by centuries.
        let far = u64::MAX / 2;
        std::fs::write(card.path().join(LIFE), far.to_string()).expect("written");
        assert_eq!(life(card.path()).expect("written"), Epoch(far + 1));
    }
}
