//! What is said on the channel.

use std::net::IpAddr;

use dpumesh_core::steering::{Batch, Cookie, MissPolicy, Owner, SteeringRule};
use dpumesh_core::vf::VfLease;
use dpumesh_core::{BackendInfo, Capabilities, Epoch, Fence, MacAddr, PortRef};
use serde::{Deserialize, Serialize};

/// Version of the channel that this code speaks.
pub const VERSION: u32 = 1;
/// Oldest version that it still speaks.
pub const VERSION_MIN: u32 = 1;

/// Header of every call: the version that the caller speaks.
pub(super) const VERSION_HEADER: &str = "dpumesh-channel-version";
/// Name of the gRPC service.
pub(super) const SERVICE: &str = "dpumesh.channel.v1.Dataplane";

/// Names of the calls, as `/service/Call`.
pub(super) mod call {
    macro_rules! calls {
        ($($name:ident = $path:literal;)*) => {
            $(pub(in crate::channel) const $name: &str = concat!("/dpumesh.channel.v1.Dataplane/", $path);)*
        };
    }
    calls! {
        HELLO = "Hello";
        ATTACH = "Attach";
        DETACH = "Detach";
        VALIDATE = "Validate";
        APPLY = "Apply";
        LIST = "List";
        COUNTERS = "Counters";
        FLUSH = "Flush";
        SET_MISS_POLICY = "SetMissPolicy";
        OCCUPANCY = "Occupancy";
        STATS = "Stats";
        EVENTS = "Events";
    }
}

/// A call without arguments, or an answer without contents.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Empty {}

/// How the dataplane introduces itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Hello {
    /// Oldest version of the channel it speaks.
    pub version_min: u32,
    /// Newest.
    pub version: u32,
    /// Which card, which backend.
    pub info: BackendInfo,
    /// What it can do.
    pub capabilities: Capabilities,
    /// Its present life.
    pub epoch: Epoch,
}

impl Hello {
    pub(super) fn new(info: BackendInfo, capabilities: Capabilities, epoch: Epoch) -> Self {
        Self {
            version_min: VERSION_MIN,
            version: VERSION,
            info,
            capabilities,
            epoch,
        }
    }
}

/// A pod's port and what it may send.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attachment {
    /// The lease that the host gave.
    pub lease: VfLease,
    /// The only source MAC.
    pub mac: MacAddr,
    /// The only source addresses.
    pub addresses: Vec<IpAddr>,
    /// MAC of the router that the pod sees.
    pub gateway: MacAddr,
    /// Number by which the proxy knows the port; not 0.
    pub ingress: u32,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Attach {
    pub(super) fence: Fence,
    pub(super) attachment: Attachment,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Detach {
    pub(super) fence: Fence,
    pub(super) lease: VfLease,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Validate {
    pub(super) rules: Vec<SteeringRule>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Apply {
    pub(super) fence: Fence,
    pub(super) batch: Batch,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct List {
    pub(super) owner: Owner,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ReadCounters {
    pub(super) owner: Owner,
    pub(super) cookies: Vec<Cookie>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Flush {
    pub(super) fence: Fence,
    pub(super) owner: Owner,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SetMissPolicy {
    pub(super) fence: Fence,
    pub(super) port: PortRef,
    pub(super) policy: MissPolicy,
}
