//! Ports that come and go, fill up and break; frames of every kind and length; and that each frame is counted once.

use std::path::Path;

use dpumesh_core::VlanId;
use dpumesh_core::steering::{FragmentMatch, VlanMatch};
use proptest::prelude::*;

use super::*;
use crate::wire::Fragment;
use crate::wire::icmpv6::Message;

const TRUNCATED: [PortRef; 3] = [PortRef::vf(0), PortRef::Uplink(0), PortRef::Stack(0)];

fn plain() -> Bench {
    Bench::new(FlowOffloadLimits::default())
}

fn to_other_pod(bench: &mut Bench) -> u32 {
    bench.rule(
        50,
        from(PortRef::vf(0)),
        vec![Action::Count, Action::Forward(PortRef::vf(1))],
    )
}

/// Every frame that came in, or was made here, went out or was dropped with its reason.
fn check_books(stats: &EngineStats) {
    let received: u64 = stats.ports.values().map(|port| port.rx_frames).sum();
    let transmitted: u64 = stats.ports.values().map(|port| port.tx_frames).sum();
    let dropped: u64 = stats.drops.values().sum();
    // An answered request became its answer.
    let made = stats.resets_sent + stats.too_big_sent + stats.fragmented;
    assert_eq!(
        received + made,
        transmitted + dropped + stats.coalesced,
        "{stats:?}"
    );
}

#[test]
fn a_port_without_policy_lets_nothing_in() {
    let mut bench = plain();
    to_other_pod(&mut bench);
    bench.admit(PortRef::vf(0), None);
    bench.send(PortRef::vf(0), segment(POD, A, B, (1, 2), 0));
    assert_eq!(bench.dropped(DropReason::NotAdmitted), 1);
    bench.admit(PortRef::vf(0), Some(vf(POD, &[A], 1)));
    bench.send(PortRef::vf(0), segment(POD, A, B, (1, 2), 0));
    assert_eq!(bench.sent(PortRef::vf(1)).len(), 1);
}

#[test]
fn an_engine_without_handles_goes_on_forwarding() {
    let mut bench = plain();
    to_other_pod(&mut bench);
    let Bench {
        mut engine,
        handle,
        ports,
        ..
    } = bench;
    drop(handle);
    ports[0].put(segment(POD, A, B, (1, 2), 0));
    engine.turn();
    assert_eq!(ports[1].sent().len(), 1);
}

#[test]
fn an_address_that_is_another_pods_is_refused_and_changes_nothing() {
    let mut bench = plain();
    to_other_pod(&mut bench);
    let handle = bench.handle.clone();
    let stolen = Some(vf(POD, &[B], 1));
    assert!(
        !bench
            .wait(async move { handle.set_policy(PortRef::vf(0), stolen).await })
            .expect("engine")
    );
    bench.send(PortRef::vf(0), segment(POD, A, B, (1, 2), 0));
    assert_eq!(bench.sent(PortRef::vf(1)).len(), 1);
}

#[test]
fn a_port_opened_again_replaces_the_first_and_keeps_rules_and_policy() {
    let mut bench = plain();
    let slot = to_other_pod(&mut bench);
    let first = bench.queues(PortRef::vf(0)).clone();
    bench.send(PortRef::vf(0), segment(POD, A, B, (1, 2), 0));
    bench.open(Queues::new(PortRef::vf(0), 1500), vf(POD, &[A], 1));
    first.put(segment(POD, A, B, (1, 2), 0));
    bench.engine.turn();
    bench.send(PortRef::vf(0), segment(POD, A, B, (1, 2), 0));
    assert_eq!(bench.sent(PortRef::vf(1)).len(), 2);
    assert_eq!(bench.counted(slot).0, 2);
    assert_eq!(
        first.incoming.lock().expect("queue").len(),
        1,
        "nobody reads the replaced one"
    );
}

#[test]
fn what_goes_to_a_closed_port_is_dropped_and_counted() {
    let mut bench = plain();
    to_other_pod(&mut bench);
    let handle = bench.handle.clone();
    bench
        .wait(async move { handle.close_port(PortRef::vf(1)).await })
        .expect("engine");
    bench.send(PortRef::vf(0), segment(POD, A, B, (1, 2), 0));
    assert_eq!(bench.dropped(DropReason::EgressClosed), 1);
    check_books(&bench.stats());
}

#[test]
fn a_broken_port_is_closed_and_its_frames_are_counted() {
    let mut bench = plain();
    to_other_pod(&mut bench);
    bench.queues(PortRef::vf(1)).broken.store(true, Ordering::Relaxed);
    let pod = bench.queues(PortRef::vf(0)).clone();
    pod.put(segment(POD, A, B, (1, 2), 0));
    pod.put(segment(POD, A, B, (3, 4), 0));
    bench.engine.turn(); // vf0 is read before vf1 fails
    bench.send(PortRef::vf(0), segment(POD, A, B, (1, 2), 0));
    assert_eq!(bench.dropped(DropReason::EgressClosed), 3);
    check_books(&bench.stats());
}

#[test]
fn a_full_port_takes_what_it_can_and_the_rest_is_counted() {
    let mut bench = plain();
    to_other_pod(&mut bench);
    bench.queues(PortRef::vf(1)).room.store(3, Ordering::Relaxed);
    let pod = bench.queues(PortRef::vf(0)).clone();
    (0..5).for_each(|_| pod.put(segment(POD, A, B, (1, 2), 0)));
    bench.engine.turn();
    assert_eq!(bench.sent(PortRef::vf(1)).len(), 3);
    assert_eq!(bench.dropped(DropReason::EgressFull), 2);
    let stats = bench.stats();
    let sent = stats.ports[&PortRef::vf(1)];
    assert_eq!((sent.tx_frames, sent.tx_octets), (3, 3 * 54));
    check_books(&stats);
}

#[test]
fn without_a_proxy_tcp_is_reset_and_everything_else_is_dropped() {
    let mut bench = plain();
    bench.rule(1, from(PortRef::vf(0)), vec![Action::Punt]);
    let handle = bench.handle.clone();
    bench
        .wait(async move { handle.close_port(PortRef::Stack(0)).await })
        .expect("engine");
    bench.send(PortRef::vf(0), segment(POD, A, REMOTE, (1000, 80), 10));
    let reset = bench.sent(PortRef::vf(0)).pop().expect("told at once");
    let headers = sound(&reset);
    assert_eq!(
        (headers.source().to_string(), headers.src_port),
        (REMOTE.to_owned(), 80)
    );
    assert_eq!(
        (headers.destination().to_string(), headers.dst_port),
        (A.to_owned(), 1000)
    );
    assert!(headers.tcp_flags.contains(crate::wire::TcpFlags::RST));
    assert_eq!((headers.eth_dst, headers.eth_src), (POD, GATEWAY));
    let stats = bench.stats();
    assert_eq!((stats.resets_sent, stats.punted), (1, 0));
    assert_eq!(stats.drops["egress_closed"], 1);
    // A reset is not answered by a reset.
    let mut no_answer = segment(POD, A, REMOTE, (1000, 80), 0);
    no_answer.octets_mut()[14 + 20 + 13] = 4;
    bench.send(PortRef::vf(0), no_answer);
    assert!(bench.sent(PortRef::vf(0)).is_empty());
    let stats = bench.stats();
    assert_eq!((stats.resets_sent, stats.drops["egress_closed"]), (1, 2));
    check_books(&stats);
}

#[test]
fn nd_of_a_pod_is_answered_with_the_gateway() {
    let mut bench = plain();
    bench.admit(PortRef::vf(0), Some(vf(POD, &["fd00::1"], 1)));
    let sample = corpus("headers")
        .into_iter()
        .find(|(name, _)| name == "solicitation")
        .expect("in the corpus")
        .1;
    let asked = Headers::parse(&sample).expect("sound");
    let mut octets = sample.clone();
    octets[6..12].copy_from_slice(&POD.0);
    bench.admit(PortRef::vf(0), Some(vf(POD, &[&asked.source().to_string()], 1)));
    bench.send(PortRef::vf(0), Frame::copy_of(&octets));
    let reply = bench.sent(PortRef::vf(0)).pop().expect("an advertisement");
    let headers = sound(&reply);
    assert_eq!((headers.icmp_type, headers.ttl, headers.eth_dst), (136, 255, POD));
    assert_eq!(headers.destination(), asked.source());
    let packet = crate::wire::Icmpv6Packet::new(&reply.octets()[headers.l4_range()]).expect("sound");
    let Message::NeighborAdvertisement { target, .. } = packet.message() else {
        panic!("no advertisement")
    };
    assert_eq!(IpAddr::V6(target), headers.source());
    let end = headers.l3_end();
    assert_eq!(
        reply.octets()[end - 6..end],
        GATEWAY.0,
        "target link-layer address"
    );
    let stats = bench.stats();
    assert_eq!(stats.neighbours_answered, 1);
    check_books(&stats);
}

/// A UDP packet of a pod in fragments of 16 octets of payload; `offset` in octets.
fn fragment(offset: u16, more: bool) -> Frame {
    let mut octets = [
        &GATEWAY.0[..],
        &POD.0,
        &[8, 0, 0x45, 0, 0, 44, 0, 9, 0, 0, 64, 17, 0, 0],
    ]
    .concat();
    octets[20..22].copy_from_slice(&((offset / 8) | (u16::from(more) << 13)).to_be_bytes());
    octets.extend([10, 0, 0, 1, 10, 0, 0, 2]);
    let sum = checksum::Sum::of(&octets[14..34]).checksum();
    octets[24..26].copy_from_slice(&sum.to_be_bytes());
    // Of the first fragment a UDP header: ports 1000 and 53, the whole packet's length, no checksum.
    octets.extend([3, 232, 0, 53, 0, 40, 0, 0]);
    octets.extend([7; 16]);
    Frame::copy_of(&octets)
}

#[test]
fn a_rule_about_ports_sees_first_fragments_only_and_one_without_sees_all() {
    let mut bench = plain();
    let dns = Pattern {
        ip_proto: Some(IpProtocol::UDP),
        l4_dst: Some(53.into()),
        ..Pattern::default()
    };
    let by_port = bench.rule(1, dns, vec![Action::Count, Action::Forward(PortRef::vf(1))]);
    for _ in 0..2 {
        bench.send(PortRef::vf(0), fragment(0, true));
        bench.send(PortRef::vf(0), fragment(24, false));
    }
    assert_eq!(bench.sent(PortRef::vf(1)).len(), 2);
    assert_eq!(
        (bench.counted(by_port).0, bench.dropped(DropReason::NoRule)),
        (2, 2)
    );
    let all = bench.rule(2, to(B), vec![Action::Count, Action::Forward(PortRef::vf(1))]);
    bench.send(PortRef::vf(0), fragment(24, false));
    let sent = bench.sent(PortRef::vf(1)).pop().expect("forwarded");
    assert!(matches!(sound_header(&sent).fragment, Fragment::Later { .. }));
    assert_eq!(bench.counted(all).0, 1);
    let later = Pattern {
        fragment: Some(FragmentMatch::Later),
        ..Pattern::default()
    };
    bench.rule(0, later, vec![Action::Drop]);
    bench.send(PortRef::vf(0), fragment(24, false));
    bench.send(PortRef::vf(0), fragment(0, true));
    assert_eq!(
        (bench.sent(PortRef::vf(1)).len(), bench.dropped(DropReason::Rule)),
        (1, 1)
    );
    let any = Pattern {
        fragment: Some(FragmentMatch::Any),
        ..Pattern::default()
    };
    bench.rule(0, any, vec![Action::Drop]);
    bench.send(PortRef::vf(0), fragment(0, true));
    assert_eq!(bench.dropped(DropReason::Rule), 2);
}

#[test]
fn ports_of_a_later_fragment_are_not_rewritten() {
    let mut bench = plain();
    let actions = vec![
        Action::Rewrite(RewriteField::L4Dst(5353)),
        Action::Forward(PortRef::vf(1)),
    ];
    bench.rule(1, to(B), actions);
    bench.send(PortRef::vf(0), fragment(0, true));
    bench.send(PortRef::vf(0), fragment(24, false));
    assert_eq!(bench.sent(PortRef::vf(1)).len(), 1);
    assert_eq!(bench.dropped(DropReason::RewriteMismatch), 1);
}

/// For what has no L4 checksum to verify.
fn sound_header(frame: &Frame) -> Headers {
    Headers::parse(frame.octets()).expect("a sound frame")
}

#[test]
fn a_tag_is_pushed_matched_and_popped() {
    let mut bench = plain();
    let id = VlanId::try_from(100).expect("12 bits");
    let tag = vec![Action::PushVlan(id), Action::Forward(PortRef::Uplink(0))];
    bench.rule(1, from(PortRef::vf(0)), tag);
    let original = segment(POD, A, REMOTE, (1, 2), 20);
    bench.send(PortRef::vf(0), original.clone());
    let tagged = bench.sent(PortRef::Uplink(0)).pop().expect("forwarded");
    let headers = sound(&tagged);
    assert_eq!(headers.vlan.and_then(|tag| tag.id()), Some(id));
    assert_eq!(tagged.len(), original.len() + 4);

    let of_tag = Pattern {
        vlan: Some(VlanMatch::Id(id)),
        ..from(PortRef::Uplink(0))
    };
    bench.rule(1, of_tag, vec![Action::PopVlan, Action::Forward(PortRef::vf(1))]);
    let untagged = Pattern {
        vlan: Some(VlanMatch::Untagged),
        ..from(PortRef::Uplink(0))
    };
    bench.rule(1, untagged, vec![Action::Drop]);
    bench.admit(PortRef::vf(0), None); // its address is not local any more
    bench.send(PortRef::Uplink(0), tagged);
    bench.send(PortRef::Uplink(0), original.clone());
    let popped = bench.sent(PortRef::vf(1));
    assert_eq!(popped.len(), 1);
    assert_eq!(popped[0].octets(), original.octets());
    assert_eq!(bench.dropped(DropReason::Rule), 1);
}

#[test]
fn a_vni_is_matched_in_every_group_on_the_way() {
    let mut far = plain();
    far.rule(
        1,
        from(PortRef::Uplink(0)),
        vec![Action::Decapsulate(TunnelKind::Vxlan), Action::Jump(Group(1))],
    );
    far.rule_in(Group(1), 1, Pattern::default(), vec![Action::Jump(Group(2))]);
    far.rule_in(
        Group(2),
        1,
        Pattern::default(),
        vec![Action::Mark(1), Action::Jump(Group(3))],
    );
    let known = |id| Pattern {
        vni: Some(vni(id)),
        ..Pattern::default()
    };
    far.rule_in(Group(3), 1, known(42), vec![Action::Forward(PortRef::vf(1))]);
    far.rule_in(Group(3), 1, known(43), vec![Action::Drop]);
    let mut near = plain();
    near.rule(
        1,
        from(PortRef::vf(0)),
        vec![Action::Encapsulate(tunnel()), Action::Forward(PortRef::Uplink(0))],
    );
    near.admit(PortRef::vf(0), Some(vf(POD, &[REMOTE], 1)));
    near.send(PortRef::vf(0), segment(POD, REMOTE, B, (1, 2), 0));
    let wire = near.sent(PortRef::Uplink(0)).pop().expect("encapsulated");
    let mut foreign = wire.clone();
    foreign.octets_mut()[14 + 20 + 8 + 6] = 43; // the VNI's last octet
    for _ in 0..2 {
        far.send(PortRef::Uplink(0), wire.clone());
        far.send(PortRef::Uplink(0), foreign.clone());
    }
    assert_eq!(far.sent(PortRef::vf(1)).len(), 2);
    assert_eq!(far.dropped(DropReason::Rule), 2);
}

/// A rule may have rewritten the MACs by the time a packet turns out too long; the message goes back all the same.
#[test]
fn who_sends_too_much_is_told_at_its_own_mac() {
    let mut bench = plain();
    bench.rule(
        1,
        from(PortRef::vf(0)),
        vec![
            Action::Rewrite(RewriteField::EthSrc(GATEWAY)),
            Action::Rewrite(RewriteField::EthDst(REMOTE_WIRE)),
            Action::Encapsulate(tunnel()),
            Action::Forward(PortRef::Uplink(0)),
        ],
    );
    let mut long = segment(POD, A, REMOTE, (1, 2), 1500);
    long.gso = None;
    let to = Headers::parse(long.octets()).expect("sound").eth_dst;
    bench.send(PortRef::vf(0), long);
    assert!(bench.sent(PortRef::Uplink(0)).is_empty());
    let told = bench.sent(PortRef::vf(0)).pop().expect("told");
    let headers = sound(&told);
    assert_eq!((headers.eth_dst, headers.eth_src), (POD, to));
    assert_eq!((headers.icmp_type, headers.icmp_code), (3, 4));
    assert_eq!(bench.dropped(DropReason::Mtu), 1);
    check_books(&bench.stats());
}

/// What was encapsulated in an earlier group still has the sender's own packet behind the outer headers.
#[test]
fn who_sends_too_much_is_told_of_its_own_packet_after_a_jump_as_well() {
    let mut bench = plain();
    let encapsulate = vec![Action::Encapsulate(tunnel()), Action::Jump(Group(1))];
    bench.rule(1, from(PortRef::vf(0)), encapsulate);
    bench.rule_in(
        Group(1),
        1,
        Pattern::default(),
        vec![Action::Forward(PortRef::Uplink(0))],
    );
    let mut long = segment(POD, A, REMOTE, (1, 2), 1500);
    long.gso = None;
    bench.send(PortRef::vf(0), long);
    let told = bench.sent(PortRef::vf(0)).pop().expect("told");
    let headers = sound(&told);
    assert_eq!(
        (headers.eth_dst, headers.destination()),
        (POD, A.parse().expect("an address"))
    );
    assert_eq!((headers.icmp_type, headers.icmp_code), (3, 4));
}

/// A relay between tunnels: taken out of one, put into another, too long for the way. Its sender is beyond the first
/// tunnel, where no message of ours gets.
#[test]
fn what_is_relayed_between_tunnels_and_too_long_is_dropped_without_a_word() {
    let mut near = plain();
    near.rule(
        1,
        from(PortRef::vf(0)),
        vec![Action::Encapsulate(tunnel()), Action::Forward(PortRef::Uplink(0))],
    );
    let mut long = segment(POD, A, REMOTE, (1, 2), 1300);
    long.gso = None;
    near.send(PortRef::vf(0), long);
    let wrapped = near.sent(PortRef::Uplink(0)).pop().expect("forwarded");

    let mut relay = plain();
    relay.admit(PortRef::vf(0), None); // its address is not local there
    relay.rule(
        1,
        from(PortRef::Uplink(0)),
        vec![
            Action::Decapsulate(TunnelKind::Vxlan),
            Action::Encapsulate(tunnel()),
            Action::Forward(PortRef::vf(1)),
        ],
    );
    relay.send(PortRef::Uplink(0), wrapped.clone());
    assert_eq!(relay.sent(PortRef::vf(1)).len(), 1, "it fits");
    relay.open(Queues::new(PortRef::vf(1), 1280), vf(OTHER_POD, &[B], 2));
    relay.send(PortRef::Uplink(0), wrapped);
    assert!(relay.sent(PortRef::vf(1)).is_empty() && relay.sent(PortRef::Uplink(0)).is_empty());
    assert_eq!(
        (relay.dropped(DropReason::Mtu), relay.stats().too_big_sent),
        (1, 0)
    );
}

/// The beginning of an IPv4 datagram of that many octets that routers may fragment.
fn datagram(payload: usize) -> Frame {
    let mut frame = segment(POD, A, B, (1, 2), payload);
    frame.gso = None;
    checksum::complete(&mut frame).expect("sound");
    let octets = frame.octets_mut();
    octets[20] = 0; // no DF
    let mut ip = crate::wire::Ipv4Packet::new(&mut octets[14..]).expect("IPv4");
    ip.fill_checksum();
    frame
}

#[test]
fn a_packet_without_df_leaves_in_fragments() {
    let mut bench = plain();
    bench.rule(1, to(B), vec![Action::Forward(PortRef::vf(1))]);
    bench.send(PortRef::vf(0), datagram(3000));
    let fragments = bench.sent(PortRef::vf(1));
    let parts: Vec<_> = fragments
        .iter()
        .map(|frame| {
            let ip = crate::wire::Ipv4Packet::new(&frame.octets()[14..]).expect("sound");
            assert!(ip.verify_checksum());
            ip.total_len() - ip.header_len()
        })
        .collect();
    assert_eq!(parts, [1480, 1480, 60]);
    let stats = bench.stats();
    assert_eq!((stats.fragmented, stats.too_big_sent), (2, 0));
    check_books(&stats);
    assert!(bench.sent(PortRef::vf(0)).is_empty());
}

#[test]
fn a_flood_of_what_must_be_answered_is_answered_in_part() {
    let mut bench = plain();
    bench.rule(1, tcp(), vec![Action::Punt]);
    let handle = bench.handle.clone();
    bench
        .wait(async move { handle.close_port(PortRef::Stack(0)).await })
        .expect("engine");
    for port in 0..1000 {
        bench.send(PortRef::vf(0), segment(POD, A, B, (port, 80), 0));
    }
    let stats = bench.stats();
    assert_eq!(stats.resets_sent + stats.answers_withheld, 1000);
    assert!(
        stats.resets_sent >= 128 && stats.answers_withheld > 0,
        "{stats:?}"
    );
}

#[test]
fn one_tunnel_in_two_groups_is_never_mixed_up() {
    // The same inner flow, told apart only by the outer header: the table of flows must not confuse the groups.
    let mut far = plain();
    let outer = |address: &str| Pattern {
        ip_src: Some(IpMatch::from(address.parse::<IpAddr>().expect("address"))),
        ..from(PortRef::Uplink(0))
    };
    let into = |group| vec![Action::Decapsulate(TunnelKind::Vxlan), Action::Jump(Group(group))];
    far.rule(1, outer("192.0.2.1"), into(1));
    far.rule(1, outer("192.0.2.9"), into(2));
    far.rule_in(
        Group(1),
        1,
        Pattern::default(),
        vec![Action::Forward(PortRef::vf(1))],
    );
    far.rule_in(Group(2), 1, Pattern::default(), vec![Action::Drop]);
    let mut near = plain();
    near.admit(PortRef::vf(0), Some(vf(POD, &[REMOTE], 1)));
    let mut wire = Vec::new();
    for local in ["192.0.2.1", "192.0.2.9"] {
        let outer = Encapsulation {
            local: local.parse().expect("address"),
            ..tunnel()
        };
        let slot = near.rule(
            1,
            from(PortRef::vf(0)),
            vec![Action::Encapsulate(outer), Action::Forward(PortRef::Uplink(0))],
        );
        near.send(PortRef::vf(0), segment(POD, REMOTE, B, (1, 2), 0));
        near.uninstall(slot);
        wire.extend(near.sent(PortRef::Uplink(0)));
    }
    for _ in 0..3 {
        for frame in &wire {
            far.send(PortRef::Uplink(0), frame.clone());
        }
    }
    assert_eq!(far.sent(PortRef::vf(1)).len(), 3);
    assert_eq!(far.dropped(DropReason::Rule), 3);
}

#[test]
fn idle_flows_leave_and_offloaded_ones_leave_the_np_once() {
    let mut config = EngineConfig::new(7);
    config.offload = FlowOffloadLimits {
        flows: 4,
        after_packets: 1,
    };
    config.flow_idle = Duration::from_millis(100);
    let mut bench = Bench::with(&config);
    let slot = to_other_pod(&mut bench);
    let frame = || segment(POD, A, B, (1, 2), 0);
    let pod = bench.queues(PortRef::vf(0)).clone();
    (0..3).for_each(|_| pod.put(frame())); // in one batch: all three miss
    bench.engine.turn();
    assert_eq!(
        bench.stats().flows_offloaded,
        1,
        "one flow, however many frames began it"
    );
    bench.uninstall(slot); // all flows leave the NP; the table still holds the stale one
    assert_eq!(bench.stats().flows_offloaded, 0);
    let started = Instant::now();
    while started.elapsed() < Duration::from_millis(300) {
        bench.engine.turn();
        std::thread::sleep(Duration::from_millis(10));
    }
    to_other_pod(&mut bench);
    bench.send(PortRef::vf(0), frame());
    let stats = bench.stats();
    assert_eq!((stats.flows, stats.flows_offloaded), (1, 1));
}

#[test]
fn an_engine_reads_ports_that_have_no_descriptor() {
    /// A port that hands in one frame and has nothing to poll.
    #[derive(Debug)]
    struct Once(Option<Frame>);

    impl PortIo for Once {
        fn port(&self) -> PortRef {
            PortRef::vf(0)
        }

        fn limits(&self) -> PortIoLimits {
            PortIoLimits::plain(Mtu::ETHERNET)
        }

        fn receive(&mut self, frames: &mut [Frame]) -> Result<usize> {
            Ok(self.0.take().map_or(0, |frame| {
                frames[0] = frame;
                1
            }))
        }

        fn transmit(&mut self, frames: &mut [Frame]) -> Result<usize> {
            Ok(frames.len())
        }

        fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
            None
        }

        fn refused(&self) -> u64 {
            0
        }
    }

    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let worker = Worker::start(&EngineConfig::new(3)).await;
        let before = worker.received(PortRef::vf(0)).await;
        let io = Once(Some(segment(POD, A, B, (1, 2), 0)));
        assert!(worker.handle.open_port(Box::new(io)).await.expect("engine"));
        worker
            .send(PortRef::vf(1), [segment(OTHER_POD, B, A, (1, 2), 0)])
            .await;
        let started = Instant::now();
        while worker.received(PortRef::vf(0)).await == before {
            assert!(started.elapsed() < Duration::from_secs(10));
        }
    });
}

/// The fuzzing corpus of a parser, by name.
fn corpus(target: &str) -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../fuzz/corpus")
        .join(target);
    let files = std::fs::read_dir(folder)
        .expect("the corpus")
        .map(|file| file.expect("a file"));
    let read = |file: std::fs::DirEntry| {
        (
            file.file_name().into_string().expect("a name"),
            std::fs::read(file.path()).expect("readable"),
        )
    };
    files.map(read).collect()
}

/// Rules that carry every action out on whatever comes.
fn every_action(bench: &mut Bench) {
    let vxlan = Pattern {
        ip_proto: Some(IpProtocol::UDP),
        l4_dst: Some(4789.into()),
        ..Pattern::default()
    };
    bench.rule(
        1,
        vxlan,
        vec![Action::Decapsulate(TunnelKind::Vxlan), Action::Jump(Group(1))],
    );
    let rewrite = |field| Action::Rewrite(field);
    let everything = vec![
        rewrite(RewriteField::EthDst(OTHER_POD)),
        Action::DecrementTtl,
        rewrite(RewriteField::Dscp(10)),
        Action::PushVlan(VlanId::try_from(7).expect("12 bits")),
        Action::PopVlan,
        Action::Encapsulate(tunnel()),
        Action::Forward(PortRef::Uplink(0)),
    ];
    bench.rule(
        2,
        Pattern {
            ip_proto: Some(IpProtocol::TCP),
            ..Pattern::default()
        },
        vec![
            rewrite(RewriteField::L4Dst(1)),
            Action::Mark(1),
            Action::Jump(Group(1)),
        ],
    );
    bench.rule(
        3,
        from(PortRef::Stack(0)),
        vec![Action::Encapsulate(tunnel()), Action::Forward(PortRef::vf(1))],
    );
    bench.rule(4, from(PortRef::vf(0)), vec![Action::Punt]);
    bench.rule(
        5,
        Pattern::default(),
        vec![
            Action::Decapsulate(TunnelKind::Vxlan),
            Action::Forward(PortRef::vf(1)),
        ],
    );
    bench.rule_in(Group(1), 1, Pattern::default(), everything);
}

#[test]
fn every_truncation_of_every_sample_is_dropped_or_dealt_with_and_counted_once() {
    let mut bench = plain();
    every_action(&mut bench);
    let mut samples: Vec<Vec<u8>> = corpus("headers").into_iter().map(|(_, octets)| octets).collect();
    let mut whole = plain();
    whole.rule(
        1,
        from(PortRef::Stack(0)),
        vec![Action::Encapsulate(tunnel()), Action::Forward(PortRef::Uplink(0))],
    );
    whole.send(PortRef::Stack(0), segment(STACK, REMOTE, B, (1, 80), 8));
    samples.extend(
        whole
            .sent(PortRef::Uplink(0))
            .iter()
            .map(|frame| frame.octets().to_vec()),
    );
    let mut sent = 0;
    for sample in &mut samples {
        if sample.len() > 2000 {
            continue; // only long by payload
        }
        for port in TRUNCATED {
            if port == PortRef::vf(0) && sample.len() >= 12 {
                sample[6..12].copy_from_slice(&POD.0);
            }
            for length in 0..=sample.len() {
                bench.send(port, Frame::copy_of(&sample[..length]));
                sent += 1;
            }
        }
    }
    let stats = bench.stats();
    assert_eq!(stats.ports.values().map(|port| port.rx_frames).sum::<u64>(), sent);
    assert!(stats.drops["malformed"] > sent / 4, "{stats:?}");
    check_books(&stats);
}

/// A sample with octets changed, or plain noise.
fn any_frame() -> impl Strategy<Value = Vec<u8>> {
    let samples: Vec<Vec<u8>> = corpus("headers").into_iter().map(|(_, octets)| octets).collect();
    let sample = proptest::sample::select(samples);
    let changes = proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3);
    prop_oneof![
        8 => (sample, changes).prop_map(|(mut octets, changes)| {
            for (at, value) in changes {
                if !octets.is_empty() {
                    let at = at.index(octets.len());
                    octets[at] = value;
                }
            }
            octets.truncate(3000);
            octets
        }),
        1 => proptest::collection::vec(any::<u8>(), 0..200),
        4 => (0_usize..2000, any::<u8>(), any::<bool>()).prop_map(|(length, port, home)| {
            let address = if home { A } else { REMOTE };
            segment(POD, address, B, (port.into(), 80), length).octets().to_vec()
        }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_comes_in_goes_out_is_answered_or_is_dropped(
        frames in proptest::collection::vec((0_usize..4, any_frame()), 1..80),
        room in 0_usize..8,
        stack in any::<bool>(),
    ) {
        let mut bench = plain();
        every_action(&mut bench);
        bench.queues(PortRef::vf(1)).room.store(room, Ordering::Relaxed);
        if !stack {
            let handle = bench.handle.clone();
            bench.wait(async move { handle.close_port(PortRef::Stack(0)).await }).expect("engine");
        }
        let ports: Vec<Queues> = bench.ports.clone();
        for (at, (port, octets)) in frames.iter().enumerate() {
            ports[*port].put(Frame::copy_of(octets));
            if at % 7 == 0 {
                bench.engine.turn();
            }
        }
        bench.engine.turn();
        check_books(&bench.stats());
    }
}
