//! Kernel settings below `/proc/sys/net`, which belong to the network namespace of the thread that opens them.
//!
//! Keys are path parts joined by `/` (`ipv4/conf/stk0/rp_filter`), because an interface name may hold a dot.

use std::fs;
use std::io;

use crate::netns::Namespace;

/// A setting that could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("{operation} kernel setting net/{key}{}: {source}{}", shown(.value), advice(.source))]
pub struct SysctlError {
    operation: &'static str,
    key: String,
    value: Option<String>,
    source: io::Error,
}

impl SysctlError {
    /// This kernel does not have the setting.
    pub fn is_missing(&self) -> bool {
        self.source.kind() == io::ErrorKind::NotFound
    }
}

fn shown(value: &Option<String>) -> String {
    value
        .as_ref()
        .map_or_else(String::new, |value| format!(" = {value:?}"))
}

fn advice(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EROFS) => " (/proc/sys is mounted read-only, as in an unprivileged container)",
        Some(libc::EACCES | libc::EPERM) => " (needs root in the namespace's user namespace)",
        Some(libc::ENOENT) => " (this kernel does not have it, or there is no such interface)",
        _ => "",
    }
}

/// Writes several settings in `namespace`, in order; stops at the first that fails.
///
/// # Errors
/// Which setting could not be written, with which value, and why.
pub fn set_all(namespace: &Namespace, settings: &[(String, String)]) -> Result<(), SysctlError> {
    inside(namespace, || {
        settings.iter().try_for_each(|(key, value)| set_here(key, value))
    })
}

/// Writes one setting in `namespace`.
///
/// # Errors
/// As [`set_all`].
pub fn set(namespace: &Namespace, key: &str, value: &str) -> Result<(), SysctlError> {
    inside(namespace, || set_here(key, value))
}

/// Reads one setting of `namespace`, without the final line end.
///
/// # Errors
/// If this kernel does not have it.
pub fn get(namespace: &Namespace, key: &str) -> Result<String, SysctlError> {
    inside(namespace, || {
        let path = path(key).map_err(|source| error("read", key, None, source))?;
        let text = fs::read_to_string(path).map_err(|source| error("read", key, None, source))?;
        Ok(text.trim_end().to_owned())
    })
}

fn inside<T: Send>(
    namespace: &Namespace,
    work: impl FnOnce() -> Result<T, SysctlError> + Send,
) -> Result<T, SysctlError> {
    namespace
        .run(work)
        .map_err(|source| error("reach", "", None, io::Error::other(source)))?
}

fn set_here(key: &str, value: &str) -> Result<(), SysctlError> {
    path(key)
        .and_then(|path| fs::write(path, value))
        .map_err(|source| error("write", key, Some(value.to_owned()), source))
}

/// The file of a key, which must stay below `/proc/sys/net`.
fn path(key: &str) -> io::Result<String> {
    let climbs = key.is_empty()
        || key
            .split('/')
            .any(|part| part.is_empty() || part == "." || part == "..");
    if climbs {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a path below /proc/sys/net",
        ));
    }
    Ok(format!("/proc/sys/net/{key}"))
}

fn error(operation: &'static str, key: &str, value: Option<String>, source: io::Error) -> SysctlError {
    SysctlError {
        operation,
        key: key.to_owned(),
        value,
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_cannot_climb_out() {
        for key in ["", "../kernel/hostname", "ipv4//x", "/ipv4", "ipv4/./x"] {
            assert!(path(key).is_err(), "{key:?}");
        }
        assert!(path("ipv4/conf/eth0.5/rp_filter").is_ok());
    }
}
