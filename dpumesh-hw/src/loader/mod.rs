//! Backends in foreign libraries: the C interface, its loader, and the way to export a backend of ours.
//!
//! ```text
//! Manifest ─► Library::load ─► table checked ─► Library::connect ─► Arc<dyn Backend>
//!                 │ dlopen                           │ open
//!                 ▼                                  ▼
//!        dpumesh_backend_v1 ──── dm_ops ───── handle ──► vendor's C, or export_backend! around any Backend
//! ```
//!
//! The interface is `include/dpumesh.h`, made from [`abi`]. One versioned symbol gives a table of functions that begins with
//! its size and version; later versions only append. Every struct begins with its size, but for few that are frozen. All
//! memory is the caller's; nothing is allocated on one side and freed on the other. Nothing unwinds across: an exported
//! backend's panic is a `Fault` with effect unknown. Errors say kind, effect, retry advice, object, vendor code and a bounded
//! message. A call that takes time is pending: its end comes by `poll`, and one descriptor tells of ends and events.
//!
//! The loader trusts a library with the process, since it runs in it, but not with its answers: each size, number, text and
//! pointer is checked, and what makes no sense is an error that names it ([`LoadError`], or `Abi` later).
//!
//! # What does not cross
//! [`dpumesh_core::ShmTransport`]: its channels are memory shared with another process, set up over sockets, and every call
//! writes there by callbacks. That is software of the host (`crate::shm`), the same for every card; a vendor has
//! nothing to add. A backend that has channels is exported without them.
//!
//! # In another process
//! is possible with the same operations, and not built: the module `driver` tells how.
//!
//! ```no_run
//! use dpumesh_hw::loader::{Library, Manifest};
//!
//! let backend = Library::open(&Manifest::read("/etc/dpumesh/backends/vendor.toml")?)?;
//! println!("{}", backend.info().name);
//! # Ok::<(), dpumesh_hw::loader::LoadError>(())
//! ```

pub mod abi;
mod arena;
mod codec;
mod driver;
mod error;
pub mod export;
mod foreign;
mod hooks;
mod library;
mod manifest;
mod watch;

pub use error::LoadError;
pub use hooks::Hooks;
pub use library::Library;
pub use manifest::{Calls, Manifest};
