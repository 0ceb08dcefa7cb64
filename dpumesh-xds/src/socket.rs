//! Unix sockets that only their own user opens.

use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;

/// A Unix socket at `path` that only this process' user can open, in place of what was there.
///
/// # Errors
/// The folder is not there or not writable, or the path is too long for a socket.
pub fn bind(path: &Path) -> io::Result<UnixListenerStream> {
    // Under another name first: nobody can open it before its mode is right.
    let mut fresh = path.as_os_str().to_owned();
    fresh.push(".new");
    let _ = std::fs::remove_file(&fresh);
    let listener = UnixListener::bind(&fresh)?;
    std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o600))?;
    std::fs::rename(&fresh, path)?;
    Ok(UnixListenerStream::new(listener))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_takes_the_place_of_what_was_there_and_is_its_users_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        std::fs::write(&path, "stale").unwrap();
        let _listener = bind(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        tokio::net::UnixStream::connect(&path).await.unwrap();
        assert!(bind(&folder.path().join("none/s")).is_err());
    }
}
