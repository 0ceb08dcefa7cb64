//! What frames meet: the sentences of steering and of the closed port, shown by frames that go in and come out.

use std::net::Ipv4Addr;
use std::time::Duration;

use dpumesh_core::steering::{
    Action, Change, Cookie, Counters, Encapsulation, FragmentMatch, Group, IpProtocol, MissPolicy, Pattern,
    Priority, RewriteField, SteeringRule, TunnelKind,
};
use dpumesh_core::{ActionKinds, BackendExt, CounterUnit, Frame, MacAddr, MatchKinds, PortRef, VlanId, Vni};

use super::Rig;
use super::check::{CaseResult, Halt, ensure, ensure_eq};
use super::probe::{
    ARRIVAL, Wire, frame, frame_with, install, mac, needs_actions, pattern, put, tag_of, to_software,
};
use super::sample::{MINE, covers};
use super::steering::Soc;

pub(super) const MARK: u16 = 999;

/// A wire on which the mark frame gets through, so that silence can be told from slowness.
pub(super) async fn wire(rig: &dyn Rig) -> Result<Wire<'_>, Halt> {
    needs_actions(rig, ActionKinds::FORWARD)?;
    let wire = Wire::new(rig).await?;
    install(rig, MARK, 0, vec![Action::Forward(wire.to)]).await?;
    Ok(wire)
}

/// Sends a frame that must not arrive, and the mark behind it.
pub(super) async fn does_not_arrive(wire: &Wire<'_>, octets: &[u8], why: &str) -> CaseResult {
    wire.send(octets).await?;
    wire.send(&frame(MARK)).await?;
    wire.arrives(&frame(MARK), why).await
}

pub(super) async fn a_forwarded_frame_leaves_by_its_port(rig: &dyn Rig) -> CaseResult {
    let wire = wire(rig).await?;
    install(rig, 1, 0, vec![Action::Forward(wire.to)]).await?;
    wire.send(&frame(1)).await?;
    wire.arrives(&frame(1), "a rule forwards it").await
}

pub(super) async fn frames_keep_their_order(rig: &dyn Rig) -> CaseResult {
    let wire = wire(rig).await?;
    for tag in 1..=4 {
        install(rig, tag, 0, vec![Action::Forward(wire.to)]).await?;
    }
    for tag in [3, 1, 4, 2, 1] {
        wire.send(&frame(tag)).await?;
    }
    for tag in [3, 1, 4, 2, 1] {
        wire.arrives(&frame(tag), "frames of one port keep their order")
            .await?;
    }
    Ok(())
}

pub(super) async fn a_miss_is_dropped_by_default(rig: &dyn Rig) -> CaseResult {
    let wire = wire(rig).await?;
    does_not_arrive(&wire, &frame(1), "no rule matches and closed is the default").await
}

pub(super) async fn a_miss_goes_to_software_when_asked(rig: &dyn Rig) -> CaseResult {
    let wire = wire(rig).await?;
    let soc = rig.soc();
    to_software(rig, wire.from).await?;
    let mut port = soc.require_ports()?.open(soc.fence(), wire.from).await?;
    wire.send(&frame(1)).await?;
    let found = super::ports::receive_one(&mut *port, ARRIVAL).await?;
    ensure_eq!(found.as_deref().map(tag_of), Some(1), "frame on the representor");
    soc.require_steering()?
        .set_miss_policy(soc.fence(), wire.from, MissPolicy::Drop)
        .await?;
    does_not_arrive(&wire, &frame(2), "the policy is drop again").await?;
    let mut frames = [Frame::new()];
    ensure_eq!(
        port.receive(&mut frames)?,
        0,
        "frames after the policy is drop again"
    );
    Ok(())
}

pub(super) async fn the_lowest_priority_number_wins(rig: &dyn Rig) -> CaseResult {
    needs_actions(rig, ActionKinds::DROP)?;
    let wire = wire(rig).await?;
    // Installed in both orders, so that neither first nor last added can win by accident.
    install(rig, 1, 1, vec![Action::Drop]).await?;
    install(rig, 1, 0, vec![Action::Forward(wire.to)]).await?;
    install(rig, 2, 0, vec![Action::Drop]).await?;
    install(rig, 2, 1, vec![Action::Forward(wire.to)]).await?;
    wire.send(&frame(1)).await?;
    wire.arrives(&frame(1), "priority 0 forwards, 1 drops").await?;
    does_not_arrive(&wire, &frame(2), "priority 0 drops, 1 forwards").await
}

pub(super) async fn removing_the_winner_lets_the_next_act(rig: &dyn Rig) -> CaseResult {
    needs_actions(rig, ActionKinds::DROP)?;
    let wire = wire(rig).await?;
    let winner = install(rig, 1, 0, vec![Action::Drop]).await?;
    install(rig, 1, 1, vec![Action::Forward(wire.to)]).await?;
    does_not_arrive(&wire, &frame(1), "priority 0 drops").await?;
    Soc::of(rig).remove(winner.cookie).await?;
    wire.send(&frame(1)).await?;
    wire.arrives(&frame(1), "the drop rule was removed").await
}

pub(super) async fn a_removed_rule_acts_no_more(rig: &dyn Rig) -> CaseResult {
    let wire = wire(rig).await?;
    let rule = install(rig, 1, 0, vec![Action::Forward(wire.to)]).await?;
    wire.send(&frame(1)).await?;
    wire.arrives(&frame(1), "a rule forwards it").await?;
    Soc::of(rig).remove(rule.cookie).await?;
    does_not_arrive(&wire, &frame(1), "its rule was removed").await
}

pub(super) async fn a_jump_goes_on_in_the_higher_group(rig: &dyn Rig) -> CaseResult {
    let wire = wire(rig).await?;
    let there = SteeringRule::new(
        Cookie(1),
        MINE,
        Priority(0),
        pattern(rig, 1)?,
        vec![Action::Forward(wire.to)],
    )
    .in_group(Group(1));
    put(rig, there).await?;
    does_not_arrive(
        &wire,
        &frame(1),
        "a rule of group 1 is not looked at from group 0",
    )
    .await?;
    install(rig, 1, 1, vec![Action::Jump(Group(1))]).await?;
    wire.send(&frame(1)).await?;
    wire.arrives(&frame(1), "a rule jumps to group 1").await
}

pub(super) async fn a_port_is_never_what_a_frame_claims(rig: &dyn Rig) -> CaseResult {
    let wire = wire(rig).await?;
    let kinds = rig.soc().capabilities().steering.fields;
    let kinds = kinds
        .get(&dpumesh_core::steering::Field::Port)
        .copied()
        .unwrap_or_default();
    if !covers(dpumesh_core::steering::Field::Port, kinds, MatchKinds::EXACT) {
        return Err(Halt::not_supported(
            "steering.fields",
            "pattern.port cannot be matched",
        ));
    }
    let from = |port: PortRef, tag: u16| -> Result<SteeringRule, Halt> {
        let pattern = Pattern {
            port: Some(port),
            ..pattern(rig, tag)?
        };
        let actions = vec![Action::Forward(wire.to)];
        Ok(SteeringRule::new(
            Cookie(u128::from(tag)),
            MINE,
            Priority(0),
            pattern,
            actions,
        ))
    };
    put(rig, from(wire.from, 1)?).await?;
    put(rig, from(wire.to, 2)?).await?;
    wire.send(&frame(1)).await?;
    wire.arrives(&frame(1), "it came in on the rule's port").await?;
    does_not_arrive(&wire, &frame(2), "it came in on another port than the rule's").await
}

/// The counters of a rule of mine, when they are as old as they may be.
pub(super) async fn counted(rig: &dyn Rig, cookie: Cookie) -> Result<Counters, Halt> {
    let soc = Soc::of(rig);
    let age = soc.backend.capabilities().steering.counter_age_ms;
    pass(rig, Duration::from_millis(u64::from(age))).await;
    let answers = soc.steering()?.counters(MINE, &[cookie]).await?;
    answers
        .first()
        .copied()
        .flatten()
        .ok_or_else(|| Halt::failed("no counters of a counting rule"))
}

/// Lets time pass for the backend: by its clock, else really.
pub(super) async fn pass(rig: &dyn Rig, time: Duration) {
    match rig.clock() {
        Some(clock) => clock.advance(time).await,
        None => tokio::time::sleep(time).await,
    }
}

pub(super) async fn counters_tell_frames_and_octets_in_the_declared_unit(rig: &dyn Rig) -> CaseResult {
    needs_actions(rig, ActionKinds::COUNT)?;
    let wire = wire(rig).await?;
    let rule = install(rig, 1, 0, vec![Action::Count, Action::Forward(wire.to)]).await?;
    let frames = [frame_with(1, 64, 20), frame_with(1, 64, 300)];
    for octets in &frames {
        wire.send(octets).await?;
        wire.arrives(octets, "a rule forwards it").await?;
    }
    let header = match rig.soc().capabilities().steering.counter_unit {
        CounterUnit::L2 => 0,
        CounterUnit::L3 => 14,
    };
    let expected: usize = frames.iter().map(|octets| octets.len() - header).sum();
    let counters = counted(rig, rule.cookie).await?;
    ensure_eq!(counters.packets, 2, "frames counted");
    ensure_eq!(counters.octets, expected as u64, "octets counted");
    Ok(())
}

pub(super) async fn counters_never_run_backwards_and_end_with_the_final_value(rig: &dyn Rig) -> CaseResult {
    needs_actions(rig, ActionKinds::COUNT)?;
    let wire = wire(rig).await?;
    let rule = install(rig, 1, 0, vec![Action::Count, Action::Forward(wire.to)]).await?;
    let soc = Soc::of(rig);
    let mut last = 0;
    for _ in 0..5 {
        wire.send(&frame(1)).await?;
        wire.arrives(&frame(1), "a rule forwards it").await?;
        let answers = soc.steering()?.counters(MINE, &[rule.cookie]).await?;
        let now = answers[0].map_or(0, |counters| counters.packets);
        ensure!(now >= last, "the count ran back from {last} to {now}");
        last = now;
    }
    // Present again: the counters stay.
    let change = soc.add(rule.clone()).await?;
    ensure!(
        matches!(change, Change::Present(_)),
        "adding it again ended as {change:?}"
    );
    let change = soc.remove(rule.cookie).await?;
    ensure!(
        matches!(change, Change::Removed(Some(counters)) if counters.packets == 5),
        "removal ended as {change:?}, expected 5 frames in the final counters"
    );
    Ok(())
}

pub(super) async fn a_rule_counts_only_what_it_wins(rig: &dyn Rig) -> CaseResult {
    needs_actions(rig, ActionKinds::COUNT)?;
    let wire = wire(rig).await?;
    let count = || vec![Action::Count, Action::Forward(wire.to)];
    let winner = install(rig, 1, 0, count()).await?;
    let loser = install(rig, 1, 1, count()).await?;
    wire.send(&frame(1)).await?;
    wire.arrives(&frame(1), "a rule forwards it").await?;
    ensure_eq!(
        counted(rig, winner.cookie).await?.packets,
        1,
        "frames of the winner"
    );
    ensure_eq!(
        counted(rig, loser.cookie).await?.packets,
        0,
        "frames of the loser"
    );
    Ok(())
}

pub(super) async fn a_new_rule_of_an_old_cookie_counts_from_zero(rig: &dyn Rig) -> CaseResult {
    needs_actions(rig, ActionKinds::COUNT)?;
    let wire = wire(rig).await?;
    let soc = Soc::of(rig);
    let rule = install(rig, 1, 0, vec![Action::Count, Action::Forward(wire.to)]).await?;
    wire.send(&frame(1)).await?;
    wire.arrives(&frame(1), "a rule forwards it").await?;
    soc.remove(rule.cookie).await?;
    soc.add(rule.clone()).await?;
    ensure_eq!(
        counted(rig, rule.cookie).await?.packets,
        0,
        "frames of the new rule"
    );
    Ok(())
}

pub(super) async fn a_rewritten_mac_is_what_leaves(rig: &dyn Rig) -> CaseResult {
    needs_actions(rig, ActionKinds::REWRITE_ETH)?;
    let wire = wire(rig).await?;
    let written = MacAddr([2, 0xab, 0, 0, 0, 1]);
    let rewrite = Action::Rewrite(RewriteField::EthDst(written));
    install(rig, 1, 0, vec![rewrite, Action::Forward(wire.to)]).await?;
    wire.send(&frame(1)).await?;
    let mut expected = frame(1);
    ensure_eq!(expected[..6], mac(1).0, "destination of the frame sent");
    expected[..6].copy_from_slice(&written.0);
    let found = wire.next_at(wire.to).await?;
    ensure_eq!(found, Some(expected), "the rewritten frame");
    Ok(())
}

pub(super) async fn a_rewritten_address_leaves_with_right_checksums(rig: &dyn Rig) -> CaseResult {
    needs_actions(rig, ActionKinds::REWRITE_IP)?;
    let wire = wire(rig).await?;
    let rewrite = Action::Rewrite(RewriteField::IpDst(Ipv4Addr::new(192, 0, 2, 9).into()));
    install(rig, 1, 0, vec![rewrite, Action::Forward(wire.to)]).await?;
    wire.send(&frame(1)).await?;
    let mut expected = frame(1);
    expected[30..34].copy_from_slice(&[192, 0, 2, 9]);
    refresh_checksum(&mut expected);
    let found = wire.next_at(wire.to).await?;
    // UDP without a checksum over IPv4 stays without one.
    ensure_eq!(found, Some(expected), "the rewritten frame");
    Ok(())
}

/// The frame with an 802.1Q tag.
pub(super) fn tagged(octets: &[u8], id: u16) -> Vec<u8> {
    let [high, low] = id.to_be_bytes();
    [&octets[..12], &[0x81, 0x00, high, low], &octets[12..]].concat()
}

pub(super) async fn a_pushed_tag_is_in_the_frame(rig: &dyn Rig) -> CaseResult {
    needs_actions(rig, ActionKinds::VLAN)?;
    let wire = wire(rig).await?;
    let tag = VlanId::try_from(7).map_err(|error| Halt::failed(error.to_string()))?;
    install(rig, 1, 0, vec![Action::PushVlan(tag), Action::Forward(wire.to)]).await?;
    wire.send(&frame(1)).await?;
    let found = wire.next_at(wire.to).await?;
    ensure_eq!(found, Some(tagged(&frame(1), 7)), "the tagged frame");
    Ok(())
}

pub(super) async fn a_popped_tag_is_gone(rig: &dyn Rig) -> CaseResult {
    needs_actions(rig, ActionKinds::VLAN)?;
    let wire = wire(rig).await?;
    install(rig, 1, 0, vec![Action::PopVlan, Action::Forward(wire.to)]).await?;
    wire.send(&tagged(&frame(1), 7)).await?;
    wire.arrives(&frame(1), "its tag was taken off").await
}

/// The outer headers that the tunnel cases use.
fn outer() -> Result<Encapsulation, Halt> {
    Ok(Encapsulation {
        kind: TunnelKind::Vxlan,
        vni: Vni::try_from(0x0a_0b0c).map_err(|error| Halt::failed(error.to_string()))?,
        local: Ipv4Addr::new(192, 0, 2, 1).into(),
        remote: Ipv4Addr::new(192, 0, 2, 2).into(),
        eth_src: MacAddr([2, 0xee, 0, 0, 0, 1]),
        eth_dst: MacAddr([2, 0xee, 0, 0, 0, 2]),
    })
}

/// Length of Ethernet, IPv4, UDP and VXLAN headers.
const OUTER: usize = 14 + 20 + 8 + 8;

pub(super) async fn an_encapsulated_frame_is_inside_its_tunnel(rig: &dyn Rig) -> CaseResult {
    needs_actions(rig, ActionKinds::VXLAN)?;
    let wire = wire(rig).await?;
    install(
        rig,
        1,
        0,
        vec![Action::Encapsulate(outer()?), Action::Forward(wire.to)],
    )
    .await?;
    wire.send(&frame(1)).await?;
    let Some(found) = wire.next_at(wire.to).await? else {
        return Err(Halt::failed("the encapsulated frame did not arrive"));
    };
    ensure!(
        found.len() == OUTER + frame(1).len(),
        "{} octets arrived",
        found.len()
    );
    let (headers, inner) = found.split_at(OUTER);
    ensure!(inner == frame(1), "the inner frame changed");
    ensure_eq!(headers[..6], [2, 0xee, 0, 0, 0, 2], "outer destination MAC");
    ensure_eq!(headers[6..12], [2, 0xee, 0, 0, 0, 1], "outer source MAC");
    ensure_eq!(headers[12..14], [0x08, 0x00], "outer EtherType");
    ensure_eq!(headers[23], 17, "outer protocol");
    ensure_eq!(headers[26..34], [192, 0, 2, 1, 192, 0, 2, 2], "outer addresses");
    ensure_eq!(headers[36..38], 4789_u16.to_be_bytes(), "outer destination port");
    ensure_eq!(headers[42] & 0x08, 0x08, "the flag of a valid VNI");
    ensure_eq!(headers[46..49], [0x0a, 0x0b, 0x0c], "VNI");
    let (mut again, total) = (found.clone(), (found.len() - 14) as u16);
    refresh_checksum(&mut again);
    ensure_eq!(headers[16..18], total.to_be_bytes(), "length of the outer packet");
    ensure_eq!(headers[24..26], again[24..26], "outer header checksum");
    Ok(())
}

/// A frame in a VXLAN packet of the outer headers, to the address of a tag.
fn encapsulated(inner: &[u8], tag: u16) -> Vec<u8> {
    let mut packet = frame_with(tag, 64, 8 + inner.len());
    packet[36..38].copy_from_slice(&4789_u16.to_be_bytes());
    packet[42..50].copy_from_slice(&[0x08, 0, 0, 0, 0x0a, 0x0b, 0x0c, 0]);
    packet[50..].copy_from_slice(inner);
    packet
}

pub(super) async fn a_decapsulated_frame_is_what_was_inside(rig: &dyn Rig) -> CaseResult {
    needs_actions(rig, ActionKinds::VXLAN)?;
    let wire = wire(rig).await?;
    let out = vec![Action::Decapsulate(TunnelKind::Vxlan), Action::Forward(wire.to)];
    install(rig, 1, 0, out).await?;
    wire.send(&encapsulated(&frame(2), 1)).await?;
    wire.arrives(&frame(2), "it was inside the tunnel packet").await?;
    does_not_arrive(&wire, &frame(1), "it is no tunnel packet").await
}

pub(super) async fn a_ttl_counts_down_and_ends_at_1(rig: &dyn Rig) -> CaseResult {
    needs_actions(rig, ActionKinds::TTL)?;
    let wire = wire(rig).await?;
    install(rig, 1, 0, vec![Action::DecrementTtl, Action::Forward(wire.to)]).await?;
    wire.send(&frame_with(1, 2, 20)).await?;
    wire.arrives(&frame_with(1, 1, 20), "TTL 2 becomes 1, with a right checksum")
        .await?;
    does_not_arrive(&wire, &frame_with(1, 1, 20), "TTL 1 ends here").await?;
    does_not_arrive(&wire, &frame_with(1, 0, 20), "TTL 0 ends here").await
}

pub(super) async fn a_mirrored_frame_leaves_by_both_ports(rig: &dyn Rig) -> CaseResult {
    needs_actions(rig, ActionKinds::MIRROR)?;
    let wire = wire(rig).await?;
    let copy = PortRef::Uplink(0);
    install(rig, 1, 0, vec![Action::Mirror(copy), Action::Forward(wire.to)]).await?;
    wire.send(&frame(1)).await?;
    wire.arrives(&frame(1), "it is forwarded").await?;
    wire.arrives_at(copy, &frame(1), "it is mirrored").await
}

pub(super) async fn a_mark_is_matched_in_a_later_group(rig: &dyn Rig) -> CaseResult {
    needs_actions(rig, ActionKinds::MARK | ActionKinds::JUMP)?;
    let wire = wire(rig).await?;
    let fields = rig.soc().capabilities().steering.fields;
    if !fields.contains_key(&dpumesh_core::steering::Field::Mark) {
        return Err(Halt::not_supported(
            "steering.fields",
            "pattern.mark cannot be matched",
        ));
    }
    for tag in [1, 2] {
        let steps = vec![Action::Mark(u32::from(tag)), Action::Jump(Group(1))];
        install(rig, tag, 0, steps).await?;
    }
    let marked = Pattern {
        mark: Some(dpumesh_core::steering::Masked {
            value: 1,
            mask: u32::MAX,
        }),
        ..Pattern::default()
    };
    let rule = SteeringRule::new(
        Cookie(1),
        MINE,
        Priority(0),
        marked,
        vec![Action::Forward(wire.to)],
    );
    put(rig, rule.in_group(Group(1))).await?;
    wire.send(&frame(1)).await?;
    wire.arrives(&frame(1), "its mark is matched in group 1").await?;
    does_not_arrive(&wire, &frame(2), "its mark is another").await
}

pub(super) async fn a_later_fragment_never_matches_a_port(rig: &dyn Rig) -> CaseResult {
    let wire = wire(rig).await?;
    let fields = rig.soc().capabilities().steering.fields;
    let has = |field| {
        let kinds = fields.get(&field).copied().unwrap_or_default();
        covers(field, kinds, MatchKinds::EXACT)
    };
    use dpumesh_core::steering::Field::{IpProto, L4Dst};
    if !has(IpProto) || !has(L4Dst) {
        return Err(Halt::not_supported(
            "steering.fields",
            "pattern.l4_dst cannot be matched",
        ));
    }
    let by_port = Pattern {
        ip_proto: Some(IpProtocol::UDP),
        l4_dst: Some(7001.into()),
        fragment: None::<FragmentMatch>,
        ..pattern(rig, 1)?
    };
    let rule = SteeringRule::new(
        Cookie(1),
        MINE,
        Priority(0),
        by_port,
        vec![Action::Forward(wire.to)],
    );
    put(rig, rule).await?;
    wire.send(&frame(1)).await?;
    wire.arrives(&frame(1), "its port matches").await?;
    let mut fragment = frame(1);
    fragment[21] = 1; // offset of 8 octets: what stands where the ports were is payload
    refresh_checksum(&mut fragment);
    does_not_arrive(&wire, &fragment, "a later fragment has no ports").await
}

pub(super) fn refresh_checksum(frame: &mut [u8]) {
    frame[24..26].fill(0);
    let sum: u32 = frame[14..34]
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let sum = !((folded & 0xffff) + (folded >> 16)) as u16;
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
}

pub(super) async fn a_rule_has_acted_when_the_batch_is_done(rig: &dyn Rig) -> CaseResult {
    let wire = wire(rig).await?;
    for tag in 1..=20 {
        install(rig, tag, 0, vec![Action::Forward(wire.to)]).await?;
        wire.send(&frame(tag)).await?;
        wire.arrives(
            &frame(tag),
            "a change that is reported done acts on the next frame",
        )
        .await?;
    }
    Ok(())
}

pub(super) async fn a_vf_that_only_the_host_leased_passes_no_frame(rig: &dyn Rig) -> CaseResult {
    let wire = wire(rig).await?;
    let host = rig.host();
    let request = dpumesh_core::vf::VfRequest::new("not-admitted");
    let closed = host.require_vf()?.lease(host.fence(), &request).await?;
    install(rig, 1, 0, vec![Action::Forward(wire.to)]).await?;
    install(rig, 2, 0, vec![Action::Forward(closed.port)]).await?;
    let probe = rig
        .probe()
        .ok_or_else(|| Halt::not_supported("rig.probe", "the fixture sends no frames"))?;
    probe.inject(closed.port, &frame(1)).await?;
    does_not_arrive(&wire, &frame(2), "frame 1 came from a port that is not admitted").await?;
    wire.is_silent(closed.port, "a port that is not admitted").await
}

pub(super) async fn a_frame_of_a_foreign_mac_is_dropped_when_checked(rig: &dyn Rig) -> CaseResult {
    let wire = wire(rig).await?;
    let host = rig.host();
    let vf = host.require_vf()?;
    install(rig, 1, 0, vec![Action::Forward(wire.to)]).await?;
    let states = vf.list().await?;
    let Some(lease) = states
        .into_iter()
        .filter_map(|state| state.lease)
        .find(|lease| lease.port == wire.from)
    else {
        return Err(Halt::failed("the sender's lease is not listed"));
    };
    let checked = dpumesh_core::vf::VfConfig {
        spoof_check: Some(true),
        ..Default::default()
    };
    vf.configure(host.fence(), &lease, &checked).await?;
    wire.send(&frame(1)).await?;
    let unchecked = dpumesh_core::vf::VfConfig {
        spoof_check: Some(false),
        ..Default::default()
    };
    vf.configure(host.fence(), &lease, &unchecked).await?;
    wire.send(&frame(MARK)).await?;
    wire.arrives(&frame(MARK), "frame 1 claimed a foreign source MAC")
        .await
}

pub(super) async fn a_revoked_vf_passes_no_frame(rig: &dyn Rig) -> CaseResult {
    let wire = wire(rig).await?;
    let soc = rig.soc();
    let probe = rig
        .probe()
        .ok_or_else(|| Halt::not_supported("rig.probe", "the fixture sends no frames"))?;
    let third = super::probe::admitted(rig, "third").await?;
    install(rig, 1, 0, vec![Action::Forward(wire.to)]).await?;
    probe.inject(third.port, &frame(1)).await?;
    wire.arrives(&frame(1), "its port is admitted").await?;
    soc.require_vf()?.revoke(soc.fence(), &third).await?;
    probe.inject(third.port, &frame(1)).await?;
    wire.send(&frame(MARK)).await?;
    wire.arrives(&frame(MARK), "frame 1 came from a revoked port")
        .await?;
    Ok(())
}
