//! Steering rules compiled for the worker: matches for the classifier, steps for `act`, a verdict.
//!
//! A port range becomes several matches of one rule, as does "any fragment". A pattern about L4 ports or TCP flags also says "no later
//! fragment", because those carry no L4 header and their key reads zero.

use std::net::IpAddr;

use dpumesh_core::steering::{
    Action, Encapsulation, FragmentMatch, Group, IpMatch, IpProtocol, Pattern, PortRange, RewriteField,
    SteeringRule, TunnelKind, VlanMatch,
};
use dpumesh_core::{PortRef, Vni};

use super::port::PortIndex;
use crate::flow::{FlowFlags, Match, PortMask, Rule, RuleIndex, Zone, range_to_masks};
use crate::wire::encap::{Endpoints, OuterChecksum, Tunnel};
use crate::wire::vxlan;

/// Matches that one rule may become.
const MAX_MATCHES: usize = 1024;

/// A rule that the engine cannot carry out; names the field, as verdicts do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct Refused {
    /// Path of the field within the rule.
    pub field: String,
    /// Why not.
    pub reason: String,
    /// True when a table is full: the rule may find room later.
    pub full: bool,
}

impl Refused {
    /// Something the engine cannot do.
    pub(super) fn new(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self {
            field: field.into(),
            reason: reason.into(),
            full: false,
        }
    }

    /// Something there is no room for now.
    pub(super) fn full(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self {
            full: true,
            ..Self::new(field, reason)
        }
    }
}

/// Names that rules use and the engine numbers.
pub(super) trait Numbering {
    /// Index of a port.
    fn port(&mut self, port: PortRef) -> Option<PortIndex>;
    /// Bits of a zone that say: came out of a tunnel with this VNI.
    fn tunnel(&mut self, vni: Vni) -> Option<u16>;
}

/// Why the engine could not carry out this rule, whatever is installed.
pub(super) fn refusal(rule: &SteeringRule) -> Option<Refused> {
    /// Numbers enough for everybody: they are not looked at.
    struct Endless;
    impl Numbering for Endless {
        fn port(&mut self, _: PortRef) -> Option<PortIndex> {
            Some(PortIndex(0))
        }

        fn tunnel(&mut self, _: Vni) -> Option<u16> {
            Some(0)
        }
    }
    compile(rule, RuleIndex(0), &mut Endless).err()
}

/// A rule as the worker holds it.
#[derive(Clone, Debug)]
pub(super) struct CompiledRule {
    pub(super) group: Group,
    /// The VNI whose number the matches hold.
    pub(super) vni: Option<Vni>,
    pub(super) rules: Vec<Rule>,
    pub(super) steps: Box<[Step]>,
    pub(super) verdict: Verdict,
}

/// One step on a frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Rewrite(RewriteField),
    DecrementTtl,
    PushVlan(dpumesh_core::VlanId),
    PopVlan,
    Mark(u32),
    Encapsulate(Box<Tunnel>),
    Decapsulate,
}

/// Where the frame goes after the steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Drop,
    Forward(PortIndex),
    Punt,
    Jump(Group),
}

/// Compiles a rule that passed [`SteeringRule::check`].
pub(super) fn compile(
    rule: &SteeringRule,
    index: RuleIndex,
    numbering: &mut dyn Numbering,
) -> Result<CompiledRule, Refused> {
    let rules = matches(&rule.pattern, numbering)?
        .into_iter()
        .map(|matching| Rule {
            matching,
            priority: rule.priority.0,
            index,
        })
        .collect();
    let (steps, verdict) = steps(&rule.actions, numbering)?;
    Ok(CompiledRule {
        group: rule.group,
        vni: rule.pattern.vni,
        rules,
        steps,
        verdict,
    })
}

fn steps(actions: &[Action], numbering: &mut dyn Numbering) -> Result<(Box<[Step]>, Verdict), Refused> {
    let mut steps = Vec::new();
    let mut verdict = Verdict::Drop;
    for (at, action) in actions.iter().enumerate() {
        let refuse = |reason: &str| Refused::new(format!("actions[{at}]"), reason);
        match action {
            Action::Drop => verdict = Verdict::Drop,
            Action::Forward(port) => {
                let port = numbering.port(*port).ok_or_else(|| {
                    Refused::full(
                        format!("actions[{at}]"),
                        "more ports than the dataplane can number",
                    )
                })?;
                verdict = Verdict::Forward(port);
            }
            Action::Punt => verdict = Verdict::Punt,
            Action::Jump(group) => verdict = Verdict::Jump(*group),
            Action::Count => {}
            Action::Mark(mark) => steps.push(Step::Mark(*mark)),
            Action::Rewrite(field) => steps.push(Step::Rewrite(*field)),
            Action::DecrementTtl => steps.push(Step::DecrementTtl),
            Action::PushVlan(id) => steps.push(Step::PushVlan(*id)),
            Action::PopVlan => steps.push(Step::PopVlan),
            Action::Encapsulate(outer) if outer.kind == TunnelKind::Vxlan => {
                let tunnel =
                    tunnel(outer).ok_or_else(|| refuse("local and remote are of two address families"))?;
                steps.push(Step::Encapsulate(Box::new(tunnel)));
            }
            Action::Decapsulate(TunnelKind::Vxlan) => steps.push(Step::Decapsulate),
            _ => return Err(refuse("the software dataplane does not carry out this action")),
        }
    }
    Ok((steps.into_boxed_slice(), verdict))
}

/// Without an outer checksum over IPv4, as RFC 7348 prefers; with one over IPv6, which demands it.
fn tunnel(outer: &Encapsulation) -> Option<Tunnel> {
    let (endpoints, checksum) = match (outer.local, outer.remote) {
        (IpAddr::V4(local), IpAddr::V4(remote)) => (Endpoints::V4 { local, remote }, OuterChecksum::Absent),
        (IpAddr::V6(local), IpAddr::V6(remote)) => (Endpoints::V6 { local, remote }, OuterChecksum::Complete),
        _ => return None,
    };
    let (eth_src, eth_dst, vni) = (outer.eth_src, outer.eth_dst, outer.vni);
    Some(Tunnel {
        eth_src,
        eth_dst,
        endpoints,
        ttl: 64,
        port: vxlan::PORT,
        vni,
        checksum,
    })
}

fn matches(pattern: &Pattern, numbering: &mut dyn Numbering) -> Result<Vec<Match>, Refused> {
    if pattern.ct_state.is_some() {
        return Err(Refused::new(
            "pattern.ct_state",
            "the software dataplane does not track connections",
        ));
    }
    if pattern.ip_proto == Some(IpProtocol::SCTP) && (pattern.l4_src.is_some() || pattern.l4_dst.is_some()) {
        return Err(Refused::new(
            "pattern.ip_proto",
            "the software dataplane reads the ports of TCP and UDP only",
        ));
    }
    let base = addresses(pattern, l2(pattern)?)?;
    let base = zone(pattern, base, numbering)?;
    let fragments = fragments(pattern);
    let sources = ports("pattern.l4_src", pattern.l4_src)?;
    let destinations = ports("pattern.l4_dst", pattern.l4_dst)?;
    if fragments.len() * sources.len() * destinations.len() > MAX_MATCHES {
        return Err(Refused::new(
            "pattern.l4_dst",
            format!("the port ranges need more than {MAX_MATCHES} matches"),
        ));
    }
    let mut all = Vec::with_capacity(fragments.len() * sources.len() * destinations.len());
    for (value, mask) in fragments {
        for source in &sources {
            for destination in &destinations {
                let mut matching = base.flags(value, mask);
                if let Some(port) = source {
                    matching = matching.src_port(*port);
                }
                if let Some(port) = destination {
                    matching = matching.dst_port(*port);
                }
                all.push(matching);
            }
        }
    }
    Ok(all)
}

fn l2(pattern: &Pattern) -> Result<Match, Refused> {
    let mut matching = Match::any();
    if let Some(mac) = pattern.eth_src {
        matching = matching.eth_src(mac.value.0, mac.mask.0);
    }
    if let Some(mac) = pattern.eth_dst {
        matching = matching.eth_dst(mac.value.0, mac.mask.0);
    }
    if let Some(ethertype) = pattern.ethertype {
        matching = matching.ethertype(ethertype.0);
    }
    if let Some(vlan) = pattern.vlan {
        let id = match vlan {
            VlanMatch::Untagged => None,
            VlanMatch::Id(id) => Some(id.get()),
        };
        matching = matching
            .vlan(id)
            .map_err(|error| Refused::new("pattern.vlan", error.to_string()))?;
    }
    Ok(matching)
}

fn addresses(pattern: &Pattern, mut matching: Match) -> Result<Match, Refused> {
    if let Some(address) = pattern.ip_src {
        matching = match address {
            IpMatch::Prefix(prefix) => matching.src(prefix),
            IpMatch::Masked(m) => matching.src_masked(m.value, m.mask),
        }
        .map_err(|error| Refused::new("pattern.ip_src", error.to_string()))?;
    }
    if let Some(address) = pattern.ip_dst {
        matching = match address {
            IpMatch::Prefix(prefix) => matching.dst(prefix),
            IpMatch::Masked(m) => matching.dst_masked(m.value, m.mask),
        }
        .map_err(|error| Refused::new("pattern.ip_dst", error.to_string()))?;
    }
    if let Some(protocol) = pattern.ip_proto {
        matching = matching.proto(protocol.0);
    }
    if let Some(dscp) = pattern.dscp {
        matching = matching
            .dscp(dscp.0)
            .map_err(|error| Refused::new("pattern.dscp", error.to_string()))?;
    }
    if let Some(flags) = pattern.tcp_flags {
        matching = matching.tcp_flags(flags.value.bits(), flags.mask.bits());
    }
    if let Some(mark) = pattern.mark {
        matching = matching.mark(mark.value, mark.mask);
    }
    Ok(matching)
}

fn zone(pattern: &Pattern, mut matching: Match, numbering: &mut dyn Numbering) -> Result<Match, Refused> {
    if let Some(port) = pattern.port {
        let index = numbering
            .port(port)
            .ok_or_else(|| Refused::full("pattern.port", "more ports than the dataplane can number"))?;
        matching = matching.zone_masked(Zone(index.0), Zone(super::key::PORT_MASK));
    }
    if let Some(vni) = pattern.vni {
        let bits = numbering.tunnel(vni).ok_or_else(|| {
            Refused::full("pattern.vni", "more VNIs in rules than the dataplane can number")
        })?;
        matching = matching.zone_masked(Zone(bits), Zone(!super::key::PORT_MASK));
    }
    Ok(matching)
}

/// Values and masks of the fragment flags; more than one where a single mask cannot say it.
fn fragments(pattern: &Pattern) -> Vec<(FlowFlags, FlowFlags)> {
    let (first, later) = (FlowFlags::FIRST_FRAGMENT, FlowFlags::LATER_FRAGMENT);
    let l4 = pattern.l4_src.is_some() || pattern.l4_dst.is_some() || pattern.tcp_flags.is_some();
    match pattern.fragment {
        None if l4 => vec![(FlowFlags::empty(), later)],
        None => vec![(FlowFlags::empty(), FlowFlags::empty())],
        Some(FragmentMatch::Whole) => vec![(FlowFlags::empty(), first | later)],
        Some(FragmentMatch::First) => vec![(first, first)],
        Some(FragmentMatch::Any) if l4 => vec![(first, first)],
        Some(FragmentMatch::Any) => vec![(first, first), (later, later)],
        Some(FragmentMatch::Later) => vec![(later, later)],
    }
}

fn ports(field: &str, range: Option<PortRange>) -> Result<Vec<Option<PortMask>>, Refused> {
    let Some(range) = range else { return Ok(vec![None]) };
    let masks =
        range_to_masks(range.first, range.last).map_err(|error| Refused::new(field, error.to_string()))?;
    Ok(masks.into_iter().map(Some).collect())
}

/// True when the address is of the packet's family.
pub(super) const fn same_family(address: IpAddr, ipv6: bool) -> bool {
    address.is_ipv6() == ipv6
}

#[cfg(test)]
mod tests {
    use super::*;
    use dpumesh_core::steering::{Cookie, Owner, Priority};

    #[derive(Default)]
    struct Sequential(u16);

    impl Numbering for Sequential {
        fn port(&mut self, _: PortRef) -> Option<PortIndex> {
            self.0 += 1;
            Some(PortIndex(self.0))
        }

        fn tunnel(&mut self, _: Vni) -> Option<u16> {
            Some(1 << super::super::key::PORT_BITS)
        }
    }

    fn compiled(pattern: Pattern, actions: Vec<Action>) -> Result<CompiledRule, Refused> {
        let rule = SteeringRule::new(Cookie(1), Owner::Agent, Priority(7), pattern, actions);
        compile(&rule, RuleIndex(3), &mut Sequential::default())
    }

    #[test]
    fn ranges_and_fragments_multiply() {
        let pattern = Pattern {
            ip_proto: Some(IpProtocol::TCP),
            l4_dst: Some(PortRange {
                first: 8000,
                last: 8010,
            }),
            ..Pattern::default()
        };
        assert_eq!(
            compiled(pattern, vec![Action::Drop])
                .expect("compiles")
                .rules
                .len(),
            3
        );
        let any = Pattern {
            fragment: Some(FragmentMatch::Any),
            ..Pattern::default()
        };
        assert_eq!(
            compiled(any, vec![Action::Drop]).expect("compiles").rules.len(),
            2
        );
    }

    #[test]
    fn what_software_cannot_do_is_refused_by_name() {
        let cases = [
            (Action::ToKernel, "actions[0]"),
            (Action::Queue(0), "actions[0]"),
            (Action::Mirror(PortRef::vf(0)), "actions[0]"),
        ];
        for (action, field) in cases {
            assert_eq!(
                compiled(Pattern::default(), vec![action]).expect_err(field).field,
                field
            );
        }
    }
}
