//! [`MemoryFixture`]: the kit against [`crate::memory`], bare or behind wrappers.
//!
//! A crash drops the backends and makes new ones from the card: what a journal is to a real backend, the card in memory is
//! to this one.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use dpumesh_core::offload::{Program, TableKind};
use dpumesh_core::vf::VfLocation;
use dpumesh_core::{
    Backend, Capabilities, Error, ErrorKind, Frame, PortRef, ResetLevels, Result, ShmTransport,
};

use super::{
    Clock, Crash, Disturb, Disturbance, Expectations, Fixture, Namespaces, Probe, Reset, Rig, Sabotage,
};
use crate::memory::{MemoryCard, MemoryConfig, TableSpec, program};

/// Puts something around a backend.
#[derive(Clone)]
struct Wrap(Arc<WrapFn>);

type WrapFn = dyn Fn(Arc<dyn Backend>) -> Arc<dyn Backend> + Send + Sync;

impl fmt::Debug for Wrap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Wrap")
    }
}

/// Makes cards in memory.
#[derive(Clone, Debug)]
pub struct MemoryFixture {
    name: String,
    config: MemoryConfig,
    halves: bool,
    wrap: Wrap,
    expected: Expectations,
}

impl MemoryFixture {
    /// Cards of this configuration, each one backend that plays both sides.
    pub fn new(name: impl Into<String>, config: MemoryConfig) -> Self {
        Self {
            name: name.into(),
            config,
            halves: false,
            wrap: Wrap(Arc::new(|backend| backend)),
            expected: Expectations::default(),
        }
    }

    /// Under another name.
    pub fn named(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// Two backends, one for each side.
    pub fn in_halves(mut self) -> Self {
        self.halves = true;
        self
    }

    /// With other limits.
    pub fn with_capabilities(mut self, capabilities: Capabilities) -> Self {
        self.config.capabilities = capabilities;
        self
    }

    /// With channels.
    pub fn with_transport(mut self, transport: Arc<dyn ShmTransport>) -> Self {
        self.config.transport = Some(transport);
        self
    }

    /// Behind wrappers, which each backend gets anew.
    pub fn wrapped(
        mut self,
        wrap: impl Fn(Arc<dyn Backend>) -> Arc<dyn Backend> + Send + Sync + 'static,
    ) -> Self {
        self.wrap = Wrap(Arc::new(wrap));
        self
    }

    /// With known deviations.
    pub fn expecting(mut self, expected: Expectations) -> Self {
        self.expected = expected;
        self
    }
}

#[async_trait]
impl Fixture for MemoryFixture {
    fn name(&self) -> String {
        self.name.clone()
    }

    async fn open(&self) -> Result<Box<dyn Rig>> {
        let card = MemoryCard::new(self.config.clone());
        let sides = Sides::of(&card, self.halves, &self.wrap);
        Ok(Box::new(MemoryRig {
            card,
            halves: self.halves,
            wrap: self.wrap.clone(),
            sides: Mutex::new(Some(sides)),
            namespaces: AtomicU32::new(0),
        }))
    }

    fn expectations(&self) -> Expectations {
        self.expected.clone()
    }
}

#[derive(Debug)]
struct MemoryRig {
    card: MemoryCard,
    halves: bool,
    wrap: Wrap,
    sides: Mutex<Option<Sides>>,
    namespaces: AtomicU32,
}

#[derive(Clone, Debug)]
struct Sides {
    host: Arc<dyn Backend>,
    soc: Arc<dyn Backend>,
}

impl Sides {
    fn of(card: &MemoryCard, halves: bool, wrap: &Wrap) -> Self {
        if halves {
            return Self {
                host: (wrap.0)(card.host()),
                soc: (wrap.0)(card.soc()),
            };
        }
        let both = (wrap.0)(card.both());
        Self {
            host: Arc::clone(&both),
            soc: both,
        }
    }
}

impl MemoryRig {
    fn sides(&self) -> Sides {
        let mut sides = self.sides.lock().unwrap_or_else(PoisonError::into_inner);
        sides
            .get_or_insert_with(|| Sides::of(&self.card, self.halves, &self.wrap))
            .clone()
    }
}

impl Rig for MemoryRig {
    fn host(&self) -> Arc<dyn Backend> {
        self.sides().host
    }

    fn soc(&self) -> Arc<dyn Backend> {
        self.sides().soc
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

    fn disturb(&self) -> Option<&dyn Disturb> {
        Some(self)
    }

    fn clock(&self) -> Option<&dyn Clock> {
        None
    }

    fn programs(&self) -> Vec<Program> {
        let table = |name: &str, kind| TableSpec {
            name: name.to_owned(),
            kind,
            key_len: 6,
            value_len: 4,
            capacity: 300,
        };
        use TableKind::{Array, Counter, Exact, Lpm, Meter, Ternary};
        vec![
            program("switch", &[table("peers", Exact), table("rates", Meter)]),
            program("router", &[table("routes", Lpm), table("hits", Counter)]),
            program("guard", &[table("policies", Ternary), table("queues", Array)]),
        ]
    }
}

#[async_trait]
impl Reset for MemoryRig {
    async fn lose(&self) -> Result<()> {
        self.card.lose();
        Ok(())
    }

    async fn bring_back(&self) -> Result<()> {
        self.card.restore();
        Ok(())
    }
}

#[async_trait]
impl Probe for MemoryRig {
    async fn inject(&self, port: PortRef, octets: &[u8]) -> Result<()> {
        let wire = self.card.wire(port).ok_or_else(|| no_port(port))?;
        wire.send(Frame::copy_of(octets));
        Ok(())
    }

    async fn observed(&self, port: PortRef, within: Duration) -> Result<Option<Vec<u8>>> {
        let wire = self.card.wire(port).ok_or_else(|| no_port(port))?;
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

fn no_port(port: PortRef) -> Error {
    Error::new(ErrorKind::NotFound, "rig.probe", "there is no such port").object(port)
}

#[async_trait]
impl Namespaces for MemoryRig {
    async fn fresh(&self) -> Result<PathBuf> {
        let number = self.namespaces.fetch_add(1, Ordering::Relaxed);
        let path = PathBuf::from(format!("/run/netns/pod{number}"));
        self.card.add_netns(&path, &[]);
        Ok(path)
    }

    async fn remove(&self, path: &Path) -> Result<()> {
        self.card.remove_netns(path);
        Ok(())
    }
}

#[async_trait]
impl Crash for MemoryRig {
    async fn crash(&self) -> Result<()> {
        // The next look makes new ones; until then none is left.
        *self.sides.lock().unwrap_or_else(PoisonError::into_inner) = None;
        Ok(())
    }
}

#[async_trait]
impl Sabotage for MemoryRig {
    async fn jam(&self, port: PortRef, jammed: bool) -> Result<()> {
        self.card.jam(port, jammed);
        Ok(())
    }

    async fn strand(&self, port: PortRef) -> Result<()> {
        // As far away as the card can bring it back from.
        let resets = self.soc().capabilities().vf.resets;
        let place = if resets.contains(ResetLevels::FUNCTION) {
            VfLocation::Driver("vfio-pci".to_owned())
        } else {
            let path = PathBuf::from("/run/netns/of-a-dead-pod");
            VfLocation::Netns { path }
        };
        self.card.strand(port, place);
        Ok(())
    }
}

#[async_trait]
impl Disturb for MemoryRig {
    async fn disturb(&self, what: &Disturbance) -> Result<()> {
        match what {
            Disturbance::SoftwareStops(stopped) => self.card.stop_software(*stopped),
            Disturbance::RulesFail { after } => self.card.fail_rules(*after),
            Disturbance::AttributesFail { port, fail } => {
                self.card.freeze(*port, *fail);
            }
            Disturbance::FewerVfs(most) => self.card.limit_vfs(*most),
            Disturbance::PortFails { port, after } => self.card.fail_port(*port, *after),
            Disturbance::Carrier { port, up } => self.card.set_link(*port, *up),
            Disturbance::Health(health) => self.card.set_health(health.clone()),
            Disturbance::Passed { token, up, down } => {
                self.card.pass(*token, *up, *down);
            }
            Disturbance::ActivationFails(fails) => self.card.fail_activation(*fails),
        }
        Ok(())
    }
}
