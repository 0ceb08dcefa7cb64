//! The symbols of `yusur_np.h`: raw memory in, safe calls of [`Card`], raw memory out. All `unsafe` of this crate is here.
//!
//! Each function reads what it was given by length, copies it out, and calls the card; a panic becomes `E_FAULT` and never
//! leaves the library. Null where memory is needed is `E_INVALID`.
#![allow(unsafe_code, reason = "the home of unsafe in this crate")]

use std::collections::HashMap;
use std::ffi::{CStr, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use dpumesh_yusur::table::{
    self, BatchResult, Connection, Counter, Device, Entry, Event, Info, Limits, Meter, Program, ProgramEntry,
    ProgramTable, SteeringTable, Table, Tunnel,
};

use crate::card::{Bucket, Card, Status, Steering, Target};
use crate::settings::Settings;

/// Cards by PCI address.
static CARDS: Mutex<Option<HashMap<String, Arc<Card>>>> = Mutex::new(None);

/// What `open` hands out.
struct Handle {
    card: Arc<Card>,
    /// Number of the next event that `wait` tells.
    next: AtomicU64,
}

static TABLE: Table = Table {
    size: size_of::<Table>() as u32,
    abi_major: table::ABI_MAJOR,
    abi_minor: table::ABI_MINOR,
    text: Some(text),
    open: Some(open),
    close: Some(close),
    info: Some(info),
    limits: Some(limits),
    set_mode: Some(set_mode),
    wait: Some(wait),
    table_create: Some(table_create),
    table_destroy: Some(table_destroy),
    entries_write: Some(entries_write),
    entries_read: Some(entries_read),
    steering_flush: Some(steering_flush),
    miss_set: Some(miss_set),
    counters_clear: Some(counters_clear),
    counters_read: Some(counters_read),
    meter_set: Some(meter_set),
    tunnel_set: Some(tunnel_set),
    program_load: Some(program_load),
    program_activate: Some(program_activate),
    program_unload: Some(program_unload),
    program_info: Some(program_info),
    program_table: Some(program_table),
    program_write: Some(program_write),
    program_read: Some(program_read),
    connection_add: Some(connection_add),
    connection_take: Some(connection_take),
    connection_count: Some(connection_count),
    diagnose: Some(diagnose),
};

/// The library's only symbol.
// SAFETY: the name is this library's own; nothing else in a process that loads it with RTLD_LOCAL has it.
#[unsafe(no_mangle)]
extern "C" fn yusur_np_table_v1() -> *const Table {
    &raw const TABLE
}

/// Runs a call; its result or its panic as a code.
fn code(run: impl FnOnce() -> Status) -> i32 {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(())) => table::OK,
        Ok(Err(code)) => code,
        Err(_) => table::E_FAULT,
    }
}

/// The card of a handle.
///
/// # Safety
/// `device` is null or came from [`open`] and was not closed.
unsafe fn handle<'a>(device: *mut Device) -> Status<&'a Handle> {
    // SAFETY: the caller's promise; handles are boxes that `open` made.
    unsafe { device.cast::<Handle>().as_ref() }.ok_or(table::E_INVALID)
}

/// What a pointer points to, copied out.
///
/// # Safety
/// `from` is null or points to a value that may be read.
unsafe fn given<T: Copy>(from: *const T) -> Status<T> {
    // SAFETY: the caller's promise.
    unsafe { from.as_ref() }.copied().ok_or(table::E_INVALID)
}

/// `count` values behind a pointer.
///
/// # Safety
/// `from` points to `count` values that may be read while the call lasts, or `count` is 0.
unsafe fn slice<'a, T>(from: *const T, count: usize) -> Status<&'a [T]> {
    if count == 0 {
        return Ok(&[]);
    }
    if from.is_null() || !from.is_aligned() || count > isize::MAX as usize / size_of::<T>().max(1) {
        return Err(table::E_INVALID);
    }
    // SAFETY: not null, aligned, not too long; the rest is the caller's promise.
    Ok(unsafe { std::slice::from_raw_parts(from, count) })
}

/// Writes values behind a pointer.
///
/// # Safety
/// `to` points to room for `values.len()` values, or there are none.
unsafe fn fill<T: Copy>(to: *mut T, values: &[T]) -> Status {
    if values.is_empty() {
        return Ok(());
    }
    if to.is_null() {
        return Err(table::E_INVALID);
    }
    // SAFETY: not null; room is the caller's promise; memory of the caller and of the card never overlap.
    unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), to, values.len()) };
    Ok(())
}

/// Writes one value behind a pointer.
///
/// # Safety
/// As [`fill`].
unsafe fn put<T: Copy>(to: *mut T, value: T) -> Status {
    // SAFETY: the caller's promise.
    unsafe { fill(to, &[value]) }
}

/// A function of the table: what it promises about its pointers is what the header says.
macro_rules! function {
    ($(#[$doc:meta])* $name:ident($($argument:ident: $kind:ty),*) $body:block) => {
        $(#[$doc])*
        ///
        /// # Safety
        /// Handle and memory are as the header says.
        unsafe extern "C" fn $name($($argument: $kind),*) -> i32 {
            code(|| {
                // SAFETY: every pointer is one that the header's caller vouches for, with the length beside it.
                unsafe { $body }
            })
        }
    };
}

extern "C" fn text_of(status: i32) -> *const c_char {
    let text = match status {
        table::OK => c"done",
        table::E_INVALID => c"an argument makes no sense",
        table::E_NOT_FOUND => c"there is no such thing",
        table::E_EXISTS => c"it is there already",
        table::E_FULL => c"the table is full",
        table::E_BUSY => c"it is in use",
        table::E_TIMEOUT => c"the hardware did not answer",
        table::E_GONE => c"the processor is being reset",
        table::E_STALE => c"the processor was reset meanwhile",
        table::E_UNSUPPORTED => c"this card cannot do it",
        table::E_IO => c"the way to the card failed",
        table::E_FIRMWARE => c"firmware and library do not fit together",
        table::E_COLLISION => c"the hash bucket is full",
        table::E_DIGEST => c"the digest is not that of the image",
        _ => c"something went wrong inside",
    };
    text.as_ptr()
}

/// Safe in itself; the table wants the type.
unsafe extern "C" fn text(status: i32) -> *const c_char {
    text_of(status)
}

function! {
    /// Opens a card, making it if nobody did before.
    open(pci: *const c_char, profile: *const c_char, device: *mut *mut Device) {
        if pci.is_null() || profile.is_null() {
            return Err(table::E_INVALID);
        }
        let (pci, profile) = (CStr::from_ptr(pci), CStr::from_ptr(profile));
        let pci = pci.to_str().map_err(|_| table::E_INVALID)?;
        let profile = profile.to_str().map_err(|_| table::E_INVALID)?;
        let settings = Settings::read(profile).map_err(|_| table::E_INVALID)?;
        if settings.refuse_firmware {
            return Err(table::E_FIRMWARE);
        }
        let mut cards = CARDS.lock().unwrap_or_else(PoisonError::into_inner);
        let cards = cards.get_or_insert_default();
        let card = cards
            .entry(pci.to_owned())
            .or_insert_with(|| Arc::new(Card::new(pci, settings)));
        let handle = Box::new(Handle {
            next: AtomicU64::new(card.now()),
            card: Arc::clone(card),
        });
        let handle = Box::into_raw(handle);
        let given = put(device, handle.cast());
        if given.is_err() {
            drop(Box::from_raw(handle));
        }
        given
    }
}

/// Gives a handle back.
///
/// # Safety
/// As the header says: it came from [`open`] and is used no more.
unsafe extern "C" fn close(device: *mut Device) {
    if !device.is_null() {
        // SAFETY: the caller's promise: a box that `open` made, given back once.
        drop(unsafe { Box::from_raw(device.cast::<Handle>()) });
    }
}

function! {
    /// Who the card is.
    info(device: *mut Device, info: *mut Info) {
        put(info, handle(device)?.card.info())
    }
}

function! {
    /// What it can do.
    limits(device: *mut Device, limits: *mut Limits) {
        put(limits, handle(device)?.card.state().limits())
    }
}

function! {
    /// Changes the mode.
    set_mode(device: *mut Device, generation: u64, mode: u32) {
        handle(device)?.card.set_mode(generation, mode)
    }
}

function! {
    /// Waits for events.
    wait(device: *mut Device, timeout_ms: u32, events: *mut Event, room: usize, count: *mut usize) {
        let handle = handle(device)?;
        let mut next = handle.next.load(Ordering::Acquire);
        let found = handle.card.wait(&mut next, room, Duration::from_millis(timeout_ms.into()));
        fill(events, &found)?;
        put(count, found.len())?;
        handle.next.store(next, Ordering::Release);
        Ok(())
    }
}

function! {
    /// Makes a steering table.
    table_create(device: *mut Device, generation: u64, table: *const SteeringTable) {
        handle(device)?.card.fenced(generation)?.create(given(table)?)
    }
}

function! {
    /// Removes an empty steering table.
    table_destroy(device: *mut Device, generation: u64, table: u32) {
        handle(device)?.card.fenced(generation)?.destroy(table)
    }
}

function! {
    /// Adds and removes entries.
    entries_write(
        device: *mut Device,
        generation: u64,
        entries: *const Entry,
        count: usize,
        result: *mut BatchResult
    ) {
        let done = handle(device)?.card.write(generation, slice(entries, count)?)?;
        put(result, done)
    }
}

function! {
    /// Entries of a table, by the order of their keys.
    entries_read(
        device: *mut Device,
        table: u32,
        cursor: *mut u64,
        entries: *mut Entry,
        room: usize,
        count: *mut usize
    ) {
        let from = given(cursor)?;
        let mut state = handle(device)?.card.alive()?;
        state.fails(Target::Read)?;
        let content = state.steering.tables.get(&table).ok_or(table::E_NOT_FOUND)?;
        let mut all: Vec<Entry> = content.entries.values().map(|held| held.entry).collect();
        all.sort_unstable_by_key(|entry| entry.key);
        let found: Vec<Entry> = all.into_iter().skip(from as usize).take(room).collect();
        fill(entries, &found)?;
        put(cursor, from + found.len() as u64)?;
        put(count, found.len())
    }
}

function! {
    /// Empties everything that steers.
    steering_flush(device: *mut Device, generation: u64) {
        handle(device)?.card.fenced(generation)?.steering = Steering::default();
        Ok(())
    }
}

function! {
    /// What happens to frames that no entry matches.
    miss_set(device: *mut Device, generation: u64, port: u64, miss: u32) {
        if miss > table::MISS_SOC {
            return Err(table::E_INVALID);
        }
        let mut state = handle(device)?.card.fenced(generation)?;
        if port == table::ALL_PORTS {
            state.steering.misses.clear();
            state.steering.miss = miss;
        } else {
            state.steering.misses.insert(port, miss);
        }
        Ok(())
    }
}

function! {
    /// Sets counters to zero.
    counters_clear(device: *mut Device, generation: u64, ids: *const u32, count: usize) {
        let ids = slice(ids, count)?;
        let mut state = handle(device)?.card.fenced(generation)?;
        let most = state.limits().counters;
        if ids.iter().any(|id| *id == 0 || *id > most) {
            return Err(table::E_NOT_FOUND);
        }
        for id in ids {
            state.steering.counters.remove(id);
        }
        Ok(())
    }
}

function! {
    /// Reads counters.
    counters_read(device: *mut Device, ids: *const u32, count: usize, counters: *mut Counter) {
        let ids = slice(ids, count)?;
        let mut state = handle(device)?.card.alive()?;
        state.fails(Target::Count)?;
        let read: Vec<Counter> = ids
            .iter()
            .map(|id| state.steering.counters.get(id).copied().unwrap_or_default())
            .collect();
        fill(counters, &read)
    }
}

function! {
    /// Sets a meter.
    meter_set(device: *mut Device, generation: u64, id: u32, meter: *const Meter) {
        let meter = given(meter)?;
        let mut state = handle(device)?.card.fenced(generation)?;
        if id >= state.limits().meters {
            return Err(table::E_NOT_FOUND);
        }
        let bucket = Bucket {
            meter,
            octets: meter.burst_octets,
            filled: Instant::now(),
        };
        state.steering.meters.insert(id, bucket);
        Ok(())
    }
}

function! {
    /// Sets a tunnel.
    tunnel_set(device: *mut Device, generation: u64, id: u32, tunnel: *const Tunnel) {
        let tunnel = given(tunnel)?;
        let mut state = handle(device)?.card.fenced(generation)?;
        state.fails(Target::Tunnel)?;
        if id >= state.limits().tunnels {
            return Err(table::E_NOT_FOUND);
        }
        if !matches!(tunnel.ip_version, 4 | 6) || tunnel.vni > 0x00ff_ffff {
            return Err(table::E_INVALID);
        }
        state.steering.tunnels.insert(id, tunnel);
        Ok(())
    }
}

function! {
    /// Loads a program.
    program_load(
        device: *mut Device,
        generation: u64,
        slot: u32,
        program: *const Program,
        image: *const u8,
        image_len: usize
    ) {
        let (program, image) = (given(program)?, slice(image, image_len)?);
        let mut state = handle(device)?.card.fenced(generation)?;
        let limits = state.limits();
        state.programs.load(slot, &program, image, &limits)
    }
}

function! {
    /// Runs a program.
    program_activate(device: *mut Device, generation: u64, slot: u32) {
        handle(device)?.card.fenced(generation)?.programs.activate(slot)
    }
}

function! {
    /// Empties a slot.
    program_unload(device: *mut Device, generation: u64, slot: u32) {
        handle(device)?.card.fenced(generation)?.programs.unload(slot)
    }
}

function! {
    /// What a slot holds.
    program_info(device: *mut Device, slot: u32, program: *mut Program) {
        let info = handle(device)?.card.alive()?.programs.info(slot)?;
        put(program, info)
    }
}

function! {
    /// A table of the running program.
    program_table(device: *mut Device, table: u32, info: *mut ProgramTable) {
        let found = handle(device)?.card.alive()?.programs.table(table)?;
        put(info, found)
    }
}

function! {
    /// Writes entries of a program's table.
    program_write(
        device: *mut Device,
        generation: u64,
        table: u32,
        entries: *const ProgramEntry,
        count: usize,
        result: *mut BatchResult
    ) {
        let lines = slice(entries, count)?;
        let mut state = handle(device)?.card.fenced(generation)?;
        let limits = state.limits();
        let done = state.programs.write(table, lines, &limits)?;
        put(result, done)
    }
}

function! {
    /// Entries of a program's table.
    program_read(
        device: *mut Device,
        table: u32,
        cursor: *mut u64,
        entries: *mut ProgramEntry,
        room: usize,
        count: *mut usize
    ) {
        let from = given(cursor)?;
        let found = handle(device)?.card.alive()?.programs.read(table, from, room)?;
        fill(entries, &found)?;
        put(cursor, from + found.len() as u64)?;
        put(count, found.len())
    }
}

function! {
    /// Takes a connection.
    connection_add(device: *mut Device, generation: u64, connection: *const Connection, token: *mut u64) {
        let connection = given(connection)?;
        let mut state = handle(device)?.card.fenced(generation)?;
        let limits = state.limits();
        let given = state.programs.connect(&connection, &limits)?;
        put(token, given)
    }
}

function! {
    /// Gives a connection back.
    connection_take(device: *mut Device, generation: u64, token: u64, connection: *mut Connection) {
        let taken = handle(device)?.card.fenced(generation)?.programs.take(token)?;
        put(connection, taken)
    }
}

function! {
    /// Connections now and ever.
    connection_count(device: *mut Device, now: *mut u64, ever: *mut u64) {
        let count = handle(device)?.card.alive()?.programs.count();
        put(now, count.0)?;
        put(ever, count.1)
    }
}

function! {
    /// A command of a test.
    diagnose(
        device: *mut Device,
        request: *const u8,
        request_len: usize,
        answer: *mut u8,
        room: usize,
        answer_len: *mut usize
    ) {
        let request = std::str::from_utf8(slice(request, request_len)?).map_err(|_| table::E_INVALID)?;
        let text = crate::control::command(&handle(device)?.card, request)?;
        if text.len() > room {
            return Err(table::E_FULL);
        }
        fill(answer, text.as_bytes())?;
        put(answer_len, text.len())
    }
}
