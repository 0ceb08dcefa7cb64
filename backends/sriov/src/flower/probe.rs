//! What kernel and driver can do, found out by trying: each key and each action is installed in a chain that no frame reaches, looked
//! at in the kernel's echo (an older kernel forgets keys that it does not know without a word), and removed.
//!
//! No table of vendors and models: firmware, mode and driver version decide, and they change.

use std::collections::{BTreeMap, BTreeSet};

use dpumesh_core::capability::{ActionKinds, CounterUnit, MatchKinds};
use dpumesh_core::steering::{
    Action, Atomicity, Conntrack, Cookie, CtStates, CtZone, DscpMatch, EtherType, Field, FragmentMatch,
    Group, IpMatch, IpProtocol, Masked, MeterId, Owner, Pattern, PortRange, Priority, RewriteField,
    SteeringRule, TcpFlags, VlanMatch,
};
use dpumesh_core::{Capabilities, MacAddr, PortRef, SteeringCapabilities, VlanId, Vni};

use super::filter::{Filter, PRIORITIES, Skip};
use super::kernel::{Kernel, Request};
use super::parts::{self, Seat, parts};
use super::steering::Options;
use super::step::CHAIN_MASK;
use super::translate::Names;

/// The chain for trying: above all groups.
const CHAIN: u32 = CHAIN_MASK - 14;
/// Longest batch.
const BATCH: u32 = 4096;
/// Groups: chains 0 to this are the contract's.
const GROUPS: u32 = 1 << 16;

/// Finds out the limits of a block.
pub(super) fn limits(
    kernel: &mut dyn Kernel,
    names: &Names,
    options: &Options,
) -> std::io::Result<SteeringCapabilities> {
    let mut limits = Capabilities::default().steering;
    limits.rules = options.rules.min(u64::from(super::filter::NUMBERS - 1));
    limits.groups = GROUPS;
    limits.priorities = PRIORITIES;
    limits.counters = limits.rules;
    limits.counter_unit = CounterUnit::L3;
    limits.atomicity = BTreeSet::from([Atomicity::Continue, Atomicity::Rollback]);
    limits.batch_max = BATCH;
    limits.per_operation_status = true;
    limits.software_fallback = true;
    let fields = fields(names);
    let actions = actions(names);
    limits.fields = tried_fields(kernel, names, options.block, &fields, Skip::Hardware)?;
    limits.actions = tried_actions(kernel, names, options.block, &actions, Skip::Hardware)?;
    if options.hardware_rules > 0 && holds_any(kernel, names, options.block)? {
        limits.hardware_rules = options.hardware_rules.min(limits.rules);
        limits.masks = u32::MAX; // the driver tells when it has no more
        limits.hardware_fields = tried_fields(kernel, names, options.block, &fields, Skip::Software)?;
        limits.hardware_fields.retain(|field, kinds| {
            *kinds &= limits.fields.get(field).copied().unwrap_or_default();
            !kinds.is_empty()
        });
        limits.hardware_actions =
            limits.actions & tried_actions(kernel, names, options.block, &actions, Skip::Software)?;
    }
    Ok(limits)
}

type Trials<K> = Vec<(K, SteeringRule)>;

fn rule(pattern: Pattern, actions: Vec<Action>) -> SteeringRule {
    SteeringRule::new(Cookie(1), Owner::Agent, Priority(0), pattern, actions).in_group(Group(CHAIN))
}

/// Whether the hardware takes the plainest rule.
fn holds_any(kernel: &mut dyn Kernel, names: &Names, block: u32) -> std::io::Result<bool> {
    let plain = Pattern {
        ethertype: Some(EtherType::IPV4),
        ..Pattern::default()
    };
    let taken = try_rules(
        kernel,
        names,
        block,
        &[rule(plain, vec![Action::Drop])],
        Skip::Software,
    )?;
    Ok(taken == [true])
}

fn tried_fields(
    kernel: &mut dyn Kernel,
    names: &Names,
    block: u32,
    trials: &Trials<(Field, MatchKinds)>,
    skip: Skip,
) -> std::io::Result<BTreeMap<Field, MatchKinds>> {
    let rules: Vec<SteeringRule> = trials.iter().map(|(_, rule)| rule.clone()).collect();
    let taken = try_rules(kernel, names, block, &rules, skip)?;
    let mut fields: BTreeMap<Field, MatchKinds> = BTreeMap::new();
    for (((field, kinds), _), taken) in trials.iter().zip(taken) {
        if taken {
            *fields.entry(*field).or_default() |= *kinds;
        }
    }
    Ok(fields)
}

/// An action counts when every way of it is taken.
fn tried_actions(
    kernel: &mut dyn Kernel,
    names: &Names,
    block: u32,
    trials: &Trials<ActionKinds>,
    skip: Skip,
) -> std::io::Result<ActionKinds> {
    let rules: Vec<SteeringRule> = trials.iter().map(|(_, rule)| rule.clone()).collect();
    let taken = try_rules(kernel, names, block, &rules, skip)?;
    let (mut good, mut bad) = (ActionKinds::empty(), ActionKinds::empty());
    for ((kind, _), taken) in trials.iter().zip(taken) {
        match taken {
            true => good |= *kind,
            false => bad |= *kind,
        }
    }
    Ok(good - bad)
}

/// Tries rules all at once, each at a priority of its own; says which were taken as they were asked for.
fn try_rules(
    kernel: &mut dyn Kernel,
    names: &Names,
    block: u32,
    rules: &[SteeringRule],
    skip: Skip,
) -> std::io::Result<Vec<bool>> {
    let mut filters: Vec<Vec<Filter>> = Vec::with_capacity(rules.len());
    for (number, rule) in (1..).zip(rules) {
        let mut rule = rule.clone();
        rule.priority = Priority(number);
        let seat = Seat {
            owner: 0,
            number,
            skip,
            copy: 1,
        };
        let parts = parts(&rule, names).unwrap_or_default();
        filters.push(
            parts
                .into_iter()
                .map(|part| parts::filter(&rule, part, seat))
                .collect(),
        );
    }
    let requests: Vec<Request> = filters.iter().flatten().map(|filter| filter.add(block)).collect();
    let mut answers = kernel.exchange(&requests)?.into_iter();
    let mut taken = Vec::with_capacity(rules.len());
    let mut removals = Vec::new();
    for filters in &filters {
        let mut all = !filters.is_empty();
        for filter in filters {
            let Some(Ok(messages)) = answers.next() else {
                all = false;
                continue;
            };
            removals.push(filter.place.remove(block));
            let shown = messages
                .iter()
                .find_map(|message| Filter::read(&message.body, block));
            all &= shown.is_some_and(|shown| {
                shown.filter.keys.contains(&filter.keys)
                    && shown.filter.steps == filter.steps
                    && (skip != Skip::Software || shown.in_hardware)
            });
        }
        taken.push(all);
    }
    let _ = kernel.exchange(&removals)?;
    Ok(taken)
}

/// A pattern per field and way of matching.
fn fields(names: &Names) -> Trials<(Field, MatchKinds)> {
    use MatchKinds as Kinds;
    let masks = Kinds::EXACT | Kinds::PREFIX | Kinds::MASK;
    let v4 = |octets: [u8; 4]| {
        IpMatch::Masked(Masked {
            value: octets.into(),
            mask: [255, 0, 255, 0].into(),
        })
    };
    let v6 = || {
        let mut mask = [0; 16];
        mask[1] = 0xff;
        IpMatch::Masked(Masked {
            value: [0; 16].into(),
            mask: mask.into(),
        })
    };
    let mac = Masked {
        value: MacAddr([2, 0, 0, 0, 0, 0]),
        mask: MacAddr([0xff, 0, 0xff, 0, 0xff, 0]),
    };
    let tcp = Pattern {
        ethertype: Some(EtherType::IPV4),
        ip_proto: Some(IpProtocol::TCP),
        ..Pattern::default()
    };
    let ip4 = Pattern {
        ethertype: Some(EtherType::IPV4),
        ..Pattern::default()
    };
    let range = PortRange {
        first: 1001,
        last: 1006,
    };
    let ct = Masked {
        value: CtStates::TRACKED | CtStates::ESTABLISHED,
        mask: CtStates::TRACKED | CtStates::ESTABLISHED,
    };
    let flags = Masked {
        value: TcpFlags::SYN,
        mask: TcpFlags::SYN | TcpFlags::RST,
    };
    let none = Pattern::default;
    let mut trials = vec![
        (
            Field::EthSrc,
            masks,
            Pattern {
                eth_src: Some(mac),
                ..none()
            },
        ),
        (
            Field::EthDst,
            masks,
            Pattern {
                eth_dst: Some(mac),
                ..none()
            },
        ),
        (
            Field::Ethertype,
            Kinds::EXACT,
            Pattern {
                ethertype: Some(EtherType::ARP),
                ..none()
            },
        ),
        (
            Field::Ip4Src,
            masks,
            Pattern {
                ip_src: Some(v4([10, 0, 8, 0])),
                ..none()
            },
        ),
        (
            Field::Ip4Dst,
            masks,
            Pattern {
                ip_dst: Some(v4([10, 0, 8, 0])),
                ..none()
            },
        ),
        (
            Field::Ip6Src,
            masks,
            Pattern {
                ip_src: Some(v6()),
                ..none()
            },
        ),
        (
            Field::Ip6Dst,
            masks,
            Pattern {
                ip_dst: Some(v6()),
                ..none()
            },
        ),
        (Field::IpProto, Kinds::EXACT, tcp.clone()),
        (
            Field::Dscp,
            Kinds::EXACT,
            Pattern {
                dscp: Some(DscpMatch(10)),
                ..ip4.clone()
            },
        ),
        (
            Field::Fragment,
            Kinds::EXACT,
            Pattern {
                fragment: Some(FragmentMatch::First),
                ..ip4
            },
        ),
        (
            Field::L4Src,
            Kinds::EXACT,
            Pattern {
                l4_src: Some(80.into()),
                ..tcp.clone()
            },
        ),
        (
            Field::L4Src,
            Kinds::RANGE,
            Pattern {
                l4_src: Some(range),
                ..tcp.clone()
            },
        ),
        (
            Field::L4Dst,
            Kinds::EXACT,
            Pattern {
                l4_dst: Some(80.into()),
                ..tcp.clone()
            },
        ),
        (
            Field::L4Dst,
            Kinds::RANGE,
            Pattern {
                l4_dst: Some(range),
                ..tcp.clone()
            },
        ),
        (
            Field::TcpFlags,
            masks,
            Pattern {
                tcp_flags: Some(flags),
                ..tcp
            },
        ),
        (
            Field::CtState,
            masks,
            Pattern {
                ct_state: Some(ct),
                ..none()
            },
        ),
    ];
    if let Ok(id) = VlanId::try_from(7) {
        trials.push((
            Field::Vlan,
            Kinds::EXACT,
            Pattern {
                vlan: Some(VlanMatch::Id(id)),
                ..none()
            },
        ));
    }
    if let (Ok(vni), false) = (Vni::try_from(7), names.tunnels.is_empty()) {
        trials.push((
            Field::Vni,
            Kinds::EXACT,
            Pattern {
                vni: Some(vni),
                ..none()
            },
        ));
    }
    if let Some(port) = some_port(names) {
        trials.push((
            Field::Port,
            Kinds::EXACT,
            Pattern {
                port: Some(port),
                ..none()
            },
        ));
    }
    let to_trial = |(field, kinds, pattern)| ((field, kinds), rule(pattern, vec![Action::Drop]));
    trials.into_iter().map(to_trial).collect()
}

fn some_port(names: &Names) -> Option<PortRef> {
    names
        .ports
        .keys()
        .copied()
        .find(|port| !matches!(port, PortRef::Stack(_)))
}

/// Rules per action.
fn actions(names: &Names) -> Trials<ActionKinds> {
    use ActionKinds as Kinds;
    let pattern = Pattern {
        ip_dst: Some(IpMatch::Prefix(ipnet::Ipv4Net::default().into())),
        ip_proto: Some(IpProtocol::TCP),
        ..Pattern::default()
    };
    let then = |step: Action| vec![step, Action::Drop];
    let rewrite = |field| then(Action::Rewrite(field));
    let mac = MacAddr([2, 0, 0, 0, 0, 9]);
    let address = std::net::IpAddr::from([192, 0, 2, 9]);
    let mut lists = vec![
        (Kinds::DROP, vec![Action::Drop]),
        (Kinds::COUNT, then(Action::Count)),
        (Kinds::TO_KERNEL, vec![Action::ToKernel]),
        (Kinds::JUMP, vec![Action::Jump(Group(CHAIN + 1))]),
        (Kinds::REWRITE_ETH, rewrite(RewriteField::EthSrc(mac))),
        (Kinds::REWRITE_ETH, rewrite(RewriteField::EthDst(mac))),
        (Kinds::REWRITE_IP, rewrite(RewriteField::IpSrc(address))),
        (Kinds::REWRITE_IP, rewrite(RewriteField::IpDst(address))),
        (Kinds::REWRITE_IP, rewrite(RewriteField::L4Dst(80))),
        (Kinds::REWRITE_DSCP, rewrite(RewriteField::Dscp(10))),
        (Kinds::TTL, then(Action::DecrementTtl)),
        (Kinds::VLAN, then(Action::PopVlan)),
        (
            Kinds::CONNTRACK,
            then(Action::Conntrack(Conntrack {
                zone: CtZone(0),
                commit: true,
            })),
        ),
    ];
    if let Ok(id) = VlanId::try_from(7) {
        lists.push((Kinds::VLAN, then(Action::PushVlan(id))));
    }
    if let Some(port) = some_port(names) {
        lists.push((Kinds::FORWARD, vec![Action::Forward(port)]));
        lists.push((Kinds::MIRROR, then(Action::Mirror(port))));
    }
    if names.link(PortRef::Stack(0)).is_some() {
        lists.push((Kinds::PUNT, vec![Action::Punt]));
    }
    if let Some(meter) = names.meters.keys().next() {
        lists.push((Kinds::METER, then(Action::Meter(MeterId(*meter)))));
    }
    let mut trials: Trials<ActionKinds> = lists
        .into_iter()
        .map(|(kind, actions)| (kind, rule(pattern.clone(), actions)))
        .collect();
    trials.extend(tunnel_trials(names));
    trials
}

fn tunnel_trials(names: &Names) -> Trials<ActionKinds> {
    use dpumesh_core::steering::{Encapsulation, TunnelKind};
    let Ok(vni) = Vni::try_from(7) else {
        return Vec::new();
    };
    let kinds = [
        (TunnelKind::Vxlan, ActionKinds::VXLAN),
        (TunnelKind::Geneve, ActionKinds::GENEVE),
    ];
    let there = kinds.into_iter().filter(|(kind, _)| {
        names
            .tunnels
            .contains_key(&super::translate::tunnel_number(*kind))
    });
    let of_kind = |(kind, ability)| {
        let outer = Encapsulation {
            kind,
            vni,
            local: [192, 0, 2, 1].into(),
            remote: [192, 0, 2, 2].into(),
            eth_src: MacAddr([2, 0, 0, 0, 0, 1]),
            eth_dst: MacAddr([2, 0, 0, 0, 0, 2]),
        };
        let inward = Pattern {
            port: Some(PortRef::Uplink(0)),
            vni: Some(vni),
            ..Pattern::default()
        };
        [
            (
                ability,
                rule(
                    Pattern::default(),
                    vec![Action::Encapsulate(outer), Action::Forward(PortRef::Uplink(0))],
                ),
            ),
            (
                ability,
                rule(inward, vec![Action::Decapsulate(kind), Action::Drop]),
            ),
        ]
    };
    there.flat_map(of_kind).collect()
}
