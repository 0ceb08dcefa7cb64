//! What is said to be in hardware, shown by frames: a rule that `list` shows in the card acts on them, its counter moves,
//! and it needs no software behind it.
//!
//! ```text
//! validate: Hardware ─► add (hardware only): Added(Hardware) ─► list: Hardware ─► frame in ─► frame out, counter + 1
//!                                                                  └─ software stands still ─► the same
//! ```

use std::net::Ipv4Addr;

use dpumesh_core::steering::{
    Action, Change, Cookie, Group, Placement, PlacementRequest, Priority, RewriteField, SteeringRule, Verdict,
};
use dpumesh_core::{ActionKinds, CounterUnit, FlowSteeringExt, MacAddr, PortRef, VlanId};

use super::Rig;
use super::check::{CaseResult, Halt, ensure_eq};
use super::disturb::{Disturbance, disturb};
use super::probe::{Wire, frame, frame_with, pattern, put};
use super::sample::MINE;
use super::steering::Soc;
use super::traffic::{counted, does_not_arrive, refresh_checksum, tagged, wire};

/// A rule about the `tag`-th frame that may act in the card only.
fn hard(rig: &dyn Rig, tag: u16, actions: Vec<Action>) -> Result<SteeringRule, Halt> {
    let cookie = Cookie(0xa000_0000 + u128::from(tag));
    let mut rule = SteeringRule::new(cookie, MINE, Priority(0), pattern(rig, tag)?, actions);
    rule.placement = PlacementRequest::Hardware;
    Ok(rule)
}

async fn is_judged_hardware(rig: &dyn Rig, rule: &SteeringRule) -> Result<bool, Halt> {
    let soc = Soc::of(rig);
    let verdicts = soc.steering()?.validate(std::slice::from_ref(rule)).await?;
    Ok(verdicts == [Verdict::Hardware])
}

/// Installs a rule in the card, which `validate` has to judge possible there.
async fn in_hardware(rig: &dyn Rig, rule: SteeringRule) -> Result<SteeringRule, Halt> {
    if !is_judged_hardware(rig, &rule).await? {
        return Err(Halt::not_supported(
            "steering.hardware_actions",
            format!("{:?} is not for the card", rule.actions),
        ));
    }
    let rule = put(rig, rule).await?;
    let listed = Soc::of(rig).mine().await?;
    let listed = listed.iter().find(|each| each.rule.cookie == rule.cookie);
    ensure_eq!(
        listed.map(|each| &each.placement),
        Some(&Placement::Hardware),
        "place of a rule that may act in the card only"
    );
    Ok(rule)
}

pub(super) async fn a_rule_in_hardware_acts_on_real_frames(rig: &dyn Rig) -> CaseResult {
    let wire = wire(rig).await?;
    let rule = in_hardware(rig, hard(rig, 1, vec![Action::Forward(wire.to)])?).await?;
    for _ in 0..3 {
        wire.send(&frame(1)).await?;
        wire.arrives(&frame(1), "a rule in hardware forwards it").await?;
    }
    does_not_arrive(&wire, &frame(2), "the rule is about another frame").await?;
    Soc::of(rig).remove(rule.cookie).await?;
    does_not_arrive(&wire, &frame(1), "its rule was removed from hardware").await
}

/// An action, a frame it is shown on, and what leaves; `None` for nothing.
struct Shown {
    kind: ActionKinds,
    actions: Vec<Action>,
    sent: Vec<u8>,
    leaves: Option<Vec<u8>>,
}

/// One per action whose effect a frame shows; the `i`-th is about the frame of tag `10 + i`.
fn shown(to: PortRef) -> Result<Vec<Shown>, Halt> {
    let (mac, ip) = (MacAddr([2, 0xab, 0, 0, 0, 1]), Ipv4Addr::new(192, 0, 2, 9));
    let vlan = VlanId::try_from(7).map_err(|error| Halt::failed(error.to_string()))?;
    let (mut to_mac, mut to_ip) = (frame(12), frame(13));
    to_mac[..6].copy_from_slice(&mac.0);
    to_ip[30..34].copy_from_slice(&ip.octets());
    refresh_checksum(&mut to_ip);
    let step = |step| vec![step, Action::Forward(to)];
    let all = [
        (
            ActionKinds::FORWARD,
            vec![Action::Forward(to)],
            frame(10),
            Some(frame(10)),
        ),
        (ActionKinds::DROP, vec![Action::Drop], frame(11), None),
        (
            ActionKinds::REWRITE_ETH,
            step(Action::Rewrite(RewriteField::EthDst(mac))),
            frame(12),
            Some(to_mac),
        ),
        (
            ActionKinds::REWRITE_IP,
            step(Action::Rewrite(RewriteField::IpDst(ip.into()))),
            frame(13),
            Some(to_ip),
        ),
        (
            ActionKinds::TTL,
            step(Action::DecrementTtl),
            frame_with(14, 9, 20),
            Some(frame_with(14, 8, 20)),
        ),
        (
            ActionKinds::VLAN,
            step(Action::PushVlan(vlan)),
            frame(15),
            Some(tagged(&frame(15), 7)),
        ),
        (
            ActionKinds::VLAN,
            step(Action::PopVlan),
            tagged(&frame(16), 7),
            Some(frame(16)),
        ),
    ];
    Ok(all
        .into_iter()
        .map(|(kind, actions, sent, leaves)| Shown {
            kind,
            actions,
            sent,
            leaves,
        })
        .collect())
}

pub(super) async fn each_action_claimed_in_hardware_acts_on_real_frames(rig: &dyn Rig) -> CaseResult {
    let wire = wire(rig).await?;
    let claims = rig.soc().capabilities().steering;
    let mut seen = 0;
    for (i, show) in shown(wire.to)?.into_iter().enumerate() {
        let rule = hard(rig, 10 + i as u16, show.actions)?;
        let kinds = show.kind | ActionKinds::FORWARD;
        if !claims.hardware_actions.contains(kinds) || !is_judged_hardware(rig, &rule).await? {
            continue;
        }
        let rule = in_hardware(rig, rule).await?;
        match show.leaves {
            Some(expected) => {
                wire.send(&show.sent).await?;
                let found = wire.next_at(wire.to).await?;
                ensure_eq!(
                    found,
                    Some(expected),
                    "what {:?} in hardware lets out",
                    rule.actions
                );
            }
            None => does_not_arrive(&wire, &show.sent, "a rule in hardware drops it").await?,
        }
        Soc::of(rig).remove(rule.cookie).await?;
        seen += 1;
    }
    if seen == 0 {
        return Err(Halt::not_supported(
            "steering.hardware_actions",
            "none of the actions whose effect a frame shows",
        ));
    }
    Ok(())
}

pub(super) async fn the_counter_of_a_rule_in_hardware_moves_with_frames(rig: &dyn Rig) -> CaseResult {
    let wire = wire(rig).await?;
    let count = hard(rig, 1, vec![Action::Count, Action::Forward(wire.to)])?;
    let rule = in_hardware(rig, count).await?;
    let header = match rig.soc().capabilities().steering.counter_unit {
        CounterUnit::L2 => 0,
        CounterUnit::L3 => 14,
    };
    let mut octets = 0;
    for (sent, payload) in [20, 300, 18].into_iter().enumerate() {
        let frame = frame_with(1, 64, payload);
        octets += (frame.len() - header) as u64;
        wire.send(&frame).await?;
        wire.arrives(&frame, "a rule in hardware forwards it").await?;
        let counters = counted(rig, rule.cookie).await?;
        ensure_eq!(counters.packets, sent as u64 + 1, "frames counted in hardware");
        ensure_eq!(counters.octets, octets, "octets counted in hardware");
    }
    Ok(())
}

pub(super) async fn a_rule_in_hardware_needs_no_software(rig: &dyn Rig) -> CaseResult {
    let wire = wire(rig).await?;
    in_hardware(rig, hard(rig, 1, vec![Action::Forward(wire.to)])?).await?;
    disturb(rig, Disturbance::SoftwareStops(true)).await?;
    wire.send(&frame(1)).await?;
    let why = "a rule in hardware forwards it while the software stands still";
    wire.arrives(&frame(1), why).await?;
    software_does_stand_still(rig, &wire).await?;
    disturb(rig, Disturbance::SoftwareStops(false)).await
}

/// A fixture that only says so would prove nothing: what is in software must not act now.
async fn software_does_stand_still(rig: &dyn Rig, wire: &Wire<'_>) -> CaseResult {
    let soc = Soc::of(rig);
    let mut soft = hard(rig, 2, vec![Action::Forward(wire.to)])?;
    soft.placement = PlacementRequest::Software;
    match soc.steering()?.add(soc.fence(), soft).await {
        Ok(Change::Added(Placement::Software(_))) => {}
        // A card without software has nothing that could stand in for its hardware.
        _ => return Ok(()),
    }
    wire.send(&frame(2)).await?;
    wire.send(&frame(1)).await?;
    wire.arrives(
        &frame(1),
        "a rule in software acts though the software stands still",
    )
    .await
}

pub(super) async fn a_counter_is_at_most_as_old_as_claimed(rig: &dyn Rig) -> CaseResult {
    let wire = wire(rig).await?;
    let count = vec![Action::Count, Action::Forward(wire.to)];
    let rule = super::probe::install(rig, 1, 0, count).await?;
    let soc = Soc::of(rig);
    for sent in 1..=3 {
        // Whoever keeps what was read has the old value now.
        soc.steering()?.counters(MINE, &[rule.cookie]).await?;
        wire.send(&frame(1)).await?;
        wire.arrives(&frame(1), "a rule forwards it").await?;
        let counters = counted(rig, rule.cookie).await?;
        ensure_eq!(
            counters.packets,
            sent,
            "frames counted, read steering.counter_age_ms after the last one"
        );
    }
    Ok(())
}

pub(super) async fn a_mark_made_in_hardware_is_matched_in_hardware(rig: &dyn Rig) -> CaseResult {
    let wire = wire(rig).await?;
    let jump = hard(rig, 1, vec![Action::Mark(5), Action::Jump(Group(1))])?;
    let mut there = hard(rig, 2, vec![Action::Forward(wire.to)])?.in_group(Group(1));
    there.pattern = dpumesh_core::steering::Pattern {
        mark: Some(dpumesh_core::steering::Masked {
            value: 5,
            mask: u32::MAX,
        }),
        ..Default::default()
    };
    in_hardware(rig, jump).await?;
    in_hardware(rig, there).await?;
    wire.send(&frame(1)).await?;
    wire.arrives(&frame(1), "its mark is matched in hardware").await?;
    does_not_arrive(&wire, &frame(2), "nothing marked it").await
}
