//! The program `istio-dpu-agent`: read the configuration, open the card's host side, recover, serve, drain.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::{Args as ClapArgs, CommandFactory, FromArgMatches, Parser, ValueEnum};
use dpumesh_core::{Backend, BackendExt, MacAddr, Mtu, PfIndex, Role, Vni};
use dpumesh_hw::channel::trust::{Credentials, TrustError};
use dpumesh_tap::{Mode, Profile, TapBackend, TapOptions, VfKind};
use tokio::signal::unix::{SignalKind, signal};

use super::sweep::keep_sweeping;
use super::{
    Adapter, AgentSocket, DataplaneAddress, Governor, Immediate, Journal, JournalError, LocalNetwork, Node,
    NodeOptions, Peers, PeersError, SocketError, Ungoverned, keep_connected, watch_peers,
};

/// The node agent of dpumesh
#[derive(Debug, Clone, Parser)]
#[command(
    name = "istio-dpu-agent",
    version,
    args_override_self = true,
    about = "The node agent: gives pods virtual functions of the DPU and tells the dataplane about them",
    after_help = "\
Examples:
  istio-dpu-agent --dpu dpu0 --card /run/dpumesh/card0 --vfs 16 --vtep 192.0.2.1 \\
      --dataplane 169.254.0.2:7070 --credentials /etc/dpumesh/agent --peers /etc/dpumesh/peers.json
      the emulated card in that directory, VXLAN from 192.0.2.1, pods of other nodes from a file
  istio-dpu-agent … --adapter /run/dpumesh/adapter.sock --govern-within 20
      an ADD ends when the adapter says that the proxy has the pod's program, or is refused after 20 seconds
  istio-dpu-agent --config /etc/dpumesh/agent.toml --log-level debug
      the same from a file; what stands on the command line counts more

The file holds the long options without their dashes:
  dpu = \"dpu0\"
  vtep = \"192.0.2.1\"
  govern-within = 30

istio-dpu-cni, the CNI plugin, calls at --socket. The credentials folder holds authority.pem, certificate.pem and
key.pem, the certificate being for <dpu>.agent.dpumesh. One line `ready` goes to standard output when plugins are
served. SIGHUP reads --peers again; SIGTERM and SIGINT end the agent, and pods keep what they have."
)]
pub struct Args {
    /// TOML file with more options
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
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
    /// Number of virtual functions to make; as many as there are by default
    #[arg(long, value_name = "N")]
    pub vfs: Option<u16>,
    #[command(flatten)]
    /// The emulated card
    pub tap: TapArgs,
    #[command(flatten)]
    /// How nodes reach each other
    pub network: NetworkArgs,
    /// Address of the dataplane's channel, on the management network
    #[arg(
        long,
        value_name = "ADDR:PORT",
        required_unless_present = "completions",
        default_value = "unset",
        hide_default_value = true
    )]
    pub dataplane: String,
    /// Folder with authority.pem, certificate.pem and key.pem
    #[arg(
        long,
        value_name = "DIR",
        required_unless_present = "completions",
        default_value = "unset",
        hide_default_value = true
    )]
    pub credentials: PathBuf,
    /// Where plugins call
    #[arg(long, value_name = "PATH", default_value = "/run/dpumesh/agent.sock")]
    pub socket: PathBuf,
    /// Folder of the journal of attachments; must survive restarts of the agent
    #[arg(long, value_name = "DIR", default_value = "/var/lib/dpumesh/agent")]
    pub state: PathBuf,
    /// JSON file with the other nodes and their pods
    #[arg(long, value_name = "FILE")]
    pub peers: Option<PathBuf>,
    /// Socket of istio-dpu-adapter: it says when a pod's program is in force
    #[arg(long, value_name = "PATH", conflicts_with = "governor")]
    pub adapter: Option<PathBuf>,
    /// Who says that a pod's program is in force, without --adapter; immediate: nobody, every pod is governed at once
    #[arg(long, value_enum, default_value_t = GovernorName::Immediate)]
    pub governor: GovernorName,
    /// Longest wait of an ADD for the pod's program, seconds
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = seconds)]
    pub govern_within: Duration,
    /// What an ADD ends with when that wait was in vain
    #[arg(long, value_enum, default_value_t = Ungoverned::Refuse)]
    pub ungoverned: Ungoverned,
    /// Longest wait of an ADD for the dataplane, seconds
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    pub dataplane_within: Duration,
    /// How often pods are looked for whose namespace is gone, seconds
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    pub sweep_every: Duration,
    /// error, warn, info, debug or trace, or a filter such as dpumesh_cni=debug
    #[arg(short, long, value_name = "LEVEL", default_value = "info")]
    pub log_level: String,
    /// Print shell completions and leave
    #[arg(long, value_enum, value_name = "SHELL")]
    pub completions: Option<clap_complete::Shell>,
}

/// The emulated card.
#[derive(Debug, Clone, ClapArgs)]
pub struct TapArgs {
    /// Emulator: directory of the card's state, shared with the SoC's side as PCIe would be
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
    /// Emulator, veth VFs: network namespace of the card's ends, best the SoC's
    #[arg(long, value_name = "PATH")]
    pub fabric_netns: Option<PathBuf>,
}

/// How nodes reach each other: overlay or underlay.
#[derive(Debug, Clone, ClapArgs)]
#[group(required = false, multiple = true)]
pub struct NetworkArgs {
    /// Overlay: the SoC's tunnel endpoint
    #[arg(long, value_name = "ADDR", conflicts_with_all = ["uplink", "uplink_mac"])]
    pub vtep: Option<IpAddr>,
    /// Overlay: number of the pods' network
    #[arg(long, value_name = "N", default_value = "42", value_parser = parse_vni)]
    pub vni: Vni,
    /// Underlay: network device of the SoC
    #[arg(long, value_name = "DEVICE", requires = "uplink_mac")]
    pub uplink: Option<String>,
    /// Underlay: MAC of that device
    #[arg(long, value_name = "MAC", requires = "uplink")]
    pub uplink_mac: Option<MacAddr>,
    /// Largest L3 packet of the network in octets
    #[arg(long, value_name = "OCTETS", default_value = "1500", value_parser = parse_mtu)]
    pub uplink_mtu: Mtu,
}

/// Backends that this program links.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BackendName {
    /// The emulator.
    Tap,
}

/// Governors that this program knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum GovernorName {
    /// Every pod is governed at once.
    Immediate,
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

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|error| format!("{error}"))?;
    let duration = Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())?;
    (!duration.is_zero())
        .then_some(duration)
        .ok_or_else(|| "must be more than 0".to_owned())
}

fn parse_mtu(text: &str) -> Result<Mtu, String> {
    let octets: u16 = text.parse().map_err(|error| format!("{error}"))?;
    Mtu::try_from(octets).map_err(|error| error.to_string())
}

fn parse_vni(text: &str) -> Result<Vni, String> {
    let number: u32 = text.parse().map_err(|error| format!("{error}"))?;
    Vni::try_from(number).map_err(|error| error.to_string())
}

/// Why the agent did not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The arguments are wrong, or were asked about: print it and leave.
    #[error(transparent)]
    Arguments(#[from] clap::Error),
    /// The configuration file.
    #[error("--config {}: {reason}", path.display())]
    Config {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The arguments do not fit together.
    #[error("{0}")]
    Usage(String),
    /// The card.
    #[error(transparent)]
    Backend(#[from] dpumesh_core::Error),
    /// The credentials.
    #[error("--credentials: {0}")]
    Trust(#[from] TrustError),
    /// The journal.
    #[error("--state: {0}")]
    Journal(#[from] JournalError),
    /// The peers.
    #[error("--peers {0}")]
    Peers(#[from] PeersError),
    /// The socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The operating system said no.
    #[error("{what}: {error}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        error: io::Error,
    },
}

impl Args {
    /// Reads a command line and the file that it may name.
    ///
    /// # Errors
    /// Those of the arguments, told by clap, and those of the file.
    pub fn read(command_line: impl IntoIterator<Item = OsString>) -> Result<Self, Error> {
        let mut all: Vec<OsString> = command_line.into_iter().collect();
        if let Some(path) = config_of(&all) {
            let options = options_of(&path).map_err(|reason| Error::Config { path, reason })?;
            let behind_the_name = all.len().min(1);
            all.splice(behind_the_name..behind_the_name, options);
        }
        let matches = Self::command().try_get_matches_from(all)?;
        Ok(Self::from_arg_matches(&matches)?)
    }
}

/// The file that a command line names; the last counts.
fn config_of(command_line: &[OsString]) -> Option<PathBuf> {
    let mut found = None;
    let mut words = command_line.iter();
    while let Some(word) = words.next() {
        if word == "--config" {
            found = words.next().map(PathBuf::from);
        } else if let Some(path) = word.to_str().and_then(|word| word.strip_prefix("--config=")) {
            found = Some(path.into());
        }
    }
    found
}

/// A file's entries as options, so that both are checked alike.
fn options_of(path: &Path) -> Result<Vec<OsString>, String> {
    let text = fs::read_to_string(path).map_err(|error| error.to_string())?;
    let table: toml::Table = text.parse().map_err(|error: toml::de::Error| error.to_string())?;
    let command = Args::command();
    let known: Vec<&str> = command.get_arguments().filter_map(clap::Arg::get_long).collect();
    let mut options = Vec::new();
    for (key, value) in table {
        if matches!(key.as_str(), "config" | "completions") || !known.contains(&key.as_str()) {
            let mut known = known.clone();
            known.retain(|known| !matches!(*known, "config" | "completions" | "help" | "version"));
            return Err(format!("unknown key `{key}`; there are {}", known.join(", ")));
        }
        let value = match value {
            toml::Value::String(text) => text,
            toml::Value::Integer(number) => number.to_string(),
            toml::Value::Float(number) => number.to_string(),
            other => {
                return Err(format!(
                    "`{key}` must be a text or a number, not {}",
                    other.type_str()
                ));
            }
        };
        options.push(format!("--{key}={value}").into());
    }
    Ok(options)
}

/// Runs the program until it is told to end.
///
/// # Errors
/// Card, journal, credentials, peers or socket are not as they must be.
pub fn run(args: &Args) -> Result<(), Error> {
    if let Some(shell) = args.completions {
        clap_complete::generate(shell, &mut Args::command(), "istio-dpu-agent", &mut io::stdout());
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(failed("start the runtime"))?;
    runtime.block_on(serve(args))
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |error| Error::Io { what, error }
}

async fn serve(args: &Args) -> Result<(), Error> {
    let network = args.network.local()?;
    let address = DataplaneAddress {
        address: args.dataplane.clone(),
        dpu: dpumesh_core::DpuId(args.dpu.clone()),
        credentials: Credentials::read(&args.credentials)?,
    };
    let peers = match &args.peers {
        Some(path) => Peers::read(path, &network)?,
        None => Peers::default(),
    };
    let journal = Journal::open(&args.state)?;
    let governor: Arc<dyn Governor> = match (&args.adapter, args.governor) {
        (Some(socket), _) => Arc::new(Adapter::new(socket)),
        (None, GovernorName::Immediate) => Arc::new(Immediate),
    };
    let card = open_card(args).await?;
    let options = NodeOptions {
        network,
        govern_within: args.govern_within,
        ungoverned: args.ungoverned,
        dataplane_within: args.dataplane_within,
    };
    let node = Arc::new(Node::new(card, governor, journal, peers, options));
    let mut terminate = signal(SignalKind::terminate()).map_err(failed("wait for SIGTERM"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed("wait for SIGINT"))?;
    node.recover().await?;
    node.sweep(&args.socket).await;
    tokio::spawn(keep_connected(Arc::clone(&node), address));
    tokio::spawn(keep_sweeping(
        Arc::clone(&node),
        args.socket.clone(),
        args.sweep_every,
    ));
    if let Some(path) = args.peers.clone() {
        tokio::spawn(watch_peers(Arc::clone(&node), path));
    }
    let socket = AgentSocket::bind(&args.socket)?;
    println!("ready");
    tracing::info!(socket = %args.socket.display(), dpu = args.dpu, "the agent is ready");
    let shutdown = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    socket.serve(node, shutdown).await;
    Ok(())
}

impl NetworkArgs {
    fn local(&self) -> Result<LocalNetwork, Error> {
        match (self.vtep, self.uplink_mac) {
            (Some(vtep), _) => Ok(LocalNetwork::Overlay { vtep, vni: self.vni }),
            (None, Some(mac)) => Ok(LocalNetwork::Underlay { mac }),
            (None, None) => {
                let message = "give --vtep (overlay), or --uplink and --uplink-mac (underlay)";
                Err(Error::Usage(message.to_owned()))
            }
        }
    }

    fn mode(&self) -> Result<Mode, Error> {
        Ok(match (self.local()?, &self.uplink) {
            (LocalNetwork::Overlay { vtep, .. }, _) => Mode::Overlay { vtep },
            (LocalNetwork::Underlay { .. }, uplink) => Mode::Underlay {
                ifname: uplink.clone().unwrap_or_default(),
            },
        })
    }
}

/// The card's host side, with as many VFs as were asked for.
async fn open_card(args: &Args) -> Result<Arc<dyn Backend>, Error> {
    let BackendName::Tap = args.backend;
    let mut options = TapOptions::new(&args.tap.card, &args.dpu, Role::Host, args.network.mode()?);
    options.profile = args.tap.profile;
    options.uplink_mtu = args.network.uplink_mtu;
    options.fabric_namespace = args.tap.fabric_netns.clone();
    options.vf_kind = match args.tap.vf_device {
        VfDevice::Auto => VfKind::available(),
        VfDevice::Tap => VfKind::Tap,
        VfDevice::Veth => VfKind::Veth,
    };
    let card: Arc<dyn Backend> = Arc::new(TapBackend::open(options, None, None)?);
    let vf = card.require_vf()?;
    let there = vf.list().await?.len();
    match args.vfs {
        Some(wanted) if usize::from(wanted) != there => {
            let count = vf.set_vf_count(card.fence(), PfIndex(0), wanted).await?;
            tracing::info!(before = there, now = count.actual, "virtual functions");
        }
        None if there == 0 => {
            return Err(Error::Usage(
                "the card has no virtual functions: give --vfs".to_owned(),
            ));
        }
        _ => {}
    }
    Ok(card)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEEDED: &str =
        "dpu = \"dpu0\"\ncard = \"/run/card\"\ncredentials = \"/etc/c\"\ndataplane = \"1.2.3.4:7070\"\n";

    fn read(file: &str, more: &[&str]) -> Result<Args, Error> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("agent.toml");
        fs::write(&path, file).expect("written");
        let mut line: Vec<OsString> = vec!["istio-dpu-agent".into(), "--config".into(), path.into()];
        line.extend(more.iter().map(OsString::from));
        Args::read(line)
    }

    #[test]
    fn a_file_holds_options_and_the_command_line_counts_more() {
        let file =
            format!("{NEEDED}vtep = \"192.0.2.1\"\nvfs = 4\ngovern-within = 1.5\nungoverned = \"closed\"\n");
        let args = read(&file, &["--vfs", "8"]).expect("taken");
        assert_eq!((args.dpu.as_str(), args.vfs), ("dpu0", Some(8)));
        assert_eq!(args.govern_within, Duration::from_millis(1500));
        assert_eq!(args.ungoverned, Ungoverned::Closed);
        assert!(matches!(args.network.local(), Ok(LocalNetwork::Overlay { .. })));
    }

    #[test]
    fn an_adapter_is_a_governor() {
        let file = format!("{NEEDED}vtep = \"192.0.2.1\"\nadapter = \"/run/a.sock\"\n");
        let args = read(&file, &[]).expect("taken");
        assert_eq!(args.adapter.as_deref(), Some(Path::new("/run/a.sock")));
        assert!(read(&file, &["--governor", "immediate"]).is_err(), "one of both");
    }

    #[test]
    fn what_is_wrong_in_a_file_is_named() {
        let error = |file: &str| read(file, &[]).expect_err("wrong").to_string();
        assert!(error("moon = 1").contains("unknown key `moon`"));
        assert!(error("config = \"x\"").contains("unknown key `config`"));
        assert!(error("vfs = [1]").contains("`vfs` must be a text or a number"));
        assert!(error("vfs = ").contains("agent.toml"));
        assert!(error(&format!("{NEEDED}vfs = \"many\"")).contains("--vfs"));
        assert!(error("dpu = \"dpu0\"").contains("--card"));
    }

    #[test]
    fn one_network_must_be_chosen() {
        let args = read(NEEDED, &[]).expect("read");
        assert!(
            args.network
                .local()
                .expect_err("none")
                .to_string()
                .contains("--vtep")
        );
        assert!(read(NEEDED, &["--uplink", "up0"]).is_err(), "its MAC is missing");
        let both = [
            "--vtep",
            "192.0.2.1",
            "--uplink",
            "up0",
            "--uplink-mac",
            "02:00:00:00:00:01",
        ];
        assert!(read(NEEDED, &both).is_err());
    }

    #[test]
    fn the_options_make_sense() {
        Args::command().debug_assert();
    }
}
