//! The program `istio-dpu-controller`: read the arguments, listen, watch, plan, tell; end on SIGTERM or SIGINT.

use std::future::Future;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::service::Routes;
use tonic::transport::{Certificate, Identity, Server, ServerTlsConfig};

use super::adapters::Adapters;
use super::https;
use super::manifests::{WebhookPlace, rbac, webhook_configuration};
use super::plan::{Finding, Plan, plan};
use super::status::{Seen, Status};
use super::watch::{Facts, watch};
use super::webhook;

/// Tells each node's adapter which pods are its own and where the other nodes are
#[derive(Debug, Clone, Parser)]
#[command(
    name = "istio-dpu-controller",
    version,
    after_help = "\
Examples:
  istio-dpu-controller --listen 0.0.0.0:15020 --tls-cert tls.crt --tls-key tls.key --tls-client-ca adapters.pem
      in the cluster, with its own account; without --webhook no labels are written
  istio-dpu-controller --kubeconfig admin.conf --listen 0.0.0.0:15020 --webhook 0.0.0.0:9443 --tls-cert …
      outside, with the admission webhook
  istio-dpu-controller --print-rbac | kubectl apply -f -
  istio-dpu-controller --print-webhook --webhook-ca ca.pem | kubectl apply -f -
      what it must be given first

An adapter is known by the DNS name adapter.NODE in its certificate. One line `ready` with the addresses goes to
standard output when everything was listed once. Any number of controllers may run at once: there is no leader."
)]
pub struct Args {
    /// Kubernetes client configuration; the pod's account or $KUBECONFIG by default
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Where adapters connect, with mutual TLS
    #[arg(long, value_name = "ADDR:PORT", default_value = "0.0.0.0:15020")]
    pub listen: SocketAddr,
    /// PEM certificate for adapters and for the API server
    #[arg(long, value_name = "FILE", required_unless_present_any = ["print_webhook", "print_rbac"])]
    pub tls_cert: Option<PathBuf>,
    /// Its key
    #[arg(long, value_name = "FILE", required_unless_present_any = ["print_webhook", "print_rbac"])]
    pub tls_key: Option<PathBuf>,
    /// PEM roots of the adapters' certificates
    #[arg(long, value_name = "FILE", required_unless_present_any = ["print_webhook", "print_rbac"])]
    pub tls_client_ca: Option<PathBuf>,
    /// Where the API server asks about new pods (HTTPS); nowhere by default
    #[arg(long, value_name = "ADDR:PORT")]
    pub webhook: Option<SocketAddr>,
    /// Where /healthz, /readyz, /metrics and /status are answered (HTTP)
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:15021")]
    pub status: SocketAddr,
    /// Trust domain of the mesh
    #[arg(long, value_name = "NAME", default_value = "cluster.local")]
    pub trust_domain: String,
    /// error, warn, info, debug or trace, or a filter such as dpumesh_xds=debug
    #[arg(short, long, value_name = "LEVEL", default_value = "info")]
    pub log_level: String,
    /// Print the role that it needs, and leave
    #[arg(long)]
    pub print_rbac: bool,
    /// Print the registration of the webhook, and leave
    #[arg(long, requires = "webhook_ca")]
    pub print_webhook: bool,
    /// PEM roots of --tls-cert, for --print-webhook
    #[arg(long, value_name = "FILE")]
    pub webhook_ca: Option<PathBuf>,
    /// Where the API server finds the webhook, for --print-webhook; the service istio-dpu-controller by default
    #[arg(long, value_name = "https://HOST:PORT")]
    pub webhook_url: Option<String>,
    /// Namespace of the controller, for what is printed
    #[arg(long, value_name = "NAME", default_value = "dpumesh-system")]
    pub namespace: String,
}

/// Why the controller did not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the command line.
    #[error("{}: {error}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// An address of the command line.
    #[error("--{option} {address}: {error}")]
    Listen {
        /// The option.
        option: &'static str,
        /// Its value.
        address: SocketAddr,
        /// Why.
        error: std::io::Error,
    },
    /// Client configuration of the API.
    #[error("Kubernetes: {0}")]
    Kubernetes(String),
    /// Certificates, or a listener that ended.
    #[error("{option}: {error}")]
    Server {
        /// The option.
        option: &'static str,
        /// Why.
        error: String,
    },
    /// Signals.
    #[error("signals cannot be waited for: {0}")]
    Signal(std::io::Error),
}

/// Runs the controller until SIGTERM or SIGINT, or prints what was asked for.
///
/// # Errors
/// It cannot start: a file, an address, a certificate or the API's client configuration. An API that is away is no error.
pub async fn run(args: &Args) -> Result<(), Error> {
    if args.print_rbac || args.print_webhook {
        return print(args);
    }
    let client = client(args).await?;
    let adapters = Arc::<Adapters>::default();
    let status = Status::new(Arc::clone(&adapters));

    let (listener, listen) = bind("listen", args.listen).await?;
    let service = Routes::new(adapters.service());
    let to_adapters = serve("--tls-cert", tls(args)?, service, listener);
    let (listener, at) = bind("status", args.status).await?;
    let pages = Routes::from(Arc::clone(&status).routes());
    let to_people = serve("--status", Server::builder(), pages, listener);
    let mut ready = format!("ready listen={listen} status={at}");
    let to_api: std::pin::Pin<Box<dyn Future<Output = Result<(), Error>>>> = match args.webhook {
        Some(address) => {
            let (listener, at) = bind("webhook", address).await?;
            ready.push_str(&format!(" webhook={at}"));
            let routes = Routes::from(webhook::routes());
            let (chain, key) = (
                required(&args.tls_cert, "--tls-cert")?,
                required(&args.tls_key, "--tls-key")?,
            );
            let option = "--webhook";
            let wrong = |error: String| Error::Server { option, error };
            let connections = https::incoming(listener, https::acceptor(&chain, &key).map_err(wrong)?);
            let serving = Server::builder().accept_http1(true).add_routes(routes);
            Box::pin(async move {
                let served = serving.serve_with_incoming(connections).await;
                served.map_err(|error| wrong(error.to_string()))
            })
        }
        None => Box::pin(std::future::pending()),
    };
    let (sender, facts) = watch::channel(Facts::default());
    let mut terminate = signal(SignalKind::terminate()).map_err(Error::Signal)?;
    tokio::select! {
        () = watch(client, sender) => {}
        () = tell(facts, &args.trust_domain, &adapters, &status, &ready) => {}
        ended = to_adapters => ended?,
        ended = to_people => ended?,
        ended = to_api => ended?,
        _ = terminate.recv() => {}
        _ = tokio::signal::ctrl_c() => {}
    }
    Ok(())
}

/// Facts to plans, plans to adapters.
async fn tell(
    mut facts: watch::Receiver<Facts>,
    trust_domain: &str,
    adapters: &Adapters,
    status: &Status,
    ready: &str,
) {
    let (mut plans, mut told) = (0, Vec::new());
    while facts.changed().await.is_ok() {
        let now = facts.borrow_and_update().clone();
        let mut findings = Vec::new();
        if now.is_whole() {
            let plan: Plan = plan(&now.world, trust_domain);
            adapters.publish(plan.nodes);
            findings = plan.findings;
            plans += 1;
        }
        name(&told, &findings);
        told.clone_from(&findings);
        status.see(Seen::new(&now, findings, plans));
        if plans == 1 {
            println!("{ready}");
        }
    }
}

/// Writes new findings to the log, and those that are gone.
fn name(told: &[Finding], findings: &[Finding]) {
    for Finding { object, reason } in findings.iter().filter(|finding| !told.contains(finding)) {
        tracing::warn!(object, reason, "look at this");
    }
    for Finding { object, reason } in told.iter().filter(|finding| !findings.contains(finding)) {
        tracing::info!(object, reason, "no longer");
    }
}

async fn client(args: &Args) -> Result<Client, Error> {
    let wrong = |error: &dyn std::error::Error| Error::Kubernetes(error.to_string());
    let mut config = match &args.kubeconfig {
        Some(path) => {
            let read = Kubeconfig::read_from(path).map_err(|error| wrong(&error))?;
            let options = KubeConfigOptions::default();
            Config::from_custom_kubeconfig(read, &options)
                .await
                .map_err(|error| wrong(&error))?
        }
        None => Config::infer().await.map_err(|error| wrong(&error))?,
    };
    config.connect_timeout = Some(Duration::from_secs(5));
    Client::try_from(config).map_err(|error| wrong(&error))
}

async fn bind(option: &'static str, address: SocketAddr) -> Result<(TcpListener, SocketAddr), Error> {
    let failed = |error| Error::Listen {
        option,
        address,
        error,
    };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let local = listener.local_addr().map_err(failed)?;
    Ok((listener, local))
}

async fn serve(
    option: &'static str,
    server: Server,
    routes: Routes,
    listener: TcpListener,
) -> Result<(), Error> {
    let mut server = server
        .accept_http1(true)
        .http2_keepalive_interval(Some(Duration::from_secs(30)));
    let served = server
        .add_routes(routes)
        .serve_with_incoming(TcpListenerStream::new(listener))
        .await;
    served.map_err(|error| Error::Server {
        option,
        error: error.to_string(),
    })
}

fn tls(args: &Args) -> Result<Server, Error> {
    let (chain, key) = (
        required(&args.tls_cert, "--tls-cert")?,
        required(&args.tls_key, "--tls-key")?,
    );
    let roots = required(&args.tls_client_ca, "--tls-client-ca")?;
    let config = ServerTlsConfig::new()
        .identity(Identity::from_pem(chain, key))
        .client_ca_root(Certificate::from_pem(roots));
    let server = Server::builder().tls_config(config);
    server.map_err(|error| Error::Server {
        option: "--tls-cert, --tls-key, --tls-client-ca",
        error: error.to_string(),
    })
}

fn required(path: &Option<PathBuf>, option: &'static str) -> Result<String, Error> {
    let error = || Error::Server {
        option,
        error: "is absent".to_owned(),
    };
    read(path.as_deref().ok_or_else(error)?)
}

fn read(path: &Path) -> Result<String, Error> {
    std::fs::read_to_string(path).map_err(|error| Error::File {
        path: path.to_owned(),
        error,
    })
}

fn print(args: &Args) -> Result<(), Error> {
    if args.print_rbac {
        print!("{}", rbac(&args.namespace));
    }
    if args.print_webhook {
        let authority = required(&args.webhook_ca, "--webhook-ca")?;
        let place = match &args.webhook_url {
            Some(url) => WebhookPlace::Url(url.clone()),
            None => WebhookPlace::Service {
                namespace: args.namespace.clone(),
                name: "istio-dpu-controller".to_owned(),
                port: 443,
            },
        };
        if args.print_rbac {
            println!("---");
        }
        print!("{}", webhook_configuration(&place, &args.namespace, &authority));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_says_what_it_lacks() {
        let parse = |line: &str| Args::try_parse_from(line.split_whitespace());
        let error = parse("istio-dpu-controller").unwrap_err().to_string();
        assert!(
            error.contains("--tls-cert") && error.contains("--tls-client-ca"),
            "{error}"
        );
        assert!(parse("istio-dpu-controller --print-rbac").is_ok());
        assert!(
            parse("istio-dpu-controller --print-webhook")
                .unwrap_err()
                .to_string()
                .contains("--webhook-ca")
        );
        let args = parse("istio-dpu-controller --tls-cert a --tls-key b --tls-client-ca c").unwrap();
        assert!(matches!(tls(&args), Err(Error::File { path, .. }) if path == Path::new("a")));
    }
}
