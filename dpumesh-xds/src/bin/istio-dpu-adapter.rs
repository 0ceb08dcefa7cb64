//! `istio-dpu-adapter`: many pods' configuration from istiod, one configuration for the node's shared proxy. See `istio-dpu-adapter --help`.

use std::error::Error;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{CommandFactory as _, Parser, ValueEnum};
use dpumesh_xds::adapter::controller::{self, Word};
use dpumesh_xds::adapter::pods::{LocalPod, Pods};
use dpumesh_xds::adapter::relay::{self, RelayService};
use dpumesh_xds::adapter::status::Page;
use dpumesh_xds::adapter::token::{Files, Requested, Tokens};
use dpumesh_xds::adapter::{Adapter, Mesh, Parts, PodEntry, disk};
use dpumesh_xds::aggregate::{Interception, Options};
use dpumesh_xds::client::{self, Client, Credential, Protocol, Security};
use dpumesh_xds::discovery::ResourceType;
use dpumesh_xds::server::Publisher;
use dpumesh_xds::{local, program, socket};
use tokio::net::TcpListener;
use tonic::transport::{Certificate, Channel, Identity, Server, ServerTlsConfig};

/// Speaks xDS to istiod for every pod of a node, and to the node's shared proxy for all of them.
#[derive(Debug, Parser)]
#[command(
    name = "istio-dpu-adapter",
    version,
    after_help = "\
Examples:
  istio-dpu-adapter --istiod istiod.istio-system.svc:15012 --istiod-root root.pem --kubeconfig node.conf \\
      --node node-1 --controller 192.0.2.9:15020 --agent-socket /run/dpumesh/adapter.sock --peers-file /run/dpumesh/peers.json \\
      --listen 192.0.2.1:15010 --tls-cert host.pem --tls-key host.key --tls-ca ca.pem --state /var/lib/dpumesh/adapter
  istio-dpu-adapter --istiod 127.0.0.1:15012 --istiod-root root.pem --pods pods.json --listen 127.0.0.1:15010

A pod gets a stream to istiod when the controller has a binding for it and the agent asked for it, or when it is in the
list. --tls-cert, --tls-key and --tls-ca are for both sides: the shared proxy that connects and the controller that is
connected to. The proxy's certificate requests come to --listen as well, and go on to istiod's CA with the pod's token.
With --state the last good configuration is there again after a restart, also while istiod is away.

SIGTERM and SIGINT end it; the proxy keeps what it has."
)]
struct Args {
    /// istiod, host:port (15012 with TLS, 15010 without)
    #[arg(long, value_name = "ADDRESS", required_unless_present = "completions")]
    istiod: Option<String>,
    /// PEM roots of istiod's certificate; without them the connection is in clear text
    #[arg(long, value_name = "FILE")]
    istiod_root: Option<PathBuf>,
    /// The name in istiod's certificate
    #[arg(long, default_value = "istiod.istio-system.svc")]
    istiod_name: String,
    /// PEM client certificate for istiod: all pods are then of its account, and need no token
    #[arg(long, value_name = "FILE", requires_all = ["client_key", "istiod_root"], conflicts_with = "kubeconfig")]
    client_cert: Option<PathBuf>,
    /// Its key
    #[arg(long, value_name = "FILE", requires = "client_cert")]
    client_key: Option<PathBuf>,
    /// JSON list of {"ip", "name", "namespace", "service_account", "token": FILE, "uid", "labels"}
    #[arg(long, value_name = "FILE")]
    pods: Option<PathBuf>,
    /// Kubernetes credentials with which tokens of pods are asked for
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// This node's name
    #[arg(long, requires = "controller")]
    node: Option<String>,
    /// istio-dpu-controller, host:port
    #[arg(long, value_name = "ADDRESS", requires = "node")]
    controller: Option<String>,
    /// The name in the controller's certificate
    #[arg(long, value_name = "NAME", default_value = "istio-dpu-controller")]
    controller_name: String,
    /// Unix socket where the node agent asks for pods to be governed
    #[arg(long, value_name = "SOCKET")]
    agent_socket: Option<PathBuf>,
    /// The node agent's file of peers, to be written
    #[arg(long, value_name = "FILE", requires = "controller")]
    peers_file: Option<PathBuf>,
    /// Where the shared proxy connects
    #[arg(long, value_name = "ADDRESS", required_unless_present = "completions")]
    listen: Option<SocketAddr>,
    /// PEM certificate for the shared proxy and the controller
    #[arg(long, value_name = "FILE", requires_all = ["tls_key", "tls_ca"])]
    tls_cert: Option<PathBuf>,
    /// Its key
    #[arg(long, value_name = "FILE")]
    tls_key: Option<PathBuf>,
    /// PEM roots of the shared proxy's and the controller's certificates
    #[arg(long, value_name = "FILE")]
    tls_ca: Option<PathBuf>,
    /// Folder for the last good configuration
    #[arg(long, value_name = "FOLDER")]
    state: Option<PathBuf>,
    /// Loopback address of the admin page: /status, /ready
    #[arg(long, value_name = "ADDRESS")]
    admin: Option<SocketAddr>,
    /// Address of the shared listener for what leaves pods
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0:15001")]
    outbound: SocketAddr,
    /// Address of the shared listener for what comes to pods
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0:15006")]
    inbound: SocketAddr,
    /// How connections reach the shared proxy
    #[arg(long, value_enum, default_value = "transparent")]
    interception: How,
    /// Trust domain of the mesh, for pods of the list
    #[arg(long, default_value = "cluster.local")]
    trust_domain: String,
    /// This cluster's name in istiod
    #[arg(long, default_value = "Kubernetes")]
    cluster_id: String,
    /// The Istio version whose configuration is asked for
    #[arg(long, default_value = "1.29.2")]
    istio_version: String,
    /// error, warn, info, debug or trace, or a filter such as dpumesh_xds=debug
    #[arg(short, long, value_name = "LEVEL", default_value = "info")]
    log_level: String,
    /// Print shell completions and leave
    #[arg(long, value_enum, value_name = "SHELL")]
    completions: Option<clap_complete::Shell>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum How {
    Transparent,
    Redirect,
    ProxyProtocol,
}

type Failed = Box<dyn Error>;

fn main() -> ExitCode {
    let args = Args::parse();
    if let Some(shell) = args.completions {
        let mut command = Args::command();
        clap_complete::generate(shell, &mut command, "istio-dpu-adapter", &mut std::io::stdout());
        return ExitCode::SUCCESS;
    }
    program::enter("istio-dpu-adapter", &args.log_level, run(&args))
}

async fn run(args: &Args) -> Result<(), Failed> {
    let (Some(istiod), Some(listen)) = (&args.istiod, args.listen) else {
        return Err("--istiod and --listen are needed".into());
    };
    let istiod = client::channel(istiod, &args.istiod_security()?)?;
    let mut server = args.server(listen)?;
    let restored = args.state.as_deref().map(disk::restore).unwrap_or_default();
    let (keeper, writer) = args.state.as_deref().map(disk::open).transpose()?.unzip();
    let pods = Arc::new(Pods::new(
        args.listed()?,
        restored.iter().map(|(pod, _)| pod.clone()).collect(),
    ));
    let tokens = args.tokens().await?;
    let relayed = Arc::new(relay::Counters::default());
    let relay = RelayService::new(
        Arc::clone(&pods),
        Arc::clone(&tokens),
        istiod.clone(),
        &args.cluster_id,
        Arc::clone(&relayed),
    )?;
    let (publisher, events) = Publisher::new();
    let counters = Arc::new(client::Counters::default());
    let serving = server
        .add_service(publisher.service())
        .add_service(relay)
        .serve(listen);
    let proxies = Arc::clone(publisher.counters());
    let adapter = Adapter::new(Parts {
        istiod,
        mesh: args.mesh(),
        pods: Arc::clone(&pods),
        tokens,
        options: args.options(),
        publisher,
        events,
        keeper,
        restored,
        counters: Arc::clone(&counters),
    });
    let page = Page {
        shown: adapter.shown(),
        streams: counters,
        proxies,
        relay: relayed,
    };
    let agents = args.agents(Arc::clone(&pods), adapter.board())?;
    let controller = args.controller(pods)?;
    tokio::select! {
        served = serving => served?,
        () = adapter.run() => {}
        () = agents => {}
        () = controller => {}
        served = args.page(page) => served?,
        () = program::ended() => {}
    }
    tracing::info!("ends; proxies keep what they have");
    if let Some(writer) = writer {
        writer.finish();
    }
    Ok(())
}

impl Args {
    fn istiod_security(&self) -> Result<Security, String> {
        let Some(roots) = &self.istiod_root else {
            return Ok(Security::Plaintext);
        };
        let client = match (&self.client_cert, &self.client_key) {
            (Some(chain), Some(key)) => Some((program::read(chain)?, program::read(key)?)),
            _ => None,
        };
        Ok(Security::Tls {
            roots: program::read(roots)?,
            name: self.istiod_name.clone(),
            client,
        })
    }

    /// PEM certificate, key and roots of the node.
    fn own(&self) -> Result<Option<(String, String, String)>, String> {
        match (&self.tls_cert, &self.tls_key, &self.tls_ca) {
            (Some(chain), Some(key), Some(roots)) => Ok(Some((
                program::read(chain)?,
                program::read(key)?,
                program::read(roots)?,
            ))),
            _ => Ok(None),
        }
    }

    fn server(&self, listen: SocketAddr) -> Result<Server, Failed> {
        let server = Server::builder()
            .tcp_nodelay(true)
            .http2_keepalive_interval(Some(std::time::Duration::from_secs(30)));
        match self.own()? {
            Some((chain, key, roots)) => Ok(server.tls_config(
                ServerTlsConfig::new()
                    .identity(Identity::from_pem(chain, key))
                    .client_ca_root(Certificate::from_pem(roots)),
            )?),
            None if listen.ip().is_loopback() => Ok(server),
            None => Err("--listen beyond loopback needs --tls-cert, --tls-key and --tls-ca".into()),
        }
    }

    fn listed(&self) -> Result<Vec<LocalPod>, String> {
        let Some(path) = &self.pods else {
            return Ok(Vec::new());
        };
        let entries: Vec<PodEntry> = serde_json::from_str(&program::read(path)?)
            .map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(entries.iter().map(|e| e.complete(&self.trust_domain)).collect())
    }

    async fn tokens(&self) -> Result<Arc<dyn Tokens>, Failed> {
        let Some(path) = &self.kubeconfig else {
            return Ok(Arc::new(Files));
        };
        let file = kube::config::Kubeconfig::read_from(path)?;
        let config =
            kube::Config::from_custom_kubeconfig(file, &kube::config::KubeConfigOptions::default()).await?;
        Ok(Arc::new(Requested::new(kube::Client::try_from(config)?)))
    }

    fn mesh(&self) -> Mesh {
        Mesh {
            trust_domain: self.trust_domain.clone(),
            cluster_id: self.cluster_id.clone(),
            istio_version: self.istio_version.clone(),
        }
    }

    fn options(&self) -> Options {
        Options {
            outbound: self.outbound,
            inbound: self.inbound,
            interception: match self.interception {
                How::Transparent => Interception::Transparent,
                How::Redirect => Interception::Redirect,
                How::ProxyProtocol => Interception::ProxyProtocol,
            },
        }
    }

    fn agents(&self, pods: Arc<Pods>, board: local::Board) -> Result<impl Future<Output = ()>, String> {
        let incoming = match &self.agent_socket {
            Some(path) => Some(socket::bind(path).map_err(|error| format!("{}: {error}", path.display()))?),
            None => None,
        };
        Ok(async move {
            match incoming {
                Some(incoming) => local::serve(incoming, pods, board).await,
                None => std::future::pending().await,
            }
        })
    }

    fn controller(&self, pods: Arc<Pods>) -> Result<impl Future<Output = ()>, Failed> {
        let client = match (&self.controller, &self.node) {
            (Some(address), Some(node)) => Some(Client {
                channel: self.to_controller(address)?,
                node: controller::node(node),
                credential: Credential::Connection,
                protocol: Protocol::Delta,
                wildcards: vec![ResourceType::Binding, ResourceType::Peer],
                counters: Arc::default(),
            }),
            _ => None,
        };
        let mut word = Word::new(pods, self.peers_file.clone());
        Ok(async move {
            match client {
                Some(client) => client.run(&mut word).await,
                None => std::future::pending().await,
            }
        })
    }

    fn to_controller(&self, address: &str) -> Result<Channel, Failed> {
        let security = match self.own()? {
            Some((chain, key, roots)) => Security::Tls {
                roots,
                name: self.controller_name.clone(),
                client: Some((chain, key)),
            },
            None => Security::Plaintext,
        };
        Ok(client::channel(address, &security)?)
    }

    async fn page(&self, page: Page) -> Result<(), Failed> {
        let Some(address) = self.admin else {
            return std::future::pending().await;
        };
        if !address.ip().is_loopback() {
            return Err("--admin must be a loopback address: the page has no authentication".into());
        }
        let listener = TcpListener::bind(address).await?;
        Ok(page.serve(listener).await?)
    }
}
