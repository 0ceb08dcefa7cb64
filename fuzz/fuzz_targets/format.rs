//! Runs `access_log::fuzz::format`, where the rules are.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| dpumesh_proxy::access_log::fuzz::format(data));
