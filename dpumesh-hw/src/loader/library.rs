//! [`Library`]: from a file to a table that was checked, and from there to a card.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use dpumesh_core::{Backend, BackendInfo, Capabilities};

use super::abi::*;
use super::arena::Sized32;
use super::codec::{get_capabilities, get_error, get_info};
use super::driver::Driver;
use super::foreign::Foreign;
use super::hooks::Hooks;
use super::{Calls, LoadError, Manifest};
use crate::events::EventHub;
use crate::trust;

/// The symbol that a backend exports.
pub(super) const SYMBOL: &str = "dpumesh_backend_v1";
/// The symbol that lets the conformance kit at the card.
const HOOKS: &str = "dpumesh_conformance_v1";

/// A loaded library whose table keeps to the interface. It stays loaded for the life of the process: its threads, and
/// functions that others still hold, must not lose their code.
#[derive(Clone)]
pub struct Library {
    path: PathBuf,
    ops: dm_ops,
    hooks: Option<dm_hooks>,
    calls: Calls,
    deadline: Duration,
    required: Capabilities,
    config: String,
}

impl fmt::Debug for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Library")
            .field("path", &self.path)
            .field("abi", &(self.ops.abi_major, self.ops.abi_minor))
            .field("calls", &self.calls)
            .finish_non_exhaustive()
    }
}

impl Library {
    /// Loads the library of a manifest and opens its card: [`Library::load`], then [`Library::connect`].
    ///
    /// # Errors
    /// A [`LoadError`] that names what is wrong.
    pub fn open(manifest: &Manifest) -> Result<Arc<dyn Backend>, LoadError> {
        Self::load(manifest)?.connect()
    }

    /// Loads a library and checks its table. Blocks: what a library does when it is loaded takes its time, at most the
    /// deadline of the manifest.
    ///
    /// # Errors
    /// A [`LoadError`] that names what is wrong.
    pub fn load(manifest: &Manifest) -> Result<Self, LoadError> {
        let path = trust::real_path(&manifest.library)?;
        let (getter, hooks) = {
            let path = path.clone();
            within(manifest.deadline(), "dlopen", move || symbols(&path))??
        };
        Self::of_getter(path, getter, hooks, manifest)
    }

    /// A library that is part of this program: what [`crate::export_backend!`] made, without the dynamic linker.
    ///
    /// # Errors
    /// As [`Library::load`].
    pub fn linked(getter: dm_getter, manifest: &Manifest) -> Result<Self, LoadError> {
        Self::of_getter(manifest.library.clone(), getter, None, manifest)
    }

    fn of_getter(
        path: PathBuf,
        getter: dm_getter,
        hooks: Option<dm_hooks>,
        manifest: &Manifest,
    ) -> Result<Self, LoadError> {
        let ops = within(manifest.deadline(), SYMBOL, move || ask(getter))??;
        if manifest.calls == Calls::Inline && ops.flags & DM_THREAD_SAFE == 0 {
            let reason = "calls are to be inline, and the library does not say DM_THREAD_SAFE".to_owned();
            return Err(LoadError::Manifest { path, reason });
        }
        Ok(Self {
            path,
            ops,
            hooks,
            calls: manifest.calls,
            deadline: manifest.deadline(),
            required: manifest.required.clone(),
            config: manifest.config.to_string(),
        })
    }

    /// Where it was loaded from, links resolved.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it lets the conformance kit at its cards.
    pub fn has_hooks(&self) -> bool {
        self.hooks.is_some()
    }

    /// Opens the card by the manifest's configuration. Blocks until the library has opened it, at most the deadline.
    ///
    /// # Errors
    /// A [`LoadError`] that names what is wrong.
    pub fn connect(&self) -> Result<Arc<dyn Backend>, LoadError> {
        self.open_card(self.config.clone()).map(|(backend, _)| backend)
    }

    /// Opens the card by another configuration, with what the conformance kit may do to it.
    ///
    /// # Errors
    /// A [`LoadError`] that names what is wrong.
    pub fn connect_with(&self, config: &serde_json::Value) -> Result<(Arc<dyn Backend>, Hooks), LoadError> {
        self.open_card(config.to_string())
    }

    fn open_card(&self, config: String) -> Result<(Arc<dyn Backend>, Hooks), LoadError> {
        let hub = Arc::new(EventHub::default());
        let (sender, opened) = mpsc::sync_channel(1);
        let (library, thread_hub) = (self.clone(), Arc::downgrade(&hub));
        let thread = std::thread::Builder::new().name("dpumesh-library".to_owned());
        let spawned = thread.spawn(move || {
            let card = thread_hub
                .upgrade()
                .ok_or(None)
                .and_then(|hub| library.open_here(&config, &hub).map_err(Some));
            match card {
                Ok(card) => {
                    let driver = Arc::clone(&card.driver);
                    if sender.send(Ok(card)).is_err() {
                        driver.close_soon(); // nobody waits for this card any more
                    }
                    driver.serve();
                }
                Err(Some(error)) => drop(sender.send(Err(error))),
                Err(None) => {}
            }
        });
        spawned.map_err(|error| LoadError::Process {
            what: "starting the library's thread",
            reason: error.to_string(),
        })?;
        let card = match opened.recv_timeout(self.deadline) {
            Ok(card) => card?,
            Err(_) => return Err(hangs("open", self.deadline)),
        };
        let hooks = Hooks::new(self.hooks, Arc::clone(&card.driver));
        let foreign = Foreign::new(card.driver, hub, card.info, card.parts, card.capabilities);
        Ok((Arc::new(foreign), hooks))
    }

    /// On the library's own thread.
    fn open_here(&self, config: &str, hub: &Arc<EventHub>) -> Result<Card, LoadError> {
        let handle = self.open_handle(config)?;
        let checked =
            check_card(&self.ops, handle, &self.required).and_then(|(info, parts, capabilities)| {
                let name = info.name.clone();
                let driver = Driver::new(self.ops, handle, name, self.calls, self.deadline, hub);
                let driver = driver.map_err(|error| LoadError::Process {
                    what: "making a descriptor to wake the library's thread",
                    reason: error.to_string(),
                })?;
                let driver = Arc::new(driver);
                driver.epoch();
                driver.watch().map_err(|error| LoadError::Process {
                    what: "starting the thread that looks after calls that hang",
                    reason: error.to_string(),
                })?;
                Ok(Card {
                    driver,
                    info,
                    parts,
                    capabilities,
                })
            });
        if checked.is_err()
            && let Some(close) = self.ops.close
        {
            // SAFETY: opened above, and nobody else has it.
            unsafe { close(handle) };
        }
        checked
    }

    fn open_handle(&self, config: &str) -> Result<u64, LoadError> {
        let (mut handle, mut error) = (0, dm_error::empty());
        let config = dm_str {
            at: config.as_ptr(),
            len: config.len() as u64,
        };
        let open = self
            .ops
            .open
            .ok_or(LoadError::NullFunction { function: "open" })?;
        // SAFETY: the function is the library's, all memory is ours and lives through the call.
        match unsafe { open(config, &raw mut handle, &raw mut error) } {
            DM_DONE => Ok(handle),
            DM_FAILED => Err(failure("open", &error)),
            status => Err(broken(
                "open",
                format!("it returned status {status}, which means nothing here"),
            )),
        }
    }
}

struct Card {
    driver: Arc<Driver>,
    info: BackendInfo,
    parts: u32,
    capabilities: Capabilities,
}

fn hangs(function: &'static str, after: Duration) -> LoadError {
    LoadError::Hangs { function, after }
}

fn broken(function: &'static str, reason: String) -> LoadError {
    LoadError::Broken { function, reason }
}

fn failure(function: &'static str, error: &dm_error) -> LoadError {
    match get_error(error, "backend.open", "") {
        Ok(error) => LoadError::Backend(error),
        Err(reason) => broken(function, reason),
    }
}

/// Runs foreign code on a thread of its own, which is left behind when it does not come back.
fn within<T: Send + 'static>(
    deadline: Duration,
    function: &'static str,
    run: impl FnOnce() -> T + Send + 'static,
) -> Result<T, LoadError> {
    let (sender, answer) = mpsc::sync_channel(1);
    let thread = std::thread::Builder::new().name("dpumesh-loading".to_owned());
    thread
        .spawn(move || drop(sender.send(run())))
        .map_err(|error| LoadError::Process {
            what: "starting a thread to load on",
            reason: error.to_string(),
        })?;
    answer
        .recv_timeout(deadline)
        .map_err(|_| hangs(function, deadline))
}

/// Loads the file for good and looks its symbols up.
fn symbols(path: &Path) -> Result<(dm_getter, Option<dm_hooks>), LoadError> {
    use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
    // SAFETY: running a library's code is what an operator asks for with a manifest; its file was checked for who can
    // have written it. All symbols are bound now, none is lent to others.
    let library =
        unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }.map_err(|error| LoadError::Linker {
            path: path.to_owned(),
            reason: error.to_string(),
        })?;
    let library = std::mem::ManuallyDrop::new(library); // never unloaded
    // SAFETY: the symbol's type is part of its name's meaning; a library that breaks it cannot be told from a good one.
    let getter = unsafe {
        library.get::<unsafe extern "C" fn(*const dm_host, u32, *mut dm_ops, *mut dm_error) -> u32>(SYMBOL)
    };
    let getter = getter.map_err(|_| LoadError::NoSymbol {
        path: path.to_owned(),
        symbol: SYMBOL,
    })?;
    // SAFETY: as above.
    let hooks = unsafe { library.get::<unsafe extern "C" fn(*mut dm_hooks) -> u32>(HOOKS) }.ok();
    let hooks = hooks.and_then(|get| {
        let mut hooks = dm_hooks::empty();
        // SAFETY: the memory is ours and tells its size.
        (unsafe { get(&raw mut hooks) } == DM_DONE).then_some(hooks)
    });
    Ok((Some(*getter), hooks))
}

/// What a library may use of this process.
static HOST: dm_host = dm_host {
    size: size_of::<dm_host>() as u32,
    reserved: 0,
    context: std::ptr::null_mut(),
    log: Some(log),
};

/// A line of a library for the log. Panics stop here.
unsafe extern "C" fn log(_context: *mut std::ffi::c_void, level: u32, text: dm_str) {
    let _ = std::panic::catch_unwind(|| {
        let octets = if text.at.is_null() || text.len > 1 << 16 {
            &[][..]
        } else {
            // SAFETY: the library gives octets that live through the call.
            unsafe { std::slice::from_raw_parts(text.at, text.len as usize) }
        };
        let text = String::from_utf8_lossy(octets);
        match level {
            DM_LOG_ERROR => tracing::error!(target: "dpumesh::library", "{text}"),
            DM_LOG_WARN => tracing::warn!(target: "dpumesh::library", "{text}"),
            DM_LOG_INFO => tracing::info!(target: "dpumesh::library", "{text}"),
            _ => tracing::debug!(target: "dpumesh::library", "{text}"),
        }
    });
}

/// Gets a library's table and checks all that can be checked without a card.
fn ask(getter: dm_getter) -> Result<dm_ops, LoadError> {
    let getter = getter.ok_or(LoadError::NullFunction { function: SYMBOL })?;
    let (mut ops, mut error) = (dm_ops::empty(), dm_error::empty());
    ops.size = 0; // to be told by the library
    // SAFETY: all memory is ours, its sizes are told, and the host's table lives as long as the process.
    match unsafe {
        getter(
            &raw const HOST,
            size_of::<dm_ops>() as u32,
            &raw mut ops,
            &raw mut error,
        )
    } {
        DM_DONE => check_table(&ops).map(|()| ops),
        DM_FAILED => Err(failure(SYMBOL, &error)),
        status => Err(broken(
            SYMBOL,
            format!("it returned status {status}, which means nothing here"),
        )),
    }
}

fn check_table(ops: &dm_ops) -> Result<(), LoadError> {
    if ops.abi_major != DM_ABI_MAJOR {
        return Err(LoadError::Major {
            theirs: ops.abi_major,
            ours: DM_ABI_MAJOR,
        });
    }
    if (ops.size as usize) < dm_ops::LEAST {
        return Err(LoadError::ShortTable {
            size: ops.size,
            least: dm_ops::LEAST as u32,
        });
    }
    macro_rules! there {
        ($($name:ident)*) => { [$((stringify!($name), ops.$name.is_some())),*] };
    }
    let mandatory = there!(open close info capabilities epoch poll_fd poll next_event);
    if let Some((function, _)) = mandatory.iter().find(|(_, there)| !there) {
        return Err(LoadError::NullFunction { function });
    }
    for (part, _, functions) in parts(ops) {
        let some = functions.iter().any(|(_, there)| *there);
        if let (true, Some((function, _))) = (some, functions.iter().find(|(_, there)| !there)) {
            return Err(LoadError::HalfPart { part, function });
        }
    }
    Ok(())
}

type Part = (&'static str, u32, Vec<(&'static str, bool)>);

/// The parts of a table and which of their functions it has.
fn parts(ops: &dm_ops) -> [Part; 4] {
    macro_rules! there {
        ($($name:ident)*) => { vec![$((stringify!($name), ops.$name.is_some())),*] };
    }
    [
        (
            "vf",
            DM_PART_VF,
            there!(vf_plan_count vf_set_count vf_list vf_lease vf_admit vf_revoke vf_configure vf_attach vf_detach
                vf_release vf_reclaim),
        ),
        (
            "steering",
            DM_PART_STEERING,
            there!(steering_validate steering_apply steering_list steering_counters steering_flush
                steering_set_miss_policy steering_occupancy),
        ),
        (
            "offload",
            DM_PART_OFFLOAD,
            there!(offload_programs offload_load offload_activate offload_unload offload_tables offload_write
                offload_read offload_connection offload_resume offload_stats),
        ),
        (
            "ports",
            DM_PART_PORTS,
            there!(port_list port_open port_close port_receive port_transmit port_refused),
        ),
    ]
}

/// Asks an open card who it is and what it can do, and does not believe what cannot be.
fn check_card(
    ops: &dm_ops,
    handle: u64,
    required: &Capabilities,
) -> Result<(BackendInfo, u32, Capabilities), LoadError> {
    let (mut info, mut raw) = (dm_info::empty(), dm_capabilities::empty());
    // SAFETY: the handle is open, the memory ours.
    unsafe {
        if let (Some(ask_info), Some(ask_capabilities)) = (ops.info, ops.capabilities) {
            ask_info(handle, &raw mut info);
            ask_capabilities(handle, &raw mut raw);
        }
    }
    check_size("info", info.size, &info)?;
    check_size("capabilities", raw.size, &raw)?;
    let info = get_info(&info).map_err(|reason| broken("info", reason))?;
    let capabilities = get_capabilities(&raw).map_err(|reason| broken("capabilities", reason))?;
    believe(ops, raw.parts, &capabilities).map_err(|reason| LoadError::Lies { reason })?;
    let missing = capabilities.missing(required);
    if missing.is_empty() {
        Ok((info, raw.parts, capabilities))
    } else {
        Err(LoadError::Lacks(missing))
    }
}

fn check_size<T: Sized32>(function: &'static str, size: u32, _: &T) -> Result<(), LoadError> {
    let (least, most) = (T::LEAST, size_of::<T>());
    if (least..=most).contains(&(size as usize)) {
        return Ok(());
    }
    let reason = format!("{} of size {size}, it has {least} to {most} octets here", T::NAME);
    Err(broken(function, reason))
}

/// What capabilities claim must be possible at all: with this table, and with each other.
fn believe(ops: &dm_ops, claimed: u32, have: &Capabilities) -> Result<(), String> {
    let all = DM_PART_VF | DM_PART_STEERING | DM_PART_OFFLOAD | DM_PART_PORTS;
    if claimed & !all != 0 {
        return Err(format!("parts has bits that mean nothing: {claimed:#x}"));
    }
    for (part, bit, functions) in parts(ops) {
        if claimed & bit != 0
            && let Some((function, _)) = functions.iter().find(|(_, there)| !there)
        {
            return Err(format!(
                "the part `{part}` is claimed, but the table has no `{function}`"
            ));
        }
    }
    let steering = &have.steering;
    let numbers = [
        (DM_PART_VF, "vf", "max_vfs", have.vf.max_vfs == 0),
        (DM_PART_STEERING, "steering", "rules", steering.rules == 0),
        (DM_PART_STEERING, "steering", "groups", steering.groups == 0),
        (
            DM_PART_STEERING,
            "steering",
            "priorities",
            steering.priorities == 0,
        ),
        (DM_PART_STEERING, "steering", "batch_max", steering.batch_max == 0),
        (
            DM_PART_STEERING,
            "steering",
            "actions",
            steering.actions.is_empty(),
        ),
        (DM_PART_PORTS, "ports", "open_ports", have.ports.open == 0),
    ];
    for (bit, part, number, zero) in numbers {
        if claimed & bit != 0 && zero {
            return Err(format!("the part `{part}` is claimed with `{number}` of zero"));
        }
    }
    if steering.hardware_rules > steering.rules {
        return Err(format!(
            "{} rules in hardware, but {} in all",
            steering.hardware_rules, steering.rules
        ));
    }
    if !steering.actions.contains(steering.hardware_actions) {
        let alone = steering.hardware_actions - steering.actions;
        return Err(format!("{alone:?} in hardware, but not at all"));
    }
    for (field, kinds) in &steering.hardware_fields {
        let at_all = steering.fields.get(field).copied().unwrap_or_default();
        if !at_all.contains(*kinds) {
            return Err(format!(
                "{}: {:?} in hardware, but not at all",
                field.path(),
                *kinds - at_all
            ));
        }
    }
    let steers = claimed & DM_PART_STEERING != 0;
    if steers
        && !steering
            .atomicity
            .contains(&dpumesh_core::steering::Atomicity::Continue)
    {
        return Err("the part `steering` is claimed without DM_CONTINUE, which every backend has".to_owned());
    }
    Ok(())
}
