//! [`NodeDataplane`]: what the channel's calls do here.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
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
use dpumesh_hw::stream::kernel::KernelStack;
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
    /// Where the proxy has an inbound port: told of local pods before they are reached.
    stack: Option<KernelStack>,
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
            stack: None,
        }
    }

    /// Tells `stack` which pods are of this node, so that the proxy's connections from pod to pod come to its inbound port.
    #[must_use]
    pub fn with_hairpins(mut self, stack: KernelStack) -> Self {
        self.stack = Some(stack);
        self
    }

    fn tell_stack<'a>(&self, pods: impl Iterator<Item = &'a Attachment>) -> Result<()> {
        let Some(stack) = &self.stack else {
            return Ok(());
        };
        let addresses: BTreeSet<IpAddr> = pods.flat_map(|pod| pod.addresses.iter().copied()).collect();
        stack.set_local_pods(&addresses).map_err(|error| {
            let message = "the stack was not told which pods are of this node";
            Error::new(ErrorKind::Io, "channel.attach", message).source(error)
        })
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
        self.tell_stack(attached.values().chain([attachment]))?;
        if let Err(error) = self.open(port, policy).await {
            self.close(port).await?;
            self.tell_stack(attached.values())?;
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
            self.tell_stack(attached.values())?;
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

#[cfg(test)]
mod tests {
    use dpumesh_core::vf::{ResetLevel, VfRequest};
    use dpumesh_core::{MacAddr, PfIndex};
    use dpumesh_hw::dataplane::{Engine, EngineConfig, software_capabilities};
    use dpumesh_hw::memory::{self, MemoryBackend, MemoryCard};

    use super::*;

    const EPOCH: Epoch = Epoch(77);

    struct Rig {
        host: Arc<MemoryBackend>,
        dataplane: NodeDataplane,
        engine: EngineHandle,
    }

    impl Rig {
        async fn new() -> Self {
            let card = MemoryCard::with_capabilities(memory::capabilities());
            let host = card.host();
            let vf = host.require_vf().expect("VFs");
            vf.set_vf_count(host.fence(), PfIndex(0), 2)
                .await
                .expect("two VFs");
            let (engine, handle) = Engine::new(&EngineConfig::new(7)).expect("an engine");
            std::thread::spawn(move || engine.run());
            let events = Arc::new(EventHub::new(8));
            let steering = SoftSteering::new(
                "memory",
                handle.clone(),
                software_capabilities(100),
                EPOCH,
                Arc::clone(&events),
            );
            let dataplane = NodeDataplane::new(card.soc(), handle.clone(), Arc::new(steering), events, EPOCH);
            Self {
                host,
                dataplane,
                engine: handle,
            }
        }

        async fn lease(&self, owner: &str) -> VfLease {
            let vf = self.host.require_vf().expect("VFs");
            let lease = vf.lease(self.host.fence(), &VfRequest::new(owner)).await;
            lease.expect("a free VF")
        }

        async fn release(&self, lease: &VfLease) {
            let vf = self.host.require_vf().expect("VFs");
            let released = vf.release(self.host.fence(), lease, ResetLevel::Config).await;
            released.expect("released");
        }

        async fn is_open(&self, port: PortRef) -> bool {
            self.dataplane.is_open(port).await.expect("the engine runs")
        }
    }

    impl Drop for Rig {
        fn drop(&mut self) {
            self.engine.stop();
        }
    }

    fn attachment(lease: &VfLease, address: &str) -> Attachment {
        Attachment {
            lease: lease.clone(),
            mac: MacAddr([2, 0, 0, 0, 0, 1]),
            addresses: vec![address.parse().expect("an address")],
            gateway: MacAddr([2, 0, 0, 0, 0, 0xfe]),
            ingress: 1,
        }
    }

    #[tokio::test]
    async fn a_late_detach_leaves_the_next_pod_alone() {
        let rig = Rig::new().await;
        let old = rig.lease("old").await;
        let fence = Fence(EPOCH);
        let attached = rig.dataplane.attach(fence, &attachment(&old, "10.0.0.1")).await;
        attached.expect("attached");
        rig.dataplane.detach(fence, &old).await.expect("detached");
        rig.release(&old).await;
        let new = rig.lease("new").await;
        assert_eq!(new.port, old.port);
        let attached = rig.dataplane.attach(fence, &attachment(&new, "10.0.0.2")).await;
        attached.expect("attached");
        rig.dataplane
            .detach(fence, &old)
            .await
            .expect("not current: nothing to do");
        assert!(rig.is_open(new.port).await);
        rig.dataplane.detach(fence, &new).await.expect("detached");
        assert!(!rig.is_open(new.port).await);
    }

    #[tokio::test]
    async fn an_address_of_another_pod_closes_nothing_of_that_pod() {
        let rig = Rig::new().await;
        let (first, second) = (rig.lease("first").await, rig.lease("second").await);
        let fence = Fence(EPOCH);
        let of_first = attachment(&first, "10.0.0.1");
        rig.dataplane.attach(fence, &of_first).await.expect("attached");
        let stolen = rig
            .dataplane
            .attach(fence, &attachment(&second, "10.0.0.1"))
            .await;
        let error = stolen.expect_err("the address is taken");
        let object = error.object.as_ref().expect("it names what is wrong");
        assert_eq!(
            (error.kind, object.field.as_ref()),
            (ErrorKind::Conflict, "addresses")
        );
        assert!(rig.is_open(first.port).await && !rig.is_open(second.port).await);
        rig.dataplane
            .attach(fence, &of_first)
            .await
            .expect("the same again");
        assert!(rig.is_open(first.port).await);
    }
}
