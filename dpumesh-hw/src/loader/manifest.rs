//! [`Manifest`]: which library to load, how far to trust it, what it must be able to do.
//!
//! ```toml
//! library = "/usr/lib/dpumesh/libvendor.so"
//! deadline_ms = 30000
//! calls = "guarded"            # or "inline"
//!
//! [config]                     # handed to the library as JSON
//! device = "0000:3b:00.0"
//!
//! [required.steering]          # as `Capabilities`; numbers are the least, sets must be contained
//! rules = 1000
//! actions = "DROP | FORWARD | PUNT"
//! ```
//!
//! A library runs with all rights of this process. So its path is absolute (no search path decides what is loaded), and it, the
//! manifest and every folder above them belong to root or to the user running, and nobody else can write there.

use std::path::{Path, PathBuf};
use std::time::Duration;

use dpumesh_core::Capabilities;
use serde::Deserialize;

use super::LoadError;
use crate::trust;

/// How calls reach a library.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Calls {
    /// By a thread of the library's own: the caller of a control call is free again after the deadline, whatever the library
    /// does. Costs two wake-ups per control call; frames and quick calls do not go this way.
    #[default]
    Guarded,
    /// On the caller's thread: for a library that is trusted to keep its promise not to block. It must say
    /// `DM_THREAD_SAFE`. A caller whose call never returns is lost; the others learn of it.
    Inline,
}

/// Which library to load, and on what conditions.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Manifest {
    /// Absolute path.
    pub library: PathBuf,
    /// How long a call may take, in milliseconds. One that has not returned by then, on whichever thread, fails the card:
    /// health says so, and everything is refused until that call returns.
    #[serde(default = "thirty_seconds")]
    pub deadline_ms: u64,
    /// How calls reach it.
    #[serde(default)]
    pub calls: Calls,
    /// The library's own configuration; it gets it as JSON.
    #[serde(default = "nothing")]
    pub config: serde_json::Value,
    /// The least that its card must be able to do.
    #[serde(default)]
    pub required: Capabilities,
}

fn thirty_seconds() -> u64 {
    30_000
}

fn nothing() -> serde_json::Value {
    serde_json::Value::Object(serde_json::Map::default())
}

impl Manifest {
    /// A library with an empty configuration, of which nothing is required.
    pub fn of(library: impl Into<PathBuf>) -> Self {
        Self {
            library: library.into(),
            deadline_ms: thirty_seconds(),
            calls: Calls::default(),
            config: nothing(),
            required: Capabilities::default(),
        }
    }

    /// Reads a manifest from a file that only root or this user can have written.
    ///
    /// # Errors
    /// [`LoadError::Untrusted`], see [`trust::real_path`]; [`LoadError::Manifest`].
    pub fn read(path: impl AsRef<Path>) -> Result<Self, LoadError> {
        let path = path.as_ref();
        let refuse = |reason: String| LoadError::Manifest {
            path: path.to_owned(),
            reason,
        };
        let path = trust::real_path(path)?;
        let text = std::fs::read_to_string(&path).map_err(|error| refuse(error.to_string()))?;
        toml::from_str(&text).map_err(|error| refuse(error.to_string().trim_end().to_owned()))
    }

    /// With a configuration.
    pub fn with_config(mut self, config: serde_json::Value) -> Self {
        self.config = config;
        self
    }

    /// With calls that come this way.
    pub fn with_calls(mut self, calls: Calls) -> Self {
        self.calls = calls;
        self
    }

    /// With another deadline.
    pub fn with_deadline(mut self, deadline: Duration) -> Self {
        self.deadline_ms = deadline.as_millis().try_into().unwrap_or(u64::MAX);
        self
    }

    /// With the least that the card must be able to do.
    pub fn requiring(mut self, required: Capabilities) -> Self {
        self.required = required;
        self
    }

    pub(super) fn deadline(&self) -> Duration {
        Duration::from_millis(self.deadline_ms.max(1))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use dpumesh_core::ActionKinds;

    use super::*;

    fn file(folder: &Path, name: &str, text: &str, mode: u32) -> PathBuf {
        let path = folder.join(name);
        std::fs::write(&path, text).expect("written");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("mode set");
        path
    }

    #[test]
    fn a_manifest_says_what_to_load_and_what_it_must_do() {
        let folder = tempfile::tempdir().expect("a folder");
        let text = "library = \"/usr/lib/x.so\"\ncalls = \"inline\"\n[config]\ndevice = \"0000:3b:00.0\"\n\
                    [required.steering]\nrules = 1000\nactions = \"DROP | PUNT\"\n";
        let manifest = Manifest::read(file(folder.path(), "good.toml", text, 0o644)).expect("a manifest");
        assert_eq!(manifest.library, Path::new("/usr/lib/x.so"));
        assert_eq!((manifest.calls, manifest.deadline_ms), (Calls::Inline, 30_000));
        assert_eq!(manifest.config["device"], "0000:3b:00.0");
        let required = &manifest.required.steering;
        assert_eq!(
            (required.rules, required.actions),
            (1000, ActionKinds::DROP | ActionKinds::PUNT)
        );
    }

    #[test]
    fn unknown_keys_and_missing_ones_are_named() {
        let folder = tempfile::tempdir().expect("a folder");
        for (text, names) in [
            ("library = \"/x\"\nmoon = 1\n", "moon"),
            ("calls = \"inline\"\n", "library"),
            ("library = \"/x\"\ncalls = \"sometimes\"\n", "sometimes"),
        ] {
            let error = Manifest::read(file(folder.path(), "bad.toml", text, 0o644)).expect_err(names);
            assert!(error.to_string().contains(names), "{error}");
        }
    }
}
