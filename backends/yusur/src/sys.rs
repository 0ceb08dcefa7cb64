//! The vendor's library, loaded: the only place with `unsafe` in this crate.
//!
//! [`Library::load`] takes the file apart before it trusts it: absolute path, owners, symbol, version, size of the table, null
//! pointers. It is loaded with `RTLD_NOW | RTLD_LOCAL` and never unloaded: threads and static destructors of a vendor's
//! library do not survive that. [`Device`] wraps each function of one open card in a safe method that owns its memory and
//! checks every count that comes back.
//!
//! No function of ours is handed to the library, so no panic of ours can unwind into it; a C library cannot unwind into
//! us, and one written in Rust or C++ has to stop its own at `extern "C"`, where the language ends the process.
#![allow(unsafe_code, reason = "the home of unsafe in this crate")]

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char};
use std::fmt;
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use dpumesh_hw::trust::{self, Untrusted};
use libloading::os::unix::{Library as Handle, RTLD_LOCAL, RTLD_NOW};

use crate::table::{
    self, BatchResult, Connection, Counter, Entry, Event, Info, Limits, Meter, Program, ProgramEntry,
    ProgramTable, SteeringTable, Table, Tunnel,
};
use crate::watch::Watch;

/// Why a file is not the library that is needed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// Nothing is there, the path is relative, or others than root and the user running could have written it.
    #[error(transparent)]
    Untrusted(#[from] Untrusted),
    /// The loader of the system refused it.
    #[error("{path} cannot be loaded: {reason}")]
    Refused {
        /// Which file.
        path: PathBuf,
        /// What the loader said.
        reason: String,
    },
    /// It is a library, but not this one.
    #[error(
        "{path} has no symbol yusur_np_table_v1: it is no library of the network processor, or one without the adapter that include/yusur_np.h describes"
    )]
    NoSymbol {
        /// Which file.
        path: PathBuf,
    },
    /// Its table is none.
    #[error("{path}: yusur_np_table_v1 {reason}")]
    BadTable {
        /// Which file.
        path: PathBuf,
        /// What is wrong with the table.
        reason: String,
    },
}

/// What a call of the library answered instead of success.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{function}: {text} ({status})")]
pub struct Failure {
    /// Which function.
    pub function: &'static str,
    /// Its code.
    pub status: i32,
    /// What the library says about it.
    pub text: String,
}

/// Result of a call.
pub type Result<T> = std::result::Result<T, Failure>;

/// A loaded library. It stays loaded until the process ends.
#[derive(Clone, Copy)]
pub struct Library {
    table: &'static Table,
}

impl fmt::Debug for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let version = (self.table.abi_major, self.table.abi_minor);
        f.debug_struct("Library").field("version", &version).finish()
    }
}

/// Libraries of this process by their file.
static LOADED: Mutex<Option<HashMap<PathBuf, Library>>> = Mutex::new(None);

impl Library {
    /// Loads a file, or gives the one that was loaded from it before.
    ///
    /// Loading runs the library's initialisers: whoever names the file vouches for it.
    ///
    /// # Errors
    /// [`LoadError`]; each names the file and what was expected.
    pub fn load(path: &Path) -> std::result::Result<Self, LoadError> {
        let path = trust::real_path(path)?;
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        let loaded = loaded.get_or_insert_default();
        if let Some(library) = loaded.get(&path) {
            return Ok(*library);
        }
        let library = Self::open(&path)?;
        loaded.insert(path, library);
        Ok(library)
    }

    fn open(path: &Path) -> std::result::Result<Self, LoadError> {
        // SAFETY: running the initialisers of the file is what the caller asked for by naming it (see `load`).
        let handle = unsafe { Handle::open(Some(path), RTLD_NOW | RTLD_LOCAL) };
        let handle = handle.map_err(|source| LoadError::Refused {
            path: path.to_owned(),
            reason: source.to_string(),
        })?;
        // Never unloaded: the table is `'static` because of this.
        let handle = ManuallyDrop::new(handle);
        // SAFETY: the header gives this symbol this type; a library that exports it with another lies about a name that is
        // only ours.
        let getter = unsafe { handle.get::<unsafe extern "C" fn() -> *const Table>(table::SYMBOL) };
        let getter = getter.map_err(|_| LoadError::NoSymbol {
            path: path.to_owned(),
        })?;
        // SAFETY: it takes nothing and has no conditions.
        let table = unsafe { getter() };
        let bad = |reason: String| LoadError::BadTable {
            path: path.to_owned(),
            reason,
        };
        Ok(Self {
            table: Self::check(table).map_err(bad)?,
        })
    }

    /// Looks at the head of the table before anything behind it.
    fn check(table: *const Table) -> std::result::Result<&'static Table, String> {
        if table.is_null() {
            return Err("returned no table".to_owned());
        }
        if !table.is_aligned() {
            return Err("returned a misaligned table".to_owned());
        }
        // SAFETY: not null and aligned; size and version come first in every version of the table, so they can be read
        // whatever it holds behind them. By reference to the fields only: the rest may not be there.
        let (size, major) = unsafe { ((*table).size, (*table).abi_major) };
        if major != table::ABI_MAJOR {
            let ours = table::ABI_MAJOR;
            return Err(format!("has major version {major}, this program knows {ours}"));
        }
        if (size as usize) < size_of::<Table>() {
            let need = size_of::<Table>();
            return Err(format!("is {size} octets long, version {major}.0 has {need}"));
        }
        // SAFETY: it is as long as our type by its own word, it lives as long as the library, which is never unloaded, and
        // the header says that nobody changes it. Null pointers are `None`.
        let table = unsafe { &*table };
        let missing: Vec<&str> = table
            .missing()
            .into_iter()
            .filter(|name| *name != "diagnose")
            .collect();
        if !missing.is_empty() {
            return Err(format!("lacks mandatory functions: {}", missing.join(", ")));
        }
        Ok(table)
    }

    /// What a code means.
    pub fn text(&self, status: i32) -> String {
        let Some(text) = self.table.text else {
            return String::new();
        };
        // SAFETY: checked at loading; takes any number and returns a static text or null.
        let text: *const c_char = unsafe { text(status) };
        if text.is_null() {
            return format!("code {status}");
        }
        // SAFETY: not null; the header says that it ends with a zero octet and is static.
        let text = unsafe { CStr::from_ptr(text) };
        text.to_string_lossy().into_owned()
    }

    /// Opens a card.
    ///
    /// # Errors
    /// What the library says; `E_INVALID` for texts with a zero octet.
    pub fn device(&self, pci: &str, profile: &str) -> Result<Device> {
        let text = |text: &str| {
            CString::new(text).map_err(|_| Failure {
                function: "open",
                status: table::E_INVALID,
                text: "an argument has a zero octet".to_owned(),
            })
        };
        let (pci, profile) = (text(pci)?, text(profile)?);
        let mut device = std::ptr::null_mut();
        self.judge(
            "open",
            self.table.open.map(|open| {
                // SAFETY: two texts that end with zero and outlive the call, and room for one pointer.
                unsafe { open(pci.as_ptr(), profile.as_ptr(), &raw mut device) }
            }),
        )?;
        let handle = NonNull::new(device).ok_or_else(|| Failure {
            function: "open",
            status: table::E_FAULT,
            text: "succeeded without a device".to_owned(),
        })?;
        Ok(Device {
            library: *self,
            handle,
            watch: Watch::new(),
        })
    }

    /// `None` cannot be: null functions are refused at loading.
    fn judge(&self, function: &'static str, status: Option<i32>) -> Result<()> {
        match status {
            Some(table::OK) => Ok(()),
            Some(status) => Err(Failure {
                function,
                status,
                text: self.text(status),
            }),
            None => Err(Failure {
                function,
                status: table::E_UNSUPPORTED,
                text: "the library has no such function".to_owned(),
            }),
        }
    }
}

/// An open card. Dropping it closes it.
pub struct Device {
    library: Library,
    handle: NonNull<table::Device>,
    watch: Arc<Watch>,
}

// SAFETY: the header allows every function of one device from any thread, at the same time; what is not safe to call at the
// same time is `close`, and only `drop` calls it, with the last owner.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device").field("library", &self.library).finish()
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if let Some(close) = self.library.table.close {
            // SAFETY: the handle came from `open` and is given back once.
            unsafe { close(self.handle.as_ptr()) };
        }
    }
}

/// Calls a function of the table with the handle in front and judges its answer.
///
/// SAFETY (of every use): the handle is open until `drop`; each argument is a number, or points to memory of this frame
/// that outlives the call, with the length that is passed beside it. The library keeps none of it (header).
macro_rules! call {
    ($self:ident, $function:ident $(, $argument:expr)*) => {
        $self.library.judge(
            stringify!($function),
            $self.library.table.$function.map(|function| {
                let _inside = $self.watch.enter(stringify!($function));
                // SAFETY: see the macro.
                unsafe { function($self.handle.as_ptr() $(, $argument)*) }
            }),
        )
    };
}

impl Device {
    /// Who is in the library.
    pub(crate) fn watch(&self) -> &Arc<Watch> {
        &self.watch
    }

    /// What a code means.
    pub fn text(&self, status: i32) -> String {
        self.library.text(status)
    }

    /// A count that the library claims to have filled, of at most `room`.
    fn filled(&self, function: &'static str, count: usize, room: usize) -> Result<usize> {
        if count <= room {
            return Ok(count);
        }
        Err(Failure {
            function,
            status: table::E_FAULT,
            text: format!("filled {count} where there was room for {room}"),
        })
    }

    /// Who the card is.
    ///
    /// # Errors
    /// As the header says, like those of all methods here.
    pub fn info(&self) -> Result<Info> {
        let mut info = Info {
            size: size_of::<Info>() as u32,
            ..Info::default()
        };
        call!(self, info, &raw mut info)?;
        Ok(info)
    }

    /// What it can do.
    ///
    /// # Errors
    /// See [`Device::info`].
    pub fn limits(&self) -> Result<Limits> {
        let mut limits = Limits {
            size: size_of::<Limits>() as u32,
            ..Limits::default()
        };
        call!(self, limits, &raw mut limits)?;
        Ok(limits)
    }

    /// Changes the mode.
    ///
    /// # Errors
    /// See [`Device::info`].
    pub fn set_mode(&self, generation: u64, mode: u32) -> Result<()> {
        call!(self, set_mode, generation, mode)
    }

    /// Waits for events; blocks for at most `timeout_ms`.
    ///
    /// # Errors
    /// See [`Device::info`].
    pub fn wait(&self, timeout_ms: u32) -> Result<Vec<Event>> {
        let mut events = [Event::default(); 64];
        let mut count = 0;
        call!(
            self,
            wait,
            timeout_ms,
            events.as_mut_ptr(),
            events.len(),
            &raw mut count
        )?;
        let count = self.filled("wait", count, events.len())?;
        Ok(events[..count].to_vec())
    }

    /// Makes a steering table.
    ///
    /// # Errors
    /// See [`Device::info`].
    pub fn table_create(&self, generation: u64, table: &SteeringTable) -> Result<()> {
        call!(self, table_create, generation, table)
    }

    /// Removes an empty steering table.
    ///
    /// # Errors
    /// See [`Device::info`].
    pub fn table_destroy(&self, generation: u64, table: u32) -> Result<()> {
        call!(self, table_destroy, generation, table)
    }

    /// Adds and removes steering entries.
    ///
    /// # Errors
    /// See [`Device::info`]; entries that failed are in the result.
    pub fn entries_write(&self, generation: u64, entries: &[Entry]) -> Result<BatchResult> {
        let mut result = BatchResult::default();
        call!(
            self,
            entries_write,
            generation,
            entries.as_ptr(),
            entries.len(),
            &raw mut result
        )?;
        Ok(result)
    }

    /// Every entry of a steering table.
    ///
    /// # Errors
    /// See [`Device::info`].
    pub fn entries_read(&self, table: u32) -> Result<Vec<Entry>> {
        let mut all = Vec::new();
        let (mut cursor, mut room) = (0, vec![Entry::default(); 128]);
        loop {
            let mut count = 0;
            call!(
                self,
                entries_read,
                table,
                &raw mut cursor,
                room.as_mut_ptr(),
                room.len(),
                &raw mut count
            )?;
            let count = self.filled("entries_read", count, room.len())?;
            if count == 0 {
                return Ok(all);
            }
            all.extend_from_slice(&room[..count]);
        }
    }

    /// Removes everything that steers.
    ///
    /// # Errors
    /// See [`Device::info`].
    pub fn steering_flush(&self, generation: u64) -> Result<()> {
        call!(self, steering_flush, generation)
    }

    /// Says what happens to frames that no entry matches.
    ///
    /// # Errors
    /// See [`Device::info`].
    pub fn miss_set(&self, generation: u64, port: u64, miss: u32) -> Result<()> {
        call!(self, miss_set, generation, port, miss)
    }

    /// Sets counters to zero.
    ///
    /// # Errors
    /// See [`Device::info`].
    pub fn counters_clear(&self, generation: u64, ids: &[u32]) -> Result<()> {
        call!(self, counters_clear, generation, ids.as_ptr(), ids.len())
    }

    /// Reads counters, one for each number.
    ///
    /// # Errors
    /// See [`Device::info`].
    pub fn counters_read(&self, ids: &[u32]) -> Result<Vec<Counter>> {
        let mut counters = vec![Counter::default(); ids.len()];
        call!(
            self,
            counters_read,
            ids.as_ptr(),
            ids.len(),
            counters.as_mut_ptr()
        )?;
        Ok(counters)
    }

    /// Sets a meter.
    ///
    /// # Errors
    /// See [`Device::info`].
    pub fn meter_set(&self, generation: u64, id: u32, meter: &Meter) -> Result<()> {
        call!(self, meter_set, generation, id, meter)
    }

    /// Sets the outer headers of a tunnel.
    ///
    /// # Errors
    /// See [`Device::info`].
    pub fn tunnel_set(&self, generation: u64, id: u32, tunnel: &Tunnel) -> Result<()> {
        call!(self, tunnel_set, generation, id, tunnel)
    }

    /// Loads a program.
    ///
    /// # Errors
    /// See [`Device::info`].
    pub fn program_load(&self, generation: u64, slot: u32, program: &Program, image: &[u8]) -> Result<()> {
        call!(
            self,
            program_load,
            generation,
            slot,
            program,
            image.as_ptr(),
            image.len()
        )
    }

    /// Makes a program the running one.
    ///
    /// # Errors
    /// See [`Device::info`].
    pub fn program_activate(&self, generation: u64, slot: u32) -> Result<()> {
        call!(self, program_activate, generation, slot)
    }

    /// Empties a slot.
    ///
    /// # Errors
    /// See [`Device::info`].
    pub fn program_unload(&self, generation: u64, slot: u32) -> Result<()> {
        call!(self, program_unload, generation, slot)
    }

    /// What a slot holds.
    ///
    /// # Errors
    /// See [`Device::info`].
    pub fn program_info(&self, slot: u32) -> Result<Program> {
        let mut program = Program {
            size: size_of::<Program>() as u32,
            ..Program::default()
        };
        call!(self, program_info, slot, &raw mut program)?;
        Ok(program)
    }

    /// A table of the running program.
    ///
    /// # Errors
    /// See [`Device::info`].
    pub fn program_table(&self, table: u32) -> Result<ProgramTable> {
        let mut info = ProgramTable {
            size: size_of::<ProgramTable>() as u32,
            ..ProgramTable::default()
        };
        call!(self, program_table, table, &raw mut info)?;
        Ok(info)
    }

    /// Writes entries of a program's table.
    ///
    /// # Errors
    /// See [`Device::info`]; entries that failed are in the result.
    pub fn program_write(
        &self,
        generation: u64,
        table: u32,
        entries: &[ProgramEntry],
    ) -> Result<BatchResult> {
        let mut result = BatchResult::default();
        call!(
            self,
            program_write,
            generation,
            table,
            entries.as_ptr(),
            entries.len(),
            &raw mut result
        )?;
        Ok(result)
    }

    /// Every entry of a program's table.
    ///
    /// # Errors
    /// See [`Device::info`].
    pub fn program_read(&self, table: u32) -> Result<Vec<ProgramEntry>> {
        let mut all = Vec::new();
        let (mut cursor, mut room) = (0, vec![ProgramEntry::default(); 128]);
        loop {
            let mut count = 0;
            call!(
                self,
                program_read,
                table,
                &raw mut cursor,
                room.as_mut_ptr(),
                room.len(),
                &raw mut count
            )?;
            let count = self.filled("program_read", count, room.len())?;
            if count == 0 {
                return Ok(all);
            }
            all.extend_from_slice(&room[..count]);
        }
    }

    /// Hands a connection over.
    ///
    /// # Errors
    /// See [`Device::info`].
    pub fn connection_add(&self, generation: u64, connection: &Connection) -> Result<u64> {
        let mut token = 0;
        call!(self, connection_add, generation, connection, &raw mut token)?;
        Ok(token)
    }

    /// Takes a connection back.
    ///
    /// # Errors
    /// See [`Device::info`].
    pub fn connection_take(&self, generation: u64, token: u64) -> Result<Connection> {
        let mut connection = Connection {
            size: size_of::<Connection>() as u32,
            ..Connection::default()
        };
        call!(self, connection_take, generation, token, &raw mut connection)?;
        Ok(connection)
    }

    /// Connections carried now and ever.
    ///
    /// # Errors
    /// See [`Device::info`].
    pub fn connection_count(&self) -> Result<(u64, u64)> {
        let (mut now, mut ever) = (0, 0);
        call!(self, connection_count, &raw mut now, &raw mut ever)?;
        Ok((now, ever))
    }

    /// A command of support engineers.
    ///
    /// # Errors
    /// See [`Device::info`]; `E_UNSUPPORTED` when the library has none.
    pub fn diagnose(&self, request: &str) -> Result<String> {
        let mut answer = vec![0_u8; 128 << 10];
        let mut len = 0;
        call!(
            self,
            diagnose,
            request.as_ptr(),
            request.len(),
            answer.as_mut_ptr(),
            answer.len(),
            &raw mut len
        )?;
        let len = self.filled("diagnose", len, answer.len())?;
        Ok(String::from_utf8_lossy(&answer[..len]).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_taken_apart_before_it_is_trusted() {
        let none = Library::check(std::ptr::null()).expect_err("null");
        assert_eq!(none, "returned no table");
        let empty = |size: usize, abi_major| {
            // SAFETY: a table of null pointers and zeros is a value of the type: pointers are options.
            let mut table: Table = unsafe { std::mem::zeroed() };
            table.size = size as u32;
            table.abi_major = abi_major;
            &raw const *Box::leak(Box::new(table))
        };
        let cases = [
            (
                empty(size_of::<Table>(), 2),
                "has major version 2, this program knows 1",
            ),
            (empty(16, 1), "is 16 octets long"),
            (
                empty(size_of::<Table>(), 1),
                "lacks mandatory functions: text, open, close",
            ),
        ];
        for (table, expected) in cases {
            let error = Library::check(table).expect_err(expected);
            assert!(error.starts_with(expected), "{error}");
            assert!(!error.contains("diagnose"), "{error}");
        }
    }

    #[test]
    fn files_that_are_no_such_library_are_told_apart() {
        let relative = Library::load(Path::new("libyusur_np.so")).expect_err("relative");
        assert!(relative.to_string().contains("must be absolute"), "{relative}");
        let absent = Library::load(Path::new("/nowhere/libyusur_np.so")).expect_err("absent");
        assert!(
            absent.to_string().contains("/nowhere/libyusur_np.so: "),
            "{absent}"
        );
        let text = Library::load(Path::new("/etc/passwd")).expect_err("no library");
        assert!(matches!(text, LoadError::Refused { .. }), "{text}");
    }
}
