//! Programs, tables and connections of the network processor: the sentences of [`dpumesh_core::NpOffload`].

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use dpumesh_core::offload::{
    Connection, ConnectionKind, ConnectionLeg, Program, ProgramInfo, ProgramState, Slot, TableEntry, TableId,
    TableInfo, TableKind, TableWrite,
};
use dpumesh_core::{Backend, BackendExt, ConnectionKinds, Epoch, ErrorKind, Fence, NpOffload, PortRef};

use super::Rig;
use super::check::{CaseResult, Halt, ensure, ensure_eq, refused, refused_as};
use super::disturb::{Disturbance, disturb};
use super::limits::FILL_LIMIT;
use super::sample::{NO_PORT, some_port};

/// The SoC's half with its processor and the fixture's programs at hand.
struct Np {
    backend: Arc<dyn Backend>,
    programs: Vec<Program>,
}

impl Np {
    fn of(rig: &dyn Rig) -> Self {
        Self {
            backend: rig.soc(),
            programs: rig.programs(),
        }
    }

    fn offload(&self) -> Result<&dyn NpOffload, Halt> {
        Ok(self.backend.require_offload()?)
    }

    fn fence(&self) -> Fence {
        self.backend.fence()
    }

    fn program(&self, i: usize) -> Result<&Program, Halt> {
        self.programs.get(i).ok_or_else(|| {
            Halt::failed(format!(
                "the fixture gives {} programs, 2 are needed",
                self.programs.len()
            ))
        })
    }

    /// The program that runs on a fresh card, and the free slots.
    async fn free_slots(&self) -> Result<Vec<Slot>, Halt> {
        let slots = self.offload()?.programs().await?;
        Ok(slots
            .iter()
            .filter(|info| info.state == ProgramState::Empty)
            .map(|info| info.slot)
            .collect())
    }

    async fn state(&self, slot: Slot) -> Result<ProgramState, Halt> {
        let slots = self.offload()?.programs().await?;
        slots
            .iter()
            .find(|info| info.slot == slot)
            .map(|info| info.state)
            .ok_or_else(|| Halt::failed(format!("slot {} is not listed", slot.0)))
    }

    async fn load(&self, slot: Slot, program: &Program) -> Result<ProgramInfo, Halt> {
        Ok(self.offload()?.load(self.fence(), slot, program).await?)
    }

    /// Loads the first program, runs it and gives its exact table.
    async fn running_table(&self) -> Result<TableInfo, Halt> {
        let slot = self.first_free().await?;
        self.load(slot, self.program(0)?).await?;
        self.offload()?.activate(self.fence(), slot).await?;
        let tables = self.offload()?.tables().await?;
        tables
            .into_iter()
            .find(|table| table.kind == TableKind::Exact)
            .ok_or_else(|| Halt::failed("the first program has no exact table"))
    }

    async fn first_free(&self) -> Result<Slot, Halt> {
        let free = self.free_slots().await?;
        free.first()
            .copied()
            .ok_or_else(|| Halt::failed("a fresh card has no free slot"))
    }

    async fn write(&self, table: TableId, writes: &[TableWrite]) -> Result<Vec<Result<(), ErrorKind>>, Halt> {
        let results = self.offload()?.write(self.fence(), table, writes).await?;
        ensure_eq!(results.len(), writes.len(), "results of so many writes");
        Ok(results
            .into_iter()
            .map(|result| result.map_err(|error| error.kind))
            .collect())
    }
}

pub(super) async fn the_claimed_slots_are_listed_in_order(rig: &dyn Rig) -> CaseResult {
    let np = Np::of(rig);
    let slots = np.offload()?.programs().await?;
    let claimed = np.backend.capabilities().offload.slots as usize;
    ensure_eq!(slots.len(), claimed, "slots listed");
    ensure!(
        slots.windows(2).all(|pair| pair[0].slot < pair[1].slot),
        "slots are not in order: {slots:?}"
    );
    Ok(())
}

pub(super) async fn loading_leaves_the_running_program_alone(rig: &dyn Rig) -> CaseResult {
    let np = Np::of(rig);
    let before = np.offload()?.programs().await?;
    let slot = np.first_free().await?;
    let info = np.load(slot, np.program(0)?).await?;
    ensure_eq!(info.state, ProgramState::Loaded, "state after loading");
    ensure_eq!(info.slot, slot, "slot");
    let named = info.program.as_ref().map(|(name, _, hash)| (name, hash));
    let program = np.program(0)?;
    ensure_eq!(named, Some((&program.name, &program.hash)), "program in the slot");
    for (was, is) in before.iter().zip(np.offload()?.programs().await?) {
        let expected = if was.slot == slot { &info } else { was };
        ensure_eq!(is, *expected, "slot {}", was.slot.0);
    }
    Ok(())
}

pub(super) async fn loading_the_same_again_succeeds(rig: &dyn Rig) -> CaseResult {
    let np = Np::of(rig);
    let slot = np.first_free().await?;
    let first = np.load(slot, np.program(0)?).await?;
    ensure_eq!(np.load(slot, np.program(0)?).await?, first, "slot loaded again");
    Ok(())
}

pub(super) async fn a_slot_in_use_is_busy(rig: &dyn Rig) -> CaseResult {
    let np = Np::of(rig);
    let slot = np.first_free().await?;
    np.load(slot, np.program(0)?).await?;
    let before = np.offload()?.programs().await?;
    let answer = np.offload()?.load(np.fence(), slot, np.program(1)?).await;
    refused(answer, "offload.load", ErrorKind::Busy)?;
    ensure_eq!(np.offload()?.programs().await?, before, "slots after the refusal");
    Ok(())
}

pub(super) async fn a_hash_that_differs_is_invalid_and_loads_nothing(rig: &dyn Rig) -> CaseResult {
    let np = Np::of(rig);
    let slot = np.first_free().await?;
    let mut program = np.program(0)?.clone();
    match program.hash.0.first_mut() {
        Some(octet) => *octet ^= 1,
        None => program.hash.0.push(1),
    }
    let answer = np.offload()?.load(np.fence(), slot, &program).await;
    let error = refused(answer, "offload.load", ErrorKind::Invalid)?;
    let field = error.object.as_ref().map_or("", |object| &object.field);
    ensure!(
        field.ends_with("hash"),
        "the error names field `{field}`, not the hash"
    );
    ensure_eq!(
        np.state(slot).await?,
        ProgramState::Empty,
        "state after the refusal"
    );
    Ok(())
}

pub(super) async fn an_image_too_large_exceeds_the_capacity(rig: &dyn Rig) -> CaseResult {
    let np = Np::of(rig);
    let limit = np.backend.capabilities().offload.max_image;
    if limit > 64 << 20 {
        return Err(Halt::not_supported(
            "offload.max_image",
            format!("{limit} octets are claimed; the kit makes images of up to 64 MiB"),
        ));
    }
    let slot = np.first_free().await?;
    let mut program = np.program(0)?.clone();
    program.image.resize(limit as usize + 1, 0);
    let answer = np.offload()?.load(np.fence(), slot, &program).await;
    let error = refused(answer, "offload.load", ErrorKind::CapacityExceeded)?;
    let name = error.object.as_ref().map_or("", |object| &object.name);
    ensure_eq!(name, "offload.max_image", "resource that the error names");
    ensure_eq!(
        np.state(slot).await?,
        ProgramState::Empty,
        "state after the refusal"
    );
    Ok(())
}

pub(super) async fn a_slot_that_is_not_there_is_not_found(rig: &dyn Rig) -> CaseResult {
    let np = Np::of(rig);
    let (offload, fence, nowhere) = (np.offload()?, np.fence(), Slot(u32::MAX));
    let answer = offload.load(fence, nowhere, np.program(0)?).await;
    refused(answer, "offload.load", ErrorKind::NotFound)?;
    refused(
        offload.activate(fence, nowhere).await,
        "offload.activate",
        ErrorKind::NotFound,
    )?;
    refused(
        offload.unload(fence, nowhere).await,
        "offload.unload",
        ErrorKind::NotFound,
    )?;
    Ok(())
}

pub(super) async fn activating_an_empty_slot_is_not_found(rig: &dyn Rig) -> CaseResult {
    let np = Np::of(rig);
    let slot = np.first_free().await?;
    let before = np.offload()?.programs().await?;
    let answer = np.offload()?.activate(np.fence(), slot).await;
    refused(answer, "offload.activate", ErrorKind::NotFound)?;
    ensure_eq!(np.offload()?.programs().await?, before, "slots after the refusal");
    Ok(())
}

/// The first program running, the second loaded beside it.
async fn two_loaded(np: &Np) -> Result<(Slot, Slot), Halt> {
    let free = np.free_slots().await?;
    let [first, second, ..] = free[..] else {
        return Err(Halt::not_supported("offload.slots", "two free slots are needed"));
    };
    np.load(first, np.program(0)?).await?;
    np.offload()?.activate(np.fence(), first).await?;
    np.load(second, np.program(1)?).await?;
    Ok((first, second))
}

pub(super) async fn activating_drains_the_former_and_can_be_rolled_back(rig: &dyn Rig) -> CaseResult {
    let np = Np::of(rig);
    let (first, second) = two_loaded(&np).await?;
    ensure_eq!(np.state(first).await?, ProgramState::Running, "first program");
    np.offload()?.activate(np.fence(), second).await?;
    ensure_eq!(np.state(second).await?, ProgramState::Running, "second program");
    let former = np.state(first).await?;
    ensure!(
        matches!(former, ProgramState::Draining | ProgramState::Loaded),
        "the former program is {former:?}"
    );
    np.offload()?.activate(np.fence(), first).await?;
    ensure_eq!(
        np.state(first).await?,
        ProgramState::Running,
        "first program again"
    );
    let slots = np.offload()?.programs().await?;
    let running = slots
        .iter()
        .filter(|info| info.state == ProgramState::Running)
        .count();
    ensure_eq!(running, 1, "running programs");
    Ok(())
}

pub(super) async fn a_running_program_cannot_be_unloaded(rig: &dyn Rig) -> CaseResult {
    let np = Np::of(rig);
    let slot = np.first_free().await?;
    np.load(slot, np.program(0)?).await?;
    np.offload()?.activate(np.fence(), slot).await?;
    refused(
        np.offload()?.unload(np.fence(), slot).await,
        "offload.unload",
        ErrorKind::Busy,
    )?;
    ensure_eq!(
        np.state(slot).await?,
        ProgramState::Running,
        "state after the refusal"
    );
    Ok(())
}

pub(super) async fn unloading_is_idempotent_and_frees_the_slot(rig: &dyn Rig) -> CaseResult {
    let np = Np::of(rig);
    let slot = np.first_free().await?;
    np.load(slot, np.program(0)?).await?;
    np.offload()?.unload(np.fence(), slot).await?;
    ensure_eq!(
        np.state(slot).await?,
        ProgramState::Empty,
        "state after unloading"
    );
    np.offload()?.unload(np.fence(), slot).await?;
    np.load(slot, np.program(1)?).await?;
    Ok(())
}

pub(super) async fn a_former_program_can_be_unloaded(rig: &dyn Rig) -> CaseResult {
    let np = Np::of(rig);
    let (first, second) = two_loaded(&np).await?;
    np.offload()?.activate(np.fence(), second).await?;
    np.offload()?.unload(np.fence(), first).await?;
    ensure_eq!(np.state(first).await?, ProgramState::Empty, "the former's slot");
    ensure_eq!(
        np.state(second).await?,
        ProgramState::Running,
        "the running program"
    );
    Ok(())
}

fn entry(table: &TableInfo, i: u64) -> TableEntry {
    let mut key = vec![0; usize::from(table.key_len)];
    for (octet, digit) in key.iter_mut().rev().zip(i.to_le_bytes()) {
        *octet = digit;
    }
    TableEntry {
        key,
        mask: None,
        priority: 0,
        value: vec![i as u8; usize::from(table.value_len)],
    }
}

fn put(entry: TableEntry) -> TableWrite {
    TableWrite::Put(entry)
}

pub(super) async fn entries_are_read_in_key_order(rig: &dyn Rig) -> CaseResult {
    let np = Np::of(rig);
    let table = np.running_table().await?;
    ensure!(
        np.offload()?.read(table.id).await?.is_empty(),
        "a fresh table has entries"
    );
    let writes: Vec<TableWrite> = [3, 1, 2].map(|i| put(entry(&table, i))).into();
    ensure_eq!(np.write(table.id, &writes).await?, vec![Ok(()); 3], "writes");
    let expected: Vec<TableEntry> = [1, 2, 3].map(|i| entry(&table, i)).into();
    ensure_eq!(np.offload()?.read(table.id).await?, expected, "entries read");
    let used = np.offload()?.tables().await?;
    let used = used.iter().find(|info| info.id == table.id).map(|info| info.used);
    ensure_eq!(used, Some(3), "entries in use");
    ensure_eq!(np.offload()?.stats().await?.entries, 3, "entries in the numbers");
    Ok(())
}

pub(super) async fn put_replaces_and_delete_of_nothing_succeeds(rig: &dyn Rig) -> CaseResult {
    let np = Np::of(rig);
    let table = np.running_table().await?;
    let mut changed = entry(&table, 1);
    changed.value.fill(0xee);
    let writes = [
        put(entry(&table, 1)),
        put(changed.clone()),
        TableWrite::Delete(entry(&table, 9)),
        put(entry(&table, 2)),
        TableWrite::Delete(TableEntry {
            value: Vec::new(),
            ..entry(&table, 2)
        }),
    ];
    ensure_eq!(np.write(table.id, &writes).await?, vec![Ok(()); 5], "writes");
    ensure_eq!(np.offload()?.read(table.id).await?, vec![changed], "entries read");
    ensure_eq!(
        np.write(table.id, &writes).await?,
        vec![Ok(()); 5],
        "the same writes again"
    );
    Ok(())
}

pub(super) async fn writes_continue_past_failures(rig: &dyn Rig) -> CaseResult {
    let np = Np::of(rig);
    let table = np.running_table().await?;
    let mut long_key = entry(&table, 2);
    long_key.key.push(0);
    let mut long_value = entry(&table, 3);
    long_value.value.push(0);
    let mut masked = entry(&table, 4);
    masked.mask = Some(vec![0xf0; usize::from(table.key_len)]);
    let writes = [
        put(entry(&table, 1)),
        put(long_key),
        put(long_value),
        put(masked),
        put(entry(&table, 5)),
    ];
    let expected = vec![
        Ok(()),
        Err(ErrorKind::Invalid),
        Err(ErrorKind::Invalid),
        Err(ErrorKind::Unsupported),
        Ok(()),
    ];
    ensure_eq!(np.write(table.id, &writes).await?, expected, "results");
    let expected: Vec<TableEntry> = [1, 5].map(|i| entry(&table, i)).into();
    ensure_eq!(np.offload()?.read(table.id).await?, expected, "entries read");
    Ok(())
}

pub(super) async fn a_table_that_is_not_there_is_not_found(rig: &dyn Rig) -> CaseResult {
    let np = Np::of(rig);
    let table = np.running_table().await?;
    let nowhere = TableId(u32::MAX);
    let writes = [put(entry(&table, 1))];
    let answer = np.offload()?.write(np.fence(), nowhere, &writes).await;
    refused(answer, "offload.write", ErrorKind::NotFound)?;
    refused(
        np.offload()?.read(nowhere).await,
        "offload.read",
        ErrorKind::NotFound,
    )?;
    Ok(())
}

pub(super) async fn a_table_holds_what_it_says(rig: &dyn Rig) -> CaseResult {
    let np = Np::of(rig);
    let table = np.running_table().await?;
    let claims = np.backend.capabilities().offload;
    let capacity = table.capacity.min(claims.entries);
    if capacity > FILL_LIMIT || table.key_len < 4 {
        return Err(Halt::not_supported(
            "offload.entries",
            format!(
                "{capacity} entries under keys of {} octets; the kit fills up to {FILL_LIMIT}",
                table.key_len
            ),
        ));
    }
    let writes: Vec<TableWrite> = (0..capacity).map(|i| put(entry(&table, i))).collect();
    for chunk in writes.chunks(512) {
        let results = np.write(table.id, chunk).await?;
        ensure!(
            results.iter().all(Result::is_ok),
            "not all {capacity} entries fit"
        );
    }
    let results = np
        .write(table.id, &[put(entry(&table, capacity)), put(entry(&table, 0))])
        .await?;
    ensure_eq!(
        results,
        vec![Err(ErrorKind::CapacityExceeded), Ok(())],
        "one more, and one that replaces"
    );
    ensure_eq!(
        np.offload()?.read(table.id).await?.len() as u64,
        capacity,
        "entries read"
    );
    Ok(())
}

fn connection(port: PortRef, i: u16, kind: ConnectionKind) -> Connection {
    let leg = |host: u8, far: u8| ConnectionLeg {
        port,
        local: SocketAddr::from((Ipv4Addr::new(10, 0, 0, host), 15001)),
        remote: SocketAddr::from((Ipv4Addr::new(10, 0, 1, far), 20000 + i)),
        send_next: 1000,
        receive_next: 2000,
    };
    Connection {
        downstream: leg(1, 1),
        upstream: leg(2, 2),
        kind,
    }
}

const KINDS: [(ConnectionKinds, ConnectionKind); 3] = [
    (ConnectionKinds::SPLICE, ConnectionKind::Splice),
    (ConnectionKinds::TLS_RECORDS, ConnectionKind::TlsRecords),
    (ConnectionKinds::REWRITE, ConnectionKind::Rewrite),
];

async fn first_connection(rig: &dyn Rig) -> Result<Connection, Halt> {
    let claims = rig.soc().capabilities().offload;
    let kind = KINDS
        .into_iter()
        .find(|(flag, _)| claims.connection_kinds.contains(*flag))
        .map(|(_, kind)| kind)
        .ok_or_else(|| Halt::not_supported("offload.connection_kinds", "no connection can be offloaded"))?;
    Ok(connection(some_port(rig).await?, 0, kind))
}

pub(super) async fn a_token_is_good_once(rig: &dyn Rig) -> CaseResult {
    let np = Np::of(rig);
    let given = first_connection(rig).await?;
    let token = np.offload()?.offload_connection(np.fence(), &given).await?;
    ensure_eq!(np.offload()?.stats().await?.connections, 1, "connections carried");
    let state = np.offload()?.resume(np.fence(), token).await?;
    ensure_eq!(
        state.connection.downstream.remote,
        given.downstream.remote,
        "client of the state"
    );
    ensure_eq!(
        state.connection.upstream.remote,
        given.upstream.remote,
        "server of the state"
    );
    ensure_eq!((state.octets_up, state.octets_down), (0, 0), "octets passed");
    let answer = np.offload()?.resume(np.fence(), token).await;
    refused(answer, "offload.resume", ErrorKind::NotFound)?;
    let stats = np.offload()?.stats().await?;
    ensure_eq!(
        (stats.connections, stats.connections_total),
        (0, 1),
        "connections carried and ever taken"
    );
    let again = np.offload()?.offload_connection(np.fence(), &given).await?;
    ensure!(again != token, "a token was given twice");
    Ok(())
}

pub(super) async fn offloading_a_connection_twice_exists(rig: &dyn Rig) -> CaseResult {
    let np = Np::of(rig);
    let given = first_connection(rig).await?;
    np.offload()?.offload_connection(np.fence(), &given).await?;
    let answer = np.offload()?.offload_connection(np.fence(), &given).await;
    refused(answer, "offload.offload_connection", ErrorKind::Exists)?;
    ensure_eq!(np.offload()?.stats().await?.connections, 1, "connections carried");
    Ok(())
}

pub(super) async fn a_connection_of_no_port_is_not_found(rig: &dyn Rig) -> CaseResult {
    let np = Np::of(rig);
    let mut given = first_connection(rig).await?;
    given.upstream.port = NO_PORT;
    let answer = np.offload()?.offload_connection(np.fence(), &given).await;
    refused(answer, "offload.offload_connection", ErrorKind::NotFound)?;
    ensure_eq!(np.offload()?.stats().await?.connections, 0, "connections carried");
    Ok(())
}

pub(super) async fn claimed_kinds_of_connections_are_taken_and_no_others(rig: &dyn Rig) -> CaseResult {
    let np = Np::of(rig);
    let claims = np.backend.capabilities().offload;
    let port = some_port(rig).await?;
    for (i, (flag, kind)) in KINDS.into_iter().enumerate() {
        let given = connection(port, i as u16, kind);
        let answer = np.offload()?.offload_connection(np.fence(), &given).await;
        if claims.connection_kinds.contains(flag) {
            np.offload()?.resume(np.fence(), answer?).await?;
        } else {
            refused(answer, "offload.offload_connection", ErrorKind::Unsupported)?;
        }
    }
    Ok(())
}

pub(super) async fn the_claimed_connections_are_carried(rig: &dyn Rig) -> CaseResult {
    let np = Np::of(rig);
    let given = first_connection(rig).await?;
    let limit = np.backend.capabilities().offload.connections;
    if limit > FILL_LIMIT {
        return Err(Halt::not_supported(
            "offload.connections",
            format!("{limit} are claimed; the kit makes up to {FILL_LIMIT}"),
        ));
    }
    let port = given.downstream.port;
    let mut tokens = std::collections::HashSet::new();
    for i in 0..limit {
        let given = connection(port, i as u16, given.kind);
        let token = np.offload()?.offload_connection(np.fence(), &given).await?;
        ensure!(tokens.insert(token), "a token was given twice");
    }
    let beyond = connection(port, limit as u16, given.kind);
    let answer = np.offload()?.offload_connection(np.fence(), &beyond).await;
    let error = refused(answer, "offload.offload_connection", ErrorKind::CapacityExceeded)?;
    let name = error.object.as_ref().map_or("", |object| &object.name);
    ensure_eq!(name, "offload.connections", "resource that the error names");
    if let Some(token) = tokens.into_iter().next() {
        np.offload()?.resume(np.fence(), token).await?;
        np.offload()?.offload_connection(np.fence(), &beyond).await?;
    }
    Ok(())
}

pub(super) async fn a_stale_fence_offloads_nothing(rig: &dyn Rig) -> CaseResult {
    let np = Np::of(rig);
    let table = np.running_table().await?;
    let old = Fence(Epoch(np.backend.epoch().0.wrapping_sub(1)));
    let before = np.offload()?.programs().await?;
    let offload = np.offload()?;
    let slot = Slot(0);
    refused(
        offload.load(old, slot, np.program(1)?).await,
        "offload.load",
        ErrorKind::Stale,
    )?;
    refused(
        offload.activate(old, slot).await,
        "offload.activate",
        ErrorKind::Stale,
    )?;
    refused(
        offload.unload(old, slot).await,
        "offload.unload",
        ErrorKind::Stale,
    )?;
    let writes = [put(entry(&table, 1))];
    refused(
        offload.write(old, table.id, &writes).await,
        "offload.write",
        ErrorKind::Stale,
    )?;
    ensure_eq!(offload.programs().await?, before, "slots after the refusals");
    ensure!(
        offload.read(table.id).await?.is_empty(),
        "a stale write took effect"
    );
    if let Ok(given) = first_connection(rig).await {
        let answer = offload.offload_connection(old, &given).await;
        refused(answer, "offload.offload_connection", ErrorKind::Stale)?;
        let token = offload.offload_connection(np.fence(), &given).await?;
        refused(
            offload.resume(old, token).await,
            "offload.resume",
            ErrorKind::Stale,
        )?;
        offload.resume(np.fence(), token).await?;
    }
    Ok(())
}

pub(super) async fn a_fault_of_an_activation_leaves_the_old_program_running(rig: &dyn Rig) -> CaseResult {
    let np = Np::of(rig);
    let (first, second) = two_loaded(&np).await?;
    let tables = np.offload()?.tables().await?;
    disturb(rig, Disturbance::ActivationFails(true)).await?;
    let answer = np.offload()?.activate(np.fence(), second).await;
    refused(answer, "offload.activate", ErrorKind::Fault)?;
    ensure_eq!(np.state(first).await?, ProgramState::Running, "the old program");
    ensure_eq!(
        np.state(second).await?,
        ProgramState::Loaded,
        "the program that did not start"
    );
    ensure_eq!(np.offload()?.tables().await?, tables, "tables of the old program");
    disturb(rig, Disturbance::ActivationFails(false)).await?;
    np.offload()?.activate(np.fence(), second).await?;
    ensure_eq!(
        np.state(second).await?,
        ProgramState::Running,
        "the program at the second try"
    );
    Ok(())
}

pub(super) async fn a_resumed_connection_tells_what_was_passed(rig: &dyn Rig) -> CaseResult {
    const UP: u32 = 1000;
    const DOWN: u32 = 70;
    let np = Np::of(rig);
    let given = first_connection(rig).await?;
    let token = np.offload()?.offload_connection(np.fence(), &given).await?;
    let what = Disturbance::Passed {
        token,
        up: UP,
        down: DOWN,
    };
    disturb(rig, what).await?;
    let state = np.offload()?.resume(np.fence(), token).await?;
    ensure_eq!(
        (state.octets_up, state.octets_down),
        (u64::from(UP), u64::from(DOWN)),
        "octets passed up and down"
    );
    let moved = |leg: &ConnectionLeg, sent: u32, received: u32| ConnectionLeg {
        send_next: leg.send_next.wrapping_add(sent),
        receive_next: leg.receive_next.wrapping_add(received),
        ..leg.clone()
    };
    ensure_eq!(
        state.connection.downstream,
        moved(&given.downstream, DOWN, UP),
        "the client's leg"
    );
    ensure_eq!(
        state.connection.upstream,
        moved(&given.upstream, UP, DOWN),
        "the server's leg"
    );
    Ok(())
}

pub(super) async fn a_connection_ends_with_the_cards_life(rig: &dyn Rig) -> CaseResult {
    let np = Np::of(rig);
    let given = first_connection(rig).await?;
    let token = np.offload()?.offload_connection(np.fence(), &given).await?;
    let Some(reset) = rig.reset() else {
        return Err(Halt::not_supported(
            "rig.reset",
            "the fixture cannot reset the card",
        ));
    };
    reset.lose().await?;
    reset.bring_back().await?;
    let answer = np.offload()?.resume(np.fence(), token).await;
    refused_as(answer, "offload.resume", &[ErrorKind::NotFound, ErrorKind::Stale])?;
    let stats = np.offload()?.stats().await?;
    ensure_eq!(stats.connections, 0, "connections carried in the new life");
    let given = first_connection(rig).await?;
    let again = np.offload()?.offload_connection(np.fence(), &given).await?;
    np.offload()?.resume(np.fence(), again).await?;
    Ok(())
}

pub(super) async fn the_numbers_follow_what_is_carried(rig: &dyn Rig) -> CaseResult {
    let np = Np::of(rig);
    let given = first_connection(rig).await?;
    let offload = np.offload()?;
    let before = offload.stats().await?;
    let other = connection(given.downstream.port, 1, given.kind);
    let most = np.backend.capabilities().offload.connections.min(2);
    let mut tokens = Vec::new();
    for given in [&given, &other].into_iter().take(most as usize) {
        tokens.push(offload.offload_connection(np.fence(), given).await?);
        let stats = offload.stats().await?;
        ensure_eq!(stats.connections, tokens.len() as u64, "connections carried");
        ensure_eq!(
            stats.connections_total,
            before.connections_total + tokens.len() as u64,
            "connections ever taken"
        );
    }
    let taken = tokens.len() as u64;
    for token in tokens {
        offload.resume(np.fence(), token).await?;
    }
    let stats = offload.stats().await?;
    ensure_eq!(
        (stats.connections, stats.connections_total),
        (0, before.connections_total + taken),
        "connections carried and ever taken, when all were taken back"
    );
    Ok(())
}

pub(super) async fn each_kind_of_table_keeps_what_is_written(rig: &dyn Rig) -> CaseResult {
    let np = Np::of(rig);
    let mut former = None;
    for program in &np.programs {
        let slot = np.first_free().await?;
        np.load(slot, program).await?;
        np.offload()?.activate(np.fence(), slot).await?;
        if let Some(former) = former.replace(slot) {
            np.offload()?.unload(np.fence(), former).await?;
        }
        for table in np.offload()?.tables().await? {
            keeps_what_is_written(&np, &table).await?;
        }
    }
    Ok(())
}

async fn keeps_what_is_written(np: &Np, table: &TableInfo) -> CaseResult {
    let of = format!("table {} ({:?})", table.name, table.kind);
    let before = np.offload()?.read(table.id).await?;
    if table.kind == TableKind::Counter {
        let results = np.write(table.id, &[put(entry(table, 1))]).await?;
        ensure!(
            results[0].is_err(),
            "{of}: counts are read-only, but one was written"
        );
        let after = np.offload()?.read(table.id).await?;
        ensure_eq!(after.len(), before.len(), "{of}: entries after a refused write");
        return Ok(());
    }
    let mut entries = [entry(table, 1), entry(table, 2)];
    match table.kind {
        // The same leading bits, more and fewer of them.
        TableKind::Lpm => {
            for (entry, octets) in entries.iter_mut().zip([1, 2]) {
                entry.key.fill(0);
                let bits = (0..entry.key.len()).map(|i| if i < octets { 0xff } else { 0 });
                entry.mask = Some(bits.collect());
            }
        }
        // The same key and mask, of different rank.
        TableKind::Ternary => {
            for (entry, priority) in entries.iter_mut().zip([1, 2]) {
                entry.key.fill(0);
                entry.mask = Some(vec![0xf0; entry.key.len()]);
                entry.priority = priority;
            }
        }
        _ => {}
    }
    let writes = entries.clone().map(put);
    ensure_eq!(
        np.write(table.id, &writes).await?,
        vec![Ok(()); 2],
        "{of}: writes"
    );
    let found = np.offload()?.read(table.id).await?;
    for entry in &entries {
        ensure!(
            found.contains(entry),
            "{of}: {entry:?} was written, {found:?} is read"
        );
    }
    ensure_eq!(found.len(), before.len() + 2, "{of}: entries read");
    let deletes = entries.map(TableWrite::Delete);
    ensure_eq!(
        np.write(table.id, &deletes).await?,
        vec![Ok(()); 2],
        "{of}: deletes"
    );
    let found = np.offload()?.read(table.id).await?;
    ensure_eq!(found, before, "{of}: entries after the deletes");
    Ok(())
}
