//! [`TapBackend`]: the emulated card as a [`Backend`].

use std::sync::Arc;

use dpumesh_core::{
    Backend, BackendInfo, Capabilities, Epoch, EventStream, FlowSteering, NpOffload, Ports, Result,
    ShmTransport, VfAllocator,
};

use crate::card::TapCard;
use crate::events::TapEvents;
use crate::ports::TapPorts;
use crate::vf::TapVf;
use crate::{NAME, TapOptions};

/// One side of an emulated card.
///
/// VFs, ports and events are its own. Steering and shared-memory channels are handed in: the dataplane's rule engine is the
/// emulated eswitch, and it lives on the SoC's side. There is no network processor.
#[derive(Debug)]
pub struct TapBackend {
    card: TapCard,
    info: BackendInfo,
    capabilities: Capabilities,
    vf: TapVf,
    ports: Option<TapPorts>,
    steering: Option<Arc<dyn FlowSteering>>,
    transport: Option<Arc<dyn ShmTransport>>,
}

impl TapBackend {
    /// Opens the card of `options` from one side. Blocks for some milliseconds.
    ///
    /// # Errors
    /// Those of [`TapCard::open`].
    pub fn open(
        options: TapOptions,
        steering: Option<Arc<dyn FlowSteering>>,
        transport: Option<Arc<dyn ShmTransport>>,
    ) -> Result<Self> {
        TapCard::open(options).map(|card| Self::on(card, steering, transport))
    }

    /// The backend of a card that is open already.
    pub fn on(
        card: TapCard,
        steering: Option<Arc<dyn FlowSteering>>,
        transport: Option<Arc<dyn ShmTransport>>,
    ) -> Self {
        let inner = card.inner();
        let options = &inner.options;
        let mut info = BackendInfo::new(NAME, env!("CARGO_PKG_VERSION"), options.dpu.clone(), options.role);
        info.device = format!(
            "emulated card, {} profile, {:?} VFs",
            options.profile, options.vf_kind
        );
        // The options were checked when the card was opened.
        let mut capabilities = options.profile.capabilities(options.vf_mtu().unwrap_or_default());
        if steering.is_none() {
            capabilities.steering = Default::default();
        }
        if !options.role.is_soc() {
            capabilities.ports = Default::default();
        }
        let vf = TapVf::new(Arc::clone(inner), capabilities.vf.max_vfs);
        let ports = options.role.is_soc().then(|| TapPorts::new(Arc::clone(inner)));
        Self {
            info,
            capabilities,
            vf,
            ports,
            steering,
            transport,
            card,
        }
    }

    /// Adjusts what is claimed to what the parts that were handed in can do: those know their own limits.
    #[must_use]
    pub fn with_capabilities(mut self, adjust: impl FnOnce(&mut Capabilities)) -> Self {
        adjust(&mut self.capabilities);
        self
    }

    /// The card, for who plays its fate.
    pub fn card(&self) -> &TapCard {
        &self.card
    }
}

impl Backend for TapBackend {
    fn info(&self) -> BackendInfo {
        self.info.clone()
    }

    fn capabilities(&self) -> Capabilities {
        self.capabilities.clone()
    }

    fn epoch(&self) -> Epoch {
        self.card.inner().epoch()
    }

    fn vf(&self) -> Option<&dyn VfAllocator> {
        Some(&self.vf)
    }

    fn steering(&self) -> Option<&dyn FlowSteering> {
        self.steering.as_deref()
    }

    fn offload(&self) -> Option<&dyn NpOffload> {
        None
    }

    fn transport(&self) -> Option<&dyn ShmTransport> {
        self.transport.as_deref()
    }

    fn ports(&self) -> Option<&dyn Ports> {
        self.ports.as_ref().map(|ports| ports as &dyn Ports)
    }

    fn events(&self) -> Box<dyn EventStream> {
        Box::new(TapEvents::new(self.card.inner()))
    }
}
