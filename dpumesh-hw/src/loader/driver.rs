//! [`Driver`]: the way of one call into a foreign library and back.
//!
//! ```text
//! caller ── Exchange (request, room for the answer) ──► [thread of the library] ──► function
//!   ▲                                                            │ DM_DONE, DM_FAILED │ DM_PENDING: parked by token
//!   └────────────── oneshot ◄─────────────────────────────────────┴── poll_fd ─► poll ─┘
//! ```
//!
//! An [`Exchange`] owns all memory of a call and stays on the heap until the library is done with it, whatever the caller does
//! meanwhile: a future that is dropped, or whose deadline passed, leaves its exchange behind. With [`Calls::Guarded`] a thread of
//! the library's own makes the control calls, and their callers get `Timeout` after the deadline.
//!
//! # A library that hangs
//! No call may block for the deadline, whichever thread makes it. When one does, the card is failed: an [`Event::Health`] names
//! the function, and every further call is refused with `Abi` at once, without entering the library; `epoch` and
//! `capabilities` answer what was last known. It is not failed any more, and says so by another event, when that call has
//! come back. Callers on a thread of their own ([`super::watch`] sees them: frames, the quick calls, [`Calls::Inline`]) cannot
//! be freed from a function that never returns; those behind [`Calls::Guarded`] are.
//!
//! Closing waits for the library's `close` for [`CLOSING`] or the deadline, whichever is less, and for a failed card not at all: its
//! threads are left behind, and close the card should they ever come back. It is never closed while somebody is inside.
//!
//! # Why no process of its own
//! A library in another process could be killed. The same operations would go over a socket: every struct here has a size, points
//! only into its call's arena, and names calls by token, so that a frame is `operation, token, epoch, request arena` one way and
//! `token, status, error, answer arena` the other, with pointers sent as offsets; `poll_fd` is the socket; frames of ports
//! would use shared memory rings (`crate::shm`). Nothing of this is built: it costs a copy and two context switches per call.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError, Weak};
use std::thread::Thread;
use std::time::{Duration, Instant};

use dpumesh_core::{Effect, Error, ErrorKind, Event, Fence, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::sync::oneshot;

use super::Calls;
use super::abi::*;
use super::arena::{Arena, Broken, Reader, Rows, Sized32};
use super::codec::{get_error, get_event};
use super::watch::{Operation, Watch};
use crate::events::EventHub;

/// How long closing waits for a library.
const CLOSING: Duration = Duration::from_secs(1);
/// How long nobody looks after a hang, at most: for the events of a card with a long deadline.
const LOOKS: Duration = Duration::from_secs(1);

/// One open card of a library, and the calls in flight.
pub(super) struct Driver {
    pub(super) ops: dm_ops,
    pub(super) handle: u64,
    pub(super) name: String,
    pub(super) calls: Calls,
    pub(super) deadline: Duration,
    tokens: AtomicU64,
    parked: Mutex<Parked>,
    jobs: Mutex<VecDeque<Job>>,
    wake: EventFd,
    inside: Mutex<Option<(&'static str, Instant)>>,
    pub(super) watch: Watch,
    watcher: OnceLock<Thread>,
    /// A call hangs: nobody else enters.
    failed: AtomicBool,
    /// Which call, and since when.
    failure: Mutex<Option<(&'static str, Instant)>>,
    /// The last epoch that the library told.
    epoch: AtomicU64,
    closing: AtomicBool,
    closed: (Mutex<bool>, Condvar),
    hub: Weak<EventHub>,
    /// Room for an event; `None` once the card is closed.
    events: Mutex<Option<Box<[u128]>>>,
}

/// Pending calls by token; ends that arrived before their call was parked.
#[derive(Default)]
struct Parked {
    waiting: HashMap<u64, Waiter>,
    early: HashMap<u64, u32>,
}

type Waiter = Box<dyn FnOnce(u32) + Send>;

struct Job {
    operation: &'static str,
    run: Box<dyn FnOnce(&Driver) + Send>,
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Driver")
            .field("name", &self.name)
            .field("calls", &self.calls)
            .finish_non_exhaustive()
    }
}

/// How a call enters the library: never with a null function, since parts are checked before they are offered.
pub(super) type Enter<I, O> = unsafe fn(&dm_ops, u64, *mut dm_call, *mut I, *mut O) -> u32;

/// All memory of one call.
pub(super) struct Exchange<I, O> {
    call: dm_call,
    error: dm_error,
    arena: dm_arena,
    room: Box<[u128]>,
    /// What the input points to: held for the library, which reads it.
    request: Arena,
    pub(super) input: I,
    pub(super) output: O,
    status: u32,
}

// SAFETY: its pointers go to memory that it owns itself, on the heap; the library touches it only during the call.
unsafe impl<I, O> Send for Exchange<I, O> {}

impl<I, O> fmt::Debug for Exchange<I, O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Exchange")
            .field("token", &self.call.token)
            .finish_non_exhaustive()
    }
}

impl<I, O> Exchange<I, O> {
    /// Room for texts of so many octets in the answer.
    pub(super) fn new(request: Arena, input: I, output: O, room: usize) -> Box<Self> {
        let mut exchange = Box::new(Self {
            call: dm_call::empty(),
            error: dm_error::empty(),
            arena: dm_arena::empty(),
            room: vec![0; room.div_ceil(16)].into_boxed_slice(),
            request,
            input,
            output,
            status: DM_DONE,
        });
        exchange.offer();
        exchange
    }

    /// Tells the library what is where.
    fn offer(&mut self) {
        self.arena.at = self.room.as_mut_ptr().cast();
        self.arena.capacity = size_of_val(&*self.room) as u64;
        self.call.error = &raw mut self.error;
        self.call.arena = &raw mut self.arena;
    }

    /// Ready for another call in the same memory, once this one has ended.
    pub(super) fn again(&mut self, request: impl FnOnce(&mut Arena) -> I) {
        self.error = dm_error::empty();
        self.arena = dm_arena::empty();
        self.offer();
        self.request.clear();
        self.input = request(&mut self.request);
    }

    /// Octets for texts of the answer.
    pub(super) fn room(&self) -> usize {
        size_of_val(&*self.room)
    }

    /// Takes texts out of the answer.
    pub(super) fn reader(&self) -> Reader {
        Reader::within(self.room.as_ptr().cast(), size_of_val(&*self.room))
    }

    /// The answer did not fit; so much room is needed.
    pub(super) fn wants_more(&self) -> Option<usize> {
        (self.status == DM_MORE).then_some(self.arena.needed.max(self.arena.used) as usize)
    }

    fn enter(&mut self, driver: &Driver, enter: Enter<I, O>) -> u32 {
        // SAFETY: the table was checked, the handle is open, and all memory is this exchange's, which outlives the call.
        unsafe {
            enter(
                &driver.ops,
                driver.handle,
                &raw mut self.call,
                &raw mut self.input,
                &raw mut self.output,
            )
        }
    }
}

impl Driver {
    /// A driver of an open card. [`Driver::serve`] has to run on a thread of its own.
    pub(super) fn new(
        ops: dm_ops,
        handle: u64,
        name: String,
        calls: Calls,
        deadline: Duration,
        hub: &Arc<EventHub>,
    ) -> Result<Self, nix::Error> {
        Ok(Self {
            ops,
            handle,
            name,
            calls,
            deadline,
            tokens: AtomicU64::new(1),
            parked: Mutex::default(),
            jobs: Mutex::default(),
            wake: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
            inside: Mutex::default(),
            watch: Watch::default(),
            watcher: OnceLock::new(),
            failed: AtomicBool::new(false),
            failure: Mutex::default(),
            epoch: AtomicU64::new(0),
            closing: AtomicBool::new(false),
            closed: (Mutex::new(false), Condvar::new()),
            hub: Arc::downgrade(hub),
            events: Mutex::new(Some(vec![0; 4096].into_boxed_slice())),
        })
    }

    /// Makes a call and waits for its end, for at most the deadline.
    pub(super) async fn call<I: 'static, O: 'static>(
        self: &Arc<Self>,
        operation: &'static str,
        fence: Option<Fence>,
        mut exchange: Box<Exchange<I, O>>,
        enter: Enter<I, O>,
    ) -> Result<Box<Exchange<I, O>>> {
        let token = self.tokens.fetch_add(1, Ordering::Relaxed);
        exchange.call.token = token;
        // No card lives so long; and a fence must never pass for none.
        exchange.call.epoch = fence.map_or(DM_NO_FENCE, |fence| fence.0.0.min(DM_NO_FENCE - 1));
        let (sender, answer) = oneshot::channel();
        self.refuse_if_failed(operation)?;
        match self.calls {
            Calls::Inline => {
                let inside = self.watch.enter(Operation::named(operation));
                let status = exchange.enter(self, enter);
                drop(inside);
                if status != DM_PENDING {
                    return self.finish(operation, fence, status, exchange);
                }
                self.park(
                    token,
                    Box::new(move |status| drop(sender.send((status, exchange)))),
                );
            }
            Calls::Guarded => {
                let run = move |driver: &Self| {
                    if sender.is_closed() {
                        return; // nobody waits any more, and nothing was begun
                    }
                    match exchange.enter(driver, enter) {
                        DM_PENDING => {
                            driver.park(
                                token,
                                Box::new(move |status| drop(sender.send((status, exchange)))),
                            );
                        }
                        status => drop(sender.send((status, exchange))),
                    }
                };
                self.push(Job {
                    operation,
                    run: Box::new(run),
                });
            }
        }
        let mut waiting = Waiting {
            driver: self,
            token: Some(token),
        };
        let ended = tokio::time::timeout(self.deadline, answer).await;
        if let Ok(Ok((status, exchange))) = ended {
            waiting.token = None;
            return self.finish(operation, fence, status, exchange);
        }
        let effect = if fence.is_some() {
            Effect::Unknown
        } else {
            Effect::None
        };
        // A thread that has been inside for most of the deadline is why; one that came there late has much to do.
        let message = match self.inside() {
            Some((stuck, since)) if since.elapsed() >= self.deadline / 2 => {
                self.fail(stuck, since);
                format!(
                    "the library has not returned from `{stuck}` for {:?}: it blocks, which no call may",
                    since.elapsed()
                )
            }
            _ => format!("the library has not completed the call for {:?}", self.deadline),
        };
        drop(waiting);
        Err(Error::new(ErrorKind::Timeout, operation, message)
            .backend(self.name.clone())
            .effect(effect))
    }

    fn finish<I, O>(
        &self,
        operation: &'static str,
        fence: Option<Fence>,
        status: u32,
        mut exchange: Box<Exchange<I, O>>,
    ) -> Result<Box<Exchange<I, O>>> {
        exchange.status = status;
        match status {
            DM_DONE => Ok(exchange),
            DM_MORE if fence.is_none() => Ok(exchange),
            DM_FAILED => Err(self
                .check_size(&exchange.error)
                .and_then(|()| get_error(&exchange.error, operation, &self.name))
                .unwrap_or_else(|broken| self.broken(operation, fence.is_some(), broken))),
            status => {
                let broken = format!("it returned status {status}, which means nothing here");
                Err(self.broken(operation, fence.is_some(), broken))
            }
        }
    }

    /// The library may have overwritten the size of a struct that was made for it.
    fn check_size(&self, error: &dm_error) -> Result<(), Broken> {
        if (error.size as usize) < dm_error::LEAST {
            return Err(format!("dm_error of size {}", error.size));
        }
        Ok(())
    }

    /// An answer that breaks the interface. What changed, nobody can tell.
    pub(super) fn broken(&self, operation: &'static str, changes: bool, broken: Broken) -> Error {
        let effect = if changes { Effect::Unknown } else { Effect::None };
        Error::new(
            ErrorKind::Abi,
            operation,
            format!("the library broke the interface: {broken}"),
        )
        .backend(self.name.clone())
        .effect(effect)
    }

    fn park(&self, token: u64, waiter: Waiter) {
        let mut parked = locked(&self.parked);
        if let Some(status) = parked.early.remove(&token) {
            drop(parked);
            return waiter(status);
        }
        parked.waiting.insert(token, waiter);
    }

    fn push(&self, job: Job) {
        locked(&self.jobs).push_back(job);
        self.wake();
    }

    fn wake(&self) {
        // Full is as good as written: the reader has not looked yet.
        let _ = self.wake.write(1);
    }

    /// Which function the library's thread is in, if any, and since when.
    fn inside(&self) -> Option<(&'static str, Instant)> {
        *locked(&self.inside)
    }

    /// Refuses a call while another one hangs. Costs one load.
    #[inline]
    pub(super) fn refuse_if_failed(&self, operation: &'static str) -> Result<()> {
        if !self.has_failed() {
            return Ok(());
        }
        Err(self.refusal(operation))
    }

    /// A call hangs, and nobody may enter.
    pub(super) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }

    #[cold]
    fn refusal(&self, operation: &'static str) -> Error {
        let message = match *locked(&self.failure) {
            Some((stuck, since)) => format!(
                "the library has not returned from `{stuck}` for {:?}: the card is failed until it does",
                since.elapsed()
            ),
            None => "the library hung a moment ago".to_owned(),
        };
        Error::new(ErrorKind::Abi, operation, message).backend(self.name.clone())
    }

    /// From here on everybody is refused.
    fn fail(&self, stuck: &'static str, since: Instant) {
        if self.failed.load(Ordering::Relaxed) {
            return;
        }
        *locked(&self.failure) = Some((stuck, since));
        if self.failed.swap(true, Ordering::AcqRel) {
            return;
        }
        let error = self.refusal(stuck);
        tracing::error!(backend = self.name, %error, "a library hangs");
        self.raise(&Event::Health(Some(error)));
    }

    /// Nobody hangs any more.
    fn heal(&self) {
        if !self.failed.swap(false, Ordering::AcqRel) {
            return;
        }
        tracing::warn!(backend = self.name, "the library that hung has come back");
        self.raise(&Event::Health(None));
        self.wake(); // what it has to tell was not asked for meanwhile
    }

    fn raise(&self, event: &Event) {
        if let Some(hub) = self.hub.upgrade() {
            hub.raise(event);
        }
    }

    /// Looks whether a call hangs, or hangs no more. A failed card must be free of calls of half the deadline to be used again.
    fn look(&self) {
        let now = Instant::now();
        let patience = if self.has_failed() {
            self.deadline / 2
        } else {
            self.deadline
        };
        let overdue = |since: &Instant| now.saturating_duration_since(*since) >= patience;
        let thread = self.inside().filter(|(_, since)| overdue(since));
        let others = self.watch.look(now, patience);
        match thread.or_else(|| others.map(|(operation, since)| (operation.name(), since))) {
            Some((stuck, since)) => self.fail(stuck, since),
            None => self.heal(),
        }
    }

    /// Begins to look after calls that hang, until the card is closed.
    pub(super) fn watch(self: &Arc<Self>) -> std::io::Result<()> {
        let driver = Arc::downgrade(self);
        let pause = (self.deadline / 4).clamp(Duration::from_millis(1), LOOKS);
        let thread = std::thread::Builder::new().name("dpumesh-watch".to_owned());
        let thread = thread.spawn(move || {
            while let Some(driver) = driver.upgrade() {
                if *locked(&driver.closed.0) {
                    return;
                }
                driver.look();
                drop(driver);
                std::thread::park_timeout(pause);
            }
        })?;
        let _ = self.watcher.set(thread.thread().clone()); // once per driver
        Ok(())
    }

    /// The card's present life; the last one known while a call hangs.
    pub(super) fn epoch(&self) -> u64 {
        if !self.has_failed()
            && let Some(epoch) = self.ops.epoch
        {
            let _inside = self.watch.enter(Operation::EPOCH);
            // SAFETY: the handle is open.
            let now = unsafe { epoch(self.handle) };
            self.epoch.store(now, Ordering::Relaxed);
        }
        self.epoch.load(Ordering::Relaxed)
    }

    /// Closes an open port: at once, or by the library's thread when a call hangs.
    pub(super) fn close_port(&self, port: u64) {
        let Some(close) = self.ops.port_close else { return };
        if self.has_failed() {
            return self.push(Job {
                operation: "ports.close",
                // SAFETY: handle and port are open: jobs run before the card is closed, and this is the port's last use.
                run: Box::new(move |driver| unsafe { close(driver.handle, port) }),
            });
        }
        let _inside = self.watch.enter(Operation::CLOSE_PORT);
        // SAFETY: handle and port are open, and this was the port's last use.
        unsafe { close(self.handle, port) };
    }

    /// Runs calls, completions and events until the driver closes, then closes the card.
    pub(super) fn serve(&self) {
        let fd = self.ops.poll_fd.map_or(-1, |poll_fd| {
            // SAFETY: mandatory function, checked; the handle is open.
            self.enter_as("backend.poll_fd", || unsafe { poll_fd(self.handle) })
        });
        // SAFETY: the library's, open until `close`, which this thread calls last.
        let fd = (fd >= 0).then(|| unsafe { BorrowedFd::borrow_raw(fd) });
        let (mut idle, mut since) = (0_u32, Instant::now());
        while !self.closing.load(Ordering::Acquire) {
            let mut fds = vec![PollFd::new(self.wake.as_fd(), PollFlags::POLLIN)];
            fds.extend(fd.map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
            let _ = nix::poll::poll(&mut fds, PollTimeout::NONE); // an interrupted wait is a look for nothing
            let _ = self.wake.read();
            let worked = self.run_jobs() + self.pump_completions() + self.pump_events();
            // A descriptor that is readable for nothing, again and again, would take the whole processor.
            if worked > 0 || since.elapsed() > Duration::from_millis(20) {
                (idle, since) = (0, Instant::now());
            } else {
                idle += 1;
            }
            if idle > 64 {
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        *locked(&self.events) = None;
        self.run_jobs(); // ports that were left to this thread
        self.enter_as("backend.close", || {
            if let Some(close) = self.ops.close {
                // SAFETY: nobody holds the backend or a port of it any more.
                unsafe { close(self.handle) };
            }
        });
        *locked(&self.closed.0) = true;
        locked(&self.jobs).clear();
        self.closed.1.notify_all();
        if let Some(watcher) = self.watcher.get() {
            watcher.unpark();
        }
    }

    fn enter_as<T>(&self, operation: &'static str, run: impl FnOnce() -> T) -> T {
        *locked(&self.inside) = Some((operation, Instant::now()));
        let value = run();
        *locked(&self.inside) = None;
        value
    }

    fn run_jobs(&self) -> usize {
        let mut count = 0;
        loop {
            let Some(job) = locked(&self.jobs).pop_front() else {
                return count;
            };
            self.enter_as(job.operation, || (job.run)(self));
            count += 1;
        }
    }

    fn pump_completions(&self) -> usize {
        let Some(poll) = self.ops.poll else { return 0 };
        let mut ends = [dm_completion::empty(); 64];
        // SAFETY: the handle is open and the room is ours.
        let count = self.enter_as("backend.poll", || unsafe {
            poll(self.handle, ends.as_mut_ptr(), ends.len() as u32)
        });
        let ends = &ends[..(count as usize).min(ends.len())];
        for end in ends {
            let mut parked = locked(&self.parked);
            match parked.waiting.remove(&end.token) {
                Some(waiter) => {
                    drop(parked);
                    waiter(end.status);
                }
                // A token never given would stay for good: only those of calls not yet parked are kept.
                None if end.token < self.tokens.load(Ordering::Relaxed) && parked.early.len() < 1024 => {
                    parked.early.insert(end.token, end.status);
                }
                None => tracing::warn!(backend = self.name, token = end.token, "completion of no call"),
            }
        }
        if ends.len() == 64 {
            self.wake();
        }
        ends.len()
    }

    /// Has the library's thread hand on the events so far, and waits for that, at most the deadline: who listens for events
    /// learns that a library hangs, and must not hang in it himself.
    pub(super) async fn ask_for_events(&self) {
        let (sender, done) = oneshot::channel();
        let run = move |driver: &Self| {
            driver.pump_events();
            let _ = sender.send(()); // nobody has to wait any more
        };
        if self.has_failed() || self.is_closing() {
            return;
        }
        self.push(Job {
            operation: "backend.events",
            run: Box::new(run),
        });
        // Jobs are cleared after that is set.
        if !*locked(&self.closed.0) {
            let _ = tokio::time::timeout(self.deadline, done).await; // late is as good as never: the queue has what there is
        }
    }

    /// Hands on the library's events so far.
    pub(super) fn pump_events(&self) -> usize {
        let Some(mut room) = self.events_room() else {
            return 0;
        };
        let Some(room) = &mut *room else { return 0 };
        let mut count = 0;
        while count < 4096
            && let Some(event) = self.next_event(room)
        {
            count += 1;
            self.raise(&event);
        }
        if count == 4096 {
            self.wake();
        }
        count
    }

    /// Room for an event, when whoever asks for events now is done: not if that one hangs.
    fn events_room(&self) -> Option<MutexGuard<'_, Option<Box<[u128]>>>> {
        loop {
            if self.has_failed() {
                return None;
            }
            match self.events.try_lock() {
                Ok(room) => return Some(room),
                Err(TryLockError::Poisoned(room)) => return Some(room.into_inner()),
                // Short, since asking does not block; and should it do so, the card fails with the deadline.
                Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_micros(50)),
            }
        }
    }

    fn next_event(&self, room: &mut Box<[u128]>) -> Option<Event> {
        let next_event = self.ops.next_event?;
        for _ in 0..4 {
            let (mut event, mut error, mut arena) = (dm_event::empty(), dm_error::empty(), dm_arena::empty());
            event.error = &raw mut error;
            arena.at = room.as_mut_ptr().cast();
            arena.capacity = size_of_val(&**room) as u64;
            let inside = self.watch.enter(Operation::EVENTS);
            // SAFETY: the handle is open and all memory is ours.
            let status = unsafe { next_event(self.handle, &raw mut event, &raw mut arena) };
            drop(inside);
            match status {
                DM_EMPTY => return None,
                DM_DONE => {
                    let reader = Reader::within(arena.at, arena.capacity as usize);
                    let read = get_event(&event, &error, &self.name, &reader);
                    return Some(read.unwrap_or_else(|broken| self.sick(broken)));
                }
                DM_MORE if arena.needed <= 1 << 26 => {
                    let octets = arena.needed.max(arena.capacity * 2) as usize;
                    *room = vec![0; octets.div_ceil(16)].into_boxed_slice();
                }
                status => return Some(self.sick(format!("next_event returned {status}"))),
            }
        }
        Some(self.sick("next_event wants more room each time".to_owned()))
    }

    fn sick(&self, broken: Broken) -> Event {
        Event::Health(Some(self.broken("backend.events", false, broken)))
    }

    /// The card is closed, or about to be.
    pub(super) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    /// Ends the thread and with it the card.
    pub(super) fn close_soon(&self) {
        self.closing.store(true, Ordering::Release);
        self.wake();
    }

    /// Ends the thread and with it the card. Waits for it at most [`CLOSING`], and not at all when a call hangs.
    pub(super) fn close(&self) {
        self.close_soon();
        if self.has_failed() {
            return tracing::warn!(
                backend = self.name,
                "a library that hangs is left behind, its card open"
            );
        }
        let patience = self.deadline.min(CLOSING);
        let closed = locked(&self.closed.0);
        let waited = self
            .closed
            .1
            .wait_timeout_while(closed, patience, |closed| !*closed)
            .unwrap_or_else(PoisonError::into_inner);
        if waited.1.timed_out() {
            tracing::warn!(
                backend = self.name,
                "a card takes its time to close: nobody waits for it"
            );
        }
    }
}

/// Tells the library when nobody waits for a call any more.
struct Waiting<'a> {
    driver: &'a Driver,
    token: Option<u64>,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if let (Some(token), Some(cancel)) = (self.token, self.driver.ops.cancel)
            && !self.driver.has_failed()
        {
            let _inside = self.driver.watch.enter(Operation::CANCEL);
            // SAFETY: the handle is open: whoever waits holds the backend. An unknown token is ignored by contract.
            unsafe { cancel(self.driver.handle, token) };
        }
    }
}

/// Room for an answer of elements.
pub(super) struct Listing {
    pub(super) raw: dm_rows,
    pub(super) rows: Rows,
}

impl Listing {
    /// Room for so many.
    pub(super) fn of<T: Sized32>(capacity: usize) -> Self {
        let mut rows = Rows::of::<T>(capacity);
        Self {
            raw: rows.as_rows(),
            rows,
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
