//! [`NpOffload`]: programs, their tables and connections, handed to the library.
//!
//! What the library does not tell apart is found out here: entries are checked against their table before they are
//! written, and a batch of which some failed is followed by a look at the table, so each entry gets its own answer.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use async_trait::async_trait;
use dpumesh_core::offload::{
    Connection, ConnectionKind, ConnectionLeg, ConnectionState, ConnectionToken, NpOffload, OffloadStats,
    Program, ProgramHash, ProgramInfo, ProgramState, Slot, TableEntry, TableId, TableInfo, TableKind,
    TableWrite,
};
use dpumesh_core::{Effect, Error, ErrorKind, Fence, Result};

use crate::entry::{number_of_port, port_of_number};
use crate::error::{error, kind, of};
use crate::sys::Failure;
use crate::table::{self, ProgramEntry, ProgramTable};
use crate::worker::{Asker, Shared, Worker};

/// The offload part.
#[derive(Debug)]
pub(crate) struct Offload {
    pub(crate) asker: Asker,
    pub(crate) shared: Arc<Shared>,
}

impl Offload {
    /// Reads something from the card.
    async fn read_np<T: Send + 'static>(
        &self,
        operation: &'static str,
        read: impl FnOnce(&mut Worker) -> std::result::Result<T, Failure> + Send + 'static,
    ) -> Result<T> {
        self.shared.present(operation)?;
        self.asker
            .ask(operation, move |worker| {
                Box::pin(async move {
                    worker.shared.present(operation)?;
                    read(worker).map_err(|failure| worker.failed(operation, failure))
                })
            })
            .await
    }

    /// Changes something on the card.
    async fn change<T: Send + 'static>(
        &self,
        operation: &'static str,
        fence: Fence,
        change: impl FnOnce(&mut Worker) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.shared.fenced(fence, operation)?;
        self.asker
            .ask(operation, move |worker| {
                Box::pin(async move {
                    worker.shared.fenced(fence, operation)?;
                    let done = change(worker);
                    worker.look_at_marks();
                    done
                })
            })
            .await
    }
}

#[async_trait]
impl NpOffload for Offload {
    async fn programs(&self) -> Result<Vec<ProgramInfo>> {
        self.read_np("offload.programs", |worker| {
            let slots = worker.shared.life().limits.slots;
            (0..slots).map(|slot| program_info(worker, slot)).collect()
        })
        .await
    }

    async fn load(&self, fence: Fence, slot: Slot, program: &Program) -> Result<ProgramInfo> {
        const LOAD: &str = "offload.load";
        let most = self.shared.fenced(fence, LOAD)?.limits.max_image;
        let octets = program.image.len() as u64;
        if octets > most {
            let message = format!("the image is {octets} octets, the card takes {most}");
            return Err(error(ErrorKind::CapacityExceeded, LOAD, message).object("offload.max_image"));
        }
        let given = given(program)?;
        let image = program.image.clone();
        self.change(LOAD, fence, move |worker| {
            let loaded = worker
                .device
                .program_load(worker.generation, slot.0, &given, &image)
                .and_then(|()| program_info(worker, slot.0));
            loaded.map_err(|failure| {
                let field = match failure.status {
                    table::E_DIGEST => "hash",
                    table::E_INVALID => "image",
                    _ => "",
                };
                let failed = worker.failed(LOAD, failure).object(slot.0);
                if field.is_empty() {
                    failed
                } else {
                    failed.field(field)
                }
            })
        })
        .await
    }

    async fn activate(&self, fence: Fence, slot: Slot) -> Result<()> {
        const ACTIVATE: &str = "offload.activate";
        self.change(ACTIVATE, fence, move |worker| {
            let done = worker.device.program_activate(worker.generation, slot.0);
            done.map_err(|failure| worker.failed(ACTIVATE, failure).object(slot.0))
        })
        .await
    }

    async fn unload(&self, fence: Fence, slot: Slot) -> Result<()> {
        const UNLOAD: &str = "offload.unload";
        self.change(UNLOAD, fence, move |worker| {
            let done = worker.device.program_unload(worker.generation, slot.0);
            done.map_err(|failure| worker.failed(UNLOAD, failure).object(slot.0))
        })
        .await
    }

    async fn tables(&self) -> Result<Vec<TableInfo>> {
        self.read_np("offload.tables", |worker| {
            let mut tables = Vec::new();
            for id in 0.. {
                match worker.device.program_table(id) {
                    Ok(info) => tables.push(table_info(id, &info)),
                    Err(failure) if failure.status == table::E_NOT_FOUND => break,
                    Err(failure) => return Err(failure),
                }
            }
            Ok(tables)
        })
        .await
    }

    async fn write(&self, fence: Fence, table: TableId, entries: &[TableWrite]) -> Result<Vec<Result<()>>> {
        let entries = entries.to_vec();
        self.change(WRITE, fence, move |worker| write(worker, table, &entries))
            .await
    }

    async fn read(&self, table: TableId) -> Result<Vec<TableEntry>> {
        const READ: &str = "offload.read";
        let entries = self
            .read_np(READ, move |worker| worker.device.program_read(table.0))
            .await?;
        Ok(entries.iter().map(entry_of).collect())
    }

    async fn offload_connection(&self, fence: Fence, connection: &Connection) -> Result<ConnectionToken> {
        const OFFLOAD: &str = "offload.offload_connection";
        let life = self.shared.fenced(fence, OFFLOAD)?;
        let kind = connection_kind(connection.kind);
        if kind & life.limits.connection_kinds == 0 {
            let message = "the processor cannot do this for a connection";
            return Err(error(ErrorKind::Unsupported, OFFLOAD, message).field("kind"));
        }
        if let Some(ports) = self.shared.floor.as_ref().and_then(|floor| floor.ports()) {
            let ports = ports.list().await?;
            for leg in [&connection.downstream, &connection.upstream] {
                if !ports.iter().any(|info| info.port == leg.port) {
                    return Err(error(ErrorKind::NotFound, OFFLOAD, "there is no such port").object(leg.port));
                }
            }
        }
        let given = table::Connection {
            size: size_of::<table::Connection>() as u32,
            kind,
            downstream: leg(&connection.downstream),
            upstream: leg(&connection.upstream),
            octets_up: 0,
            octets_down: 0,
        };
        self.change(OFFLOAD, fence, move |worker| {
            let token = worker.device.connection_add(worker.generation, &given);
            token.map(ConnectionToken).map_err(|failure| {
                let is_full = kind_is_full(&failure);
                let mut failed = worker.failed(OFFLOAD, failure);
                if is_full {
                    let limit = worker.shared.life().limits.connections;
                    failed.message = format!("offload.connections is full: {limit} of {limit}").into();
                    failed = failed.object("offload.connections");
                }
                failed
            })
        })
        .await
    }

    async fn resume(&self, fence: Fence, token: ConnectionToken) -> Result<ConnectionState> {
        const RESUME: &str = "offload.resume";
        self.change(RESUME, fence, move |worker| {
            let taken = worker.device.connection_take(worker.generation, token.0);
            let taken = taken.map_err(|failure| worker.failed(RESUME, failure).object(token.0))?;
            state_of(&taken).ok_or_else(|| {
                let message = "the card gave back a connection of unknown ports or kind";
                error(ErrorKind::Fault, RESUME, message).effect(Effect::Applied)
            })
        })
        .await
    }

    async fn stats(&self) -> Result<OffloadStats> {
        self.read_np("offload.stats", |worker| {
            let (connections, connections_total) = worker.device.connection_count()?;
            let mut entries = 0;
            for id in 0.. {
                match worker.device.program_table(id) {
                    Ok(info) => entries += info.used,
                    Err(failure) if failure.status == table::E_NOT_FOUND => break,
                    Err(failure) => return Err(failure),
                }
            }
            Ok(OffloadStats {
                connections,
                connections_total,
                entries,
            })
        })
        .await
    }
}

fn kind_is_full(failure: &Failure) -> bool {
    kind(failure.status) == ErrorKind::CapacityExceeded
}

fn given(program: &Program) -> Result<table::Program> {
    let refuse = |field: &'static str, message: &'static str| {
        Err(error(ErrorKind::Invalid, "offload.load", message).field(field))
    };
    if program.hash.0.len() > table::DIGEST_MAX {
        return refuse("hash", "is longer than any digest of the card");
    }
    if program.name.len() >= table::NAME_MAX {
        return refuse("name", "is longer than the 31 octets that a slot keeps");
    }
    if program.version.len() >= table::NAME_MAX {
        return refuse("version", "is longer than the 31 octets that a slot keeps");
    }
    let mut digest = [0; table::DIGEST_MAX];
    digest[..program.hash.0.len()].copy_from_slice(&program.hash.0);
    Ok(table::Program {
        size: size_of::<table::Program>() as u32,
        state: 0,
        digest_len: program.hash.0.len() as u32,
        reserved: 0,
        digest,
        name: table::name(&program.name),
        version: table::name(&program.version),
    })
}

fn program_info(worker: &Worker, slot: u32) -> std::result::Result<ProgramInfo, Failure> {
    let info = worker.device.program_info(slot)?;
    let state = match info.state {
        table::SLOT_LOADED => ProgramState::Loaded,
        table::SLOT_RUNNING => ProgramState::Running,
        table::SLOT_DRAINING => ProgramState::Draining,
        _ => ProgramState::Empty,
    };
    let len = (info.digest_len as usize).min(table::DIGEST_MAX);
    let program = (
        table::text(&info.name),
        table::text(&info.version),
        ProgramHash(info.digest[..len].to_vec()),
    );
    Ok(ProgramInfo {
        slot: Slot(slot),
        program: (state != ProgramState::Empty).then_some(program),
        state,
    })
}

fn table_info(id: u32, info: &ProgramTable) -> TableInfo {
    TableInfo {
        id: TableId(id),
        name: table::text(&info.name),
        kind: table_kind(info.kind),
        key_len: info.key_len.min(table::KEY_MAX as u32) as u16,
        value_len: info.value_len.min(table::VALUE_MAX as u32) as u16,
        used: info.used,
        capacity: info.capacity,
    }
}

fn table_kind(kind: u32) -> TableKind {
    match kind {
        table::TABLE_ARRAY => TableKind::Array,
        table::TABLE_LPM => TableKind::Lpm,
        table::TABLE_TERNARY => TableKind::Ternary,
        table::TABLE_COUNTER => TableKind::Counter,
        table::TABLE_METER => TableKind::Meter,
        _ => TableKind::Exact,
    }
}

const WRITE: &str = "offload.write";

/// Identity of an entry.
type EntryKey = (Vec<u8>, Option<Vec<u8>>, u32);

fn key_of(entry: &TableEntry) -> EntryKey {
    (entry.key.clone(), entry.mask.clone(), entry.priority)
}

fn write(worker: &mut Worker, id: TableId, entries: &[TableWrite]) -> Result<Vec<Result<()>>> {
    let info = match worker.device.program_table(id.0) {
        Ok(info) => table_info(id.0, &info),
        Err(failure) => return Err(worker.failed(WRITE, failure).object(id.0)),
    };
    let mut results: Vec<Result<()>> = entries
        .iter()
        .enumerate()
        .map(|(index, write)| check(&info, write).map_err(|refused| refused.index(index)))
        .collect();
    let sound: Vec<usize> = (0..entries.len())
        .filter(|index| results[*index].is_ok())
        .collect();
    let longest = worker.shared.life().limits.batch_max.max(1) as usize;
    for chunk in sound.chunks(longest) {
        let lines: Vec<ProgramEntry> = chunk.iter().map(|index| line(&entries[*index])).collect();
        let before = worker.device.program_write(worker.generation, id.0, &lines);
        let first_error = match before {
            Ok(result) if result.failed == 0 && result.done == lines.len() as u64 => continue,
            Ok(result) => result.first_error,
            Err(failure) => return Err(worker.failed(WRITE, failure).effect(Effect::Partial)),
        };
        let there = worker.device.program_read(id.0);
        let there = there.map_err(|failure| worker.failed(WRITE, failure).effect(Effect::Unknown))?;
        let there: BTreeSet<(EntryKey, Vec<u8>)> = there
            .iter()
            .map(entry_of)
            .map(|entry| (key_of(&entry), entry.value))
            .collect();
        let text = worker.device.text(first_error);
        // The last word on a key is what the table shows; an earlier one of the same batch cannot be told from it.
        let mut seen = BTreeSet::new();
        for index in chunk.iter().rev() {
            let (TableWrite::Put(entry) | TableWrite::Delete(entry)) = &entries[*index];
            if !seen.insert(key_of(entry)) {
                continue;
            }
            let is_done = match &entries[*index] {
                TableWrite::Put(entry) => there.contains(&(key_of(entry), entry.value.clone())),
                TableWrite::Delete(entry) => !there.iter().any(|(key, _)| *key == key_of(entry)),
            };
            if !is_done {
                results[*index] = Err(refused(&info, first_error, &text).index(*index));
            }
        }
    }
    Ok(results)
}

fn refused(info: &TableInfo, status: i32, text: &str) -> Error {
    let kind = kind(status);
    let failed = error(kind, WRITE, text.to_owned()).vendor_code(status.into());
    match kind {
        ErrorKind::CapacityExceeded => failed.object(&info.name),
        _ => failed,
    }
}

fn check(info: &TableInfo, write: &TableWrite) -> Result<()> {
    let (TableWrite::Put(entry) | TableWrite::Delete(entry)) = write;
    let refuse = |kind, field: &'static str, message: String| Err(error(kind, WRITE, message).field(field));
    if info.kind == TableKind::Counter {
        let message = "the entries of a counter table are its own".to_owned();
        return refuse(ErrorKind::Unsupported, "table", message);
    }
    if entry.key.len() != usize::from(info.key_len) {
        let message = format!(
            "is {} octets, the table's keys are {}",
            entry.key.len(),
            info.key_len
        );
        return refuse(ErrorKind::Invalid, "key", message);
    }
    if matches!(write, TableWrite::Put(_)) && entry.value.len() != usize::from(info.value_len) {
        let message = format!("is {} octets, not {}", entry.value.len(), info.value_len);
        return refuse(ErrorKind::Invalid, "value", message);
    }
    match (&entry.mask, info.kind) {
        (None, _) => Ok(()),
        (Some(mask), TableKind::Lpm | TableKind::Ternary) if mask.len() == entry.key.len() => Ok(()),
        (Some(_), TableKind::Lpm | TableKind::Ternary) => {
            refuse(ErrorKind::Invalid, "mask", "is not as long as the key".to_owned())
        }
        (Some(_), _) => refuse(
            ErrorKind::Unsupported,
            "mask",
            "this table matches whole keys".to_owned(),
        ),
    }
}

/// A checked entry as the library takes it.
fn line(write: &TableWrite) -> ProgramEntry {
    let (op, entry) = match write {
        TableWrite::Put(entry) => (table::OP_PUT, entry),
        TableWrite::Delete(entry) => (table::OP_DELETE, entry),
    };
    let mut line = ProgramEntry {
        op,
        priority: entry.priority,
        key_len: entry.key.len() as u32,
        masked: u32::from(entry.mask.is_some()),
        ..ProgramEntry::default()
    };
    line.key[..entry.key.len()].copy_from_slice(&entry.key);
    if let Some(mask) = &entry.mask {
        line.mask[..mask.len()].copy_from_slice(mask);
    }
    if op == table::OP_PUT {
        line.value_len = entry.value.len() as u32;
        line.value[..entry.value.len()].copy_from_slice(&entry.value);
    }
    line
}

fn entry_of(line: &ProgramEntry) -> TableEntry {
    let key_len = (line.key_len as usize).min(table::KEY_MAX);
    let value_len = (line.value_len as usize).min(table::VALUE_MAX);
    TableEntry {
        key: line.key[..key_len].to_vec(),
        mask: (line.masked != 0).then(|| line.mask[..key_len].to_vec()),
        priority: line.priority,
        value: line.value[..value_len].to_vec(),
    }
}

fn connection_kind(kind: ConnectionKind) -> u32 {
    match kind {
        ConnectionKind::Splice => table::CONNECTION_SPLICE,
        ConnectionKind::TlsRecords => table::CONNECTION_TLS,
        ConnectionKind::Rewrite => table::CONNECTION_REWRITE,
        _ => 0, // of a newer contract: nothing that this card claims
    }
}

fn leg(leg: &ConnectionLeg) -> table::Leg {
    let octets = |address: IpAddr| match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    };
    table::Leg {
        port: number_of_port(leg.port),
        local: octets(leg.local.ip()),
        remote: octets(leg.remote.ip()),
        local_port: leg.local.port(),
        remote_port: leg.remote.port(),
        send_next: leg.send_next,
        receive_next: leg.receive_next,
        reserved: 0,
    }
}

fn leg_of(leg: &table::Leg) -> Option<ConnectionLeg> {
    let address = |octets: [u8; 16]| Ipv6Addr::from(octets).to_canonical();
    Some(ConnectionLeg {
        port: port_of_number(leg.port)?,
        local: SocketAddr::new(address(leg.local), leg.local_port),
        remote: SocketAddr::new(address(leg.remote), leg.remote_port),
        send_next: leg.send_next,
        receive_next: leg.receive_next,
    })
}

fn state_of(taken: &table::Connection) -> Option<ConnectionState> {
    let kind = match taken.kind {
        table::CONNECTION_SPLICE => ConnectionKind::Splice,
        table::CONNECTION_TLS => ConnectionKind::TlsRecords,
        table::CONNECTION_REWRITE => ConnectionKind::Rewrite,
        _ => return None,
    };
    Some(ConnectionState {
        connection: Connection {
            downstream: leg_of(&taken.downstream)?,
            upstream: leg_of(&taken.upstream)?,
            kind,
        },
        octets_up: taken.octets_up,
        octets_down: taken.octets_down,
    })
}

/// A failed call outside of the traits' operations.
pub(crate) fn extra(worker: &mut Worker, operation: &'static str, failure: Failure) -> Error {
    worker.look_at(&failure);
    of(operation, failure)
}
