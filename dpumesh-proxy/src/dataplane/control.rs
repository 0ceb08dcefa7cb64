//! [`NodeDataplane`]: what the channel's calls do here.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use dpumesh_core::vf::VfLease;
use dpumesh_core::{
    Backend, BackendExt, BackendInfo, Capabilities, Epoch, Error, ErrorKind, EventKinds, EventStream, Fence,
    FlowSteering, PortRef, Result,
};
use dpumesh_hw::channel::{Attachment, Dataplane};
use dpumesh_hw::dataplane::{EngineGone, EngineHandle, EngineStats, PortPolicy, SoftSteering};
use dpumesh_hw::events::EventHub;
use dpumesh_hw::stream::IngressPort;
use tokio::sync::Mutex;

/// The dataplane of one card: its backend, its engine and the steering over it.
///
/// Its epoch is its own, not the card's: a dataplane that restarts on a card that did not has no rules and no open ports all
/// the same, and the agent must notice.
#[derive(Debug)]
pub struct NodeDataplane {
    card: Arc<dyn Backend>,
    engine: EngineHandle,
    steering: Arc<SoftSteering>,
    events: Arc<EventHub>,
    epoch: Epoch,
    /// What is attached to each port. Held while a port changes hands, so that calls about one port do not mix.
    attached: Mutex<HashMap<PortRef, Attachment>>,
}

impl NodeDataplane {
    /// Joins the parts in the life `epoch` of the dataplane. The engine runs already.
    pub fn new(
        card: Arc<dyn Backend>,
        engine: EngineHandle,
        steering: Arc<SoftSteering>,
        events: Arc<EventHub>,
        epoch: Epoch,
    ) -> Self {
        Self {
            card,
            engine,
            steering,
            events,
            epoch,
            attached: Mutex::default(),
        }
    }

    fn check(&self, fence: Fence, operation: &'static str) -> Result<()> {
        if fence.0 == self.epoch {
            return Ok(());
        }
        let message = format!(
            "epoch {} is not the dataplane's present one, {}",
            fence.0.0, self.epoch.0
        );
        Err(Error::new(ErrorKind::Stale, operation, message))
    }

    /// Ages rules; call it about once a second.
    ///
    /// # Errors
    /// `DeviceLost`: the engine has stopped.
    pub async fn maintain(&self) -> Result<()> {
        self.steering.maintain().await
    }

    async fn close(&self, port: PortRef) -> Result<()> {
        self.engine.set_policy(port, None).await.map_err(gone)?;
        self.engine.close_port(port).await.map_err(gone)
    }

    /// Gives the engine the port's frames. The policy is in force before the first of them.
    async fn open(&self, port: PortRef, policy: PortPolicy) -> Result<()> {
        let conflict = |kind, message| Error::new(kind, "channel.attach", message).object(port);
        if !self.engine.set_policy(port, Some(policy)).await.map_err(gone)? {
            let message =
                "one of the addresses is another local pod's, or the dataplane has no room for one more port";
            return Err(conflict(ErrorKind::Conflict, message).field("addresses"));
        }
        let io = self.card.require_ports()?.open(self.card.fence(), port).await?;
        if !self.engine.open_port(io).await.map_err(gone)? {
            let message = "the kernel has no room to wait for one more port: see fs.epoll.max_user_watches";
            return Err(conflict(ErrorKind::CapacityExceeded, message));
        }
        Ok(())
    }

    async fn is_open(&self, port: PortRef) -> Result<bool> {
        let stats = self.engine.stats().await.map_err(gone)?;
        Ok(stats.ports.get(&port).is_some_and(|port| port.open))
    }
}

#[async_trait]
impl Dataplane for NodeDataplane {
    fn info(&self) -> BackendInfo {
        self.card.info()
    }

    fn capabilities(&self) -> Capabilities {
        let mut capabilities = self.card.capabilities();
        // The steering's, of which the card knows nothing.
        capabilities.events |= EventKinds::AGED;
        capabilities
    }

    fn epoch(&self) -> Epoch {
        self.epoch
    }

    fn steering(&self) -> &dyn FlowSteering {
        self.steering.as_ref()
    }

    async fn attach(&self, fence: Fence, attachment: &Attachment) -> Result<()> {
        self.check(fence, "channel.attach")?;
        let policy = policy(attachment)?;
        let port = attachment.lease.port;
        let mut attached = self.attached.lock().await;
        // Replayed by an agent that reconnected: the pod's link does not flap for that.
        if attached.get(&port) == Some(attachment) && self.is_open(port).await? {
            return Ok(());
        }
        let vf = self.card.require_vf()?;
        vf.admit(self.card.fence(), &attachment.lease).await?;
        // A port has one reader.
        attached.remove(&port);
        self.close(port).await?;
        if let Err(error) = self.open(port, policy).await {
            self.close(port).await?;
            return Err(error);
        }
        attached.insert(port, attachment.clone());
        Ok(())
    }

    /// Of a lease that is not the one attached, only the lease is revoked: the port is another pod's by now.
    async fn detach(&self, fence: Fence, lease: &VfLease) -> Result<()> {
        self.check(fence, "channel.detach")?;
        let mut attached = self.attached.lock().await;
        let current = attached.get(&lease.port);
        if current.is_none_or(|current| current.lease == *lease) {
            attached.remove(&lease.port);
            self.close(lease.port).await?;
        }
        self.card.require_vf()?.revoke(self.card.fence(), lease).await
    }

    async fn stats(&self) -> Result<EngineStats> {
        self.engine.stats().await.map_err(gone)
    }

    fn events(&self) -> Box<dyn EventStream> {
        Box::new(self.events.subscribe())
    }
}

fn policy(attachment: &Attachment) -> Result<PortPolicy> {
    let invalid = |field, message| {
        Error::new(ErrorKind::Invalid, "channel.attach", message)
            .object(attachment.lease.port)
            .field(field)
    };
    let ingress = IngressPort::new(attachment.ingress).ok_or_else(|| invalid("ingress", "must not be 0"))?;
    if attachment.addresses.is_empty() {
        return Err(invalid("addresses", "a pod needs at least one address"));
    }
    if attachment.mac.is_multicast() || attachment.mac.is_zero() {
        return Err(invalid("mac", "must be a unicast address"));
    }
    Ok(PortPolicy::Vf {
        mac: attachment.mac,
        addresses: attachment.addresses.clone(),
        gateway: attachment.gateway,
        ingress,
    })
}

fn gone(gone: EngineGone) -> Error {
    Error::new(ErrorKind::DeviceLost, "dataplane", "the engine has stopped").source(gone)
}
