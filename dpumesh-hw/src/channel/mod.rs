//! The channel between host and SoC: how the node agent reaches the dataplane of a card.
//!
//! Host and SoC are two machines. Between them runs gRPC over mutually authenticated TLS 1.3, over whatever carries
//! IP (a management network device, a vendor's comm channel, a veth pair in the emulator). Nothing is shared but
//! this: no file, no socket of the local kind.
//!
//! ```text
//!  agent (host)                                              dpu-dataplane (SoC)
//!  DataplaneClient ── Hello, Attach, Apply, … ── TLS ──► DataplaneServer ─► impl Dataplane
//! ```
//!
//! * **Messages** are the contract's own types as JSON (`application/grpc+json`, which gRPC provides for): one
//!   encoding, readable in a capture, and an unknown field is refused by name instead of dropped.
//! * **Versions**: each call names the version it speaks; `Hello` tells what the other side speaks. A peer without a version,
//!   or with one that is not spoken here, is refused with both numbers.
//! * **Trust** ([`trust`]): one authority per card, made by the operator; the dataplane's certificate names the card, the
//!   agent's names the agent. Who has another certificate, or none, is refused in the handshake; whose certificate has another
//!   name is refused with the name.
//! * **Strangers** may open connections, but few, and a handshake has a deadline; an end that falls silent is noticed within
//!   seconds by HTTP/2 pings, also while nothing is asked.
//! * **Errors** travel whole, with effect and retry advice.
//!
//! # Why not a file or a UNIX socket
//! Because on a real card the two ends have different kernels.
#![forbid(unsafe_code)]

mod client;
mod codec;
mod door;
mod message;
mod server;
pub mod trust;

use std::fmt;

use async_trait::async_trait;
use dpumesh_core::vf::VfLease;
use dpumesh_core::{BackendInfo, Capabilities, Epoch, Fence, FlowSteering, Result};

pub use client::{ConnectError, DataplaneClient, RemoteEvents};
pub use message::{Attachment, Hello, VERSION, VERSION_MIN};
pub use server::{ServeError, serve};

use crate::dataplane::EngineStats;

/// Largest message taken, in octets: a batch or a list of 65,536 rules of some hundred octets each.
const MAX_MESSAGE: usize = 64 << 20;

/// An error and everything below it, in one line.
fn causes(error: &dyn std::error::Error) -> String {
    with_causes(error.to_string(), error)
}

/// A text and everything below the error that it speaks of; what repeats the text before it is left out.
fn with_causes(mut text: String, error: &dyn std::error::Error) -> String {
    for cause in std::iter::successors(error.source(), |error| error.source()) {
        let cause = cause.to_string();
        if !text.ends_with(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    text
}

/// What a dataplane offers its node agent: the card, its steering rules, and which pods' ports are open.
///
/// Calls are safe to make concurrently. State-changing ones carry a fence; after `Stale` or a lost connection the agent reads
/// [`Dataplane::epoch`] again and replays leases and rules, which are all idempotent.
#[async_trait]
pub trait Dataplane: Send + Sync + fmt::Debug {
    /// Who the card is.
    fn info(&self) -> BackendInfo;

    /// What it can do.
    fn capabilities(&self) -> Capabilities;

    /// Its present life; a restarted dataplane begins a new one.
    fn epoch(&self) -> Epoch;

    /// Its steering rules.
    fn steering(&self) -> &dyn FlowSteering;

    /// Opens a pod's port: takes the lease ([`dpumesh_core::VfAllocator::admit`]), gives the port its anti-spoofing policy and starts reading
    /// its frames. Attached means closed: without rules nothing passes. The same attachment again succeeds.
    ///
    /// # Errors
    /// Those of `admit` and of opening the port; `Conflict` when an address is another local pod's.
    async fn attach(&self, fence: Fence, attachment: &Attachment) -> Result<()>;

    /// Closes a pod's port and gives the lease back. Idempotent. Its rules stay until they are removed.
    ///
    /// # Errors
    /// `Stale`, `DeviceLost`.
    async fn detach(&self, fence: Fence, lease: &VfLease) -> Result<()>;

    /// What the dataplane counted since it started.
    ///
    /// # Errors
    /// `DeviceLost`.
    async fn stats(&self) -> Result<EngineStats>;

    /// The card's events from now on.
    fn events(&self) -> Box<dyn dpumesh_core::EventStream>;
}
