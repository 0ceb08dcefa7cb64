//! A test harness for cases that need namespaces: each case is a process of its own.
//!
//! libtest runs tests on threads, and a process with threads cannot enter a user namespace. A test file with
//! `harness = false` whose `main` is [`main`] can: for every case it starts itself again, and the child enters a
//! user namespace (if it has no rights already), runs the one case and ends. What a failing case leaves open, the
//! end of its process closes. A case marked [`RunAs::Nobody`] runs without root even when the tests run as root.
//!
//! A case that cannot run here is *skipped with a reason* by [`skip`]; with `DPUMESH_NO_SKIP=1` in the environment
//! a skip is a failure.
//!
//! ```no_run
//! use dpumesh_hw::netns::testing::{Case, RunAs, main};
//!
//! fn a_namespace_is_made() {
//!     dpumesh_hw::netns::Namespace::create().expect("made");
//! }
//!
//! # fn test_file() -> std::process::ExitCode {
//! main(&[Case { name: "a_namespace_is_made", run_as: RunAs::Caller, run: a_namespace_is_made }])
//! # }
//! ```

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use nix::unistd::geteuid;

use super::process::{PARENT, die_with_parent};
use super::user::ensure_privilege;

/// One test case.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// Its name, by which the command line selects it.
    pub name: &'static str,
    /// Whose rights it gets.
    pub run_as: RunAs,
    /// The test; it fails by panicking.
    pub run: fn(),
}

/// Whose rights a case gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunAs {
    /// Those of the user who runs the tests: root as such, anybody else inside a user namespace.
    Caller,
    /// Those of an ordinary user inside a user namespace, also when root runs the tests.
    Nobody,
}

/// Longest time one case may take.
const CASE_LIMIT: Duration = Duration::from_secs(120);
/// Tells a child which case to run.
const CASE: &str = "DPUMESH_TEST_CASE";
/// The user id called `nobody` on every distribution, and the kernel's overflow id.
const NOBODY: u32 = 65534;
/// Exit status of a child that could not get the rights it needs.
const SKIPPED: u8 = 77;

/// Reports that `what` was not tested here, and why, on standard error past any capturing.
///
/// # Panics
/// If the environment says `DPUMESH_NO_SKIP=1`: this machine is supposed to be able to run everything.
pub fn skip(what: &str, reason: &str) {
    // A closed standard error must not fail a test.
    let _ = writeln!(io::stderr(), "SKIPPED {what}: {reason}");
    assert!(
        std::env::var_os("DPUMESH_NO_SKIP").is_none_or(|value| value != "1"),
        "{what} was skipped: {reason}"
    );
}

/// The `main` of a test file: runs the cases that the command line selects (`cargo test` passes it on).
pub fn main(cases: &[Case]) -> ExitCode {
    if let Ok(name) = std::env::var(CASE) {
        return run_child(cases, &name);
    }
    let selection = Selection::parse(std::env::args().skip(1));
    let chosen: Vec<&Case> = cases.iter().filter(|case| selection.takes(case.name)).collect();
    if selection.list {
        chosen.iter().for_each(|case| println!("{}: test", case.name));
        return ExitCode::SUCCESS;
    }
    println!("\nrunning {} tests", chosen.len());
    let outcomes: Vec<Outcome> = chosen.iter().map(|case| run_in_process(case)).collect();
    let count = |outcome| outcomes.iter().filter(|found| **found == outcome).count();
    let (passed, failed, skipped) = (
        count(Outcome::Passed),
        count(Outcome::Failed),
        count(Outcome::Skipped),
    );
    let verdict = if failed == 0 { "ok" } else { "FAILED" };
    println!("\ntest result: {verdict}. {passed} passed; {failed} failed; {skipped} skipped\n");
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Passed,
    Failed,
    Skipped,
}

/// What the command line asks for, in libtest's words.
#[derive(Debug, Default, PartialEq, Eq)]
struct Selection {
    filters: Vec<String>,
    skips: Vec<String>,
    exact: bool,
    list: bool,
    ignored: bool,
}

impl Selection {
    fn parse(mut arguments: impl Iterator<Item = String>) -> Self {
        let mut selection = Self::default();
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--list" => selection.list = true,
                "--exact" => selection.exact = true,
                "--ignored" => selection.ignored = true,
                "--skip" => selection.skips.extend(arguments.next()),
                "--test-threads" | "--format" | "--color" | "-Z" | "--logfile" | "--report-time" => {
                    arguments.next();
                }
                option if option.starts_with('-') => {}
                _ => selection.filters.push(argument),
            }
        }
        selection
    }

    fn takes(&self, name: &str) -> bool {
        let matches = |pattern: &String| {
            if self.exact {
                name == pattern
            } else {
                name.contains(pattern)
            }
        };
        // There are no ignored cases.
        !self.ignored
            && (self.filters.is_empty() || self.filters.iter().any(matches))
            && !self.skips.iter().any(matches)
    }
}

/// Runs one case in a child process and prints its result as libtest does.
fn run_in_process(case: &Case) -> Outcome {
    let unmapped = case.run_as == RunAs::Nobody && geteuid().is_root() && !is_mapped(NOBODY);
    if unmapped {
        return skipped(case, "user id 65534 does not exist in this user namespace");
    }
    let output = match child_command(case).and_then(|mut command| command.output()) {
        Ok(output) => output,
        Err(error) => {
            println!("test {} ... FAILED (cannot start: {error})", case.name);
            return Outcome::Failed;
        }
    };
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.code() == Some(i32::from(SKIPPED)) {
        return skipped(case, said.trim());
    }
    let outcome = if output.status.success() {
        Outcome::Passed
    } else {
        Outcome::Failed
    };
    println!(
        "test {} ... {}",
        case.name,
        if outcome == Outcome::Passed {
            "ok"
        } else {
            "FAILED"
        }
    );
    for line in said.lines().filter(|line| line.starts_with("SKIPPED ")) {
        eprintln!("{line}");
    }
    let verbose = std::env::args().any(|argument| argument == "--nocapture");
    if outcome == Outcome::Failed || verbose {
        println!(
            "---- {} ({}) ----\n{}{said}",
            case.name,
            output.status,
            String::from_utf8_lossy(&output.stdout)
        );
    }
    outcome
}

fn skipped(case: &Case, reason: &str) -> Outcome {
    println!("test {} ... skipped", case.name);
    let allowed = catch_unwind(|| skip(case.name, reason)).is_ok();
    if allowed {
        Outcome::Skipped
    } else {
        Outcome::Failed
    }
}

/// Whether this user namespace knows the user id: a line of the map is first id inside, first outside, count.
fn is_mapped(uid: u32) -> bool {
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    map.lines().any(|line| {
        let mut fields = line
            .split_whitespace()
            .map_while(|field| field.parse::<u64>().ok());
        let (first, _outside, count) = (fields.next(), fields.next(), fields.next());
        first
            .zip(count)
            .is_some_and(|(first, count)| (first..first + count).contains(&u64::from(uid)))
    })
}

/// This program again, told to run one case. It is started through an open descriptor, because another user may
/// not be able to reach its path.
fn child_command(case: &Case) -> io::Result<Command> {
    let program = File::open("/proc/self/exe")?;
    let mut command = Command::new("/proc/self/fd/0");
    command
        .arg0(case.name)
        .env(CASE, case.name)
        .env(PARENT, std::process::id().to_string());
    command.stdin(Stdio::from(program)).current_dir("/");
    if case.run_as == RunAs::Nobody && geteuid().is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    Ok(command)
}

fn run_child(cases: &[Case], name: &str) -> ExitCode {
    let Some(case) = cases.iter().find(|case| case.name == name) else {
        eprintln!("no case is called {name}");
        return ExitCode::FAILURE;
    };
    // Rights first: the watchdog below is a second thread.
    if let Err(error) = ensure_privilege() {
        eprintln!("{error}");
        return ExitCode::from(SKIPPED);
    }
    if let Err(error) = die_with_parent() {
        eprintln!("{error}");
        return ExitCode::FAILURE;
    }
    let (done, ended) = channel::<()>();
    let watchdog = thread::spawn(move || {
        if ended.recv_timeout(CASE_LIMIT) == Err(RecvTimeoutError::Timeout) {
            eprintln!("the case took longer than {CASE_LIMIT:?}");
            std::process::exit(1);
        }
    });
    let passed = catch_unwind(AssertUnwindSafe(case.run)).is_ok();
    drop(done);
    let watched = watchdog.join().is_ok();
    if passed && watched {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selection(line: &str) -> Selection {
        Selection::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn the_command_line_selects_as_libtest_does() {
        assert!(selection("").takes("veth_is_made"));
        assert!(selection("veth").takes("veth_is_made"));
        assert!(!selection("veth --exact").takes("veth_is_made"));
        assert!(selection("--exact veth_is_made").takes("veth_is_made"));
        assert!(!selection("--skip made").takes("veth_is_made"));
        assert!(!selection("--ignored").takes("veth_is_made"));
        assert!(selection("--test-threads 1 --nocapture veth").takes("veth_is_made"));
        assert!(selection("--list --format terse").list);
    }
}
