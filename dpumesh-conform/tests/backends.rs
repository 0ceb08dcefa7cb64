//! The in-tree backends that need no namespaces, against every case.

mod expected;

use dpumesh_conform::fixtures::Choice;

use expected::check;

#[tokio::test]
async fn memory_keeps_the_contract() {
    check(Choice::Memory.fixture(Some("memory")).expect("made")).await;
}

#[tokio::test]
async fn memory_in_two_halves_keeps_the_contract() {
    check(Choice::Memory.fixture(Some("memory-halves")).expect("made")).await;
}
