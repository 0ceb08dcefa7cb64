//! [`VfAllocator`]: who has which virtual function.
//!
//! # Life of a lease
//! 1. **lease** (host): a free VF is journalled, snapshotted and given to an owner. Journalled before it is touched, so that
//!    a crash at any point leaves a record to undo.
//! 2. **admit** (SoC): the other party takes the lease: the port's frames may be opened now.
//! 3. **configure**, **attach** (host): attributes, then the move into the pod.
//! 4. **revoke** (SoC): the port closes; frames stop.
//! 5. **release** (host): moved back, restored by difference to the snapshot, reset, given back.
//!
//! A lease is two-party: host and SoC are two machines, and a VF whose lease only one of them holds passes no frame.
//! On a backend of role `Both`, one value plays both parts. Calls of the other side's part are `Unsupported`.
//!
//! Release is idempotent, and a lease that is not current cannot touch the VF any more: the next pod's VF is safe from the
//! last pod's late DEL.

use std::fmt;
use std::path::PathBuf;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::addr::{MacAddr, Mtu, VlanId};
use crate::backend::{DpuId, Epoch, Fence};
use crate::error::{Error, Result};
use crate::pci::PciAddress;
use crate::port::{PfIndex, PortRef};

/// The virtual functions of one card.
///
/// Safe to call concurrently; calls about one VF are serialised by the backend. State-changing calls are transactions: on
/// an error everything is as before, unless [`Error::effect`] says otherwise. None blocks the calling thread; all may
/// take seconds (PCI enumeration, FLR), so give them a deadline. Cancelling one leaves a journalled state that
/// [`VfAllocator::reclaim`] cleans up and `list` shows.
#[async_trait]
pub trait VfAllocator: Send + Sync + fmt::Debug {
    /// Tells what changing the number of VFs would disturb, without doing it.
    ///
    /// # Errors
    /// `NotFound` (PF), `Unsupported` (fixed number), `CapacityExceeded`, `DeviceLost`.
    async fn plan_vf_count(&self, pf: PfIndex, count: u16) -> Result<Disruption>;

    /// Sets the number of VFs and returns when they are enumerated, with the number the card really gave.
    ///
    /// A long operation. Refused with `Busy` while a VF that would go is leased. Where backends differ: SR-IOV goes through
    /// zero (kernel `sriov_numvfs`), so any lease refuses any change.
    ///
    /// # Errors
    /// As [`VfAllocator::plan_vf_count`], `Busy`, `Stale`, `Timeout` with [`crate::Effect::Unknown`].
    async fn set_vf_count(&self, fence: Fence, pf: PfIndex, count: u16) -> Result<VfCount>;

    /// Lists every VF as observed now: where it is, what its attributes are, who leases it. Read-only.
    ///
    /// # Errors
    /// `DeviceLost`, `Io`.
    async fn list(&self) -> Result<Vec<VfState>>;

    /// Leases a free VF that fits the request to `request.owner` (host).
    ///
    /// Asking again with the same owner returns the same lease. Deterministic: the lowest index that fits.
    ///
    /// # Errors
    /// `CapacityExceeded` (`vf`: none free), `NotFound` (none fits the selector), `Conflict` (the MAC is in use on the
    /// card), `Invalid` (`owner` empty), `Unsupported` (SoC side), `Stale`, `DeviceLost`.
    async fn lease(&self, fence: Fence, request: &VfRequest) -> Result<VfLease>;

    /// Takes a lease that the host made (SoC): from now on the port's frames may be opened.
    ///
    /// Taking the same lease again succeeds. A different lease of the same port is `Conflict` until the old one is revoked.
    ///
    /// # Errors
    /// `NotFound` (port), `Conflict`, `Invalid` (another card's lease), `Unsupported` (host side), `Stale` (epoch of the
    /// fence or of the lease), `DeviceLost`.
    async fn admit(&self, fence: Fence, lease: &VfLease) -> Result<()>;

    /// Gives a lease back (SoC): the port closes; its open frames end with `DeviceLost`. Idempotent.
    ///
    /// # Errors
    /// `Unsupported` (host side), `Stale` (epoch of the fence), `DeviceLost`. A lease that is not held is no error.
    async fn revoke(&self, fence: Fence, lease: &VfLease) -> Result<()>;

    /// Sets attributes of a leased VF (host); `None` leaves one alone.
    ///
    /// Support for all of them is checked before the first is touched. On a failure half-way the ones already set are put
    /// back; [`crate::Effect::Partial`] with the field's name if that failed too. Order: through the PF first
    /// (drivers refuse a MAC with trust off), then the network device.
    ///
    /// # Errors
    /// `Stale` (lease not current), `Unsupported` (field named), `Invalid`, `Conflict` (MAC), `DeviceLost`, `Io`.
    async fn configure(&self, fence: Fence, lease: &VfLease, config: &VfConfig) -> Result<()>;

    /// Moves a leased VF to where its owner will use it (host), under its final name, link up.
    ///
    /// Attaching to where it is already succeeds. Addresses and routes are the caller's (IPAM).
    ///
    /// # Errors
    /// `Stale`, `Unsupported` (kind), `Invalid` (name), `NotFound` (namespace), `Exists` (name taken there), `Busy`
    /// (attached elsewhere), `DeviceLost`, `Io`.
    async fn attach(&self, fence: Fence, lease: &VfLease, attachment: &Attachment) -> Result<AttachedVf>;

    /// Brings a leased VF back from where it was attached (host). Idempotent; a namespace that is gone is no error.
    ///
    /// # Errors
    /// `Stale`, `DeviceLost`, `Io`.
    async fn detach(&self, fence: Fence, lease: &VfLease) -> Result<()>;

    /// Ends a lease (host): detaches, restores attributes by difference of observed and snapshot, resets at least at
    /// `level`, and frees the VF.
    ///
    /// Idempotent: a lease that is not current any more is [`Released::NotCurrent`] and touches nothing. Teardown tries
    /// every step and frees the VF only if all of them worked; else the lease stays and the error lists what failed.
    ///
    /// # Errors
    /// `Unsupported` (level), `Stale` (epoch of the fence; that of the lease is `NotCurrent`), `DeviceLost` (the lease
    /// is gone with the card), `Io` with [`crate::Effect::Partial`].
    async fn release(&self, fence: Fence, lease: &VfLease, level: ResetLevel) -> Result<Released>;

    /// Gets a stray VF back without its lease: one whose record was torn, or that `list` shows where nobody put it.
    ///
    /// Tries in order a move back, a rebind of the driver and a reset, up to `level`, and says how far it had to go.
    /// Refused with `Busy` while the VF is leased and its owner is in `live`.
    ///
    /// # Errors
    /// `NotFound`, `Busy`, `Unsupported` (level), `Stale`, `DeviceLost`, `Io` (it takes more than `level`).
    async fn reclaim(
        &self,
        fence: Fence,
        port: PortRef,
        live: &[LeaseOwner],
        level: ResetLevel,
    ) -> Result<ResetLevel>;
}

/// What a change of the VF count disturbs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Disruption {
    /// Nothing.
    None,
    /// Pods with VFs must leave the node first.
    Drain,
    /// The node must reboot.
    Reboot,
}

/// What setting the VF count did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VfCount {
    /// How many there are now; may be fewer than asked for.
    pub actual: u16,
    /// What is still needed to get the rest.
    pub needs: Disruption,
}

/// Who holds a lease: the caller's text, as a pod's sandbox id and interface. Not empty.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LeaseOwner(pub String);

/// A request for a VF.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct VfRequest {
    /// For whom.
    pub owner: LeaseOwner,
    /// Which VFs will do.
    pub selector: VfSelector,
    /// Attributes from the start.
    pub config: VfConfig,
}

impl VfRequest {
    /// Any free VF, as it is.
    pub fn new(owner: impl Into<String>) -> Self {
        let owner = LeaseOwner(owner.into());
        Self {
            owner,
            selector: VfSelector::default(),
            config: VfConfig::default(),
        }
    }

    /// With attributes.
    pub fn with_config(mut self, config: VfConfig) -> Self {
        self.config = config;
        self
    }
}

/// Which VFs will do; `None` takes any.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VfSelector {
    /// This very port.
    pub port: Option<PortRef>,
    /// Of this physical function.
    pub pf: Option<PfIndex>,
    /// With this PCI address.
    pub pci: Option<PciAddress>,
    /// On this NUMA node.
    pub numa_node: Option<u16>,
    /// Bound to this driver.
    pub driver: Option<String>,
}

/// A lease: the right to use one VF in one life of the card.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct VfLease {
    /// Number of the lease; never given twice on a card.
    pub id: LeaseId,
    /// Which card.
    pub dpu: DpuId,
    /// Which VF.
    pub port: PortRef,
    /// For whom.
    pub owner: LeaseOwner,
    /// In which life of the card.
    pub epoch: Epoch,
}

impl VfLease {
    /// A lease as a backend makes it.
    pub fn new(id: LeaseId, dpu: DpuId, port: PortRef, owner: LeaseOwner, epoch: Epoch) -> Self {
        Self {
            id,
            dpu,
            port,
            owner,
            epoch,
        }
    }
}

/// Number of a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LeaseId(pub u64);

/// Attributes of a VF to be set; `None` leaves one alone.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VfConfig {
    /// Administrative MAC, given by the PF.
    pub mac: Option<MacAddr>,
    /// VLAN that the eswitch adds and removes.
    pub vlan: Option<VfVlan>,
    /// The VF may change its own MAC and receive promiscuously.
    pub trust: Option<bool>,
    /// Frames with a foreign source MAC are dropped.
    pub spoof_check: Option<bool>,
    /// Link state the VF sees.
    pub link_state: Option<LinkState>,
    /// Guaranteed transmit rate.
    pub min_rate: Option<RateMbps>,
    /// Largest transmit rate.
    pub max_rate: Option<RateMbps>,
    /// Largest L3 packet.
    pub mtu: Option<Mtu>,
}

/// A VLAN of the eswitch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VfVlan {
    /// Identifier; `None` takes the VLAN off.
    pub id: Option<VlanId>,
    /// Priority code point, 0 to 7.
    pub qos: u8,
    /// 802.1ad (QinQ) instead of 802.1Q.
    pub service_tag: bool,
}

/// Link state as the VF sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LinkState {
    /// Follows the uplink.
    Auto,
    /// Always up.
    Enable,
    /// Always down.
    Disable,
}

/// A rate in megabits per second; 0 is unlimited.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RateMbps(pub u32);

/// Where a VF is used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Attachment {
    /// As a network device in a namespace.
    Netns {
        /// Path of the namespace, as CNI_NETNS gives it.
        path: PathBuf,
        /// Name of the device there, at most 15 octets.
        ifname: String,
    },
    /// As a VFIO device.
    Vfio,
    /// As a vhost-user socket.
    VhostUser {
        /// Path of the socket.
        socket: PathBuf,
    },
}

/// A VF at its place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct AttachedVf {
    /// Effective MAC.
    pub mac: MacAddr,
    /// Effective MTU.
    pub mtu: Mtu,
    /// Interface index in its namespace, for a network device.
    pub ifindex: Option<u32>,
}

impl AttachedVf {
    /// A VF with these effective attributes.
    pub fn new(mac: MacAddr, mtu: Mtu, ifindex: Option<u32>) -> Self {
        Self { mac, mtu, ifindex }
    }
}

/// How thoroughly a VF is reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ResetLevel {
    /// Attributes are restored.
    Config,
    /// Function-level reset (PCI FLR).
    Function,
    /// The whole device: disturbs every VF.
    Device,
}

/// What a release did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Released {
    /// The VF is free.
    Freed,
    /// The lease was not current any more; nothing was touched.
    NotCurrent,
}

/// A VF as observed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct VfState {
    /// Which VF.
    pub port: PortRef,
    /// Its PCI address, where there is one.
    pub pci: Option<PciAddress>,
    /// MAC given by the PF; zero when none was.
    pub admin_mac: MacAddr,
    /// MAC that the function uses.
    pub effective_mac: MacAddr,
    /// Largest L3 packet.
    pub mtu: Mtu,
    /// Where it is.
    pub location: VfLocation,
    /// Its current lease.
    pub lease: Option<VfLease>,
}

impl VfState {
    /// A free VF on the host.
    pub fn new(port: PortRef, mac: MacAddr, mtu: Mtu) -> Self {
        Self {
            port,
            pci: None,
            admin_mac: mac,
            effective_mac: mac,
            mtu,
            location: VfLocation::Host,
            lease: None,
        }
    }
}

/// Where a VF was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum VfLocation {
    /// In the host's namespace.
    Host,
    /// In another namespace.
    Netns {
        /// Path by which it was attached.
        path: PathBuf,
    },
    /// Bound to a driver other than its network driver.
    Driver(String),
    /// Nowhere to be found.
    Missing,
}

/// Several failures of one teardown.
#[derive(Clone, Debug, Default)]
pub struct TeardownErrors(pub Vec<Error>);

impl fmt::Display for TeardownErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, error) in self.0.iter().enumerate() {
            let separator = if index == 0 { "" } else { "; " };
            write!(f, "{separator}{error}")?;
        }
        Ok(())
    }
}

impl std::error::Error for TeardownErrors {}
