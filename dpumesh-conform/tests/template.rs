//! `examples/backend-template` as a new author meets it: copied, compiled, proved, then with step 2 and step 3 of the guide.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use dpumesh_hw::conformance::{CASES, Expectations};

#[test]
fn the_template_passes_from_the_first_minute_and_with_each_step_shows_more() {
    let folder = tempfile::tempdir().expect("a folder");
    let tree = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the workspace");
    let backend = folder.path().join("mycard");
    copy(&tree.join("examples/backend-template"), &backend);
    fs::copy(tree.join("Cargo.lock"), backend.join("Cargo.lock")).expect("copied");
    let manifest = backend.join("Cargo.toml");
    let text = fs::read_to_string(&manifest).expect("a manifest");
    let here = tree.to_str().expect("UTF-8");
    fs::write(&manifest, text.replace("\"../..", &format!("\"{here}"))).expect("written");

    let total = CASES.len();
    let bare = total - skips(&backend);
    says(&format!("It passes, {bare} cases of {total},"));
    switch_on(&backend, "step 2: ");
    let with_vfs = total - skips(&backend);
    assert!(with_vfs > bare + 30, "{bare} pass, then {with_vfs}");
    says(&format!("{with_vfs} pass now,"));
    switch_on(&backend, "step 3: ");
    let with_rules = total - skips(&backend);
    assert!(with_rules > with_vfs + 30, "{with_vfs} pass, then {with_rules}");
    says(&format!("with them {with_rules} cases pass."));
}

/// The guide promises what its reader sees.
fn says(words: &str) {
    assert!(include_str!("../README.md").contains(words), "README.md: {words}");
}

/// What the guide asks for: uncomment each marked line, and answer with the part.
fn switch_on(backend: &Path, step: &str) {
    for file in ["src/lib.rs", "src/card.rs"] {
        let path = backend.join(file);
        let text = fs::read_to_string(&path).expect("a source file");
        let text = text
            .replace(&format!("None // {step}Some(self)"), "Some(self)")
            .replace(&format!("// {step}"), "");
        fs::write(&path, text).expect("written");
    }
}

/// Runs the backend's tests, which must pass, and says how many cases are skipped.
fn skips(backend: &Path) -> usize {
    let output = Command::new(env!("CARGO"))
        .args(["test", "--offline", "--quiet"])
        .current_dir(backend)
        .env("UPDATE_EXPECT", "1")
        .env("CARGO_TARGET_DIR", target())
        .output()
        .expect("cargo starts");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{}{said}",
        String::from_utf8_lossy(&output.stdout)
    );
    assert!(!said.contains("warning"), "{said}");
    let expected = fs::read_to_string(backend.join("tests/expected.json")).expect("written");
    let expected = Expectations::from_json(&expected).expect("valid");
    assert!(expected.failures.is_empty(), "{:?}", expected.failures);
    expected.skips.len()
}

/// The workspace's own: what the template stands on is built there already.
fn target() -> PathBuf {
    let tmp = Path::new(env!("CARGO_TARGET_TMPDIR"));
    tmp.parent().unwrap_or(tmp).to_owned()
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("made");
    for entry in fs::read_dir(from).expect("a folder") {
        let entry = entry.expect("an entry");
        let to = to.join(entry.file_name());
        match entry.file_type().expect("a type").is_dir() {
            true if entry.file_name() == "target" => {}
            true => copy(&entry.path(), &to),
            false => drop(fs::copy(entry.path(), to).expect("copied")),
        }
    }
}
