//! Checks of [`Ports`] and [`PortIo`].

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use async_trait::async_trait;
use dpumesh_core::port::PortIoLimits;
use dpumesh_core::{Backend, BackendExt, Fence, Frame, PortInfo, PortIo, PortRef, Ports, Result};

use super::{Checked, Look};

#[async_trait]
impl Ports for Checked {
    async fn list(&self) -> Result<Vec<PortInfo>> {
        let look = self.reading("ports.list");
        let ports = look.general(self.inner.require_ports()?.list().await)?;
        look.ascending(ports.iter().map(|info| info.port))?;
        Ok(ports)
    }

    async fn open(&self, fence: Fence, port: PortRef) -> Result<Box<dyn PortIo>> {
        let look = self.fenced("ports.open", fence);
        let inner = look.general(self.inner.require_ports()?.open(fence, port).await)?;
        look.hold(inner.port() == port, || {
            format!("{} was opened where {port} was asked for", inner.port())
        })?;
        Ok(Box::new(CheckedPort {
            backend: Arc::clone(&self.inner),
            limits: inner.limits(),
            inner,
        }))
    }
}

#[derive(Debug)]
struct CheckedPort {
    backend: Arc<dyn Backend>,
    inner: Box<dyn PortIo>,
    limits: PortIoLimits,
}

impl CheckedPort {
    fn look(&self, operation: &'static str) -> Look<'_> {
        Look {
            backend: &*self.backend,
            operation,
            fence: None,
        }
    }
}

impl PortIo for CheckedPort {
    fn port(&self) -> PortRef {
        self.inner.port()
    }

    fn limits(&self) -> PortIoLimits {
        self.inner.limits()
    }

    fn receive(&mut self, frames: &mut [Frame]) -> Result<usize> {
        let answer = self.inner.receive(frames);
        let look = self.look("ports.receive");
        let count = look.general(answer)?;
        look.hold(count <= frames.len(), || {
            format!("{count} frames were received into {} slots", frames.len())
        })?;
        for frame in &frames[..count] {
            look.hold(
                !frame.is_empty() && frame.mark == 0,
                || "a received frame is empty or carries a mark",
            )?;
        }
        Ok(count)
    }

    fn transmit(&mut self, frames: &mut [Frame]) -> Result<usize> {
        let answer = self.inner.transmit(frames);
        let look = self.look("ports.transmit");
        let count = look.general(answer)?;
        look.hold(count <= frames.len(), || {
            format!("{count} of {} frames were taken", frames.len())
        })?;
        look.hold(
            self.inner.limits() == self.limits,
            || "the limits of an open port changed",
        )?;
        Ok(count)
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.poll_fd()
    }

    fn refused(&self) -> u64 {
        self.inner.refused()
    }
}
