//! `istio_two_nodes` where its peers are not built. All of its scenarios are played by `.ci/run`, with each proxy.

use std::path::{Path, PathBuf};
use std::process::Command;

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
