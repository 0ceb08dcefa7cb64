//! Where the simulator's shared library is.

use std::fs::Permissions;
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use dpumesh_hw::trust;

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
/// [`VARIABLE`] names another. Looked at are the folder of the running program, the one above and `deps` in both. From a build folder that
/// others may write to no backend would load it: then it is a copy, which this process leaves in the folder for temporary files.
///
/// # Errors
/// `NotFound` with the places that were looked at; what keeps a copy from being made.
pub fn library_path() -> io::Result<PathBuf> {
    static COPY: Mutex<Option<PathBuf>> = Mutex::new(None);
    let built = built_library()?;
    if trust::real_path(&built).is_ok() {
        return Ok(built);
    }
    let mut copy = COPY.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(copy) = &*copy {
        return Ok(copy.clone());
    }
    let folder = std::env::temp_dir().join(format!("dpumesh-yusur-simulator-{}", std::process::id()));
    std::fs::DirBuilder::new().mode(0o700).create(&folder)?;
    let path = folder.join(FILE);
    std::fs::copy(built, &path)?;
    std::fs::set_permissions(&path, Permissions::from_mode(0o600))?;
    Ok(copy.insert(path).clone())
}

fn built_library() -> io::Result<PathBuf> {
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
