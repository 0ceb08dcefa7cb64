//! Runs `wire::fuzz::icmpv4`, where the rules are.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| dpumesh_hw::wire::fuzz::icmpv4(data));
