//! `dpumesh-conform`: proves a backend by the conformance kit.

fn main() {}
