//! [`FakeFixture`]: the conformance kit against this backend on a fake card.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use dpumesh_core::offload::Program;
use dpumesh_core::{Backend, BackendExt, PfIndex, PortRef, Result};
use dpumesh_hw::conformance::{Clock, Crash, Expectations, Fixture, Namespaces, Probe, Reset, Rig, Sabotage};
use dpumesh_hw::netlink::EswitchMode;

use super::{FakeMachine, Model};
use crate::kernel::KernelError;
use crate::{Card, Options, Parts, Protect};

/// VFs of a fresh card, unless it has fewer.
const VFS: u16 = 4;

/// Makes fake cards.
#[derive(Clone, Debug)]
pub struct FakeFixture {
    name: String,
    model: Model,
    protect: Protect,
    vlans: Option<(u16, u16)>,
    mode: EswitchMode,
    expected: Expectations,
}

impl FakeFixture {
    /// Cards of this model.
    pub fn new(name: impl Into<String>, model: Model) -> Self {
        Self {
            name: name.into(),
            model,
            protect: Protect::Required,
            vlans: Some((3000, 3999)),
            mode: EswitchMode::Legacy,
            expected: Expectations::default(),
        }
    }

    /// VFs may talk past the host.
    #[must_use]
    pub fn unprotected(mut self) -> Self {
        self.protect = Protect::Waived;
        self
    }

    /// In switchdev mode: with representors, and steering on them.
    #[must_use]
    pub fn in_switchdev_mode(mut self) -> Self {
        self.mode = EswitchMode::Switchdev;
        self
    }

    /// With known deviations.
    #[must_use]
    pub fn expecting(mut self, expected: Expectations) -> Self {
        self.expected = expected;
        self
    }

    /// A fresh card in a PCI domain of its own.
    ///
    /// # Errors
    /// What kept it from being made.
    pub async fn rig(&self, domain: u16) -> Result<FakeRig> {
        let machine = FakeMachine::in_domain(self.model.clone(), domain).map_err(|failed| {
            let failed = KernelError {
                errno: failed.raw_os_error(),
                what: failed.to_string(),
            };
            crate::card::kernel_error("fake.open", failed)
        })?;
        let mut options = Options::new(machine.device(), "dpu0", machine.directory());
        options.protect = self.protect;
        options.vlans = self.vlans;
        let card = open(&machine, &options)?;
        let rig = FakeRig {
            vfs: VFS.min(self.model.total_vfs),
            mode: self.mode,
            machine,
            options,
            card: Mutex::new(card),
        };
        rig.make_ready().await?;
        Ok(rig)
    }
}

#[async_trait]
impl Fixture for FakeFixture {
    fn name(&self) -> String {
        self.name.clone()
    }

    async fn open(&self) -> Result<Box<dyn Rig>> {
        Ok(Box::new(self.rig(0).await?))
    }

    fn expectations(&self) -> Expectations {
        self.expected.clone()
    }
}

/// A fake card and what a case may do to it.
pub struct FakeRig {
    machine: FakeMachine,
    options: Options,
    card: Mutex<Arc<Card>>,
    mode: EswitchMode,
    vfs: u16,
}

impl FakeRig {
    /// The machine that the card is in.
    pub fn machine(&self) -> &FakeMachine {
        &self.machine
    }

    fn card(&self) -> Arc<Card> {
        Arc::clone(&self.card.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A card comes in legacy mode and without VFs: who owns the node changes the one and makes the others.
    async fn make_ready(&self) -> Result<()> {
        let card = self.card();
        if self.mode == EswitchMode::Switchdev {
            card.set_eswitch_mode(card.fence(), self.mode)?;
        }
        card.require_vf()?
            .set_vf_count(card.fence(), PfIndex(0), self.vfs)
            .await?;
        Ok(())
    }
}

fn open(machine: &FakeMachine, options: &Options) -> Result<Arc<Card>> {
    Card::open_on(options.clone(), Arc::new(machine.clone()), Parts::default())
}

impl fmt::Debug for FakeRig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FakeRig")
            .field("machine", &self.machine)
            .finish_non_exhaustive()
    }
}

impl Rig for FakeRig {
    fn host(&self) -> Arc<dyn Backend> {
        self.card()
    }

    fn soc(&self) -> Arc<dyn Backend> {
        self.card()
    }

    fn reset(&self) -> Option<&dyn Reset> {
        Some(self)
    }

    fn probe(&self) -> Option<&dyn Probe> {
        None
    }

    fn namespaces(&self) -> Option<&dyn Namespaces> {
        Some(self)
    }

    fn crash(&self) -> Option<&dyn Crash> {
        Some(self)
    }

    fn sabotage(&self) -> Option<&dyn Sabotage> {
        Some(self)
    }

    fn clock(&self) -> Option<&dyn Clock> {
        None
    }

    fn programs(&self) -> Vec<Program> {
        Vec::new()
    }
}

#[async_trait]
impl Reset for FakeRig {
    async fn lose(&self) -> Result<()> {
        self.machine.lose();
        self.card().look();
        Ok(())
    }

    async fn bring_back(&self) -> Result<()> {
        self.machine.bring_back_in(self.mode);
        self.card().look();
        self.make_ready().await
    }

    fn most_in_a_row(&self) -> u64 {
        50
    }
}

#[async_trait]
impl Namespaces for FakeRig {
    async fn fresh(&self) -> Result<PathBuf> {
        Ok(self.machine.namespace())
    }

    async fn remove(&self, path: &Path) -> Result<()> {
        self.machine.kill_namespace(path);
        Ok(())
    }
}

#[async_trait]
impl Crash for FakeRig {
    async fn crash(&self) -> Result<()> {
        let again = open(&self.machine, &self.options)?;
        *self.card.lock().unwrap_or_else(PoisonError::into_inner) = again;
        Ok(())
    }
}

#[async_trait]
impl Sabotage for FakeRig {
    async fn jam(&self, port: PortRef, jammed: bool) -> Result<()> {
        self.machine.jam(port, jammed);
        Ok(())
    }

    async fn strand(&self, port: PortRef) -> Result<()> {
        self.machine.strand(port);
        Ok(())
    }
}
