//! The card against the conformance kit: the simulator behind the true loading path, a card in memory under it.
//!
//! What is skipped, and why, is in `expected/`; `UPDATE_EXPECT=1` writes it anew.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use dpumesh_hw::conformance::{Expectations, run};
use dpumesh_hw::wrap::Validate;
use dpumesh_yusur_simulator::fixture::YusurFixture;

async fn check(fixture: YusurFixture, file: &str) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/expected")
        .join(format!("{file}.json"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|_| "{}".to_owned());
    let expected = Expectations::from_json(&text).expect("an expectations file");
    let filter = std::env::var("CASES").unwrap_or_default();
    let report = run(
        Arc::new(fixture.expecting(expected.clone())),
        &filter,
        Duration::from_secs(20),
    )
    .await;
    if !filter.is_empty() {
        assert!(report.is_clean(), "{report}");
        return;
    }
    if std::env::var_os("UPDATE_EXPECT").is_some() {
        assert!(
            report.is_clean(),
            "only skips are written by themselves:\n{report}"
        );
        std::fs::write(&path, report.to_expectations(&expected).to_json()).expect("written");
        return;
    }
    let differences: Vec<String> = report
        .differences(&expected)
        .iter()
        .map(ToString::to_string)
        .collect();
    assert!(
        differences.is_empty(),
        "{report}\n\ndifferences to {}:\n{}",
        path.display(),
        differences.join("\n")
    );
}

#[tokio::test]
async fn a_card_keeps_the_contract() {
    check(YusurFixture::new("yusur", ""), "yusur").await;
}

/// Little of everything, and every answer of the backend is checked.
#[tokio::test]
async fn a_small_slow_card_keeps_the_contract() {
    let profile = "entries=48,tables=6,counters=8,profiles=3,priorities=2,groups=2,batch_max=7,insert_us=100,connections=4";
    let fixture = YusurFixture::new("yusur-small", profile).wrapped(|inner| Arc::new(Validate::new(inner)));
    check(fixture, "yusur-small").await;
}

/// A NIC with SR-IOV and no more: everything is the floor's.
#[tokio::test]
async fn a_card_in_legacy_mode_keeps_the_contract() {
    check(YusurFixture::new("yusur-legacy", "mode=0"), "yusur-legacy").await;
}
