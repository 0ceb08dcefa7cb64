//! Runs `dataplane::fuzz::rule`, where the rules are.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| dpumesh_hw::dataplane::fuzz::rule(data));
