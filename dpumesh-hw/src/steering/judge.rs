//! [`judge`]: one rule against a card's limits, whatever is installed.
//!
//! The ways of matching contain one another: an exact value can be matched by any way, leading bits also by a mask.

use dpumesh_core::capability::{ActionKinds, MatchKinds, SteeringCapabilities};
use dpumesh_core::steering::{
    Action, Field, IpMatch, Masked, Pattern, PlacementRequest, PortRange, RewriteField, SteeringRule,
    TunnelKind, Verdict,
};

use super::cube::address_bits;

/// What a card with these limits would do with the rule.
///
/// The first field that no part of the card can do is [`Verdict::No`]. What only hardware lacks is
/// [`Verdict::Software`] with [`SteeringCapabilities::software_fallback`] and without a wish for hardware, else `No`.
/// Never `Partial`.
pub fn judge(rule: &SteeringRule, limits: &SteeringCapabilities) -> Verdict {
    if let Err(error) = rule.check() {
        return no(error.field, error.reason);
    }
    if let Some(verdict) = beyond_limits(rule, limits) {
        return verdict;
    }
    let mut not_in_hardware: Option<(String, String)> = None;
    for need in needs(rule) {
        if !need.is_met(limits) {
            return no(need.path(), format!("{} is not supported", need.name()));
        }
        if not_in_hardware.is_none() && !need.is_met_in_hardware(limits) {
            not_in_hardware = Some((need.path(), format!("{} is not done in hardware", need.name())));
        }
    }
    if not_in_hardware.is_none() && limits.hardware_rules == 0 {
        not_in_hardware = Some((
            "placement".to_owned(),
            "the card holds no rules itself".to_owned(),
        ));
    }
    place(rule.placement, limits.software_fallback, not_in_hardware)
}

fn place(request: PlacementRequest, fallback: bool, obstacle: Option<(String, String)>) -> Verdict {
    match (request, obstacle) {
        (PlacementRequest::Software, _) if !fallback => {
            no("placement", "the backend has no software to run rules in")
        }
        (PlacementRequest::Software, _) => Verdict::Software("the rule asks for software".to_owned()),
        (_, None) => Verdict::Hardware,
        (PlacementRequest::Any, Some((_, reason))) if fallback => Verdict::Software(reason),
        (PlacementRequest::Any | PlacementRequest::Hardware, Some((field, reason))) => no(field, reason),
    }
}

fn beyond_limits(rule: &SteeringRule, limits: &SteeringCapabilities) -> Option<Verdict> {
    let beyond = |field: &str, value: u32, limit: u32| {
        (value >= limit).then(|| no(field, format!("{value} is beyond the {limit} that there are")))
    };
    beyond("group", rule.group.0, limits.groups)
        .or_else(|| beyond("priority", rule.priority.0, limits.priorities))
        .or_else(|| {
            let target = |(index, action): (usize, &Action)| match action {
                Action::Jump(group) => beyond(&format!("actions[{index}]"), group.0, limits.groups),
                Action::Count if limits.counters == 0 => {
                    Some(no(format!("actions[{index}]"), "there are no counters"))
                }
                _ => None,
            };
            rule.actions.iter().enumerate().find_map(target)
        })
        .or_else(|| {
            (rule.idle_timeout_ms.is_some() && !limits.idle_timeout)
                .then(|| no("idle_timeout_ms", "rules do not age here"))
        })
}

fn no(field: impl Into<String>, reason: impl Into<String>) -> Verdict {
    Verdict::No {
        field: field.into(),
        reason: reason.into(),
    }
}

/// One thing that a rule needs of a card.
enum Need {
    /// A field, matched in one of these ways.
    Match(Field, MatchKinds, &'static str),
    /// An action at this index.
    Act(usize, ActionKinds, &'static str),
    /// An action that [`ActionKinds`] has no name for.
    Unknown(usize),
}

impl Need {
    fn path(&self) -> String {
        match self {
            Self::Match(field, ..) => field.path().to_owned(),
            Self::Act(index, ..) | Self::Unknown(index) => format!("actions[{index}]"),
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Match(_, _, name) | Self::Act(_, _, name) => name,
            Self::Unknown(_) => "an action of a newer contract",
        }
    }

    fn is_met(&self, limits: &SteeringCapabilities) -> bool {
        match self {
            Self::Match(field, kinds, _) => limits.fields.get(field).is_some_and(|k| k.intersects(*kinds)),
            Self::Act(_, kind, _) => limits.actions.contains(*kind),
            Self::Unknown(_) => false,
        }
    }

    fn is_met_in_hardware(&self, limits: &SteeringCapabilities) -> bool {
        match self {
            Self::Match(field, kinds, _) => limits
                .hardware_fields
                .get(field)
                .is_some_and(|k| k.intersects(*kinds)),
            Self::Act(_, kind, _) => limits.hardware_actions.contains(*kind),
            Self::Unknown(_) => false,
        }
    }
}

fn needs(rule: &SteeringRule) -> impl Iterator<Item = Need> {
    let fields = field_needs(&rule.pattern).into_iter();
    let actions = rule.actions.iter().enumerate();
    fields.chain(actions.map(|(index, action)| match action_need(action) {
        Some((kind, name)) => Need::Act(index, kind, name),
        None => Need::Unknown(index),
    }))
}

fn field_needs(pattern: &Pattern) -> Vec<Need> {
    let mac = |field, masked: Masked<dpumesh_core::MacAddr>| {
        let bits = masked.mask.0.iter().fold(0, |b, o| b << 8 | u128::from(*o));
        masked_need(field, bits, 48)
    };
    let address = |four, six, address: IpMatch| {
        let (field, width) = if address.is_ipv4() { (four, 32) } else { (six, 128) };
        masked_need(field, address_bits(address).mask, width)
    };
    let found = [
        pattern.port.map(|_| exact(Field::Port)),
        pattern.eth_src.map(|m| mac(Field::EthSrc, m)),
        pattern.eth_dst.map(|m| mac(Field::EthDst, m)),
        pattern.ethertype.map(|_| exact(Field::Ethertype)),
        pattern.vlan.map(|_| exact(Field::Vlan)),
        pattern.vni.map(|_| exact(Field::Vni)),
        pattern.ip_src.map(|a| address(Field::Ip4Src, Field::Ip6Src, a)),
        pattern.ip_dst.map(|a| address(Field::Ip4Dst, Field::Ip6Dst, a)),
        pattern.ip_proto.map(|_| exact(Field::IpProto)),
        pattern.dscp.map(|_| exact(Field::Dscp)),
        pattern.fragment.map(|_| exact(Field::Fragment)),
        pattern.l4_src.map(|range| range_need(Field::L4Src, range)),
        pattern.l4_dst.map(|range| range_need(Field::L4Dst, range)),
        pattern
            .tcp_flags
            .map(|m| masked_need(Field::TcpFlags, m.mask.bits().into(), 8)),
        pattern.mark.map(|m| masked_need(Field::Mark, m.mask.into(), 32)),
        pattern
            .ct_state
            .map(|m| masked_need(Field::CtState, m.mask.bits().into(), 8)),
    ];
    found.into_iter().flatten().collect()
}

fn exact(field: Field) -> Need {
    Need::Match(field, MatchKinds::all(), "an exact match of this field")
}

fn masked_need(field: Field, mask: u128, width: u32) -> Need {
    let ones = mask.count_ones();
    let leading = mask << (128 - width); // the widths are 8 to 128
    if ones == width {
        exact(field)
    } else if leading.leading_ones() == ones {
        let kinds = MatchKinds::PREFIX | MatchKinds::MASK;
        Need::Match(field, kinds, "a match of this field's leading bits")
    } else {
        Need::Match(field, MatchKinds::MASK, "a masked match of this field")
    }
}

fn range_need(field: Field, range: PortRange) -> Need {
    if range.first == range.last {
        exact(field)
    } else {
        Need::Match(field, MatchKinds::RANGE, "a range of this field")
    }
}

fn action_need(action: &Action) -> Option<(ActionKinds, &'static str)> {
    Some(match action {
        Action::Drop => (ActionKinds::DROP, "drop"),
        Action::Forward(_) => (ActionKinds::FORWARD, "forward"),
        Action::Punt => (ActionKinds::PUNT, "punt"),
        Action::ToKernel => (ActionKinds::TO_KERNEL, "to_kernel"),
        Action::Queue(_) => (ActionKinds::QUEUE, "queue"),
        Action::Rss(_) => (ActionKinds::QUEUE, "rss"),
        Action::Jump(_) => (ActionKinds::JUMP, "jump"),
        Action::Encapsulate(outer) => tunnel_need(outer.kind)?,
        Action::Decapsulate(kind) => tunnel_need(*kind)?,
        Action::Rewrite(field) => rewrite_need(*field)?,
        Action::DecrementTtl => (ActionKinds::TTL, "decrement_ttl"),
        Action::PushVlan(_) => (ActionKinds::VLAN, "push_vlan"),
        Action::PopVlan => (ActionKinds::VLAN, "pop_vlan"),
        Action::Mark(_) => (ActionKinds::MARK, "mark"),
        Action::Count => (ActionKinds::COUNT, "count"),
        Action::Mirror(_) => (ActionKinds::MIRROR, "mirror"),
        Action::Meter(_) => (ActionKinds::METER, "meter"),
        Action::Conntrack(_) => (ActionKinds::CONNTRACK, "conntrack"),
        _ => return None,
    })
}

fn tunnel_need(kind: TunnelKind) -> Option<(ActionKinds, &'static str)> {
    match kind {
        TunnelKind::Vxlan => Some((ActionKinds::VXLAN, "a vxlan tunnel")),
        TunnelKind::Geneve => Some((ActionKinds::GENEVE, "a geneve tunnel")),
        _ => None,
    }
}

fn rewrite_need(field: RewriteField) -> Option<(ActionKinds, &'static str)> {
    match field {
        RewriteField::EthSrc(_) | RewriteField::EthDst(_) => {
            Some((ActionKinds::REWRITE_ETH, "rewrite of a MAC"))
        }
        RewriteField::IpSrc(_) | RewriteField::IpDst(_) => {
            Some((ActionKinds::REWRITE_IP, "rewrite of an IP address"))
        }
        RewriteField::L4Src(_) | RewriteField::L4Dst(_) => {
            Some((ActionKinds::REWRITE_IP, "rewrite of an L4 port"))
        }
        RewriteField::Dscp(_) => Some((ActionKinds::REWRITE_DSCP, "rewrite of the DSCP")),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use dpumesh_core::steering::{
        Conntrack, Cookie, CtZone, EtherType, Group, IpProtocol, MeterId, Owner, Priority,
    };
    use dpumesh_core::{Capabilities, PortRef};

    use super::*;

    fn limits() -> SteeringCapabilities {
        let mut limits = Capabilities::default().steering;
        limits.hardware_rules = 8;
        limits.rules = 16;
        limits.groups = 2;
        limits.priorities = 4;
        limits.counters = 8;
        limits.software_fallback = true;
        limits.actions = ActionKinds::DROP | ActionKinds::PUNT | ActionKinds::COUNT | ActionKinds::JUMP;
        limits.hardware_actions = ActionKinds::DROP | ActionKinds::JUMP;
        limits
            .fields
            .insert(Field::L4Dst, MatchKinds::EXACT | MatchKinds::RANGE);
        limits.hardware_fields.insert(Field::L4Dst, MatchKinds::EXACT);
        limits.fields.insert(Field::IpProto, MatchKinds::EXACT);
        limits.hardware_fields.insert(Field::IpProto, MatchKinds::EXACT);
        limits.fields.insert(Field::Ip4Dst, MatchKinds::PREFIX);
        limits.hardware_fields.insert(Field::Ip4Dst, MatchKinds::PREFIX);
        limits
    }

    fn rule(pattern: Pattern, actions: Vec<Action>) -> SteeringRule {
        SteeringRule::new(Cookie(1), Owner::Agent, Priority(0), pattern, actions)
    }

    fn to_port(range: PortRange) -> Pattern {
        Pattern {
            ip_proto: Some(IpProtocol::TCP),
            l4_dst: Some(range),
            ..Pattern::default()
        }
    }

    #[test]
    fn the_field_in_the_way_is_named() {
        let any = Pattern::default;
        let cases = [
            (
                rule(any(), vec![Action::Mirror(PortRef::Uplink(0)), Action::Drop]),
                "actions[0]",
                "mirror",
            ),
            (
                rule(any(), vec![Action::Meter(MeterId(1)), Action::Drop]),
                "actions[0]",
                "meter",
            ),
            (
                rule(
                    any(),
                    vec![
                        Action::Conntrack(Conntrack {
                            zone: CtZone(1),
                            commit: true,
                        }),
                        Action::Drop,
                    ],
                ),
                "actions[0]",
                "conntrack",
            ),
            (
                rule(any(), vec![Action::Decapsulate(TunnelKind::Geneve), Action::Drop]),
                "actions[0]",
                "geneve",
            ),
            (rule(any(), vec![Action::Queue(1)]), "actions[0]", "queue"),
            (rule(any(), vec![Action::Rss(vec![1])]), "actions[0]", "rss"),
            (rule(any(), vec![Action::Jump(Group(2))]), "actions[0]", "beyond"),
            (
                rule(
                    Pattern {
                        ethertype: Some(EtherType::ARP),
                        ..any()
                    },
                    vec![Action::Drop],
                ),
                "pattern.ethertype",
                "exact",
            ),
            (
                rule(any(), vec![Action::Drop]).in_group(Group(2)),
                "group",
                "2 that there are",
            ),
            (rule(any(), vec![]), "actions", "empty"),
        ];
        for (rule, path, text) in cases {
            let Verdict::No { field, reason } = judge(&rule, &limits()) else {
                panic!("{path} must be refused");
            };
            assert_eq!(field, path);
            assert!(reason.contains(text), "{reason} should speak of {text}");
        }
    }

    #[test]
    fn software_takes_what_hardware_lacks_if_it_may() {
        let range = PortRange { first: 1, last: 9 };
        assert_eq!(
            judge(&rule(to_port(80.into()), vec![Action::Drop]), &limits()),
            Verdict::Hardware
        );
        let mut ranged = rule(to_port(range), vec![Action::Drop]);
        assert!(matches!(judge(&ranged, &limits()), Verdict::Software(_)));
        ranged.placement = PlacementRequest::Hardware;
        assert!(matches!(judge(&ranged, &limits()), Verdict::No { field, .. } if field == "pattern.l4_dst"));
        let punt = rule(Pattern::default(), vec![Action::Punt]);
        let mut alone = limits();
        alone.software_fallback = false;
        assert!(matches!(judge(&punt, &alone), Verdict::No { field, .. } if field == "actions[0]"));
        let mut soft = rule(Pattern::default(), vec![Action::Drop]);
        soft.placement = PlacementRequest::Software;
        assert!(matches!(judge(&soft, &limits()), Verdict::Software(_)));
        assert!(matches!(judge(&soft, &alone), Verdict::No { field, .. } if field == "placement"));
    }

    #[test]
    fn narrower_ways_of_matching_are_part_of_wider_ones() {
        let to = |text: &str| Pattern {
            ip_dst: Some(IpMatch::Prefix(text.parse().expect("prefix"))),
            ..Pattern::default()
        };
        let verdict = |pattern| judge(&rule(pattern, vec![Action::Drop]), &limits());
        assert_eq!(verdict(to("10.0.0.0/8")), Verdict::Hardware);
        assert_eq!(verdict(to("10.0.0.1/32")), Verdict::Hardware);
        assert!(!verdict(to("2001:db8::/32")).is_possible());
        let scattered = Pattern {
            ip_dst: Some(IpMatch::Masked(Masked {
                value: "10.0.0.1".parse().expect("address"),
                mask: "255.0.0.255".parse().expect("mask"),
            })),
            ..Pattern::default()
        };
        assert!(!verdict(scattered).is_possible());
    }
}
