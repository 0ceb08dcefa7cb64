//! [`ShmTransport`]: the channels of whatever transport the card was given, while the card is there.
//!
//! Channels are between processes, not on the card: those already made outlive its lives.

use std::sync::Arc;

use async_trait::async_trait;
use dpumesh_core::transport::{ChannelConfig, ChannelName, ShmChannel, ShmListener};
use dpumesh_core::{Result, ShmTransport};

use super::device::Card;

/// Channels of a card in memory.
#[derive(Debug)]
pub(super) struct MemoryTransport {
    card: Arc<Card>,
    inner: Arc<dyn ShmTransport>,
}

impl MemoryTransport {
    pub(super) fn new(card: Arc<Card>, inner: Arc<dyn ShmTransport>) -> Self {
        Self { card, inner }
    }
}

#[async_trait]
impl ShmTransport for MemoryTransport {
    async fn listen(&self, name: &ChannelName) -> Result<Box<dyn ShmListener>> {
        drop(self.card.present("transport.listen")?);
        self.inner.listen(name).await
    }

    async fn connect(&self, name: &ChannelName, config: &ChannelConfig) -> Result<Box<dyn ShmChannel>> {
        drop(self.card.present("transport.connect")?);
        self.inner.connect(name, config).await
    }
}
