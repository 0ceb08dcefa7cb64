//! Whose configuration the proxy gets, and who is governed. No I/O, no clock.
//!
//! ```text
//! put(view) ─► views() ─► aggregate ─► published(generation) ─► proxy ─► in step: what was offered is good, its pods are governed
//!                ▲                                                  └──► refused: quarantine, publish again
//!                └──────────────────────────────────────────────────────────┘
//! ```
//!
//! A pod is *governed* when every connected proxy has taken a snapshot that holds its complete program. When a proxy refuses
//! something, the pod it belongs to goes back to its last good view (or is closed, if there is none) and the others go on. Which pod it is:
//!
//! 1. The refusal names a resource, or a chain of a listener, that only pods use whose configuration changed since it was last
//!    taken: those.
//! 2. Otherwise, as with a refused listener whose error names no chain: all pods that changed are *held* back at their last good view,
//!    which the proxy has taken before. Once it has that again they are let through one by one; who is refused now is known.
//!
//! A quarantined pod is tried again when its configuration changes.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;

use serde::Serialize;

use super::pods::LocalPod;
use crate::aggregate::{Aggregate, Users};
use crate::discovery::ResourceType;
use crate::ir::PodView;
use crate::server::{Event, Outcome};

/// How a pod stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Closed until there is more.
    Waiting(String),
    /// The proxy has its program: of this generation.
    Governed(u64),
    /// The proxy refuses its first program.
    Refused(String),
}

/// One pod, for those who wait for it and for the status page.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Kubernetes uid.
    pub uid: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// How it stands.
    pub state: State,
    /// Why its newest configuration is not in force, if the proxy refused it.
    pub quarantined: Option<String>,
}

/// All pods.
#[derive(Debug, Default)]
pub struct Governor {
    pods: BTreeMap<String, Standing>,
    users: Users,
    /// The newest generation, and the first whose refusals are news.
    generation: u64,
    since: u64,
    /// What each connected proxy has taken.
    proxies: BTreeMap<String, u64>,
    held: VecDeque<String>,
    /// Let through alone, not judged yet.
    trial: Option<String>,
}

#[derive(Debug)]
struct Standing {
    uid: String,
    current: Arc<PodView>,
    good: Option<Arc<PodView>>,
    choice: Choice,
    /// What is in force or on its way, and since which generation.
    offered: Option<(u64, Arc<PodView>)>,
    governed: Option<u64>,
    waits: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Choice {
    Current,
    Held,
    Quarantined(String),
}

impl Standing {
    fn view(&self) -> Option<&Arc<PodView>> {
        match self.choice {
            Choice::Current => Some(&self.current),
            Choice::Held | Choice::Quarantined(_) => self.good.as_ref(),
        }
    }

    /// Offered and not taken yet.
    fn suspect(&self) -> bool {
        let offered = self.offered.as_ref().map(|(_, view)| view);
        self.choice == Choice::Current
            && offered
                .is_some_and(|offered| self.good.as_ref().is_none_or(|good| !Arc::ptr_eq(good, offered)))
    }

    fn report(&self) -> Report {
        let state = match (&self.choice, self.governed) {
            (_, Some(generation)) => State::Governed(generation),
            (Choice::Quarantined(reason), None) if self.good.is_none() => State::Refused(reason.clone()),
            _ => State::Waiting(self.waits.clone()),
        };
        let quarantined = match &self.choice {
            Choice::Quarantined(reason) => Some(reason.clone()),
            Choice::Current | Choice::Held => None,
        };
        Report {
            uid: self.uid.clone(),
            addresses: self.current.pod.addresses.clone(),
            state,
            quarantined,
        }
    }
}

impl Governor {
    /// The newest view of a pod.
    pub fn put(&mut self, pod: &LocalPod, view: PodView) {
        let current = Arc::new(view);
        let fresh = Standing {
            uid: pod.uid.clone(),
            current: Arc::clone(&current),
            good: None,
            choice: Choice::Current,
            offered: None,
            governed: None,
            waits: String::new(),
        };
        let standing = self.pods.entry(pod.key()).or_insert(fresh);
        if matches!(standing.choice, Choice::Quarantined(_)) {
            standing.choice = Choice::Current;
        }
        standing.current = current;
    }

    /// The pod is gone, or another one took its place.
    pub fn remove(&mut self, key: &str) {
        self.pods.remove(key);
        self.held.retain(|held| held != key);
        if self.trial.as_deref() == Some(key) {
            self.trial = None;
        }
    }

    /// Whether a pod's newest view is whole.
    pub fn complete(&self, key: &str) -> bool {
        let standing = self.pods.get(key);
        standing.is_some_and(|standing| standing.current.missing().is_empty())
    }

    /// What is to be aggregated.
    pub fn views(&self) -> Vec<PodView> {
        let chosen = self.pods.values().filter_map(Standing::view);
        chosen.map(|view| PodView::clone(view)).collect()
    }

    /// What [`Self::views`] became, and its generation: the one before, where nothing is different in it. Nothing was put or removed between.
    /// Whether [`Self::views`] is another one now.
    pub fn published(&mut self, generation: u64, made: &Aggregate) -> bool {
        self.generation = generation;
        self.users = made.users.clone();
        for (key, standing) in &mut self.pods {
            let closed = made.closed.iter().find(|closed| closed.pod == *key);
            standing.waits = closed.map(|closed| closed.reason.clone()).unwrap_or_default();
            let view = standing.view().filter(|_| closed.is_none()).cloned();
            standing.offered = view.map(|view| match standing.offered.take() {
                Some((since, old)) if Arc::ptr_eq(&old, &view) => (since, old),
                _ => (generation, view),
            });
            if standing.offered.is_none() {
                standing.governed = None;
            }
        }
        // A view may come again and change nothing: the proxies have it already, and say no more of it.
        self.in_step()
    }

    /// What a proxy said. Whether [`Self::views`] is another one now.
    pub fn event(&mut self, event: &Event) -> bool {
        match &event.outcome {
            Outcome::InStep => {
                self.proxies.insert(event.node.clone(), event.generation);
                self.in_step()
            }
            Outcome::Gone => {
                self.proxies.remove(&event.node);
                self.in_step()
            }
            Outcome::Nack(reason) => self.refused(event, reason),
            Outcome::Ack | Outcome::Refused => false,
        }
    }

    /// Notes what all proxies have taken; up to which generation that is.
    fn taken(&mut self) -> Option<u64> {
        let taken = self.proxies.values().min().copied()?;
        for standing in self.pods.values_mut() {
            if let Some((since, view)) = &standing.offered
                && *since <= taken
            {
                standing.good = Some(Arc::clone(view));
                standing.governed = Some(*since);
            }
        }
        Some(taken)
    }

    fn in_step(&mut self) -> bool {
        if self.taken().is_none_or(|taken| taken < self.generation) {
            return false;
        }
        self.trial = self.held.pop_front();
        let Some(standing) = self.trial.as_ref().and_then(|key| self.pods.get_mut(key)) else {
            return false;
        };
        standing.choice = Choice::Current;
        true
    }

    fn refused(&mut self, event: &Event, reason: &str) -> bool {
        if event.generation < self.since {
            return false;
        }
        let suspects: BTreeSet<String> = self
            .pods
            .iter()
            .filter(|(_, standing)| standing.suspect())
            .map(|(key, _)| key.clone())
            .collect();
        let named = self.named(event.kind, reason);
        let guilty: BTreeSet<String> = match named.intersection(&suspects).cloned().collect() {
            guilty if !BTreeSet::is_empty(&guilty) => guilty,
            _ if suspects.len() == 1 => suspects,
            _ if suspects.is_empty() && named.len() == 1 => named,
            _ if suspects.is_empty() => {
                tracing::error!(node = event.node, kind = %event.kind, reason, "refused, and no pod changed");
                return false;
            }
            _ => {
                tracing::warn!(pods = ?suspects, reason, "refused; the changed pods are held back and tried one by one");
                self.hold(suspects);
                return true;
            }
        };
        for key in guilty {
            tracing::warn!(pod = key, reason, "the proxy refuses it; it is quarantined");
            if let Some(standing) = self.pods.get_mut(&key) {
                // What was refused now is no last good one, even if it was taken before.
                let offered = standing.offered.as_ref().map(|(_, view)| view);
                if let (Some(good), Some(offered)) = (&standing.good, offered)
                    && Arc::ptr_eq(good, offered)
                {
                    standing.good = None;
                    standing.governed = None;
                }
                standing.choice = Choice::Quarantined(reason.to_owned());
            }
        }
        self.since = self.generation + 1;
        true
    }

    fn hold(&mut self, suspects: BTreeSet<String>) {
        for key in &suspects {
            if let Some(standing) = self.pods.get_mut(key) {
                standing.choice = Choice::Held;
            }
        }
        self.held.extend(suspects);
        self.since = self.generation + 1;
    }

    /// Pods that use what the reason names.
    fn named(&self, kind: ResourceType, reason: &str) -> BTreeSet<String> {
        let of_kind = self
            .users
            .range((kind, String::new())..)
            .take_while(|((k, _), _)| *k == kind);
        of_kind
            .filter(|((_, name), _)| speaks_of(reason, name))
            .flat_map(|(_, pods)| pods.iter().cloned())
            .collect()
    }

    /// How all pods stand.
    pub fn report(&self) -> BTreeMap<String, Report> {
        let one = |(key, standing): (&String, &Standing)| (key.clone(), standing.report());
        self.pods.iter().map(one).collect()
    }

    /// What each connected proxy has taken, by node id.
    pub fn proxies(&self) -> &BTreeMap<String, u64> {
        &self.proxies
    }
}

/// Whether `name` stands in `text` as a word of its own: `80` is not in `8080`.
fn speaks_of(text: &str, name: &str) -> bool {
    let inside = |c: char| c.is_alphanumeric() || "|@/_.-".contains(c);
    text.match_indices(name).any(|(at, _)| {
        let before = text[..at].chars().next_back();
        let mut after = text[at + name.len()..].chars();
        // A full stop may end a sentence as well as go on with a name.
        let follows = match after.next() {
            Some('.') => after.next().is_some_and(inside),
            Some(c) => inside(c),
            None => false,
        };
        !before.is_some_and(inside) && !follows
    })
}

#[cfg(test)]
mod tests;
