//! `dpu-keys`: keys of workloads for an Envoy on the SoC. See `dpu-keys --help`.

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{CommandFactory as _, Parser};
use dpumesh_xds::client::{self, Security};
use dpumesh_xds::keys::sds::SdsService;
use dpumesh_xds::keys::{IstioRelay, KeyStore};
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
its name is the one that istiod writes, `sds-grpc`."
)]
struct Args {
    /// The adapter, host:port
    #[arg(long, value_name = "ADDRESS", required_unless_present = "completions")]
    adapter: Option<String>,
    /// PEM roots of the adapter's certificate; without them the connection is in clear text
    #[arg(long, value_name = "FILE", requires_all = ["name", "cert", "key"])]
    root: Option<PathBuf>,
    /// The name in the adapter's certificate
    #[arg(long)]
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

async fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    let (Some(adapter), Some(sds)) = (&args.adapter, &args.sds) else {
        return Err("--adapter and --sds are needed".into());
    };
    let security = match (&args.root, &args.name, &args.cert, &args.key) {
        (Some(root), Some(name), Some(cert), Some(key)) => Security::Tls {
            roots: program::read(root)?,
            name: name.clone(),
            client: Some((program::read(cert)?, program::read(key)?)),
        },
        _ => Security::Plaintext,
    };
    let channel = client::channel(adapter, &security)?;
    let store = KeyStore::new(Arc::new(IstioRelay::new(channel)));
    let incoming = socket::bind(sds).map_err(|error| format!("{}: {error}", sds.display()))?;
    tracing::info!(socket = %sds.display(), adapter, "serving secrets");
    tokio::select! {
        served = Server::builder().add_service(SdsService::new(store)).serve_with_incoming(incoming) => served?,
        () = program::ended() => {}
    }
    let _ = std::fs::remove_file(sds);
    Ok(())
}
