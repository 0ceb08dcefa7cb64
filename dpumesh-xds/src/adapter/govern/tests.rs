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
        };
        for index in pods {
            world.change(*index);
        }
        world.publish();
        world
    }

    /// A pod's configuration comes, or comes again.
    fn change(&mut self, index: usize) {
        self.governor.put(&local(index), recorded::view(index).0);
    }

    fn publish(&mut self) {
        self.made = aggregate(&self.governor.views(), &OPTIONS);
        self.generation += 1;
        self.governor.published(self.generation, &self.made);
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
    assert_eq!(world.state(REVIEWS), State::Governed(3));
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
