//! MyCard against the conformance kit. What it skips, and why, is in `expected.json`; `UPDATE_EXPECT=1` writes it anew.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use dpumesh_core::offload::Program;
use dpumesh_core::{Backend, Result};
use dpumesh_hw::conformance::{
    Clock, Crash, Expectations, Fixture, Namespaces, Probe, Reset, Rig, Sabotage, run,
};
use dpumesh_mycard::MyCard;

#[tokio::test]
async fn mycard_keeps_the_contract() {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/expected.json");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|_| "{}".to_owned());
    let expected = Expectations::from_json(&text).expect("an expectations file");
    let report = run(Arc::new(Cards), "", Duration::from_secs(10)).await;
    println!("{report}");
    if std::env::var_os("UPDATE_EXPECT").is_some() {
        assert!(report.is_clean(), "only skips are written by themselves");
        std::fs::write(&path, report.to_expectations(&expected).to_json()).expect("written");
        return;
    }
    let differences: Vec<String> = report
        .differences(&expected)
        .iter()
        .map(ToString::to_string)
        .collect();
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

/// Makes a fresh card for each case.
#[derive(Debug)]
struct Cards;

#[async_trait]
impl Fixture for Cards {
    fn name(&self) -> String {
        dpumesh_mycard::NAME.to_owned()
    }

    async fn open(&self) -> Result<Box<dyn Rig>> {
        Ok(Box::new(Lab(Arc::new(MyCard::open("dpu0")?))))
    }

    fn expectations(&self) -> Expectations {
        Expectations::default()
    }
}

/// One card, and what can be done to it from outside. Each `None` skips the cases that need it: give the kit more, and it
/// proves more.
#[derive(Debug)]
struct Lab(Arc<MyCard>);

impl Rig for Lab {
    fn host(&self) -> Arc<dyn Backend> {
        Arc::<MyCard>::clone(&self.0)
    }

    fn soc(&self) -> Arc<dyn Backend> {
        Arc::<MyCard>::clone(&self.0)
    }

    fn reset(&self) -> Option<&dyn Reset> {
        Some(self)
    }

    fn probe(&self) -> Option<&dyn Probe> {
        None
    }

    fn namespaces(&self) -> Option<&dyn Namespaces> {
        None
    }

    fn crash(&self) -> Option<&dyn Crash> {
        None
    }

    fn sabotage(&self) -> Option<&dyn Sabotage> {
        None
    }

    fn clock(&self) -> Option<&dyn Clock> {
        None
    }

    fn programs(&self) -> Vec<Program> {
        Vec::new()
    }
}

#[async_trait]
impl Reset for Lab {
    async fn lose(&self) -> Result<()> {
        self.0.lost();
        Ok(())
    }

    async fn bring_back(&self) -> Result<()> {
        self.0.back();
        Ok(())
    }
}
