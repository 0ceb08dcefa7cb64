//! What the kit does not ask: where rules go and why, refusals of the card, replay, modes, and what is said when card,
//! library or firmware are not what is needed.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use dpumesh_core::steering::{
    Action, Atomicity, Batch, Change, Cookie, Group, InstalledRule, IpMatch, IpProtocol, MeterId, Operation,
    Owner, Pattern, Placement, PlacementRequest, PortRange, Priority, SteeringRule, Undone, Verdict,
};
use dpumesh_core::{Backend, BackendExt, Effect, Error, ErrorKind, Event, FlowSteeringExt};
use dpumesh_hw::memory::{MemoryConfig, capabilities};
use dpumesh_yusur::{MeterRate, Mode, YusurBackend};
use dpumesh_yusur_simulator::fixture::{TestCard, YusurFixture};

fn fixture(profile: &str) -> TestCard {
    let mut floor = capabilities();
    floor.steering.rules = 20_000;
    let mut config = MemoryConfig::default();
    config.capabilities = floor;
    YusurFixture::new("card", profile)
        .on_floor(config)
        .card()
        .expect("a card")
}

fn to(host: u32) -> Pattern {
    Pattern {
        ip_dst: Some(IpMatch::from(IpAddr::V4(Ipv4Addr::from(0x0a00_0000 + host)))),
        ..Pattern::default()
    }
}

fn rule(cookie: u128, priority: u32, pattern: Pattern, action: Action) -> SteeringRule {
    SteeringRule::new(
        Cookie(cookie),
        Owner::Agent,
        Priority(priority),
        pattern,
        vec![action],
    )
}

async fn add(card: &YusurBackend, rule: SteeringRule) -> Result<Change, Error> {
    card.require_steering()?.add(card.fence(), rule).await
}

async fn listed(card: &YusurBackend) -> Vec<InstalledRule> {
    let steering = card.require_steering().expect("steering");
    steering.list(Owner::Agent).await.expect("listed")
}

async fn placement(card: &YusurBackend, cookie: u128) -> Placement {
    let rules = listed(card).await;
    let found = rules.into_iter().find(|each| each.rule.cookie == Cookie(cookie));
    found.expect("the rule is listed").placement
}

fn in_software(placement: &Placement, reason: &str) -> bool {
    matches!(placement, Placement::Software(said) if said.contains(reason))
}

#[tokio::test]
async fn masked_rules_are_expanded_or_said_why_not() {
    let test = fixture("");
    let card = test.open().expect("opened");
    let range = Pattern {
        ip_proto: Some(IpProtocol::TCP),
        l4_dst: Some(PortRange { first: 80, last: 87 }),
        ..Pattern::default()
    };
    add(&card, rule(1, 0, range, Action::Drop)).await.expect("added");
    assert_eq!(placement(&card, 1).await, Placement::Hardware);
    assert_eq!(card.diagnose("entries").await.expect("told"), "8");
    let wide = Pattern {
        ip_dst: Some(IpMatch::from(
            "10.0.0.0/8".parse::<ipnet::IpNet>().expect("a prefix"),
        )),
        ..Pattern::default()
    };
    add(&card, rule(2, 1, wide.clone(), Action::Punt))
        .await
        .expect("added");
    assert!(in_software(&placement(&card, 2).await, "16777216 entries"));
    let mut only_hardware = rule(3, 2, wide, Action::Punt);
    only_hardware.placement = PlacementRequest::Hardware;
    let verdicts = card
        .require_steering()
        .expect("steering")
        .validate(&[only_hardware.clone()])
        .await;
    assert!(
        matches!(&verdicts.expect("judged")[..], [Verdict::No { field, .. }] if field == "pattern.ip_dst")
    );
    let refused = add(&card, only_hardware).await.expect_err("it does not fit");
    assert_eq!(refused.kind, ErrorKind::Unsupported);
}

#[tokio::test]
async fn software_that_wins_takes_what_it_hides_out_of_hardware() {
    let test = fixture("");
    let card = test.open().expect("opened");
    add(&card, rule(1, 2, to(1), Action::Punt)).await.expect("added");
    add(&card, rule(2, 2, to(300), Action::Punt))
        .await
        .expect("added");
    assert_eq!(placement(&card, 1).await, Placement::Hardware);
    let wide: ipnet::IpNet = "10.0.0.0/24".parse().expect("a prefix");
    let wide = Pattern {
        ip_dst: Some(wide.into()),
        ..Pattern::default()
    };
    add(&card, rule(3, 1, wide.clone(), Action::Drop))
        .await
        .expect("added");
    assert!(in_software(&placement(&card, 1).await, "wins over it"));
    assert_eq!(placement(&card, 2).await, Placement::Hardware, "it is not hidden");
    assert_eq!(card.diagnose("entries").await.expect("told"), "1");
    // A later rule finds the same.
    add(&card, rule(4, 3, to(2), Action::Punt)).await.expect("added");
    assert!(in_software(&placement(&card, 4).await, "wins over it"));
    // One that must be in hardware is never hidden.
    let mut fixed = rule(5, 2, to(600), Action::Punt);
    fixed.placement = PlacementRequest::Hardware;
    add(&card, fixed).await.expect("added");
    let hides: ipnet::IpNet = "10.0.0.0/16".parse().expect("a prefix");
    let hides = Pattern {
        ip_dst: Some(hides.into()),
        ..Pattern::default()
    };
    let refused = add(&card, rule(6, 0, hides, Action::Drop))
        .await
        .expect_err("it hides rule 5");
    assert_eq!(refused.kind, ErrorKind::Conflict);
    assert_eq!(listed(&card).await.len(), 5);
    assert_eq!(
        placement(&card, 2).await,
        Placement::Hardware,
        "nothing was moved for a refused rule"
    );
}

#[tokio::test]
async fn what_the_card_refuses_acts_in_software_or_fails() {
    const COLLISION: i32 = dpumesh_yusur::table::E_COLLISION;
    let test = fixture("");
    let card = test.open().expect("opened");
    let steering = card.require_steering().expect("steering");
    let batch = |from: u32, placement| {
        let one = |i: u32| {
            let mut rule = rule(i.into(), 0, to(i), Action::Punt);
            rule.placement = placement;
            Operation::Add(rule)
        };
        Batch::new((from..from + 4).map(one).collect())
    };
    card.diagnose(&format!("fail 2 {COLLISION}")).await.expect("told");
    let outcome = steering
        .apply(card.fence(), &batch(0, PlacementRequest::Any))
        .await
        .expect("carried out");
    for (i, result) in outcome.results.iter().enumerate() {
        match result {
            Ok(Change::Added(Placement::Software(reason))) if i < 2 => {
                assert!(reason.contains("bucket"), "{reason}")
            }
            Ok(Change::Added(Placement::Hardware)) if i >= 2 => {}
            other => panic!("rule {i} ended as {other:?}"),
        }
    }
    card.diagnose(&format!("fail 1 {COLLISION}")).await.expect("told");
    let only_hardware = batch(10, PlacementRequest::Hardware);
    let outcome = steering
        .apply(card.fence(), &only_hardware)
        .await
        .expect("carried out");
    let kinds: Vec<_> = outcome
        .results
        .iter()
        .map(|result| result.as_ref().map_err(|error| error.kind).err())
        .collect();
    assert_eq!(kinds, [Some(ErrorKind::CapacityExceeded), None, None, None]);
    card.diagnose(&format!("fail 1 {COLLISION}")).await.expect("told");
    let before = listed(&card).await;
    let rolled = batch(20, PlacementRequest::Hardware).with(Atomicity::Rollback);
    let outcome = steering.apply(card.fence(), &rolled).await.expect("carried out");
    assert_eq!(outcome.undone, Undone::All);
    assert_eq!(listed(&card).await, before);
    assert_eq!(card.diagnose("entries").await.expect("told"), "5");
}

/// Waits until the card is in a life after `epoch`.
async fn back_after(card: &Arc<YusurBackend>, command: &str) {
    let mut events = card.events();
    card.diagnose(command).await.expect("told");
    let back = async { while !matches!(events.next().await, Some(Event::Back { .. }) | None) {} };
    tokio::time::timeout(Duration::from_secs(60), back)
        .await
        .expect("the card came back");
}

#[tokio::test]
async fn ten_thousand_rules_are_replayed_after_a_reset() {
    const RULES: u32 = 10_000;
    let test = fixture("entries=16384");
    let card = test.open().expect("opened");
    let steering = card.require_steering().expect("steering");
    let longest = card.capabilities().steering.batch_max;
    for from in (0..RULES).step_by(longest as usize) {
        let one = |i: u32| Operation::Add(rule(i.into(), 0, to(i), Action::Punt));
        let batch = Batch::new((from..RULES.min(from + longest)).map(one).collect());
        let outcome = steering.apply(card.fence(), &batch).await.expect("carried out");
        outcome.into_result().expect("each is added");
    }
    let (epoch, before) = (card.epoch(), listed(&card).await);
    card.diagnose("lose").await.expect("told");
    let begun = Instant::now();
    back_after(&card, "restore").await;
    let took = begun.elapsed();
    println!("{RULES} rules were back {took:?} after the processor was");
    assert!(card.epoch() > epoch);
    assert_eq!(listed(&card).await, before);
    assert_eq!(card.diagnose("entries").await.expect("told"), RULES.to_string());
    assert!(took < Duration::from_secs(10), "replay took {took:?}"); // a second, by the bench
}

#[tokio::test]
async fn a_mode_is_a_life_of_its_own() {
    let test = fixture("");
    let card = test.open().expect("opened");
    add(&card, rule(1, 0, to(1), Action::Punt)).await.expect("added");
    assert!(card.capabilities().mode.starts_with("dpu"));
    let old = card.fence();
    let mut events = card.events();
    card.set_mode(card.fence(), Mode::Legacy).await.expect("set");
    while !matches!(events.next().await, Some(Event::Back { .. }) | None) {}
    let capabilities = card.capabilities();
    assert!(capabilities.mode.starts_with("legacy"), "{}", capabilities.mode);
    assert_eq!(
        (capabilities.steering.hardware_rules, capabilities.offload.slots),
        (0, 0)
    );
    assert!(in_software(&placement(&card, 1).await, "in this mode"));
    let stale = card.set_mode(old, Mode::Dpu).await.expect_err("an old fence");
    assert_eq!(stale.kind, ErrorKind::Stale);
}

#[tokio::test]
async fn a_meter_has_to_be_set_before_a_rule_uses_it() {
    let test = fixture("");
    let card = test.open().expect("opened");
    let mut metered = rule(1, 0, to(1), Action::Meter(MeterId(3)));
    metered.actions.push(Action::Punt);
    let refused = add(&card, metered.clone()).await.expect_err("no such meter");
    assert!(refused.message.contains("meter 3 was never set"), "{refused}");
    let rate = MeterRate {
        octets_per_second: 1000,
        burst_octets: 100,
    };
    card.set_meter(card.fence(), MeterId(3), rate).await.expect("set");
    let added = add(&card, metered).await.expect("added");
    assert_eq!(added, Change::Added(Placement::Hardware));
    let beyond = card
        .set_meter(card.fence(), MeterId(99), rate)
        .await
        .expect_err("beyond");
    assert_eq!(beyond.kind, ErrorKind::NotFound);
}

#[tokio::test]
async fn counts_follow_a_rule_from_hardware_to_software() {
    let test = fixture("");
    let card = test.open().expect("opened");
    let mut counting = rule(1, 3, Pattern::default(), Action::Drop);
    counting.actions.insert(0, Action::Count);
    add(&card, counting).await.expect("added");
    let frame = [[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]].concat();
    let frame = [
        &frame[..],
        &[0x08, 0x06],
        &[0, 1, 8, 0, 6, 4, 0, 1],
        &[2, 0, 0, 0, 0, 2, 10, 0, 0, 1],
        &[0; 10],
    ]
    .concat();
    let port = dpumesh_core::PortRef::Uplink(0);
    let answer = card
        .diagnose(&dpumesh_yusur_simulator::control::inject(port, &frame))
        .await
        .expect("told");
    assert!(answer.starts_with("drop"), "{answer}");
    let counted = |card: Arc<YusurBackend>| async move {
        let steering = card.require_steering().expect("steering");
        let counters = steering.counters(Owner::Agent, &[Cookie(1)]).await.expect("read");
        counters[0].expect("it counts").packets
    };
    assert_eq!(counted(Arc::clone(&card)).await, 1);
    let wide: ipnet::IpNet = "10.0.0.0/8".parse().expect("a prefix");
    let above = Pattern {
        ip_dst: Some(wide.into()),
        ..Pattern::default()
    };
    add(&card, rule(2, 1, above, Action::Punt)).await.expect("added");
    assert!(in_software(&placement(&card, 1).await, "wins over it"));
    assert_eq!(counted(Arc::clone(&card)).await, 1, "the count came along");
}

#[tokio::test]
async fn what_a_rule_counted_is_carried_once_when_the_card_refuses_the_one_above() {
    const COLLISION: i32 = dpumesh_yusur::table::E_COLLISION;
    let test = fixture("");
    let card = test.open().expect("opened");
    let mut counting = rule(1, 3, Pattern::default(), Action::Drop);
    counting.actions.insert(0, Action::Count);
    add(&card, counting).await.expect("added");
    let frame = [
        &[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x08, 0x06][..],
        &[0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 2, 10, 0, 0, 1],
        &[0; 10],
    ]
    .concat();
    let port = dpumesh_core::PortRef::Uplink(0);
    let inject = dpumesh_yusur_simulator::control::inject(port, &frame);
    card.diagnose(&inject).await.expect("told");
    let steering = card.require_steering().expect("steering");
    let before = steering.counters(Owner::Agent, &[Cookie(1)]).await.expect("read")[0].expect("it counts");
    assert_eq!(before.packets, 1);
    card.diagnose(&format!("fail 1 {COLLISION}")).await.expect("told");
    add(&card, rule(2, 1, to(1), Action::Punt)).await.expect("added");
    assert!(in_software(&placement(&card, 1).await, "wins over it"));
    let after = steering.counters(Owner::Agent, &[Cookie(1)]).await.expect("read");
    assert_eq!(after[0], Some(before));
}

#[tokio::test]
async fn without_a_floor_hardware_is_all_there_is() {
    let test = fixture("");
    let mut options = test.options();
    options.floor = None;
    options.role = dpumesh_core::Role::Soc;
    let card = YusurBackend::open(options).expect("opened");
    assert!(card.vf().is_none() && card.ports().is_none() && card.transport().is_none());
    let far = rule(1, 0, to(1), Action::Punt).in_group(Group(9));
    let refused = add(&card, far).await.expect_err("beyond");
    assert_eq!(refused.kind, ErrorKind::Unsupported);
    let added = add(&card, rule(2, 0, to(2), Action::Punt)).await.expect("added");
    assert_eq!(added, Change::Added(Placement::Hardware));
}

#[tokio::test]
async fn firmware_that_does_not_fit_is_refused_by_either_side() {
    for (profile, expected) in [
        ("firmware=1.9.0", "runs firmware 1.9.0"),
        ("refuse_firmware=1", "firmware and library"),
    ] {
        let error = fixture(profile).open().expect_err("refused");
        assert_eq!(error.kind, ErrorKind::Unsupported, "{error}");
        assert!(error.message.contains(expected), "{error}");
    }
}

#[tokio::test]
async fn what_is_absent_is_said_with_where_it_was_looked_for() {
    let test = fixture("");
    let mut options = test.options();
    options.sysfs = "/nowhere".into();
    let error = YusurBackend::open(options).expect_err("no card");
    assert_eq!(error.kind, ErrorKind::NotFound);
    assert!(error.message.contains("/nowhere/bus/pci/devices"), "{error}");
    let mut options = test.options();
    options.library = Some("/nowhere/libyusur_np.so".into());
    let error = YusurBackend::open(options).expect_err("no library");
    assert_eq!(error.kind, ErrorKind::NotFound);
    for part in ["yusur_np_table_v1", "/nowhere/libyusur_np.so"] {
        assert!(error.message.contains(part), "{error}");
    }
}

#[tokio::test]
async fn a_library_that_hangs_holds_nobody_up() {
    let test = fixture("");
    let mut options = test.options();
    options.deadline = Duration::from_millis(300);
    let card = YusurBackend::open(options).expect("opened");
    let mut events = card.events();
    card.diagnose("set insert_us=4000000").await.expect("told");
    let begun = Instant::now();
    let late = add(&card, rule(1, 0, to(1), Action::Punt))
        .await
        .expect_err("it hangs");
    assert_eq!((late.kind, late.effect), (ErrorKind::Timeout, Effect::Unknown));
    assert!(late.message.contains("entries_write"), "{late}");
    let steering = card.require_steering().expect("steering");
    let refused = steering.list(Owner::Agent).await.expect_err("at once");
    assert_eq!((refused.kind, refused.effect), (ErrorKind::Abi, Effect::None));
    assert!(begun.elapsed() < Duration::from_secs(4), "nobody waited for it");
    let mut health = async || loop {
        match events.next().await {
            Some(Event::Health(health)) => return health,
            Some(_) => {}
            None => panic!("the events end"),
        }
    };
    assert!(
        health()
            .await
            .is_some_and(|ill| ill.message.contains("entries_write"))
    );
    assert_eq!(health().await, None, "the call returned");
    // What it did in the end is in the books.
    assert_eq!(placement(&card, 1).await, Placement::Hardware);
    assert_eq!(card.diagnose("entries").await.expect("told"), "1");
}

#[test]
fn a_library_that_others_can_write_is_refused() {
    use std::os::unix::fs::PermissionsExt;

    let test = fixture("");
    let folder = tempfile::tempdir().expect("a folder");
    let mut options = test.options();
    let copy = folder.path().join("libyusur_np.so");
    std::fs::copy(options.library.as_ref().expect("one is named"), &copy).expect("copied");
    std::fs::set_permissions(&copy, std::fs::Permissions::from_mode(0o666)).expect("mode set");
    options.library = Some(copy);
    let error = YusurBackend::open(options).expect_err("anybody could have written it");
    assert_eq!(error.kind, ErrorKind::NotFound);
    assert!(
        error
            .message
            .contains("libyusur_np.so: can be written by its group"),
        "{error}"
    );
}

#[tokio::test]
async fn events_end_with_the_card() {
    let test = fixture("");
    let card = test.open().expect("opened");
    let mut events = card.events();
    drop(card);
    let end = tokio::time::timeout(Duration::from_secs(5), events.next()).await;
    assert_eq!(end.expect("it ends"), None);
}
