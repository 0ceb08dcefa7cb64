//! [`OnFloor`]: the conformance kit against `dpumesh-yusur` on the floor of a true card, the SR-IOV backend.
//!
//! The kit's hooks are the floor's; the processor goes and comes with it where it can be told to. Frames cannot be injected: neither a
//! fake card nor a true one shows the kit where they go.

use std::fmt;
use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use dpumesh_core::offload::Program;
use dpumesh_core::{Backend, Error, ErrorKind, Event, Result};
use dpumesh_hw::conformance::{Clock, Crash, Expectations, Fixture, Namespaces, Probe, Reset, Rig, Sabotage};
use dpumesh_sriov::fake::{FakeFixture, Model};
use dpumesh_sriov::kernel::Kernel;
use dpumesh_yusur::{Options, YusurBackend};

use crate::fixture::programs;
use crate::library_path;

/// Makes a floor, and says how the card on it is opened; [`Options::floor`] is filled in.
type Beneath = Arc<dyn Fn() -> Pin<Box<dyn Future<Output = Result<Ground>> + Send>> + Send + Sync>;

/// A floor, and how to open the card on it.
#[derive(Debug)]
pub struct Ground {
    /// The floor's card.
    pub floor: Box<dyn Rig + Sync>,
    /// How to open the card; its floor is filled in.
    pub options: Options,
}

/// Cards on a floor.
#[derive(Clone)]
pub struct OnFloor {
    name: String,
    beneath: Beneath,
    simulated: bool,
    expected: Expectations,
}

impl OnFloor {
    /// Cards with the vendor's library.
    pub fn new<F>(name: impl Into<String>, beneath: impl Fn() -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Result<Ground>> + Send + 'static,
    {
        Self {
            name: name.into(),
            beneath: Arc::new(move || Box::pin(beneath())),
            simulated: false,
            expected: Expectations::default(),
        }
    }

    /// The simulated processor of this profile (see [`crate::settings`]) on fake cards with Yusur's numbers, in switchdev mode.
    ///
    /// # Errors
    /// The simulator's library is not there.
    pub fn fake(name: impl Into<String>, profile: impl Into<String>) -> std::io::Result<Self> {
        let (library, profile) = (library_path()?, profile.into());
        let floors = FakeFixture::new("yusur", Model::yusur()).in_switchdev_mode();
        let beneath = move || fake_ground(floors.clone(), library.clone(), profile.clone());
        Ok(Self {
            simulated: true,
            ..Self::new(name, beneath)
        })
    }

    /// With known deviations.
    #[must_use]
    pub fn expecting(mut self, expected: Expectations) -> Self {
        self.expected = expected;
        self
    }
}

/// The simulator has one card per PCI address as long as the process lives: each fake card is in a domain of its own.
async fn fake_ground(floors: FakeFixture, library: PathBuf, profile: String) -> Result<Ground> {
    static DOMAINS: AtomicU16 = AtomicU16::new(1);
    let rig = floors.rig(DOMAINS.fetch_add(1, Ordering::Relaxed)).await?;
    let mut options = Options::new("dpu0", None);
    options.pci = Some(rig.machine().device());
    options.sysfs = rig.machine().sysfs().to_owned();
    options.library = Some(library);
    options.profile = profile;
    Ok(Ground {
        floor: Box::new(rig),
        options,
    })
}

impl fmt::Debug for OnFloor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OnFloor")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

#[async_trait]
impl Fixture for OnFloor {
    fn name(&self) -> String {
        self.name.clone()
    }

    async fn open(&self) -> Result<Box<dyn Rig>> {
        let ground = (self.beneath)().await?;
        let card = open(&ground)?;
        Ok(Box::new(FloorRig {
            ground,
            card: Mutex::new(Some(card)),
            simulated: self.simulated,
        }))
    }

    fn expectations(&self) -> Expectations {
        self.expected.clone()
    }
}

fn open(ground: &Ground) -> Result<Arc<YusurBackend>> {
    let mut options = ground.options.clone();
    let floor = ground.floor.soc();
    options.role = floor.info().role;
    options.floor = Some(floor);
    YusurBackend::open(options).map(Arc::new)
}

struct FloorRig {
    ground: Ground,
    /// `None` after a crash, until somebody looks.
    card: Mutex<Option<Arc<YusurBackend>>>,
    simulated: bool,
}

impl fmt::Debug for FloorRig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FloorRig")
            .field("floor", &self.ground.floor)
            .finish_non_exhaustive()
    }
}

impl FloorRig {
    fn card(&self) -> Arc<YusurBackend> {
        let mut card = self.card.lock().unwrap_or_else(PoisonError::into_inner);
        let again = || open(&self.ground).expect("a card that was open can be opened again");
        Arc::clone(card.get_or_insert_with(again))
    }
}

impl Rig for FloorRig {
    fn host(&self) -> Arc<dyn Backend> {
        self.card()
    }

    fn soc(&self) -> Arc<dyn Backend> {
        self.card()
    }

    fn reset(&self) -> Option<&dyn Reset> {
        self.ground.floor.reset().map(|_| self as &dyn Reset)
    }

    fn probe(&self) -> Option<&dyn Probe> {
        None
    }

    fn namespaces(&self) -> Option<&dyn Namespaces> {
        self.ground.floor.namespaces()
    }

    fn crash(&self) -> Option<&dyn Crash> {
        self.ground.floor.crash().map(|_| self as &dyn Crash)
    }

    fn sabotage(&self) -> Option<&dyn Sabotage> {
        self.ground.floor.sabotage()
    }

    fn clock(&self) -> Option<&dyn Clock> {
        None
    }

    fn programs(&self) -> Vec<Program> {
        // What runs on a true processor only its vendor knows.
        if self.simulated { programs() } else { Vec::new() }
    }
}

fn floor_has_none() -> Error {
    Error::new(ErrorKind::Unsupported, "rig.reset", "the floor has no such hook")
}

#[async_trait]
impl Reset for FloorRig {
    async fn lose(&self) -> Result<()> {
        let card = self.card();
        let mut events = card.events();
        if self.simulated {
            card.diagnose("lose").await?;
        }
        let floor = self.ground.floor.reset().ok_or_else(floor_has_none)?;
        floor.lose().await?;
        while !matches!(events.next().await, Some(Event::Lost { .. }) | None) {}
        Ok(())
    }

    async fn bring_back(&self) -> Result<()> {
        let card = self.card();
        let mut events = card.events();
        let floor = self.ground.floor.reset().ok_or_else(floor_has_none)?;
        floor.bring_back().await?;
        if self.simulated {
            card.diagnose("restore").await?;
        }
        while !matches!(events.next().await, Some(Event::Back { .. }) | None) {}
        Ok(())
    }

    fn most_in_a_row(&self) -> u64 {
        50
    }
}

#[async_trait]
impl Crash for FloorRig {
    async fn crash(&self) -> Result<()> {
        // The next look makes a new one on the new floor; until then none is left.
        *self.card.lock().unwrap_or_else(PoisonError::into_inner) = None;
        let floor = self.ground.floor.crash().ok_or_else(floor_has_none)?;
        floor.crash().await
    }
}
