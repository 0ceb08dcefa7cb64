//! [`SoftSteering`]: the contract of steering, asked of frames; and what happens when the engine refuses, the caller stops
//! waiting, or rules change under traffic.

use std::collections::{BTreeMap, HashMap};

use dpumesh_core::event::Event;
use dpumesh_core::steering::{
    Atomicity, Batch, BatchOutcome, Change, Counters, MissPolicy, Operation, Placement, PlacementRequest,
    PortRange, Undone,
};
use dpumesh_core::{ActionKinds, Effect, Epoch, EventStream, Fence, FlowSteering, FlowSteeringExt, Retry};
use proptest::prelude::*;

use super::*;
use crate::events::{EventHub, HubStream};

const FENCE: Fence = Fence(Epoch(7));
const POD_PORT: PortRef = PortRef::vf(0);
const OTHER_PORT: PortRef = PortRef::vf(1);

/// A worker with steering over it.
struct Node {
    worker: Worker,
    steering: SoftSteering,
    events: HubStream,
}

impl Node {
    async fn start(change: impl FnOnce(&mut EngineConfig, &mut dpumesh_core::SteeringCapabilities)) -> Self {
        let mut config = EngineConfig::new(11);
        let mut limits = software_capabilities(1000);
        change(&mut config, &mut limits);
        let worker = Worker::start(&config).await;
        let hub = Arc::new(EventHub::default());
        let events = hub.subscribe();
        let steering = SoftSteering::new("soft", worker.handle.clone(), limits, FENCE.0, hub);
        Self {
            worker,
            steering,
            events,
        }
    }

    async fn plain() -> Self {
        Self::start(|_, _| {}).await
    }

    async fn apply(&self, operations: Vec<Operation>, atomicity: Atomicity) -> BatchOutcome {
        self.steering
            .apply(FENCE, &Batch::new(operations).with(atomicity))
            .await
            .expect("a live engine")
    }

    /// How many of so many frames to an address arrive at the other pod.
    async fn arrive(&self, destination: &str, count: usize) -> usize {
        let frames: Vec<Frame> = (0..count)
            .map(|_| segment(POD, A, destination, (1, 80), 0))
            .collect();
        self.worker.send(POD_PORT, frames).await;
        self.worker.sent(OTHER_PORT).len()
    }

    async fn count(&self, cookie: u128) -> Counters {
        let counters = self
            .steering
            .counters(Owner::Agent, &[Cookie(cookie)])
            .await
            .expect("a live engine");
        counters[0].expect("it counts")
    }

    async fn cookies(&self) -> Vec<u128> {
        let list = self.steering.list(Owner::Agent).await.expect("a live engine");
        list.iter().map(|installed| installed.rule.cookie.0).collect()
    }

    /// Installed rules, by what the engine says.
    async fn in_engine(&self) -> usize {
        let slots = (0..1000).collect();
        self.worker
            .handle
            .read_counters(slots)
            .await
            .expect("engine")
            .len()
    }
}

fn rule(cookie: u128, priority: u32, pattern: Pattern, action: Action) -> SteeringRule {
    SteeringRule::new(
        Cookie(cookie),
        Owner::Agent,
        Priority(priority),
        pattern,
        vec![Action::Count, action],
    )
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

fn pass(cookie: u128, address: &str) -> SteeringRule {
    rule(cookie, cookie as u32, to(address), Action::Forward(OTHER_PORT))
}

fn masked(cookie: u128, length: u8) -> SteeringRule {
    let prefix = ipnet::IpNet::new("10.0.0.0".parse().expect("address"), length).expect("at most 32");
    let pattern = Pattern {
        ip_dst: Some(IpMatch::from(prefix)),
        ..Pattern::default()
    };
    rule(cookie, cookie as u32, pattern, Action::Forward(OTHER_PORT))
}

#[tokio::test]
async fn a_change_that_is_reported_done_acts_on_the_next_frame() {
    let node = Node::plain().await;
    assert_eq!(node.arrive(B, 3).await, 0);
    node.steering.add(FENCE, pass(1, B)).await.expect("room");
    assert_eq!(node.arrive(B, 3).await, 3);
    assert_eq!(node.count(1).await.packets, 3);
    let change = node
        .steering
        .remove(FENCE, Owner::Agent, Cookie(1))
        .await
        .expect("there");
    let Change::Removed(Some(last)) = change else {
        panic!("{change:?}")
    };
    assert_eq!((last.packets, last.octets), (3, 3 * 54));
    assert_eq!(node.arrive(B, 3).await, 0);
}

#[tokio::test]
async fn batches_continue_roll_back_or_are_atomic() {
    let node = Node::plain().await;
    let mut nonsense = pass(2, B);
    nonsense.actions.clear();
    let operations = || vec![add(pass(1, B)), add(nonsense.clone()), add(pass(3, "10.0.0.3"))];
    for atomicity in [Atomicity::Rollback, Atomicity::Atomic] {
        let outcome = node.apply(operations(), atomicity).await;
        assert_eq!(outcome.undone, Undone::All);
        let error = outcome.results[1].as_ref().expect_err("no actions");
        assert_eq!(
            (error.kind, error.object.as_ref().and_then(|o| o.index)),
            (ErrorKind::Invalid, Some(1))
        );
        assert_eq!(
            (&outcome.results[0], &outcome.results[2]),
            (&Ok(Change::Skipped), &Ok(Change::Skipped))
        );
        assert_eq!((node.cookies().await, node.in_engine().await), (vec![], 0));
    }
    let outcome = node.apply(operations(), Atomicity::Continue).await;
    assert_eq!(outcome.undone, Undone::No);
    assert!(outcome.results[0].is_ok() && outcome.results[1].is_err() && outcome.results[2].is_ok());
    assert_eq!((node.cookies().await, node.in_engine().await), (vec![1, 3], 2));
    assert_eq!(node.arrive(B, 1).await + node.arrive("10.0.0.3", 1).await, 2);
}

#[tokio::test]
async fn a_rule_that_the_engine_refuses_is_named_and_store_and_engine_agree() {
    let node = Node::start(|config, _| config.masks = 2).await;
    // Three masks; the cookie that is refused is there twice, so that the place matters and not the cookie.
    let operations = || {
        vec![
            add(masked(1, 24)),
            add(masked(3, 16)),
            remove(3),
            add(masked(2, 20)),
            add(masked(3, 12)),
            add(masked(4, 24)),
            remove(9),
        ]
    };
    for atomicity in [Atomicity::Rollback, Atomicity::Atomic] {
        let outcome = node.apply(operations(), atomicity).await;
        let error = outcome.results[4].as_ref().expect_err("a third mask");
        assert_eq!(
            (error.kind, error.effect, error.retry),
            (ErrorKind::CapacityExceeded, Effect::None, Retry::AfterFree)
        );
        let object = error.object.clone().expect("names it");
        assert_eq!((object.index, object.field.as_ref()), (Some(4), "pattern"));
        assert_eq!(outcome.results.iter().filter(|result| result.is_err()).count(), 1);
        assert_eq!(outcome.undone, Undone::All);
        assert_eq!((node.cookies().await, node.in_engine().await), (vec![], 0));
    }
    let outcome = node.apply(operations(), Atomicity::Continue).await;
    let error = outcome.results[4].as_ref().expect_err("a third mask");
    assert_eq!(error.object.as_ref().and_then(|object| object.index), Some(4));
    assert!(matches!(outcome.results[2], Ok(Change::Removed(_))));
    assert_eq!(outcome.results[6], Ok(Change::Absent));
    assert_eq!((node.cookies().await, node.in_engine().await), (vec![1, 2, 4], 3));
    // Room again: the mask of rule 2 goes.
    node.steering
        .remove(FENCE, Owner::Agent, Cookie(2))
        .await
        .expect("there");
    node.steering.add(FENCE, masked(3, 12)).await.expect("room");
    assert_eq!(node.arrive("10.1.1.1", 2).await, 2);
}

#[tokio::test]
async fn many_refused_rules_cost_no_more_than_a_few_tries_each() {
    let node = Node::start(|config, limits| {
        config.masks = 1;
        limits.batch_max = 1000;
    })
    .await;
    // Every second rule is refused.
    let host = |n: u128| format!("10.9.{}.{}", n / 250, n % 250 + 1);
    let operations = (1..=400).map(|n| {
        if n % 2 == 1 {
            add(pass(n, &host(n)))
        } else {
            add(masked(n, 24))
        }
    });
    let outcome = node.apply(operations.collect(), Atomicity::Continue).await;
    for (at, result) in outcome.results.iter().enumerate() {
        match result {
            Ok(change) => assert!(
                at % 2 == 0 && matches!(change, Change::Added(Placement::Software(_))),
                "{change:?}"
            ),
            Err(error) => assert_eq!(error.object.as_ref().and_then(|object| object.index), Some(at)),
        }
    }
    assert_eq!((node.cookies().await.len(), node.in_engine().await), (200, 200));
}

#[tokio::test]
async fn counters_do_not_run_backwards_when_the_engine_took_a_batch_back() {
    let node = Node::start(|config, _| config.masks = 1).await;
    node.steering.add(FENCE, pass(1, B)).await.expect("room");
    assert_eq!(node.arrive(B, 5).await, 5);
    let before = node.count(1).await;
    // Rule 1 leaves and comes back with its slot before the engine refuses the third mask.
    let batch = vec![remove(1), add(pass(2, "10.0.0.9")), add(masked(3, 24))];
    let outcome = node.apply(batch, Atomicity::Atomic).await;
    assert_eq!(outcome.undone, Undone::All);
    assert_eq!(node.count(1).await.packets, before.packets);
    assert_eq!(node.arrive(B, 2).await, 2);
    let after = node.count(1).await;
    assert_eq!((after.packets, after.octets), (7, 7 * 54));
}

#[tokio::test]
async fn final_counters_include_the_last_packets() {
    let node = Node::plain().await;
    node.steering.add(FENCE, pass(1, B)).await.expect("room");
    let _ = node.count(1).await;
    assert_eq!(node.arrive(B, 4).await, 4); // after the last look
    // In one batch the slot is used again by another rule, which is removed as well.
    let batch = vec![remove(1), add(pass(2, B)), remove(2), add(pass(3, B))];
    let outcome = node.apply(batch, Atomicity::Atomic).await;
    let finals = [0, 2].map(|at| match &outcome.results[at] {
        Ok(Change::Removed(Some(counters))) => counters.packets,
        other => panic!("{other:?}"),
    });
    assert_eq!(finals, [4, 0]);
    assert_eq!(node.arrive(B, 1).await, 1);
    assert_eq!(node.count(3).await.packets, 1);
}

#[tokio::test]
async fn every_packet_is_in_some_final_counter_under_traffic() {
    let node = Node::plain().await;
    node.steering.add(FENCE, pass(1, B)).await.expect("room");
    let pod = node.worker.queues(POD_PORT).clone();
    let (mut counted, mut sent) = (0, 0);
    for cookie in 1..200_u128 {
        for _ in 0..3 {
            pod.put(segment(POD, A, B, (1, 80), 0));
            sent += 1;
        }
        if cookie % 3 == 0 {
            let _ = node.count(cookie).await;
        }
        let next = rule(cookie + 1, 1, to(B), Action::Forward(OTHER_PORT));
        let outcome = node
            .apply(vec![remove(cookie), add(next)], Atomicity::Atomic)
            .await;
        match &outcome.results[0] {
            Ok(Change::Removed(Some(counters))) => counted += counters.packets,
            other => panic!("{other:?}"),
        }
    }
    node.worker.send(POD_PORT, [segment(POD, A, B, (1, 80), 0)]).await;
    let started = Instant::now();
    while node.worker.received(POD_PORT).await < sent + 1 {
        assert!(started.elapsed() < Duration::from_secs(10));
    }
    assert_eq!(counted + node.count(200).await.packets, sent + 1);
}

#[tokio::test]
async fn flush_takes_an_owners_rules_and_no_others() {
    let node = Node::plain().await;
    let mut proxys = pass(2, "10.0.0.3");
    proxys.owner = Owner::Proxy;
    node.apply(
        vec![add(pass(1, B)), add(proxys), add(pass(3, "10.0.0.4"))],
        Atomicity::Atomic,
    )
    .await;
    assert_eq!(node.steering.flush(FENCE, Owner::Agent).await, Ok(2));
    assert_eq!(node.steering.flush(FENCE, Owner::Agent).await, Ok(0));
    assert_eq!(
        (node.arrive(B, 1).await, node.arrive("10.0.0.3", 1).await),
        (0, 1)
    );
    assert_eq!(node.steering.list(Owner::Proxy).await.expect("list").len(), 1);
    assert_eq!(node.in_engine().await, 1);
}

#[tokio::test]
async fn an_idle_rule_ages_and_one_that_is_hit_stays() {
    let mut node = Node::plain().await;
    let mut idle = pass(1, B);
    idle.idle_timeout_ms = Some(250);
    let mut busy = pass(2, "10.0.0.3");
    busy.idle_timeout_ms = Some(250);
    node.apply(vec![add(idle), add(busy)], Atomicity::Atomic).await;
    assert_eq!(node.arrive(B, 3).await, 3);
    let started = Instant::now();
    while node.cookies().await.contains(&1) {
        node.arrive("10.0.0.3", 1).await;
        tokio::time::sleep(Duration::from_millis(20)).await;
        node.steering.maintain().await.expect("a live engine");
        assert!(started.elapsed() < Duration::from_secs(10), "it does not age");
    }
    assert!(
        started.elapsed() >= Duration::from_millis(150),
        "not before its time: a tick is 100 ms"
    );
    assert_eq!(node.cookies().await, [2]);
    let Some(Event::Aged {
        owner: Owner::Agent,
        rules,
    }) = node.events.next().await
    else {
        panic!("another event")
    };
    assert_eq!(rules.len(), 1);
    assert_eq!(
        (rules[0].0, rules[0].1.map(|counters| counters.packets)),
        (Cookie(1), Some(3))
    );
    assert_eq!(node.arrive(B, 1).await, 0);
}

#[tokio::test]
async fn calls_fenced_by_another_life_are_stale() {
    let node = Node::plain().await;
    let old = Fence(Epoch(6));
    let apply = node.steering.apply(old, &Batch::new(vec![add(pass(1, B))])).await;
    assert_eq!(apply.expect_err("stale").kind, ErrorKind::Stale);
    assert_eq!(
        node.steering
            .flush(old, Owner::Agent)
            .await
            .expect_err("stale")
            .kind,
        ErrorKind::Stale
    );
    let miss = node
        .steering
        .set_miss_policy(old, POD_PORT, MissPolicy::Drop)
        .await;
    assert_eq!(miss.expect_err("stale").kind, ErrorKind::Stale);
    assert_eq!(node.in_engine().await, 0);
    let miss = node
        .steering
        .set_miss_policy(FENCE, POD_PORT, MissPolicy::Software)
        .await;
    assert_eq!(
        miss.expect_err("there is nothing behind the software").kind,
        ErrorKind::Unsupported
    );
    node.steering
        .set_miss_policy(FENCE, POD_PORT, MissPolicy::Drop)
        .await
        .expect("what it does anyway");
}

#[tokio::test]
async fn what_the_card_cannot_hold_runs_in_software_and_says_so() {
    let mut node = Node::start(|_, limits| {
        limits.rules = 3;
        limits.hardware_rules = 1;
        limits.masks = 8;
        limits.hardware_fields = limits.fields.clone();
        limits.hardware_actions = ActionKinds::all();
    })
    .await;
    let placed = |outcome: BatchOutcome| outcome.into_result().expect("room");
    let outcome = node
        .apply(vec![add(pass(1, B)), add(pass(2, "10.0.0.3"))], Atomicity::Atomic)
        .await;
    let full = Placement::Software("steering.hardware_rules is full: 1 of 1".to_owned());
    assert_eq!(
        placed(outcome),
        [Change::Added(Placement::Hardware), Change::Added(full)]
    );
    let mut hard = pass(3, "10.0.0.4");
    hard.placement = PlacementRequest::Hardware;
    let error = node.steering.add(FENCE, hard).await.expect_err("hardware only");
    assert_eq!(
        error.object.as_ref().map(|object| object.name.as_str()),
        Some("steering.hardware_rules")
    );
    // Both act, wherever they are.
    assert_eq!(node.arrive(B, 1).await + node.arrive("10.0.0.3", 1).await, 2);
    let Some(Event::HighWater { resource, .. }) = node.events.next().await else {
        panic!("another event")
    };
    assert_eq!(resource, "steering.hardware_rules");
    let used: HashMap<_, _> = node
        .steering
        .occupancy()
        .await
        .expect("occupancy")
        .into_iter()
        .map(|occupancy| (occupancy.resource, (occupancy.used, occupancy.limit)))
        .collect();
    assert_eq!(
        (used["steering.rules"], used["steering.hardware_rules"]),
        ((2, 3), (1, 1))
    );
}

#[tokio::test]
async fn rules_are_listed_by_group_priority_and_cookie() {
    let node = Node::plain().await;
    let at = |cookie, group, priority, address: &str| {
        rule(cookie, priority, to(address), Action::Drop).in_group(Group(group))
    };
    let rules = [
        at(9, 0, 5, "10.0.0.1"),
        at(1, 1, 0, "10.0.0.1"),
        at(3, 0, 7, "10.0.0.3"),
        at(2, 0, 5, "10.0.0.4"),
    ];
    node.apply(rules.map(add).into(), Atomicity::Atomic).await;
    assert_eq!(node.cookies().await, [2, 9, 3, 1]);
}

#[tokio::test]
async fn validate_knows_what_only_the_engine_refuses() {
    let node = Node::plain().await;
    let sctp = Pattern {
        ip_proto: Some(IpProtocol::SCTP),
        l4_dst: Some(80.into()),
        ..Pattern::default()
    };
    let rules = [rule(1, 1, sctp, Action::Drop), pass(2, B)];
    let verdicts = node.steering.validate(&rules).await.expect("judged");
    let judged = dpumesh_core::steering::Verdict::No {
        field: "pattern.ip_proto".to_owned(),
        reason: "the software dataplane reads the ports of TCP and UDP only".to_owned(),
    };
    assert_eq!((&verdicts[0], verdicts[1].is_possible()), (&judged, true));
    let outcome = node.apply(rules.map(add).into(), Atomicity::Continue).await;
    let error = outcome.results[0].as_ref().expect_err("as judged");
    let field = error.object.as_ref().map(|object| object.field.as_ref());
    assert_eq!(
        (error.kind, field),
        (ErrorKind::Unsupported, Some("pattern.ip_proto"))
    );
    assert!(outcome.results[1].is_ok());
}

#[tokio::test]
async fn a_stopped_engine_is_a_lost_device() {
    let node = Node::plain().await;
    node.worker.handle.stop();
    let started = Instant::now();
    let error = loop {
        match node.steering.add(FENCE, pass(1, B)).await {
            Err(error) => break error,
            Ok(_) => assert!(started.elapsed() < Duration::from_secs(10)),
        }
        node.steering.remove(FENCE, Owner::Agent, Cookie(1)).await.ok();
    };
    assert_eq!(
        (error.kind, error.retry),
        (ErrorKind::DeviceLost, Retry::AfterReset)
    );
}

/// What a frame meets, by the lists of all owners: the port of the best rule, and its cookie.
fn expected(rules: &[SteeringRule], destination: &str, port: u16) -> Option<(u128, Action)> {
    let destination: IpAddr = destination.parse().expect("address");
    let matches = |rule: &&SteeringRule| {
        let pattern = &rule.pattern;
        let address = match pattern.ip_dst {
            None => true,
            Some(IpMatch::Prefix(prefix)) => prefix.contains(&destination),
            Some(IpMatch::Masked(_)) => false,
        };
        let range = pattern
            .l4_dst
            .is_none_or(|range| (range.first..=range.last).contains(&port));
        address && range && pattern.port.is_none_or(|port| port == POD_PORT)
    };
    let best = rules.iter().filter(matches).min_by_key(|rule| rule.priority)?;
    Some((best.cookie.0, best.actions.last()?.clone()))
}

const DESTINATIONS: [(&str, u16); 4] = [
    ("10.0.0.2", 80),
    ("10.0.0.3", 80),
    ("10.0.1.2", 81),
    ("10.1.0.1", 90),
];

#[derive(Clone, Debug)]
enum Op {
    Apply(Batch),
    /// Sent to the engine, but nobody waits for the answer.
    Abandon(Batch),
    Flush(Owner),
    Count,
}

fn any_rule() -> impl Strategy<Value = SteeringRule> {
    static PREFIXES: [&str; 5] = [
        "10.0.0.2/32",
        "10.0.0.0/24",
        "10.0.0.0/16",
        "10.0.1.0/24",
        "10.0.0.0/8",
    ];
    let address = proptest::option::of(proptest::sample::select(&PREFIXES[..]));
    let ports = proptest::option::of((79_u16..82, 0_u16..10));
    let owner = prop_oneof![4 => Just(Owner::Agent), 1 => Just(Owner::Proxy)];
    (
        0_u128..10,
        owner,
        0_u32..6,
        address,
        ports,
        any::<bool>(),
        0_u8..3,
    )
        .prop_map(|(cookie, owner, priority, address, ports, port, action)| {
            let pattern = Pattern {
                port: port.then_some(POD_PORT),
                ip_dst: address.map(|prefix| IpMatch::Prefix(prefix.parse().expect("prefix"))),
                l4_dst: ports.map(|(first, more)| PortRange {
                    first,
                    last: first + more,
                }),
                ..tcp()
            };
            let action = match action {
                0 => Action::Drop,
                1 => Action::Forward(OTHER_PORT),
                _ => Action::Forward(PortRef::Uplink(0)),
            };
            // The mark makes every rule's actions different: of two that overlap at equal priority one is refused.
            let actions = vec![Action::Count, Action::Mark(cookie as u32), action];
            SteeringRule::new(Cookie(cookie), owner, Priority(priority), pattern, actions)
        })
}

fn any_batch() -> impl Strategy<Value = Batch> {
    let owner = prop_oneof![4 => Just(Owner::Agent), 1 => Just(Owner::Proxy)];
    let operation = prop_oneof![
        3 => any_rule().prop_map(Operation::Add),
        1 => (owner, 0_u128..10).prop_map(|(owner, cookie)| Operation::Remove { owner, cookie: Cookie(cookie) }),
    ];
    let atomicity =
        proptest::sample::select(&[Atomicity::Continue, Atomicity::Rollback, Atomicity::Atomic][..]);
    (proptest::collection::vec(operation, 1..8), atomicity)
        .prop_map(|(operations, atomicity)| Batch::new(operations).with(atomicity))
}

fn any_op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => any_batch().prop_map(Op::Apply),
        2 => any_batch().prop_map(Op::Abandon),
        1 => Just(Op::Flush(Owner::Agent)),
        2 => Just(Op::Count),
    ]
}

/// Rules with what they must have counted.
type Model = BTreeMap<u128, u64>;

/// Sends one frame to each destination and compares what comes out with the lists.
fn probe(bench: &mut Bench, rules: &[SteeringRule], model: &mut Model) -> Result<(), TestCaseError> {
    for (destination, port) in DESTINATIONS {
        bench.send(POD_PORT, segment(POD, A, destination, (5, port), 0));
        let out = [OTHER_PORT, PortRef::Uplink(0)].map(|port| bench.sent(port).len());
        let best = expected(rules, destination, port);
        let wanted = match &best {
            Some((_, Action::Forward(OTHER_PORT))) => [1, 0],
            Some((_, Action::Forward(_))) => [0, 1],
            _ => [0, 0],
        };
        prop_assert_eq!(out, wanted, "to {}:{} by {:?}", destination, port, &best);
        if let Some((cookie, _)) = best {
            *model.entry(cookie).or_default() += 1;
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn frames_meet_the_rules_that_are_listed(ops in proptest::collection::vec(any_op(), 1..25), masks in 2_usize..9) {
        let mut config = EngineConfig::new(5);
        config.masks = masks;
        let mut bench = Bench::with(&config);
        let limits = software_capabilities(8);
        let steering = SoftSteering::new("soft", bench.handle.clone(), limits, FENCE.0, EventHub::default());
        let mut model = Model::new();
        for op in ops {
            match op {
                Op::Apply(batch) => {
                    let outcome = bench.wait(steering.apply(FENCE, &batch)).expect("a live engine");
                    for (operation, result) in batch.operations.iter().zip(&outcome.results) {
                        match (operation, result) {
                            (Operation::Add(rule), Ok(Change::Added(_))) => drop(model.insert(rule.cookie.0, 0)),
                            (Operation::Remove { cookie, .. }, Ok(Change::Removed(counters))) => {
                                let last = counters.expect("every rule counts").packets;
                                prop_assert_eq!(model.remove(&cookie.0), Some(last));
                            }
                            _ => {}
                        }
                    }
                }
                Op::Abandon(batch) => {
                    let mut call = Box::pin(steering.apply(FENCE, &batch));
                    if poll(call.as_mut()).is_pending() {
                        bench.engine.turn();
                        let _ = poll(call.as_mut()); // perhaps past its first command, perhaps to the end
                    }
                    drop(call);
                    // What became of it is for `list` to say; counting begins anew where the rule did.
                    model.clear();
                }
                Op::Flush(owner) => {
                    bench.wait(steering.flush(FENCE, owner)).expect("a live engine");
                }
                Op::Count => {}
            }
            let lists = [Owner::Agent, Owner::Proxy].map(|owner| bench.wait(steering.list(owner)).expect("list"));
            let rules: Vec<SteeringRule> = lists.into_iter().flatten().map(|installed| installed.rule).collect();
            model.retain(|cookie, _| rules.iter().any(|rule| rule.cookie.0 == *cookie));
            let known = model.len() == rules.len();
            if !known {
                for rule in &rules {
                    let counters = bench.wait(steering.counters(rule.owner, &[rule.cookie])).expect("counters");
                    model.insert(rule.cookie.0, counters[0].expect("it counts").packets);
                }
            }
            probe(&mut bench, &rules, &mut model)?;
            for rule in &rules {
                let counters = bench.wait(steering.counters(rule.owner, &[rule.cookie])).expect("counters");
                prop_assert_eq!(counters[0].map(|counters| counters.packets), model.get(&rule.cookie.0).copied());
            }
            let slots = (0..100).collect();
            let handle = bench.handle.clone();
            let installed = bench.wait(async move { handle.read_counters(slots).await }).expect("engine").len();
            prop_assert_eq!(installed, rules.len());
        }
    }
}

/// A port that never runs out of frames to [`B`], and one that counts what it is given.
#[derive(Debug)]
struct Flood {
    port: PortRef,
    frame: Option<Frame>,
    taken: Arc<AtomicUsize>,
}

impl PortIo for Flood {
    fn port(&self) -> PortRef {
        self.port
    }

    fn limits(&self) -> PortIoLimits {
        Queues::new(self.port, 1500).limits
    }

    fn receive(&mut self, frames: &mut [Frame]) -> Result<usize> {
        let Some(template) = &self.frame else { return Ok(0) };
        frames
            .iter_mut()
            .for_each(|frame| assert!(frame.fill(template.octets())));
        Ok(frames.len())
    }

    fn transmit(&mut self, frames: &mut [Frame]) -> Result<usize> {
        self.taken.fetch_add(frames.len(), Ordering::Relaxed);
        Ok(frames.len())
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn refused(&self) -> u64 {
        0
    }
}

#[tokio::test]
async fn no_frame_meets_a_half_applied_atomic_batch() {
    const UPDATES: usize = 60_000;
    const BATCH: usize = 60;
    let node = Node::plain().await;
    let (good, better, wrong) = (OTHER_PORT, PortRef::vf(2), PortRef::Uplink(0));
    let mut taken = BTreeMap::new();
    for port in [good, better, wrong, POD_PORT] {
        let frame = (port == POD_PORT).then(|| segment(POD, A, B, (1, 80), 0));
        let count: Arc<AtomicUsize> = Arc::default();
        taken.insert(port, Arc::clone(&count));
        assert!(node.worker.handle.close_port(port).await.is_ok());
        if port != POD_PORT {
            let io = Flood {
                port,
                frame,
                taken: count,
            };
            assert!(node.worker.handle.open_port(Box::new(io)).await.expect("engine"));
        }
    }
    // Between the removal and the addition a frame would fall to the wrong port; after both, to nobody.
    let swap = |n: usize| {
        rule(
            1000 + n as u128,
            1,
            to(B),
            Action::Forward(if n.is_multiple_of(2) { good } else { better }),
        )
    };
    let trap = |n: usize| rule(3000 + n as u128, 2, tcp(), Action::Forward(wrong));
    node.apply(vec![add(swap(0)), add(trap(0))], Atomicity::Atomic)
        .await;
    let frame = Some(segment(POD, A, B, (1, 80), 0));
    let flood = Flood {
        port: POD_PORT,
        frame,
        taken: Arc::clone(&taken[&POD_PORT]),
    };
    assert!(
        node.worker
            .handle
            .open_port(Box::new(flood))
            .await
            .expect("engine")
    );
    let others: Vec<SteeringRule> = (0..BATCH / 2 - 2)
        .map(|n| pass(n as u128 + 100, &format!("10.7.0.{}", n + 1)))
        .collect();
    let started = Instant::now();
    for n in 0..UPDATES / BATCH {
        let mut batch = vec![remove(1000 + n as u128), remove(3000 + n as u128)];
        batch.extend(others.iter().cloned().map(add));
        batch.extend([add(trap(n + 1)), add(swap(n + 1))]);
        batch.extend(others.iter().map(|rule| remove(rule.cookie.0)));
        assert_eq!(batch.len(), BATCH);
        node.apply(batch, Atomicity::Atomic)
            .await
            .into_result()
            .expect("room");
    }
    let time = started.elapsed();
    assert!(node.worker.handle.close_port(POD_PORT).await.is_ok());
    let stats = node.worker.handle.stats().await.expect("engine");
    let [good, better, wrong] = [good, better, wrong].map(|port| taken[&port].load(Ordering::Relaxed));
    println!("{UPDATES} updates in {time:?} while forwarding {good} + {better} frames");
    assert_eq!(wrong, 0, "a frame met a half-applied batch");
    assert!(good > 0 && better > 0, "{good} and {better} frames");
    assert!(
        !stats.drops.contains_key("no_rule"),
        "a frame met no rule at all: {stats:?}"
    );
}
