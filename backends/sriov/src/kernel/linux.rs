//! [`Linux`]: the seam filled by the running kernel.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use dpumesh_core::{ErrorKind, Mtu, PciAddress, PortIo, PortRef, Result};
use dpumesh_hw::netlink::{
    Address, BridgeMode, Devlink, DevlinkPort, EswitchMode, Link, LinkChange, LinkIndex, Netlink, Vf,
    VfSetting,
};
use dpumesh_hw::netns::Namespace;
use dpumesh_tap::device::{PacketOptions, PacketPort};
use ipnet::IpNet;
use socket2::{SockFilter, SockRef};

use super::{Kernel, KernelError, LinkEdit, Outcome, Spot};
use crate::card::{error, kernel_error};
use crate::{Sieve, flower};

/// The kernel, seen from one network namespace.
#[derive(Debug)]
pub struct Linux {
    sysfs: PathBuf,
    host: Namespace,
    /// Sockets in the host's namespace; those in others live as long as their call, since a namespace must be able to die.
    home: Mutex<Option<Netlink>>,
    devlink: Mutex<Option<Option<Devlink>>>,
}

impl Linux {
    /// The kernel below `sysfs`, with `host` (the calling thread's for `None`) as the namespace of the host.
    ///
    /// # Errors
    /// If the namespace cannot be opened.
    pub fn open(sysfs: &Path, host: Option<&Path>) -> Outcome<Self> {
        let host = match host {
            Some(path) => Namespace::open(path),
            None => Namespace::current(),
        };
        Ok(Self {
            sysfs: sysfs.to_owned(),
            host: host.map_err(entering)?,
            home: Mutex::default(),
            devlink: Mutex::default(),
        })
    }

    fn enter(&self, spot: &Spot) -> Outcome<Namespace> {
        match spot {
            Spot::Host => self.host.try_clone(),
            Spot::Init => Namespace::open("/proc/1/ns/net"),
            Spot::At(path) => Namespace::open(path),
        }
        .map_err(entering)
    }

    fn with<T>(&self, spot: &Spot, work: impl FnOnce(&mut Netlink) -> Outcome<T>) -> Outcome<T> {
        if *spot != Spot::Host {
            return work(&mut Netlink::open_in(&self.enter(spot)?)?);
        }
        let mut home = self.home.lock().unwrap_or_else(PoisonError::into_inner);
        let netlink = match home.take() {
            Some(netlink) => home.insert(netlink),
            None => home.insert(Netlink::open_in(&self.host)?),
        };
        work(netlink)
    }

    fn with_devlink<T>(&self, none: T, work: impl FnOnce(&mut Devlink) -> Outcome<T>) -> Outcome<T> {
        let mut devlink = self.devlink.lock().unwrap_or_else(PoisonError::into_inner);
        if devlink.is_none() {
            *devlink = Some(Devlink::open_in(&self.host)?);
        }
        match devlink.as_mut() {
            Some(Some(devlink)) => work(devlink),
            _ => Ok(none),
        }
    }
}

impl Kernel for Linux {
    fn sysfs(&self) -> &Path {
        &self.sysfs
    }

    fn write(&self, attribute: &Path, value: &str) -> Outcome<()> {
        let path = self.sysfs.join(attribute);
        let failed = |error: std::io::Error| KernelError {
            errno: error.raw_os_error(),
            what: format!("write {value:?} to {}: {error}", path.display()),
        };
        let mut file = fs::File::options().write(true).open(&path).map_err(failed)?;
        file.write_all(value.as_bytes()).map_err(failed)
    }

    fn boot(&self) -> Outcome<String> {
        let path = "/proc/sys/kernel/random/boot_id";
        let text = fs::read_to_string(path).map_err(|error| KernelError {
            errno: error.raw_os_error(),
            what: format!("read {path}: {error}"),
        })?;
        Ok(text.trim().to_owned())
    }

    fn namespace(&self, spot: &Spot) -> Outcome<u64> {
        Ok(self.enter(spot)?.id().inode())
    }

    fn links(&self, spot: &Spot) -> Outcome<Vec<Link>> {
        self.with(spot, |netlink| Ok(netlink.links()?))
    }

    fn change_link(&self, spot: &Spot, link: LinkIndex, edit: &LinkEdit) -> Outcome<()> {
        let mut change = LinkChange::new();
        match edit.up {
            Some(true) => change = change.up(),
            Some(false) => change = change.down(),
            None => {}
        }
        if let Some(mac) = edit.mac {
            change = change.mac(mac);
        }
        if let Some(mtu) = edit.mtu {
            change = change.mtu(mtu);
        }
        if let Some(name) = &edit.name {
            change = change.name(name);
        }
        self.with(spot, |netlink| Ok(netlink.change_link(link, &change)?))
    }

    fn move_link(&self, from: &Spot, link: LinkIndex, to: &Spot, name: &str) -> Outcome<()> {
        let to = self.enter(to)?;
        let change = LinkChange::new().down().namespace(&to).name(name);
        self.with(from, |netlink| Ok(netlink.change_link(link, &change)?))
    }

    fn addresses(&self, spot: &Spot, link: LinkIndex) -> Outcome<Vec<IpNet>> {
        let all = self.with(spot, |netlink| Ok(netlink.addresses()?))?;
        let own = all.into_iter().filter(|address| address.link == link);
        Ok(own
            .map(|address| address.net)
            .filter(|net| !is_link_local(net))
            .collect())
    }

    fn add_address(&self, spot: &Spot, link: LinkIndex, net: IpNet) -> Outcome<()> {
        self.with(spot, |netlink| Ok(netlink.add_address(&Address { link, net })?))
    }

    fn vfs(&self, pf: LinkIndex) -> Outcome<Vec<Vf>> {
        self.with(&Spot::Host, |netlink| Ok(netlink.vfs(pf)?))
    }

    fn set_vf(&self, pf: LinkIndex, vf: u16, setting: &VfSetting) -> Outcome<()> {
        self.with(&Spot::Host, |netlink| Ok(netlink.set_vf(pf, vf, setting)?))
    }

    fn bridge_mode(&self, pf: LinkIndex) -> Outcome<Option<BridgeMode>> {
        self.with(&Spot::Host, |netlink| Ok(netlink.bridge_mode(pf)?))
    }

    fn set_bridge_mode(&self, pf: LinkIndex, mode: BridgeMode) -> Outcome<()> {
        self.with(&Spot::Host, |netlink| Ok(netlink.set_bridge_mode(pf, mode)?))
    }

    fn eswitch_mode(&self, pf: PciAddress) -> Outcome<Option<EswitchMode>> {
        self.with_devlink(None, |devlink| Ok(devlink.eswitch_mode(&pf.to_string())?))
    }

    fn set_eswitch_mode(&self, pf: PciAddress, mode: EswitchMode) -> Outcome<()> {
        let none = Err(KernelError {
            errno: Some(libc::EOPNOTSUPP),
            what: "this kernel has no devlink".into(),
        });
        self.with_devlink(none, |devlink| {
            Ok(devlink
                .set_eswitch_mode(&pf.to_string(), mode)
                .map_err(Into::into))
        })?
    }

    fn ports(&self, pf: PciAddress) -> Outcome<Vec<DevlinkPort>> {
        self.with_devlink(Vec::new(), |devlink| Ok(devlink.ports(&pf.to_string())?))
    }

    fn has_frames(&self) -> bool {
        true
    }

    fn open_frames(&self, port: PortRef, link: &Link, mtu: Mtu, sieve: Sieve) -> Result<Box<dyn PortIo>> {
        let options = PacketOptions { bypass_qdisc: false };
        let device = PacketPort::open(port, &self.host, &link.name, mtu, options)?;
        if let Some(socket) = device.poll_fd() {
            let attached = SockRef::from(&socket).attach_filter(&filter(sieve));
            attached.map_err(|failed| {
                let message = format!("filter of the packet socket: {failed}");
                error(ErrorKind::Io, "ports.open", message).source(failed)
            })?;
        }
        // It was opened by its name, which may be another's by now.
        let links = self
            .links(&Spot::Host)
            .map_err(|failed| kernel_error("ports.open", failed))?;
        let same = |other: &Link| {
            (other.index, &other.name, &other.parent) == (link.index, &link.name, &link.parent)
        };
        if !links.iter().any(same) {
            let message = format!("network device {} is another by now", link.name);
            return Err(error(ErrorKind::DeviceLost, "ports.open", message));
        }
        Ok(Box::new(device))
    }

    fn traffic_control(&self) -> Option<Box<dyn flower::Kernel>> {
        let opened = self.host.run(flower::Socket::open).ok()?;
        Some(Box::new(opened.ok()?))
    }
}

/// A sieve as a classic BPF program (kernel `Documentation/networking/filter.rst`): what it returns is how many octets pass.
fn filter(sieve: Sieve) -> Vec<SockFilter> {
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const AND: u16 = (libc::BPF_ALU | libc::BPF_AND | libc::BPF_K) as u16;
    const EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const AT_LEAST: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
    const ABOVE: u16 = (libc::BPF_JMP | libc::BPF_JGT | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    // Relative to the packet's own data about it; the kernel takes the tag off before a packet socket sees the frame.
    let told = |what: libc::c_int| (libc::SKF_AD_OFF + what) as u32;
    let present = SockFilter::new(LOAD, 0, 0, told(libc::SKF_AD_VLAN_TAG_PRESENT));
    let tag = SockFilter::new(LOAD, 0, 0, told(libc::SKF_AD_VLAN_TAG));
    let id = SockFilter::new(AND, 0, 0, 0xfff);
    let all = SockFilter::new(RETURN, 0, 0, u32::MAX);
    let none = SockFilter::new(RETURN, 0, 0, 0);
    match sieve {
        Sieve::All => vec![all],
        Sieve::Tagged(vlan) => vec![
            present,
            SockFilter::new(EQUAL, 3, 0, 0),
            tag,
            id,
            SockFilter::new(EQUAL, 1, 0, vlan.get().into()),
            none,
            all,
        ],
        Sieve::Except(first, last) => vec![
            present,
            SockFilter::new(EQUAL, 4, 0, 0),
            tag,
            id,
            SockFilter::new(AT_LEAST, 0, 1, first.into()),
            SockFilter::new(ABOVE, 0, 1, last.into()),
            all,
            none,
        ],
    }
}

/// The kernel makes these by itself.
fn is_link_local(net: &IpNet) -> bool {
    matches!(net, IpNet::V6(net) if net.addr().is_unicast_link_local())
}

fn entering(error: dpumesh_hw::netns::NamespaceError) -> KernelError {
    let errno = std::error::Error::source(&error)
        .and_then(|source| source.downcast_ref::<std::io::Error>())
        .and_then(std::io::Error::raw_os_error);
    KernelError {
        errno,
        what: error.to_string(),
    }
}
