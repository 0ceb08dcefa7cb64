//! Runs `http1::fuzz::message`, where the rules are.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| dpumesh_proxy::http1::fuzz::message(data));
