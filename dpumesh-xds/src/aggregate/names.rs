//! One name space for resources that many control-plane streams call the same.
//!
//! Resources with the same name and the same content are one. Of those that differ, one keeps the name and the others get `@` and the
//! start of their hash. What belongs to one pod always carries its pod's name.
//!
//! A name is never given to another content while the one that had it is still there: between two responses of the control plane a proxy
//! would send one pod's connections another pod's way, and a kept connection would look for a cluster that has gone. So the names of the last
//! time count: who had one keeps it. A new content takes over the name where the old one has gone and nobody else wants it (an update of
//! all pods' resource), and where nobody ever had it (then most pods' content).

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::ir::Hash;

/// What tells resources of one name apart.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Variant {
    pub(super) hash: Hash,
    /// The only pod that may use it.
    pub(super) owner: Option<String>,
}

/// All variants of all names, with the number of pods that have each.
#[derive(Debug, Default)]
pub(super) struct Census(BTreeMap<String, BTreeMap<Variant, usize>>);

/// The final name of each variant of each name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Settled(BTreeMap<String, HashMap<Variant, String>>);

impl Settled {
    /// The final name of what [`Census::add`] was told of.
    pub(super) fn name(&self, name: &str, variant: &Variant) -> String {
        self.0[name][variant].clone()
    }
}

impl Census {
    pub(super) fn add(&mut self, name: &str, variant: Variant) {
        *self
            .0
            .entry(name.to_owned())
            .or_default()
            .entry(variant)
            .or_default() += 1;
    }

    /// Gives the names, given the last time's.
    pub(super) fn settle(self, before: &Settled) -> Settled {
        let mut taken: BTreeSet<String> = self.0.keys().cloned().collect();
        // What others call their own now is nobody else's.
        let kept = |name: &String, variant: &Variant| {
            let had = before.0.get(name)?.get(variant)?;
            (had == name || !self.0.contains_key(had)).then(|| had.clone())
        };
        for (name, variants) in &self.0 {
            taken.extend(variants.keys().filter_map(|variant| kept(name, variant)));
        }
        let mut settled = Settled::default();
        for (name, variants) in &self.0 {
            let heir = heir(name, variants, before.0.get(name));
            let mut names = HashMap::new();
            for variant in variants.keys() {
                let new = match kept(name, variant) {
                    Some(kept) => kept,
                    None if heir == Some(variant) => name.clone(),
                    None => fresh(name, variant, &mut taken),
                };
                names.insert(variant.clone(), new);
            }
            settled.0.insert(name.clone(), names);
        }
        settled
    }
}

/// The variant that gets the name itself, if one does that has no name yet.
fn heir<'a>(
    name: &str,
    variants: &'a BTreeMap<Variant, usize>,
    had: Option<&HashMap<Variant, String>>,
) -> Option<&'a Variant> {
    let mut shared = variants.iter().filter(|(variant, _)| variant.owner.is_none());
    let Some(had) = had else {
        let most = shared.max_by(|a, b| a.1.cmp(b.1).then_with(|| b.0.cmp(a.0)));
        return most.map(|(variant, _)| variant);
    };
    let held = variants
        .keys()
        .any(|variant| had.get(variant).is_some_and(|had| had == name));
    match (shared.next(), shared.next()) {
        (Some((only, _)), None) if !held => Some(only),
        _ => None,
    }
}

/// A name that nobody has.
fn fresh(name: &str, variant: &Variant, taken: &mut BTreeSet<String>) -> String {
    let new = match &variant.owner {
        Some(pod) => format!("{name}@{pod}"),
        None => format!("{name}@{}", variant.hash.short()),
    };
    if taken.insert(new.clone()) {
        return new;
    }
    let longer = format!("{new}-{}", variant.hash.version());
    taken.insert(longer.clone());
    longer
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn variant(text: &str, owner: Option<&str>) -> Variant {
        Variant {
            hash: Hash::of(text.as_bytes()),
            owner: owner.map(str::to_owned),
        }
    }

    fn settled(contents: &[&str], before: &Settled) -> Settled {
        let mut census = Census::default();
        for content in contents {
            census.add("80", variant(content, None));
        }
        census.settle(before)
    }

    #[test]
    fn the_most_common_variant_takes_a_new_name() {
        let mut census = Census::default();
        for hash in ["a", "b", "b"] {
            census.add("80", variant(hash, None));
        }
        census.add("c", variant("x", Some("p.ns")));
        let settled = census.settle(&Settled::default());
        assert_eq!(settled.name("80", &variant("b", None)), "80");
        let rare = variant("a", None);
        assert_eq!(settled.name("80", &rare), format!("80@{}", rare.hash.short()));
        assert_eq!(settled.name("c", &variant("x", Some("p.ns"))), "c@p.ns");
    }

    #[test]
    fn an_update_of_all_pods_keeps_the_name() {
        let first = settled(&["a", "a"], &Settled::default());
        let second = settled(&["b", "b"], &first);
        assert_eq!(second.name("80", &variant("b", None)), "80");
    }

    #[test]
    fn a_majority_takes_no_name_away() {
        let first = settled(&["a", "a", "b"], &Settled::default());
        let second = settled(&["a", "b", "b", "b"], &first);
        assert_eq!(first, second);
        // One pod after the other is told of an update.
        let third = settled(&["a", "c"], &second);
        assert_eq!(third.name("80", &variant("a", None)), "80");
        let fourth = settled(&["c", "c"], &third);
        assert_eq!(
            fourth.name("80", &variant("c", None)),
            third.name("80", &variant("c", None))
        );
    }

    #[test]
    fn an_owners_resource_changes_under_its_name() {
        let of = |content, before: &Settled| {
            let mut census = Census::default();
            census.add("in", variant(content, Some("p.ns")));
            census.settle(before)
        };
        let first = of("a", &Settled::default());
        let second = of("b", &first);
        assert_eq!(second.name("in", &variant("b", Some("p.ns"))), "in@p.ns");
    }

    proptest! {
        /// Names and contents as small numbers, a few of each, over a few rounds.
        #[test]
        fn a_name_stays_with_its_content_as_long_as_that_is_there(
            rounds in prop::collection::vec(prop::collection::vec((0_u8..3, 0_u8..4, 0_u8..6), 0..8), 1..8)
        ) {
            let mut before = Settled::default();
            for round in rounds {
                let mut census = Census::default();
                for (name, content, owner) in round {
                    // Names that look like ones given to variants, too.
                    let name = match name {
                        2 => format!("0@{}", Hash::of(b"1").short()),
                        plain => plain.to_string(),
                    };
                    let owner = (owner < 2).then(|| format!("pod-{owner}"));
                    census.add(&name, variant(&content.to_string(), owner.as_deref()));
                }
                let after = census.settle(&before);
                let mut all: Vec<&String> = after.0.values().flat_map(HashMap::values).collect();
                let count = all.len();
                all.sort();
                all.dedup();
                prop_assert_eq!(all.len(), count, "two have one name");
                for (name, variants) in &after.0 {
                    let had = before.0.get(name);
                    for (variant, new) in variants {
                        if let Some(old) = had.and_then(|had| had.get(variant))
                            && (old == name || !after.0.contains_key(old))
                        {
                            prop_assert_eq!(old, new);
                        }
                    }
                }
                before = after;
            }
        }
    }
}
