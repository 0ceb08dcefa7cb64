//! An adapter that remembers what it was told.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use dpumesh_xds::client::{
    self, Applied, Apply, Client, Counters, Credential, Protocol, Rejection, Security, Update,
};
use dpumesh_xds::discovery::{Node, ResourceType};
use dpumesh_xds::mesh::{Binding, Peer};
use prost::Message;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::cluster::{Controller, Credentials, PATIENCE};

#[derive(Debug, Clone, Default)]
pub(crate) struct Told {
    pub(crate) bindings: BTreeMap<String, Binding>,
    pub(crate) peers: BTreeMap<String, Peer>,
    pub(crate) lost: Option<String>,
    /// A binding that is not taken.
    pub(crate) refuse: Option<String>,
}

pub(crate) struct Adapter {
    told: watch::Receiver<Told>,
    teach: watch::Sender<Told>,
    task: AbortHandle,
}

impl Drop for Adapter {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Adapter {
    /// With the certificate of one node, claiming to be another's.
    pub(crate) fn connect(
        controller: &Controller,
        credentials: &Credentials,
        certificate: &str,
        claims: &str,
    ) -> Self {
        Self::connect_as(controller, credentials, &format!("adapter.{certificate}"), claims)
    }

    /// With a certificate of any DNS name.
    pub(crate) fn connect_as(
        controller: &Controller,
        credentials: &Credentials,
        name: &str,
        claims: &str,
    ) -> Self {
        Self::run(controller, credentials, Some(credentials.issue(name)), claims)
    }

    /// Without a certificate.
    pub(crate) fn connect_bare(controller: &Controller, credentials: &Credentials, claims: &str) -> Self {
        Self::run(controller, credentials, None, claims)
    }

    fn run(
        controller: &Controller,
        credentials: &Credentials,
        client: Option<(String, String)>,
        claims: &str,
    ) -> Self {
        let security = Security::Tls {
            roots: credentials.authority(),
            name: "controller.test".to_owned(),
            client,
        };
        let client = Client {
            channel: client::channel(&controller.listen, &security).unwrap(),
            node: Node {
                id: format!("adapter~{claims}"),
                ..Node::default()
            },
            credential: Credential::Connection,
            protocol: Protocol::Delta,
            wildcards: vec![ResourceType::Binding, ResourceType::Peer],
            counters: Arc::new(Counters::default()),
        };
        let (sender, told) = watch::channel(Told::default());
        let teach = sender.clone();
        let task = tokio::spawn(async move { client.run(&mut Notebook(sender)).await });
        Self {
            told,
            teach,
            task: task.abort_handle(),
        }
    }

    pub(crate) async fn until(&self, condition: impl FnMut(&Told) -> bool) {
        let mut told = self.told.clone();
        let waited = tokio::time::timeout(PATIENCE, told.wait_for(condition)).await;
        assert!(waited.is_ok(), "in vain; last told: {:#?}", self.told.borrow());
    }

    pub(crate) fn binding(&self, key: &str) -> Option<Binding> {
        self.told.borrow().bindings.get(key).cloned()
    }

    pub(crate) fn bindings(&self) -> BTreeMap<String, Binding> {
        self.told.borrow().bindings.clone()
    }

    pub(crate) fn peer(&self, node: &str) -> Option<Peer> {
        self.told.borrow().peers.get(node).cloned()
    }

    /// From now on it does not take this binding.
    pub(crate) fn refuse(&self, key: &str) {
        self.teach.send_modify(|told| told.refuse = Some(key.to_owned()));
    }

    pub(crate) fn lost(&self) -> Option<String> {
        self.told.borrow().lost.clone()
    }
}

struct Notebook(watch::Sender<Told>);

#[async_trait]
impl Apply for Notebook {
    async fn apply(&mut self, update: Update) -> Applied {
        let mut rejected = Vec::new();
        self.0.send_modify(|told| {
            for resource in &update.resources {
                let octets = resource
                    .resource
                    .as_ref()
                    .map(|any| any.value.as_slice())
                    .unwrap_or_default();
                let name = resource.name.clone();
                if told.refuse.as_ref() == Some(&name) {
                    let reason = format!("{name}: not to my taste");
                    rejected.push(Rejection { name, reason });
                    continue;
                }
                let read = match update.kind {
                    ResourceType::Binding => Binding::decode(octets)
                        .map(|binding| drop(told.bindings.insert(name.clone(), binding))),
                    ResourceType::Peer => {
                        Peer::decode(octets).map(|peer| drop(told.peers.insert(name.clone(), peer)))
                    }
                    _ => continue,
                };
                if let Err(error) = read {
                    rejected.push(Rejection {
                        name,
                        reason: error.to_string(),
                    });
                }
            }
            for name in &update.removed {
                match update.kind {
                    ResourceType::Binding => drop(told.bindings.remove(name)),
                    _ => drop(told.peers.remove(name)),
                }
            }
        });
        Applied {
            rejected,
            wanted: Vec::new(),
        }
    }

    fn lost(&mut self, reason: &str) {
        self.0.send_modify(|told| told.lost = Some(reason.to_owned()));
    }
}
