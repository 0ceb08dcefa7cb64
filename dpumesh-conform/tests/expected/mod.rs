//! Compares a run with what is checked in: `expected/NAME.json` names what is skipped and fails, and why;
//! `expected/counts.json` says how many cases of each fixture end how, so that a case that vanishes is seen as well.
//!
//! `UPDATE_EXPECT=1` with `--test-threads=1` writes both anew; a failure is never written by itself.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use dpumesh_hw::conformance::{Counts, Expectations, Fixture, run};

const DEADLINE: Duration = Duration::from_secs(20);

/// Runs every case on a fixture and compares.
pub(crate) async fn check(fixture: Arc<dyn Fixture>) {
    let name = fixture.name();
    let path = folder().join(format!("{name}.json"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|_| "{}".to_owned());
    let expected = Expectations::from_json(&text).expect("an expectations file");
    let report = run(fixture, "", DEADLINE).await;
    println!("{report}");
    if std::env::var_os("UPDATE_EXPECT").is_some() {
        assert!(
            report.is_clean(),
            "only skips are written by themselves:\n{report}"
        );
        std::fs::write(&path, report.to_expectations(&expected).to_json()).expect("written");
        let mut counts = counts();
        counts.insert(name, report.counts());
        let text = serde_json::to_string_pretty(&counts).expect("numbers");
        std::fs::write(folder().join("counts.json"), text + "\n").expect("written");
        return;
    }
    let differences: Vec<String> = report
        .differences(&expected)
        .iter()
        .map(ToString::to_string)
        .collect();
    assert!(
        differences.is_empty(),
        "differences to {}:\n{}",
        path.display(),
        differences.join("\n")
    );
    assert_eq!(
        counts().get(&name),
        Some(&report.counts()),
        "{name} in counts.json"
    );
}

fn counts() -> BTreeMap<String, Counts> {
    let text = std::fs::read_to_string(folder().join("counts.json")).expect("a file of counts");
    serde_json::from_str(&text).expect("counts by fixture")
}

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("expected")
}
