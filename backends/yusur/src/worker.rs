//! The one thread that talks to the card, and the lives of the card.
//!
//! ```text
//! steering ┐                                   ┌─► Rules: decide ─► Script
//! offload  ├─ ask ─► worker (own runtime) ─────┼─► floor's steering: software first
//! extras   ┘            ▲           ▲          └─► library: tables, entries, counters
//!            events of the floor    waiter: blocks in the library's `wait`
//! ```
//!
//! Calls of the library block for as long as the hardware takes; here they block nobody else. They are carried out one
//! after the other in the order in which they were asked for, so there is one writer and no lock. A caller who drops its
//! future has its call carried out all the same.
//!
//! # Lives
//! The card is away while the processor or the floor is. It is back when both are: the worker has then put every rule back
//! (those that the new life's limits still allow), with a new epoch, and counters begin at zero. The epoch is the
//! floor's plus the processor's resets, so it grows whichever was reset, and a new process finds the same.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use dpumesh_core::backend::EventStream;
use dpumesh_core::{
    Backend, BackendExt, Capabilities, Effect, Epoch, Error, ErrorKind, Event, EventKinds, Fence, Result,
};
use dpumesh_hw::events::{EventHub, HighWater};
use tokio::sync::{mpsc, oneshot};

use crate::capability;
use crate::error::{NAME, error, of};
use crate::options::Options;
use crate::rules::Rules;
use crate::sys::{Device, Failure};
use crate::table::{self, Info, Limits};
use crate::watch::{self, Hang};

/// How long the waiter stays in the library at a time: the longest that a dropped backend keeps its handle.
const WAIT_MS: u32 = 200;

/// How often a card that is back is tried, and the time between.
const ATTEMPTS: u32 = 5;
const PAUSE: std::time::Duration = std::time::Duration::from_millis(100);

/// Something to do on the worker's thread.
type Job = Box<dyn for<'a> FnOnce(&'a mut Worker) -> Pin<Box<dyn Future<Output = ()> + 'a>> + Send>;

/// What facades and worker share: cheap to read, never held across an await.
#[derive(Debug)]
pub(crate) struct Shared {
    life: Mutex<Life>,
    pub(crate) hub: EventHub,
    pub(crate) floor: Option<Arc<dyn Backend>>,
}

/// The card's present life.
#[derive(Clone, Debug)]
pub(crate) struct Life {
    pub(crate) alive: bool,
    pub(crate) epoch: Epoch,
    pub(crate) capabilities: Capabilities,
    pub(crate) limits: Limits,
}

impl Shared {
    pub(crate) fn life(&self) -> MutexGuard<'_, Life> {
        // Written in one assignment: a panic elsewhere leaves it whole.
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The present life of a card that is there.
    pub(crate) fn present(&self, operation: &'static str) -> Result<Life> {
        let life = self.life().clone();
        if life.alive {
            return Ok(life);
        }
        Err(error(ErrorKind::DeviceLost, operation, "the card is away"))
    }

    /// The floor's fence for a caller whose own is of the present life.
    pub(crate) fn fenced(&self, fence: Fence, operation: &'static str) -> Result<Life> {
        let life = self.present(operation)?;
        if fence.0 == life.epoch {
            return Ok(life);
        }
        let message = format!(
            "the fence is of epoch {}, the card is in epoch {}: read the state again",
            fence.0.0, life.epoch.0
        );
        Err(error(ErrorKind::Stale, operation, message).object("fence"))
    }

    /// Raises an event of a kind that the card has.
    pub(crate) fn raise(&self, event: &Event) {
        let needed = match event {
            Event::Link { .. } => EventKinds::LINK,
            Event::Health(_) => EventKinds::HEALTH,
            Event::HighWater { .. } => EventKinds::HIGH_WATER,
            Event::Aged { .. } => EventKinds::AGED,
            Event::VfAdded(_) | Event::VfRemoved(_) => EventKinds::VF,
            _ => EventKinds::empty(),
        };
        if self.life().capabilities.events.contains(needed) {
            self.hub.raise(event);
        }
    }
}

/// The way to the worker.
#[derive(Clone, Debug)]
pub(crate) struct Asker {
    jobs: mpsc::UnboundedSender<Job>,
    hung: tokio::sync::watch::Receiver<Option<Hang>>,
}

impl Asker {
    /// Has something done by the worker, after what was asked for before. Does not wait for a library that hangs.
    pub(crate) async fn ask<T: Send + 'static>(
        &self,
        operation: &'static str,
        job: impl for<'a> FnOnce(&'a mut Worker) -> Pin<Box<dyn Future<Output = Result<T>> + 'a>> + Send + 'static,
    ) -> Result<T> {
        let mut hung = self.hung.clone();
        if let Some(hang) = *hung.borrow_and_update() {
            return Err(error(ErrorKind::Abi, operation, hang.to_string()));
        }
        let (reply, answer) = oneshot::channel();
        let job: Job = Box::new(move |worker| {
            Box::pin(async move {
                let _ = reply.send(job(worker).await); // the caller may have left
            })
        });
        let gone = || {
            error(
                ErrorKind::Fault,
                operation,
                "the thread that talks to the card has ended",
            )
        };
        self.jobs.send(job).map_err(|_| gone())?;
        tokio::select! {
            biased;
            answer = answer => answer.map_err(|_| gone())?,
            hang = hung.wait_for(Option::is_some) => {
                let message = hang.ok().and_then(|hang| *hang).map_or_else(String::new, |hang| hang.to_string());
                Err(error(ErrorKind::Timeout, operation, message).effect(Effect::Unknown))
            }
        }
    }
}

/// The thread's state.
pub(crate) struct Worker {
    pub(crate) device: Arc<Device>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) rules: Rules,
    pub(crate) generation: u64,
    /// The card may have done something else than the books say: its tables have to be read.
    pub(crate) unsure: bool,
    pub(crate) marks: HighWater,
    np_alive: bool,
    floor_alive: bool,
    /// The floor's life that the present one of the card was made with.
    floor_epoch: Option<Epoch>,
    role: dpumesh_core::Role,
}

/// Opens the card and starts its threads.
///
/// # Errors
/// What the library says; nothing is left running.
pub(crate) fn start(device: Device, info: &Info, options: &Options) -> Result<(Asker, Arc<Shared>)> {
    let failed = |failure: Failure| of("backend.open", failure);
    let io = |source: std::io::Error| error(ErrorKind::Io, "backend.open", format!("no thread: {source}"));
    let limits = device.limits().map_err(failed)?;
    let floor = options.floor.clone();
    let epoch = epoch(floor.as_deref(), info.generation);
    let capabilities = capability::of(&limits, info.mode, floor.as_deref(), options.role);
    let rules = Rules::new(limits, &capabilities.steering, epoch);
    let shared = Arc::new(Shared {
        life: Mutex::new(Life {
            alive: true,
            epoch,
            capabilities,
            limits,
        }),
        hub: EventHub::default(),
        floor,
    });
    let device = Arc::new(device);
    let hung = device.watch().hung();
    watch::start(device.watch(), options.deadline, tell(&shared)).map_err(io)?;
    let (jobs, queue) = mpsc::unbounded_channel();
    let worker = Worker {
        device: Arc::clone(&device),
        shared: Arc::clone(&shared),
        rules,
        generation: info.generation,
        unsure: false,
        marks: HighWater::default(),
        np_alive: true,
        floor_alive: true,
        floor_epoch: options.floor.as_ref().map(|floor| floor.epoch()),
        role: options.role,
    };
    let owners = options.owners.clone();
    let events = shared.floor.as_ref().map(|floor| floor.events());
    let (ready, opened) = std::sync::mpsc::channel();
    thread::Builder::new()
        .name("yusur".to_owned())
        .spawn(move || run(worker, queue, events, &owners, &ready))
        .map_err(io)?;
    let down = |_| {
        error(
            ErrorKind::Fault,
            "backend.open",
            "the card's thread ended at once",
        )
    };
    opened.recv().map_err(down)??;
    let weak = jobs.downgrade();
    thread::Builder::new()
        .name("yusur-wait".to_owned())
        .spawn(move || wait(&device, &weak))
        .map_err(io)?;
    Ok((Asker { jobs, hung }, shared))
}

/// Tells subscribers of a library that hangs, and that it does no more.
fn tell(shared: &Arc<Shared>) -> impl FnMut(Option<Hang>) + Send + 'static {
    let shared = Arc::downgrade(shared);
    move |hang| {
        let Some(shared) = shared.upgrade() else { return };
        match hang {
            Some(hang) => tracing::error!(backend = NAME, function = hang.function, "the library hangs"),
            None => tracing::info!(backend = NAME, "the library does not hang any more"),
        }
        let ill = hang.map(|hang| error(ErrorKind::Timeout, "backend.health", hang.to_string()));
        shared.raise(&Event::Health(ill));
    }
}

/// The worker's thread.
fn run(
    mut worker: Worker,
    mut queue: mpsc::UnboundedReceiver<Job>,
    mut events: Option<Box<dyn EventStream>>,
    owners: &[dpumesh_core::steering::Owner],
    ready: &std::sync::mpsc::Sender<Result<()>>,
) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(source) => {
            let message = format!("no runtime: {source}");
            let _ = ready.send(Err(error(ErrorKind::Io, "backend.open", message)));
            return;
        }
    };
    runtime.block_on(async {
        let begun = worker.begin(owners).await;
        let is_open = begun.is_ok();
        if ready.send(begun).is_err() || !is_open {
            return;
        }
        loop {
            let event = async {
                match &mut events {
                    Some(events) => events.next().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                job = queue.recv() => match job {
                    Some(job) => job(&mut worker).await,
                    None => return,
                },
                event = event => match event {
                    Some(event) => worker.floor_event(event).await,
                    None => events = None,
                },
            }
        }
    });
}

/// The waiter's thread: carries the library's events to the worker.
fn wait(device: &Device, jobs: &mpsc::WeakUnboundedSender<Job>) {
    let healthy = AtomicBool::new(true);
    loop {
        let events = device.wait(WAIT_MS);
        let Some(jobs) = jobs.upgrade() else { return };
        let job: Job = match events {
            Ok(events) if events.is_empty() => continue,
            Ok(events) => {
                healthy.store(true, Ordering::Relaxed);
                Box::new(move |worker| {
                    Box::pin(async move {
                        for event in events {
                            worker.np_event(event).await;
                        }
                    })
                })
            }
            Err(failure) => {
                // A library that cannot even wait: say so once, and do not spin.
                let is_news = healthy.swap(false, Ordering::Relaxed);
                thread::sleep(std::time::Duration::from_millis(WAIT_MS.into()));
                if !is_news {
                    continue;
                }
                let event = Event::Health(Some(of("backend.events", failure)));
                Box::new(move |worker| {
                    Box::pin(async move {
                        worker.shared.raise(&event);
                    })
                })
            }
        };
        if jobs.send(job).is_err() {
            return;
        }
    }
}

fn epoch(floor: Option<&dyn Backend>, generation: u64) -> Epoch {
    let resets = generation.saturating_sub(1);
    Epoch(floor.map_or(1, |floor| floor.epoch().0).saturating_add(resets))
}

impl Worker {
    /// A clean slate: what a former process left in the processor and, of these owners, in software.
    async fn begin(&mut self, owners: &[dpumesh_core::steering::Owner]) -> Result<()> {
        self.clean_slate()
            .map_err(|failure| of("backend.open", failure))?;
        if let Some(floor) = &self.shared.floor
            && let Some(steering) = floor.steering()
        {
            for owner in owners {
                steering.flush(floor.fence(), *owner).await?;
            }
        }
        Ok(())
    }

    /// Empties the processor's tables and lets software have what they miss.
    fn clean_slate(&self) -> std::result::Result<(), Failure> {
        let limits = self.rules.tables.limits();
        if limits.entries == 0 {
            return Ok(());
        }
        self.device.steering_flush(self.generation)?;
        if self.soft().is_some() {
            self.device
                .miss_set(self.generation, table::ALL_PORTS, table::MISS_SOC)?;
        }
        Ok(())
    }

    /// Software under the processor.
    pub(crate) fn soft(&self) -> Option<&Arc<dyn Backend>> {
        self.shared
            .floor
            .as_ref()
            .filter(|floor| floor.steering().is_some())
    }

    /// Says that the processor is gone when a call found out before the event came.
    pub(crate) fn look_at(&mut self, failure: &Failure) {
        if crate::error::is_lost(failure) {
            self.np_alive = false;
            self.lose();
        }
    }

    fn lose(&mut self) {
        let epoch = {
            let mut life = self.shared.life();
            if !life.alive {
                return;
            }
            life.alive = false;
            life.epoch
        };
        tracing::warn!(backend = NAME, epoch = epoch.0, "the card is away");
        self.shared.hub.raise(&Event::Lost { epoch });
    }

    async fn np_event(&mut self, event: table::Event) {
        match event.kind {
            table::EVENT_LOST if event.value >= self.generation => {
                self.np_alive = false;
                self.lose();
            }
            table::EVENT_BACK if event.value > self.generation => {
                // A loss that was too short to be told is one all the same.
                self.lose();
                self.np_alive = true;
                self.generation = event.value;
                self.come_back().await;
            }
            table::EVENT_AGED => self.aged(event.value).await,
            table::EVENT_HEALTH => {
                let message = format!("the card reports condition {}", event.value);
                let ill = error(ErrorKind::Fault, "backend.events", message).vendor_code(event.value as i64);
                let health = (event.value != 0).then_some(ill);
                self.shared.raise(&Event::Health(health));
            }
            _ => {}
        }
    }

    async fn floor_event(&mut self, event: Event) {
        match event {
            // Events of lives before the one that the card's present life was made with are old news.
            Event::Lost { epoch } if self.floor_epoch.is_some_and(|known| epoch < known) => {}
            Event::Back { epoch }
                if self.floor_epoch.is_some_and(|known| epoch <= known) && self.floor_alive => {}
            Event::Lost { .. } => {
                self.floor_alive = false;
                self.lose();
            }
            Event::Back { .. } => {
                self.lose();
                self.floor_alive = true;
                self.come_back().await;
            }
            Event::Aged { owner, rules } => self.aged_in_software(owner, rules),
            // The floor's rules are this backend's own copies.
            Event::HighWater { ref resource, .. } if resource.starts_with("steering.") => {}
            Event::Overflowed(_) => {
                // Something was missed, perhaps a life: the floor's epoch tells.
                self.shared.hub.raise(&event);
            }
            other => self.shared.raise(&other),
        }
    }

    /// The card begins a new life, once processor and floor are both there.
    async fn come_back(&mut self) {
        if !self.np_alive || !self.floor_alive {
            return;
        }
        let begun = std::time::Instant::now();
        let mut revived = self.revive().await;
        for _ in 1..ATTEMPTS {
            match &revived {
                Err(failed) if failed.kind != ErrorKind::DeviceLost => {
                    tracing::warn!(backend = NAME, %failed, "the card does not take its rules back: once more");
                    tokio::time::sleep(PAUSE).await;
                    revived = self.revive().await;
                }
                _ => break,
            }
        }
        match revived {
            Ok(rules) => {
                let epoch = self.shared.life().epoch;
                let ms = begun.elapsed().as_millis() as u64;
                tracing::info!(backend = NAME, epoch = epoch.0, rules, ms, "the card is back");
            }
            // Lost again, and its return will be told; anything else the owners see in the health.
            Err(failed) if failed.kind == ErrorKind::DeviceLost => {}
            Err(failed) => self.shared.raise(&Event::Health(Some(failed))),
        }
    }

    async fn revive(&mut self) -> Result<usize> {
        const BACK: &str = "backend.back";
        let info = self.device.info().map_err(|failure| of(BACK, failure))?;
        if info.alive == 0 {
            return Err(error(ErrorKind::DeviceLost, BACK, "the processor is away again"));
        }
        self.generation = info.generation;
        let limits = self.device.limits().map_err(|failure| of(BACK, failure))?;
        let floor = self.shared.floor.clone();
        let capabilities = capability::of(&limits, info.mode, floor.as_deref(), self.role);
        let epoch = epoch(floor.as_deref(), info.generation);
        if let Some(floor) = &floor
            && let Some(steering) = floor.steering()
        {
            steering.occupancy().await?; // `DeviceLost` when the floor is away
        }
        let fresh = Rules::new(limits, &capabilities.steering, epoch);
        let former = std::mem::replace(&mut self.rules, fresh);
        self.unsure = false;
        let revived = self.refill(&former, &capabilities).await;
        let count = match revived {
            Ok(count) => count,
            Err(failed) => {
                self.rules = former; // for the next attempt
                return Err(failed);
            }
        };
        self.floor_epoch = floor.as_ref().map(|floor| floor.epoch());
        {
            let mut life = self.shared.life();
            life.epoch = life.epoch.max(epoch);
            life.capabilities = capabilities;
            life.limits = limits;
            life.alive = true;
        }
        let epoch = self.shared.life().epoch;
        self.shared.hub.raise(&Event::Back { epoch });
        self.look_at_marks();
        Ok(count)
    }

    /// Puts meters and rules of the former life into the new one.
    async fn refill(&mut self, former: &Rules, capabilities: &Capabilities) -> Result<usize> {
        const BACK: &str = "backend.back";
        self.clean_slate().map_err(|failure| of(BACK, failure))?;
        let meters = self.rules.tables.limits().meters;
        for (id, meter) in former.tables.meters() {
            if id.0 < meters {
                let set = self.device.meter_set(self.generation, id.0, meter);
                set.map_err(|failure| of(BACK, failure))?;
                self.rules.tables.set_meter(*id, *meter);
            }
        }
        let same_floor = self.floor_epoch == self.shared.floor.as_ref().map(|floor| floor.epoch());
        self.replay(former, capabilities, same_floor).await
    }

    /// Raises `HighWater` for what passed its mark.
    pub(crate) fn look_at_marks(&mut self) {
        let mut occupancy = self.rules.occupancy();
        if let Ok((connections, _)) = self.device.connection_count() {
            occupancy.push(dpumesh_core::steering::Occupancy {
                resource: "offload.connections".to_owned(),
                used: connections,
                limit: self.shared.life().limits.connections,
            });
        }
        for event in self.marks.look(&occupancy) {
            self.shared.raise(&event);
        }
    }

    /// An error of the present operation, after looking whether it means that the card is away.
    pub(crate) fn failed(&mut self, operation: &'static str, failure: Failure) -> Error {
        self.look_at(&failure);
        of(operation, failure)
    }
}
