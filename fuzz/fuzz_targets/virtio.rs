//! Runs `device::fuzz::virtio` of dpumesh-tap, where the rules are.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| dpumesh_tap::device::fuzz::virtio(data));
