//! [`Instance`]: one open card of an exported backend, its runtime, and the calls that are pending.

use std::any::Any;
use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsRawFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::JoinHandle;

use dpumesh_core::backend::EventStream;
use dpumesh_core::{Backend, Effect, Epoch, Error, ErrorKind, Event, Fence, Result};
use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;
use tokio::task::AbortHandle;

use super::super::abi::*;
use super::super::arena::{Arena, Broken, Reader, Sized32, fill, write_over, write_sized};
use super::super::codec::{Spare, put_error};
use super::{CardRig, Exported, host};

/// One open card.
pub(super) struct Instance {
    pub(super) backend: Arc<dyn Backend>,
    pub(super) rig: Option<Arc<dyn CardRig>>,
    runtime: Handle,
    /// Ends the runtime's thread when dropped.
    stop: oneshot::Sender<()>,
    thread: JoinHandle<()>,
    pending: Arc<Pending>,
    events: Mutex<Events>,
    /// Lists of former batches.
    pub(super) spare: Arc<Mutex<Spare>>,
}

/// Calls that went on in the runtime.
struct Pending {
    bell: Arc<Bell>,
    ended: Mutex<VecDeque<(u64, u32)>>,
    running: Mutex<HashMap<u64, AbortHandle>>,
}

/// Makes the descriptor readable.
struct Bell(EventFd);

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        // Full is as good as written.
        let _ = self.0.write(1);
    }
}

/// The subscription of this card's opener. The wait for an event lives on between looks, so that its waker does.
struct Events {
    next: Option<Next>,
    kept: Option<Event>,
}

type Next = Pin<Box<dyn Future<Output = (Box<dyn EventStream>, Option<Event>)> + Send>>;

fn wait(mut stream: Box<dyn EventStream>) -> Next {
    Box::pin(async move {
        let event = stream.next().await;
        (stream, event)
    })
}

impl Instance {
    pub(super) fn new(exported: Exported) -> Result<Self> {
        let io = |error: std::io::Error| {
            Error::new(
                ErrorKind::Io,
                "backend.open",
                format!("no runtime for the library: {error}"),
            )
        };
        let runtime = Builder::new_current_thread().enable_all().build().map_err(io)?;
        let bell = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|error| io(error.into()))?;
        let (stop, stopped) = oneshot::channel::<()>();
        let handle = runtime.handle().clone();
        let thread = std::thread::Builder::new().name("dpumesh-export".to_owned());
        let thread = thread
            .spawn(move || drop(runtime.block_on(stopped)))
            .map_err(io)?;
        let events = Events {
            next: Some(wait(exported.backend.events())),
            kept: None,
        };
        Ok(Self {
            backend: exported.backend,
            rig: exported.rig,
            runtime: handle,
            stop,
            thread,
            pending: Arc::new(Pending {
                bell: Arc::new(Bell(bell)),
                ended: Mutex::default(),
                running: Mutex::default(),
            }),
            events: Mutex::new(events),
            spare: Arc::default(),
        })
    }

    /// Ends the runtime, and with it whatever is pending, before the backend goes.
    pub(super) fn close(self) {
        let Self { stop, thread, .. } = self;
        drop(stop);
        let _ = thread.join(); // a panic there has been told already
    }

    pub(super) fn poll_fd(&self) -> RawFd {
        self.pending.bell.0.as_raw_fd()
    }

    pub(super) fn completions(&self, most: usize) -> Vec<(u64, u32)> {
        let _ = self.pending.bell.0.read(); // silent again; what rings from now on is looked for again
        let mut ended = locked(&self.pending.ended);
        let taken = most.min(ended.len());
        ended.drain(..taken).collect()
    }

    pub(super) fn cancel(&self, token: u64) {
        if let Some(task) = locked(&self.pending.running).get(&token) {
            task.abort();
        }
    }

    pub(super) fn next_event(&self) -> Option<Event> {
        let mut events = locked(&self.events);
        if let Some(event) = events.kept.take() {
            return Some(event);
        }
        let _entered = self.runtime.enter();
        let waker = Waker::from(Arc::clone(&self.pending.bell));
        let next = events.next.as_mut()?;
        match next.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Pending => None,
            Poll::Ready((stream, event)) => {
                events.next = event.is_some().then(|| wait(stream));
                event
            }
        }
    }

    pub(super) fn keep_event(&self, event: Event) {
        locked(&self.events).kept = Some(event);
    }

    /// Carries out a call: reads its request, polls it once, and leaves what is not ready to the runtime.
    ///
    /// # Safety
    /// `call` and all it points to, and what `begin` and `reply` captured, stay valid until the call ended.
    pub(super) unsafe fn serve<T, F>(
        &self,
        operation: &'static str,
        call: *mut dm_call,
        begin: impl FnOnce(Arc<dyn Backend>, Fence, &Reader) -> Result<F, Broken>,
        reply: impl FnOnce(T, &mut Arena) -> bool + Send + 'static,
    ) -> u32
    where
        F: Future<Output = Result<T>> + Send + 'static,
        T: Send + 'static,
    {
        let call = Foreign(call);
        let begun = catch_unwind(AssertUnwindSafe(|| {
            // SAFETY: valid by contract.
            let fence = Fence(Epoch(unsafe { (*call.0).epoch }));
            let future = begin(Arc::clone(&self.backend), fence, &Reader::trusting());
            let mut future =
                Box::pin(future.map_err(|broken| Error::new(ErrorKind::Abi, operation, broken))?);
            let _entered = self.runtime.enter();
            match future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(result) => result.map(Ok),
                Poll::Pending => Ok(Err(future)),
            }
        }));
        let result = match begun {
            Ok(Ok(Err(future))) => {
                self.go_on(operation, call, future, reply);
                return DM_PENDING;
            }
            Ok(Ok(Ok(value))) => Ok(value),
            Ok(Err(error)) => Err(error),
            Err(payload) => Err(panicked(operation, &*payload)),
        };
        // SAFETY: valid by contract.
        unsafe { finish(operation, &call, result, reply) }
    }

    fn go_on<T, F>(
        &self,
        operation: &'static str,
        call: Foreign,
        future: Pin<Box<F>>,
        reply: impl FnOnce(T, &mut Arena) -> bool + Send + 'static,
    ) where
        F: Future<Output = Result<T>> + Send + 'static,
        T: Send + 'static,
    {
        // SAFETY: valid until the call ended.
        let token = unsafe { (*call.0).token };
        let pending = Arc::clone(&self.pending);
        let task = self.runtime.spawn(future);
        locked(&self.pending.running).insert(token, task.abort_handle());
        self.runtime.spawn(async move {
            let result = task.await.unwrap_or_else(|stopped| {
                if stopped.is_cancelled() {
                    let message = "the caller did not wait for the end";
                    return Err(Error::new(ErrorKind::Timeout, operation, message).effect(Effect::Unknown));
                }
                Err(panicked(operation, &*stopped.into_panic()))
            });
            locked(&pending.running).remove(&token);
            // SAFETY: the call ends with what is pushed below.
            let status = unsafe { finish(operation, &call, result, reply) };
            locked(&pending.ended).push_back((token, status));
            pending.bell.wake_by_ref();
        });
    }
}

/// A call's memory, which is the caller's.
struct Foreign(*mut dm_call);

// SAFETY: the interface lets a call end on another thread than it began on.
unsafe impl Send for Foreign {}

/// Memory of the caller for an answer.
pub(super) struct Out<T>(pub(super) *mut T);

// SAFETY: as for `Foreign`.
unsafe impl<T> Send for Out<T> {}

impl<T> Out<T> {
    /// The caller's struct.
    pub(super) fn get(&self) -> *mut T {
        self.0
    }
}

impl<T: Sized32> Out<T> {
    /// Writes the answer.
    pub(super) fn write(&self, value: &T) -> bool {
        // SAFETY: the caller's struct, which tells its size, until the call ended.
        unsafe { write_over(self.0, value) };
        true
    }
}

impl Out<dm_rows> {
    /// Writes the elements of the answer: true when all fitted.
    pub(super) fn fill<T: Sized32>(&self, values: &[T]) -> bool {
        // SAFETY: the caller's rows, until the call ended.
        unsafe { fill(self.0, values) }
    }

    /// Writes the failures among results and leaves the rest alone.
    pub(super) fn fill_errors(&self, results: &[Result<()>]) -> bool {
        // SAFETY: the caller's rows, until the call ended.
        let Some(rows) = (unsafe { self.0.as_mut() }) else {
            return false;
        };
        rows.len = results.len() as u64;
        let stride = rows.stride as usize;
        for (index, result) in results.iter().enumerate().take(rows.capacity as usize) {
            if let Err(error) = result {
                let to = rows.at.cast::<u8>().wrapping_add(index * stride).cast();
                // SAFETY: an element of the caller's rows.
                unsafe { write_sized(to, stride, &put_error(error)) };
            }
        }
        rows.len <= rows.capacity
    }
}

/// Writes what a call came to. Panics in the writing end here, too.
///
/// # Safety
/// The call has not ended.
unsafe fn finish<T>(
    operation: &'static str,
    call: &Foreign,
    result: Result<T>,
    reply: impl FnOnce(T, &mut Arena) -> bool,
) -> u32 {
    let written = catch_unwind(AssertUnwindSafe(|| {
        let value = match result {
            Ok(value) => value,
            Err(error) => {
                // SAFETY: the caller's, by contract.
                unsafe { write_over((*call.0).error, &put_error(&error)) };
                return DM_FAILED;
            }
        };
        // SAFETY: the caller's, by contract.
        let (given, changes) = unsafe { ((*call.0).arena, (*call.0).epoch != DM_NO_FENCE) };
        // SAFETY: the caller's, by contract.
        let mut arena = unsafe { Arena::of_caller(given) };
        let whole = reply(value, &mut arena) && !arena.overflowed();
        // SAFETY: the caller's, by contract.
        unsafe { tell_arena(given, &arena) };
        match (whole, changes) {
            (true, _) => DM_DONE,
            (false, false) => DM_MORE,
            (false, true) => {
                let told =
                    Error::new(ErrorKind::Fault, operation, "the answer has no room").effect(Effect::Applied);
                // SAFETY: the caller's, by contract.
                unsafe { write_over((*call.0).error, &put_error(&told)) };
                DM_FAILED
            }
        }
    }));
    written.unwrap_or_else(|payload| {
        // SAFETY: the caller's, by contract.
        unsafe { write_over((*call.0).error, &put_error(&panicked(operation, &*payload))) };
        DM_FAILED
    })
}

/// Says how much of the caller's arena was taken and needed.
///
/// # Safety
/// Null or the caller's struct.
pub(super) unsafe fn tell_arena(given: *mut dm_arena, arena: &Arena) {
    // SAFETY: by contract.
    if let Some(given) = unsafe { given.as_mut() } {
        (given.used, given.needed) = (arena.used(), arena.needed());
    }
}

/// Runs what cannot fail; the log has its panic, and this is the answer then.
pub(super) fn stop<T>(operation: &'static str, otherwise: T, run: impl FnOnce() -> T) -> T {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|payload| {
        drop(panicked(operation, &*payload));
        otherwise
    })
}

/// A panic as an error, which the log has already: nobody can tell what it left behind.
pub(super) fn panicked(operation: &'static str, payload: &(dyn Any + Send)) -> Error {
    let text = payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("without a message");
    let message = format!("the backend panicked: {text}");
    host::log(DM_LOG_ERROR, &format!("{operation}: {message}"));
    Error::new(ErrorKind::Fault, operation, message).effect(Effect::Unknown)
}

pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
