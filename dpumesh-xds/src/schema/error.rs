//! Why a configuration was refused: which file, which resource, which field, what is wrong with it.

use std::fmt;
use std::path::PathBuf;

/// A refused configuration. Nothing of it took effect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    /// The file the configuration was read from, if it came from one.
    pub file: Option<PathBuf>,
    /// The xDS resource (`listener "web"`), if the fault lies in a named resource.
    pub resource: Option<String>,
    /// The full field path in proto field names, list indices in brackets; empty for the file as a whole.
    pub path: String,
    /// What is wrong, in one sentence.
    pub reason: String,
}

impl ConfigError {
    /// A fault at `path`.
    pub fn new(path: impl Into<String>, reason: impl Into<String>) -> Self {
        Self {
            file: None,
            resource: None,
            path: path.into(),
            reason: reason.into(),
        }
    }

    /// The same fault, said to come from `file` (kept if already known).
    #[must_use]
    pub fn in_file(mut self, file: impl Into<PathBuf>) -> Self {
        self.file.get_or_insert_with(|| file.into());
        self
    }

    /// The same fault, said to lie in `resource` (kept if already known).
    #[must_use]
    pub fn in_resource(mut self, resource: impl Into<String>) -> Self {
        self.resource.get_or_insert_with(|| resource.into());
        self
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(file) = &self.file {
            write!(f, "{}: ", file.display())?;
        }
        if let Some(resource) = &self.resource {
            write!(f, "{resource}: ")?;
        }
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.reason)
    }
}

impl std::error::Error for ConfigError {}
