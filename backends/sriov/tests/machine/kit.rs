//! The conformance kit on the real card: real `sriov_numvfs`, VF attributes, namespaces, function resets; the card vanishes when its driver is
//! taken away.
//!
//! What is skipped, and why, is in `expected.json`. The file that the run would write is left in `/out`.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use dpumesh_core::offload::Program;
use dpumesh_core::vf::ResetLevel;
use dpumesh_core::{
    Backend, BackendExt, Error, ErrorKind, Mtu, PciAddress, PfIndex, PortIo, PortRef, Result,
};
use dpumesh_hw::conformance::{
    CASES, Case, Clock, Crash, Expectations, Fixture, Namespaces, Probe, Report, Reset, Rig, Sabotage,
    run as run_kit,
};
use dpumesh_hw::netlink::{
    BridgeMode, DevlinkPort, EswitchMode, Link, LinkChange, LinkIndex, Netlink, Vf, VfSetting,
};
use dpumesh_hw::netns::Namespace;
use dpumesh_sriov::kernel::linux::Linux;
use dpumesh_sriov::kernel::{Kernel, KernelError, LinkEdit, Outcome, Spot};
use dpumesh_sriov::{Card, Options, Parts, Sieve};
use ipnet::IpNet;

use crate::{PF, WIRE_NETDEV};

const VFS: u16 = 3;
const DRIVER: &str = "/sys/bus/pci/drivers/igb";
static DIRECTORIES: AtomicU32 = AtomicU32::new(0);

pub(crate) fn run(filter: &str) -> std::result::Result<(), String> {
    let expected =
        Expectations::from_json(include_str!("expected.json")).map_err(|error| error.to_string())?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| error.to_string())?;
    let fixture = Arc::new(RealFixture {
        expected: expected.clone(),
    });
    // One by one, so that what was found is told even if the machine's time is up.
    let mut report: Option<Report> = None;
    let wanted = |case: &&Case| case.name.contains(filter) || case.part == filter;
    for case in CASES.iter().filter(wanted) {
        let begun = Instant::now();
        let fixture = Arc::<RealFixture>::clone(&fixture);
        let mut one = runtime.block_on(run_kit(fixture, case.name, Duration::from_secs(60)));
        // A name may be a part of another's.
        one.entries.retain(|entry| entry.case == case.name);
        let outcomes = one.entries.iter().map(|entry| entry.outcome.to_string());
        let outcomes: Vec<String> = outcomes.collect();
        println!(
            "kit: {} {} {:?}: {}",
            case.part,
            case.name,
            begun.elapsed(),
            outcomes.join(", ")
        );
        match &mut report {
            Some(report) => report.entries.extend(one.entries),
            None => report = Some(one),
        }
    }
    let report = report.ok_or("no such case")?;
    println!("{report}");
    let _ = std::fs::write("/out/expected.json", report.to_expectations(&expected).to_json());
    if !filter.is_empty() {
        return report
            .is_clean()
            .then_some(())
            .ok_or_else(|| "not clean".to_owned());
    }
    let differences: Vec<String> = report
        .differences(&expected)
        .iter()
        .map(ToString::to_string)
        .collect();
    if differences.is_empty() {
        return Ok(());
    }
    Err(differences.join("\n"))
}

/// The card of the machine as it comes: options, with the PF switched on and its VFs there.
pub(crate) fn fresh() -> std::result::Result<Options, String> {
    let text = |error: std::io::Error| error.to_string();
    let device: PciAddress = PF.parse().map_err(|_| "PF")?;
    let dir = Path::new("/sys/bus/pci/devices").join(PF);
    if !dir.join("driver").exists() {
        std::fs::write(format!("{DRIVER}/bind"), PF).map_err(text)?;
    }
    switch_on()?;
    if !is_clean()? {
        // Before the card is opened: it need not make one then to find out what it is able to do.
        for count in [0, VFS] {
            std::fs::write(dir.join("sriov_numvfs"), count.to_string()).map_err(text)?;
        }
    }
    let number = DIRECTORIES.fetch_add(1, Ordering::Relaxed);
    let mut options = Options::new(device, "dpu0", format!("/tmp/journal{number}"));
    options.vlans = Some((3000, 3100));
    Ok(options)
}

/// The VFs are there, at home, and nothing is left of the last case: making them anew takes this machine seconds.
fn is_clean() -> std::result::Result<bool, String> {
    let mut netlink = Netlink::open().map_err(|error| error.to_string())?;
    let links = netlink.links().map_err(|error| error.to_string())?;
    let pf = links
        .iter()
        .find(|link| link.parent.as_deref() == Some(PF))
        .ok_or("the PF has no device")?;
    let vfs = netlink.vfs(pf.index).map_err(|error| error.to_string())?;
    let blank = |vf: &&Vf| {
        let mut blank = Vf::new(vf.index);
        // The driver tells the MAC that a VF chose as one that the PF gave.
        (blank.mac, blank.spoof_check, blank.trust) = (vf.mac, Some(true), Some(false));
        **vf == blank
    };
    let functions = dpumesh_sriov::discover::vfs(Path::new("/sys"), PF.parse().map_err(|_| "PF")?);
    let at_home = |function: &&dpumesh_sriov::discover::VirtualFunction| {
        let link = dpumesh_sriov::discover::netdev_of(&links, function.pci);
        link.is_some_and(|link| link.mtu == 1500 && !link.up && link.name.starts_with("eth"))
    };
    let wanted = usize::from(VFS);
    Ok(vfs.iter().filter(blank).count() == wanted && functions.iter().filter(at_home).count() == wanted)
}

/// `igb` answers its VFs only while it is up; and the cable's other end must take what is sent, or its buffer fills up and the machine
/// stands still.
fn switch_on() -> std::result::Result<(), String> {
    let mut netlink = Netlink::open().map_err(|error| error.to_string())?;
    let links = netlink.links().map_err(|error| error.to_string())?;
    let is_end = |link: &&Link| link.parent.as_deref() == Some(PF) || link.name == WIRE_NETDEV;
    for link in links.iter().filter(is_end).filter(|link| !link.up) {
        netlink
            .change_link(link.index, &LinkChange::new().up())
            .map_err(|error| error.to_string())?;
    }
    Ok(())
}

fn failed(reason: impl fmt::Display) -> Error {
    Error::new(ErrorKind::Io, "machine", reason.to_string())
}

#[derive(Debug)]
struct RealFixture {
    expected: Expectations,
}

#[async_trait]
impl Fixture for RealFixture {
    fn name(&self) -> String {
        "sriov/igb".into()
    }

    async fn open(&self) -> Result<Box<dyn Rig>> {
        let options = fresh().map_err(failed)?;
        let kernel = Arc::new(Jammable {
            kernel: Linux::open(&options.sysfs, None).map_err(failed)?,
            jammed: AtomicBool::new(false),
        });
        let card = Card::open_on(options.clone(), Arc::<Jammable>::clone(&kernel), Parts::default())?;
        card.require_vf()?
            .set_vf_count(card.fence(), PfIndex(0), VFS)
            .await?;
        Ok(Box::new(RealRig {
            options,
            kernel,
            card: Mutex::new(card),
            pods: Mutex::default(),
            strays: Mutex::default(),
        }))
    }

    fn expectations(&self) -> Expectations {
        self.expected.clone()
    }
}

struct RealRig {
    options: Options,
    kernel: Arc<Jammable>,
    card: Mutex<Arc<Card>>,
    pods: Mutex<HashMap<PathBuf, Namespace>>,
    strays: Mutex<Vec<Namespace>>,
}

impl Drop for RealRig {
    /// What the case left leased is released, which leaves nothing for the next one to make anew.
    fn drop(&mut self) {
        self.kernel.jammed.store(false, Ordering::Relaxed);
        let card = self.card();
        let released = std::thread::spawn(move || -> std::result::Result<(), String> {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .build()
                .map_err(|error| error.to_string())?;
            runtime.block_on(async {
                let vf = card.require_vf().map_err(|error| error.to_string())?;
                let states = vf.list().await.map_err(|error| error.to_string())?;
                for lease in states.into_iter().filter_map(|state| state.lease) {
                    let done = vf.release(card.fence(), &lease, ResetLevel::Config).await;
                    done.map_err(|error| error.to_string())?;
                }
                Ok(())
            })
        });
        match released.join() {
            Ok(Ok(())) => {}
            Ok(Err(reason)) => println!("machine: left behind: {reason}"),
            Err(_) => println!("machine: the clean-up panicked"),
        }
    }
}

impl RealRig {
    fn card(&self) -> Arc<Card> {
        Arc::clone(&self.card.lock().expect("no panic under it"))
    }
}

impl fmt::Debug for RealRig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RealRig")
    }
}

impl Rig for RealRig {
    fn host(&self) -> Arc<dyn Backend> {
        self.card()
    }

    fn soc(&self) -> Arc<dyn Backend> {
        self.card()
    }

    fn reset(&self) -> Option<&dyn Reset> {
        Some(self)
    }

    fn probe(&self) -> Option<&dyn Probe> {
        None
    }

    fn namespaces(&self) -> Option<&dyn Namespaces> {
        Some(self)
    }

    fn crash(&self) -> Option<&dyn Crash> {
        Some(self)
    }

    fn sabotage(&self) -> Option<&dyn Sabotage> {
        Some(self)
    }

    fn clock(&self) -> Option<&dyn Clock> {
        None
    }

    fn programs(&self) -> Vec<Program> {
        Vec::new()
    }
}

#[async_trait]
impl Reset for RealRig {
    async fn lose(&self) -> Result<()> {
        std::fs::write(format!("{DRIVER}/unbind"), PF).map_err(failed)?;
        self.card().look();
        Ok(())
    }

    async fn bring_back(&self) -> Result<()> {
        std::fs::write(format!("{DRIVER}/bind"), PF).map_err(failed)?;
        switch_on().map_err(failed)?;
        let card = self.card();
        card.look();
        card.require_vf()?
            .set_vf_count(card.fence(), PfIndex(0), VFS)
            .await?;
        Ok(())
    }
}

#[async_trait]
impl Namespaces for RealRig {
    async fn fresh(&self) -> Result<PathBuf> {
        let pod = Namespace::create().map_err(failed)?;
        let path = pod.path();
        self.pods
            .lock()
            .expect("no panic under it")
            .insert(path.clone(), pod);
        Ok(path)
    }

    async fn remove(&self, path: &Path) -> Result<()> {
        self.pods.lock().expect("no panic under it").remove(path);
        Ok(())
    }
}

#[async_trait]
impl Crash for RealRig {
    async fn crash(&self) -> Result<()> {
        let kernel = Arc::<Jammable>::clone(&self.kernel);
        let again = Card::open_on(self.options.clone(), kernel, Parts::default())?;
        *self.card.lock().expect("no panic under it") = again;
        Ok(())
    }
}

#[async_trait]
impl Sabotage for RealRig {
    async fn jam(&self, _: PortRef, jammed: bool) -> Result<()> {
        self.kernel.jammed.store(jammed, Ordering::Relaxed);
        Ok(())
    }

    async fn strand(&self, port: PortRef) -> Result<()> {
        let states = self.card().require_vf()?.list().await?;
        let pci = states
            .iter()
            .find(|state| state.port == port)
            .and_then(|state| state.pci);
        let pci = pci.ok_or_else(|| failed("no such VF"))?.to_string();
        let away = Namespace::create().map_err(failed)?;
        let mut netlink = Netlink::open().map_err(failed)?;
        let links = netlink.links().map_err(failed)?;
        let link = links.iter().find(|link| link.parent.as_deref() == Some(&pci));
        let link = link.ok_or_else(|| failed("no device"))?.index;
        let change = LinkChange::new().down().namespace(&away).name("stray0");
        netlink.change_link(link, &change).map_err(failed)?;
        self.strays.lock().expect("no panic under it").push(away);
        Ok(())
    }
}

/// The kernel, except that moves can be made to fail: no real card does that on demand.
#[derive(Debug)]
struct Jammable {
    kernel: Linux,
    jammed: AtomicBool,
}

impl Kernel for Jammable {
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

    fn move_link(&self, from: &Spot, link: LinkIndex, to: &Spot, name: &str) -> Outcome<()> {
        if self.jammed.load(Ordering::Relaxed) {
            return Err(KernelError {
                what: "jammed".into(),
                errno: Some(libc::EIO),
            });
        }
        self.kernel.move_link(from, link, to, name)
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
}
