//! Rules, verdicts, batches, outcomes and counters.

use dpumesh_core::steering::{
    Action, Atomicity, Batch, BatchOutcome, Change, Conntrack, Cookie, Counters, CtStates, CtZone, DscpMatch,
    Encapsulation, EtherType, FragmentMatch, Group, InstalledRule, IpMatch, IpProtocol, Masked, MeterId,
    MissPolicy, Occupancy, Operation, Owner, Pattern, Placement, PlacementRequest, PortRange, Priority,
    RewriteField, SteeringRule, TcpFlags, TunnelKind, Undone, Verdict, VlanMatch,
};
use dpumesh_core::{Epoch, Error, MacAddr, Vni};
use ipnet::IpNet;

use super::{
    NO_ADDR, NO_PORT, get_addr, get_error, get_flag, get_port, put_addr, put_error, put_port, small,
};
use crate::loader::abi::*;
use crate::loader::arena::{Arena, Broken, Reader, Rows, Sized32, cut};
use crate::loader::codec::codes;

/// Longest reason in octets: the caller's arena has so many for each operation of a batch.
pub(crate) const REASON: usize = 128;

codes! { put_placement_request, get_placement_request, PlacementRequest, u32,
    PlacementRequest::Any => PlacementRequest::Any, DM_PLACE_ANY;
    PlacementRequest::Hardware => PlacementRequest::Hardware, DM_PLACE_HARDWARE;
    PlacementRequest::Software => PlacementRequest::Software, DM_PLACE_SOFTWARE;
}

codes! { put_fragment, get_fragment, FragmentMatch, u32,
    FragmentMatch::Whole => FragmentMatch::Whole, DM_FRAGMENT_WHOLE;
    FragmentMatch::Any => FragmentMatch::Any, DM_FRAGMENT_ANY;
    FragmentMatch::First => FragmentMatch::First, DM_FRAGMENT_FIRST;
    FragmentMatch::Later => FragmentMatch::Later, DM_FRAGMENT_LATER;
}

codes! { put_tunnel, get_tunnel, TunnelKind, u32,
    TunnelKind::Vxlan => TunnelKind::Vxlan, DM_TUNNEL_VXLAN;
    TunnelKind::Geneve => TunnelKind::Geneve, DM_TUNNEL_GENEVE;
}

codes! { put_atomicity, get_atomicity, Atomicity, u32,
    Atomicity::Continue => Atomicity::Continue, DM_CONTINUE;
    Atomicity::Rollback => Atomicity::Rollback, DM_ROLLBACK;
    Atomicity::Atomic => Atomicity::Atomic, DM_ATOMIC;
}

codes! { put_miss, get_miss, MissPolicy, u32,
    MissPolicy::Drop => MissPolicy::Drop, DM_MISS_DROP;
    MissPolicy::Software => MissPolicy::Software, DM_MISS_SOFTWARE;
}

pub(crate) fn put_cookie(cookie: Cookie) -> dm_cookie {
    dm_cookie {
        high: (cookie.0 >> 64) as u64,
        low: cookie.0 as u64,
    }
}

pub(crate) fn get_cookie(cookie: dm_cookie) -> Cookie {
    Cookie(u128::from(cookie.high) << 64 | u128::from(cookie.low))
}

pub(crate) fn put_owner(owner: Owner) -> dm_owner {
    let (kind, user) = match owner {
        Owner::Agent => (DM_OWNER_AGENT, 0),
        Owner::Proxy => (DM_OWNER_PROXY, 0),
        Owner::Dataplane => (DM_OWNER_DATAPLANE, 0),
        Owner::User(user) => (DM_OWNER_USER, user.into()),
        _ => (super::UNKNOWN_CODE, 0),
    };
    dm_owner { kind, user }
}

pub(crate) fn get_owner(owner: dm_owner, what: &str) -> Result<Owner, Broken> {
    match owner.kind {
        DM_OWNER_AGENT => Ok(Owner::Agent),
        DM_OWNER_PROXY => Ok(Owner::Proxy),
        DM_OWNER_DATAPLANE => Ok(Owner::Dataplane),
        DM_OWNER_USER => Ok(Owner::User(small(owner.user, what)?)),
        kind => Err(format!("{what}.kind is {kind}, which means nothing")),
    }
}

pub(crate) fn put_counters(counters: Counters) -> dm_counters {
    dm_counters {
        packets: counters.packets,
        octets: counters.octets,
        epoch: counters.epoch.0,
        idle_ms: counters.idle_ms.unwrap_or(DM_UNKNOWN),
    }
}

pub(crate) fn get_counters(raw: dm_counters) -> Counters {
    Counters {
        packets: raw.packets,
        octets: raw.octets,
        epoch: Epoch(raw.epoch),
        idle_ms: (raw.idle_ms != DM_UNKNOWN).then_some(raw.idle_ms),
    }
}

/// Into an empty one.
fn put_pattern(pattern: &Pattern, raw: &mut dm_pattern) {
    let mut has = |bit| raw.fields |= bit;
    if let Some(port) = pattern.port {
        has(DM_FIELD_PORT);
        raw.port = put_port(port);
    }
    if let Some(mac) = pattern.eth_src {
        has(DM_FIELD_ETH_SRC);
        (raw.eth_src, raw.eth_src_mask) = (mac.value.0, mac.mask.0);
    }
    if let Some(mac) = pattern.eth_dst {
        has(DM_FIELD_ETH_DST);
        (raw.eth_dst, raw.eth_dst_mask) = (mac.value.0, mac.mask.0);
    }
    if let Some(EtherType(ethertype)) = pattern.ethertype {
        has(DM_FIELD_ETHERTYPE);
        raw.ethertype = ethertype;
    }
    if let Some(vlan) = pattern.vlan {
        has(DM_FIELD_VLAN);
        raw.vlan = match vlan {
            VlanMatch::Untagged => DM_VLAN_UNTAGGED,
            VlanMatch::Id(id) => id.get(),
        };
    }
    if let Some(vni) = pattern.vni {
        has(DM_FIELD_VNI);
        raw.vni = vni.get();
    }
    if let Some(address) = pattern.ip_src {
        has(DM_FIELD_IP_SRC);
        raw.ip_src = put_ip_match(address);
    }
    if let Some(address) = pattern.ip_dst {
        has(DM_FIELD_IP_DST);
        raw.ip_dst = put_ip_match(address);
    }
    if let Some(IpProtocol(protocol)) = pattern.ip_proto {
        has(DM_FIELD_IP_PROTO);
        raw.ip_proto = protocol.into();
    }
    if let Some(DscpMatch(dscp)) = pattern.dscp {
        has(DM_FIELD_DSCP);
        raw.dscp = dscp.into();
    }
    if let Some(fragment) = pattern.fragment {
        has(DM_FIELD_FRAGMENT);
        raw.fragment = put_fragment(fragment);
    }
    if let Some(range) = pattern.l4_src {
        has(DM_FIELD_L4_SRC);
        raw.l4_src = [range.first, range.last];
    }
    if let Some(range) = pattern.l4_dst {
        has(DM_FIELD_L4_DST);
        raw.l4_dst = [range.first, range.last];
    }
    if let Some(flags) = pattern.tcp_flags {
        has(DM_FIELD_TCP_FLAGS);
        (raw.tcp_flags, raw.tcp_flags_mask) = (flags.value.bits(), flags.mask.bits());
    }
    if let Some(mark) = pattern.mark {
        has(DM_FIELD_MARK);
        (raw.mark, raw.mark_mask) = (mark.value, mark.mask);
    }
    if let Some(states) = pattern.ct_state {
        has(DM_FIELD_CT_STATE);
        (raw.ct_state, raw.ct_state_mask) = (states.value.bits(), states.mask.bits());
    }
}

fn get_pattern(raw: &dm_pattern) -> Result<Pattern, Broken> {
    let known = DM_FIELD_CT_STATE | (DM_FIELD_CT_STATE - 1);
    super::set(
        (raw.fields & !known == 0).then_some(()),
        raw.fields,
        "pattern.fields",
    )?;
    let has = |bit| raw.fields & bit != 0;
    let mut pattern = Pattern::default();
    if has(DM_FIELD_PORT) {
        pattern.port = Some(get_port(raw.port, "pattern.port")?);
    }
    if has(DM_FIELD_ETH_SRC) {
        pattern.eth_src = Some(masked(MacAddr(raw.eth_src), MacAddr(raw.eth_src_mask)));
    }
    if has(DM_FIELD_ETH_DST) {
        pattern.eth_dst = Some(masked(MacAddr(raw.eth_dst), MacAddr(raw.eth_dst_mask)));
    }
    if has(DM_FIELD_ETHERTYPE) {
        pattern.ethertype = Some(EtherType(raw.ethertype));
    }
    if has(DM_FIELD_VLAN) {
        pattern.vlan = Some(match raw.vlan {
            DM_VLAN_UNTAGGED => VlanMatch::Untagged,
            id => VlanMatch::Id(small(id.into(), "pattern.vlan")?),
        });
    }
    if has(DM_FIELD_VNI) {
        pattern.vni = Some(get_vni(raw.vni, "pattern.vni")?);
    }
    if has(DM_FIELD_IP_SRC) {
        pattern.ip_src = Some(get_ip_match(raw.ip_src, "pattern.ip_src")?);
    }
    if has(DM_FIELD_IP_DST) {
        pattern.ip_dst = Some(get_ip_match(raw.ip_dst, "pattern.ip_dst")?);
    }
    if has(DM_FIELD_IP_PROTO) {
        pattern.ip_proto = Some(IpProtocol(octet(raw.ip_proto, "pattern.ip_proto")?));
    }
    if has(DM_FIELD_DSCP) {
        pattern.dscp = Some(DscpMatch(octet(raw.dscp, "pattern.dscp")?));
    }
    if has(DM_FIELD_FRAGMENT) {
        pattern.fragment = Some(get_fragment(raw.fragment, "pattern.fragment")?);
    }
    let range = |[first, last]: [u16; 2]| PortRange { first, last };
    pattern.l4_src = has(DM_FIELD_L4_SRC).then(|| range(raw.l4_src));
    pattern.l4_dst = has(DM_FIELD_L4_DST).then(|| range(raw.l4_dst));
    if has(DM_FIELD_TCP_FLAGS) {
        let of = TcpFlags::from_bits_retain;
        pattern.tcp_flags = Some(masked(of(raw.tcp_flags), of(raw.tcp_flags_mask)));
    }
    pattern.mark = has(DM_FIELD_MARK).then(|| masked(raw.mark, raw.mark_mask));
    if has(DM_FIELD_CT_STATE) {
        let of = CtStates::from_bits_retain;
        pattern.ct_state = Some(masked(of(raw.ct_state), of(raw.ct_state_mask)));
    }
    Ok(pattern)
}

fn masked<T>(value: T, mask: T) -> Masked<T> {
    Masked { value, mask }
}

fn octet(number: u32, what: &str) -> Result<u8, Broken> {
    u8::try_from(number).map_err(|_| format!("{what} is {number}, out of its range"))
}

fn get_vni(vni: u32, what: &str) -> Result<Vni, Broken> {
    Vni::try_from(vni).map_err(|_| format!("{what} is {vni}, out of its range"))
}

fn put_ip_match(address: IpMatch) -> dm_ip_match {
    match address {
        IpMatch::Prefix(prefix) => dm_ip_match {
            kind: DM_IP_PREFIX,
            prefix_len: prefix.prefix_len().into(),
            value: put_addr(prefix.addr()),
            mask: put_addr(prefix.netmask()).octets,
        },
        IpMatch::Masked(Masked { value, mask }) => dm_ip_match {
            kind: DM_IP_MASKED,
            prefix_len: 0,
            value: put_addr(value),
            mask: put_addr(mask).octets,
        },
    }
}

fn get_ip_match(raw: dm_ip_match, what: &str) -> Result<IpMatch, Broken> {
    let value = get_addr(raw.value, what)?;
    match raw.kind {
        DM_IP_PREFIX => {
            let len = octet(raw.prefix_len, what)?;
            IpNet::new(value, len)
                .map(IpMatch::Prefix)
                .map_err(|_| format!("{what}.prefix_len is {len}"))
        }
        DM_IP_MASKED => {
            let mask = dm_addr {
                family: raw.value.family,
                octets: raw.mask,
            };
            Ok(IpMatch::Masked(masked(value, get_addr(mask, what)?)))
        }
        kind => Err(format!("{what}.kind is {kind}, which means nothing")),
    }
}

/// Into an empty one.
fn put_action(action: &Action, raw: &mut dm_action, arena: &mut Arena) {
    raw.port = NO_PORT;
    (raw.local, raw.remote) = (NO_ADDR, NO_ADDR);
    let mut number = |kind, number: u32| (raw.kind, raw.number) = (kind, number);
    match action {
        Action::Drop => raw.kind = DM_ACTION_DROP,
        Action::Forward(port) => (raw.kind, raw.port) = (DM_ACTION_FORWARD, put_port(*port)),
        Action::Punt => raw.kind = DM_ACTION_PUNT,
        Action::ToKernel => raw.kind = DM_ACTION_TO_KERNEL,
        Action::Queue(queue) => number(DM_ACTION_QUEUE, (*queue).into()),
        Action::Rss(queues) => (raw.kind, raw.queues) = (DM_ACTION_RSS, arena.list(queues)),
        Action::Jump(group) => number(DM_ACTION_JUMP, group.0),
        Action::Encapsulate(outer) => {
            number(DM_ACTION_ENCAPSULATE, outer.vni.get());
            raw.tunnel = put_tunnel(outer.kind);
            (raw.local, raw.remote) = (put_addr(outer.local), put_addr(outer.remote));
            (raw.eth_src, raw.eth_dst) = (outer.eth_src.0, outer.eth_dst.0);
        }
        Action::Decapsulate(tunnel) => (raw.kind, raw.tunnel) = (DM_ACTION_DECAPSULATE, put_tunnel(*tunnel)),
        Action::Rewrite(field) => match field {
            RewriteField::EthSrc(mac) => (raw.kind, raw.eth_src) = (DM_ACTION_SET_ETH_SRC, mac.0),
            RewriteField::EthDst(mac) => (raw.kind, raw.eth_dst) = (DM_ACTION_SET_ETH_DST, mac.0),
            RewriteField::IpSrc(to) => (raw.kind, raw.local) = (DM_ACTION_SET_IP_SRC, put_addr(*to)),
            RewriteField::IpDst(to) => (raw.kind, raw.remote) = (DM_ACTION_SET_IP_DST, put_addr(*to)),
            RewriteField::L4Src(port) => number(DM_ACTION_SET_L4_SRC, (*port).into()),
            RewriteField::L4Dst(port) => number(DM_ACTION_SET_L4_DST, (*port).into()),
            RewriteField::Dscp(dscp) => number(DM_ACTION_SET_DSCP, (*dscp).into()),
            _ => raw.kind = super::UNKNOWN_CODE,
        },
        Action::DecrementTtl => raw.kind = DM_ACTION_DECREMENT_TTL,
        Action::PushVlan(id) => number(DM_ACTION_PUSH_VLAN, id.get().into()),
        Action::PopVlan => raw.kind = DM_ACTION_POP_VLAN,
        Action::Mark(mark) => number(DM_ACTION_MARK, *mark),
        Action::Count => raw.kind = DM_ACTION_COUNT,
        Action::Mirror(port) => (raw.kind, raw.port) = (DM_ACTION_MIRROR, put_port(*port)),
        Action::Meter(meter) => number(DM_ACTION_METER, meter.0),
        Action::Conntrack(step) => {
            number(DM_ACTION_CONNTRACK, step.zone.0.into());
            raw.commit = step.commit.into();
        }
        _ => raw.kind = super::UNKNOWN_CODE,
    }
}

fn get_action(raw: &dm_action, reader: &Reader) -> Result<Action, Broken> {
    let number = || small::<u16>(raw.number, "action.number");
    Ok(match raw.kind {
        DM_ACTION_DROP => Action::Drop,
        DM_ACTION_FORWARD => Action::Forward(get_port(raw.port, "action.port")?),
        DM_ACTION_PUNT => Action::Punt,
        DM_ACTION_TO_KERNEL => Action::ToKernel,
        DM_ACTION_QUEUE => Action::Queue(number()?),
        DM_ACTION_RSS => Action::Rss(reader.frozen(raw.queues, "action.queues")?),
        DM_ACTION_JUMP => Action::Jump(Group(raw.number)),
        DM_ACTION_ENCAPSULATE => Action::Encapsulate(Encapsulation {
            kind: get_tunnel(raw.tunnel, "action.tunnel")?,
            vni: get_vni(raw.number, "action.number")?,
            local: get_addr(raw.local, "action.local")?,
            remote: get_addr(raw.remote, "action.remote")?,
            eth_src: MacAddr(raw.eth_src),
            eth_dst: MacAddr(raw.eth_dst),
        }),
        DM_ACTION_DECAPSULATE => Action::Decapsulate(get_tunnel(raw.tunnel, "action.tunnel")?),
        DM_ACTION_SET_ETH_SRC => Action::Rewrite(RewriteField::EthSrc(MacAddr(raw.eth_src))),
        DM_ACTION_SET_ETH_DST => Action::Rewrite(RewriteField::EthDst(MacAddr(raw.eth_dst))),
        DM_ACTION_SET_IP_SRC => Action::Rewrite(RewriteField::IpSrc(get_addr(raw.local, "action.local")?)),
        DM_ACTION_SET_IP_DST => Action::Rewrite(RewriteField::IpDst(get_addr(raw.remote, "action.remote")?)),
        DM_ACTION_SET_L4_SRC => Action::Rewrite(RewriteField::L4Src(number()?)),
        DM_ACTION_SET_L4_DST => Action::Rewrite(RewriteField::L4Dst(number()?)),
        DM_ACTION_SET_DSCP => Action::Rewrite(RewriteField::Dscp(octet(raw.number, "action.number")?)),
        DM_ACTION_DECREMENT_TTL => Action::DecrementTtl,
        DM_ACTION_PUSH_VLAN => Action::PushVlan(small(raw.number, "action.number")?),
        DM_ACTION_POP_VLAN => Action::PopVlan,
        DM_ACTION_MARK => Action::Mark(raw.number),
        DM_ACTION_COUNT => Action::Count,
        DM_ACTION_MIRROR => Action::Mirror(get_port(raw.port, "action.port")?),
        DM_ACTION_METER => Action::Meter(MeterId(raw.number)),
        DM_ACTION_CONNTRACK => Action::Conntrack(Conntrack {
            zone: CtZone(number()?),
            commit: get_flag(raw.commit, "action.commit")?,
        }),
        kind => return Err(format!("action.kind is {kind}, which means nothing")),
    })
}

pub(crate) fn put_rule(rule: &SteeringRule, arena: &mut Arena) -> dm_rule {
    let mut raw = dm_rule::empty();
    write_rule(rule, &mut raw, arena);
    raw
}

/// Into an empty one.
fn write_rule(rule: &SteeringRule, raw: &mut dm_rule, arena: &mut Arena) {
    raw.group = rule.group.0;
    raw.cookie = put_cookie(rule.cookie);
    raw.owner = put_owner(rule.owner);
    raw.priority = rule.priority.0;
    raw.placement = put_placement_request(rule.placement);
    // A rule that ages at once makes no sense, and 0 is "keeps": the largest number stands for it.
    raw.idle_timeout_ms = match rule.idle_timeout_ms {
        None => 0,
        Some(0) => u32::MAX,
        Some(ms) => ms.min(u32::MAX - 1),
    };
    raw.pattern = arena.make(|raw, _| put_pattern(&rule.pattern, raw));
    raw.actions = arena.make_list(rule.actions.len(), |index, raw, arena| {
        put_action(&rule.actions[index], raw, arena);
    });
}

pub(crate) fn get_rule(raw: &dm_rule, reader: &Reader) -> Result<SteeringRule, Broken> {
    get_rule_into(raw, reader, Vec::new())
}

/// A rule whose actions come into a list that is there already, empty.
fn get_rule_into(raw: &dm_rule, reader: &Reader, mut actions: Vec<Action>) -> Result<SteeringRule, Broken> {
    let pattern = reader.see(raw.pattern, "rule.pattern", get_pattern)?;
    actions.reserve(raw.actions.len.min(64) as usize);
    reader.see_each(raw.actions, "rule.actions", |action| {
        actions.push(get_action(action, reader)?);
        Ok(())
    })?;
    Ok(SteeringRule {
        cookie: get_cookie(raw.cookie),
        owner: get_owner(raw.owner, "rule.owner")?,
        group: Group(raw.group),
        priority: Priority(raw.priority),
        pattern,
        actions,
        placement: get_placement_request(raw.placement, "rule.placement")?,
        idle_timeout_ms: match raw.idle_timeout_ms {
            0 => None,
            u32::MAX => Some(0),
            ms => Some(ms),
        },
    })
}

pub(crate) fn put_rules(rules: &[SteeringRule], arena: &mut Arena) -> dm_rules {
    let mut raw = dm_rules::empty();
    raw.rules = arena.make_list(rules.len(), |index, raw, arena| {
        write_rule(&rules[index], raw, arena);
    });
    raw
}

pub(crate) fn get_rules(raw: &dm_rules, reader: &Reader) -> Result<Vec<SteeringRule>, Broken> {
    let mut rules = Vec::with_capacity(raw.rules.len.min(1 << 16) as usize);
    reader.see_each(raw.rules, "rules", |rule| {
        rules.push(get_rule(rule, reader)?);
        Ok(())
    })?;
    Ok(rules)
}

pub(crate) fn put_verdict(verdict: &Verdict, arena: &mut Arena) -> dm_verdict {
    let mut raw = dm_verdict::empty();
    match verdict {
        Verdict::Hardware => raw.verdict = DM_PLACE_HARDWARE,
        Verdict::Partial(reason) => (raw.verdict, raw.reason) = (DM_PLACE_PARTIAL, arena.text(reason)),
        Verdict::Software(reason) => (raw.verdict, raw.reason) = (DM_PLACE_SOFTWARE, arena.text(reason)),
        Verdict::No { field, reason } => {
            raw.verdict = DM_VERDICT_NO;
            (raw.field, raw.reason) = (arena.text(field), arena.text(reason));
        }
    }
    raw
}

pub(crate) fn get_verdict(raw: &dm_verdict, reader: &Reader) -> Result<Verdict, Broken> {
    let reason = || reader.text(raw.reason, "verdict.reason");
    Ok(match raw.verdict {
        DM_PLACE_HARDWARE => Verdict::Hardware,
        DM_PLACE_PARTIAL => Verdict::Partial(reason()?),
        DM_PLACE_SOFTWARE => Verdict::Software(reason()?),
        DM_VERDICT_NO => Verdict::No {
            field: reader.text(raw.field, "verdict.field")?,
            reason: reason()?,
        },
        verdict => return Err(format!("verdict.verdict is {verdict}, which means nothing")),
    })
}

fn put_placement(placement: &Placement, arena: &mut Arena) -> (u32, dm_str) {
    match placement {
        Placement::Hardware => (
            DM_PLACE_HARDWARE,
            dm_str {
                at: std::ptr::null(),
                len: 0,
            },
        ),
        Placement::Partial(reason) => (DM_PLACE_PARTIAL, arena.text(cut(reason, REASON))),
        Placement::Software(reason) => (DM_PLACE_SOFTWARE, arena.text(cut(reason, REASON))),
    }
}

fn get_placement(placement: u32, reason: dm_str, reader: &Reader) -> Result<Placement, Broken> {
    let reason = || reader.text(reason, "placement.reason");
    Ok(match placement {
        DM_PLACE_HARDWARE => Placement::Hardware,
        DM_PLACE_PARTIAL => Placement::Partial(reason()?),
        DM_PLACE_SOFTWARE => Placement::Software(reason()?),
        placement => return Err(format!("placement is {placement}, which means nothing")),
    })
}

pub(crate) fn put_installed(installed: &InstalledRule, arena: &mut Arena) -> dm_installed {
    let mut raw = dm_installed::empty();
    (raw.placement, raw.reason) = put_placement(&installed.placement, arena);
    let rule = put_rule(&installed.rule, arena);
    raw.rule = arena.one(rule);
    raw
}

pub(crate) fn get_installed(raw: &dm_installed, reader: &Reader) -> Result<InstalledRule, Broken> {
    let rule = reader.one(raw.rule, "installed.rule")?;
    let placement = get_placement(raw.placement, raw.reason, reader)?;
    Ok(InstalledRule::new(get_rule(&rule, reader)?, placement))
}

pub(crate) fn put_batch(batch: &Batch, arena: &mut Arena) -> dm_batch {
    let mut raw = dm_batch::empty();
    raw.atomicity = put_atomicity(batch.atomicity);
    raw.operations = arena.make_list(batch.operations.len(), |index, raw, arena| {
        put_operation(&batch.operations[index], raw, arena);
    });
    raw
}

/// Into an empty one.
fn put_operation(operation: &Operation, raw: &mut dm_operation, arena: &mut Arena) {
    match operation {
        Operation::Add(rule) => {
            raw.kind = DM_ADD;
            (raw.owner, raw.cookie) = (put_owner(rule.owner), put_cookie(rule.cookie));
            raw.rule = arena.make(|raw, arena| write_rule(rule, raw, arena));
        }
        Operation::Remove { owner, cookie } => {
            raw.kind = DM_REMOVE;
            (raw.owner, raw.cookie) = (put_owner(*owner), put_cookie(*cookie));
        }
    }
}

/// Lists of batches that were carried out, for those to come: a batch then allocates nothing, once as many rules were there.
#[derive(Debug, Default)]
pub(crate) struct Spare {
    operations: Vec<Operation>,
    actions: Vec<Vec<Action>>,
}

impl Spare {
    /// Lists kept, and actions kept in each: more than that is given back.
    const MOST: usize = 4096;
    const ACTIONS: usize = 8;

    /// Takes a batch apart.
    pub(crate) fn keep(&mut self, batch: Batch) {
        let mut operations = batch.operations;
        for operation in operations.drain(..) {
            let Operation::Add(rule) = operation else { continue };
            let mut actions = rule.actions;
            if self.actions.len() < Self::MOST && actions.capacity() <= Self::ACTIONS {
                actions.clear();
                self.actions.push(actions);
            }
        }
        if operations.capacity() <= Self::MOST {
            self.operations = operations;
        }
    }
}

pub(crate) fn get_batch(raw: &dm_batch, reader: &Reader, spare: &mut Spare) -> Result<Batch, Broken> {
    let mut operations = std::mem::take(&mut spare.operations);
    operations.reserve(raw.operations.len.min(1 << 16) as usize);
    reader.see_each(raw.operations, "batch.operations", |operation| {
        operations.push(get_operation(operation, reader, spare)?);
        Ok(())
    })?;
    Ok(Batch::new(operations).with(get_atomicity(raw.atomicity, "batch.atomicity")?))
}

fn get_operation(raw: &dm_operation, reader: &Reader, spare: &mut Spare) -> Result<Operation, Broken> {
    match raw.kind {
        DM_ADD => {
            let actions = spare.actions.pop().unwrap_or_default();
            reader.see(raw.rule, "operation.rule", |rule| {
                get_rule_into(rule, reader, actions).map(Operation::Add)
            })
        }
        DM_REMOVE => Ok(Operation::Remove {
            owner: get_owner(raw.owner, "operation.owner")?,
            cookie: get_cookie(raw.cookie),
        }),
        kind => Err(format!("operation.kind is {kind}, which means nothing")),
    }
}

/// A change; a failed one leaves its error to the errors' rows.
pub(crate) fn put_change(result: &Result<Change, Error>, arena: &mut Arena) -> dm_change {
    let mut raw = dm_change::empty();
    match result {
        Ok(Change::Added(placement)) => {
            raw.kind = DM_ADDED;
            (raw.placement, raw.reason) = put_placement(placement, arena);
        }
        Ok(Change::Present(placement)) => {
            raw.kind = DM_PRESENT;
            (raw.placement, raw.reason) = put_placement(placement, arena);
        }
        Ok(Change::Removed(counters)) => {
            raw.kind = DM_REMOVED;
            raw.has_counters = counters.is_some().into();
            raw.counters = put_counters(counters.unwrap_or_default());
        }
        Ok(Change::Absent) => raw.kind = DM_ABSENT,
        Ok(Change::Skipped) => raw.kind = DM_SKIPPED,
        Err(_) => raw.kind = DM_CHANGE_FAILED,
    }
    raw
}

fn get_change(raw: &dm_change, reader: &Reader) -> Result<Change, Broken> {
    let placement = || get_placement(raw.placement, raw.reason, reader);
    Ok(match raw.kind {
        DM_ADDED => Change::Added(placement()?),
        DM_PRESENT => Change::Present(placement()?),
        DM_REMOVED => {
            let counted = get_flag(raw.has_counters, "change.has_counters")?;
            Change::Removed(counted.then(|| get_counters(raw.counters)))
        }
        DM_ABSENT => Change::Absent,
        DM_SKIPPED => Change::Skipped,
        kind => return Err(format!("change.kind is {kind}, which means nothing")),
    })
}

/// The outcome of a batch of `count` operations out of what the callee wrote.
pub(crate) fn get_outcome(
    raw: &dm_outcome,
    count: usize,
    changes: &Rows,
    errors: &Rows,
    undo_error: &dm_error,
    backend: &str,
    reader: &Reader,
) -> Result<BatchOutcome, Broken> {
    if raw.changes.len != count as u64 {
        return Err(format!("{} changes for {count} operations", raw.changes.len));
    }
    let mut results = Vec::with_capacity(count);
    for index in 0..count {
        let change: dm_change = changes.at(index, "changes")?;
        results.push(if change.kind == DM_CHANGE_FAILED {
            Err(get_error(
                &errors.at(index, "errors")?,
                "steering.apply",
                backend,
            )?)
        } else {
            Ok(get_change(&change, reader)?)
        });
    }
    let undone = match raw.undone {
        DM_UNDONE_NO => Undone::No,
        DM_UNDONE_ALL => Undone::All,
        DM_UNDONE_FAILED => Undone::Failed(Box::new(get_error(undo_error, "steering.apply", backend)?)),
        undone => return Err(format!("outcome.undone is {undone}, which means nothing")),
    };
    Ok(BatchOutcome::new(results).undone(undone))
}

/// Writes an outcome into what the caller made for it; what does not fit of its reasons is left out.
///
/// # Safety
/// `out` is the `dm_outcome` of a call in progress.
pub(crate) unsafe fn write_outcome(outcome: &BatchOutcome, out: *mut dm_outcome, arena: &mut Arena) {
    // SAFETY: the caller's, by contract, and so is all it points to.
    unsafe {
        let Some(out) = out.as_mut() else { return };
        let rows = &mut out.changes;
        rows.len = outcome.results.len() as u64;
        let (at, stride) = (rows.at.cast::<u8>(), rows.stride as usize);
        for (index, result) in outcome.results.iter().enumerate().take(rows.capacity as usize) {
            let to = at.wrapping_add(index * stride).cast();
            crate::loader::arena::write_sized(to, stride, &put_change(result, arena));
        }
        for (index, result) in outcome
            .results
            .iter()
            .enumerate()
            .take(out.errors.capacity as usize)
        {
            let Err(error) = result else { continue };
            let stride = out.errors.stride as usize;
            let to = out.errors.at.cast::<u8>().wrapping_add(index * stride).cast();
            crate::loader::arena::write_sized(to, stride, &put_error(error));
        }
        out.errors.len = out.changes.len;
        out.undone = match &outcome.undone {
            Undone::No => DM_UNDONE_NO,
            Undone::All => DM_UNDONE_ALL,
            Undone::Failed(error) => {
                crate::loader::arena::write_over(out.undo_error, &put_error(error));
                DM_UNDONE_FAILED
            }
        };
    }
}

pub(crate) fn put_count(counters: Option<Counters>) -> dm_count {
    let mut raw = dm_count::empty();
    raw.present = counters.is_some().into();
    raw.counters = put_counters(counters.unwrap_or_default());
    raw
}

pub(crate) fn get_count(raw: &dm_count) -> Result<Option<Counters>, Broken> {
    Ok(get_flag(raw.present, "count.present")?.then(|| get_counters(raw.counters)))
}

pub(crate) fn put_occupancy(occupancy: &Occupancy, arena: &mut Arena) -> dm_occupancy {
    let mut raw = dm_occupancy::empty();
    (raw.used, raw.limit) = (occupancy.used, occupancy.limit);
    raw.resource = arena.text(&occupancy.resource);
    raw
}

pub(crate) fn get_occupancy(raw: &dm_occupancy, reader: &Reader) -> Result<Occupancy, Broken> {
    Ok(Occupancy {
        resource: reader.text(raw.resource, "occupancy.resource")?,
        used: raw.used,
        limit: raw.limit,
    })
}
