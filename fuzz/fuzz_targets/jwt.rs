//! Runs `jwt::fuzz::token`, where the rules are.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| dpumesh_proxy::jwt::fuzz::token(data));
