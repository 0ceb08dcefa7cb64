//! [`YusurFixture`]: the conformance kit against `dpumesh-yusur`, on a card made of two: a card in memory is the floor (VFs,
//! ports, rules in software), the simulated processor is in front of it.
//!
//! ```text
//! inject ─► port of the floor (lease, spoofing, VLAN) ─► processor ─┬─ forwarded ─► port of the floor
//!                                                                   └─ missed ────► rules of the floor
//! ```

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use dpumesh_core::offload::{Program, TableKind};
use dpumesh_core::vf::VfLocation;
use dpumesh_core::{Backend, Error, ErrorKind, Event, Frame, PciAddress, PortRef, ResetLevels, Result};
use dpumesh_hw::conformance::{Clock, Crash, Expectations, Fixture, Namespaces, Probe, Reset, Rig, Sabotage};
use dpumesh_hw::memory::{MemoryCard, MemoryConfig};
use dpumesh_yusur::{Options, YusurBackend, find, port_of_number};

use crate::control::{inject, read_fate};
use crate::pipeline::Fate;
use crate::{TableSpec, library_path, program};

/// Makes cards.
#[derive(Clone, Debug)]
pub struct YusurFixture {
    name: String,
    profile: String,
    library: Option<PathBuf>,
    floor: MemoryConfig,
    wrap: Option<Wrap>,
    expected: Expectations,
}

type Wrap = fn(Arc<dyn Backend>) -> Arc<dyn Backend>;

/// Numbers of cards: every rig has a PCI address of its own.
static CARDS: AtomicU64 = AtomicU64::new(0);

impl YusurFixture {
    /// Cards whose processor is of this kind, see [`crate::settings`].
    pub fn new(name: impl Into<String>, profile: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            profile: profile.into(),
            library: None,
            floor: MemoryConfig::default(),
            wrap: None,
            expected: Expectations::default(),
        }
    }

    /// With the library in this file instead of the one that was built with the program.
    pub fn with_library(mut self, path: impl Into<PathBuf>) -> Self {
        self.library = Some(path.into());
        self
    }

    /// On another floor.
    pub fn on_floor(mut self, floor: MemoryConfig) -> Self {
        self.floor = floor;
        self
    }

    /// Behind a wrapper, which each backend gets anew.
    pub fn wrapped(mut self, wrap: fn(Arc<dyn Backend>) -> Arc<dyn Backend>) -> Self {
        self.wrap = Some(wrap);
        self
    }

    /// With known deviations.
    pub fn expecting(mut self, expected: Expectations) -> Self {
        self.expected = expected;
        self
    }

    /// A fresh card.
    ///
    /// # Errors
    /// What kept it from being opened.
    pub fn card(&self) -> Result<TestCard> {
        let failed = |source: std::io::Error| Error::new(ErrorKind::Io, "rig.open", source.to_string());
        let number = CARDS.fetch_add(1, Ordering::Relaxed);
        let [.., high, low] = number.to_be_bytes();
        let pci = PciAddress::new(0xfffe, high, low >> 3, low & 7)
            .ok_or_else(|| Error::new(ErrorKind::CapacityExceeded, "rig.open", "no PCI address is left"))?;
        let sysfs = Sysfs::with_card(pci).map_err(failed)?;
        let library = match &self.library {
            Some(path) => path.clone(),
            None => library_path().map_err(failed)?,
        };
        Ok(TestCard {
            floor: MemoryCard::new(self.floor.clone()),
            pci,
            sysfs,
            library,
            profile: self.profile.clone(),
        })
    }
}

/// A floor, a processor, and a sysfs that shows them.
#[derive(Debug)]
pub struct TestCard {
    /// What is under the processor.
    pub floor: MemoryCard,
    pci: PciAddress,
    sysfs: Sysfs,
    library: PathBuf,
    profile: String,
}

impl TestCard {
    /// How to open it.
    pub fn options(&self) -> Options {
        let mut options = Options::new("dpu0", Some(self.floor.both()));
        options.pci = Some(self.pci);
        options.library = Some(self.library.clone());
        options.sysfs = self.sysfs.0.clone();
        options.profile.clone_from(&self.profile);
        options
    }

    /// Opens it.
    ///
    /// # Errors
    /// Those of [`YusurBackend::open`].
    pub fn open(&self) -> Result<Arc<YusurBackend>> {
        YusurBackend::open(self.options()).map(Arc::new)
    }
}

/// A folder that looks like sysfs with one card.
#[derive(Debug)]
struct Sysfs(PathBuf);

impl Sysfs {
    fn with_card(pci: PciAddress) -> std::io::Result<Self> {
        let name = format!("dpumesh-yusur-{}-{pci}", std::process::id());
        let root = std::env::temp_dir().join(name);
        let device = root.join("bus/pci/devices").join(pci.to_string());
        std::fs::create_dir_all(&device)?;
        let made = Self(root);
        std::fs::write(device.join("vendor"), format!("{:#06x}\n", find::VENDOR))?;
        std::fs::write(device.join("device"), format!("{:#06x}\n", find::PF_DEVICE))?;
        Ok(made)
    }
}

impl Drop for Sysfs {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0); // of this process alone, and nothing depends on it any more
    }
}

#[async_trait]
impl Fixture for YusurFixture {
    fn name(&self) -> String {
        self.name.clone()
    }

    async fn open(&self) -> Result<Box<dyn Rig>> {
        let card = self.card()?;
        let backend = card.open()?;
        Ok(Box::new(YusurRig {
            sides: Mutex::new(Some(Side::of(&backend, self.wrap))),
            card,
            wrap: self.wrap,
            namespaces: AtomicU64::new(0),
        }))
    }

    fn expectations(&self) -> Expectations {
        self.expected.clone()
    }
}

#[derive(Debug)]
struct YusurRig {
    card: TestCard,
    wrap: Option<Wrap>,
    sides: Mutex<Option<Side>>,
    namespaces: AtomicU64,
}

/// The backend, bare and as the kit sees it.
#[derive(Clone, Debug)]
struct Side {
    bare: Arc<YusurBackend>,
    seen: Arc<dyn Backend>,
}

impl Side {
    fn of(bare: &Arc<YusurBackend>, wrap: Option<Wrap>) -> Self {
        let seen: Arc<dyn Backend> = Arc::<YusurBackend>::clone(bare);
        Self {
            bare: Arc::clone(bare),
            seen: wrap.map_or_else(|| Arc::clone(&seen), |wrap| wrap(Arc::clone(&seen))),
        }
    }
}

impl YusurRig {
    fn side(&self) -> Side {
        let mut sides = self.sides.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(side) = &*sides {
            return side.clone();
        }
        // After a crash. A card that cannot be opened again has nothing to show: the case ends here.
        let bare = self
            .card
            .open()
            .expect("a card that was open can be opened again");
        sides.insert(Side::of(&bare, self.wrap)).clone()
    }

    /// Tells the processor something.
    async fn tell(&self, command: &str) -> Result<String> {
        self.side().bare.diagnose(command).await
    }
}

impl Rig for YusurRig {
    fn host(&self) -> Arc<dyn Backend> {
        self.side().seen
    }

    fn soc(&self) -> Arc<dyn Backend> {
        self.side().seen
    }

    fn reset(&self) -> Option<&dyn Reset> {
        Some(self)
    }

    fn probe(&self) -> Option<&dyn Probe> {
        Some(self)
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
        programs()
    }
}

/// Two programs that the simulated processor runs.
pub(crate) fn programs() -> Vec<Program> {
    let table = |name: &str, kind| TableSpec {
        name: name.to_owned(),
        kind,
        key_len: 6,
        value_len: 4,
        capacity: 300,
    };
    vec![
        program("switch", "1.0", &[table("peers", TableKind::Exact)]),
        program("router", "1.1", &[table("routes", TableKind::Lpm)]),
    ]
}

#[async_trait]
impl Reset for YusurRig {
    async fn lose(&self) -> Result<()> {
        let mut events = self.side().bare.events();
        self.tell("lose").await?;
        self.card.floor.lose();
        while let Some(event) = events.next().await {
            if matches!(event, Event::Lost { .. }) {
                break;
            }
        }
        Ok(())
    }

    async fn bring_back(&self) -> Result<()> {
        let mut events = self.side().bare.events();
        self.card.floor.restore();
        self.tell("restore").await?;
        while let Some(event) = events.next().await {
            if matches!(event, Event::Back { .. }) {
                break;
            }
        }
        Ok(())
    }
}

fn no_port(port: PortRef) -> Error {
    Error::new(ErrorKind::NotFound, "rig.probe", "there is no such port").object(port)
}

#[async_trait]
impl Probe for YusurRig {
    async fn inject(&self, port: PortRef, octets: &[u8]) -> Result<()> {
        let wire = self.card.floor.wire(port).ok_or_else(|| no_port(port))?;
        let frame = Frame::copy_of(octets);
        let Ok(entered) = wire.enter(frame.clone()) else {
            return Ok(()); // the port dropped it
        };
        let answer = self.tell(&inject(port, entered.octets())).await?;
        let fate = read_fate(&answer).ok_or_else(|| {
            Error::new(
                ErrorKind::Fault,
                "rig.probe",
                format!("the processor said `{answer}`"),
            )
        })?;
        match fate {
            Fate::Missed => {
                wire.send(frame);
            }
            Fate::Dropped(_) => {}
            Fate::Punted(octets) => self.leave(port, PortRef::Stack(0), &octets),
            Fate::Forwarded(number, octets) => {
                if let Some(to) = port_of_number(number) {
                    self.leave(port, to, &octets);
                }
            }
        }
        Ok(())
    }

    async fn observed(&self, port: PortRef, within: Duration) -> Result<Option<Vec<u8>>> {
        let wire = self.card.floor.wire(port).ok_or_else(|| no_port(port))?;
        let begun = Instant::now();
        loop {
            if let Some(arrival) = wire.receive() {
                return Ok(Some(arrival.frame.octets().to_vec()));
            }
            if begun.elapsed() >= within {
                return Ok(None);
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

impl YusurRig {
    /// A frame leaves by a port; one that the port drops is gone.
    fn leave(&self, from: PortRef, to: PortRef, octets: &[u8]) {
        if let Some(wire) = self.card.floor.wire(to) {
            let _ = wire.leave(from, Frame::copy_of(octets)); // the port's word is what the case looks at
        }
    }
}

#[async_trait]
impl Namespaces for YusurRig {
    async fn fresh(&self) -> Result<PathBuf> {
        let number = self.namespaces.fetch_add(1, Ordering::Relaxed);
        let path = PathBuf::from(format!("/run/netns/pod{number}"));
        self.card.floor.add_netns(&path, &[]);
        Ok(path)
    }

    async fn remove(&self, path: &Path) -> Result<()> {
        self.card.floor.remove_netns(path);
        Ok(())
    }
}

#[async_trait]
impl Crash for YusurRig {
    async fn crash(&self) -> Result<()> {
        // The next look makes a new one; until then none is left.
        *self.sides.lock().unwrap_or_else(PoisonError::into_inner) = None;
        Ok(())
    }
}

#[async_trait]
impl Sabotage for YusurRig {
    async fn jam(&self, port: PortRef, jammed: bool) -> Result<()> {
        self.card.floor.jam(port, jammed);
        Ok(())
    }

    async fn strand(&self, port: PortRef) -> Result<()> {
        let resets = self.side().bare.capabilities().vf.resets;
        let place = if resets.contains(ResetLevels::FUNCTION) {
            VfLocation::Driver("vfio-pci".to_owned())
        } else {
            let path = PathBuf::from("/run/netns/of-a-dead-pod");
            VfLocation::Netns { path }
        };
        self.card.floor.strand(port, place);
        Ok(())
    }
}
