//! The level of this process's own log while it runs: `/logging`.
//!
//! A process has one log, so this is one of its few globals; [`crate::entry`] sets it up. Inside another program the log is that
//! program's, and there is nothing to change here.

use std::collections::BTreeMap;
use std::sync::{Mutex, OnceLock, PoisonError};

use tracing_subscriber::EnvFilter;

/// What can be set apart: the parts of the proxy, by the name of their module.
pub const LOGGERS: &[&str] = &[
    "access_log",
    "admin",
    "config",
    "dataplane",
    "http1",
    "http2",
    "listener",
    "program",
    "rbac",
    "route",
    "tcp",
    "tls",
    "upstream",
    "worker",
    "xds",
];

/// Envoy's names of levels, and ours.
const LEVELS: &[(&str, &str)] = &[
    ("trace", "trace"),
    ("debug", "debug"),
    ("info", "info"),
    ("warning", "warn"),
    ("warn", "warn"),
    ("error", "error"),
    ("critical", "error"),
    ("off", "off"),
];

type Reload = Box<dyn Fn(EnvFilter) -> bool + Send + Sync>;

static LOG: OnceLock<Mutex<Log>> = OnceLock::new();

struct Log {
    reload: Reload,
    base: String,
    apart: BTreeMap<&'static str, &'static str>,
}

/// `reload` changes the filter of the log, which is `base` now.
pub fn begin(base: &str, reload: Reload) {
    // A second log in one process: the first one stays the one that is changed.
    let _ = LOG.set(Mutex::new(Log {
        reload,
        base: base.to_owned(),
        apart: BTreeMap::new(),
    }));
}

/// The level of each part; `None` where the log is not the proxy's own.
pub fn list() -> Option<Vec<(&'static str, String)>> {
    let log = LOG.get()?.lock().unwrap_or_else(PoisonError::into_inner);
    let level = |name: &&'static str| {
        let apart = log.apart.get(name).map(|level| (*level).to_owned());
        (*name, apart.unwrap_or_else(|| log.base.clone()))
    };
    Some(LOGGERS.iter().map(level).collect())
}

/// Sets `level` (Envoy's name) for these parts, for all where there are none.
///
/// # Errors
/// What is not known, in words.
pub fn set(changes: &[(Option<&str>, &str)]) -> Result<(), String> {
    let log = LOG
        .get()
        .ok_or("the log belongs to the program around the proxy")?;
    let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
    let (mut base, mut apart) = (log.base.clone(), log.apart.clone());
    for (name, level) in changes {
        let level = LEVELS.iter().find(|(envoys, _)| envoys == level);
        let level = level.map(|(_, ours)| *ours).ok_or("unknown logger level")?;
        match name {
            None => {
                level.clone_into(&mut base);
                apart.clear();
            }
            Some(name) => {
                let known = LOGGERS
                    .iter()
                    .find(|known| *known == name)
                    .ok_or("unknown logger name")?;
                apart.insert(known, level);
            }
        }
    }
    let mut filter = base.clone();
    for (name, level) in &apart {
        let target = if *name == "xds" {
            "dpumesh_xds".to_owned()
        } else {
            format!("dpumesh_proxy::{name}")
        };
        filter.push_str(&format!(",{target}={level}"));
    }
    let filter = EnvFilter::try_new(filter).map_err(|error| error.to_string())?;
    if !(log.reload)(filter) {
        return Err("the log is gone".to_owned());
    }
    (log.base, log.apart) = (base, apart);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    /// One test, as there is one log.
    #[test]
    fn levels_are_set_for_all_or_apart_and_bad_ones_not_at_all() {
        assert_eq!(list(), None);
        let error = set(&[(None, "debug")]).unwrap_err();
        assert!(error.contains("the program around"), "{error}");
        let filter = Arc::new(Mutex::new(String::new()));
        let seen = Arc::clone(&filter);
        begin(
            "info",
            Box::new(move |filter| {
                *seen.lock().unwrap() = filter.to_string();
                true
            }),
        );
        let level = |name: &str| {
            let all = list().unwrap();
            all.into_iter().find(|(n, _)| *n == name).unwrap().1
        };
        assert_eq!(level("tls"), "info");
        set(&[(Some("tls"), "trace"), (Some("xds"), "warning")]).unwrap();
        assert_eq!((level("tls"), level("tcp")), ("trace".into(), "info".into()));
        let parts = filter.lock().unwrap().clone();
        for part in ["info", "dpumesh_proxy::tls=trace", "dpumesh_xds=warn"] {
            assert!(parts.split(',').any(|p| p == part), "{part}: {parts}");
        }
        for bad in [(Some("nobody"), "info"), (Some("tls"), "loud"), (None, "")] {
            assert!(set(&[(Some("tcp"), "off"), bad]).is_err());
        }
        assert_eq!(level("tcp"), "info", "all of it or nothing");
        set(&[(None, "error")]).unwrap();
        assert_eq!((level("tls"), level("tcp")), ("error".into(), "error".into()));
    }
}
