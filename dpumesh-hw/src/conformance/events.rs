//! What a card reports by itself: the sentences of [`dpumesh_core::EventStream`] and [`dpumesh_core::Event`].

use std::time::Duration;

use dpumesh_core::steering::{Cookie, SteeringRule};
use dpumesh_core::{BackendExt, Epoch, Error, ErrorKind, Event, EventKinds, EventStream, PfIndex, PortRef};

use super::check::{CaseResult, Halt, cancelled, ensure, ensure_eq};
use super::disturb::{Disturbance, disturb};
use super::limits::{FILL_LIMIT, fill};
use super::sample::{MINE, Sampler};
use super::steering::Soc;
use super::traffic::pass;
use super::{Reset, Rig};

const WITHIN: Duration = Duration::from_secs(3);

fn reset(rig: &dyn Rig) -> Result<&dyn Reset, Halt> {
    rig.reset()
        .ok_or_else(|| Halt::not_supported("rig.reset", "the fixture cannot reset the card"))
}

async fn next(stream: &mut dyn EventStream) -> Result<Event, Halt> {
    match tokio::time::timeout(WITHIN, stream.next()).await {
        Ok(Some(event)) => Ok(event),
        Ok(None) => Err(Halt::failed("the events end though the backend lives")),
        Err(_) => Err(Halt::failed(format!("no event within {WITHIN:?}"))),
    }
}

/// The next event that the filter lets through, over whatever else the card reports.
async fn next_that(stream: &mut dyn EventStream, wanted: fn(&Event) -> bool) -> Result<Event, Halt> {
    for _ in 0..1000 {
        let event = next(stream).await?;
        if wanted(&event) {
            return Ok(event);
        }
    }
    Err(Halt::failed("1,000 events, none of them the expected one"))
}

fn is_life(event: &Event) -> bool {
    matches!(event, Event::Lost { .. } | Event::Back { .. })
}

pub(super) async fn lost_comes_before_back_with_their_epochs(rig: &dyn Rig) -> CaseResult {
    for backend in [rig.host(), rig.soc()] {
        let mut stream = backend.events();
        let old = backend.epoch();
        reset(rig)?.lose().await?;
        ensure_eq!(
            next_that(&mut *stream, is_life).await?,
            Event::Lost { epoch: old },
            "event when the card went"
        );
        reset(rig)?.bring_back().await?;
        let back = next_that(&mut *stream, is_life).await?;
        let new = backend.epoch();
        ensure!(new > old, "the epoch {old:?} became {new:?}");
        ensure_eq!(back, Event::Back { epoch: new }, "event when the card returned");
    }
    Ok(())
}

pub(super) async fn when_back_arrives_the_card_is_usable(rig: &dyn Rig) -> CaseResult {
    let host = rig.host();
    let mut stream = host.events();
    reset(rig)?.lose().await?;
    reset(rig)?.bring_back().await?;
    let back = next_that(&mut *stream, |event| matches!(event, Event::Back { .. })).await?;
    let Event::Back { epoch } = back else {
        return Err(Halt::failed("no `Back`"));
    };
    ensure_eq!(host.epoch(), epoch, "epoch of the backend");
    let request = dpumesh_core::vf::VfRequest::new("pod");
    host.require_vf()?
        .lease(dpumesh_core::Fence(epoch), &request)
        .await?;
    Ok(())
}

pub(super) async fn a_subscription_begins_now(rig: &dyn Rig) -> CaseResult {
    let soc = rig.soc();
    reset(rig)?.lose().await?;
    reset(rig)?.bring_back().await?;
    let mut late = soc.events();
    let epoch = soc.epoch();
    reset(rig)?.lose().await?;
    ensure_eq!(
        next_that(&mut *late, is_life).await?,
        Event::Lost { epoch },
        "first event of a late subscriber"
    );
    Ok(())
}

pub(super) async fn every_subscriber_sees_the_same_order(rig: &dyn Rig) -> CaseResult {
    let soc = rig.soc();
    let mut streams = [soc.events(), soc.events()];
    let mut expected = Vec::new();
    for _ in 0..3 {
        expected.push(Event::Lost { epoch: soc.epoch() });
        reset(rig)?.lose().await?;
        reset(rig)?.bring_back().await?;
        expected.push(Event::Back { epoch: soc.epoch() });
    }
    for stream in &mut streams {
        for event in &expected {
            ensure_eq!(next_that(&mut **stream, is_life).await?, *event, "event");
        }
    }
    Ok(())
}

pub(super) async fn cancelling_next_loses_no_event(rig: &dyn Rig) -> CaseResult {
    let soc = rig.soc();
    let mut stream = soc.events();
    cancelled(stream.next()).await;
    let epoch = soc.epoch();
    reset(rig)?.lose().await?;
    let waited = tokio::time::timeout(Duration::from_nanos(1), stream.next()).await;
    if let Ok(event) = waited {
        ensure_eq!(event, Some(Event::Lost { epoch }), "event");
        return Ok(());
    }
    ensure_eq!(
        next_that(&mut *stream, is_life).await?,
        Event::Lost { epoch },
        "event after a cancelled wait"
    );
    Ok(())
}

pub(super) async fn events_end_with_the_backend(rig: &dyn Rig) -> CaseResult {
    let Some(crash) = rig.crash() else {
        return Err(Halt::not_supported(
            "rig.crash",
            "the fixture cannot drop the backend",
        ));
    };
    let mut stream = rig.soc().events();
    crash.crash().await?;
    for _ in 0..1000 {
        match tokio::time::timeout(WITHIN, stream.next()).await {
            Ok(None) => return Ok(()),
            Ok(Some(_)) => {}
            Err(_) => return Err(Halt::failed("the events go on after the backend was dropped")),
        }
    }
    Err(Halt::failed("1,000 events after the backend was dropped"))
}

pub(super) async fn a_slow_subscriber_is_told_how_many_it_lost(rig: &dyn Rig) -> CaseResult {
    const LONGEST: Duration = Duration::from_secs(5);
    let soc = rig.soc();
    let mut stream = soc.events();
    let begun = std::time::Instant::now();
    let mut raised = 0_u64;
    let first = soc.epoch();
    let reset = reset(rig)?;
    for _ in 0..reset.most_in_a_row() {
        reset.lose().await?;
        reset.bring_back().await?;
        raised += 2;
        if begun.elapsed() > LONGEST {
            break;
        }
    }
    let last = soc.epoch();
    let (mut lost, mut life) = (0, Vec::new());
    while life.last() != Some(&Event::Back { epoch: last }) {
        match next(&mut *stream).await? {
            Event::Overflowed(count) => {
                ensure!(life.is_empty(), "the loss is told behind events that came later");
                ensure!(lost == 0 && count > 0, "the loss is told as {lost}, then {count}");
                lost = count;
            }
            event if is_life(&event) => life.push(event),
            _ => {}
        }
    }
    ensure!(
        lost > 0 || life.first() == Some(&Event::Lost { epoch: first }),
        "events were lost, and nobody was told"
    );
    ensure!(
        lost + life.len() as u64 >= raised,
        "{} events arrived and {lost} were told lost, {raised} were raised",
        life.len()
    );
    let epochs: Vec<Epoch> = life
        .iter()
        .filter_map(|event| match event {
            Event::Lost { epoch } | Event::Back { epoch } => Some(*epoch),
            _ => None,
        })
        .collect();
    ensure!(epochs.is_sorted(), "events arrive out of order");
    if lost == 0 {
        return Err(Halt::not_supported(
            "rig.reset",
            format!("the queue holds all of {raised} events: nothing overflowed"),
        ));
    }
    Ok(())
}

pub(super) async fn a_rule_that_nothing_hits_ages_with_its_counters(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    let counts = sample.claims().actions.contains(dpumesh_core::ActionKinds::COUNT);
    let mut stream = soc.backend.events();
    let ageing = SteeringRule {
        idle_timeout_ms: Some(40),
        ..if counts {
            sample.counting(1)
        } else {
            sample.rule(1)
        }
    };
    soc.add(ageing).await?;
    soc.add(sample.rule(2)).await?;
    pass(rig, Duration::from_millis(60)).await;
    let event = next_that(&mut *stream, |event| matches!(event, Event::Aged { .. })).await?;
    let Event::Aged { owner, rules } = event else {
        return Err(Halt::failed("no `Aged`"));
    };
    ensure_eq!(owner, MINE, "owner");
    ensure_eq!(rules.len(), 1, "rules aged");
    ensure_eq!(rules[0].0, Cookie(1), "cookie");
    ensure_eq!(
        rules[0].1.is_some(),
        counts,
        "whether final counters came with it"
    );
    let left: Vec<Cookie> = soc.mine().await?.iter().map(|each| each.rule.cookie).collect();
    ensure_eq!(left, vec![Cookie(2)], "rules left");
    ensure_eq!(
        soc.remove(Cookie(1)).await?,
        dpumesh_core::steering::Change::Absent,
        "removal of the aged rule"
    );
    Ok(())
}

fn is_high_water(event: &Event) -> bool {
    matches!(event, Event::HighWater { resource, .. } if resource == "steering.rules")
}

pub(super) async fn a_high_water_mark_is_told_once_until_it_fell(rig: &dyn Rig) -> CaseResult {
    let (soc, sample) = (Soc::of(rig), Sampler::new(rig).await?);
    let limit = sample.claims().rules;
    if limit > FILL_LIMIT {
        return Err(Halt::not_supported(
            "steering.rules",
            format!("{limit} are claimed; the kit fills up to {FILL_LIMIT}"),
        ));
    }
    let mut stream = soc.backend.events();
    for round in 0..2 {
        let rules = (0..limit).map(|i| sample.rule(i as u32)).collect();
        fill(&soc, &sample, rules, |_| true).await?;
        let event = next_that(&mut *stream, is_high_water).await?;
        let Event::HighWater {
            used, limit: told, ..
        } = event
        else {
            return Err(Halt::failed("no `HighWater`"));
        };
        ensure!(0 < used && used <= told, "{used} of {told} in use");
        ensure_eq!(told, limit, "limit told");
        // A little down and up again is above the mark all the time.
        soc.remove(Cookie(0)).await?;
        soc.add(sample.rule(0)).await?;
        soc.steering()?.flush(soc.fence(), MINE).await?;
        // Nothing else of this resource is queued: the next round's event is the next one, else its count is off.
        let extra = tokio::time::timeout(Duration::from_millis(30), async {
            next_that(&mut *stream, is_high_water).await
        })
        .await;
        ensure!(
            extra.is_err(),
            "round {round}: the mark was told again: {extra:?}"
        );
    }
    Ok(())
}

pub(super) async fn a_new_vf_is_told(rig: &dyn Rig) -> CaseResult {
    let host = rig.host();
    let vf = host.require_vf()?;
    if !host.capabilities().vf.resizable {
        return Err(Halt::not_supported("vf.resizable", "the number of VFs is fixed"));
    }
    let Some(PortRef::Vf { pf, .. }) = vf.list().await?.first().map(|state| state.port) else {
        return Err(Halt::failed("the card lists no VF"));
    };
    vf.set_vf_count(host.fence(), pf, 0).await?;
    let mut stream = host.events();
    let PfIndex(_) = pf;
    let count = vf.set_vf_count(host.fence(), pf, 1).await?;
    ensure_eq!(count.actual, 1, "VFs");
    let event = next_that(&mut *stream, |event| matches!(event, Event::VfAdded(_))).await?;
    let listed = vf.list().await?;
    ensure_eq!(event, Event::VfAdded(listed[0].port), "event when a VF appeared");
    Ok(())
}

pub(super) async fn unclaimed_kinds_of_events_are_not_raised(rig: &dyn Rig) -> CaseResult {
    let soc = rig.soc();
    let claimed = soc.capabilities().events;
    let mut stream = soc.events();
    if soc.steering().is_some() {
        // Full and empty again: what has a mark passes it.
        let (steered, sample) = (Soc::of(rig), Sampler::new(rig).await?);
        let limit = sample.claims().rules;
        let count = if limit > FILL_LIMIT { 1 } else { limit };
        let rules = (0..count).map(|i| sample.rule(i as u32)).collect();
        fill(&steered, &sample, rules, |_| true).await?;
        steered.steering()?.flush(soc.fence(), MINE).await?;
    }
    reset(rig)?.lose().await?;
    reset(rig)?.bring_back().await?;
    loop {
        let event = next(&mut *stream).await?;
        let kind = match event {
            Event::Back { .. } => return Ok(()),
            Event::Link { .. } => EventKinds::LINK,
            Event::Health(_) => EventKinds::HEALTH,
            Event::HighWater { .. } => EventKinds::HIGH_WATER,
            Event::Aged { .. } => EventKinds::AGED,
            Event::VfAdded(_) | Event::VfRemoved(_) => EventKinds::VF,
            _ => continue,
        };
        ensure!(
            claimed.contains(kind),
            "{event:?} is raised, but {kind:?} is not claimed"
        );
    }
}

pub(super) async fn a_carrier_that_changes_is_told_and_listed(rig: &dyn Rig) -> CaseResult {
    let soc = rig.soc();
    let ports = soc.require_ports()?;
    let Some(port) = ports
        .list()
        .await?
        .iter()
        .find(|info| info.link_up && matches!(info.port, PortRef::Uplink(_)))
        .map(|info| info.port)
    else {
        return Err(Halt::not_supported("ports.uplink", "no uplink has its carrier"));
    };
    let mut stream = soc.events();
    for up in [false, true] {
        disturb(rig, Disturbance::Carrier { port, up }).await?;
        let event = next_that(&mut *stream, |event| matches!(event, Event::Link { .. })).await?;
        ensure_eq!(event, Event::Link { port, up }, "event when the carrier changed");
        let listed = ports.list().await?;
        let listed = listed.iter().find(|info| info.port == port);
        ensure_eq!(listed.map(|info| info.link_up), Some(up), "carrier listed");
    }
    Ok(())
}

pub(super) async fn health_that_changes_is_told(rig: &dyn Rig) -> CaseResult {
    let soc = rig.soc();
    let mut stream = soc.events();
    let hot = Error::new(ErrorKind::Fault, "rig.disturb.health", "it is too hot");
    for health in [Some(hot), None] {
        disturb(rig, Disturbance::Health(health.clone())).await?;
        let event = next_that(&mut *stream, |event| matches!(event, Event::Health(_))).await?;
        let Event::Health(told) = event else {
            return Err(Halt::failed("no `Health`"));
        };
        ensure_eq!(
            told.is_some(),
            health.is_some(),
            "whether the card is told to be ill"
        );
        if let Some(told) = told {
            ensure!(!told.message.is_empty(), "the illness has no name");
        }
    }
    Ok(())
}

pub(super) async fn a_vf_that_went_is_told(rig: &dyn Rig) -> CaseResult {
    let host = rig.host();
    let vf = host.require_vf()?;
    let mut before: Vec<PortRef> = vf.list().await?.iter().map(|state| state.port).collect();
    let Some(PortRef::Vf { pf, .. }) = before.first().copied() else {
        return Err(Halt::failed("the card lists no VF"));
    };
    let mut stream = host.events();
    vf.set_vf_count(host.fence(), pf, 0).await?;
    let mut told = Vec::new();
    for _ in &before {
        let event = next_that(&mut *stream, |event| matches!(event, Event::VfRemoved(_))).await?;
        if let Event::VfRemoved(port) = event {
            told.push(port);
        }
    }
    before.sort();
    told.sort();
    ensure_eq!(told, before, "VFs told to be gone");
    Ok(())
}
