//! `istio_two_nodes` where its peers are not built, and killed in the middle where they are. All of its scenarios are played by
//! `.ci/run`, with each proxy.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Longest wait for the end of what a killed run has left.
const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn says_what_is_missing_and_how_to_get_it() {
    let place = tempfile::tempdir().expect("a folder");
    let mut command = example(place.path());
    // An empty cache: no peer is built there.
    let output = command
        .env("XDG_CACHE_HOME", place.path())
        .output()
        .expect("started");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}");
    assert!(said.starts_with("skipped: istio_two_nodes: "), "{said}");
    let helps = ["tests/peers/build", "cargo build", "pip install", "Go is missing"];
    assert!(helps.iter().any(|help| said.contains(help)), "{said}");
}

#[test]
fn a_killed_run_leaves_nothing() {
    let place = tempfile::tempdir().expect("a folder");
    let mut child = example(place.path())
        .args(["--proxy", "dpu-proxy", "--only", "plain calls", "--keep"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("started");
    let output = BufReader::new(child.stdout.take().expect("a pipe"));
    let mut lines = output.lines().map_while(Result::ok);
    let first =
        lines.find(|line| line.starts_with("skipped: ") || line.contains("left running until Ctrl-C"));
    child.kill().expect("killed");
    child.wait().expect("reaped");
    match first {
        Some(line) if line.starts_with("skipped: ") => eprintln!("a_killed_run_leaves_nothing: {line}"),
        Some(_) => await_none_of(place.path()),
        None => panic!("it ended before its scenario did"),
    }
}

/// Waits until no process names a file of this folder.
fn await_none_of(folder: &Path) {
    let begun = Instant::now();
    loop {
        let left = processes_naming(folder);
        if left.is_empty() {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "still there: {left:?}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn processes_naming(folder: &Path) -> Vec<String> {
    let folder = folder.to_string_lossy().into_owned();
    let all = fs::read_dir("/proc").expect("listed").filter_map(Result::ok);
    let lines = all.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
    let lines = lines.map(|line| String::from_utf8_lossy(&line).replace('\0', " "));
    lines.filter(|line| line.contains(&folder)).collect()
}

/// The example, with a runtime folder of its own.
fn example(place: &Path) -> Command {
    let mut command = Command::new(built());
    // Without cargo it takes what is built.
    command.env("XDG_RUNTIME_DIR", place).env_remove("CARGO");
    command
}

/// Cargo builds examples of a package before its tests run.
fn built() -> PathBuf {
    let tests = std::env::current_exe().expect("known");
    let profile = tests.parent().and_then(Path::parent).expect("two folders up");
    profile.join("examples/istio_two_nodes")
}
