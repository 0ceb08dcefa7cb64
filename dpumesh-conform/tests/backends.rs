//! The in-tree backends that need no namespaces, against every case, as they are and through the C interface.

mod expected;

use dpumesh_conform::fixtures::Choice;

use expected::check;

async fn keeps_the_contract(choice: Choice, variant: &str) {
    let fixture = choice.fixture(Some(variant), serde_json::json!({}));
    check(fixture.expect("made")).await;
}

#[tokio::test]
async fn memory_keeps_the_contract() {
    keeps_the_contract(Choice::Memory, "memory").await;
}

#[tokio::test]
async fn memory_in_two_halves_keeps_the_contract() {
    keeps_the_contract(Choice::Memory, "memory-halves").await;
}

#[tokio::test]
async fn memory_behind_the_c_interface_keeps_the_contract() {
    keeps_the_contract(Choice::Memory, "memory-abi").await;
}

#[tokio::test]
async fn two_halves_behind_the_c_interface_keep_the_contract() {
    keeps_the_contract(Choice::Memory, "memory-halves-abi").await;
}

#[tokio::test]
async fn fake_cards_like_igb_keep_the_contract() {
    keeps_the_contract(Choice::Sriov, "igb").await;
}
