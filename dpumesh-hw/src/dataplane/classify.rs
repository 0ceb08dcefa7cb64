//! Groups of masked rules, followed through jumps, and the flow table in front of them.
//!
//! A packet passes at most [`MAX_PATH`] rules, the last of which says what becomes of it; each counts it. Answers of up
//! to two rules that depend on nothing but the flow key are kept in the flow table.

use std::collections::BTreeMap;

use dpumesh_core::steering::Group;

use super::rules::{CompiledRule, Refused, Verdict};
use crate::flow::{
    Classifier, ClassifierLimits, FlowKey, FlowTable, HashSeed, Idle, IdleWheel, Rule, RuleCount,
    RuleCounters, RuleIndex, Slot, TableError, Tick, WideKey,
};

/// Rules that a packet may pass through jumps.
pub(super) const MAX_PATH: usize = 8;

/// What the flow table remembers of a flow: 24 octets.
#[derive(Clone, Copy, Debug)]
pub(super) struct Flow {
    /// The second is [`NO_RULE`] where there is one only.
    rules: [RuleIndex; 2],
    last_seen: Tick,
    packets: u32,
    pub(super) offloaded: bool,
}

const NO_RULE: RuleIndex = RuleIndex(u32::MAX);

/// What a frame adds to the counters of the rules that it passes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Load {
    /// Frames that it stands for.
    pub(super) packets: u64,
    pub(super) octets: u64,
    pub(super) now: Tick,
}

/// The rule that says where a packet goes, after those that only sent it to another group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Classified {
    /// This one; with the slot when the flow is in the table.
    Rule(RuleIndex, Option<Slot>),
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
    pub(super) fn new(
        flows: u32,
        idle: u32,
        limits: ClassifierLimits,
        seed: HashSeed,
        now: Tick,
    ) -> Result<Self, TableError> {
        Ok(Self {
            groups: BTreeMap::new(),
            rules: Vec::new(),
            counters: RuleCounters::default(),
            flows: FlowTable::new(flows, seed)?,
            wheel: IdleWheel::new(flows, now),
            limits,
            seed,
            idle,
        })
    }

    pub(super) fn flows(&self) -> usize {
        self.flows.len()
    }

    #[inline]
    pub(super) fn rule(&self, index: RuleIndex) -> &CompiledRule {
        let rule = self.rules[index.0 as usize].as_ref();
        rule.expect("answers name installed rules: flows are forgotten when rules change")
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

    /// The last rule of a flow that [`RuleTables::lookup`] found in this batch, and whether the NP holds the flow. Counts
    /// for all its rules.
    #[inline]
    pub(super) fn hit(&mut self, slot: Slot, load: Load) -> Option<(RuleIndex, bool)> {
        let flow = self.flows.value_mut(slot)?;
        flow.last_seen = load.now;
        flow.packets = flow.packets.saturating_add(1);
        let (rules, offloaded) = (flow.rules, flow.offloaded);
        self.count(rules[0], load);
        if rules[1] == NO_RULE {
            return Some((rules[0], offloaded));
        }
        self.count(rules[1], load);
        Some((rules[1], offloaded))
    }

    /// Classifies a packet from `group` on and counts for all rules on its way, unless it gets nowhere. With `remember`,
    /// keeps the answer for the flow where that is sound.
    pub(super) fn classify(
        &mut self,
        group: Group,
        wide: &WideKey,
        key: FlowKey,
        load: Load,
        remember: bool,
    ) -> Classified {
        let mut rules = [NO_RULE; MAX_PATH];
        let mut passed = 0;
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
            if passed == MAX_PATH {
                return Classified::TooLong;
            }
            rules[passed] = rule;
            passed += 1;
            let compiled = self.rule(rule);
            match compiled.verdict {
                // A step may change what the next group looks at, so the next group is asked after `act`, not here.
                Verdict::Jump(next) if compiled.steps.is_empty() => group = next,
                _ => break,
            }
        }
        rules[..passed].iter().for_each(|rule| self.count(*rule, load));
        let remembered = cacheable && passed <= 2;
        let slot = if remembered {
            self.remember(key, [rules[0], rules[1]], load.now)
        } else {
            None
        };
        Classified::Rule(rules[passed - 1], slot)
    }

    fn remember(&mut self, key: FlowKey, rules: [RuleIndex; 2], now: Tick) -> Option<Slot> {
        let flow = Flow {
            rules,
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
    fn count(&mut self, rule: RuleIndex, load: Load) {
        self.counters.add(rule, load.packets, load.octets, load.now);
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
