//! What is written down of a card, before and after it is touched: leases with what they must restore, and the card's life.

use std::collections::BTreeMap;
use std::path::PathBuf;

use dpumesh_core::vf::{LeaseId, VfConfig, VfLease};
use dpumesh_core::{DpuId, Epoch, MacAddr, Mtu, PciAddress, PfIndex, PortRef, ResetLevels, VfAttributes};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::kernel::Spot;

/// The journal's value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Record {
    pub(crate) dpu: DpuId,
    pub(crate) epoch: Epoch,
    /// Between the card's loss and its return.
    pub(crate) away: bool,
    pub(crate) life: Life,
    /// What the card was found able to do in this life.
    pub(crate) abilities: Abilities,
    next_lease: u64,
    /// How often the VFs of each physical function were made: a VF that is made anew is another one at the same address.
    #[serde(default)]
    pub(crate) makings: BTreeMap<PfIndex, u64>,
    pub(crate) functions: BTreeMap<PortRef, Function>,
    /// Leases of the last life that ended: what an owner may want to have again.
    pub(crate) former: Vec<Held>,
}

/// By what a life of the card is known: a reset, a reload of the driver and a reboot all give the network devices of its
/// physical functions new numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Life {
    pub(crate) boot: String,
    pub(crate) links: Vec<(PciAddress, u32)>,
}

/// What a card is able to do, as it showed when asked.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Abilities {
    pub(crate) attributes: VfAttributes,
    pub(crate) max_mtu: Option<Mtu>,
    pub(crate) resets: ResetLevels,
    pub(crate) switchdev: bool,
    pub(crate) isolation: crate::Isolation,
}

/// What is remembered of a VF.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Function {
    /// The lease that the host made.
    pub(crate) held: Option<Held>,
    /// The lease that the SoC took.
    pub(crate) admitted: Option<VfLease>,
}

/// A lease with what must be restored at its end.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Held {
    pub(crate) lease: VfLease,
    pub(crate) pci: PciAddress,
    pub(crate) snapshot: Snapshot,
    /// What its owner asked for in all.
    pub(crate) config: VfConfig,
    /// The attributes that came with the request are on the device.
    pub(crate) configured: bool,
    /// Where it is, and where it was about to go.
    pub(crate) place: Place,
    pub(crate) going: Option<Place>,
}

/// Where a VF is used.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Place {
    /// In the host's namespace.
    #[default]
    Host,
    /// In another, under this name.
    Netns { path: PathBuf, ifname: String },
    /// Bound to vfio-pci.
    Vfio,
}

impl Place {
    /// The namespace where its network device would be.
    pub(crate) fn spot(&self) -> Option<Spot> {
        match self {
            Self::Host => Some(Spot::Host),
            Self::Netns { path, .. } => Some(Spot::At(path.clone())),
            Self::Vfio => None,
        }
    }
}

/// All that a VF had before it was leased.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Snapshot {
    /// What the PF administers.
    pub(crate) admin: Admin,
    /// Its driver.
    pub(crate) driver: Option<String>,
    /// Its network device.
    pub(crate) netdev: Option<Netdev>,
}

/// Attributes of a VF as its PF administers them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Admin {
    pub(crate) mac: MacAddr,
    pub(crate) vlan: u16,
    pub(crate) qos: u8,
    pub(crate) service_tag: bool,
    pub(crate) spoof_check: Option<bool>,
    pub(crate) trust: Option<bool>,
    pub(crate) link_state: dpumesh_core::vf::LinkState,
    pub(crate) min_rate: u32,
    pub(crate) max_rate: u32,
}

/// A network device as it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Netdev {
    pub(crate) name: String,
    pub(crate) mac: MacAddr,
    pub(crate) mtu: u32,
    pub(crate) up: bool,
    pub(crate) addresses: Vec<IpNet>,
}

impl Record {
    /// Of a card that nobody has used.
    pub(crate) fn fresh(dpu: DpuId) -> Self {
        Self {
            dpu,
            epoch: Epoch(0),
            away: true,
            life: Life::default(),
            abilities: Abilities::default(),
            next_lease: 1,
            makings: BTreeMap::new(),
            functions: BTreeMap::new(),
            former: Vec::new(),
        }
    }

    pub(crate) fn take_lease_number(&mut self) -> LeaseId {
        let id = LeaseId(self.next_lease);
        self.next_lease += 1;
        id
    }

    pub(crate) fn held(&self, port: PortRef) -> Option<&Held> {
        self.functions.get(&port)?.held.as_ref()
    }

    pub(crate) fn held_mut(&mut self, port: PortRef) -> Option<&mut Held> {
        self.functions.get_mut(&port)?.held.as_mut()
    }

    /// Begins a new life: leases are gone with the old one.
    pub(crate) fn begin_life(&mut self, life: Life) {
        let ended = std::mem::take(&mut self.functions).into_values();
        let ended: Vec<Held> = ended.filter_map(|function| function.held).collect();
        if !ended.is_empty() {
            self.former = ended;
        }
        self.epoch.0 += 1;
        self.away = false;
        self.life = life;
    }

    /// Forgets functions of which there is nothing to remember.
    pub(crate) fn tidy(&mut self) {
        self.functions
            .retain(|_, function| *function != Function::default());
    }
}
