//! Paths to listen at: taken, abandoned, not ours.

use super::*;

fn folder() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("channel");
    (folder, path)
}

fn errno(outcome: Result<impl std::fmt::Debug, ShmError>) -> nix::errno::Errno {
    match outcome {
        Err(ShmError::Os { source, .. }) => nix::errno::Errno::from_raw(source.raw_os_error().unwrap()),
        other => panic!("{other:?}"),
    }
}

fn bind(path: &Path) -> Result<Listener, ShmError> {
    Listener::bind(path, Limits::default())
}

#[test]
fn a_path_in_use_is_refused_and_an_abandoned_one_is_taken_over() {
    let (_folder, path) = folder();
    let listener = bind(&path).unwrap();
    assert_eq!(errno(bind(&path)), nix::errno::Errno::EADDRINUSE);
    // As a killed process leaves it: the socket closed, the path still there.
    let kept = path.with_extension("kept");
    std::fs::rename(&path, &kept).unwrap();
    drop(listener);
    std::fs::rename(&kept, &path).unwrap();
    assert_eq!(errno(connect(&path, &options())), nix::errno::Errno::ECONNREFUSED);
    let listener = bind(&path).unwrap();
    drop(listener);
    assert!(!path.exists());
    assert_eq!(errno(connect(&path, &options())), nix::errno::Errno::ENOENT);
}

#[test]
fn what_is_no_socket_is_left_alone() {
    let (_folder, path) = folder();
    std::fs::write(&path, b"precious").unwrap();
    assert_eq!(errno(bind(&path)), nix::errno::Errno::EADDRINUSE);
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
}

#[test]
fn the_path_is_ours_alone_and_nobody_waiting_is_no_error() {
    use std::os::unix::fs::PermissionsExt;
    let (_folder, path) = folder();
    let listener = bind(&path).unwrap();
    assert_eq!(
        std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o600
    );
    assert!(listener.accept().unwrap().is_none());
}

#[test]
fn a_peer_that_connects_and_says_nothing_costs_its_timeout() {
    let (_folder, path) = folder();
    let listener = bind(&path).unwrap();
    let silent = nix::sys::socket::socket(
        nix::sys::socket::AddressFamily::Unix,
        nix::sys::socket::SockType::SeqPacket,
        nix::sys::socket::SockFlag::SOCK_CLOEXEC,
        None,
    )
    .unwrap();
    let address = nix::sys::socket::UnixAddr::new(&path).unwrap();
    nix::sys::socket::connect(std::os::fd::AsRawFd::as_raw_fd(&silent), &address).unwrap();
    let incoming = listener.accept().unwrap().unwrap();
    assert!(matches!(
        incoming.finish(Duration::from_millis(10)),
        Err(ShmError::Timeout("hello"))
    ));
}
