//! [`real_path`]: files that nobody but root and the user running could have written.
//!
//! A library that is loaded runs with all rights of the process, and a manifest says which one: who may write to them, or to a folder above
//! them, has these rights too.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Somebody else could have written a file, or it is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {reason}", path.display())]
pub struct Untrusted {
    /// The file, or the folder above it.
    pub path: PathBuf,
    /// Why not.
    pub reason: String,
}

/// The file behind a path, links resolved, when it and every folder above it belong to root or to the user running and nobody else can write
/// there (a folder with the sticky bit may be open).
///
/// # Errors
/// [`Untrusted`]; so is a relative path, which somebody else's folder could complete.
pub fn real_path(path: &Path) -> Result<PathBuf, Untrusted> {
    let refuse = |path: &Path, reason: &str| Untrusted {
        path: path.to_owned(),
        reason: reason.to_owned(),
    };
    if !path.is_absolute() {
        return Err(refuse(path, "the path must be absolute"));
    }
    let real = path
        .canonicalize()
        .map_err(|error| refuse(path, &error.to_string()))?;
    let me = nix::unistd::geteuid().as_raw();
    for place in real.ancestors() {
        let about = place
            .metadata()
            .map_err(|error| refuse(place, &error.to_string()))?;
        if about.uid() != 0 && about.uid() != me {
            return Err(refuse(place, "belongs neither to root nor to the user running"));
        }
        let sticky = about.is_dir() && about.mode() & 0o1000 != 0;
        if about.mode() & 0o022 != 0 && !sticky {
            return Err(refuse(place, "can be written by its group or by everybody"));
        }
    }
    if !real.is_file() {
        return Err(refuse(&real, "is no file"));
    }
    Ok(real)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn file(folder: &Path, name: &str, text: &str, mode: u32) -> PathBuf {
        let path = folder.join(name);
        std::fs::write(&path, text).expect("written");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("mode set");
        path
    }

    #[test]
    fn what_others_can_write_is_not_trusted() {
        let folder = tempfile::tempdir().expect("a folder");
        let cases = [
            (Path::new("lib.so").to_owned(), "must be absolute"),
            (folder.path().join("absent.so"), "No such file"),
            (folder.path().to_owned(), "is no file"),
            (
                file(folder.path(), "group.so", "", 0o664),
                "can be written by its group",
            ),
            (
                file(folder.path(), "world.so", "", 0o646),
                "can be written by its group or by everybody",
            ),
        ];
        for (path, reason) in cases {
            let error = real_path(&path).expect_err(reason);
            assert!(error.to_string().contains(reason), "{error}");
        }
        let open = folder.path().join("open");
        std::fs::create_dir(&open).expect("made");
        let inside = file(&open, "lib.so", "", 0o644);
        real_path(&inside).expect("trusted");
        std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o777)).expect("mode set");
        assert!(real_path(&inside).is_err(), "somebody could replace it");
    }

    #[test]
    fn another_users_file_is_not_trusted() {
        if !nix::unistd::geteuid().is_root() {
            return; // nobody else can give a file away
        }
        let folder = tempfile::tempdir().expect("a folder");
        let path = file(folder.path(), "theirs.so", "", 0o644);
        std::os::unix::fs::chown(&path, Some(65_534), None).expect("given away");
        let error = real_path(&path).expect_err("another's");
        assert!(error.to_string().contains("belongs neither to root"), "{error}");
    }
}
