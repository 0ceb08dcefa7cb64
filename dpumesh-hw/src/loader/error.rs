//! Why a library was not loaded: one named reason each, so that an operator and a vendor know what to change.

use std::path::PathBuf;
use std::time::Duration;

use dpumesh_core::Missing;

use crate::trust::Untrusted;

/// A library that was refused.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The manifest cannot be read or makes no sense.
    #[error("manifest {}: {reason}", path.display())]
    Manifest {
        /// Its file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The file must not be loaded: its path is not absolute, or others than root and this user could have changed it.
    #[error(transparent)]
    Untrusted(#[from] Untrusted),
    /// The dynamic linker refused it.
    #[error("{}: cannot be loaded: {reason}", path.display())]
    Linker {
        /// The library.
        path: PathBuf,
        /// What the linker said.
        reason: String,
    },
    /// It is no backend.
    #[error("{}: has no symbol `{symbol}`: not a dpumesh backend, or one of another major version", path.display())]
    NoSymbol {
        /// The library.
        path: PathBuf,
        /// What was looked for.
        symbol: &'static str,
    },
    /// It was built for another major version of the interface.
    #[error("the library speaks version {theirs} of the interface, this program version {ours}")]
    Major {
        /// The library's.
        theirs: u32,
        /// Ours.
        ours: u32,
    },
    /// Its table is shorter than that of version 1.0.
    #[error("the library's table has {size} octets, version 1.0 has {least}: built against a broken header")]
    ShortTable {
        /// Octets it has.
        size: u32,
        /// Octets it needs.
        least: u32,
    },
    /// A function that every library must have is null.
    #[error("the library's table has no `{function}`")]
    NullFunction {
        /// Its name.
        function: &'static str,
    },
    /// A part has some of its functions and not others.
    #[error(
        "the library's table has functions of the part `{part}`, but not `{function}`: a part is there or not"
    )]
    HalfPart {
        /// Which part.
        part: &'static str,
        /// What it lacks.
        function: &'static str,
    },
    /// Something it wrote breaks the interface: a wrong size, an enumeration's number that means nothing, a text without an
    /// end.
    #[error("the library broke the interface in `{function}`: {reason}")]
    Broken {
        /// Which function.
        function: &'static str,
        /// How.
        reason: String,
    },
    /// A function did not return.
    #[error("the library has not returned from `{function}` for {after:?}")]
    Hangs {
        /// Which function.
        function: &'static str,
        /// How long it was waited for.
        after: Duration,
    },
    /// Its capabilities contradict themselves or its table.
    #[error("the library's capabilities cannot be true: {reason}")]
    Lies {
        /// How.
        reason: String,
    },
    /// It lacks what the manifest requires.
    #[error("the card lacks what is required: {}", list(.0))]
    Lacks(Vec<Missing>),
    /// It could not open the card.
    #[error("{0}")]
    Backend(dpumesh_core::Error),
    /// This process could not do its part.
    #[error("{what}: {reason}")]
    Process {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        reason: String,
    },
}

fn list(missing: &[Missing]) -> String {
    missing
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join("; ")
}
