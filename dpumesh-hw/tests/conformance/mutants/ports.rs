//! Bugs of ports.

use async_trait::async_trait;
use dpumesh_core::{Fence, Frame, PortIo, PortRef, Ports, Result};

use super::mutant::{Bug, Part};

#[async_trait]
impl Ports for Part {
    async fn list(&self) -> Result<Vec<dpumesh_core::PortInfo>> {
        self.inner
            .ports()
            .expect("asked only where the part is")
            .list()
            .await
    }

    async fn open(&self, fence: Fence, port: PortRef) -> Result<Box<dyn PortIo>> {
        let ports = self.inner.ports().expect("asked only where the part is");
        let inner = ports.open(self.fence(fence), port).await?;
        Ok(Box::new(MutantPort { inner, bug: self.bug }))
    }
}

#[derive(Debug)]
struct MutantPort {
    inner: Box<dyn PortIo>,
    bug: Bug,
}

impl PortIo for MutantPort {
    fn port(&self) -> PortRef {
        self.inner.port()
    }

    fn limits(&self) -> dpumesh_core::PortIoLimits {
        self.inner.limits()
    }

    fn receive(&mut self, frames: &mut [Frame]) -> Result<usize> {
        let count = self.inner.receive(frames)?;
        if self.bug == Bug::LosesFramesAtAnError && count == 3 {
            let failed = self.inner.receive(frames).err();
            return failed.map_or(Ok(count), Err);
        }
        match self.bug {
            Bug::ReceivesInReverse => frames[..count].reverse(),
            Bug::LeavesFramesAsTheyWere => frames[..count].iter_mut().for_each(|frame| frame.mark = 77),
            _ => {}
        }
        Ok(count)
    }

    fn transmit(&mut self, frames: &mut [Frame]) -> Result<usize> {
        self.inner.transmit(frames)
    }

    fn poll_fd(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        self.inner.poll_fd()
    }

    fn refused(&self) -> u64 {
        match self.bug {
            Bug::CountsNoRefusals => 0,
            _ => self.inner.refused(),
        }
    }
}
