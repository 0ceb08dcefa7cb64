//! What sysfs tells of a card: its physical functions, and the virtual functions of each, by PCI address.
//!
//! ```text
//! bus/pci/devices/<PF>/   vendor device numa_node driver→ sriov_totalvfs sriov_numvfs virtfn<N>→
//! bus/pci/devices/<VF>/   driver→ driver_override reset reset_method numa_node
//! ```
//! A network device is recognised by the PCI function that it belongs to and by the name of its port, never by its own name: udev
//! renames it, and in switchdev mode all representors of a card belong to the same function as its uplink.

use std::fs;
use std::path::{Path, PathBuf};

use dpumesh_core::PciAddress;
use dpumesh_hw::netlink::Link;

/// A physical function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pf {
    /// Where it sits.
    pub pci: PciAddress,
    /// Vendor and device number.
    pub id: (u16, u16),
    /// Its driver; `None` while it has none.
    pub driver: Option<String>,
    /// Most VFs that it can have.
    pub total_vfs: u16,
    /// VFs that it has.
    pub num_vfs: u16,
}

/// A virtual function on the PCI bus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VirtualFunction {
    /// Its number on its physical function.
    pub index: u16,
    /// Where it sits.
    pub pci: PciAddress,
    /// Its driver; `None` while it has none.
    pub driver: Option<String>,
    /// Where its memory is near; `None` when the machine does not tell.
    pub numa_node: Option<u16>,
    /// The kernel can reset it by itself.
    pub can_reset: bool,
}

/// Directory of a PCI function, from the root of sysfs.
pub fn directory(pci: PciAddress) -> PathBuf {
    Path::new("bus/pci/devices").join(pci.to_string())
}

/// Physical functions of the card that `device` is a function of, in the order of their addresses: those at its bus and
/// device number that can have VFs.
pub fn pfs(sysfs: &Path, device: PciAddress) -> Vec<PciAddress> {
    let text = device.to_string();
    // `DDDD:BB:DD.F`: everything before the function.
    let card = text.rsplit_once('.').map_or("", |(card, _)| card);
    (0..8)
        .filter_map(|function| format!("{card}.{function}").parse().ok())
        .filter(|pci| sysfs.join(directory(*pci)).join("sriov_totalvfs").exists())
        .collect()
}

/// Reads a physical function; `None` when it is not there.
pub fn pf(sysfs: &Path, pci: PciAddress) -> Option<Pf> {
    let dir = sysfs.join(directory(pci));
    Some(Pf {
        pci,
        id: (hex(&dir, "vendor")?, hex(&dir, "device")?),
        driver: link_name(&dir.join("driver")),
        total_vfs: number(&dir, "sriov_totalvfs")?,
        num_vfs: number(&dir, "sriov_numvfs")?,
    })
}

/// The virtual functions of a physical function, by their numbers.
pub fn vfs(sysfs: &Path, pf: PciAddress) -> Vec<VirtualFunction> {
    let dir = sysfs.join(directory(pf));
    let Ok(entries) = fs::read_dir(&dir) else {
        return Vec::new();
    };
    let mut found: Vec<VirtualFunction> = entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let index = name.strip_prefix("virtfn")?.parse().ok()?;
            let pci = link_name(&entry.path())?.parse().ok()?;
            Some(vf(sysfs, index, pci))
        })
        .collect();
    found.sort_by_key(|vf| vf.index);
    found
}

/// One virtual function of a physical function; `None` when it is not there.
pub fn vf_of(sysfs: &Path, pf: PciAddress, index: u16) -> Option<VirtualFunction> {
    let link = sysfs.join(directory(pf)).join(format!("virtfn{index}"));
    let pci = link_name(&link)?.parse().ok()?;
    Some(vf(sysfs, index, pci))
}

/// The driver that a function has now.
pub fn driver_of(sysfs: &Path, pci: PciAddress) -> Option<String> {
    link_name(&sysfs.join(directory(pci)).join("driver"))
}

fn vf(sysfs: &Path, index: u16, pci: PciAddress) -> VirtualFunction {
    let dir = sysfs.join(directory(pci));
    VirtualFunction {
        index,
        pci,
        driver: driver_of(sysfs, pci),
        numa_node: number(&dir, "numa_node"),
        can_reset: dir.join("reset").exists(),
    }
}

/// The network device of a function among those of a namespace. For a physical function it is the uplink, which in switchdev
/// mode shares the function with the representors of its VFs.
pub fn netdev_of(links: &[Link], pci: PciAddress) -> Option<&Link> {
    let pci = pci.to_string();
    links
        .iter()
        .find(|link| link.parent.as_deref() == Some(&pci) && representee(link).is_none())
}

/// Which function a representor stands for, as `(pf, vf)` of the kernel's `pf<P>vf<V>` with or without the controller's
/// `c<C>` before it; `None` for what is no VF's representor.
pub fn representee(link: &Link) -> Option<(u16, u16)> {
    let name = link.port_name.as_deref()?;
    let name = match name.strip_prefix('c') {
        Some(rest) => rest.trim_start_matches(|digit: char| digit.is_ascii_digit()),
        None => name,
    };
    let (pf, vf) = name.strip_prefix("pf")?.split_once("vf")?;
    Some((pf.parse().ok()?, vf.parse().ok()?))
}

/// Text of a sysfs attribute, without its line end.
pub fn text(dir: &Path, attribute: &str) -> Option<String> {
    fs::read_to_string(dir.join(attribute))
        .ok()
        .map(|text| text.trim().to_owned())
}

fn number(dir: &Path, attribute: &str) -> Option<u16> {
    text(dir, attribute)?.parse().ok()
}

fn hex(dir: &Path, attribute: &str) -> Option<u16> {
    u16::from_str_radix(text(dir, attribute)?.strip_prefix("0x")?, 16).ok()
}

/// Last part of what a symbolic link names.
fn link_name(link: &Path) -> Option<String> {
    let target = fs::read_link(link).ok()?;
    target.file_name()?.to_str().map(str::to_owned)
}
