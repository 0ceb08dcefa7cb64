//! The Container Network Interface, versions 1.0.0 and 1.1.0: what a runtime says to a plugin and what it is answered.
//!
//! ```text
//! environment  CNI_COMMAND CNI_CONTAINERID CNI_NETNS CNI_IFNAME CNI_ARGS CNI_PATH   ─► [`Environment`]
//! stdin        the plugin's configuration, runtimeConfig, prevResult                ─► [`NetConf`]
//! stdout       a result ([`AddResult`], [`versions`]), nothing, or an error ([`Error`]); nothing else, ever
//! ```
//! Runtimes differ, so reading is tolerant: unknown fields, unknown `CNI_ARGS` in any order, a DEL without namespace and
//! without previous result. Writing is strict. The specification: <https://github.com/containernetworking/cni>, SPEC.md.

mod args;
mod conf;
mod environment;
mod error;
mod result;

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

pub use args::Args;
pub use conf::{ConfRoute, IpamConf, NetConf, RuntimeConfig, ValidAttachment};
pub use environment::{Environment, Verb};
pub use error::{Error, code};
pub use result::{AddResult, AssignedIp, Interface, Route};

/// A version of the specification that is spoken here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Version {
    /// 1.0.0
    #[serde(rename = "1.0.0")]
    V1_0,
    /// 1.1.0: STATUS, GC, `pciID` and `mtu` of interfaces.
    #[serde(rename = "1.1.0")]
    V1_1,
}

impl Version {
    /// All of them, oldest first.
    pub const ALL: [Self; 2] = [Self::V1_0, Self::V1_1];
    /// The newest, in which errors are told when the caller's version is not known.
    pub const NEWEST: Self = Self::V1_1;

    /// As it is written.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::V1_0 => "1.0.0",
            Self::V1_1 => "1.1.0",
        }
    }

    /// The version called `text`.
    ///
    /// # Errors
    /// [`code::VERSION`], with those that are spoken.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let known = Self::ALL.into_iter().find(|version| version.as_str() == text);
        known.ok_or_else(|| {
            Error::new(code::VERSION, format!("cniVersion {text:?} is not supported"))
                .details("write \"1.0.0\" or \"1.1.0\" into the network's configuration")
        })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The answer to VERSION.
pub fn versions() -> Value {
    json!({ "cniVersion": Version::NEWEST, "supportedVersions": Version::ALL })
}

/// A container or network name: `[a-zA-Z0-9][a-zA-Z0-9_.-]*`. It becomes part of file names, so nothing else will do.
pub(crate) fn is_name(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_alphanumeric())
        && text
            .bytes()
            .all(|octet| octet.is_ascii_alphanumeric() || b"_.-".contains(&octet))
}

/// An interface name: 1 to 15 octets, no path, no `:`, no space.
pub(crate) fn is_ifname(text: &str) -> bool {
    (1..=15).contains(&text.len())
        && !matches!(text, "." | "..")
        && text
            .bytes()
            .all(|octet| octet.is_ascii_graphic() && octet != b'/' && octet != b':')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_to_version_names_both() {
        assert_eq!(
            versions().to_string(),
            r#"{"cniVersion":"1.1.0","supportedVersions":["1.0.0","1.1.0"]}"#
        );
    }

    #[test]
    fn a_version_that_is_not_spoken_is_error_1() {
        for text in ["", "0.3.1", "0.4.0", "1.3.0", "2"] {
            let error = Version::parse(text).expect_err("not spoken");
            assert_eq!(error.code, code::VERSION);
            assert!(error.msg.contains(text));
        }
        assert_eq!(Version::parse("1.1.0"), Ok(Version::V1_1));
    }

    #[test]
    fn names_cannot_leave_their_folder() {
        for bad in ["", ".", "..", "../x", "a/b", "-a", "a b", "é"] {
            assert!(!is_name(bad), "{bad}");
        }
        assert!(is_name("0a_b.c-d"));
        for bad in ["", ".", "..", "a/b", "a:b", "a b", "sixteen-octets-x"] {
            assert!(!is_ifname(bad), "{bad}");
        }
        assert!(is_ifname("eth0"));
    }
}
