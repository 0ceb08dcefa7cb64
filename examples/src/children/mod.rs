//! Processes of a run: started in a namespace, watched, ended by name and number, and never left behind.
//!
//! Three nets, one under the other: [`Process`] ends its process when it is dropped; a child that asks for it (see
//! [`die_with_parent`](dpumesh_hw::netns::process::die_with_parent)) dies with its parent; and a [`Run`] writes down
//! what it started, so that the next run ends what is left of one that was killed. [`Interrupt`] turns Ctrl-C into
//! an orderly end.
//!
//! Children get process groups of their own: Ctrl-C on the terminal reaches the parent alone, which ends them in order.

mod handle;
mod interrupt;
mod output;
mod record;

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use dpumesh_hw::netns::Namespace;
use nix::sys::signal::Signal;
use serde::de::DeserializeOwned;

use handle::Handle;
use output::Lines;

pub use interrupt::Interrupt;
pub use record::{Leftovers, Run, RunError};

/// Lines kept of what a process says on standard output.
const OUTPUT: usize = 10_000;
/// Lines kept of what a process says on standard error.
const TAIL: usize = 40;
/// Between two attempts to connect.
const ATTEMPT: Duration = Duration::from_millis(20);
/// How long the last lines of a process that has ended may take.
const LAST_LINES: Duration = Duration::from_secs(2);
/// How long a process that is dropped has to end by itself.
const GRACE: Duration = Duration::from_secs(2);

/// What went wrong with a process, and its last words.
#[derive(Debug, thiserror::Error)]
#[error("{name} {problem}{tail}")]
pub struct ChildError {
    name: String,
    problem: String,
    tail: String,
}

/// A process of a run. Dropping it ends it: SIGTERM, two seconds, SIGKILL.
pub struct Process {
    name: String,
    child: Child,
    handle: Handle,
    stdout: Arc<Lines>,
    stderr: Arc<Lines>,
    status: Option<ExitStatus>,
}

impl fmt::Debug for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Process({} {}, {:?})", self.name, self.id(), self.status)
    }
}

impl Process {
    /// Starts `command` in `namespace` with its output collected, and writes it into the record of `run`. `name` is
    /// for messages.
    ///
    /// # Errors
    /// If it cannot be started, or not be recorded (it is ended then).
    pub fn start(
        run: &Run,
        name: &str,
        namespace: &Namespace,
        mut command: Command,
    ) -> Result<Self, ChildError> {
        let failed = |what: &str, error: &dyn fmt::Display| ChildError {
            name: name.to_owned(),
            problem: format!("{what}: {error}"),
            tail: String::new(),
        };
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        let mut child = namespace
            .spawn(command)
            .map_err(|error| failed("did not start", &error))?;
        let mut set_up = || -> io::Result<_> {
            let handle = Handle::open(child.id())?;
            run.record(name, child.id())?;
            let stdout = Lines::collect(child.stdout.take(), OUTPUT)?;
            let stderr = Lines::collect(child.stderr.take(), TAIL)?;
            Ok((handle, stdout, stderr))
        };
        match set_up() {
            Ok((handle, stdout, stderr)) => Ok(Self {
                name: name.to_owned(),
                child,
                handle,
                stdout,
                stderr,
                status: None,
            }),
            Err(error) => {
                // It is ours and not reaped yet, so that the number is still its own.
                let _ = child.kill();
                let _ = child.wait();
                Err(failed("could not be watched", &error))
            }
        }
    }

    /// Starts `command`, waits until it has ended by itself with status 0 and returns its standard output.
    ///
    /// # Errors
    /// If it does not start, takes longer than `timeout` (it is ended then) or ends with another status.
    pub fn output(
        run: &Run,
        name: &str,
        namespace: &Namespace,
        command: Command,
        timeout: Duration,
    ) -> Result<String, ChildError> {
        let mut process = Self::start(run, name, namespace, command)?;
        let status = process.wait(timeout)?;
        if !status.success() {
            return Err(process.error(format!("ended with {status}")));
        }
        process.stdout.wait_for_end(LAST_LINES);
        Ok(process.stdout.text())
    }

    /// As [`output`](Self::output), for a command that prints JSON.
    ///
    /// # Errors
    /// As there; or if what it prints is not a `T`.
    pub fn json<T: DeserializeOwned>(
        run: &Run,
        name: &str,
        namespace: &Namespace,
        command: Command,
        timeout: Duration,
    ) -> Result<T, ChildError> {
        let text = Self::output(run, name, namespace, command, timeout)?;
        serde_json::from_str(&text).map_err(|error| ChildError {
            name: name.to_owned(),
            problem: format!("printed something unexpected: {error}"),
            tail: format!("\n{text}"),
        })
    }

    /// What it is called in messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id. It stays its own as long as this value lives.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits for a line on standard output that begins with `prefix` and returns the rest of it.
    ///
    /// # Errors
    /// If the process ends or `timeout` passes before.
    pub fn wait_for_line(&mut self, prefix: &str, timeout: Duration) -> Result<String, ChildError> {
        if let Some(rest) = self.stdout.find(prefix, timeout) {
            return Ok(rest);
        }
        // A process closes its output a little before it has ended.
        let patience = if self.stdout.has_ended() {
            LAST_LINES
        } else {
            Duration::ZERO
        };
        if self.ends_within(patience)? {
            let status = self.reap()?;
            return Err(self.error(format!("ended with {status} before it said {prefix:?}")));
        }
        Err(self.error(format!("did not say {prefix:?} within {timeout:?}")))
    }

    /// Waits until a TCP connection from `namespace` to `address` is accepted; the connection is closed at once.
    ///
    /// # Errors
    /// If the process ends or `timeout` passes before.
    pub fn wait_for_port(
        &mut self,
        namespace: &Namespace,
        address: SocketAddr,
        timeout: Duration,
    ) -> Result<(), ChildError> {
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.error(format!("did not listen on {address} within {timeout:?}")));
            }
            let attempt = namespace
                .run(|| TcpStream::connect_timeout(&address, left))
                .map_err(|error| self.error(error.to_string()))?;
            if attempt.is_ok() {
                return Ok(());
            }
            if self.ends_within(ATTEMPT.min(left))? {
                let status = self.reap()?;
                return Err(self.error(format!("ended with {status} before it listened on {address}")));
            }
        }
    }

    /// Whether the process has ended.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub fn has_ended(&mut self) -> Result<bool, ChildError> {
        self.ends_within(Duration::ZERO)
    }

    /// Waits for the end of the process.
    ///
    /// # Errors
    /// If `timeout` passes before; the process lives on.
    pub fn wait(&mut self, timeout: Duration) -> Result<ExitStatus, ChildError> {
        if !self.ends_within(timeout)? {
            return Err(self.error(format!("did not end within {timeout:?}")));
        }
        self.reap()
    }

    /// Asks the process to end (SIGTERM), kills it if it has not within `grace`, and returns how it ended.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn stop(&mut self, grace: Duration) -> Result<ExitStatus, ChildError> {
        self.signal(Signal::SIGTERM)?;
        if !self.ends_within(grace)? {
            self.signal(Signal::SIGKILL)?;
        }
        self.reap()
    }

    /// Kills the process (SIGKILL) and returns when it is gone.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn kill(&mut self) -> Result<ExitStatus, ChildError> {
        self.signal(Signal::SIGKILL)?;
        self.reap()
    }

    /// Sends a signal; nothing happens if the process has ended.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn signal(&mut self, signal: Signal) -> Result<(), ChildError> {
        if self.status.is_some() {
            return Ok(());
        }
        self.handle
            .signal(signal)
            .map_err(|error| self.error(format!("cannot be sent {signal}: {error}")))
    }

    /// What it has said on standard output so far (at most the last 10 000 lines).
    pub fn stdout(&self) -> String {
        self.stdout.text()
    }

    /// Its last lines on standard error (at most 40).
    pub fn stderr(&self) -> String {
        self.stderr.text()
    }

    fn ends_within(&mut self, timeout: Duration) -> Result<bool, ChildError> {
        if self.status.is_some() {
            return Ok(true);
        }
        self.handle
            .ends_within(timeout)
            .map_err(|error| self.error(format!("cannot be watched: {error}")))
    }

    fn reap(&mut self) -> Result<ExitStatus, ChildError> {
        if let Some(status) = self.status {
            return Ok(status);
        }
        let status = self
            .child
            .wait()
            .map_err(|error| self.error(format!("cannot be waited for: {error}")))?;
        self.status = Some(status);
        Ok(status)
    }

    fn error(&self, problem: String) -> ChildError {
        if self.status.is_some() {
            self.stderr.wait_for_end(LAST_LINES);
        }
        let words = self.stderr.text();
        let tail = if words.is_empty() {
            String::new()
        } else {
            format!("; its last words:\n{}", words.trim_end())
        };
        ChildError {
            name: self.name.clone(),
            problem,
            tail,
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Nobody is there to be told; the record of the run is still there.
        let _ = self.stop(GRACE);
    }
}

impl From<ChildError> for io::Error {
    fn from(error: ChildError) -> Self {
        Self::other(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEADLINE: Duration = Duration::from_secs(20);

    fn run() -> (tempfile::TempDir, Run) {
        let base = tempfile::tempdir().expect("made");
        let (run, _) = Run::begin_in(&base.path().join("run")).expect("begun");
        (base, run)
    }

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    fn start(run: &Run, script: &str) -> Process {
        let here = Namespace::current().expect("here");
        Process::start(run, "script", &here, shell(script)).expect("started")
    }

    #[test]
    fn a_line_is_awaited() {
        let (_base, run) = run();
        let mut process = start(&run, "echo first; echo ready 127.0.0.1:80; exec sleep 60");
        assert_eq!(
            process.wait_for_line("ready ", DEADLINE).expect("said"),
            "127.0.0.1:80"
        );
        let error = process.wait(Duration::from_millis(10)).expect_err("sleeps");
        assert!(error.to_string().contains("did not end within"), "{error}");
        let status = process.stop(DEADLINE).expect("stopped");
        assert_eq!(
            std::os::unix::process::ExitStatusExt::signal(&status),
            Some(Signal::SIGTERM as i32)
        );
    }

    #[test]
    fn a_failure_brings_the_last_words() {
        let (_base, run) = run();
        let here = Namespace::current().expect("here");
        let failing = shell("echo that went wrong >&2; exit 3");
        let error = Process::output(&run, "failing", &here, failing, DEADLINE).expect_err("fails");
        let text = error.to_string();
        assert!(
            text.contains("failing") && text.contains("exit status: 3") && text.contains("that went wrong"),
            "{text}"
        );
        let mut process = start(&run, "exit 0");
        let error = process
            .wait_for_line("ready", DEADLINE)
            .expect_err("says nothing");
        assert!(
            error.to_string().contains("ended with exit status: 0 before"),
            "{error}"
        );
    }

    #[test]
    fn a_deaf_process_is_killed() {
        let (_base, run) = run();
        let mut process = start(&run, "trap '' TERM; echo deaf; while :; do read x; sleep 1; done");
        process.wait_for_line("deaf", DEADLINE).expect("said");
        let status = process.stop(Duration::from_millis(50)).expect("stopped");
        assert_eq!(
            std::os::unix::process::ExitStatusExt::signal(&status),
            Some(Signal::SIGKILL as i32)
        );
        process.signal(Signal::SIGTERM).expect("nothing happens");
    }

    #[test]
    fn a_dropped_process_is_gone() {
        let (_base, run) = run();
        let process = start(&run, "exec sleep 60");
        let pid = process.id();
        drop(process);
        assert!(crate::measure::start_time(pid).is_err());
    }

    #[test]
    fn a_timeout_ends_the_process() {
        let (_base, run) = run();
        let here = Namespace::current().expect("here");
        let begun = Instant::now();
        let slow = shell("exec sleep 60");
        let error = Process::output(&run, "slow", &here, slow, Duration::from_millis(50)).expect_err("slow");
        assert!(error.to_string().contains("did not end within 50ms"), "{error}");
        assert!(begun.elapsed() < DEADLINE);
    }

    #[test]
    fn json_is_read() {
        let (_base, run) = run();
        let here = Namespace::current().expect("here");
        let numbers: Vec<u32> =
            Process::json(&run, "numbers", &here, shell("echo '[1, 2]'"), DEADLINE).expect("read");
        assert_eq!(numbers, [1, 2]);
        let text = Process::json::<u32>(&run, "text", &here, shell("echo oops"), DEADLINE).expect_err("text");
        assert!(text.to_string().contains("oops"), "{text}");
    }
}
