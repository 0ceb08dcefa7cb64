//! The rights that namespaces need, with root or without.
//!
//! [`ensure_privilege`] is the first line of every program's `main`. With CAP_SYS_ADMIN and CAP_NET_ADMIN it does
//! nothing. Without, it moves the process into a user namespace in which it is root (its own user is mapped to
//! uid 0), with a network and a mount namespace of its own; everything dpumesh does then works there, except what
//! needs a device file that the user cannot open. The kernel allows the move only while the process has a single
//! thread, so it comes before any runtime or logger.

use std::fmt;
use std::fs;
use std::io;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{getegid, geteuid};

/// How the process came by its rights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Privilege {
    /// It had CAP_SYS_ADMIN and CAP_NET_ADMIN already.
    Root,
    /// It is root of a user namespace of its own, made just now.
    UserNamespace,
}

/// Why the process could not get the rights it needs.
#[derive(Debug)]
pub struct PrivilegeError {
    step: &'static str,
    source: io::Error,
    advice: String,
}

impl fmt::Display for PrivilegeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "running without root: {}: {}; {}",
            self.step, self.source, self.advice
        )
    }
}

impl std::error::Error for PrivilegeError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}

/// Makes sure that the process may create and enter network namespaces. First thing in `main`.
///
/// # Errors
/// If the process has no rights and the kernel refuses a user namespace; the message names the setting to look at.
pub fn ensure_privilege() -> Result<Privilege, PrivilegeError> {
    if has_capabilities() {
        return Ok(Privilege::Root);
    }
    enter_user_namespace()?;
    Ok(Privilege::UserNamespace)
}

/// Whether the calling thread has CAP_SYS_ADMIN and CAP_NET_ADMIN in its user namespace.
pub fn has_capabilities() -> bool {
    const NET_ADMIN: u64 = 1 << 12;
    const SYS_ADMIN: u64 = 1 << 21;
    let status = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let effective = status_field(&status, "CapEff:").and_then(|hex| u64::from_str_radix(hex, 16).ok());
    effective.is_some_and(|bits| bits & (NET_ADMIN | SYS_ADMIN) == NET_ADMIN | SYS_ADMIN)
}

/// Moves the calling process into a new user, network and mount namespace and makes it root there.
///
/// # Errors
/// If the process has more than one thread, or the kernel refuses. After a failure past the first step the process
/// may be left in a user namespace without an identity: report the error and end.
pub fn enter_user_namespace() -> Result<(), PrivilegeError> {
    let (uid, gid) = (geteuid(), getegid());
    unshare(CloneFlags::CLONE_NEWUSER).map_err(|errno| refused("create a user namespace", errno))?;
    write_map("/proc/self/setgroups", "deny")?;
    write_map("/proc/self/uid_map", &format!("0 {uid} 1"))?;
    write_map("/proc/self/gid_map", &format!("0 {gid} 1"))?;
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)
        .map_err(|errno| refused("create network and mount namespaces", errno))?;
    let nothing: Option<&str> = None;
    mount(
        nothing,
        "/",
        nothing,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        nothing,
    )
    .map_err(|errno| refused("make mounts private", errno))
}

fn write_map(path: &'static str, content: &str) -> Result<(), PrivilegeError> {
    fs::write(path, content).map_err(|error| refused(path, error))
}

fn refused(step: &'static str, error: impl Into<io::Error>) -> PrivilegeError {
    let source = error.into();
    let advice = if source.raw_os_error() == Some(libc::EINVAL) && thread_count() > 1 {
        format!(
            "the process has {} threads: call this before starting any",
            thread_count()
        )
    } else {
        kernel_settings()
    };
    PrivilegeError { step, source, advice }
}

fn thread_count() -> usize {
    fs::read_dir("/proc/self/task").map_or(1, Iterator::count)
}

/// Names the settings of this kernel that keep an ordinary user from making user namespaces.
fn kernel_settings() -> String {
    const SETTINGS: [(&str, &str, &str); 3] = [
        (
            "/proc/sys/user/max_user_namespaces",
            "0",
            "user.max_user_namespaces is 0",
        ),
        (
            "/proc/sys/kernel/unprivileged_userns_clone",
            "0",
            "kernel.unprivileged_userns_clone is 0",
        ),
        (
            "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
            "1",
            "kernel.apparmor_restrict_unprivileged_userns is 1",
        ),
    ];
    let found: Vec<&str> = SETTINGS
        .iter()
        .filter(|(path, bad, _)| fs::read_to_string(path).is_ok_and(|value| value.trim() == *bad))
        .map(|(_, _, finding)| *finding)
        .collect();
    if found.is_empty() {
        "run as root, or allow user namespaces (user.max_user_namespaces and CONFIG_USER_NS look right; a container \
         runtime's seccomp profile or a chroot may refuse them)"
            .to_owned()
    } else {
        format!("run as root, or change: {}", found.join(", "))
    }
}

fn status_field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status
        .lines()
        .find_map(|line| line.strip_prefix(name))
        .map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_multithreaded_process_is_told_so() {
        let (done, wait) = std::sync::mpsc::channel::<()>();
        let other = std::thread::spawn(move || wait.recv());
        let error = enter_user_namespace().expect_err("a test runs beside its harness");
        assert!(error.to_string().contains("threads"), "{error}");
        drop(done);
        assert!(other.join().expect("waits only").is_err());
    }

    #[test]
    fn a_status_field_is_found_by_its_name() {
        let status = "Name:\tcat\nCapInh:\t0000000000000000\nCapEff:\t000001ffffffffff\n";
        assert_eq!(status_field(status, "CapEff:"), Some("000001ffffffffff"));
        assert_eq!(status_field(status, "CapBnd:"), None);
    }
}
