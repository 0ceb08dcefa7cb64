//! Child processes whose life hangs on their parent's.
//!
//! Linux sends the parent-death signal when the *thread* that started the child ends, not the process. Children are
//! therefore started from one thread that lasts as long as the process ([`Namespace::spawn`]), and the
//! child asks for the signal itself ([`die_with_parent`]): asking on its behalf would need code between fork and
//! exec.

use std::io;
use std::process::{Child, Command};
use std::sync::OnceLock;
use std::sync::mpsc::{Sender, SyncSender, channel, sync_channel};
use std::thread;

use nix::sched::{CloneFlags, setns};
use nix::sys::prctl;
use nix::sys::signal::Signal;

use super::Namespace;

/// Environment variable in which a child finds the process id of the process that started it.
pub const PARENT: &str = "DPUMESH_PARENT";

/// Asks the kernel to kill the calling process (SIGKILL) when the one that started it with [`Namespace::spawn`]
/// ends, however it ends. Call it early in `main`, after [`super::ensure_privilege`]: changing credentials clears
/// the request. A process that was started in another way keeps its independence, and `false` comes back.
///
/// # Errors
/// If the parent is gone already: the caller should end at once.
pub fn die_with_parent() -> io::Result<bool> {
    let Some(parent) = std::env::var(PARENT)
        .ok()
        .and_then(|text| text.parse::<u32>().ok())
    else {
        return Ok(false);
    };
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    // The parent may have died before the request was made.
    if std::os::unix::process::parent_id() != parent {
        return Err(io::Error::other(format!("parent process {parent} has ended")));
    }
    Ok(true)
}

/// Starts `command` in `namespace` from the process-wide starter thread.
pub(super) fn spawn_from_lasting_thread(namespace: Namespace, mut command: Command) -> io::Result<Child> {
    command.env(PARENT, std::process::id().to_string());
    let (reply, answer) = sync_channel(1);
    let gone = |_| io::Error::other("the process-starting thread has ended");
    starter()?
        .send(Start {
            namespace,
            command,
            reply,
        })
        .map_err(|_| gone(()))?;
    answer.recv().map_err(|_| gone(()))?
}

struct Start {
    namespace: Namespace,
    command: Command,
    reply: SyncSender<io::Result<Child>>,
}

fn starter() -> io::Result<&'static Sender<Start>> {
    static STARTER: OnceLock<Sender<Start>> = OnceLock::new();
    if let Some(starter) = STARTER.get() {
        return Ok(starter);
    }
    let home = Namespace::current().map_err(io::Error::other)?;
    let (sender, requests) = channel::<Start>();
    thread::Builder::new()
        .name("process-starter".into())
        .spawn(move || {
            for Start {
                namespace,
                mut command,
                reply,
            } in requests
            {
                // A caller that has gone away gets no answer; its child is reaped by init.
                let _ = reply.send(start_inside(&namespace, &home, &mut command));
            }
        })?;
    // A second thread that lost the race ends at once, as its sender is dropped here.
    Ok(STARTER.get_or_init(|| sender))
}

fn start_inside(namespace: &Namespace, home: &Namespace, command: &mut Command) -> io::Result<Child> {
    setns(namespace, CloneFlags::CLONE_NEWNET)?;
    let started = command.spawn();
    // Back home: a thread that stays would keep the namespace alive.
    let home_again = setns(home, CloneFlags::CLONE_NEWNET);
    let mut child = started?;
    if let Err(errno) = home_again {
        // The caller never gets to know this child, so it must not live.
        let _ = child.kill();
        let _ = child.wait();
        return Err(errno.into());
    }
    Ok(child)
}
