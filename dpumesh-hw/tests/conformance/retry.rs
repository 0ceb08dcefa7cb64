//! [`Retry`]: the caller that the errors ask for. What failed without effect and may work at once is tried again; all else
//! is passed on. With it, a backend with transient faults has to keep the whole contract.

use std::sync::Arc;

use async_trait::async_trait;
use dpumesh_core::backend::EventStream;
use dpumesh_core::error::Retry as Advice;
use dpumesh_core::offload::{
    Connection, ConnectionState, ConnectionToken, OffloadStats, Program, ProgramInfo, Slot, TableEntry,
    TableId, TableInfo, TableWrite,
};
use dpumesh_core::steering::{
    Batch, BatchOutcome, Cookie, Counters, InstalledRule, MissPolicy, Occupancy, Owner, SteeringRule, Verdict,
};
use dpumesh_core::transport::{ChannelConfig, ChannelName, ShmChannel, ShmListener};
use dpumesh_core::vf::{
    AttachedVf, Attachment, Disruption, LeaseOwner, Released, ResetLevel, VfConfig, VfCount, VfLease,
    VfRequest, VfState,
};
use dpumesh_core::{
    Backend, BackendExt, BackendInfo, Capabilities, Effect, Epoch, Error, Fence, FlowSteering, NpOffload,
    PfIndex, PortInfo, PortIo, PortRef, Ports, Result, ShmTransport, VfAllocator,
};

/// How often a call is tried before its failure is believed.
const TRIES: u32 = 40;

fn may_work_now(error: &Error) -> bool {
    error.retry == Advice::Now && error.effect == Effect::None
}

macro_rules! again {
    ($call:expr) => {{
        let mut left = TRIES;
        loop {
            left -= 1;
            match $call.await {
                Err(error) if left > 0 && may_work_now(&error) => {}
                answer => break answer,
            }
        }
    }};
}

/// A backend whose transient failures are tried again.
#[derive(Debug)]
pub(crate) struct Retry {
    inner: Arc<dyn Backend>,
    parts: Parts,
}

#[derive(Debug)]
struct Parts(Arc<dyn Backend>);

impl Retry {
    pub(crate) fn new(inner: Arc<dyn Backend>) -> Self {
        Self {
            parts: Parts(Arc::clone(&inner)),
            inner,
        }
    }
}

impl Backend for Retry {
    fn info(&self) -> BackendInfo {
        self.inner.info()
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    fn epoch(&self) -> Epoch {
        self.inner.epoch()
    }

    fn vf(&self) -> Option<&dyn VfAllocator> {
        self.inner.vf().map(|_| &self.parts as _)
    }

    fn steering(&self) -> Option<&dyn FlowSteering> {
        self.inner.steering().map(|_| &self.parts as _)
    }

    fn offload(&self) -> Option<&dyn NpOffload> {
        self.inner.offload().map(|_| &self.parts as _)
    }

    fn transport(&self) -> Option<&dyn ShmTransport> {
        self.inner.transport().map(|_| &self.parts as _)
    }

    fn ports(&self) -> Option<&dyn Ports> {
        self.inner.ports().map(|_| &self.parts as _)
    }

    fn events(&self) -> Box<dyn EventStream> {
        self.inner.events()
    }
}

#[async_trait]
impl VfAllocator for Parts {
    async fn plan_vf_count(&self, pf: PfIndex, count: u16) -> Result<Disruption> {
        again!(self.0.require_vf()?.plan_vf_count(pf, count))
    }

    async fn set_vf_count(&self, fence: Fence, pf: PfIndex, count: u16) -> Result<VfCount> {
        again!(self.0.require_vf()?.set_vf_count(fence, pf, count))
    }

    async fn list(&self) -> Result<Vec<VfState>> {
        again!(self.0.require_vf()?.list())
    }

    async fn lease(&self, fence: Fence, request: &VfRequest) -> Result<VfLease> {
        again!(self.0.require_vf()?.lease(fence, request))
    }

    async fn admit(&self, fence: Fence, lease: &VfLease) -> Result<()> {
        again!(self.0.require_vf()?.admit(fence, lease))
    }

    async fn revoke(&self, fence: Fence, lease: &VfLease) -> Result<()> {
        again!(self.0.require_vf()?.revoke(fence, lease))
    }

    async fn configure(&self, fence: Fence, lease: &VfLease, config: &VfConfig) -> Result<()> {
        again!(self.0.require_vf()?.configure(fence, lease, config))
    }

    async fn attach(&self, fence: Fence, lease: &VfLease, attachment: &Attachment) -> Result<AttachedVf> {
        again!(self.0.require_vf()?.attach(fence, lease, attachment))
    }

    async fn detach(&self, fence: Fence, lease: &VfLease) -> Result<()> {
        again!(self.0.require_vf()?.detach(fence, lease))
    }

    async fn release(&self, fence: Fence, lease: &VfLease, level: ResetLevel) -> Result<Released> {
        again!(self.0.require_vf()?.release(fence, lease, level))
    }

    async fn reclaim(
        &self,
        fence: Fence,
        port: PortRef,
        live: &[LeaseOwner],
        level: ResetLevel,
    ) -> Result<ResetLevel> {
        again!(self.0.require_vf()?.reclaim(fence, port, live, level))
    }
}

#[async_trait]
impl FlowSteering for Parts {
    async fn validate(&self, rules: &[SteeringRule]) -> Result<Vec<Verdict>> {
        again!(self.0.require_steering()?.validate(rules))
    }

    async fn apply(&self, fence: Fence, batch: &Batch) -> Result<BatchOutcome> {
        again!(self.0.require_steering()?.apply(fence, batch))
    }

    async fn list(&self, owner: Owner) -> Result<Vec<InstalledRule>> {
        again!(self.0.require_steering()?.list(owner))
    }

    async fn counters(&self, owner: Owner, cookies: &[Cookie]) -> Result<Vec<Option<Counters>>> {
        again!(self.0.require_steering()?.counters(owner, cookies))
    }

    async fn flush(&self, fence: Fence, owner: Owner) -> Result<u64> {
        again!(self.0.require_steering()?.flush(fence, owner))
    }

    async fn set_miss_policy(&self, fence: Fence, port: PortRef, policy: MissPolicy) -> Result<()> {
        again!(self.0.require_steering()?.set_miss_policy(fence, port, policy))
    }

    async fn occupancy(&self) -> Result<Vec<Occupancy>> {
        again!(self.0.require_steering()?.occupancy())
    }
}

#[async_trait]
impl NpOffload for Parts {
    async fn programs(&self) -> Result<Vec<ProgramInfo>> {
        again!(self.0.require_offload()?.programs())
    }

    async fn load(&self, fence: Fence, slot: Slot, program: &Program) -> Result<ProgramInfo> {
        again!(self.0.require_offload()?.load(fence, slot, program))
    }

    async fn activate(&self, fence: Fence, slot: Slot) -> Result<()> {
        again!(self.0.require_offload()?.activate(fence, slot))
    }

    async fn unload(&self, fence: Fence, slot: Slot) -> Result<()> {
        again!(self.0.require_offload()?.unload(fence, slot))
    }

    async fn tables(&self) -> Result<Vec<TableInfo>> {
        again!(self.0.require_offload()?.tables())
    }

    async fn write(&self, fence: Fence, table: TableId, entries: &[TableWrite]) -> Result<Vec<Result<()>>> {
        again!(self.0.require_offload()?.write(fence, table, entries))
    }

    async fn read(&self, table: TableId) -> Result<Vec<TableEntry>> {
        again!(self.0.require_offload()?.read(table))
    }

    async fn offload_connection(&self, fence: Fence, connection: &Connection) -> Result<ConnectionToken> {
        again!(self.0.require_offload()?.offload_connection(fence, connection))
    }

    async fn resume(&self, fence: Fence, token: ConnectionToken) -> Result<ConnectionState> {
        again!(self.0.require_offload()?.resume(fence, token))
    }

    async fn stats(&self) -> Result<OffloadStats> {
        again!(self.0.require_offload()?.stats())
    }
}

#[async_trait]
impl Ports for Parts {
    async fn list(&self) -> Result<Vec<PortInfo>> {
        again!(self.0.require_ports()?.list())
    }

    async fn open(&self, fence: Fence, port: PortRef) -> Result<Box<dyn PortIo>> {
        again!(self.0.require_ports()?.open(fence, port))
    }
}

#[async_trait]
impl ShmTransport for Parts {
    async fn listen(&self, name: &ChannelName) -> Result<Box<dyn ShmListener>> {
        let inner = again!(self.0.require_transport()?.listen(name))?;
        Ok(Box::new(Listener(inner)))
    }

    async fn connect(&self, name: &ChannelName, config: &ChannelConfig) -> Result<Box<dyn ShmChannel>> {
        again!(self.0.require_transport()?.connect(name, config))
    }
}

#[derive(Debug)]
struct Listener(Box<dyn ShmListener>);

#[async_trait]
impl ShmListener for Listener {
    async fn accept(&mut self) -> Result<Box<dyn ShmChannel>> {
        again!(self.0.accept())
    }
}
