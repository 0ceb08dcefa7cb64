//! The priorities of a set of endpoints, down to the lists that are taken in turn.

use super::hash::Table;
use super::load::{Load, Standing};
use super::schedule::schedule;
use super::{Ask, Members, Spread, Turns};
use crate::config::model::{Balance, Endpoint};
use crate::health::{Eds, Health};

/// The priorities of a set of endpoints.
#[derive(Debug)]
pub(super) struct Levels {
    /// Of a hundred, up to where a pool is taken. Without a share there is nothing to serve by.
    shares: Vec<(u64, usize)>,
    /// The healthy endpoints of each priority, then the degraded ones.
    pools: Vec<Pool>,
    standings: Vec<Standing>,
    overprovisioning: u32,
    /// What every pick comes to where one endpoint serves alone, as of the application in a pod.
    sole: Option<(u32, bool)>,
}

/// What is asked of one priority.
#[derive(Debug)]
struct Pool {
    panics: bool,
    table: Option<Table>,
    /// Turns and order of the localities; without any there is one list.
    localities: Option<(usize, Vec<u32>)>,
    lists: Vec<List>,
}

/// Endpoints in turn.
#[derive(Debug)]
struct List {
    turns: usize,
    order: Vec<u32>,
}

impl Levels {
    /// Of the endpoints `members`.
    pub(super) fn new(of: &Members<'_>, members: &[u32], turns: &mut usize) -> Self {
        let Members {
            spread, endpoints, ..
        } = *of;
        let priority = |member: &u32| {
            let locality = endpoints[*member as usize].locality as usize;
            spread.localities[locality].priority as usize
        };
        let last = members.iter().map(priority).max().unwrap_or(0);
        let mut priorities = vec![Vec::new(); last + 1];
        members.iter().for_each(|m| priorities[priority(m)].push(*m));
        let standings: Vec<Standing> = priorities
            .iter()
            .map(|p| standing(spread, endpoints, p))
            .collect();
        let load = Load::of(&standings, spread.overprovisioning, spread.panic_below);
        let mut pools = Vec::new();
        for part in [Health::Healthy, Health::Degraded] {
            for (members, panics) in priorities.iter().zip(&load.panics) {
                let part = (!panics).then_some(part);
                pools.push(Pool::new(of, members, part, turns));
            }
        }
        let shares = shares(&load);
        let sole = match shares[..] {
            [(100.., at)] => pools[at].sole().map(|endpoint| (endpoint, pools[at].panics)),
            _ => None,
        };
        Self {
            shares,
            pools,
            standings,
            overprovisioning: spread.overprovisioning,
            sole,
        }
    }

    /// The shares where some priorities were tried in vain; `None` where no other is left.
    fn shares_without(&self, tried: &[u32]) -> Option<Vec<(u64, usize)>> {
        let left = |(at, standing): (u32, &Standing)| match tried.contains(&at) {
            true => Standing::default(),
            false => *standing,
        };
        let standings: Vec<Standing> = (0..).zip(&self.standings).map(left).collect();
        let serves = |s: &Standing| s.healthy + s.degraded > 0;
        let load = Load::of(&standings, self.overprovisioning, 0);
        standings.iter().any(serves).then(|| shares(&load))
    }

    /// Picks one; true where it was picked in panic.
    pub(super) fn pick(
        &self,
        balance: Balance,
        ask: &Ask<'_>,
        turns: &mut Turns,
        busy: impl Fn(usize) -> u32,
    ) -> Option<(u32, bool)> {
        if ask.tried.is_empty() && self.sole.is_some() {
            return self.sole;
        }
        let others = match ask.tried {
            [] => None,
            tried => self.shares_without(tried),
        };
        let shares = others.as_ref().unwrap_or(&self.shares);
        let hash = match ask.hash {
            None if shares.len() == 1 && !balance.hashes() => 0,
            None => fastrand::u64(..),
            Some(hash) => hash,
        };
        let point = hash % 100 + 1;
        let share = shares.iter().find(|(upto, _)| point <= *upto)?;
        let pool = &self.pools[share.1];
        let endpoint = match &pool.table {
            Some(table) => table.find(hash, ask.attempt),
            None => pool.list(turns)?.pick(balance, turns, busy),
        }?;
        Some((endpoint, pool.panics))
    }
}

/// The load as points of a hundred, up to which each pool is taken.
fn shares(load: &Load) -> Vec<(u64, usize)> {
    let mut upto = 0;
    let loads = load.healthy.iter().chain(&load.degraded).enumerate();
    let taken = loads.filter(|(_, share)| **share > 0);
    let share = |(pool, share): (usize, &u32)| {
        upto += u64::from(*share);
        (upto, pool)
    };
    taken.map(share).collect()
}

/// How a priority stands.
fn standing(spread: &Spread, endpoints: &[Endpoint], members: &[u32]) -> Standing {
    let mut standing = Standing::default();
    for endpoint in members.iter().map(|m| &endpoints[*m as usize]) {
        let measure = if spread.weighted_availability {
            u64::from(endpoint.weight)
        } else {
            1
        };
        standing.all += 1;
        if endpoint.eds == Eds::Draining {
            continue;
        }
        standing.hosts += 1;
        standing.measure[0] += measure;
        match endpoint.health() {
            Health::Healthy => {
                standing.healthy += 1;
                standing.measure[1] += measure;
            }
            Health::Degraded => {
                standing.degraded += 1;
                standing.measure[2] += measure;
            }
            Health::Unhealthy => {}
        }
    }
    standing
}

impl Pool {
    /// Of the `members` of a priority those that stand so; all of them without `part`.
    fn new(of: &Members<'_>, members: &[u32], part: Option<Health>, turns: &mut usize) -> Self {
        let Members {
            spread, endpoints, ..
        } = *of;
        let fits = |m: &&u32| part.is_none_or(|part| endpoints[**m as usize].health() == part);
        let serving: Vec<u32> = members.iter().filter(fits).copied().collect();
        let mut pool = Self {
            panics: part.is_none(),
            table: None,
            localities: None,
            lists: Vec::new(),
        };
        if spread.balance.hashes() {
            pool.table = Some(Table::new(spread, endpoints, &serving));
            return pool;
        }
        let groups = if spread.by_locality && part.is_some() {
            localities(spread, endpoints, members, &serving)
        } else {
            Vec::new()
        };
        if groups.is_empty() {
            pool.lists.push(List::new(of, &serving, turns));
            return pool;
        }
        let shares: Vec<(u32, u64)> = (0..).zip(groups.iter().map(|(share, _)| *share)).collect();
        pool.localities = Some((claim(turns), schedule(&shares)));
        let lists = groups.iter().map(|(_, group)| List::new(of, group, turns));
        pool.lists = lists.collect();
        pool
    }

    fn sole(&self) -> Option<u32> {
        let [list] = &self.lists[..] else { return None };
        let (first, others) = list.order.split_first()?;
        others.iter().all(|other| other == first).then_some(*first)
    }

    fn list(&self, turns: &mut Turns) -> Option<&List> {
        match &self.localities {
            None => self.lists.first(),
            Some((at, order)) => {
                let turn = turns.next(*at) % order.len();
                self.lists.get(order[turn] as usize)
            }
        }
    }
}

/// The localities that have something to serve by: share and endpoints. A locality's share is its weight, as far as it is available.
fn localities(
    spread: &Spread,
    endpoints: &[Endpoint],
    members: &[u32],
    serving: &[u32],
) -> Vec<(u64, Vec<u32>)> {
    let of = |locality: usize, list: &[u32]| -> Vec<u32> {
        let here = |m: &&u32| endpoints[**m as usize].locality as usize == locality;
        list.iter().filter(here).copied().collect()
    };
    let mut groups = Vec::new();
    for (at, locality) in spread.localities.iter().enumerate() {
        let counts = |m: &&u32| endpoints[**m as usize].eds != Eds::Draining;
        let all = of(at, members).iter().filter(counts).count();
        let here = of(at, serving);
        if here.is_empty() || locality.weight == 0 {
            continue;
        }
        let available = f64::from(spread.overprovisioning) / 100.0 * here.len() as f64 / all as f64;
        // In millionths, so that a part of a small weight is a weight.
        let share = (f64::from(locality.weight) * available.min(1.0) * 1e6).round();
        groups.push(((share as u64).max(1), here));
    }
    groups
}

fn claim(turns: &mut usize) -> usize {
    *turns += 1;
    *turns - 1
}

impl List {
    fn new(of: &Members<'_>, members: &[u32], turns: &mut usize) -> Self {
        let entry = |m: &u32| (*m, of.weights[*m as usize]);
        let entries: Vec<_> = members.iter().map(entry).collect();
        Self {
            turns: claim(turns),
            order: schedule(&entries),
        }
    }

    fn pick(&self, balance: Balance, turns: &mut Turns, busy: impl Fn(usize) -> u32) -> Option<u32> {
        if self.order.is_empty() {
            return None;
        }
        let at = |turn: usize| self.order[turn % self.order.len()];
        Some(match balance {
            Balance::Random => at(fastrand::usize(..)),
            Balance::LeastRequest => {
                let (a, b) = (at(fastrand::usize(..)), at(fastrand::usize(..)));
                if busy(b as usize) < busy(a as usize) { b } else { a }
            }
            _ => at(turns.next(self.turns)),
        })
    }
}
