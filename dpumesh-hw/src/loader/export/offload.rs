//! [`dpumesh_core::NpOffload`], exported.

use std::sync::Arc;

use dpumesh_core::offload::{ConnectionToken, Slot, TableId};
use dpumesh_core::{Backend, BackendExt, NpOffload, Result};

use super::super::abi::*;
use super::super::codec::*;
use super::instance as handle_of;
use super::instance::Out;

pub(super) fn fill(table: &mut dm_ops) {
    table.offload_programs = Some(programs);
    table.offload_load = Some(load);
    table.offload_activate = Some(activate);
    table.offload_unload = Some(unload);
    table.offload_tables = Some(tables);
    table.offload_write = Some(write);
    table.offload_read = Some(read);
    table.offload_connection = Some(connection);
    table.offload_resume = Some(resume);
    table.offload_stats = Some(stats);
}

fn part(backend: &Arc<dyn Backend>) -> Result<&dyn NpOffload> {
    backend.require_offload()
}

unsafe extern "C" fn programs(handle: u64, call: *mut dm_call, rows: *mut dm_rows) -> u32 {
    let rows = Out(rows);
    // SAFETY: the caller upholds the interface's contract: open handle, memory valid until the call ended.
    unsafe {
        handle_of(handle).serve(
            "offload.programs",
            call,
            |backend, _, _| Ok(async move { part(&backend)?.programs().await }),
            move |all: Vec<_>, arena| {
                let all: Vec<_> = all.iter().map(|one| put_program_info(one, arena)).collect();
                rows.fill(&all)
            },
        )
    }
}

unsafe extern "C" fn load(
    handle: u64,
    call: *mut dm_call,
    program: *const dm_program,
    out: *mut dm_program_info,
) -> u32 {
    let out = Out(out);
    // SAFETY: the caller upholds the interface's contract: open handle, memory valid until the call ended.
    unsafe {
        handle_of(handle).serve(
            "offload.load",
            call,
            |backend, fence, reader| {
                let raw = reader.one(program, "program")?;
                let (slot, program) = (Slot(raw.slot), get_program(&raw, reader)?);
                Ok(async move { part(&backend)?.load(fence, slot, &program).await })
            },
            move |info, arena| out.write(&put_program_info(&info, arena)),
        )
    }
}

unsafe extern "C" fn activate(handle: u64, call: *mut dm_call, slot: *const dm_slot) -> u32 {
    // SAFETY: the caller upholds the interface's contract: open handle, memory valid until the call ended.
    unsafe {
        handle_of(handle).serve(
            "offload.activate",
            call,
            |backend, fence, reader| {
                let slot = Slot(reader.one(slot, "slot")?.slot);
                Ok(async move { part(&backend)?.activate(fence, slot).await })
            },
            move |(), _| true,
        )
    }
}

unsafe extern "C" fn unload(handle: u64, call: *mut dm_call, slot: *const dm_slot) -> u32 {
    // SAFETY: the caller upholds the interface's contract: open handle, memory valid until the call ended.
    unsafe {
        handle_of(handle).serve(
            "offload.unload",
            call,
            |backend, fence, reader| {
                let slot = Slot(reader.one(slot, "slot")?.slot);
                Ok(async move { part(&backend)?.unload(fence, slot).await })
            },
            move |(), _| true,
        )
    }
}

unsafe extern "C" fn tables(handle: u64, call: *mut dm_call, rows: *mut dm_rows) -> u32 {
    let rows = Out(rows);
    // SAFETY: the caller upholds the interface's contract: open handle, memory valid until the call ended.
    unsafe {
        handle_of(handle).serve(
            "offload.tables",
            call,
            |backend, _, _| Ok(async move { part(&backend)?.tables().await }),
            move |all: Vec<_>, arena| {
                let all: Vec<_> = all.iter().map(|one| put_table(one, arena)).collect();
                rows.fill(&all)
            },
        )
    }
}

unsafe extern "C" fn write(
    handle: u64,
    call: *mut dm_call,
    entries: *const dm_entries,
    rows: *mut dm_rows,
) -> u32 {
    let rows = Out(rows);
    // SAFETY: the caller upholds the interface's contract: open handle, memory valid until the call ended.
    unsafe {
        handle_of(handle).serve(
            "offload.write",
            call,
            |backend, fence, reader| {
                let raw = reader.one(entries, "entries")?;
                let (table, entries) = (TableId(raw.table), get_entries(&raw, reader)?);
                Ok(async move { part(&backend)?.write(fence, table, &entries).await })
            },
            move |results: Vec<Result<()>>, _| rows.fill_errors(&results),
        )
    }
}

unsafe extern "C" fn read(
    handle: u64,
    call: *mut dm_call,
    which: *const dm_entries,
    rows: *mut dm_rows,
) -> u32 {
    let rows = Out(rows);
    // SAFETY: the caller upholds the interface's contract: open handle, memory valid until the call ended.
    unsafe {
        handle_of(handle).serve(
            "offload.read",
            call,
            |backend, _, reader| {
                let table = TableId(reader.one(which, "table")?.table);
                Ok(async move { part(&backend)?.read(table).await })
            },
            move |all: Vec<_>, arena| {
                let all: Vec<_> = all.iter().map(|one| put_entry(one, 0, arena)).collect();
                rows.fill(&all)
            },
        )
    }
}

unsafe extern "C" fn connection(
    handle: u64,
    call: *mut dm_call,
    connection: *const dm_connection,
    out: *mut dm_number,
) -> u32 {
    let out = Out(out);
    // SAFETY: the caller upholds the interface's contract: open handle, memory valid until the call ended.
    unsafe {
        handle_of(handle).serve(
            "offload.offload_connection",
            call,
            |backend, fence, reader| {
                let connection = get_connection(&reader.one(connection, "connection")?)?.connection;
                Ok(async move { part(&backend)?.offload_connection(fence, &connection).await })
            },
            move |token, _| out.write(&put_number(token.0)),
        )
    }
}

unsafe extern "C" fn resume(
    handle: u64,
    call: *mut dm_call,
    token: *const dm_number,
    out: *mut dm_connection,
) -> u32 {
    let out = Out(out);
    // SAFETY: the caller upholds the interface's contract: open handle, memory valid until the call ended.
    unsafe {
        handle_of(handle).serve(
            "offload.resume",
            call,
            |backend, fence, reader| {
                let token = ConnectionToken(reader.one(token, "token")?.value);
                Ok(async move { part(&backend)?.resume(fence, token).await })
            },
            move |state, _| out.write(&put_connection_state(&state)),
        )
    }
}

unsafe extern "C" fn stats(handle: u64, call: *mut dm_call, out: *mut dm_offload_stats) -> u32 {
    let out = Out(out);
    // SAFETY: the caller upholds the interface's contract: open handle, memory valid until the call ended.
    unsafe {
        handle_of(handle).serve(
            "offload.stats",
            call,
            |backend, _, _| Ok(async move { part(&backend)?.stats().await }),
            move |stats, _| out.write(&put_stats(&stats)),
        )
    }
}
