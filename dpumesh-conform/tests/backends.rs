//! The in-tree backends that need no namespaces, against every case, as they are and through the C interface.

mod expected;

use dpumesh_conform::fixtures::VARIANTS;

use expected::check;

async fn keeps_the_contract(variant: &str) {
    let variant = VARIANTS.iter().find(|each| each.name == variant);
    check(variant.expect("a variant").fixture().expect("made")).await;
}

#[tokio::test]
async fn memory_keeps_the_contract() {
    keeps_the_contract("memory").await;
}

#[tokio::test]
async fn memory_in_two_halves_keeps_the_contract() {
    keeps_the_contract("memory-halves").await;
}

#[tokio::test]
async fn memory_behind_the_c_interface_keeps_the_contract() {
    keeps_the_contract("memory-abi").await;
}

#[tokio::test]
async fn two_halves_behind_the_c_interface_keep_the_contract() {
    keeps_the_contract("memory-halves-abi").await;
}

#[tokio::test]
async fn fake_cards_like_igb_keep_the_contract() {
    keeps_the_contract("igb").await;
}

#[tokio::test]
async fn fake_cards_like_igb_behind_the_c_interface_keep_the_contract() {
    keeps_the_contract("igb-abi").await;
}

#[tokio::test]
async fn fake_cards_like_mlx5_keep_the_contract() {
    keeps_the_contract("mlx5").await;
}

#[tokio::test]
async fn fake_cards_like_mlx5_in_switchdev_mode_keep_the_contract() {
    keeps_the_contract("mlx5-switchdev").await;
}

#[tokio::test]
async fn simulated_yusur_cards_on_their_sriov_floor_keep_the_contract() {
    keeps_the_contract("yusur-sriov").await;
}

#[tokio::test]
async fn simulated_yusur_cards_keep_the_contract() {
    keeps_the_contract("yusur").await;
}

#[tokio::test]
async fn simulated_yusur_cards_behind_the_c_interface_keep_the_contract() {
    keeps_the_contract("yusur-abi").await;
}

#[tokio::test]
async fn small_slow_yusur_cards_keep_the_contract() {
    keeps_the_contract("yusur-small").await;
}

#[tokio::test]
async fn yusur_cards_in_legacy_mode_keep_the_contract() {
    keeps_the_contract("yusur-legacy").await;
}
