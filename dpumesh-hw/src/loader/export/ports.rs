//! [`dpumesh_core::Ports`], exported. An open port keeps frames of its own and copies: a frame of ours owns its octets.

use std::os::fd::AsRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use dpumesh_core::{Backend, BackendExt, Error, Frame, PortIo, Ports, Result};

use super::super::abi::*;
use super::super::arena::{Sized32, write_over};
use super::super::codec::*;
use super::instance as handle_of;
use super::instance::{Out, panicked, stop};

/// Frames that are moved at a time.
const BATCH: usize = 32;

pub(super) fn fill(table: &mut dm_ops) {
    table.port_list = Some(list);
    table.port_open = Some(open);
    table.port_close = Some(close);
    table.port_receive = Some(receive);
    table.port_transmit = Some(transmit);
    table.port_refused = Some(refused);
}

fn part(backend: &Arc<dyn Backend>) -> Result<&dyn Ports> {
    backend.require_ports()
}

/// An open port.
struct OpenPort {
    io: Box<dyn PortIo>,
    frames: Vec<Frame>,
    /// Came with frames in front of it: for the next call.
    failure: Option<Error>,
}

unsafe extern "C" fn list(handle: u64, call: *mut dm_call, rows: *mut dm_rows) -> u32 {
    let rows = Out(rows);
    // SAFETY: the caller upholds the interface's contract: open handle, memory valid until the call ended.
    unsafe {
        handle_of(handle).serve(
            "ports.list",
            call,
            |backend, _, _| Ok(async move { part(&backend)?.list().await }),
            move |all: Vec<_>, arena| {
                let all: Vec<_> = all.iter().map(|one| put_port_info(one, arena)).collect();
                rows.fill(&all)
            },
        )
    }
}

unsafe extern "C" fn open(
    handle: u64,
    call: *mut dm_call,
    port: *const dm_port_info,
    out: *mut dm_port_info,
) -> u32 {
    let out = Out(out);
    // SAFETY: the caller upholds the interface's contract: open handle, memory valid until the call ended.
    unsafe {
        handle_of(handle).serve(
            "ports.open",
            call,
            |backend, fence, reader| {
                let port = get_port(reader.one(port, "port")?.port, "port.port")?;
                Ok(async move { part(&backend)?.open(fence, port).await })
            },
            move |io: Box<dyn PortIo>, _| {
                let (limits, fd) = (io.limits(), io.poll_fd().map_or(-1, |fd| fd.as_raw_fd()));
                let port = OpenPort {
                    io,
                    frames: Vec::new(),
                    failure: None,
                };
                let handle = Box::into_raw(Box::new(port)).expose_provenance() as u64;
                out.write(&put_open(&limits, handle, fd))
            },
        )
    }
}

/// The open port behind a handle.
///
/// # Safety
/// `open` gave it, `close` has not been called, and nobody else uses it meanwhile.
unsafe fn port_of<'a>(port: u64) -> &'a mut OpenPort {
    // SAFETY: by contract a box of `open`, used by one thread at a time.
    unsafe { &mut *std::ptr::with_exposed_provenance_mut::<OpenPort>(port as usize) }
}

unsafe extern "C" fn close(_handle: u64, port: u64) {
    let port = std::ptr::with_exposed_provenance_mut::<OpenPort>(port as usize);
    // SAFETY: the last use of an open port.
    let port = unsafe { Box::from_raw(port) };
    stop("ports.close", (), || drop(port));
}

unsafe extern "C" fn refused(_handle: u64, port: u64) -> u64 {
    // SAFETY: an open port.
    stop("ports.refused", 0, || unsafe { port_of(port) }.io.refused())
}

unsafe extern "C" fn receive(
    _handle: u64,
    port: u64,
    frames: *mut dm_frame,
    count: u32,
    done: *mut u32,
    error: *mut dm_error,
) -> u32 {
    // SAFETY: the caller's memory, an open port.
    let (frames, port) = unsafe { (slice(frames, count), port_of(port)) };
    let moved = catch_unwind(AssertUnwindSafe(|| port.receive(frames)));
    // SAFETY: the caller's memory.
    unsafe { tell("ports.receive", moved, done, error) }
}

unsafe extern "C" fn transmit(
    _handle: u64,
    port: u64,
    frames: *mut dm_frame,
    count: u32,
    done: *mut u32,
    error: *mut dm_error,
) -> u32 {
    // SAFETY: the caller's memory, an open port.
    let (frames, port) = unsafe { (slice(frames, count), port_of(port)) };
    let moved = catch_unwind(AssertUnwindSafe(|| port.transmit(frames)));
    // SAFETY: the caller's memory.
    unsafe { tell("ports.transmit", moved, done, error) }
}

/// The caller's frames.
///
/// # Safety
/// `count` frames are there, of the size that we know (a later caller's are of another major version).
unsafe fn slice<'a>(frames: *mut dm_frame, count: u32) -> &'a mut [dm_frame] {
    if frames.is_null() {
        return &mut [];
    }
    // SAFETY: by contract.
    unsafe { std::slice::from_raw_parts_mut(frames, count as usize) }
}

unsafe fn tell(
    operation: &'static str,
    moved: std::thread::Result<Result<usize>>,
    done: *mut u32,
    error: *mut dm_error,
) -> u32 {
    let told = match moved {
        Ok(Ok(count)) => {
            // SAFETY: the caller's.
            unsafe { done.write(count as u32) };
            return DM_DONE;
        }
        Ok(Err(told)) => told,
        Err(payload) => panicked(operation, &*payload),
    };
    // SAFETY: the caller's.
    unsafe { write_over(error, &put_error(&told)) };
    DM_FAILED
}

impl OpenPort {
    fn receive(&mut self, frames: &mut [dm_frame]) -> Result<usize> {
        if let Some(failure) = self.failure.take() {
            return Err(failure);
        }
        let mut done = 0;
        for batch in frames.chunks_mut(BATCH) {
            self.room_for(batch.len());
            let count = match self.io.receive(&mut self.frames[..batch.len()]) {
                Ok(count) => count,
                Err(failure) if done > 0 => {
                    self.failure = Some(failure);
                    break;
                }
                Err(failure) => return Err(failure),
            };
            for (raw, frame) in batch.iter_mut().zip(&self.frames).take(count) {
                hand_over(frame, raw)?;
            }
            done += count;
            if count < batch.len() {
                break;
            }
        }
        Ok(done)
    }

    fn transmit(&mut self, frames: &mut [dm_frame]) -> Result<usize> {
        if let Some(failure) = self.failure.take() {
            return Err(failure);
        }
        let mut done = 0;
        for batch in frames.chunks(BATCH) {
            self.room_for(batch.len());
            for (raw, frame) in batch.iter().zip(&mut self.frames) {
                take_over(raw, frame)?;
            }
            match self.io.transmit(&mut self.frames[..batch.len()]) {
                Ok(count) => done += count,
                Err(failure) if done > 0 => {
                    self.failure = Some(failure);
                    break;
                }
                Err(failure) => return Err(failure),
            }
            if done % BATCH != 0 {
                break;
            }
        }
        Ok(done)
    }

    fn room_for(&mut self, count: usize) {
        while self.frames.len() < count {
            self.frames.push(Frame::new());
        }
    }
}

/// Copies a frame into the caller's.
fn hand_over(frame: &Frame, raw: &mut dm_frame) -> Result<()> {
    let octets = frame.octets();
    if octets.len() as u64 > raw.capacity {
        let message = format!("a frame of {} octets in room for {}", octets.len(), raw.capacity);
        return Err(Error::new(dpumesh_core::ErrorKind::Invalid, "ports.receive", message).field("capacity"));
    }
    // SAFETY: `capacity` octets are the caller's room.
    unsafe { std::ptr::copy_nonoverlapping(octets.as_ptr(), raw.at, octets.len()) };
    raw.len = octets.len() as u64;
    put_marks(frame, raw);
    Ok(())
}

/// Copies the caller's frame. One longer than any frame may be stays too long, so that the port refuses and counts it.
fn take_over(raw: &dm_frame, frame: &mut Frame) -> Result<()> {
    let len = raw.len as usize;
    let octets = if len == 0 {
        &[]
    } else {
        // SAFETY: `len` octets are the caller's frame.
        unsafe { std::slice::from_raw_parts(raw.at, len) }
    };
    if !frame.fill(octets) {
        *frame = Frame::copy_of(octets);
    }
    get_marks(raw, frame).map_err(|broken| Error::new(dpumesh_core::ErrorKind::Abi, "ports.transmit", broken))
}

const _: () = assert!(
    dm_frame::LEAST == size_of::<dm_frame>(),
    "frames come in rows of this size"
);
