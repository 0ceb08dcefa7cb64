//! Where the simulator's shared library is.

use std::io;
use std::path::{Path, PathBuf};

/// File name of the library.
pub const FILE: &str = if cfg!(target_os = "macos") {
    "libdpumesh_yusur_simulator.dylib"
} else {
    "libdpumesh_yusur_simulator.so"
};

/// Names the library for tests that have it elsewhere.
pub const VARIABLE: &str = "DPUMESH_YUSUR_SIMULATOR";

/// The library that was built with the running program: cargo builds it for whoever depends on this crate, beside the
/// dependencies of its programs.
///
/// [`VARIABLE`] names another. Looked at are the folder of the running program, the one above and `deps` in both.
///
/// # Errors
/// `NotFound` with the places that were looked at.
pub fn library_path() -> io::Result<PathBuf> {
    if let Some(path) = std::env::var_os(VARIABLE) {
        return Path::new(&path).canonicalize();
    }
    let program = std::env::current_exe()?;
    let folder = program.parent().unwrap_or_else(|| Path::new("/"));
    let above = folder.parent().unwrap_or(folder);
    let places = [
        folder.join(FILE),
        folder.join("deps").join(FILE),
        above.join(FILE),
        above.join("deps").join(FILE),
    ];
    places.iter().find(|path| path.is_file()).cloned().ok_or_else(|| {
        let places: Vec<String> = places.iter().map(|path| path.display().to_string()).collect();
        let message = format!(
            "the simulator's library is in none of {}: `cargo build -p dpumesh-yusur-simulator`, or name it by {VARIABLE}",
            places.join(", ")
        );
        io::Error::new(io::ErrorKind::NotFound, message)
    })
}
