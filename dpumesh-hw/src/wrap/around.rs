//! [`Around`]: forwards every method of every part, with a [`Layer`] around each call.

use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

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
use dpumesh_core::transport::{
    ChannelConfig, ChannelName, PeerState, SharedWriter, ShmChannel, ShmListener, ShmTransport,
};
use dpumesh_core::vf::{
    AttachedVf, Attachment, Disruption, LeaseOwner, Released, ResetLevel, VfConfig, VfCount, VfLease,
    VfRequest, VfState,
};
use dpumesh_core::{
    Backend, BackendExt, BackendInfo, Capabilities, Epoch, Error, Event, Fence, FlowSteering, Frame,
    NpOffload, PfIndex, PortInfo, PortIo, PortRef, Ports, Result, VfAllocator,
};

/// What a decorator does around calls, whichever they are.
pub trait Layer: Send + Sync + fmt::Debug + 'static {
    /// Around a control call: `run` is the inner call, not begun.
    ///
    /// Dropping the returned future must drop `run`.
    fn around<'a, T: Send + 'a>(
        &'a self,
        call: Call,
        run: impl Future<Output = Result<T>> + Send + 'a,
    ) -> impl Future<Output = Result<T>> + Send + 'a;

    /// Around a data-path call, which must not block.
    ///
    /// # Errors
    /// Those of the call, and the layer's own.
    fn inline<T>(&self, call: Call, run: impl FnOnce() -> Result<T>) -> Result<T>;

    /// Around a batch of rule changes; for a layer that needs to see the batch. The others call [`Layer::around`].
    fn around_apply<'a>(
        &'a self,
        call: Call,
        steering: &'a dyn FlowSteering,
        fence: Fence,
        batch: &'a Batch,
    ) -> impl Future<Output = Result<BatchOutcome>> + Send + 'a {
        self.around(call, steering.apply(fence, batch))
    }

    /// Sees each event on its way out.
    fn event(&self, _event: &Event) {}
}

/// One call of a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// Part and method, as `steering.apply`: what errors call the operation.
    pub method: &'static str,
    /// Length of the slice or batch that it was given; 1 without one.
    pub items: usize,
}

impl Call {
    const fn one(method: &'static str) -> Self {
        Self { method, items: 1 }
    }

    const fn of(method: &'static str, items: usize) -> Self {
        Self { method, items }
    }
}

/// A backend with a layer around its calls.
#[derive(Debug)]
pub struct Around<L> {
    parts: Parts<L>,
}

/// All parts in one, since each is the inner backend's with the same layer.
#[derive(Debug)]
struct Parts<L> {
    inner: Arc<dyn Backend>,
    layer: Arc<L>,
}

impl<L: Layer> Around<L> {
    /// Puts a layer around a backend.
    pub fn with_layer(inner: Arc<dyn Backend>, layer: L) -> Self {
        let layer = Arc::new(layer);
        Self {
            parts: Parts { inner, layer },
        }
    }

    /// The layer.
    pub fn layer(&self) -> &L {
        &self.parts.layer
    }
}

impl<L: Layer> Backend for Around<L> {
    fn info(&self) -> BackendInfo {
        self.parts.inner.info()
    }

    fn capabilities(&self) -> Capabilities {
        self.parts.inner.capabilities()
    }

    fn epoch(&self) -> Epoch {
        self.parts.inner.epoch()
    }

    fn vf(&self) -> Option<&dyn VfAllocator> {
        self.parts.inner.vf().map(|_| &self.parts as _)
    }

    fn steering(&self) -> Option<&dyn FlowSteering> {
        self.parts.inner.steering().map(|_| &self.parts as _)
    }

    fn offload(&self) -> Option<&dyn NpOffload> {
        self.parts.inner.offload().map(|_| &self.parts as _)
    }

    fn transport(&self) -> Option<&dyn ShmTransport> {
        self.parts.inner.transport().map(|_| &self.parts as _)
    }

    fn ports(&self) -> Option<&dyn Ports> {
        self.parts.inner.ports().map(|_| &self.parts as _)
    }

    fn events(&self) -> Box<dyn EventStream> {
        Box::new(Events {
            inner: self.parts.inner.events(),
            layer: Arc::clone(&self.parts.layer),
        })
    }
}

#[derive(Debug)]
struct Events<L> {
    inner: Box<dyn EventStream>,
    layer: Arc<L>,
}

#[async_trait]
impl<L: Layer> EventStream for Events<L> {
    async fn next(&mut self) -> Option<Event> {
        let event = self.inner.next().await?;
        self.layer.event(&event);
        Some(event)
    }
}

#[async_trait]
impl<L: Layer> VfAllocator for Parts<L> {
    async fn plan_vf_count(&self, pf: PfIndex, count: u16) -> Result<Disruption> {
        let run = self.inner.require_vf()?.plan_vf_count(pf, count);
        self.layer.around(Call::one("vf.plan_vf_count"), run).await
    }

    async fn set_vf_count(&self, fence: Fence, pf: PfIndex, count: u16) -> Result<VfCount> {
        let run = self.inner.require_vf()?.set_vf_count(fence, pf, count);
        self.layer.around(Call::one("vf.set_vf_count"), run).await
    }

    async fn list(&self) -> Result<Vec<VfState>> {
        let run = self.inner.require_vf()?.list();
        self.layer.around(Call::one("vf.list"), run).await
    }

    async fn lease(&self, fence: Fence, request: &VfRequest) -> Result<VfLease> {
        let run = self.inner.require_vf()?.lease(fence, request);
        self.layer.around(Call::one("vf.lease"), run).await
    }

    async fn admit(&self, fence: Fence, lease: &VfLease) -> Result<()> {
        let run = self.inner.require_vf()?.admit(fence, lease);
        self.layer.around(Call::one("vf.admit"), run).await
    }

    async fn revoke(&self, fence: Fence, lease: &VfLease) -> Result<()> {
        let run = self.inner.require_vf()?.revoke(fence, lease);
        self.layer.around(Call::one("vf.revoke"), run).await
    }

    async fn configure(&self, fence: Fence, lease: &VfLease, config: &VfConfig) -> Result<()> {
        let run = self.inner.require_vf()?.configure(fence, lease, config);
        self.layer.around(Call::one("vf.configure"), run).await
    }

    async fn attach(&self, fence: Fence, lease: &VfLease, attachment: &Attachment) -> Result<AttachedVf> {
        let run = self.inner.require_vf()?.attach(fence, lease, attachment);
        self.layer.around(Call::one("vf.attach"), run).await
    }

    async fn detach(&self, fence: Fence, lease: &VfLease) -> Result<()> {
        let run = self.inner.require_vf()?.detach(fence, lease);
        self.layer.around(Call::one("vf.detach"), run).await
    }

    async fn release(&self, fence: Fence, lease: &VfLease, level: ResetLevel) -> Result<Released> {
        let run = self.inner.require_vf()?.release(fence, lease, level);
        self.layer.around(Call::one("vf.release"), run).await
    }

    async fn reclaim(
        &self,
        fence: Fence,
        port: PortRef,
        live: &[LeaseOwner],
        level: ResetLevel,
    ) -> Result<ResetLevel> {
        let run = self.inner.require_vf()?.reclaim(fence, port, live, level);
        self.layer.around(Call::one("vf.reclaim"), run).await
    }
}

#[async_trait]
impl<L: Layer> FlowSteering for Parts<L> {
    async fn validate(&self, rules: &[SteeringRule]) -> Result<Vec<Verdict>> {
        let call = Call::of("steering.validate", rules.len());
        let run = self.inner.require_steering()?.validate(rules);
        self.layer.around(call, run).await
    }

    async fn apply(&self, fence: Fence, batch: &Batch) -> Result<BatchOutcome> {
        let call = Call::of("steering.apply", batch.operations.len());
        let steering = self.inner.require_steering()?;
        self.layer.around_apply(call, steering, fence, batch).await
    }

    async fn list(&self, owner: Owner) -> Result<Vec<InstalledRule>> {
        let run = self.inner.require_steering()?.list(owner);
        self.layer.around(Call::one("steering.list"), run).await
    }

    async fn counters(&self, owner: Owner, cookies: &[Cookie]) -> Result<Vec<Option<Counters>>> {
        let call = Call::of("steering.counters", cookies.len());
        let run = self.inner.require_steering()?.counters(owner, cookies);
        self.layer.around(call, run).await
    }

    async fn flush(&self, fence: Fence, owner: Owner) -> Result<u64> {
        let run = self.inner.require_steering()?.flush(fence, owner);
        self.layer.around(Call::one("steering.flush"), run).await
    }

    async fn set_miss_policy(&self, fence: Fence, port: PortRef, policy: MissPolicy) -> Result<()> {
        let run = self
            .inner
            .require_steering()?
            .set_miss_policy(fence, port, policy);
        self.layer
            .around(Call::one("steering.set_miss_policy"), run)
            .await
    }

    async fn occupancy(&self) -> Result<Vec<Occupancy>> {
        let run = self.inner.require_steering()?.occupancy();
        self.layer.around(Call::one("steering.occupancy"), run).await
    }
}

#[async_trait]
impl<L: Layer> NpOffload for Parts<L> {
    async fn programs(&self) -> Result<Vec<ProgramInfo>> {
        let run = self.inner.require_offload()?.programs();
        self.layer.around(Call::one("offload.programs"), run).await
    }

    async fn load(&self, fence: Fence, slot: Slot, program: &Program) -> Result<ProgramInfo> {
        let run = self.inner.require_offload()?.load(fence, slot, program);
        self.layer.around(Call::one("offload.load"), run).await
    }

    async fn activate(&self, fence: Fence, slot: Slot) -> Result<()> {
        let run = self.inner.require_offload()?.activate(fence, slot);
        self.layer.around(Call::one("offload.activate"), run).await
    }

    async fn unload(&self, fence: Fence, slot: Slot) -> Result<()> {
        let run = self.inner.require_offload()?.unload(fence, slot);
        self.layer.around(Call::one("offload.unload"), run).await
    }

    async fn tables(&self) -> Result<Vec<TableInfo>> {
        let run = self.inner.require_offload()?.tables();
        self.layer.around(Call::one("offload.tables"), run).await
    }

    async fn write(
        &self,
        fence: Fence,
        table: TableId,
        entries: &[TableWrite],
    ) -> Result<Vec<Result<(), Error>>> {
        let call = Call::of("offload.write", entries.len());
        let run = self.inner.require_offload()?.write(fence, table, entries);
        self.layer.around(call, run).await
    }

    async fn read(&self, table: TableId) -> Result<Vec<TableEntry>> {
        let run = self.inner.require_offload()?.read(table);
        self.layer.around(Call::one("offload.read"), run).await
    }

    async fn offload_connection(&self, fence: Fence, connection: &Connection) -> Result<ConnectionToken> {
        let run = self
            .inner
            .require_offload()?
            .offload_connection(fence, connection);
        self.layer
            .around(Call::one("offload.offload_connection"), run)
            .await
    }

    async fn resume(&self, fence: Fence, token: ConnectionToken) -> Result<ConnectionState> {
        let run = self.inner.require_offload()?.resume(fence, token);
        self.layer.around(Call::one("offload.resume"), run).await
    }

    async fn stats(&self) -> Result<OffloadStats> {
        let run = self.inner.require_offload()?.stats();
        self.layer.around(Call::one("offload.stats"), run).await
    }
}

#[async_trait]
impl<L: Layer> Ports for Parts<L> {
    async fn list(&self) -> Result<Vec<PortInfo>> {
        let run = self.inner.require_ports()?.list();
        self.layer.around(Call::one("ports.list"), run).await
    }

    async fn open(&self, fence: Fence, port: PortRef) -> Result<Box<dyn PortIo>> {
        let run = self.inner.require_ports()?.open(fence, port);
        let inner = self.layer.around(Call::one("ports.open"), run).await?;
        Ok(Box::new(Port {
            inner,
            layer: Arc::clone(&self.layer),
        }))
    }
}

#[derive(Debug)]
struct Port<L> {
    inner: Box<dyn PortIo>,
    layer: Arc<L>,
}

impl<L: Layer> PortIo for Port<L> {
    fn port(&self) -> PortRef {
        self.inner.port()
    }

    fn limits(&self) -> PortIoLimits {
        self.inner.limits()
    }

    fn receive(&mut self, frames: &mut [Frame]) -> Result<usize> {
        let call = Call::of("ports.receive", frames.len());
        self.layer.inline(call, || self.inner.receive(frames))
    }

    fn transmit(&mut self, frames: &mut [Frame]) -> Result<usize> {
        let call = Call::of("ports.transmit", frames.len());
        self.layer.inline(call, || self.inner.transmit(frames))
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.poll_fd()
    }

    fn refused(&self) -> u64 {
        self.inner.refused()
    }
}

#[async_trait]
impl<L: Layer> ShmTransport for Parts<L> {
    async fn listen(&self, name: &ChannelName) -> Result<Box<dyn ShmListener>> {
        let run = self.inner.require_transport()?.listen(name);
        let inner = self.layer.around(Call::one("transport.listen"), run).await?;
        Ok(Box::new(Listener {
            inner,
            layer: Arc::clone(&self.layer),
        }))
    }

    async fn connect(&self, name: &ChannelName, config: &ChannelConfig) -> Result<Box<dyn ShmChannel>> {
        let run = self.inner.require_transport()?.connect(name, config);
        let inner = self.layer.around(Call::one("transport.connect"), run).await?;
        Ok(Box::new(Channel {
            inner,
            layer: Arc::clone(&self.layer),
        }))
    }
}

#[derive(Debug)]
struct Listener<L> {
    inner: Box<dyn ShmListener>,
    layer: Arc<L>,
}

#[async_trait]
impl<L: Layer> ShmListener for Listener<L> {
    async fn accept(&mut self) -> Result<Box<dyn ShmChannel>> {
        let run = self.inner.accept();
        let inner = self.layer.around(Call::one("transport.accept"), run).await?;
        Ok(Box::new(Channel {
            inner,
            layer: Arc::clone(&self.layer),
        }))
    }
}

#[derive(Debug)]
struct Channel<L> {
    inner: Box<dyn ShmChannel>,
    layer: Arc<L>,
}

impl<L: Layer> ShmChannel for Channel<L> {
    fn config(&self) -> ChannelConfig {
        self.inner.config()
    }

    fn send(&mut self, slices: &[&[u8]]) -> Result<usize> {
        let call = Call::of("transport.send", slices.len());
        self.layer.inline(call, || self.inner.send(slices))
    }

    fn send_with(&mut self, len: usize, fill: &mut dyn FnMut(&mut dyn SharedWriter)) -> Result<bool> {
        self.layer.inline(Call::one("transport.send_with"), || {
            self.inner.send_with(len, fill)
        })
    }

    fn receive(&mut self, buffer: &mut [u8]) -> Result<Option<usize>> {
        self.layer
            .inline(Call::one("transport.receive"), || self.inner.receive(buffer))
    }

    fn arm(&mut self) -> Result<bool> {
        self.layer.inline(Call::one("transport.arm"), || self.inner.arm())
    }

    fn poll_fd(&self) -> BorrowedFd<'_> {
        self.inner.poll_fd()
    }

    fn peer(&self) -> PeerState {
        self.inner.peer()
    }
}
