//! Groups of masked rules, followed through jumps, and the flow table in front of them.
//!
//! The answer for a packet is a *path*: the rules it passes, at most [`MAX_PATH`], the last of which ends it. Paths of
//! up to two rules that depend on nothing but the flow key are kept in the flow table.

use std::collections::BTreeMap;

use dpumesh_core::steering::Group;

use super::rules::{CompiledRule, Refused, Verdict};
use crate::flow::{
    Classifier, ClassifierLimits, FlowKey, FlowTable, HashSeed, Idle, IdleWheel, Rule, RuleCount,
    RuleCounters, RuleIndex, Slot, Tick, WideKey,
};

/// Rules that a packet may pass through jumps.
pub(super) const MAX_PATH: usize = 8;

/// What the flow table remembers of a flow: 24 octets.
#[derive(Clone, Copy, Debug)]
pub(super) struct Flow {
    path: [RuleIndex; 2],
    last_seen: Tick,
    packets: u32,
    pub(super) offloaded: bool,
}

const NO_RULE: RuleIndex = RuleIndex(u32::MAX);

/// The rules a packet passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Path {
    rules: [RuleIndex; MAX_PATH],
    len: u8,
}

impl Path {
    pub(super) fn rules(&self) -> &[RuleIndex] {
        &self.rules[..usize::from(self.len)]
    }

    /// The rule that says where the packet goes.
    pub(super) fn last(&self) -> RuleIndex {
        self.rules[usize::from(self.len) - 1]
    }

    fn one_or_two(pair: [RuleIndex; 2]) -> Self {
        let mut rules = [NO_RULE; MAX_PATH];
        rules[..2].copy_from_slice(&pair);
        let len = 1 + u8::from(pair[1] != NO_RULE);
        Self { rules, len }
    }
}

/// What classification says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Classified {
    /// These rules; `slot` when the flow is in the table.
    Path(Path, Option<Slot>),
    /// No rule of some group on the way.
    Miss,
    /// More jumps than [`MAX_PATH`].
    TooLong,
}

/// All rules of an engine and the table of flows.
#[derive(Debug)]
pub(super) struct RuleTables {
    groups: BTreeMap<Group, Classifier>,
    rules: Vec<Option<CompiledRule>>,
    counters: RuleCounters,
    flows: FlowTable<Flow>,
    wheel: IdleWheel,
    limits: ClassifierLimits,
    seed: HashSeed,
    idle: u32,
}

impl RuleTables {
    /// Tables for `flows` flows that are forgotten after `idle` ticks, and `limits` per group.
    pub(super) fn new(flows: u32, idle: u32, limits: ClassifierLimits, seed: HashSeed, now: Tick) -> Self {
        Self {
            groups: BTreeMap::new(),
            rules: Vec::new(),
            counters: RuleCounters::default(),
            flows: FlowTable::new(flows.max(1), seed)
                .expect("at least 1, and a u32 of flows is checked by EngineConfig"),
            wheel: IdleWheel::new(flows.max(1), now),
            limits,
            seed,
            idle,
        }
    }

    pub(super) fn flows(&self) -> usize {
        self.flows.len()
    }

    #[inline]
    pub(super) fn rule(&self, index: RuleIndex) -> &CompiledRule {
        let rule = self.rules[index.0 as usize].as_ref();
        rule.expect("a path names installed rules: flows are forgotten when rules change")
    }

    /// Finds many flows at once; `None` for those to be classified.
    #[inline]
    pub(super) fn lookup(&self, keys: &[FlowKey], found: &mut [Option<Slot>]) {
        self.flows.lookup_batch(keys, found);
    }

    /// Finds one flow.
    pub(super) fn lookup_one(&self, key: &FlowKey) -> Option<Slot> {
        self.flows.lookup(key)
    }

    /// The path of a flow that [`RuleTables::lookup`] found in this batch.
    #[inline]
    pub(super) fn hit(&mut self, slot: Slot, now: Tick) -> Option<(Path, bool)> {
        let flow = self.flows.value_mut(slot)?;
        flow.last_seen = now;
        flow.packets = flow.packets.saturating_add(1);
        Some((Path::one_or_two(flow.path), flow.offloaded))
    }

    /// Classifies a packet from `group` on; with `remember`, keeps the answer for the flow where that is sound.
    pub(super) fn classify(
        &mut self,
        group: Group,
        wide: &WideKey,
        key: FlowKey,
        now: Tick,
        remember: bool,
    ) -> Classified {
        let mut path = Path {
            rules: [NO_RULE; MAX_PATH],
            len: 0,
        };
        let mut cacheable = remember;
        let mut group = group;
        loop {
            let Some(classifier) = self.groups.get_mut(&group) else {
                return Classified::Miss;
            };
            let answer = classifier.lookup(wide);
            cacheable &= answer.cacheable;
            let Some(rule) = answer.rule else {
                return Classified::Miss;
            };
            if usize::from(path.len) == MAX_PATH {
                return Classified::TooLong;
            }
            path.rules[usize::from(path.len)] = rule;
            path.len += 1;
            let compiled = self.rule(rule);
            match compiled.verdict {
                // A step may change what the next group looks at, so the next group is asked by `act`, not here.
                Verdict::Jump(next) if compiled.steps.is_empty() => group = next,
                _ => break,
            }
        }
        let slot = (cacheable && path.len <= 2)
            .then(|| self.remember(key, &path, now))
            .flatten();
        Classified::Path(path, slot)
    }

    fn remember(&mut self, key: FlowKey, path: &Path, now: Tick) -> Option<Slot> {
        let flow = Flow {
            path: [path.rules[0], path.rules[1]],
            last_seen: now,
            packets: 1,
            offloaded: false,
        };
        let inserted = self.flows.insert(key, flow).ok()?; // full: classified each time until flows age
        if let Some(twin) = inserted.evicted.filter(|evicted| !evicted.stale)
            && let Some(flow) = self.flows.value_mut(inserted.slot)
        {
            // An earlier frame of this batch put the flow in after both were looked up.
            (flow.packets, flow.offloaded) = (twin.value.packets.saturating_add(1), twin.value.offloaded);
        }
        self.wheel.arm(inserted.slot, now.plus(self.idle));
        Some(inserted.slot)
    }

    /// Marks a flow as held by the network processor.
    pub(super) fn mark_offloaded(&mut self, slot: Slot) {
        if let Some(flow) = self.flows.value_mut(slot) {
            flow.offloaded = true;
        }
    }

    /// Packets that a flow had; what decides whether it is worth offloading.
    pub(super) fn packets(&mut self, slot: Slot) -> Option<(u32, bool)> {
        self.flows
            .value_mut(slot)
            .map(|flow| (flow.packets, flow.offloaded))
    }

    #[inline]
    pub(super) fn count(&mut self, path: &Path, packets: u64, octets: u64, now: Tick) {
        for rule in path.rules() {
            self.counters.add(*rule, packets, octets, now);
        }
    }

    pub(super) fn counter(&self, index: RuleIndex) -> Option<RuleCount> {
        self.counters.get(index)
    }

    /// Installs a rule; its counter starts at zero.
    pub(super) fn install(
        &mut self,
        index: RuleIndex,
        compiled: CompiledRule,
        now: Tick,
    ) -> Result<(), Refused> {
        self.reinstall(
            index,
            compiled,
            RuleCount {
                since: now,
                ..RuleCount::default()
            },
        )
    }

    /// Installs a rule that goes on counting where it was.
    pub(super) fn reinstall(
        &mut self,
        index: RuleIndex,
        rule: CompiledRule,
        count: RuleCount,
    ) -> Result<(), Refused> {
        let (limits, seed) = (self.limits, self.seed);
        let classifier = self
            .groups
            .entry(rule.group)
            .or_insert_with(|| Classifier::new(limits, seed));
        for (done, matching) in rule.rules.iter().enumerate() {
            if let Err(error) = classifier.insert_disjoint(*matching) {
                self.unlink(rule.group, &rule.rules[..done]);
                return Err(Refused::full("pattern", error.to_string()));
            }
        }
        self.counters.open(index, count.since);
        if let Some(last_hit) = count.last_hit {
            self.counters.add(index, count.packets, count.octets, last_hit);
        }
        let at = index.0 as usize;
        if self.rules.len() <= at {
            self.rules.resize_with(at + 1, || None);
        }
        self.rules[at] = Some(rule);
        Ok(())
    }

    /// Removes a rule and returns it with its final count.
    pub(super) fn uninstall(&mut self, index: RuleIndex) -> Option<(CompiledRule, RuleCount)> {
        let rule = self.rules.get_mut(index.0 as usize)?.take()?;
        self.unlink(rule.group, &rule.rules);
        Some((rule, self.counters.close(index).unwrap_or_default()))
    }

    fn unlink(&mut self, group: Group, rules: &[Rule]) {
        let Some(classifier) = self.groups.get_mut(&group) else {
            return;
        };
        for rule in rules {
            classifier.remove(rule);
        }
        if classifier.is_empty() {
            self.groups.remove(&group);
        }
    }

    /// Forgets every remembered answer: rules changed.
    pub(super) fn forget_flows(&mut self) {
        self.flows.bump_generation();
    }

    /// Removes idle flows, a bounded number per call; `gone` is told of those that were offloaded.
    pub(super) fn age(&mut self, now: Tick, mut gone: impl FnMut()) {
        let (flows, idle) = (&mut self.flows, self.idle);
        self.wheel.advance(now, 1024, |slot| {
            let Some(flow) = flows.value_mut(slot) else {
                return Idle::Gone;
            };
            let deadline = flow.last_seen.plus(idle);
            if !now.reached(deadline) {
                return Idle::Until(deadline);
            }
            let offloaded = flow.offloaded;
            if flows
                .remove_slot(slot)
                .is_some_and(|flow| offloaded && !flow.stale)
            {
                gone(); // a stale flow left the NP when rules changed
            }
            Idle::Gone
        });
    }

    /// Puts the busiest tuples first.
    pub(super) fn resort(&mut self) {
        self.groups.values_mut().for_each(Classifier::resort);
    }
}
