//! [`Node`]: attach, bind, detach, check, collect: one attachment at a time, many attachments at once.

use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::path::Path;
use std::sync::{Arc, Mutex as SyncMutex, MutexGuard as SyncGuard, PoisonError};
use std::time::Duration;

use dpumesh_core::vf::{
    Attachment as VfPlace, Released, ResetLevel, VfConfig, VfLease, VfLocation, VfRequest, VfSelector,
    VfState,
};
use dpumesh_core::{Backend, BackendExt, ErrorKind, PciAddress, PortRef, Retry};
use tokio::sync::{Mutex, OwnedMutexGuard, watch};

use super::dataplane::{Link, Target, Unopened, attachment};
use super::governor::{GovernedPod, Governor};
use super::journal::{Journal, JournalError, Record, Stage, inode};
use super::peers::{LocalNetwork, Peers};
use crate::protocol::{Error, ValidAttachment, code};
use crate::rules::{Pod, ingress};
use crate::talk::{Answer, Ask, Attach, Attached, AttachmentKey};

/// How a node does its work.
#[derive(Clone, Debug)]
pub struct NodeOptions {
    /// How other nodes reach it.
    pub network: LocalNetwork,
    /// Longest wait of an ADD for the pod's program.
    pub govern_within: Duration,
    /// What an ADD ends with when the wait was in vain.
    pub ungoverned: Ungoverned,
    /// Longest wait of an ADD or DEL for the dataplane.
    pub dataplane_within: Duration,
}

/// What an ADD ends with when the pod's program is not acknowledged in time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "agent", derive(clap::ValueEnum))]
pub enum Ungoverned {
    /// Error 11, everything undone: the runtime tries again.
    #[default]
    Refuse,
    /// Success: the pod runs, and nothing passes its port until the program is acknowledged.
    Closed,
}

/// The attachments of one card, and everything that they need.
#[derive(Debug)]
pub struct Node {
    card: Arc<dyn Backend>,
    governor: Arc<dyn Governor>,
    options: NodeOptions,
    journal: SyncMutex<Journal>,
    peers: SyncMutex<Peers>,
    link: Mutex<Link>,
    busy: SyncMutex<HashMap<AttachmentKey, Arc<Mutex<()>>>>,
}

/// Name of a lease: ours by its beginning.
const OWNER: &str = "cni/";

impl Node {
    /// A node on a card's host side, with what an earlier agent left in the journal. It does nothing yet:
    /// [`Node::recover`] comes first.
    pub fn new(
        card: Arc<dyn Backend>,
        governor: Arc<dyn Governor>,
        journal: Journal,
        peers: Peers,
        options: NodeOptions,
    ) -> Self {
        Self {
            card,
            governor,
            options,
            journal: SyncMutex::new(journal),
            peers: SyncMutex::new(peers),
            link: Mutex::new(Link::default()),
            busy: SyncMutex::default(),
        }
    }

    /// How it does its work.
    pub fn options(&self) -> &NodeOptions {
        &self.options
    }

    pub(super) fn link(&self) -> &Mutex<Link> {
        &self.link
    }

    pub(super) fn card(&self) -> &dyn Backend {
        self.card.as_ref()
    }

    /// The journal. Held for as long as a small file takes to write; never across an await.
    pub(super) fn journal(&self) -> SyncGuard<'_, Journal> {
        self.journal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn record(&self, key: &AttachmentKey) -> Option<Record> {
        self.journal().get(key).cloned()
    }

    /// Every attachment, as it is written down.
    pub fn records(&self) -> Vec<Record> {
        self.journal().records().cloned().collect()
    }

    /// Exchanges what is known of other nodes.
    pub async fn set_peers(&self, peers: Peers) {
        *self.peers.lock().unwrap_or_else(PoisonError::into_inner) = peers;
        if let Err(error) = self.reconcile().await {
            tracing::warn!("the dataplane learns of the peers later: {error}");
        }
    }

    /// Carries out what a plugin asks. `gone` becomes true when the plugin has ended the conversation: nobody waits any more.
    pub async fn handle(self: &Arc<Self>, ask: Ask, gone: watch::Receiver<bool>) -> Answer {
        let answer = match ask {
            Ask::Attach(ask) => self.attach(&ask).await.map(Answer::Attached),
            Ask::Bind { key, addresses } => {
                let bound = self.bind(&key, addresses, gone).await;
                bound.map(|governed| Answer::Bound { governed })
            }
            Ask::Detach { key } => self.detach(&key).await.map(|()| Answer::Done),
            Ask::Check {
                key,
                netns,
                addresses,
            } => self.check(&key, &netns, &addresses).await.map(|()| Answer::Done),
            Ask::Status => self.status().await.map(|()| Answer::Done),
            Ask::Collect { network, valid } => self.collect(&network, &valid).await.map(|()| Answer::Done),
        };
        answer.unwrap_or_else(Answer::Refused)
    }

    /// The right to work on one attachment.
    pub(super) async fn hold(&self, key: &AttachmentKey) -> OwnedMutexGuard<()> {
        let lock = {
            let mut busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
            busy.retain(|_, lock| Arc::strong_count(lock) > 1);
            Arc::clone(busy.entry(key.clone()).or_default())
        };
        lock.lock_owned().await
    }
}

/// Attach and bind: an ADD.
impl Node {
    async fn attach(&self, ask: &Attach) -> Result<Attached, Error> {
        let _held = self.hold(&ask.key).await;
        match self.record(&ask.key).map(|record| record.stage) {
            None => {}
            Some(Stage::Closing { .. }) => self.close(&ask.key).await?,
            Some(_) => {
                let message = format!("{} is attached already", ask.key);
                return Err(Error::new(code::AGENT, message).details("DEL it first"));
            }
        }
        if self.record(&ask.key).is_some() {
            let message = format!("the last attachment of {} is not closed yet", ask.key);
            return Err(Error::new(code::TRY_AGAIN, message));
        }
        self.dataplane_there().await?;
        let inode = inode(&ask.netns).map_err(|error| {
            let message = format!("{}: {error}", ask.netns.display());
            Error::new(code::UNKNOWN_CONTAINER, message)
                .details("the agent must see the runtime's namespaces: mount /run/netns and /proc into it")
        })?;
        let record = Record {
            key: ask.key.clone(),
            network: ask.network.clone(),
            netns: ask.netns.clone(),
            netns_inode: inode,
            pod: ask.pod.clone(),
            stage: Stage::Begun,
            lease: None,
            mac: None,
            mtu: None,
            addresses: Vec::new(),
        };
        self.write(record.clone())?;
        match self.place(record, ask).await {
            Ok(attached) => Ok(attached),
            Err(error) => Err(self.close_after(&ask.key, error).await),
        }
    }

    /// Leases a VF and moves it into the pod, each written down.
    async fn place(&self, mut record: Record, ask: &Attach) -> Result<Attached, Error> {
        let vf = self.card.require_vf().map_err(|error| refused(&error))?;
        let config = VfConfig {
            mac: ask.mac,
            mtu: ask.mtu,
            ..VfConfig::default()
        };
        let mut request = VfRequest::new(owner(&ask.key)).with_config(config);
        request.selector = VfSelector {
            pci: ask.device,
            ..VfSelector::default()
        };
        let fence = self.card.fence();
        let lease = vf.lease(fence, &request).await.map_err(|error| refused(&error))?;
        record.lease = Some(lease.clone());
        self.write(record.clone())?;
        let place = VfPlace::Netns {
            path: ask.netns.clone(),
            ifname: ask.key.ifname.clone(),
        };
        let attached = vf
            .attach(fence, &lease, &place)
            .await
            .map_err(|error| refused(&error))?;
        record.mac = Some(attached.mac);
        record.mtu = Some(attached.mtu);
        record.stage = Stage::Attached;
        self.write(record)?;
        tracing::info!(key = %ask.key, pod = %ask.pod, port = %lease.port, mac = %attached.mac, "attached");
        Ok(Attached {
            dpu: lease.dpu.clone(),
            port: lease.port,
            pci: self.pci_of(lease.port).await,
            mac: attached.mac,
            mtu: attached.mtu,
        })
    }

    async fn pci_of(&self, port: PortRef) -> Option<PciAddress> {
        let states = self.card.vf()?.list().await.ok()?;
        states.into_iter().find(|state| state.port == port)?.pci
    }

    /// Opens the port and waits until the pod is governed. On an error the plugin, or the end of its connection, detaches.
    async fn bind(
        self: &Arc<Self>,
        key: &AttachmentKey,
        addresses: Vec<IpAddr>,
        gone: watch::Receiver<bool>,
    ) -> Result<bool, Error> {
        let _held = self.hold(key).await;
        let Some(mut record) = self.record(key).filter(|record| record.stage == Stage::Attached) else {
            let message = format!("{key} is not attached, or bound already");
            return Err(Error::new(code::TRY_AGAIN, message).details("DEL it, then ADD it again"));
        };
        if addresses.is_empty() {
            return Err(Error::new(code::CONFIG, "a pod needs at least one address"));
        }
        if let Some(address) = addresses.iter().find(|address| !is_pods(**address)) {
            let message = format!("{address} cannot be a pod's address");
            return Err(Error::new(code::CONFIG, message).details("IPAM must give unicast addresses"));
        }
        if let Some((address, other)) = self.taken(key, &addresses) {
            let message = format!("{address} is {other}'s already");
            return Err(
                Error::new(code::AGENT, message).details("IPAM gave one address to two pods of this node")
            );
        }
        record.addresses = addresses;
        record.stage = Stage::Bound { governed: false };
        self.write(record.clone())?;
        self.told(key).await?;
        match self.wait_governed(&record, gone).await {
            Ok(()) => self.open_rules(key).await.map(|()| true),
            Err(error) if self.options.ungoverned == Ungoverned::Refuse => Err(error),
            Err(error) => {
                tracing::warn!(%key, "closed: {error}");
                self.govern_later(record);
                Ok(false)
            }
        }
    }

    fn taken(&self, key: &AttachmentKey, addresses: &[IpAddr]) -> Option<(IpAddr, AttachmentKey)> {
        let journal = self.journal();
        let others = journal.records().filter(|other| other.key != *key);
        let bound = others.filter(|other| matches!(other.stage, Stage::Bound { .. }));
        bound
            .flat_map(|other| {
                other
                    .addresses
                    .iter()
                    .map(move |address| (*address, other.key.clone()))
            })
            .find(|(address, _)| addresses.contains(address))
    }

    async fn wait_governed(&self, record: &Record, mut gone: watch::Receiver<bool>) -> Result<(), Error> {
        let pod = self.governed_pod(record);
        let within = self.options.govern_within;
        let left = async {
            // The sender lives as long as the conversation; one that is dropped is a conversation that ended.
            let _ = gone.wait_for(|gone| *gone).await;
        };
        tokio::select! {
            governed = self.governor.governed(&pod) => governed.map_err(|error| {
                Error::new(code::AGENT, format!("{} will not be governed: {error}", record.pod))
            }),
            () = tokio::time::sleep(within) => {
                let message = format!("the program of {} was not acknowledged within {within:?}", record.pod);
                Err(Error::new(code::TRY_AGAIN, message)
                    .details("is the adapter connected to istiod and to the proxy? --govern-within sets the bound"))
            }
            () = left => Err(Error::new(code::TRY_AGAIN, "the plugin has gone")),
        }
    }

    /// Writes a pod down as governed and installs its rules. While the dataplane is away they wait for its return.
    async fn open_rules(&self, key: &AttachmentKey) -> Result<(), Error> {
        self.set_governed(key, true)?;
        match self.told(key).await {
            Err(error) if error.code != code::TRY_AGAIN => {
                self.set_governed(key, false)?;
                return Err(error);
            }
            told => told?,
        }
        tracing::info!(%key, "governed");
        Ok(())
    }

    fn set_governed(&self, key: &AttachmentKey, governed: bool) -> Result<(), Error> {
        match self.record(key) {
            Some(mut record) if matches!(record.stage, Stage::Bound { .. }) => {
                record.stage = Stage::Bound { governed };
                self.write(record)
            }
            _ => Err(Error::new(code::TRY_AGAIN, format!("{key} went away meanwhile"))),
        }
    }

    /// Waits for a pod's program behind the ADD that succeeded without it.
    pub(super) fn govern_later(self: &Arc<Self>, record: Record) {
        let node = Arc::clone(self);
        tokio::spawn(async move {
            let pod = node.governed_pod(&record);
            match node.governor.governed(&pod).await {
                Ok(()) => {
                    let _held = node.hold(&record.key).await;
                    // The same container's next attachment has another lease.
                    let same = node
                        .record(&record.key)
                        .is_some_and(|now| now.lease == record.lease);
                    if same && let Err(error) = node.open_rules(&record.key).await {
                        tracing::error!(key = %record.key, "governed, but closed: {error}");
                    }
                }
                Err(error) => tracing::error!(key = %record.key, "stays closed for good: {error}"),
            }
        });
    }

    /// Tells the governor of a pod that was governed before the agent restarted.
    pub(super) async fn resume(&self, record: &Record) {
        self.governor.resume(&self.governed_pod(record)).await;
    }

    pub(super) fn governed_pod(&self, record: &Record) -> GovernedPod {
        let dpu = record.lease.as_ref().map(|lease| lease.dpu.clone());
        let dpu = dpu.unwrap_or_else(|| self.card.info().dpu);
        let number = pod_of(record).map_or(0, |pod| ingress(&pod));
        GovernedPod::new(dpu, record.pod.clone(), record.addresses.clone(), number)
    }
}

/// Detach: a DEL, or an ADD that failed.
impl Node {
    /// Takes an attachment away. One that is not there is no error.
    ///
    /// # Errors
    /// The VF could not be taken out of the pod, or nothing could be written down.
    pub async fn detach(&self, key: &AttachmentKey) -> Result<(), Error> {
        let _held = self.hold(key).await;
        self.close(key).await
    }

    async fn close_after(&self, key: &AttachmentKey, error: Error) -> Error {
        match self.close(key).await {
            Ok(()) => error,
            Err(failed) => error.details(format_args!("undoing: {failed}")),
        }
    }

    /// Closes as far as can be now; the rest is done when the dataplane is back. The caller holds the attachment.
    pub(super) async fn close(&self, key: &AttachmentKey) -> Result<(), Error> {
        let Some(mut record) = self.record(key) else {
            return Ok(());
        };
        let admitted = record.is_admitted();
        record.stage = Stage::Closing { admitted };
        if record.lease.is_none() {
            // The agent died between leasing and writing it down.
            record.lease = self.lease_of(key).await?;
        }
        self.write(record.clone())?;
        let Some(lease) = &record.lease else {
            return self.forget(&record).await;
        };
        let vf = self.card.require_vf().map_err(|error| refused(&error))?;
        match vf.detach(self.card.fence(), lease).await {
            Ok(()) => {}
            Err(error) if error.kind == ErrorKind::Stale => {} // the lease went with the card's last life
            Err(error) => return Err(refused(&error)),
        }
        if let Err(error) = self.finish(&record).await {
            tracing::warn!(%key, "closed for the pod, the VF is freed later: {error}");
        }
        Ok(())
    }

    /// The second half of closing: the port in the dataplane, then the lease.
    pub(super) async fn finish(&self, record: &Record) -> Result<(), Error> {
        let Some(lease) = &record.lease else {
            return self.forget(record).await;
        };
        if record.is_admitted() {
            self.reconcile_within().await?;
        }
        let vf = self.card.require_vf().map_err(|error| refused(&error))?;
        let released = vf.release(self.card.fence(), lease, ResetLevel::Config).await;
        let released = released.map_err(|error| refused(&error))?;
        if released == Released::NotCurrent {
            tracing::warn!(key = %record.key, "its lease had ended before");
        }
        self.forget(record).await
    }

    async fn forget(&self, record: &Record) -> Result<(), Error> {
        self.journal()
            .remove(&record.key)
            .map_err(|error| unwritten(&error))?;
        self.governor.forget(&self.governed_pod(record)).await;
        tracing::info!(key = %record.key, pod = %record.pod, "detached");
        Ok(())
    }

    async fn lease_of(&self, key: &AttachmentKey) -> Result<Option<VfLease>, Error> {
        let vf = self.card.require_vf().map_err(|error| refused(&error))?;
        let states = vf.list().await.map_err(|error| refused(&error))?;
        let mut leases = states.into_iter().filter_map(|state| state.lease);
        Ok(leases.find(|lease| lease.owner.0 == owner(key)))
    }
}

/// Questions: CHECK, STATUS, GC.
impl Node {
    async fn check(&self, key: &AttachmentKey, netns: &Path, addresses: &[IpAddr]) -> Result<(), Error> {
        let changed =
            |message: String| Err(Error::new(code::CHANGED, message).details("DEL it, then ADD it again"));
        let Some(record) = self.record(key) else {
            return changed(format!("{key} is not attached"));
        };
        let (Stage::Bound { .. }, Some(lease)) = (record.stage, &record.lease) else {
            return changed(format!("{key} is not bound"));
        };
        let here = inode(netns).is_ok_and(|inode| inode == record.netns_inode);
        if !here {
            return changed(format!(
                "{key} was attached to another namespace, {}",
                record.netns.display()
            ));
        }
        if addresses
            .iter()
            .any(|address| !record.addresses.contains(address))
        {
            return changed(format!(
                "{key} was bound to {:?}, not {addresses:?}",
                record.addresses
            ));
        }
        let states = self.vfs().await?;
        let state = states.iter().find(|state| state.lease.as_ref() == Some(lease));
        if !state.is_some_and(|state| matches!(state.location, VfLocation::Netns { .. })) {
            return changed(format!("{} is not in the pod any more", lease.port));
        }
        self.dataplane_there().await?;
        if !self.link.lock().await.is_open(lease.id) {
            return Err(Error::new(
                code::TRY_AGAIN,
                format!("{} is not open in the dataplane yet", lease.port),
            ));
        }
        Ok(())
    }

    async fn status(&self) -> Result<(), Error> {
        self.dataplane_there().await?;
        let states = self.vfs().await?;
        if states.iter().all(|state| state.lease.is_some()) {
            let message = format!("all {} VFs of the card are leased", states.len());
            return Err(Error::new(code::NOT_AVAILABLE, message).details("--vfs sets their number"));
        }
        Ok(())
    }

    async fn collect(&self, network: &str, valid: &[ValidAttachment]) -> Result<(), Error> {
        let is_valid = |key: &AttachmentKey| {
            valid
                .iter()
                .any(|valid| valid.container == key.container && valid.ifname == key.ifname)
        };
        let mut failures = Vec::new();
        for record in self.records() {
            if record.network != network || is_valid(&record.key) {
                continue;
            }
            tracing::info!(key = %record.key, "collected: the runtime does not know it");
            failures.extend(self.detach(&record.key).await.err());
        }
        failures
            .into_iter()
            .reduce(|all, error| all.details(error))
            .map_or(Ok(()), Err)
    }

    async fn vfs(&self) -> Result<Vec<VfState>, Error> {
        let vf = self.card.require_vf().map_err(|error| refused(&error))?;
        vf.list().await.map_err(|error| refused(&error))
    }
}

/// What follows for the dataplane.
impl Node {
    /// Makes the dataplane what journal and peers say. Returns the ports that could not be opened.
    ///
    /// # Errors
    /// It is away, or refuses the rules as a whole.
    pub async fn reconcile(&self) -> dpumesh_core::Result<Unopened> {
        let mut link = self.link.lock().await;
        // Read under the link's lock: what is told last is what was written last.
        let target = self.target();
        link.reconcile(&target).await
    }

    /// Reconciles when something is open: a new life of the dataplane, something that failed before.
    pub(super) async fn catch_up(&self) {
        let complete = self.link.lock().await.is_complete();
        let closing: Vec<Record> = {
            let journal = self.journal();
            let closing = journal
                .records()
                .filter(|record| matches!(record.stage, Stage::Closing { .. }));
            closing.cloned().collect()
        };
        if !complete {
            match self.reconcile().await {
                Ok(unopened) => {
                    for (key, error) in unopened {
                        tracing::error!(%key, "stays closed: {error}");
                    }
                }
                Err(error) => tracing::warn!("the dataplane is not what it shall be: {error}"),
            }
        }
        for record in closing {
            let _held = self.hold(&record.key).await;
            let Some(record) = self.record(&record.key).filter(|now| now.stage == record.stage) else {
                continue;
            };
            if let Err(error) = self.finish(&record).await {
                tracing::warn!(key = %record.key, "its VF is freed later: {error}");
            }
        }
    }

    fn target(&self) -> Target {
        let mut target = Target::default();
        let mut local = Vec::new();
        for record in self.journal().records() {
            let Some(lease) = &record.lease else { continue };
            match record.stage {
                Stage::Closing { admitted: true } => target.closing.push(lease.clone()),
                Stage::Bound { governed } => {
                    let Some(pod) = pod_of(record) else { continue };
                    local.extend(&pod.addresses);
                    target.open.push((record.key.clone(), attachment(lease, &pod)));
                    if governed {
                        target.ruled.push((Some(record.key.clone()), pod));
                    }
                }
                _ => {}
            }
        }
        let peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        let (network, pods, prefixes) = peers.network(&self.options.network, &local);
        target.ruled.extend(pods.into_iter().map(|pod| (None, pod)));
        target.prefixes = prefixes;
        target.network = Some(network);
        target
    }

    /// Reconciles for the sake of one attachment.
    async fn told(&self, key: &AttachmentKey) -> Result<(), Error> {
        match self.reconcile_within().await?.remove(key) {
            Some(error) => Err(refused(&error)),
            None => Ok(()),
        }
    }

    async fn reconcile_within(&self) -> Result<Unopened, Error> {
        let within = self.options.dataplane_within;
        let told = tokio::time::timeout(within, self.reconcile()).await;
        let told = told.map_err(|_| {
            let message = format!("the dataplane did not answer within {within:?}");
            Error::new(code::TRY_AGAIN, message)
        })?;
        told.map_err(|error| refused(&error))
    }

    /// Waits, within the bound, until there is a dataplane that knows everything.
    async fn dataplane_there(&self) -> Result<(), Error> {
        const LOOK: Duration = Duration::from_millis(50);
        let there = async {
            while !self.link.lock().await.is_informed() {
                tokio::time::sleep(LOOK).await;
            }
        };
        tokio::time::timeout(self.options.dataplane_within, there)
            .await
            .map_err(|_| {
                let message = format!("no dataplane within {:?}", self.options.dataplane_within);
                Error::new(code::TRY_AGAIN, message).details(
                    "is dpu-dataplane running on the card, and is the agent's --dataplane its address?",
                )
            })
    }

    pub(super) fn write(&self, record: Record) -> Result<(), Error> {
        self.journal().put(record).map_err(|error| unwritten(&error))
    }
}

/// An address that one machine may have on a network.
fn is_pods(address: IpAddr) -> bool {
    let broadcast = matches!(address, IpAddr::V4(address) if address.is_broadcast());
    !(address.is_multicast() || address.is_unspecified() || address.is_loopback() || broadcast)
}

/// The pod of a record that has been in place.
fn pod_of(record: &Record) -> Option<Pod> {
    Some(Pod {
        name: record.pod.to_string(),
        node: 0,
        port: record.lease.as_ref()?.port,
        mac: record.mac?,
        addresses: record.addresses.clone(),
    })
}

/// The name under which a VF is leased for an attachment.
pub(super) fn owner(key: &AttachmentKey) -> String {
    format!("{OWNER}{key}")
}

/// Whether a lease is one of this agent's, known or not.
pub(super) fn is_ours(lease: &VfLease) -> bool {
    lease.owner.0.starts_with(OWNER)
}

/// A backend's or the dataplane's refusal, in the words of CNI.
pub(super) fn refused(error: &dpumesh_core::Error) -> Error {
    let code = match (error.kind, error.retry) {
        (ErrorKind::Exists, _) => code::CONFIG,
        (_, Retry::Never) => code::AGENT,
        _ => code::TRY_AGAIN,
    };
    Error::new(code, error.to_string())
}

fn unwritten(error: &JournalError) -> Error {
    Error::new(code::IO, format!("the agent's journal: {error}")).details("nothing was done")
}

impl fmt::Display for Ungoverned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Refuse => "refuse",
            Self::Closed => "closed",
        })
    }
}
