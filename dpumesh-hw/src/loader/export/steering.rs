//! [`dpumesh_core::FlowSteering`], exported.

use std::sync::Arc;

use dpumesh_core::{Backend, BackendExt, FlowSteering, Result};

use super::super::abi::*;
use super::super::codec::*;
use super::instance as handle_of;
use super::instance::{Out, locked};

pub(super) fn fill(table: &mut dm_ops) {
    table.steering_validate = Some(validate);
    table.steering_apply = Some(apply);
    table.steering_list = Some(list);
    table.steering_counters = Some(counters);
    table.steering_flush = Some(flush);
    table.steering_set_miss_policy = Some(set_miss_policy);
    table.steering_occupancy = Some(occupancy);
}

fn part(backend: &Arc<dyn Backend>) -> Result<&dyn FlowSteering> {
    backend.require_steering()
}

unsafe extern "C" fn validate(
    handle: u64,
    call: *mut dm_call,
    given: *const dm_rules,
    rows: *mut dm_rows,
) -> u32 {
    let rows = Out(rows);
    // SAFETY: the caller upholds the interface's contract: open handle, memory valid until the call ended.
    unsafe {
        handle_of(handle).serve(
            "steering.validate",
            call,
            |backend, _, reader| {
                let rules = get_rules(&reader.one(given, "rules")?, reader)?;
                Ok(async move { part(&backend)?.validate(&rules).await })
            },
            move |all: Vec<_>, arena| {
                let all: Vec<_> = all.iter().map(|one| put_verdict(one, arena)).collect();
                rows.fill(&all)
            },
        )
    }
}

unsafe extern "C" fn apply(
    handle: u64,
    call: *mut dm_call,
    batch: *const dm_batch,
    out: *mut dm_outcome,
) -> u32 {
    let out = Out(out);
    // SAFETY: the caller upholds the interface's contract: open handle, memory valid until the call ended.
    unsafe {
        let instance = handle_of(handle);
        instance.serve(
            "steering.apply",
            call,
            |backend, fence, reader| {
                let spare = Arc::clone(&instance.spare);
                let batch = get_batch(&reader.one(batch, "batch")?, reader, &mut locked(&spare))?;
                Ok(async move {
                    let outcome = part(&backend)?.apply(fence, &batch).await;
                    locked(&spare).keep(batch);
                    outcome
                })
            },
            move |outcome, arena| {
                // SAFETY: the caller's, until the call ended.
                write_outcome(&outcome, out.get(), arena);
                true
            },
        )
    }
}

unsafe extern "C" fn list(
    handle: u64,
    call: *mut dm_call,
    whose: *const dm_of_owner,
    rows: *mut dm_rows,
) -> u32 {
    let rows = Out(rows);
    // SAFETY: the caller upholds the interface's contract: open handle, memory valid until the call ended.
    unsafe {
        handle_of(handle).serve(
            "steering.list",
            call,
            |backend, _, reader| {
                let owner = get_owner(reader.one(whose, "whose")?.owner, "whose.owner")?;
                Ok(async move { part(&backend)?.list(owner).await })
            },
            move |all: Vec<_>, arena| {
                let all: Vec<_> = all.iter().map(|one| put_installed(one, arena)).collect();
                rows.fill(&all)
            },
        )
    }
}

unsafe extern "C" fn counters(
    handle: u64,
    call: *mut dm_call,
    which: *const dm_cookies,
    rows: *mut dm_rows,
) -> u32 {
    let rows = Out(rows);
    // SAFETY: the caller upholds the interface's contract: open handle, memory valid until the call ended.
    unsafe {
        handle_of(handle).serve(
            "steering.counters",
            call,
            |backend, _, reader| {
                let which = reader.one(which, "which")?;
                let owner = get_owner(which.owner, "which.owner")?;
                let cookies = reader.frozen::<dm_cookie>(which.cookies, "which.cookies")?;
                let cookies: Vec<_> = cookies.into_iter().map(get_cookie).collect();
                Ok(async move { part(&backend)?.counters(owner, &cookies).await })
            },
            move |all: Vec<_>, _| {
                let all: Vec<_> = all.into_iter().map(put_count).collect();
                rows.fill(&all)
            },
        )
    }
}

unsafe extern "C" fn flush(
    handle: u64,
    call: *mut dm_call,
    whose: *const dm_of_owner,
    out: *mut dm_number,
) -> u32 {
    let out = Out(out);
    // SAFETY: the caller upholds the interface's contract: open handle, memory valid until the call ended.
    unsafe {
        handle_of(handle).serve(
            "steering.flush",
            call,
            |backend, fence, reader| {
                let owner = get_owner(reader.one(whose, "whose")?.owner, "whose.owner")?;
                Ok(async move { part(&backend)?.flush(fence, owner).await })
            },
            move |removed, _| out.write(&put_number(removed)),
        )
    }
}

unsafe extern "C" fn set_miss_policy(handle: u64, call: *mut dm_call, miss: *const dm_miss) -> u32 {
    // SAFETY: the caller upholds the interface's contract: open handle, memory valid until the call ended.
    unsafe {
        handle_of(handle).serve(
            "steering.set_miss_policy",
            call,
            |backend, fence, reader| {
                let miss = reader.one(miss, "miss")?;
                let port = get_port(miss.port, "miss.port")?;
                let policy = get_miss(miss.policy, "miss.policy")?;
                Ok(async move { part(&backend)?.set_miss_policy(fence, port, policy).await })
            },
            move |(), _| true,
        )
    }
}

unsafe extern "C" fn occupancy(handle: u64, call: *mut dm_call, rows: *mut dm_rows) -> u32 {
    let rows = Out(rows);
    // SAFETY: the caller upholds the interface's contract: open handle, memory valid until the call ended.
    unsafe {
        handle_of(handle).serve(
            "steering.occupancy",
            call,
            |backend, _, _| Ok(async move { part(&backend)?.occupancy().await }),
            move |all: Vec<_>, arena| {
                let all: Vec<_> = all.iter().map(|one| put_occupancy(one, arena)).collect();
                rows.fill(&all)
            },
        )
    }
}
