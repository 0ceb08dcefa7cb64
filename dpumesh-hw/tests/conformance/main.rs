//! The memory backend against the kit, and the kit against backends that lie.
//!
//! Each fixture has its expectations in `expected/`: what it skips and why. `UPDATE_EXPECT=1` writes them anew; a skip that
//! nobody listed, a failure, and a listed skip that ran are differences.

mod channels;
mod fixtures;
mod mutants;
mod retry;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use dpumesh_core::{Backend, Effect, ErrorKind};
use dpumesh_hw::conformance::memory::MemoryFixture;
use dpumesh_hw::conformance::{Expectations, run};
use dpumesh_hw::memory;
use dpumesh_hw::wrap::{Fault, FaultRule, Limit, Limits, Trace, Validate};

use retry::Retry;

const DEADLINE: Duration = Duration::from_secs(10);

/// Runs all cases and compares the report with the checked-in expectations of the same name.
async fn check(fixture: MemoryFixture, file: &str) {
    let (path, expected) = expectations(file);
    let report = run(Arc::new(fixture.expecting(expected.clone())), "", DEADLINE).await;
    if std::env::var_os("UPDATE_EXPECT").is_some() {
        assert!(
            report.is_clean(),
            "only skips are written by themselves:\n{report}"
        );
        std::fs::write(&path, report.to_expectations(&expected).to_json()).expect("written");
        return;
    }
    let differences = report.differences(&expected);
    let lines: Vec<String> = differences.iter().map(ToString::to_string).collect();
    assert!(
        differences.is_empty(),
        "{report}\n\ndifferences to {}:\n{}",
        path.display(),
        lines.join("\n")
    );
}

fn expectations(file: &str) -> (PathBuf, Expectations) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/conformance/expected")
        .join(format!("{file}.json"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|_| "{}".to_owned());
    (
        path,
        Expectations::from_json(&text).expect("an expectations file"),
    )
}

#[tokio::test]
async fn memory_keeps_the_contract() {
    check(fixtures::large(), "memory").await;
}

#[tokio::test]
async fn memory_in_two_halves_keeps_the_contract() {
    check(
        fixtures::large().in_halves().named("memory-halves"),
        "memory-halves",
    )
    .await;
}

#[tokio::test]
async fn a_small_card_in_memory_keeps_the_contract() {
    check(fixtures::small(), "memory-small").await;
}

/// The channels are real ones: shared memory, sockets, handshakes.
#[tokio::test]
async fn shared_memory_keeps_the_contract() {
    let folder = tempfile::tempdir().expect("a folder");
    check(
        fixtures::over_sockets(folder.path(), &memory::capabilities()),
        "shm",
    )
    .await;
}

/// Messages only, and three channels at a time.
#[tokio::test]
async fn a_little_shared_memory_keeps_the_contract() {
    let folder = tempfile::tempdir().expect("a folder");
    check(
        fixtures::over_sockets(folder.path(), &fixtures::little()),
        "shm-small",
    )
    .await;
}

/// Watching changes nothing: the expectations are those of the bare card.
#[tokio::test]
async fn traced_and_validated_it_is_the_same() {
    let watched = fixtures::large()
        .named("memory traced and validated")
        .wrapped(|inner| Arc::new(Trace::new(Arc::new(Validate::new(inner)))));
    check(watched, "memory").await;
}

#[tokio::test]
async fn a_limited_card_keeps_the_contract() {
    let limited = fixtures::large().named("memory-limited").wrapped(|inner| {
        let limits = Limits {
            rules: Some(48),
            batch_max: Some(24),
            atomicity: Some(BTreeSet::new()),
            connections: Some(4),
        };
        Arc::new(Limit::new(inner, limits))
    });
    check(limited, "memory-limited").await;
}

/// One call in five fails for the moment, some take their time. To a caller who follows the advice in the errors it is
/// the same card.
#[tokio::test]
async fn with_transient_faults_and_a_patient_caller_it_is_the_same() {
    check(
        fixtures::large().wrapped(|inner| Arc::new(Retry::new(faulty(inner)))),
        "memory",
    )
    .await;
}

/// Without patience the faults show: they do strike.
#[tokio::test]
async fn with_transient_faults_and_an_impatient_caller_it_fails() {
    let report = run(Arc::new(fixtures::large().wrapped(faulty)), "vf", DEADLINE).await;
    assert!(report.counts().failed > 5, "{report}");
}

/// What no fixture here shows is known by name: of these cases nobody has seen yet that they can pass.
#[test]
fn every_case_is_shown_by_some_card() {
    let skips = |file| {
        expectations(file)
            .1
            .skips
            .into_keys()
            .collect::<BTreeSet<String>>()
    };
    let files = ["memory", "memory-halves", "memory-small", "memory-limited", "shm"];
    let never = files
        .into_iter()
        .map(skips)
        .reduce(|all, skips| &all & &skips)
        .unwrap_or_default();
    assert_eq!(never.iter().map(String::as_str).collect::<Vec<_>>(), NEVER_SHOWN);
}

/// The memory backend neither mirrors, tunnels nor translates, and has no descriptors of ports.
const NEVER_SHOWN: &[&str] = &[
    "a_decapsulated_frame_is_what_was_inside",
    "a_mirrored_frame_leaves_by_both_ports",
    "a_rewritten_address_leaves_with_right_checksums",
    "an_encapsulated_frame_is_inside_its_tunnel",
    "the_descriptor_polls_readable_when_a_frame_waits",
];

fn faulty(inner: Arc<dyn Backend>) -> Arc<dyn Backend> {
    let fault = Fault::new(inner, 0x5eed);
    for kind in [ErrorKind::Busy, ErrorKind::Timeout, ErrorKind::Io] {
        let rule = FaultRule::on("*").per_mille(70).fails(kind, Effect::None);
        fault.add(rule).expect("every control call can fail");
    }
    for method in ["vf.configure", "vf.attach", "offload.write", "ports.open"] {
        let rule = FaultRule::on(method)
            .per_mille(300)
            .delays(Duration::from_millis(2));
        fault.add(rule).expect("every control call can be slow");
    }
    Arc::new(fault)
}
