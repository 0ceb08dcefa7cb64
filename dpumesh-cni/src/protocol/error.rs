//! [`Error`]: how a plugin fails. It goes to standard output as JSON, and the exit status is not 0.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Version;

/// Numbers of the specification.
pub mod code {
    /// The version is not spoken.
    pub const VERSION: u32 = 1;
    /// A field of the configuration is not supported.
    pub const UNSUPPORTED: u32 = 2;
    /// The container is unknown or gone.
    pub const UNKNOWN_CONTAINER: u32 = 3;
    /// A variable of the environment is missing or wrong.
    pub const ENVIRONMENT: u32 = 4;
    /// Reading or writing failed.
    pub const IO: u32 = 5;
    /// What was read is no JSON of the expected form.
    pub const DECODE: u32 = 6;
    /// The network's configuration is wrong.
    pub const CONFIG: u32 = 7;
    /// Try again later.
    pub const TRY_AGAIN: u32 = 11;
    /// STATUS: ADD cannot be served.
    pub const NOT_AVAILABLE: u32 = 50;
    /// STATUS: ADD cannot be served, and pods that are there may have trouble.
    pub const NOT_AVAILABLE_LIMITED: u32 = 51;
    /// Ours: the node agent refused.
    pub const AGENT: u32 = 100;
    /// Ours: CHECK found the attachment other than it was made.
    pub const CHANGED: u32 = 101;
    /// Ours: interface, address or route in the pod could not be set.
    pub const NETWORK: u32 = 102;
}

/// Why a plugin failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Error {
    /// One of [`code`], or a delegated plugin's own.
    pub code: u32,
    /// What went wrong.
    #[serde(default)]
    pub msg: String,
    /// What to do about it, or what else is known.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub details: String,
}

impl Error {
    /// An error without details.
    pub fn new(code: u32, msg: impl Into<String>) -> Self {
        Self {
            code,
            msg: msg.into(),
            details: String::new(),
        }
    }

    /// Adds details, behind those that there are.
    #[must_use]
    pub fn details(mut self, details: impl fmt::Display) -> Self {
        if !self.details.is_empty() {
            self.details.push_str("; ");
        }
        self.details.push_str(&details.to_string());
        self
    }

    /// As it is written to standard output.
    pub fn to_json(&self, version: Version) -> Value {
        json!({ "cniVersion": version, "code": self.code, "msg": self.msg, "details": self.details })
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.msg)?;
        if !self.details.is_empty() {
            write!(f, " ({})", self.details)?;
        }
        write!(f, " [code {}]", self.code)
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_json_with_code_msg_and_details() {
        let error = Error::new(code::TRY_AGAIN, "no agent")
            .details("start it")
            .details("then retry");
        assert_eq!(
            error.to_json(Version::V1_0).to_string(),
            r#"{"cniVersion":"1.0.0","code":11,"details":"start it; then retry","msg":"no agent"}"#
        );
    }

    #[test]
    fn another_plugins_error_is_read_whatever_else_it_says() {
        let text = r#"{"cniVersion":"1.0.0","code":999,"msg":"full","moon":1}"#;
        let error: Error = serde_json::from_str(text).expect("read");
        assert_eq!(
            (error.code, error.msg.as_str(), error.details.as_str()),
            (999, "full", "")
        );
    }
}
