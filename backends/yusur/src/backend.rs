//! [`YusurBackend`]: the card behind the traits, and what its processor does beyond them.

use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;

use dpumesh_core::backend::EventStream;
use dpumesh_core::steering::MeterId;
use dpumesh_core::{
    Backend, BackendInfo, Capabilities, Effect, Epoch, ErrorKind, Fence, FlowSteering, NpOffload, PciAddress,
    Ports, Result, ShmTransport, VfAllocator,
};

use crate::error::{NAME, error, of};
use crate::find;
use crate::floor::Floor;
use crate::offload::{Offload, extra};
use crate::options::{Mode, Options};
use crate::steering::Steering;
use crate::table::{self, Meter};
use crate::worker::{self, Asker, Shared};

/// One Yusur card.
///
/// Dropping it ends its threads as soon as the calls in progress are done; what was programmed stays on the card until
/// it is opened again.
#[derive(Debug)]
pub struct YusurBackend {
    info: BackendInfo,
    pci: PciAddress,
    asker: Asker,
    shared: Arc<Shared>,
    steering: Option<Steering>,
    offload: Option<Offload>,
    floor: Floor,
}

/// Rate of a meter: what exceeds it is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MeterRate {
    /// Octets per second, Ethernet header included.
    pub octets_per_second: u64,
    /// Octets that may come at once.
    pub burst_octets: u64,
}

const OPEN: &str = "backend.open";

impl YusurBackend {
    /// Finds the card and the library, compares versions, and opens the card with empty steering tables.
    ///
    /// Blocks while the library does, for [`Options::deadline`] at most.
    ///
    /// # Errors
    /// `NotFound` (no card, no library: the message says what was looked for and where, [`find::NoCard`] and
    /// [`find::NoLibrary`] are the source), `Unsupported` (firmware), `DeviceLost` (it is being reset), `Timeout`, and what library
    /// and floor say.
    pub fn open(options: Options) -> Result<Self> {
        let (deadline, (done, opened)) = (options.deadline, mpsc::channel());
        thread::Builder::new()
            .name("yusur-open".to_owned())
            .spawn(move || {
                let _ = done.send(Self::open_here(options)); // nobody listens any more after the deadline
            })
            .map_err(|source| error(ErrorKind::Io, OPEN, format!("no thread: {source}")))?;
        opened.recv_timeout(deadline).unwrap_or_else(|missing| {
            Err(match missing {
                RecvTimeoutError::Timeout => {
                    let message = format!("the card is not open after {deadline:?}: the library hangs");
                    error(ErrorKind::Timeout, OPEN, message).effect(Effect::Unknown)
                }
                RecvTimeoutError::Disconnected => error(ErrorKind::Fault, OPEN, "opening it broke off"),
            })
        })
    }

    fn open_here(options: Options) -> Result<Self> {
        let pci = find::card(&options.sysfs, options.pci)
            .map_err(|none| error(ErrorKind::NotFound, OPEN, none.to_string()).source(none))?;
        let library = find::library(options.library.as_deref())
            .map_err(|none| error(ErrorKind::NotFound, OPEN, none.to_string()).source(none))?;
        let device = library
            .device(&pci.to_string(), &options.profile)
            .map_err(|failure| {
                let message = format!("the library does not open {pci}: {}", failure.text);
                let kind = match failure.status {
                    table::E_FIRMWARE => ErrorKind::Unsupported,
                    status => crate::error::kind(status),
                };
                error(kind, OPEN, message)
                    .vendor_code(failure.status.into())
                    .source(failure)
            })?;
        let found = device.info().map_err(|failure| of(OPEN, failure))?;
        let firmware = table::text(&found.firmware);
        if !options.firmware.takes(&firmware) {
            let wanted = options.firmware;
            let message = format!(
                "{pci} runs firmware {firmware}, this program goes with {}.{} and later versions of {}: update the card",
                wanted.major, wanted.minor, wanted.major
            );
            return Err(error(ErrorKind::Unsupported, OPEN, message).field("firmware"));
        }
        if found.alive == 0 {
            return Err(error(
                ErrorKind::DeviceLost,
                OPEN,
                "the processor is being reset: try again",
            ));
        }
        let (asker, shared) = worker::start(device, &found, &options)?;
        let mut info = BackendInfo::new(NAME, env!("CARGO_PKG_VERSION"), options.dpu.clone(), options.role);
        let (model, serial) = (table::text(&found.model), table::text(&found.serial));
        info.device = format!("{model} {serial} at {pci}, firmware {firmware}");
        let is_soc = options.role.is_soc();
        Ok(Self {
            info,
            pci,
            steering: is_soc.then(|| Steering {
                asker: asker.clone(),
                shared: Arc::clone(&shared),
            }),
            offload: is_soc.then(|| Offload {
                asker: asker.clone(),
                shared: Arc::clone(&shared),
            }),
            floor: Floor {
                shared: Arc::clone(&shared),
            },
            asker,
            shared,
        })
    }

    /// Address of the card's physical function.
    pub fn pci(&self) -> PciAddress {
        self.pci
    }

    /// Changes the card's mode: the card goes and comes back with other capabilities, and rules that they still allow.
    ///
    /// Completes when the card took the order, before it is back.
    ///
    /// # Errors
    /// `Unsupported`, `Stale`, `DeviceLost`, `Busy`.
    pub async fn set_mode(&self, fence: Fence, mode: Mode) -> Result<()> {
        const SET: &str = "np.set_mode";
        self.asker
            .ask(SET, move |worker| {
                Box::pin(async move {
                    worker.shared.fenced(fence, SET)?;
                    let set = worker.device.set_mode(worker.generation, mode.number());
                    set.map_err(|failure| extra(worker, SET, failure))
                })
            })
            .await
    }

    /// Sets a meter, new or again, for [`dpumesh_core::steering::Action::Meter`]; a rule with a meter that was never set
    /// stays out of hardware. Meters survive resets.
    ///
    /// # Errors
    /// `Unsupported` (no meters), `NotFound` (number beyond them), `Stale`, `DeviceLost`.
    pub async fn set_meter(&self, fence: Fence, id: MeterId, rate: MeterRate) -> Result<()> {
        const SET: &str = "np.set_meter";
        let meter = Meter {
            octets_per_second: rate.octets_per_second,
            burst_octets: rate.burst_octets,
        };
        self.asker
            .ask(SET, move |worker| {
                Box::pin(async move {
                    worker.shared.fenced(fence, SET)?;
                    let limit = worker.rules.tables.limits().meters;
                    if limit == 0 {
                        return Err(error(ErrorKind::Unsupported, SET, "the card has no meters"));
                    }
                    if id.0 >= limit {
                        let message = format!("{} is beyond the {limit} meters", id.0);
                        return Err(error(ErrorKind::NotFound, SET, message).object(id.0));
                    }
                    let set = worker.device.meter_set(worker.generation, id.0, &meter);
                    set.map_err(|failure| extra(worker, SET, failure))?;
                    worker.rules.tables.set_meter(id, meter);
                    Ok(())
                })
            })
            .await
    }

    /// A command of the vendor's support engineers, answered in text. Works while the card is away.
    ///
    /// # Errors
    /// `Unsupported` (the library has none), and what it says.
    pub async fn diagnose(&self, request: &str) -> Result<String> {
        const DIAGNOSE: &str = "np.diagnose";
        let request = request.to_owned();
        self.asker
            .ask(DIAGNOSE, move |worker| {
                Box::pin(async move {
                    let answer = worker.device.diagnose(&request);
                    answer.map_err(|failure| of(DIAGNOSE, failure))
                })
            })
            .await
    }
}

impl Backend for YusurBackend {
    fn info(&self) -> BackendInfo {
        self.info.clone()
    }

    fn capabilities(&self) -> Capabilities {
        self.shared.life().capabilities.clone()
    }

    fn epoch(&self) -> Epoch {
        self.shared.life().epoch
    }

    fn vf(&self) -> Option<&dyn VfAllocator> {
        self.shared.floor.as_ref()?.vf().map(|_| &self.floor as _)
    }

    fn steering(&self) -> Option<&dyn FlowSteering> {
        let steers = |_: &&Steering| self.shared.life().capabilities.steering.rules > 0;
        self.steering.as_ref().filter(steers).map(|part| part as _)
    }

    fn offload(&self) -> Option<&dyn NpOffload> {
        let offloads = |_: &&Offload| {
            let limits = &self.shared.life().limits;
            limits.slots > 0 || limits.connections > 0
        };
        self.offload.as_ref().filter(offloads).map(|part| part as _)
    }

    fn transport(&self) -> Option<&dyn ShmTransport> {
        self.shared.floor.as_ref()?.transport().map(|_| &self.floor as _)
    }

    fn ports(&self) -> Option<&dyn Ports> {
        self.shared.floor.as_ref()?.ports().map(|_| &self.floor as _)
    }

    fn events(&self) -> Box<dyn EventStream> {
        Box::new(self.shared.hub.subscribe())
    }
}
