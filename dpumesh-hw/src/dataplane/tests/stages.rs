//! One stage at a time: a frame is put in, a turn is taken, and what comes out is looked at.

use super::*;

#[test]
fn tcp_of_a_pod_is_punted_with_its_port_as_identity() {
    let mut bench = Bench::new(FlowOffloadLimits::default());
    let slot = bench.rule(
        10,
        Pattern {
            port: Some(PortRef::vf(0)),
            ..tcp()
        },
        vec![Action::Count, Action::Punt],
    );
    for _ in 0..2 {
        bench.send(PortRef::vf(0), segment(POD, A, REMOTE, (1000, 80), 10));
    }
    let sent = bench.sent(PortRef::Stack(0));
    assert_eq!(sent.len(), 2);
    for frame in &sent {
        let headers = sound(frame);
        assert_eq!(headers.eth_dst, STACK);
        assert_eq!(IngressPort::from_mac(headers.eth_src.0), IngressPort::new(1));
    }
    assert_eq!(bench.counted(slot), (2, 2 * 64));
    let stats = bench.stats();
    assert_eq!((stats.flow_misses, stats.flow_hits, stats.punted), (1, 1, 2));
}

#[test]
fn what_no_rule_matches_is_dropped_and_counted() {
    let mut bench = Bench::new(FlowOffloadLimits::default());
    bench.send(PortRef::vf(0), segment(POD, A, B, (1, 2), 0));
    assert_eq!(bench.dropped(DropReason::NoRule), 1);
    assert!(bench.sent(PortRef::vf(1)).is_empty());
}

#[test]
fn a_spoofed_source_is_dropped_whatever_the_rules_say() {
    let mut bench = Bench::new(FlowOffloadLimits::default());
    bench.rule(0, Pattern::default(), vec![Action::Forward(PortRef::vf(1))]);
    bench.send(PortRef::vf(0), segment(OTHER_POD, A, B, (1, 2), 0));
    bench.send(PortRef::vf(0), segment(POD, B, A, (1, 2), 0));
    bench.send(PortRef::Uplink(0), segment(REMOTE_WIRE, A, B, (1, 2), 0));
    assert!(bench.sent(PortRef::vf(1)).is_empty());
    assert_eq!(bench.dropped(DropReason::SpoofedMac), 1);
    assert_eq!(bench.dropped(DropReason::SpoofedIp), 1);
    assert_eq!(bench.dropped(DropReason::SpoofedUplink), 1);
    bench.send(PortRef::Uplink(0), segment(REMOTE_WIRE, REMOTE, B, (1, 2), 0));
    assert_eq!(bench.sent(PortRef::vf(1)).len(), 1);
}

#[test]
fn the_lower_priority_number_wins_and_a_new_rule_acts_at_once() {
    let mut bench = Bench::new(FlowOffloadLimits::default());
    bench.rule(20, from(PortRef::vf(0)), vec![Action::Forward(PortRef::vf(1))]);
    bench.send(PortRef::vf(0), segment(POD, A, B, (1, 2), 0));
    bench.send(PortRef::vf(0), segment(POD, A, B, (1, 2), 0));
    assert_eq!(bench.sent(PortRef::vf(1)).len(), 2);
    let drop = bench.rule(10, to(B), vec![Action::Drop]);
    bench.send(PortRef::vf(0), segment(POD, A, B, (1, 2), 0));
    assert!(
        bench.sent(PortRef::vf(1)).is_empty(),
        "the flow's remembered answer is forgotten"
    );
    assert_eq!(bench.dropped(DropReason::Rule), 1);
    bench.uninstall(drop);
    bench.send(PortRef::vf(0), segment(POD, A, B, (1, 2), 0));
    assert_eq!(bench.sent(PortRef::vf(1)).len(), 1);
}

#[test]
fn nat_keeps_every_checksum_true_open_or_not() {
    for (a, b, new) in [(A, B, "10.9.8.7"), ("fd00::1", "fd00::2", "fd00:1:2:3:4:5:6:7")] {
        let mut bench = Bench::new(FlowOffloadLimits::default());
        bench.admit(PortRef::vf(0), Some(vf(POD, &[a], 1)));
        let actions = vec![
            Action::Rewrite(RewriteField::IpDst(new.parse().expect("address"))),
            Action::Rewrite(RewriteField::L4Dst(8080)),
            Action::Rewrite(RewriteField::Dscp(46)),
            Action::DecrementTtl,
            Action::Rewrite(RewriteField::EthDst(OTHER_POD)),
            Action::Forward(PortRef::vf(1)),
        ];
        bench.rule(1, from(PortRef::vf(0)), actions);
        let whole = segment(POD, a, b, (1000, 80), 33);
        let mut open = whole.clone();
        let headers = Headers::parse(open.octets()).expect("sound");
        let l4 = headers.l4_offset;
        let len = headers.l4_range().len() as u32;
        let pseudo = checksum::Sum::pseudo(headers.source(), headers.destination(), 6, len).fold();
        let at = usize::from(l4) + 16;
        open.octets_mut()[at..at + 2].copy_from_slice(&pseudo.to_be_bytes());
        open.checksum = Checksum::Partial {
            start: l4,
            offset: 16,
        };
        bench.send(PortRef::vf(0), whole);
        bench.send(PortRef::vf(0), open);
        let mut sent = bench.sent(PortRef::vf(1));
        assert_eq!(sent.len(), 2);
        checksum::complete(&mut sent[1]).expect("an open checksum");
        assert_eq!(sent[0].octets(), sent[1].octets());
        let headers = sound(&sent[0]);
        assert_eq!(headers.destination().to_string(), new);
        assert_eq!((headers.dst_port, headers.dscp, headers.ttl), (8080, 46, 63));
        assert_eq!(headers.eth_dst, OTHER_POD);
    }
}

#[test]
fn a_tunnel_takes_a_packet_to_the_other_node_and_only_known_vnis_come_in() {
    let mut bench = Bench::new(FlowOffloadLimits::default());
    bench.rule(
        1,
        from(PortRef::Stack(0)),
        vec![Action::Encapsulate(tunnel()), Action::Forward(PortRef::Uplink(0))],
    );
    bench.send(PortRef::Stack(0), segment(STACK, A, REMOTE, (1000, 80), 100));
    let wire = bench.sent(PortRef::Uplink(0)).pop().expect("encapsulated");
    let outer = Headers::parse(wire.octets()).expect("sound");
    assert_eq!((outer.protocol, outer.dst_port), (17, 4789));
    assert_eq!(wire.len(), 50 + 154);

    let mut far = Bench::new(FlowOffloadLimits::default());
    far.admit(PortRef::vf(0), Some(vf(POD, &[REMOTE], 9)));
    let outer = Pattern {
        ip_proto: Some(IpProtocol::UDP),
        l4_dst: Some(4789.into()),
        ..from(PortRef::Uplink(0))
    };
    far.rule(
        1,
        outer,
        vec![Action::Decapsulate(TunnelKind::Vxlan), Action::Jump(Group(1))],
    );
    let inner = Pattern {
        vni: Some(vni(42)),
        ip_proto: Some(IpProtocol::TCP),
        ..to(REMOTE)
    };
    let slot = far.rule_in(Group(1), 1, inner, vec![Action::Count, Action::Punt]);
    for _ in 0..2 {
        far.send(PortRef::Uplink(0), wire.clone());
    }
    let punted = far.sent(PortRef::Stack(0));
    assert_eq!(punted.len(), 2);
    assert_eq!(sound(&punted[0]).destination().to_string(), REMOTE);
    assert_eq!(far.counted(slot).0, 2);
    assert_eq!(
        far.stats().flow_hits,
        2,
        "outer and inner flow of the second packet"
    );

    let mut foreign = wire.clone();
    foreign.octets_mut()[14 + 20 + 8 + 6] = 43; // the VNI's last octet
    far.send(PortRef::Uplink(0), foreign);
    assert!(far.sent(PortRef::Stack(0)).is_empty());
    assert_eq!(far.dropped(DropReason::NoRule), 1);

    // Inside a tunnel, too, nobody may claim a local pod's address.
    let mut bench = Bench::new(FlowOffloadLimits::default());
    bench.rule(
        1,
        from(PortRef::Uplink(0)),
        vec![Action::Decapsulate(TunnelKind::Vxlan), Action::Jump(Group(1))],
    );
    bench.rule_in(Group(1), 1, Pattern::default(), vec![Action::Punt]);
    bench.send(PortRef::Uplink(0), wire);
    assert_eq!(bench.dropped(DropReason::SpoofedUplink), 1);
}

#[test]
fn what_is_too_long_is_dropped_and_its_sender_is_told_the_mtu() {
    let mut bench = Bench::new(FlowOffloadLimits::default());
    bench.rule(
        1,
        from(PortRef::vf(0)),
        vec![Action::Encapsulate(tunnel()), Action::Forward(PortRef::Uplink(0))],
    );
    bench.send(PortRef::vf(0), segment(POD, A, REMOTE, (1000, 80), 1450 - 40));
    assert_eq!(bench.sent(PortRef::Uplink(0)).len(), 1);
    bench.send(PortRef::vf(0), segment(POD, A, REMOTE, (1000, 80), 1451 - 40));
    assert!(bench.sent(PortRef::Uplink(0)).is_empty());
    assert_eq!(bench.dropped(DropReason::Mtu), 1);
    let reply = bench.sent(PortRef::vf(0)).pop().expect("an ICMP error");
    let headers = Headers::parse(reply.octets()).expect("sound");
    assert_eq!(
        (headers.l3, headers.icmp_type, headers.icmp_code),
        (L3::Ipv4, 3, 4)
    );
    assert_eq!(headers.destination().to_string(), A);
    assert_eq!(headers.eth_dst, POD);
    let mtu = usize::from(headers.l4_offset) + 6;
    assert_eq!(reply.octets()[mtu..mtu + 2], 1450_u16.to_be_bytes());
    // A super-frame is judged by the frames it stands for.
    let mut super_frame = segment(POD, A, REMOTE, (1000, 80), 20_000);
    super_frame.gso = Some(Gso {
        kind: GsoKind::TcpV4,
        size: 1410,
        header_len: 54,
        ecn: false,
    });
    bench.send(PortRef::vf(0), super_frame);
    assert_eq!(bench.sent(PortRef::Uplink(0)).len(), 1);
}

#[test]
fn arp_and_nd_of_a_pod_are_answered_with_the_gateway() {
    let mut bench = Bench::new(FlowOffloadLimits::default());
    let mut request = Vec::new();
    request.extend([0xff; 6]);
    request.extend(POD.0);
    request.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    request.extend(POD.0);
    request.extend([10, 0, 0, 1]);
    request.extend([0; 6]);
    request.extend([10, 0, 0, 77]);
    bench.send(PortRef::vf(0), Frame::copy_of(&request));
    let reply = bench.sent(PortRef::vf(0)).pop().expect("an answer");
    assert_eq!(reply.octets()[..6], POD.0);
    assert_eq!(reply.octets()[22..28], GATEWAY.0);
    assert_eq!(bench.stats().neighbours_answered, 1);
    // Asking in another pod's name, and probing the own address, get none.
    request[31] = 2;
    bench.send(PortRef::vf(0), Frame::copy_of(&request));
    request[31] = 1;
    request[41] = 1;
    bench.send(PortRef::vf(0), Frame::copy_of(&request));
    assert!(bench.sent(PortRef::vf(0)).is_empty());
}

#[test]
fn a_mark_steers_the_next_group_and_is_never_mistaken_for_the_flow() {
    let mut bench = Bench::new(FlowOffloadLimits::default());
    bench.rule(
        1,
        from(PortRef::vf(0)),
        vec![Action::Mark(7), Action::Jump(Group(2))],
    );
    let marked = Pattern {
        mark: Some(Masked {
            value: 7,
            mask: u32::MAX,
        }),
        ..Pattern::default()
    };
    bench.rule_in(Group(2), 1, marked, vec![Action::Forward(PortRef::vf(1))]);
    bench.rule_in(Group(2), 2, Pattern::default(), vec![Action::Drop]);
    for _ in 0..3 {
        bench.send(PortRef::vf(0), segment(POD, A, B, (1, 2), 0));
    }
    assert_eq!(bench.sent(PortRef::vf(1)).len(), 3);
}

#[test]
fn the_next_group_sees_what_the_steps_before_the_last_one_wrote() {
    let mut bench = Bench::new(FlowOffloadLimits::default());
    let write = |field| Action::Rewrite(field);
    let last = [write(RewriteField::EthDst(OTHER_POD)), Action::Mark(1)];
    for (at, last) in last.into_iter().enumerate() {
        let steps = vec![
            write(RewriteField::L4Dst(8080)),
            write(RewriteField::EthDst(OTHER_POD)),
            last,
        ];
        let slot = bench.rule(1, tcp(), [steps, vec![Action::Jump(Group(1))]].concat());
        let rewritten = Pattern {
            l4_dst: Some(8080.into()),
            eth_dst: Some(Masked {
                value: OTHER_POD,
                mask: MacAddr::BROADCAST,
            }),
            ..tcp()
        };
        let next = bench.rule_in(Group(1), 1, rewritten, vec![Action::Forward(PortRef::vf(1))]);
        bench.send(PortRef::vf(0), segment(POD, A, B, (1, 80), 0));
        assert_eq!(bench.sent(PortRef::vf(1)).len(), 1, "case {at}");
        bench.uninstall(slot);
        bench.uninstall(next);
    }
}

#[test]
fn rules_about_tcp_flags_are_asked_for_every_packet() {
    let mut bench = Bench::new(FlowOffloadLimits::default());
    let syn = TcpFlags::SYN;
    bench.rule(
        1,
        Pattern {
            tcp_flags: Some(Masked {
                value: syn,
                mask: syn,
            }),
            ..tcp()
        },
        vec![Action::Drop],
    );
    bench.rule(2, tcp(), vec![Action::Forward(PortRef::vf(1))]);
    bench.send(PortRef::vf(0), segment(POD, A, B, (1, 2), 0));
    let mut with_syn = segment(POD, A, B, (1, 2), 0);
    with_syn.octets_mut()[14 + 20 + 13] = 2;
    bench.send(PortRef::vf(0), with_syn);
    assert_eq!(bench.sent(PortRef::vf(1)).len(), 1);
    assert_eq!(bench.dropped(DropReason::Rule), 1);
}

#[test]
fn a_full_np_leaves_flows_in_software() {
    let mut bench = Bench::new(FlowOffloadLimits {
        flows: 1,
        after_packets: 2,
    });
    bench.rule(1, from(PortRef::vf(0)), vec![Action::Forward(PortRef::vf(1))]);
    for port in [1, 2] {
        for _ in 0..4 {
            bench.send(PortRef::vf(0), segment(POD, A, B, (port, 2), 0));
        }
    }
    assert_eq!(bench.sent(PortRef::vf(1)).len(), 8);
    let stats = bench.stats();
    assert_eq!((stats.flows_offloaded, stats.offloads_refused), (1, 1));
    assert_eq!(stats.offload_hits, 2);
}

#[test]
fn segments_from_the_network_are_joined_for_a_port_that_takes_super_frames() {
    let mut bench = Bench::new(FlowOffloadLimits::default());
    bench.rule(1, from(PortRef::Uplink(0)), vec![Action::Forward(PortRef::vf(1))]);
    let queues = bench.queues(PortRef::Uplink(0)).clone();
    for index in 0..4_u32 {
        let mut frame = segment(REMOTE_WIRE, REMOTE, B, (80, 1000), 1000);
        let at = 14 + 20 + 4;
        frame.octets_mut()[at..at + 4].copy_from_slice(&(1 + index * 1000).to_be_bytes());
        let l4 = 34;
        frame.octets_mut()[l4 + 16..l4 + 18].fill(0);
        let sum = checksum::Sum::pseudo(
            REMOTE.parse().expect("address"),
            B.parse().expect("address"),
            6,
            1020,
        )
        .plus(checksum::Sum::of(&frame.octets()[l4..]))
        .checksum();
        frame.octets_mut()[l4 + 16..l4 + 18].copy_from_slice(&sum.to_be_bytes());
        queues.put(frame);
    }
    bench.engine.turn();
    let sent = bench.sent(PortRef::vf(1));
    assert_eq!(sent.len(), 1);
    assert_eq!(sent[0].gso.map(|gso| gso.size), Some(1000));
    assert_eq!(bench.stats().coalesced, 3);
}

#[test]
fn rule_changes_are_all_or_none() {
    let mut bench = Bench::new(FlowOffloadLimits::default());
    let rule = |cookie: u128, action| {
        let actions = vec![action];
        Arc::new(SteeringRule::new(
            Cookie(cookie),
            Owner::Agent,
            Priority(1),
            Pattern::default(),
            actions,
        ))
    };
    let changes = vec![
        RuleChange::Install {
            slot: 0,
            rule: rule(0, Action::Forward(PortRef::vf(1))),
        },
        RuleChange::Install {
            slot: 1,
            rule: rule(1, Action::ToKernel),
        },
    ];
    let (at, refused) = bench
        .change(changes)
        .expect_err("the software dataplane has no such action");
    assert_eq!((at, refused.field.as_str()), (1, "actions[0]"));
    bench.send(PortRef::vf(0), segment(POD, A, B, (1, 2), 0));
    assert_eq!(bench.dropped(DropReason::NoRule), 1);
}

#[test]
fn stop_ends_the_worker() {
    let (engine, handle) = Engine::new(&EngineConfig::new(1)).expect("engine");
    let worker = std::thread::spawn(move || engine.run());
    handle.stop();
    worker.join().expect("no panic").expect("no error");
}

#[test]
fn a_flow_table_that_cannot_be_is_an_error() {
    for flows in [0, u32::MAX] {
        let mut config = EngineConfig::new(1);
        config.flows = flows;
        assert_eq!(Engine::new(&config).err(), Some(nix::errno::Errno::EINVAL));
    }
}
