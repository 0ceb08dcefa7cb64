//! Runs `wire::fuzz::ethernet`, where the rules are.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| dpumesh_hw::wire::fuzz::ethernet(data));
