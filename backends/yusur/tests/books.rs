//! The backend's books against the card under faults: random batches, flushes and resets while additions, removals, tables,
//! tunnels and reads fail. After each step `list` is what was accepted, software has all of it, and the card's tables hold
//! exactly the rules that are said to be in hardware.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use dpumesh_core::steering::{
    Action, Atomicity, Batch, BatchOutcome, Change, Cookie, Encapsulation, Group, InstalledRule, IpMatch,
    IpProtocol, Operation, Owner, Pattern, Placement, PlacementRequest, PortRange, Priority, SteeringRule,
    TunnelKind, Undone,
};
use dpumesh_core::{Backend, BackendExt, Effect, Error, FlowSteeringExt, MacAddr, PortRef, Vni};
use dpumesh_hw::memory::{MemoryConfig, capabilities};
use dpumesh_yusur::YusurBackend;
use dpumesh_yusur_simulator::fixture::{TestCard, YusurFixture};
use proptest::prelude::*;

const OWNERS: [Owner; 2] = [Owner::Agent, Owner::Proxy];
/// Rules that there are; every sixth is of the same shape.
const RULES: u8 = 24;
/// Little of everything, so that each resource runs out.
const PROFILE: &str = "entries=12 tables=4 profiles=2 counters=3 tunnels=2 priorities=4 batch_max=3";

#[derive(Clone, Debug)]
enum Step {
    Apply(Vec<(bool, u8)>, Atomicity),
    Flush(usize),
    Fail(&'static str, u64, i32),
    LoseAfter(u64),
    Reset,
    Counters,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let one = (prop::bool::weighted(0.65), 0..RULES);
    let atomicity = prop_oneof![Just(Atomicity::Continue), Just(Atomicity::Rollback)];
    let target = prop::sample::select(vec!["", "delete", "create", "read", "count", "tunnel"]);
    // Busy, full, collision, a fault of the library.
    let code = prop::sample::select(vec![-5, -4, -12, -13]);
    let step = prop_oneof![
        8 => (prop::collection::vec(one, 1..7), atomicity).prop_map(|(one, how)| Step::Apply(one, how)),
        1 => (0..2_usize).prop_map(Step::Flush),
        4 => (target, 1..4_u64, code).prop_map(|(what, count, code)| Step::Fail(what, count, code)),
        1 => (0..8_u64).prop_map(Step::LoseAfter),
        1 => Just(Step::Reset),
        1 => Just(Step::Counters),
    ];
    prop::collection::vec(step, 1..24)
}

fn address(host: u32) -> Option<IpMatch> {
    Some(IpMatch::from(IpAddr::V4(Ipv4Addr::from(0x0a00_0000 + host))))
}

/// A rule and the entries that it has in hardware.
fn rule(number: u8) -> (SteeringRule, usize) {
    let host = Pattern {
        ip_dst: address(number.into()),
        ..Pattern::default()
    };
    let (priority, pattern, actions, entries) = match number % 6 {
        0 => (2, host, vec![Action::Punt], 1),
        1 => {
            let first = 80 + u16::from(number) * 2;
            let ports = Pattern {
                ip_proto: Some(IpProtocol::TCP),
                l4_dst: Some(PortRange {
                    first,
                    last: first + 1,
                }),
                ..Pattern::default()
            };
            (2, ports, vec![Action::Count, Action::Drop], 2)
        }
        2 => (3, host, vec![Action::Count, Action::Drop], 1),
        3 => {
            let wide: ipnet::IpNet = format!("10.0.0.{}/27", number & 0xe0).parse().expect("a prefix");
            let wide = Pattern {
                ip_dst: Some(wide.into()),
                ..Pattern::default()
            };
            (u32::from(number % 4), wide, vec![Action::Punt], 32)
        }
        4 => {
            let outer = Encapsulation {
                kind: TunnelKind::Vxlan,
                vni: Vni::try_from(u32::from(number)).expect("a small number"),
                local: IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
                remote: IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2)),
                eth_src: MacAddr([2, 0, 0, 0, 0, 1]),
                eth_dst: MacAddr([2, 0, 0, 0, 0, 2]),
            };
            let actions = vec![Action::Encapsulate(outer), Action::Forward(PortRef::Uplink(0))];
            (2, host, actions, 1)
        }
        _ => (1, host, vec![Action::Drop], 1),
    };
    let owner = OWNERS[usize::from(number / 6 % 2)];
    let mut rule = SteeringRule::new(Cookie(number.into()), owner, Priority(priority), pattern, actions);
    if number % 6 == 1 {
        rule = rule.in_group(Group(1)); // ports and addresses would contradict each other
    }
    if number % 6 == 5 {
        rule.placement = PlacementRequest::Hardware;
    }
    (rule, entries)
}

fn cookie_of(operation: &Operation) -> u8 {
    let cookie = match operation {
        Operation::Add(rule) => rule.cookie,
        Operation::Remove { cookie, .. } => *cookie,
    };
    u8::try_from(cookie.0).expect("a small cookie")
}

/// What is accepted; `None` where nobody was told.
type Model = BTreeMap<u8, Option<bool>>;

struct World {
    test: TestCard,
    card: Arc<YusurBackend>,
    model: Model,
}

impl World {
    fn new() -> Self {
        let mut config = MemoryConfig::default();
        config.capabilities = capabilities();
        config.capabilities.steering.rules = 20_000;
        let test = YusurFixture::new("books", PROFILE)
            .on_floor(config)
            .card()
            .expect("a card");
        let card = test.open().expect("opened");
        let model = (0..RULES).map(|number| (number, Some(false))).collect();
        Self { test, card, model }
    }

    async fn told(&self, command: &str) -> String {
        self.card.diagnose(command).await.expect("told")
    }

    async fn take(&mut self, step: &Step) {
        let card = Arc::clone(&self.card);
        let steering = card.require_steering().expect("steering");
        match step {
            Step::Apply(operations, atomicity) => {
                let operation = |(add, number): &(bool, u8)| {
                    let (rule, _) = rule(*number);
                    let (owner, cookie) = (rule.owner, rule.cookie);
                    if *add {
                        Operation::Add(rule)
                    } else {
                        Operation::Remove { owner, cookie }
                    }
                };
                let batch = Batch::new(operations.iter().map(operation).collect()).with(*atomicity);
                let outcome = steering.apply(self.card.fence(), &batch).await;
                let failed = |error: &Error| error.effect != Effect::None;
                match outcome {
                    Ok(outcome) => {
                        self.learn(&batch, &outcome);
                        let is_same_life = self.told("alive").await == "1";
                        if is_same_life && outcome.undone == Undone::No {
                            self.placed_as_said(&batch, &outcome).await;
                        }
                    }
                    Err(error) if failed(&error) => {
                        let touched = batch.operations.iter().map(cookie_of);
                        self.model.extend(touched.map(|number| (number, None)));
                    }
                    Err(_) => {}
                }
            }
            Step::Flush(owner) => match steering.flush(self.card.fence(), OWNERS[*owner]).await {
                Ok(_) => self.forget(*owner, Some(false)),
                Err(error) if error.effect == Effect::None => {}
                Err(_) => self.forget(*owner, None),
            },
            Step::Fail(what, count, code) => {
                self.told(&format!("fail {count} {code} {what}")).await;
            }
            Step::LoseAfter(entries) => {
                self.told(&format!("lose_after {entries}")).await;
            }
            Step::Reset => {
                self.told("lose").await;
            }
            Step::Counters => {
                let cookies: Vec<Cookie> = (0..RULES).map(|number| Cookie(number.into())).collect();
                for owner in OWNERS {
                    let _ = steering.counters(owner, &cookies).await; // reading may fail, and changes nothing
                }
            }
        }
        self.settle().await;
    }

    fn forget(&mut self, owner: usize, now: Option<bool>) {
        for (number, accepted) in &mut self.model {
            if rule(*number).0.owner == OWNERS[owner] && *accepted != Some(false) {
                *accepted = now;
            }
        }
    }

    /// What the answer to a batch says.
    fn learn(&mut self, batch: &Batch, outcome: &BatchOutcome) {
        assert_eq!(batch.operations.len(), outcome.results.len());
        for (operation, result) in batch.operations.iter().zip(&outcome.results) {
            let accepted = self.model.get_mut(&cookie_of(operation)).expect("a known rule");
            match (&outcome.undone, result) {
                (Undone::All, _) => {}
                (Undone::Failed(_), _) => *accepted = None,
                (Undone::No, Ok(Change::Added(_) | Change::Present(_))) => *accepted = Some(true),
                (Undone::No, Ok(Change::Removed(_) | Change::Absent)) => *accepted = Some(false),
                (Undone::No, Err(error)) if error.effect != Effect::None => *accepted = None,
                (Undone::No, _) => {}
            }
        }
    }

    /// The last word on a rule is where it is.
    async fn placed_as_said(&mut self, batch: &Batch, outcome: &BatchOutcome) {
        let epoch = self.card.epoch();
        let listed = self.listed().await;
        if self.card.epoch() != epoch {
            return; // places are others in a new life
        }
        let last: BTreeMap<u8, &Result<Change, Error>> = batch
            .operations
            .iter()
            .map(cookie_of)
            .zip(&outcome.results)
            .collect();
        for (number, result) in last {
            if let Ok(Change::Added(said)) = result {
                let found = listed.get(&number).expect("it was added");
                assert_eq!(is_hard(&found.placement), is_hard(said), "rule {number}");
            }
        }
    }

    /// Brings the card back if it is away.
    async fn settle(&mut self) {
        if self.told("alive").await == "1" {
            return;
        }
        let epoch = self.card.epoch();
        self.told("restore").await;
        let back = async {
            while self.card.epoch() == epoch {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), back)
            .await
            .expect("the card came back");
        for (number, accepted) in &mut self.model {
            if is_only_hard(*number) && *accepted == Some(true) {
                *accepted = None; // the new life may have no room where it has to be
            }
        }
    }

    async fn listed(&mut self) -> BTreeMap<u8, InstalledRule> {
        let card = Arc::clone(&self.card);
        let steering = card.require_steering().expect("steering");
        let mut all = BTreeMap::new();
        for owner in OWNERS {
            // A table that cannot be read now can be read later: three faults in a row are the most.
            let mut tries = 0;
            let rules = loop {
                match steering.list(owner).await {
                    Ok(rules) => break rules,
                    Err(error) if tries == 40 => panic!("not even now: {error}"),
                    Err(_) => {
                        tries += 1;
                        self.settle().await; // it may have been lost just now
                    }
                }
            };
            for installed in rules {
                all.insert(
                    u8::try_from(installed.rule.cookie.0).expect("a small cookie"),
                    installed,
                );
            }
        }
        all
    }

    /// Books, card and software agree, and nothing accepted is missing.
    async fn check(&mut self) {
        let listed = self.listed().await;
        for (number, accepted) in &mut self.model {
            let there = listed.contains_key(number);
            assert_eq!(there, accepted.unwrap_or(there), "rule {number}");
            *accepted = Some(there);
        }
        let floor = self.test.floor.both();
        let soft = floor.require_steering().expect("software");
        let mut mirrored = Vec::new();
        for owner in OWNERS {
            let rules = soft.list(owner).await.expect("listed");
            mirrored.extend(rules.into_iter().map(|installed| installed.rule.cookie.0 as u8));
        }
        mirrored.sort_unstable();
        let wanted = listed.keys().copied().filter(|number| number % 6 != 4);
        assert_eq!(mirrored, wanted.collect::<Vec<u8>>(), "software has every rule");
        let hard = listed
            .iter()
            .filter(|(_, installed)| is_hard(&installed.placement));
        let hard: Vec<u8> = hard.map(|(number, _)| *number).collect();
        let users = self.told("users").await;
        let entries: usize = hard.iter().map(|number| rule(*number).1).sum();
        assert_eq!(users.split_whitespace().count(), hard.len(), "hardware: {hard:?}");
        assert_eq!(
            self.told("entries").await,
            entries.to_string(),
            "hardware: {hard:?}"
        );
    }

    /// After a flush and without faults all of the card is free: each rule goes to hardware, and as many as there is room for.
    async fn nothing_leaked(&mut self) {
        for target in ["", "delete", "create", "read", "count", "tunnel"] {
            self.told(&format!("fail 0 0 {target}")).await;
        }
        self.told("lose_after 1000000").await;
        self.check().await;
        let card = Arc::clone(&self.card);
        let steering = card.require_steering().expect("steering");
        for owner in OWNERS {
            steering.flush(self.card.fence(), owner).await.expect("flushed");
        }
        self.model
            .values_mut()
            .for_each(|accepted| *accepted = Some(false));
        self.check().await;
        for used in steering.occupancy().await.expect("told") {
            assert!(
                used.used == 0 || !used.resource.starts_with("steering."),
                "{used:?}"
            );
        }
        // Three counters, two tunnels; each uses a table of its own.
        for group in [&[2, 8, 14][..], &[4, 10], &[1, 7], &[5, 11, 17], &[0, 6, 12, 18]] {
            for number in group {
                let added = steering.add(self.card.fence(), rule(*number).0).await;
                assert_eq!(
                    added.expect("added"),
                    Change::Added(Placement::Hardware),
                    "rule {number}"
                );
            }
            for owner in OWNERS {
                steering.flush(self.card.fence(), owner).await.expect("flushed");
            }
        }
        self.check().await;
    }
}

/// It has to be in hardware, or software (which makes no tunnels here) cannot carry it out.
fn is_only_hard(number: u8) -> bool {
    matches!(number % 6, 4 | 5)
}

fn is_hard(placement: &Placement) -> bool {
    *placement == Placement::Hardware
}

fn run(steps: &[Step]) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let mut world = World::new();
        for step in steps {
            world.take(step).await;
            world.check().await;
        }
        world.nothing_leaked().await;
    });
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn books_card_and_software_agree_under_faults(steps in steps()) {
        run(&steps);
    }
}

/// What the property found once.
#[test]
fn former_faults_stay_away() {
    use Atomicity::{Continue, Rollback};
    let cases = [
        // A table that was not made is made for the next rule.
        vec![
            Step::Fail("create", 1, -5),
            Step::Apply(vec![(true, 0)], Continue),
        ],
        // The slot of a rule that the batch removed belongs to another rule when the card's answer is looked at.
        vec![
            Step::Fail("", 2, -12),
            Step::Apply(vec![(true, 0), (false, 0), (true, 6)], Continue),
        ],
        // A rule that was named twice and refused is refused twice.
        vec![
            Step::Fail("", 1, -5),
            Step::Apply(vec![(true, 23), (true, 23)], Continue),
        ],
        // Undoing fails as well.
        vec![
            Step::Apply(vec![(true, 0), (true, 4)], Continue),
            Step::Fail("", 3, -12),
            Step::Apply(vec![(false, 0), (false, 4), (true, 5)], Rollback),
        ],
        // The card keeps a removed entry, a demoted one, and one of a refused rule.
        vec![
            Step::Apply(vec![(true, 0), (true, 2)], Continue),
            Step::Fail("delete", 3, -13),
            Step::Apply(vec![(false, 0), (true, 9)], Continue),
        ],
        // Nobody can read what the card did.
        vec![
            Step::Fail("", 1, -12),
            Step::Fail("read", 2, -13),
            Step::Apply(vec![(true, 0), (true, 6)], Continue),
        ],
        // A profile is given away in the batch that gives it back: tables are made before entries go.
        vec![
            Step::Apply(vec![(true, 0), (true, 1)], Continue),
            Step::Apply(vec![(false, 1), (true, 7), (false, 0), (true, 5)], Continue),
        ],
        // A replay in which a removal fails, and one in which reading fails.
        vec![
            Step::Apply(vec![(true, 2), (true, 4)], Continue),
            Step::Fail("create", 1, -5),
            Step::Fail("delete", 1, -5),
            Step::Reset,
        ],
        vec![
            Step::Apply(vec![(true, 0), (true, 2)], Continue),
            Step::Fail("", 1, -5),
            Step::Fail("read", 2, -5),
            Step::Reset,
        ],
    ];
    for steps in cases {
        run(&steps);
    }
}
