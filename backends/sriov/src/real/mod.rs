//! [`RealFixture`]: the conformance kit against this backend on a card that is there.
//!
//! The card is the test's alone: its VFs go and come, its driver is taken away and given back. Each case finds it as it was made ready:
//! driver bound, physical function up, VFs at home with the attributes they were born with. What a case leaves otherwise is
//! unmade and made anew, which costs seconds on some cards, so what it leaves clean is left as it is.

mod jammable;

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use dpumesh_core::offload::Program;
use dpumesh_core::vf::ResetLevel;
use dpumesh_core::{Backend, BackendExt, Error, ErrorKind, PciAddress, PfIndex, PortRef, Result};
use dpumesh_hw::conformance::{Clock, Crash, Expectations, Fixture, Namespaces, Probe, Reset, Rig, Sabotage};
use dpumesh_hw::netlink::{Link, LinkChange, Netlink, Vf};
use dpumesh_hw::netns::Namespace;

use crate::kernel::linux::Linux;
use crate::{Card, Options, Parts, discover};
use jammable::Jammable;

const READY: &str = "rig.open";

/// One real card, fresh for each case.
#[derive(Debug)]
pub struct RealFixture {
    name: String,
    options: Options,
    driver: String,
    vfs: u16,
    /// How its functions look when nothing was done to them.
    clean: Mutex<Option<Vec<Look>>>,
    journals: AtomicU32,
    expected: Expectations,
}

/// What can be seen of a VF.
#[derive(Clone, Debug, PartialEq)]
struct Look {
    /// Without its MAC: some drivers tell the one that a VF chose as one that the PF gave.
    admin: Vf,
    ifname: Option<String>,
    mtu: Option<u32>,
    up: bool,
}

impl RealFixture {
    /// The physical function at [`Options::device`], in the calling thread's namespace, with so many VFs. Each case has a journal of
    /// its own in the folder [`Options::journal`].
    ///
    /// # Errors
    /// `NotFound` when there is no such card, or it has no driver or no SR-IOV: the message says where it was looked for.
    /// `Unsupported` with a namespace of the host in the options.
    pub fn new(name: impl Into<String>, options: Options, vfs: u16) -> Result<Self> {
        if options.host_namespace.is_some() {
            let message = "the kit proves a card in the namespace that it runs in";
            return Err(Error::new(ErrorKind::Unsupported, READY, message).field("host_namespace"));
        }
        let path = options.sysfs.join(discover::directory(options.device));
        if !path.exists() {
            let message = format!(
                "no PCI device at {}: looked for {}",
                options.device,
                path.display()
            );
            return Err(not_found(message));
        }
        let pf = discover::pf(&options.sysfs, options.device).ok_or_else(|| {
            let message = format!(
                "{} has no `sriov_totalvfs`: no physical function with SR-IOV",
                path.display()
            );
            not_found(message)
        })?;
        let no_driver = || not_found(format!("{} has no driver: bind it first", path.display()));
        Ok(Self {
            name: name.into(),
            driver: pf.driver.ok_or_else(no_driver)?,
            vfs: vfs.min(pf.total_vfs),
            options,
            clean: Mutex::default(),
            journals: AtomicU32::new(0),
            expected: Expectations::default(),
        })
    }

    /// With known deviations.
    #[must_use]
    pub fn expecting(mut self, expected: Expectations) -> Self {
        self.expected = expected;
        self
    }

    /// Makes the card ready, and gives the options that open it. Blocks.
    ///
    /// # Errors
    /// What sysfs or the kernel said.
    pub fn fresh(&self) -> Result<Options> {
        bind(&self.options, &self.driver)?;
        switch_on(self.options.device)?;
        let mut clean = lock(&self.clean);
        if clean.is_none() || *clean != Some(self.looks()?) {
            // Before the card is opened: it need not make VFs then to find out what it is able to do.
            for count in [0, self.vfs] {
                let attribute = discover::directory(self.options.device).join("sriov_numvfs");
                write(&self.options.sysfs.join(attribute), &count.to_string())?;
            }
            *clean = Some(self.looks()?);
        }
        let number = self.journals.fetch_add(1, Ordering::Relaxed);
        let mut options = self.options.clone();
        options.journal.push(number.to_string());
        Ok(options)
    }

    /// The card, ready for a case.
    ///
    /// # Errors
    /// What kept it from being so.
    pub async fn rig(&self) -> Result<RealRig> {
        let options = self.fresh()?;
        let kernel = Linux::open(&options.sysfs, options.host_namespace.as_deref()).map_err(failed)?;
        let kernel = Arc::new(Jammable::new(kernel));
        let card = Card::open_on(options.clone(), Arc::<Jammable>::clone(&kernel), Parts::default())?;
        card.require_vf()?
            .set_vf_count(card.fence(), PfIndex(0), self.vfs)
            .await?;
        Ok(RealRig {
            options,
            driver: self.driver.clone(),
            vfs: self.vfs,
            kernel,
            card: Mutex::new(card),
            pods: Mutex::default(),
            strays: Mutex::default(),
        })
    }

    fn looks(&self) -> Result<Vec<Look>> {
        let (mut netlink, links) = devices()?;
        let pf = netdev(&links, self.options.device)?;
        let mut admins = netlink.vfs(pf.index).map_err(failed)?;
        admins.sort_by_key(|vf| vf.index);
        let functions = discover::vfs(&self.options.sysfs, self.options.device);
        let looks = admins.into_iter().map(|mut admin| {
            admin.mac = Vf::new(admin.index).mac;
            let function = functions.iter().find(|function| function.index == admin.index);
            let link = function.and_then(|function| discover::netdev_of(&links, function.pci));
            Look {
                admin,
                ifname: link.map(|link| link.name.clone()),
                mtu: link.map(|link| link.mtu),
                up: link.is_some_and(|link| link.up),
            }
        });
        Ok(looks.collect())
    }
}

#[async_trait]
impl Fixture for RealFixture {
    fn name(&self) -> String {
        self.name.clone()
    }

    async fn open(&self) -> Result<Box<dyn Rig>> {
        Ok(Box::new(self.rig().await?))
    }

    fn expectations(&self) -> Expectations {
        self.expected.clone()
    }
}

/// A real card and what a case may do to it.
pub struct RealRig {
    options: Options,
    driver: String,
    vfs: u16,
    kernel: Arc<Jammable>,
    card: Mutex<Arc<Card>>,
    pods: Mutex<HashMap<PathBuf, Namespace>>,
    strays: Mutex<Vec<Namespace>>,
}

impl RealRig {
    fn card(&self) -> Arc<Card> {
        Arc::clone(&lock(&self.card))
    }
}

impl Drop for RealRig {
    /// What the case left leased is released: then nothing has to be made anew for the next one.
    fn drop(&mut self) {
        self.kernel.jam(false);
        let card = self.card();
        let released = std::thread::spawn(move || release_all(&card));
        match released.join() {
            Ok(Ok(())) => {}
            Ok(Err(left)) => tracing::warn!("left behind on the card: {left}"),
            Err(_) => tracing::warn!("left behind on the card: the release panicked"),
        }
    }
}

fn release_all(card: &Card) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    runtime.map_err(failed)?.block_on(async {
        let vf = card.require_vf()?;
        let states = vf.list().await?;
        for lease in states.into_iter().filter_map(|state| state.lease) {
            vf.release(card.fence(), &lease, ResetLevel::Config).await?;
        }
        Ok(())
    })
}

impl fmt::Debug for RealRig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RealRig")
            .field("device", &self.options.device)
            .finish_non_exhaustive()
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

/// The card vanishes when its driver is taken away.
#[async_trait]
impl Reset for RealRig {
    async fn lose(&self) -> Result<()> {
        let unbind = driver_directory(&self.options.sysfs, &self.driver).join("unbind");
        write(&unbind, &self.options.device.to_string())?;
        self.card().look();
        Ok(())
    }

    async fn bring_back(&self) -> Result<()> {
        bind(&self.options, &self.driver)?;
        switch_on(self.options.device)?;
        let card = self.card();
        card.look();
        // A card comes back without VFs; who owns the node makes them again.
        card.require_vf()?
            .set_vf_count(card.fence(), PfIndex(0), self.vfs)
            .await?;
        Ok(())
    }

    fn most_in_a_row(&self) -> u64 {
        50
    }
}

#[async_trait]
impl Namespaces for RealRig {
    async fn fresh(&self) -> Result<PathBuf> {
        let pod = Namespace::create().map_err(failed)?;
        let path = pod.path();
        lock(&self.pods).insert(path.clone(), pod);
        Ok(path)
    }

    async fn remove(&self, path: &Path) -> Result<()> {
        lock(&self.pods).remove(path);
        Ok(())
    }
}

#[async_trait]
impl Crash for RealRig {
    async fn crash(&self) -> Result<()> {
        let kernel = Arc::<Jammable>::clone(&self.kernel);
        *lock(&self.card) = Card::open_on(self.options.clone(), kernel, Parts::default())?;
        Ok(())
    }
}

#[async_trait]
impl Sabotage for RealRig {
    async fn jam(&self, _: PortRef, jammed: bool) -> Result<()> {
        self.kernel.jam(jammed);
        Ok(())
    }

    async fn strand(&self, port: PortRef) -> Result<()> {
        let states = self.card().require_vf()?.list().await?;
        let pci = states
            .iter()
            .find(|state| state.port == port)
            .and_then(|state| state.pci);
        let pci = pci.ok_or_else(|| failed("there is no such VF"))?;
        let away = Namespace::create().map_err(failed)?;
        let (mut netlink, links) = devices()?;
        let change = LinkChange::new().down().namespace(&away).name("stray0");
        netlink
            .change_link(netdev(&links, pci)?.index, &change)
            .map_err(failed)?;
        lock(&self.strays).push(away);
        Ok(())
    }
}

fn driver_directory(sysfs: &Path, driver: &str) -> PathBuf {
    sysfs.join("bus/pci/drivers").join(driver)
}

fn bind(options: &Options, driver: &str) -> Result<()> {
    if discover::driver_of(&options.sysfs, options.device).is_some() {
        return Ok(());
    }
    let bind = driver_directory(&options.sysfs, driver).join("bind");
    write(&bind, &options.device.to_string())
}

/// Some drivers answer their VFs only while the physical function is up.
fn switch_on(device: PciAddress) -> Result<()> {
    let (mut netlink, links) = devices()?;
    let pf = netdev(&links, device)?;
    if pf.up {
        return Ok(());
    }
    netlink
        .change_link(pf.index, &LinkChange::new().up())
        .map_err(failed)
}

/// The network devices of this thread's namespace.
fn devices() -> Result<(Netlink, Vec<Link>)> {
    let mut netlink = Netlink::open().map_err(failed)?;
    let links = netlink.links().map_err(failed)?;
    Ok((netlink, links))
}

fn netdev(links: &[Link], pci: PciAddress) -> Result<&Link> {
    discover::netdev_of(links, pci).ok_or_else(|| failed(format!("{pci} has no network device")))
}

fn write(attribute: &Path, value: &str) -> Result<()> {
    std::fs::write(attribute, value)
        .map_err(|error| failed(format!("write {value} to {}: {error}", attribute.display())))
}

fn failed(reason: impl fmt::Display) -> Error {
    Error::new(ErrorKind::Io, READY, reason.to_string())
}

fn not_found(message: String) -> Error {
    Error::new(ErrorKind::NotFound, READY, message)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
