//! The backend in plain C of `examples/c-backend` passes the kit through the loader.

use std::path::Path;
use std::sync::Arc;

use dpumesh_core::{Backend, BackendExt};
use dpumesh_hw::conformance::library::LibraryFixture;
use dpumesh_hw::conformance::{Expectations, run};
use dpumesh_hw::loader::{Calls, Library, Manifest};

use crate::DEADLINE;
use crate::header::cc;

/// Compiles the example and loads it.
fn library(folder: &Path, calls: Calls) -> (Library, Manifest) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/c-backend/backend.c");
    let path = folder.join("libexample.so");
    let (to, from) = (path.to_str().expect("plain"), source.to_str().expect("plain"));
    cc(&["-D_GNU_SOURCE", "-pthread", "-shared", "-fPIC", "-o", to, from]);
    let manifest = Manifest::of(path).with_calls(calls);
    (
        Library::load(&manifest).expect("it keeps to the interface"),
        manifest,
    )
}

async fn passes(calls: Calls) {
    let folder = tempfile::tempdir().expect("a folder");
    let (library, manifest) = library(folder.path(), calls);
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/loader/plain_c.json");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|_| "{}".to_owned());
    let expected = Expectations::from_json(&text).expect("an expectations file");
    let fixture = LibraryFixture::new("c-example", library, manifest.config).expecting(expected.clone());
    let report = run(Arc::new(fixture), "", DEADLINE).await;
    if std::env::var_os("UPDATE_EXPECT").is_some() {
        assert!(
            report.is_clean(),
            "only skips are written by themselves:\n{report}"
        );
        std::fs::write(&path, report.to_expectations(&expected).to_json()).expect("written");
        return;
    }
    let differences = report.differences(&expected);
    assert!(differences.is_empty(), "{report}\n{differences:#?}");
    assert!(report.counts().passed > 60, "{report}");
}

#[tokio::test]
async fn a_backend_in_plain_c_passes_the_kit() {
    passes(Calls::Guarded).await;
}

#[tokio::test]
async fn with_inline_calls_it_passes_as_well() {
    passes(Calls::Inline).await;
}

#[tokio::test]
async fn absent_parts_are_absent() {
    let folder = tempfile::tempdir().expect("a folder");
    let (library, _) = library(folder.path(), Calls::Guarded);
    let backend = library.connect().expect("opened");
    assert!(backend.vf().is_some() && backend.steering().is_some());
    assert!(backend.offload().is_none() && backend.ports().is_none() && backend.transport().is_none());
    let error = backend.require_transport().map(|_| ()).expect_err("no channels");
    assert!(error.to_string().contains("c-example"), "{error}");
}

/// Two cards of one library know nothing of each other.
#[tokio::test]
async fn two_cards_of_a_library_are_two() {
    let folder = tempfile::tempdir().expect("a folder");
    let (library, _) = library(folder.path(), Calls::Guarded);
    let open = |name: &str| {
        library
            .connect_with(&serde_json::json!({ "card": name }))
            .expect("opened")
    };
    let ((one, hooks), (other, _), (again, _)) = (open("two-a"), open("two-b"), open("two-a"));
    hooks.lose().expect("lost");
    hooks.bring_back().expect("back");
    let epochs = [&one, &other, &again].map(|card: &Arc<dyn Backend>| card.epoch().0);
    assert_eq!(epochs, [1, 0, 1]);
    drop(one);
    assert!(hooks.lose().is_err(), "the card is closed");
}
