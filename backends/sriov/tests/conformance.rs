//! The backend against the conformance kit, on fake cards: what is skipped, and why, is in `expected/`; `UPDATE_EXPECT=1`
//! writes it anew.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use dpumesh_hw::conformance::{Expectations, run};
use dpumesh_sriov::fake::{FakeFixture, Model};

#[test]
fn igb_like_cards_keep_the_contract() {
    check("igb", |name| FakeFixture::new(name, Model::igb()));
}

#[test]
fn unprotected_igb_like_cards_keep_the_contract() {
    check("igb-unprotected", |name| {
        FakeFixture::new(name, Model::igb()).unprotected()
    });
}

#[test]
fn mlx5_like_cards_keep_the_contract() {
    check("mlx5", |name| FakeFixture::new(name, Model::mlx5()));
}

#[test]
fn bare_cards_keep_the_contract() {
    check("bare-unprotected", |name| {
        FakeFixture::new(name, Model::bare()).unprotected()
    });
}

fn check(file: &str, fixture: impl Fn(String) -> FakeFixture) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/expected")
        .join(format!("{file}.json"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|_| "{}".to_owned());
    let expected = Expectations::from_json(&text).expect("an expectations file");
    let fixture = fixture(file.to_owned()).expecting(expected.clone());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let report = runtime.block_on(run(Arc::new(fixture), "", Duration::from_secs(20)));
    println!("{report}");
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
        "differences to {}:\n{}",
        path.display(),
        differences.join("\n")
    );
}
