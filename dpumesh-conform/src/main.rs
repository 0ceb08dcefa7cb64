//! `dpumesh-conform`: proves a backend by the conformance kit. See `dpumesh-conform --help`.

use clap::Parser;
use dpumesh_conform::program::{Args, run};

fn main() {
    let args = Args::parse();
    let code = run(&args).unwrap_or_else(|error| {
        eprintln!("dpumesh-conform: {error}");
        error.code()
    });
    // A case that has blocked its thread keeps it: nobody waits for that.
    std::process::exit(code)
}
