//! [`Adapters`]: one publisher for each node's adapter, and the service that finds out which one is asking.
//!
//! **Who an adapter is, its certificate says**: the DNS name `adapter.NODE` among its subject alternative names (RFC 5280 §4.2.1.6), checked against the
//! authority by the TLS handshake. The id in the first request, `adapter~NODE`, must agree; an adapter that claims another
//! node's is refused with both names, so the configuration of a node is seen by that node alone.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use serde::Serialize;
use tokio::sync::mpsc;
use tonic::Status;
use tonic::body::Body;
use tonic::server::NamedService;
use tonic::transport::server::{TcpConnectInfo, TlsConnectInfo};
use tower_service::Service;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::adapter_id;
use crate::discovery::SERVICE;
use crate::server::{AdsService, Event, Outcome, Publisher};
use crate::snapshot::Snapshot;

/// Every node's configuration and every adapter that ever asked.
///
/// An adapter that was here stays in memory when its node goes, some kilobytes each; its configuration is then empty.
#[derive(Debug, Default)]
pub struct Adapters {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Nothing was published yet: adapters wait.
    configs: Option<BTreeMap<String, Arc<Snapshot>>>,
    adapters: BTreeMap<String, Adapter>,
}

#[derive(Debug)]
struct Adapter {
    publisher: Publisher,
    told: Option<Arc<Snapshot>>,
    health: Arc<Mutex<Health>>,
}

/// How an adapter gets on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Health {
    /// Streams it has open.
    pub streams: usize,
    /// Resources it should have.
    pub resources: usize,
    /// Responses it took.
    pub acknowledged: u64,
    /// What it refused and has not taken since, by `TYPE NAME`.
    pub refused: BTreeMap<String, String>,
}

impl Adapters {
    /// Makes `configs` what the adapters should have. Those that have it already are told nothing.
    pub fn publish(&self, configs: BTreeMap<String, Snapshot>) {
        let mut state = self.state();
        let mut old = state.configs.take().unwrap_or_default();
        let configs = configs.into_iter().map(|(node, new)| match old.remove(&node) {
            Some(old) if *old == new => (node, old),
            _ => (node, Arc::new(new)),
        });
        state.configs = Some(configs.collect());
        let State { configs, adapters } = &mut *state;
        for (node, adapter) in adapters {
            adapter.tell(configs.as_ref().map(|configs| config_of(configs, node)));
        }
    }

    /// The gRPC service, for `tonic::transport::Server::add_service` behind TLS that asks for client certificates.
    pub fn service(self: &Arc<Self>) -> AdaptersService {
        AdaptersService(Arc::clone(self))
    }

    /// How each adapter that ever asked gets on, by node.
    pub fn health(&self) -> BTreeMap<String, Health> {
        let state = self.state();
        let health = state.adapters.iter().map(|(node, adapter)| {
            let resources = adapter.told.as_ref().map_or(0, |told| told.len());
            let health = adapter.health.lock().unwrap_or_else(PoisonError::into_inner);
            let streams = adapter.publisher.in_use();
            (
                node.clone(),
                Health {
                    streams,
                    resources,
                    ..health.clone()
                },
            )
        });
        health.collect()
    }

    fn service_of(&self, node: &str) -> AdsService {
        let mut state = self.state();
        let State { configs, adapters } = &mut *state;
        let adapter = adapters.entry(node.to_owned()).or_insert_with(Adapter::new);
        adapter.tell(configs.as_ref().map(|configs| config_of(configs, node)));
        adapter.publisher.service().only_for(adapter_id(node))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn config_of(configs: &BTreeMap<String, Arc<Snapshot>>, node: &str) -> Arc<Snapshot> {
    configs.get(node).map(Arc::clone).unwrap_or_default()
}

impl Adapter {
    fn new() -> Self {
        let (publisher, events) = Publisher::new();
        let health = Arc::<Mutex<Health>>::default();
        tokio::spawn(listen(events, Arc::clone(&health)));
        Self {
            publisher,
            told: None,
            health,
        }
    }

    fn tell(&mut self, config: Option<Arc<Snapshot>>) {
        if let Some(new) = &config
            && config != self.told
        {
            self.publisher.publish(Arc::clone(new));
            self.told = config;
        }
    }
}

/// Takes down what becomes of responses.
async fn listen(mut events: mpsc::Receiver<Event>, health: Arc<Mutex<Health>>) {
    while let Some(Event {
        node,
        kind,
        names,
        outcome,
        ..
    }) = events.recv().await
    {
        let mut health = health.lock().unwrap_or_else(PoisonError::into_inner);
        match outcome {
            Outcome::Ack => {
                health.acknowledged += 1;
                for name in &names {
                    health.refused.remove(&format!("{kind} {name}"));
                }
                tracing::debug!(node, %kind, names = names.join(", "), "acknowledged");
            }
            Outcome::Nack(reason) => {
                tracing::warn!(node, %kind, names = names.join(", "), reason, "refused by the adapter");
                let refused = names
                    .iter()
                    .map(|name| (format!("{kind} {name}"), reason.clone()));
                health.refused.extend(refused);
            }
            Outcome::Refused => tracing::warn!(node, %kind, names = names.join(", "), "never served"),
            Outcome::InStep => {}
            Outcome::Gone => tracing::info!(node, "adapter is gone"),
        }
    }
}

/// Serves each adapter its own node's configuration.
#[derive(Debug, Clone)]
pub struct AdaptersService(Arc<Adapters>);

impl NamedService for AdaptersService {
    const NAME: &'static str = SERVICE;
}

impl Service<http::Request<Body>> for AdaptersService {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<http::Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let node = asking(&request);
        let adapters = Arc::clone(&self.0);
        Box::pin(async move {
            match node {
                Ok(node) => {
                    tracing::info!(node, "adapter asks");
                    adapters.service_of(&node).call(request).await
                }
                Err(reason) => {
                    tracing::warn!(reason, "adapter refused");
                    Ok(Status::permission_denied(reason).into_http())
                }
            }
        })
    }
}

/// The node whose adapter made this request.
fn asking(request: &http::Request<Body>) -> Result<String, String> {
    let connection = request.extensions().get::<TlsConnectInfo<TcpConnectInfo>>();
    let chain = connection.and_then(TlsConnectInfo::peer_certs);
    let chain = chain.ok_or("no client certificate: it names the node")?;
    let leaf = chain.first().ok_or("an empty client certificate")?;
    node_of(leaf.as_ref())
}

/// The node that an adapter's certificate (DER) is for.
fn node_of(certificate: &[u8]) -> Result<String, String> {
    let (_, certificate) =
        X509Certificate::from_der(certificate).map_err(|error| format!("client certificate: {error}"))?;
    let names = certificate
        .subject_alternative_name()
        .map_err(|error| format!("client certificate: subject alternative names: {error}"))?;
    let names = names
        .map(|names| names.value.general_names.as_slice())
        .unwrap_or_default();
    let dns = names.iter().filter_map(|name| match name {
        GeneralName::DNSName(name) => Some(*name),
        _ => None,
    });
    let nodes: Vec<&str> = dns.filter_map(|name| name.strip_prefix("adapter.")).collect();
    match nodes.as_slice() {
        [node] if !node.is_empty() => Ok((*node).to_owned()),
        [] | [_] => Err("client certificate: no DNS name adapter.NODE".to_owned()),
        several => Err(format!(
            "client certificate: of several nodes: {}",
            several.join(", ")
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn certificate(names: &[&str]) -> Vec<u8> {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        rcgen::generate_simple_self_signed(names)
            .unwrap()
            .cert
            .der()
            .to_vec()
    }

    #[test]
    fn a_certificate_names_one_node() {
        assert_eq!(
            node_of(&certificate(&["adapter.n1.example.org"])).unwrap(),
            "n1.example.org"
        );
        assert_eq!(node_of(&certificate(&["other", "adapter.n1"])).unwrap(), "n1");
        for (names, reason) in [
            (&["n1"][..], "no DNS name adapter.NODE"),
            (&[], "no DNS name adapter.NODE"),
            (&["192.0.2.1"], "no DNS name adapter.NODE"),
            (&["adapter.n1", "adapter.n2"], "of several nodes: n1, n2"),
        ] {
            let error = node_of(&certificate(names)).unwrap_err();
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn no_cut_certificate_names_a_node() {
        let whole = certificate(&["adapter.n1"]);
        for length in 0..whole.len() {
            assert!(node_of(&whole[..length]).is_err(), "{length}");
        }
    }

    #[tokio::test]
    async fn a_node_that_goes_leaves_its_adapter_with_nothing() {
        let adapters = Arc::new(Adapters::default());
        let mut snapshot = Snapshot::default();
        snapshot.insert(crate::discovery::ResourceType::Binding, "a/b", Vec::new());
        adapters.service_of("n1");
        assert_eq!(adapters.health()["n1"].resources, 0);
        assert_eq!(
            adapters.state().adapters["n1"].told,
            None,
            "it waits for the first list"
        );
        adapters.publish([("n1".to_owned(), snapshot)].into());
        assert_eq!(adapters.health()["n1"].resources, 1);
        adapters.publish(BTreeMap::new());
        assert_eq!(adapters.health()["n1"].resources, 0);
        assert!(adapters.state().adapters["n1"].told.is_some());
    }
}
