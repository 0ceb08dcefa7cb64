//! [`Jammable`]: the kernel, except that moves can be made to fail; no real card does that on demand.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use dpumesh_core::{Mtu, PciAddress, PortIo, PortRef, Result};
use dpumesh_hw::netlink::{BridgeMode, DevlinkPort, EswitchMode, Link, LinkIndex, Vf, VfSetting};
use ipnet::IpNet;

use crate::Sieve;
use crate::kernel::linux::Linux;
use crate::kernel::{Kernel, KernelError, LinkEdit, Outcome, Spot};

/// Linux, and whether devices move in it.
#[derive(Debug)]
pub(super) struct Jammable {
    kernel: Linux,
    jammed: AtomicBool,
}

impl Jammable {
    pub(super) fn new(kernel: Linux) -> Self {
        Self {
            kernel,
            jammed: AtomicBool::new(false),
        }
    }

    pub(super) fn jam(&self, jammed: bool) {
        self.jammed.store(jammed, Ordering::Relaxed);
    }
}

impl Kernel for Jammable {
    fn move_link(&self, from: &Spot, link: LinkIndex, to: &Spot, name: &str) -> Outcome<()> {
        if self.jammed.load(Ordering::Relaxed) {
            return Err(KernelError {
                what: "jammed".into(),
                errno: Some(libc::EIO),
            });
        }
        self.kernel.move_link(from, link, to, name)
    }

    fn sysfs(&self) -> &Path {
        self.kernel.sysfs()
    }

    fn write(&self, attribute: &Path, value: &str) -> Outcome<()> {
        self.kernel.write(attribute, value)
    }

    fn boot(&self) -> Outcome<String> {
        self.kernel.boot()
    }

    fn namespace(&self, spot: &Spot) -> Outcome<u64> {
        self.kernel.namespace(spot)
    }

    fn links(&self, spot: &Spot) -> Outcome<Vec<Link>> {
        self.kernel.links(spot)
    }

    fn change_link(&self, spot: &Spot, link: LinkIndex, edit: &LinkEdit) -> Outcome<()> {
        self.kernel.change_link(spot, link, edit)
    }

    fn addresses(&self, spot: &Spot, link: LinkIndex) -> Outcome<Vec<IpNet>> {
        self.kernel.addresses(spot, link)
    }

    fn add_address(&self, spot: &Spot, link: LinkIndex, net: IpNet) -> Outcome<()> {
        self.kernel.add_address(spot, link, net)
    }

    fn vfs(&self, pf: LinkIndex) -> Outcome<Vec<Vf>> {
        self.kernel.vfs(pf)
    }

    fn set_vf(&self, pf: LinkIndex, vf: u16, setting: &VfSetting) -> Outcome<()> {
        self.kernel.set_vf(pf, vf, setting)
    }

    fn bridge_mode(&self, pf: LinkIndex) -> Outcome<Option<BridgeMode>> {
        self.kernel.bridge_mode(pf)
    }

    fn set_bridge_mode(&self, pf: LinkIndex, mode: BridgeMode) -> Outcome<()> {
        self.kernel.set_bridge_mode(pf, mode)
    }

    fn eswitch_mode(&self, pf: PciAddress) -> Outcome<Option<EswitchMode>> {
        self.kernel.eswitch_mode(pf)
    }

    fn set_eswitch_mode(&self, pf: PciAddress, mode: EswitchMode) -> Outcome<()> {
        self.kernel.set_eswitch_mode(pf, mode)
    }

    fn ports(&self, pf: PciAddress) -> Outcome<Vec<DevlinkPort>> {
        self.kernel.ports(pf)
    }

    fn has_frames(&self) -> bool {
        self.kernel.has_frames()
    }

    fn open_frames(&self, port: PortRef, link: &Link, mtu: Mtu, sieve: Sieve) -> Result<Box<dyn PortIo>> {
        self.kernel.open_frames(port, link, mtu, sieve)
    }

    fn traffic_control(&self) -> Option<Box<dyn crate::flower::Kernel>> {
        self.kernel.traffic_control()
    }
}
