//! Bugs of channels.

use async_trait::async_trait;
use dpumesh_core::transport::{ChannelConfig, ChannelName, PeerState, SharedWriter, ShmChannel, ShmListener};
use dpumesh_core::{ErrorKind, Result, ShmTransport};

use super::mutant::{Bug, Part};

#[async_trait]
impl ShmTransport for Part {
    async fn listen(&self, name: &ChannelName) -> Result<Box<dyn ShmListener>> {
        let transport = self.inner.transport().expect("asked only where the part is");
        let inner = transport.listen(name).await?;
        Ok(Box::new(MutantListener { inner, bug: self.bug }))
    }

    async fn connect(&self, name: &ChannelName, config: &ChannelConfig) -> Result<Box<dyn ShmChannel>> {
        let transport = self.inner.transport().expect("asked only where the part is");
        let inner = transport.connect(name, config).await?;
        Ok(Box::new(MutantChannel {
            inner,
            bug: self.bug,
            lies: 0,
        }))
    }
}

#[derive(Debug)]
struct MutantListener {
    inner: Box<dyn ShmListener>,
    bug: Bug,
}

#[async_trait]
impl ShmListener for MutantListener {
    async fn accept(&mut self) -> Result<Box<dyn ShmChannel>> {
        let inner = self.inner.accept().await?;
        Ok(Box::new(MutantChannel {
            inner,
            bug: self.bug,
            lies: 0,
        }))
    }
}

#[derive(Debug)]
struct MutantChannel {
    inner: Box<dyn ShmChannel>,
    bug: Bug,
    lies: u32,
}

impl MutantChannel {
    /// Whether a lie of the peer is passed over: none, all, or all but the first.
    fn forgives(&mut self) -> bool {
        self.lies += 1;
        match self.bug {
            Bug::OverlooksALiar => true,
            Bug::ForgivesALiar => self.lies > 1,
            _ => false,
        }
    }
}

/// Room that is not there.
#[derive(Debug)]
struct Nowhere;

impl SharedWriter for Nowhere {
    fn write(&mut self, _: &[u8]) -> usize {
        0
    }

    fn remaining(&self) -> usize {
        0
    }
}

impl ShmChannel for MutantChannel {
    fn config(&self) -> ChannelConfig {
        self.inner.config()
    }

    fn send(&mut self, slices: &[&[u8]]) -> Result<usize> {
        let longest = self.inner.config().max_message as usize;
        match self.bug {
            Bug::MergesMessages => {
                let merged = slices.concat();
                self.inner.send(&[&merged])?;
                Ok(slices.len())
            }
            Bug::TruncatesMessages => {
                let cut: Vec<&[u8]> = slices
                    .iter()
                    .map(|slice| &slice[..slice.len().min(longest)])
                    .collect();
                self.inner.send(&cut)
            }
            Bug::OverlooksALiar => match self.inner.send(slices) {
                Err(error) if error.kind == ErrorKind::PeerMisbehaved => Ok(0),
                answer => answer,
            },
            _ => self.inner.send(slices),
        }
    }

    fn send_with(&mut self, len: usize, fill: &mut dyn FnMut(&mut dyn SharedWriter)) -> Result<bool> {
        match self.inner.send_with(len, fill) {
            Err(error) if error.kind == ErrorKind::PeerMisbehaved && self.bug == Bug::OverlooksALiar => {
                Ok(false)
            }
            Ok(false) if self.bug == Bug::FillsWithoutRoom => {
                fill(&mut Nowhere);
                Ok(false)
            }
            answer => answer,
        }
    }

    fn receive(&mut self, buffer: &mut [u8]) -> Result<Option<usize>> {
        match self.inner.receive(buffer) {
            Err(error) if error.kind == ErrorKind::PeerMisbehaved && self.forgives() => Ok(None),
            Err(error) if self.bug == Bug::OverlooksADeadPeer && error.kind == ErrorKind::DeviceLost => {
                Ok(None)
            }
            answer => answer,
        }
    }

    fn arm(&mut self) -> Result<bool> {
        let armed = match self.inner.arm() {
            Err(error) if error.kind == ErrorKind::PeerMisbehaved && self.bug == Bug::OverlooksALiar => false,
            answer => answer?,
        };
        Ok(armed || self.bug == Bug::LetsItsOwnerOversleep)
    }

    fn poll_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.inner.poll_fd()
    }

    fn peer(&self) -> PeerState {
        let mut state = self.inner.peer();
        if self.bug == Bug::HidesWhatIsInFlight {
            state.in_flight = 0;
        }
        state
    }
}
