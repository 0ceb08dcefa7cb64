//! [`Steered`]: the emulated card with the software dataplane as its eswitch, as `dpu-dataplane` puts them together. The
//! dataplane has the ports then, so nobody else can open them: their sentences are proven on the bare card.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use dpumesh_core::{
    Backend, BackendExt, BackendInfo, Capabilities, Epoch, ErrorKind, Event, EventKinds, EventStream,
    FlowSteering, MacAddr, NpOffload, PortRef, Ports, Result, ShmTransport, SteeringCapabilities,
    VfAllocator,
};
use dpumesh_hw::dataplane::{Engine, EngineConfig, EngineGone, EngineHandle, PortPolicy, SoftSteering};
use dpumesh_hw::events::EventHub;
use dpumesh_hw::stream::IngressPort;
use dpumesh_tap::TapBackend;

/// How often rules age: timeouts count in seconds.
const MAINTENANCE: Duration = Duration::from_millis(100);

#[derive(Debug)]
pub(crate) struct Steered {
    card: Arc<TapBackend>,
    limits: SteeringCapabilities,
    engine: EngineHandle,
    steering: Arc<SoftSteering>,
    events: Arc<EventHub>,
}

impl Steered {
    /// Starts an engine for a card, in the runtime at hand.
    pub(crate) fn new(card: Arc<TapBackend>, limits: SteeringCapabilities) -> Self {
        let (engine, handle) = Engine::new(&EngineConfig::new(7)).expect("an engine");
        std::thread::spawn(move || engine.run());
        let events = Arc::new(EventHub::new(64));
        let steering = Arc::new(SoftSteering::new(
            dpumesh_tap::NAME,
            handle.clone(),
            limits.clone(),
            card.epoch(),
            Arc::clone(&events),
        ));
        let aged = Arc::downgrade(&steering);
        tokio::spawn(async move {
            let mut tick = tokio::time::interval(MAINTENANCE);
            while let Some(steering) = aged.upgrade() {
                steering
                    .maintain()
                    .await
                    .expect("the engine runs as long as its card");
                drop(steering);
                tick.tick().await;
            }
        });
        Self {
            card,
            limits,
            engine: handle,
            steering,
            events,
        }
    }

    /// Gives the engine every port that may be opened and that it has not. Each may send what it likes: the kit's
    /// frames come from addresses of its own.
    pub(crate) async fn open_ports(&self) -> Result<()> {
        let ports = self.card.require_ports()?;
        for (number, info) in (1..).zip(ports.list().await?) {
            let io = match ports.open(self.card.fence(), info.port).await {
                Ok(io) => io,
                // Open already, or not admitted.
                Err(error) if matches!(error.kind, ErrorKind::Busy | ErrorKind::Denied) => continue,
                Err(error) => return Err(error),
            };
            self.admit(info.port, number, info.mac.unwrap_or(MacAddr([2, 0, 0, 0, 0, 1])))
                .await
                .expect("the engine runs");
            assert!(self.engine.open_port(io).await.expect("the engine runs"));
        }
        Ok(())
    }

    async fn admit(&self, port: PortRef, number: u32, mac: MacAddr) -> std::result::Result<(), EngineGone> {
        let ingress = IngressPort::new(number).expect("not 0");
        let anything = PortPolicy::Uplink { mac, ingress };
        assert!(self.engine.set_policy(port, Some(anything)).await?);
        Ok(())
    }
}

impl Drop for Steered {
    fn drop(&mut self) {
        self.engine.stop();
    }
}

impl Backend for Steered {
    fn info(&self) -> BackendInfo {
        self.card.info()
    }

    fn capabilities(&self) -> Capabilities {
        let mut capabilities = self.card.capabilities();
        capabilities.steering = self.limits.clone();
        capabilities.ports = Default::default();
        capabilities.events |= EventKinds::AGED;
        capabilities
    }

    fn epoch(&self) -> Epoch {
        self.card.epoch()
    }

    fn vf(&self) -> Option<&dyn VfAllocator> {
        self.card.vf()
    }

    fn steering(&self) -> Option<&dyn FlowSteering> {
        Some(self.steering.as_ref())
    }

    fn offload(&self) -> Option<&dyn NpOffload> {
        self.card.offload()
    }

    fn transport(&self) -> Option<&dyn ShmTransport> {
        self.card.transport()
    }

    fn ports(&self) -> Option<&dyn Ports> {
        None
    }

    fn events(&self) -> Box<dyn EventStream> {
        Box::new(Both {
            card: self.card.events(),
            steering: Box::new(self.events.subscribe()),
        })
    }
}

/// Events of the card and of its steering.
#[derive(Debug)]
struct Both {
    card: Box<dyn EventStream>,
    steering: Box<dyn EventStream>,
}

#[async_trait]
impl EventStream for Both {
    async fn next(&mut self) -> Option<Event> {
        tokio::select! {
            event = self.card.next() => event,
            event = self.steering.next() => event,
        }
    }
}
