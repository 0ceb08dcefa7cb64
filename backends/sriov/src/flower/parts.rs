//! A rule as its filters and back: one for each address family that it leaves open, and one more each for frames whose TTL
//! ends, when it counts the TTL down.

use dpumesh_core::PortRef;
use dpumesh_core::steering::{
    Action, Cookie, Group, Owner, PlacementRequest, Priority, RewriteField, SteeringRule,
};

use super::filter::{Filter, Handle, Place, Skip, prio_of, priority_of};
use super::key::{Family, Keys, family_of, needs_ip};
use super::step::Step;
use super::translate::{Misfit, Names};

/// One filter of a rule, before it has a place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) index: u8,
    pub(super) keys: Keys,
    pub(super) steps: Vec<Step>,
}

impl Part {
    /// Of frames whose TTL ends: stands before the rule itself.
    pub(super) fn is_ttl_ending(&self) -> bool {
        self.index >= TTL_ENDING
    }
}

const TTL_ENDING: u8 = 2;

/// The filters of a rule.
pub(super) fn parts(rule: &SteeringRule, names: &Names) -> Result<Vec<Part>, Misfit> {
    let pattern = &rule.pattern;
    let decapsulates = rule
        .actions
        .iter()
        .any(|action| matches!(action, Action::Decapsulate(_)));
    let link = match pattern.port {
        Some(_) if decapsulates => names.tunnel_name(),
        Some(port) => names.name(port),
        None => None,
    };
    if pattern.port.is_some() && link.is_none() {
        return Err(("pattern.port".into(), "there is no such port".into()));
    }
    let counts_ttl = rule.actions.contains(&Action::DecrementTtl);
    let families: &[Option<Family>] = match family_of(pattern) {
        Some(Family::Ip4) => &[Some(Family::Ip4)],
        Some(Family::Ip6) => &[Some(Family::Ip6)],
        None if needs_ip(pattern) || (counts_ttl && pattern.ethertype.is_none()) => {
            &[Some(Family::Ip4), Some(Family::Ip6)]
        }
        None => &[None],
    };
    let rewrites_address = |action: &Action| {
        matches!(
            action,
            Action::Rewrite(RewriteField::IpSrc(_) | RewriteField::IpDst(_))
        )
    };
    if families.len() > 1 && rule.actions.iter().any(rewrites_address) {
        return Err((
            "pattern.ethertype".into(),
            "must say IPv4 or IPv6 for a rewrite of addresses".into(),
        ));
    }
    let mut parts = Vec::with_capacity(families.len());
    for (index, family) in (0..).zip(families) {
        let Some(keys) = Keys::of(pattern, *family, link) else {
            return Err((
                "pattern.ethertype".into(),
                "does not go with the IP fields of the pattern".into(),
            ));
        };
        let steps = names.steps(rule, *family)?;
        if counts_ttl {
            let keys = keys.clone().with_ttl_ending();
            parts.push(Part {
                index: index + TTL_ENDING,
                keys,
                steps: vec![Step::Drop],
            });
        }
        parts.push(Part { index, keys, steps });
    }
    Ok(parts)
}

/// What a rule's filters have in common.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seat {
    pub(super) owner: u8,
    pub(super) number: u32,
    pub(super) skip: Skip,
    /// Which of the filters of equal key, from 1.
    pub(super) copy: u8,
}

/// A part at its place.
pub(super) fn filter(rule: &SteeringRule, part: Part, seat: Seat) -> Filter {
    let handle = Handle {
        part: part.index,
        count: rule.actions.iter().position(|action| *action == Action::Count),
        explicit: rule.pattern.ethertype.is_some(),
        asked: rule.placement != PlacementRequest::Any,
        owner: seat.owner,
        number: seat.number,
    };
    let slot = if part.is_ttl_ending() { 0 } else { seat.copy };
    Filter {
        place: Place {
            chain: rule.group.0,
            prio: prio_of(rule.priority.0, slot),
            handle: handle.pack(),
        },
        skip: seat.skip,
        keys: part.keys,
        steps: part.steps,
        cookie: rule.cookie.0,
    }
}

/// The rule that these filters of one cookie are. `None` when no rule would be exactly these.
pub(super) fn rule_of(
    filters: &[&Filter],
    owner: impl Fn(u8) -> Option<Owner>,
    names: &Names,
) -> Option<SteeringRule> {
    let mains: Vec<&&Filter> = filters
        .iter()
        .filter(|filter| !filter.keys.is_ttl_ending())
        .collect();
    let main = mains.first()?;
    let handle = Handle::unpack(main.place.handle);
    let (priority, _) = priority_of(main.place.prio)?;
    let mut pattern = main.keys.pattern(handle.explicit && mains.len() == 1)?;
    let tunnelled = main.steps.contains(&Step::Untunnel);
    pattern.port = match main.keys.link() {
        Some(_) if tunnelled => Some(PortRef::Uplink(0)),
        Some(name) => Some(names.port_named(name)?),
        None => None,
    };
    let actions = names.actions(&main.steps, handle.count)?;
    let mut rule = SteeringRule::new(
        Cookie(main.cookie),
        owner(handle.owner)?,
        Priority(priority),
        pattern,
        actions,
    )
    .in_group(Group(main.place.chain));
    rule.placement = match (handle.asked, main.skip) {
        (true, Skip::Software) => PlacementRequest::Hardware,
        (true, Skip::Hardware) => PlacementRequest::Software,
        _ => PlacementRequest::Any,
    };
    rule.check().ok()?;
    let again = parts(&rule, names).ok()?;
    let same = again.len() == filters.len()
        && again.iter().all(|part| {
            filters.iter().any(|filter| {
                filter.keys.contains(&part.keys)
                    && part.keys.contains(&filter.keys)
                    && filter.steps == part.steps
            })
        });
    same.then_some(rule)
}
