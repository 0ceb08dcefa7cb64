//! A card that is not there: a sysfs tree in a temporary directory and a kernel that is a small state machine.
//!
//! [`FakeMachine`] fills the [`Kernel`](crate::kernel::Kernel) seam with what a NIC, its driver and the network namespaces of a machine do: writing
//! `sriov_numvfs` makes functions with network devices, attributes are taken or refused as the [`Model`] says, a device moves
//! between namespaces, a namespace dies under it, the card vanishes and returns. Calls can be made to fail or to be the last
//! thing that a process does. So the conformance kit runs as nobody, and cards can be tested that no test machine has.

pub mod fixture;
mod frames;
mod machine;
mod tree;

pub use fixture::{FakeFixture, FakeRig};
pub use machine::{Died, FakeMachine};

use dpumesh_core::VfAttributes;

/// Which card to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Model {
    /// Driver of its physical functions.
    pub driver: &'static str,
    /// Driver of its VFs.
    pub vf_driver: &'static str,
    /// Vendor and device number.
    pub id: (u16, u16),
    /// Device number of its VFs.
    pub vf_id: u16,
    /// Physical functions.
    pub pfs: u16,
    /// Most VFs of each.
    pub total_vfs: u16,
    /// VFs that come up, whatever is asked for: a limit of the firmware.
    pub firmware_vfs: u16,
    /// Attributes that its driver sets.
    pub attributes: VfAttributes,
    /// devlink knows an eswitch, which can be in switchdev mode.
    pub switchdev: bool,
    /// The embedded switch can be told to send everything out on the wire.
    pub vepa: bool,
    /// VFs can be reset one by one.
    pub flr: bool,
    /// VFs use an administered MAC only once their device is switched on anew.
    pub late_mac: bool,
    /// Largest MTU of a VF.
    pub max_mtu: u32,
}

impl Model {
    /// An Intel 82576: 7 VFs, no switchdev, no link state, no smallest rate.
    pub fn igb() -> Self {
        Self {
            driver: "igb",
            vf_driver: "igbvf",
            id: (0x8086, 0x10c9),
            vf_id: 0x10ca,
            pfs: 1,
            total_vfs: 7,
            firmware_vfs: 7,
            attributes: VfAttributes::MAC
                | VfAttributes::VLAN
                | VfAttributes::TRUST
                | VfAttributes::SPOOF_CHECK
                | VfAttributes::MAX_RATE,
            switchdev: false,
            vepa: false,
            flr: true,
            late_mac: true,
            max_mtu: 9216,
        }
    }

    /// As an NVIDIA ConnectX: two ports, every attribute, devlink with switchdev and representors.
    pub fn mlx5() -> Self {
        Self {
            driver: "mlx5_core",
            vf_driver: "mlx5_core",
            id: (0x15b3, 0x1019),
            vf_id: 0x101a,
            pfs: 2,
            total_vfs: 8,
            firmware_vfs: 8,
            attributes: VfAttributes::all(),
            switchdev: true,
            vepa: true,
            flr: true,
            late_mac: false,
            max_mtu: 9978,
        }
    }

    /// A card that can do next to nothing: MACs only, nothing keeps its VFs apart.
    pub fn bare() -> Self {
        Self {
            driver: "barenic",
            vf_driver: "barenicvf",
            attributes: VfAttributes::MAC,
            switchdev: false,
            vepa: false,
            flr: false,
            late_mac: false,
            ..Self::igb()
        }
    }

    /// A Yusur card as its documentation for Kube-OVN shows it: 256 VFs, tc offload, switchdev.
    pub fn yusur() -> Self {
        Self {
            driver: "yusur",
            vf_driver: "yusur_vf",
            id: (0x1f47, 0x1001),
            vf_id: 0x110f,
            pfs: 1,
            total_vfs: 256,
            firmware_vfs: 256,
            ..Self::mlx5()
        }
    }
}
