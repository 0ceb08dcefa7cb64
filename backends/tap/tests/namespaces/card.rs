//! The emulated card through the contract's traits: both sides, leases, namespaces, lives.

use std::future::Future;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use dpumesh_core::vf::{
    Attachment, LeaseOwner, Released, ResetLevel, VfConfig, VfLease, VfLocation, VfRequest, VfState,
};
use dpumesh_core::{
    Backend, BackendExt, ErrorKind, Event, Frame, MacAddr, Mtu, PfIndex, PortRef, Result, Role,
};
use dpumesh_hw::netns::Namespace;
use dpumesh_tap::impair::{Impairments, PartsPerMillion};
use dpumesh_tap::{Mode, TapBackend, TapOptions, VfKind};

use crate::world::{Relay, configure, eventually, join, links, open_descriptors, ping, transfer};

/// A node: host and SoC, each with its side of one card, and the SoC's uplink.
struct Node {
    _dir: tempfile::TempDir,
    host_namespace: Namespace,
    soc_namespace: Namespace,
    _fabric: Namespace,
    options: TapOptions,
    host: TapBackend,
    soc: TapBackend,
}

impl Node {
    fn new(kind: VfKind) -> Self {
        Self::with(kind, Mode::Underlay { ifname: "up0".into() }, |_| ())
    }

    fn with(kind: VfKind, mode: Mode, adjust: impl FnOnce(&mut TapOptions)) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let [host_namespace, soc_namespace, fabric] =
            [(); 3].map(|()| Namespace::create().expect("namespace"));
        let mut options = TapOptions::new(dir.path().join("card"), "dpu0", Role::Host, mode);
        options.vf_kind = kind;
        options.host_namespace = Some(host_namespace.path());
        options.fabric_namespace = Some(fabric.path());
        adjust(&mut options);
        let (host, soc) = Self::open(&options, &soc_namespace);
        Self {
            _dir: dir,
            host_namespace,
            soc_namespace,
            _fabric: fabric,
            options,
            host,
            soc,
        }
    }

    fn open(options: &TapOptions, soc_namespace: &Namespace) -> (TapBackend, TapBackend) {
        let host = TapBackend::open(options.clone(), None, None).expect("host opened");
        let options = TapOptions {
            role: Role::Soc,
            host_namespace: None,
            soc_namespace: Some(soc_namespace.path()),
            ..options.clone()
        };
        (host, TapBackend::open(options, None, None).expect("SoC opened"))
    }

    /// Both processes die and start again.
    fn restart(&mut self) {
        (self.host, self.soc) = Self::open(&self.options, &self.soc_namespace);
    }

    async fn vfs(&self, count: u16) {
        let vf = self.host.require_vf().expect("VFs");
        vf.set_vf_count(self.host.fence(), PfIndex(0), count)
            .await
            .expect("made");
    }

    async fn states(&self) -> Vec<VfState> {
        self.host.require_vf().expect("VFs").list().await.expect("listed")
    }

    /// Leased by the host and admitted by the SoC.
    async fn lease(&self, owner: &str, config: VfConfig) -> Result<VfLease> {
        let request = VfRequest::new(owner).with_config(config);
        let lease = self.host.require_vf()?.lease(self.host.fence(), &request).await?;
        self.soc.require_vf()?.admit(self.soc.fence(), &lease).await?;
        Ok(lease)
    }

    /// A pod with a VF of its own, addressed 10.1.0.`number` and fd00::`number`.
    async fn pod(&self, number: u8, mtu: u16) -> (Namespace, VfLease) {
        let pod = Namespace::create().expect("namespace");
        let lease = self
            .lease(&format!("pod{number}"), config(number, mtu))
            .await
            .expect("leased");
        let place = place(&pod);
        let attached = self
            .host
            .require_vf()
            .expect("VFs")
            .attach(self.host.fence(), &lease, &place)
            .await;
        let attached = attached.expect("attached");
        assert_eq!(
            (Some(attached.mac), Some(attached.mtu)),
            (config(number, mtu).mac, config(number, mtu).mtu)
        );
        configure(
            &pod,
            "net1",
            mtu.into(),
            &[&format!("10.1.0.{number}/24"), &format!("fd00::{number}/64")],
        );
        (pod, lease)
    }

    async fn open_port(&self, port: PortRef) -> Result<Box<dyn dpumesh_core::PortIo>> {
        self.soc.require_ports()?.open(self.soc.fence(), port).await
    }

    async fn end(&self, lease: &VfLease) {
        self.soc
            .require_vf()
            .expect("VFs")
            .revoke(self.soc.fence(), lease)
            .await
            .expect("revoked");
        let released =
            self.host
                .require_vf()
                .expect("VFs")
                .release(self.host.fence(), lease, ResetLevel::Config);
        assert_eq!(released.await.expect("released"), Released::Freed);
    }
}

fn place(pod: &Namespace) -> Attachment {
    Attachment::Netns {
        path: pod.path(),
        ifname: "net1".into(),
    }
}

fn config(last: u8, mtu: u16) -> VfConfig {
    VfConfig {
        mac: Some(MacAddr([2, 0xaa, 0, 0, 0, last])),
        mtu: Some(mtu.try_into().expect("an MTU")),
        ..VfConfig::default()
    }
}

fn address(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime")
        .block_on(work)
}

fn traffic_and_restore(kind: VfKind) {
    block_on(async {
        let node = Node::new(kind);
        node.vfs(3).await;
        let clean = node.states().await;
        let (a, first) = node.pod(1, 1500).await;
        let (b, second) = node.pod(2, 9000).await;
        let relay = Relay::between(
            node.open_port(first.port).await.expect("opened"),
            node.open_port(second.port).await.expect("opened"),
        );
        eventually("ping", || {
            ping(&a, address("10.1.0.2")) && ping(&b, address("fd00::1"))
        });
        let speed = transfer(&a, &b, address("10.1.0.2"), 50_000_000, 128 << 10);
        println!("{kind:?} VFs of a card, MTU 1500 and 9000: {speed:.1} Gb/s");
        drop(relay.stop());
        let location = VfLocation::Netns { path: a.path() };
        assert_eq!(node.states().await[0].location, location);
        for lease in [first, second] {
            node.end(&lease).await;
        }
        assert_eq!(node.states().await, clean, "MAC, MTU and place restored");
        assert_eq!(links(&a), links(&Namespace::create().expect("namespace")));
    });
}

pub(crate) fn tap_vfs_carry_traffic_and_are_restored() {
    traffic_and_restore(VfKind::Tap);
}

pub(crate) fn veth_vfs_carry_traffic_and_are_restored() {
    traffic_and_restore(VfKind::Veth);
}

pub(crate) fn a_duplicate_mac_is_a_conflict() {
    block_on(async {
        let node = Node::new(VfKind::Veth);
        node.vfs(2).await;
        let first = node.lease("first", config(1, 1500)).await.expect("leased");
        assert_eq!(
            node.lease("second", config(1, 1500))
                .await
                .expect_err("taken")
                .kind,
            ErrorKind::Conflict
        );
        let second = node.lease("second", config(2, 1500)).await.expect("leased");
        let vf = node.host.require_vf().expect("VFs");
        let answer = vf.configure(node.host.fence(), &second, &config(1, 1500)).await;
        assert_eq!(answer.expect_err("taken").kind, ErrorKind::Conflict);
        // The address that another VF was born with is taken as well.
        let born = node
            .states()
            .await
            .into_iter()
            .map(|state| state.effective_mac)
            .collect::<Vec<_>>();
        node.end(&first).await;
        let states = node.states().await;
        let own = states[0].effective_mac;
        assert!(!born.contains(&own), "restored");
        let stolen = VfConfig {
            mac: Some(own),
            ..VfConfig::default()
        };
        let answer = vf.configure(node.host.fence(), &second, &stolen).await;
        assert_eq!(answer.expect_err("taken").kind, ErrorKind::Conflict);
    });
}

pub(crate) fn a_port_opens_only_while_both_sides_hold_the_lease() {
    block_on(async {
        let node = Node::new(VfKind::available());
        node.vfs(1).await;
        let vf = (
            node.host.require_vf().expect("VFs"),
            node.soc.require_vf().expect("VFs"),
        );
        let lease =
            vf.0.lease(node.host.fence(), &VfRequest::new("pod"))
                .await
                .expect("leased");
        assert_eq!(
            node.open_port(lease.port).await.expect_err("not admitted").kind,
            ErrorKind::Denied
        );
        vf.1.admit(node.soc.fence(), &lease).await.expect("admitted");
        let mut port = node.open_port(lease.port).await.expect("opened");
        assert_eq!(
            node.open_port(lease.port).await.expect_err("open").kind,
            ErrorKind::Busy
        );
        vf.1.revoke(node.soc.fence(), &lease).await.expect("revoked");
        assert_eq!(
            port.receive(&mut [Frame::new()]).expect_err("revoked").kind,
            ErrorKind::DeviceLost
        );
        drop(port);
        vf.1.admit(node.soc.fence(), &lease).await.expect("admitted");
        vf.0.release(node.host.fence(), &lease, ResetLevel::Function)
            .await
            .expect("released");
        assert_eq!(
            node.open_port(lease.port).await.expect_err("released").kind,
            ErrorKind::Denied
        );
    });
}

fn both_sides_die(kind: VfKind) {
    block_on(async {
        let mut node = Node::new(kind);
        node.vfs(2).await;
        let (a, first) = node.pod(1, 1500).await;
        let (_b, second) = node.pod(2, 1500).await;
        let open = async |node: &Node| {
            let ports = (
                node.open_port(first.port).await,
                node.open_port(second.port).await,
            );
            Relay::between(ports.0.expect("opened"), ports.1.expect("opened"))
        };
        let relay = open(&node).await;
        eventually("ping", || ping(&a, address("10.1.0.2")));
        drop(relay.stop());
        let before = node.states().await;
        node.restart();
        assert_eq!(node.states().await, before);
        let again = node.lease("pod1", config(1, 1500)).await.expect("the same");
        assert_eq!(again, first);
        let _relay = open(&node).await;
        eventually("ping", || ping(&a, address("fd00::2")));
    });
}

fn died_with_its_pod(kind: VfKind) {
    block_on(async {
        let node = Node::new(kind);
        node.vfs(1).await;
        let clean = node.states().await;
        for reclaimed in [false, true] {
            let (pod, lease) = node.pod(1, 1500).await;
            drop(pod);
            let vf = node.host.require_vf().expect("VFs");
            if reclaimed {
                eventually("it is seen", || {
                    // A dying namespace can be entered no more; its path is gone with the last handle.
                    links(&node.host_namespace).iter().all(|name| name != "dpu0vf0")
                });
                let fence = node.host.fence();
                let refused = vf
                    .reclaim(fence, lease.port, &[], ResetLevel::Config)
                    .await
                    .expect_err("gone");
                assert_eq!(refused.kind, ErrorKind::Io);
                let live = [LeaseOwner("pod1".into())];
                let refused = vf
                    .reclaim(fence, lease.port, &live, ResetLevel::Function)
                    .await
                    .expect_err("alive");
                assert_eq!(refused.kind, ErrorKind::Busy);
                let went = vf
                    .reclaim(fence, lease.port, &[], ResetLevel::Function)
                    .await
                    .expect("reclaimed");
                assert_eq!(went, ResetLevel::Function);
                node.soc
                    .require_vf()
                    .expect("VFs")
                    .revoke(node.soc.fence(), &lease)
                    .await
                    .expect("revoked");
            } else {
                vf.detach(node.host.fence(), &lease).await.expect("detached");
                node.end(&lease).await;
            }
            assert_eq!(node.states().await, clean);
        }
    });
}

pub(crate) fn a_renamed_vf_is_found_and_a_namesake_is_not_touched() {
    block_on(async {
        let node = Node::new(VfKind::Veth);
        node.vfs(1).await;
        let (pod, lease) = node.pod(1, 1500).await;
        let mut netlink = dpumesh_hw::netlink::Netlink::open_in(&pod).expect("netlink");
        let link = netlink.link("net1").expect("there").index;
        let change = dpumesh_hw::netlink::LinkChange::new()
            .down()
            .name("mine")
            .mac([2, 0xbb, 0, 0, 0, 1]);
        netlink.change_link(link, &change).expect("renamed");
        join((&pod, "net1"), (&pod, "net2"), 1500);
        node.end(&lease).await;
        let left = links(&pod);
        assert!(
            left.contains(&"net1".to_owned()) && !left.contains(&"mine".to_owned()),
            "{left:?}"
        );
        assert_eq!(node.states().await[0].location, VfLocation::Host);
    });
}

pub(crate) fn attach_refuses_with_nothing_moved() {
    block_on(async {
        let node = Node::new(VfKind::Veth);
        node.vfs(2).await;
        let (pod, first) = node.pod(1, 1500).await;
        let second = node.lease("second", config(2, 1500)).await.expect("leased");
        let before = node.states().await;
        let nowhere = Attachment::Netns {
            path: "/run/netns/nowhere".into(),
            ifname: "net1".into(),
        };
        let file = Attachment::Netns {
            path: "/proc/self/status".into(),
            ifname: "net1".into(),
        };
        let long = Attachment::Netns {
            path: pod.path(),
            ifname: "sixteen-octets-x".into(),
        };
        let other = Namespace::create().expect("namespace");
        let cases = [
            (&second, place(&pod), ErrorKind::Exists),
            (&second, nowhere, ErrorKind::NotFound),
            (&second, file, ErrorKind::NotFound),
            (&second, long, ErrorKind::Invalid),
            (&second, place(&node.host_namespace), ErrorKind::Invalid),
            (&second, Attachment::Vfio, ErrorKind::Unsupported),
            (&first, place(&other), ErrorKind::Busy),
        ];
        let vf = node.host.require_vf().expect("VFs");
        for (lease, place, kind) in cases {
            let refused = vf
                .attach(node.host.fence(), lease, &place)
                .await
                .expect_err("refused");
            assert_eq!(refused.kind, kind, "{refused}");
            assert_eq!(node.states().await, before, "{refused}");
        }
        let again = vf
            .attach(node.host.fence(), &first, &place(&pod))
            .await
            .expect("where it is");
        assert_eq!(Some(again.mac), config(1, 1500).mac);
    });
}

fn lost_card(kind: VfKind) {
    block_on(async {
        let node = Node::new(kind);
        node.vfs(2).await;
        let clean = node.states().await;
        let (mut at_host, mut at_soc) = (node.host.events(), node.soc.events());
        let (pod, lease) = node.pod(1, 1500).await;
        let mut port = node.open_port(lease.port).await.expect("opened");
        let (fence, old) = (node.host.fence(), node.host.epoch());
        node.host.card().lose().expect("lost");
        assert_eq!(at_soc.next().await, Some(Event::Lost { epoch: old }));
        assert_eq!(at_host.next().await, Some(Event::Lost { epoch: old }));
        assert_eq!(
            port.receive(&mut [Frame::new()]).expect_err("lost").kind,
            ErrorKind::DeviceLost
        );
        assert!(
            !links(&pod).contains(&"net1".to_owned()),
            "as by surprise removal"
        );
        let vf = node.host.require_vf().expect("VFs");
        assert_eq!(vf.list().await.expect_err("lost").kind, ErrorKind::DeviceLost);
        assert_eq!(
            vf.detach(fence, &lease).await.expect_err("lost").kind,
            ErrorKind::DeviceLost
        );
        node.host.card().bring_back().expect("back");
        let new = dpumesh_core::Epoch(old.0 + 1);
        assert_eq!(at_soc.next().await, Some(Event::Back { epoch: new }));
        assert_eq!((node.host.epoch(), node.soc.epoch()), (new, new));
        assert_eq!(node.states().await, clean);
        assert_eq!(
            vf.detach(fence, &lease).await.expect_err("old life").kind,
            ErrorKind::Stale
        );
        let late = vf.release(node.host.fence(), &lease, ResetLevel::Config).await;
        assert_eq!(late.expect("idempotent"), Released::NotCurrent);
        drop(port);
        assert_eq!(
            node.open_port(lease.port).await.expect_err("old life").kind,
            ErrorKind::Denied
        );
    });
}

fn hundred_leases(kind: VfKind) {
    block_on(async {
        let node = Node::new(kind);
        node.vfs(2).await;
        let clean = node.states().await;
        let mut before = None;
        for cycle in 0..100 {
            let (pod, lease) = node.pod(1, 1500).await;
            drop(node.open_port(lease.port).await.expect("opened"));
            node.end(&lease).await;
            drop(pod);
            // The first cycle starts the runtime's threads.
            let held = (
                open_descriptors(),
                links(&node.host_namespace),
                links(&node.soc_namespace),
            );
            assert_eq!(*before.get_or_insert_with(|| held.clone()), held, "cycle {cycle}");
        }
        assert_eq!(node.states().await, clean);
        let directory = node.options.card.clone();
        drop(node.soc);
        node.host.card().clone().remove().expect("removed");
        assert!(!directory.exists());
        let empty = links(&Namespace::create().expect("namespace"));
        assert_eq!(links(&node.host_namespace), empty);
    });
}

/// Two nodes in underlay mode, a pod on each, the SoCs joined by a link.
fn underlay(kind: VfKind) {
    block_on(async {
        let impaired = Impairments {
            seed: 7,
            loss: PartsPerMillion(2_000),
            duplicate: PartsPerMillion(2_000),
            reorder: PartsPerMillion(2_000),
            corrupt: PartsPerMillion(2_000),
            delay: Duration::from_micros(200),
            ..Impairments::default()
        };
        for impairments in [None, Some(impaired)] {
            let nodes = [0, 1].map(|_| {
                let mode = Mode::Underlay { ifname: "up0".into() };
                Node::with(kind, mode, |options| {
                    options.uplink_mtu = Mtu::ETHERNET;
                    options.impairments = impairments;
                })
            });
            join(
                (&nodes[0].soc_namespace, "up0"),
                (&nodes[1].soc_namespace, "up0"),
                1500,
            );
            let (mut pods, mut relays) = (Vec::new(), Vec::new());
            for (node, number) in nodes.iter().zip([1, 2]) {
                node.vfs(1).await;
                let (pod, lease) = node.pod(number, 1500).await;
                let uplink = node.open_port(PortRef::Uplink(0)).await.expect("opened");
                relays.push(Relay::between(
                    node.open_port(lease.port).await.expect("opened"),
                    uplink,
                ));
                pods.push(pod);
            }
            eventually("ping", || ping(&pods[0], address("10.1.0.2")));
            let total = if impairments.is_some() {
                3_000_000
            } else {
                50_000_000
            };
            let speed = transfer(&pods[0], &pods[1], address("fd00::2"), total, 64 << 10);
            println!(
                "underlay, {}: {speed:.2} Gb/s",
                if impairments.is_some() {
                    "impaired"
                } else {
                    "clean"
                }
            );
        }
    });
}

pub(crate) fn an_uplink_that_is_not_there_is_told() {
    block_on(async {
        let missing = Node::with(
            VfKind::Veth,
            Mode::Overlay {
                vtep: address("192.0.2.1"),
            },
            |_| (),
        );
        let refused = missing
            .open_port(PortRef::Uplink(0))
            .await
            .expect_err("no such address");
        assert_eq!(refused.kind, ErrorKind::NotFound);
        let far = Namespace::create().expect("namespace");
        join((&missing.soc_namespace, "up0"), (&far, "up0"), 1400);
        configure(&missing.soc_namespace, "up0", 1400, &["192.0.2.1/24"]);
        let refused = missing
            .open_port(PortRef::Uplink(0))
            .await
            .expect_err("1400 octets");
        assert_eq!(refused.kind, ErrorKind::Invalid);
        configure(&missing.soc_namespace, "up0", 1500, &[]);
        let ports = missing
            .soc
            .require_ports()
            .expect("ports")
            .list()
            .await
            .expect("listed");
        assert_eq!(ports[0].port, PortRef::Uplink(0));
        assert_eq!(ports[0].netdev.as_deref(), Some("up0"));
        drop(missing.open_port(PortRef::Uplink(0)).await.expect("opened"));
        for port in [PortRef::Uplink(1), PortRef::vf(7), PortRef::Stack(0)] {
            assert_eq!(
                missing.open_port(port).await.expect_err("none").kind,
                ErrorKind::NotFound
            );
        }
    });
}

/// Two sides with different ideas of the card.
pub(crate) fn another_card_in_the_directory_is_refused() {
    let node = Node::new(VfKind::Veth);
    let mut other = node.options.clone();
    other.dpu.0 = "dpu1".into();
    assert_eq!(
        TapBackend::open(other, None, None).expect_err("another").kind,
        ErrorKind::Conflict
    );
    let mut other = node.options.clone();
    other.vf_kind = VfKind::Tap;
    assert_eq!(
        TapBackend::open(other, None, None).expect_err("another").kind,
        ErrorKind::Conflict
    );
    let backend: Arc<dyn Backend> =
        Arc::new(TapBackend::open(node.options.clone(), None, None).expect("the same"));
    assert!(backend.ports().is_none() && backend.offload().is_none() && backend.steering().is_none());
    assert_eq!(backend.info().role, Role::Host);
}

pub(crate) fn both_sides_die_and_the_pod_of_a_tap_goes_on() {
    both_sides_die(VfKind::Tap);
}

pub(crate) fn both_sides_die_and_the_pod_of_a_veth_goes_on() {
    both_sides_die(VfKind::Veth);
}

pub(crate) fn a_tap_that_died_with_its_pod_is_made_anew() {
    died_with_its_pod(VfKind::Tap);
}

pub(crate) fn a_veth_that_died_with_its_pod_is_made_anew() {
    died_with_its_pod(VfKind::Veth);
}

pub(crate) fn a_lost_card_of_taps_returns_without_leases() {
    lost_card(VfKind::Tap);
}

pub(crate) fn a_lost_card_of_veths_returns_without_leases() {
    lost_card(VfKind::Veth);
}

pub(crate) fn a_hundred_leases_of_taps_leave_nothing() {
    hundred_leases(VfKind::Tap);
}

pub(crate) fn a_hundred_leases_of_veths_leave_nothing() {
    hundred_leases(VfKind::Veth);
}

pub(crate) fn pods_with_taps_meet_over_the_underlay() {
    underlay(VfKind::Tap);
}

pub(crate) fn pods_with_veths_meet_over_the_underlay() {
    underlay(VfKind::Veth);
}
