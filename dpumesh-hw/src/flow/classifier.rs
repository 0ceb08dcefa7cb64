//! [`Classifier`]: masked rules with priorities, found by tuple space search; the second table, asked on a miss of the
//! first.
//!
//! Rules with the same mask form a *tuple*, which is one hash table. A lookup asks tuple after tuple, the one with the
//! best rule first, and stops when no later tuple can win. Lower number = higher priority. Among equal priorities the
//! tuple that won most often comes first.
//!
//! **Ties.** Two rules of equal priority that some packet matches both: the lower [`RuleIndex`] wins. Callers avoid
//! such pairs ([`Classifier::overlapping`] finds them); a classifier that was told of none
//! ([`Classifier::insert_disjoint`]) stops at the first hit among equals as well.
//!
//! **Bounds.** The number of masks is limited at creation: a packet costs at most that many probes, and no rule
//! author (or attacker who makes rules be learned) can raise it. One classifier is one group; the caller chains groups.
//!
//! **Why not decision trees or rte_acl's tries**: an update there rebuilds the structure; here it touches one hash
//! table, and the cost of a lookup is bounded by a number that an operator can read.

#![forbid(unsafe_code)]

use super::RuleIndex;
use super::hash::HashSeed;
use super::key::{WideKey, WideMask};
use super::matching::Match;
use super::tuple::{Entry, PARTS, Ranked, Term, TermValues, Tuple};
use std::cmp::Reverse;

/// A tuple has at most one term per part, and terms are numbered in 8 bits from 1.
const MAX_MASKS: usize = 255;
/// Tuples asked between two looks at the terms.
const BLOCK: usize = 8;

/// How much a classifier may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClassifierLimits {
    /// Distinct masks: the worst case of a lookup. At most 255; more is taken as 255.
    pub masks: usize,
    /// Rules, each match counted.
    pub rules: usize,
}

impl Default for ClassifierLimits {
    /// 64 masks, 65,536 rules.
    fn default() -> Self {
        Self {
            masks: 64,
            rules: 1 << 16,
        }
    }
}

/// One match with its rank. A rule with port ranges is several of these with one index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    /// What it compares.
    pub matching: Match,
    /// Lower number = higher priority.
    pub priority: u32,
    /// What a lookup returns; on a tie the lower index wins.
    pub index: RuleIndex,
}

/// A rule that cannot be added; the classifier is as before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClassifierError {
    /// Its mask would be one more than the limit.
    #[error("rule {}: its mask is new and all {limit} masks are taken", rule.0)]
    Masks {
        /// The rule.
        rule: RuleIndex,
        /// The limit.
        limit: usize,
    },
    /// The classifier holds as many rules as it may.
    #[error("rule {}: all {limit} rules are taken", rule.0)]
    Rules {
        /// The rule.
        rule: RuleIndex,
        /// The limit.
        limit: usize,
    },
    /// The same index with the same match and priority is there.
    #[error("rule {}: it is there already with this match and priority {priority}", rule.0)]
    Duplicate {
        /// The rule.
        rule: RuleIndex,
        /// Its priority.
        priority: u32,
    },
}

/// What a lookup found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lookup {
    /// The winning rule, if any.
    pub rule: Option<RuleIndex>,
    /// Whether every packet of the same [`FlowKey`](super::FlowKey) gets the same answer, so that the answer (a miss,
    /// too) may be cached by flow key.
    pub cacheable: bool,
}

/// A rule set of one group. A value: build another one aside and move it in, or edit in place between batches.
///
/// ```
/// use dpumesh_hw::flow::*;
/// let mut rules = Classifier::new(ClassifierLimits::default(), HashSeed::new(0x5eed));
/// let web = Match::any().dst("10.0.0.0/8".parse()?)?.proto(6).dst_port(PortMask::exact(80));
/// rules.insert(Rule { matching: web, priority: 10, index: RuleIndex(1) })?;
/// rules.insert(Rule { matching: Match::any(), priority: 1000, index: RuleIndex(0) })?;
/// let packet = WideKey::new(&WideFields {
///     flow: FlowKey::new(&FlowFields { dst: mapped("10.1.1.1".parse()?), dst_port: 80, proto: 6, ..Default::default() }),
///     eth_src: [0; 6], eth_dst: [0; 6], ethertype: 0x0800, vlan: None, mark: 0, tcp_flags: 0, dscp: 0,
/// });
/// assert_eq!(rules.lookup(&packet), Lookup { rule: Some(RuleIndex(1)), cacheable: true });
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Classifier {
    /// Ordered: best priority first, then hits.
    tuples: Vec<Tuple>,
    limits: ClassifierLimits,
    rules: usize,
    /// Rules that may overlap another one of equal priority.
    ties: usize,
    seed: HashSeed,
    /// Terms 1, 2, … of the tuples' hashes, roughly in the order in which they are needed.
    terms: Vec<Numbered>,
    /// How many of the terms each block of tuples needs.
    needs: Vec<usize>,
    /// The first tuple that looks beyond the flow key.
    first_beyond: usize,
    /// The terms' values for the packet at hand.
    values: Box<TermValues>,
}

#[derive(Clone, Copy, Debug)]
struct Numbered {
    term: Term,
    /// From 1, by part: where its value is.
    number: u8,
}

/// How far a lookup has come.
#[derive(Clone, Copy)]
struct Scan {
    /// Tuples asked so far, which is also the next one.
    asked: usize,
    /// The first tuple that cannot win any more.
    end: usize,
    /// Terms computed.
    computed: usize,
}

impl Classifier {
    /// An empty rule set. `seed` must be secret, see [`HashSeed`].
    pub fn new(limits: ClassifierLimits, seed: HashSeed) -> Self {
        let limits = ClassifierLimits {
            masks: limits.masks.min(MAX_MASKS),
            ..limits
        };
        Self {
            tuples: Vec::new(),
            limits,
            rules: 0,
            ties: 0,
            seed,
            terms: Vec::new(),
            needs: Vec::new(),
            first_beyond: usize::MAX,
            values: Box::new([[0; 256]; PARTS]),
        }
    }

    /// The limits given at creation.
    pub fn limits(&self) -> ClassifierLimits {
        self.limits
    }

    /// Rules held, each match counted.
    pub fn len(&self) -> usize {
        self.rules
    }

    /// Whether there is no rule.
    pub fn is_empty(&self) -> bool {
        self.rules == 0
    }

    /// Distinct masks in use.
    pub fn masks(&self) -> usize {
        self.tuples.len()
    }

    /// The best rule for a packet. Costs at most one probe per mask; no allocation.
    #[inline]
    pub fn lookup(&mut self, packet: &WideKey) -> Lookup {
        let mut winner: Option<(Ranked, usize)> = None;
        let mut scan = Scan {
            asked: 0,
            end: self.tuples.len(),
            computed: 0,
        };
        while let Some((at, hash)) = self.next_suspect(&mut scan, packet) {
            let Some(entry) = self.tuples[at].find(hash, packet) else {
                continue;
            };
            let found = entry.best;
            if winner.is_none_or(|(best, _)| (found.priority, found.rule) < (best.priority, best.rule)) {
                winner = Some((found, at));
                scan.end = self.end_after(found, scan);
            }
        }
        if let Some((_, at)) = winner {
            self.tuples[at].hits += 1;
        }
        Lookup {
            rule: winner.map(|(best, _)| best.rule),
            cacheable: scan.asked <= self.first_beyond,
        }
    }

    /// Adds a rule that may overlap others of its priority: from now on ties are resolved by index, for which lookups
    /// ask all tuples of the winning priority.
    ///
    /// # Errors
    /// [`ClassifierError`]; nothing has changed then.
    pub fn insert(&mut self, rule: Rule) -> Result<(), ClassifierError> {
        self.add(rule, true)
    }

    /// Adds a rule of which the caller knows that it overlaps none of its own priority, because
    /// [`overlapping`](Self::overlapping) came back empty or by construction. If that is wrong, which of the two wins
    /// is unspecified.
    ///
    /// # Errors
    /// [`ClassifierError`]; nothing has changed then.
    pub fn insert_disjoint(&mut self, rule: Rule) -> Result<(), ClassifierError> {
        self.add(rule, false)
    }

    /// Removes a rule; false if there is none with this match, priority and index.
    pub fn remove(&mut self, rule: &Rule) -> bool {
        let Some(at) = self.tuple_of(&rule.matching.mask) else {
            return false;
        };
        let before = self.tuples[at].best;
        let Some(removed) = self.tuples[at].remove(&rule.matching.key, rule.priority, rule.index) else {
            return false;
        };
        self.rules -= 1;
        self.ties -= usize::from(removed.tie);
        if self.tuples[at].is_empty() {
            self.tuples.remove(at);
            if self.terms.len() > 2 * PARTS * self.tuples.len() {
                self.number_terms();
            }
            self.order();
        } else if self.tuples[at].best != before {
            self.order();
        }
        true
    }

    /// The first rule of [`overlapping`](Self::overlapping).
    pub fn conflicts(&self, mask: &WideMask, key: &WideKey, priority: u32) -> Option<RuleIndex> {
        self.overlapping(mask, key, priority).next()
    }

    /// Rules of equal priority that some packet matches together with (`mask`, `key`), so that a caller can refuse a
    /// rule whose action differs from theirs.
    ///
    /// Cost: masks without a rule of this priority are skipped; a mask that lies within `mask` costs one lookup; any
    /// other mask costs a scan of its rules, some nanoseconds each. Rules that share few shapes, or that have
    /// priorities of their own, are checked in under a microsecond; 10,000 rules of one priority in many crossing
    /// masks take tens of microseconds per check.
    pub fn overlapping<'a>(
        &'a self,
        mask: &WideMask,
        key: &WideKey,
        priority: u32,
    ) -> impl Iterator<Item = RuleIndex> + use<'a> {
        let (mask, key) = (*mask, *key);
        let tuples = self
            .tuples
            .iter()
            .filter(move |tuple| tuple.has_priority(priority));
        let ranked = tuples.flat_map(move |tuple| tuple.overlapping(mask, key).flat_map(Entry::ranked));
        ranked.filter(move |r| r.priority == priority).map(|r| r.rule)
    }

    /// Puts the tuples that won most first among those of equal priority, and halves what counts for next time. For a
    /// quiet moment between batches.
    pub fn resort(&mut self) {
        self.order();
        self.number_terms();
        self.index();
        for tuple in &mut self.tuples {
            tuple.hits /= 2;
        }
    }

    fn add(&mut self, rule: Rule, tie: bool) -> Result<(), ClassifierError> {
        if self.rules == self.limits.rules {
            return Err(ClassifierError::Rules {
                rule: rule.index,
                limit: self.limits.rules,
            });
        }
        let ranked = Ranked {
            priority: rule.priority,
            rule: rule.index,
            tie,
        };
        let at = match self.tuple_of(&rule.matching.mask) {
            Some(at) => at,
            None if self.tuples.len() >= self.limits.masks => {
                return Err(ClassifierError::Masks {
                    rule: rule.index,
                    limit: self.limits.masks,
                });
            }
            None => {
                self.tuples.push(Tuple::new(rule.matching.mask, self.seed));
                self.tuples.len() - 1
            }
        };
        let fresh = self.tuples[at].is_empty();
        let before = self.tuples[at].best;
        if !self.tuples[at].insert(&rule.matching.key, ranked) {
            return Err(ClassifierError::Duplicate {
                rule: rule.index,
                priority: rule.priority,
            });
        }
        if fresh && !self.assign_terms(at) {
            // The terms of tuples that are gone took up the numbers.
            self.number_terms();
        }
        self.rules += 1;
        self.ties += usize::from(tie);
        if fresh || self.tuples[at].best != before {
            self.order();
        }
        Ok(())
    }

    fn tuple_of(&self, mask: &WideMask) -> Option<usize> {
        self.tuples.iter().position(|tuple| tuple.mask() == mask)
    }

    /// The next tuple that does not say no, with the packet's hash. The hot loop of a miss: what can be decided once
    /// for eight tuples, or for all, is.
    #[inline]
    fn next_suspect(&mut self, scan: &mut Scan, packet: &WideKey) -> Option<(usize, u64)> {
        while scan.asked < scan.end {
            self.compute_terms(scan, packet);
            if scan.asked.is_multiple_of(BLOCK)
                && scan.asked + BLOCK <= scan.end
                && let Some(block) = self.tuples[scan.asked..].first_chunk::<BLOCK>()
                && block
                    .iter()
                    .fold(true, |no, tuple| no & tuple.is_no(tuple.hash(&self.values)))
            {
                scan.asked += BLOCK;
                continue;
            }
            let tuple = &self.tuples[scan.asked];
            let hash = tuple.hash(&self.values);
            scan.asked += 1;
            if !tuple.is_no(hash) {
                return Some((scan.asked - 1, hash));
            }
        }
        None
    }

    /// Computes the terms that the block of tuples at hand needs and no earlier one did.
    #[inline]
    fn compute_terms(&mut self, scan: &mut Scan, packet: &WideKey) {
        let need = self.needs[scan.asked / BLOCK];
        while scan.computed < need {
            let Numbered { term, number } = self.terms[scan.computed];
            self.values[term.part()][usize::from(number)] = term.value(&self.seed, packet);
            scan.computed += 1;
        }
    }

    /// Behind which tuple no rule can beat `found`.
    fn end_after(&self, found: Ranked, scan: Scan) -> usize {
        let could_win = |best: u32| best < found.priority || (best == found.priority && self.ties > 0);
        let rest = &self.tuples[scan.asked..scan.end];
        scan.asked + rest.iter().take_while(|tuple| could_win(tuple.best)).count()
    }

    /// Numbers all terms anew in the order in which the tuples need them.
    fn number_terms(&mut self) {
        self.terms.clear();
        for at in 0..self.tuples.len() {
            self.assign_terms(at);
        }
    }

    /// Gives the terms of a tuple numbers; false if a part has run out of them.
    fn assign_terms(&mut self, at: usize) -> bool {
        let (mut numbers, mut need) = ([0; PARTS], 0);
        for term in self.tuples[at].terms().into_iter().flatten() {
            let position = match self.terms.iter().position(|known| known.term == term) {
                Some(position) => position,
                None => {
                    let of_part = self.terms.iter().filter(|known| known.term.part() == term.part());
                    let Ok(number) = u8::try_from(of_part.count() + 1) else {
                        return false;
                    };
                    self.terms.push(Numbered { term, number });
                    self.terms.len() - 1
                }
            };
            numbers[term.part()] = self.terms[position].number;
            need = need.max(position + 1);
        }
        self.tuples[at].assign(numbers, need);
        true
    }

    fn order(&mut self) {
        self.tuples.sort_by_key(|tuple| (tuple.best, Reverse(tuple.hits)));
        self.index();
    }

    /// Brings what depends on the tuples' order and terms up to date.
    fn index(&mut self) {
        self.needs.clear();
        let needs = self
            .tuples
            .chunks(BLOCK)
            .map(|block| block.iter().map(|t| t.need).max().unwrap_or(0));
        self.needs.extend(needs);
        self.first_beyond = self
            .tuples
            .iter()
            .position(|tuple| tuple.beyond)
            .unwrap_or(usize::MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::matching::PortMask;
    use proptest::prelude::*;

    fn classifier(masks: usize, rules: usize) -> Classifier {
        Classifier::new(ClassifierLimits { masks, rules }, HashSeed::new(11))
    }

    fn rule(matching: Match, priority: u32, index: u32) -> Rule {
        Rule {
            matching,
            priority,
            index: RuleIndex(index),
        }
    }

    /// Few bits in few words, so that random rules and packets meet.
    fn small_words() -> impl Strategy<Value = [u64; 8]> {
        (0u64..4, 0u64..4, 0u64..4).prop_map(|(a, b, c)| [a << 62, 0, 0, b, c << 30, 0, 0, 0])
    }

    fn small_key() -> impl Strategy<Value = WideKey> {
        (small_words(), 0u64..2).prop_map(|(mut words, mark)| {
            words[7] = mark;
            WideKey::from_words(words)
        })
    }

    fn small_rule() -> impl Strategy<Value = Rule> {
        let wide = prop_oneof![4 => Just(0u64), 1 => Just(1u64)];
        (small_words(), wide, small_key(), 0u32..4, 0u32..30).prop_map(
            |(mut mask, mark, key, priority, index)| {
                mask[7] = mark;
                rule(
                    Match {
                        mask: WideMask::from_words(mask),
                        key,
                    },
                    priority,
                    index,
                )
            },
        )
    }

    #[derive(Clone, Debug)]
    enum Op {
        Insert(Rule),
        Remove(usize),
        Lookup(WideKey),
        Resort,
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            6 => small_rule().prop_map(Op::Insert),
            3 => any::<usize>().prop_map(Op::Remove),
            6 => small_key().prop_map(Op::Lookup),
            1 => Just(Op::Resort),
        ]
    }

    fn same_match(a: &Match, b: &Match) -> bool {
        a.mask == b.mask && a.key.masked(&a.mask) == b.key.masked(&b.mask)
    }

    fn best<'a>(rules: &'a [Rule], packet: &WideKey) -> Option<&'a Rule> {
        rules
            .iter()
            .filter(|r| r.matching.accepts(packet))
            .min_by_key(|r| (r.priority, r.index))
    }

    proptest! {
        #[test]
        fn finds_what_a_linear_search_finds(seed in any::<u128>(), ops in proptest::collection::vec(op(), 1..250)) {
            let mut c = Classifier::new(ClassifierLimits { masks: 20, rules: 60 }, HashSeed::new(seed));
            let mut model: Vec<Rule> = Vec::new();
            for op in ops {
                match op {
                    Op::Insert(r) => {
                        let masks: std::collections::HashSet<_> = model.iter().map(|m| m.matching.mask).collect();
                        let there = model.iter().any(|m| same_match(&m.matching, &r.matching) && (m.priority, m.index) == (r.priority, r.index));
                        let expected = if model.len() == 60 {
                            Err(ClassifierError::Rules { rule: r.index, limit: 60 })
                        } else if masks.len() == 20 && !masks.contains(&r.matching.mask) {
                            Err(ClassifierError::Masks { rule: r.index, limit: 20 })
                        } else if there {
                            Err(ClassifierError::Duplicate { rule: r.index, priority: r.priority })
                        } else {
                            Ok(())
                        };
                        prop_assert_eq!(c.insert(r), expected);
                        if expected.is_ok() {
                            model.push(r);
                        }
                    }
                    Op::Remove(n) if !model.is_empty() => {
                        let r = model.swap_remove(n % model.len());
                        prop_assert!(c.remove(&r));
                        prop_assert!(!c.remove(&r));
                    }
                    Op::Remove(_) => {}
                    Op::Lookup(packet) => {
                        let found = c.lookup(&packet);
                        prop_assert_eq!(found.rule, best(&model, &packet).map(|r| r.index));
                        if found.cacheable {
                            // Same flow key, any mark: the answer must hold.
                            for mark in 0..2 {
                                let mut words = *packet.words();
                                words[7] = mark;
                                let sibling = WideKey::from_words(words);
                                prop_assert_eq!(found.rule, best(&model, &sibling).map(|r| r.index));
                            }
                        }
                    }
                    Op::Resort => c.resort(),
                }
                let masks: std::collections::HashSet<_> = model.iter().map(|m| m.matching.mask).collect();
                prop_assert_eq!((c.len(), c.masks()), (model.len(), masks.len()));
            }
        }

        #[test]
        fn overlaps_are_those_a_common_packet_proves(rules in proptest::collection::vec(small_rule(), 1..40), probe in small_rule()) {
            let mut c = classifier(64, 64);
            let mut model: Vec<Rule> = Vec::new();
            for r in rules {
                if c.insert(r).is_ok() {
                    model.push(r);
                }
            }
            let Match { mask, key } = probe.matching;
            let mut found: Vec<_> = c.overlapping(&mask, &key, probe.priority).collect();
            let mut expected: Vec<_> = model.iter()
                .filter(|r| r.priority == probe.priority)
                .filter(|r| {
                    // The packet that takes each side's bits is matched by both exactly if they overlap.
                    let packet: [u64; 8] = std::array::from_fn(|i| {
                        let m = mask.words()[i];
                        (key.words()[i] & m) | (r.matching.key.words()[i] & !m)
                    });
                    let packet = WideKey::from_words(packet);
                    r.matching.accepts(&packet) && probe.matching.accepts(&packet)
                })
                .map(|r| r.index)
                .collect();
            found.sort_unstable();
            expected.sort_unstable();
            prop_assert_eq!(c.conflicts(&mask, &key, probe.priority).is_some(), !expected.is_empty());
            prop_assert_eq!(found, expected);
        }

        /// With overlaps refused, the early stop among equals changes no answer.
        #[test]
        fn disjoint_rules_need_no_tie_break(rules in proptest::collection::vec(small_rule(), 1..60), packets in proptest::collection::vec(small_key(), 1..40)) {
            let mut c = classifier(64, 64);
            let mut model: Vec<Rule> = Vec::new();
            for r in rules {
                if c.conflicts(&r.matching.mask, &r.matching.key, r.priority).is_none() {
                    c.insert_disjoint(r).unwrap();
                    model.push(r);
                }
            }
            for (n, packet) in packets.iter().enumerate() {
                prop_assert_eq!(c.lookup(packet).rule, best(&model, packet).map(|r| r.index));
                if n % 5 == 0 {
                    c.resort();
                }
            }
        }
    }

    #[test]
    fn one_mask_too_many_is_refused_and_a_freed_one_is_free() {
        let mut c = classifier(2, 10);
        let port = Match::any().dst_port(PortMask::exact(80));
        c.insert(rule(port, 1, 1)).unwrap();
        c.insert(rule(Match::any(), 9, 2)).unwrap();
        let third = rule(Match::any().proto(6), 5, 3);
        let message = c.insert(third).unwrap_err().to_string();
        assert_eq!(message, "rule 3: its mask is new and all 2 masks are taken");
        assert!(c.remove(&rule(port, 1, 1)));
        c.insert(third).unwrap();
        assert_eq!(c.masks(), 2);
    }

    #[test]
    fn the_rule_limit_is_named() {
        let mut c = classifier(4, 1);
        c.insert(rule(Match::any(), 1, 1)).unwrap();
        assert_eq!(
            c.insert(rule(Match::any(), 2, 2)).unwrap_err().to_string(),
            "rule 2: all 1 rules are taken"
        );
    }

    #[test]
    fn a_better_rule_in_front_keeps_answers_cacheable() {
        let mut c = classifier(4, 4);
        c.insert(rule(Match::any().proto(6), 1, 1)).unwrap();
        c.insert(rule(Match::any().mark(1, 1), 2, 2)).unwrap();
        let tcp = Match::any().proto(6).key;
        assert_eq!(
            c.lookup(&tcp),
            Lookup {
                rule: Some(RuleIndex(1)),
                cacheable: true
            }
        );
        let other = Match::any().proto(17).key;
        assert_eq!(
            c.lookup(&other),
            Lookup {
                rule: None,
                cacheable: false
            }
        );
    }

    #[test]
    fn busy_tuples_come_first_among_equals() {
        let mut c = classifier(4, 4);
        let (web, tcp) = (Match::any().dst_port(PortMask::exact(80)), Match::any().proto(17));
        c.insert_disjoint(rule(web, 1, 1)).unwrap();
        c.insert_disjoint(rule(tcp, 1, 2)).unwrap();
        for _ in 0..10 {
            assert_eq!(c.lookup(&tcp.key).rule, Some(RuleIndex(2)));
        }
        c.resort();
        assert_eq!(*c.tuples[0].mask(), tcp.mask);
    }

    #[test]
    fn a_classifier_can_be_built_on_another_thread() {
        fn movable<T: Send + 'static>() {}
        movable::<Classifier>();
        movable::<crate::flow::FlowTable<u64>>();
        movable::<crate::flow::IdleWheel>();
    }
}
