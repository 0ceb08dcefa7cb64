//! The record of a run: what it started, written down outside of it, so that the next run can clean up after one
//! that was killed.
//!
//! Everything is in one folder that belongs to the user alone: `$XDG_RUNTIME_DIR/dpumesh-NAME`, or
//! `/tmp/dpumesh-NAME-UID` where there is no such variable.
//!
//! | entry | what it is |
//! |---|---|
//! | `lock` | locked (flock) while a run lives, however it ends; two runs at once are refused |
//! | `record` | one line for each process: `process PID START NAME`; the first line names boot and run |
//! | `run-PID` | files of the run, [`Run::folder`] |
//!
//! A process is ended only if its number *and* its start time (ticks since boot, `/proc/PID/stat` field 22) are those
//! of the record, in the same boot: a number that is used again belongs to somebody else. Lines are appended, one
//! write each; a last line that was cut by the end of its writer is not acted upon.

use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::Signal;
use nix::unistd::geteuid;

use super::handle::Handle;
use crate::measure::start_time;

/// How long processes of a killed run have to end by themselves.
const GRACE: Duration = Duration::from_secs(2);
/// Permissions of the folders: the user alone.
const PRIVATE: u32 = 0o700;

/// A run that writes down what it starts. Dropping it ends what is left of that and removes record and files; drop
/// the run's [`Process`](super::Process) values before.
#[derive(Debug)]
pub struct Run {
    base: PathBuf,
    folder: PathBuf,
    record: Mutex<File>,
    _lock: Flock<File>,
}

/// What a killed run had left, and is gone now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leftovers {
    /// Names and numbers of the processes that still lived.
    pub processes: Vec<(String, u32)>,
    /// How many folders with files there were.
    pub folders: usize,
}

impl Leftovers {
    /// Whether there was nothing to clean up.
    pub fn is_empty(&self) -> bool {
        self.processes.is_empty() && self.folders == 0
    }
}

impl fmt::Display for Leftovers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { processes, folders } = self;
        write!(
            f,
            "cleaned up after a run that was killed: {} processes",
            processes.len()
        )?;
        for (name, pid) in processes {
            write!(f, " {name}({pid})")?;
        }
        write!(f, ", {folders} folders")
    }
}

/// Why a run cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Another run is going on.
    #[error("another run is going on (process {pid}): end it first, or wait for it")]
    Busy {
        /// The process that leads it, as far as it has told.
        pid: String,
    },
    /// The folder is not the user's own, so that its content cannot be trusted.
    #[error("{} must be a folder of this user with permissions 0700: {problem}; remove it", .path.display())]
    Untrusted {
        /// The folder.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A file operation failed.
    #[error("{}: {source}", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

impl Run {
    /// Begins a run of the example called `name`, after cleaning up what a killed one has left.
    ///
    /// # Errors
    /// If another run is going on, the folder is not the user's own, or files cannot be written.
    pub fn begin(name: &str) -> Result<(Self, Leftovers), RunError> {
        Self::begin_in(&base(name))
    }

    /// As [`begin`](Self::begin), with everything kept in the folder `base`.
    ///
    /// # Errors
    /// As there.
    pub fn begin_in(base: &Path) -> Result<(Self, Leftovers), RunError> {
        private_folder(base)?;
        let lock = lock(base)?;
        let leftovers = clean(base)?;
        let folder = base.join(format!("run-{}", std::process::id()));
        let path = base.join("record");
        let made = DirBuilder::new()
            .mode(PRIVATE)
            .create(&folder)
            .and_then(|()| open_record(&path));
        let record = made.map_err(|source| RunError::File { path, source })?;
        let run = Self {
            base: base.to_owned(),
            folder,
            record: Mutex::new(record),
            _lock: lock,
        };
        Ok((run, leftovers))
    }

    /// The folder for files of this run; only the user can look into it, and it goes when the run ends.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Writes down a process that was just started.
    ///
    /// # Errors
    /// If it is gone already or the record cannot be written.
    pub fn record(&self, name: &str, pid: u32) -> io::Result<()> {
        let start = start_time(pid)?;
        let name = name.replace(char::is_whitespace, "_");
        let line = format!("process {pid} {start} {name}\n");
        let mut record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        record.write_all(line.as_bytes())
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // What cannot be removed now, the next run tries again.
        let _ = clean(&self.base);
    }
}

/// Where the record of the runs of `name` is.
fn base(name: &str) -> PathBuf {
    match std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from) {
        Some(folder) if folder.is_absolute() && folder.is_dir() => folder.join(format!("dpumesh-{name}")),
        _ => PathBuf::from(format!("/tmp/dpumesh-{name}-{}", outer_uid())),
    }
}

/// The user's id outside of a user namespace, where everybody is called 0.
fn outer_uid() -> u32 {
    let uid = geteuid().as_raw();
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let ranges = map.lines().filter_map(|line| {
        let mut fields = line
            .split_whitespace()
            .map_while(|field| field.parse::<u32>().ok());
        Some((fields.next()?, fields.next()?, fields.next()?))
    });
    let found = ranges
        .into_iter()
        .find(|(inside, _, count)| uid.checked_sub(*inside).is_some_and(|offset| offset < *count));
    found.map_or(uid, |(inside, outside, _)| outside + (uid - inside))
}

/// Makes the folder, or makes sure that an existing one belongs to the user alone: in `/tmp` anybody could have made it.
fn private_folder(path: &Path) -> Result<(), RunError> {
    let file = |source| RunError::File {
        path: path.to_owned(),
        source,
    };
    match DirBuilder::new().mode(PRIVATE).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        other => return other.map_err(file),
    }
    let found = fs::symlink_metadata(path).map_err(file)?;
    let problem = if !found.is_dir() {
        "it is no folder".to_owned()
    } else if found.uid() != geteuid().as_raw() {
        format!("it belongs to user {}", found.uid())
    } else if found.mode() & 0o077 != 0 {
        format!("its permissions are {:o}", found.mode() & 0o777)
    } else {
        return Ok(());
    };
    Err(RunError::Untrusted {
        path: path.to_owned(),
        problem,
    })
}

fn lock(base: &Path) -> Result<Flock<File>, RunError> {
    let path = base.join("lock");
    let opened = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path);
    let file = opened.map_err(|source| RunError::File {
        path: path.clone(),
        source,
    })?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        Errno::EAGAIN => RunError::Busy {
            pid: leader(base).unwrap_or_else(|| "unknown".to_owned()),
        },
        other => RunError::File {
            path,
            source: other.into(),
        },
    })
}

fn leader(base: &Path) -> Option<String> {
    let record = fs::read_to_string(base.join("record")).ok()?;
    record
        .lines()
        .next()?
        .split_whitespace()
        .nth(2)
        .map(str::to_owned)
}

fn open_record(path: &Path) -> io::Result<File> {
    let mut record = OpenOptions::new()
        .create_new(true)
        .append(true)
        .mode(0o600)
        .open(path)?;
    let header = format!("run {} {}\n", boot(), std::process::id());
    record.write_all(header.as_bytes())?;
    Ok(record)
}

/// What tells one boot of the machine from another: start times count from there.
fn boot() -> String {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id");
    text.map_or_else(|_| "unknown".to_owned(), |text| text.trim().to_owned())
}

/// Ends what the record in `base` names and removes record and folders. The caller holds the lock.
fn clean(base: &Path) -> Result<Leftovers, RunError> {
    let path = base.join("record");
    let text = match fs::read_to_string(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        other => other.map_err(|source| RunError::File {
            path: path.clone(),
            source,
        })?,
    };
    let processes = end(recorded(&text, &boot()));
    let mut folders = 0;
    let file = |path: &Path, source| RunError::File {
        path: path.to_owned(),
        source,
    };
    for entry in fs::read_dir(base).map_err(|error| file(base, error))? {
        let entry = entry.map_err(|error| file(base, error))?;
        if entry.file_name().to_string_lossy().starts_with("run-") {
            fs::remove_dir_all(entry.path()).map_err(|error| file(&entry.path(), error))?;
            folders += 1;
        }
    }
    // Last: whoever dies before here is cleaned up after again.
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(file(&path, error)),
        _ => {}
    }
    Ok(Leftovers { processes, folders })
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Recorded {
    pid: u32,
    start: u64,
    name: String,
}

/// The whole lines of a record of this boot.
fn recorded(text: &str, boot: &str) -> Vec<Recorded> {
    let mut lines = text
        .split_inclusive('\n')
        .filter_map(|line| line.strip_suffix('\n'));
    let header: Vec<&str> = lines
        .next()
        .map_or(Vec::new(), |line| line.split_whitespace().collect());
    if header.first() != Some(&"run") || header.get(1) != Some(&boot) {
        return Vec::new();
    }
    let parsed = lines.filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let &["process", pid, start, name] = fields.as_slice() else {
            return None;
        };
        Some(Recorded {
            pid: pid.parse().ok().filter(|pid| *pid > 1)?,
            start: start.parse().ok()?,
            name: name.to_owned(),
        })
    });
    parsed.collect()
}

/// Ends those that still live: SIGTERM to all, then SIGKILL to those that are left.
fn end(recorded: Vec<Recorded>) -> Vec<(String, u32)> {
    let alive: Vec<(Recorded, Handle)> = recorded
        .into_iter()
        .filter_map(|process| Some((process.clone(), living(&process)?)))
        .collect();
    for (_, handle) in &alive {
        // It may end by itself meanwhile.
        let _ = handle.signal(Signal::SIGTERM);
    }
    let deadline = Instant::now() + GRACE;
    for (_, handle) in &alive {
        let left = deadline.saturating_duration_since(Instant::now());
        if !handle.ends_within(left).unwrap_or(false) {
            let _ = handle.signal(Signal::SIGKILL);
            let _ = handle.ends_within(GRACE);
        }
    }
    alive
        .into_iter()
        .map(|(process, _)| (process.name, process.pid))
        .collect()
}

/// The recorded process, if it still lives. The descriptor comes first: what is compared is what will be ended.
fn living(process: &Recorded) -> Option<Handle> {
    let handle = Handle::open(process.pid).ok()?;
    let same = start_time(process.pid).is_ok_and(|start| start == process.start);
    let lives = same && !handle.ends_within(Duration::ZERO).ok()?;
    lives.then_some(handle)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::process::{Child, Command};

    /// A folder as the user's own should be.
    fn own_folder() -> tempfile::TempDir {
        tempfile::Builder::new()
            .permissions(fs::Permissions::from_mode(PRIVATE))
            .tempdir()
            .expect("made")
    }

    fn sleeper() -> Child {
        Command::new("sleep").arg("60").spawn().expect("started")
    }

    fn end_of(mut child: Child) -> Option<i32> {
        // Ended already if all is well; a failing test must not leave it.
        let _ = child.kill();
        let status = child.wait().expect("ours");
        std::os::unix::process::ExitStatusExt::signal(&status)
    }

    /// A folder as a killed run leaves it: the record and files, the lock free.
    fn killed(lines: &str) -> tempfile::TempDir {
        let base = own_folder();
        fs::write(base.path().join("record"), format!("run {} 4\n{lines}", boot())).expect("written");
        fs::create_dir(base.path().join("run-4")).expect("made");
        fs::write(base.path().join("run-4/key.pem"), "secret").expect("written");
        base
    }

    #[test]
    fn what_a_killed_run_left_is_cleaned_up() {
        let child = sleeper();
        let start = start_time(child.id()).expect("lives");
        let base = killed(&format!("process {} {start} dataplane\n", child.id()));
        let (run, leftovers) = Run::begin_in(base.path()).expect("begun");
        assert_eq!(leftovers.processes, [("dataplane".to_owned(), child.id())]);
        assert_eq!(leftovers.folders, 1);
        assert!(!base.path().join("run-4").exists());
        assert!(run.folder().is_dir());
        assert_eq!(end_of(child), Some(Signal::SIGTERM as i32));
    }

    #[test]
    fn a_number_used_again_is_left_alone() {
        let mut child = sleeper();
        let start = start_time(child.id()).expect("lives");
        let base = killed(&format!("process {} {} dataplane\n", child.id(), start + 1));
        let (_run, leftovers) = Run::begin_in(base.path()).expect("begun");
        assert_eq!((leftovers.processes.len(), leftovers.folders), (0, 1));
        assert!(
            child.try_wait().expect("ours").is_none(),
            "somebody else's process lives on"
        );
        assert_eq!(end_of(child), Some(Signal::SIGKILL as i32));
    }

    #[test]
    fn a_record_of_another_boot_ends_nobody() {
        let text = "run another-boot 4\nprocess 5 6 dataplane\n";
        assert_eq!(recorded(text, "this-boot"), []);
        assert_eq!(recorded(text, "another-boot").len(), 1);
    }

    #[test]
    fn a_damaged_record_is_read_as_far_as_it_goes() {
        let text = "run boot 4\nprocess 5 6 a\nprocess 7\nnonsense\nprocess 1 6 init\nprocess -1 6 all\nprocess 8 9 b";
        let expected = Recorded {
            pid: 5,
            start: 6,
            name: "a".to_owned(),
        };
        assert_eq!(recorded(text, "boot"), [expected], "the last line was cut");
        for cut in 0..text.len() {
            assert!(recorded(&text[..cut], "boot").len() <= 1);
        }
    }

    #[test]
    fn an_orderly_end_leaves_nothing() {
        let base = own_folder();
        let (run, leftovers) = Run::begin_in(base.path()).expect("begun");
        assert!(leftovers.is_empty());
        let child = sleeper();
        run.record("proxy of node a", child.id()).expect("recorded");
        fs::write(run.folder().join("file"), "x").expect("written");
        drop(run);
        assert_eq!(end_of(child), Some(Signal::SIGTERM as i32));
        let names: Vec<_> = fs::read_dir(base.path())
            .expect("read")
            .map(|entry| entry.expect("read").file_name())
            .collect();
        assert_eq!(names, ["lock"]);
        let (_run, leftovers) = Run::begin_in(base.path()).expect("begun again");
        assert!(leftovers.is_empty(), "{leftovers:?}");
    }

    #[test]
    fn two_runs_do_not_fight() {
        let base = own_folder();
        let (first, _) = Run::begin_in(base.path()).expect("begun");
        let error = Run::begin_in(base.path()).expect_err("one is going on");
        let me = std::process::id().to_string();
        assert!(matches!(&error, RunError::Busy { pid } if *pid == me), "{error}");
        assert!(first.folder().is_dir(), "the second has not touched it");
        drop(first);
        Run::begin_in(base.path()).expect("free again");
    }

    #[test]
    fn a_folder_that_others_can_write_is_refused() {
        let base = own_folder();
        let open = base.path().join("open");
        fs::create_dir(&open).expect("made");
        fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).expect("set");
        let error = Run::begin_in(&open).expect_err("anybody can write there");
        assert!(error.to_string().contains("777"), "{error}");
        let link = base.path().join("link");
        std::os::unix::fs::symlink(base.path(), &link).expect("made");
        assert!(matches!(Run::begin_in(&link), Err(RunError::Untrusted { .. })));
    }

    #[test]
    fn a_link_among_the_files_is_not_followed() {
        let elsewhere = tempfile::tempdir().expect("made");
        fs::write(elsewhere.path().join("precious"), "x").expect("written");
        let base = killed("");
        std::os::unix::fs::symlink(elsewhere.path(), base.path().join("run-4/link")).expect("made");
        Run::begin_in(base.path()).expect("begun");
        assert!(elsewhere.path().join("precious").exists());
    }
}
