//! [`compile`]: a rule as entries of exact-match tables, or the field that stands in the way.
//!
//! A card of this kind finds an entry by its whole key. A range of ports or a short prefix is therefore *expanded*: one
//! entry for each of its values, as long as a rule needs no more than [`EXPANSION`]. Everything wider is not for
//! hardware, with that reason.

use std::net::IpAddr;

use dpumesh_core::steering::{
    Action, Encapsulation, Field, IpMatch, Masked, MeterId, Pattern, PortRange, RewriteField, SteeringRule,
    TunnelKind, VlanMatch,
};
use dpumesh_core::{ActionKinds, MacAddr, MatchKinds, PortRef};

use crate::table::{self, Key, Limits, Step};

/// Most entries that one rule may become.
pub const EXPANSION: usize = 64;

/// A rule as the card holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Compiled {
    /// Which fields its keys look at.
    pub(crate) fields: u64,
    /// Its keys: one, or those it was expanded to.
    pub(crate) keys: Vec<Key>,
    /// What its entries do.
    pub(crate) steps: Vec<Do>,
    /// It counts.
    pub(crate) counts: bool,
}

/// A step that may need an object of the card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Do {
    /// Ready as it is.
    Step(Step),
    /// Into this tunnel, which the card has to know.
    Encapsulate(Encapsulation),
    /// By this meter, which somebody has to have set.
    Meter(MeterId),
}

/// Why hardware cannot hold a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Obstacle {
    /// Path within the rule.
    pub(crate) field: String,
    /// One sentence.
    pub(crate) reason: String,
}

fn obstacle<T>(field: impl Into<String>, reason: impl Into<String>) -> Result<T, Obstacle> {
    Err(Obstacle {
        field: field.into(),
        reason: reason.into(),
    })
}

/// The entries of a rule, as far as the card's abilities go; what is free in its tables is not looked at.
///
/// # Errors
/// The first thing that hardware cannot do.
pub(crate) fn compile(rule: &SteeringRule, limits: &Limits) -> Result<Compiled, Obstacle> {
    if limits.entries == 0 {
        return obstacle("placement", "the network processor steers nothing in this mode");
    }
    let beyond = |field: &str, value: u32, limit: u32| -> Result<(), Obstacle> {
        if value < limit {
            return Ok(());
        }
        obstacle(field, format!("{value} is beyond the {limit} of hardware"))
    };
    beyond("group", rule.group.0, limits.groups)?;
    beyond("priority", rule.priority.0, limits.priorities)?;
    let (fields, keys) = keys(&rule.pattern, limits.fields)?;
    let mut compiled = Compiled {
        fields,
        keys,
        steps: Vec::new(),
        counts: false,
    };
    for (index, action) in rule.actions.iter().enumerate() {
        let path = || format!("actions[{index}]");
        match action {
            Action::Count if limits.counters > 0 => compiled.counts = true,
            Action::Jump(group) => {
                beyond(&path(), group.0, limits.groups)?;
                compiled.steps.push(step(action, limits, &path)?);
            }
            _ => compiled.steps.push(step(action, limits, &path)?),
        }
    }
    if compiled.steps.len() > table::STEPS_MAX {
        let most = table::STEPS_MAX;
        return obstacle(
            "actions",
            format!("an entry of hardware has {most} steps at most"),
        );
    }
    if rule.idle_timeout_ms.is_some() && limits.ageing == 0 {
        return obstacle("idle_timeout_ms", "entries do not age in hardware");
    }
    if rule.idle_timeout_ms.is_some() && compiled.keys.len() > 1 {
        return obstacle(
            "idle_timeout_ms",
            "the rule is several entries in hardware, which age one by one",
        );
    }
    Ok(compiled)
}

/// How hardware matches fields.
///
/// The kinds that every value of a field can be had by: ranges of ports are expanded, and [`EXPANSION`] bounds them.
/// Prefixes are expanded too where they are short of few bits, which is no general ability and so not claimed.
pub(crate) fn hardware_fields(fields: u64) -> std::collections::BTreeMap<Field, MatchKinds> {
    FIELDS
        .into_iter()
        .filter(|(bit, _)| fields & bit != 0)
        .map(|(_, field)| match field {
            Field::L4Src | Field::L4Dst => (field, MatchKinds::EXACT | MatchKinds::RANGE),
            _ => (field, MatchKinds::EXACT),
        })
        .collect()
}

/// What hardware does.
pub(crate) fn hardware_actions(limits: &Limits) -> ActionKinds {
    let mut kinds = ActionKinds::empty();
    let mut has = |step: u32, kind: ActionKinds| {
        if limits.steps & (1 << step) != 0 {
            kinds |= kind;
        }
    };
    has(table::STEP_DROP, ActionKinds::DROP);
    has(table::STEP_FORWARD, ActionKinds::FORWARD);
    has(table::STEP_PUNT, ActionKinds::PUNT);
    has(table::STEP_JUMP, ActionKinds::JUMP);
    has(table::STEP_TTL, ActionKinds::TTL);
    let both = |one: u32, other: u32| limits.steps & (1 << one) != 0 && limits.steps & (1 << other) != 0;
    if both(table::STEP_ENCAPSULATE, table::STEP_DECAPSULATE) && limits.tunnels > 0 {
        kinds |= ActionKinds::VXLAN;
    }
    if both(table::STEP_SET_ETH_SRC, table::STEP_SET_ETH_DST) {
        kinds |= ActionKinds::REWRITE_ETH;
    }
    if limits.steps & (1 << table::STEP_METER) != 0 && limits.meters > 0 {
        kinds |= ActionKinds::METER;
    }
    if limits.counters > 0 {
        kinds |= ActionKinds::COUNT;
    }
    kinds
}

const FIELDS: [(u64, Field); 12] = [
    (table::FIELD_PORT, Field::Port),
    (table::FIELD_ETH_SRC, Field::EthSrc),
    (table::FIELD_ETH_DST, Field::EthDst),
    (table::FIELD_ETHERTYPE, Field::Ethertype),
    (table::FIELD_VLAN, Field::Vlan),
    (table::FIELD_IP4_SRC, Field::Ip4Src),
    (table::FIELD_IP4_DST, Field::Ip4Dst),
    (table::FIELD_IP6_SRC, Field::Ip6Src),
    (table::FIELD_IP6_DST, Field::Ip6Dst),
    (table::FIELD_IP_PROTO, Field::IpProto),
    (table::FIELD_L4_SRC, Field::L4Src),
    (table::FIELD_L4_DST, Field::L4Dst),
];

/// A port as the library numbers it.
pub fn number_of_port(port: PortRef) -> u64 {
    let number = |kind: u64, a: u16, b: u16, c: u16| {
        kind << 48 | u64::from(a) << 32 | u64::from(b) << 16 | u64::from(c)
    };
    match port {
        PortRef::Uplink(n) => number(0, n, 0, 0),
        PortRef::Pf { controller, pf } => number(1, controller.0, pf.0, 0),
        PortRef::Vf { controller, pf, vf } => number(2, controller.0, pf.0, vf.0),
        PortRef::Stack(n) => number(3, n, 0, 0),
    }
}

/// The port that the library means by a number; `None` for one that has no meaning.
pub fn port_of_number(number: u64) -> Option<PortRef> {
    let (a, b, c) = ((number >> 32) as u16, (number >> 16) as u16, number as u16);
    let port = match number >> 48 {
        0 => PortRef::Uplink(a),
        1 => PortRef::Pf {
            controller: dpumesh_core::ControllerId(a),
            pf: dpumesh_core::PfIndex(b),
        },
        2 => PortRef::Vf {
            controller: dpumesh_core::ControllerId(a),
            pf: dpumesh_core::PfIndex(b),
            vf: dpumesh_core::VfIndex(c),
        },
        3 => PortRef::Stack(a),
        _ => return None,
    };
    (number_of_port(port) == number).then_some(port)
}

/// Keys under construction: every field multiplies them by its values.
struct Keys {
    offered: u64,
    fields: u64,
    keys: Vec<Key>,
}

fn keys(pattern: &Pattern, offered: u64) -> Result<(u64, Vec<Key>), Obstacle> {
    let mut keys = Keys {
        offered,
        fields: 0,
        keys: vec![Key::default()],
    };
    if let Some(port) = pattern.port {
        keys.exact(table::FIELD_PORT, Field::Port, |key| {
            key.port = number_of_port(port)
        })?;
    }
    if let Some(mac) = pattern.eth_src {
        let mac = whole_mac(mac, Field::EthSrc)?;
        keys.exact(table::FIELD_ETH_SRC, Field::EthSrc, |key| key.eth_src = mac.0)?;
    }
    if let Some(mac) = pattern.eth_dst {
        let mac = whole_mac(mac, Field::EthDst)?;
        keys.exact(table::FIELD_ETH_DST, Field::EthDst, |key| key.eth_dst = mac.0)?;
    }
    if let Some(ethertype) = pattern.ethertype {
        keys.exact(table::FIELD_ETHERTYPE, Field::Ethertype, |key| {
            key.ethertype = ethertype.0;
        })?;
    }
    if let Some(vlan) = pattern.vlan {
        let number = match vlan {
            VlanMatch::Untagged => table::UNTAGGED,
            VlanMatch::Id(id) => id.get(),
        };
        keys.exact(table::FIELD_VLAN, Field::Vlan, |key| key.vlan = number)?;
    }
    if let Some(address) = pattern.ip_src {
        keys.address(address, true)?;
    }
    if let Some(address) = pattern.ip_dst {
        keys.address(address, false)?;
    }
    if let Some(proto) = pattern.ip_proto {
        keys.exact(table::FIELD_IP_PROTO, Field::IpProto, |key| {
            key.ip_proto = proto.0
        })?;
    }
    if let Some(range) = pattern.l4_src {
        keys.ports(range, table::FIELD_L4_SRC, Field::L4Src, |key, port| {
            key.l4_src = port
        })?;
    }
    if let Some(range) = pattern.l4_dst {
        keys.ports(range, table::FIELD_L4_DST, Field::L4Dst, |key, port| {
            key.l4_dst = port
        })?;
    }
    let never = [
        (pattern.vni.is_some(), Field::Vni),
        (pattern.dscp.is_some(), Field::Dscp),
        (pattern.fragment.is_some(), Field::Fragment),
        (pattern.tcp_flags.is_some(), Field::TcpFlags),
        (pattern.mark.is_some(), Field::Mark),
        (pattern.ct_state.is_some(), Field::CtState),
    ];
    match never.into_iter().find(|(is_there, _)| *is_there) {
        Some((_, field)) => obstacle(field.path(), "hardware does not look at this field"),
        None => Ok((keys.fields, keys.keys)),
    }
}

fn whole_mac(mac: Masked<MacAddr>, field: Field) -> Result<MacAddr, Obstacle> {
    if mac.mask == MacAddr::BROADCAST {
        return Ok(mac.value);
    }
    obstacle(
        field.path(),
        "hardware matches whole addresses, and a mask of a MAC is not expanded",
    )
}

impl Keys {
    fn offers(&mut self, bit: u64, field: Field) -> Result<(), Obstacle> {
        if self.offered & bit == 0 {
            return obstacle(field.path(), "hardware does not look at this field");
        }
        self.fields |= bit;
        Ok(())
    }

    fn exact(&mut self, bit: u64, field: Field, set: impl Fn(&mut Key)) -> Result<(), Obstacle> {
        self.offers(bit, field)?;
        self.keys.iter_mut().for_each(set);
        Ok(())
    }

    fn expand(&mut self, field: Field, count: u128, set: impl Fn(&mut Key, u128)) -> Result<(), Obstacle> {
        let have = self.keys.len() as u128;
        if count > EXPANSION as u128 / have {
            let need = count.saturating_mul(have);
            let reason = format!(
                "hardware matches whole keys: the rule would be {need} entries, at most {EXPANSION} are made"
            );
            return obstacle(field.path(), reason);
        }
        let keys = std::mem::take(&mut self.keys);
        for key in keys {
            for i in 0..count {
                let mut one = key;
                set(&mut one, i);
                self.keys.push(one);
            }
        }
        Ok(())
    }

    fn ports(
        &mut self,
        range: PortRange,
        bit: u64,
        field: Field,
        set: impl Fn(&mut Key, u16),
    ) -> Result<(), Obstacle> {
        self.offers(bit, field)?;
        let count = u128::from(range.last.saturating_sub(range.first)) + 1;
        self.expand(field, count, |key, i| set(key, range.first + i as u16))
    }

    fn address(&mut self, address: IpMatch, is_source: bool) -> Result<(), Obstacle> {
        let (bit, field) = match (address.is_ipv4(), is_source) {
            (true, true) => (table::FIELD_IP4_SRC, Field::Ip4Src),
            (true, false) => (table::FIELD_IP4_DST, Field::Ip4Dst),
            (false, true) => (table::FIELD_IP6_SRC, Field::Ip6Src),
            (false, false) => (table::FIELD_IP6_DST, Field::Ip6Dst),
        };
        self.offers(bit, field)?;
        let (value, mask) = match address {
            IpMatch::Prefix(prefix) => (prefix.addr(), prefix.netmask()),
            IpMatch::Masked(masked) => (masked.value, masked.mask),
        };
        let (width, value, mask) = (width(value), bits(value), bits(mask));
        let open: Vec<u32> = (0..width).filter(|bit| mask >> bit & 1 == 0).collect();
        let count = 1_u128.checked_shl(open.len() as u32).unwrap_or(u128::MAX);
        let is_v4 = width == 32;
        self.expand(field, count, |key, i| {
            let chosen = open
                .iter()
                .enumerate()
                .fold(value & mask, |bits, (n, bit)| bits | (i >> n & 1) << bit);
            let octets = if is_v4 {
                let mut octets = [0; 16];
                octets[..4].copy_from_slice(&(chosen as u32).to_be_bytes());
                octets
            } else {
                chosen.to_be_bytes()
            };
            if is_source {
                key.ip_src = octets;
            } else {
                key.ip_dst = octets;
            }
        })
    }
}

fn width(address: IpAddr) -> u32 {
    if address.is_ipv4() { 32 } else { 128 }
}

fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u128::from(u32::from(v4)),
        IpAddr::V6(v6) => u128::from(v6),
    }
}

fn step(action: &Action, limits: &Limits, path: &dyn Fn() -> String) -> Result<Do, Obstacle> {
    let plain = |kind, arg| Step {
        kind,
        arg,
        ..Step::default()
    };
    let mac = |kind, mac: MacAddr| Step {
        kind,
        mac: mac.0,
        ..Step::default()
    };
    let (kind, done) = match action {
        Action::Drop => (table::STEP_DROP, Do::Step(plain(table::STEP_DROP, 0))),
        Action::Forward(port) => {
            let step = plain(table::STEP_FORWARD, number_of_port(*port));
            (table::STEP_FORWARD, Do::Step(step))
        }
        Action::Punt => (table::STEP_PUNT, Do::Step(plain(table::STEP_PUNT, 0))),
        Action::Jump(group) => {
            let step = plain(table::STEP_JUMP, group.0.into());
            (table::STEP_JUMP, Do::Step(step))
        }
        Action::DecrementTtl => (table::STEP_TTL, Do::Step(plain(table::STEP_TTL, 0))),
        Action::Rewrite(RewriteField::EthSrc(to)) => (
            table::STEP_SET_ETH_SRC,
            Do::Step(mac(table::STEP_SET_ETH_SRC, *to)),
        ),
        Action::Rewrite(RewriteField::EthDst(to)) => (
            table::STEP_SET_ETH_DST,
            Do::Step(mac(table::STEP_SET_ETH_DST, *to)),
        ),
        Action::Encapsulate(outer) if outer.kind == TunnelKind::Vxlan && limits.tunnels > 0 => {
            (table::STEP_ENCAPSULATE, Do::Encapsulate(outer.clone()))
        }
        Action::Decapsulate(TunnelKind::Vxlan) => (
            table::STEP_DECAPSULATE,
            Do::Step(plain(table::STEP_DECAPSULATE, 0)),
        ),
        Action::Meter(meter) if meter.0 < limits.meters => (table::STEP_METER, Do::Meter(*meter)),
        Action::Meter(meter) if limits.meters > 0 => {
            let reason = format!("{} is beyond the {} meters", meter.0, limits.meters);
            return obstacle(path(), reason);
        }
        _ => return obstacle(path(), "hardware does not do this"),
    };
    if limits.steps & (1 << kind) == 0 {
        return obstacle(path(), "hardware does not do this");
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use dpumesh_core::steering::{Cookie, EtherType, Group, IpProtocol, Owner, Priority, TcpFlags};
    use ipnet::IpNet;
    use proptest::prelude::*;

    use super::*;

    fn limits() -> Limits {
        Limits {
            groups: 4,
            priorities: 4,
            profiles: 8,
            fields: (1 << 12) - 1,
            steps: 0x7fe,
            entries: 100,
            tables: 64,
            counters: 8,
            meters: 4,
            tunnels: 4,
            ageing: 1,
            ..Limits::default()
        }
    }

    fn rule(pattern: Pattern) -> SteeringRule {
        SteeringRule::new(Cookie(1), Owner::Agent, Priority(0), pattern, vec![Action::Drop])
    }

    fn net(text: &str) -> Option<IpMatch> {
        Some(text.parse::<IpNet>().expect("a prefix").into())
    }

    #[test]
    fn ranges_and_short_prefixes_are_expanded() {
        let pattern = Pattern {
            ip_dst: net("10.0.0.4/30"),
            ip_proto: Some(IpProtocol::TCP),
            l4_dst: Some(PortRange { first: 80, last: 83 }),
            ..Pattern::default()
        };
        let compiled = compile(&rule(pattern), &limits()).expect("fits");
        assert_eq!(compiled.keys.len(), 16);
        let mut seen: Vec<(u8, u16)> = compiled
            .keys
            .iter()
            .map(|key| (key.ip_dst[3], key.l4_dst))
            .collect();
        seen.sort_unstable();
        let expected: Vec<(u8, u16)> = (4..8)
            .flat_map(|host| (80..84).map(move |port| (host, port)))
            .collect();
        assert_eq!(seen, expected);
    }

    #[test]
    fn what_hardware_cannot_hold_is_told_with_the_field() {
        let tcp = Pattern {
            ip_proto: Some(IpProtocol::TCP),
            ..Pattern::default()
        };
        let cases = [
            (
                Pattern {
                    ip_src: net("10.0.0.0/8"),
                    ..Pattern::default()
                },
                "pattern.ip_src",
                "16777216 entries",
            ),
            (
                Pattern {
                    ip_dst: net("::/0"),
                    ..Pattern::default()
                },
                "pattern.ip_dst",
                "whole keys",
            ),
            (
                Pattern {
                    l4_src: Some(PortRange { first: 1, last: 65 }),
                    ..tcp.clone()
                },
                "pattern.l4_src",
                "65 entries",
            ),
            (
                Pattern {
                    tcp_flags: Some(Masked {
                        value: TcpFlags::SYN,
                        mask: TcpFlags::SYN,
                    }),
                    ..tcp.clone()
                },
                "pattern.tcp_flags",
                "does not look",
            ),
            (
                Pattern {
                    eth_src: Some(Masked {
                        value: MacAddr([2; 6]),
                        mask: MacAddr([0xff, 0, 0, 0, 0, 0]),
                    }),
                    ..Pattern::default()
                },
                "pattern.eth_src",
                "whole addresses",
            ),
        ];
        for (pattern, field, reason) in cases {
            let found = compile(&rule(pattern), &limits()).expect_err(field);
            assert_eq!(found.field, field);
            assert!(found.reason.contains(reason), "{found:?}");
        }
        let far = rule(Pattern::default()).in_group(Group(4));
        assert_eq!(compile(&far, &limits()).expect_err("beyond").field, "group");
        let mut conntrack = rule(Pattern {
            ethertype: Some(EtherType::IPV4),
            ..Pattern::default()
        });
        conntrack.actions.insert(0, Action::Mark(1));
        assert_eq!(
            compile(&conntrack, &limits()).expect_err("mark").field,
            "actions[0]"
        );
    }

    #[test]
    fn ports_are_numbered_one_to_one() {
        for text in [
            "uplink0",
            "uplink65535",
            "c0pf1",
            "c2pf1vf7",
            "c65535pf65535vf65535",
            "stack3",
        ] {
            let port: PortRef = text.parse().expect("a port");
            assert_eq!(port_of_number(number_of_port(port)), Some(port));
        }
        for number in [4 << 48, 1, 1 << 48 | 1, u64::MAX] {
            assert_eq!(port_of_number(number), None);
        }
    }

    proptest! {
        /// A key is made for exactly the addresses that the pattern means.
        #[test]
        fn a_masked_address_becomes_its_addresses(value: u32, open in 0_u32..64, shift in 0_u32..27) {
            let mask = !(open << shift);
            let value = value & mask;
            let address = IpMatch::Masked(Masked {
                value: IpAddr::V4(value.into()),
                mask: IpAddr::V4(mask.into()),
            });
            let pattern = Pattern { ip_dst: Some(address), ..Pattern::default() };
            let compiled = compile(&rule(pattern), &limits()).expect("at most 64");
            let mut found: Vec<u32> = compiled.keys.iter()
                .map(|key| u32::from_be_bytes([key.ip_dst[0], key.ip_dst[1], key.ip_dst[2], key.ip_dst[3]]))
                .collect();
            found.sort_unstable();
            found.dedup();
            prop_assert_eq!(found.len(), 1 << open.count_ones());
            prop_assert!(found.iter().all(|found| found & mask == value));
        }
    }
}
