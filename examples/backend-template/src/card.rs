//! [`MyCard`]: the card as a whole, and its lives.
//!
//! Everything that a reset takes away is in [`Life`], behind one lock. A call that changes something takes the lock by
//! [`MyCard::fenced`], one that only looks by [`MyCard::present`]; both fail fast while the card is away. That alone keeps
//! the contract's sentences about epochs, in every part.

use std::borrow::Cow;
use std::sync::{Mutex, MutexGuard, PoisonError};

use dpumesh_core::{
    Backend, BackendInfo, Capabilities, DpuId, Epoch, Error, ErrorKind, Event, EventStream, Fence,
    FlowSteering, NpOffload, Ports, Result, Role, ShmTransport, VfAllocator,
};
use dpumesh_hw::events::EventHub;

/// Name of this backend.
pub const NAME: &str = "mycard";

/// One card.
#[derive(Debug)]
pub struct MyCard {
    dpu: DpuId,
    life: Mutex<Life>,
    events: EventHub,
}

/// What ends with a life of the card.
#[derive(Debug)]
pub(crate) struct Life {
    pub(crate) epoch: Epoch,
    away: bool,
    // step 2: pub(crate) vfs: crate::vf::Vfs,
    // step 3: pub(crate) rules: dpumesh_hw::steering::RuleStore,
}

impl Life {
    fn begin(epoch: Epoch) -> Self {
        Self {
            epoch,
            away: false,
            // step 2: vfs: crate::vf::Vfs::default(),
            // step 3: rules: crate::steering::empty(epoch),
        }
    }
}

impl MyCard {
    /// Opens the card that the operator calls `dpu`. This is where the driver is found and asked; here the card is in
    /// memory.
    ///
    /// # Errors
    /// What kept the card from being opened: name what was looked for, and where.
    pub fn open(dpu: impl Into<String>) -> Result<Self> {
        Ok(Self {
            dpu: DpuId(dpu.into()),
            life: Mutex::new(Life::begin(Epoch(1))),
            events: EventHub::default(),
        })
    }

    /// The card went away: call it when the driver says so. Every call fails until it is back.
    pub fn lost(&self) {
        let mut life = self.lock();
        life.away = true;
        self.events.raise(&Event::Lost { epoch: life.epoch });
    }

    /// The card is usable again, with nothing of its former life.
    pub fn back(&self) {
        let mut life = self.lock();
        *life = Life::begin(Epoch(life.epoch.0 + 1));
        self.events.raise(&Event::Back { epoch: life.epoch });
    }
}

#[allow(dead_code, reason = "the parts use these, from step 2 on")]
impl MyCard {
    pub(crate) fn dpu(&self) -> &DpuId {
        &self.dpu
    }

    /// For calls that only look.
    pub(crate) fn present(&self, operation: &'static str) -> Result<MutexGuard<'_, Life>> {
        let life = self.lock();
        if life.away {
            return Err(error(ErrorKind::DeviceLost, operation, "the card is away"));
        }
        Ok(life)
    }

    /// For calls that change something.
    pub(crate) fn fenced(&self, operation: &'static str, fence: Fence) -> Result<MutexGuard<'_, Life>> {
        let life = self.present(operation)?;
        if fence.0 != life.epoch {
            let message = format!(
                "the fence is of epoch {}, the card in {}",
                fence.0.0, life.epoch.0
            );
            return Err(error(ErrorKind::Stale, operation, message));
        }
        Ok(life)
    }
}

impl MyCard {
    fn lock(&self) -> MutexGuard<'_, Life> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[allow(dead_code, reason = "the parts use it, from step 2 on")]
/// An error of this backend. It has no effect: what is refused is refused before anything is touched.
pub(crate) fn error(
    kind: ErrorKind,
    operation: &'static str,
    message: impl Into<Cow<'static, str>>,
) -> Error {
    Error::new(kind, operation, message).backend(NAME)
}

impl Backend for MyCard {
    fn info(&self) -> BackendInfo {
        BackendInfo::new(NAME, env!("CARGO_PKG_VERSION"), self.dpu.clone(), Role::Both)
    }

    fn capabilities(&self) -> Capabilities {
        #[allow(unused_mut, reason = "the first claim comes with step 2")]
        let mut capabilities = Capabilities::default();
        // step 2: crate::vf::claim(&mut capabilities);
        // step 3: crate::steering::claim(&mut capabilities);
        capabilities
    }

    fn epoch(&self) -> Epoch {
        self.lock().epoch
    }

    fn vf(&self) -> Option<&dyn VfAllocator> {
        None // step 2: Some(self)
    }

    fn steering(&self) -> Option<&dyn FlowSteering> {
        None // step 3: Some(self)
    }

    fn offload(&self) -> Option<&dyn NpOffload> {
        None
    }

    fn transport(&self) -> Option<&dyn ShmTransport> {
        None
    }

    fn ports(&self) -> Option<&dyn Ports> {
        None
    }

    fn events(&self) -> Box<dyn EventStream> {
        Box::new(self.events.subscribe())
    }
}
