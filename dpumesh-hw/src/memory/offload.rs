//! [`NpOffload`]: a network processor that keeps books.
//!
//! Its programs are JSON lists of the tables they declare ([`program`] makes one). The digest of an image is the 64-bit
//! FNV-1a sum of its octets, in network order: it finds a torn image, it does not keep an attacker out. Tables stay with
//! their slot, so a rollback finds its entries.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use dpumesh_core::offload::{
    Connection, ConnectionKind, ConnectionLeg, ConnectionState, ConnectionToken, NpOffload, OffloadStats,
    Program, ProgramHash, ProgramInfo, ProgramState, Slot, TableEntry, TableId, TableInfo, TableKind,
    TableWrite,
};
use dpumesh_core::steering::Occupancy;
use dpumesh_core::{ConnectionKinds, ErrorKind, Fence, OffloadCapabilities, Result};
use serde::{Deserialize, Serialize};

use super::device::{Card, error};

/// A table that a program for the memory backend declares.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TableSpec {
    /// Its name.
    pub name: String,
    /// How it matches.
    pub kind: TableKind,
    /// Length of a key in octets.
    pub key_len: u16,
    /// Length of a value in octets.
    pub value_len: u16,
    /// Entries it can hold.
    pub capacity: u64,
}

/// A program for the memory backend, with these tables; their numbers are their indices.
pub fn program(name: &str, tables: &[TableSpec]) -> Program {
    // Strings, numbers and unit variants only: nothing that JSON could refuse.
    let image = serde_json::to_vec(tables).expect("a list of plain structs serialises");
    Program {
        name: name.to_owned(),
        version: "1".to_owned(),
        hash: digest(&image),
        image,
    }
}

fn digest(image: &[u8]) -> ProgramHash {
    let sum = image.iter().fold(0xcbf2_9ce4_8422_2325_u64, |sum, octet| {
        (sum ^ u64::from(*octet)).wrapping_mul(0x0100_0000_01b3)
    });
    ProgramHash(sum.to_be_bytes().to_vec())
}

/// State of the processor.
#[derive(Debug)]
pub(super) struct Processor {
    slots: Vec<Option<Loaded>>,
    running: Option<usize>,
    connections: BTreeMap<u64, ConnectionState>,
    connections_total: u64,
}

#[derive(Debug)]
struct Loaded {
    program: Program,
    tables: Vec<Table>,
    draining: bool,
}

#[derive(Debug)]
struct Table {
    spec: TableSpec,
    entries: BTreeMap<EntryKey, Vec<u8>>,
}

/// Key, mask and priority of an entry.
type EntryKey = (Vec<u8>, Option<Vec<u8>>, u32);

impl Processor {
    pub(super) fn new(limits: &OffloadCapabilities) -> Self {
        Self {
            slots: (0..limits.slots).map(|_| None).collect(),
            running: None,
            connections: BTreeMap::new(),
            connections_total: 0,
        }
    }

    pub(super) fn occupancy(&self, limits: &OffloadCapabilities) -> Vec<Occupancy> {
        let of = |resource: &str, used, limit| Occupancy {
            resource: resource.to_owned(),
            used,
            limit,
        };
        vec![
            of("offload.entries", self.entries(), limits.entries),
            of(
                "offload.connections",
                self.connections.len() as u64,
                limits.connections,
            ),
        ]
    }

    fn info(&self, index: usize) -> ProgramInfo {
        let loaded = self.slots[index].as_ref();
        let state = match loaded {
            None => ProgramState::Empty,
            Some(_) if self.running == Some(index) => ProgramState::Running,
            Some(loaded) if loaded.draining => ProgramState::Draining,
            Some(_) => ProgramState::Loaded,
        };
        ProgramInfo {
            slot: Slot(index as u32),
            program: loaded
                .map(|Loaded { program: p, .. }| (p.name.clone(), p.version.clone(), p.hash.clone())),
            state,
        }
    }

    fn slot(&self, operation: &'static str, slot: Slot) -> Result<usize> {
        let index = slot.0 as usize;
        if index < self.slots.len() {
            return Ok(index);
        }
        Err(error(ErrorKind::NotFound, operation, "there is no such slot").object(slot.0))
    }

    fn entries(&self) -> u64 {
        let tables = self.slots.iter().flatten().flat_map(|loaded| &loaded.tables);
        tables.map(|table| table.entries.len() as u64).sum()
    }

    fn tables(&self) -> &[Table] {
        let running = self.running.and_then(|index| self.slots[index].as_ref());
        running.map_or(&[], |loaded| &loaded.tables)
    }

    fn table(&self, operation: &'static str, id: TableId) -> Result<&Table> {
        self.tables().get(id.0 as usize).ok_or_else(|| {
            error(
                ErrorKind::NotFound,
                operation,
                "the running program has no such table",
            )
        })
    }

    fn table_mut(&mut self, id: TableId) -> Option<&mut Table> {
        let loaded = self.slots.get_mut(self.running?)?.as_mut()?;
        loaded.tables.get_mut(id.0 as usize)
    }

    fn write(
        &mut self,
        limits: &OffloadCapabilities,
        id: TableId,
        index: usize,
        write: &TableWrite,
    ) -> Result<()> {
        let entries = self.entries();
        let Some(table) = self.table_mut(id) else {
            return Ok(()); // its presence was checked before the first entry
        };
        let (TableWrite::Put(entry) | TableWrite::Delete(entry)) = write;
        table
            .check(entry, matches!(write, TableWrite::Put(_)))
            .map_err(|e| e.index(index))?;
        let key = (entry.key.clone(), entry.mask.clone(), entry.priority);
        if let TableWrite::Delete(_) = write {
            table.entries.remove(&key);
            return Ok(());
        }
        if !table.entries.contains_key(&key) {
            let used = table.entries.len() as u64;
            let full = |name: &str, used: u64, limit: u64| {
                let message = format!("{name} is full: {used} of {limit}");
                Err(error(ErrorKind::CapacityExceeded, WRITE, message)
                    .object(name)
                    .index(index))
            };
            if used >= table.spec.capacity {
                return full(&table.spec.name, used, table.spec.capacity);
            }
            if entries >= limits.entries {
                return full("offload.entries", entries, limits.entries);
            }
        }
        table.entries.insert(key, entry.value.clone());
        Ok(())
    }
}

const WRITE: &str = "offload.write";

impl Table {
    fn check(&self, entry: &TableEntry, is_put: bool) -> Result<()> {
        let refuse =
            |kind, field: &'static str, message: String| Err(error(kind, WRITE, message).field(field));
        let spec = &self.spec;
        if spec.kind == TableKind::Counter {
            let message = "the entries of a counter table are its own".to_owned();
            return refuse(ErrorKind::Unsupported, "table", message);
        }
        let key_len = usize::from(spec.key_len);
        if entry.key.len() != key_len {
            let message = format!("is {} octets, the table's keys are {key_len}", entry.key.len());
            return refuse(ErrorKind::Invalid, "key", message);
        }
        if is_put && entry.value.len() != usize::from(spec.value_len) {
            let message = format!("is {} octets, not {}", entry.value.len(), spec.value_len);
            return refuse(ErrorKind::Invalid, "value", message);
        }
        if spec.kind == TableKind::Array && array_index(&entry.key) >= u128::from(spec.capacity) {
            let message = format!("is beyond the {} entries of the array", spec.capacity);
            return refuse(ErrorKind::Invalid, "key", message);
        }
        let Some(mask) = &entry.mask else { return Ok(()) };
        match spec.kind {
            TableKind::Lpm | TableKind::Ternary if mask.len() != key_len => {
                refuse(ErrorKind::Invalid, "mask", "is not as long as the key".to_owned())
            }
            TableKind::Lpm if !is_prefix(mask) => {
                refuse(ErrorKind::Invalid, "mask", "is not a prefix".to_owned())
            }
            TableKind::Lpm | TableKind::Ternary => Ok(()),
            _ => refuse(
                ErrorKind::Unsupported,
                "mask",
                "this table matches whole keys".to_owned(),
            ),
        }
    }
}

/// The key as a number in network order; one too long for a number is beyond any array unless it is zero in front.
fn array_index(key: &[u8]) -> u128 {
    key.iter()
        .try_fold(0_u128, |index, octet| {
            Some(index.checked_mul(256)? | u128::from(*octet))
        })
        .unwrap_or(u128::MAX)
}

fn is_prefix(mask: &[u8]) -> bool {
    let ones: u32 = mask.iter().map(|octet| octet.count_ones()).sum();
    let full = ones as usize / 8;
    mask.iter().take(full).all(|octet| *octet == 0xff)
        && mask
            .get(full)
            .is_none_or(|octet| octet.leading_ones() == ones % 8)
}

/// The network processor of a card in memory.
#[derive(Debug)]
pub(super) struct MemoryOffload(Arc<Card>);

impl MemoryOffload {
    pub(super) fn new(card: Arc<Card>) -> Self {
        Self(card)
    }
}

#[async_trait]
impl NpOffload for MemoryOffload {
    async fn programs(&self) -> Result<Vec<ProgramInfo>> {
        let state = self.0.present("offload.programs")?;
        let processor = &state.processor;
        Ok((0..processor.slots.len()).map(|i| processor.info(i)).collect())
    }

    async fn load(&self, fence: Fence, slot: Slot, program: &Program) -> Result<ProgramInfo> {
        const LOAD: &str = "offload.load";
        let mut state = self.0.fenced(fence, LOAD)?;
        let limits = state.capabilities.offload.clone();
        let index = state.processor.slot(LOAD, slot)?;
        if let Some(there) = &state.processor.slots[index] {
            if there.program == *program {
                return Ok(state.processor.info(index));
            }
            return Err(error(ErrorKind::Busy, LOAD, "the slot holds another program").object(slot.0));
        }
        let tables = read_image(program, &limits)?;
        state.processor.slots[index] = Some(Loaded {
            program: program.clone(),
            tables,
            draining: false,
        });
        Ok(state.processor.info(index))
    }

    async fn activate(&self, fence: Fence, slot: Slot) -> Result<()> {
        const ACTIVATE: &str = "offload.activate";
        let mut state = self.0.fenced(fence, ACTIVATE)?;
        let fails = state.trouble.activation_fails;
        let processor = &mut state.processor;
        let index = processor.slot(ACTIVATE, slot)?;
        let Some(loaded) = &mut processor.slots[index] else {
            return Err(error(ErrorKind::NotFound, ACTIVATE, "nothing is loaded there").object(slot.0));
        };
        if fails {
            return Err(error(ErrorKind::Fault, ACTIVATE, "the program did not start").object(slot.0));
        }
        loaded.draining = false;
        let former = processor.running.replace(index).filter(|former| *former != index);
        if let Some(former) = former.and_then(|former| processor.slots[former].as_mut()) {
            former.draining = true;
        }
        Ok(())
    }

    async fn unload(&self, fence: Fence, slot: Slot) -> Result<()> {
        const UNLOAD: &str = "offload.unload";
        let mut state = self.0.fenced(fence, UNLOAD)?;
        let index = state.processor.slot(UNLOAD, slot)?;
        if state.processor.running == Some(index) {
            return Err(error(ErrorKind::Busy, UNLOAD, "its program runs").object(slot.0));
        }
        state.processor.slots[index] = None;
        self.0.look_at_marks(&mut state);
        Ok(())
    }

    async fn tables(&self) -> Result<Vec<TableInfo>> {
        let state = self.0.present("offload.tables")?;
        let tables = state.processor.tables().iter().zip(0..);
        Ok(tables
            .map(|(table, id)| TableInfo {
                id: TableId(id),
                name: table.spec.name.clone(),
                kind: table.spec.kind,
                key_len: table.spec.key_len,
                value_len: table.spec.value_len,
                used: table.entries.len() as u64,
                capacity: table.spec.capacity,
            })
            .collect())
    }

    async fn write(&self, fence: Fence, table: TableId, entries: &[TableWrite]) -> Result<Vec<Result<()>>> {
        let mut state = self.0.fenced(fence, WRITE)?;
        state.processor.table(WRITE, table)?;
        let limits = state.capabilities.offload.clone();
        let results = entries
            .iter()
            .enumerate()
            .map(|(index, write)| state.processor.write(&limits, table, index, write))
            .collect();
        self.0.look_at_marks(&mut state);
        Ok(results)
    }

    async fn read(&self, table: TableId) -> Result<Vec<TableEntry>> {
        const READ: &str = "offload.read";
        let state = self.0.present(READ)?;
        let entries = &state.processor.table(READ, table)?.entries;
        Ok(entries
            .iter()
            .map(|((key, mask, priority), value)| TableEntry {
                key: key.clone(),
                mask: mask.clone(),
                priority: *priority,
                value: value.clone(),
            })
            .collect())
    }

    async fn offload_connection(&self, fence: Fence, connection: &Connection) -> Result<ConnectionToken> {
        const OFFLOAD: &str = "offload.offload_connection";
        let mut state = self.0.fenced(fence, OFFLOAD)?;
        let limits = &state.capabilities.offload;
        if !limits.connection_kinds.contains(kind_flag(connection.kind)) {
            let message = "the processor cannot do this for a connection";
            return Err(error(ErrorKind::Unsupported, OFFLOAD, message).field("kind"));
        }
        for leg in [&connection.downstream, &connection.upstream] {
            if !state.ports.contains_key(&leg.port) {
                return Err(error(ErrorKind::NotFound, OFFLOAD, "there is no such port").object(leg.port));
            }
        }
        let mut carried = state.processor.connections.values();
        if carried.any(|carried| shares_a_leg(&carried.connection, connection)) {
            return Err(error(
                ErrorKind::Exists,
                OFFLOAD,
                "one of its legs is carried already",
            ));
        }
        let (used, limit) = (state.processor.connections.len() as u64, limits.connections);
        if used >= limit {
            let message = format!("offload.connections is full: {used} of {limit}");
            return Err(error(ErrorKind::CapacityExceeded, OFFLOAD, message).object("offload.connections"));
        }
        let token = state.number();
        state.processor.connections_total += 1;
        let carried = ConnectionState {
            connection: connection.clone(),
            octets_up: 0,
            octets_down: 0,
        };
        state.processor.connections.insert(token, carried);
        self.0.look_at_marks(&mut state);
        Ok(ConnectionToken(token))
    }

    async fn resume(&self, fence: Fence, token: ConnectionToken) -> Result<ConnectionState> {
        const RESUME: &str = "offload.resume";
        let mut state = self.0.fenced(fence, RESUME)?;
        let Some(carried) = state.processor.connections.remove(&token.0) else {
            let message = "the connection ended or was taken back";
            return Err(error(ErrorKind::NotFound, RESUME, message).object(token.0));
        };
        self.0.look_at_marks(&mut state);
        Ok(carried)
    }

    async fn stats(&self) -> Result<OffloadStats> {
        let state = self.0.present("offload.stats")?;
        Ok(OffloadStats {
            connections: state.processor.connections.len() as u64,
            connections_total: state.processor.connections_total,
            entries: state.processor.entries(),
        })
    }
}

impl Card {
    /// Moves octets of a carried connection both ways: sequence numbers follow.
    pub(super) fn pass(&self, token: ConnectionToken, up: u32, down: u32) -> bool {
        let mut state = self.state();
        let Some(carried) = state.processor.connections.get_mut(&token.0) else {
            return false;
        };
        let advance = |leg: &mut ConnectionLeg, sent: u32, received: u32| {
            leg.send_next = leg.send_next.wrapping_add(sent);
            leg.receive_next = leg.receive_next.wrapping_add(received);
        };
        advance(&mut carried.connection.downstream, down, up);
        advance(&mut carried.connection.upstream, up, down);
        carried.octets_up += u64::from(up);
        carried.octets_down += u64::from(down);
        true
    }
}

fn read_image(program: &Program, limits: &OffloadCapabilities) -> Result<Vec<Table>> {
    const LOAD: &str = "offload.load";
    let (octets, most) = (program.image.len() as u64, limits.max_image);
    if octets > most {
        let message = format!("the image is {octets} octets, the card takes {most}");
        return Err(error(ErrorKind::CapacityExceeded, LOAD, message).object("offload.max_image"));
    }
    if digest(&program.image) != program.hash {
        let message = "is not the digest of the image that arrived";
        return Err(error(ErrorKind::Invalid, LOAD, message).field("hash"));
    }
    let specs: Vec<TableSpec> = serde_json::from_slice(&program.image).map_err(|source| {
        let message = format!("is no list of tables: {source}");
        error(ErrorKind::Invalid, LOAD, message)
            .field("image")
            .source(source)
    })?;
    if specs.len() > limits.tables as usize {
        let message = format!(
            "{} tables are more than the card's {}",
            specs.len(),
            limits.tables
        );
        return Err(error(ErrorKind::CapacityExceeded, LOAD, message).object("offload.tables"));
    }
    let tables = specs.into_iter().map(|spec| Table {
        spec,
        entries: BTreeMap::new(),
    });
    Ok(tables.collect())
}

fn kind_flag(kind: ConnectionKind) -> ConnectionKinds {
    match kind {
        ConnectionKind::Splice => ConnectionKinds::SPLICE,
        ConnectionKind::TlsRecords => ConnectionKinds::TLS_RECORDS,
        ConnectionKind::Rewrite => ConnectionKinds::REWRITE,
        _ => ConnectionKinds::all(),
    }
}

fn shares_a_leg(one: &Connection, other: &Connection) -> bool {
    let same =
        |a: &ConnectionLeg, b: &ConnectionLeg| (a.port, a.local, a.remote) == (b.port, b.local, b.remote);
    [&one.downstream, &one.upstream]
        .into_iter()
        .any(|leg| same(leg, &other.downstream) || same(leg, &other.upstream))
}
