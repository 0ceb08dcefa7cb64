//! The emulator against every case: real devices, so every fixture is a process with namespaces of its own.

mod expected;

use std::process::ExitCode;

use dpumesh_conform::fixtures::VARIANTS;
use dpumesh_hw::netns::testing::{self, Case, RunAs};
use dpumesh_tap::VfKind;

use expected::check;

fn main() -> ExitCode {
    testing::main(&[
        case("tap_vfs_keep_the_contract", || with_tap("tap")),
        case("veth_vfs_keep_the_contract", || keeps_the_contract("veth")),
        case("steered_unlimited_cards_keep_the_contract", || {
            with_tap("tap-steered-unlimited")
        }),
        case("steered_cards_behind_the_c_interface_keep_the_contract", || {
            with_tap("tap-steered-unlimited-abi")
        }),
        case("steered_k2_like_cards_keep_the_contract", || {
            keeps_the_contract("veth-steered-k2-like")
        }),
        case("steered_minimal_cards_keep_the_contract", || {
            with_tap("tap-steered-minimal")
        }),
    ])
}

const fn case(name: &'static str, run: fn()) -> Case {
    Case {
        name,
        run_as: RunAs::Caller,
        run,
    }
}

fn with_tap(variant: &str) {
    match VfKind::available() {
        VfKind::Tap => keeps_the_contract(variant),
        VfKind::Veth => testing::skip(variant, "/dev/net/tun does not open"),
    }
}

fn keeps_the_contract(variant: &str) {
    let variant = VARIANTS.iter().find(|each| each.name == variant);
    let fixture = variant.expect("a variant").fixture().expect("a fixture");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(check(fixture));
}
