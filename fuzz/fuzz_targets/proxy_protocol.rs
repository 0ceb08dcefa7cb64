//! Runs `proxy_protocol::fuzz::header`, where the rules are.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| dpumesh_proxy::proxy_protocol::fuzz::header(data));
