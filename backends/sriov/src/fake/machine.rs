//! [`FakeMachine`]: the kernel of a fake card as a state machine.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dpumesh_core::{Mtu, PciAddress, PortIo, PortRef, Result, VfAttributes};
use dpumesh_hw::netlink::vf::VLAN_8021Q;
use dpumesh_hw::netlink::{
    BridgeMode, DevlinkPort, EswitchMode, Link, LinkIndex, LinkStatistics, PortFlavour, Vf, VfSetting,
};
use ipnet::IpNet;

use super::frames::Air;
use super::{Model, tree};
use crate::abilities::VFIO;
use crate::card::indices;
use crate::flower::fake::FakeKernel;
use crate::kernel::{Kernel, KernelError, LinkEdit, Outcome, Spot};
use crate::{Sieve, discover, flower};

/// What a test's process dies of.
#[derive(Debug)]
pub struct Died;

/// A machine with one card. It outlives the processes that open the card: clones are the same machine.
#[derive(Clone)]
pub struct FakeMachine(Arc<Shared>);

struct Shared {
    root: tempfile::TempDir,
    model: Model,
    state: Mutex<State>,
    air: Air,
    tc: FakeKernel,
}

#[derive(Debug)]
pub(super) struct State {
    domain: u16,
    pub(super) away: bool,
    pub(super) pfs: Vec<FakePf>,
    devices: Vec<Device>,
    /// Namespaces by path. The host's is number 0, the machine's first is the same.
    namespaces: BTreeMap<PathBuf, u64>,
    next_index: u32,
    next_namespace: u64,
    boot: u32,
    jammed: BTreeSet<PciAddress>,
    /// Calls until one fails, and with what.
    failure: Option<(u32, i32)>,
    /// Calls until the process dies; before or after the call.
    death: Option<(u32, bool)>,
    /// What was called, since the last look.
    calls: Vec<String>,
}

#[derive(Debug)]
pub(super) struct FakePf {
    pub(super) pci: PciAddress,
    pub(super) vfs: Vec<FakeVf>,
    switchdev: bool,
    vepa: bool,
}

#[derive(Debug)]
pub(super) struct FakeVf {
    pub(super) pci: PciAddress,
    pub(super) admin: Vf,
    pub(super) driver: Option<String>,
    driver_override: Option<String>,
    /// What it had from the factory, and what an administered MAC will make of it.
    own_mac: [u8; 6],
}

#[derive(Debug)]
struct Device {
    namespace: u64,
    link: Link,
    addresses: Vec<IpNet>,
}

const HOST: u64 = 0;

impl fmt::Debug for FakeMachine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("FakeMachine").field(&self.0.model.driver).finish()
    }
}

impl FakeMachine {
    /// A machine with this card at `0000:01:00`, without VFs.
    ///
    /// # Errors
    /// If there is no room for its sysfs.
    pub fn new(model: Model) -> std::io::Result<Self> {
        Self::in_domain(model, 0)
    }

    /// The same with the card in another PCI domain: for cards that must differ in their addresses.
    ///
    /// # Errors
    /// Those of [`FakeMachine::new`].
    pub fn in_domain(model: Model, domain: u16) -> std::io::Result<Self> {
        let root = tempfile::tempdir()?;
        let mut state = State {
            domain,
            away: false,
            pfs: Vec::new(),
            devices: Vec::new(),
            namespaces: BTreeMap::new(),
            next_index: 2,
            next_namespace: 1,
            boot: 1,
            jammed: BTreeSet::new(),
            failure: None,
            death: None,
            calls: Vec::new(),
        };
        state.plug_in(&model);
        tree::write(root.path(), &model, &state)?;
        Ok(Self(Arc::new(Shared {
            root,
            model,
            state: Mutex::new(state),
            air: Air::default(),
            tc: FakeKernel::new(0, Some(1000)),
        })))
    }

    /// The card's first function, for [`crate::Options::device`].
    pub fn device(&self) -> PciAddress {
        pf_address(self.state().domain, 0)
    }

    /// Directory that lives as long as the machine, for a journal.
    pub fn directory(&self) -> PathBuf {
        self.0.root.path().join("journal")
    }

    /// A network namespace, by its path.
    pub fn namespace(&self) -> PathBuf {
        let mut state = self.state();
        let number = state.next_namespace;
        state.next_namespace += 1;
        let path = PathBuf::from(format!("/run/netns/fake{number}"));
        state.namespaces.insert(path.clone(), number);
        path
    }

    /// A namespace dies: its devices go to the machine's first one, as the kernel does with those of real functions.
    pub fn kill_namespace(&self, path: &Path) {
        let mut state = self.state();
        let Some(number) = state.namespaces.remove(path) else {
            return;
        };
        for device in state
            .devices
            .iter_mut()
            .filter(|device| device.namespace == number)
        {
            device.namespace = HOST;
            device.link.up = false;
            device.addresses.clear();
            device.link.name = format!("dev{}", device.link.index.0);
        }
    }

    /// The card vanishes, with its functions and their devices wherever they are.
    pub fn lose(&self) {
        let mut state = self.state();
        state.away = true;
        state.pfs.clear();
        state.devices.clear();
        self.rewrite(&state);
    }

    /// The card returns, as from the factory.
    pub fn bring_back(&self) {
        self.bring_back_in(EswitchMode::Legacy);
    }

    /// The card returns in a mode that its firmware keeps.
    pub fn bring_back_in(&self, mode: EswitchMode) {
        let mut state = self.state();
        state.away = false;
        state.plug_in(&self.0.model);
        for pf in &mut state.pfs {
            pf.switchdev = mode == EswitchMode::Switchdev;
        }
        self.rewrite(&state);
    }

    /// The machine was rebooted: nothing is as before, and the numbers of devices begin anew.
    pub fn reboot(&self) {
        self.lose();
        let mut state = self.state();
        state.boot += 1;
        state.next_index = 2;
        state.namespaces.clear();
        drop(state);
        self.bring_back();
    }

    /// Moves of this VF fail with `EIO`, or work again.
    pub fn jam(&self, port: PortRef, jammed: bool) {
        let mut state = self.state();
        let Some(pci) = state.vf_mut(port).map(|vf| vf.pci) else {
            return;
        };
        if jammed {
            state.jammed.insert(pci);
        } else {
            state.jammed.remove(&pci);
        }
    }

    /// Somebody takes a VF into a namespace that the backend does not know, under another name.
    pub fn strand(&self, port: PortRef) {
        let path = self.namespace();
        let mut state = self.state();
        let number = state.namespaces.remove(&path).unwrap_or(u64::MAX);
        let Some(pci) = state.vf_mut(port).map(|vf| vf.pci.to_string()) else {
            return;
        };
        for device in &mut state.devices {
            if device.link.parent.as_deref() == Some(&pci) {
                device.namespace = number;
                device.link.name = "stray0".into();
            }
        }
    }

    /// Somebody binds a VF to another driver.
    pub fn bind_behind(&self, port: PortRef, driver: Option<&str>) {
        let mut state = self.state();
        let Some(pci) = state.vf_mut(port).map(|vf| vf.pci) else {
            return;
        };
        state.unbind(pci);
        if let Some(vf) = state.vf_mut(port) {
            vf.driver = driver.map(str::to_owned);
        }
        self.rewrite(&state);
    }

    /// Changes the network device of a VF behind the backend's back: what an application in the pod does.
    pub fn tamper(&self, port: PortRef, change: impl FnOnce(&mut Link)) {
        let mut state = self.state();
        let Some(pci) = state.vf_mut(port).map(|vf| vf.pci.to_string()) else {
            return;
        };
        let device = state
            .devices
            .iter_mut()
            .find(|device| device.link.parent.as_deref() == Some(&pci));
        if let Some(device) = device {
            change(&mut device.link);
        }
    }

    /// Changes what the PF administers of a VF behind the backend's back.
    pub fn tamper_admin(&self, port: PortRef, change: impl FnOnce(&mut Vf)) {
        if let Some(vf) = self.state().vf_mut(port) {
            change(&mut vf.admin);
        }
    }

    /// What the PF administers of a VF.
    pub fn admin(&self, port: PortRef) -> Option<Vf> {
        self.state().vf_mut(port).map(|vf| vf.admin.clone())
    }

    /// The network device of a VF, wherever it is.
    pub fn netdev(&self, port: PortRef) -> Option<Link> {
        let mut state = self.state();
        let pci = state.vf_mut(port)?.pci.to_string();
        let found = state
            .devices
            .iter()
            .find(|device| device.link.parent.as_deref() == Some(&pci));
        found.map(|device| device.link.clone())
    }

    /// A VF sends a frame.
    pub fn send(&self, from: PortRef, octets: &[u8]) {
        let mut state = self.state();
        let Some((pf, index)) = indices(from) else { return };
        let Some(vlan) = state.vf_mut(from).map(|vf| vf.admin.vlan) else {
            return;
        };
        let pf = usize::from(pf.0);
        let (pci, switchdev) = (state.pfs[pf].pci.to_string(), state.pfs[pf].switchdev);
        let stands_for = |link: &Link| discover::representee(link).map(|(_, vf)| vf);
        let wanted = switchdev.then_some(index);
        let mut devices = state.devices.iter().filter(|device| device.namespace == HOST);
        let found = devices
            .find(|device| device.link.parent.as_deref() == Some(&pci) && stands_for(&device.link) == wanted);
        let Some(link) = found.map(|device| device.link.index) else {
            return;
        };
        drop(state);
        let mut frame = octets.to_vec();
        if vlan != 0 && !switchdev {
            let [high, low] = vlan.to_be_bytes();
            frame.splice(12..12, [0x81, 0, high, low]);
        }
        self.0.air.deliver(link, &frame);
    }

    /// Frames that the host sent since the last look, and at which of its devices.
    pub fn take_sent(&self) -> Vec<(LinkIndex, Vec<u8>)> {
        self.0.air.take_sent()
    }

    /// Puts a network device of somebody else's on the host.
    pub fn add_foreign_device(&self, name: &str, mac: [u8; 6]) {
        let mut state = self.state();
        let link = state.new_link(name, None, None, mac, 1500);
        state.devices.push(Device {
            namespace: HOST,
            link,
            addresses: Vec::new(),
        });
    }

    /// The call after `calls` more fails with this errno, once. Reading is no call: only what changes something.
    pub fn fail_call(&self, calls: u32, errno: i32) {
        self.state().failure = Some((calls, errno));
    }

    /// The process dies at the call after `calls` more: before it, or when it is done. `None`: never.
    pub fn die_at(&self, when: Option<(u32, bool)>) {
        self.state().death = when;
    }

    /// What was changed since the last look, as text.
    pub fn take_calls(&self) -> Vec<String> {
        std::mem::take(&mut self.state().calls)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn rewrite(&self, state: &State) {
        // The directory is the machine's own; without it nothing works and the next read says so.
        let _ = tree::write(self.0.root.path(), &self.0.model, state);
    }

    /// One call that changes something: counted, and the last one if so ordered.
    fn call<T>(&self, what: String, work: impl FnOnce(&mut State) -> Outcome<T>) -> Outcome<T> {
        let mut state = self.state();
        state.calls.push(what.clone());
        let dies_after = match &mut state.death {
            Some((0, after)) => {
                let after = *after;
                state.death = None;
                if !after {
                    drop(state);
                    std::panic::resume_unwind(Box::new(Died));
                }
                true
            }
            Some((calls, _)) => {
                *calls -= 1;
                false
            }
            None => false,
        };
        match &mut state.failure {
            Some((0, errno)) => {
                let errno = *errno;
                state.failure = None;
                return Err(refused(what, errno));
            }
            Some((calls, _)) => *calls -= 1,
            None => {}
        }
        let done = work(&mut state);
        drop(state);
        if dies_after {
            std::panic::resume_unwind(Box::new(Died));
        }
        done
    }
}

fn refused(what: impl fmt::Display, errno: i32) -> KernelError {
    KernelError {
        what: format!("{what}: {}", std::io::Error::from_raw_os_error(errno)),
        errno: Some(errno),
    }
}

fn pf_address(domain: u16, index: u16) -> PciAddress {
    PciAddress::new(domain, 1, 0, index as u8).unwrap_or_else(|| pf_address(domain, 0))
}

fn vf_address(domain: u16, pf: u16, vf: u16) -> PciAddress {
    // Routing ids behind the PFs', eight functions to a device, 256 to a bus.
    let id = 0x80 + u32::from(pf) * 0x200 + u32::from(vf);
    let bus = 1 + (id >> 8) as u8;
    PciAddress::new(domain, bus, (id >> 3 & 31) as u8, (id & 7) as u8)
        .unwrap_or_else(|| pf_address(domain, 0))
}

impl State {
    fn plug_in(&mut self, model: &Model) {
        for index in 0..model.pfs {
            let pci = pf_address(self.domain, index);
            let port_name = model.switchdev.then(|| format!("p{index}"));
            let mac = [2, 0xca, 0xfe, 0, index as u8, 0xff];
            let link = self.new_link(&format!("ens1f{index}"), Some(pci), port_name, mac, model.max_mtu);
            self.devices.push(Device {
                namespace: HOST,
                link,
                addresses: Vec::new(),
            });
            self.pfs.push(FakePf {
                pci,
                vfs: Vec::new(),
                switchdev: false,
                vepa: false,
            });
        }
    }

    fn new_link(
        &mut self,
        name: &str,
        parent: Option<PciAddress>,
        port_name: Option<String>,
        mac: [u8; 6],
        max_mtu: u32,
    ) -> Link {
        let index = LinkIndex(self.next_index);
        self.next_index += 1;
        Link {
            index,
            name: name.to_owned(),
            mac: Some(mac),
            mtu: 1500,
            up: false,
            carrier: true,
            running: true,
            noarp: false,
            kind: None,
            peer: None,
            alias: None,
            parent: parent.map(|pci| pci.to_string()),
            switch_id: port_name.as_ref().map(|_| vec![0xca, 0xfe]),
            port_name,
            max_mtu: Some(max_mtu),
            statistics: LinkStatistics::default(),
        }
    }

    fn vf_mut(&mut self, port: PortRef) -> Option<&mut FakeVf> {
        let (pf, index) = indices(port)?;
        let pf = self.pfs.get_mut(usize::from(pf.0))?;
        pf.vfs.iter_mut().find(|vf| vf.admin.index == index)
    }

    fn by_pci(&mut self, pci: PciAddress) -> Option<(u16, &mut FakeVf)> {
        let pfs = (0..).zip(&mut self.pfs);
        pfs.flat_map(|(index, pf)| pf.vfs.iter_mut().map(move |vf| (index, vf)))
            .find(|(_, vf)| vf.pci == pci)
    }

    fn set_count(&mut self, model: &Model, pf: u16, count: u16) -> Outcome<()> {
        let Some(found) = self.pfs.get_mut(usize::from(pf)) else {
            return Err(refused("sriov_numvfs", libc::ENODEV));
        };
        if count > 0 && !found.vfs.is_empty() {
            return Err(refused("sriov_numvfs", libc::EBUSY));
        }
        if count > model.total_vfs {
            return Err(refused("sriov_numvfs", libc::ERANGE));
        }
        let gone: Vec<String> = found.vfs.drain(..).map(|vf| vf.pci.to_string()).collect();
        let representor = format!("pf{pf}vf");
        self.devices.retain(|device| {
            let of_vf = device
                .link
                .parent
                .as_ref()
                .is_some_and(|parent| gone.contains(parent));
            let stands_for = device
                .link
                .port_name
                .as_ref()
                .is_some_and(|name| name.starts_with(&representor));
            !of_vf && !stands_for
        });
        for index in 0..count.min(model.firmware_vfs) {
            let pci = vf_address(self.domain, pf, index);
            let mut admin = Vf::new(index);
            if model.attributes.contains(VfAttributes::SPOOF_CHECK) {
                admin.spoof_check = Some(true);
            }
            if model.attributes.contains(VfAttributes::TRUST) {
                admin.trust = Some(false);
            }
            let own_mac = [2, 0xca, 0xfe, 1, pf as u8, index as u8];
            if let Some(found) = self.pfs.get_mut(usize::from(pf)) {
                found.vfs.push(FakeVf {
                    pci,
                    admin,
                    driver: None,
                    driver_override: None,
                    own_mac,
                });
            }
            self.probe(model, pci);
        }
        if self.pfs.get(usize::from(pf)).is_some_and(|pf| pf.switchdev) {
            self.make_representors(pf);
        }
        Ok(())
    }

    fn make_representors(&mut self, pf: u16) {
        let Some(found) = self.pfs.get(usize::from(pf)) else {
            return;
        };
        let (pci, count) = (found.pci, found.vfs.len() as u16);
        for vf in 0..count {
            let name = format!("pf{pf}vf{vf}");
            let mac = [2, 0xca, 0xfe, 2, pf as u8, vf as u8];
            let link = self.new_link(
                &format!("eth{}", self.next_index),
                Some(pci),
                Some(name),
                mac,
                9978,
            );
            self.devices.push(Device {
                namespace: HOST,
                link,
                addresses: Vec::new(),
            });
        }
    }

    /// Gives a function to the driver that wants it, which makes a network device unless it is VFIO.
    fn probe(&mut self, model: &Model, pci: PciAddress) {
        let Some((pf, vf)) = self.by_pci(pci) else { return };
        let driver = vf
            .driver_override
            .clone()
            .unwrap_or_else(|| model.vf_driver.to_owned());
        vf.driver = Some(driver.clone());
        let (index, mac) = (
            vf.admin.index,
            if vf.admin.mac == [0; 6] {
                vf.own_mac
            } else {
                vf.admin.mac
            },
        );
        if driver == VFIO {
            return;
        }
        let port_name = model.switchdev.then(|| format!("pf{pf}vf{index}"));
        let name = format!("eth{}", self.next_index);
        // A VF's own device has no port of the switch: only its representor has.
        let mut link = self.new_link(&name, Some(pci), None, mac, model.max_mtu);
        link.switch_id = None;
        drop(port_name);
        self.devices.push(Device {
            namespace: HOST,
            link,
            addresses: Vec::new(),
        });
    }

    fn unbind(&mut self, pci: PciAddress) {
        if let Some((_, vf)) = self.by_pci(pci) {
            vf.driver = None;
        }
        let pci = pci.to_string();
        self.devices
            .retain(|device| device.link.parent.as_deref() != Some(&pci));
    }

    fn number(&self, spot: &Spot) -> Outcome<u64> {
        match spot {
            Spot::Host | Spot::Init => Ok(HOST),
            Spot::At(path) if path == Path::new("/proc/1/ns/net") => Ok(HOST),
            Spot::At(path) => {
                let found = self.namespaces.get(path).copied();
                found.ok_or_else(|| refused(format!("open namespace {}", path.display()), libc::ENOENT))
            }
        }
    }

    fn device(&mut self, spot: &Spot, link: LinkIndex) -> Outcome<&mut Device> {
        let number = self.number(spot)?;
        let mut devices = self.devices.iter_mut();
        devices
            .find(|device| device.namespace == number && device.link.index == link)
            .ok_or_else(|| refused(link, libc::ENODEV))
    }

    fn pf_of(&mut self, link: LinkIndex) -> Outcome<&mut FakePf> {
        let parent = self
            .devices
            .iter()
            .find(|device| device.namespace == HOST && device.link.index == link)
            .and_then(|device| device.link.parent.clone());
        let mut pfs = self.pfs.iter_mut();
        pfs.find(|pf| Some(pf.pci.to_string()) == parent)
            .ok_or_else(|| refused(link, libc::ENODEV))
    }
}

impl Kernel for FakeMachine {
    fn sysfs(&self) -> &Path {
        self.0.root.path()
    }

    fn write(&self, attribute: &Path, value: &str) -> Outcome<()> {
        let what = format!("write {:?} to {}", value.trim_end(), attribute.display());
        let model = &self.0.model;
        self.call(what.clone(), |state| {
            let parts: Vec<&str> = attribute.iter().filter_map(|part| part.to_str()).collect();
            let value = value.trim();
            let pci = |text: &str| {
                text.parse::<PciAddress>()
                    .map_err(|_| refused(&what, libc::EINVAL))
            };
            let unknown = || Err(refused(&what, libc::ENOENT));
            match parts[..] {
                ["bus", "pci", "devices", function, "sriov_numvfs"] => {
                    let function = pci(function)?;
                    let pf = state.pfs.iter().position(|pf| pf.pci == function);
                    let pf = pf.ok_or_else(|| refused(&what, libc::ENOENT))?;
                    let count = value.parse().map_err(|_| refused(&what, libc::EINVAL))?;
                    state.set_count(model, pf as u16, count)?;
                }
                ["bus", "pci", "devices", function, "driver_override"] => {
                    let Some((_, vf)) = state.by_pci(pci(function)?) else {
                        return unknown();
                    };
                    vf.driver_override = (!value.is_empty()).then(|| value.to_owned());
                }
                ["bus", "pci", "devices", function, "driver", "unbind"] => state.unbind(pci(function)?),
                ["bus", "pci", "devices", function, "reset"] if model.flr => {
                    let function = pci(function)?;
                    if state.jammed.contains(&function) {
                        return Err(refused(&what, libc::EIO));
                    }
                }
                ["bus", "pci", "drivers_probe"] | ["bus", "pci", "drivers", _, "bind"] => {
                    let function = pci(value)?;
                    if state.by_pci(function).is_some_and(|(_, vf)| vf.driver.is_some()) {
                        return Err(refused(&what, libc::EBUSY));
                    }
                    state.probe(model, function);
                }
                _ => return unknown(),
            }
            self.rewrite(state);
            Ok(())
        })
    }

    fn boot(&self) -> Outcome<String> {
        Ok(format!("boot {}", self.state().boot))
    }

    fn namespace(&self, spot: &Spot) -> Outcome<u64> {
        self.state().number(spot)
    }

    fn links(&self, spot: &Spot) -> Outcome<Vec<Link>> {
        let state = self.state();
        let number = state.number(spot)?;
        if number == HOST {
            let own = state.devices.iter().filter(|device| device.namespace == HOST);
            let links = own.map(|device| (device.link.index.0, device.link.name.clone()));
            self.0.tc.with(|tc| tc.links = links.collect());
        }
        let devices = state.devices.iter().filter(|device| device.namespace == number);
        Ok(devices.map(|device| device.link.clone()).collect())
    }

    fn change_link(&self, spot: &Spot, link: LinkIndex, edit: &LinkEdit) -> Outcome<()> {
        let what = format!("change {link} by {edit:?}");
        let late = self.0.model.late_mac;
        self.call(what.clone(), |state| {
            let number = state.number(spot)?;
            if let Some(name) = &edit.name
                && state
                    .devices
                    .iter()
                    .any(|device| device.namespace == number && device.link.name == *name)
            {
                return Err(refused(&what, libc::EEXIST));
            }
            let admin = {
                let parent = state.device(spot, link)?.link.parent.clone();
                let pci = parent.and_then(|parent| parent.parse().ok());
                pci.and_then(|pci| state.by_pci(pci))
                    .map(|(_, vf)| vf.admin.clone())
            };
            let device = &mut state.device(spot, link)?.link;
            if let Some(mtu) = edit.mtu {
                if device.max_mtu.is_some_and(|max| mtu > max) {
                    return Err(refused(&what, libc::EINVAL));
                }
                device.mtu = mtu;
            }
            if let Some(mac) = edit.mac {
                let administered = admin.as_ref().map(|vf| vf.mac).filter(|mac| *mac != [0; 6]);
                let trusted = admin.as_ref().is_some_and(|vf| vf.trust == Some(true));
                if late && administered.is_some() && !trusted {
                    return Err(refused(&what, libc::EADDRNOTAVAIL));
                }
                if administered.is_some_and(|own| own != mac) && !trusted {
                    return Err(refused(&what, libc::EPERM));
                }
                device.mac = Some(mac);
            }
            if let Some(name) = &edit.name {
                device.name.clone_from(name);
            }
            if let Some(up) = edit.up {
                if up
                    && !device.up
                    && let Some(admin) = admin.filter(|vf| vf.mac != [0; 6])
                {
                    device.mac = Some(admin.mac);
                }
                device.up = up;
            }
            Ok(())
        })
    }

    fn move_link(&self, from: &Spot, link: LinkIndex, to: &Spot, name: &str) -> Outcome<()> {
        let what = format!("move {link} to {to:?} as {name}");
        self.call(what.clone(), |state| {
            let to = state.number(to)?;
            let taken = |name: &str| {
                let mut devices = state.devices.iter();
                devices.any(|device| device.namespace == to && device.link.name == name)
            };
            let name = match name.strip_suffix("%d") {
                Some(stem) => (0..)
                    .map(|n| format!("{stem}{n}"))
                    .find(|name| !taken(name))
                    .unwrap_or_default(),
                None if taken(name) => return Err(refused(&what, libc::EEXIST)),
                None => name.to_owned(),
            };
            let jammed: Vec<String> = state.jammed.iter().map(ToString::to_string).collect();
            let device = state.device(from, link)?;
            if device
                .link
                .parent
                .as_ref()
                .is_some_and(|parent| jammed.contains(parent))
            {
                return Err(refused(&what, libc::EIO));
            }
            device.namespace = to;
            device.link.name = name;
            device.link.up = false;
            device.addresses.clear();
            Ok(())
        })
    }

    fn addresses(&self, spot: &Spot, link: LinkIndex) -> Outcome<Vec<IpNet>> {
        Ok(self.state().device(spot, link)?.addresses.clone())
    }

    fn add_address(&self, spot: &Spot, link: LinkIndex, net: IpNet) -> Outcome<()> {
        self.call(format!("add {net} to {link}"), |state| {
            state.device(spot, link)?.addresses.push(net);
            Ok(())
        })
    }

    fn vfs(&self, pf: LinkIndex) -> Outcome<Vec<Vf>> {
        let mut state = self.state();
        Ok(state.pf_of(pf)?.vfs.iter().map(|vf| vf.admin.clone()).collect())
    }

    fn set_vf(&self, pf: LinkIndex, vf: u16, setting: &VfSetting) -> Outcome<()> {
        let what = format!("set VF {vf} of {pf} to {setting:?}");
        let model = &self.0.model;
        self.call(what.clone(), |state| {
            let (kind, value_ok) = match *setting {
                VfSetting::Mac(mac) => (VfAttributes::MAC, mac[0] & 1 == 0),
                VfSetting::Vlan { id, qos, .. } => (VfAttributes::VLAN, id <= 4094 && qos <= 7),
                VfSetting::SpoofCheck(_) => (VfAttributes::SPOOF_CHECK, true),
                VfSetting::Trust(_) => (VfAttributes::TRUST, true),
                VfSetting::LinkState(_) => (VfAttributes::LINK_STATE, true),
                VfSetting::Rate { min, max } => {
                    let both = VfAttributes::MIN_RATE | VfAttributes::MAX_RATE;
                    let able = model.attributes & both;
                    let fits = (min == 0 || able.contains(VfAttributes::MIN_RATE))
                        && (max == 0 || able.contains(VfAttributes::MAX_RATE))
                        && (max == 0 || min <= max);
                    (if able.is_empty() { both } else { able }, fits)
                }
            };
            if !model.attributes.contains(kind) {
                return Err(refused(&what, libc::EOPNOTSUPP));
            }
            let pf = state.pf_of(pf)?;
            let Some(vf) = pf
                .vfs
                .iter_mut()
                .find(|other| other.admin.index == vf)
                .filter(|_| value_ok)
            else {
                return Err(refused(&what, libc::EINVAL));
            };
            match *setting {
                VfSetting::Mac(mac) => vf.admin.mac = mac,
                VfSetting::Vlan { id, qos, protocol } => {
                    (vf.admin.vlan, vf.admin.qos) = (id, qos);
                    vf.admin.vlan_protocol = if id == 0 { VLAN_8021Q } else { protocol };
                }
                VfSetting::SpoofCheck(on) => vf.admin.spoof_check = Some(on),
                VfSetting::Trust(on) => vf.admin.trust = Some(on),
                VfSetting::LinkState(link_state) => vf.admin.link_state = link_state,
                VfSetting::Rate { min, max } => (vf.admin.min_rate, vf.admin.max_rate) = (min, max),
            }
            Ok(())
        })
    }

    fn bridge_mode(&self, pf: LinkIndex) -> Outcome<Option<BridgeMode>> {
        let vepa = self.state().pf_of(pf)?.vepa;
        let mode = if vepa { BridgeMode::Vepa } else { BridgeMode::Veb };
        Ok(self.0.model.vepa.then_some(mode))
    }

    fn set_bridge_mode(&self, pf: LinkIndex, mode: BridgeMode) -> Outcome<()> {
        let what = format!("set switch of {pf} to {mode:?}");
        self.call(what.clone(), |state| {
            if !self.0.model.vepa {
                return Err(refused(what, libc::EOPNOTSUPP));
            }
            state.pf_of(pf)?.vepa = mode == BridgeMode::Vepa;
            Ok(())
        })
    }

    fn eswitch_mode(&self, pf: PciAddress) -> Outcome<Option<EswitchMode>> {
        let state = self.state();
        let found = state.pfs.iter().find(|other| other.pci == pf);
        Ok(found.filter(|_| self.0.model.switchdev).map(|pf| {
            if pf.switchdev {
                EswitchMode::Switchdev
            } else {
                EswitchMode::Legacy
            }
        }))
    }

    fn set_eswitch_mode(&self, pf: PciAddress, mode: EswitchMode) -> Outcome<()> {
        let what = format!("set eswitch of {pf} to {mode:?}");
        self.call(what.clone(), |state| {
            let Some(index) = state.pfs.iter().position(|other| other.pci == pf) else {
                return Err(refused(what, libc::ENODEV));
            };
            if !self.0.model.switchdev {
                return Err(refused(what, libc::EOPNOTSUPP));
            }
            // As drivers do: not while VFs have their drivers.
            if state.pfs[index].vfs.iter().any(|vf| vf.driver.is_some()) {
                return Err(refused(what, libc::EBUSY));
            }
            state.pfs[index].switchdev = mode == EswitchMode::Switchdev;
            Ok(())
        })
    }

    fn has_frames(&self) -> bool {
        true
    }

    fn open_frames(&self, port: PortRef, link: &Link, mtu: Mtu, _: Sieve) -> Result<Box<dyn PortIo>> {
        Ok(Box::new(self.0.air.open(port, link.index, mtu)))
    }

    fn traffic_control(&self) -> Option<Box<dyn flower::Kernel>> {
        Some(Box::new(self.0.tc.clone()))
    }

    fn ports(&self, pf: PciAddress) -> Outcome<Vec<DevlinkPort>> {
        let state = self.state();
        if !self.0.model.switchdev {
            return Ok(Vec::new());
        }
        let own = state.devices.iter().filter(|device| {
            device.namespace == HOST
                && device.link.parent == Some(pf.to_string())
                && device.link.port_name.is_some()
        });
        Ok((0..)
            .zip(own)
            .map(|(index, device)| DevlinkPort {
                index,
                flavour: match discover::representee(&device.link) {
                    Some((pf, vf)) => PortFlavour::Vf { pf, vf },
                    None => PortFlavour::Physical(0),
                },
                link: Some(device.link.index),
                controller: 0,
                external: false,
            })
            .collect())
    }
}
