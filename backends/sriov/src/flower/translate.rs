//! [`SteeringRule`] into tc actions and back.
//!
//! | contract | tc |
//! |---|---|
//! | `Drop` | gact drop |
//! | `ToKernel` | gact ok: the stack of the port's netdev |
//! | `Forward` | mirred egress redirect |
//! | `Punt` | mirred egress redirect to the port `stack0` |
//! | `Jump` | gact goto chain |
//! | `Mirror` | mirred egress mirror |
//! | `PushVlan`, `PopVlan` | vlan |
//! | `Rewrite`, `DecrementTtl` | pedit, then csum |
//! | `Encapsulate` | tunnel_key set; the `Forward` to an uplink behind it redirects to the tunnel's netdev. The outer MACs are the
//!   kernel's: it routes the tunnel packet and asks its neighbour table |
//! | `Decapsulate` | tunnel_key unset, on frames that come out of the tunnel's netdev |
//! | `Conntrack` | ct |
//! | `Meter` | police with the index that the meter's number gives |
//! | `Count` | nothing: tc counts always; where it stood is in the filter's handle. Before a policer: gact pipe |
//!
//! Not to be had: `Queue`, `Rss`, `Mark` (no flower key reads it).

use std::collections::BTreeMap;

use dpumesh_core::steering::{
    Action, Conntrack, CtZone, Encapsulation, Group, IpProtocol, MeterId, RewriteField, SteeringRule,
    TunnelKind,
};
use dpumesh_core::{MacAddr, PortRef};

use super::key::{Family, family_of, needs_ip};
use super::steering::Meter;
use super::step::{Edit, Step};

/// What a rule's words mean on this machine: the netdevs of its ports, its tunnels and meters.
#[derive(Clone, Debug, Default)]
pub(super) struct Names {
    pub(super) ports: BTreeMap<PortRef, u32>,
    /// Names of the netdevs, which flower's key wants.
    pub(super) links: BTreeMap<u32, String>,
    pub(super) tunnels: BTreeMap<u8, u32>,
    pub(super) meters: BTreeMap<u32, Meter>,
}

/// Why a rule cannot be put into words of tc: the field and the reason.
pub(super) type Misfit = (String, String);

/// Policers have indexes of one table for the whole network namespace: ours begin here.
const METER_BASE: u32 = 0x6470_0000;

/// Number of a kind of tunnel in [`Names::tunnels`].
pub(super) fn tunnel_number(kind: TunnelKind) -> u8 {
    match kind {
        TunnelKind::Vxlan => 0,
        TunnelKind::Geneve => 1,
        _ => u8::MAX,
    }
}

fn tunnel_port(kind: TunnelKind) -> u16 {
    match kind {
        TunnelKind::Geneve => 6081,
        _ => 4789,
    }
}

impl Names {
    /// The netdev of a port.
    pub(super) fn link(&self, port: PortRef) -> Option<u32> {
        self.ports.get(&port).copied()
    }

    /// The port of a netdev.
    pub(super) fn port(&self, link: u32) -> Option<PortRef> {
        self.ports
            .iter()
            .find(|(_, index)| **index == link)
            .map(|(port, _)| *port)
    }

    /// The port of a netdev's name.
    pub(super) fn port_named(&self, name: &str) -> Option<PortRef> {
        let link = self
            .links
            .iter()
            .find(|(_, link)| *link == name)
            .map(|(index, _)| *index)?;
        self.port(link)
    }

    /// Name of a port's netdev.
    pub(super) fn name(&self, port: PortRef) -> Option<&str> {
        self.links.get(&self.link(port)?).map(String::as_str)
    }

    fn tunnel_kind(&self) -> Option<TunnelKind> {
        [TunnelKind::Vxlan, TunnelKind::Geneve]
            .into_iter()
            .find(|kind| self.tunnels.contains_key(&tunnel_number(*kind)))
    }

    /// Name of the tunnel netdev, from which frames come out of tunnels.
    pub(super) fn tunnel_name(&self) -> Option<&str> {
        let link = self.tunnels.values().next()?;
        self.links.get(link).map(String::as_str)
    }

    /// The tc actions of a rule, for frames of a family.
    pub(super) fn steps(&self, rule: &SteeringRule, family: Option<Family>) -> Result<Vec<Step>, Misfit> {
        let mut steps = Vec::with_capacity(rule.actions.len() + 1);
        let mut tunnel: Option<&Encapsulation> = None;
        for (index, action) in rule.actions.iter().enumerate() {
            let misfit = |reason: &str| (format!("actions[{index}]"), reason.to_owned());
            if tunnel.is_some()
                && !matches!(
                    action,
                    Action::Forward(PortRef::Uplink(_)) | Action::Drop | Action::Count
                )
            {
                return Err(misfit(
                    "behind `encapsulate` a frame can only be forwarded to an uplink",
                ));
            }
            match action {
                Action::Drop => steps.push(Step::Drop),
                Action::ToKernel => steps.push(Step::Pass),
                Action::Forward(PortRef::Stack(_)) => {
                    return Err(misfit("frames go to the proxy by `punt`"));
                }
                Action::Forward(port) => {
                    let link = match tunnel {
                        Some(outer) => self.tunnels.get(&tunnel_number(outer.kind)).copied(),
                        None => self.link(*port),
                    };
                    steps.push(Step::Redirect(
                        link.ok_or_else(|| misfit("there is no such port"))?,
                    ));
                }
                Action::Punt => {
                    let link = self.link(PortRef::Stack(0));
                    steps.push(Step::Redirect(
                        link.ok_or_else(|| misfit("no port leads to the proxy"))?,
                    ));
                }
                Action::Jump(group) => steps.push(Step::Goto(group.0)),
                Action::Mirror(port) => {
                    let link = self.link(*port).ok_or_else(|| misfit("there is no such port"))?;
                    steps.push(Step::Mirror(link));
                }
                Action::PushVlan(id) => steps.push(Step::PushVlan(id.get())),
                Action::PopVlan => steps.push(Step::PopVlan),
                Action::Rewrite(field) => {
                    let edit = edit_of(rule, *field, family).map_err(|(field, reason)| match field {
                        Some(field) => (field.to_owned(), reason.to_owned()),
                        None => misfit(reason),
                    })?;
                    steps.push(Step::Edit(edit));
                    if !matches!(edit, Edit::EthSrc(_) | Edit::EthDst(_)) {
                        steps.push(Step::Checksums);
                    }
                }
                Action::DecrementTtl => {
                    let edit = match family {
                        Some(Family::Ip4) => Edit::Ttl4,
                        Some(Family::Ip6) => Edit::Ttl6,
                        None => return Err(ethertype_needed()),
                    };
                    steps.extend([Step::Edit(edit), Step::Checksums]);
                }
                Action::Encapsulate(outer) => {
                    steps.push(Step::Tunnel {
                        vni: outer.vni,
                        local: outer.local,
                        remote: outer.remote,
                        port: tunnel_port(outer.kind),
                    });
                    tunnel = Some(outer);
                }
                Action::Decapsulate(kind) => {
                    if index != 0
                        || needs_ip(&rule.pattern)
                        || !matches!(rule.pattern.port, Some(PortRef::Uplink(_)))
                    {
                        return Err(misfit(
                            "comes first, on frames of an uplink told apart by their VNI: the kernel's tunnel looked at the outer headers",
                        ));
                    }
                    if !self.tunnels.contains_key(&tunnel_number(*kind)) {
                        return Err(misfit("there is no such tunnel"));
                    }
                    steps.push(Step::Untunnel);
                }
                Action::Conntrack(Conntrack { zone, commit }) => steps.push(Step::Conntrack {
                    zone: zone.0,
                    commit: *commit,
                }),
                Action::Meter(meter) => {
                    let Meter { rate, burst } = *self
                        .meters
                        .get(&meter.0)
                        .ok_or_else(|| misfit("there is no such meter"))?;
                    let index = METER_BASE + (meter.0 & 0xffff);
                    steps.push(Step::Police { index, rate, burst });
                }
                Action::Count if rule.actions[..index].contains(&Action::Count) => {
                    return Err(misfit("the rule counts already"));
                }
                Action::Count if index > MAX_COUNT => {
                    return Err(misfit("stands too far behind"));
                }
                Action::Count => {
                    let before_meter = matches!(rule.actions.get(index + 1), Some(Action::Meter(_)));
                    if steps.is_empty() && before_meter {
                        steps.push(Step::Note);
                    }
                }
                _ => return Err(misfit("is not done by tc")),
            }
        }
        Ok(steps)
    }

    /// The contract's actions of tc's. `None` for a list that [`Names::steps`] would not make.
    pub(super) fn actions(&self, steps: &[Step], count: Option<usize>) -> Option<Vec<Action>> {
        let mut actions = Vec::with_capacity(steps.len());
        let mut tunnelled = false;
        for step in steps {
            actions.push(match step {
                Step::Drop => Action::Drop,
                Step::Pass => Action::ToKernel,
                Step::Goto(chain) => Action::Jump(Group(*chain)),
                Step::Redirect(_) if tunnelled => Action::Forward(PortRef::Uplink(0)),
                Step::Redirect(link) => match self.port(*link)? {
                    PortRef::Stack(_) => Action::Punt,
                    port => Action::Forward(port),
                },
                Step::Mirror(link) => Action::Mirror(self.port(*link)?),
                Step::PushVlan(id) => Action::PushVlan((*id).try_into().ok()?),
                Step::PopVlan => Action::PopVlan,
                Step::Edit(edit) => action_of(*edit),
                Step::Checksums | Step::Note => continue,
                Step::Tunnel {
                    vni,
                    local,
                    remote,
                    port,
                } => {
                    tunnelled = true;
                    let kind = if *port == 6081 {
                        TunnelKind::Geneve
                    } else {
                        TunnelKind::Vxlan
                    };
                    let none = MacAddr([0; 6]); // the kernel asks its neighbour table
                    Action::Encapsulate(Encapsulation {
                        kind,
                        vni: *vni,
                        local: *local,
                        remote: *remote,
                        eth_src: none,
                        eth_dst: none,
                    })
                }
                Step::Untunnel => Action::Decapsulate(self.tunnel_kind()?),
                Step::Conntrack { zone, commit } => Action::Conntrack(Conntrack {
                    zone: CtZone(*zone),
                    commit: *commit,
                }),
                Step::Police { index, .. } => Action::Meter(MeterId(index.checked_sub(METER_BASE)?)),
            });
        }
        if let Some(index) = count {
            actions.insert(index.min(actions.len()), Action::Count);
        }
        Some(actions)
    }
}

/// Largest index of `Count` in a list.
pub(super) const MAX_COUNT: usize = 14;

fn ethertype_needed() -> Misfit {
    let reason = "must say IPv4 or IPv6 for an action on the IP header";
    ("pattern.ethertype".to_owned(), reason.to_owned())
}

/// Why not, and which field of the pattern is in the way, if one is.
type EditMisfit = (Option<&'static str>, &'static str);

fn edit_of(rule: &SteeringRule, field: RewriteField, family: Option<Family>) -> Result<Edit, EditMisfit> {
    use std::net::IpAddr::{V4, V6};
    const ETHERTYPE: Option<&str> = Some("pattern.ethertype");
    let family_of_rule = family.or_else(|| family_of(&rule.pattern));
    let of_family = |wanted: Family, edit: Edit| match family_of_rule {
        Some(family) if family == wanted => Ok(edit),
        Some(_) => Err((None, "is of another address family than the pattern")),
        None => Err((ETHERTYPE, "must say IPv4 or IPv6 for an action on the IP header")),
    };
    let port = |tcp: Edit, udp: Edit| match rule.pattern.ip_proto {
        Some(IpProtocol::TCP) => Ok(tcp),
        Some(IpProtocol::UDP) => Ok(udp),
        _ => Err((
            Some("pattern.ip_proto"),
            "must say TCP or UDP for a rewrite of ports",
        )),
    };
    match field {
        RewriteField::EthSrc(mac) => Ok(Edit::EthSrc(mac)),
        RewriteField::EthDst(mac) => Ok(Edit::EthDst(mac)),
        RewriteField::IpSrc(V4(address)) => of_family(Family::Ip4, Edit::Ip4Src(address)),
        RewriteField::IpDst(V4(address)) => of_family(Family::Ip4, Edit::Ip4Dst(address)),
        RewriteField::IpSrc(V6(address)) => of_family(Family::Ip6, Edit::Ip6Src(address)),
        RewriteField::IpDst(V6(address)) => of_family(Family::Ip6, Edit::Ip6Dst(address)),
        RewriteField::L4Src(number) => port(Edit::TcpSrc(number), Edit::UdpSrc(number)),
        RewriteField::L4Dst(number) => port(Edit::TcpDst(number), Edit::UdpDst(number)),
        RewriteField::Dscp(dscp) => match family_of_rule {
            Some(Family::Ip4) => Ok(Edit::Dscp4(dscp)),
            Some(Family::Ip6) => Ok(Edit::Dscp6(dscp)),
            None => Err((ETHERTYPE, "must say IPv4 or IPv6 for an action on the IP header")),
        },
        _ => Err((None, "is not done by tc")),
    }
}

fn action_of(edit: Edit) -> Action {
    Action::Rewrite(match edit {
        Edit::EthSrc(mac) => RewriteField::EthSrc(mac),
        Edit::EthDst(mac) => RewriteField::EthDst(mac),
        Edit::Ip4Src(address) => RewriteField::IpSrc(address.into()),
        Edit::Ip4Dst(address) => RewriteField::IpDst(address.into()),
        Edit::Ip6Src(address) => RewriteField::IpSrc(address.into()),
        Edit::Ip6Dst(address) => RewriteField::IpDst(address.into()),
        Edit::TcpSrc(port) | Edit::UdpSrc(port) => RewriteField::L4Src(port),
        Edit::TcpDst(port) | Edit::UdpDst(port) => RewriteField::L4Dst(port),
        Edit::Dscp4(dscp) | Edit::Dscp6(dscp) => RewriteField::Dscp(dscp),
        Edit::Ttl4 | Edit::Ttl6 => return Action::DecrementTtl,
    })
}
