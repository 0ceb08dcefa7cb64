use std::time::Instant;

use dpumesh_core::capability::{ActionKinds, MatchKinds};
use dpumesh_core::steering::{EtherType, Field, IpMatch, IpProtocol, Pattern, PortRange};
use proptest::prelude::*;

use super::*;
use crate::steering::overlap;

fn limits(hardware: u64, rules: u64) -> SteeringCapabilities {
    let mut limits = dpumesh_core::Capabilities::default().steering;
    limits.hardware_rules = hardware;
    limits.rules = rules;
    limits.groups = 4;
    limits.priorities = 4;
    limits.masks = 8;
    limits.counters = 64;
    limits.batch_max = 64;
    limits.idle_timeout = true;
    limits.software_fallback = true;
    limits.atomicity = [Atomicity::Continue, Atomicity::Rollback, Atomicity::Atomic].into();
    limits.actions = ActionKinds::all();
    limits.hardware_actions = ActionKinds::all();
    for field in [
        Field::Port,
        Field::Ip4Dst,
        Field::Ethertype,
        Field::IpProto,
        Field::L4Dst,
    ] {
        limits.fields.insert(field, MatchKinds::all());
        limits.hardware_fields.insert(field, MatchKinds::all());
    }
    limits
}

fn store(hardware: u64, rules: u64) -> RuleStore {
    RuleStore::new("memory", limits(hardware, rules), Epoch(1))
}

fn to_port(port: u16) -> Pattern {
    Pattern {
        ip_proto: Some(IpProtocol::TCP),
        l4_dst: Some(port.into()),
        ..Pattern::default()
    }
}

fn rule(cookie: u128, pattern: Pattern, actions: Vec<Action>) -> SteeringRule {
    SteeringRule::new(Cookie(cookie), Owner::Agent, Priority(1), pattern, actions)
}

fn drop_port(cookie: u128) -> SteeringRule {
    rule(cookie, to_port(cookie as u16), vec![Action::Count, Action::Drop])
}

fn add(rule: SteeringRule) -> Operation {
    Operation::Add(rule)
}

fn remove(cookie: u128) -> Operation {
    Operation::Remove {
        owner: Owner::Agent,
        cookie: Cookie(cookie),
    }
}

fn apply(store: &mut RuleStore, operations: Vec<Operation>, atomicity: Atomicity) -> Plan {
    store
        .apply(&Batch::new(operations).with(atomicity), 0)
        .expect("the batch as a whole is in order")
}

fn one(store: &mut RuleStore, operation: Operation) -> Result<Change> {
    let plan = apply(store, vec![operation], Atomicity::Continue);
    plan.outcome.results.into_iter().next().expect("one result")
}

#[test]
fn a_cookie_names_one_rule_of_one_owner() {
    let mut store = store(8, 8);
    let added = Change::Added(Placement::Hardware);
    assert_eq!(one(&mut store, add(drop_port(1))), Ok(added));
    let present = Change::Present(Placement::Hardware);
    assert_eq!(one(&mut store, add(drop_port(1))), Ok(present));
    let changed = rule(1, to_port(2), vec![Action::Drop]);
    assert_eq!(
        one(&mut store, add(changed)).expect_err("differs").kind,
        ErrorKind::Exists
    );
    let mut foreign = drop_port(1);
    foreign.owner = Owner::Proxy;
    assert_eq!(
        one(&mut store, add(foreign)).expect_err("taken").kind,
        ErrorKind::Exists
    );
    let by_another = Operation::Remove {
        owner: Owner::Proxy,
        cookie: Cookie(1),
    };
    let refused = one(&mut store, by_another).expect_err("another's");
    assert_eq!(
        (refused.kind, refused.effect),
        (ErrorKind::NotFound, dpumesh_core::Effect::None)
    );
    assert!(store.list(Owner::Proxy).is_empty());
    assert_eq!(store.counters(Owner::Proxy, &[Cookie(1)], 0), [None]);
    assert!(matches!(one(&mut store, remove(1)), Ok(Change::Removed(Some(_)))));
    assert_eq!(one(&mut store, remove(1)), Ok(Change::Absent));
}

#[test]
fn an_overlap_of_equal_priority_names_the_other_rule() {
    let mut store = store(8, 8);
    let wide = Pattern {
        ip_proto: Some(IpProtocol::TCP),
        l4_dst: Some(PortRange { first: 1, last: 100 }),
        ..Pattern::default()
    };
    one(&mut store, add(rule(7, wide.clone(), vec![Action::Drop]))).expect("first");
    let narrow = rule(8, to_port(80), vec![Action::Punt]);
    let refused = one(&mut store, add(narrow.clone())).expect_err("contradicts");
    assert_eq!(refused.kind, ErrorKind::Conflict);
    let object = refused.object.clone().expect("names it");
    assert_eq!((object.name, object.index), (Cookie(7).to_string(), Some(0)));
    let mut foreign = narrow.clone();
    foreign.owner = Owner::User(1);
    assert!(one(&mut store, add(foreign)).is_err(), "whoever owns the first");
    let equal = rule(9, to_port(80), vec![Action::Drop]);
    assert!(
        one(&mut store, add(equal)).is_ok(),
        "equal actions do not contradict"
    );
    let mut above = narrow.clone();
    above.priority = Priority(0);
    assert!(one(&mut store, add(above)).is_ok(), "priority decides");
    let apart = rule(10, to_port(101), vec![Action::Punt]);
    assert!(one(&mut store, add(apart)).is_ok(), "no frame matches both");
    assert!(
        one(
            &mut store,
            add(rule(11, wide, vec![Action::Punt]).in_group(Group(1)))
        )
        .is_ok()
    );
}

#[test]
fn what_hardware_cannot_hold_goes_to_software_until_that_is_full() {
    let mut store = store(2, 3);
    let placements: Vec<_> = (1..=4)
        .map(|cookie| one(&mut store, add(drop_port(cookie))))
        .collect();
    assert_eq!(placements[1], Ok(Change::Added(Placement::Hardware)));
    let full = Placement::Software("steering.hardware_rules is full: 2 of 2".to_owned());
    assert_eq!(placements[2], Ok(Change::Added(full)));
    let error = placements[3].clone().expect_err("all is full");
    assert_eq!(error.kind, ErrorKind::CapacityExceeded);
    assert_eq!(error.message, "steering.rules is full: 3 of 3");
    assert_eq!(
        error.object.as_ref().map(|o| o.name.as_str()),
        Some("steering.rules")
    );
    one(&mut store, remove(3)).expect("there");
    let mut hard = drop_port(5);
    hard.placement = PlacementRequest::Hardware;
    let error = one(&mut store, add(hard)).expect_err("hardware only");
    assert_eq!(
        error.object.as_ref().map(|o| o.name.as_str()),
        Some("steering.hardware_rules")
    );
    assert_eq!(error.retry, dpumesh_core::Retry::AfterFree);
    let mut soft = drop_port(6);
    soft.placement = PlacementRequest::Software;
    assert!(matches!(
        one(&mut store, add(soft)),
        Ok(Change::Added(Placement::Software(_)))
    ));
}

#[test]
fn masks_and_counters_run_out_as_well() {
    let mut tight = limits(8, 8);
    tight.masks = 1;
    tight.counters = 1;
    let mut store = RuleStore::new("memory", tight, Epoch(1));
    one(&mut store, add(drop_port(1))).expect("first");
    let no_counter = one(&mut store, add(drop_port(2))).expect("to software");
    assert!(
        matches!(no_counter, Change::Added(Placement::Software(why)) if why.starts_with("steering.counters"))
    );
    let same_mask = one(&mut store, add(rule(3, to_port(3), vec![Action::Drop])));
    assert_eq!(same_mask, Ok(Change::Added(Placement::Hardware)));
    let arp = Pattern {
        ethertype: Some(EtherType::ARP),
        ..Pattern::default()
    };
    let no_mask = one(&mut store, add(rule(4, arp.clone(), vec![Action::Drop]))).expect("to software");
    assert!(matches!(no_mask, Change::Added(Placement::Software(why)) if why.starts_with("steering.masks")));
    one(&mut store, remove(1)).expect("there");
    one(&mut store, remove(3)).expect("there");
    let again = one(&mut store, add(rule(5, arp, vec![Action::Drop])));
    assert_eq!(
        again,
        Ok(Change::Added(Placement::Hardware)),
        "the mask was given back"
    );
}

#[test]
fn a_batch_as_a_whole_is_refused_without_effect() {
    let mut few = limits(8, 8);
    few.batch_max = 1;
    few.atomicity = [Atomicity::Continue].into();
    let mut store = RuleStore::new("memory", few, Epoch(1));
    let long = Batch::new(vec![add(drop_port(1)), add(drop_port(2))]);
    assert_eq!(
        store.apply(&long, 0).expect_err("too long").kind,
        ErrorKind::CapacityExceeded
    );
    let atomic = Batch::new(vec![add(drop_port(1))]).with(Atomicity::Atomic);
    assert_eq!(
        store.apply(&atomic, 0).expect_err("not offered").kind,
        ErrorKind::Unsupported
    );
    assert!(store.is_empty());
}

#[test]
fn a_failed_batch_leaves_rules_counters_and_slots_as_they_were() {
    let mut store = store(8, 8);
    one(&mut store, add(drop_port(1))).expect("room");
    let slot = store.slot(Owner::Agent, Cookie(1)).expect("installed");
    store.record(slot, 3, 180, 5);
    let bad = rule(9, Pattern::default(), vec![]);
    let operations = vec![remove(1), add(drop_port(2)), add(bad), add(drop_port(3))];
    for atomicity in [Atomicity::Rollback, Atomicity::Atomic] {
        let plan = apply(&mut store, operations.clone(), atomicity);
        assert!(plan.changes.is_empty());
        assert_eq!(plan.outcome.undone, Undone::All);
        let results = plan.outcome.results;
        assert_eq!(results[2].as_ref().expect_err("bad").kind, ErrorKind::Invalid);
        for index in [0, 1, 3] {
            assert_eq!(results[index], Ok(Change::Skipped));
        }
        assert_eq!(store.slot(Owner::Agent, Cookie(1)), Some(slot));
        let counters = store.counters(Owner::Agent, &[Cookie(1)], 15)[0].expect("counts");
        assert_eq!(
            (counters.packets, counters.octets, counters.idle_ms),
            (3, 180, Some(10))
        );
        assert_eq!(store.len(), 1);
    }
    let plan = apply(&mut store, operations, Atomicity::Continue);
    assert_eq!(plan.outcome.undone, Undone::No);
    assert_eq!(plan.changes.len(), 3);
}

#[test]
fn a_plan_can_be_undone_only_while_it_is_the_last_change() {
    let mut store = store(8, 8);
    one(&mut store, add(drop_port(1))).expect("room");
    let first = apply(
        &mut store,
        vec![remove(1), add(drop_port(2))],
        Atomicity::Continue,
    );
    let second = apply(&mut store, vec![add(drop_port(3))], Atomicity::Continue);
    assert_eq!(store.undo(first), Err(StalePlan));
    assert_eq!(store.undo(second), Ok(()));
    assert_eq!(store.slot(Owner::Agent, Cookie(3)), None);
    assert!(store.slot(Owner::Agent, Cookie(2)).is_some());
}

#[test]
fn plans_are_undone_one_by_one_the_last_first() {
    let mut store = store(8, 8);
    one(&mut store, add(drop_port(1))).expect("room");
    let before = store.list(Owner::Agent);
    let first = apply(&mut store, vec![remove(1)], Atomicity::Continue);
    let second = apply(&mut store, vec![add(drop_port(2))], Atomicity::Continue);
    assert_eq!(store.undo(second), Ok(()));
    assert_eq!(store.undo(first), Ok(()));
    assert_eq!(store.list(Owner::Agent), before);
}

#[test]
fn a_rule_is_where_the_engine_says() {
    let mut store = store(1, 8);
    let Ok(Change::Added(Placement::Hardware)) = one(&mut store, add(drop_port(1))) else {
        panic!("the first rule has room in hardware");
    };
    let slot = store.slot(Owner::Agent, Cookie(1)).expect("installed");
    let elsewhere = Placement::Software("the engine says so".to_owned());
    store.settle(slot, elsewhere.clone());
    assert_eq!(store.list(Owner::Agent)[0].placement, elsewhere);
    // Its room is another's now.
    assert_eq!(
        one(&mut store, add(drop_port(2))),
        Ok(Change::Added(Placement::Hardware))
    );
    store.settle(99, elsewhere);
}

#[test]
fn final_counts_of_the_engine_reach_the_outcome() {
    let mut store = store(8, 8);
    one(&mut store, add(drop_port(1))).expect("room");
    let mut plan = apply(
        &mut store,
        vec![add(drop_port(2)), remove(1)],
        Atomicity::Continue,
    );
    let change = plan
        .changes
        .iter()
        .position(|change| matches!(change, TableChange::Uninstalled { .. }))
        .expect("removed");
    plan.add_final(change, 2, 120);
    let Ok(Change::Removed(Some(counters))) = plan.outcome.results[1] else {
        panic!("it counted");
    };
    assert_eq!((counters.packets, counters.octets), (2, 120));
}

#[test]
fn idle_rules_age_and_hits_keep_them() {
    let mut store = store(8, 8);
    let mut ageing = drop_port(1);
    ageing.idle_timeout_ms = Some(100);
    one(&mut store, add(ageing)).expect("room");
    one(&mut store, add(drop_port(2))).expect("room");
    assert_eq!(store.next_deadline_ms(), Some(100));
    let slot = store.slot(Owner::Agent, Cookie(1)).expect("installed");
    store.record(slot, 1, 60, 90);
    assert!(store.age(189).is_empty());
    assert_eq!(store.next_deadline_ms(), Some(190));
    let removals = store.age(190);
    assert_eq!(removals.len(), 1);
    let [Event::Aged { owner, rules }] = &Removal::aged(&removals)[..] else {
        panic!("one event");
    };
    assert_eq!((*owner, rules[0].0), (Owner::Agent, Cookie(1)));
    assert_eq!(rules[0].1.map(|c| (c.packets, c.idle_ms)), Some((1, Some(100))));
    assert_eq!(store.next_deadline_ms(), None);
    assert_eq!(store.len(), 1);
}

#[test]
fn list_is_in_order_and_flush_is_of_one_owner() {
    let mut store = store(8, 8);
    for (cookie, group, priority) in [(5, 0, 2), (9, 1, 0), (7, 0, 1), (6, 0, 1)] {
        let mut rule = drop_port(cookie).in_group(Group(group));
        rule.priority = Priority(priority);
        one(&mut store, add(rule)).expect("room");
    }
    let mut foreign = drop_port(1);
    foreign.owner = Owner::Proxy;
    one(&mut store, add(foreign)).expect("room");
    let cookies: Vec<u128> = store.list(Owner::Agent).iter().map(|r| r.rule.cookie.0).collect();
    assert_eq!(cookies, [6, 7, 5, 9]);
    assert_eq!(store.flush(Owner::Agent, 0).len(), 4);
    assert_eq!(store.flush(Owner::Agent, 0).len(), 0);
    assert_eq!(store.list(Owner::Proxy).len(), 1);
}

#[test]
fn a_high_water_mark_is_raised_once_per_crossing() {
    let mut store = store(100, 10);
    let raised = |store: &mut RuleStore| {
        let names = store.high_water().into_iter().map(|event| match event {
            Event::HighWater { resource, used, .. } => (resource, used),
            other => panic!("{other:?}"),
        });
        names.collect::<Vec<_>>()
    };
    for cookie in 1..=8 {
        one(&mut store, add(drop_port(cookie))).expect("room");
    }
    assert!(raised(&mut store).is_empty());
    one(&mut store, add(drop_port(9))).expect("room");
    assert_eq!(raised(&mut store), [("steering.rules".to_owned(), 9)]);
    one(&mut store, add(drop_port(10))).expect("room");
    assert!(raised(&mut store).is_empty());
    one(&mut store, remove(1)).expect("there");
    one(&mut store, remove(2)).expect("there");
    assert!(raised(&mut store).is_empty());
    one(&mut store, add(drop_port(1))).expect("room");
    assert_eq!(raised(&mut store).len(), 1);
}

/// Ten thousand rules of equal priority, half of them prefixes, with different actions: the index keeps looking cheap.
#[test]
fn ten_thousand_rules_of_one_priority_go_in_fast() {
    let mut roomy = limits(20_000, 20_000);
    roomy.batch_max = 20_000;
    let mut store = RuleStore::new("memory", roomy, Epoch(1));
    let operations: Vec<Operation> = (0..10_000u32)
        .map(|n| {
            let [_, b, c, d] = n.to_be_bytes();
            let (text, port) = if n % 2 == 0 {
                (format!("10.{b}.{c}.{d}/32"), Some(80.into()))
            } else {
                (format!("11.{}.{c}.0/24", d / 2), None)
            };
            let pattern = Pattern {
                ip_dst: Some(IpMatch::Prefix(text.parse().expect("prefix"))),
                ip_proto: Some(IpProtocol::TCP),
                l4_dst: port,
                ..Pattern::default()
            };
            add(rule(n.into(), pattern, vec![Action::Mark(n), Action::Drop]))
        })
        .collect();
    let begin = Instant::now();
    let plan = apply(&mut store, operations, Atomicity::Continue);
    let took = begin.elapsed();
    assert_eq!(plan.changes.len(), 10_000);
    assert!(took.as_secs() < 5, "{took:?} for 10,000 rules");
    let wide = rule(u128::MAX, to_port(80), vec![Action::Punt]);
    assert!(
        one(&mut store, add(wide)).is_err(),
        "one that overlaps them all is still found"
    );
}

/// The contract once more, with no index, no slots and no shortcuts.
#[derive(Clone, Debug, Default)]
struct Model(Vec<(SteeringRule, bool)>);

const MODEL_HARDWARE: usize = 4;
const MODEL_RULES: usize = 6;

impl Model {
    fn apply(&mut self, operations: &[Operation], atomicity: Atomicity) -> Vec<String> {
        let before = self.clone();
        let mut results = Vec::new();
        for operation in operations {
            let result = self.carry_out(operation);
            let failed = result.starts_with("Err");
            results.push(result);
            if failed && atomicity != Atomicity::Continue {
                *self = before;
                let at = results.len() - 1;
                let skipped = |i: usize| {
                    if i == at {
                        results[at].clone()
                    } else {
                        "Skipped".to_owned()
                    }
                };
                return (0..operations.len()).map(skipped).collect();
            }
        }
        results
    }

    fn carry_out(&mut self, operation: &Operation) -> String {
        match operation {
            Operation::Remove { owner, cookie } => {
                match self.0.iter().position(|(rule, _)| rule.cookie == *cookie) {
                    None => "Absent".to_owned(),
                    Some(at) if self.0[at].0.owner != *owner => "Err NotFound".to_owned(),
                    Some(at) => {
                        self.0.remove(at);
                        "Removed".to_owned()
                    }
                }
            }
            Operation::Add(rule) => self.add(rule),
        }
    }

    fn add(&mut self, rule: &SteeringRule) -> String {
        if rule.check().is_err() {
            return "Err Invalid".to_owned();
        }
        if let Some((there, hard)) = self.0.iter().find(|(there, _)| there.cookie == rule.cookie) {
            return if there == rule {
                format!("Present {hard}")
            } else {
                "Err Exists".to_owned()
            };
        }
        let contradicts = |other: &SteeringRule| {
            (other.group, other.priority) == (rule.group, rule.priority)
                && other.actions != rule.actions
                && overlap(&other.pattern, &rule.pattern)
        };
        if self.0.iter().any(|(other, _)| contradicts(other)) {
            return "Err Conflict".to_owned();
        }
        let in_hardware = self.0.iter().filter(|(_, hard)| *hard).count();
        let hard = in_hardware < MODEL_HARDWARE && rule.placement != PlacementRequest::Software;
        if self.0.len() >= MODEL_RULES || (!hard && rule.placement == PlacementRequest::Hardware) {
            return "Err CapacityExceeded".to_owned();
        }
        self.0.push((rule.clone(), hard));
        format!("Added {hard}")
    }

    fn list(&self, owner: Owner) -> Vec<(SteeringRule, bool)> {
        let mut rules: Vec<_> = self
            .0
            .iter()
            .filter(|(rule, _)| rule.owner == owner)
            .cloned()
            .collect();
        rules.sort_by_key(|(rule, _)| (rule.group, rule.priority, rule.cookie));
        rules
    }
}

fn told(result: &Result<Change>) -> String {
    match result {
        Ok(Change::Added(place)) => format!("Added {}", *place == Placement::Hardware),
        Ok(Change::Present(place)) => format!("Present {}", *place == Placement::Hardware),
        Ok(Change::Removed(_)) => "Removed".to_owned(),
        Ok(Change::Absent) => "Absent".to_owned(),
        Ok(Change::Skipped) => "Skipped".to_owned(),
        Err(error) => format!("Err {:?}", error.kind),
    }
}

fn operations() -> impl Strategy<Value = Operation> {
    let owners = prop::sample::select(vec![Owner::Agent, Owner::Agent, Owner::Proxy]);
    let patterns = prop_oneof![
        (0..4u16, 0..4u16).prop_map(|(a, b)| Pattern {
            ip_proto: Some(IpProtocol::TCP),
            l4_dst: Some(PortRange {
                first: a.min(b),
                last: a.max(b)
            }),
            ..Pattern::default()
        }),
        (0..4u32, 30..=32u8).prop_map(|(host, bits)| {
            let net = ipnet::Ipv4Net::new(host.into(), bits).expect("in range").trunc();
            Pattern {
                ip_dst: Some(IpMatch::Prefix(net.into())),
                ..Pattern::default()
            }
        }),
        (0..3u16).prop_map(|vf| Pattern {
            port: Some(PortRef::vf(vf)),
            ..Pattern::default()
        }),
    ];
    let actions = prop_oneof![
        4 => Just(vec![Action::Drop]),
        4 => Just(vec![Action::Count, Action::Punt]),
        1 => Just(vec![Action::Count]),
    ];
    let placements = prop::sample::select(vec![
        PlacementRequest::Any,
        PlacementRequest::Any,
        PlacementRequest::Hardware,
        PlacementRequest::Software,
    ]);
    let rules = (
        0..10u128,
        owners.clone(),
        0..2u32,
        0..2u32,
        patterns,
        actions,
        placements,
    );
    prop_oneof![
        3 => rules.prop_map(|(cookie, owner, group, priority, pattern, actions, placement)| {
            let mut rule = SteeringRule::new(Cookie(cookie), owner, Priority(priority), pattern, actions)
                .in_group(Group(group));
            rule.placement = placement;
            Operation::Add(rule)
        }),
        2 => (0..10u128, owners).prop_map(|(cookie, owner)| Operation::Remove { owner, cookie: Cookie(cookie) }),
    ]
}

/// What an engine that mirrors the changes holds.
fn mirror(engine: &mut BTreeMap<u32, Cookie>, changes: &[TableChange]) {
    for change in changes {
        match change {
            TableChange::Installed { slot, rule, .. } => {
                assert_eq!(engine.insert(*slot, rule.cookie), None, "the slot was free");
            }
            TableChange::Uninstalled { slot, .. } => {
                assert!(engine.remove(slot).is_some(), "the slot was in use");
            }
        }
    }
}

fn held(store: &RuleStore) -> BTreeMap<u32, Cookie> {
    store.rules().map(|(slot, rule, _)| (slot, rule.cookie)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn the_store_does_what_a_naive_one_does(
        batches in prop::collection::vec(
            (
                prop::collection::vec(operations(), 1..6),
                prop::sample::select(vec![Atomicity::Continue, Atomicity::Rollback, Atomicity::Atomic]),
                prop::bool::weighted(0.2),
            ),
            1..20,
        )
    ) {
        let mut store = store(MODEL_HARDWARE as u64, MODEL_RULES as u64);
        let mut model = Model::default();
        let mut engine = BTreeMap::new();
        for (operations, atomicity, undo) in batches {
            let before = held(&store);
            let plan = apply(&mut store, operations.clone(), atomicity);
            if undo {
                store.undo(plan).expect("it is the last change");
                prop_assert_eq!(&held(&store), &before);
            } else {
                let expected = model.apply(&operations, atomicity);
                let got: Vec<String> = plan.outcome.results.iter().map(told).collect();
                prop_assert_eq!(got, expected);
                mirror(&mut engine, &plan.changes);
            }
            prop_assert_eq!(&held(&store), &engine);
            for owner in [Owner::Agent, Owner::Proxy] {
                let listed: Vec<_> = store
                    .list(owner)
                    .into_iter()
                    .map(|r| (r.rule, r.placement == Placement::Hardware))
                    .collect();
                prop_assert_eq!(listed, model.list(owner));
            }
            prop_assert_eq!(store.hardware.rules as usize, model.0.iter().filter(|(_, hard)| *hard).count());
            let slots = store.slots.len();
            prop_assert!(slots <= MODEL_RULES + 6, "{slots} slots: they are used again");
        }
    }
}
