//! What hurts people with other SR-IOV software, one test each: `p01` to `p15` are the long-running complaints about the SR-IOV CNI
//! and device plugins, OVN-Kubernetes, Open vSwitch and DPDK that this backend answers. Where the answer is another part's, the
//! test shows what this backend adds to it.

use std::sync::Arc;
use std::time::Duration;

use dpumesh_core::vf::{
    Attachment, Disruption, LeaseOwner, LinkState, Released, ResetLevel, VfConfig, VfLocation, VfRequest,
};
use dpumesh_core::{
    Backend, Effect, ErrorKind, Event, MacAddr, Mtu, PciAddress, PfIndex, PortRef, ResetLevels, VfAttributes,
};
use dpumesh_hw::netlink::EswitchMode;
use tokio::time::timeout;

use super::crash::{World, config};
use crate::card::port;
use crate::fake::{FakeMachine, Model};
use crate::{Card, Isolation, Options, Parts, Protect};

fn vf(index: u16) -> PortRef {
    PortRef::vf(index)
}

/// A second DEL of the old pod does not touch the VF that a new pod got meanwhile.
#[test]
fn p01_a_late_release_leaves_the_next_pods_vf_alone() {
    let world = World::new(Model::igb());
    let process = world.process();
    let old = process.lease().expect("leased");
    process
        .vf()
        .end_lease(process.fence(), &old, ResetLevel::Config)
        .expect("released");
    let new = process
        .vf()
        .make_lease(process.fence(), &VfRequest::new("next").with_config(config(7)))
        .expect("leased");
    process
        .vf()
        .put(process.fence(), &new, &world.place())
        .expect("attached");
    let before = process.state();
    world.machine.take_calls();
    let late = process.vf().end_lease(process.fence(), &old, ResetLevel::Config);
    assert_eq!(late.expect("no error"), Released::NotCurrent);
    assert_eq!(
        world.machine.take_calls(),
        Vec::<String>::new(),
        "nothing was touched"
    );
    assert_eq!(process.state(), before);
}

/// A VF that is in no namespace that anybody knows is shown as such and comes back by a rebind of its driver; one whose driver was
/// changed comes back too.
#[test]
fn p02_an_orphaned_vf_is_shown_and_reclaimed() {
    let world = World::new(Model::igb());
    let process = world.process();
    world.machine.strand(vf(0));
    assert_eq!(process.state().location, VfLocation::Missing);
    let level = process
        .vf()
        .get_back(process.fence(), vf(0), &[], ResetLevel::Config);
    assert_eq!(level.expect("reclaimed"), ResetLevel::Config);
    assert_eq!(process.state().location, VfLocation::Host);
    for driver in [Some("vfio-pci"), None] {
        world.machine.bind_behind(vf(0), driver);
        let expected = VfLocation::Driver(driver.unwrap_or("none").into());
        assert_eq!(process.state().location, expected);
        process
            .vf()
            .get_back(process.fence(), vf(0), &[], ResetLevel::Config)
            .expect("reclaimed");
        assert_eq!(process.state().location, VfLocation::Host);
    }
}

/// An owner that vanished without a DEL is found by who lives, and a MAC is given twice neither by administration nor by use.
#[test]
fn p03_a_dead_owners_vf_comes_back_and_no_mac_is_given_twice() {
    let world = World::new(Model::igb());
    let process = world.process();
    let dead = process.lease().expect("leased");
    process
        .vf()
        .put(process.fence(), &dead, &world.place())
        .expect("attached");
    world.machine.kill_namespace(&world.pod);
    let second = VfRequest::new("second").with_config(config(1));
    let refused = process
        .vf()
        .make_lease(process.fence(), &second)
        .expect_err("the MAC is in use");
    assert_eq!(refused.kind, ErrorKind::Conflict);
    // Not administered, only used: a foreign hand gave it to VF 1.
    let foreign = MacAddr([2, 0xdd, 0, 0, 0, 1]);
    world.machine.tamper(vf(1), |link| link.mac = Some(foreign.0));
    let config = VfConfig {
        mac: Some(foreign),
        ..VfConfig::default()
    };
    let refused = process
        .vf()
        .set_attributes(process.fence(), &dead, &config)
        .expect_err("in use");
    assert_eq!(refused.kind, ErrorKind::Conflict);
    let live = [LeaseOwner("second".into())];
    process
        .vf()
        .get_back(process.fence(), vf(0), &live, ResetLevel::Config)
        .expect("reclaimed");
    process
        .vf()
        .make_lease(process.fence(), &second)
        .expect("the MAC is free again");
}

/// What the application in the pod or a foreign hand changed is restored as well: by what differs, not by what we set.
#[test]
fn p04_everything_is_restored_by_difference_whoever_changed_it() {
    for model in [Model::igb(), Model::mlx5()] {
        let world = World::new(model);
        let process = world.process();
        let request = VfRequest::new("pod"); // asks for nothing, so nothing is ours to restore by memory
        let lease = process
            .vf()
            .make_lease(process.fence(), &request)
            .expect("leased");
        process
            .vf()
            .put(process.fence(), &lease, &world.place())
            .expect("attached");
        world.machine.tamper(lease.port, |link| {
            link.mac = Some([2, 0xbb, 0, 0, 0, 1]);
            link.mtu = 1400;
        });
        world.machine.tamper_admin(lease.port, |vf| {
            vf.mac = [2, 0xbb, 0, 0, 0, 1];
            vf.max_rate = 50;
            vf.trust = Some(true);
        });
        process
            .vf()
            .end_lease(process.fence(), &lease, ResetLevel::Config)
            .expect("released");
        world.check_clean("tampered with");
    }
}

/// A configuration that fails half-way is undone, and what the card cannot do is refused by name before anything is touched.
#[test]
fn p05_configure_is_a_transaction() {
    let world = World::new(Model::igb());
    let process = world.process();
    let lease = process.lease().expect("leased");
    world.machine.take_calls();
    let unable = VfConfig {
        link_state: Some(LinkState::Enable),
        ..config(2)
    };
    let refused = process
        .vf()
        .set_attributes(process.fence(), &lease, &unable)
        .expect_err("igb cannot");
    assert_eq!(refused.kind, ErrorKind::Unsupported);
    assert_eq!(refused.object.as_ref().expect("named").field, "config.link_state");
    assert_eq!(
        world.machine.take_calls(),
        Vec::<String>::new(),
        "nothing was touched"
    );
    let before = (process.state(), world.machine.admin(lease.port));
    let half = VfConfig {
        trust: Some(true),
        ..config(2)
    };
    world.machine.fail_call(1, libc::EINVAL); // the MAC is set, trust fails
    let failed = process
        .vf()
        .set_attributes(process.fence(), &lease, &half)
        .expect_err("fails");
    assert_eq!(failed.effect, Effect::None, "{failed}");
    assert_eq!(failed.object.as_ref().expect("named").field, "config.trust");
    assert_eq!((process.state(), world.machine.admin(lease.port)), before);
}

/// A release can ask for a function-level reset; a card that cannot says so. No text from outside becomes part of a path.
#[test]
fn p06_a_released_function_is_reset_when_asked() {
    let world = World::new(Model::igb());
    let process = world.process();
    let lease = process.lease().expect("leased");
    let name = |world: &World| world.machine.netdev(lease.port).map(|link| link.name);
    let before = name(&world);
    world.machine.take_calls();
    process
        .vf()
        .end_lease(process.fence(), &lease, ResetLevel::Function)
        .expect("released");
    assert_eq!(name(&world), before, "the new device has the old one's name");
    let calls = world.machine.take_calls();
    let at = |what: &str| {
        calls
            .iter()
            .position(|call| call.contains(what))
            .unwrap_or_else(|| panic!("{what}: {calls:#?}"))
    };
    assert!(
        at("driver/unbind") < at("/reset") && at("/reset") < at("igbvf/bind"),
        "{calls:#?}"
    );
    world.check_clean("reset");
    let bare = World::new(Model {
        flr: false,
        ..Model::igb()
    });
    let process = bare.process();
    assert!(
        !process
            .card
            .capabilities()
            .vf
            .resets
            .contains(ResetLevels::FUNCTION)
    );
    let lease = process.lease().expect("leased");
    let refused = process
        .vf()
        .end_lease(process.fence(), &lease, ResetLevel::Function)
        .expect_err("cannot");
    assert_eq!(refused.kind, ErrorKind::Unsupported);
    assert!("0000:01:10.0/../../../etc".parse::<PciAddress>().is_err());
}

/// After a reset of the card its old leases are fenced, and who had which VF where is still known, so that it can be had again.
#[test]
fn p07_a_reset_card_begins_a_new_life_and_its_leases_can_be_had_again() {
    let world = World::new(Model::igb());
    let process = world.process();
    let lease = process.lease().expect("leased");
    process
        .vf()
        .put(process.fence(), &lease, &world.place())
        .expect("attached");
    let old = process.fence();
    world.machine.lose();
    let lost = process.vf().observe().expect_err("it is gone");
    assert_eq!(lost.kind, ErrorKind::DeviceLost);
    world.machine.bring_back();
    let stale = process
        .vf()
        .end_lease(old, &lease, ResetLevel::Config)
        .expect_err("old life");
    assert_eq!(stale.kind, ErrorKind::Stale);
    assert!(process.fence().0 > old.0);
    process
        .vf()
        .set_count(process.fence(), PfIndex(0), 2)
        .expect("made again");
    let former = process.card.former().expect("read").pop().expect("one lease");
    assert_eq!((&former.lease, &former.config), (&lease, &config(1)));
    let mut request = VfRequest::new(former.lease.owner.0).with_config(former.config);
    request.selector.port = Some(former.lease.port);
    let again = process
        .vf()
        .make_lease(process.fence(), &request)
        .expect("leased again");
    let place = former.attachment.expect("it was in a pod");
    process
        .vf()
        .put(process.fence(), &again, &place)
        .expect("attached again");
    assert_eq!(
        process.state().location,
        VfLocation::Netns {
            path: world.pod.clone()
        }
    );
    // A reboot of the machine is a new life too, though devices may have the same numbers again.
    let before = process.fence();
    world.machine.reboot();
    assert!(world.process().fence().0 > before.0);
}

/// A representor is never taken for the PF, and names say nothing: not a name that another device has now, nor one that was changed.
#[test]
fn p08_devices_are_known_by_function_and_port_never_by_name() {
    let world = World::new(Model::mlx5());
    let process = world.process();
    process
        .card
        .set_eswitch_mode(process.fence(), EswitchMode::Switchdev)
        .expect("switched");
    let found = process.card.representors().expect("listed");
    let ports: Vec<String> = found
        .iter()
        .map(|representor| representor.port.to_string())
        .collect();
    assert_eq!(ports, ["uplink0", "uplink1", "c0pf0vf0", "c0pf0vf1"]);
    // The VF's name is another's when it comes home.
    let lease = process.lease().expect("leased");
    let name = world.machine.netdev(lease.port).expect("there").name;
    process
        .vf()
        .put(process.fence(), &lease, &world.place())
        .expect("attached");
    world.machine.add_foreign_device(&name, [2, 0, 0, 0, 0, 0x99]);
    process
        .vf()
        .end_lease(process.fence(), &lease, ResetLevel::Config)
        .expect("released");
    let home = world.machine.netdev(lease.port).expect("there");
    assert_ne!(home.name, name);
    assert_eq!(process.state().location, VfLocation::Host);
    // Renamed by udev meanwhile: it is still the same VF.
    world.machine.tamper(vf(0), |link| link.name = "enp1s0v0".into());
    assert_eq!(process.lease().expect("leased").port, vf(0));
}

/// The number of VFs goes through zero, returns what the card really gave, and is refused or planned as a drain under a lease.
#[test]
fn p09_the_count_goes_through_zero_and_says_what_it_got() {
    let world = World::new(Model {
        firmware_vfs: 3,
        ..Model::igb()
    });
    let process = world.process();
    world.machine.take_calls();
    let count = process
        .vf()
        .set_count(process.fence(), PfIndex(0), 5)
        .expect("set");
    assert_eq!((count.actual, count.needs), (3, Disruption::Reboot));
    let calls = world.machine.take_calls();
    assert!(
        calls[0].contains("\"0\"") && calls[1].contains("\"5\""),
        "{calls:?}"
    );
    process.lease().expect("leased");
    assert_eq!(
        process.vf().plan(PfIndex(0), 4).expect("planned"),
        Disruption::Drain
    );
    let refused = process
        .vf()
        .set_count(process.fence(), PfIndex(0), 4)
        .expect_err("a lease");
    assert_eq!(refused.kind, ErrorKind::Busy);
    // The mode of the eswitch changes VFs too: they go first and are there again afterwards.
    let world = World::new(Model::mlx5());
    let process = world.process();
    assert_eq!(
        process
            .card
            .plan_eswitch_mode(EswitchMode::Switchdev)
            .expect("planned"),
        Disruption::Drain
    );
    let fence = process.fence();
    let epoch = process
        .card
        .set_eswitch_mode(fence, EswitchMode::Switchdev)
        .expect("switched");
    assert!(epoch > fence.0);
    assert_eq!(process.card.capabilities().mode, "switchdev");
    assert_eq!(process.card.isolation(), Isolation::Switchdev);
    assert_eq!(process.vf().observe().expect("listed").len(), 2);
    let lease = process.lease().expect("leased");
    let refused = process
        .card
        .set_eswitch_mode(process.fence(), EswitchMode::Legacy)
        .expect_err("a lease");
    assert_eq!(refused.kind, ErrorKind::Busy, "{lease:?}");
}

/// Inventory is a stream of events: VFs that somebody else made or took, carriers, the card itself.
#[tokio::test]
async fn p10_vfs_carriers_and_the_card_are_watched() {
    let world = World::new(Model::igb());
    let process = world.process();
    let mut events = process.card.events();
    let mut next = async || {
        timeout(Duration::from_secs(10), events.next())
            .await
            .expect("in time")
            .expect("open")
    };
    world.machine.tamper(vf(0), |link| link.carrier = false);
    assert_eq!(
        next().await,
        Event::Link {
            port: vf(0),
            up: false
        }
    );
    let other = world.process();
    other.vf().set_count(other.fence(), PfIndex(0), 1).expect("set");
    // The number goes through zero: VF 0 is another one now.
    for event in [
        Event::VfRemoved(vf(0)),
        Event::VfRemoved(vf(1)),
        Event::VfAdded(vf(0)),
    ] {
        assert_eq!(next().await, event);
    }
    let mut seen = Vec::new();
    world.machine.lose();
    while !matches!(seen.last(), Some(Event::Lost { .. })) {
        seen.push(next().await);
    }
    world.machine.bring_back();
    assert!(matches!(next().await, Event::Back { .. }));
}

/// A resource that is used up is named with its limit and when to try again: VFs, and the VLANs that keep them apart.
#[test]
fn p11_what_is_used_up_is_named() {
    let mut world = World::new(Model::igb());
    let process = world.process();
    for owner in ["a", "b"] {
        process
            .vf()
            .make_lease(process.fence(), &VfRequest::new(owner))
            .expect("leased");
    }
    let full = process
        .vf()
        .make_lease(process.fence(), &VfRequest::new("c"))
        .expect_err("full");
    assert_eq!(
        (full.kind, full.retry),
        (ErrorKind::CapacityExceeded, dpumesh_core::Retry::AfterFree)
    );
    assert_eq!(full.object.as_ref().expect("named").name, "vf");
    world = World::new(Model::igb());
    world.options.vlans = Some((100, 100));
    let process = world.process();
    process
        .vf()
        .make_lease(process.fence(), &VfRequest::new("a"))
        .expect("VLAN 100");
    let full = process
        .vf()
        .make_lease(process.fence(), &VfRequest::new("b"))
        .expect_err("none left");
    assert_eq!(
        (full.kind, &*full.object.as_ref().expect("named").name),
        (ErrorKind::CapacityExceeded, "vlans")
    );
    assert_eq!(
        process
            .vf()
            .observe()
            .expect("listed")
            .iter()
            .filter(|vf| vf.lease.is_some())
            .count(),
        1
    );
}

/// What is accepted is in effect: a driver that acknowledges a MAC and does not use it is found out.
#[test]
fn p12_what_is_acknowledged_is_looked_at() {
    let world = World::new(Model::igb()); // uses an administered MAC only once its device is switched on anew
    let process = world.process();
    let lease = process.lease().expect("leased");
    let state = process.state();
    assert_eq!(
        (Some(state.admin_mac), Some(state.effective_mac)),
        (config(1).mac, config(1).mac)
    );
    let attached = process
        .vf()
        .put(process.fence(), &lease, &world.place())
        .expect("attached");
    assert_eq!(
        (Some(attached.mac), Some(attached.mtu)),
        (config(1).mac, config(1).mtu)
    );
}

/// Abilities are what the driver showed, per mode; what is not there is refused by name; what nothing protects is not leased.
#[test]
fn p13_abilities_are_probed_and_follow_the_mode() {
    let able = |model: Model| World::new(model).process().card.capabilities().vf.attributes;
    let igb = able(Model::igb());
    assert!(
        !igb.intersects(VfAttributes::LINK_STATE | VfAttributes::MIN_RATE),
        "{igb:?}"
    );
    assert!(
        igb.contains(VfAttributes::MAC | VfAttributes::MAX_RATE | VfAttributes::TRUST | VfAttributes::MTU)
    );
    assert!(
        !igb.contains(VfAttributes::VLAN),
        "the card needs the VLANs for itself"
    );
    let world = World::new(Model::mlx5());
    let process = world.process();
    process
        .card
        .set_eswitch_mode(process.fence(), EswitchMode::Switchdev)
        .expect("switched");
    assert!(
        process
            .card
            .capabilities()
            .vf
            .attributes
            .contains(VfAttributes::VLAN),
        "they are the owners' in switchdev"
    );

    let machine = FakeMachine::new(Model::bare()).expect("a machine");
    let mut options = Options::new(machine.device(), "dpu0", machine.directory());
    let open = |options: &Options| {
        Card::open_on(options.clone(), Arc::new(machine.clone()), Parts::default()).expect("opened")
    };
    let card = open(&options);
    let fence = dpumesh_core::BackendExt::fence(&*card);
    card.vfs().set_count(fence, PfIndex(0), 1).expect("made");
    let refused = card
        .vfs()
        .make_lease(fence, &VfRequest::new("pod"))
        .expect_err("nothing protects it");
    assert_eq!(refused.kind, ErrorKind::Denied);
    assert!(
        refused
            .message
            .contains("frames from VF to VF would never be seen"),
        "{refused}"
    );
    drop(card);
    options.protect = Protect::Waived;
    let card = open(&options);
    assert!(!card.isolation().holds());
    card.vfs()
        .make_lease(fence, &VfRequest::new("pod"))
        .expect("waived");
}

/// Each leased VF is alone in its VLAN, from before the lease is given until after it is back; so what counts frames by VLAN counts
/// them by lease.
#[test]
fn p14_a_leased_vf_is_alone_in_its_vlan() {
    let world = World::new(Model::igb());
    let process = world.process();
    assert_eq!(process.card.isolation(), Isolation::VlanPerVf);
    let owners = ["a", "b"].map(|owner| {
        process
            .vf()
            .make_lease(process.fence(), &VfRequest::new(owner))
            .expect("leased")
    });
    let vlans = owners
        .clone()
        .map(|lease| world.machine.admin(lease.port).expect("there").vlan);
    assert_eq!(vlans, [3000, 3001]);
    let trunk = process.card.trunk().expect("listed");
    let told: Vec<_> = trunk
        .iter()
        .map(|port| (port.port, port.vlan.get(), port.name.as_str()))
        .collect();
    assert_eq!(told, [(vf(0), 3000, "ens1f0"), (vf(1), 3001, "ens1f0")]);
    for lease in owners {
        process
            .vf()
            .end_lease(process.fence(), &lease, ResetLevel::Config)
            .expect("released");
    }
    world.check_clean("released");
}

/// A crashed process leaves nothing that keeps the next one from starting: the lock dies with it, and a torn record is the one
/// before.
#[test]
fn p15_a_crash_leaves_a_record_that_the_next_process_takes_up() {
    let world = World::new(Model::igb());
    let process = world.process();
    let lease = process.lease().expect("leased");
    process
        .vf()
        .put(process.fence(), &lease, &world.place())
        .expect("attached");
    drop(process);
    let journal = world.machine.directory();
    for slot in ["state.0", "state.1"] {
        let whole = std::fs::read(journal.join(slot)).expect("there");
        std::fs::write(journal.join(slot), &whole[..whole.len() / 2]).expect("torn");
        let process = world.process();
        let state = process.state();
        assert_eq!(state.lease, Some(lease.clone()), "{slot} is torn");
        assert_eq!(
            state.location,
            VfLocation::Netns {
                path: world.pod.clone()
            }
        );
        drop(process);
        std::fs::write(journal.join(slot), whole).expect("mended");
    }
    let process = world.process();
    process
        .vf()
        .end_lease(process.fence(), &lease, ResetLevel::Config)
        .expect("released");
    world.check_clean("taken up");
}

#[test]
fn a_vf_goes_to_vfio_and_comes_home() {
    let world = World::new(Model::mlx5());
    let process = world.process();
    let lease = process.lease().expect("leased");
    let attached = process
        .vf()
        .put(process.fence(), &lease, &Attachment::Vfio)
        .expect("attached");
    assert_eq!((Some(attached.mac), attached.ifindex), (config(1).mac, None));
    assert_eq!(process.state().location, VfLocation::Driver("vfio-pci".into()));
    process.vf().fetch(process.fence(), &lease).expect("fetched");
    assert_eq!(process.state().location, VfLocation::Host);
    process
        .vf()
        .end_lease(process.fence(), &lease, ResetLevel::Config)
        .expect("released");
    assert_eq!(process.state().mtu, Mtu::ETHERNET);
}

#[test]
fn ports_of_the_second_function_are_its_own() {
    let world = World::new(Model::mlx5());
    let process = world.process();
    process
        .vf()
        .set_count(process.fence(), PfIndex(1), 3)
        .expect("made");
    let mut request = VfRequest::new("pod").with_config(config(3));
    request.selector.pf = Some(PfIndex(1));
    let lease = process
        .vf()
        .make_lease(process.fence(), &request)
        .expect("leased");
    assert_eq!(lease.port, port(1, 0));
    // VLANs of the second function begin behind those of the first.
    assert_eq!(world.machine.admin(lease.port).expect("there").vlan, 3008);
    assert_eq!(
        process.vf().plan(PfIndex(0), 0).expect("planned"),
        Disruption::None
    );
    assert_eq!(
        process.vf().plan(PfIndex(1), 0).expect("planned"),
        Disruption::Drain
    );
}
