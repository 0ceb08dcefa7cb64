//! The cards that the kit is run against: a large one and a small one, each other's opposite in what they can do.

use std::path::Path;
use std::sync::Arc;

use dpumesh_core::steering::{Atomicity, Field};
use dpumesh_core::{
    ActionKinds, AttachmentKinds, Capabilities, ConnectionKinds, EventKinds, MatchKinds, Mtu, ResetLevels,
    VfAttributes,
};
use dpumesh_hw::conformance::memory::MemoryFixture;
use dpumesh_hw::memory::{self, MemoryConfig};
use dpumesh_hw::shm::SocketTransport;

use crate::channels::Channels;

/// Everything that the memory backend can do.
pub(crate) fn large() -> MemoryFixture {
    of("memory", memory::capabilities())
}

/// A card with little of everything, whose limits can be reached, and nothing to fall back to.
pub(crate) fn small() -> MemoryFixture {
    of("memory-small", little())
}

/// A card in memory whose channels are those of [`SocketTransport`].
pub(crate) fn over_sockets(folder: &Path, capabilities: &Capabilities) -> MemoryFixture {
    let transport = SocketTransport::new(folder.join("channels"), capabilities.transport.clone());
    MemoryFixture::new("shm", MemoryConfig::default())
        .with_capabilities(capabilities.clone())
        .with_transport(Arc::new(transport.expect("claims that can be kept")))
}

/// What the small card claims.
pub(crate) fn little() -> Capabilities {
    let mut small = Capabilities::default();
    "small".clone_into(&mut small.mode);
    small.vf.max_vfs = 4;
    small.vf.attributes = VfAttributes::MAC | VfAttributes::SPOOF_CHECK;
    small.vf.max_mtu = Mtu::try_from(1500).ok();
    small.vf.attachments = AttachmentKinds::NETNS;
    small.vf.resets = ResetLevels::CONFIG;
    let steering = &mut small.steering;
    steering.hardware_rules = 40;
    steering.rules = 40;
    steering.groups = 2;
    steering.priorities = 2;
    steering.masks = 8;
    steering.counters = 6;
    steering.actions = ActionKinds::DROP | ActionKinds::FORWARD | ActionKinds::COUNT | ActionKinds::JUMP;
    steering.hardware_actions = steering.actions;
    steering.fields = [
        (Field::Port, MatchKinds::EXACT),
        (Field::EthDst, MatchKinds::EXACT),
        (Field::Ip4Dst, MatchKinds::EXACT | MatchKinds::PREFIX),
    ]
    .into();
    steering.hardware_fields = steering.fields.clone();
    steering.atomicity = [Atomicity::Continue].into();
    steering.batch_max = 32;
    steering.per_operation_status = false;
    small.offload.slots = 3;
    small.offload.max_image = 4096;
    small.offload.tables = 2;
    small.offload.entries = 100;
    small.offload.connections = 5;
    small.offload.connection_kinds = ConnectionKinds::SPLICE;
    small.transport.channels = 3;
    small.transport.max_message = 1024;
    small.transport.max_ring = 4096;
    small.transport.messages = true;
    small.ports.open = 2;
    small.events = EventKinds::HIGH_WATER;
    small
}

fn of(name: &str, capabilities: Capabilities) -> MemoryFixture {
    let channels = Channels::new(capabilities.transport.clone());
    MemoryFixture::new(name, MemoryConfig::default())
        .with_capabilities(capabilities)
        .with_transport(Arc::new(channels))
}
