//! The books under random faults: whatever the card refuses, forgets or has no room for, what was accepted is listed, what is said to be in
//! hardware is there, and nothing else is.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use dpumesh_core::steering::{
    Action, Batch, Cookie, IpMatch, Operation, Owner, Pattern, Placement, PlacementRequest, Priority,
    SteeringRule,
};
use dpumesh_core::{Backend, BackendExt, Effect, Event};
use dpumesh_hw::memory::{MemoryConfig, capabilities};
use dpumesh_yusur::YusurBackend;
use dpumesh_yusur::table::{E_COLLISION, E_FULL};
use dpumesh_yusur_simulator::fixture::YusurFixture;
use proptest::prelude::*;

/// What is done to the card.
#[derive(Debug, Clone)]
enum Step {
    Change(Vec<Edit>),
    /// So many of the next additions are refused.
    Refuse(u64, i32),
    Reset,
    Flush,
}

#[derive(Debug, Clone)]
enum Edit {
    Add(Shape),
    Remove(u8),
}

/// A rule: its cookie says which addresses, `bits` how many of them, as a power of two.
#[derive(Debug, Clone)]
struct Shape {
    cookie: u8,
    bits: u8,
    priority: u8,
    counts: bool,
    only_hardware: bool,
}

fn edit() -> impl Strategy<Value = Edit> {
    let shape = (
        0..12u8,
        prop_oneof![6 => Just(0u8), 2 => Just(2), 1 => Just(16)],
        0..6u8,
        any::<bool>(),
        prop::bool::weighted(0.1),
    );
    let shape = shape.prop_map(|(cookie, bits, priority, counts, only_hardware)| Shape {
        cookie,
        bits,
        priority,
        counts,
        only_hardware,
    });
    prop_oneof![3 => shape.prop_map(Edit::Add), 1 => (0..12u8).prop_map(Edit::Remove)]
}

fn step() -> impl Strategy<Value = Step> {
    let code = prop_oneof![Just(E_COLLISION), Just(E_FULL)];
    prop_oneof![
        8 => prop::collection::vec(edit(), 1..5).prop_map(Step::Change),
        2 => (1..5u64, code).prop_map(|(count, code)| Step::Refuse(count, code)),
        1 => Just(Step::Reset),
        1 => Just(Step::Flush),
    ]
}

fn rule(shape: &Shape) -> SteeringRule {
    let host = Ipv4Addr::from(0x0a00_0000 + (u32::from(shape.cookie % 6) << 2));
    let net = ipnet::IpNet::new(IpAddr::V4(host), 32 - shape.bits)
        .expect("a prefix")
        .trunc();
    let pattern = Pattern {
        ip_dst: Some(net.into()),
        ..Pattern::default()
    };
    let mut actions = vec![Action::Punt];
    if shape.counts {
        actions.insert(0, Action::Count);
    }
    let (cookie, priority) = (Cookie(shape.cookie.into()), Priority(shape.priority.into()));
    let mut rule = SteeringRule::new(cookie, Owner::Agent, priority, pattern, actions);
    if shape.only_hardware {
        rule.placement = PlacementRequest::Hardware;
    }
    rule
}

/// Entries that a rule takes in exact tables.
fn entries_of(rule: &SteeringRule) -> u64 {
    let length = match &rule.pattern.ip_dst {
        Some(IpMatch::Prefix(net)) => net.prefix_len(),
        other => panic!("{other:?} is none of these rules'"),
    };
    1 << (32 - length)
}

/// What was accepted.
type Model = BTreeMap<u128, SteeringRule>;

async fn change(card: &YusurBackend, edits: &[Edit], model: &mut Model) {
    let steering = card.require_steering().expect("steering");
    let operation = |edit: &Edit| match edit {
        Edit::Add(shape) => Operation::Add(rule(shape)),
        Edit::Remove(cookie) => Operation::Remove {
            owner: Owner::Agent,
            cookie: Cookie((*cookie).into()),
        },
    };
    let batch = Batch::new(edits.iter().map(operation).collect());
    let outcome = steering.apply(card.fence(), &batch).await.expect("carried out");
    assert_eq!(outcome.results.len(), edits.len());
    for (edit, result) in edits.iter().zip(outcome.results) {
        match (edit, result) {
            (Edit::Add(shape), Ok(_)) => {
                let known = model.insert(shape.cookie.into(), rule(shape));
                assert!(
                    known.is_none_or(|known| known == rule(shape)),
                    "another rule has this cookie"
                );
            }
            (Edit::Remove(cookie), Ok(_)) => drop(model.remove(&(*cookie).into())),
            (_, Err(error)) => assert_eq!(error.effect, Effect::None, "{error}"),
        }
    }
}

async fn reset(card: &Arc<YusurBackend>) {
    let mut events = card.events();
    card.diagnose("lose").await.expect("told");
    card.diagnose("restore").await.expect("told");
    let back = async { while !matches!(events.next().await, Some(Event::Back { .. }) | None) {} };
    tokio::time::timeout(Duration::from_secs(30), back)
        .await
        .expect("the card came back");
}

async fn check(card: &YusurBackend, model: &Model) {
    let steering = card.require_steering().expect("steering");
    let listed = steering.list(Owner::Agent).await.expect("listed");
    let rules: Model = listed
        .iter()
        .map(|one| (one.rule.cookie.0, one.rule.clone()))
        .collect();
    assert_eq!(rules.len(), listed.len(), "a cookie is listed twice");
    assert_eq!(rules.keys().collect::<Vec<_>>(), model.keys().collect::<Vec<_>>());
    assert_eq!(&rules, model);
    let in_hardware = listed.iter().filter(|one| one.placement == Placement::Hardware);
    let wanted: u64 = in_hardware.map(|one| entries_of(&one.rule)).sum();
    assert_eq!(card.diagnose("entries").await.expect("told"), wanted.to_string());
}

async fn run(steps: &[Step]) {
    let mut floor = MemoryConfig::default();
    floor.capabilities = capabilities();
    let fixture = YusurFixture::new("card", "entries=24,counters=3,batch_max=4").on_floor(floor);
    let test = fixture.card().expect("a card");
    let card = test.open().expect("opened");
    let mut model = Model::new();
    for step in steps {
        match step {
            Step::Change(edits) => change(&card, edits, &mut model).await,
            Step::Refuse(count, code) => {
                card.diagnose(&format!("fail {count} {code}"))
                    .await
                    .expect("told");
            }
            Step::Reset => {
                reset(&card).await;
                // Rules that must be in hardware may find no room, or keep one out that software would let win: then `list` says so.
                let steering = card.require_steering().expect("steering");
                let listed = steering.list(Owner::Agent).await.expect("listed");
                let is_listed = |cookie: &u128| listed.iter().any(|one| one.rule.cookie.0 == *cookie);
                if model
                    .values()
                    .any(|rule| rule.placement == PlacementRequest::Hardware)
                {
                    model.retain(|cookie, _| is_listed(cookie));
                }
            }
            Step::Flush => {
                let steering = card.require_steering().expect("steering");
                steering.flush(card.fence(), Owner::Agent).await.expect("flushed");
                model.clear();
            }
        }
        check(&card, &model).await;
    }
    let steering = card.require_steering().expect("steering");
    steering.flush(card.fence(), Owner::Agent).await.expect("flushed");
    check(&card, &Model::new()).await;
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, max_shrink_iters: 200, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn the_books_are_right_whatever_the_card_does(steps in prop::collection::vec(step(), 1..14)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(run(&steps));
    }
}
