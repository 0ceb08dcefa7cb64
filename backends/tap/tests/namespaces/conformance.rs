//! The emulated card against the conformance kit: real devices, two sides, namespaces, restarts.
//!
//! What is skipped, and why, is in `expected/`; `UPDATE_EXPECT=1` writes it anew.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use dpumesh_core::offload::Program;
use dpumesh_core::{
    Backend, BackendExt, Error, ErrorKind, Frame, Mtu, PfIndex, PortIo, PortRef, Result, Role,
};
use dpumesh_hw::conformance::{
    Clock, Crash, Expectations, Fixture, Namespaces, Probe, Reset, Rig, Sabotage, run,
};
use dpumesh_hw::netlink::{LinkChange, Netlink, VethEnd, sysctl};
use dpumesh_hw::netns::Namespace;
use dpumesh_hw::shm::SocketTransport;
use dpumesh_tap::device::{PacketOptions, PacketPort};
use dpumesh_tap::{Mode, Profile, TapBackend, TapCard, TapOptions, VfKind};

use crate::steered::Steered;
use crate::world::join;

const VFS: u16 = 4;

pub(crate) fn tap_vfs_keep_the_contract() {
    check(VfKind::Tap, Profile::K2Like, Eswitch::None, "tap");
}

pub(crate) fn veth_vfs_keep_the_contract() {
    check(VfKind::Veth, Profile::Minimal, Eswitch::None, "veth");
}

pub(crate) fn steered_unlimited_cards_keep_the_contract() {
    check(
        VfKind::Tap,
        Profile::Unlimited,
        Eswitch::Dataplane,
        "tap-steered-unlimited",
    );
}

pub(crate) fn steered_k2_like_cards_keep_the_contract() {
    check(
        VfKind::Veth,
        Profile::K2Like,
        Eswitch::Dataplane,
        "veth-steered-k2-like",
    );
}

pub(crate) fn steered_minimal_cards_keep_the_contract() {
    check(
        VfKind::Tap,
        Profile::Minimal,
        Eswitch::Dataplane,
        "tap-steered-minimal",
    );
}

/// What steers the card's frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Eswitch {
    /// Nothing: whoever opens a port has its frames.
    None,
    /// The software dataplane.
    Dataplane,
}

fn check(kind: VfKind, profile: Profile, eswitch: Eswitch, file: &str) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/namespaces/expected")
        .join(format!("{file}.json"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|_| "{}".to_owned());
    let expected = Expectations::from_json(&text).expect("an expectations file");
    let fixture = TapFixture {
        kind,
        profile,
        eswitch,
        name: file.to_owned(),
        expected: expected.clone(),
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let report = runtime.block_on(run(Arc::new(fixture), "", Duration::from_secs(10)));
    println!("{report}");
    if std::env::var_os("UPDATE_EXPECT").is_some() {
        assert!(
            report.is_clean(),
            "only skips are written by themselves:\n{report}"
        );
        std::fs::write(&path, report.to_expectations(&expected).to_json()).expect("written");
        return;
    }
    let differences: Vec<String> = report
        .differences(&expected)
        .iter()
        .map(ToString::to_string)
        .collect();
    assert!(
        differences.is_empty(),
        "differences to {}:\n{}",
        path.display(),
        differences.join("\n")
    );
}

#[derive(Debug)]
struct TapFixture {
    kind: VfKind,
    profile: Profile,
    eswitch: Eswitch,
    name: String,
    expected: Expectations,
}

#[async_trait]
impl Fixture for TapFixture {
    fn name(&self) -> String {
        self.name.clone()
    }

    async fn open(&self) -> Result<Box<dyn Rig>> {
        let rig = TapRig::new(self.kind, self.profile, self.eswitch)?;
        let host = rig.host();
        host.require_vf()?
            .set_vf_count(host.fence(), PfIndex(0), VFS)
            .await?;
        // What a VF receives is seen from the beginning.
        for index in 0..VFS {
            rig.with_far_end(PortRef::vf(index), |_| Ok(()))?;
        }
        Ok(Box::new(rig))
    }

    fn expectations(&self) -> Expectations {
        self.expected.clone()
    }
}

/// One card in namespaces of its own.
struct TapRig {
    dir: tempfile::TempDir,
    options: TapOptions,
    host: Namespace,
    _soc: Namespace,
    _fabric: Namespace,
    wire: Namespace,
    sides: Mutex<Sides>,
    /// The SoC's half, where the dataplane is the eswitch.
    steered: Option<Arc<Steered>>,
    pods: Mutex<HashMap<PathBuf, Namespace>>,
    pod_number: AtomicU32,
    /// The far ends of ports.
    taps: Mutex<HashMap<PortRef, PacketPort>>,
}

#[derive(Clone)]
struct Sides {
    host: Arc<TapBackend>,
    soc: Arc<TapBackend>,
}

impl fmt::Debug for TapRig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TapRig")
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

impl TapRig {
    fn new(kind: VfKind, profile: Profile, eswitch: Eswitch) -> Result<Self> {
        let dir = tempfile::tempdir().map_err(|error| failed(&error))?;
        let [host, soc, fabric, wire] = [(); 4].map(|()| Namespace::create().expect("namespace"));
        join((&soc, "up0"), (&wire, "far0"), 1500);
        let mode = Mode::Underlay { ifname: "up0".into() };
        let mut options = TapOptions::new(dir.path().join("card"), "dpu0", Role::Host, mode);
        options.vf_kind = kind;
        options.profile = profile;
        options.host_namespace = Some(host.path());
        options.soc_namespace = Some(soc.path());
        options.fabric_namespace = Some(fabric.path());
        let sides = Sides::open(&options)?;
        let steered = (eswitch == Eswitch::Dataplane).then(|| {
            let limits = profile
                .capabilities(options.vf_mtu().unwrap_or_default())
                .steering;
            Arc::new(Steered::new(Arc::clone(&sides.soc), limits))
        });
        let sides = Mutex::new(sides);
        let (pods, taps) = (Mutex::default(), Mutex::default());
        let pod_number = AtomicU32::new(0);
        Ok(Self {
            dir,
            options,
            host,
            _soc: soc,
            _fabric: fabric,
            wire,
            sides,
            steered,
            pods,
            pod_number,
            taps,
        })
    }

    fn sides(&self) -> Sides {
        self.sides.lock().expect("no panic under it").clone()
    }

    /// Runs `work` on the far end of a port: what the VF's driver, or the wire, would see.
    fn with_far_end<T>(&self, port: PortRef, work: impl FnOnce(&mut PacketPort) -> Result<T>) -> Result<T> {
        let mut taps = self.taps.lock().expect("no panic under it");
        let far = match taps.entry(port) {
            Entry::Occupied(far) => far.into_mut(),
            Entry::Vacant(place) => place.insert(self.open_far_end(port)?),
        };
        work(far)
    }

    fn open_far_end(&self, port: PortRef) -> Result<PacketPort> {
        let (namespace, name) = match port {
            PortRef::Vf { vf, .. } => (&self.host, format!("dpu0vf{}", vf.0)),
            _ => (&self.wire, "far0".to_owned()),
        };
        // The kernel's own chatter is no frame of the case.
        let quiet = format!("ipv6/conf/{name}/disable_ipv6");
        sysctl::set(namespace, &quiet, "1").map_err(|error| failed(&error))?;
        let mut netlink = Netlink::open_in(namespace).map_err(|error| failed(&error))?;
        let link = netlink.link(&name).map_err(|error| failed(&error))?;
        let change = LinkChange::new().arp(false).up();
        netlink
            .change_link(link.index, &change)
            .map_err(|error| failed(&error))?;
        let options = PacketOptions { bypass_qdisc: true };
        PacketPort::open(port, namespace, &name, Mtu::ETHERNET, options)
    }
}

impl Sides {
    fn open(options: &TapOptions) -> Result<Self> {
        let host = Arc::new(TapBackend::open(options.clone(), None, None)?);
        let options = TapOptions {
            role: Role::Soc,
            ..options.clone()
        };
        let card = TapCard::open(options.clone())?;
        let folder = options.card.join("channels");
        let transport = SocketTransport::new(folder, SocketTransport::usual_capabilities())?;
        let claims = transport.capabilities().clone();
        let soc = TapBackend::on(card, None, Some(Arc::new(transport)))
            .with_capabilities(|all| all.transport = claims);
        Ok(Self {
            host,
            soc: Arc::new(soc),
        })
    }
}

fn failed(error: &dyn std::error::Error) -> Error {
    Error::new(ErrorKind::Io, "rig", error.to_string())
}

impl Rig for TapRig {
    fn host(&self) -> Arc<dyn Backend> {
        self.sides().host
    }

    fn soc(&self) -> Arc<dyn Backend> {
        match &self.steered {
            Some(steered) => Arc::clone(steered) as _,
            None => self.sides().soc,
        }
    }

    /// A dataplane ends with its card, and a new one knows no rules: that is proven where it runs.
    fn reset(&self) -> Option<&dyn Reset> {
        self.steered.is_none().then_some(self as _)
    }

    fn probe(&self) -> Option<&dyn Probe> {
        Some(self)
    }

    fn namespaces(&self) -> Option<&dyn Namespaces> {
        Some(self)
    }

    fn crash(&self) -> Option<&dyn Crash> {
        self.steered.is_none().then_some(self as _)
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
impl Reset for TapRig {
    async fn lose(&self) -> Result<()> {
        self.taps.lock().expect("no panic under it").clear();
        self.sides().host.card().lose()
    }

    async fn bring_back(&self) -> Result<()> {
        self.sides().host.card().bring_back()
    }
}

#[async_trait]
impl Probe for TapRig {
    async fn inject(&self, port: PortRef, octets: &[u8]) -> Result<()> {
        if let Some(steered) = &self.steered {
            steered.open_ports().await?;
        }
        self.with_far_end(port, |far| far.transmit(&mut [Frame::copy_of(octets)]).map(drop))
    }

    async fn observed(&self, port: PortRef, within: Duration) -> Result<Option<Vec<u8>>> {
        let begun = Instant::now();
        loop {
            let mut frames = [Frame::new()];
            if self.with_far_end(port, |far| far.receive(&mut frames))? == 1 {
                return Ok(Some(frames[0].octets().to_vec()));
            }
            if begun.elapsed() >= within {
                return Ok(None);
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

#[async_trait]
impl Namespaces for TapRig {
    /// As a runtime does it: a name in a directory that refers to the namespace for as long as it is there.
    async fn fresh(&self) -> Result<PathBuf> {
        let number = self.pod_number.fetch_add(1, Ordering::Relaxed);
        let path = self.dir.path().join(format!("pod{number}"));
        let pod = Namespace::create().map_err(|error| failed(&error))?;
        std::os::unix::fs::symlink(pod.path(), &path).map_err(|error| failed(&error))?;
        self.pods
            .lock()
            .expect("no panic under it")
            .insert(path.clone(), pod);
        Ok(path)
    }

    async fn remove(&self, path: &Path) -> Result<()> {
        std::fs::remove_file(path).map_err(|error| failed(&error))?;
        self.pods.lock().expect("no panic under it").remove(path);
        Ok(())
    }
}

#[async_trait]
impl Crash for TapRig {
    async fn crash(&self) -> Result<()> {
        let sides = Sides::open(&self.options)?;
        *self.sides.lock().expect("no panic under it") = sides;
        Ok(())
    }
}

#[async_trait]
impl Sabotage for TapRig {
    /// Takes the name that an attached VF would come home to, so that it cannot.
    async fn jam(&self, port: PortRef, jammed: bool) -> Result<()> {
        let PortRef::Vf { vf, .. } = port else {
            return Ok(());
        };
        let name = format!("dpu0vf{}", vf.0);
        let mut netlink = Netlink::open_in(&self.host).map_err(|error| failed(&error))?;
        let done = if jammed {
            netlink.create_veth(&VethEnd::new(&name), &VethEnd::new("obstacle"))
        } else {
            netlink
                .link("obstacle")
                .and_then(|link| netlink.delete_link(link.index))
        };
        done.map_err(|error| failed(&error))
    }

    /// Deletes the device: as far away as the card can bring it back from.
    async fn strand(&self, port: PortRef) -> Result<()> {
        let PortRef::Vf { vf, .. } = port else {
            return Ok(());
        };
        let mut netlink = Netlink::open_in(&self.host).map_err(|error| failed(&error))?;
        let link = netlink
            .link(&format!("dpu0vf{}", vf.0))
            .map_err(|error| failed(&error))?;
        netlink.delete_link(link.index).map_err(|error| failed(&error))
    }
}
