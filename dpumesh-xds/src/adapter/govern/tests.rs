//! The governor with recorded pods and a proxy played by hand.

use super::*;
use crate::aggregate::{Interception, Options, aggregate};
use crate::recorded;

const OPTIONS: Options = Options {
    outbound: std::net::SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED), 15_001),
    inbound: std::net::SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED), 15_006),
    interception: Interception::Transparent,
};

const FRONT: &str = "front-1.shop";
const REVIEWS: &str = "reviews-1.shop";

struct World {
    governor: Governor,
    generation: u64,
    made: Aggregate,
    changes: BTreeMap<usize, u32>,
}

/// A recorded view, and one that is like it but for one cluster's endpoints.
fn view(index: usize, altered: bool) -> PodView {
    let (mut view, _) = recorded::view(index);
    if altered {
        let mut all = view.endpoints.values_mut();
        let (first, last) = (all.next().unwrap(), all.next_back().unwrap());
        assert_ne!(first.content, last.content);
        Arc::make_mut(first).content = last.content.clone();
    }
    view
}

fn local(index: usize) -> LocalPod {
    let pod = recorded::pod(index);
    LocalPod {
        name: pod.name,
        namespace: pod.identity.namespace,
        uid: format!("uid-{index}"),
        service_account: pod.identity.service_account,
        trust_domain: pod.identity.trust_domain,
        addresses: pod.addresses,
        labels: BTreeMap::new(),
        token: None,
        listed: false,
    }
}

impl World {
    fn new(pods: &[usize]) -> Self {
        let mut world = Self {
            governor: Governor::default(),
            generation: 0,
            made: Aggregate::default(),
            changes: BTreeMap::new(),
        };
        for index in pods {
            world.again(*index);
        }
        world.publish();
        world
    }

    /// A pod's configuration comes, or comes again as it was.
    fn again(&mut self, index: usize) {
        let changes = self.changes.get(&index).copied().unwrap_or_default();
        self.governor.put(&local(index), view(index, changes % 2 == 1));
    }

    /// Another configuration of a pod comes.
    fn change(&mut self, index: usize) {
        *self.changes.entry(index).or_default() += 1;
        self.again(index);
    }

    fn publish(&mut self) {
        loop {
            let made = aggregate(&self.governor.views(), &OPTIONS);
            // As the adapter does: what is the same again has no generation of its own.
            if self.generation == 0 || made.snapshot != self.made.snapshot {
                self.generation += 1;
            }
            self.made = made;
            if !self.governor.published(self.generation, &self.made) {
                break;
            }
        }
    }

    fn says(&mut self, kind: ResourceType, outcome: Outcome) -> bool {
        let again = self.governor.event(&Event {
            node: "proxy".into(),
            kind,
            names: Vec::new(),
            generation: self.generation,
            outcome,
        });
        if again {
            self.publish();
        }
        again
    }

    fn in_step(&mut self) -> bool {
        self.says(ResourceType::Listener, Outcome::InStep)
    }

    fn refuses(&mut self, kind: ResourceType, reason: &str) -> bool {
        self.says(kind, Outcome::Nack(reason.to_owned()))
    }

    fn state(&self, key: &str) -> State {
        self.governor.report()[key].state.clone()
    }

    fn quarantined(&self) -> Vec<String> {
        let report = self.governor.report();
        let quarantined = report.iter().filter(|(_, report)| report.quarantined.is_some());
        quarantined.map(|(key, _)| key.clone()).collect()
    }

    fn has(&self, pod: &str) -> bool {
        self.made.users.values().any(|pods| pods.contains(pod))
    }
}

#[test]
fn a_pod_is_governed_when_the_proxy_has_its_whole_program() {
    let mut world = World::new(&[0]);
    assert_eq!(world.state(FRONT), State::Waiting(String::new()));
    assert!(!world.in_step());
    assert_eq!(world.state(FRONT), State::Governed(1));
    let mut half = recorded::view(1).0;
    half.routes.clear();
    world.governor.put(&local(1), half);
    world.publish();
    world.in_step();
    assert_eq!(world.state(REVIEWS), State::Waiting("waits for route 80".into()));
    assert_eq!(world.state(FRONT), State::Governed(1), "unchanged");
    world.change(1);
    world.publish();
    assert_eq!(world.state(REVIEWS), State::Waiting(String::new()));
    world.in_step();
    assert_eq!(world.state(REVIEWS), State::Governed(2));
}

#[test]
fn all_proxies_must_have_it() {
    let mut world = World::new(&[0]);
    let other = |generation, outcome| Event {
        node: "other".into(),
        kind: ResourceType::Listener,
        names: Vec::new(),
        generation,
        outcome,
    };
    world.governor.event(&other(0, Outcome::InStep));
    world.in_step();
    assert_eq!(world.state(FRONT), State::Waiting(String::new()));
    world.governor.event(&other(0, Outcome::Gone));
    assert_eq!(world.state(FRONT), State::Governed(1));
}

#[test]
fn who_is_named_is_quarantined_and_the_others_go_on() {
    let mut world = World::new(&[0, 1]);
    world.in_step();
    world.change(0);
    world.change(1);
    world.publish();
    let reason =
        "Error adding/updating cluster(s) outbound|80|v1|reviews.shop.svc.cluster.local@reviews-1.shop: no";
    assert!(world.refuses(ResourceType::Cluster, reason));
    assert_eq!(world.quarantined(), [REVIEWS]);
    assert!(world.has(REVIEWS) && world.has(FRONT), "the last good one stays");
    assert!(!world.in_step());
    assert_eq!(world.state(FRONT), State::Governed(2));
    assert_eq!(world.state(REVIEWS), State::Governed(3), "by its last good view");
    world.change(1);
    world.publish();
    assert!(world.quarantined().is_empty(), "a change is tried again");
}

#[test]
fn a_chain_names_its_pod() {
    let mut world = World::new(&[0, 1]);
    let chain = world
        .made
        .users
        .keys()
        .find(|(kind, name)| *kind == ResourceType::Listener && name.starts_with(REVIEWS))
        .map(|(_, name)| name.clone())
        .unwrap();
    let reason = format!("listener \"inbound\": filter_chains[3] {chain}: filter: unknown");
    assert!(world.refuses(ResourceType::Listener, &reason));
    assert_eq!(world.quarantined(), [REVIEWS]);
    assert!(!world.has(REVIEWS), "it never had a good one");
    assert_eq!(world.state(REVIEWS), State::Refused(reason));
    world.in_step();
    assert_eq!(world.state(FRONT), State::Governed(1));
}

#[test]
fn where_nobody_is_named_the_changed_ones_are_tried_one_by_one() {
    let mut world = World::new(&[0, 1, 2]);
    world.in_step();
    for index in 0..3 {
        world.change(index);
    }
    world.publish();
    // The proxy refuses every snapshot that has the second pod's new view.
    let bad = Arc::clone(&world.governor.pods[REVIEWS].current);
    let mut rounds = 0;
    loop {
        rounds += 1;
        assert!(rounds < 20, "it ends");
        let shown = world.governor.pods[REVIEWS]
            .view()
            .is_some_and(|view| Arc::ptr_eq(view, &bad));
        let again = if shown {
            world.refuses(ResourceType::Listener, "inbound: no")
        } else {
            world.in_step()
        };
        if !again {
            break;
        }
    }
    assert_eq!(world.quarantined(), [REVIEWS]);
    for key in [FRONT, "reviews-2.shop"] {
        let standing = &world.governor.pods[key];
        assert!(
            Arc::ptr_eq(standing.good.as_ref().unwrap(), &standing.current),
            "{key}"
        );
    }
}

#[test]
fn a_changed_one_that_is_the_same_again_holds_nobody_up() {
    let mut world = World::new(&[0, 1]);
    world.in_step();
    world.again(0);
    world.change(1);
    world.publish();
    assert!(world.refuses(ResourceType::Listener, "inbound: no"));
    // Both have what they had; the first is tried, and is what the proxy has: nothing more will be heard of it.
    assert!(world.in_step());
    assert!(
        world.refuses(ResourceType::Listener, "inbound: no"),
        "the second is tried"
    );
    assert_eq!(world.quarantined(), [REVIEWS]);
    assert!(world.has(REVIEWS), "by its last good view");
}

#[test]
fn an_old_refusal_is_no_news() {
    let mut world = World::new(&[0, 1]);
    let stale = Event {
        node: "proxy".into(),
        kind: ResourceType::Listener,
        names: Vec::new(),
        generation: 1,
        outcome: Outcome::Nack("inbound: no".into()),
    };
    assert!(world.governor.event(&stale));
    world.publish();
    assert!(!world.governor.event(&stale));
}

#[test]
fn a_name_is_a_word() {
    assert!(speaks_of("Error adding/updating cluster(s) a|80: bad", "a|80"));
    assert!(speaks_of("route 80. Ends", "80"));
    assert!(speaks_of("\"p.ns/x@1\"", "p.ns/x@1"));
    for text in ["8080", "80.1", "|80|", "x/80", ""] {
        assert!(!speaks_of(text, "80"), "{text}");
    }
}
