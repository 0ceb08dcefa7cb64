//! The node agent: who on this host has which VF, and what the dataplane shall do about it.
//!
//! ```text
//! plugin ─ socket ─► [`Node`] ─┬─ journal     every attachment, written down before it is touched
//!                              ├─ VfAllocator  the host's half of a lease; the VF into the pod and back
//!                              ├─ [`Governor`] is the pod's program acknowledged?
//!                              └─ dataplane    over the channel: ports open and closed, rules by difference
//! ```
//!
//! # Life of an attachment
//! | stage | written when | means | after a restart of the agent |
//! |---|---|---|---|
//! | begun | before a VF is leased | somebody is adding a pod | taken back |
//! | attached | the VF is in the pod | not in the dataplane: nothing passes | taken back |
//! | bound | the plugin told the addresses | the port is open; **closed by rules** until governed | replayed |
//! | closing | before anything is undone | the port closes, then the VF goes home, then it is free | carried on |
//!
//! A VF is free for the next pod only after the dataplane has closed the port: a dataplane that lives but cannot be reached
//! would take the next pod for the last. DEL succeeds all the same; the rest is done when the dataplane is back.
//!
//! The dataplane is told by **difference**: what it shall be follows from the journal and the peers alone, so a bind, a
//! detach, a changed peer, a restart of either side are one and the same operation ([`Node::reconcile`]).
//!
//! # What no runtime does
//! Runtimes of cniVersion up to 1.0 never ask for garbage collection, and a DEL may never come. So the agent looks itself
//! for namespaces that are gone, and for notes that the plugin left while nobody answered.

mod adapter;
mod attachments;
mod dataplane;
mod governor;
mod journal;
mod peers;
mod program;
mod socket;
mod sweep;

pub use adapter::Adapter;
pub use attachments::{Node, NodeOptions, Ungoverned};
pub use dataplane::{DataplaneAddress, keep_connected};
pub use governor::{GovernedPod, Governor, GovernorError, Immediate};
pub use journal::{Journal, JournalError, Record, Stage};
pub use peers::{LocalNetwork, PeerNode, PeerPod, Peers, PeersError, watch_peers};
pub use program::{Args, Error, run};
pub use socket::{AgentSocket, SocketError};
