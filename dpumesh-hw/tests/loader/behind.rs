//! The memory backend behind the C interface passes the same cases as it does alone.

use std::sync::Arc;

use dpumesh_core::Backend;
use dpumesh_hw::conformance::memory::MemoryFixture;
use dpumesh_hw::conformance::{Outcome, Report, run};
use dpumesh_hw::loader::{Calls, export};
use dpumesh_hw::memory::MemoryConfig;

use crate::DEADLINE;

fn memory() -> MemoryFixture {
    MemoryFixture::new("memory", MemoryConfig::default())
}

/// What became of each case, without times.
pub(crate) fn outcomes(report: &Report) -> Vec<(String, String)> {
    let told = |outcome: &Outcome| match outcome {
        Outcome::Passed => "passed".to_owned(),
        other => format!("{other}"),
    };
    report
        .entries
        .iter()
        .map(|entry| (entry.case.clone(), told(&entry.outcome)))
        .collect()
}

async fn same(fixture: impl Fn() -> MemoryFixture, calls: Calls) {
    let alone = run(Arc::new(fixture()), "", DEADLINE).await;
    let wrap =
        move |backend: Arc<dyn Backend>| export::through(backend, calls).expect("it keeps to the interface");
    let behind = run(Arc::new(fixture().wrapped(wrap)), "", DEADLINE).await;
    assert!(alone.is_clean(), "{alone}");
    let different: Vec<_> = outcomes(&alone)
        .into_iter()
        .zip(outcomes(&behind))
        .filter(|(alone, behind)| alone != behind)
        .collect();
    assert!(
        different.is_empty(),
        "alone, and behind the interface:\n{different:#?}"
    );
    assert!(behind.counts().passed > 100, "{behind}");
}

#[tokio::test]
async fn memory_behind_the_interface_is_the_same() {
    same(memory, Calls::Guarded).await;
}

#[tokio::test]
async fn with_inline_calls_it_is_the_same() {
    same(memory, Calls::Inline).await;
}

#[tokio::test]
async fn in_two_halves_it_is_the_same() {
    same(|| memory().in_halves(), Calls::Guarded).await;
}
