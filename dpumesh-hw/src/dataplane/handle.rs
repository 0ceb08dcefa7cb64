//! Commands to an engine from other threads, carried out between two batches.
//!
//! A command is sent, the worker is woken, and the answer comes back once the worker has done it. Dropping the
//! future before that does not undo the command.

use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use dpumesh_core::steering::SteeringRule;
use dpumesh_core::{PortIo, PortRef};
use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::sync::oneshot;

use super::port::PortPolicy;
use super::rules::Refused;
use super::stats::EngineStats;

/// A way to reach an engine; clones reach the same one.
///
/// An engine goes on without handles: who drops the last one before [`EngineHandle::stop`] cannot end it any more.
#[derive(Clone)]
pub struct EngineHandle {
    commands: Sender<Command>,
    wake: Arc<EventFd>,
}

/// The engine's thread has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the dataplane's engine has stopped")]
pub struct EngineGone;

/// A change of the installed rules; `slot` is the caller's dense number, used again only after it was uninstalled.
#[derive(Clone, Debug)]
pub(super) enum RuleChange {
    Install { slot: u32, rule: Arc<SteeringRule> },
    Uninstall { slot: u32 },
}

/// Final or present count of a rule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct RuleReading {
    pub(super) packets: u64,
    pub(super) octets: u64,
    pub(super) idle_ms: Option<u64>,
}

/// Readings by slot.
pub(super) type Readings = Vec<(u32, RuleReading)>;

/// Rules changed all or none: the final readings of what was uninstalled, in the order of the changes, or the change
/// that was refused.
pub(super) type RulesChanged = Result<Readings, (usize, Refused)>;

/// What a worker can be told.
pub(super) enum Command {
    OpenPort {
        io: Box<dyn PortIo>,
        done: oneshot::Sender<bool>,
    },
    ClosePort {
        port: PortRef,
        done: oneshot::Sender<()>,
    },
    SetPolicy {
        port: PortRef,
        policy: Option<PortPolicy>,
        done: oneshot::Sender<bool>,
    },
    Rules {
        changes: Vec<RuleChange>,
        done: oneshot::Sender<RulesChanged>,
    },
    Counters {
        slots: Vec<u32>,
        done: oneshot::Sender<Readings>,
    },
    Stats {
        done: oneshot::Sender<EngineStats>,
    },
    Stop,
}

/// The worker's end.
pub(super) struct Mailbox {
    pub(super) commands: Receiver<Command>,
    pub(super) wake: Arc<EventFd>,
}

/// A handle and the mailbox it reaches.
pub(super) fn pair() -> nix::Result<(EngineHandle, Mailbox)> {
    let wake = Arc::new(EventFd::from_flags(
        EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK,
    )?);
    let (sender, commands) = channel();
    Ok((
        EngineHandle {
            commands: sender,
            wake: Arc::clone(&wake),
        },
        Mailbox { commands, wake },
    ))
}

impl EngineHandle {
    /// Gives the engine a port's frames; false when it cannot number one more port. A port that was open is replaced.
    ///
    /// # Errors
    /// [`EngineGone`].
    pub async fn open_port(&self, io: Box<dyn PortIo>) -> Result<bool, EngineGone> {
        self.ask(|done| Command::OpenPort { io, done }).await
    }

    /// Drops a port's frames; its rules and policy stay.
    ///
    /// # Errors
    /// [`EngineGone`].
    pub async fn close_port(&self, port: PortRef) -> Result<(), EngineGone> {
        self.ask(|done| Command::ClosePort { port, done }).await
    }

    /// Says what may come in by a port; without a policy nothing may. False when one of the addresses is another
    /// local pod's, or the port cannot be numbered: nothing changed then.
    ///
    /// # Errors
    /// [`EngineGone`].
    pub async fn set_policy(&self, port: PortRef, policy: Option<PortPolicy>) -> Result<bool, EngineGone> {
        self.ask(|done| Command::SetPolicy { port, policy, done }).await
    }

    /// What was counted so far.
    ///
    /// # Errors
    /// [`EngineGone`].
    pub async fn stats(&self) -> Result<EngineStats, EngineGone> {
        self.ask(|done| Command::Stats { done }).await
    }

    /// Ends [`super::Engine::run`] after the present turn. An engine that has ended is no error.
    pub fn stop(&self) {
        let _ = self.send(Command::Stop); // gone already: what was wanted
    }

    /// Sends changes of the rules; the answer comes once no frame meets the old ones any more.
    pub(super) fn change_rules(
        &self,
        changes: Vec<RuleChange>,
    ) -> Result<oneshot::Receiver<RulesChanged>, EngineGone> {
        let (done, answer) = oneshot::channel();
        self.send(Command::Rules { changes, done })?;
        Ok(answer)
    }

    pub(super) async fn read_counters(&self, slots: Vec<u32>) -> Result<Readings, EngineGone> {
        self.ask(|done| Command::Counters { slots, done }).await
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, EngineGone> {
        let (done, answer) = oneshot::channel();
        self.send(command(done))?;
        answer.await.map_err(|_| EngineGone)
    }

    fn send(&self, command: Command) -> Result<(), EngineGone> {
        self.commands.send(command).map_err(|_| EngineGone)?;
        match self.wake.write(1) {
            // EAGAIN: the counter is at its maximum, so the worker is about to wake anyway.
            Ok(_) | Err(nix::Error::EAGAIN) => Ok(()),
            Err(_) => Err(EngineGone),
        }
    }
}

impl fmt::Debug for EngineHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EngineHandle").finish_non_exhaustive()
    }
}

impl fmt::Debug for Mailbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mailbox").finish_non_exhaustive()
    }
}
