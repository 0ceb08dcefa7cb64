//! `istio-dpu-adapter`: many pods' configuration from istiod, one configuration for the node's shared proxy.

use std::error::Error;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Parser, ValueEnum};
use dpumesh_xds::adapter::{self, Mesh, PodEntry};
use dpumesh_xds::aggregate::{Interception, Options};
use dpumesh_xds::client::{self, Counters, Security};
use dpumesh_xds::server::{Event, Outcome, Publisher};
use tonic::transport::{Certificate, Identity, Server, ServerTlsConfig};

/// Speaks xDS to istiod for every pod of a list, and to the node's shared proxy for all of them.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// istiod, host:port (15012 with TLS, 15010 without)
    #[arg(long)]
    istiod: String,
    /// JSON list of {"ip", "name", "namespace", "service_account", "token": FILE}
    #[arg(long)]
    pods: PathBuf,
    /// Where the shared proxy connects
    #[arg(long)]
    listen: SocketAddr,
    /// PEM roots of istiod's certificate; without them the connection is in clear text
    #[arg(long)]
    istiod_root: Option<PathBuf>,
    /// The name in istiod's certificate
    #[arg(long, default_value = "istiod.istio-system.svc")]
    istiod_name: String,
    /// PEM client certificate for istiod: all pods of the list are then of its account, and need no token
    #[arg(long, requires_all = ["client_key", "istiod_root"])]
    client_cert: Option<PathBuf>,
    /// Its key
    #[arg(long, requires = "client_cert")]
    client_key: Option<PathBuf>,
    /// PEM certificate for the shared proxy
    #[arg(long, requires_all = ["tls_key", "tls_client_ca"])]
    tls_cert: Option<PathBuf>,
    /// Its key
    #[arg(long)]
    tls_key: Option<PathBuf>,
    /// PEM roots of the shared proxy's certificate
    #[arg(long)]
    tls_client_ca: Option<PathBuf>,
    /// Address of the shared listener for what leaves pods
    #[arg(long, default_value = "0.0.0.0:15001")]
    outbound: SocketAddr,
    /// Address of the shared listener for what comes to pods
    #[arg(long, default_value = "0.0.0.0:15006")]
    inbound: SocketAddr,
    /// How connections reach the shared proxy
    #[arg(long, value_enum, default_value = "transparent")]
    interception: How,
    /// Trust domain of the mesh
    #[arg(long, default_value = "cluster.local")]
    trust_domain: String,
    /// This cluster's name in istiod
    #[arg(long, default_value = "Kubernetes")]
    cluster_id: String,
    /// The Istio version whose configuration is asked for
    #[arg(long, default_value = "1.29.2")]
    istio_version: String,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum How {
    Transparent,
    Redirect,
    ProxyProtocol,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into()),
        )
        .with_writer(std::io::stderr)
        .init();
    let arguments = Arguments::parse();
    let pods: Vec<PodEntry> = serde_json::from_str(&read(&arguments.pods)?)
        .map_err(|error| format!("{}: {error}", arguments.pods.display()))?;
    let channel = client::channel(&arguments.istiod, &security(&arguments)?)?;
    let mesh = Mesh {
        trust_domain: arguments.trust_domain.clone(),
        cluster_id: arguments.cluster_id.clone(),
        istio_version: arguments.istio_version.clone(),
    };
    let options = Options {
        outbound: arguments.outbound,
        inbound: arguments.inbound,
        interception: match arguments.interception {
            How::Transparent => Interception::Transparent,
            How::Redirect => Interception::Redirect,
            How::ProxyProtocol => Interception::ProxyProtocol,
        },
    };
    let (publisher, mut events) = Publisher::new();
    let server = server(&arguments)?
        .add_service(publisher.service())
        .serve(arguments.listen);
    let tell = async {
        while let Some(event) = events.recv().await {
            report(&event);
        }
    };
    tokio::select! {
        served = server => served?,
        () = adapter::run(channel, &mesh, &pods, options, &publisher, Arc::new(Counters::default())) => {}
        () = tell => {}
        stop = tokio::signal::ctrl_c() => stop?,
    }
    Ok(())
}

fn report(event: &Event) {
    let (node, kind, names) = (&event.node, event.kind, event.names.join(", "));
    match &event.outcome {
        Outcome::Ack => tracing::info!(node, %kind, count = event.names.len(), "acknowledged"),
        Outcome::Nack(reason) => tracing::warn!(node, %kind, names, reason, "refused by the proxy"),
        Outcome::Refused => tracing::warn!(node, %kind, names, "never served"),
        Outcome::Gone => tracing::info!(node, "proxy is gone"),
    }
}

fn read(path: &Path) -> Result<String, String> {
    std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))
}

fn security(arguments: &Arguments) -> Result<Security, String> {
    let Some(roots) = &arguments.istiod_root else {
        return Ok(Security::Plaintext);
    };
    let client = match (&arguments.client_cert, &arguments.client_key) {
        (Some(chain), Some(key)) => Some((read(chain)?, read(key)?)),
        _ => None,
    };
    Ok(Security::Tls {
        roots: read(roots)?,
        name: arguments.istiod_name.clone(),
        client,
    })
}

fn server(arguments: &Arguments) -> Result<Server, Box<dyn Error>> {
    let server = Server::builder().http2_keepalive_interval(Some(std::time::Duration::from_secs(30)));
    let (Some(chain), Some(key), Some(roots)) =
        (&arguments.tls_cert, &arguments.tls_key, &arguments.tls_client_ca)
    else {
        if !arguments.listen.ip().is_loopback() {
            return Err("--listen beyond loopback needs --tls-cert, --tls-key and --tls-client-ca".into());
        }
        return Ok(server);
    };
    let mut server = server.tls_config(
        ServerTlsConfig::new()
            .identity(Identity::from_pem(read(chain)?, read(key)?))
            .client_ca_root(Certificate::from_pem(read(roots)?)),
    )?;
    server = server.tcp_nodelay(true);
    Ok(server)
}
