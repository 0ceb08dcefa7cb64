//! [`Hooks`]: what the conformance kit may do to a card behind a foreign library's back.

use std::sync::Arc;

use dpumesh_core::offload::Program;
use dpumesh_core::{Error, ErrorKind, PortRef, Result};

use super::abi::*;
use super::arena::{Reader, Sized32};
use super::codec::{get_program, put_port};
use super::driver::Driver;
use super::watch::Operation;

/// Longest frame that is observed.
const LONGEST: usize = 1 << 17;

/// What the kit may do to one open card. Empty for a library without the symbol `dpumesh_conformance_v1`.
///
/// Valid as long as the backend that it was opened with lives: what is asked afterwards is refused.
#[derive(Clone, Debug)]
pub struct Hooks {
    table: dm_hooks,
    driver: Arc<Driver>,
}

impl Hooks {
    pub(super) fn new(table: Option<dm_hooks>, driver: Arc<Driver>) -> Self {
        Self {
            table: table.unwrap_or_else(dm_hooks::empty),
            driver,
        }
    }

    /// The card can vanish and return.
    pub fn can_reset(&self) -> bool {
        self.table.lose.is_some() && self.table.bring_back.is_some()
    }

    /// Frames can be handed in and seen.
    pub fn can_probe(&self) -> bool {
        self.table.inject.is_some() && self.table.observe.is_some()
    }

    /// Namespaces are the library's own, not the kernel's.
    pub fn has_namespaces(&self) -> bool {
        self.table.netns.is_some()
    }

    /// Opening again with the same configuration finds the same card.
    pub fn survives(&self) -> bool {
        self.table.survives == 1
    }

    /// VFs can be made to misbehave.
    pub fn can_sabotage(&self) -> bool {
        self.table.jam.is_some() && self.table.strand.is_some()
    }

    /// The card vanishes.
    ///
    /// # Errors
    /// `Unsupported`, or `Fault` when the library says no.
    pub fn lose(&self) -> Result<()> {
        // SAFETY: the handle is open: `run` checked.
        self.run("rig.lose", self.table.lose, |lose, handle| unsafe {
            lose(handle)
        })
    }

    /// The card returns.
    ///
    /// # Errors
    /// As [`Hooks::lose`].
    pub fn bring_back(&self) -> Result<()> {
        // SAFETY: as above.
        self.run("rig.bring_back", self.table.bring_back, |back, handle| unsafe {
            back(handle)
        })
    }

    /// Hands a frame in.
    ///
    /// # Errors
    /// As [`Hooks::lose`].
    pub fn inject(&self, port: PortRef, octets: &[u8]) -> Result<()> {
        let port = put_port(port);
        // SAFETY: as above; the octets live through the call.
        self.run("rig.inject", self.table.inject, |inject, handle| unsafe {
            inject(handle, port, octets.as_ptr(), octets.len() as u64)
        })
    }

    /// The next frame that left by a port.
    ///
    /// # Errors
    /// As [`Hooks::lose`].
    pub fn observe(&self, port: PortRef) -> Result<Option<Vec<u8>>> {
        let port = put_port(port);
        let (mut buffer, mut len, mut empty) = (vec![0; LONGEST], 0_u64, false);
        let room = buffer.as_mut_ptr();
        self.run("rig.observe", self.table.observe, |observe, handle| {
            // SAFETY: as above; the buffer is ours.
            let status = unsafe { observe(handle, port, room, LONGEST as u64, &raw mut len) };
            empty = status == DM_EMPTY;
            if empty { DM_DONE } else { status }
        })?;
        buffer.truncate(len.min(LONGEST as u64) as usize);
        Ok((!empty).then_some(buffer))
    }

    /// Makes a namespace known, or takes it away.
    ///
    /// # Errors
    /// As [`Hooks::lose`].
    pub fn netns(&self, path: &str, present: bool) -> Result<()> {
        let path = dm_str {
            at: path.as_ptr(),
            len: path.len() as u64,
        };
        // SAFETY: as above; the path lives through the call.
        self.run("rig.netns", self.table.netns, |netns, handle| unsafe {
            netns(handle, path, present.into())
        })
    }

    /// Makes moves of a VF fail, or work again.
    ///
    /// # Errors
    /// As [`Hooks::lose`].
    pub fn jam(&self, port: PortRef, jammed: bool) -> Result<()> {
        let port = put_port(port);
        // SAFETY: as above.
        self.run("rig.jam", self.table.jam, |jam, handle| unsafe {
            jam(handle, port, jammed.into())
        })
    }

    /// Takes a VF away.
    ///
    /// # Errors
    /// As [`Hooks::lose`].
    pub fn strand(&self, port: PortRef) -> Result<()> {
        let port = put_port(port);
        // SAFETY: as above.
        self.run("rig.strand", self.table.strand, |strand, handle| unsafe {
            strand(handle, port)
        })
    }

    /// Programs that the processor takes.
    pub fn programs(&self) -> Vec<Program> {
        let Some(program) = self.table.program else {
            return Vec::new();
        };
        (0..16)
            .map_while(|index| {
                let mut raw = dm_program::empty();
                // SAFETY: the memory is ours; what it points to afterwards is the library's, for good.
                let status = unsafe { program(index, &raw mut raw) };
                (status == DM_DONE)
                    .then(|| get_program(&raw, &Reader::trusting()).ok())
                    .flatten()
            })
            .collect()
    }

    fn run<F>(
        &self,
        operation: &'static str,
        function: Option<F>,
        run: impl FnOnce(F, u64) -> u32,
    ) -> Result<()> {
        let function = function
            .ok_or_else(|| Error::new(ErrorKind::Unsupported, operation, "the library has no such hook"))?;
        if self.driver.is_closing() {
            let message = "the backend is gone, and its card with it";
            return Err(Error::new(ErrorKind::Stale, operation, message));
        }
        self.driver.refuse_if_failed(operation)?;
        let inside = self.driver.watch.enter(Operation::named(operation));
        let status = run(function, self.driver.handle);
        drop(inside);
        match status {
            DM_DONE => Ok(()),
            status => {
                let message = format!("the library's hook returned status {status}");
                Err(Error::new(ErrorKind::Fault, operation, message))
            }
        }
    }
}
