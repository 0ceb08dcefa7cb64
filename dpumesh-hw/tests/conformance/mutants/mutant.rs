//! [`Mutant`]: a decorator with one [`Bug`] and one [`Lie`]; the parts in the other files act on them.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use dpumesh_core::backend::EventStream;
use dpumesh_core::offload::ConnectionState;
use dpumesh_core::steering::{Cookie, Counters, SteeringRule};
use dpumesh_core::{
    Backend, BackendInfo, Capabilities, Epoch, Error, ErrorKind, Event, Fence, FlowSteering, MacAddr,
    NpOffload, PortRef, Ports, Result, ShmTransport, VfAllocator,
};

/// What a call does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bug {
    None,
    // leases
    IgnoresTheFence,
    FreesDespiteAFailedRelease,
    ReleasesByPortInsteadOfLease,
    LeasesTheHighestIndex,
    GivesASecondLeaseToOneOwner,
    ForgetsToRestoreTheMac,
    ConfiguresHalfBeforeItFails,
    IgnoresWhatItCannotConfigure,
    AdmitsOverAnotherLease,
    ReclaimsFromTheLiving,
    IsSurprisedByASecondDetach,
    ListsNoLeases,
    NeedsTheNamespaceToRelease,
    GivesUpAtTheFirstStep,
    TellsOnlyTheFirstFailure,
    StaysBusyWhenCancelled,
    SetsOnlyTheAdministrativeMac,
    PromisesEveryVf,
    // rules
    ReordersABatch,
    ListsEverybodysRules,
    FlushesEverybodysRules,
    StopsAtTheFirstFailure,
    RollsBackInWordsOnly,
    CallsAnEqualRuleExisting,
    ReplacesAnExistingCookie,
    SkipsCountersItLacks,
    ListsInReverse,
    LosesFinalCounters,
    CountsBackwards,
    CountsFcsToo,
    InvertsPriorities,
    PromisesHardware,
    TakesAnyAtomicity,
    InstallsWhatItValidates,
    RemovesForAnybody,
    NamesNoField,
    ForgetsThatItIsFull,
    LeavesMissesOpen,
    SaysHardwareAndDoesNothing,
    SaysHardwareAndUsesSoftware,
    ListsAnotherPlace,
    CountsNothingInHardware,
    ForgetsMarks,
    ServesOldCounters,
    CarriesCountersOver,
    ListsTheFormerLife,
    SplitsAtomicBatches,
    RemovesBeforeItAdds,
    SaysDoneWhatFailed,
    MarksEveryFailureUnknown,
    SaysUndoneWhatWasDone,
    HidesAFailedFlush,
    // processor
    ResumesATokenTwice,
    StopsAtTheFirstBadEntry,
    ReadsInReverse,
    RunsTheOldProgram,
    StopsTheOldProgramOnAFault,
    ForgetsWhatItPassed,
    ResumesWhatWasLost,
    CountsNoConnections,
    ForgetsMeters,
    // ports
    ReceivesInReverse,
    LeavesFramesAsTheyWere,
    CountsNoRefusals,
    LosesFramesAtAnError,
    // channels
    MergesMessages,
    OverlooksADeadPeer,
    LetsItsOwnerOversleep,
    HidesWhatIsInFlight,
    TruncatesMessages,
    ForgivesALiar,
    OverlooksALiar,
    FillsWithoutRoom,
    // card
    KeepsItsEpoch,
    SwallowsLost,
    LosesEventsSilently,
    SwallowsLink,
    SwallowsHealth,
    SwallowsVfRemoved,
    ChangesItsName,
}

/// A claim that does not hold.
pub(super) type Lie = fn(&mut Capabilities);

/// A backend with one bug.
#[derive(Debug)]
pub(super) struct Mutant {
    pub(super) inner: Arc<dyn Backend>,
    pub(super) bug: Bug,
    lie: Lie,
    part: Part,
    born: Epoch,
    asked: AtomicU64,
}

/// All parts of it, which share what they need to remember.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) inner: Arc<dyn Backend>,
    pub(super) bug: Bug,
    pub(super) calls: AtomicU64,
    pub(super) detached: AtomicU64,
    pub(super) mac: Mutex<Option<(PortRef, MacAddr)>>,
    pub(super) resumed: Mutex<Option<ConnectionState>>,
    /// A call was begun and not ended.
    pub(super) busy: AtomicBool,
    pub(super) rules: Mutex<Vec<SteeringRule>>,
    pub(super) counters: Mutex<BTreeMap<Cookie, Counters>>,
}

impl Mutant {
    pub(super) fn new(inner: Arc<dyn Backend>, bug: Bug, lie: Lie) -> Self {
        let part = Part {
            inner: Arc::clone(&inner),
            bug,
            calls: AtomicU64::new(0),
            detached: AtomicU64::new(0),
            mac: Mutex::default(),
            resumed: Mutex::default(),
            busy: AtomicBool::new(false),
            rules: Mutex::default(),
            counters: Mutex::default(),
        };
        Self {
            born: inner.epoch(),
            inner,
            bug,
            lie,
            part,
            asked: AtomicU64::new(0),
        }
    }
}

impl Backend for Mutant {
    fn info(&self) -> BackendInfo {
        let mut info = self.inner.info();
        if self.bug == Bug::ChangesItsName {
            info.device = self.asked.fetch_add(1, Ordering::Relaxed).to_string();
        }
        info
    }

    fn capabilities(&self) -> Capabilities {
        let mut capabilities = self.inner.capabilities();
        (self.lie)(&mut capabilities);
        capabilities
    }

    fn epoch(&self) -> Epoch {
        match self.bug {
            Bug::KeepsItsEpoch => self.born,
            _ => self.inner.epoch(),
        }
    }

    fn vf(&self) -> Option<&dyn VfAllocator> {
        self.inner.vf().map(|_| &self.part as _)
    }

    fn steering(&self) -> Option<&dyn FlowSteering> {
        self.inner.steering().map(|_| &self.part as _)
    }

    fn offload(&self) -> Option<&dyn NpOffload> {
        self.inner.offload().map(|_| &self.part as _)
    }

    fn transport(&self) -> Option<&dyn ShmTransport> {
        self.inner.transport().map(|_| &self.part as _)
    }

    fn ports(&self) -> Option<&dyn Ports> {
        self.inner.ports().map(|_| &self.part as _)
    }

    fn events(&self) -> Box<dyn EventStream> {
        Box::new(MutantEvents {
            inner: self.inner.events(),
            bug: self.bug,
        })
    }
}

#[derive(Debug)]
struct MutantEvents {
    inner: Box<dyn EventStream>,
    pub(super) bug: Bug,
}

#[async_trait]
impl EventStream for MutantEvents {
    async fn next(&mut self) -> Option<Event> {
        loop {
            let event = self.inner.next().await;
            match (self.bug, &event) {
                (Bug::SwallowsLost, Some(Event::Lost { .. }))
                | (Bug::LosesEventsSilently, Some(Event::Overflowed(_)))
                | (Bug::SwallowsLink, Some(Event::Link { .. }))
                | (Bug::SwallowsHealth, Some(Event::Health(_)))
                | (Bug::SwallowsVfRemoved, Some(Event::VfRemoved(_))) => {}
                _ => return event,
            }
        }
    }
}

impl Part {
    pub(super) fn has(&self, bug: Bug) -> bool {
        self.bug == bug
    }

    pub(super) fn fence(&self, fence: Fence) -> Fence {
        if self.has(Bug::IgnoresTheFence) {
            return Fence(self.inner.epoch());
        }
        fence
    }

    /// Takes two turns, and when it is dropped in between the part stays busy.
    pub(super) async fn linger(&self, operation: &'static str) -> Result<()> {
        if !self.has(Bug::StaysBusyWhenCancelled) {
            return Ok(());
        }
        if self.busy.swap(true, Ordering::Relaxed) {
            return Err(Error::new(ErrorKind::Busy, operation, "a call is under way"));
        }
        tokio::task::yield_now().await;
        self.busy.store(false, Ordering::Relaxed);
        Ok(())
    }

    pub(super) fn inner_vf(&self) -> &dyn VfAllocator {
        self.inner.vf().expect("asked only where the part is")
    }

    pub(super) fn inner_steering(&self) -> &dyn FlowSteering {
        self.inner.steering().expect("asked only where the part is")
    }

    pub(super) fn inner_offload(&self) -> &dyn NpOffload {
        self.inner.offload().expect("asked only where the part is")
    }
}
