//! Runs `config::fuzz::route`, where the rules are.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| dpumesh_proxy::config::fuzz::route(data));
