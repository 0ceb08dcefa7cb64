//! A process that dies at every step of every change, and the next one that goes on.
//!
//! "Dies" is an unwinding that runs no undo code, at each write of the record and each touch of a device. Then the card is
//! opened again from its directory.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;

use dpumesh_core::vf::{
    Attachment, LeaseOwner, Released, ResetLevel, VfConfig, VfLease, VfLocation, VfRequest, VfState,
};
use dpumesh_core::{Fence, MacAddr, Mtu, PfIndex, PortRef, Result, Role};
use dpumesh_hw::netlink::Netlink;
use dpumesh_hw::netns::{Namespace, testing, user};

use super::TapVf;
use crate::card::{Died, TapCard};
use crate::{Mode, TapOptions, VfKind};

/// A card with its namespaces; the processes that open it come and go.
struct World {
    _dir: tempfile::TempDir,
    options: TapOptions,
    host: Namespace,
    fabric: Namespace,
    pod: Namespace,
    clean: Vec<VfState>,
}

/// One life of the host's process.
struct Process {
    card: TapCard,
    vf: TapVf,
}

impl World {
    /// A card with two VFs, on the host.
    fn new(kind: VfKind) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let [host, fabric, pod] = [(); 3].map(|()| Namespace::create().expect("namespace"));
        let mode = Mode::Underlay { ifname: "up0".into() };
        let mut options = TapOptions::new(dir.path().join("card"), "dpu0", Role::Both, mode);
        options.vf_kind = kind;
        options.host_namespace = Some(host.path());
        options.soc_namespace = Some(fabric.path());
        let mut world = Self {
            _dir: dir,
            options,
            host,
            fabric,
            pod,
            clean: Vec::new(),
        };
        let process = world.process();
        process
            .vf
            .set_count(process.fence(), PfIndex(0), 2)
            .expect("made");
        world.clean = process.vf.observe().expect("listed");
        world
    }

    fn process(&self) -> Process {
        let card = TapCard::open(self.options.clone()).expect("opened");
        let vf = TapVf::new(Arc::clone(card.inner()), 8);
        Process { card, vf }
    }

    fn place(&self) -> Attachment {
        Attachment::Netns {
            path: self.pod.path(),
            ifname: "net1".into(),
        }
    }

    fn links(&self, namespace: &Namespace) -> usize {
        Netlink::open_in(namespace)
            .expect("netlink")
            .links()
            .expect("listed")
            .len()
    }

    /// Nothing is left of anybody: two VFs at home, as they were made, and no other device anywhere.
    fn check_clean(&self, what: &str) {
        let states = self.process().vf.observe().expect("listed");
        assert_eq!(states, self.clean, "{what}");
        let quiet = self.links(&Namespace::create().expect("namespace"));
        assert_eq!(self.links(&self.pod), quiet, "devices in the pod, {what}");
        assert_eq!(self.links(&self.host), quiet + 2, "devices on the host, {what}");
        let ends = if self.options.vf_kind == VfKind::Veth {
            2
        } else {
            0
        };
        assert_eq!(
            self.links(&self.fabric),
            quiet + ends,
            "devices in the fabric, {what}"
        );
    }
}

impl Process {
    fn fence(&self) -> Fence {
        Fence(self.card.inner().epoch())
    }

    /// Lets `work` die after so many steps. `None`: it died.
    fn dying<T>(&self, steps: u32, work: impl FnOnce(&Self) -> Result<T>) -> Option<T> {
        self.card.inner().steps.die_after(Some(steps));
        match catch_unwind(AssertUnwindSafe(|| work(self))) {
            Ok(done) => Some(done.expect("works when nobody dies")),
            Err(death) => {
                assert!(death.is::<Died>(), "a real panic");
                None
            }
        }
    }

    fn lease(&self) -> Result<VfLease> {
        self.vf.make_lease(self.fence(), &request())
    }
}

fn request() -> VfRequest {
    VfRequest::new("pod").with_config(config(1))
}

fn config(last: u8) -> VfConfig {
    let mtu = Mtu::try_from(1300 + u16::from(last)).ok();
    VfConfig {
        mac: Some(MacAddr([2, 0xee, 0, 0, 0, last])),
        mtu,
        ..VfConfig::default()
    }
}

/// Runs `change` with a death after 0, 1, 2 … steps until it survives, each time on a fresh card, and lets the next
/// process repeat it, undo it by a release, or reclaim the VF of the dead owner.
fn at_every_step(name: &str, prepare: fn(&World, &Process), change: fn(&World, &Process) -> Result<()>) {
    if !user::has_capabilities() {
        return testing::skip(name, "needs root");
    }
    let available = VfKind::available();
    let mut runs = [Recovery::Repeat, Recovery::Release, Recovery::Reclaim]
        .map(|how| (available, how))
        .to_vec();
    runs.push((VfKind::Veth, Recovery::Repeat));
    for (kind, recovery) in runs {
        let mut steps = 0;
        loop {
            let world = World::new(kind);
            let process = world.process();
            prepare(&world, &process);
            let survived = process.dying(steps, |process| change(&world, process)).is_some();
            drop(process);
            recovery.run(
                &world,
                change,
                &format!("{name} of {kind:?} after {steps} steps, {recovery:?}"),
            );
            if survived {
                break;
            }
            steps += 1;
        }
        assert!(steps >= 2, "{name} has steps to die at");
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Recovery {
    Repeat,
    Release,
    Reclaim,
}

impl Recovery {
    fn run(self, world: &World, change: fn(&World, &Process) -> Result<()>, what: &str) {
        let process = world.process();
        let fence = process.fence();
        if self == Self::Repeat {
            change(world, &process).unwrap_or_else(|error| panic!("repeated {what}: {error}"));
        }
        let held: Vec<VfLease> = process
            .vf
            .observe()
            .expect(what)
            .into_iter()
            .filter_map(|state| state.lease)
            .collect();
        for lease in held {
            match self {
                Self::Repeat | Self::Release => {
                    let released = process.vf.end_lease(fence, &lease, ResetLevel::Config);
                    assert_eq!(released.expect(what), Released::Freed, "{what}");
                }
                Self::Reclaim => {
                    let live = [LeaseOwner("another".into())];
                    process
                        .vf
                        .get_back(fence, lease.port, &live, ResetLevel::Function)
                        .expect(what);
                }
            }
        }
        // What a growth left half made is made or taken away by the next one.
        process.vf.set_count(fence, PfIndex(0), 2).expect(what);
        world.check_clean(what);
    }
}

fn nothing(_: &World, _: &Process) {}

fn leased(_: &World, process: &Process) {
    process.lease().expect("leased");
}

fn attached(world: &World, process: &Process) {
    let lease = process.lease().expect("leased");
    process
        .vf
        .put(process.fence(), &lease, &world.place())
        .expect("attached");
}

#[test]
fn dying_in_a_lease() {
    at_every_step("lease", nothing, |_, process| {
        let lease = process.lease()?;
        let state = &process.vf.observe()?[0];
        assert_eq!(
            (state.lease.as_ref(), Some(state.effective_mac)),
            (Some(&lease), config(1).mac)
        );
        assert_eq!(Some(state.mtu), config(1).mtu);
        Ok(())
    });
}

#[test]
fn dying_in_configure() {
    at_every_step("configure", leased, |_, process| {
        let lease = process.lease()?;
        process.vf.set_attributes(process.fence(), &lease, &config(2))?;
        let state = &process.vf.observe()?[0];
        assert_eq!(
            (Some(state.effective_mac), Some(state.mtu)),
            (config(2).mac, config(2).mtu)
        );
        Ok(())
    });
}

#[test]
fn dying_in_attach() {
    at_every_step("attach", leased, |world, process| {
        let lease = process.lease()?;
        let attached = process.vf.put(process.fence(), &lease, &world.place())?;
        assert_eq!(Some(attached.mac), config(1).mac);
        let state = &process.vf.observe()?[0];
        assert_eq!(
            state.location,
            VfLocation::Netns {
                path: world.pod.path()
            }
        );
        let link = Netlink::open_in(&world.pod)
            .expect("netlink")
            .link("net1")
            .expect("there");
        assert!(link.up);
        Ok(())
    });
}

#[test]
fn dying_in_detach() {
    at_every_step("detach", attached, |_, process| {
        let lease = process.lease()?;
        process.vf.fetch(process.fence(), &lease)?;
        assert_eq!(process.vf.observe()?[0].location, VfLocation::Host);
        Ok(())
    });
}

#[test]
fn dying_in_release() {
    for level in [ResetLevel::Config, ResetLevel::Function] {
        // A plain function has no room for the level; each has its own.
        let change: fn(&World, &Process) -> Result<()> = match level {
            ResetLevel::Config => |_, process| release(process, ResetLevel::Config),
            _ => |_, process| release(process, ResetLevel::Function),
        };
        at_every_step("release", attached, change);
    }
}

fn release(process: &Process, level: ResetLevel) -> Result<()> {
    let held = process.vf.observe()?.into_iter().find_map(|state| state.lease);
    match held {
        Some(lease) => process.vf.end_lease(process.fence(), &lease, level).map(drop),
        None => Ok(()),
    }
}

#[test]
fn dying_in_reclaim_of_a_vanished_pod() {
    at_every_step("reclaim", vanished, |_, process| {
        let port = PortRef::vf(0);
        process
            .vf
            .get_back(process.fence(), port, &[], ResetLevel::Function)
            .map(drop)
    });
}

/// The pod's namespace died with the VF in it.
fn vanished(_: &World, process: &Process) {
    let lease = process.lease().expect("leased");
    let short = Namespace::create().expect("namespace");
    let place = Attachment::Netns {
        path: short.path(),
        ifname: "net1".into(),
    };
    process.vf.put(process.fence(), &lease, &place).expect("attached");
}

#[test]
fn dying_in_a_change_of_the_count() {
    at_every_step("grow and shrink", nothing, |_, process| {
        process.vf.set_count(process.fence(), PfIndex(0), 4)?;
        assert_eq!(process.vf.observe()?.len(), 4);
        process.vf.set_count(process.fence(), PfIndex(0), 2).map(drop)
    });
}

#[test]
fn dying_in_a_reset_of_the_card() {
    if !user::has_capabilities() {
        return testing::skip("reset", "needs root");
    }
    let mut steps = 0;
    loop {
        let world = World::new(VfKind::Veth);
        let process = world.process();
        attached(&world, &process);
        let survived = process.dying(steps, |process| process.card.reset()).is_some();
        drop(process);
        let process = world.process();
        if !survived && process.card.bring_back().is_err() {
            process.card.reset().expect("it had not begun");
        }
        world.check_clean(&format!("reset after {steps} steps"));
        if survived {
            break;
        }
        steps += 1;
    }
}

#[test]
fn a_torn_record_is_the_one_before_and_the_vf_comes_back() {
    if !user::has_capabilities() {
        return testing::skip("torn record", "needs root");
    }
    let world = World::new(VfKind::Veth);
    attached(&world, &world.process());
    // Every copy but the oldest is lost: the move is on the device, and not on record.
    let slots = ["state.0", "state.1"].map(|name| world.options.card.join(name));
    let generation = |path: &PathBuf| {
        let text = std::fs::read_to_string(path).expect("there");
        text.split(' ')
            .nth(2)
            .and_then(|number| number.parse::<u64>().ok())
            .expect("a generation")
    };
    let newest = slots.iter().max_by_key(|path| generation(path)).expect("two");
    std::fs::write(newest, b"torn").expect("torn");
    let process = world.process();
    let held: Vec<VfLease> = process
        .vf
        .observe()
        .expect("listed")
        .into_iter()
        .filter_map(|vf| vf.lease)
        .collect();
    for lease in held {
        process
            .vf
            .end_lease(process.fence(), &lease, ResetLevel::Config)
            .expect("released");
    }
    world.check_clean("torn record");
}
