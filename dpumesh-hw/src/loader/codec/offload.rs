//! Programs, tables and connections of the network processor.

use std::net::{SocketAddr, SocketAddrV4, SocketAddrV6};

use dpumesh_core::offload::{
    Connection, ConnectionKind, ConnectionLeg, ConnectionState, OffloadStats, Program, ProgramHash,
    ProgramInfo, ProgramState, Slot, TableEntry, TableId, TableInfo, TableKind, TableWrite,
};

use super::{get_addr, get_flag, get_port, put_addr, put_port};
use crate::loader::abi::*;
use crate::loader::arena::{Arena, Broken, Reader, Sized32};
use crate::loader::codec::codes;

codes! { put_program_state, get_program_state, ProgramState, u32,
    ProgramState::Empty => ProgramState::Empty, DM_SLOT_EMPTY;
    ProgramState::Loaded => ProgramState::Loaded, DM_SLOT_LOADED;
    ProgramState::Running => ProgramState::Running, DM_SLOT_RUNNING;
    ProgramState::Draining => ProgramState::Draining, DM_SLOT_DRAINING;
}

codes! { put_table_kind, get_table_kind, TableKind, u32,
    TableKind::Exact => TableKind::Exact, DM_TABLE_EXACT;
    TableKind::Array => TableKind::Array, DM_TABLE_ARRAY;
    TableKind::Lpm => TableKind::Lpm, DM_TABLE_LPM;
    TableKind::Ternary => TableKind::Ternary, DM_TABLE_TERNARY;
    TableKind::Counter => TableKind::Counter, DM_TABLE_COUNTER;
    TableKind::Meter => TableKind::Meter, DM_TABLE_METER;
}

codes! { put_connection_kind, get_connection_kind, ConnectionKind, u32,
    ConnectionKind::Splice => ConnectionKind::Splice, DM_CONNECTION_SPLICE;
    ConnectionKind::TlsRecords => ConnectionKind::TlsRecords, DM_CONNECTION_TLS_RECORDS;
    ConnectionKind::Rewrite => ConnectionKind::Rewrite, DM_CONNECTION_REWRITE;
}

pub(crate) fn put_slot(slot: Slot) -> dm_slot {
    dm_slot {
        slot: slot.0,
        ..dm_slot::empty()
    }
}

pub(crate) fn put_program(slot: Slot, program: &Program, arena: &mut Arena) -> dm_program {
    let mut raw = dm_program::empty();
    raw.slot = slot.0;
    raw.name = arena.text(&program.name);
    raw.version = arena.text(&program.version);
    raw.hash = arena.list(&program.hash.0);
    raw.image = arena.list(&program.image);
    raw
}

pub(crate) fn get_program(raw: &dm_program, reader: &Reader) -> Result<Program, Broken> {
    Ok(Program {
        name: reader.text(raw.name, "program.name")?,
        version: reader.text(raw.version, "program.version")?,
        hash: ProgramHash(reader.bytes(raw.hash, "program.hash")?),
        image: reader.bytes(raw.image, "program.image")?,
    })
}

pub(crate) fn put_program_info(info: &ProgramInfo, arena: &mut Arena) -> dm_program_info {
    let mut raw = dm_program_info::empty();
    raw.slot = info.slot.0;
    raw.state = put_program_state(info.state);
    if let Some((name, version, hash)) = &info.program {
        (raw.name, raw.version) = (arena.text(name), arena.text(version));
        raw.hash = arena.list(&hash.0);
    }
    raw
}

pub(crate) fn get_program_info(raw: &dm_program_info, reader: &Reader) -> Result<ProgramInfo, Broken> {
    let state = get_program_state(raw.state, "program.state")?;
    let program = if state == ProgramState::Empty {
        None
    } else {
        Some((
            reader.text(raw.name, "program.name")?,
            reader.text(raw.version, "program.version")?,
            ProgramHash(reader.bytes(raw.hash, "program.hash")?),
        ))
    };
    Ok(ProgramInfo {
        slot: Slot(raw.slot),
        program,
        state,
    })
}

pub(crate) fn put_table(info: &TableInfo, arena: &mut Arena) -> dm_table_info {
    let mut raw = dm_table_info::empty();
    raw.id = info.id.0;
    raw.kind = put_table_kind(info.kind);
    (raw.key_len, raw.value_len) = (info.key_len, info.value_len);
    (raw.used, raw.capacity) = (info.used, info.capacity);
    raw.name = arena.text(&info.name);
    raw
}

pub(crate) fn get_table(raw: &dm_table_info, reader: &Reader) -> Result<TableInfo, Broken> {
    Ok(TableInfo {
        id: TableId(raw.id),
        name: reader.text(raw.name, "table.name")?,
        kind: get_table_kind(raw.kind, "table.kind")?,
        key_len: raw.key_len,
        value_len: raw.value_len,
        used: raw.used,
        capacity: raw.capacity,
    })
}

pub(crate) fn put_entry(entry: &TableEntry, kind: u32, arena: &mut Arena) -> dm_entry {
    let mut raw = dm_entry::empty();
    raw.kind = kind;
    raw.priority = entry.priority;
    raw.key = arena.list(&entry.key);
    if let Some(mask) = &entry.mask {
        raw.has_mask = 1;
        raw.mask = arena.list(mask);
    }
    raw.value = arena.list(&entry.value);
    raw
}

pub(crate) fn get_entry(raw: &dm_entry, reader: &Reader) -> Result<TableEntry, Broken> {
    let masked = get_flag(raw.has_mask, "entry.has_mask")?;
    Ok(TableEntry {
        key: reader.bytes(raw.key, "entry.key")?,
        mask: if masked {
            Some(reader.bytes(raw.mask, "entry.mask")?)
        } else {
            None
        },
        priority: raw.priority,
        value: reader.bytes(raw.value, "entry.value")?,
    })
}

pub(crate) fn put_entries(table: TableId, writes: &[TableWrite], arena: &mut Arena) -> dm_entries {
    let entries: Vec<_> = writes
        .iter()
        .map(|write| match write {
            TableWrite::Put(entry) => put_entry(entry, DM_ADD, arena),
            TableWrite::Delete(entry) => put_entry(entry, DM_REMOVE, arena),
        })
        .collect();
    let mut raw = dm_entries::empty();
    raw.table = table.0;
    raw.entries = arena.list(&entries);
    raw
}

pub(crate) fn get_entries(raw: &dm_entries, reader: &Reader) -> Result<Vec<TableWrite>, Broken> {
    let entries = reader.list::<dm_entry>(raw.entries, "entries")?;
    entries
        .iter()
        .map(|raw| {
            let entry = get_entry(raw, reader)?;
            match raw.kind {
                DM_ADD => Ok(TableWrite::Put(entry)),
                DM_REMOVE => Ok(TableWrite::Delete(entry)),
                kind => Err(format!("entry.kind is {kind}, which means nothing")),
            }
        })
        .collect()
}

fn put_leg(leg: &ConnectionLeg) -> dm_leg {
    let parts = |address: SocketAddr| match address {
        SocketAddr::V4(_) => (0, 0),
        SocketAddr::V6(address) => (address.scope_id(), address.flowinfo()),
    };
    let ((scope_local, flow_local), (scope_remote, flow_remote)) = (parts(leg.local), parts(leg.remote));
    dm_leg {
        port: put_port(leg.port),
        local: put_addr(leg.local.ip()),
        remote: put_addr(leg.remote.ip()),
        local_port: leg.local.port(),
        remote_port: leg.remote.port(),
        scope: [scope_local, scope_remote],
        flow: [flow_local, flow_remote],
        send_next: leg.send_next,
        receive_next: leg.receive_next,
    }
}

fn get_leg(raw: dm_leg) -> Result<ConnectionLeg, Broken> {
    let socket = |address, port, scope, flow| {
        Ok::<_, Broken>(match get_addr(address, "leg.address")? {
            std::net::IpAddr::V4(address) => SocketAddr::V4(SocketAddrV4::new(address, port)),
            std::net::IpAddr::V6(address) => SocketAddr::V6(SocketAddrV6::new(address, port, flow, scope)),
        })
    };
    Ok(ConnectionLeg {
        port: get_port(raw.port, "leg.port")?,
        local: socket(raw.local, raw.local_port, raw.scope[0], raw.flow[0])?,
        remote: socket(raw.remote, raw.remote_port, raw.scope[1], raw.flow[1])?,
        send_next: raw.send_next,
        receive_next: raw.receive_next,
    })
}

pub(crate) fn put_connection(connection: &Connection) -> dm_connection {
    let mut raw = dm_connection::empty();
    raw.kind = put_connection_kind(connection.kind);
    raw.downstream = put_leg(&connection.downstream);
    raw.upstream = put_leg(&connection.upstream);
    raw
}

pub(crate) fn put_connection_state(state: &ConnectionState) -> dm_connection {
    let mut raw = put_connection(&state.connection);
    (raw.octets_up, raw.octets_down) = (state.octets_up, state.octets_down);
    raw
}

pub(crate) fn get_connection(raw: &dm_connection) -> Result<ConnectionState, Broken> {
    Ok(ConnectionState {
        connection: Connection {
            downstream: get_leg(raw.downstream)?,
            upstream: get_leg(raw.upstream)?,
            kind: get_connection_kind(raw.kind, "connection.kind")?,
        },
        octets_up: raw.octets_up,
        octets_down: raw.octets_down,
    })
}

pub(crate) fn put_stats(stats: &OffloadStats) -> dm_offload_stats {
    let mut raw = dm_offload_stats::empty();
    raw.connections = stats.connections;
    raw.connections_total = stats.connections_total;
    raw.entries = stats.entries;
    raw
}

pub(crate) fn get_stats(raw: &dm_offload_stats) -> OffloadStats {
    OffloadStats {
        connections: raw.connections,
        connections_total: raw.connections_total,
        entries: raw.entries,
    }
}
