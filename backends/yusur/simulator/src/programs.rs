//! [`Programs`]: slots, the tables of programs, and connections.
//!
//! An image is a JSON list of the tables that a program declares ([`program`] makes one). Its digest is the CRC-32 of its
//! octets, in network order: it finds a torn image; a real card takes a digest that also keeps attackers out.

use std::collections::BTreeMap;

use dpumesh_core::offload::{Program, ProgramHash, TableKind};
use dpumesh_yusur::table::{self, BatchResult, Connection, Leg, Limits, ProgramEntry, ProgramTable};
use serde::{Deserialize, Serialize};

use crate::card::Status;

/// A table that a program declares.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TableSpec {
    /// Its name.
    pub name: String,
    /// How it matches.
    pub kind: TableKind,
    /// Length of a key in octets, at most 64.
    pub key_len: u16,
    /// Length of a value in octets, at most 64.
    pub value_len: u16,
    /// Entries it can hold.
    pub capacity: u64,
}

/// A program with these tables; their numbers are their indices.
pub fn program(name: &str, version: &str, tables: &[TableSpec]) -> Program {
    // Strings, numbers and unit variants only: nothing that JSON could refuse.
    let image = serde_json::to_vec(tables).expect("a list of plain structs serialises");
    Program {
        name: name.to_owned(),
        version: version.to_owned(),
        hash: ProgramHash(digest(&image).to_vec()),
        image,
    }
}

fn digest(image: &[u8]) -> [u8; 4] {
    crc32fast::hash(image).to_be_bytes()
}

/// Everything of the processor that is no steering.
#[derive(Debug, Default)]
pub struct Programs {
    slots: Vec<Option<Loaded>>,
    running: Option<usize>,
    connections: BTreeMap<u64, Connection>,
    ever: u64,
}

#[derive(Debug)]
struct Loaded {
    program: table::Program,
    image: Vec<u8>,
    tables: Vec<Table>,
    draining: bool,
}

#[derive(Debug)]
struct Table {
    spec: TableSpec,
    entries: BTreeMap<EntryKey, ProgramEntry>,
}

/// Key, mask and priority.
type EntryKey = (Vec<u8>, Option<Vec<u8>>, u32);

impl Programs {
    /// Empty slots.
    pub fn new(limits: &Limits) -> Self {
        Self {
            slots: (0..limits.slots).map(|_| None).collect(),
            ..Self::default()
        }
    }

    fn slot(&self, slot: u32) -> Status<usize> {
        let index = slot as usize;
        if index < self.slots.len() {
            Ok(index)
        } else {
            Err(table::E_NOT_FOUND)
        }
    }

    /// Loads an image.
    ///
    /// # Errors
    /// `E_NOT_FOUND`, `E_BUSY`, `E_FULL`, `E_DIGEST`, `E_INVALID`.
    pub fn load(&mut self, slot: u32, given: &table::Program, image: &[u8], limits: &Limits) -> Status {
        let index = self.slot(slot)?;
        let same = |there: &table::Program| {
            (there.name, there.version, there.digest, there.digest_len)
                == (given.name, given.version, given.digest, given.digest_len)
        };
        if let Some(there) = &self.slots[index] {
            return if same(&there.program) && there.image == image {
                Ok(())
            } else {
                Err(table::E_BUSY)
            };
        }
        if image.len() as u64 > limits.max_image {
            return Err(table::E_FULL);
        }
        let digest = digest(image);
        if given.digest_len as usize != digest.len() || given.digest[..digest.len()] != digest {
            return Err(table::E_DIGEST);
        }
        let specs: Vec<TableSpec> = serde_json::from_slice(image).map_err(|_| table::E_INVALID)?;
        let too_long = |spec: &TableSpec| {
            usize::from(spec.key_len) > table::KEY_MAX || usize::from(spec.value_len) > table::VALUE_MAX
        };
        if specs.len() > limits.program_tables as usize || specs.iter().any(too_long) {
            return Err(table::E_INVALID);
        }
        let tables = specs.into_iter().map(|spec| Table {
            spec,
            entries: BTreeMap::new(),
        });
        self.slots[index] = Some(Loaded {
            program: *given,
            image: image.to_vec(),
            tables: tables.collect(),
            draining: false,
        });
        Ok(())
    }

    /// Makes a program the running one.
    ///
    /// # Errors
    /// `E_NOT_FOUND`.
    pub fn activate(&mut self, slot: u32) -> Status {
        let index = self.slot(slot)?;
        let loaded = self.slots[index].as_mut().ok_or(table::E_NOT_FOUND)?;
        loaded.draining = false;
        let former = self.running.replace(index).filter(|former| *former != index);
        if let Some(former) = former.and_then(|former| self.slots[former].as_mut()) {
            former.draining = true;
        }
        Ok(())
    }

    /// Empties a slot.
    ///
    /// # Errors
    /// `E_NOT_FOUND`, `E_BUSY`.
    pub fn unload(&mut self, slot: u32) -> Status {
        let index = self.slot(slot)?;
        if self.running == Some(index) {
            return Err(table::E_BUSY);
        }
        self.slots[index] = None;
        Ok(())
    }

    /// What a slot holds.
    ///
    /// # Errors
    /// `E_NOT_FOUND`.
    pub fn info(&self, slot: u32) -> Status<table::Program> {
        let index = self.slot(slot)?;
        let Some(loaded) = &self.slots[index] else {
            return Ok(table::Program::default());
        };
        let state = match loaded {
            _ if self.running == Some(index) => table::SLOT_RUNNING,
            loaded if loaded.draining => table::SLOT_DRAINING,
            _ => table::SLOT_LOADED,
        };
        Ok(table::Program {
            state,
            ..loaded.program
        })
    }

    fn running(&self) -> Option<&Loaded> {
        self.slots.get(self.running?)?.as_ref()
    }

    /// A table of the running program.
    ///
    /// # Errors
    /// `E_NOT_FOUND`.
    pub fn table(&self, id: u32) -> Status<ProgramTable> {
        let tables = self.running().map_or(&[][..], |loaded| &loaded.tables);
        let found = tables.get(id as usize).ok_or(table::E_NOT_FOUND)?;
        let kind = match found.spec.kind {
            TableKind::Array => table::TABLE_ARRAY,
            TableKind::Lpm => table::TABLE_LPM,
            TableKind::Ternary => table::TABLE_TERNARY,
            TableKind::Counter => table::TABLE_COUNTER,
            TableKind::Meter => table::TABLE_METER,
            _ => table::TABLE_EXACT,
        };
        Ok(ProgramTable {
            size: size_of::<ProgramTable>() as u32,
            kind,
            key_len: found.spec.key_len.into(),
            value_len: found.spec.value_len.into(),
            used: found.entries.len() as u64,
            capacity: found.spec.capacity,
            name: table::name(&found.spec.name),
        })
    }

    fn entries(&self) -> u64 {
        let tables = self.slots.iter().flatten().flat_map(|loaded| &loaded.tables);
        tables.map(|table| table.entries.len() as u64).sum()
    }

    /// Writes entries, going on after failures.
    ///
    /// # Errors
    /// `E_NOT_FOUND`, `E_INVALID` (too many).
    pub fn write(&mut self, id: u32, lines: &[ProgramEntry], limits: &Limits) -> Status<BatchResult> {
        self.table(id)?;
        if lines.len() > limits.batch_max as usize {
            return Err(table::E_INVALID);
        }
        let mut result = BatchResult::default();
        for line in lines {
            match self.write_one(id, line, limits) {
                Ok(()) => result.done += 1,
                Err(code) => {
                    if result.failed == 0 {
                        result.first_error = code;
                    }
                    result.failed += 1;
                }
            }
        }
        Ok(result)
    }

    fn write_one(&mut self, id: u32, line: &ProgramEntry, limits: &Limits) -> Status {
        let everywhere = self.entries();
        let running = self.running.ok_or(table::E_NOT_FOUND)?;
        let loaded = self.slots[running].as_mut().ok_or(table::E_NOT_FOUND)?;
        let found = loaded.tables.get_mut(id as usize).ok_or(table::E_NOT_FOUND)?;
        let key_len = usize::from(found.spec.key_len);
        if line.key_len as usize != key_len {
            return Err(table::E_INVALID);
        }
        let can_mask = matches!(found.spec.kind, TableKind::Lpm | TableKind::Ternary);
        if line.masked != 0 && !can_mask {
            return Err(table::E_UNSUPPORTED);
        }
        let mask = (line.masked != 0).then(|| line.mask[..key_len].to_vec());
        let key = (line.key[..key_len].to_vec(), mask, line.priority);
        match line.op {
            table::OP_DELETE => {
                found.entries.remove(&key);
                Ok(())
            }
            table::OP_PUT if line.value_len as usize != usize::from(found.spec.value_len) => {
                Err(table::E_INVALID)
            }
            table::OP_PUT => {
                let is_new = !found.entries.contains_key(&key);
                let is_full =
                    found.entries.len() as u64 >= found.spec.capacity || everywhere >= limits.program_entries;
                if is_new && is_full {
                    return Err(table::E_FULL);
                }
                found.entries.insert(key, *line);
                Ok(())
            }
            _ => Err(table::E_INVALID),
        }
    }

    /// Entries of a table from the `from`-th on, in key order.
    ///
    /// # Errors
    /// `E_NOT_FOUND`.
    pub fn read(&self, id: u32, from: u64, room: usize) -> Status<Vec<ProgramEntry>> {
        let tables = self.running().map_or(&[][..], |loaded| &loaded.tables);
        let found = tables.get(id as usize).ok_or(table::E_NOT_FOUND)?;
        Ok(found
            .entries
            .values()
            .skip(from as usize)
            .take(room)
            .copied()
            .collect())
    }

    /// Takes a connection.
    ///
    /// # Errors
    /// `E_UNSUPPORTED`, `E_EXISTS`, `E_FULL`.
    pub fn connect(&mut self, connection: &Connection, limits: &Limits) -> Status<u64> {
        if connection.kind & limits.connection_kinds == 0 {
            return Err(table::E_UNSUPPORTED);
        }
        let tuple = |leg: &Leg| (leg.port, leg.local, leg.remote, leg.local_port, leg.remote_port);
        let legs = [tuple(&connection.downstream), tuple(&connection.upstream)];
        let shares = |other: &Connection| {
            legs.contains(&tuple(&other.downstream)) || legs.contains(&tuple(&other.upstream))
        };
        if self.connections.values().any(shares) {
            return Err(table::E_EXISTS);
        }
        if self.connections.len() as u64 >= limits.connections {
            return Err(table::E_FULL);
        }
        self.ever += 1;
        self.connections.insert(self.ever, *connection);
        Ok(self.ever)
    }

    /// Gives a connection back.
    ///
    /// # Errors
    /// `E_NOT_FOUND`.
    pub fn take(&mut self, token: u64) -> Status<Connection> {
        self.connections.remove(&token).ok_or(table::E_NOT_FOUND)
    }

    /// Connections now and ever.
    pub fn count(&self) -> (u64, u64) {
        (self.connections.len() as u64, self.ever)
    }

    /// Moves octets of a connection both ways: sequence numbers follow.
    ///
    /// # Errors
    /// `E_NOT_FOUND`.
    pub fn pass(&mut self, token: u64, up: u32, down: u32) -> Status {
        let carried = self.connections.get_mut(&token).ok_or(table::E_NOT_FOUND)?;
        let advance = |leg: &mut Leg, sent: u32, received: u32| {
            leg.send_next = leg.send_next.wrapping_add(sent);
            leg.receive_next = leg.receive_next.wrapping_add(received);
        };
        advance(&mut carried.downstream, down, up);
        advance(&mut carried.upstream, up, down);
        carried.octets_up += u64::from(up);
        carried.octets_down += u64::from(down);
        Ok(())
    }
}
