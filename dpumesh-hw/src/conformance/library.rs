//! [`LibraryFixture`]: the kit against a foreign library, with what its symbol `dpumesh_conformance_v1` offers.
//!
//! Each case opens a card of its own: the library's configuration gets a member `card` whose text is new each time. A
//! library that has one real card only may ignore it, if it tidies up. What the library has no hook for is skipped.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use dpumesh_core::offload::Program;
use dpumesh_core::{Backend, Error, ErrorKind, PortRef, Result};

use super::{Clock, Crash, Expectations, Fixture, Namespaces, Probe, Reset, Rig, Sabotage};
use crate::loader::{Hooks, Library};

/// Opens cards of a foreign library.
#[derive(Clone, Debug)]
pub struct LibraryFixture {
    name: String,
    library: Library,
    config: serde_json::Value,
    expected: Expectations,
}

impl LibraryFixture {
    /// Cards of a loaded library with this configuration, a JSON object.
    pub fn new(name: impl Into<String>, library: Library, config: serde_json::Value) -> Self {
        Self {
            name: name.into(),
            library,
            config,
            expected: Expectations::default(),
        }
    }

    /// With known deviations.
    pub fn expecting(mut self, expected: Expectations) -> Self {
        self.expected = expected;
        self
    }
}

#[async_trait]
impl Fixture for LibraryFixture {
    fn name(&self) -> String {
        self.name.clone()
    }

    async fn open(&self) -> Result<Box<dyn Rig>> {
        static CARDS: AtomicU64 = AtomicU64::new(0);
        let mut config = self.config.clone();
        if let Some(members) = config.as_object_mut() {
            let number = CARDS.fetch_add(1, Ordering::Relaxed);
            let card = format!("kit-{}-{number}", std::process::id());
            members.insert("card".to_owned(), card.into());
        }
        let card = Card::open(&self.library, &config)?;
        Ok(Box::new(LibraryRig {
            library: self.library.clone(),
            config,
            hooks: card.hooks.clone(),
            card: Mutex::new(Some(card)),
            namespaces: AtomicU32::new(0),
        }))
    }

    fn expectations(&self) -> Expectations {
        self.expected.clone()
    }
}

/// An open card.
#[derive(Clone, Debug)]
struct Card {
    backend: Arc<dyn Backend>,
    hooks: Hooks,
}

impl Card {
    fn open(library: &Library, config: &serde_json::Value) -> Result<Self> {
        let opened = library.connect_with(config);
        let (backend, hooks) = opened
            .map_err(|error| Error::new(ErrorKind::Fault, "rig.open", error.to_string()).source(error))?;
        Ok(Self { backend, hooks })
    }
}

#[derive(Debug)]
struct LibraryRig {
    library: Library,
    config: serde_json::Value,
    /// What the library can do, whichever its card.
    hooks: Hooks,
    card: Mutex<Option<Card>>,
    namespaces: AtomicU32,
}

impl LibraryRig {
    /// The card, opened again after a crash.
    fn card(&self) -> Result<Card> {
        let mut card = self.card.lock().unwrap_or_else(PoisonError::into_inner);
        if card.is_none() {
            *card = Some(Card::open(&self.library, &self.config)?);
        }
        card.clone()
            .ok_or_else(|| Error::new(ErrorKind::Fault, "rig.open", "the card is gone"))
    }

    fn backend(&self) -> Arc<dyn Backend> {
        match self.card() {
            Ok(card) => card.backend,
            // A rig has no way to say no here; the runner makes a panic the case's failure.
            Err(error) => panic!("the card cannot be opened again: {error}"),
        }
    }
}

impl Rig for LibraryRig {
    fn host(&self) -> Arc<dyn Backend> {
        self.backend()
    }

    fn soc(&self) -> Arc<dyn Backend> {
        self.backend()
    }

    fn reset(&self) -> Option<&dyn Reset> {
        self.hooks.can_reset().then_some(self as _)
    }

    fn probe(&self) -> Option<&dyn Probe> {
        self.hooks.can_probe().then_some(self as _)
    }

    fn namespaces(&self) -> Option<&dyn Namespaces> {
        self.hooks.has_namespaces().then_some(self as _)
    }

    fn crash(&self) -> Option<&dyn Crash> {
        self.hooks.survives().then_some(self as _)
    }

    fn sabotage(&self) -> Option<&dyn Sabotage> {
        self.hooks.can_sabotage().then_some(self as _)
    }

    fn clock(&self) -> Option<&dyn Clock> {
        None
    }

    fn programs(&self) -> Vec<Program> {
        self.hooks.programs()
    }
}

#[async_trait]
impl Reset for LibraryRig {
    async fn lose(&self) -> Result<()> {
        self.card()?.hooks.lose()
    }

    async fn bring_back(&self) -> Result<()> {
        self.card()?.hooks.bring_back()
    }
}

#[async_trait]
impl Probe for LibraryRig {
    async fn inject(&self, port: PortRef, octets: &[u8]) -> Result<()> {
        self.card()?.hooks.inject(port, octets)
    }

    async fn observed(&self, port: PortRef, within: Duration) -> Result<Option<Vec<u8>>> {
        let card = self.card()?;
        let begun = Instant::now();
        loop {
            let seen = card.hooks.observe(port)?;
            if seen.is_some() || begun.elapsed() >= within {
                return Ok(seen);
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

#[async_trait]
impl Namespaces for LibraryRig {
    async fn fresh(&self) -> Result<PathBuf> {
        let number = self.namespaces.fetch_add(1, Ordering::Relaxed);
        let path = format!("/run/netns/pod{number}");
        self.card()?.hooks.netns(&path, true)?;
        Ok(path.into())
    }

    async fn remove(&self, path: &Path) -> Result<()> {
        self.card()?.hooks.netns(&path.to_string_lossy(), false)
    }
}

#[async_trait]
impl Crash for LibraryRig {
    async fn crash(&self) -> Result<()> {
        // The next look opens the card again; until then nobody here holds it.
        *self.card.lock().unwrap_or_else(PoisonError::into_inner) = None;
        Ok(())
    }
}

#[async_trait]
impl Sabotage for LibraryRig {
    async fn jam(&self, port: PortRef, jammed: bool) -> Result<()> {
        self.card()?.hooks.jam(port, jammed)
    }

    async fn strand(&self, port: PortRef) -> Result<()> {
        self.card()?.hooks.strand(port)
    }
}
