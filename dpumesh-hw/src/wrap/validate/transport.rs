//! Checks of [`ShmTransport`] and its channels.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use async_trait::async_trait;
use dpumesh_core::transport::{
    ChannelConfig, ChannelMode, ChannelName, PeerState, SharedWriter, ShmChannel, ShmListener, ShmTransport,
};
use dpumesh_core::{Backend, BackendExt, Result};

use super::{Checked, Look};

#[async_trait]
impl ShmTransport for Checked {
    async fn listen(&self, name: &ChannelName) -> Result<Box<dyn ShmListener>> {
        let look = self.reading("transport.listen");
        let inner = look.general(self.inner.require_transport()?.listen(name).await)?;
        Ok(Box::new(CheckedListener {
            backend: Arc::clone(&self.inner),
            inner,
        }))
    }

    async fn connect(&self, name: &ChannelName, config: &ChannelConfig) -> Result<Box<dyn ShmChannel>> {
        let look = self.reading("transport.connect");
        let inner = look.general(self.inner.require_transport()?.connect(name, config).await)?;
        let agreed = inner.config();
        let fits = agreed.mode == config.mode && agreed.ring >= config.ring;
        look.hold(fits, || {
            format!("{agreed:?} was agreed on where {config:?} was asked for")
        })?;
        Ok(Box::new(CheckedChannel {
            backend: Arc::clone(&self.inner),
            inner,
        }))
    }
}

#[derive(Debug)]
struct CheckedListener {
    backend: Arc<dyn Backend>,
    inner: Box<dyn ShmListener>,
}

#[async_trait]
impl ShmListener for CheckedListener {
    async fn accept(&mut self) -> Result<Box<dyn ShmChannel>> {
        let answer = self.inner.accept().await;
        let look = look(&*self.backend, "transport.accept");
        let inner = look.general(answer)?;
        Ok(Box::new(CheckedChannel {
            backend: Arc::clone(&self.backend),
            inner,
        }))
    }
}

#[derive(Debug)]
struct CheckedChannel {
    backend: Arc<dyn Backend>,
    inner: Box<dyn ShmChannel>,
}

impl ShmChannel for CheckedChannel {
    fn config(&self) -> ChannelConfig {
        self.inner.config()
    }

    fn send(&mut self, slices: &[&[u8]]) -> Result<usize> {
        let answer = self.inner.send(slices);
        let look = look(&*self.backend, "transport.send");
        let sent = look.general(answer)?;
        let most = match self.inner.config().mode {
            ChannelMode::Messages => slices.len(),
            ChannelMode::Stream => slices.iter().map(|slice| slice.len()).sum(),
        };
        look.hold(sent <= most, || format!("{sent} were sent of {most}"))?;
        Ok(sent)
    }

    fn send_with(&mut self, len: usize, fill: &mut dyn FnMut(&mut dyn SharedWriter)) -> Result<bool> {
        let mut calls = 0_u32;
        let mut room = None;
        let answer = self.inner.send_with(len, &mut |writer| {
            calls += 1;
            room = Some(writer.remaining());
            fill(writer);
        });
        let look = look(&*self.backend, "transport.send_with");
        let sent = look.general(answer)?;
        look.hold(!sent || (calls == 1 && room == Some(len)), || {
            format!("the message was filled {calls} times, with room for {room:?} of {len} octets")
        })?;
        Ok(sent)
    }

    fn receive(&mut self, buffer: &mut [u8]) -> Result<Option<usize>> {
        let answer = self.inner.receive(buffer);
        let look = look(&*self.backend, "transport.receive");
        let received = look.general(answer)?;
        look.hold(
            received.is_none_or(|octets| octets <= buffer.len()),
            || "more octets were received than the buffer holds",
        )?;
        Ok(received)
    }

    fn arm(&mut self) -> Result<bool> {
        let answer = self.inner.arm();
        look(&*self.backend, "transport.arm").general(answer)
    }

    fn poll_fd(&self) -> BorrowedFd<'_> {
        self.inner.poll_fd()
    }

    fn peer(&self) -> PeerState {
        self.inner.peer()
    }
}

fn look<'a>(backend: &'a dyn Backend, operation: &'static str) -> Look<'a> {
    Look {
        backend,
        operation,
        fence: None,
    }
}
