//! The conformance kit: each sentence of the traits' docs as a case that any backend can be run against.
//!
//! ```text
//! Fixture ── open ──► Rig ── host(), soc() ──► the backend under test
//!                      ├── reset       the card vanishes and returns
//!                      ├── probe       frames go in and come out
//!                      ├── namespaces  places to attach to
//!                      ├── crash       the process dies and starts again
//!                      ├── sabotage    VFs that cannot be moved, or are where nobody put them
//!                      ├── disturb     what else happens to a card: no carrier, a broken table, fewer VFs
//!                      └── programs    images that the network processor takes
//! run: a rig to look at: each case: needs met? ─no─► NotSupported (counted)
//!                                       └─yes─► fresh rig, own thread, deadline ─► Passed | Failed ─► Report ◄─ Expectations
//! ```
//!
//! A backend brings a [`Fixture`]. Each case gets a [`Rig`] of its own: a fresh card that nobody else uses. The case is a
//! plain `async fn` on `&dyn Rig` whose name is the sentence it proves; [`CASES`] lists all of them once, each with the
//! doc sentence and the abilities it needs. What is missing makes a skip, and a skip is data: it is counted, and a
//! backend checks in an [`Expectations`] file that names it. A case that fails, a skip nobody listed and a listed one
//! that passes are differences ([`Report::differences`]).
//!
//! Capabilities are taken at their word: what is claimed and does not hold is a failure ([`CASES`] of part `limits`).
//!
//! # How long it takes
//! Every case runs on a thread with a current-thread runtime of its own, so that a call that blocks its thread (no
//! control call may) or never completes ends with the deadline, as a failure. Nothing sleeps where it can wait for a
//! condition; ageing and counter ages go by [`Clock`], or by real time where the fixture has none.
//!
//! ```
//! use std::{sync::Arc, time::Duration};
//! use dpumesh_hw::conformance::{memory::MemoryFixture, run, Expectations};
//! use dpumesh_hw::memory::MemoryConfig;
//!
//! # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
//! let fixture = Arc::new(MemoryFixture::new("memory", MemoryConfig::default()));
//! let report = run(fixture, "lease", Duration::from_secs(10)).await;
//! assert!(report.counts().passed > 10, "{report}");
//! assert!(report.differences(&Expectations::default()).is_empty());
//! # });
//! ```
//!
//! # Why no macro that expands to tests
//! A list of data can be filtered, counted, printed and compared with a file, by a test as well as by a program that was
//! handed a vendor's library; a list of test functions cannot.

mod cases;
mod change;
mod check;
mod disturb;
mod events;
mod expected;
mod hardware;
mod hostile;
#[cfg(feature = "loader")]
pub mod library;
mod lifecycle;
mod limits;
pub mod memory;
mod offload;
mod ports;
mod probe;
mod report;
mod run;
mod sample;
mod steering;
mod traffic;
mod transport;
mod vf;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use dpumesh_core::offload::Program;
use dpumesh_core::{Backend, PortRef, Result};

pub use cases::{CASES, Case, Need};
pub use check::{CaseResult, Halt};
pub use disturb::{Disturb, Disturbance};
pub use expected::{Difference, Expectations};
pub use report::{Counts, Entry, Outcome, Report, Summary};
pub use run::{run, run_watched};

/// Version of the kit, for [`dpumesh_core::BackendInfo::conformance`]; grows when a case is added or made stricter.
pub const VERSION: &str = "2";

/// A backend's side of the kit.
#[async_trait]
pub trait Fixture: Send + Sync + fmt::Debug {
    /// Name of what is tested, as `memory` or `tap/minimal`.
    fn name(&self) -> String;

    /// Makes a fresh card that shares nothing with any other, its VFs free and its tables empty.
    ///
    /// Called on the thread of the case that will use it. Dropping the rig tidies up.
    ///
    /// # Errors
    /// What kept the card from being made: the case fails with it.
    async fn open(&self) -> Result<Box<dyn Rig>>;

    /// Known deviations, with reasons; empty for a backend that has none.
    fn expectations(&self) -> Expectations;
}

/// One card and what the fixture can do to it from outside. What it cannot do is `None`, and its cases are skipped.
pub trait Rig: Send + fmt::Debug {
    /// The host's half: it has the VFs.
    fn host(&self) -> Arc<dyn Backend>;

    /// The SoC's half: it has eswitch, ports and network processor. The same as [`Rig::host`] when one value plays both.
    fn soc(&self) -> Arc<dyn Backend>;

    /// Ability to make the card vanish and return.
    fn reset(&self) -> Option<&dyn Reset>;

    /// Ability to send and see frames.
    fn probe(&self) -> Option<&dyn Probe>;

    /// Ability to make network namespaces.
    fn namespaces(&self) -> Option<&dyn Namespaces>;

    /// Ability to die without tidying up.
    fn crash(&self) -> Option<&dyn Crash>;

    /// Ability to make the card's VFs misbehave.
    fn sabotage(&self) -> Option<&dyn Sabotage>;

    /// Ability to bring about what no call can. A fixture of an older kit has none.
    fn disturb(&self) -> Option<&dyn Disturb> {
        None
    }

    /// Ability to move the backend's clock; `None` when it runs by real time.
    fn clock(&self) -> Option<&dyn Clock>;

    /// Two or more different programs that the network processor accepts, the first with a table of
    /// [`dpumesh_core::offload::TableKind::Exact`]; empty when there are none to be had.
    fn programs(&self) -> Vec<Program>;
}

/// Makes the card vanish and return.
#[async_trait]
pub trait Reset: Send + Sync {
    /// The card vanishes: `Lost` is raised, calls fail with `DeviceLost`.
    ///
    /// # Errors
    /// What kept it from vanishing.
    async fn lose(&self) -> Result<()>;

    /// The card returns with a new epoch; completes when `Back` was raised.
    ///
    /// # Errors
    /// What kept it from returning.
    async fn bring_back(&self) -> Result<()>;

    /// Most resets in a row that a case asks for to overflow a subscription; it stops after five seconds too. Fewer where
    /// a reset takes milliseconds: the verdict must not depend on how fast the machine is.
    fn most_in_a_row(&self) -> u64 {
        1000
    }
}

/// Sends frames as a function or the wire would, and sees what they get.
///
/// Octets are from the destination MAC to the last payload octet, without FCS.
#[async_trait]
pub trait Probe: Send + Sync {
    /// Hands a frame in at a port: what the VF behind it sends, or what arrives from the wire of an uplink.
    ///
    /// # Errors
    /// What kept the frame from being handed in. A frame that the card then drops is no error.
    async fn inject(&self, port: PortRef, octets: &[u8]) -> Result<()>;

    /// The next frame that left the card by a port (what the VF behind it received, what went out on the wire);
    /// `None` when none did `within` that time.
    ///
    /// # Errors
    /// What kept the fixture from looking.
    async fn observed(&self, port: PortRef, within: Duration) -> Result<Option<Vec<u8>>>;
}

/// Makes network namespaces, or what stands for them.
#[async_trait]
pub trait Namespaces: Send + Sync {
    /// Makes a namespace and returns its path, as CNI_NETNS would give it.
    ///
    /// # Errors
    /// What kept it from being made.
    async fn fresh(&self) -> Result<PathBuf>;

    /// Takes a namespace away under whatever is in it.
    ///
    /// # Errors
    /// What kept it from going.
    async fn remove(&self, path: &Path) -> Result<()>;
}

/// Lets the process that holds the backend die and start again.
#[async_trait]
pub trait Crash: Send + Sync {
    /// Drops both halves without tidying up, and opens the same card again from what survives a process: its journal
    /// and the card itself. [`Rig::host`] and [`Rig::soc`] give the new ones afterwards.
    ///
    /// # Errors
    /// What kept it from being opened again.
    async fn crash(&self) -> Result<()>;
}

/// Makes a card's VFs misbehave.
#[async_trait]
pub trait Sabotage: Send + Sync {
    /// Makes every move of a VF fail with `Io` from now on, or work again.
    ///
    /// # Errors
    /// What kept it from being jammed.
    async fn jam(&self, port: PortRef, jammed: bool) -> Result<()>;

    /// Takes a VF away from the host behind the backend's back: into another driver or namespace.
    ///
    /// # Errors
    /// What kept it from being taken.
    async fn strand(&self, port: PortRef) -> Result<()>;
}

/// Moves a backend's clock.
#[async_trait]
pub trait Clock: Send + Sync {
    /// Lets so much time pass for the backend.
    async fn advance(&self, time: Duration);
}
