//! Finds, among rules of equal group and priority, one that some frame could match as well and that acts differently.
//!
//! Rules are kept by *shape*: the bits that they compare. A new rule is looked up in each other shape by the bits that both
//! compare, so rules that differ there are never touched, and a rule whose actions are equal is skipped without a look at
//! its pattern. Shapes are few in practice. The lookup tables for common bits are made on demand, only where a
//! shape is large, and in bounded number; elsewhere all rules of a shape are compared.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use dpumesh_core::steering::{Action, Group, Priority};

use super::cube::{Cube, Words};

/// The rules of a store, by slot, ready to be searched for conflicts.
#[derive(Debug, Default)]
pub(super) struct ConflictIndex {
    levels: HashMap<Level, BTreeMap<Words, Shape>>,
    members: Vec<Option<Member>>,
    action_lists: HashMap<Vec<Action>, (ActionsId, usize)>,
    next_actions: u64,
}

type Level = (Group, Priority);

/// Interned list of actions: equal ids mean equal lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct ActionsId(u64);

#[derive(Debug)]
struct Member {
    level: Level,
    cube: Cube,
    actions: Vec<Action>,
    actions_id: ActionsId,
}

/// Slots of rules, those with equal actions together.
type Slots = BTreeSet<(ActionsId, u32)>;

/// Rules that compare the same bits.
#[derive(Debug, Default)]
struct Shape {
    all: Slots,
    /// By the value of some of the bits.
    tables: HashMap<Words, HashMap<Words, Slots>>,
}

/// From how many rules on a shape is worth a table for a new set of common bits.
const TABLE_FROM: usize = 16;
/// Most tables of one shape.
const MAX_TABLES: usize = 64;

impl ConflictIndex {
    /// The slot of a rule that contradicts one with this pattern and these actions.
    pub(super) fn find(
        &mut self,
        group: Group,
        priority: Priority,
        cube: &Cube,
        actions: &[Action],
    ) -> Option<u32> {
        let harmless = self.action_lists.get(actions).map(|(id, _)| *id);
        let members = &self.members;
        let contradicts = |slot: u32| {
            members
                .get(slot as usize)
                .and_then(Option::as_ref)
                .is_some_and(|member| member.cube.meets(cube))
        };
        let shapes = self.levels.get_mut(&(group, priority))?;
        shapes.iter_mut().find_map(|(mask, shape)| {
            let common = and(mask, &cube.mask);
            let candidates = shape.candidates(&common, &cube.value, members)?;
            others(candidates, harmless).find(|slot| contradicts(*slot))
        })
    }

    /// Enters a rule.
    pub(super) fn insert(
        &mut self,
        slot: u32,
        group: Group,
        priority: Priority,
        cube: Cube,
        actions: &[Action],
    ) {
        let actions_id = self.intern(actions);
        let level = (group, priority);
        let shape = self
            .levels
            .entry(level)
            .or_default()
            .entry(cube.mask)
            .or_default();
        shape.all.insert((actions_id, slot));
        for (bits, table) in &mut shape.tables {
            table
                .entry(and(bits, &cube.value))
                .or_default()
                .insert((actions_id, slot));
        }
        let index = slot as usize;
        if self.members.len() <= index {
            self.members.resize_with(index + 1, || None);
        }
        self.members[index] = Some(Member {
            level,
            cube,
            actions: actions.to_vec(),
            actions_id,
        });
    }

    /// Takes a rule out.
    pub(super) fn remove(&mut self, slot: u32) {
        let Some(member) = self.members.get_mut(slot as usize).and_then(Option::take) else {
            return;
        };
        let entry = (member.actions_id, slot);
        if let Some(shapes) = self.levels.get_mut(&member.level) {
            if let Some(shape) = shapes.get_mut(&member.cube.mask) {
                shape.remove(&member.cube, entry);
                if shape.all.is_empty() {
                    shapes.remove(&member.cube.mask);
                }
            }
            if shapes.is_empty() {
                self.levels.remove(&member.level);
            }
        }
        if let Some((_, uses)) = self.action_lists.get_mut(&member.actions) {
            *uses -= 1;
            if *uses == 0 {
                self.action_lists.remove(&member.actions);
            }
        }
    }

    fn intern(&mut self, actions: &[Action]) -> ActionsId {
        if let Some((id, uses)) = self.action_lists.get_mut(actions) {
            *uses += 1;
            return *id;
        }
        let id = ActionsId(self.next_actions);
        self.next_actions += 1;
        self.action_lists.insert(actions.to_vec(), (id, 1));
        id
    }
}

impl Shape {
    /// Rules whose `common` bits are those of `value`; possibly more.
    fn candidates(&mut self, common: &Words, value: &Words, members: &[Option<Member>]) -> Option<&Slots> {
        let makes_table = self.all.len() >= TABLE_FROM && self.tables.len() < MAX_TABLES;
        if !self.tables.contains_key(common) {
            if !makes_table {
                return Some(&self.all);
            }
            let table = self.table(common, members);
            self.tables.insert(*common, table);
        }
        self.tables[common].get(&and(common, value))
    }

    fn table(&self, bits: &Words, members: &[Option<Member>]) -> HashMap<Words, Slots> {
        let mut table: HashMap<Words, Slots> = HashMap::new();
        for entry in &self.all {
            if let Some(member) = members.get(entry.1 as usize).and_then(Option::as_ref) {
                table
                    .entry(and(bits, &member.cube.value))
                    .or_default()
                    .insert(*entry);
            }
        }
        table
    }

    fn remove(&mut self, cube: &Cube, entry: (ActionsId, u32)) {
        self.all.remove(&entry);
        for (bits, table) in &mut self.tables {
            let key = and(bits, &cube.value);
            if let Some(slots) = table.get_mut(&key) {
                slots.remove(&entry);
                if slots.is_empty() {
                    table.remove(&key);
                }
            }
        }
    }
}

/// All slots but those with these actions.
fn others(slots: &Slots, harmless: Option<ActionsId>) -> impl Iterator<Item = u32> {
    let (before, behind) = match harmless {
        None => (slots.range(..), None),
        Some(id) => (
            slots.range(..(id, 0)),
            Some(slots.range((ActionsId(id.0 + 1), 0)..)),
        ),
    };
    before.chain(behind.into_iter().flatten()).map(|(_, slot)| *slot)
}

fn and(one: &Words, other: &Words) -> Words {
    std::array::from_fn(|i| one[i] & other[i])
}

#[cfg(test)]
mod tests {
    use dpumesh_core::steering::{IpMatch, IpProtocol, Pattern, PortRange};
    use proptest::prelude::*;

    use super::*;

    /// Few shapes with many members each, so that tables are made, kept and searched.
    fn patterns() -> impl Strategy<Value = Pattern> {
        let address = (0..16u32, prop::sample::select(vec![30u8, 31, 32])).prop_map(|(host, bits)| {
            let net = ipnet::Ipv4Net::new(host.into(), bits).expect("in range").trunc();
            IpMatch::Prefix(net.into())
        });
        let range = (0..8u16, 0..3u16).prop_map(|(first, more)| PortRange {
            first,
            last: first + more,
        });
        (
            prop::option::weighted(0.8, address),
            prop::option::weighted(0.7, range),
        )
            .prop_map(|(ip_dst, l4_dst)| Pattern {
                ip_dst,
                l4_dst,
                ip_proto: Some(IpProtocol::TCP),
                ..Pattern::default()
            })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn the_index_finds_what_comparing_all_finds(
            steps in prop::collection::vec((patterns(), 0..3u32, 0..200u32, any::<bool>()), 1..300)
        ) {
            let (group, priority) = (Group(0), Priority(0));
            let mut index = ConflictIndex::default();
            let mut all: BTreeMap<u32, (Cube, Vec<Action>)> = BTreeMap::new();
            for (pattern, mark, slot, remove) in steps {
                let (cube, actions) = (Cube::of(&pattern), vec![Action::Mark(mark), Action::Drop]);
                let found = index.find(group, priority, &cube, &actions);
                let contradicts = |other: &(Cube, Vec<Action>)| other.1 != actions && other.0.meets(&cube);
                prop_assert_eq!(found.is_some(), all.values().any(contradicts));
                prop_assert!(found.is_none_or(|slot| contradicts(&all[&slot])));
                prop_assert_eq!(index.find(Group(1), priority, &cube, &actions), None);
                // Rules go in whether they contradict or not: the index holds what it is told to.
                if all.contains_key(&slot) && remove {
                    index.remove(slot);
                    all.remove(&slot);
                }
                if let std::collections::btree_map::Entry::Vacant(free) = all.entry(slot) {
                    index.insert(slot, group, priority, cube.clone(), &actions);
                    free.insert((cube, actions));
                }
            }
            for slot in all.into_keys() {
                index.remove(slot);
            }
            prop_assert!(index.levels.is_empty() && index.action_lists.is_empty());
        }
    }
}
