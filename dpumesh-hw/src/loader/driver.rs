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
//! the library's own makes the calls; when it does not come back within the deadline, the caller gets `Timeout`, and who calls
//! after that gets `Abi` at once, until it comes back.
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
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use dpumesh_core::{Effect, Error, ErrorKind, Event, Fence, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::sync::oneshot;

use super::Calls;
use super::abi::*;
use super::arena::{Arena, Broken, Reader, Rows, Sized32};
use super::codec::{get_error, get_event};
use crate::events::EventHub;

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
    /// A caller's deadline passed while the thread was inside a function, where it still is.
    stuck: AtomicBool,
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
    _request: Arena,
    pub(super) input: I,
    pub(super) output: O,
    status: u32,
}

// SAFETY: its pointers go to memory that it owns itself, on the heap; the library touches it only during the call.
unsafe impl<I, O> Send for Exchange<I, O> {}

impl<I, O> Exchange<I, O> {
    /// Room for texts of so many octets in the answer.
    pub(super) fn new(request: Arena, input: I, output: O, room: usize) -> Box<Self> {
        let mut exchange = Box::new(Self {
            call: dm_call::empty(),
            error: dm_error::empty(),
            arena: dm_arena::empty(),
            room: vec![0; room.div_ceil(16)].into_boxed_slice(),
            _request: request,
            input,
            output,
            status: DM_DONE,
        });
        exchange.arena.at = exchange.room.as_mut_ptr().cast();
        exchange.arena.capacity = size_of_val(&*exchange.room) as u64;
        exchange.call.error = &raw mut exchange.error;
        exchange.call.arena = &raw mut exchange.arena;
        exchange
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
            stuck: AtomicBool::new(false),
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
        match self.calls {
            Calls::Inline => {
                let status = exchange.enter(self, enter);
                if status != DM_PENDING {
                    return self.finish(operation, fence, status, exchange);
                }
                self.park(
                    token,
                    Box::new(move |status| drop(sender.send((status, exchange)))),
                );
            }
            Calls::Guarded => {
                self.refuse_if_stuck(operation)?;
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
        drop(waiting);
        let effect = if fence.is_some() {
            Effect::Unknown
        } else {
            Effect::None
        };
        Err(self.inside().map_or_else(
            || {
                let message = format!("the library has not completed the call for {:?}", self.deadline);
                Error::new(ErrorKind::Timeout, operation, message)
                    .backend(self.name.clone())
                    .effect(effect)
            },
            |(stuck, since)| {
                self.stuck.store(true, Ordering::Release);
                let message = format!(
                    "the library has not returned from `{stuck}` for {:?}: it blocks, which no call may",
                    since.elapsed()
                );
                Error::new(ErrorKind::Timeout, operation, message)
                    .backend(self.name.clone())
                    .effect(effect)
            },
        ))
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

    fn refuse_if_stuck(&self, operation: &'static str) -> Result<()> {
        match self.inside() {
            Some((stuck, since)) if self.stuck.load(Ordering::Acquire) => {
                let message = format!(
                    "the library has not returned from `{stuck}` for {:?}",
                    since.elapsed()
                );
                Err(Error::new(ErrorKind::Abi, operation, message).backend(self.name.clone()))
            }
            _ => Ok(()),
        }
    }

    /// Runs calls, completions and events until the driver closes, then closes the card.
    pub(super) fn serve(&self) {
        // SAFETY: mandatory function, checked; the handle is open.
        let fd = self
            .ops
            .poll_fd
            .map_or(-1, |poll_fd| unsafe { poll_fd(self.handle) });
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
        self.enter_as("backend.close", || {
            if let Some(close) = self.ops.close {
                // SAFETY: nobody holds the backend or a port of it any more.
                unsafe { close(self.handle) };
            }
        });
        locked(&self.jobs).clear();
        *locked(&self.closed.0) = true;
        self.closed.1.notify_all();
    }

    fn enter_as<T>(&self, operation: &'static str, run: impl FnOnce() -> T) -> T {
        *locked(&self.inside) = Some((operation, Instant::now()));
        let value = run();
        *locked(&self.inside) = None;
        self.stuck.store(false, Ordering::Release);
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

    /// Hands on the library's events so far.
    pub(super) fn pump_events(&self) -> usize {
        let mut room = locked(&self.events);
        let Some(room) = &mut *room else { return 0 };
        let mut count = 0;
        while count < 4096
            && let Some(event) = self.next_event(room)
        {
            count += 1;
            if let Some(hub) = self.hub.upgrade() {
                hub.raise(&event);
            }
        }
        if count == 4096 {
            self.wake();
        }
        count
    }

    fn next_event(&self, room: &mut Box<[u128]>) -> Option<Event> {
        let next_event = self.ops.next_event?;
        for _ in 0..4 {
            let (mut event, mut error, mut arena) = (dm_event::empty(), dm_error::empty(), dm_arena::empty());
            event.error = &raw mut error;
            arena.at = room.as_mut_ptr().cast();
            arena.capacity = size_of_val(&**room) as u64;
            // SAFETY: the handle is open and all memory is ours.
            match unsafe { next_event(self.handle, &raw mut event, &raw mut arena) } {
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

    /// Ends the thread and with it the card, and waits a little for it.
    pub(super) fn close(&self) {
        self.close_soon();
        let closed = locked(&self.closed.0);
        let _ = self
            .closed
            .1
            .wait_timeout_while(closed, self.deadline.min(Duration::from_secs(5)), |closed| {
                !*closed
            })
            .unwrap_or_else(PoisonError::into_inner);
    }
}

/// Tells the library when nobody waits for a call any more.
struct Waiting<'a> {
    driver: &'a Driver,
    token: Option<u64>,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if let (Some(token), Some(cancel)) = (self.token, self.driver.ops.cancel) {
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
