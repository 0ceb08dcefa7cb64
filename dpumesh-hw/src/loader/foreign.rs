//! [`Foreign`]: a card of a foreign library as a [`Backend`]. Each method puts its request, makes the call, gets the answer.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use async_trait::async_trait;
use dpumesh_core::backend::EventStream;
use dpumesh_core::offload::{
    Connection, ConnectionState, ConnectionToken, OffloadStats, Program, ProgramInfo, Slot, TableEntry,
    TableId, TableInfo, TableWrite,
};
use dpumesh_core::port::PortIoLimits;
use dpumesh_core::steering::{
    Batch, BatchOutcome, Cookie, Counters, InstalledRule, MissPolicy, Occupancy, Owner, SteeringRule, Verdict,
};
use dpumesh_core::vf::{
    AttachedVf, Attachment, Disruption, LeaseOwner, Released, ResetLevel, VfConfig, VfCount, VfLease,
    VfRequest, VfState,
};
use dpumesh_core::{
    Backend, BackendInfo, Capabilities, Epoch, Error, ErrorKind, Event, Fence, FlowSteering, Frame, HEADROOM,
    NpOffload, PfIndex, PortInfo, PortIo, PortRef, Ports, Result, ShmTransport, VfAllocator,
};

use super::abi::*;
use super::arena::{Arena, Broken, Reader, Rows, Sized32};
use super::codec::*;
use super::driver::{Driver, Enter, Exchange, Listing};
use super::watch::{Operation, Seat};
use crate::events::{EventHub, HubStream};

/// Octets for texts in an answer that has effects and so cannot be asked for again.
const ROOM: usize = 4096;
/// Elements that a listing has room for at first.
const ELEMENTS: usize = 64;
/// Octets that an element's texts and lists have at first.
const ELEMENT: usize = 512;
/// How often a listing that grew meanwhile is asked for again.
const TRIES: usize = 8;

/// A card of a foreign library.
#[derive(Debug)]
pub(super) struct Foreign {
    alive: Arc<Alive>,
    info: BackendInfo,
    parts: u32,
    last: Mutex<Capabilities>,
    /// Memory of a batch that was carried out, for the next one.
    spare: Mutex<Option<Box<BatchExchange>>>,
    hub: Arc<EventHub>,
}

type BatchExchange = Exchange<dm_batch, Outcome>;

/// Closes the card when the backend and its ports are gone.
#[derive(Debug)]
struct Alive(Arc<Driver>);

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl Foreign {
    /// A card that was opened and whose claims were checked.
    pub(super) fn new(
        driver: Arc<Driver>,
        hub: Arc<EventHub>,
        info: BackendInfo,
        parts: u32,
        capabilities: Capabilities,
    ) -> Self {
        Self {
            alive: Arc::new(Alive(driver)),
            info,
            parts,
            last: Mutex::new(capabilities),
            spare: Mutex::default(),
            hub,
        }
    }

    fn driver(&self) -> &Arc<Driver> {
        &self.alive.0
    }

    fn has(&self, part: u32) -> bool {
        self.parts & part != 0
    }

    /// A call with one struct each way.
    async fn exchange<I: 'static, O: Sized32 + 'static>(
        &self,
        operation: &'static str,
        fence: Option<Fence>,
        request: Arena,
        input: I,
        enter: Enter<I, O>,
    ) -> Result<Box<Exchange<I, O>>> {
        let room = ROOM + request.used() as usize; // texts of the request may come back
        let exchange = Exchange::new(request, input, O::empty(), room);
        self.driver().call(operation, fence, exchange, enter).await
    }

    /// What a call's answer was read as.
    fn read<T>(&self, operation: &'static str, fence: Option<Fence>, read: Result<T, Broken>) -> Result<T> {
        read.map_err(|broken| self.driver().broken(operation, fence.is_some(), broken))
    }

    /// A call whose answer is a list: asked for again with more room until it fits.
    async fn listing<I: 'static, E: Sized32, T>(
        &self,
        operation: &'static str,
        expected: usize,
        request: impl Fn(&mut Arena) -> I,
        enter: Enter<I, Listing>,
        get: impl Fn(&E, &Reader) -> Result<T, Broken>,
    ) -> Result<Vec<T>> {
        let (mut elements, mut room) = (expected, expected * ELEMENT);
        for _ in 0..TRIES {
            let mut arena = Arena::growing();
            let input = request(&mut arena);
            let exchange = Exchange::new(arena, input, Listing::of::<E>(elements), room);
            let exchange = self.driver().call(operation, None, exchange, enter).await?;
            let len = exchange.output.raw.len;
            if let Some(needed) = exchange.wants_more() {
                if len > 1 << 28 || needed > 1 << 32 {
                    let broken = format!("an answer of {len} elements and {needed} octets");
                    return Err(self.driver().broken(operation, false, broken));
                }
                // A little more than asked for: what is listed may grow meanwhile.
                elements = elements.max(len as usize + len as usize / 8);
                room = room.max(needed + needed / 8) + ELEMENT;
                continue;
            }
            let reader = exchange.reader();
            let read = exchange.output.rows.read::<E>(len, operation);
            let read =
                read.and_then(|elements| elements.iter().map(|element| get(element, &reader)).collect());
            return self.read(operation, None, read);
        }
        let message = "the answer grew each time that it was asked for";
        Err(Error::new(ErrorKind::Busy, operation, message).backend(self.info.name.clone()))
    }

    fn unsayable(&self, operation: &'static str, field: &'static str) -> Error {
        let message = "cannot be said over the C interface";
        Error::new(ErrorKind::Unsupported, operation, message)
            .backend(self.info.name.clone())
            .field(field)
    }

    /// A batch that is too long for the interface's numbers, or has an element without a code, is refused here.
    async fn order(
        &self,
        operation: &'static str,
        fence: Fence,
        lease: &VfLease,
        fill: impl FnOnce(&mut dm_vf_order, &mut Arena),
        enter: Enter<dm_vf_order, dm_number>,
    ) -> Result<dm_number> {
        let mut arena = Arena::growing();
        let mut order = put_order(Some(lease), &mut arena);
        fill(&mut order, &mut arena);
        let exchange = self.exchange(operation, Some(fence), arena, order, enter).await?;
        Ok(exchange.output)
    }
}

/// Enters a function of the table, whose presence was checked when the library was loaded.
macro_rules! enter {
    ($name:ident, $in:ty, $out:ty) => {{
        unsafe fn enter(
            ops: &dm_ops,
            handle: u64,
            call: *mut dm_call,
            input: *mut $in,
            output: *mut $out,
        ) -> u32 {
            let Some(function) = ops.$name else {
                return DM_EMPTY;
            };
            // SAFETY: the caller of `enter` upholds the table's contract: live handle, memory for the call.
            unsafe { function(handle, call, input, output) }
        }
        enter
    }};
    ($name:ident, $in:ty) => {{
        unsafe fn enter(
            ops: &dm_ops,
            handle: u64,
            call: *mut dm_call,
            input: *mut $in,
            _: *mut dm_number,
        ) -> u32 {
            let Some(function) = ops.$name else {
                return DM_EMPTY;
            };
            // SAFETY: as above.
            unsafe { function(handle, call, input) }
        }
        enter
    }};
    ($name:ident, $in:ty => rows) => {{
        unsafe fn enter(
            ops: &dm_ops,
            handle: u64,
            call: *mut dm_call,
            input: *mut $in,
            output: *mut Listing,
        ) -> u32 {
            let Some(function) = ops.$name else {
                return DM_EMPTY;
            };
            // SAFETY: as above.
            unsafe { function(handle, call, input, &raw mut (*output).raw) }
        }
        enter
    }};
    ($name:ident => rows) => {{
        unsafe fn enter(
            ops: &dm_ops,
            handle: u64,
            call: *mut dm_call,
            _: *mut (),
            output: *mut Listing,
        ) -> u32 {
            let Some(function) = ops.$name else {
                return DM_EMPTY;
            };
            // SAFETY: as above.
            unsafe { function(handle, call, &raw mut (*output).raw) }
        }
        enter
    }};
}

impl Backend for Foreign {
    fn info(&self) -> BackendInfo {
        self.info.clone()
    }

    fn capabilities(&self) -> Capabilities {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let (driver, mut raw) = (self.driver(), dm_capabilities::empty());
        if driver.has_failed() {
            return last.clone();
        }
        if let Some(capabilities) = driver.ops.capabilities {
            let _inside = driver.watch.enter(Operation::CAPABILITIES);
            // SAFETY: the handle is open and the room is ours.
            unsafe { capabilities(driver.handle, &raw mut raw) };
        }
        match get_capabilities(&raw) {
            Ok(now) => *last = now,
            Err(broken) => tracing::warn!(
                backend = self.info.name,
                broken,
                "capabilities make no sense: the last ones stay"
            ),
        }
        last.clone()
    }

    fn epoch(&self) -> Epoch {
        Epoch(self.driver().epoch())
    }

    fn vf(&self) -> Option<&dyn VfAllocator> {
        self.has(DM_PART_VF).then_some(self as _)
    }

    fn steering(&self) -> Option<&dyn FlowSteering> {
        self.has(DM_PART_STEERING).then_some(self as _)
    }

    fn offload(&self) -> Option<&dyn NpOffload> {
        self.has(DM_PART_OFFLOAD).then_some(self as _)
    }

    /// Channels over shared memory are software of the host: they do not cross the interface.
    fn transport(&self) -> Option<&dyn ShmTransport> {
        None
    }

    fn ports(&self) -> Option<&dyn Ports> {
        self.has(DM_PART_PORTS).then_some(self as _)
    }

    fn events(&self) -> Box<dyn EventStream> {
        // What happened before now is not for the new subscriber.
        self.driver().pump_events();
        Box::new(Stream {
            driver: Arc::downgrade(self.driver()),
            queue: self.hub.subscribe(),
            since: self.epoch(),
        })
    }
}

/// A subscription to a foreign card's events.
#[derive(Debug)]
struct Stream {
    driver: Weak<Driver>,
    queue: HubStream,
    /// The card's life when it began.
    since: Epoch,
}

impl Stream {
    /// True for what was over before the subscription began: a library whose backend has to look at its card for what
    /// happened hands it over late.
    fn is_past(&self, event: &Event) -> bool {
        match event {
            Event::Lost { epoch } => *epoch < self.since,
            Event::Back { epoch } => *epoch <= self.since,
            _ => false,
        }
    }
}

#[async_trait]
impl EventStream for Stream {
    async fn next(&mut self) -> Option<Event> {
        // What the library has by now comes before what its thread brings later: one gap is told, not two.
        if let Some(driver) = self.driver.upgrade() {
            driver.ask_for_events().await;
        }
        loop {
            match self.queue.next().await {
                Some(event) if self.is_past(&event) => {}
                event => return event,
            }
        }
    }
}

#[async_trait]
impl VfAllocator for Foreign {
    async fn plan_vf_count(&self, pf: PfIndex, count: u16) -> Result<Disruption> {
        let operation = "vf.plan_vf_count";
        let want = put_vf_count(pf, count, Disruption::None);
        let enter = enter!(vf_plan_count, dm_vf_count, dm_number);
        let exchange = self
            .exchange(operation, None, Arena::growing(), want, enter)
            .await?;
        let what = "disruption";
        let read = code(&exchange.output, what).and_then(|code| get_disruption(code, what));
        self.read(operation, None, read)
    }

    async fn set_vf_count(&self, fence: Fence, pf: PfIndex, count: u16) -> Result<VfCount> {
        let operation = "vf.set_vf_count";
        let want = put_vf_count(pf, count, Disruption::None);
        let enter = enter!(vf_set_count, dm_vf_count, dm_vf_count);
        let exchange = self
            .exchange(operation, Some(fence), Arena::growing(), want, enter)
            .await?;
        self.read(operation, Some(fence), get_vf_count(&exchange.output))
    }

    async fn list(&self) -> Result<Vec<VfState>> {
        self.listing("vf.list", ELEMENTS, |_| (), enter!(vf_list => rows), get_state)
            .await
    }

    async fn lease(&self, fence: Fence, request: &VfRequest) -> Result<VfLease> {
        let operation = "vf.lease";
        let mut arena = Arena::growing();
        let input = put_request(request, &mut arena);
        let enter = enter!(vf_lease, dm_vf_request, dm_vf_lease);
        let exchange = self.exchange(operation, Some(fence), arena, input, enter).await?;
        self.read(
            operation,
            Some(fence),
            get_lease(&exchange.output, &exchange.reader()),
        )
    }

    async fn admit(&self, fence: Fence, lease: &VfLease) -> Result<()> {
        let enter = enter!(vf_admit, dm_vf_order);
        self.order("vf.admit", fence, lease, |_, _| (), enter)
            .await
            .map(drop)
    }

    async fn revoke(&self, fence: Fence, lease: &VfLease) -> Result<()> {
        let enter = enter!(vf_revoke, dm_vf_order);
        self.order("vf.revoke", fence, lease, |_, _| (), enter)
            .await
            .map(drop)
    }

    async fn configure(&self, fence: Fence, lease: &VfLease, config: &VfConfig) -> Result<()> {
        let fill = |order: &mut dm_vf_order, arena: &mut Arena| order.config = arena.one(put_config(config));
        let enter = enter!(vf_configure, dm_vf_order);
        self.order("vf.configure", fence, lease, fill, enter)
            .await
            .map(drop)
    }

    async fn attach(&self, fence: Fence, lease: &VfLease, attachment: &Attachment) -> Result<AttachedVf> {
        let operation = "vf.attach";
        let mut arena = Arena::growing();
        let mut order = put_order(Some(lease), &mut arena);
        let place = put_attachment(attachment, &mut arena)
            .ok_or_else(|| self.unsayable(operation, "attachment.path"))?;
        order.attachment = arena.one(place);
        let enter = enter!(vf_attach, dm_vf_order, dm_attached);
        let exchange = self.exchange(operation, Some(fence), arena, order, enter).await?;
        self.read(operation, Some(fence), get_attached(&exchange.output))
    }

    async fn detach(&self, fence: Fence, lease: &VfLease) -> Result<()> {
        let enter = enter!(vf_detach, dm_vf_order);
        self.order("vf.detach", fence, lease, |_, _| (), enter)
            .await
            .map(drop)
    }

    async fn release(&self, fence: Fence, lease: &VfLease, level: ResetLevel) -> Result<Released> {
        let operation = "vf.release";
        let fill = |order: &mut dm_vf_order, _: &mut Arena| order.level = put_level(level);
        let enter = enter!(vf_release, dm_vf_order, dm_number);
        let released = self.order(operation, fence, lease, fill, enter).await?;
        let what = "released";
        let read = code(&released, what).and_then(|code| get_released(code, what));
        self.read(operation, Some(fence), read)
    }

    async fn reclaim(
        &self,
        fence: Fence,
        port: PortRef,
        live: &[LeaseOwner],
        level: ResetLevel,
    ) -> Result<ResetLevel> {
        let operation = "vf.reclaim";
        let mut arena = Arena::growing();
        let mut order = put_order(None, &mut arena);
        (order.port, order.level) = (put_port(port), put_level(level));
        order.live = put_owners(live, &mut arena);
        let enter = enter!(vf_reclaim, dm_vf_order, dm_number);
        let exchange = self.exchange(operation, Some(fence), arena, order, enter).await?;
        let read = code(&exchange.output, "level").and_then(|code| get_level(code, "level"));
        self.read(operation, Some(fence), read)
    }
}

/// Room for the outcome of a batch.
struct Outcome {
    raw: dm_outcome,
    changes: Rows,
    errors: Rows,
    undo: Box<dm_error>,
}

impl Outcome {
    fn of(operations: usize) -> Self {
        let mut outcome = Self {
            raw: dm_outcome::empty(),
            changes: Rows::of::<dm_change>(operations),
            errors: Rows::of::<dm_error>(operations),
            undo: super::arena::blank_error(),
        };
        outcome.offer(operations);
        outcome
    }

    /// Ready for a batch of so many operations.
    fn offer(&mut self, operations: usize) {
        self.raw = dm_outcome::empty();
        self.raw.changes = self.changes.first_rows(operations);
        self.raw.errors = self.errors.first_rows(operations);
        *self.undo = dm_error::empty();
        self.raw.undo_error = &raw mut *self.undo;
    }

    /// Zero again where a library wrote: few of the errors, which are long.
    fn clear(&mut self, read: &BatchOutcome) {
        self.changes.clear(0..read.results.len());
        for (index, result) in read.results.iter().enumerate() {
            if result.is_err() {
                self.errors.clear(index..index + 1);
            }
        }
    }
}

/// Operations of the longest batch whose memory is kept for the next one: about 1.5 KiB each.
const KEPT: usize = 2048;

impl Foreign {
    /// A batch with room for its outcome, in the memory of the one before it where that is enough.
    fn batch(&self, batch: &Batch) -> Box<BatchExchange> {
        let count = batch.operations.len();
        let room = ROOM + count * REASON;
        let spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner).take();
        let spare = spare.filter(|spare| spare.output.changes.capacity() >= count && spare.room() >= room);
        let Some(mut exchange) = spare else {
            let mut arena = Arena::growing();
            let input = put_batch(batch, &mut arena);
            return Exchange::new(arena, input, Outcome::of(count), room);
        };
        exchange.again(|arena| put_batch(batch, arena));
        exchange.output.offer(count);
        exchange
    }

    /// Memory of a batch that has ended, for the next one.
    fn keep(&self, mut exchange: Box<BatchExchange>, read: &BatchOutcome) {
        if exchange.output.changes.capacity() <= KEPT {
            exchange.output.clear(read);
            *self.spare.lock().unwrap_or_else(PoisonError::into_inner) = Some(exchange);
        }
    }
}

unsafe fn apply(
    ops: &dm_ops,
    handle: u64,
    call: *mut dm_call,
    input: *mut dm_batch,
    output: *mut Outcome,
) -> u32 {
    let Some(function) = ops.steering_apply else {
        return DM_EMPTY;
    };
    // SAFETY: the caller upholds the table's contract: live handle, memory for the call.
    unsafe { function(handle, call, input, &raw mut (*output).raw) }
}

#[async_trait]
impl FlowSteering for Foreign {
    async fn validate(&self, rules: &[SteeringRule]) -> Result<Vec<Verdict>> {
        let operation = "steering.validate";
        let request = |arena: &mut Arena| put_rules(rules, arena);
        let enter = enter!(steering_validate, dm_rules => rows);
        let verdicts = self
            .listing(operation, rules.len(), request, enter, get_verdict)
            .await?;
        self.as_many(operation, None, verdicts, rules.len())
    }

    async fn apply(&self, fence: Fence, batch: &Batch) -> Result<BatchOutcome> {
        let operation = "steering.apply";
        let count = batch.operations.len();
        let exchange = self
            .driver()
            .call(operation, Some(fence), self.batch(batch), apply)
            .await?;
        let out = &exchange.output;
        let (name, reader) = (&*self.info.name, exchange.reader());
        let read = get_outcome(
            &out.raw,
            count,
            &out.changes,
            &out.errors,
            &out.undo,
            name,
            &reader,
        );
        let outcome = self.read(operation, Some(fence), read)?;
        self.keep(exchange, &outcome);
        Ok(outcome)
    }

    async fn list(&self, owner: Owner) -> Result<Vec<InstalledRule>> {
        let request = |_: &mut Arena| of_owner(owner);
        let enter = enter!(steering_list, dm_of_owner => rows);
        self.listing("steering.list", ELEMENTS, request, enter, get_installed)
            .await
    }

    async fn counters(&self, owner: Owner, cookies: &[Cookie]) -> Result<Vec<Option<Counters>>> {
        let operation = "steering.counters";
        let request = |arena: &mut Arena| {
            let mut raw = dm_cookies::empty();
            raw.owner = put_owner(owner);
            let all: Vec<_> = cookies.iter().map(|cookie| put_cookie(*cookie)).collect();
            raw.cookies = arena.list(&all);
            raw
        };
        let enter = enter!(steering_counters, dm_cookies => rows);
        let get = |raw: &dm_count, _: &Reader| get_count(raw);
        let counts = self
            .listing(operation, cookies.len(), request, enter, get)
            .await?;
        self.as_many(operation, None, counts, cookies.len())
    }

    async fn flush(&self, fence: Fence, owner: Owner) -> Result<u64> {
        let enter = enter!(steering_flush, dm_of_owner, dm_number);
        let exchange = self
            .exchange(
                "steering.flush",
                Some(fence),
                Arena::growing(),
                of_owner(owner),
                enter,
            )
            .await?;
        Ok(exchange.output.value)
    }

    async fn set_miss_policy(&self, fence: Fence, port: PortRef, policy: MissPolicy) -> Result<()> {
        let mut miss = dm_miss::empty();
        (miss.port, miss.policy) = (put_port(port), put_miss(policy));
        let enter = enter!(steering_set_miss_policy, dm_miss);
        self.exchange(
            "steering.set_miss_policy",
            Some(fence),
            Arena::growing(),
            miss,
            enter,
        )
        .await
        .map(drop)
    }

    async fn occupancy(&self) -> Result<Vec<Occupancy>> {
        let enter = enter!(steering_occupancy => rows);
        self.listing("steering.occupancy", ELEMENTS, |_| (), enter, get_occupancy)
            .await
    }
}

fn of_owner(owner: Owner) -> dm_of_owner {
    let mut raw = dm_of_owner::empty();
    raw.owner = put_owner(owner);
    raw
}

impl Foreign {
    fn as_many<T>(
        &self,
        operation: &'static str,
        fence: Option<Fence>,
        got: Vec<T>,
        asked: usize,
    ) -> Result<Vec<T>> {
        if got.len() == asked {
            return Ok(got);
        }
        let broken = format!("{} answers to {asked} questions", got.len());
        self.read(operation, fence, Err(broken))
    }
}

#[async_trait]
impl NpOffload for Foreign {
    async fn programs(&self) -> Result<Vec<ProgramInfo>> {
        let enter = enter!(offload_programs => rows);
        self.listing("offload.programs", ELEMENTS, |_| (), enter, get_program_info)
            .await
    }

    async fn load(&self, fence: Fence, slot: Slot, program: &Program) -> Result<ProgramInfo> {
        let operation = "offload.load";
        let mut arena = Arena::growing();
        let input = put_program(slot, program, &mut arena);
        let enter = enter!(offload_load, dm_program, dm_program_info);
        let exchange = self.exchange(operation, Some(fence), arena, input, enter).await?;
        let read = get_program_info(&exchange.output, &exchange.reader());
        self.read(operation, Some(fence), read)
    }

    async fn activate(&self, fence: Fence, slot: Slot) -> Result<()> {
        let enter = enter!(offload_activate, dm_slot);
        self.exchange(
            "offload.activate",
            Some(fence),
            Arena::growing(),
            put_slot(slot),
            enter,
        )
        .await
        .map(drop)
    }

    async fn unload(&self, fence: Fence, slot: Slot) -> Result<()> {
        let enter = enter!(offload_unload, dm_slot);
        self.exchange(
            "offload.unload",
            Some(fence),
            Arena::growing(),
            put_slot(slot),
            enter,
        )
        .await
        .map(drop)
    }

    async fn tables(&self) -> Result<Vec<TableInfo>> {
        let enter = enter!(offload_tables => rows);
        self.listing("offload.tables", ELEMENTS, |_| (), enter, get_table)
            .await
    }

    async fn write(
        &self,
        fence: Fence,
        table: TableId,
        entries: &[TableWrite],
    ) -> Result<Vec<Result<(), Error>>> {
        let operation = "offload.write";
        let mut arena = Arena::growing();
        let input = put_entries(table, entries, &mut arena);
        let enter = enter!(offload_write, dm_entries => rows);
        let exchange = Exchange::new(arena, input, Listing::of::<dm_error>(entries.len()), ROOM);
        let exchange = self
            .driver()
            .call(operation, Some(fence), exchange, enter)
            .await?;
        if exchange.output.raw.len != entries.len() as u64 {
            let broken = format!(
                "{} results for {} entries",
                exchange.output.raw.len,
                entries.len()
            );
            return self.read(operation, Some(fence), Err(broken));
        }
        let rows = &exchange.output.rows;
        let results = (0..entries.len()).map(|index| {
            // A success leaves the caller's zeros alone, its size among them.
            if rows.starts_with_zero(index) {
                return Ok(Ok(()));
            }
            let error: dm_error = rows.at(index, "errors")?;
            Ok(match error.kind {
                0 => Ok(()),
                _ => Err(get_error(&error, operation, &self.info.name)?),
            })
        });
        let results = results.collect::<Result<_, Broken>>();
        self.read(operation, Some(fence), results)
    }

    async fn read(&self, table: TableId) -> Result<Vec<TableEntry>> {
        let request = |arena: &mut Arena| put_entries(table, &[], arena);
        let enter = enter!(offload_read, dm_entries => rows);
        self.listing("offload.read", ELEMENTS, request, enter, get_entry)
            .await
    }

    async fn offload_connection(&self, fence: Fence, connection: &Connection) -> Result<ConnectionToken> {
        let enter = enter!(offload_connection, dm_connection, dm_number);
        let input = put_connection(connection);
        let exchange = self
            .exchange(
                "offload.offload_connection",
                Some(fence),
                Arena::growing(),
                input,
                enter,
            )
            .await?;
        Ok(ConnectionToken(exchange.output.value))
    }

    async fn resume(&self, fence: Fence, token: ConnectionToken) -> Result<ConnectionState> {
        let operation = "offload.resume";
        let enter = enter!(offload_resume, dm_number, dm_connection);
        let exchange = self
            .exchange(
                operation,
                Some(fence),
                Arena::growing(),
                put_number(token.0),
                enter,
            )
            .await?;
        self.read(operation, Some(fence), get_connection(&exchange.output))
    }

    async fn stats(&self) -> Result<OffloadStats> {
        unsafe fn enter(
            ops: &dm_ops,
            handle: u64,
            call: *mut dm_call,
            _: *mut (),
            out: *mut dm_offload_stats,
        ) -> u32 {
            let Some(function) = ops.offload_stats else {
                return DM_EMPTY;
            };
            // SAFETY: the caller upholds the table's contract.
            unsafe { function(handle, call, out) }
        }
        let exchange = self
            .exchange("offload.stats", None, Arena::growing(), (), enter)
            .await?;
        Ok(get_stats(&exchange.output))
    }
}

#[async_trait]
impl Ports for Foreign {
    async fn list(&self) -> Result<Vec<PortInfo>> {
        self.listing(
            "ports.list",
            ELEMENTS,
            |_| (),
            enter!(port_list => rows),
            get_port_info,
        )
        .await
    }

    async fn open(&self, fence: Fence, port: PortRef) -> Result<Box<dyn PortIo>> {
        let operation = "ports.open";
        let mut input = dm_port_info::empty();
        input.port = put_port(port);
        let enter = enter!(port_open, dm_port_info, dm_port_info);
        let exchange = self
            .exchange(operation, Some(fence), Arena::growing(), input, enter)
            .await?;
        let raw = exchange.output;
        let mut io = ForeignPort {
            alive: Arc::clone(&self.alive),
            seat: self.driver().watch.seat(),
            handle: raw.handle,
            port,
            limits: PortIoLimits::plain(dpumesh_core::Mtu::ETHERNET),
            poll_fd: raw.poll_fd,
            refused: AtomicU64::new(0),
            frames: Vec::new(),
        };
        // Dropped, and with it closed, if what it says makes no sense.
        io.limits = self.read(operation, Some(fence), get_limits(&raw))?;
        Ok(Box::new(io))
    }
}

/// An open port of a foreign card.
#[derive(Debug)]
struct ForeignPort {
    alive: Arc<Alive>,
    seat: Arc<Seat>,
    handle: u64,
    port: PortRef,
    limits: PortIoLimits,
    poll_fd: i32,
    /// What was last told of them.
    refused: AtomicU64,
    frames: Vec<dm_frame>,
}

// SAFETY: the pointers in `frames` are rewritten before each use, and the library's port may change threads by contract.
unsafe impl Send for ForeignPort {}

type MoveFrames = unsafe extern "C" fn(u64, u64, *mut dm_frame, u32, *mut u32, *mut dm_error) -> u32;

impl ForeignPort {
    fn move_frames(&mut self, which: Operation, function: Option<MoveFrames>) -> Result<usize> {
        let (driver, operation) = (&self.alive.0, which.name());
        driver.refuse_if_failed(operation)?;
        let Some(function) = function else {
            return Err(driver.broken(operation, false, "the function is gone".to_owned()));
        };
        let (mut done, mut error) = (0, dm_error::empty());
        let count = self.frames.len() as u32;
        let inside = self.seat.enter(which);
        // SAFETY: handle and port are open; the frames point into the caller's, which outlive the call.
        let status = unsafe {
            function(
                driver.handle,
                self.handle,
                self.frames.as_mut_ptr(),
                count,
                &raw mut done,
                &raw mut error,
            )
        };
        drop(inside);
        match status {
            DM_DONE if done <= count => Ok(done as usize),
            DM_DONE => Err(driver.broken(operation, true, format!("{done} frames of {count}"))),
            DM_FAILED => Err(get_error(&error, operation, &driver.name)
                .unwrap_or_else(|broken| driver.broken(operation, true, broken))),
            status => Err(driver.broken(operation, true, format!("it returned status {status}"))),
        }
    }
}

impl PortIo for ForeignPort {
    fn port(&self) -> PortRef {
        self.port
    }

    fn limits(&self) -> PortIoLimits {
        self.limits
    }

    fn receive(&mut self, frames: &mut [Frame]) -> Result<usize> {
        self.frames.clear();
        for frame in &mut *frames {
            frame.reset(HEADROOM);
            let area = frame.receive_area();
            let mut raw = dm_frame::empty();
            (raw.at, raw.capacity) = (area.as_mut_ptr(), area.len() as u64);
            self.frames.push(raw);
        }
        let done = self.move_frames(Operation::RECEIVE, self.alive.0.ops.port_receive)?;
        for (frame, raw) in frames.iter_mut().zip(&self.frames).take(done) {
            if !frame.set_len(raw.len as usize) {
                let broken = format!("a frame of {} octets in room for {}", raw.len, raw.capacity);
                return Err(self.alive.0.broken("ports.receive", true, broken));
            }
            get_marks(raw, frame).map_err(|broken| self.alive.0.broken("ports.receive", true, broken))?;
        }
        Ok(done)
    }

    fn transmit(&mut self, frames: &mut [Frame]) -> Result<usize> {
        self.frames.clear();
        for frame in &mut *frames {
            let mut raw = dm_frame::empty();
            put_marks(frame, &mut raw);
            let octets = frame.octets_mut();
            raw.at = octets.as_mut_ptr();
            (raw.capacity, raw.len) = (octets.len() as u64, octets.len() as u64);
            self.frames.push(raw);
        }
        self.move_frames(Operation::TRANSMIT, self.alive.0.ops.port_transmit)
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: the library's until `port_close`, which only the drop of this port calls.
        (self.poll_fd >= 0).then(|| unsafe { BorrowedFd::borrow_raw(self.poll_fd) })
    }

    fn refused(&self) -> u64 {
        let driver = &self.alive.0;
        let Some(refused) = driver.ops.port_refused.filter(|_| !driver.has_failed()) else {
            return self.refused.load(Ordering::Relaxed);
        };
        let _inside = driver.watch.enter(Operation::REFUSED);
        // SAFETY: handle and port are open.
        let count = unsafe { refused(driver.handle, self.handle) };
        self.refused.store(count, Ordering::Relaxed);
        count
    }
}

impl Drop for ForeignPort {
    fn drop(&mut self) {
        self.alive.0.close_port(self.handle);
    }
}
