//! Claims of [`dpumesh_core::SteeringCapabilities`], taken at their word: up to the limit it works, beyond it the answer
//! names what is exhausted. A claim that does not hold is a failure.

use dpumesh_core::steering::{
    Action, Atomicity, Change, Cookie, Group, IpMatch, Operation, Pattern, Placement, PlacementRequest,
    Priority, SteeringRule, Verdict,
};
use dpumesh_core::{Error, ErrorKind, FlowSteeringExt, MatchKinds};
use ipnet::{IpNet, Ipv4Net};

use super::Rig;
use super::check::{CaseResult, Halt, ensure, ensure_eq, refused};
use super::sample::{FIELDS, MINE, Sampler, actions_of, covers, in_context, pattern_of};
use super::steering::Soc;

/// Tables above this size are not filled: it would test patience. The claim is then reported as not shown.
pub(super) const FILL_LIMIT: u64 = 20_000;

fn fillable(claim: &str, limit: u64) -> CaseResult {
    if limit > FILL_LIMIT {
        return Err(Halt::not_supported(
            claim,
            format!("{limit} are claimed; the kit fills up to {FILL_LIMIT}"),
        ));
    }
    Ok(())
}

/// Adds rules in batches; each of them must be `Added`, by `placed`.
pub(super) async fn fill(
    soc: &Soc,
    sample: &Sampler,
    rules: Vec<SteeringRule>,
    placed: fn(&Placement) -> bool,
) -> CaseResult {
    let longest = sample.claims().batch_max.clamp(1, 512) as usize;
    let mut done = 0;
    for chunk in rules.chunks(longest) {
        let operations = chunk.iter().cloned().map(Operation::Add).collect();
        let outcome = soc.batch(operations, Atomicity::Continue).await?;
        for result in outcome.results {
            match result {
                Ok(Change::Added(placement)) if placed(&placement) => done += 1,
                other => {
                    return Err(Halt::failed(format!(
                        "after {done} rules the next ended as {other:?}"
                    )));
                }
            }
        }
    }
    Ok(())
}

/// The error of a full table: it names a resource and the limit.
fn names_resource(error: &Error, prefix: &str, limit: u64) -> CaseResult {
    let name = error.object.as_ref().map_or("", |object| &object.name);
    ensure!(
        name.starts_with(prefix),
        "the error names resource `{name}`, expected `{prefix}`: {error}"
    );
    ensure!(
        error.message.contains(&limit.to_string()),
        "the message does not tell the limit {limit}: {error}"
    );
    Ok(())
}

fn in_hardware(placement: &Placement) -> bool {
    *placement == Placement::Hardware
}

fn anywhere(_: &Placement) -> bool {
    true
}

pub(super) async fn hardware_holds_the_claimed_rules(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    let limit = sample.claims().hardware_rules;
    fillable("steering.hardware_rules", limit)?;
    let hardware = |i: u64| SteeringRule {
        placement: PlacementRequest::Hardware,
        ..sample.rule(i as u32)
    };
    fill(&soc, &sample, (0..limit).map(hardware).collect(), in_hardware).await?;
    let answer = soc.steering()?.add(soc.fence(), hardware(limit)).await;
    let error = refused(answer, "steering.apply", ErrorKind::CapacityExceeded)?;
    names_resource(&error, "steering.", limit)?;
    // One that may run anywhere goes to software, where there is any.
    let anywhere = sample.rule(limit as u32);
    match (
        sample.claims().software_fallback && sample.claims().rules > limit,
        soc.steering()?.add(soc.fence(), anywhere).await,
    ) {
        (true, Ok(Change::Added(Placement::Software(_) | Placement::Partial(_)))) => {}
        (false, Err(error)) if error.kind == ErrorKind::CapacityExceeded => {}
        (fallback, answer) => {
            return Err(Halt::failed(format!(
                "with software_fallback {fallback} the rule beyond {limit} gave {answer:?}"
            )));
        }
    }
    // Room is given back.
    soc.remove(Cookie(0)).await?;
    let last = SteeringRule {
        cookie: Cookie(u128::from(limit) + 1),
        ..hardware(limit + 1)
    };
    let change = soc.add(last).await?;
    ensure_eq!(
        change,
        Change::Added(Placement::Hardware),
        "addition after a removal"
    );
    Ok(())
}

pub(super) async fn the_card_holds_the_claimed_rules_in_all(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    let limit = sample.claims().rules;
    ensure!(
        limit >= sample.claims().hardware_rules,
        "steering.rules is below steering.hardware_rules"
    );
    fillable("steering.rules", limit)?;
    fill(
        &soc,
        &sample,
        (0..limit).map(|i| sample.rule(i as u32)).collect(),
        anywhere,
    )
    .await?;
    let answer = soc.steering()?.add(soc.fence(), sample.rule(limit as u32)).await;
    let error = refused(answer, "steering.apply", ErrorKind::CapacityExceeded)?;
    names_resource(&error, "steering.rules", limit)?;
    let occupancy = soc.steering()?.occupancy().await?;
    let rules = occupancy.iter().find(|each| each.resource == "steering.rules");
    ensure_eq!(
        rules.map(|each| (each.used, each.limit)),
        Some((limit, limit)),
        "occupancy of the full table"
    );
    // A rule that is there already needs no room.
    let change = soc.add(sample.rule(0)).await?;
    ensure!(
        matches!(change, Change::Present(_)),
        "an equal rule in a full table ended as {change:?}"
    );
    ensure_eq!(soc.mine().await?.len() as u64, limit, "rules listed");
    Ok(())
}

/// A rule judged `No` by this field, which adding refuses as well.
async fn is_impossible(soc: &Soc, rule: SteeringRule, field: &str) -> CaseResult {
    let verdict = soc.steering()?.validate(std::slice::from_ref(&rule)).await?.pop();
    ensure!(
        matches!(&verdict, Some(Verdict::No { field: named, .. }) if named == field),
        "verdict {verdict:?}, expected No with field {field}"
    );
    let answer = soc.steering()?.add(soc.fence(), rule).await;
    let error = refused(answer, "steering.apply", ErrorKind::Unsupported)?;
    let named = error.object.as_ref().map_or("", |object| &object.field);
    ensure_eq!(named, field, "field that the error names");
    Ok(())
}

pub(super) async fn the_claimed_priorities_are_accepted(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    let levels = sample.claims().priorities;
    ensure!(levels > 0, "steering.priorities is 0: no rule could be had");
    for (i, priority) in [0, levels / 2, levels - 1].into_iter().enumerate() {
        let rule = SteeringRule {
            priority: Priority(priority),
            ..sample.rule(i as u32)
        };
        soc.add(rule).await?;
    }
    let beyond = SteeringRule {
        priority: Priority(levels),
        ..sample.rule(9)
    };
    is_impossible(&soc, beyond, "priority").await
}

pub(super) async fn the_claimed_groups_are_accepted(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    let groups = sample.claims().groups;
    ensure!(groups > 0, "steering.groups is 0: no rule could be had");
    for (i, group) in [0, groups - 1].into_iter().enumerate() {
        soc.add(sample.rule(i as u32).in_group(Group(group))).await?;
    }
    is_impossible(&soc, sample.rule(9).in_group(Group(groups)), "group").await
}

pub(super) async fn a_jump_stays_within_the_claimed_groups(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    let groups = sample.claims().groups;
    let to = |group| SteeringRule {
        actions: vec![Action::Jump(Group(group))],
        ..sample.rule(group)
    };
    soc.add(to(groups - 1)).await?;
    is_impossible(&soc, to(groups), "actions[0]").await
}

pub(super) async fn a_batch_of_the_claimed_length_is_taken(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    let longest = u64::from(sample.claims().batch_max);
    ensure!(longest > 0, "steering.batch_max is 0: no rule could be had");
    fillable("steering.batch_max", longest)?;
    let absent = |i| Operation::Remove {
        owner: MINE,
        cookie: Cookie(u128::from(i) + 1000),
    };
    let mut operations: Vec<Operation> = (1..longest).map(absent).collect();
    operations.push(Operation::Add(sample.rule(1)));
    soc.batch(operations.clone(), Atomicity::Continue)
        .await?
        .into_result()?;
    soc.remove(Cookie(1)).await?;
    operations.insert(0, Operation::Add(sample.rule(2)));
    let batch = dpumesh_core::steering::Batch::new(operations);
    let answer = soc.steering()?.apply(soc.fence(), &batch).await;
    let error = refused(answer, "steering.apply", ErrorKind::CapacityExceeded)?;
    names_resource(&error, "steering.batch_max", longest)?;
    ensure!(soc.mine().await?.is_empty(), "a batch too long left a rule");
    Ok(())
}

pub(super) async fn the_claimed_counters_count(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    let limit = sample.claims().counters;
    fillable("steering.counters", limit)?;
    let rules = sample.claims().rules;
    let room = limit.min(rules);
    fill(
        &soc,
        &sample,
        (0..room).map(|i| sample.counting(i as u32)).collect(),
        anywhere,
    )
    .await?;
    let cookies: Vec<Cookie> = (0..room).map(|i| Cookie(u128::from(i))).collect();
    let answers = soc.steering()?.counters(MINE, &cookies).await?;
    let counting = answers.iter().filter(|answer| answer.is_some()).count() as u64;
    ensure_eq!(counting, room, "rules that count");
    if rules <= limit {
        return Ok(());
    }
    let next = sample.counting(limit as u32);
    if room < sample.claims().hardware_rules {
        let in_hardware = SteeringRule {
            placement: PlacementRequest::Hardware,
            ..next.clone()
        };
        if soc
            .steering()?
            .validate(std::slice::from_ref(&in_hardware))
            .await?
            == [Verdict::Hardware]
        {
            let answer = soc.steering()?.add(soc.fence(), in_hardware).await;
            let error = refused(answer, "steering.apply", ErrorKind::CapacityExceeded)?;
            names_resource(&error, "steering.counters", limit)?;
        }
    }
    // What hardware cannot count may be counted in software, and is then said to be there.
    match soc.steering()?.add(soc.fence(), next).await {
        Ok(Change::Added(Placement::Software(_) | Placement::Partial(_)))
            if sample.claims().software_fallback => {}
        answer => {
            let error = refused(answer, "steering.apply", ErrorKind::CapacityExceeded)?;
            names_resource(&error, "steering.counters", limit)?;
        }
    }
    // A rule without a counter still fits.
    soc.add(sample.rule(limit as u32 + 1)).await?;
    Ok(())
}

/// The `i`-th of 1,024 patterns whose masks differ.
fn masked(i: u32) -> Pattern {
    let prefix = |base: [u8; 4], length: u32| -> Option<IpMatch> {
        let net = Ipv4Net::new(base.into(), length as u8).ok()?;
        Some(IpMatch::from(IpNet::from(net)))
    };
    Pattern {
        ip_dst: prefix([10, 1, 2, 3], i % 32 + 1),
        ip_src: (i >= 32).then(|| prefix([172, 16, 5, 6], i / 32)).flatten(),
        ..Pattern::default()
    }
}

pub(super) async fn the_claimed_masks_are_held(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    let limit = sample.claims().masks;
    if limit >= 512 || u64::from(limit) >= sample.claims().hardware_rules {
        return Err(Halt::not_supported(
            "steering.masks",
            format!("{limit} sets of masks are more than the kit makes or the table holds"),
        ));
    }
    let prefixes = |field| {
        let kinds = sample
            .claims()
            .hardware_fields
            .get(&field)
            .copied()
            .unwrap_or_default();
        covers(field, kinds, MatchKinds::PREFIX)
    };
    use dpumesh_core::steering::Field::{Ip4Dst, Ip4Src};
    if !prefixes(Ip4Dst) || (limit >= 32 && !prefixes(Ip4Src)) {
        return Err(Halt::not_supported(
            "steering.hardware_fields",
            "IPv4 prefixes cannot be matched in hardware: no masks to differ by",
        ));
    }
    let rule = |i: u32, placement| SteeringRule {
        pattern: masked(i),
        placement,
        ..sample.rule(i)
    };
    let hardware = |i| rule(i, PlacementRequest::Hardware);
    fill(&soc, &sample, (0..limit).map(hardware).collect(), in_hardware).await?;
    let answer = soc.steering()?.add(soc.fence(), hardware(limit)).await;
    let error = refused(answer, "steering.apply", ErrorKind::CapacityExceeded)?;
    names_resource(&error, "steering.masks", u64::from(limit))?;
    if sample.claims().software_fallback {
        let change = soc.add(rule(limit, PlacementRequest::Any)).await?;
        ensure!(
            matches!(
                change,
                Change::Added(Placement::Software(_) | Placement::Partial(_))
            ),
            "the rule beyond the masks ended as {change:?}"
        );
    }
    Ok(())
}

/// The best verdict over the contexts in which a card may want a pattern.
async fn best_verdict(
    soc: &Soc,
    sample: &Sampler,
    pattern: &Pattern,
    actions: &[Action],
    group: Group,
) -> Result<Verdict, Halt> {
    let rules: Vec<SteeringRule> = in_context(pattern, sample.port())
        .into_iter()
        .map(|pattern| SteeringRule {
            pattern,
            actions: actions.to_vec(),
            group,
            ..sample.rule(1)
        })
        .filter(|rule| rule.check().is_ok())
        .collect();
    let mut best = None;
    for verdict in soc.steering()?.validate(&rules).await? {
        if verdict == Verdict::Hardware {
            return Ok(verdict);
        }
        let better = match &best {
            None => true,
            Some(Verdict::No { .. }) => verdict.is_possible(),
            Some(_) => false,
        };
        if better {
            best = Some(verdict);
        }
    }
    best.ok_or_else(|| Halt::failed("validate gave no verdict"))
}

/// Marks and connection states come from earlier groups.
fn group_for(sample: &Sampler) -> Group {
    Group(sample.claims().groups.saturating_sub(1).min(1))
}

pub(super) async fn claimed_fields_can_be_matched(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    let claims = sample.claims();
    for (field, kinds) in &claims.fields {
        for kind in kinds.iter() {
            let Some(pattern) = pattern_of(*field, kind, sample.port()) else {
                continue;
            };
            let verdict =
                best_verdict(&soc, &sample, &pattern, &sample.actions(), group_for(&sample)).await?;
            ensure!(
                verdict.is_possible(),
                "steering.fields claims {kind:?} of {}, but validate says {verdict:?}",
                field.path()
            );
        }
    }
    Ok(())
}

pub(super) async fn fields_claimed_in_hardware_are_judged_hardware(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    let claims = sample.claims();
    for field in FIELDS {
        let of = |fields: &std::collections::BTreeMap<_, MatchKinds>| {
            fields.get(&field).copied().unwrap_or_default()
        };
        let (hardware, at_all) = (of(&claims.hardware_fields), of(&claims.fields));
        ensure!(
            at_all.contains(hardware),
            "{}: {hardware:?} in hardware, but {at_all:?} at all",
            field.path()
        );
        for kind in at_all.iter() {
            let Some(pattern) = pattern_of(field, kind, sample.port()) else {
                continue;
            };
            let verdict =
                best_verdict(&soc, &sample, &pattern, &sample.actions(), group_for(&sample)).await?;
            let claimed = hardware.contains(kind);
            let covered = covers(field, hardware, kind);
            ensure!(
                if claimed {
                    verdict == Verdict::Hardware
                } else {
                    covered || verdict != Verdict::Hardware
                },
                "steering.hardware_fields claims {hardware:?} of {}, but {kind:?} is judged {verdict:?}",
                field.path()
            );
        }
    }
    Ok(())
}

pub(super) async fn an_unclaimed_field_is_impossible_by_its_path(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    for field in FIELDS {
        let claimed = sample.claims().fields.get(&field).copied().unwrap_or_default();
        for kind in MatchKinds::all()
            .iter()
            .filter(|kind| !covers(field, claimed, *kind))
        {
            let Some(pattern) = pattern_of(field, kind, sample.port()) else {
                continue;
            };
            // The protocol that a port or flags need may itself be unclaimed: then either may be named.
            let rule = SteeringRule {
                pattern,
                ..sample.rule(1)
            };
            let verdict = soc.steering()?.validate(std::slice::from_ref(&rule)).await?.pop();
            let Some(Verdict::No { field: named, .. }) = &verdict else {
                return Err(Halt::failed(format!(
                    "{kind:?} of {} is not claimed, but judged {verdict:?}",
                    field.path()
                )));
            };
            ensure!(
                named == field.path() || named == "pattern.ip_proto",
                "{kind:?} of {} is refused by field `{named}`",
                field.path()
            );
            let answer = soc.steering()?.add(soc.fence(), rule).await;
            refused(answer, "steering.apply", ErrorKind::Unsupported)?;
        }
    }
    ensure!(soc.mine().await?.is_empty(), "an impossible rule was installed");
    Ok(())
}

pub(super) async fn claimed_actions_can_be_had(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    let claims = sample.claims();
    ensure!(
        claims.actions.contains(claims.hardware_actions),
        "steering.hardware_actions has {:?}, which steering.actions lacks",
        claims.hardware_actions - claims.actions
    );
    let end = &sample.actions()[0];
    for kind in claims.actions.iter() {
        for actions in actions_of(kind, sample.port(), end) {
            let verdict = best_verdict(&soc, &sample, &sample.pattern(1), &actions, Group(0)).await?;
            ensure!(
                verdict.is_possible(),
                "steering.actions claims {kind:?}, but {actions:?} is judged {verdict:?}"
            );
            ensure!(
                verdict != Verdict::Hardware || claims.hardware_actions.contains(kind),
                "steering.hardware_actions lacks {kind:?}, but {actions:?} is judged {verdict:?}"
            );
        }
    }
    Ok(())
}

pub(super) async fn an_unclaimed_action_is_impossible_by_its_index(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    let end = &sample.actions()[0];
    let missing = dpumesh_core::ActionKinds::all() - sample.claims().actions;
    for kind in missing.iter() {
        for actions in actions_of(kind, sample.port(), end) {
            let rule = SteeringRule {
                actions,
                ..sample.rule(1)
            };
            is_impossible(&soc, rule, "actions[0]").await?;
        }
    }
    Ok(())
}

pub(super) async fn without_idle_timeouts_one_is_impossible(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    let rule = SteeringRule {
        idle_timeout_ms: Some(1000),
        ..sample.rule(1)
    };
    is_impossible(&soc, rule, "idle_timeout_ms").await
}
