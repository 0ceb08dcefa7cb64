//! Subsets: the endpoints of a cluster whose metadata (`envoy.lb`) has what a route asks for.
//!
//! A selector lists keys; the endpoints that have all of them fall into subsets by their values. A route's criteria find a subset only where
//! a selector has exactly their keys. What happens otherwise is the fallback policy: the selector's own, or the cluster's.

use std::collections::HashMap;
use std::sync::Arc;

use super::Members;
use super::levels::Levels;
use crate::config::model::Endpoint;

/// Keys and values (as JSON), sorted by key.
pub type Fields = [(String, String)];

/// `LbSubsetConfig`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Config {
    /// Where a request goes that finds no subset.
    pub fallback: Fallback,
    /// What the endpoints of the default subset have.
    pub default_subset: Vec<(String, String)>,
    /// Selectors.
    pub selectors: Vec<Selector>,
}

/// `LbSubsetSelector`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Selector {
    /// Sorted.
    pub keys: Vec<String>,
    /// Where a request with these keys goes that finds no subset; `None` leaves it to the cluster.
    pub fallback: Option<Fallback>,
}

/// A fallback policy.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Fallback {
    /// Nowhere.
    None,
    /// To any endpoint.
    Any,
    /// To the default subset.
    Default,
    /// As if it had asked for these keys only.
    Keys(Vec<String>),
}

/// What a route asks of endpoints: sorted by key.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Criteria(Vec<(String, String)>);

impl Criteria {
    /// Of fields in any order; a later one replaces an earlier one of the same key. `None` where there is nothing to ask for.
    pub fn new(fields: impl IntoIterator<Item = (String, String)>) -> Option<Self> {
        let mut sorted = std::collections::BTreeMap::new();
        sorted.extend(fields);
        (!sorted.is_empty()).then(|| Self(sorted.into_iter().collect()))
    }

    /// The fields.
    pub fn fields(&self) -> &Fields {
        &self.0
    }
}

/// How a request's endpoints were found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// The cluster has no subsets.
    Unasked,
    /// By its criteria.
    Selected,
    /// By the cluster's fallback policy.
    Fallback,
    /// By the selector's.
    SelectorFallback,
}

/// The subsets of a cluster.
#[derive(Debug)]
pub(super) struct Subsets {
    config: Arc<Config>,
    found: HashMap<Box<Fields>, Levels>,
    default: Option<Levels>,
}

impl Subsets {
    pub(super) fn new(config: &Arc<Config>, of: &Members<'_>, turns: &mut usize) -> Self {
        let endpoints = of.endpoints;
        let mut members: HashMap<Box<Fields>, Vec<u32>> = HashMap::new();
        for (member, endpoint) in (0u32..).zip(endpoints) {
            for selector in &config.selectors {
                if let Some(values) = project(&endpoint.metadata, &selector.keys) {
                    let list = members.entry(values).or_default();
                    // Two selectors may have the same keys.
                    if list.last() != Some(&member) {
                        list.push(member);
                    }
                }
            }
        }
        let mut sorted: Vec<_> = members.into_iter().collect();
        sorted.sort();
        let found = sorted
            .into_iter()
            .map(|(key, list)| (key, Levels::new(of, &list, turns)))
            .collect();
        let wants_default = |fallback: &Fallback| *fallback == Fallback::Default;
        let of_selectors = config.selectors.iter().filter_map(|s| s.fallback.as_ref());
        let default = of_selectors.chain([&config.fallback]).any(wants_default);
        let default = default.then(|| {
            let has = |e: &Endpoint| config.default_subset.iter().all(|f| e.metadata.contains(f));
            let list = (0u32..).zip(endpoints).filter(|(_, e)| has(e));
            let list: Vec<u32> = list.map(|(member, _)| member).collect();
            Levels::new(of, &list, turns)
        });
        Self {
            config: Arc::clone(config),
            found,
            default,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.found.len()
    }

    /// The endpoints for a request; `all` are those of the cluster.
    pub(super) fn find<'a>(
        &'a self,
        asked: Option<&Criteria>,
        all: &'a Levels,
    ) -> Option<(&'a Levels, Found)> {
        let mut asked = asked.map(|a| std::borrow::Cow::Borrowed(a.fields()));
        // Each round asks for fewer keys.
        while let Some(fields) = &asked {
            if let Some(levels) = self.found.get(&**fields) {
                return Some((levels, Found::Selected));
            }
            let same_keys = |s: &&Selector| s.keys.iter().eq(fields.iter().map(|(key, _)| key));
            let selector = self.config.selectors.iter().find(same_keys);
            match selector.and_then(|s| s.fallback.as_ref()) {
                None => break,
                Some(Fallback::None) => return None,
                Some(Fallback::Any) => return Some((all, Found::SelectorFallback)),
                Some(Fallback::Default) => {
                    return self.default.as_ref().map(|d| (d, Found::SelectorFallback));
                }
                Some(Fallback::Keys(keys)) => {
                    let fewer: Vec<_> = fields.iter().filter(|(k, _)| keys.contains(k)).cloned().collect();
                    asked = (fewer.len() < fields.len()).then_some(fewer.into());
                }
            }
        }
        match self.config.fallback {
            Fallback::Any => Some((all, Found::Fallback)),
            Fallback::Default => self.default.as_ref().map(|d| (d, Found::Fallback)),
            Fallback::None | Fallback::Keys(_) => None,
        }
    }
}

/// The fields of `metadata` that `keys` name, if it has all of them. Both are sorted.
fn project(metadata: &Fields, keys: &[String]) -> Option<Box<Fields>> {
    let field = |key: &String| metadata.iter().find(|(name, _)| name == key).cloned();
    keys.iter().map(field).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::{Ask, Locality, Picker, Spread, Turns};
    use crate::config::model::Balance;
    use crate::health::{Eds, State};

    fn fields(text: &str) -> Vec<(String, String)> {
        let field = |pair: &str| {
            let (key, value) = pair.split_once('=').unwrap();
            (key.to_owned(), value.to_owned())
        };
        text.split_whitespace().map(field).collect()
    }

    fn endpoint(port: u16, metadata: &str) -> Endpoint {
        Endpoint {
            address: ([127, 0, 0, 1], port).into(),
            weight: 1,
            eds: Eds::Healthy,
            locality: 0,
            tls: None,
            header: None,
            hostname: String::new(),
            metadata: fields(metadata).into(),
            check_port: None,
            state: Arc::new(State::default()),
            workload: None,
        }
    }

    fn selector(keys: &str, fallback: Option<Fallback>) -> Selector {
        let keys = keys.split_whitespace().map(str::to_owned).collect();
        Selector { keys, fallback }
    }

    /// The ports that requests with these criteria reach.
    fn reached(config: &Config, asked: &str) -> Vec<u16> {
        let endpoints = [
            endpoint(1, "stage=prod version=1"),
            endpoint(2, "stage=prod version=2"),
            endpoint(3, "stage=dev version=2"),
            endpoint(4, ""),
        ];
        let spread = Spread {
            balance: Balance::RoundRobin,
            panic_below: 50,
            overprovisioning: 140,
            weighted_availability: false,
            by_locality: false,
            localities: vec![Locality {
                priority: 0,
                weight: 0,
                name: Default::default(),
            }],
            subsets: Some(Arc::new(config.clone())),
            slow_start: None,
        };
        let picker = Picker::new(&spread, &endpoints, std::time::Instant::now());
        let mut turns = Turns::new(&picker, None);
        let criteria = Criteria::new(fields(asked));
        let ask = Ask {
            subset: criteria.as_ref(),
            ..Ask::any(([0, 0, 0, 0], 0).into())
        };
        let picked = (0..12).filter_map(|_| picker.pick(&ask, &mut turns, |_| 0));
        let mut ports: Vec<u16> = picked.map(|p| endpoints[p.endpoint].address.port()).collect();
        ports.sort_unstable();
        ports.dedup();
        ports
    }

    #[test]
    fn criteria_find_the_subset_of_exactly_their_keys() {
        let config = Config {
            fallback: Fallback::None,
            default_subset: Vec::new(),
            selectors: vec![selector("stage", None), selector("stage version", None)],
        };
        assert_eq!(reached(&config, "stage=prod"), [1, 2]);
        assert_eq!(reached(&config, "version=2 stage=prod"), [2]);
        assert_eq!(reached(&config, "version=2"), [0u16; 0]);
        assert_eq!(reached(&config, "stage=none"), [0u16; 0]);
        assert_eq!(reached(&config, ""), [0u16; 0]);
    }

    #[test]
    fn fallbacks_are_the_selectors_or_the_clusters() {
        let config = |fallback, of_selector| Config {
            fallback,
            default_subset: fields("version=2"),
            selectors: vec![selector("stage", None), selector("stage version", of_selector)],
        };
        let all = [1, 2, 3, 4];
        assert_eq!(reached(&config(Fallback::Any, None), ""), all);
        assert_eq!(reached(&config(Fallback::Default, None), "x=1"), [2, 3]);
        let none = config(Fallback::Any, Some(Fallback::None));
        assert_eq!(reached(&none, "stage=prod version=9"), [0u16; 0]);
        let any = config(Fallback::None, Some(Fallback::Any));
        assert_eq!(reached(&any, "stage=prod version=9"), all);
        let default = config(Fallback::None, Some(Fallback::Default));
        assert_eq!(reached(&default, "stage=prod version=9"), [2, 3]);
        let keys = config(Fallback::None, Some(Fallback::Keys(vec!["stage".to_owned()])));
        assert_eq!(reached(&keys, "stage=prod version=9"), [1, 2]);
        assert_eq!(reached(&keys, "stage=none version=9"), [0u16; 0]);
    }
}
