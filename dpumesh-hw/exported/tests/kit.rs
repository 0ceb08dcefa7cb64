//! The memory backend, linked and as a foreign library: the same cases pass, the same are skipped but for those of a hook that the
//! C interface lacks.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use dpumesh_hw::conformance::library::LibraryFixture;
use dpumesh_hw::conformance::memory::MemoryFixture;
use dpumesh_hw::conformance::{Outcome, Report, run};
use dpumesh_hw::loader::{Library, LoadError, Manifest};
use dpumesh_hw::memory::MemoryConfig;

const DEADLINE: Duration = Duration::from_secs(10);

/// The library that cargo made of this package for this test, beside it.
fn library() -> PathBuf {
    let test = std::env::current_exe().expect("a path");
    let folder = test.parent().expect("the folder of dependencies");
    folder.join("libdpumesh_exported.so")
}

fn outcomes(report: &Report) -> Vec<(String, String)> {
    let told = |outcome: &Outcome| match outcome {
        Outcome::Passed => "passed".to_owned(),
        other => other.to_string(),
    };
    let entries = report.entries.iter();
    entries
        .map(|entry| (entry.case.clone(), told(&entry.outcome)))
        .collect()
}

#[tokio::test]
async fn linked_and_loaded_it_is_the_same() {
    // A folder that only this user can write to stands between a shared build folder and the check of who could.
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("libdpumesh_exported.so");
    std::fs::copy(library(), &path).expect("copied");
    let manifest = Manifest::of(path);
    let loaded = Library::load(&manifest).expect("it keeps to the interface");

    let error = loaded.connect().map(|_| ()).expect_err("no card is named");
    assert!(
        matches!(&error, LoadError::Backend(error) if error.to_string().contains("`card`")),
        "{error}"
    );

    let fixture = LibraryFixture::new("memory, loaded", loaded, manifest.config);
    let loaded = run(Arc::new(fixture), "", DEADLINE).await;
    let linked = MemoryFixture::new("memory", MemoryConfig::default());
    let linked = run(Arc::new(linked), "", DEADLINE).await;
    assert!(linked.is_clean(), "{linked}");
    assert!(loaded.is_clean(), "{loaded}");
    // A library has no hook that disturbs its card.
    let of_hook = |outcome: &str| outcome.starts_with("not supported: rig.disturb");
    let different: Vec<_> = outcomes(&linked)
        .into_iter()
        .zip(outcomes(&loaded))
        .filter(|(linked, loaded)| linked != loaded && !of_hook(&loaded.1))
        .collect();
    assert!(different.is_empty(), "linked, and loaded:\n{different:#?}");
}
