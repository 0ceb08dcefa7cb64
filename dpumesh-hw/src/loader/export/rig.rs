//! What the conformance kit may do to an exported backend's card.

use super::super::abi::*;
use super::super::arena::{Reader, Sized32, write_over};
use super::super::codec::{get_port, put_program};
use super::{Arena, CardRig, Constructor, instance, stop};

/// The hooks of a library whose cards `C` opens; those without a rig fail each.
pub(super) fn table<C: Constructor>() -> dm_hooks {
    let mut table = dm_hooks::empty();
    table.survives = 1;
    table.lose = Some(lose);
    table.bring_back = Some(bring_back);
    table.inject = Some(inject);
    table.observe = Some(observe);
    table.netns = Some(netns);
    table.jam = Some(jam);
    table.strand = Some(strand);
    table.program = Some(program::<C>);
    table
}

/// Runs with the rig of a card.
///
/// # Safety
/// The handle is open.
unsafe fn with(handle: u64, run: impl FnOnce(&dyn CardRig) -> u32) -> u32 {
    // SAFETY: by contract.
    let rig = unsafe { instance(handle) }.rig.clone();
    let Some(rig) = rig else { return DM_FAILED };
    stop("rig", DM_FAILED, || run(&*rig))
}

unsafe extern "C" fn lose(handle: u64) -> u32 {
    // SAFETY: open handle.
    unsafe {
        with(handle, |rig| {
            rig.lose();
            DM_DONE
        })
    }
}

unsafe extern "C" fn bring_back(handle: u64) -> u32 {
    // SAFETY: open handle.
    unsafe {
        with(handle, |rig| {
            rig.bring_back();
            DM_DONE
        })
    }
}

unsafe extern "C" fn inject(handle: u64, port: dm_port, octets: *const u8, len: u64) -> u32 {
    let octets = if len == 0 {
        &[][..]
    } else {
        // SAFETY: the caller's octets.
        unsafe { std::slice::from_raw_parts(octets, len as usize) }
    };
    // SAFETY: open handle.
    unsafe {
        with(handle, |rig| match get_port(port, "port") {
            Ok(port) if rig.inject(port, octets) => DM_DONE,
            _ => DM_FAILED,
        })
    }
}

unsafe extern "C" fn observe(
    handle: u64,
    port: dm_port,
    buffer: *mut u8,
    capacity: u64,
    len: *mut u64,
) -> u32 {
    // SAFETY: open handle.
    unsafe {
        with(handle, |rig| {
            let Ok(port) = get_port(port, "port") else {
                return DM_FAILED;
            };
            let Some(octets) = rig.observe(port) else {
                return DM_EMPTY;
            };
            let count = octets.len().min(capacity as usize);
            std::ptr::copy_nonoverlapping(octets.as_ptr(), buffer, count);
            len.write(octets.len() as u64);
            DM_DONE
        })
    }
}

unsafe extern "C" fn netns(handle: u64, path: dm_str, present: u32) -> u32 {
    // SAFETY: open handle.
    unsafe {
        with(handle, |rig| {
            let Ok(path) = Reader::trusting().text(path, "path") else {
                return DM_FAILED;
            };
            rig.netns(&path, present != 0);
            DM_DONE
        })
    }
}

unsafe extern "C" fn jam(handle: u64, port: dm_port, jammed: u32) -> u32 {
    // SAFETY: open handle.
    unsafe {
        with(handle, |rig| {
            let Ok(port) = get_port(port, "port") else {
                return DM_FAILED;
            };
            rig.jam(port, jammed != 0);
            DM_DONE
        })
    }
}

unsafe extern "C" fn strand(handle: u64, port: dm_port) -> u32 {
    // SAFETY: open handle.
    unsafe {
        with(handle, |rig| {
            let Ok(port) = get_port(port, "port") else {
                return DM_FAILED;
            };
            rig.strand(port);
            DM_DONE
        })
    }
}

unsafe extern "C" fn program<C: Constructor>(index: u32, to: *mut dm_program) -> u32 {
    stop("rig.program", DM_FAILED, || {
        let programs = C::programs();
        let Some(program) = programs.get(index as usize) else {
            return DM_EMPTY;
        };
        let mut arena = Arena::growing();
        let raw = put_program(dpumesh_core::offload::Slot(index), program, &mut arena);
        std::mem::forget(arena); // the octets are the library's for good, by contract: few, and asked for by tests
        // SAFETY: the caller's memory.
        unsafe { write_over(to, &raw) };
        DM_DONE
    })
}
