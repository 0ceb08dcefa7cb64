//! The seam between the backend and Linux: everything that it asks of the kernel, as one trait.
//!
//! [`Linux`](linux::Linux) is the kernel; module `fake` (with that feature) is a card that is not there, for crash points and for NICs that no
//! test machine has. Reading sysfs is ordinary file reading below [`Kernel::sysfs`]; writing it goes through the
//! trait, because a write has consequences.

pub mod linux;

use std::fmt;
use std::path::{Path, PathBuf};

use dpumesh_core::{ErrorKind, Mtu, PciAddress, PortIo, PortRef, Result};
use dpumesh_hw::netlink::{
    BridgeMode, DevlinkPort, EswitchMode, Link, LinkIndex, NetlinkError, Vf, VfSetting,
};
use ipnet::IpNet;

use crate::Sieve;
use crate::card::error;

/// What the backend asks of the kernel. Calls block; each is one system call or one netlink request with its answer.
pub trait Kernel: Send + Sync + fmt::Debug {
    /// Root of sysfs, `/sys`.
    fn sysfs(&self) -> &Path;

    /// Writes a sysfs attribute, named from the root. Returns when the kernel has done what the write asks for.
    ///
    /// # Errors
    /// The errno with which the kernel refused.
    fn write(&self, attribute: &Path, value: &str) -> Outcome<()>;

    /// Identity of the running kernel's boot.
    ///
    /// # Errors
    /// If it cannot be read.
    fn boot(&self) -> Outcome<String>;

    /// Identity of a namespace: equal exactly when it is the same.
    ///
    /// # Errors
    /// `ENOENT` when there is none.
    fn namespace(&self, spot: &Spot) -> Outcome<u64>;

    /// The network devices of a namespace.
    ///
    /// # Errors
    /// If it cannot be entered.
    fn links(&self, spot: &Spot) -> Outcome<Vec<Link>>;

    /// Changes a network device, in one request.
    ///
    /// # Errors
    /// What the driver refused with.
    fn change_link(&self, spot: &Spot, link: LinkIndex, edit: &LinkEdit) -> Outcome<()>;

    /// Moves a network device to another namespace under another name, in one request: it is never seen under the old
    /// name there, nor under the new name here. It arrives switched off.
    ///
    /// # Errors
    /// `EEXIST` when the name is taken there.
    fn move_link(&self, from: &Spot, link: LinkIndex, to: &Spot, name: &str) -> Outcome<()>;

    /// Configured addresses of a network device.
    ///
    /// # Errors
    /// If the namespace cannot be entered.
    fn addresses(&self, spot: &Spot, link: LinkIndex) -> Outcome<Vec<IpNet>>;

    /// Gives a network device an address.
    ///
    /// # Errors
    /// What the kernel refused with.
    fn add_address(&self, spot: &Spot, link: LinkIndex, net: IpNet) -> Outcome<()>;

    /// The VFs of a physical function as it administers them.
    ///
    /// # Errors
    /// `ENODEV` when the device is gone.
    fn vfs(&self, pf: LinkIndex) -> Outcome<Vec<Vf>>;

    /// Sets one attribute of a VF through its physical function.
    ///
    /// # Errors
    /// `EOPNOTSUPP` when the driver cannot, `EBUSY` when it cannot now, `EINVAL` when it does not want to.
    fn set_vf(&self, pf: LinkIndex, vf: u16, setting: &VfSetting) -> Outcome<()>;

    /// Mode of the embedded switch; `None` when the driver does not tell.
    ///
    /// # Errors
    /// If the kernel refuses the question.
    fn bridge_mode(&self, pf: LinkIndex) -> Outcome<Option<BridgeMode>>;

    /// Sets the mode of the embedded switch.
    ///
    /// # Errors
    /// `EOPNOTSUPP` when the driver cannot.
    fn set_bridge_mode(&self, pf: LinkIndex, mode: BridgeMode) -> Outcome<()>;

    /// Mode of the eswitch; `None` when there is none to tell of.
    ///
    /// # Errors
    /// If the kernel refuses the question.
    fn eswitch_mode(&self, pf: PciAddress) -> Outcome<Option<EswitchMode>>;

    /// Sets the mode of the eswitch.
    ///
    /// # Errors
    /// What the driver refused with.
    fn set_eswitch_mode(&self, pf: PciAddress, mode: EswitchMode) -> Outcome<()>;

    /// The card's ports that devlink knows; none without devlink.
    ///
    /// # Errors
    /// If the kernel refuses the question.
    fn ports(&self, pf: PciAddress) -> Outcome<Vec<DevlinkPort>>;

    /// Frames of network devices can be had: [`Kernel::open_frames`] works.
    fn has_frames(&self) -> bool {
        false
    }

    /// Opens the frames of a network device of the host, VLAN tags in them. What the sieve does not want may come as well.
    ///
    /// # Errors
    /// `Unsupported` without [`Kernel::has_frames`]; `DeviceLost` when the device is another by now, `Denied`, `Io`.
    fn open_frames(&self, port: PortRef, _: &Link, _: Mtu, _: Sieve) -> Result<Box<dyn PortIo>> {
        let message = "this kernel has no packet sockets";
        Err(error(ErrorKind::Unsupported, "ports.open", message).object(port))
    }

    /// Traffic control of the host's namespace; `None`: there is none.
    fn traffic_control(&self) -> Option<Box<dyn crate::flower::Kernel>> {
        None
    }
}

/// What a kernel call gives.
pub type Outcome<T> = std::result::Result<T, KernelError>;

/// A kernel call that failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what}")]
pub struct KernelError {
    /// What was tried and what the kernel said, for people.
    pub what: String,
    /// The kernel's errno.
    pub errno: Option<i32>,
}

impl KernelError {
    /// The driver has no such ability.
    pub fn is_unsupported(&self) -> bool {
        matches!(self.errno, Some(libc::EOPNOTSUPP | libc::ENOSYS))
    }

    /// It does not exist (any more).
    pub fn is_missing(&self) -> bool {
        matches!(
            self.errno,
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO | libc::ESRCH)
        )
    }
}

impl From<NetlinkError> for KernelError {
    fn from(error: NetlinkError) -> Self {
        Self {
            errno: error.errno(),
            what: error.to_string(),
        }
    }
}

/// A network namespace, by the way it is found.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Spot {
    /// The host's own, where VFs are that nobody uses.
    Host,
    /// The machine's first, where the kernel puts a function whose namespace died.
    Init,
    /// Another.
    At(PathBuf),
}

/// Changes of a network device, in one request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LinkEdit {
    /// Switch it on or off.
    pub up: Option<bool>,
    /// Effective MAC.
    pub mac: Option<[u8; 6]>,
    /// MTU.
    pub mtu: Option<u32>,
    /// Name.
    pub name: Option<String>,
}

impl LinkEdit {
    /// Switches the device on or off.
    pub fn up(on: bool) -> Self {
        Self {
            up: Some(on),
            ..Self::default()
        }
    }
}
