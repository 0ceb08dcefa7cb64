//! The log of the process that loaded this library.
//!
//! A library has `tracing` of its own: what its backend says there goes nowhere unless the library installs a subscriber. So the
//! edge itself writes here what it must not keep to itself, which is every panic that it stopped, and a backend may write
//! by [`log`] what an operator has to know. Errors need neither: they are the answer to a call.

use std::sync::{Mutex, PoisonError};

use super::super::abi::*;
use super::super::arena::Reader;

/// Of the latest loader: a library that is linked in twice has the same one twice.
static HOST: Mutex<Option<dm_host>> = Mutex::new(None);

/// Keeps what the loader offers.
///
/// # Safety
/// Null, or valid as long as the process.
pub(super) unsafe fn keep(host: *const dm_host) {
    if let Ok(host) = Reader::trusting().one(host, "host") {
        *HOST.lock().unwrap_or_else(PoisonError::into_inner) = Some(host);
    }
}

/// Writes a line to the log of the loader's process; `level` is one of `DM_LOG_*`. Does not block; lost before the library is
/// loaded.
pub fn log(level: u32, text: &str) {
    let host = *HOST.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(host) = host {
        say(&host, level, text);
    }
}

fn say(host: &dm_host, level: u32, text: &str) {
    let Some(log) = host.log else { return };
    let text = dm_str {
        at: text.as_ptr(),
        len: text.len() as u64,
    };
    // SAFETY: the loader's function, valid as long as the process; the text lives through the call.
    unsafe { log(host.context, level, text) };
}

#[cfg(test)]
mod tests {
    use super::super::super::arena::Sized32;
    use super::*;

    type Lines = Mutex<Vec<(u32, String)>>;

    unsafe extern "C" fn collect(context: *mut std::ffi::c_void, level: u32, text: dm_str) {
        // SAFETY: the test's own lines, and a text that lives through the call.
        let (lines, octets) = unsafe {
            let octets = std::slice::from_raw_parts(text.at, text.len as usize);
            (&*context.cast::<Lines>(), octets)
        };
        let text = String::from_utf8_lossy(octets).into_owned();
        lines.lock().expect("no panic").push((level, text));
    }

    #[test]
    fn a_line_reaches_the_host() {
        let lines = Lines::default();
        let mut host = dm_host::empty();
        say(&host, DM_LOG_INFO, "a host without a log hears nothing");
        host.context = (&raw const lines).cast_mut().cast();
        host.log = Some(collect);
        say(&host, DM_LOG_ERROR, "fire");
        let lines = lines.lock().expect("no panic");
        assert_eq!(*lines, [(DM_LOG_ERROR, "fire".to_owned())]);
    }
}
