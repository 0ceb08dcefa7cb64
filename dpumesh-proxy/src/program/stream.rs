//! The aggregated stream: its client on the control thread's runtime, and the way of its updates to the control loop.
//!
//! An update is answered when the control loop has tried it, so that an acknowledgement says "in force".

use std::sync::Arc;

use async_trait::async_trait;
use dpumesh_xds::client::{self, Applied, Apply, Client, Credential, Update};
use dpumesh_xds::discovery::ResourceType;
use dpumesh_xds::keys::{IstioRelay, KeyStore};
use tokio::sync::{mpsc, oneshot};

use super::Shared;
use crate::config::ads::Server;
use crate::stats::{ControlPlane, Shard};
use crate::tls::store::Stored;

/// A change, and where its answer goes.
#[derive(Debug)]
pub(super) struct Arrived {
    pub(super) update: Update,
    pub(super) answer: oneshot::Sender<Applied>,
}

/// Opens the stream, and the key store over the same connection. Both end with the runtime.
pub(super) fn begin(shared: &Arc<Shared>, server: Server, stored: &Stored, updates: mpsc::Sender<Arrived>) {
    let channel = match client::channel(&server.address, &server.security) {
        Ok(channel) => channel,
        Err(error) => {
            tracing::error!(server = server.address, %error, "the aggregated stream cannot be opened");
            return;
        }
    };
    stored.open(KeyStore::new(Arc::new(IstioRelay::new(channel.clone()))));
    let client = Client {
        channel,
        node: server.node,
        credential: Credential::Connection,
        protocol: server.protocol,
        wildcards: vec![ResourceType::Cluster, ResourceType::Listener],
        counters: Arc::default(),
    };
    let mut link = Link {
        shared: Arc::clone(shared),
        updates,
    };
    tokio::task::spawn_local(async move { client.run(&mut link).await });
}

struct Link {
    shared: Arc<Shared>,
    updates: mpsc::Sender<Arrived>,
}

impl Link {
    fn connected(&self, state: u64) {
        let scope = self.shared.registry.scope("control_plane", ControlPlane::TABLE);
        scope.set(Shard::CONTROL, ControlPlane::Connected, state);
    }
}

#[async_trait]
impl Apply for Link {
    async fn apply(&mut self, update: Update) -> Applied {
        self.connected(1);
        let (answer, answered) = oneshot::channel();
        if self.updates.send(Arrived { update, answer }).await.is_err() {
            // The control loop drains: nothing is taken any more, and nobody waits for this answer.
            std::future::pending::<()>().await;
        }
        match answered.await {
            Ok(applied) => applied,
            Err(_) => std::future::pending().await,
        }
    }

    fn lost(&mut self, _: &str) {
        self.connected(0);
    }
}
