//! A process that dies at every step of every change, and the next one that goes on.
//!
//! "Dies" is an unwinding that runs no undo code, before and after each call that changes the card. Between two such calls a process
//! does nothing but write its record, and that is whole or not there ([`dpumesh_hw::journal`]). Then the card is opened
//! again.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;

use dpumesh_core::vf::{
    Attachment, LeaseOwner, Released, ResetLevel, VfConfig, VfLease, VfLocation, VfRequest, VfState,
};
use dpumesh_core::{Backend, Fence, MacAddr, Mtu, PfIndex, PortRef, Result};
use dpumesh_hw::netlink::{Link, Vf};

use super::SriovVf;
use crate::fake::{Died, FakeMachine, Model};
use crate::{Card, Options, Parts};

/// A machine; the processes that open its card come and go.
pub(super) struct World {
    pub(super) machine: FakeMachine,
    pub(super) options: Options,
    pub(super) pod: PathBuf,
    clean: Vec<(VfState, Option<Vf>, Option<Link>)>,
}

/// One life of the host's process.
pub(super) struct Process {
    pub(super) card: Arc<Card>,
}

impl World {
    /// A card with two VFs at the host.
    pub(super) fn new(model: Model) -> Self {
        let machine = FakeMachine::new(model).expect("a machine");
        let mut options = Options::new(machine.device(), "dpu0", machine.directory());
        options.vlans = Some((3000, 3999));
        let pod = machine.namespace();
        let mut world = Self {
            machine,
            options,
            pod,
            clean: Vec::new(),
        };
        let process = world.process();
        process
            .vf()
            .set_count(process.fence(), PfIndex(0), 2)
            .expect("made");
        world.clean = world.observe();
        world
    }

    pub(super) fn process(&self) -> Process {
        let kernel = Arc::new(self.machine.clone());
        let card = Card::open_on(self.options.clone(), kernel, Parts::default()).expect("opened");
        Process { card }
    }

    pub(super) fn place(&self) -> Attachment {
        Attachment::Netns {
            path: self.pod.clone(),
            ifname: "net1".into(),
        }
    }

    /// All that can be known of the VFs.
    fn observe(&self) -> Vec<(VfState, Option<Vf>, Option<Link>)> {
        let states = self.process().vf().observe().expect("listed");
        states
            .into_iter()
            .map(|state| {
                let port = state.port;
                (state, self.machine.admin(port), self.machine.netdev(port))
            })
            .collect()
    }

    /// Nothing is left of anybody. A device that was made anew has a name of its own.
    pub(super) fn check_clean(&self, what: &str) {
        let mut now = self.observe();
        for ((_, _, now), (_, _, clean)) in now.iter_mut().zip(&self.clean) {
            if let (Some(now), Some(clean)) = (now, clean)
                && now.index != clean.index
            {
                (now.index, now.name) = (clean.index, clean.name.clone());
            }
        }
        assert_eq!(now, self.clean, "{what}");
    }
}

impl Process {
    pub(super) fn vf(&self) -> &SriovVf {
        self.card.vfs()
    }

    pub(super) fn fence(&self) -> Fence {
        Fence(self.card.epoch())
    }

    pub(super) fn lease(&self) -> Result<VfLease> {
        self.vf()
            .make_lease(self.fence(), &VfRequest::new("pod").with_config(config(1)))
    }

    pub(super) fn state(&self) -> VfState {
        self.vf().observe().expect("listed").swap_remove(0)
    }
}

pub(super) fn config(last: u8) -> VfConfig {
    VfConfig {
        mac: Some(MacAddr([2, 0xee, 0, 0, 0, last])),
        mtu: Mtu::try_from(1300 + u16::from(last)).ok(),
        ..VfConfig::default()
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Recovery {
    Repeat,
    Release,
    Reclaim,
}

/// Runs `change` with a death before and after its call 0, 1, 2 … until it survives, each time on a fresh card, and lets the next
/// process repeat it, undo it by a release, or reclaim the VF of the dead owner.
fn at_every_step(name: &str, prepare: fn(&World, &Process), change: fn(&World, &Process) -> Result<()>) {
    let recoveries = [Recovery::Repeat, Recovery::Release, Recovery::Reclaim];
    for model in [Model::igb(), Model::mlx5()] {
        for (recovery, after) in recoveries.into_iter().flat_map(|how| [(how, false), (how, true)]) {
            let mut steps = 0;
            loop {
                let world = World::new(model.clone());
                let process = world.process();
                prepare(&world, &process);
                world.machine.die_at(Some((steps, after)));
                let died = match catch_unwind(AssertUnwindSafe(|| change(&world, &process))) {
                    Ok(done) => done.map(|()| false).expect("works when nobody dies"),
                    Err(death) if death.is::<Died>() => true,
                    Err(panic) => std::panic::resume_unwind(panic),
                };
                world.machine.die_at(None);
                drop(process);
                let when = if after { "after" } else { "before" };
                let what = format!(
                    "{name} on {}, death {when} call {steps}, {recovery:?}",
                    model.driver
                );
                recover(&world, recovery, change, &what);
                if !died {
                    break;
                }
                steps += 1;
            }
            assert!(steps >= 1, "{name} has calls to die at");
        }
    }
}

fn recover(world: &World, how: Recovery, change: fn(&World, &Process) -> Result<()>, what: &str) {
    let process = world.process();
    let fence = process.fence();
    if how == Recovery::Repeat {
        change(world, &process).unwrap_or_else(|error| panic!("repeated {what}: {error}"));
    }
    let states = process.vf().observe().expect(what);
    for lease in states.into_iter().filter_map(|state| state.lease) {
        match how {
            Recovery::Repeat | Recovery::Release => {
                let released = process.vf().end_lease(fence, &lease, ResetLevel::Config);
                let released = released.unwrap_or_else(|error| panic!("{what}: {error}"));
                assert_eq!(released, Released::Freed, "{what}");
            }
            Recovery::Reclaim => {
                let live = [LeaseOwner("another".into())];
                let back = process
                    .vf()
                    .get_back(fence, lease.port, &live, ResetLevel::Function);
                back.unwrap_or_else(|error| panic!("{what}: {error}"));
            }
        }
    }
    process.vf().set_count(fence, PfIndex(0), 2).expect(what);
    world.check_clean(what);
}

fn nothing(_: &World, _: &Process) {}

fn leased(_: &World, process: &Process) {
    process.lease().expect("leased");
}

fn attached(world: &World, process: &Process) {
    let lease = process.lease().expect("leased");
    process
        .vf()
        .put(process.fence(), &lease, &world.place())
        .expect("attached");
}

#[test]
fn dying_in_a_lease() {
    at_every_step("lease", nothing, |_, process| {
        let lease = process.lease()?;
        let state = process.state();
        assert_eq!(state.lease, Some(lease));
        assert_eq!(
            (Some(state.effective_mac), Some(state.mtu)),
            (config(1).mac, config(1).mtu)
        );
        Ok(())
    });
}

#[test]
fn dying_in_configure() {
    at_every_step("configure", leased, |_, process| {
        let lease = process.lease()?;
        process.vf().set_attributes(process.fence(), &lease, &config(2))?;
        let state = process.state();
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
        process.vf().put(process.fence(), &lease, &world.place())?;
        let path = world.pod.clone();
        assert_eq!(process.state().location, VfLocation::Netns { path });
        let link = world.machine.netdev(lease.port).expect("there");
        assert!(link.up && link.name == "net1");
        Ok(())
    });
}

#[test]
fn dying_in_attach_to_vfio() {
    at_every_step("attach to vfio", leased, |_, process| {
        let lease = process.lease()?;
        process.vf().put(process.fence(), &lease, &Attachment::Vfio)?;
        assert_eq!(process.state().location, VfLocation::Driver("vfio-pci".into()));
        Ok(())
    });
}

#[test]
fn dying_in_detach() {
    at_every_step("detach", attached, |_, process| {
        let lease = process.lease()?;
        process.vf().fetch(process.fence(), &lease)?;
        assert_eq!(process.state().location, VfLocation::Host);
        Ok(())
    });
}

#[test]
fn dying_in_release() {
    at_every_step("release", attached, |_, process| {
        release(process, ResetLevel::Config)
    });
    at_every_step("release with reset", attached, |_, process| {
        release(process, ResetLevel::Function)
    });
}

fn release(process: &Process, level: ResetLevel) -> Result<()> {
    let held = process.vf().observe()?.into_iter().find_map(|state| state.lease);
    match held {
        Some(lease) => process.vf().end_lease(process.fence(), &lease, level).map(drop),
        None => Ok(()),
    }
}

#[test]
fn dying_in_reclaim_of_a_dead_pods_vf() {
    at_every_step(
        "reclaim",
        |world, process| {
            attached(world, process);
            world.machine.kill_namespace(&world.pod);
        },
        |_, process| {
            let back = process
                .vf()
                .get_back(process.fence(), PortRef::vf(0), &[], ResetLevel::Function);
            back.map(drop)
        },
    );
}

#[test]
fn dying_in_a_change_of_the_count() {
    at_every_step("count", nothing, |_, process| {
        process.vf().set_count(process.fence(), PfIndex(0), 4)?;
        assert_eq!(process.vf().observe()?.len(), 4);
        process.vf().set_count(process.fence(), PfIndex(0), 2).map(drop)
    });
}

#[test]
fn a_call_that_fails_at_any_step_changes_nothing_or_says_so() {
    type Step = (
        &'static str,
        fn(&World, &Process),
        fn(&World, &Process, &VfLease) -> Result<()>,
    );
    let steps: [Step; 2] = [
        ("configure", nothing, |_, process, lease| {
            process.vf().set_attributes(process.fence(), lease, &config(2))
        }),
        ("attach", nothing, |world, process, lease| {
            process.vf().put(process.fence(), lease, &world.place()).map(drop)
        }),
    ];
    for (name, prepare, change) in steps {
        let mut refused = 0;
        for call in 0..12 {
            let world = World::new(Model::mlx5());
            let process = world.process();
            prepare(&world, &process);
            let lease = process.lease().expect("leased");
            let before = process.state();
            world.machine.fail_call(call, libc::EIO);
            // A failure that another way got around, or behind the last call, is none.
            let Err(failed) = change(&world, &process, &lease) else {
                continue;
            };
            refused += 1;
            assert_eq!(
                failed.effect,
                dpumesh_core::Effect::None,
                "{name}, call {call}: {failed}"
            );
            assert_eq!(process.state(), before, "{name}, call {call}");
            process
                .vf()
                .end_lease(process.fence(), &lease, ResetLevel::Config)
                .expect("released");
            world.check_clean(name);
        }
        assert!(refused >= 2, "{name} has calls to fail at");
    }
}
