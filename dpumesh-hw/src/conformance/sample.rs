//! [`Sampler`]: rules, patterns and actions made from nothing but what a card claims.
//!
//! A case must not ask for more than the card offers, or it would test the kit's taste. The sampler picks one key field
//! with many values, so that `pattern(i)` and `pattern(j)` never overlap, and two final actions that differ.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use dpumesh_core::steering::{
    Action, Conntrack, Cookie, CtStates, CtZone, DscpMatch, Encapsulation, EtherType, Field, FragmentMatch,
    IpMatch, IpProtocol, Masked, MeterId, Owner, Pattern, PortRange, Priority, RewriteField, SteeringRule,
    TcpFlags, TunnelKind, VlanMatch,
};
use dpumesh_core::{
    ActionKinds, Backend, BackendExt, MacAddr, MatchKinds, PortRef, SteeringCapabilities, VlanId, Vni,
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::Rig;
use super::check::Halt;

/// The owner that cases act as.
pub(super) const MINE: Owner = Owner::Agent;
/// The owner that must not be touched.
pub(super) const THEIRS: Owner = Owner::User(7);

/// Makes rules that a card claims to hold.
#[derive(Debug)]
pub(super) struct Sampler {
    claims: SteeringCapabilities,
    key: Field,
    port: PortRef,
    finals: Vec<Action>,
}

impl Sampler {
    /// A sampler of what the SoC's half claims.
    pub(super) async fn new(rig: &dyn Rig) -> Result<Self, Halt> {
        let claims = rig.soc().capabilities().steering;
        let port = some_port(rig).await?;
        let exact = |fields: &std::collections::BTreeMap<Field, MatchKinds>| {
            KEYS.into_iter().find(|field| {
                covers(
                    *field,
                    fields.get(field).copied().unwrap_or_default(),
                    MatchKinds::EXACT,
                )
            })
        };
        let Some(key) = exact(&claims.hardware_fields).or_else(|| exact(&claims.fields)) else {
            return Err(Halt::failed(
                "steering.fields claims no field by which two rules could be told apart",
            ));
        };
        let finals: Vec<Action> = final_actions(port)
            .into_iter()
            .filter(|action| claims.actions.contains(kind_of(action)))
            .collect();
        if finals.is_empty() {
            return Err(Halt::failed(
                "steering.actions claims no final action: no rule could end",
            ));
        }
        Ok(Self {
            claims,
            key,
            port,
            finals,
        })
    }

    /// What the card claims.
    pub(super) fn claims(&self) -> &SteeringCapabilities {
        &self.claims
    }

    /// A port that exists.
    pub(super) fn port(&self) -> PortRef {
        self.port
    }

    /// The `i`-th pattern, below 65,536; no frame matches two of them.
    pub(super) fn pattern(&self, i: u32) -> Pattern {
        keyed(self.key, i)
    }

    /// The usual actions of a rule.
    pub(super) fn actions(&self) -> Vec<Action> {
        vec![self.finals[0].clone()]
    }

    /// Actions that differ from the usual ones.
    ///
    /// # Errors
    /// `NotSupported` when the card knows only one thing to do.
    pub(super) fn other_actions(&self) -> Result<Vec<Action>, Halt> {
        if let Some(action) = self.finals.get(1) {
            return Ok(vec![action.clone()]);
        }
        let steps = [
            (ActionKinds::COUNT, Action::Count),
            (ActionKinds::MARK, Action::Mark(1)),
            (ActionKinds::TTL, Action::DecrementTtl),
        ];
        steps
            .into_iter()
            .find(|(kind, _)| self.claims.actions.contains(*kind))
            .map(|(_, step)| vec![step, self.finals[0].clone()])
            .ok_or_else(|| Halt::not_supported("steering.actions", "only one list of actions can be made"))
    }

    /// My `i`-th rule: cookie `i`, pattern `i`, priority 0, the usual actions.
    pub(super) fn rule(&self, i: u32) -> SteeringRule {
        SteeringRule::new(
            Cookie(u128::from(i)),
            MINE,
            Priority(0),
            self.pattern(i),
            self.actions(),
        )
    }

    /// My `i`-th rule, counting.
    pub(super) fn counting(&self, i: u32) -> SteeringRule {
        let mut rule = self.rule(i);
        rule.actions.insert(0, Action::Count);
        rule
    }

    /// Another owner's `i`-th rule.
    pub(super) fn their_rule(&self, i: u32) -> SteeringRule {
        SteeringRule {
            owner: THEIRS,
            ..self.rule(i)
        }
    }
}

/// A port that exists: the first VF, or the first port there is.
pub(super) async fn some_port(rig: &dyn Rig) -> Result<PortRef, Halt> {
    let host = rig.host();
    if let Some(vf) = host.vf()
        && let Some(state) = vf.list().await?.first()
    {
        return Ok(state.port);
    }
    let soc = rig.soc();
    match soc.ports() {
        Some(ports) => Ok(ports
            .list()
            .await?
            .first()
            .map_or(PortRef::Uplink(0), |info| info.port)),
        None => Ok(PortRef::Uplink(0)),
    }
}

/// A port that no card has.
pub(super) const NO_PORT: PortRef = PortRef::Uplink(u16::MAX);

/// The SoC half's steering part and fence, which cases use in each line.
pub(super) fn fence_of(backend: &dyn Backend) -> dpumesh_core::Fence {
    backend.fence()
}

const KEYS: [Field; 9] = [
    Field::Ip4Dst,
    Field::Ip4Src,
    Field::Ip6Dst,
    Field::Ip6Src,
    Field::EthDst,
    Field::EthSrc,
    Field::Mark,
    Field::L4Dst,
    Field::Vni,
];

fn keyed(field: Field, i: u32) -> Pattern {
    let v4 = IpAddr::V4(Ipv4Addr::from(0x0a00_0000 | (i & 0x00ff_ffff)));
    let v6 = IpAddr::V6(Ipv6Addr::from(
        0xfd00_0000_0000_0000_0000_0000_0000_0000 | u128::from(i),
    ));
    let [a, b, c, d] = i.to_be_bytes();
    let mac = Masked {
        value: MacAddr([2, 0x50, a, b, c, d]),
        mask: MacAddr::BROADCAST,
    };
    let mut pattern = Pattern::default();
    match field {
        Field::Ip4Src => pattern.ip_src = Some(v4.into()),
        Field::Ip6Dst => pattern.ip_dst = Some(v6.into()),
        Field::Ip6Src => pattern.ip_src = Some(v6.into()),
        Field::EthDst => pattern.eth_dst = Some(mac),
        Field::EthSrc => pattern.eth_src = Some(mac),
        Field::Mark => {
            pattern.mark = Some(Masked {
                value: i,
                mask: u32::MAX,
            });
        }
        Field::L4Dst => {
            pattern.ip_proto = Some(IpProtocol::TCP);
            pattern.l4_dst = Some((i as u16).into());
        }
        Field::Vni => pattern.vni = Vni::try_from(i & 0x00ff_ffff).ok(),
        _ => pattern.ip_dst = Some(v4.into()),
    }
    pattern
}

/// Which kinds of match a card that claims `claimed` for a field must take, or may take, when asked for `asked`.
pub(super) fn covers(field: Field, claimed: MatchKinds, asked: MatchKinds) -> bool {
    let is_port = matches!(field, Field::L4Src | Field::L4Dst);
    let wider = match asked {
        MatchKinds::EXACT => MatchKinds::all(),
        MatchKinds::PREFIX if is_port => MatchKinds::PREFIX | MatchKinds::MASK | MatchKinds::RANGE,
        MatchKinds::PREFIX => MatchKinds::PREFIX | MatchKinds::MASK,
        other => other,
    };
    claimed.intersects(wider)
}

/// Every field that a pattern has.
pub(super) const FIELDS: [Field; 18] = [
    Field::Port,
    Field::EthSrc,
    Field::EthDst,
    Field::Ethertype,
    Field::Vlan,
    Field::Vni,
    Field::Ip4Src,
    Field::Ip4Dst,
    Field::Ip6Src,
    Field::Ip6Dst,
    Field::IpProto,
    Field::Dscp,
    Field::Fragment,
    Field::L4Src,
    Field::L4Dst,
    Field::TcpFlags,
    Field::Mark,
    Field::CtState,
];

/// A pattern that looks at a field in this way, and at as little else as the contract allows; `None` when a pattern has no
/// words for it.
pub(super) fn pattern_of(field: Field, kind: MatchKinds, port: PortRef) -> Option<Pattern> {
    let exact = kind == MatchKinds::EXACT;
    let mut pattern = Pattern::default();
    match field {
        Field::EthSrc => pattern.eth_src = Some(mac_match(kind)?),
        Field::EthDst => pattern.eth_dst = Some(mac_match(kind)?),
        Field::Ip4Src => pattern.ip_src = Some(v4_match(kind)?),
        Field::Ip4Dst => pattern.ip_dst = Some(v4_match(kind)?),
        Field::Ip6Src => pattern.ip_src = Some(v6_match(kind)?),
        Field::Ip6Dst => pattern.ip_dst = Some(v6_match(kind)?),
        Field::L4Src => {
            pattern.ip_proto = Some(IpProtocol::TCP);
            pattern.l4_src = Some(port_match(kind)?);
        }
        Field::L4Dst => {
            pattern.ip_proto = Some(IpProtocol::TCP);
            pattern.l4_dst = Some(port_match(kind)?);
        }
        Field::TcpFlags => {
            pattern.ip_proto = Some(IpProtocol::TCP);
            pattern.tcp_flags = Some(Masked {
                value: TcpFlags::SYN,
                mask: bits(kind, TcpFlags::all(), TcpFlags::SYN | TcpFlags::RST)?,
            });
        }
        Field::Mark => {
            pattern.mark = Some(Masked {
                value: 0x0100,
                mask: bits(kind, u32::MAX, 0x0f0f)?,
            });
        }
        Field::CtState => {
            pattern.ct_state = Some(Masked {
                value: CtStates::TRACKED,
                mask: bits(kind, CtStates::all(), CtStates::TRACKED | CtStates::INVALID)?,
            });
        }
        _ if !exact => return None,
        Field::Port => pattern.port = Some(port),
        Field::Ethertype => pattern.ethertype = Some(EtherType::IPV4),
        Field::Vlan => pattern.vlan = Some(VlanMatch::Id(VlanId::try_from(7).ok()?)),
        Field::Vni => pattern.vni = Some(Vni::try_from(7).ok()?),
        Field::IpProto => pattern.ip_proto = Some(IpProtocol::TCP),
        Field::Dscp => pattern.dscp = Some(DscpMatch(10)),
        Field::Fragment => pattern.fragment = Some(FragmentMatch::Any),
        _ => return None,
    }
    Some(pattern)
}

/// The same pattern with more of the context that some cards want: an EtherType, a protocol, a port.
pub(super) fn in_context(pattern: &Pattern, port: PortRef) -> Vec<Pattern> {
    let ethertype = match pattern.ip_src.or(pattern.ip_dst) {
        Some(address) if !address.is_ipv4() => EtherType::IPV6,
        _ => EtherType::IPV4,
    };
    let typed = Pattern {
        ethertype: pattern.ethertype.or(Some(ethertype)),
        ..pattern.clone()
    };
    let tcp = Pattern {
        ip_proto: Some(IpProtocol::TCP),
        ..typed.clone()
    };
    let placed = |pattern: &Pattern| Pattern {
        port: Some(port),
        ..pattern.clone()
    };
    vec![
        pattern.clone(),
        placed(pattern),
        typed.clone(),
        placed(&typed),
        tcp.clone(),
        placed(&tcp),
    ]
}

fn bits<T>(kind: MatchKinds, all: T, some: T) -> Option<T> {
    match kind {
        MatchKinds::EXACT => Some(all),
        MatchKinds::MASK => Some(some),
        _ => None,
    }
}

fn mac_match(kind: MatchKinds) -> Option<Masked<MacAddr>> {
    let mask = match kind {
        MatchKinds::EXACT => [0xff; 6],
        MatchKinds::PREFIX => [0xff, 0xff, 0xff, 0, 0, 0],
        MatchKinds::MASK => [0xff, 0, 0xff, 0, 0xff, 0],
        _ => return None,
    };
    let value = MacAddr([2, 0, 0x50, 0, 0, 0]);
    Some(Masked {
        value,
        mask: MacAddr(mask),
    })
}

fn v4_match(kind: MatchKinds) -> Option<IpMatch> {
    Some(match kind {
        MatchKinds::EXACT => IpAddr::V4(Ipv4Addr::new(10, 9, 8, 7)).into(),
        MatchKinds::PREFIX => IpNet::from(Ipv4Net::new(Ipv4Addr::new(10, 9, 0, 0), 16).ok()?).into(),
        MatchKinds::MASK => IpMatch::Masked(Masked {
            value: Ipv4Addr::new(10, 0, 8, 0).into(),
            mask: Ipv4Addr::new(255, 0, 255, 0).into(),
        }),
        _ => return None,
    })
}

fn v6_match(kind: MatchKinds) -> Option<IpMatch> {
    let address = Ipv6Addr::new(0xfd00, 9, 8, 0, 0, 0, 0, 0);
    Some(match kind {
        MatchKinds::EXACT => IpAddr::V6(address).into(),
        MatchKinds::PREFIX => IpNet::from(Ipv6Net::new(address, 48).ok()?).into(),
        MatchKinds::MASK => IpMatch::Masked(Masked {
            value: Ipv6Addr::new(0xfd00, 0, 8, 0, 0, 0, 0, 0).into(),
            mask: Ipv6Addr::new(0xffff, 0, 0xffff, 0, 0, 0, 0, 0).into(),
        }),
        _ => return None,
    })
}

fn port_match(kind: MatchKinds) -> Option<PortRange> {
    Some(match kind {
        MatchKinds::EXACT => 80.into(),
        MatchKinds::RANGE => PortRange {
            first: 1001,
            last: 1006,
        },
        _ => return None,
    })
}

/// An action of each kind that the capabilities name, as a rule's whole list.
pub(super) fn actions_of(kind: ActionKinds, port: PortRef, end: &Action) -> Vec<Vec<Action>> {
    let then = |step: Action| vec![vec![step, end.clone()]];
    let tunnel = |kind| {
        let outer = Encapsulation {
            kind,
            vni: Vni::try_from(7).expect("7 fits 24 bits"),
            local: Ipv4Addr::new(192, 0, 2, 1).into(),
            remote: Ipv4Addr::new(192, 0, 2, 2).into(),
            eth_src: MacAddr([2, 0, 0, 0, 0, 1]),
            eth_dst: MacAddr([2, 0, 0, 0, 0, 2]),
        };
        vec![
            vec![Action::Encapsulate(outer), end.clone()],
            vec![Action::Decapsulate(kind), end.clone()],
        ]
    };
    match kind {
        ActionKinds::DROP => vec![vec![Action::Drop]],
        ActionKinds::FORWARD => vec![vec![Action::Forward(port)]],
        ActionKinds::PUNT => vec![vec![Action::Punt]],
        ActionKinds::TO_KERNEL => vec![vec![Action::ToKernel]],
        ActionKinds::QUEUE => vec![vec![Action::Queue(0)], vec![Action::Rss(vec![0])]],
        ActionKinds::JUMP => vec![vec![Action::Jump(dpumesh_core::steering::Group(1))]],
        ActionKinds::VXLAN => tunnel(TunnelKind::Vxlan),
        ActionKinds::GENEVE => tunnel(TunnelKind::Geneve),
        ActionKinds::REWRITE_ETH => then(Action::Rewrite(RewriteField::EthDst(MacAddr([2, 0, 0, 0, 0, 9])))),
        ActionKinds::REWRITE_IP => then(Action::Rewrite(RewriteField::IpDst(
            Ipv4Addr::new(192, 0, 2, 9).into(),
        ))),
        ActionKinds::REWRITE_DSCP => then(Action::Rewrite(RewriteField::Dscp(10))),
        ActionKinds::TTL => then(Action::DecrementTtl),
        ActionKinds::VLAN => [
            Action::PushVlan(VlanId::try_from(7).expect("7 is a VLAN")),
            Action::PopVlan,
        ]
        .into_iter()
        .map(|step| vec![step, end.clone()])
        .collect(),
        ActionKinds::MARK => then(Action::Mark(7)),
        ActionKinds::COUNT => then(Action::Count),
        ActionKinds::MIRROR => then(Action::Mirror(port)),
        ActionKinds::METER => then(Action::Meter(MeterId(0))),
        ActionKinds::CONNTRACK => then(Action::Conntrack(Conntrack {
            zone: CtZone(0),
            commit: false,
        })),
        _ => Vec::new(),
    }
}

fn final_actions(port: PortRef) -> [Action; 5] {
    [
        Action::Drop,
        Action::Punt,
        Action::Forward(port),
        Action::ToKernel,
        Action::Queue(0),
    ]
}

fn kind_of(action: &Action) -> ActionKinds {
    match action {
        Action::Drop => ActionKinds::DROP,
        Action::Punt => ActionKinds::PUNT,
        Action::Forward(_) => ActionKinds::FORWARD,
        Action::ToKernel => ActionKinds::TO_KERNEL,
        _ => ActionKinds::QUEUE,
    }
}
