use std::time::Duration;

use dpumesh_core::offload::{
    Connection, ConnectionKind, ConnectionLeg, ProgramState, Slot, TableEntry, TableId, TableKind, TableWrite,
};
use dpumesh_core::steering::{
    Action, Batch, Change, Cookie, EtherType, Group, IpProtocol, Masked, MissPolicy, Operation, Owner,
    Pattern, Priority, RewriteField, SteeringRule, Verdict, VlanMatch,
};
use dpumesh_core::vf::{
    Attachment, Disruption, LeaseOwner, LinkState, Released, ResetLevel, VfConfig, VfLease, VfRequest, VfVlan,
};
use dpumesh_core::{
    BackendExt, Effect, ErrorKind, Fence, FlowSteeringExt, Frame, Gso, GsoKind, MacAddr, PfIndex, Result,
    VlanId,
};

use super::*;
use crate::memory::headers::Headers;

const UPLINK: PortRef = PortRef::Uplink(0);
const VF0: PortRef = PortRef::vf(0);
const VF1: PortRef = PortRef::vf(1);
const STACK: PortRef = PortRef::Stack(0);

fn mac(last: u8) -> MacAddr {
    MacAddr([2, 0, 0, 0, 0, last])
}

/// A TCP segment without payload over IPv4, with a right header checksum.
fn tcp(src: MacAddr, to_port: u16) -> Frame {
    let mut octets = Vec::new();
    octets.extend(mac(99).0);
    octets.extend(src.0);
    octets.extend([0x08, 0x00]);
    octets.extend([
        0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0x66, 0xce, 10, 0, 0, 1, 10, 0, 0, 2,
    ]);
    octets.extend(40_000u16.to_be_bytes());
    octets.extend(to_port.to_be_bytes());
    octets.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x02, 0xff, 0xff, 0, 0, 0, 0]);
    Frame::copy_of(&octets)
}

fn header_sum_is_right(frame: &Frame) -> bool {
    let words = frame.octets()[14..34].chunks(2);
    let sum: u32 = words.map(|w| u32::from(u16::from_be_bytes([w[0], w[1]]))).sum();
    (sum & 0xffff) + (sum >> 16) == 0xffff
}

fn to_port(port: u16) -> Pattern {
    Pattern {
        ip_proto: Some(IpProtocol::TCP),
        l4_dst: Some(port.into()),
        ..Pattern::default()
    }
}

fn rule(cookie: u128, priority: u32, pattern: Pattern, actions: Vec<Action>) -> SteeringRule {
    SteeringRule::new(Cookie(cookie), Owner::Agent, Priority(priority), pattern, actions)
}

async fn install(backend: &MemoryBackend, rule: SteeringRule) -> Result<Change> {
    backend.require_steering()?.add(backend.fence(), rule).await
}

async fn lease(backend: &MemoryBackend, owner: &str) -> Result<VfLease> {
    backend
        .require_vf()?
        .lease(backend.fence(), &VfRequest::new(owner))
        .await
}

/// A card whose first two VFs are leased and admitted.
async fn card_with_two_pods() -> (MemoryCard, Arc<MemoryBackend>) {
    let card = MemoryCard::default();
    let backend = card.both();
    for owner in ["pod-a", "pod-b"] {
        let lease = lease(&backend, owner).await.expect("a VF is free");
        backend
            .vf
            .admit(backend.fence(), &lease)
            .await
            .expect("the SoC takes it");
    }
    (card, backend)
}

fn send(card: &MemoryCard, port: PortRef, frame: Frame) -> Fate {
    card.wire(port).expect("there is such a port").send(frame)
}

fn arrival(card: &MemoryCard, port: PortRef) -> Option<Arrival> {
    card.wire(port).expect("there is such a port").receive()
}

#[tokio::test]
async fn rules_of_lower_priority_number_win_and_what_none_matches_is_dropped() {
    let (card, backend) = card_with_two_pods().await;
    assert_eq!(send(&card, VF0, tcp(mac(1), 80)), Fate::Dropped(DropReason::Miss));
    let forward = rule(1, 5, to_port(80), vec![Action::Count, Action::Forward(VF1)]);
    install(&backend, forward).await.expect("room");
    install(&backend, rule(2, 9, Pattern::default(), vec![Action::Drop]))
        .await
        .expect("room");
    assert_eq!(send(&card, VF0, tcp(mac(1), 80)), Fate::Forwarded(VF1));
    assert_eq!(send(&card, VF0, tcp(mac(1), 81)), Fate::Dropped(DropReason::Rule));
    install(&backend, rule(3, 1, to_port(80), vec![Action::Punt]))
        .await
        .expect("room");
    assert_eq!(send(&card, VF0, tcp(mac(1), 80)), Fate::Punted);
    assert_eq!(arrival(&card, VF1).expect("forwarded").frame.len(), 54);
    assert_eq!(
        arrival(&card, STACK).expect("punted").ingress,
        VF0,
        "its identity is its port"
    );
    let counted = backend
        .require_steering()
        .expect("soc")
        .counters(Owner::Agent, &[Cookie(1), Cookie(2)]);
    let counted = counted.await.expect("present");
    assert_eq!(counted[0].map(|c| (c.packets, c.octets)), Some((1, 54)));
    assert_eq!(counted[1], None, "it has no Count");
}

#[tokio::test]
async fn steps_are_carried_out_in_order_and_marks_reach_later_groups() {
    let (card, backend) = card_with_two_pods().await;
    let first = vec![
        Action::Mark(7),
        Action::Rewrite(RewriteField::EthDst(mac(5))),
        Action::Rewrite(RewriteField::EthSrc(mac(6))),
        Action::DecrementTtl,
        Action::PushVlan(VlanId::try_from(42).expect("in range")),
        Action::Jump(Group(2)),
    ];
    install(&backend, rule(1, 0, to_port(80), first))
        .await
        .expect("room");
    let marked = Pattern {
        mark: Some(Masked { value: 7, mask: 0xff }),
        eth_dst: Some(Masked {
            value: mac(5),
            mask: MacAddr::BROADCAST,
        }),
        vlan: Some(VlanMatch::Id(VlanId::try_from(42).expect("in range"))),
        ethertype: Some(EtherType::IPV4),
        ..Pattern::default()
    };
    let second = rule(2, 0, marked, vec![Action::PopVlan, Action::Forward(UPLINK)]).in_group(Group(2));
    install(&backend, second).await.expect("room");
    assert_eq!(send(&card, VF0, tcp(mac(1), 80)), Fate::Forwarded(UPLINK));
    let frame = arrival(&card, UPLINK).expect("forwarded").frame;
    let headers = Headers::parse(frame.octets()).expect("whole");
    assert_eq!(
        (headers.eth_dst, headers.eth_src, headers.vlan),
        (mac(5), mac(6), None)
    );
    assert_eq!(frame.octets()[22], 63);
    assert!(header_sum_is_right(&frame));
    assert_eq!(frame.len(), 54);
    let mut spent = tcp(mac(1), 80);
    spent.octets_mut()[22] = 1;
    assert_eq!(send(&card, VF0, spent), Fate::Dropped(DropReason::Ttl));
}

#[tokio::test]
async fn a_super_frame_counts_as_the_frames_it_stands_for() {
    let (card, backend) = card_with_two_pods().await;
    let count = rule(1, 0, Pattern::default(), vec![Action::Count, Action::Punt]);
    install(&backend, count).await.expect("room");
    let mut octets = tcp(mac(1), 80).octets().to_vec();
    octets.resize(54 + 2500, 0);
    octets[16..18].copy_from_slice(&2540u16.to_be_bytes());
    let mut frame = Frame::copy_of(&octets);
    assert_eq!(
        send(&card, VF0, frame.clone()),
        Fate::Dropped(DropReason::TooLong)
    );
    frame.gso = Some(Gso {
        kind: GsoKind::TcpV4,
        size: 1000,
        header_len: 54,
        ecn: false,
    });
    assert_eq!(send(&card, VF0, frame), Fate::Punted);
    let counters = backend
        .require_steering()
        .expect("soc")
        .counters(Owner::Agent, &[Cookie(1)]);
    let counters = counters.await.expect("present")[0].expect("counts");
    assert_eq!((counters.packets, counters.octets), (3, 2500 + 3 * 54));
}

#[tokio::test]
async fn what_the_card_cannot_do_is_refused_by_name() {
    let card = MemoryCard::default();
    let backend = card.soc();
    let steering = backend.require_steering().expect("soc");
    let to_kernel = rule(1, 0, Pattern::default(), vec![Action::ToKernel]);
    let verdicts = steering
        .validate(std::slice::from_ref(&to_kernel))
        .await
        .expect("present");
    assert!(matches!(&verdicts[..], [Verdict::No { field, .. }] if field == "actions[0]"));
    let error = install(&backend, to_kernel).await.expect_err("refused");
    assert_eq!(
        (error.kind, error.backend.as_ref()),
        (ErrorKind::Unsupported, "memory")
    );
}

#[tokio::test]
async fn a_port_has_one_reader_who_sees_what_no_rule_matched() {
    let (card, backend) = card_with_two_pods().await;
    let ports = backend.require_ports().expect("soc");
    let fence = backend.fence();
    let steering = backend.require_steering().expect("soc");
    steering
        .set_miss_policy(fence, VF0, MissPolicy::Software)
        .await
        .expect("there");
    assert_eq!(
        send(&card, VF0, tcp(mac(1), 80)),
        Fate::Dropped(DropReason::NoReader)
    );
    let mut port = ports.open(fence, VF0).await.expect("admitted");
    assert_eq!(
        ports.open(fence, VF0).await.expect_err("open").kind,
        ErrorKind::Busy
    );
    assert_eq!(
        ports
            .open(fence, PortRef::vf(2))
            .await
            .expect_err("no lease")
            .kind,
        ErrorKind::Denied
    );
    assert_eq!(
        ports.open(fence, PortRef::vf(99)).await.expect_err("none").kind,
        ErrorKind::NotFound
    );
    for to in 1..=3 {
        assert_eq!(send(&card, VF0, tcp(mac(1), to)), Fate::Missed);
    }
    let mut frames = vec![Frame::new(); 2];
    assert_eq!(port.receive(&mut frames).expect("open"), 2);
    assert_eq!(frames[1].octets()[37], 2, "in arrival order");
    assert_eq!(port.receive(&mut frames).expect("open"), 1);
    assert_eq!(port.receive(&mut frames).expect("open"), 0);
    let mut out = [tcp(mac(9), 7), Frame::copy_of(&[0; 2000])];
    assert_eq!(
        port.transmit(&mut out).expect("open"),
        2,
        "a bad frame counts as taken"
    );
    assert_eq!(port.refused(), 1);
    assert_eq!(arrival(&card, VF0).expect("to the pod").frame.len(), 54);
    assert!(arrival(&card, VF0).is_none());
    drop(port);
    assert!(
        ports.open(fence, VF0).await.is_ok(),
        "dropping it closed the port"
    );
}

#[tokio::test]
async fn a_full_port_takes_no_more_frames() {
    let card = MemoryCard::new(MemoryConfig {
        queue: 3,
        ..MemoryConfig::default()
    });
    let backend = card.soc();
    let mut port = backend
        .require_ports()
        .expect("soc")
        .open(backend.fence(), UPLINK)
        .await
        .expect("free");
    let mut frames = vec![tcp(mac(1), 80); 5];
    assert_eq!(port.transmit(&mut frames).expect("open"), 3);
    arrival(&card, UPLINK).expect("there");
    assert_eq!(port.transmit(&mut frames[3..]).expect("open"), 1);
}

#[tokio::test]
async fn a_vf_whose_lease_only_one_side_holds_passes_no_frame() {
    let card = MemoryCard::default();
    let (host, soc) = (card.host(), card.soc());
    install(&soc, rule(1, 0, Pattern::default(), vec![Action::Punt]))
        .await
        .expect("room");
    let held = lease(&host, "pod").await.expect("free");
    assert_eq!(
        send(&card, VF0, tcp(mac(1), 80)),
        Fate::Dropped(DropReason::NoLease)
    );
    let soc_vf = soc.require_vf().expect("soc");
    soc_vf.admit(soc.fence(), &held).await.expect("first");
    soc_vf.admit(soc.fence(), &held).await.expect("again");
    assert_eq!(send(&card, VF0, tcp(mac(1), 80)), Fate::Punted);
    let mut port = soc
        .require_ports()
        .expect("soc")
        .open(soc.fence(), VF0)
        .await
        .expect("admitted");
    let host_vf = host.require_vf().expect("host");
    let freed = host_vf.release(host.fence(), &held, ResetLevel::Config).await;
    assert_eq!(freed, Ok(Released::Freed));
    assert_eq!(
        send(&card, VF0, tcp(mac(1), 80)),
        Fate::Dropped(DropReason::NoLease)
    );
    let next = lease(&host, "next pod").await.expect("free again");
    assert_eq!((next.port, next.id == held.id), (held.port, false));
    assert_eq!(
        soc_vf
            .admit(soc.fence(), &next)
            .await
            .expect_err("not revoked")
            .kind,
        ErrorKind::Conflict
    );
    soc_vf.revoke(soc.fence(), &held).await.expect("held");
    soc_vf.revoke(soc.fence(), &held).await.expect("idempotent");
    let ended = port.receive(&mut [Frame::new()]).expect_err("closed");
    assert_eq!(ended.kind, ErrorKind::DeviceLost);
    soc_vf.admit(soc.fence(), &next).await.expect("revoked");
    let wrong_side = [
        host_vf.admit(host.fence(), &next).await,
        soc_vf.lease(soc.fence(), &VfRequest::new("x")).await.map(drop),
        soc_vf
            .release(soc.fence(), &next, ResetLevel::Config)
            .await
            .map(drop),
    ];
    for refused in wrong_side {
        assert_eq!(
            refused.expect_err("the other side's").kind,
            ErrorKind::Unsupported
        );
    }
    assert!(host.steering().is_none() && host.ports().is_none() && host.offload().is_none());
}

#[tokio::test]
async fn leases_are_fenced_apart_and_leave_a_vf_as_they_found_it() {
    let card = MemoryCard::default();
    let backend = card.both();
    let (vf, fence) = (backend.require_vf().expect("both"), backend.fence());
    let before = vf.list().await.expect("present");
    let mut config = VfConfig {
        mac: Some(mac(7)),
        spoof_check: Some(true),
        mtu: Some(Mtu::try_from(9000).expect("in range")),
        ..VfConfig::default()
    };
    let request = VfRequest::new("pod").with_config(config.clone());
    let held = vf.lease(fence, &request).await.expect("free");
    assert_eq!(held.port, VF0, "the lowest index that fits");
    assert_eq!(
        vf.lease(fence, &request).await.as_ref(),
        Ok(&held),
        "asking again"
    );
    let twin = vf
        .lease(fence, &VfRequest::new("twin").with_config(config.clone()))
        .await;
    assert_eq!(twin.expect_err("MAC in use").kind, ErrorKind::Conflict);
    let other = lease(&backend, "other").await.expect("free");
    let error = vf
        .configure(fence, &other, &config)
        .await
        .expect_err("MAC in use");
    assert_eq!((error.kind, error.effect), (ErrorKind::Conflict, Effect::None));
    config.mac = None;
    config.max_rate = Some(dpumesh_core::vf::RateMbps(10));
    let error = vf.configure(fence, &other, &config).await.expect_err("no rates");
    assert_eq!(
        error.object.as_ref().map(|o| o.field.as_ref()),
        Some("config.max_rate")
    );
    let states = vf.list().await.expect("present");
    assert_eq!(states[1].mtu, Mtu::ETHERNET, "nothing of a refused config is set");
    assert_eq!((states[0].admin_mac, states[0].effective_mac), (mac(7), mac(7)));
    assert_eq!(
        vf.release(fence, &held, ResetLevel::Function).await,
        Ok(Released::Freed)
    );
    assert_eq!(
        vf.release(fence, &held, ResetLevel::Function).await,
        Ok(Released::NotCurrent)
    );
    assert_eq!(
        vf.configure(fence, &held, &VfConfig::default())
            .await
            .expect_err("gone")
            .kind,
        ErrorKind::Stale
    );
    vf.release(fence, &other, ResetLevel::Config).await.expect("held");
    assert_eq!(vf.list().await.expect("present"), before);
}

#[tokio::test]
async fn selectors_and_the_end_of_vfs_are_told_apart() {
    let card = MemoryCard::default();
    let backend = card.both();
    let vf = backend.require_vf().expect("both");
    let mut request = VfRequest::new("pod");
    request.selector.numa_node = Some(3);
    let none_fits = vf.lease(backend.fence(), &request).await.expect_err("none fits");
    assert_eq!(none_fits.kind, ErrorKind::NotFound);
    for owner in ["a", "b", "c", "d"] {
        lease(&backend, owner).await.expect("free");
    }
    let full = lease(&backend, "e").await.expect_err("all leased");
    assert_eq!(
        (full.kind, full.retry),
        (ErrorKind::CapacityExceeded, dpumesh_core::Retry::AfterFree)
    );
    assert_eq!(
        lease(&backend, "").await.expect_err("empty").kind,
        ErrorKind::Invalid
    );
}

#[tokio::test]
async fn a_vf_moves_into_a_namespace_and_back() {
    let card = MemoryCard::default();
    let backend = card.both();
    let (vf, fence) = (backend.require_vf().expect("both"), backend.fence());
    card.add_netns("/ns/a", &["lo", "eth0"]);
    let netns = |ifname: &str| Attachment::Netns {
        path: "/ns/a".into(),
        ifname: ifname.to_owned(),
    };
    let held = lease(&backend, "pod").await.expect("free");
    let kind = |result: Result<_>| result.map(drop).expect_err("refused").kind;
    assert_eq!(
        kind(vf.attach(fence, &held, &netns("eth0")).await),
        ErrorKind::Exists
    );
    assert_eq!(
        kind(vf.attach(fence, &held, &netns("a/b")).await),
        ErrorKind::Invalid
    );
    let nowhere = Attachment::Netns {
        path: "/ns/b".into(),
        ifname: "net1".to_owned(),
    };
    assert_eq!(kind(vf.attach(fence, &held, &nowhere).await), ErrorKind::NotFound);
    let place = vf.attach(fence, &held, &netns("net1")).await.expect("free name");
    assert!(place.ifindex.is_some());
    assert_eq!(vf.attach(fence, &held, &netns("net1")).await, Ok(place));
    assert_eq!(
        kind(vf.attach(fence, &held, &netns("net2")).await),
        ErrorKind::Busy
    );
    let other = lease(&backend, "other").await.expect("free");
    assert_eq!(
        kind(vf.attach(fence, &other, &netns("net1")).await),
        ErrorKind::Exists
    );
    vf.detach(fence, &held).await.expect("attached");
    vf.detach(fence, &held).await.expect("idempotent");
    vf.attach(fence, &other, &netns("net1"))
        .await
        .expect("the name is free again");
    card.remove_netns("/ns/a");
    assert_eq!(vf.list().await.expect("present")[1].location, VfLocation::Host);
    vf.detach(fence, &other)
        .await
        .expect("a namespace that is gone is no error");
}

#[tokio::test]
async fn a_release_that_fails_keeps_the_lease_and_reclaim_gets_the_vf_back() {
    let card = MemoryCard::default();
    let backend = card.both();
    let (vf, fence) = (backend.require_vf().expect("both"), backend.fence());
    card.add_netns("/ns/a", &[]);
    let held = lease(&backend, "pod").await.expect("free");
    let place = Attachment::Netns {
        path: "/ns/a".into(),
        ifname: "net1".to_owned(),
    };
    vf.attach(fence, &held, &place).await.expect("free name");
    assert!(card.jam(VF0, true));
    let error = vf
        .release(fence, &held, ResetLevel::Config)
        .await
        .expect_err("jammed");
    assert_eq!((error.kind, error.effect), (ErrorKind::Io, Effect::Partial));
    let state = vf.list().await.expect("present").remove(0);
    assert_eq!(state.lease, Some(held.clone()), "the lease stays");
    let live = [LeaseOwner("pod".to_owned())];
    let busy = vf
        .reclaim(fence, VF0, &live, ResetLevel::Device)
        .await
        .expect_err("its owner lives");
    assert_eq!(busy.kind, ErrorKind::Busy);
    let low = vf
        .reclaim(fence, VF0, &[], ResetLevel::Config)
        .await
        .expect_err("takes more");
    assert_eq!(low.kind, ErrorKind::Io);
    assert_eq!(
        vf.reclaim(fence, VF0, &[], ResetLevel::Device).await,
        Ok(ResetLevel::Function)
    );
    for (location, level) in [
        (VfLocation::Netns { path: "/ns/x".into() }, ResetLevel::Config),
        (VfLocation::Driver("vfio-pci".to_owned()), ResetLevel::Function),
        (VfLocation::Missing, ResetLevel::Device),
    ] {
        assert!(card.strand(VF1, location));
        assert_eq!(vf.reclaim(fence, VF1, &live, ResetLevel::Device).await, Ok(level));
    }
    assert_eq!(
        vf.release(fence, &held, ResetLevel::Config).await,
        Ok(Released::NotCurrent)
    );
}

#[tokio::test]
async fn spoofed_and_tagged_frames_of_a_vf_are_dropped() {
    let (card, backend) = card_with_two_pods().await;
    install(&backend, rule(1, 0, Pattern::default(), vec![Action::Punt]))
        .await
        .expect("room");
    let (vf, fence) = (backend.require_vf().expect("both"), backend.fence());
    let held = lease(&backend, "pod-a").await.expect("has one");
    let config = VfConfig {
        mac: Some(mac(1)),
        spoof_check: Some(true),
        vlan: Some(VfVlan {
            id: VlanId::try_from(7).ok(),
            qos: 3,
            service_tag: false,
        }),
        ..VfConfig::default()
    };
    vf.configure(fence, &held, &config).await.expect("supported");
    assert_eq!(
        send(&card, VF0, tcp(mac(2), 80)),
        Fate::Dropped(DropReason::Spoofed)
    );
    assert_eq!(send(&card, VF0, tcp(mac(1), 80)), Fate::Punted);
    let tagged = arrival(&card, STACK).expect("punted").frame;
    assert_eq!(tagged.octets()[12..16], [0x81, 0x00, 0x60, 0x07]);
    assert_eq!(send(&card, VF0, tagged.clone()), Fate::Dropped(DropReason::Vlan));
    install(
        &backend,
        rule(
            2,
            0,
            Pattern {
                port: Some(UPLINK),
                ..Pattern::default()
            },
            vec![Action::Punt],
        ),
    )
    .await
    .expect("equal actions");
    let mut port = backend
        .require_ports()
        .expect("soc")
        .open(fence, VF0)
        .await
        .expect("admitted");
    assert_eq!(port.transmit(&mut [tagged, tcp(mac(9), 1)]).expect("open"), 2);
    assert_eq!(
        arrival(&card, VF0).expect("its VLAN").frame.len(),
        54,
        "the tag is off"
    );
    assert!(
        arrival(&card, VF0).is_none(),
        "untagged frames are not of its VLAN"
    );
    let down = VfConfig {
        link_state: Some(LinkState::Disable),
        ..VfConfig::default()
    };
    vf.configure(fence, &held, &down).await.expect("supported");
    assert_eq!(
        send(&card, VF0, tcp(mac(1), 80)),
        Fate::Dropped(DropReason::LinkDown)
    );
}

#[tokio::test]
async fn a_new_life_has_nothing_of_the_old_one() {
    let (card, backend) = card_with_two_pods().await;
    let mut events = backend.events();
    let old = backend.fence();
    let held = lease(&backend, "pod-a").await.expect("has one");
    install(&backend, rule(1, 0, Pattern::default(), vec![Action::Punt]))
        .await
        .expect("room");
    let mut port = backend
        .require_ports()
        .expect("soc")
        .open(old, UPLINK)
        .await
        .expect("free");
    card.lose();
    let steering = backend.require_steering().expect("soc");
    let vf = backend.require_vf().expect("both");
    assert_eq!(
        steering.list(Owner::Agent).await.expect_err("away").kind,
        ErrorKind::DeviceLost
    );
    assert_eq!(
        steering.flush(old, Owner::Agent).await.expect_err("away").kind,
        ErrorKind::DeviceLost
    );
    assert_eq!(vf.list().await.expect_err("away").kind, ErrorKind::DeviceLost);
    assert_eq!(backend.epoch(), old.0, "the last one while it is away");
    assert_eq!(
        port.receive(&mut [Frame::new()]).expect_err("away").kind,
        ErrorKind::DeviceLost
    );
    card.restore();
    assert_eq!(events.next().await, Some(Event::Lost { epoch: old.0 }));
    assert_eq!(
        events.next().await,
        Some(Event::Back {
            epoch: backend.epoch()
        })
    );
    assert!(backend.epoch() > old.0);
    assert!(steering.list(Owner::Agent).await.expect("present").is_empty());
    assert_eq!(
        steering.flush(old, Owner::Agent).await.expect_err("old").kind,
        ErrorKind::Stale
    );
    let late = vf.release(backend.fence(), &held, ResetLevel::Config).await;
    assert_eq!(
        late,
        Ok(Released::NotCurrent),
        "the next pod's VF is safe from it"
    );
    let again = lease(&backend, "pod-a").await.expect("free");
    assert!(again.id > held.id, "numbers are never given twice");
    assert_eq!(
        vf.admit(backend.fence(), &held).await.expect_err("old").kind,
        ErrorKind::Stale
    );
    assert!(
        port.receive(&mut [Frame::new()]).is_err(),
        "an old opening stays closed"
    );
    let mut fewer = capabilities();
    fewer.steering.rules = 1;
    card.reset_with(fewer);
    assert_eq!(backend.capabilities().steering.rules, 1);
}

#[tokio::test(start_paused = true)]
async fn rules_age_while_somebody_waits_for_events() {
    let card = MemoryCard::default();
    let backend = card.soc();
    let mut events = backend.events();
    let waiter = tokio::spawn(async move { events.next().await });
    tokio::task::yield_now().await;
    let mut ageing = rule(1, 0, Pattern::default(), vec![Action::Count, Action::Punt]);
    ageing.idle_timeout_ms = Some(50);
    install(&backend, ageing).await.expect("room");
    tokio::time::sleep(Duration::from_millis(30)).await;
    assert_eq!(send(&card, UPLINK, tcp(mac(1), 80)), Fate::Punted);
    tokio::time::sleep(Duration::from_millis(30)).await;
    assert_eq!(
        send(&card, UPLINK, tcp(mac(1), 80)),
        Fate::Punted,
        "a hit kept it"
    );
    let event = waiter.await.expect("no panic");
    let Some(Event::Aged { owner, rules }) = event else {
        panic!("{event:?}");
    };
    assert_eq!((owner, rules.len()), (Owner::Agent, 1));
    assert_eq!(rules[0].1.map(|c| c.packets), Some(2));
    assert_eq!(
        send(&card, UPLINK, tcp(mac(1), 80)),
        Fate::Dropped(DropReason::Miss)
    );
}

#[tokio::test]
async fn events_end_when_the_card_is_dropped() {
    let card = MemoryCard::default();
    let mut events = card.both().events();
    let waiter = tokio::spawn(async move { events.next().await });
    tokio::task::yield_now().await;
    drop(card);
    assert_eq!(waiter.await.expect("no panic"), None);
}

#[tokio::test]
async fn finite_resources_raise_their_mark() {
    let card = MemoryCard::default();
    let backend = card.both();
    let mut events = backend.events();
    for owner in ["a", "b", "c", "d"] {
        lease(&backend, owner).await.expect("free");
    }
    let event = events.next().await;
    let high = Event::HighWater {
        resource: "vf".to_owned(),
        used: 4,
        limit: 4,
    };
    assert_eq!(event, Some(high));
    let names: Vec<String> = backend
        .require_steering()
        .expect("soc")
        .occupancy()
        .await
        .expect("present")
        .into_iter()
        .map(|occupancy| occupancy.resource)
        .collect();
    assert!(names.contains(&"steering.rules".to_owned()) && names.contains(&"vf".to_owned()));
}

#[tokio::test]
async fn the_number_of_vfs_changes_unless_a_lease_is_in_the_way() {
    let (card, backend) = card_with_two_pods().await;
    let mut events = backend.events();
    let (vf, fence) = (backend.require_vf().expect("both"), backend.fence());
    assert_eq!(vf.plan_vf_count(PfIndex(0), 1).await, Ok(Disruption::Drain));
    assert_eq!(
        vf.set_vf_count(fence, PfIndex(0), 1)
            .await
            .expect_err("leased")
            .kind,
        ErrorKind::Busy
    );
    assert_eq!(
        vf.plan_vf_count(PfIndex(1), 1)
            .await
            .expect_err("no such PF")
            .kind,
        ErrorKind::NotFound
    );
    assert_eq!(
        vf.plan_vf_count(PfIndex(0), 17).await.expect_err("16").kind,
        ErrorKind::CapacityExceeded
    );
    assert_eq!(
        vf.set_vf_count(fence, PfIndex(0), 3).await.expect("free").actual,
        3
    );
    assert_eq!(events.next().await, Some(Event::VfRemoved(PortRef::vf(3))));
    assert!(card.wire(PortRef::vf(3)).is_none());
    vf.set_vf_count(fence, PfIndex(0), 5).await.expect("room");
    assert_eq!(events.next().await, Some(Event::VfAdded(PortRef::vf(3))));
}

fn exact_table(capacity: u64) -> TableSpec {
    TableSpec {
        name: "flows".to_owned(),
        kind: TableKind::Exact,
        key_len: 2,
        value_len: 1,
        capacity,
    }
}

#[tokio::test]
async fn programs_live_beside_each_other_and_roll_back() {
    let card = MemoryCard::default();
    let backend = card.soc();
    let (np, fence) = (backend.require_offload().expect("soc"), backend.fence());
    let (one, two) = (program("one", &[exact_table(2)]), program("two", &[]));
    let kind = |result: Result<()>| result.expect_err("refused").kind;
    assert_eq!(kind(np.activate(fence, Slot(0)).await), ErrorKind::NotFound);
    np.load(fence, Slot(0), &one).await.expect("free");
    np.load(fence, Slot(0), &one).await.expect("the same again");
    assert_eq!(
        kind(np.load(fence, Slot(0), &two).await.map(drop)),
        ErrorKind::Busy
    );
    assert_eq!(
        kind(np.load(fence, Slot(9), &two).await.map(drop)),
        ErrorKind::NotFound
    );
    let mut torn = two.clone();
    torn.image.push(b' ');
    assert_eq!(
        kind(np.load(fence, Slot(1), &torn).await.map(drop)),
        ErrorKind::Invalid
    );
    np.load(fence, Slot(1), &two).await.expect("free");
    np.activate(fence, Slot(0)).await.expect("loaded");
    assert_eq!(kind(np.unload(fence, Slot(0)).await), ErrorKind::Busy);
    let put = |key: u16, value: &[u8]| {
        TableWrite::Put(TableEntry {
            key: key.to_be_bytes().to_vec(),
            mask: None,
            priority: 0,
            value: value.to_vec(),
        })
    };
    let writes = [
        put(5, &[1]),
        put(1, &[2]),
        put(9, &[3]),
        put(5, &[4]),
        put(1, &[]),
    ];
    let results = np.write(fence, TableId(0), &writes).await.expect("runs");
    let kinds: Vec<_> = results.iter().map(|r| r.as_ref().err().map(|e| e.kind)).collect();
    let (full, bad) = (Some(ErrorKind::CapacityExceeded), Some(ErrorKind::Invalid));
    assert_eq!(kinds, [None, None, full, None, bad]);
    np.activate(fence, Slot(1)).await.expect("loaded");
    assert_eq!(kind(np.read(TableId(0)).await.map(drop)), ErrorKind::NotFound);
    let states: Vec<_> = np
        .programs()
        .await
        .expect("present")
        .iter()
        .map(|p| p.state)
        .collect();
    assert_eq!(
        states[..3],
        [ProgramState::Draining, ProgramState::Running, ProgramState::Empty]
    );
    np.activate(fence, Slot(0)).await.expect("rolls back");
    let values: Vec<u8> = np
        .read(TableId(0))
        .await
        .expect("runs")
        .iter()
        .map(|e| e.value[0])
        .collect();
    assert_eq!(values, [2, 4], "in key order");
    np.unload(fence, Slot(1)).await.expect("does not run");
    np.unload(fence, Slot(1)).await.expect("idempotent");
}

#[tokio::test]
async fn connections_come_back_with_their_final_state_once() {
    let mut few = capabilities();
    few.offload.connections = 1;
    let card = MemoryCard::with_capabilities(few);
    let backend = card.soc();
    let (np, fence) = (backend.require_offload().expect("soc"), backend.fence());
    let leg = |port: PortRef, n: u16| ConnectionLeg {
        port,
        local: ([10, 0, 0, 1], n).into(),
        remote: ([10, 0, 0, 2], n).into(),
        send_next: u32::MAX,
        receive_next: 100,
    };
    let connection = |n: u16, kind| Connection {
        downstream: leg(VF0, n),
        upstream: leg(UPLINK, n),
        kind,
    };
    let tls = np
        .offload_connection(fence, &connection(1, ConnectionKind::TlsRecords))
        .await;
    assert_eq!(tls.expect_err("splice only").kind, ErrorKind::Unsupported);
    let splice = connection(1, ConnectionKind::Splice);
    let token = np.offload_connection(fence, &splice).await.expect("room");
    assert_eq!(
        np.offload_connection(fence, &splice)
            .await
            .expect_err("carried")
            .kind,
        ErrorKind::Exists
    );
    let full = np
        .offload_connection(fence, &connection(2, ConnectionKind::Splice))
        .await;
    assert_eq!(full.expect_err("one only").kind, ErrorKind::CapacityExceeded);
    assert!(card.pass(token, 10, 3));
    let state = np.resume(fence, token).await.expect("carried");
    assert_eq!((state.octets_up, state.octets_down), (10, 3));
    assert_eq!(state.connection.upstream.send_next, 9, "sequence numbers wrap");
    assert_eq!(state.connection.downstream.receive_next, 110);
    assert_eq!(
        np.resume(fence, token).await.expect_err("once").kind,
        ErrorKind::NotFound
    );
    assert_eq!(np.stats().await.expect("present").connections_total, 1);
}

#[tokio::test]
async fn capabilities_beyond_the_card_are_taken_off() {
    let mut more = capabilities();
    more.steering.actions |= ActionKinds::MIRROR;
    more.steering.fields.insert(Field::Vni, MatchKinds::EXACT);
    more.vf.attributes |= VfAttributes::MAX_RATE;
    let offered = MemoryCard::with_capabilities(more).both().capabilities();
    assert_eq!(offered.steering, capabilities().steering);
    assert_eq!(offered.vf, capabilities().vf);
    assert_eq!(offered.transport, Default::default(), "no transport, no claim");
}

#[tokio::test]
async fn ports_are_listed_in_order_with_what_is_known() {
    let card = MemoryCard::default();
    let backend = card.soc();
    let ports = backend
        .require_ports()
        .expect("soc")
        .list()
        .await
        .expect("present");
    assert!(ports.windows(2).all(|pair| pair[0].port < pair[1].port));
    assert_eq!(ports.len(), 1 + 1 + 4 + 1);
    let stale = backend
        .require_ports()
        .expect("soc")
        .open(Fence(Epoch(0)), UPLINK)
        .await;
    assert_eq!(stale.expect_err("old").kind, ErrorKind::Stale);
}

#[tokio::test]
async fn a_batch_is_repeated_safely() {
    let card = MemoryCard::default();
    let backend = card.soc();
    let steering = backend.require_steering().expect("soc");
    let batch = Batch::new(vec![
        Operation::Add(rule(1, 0, to_port(1), vec![Action::Drop])),
        Operation::Remove {
            owner: Owner::Agent,
            cookie: Cookie(9),
        },
    ]);
    for expected in [
        Change::Added(dpumesh_core::steering::Placement::Hardware),
        Change::Present(dpumesh_core::steering::Placement::Hardware),
    ] {
        let outcome = steering.apply(backend.fence(), &batch).await.expect("present");
        assert_eq!(outcome.results, [Ok(expected), Ok(Change::Absent)]);
    }
}

#[test]
fn headers_are_read_at_every_length_without_harm() {
    let v4 = tcp(mac(1), 80);
    let mut v6 = vec![2; 12];
    v6.extend([0x81, 0x00, 0x00, 0x2a, 0x86, 0xdd, 0x6b, 0x80, 0, 0, 0, 36, 0, 64]);
    v6.extend([0xfd; 32]);
    v6.extend([44, 0, 0, 0, 0, 0, 0, 0]);
    v6.extend([17, 0, 0, 1, 0, 0, 0, 9]);
    v6.extend([0, 1, 0, 2, 0, 20, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
    for frame in [v4.octets(), &v6] {
        for length in 0..frame.len() {
            let read = Headers::parse(&frame[..length]);
            assert!(
                read.is_none_or(|headers| headers.ip.is_none()),
                "{length} octets hold no packet"
            );
        }
    }
    let ip = Headers::parse(&v6).and_then(|h| h.ip).expect("whole");
    assert_eq!((ip.proto, ip.dscp, ip.ports), (IpProtocol::UDP, 46, Some((1, 2))));
    assert_eq!(ip.piece, headers::Piece::First);
}

proptest::proptest! {
    #[test]
    fn any_octets_are_switched_without_harm(octets in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200)) {
        let card = MemoryCard::default();
        send(&card, UPLINK, Frame::copy_of(&octets));
    }
}
