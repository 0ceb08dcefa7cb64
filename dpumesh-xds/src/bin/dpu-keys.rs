//! `dpu-keys`: keys of workloads for an Envoy on the SoC. See `dpu-keys --help`.

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{CommandFactory as _, Parser};
use dpumesh_xds::client::{self, Security};
use dpumesh_xds::ir::Identity;
use dpumesh_xds::keys::sds::SdsService;
use dpumesh_xds::keys::{IstioRelay, KeyStore, TokenRelay};
use dpumesh_xds::{program, socket};
use tonic::transport::Server;

/// Keeps the keys of workloads where they are used, and hands them to an Envoy beside it (dpu-proxy has such a store within).
#[derive(Debug, Parser)]
#[command(
    name = "dpu-keys",
    version,
    after_help = "\
Example:
  dpu-keys --adapter 192.0.2.1:15010 --root ca.pem --name node-1 --cert soc.pem --key soc.key --sds /run/dpu-keys/sds

A name spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/ACCOUNT that Envoy asks for gets a new P-256 key, whose certificate the adapter
fetches from istiod; ROOTCA@TRUST-DOMAIN are the roots. Keys are in memory only. Envoy needs a cluster for the socket:
its name is the one that istiod writes, `sds-grpc`.

With --istiod it is what the agent of one ordinary sidecar is: it asks istiod itself, and `default` is the one identity.
  dpu-keys --istiod istiod.istio-system.svc:15012 --root istiod-root.pem --token token --identity spiffe://cluster.local/ns/n/sa/a --sds sds"
)]
struct Args {
    /// The adapter, host:port
    #[arg(long, value_name = "ADDRESS", required_unless_present_any = ["istiod", "completions"])]
    adapter: Option<String>,
    /// istiod, host:port, in the adapter's place: for one ordinary sidecar
    #[arg(long, value_name = "ADDRESS", conflicts_with = "adapter", requires_all = ["root", "token", "identity"])]
    istiod: Option<String>,
    /// With --istiod: the token of the workload's account, audience istio-ca
    #[arg(long, value_name = "FILE", requires = "istiod")]
    token: Option<PathBuf>,
    /// With --istiod: who the workload is
    #[arg(long, value_name = "SPIFFE-ID", requires = "istiod")]
    identity: Option<String>,
    /// PEM roots of the adapter's or istiod's certificate; without them the connection is in clear text
    #[arg(long, value_name = "FILE")]
    root: Option<PathBuf>,
    /// The name in the adapter's certificate; istiod's is known
    #[arg(long, requires_all = ["root", "cert", "key"])]
    name: Option<String>,
    /// PEM certificate of this SoC
    #[arg(long, value_name = "FILE")]
    cert: Option<PathBuf>,
    /// Its key
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,
    /// The Unix socket where Envoy finds its secrets; its folder should be Envoy's alone
    #[arg(long, value_name = "SOCKET", required_unless_present = "completions")]
    sds: Option<PathBuf>,
    /// error, warn, info, debug or trace, or a filter
    #[arg(short, long, value_name = "LEVEL", default_value = "info")]
    log_level: String,
    /// Print shell completions and leave
    #[arg(long, value_enum, value_name = "SHELL")]
    completions: Option<clap_complete::Shell>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if let Some(shell) = args.completions {
        clap_complete::generate(shell, &mut Args::command(), "dpu-keys", &mut std::io::stdout());
        return ExitCode::SUCCESS;
    }
    program::enter("dpu-keys", &args.log_level, run(&args))
}

/// The name in istiod's certificate, whatever address it is reached by.
const ISTIOD: &str = "istiod.istio-system.svc";

async fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    let sds = args.sds.as_ref().ok_or("--sds is needed")?;
    let service = if args.istiod.is_some() {
        of_workload(args)?
    } else {
        of_node(args)?
    };
    let incoming = socket::bind(sds).map_err(|error| format!("{}: {error}", sds.display()))?;
    tracing::info!(socket = %sds.display(), "serving secrets");
    tokio::select! {
        served = Server::builder().add_service(service).serve_with_incoming(incoming) => served?,
        () = program::ended() => {}
    }
    let _ = std::fs::remove_file(sds);
    Ok(())
}

/// For the shared proxy of a node, by way of its adapter.
fn of_node(args: &Args) -> Result<SdsService, Box<dyn Error>> {
    let adapter = args.adapter.as_ref().ok_or("--adapter is needed")?;
    let security = match (&args.root, &args.name, &args.cert, &args.key) {
        (Some(root), Some(name), Some(cert), Some(key)) => Security::Tls {
            roots: program::read(root)?,
            name: name.clone(),
            client: Some((program::read(cert)?, program::read(key)?)),
        },
        (None, ..) => Security::Plaintext,
        _ => return Err("--root needs --name, --cert and --key".into()),
    };
    let channel = client::channel(adapter, &security)?;
    Ok(SdsService::new(KeyStore::new(Arc::new(IstioRelay::new(channel)))))
}

/// For one ordinary sidecar, from istiod itself.
fn of_workload(args: &Args) -> Result<SdsService, Box<dyn Error>> {
    let (Some(istiod), Some(root), Some(token), Some(identity)) =
        (&args.istiod, &args.root, &args.token, &args.identity)
    else {
        return Err("--istiod needs --root, --token and --identity".into());
    };
    let identity = Identity::parse(identity).ok_or_else(|| {
        format!("--identity: {identity:?} is no spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/ACCOUNT")
    })?;
    let security = Security::Tls {
        roots: program::read(root)?,
        name: ISTIOD.to_owned(),
        client: None,
    };
    let relay = TokenRelay::new(client::channel(istiod, &security)?, token.clone());
    Ok(SdsService::of_workload(KeyStore::new(Arc::new(relay)), identity))
}
