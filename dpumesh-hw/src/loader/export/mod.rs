//! A backend of ours as a foreign library: the other side of the interface.
//!
//! [`crate::export_backend!`] in a `cdylib` crate makes the symbol; [`through`] does the same within one process, for tests and
//! benches. A call is polled once where it arrives; what is not ready then goes on in a runtime of the library's own, and
//! is pending. Panics end here: the call that met one is a `Fault` with effect unknown, and the loader's log has it ([`log`]).
//!
//! ```
//! use std::sync::Arc;
//! use dpumesh_core::{Backend, Error};
//! use dpumesh_hw::memory::MemoryCard;
//!
//! /// The configuration is the JSON of the manifest's `[config]`.
//! fn open(config: &str) -> Result<Arc<dyn Backend>, Error> {
//!     assert_eq!(config, "{}");
//!     Ok(MemoryCard::default().both())
//! }
//!
//! dpumesh_hw::export_backend!(open); // `dpumesh_backend_v1` of this library
//! # fn main() {}
//! ```

mod host;
mod instance;
mod offload;
mod ports;
mod rig;
mod steering;
mod vf;

use std::collections::HashMap;
use std::fmt;
use std::panic::catch_unwind;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use dpumesh_core::offload::Program;
use dpumesh_core::{Backend, Error, ErrorKind, PortRef, Result};

use super::abi::*;
use super::arena::{Arena, Reader, Sized32, write_over, write_sized};
use super::codec::{put_capabilities, put_error, put_event, put_info};
use super::{Calls, Library, LoadError, Manifest};
pub use host::log;
use instance::{Instance, stop};

/// What a constructor returns: a backend, and what the conformance kit may do to its card.
pub struct Exported {
    backend: Arc<dyn Backend>,
    rig: Option<Arc<dyn CardRig>>,
}

impl fmt::Debug for Exported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Exported")
            .field("backend", &self.backend)
            .field("rig", &self.rig.is_some())
            .finish()
    }
}

impl Exported {
    /// A backend whose card the kit may play with; export it with `export_backend!(open, rig)`.
    pub fn with_rig(backend: Arc<dyn Backend>, rig: Arc<dyn CardRig>) -> Self {
        Self {
            backend,
            rig: Some(rig),
        }
    }
}

impl<B: Backend + 'static> From<Arc<B>> for Exported {
    fn from(backend: Arc<B>) -> Self {
        Self { backend, rig: None }
    }
}

impl From<Arc<dyn Backend>> for Exported {
    fn from(backend: Arc<dyn Backend>) -> Self {
        Self { backend, rig: None }
    }
}

/// What the conformance kit may do to a card from outside (`crate::conformance::Rig` in few words). All at once and without
/// waiting.
pub trait CardRig: Send + Sync {
    /// The card vanishes.
    fn lose(&self);

    /// The card returns with a new epoch.
    fn bring_back(&self);

    /// Hands a frame in at a port; false when there is no such port.
    fn inject(&self, port: PortRef, octets: &[u8]) -> bool;

    /// The next frame that left by a port.
    fn observe(&self, port: PortRef) -> Option<Vec<u8>>;

    /// Makes a namespace known under a path, or takes it away.
    fn netns(&self, path: &str, present: bool);

    /// Makes moves of a VF fail, or work again.
    fn jam(&self, port: PortRef, jammed: bool);

    /// Takes a VF away behind the backend's back.
    fn strand(&self, port: PortRef);
}

/// How a library makes a backend.
pub trait Constructor: 'static {
    /// Opens a card by the library's configuration, as JSON.
    ///
    /// # Errors
    /// What kept the card from being opened; the loader hands it on.
    fn open(config: &str) -> Result<Exported>;

    /// Programs that the processor takes, for the kit.
    fn programs() -> Vec<Program> {
        Vec::new()
    }
}

/// Exports a backend from a `cdylib` crate: `export_backend!(open)`, with `open` a
/// `fn(&str) -> Result<impl Into<Exported>, Error>`. `export_backend!(open, rig)` lets the conformance kit at cards whose
/// [`Exported`] has a rig. Once per library.
///
/// It expands to `unsafe` code: a crate that forbids it cannot be a library of this kind.
#[macro_export]
macro_rules! export_backend {
    (@backend $open:expr, $programs:expr) => {
        struct Exporter;

        impl $crate::loader::export::Constructor for Exporter {
            fn open(
                config: &str,
            ) -> ::std::result::Result<$crate::loader::export::Exported, $crate::loader::export::OpenError>
            {
                ($open)(config).map(::std::convert::Into::into)
            }

            fn programs() -> ::std::vec::Vec<$crate::loader::export::RigProgram> {
                $programs
            }
        }

        #[unsafe(no_mangle)]
        unsafe extern "C" fn dpumesh_backend_v1(
            host: *const $crate::loader::abi::dm_host,
            want: u32,
            ops: *mut $crate::loader::abi::dm_ops,
            error: *mut $crate::loader::abi::dm_error,
        ) -> u32 {
            // SAFETY: the loader upholds the interface's contract.
            unsafe { $crate::loader::export::getter::<Exporter>(host, want, ops, error) }
        }
    };
    ($open:expr) => {
        const _: () = {
    $crate::export_backend!(@backend $open, ::std::vec::Vec::new());
        };
    };
    ($open:expr, rig, $programs:expr) => {
        const _: () = {
    $crate::export_backend!(@backend $open, $programs);

            #[unsafe(no_mangle)]
            unsafe extern "C" fn dpumesh_conformance_v1(hooks: *mut $crate::loader::abi::dm_hooks) -> u32 {
                // SAFETY: the loader upholds the interface's contract.
                unsafe { $crate::loader::export::hooks::<Exporter>(hooks) }
            }
        };
    };
}

/// The error of a constructor, for the macro.
pub type OpenError = Error;
/// A program of the kit, for the macro.
pub type RigProgram = Program;

/// The getter of a library whose cards `C` opens.
///
/// # Safety
/// As of `dm_getter`: `ops` has room for `want` octets, `error` is null or tells its size, `host` stays valid.
pub unsafe extern "C" fn getter<C: Constructor>(
    host: *const dm_host,
    want: u32,
    ops: *mut dm_ops,
    error: *mut dm_error,
) -> u32 {
    // SAFETY: by contract.
    unsafe { host::keep(host) };
    if ops.is_null() || want < 16 {
        let told = Error::new(ErrorKind::Abi, "backend.load", "no room for the table");
        // SAFETY: null or the caller's.
        unsafe { write_over(error, &put_error(&told)) };
        return DM_FAILED;
    }
    let table = table::<C>();
    // SAFETY: `want` octets are the caller's.
    unsafe {
        write_sized(ops, want as usize, &table);
        (*ops).size = size_of::<dm_ops>() as u32;
    }
    DM_DONE
}

/// The conformance hooks of a library whose cards `C` opens.
///
/// # Safety
/// `hooks` tells its size.
pub unsafe extern "C" fn hooks<C: Constructor>(hooks: *mut dm_hooks) -> u32 {
    // SAFETY: the caller's, by contract.
    unsafe { write_over(hooks, &rig::table::<C>()) };
    DM_DONE
}

fn table<C: Constructor>() -> dm_ops {
    let mut table = dm_ops::empty();
    table.abi_major = DM_ABI_MAJOR;
    table.abi_minor = DM_ABI_MINOR;
    table.flags = DM_THREAD_SAFE;
    table.open = Some(open::<C>);
    table.close = Some(close);
    table.info = Some(info);
    table.capabilities = Some(capabilities);
    table.epoch = Some(epoch);
    table.poll_fd = Some(poll_fd);
    table.poll = Some(poll);
    table.next_event = Some(next_event);
    table.cancel = Some(cancel);
    vf::fill(&mut table);
    steering::fill(&mut table);
    offload::fill(&mut table);
    ports::fill(&mut table);
    table
}

unsafe extern "C" fn open<C: Constructor>(config: dm_str, handle: *mut u64, error: *mut dm_error) -> u32 {
    let opened = catch_unwind(|| {
        let config = Reader::trusting()
            .text(config, "config")
            .map_err(|broken| Error::new(ErrorKind::Abi, "backend.open", broken))?;
        Instance::new(C::open(&config)?)
    });
    let told = match opened {
        Ok(Ok(instance)) => {
            // SAFETY: the caller's, by contract.
            unsafe { handle.write(Box::into_raw(Box::new(instance)).expose_provenance() as u64) };
            return DM_DONE;
        }
        Ok(Err(told)) => told,
        Err(payload) => instance::panicked("backend.open", &*payload),
    };
    // SAFETY: the caller's, by contract.
    unsafe { write_over(error, &put_error(&told)) };
    DM_FAILED
}

/// The instance behind a handle.
///
/// # Safety
/// The handle is open: `open` gave it and `close` has not been called.
unsafe fn instance<'a>(handle: u64) -> &'a Instance {
    // SAFETY: by contract it is a box of `open`, which `close` takes back last.
    unsafe { &*std::ptr::with_exposed_provenance::<Instance>(handle as usize) }
}

unsafe extern "C" fn close(handle: u64) {
    let instance = std::ptr::with_exposed_provenance_mut::<Instance>(handle as usize);
    // SAFETY: the last use of an open handle.
    let instance = unsafe { *Box::from_raw(instance) };
    stop("backend.close", (), || instance.close());
}

unsafe extern "C" fn info(handle: u64, to: *mut dm_info) {
    stop("backend.info", (), || {
        // SAFETY: open handle, the caller's memory.
        unsafe { write_over(to, &put_info(&instance(handle).backend.info())) };
    });
}

unsafe extern "C" fn capabilities(handle: u64, to: *mut dm_capabilities) {
    stop("backend.capabilities", (), || {
        // SAFETY: open handle.
        let backend = unsafe { &instance(handle).backend };
        let mut raw = put_capabilities(&backend.capabilities());
        let parts = [
            (DM_PART_VF, backend.vf().is_some()),
            (DM_PART_STEERING, backend.steering().is_some()),
            (DM_PART_OFFLOAD, backend.offload().is_some()),
            (DM_PART_PORTS, backend.ports().is_some()),
        ];
        for (part, there) in parts {
            raw.parts |= if there { part } else { 0 };
        }
        // SAFETY: the caller's memory.
        unsafe { write_over(to, &raw) };
    });
}

unsafe extern "C" fn epoch(handle: u64) -> u64 {
    stop("backend.epoch", 0, || {
        // SAFETY: open handle.
        unsafe { instance(handle) }.backend.epoch().0
    })
}

unsafe extern "C" fn poll_fd(handle: u64) -> i32 {
    // SAFETY: open handle.
    unsafe { instance(handle) }.poll_fd()
}

unsafe extern "C" fn poll(handle: u64, to: *mut dm_completion, capacity: u32) -> u32 {
    stop("backend.poll", 0, || {
        // SAFETY: open handle.
        let ends = unsafe { instance(handle) }.completions(capacity as usize);
        for (index, (token, status)) in ends.iter().enumerate() {
            let mut raw = dm_completion::empty();
            (raw.token, raw.status) = (*token, *status);
            // SAFETY: `capacity` elements of the caller, all of one size.
            unsafe { write_over(to.add(index), &raw) };
        }
        ends.len() as u32
    })
}

unsafe extern "C" fn next_event(handle: u64, to: *mut dm_event, arena: *mut dm_arena) -> u32 {
    stop("backend.events", DM_EMPTY, || {
        // SAFETY: open handle.
        let instance = unsafe { instance(handle) };
        loop {
            let Some(event) = instance.next_event() else {
                return DM_EMPTY;
            };
            // SAFETY: the caller's memory.
            let mut room = unsafe { Arena::of_caller(arena) };
            // SAFETY: the caller's struct, made by it.
            let error = unsafe { (*to).error };
            let Some(raw) = put_event(&event, error, &mut room) else {
                continue;
            };
            // SAFETY: the caller's structs.
            unsafe {
                instance::tell_arena(arena, &room);
                if room.overflowed() {
                    instance.keep_event(event);
                    return DM_MORE;
                }
                write_over(to, &raw);
            }
            return DM_DONE;
        }
    })
}

unsafe extern "C" fn cancel(handle: u64, token: u64) {
    // SAFETY: open handle.
    stop("backend.cancel", (), || unsafe { instance(handle) }.cancel(token));
}

/// Backends that wait to be opened behind the interface, by number.
static LINKED: Mutex<Option<HashMap<u64, Arc<dyn Backend>>>> = Mutex::new(None);

struct Linked;

impl Constructor for Linked {
    fn open(config: &str) -> Result<Exported> {
        let number = config.parse().ok();
        let mut waiting = LINKED.lock().unwrap_or_else(PoisonError::into_inner);
        number
            .and_then(|number: u64| waiting.as_mut()?.remove(&number))
            .map(Exported::from)
            .ok_or_else(|| {
                Error::new(
                    ErrorKind::NotFound,
                    "backend.open",
                    "no backend waits under this number",
                )
            })
    }
}

/// A backend of this program behind the C interface: the same table, the same checks, without the dynamic linker.
///
/// # Errors
/// What the loader finds wrong with the backend.
pub fn through(backend: Arc<dyn Backend>, calls: Calls) -> Result<Arc<dyn Backend>, LoadError> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    LINKED
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .get_or_insert_default()
        .insert(number, backend);
    let manifest = Manifest::of("linked")
        .with_calls(calls)
        .with_config(number.into());
    Library::linked(Some(getter::<Linked>), &manifest)?.connect()
}
