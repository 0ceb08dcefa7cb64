//! [`dpumesh_core::VfAllocator`], exported.

use std::sync::Arc;

use dpumesh_core::{Backend, BackendExt, PfIndex, Result, VfAllocator};

use super::super::abi::*;
use super::super::codec::*;
use super::instance as handle_of;
use super::instance::Out;

pub(super) fn fill(table: &mut dm_ops) {
    table.vf_plan_count = Some(plan_count);
    table.vf_set_count = Some(set_count);
    table.vf_list = Some(list);
    table.vf_lease = Some(lease);
    table.vf_admit = Some(admit);
    table.vf_revoke = Some(revoke);
    table.vf_configure = Some(configure);
    table.vf_attach = Some(attach);
    table.vf_detach = Some(detach);
    table.vf_release = Some(release);
    table.vf_reclaim = Some(reclaim);
}

fn part(backend: &Arc<dyn Backend>) -> Result<&dyn VfAllocator> {
    backend.require_vf()
}

unsafe extern "C" fn plan_count(
    handle: u64,
    call: *mut dm_call,
    want: *const dm_vf_count,
    out: *mut dm_number,
) -> u32 {
    let out = Out(out);
    // SAFETY: the caller upholds the interface's contract: open handle, memory valid until the call ended.
    unsafe {
        handle_of(handle).serve(
            "vf.plan_vf_count",
            call,
            |backend, _, reader| {
                let want = reader.one(want, "want")?;
                let pf = PfIndex(small(want.pf, "want.pf")?);
                let count = small(want.count, "want.count")?;
                Ok(async move { part(&backend)?.plan_vf_count(pf, count).await })
            },
            move |disruption, _| out.write(&put_number(put_disruption(disruption).into())),
        )
    }
}

unsafe extern "C" fn set_count(
    handle: u64,
    call: *mut dm_call,
    want: *const dm_vf_count,
    out: *mut dm_vf_count,
) -> u32 {
    let out = Out(out);
    // SAFETY: the caller upholds the interface's contract: open handle, memory valid until the call ended.
    unsafe {
        handle_of(handle).serve(
            "vf.set_vf_count",
            call,
            |backend, fence, reader| {
                let want = reader.one(want, "want")?;
                let pf = PfIndex(small(want.pf, "want.pf")?);
                let count = small(want.count, "want.count")?;
                Ok(async move { Ok((pf, part(&backend)?.set_vf_count(fence, pf, count).await?)) })
            },
            move |(pf, count), _| out.write(&put_vf_count(pf, count.actual, count.needs)),
        )
    }
}

unsafe extern "C" fn list(handle: u64, call: *mut dm_call, rows: *mut dm_rows) -> u32 {
    let rows = Out(rows);
    // SAFETY: the caller upholds the interface's contract: open handle, memory valid until the call ended.
    unsafe {
        handle_of(handle).serve(
            "vf.list",
            call,
            |backend, _, _| Ok(async move { part(&backend)?.list().await }),
            move |all: Vec<_>, arena| {
                let all: Vec<_> = all.iter().map(|one| put_state(one, arena)).collect();
                rows.fill(&all)
            },
        )
    }
}

unsafe extern "C" fn lease(
    handle: u64,
    call: *mut dm_call,
    request: *const dm_vf_request,
    out: *mut dm_vf_lease,
) -> u32 {
    let out = Out(out);
    // SAFETY: the caller upholds the interface's contract: open handle, memory valid until the call ended.
    unsafe {
        handle_of(handle).serve(
            "vf.lease",
            call,
            |backend, fence, reader| {
                let request = get_request(&reader.one(request, "request")?, reader)?;
                Ok(async move { part(&backend)?.lease(fence, &request).await })
            },
            move |lease, arena| out.write(&put_lease(&lease, arena)),
        )
    }
}

unsafe extern "C" fn admit(handle: u64, call: *mut dm_call, order: *const dm_vf_order) -> u32 {
    // SAFETY: the caller upholds the interface's contract: open handle, memory valid until the call ended.
    unsafe {
        handle_of(handle).serve(
            "vf.admit",
            call,
            |backend, fence, reader| {
                let lease = get_order_lease(&reader.one(order, "order")?, reader)?;
                Ok(async move { part(&backend)?.admit(fence, &lease).await })
            },
            move |(), _| true,
        )
    }
}

unsafe extern "C" fn revoke(handle: u64, call: *mut dm_call, order: *const dm_vf_order) -> u32 {
    // SAFETY: the caller upholds the interface's contract: open handle, memory valid until the call ended.
    unsafe {
        handle_of(handle).serve(
            "vf.revoke",
            call,
            |backend, fence, reader| {
                let lease = get_order_lease(&reader.one(order, "order")?, reader)?;
                Ok(async move { part(&backend)?.revoke(fence, &lease).await })
            },
            move |(), _| true,
        )
    }
}

unsafe extern "C" fn detach(handle: u64, call: *mut dm_call, order: *const dm_vf_order) -> u32 {
    // SAFETY: the caller upholds the interface's contract: open handle, memory valid until the call ended.
    unsafe {
        handle_of(handle).serve(
            "vf.detach",
            call,
            |backend, fence, reader| {
                let lease = get_order_lease(&reader.one(order, "order")?, reader)?;
                Ok(async move { part(&backend)?.detach(fence, &lease).await })
            },
            move |(), _| true,
        )
    }
}

unsafe extern "C" fn configure(handle: u64, call: *mut dm_call, order: *const dm_vf_order) -> u32 {
    // SAFETY: the caller upholds the interface's contract: open handle, memory valid until the call ended.
    unsafe {
        handle_of(handle).serve(
            "vf.configure",
            call,
            |backend, fence, reader| {
                let order = reader.one(order, "order")?;
                let lease = get_order_lease(&order, reader)?;
                let config = get_config(&reader.one(order.config, "order.config")?)?;
                Ok(async move { part(&backend)?.configure(fence, &lease, &config).await })
            },
            move |(), _| true,
        )
    }
}

unsafe extern "C" fn attach(
    handle: u64,
    call: *mut dm_call,
    order: *const dm_vf_order,
    out: *mut dm_attached,
) -> u32 {
    let out = Out(out);
    // SAFETY: the caller upholds the interface's contract: open handle, memory valid until the call ended.
    unsafe {
        handle_of(handle).serve(
            "vf.attach",
            call,
            |backend, fence, reader| {
                let order = reader.one(order, "order")?;
                let lease = get_order_lease(&order, reader)?;
                let place = get_attachment(&reader.one(order.attachment, "order.attachment")?, reader)?;
                Ok(async move { part(&backend)?.attach(fence, &lease, &place).await })
            },
            move |attached, _| out.write(&put_attached(&attached)),
        )
    }
}

unsafe extern "C" fn release(
    handle: u64,
    call: *mut dm_call,
    order: *const dm_vf_order,
    out: *mut dm_number,
) -> u32 {
    let out = Out(out);
    // SAFETY: the caller upholds the interface's contract: open handle, memory valid until the call ended.
    unsafe {
        handle_of(handle).serve(
            "vf.release",
            call,
            |backend, fence, reader| {
                let order = reader.one(order, "order")?;
                let lease = get_order_lease(&order, reader)?;
                let level = get_level(order.level, "order.level")?;
                Ok(async move { part(&backend)?.release(fence, &lease, level).await })
            },
            move |released, _| out.write(&put_number(put_released(released).into())),
        )
    }
}

unsafe extern "C" fn reclaim(
    handle: u64,
    call: *mut dm_call,
    order: *const dm_vf_order,
    out: *mut dm_number,
) -> u32 {
    let out = Out(out);
    // SAFETY: the caller upholds the interface's contract: open handle, memory valid until the call ended.
    unsafe {
        handle_of(handle).serve(
            "vf.reclaim",
            call,
            |backend, fence, reader| {
                let order = reader.one(order, "order")?;
                let port = get_port(order.port, "order.port")?;
                let live = get_owners(order.live, reader)?;
                let level = get_level(order.level, "order.level")?;
                Ok(async move { part(&backend)?.reclaim(fence, port, &live, level).await })
            },
            move |level, _| out.write(&put_number(put_level(level).into())),
        )
    }
}
