//! The API's watches: every pod, node, namespace and service, from the first list on for as long as the program runs.
//!
//! A watch that breaks is resumed where it was, after a random wait of at most five seconds; when the API no longer knows that place, everything
//! is listed anew, and what was known stays until the new list is whole. So an API that is away changes nothing for anybody.

use std::collections::BTreeMap;
use std::time::Duration;

use futures_util::{Stream, StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1 as api;
use kube::runtime::WatchStreamExt;
use kube::runtime::utils::Backoff;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client};
use tokio::sync::watch;
use tokio::time::Instant;

use super::world::{Fact, Namespace, Node, Pod, Service, World};

/// How long the world must be quiet before it is told on.
const QUIET: Duration = Duration::from_millis(10);
/// How long a steady flow of changes can hold that up.
const PATIENCE: Duration = Duration::from_millis(200);
/// First bound of the random wait before a broken watch is resumed, and the last.
const WAIT: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));
/// An attempt that failed is told of; when none is for so long, one did not fail.
const RESUMED: Duration = Duration::from_secs(12);

/// What the watches know.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// The cluster as last seen.
    pub world: World,
    /// Kinds that were not listed yet.
    pub unlisted: Vec<&'static str>,
    /// Kinds whose watch is broken now, and why.
    pub broken: BTreeMap<&'static str, String>,
}

impl Facts {
    /// Whether the world is whole: everything was listed at least once.
    pub fn is_whole(&self) -> bool {
        self.unlisted.is_empty()
    }
}

/// Watches the cluster until dropped; `facts` has what is known each time that something changed and things are quiet, at the latest 200 ms
/// after a change.
pub async fn watch(client: Client, facts: watch::Sender<Facts>) {
    let mut pods = stream::<api::Pod, Pod>(client.clone());
    let mut nodes = stream::<api::Node, Node>(client.clone());
    let mut namespaces = stream::<api::Namespace, Namespace>(client.clone());
    let mut services = stream::<api::Service, Service>(client);
    let mut known = Known::default();
    facts.send_replace(known.facts());
    loop {
        let mut changed = tokio::select! {
            event = pods.next() => known.pods.take(event),
            event = nodes.next() => known.nodes.take(event),
            event = namespaces.next() => known.namespaces.take(event),
            event = services.next() => known.services.take(event),
            () = tokio::time::sleep(Duration::from_secs(1)) => known.heal(),
        };
        let deadline = Instant::now() + PATIENCE;
        while changed {
            let quiet = (Instant::now() + QUIET).min(deadline);
            tokio::select! {
                event = pods.next() => drop(known.pods.take(event)),
                event = nodes.next() => drop(known.nodes.take(event)),
                event = namespaces.next() => drop(known.namespaces.take(event)),
                event = services.next() => drop(known.services.take(event)),
                () = tokio::time::sleep_until(quiet) => {
                    facts.send_replace(known.facts());
                    changed = false;
                }
            }
            if changed && Instant::now() >= deadline {
                facts.send_replace(known.facts());
                changed = false;
            }
        }
    }
}

type Events<T> = std::pin::Pin<Box<dyn Stream<Item = Result<Event<(String, T)>, watcher::Error>> + Send>>;

fn stream<K, T>(client: Client) -> Events<T>
where
    K: kube::Resource<DynamicType = ()>
        + Clone
        + std::fmt::Debug
        + serde::de::DeserializeOwned
        + Send
        + 'static,
    T: Fact<Object = K> + Send + 'static,
{
    let watched = watcher(Api::<K>::all(client), watcher::Config::default());
    let read = watched.map_ok(|event| match event {
        Event::Apply(object) => Event::Apply(T::read(object)),
        Event::Delete(object) => Event::Delete(T::read(object)),
        Event::Init => Event::Init,
        Event::InitApply(object) => Event::InitApply(T::read(object)),
        Event::InitDone => Event::InitDone,
    });
    read.backoff(FullJitter::default()).boxed()
}

#[derive(Debug, Default)]
struct Known {
    pods: Watched<Pod>,
    nodes: Watched<Node>,
    namespaces: Watched<Namespace>,
    services: Watched<Service>,
}

impl Known {
    fn facts(&self) -> Facts {
        let mut facts = Facts {
            world: World {
                pods: self.pods.now.clone(),
                nodes: self.nodes.now.clone(),
                namespaces: self.namespaces.now.clone(),
                services: self.services.now.clone(),
            },
            ..Facts::default()
        };
        self.pods.tell(&mut facts);
        self.nodes.tell(&mut facts);
        self.namespaces.tell(&mut facts);
        self.services.tell(&mut facts);
        facts
    }

    /// Whether a watch that was broken has been whole for a while.
    fn heal(&mut self) -> bool {
        let now = Instant::now();
        // Each of them, not the first that was.
        self.pods.heal(now) | self.nodes.heal(now) | self.namespaces.heal(now) | self.services.heal(now)
    }
}

/// One kind's objects.
#[derive(Debug)]
struct Watched<T> {
    now: BTreeMap<String, T>,
    /// A list that is not whole yet.
    coming: BTreeMap<String, T>,
    listed: bool,
    broken: Option<(Instant, String)>,
}

impl<T> Default for Watched<T> {
    fn default() -> Self {
        Self {
            now: BTreeMap::new(),
            coming: BTreeMap::new(),
            listed: false,
            broken: None,
        }
    }
}

impl<T: Fact> Watched<T> {
    /// Takes an event; whether anything is different now.
    fn take(&mut self, event: Option<Result<Event<(String, T)>, watcher::Error>>) -> bool {
        match event {
            Some(Ok(event)) => self.broken.take().is_some() | self.apply(event),
            Some(Err(error)) => {
                let reason = causes(&error);
                let news = self.broken.as_ref().is_none_or(|(_, known)| *known != reason);
                if news {
                    tracing::warn!(kind = T::WORD, reason, "watch broken; what is known stays");
                }
                self.broken = Some((Instant::now(), reason));
                news
            }
            // A watcher's stream does not end.
            None => false,
        }
    }

    fn apply(&mut self, event: Event<(String, T)>) -> bool {
        match event {
            Event::Init => self.coming.clear(),
            Event::InitApply((key, fact)) => drop(self.coming.insert(key, fact)),
            Event::InitDone => {
                let whole = std::mem::take(&mut self.coming);
                let first = !std::mem::replace(&mut self.listed, true);
                let changed = first || whole != self.now;
                self.now = whole;
                return changed;
            }
            Event::Apply((key, fact)) => {
                if self.now.get(&key) == Some(&fact) {
                    return false;
                }
                self.now.insert(key, fact);
                return true;
            }
            Event::Delete((key, _)) => return self.now.remove(&key).is_some(),
        }
        false
    }

    fn heal(&mut self, now: Instant) -> bool {
        let healed = self
            .broken
            .take_if(|(since, _)| now.duration_since(*since) > RESUMED);
        if healed.is_some() {
            tracing::info!(kind = T::WORD, "watch resumed");
        }
        healed.is_some()
    }

    fn tell(&self, facts: &mut Facts) {
        if !self.listed {
            facts.unlisted.push(T::WORD);
        }
        if let Some((_, reason)) = &self.broken {
            facts.broken.insert(T::WORD, reason.clone());
        }
    }
}

/// Random waits whose bound doubles with each failure: controllers that lost one API server do not come back together.
#[derive(Debug, Default)]
struct FullJitter {
    failures: u32,
}

impl Iterator for FullJitter {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let bound = WAIT.0.saturating_mul(1 << self.failures.min(16)).min(WAIT.1);
        self.failures += 1;
        Some(bound.mul_f64(fastrand::f64()))
    }
}

impl Backoff for FullJitter {
    fn reset(&mut self) {
        self.failures = 0;
    }
}

fn causes(error: &dyn std::error::Error) -> String {
    let mut text = said(error);
    let mut source = error.source();
    while let Some(cause) = source {
        let more = said(cause);
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        source = cause.source();
    }
    text
}

/// An error's own words; what the API answered is printed as a structure behind its message, and left out.
fn said(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    text.truncate(text.find(" (Status {").unwrap_or(text.len()));
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::controller::{configs, plan};

    fn node(name: &str, endpoint: u8) -> (String, Node) {
        let node = Node {
            name: name.to_owned(),
            tunnel_endpoint: Some(format!("192.0.2.{endpoint}")),
            ..Node::default()
        };
        (name.to_owned(), node)
    }

    fn list(watched: &mut Watched<Node>, nodes: &[(&str, u8)]) -> bool {
        watched.apply(Event::Init);
        for (name, endpoint) in nodes {
            watched.apply(Event::InitApply(node(name, *endpoint)));
        }
        watched.apply(Event::InitDone)
    }

    #[test]
    fn what_is_known_stays_until_a_new_list_is_whole() {
        let mut watched = Watched::<Node>::default();
        assert!(list(&mut watched, &[("n1", 1), ("n2", 2)]));
        assert!(!watched.apply(Event::Init));
        assert!(!watched.apply(Event::InitApply(node("n2", 3))));
        assert_eq!((watched.now.len(), &watched.now["n2"]), (2, &node("n2", 2).1));
        assert!(watched.apply(Event::InitDone), "n1 is gone, n2 is another");
        assert_eq!(watched.now.len(), 1);
        assert!(!list(&mut watched, &[("n2", 3)]), "the same again is no news");
    }

    #[test]
    fn an_outage_is_told_and_takes_nothing_away() {
        let mut known = Known::default();
        assert_eq!(
            known.facts().unlisted,
            ["pods", "nodes", "namespaces", "services"]
        );
        list(&mut known.nodes, &[("n1", 1)]);
        assert_eq!(known.facts().unlisted, ["pods", "namespaces", "services"]);
        let outage = || Some(Err(watcher::Error::NoResourceVersion));
        assert!(known.nodes.take(outage()));
        assert!(!known.nodes.take(outage()), "the same again is no news");
        let facts = known.facts();
        assert_eq!(facts.broken.keys().collect::<Vec<_>>(), [&"nodes"]);
        assert_eq!(facts.world.nodes.len(), 1);
        assert!(
            known.nodes.take(Some(Ok(Event::Apply(node("n1", 1))))),
            "it is whole again"
        );
        assert!(known.facts().broken.is_empty());
    }

    #[test]
    fn waits_are_bounded() {
        assert!(FullJitter::default().take(100).all(|wait| wait <= WAIT.1));
    }

    /// What may happen to one object.
    #[derive(Debug, Clone)]
    enum Step {
        Apply(u8),
        Delete,
    }

    fn steps() -> impl Strategy<Value = Vec<(usize, Step)>> {
        let step = prop_oneof![4 => (1u8..6).prop_map(Step::Apply), 1 => Just(Step::Delete)];
        proptest::collection::vec((0usize..6, step), 0..40)
    }

    /// Names of two nodes and four pods.
    const NAMES: [&str; 6] = ["n1", "n2", "a", "b", "c", "d"];

    fn play(known: &mut Known, (object, step): &(usize, Step)) {
        let name = NAMES[*object];
        let pod = |last: u8| {
            let pod = Pod {
                name: name.to_owned(),
                namespace: "shop".to_owned(),
                node: Some(NAMES[usize::from(last % 2)].to_owned()),
                addresses: vec![format!("10.0.0.{last}")],
                own_network: true,
                opt_in: (last < 5).then(|| "dpu".to_owned()),
                ..Pod::default()
            };
            (pod.key(), pod)
        };
        match (*object < 2, step) {
            (true, Step::Apply(last)) => known.nodes.apply(Event::Apply(node(name, *last))),
            (true, Step::Delete) => known.nodes.apply(Event::Delete(node(name, 0))),
            (false, Step::Apply(last)) => known.pods.apply(Event::Apply(pod(*last))),
            (false, Step::Delete) => known.pods.apply(Event::Delete(pod(0))),
        };
    }

    proptest! {
        /// Events of different objects may come in any order, and a list may replace any part of the events before it.
        #[test]
        fn the_order_of_events_does_not_matter(steps in steps(), seed in any::<u64>(), relist in any::<bool>()) {
            let mut one = Known::default();
            steps.iter().for_each(|step| play(&mut one, step));
            // Another interleaving that keeps each object's own order.
            let mut random = fastrand::Rng::with_seed(seed);
            let mut queues: Vec<Vec<&(usize, Step)>> = vec![Vec::new(); NAMES.len()];
            steps.iter().rev().for_each(|step| queues[step.0].push(step));
            let mut other = Known::default();
            while queues.iter().any(|queue| !queue.is_empty()) {
                let pick = random.usize(..queues.len());
                queues[pick].pop().into_iter().for_each(|step| play(&mut other, step));
            }
            if relist {
                other.pods.apply(Event::Init);
                for (key, pod) in one.pods.now.iter().rev() {
                    other.pods.apply(Event::InitApply((key.clone(), pod.clone())));
                }
                other.pods.apply(Event::InitDone);
            }
            let (one, other) = (one.facts().world, other.facts().world);
            prop_assert_eq!(configs(&one, "td"), configs(&other, "td"));
            prop_assert_eq!(plan(&one, "td").findings, plan(&other, "td").findings);
        }
    }
}
