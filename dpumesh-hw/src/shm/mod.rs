//! Shared memory between two processes that do not trust each other: sealed regions, descriptors passed over a unix
//! socket, and [`Channel`], two [rings](crate::ring) with doorbells. There are no names in `/dev/shm` and nothing to
//! clean up: memory, doorbells and socket go with the processes that hold them.
//!
//! * [`region`]: a memfd whose size is sealed, mapped, reached by offsets only;
//! * [`doorbell`]: the eventfd that wakes a sleeping peer;
//! * [`socket`]: bounded messages and descriptors over `SOCK_SEQPACKET`;
//! * [`handshake`]: versions, limits, the offer and its checks;
//! * [`channel`]: what a dataplane or a proxy holds;
//! * [`listener`]: a path to connect to;
//! * [`transport`]: all of it as [`ShmTransport`](dpumesh_core::ShmTransport), with names for paths.
//!
//! The tests of one process (`ring`, and all of `shm` but `tests::two_processes` and `tests::hostile`, whose races are
//! the point) also run under valgrind, which finds no bad access and no leak.
//!
//! ```
//! use dpumesh_hw::{ring::Mode, shm::{Channel, Options}};
//!
//! let options = Options { mode: Mode::Messages { max_len: 2048 }, ring_bytes: 64 * 1024, ..Options::default() };
//! let (mut dataplane, mut proxy) = Channel::pair(&options)?;
//! assert_eq!(dataplane.send(&[b"first", b"second"])?, 2);
//!
//! let mut slots = vec![Vec::new(); 32];
//! assert_eq!(proxy.recv(&mut slots)?, 2);
//! assert_eq!(slots[1], b"second");
//! # Ok::<(), dpumesh_hw::shm::ShmError>(())
//! ```

pub mod channel;
pub mod doorbell;
mod error;
pub mod handshake;
pub mod listener;
pub mod region;
pub mod socket;
#[cfg(test)]
mod tests;
pub mod transport;

pub use channel::{Channel, ChannelStats, Interest};
pub use error::{Refusal, ShmError};
pub use handshake::{Limits, Options};
pub use listener::{Incoming, Listener, connect};
pub use region::{Region, sealed_memory};
pub use transport::SocketTransport;
