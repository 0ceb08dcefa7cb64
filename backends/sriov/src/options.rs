//! [`Options`]: what the caller says about a node's card.

use std::path::PathBuf;

use dpumesh_core::{DpuId, PciAddress, Role};
use serde::{Deserialize, Serialize};

/// Which card, and how to use it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    /// Any function of the card; all its physical functions with SR-IOV are used, the lowest address is PF 0.
    pub device: PciAddress,
    /// Name of the card.
    pub dpu: DpuId,
    /// Which side of the card this is. A NIC without a processor of its own is [`Role::Both`].
    #[serde(default = "both")]
    pub role: Role,
    /// Directory of the lease journal. It must outlive the process, and may be lost with the machine's boot.
    pub journal: PathBuf,
    /// Root of sysfs.
    #[serde(default = "sysfs")]
    pub sysfs: PathBuf,
    /// Network namespace where VFs are that nobody uses; `None`: that of the thread that opens the card.
    #[serde(default)]
    pub host_namespace: Option<PathBuf>,
    /// How VFs are kept from talking past the host.
    #[serde(default)]
    pub protect: Protect,
    /// VLANs for [`crate::Isolation::VlanPerVf`], first and last, both included; one for each VF that the card can have.
    ///
    /// Who names them vouches that the switch at the card's ports drops them in both directions: the card sends frames of a VF
    /// out on the wire under its tag, and takes frames with that tag from the wire. `None`: no VLAN keeps VFs apart.
    #[serde(default)]
    pub vlans: Option<(u16, u16)>,
}

/// Whether frames may go from one VF to another past the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Protect {
    /// Never: a card where nothing stops them leases no VF.
    #[default]
    Required,
    /// They may: VFs are plain network interfaces, and no pod on them is protected.
    Waived,
}

impl Options {
    /// A card at `device`, called `dpu`, with its journal in a directory.
    pub fn new(device: PciAddress, dpu: impl Into<String>, journal: impl Into<PathBuf>) -> Self {
        Self {
            device,
            dpu: DpuId(dpu.into()),
            role: both(),
            journal: journal.into(),
            sysfs: sysfs(),
            host_namespace: None,
            protect: Protect::default(),
            vlans: None,
        }
    }
}

fn both() -> Role {
    Role::Both
}

fn sysfs() -> PathBuf {
    PathBuf::from("/sys")
}
