//! [`NpOffload`]: what the card's network processor carries beyond steering rules.
//!
//! Three things: **programs** in slots (loaded beside the running one, activated, drained, rolled back), their **tables**,
//! and single **connections** that the proxy no longer needs to see. A card without such a processor has no `NpOffload`.
//!
//! # Life of a program
//! 1. `load` puts an image into a free slot; the running program is not touched.
//! 2. `activate` makes it the running one; the former stays in its slot, draining.
//! 3. `activate` of the former slot rolls back; `unload` frees a slot that does not run.

use std::fmt;
use std::net::SocketAddr;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::backend::Fence;
use crate::error::{Error, Result};
use crate::port::PortRef;

/// The network processor of one card.
///
/// Safe to call concurrently. No call blocks the calling thread. Unless a method says otherwise, cancelling it
/// leaves either the state before or the state after.
#[async_trait]
pub trait NpOffload: Send + Sync + fmt::Debug {
    /// Lists the program slots in order. Read-only.
    ///
    /// # Errors
    /// `DeviceLost`, `Io`.
    async fn programs(&self) -> Result<Vec<ProgramInfo>>;

    /// Loads an image into a free slot.
    ///
    /// The hash of what arrived is compared with [`Program::hash`] before anything runs. Loading the same program into
    /// the same slot again succeeds.
    ///
    /// # Errors
    /// `Busy` (slot in use), `NotFound` (slot), `CapacityExceeded` (`offload.max_image`), `Invalid` (`hash` differs, image
    /// refused), `Stale`, `DeviceLost`.
    async fn load(&self, fence: Fence, slot: Slot, program: &Program) -> Result<ProgramInfo>;

    /// Makes a loaded program the running one; frames meet the old or the new one, never a mixture.
    ///
    /// # Errors
    /// `NotFound` (nothing loaded there), `Stale`, `DeviceLost`, `Fault` with the old program still running.
    async fn activate(&self, fence: Fence, slot: Slot) -> Result<()>;

    /// Empties a slot. Idempotent.
    ///
    /// # Errors
    /// `Busy` (it runs), `NotFound` (slot), `Stale`, `DeviceLost`.
    async fn unload(&self, fence: Fence, slot: Slot) -> Result<()>;

    /// Lists the tables of the running program. Read-only.
    ///
    /// # Errors
    /// `DeviceLost`, `Io`.
    async fn tables(&self) -> Result<Vec<TableInfo>>;

    /// Writes entries, in order, continuing past failures; one result per entry.
    ///
    /// Cancelling may leave any prefix written; writing again is safe (`Put` replaces, `Delete` of nothing succeeds).
    ///
    /// # Errors
    /// As a whole: `NotFound` (table), `Stale`, `DeviceLost`. Per entry: `Invalid` (key or value length),
    /// `CapacityExceeded`, `Unsupported` (mask in an exact table).
    async fn write(
        &self,
        fence: Fence,
        table: TableId,
        entries: &[TableWrite],
    ) -> Result<Vec<Result<(), Error>>>;

    /// Reads every entry of a table, in key order. Read-only.
    ///
    /// # Errors
    /// `NotFound`, `DeviceLost`, `Io`.
    async fn read(&self, table: TableId) -> Result<Vec<TableEntry>>;

    /// Hands an established connection to the NP.
    ///
    /// When the future is ready the NP carries it, until it ends, [`NpOffload::resume`] takes it back, or the epoch changes:
    /// then it is lost and both peers must be reset. Offloading is never a condition for correctness: a refusal means
    /// that the proxy carries on.
    ///
    /// # Errors
    /// `Unsupported` (kind), `CapacityExceeded` (`offload.connections`), `Exists`, `NotFound` (port), `Stale`, `DeviceLost`.
    async fn offload_connection(&self, fence: Fence, connection: &Connection) -> Result<ConnectionToken>;

    /// Takes a connection back with its final state. A token is good once.
    ///
    /// # Errors
    /// `NotFound` (ended or taken back already), `Stale`, `DeviceLost`.
    async fn resume(&self, fence: Fence, token: ConnectionToken) -> Result<ConnectionState>;

    /// Numbers of the processor as a whole. Read-only.
    ///
    /// # Errors
    /// `DeviceLost`, `Io`.
    async fn stats(&self) -> Result<OffloadStats>;
}

/// A program slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Slot(pub u32);

/// A program for the network processor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// Its name.
    pub name: String,
    /// Its version, for people.
    pub version: String,
    /// Digest of the image that the backend will compute over what arrives: the identity of the program.
    pub hash: ProgramHash,
    /// The image in the vendor's format.
    pub image: Vec<u8>,
}

/// Digest of a program image, by the algorithm that the backend documents.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProgramHash(pub Vec<u8>);

/// What a slot holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgramInfo {
    /// Which slot.
    pub slot: Slot,
    /// The program's name, version and hash; `None` for an empty slot.
    pub program: Option<(String, String, ProgramHash)>,
    /// What it is doing.
    pub state: ProgramState,
}

/// State of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ProgramState {
    /// Empty.
    Empty,
    /// Loaded, not running.
    Loaded,
    /// Running.
    Running,
    /// No longer running, still finishing its connections.
    Draining,
}

/// Number of a table of the running program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TableId(pub u32);

/// A table of the running program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableInfo {
    /// Its number.
    pub id: TableId,
    /// Its name.
    pub name: String,
    /// How keys are matched.
    pub kind: TableKind,
    /// Length of a key in octets.
    pub key_len: u16,
    /// Length of a value in octets.
    pub value_len: u16,
    /// Entries in use.
    pub used: u64,
    /// Entries it can hold.
    pub capacity: u64,
}

/// How a table matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum TableKind {
    /// Whole keys.
    Exact,
    /// Keys are indices.
    Array,
    /// Longest prefix.
    Lpm,
    /// Masked keys with priorities.
    Ternary,
    /// Read-only counts.
    Counter,
    /// Meters.
    Meter,
}

/// An entry of a table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableEntry {
    /// The key, in network order.
    pub key: Vec<u8>,
    /// Which bits of the key count; `None` for all.
    pub mask: Option<Vec<u8>>,
    /// Lower numbers win, in ternary tables.
    pub priority: u32,
    /// The value.
    pub value: Vec<u8>,
}

/// A write to a table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TableWrite {
    /// Adds the entry or replaces the one with the same key, mask and priority.
    Put(TableEntry),
    /// Removes the entry with this key, mask and priority; its value is not looked at.
    Delete(TableEntry),
}

/// An established connection pair: what the proxy would otherwise copy from one to the other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connection {
    /// The leg to the client.
    pub downstream: ConnectionLeg,
    /// The leg to the server.
    pub upstream: ConnectionLeg,
    /// What the NP has to do.
    pub kind: ConnectionKind,
}

/// One TCP connection as the proxy's stack sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionLeg {
    /// Port of the card its frames use.
    pub port: PortRef,
    /// The proxy's end.
    pub local: SocketAddr,
    /// The peer's end.
    pub remote: SocketAddr,
    /// Next sequence number to send.
    pub send_next: u32,
    /// Next sequence number to receive.
    pub receive_next: u32,
}

/// What the NP does for a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ConnectionKind {
    /// Passes octets on, rewriting sequence numbers.
    Splice,
    /// Splice with TLS records sealed and opened on the card.
    TlsRecords,
    /// Splice with a header rewrite.
    Rewrite,
}

/// Token of an offloaded connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ConnectionToken(pub u64);

/// State of a connection taken back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionState {
    /// Where both legs stand.
    pub connection: Connection,
    /// Octets that the NP passed from client to server.
    pub octets_up: u64,
    /// Octets that the NP passed from server to client.
    pub octets_down: u64,
}

/// Numbers of the network processor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OffloadStats {
    /// Connections carried now.
    pub connections: u64,
    /// Connections ever taken.
    pub connections_total: u64,
    /// Table entries in use.
    pub entries: u64,
}
