//! The quickstart as its users run it: every mode, the faults, without root, killed in the middle, again and again;
//! and that nothing is left behind.
//!
//! The runs have a runtime folder of their own, so that a quickstart of the same user does not stand in their way.
//! `DPUMESH_CYCLES` (20 by default) says how often a run starts and stops.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, ErrorKind};
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use dpumesh_hw::netlink::Netlink;
use dpumesh_hw::netns::testing::skip;
use serde_json::Value;

/// One run at a time: the machine's cores are few and the scenarios look at the clock.
static ONE: Mutex<()> = Mutex::new(());

/// A scenario that takes no time.
const CHEAP: [&str; 3] = ["--no-figures", "--only", "route by header"];
/// The user id called `nobody` on every distribution, and the kernel's overflow id.
const NOBODY: u32 = 65534;

#[test]
fn overlay() {
    let place = Place::new();
    let report = place.report(&["--no-figures"]);
    assert!(
        report["scenarios"].as_array().is_some_and(|all| all.len() >= 13),
        "{report}"
    );
    place.check_clean();
}

#[test]
fn underlay() {
    let place = Place::new();
    place.report(&["--no-figures", "--mode", "underlay"]);
    place.check_clean();
}

#[test]
fn faults() {
    let place = Place::new();
    let report = place.report(&["--faults"]);
    assert!(
        report["scenarios"].as_array().is_some_and(|all| all.len() >= 10),
        "{report}"
    );
    place.check_clean();
}

/// On veth pairs in a user namespace, also when root runs the tests.
#[test]
fn without_root() {
    let mut place = Place::new();
    if let Err(reason) = place.give_up_root() {
        return skip("without_root", &reason);
    }
    for (arguments, least) in [
        (&["--no-figures"][..], 13),
        (&["--no-figures", "--mode", "underlay"], 13),
        (&["--faults"], 9),
    ] {
        let report = place.report(&[arguments, &["--vf-device", "veth"]].concat());
        let scenarios = report["scenarios"].as_array();
        assert!(scenarios.is_some_and(|all| all.len() >= least), "{report}");
        place.check_clean();
    }
    // Whatever this user may open.
    let run = place.run(&CHEAP);
    assert!(run.status.success(), "{}", told(&run));
    place.check_clean();
}

#[test]
fn a_killed_run_is_cleaned_up_by_the_next() {
    let place = Place::new();
    let mut command = place.quickstart(&CHEAP);
    let mut killed = command
        .arg("--keep")
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("started");
    let output = BufReader::new(killed.stdout.take().expect("a pipe"));
    let runs = output
        .lines()
        .map_while(Result::ok)
        .any(|line| line.contains("left running until Ctrl-C"));
    killed.kill().expect("killed");
    killed.wait().expect("reaped");
    assert!(runs, "it ended before its scenarios did");
    let again = place.run(&CHEAP);
    let words = String::from_utf8_lossy(&again.stdout);
    assert!(
        again.status.success() && words.contains("cleaned up after a run that was killed"),
        "{words}"
    );
    place.check_clean();
}

#[test]
fn many_cycles_leave_nothing() {
    let cycles: u32 = match std::env::var("DPUMESH_CYCLES") {
        Ok(text) => text.parse().expect("DPUMESH_CYCLES is a number"),
        Err(_) => 20,
    };
    let place = Place::new();
    for cycle in 1..=cycles {
        let mode = if cycle % 2 == 0 { "underlay" } else { "overlay" };
        let device = if cycle % 4 < 2 { "auto" } else { "veth" };
        let run = place.run(&[&CHEAP[..], &["--mode", mode, "--vf-device", device]].concat());
        assert!(run.status.success(), "cycle {cycle} of {cycles}: {}", told(&run));
        place.check_clean();
    }
}

/// Where a test's runs take place, and what was there before.
struct Place {
    folder: tempfile::TempDir,
    executable: PathBuf,
    before: Network,
    /// Runs are those of an ordinary user, though the test is root's.
    as_nobody: bool,
    _one: MutexGuard<'static, ()>,
}

/// What a run may not change on the machine.
#[derive(Debug, PartialEq, Eq)]
struct Network {
    configuration: Vec<String>,
    namespace_mounts: BTreeSet<String>,
}

impl Network {
    fn read() -> Self {
        let snapshot = Netlink::open()
            .and_then(|mut netlink| netlink.snapshot())
            .expect("listed");
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("read");
        Self {
            configuration: snapshot.lines().map(str::to_owned).collect(),
            namespace_mounts: mounts
                .lines()
                .filter(|line| line.contains(" nsfs "))
                .map(str::to_owned)
                .collect(),
        }
    }
}

impl Place {
    fn new() -> Self {
        let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let executable = executable();
        Self {
            folder: tempfile::tempdir().expect("made"),
            executable,
            before: Network::read(),
            as_nobody: false,
            _one: one,
        }
    }

    /// What is run from here on has the rights of an ordinary user. An error says why that cannot be on this machine.
    fn give_up_root(&mut self) -> Result<(), String> {
        if nix::unistd::geteuid().is_root() {
            match chown(self.folder.path(), Some(NOBODY), Some(NOBODY)) {
                Err(error) if error.kind() == ErrorKind::InvalidInput => {
                    return Err(format!("user id {NOBODY} does not exist in this user namespace"));
                }
                given => given.expect("given away"),
            }
            self.as_nobody = true;
        }
        // A scenario that there is not: this looks at the rights, and starts the nodes.
        let run = self.run(&["--no-figures", "--only", "none"]);
        let said = String::from_utf8_lossy(&run.stderr);
        match said.lines().find(|line| line.contains("running without root:")) {
            Some(reason) => Err(reason.to_owned()),
            None => Ok(()),
        }
    }

    fn quickstart(&self, arguments: &[&str]) -> Command {
        let mut command = if self.as_nobody {
            // Through an open descriptor, since its path may be closed to another user.
            let executable = fs::File::open(&self.executable).expect("opened");
            let mut command = Command::new("/proc/self/fd/0");
            command.stdin(executable).current_dir("/").uid(NOBODY).gid(NOBODY);
            command
        } else {
            let mut command = Command::new(&self.executable);
            command.stdin(Stdio::null());
            command
        };
        command.args(arguments).env("XDG_RUNTIME_DIR", self.folder.path());
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.quickstart(arguments).output().expect("started")
    }

    /// Runs it, looks at the shape of its JSON and that everything passed.
    fn report(&self, arguments: &[&str]) -> Value {
        let file = self.folder.path().join("report.json");
        let run = self.run(&[arguments, &["--json", file.to_str().expect("UTF-8")]].concat());
        assert!(run.status.success(), "{}", told(&run));
        let report: Value = serde_json::from_slice(&fs::read(&file).expect("written")).expect("JSON");
        for table in ["latency_us", "cpu_us_per_request", "rss_kib"] {
            assert!(report[table].is_object(), "{table} in {report}");
        }
        let scenarios = report["scenarios"].as_array().expect("a list");
        for scenario in scenarios {
            let is_whole = scenario["name"].is_string() && scenario["detail"].is_string();
            assert!(is_whole && scenario["passed"] == true, "{scenario}");
        }
        fs::remove_file(&file).expect("removed");
        report
    }

    /// No process, no file of the run, and the machine's network as it was.
    fn check_clean(&self) {
        let of_this_run = [self.executable.as_path(), &self.folder.path().join("quickstart")];
        // Processes die with their parent: at once, but not before it.
        let deadline = Instant::now() + Duration::from_secs(5);
        while !processes(&of_this_run).is_empty() && Instant::now() < deadline {
            std::thread::yield_now();
        }
        assert_eq!(
            processes(&of_this_run),
            Vec::<String>::new(),
            "processes and their namespaces are left"
        );
        let kept = fs::read_dir(self.folder.path().join("dpumesh-quickstart")).expect("the folder of runs");
        let kept: Vec<_> = kept.map(|entry| entry.expect("listed").file_name()).collect();
        assert_eq!(kept, ["lock"], "files are left");
        assert_eq!(
            Network::read(),
            self.before,
            "links, addresses, routes, rules or mounts are left"
        );
    }
}

/// The quickstart beside this test, in the same build.
fn executable() -> PathBuf {
    let test = std::env::current_exe().expect("known");
    let profile = test.parent().and_then(Path::parent).expect("target/PROFILE/deps");
    let executable = profile.join("examples/quickstart");
    assert!(
        executable.is_file(),
        "{} is missing: `cargo test` builds it, `cargo test --test quickstart` alone does not",
        executable.display()
    );
    executable
}

/// Processes that run one of the files, with the network namespace that each keeps alive.
fn processes(files: &[&Path]) -> Vec<String> {
    let all = fs::read_dir("/proc").expect("listed").filter_map(Result::ok);
    all.filter_map(|entry| {
        let path = entry.path();
        let file = fs::read_link(path.join("exe")).ok()?;
        let namespace = fs::read_link(path.join("ns/net")).unwrap_or_default();
        let is_one = files.iter().any(|wanted| file == *wanted);
        is_one.then(|| format!("{} in {}", path.display(), namespace.display()))
    })
    .collect()
}

fn told(run: &Output) -> String {
    format!(
        "{}\n{}\n{}",
        run.status,
        String::from_utf8_lossy(&run.stdout),
        String::from_utf8_lossy(&run.stderr)
    )
}
